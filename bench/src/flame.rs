//! `perf script` output in, folded stacks and a flame graph out.

#![forbid(unsafe_code)]

use anyhow::{Context, bail};
use inferno::collapse::Collapse;
use inferno::collapse::perf::{Folder, Options as FoldOptions};
use inferno::flamegraph::{self, Options as DrawOptions};
use std::io::BufReader;
use std::path::PathBuf;

/// `flame`: from perf's text to a picture.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the folded stacks go, one `frame;frame;frame count` a line.
    #[arg(long)]
    folded: PathBuf,
    /// Where the picture goes.
    #[arg(long)]
    svg: PathBuf,
    /// Heading of the picture.
    #[arg(long, default_value = "ringtail")]
    title: String,
    /// Second line of the heading: what was sampled, and by which event.
    #[arg(long)]
    subtitle: Option<String>,
}

/// Reads `perf script` output from standard input.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut folded = Vec::new();
    Folder::from(FoldOptions::default())
        .collapse(BufReader::new(std::io::stdin().lock()), &mut folded)
        .context("folding perf's stacks")?;
    if folded.is_empty() {
        bail!("perf recorded no samples: was the process busy, and is it still there?");
    }
    std::fs::write(&args.folded, &folded)?;
    let mut options = DrawOptions::default();
    options.title.clone_from(&args.title);
    options.subtitle.clone_from(&args.subtitle);
    let svg = std::fs::File::create(&args.svg)?;
    flamegraph::from_reader(&mut options, folded.as_slice(), svg).context("drawing")?;
    Ok(())
}
