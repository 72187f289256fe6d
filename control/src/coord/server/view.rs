//! How nodes are told of: a node on the wire, the router of each prefix, the full map, the
//! difference of two.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use serde_json::json;
use time::OffsetDateTime;

use super::presence::Presence;
use super::store::{NodeRecord, expired};
use super::{Entry, Server, TAGGED_USER, TAGGED_USER_NAME};
use crate::coord::routes::{self, announced};
use crate::netmap::wire::{
    CapMap, Debug, FilterRule, MapResponse, Node, PeerChange, UserProfile, WireTime,
};

/// Nodes as peers are told of them, by id.
pub(super) type View = Arc<BTreeMap<i64, Arc<Node>>>;

impl Server {
    pub(super) fn full(&self, wall: OffsetDateTime, id: i64) -> MapResponse {
        let seen = self.seen_by(id);
        let peers = seen.iter().filter(|(peer, _)| **peer != id);
        let mut dns = self.config.dns.clone();
        dns.search.insert(0, self.config.base_domain.clone());
        dns.proxied = true;
        let reverse = (64..128).map(|octet| format!("{octet}.100.in-addr.arpa"));
        let reverse = reverse.chain(["0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa".to_owned()]);
        dns.routes
            .extend(reverse.map(|suffix| (suffix, Vec::new())));
        MapResponse {
            control_time: Some(WireTime(wall)),
            node: seen.get(&id).map(|wire| own_node(wire)),
            peers: Some(peers.map(|(_, wire)| Arc::clone(wire)).collect()),
            derp_map: Some((&self.config.derp_map).into()),
            dns_config: Some(dns),
            domain: Some(self.config.domain.clone()),
            packet_filters: Some(filters(self.filter_of(id))),
            user_profiles: Some(self.profiles()),
            collect_services: Some(false),
            debug: Some(Debug {
                disable_log_tail: true,
            }),
            ..MapResponse::default()
        }
    }

    /// Builds a node's visible form anew; when it differs, all streams will hear of it.
    pub(super) fn rebuild(&mut self, now: Instant, id: i64) {
        if self.routers.contains(&id) {
            self.refresh_routes(now);
        }
        self.rebuild_one(now, id);
    }

    fn rebuild_one(&mut self, now: Instant, id: i64) {
        let Some(entry) = self.nodes.get(&id) else {
            return;
        };
        let wire = self.wire(entry);
        if self.view.get(&id).is_some_and(|old| **old == wire) {
            return;
        }
        Arc::make_mut(&mut self.view).insert(id, Arc::new(wire));
        self.mark_dirty(now, id);
    }

    /// Chooses the router of every prefix among the nodes that have a stream (or had one a moment ago, or could not
    /// come back yet since we started); where there is none, among those whose stream has ended not long ago.
    pub(super) fn refresh_routes(&mut self, now: Instant) {
        let nodes = &self.nodes;
        let counts = |id: &i64| nodes.get(id).is_some_and(|entry| !entry.routes.is_empty());
        self.routers.retain(counts);
        let candidates = |counts: fn(&Entry) -> bool| {
            self.routers.iter().filter_map(move |id| {
                let entry = nodes.get(id).filter(|entry| counts(entry))?;
                Some((*id, &entry.routes[..]))
            })
        };
        let connected = |entry: &Entry| {
            let here = matches!(
                entry.presence,
                Presence::Online | Presence::Leaving(_, None)
            );
            here || entry.routes_until.is_some()
        };
        let online = |entry: &Entry| {
            matches!(
                entry.presence,
                Presence::Online | Presence::Leaving(_, None | Some(true))
            )
        };
        let mut new = routes::primaries(&self.primaries, candidates(online));
        new.extend(routes::primaries(&self.primaries, candidates(connected)));
        let old = std::mem::replace(&mut self.primaries, new);
        if old != self.primaries {
            let touched = old.values().chain(self.primaries.values()).copied();
            for id in touched.collect::<BTreeSet<i64>>() {
                self.rebuild_one(now, id);
            }
        }
    }

    /// All owners of nodes.
    pub(super) fn profiles(&self) -> Vec<UserProfile> {
        let users = self
            .config
            .users
            .iter()
            .map(|(id, name)| (*id, name.as_str()));
        let users = users.chain([(TAGGED_USER, TAGGED_USER_NAME)]);
        let profiles = users.map(|(id, name)| UserProfile {
            id,
            login_name: name.to_owned(),
            display_name: name.to_owned(),
        });
        profiles.collect()
    }

    fn wire(&self, entry: &Entry) -> Node {
        let record = &entry.record;
        let addresses: Vec<IpNet> = vec![
            IpNet::from(IpAddr::V4(record.v4)),
            IpNet::from(IpAddr::V6(record.v6)),
        ];
        let primary = |net: &&IpNet| self.primaries.get(net) == Some(&record.id);
        let primary_routes: Vec<IpNet> = entry.routes.iter().filter(primary).copied().collect();
        let exits = entry.routes.iter().filter(|net| routes::is_exit(net));
        let mut allowed_ips = addresses.clone();
        allowed_ips.extend(exits);
        allowed_ips.extend(&primary_routes);
        let (online, offline) = match entry.presence {
            Presence::Online => (Some(true), false),
            Presence::Leaving(_, online) => (online, online == Some(false)),
            Presence::Offline(_) => (Some(false), true),
        };
        let home = record.hostinfo["NetInfo"]["PreferredDERP"].as_u64();
        // Measurements of a host's network are of no use to its peers, and change often.
        let mut hostinfo = record.hostinfo.clone();
        if let Some(fields) = hostinfo.as_object_mut() {
            fields.remove("NetInfo");
        }
        let expired = expired(record);
        Node {
            id: record.id,
            stable_id: record.id.to_string(),
            name: format!("{}.{}.", record.name, self.config.base_domain),
            user: if record.tags.is_empty() {
                record.user
            } else {
                TAGGED_USER
            },
            tags: record.tags.clone(),
            key: record.node_key,
            key_expiry: record.expires.or(record.good_until).map(WireTime),
            machine: Some(record.machine),
            disco_key: record.disco,
            addresses,
            allowed_ips: Some(allowed_ips),
            endpoints: record.endpoints.clone(),
            home_derp: home.and_then(|home| u32::try_from(home).ok()).unwrap_or(0),
            hostinfo: Some(hostinfo),
            created: Some(WireTime(record.created)),
            cap: record.capver,
            primary_routes,
            last_seen: record.last_seen.filter(|_| offline).map(WireTime),
            online,
            machine_authorized: !expired,
            expired,
            ..Node::default()
        }
    }
}

/// Routes of a node that count: announced, approved for it, and its key is good.
pub(super) fn effective(record: &NodeRecord) -> Vec<IpNet> {
    if record.approved.is_empty() || expired(record) {
        return Vec::new();
    }
    let mut routes = announced(&record.hostinfo);
    routes.retain(|route| record.approved.binary_search(route).is_ok());
    routes
}

/// As a map has them.
pub(super) fn filters(rules: Vec<FilterRule>) -> BTreeMap<String, Option<Vec<FilterRule>>> {
    [("base".to_owned(), Some(rules))].into()
}

/// The node as itself is told of it.
pub(super) fn own_node(wire: &Node) -> Arc<Node> {
    let mut node = wire.clone();
    let mut cap_map = CapMap::new();
    cap_map.insert(
        "https://tailscale.com/cap/is-admin".to_owned(),
        Some(Vec::new()),
    );
    cap_map.insert("default-auto-update".to_owned(), Some(vec![json!(false)]));
    node.cap_map = Some(cap_map);
    Arc::new(node)
}

/// The change that leads from `old` to `new`, if the protocol can say it field by field.
pub(super) fn difference_of(old: &Node, new: &Node) -> Option<PeerChange> {
    let mut change = PeerChange {
        node_id: new.id,
        ..PeerChange::default()
    };
    let mut patched = old.clone();
    if old.home_derp != new.home_derp && new.home_derp != 0 {
        change.derp_region = new.home_derp;
        patched.home_derp = new.home_derp;
    }
    // An empty list cannot be told: Go leaves it out.
    if old.endpoints != new.endpoints && !new.endpoints.is_empty() {
        change.endpoints = Some(new.endpoints.clone());
        patched.endpoints.clone_from(&new.endpoints);
    }
    if old.key != new.key {
        change.key = Some(new.key);
        patched.key = new.key;
    }
    if old.disco_key != new.disco_key && new.disco_key.is_some() {
        change.disco_key = new.disco_key;
        patched.disco_key = new.disco_key;
    }
    if old.online != new.online && new.online.is_some() {
        change.online = new.online;
        patched.online = new.online;
    }
    if old.last_seen != new.last_seen && new.last_seen.is_some() {
        change.last_seen = new.last_seen;
    }
    // Meaningless while online, so it may stay behind there.
    patched.last_seen = new.last_seen;
    if old.cap != new.cap && new.cap != 0 {
        change.cap = new.cap;
        patched.cap = new.cap;
    }
    (patched == *new).then_some(change)
}
