//! `ringtail status`.

use std::io::Write;

use anyhow::bail;
use clap::Args;
use serde_json::Value;

use super::ask::{NodeArg, ask_one, joined, list, text};
use crate::coord::NotAdmitted;
use crate::driver::local_api::Request;

/// Show what a running node knows: itself, relays, peers and their paths, drops.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    node: NodeArg,
    /// Everything, as JSON: also counters per shard and every named drop.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let answer = ask_one(&args.node, &Request::Status)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{answer:#}")?;
    } else {
        write_status(&mut out, &answer)?;
    }
    takes_part(&answer)
}

/// A node that is down, or whose key has expired, is out of its network: scripts that watch it are told by
/// the exit code.
fn takes_part(status: &Value) -> anyhow::Result<()> {
    let why = || text(&status["health"][0]);
    if status["expired"].as_bool() == Some(true) {
        return Err(NotAdmitted(why()).into());
    }
    if status["state"].as_str().is_some_and(|state| state != "up") {
        bail!(why());
    }
    Ok(())
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
    if let Some(state) = status["state"].as_str().filter(|state| *state != "up") {
        return writeln!(out, "{}  {state}", text(&status["hostname"]));
    }
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
    if !status["dns_name"].is_null() {
        let name = text(&status["dns_name"]);
        let owner = text(&status["owner"]);
        let expiry = expiry(status).map_or_else(String::new, |expiry| format!(", {expiry}"));
        writeln!(out, "  {name}, owned by {owner}{expiry}")?;
    }
    let exit = &status["exit"];
    if !exit["node"].is_null() {
        let node = text(&exit["node"]);
        let families = match (exit["ipv4"].as_bool(), exit["ipv6"].as_bool()) {
            (Some(true), Some(true)) => "",
            (Some(true), _) => ", and IPv6 goes nowhere",
            (_, _) => ", and IPv4 goes nowhere",
        };
        writeln!(out, "  exit node: {node}{families}")?;
    }
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
            "{}  {}  {way}  {latency}  tx {} rx {}{}",
            text(&peer["name"]),
            joined(&peer["addresses"]),
            bytes(&peer["tx_bytes"]),
            bytes(&peer["rx_bytes"]),
            remarks(peer)
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

/// A peer's key is told of when it expires within this, in seconds.
const EXPIRES_SOON_S: i64 = 7 * 86_400;

/// What else there is to say of a peer.
fn remarks(peer: &Value) -> String {
    let mut remarks = String::new();
    if !peer["owner"].is_null() {
        remarks += &format!("  {}", text(&peer["owner"]));
    }
    if peer["exit_node"] == true {
        remarks += ", offers an exit";
    }
    if list(&peer["primary_routes"]).next().is_some() {
        remarks += &format!(", routes {}", joined(&peer["primary_routes"]));
    }
    let soon = peer["key_expires_in_s"].as_i64();
    if soon.is_some_and(|left| left < EXPIRES_SOON_S)
        && let Some(expiry) = expiry(peer)
    {
        remarks += &format!(", {expiry}");
    }
    remarks
}

/// When a key expires that has not yet.
fn expiry(node: &Value) -> Option<String> {
    let left = node["key_expires_in_s"].as_i64().filter(|left| *left > 0)?;
    let left = match left {
        0..120 => format!("{left} s"),
        120..7200 => format!("{} min", left / 60),
        7200..172_800 => format!("{} h", left / 3600),
        _ => format!("{} days", left / 86_400),
    };
    Some(format!("key expires in {left}"))
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

/// Where the network meets what the host has of its own.
fn write_host(out: &mut impl Write, host: &Value) -> std::io::Result<()> {
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
    fn status_shows_the_way_to_each_peer_and_only_drops_that_happened() {
        let status = json!({
            "hostname": "a", "addresses": ["10.7.0.1"], "home": {"region": "nyc"},
            "health": ["the roof leaks"], "dns_name": "a.example", "owner": "alice",
            "key_expires_in_s": 179 * 86_400 + 5,
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
                {"name": "h", "held_back": "jailed", "path": null},
                {"name": "i", "home": "fra", "path": {"state": "relay"}, "owner": "bob",
                 "exit_node": true, "primary_routes": ["10.0.0.0/8"], "key_expires_in_s": 7300}],
            "drops": {"no_route": 3, "replay": 0},
            "host": {"conflicts": [{"text": "10.0.0.0/8 takes a part"}], "more_conflicts": 2,
                     "kept_out": ["10.0.0.53"]},
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
            "i  -  relay via fra  -  tx 0 B rx 0 B  bob, offers an exit, routes 10.0.0.0/8, key expires in 2 h\n",
            "  a.example, owned by alice, key expires in 179 days\n",
            "  problem: the roof leaks\n",
            "dropped: no_route 3\n",
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
