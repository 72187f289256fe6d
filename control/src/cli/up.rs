//! `ringtail up`.

use std::path::PathBuf;

use clap::Args;

use crate::config::NodeConfig;

/// Run a node: join a network and move its traffic until stopped.
///
/// Who is in the network comes from a coordination server (--coord) or from a static network file
/// (--network). All settings can stand in a TOML file (--config) under the same names with
/// underscores; a flag wins over the file.
#[derive(Debug, Args)]
pub(super) struct UpArgs {
    /// Settings file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: NodeConfig,
}

pub(super) fn run(args: UpArgs) -> anyhow::Result<()> {
    let file = match &args.config {
        Some(path) => NodeConfig::read(path)?,
        None => NodeConfig::default(),
    };
    let config = file.overridden_by(args.settings);
    config.check().map_err(anyhow::Error::msg)?;
    crate::driver::node::run(config)
}
