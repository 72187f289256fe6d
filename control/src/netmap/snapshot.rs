//! The whole state of the network at one moment, made of the table that a stream fills.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ringtail_dataplane::Rules;
use serde_json::Value;
use time::OffsetDateTime;

use super::derp_map::DerpMap;
use super::filter;
use super::merge::MapState;
use super::wire::{Node, UserProfile, WireTime};
use crate::key::{DiscoPublic, NodePublic};

/// Ourselves, as the coordination server sees us.
#[derive(Clone, Debug, PartialEq)]
pub struct SelfNode {
    /// Our node id.
    pub id: i64,
    /// The node key the server knows for us.
    pub key: NodePublic,
    /// FQDN with a trailing dot.
    pub name: String,
    /// Our inner addresses, a /32 and a /128 in general.
    pub addresses: Vec<IpNet>,
    /// Where the server believes that we can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// When our key stops being valid, if ever; by our wall clock.
    pub key_expiry: Option<OffsetDateTime>,
    /// The key has expired: peers refuse us.
    pub expired: bool,
    /// False while an administrator's approval is awaited.
    pub machine_authorized: bool,
}

/// A peer, ready for the data plane and the path machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    /// Node id; the peer's identity across key changes.
    pub id: i64,
    /// WireGuard public key and DERP address. May change while `id` stays.
    pub key: NodePublic,
    /// Absent: no path discovery with this peer.
    pub disco: Option<DiscoPublic>,
    /// FQDN with a trailing dot, or a bare name.
    pub name: String,
    /// Its inner addresses.
    pub addresses: Vec<IpNet>,
    /// What may be routed to it and may come from it: addresses, subnet routes, exit routes.
    pub allowed_ips: Vec<IpNet>,
    /// UDP candidates.
    pub endpoints: Vec<SocketAddr>,
    /// Home relay region.
    pub home: Option<u32>,
    /// Whether it is connected to the coordination server; absent is unknown.
    pub online: Option<bool>,
    /// When it was last seen, if offline.
    pub last_seen: Option<OffsetDateTime>,
    /// Its key has expired, by flag or by time.
    pub expired: bool,
    /// When its key stops being valid, if ever; by our wall clock.
    pub key_expiry: Option<OffsetDateTime>,
    /// It may not open connections to us: inbound rules do not apply to it.
    pub jailed: bool,
}

/// One whole state of the network as told by the coordination server.
#[derive(Clone, Debug)]
pub struct Netmap {
    /// Ourselves.
    pub self_node: SelfNode,
    /// Peers that may enter the data plane, by ascending id.
    pub peers: Vec<Arc<Peer>>,
    /// Known peers that may not, for display: expired, without any way to reach them, or without
    /// network access.
    pub held_back: Vec<Arc<Peer>>,
    /// The relays.
    pub derp_map: Arc<DerpMap>,
    /// The inbound packet filter, compiled.
    pub rules: Rules,
    /// Name of the network.
    pub domain: String,
    /// DNS settings as received; nothing applies them yet.
    pub dns: Option<Arc<Value>>,
    /// Owners of nodes by id; nothing shows them yet.
    pub users: Arc<BTreeMap<i64, UserProfile>>,
    /// Problems the server wants to be shown.
    pub health: Vec<String>,
}

impl MapState {
    /// The whole state at our wall clock `now`, with the packet filter compiled for the routes
    /// `advertised` by us beside our own addresses; none before the first complete message.
    pub fn snapshot(&self, now: OffsetDateTime, advertised: &[IpNet]) -> Option<Netmap> {
        let node = self.node.as_ref()?;
        let server_now = self.server_time(now);
        let self_node = SelfNode {
            id: node.id,
            key: node.key,
            name: node.name.clone(),
            addresses: node.addresses.clone(),
            endpoints: node.endpoints.clone(),
            key_expiry: self.own_time(node.key_expiry),
            expired: expired(node, server_now),
            machine_authorized: node.machine_authorized,
        };
        let (mut peers, mut held_back) = (Vec::new(), Vec::new());
        for node in self.peers.values() {
            if node.id == self_node.id || node.key == self.own_key {
                continue;
            }
            let peer = peer(node, server_now, self.own_time(node.key_expiry));
            let reachable = peer.disco.is_some() || peer.home.is_some() || node.is_wireguard_only;
            let usable = reachable && !peer.expired && !node.unsigned_peer_api_only;
            let list = if usable { &mut peers } else { &mut held_back };
            list.push(Arc::new(peer));
        }
        let mut local = node.addresses.clone();
        local.extend_from_slice(advertised);
        Some(Netmap {
            self_node,
            peers,
            held_back,
            derp_map: Arc::clone(&self.derp_map),
            rules: filter::compile(self.filter_rules(), &local, self.peers.values()),
            domain: self.domain.clone(),
            dns: self.dns.clone(),
            users: Arc::clone(&self.users),
            health: self.health.clone(),
        })
    }
}

fn expired(node: &Node, server_now: OffsetDateTime) -> bool {
    let by_time = node.key_expiry.and_then(WireTime::get);
    node.expired || by_time.is_some_and(|expiry| expiry <= server_now)
}

fn peer(node: &Node, server_now: OffsetDateTime, key_expiry: Option<OffsetDateTime>) -> Peer {
    Peer {
        id: node.id,
        key: node.key,
        disco: node.disco_key,
        name: node.name.clone(),
        addresses: node.addresses.clone(),
        allowed_ips: node
            .allowed_ips
            .iter()
            .flatten()
            .map(IpNet::trunc)
            .collect(),
        endpoints: node.endpoints.clone(),
        home: (node.home_derp != 0).then_some(node.home_derp),
        online: node.online,
        last_seen: node.last_seen.and_then(WireTime::get),
        expired: expired(node, server_now),
        key_expiry,
        jailed: node.is_jailed,
    }
}
