//! `ringtail ip` and `ringtail whois`.

use std::io::Write as _;
use std::net::IpAddr;

use anyhow::bail;
use clap::Args;
use serde_json::Value;

use super::ask::{NodeArg, ask_one, joined, list, text};
use crate::driver::local_api::Request;

/// Show the inner addresses of this node, or of a peer.
#[derive(Debug, Args)]
pub(super) struct IpArgs {
    /// A peer's name, inner address or node key.
    peer: Option<String>,
    #[command(flatten)]
    node: NodeArg,
    /// Only the IPv4 address.
    #[arg(short = '4', long, conflicts_with = "ipv6")]
    ipv4: bool,
    /// Only the IPv6 address.
    #[arg(short = '6', long)]
    ipv6: bool,
}

/// Show which node has an inner address, or routes it.
#[derive(Debug, Args)]
pub(super) struct WhoisArgs {
    /// The address; a port behind it, as in logs, does not count.
    address: String,
    #[command(flatten)]
    node: NodeArg,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn ip(args: &IpArgs) -> anyhow::Result<()> {
    let peer = args.peer.clone();
    let answer = ask_one(&args.node, &Request::Ip { peer })?;
    let addresses = list(&answer["addresses"]).map(text);
    let wanted = |v6: bool| !(args.ipv4 && v6 || args.ipv6 && !v6);
    let wanted: Vec<String> = addresses
        .filter(|text| wanted(text.contains(':')))
        .collect();
    if wanted.is_empty() {
        bail!("there is no such address");
    }
    let mut out = std::io::stdout().lock();
    for address in wanted {
        writeln!(out, "{address}")?;
    }
    Ok(())
}

pub(super) fn whois(args: &WhoisArgs) -> anyhow::Result<()> {
    let Some(address) = address(&args.address) else {
        bail!("{} is no address", args.address);
    };
    let answer = ask_one(&args.node, &Request::Whois { address })?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{answer:#}")?;
        return Ok(());
    }
    let mut line = |name: &str, value: &Value| match value {
        Value::Null => Ok(()),
        Value::Array(_) => writeln!(out, "{name:<11}{}", joined(value)),
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => {
            writeln!(out, "{name:<11}{}", text(value))
        }
    };
    line("node", &answer["name"])?;
    line("key", &answer["node_key"])?;
    line("addresses", &answer["addresses"])?;
    line("owner", &answer["owner"])?;
    line("routes", &answer["routes"])?;
    line("held back", &answer["held_back"])?;
    Ok(())
}

/// An address, with or without a port.
fn address(text: &str) -> Option<IpAddr> {
    let socket = || {
        text.parse()
            .ok()
            .map(|socket: std::net::SocketAddr| socket.ip())
    };
    text.parse().ok().or_else(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_as_logs_have_it() {
        let of = |text| address(text).map(|address| address.to_string());
        assert_eq!(of("100.64.0.1").as_deref(), Some("100.64.0.1"));
        assert_eq!(of("100.64.0.1:443").as_deref(), Some("100.64.0.1"));
        assert_eq!(of("[fd7a::1]:443").as_deref(), Some("fd7a::1"));
        assert_eq!(of("node"), None);
    }
}
