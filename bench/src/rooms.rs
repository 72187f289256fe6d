//! Cycles per room and shard between two `ringtail status --json` snapshots.

#![forbid(unsafe_code)]

use anyhow::{Context, bail};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// `rooms`: two snapshots of one node.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The earlier snapshot.
    before: PathBuf,
    /// The later snapshot.
    after: PathBuf,
}

/// What is no work of any room.
const WAIT: &str = "wait";

/// What one shard did between the snapshots.
#[derive(Debug, Default, PartialEq)]
struct Shard {
    cycles: BTreeMap<String, u64>,
    packets: u64,
}

/// Prints one table for each shard.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let shards = between(&snapshot(&args.before)?, &snapshot(&args.after)?)?;
    for (number, shard) in shards.iter().enumerate() {
        print!("{}", table(number, shard)?);
    }
    Ok(())
}

fn snapshot(path: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no status", path.display()))
}

fn between(before: &Value, after: &Value) -> anyhow::Result<Vec<Shard>> {
    let (Some(before), Some(after)) = (per_shard(before), per_shard(after)) else {
        bail!("the status has no cycles per shard: is the node running its own data plane?");
    };
    if before.len() != after.len() {
        bail!("the snapshots are of different nodes");
    }
    Ok(before
        .iter()
        .zip(after)
        .map(|(before, after)| difference(before, after))
        .collect())
}

/// The list of shards: the one array of objects that have "cycles", wherever it stands.
fn per_shard(status: &Value) -> Option<&Vec<Value>> {
    match status {
        Value::Array(items) if items.iter().any(|item| item.get("cycles").is_some()) => Some(items),
        Value::Array(items) => items.iter().find_map(per_shard),
        Value::Object(map) => map.values().find_map(per_shard),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}

fn difference(before: &Value, after: &Value) -> Shard {
    let count = |shard: &Value, part: &str, name: &str| shard[part][name].as_u64().unwrap_or(0);
    let cycles = after["cycles"]
        .as_object()
        .map_or_else(BTreeMap::new, |rooms| {
            let spent = |name: &String| {
                count(after, "cycles", name).saturating_sub(count(before, "cycles", name))
            };
            rooms
                .keys()
                .map(|name| (name.clone(), spent(name)))
                .collect()
        });
    // Each packet passes the TUN once, on its way in or out.
    let packets = ["tun_packets_in", "tun_packets_out"]
        .iter()
        .map(|name| {
            let of = |shard: &Value| {
                let parts = ["counters", "meters"].iter();
                let nested = parts
                    .map(|part| count(shard, part, name))
                    .max()
                    .unwrap_or(0);
                nested.max(shard[*name].as_u64().unwrap_or(0))
            };
            of(after).saturating_sub(of(before))
        })
        .sum();
    Shard { cycles, packets }
}

fn table(number: usize, shard: &Shard) -> anyhow::Result<String> {
    use std::fmt::Write as _;
    let waited = shard.cycles.get(WAIT).copied().unwrap_or(0);
    let total = shard.cycles.values().sum::<u64>() - waited;
    let mut text = String::new();
    writeln!(
        text,
        "shard {number}: {} packets, {} Mcycles, and {} of waiting",
        shard.packets,
        total / 1_000_000,
        waited / 1_000_000
    )?;
    writeln!(
        text,
        "  {:<10} {:>12} {:>7} {:>14}",
        "room", "Mcycles", "%", "cycles/packet"
    )?;
    let mut rooms: Vec<_> = shard.cycles.iter().filter(|room| room.0 != WAIT).collect();
    rooms.sort_by_key(|(_, cycles)| std::cmp::Reverse(**cycles));
    for (room, cycles) in rooms {
        let per_mille = cycles.saturating_mul(1000) / total.max(1);
        let per_packet = match shard.packets {
            0 => "-".into(),
            packets => (cycles / packets).to_string(),
        };
        writeln!(
            text,
            "  {room:<10} {:>12} {:>5}.{} {per_packet:>14}",
            cycles / 1_000_000,
            per_mille / 10,
            per_mille % 10
        )?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn cycles_are_the_difference_and_split_by_packets() -> anyhow::Result<()> {
        let status = |open: u64, packets: u64| {
            json!({"x": 1, "dataplane": {"shards": [
                {"cycles": {"open": open, "seal": 5_000_000, "wait": open}, "counters": {"tun_packets_in": packets}}]}})
        };
        let got = between(&status(1_000_000, 10), &status(4_000_000, 110))?;
        assert_eq!(got[0].cycles["open"], 3_000_000);
        assert_eq!(got[0].packets, 100);
        let text = table(0, &got[0])?;
        assert!(text.contains("30000") && text.contains("100.0"), "{text}");
        Ok(())
    }

    #[test]
    fn a_status_without_shards_is_an_error() {
        assert!(between(&json!({"a": [1, 2]}), &json!({})).is_err());
    }
}
