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
use super::wire::{DnsConfig, Node, UserProfile, WireTime};
use crate::key::{DiscoPublic, NodePublic};

/// Tags kept of a node.
const TAGS_MAX: usize = 64;
/// Services and routes that a peer announces, kept of each.
const ANNOUNCED_MAX: usize = 64;
/// From this capability version on every node looks names up by its peer API (`peerCanProxyDNS` in
/// ipn/ipnlocal/local.go).
const PEERAPI_DNS_CAP: i64 = 26;

/// Ourselves, as the coordination server sees us.
#[derive(Clone, Debug, PartialEq)]
pub struct SelfNode {
    /// Our node id.
    pub id: i64,
    /// The node key the server knows for us.
    pub key: NodePublic,
    /// FQDN with a trailing dot.
    pub name: String,
    /// Our owner.
    pub user: i64,
    /// `tag:…` names; a node that has any is nobody's.
    pub tags: Vec<String>,
    /// Peers' names have IPv6 addresses too (attribute `magicdns-aaaa`).
    pub names_have_v6: bool,
    /// Our inner addresses, a /32 and a /128 in general.
    pub addresses: Vec<IpNet>,
    /// Prefixes that it has us route for others.
    pub routes: Vec<IpNet>,
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
    /// What people may call it by, whatever its name is.
    pub stable_id: String,
    /// Its owner.
    pub user: i64,
    /// `tag:…` names; a node that has any is nobody's.
    pub tags: Vec<String>,
    /// TCP ports of its peer API at its IPv4 and IPv6 address.
    pub peerapi: [Option<u16>; 2],
    /// It looks names up for others by its peer API.
    pub peerapi_dns: bool,
    /// Its capability version, 0 where unknown.
    pub capver: i64,
    /// Subnet routes that it serves as primary.
    pub primary_routes: Vec<IpNet>,
    /// Prefixes that it offers to route, approved or not.
    pub routable: Vec<IpNet>,
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
    /// DNS settings, once there are any.
    pub dns: Option<Arc<DnsConfig>>,
    /// Owners of nodes by id.
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
            user: node.user,
            tags: tags(node),
            names_have_v6: has_attribute(node, "magicdns-aaaa"),
            addresses: node.addresses.clone(),
            routes: node
                .allowed_ips
                .iter()
                .flatten()
                .filter(|net| !node.addresses.contains(net))
                .map(IpNet::trunc)
                .collect(),
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
        stable_id: node.stable_id.clone(),
        user: node.user,
        tags: tags(node),
        peerapi: [service(node, "peerapi4"), service(node, "peerapi6")],
        peerapi_dns: node.cap >= PEERAPI_DNS_CAP || service(node, "peerapi-dns-proxy").is_some(),
        capver: node.cap,
        primary_routes: node.primary_routes.iter().map(IpNet::trunc).collect(),
        routable: announced(node, "RoutableIPs")
            .filter_map(|route| Some(route.as_str()?.parse::<IpNet>().ok()?.trunc()))
            .collect(),
    }
}

fn tags(node: &Node) -> Vec<String> {
    node.tags.iter().take(TAGS_MAX).cloned().collect()
}

fn has_attribute(node: &Node, name: &str) -> bool {
    let attributes = node.cap_map.as_ref();
    attributes.is_some_and(|attributes| attributes.contains_key(name))
}

/// A list of what the node says of itself, as far as it is kept.
fn announced<'a>(node: &'a Node, field: &str) -> impl Iterator<Item = &'a Value> {
    let list = node.hostinfo.as_ref().and_then(|info| info.get(field));
    let list = list.and_then(Value::as_array);
    list.into_iter().flatten().take(ANNOUNCED_MAX)
}

/// The port of the first service of this kind (`Service` in tailcfg/tailcfg.go).
fn service(node: &Node, kind: &str) -> Option<u16> {
    let mut services = announced(node, "Services");
    let found = services.find(|service| service["Proto"] == kind)?;
    let port = u16::try_from(found["Port"].as_u64()?).ok()?;
    (port != 0).then_some(port)
}
