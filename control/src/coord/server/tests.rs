//! Tests of [`super::Server`].

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use serde_json::{Value, json};

use super::presence::TURNS_TIME;
use super::reports::is_endpoint;
use super::*;
use crate::coord::admin::{Change, Refusal};
use crate::coord::auth_key::KeyCheck;
use crate::coord::frames::{Codec, FrameReader, encode};
use crate::coord::operations::{self, WALL, comparable};
use crate::key::DiscoPublic;
use crate::netmap::wire::{
    MapRequest, Node, RegisterAuth, RegisterRequest, RegisterResponse, WireTime,
};
use crate::netmap::{MapState, PEERS_MAX};

fn config() -> ServerConfig {
    ServerConfig {
        derp_map: serde_json::from_str(r#"{"Regions":{"900":{"RegionID":900}}}"#).unwrap(),
        ..operations::config()
    }
}

fn machine(n: u8) -> MachinePublic {
    MachinePublic([n; 32])
}

fn node_key(n: u8) -> NodePublic {
    NodePublic([n ^ 0x80; 32])
}

const VALID: KeyCheck = KeyCheck::Valid {
    id: 1,
    ephemeral: false,
    user: FIRST_USER,
    tags: Vec::new(),
};

const EPHEMERAL: KeyCheck = KeyCheck::Valid {
    id: 2,
    ephemeral: true,
    user: FIRST_USER,
    tags: Vec::new(),
};

fn registration(n: u8) -> RegisterRequest {
    RegisterRequest {
        version: 130,
        node_key: node_key(n),
        hostinfo: Some(json!({"Hostname": format!("host{n}")})),
        ..RegisterRequest::default()
    }
}

fn poll(n: u8) -> MapRequest {
    MapRequest {
        version: 130,
        keep_alive: true,
        stream: true,
        node_key: node_key(n),
        disco_key: DiscoPublic([n ^ 0x40; 32]),
        hostinfo: Some(json!({"Hostname": format!("host{n}")})),
        ..MapRequest::default()
    }
}

fn lite(n: u8, endpoint: &str) -> MapRequest {
    MapRequest {
        stream: false,
        omit_peers: true,
        endpoints: Some(vec![endpoint.parse().unwrap()]),
        ..poll(n)
    }
}

impl Server {
    /// How many nodes there are, and how many have a stream open.
    fn counts(&self) -> (usize, usize) {
        let online = |entry: &&Entry| entry.presence == Presence::Online;
        (self.nodes.len(), self.nodes.values().filter(online).count())
    }
}

/// A server, its streams, and what a client on each of them has merged.
struct Lab {
    now: Instant,
    server: Server,
    streams: BTreeMap<SessionId, (u8, MapState)>,
    messages: u64,
}

impl Lab {
    fn new() -> Self {
        let now = crate::testing::start();
        Self {
            now,
            server: Server::new(now, config(), Vec::new(), 0, 0),
            streams: BTreeMap::new(),
            messages: 0,
        }
    }

    fn plan(&self, n: u8, request: &RegisterRequest, key: &KeyCheck) -> Registration {
        let code = Code::new(n.into());
        self.server
            .plan_register(WALL, machine(n), request, key, code)
    }

    fn ask(&mut self, n: u8, request: &MapRequest) -> Result<MapAnswer, MapRefusal> {
        let machine = machine(n);
        self.server
            .handle_map(self.now, WALL, machine, request, 0.0)
    }

    fn register(&mut self, n: u8, key: &KeyCheck) -> RegisterResponse {
        self.register_by(n, &registration(n), key)
    }

    fn register_by(&mut self, n: u8, by: &RegisterRequest, key: &KeyCheck) -> RegisterResponse {
        let plan = self.plan(n, by, key);
        let Registration::Pending(applicant) = plan else {
            return self.server.apply(self.now, plan);
        };
        let source = IpAddr::from([192, 0, 2, n]);
        let waits = self.server.handle_applicant(self.now, source, *applicant);
        let Waits::Told(answer) = waits else {
            panic!("{waits:?}");
        };
        answer
    }

    /// Another server takes over what is stored.
    fn restart(&mut self, last: u32) {
        let records = self.server.records().cloned().collect();
        self.server = Server::new(self.now, config(), records, last.into(), last);
        self.streams.clear();
    }

    fn record(&self, id: i64) -> NodeRecord {
        self.server.nodes[&id].record.clone()
    }

    fn open(&mut self, n: u8) -> SessionId {
        self.open_by(n, &poll(n))
    }

    fn open_by(&mut self, n: u8, request: &MapRequest) -> SessionId {
        let answer = self.ask(n, request);
        let Ok(MapAnswer::Stream(id)) = answer else {
            panic!("{answer:?}");
        };
        self.streams.insert(id, (n, MapState::new(node_key(n))));
        id
    }

    fn of(nodes: &[u8]) -> Self {
        let mut lab = Self::new();
        for n in nodes {
            lab.join(*n);
        }
        lab
    }

    fn join(&mut self, n: u8) -> SessionId {
        assert_eq!(self.register(n, &VALID).error, "");
        self.open(n)
    }

    /// An administrator's order, carried out as a running server does.
    fn change(&mut self, node: &str, change: &Change) -> Result<(), Refusal> {
        let (write, _) = self.server.plan_change(node, change, WALL)?;
        if let Some(mut write) = write {
            self.server.complete(WALL, &mut write);
            self.server.put(self.now, write);
        }
        Ok(())
    }

    fn delete(&mut self, id: i64) {
        self.change(&id.to_string(), &Change::Delete).unwrap();
    }

    fn expire(&mut self, id: i64) {
        self.change(&id.to_string(), &Change::Expire).unwrap();
    }

    fn approve(&mut self, id: i64, routes: &[&str]) {
        let change = Change::Approve(nets(routes));
        self.change(&id.to_string(), &change).unwrap();
    }

    fn revoke(&mut self, id: i64, routes: &[&str]) {
        let change = Change::Revoke(nets(routes));
        self.change(&id.to_string(), &change).unwrap();
    }

    /// A node says what it offers.
    fn announce(&mut self, n: u8, routes: impl serde::Serialize) {
        let mut request = lite(n, "192.0.2.2:1");
        request.hostinfo = Some(json!({"Hostname": format!("host{n}"), "RoutableIPs": routes}));
        self.report(n, &request);
    }

    /// Who is told to carry a route, as node 9 sees it.
    fn routers(&self, route: &str) -> Vec<i64> {
        let (_, map) = self.streams.values().find(|(n, _)| *n == 9).unwrap();
        let route = nets(&[route]);
        let with = |node: &&Arc<Node>| node.allowed_ips.as_ref().unwrap().contains(&route[0]);
        let nodes = map.peers().values().filter(with);
        nodes.map(|node| node.id).collect()
    }

    fn report(&mut self, n: u8, request: &MapRequest) {
        let answer = self.ask(n, request);
        assert_eq!(answer, Ok(MapAnswer::Taken));
    }

    /// Gives every stream what is due; returns the messages that are no keep-alives.
    fn pump(&mut self) -> Vec<(u8, MapResponse)> {
        let mut out = Vec::new();
        self.server.handle_timeout(self.now, WALL);
        for id in self.server.due_sessions(self.now) {
            let Some(message) = self.server.poll_session(self.now, WALL, id) else {
                continue;
            };
            let (n, map) = self.streams.get_mut(&id).unwrap();
            // As it travels: what JSON cannot say must not be relied on.
            let mut reader = FrameReader::new(Codec::Plain);
            reader.handle_bytes(&encode(Codec::Plain, &message).unwrap());
            let message = reader.poll_message().unwrap().unwrap();
            map.handle_response(WALL, message.clone()).unwrap();
            self.messages += 1;
            if !message.keep_alive {
                out.push((*n, message));
            }
        }
        if self.server.tick_is_due(self.now) {
            self.server.end_tick(self.now, false);
        }
        for (id, last) in self.server.take_ended() {
            if let (Some((n, map)), Some(last)) = (self.streams.get_mut(&id), last) {
                map.handle_response(WALL, (*last).clone()).unwrap();
                assert_eq!(map.peers().len(), 0, "who is removed is left with nobody");
                out.push((*n, *last));
            }
            self.end(id);
        }
        out
    }

    fn end(&mut self, id: SessionId) {
        self.streams.remove(&id);
        self.server.handle_session_end(self.now, WALL, id);
    }

    fn wait(&mut self, time: Duration) -> Vec<(u8, MapResponse)> {
        self.now += time;
        self.pump()
    }

    /// Every client's merged table is the server's.
    fn check(&self, context: &str) {
        for (n, map) in self.streams.values() {
            let own = self.server.by_key[&node_key(*n)];
            let all = self.record(own).expires.is_none();
            let peers = self.server.nodes.keys().filter(|id| all && **id != own);
            let want: BTreeMap<i64, Node> = peers
                .map(|id| (*id, comparable(&self.server.view[id])))
                .collect();
            let have = map.peers().iter();
            let have: BTreeMap<i64, Node> =
                have.map(|(id, node)| (*id, comparable(node))).collect();
            assert_eq!(have, want, "{context}: what node {n} knows");
        }
    }
}

fn answered(plan: Registration) -> RegisterResponse {
    let Registration::Answer(answer) = plan else {
        panic!("{plan:?}");
    };
    answer
}

/// The message that node `n` was sent.
fn to(messages: &[(u8, MapResponse)], n: u8) -> &MapResponse {
    let found = messages.iter().find(|(to, _)| *to == n);
    &found.unwrap().1
}

/// A log-out: an expiry in the past.
fn log_out(n: u8) -> RegisterRequest {
    RegisterRequest {
        expiry: Some(WireTime(WALL - time::Duration::SECOND)),
        ..registration(n)
    }
}

/// A map request for one message.
fn once(n: u8) -> MapRequest {
    MapRequest {
        stream: false,
        ..poll(n)
    }
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn registrations_are_decided_as_the_page_says() {
    let mut lab = Lab::new();
    for (key, error) in [
        (KeyCheck::Unknown, "invalid pre auth key"),
        (KeyCheck::Expired, "authkey expired"),
        (KeyCheck::Used, "authkey already used"),
    ] {
        let answer = lab.register(1, &key);
        assert!(answer.error.contains(error), "{answer:?}");
        assert!(!answer.machine_authorized);
    }
    let answer = lab.register(1, &VALID);
    assert_eq!(
        (answer.error.as_str(), answer.user.id, answer.login.id),
        ("", 1, 1)
    );
    assert!(answer.machine_authorized);
    // Known and good: the key is not looked at.
    for key in [KeyCheck::Absent, KeyCheck::Used, KeyCheck::Unknown] {
        assert_eq!(lab.register(1, &key).error, "");
    }
    assert!(lab.server.needs_no_key(WALL, machine(1), &registration(1)));
    // Somebody else with that node key, which is confirmed only to whom we would let in.
    for key in [KeyCheck::Unknown, KeyCheck::Used] {
        let answer = answered(lab.plan(2, &registration(1), &key));
        assert_eq!(answer.error, key.error().unwrap());
    }
    let plan = lab.plan(2, &registration(1), &KeyCheck::Absent);
    assert!(matches!(plan, Registration::Pending(_)), "{plan:?}");
    let answer = answered(lab.plan(2, &registration(1), &VALID));
    assert!(answer.error.contains("another machine"));
    // The same machine with a new node key keeps id, name and addresses.
    let before = lab.record(1);
    let mut request = registration(1);
    request.node_key = node_key(9);
    let plan = lab.plan(1, &request, &KeyCheck::Absent);
    assert!(matches!(plan, Registration::Pending(_)), "{plan:?}");
    let plan = lab.plan(1, &request, &VALID);
    assert!(matches!(plan, Registration::Rekey(..)));
    lab.server.apply(lab.now, plan);
    let after = lab.record(1);
    assert_eq!(
        (after.id, after.v4, after.v6, &after.name),
        (1, before.v4, before.v6, &before.name)
    );
    assert_eq!(after.node_key, node_key(9));
    assert!(!lab.server.is_member(node_key(1)) && lab.server.is_member(node_key(9)));
    // A name already taken is numbered; ids and addresses go up.
    let mut request = registration(3);
    request.hostinfo = Some(json!({"Hostname": "host1"}));
    let plan = lab.plan(3, &request, &VALID);
    let Registration::Insert(record, _) = &plan else {
        panic!("{plan:?}");
    };
    assert_eq!((record.id, record.name.as_str()), (2, "host1-1"));
    assert_eq!(record.v4.to_string(), "100.64.0.2");
    let mut zero = registration(4);
    zero.node_key = NodePublic::default();
    let plan = lab.plan(4, &zero, &VALID);
    assert!(matches!(plan, Registration::Answer(answer) if !answer.error.is_empty()));
}

#[test]
fn a_log_out_expires_the_key_and_forgets_an_ephemeral_node() {
    let mut lab = Lab::of(&[1, 2]);
    lab.pump();
    let mut request = registration(1);
    request.expiry = Some(WireTime(time::macros::datetime!(1970-01-01 00:02:03 UTC)));
    // A used key in the same request does no harm.
    request.auth = Some(RegisterAuth::default());
    let answer = lab.register_by(1, &request, &KeyCheck::Used);
    assert!(answer.node_key_expired && answer.error.is_empty());
    let messages = lab.wait(TICK);
    assert!(to(&messages, 2).peers_changed.as_ref().unwrap()[0].expired);
    assert!(!to(&messages, 1).node.as_ref().unwrap().machine_authorized);
    assert!(lab.register(1, &KeyCheck::Absent).node_key_expired);
    assert_eq!(lab.register(1, &VALID).error, "");
    lab.wait(TICK);
    lab.check("after coming back");

    lab.register(3, &EPHEMERAL);
    let stream = lab.open(3);
    lab.wait(TICK);
    request.node_key = node_key(3);
    let answer = lab.register_by(3, &request, &KeyCheck::Absent);
    assert!(answer.node_key_expired);
    lab.wait(TICK);
    assert!(!lab.streams.contains_key(&stream), "its stream ends");
    lab.check("after the ephemeral node left");
    assert_eq!(lab.server.counts().0, 2);
}

/// What the map says of everybody, so that it can be compared.
fn standing(lab: &Lab) -> String {
    format!("{:?}", lab.server.records().collect::<Vec<_>>())
}

#[test]
fn a_stranger_is_told_nothing_and_changes_nothing_whatever_it_asks_for() {
    let mut lab = Lab::of(&[1, 2]);
    lab.pump();
    let before = standing(&lab);
    let past = Some(WireTime(time::macros::datetime!(1970-01-01 00:02:03 UTC)));
    // Machine 9 is not stored; machine 2 is, with another node.
    for (asker, named) in [(9, 9), (9, 1), (2, 1), (2, 9)] {
        for expiry in [None, past] {
            for key in [KeyCheck::Absent, KeyCheck::Unknown, KeyCheck::Used] {
                for old in [None, Some(node_key(1)), Some(node_key(2))] {
                    let request = RegisterRequest {
                        expiry,
                        old_node_key: old,
                        ..registration(named)
                    };
                    let plan = lab.plan(asker, &request, &key);
                    let error = match (expiry, key.error()) {
                        (Some(_), _) => "node not found",
                        (None, Some(error)) => error,
                        (None, None) => {
                            assert!(matches!(plan, Registration::Pending(_)), "{plan:?}");
                            continue;
                        }
                    };
                    let answer = answered(plan);
                    // The text alone: no user, no login, nothing authorised.
                    let expected = RegisterResponse {
                        error: error.to_owned(),
                        ..RegisterResponse::default()
                    };
                    assert_eq!(answer, expected, "{asker} {named} {request:?}");
                }
            }
        }
        for stream in [false, true] {
            let request = if stream { poll(named) } else { once(named) };
            let answer = lab.ask(asker, &request);
            assert_eq!(answer, Err(MapRefusal::NotFound), "{asker} {named}");
        }
    }
    assert!(!lab.server.knows(machine(9)) && lab.server.knows(machine(2)));
    assert_eq!(standing(&lab), before);
    assert!(lab.wait(TICK).is_empty(), "nobody hears of it");
    // With a good key, a machine does not get another's node by naming its key as the old one.
    let request = RegisterRequest {
        old_node_key: Some(node_key(1)),
        ..registration(9)
    };
    let plan = lab.plan(9, &request, &VALID);
    assert!(matches!(&plan, Registration::Insert(record, _) if record.id == 3));
    lab.server.apply(lab.now, plan);
    assert_eq!(lab.record(1).node_key, node_key(1));
    assert!(lab.server.knows(machine(9)));
}

#[test]
fn a_forgotten_node_s_machine_is_a_stranger_and_named_to_the_driver() {
    let mut lab = Lab::new();
    lab.register(3, &EPHEMERAL);
    assert!(lab.server.knows(machine(3)) && lab.server.take_forgotten().is_empty());
    lab.wait(OFFLINE_DELAY);
    lab.wait(Duration::from_secs(300));
    assert!(!lab.server.knows(machine(3)));
    assert_eq!(lab.server.take_forgotten(), [machine(3)]);
}

#[test]
fn requests_of_unknown_nodes_and_old_clients_are_refused() {
    let mut lab = Lab::of(&[1]);
    let other = lab.ask(2, &poll(1));
    assert_eq!(other, Err(MapRefusal::NotFound), "key of another machine");
    assert_eq!(lab.ask(2, &poll(2)), Err(MapRefusal::NotFound));
    let old = MapRequest {
        version: 112,
        ..poll(1)
    };
    assert_eq!(lab.ask(1, &old), Err(MapRefusal::Version(112)));
    let fat = MapRequest {
        hostinfo: Some(json!({"Hostname": "x".repeat(20_000)})),
        ..poll(1)
    };
    assert_eq!(lab.ask(1, &fat), Err(MapRefusal::Hostinfo));
    assert!(matches!(lab.ask(1, &once(1)), Ok(MapAnswer::Once(_))));
}

#[test]
fn identical_requests_cause_no_message_and_changes_travel_as_patches() {
    let mut lab = Lab::of(&[1, 2]);
    lab.wait(TICK);
    lab.report(2, &lite(2, "192.0.2.2:1"));
    let first = lab.wait(TICK);
    // From no endpoints to some: a patch can say that.
    let message = to(&first, 1);
    let patch = &message.peers_changed_patch.as_ref().unwrap()[0];
    let endpoint = patch.endpoints.as_ref().unwrap()[0];
    assert_eq!(endpoint.to_string(), "192.0.2.2:1");
    assert_eq!(message.peers_changed, None);
    for _ in 0..3 {
        lab.report(2, &lite(2, "192.0.2.2:1"));
    }
    assert_eq!(lab.wait(TICK), []);
    // The home moves: still a patch, because measurements are not shown to peers.
    let mut request = lite(2, "192.0.2.2:1");
    request.hostinfo =
        Some(json!({"Hostname": "host2", "NetInfo": {"PreferredDERP": 900, "x": 1}}));
    lab.report(2, &request);
    let messages = lab.wait(TICK);
    let patches = to(&messages, 1).peers_changed_patch.as_ref();
    assert_eq!(patches.unwrap()[0].derp_region, 900);
    // No measurements, no endpoints and no disco key in a request leave the stored ones alone.
    let mut quiet = poll(2);
    (quiet.stream, quiet.omit_peers, quiet.disco_key) = (false, true, DiscoPublic::default());
    lab.report(2, &quiet);
    assert_eq!(lab.wait(TICK), []);
    // An empty list cannot be patched.
    let mut none = request.clone();
    none.endpoints = Some(Vec::new());
    lab.report(2, &none);
    let messages = lab.wait(TICK);
    let changed = to(&messages, 1).peers_changed.as_ref();
    assert!(changed.unwrap()[0].endpoints.is_empty());
    lab.check("at the end");
}

#[test]
fn a_burst_of_changes_is_one_message_and_a_late_reader_gets_one_difference() {
    let mut lab = Lab::new();
    let reader = lab.join(1);
    lab.join(2);
    lab.wait(TICK);
    lab.messages = 0;
    for port in 1..100 {
        lab.report(2, &lite(2, &format!("192.0.2.2:{port}")));
    }
    assert_eq!(
        lab.wait(TICK).len(),
        2,
        "one for the peer, one for the node itself"
    );
    // The reader cannot take messages for many ticks: nothing piles up.
    for port in 100..200 {
        lab.report(2, &lite(2, &format!("192.0.2.2:{port}")));
        lab.now += TICK;
        let due = lab.server.due_sessions(lab.now).into_iter();
        for id in due.filter(|id| *id != reader) {
            lab.server.poll_session(lab.now, WALL, id);
        }
        lab.server.end_tick(lab.now, true);
    }
    let messages = lab.wait(TICK);
    let to_reader: Vec<_> = messages.iter().filter(|(n, _)| *n == 1).collect();
    assert_eq!(to_reader.len(), 1);
    let patches = to_reader[0].1.peers_changed_patch.as_ref().unwrap();
    assert_eq!(patches.len(), 1);
    assert_eq!(patches[0].endpoints.as_ref().unwrap()[0].port(), 199);
}

#[test]
fn a_short_interruption_disturbs_nobody_and_a_long_one_means_offline() {
    let mut lab = Lab::of(&[1]);
    let stream = lab.join(2);
    lab.wait(TICK);
    lab.end(stream);
    assert_eq!(lab.wait(Duration::from_secs(9)), []);
    let again = lab.open(2);
    let told = lab.wait(TICK);
    assert!(
        told.iter().all(|(n, _)| *n == 2),
        "only its own new stream: {told:?}"
    );
    lab.end(again);
    assert_eq!(lab.wait(Duration::from_secs(9)), []);
    lab.now += Duration::from_secs(1);
    lab.server.handle_timeout(lab.now, WALL);
    let (_, message) = lab.wait(TICK).pop().unwrap();
    let patch = &message.peers_changed_patch.unwrap()[0];
    assert_eq!(
        (patch.online, patch.last_seen),
        (Some(false), Some(WireTime(WALL)))
    );
    lab.open(2);
    let told = lab.wait(TICK);
    let patches = to(&told, 1).peers_changed_patch.as_ref();
    assert_eq!(patches.unwrap()[0].online, Some(true));
    lab.check("back again");
}

#[test]
fn the_newest_stream_of_a_node_ends_the_older_one_and_keeps_it_online() {
    let mut lab = Lab::of(&[1]);
    let old = lab.join(2);
    lab.wait(TICK);
    let new = lab.open(2);
    lab.pump();
    assert!(!lab.streams.contains_key(&old) && lab.streams.contains_key(&new));
    assert_eq!(lab.wait(Duration::from_secs(20)), [], "nobody heard of it");
    assert_eq!(lab.server.counts(), (2, 2));
}

/// Opens a stream of node 2 from this network; what it is told.
fn open_from(lab: &mut Lab, last: u8) -> MapResponse {
    let here: SocketAddr = format!("192.0.2.{last}:41641").parse().unwrap();
    let request = MapRequest {
        endpoints: Some(vec![here]),
        ..poll(2)
    };
    lab.open_by(2, &request);
    to(&lab.pump(), 2).clone()
}

#[test]
fn two_machines_that_take_a_node_s_place_in_turns_are_told() {
    let mut lab = Lab::of(&[1, 2]);
    lab.wait(TICK);
    let mut health = Vec::new();
    let mut open = |lab: &mut Lab, last: u8| {
        health.push(open_from(lab, last).health.map(|problems| problems.len()));
        lab.wait(Duration::from_secs(20));
    };
    // One that reconnects, here and there.
    for last in [1, 1, 2, 3, 3] {
        open(&mut lab, last);
    }
    for last in [4, 5, 4, 5, 4] {
        open(&mut lab, last);
    }
    let none = Some(0);
    let some = Some(1);
    let wanted = [none, none, none, none, none, none, none, none, some, some];
    assert_eq!(health, wanted);
}

#[test]
fn one_machine_that_goes_to_and_fro_is_not_two_and_who_is_left_of_two_is_told() {
    let mut lab = Lab::of(&[2]);
    lab.wait(TICK);
    for last in [4, 5, 4, 5, 4, 5] {
        // What stood in the network before still stands at the server.
        assert_eq!(open_from(&mut lab, last).health, Some(Vec::new()));
        lab.wait(Duration::from_secs(40));
    }
    lab.wait(TURNS_TIME);
    let told: Vec<usize> = [4, 5, 4, 5]
        .map(|last| open_from(&mut lab, last).health.unwrap().len())
        .to_vec();
    assert_eq!(told, [0, 0, 0, 1]);
    // The other one is switched off.
    lab.wait(TICK);
    lab.wait(TURNS_TIME - TICK - TICK);
    assert!(lab.server.poll_timeout().unwrap() <= lab.now + TICK);
    lab.wait(TICK);
    let messages = lab.wait(TICK);
    let told: Vec<_> = messages.iter().map(|(_, told)| &told.health).collect();
    assert_eq!(told, [&Some(Vec::new())]);
    assert_eq!(lab.wait(TURNS_TIME), []);
}

#[test]
fn streams_get_signs_of_life_between_50_and_59_seconds() {
    let mut lab = Lab::of(&[1]);
    lab.wait(TICK);
    lab.messages = 0;
    lab.wait(Duration::from_secs(49));
    assert_eq!(lab.messages, 0);
    lab.wait(Duration::from_secs(2));
    assert_eq!(lab.messages, 1);
    assert_eq!(
        lab.server.poll_timeout(),
        Some(lab.now + Duration::from_secs(50))
    );
}

#[test]
fn an_ephemeral_node_is_forgotten_five_minutes_after_it_left_also_over_a_restart() {
    let mut lab = Lab::of(&[1]);
    lab.register(2, &EPHEMERAL);
    let stream = lab.open(2);
    lab.wait(TICK);
    lab.end(stream);
    lab.wait(OFFLINE_DELAY);
    lab.wait(TICK);
    let records = lab.server.records().cloned().collect();
    lab.wait(Duration::from_secs(299));
    assert_eq!(lab.server.counts().0, 2);
    lab.wait(Duration::from_secs(2));
    lab.wait(TICK);
    assert_eq!(lab.server.counts().0, 1);
    lab.check("after it was forgotten");
    assert!(lab.server.take_writes().contains(&Write::Delete(2)));
    // It is told why, and only it; and what somebody removes does not come back by itself.
    assert_eq!(lab.ask(2, &poll(2)), Err(MapRefusal::StayedAway));
    assert_eq!(lab.ask(3, &poll(2)), Err(MapRefusal::NotFound));
    assert_eq!(lab.register(2, &EPHEMERAL).error, "");
    lab.open(2);
    lab.register_by(2, &log_out(2), &KeyCheck::Absent);
    assert_eq!(lab.ask(2, &poll(2)), Err(MapRefusal::NotFound));

    let mut restarted = Server::new(lab.now, config(), records, 2, 2);
    let later = lab.now + START_GRACE;
    restarted.handle_timeout(later, WALL);
    restarted.handle_timeout(later + Duration::from_secs(299), WALL);
    assert_eq!(restarted.counts().0, 2);
    restarted.handle_timeout(later + Duration::from_secs(300), WALL);
    assert_eq!(restarted.counts().0, 1);
}

#[test]
fn after_a_restart_nodes_are_not_called_offline_before_they_could_come_back() {
    let mut lab = Lab::of(&[1, 2, 3]);
    lab.restart(3);
    lab.open(1);
    let (_, full) = lab.pump().pop().unwrap();
    assert!(full.peers.unwrap().iter().all(|peer| peer.online.is_none()));
    lab.open(2);
    lab.wait(TICK);
    lab.wait(START_GRACE);
    lab.wait(TICK);
    let (_, map) = lab.streams.values().next().unwrap();
    let online: Vec<_> = map.peers().values().map(|peer| peer.online).collect();
    assert_eq!(online, [Some(true), Some(false)]);
}

#[test]
fn a_route_goes_to_one_online_router_and_does_not_flap_back() {
    let mut lab = Lab::new();
    let route = "10.20.0.0/16";
    let [first, second, _] = [1, 2, 9].map(|n| lab.join(n));
    for n in [1, 2] {
        let routes = json!([route, "0.0.0.0/0", "10.99.0.0/16", "10.20.0.1/16", 7]);
        lab.announce(n, routes);
        lab.approve(n.into(), &[route, "0.0.0.0/0"]);
    }
    lab.wait(TICK);
    assert_eq!(lab.routers(route), [1]);
    let exit: IpNet = "0.0.0.0/0".parse().unwrap();
    let wire = &lab.server.view[&1];
    let allowed = wire.allowed_ips.as_ref().unwrap();
    assert!(
        allowed.contains(&exit) && allowed.len() == 4,
        "only approved ones: {allowed:?}"
    );
    assert_eq!(wire.primary_routes, nets(&[route]));
    // Each is told of itself.
    let own = |lab: &Lab, node: u8| {
        let (_, map) = lab.streams.values().find(|(n, _)| *n == node).unwrap();
        [route, "0.0.0.0/0", "10.99.0.0/16"].map(|net| map.is_ours(&net.parse().unwrap()))
    };
    assert_eq!(own(&lab, 1), [true, true, false]);
    assert_eq!(own(&lab, 2), [false, true, false]);
    let again = |lab: &mut Lab, n: u8| {
        let mut request = poll(n);
        request.hostinfo = Some(json!({"Hostname": format!("host{n}"), "RoutableIPs": [route]}));
        lab.open_by(n, &request)
    };
    // Its own redial costs it nothing,
    lab.end(first);
    lab.wait(ROUTES_DELAY - Duration::from_millis(1));
    let first = again(&mut lab, 1);
    lab.wait(ROUTES_DELAY);
    assert_eq!(lab.routers(route), [1]);
    // unless it stays away.
    lab.end(first);
    assert_eq!(lab.server.poll_timeout(), Some(lab.now + ROUTES_DELAY));
    lab.wait(ROUTES_DELAY);
    lab.wait(TICK);
    assert_eq!(lab.routers(route), [2]);
    lab.wait(OFFLINE_DELAY);
    let first = again(&mut lab, 1);
    lab.wait(TICK);
    lab.wait(TICK);
    assert_eq!(lab.routers(route), [2]);
    // A short break of all of them moves nothing.
    lab.end(first);
    lab.end(second);
    lab.wait(TICK);
    assert_eq!(lab.routers(route), [2]);
    let second = again(&mut lab, 2);
    again(&mut lab, 1);
    lab.wait(TICK);
    assert_eq!(lab.routers(route), [2]);
    // Who takes it back gives way at once.
    lab.end(second);
    lab.announce(2, [""; 0]);
    lab.wait(TICK);
    assert_eq!(lab.routers(route), [1]);
    lab.check("after the switch");
}

#[test]
fn a_route_counts_for_the_nodes_it_is_approved_for_and_for_no_other() {
    let mut lab = Lab::new();
    let (lan, wide, exit) = ("10.1.0.0/16", "10.0.0.0/8", "::/0");
    let [_, _, third, _] = [1, 2, 3, 9].map(|n| lab.join(n));
    // Each is told of, and nothing is approved.
    for n in [1, 2, 3] {
        lab.announce(n, [lan, wide, exit]);
    }
    lab.wait(TICK);
    for route in [lan, wide, exit] {
        assert_eq!(lab.routers(route), [0; 0], "{route}");
    }
    // Exactly what is approved, for exactly that node.
    lab.approve(2, &[wide, exit]);
    lab.approve(3, &[lan]);
    lab.wait(TICK);
    assert_eq!(lab.routers(wide), [2]);
    assert_eq!(lab.routers(exit), [2]);
    assert_eq!(lab.routers(lan), [3]);
    // While it is away nobody takes its place who may not.
    lab.end(third);
    lab.wait(OFFLINE_DELAY);
    lab.wait(TICK);
    assert_eq!(lab.routers(lan), [0; 0]);
    lab.approve(1, &[lan]);
    lab.wait(TICK);
    assert_eq!(lab.routers(lan), [1]);
    // It stops announcing, and begins again; then the approval is taken back.
    lab.announce(1, [""; 0]);
    lab.wait(TICK);
    assert_eq!(lab.routers(lan), [0; 0]);
    lab.announce(1, [lan]);
    lab.wait(TICK);
    assert_eq!(lab.routers(lan), [1]);
    lab.revoke(1, &[lan]);
    lab.wait(TICK);
    assert_eq!(lab.routers(lan), [0; 0]);
    lab.check("after it was revoked");
    // An approval before the announcement is as good.
    lab.approve(1, &["fd00:7::/64"]);
    lab.announce(1, ["fd00:7::/64"]);
    lab.wait(TICK);
    assert_eq!(lab.routers("fd00:7::/64"), [1]);
    lab.check("at the end");
}

#[test]
fn an_approval_goes_with_the_node_and_is_not_inherited_by_its_name() {
    let mut lab = Lab::of(&[1, 2, 9]);
    let (lan, exit) = ("10.1.0.0/16", "0.0.0.0/0");
    lab.approve(1, &[lan, exit]);
    for n in [1, 2] {
        lab.announce(n, [lan, exit]);
    }
    lab.wait(TICK);
    assert_eq!(lab.routers(lan), [1]);
    let old = lab.record(1);
    lab.delete(1);
    lab.wait(TICK);
    assert_eq!((lab.routers(lan), lab.routers(exit)), (vec![], vec![]));
    // The same machine, by a key that is still good: another node of the same name.
    lab.join(1);
    lab.announce(1, [lan, exit]);
    lab.wait(TICK);
    let id = lab.server.by_key[&node_key(1)];
    let new = lab.record(id);
    assert_eq!((&new.name, new.approved.len()), (&old.name, 0));
    assert!(
        new.id > old.id && new.v4 > old.v4 && new.v6 > old.v6,
        "{new:?}"
    );
    assert_eq!((lab.routers(lan), lab.routers(exit)), (vec![], vec![]));
    // A new node key of the same machine changes nothing.
    lab.approve(id, &[lan]);
    lab.expire(id);
    lab.wait(TICK);
    assert_eq!(lab.routers(lan), [0; 0], "an expired router routes nothing");
    let wire = &lab.server.view[&id];
    assert_eq!(wire.allowed_ips.as_ref().unwrap().len(), 2);
    assert_eq!(lab.register(1, &VALID).error, "");
    lab.announce(1, [lan]);
    lab.wait(TICK);
    assert_eq!(lab.routers(lan), [id]);
    lab.check("at the end");
}

#[test]
fn approvals_survive_a_restart_and_so_do_the_addresses_of_who_was_deleted() {
    let mut lab = Lab::of(&[1, 2, 9]);
    lab.approve(1, &["10.1.0.0/16"]);
    lab.announce(1, ["10.1.0.0/16"]);
    lab.announce(2, ["10.1.0.0/16"]);
    lab.delete(3);
    lab.wait(TICK);
    lab.restart(3);
    lab.open(1);
    lab.open(2);
    for n in [2, 1] {
        lab.announce(n, ["10.1.0.0/16"]);
    }
    // Node 3 had id and address 3; the machine comes again.
    lab.join(9);
    lab.wait(TICK);
    assert_eq!(lab.record(4).v4.to_string(), "100.64.0.4");
    assert_eq!(lab.routers("10.1.0.0/16"), [1]);
}

#[test]
fn routes_that_are_announced_past_the_bound_are_counted_and_approvals_end_at_theirs() {
    let mut lab = Lab::of(&[1]);
    let many = (0..300).map(|n| format!("10.{}.{}.0/24", n / 256, n % 256));
    let many: Vec<String> = many.collect();
    for _ in 0..3 {
        lab.announce(1, &many);
    }
    assert_eq!(lab.server.take_left_out(), 44, "once, not per request");
    assert_eq!(lab.server.take_left_out(), 0);
    let all: Vec<&str> = many.iter().map(String::as_str).collect();
    lab.approve(1, &all[..200]);
    lab.approve(1, &all[..256]);
    let refused = lab.change("1", &Change::Approve(nets(&all[256..257])));
    assert_eq!(refused, Err(Refusal::TooMany("host1".to_owned())));
    assert_eq!(lab.server.nodes[&1].routes.len(), 256);
}

/// Stored nodes with ids from 1 on.
fn records(count: u32) -> Vec<NodeRecord> {
    let record = |n: u32| {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&n.to_be_bytes());
        NodeRecord {
            id: n.into(),
            machine: MachinePublic(key),
            node_key: NodePublic(key),
            disco: None,
            user: 1,
            tags: Vec::new(),
            name: format!("n{n}"),
            name_fixed: false,
            v4: Ipv4Addr::from_bits(0x6440_0000 + n),
            v6: Ipv6Addr::from_bits(n.into()),
            capver: 130,
            hostinfo: json!({}),
            endpoints: Vec::new(),
            auth_key: None,
            ephemeral: false,
            expires: None,
            good_until: None,
            approved: Vec::new(),
            last_seen: None,
            created: WALL,
        }
    };
    (1..=count).map(record).collect()
}

/// What is done is counted, as no clock would be exact.
#[test]
fn a_question_to_a_server_of_ten_thousand_nodes_costs_a_look_at_those_it_concerns() {
    let all = 10_000;
    let mut lab = Lab::new();
    lab.server = Server::new(lab.now, config(), records(all), all.into(), all);
    lab.wait(START_GRACE);
    lab.wait(TICK);
    for n in 201..=206 {
        lab.join(n);
    }
    lab.wait(TICK);
    lab.wait(TICK);
    let looks = |lab: &mut Lab| std::mem::take(&mut lab.server.looks);
    looks(&mut lab);
    // A report that says nothing new, and one that does, of which nobody hears before the tick.
    lab.report(201, &lite(201, "192.0.2.1:1"));
    lab.pump();
    lab.report(201, &lite(201, "192.0.2.1:1"));
    lab.pump();
    assert_eq!(looks(&mut lab), 0);
    // Every stream is told at the tick, once.
    assert_eq!(lab.wait(TICK).len(), 6);
    assert_eq!(looks(&mut lab), 6);
    lab.wait(TICK);
    assert_eq!(looks(&mut lab), 0);
    // One that cannot take it now is asked again, alone.
    lab.report(201, &lite(201, "192.0.2.1:2"));
    lab.now += TICK;
    for id in lab.server.due_sessions(lab.now).into_iter().skip(1) {
        lab.server.poll_session(lab.now, WALL, id);
    }
    lab.server.end_tick(lab.now, true);
    looks(&mut lab);
    assert_eq!(lab.wait(TICK).len(), 1);
    assert_eq!(looks(&mut lab), 1);
    // One node leaves: its alarm is looked at, and then those who are told.
    let (id, _) = lab.streams.pop_first().unwrap();
    lab.end(id);
    assert_eq!(lab.server.poll_timeout(), Some(lab.now + OFFLINE_DELAY));
    lab.wait(OFFLINE_DELAY);
    assert_eq!(looks(&mut lab), 1);
    lab.wait(TICK);
    assert_eq!(looks(&mut lab), 5);
    // A sign of life for whom one is due, and for nobody else.
    let alive = lab.server.stream_alarms.first().unwrap().0;
    let due = lab.server.stream_alarms.iter();
    let due = due.take_while(|(at, _)| *at == alive).count();
    lab.now = alive;
    lab.pump();
    assert_eq!(looks(&mut lab), due);
}

#[test]
fn a_network_that_is_full_lets_nobody_in_until_one_is_deleted() {
    let records = records(PEERS_MAX.try_into().unwrap());
    let mut lab = Lab::new();
    let last = i64::try_from(PEERS_MAX).unwrap();
    lab.server = Server::new(lab.now, config(), records, last, 0x4000);
    let answer = lab.register(200, &VALID);
    assert_eq!(answer.error, "the network is full");
    lab.delete(7);
    assert_eq!(lab.register(200, &VALID).error, "");
}

#[test]
fn a_deleted_node_is_told_once_loses_its_streams_and_is_refused_from_then_on() {
    let mut lab = Lab::of(&[1, 2, 3]);
    lab.wait(TICK);
    // Also a stream that has had nothing yet.
    let young = lab.open(2);
    lab.delete(2);
    let messages = lab.wait(TICK);
    let told: Vec<_> = messages.iter().filter(|(n, _)| *n == 2).collect();
    assert_eq!(told.len(), 2, "each of its streams: {told:?}");
    for (_, last) in told {
        let own = last.node.as_ref().unwrap();
        assert!(own.expired && !own.machine_authorized);
        assert!(own.key_expiry.unwrap().get().unwrap() < WALL);
        assert!(last.peers.is_none() && last.peers_changed.is_none());
    }
    assert!(!lab.streams.contains_key(&young) && lab.streams.len() == 2);
    for n in [1, 3] {
        assert_eq!(to(&messages, n).peers_removed, Some(vec![2]), "node {n}");
    }
    lab.check("after the deletion");
    for request in [poll(2), lite(2, "192.0.2.9:9"), once(2)] {
        let answer = lab.ask(2, &request);
        assert_eq!(answer, Err(MapRefusal::NotFound));
    }
    assert!(!lab.server.is_member(node_key(2)));
    assert!(!lab.server.needs_no_key(WALL, machine(2), &registration(2)));
    for key in [KeyCheck::Used, KeyCheck::Expired] {
        let answer = lab.register(2, &key);
        assert!(!answer.error.is_empty(), "{key:?}: {answer:?}");
    }
    assert!(!lab.register(2, &KeyCheck::Absent).machine_authorized);
    assert!(lab.server.take_writes().contains(&Write::Delete(2)));
    // Who is named so is unknown now.
    assert_eq!(
        lab.change("host2", &Change::Delete),
        Err(Refusal::Unknown("host2".to_owned()))
    );
}

#[test]
fn an_expired_node_is_told_of_itself_alone_and_changes_nothing_until_it_registers_anew() {
    let mut lab = Lab::of(&[1, 2, 3]);
    lab.wait(TICK);
    lab.report(2, &lite(2, "192.0.2.2:1"));
    lab.wait(TICK);
    let before = lab.record(2);
    lab.expire(2);
    let messages = lab.wait(TICK);
    let own = to(&messages, 2);
    assert_eq!(own.peers_removed, Some(vec![1, 3]));
    let node = own.node.as_ref().unwrap();
    assert!(node.expired && !node.machine_authorized);
    assert_eq!(node.key_expiry, Some(WireTime(WALL)));
    let peer = &to(&messages, 1).peers_changed.as_ref().unwrap()[0];
    assert!(peer.expired && peer.key_expiry == Some(WireTime(WALL)));
    lab.check("after the expiry");
    assert!(!lab.server.is_member(node_key(2)));

    // A new stream has nobody either, and nothing reported is taken or sent on.
    let (id, mut request) = (lab.open(2), poll(2));
    let messages = lab.wait(TICK);
    let full = to(&messages, 2);
    assert!(full.peers.as_ref().is_none_or(Vec::is_empty));
    assert!(full.node.as_ref().unwrap().expired);
    request.endpoints = Some(vec!["192.0.2.66:66".parse().unwrap()]);
    request.disco_key = DiscoPublic([66; 32]);
    request.hostinfo = Some(json!({"Hostname": "other", "RoutableIPs": ["10.0.0.0/8"]}));
    lab.open_by(2, &request);
    request.stream = false;
    for omit_peers in [true, false] {
        request.omit_peers = omit_peers;
        let answer = lab.ask(2, &request);
        assert_eq!(answer, Err(MapRefusal::Expired));
    }
    let messages = lab.wait(TICK);
    assert!(messages.iter().all(|(n, _)| *n == 2), "{messages:?}");
    assert!(
        !lab.streams.contains_key(&id),
        "the newer stream replaced it"
    );
    // What happens among the others is not for it.
    lab.report(1, &lite(1, "192.0.2.1:77"));
    lab.join(4);
    lab.delete(3);
    let messages = lab.wait(TICK);
    assert!(messages.iter().all(|(n, _)| *n != 2), "{messages:?}");
    lab.check("while it is expired");

    // A clock that is set back makes the key no better.
    let yesterday = WALL - Duration::from_secs(86_400);
    let (machine, again) = (machine(2), registration(2));
    let answer =
        lab.server
            .plan_register(yesterday, machine, &again, &KeyCheck::Absent, Code::new(0));
    assert!(matches!(answer, Registration::Answer(answer) if answer.node_key_expired));
    // An auth key does: the same node, and its stream hears of everybody again.
    assert_eq!(lab.register(2, &VALID).error, "");
    let messages = lab.wait(TICK);
    let own = to(&messages, 2);
    assert!(!own.node.as_ref().unwrap().expired);
    assert_eq!(own.peers_changed.as_ref().unwrap().len(), 2);
    lab.check("after it came back");
    let stays = |of: NodeRecord| (of.id, of.v4, of.name, of.endpoints, of.disco);
    assert_eq!(stays(lab.record(2)), stays(before));
}

#[test]
fn endpoints_that_cannot_be_are_left_out() {
    for (text, good) in [
        ("192.0.2.1:41641", true),
        ("127.0.0.1:1", true),
        ("[2001:db8::1]:1", true),
        ("[fe80::1]:1", false),
        ("0.0.0.0:1", false),
        ("224.0.0.1:1", false),
        ("[ff02::1]:1", false),
        ("192.0.2.1:0", false),
    ] {
        assert_eq!(is_endpoint(&text.parse().unwrap()), good, "{text}");
    }
    let mut lab = Lab::of(&[1]);
    let mut many = lite(1, "192.0.2.1:1");
    many.endpoints = Some((1..200).map(|port| ([192, 0, 2, 1], port).into()).collect());
    lab.report(1, &many);
    assert_eq!(lab.record(1).endpoints.len(), ENDPOINTS_MAX);
}

#[test]
fn new_relays_reach_every_stream() {
    let mut lab = Lab::of(&[1]);
    lab.wait(TICK);
    let map: DerpMap = serde_json::from_str(r#"{"Regions":{"901":{"RegionID":901}}}"#).unwrap();
    lab.server.set_derp_map(lab.now, map.clone());
    lab.wait(TICK);
    assert_eq!(*lab.streams.values().next().unwrap().1.derp_map, map);
    lab.check("after the new map");
}

/// Random operations; after each quiet moment every client's table is the server's.
#[test]
fn merged_state_equals_the_servers_view_after_any_operations() {
    for seed in 1..=20_u64 {
        let mut state = seed;
        let mut random = move |below: u64| {
            // xorshift64*: enough for a test, and the seed is in every message.
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            state.wrapping_mul(0x2545_f491_4f6c_dd1d) % below
        };
        let mut lab = Lab::new();
        for step in 0..300 {
            let n = u8::try_from(random(6) + 1).unwrap();
            let known = lab.server.by_key.contains_key(&node_key(n));
            match random(8) {
                0 if !known => {
                    let ephemeral = random(3) == 0;
                    let key = if ephemeral { EPHEMERAL } else { VALID };
                    lab.register(n, &key);
                }
                1 | 2 if known => {
                    lab.open(n);
                }
                3 => {
                    let of_node = lab.streams.iter().find(|(_, (m, _))| *m == n);
                    if let Some(id) = of_node.map(|(id, _)| *id) {
                        lab.end(id);
                    }
                }
                4 | 5 if known => {
                    let id = lab.server.by_key[&node_key(n)];
                    if lab.record(id).expires.is_some() {
                        continue;
                    }
                    let mut request = lite(n, &format!("192.0.2.{n}:{}", 1 + random(3)));
                    if random(3) == 0 {
                        request.endpoints = Some(Vec::new());
                    }
                    request.hostinfo = Some(json!({
                        "Hostname": format!("host{}", random(3)),
                        "NetInfo": {"PreferredDERP": random(3)},
                        "RoutableIPs": if random(4) == 0 { json!(["10.20.0.0/16"]) } else { Value::Null },
                    }));
                    lab.report(n, &request);
                }
                6 if known && random(6) == 0 => {
                    let id = lab.server.by_key[&node_key(n)];
                    match random(3) {
                        0 => lab.delete(id),
                        1 => lab.expire(id),
                        _ => lab.approve(id, &["10.20.0.0/16"]),
                    }
                }
                6 if known && random(3) == 0 => {
                    lab.register(n, &VALID);
                }
                6 if known && random(4) == 0 => {
                    lab.register_by(n, &log_out(n), &KeyCheck::Absent);
                }
                7 => {
                    let waits = [50, 100, 5_000, 11_000, 40_000, 400_000];
                    let wait = waits[usize::try_from(random(6)).unwrap()];
                    lab.wait(Duration::from_millis(wait));
                }
                _ => {
                    lab.pump();
                }
            }
            if random(10) == 0 {
                lab.wait(TICK);
                lab.wait(TICK);
                lab.check(&format!("seed {seed}, step {step}"));
            }
        }
        let names: BTreeSet<&String> = lab.server.records().map(|record| &record.name).collect();
        assert_eq!(names.len(), lab.server.nodes.len(), "names are unique");
    }
}

fn with_policy(lab: &mut Lab, text: &str) {
    let policy = crate::policy::Policy::parse(text).unwrap();
    lab.server.set_policy(lab.now, Some(policy));
}

fn of_user(user: i64, tags: &[&str]) -> KeyCheck {
    KeyCheck::Valid {
        id: 1,
        ephemeral: false,
        user,
        tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
    }
}

/// Users ann, 2, and bob, 3.
fn lab_of_users() -> Lab {
    let mut lab = Lab::new();
    let users = [(1, "ringtail"), (2, "ann"), (3, "bob")];
    let users = users.map(|(id, name)| (id, name.to_owned()));
    lab.server.set_users(users.into());
    lab
}

#[test]
fn a_node_is_called_what_an_administrator_says_whatever_its_host_is_called() {
    let mut lab = Lab::of(&[1, 2]);
    lab.wait(TICK);
    lab.change("1", &Change::Rename("Web-1".to_owned()))
        .unwrap();
    let messages = lab.wait(TICK);
    let changed = to(&messages, 2).peers_changed.as_ref().unwrap();
    assert_eq!(changed[0].name, "web-1.tail.test.");
    let own = to(&messages, 1).node.as_ref().unwrap();
    assert_eq!(own.name, "web-1.tail.test.");
    // Its host may be called anything now.
    let mut request = lite(1, "192.0.2.1:9");
    request.hostinfo = Some(json!({"Hostname": "other"}));
    lab.report(1, &request);
    assert_eq!(lab.record(1).name, "web-1");
    let mut refused = |name: &str| lab.change("2", &Change::Rename(name.to_owned()));
    assert_eq!(
        refused("web-1"),
        Err(Refusal::NameTaken("web-1".to_owned(), 1))
    );
    for bad in ["", "a b", "-a", "a-", "a.b", "\u{e9}", &"a".repeat(64)] {
        assert_eq!(refused(bad), Err(Refusal::BadName(bad.to_owned())), "{bad}");
    }
    // A new node with that host name gets another.
    let mut request = registration(3);
    request.hostinfo = Some(json!({"Hostname": "web-1"}));
    lab.register_by(3, &request, &VALID);
    assert_eq!(lab.record(3).name, "web-1-1");
}

#[test]
fn nodes_are_their_users_or_their_tags() {
    let mut lab = lab_of_users();
    let answer = lab.register(1, &of_user(2, &[]));
    assert_eq!(
        (answer.user.id, answer.login.login_name.as_str()),
        (2, "ann")
    );
    let answer = lab.register(2, &of_user(2, &["tag:web"]));
    assert_eq!(answer.login.login_name, "tagged-devices");
    lab.open(1);
    lab.pump();
    let message = lab.server.full(WALL, 1);
    let profiles = message.user_profiles.unwrap();
    let peer = &message.peers.unwrap()[0];
    assert_eq!(peer.tags, ["tag:web"]);
    assert!(profiles.iter().any(|profile| profile.id == peer.user));
    lab.change("2", &Change::Tag(Vec::new())).unwrap();
    let messages = lab.wait(TICK);
    let changed = &to(&messages, 1).peers_changed.as_ref().unwrap()[0];
    assert_eq!((changed.user, changed.tags.len()), (2, 0));
    let bad = Change::Tag(vec!["web".to_owned()]);
    assert_eq!(
        lab.change("2", &bad),
        Err(Refusal::BadTag("web".to_owned()))
    );
    // Another's key makes it another's, and what was approved was its owner's.
    lab.approve(1, &["10.20.0.0/16"]);
    let mut request = registration(1);
    request.node_key = node_key(9);
    lab.register_by(1, &request, &of_user(3, &[]));
    let record = lab.record(1);
    assert_eq!((record.user, record.approved.len()), (3, 0));
}

#[test]
fn tags_a_node_asks_for_are_its_key_s_or_its_user_s_to_give() {
    let mut lab = lab_of_users();
    with_policy(&mut lab, r#"{"tagOwners": {"tag:web": ["ann@"]}}"#);
    let mut request = registration(1);
    request.hostinfo = Some(json!({"Hostname": "h", "RequestTags": ["tag:web", "tag:web"]}));
    let answer = lab.register_by(1, &request, &of_user(2, &[]));
    assert_eq!(
        answer.error,
        "requested tags [tag:web] are invalid or not permitted"
    );
    assert_eq!(
        lab.register_by(1, &request, &of_user(2, &["tag:web"]))
            .error,
        ""
    );
    assert_eq!(lab.record(1).tags, ["tag:web"]);
    // Who is let in by a person gets what the policy lets its user give.
    request.node_key = node_key(2);
    let code = lab.register_by(2, &request, &KeyCheck::Absent).auth_url;
    let refused = lab.server.plan_approval(WALL, &code, Some("bob"));
    assert!(matches!(refused, Err(Refusal::NoPlace(_))), "{refused:?}");
    let nobody = lab.server.plan_approval(WALL, &code, Some("cem"));
    assert_eq!(nobody, Err(Refusal::NoSuchUser("cem".to_owned())));
    let plan = lab.server.plan_approval(WALL, &code, Some("ann")).unwrap();
    lab.server.apply(lab.now, plan);
    let record = lab.record(2);
    assert_eq!((record.user, record.tags), (2, vec!["tag:web".to_owned()]));
}

#[test]
fn a_key_expires_in_its_time_and_those_of_tagged_nodes_do_not() {
    let mut lab = lab_of_users();
    lab.server.config.key_expiry = Some(Duration::from_secs(3600));
    lab.register(1, &of_user(2, &[]));
    lab.register(2, &of_user(2, &["tag:web"]));
    lab.open(1);
    lab.open(2);
    let messages = lab.pump();
    let until = WALL + Duration::from_secs(3600);
    let until = until.replace_nanosecond(0).unwrap();
    let own = to(&messages, 1).node.as_ref().unwrap();
    assert_eq!(own.key_expiry, Some(WireTime(until)));
    assert_eq!(to(&messages, 2).node.as_ref().unwrap().key_expiry, None);
    assert_eq!(lab.record(2).good_until, None);
    // The host's clock decides, whenever it is looked at.
    let soon = lab.now + Duration::from_secs(120);
    lab.server
        .handle_timeout(soon, until - Duration::from_secs(1));
    assert!(lab.record(1).expires.is_none());
    assert!(
        lab.server
            .poll_timeout()
            .is_some_and(|at| at <= soon + Duration::from_secs(1))
    );
    lab.server
        .handle_timeout(soon + Duration::from_secs(1), until);
    assert_eq!(lab.record(1).expires, Some(until));
    assert!(!lab.server.is_member(node_key(1)) && lab.server.is_member(node_key(2)));
    // A new key, and it is good for as long again.
    let mut request = registration(1);
    request.node_key = node_key(9);
    request.old_node_key = Some(node_key(1));
    lab.register_by(1, &request, &of_user(2, &[]));
    let record = lab.record(1);
    assert_eq!(
        (record.id, record.expires, record.good_until),
        (1, None, Some(until))
    );
    // Who loses its tags has a key that ends as well.
    lab.change("2", &Change::Tag(Vec::new())).unwrap();
    assert_eq!(lab.record(2).good_until, Some(until));
    // A time that no calendar has.
    for (n, days) in [(3, 3_000_000), (4, u64::MAX / 86_400)] {
        lab.server.config.key_expiry = Some(Duration::from_secs(86_400 * days));
        lab.register(n, &of_user(2, &[]));
        assert_eq!(lab.record(n.into()).good_until, None);
    }
}

#[test]
fn users_that_a_policy_names_and_nobody_has_added_are_known_until_somebody_does() {
    let mut lab = lab_of_users();
    assert!(lab.server.unknown_users().is_empty());
    let typo = r#"{"acls": [{"action": "accept", "src": ["ann@"], "dst": ["bod@:22"]}]}"#;
    with_policy(&mut lab, typo);
    assert_eq!(lab.server.unknown_users(), ["bod"]);
    lab.server
        .set_users([(2, "ann".to_owned()), (3, "bod".to_owned())].into());
    assert!(lab.server.unknown_users().is_empty());
}

#[test]
fn with_a_policy_each_is_told_of_its_own_peers_and_filter() {
    let mut lab = lab_of_users();
    lab.register(1, &of_user(2, &[]));
    lab.register(2, &of_user(3, &[]));
    lab.register(3, &of_user(3, &[]));
    for n in 1..=3 {
        lab.open(n);
    }
    lab.pump();
    lab.wait(TICK);
    let to_bob = r#"{"acls": [{"action": "accept", "src": ["ann@"], "dst": ["bob@:22"]}]}"#;
    with_policy(&mut lab, to_bob);
    let messages = lab.wait(TICK);
    // The two of bob lose each other, and have a rule for what ann does.
    for (n, other) in [(2, 3), (3, 2)] {
        let message = to(&messages, n);
        assert_eq!(message.peers_removed, Some(vec![other]));
        let filters = message.packet_filters.as_ref().unwrap();
        let rules = filters["base"].as_ref().unwrap();
        assert_eq!(rules.len(), 1);
        assert_eq!(rules[0].src_ips, ["100.64.0.1", "fd7a:115c:a1e0::1"]);
    }
    let message = to(&messages, 1);
    assert!(message.peers_removed.is_none());
    let filters = message.packet_filters.as_ref().unwrap();
    assert_eq!(filters["base"].as_ref().unwrap().len(), 0);
    // The same again says nothing; a new node of ann's changes what bob's accept.
    with_policy(&mut lab, to_bob);
    assert!(lab.wait(TICK).is_empty());
    lab.register(4, &of_user(2, &[]));
    lab.open(4);
    let messages = lab.wait(TICK);
    let filters = to(&messages, 2).packet_filters.as_ref().unwrap();
    assert_eq!(filters["base"].as_ref().unwrap()[0].src_ips.len(), 4);
    assert!(
        messages
            .iter()
            .all(|(n, message)| *n != 1 || message.peers_changed.is_none())
    );
    let seen: Vec<i64> = lab.server.seen_by(4).keys().copied().collect();
    assert_eq!(seen, [2, 3, 4]);
    // Routes are told to whom a rule lets use them.
    lab.announce(2, ["10.20.0.0/16"]);
    lab.approve(2, &["10.20.0.0/16"]);
    let routes = |lab: &Lab, viewer: i64| lab.server.seen(viewer, 2).unwrap().primary_routes.len();
    lab.server.look();
    assert_eq!((routes(&lab, 1), routes(&lab, 2)), (0, 1));
    let more = r#"{"acls": [{"action": "accept", "src": ["ann@"], "dst": ["bob@:22", "10.20.0.0/16:*"]}]}"#;
    with_policy(&mut lab, more);
    lab.wait(TICK);
    assert_eq!(routes(&lab, 1), 1);
    lab.server.set_policy(lab.now, None);
    let messages = lab.wait(TICK);
    assert_eq!(to(&messages, 2).peers_changed.as_ref().unwrap().len(), 1);
    for (viewer, _) in lab.streams.values() {
        assert_eq!(lab.server.seen_by((*viewer).into()).len(), 4);
    }
}

#[test]
fn routes_count_at_once_for_whom_the_policy_says_so() {
    let mut lab = lab_of_users();
    let approve = r#"{"tagOwners": {"tag:router": []}, "autoApprovers":
        {"routes": {"10.0.0.0/8": ["tag:router"]}, "exitNode": ["ann@"]}}"#;
    with_policy(&mut lab, approve);
    lab.register(1, &of_user(2, &["tag:router"]));
    lab.register(2, &of_user(2, &[]));
    for n in 1..=2 {
        lab.open(n);
        lab.announce(n, ["10.20.0.0/16", "0.0.0.0/0", "::/0", "192.168.0.0/24"]);
    }
    assert_eq!(lab.record(1).approved, nets(&["10.20.0.0/16"]));
    assert_eq!(lab.record(2).approved, nets(&["0.0.0.0/0", "::/0"]));
    // A tag given later, and a policy that comes later.
    lab.change("2", &Change::Tag(vec!["tag:router".to_owned()]))
        .unwrap();
    assert!(lab.record(2).approved.contains(&nets(&["10.20.0.0/16"])[0]));
    let wider = approve.replace("10.0.0.0/8", "0.0.0.0/0");
    with_policy(&mut lab, &wider);
    assert!(
        lab.record(1)
            .approved
            .contains(&nets(&["192.168.0.0/24"])[0])
    );
    assert!(!lab.record(1).approved.contains(&nets(&["0.0.0.0/0"])[0]));
    assert!(lab.server.has_writes());
    // What it approves is revoked there: here it would come back with the next report.
    let change = Change::Revoke(nets(&["10.20.0.0/16"]));
    let refused = lab.change("1", &change).unwrap_err();
    assert!(
        refused.to_string().contains("the policy approves"),
        "{refused}"
    );
    with_policy(&mut lab, r#"{"acls": []}"#);
    lab.change("1", &change).unwrap();
    lab.announce(1, ["10.20.0.0/16", "10.99.0.0/16"]);
    assert_eq!(lab.record(1).approved, nets(&["192.168.0.0/24"]));
}
