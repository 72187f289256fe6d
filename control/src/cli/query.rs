//! `ringtail status`, `ringtail ping` and `ringtail netcheck`: questions to a running node.

use std::io::Write;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use serde_json::Value;

use super::StateDirArg;
use crate::coord::NotAdmitted;
use crate::driver::local_api::{Request, ask};
use crate::driver::runtime;
use crate::driver::state::StateDir;

/// Show what a running node knows: itself, relays, peers and their paths, drops.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    state: StateDirArg,
    /// Everything, as JSON: also counters per shard and every named drop.
    #[arg(long)]
    json: bool,
}

/// Ping a peer below the tunnel and say which way each reply came.
///
/// Prints one line per reply: by relay, with the region, or direct, with the address.
#[derive(Debug, Args)]
pub(super) struct PingArgs {
    /// A peer's name, inner address or node key.
    peer: String,
    #[command(flatten)]
    state: StateDirArg,
    /// Pings to send.
    #[arg(short, long, value_name = "COUNT", default_value_t = 4)]
    count: u32,
    /// Seconds between them.
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    interval: f64,
    /// Stop at the first direct reply.
    #[arg(long)]
    until_direct: bool,
}

/// Measure the relays and show what kind of network this node is on.
#[derive(Debug, Args)]
pub(super) struct NetcheckArgs {
    #[command(flatten)]
    state: StateDirArg,
    /// The report as JSON.
    #[arg(long)]
    json: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give seconds, from 0.01 to 3600".into()),
    }
}

pub(super) fn status(args: &StatusArgs) -> anyhow::Result<()> {
    let answer = ask_one(&args.state, &Request::Status)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{answer:#}")?;
        return not_expired(&answer);
    }
    write_status(&mut out, &answer)?;
    not_expired(&answer)
}

/// A node whose key has expired is out of its network: scripts that watch it are told by the exit
/// code.
fn not_expired(status: &Value) -> anyhow::Result<()> {
    if status["expired"].as_bool() == Some(true) {
        let why = text(&status["health"][0]);
        return Err(NotAdmitted(why).into());
    }
    Ok(())
}

pub(super) fn netcheck(args: &NetcheckArgs) -> anyhow::Result<()> {
    let answer = ask_one(&args.state, &Request::Netcheck)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{answer:#}")?;
        return Ok(());
    }
    write_netcheck(&mut out, &answer)?;
    Ok(())
}

pub(super) fn ping(args: &PingArgs) -> anyhow::Result<()> {
    let socket = StateDir::open(&args.state.state_dir)?.socket();
    let mut replies = 0u32;
    let mut direct = false;
    runtime::block_on(async |_| {
        for n in 0..args.count {
            if n > 0 {
                tokio::time::sleep(Duration::from_secs_f64(args.interval)).await;
            }
            ask(
                &socket,
                &Request::Ping {
                    peer: args.peer.clone(),
                },
                |answer| {
                    let mut out = std::io::stdout().lock();
                    let name = text(&answer["peer"]);
                    match answer["via"].as_str() {
                        None => writeln!(out, "no reply from {name}: {}", text(&answer["reason"]))?,
                        Some(via) => {
                            replies += 1;
                            direct |= via == "direct";
                            let ms = answer["latency_ms"].as_f64().unwrap_or_default();
                            let place = match via {
                                "direct" => format!("direct, {}", text(&answer["address"])),
                                _ => format!("relay {}", text(&answer["region"])),
                            };
                            writeln!(out, "pong from {name} ({place}) in {ms:.3} ms")?;
                        }
                    }
                    Ok(())
                },
            )
            .await?;
            if args.until_direct && direct {
                break;
            }
        }
        Ok(())
    })?;
    if replies == 0 {
        bail!(
            "{} did not answer; `ringtail status` shows what is known of it",
            args.peer
        );
    }
    if args.until_direct && !direct {
        bail!("no direct path to {} yet", args.peer);
    }
    Ok(())
}

fn ask_one(state: &StateDirArg, request: &Request) -> anyhow::Result<Value> {
    let socket = state.state_dir.join("ringtail.sock");
    let mut answer = Value::Null;
    runtime::block_on(async |_| {
        ask(&socket, request, |value| {
            answer = value;
            Ok(())
        })
        .await
    })?;
    if answer.is_null() {
        bail!("the node went away without an answer");
    }
    Ok(answer)
}

/// A string of the answer as it is, anything else as JSON, nothing as a dash.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn joined(value: &Value) -> String {
    let items: Vec<String> = list(value).map(text).collect();
    if items.is_empty() {
        "-".into()
    } else {
        items.join(" ")
    }
}

/// Bytes in the unit that leaves one to three digits before the point.
fn bytes(value: &Value) -> String {
    let mut amount = value.as_f64().unwrap_or_default();
    for unit in ["B", "kB", "MB", "GB"] {
        if amount < 1000.0 {
            return format!("{amount:.0} {unit}");
        }
        amount /= 1000.0;
    }
    format!("{amount:.1} TB")
}

fn write_status(out: &mut impl Write, status: &Value) -> std::io::Result<()> {
    writeln!(
        out,
        "{}  {}  {}",
        text(&status["hostname"]),
        joined(&status["addresses"]),
        text(&status["node_key"])
    )?;
    writeln!(
        out,
        "  {} on {} (mtu {}), {} shard(s), {}, port {}",
        text(&status["version"]),
        text(&status["tun"]["name"]),
        text(&status["tun"]["mtu"]),
        text(&status["shards"]),
        text(&status["driver"]),
        text(&status["listen_port"])
    )?;
    writeln!(
        out,
        "  coordination {} ({}), home relay {}, endpoints {}",
        text(&status["coordination"]["kind"]),
        text(&status["coordination"]["state"]),
        text(&status["home"]["region"]),
        joined(&status["endpoints"])
    )?;
    for problem in list(&status["health"]) {
        writeln!(out, "  problem: {}", text(problem))?;
    }
    if list(&status["offloads"]["tun_refused"]).next().is_some() {
        let refused = joined(&status["offloads"]["tun_refused"]);
        writeln!(out, "  the TUN device refuses super-packets of {refused}")?;
    }
    for relay in list(&status["relays"]) {
        writeln!(
            out,
            "  relay {}: {}",
            text(&relay["region"]),
            text(&relay["state"])
        )?;
    }
    for peer in list(&status["peers"]) {
        let path = &peer["path"];
        let way = way_to(peer);
        let latency = match (path["latency_ms"].as_f64(), &path["fragments"]) {
            (Some(ms), Value::Bool(true)) => format!("{ms:.1} ms, full packets in fragments"),
            (Some(ms), _) => format!("{ms:.1} ms"),
            (None, _) => "-".into(),
        };
        writeln!(
            out,
            "{}  {}  {way}  {latency}  tx {} rx {}",
            text(&peer["name"]),
            joined(&peer["addresses"]),
            bytes(&peer["tx_bytes"]),
            bytes(&peer["rx_bytes"])
        )?;
    }
    write_host(out, &status["host"])?;
    let drops: Vec<String> = status["drops"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, count)| count.as_u64() != Some(0))
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    if !drops.is_empty() {
        writeln!(out, "dropped: {}", drops.join(", "))?;
    }
    Ok(())
}

/// Whom we heard within this time is there, whatever coordination thinks; a session in use is never
/// silent for longer (WireGuard paper §6.5). Seconds.
const HEARD_LATELY_S: f64 = 15.0;

/// How a peer is reached, or why it is not.
fn way_to(peer: &Value) -> String {
    let since = |time: &Value, word: &str| match time.as_str() {
        Some(time) => format!(" {word} {time}"),
        None => String::new(),
    };
    let path = &peer["path"];
    if let Some(why) = peer["held_back"].as_str() {
        return match why {
            "expired" => format!("key expired{}", since(&peer["key_expiry"], "at")),
            why => format!("held back ({why})"),
        };
    }
    let heard = [&peer["last_received_s"], &path["last_pong_s"]];
    let lately = |ago: &Value| ago.as_f64().is_some_and(|ago| ago < HEARD_LATELY_S);
    if peer["online"].as_bool() == Some(false) && !heard.into_iter().any(lately) {
        return format!("offline{}", since(&peer["last_seen"], "since"));
    }
    if let Some(address) = path["address"].as_str() {
        return format!("{} {address}", text(&path["state"]));
    }
    if peer["home"].is_null() {
        return format!("{}, no relay", text(&path["state"]));
    }
    format!("{} via {}", text(&path["state"]), text(&peer["home"]))
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

/// Where the network meets what the host has of its own.
fn write_host(out: &mut impl Write, host: &Value) -> std::io::Result<()> {
    for problem in list(&host["problems"]) {
        writeln!(out, "host: {}", text(problem))?;
    }
    for conflict in list(&host["conflicts"]) {
        writeln!(out, "host: {}", text(&conflict["text"]))?;
    }
    match host["more_conflicts"].as_u64() {
        None | Some(0) => {}
        Some(more) => writeln!(out, "host: and {more} more such routes")?,
    }
    if list(&host["kept_out"]).next().is_some() {
        let addresses = joined(&host["kept_out"]);
        writeln!(
            out,
            "host: outside of the tunnel although a route covers them: {addresses}"
        )?;
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

    #[test]
    fn status_shows_the_way_to_each_peer_and_only_drops_that_happened() {
        let status = json!({
            "hostname": "a", "addresses": ["10.7.0.1"], "home": {"region": "nyc"},
            "health": ["the roof leaks"],
            "peers": [
                {"name": "b", "addresses": ["10.7.0.2"], "home": "fra", "tx_bytes": 12345,
                 "path": {"state": "direct", "address": "192.0.2.2:41641", "latency_ms": 1.25}},
                {"name": "z", "path": {"state": "direct", "address": "192.0.2.4:41641",
                                       "latency_ms": 2.0, "fragments": true}},
                {"name": "c", "home": "fra", "path": {"state": "relay", "address": null}},
                {"name": "d", "home": "fra", "online": false, "last_seen": "2026-11-29T12:00:00Z",
                 "path": {"state": "relay", "address": null}},
                {"name": "e", "home": "fra", "online": false, "last_received_s": 1.0,
                 "path": {"state": "relay", "address": null}},
                {"name": "f", "home": "fra", "online": false, "path": {"state": "relay"}},
                {"name": "g", "held_back": "expired", "expired": true, "path": null,
                 "key_expiry": "2026-11-29T12:00:00Z"},
                {"name": "h", "held_back": "jailed", "path": null}],
            "drops": {"no_route": 3, "replay": 0},
            "host": {"conflicts": [{"text": "10.0.0.0/8 takes a part"}], "more_conflicts": 2,
                     "kept_out": ["10.0.0.53"], "problems": ["no rules"]},
        });
        let mut out = Vec::new();
        write_status(&mut out, &status).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(!out.contains("refuses"), "{out}");
        for line in [
            "b  10.7.0.2  direct 192.0.2.2:41641  1.2 ms  tx 12 kB rx 0 B",
            "192.0.2.4:41641  2.0 ms, full packets in fragments",
            "c  -  relay via fra",
            "d  -  offline since 2026-11-29T12:00:00Z  -",
            "e  -  relay via fra",
            "f  -  offline  -",
            "g  -  key expired at 2026-11-29T12:00:00Z  -",
            "h  -  held back (jailed)  -",
            "  problem: the roof leaks\n",
            "dropped: no_route 3\n",
            "host: no rules\n",
            "host: 10.0.0.0/8 takes a part\n",
            "host: and 2 more such routes\n",
            "host: outside of the tunnel although a route covers them: 10.0.0.53\n",
        ] {
            assert!(out.contains(line), "{line} in {out}");
        }
    }

    #[test]
    fn status_says_what_the_tun_device_refuses() {
        let mut out = Vec::new();
        let status =
            json!({"offloads": {"tun_merging": ["tcp4"], "tun_refused": ["udp4", "udp6"]}});
        write_status(&mut out, &status).unwrap();
        let out = String::from_utf8(out).unwrap();
        let line = "  the TUN device refuses super-packets of udp4 udp6\n";
        assert!(out.contains(line), "{out}");
    }
}
