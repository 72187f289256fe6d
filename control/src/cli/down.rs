//! `ringtail down` and `ringtail logout`: a node takes no part any more.

use clap::Args;

use super::ask::{NodeArg, ask_one};
use crate::driver::local_api::Request;

/// Take no part in the network any more, without leaving it; the process stays.
///
/// The TUN interface goes, and with it routes, names and everything else that the node has on this host.
/// `ringtail up` takes part again, and so does a new start of the process.
#[derive(Debug, Args)]
pub(super) struct DownArgs {
    #[command(flatten)]
    node: NodeArg,
}

/// Leave the network: the node's key is good for nothing from then on.
///
/// The machine is known again when it joins anew, by `ringtail login` or with an auth key by
/// `ringtail up`; a new start of the process with an auth key joins too.
#[derive(Debug, Args)]
pub(super) struct LogoutArgs {
    #[command(flatten)]
    node: NodeArg,
}

pub(super) fn down(args: &DownArgs) -> anyhow::Result<()> {
    ask_one(&args.node, &Request::Down).map(drop)
}

pub(super) fn logout(args: &LogoutArgs) -> anyhow::Result<()> {
    ask_one(&args.node, &Request::Logout).map(drop)
}
