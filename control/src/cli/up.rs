//! `ringtail up`.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::config::NodeConfig;
use crate::driver::local_api::{Request, SOCKET_NAME, ask};
use crate::driver::runtime;
use crate::driver::state::{STATE_DIR_DEFAULT, StateDir};

/// Run a node: join a network and move its traffic until stopped.
///
/// Who is in the network comes from a coordination server (--coord) or from a static network file
/// (--network). All settings can stand in a TOML file (--config) under the same names with
/// underscores; a flag wins over the file. Without any of them it wakes a node that is down.
#[derive(Debug, Args)]
pub(super) struct UpArgs {
    /// Settings file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: NodeConfig,
}

pub(super) fn run(args: UpArgs) -> anyhow::Result<()> {
    if args.config.is_none() && args.settings.is_bare() {
        let dir = args.settings.state_dir.as_deref();
        let dir = dir.unwrap_or_else(|| Path::new(STATE_DIR_DEFAULT));
        if dir.is_dir() && StateDir::open(dir)?.is_in_use()? {
            return wake(&dir.join(SOCKET_NAME));
        }
    }
    let file = match &args.config {
        Some(path) => NodeConfig::read(path)?,
        None => NodeConfig::default(),
    };
    let flags = args.settings.prefs.clone();
    let of_file = file.prefs.clone();
    let mut config = file.overridden_by(args.settings);
    config.check().map_err(anyhow::Error::msg)?;
    config.prefs = of_file;
    crate::driver::node::run(config, flags)
}

/// Has a node that runs take part again, if it is down.
fn wake(socket: &Path) -> anyhow::Result<()> {
    runtime::block_on(async |_| ask(socket, &Request::Up, |_| Ok(())).await)
}
