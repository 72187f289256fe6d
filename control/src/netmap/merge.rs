//! Applying the messages of one map stream to a table.
//!
//! A [`MapState`] lives as long as one stream: it starts empty, takes every message in order by
//! [`MapState::handle_response`], and gives a whole [`Netmap`](super::Netmap) whenever something the agent cares
//! about changed. The order inside a message is that of `protocol/coordination-map.md` §4. The
//! previous stream's netmap stays in force at the agent until the first complete one arrives, so
//! a reconnect disturbs nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use serde_json::Value;
use time::OffsetDateTime;

use super::derp_map::DerpMap;
use super::wire::{DnsConfig, FilterRule, MapResponse, Node, PeerChange, UserProfile, WireTime};
use crate::key::NodePublic;

/// Peers kept at most; as many as the data plane holds. Further ones are left out, and nothing counts them:
/// `peers_refused` of the status is what the agent, which sees those kept, has no room for.
pub const PEERS_MAX: usize = ringtail_dataplane::PEERS_MAX;

/// Problems that the server wants to be shown, kept at most.
pub const HEALTH_MAX: usize = 64;

/// Endpoints kept of one peer, and of ourselves.
pub const ENDPOINTS_MAX: usize = 128;

/// Prefixes of all peers together, own addresses and routes. A peer with more than is left is refused.
pub const PREFIXES_MAX: usize = 1 << 20;

/// Users whose profiles are kept.
pub const USERS_MAX: usize = PEERS_MAX;

/// Relay regions, and relays of one region.
pub const REGIONS_MAX: usize = 256;
/// Relays of one region.
pub const RELAYS_MAX: usize = 32;

/// Sources, destinations, protocols and rules of the packet filter, added up. What is more is left out,
/// which lets fewer in.
pub const FILTER_LEN_MAX: usize = 1 << 20;

/// Why a stream has to be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// The first message that is no keep-alive must say who we are.
    #[error("initial message lacks Node")]
    NoNode,
}

/// What a message did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// The snapshot may differ from the one before.
    pub changed: bool,
    /// First complete map of the stream.
    pub first: bool,
}

/// The table one stream fills.
#[derive(Debug)]
pub struct MapState {
    pub(super) own_key: NodePublic,
    pub(super) node: Option<Arc<Node>>,
    pub(super) peers: BTreeMap<i64, Arc<Node>>,
    /// Those of all peers.
    prefixes: usize,
    pub(crate) derp_map: Arc<DerpMap>,
    filter_chunks: BTreeMap<String, Vec<FilterRule>>,
    pub(super) dns: Option<Arc<DnsConfig>>,
    pub(super) domain: String,
    pub(super) users: Arc<BTreeMap<i64, UserProfile>>,
    pub(super) health: Vec<String>,
    clock_offset: time::Duration,
    tailnet_lock: bool,
}

impl MapState {
    /// An empty table for a new stream of the node with this key.
    pub fn new(own_key: NodePublic) -> Self {
        Self {
            own_key,
            node: None,
            peers: BTreeMap::new(),
            prefixes: 0,
            derp_map: Arc::default(),
            filter_chunks: BTreeMap::new(),
            dns: None,
            domain: String::new(),
            users: Arc::default(),
            health: Vec::new(),
            clock_offset: time::Duration::ZERO,
            tailnet_lock: false,
        }
    }

    /// Applies one message; `now` is our wall clock.
    ///
    /// # Errors
    /// [`MergeError::NoNode`] when the first message that is no keep-alive lacks our own node;
    /// the stream is useless then.
    pub fn handle_response(
        &mut self,
        now: OffsetDateTime,
        response: MapResponse,
    ) -> Result<Applied, MergeError> {
        let clock_set = response
            .control_time
            .and_then(WireTime::get)
            .is_some_and(|server_now| self.compare_clocks(server_now - now));
        if response.keep_alive {
            return Ok(Applied {
                changed: clock_set && self.node.is_some(),
                first: false,
            });
        }
        let first = self.node.is_none();
        if first && response.node.is_none() {
            return Err(MergeError::NoNode);
        }
        let mut changed = first || clock_set;
        changed |= self.apply_peers(now, &response);
        if let Some(mut node) = response.node {
            Arc::make_mut(&mut node).normalise();
            changed |= self.node.as_ref() != Some(&node);
            self.node = Some(node);
        }
        if let Some(dns) = response.dns_config {
            changed |= self.dns.as_deref() != Some(&dns);
            self.dns = Some(Arc::new(dns));
        }
        if let Some(domain) = response.domain.filter(|domain| !domain.is_empty()) {
            changed |= self.domain != domain;
            self.domain = domain;
        }
        for user in response.user_profiles.into_iter().flatten() {
            if self.users.len() >= USERS_MAX && !self.users.contains_key(&user.id) {
                continue;
            }
            if self.users.get(&user.id) != Some(&user) {
                Arc::make_mut(&mut self.users).insert(user.id, user);
                changed = true;
            }
        }
        if let Some(update) = response.derp_map {
            let old = Arc::clone(&self.derp_map);
            let map = Arc::make_mut(&mut self.derp_map);
            if let Some(regions) = update.regions {
                map.regions = regions
                    .into_iter()
                    .filter_map(|(id, r)| Some((id, r?)))
                    .take(REGIONS_MAX)
                    .collect();
                for region in map.regions.values_mut() {
                    region.nodes.truncate(RELAYS_MAX);
                }
                map.omit_default_regions = update.omit_default_regions;
            }
            if let Some(params) = update.home_params {
                let kept = map.home_params.take().and_then(|old| old.region_score);
                let region_score = params.region_score.or(kept);
                map.home_params = Some(super::derp_map::HomeParams { region_score });
            }
            changed |= old != self.derp_map;
        }
        changed |= self.apply_filters(response.packet_filter, response.packet_filters);
        if let Some(mut health) = response.health {
            health.truncate(HEALTH_MAX);
            changed |= self.health != health;
            self.health = health;
        }
        if let Some(info) = response.tka_info {
            let disabled = info.get("Disabled").and_then(Value::as_bool);
            self.tailnet_lock = disabled != Some(true);
        }
        Ok(Applied { changed, first })
    }

    /// Takes how far the server's clock is ahead of ours; a minute more or less counts for nothing, so
    /// that times do not move with every message. True if one of the clocks was set: all times differ.
    fn compare_clocks(&mut self, offset: time::Duration) -> bool {
        if (offset - self.clock_offset).abs() <= time::Duration::MINUTE {
            return false;
        }
        let far = offset.abs() > time::Duration::MINUTE;
        self.clock_offset = if far { offset } else { time::Duration::ZERO };
        true
    }

    fn apply_peers(&mut self, now: OffsetDateTime, response: &MapResponse) -> bool {
        let mut changed = false;
        if let Some(peers) = response.peers.as_ref().filter(|peers| !peers.is_empty()) {
            let old = std::mem::take(&mut self.peers);
            self.prefixes = 0;
            for node in peers {
                self.insert_peer(Arc::clone(node));
            }
            return old != self.peers;
        }
        for id in response.peers_removed.iter().flatten() {
            if let Some(gone) = self.peers.remove(id) {
                self.prefixes -= gone.prefixes();
                changed = true;
            }
        }
        for node in response.peers_changed.iter().flatten() {
            changed |= self.insert_peer(Arc::clone(node));
        }
        for (id, seen) in response.peer_seen_change.iter().flatten() {
            if let Some(peer) = self.peers.get_mut(id) {
                Arc::make_mut(peer).last_seen = seen.then_some(WireTime(now));
                changed = true;
            }
        }
        for (id, online) in response.online_change.iter().flatten() {
            if let Some(peer) = self.peers.get_mut(id)
                && peer.online != Some(*online)
            {
                Arc::make_mut(peer).online = Some(*online);
                changed = true;
            }
        }
        for change in response.peers_changed_patch.iter().flatten() {
            if let Some(peer) = self.peers.get_mut(&change.node_id) {
                changed |= patch(peer, change);
            }
        }
        changed
    }

    /// Whether the table differs after it.
    fn insert_peer(&mut self, mut node: Arc<Node>) -> bool {
        Arc::make_mut(&mut node).normalise();
        if self.peers.len() >= PEERS_MAX && !self.peers.contains_key(&node.id) {
            return false;
        }
        let old = self.peers.get(&node.id);
        if old == Some(&node) {
            return false;
        }
        let others = self.prefixes - old.map_or(0, |old| old.prefixes());
        if others + node.prefixes() > PREFIXES_MAX {
            // What was known of it may not be true any more.
            self.prefixes = others;
            return self.peers.remove(&node.id).is_some();
        }
        self.prefixes = others + node.prefixes();
        self.peers.insert(node.id, node);
        true
    }

    fn apply_filters(
        &mut self,
        base: Option<Vec<FilterRule>>,
        chunks: Option<BTreeMap<String, Option<Vec<FilterRule>>>>,
    ) -> bool {
        if base.is_none() && chunks.is_none() {
            return false;
        }
        let old = self.filter_chunks.clone();
        if let Some(base) = base {
            self.set_chunk("base".to_owned(), base);
        }
        let chunks = chunks.unwrap_or_default();
        if chunks.get("*") == Some(&None) {
            self.filter_chunks.clear();
        }
        for (name, rules) in chunks {
            match rules {
                Some(rules) => self.set_chunk(name, rules),
                None => {
                    self.filter_chunks.remove(&name);
                }
            }
        }
        old != self.filter_chunks
    }

    /// Sets a chunk of rules, as far as there is room beside the others.
    fn set_chunk(&mut self, name: String, mut rules: Vec<FilterRule>) {
        self.filter_chunks.remove(&name);
        let others: usize = self.filter_rules().map(FilterRule::weight).sum();
        let mut room = FILTER_LEN_MAX.saturating_sub(others + self.filter_chunks.len());
        if room == 0 {
            return;
        }
        rules.retain(|rule| {
            let fits = rule.weight() <= room;
            room -= if fits { rule.weight() } else { 0 };
            fits
        });
        self.filter_chunks.insert(name, rules);
    }

    /// All filter rules, chunks in the order of their names.
    pub fn filter_rules(&self) -> impl Iterator<Item = &FilterRule> + Clone {
        self.filter_chunks.values().flatten()
    }

    /// Whether it has taken no message yet.
    pub fn is_empty(&self) -> bool {
        self.node.is_none()
    }

    /// Whether the server says that we are the router of a prefix.
    pub fn is_ours(&self, net: &IpNet) -> bool {
        self.node.as_ref().is_some_and(|node| routes(node, net))
    }

    /// Whether a peer is the router of a prefix.
    pub fn has_router(&self, net: &IpNet) -> bool {
        self.peers.values().any(|peer| routes(peer, net))
    }

    /// Whether the network uses tailnet lock, which ringtail does not support.
    pub fn tailnet_lock(&self) -> bool {
        self.tailnet_lock
    }

    /// The server's time at our wall clock `now`.
    pub(super) fn server_time(&self, now: OffsetDateTime) -> OffsetDateTime {
        now.checked_add(self.clock_offset).unwrap_or(now)
    }

    /// A time of the server's by our wall clock.
    pub(super) fn own_time(&self, time: Option<WireTime>) -> Option<OffsetDateTime> {
        time.and_then(WireTime::get)?.checked_sub(self.clock_offset)
    }

    /// When, on our wall clock, the next key expires: a snapshot taken then differs.
    pub fn next_expiry(&self, now: OffsetDateTime) -> Option<OffsetDateTime> {
        let server_now = self.server_time(now);
        let own = self.node.iter();
        own.chain(self.peers.values())
            .filter_map(|node| node.key_expiry?.get())
            .filter(|expiry| *expiry > server_now)
            .min()?
            .checked_sub(self.clock_offset)
    }
}

/// For tests and fuzz targets, which follow a server's streams.
#[cfg(any(test, feature = "internals"))]
impl MapState {
    /// The peer table as received and merged, by node id.
    pub(crate) fn peers(&self) -> &BTreeMap<i64, Arc<Node>> {
        &self.peers
    }

    /// Our own node, once known.
    pub(crate) fn node(&self) -> Option<&Node> {
        self.node.as_deref()
    }
}

fn routes(node: &Node, net: &IpNet) -> bool {
    node.allowed_ips.iter().flatten().any(|own| own == net)
}

/// Applies a change field by field; whether anything differs after it.
fn patch(peer: &mut Arc<Node>, change: &PeerChange) -> bool {
    let mut node = Node::clone(peer);
    if change.derp_region != 0 {
        node.home_derp = change.derp_region;
    }
    if change.cap != 0 {
        node.cap = change.cap;
    }
    if let Some(cap_map) = &change.cap_map {
        node.cap_map = Some(cap_map.clone());
    }
    if let Some(endpoints) = &change.endpoints {
        node.endpoints.clone_from(endpoints);
        node.endpoints.truncate(ENDPOINTS_MAX);
    }
    if let Some(key) = change.key {
        node.key = key;
    }
    if let Some(disco) = change.disco_key {
        node.disco_key = Some(disco).filter(|key| !key.is_zero());
    }
    if let Some(online) = change.online {
        node.online = Some(online);
    }
    if let Some(last_seen) = change.last_seen {
        node.last_seen = Some(last_seen);
    }
    if let Some(expiry) = change.key_expiry {
        node.key_expiry = expiry.get().map(WireTime);
        // A new expiry is a new judgement: Headscale patches it when a node registers again.
        node.expired = node.expired && node.key_expiry.is_some();
    }
    let changed = **peer != node;
    if changed {
        *peer = Arc::new(node);
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::super::Peer;
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    const NOW: OffsetDateTime = time::macros::datetime!(2026-11-22 05:00 UTC);

    /// A table that has taken this message, the first.
    fn state(first: MapResponse) -> MapState {
        let mut state = MapState::new(own_key());
        state.handle_response(NOW, first).unwrap();
        state
    }

    /// Ourselves.
    fn own() -> Node {
        Node {
            id: 1,
            key: own_key(),
            ..Node::default()
        }
    }

    /// The tables of the test file.
    fn table() -> Value {
        let text = include_str!("../../tests/vectors/coordination-cases.json");
        serde_json::from_str(text).unwrap()
    }

    fn peers_changed(peers: Vec<Node>) -> MapResponse {
        MapResponse {
            peers_changed: Some(peers.into_iter().map(Arc::new).collect()),
            ..MapResponse::default()
        }
    }

    /// Whatever a server sends, in one message or in many: the table has a size.
    #[test]
    fn what_a_server_sends_is_kept_within_bounds() {
        let mut state = state(MapResponse {
            node: Some(Arc::default()),
            ..MapResponse::default()
        });
        let net: IpNet = "10.0.0.0/8".parse().unwrap();
        let node = |id: u8, prefixes: usize| Node {
            id: id.into(),
            key: NodePublic([id; 32]),
            allowed_ips: Some(vec![net; prefixes]),
            endpoints: vec!["192.0.2.1:1".parse().unwrap(); 2 * ENDPOINTS_MAX],
            ..Node::default()
        };
        let mut send = |response| state.handle_response(NOW, response).unwrap().changed;
        let half = PREFIXES_MAX / 2;
        assert!(send(peers_changed(vec![node(1, half), node(2, half)])));
        assert!(!send(peers_changed(vec![node(3, 1)])), "there is no room");
        assert!(send(peers_changed(vec![node(1, 1)])), "it gives some back");
        assert!(send(peers_changed(vec![node(3, half - 1)])));
        assert!(
            send(peers_changed(vec![node(2, half + 1)])),
            "it goes, for it is not as it was"
        );
        let removed = MapResponse {
            peers_removed: Some(vec![3]),
            ..MapResponse::default()
        };
        assert!(send(removed));
        assert!(send(peers_changed(vec![node(2, PREFIXES_MAX - 1)])));
        let ids: Vec<i64> = state.peers.keys().copied().collect();
        assert_eq!(ids, [1, 2]);
        assert_eq!(state.prefixes, PREFIXES_MAX);
        let mut peers = state.peers.values();
        assert!(peers.all(|peer| peer.endpoints.len() == ENDPOINTS_MAX));
    }

    #[test]
    fn rules_regions_and_users_are_kept_within_bounds() {
        let rule = |weight: usize| FilterRule {
            src_ips: vec![String::new(); weight - 1],
            ..FilterRule::default()
        };
        let chunk = |name: &str, rules: Vec<FilterRule>| MapResponse {
            packet_filters: Some([(name.to_owned(), Some(rules))].into()),
            ..MapResponse::default()
        };
        let regions = (1..=u32::try_from(REGIONS_MAX).unwrap() + 9)
            .map(|id| {
                let nodes = vec![super::super::DerpNode::default(); RELAYS_MAX + 1];
                let region = super::super::DerpRegion {
                    region_id: id,
                    nodes,
                    ..Default::default()
                };
                (id, Some(region))
            })
            .collect();
        let users = (0..i64::try_from(USERS_MAX).unwrap() + 9).map(|id| UserProfile {
            id,
            ..UserProfile::default()
        });
        let mut state = state(MapResponse {
            node: Some(Arc::default()),
            derp_map: Some(crate::netmap::wire::DerpMapUpdate {
                regions: Some(regions),
                ..Default::default()
            }),
            user_profiles: Some(users.collect()),
            ..MapResponse::default()
        });
        assert_eq!(state.derp_map.regions.len(), REGIONS_MAX);
        let mut regions = state.derp_map.regions.values();
        assert!(regions.all(|region| region.nodes.len() == RELAYS_MAX));
        assert_eq!(state.users.len(), USERS_MAX);
        let half = FILTER_LEN_MAX / 2;
        for (name, rules, kept) in [
            ("a", vec![rule(half)], 1),
            ("b", vec![rule(half), rule(half - 10)], 2),
            ("b", vec![rule(half - 10)], 2),
            ("c", vec![rule(100), rule(3)], 3),
        ] {
            state.handle_response(NOW, chunk(name, rules)).unwrap();
            assert_eq!(state.filter_rules().count(), kept, "{name}");
        }
    }

    #[derive(Deserialize)]
    struct Case {
        name: String,
        messages: Vec<MapResponse>,
        expect: Value,
    }

    fn own_key() -> NodePublic {
        NodePublic([0x11; 32])
    }

    /// What the test files call a peer: the fields they list, as JSON.
    fn visible(node: &Node) -> Value {
        json!({
            "Key": node.key, "DiscoKey": node.disco_key, "HomeDERP": node.home_derp,
            "Endpoints": node.endpoints, "Online": node.online,
            "AllowedIPs": node.allowed_ips, "Name": node.name, "Expired": node.expired,
            "KeyExpiry": node.key_expiry.and_then(WireTime::get).map(WireTime),
        })
    }

    #[test]
    fn every_merge_case_of_the_table_ends_in_the_expected_state() {
        let cases: Vec<Case> = serde_json::from_value(table()["merge"].clone()).unwrap();
        assert_eq!(cases.len(), 19);
        for case in cases {
            let mut state = MapState::new(own_key());
            let mut error = None;
            for message in case.messages {
                if let Err(e) = state.handle_response(NOW, message) {
                    error = Some(e);
                    break;
                }
            }
            if let Some(text) = case.expect.get("error") {
                assert_eq!(error.map(|e| e.to_string()).as_deref(), text.as_str());
                continue;
            }
            assert_eq!(error, None, "{}", case.name);
            let (name, expect) = (case.name, case.expect);
            let expected = expect["peers"].as_object().unwrap();
            let ids: Vec<String> = state.peers().keys().map(i64::to_string).collect();
            assert!(ids.iter().eq(expected.keys()), "{name}: {ids:?}");
            for (id, node) in state.peers() {
                let seen = visible(node);
                for (field, value) in expected[&id.to_string()].as_object().unwrap() {
                    assert_eq!(&seen[field], value, "{name}: peer {id} {field}");
                }
            }
            let regions: Vec<String> = state.derp_map.regions.keys().map(u32::to_string).collect();
            assert_eq!(json!(regions), expect["regions"], "{name}");
            let score = state.derp_map.home_params.as_ref();
            let score = score.and_then(|params| params.region_score.clone());
            assert_eq!(json!(score), expect["region_score"], "{name}");
            let rules: Vec<&FilterRule> = state.filter_rules().collect();
            assert_eq!(json!(rules), expect["filter_rules"], "{name}");
            assert_eq!(state.domain, expect["domain"].as_str().unwrap());
        }
    }

    #[test]
    fn the_recorded_stream_of_headscale_leaves_the_recorded_peers() {
        let text = include_str!("../../tests/vectors/coordination/headscale-stream.jsonl");
        let mut state = MapState::new(own_key());
        let (mut messages, mut checked) = (0, 0);
        for line in text.lines().filter(|line| !line.is_empty()) {
            let line: Value = serde_json::from_str(line).unwrap();
            let Some(message) = line.get("message") else {
                continue;
            };
            let before = state.peers().clone();
            let response = serde_json::from_value(message.clone()).unwrap();
            state.handle_response(NOW, response).unwrap();
            messages += 1;
            for (id, expected) in line["peers_after"].as_object().into_iter().flatten() {
                let node = state.peers().get(&id.parse::<i64>().unwrap());
                let Some(expected) = expected.as_object() else {
                    assert!(node.is_none(), "peer {id} is gone");
                    checked += 1;
                    continue;
                };
                let seen = visible(node.unwrap());
                for (field, value) in expected {
                    assert_eq!(&seen[field], value, "message {messages} peer {id} {field}");
                }
                checked += 1;
            }
            if line.get("peers_after").is_none() {
                let shown = |peers: &BTreeMap<i64, Arc<Node>>| -> Vec<Value> {
                    peers.values().map(|node| visible(node)).collect()
                };
                assert_eq!(shown(&before), shown(state.peers()), "message {messages}");
            }
        }
        assert!(messages > 30 && checked > 15, "{messages} {checked}");
    }

    #[test]
    fn a_repeated_message_changes_nothing() {
        let full = table()["merge"][0]["messages"][0].clone();
        let full: MapResponse = serde_json::from_value(full).unwrap();
        let mut state = MapState::new(own_key());
        let first = state.handle_response(NOW, full.clone()).unwrap();
        assert!(first.changed && first.first);
        let again = state.handle_response(NOW, full).unwrap();
        assert_eq!(again, Applied::default());
    }

    #[test]
    fn expiry_is_judged_by_server_time_and_holds_a_peer_back() {
        let expiry = time::macros::datetime!(2026-11-22 06:00 UTC);
        let peer = Node {
            id: 2,
            key: NodePublic([2; 32]),
            home_derp: 1,
            key_expiry: Some(WireTime(expiry)),
            ..Node::default()
        };
        let state = state(MapResponse {
            node: Some(Arc::new(own())),
            peers: Some(vec![Arc::new(peer)]),
            // The server's clock is half an hour ahead of ours.
            control_time: Some(WireTime(NOW + time::Duration::minutes(30))),
            ..MapResponse::default()
        });
        assert_eq!(state.snapshot(NOW, &[]).unwrap().peers.len(), 1);
        let due = state.next_expiry(NOW).unwrap();
        assert_eq!(due, NOW + time::Duration::minutes(30));
        let later = state.snapshot(due, &[]).unwrap();
        assert_eq!((later.peers.len(), later.held_back.len()), (0, 1));
        assert!(later.held_back[0].expired);
        assert_eq!(state.next_expiry(due), None);
    }

    #[test]
    fn a_clock_that_is_set_moves_all_times_also_by_a_sign_of_life() {
        let expiry = time::macros::datetime!(2026-12-22 06:00 UTC);
        let heard = |keep_alive, ahead| MapResponse {
            keep_alive,
            control_time: Some(WireTime(NOW + ahead)),
            ..MapResponse::default()
        };
        let mut first = heard(false, time::Duration::days(60));
        first.node = Some(Arc::new(Node {
            key_expiry: Some(WireTime(expiry)),
            ..own()
        }));
        let mut state = state(first);
        let own = |state: &MapState| state.snapshot(NOW, &[]).unwrap().self_node.key_expiry;
        let by_ours = Some(expiry - time::Duration::days(60));
        assert_eq!(own(&state), by_ours);
        // Neither a slow message nor a clock that drifts is worth a snapshot.
        let late = heard(true, time::Duration::days(60) - time::Duration::SECOND);
        let applied = state.handle_response(NOW, late).unwrap();
        assert!(!applied.changed);
        assert_eq!(own(&state), by_ours);
        let set = heard(true, time::Duration::SECOND);
        assert!(state.handle_response(NOW, set).unwrap().changed);
        assert_eq!(own(&state), Some(expiry));
    }

    #[test]
    fn ourselves_and_peers_that_cannot_be_reached_stay_out() {
        let node = |id: i64, home: u32| {
            Arc::new(Node {
                id,
                key: NodePublic([u8::try_from(id).unwrap(); 32]),
                home_derp: home,
                ..Node::default()
            })
        };
        let own = Node {
            home_derp: 1,
            ..own()
        };
        let state = state(MapResponse {
            node: Some(Arc::new(own)),
            peers: Some(vec![node(1, 1), node(2, 0), node(3, 1)]),
            ..MapResponse::default()
        });
        let netmap = state.snapshot(NOW, &[]).unwrap();
        let ids = |peers: &[Arc<Peer>]| peers.iter().map(|peer| peer.id).collect::<Vec<_>>();
        assert_eq!(ids(&netmap.peers), [3]);
        assert_eq!(ids(&netmap.held_back), [2]);
    }
}
