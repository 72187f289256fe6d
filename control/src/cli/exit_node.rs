//! `ringtail exit-node`.

use std::io::Write as _;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::ask::{NodeArg, ask_one, joined, list, text};
use crate::driver::local_api::Request;

/// Show which nodes offer to be a way out to the Internet.
///
/// One of them is chosen by `ringtail set --exit-node NAME`.
#[derive(Debug, Args)]
pub(super) struct ExitNodeArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// All of them, and how it stands with each.
    List {
        #[command(flatten)]
        node: NodeArg,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(args: &ExitNodeArgs) -> anyhow::Result<()> {
    let What::List { node, json } = &args.what;
    let answer = ask_one(node, &Request::ExitNodes)?;
    let mut out = std::io::stdout().lock();
    if *json {
        writeln!(out, "{answer:#}")?;
        return Ok(());
    }
    for node in list(&answer["nodes"]) {
        let (name, addresses) = (text(&node["name"]), joined(&node["addresses"]));
        writeln!(out, "{name}  {addresses}  {}", standing(node))?;
    }
    Ok(())
}

/// How it stands with one of them.
fn standing(node: &Value) -> String {
    let approved = |family: &str| node["approved"][family].as_bool() == Some(true);
    let families = match (approved("ipv4"), approved("ipv6")) {
        (true, true) => "",
        (true, false) => "IPv4 only, ",
        (false, true) => "IPv6 only, ",
        (false, false) => return "no administrator has approved it".into(),
    };
    let state = if node["online"].as_bool() == Some(false) {
        "offline"
    } else {
        "online"
    };
    let used = if node["in_use"].as_bool() == Some(true) {
        ", in use"
    } else {
        ""
    };
    format!("{families}{state}{used}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_not_approved_is_of_no_use_and_said_so() {
        let of = |ipv4: bool, ipv6: bool, online: bool, used: bool| {
            standing(
                &json!({"approved": {"ipv4": ipv4, "ipv6": ipv6}, "online": online, "in_use": used}),
            )
        };
        assert_eq!(
            of(false, false, true, false),
            "no administrator has approved it"
        );
        assert_eq!(of(true, true, true, true), "online, in use");
        assert_eq!(of(true, false, false, true), "IPv4 only, offline, in use");
    }
}
