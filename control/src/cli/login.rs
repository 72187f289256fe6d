//! `ringtail login`.

use std::io::Write as _;

use anyhow::bail;
use clap::Args;

use super::ask::{NodeArg, text};
use crate::driver::local_api::{Request, ask};
use crate::driver::runtime;

/// Have a person let a running node into its network: prints the address to visit, and waits.
///
/// The address stays good when this ends, and when the node is started again meanwhile.
#[derive(Debug, Args)]
pub(super) struct LoginArgs {
    #[command(flatten)]
    node: NodeArg,
}

pub(super) fn run(args: &LoginArgs) -> anyhow::Result<()> {
    let mut done = false;
    runtime::block_on(async |_| {
        ask(&args.node.path(), &Request::Login, |answer| {
            let mut out = std::io::stdout().lock();
            let user = text(&answer["user"]);
            if !answer["url"].is_null() {
                writeln!(out, "to let this node in, visit {}", text(&answer["url"]))?;
            } else if answer["state"] != "in" {
                writeln!(out, "coordination: {}", text(&answer["state"]))?;
            } else if answer["before"] == true {
                writeln!(out, "this node is in the network already, owned by {user}")?;
            } else {
                writeln!(out, "this node is in the network, owned by {user}")?;
            }
            out.flush()?;
            done = answer["state"] == "in";
            Ok(())
        })
        .await
    })?;
    if !done {
        bail!("the node went away before it was let in; `ringtail login` goes on when it is back");
    }
    Ok(())
}
