//! `ringtail status`: what the agent says of itself, completed by what the drivers count.

use serde_json::{Map, Value, json};

use ringtail_dataplane::stats::{DropReason, Meter, Room, Snapshot};
use ringtail_dataplane::{OffloadsInUse, Stats};
use ringtail_dataplane::{SuperPacketKind as Kind, SuperPacketKinds as Kinds};

use super::device::offloads_by_name;
use super::hostnet::Report;
use super::relay::RelayStatus;

/// Adds relays, the host's network, offloads, shards and drops to the agent's status.
pub fn complete(
    status: &mut Value,
    relays: &RelayStatus,
    shards: &Stats,
    host: &Report,
    offloads: OffloadsInUse,
    events_lost: u64,
) {
    let Value::Object(status) = status else {
        return;
    };
    let mut drops = match status.remove("drops") {
        Some(Value::Object(drops)) => drops,
        Some(_) | None => Map::new(),
    };
    for (name, count) in &relays.counters {
        if name.contains("dropped") {
            drops.insert(format!("relay_{name}"), (*count).into());
        }
    }
    drops.insert("event_log_lines".into(), events_lost.into());
    status.insert("relays".into(), relays.regions.iter().map(region).collect());
    status.insert("relay_counters".into(), json!(relays.counters));
    let names = |kinds: Kinds| kinds.iter().map(Kind::name).collect::<Vec<_>>();
    status.insert(
        "offloads".into(),
        json!({
            "in_use": offloads_by_name(offloads).collect::<Vec<_>>(),
            "tun_merging": names(offloads.merging),
            "tun_refused": names(offloads.refused),
        }),
    );
    status.insert("host".into(), host_network(host));
    let total = shards.total();
    for reason in DropReason::ALL {
        drops.insert(reason.name().to_owned(), shards.drops(*reason).into());
    }
    drops.insert("events_lost".into(), shards.events_lost.into());
    status.insert("totals".into(), counters(&total));
    let mut threads: Vec<Value> = shards.shards.iter().map(counters).collect();
    for (index, thread) in threads.iter_mut().enumerate() {
        thread["shard"] = index.into();
    }
    status.insert(
        "dataplane".into(),
        json!({"shards": threads, "handshake": counters(&shards.handshake)}),
    );
    status.insert("drops".into(), Value::Object(drops));
}

/// How our routes stand beside the host's.
fn host_network(host: &Report) -> Value {
    let conflicts: Vec<Value> = host
        .conflicts
        .iter()
        .map(|conflict| {
            let mut value = json!(conflict);
            value["text"] = conflict.describe().into();
            value
        })
        .collect();
    json!({
        "table": host.table,
        "conflicts": conflicts,
        "more_conflicts": host.more_conflicts,
        "kept_out": host.kept_out,
    })
}

/// One thread's counters: meters, cycles per room, batch sizes by power of two.
fn counters(snapshot: &Snapshot) -> Value {
    let meters: Map<String, Value> = Meter::ALL
        .iter()
        .map(|meter| (meter.name().to_owned(), snapshot.get(*meter).into()))
        .collect();
    let cycles: Map<String, Value> = Room::ALL
        .iter()
        .map(|room| (room.name().to_owned(), snapshot.cycles(*room).into()))
        .collect();
    json!({
        "meters": meters,
        "cycles": cycles,
        "batches_in": snapshot.batches_inbound(),
        "batches_out": snapshot.batches_outbound(),
    })
}

fn region(region: &super::relay::RegionStatus) -> Value {
    let mut value = json!(region);
    if let Value::Object(fields) = &mut value {
        let state = match (region.connected, &region.problem) {
            (true, None) => "connected".to_owned(),
            (true, Some(problem)) => format!("connected; it reports: {problem}"),
            (false, _) if region.failures > 0 => {
                let why = region.error.as_deref().unwrap_or("unknown");
                format!("{} failed dials, the last: {why}", region.failures)
            }
            (false, _) => "connecting".to_owned(),
        };
        fields.insert("state".into(), state.into());
        fields.insert("id".into(), region.region.into());
        let name = if region.code.is_empty() {
            region.region.to_string()
        } else {
            region.code.clone()
        };
        fields.insert("region".into(), name.into());
    }
    value
}
