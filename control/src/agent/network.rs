//! The network as the agent needs it, whoever told us: a coordination server, the static file, or
//! the cache of an earlier run.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use ringtail_dataplane::{Rules, named};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::plain::Plain;
use crate::config::StaticNetwork;
use crate::hostnet::Overlay;
use crate::key::{DiscoPublic, NodePublic};
use crate::netmap::prefix::{DNS_SERVICE_V4, DNS_SERVICE_V6, V4_RANGE, V6_RANGE};
use crate::netmap::wire::{DnsConfig, UserProfile, WireTime};
use crate::netmap::{DerpMap, Netmap, Peer};

/// One whole view of the network.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Network {
    /// Own inner addresses.
    pub addresses: Vec<IpNet>,
    /// The home region others expect us at, when it is not ours to choose.
    pub fixed_home: Option<u32>,
    /// The relays.
    pub derp_map: DerpMap,
    /// Everybody else who takes part.
    pub peers: Vec<Arc<NetworkPeer>>,
    /// Nodes that are known and may not take part: for people, and so that nobody else has their
    /// addresses.
    #[serde(default)]
    pub held_back: Vec<HeldBack>,
    /// What belongs to the network itself: the ranges it takes its addresses from, of which no peer
    /// has the whole, and its DNS service.
    #[serde(default)]
    pub reserved: Vec<IpNet>,
    /// How it stands with ourselves.
    #[serde(default)]
    pub own: Standing,
    /// Who may reach us.
    pub rules: Arc<Rules>,
    /// Name of the network.
    #[serde(default)]
    pub domain: String,
    /// Its DNS settings, if it has any.
    #[serde(default)]
    pub dns: Option<Arc<DnsConfig>>,
    /// Owners of nodes by id.
    #[serde(default)]
    pub users: Arc<BTreeMap<i64, UserProfile>>,
}

/// How the coordination server sees this node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Standing {
    /// Our key has expired: peers refuse us.
    pub expired: bool,
    /// When it does, by our wall clock.
    pub key_expiry: Option<WireTime>,
    /// An administrator has yet to let us in.
    pub unapproved: bool,
    /// Problems that the server wants to be shown.
    pub health: Vec<String>,
    /// Our FQDN with a trailing dot; empty where nobody gave us one.
    pub name: String,
    /// Our owner.
    pub user: i64,
    /// Our `tag:…` names.
    pub tags: Vec<String>,
    /// Peers' names have IPv6 addresses too.
    pub names_have_v6: bool,
    /// Prefixes that we are to route for others; none where whatever we offer is approved, as by a file.
    pub routes: Option<Vec<IpNet>>,
}

/// One peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPeer {
    /// A name for people.
    pub name: String,
    /// WireGuard identity and DERP address.
    pub node_key: NodePublic,
    /// Without it there is no path discovery with the peer.
    pub disco_key: Option<DiscoPublic>,
    /// Home region.
    pub home: Option<u32>,
    /// Inner addresses.
    pub addresses: Vec<IpNet>,
    /// Prefixes routed to it and accepted from it.
    pub allowed_ips: Vec<IpNet>,
    /// Where it may be reached directly.
    pub endpoints: Vec<SocketAddr>,
    /// Whether the coordination server sees it, if it says so.
    pub online: Option<bool>,
    /// When it was seen last, if it is offline.
    #[serde(default)]
    pub last_seen: Option<WireTime>,
    /// When its key expires, by our wall clock.
    #[serde(default)]
    pub key_expiry: Option<WireTime>,
    /// What people may call it by, whatever its name is.
    #[serde(default)]
    pub stable_id: String,
    /// Its owner.
    #[serde(default)]
    pub user: i64,
    /// Its `tag:…` names.
    #[serde(default)]
    pub tags: Vec<String>,
    /// TCP ports of its peer API at its IPv4 and IPv6 address.
    #[serde(default)]
    pub peerapi: [Option<u16>; 2],
    /// It looks names up for others by its peer API.
    #[serde(default)]
    pub peerapi_dns: bool,
    /// Its capability version, 0 where unknown.
    #[serde(default)]
    pub capver: i64,
    /// Subnet routes that it serves as primary.
    #[serde(default)]
    pub primary_routes: Vec<IpNet>,
    /// Prefixes that it offers to route, approved or not.
    #[serde(default)]
    pub routable: Vec<IpNet>,
    /// It is a plain WireGuard peer of the settings file.
    #[serde(skip)]
    pub plain: Option<Plain>,
}

/// A node that may not take part.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeldBack {
    /// A name for people.
    pub name: String,
    /// What the server calls it for good; empty where the network is a file.
    #[serde(default)]
    pub stable_id: String,
    /// WireGuard identity.
    pub node_key: NodePublic,
    /// Inner addresses.
    pub addresses: Vec<IpNet>,
    /// Why not.
    pub why: HoldReason,
    /// When its key expires or expired, by our wall clock.
    #[serde(default)]
    pub key_expiry: Option<WireTime>,
}

impl HeldBack {
    /// A peer whose key has expired since we were told of it.
    pub(super) fn expired(peer: &NetworkPeer) -> Self {
        Self {
            name: peer.name.clone(),
            stable_id: peer.stable_id.clone(),
            node_key: peer.node_key,
            addresses: peer.addresses.clone(),
            why: HoldReason::Expired,
            key_expiry: peer.key_expiry,
        }
    }
}

named! {
    /// Why a node may not take part.
    #[derive(Default, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum HoldReason {
        /// Its key has expired.
        #[default]
        Expired = "expired",
        /// It may not open connections to us. The filter has no rule per peer, and letting it in would
        /// be worse than keeping it out.
        Jailed = "jailed",
        /// It has neither a DISCO key nor a relay.
        Unreachable = "unreachable",
        /// The network gives it no access.
        NoAccess = "no_access",
    }
}

impl HoldReason {
    fn of(peer: &Peer) -> Self {
        if peer.expired {
            Self::Expired
        } else if peer.jailed {
            Self::Jailed
        } else if peer.disco.is_none() && peer.home.is_none() {
            Self::Unreachable
        } else {
            Self::NoAccess
        }
    }
}

impl From<StaticNetwork> for Network {
    fn from(file: StaticNetwork) -> Self {
        let known = |region: u32| (region != 0).then_some(region);
        Self {
            addresses: file.addresses,
            fixed_home: known(file.home),
            derp_map: file.derp_map,
            peers: file
                .peers
                .into_iter()
                .map(|peer| NetworkPeer {
                    name: peer.name,
                    node_key: peer.node_key,
                    disco_key: (!peer.disco_key.is_zero()).then_some(peer.disco_key),
                    home: known(peer.home),
                    addresses: peer.addresses,
                    allowed_ips: peer.allowed_ips,
                    endpoints: peer.endpoints,
                    ..NetworkPeer::default()
                })
                .map(Arc::new)
                .collect(),
            rules: Arc::new(Rules::AllowAll),
            // The file's allowed IPs are whoever wrote it's word, the whole of a range included: nothing
            // is reserved.
            ..Self::default()
        }
    }
}

impl From<&Netmap> for Network {
    fn from(map: &Netmap) -> Self {
        let jailed = map.peers.iter().filter(|peer| peer.jailed);
        Self {
            addresses: map.self_node.addresses.clone(),
            fixed_home: None,
            derp_map: (*map.derp_map).clone(),
            peers: map
                .peers
                .iter()
                .filter(|peer| !peer.jailed)
                .map(|peer| NetworkPeer {
                    name: peer.name.clone(),
                    node_key: peer.key,
                    disco_key: peer.disco,
                    home: peer.home,
                    addresses: peer.addresses.clone(),
                    allowed_ips: peer.allowed_ips.clone(),
                    endpoints: peer.endpoints.clone(),
                    online: peer.online,
                    last_seen: peer.last_seen.map(WireTime),
                    key_expiry: peer.key_expiry.map(WireTime),
                    stable_id: peer.stable_id.clone(),
                    user: peer.user,
                    tags: peer.tags.clone(),
                    peerapi: peer.peerapi,
                    peerapi_dns: peer.peerapi_dns,
                    capver: peer.capver,
                    primary_routes: peer.primary_routes.clone(),
                    routable: peer.routable.clone(),
                    plain: None,
                })
                .map(Arc::new)
                .collect(),
            held_back: jailed
                .chain(&map.held_back)
                .map(|peer| HeldBack {
                    name: peer.name.clone(),
                    stable_id: peer.stable_id.clone(),
                    node_key: peer.key,
                    addresses: peer.addresses.clone(),
                    why: HoldReason::of(peer),
                    key_expiry: peer.key_expiry.map(WireTime),
                })
                .collect(),
            reserved: vec![
                V4_RANGE.into(),
                V6_RANGE.into(),
                IpAddr::from(DNS_SERVICE_V4).into(),
                IpAddr::from(DNS_SERVICE_V6).into(),
            ],
            own: Standing {
                expired: map.self_node.expired,
                key_expiry: map.self_node.key_expiry.map(WireTime),
                // Headscale says the same of a node whose key has expired.
                unapproved: !map.self_node.machine_authorized && !map.self_node.expired,
                health: map.health.clone(),
                name: map.self_node.name.clone(),
                user: map.self_node.user,
                tags: map.self_node.tags.clone(),
                names_have_v6: map.self_node.names_have_v6,
                routes: Some(map.self_node.routes.clone()),
            },
            rules: Arc::new(map.rules.clone()),
            domain: map.domain.clone(),
            dns: map.dns.clone(),
            users: Arc::clone(&map.users),
        }
    }
}

impl Network {
    /// Takes peers and rules that are as in `before` from there, so that comparing and copying them later
    /// costs no more than a pointer.
    pub(super) fn share(&mut self, before: &Self) {
        if self.rules == before.rules {
            self.rules = Arc::clone(&before.rules);
        }
        let (start, end) = in_common(&before.peers, &self.peers);
        let (len, len_before) = (self.peers.len(), before.peers.len());
        self.peers[..start].clone_from_slice(&before.peers[..start]);
        self.peers[len - end..].clone_from_slice(&before.peers[len_before - end..]);
        let known: HashMap<&NodePublic, &Arc<NetworkPeer>> = before.peers[start..len_before - end]
            .iter()
            .map(|peer| (&peer.node_key, peer))
            .collect();
        for peer in &mut self.peers[start..len - end] {
            if let Some(known) = known.get(&peer.node_key).filter(|known| **known == peer) {
                *peer = Arc::clone(known);
            }
        }
    }

    /// Our wall clock was set by `step`: what is reckoned by it goes along.
    pub(super) fn move_times(&mut self, step: time::Duration) {
        let peers = self.peers.iter_mut().map(Arc::make_mut);
        let peers = peers.map(|peer| &mut peer.key_expiry);
        let held_back = self.held_back.iter_mut().map(|node| &mut node.key_expiry);
        let own = &mut self.own.key_expiry;
        for expiry in peers.chain(held_back).chain([own]).flatten() {
            expiry.0 = expiry.0.saturating_add(step);
        }
    }

    /// The first expiry of a key after `wall`: what is in force may differ from then on.
    pub(super) fn next_expiry(&self, wall: OffsetDateTime) -> Option<OffsetDateTime> {
        let peers = self.peers.iter().map(|peer| peer.key_expiry);
        let all = peers.chain([self.own.key_expiry]).flatten();
        all.map(|expiry| expiry.0).filter(|at| *at > wall).min()
    }

    /// What is wanted of the host besides `wishes`. Addresses of peers count as theirs if they are routed to
    /// them; of the exit node the wishes say.
    pub fn overlay(&self, wishes: Overlay) -> Overlay {
        // Sets of thousands are made at once, not one by one.
        let (mut peers, mut routes) = (Vec::new(), Vec::new());
        for peer in &self.peers {
            for net in &peer.allowed_ips {
                let alone = net.prefix_len() == net.max_prefix_len();
                if alone && peer.addresses.iter().any(|own| own.addr() == net.addr()) {
                    peers.push(net.addr());
                } else if net.prefix_len() > 0 {
                    routes.push(*net);
                }
            }
        }
        Overlay {
            addresses: self.addresses.iter().map(IpNet::addr).collect(),
            peers: peers.into_iter().collect(),
            routes: routes.into_iter().collect(),
            services: self.services(),
            ..wishes
        }
    }

    /// Where this host asks for names, if the network has any.
    fn services(&self) -> BTreeSet<IpAddr> {
        let answers = self.dns.is_some() && !self.own.expired;
        let services: [IpAddr; 2] = [DNS_SERVICE_V4.into(), DNS_SERVICE_V6.into()];
        services.into_iter().filter(|_| answers).collect()
    }

    /// Every node's own address inside the tunnel. Nothing is pinged there; a prefix that a node routes is
    /// another matter, since what leaves outside of the tunnel does not follow its routes.
    pub fn inner_addresses(&self) -> BTreeSet<IpAddr> {
        let peers = self.peers.iter().flat_map(|peer| &peer.addresses);
        self.addresses
            .iter()
            .chain(peers)
            .map(IpNet::addr)
            .collect()
    }
}

/// Two lists of peers without what both begin and end with: little is left of them where one has
/// changed and has what did not in common with the other ([`Network::share`]).
pub(super) fn apart<'a>(
    before: &'a [Arc<NetworkPeer>],
    after: &'a [Arc<NetworkPeer>],
) -> (&'a [Arc<NetworkPeer>], &'a [Arc<NetworkPeer>]) {
    let (start, end) = in_common(before, after);
    (
        &before[start..before.len() - end],
        &after[start..after.len() - end],
    )
}

/// With how many peers both lists begin, and with how many of the others they end: a network that
/// changes is the same for the most part, in the same order. Who is shared is not looked into.
fn in_common(before: &[Arc<NetworkPeer>], after: &[Arc<NetworkPeer>]) -> (usize, usize) {
    let same = |(a, b): &(&Arc<NetworkPeer>, &Arc<NetworkPeer>)| Arc::ptr_eq(a, b) || a == b;
    let start = before.iter().zip(after).take_while(same).count();
    let (before, after) = (&before[start..], &after[start..]);
    let ends = before.iter().rev().zip(after.iter().rev());
    (start, ends.take_while(same).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the cache of a run holds them, of any version: `null` is everybody, and rules are texts.
    #[test]
    fn the_rules_of_a_cached_network_are_read_and_written_as_ever() {
        let text = |rules: &str| {
            format!(
                r#"{{"addresses":[],"fixed_home":null,"derp_map":{{}},"peers":[],"rules":{rules}}}"#
            )
        };
        let list = r#"[{"sources":["100.64.0.0/10","::/0"],"destinations":[["10.1.2.3/32",22,80]],"protocols":[6,17]}]"#;
        for rules in ["null", "[]", list] {
            let network: Network = serde_json::from_str(&text(rules)).unwrap();
            assert_eq!(serde_json::to_string(&network.rules).unwrap(), rules);
            assert_eq!(*network.rules == Rules::AllowAll, rules == "null");
        }
    }
}
