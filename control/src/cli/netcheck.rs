//! `ringtail netcheck`.

use std::io::Write;

use clap::Args;
use serde_json::Value;

use super::ask::{NodeArg, ask_one, joined, list, text};
use crate::driver::local_api::Request;

/// Measure the relays and show what kind of network this node is on.
#[derive(Debug, Args)]
pub(super) struct NetcheckArgs {
    #[command(flatten)]
    node: NodeArg,
    /// The report as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &NetcheckArgs) -> anyhow::Result<()> {
    let answer = ask_one(&args.node, &Request::Netcheck)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{answer:#}")?;
        return Ok(());
    }
    write_netcheck(&mut out, &answer)?;
    Ok(())
}

fn write_netcheck(out: &mut impl Write, report: &Value) -> std::io::Result<()> {
    let unresolved = list(&report["unresolved"]).next().is_some();
    let udp = match report["udp"].as_bool() {
        Some(works) => works.to_string(),
        None if unresolved => "unknown, since no relay could be asked".into(),
        None => "-".into(),
    };
    writeln!(out, "UDP works: {udp}")?;
    if unresolved {
        let names = joined(&report["unresolved"]);
        writeln!(out, "names of relays that do not resolve: {names}")?;
    }
    for (name, works, address) in [("IPv4", "ipv4", "global_v4"), ("IPv6", "ipv6", "global_v6")] {
        let (works, address) = (text(&report[works]), text(&report[address]));
        writeln!(out, "{name}: {works}  public address {address}")?;
    }
    let varies = text(&report["mapping_varies_by_dest_ip"]);
    writeln!(out, "NAT mapping varies by destination: {varies}")?;
    writeln!(out, "nearest relay: {}", text(&report["preferred_region"]))?;
    for region in list(&report["regions"]) {
        match region["latency_ms"].as_f64() {
            Some(ms) => writeln!(out, "  {:<8} {ms:.1} ms", text(&region["region"]))?,
            None => writeln!(out, "  {:<8} no answer", text(&region["region"]))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn netcheck_does_not_blame_udp_for_names_that_do_not_resolve() {
        let said = |report: &Value| {
            let mut out = Vec::new();
            write_netcheck(&mut out, report).unwrap();
            String::from_utf8(out).unwrap()
        };
        let out = said(&json!({"udp": null, "unresolved": ["a.example", "b.example"]}));
        let first = "UDP works: unknown, since no relay could be asked\n";
        assert!(out.starts_with(first), "{out}");
        let names = "do not resolve: a.example b.example\n";
        assert!(out.contains(names), "{out}");
        let out = said(&json!({"udp": false, "unresolved": []}));
        assert!(out.starts_with("UDP works: false\nIPv4"), "{out}");
    }
}
