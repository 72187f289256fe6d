//! One figure of act one, for tests that compare it with a bound.

#![forbid(unsafe_code)]

use crate::report::ActOne;
use anyhow::{anyhow, bail};
use std::path::PathBuf;

/// `switches`: which figure of which switch.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory with the event files and ping.json.
    directory: PathBuf,
    /// lost, blackout_s or direct_after_s.
    field: String,
    /// 0: relay to direct, 1: blocked, 2: direct again.
    index: usize,
}

/// Prints the figure.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let act = ActOne::read(&args.directory)?.ok_or_else(|| anyhow!("no events there"))?;
    let switch = act
        .switches
        .get(args.index)
        .ok_or_else(|| anyhow!("no such switch"))?;
    match args.field.as_str() {
        "lost" => println!("{}", switch.lost),
        "blackout_s" => println!("{:.3}", switch.blackout_s),
        "direct_after_s" => {
            let after = switch
                .direct_after_s
                .ok_or_else(|| anyhow!("they never were direct"))?;
            println!("{after:.3}");
        }
        other => bail!("no figure is called {other}"),
    }
    Ok(())
}
