//! `ringtail restore`, and `ringtail keeper`, which a node starts by itself.

use clap::Args;

use super::StateDirArg;
use crate::driver::keeper;
use crate::driver::ledger::Ledger;
use crate::driver::state::StateDir;

/// Put back what a killed node changed of this host.
///
/// A node puts back by itself what it changed, its keeper when it is killed, the next start when both
/// are. This is for a service manager (ExecStopPost=) and for a person who does not want a next start.
#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    #[command(flatten)]
    node: StateDirArg,
}

/// Wait for the end of the node that started this.
#[derive(Debug, Args)]
pub(super) struct KeeperArgs {
    #[command(flatten)]
    node: StateDirArg,
}

pub(super) fn restore(args: &RestoreArgs) -> anyhow::Result<()> {
    let state = StateDir::open(&args.node.state_dir)?;
    let _lock = state.lock()?;
    // A keeper may be at it.
    let ledger = Ledger::open(&state, keeper::LEDGER_WAIT)?;
    keeper::restore(&state, &ledger, &|| false)
}

pub(super) fn keeper(args: &KeeperArgs) -> anyhow::Result<()> {
    keeper::run(&args.node.state_dir)
}
