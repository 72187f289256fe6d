//! What a node says of itself: the part of `ringtail status` that the agent knows.

use std::time::Instant;

use ringtail_dataplane::{Activity, PeerId};
use serde_json::{Value, json};

use super::{Agent, HeldBack, HoldReason, millis, standing};
use crate::netmap::wire::WireTime;

/// What the agent is told about its surroundings, for people only.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Inner MTU in bytes.
    pub mtu: u16,
    /// Data plane threads.
    pub shards: usize,
    /// The shards' I/O driver.
    pub driver: &'static str,
    /// URL of the coordination server, if there is one.
    pub coordination: Option<String>,
    /// How it stands with coordination.
    pub coordination_state: String,
}

impl Agent {
    /// The node, its peers and what was dropped, as JSON.
    pub fn status(
        &self,
        now: Instant,
        around: &Surroundings,
        activity: &dyn Fn(PeerId) -> Activity,
    ) -> Value {
        let addresses: Vec<String> = self
            .network
            .iter()
            .flat_map(|n| &n.addresses)
            .map(|net| net.addr().to_string())
            .collect();
        let network = self.network.as_ref();
        let own = network.map(|network| &network.own);
        let owner = |user: i64, tags: &[String]| network.and_then(|known| known.owner(user, tags));
        let mut state = around.coordination_state.clone();
        if own.is_some_and(|own| own.expired) {
            state.push_str("; this node's key has expired");
        }
        let held_back = self.network.iter().flat_map(|network| &network.held_back);
        let peers: Vec<Value> = self
            .directory
            .iter()
            .map(|(id, _)| self.peer_status(now, id, &activity(id)))
            .chain(held_back.map(held_back_status))
            .collect();
        let mut drops: serde_json::Map<String, Value> = self
            .drops
            .iter()
            .map(|(name, count)| ((*name).to_owned(), (*count).into()))
            .collect();
        for (name, count) in self.paths.drops() {
            drops.insert(format!("disco_{name}"), count.into());
        }
        for (name, count) in self.netcheck.drops() {
            drops.insert(name.into(), count.into());
        }
        drops.insert("peers_refused".into(), self.directory.refused().into());
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "state": "up",
            "hostname": self.prefs.hostname,
            "dns_name": own.and_then(|own| full_name(&own.name)),
            "owner": own.and_then(|own| owner(own.user, &own.tags)),
            "node_key": self.setup.node_key,
            "disco_key": self.setup.disco_key.public(),
            "addresses": addresses,
            "expired": own.is_some_and(|own| own.expired),
            "key_expiry": own.and_then(|own| standing::text(own.key_expiry)),
            "key_expires_in_s": own.and_then(|own| self.expires_in_s(own.key_expiry)),
            "health": self.health(now),
            "tun": {"name": self.setup.tun, "mtu": around.mtu},
            "shards": around.shards,
            "driver": around.driver,
            "listen_port": self.setup.local_port,
            "coordination": {
                "kind": around.coordination.as_deref().unwrap_or("static"),
                "state": state,
            },
            "home": {"id": self.home.map(|id| id.0), "region": self.home.map(|id| self.region_code(id))},
            "exit": self.exit_status(),
            "endpoints": self.endpoints.iter().map(|own| own.addr).collect::<Vec<_>>(),
            "netcheck": self.netcheck_status(),
            "peers": peers,
            "drops": drops,
        })
    }

    /// Seconds until a key expires, by our wall clock; below zero when it has.
    fn expires_in_s(&self, expiry: Option<WireTime>) -> Option<i64> {
        Some((expiry?.get()? - self.wall).whole_seconds())
    }

    fn peer_status(&self, now: Instant, id: PeerId, activity: &Activity) -> Value {
        let Some(peer) = self.directory.peer(id) else {
            return Value::Null;
        };
        let since =
            |at: Option<Instant>| at.map(|at| now.saturating_duration_since(at).as_secs_f64());
        let path = self.paths.status(now, id).map(|status| {
            let best = status.best;
            json!({
                "state": status.state.name(),
                "since_s": status.since.as_secs_f64(),
                "address": status.address(),
                "latency_ms": best.map(|best| millis(best.rtt)),
                "jitter_ms": best.map(|best| millis(best.jitter)),
                "loss_pct": best.map(|best| best.loss_pct),
                "mtu": best.and_then(|best| best.mtu),
                "fragments": best.map(|best| best.fragments),
                "last_pong_s": best.map(|best| best.last_pong.as_secs_f64()),
                "validating": status.validating,
                "relay": status.region.map(|region| self.region_code(region)),
                "relay_latency_ms": status.relay_rtt.map(millis),
                "switches": status.switches,
                "candidates": status.candidates.iter()
                    .map(|(addr, rtt)| json!({"address": addr, "latency_ms": rtt.map(millis)}))
                    .collect::<Vec<_>>(),
            })
        });
        json!({
            "name": super::short_name(&peer.name),
            "dns_name": full_name(&peer.name),
            "owner": self.network.as_ref().and_then(|known| known.owner(peer.user, &peer.tags)),
            "node_key": peer.node_key,
            "addresses": peer.addresses.iter().map(|net| net.addr().to_string()).collect::<Vec<_>>(),
            "allowed_ips": peer.allowed_ips,
            "home": peer.home.map(|id| self.region_code(ringtail_dataplane::RegionId(id))),
            "online": peer.online,
            "last_seen": standing::text(peer.last_seen),
            "key_expiry": standing::text(peer.key_expiry),
            "key_expires_in_s": self.expires_in_s(peer.key_expiry),
            "exit_node": peer.routable.iter().any(|net| net.prefix_len() == 0),
            "primary_routes": peer.primary_routes,
            "expired": false,
            "held_back": null,
            "path": path,
            "tx_bytes": activity.tx_bytes,
            "rx_bytes": activity.rx_bytes,
            "tx_relay_bytes": activity.tx_relay_bytes,
            "rx_relay_bytes": activity.rx_relay_bytes,
            "last_handshake_s": since(activity.last_handshake),
            "last_received_s": since(activity.last_received),
        })
    }
}

/// A name in full, without the last dot; nothing where there is but one label.
fn full_name(name: &str) -> Option<&str> {
    let name = name.trim_end_matches('.');
    name.contains('.').then_some(name)
}

/// A peer that may not take part, so that nobody wonders where it went.
fn held_back_status(node: &HeldBack) -> Value {
    json!({
        "name": super::short_name(&node.name),
        "node_key": node.node_key,
        "addresses": node.addresses.iter().map(|net| net.addr().to_string()).collect::<Vec<_>>(),
        "allowed_ips": [],
        "key_expiry": standing::text(node.key_expiry),
        "expired": node.why == HoldReason::Expired,
        "held_back": node.why.name(),
        "path": null,
    })
}
