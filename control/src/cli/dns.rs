//! `ringtail dns`.

use std::io::Write as _;

use anyhow::bail;
use clap::{Args, Subcommand};
use serde_json::Value;

use super::ask::{NodeArg, ask_one, joined, list, text};
use crate::driver::local_api::Request;

/// Say how names are resolved, or look one up.
#[derive(Debug, Args)]
pub(super) struct DnsArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// What the network says about names, and whom this node asks for which.
    Status {
        #[command(flatten)]
        node: NodeArg,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Ask the network's resolver on this host.
    Query {
        /// The name, whole; or, for PTR, an address.
        name: String,
        /// Type of record.
        #[arg(default_value = "A")]
        kind: String,
        #[command(flatten)]
        node: NodeArg,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(args: &DnsArgs) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match &args.what {
        What::Status { node, json } => {
            let status = ask_one(node, &Request::DnsStatus)?;
            if *json {
                writeln!(out, "{status:#}")?;
                return Ok(());
            }
            tell_status(&mut out, &status)?;
        }
        What::Query {
            name,
            kind,
            node,
            json,
        } => {
            let (name, kind) = (name.clone(), kind.clone());
            let answer = ask_one(node, &Request::DnsQuery { name, kind })?;
            if *json {
                writeln!(out, "{answer:#}")?;
                return Ok(());
            }
            for record in list(&answer["answers"]) {
                let [name, ttl, kind, data] =
                    ["name", "ttl_s", "type", "data"].map(|of| text(&record[of]));
                writeln!(out, "{name}\t{ttl}\t{kind}\t{data}")?;
            }
            if list(&answer["answers"]).next().is_none() {
                bail!("no such record: {}", text(&answer["code"]));
            }
        }
    }
    Ok(())
}

fn tell_status(out: &mut impl std::io::Write, status: &Value) -> anyhow::Result<()> {
    if status["answers"] != true {
        writeln!(
            out,
            "the network has no names, or this node's key has expired: nothing is answered"
        )?;
    } else {
        writeln!(out, "answers at          {}", joined(&status["addresses"]))?;
        let names = if status["magic_dns"] == true {
            "*."
        } else {
            "only whole: *."
        };
        writeln!(
            out,
            "names of nodes      {names}{}",
            text(&status["suffix"])
        )?;
        writeln!(
            out,
            "extra records       {}",
            text(&status["extra_records"])
        )?;
        writeln!(out, "search domains      {}", joined(&status["search"]))?;
        for (suffix, resolvers) in status["routes"].as_object().into_iter().flatten() {
            if list(resolvers).next().is_some() {
                writeln!(out, "*.{suffix} is asked of {}", joined(resolvers))?;
            }
        }
        let own = status["resolvers"].is_null();
        let others = &status[if own { "host_resolvers" } else { "resolvers" }];
        writeln!(out, "all else            {}", joined(others))?;
    }
    let (host, told) = (&status["host"], &status["told"]);
    let by = text(&told["by"]);
    let asks = if host.is_null() {
        "is left alone".to_owned()
    } else if told.is_null() {
        "does not ask us; see `ringtail status`".to_owned()
    } else if host["for_all_names"] == true || told["splits"] != true {
        format!("asks us for all names, by {by}")
    } else {
        format!("asks us for names of the network, by {by}")
    };
    writeln!(out, "the host's resolver {asks}")?;
    for problem in list(&status["problems"]) {
        writeln!(out, "problem: {}", text(problem))?;
    }
    Ok(())
}
