//! The agent as the driver sees it: what goes in, what comes out.

use std::sync::Arc;

use ringtail_dataplane::{Rule, Rules};

use super::*;
use crate::disco;
use crate::key::{DiscoPrivate, NodePrivate};
use crate::netmap::MapState;
use crate::netmap::wire::{self, WireTime};
use crate::testing::start;

fn node(seed: u8) -> (NodePublic, DiscoPrivate) {
    (
        NodePrivate::clamped([seed; 32]).public(),
        DiscoPrivate::clamped([seed ^ 0xff; 32]),
    )
}

pub(super) fn agent(seed: u8, relay_only: bool) -> Agent {
    let (node_key, disco_key) = node(seed);
    let setup = Setup {
        node_key,
        disco_key,
        paths: path::Config::default(),
        relay_only,
        local_port: 41641,
        port_is_fixed: true,
        tun: "tun0".into(),
        peerapi: [Some(4001), Some(4002)],
    };
    let mut agent = Agent::new(start(), setup, [seed; 32]);
    agent.handle_prefs(start(), prefs());
    let _ = outputs(&mut agent);
    agent
}

fn prefs() -> Prefs {
    Prefs {
        advertise_routes: ["10.9.0.0/16".parse().unwrap()].into(),
        accept_routes: true,
        accept_dns: true,
        ..Prefs::default()
    }
}

pub(super) fn network(peer: u8) -> Network {
    let (node_key, disco_key) = node(peer);
    let derp_map = r#"{"Regions":{"900":{"RegionID":900,"RegionCode":"nyc","Nodes":[
        {"Name":"900a","RegionID":900,"HostName":"198.51.100.1","IPv4":"198.51.100.1"}]}}}"#;
    Network {
        addresses: vec!["10.7.0.1/32".parse().unwrap()],
        fixed_home: Some(900),
        derp_map: serde_json::from_str(derp_map).unwrap(),
        peers: vec![Arc::new(NetworkPeer {
            name: "b.tail.test.".into(),
            node_key,
            disco_key: Some(disco_key.public()),
            home: Some(900),
            addresses: vec!["10.7.0.2/32".parse().unwrap()],
            allowed_ips: vec!["10.7.0.2/32".parse().unwrap()],
            endpoints: vec!["203.0.113.2:41641".parse().unwrap()],
            ..NetworkPeer::default()
        })],
        rules: Arc::new(Rules::AllowAll),
        ..Network::default()
    }
}

pub(super) fn outputs(agent: &mut Agent) -> Vec<Output> {
    std::iter::from_fn(|| agent.poll_output()).collect()
}

/// An agent that has taken this network, and what it wanted done for that.
fn taken(network: Network) -> (Instant, Agent, Vec<Output>) {
    let (now, mut agent) = (start(), agent(1, false));
    agent.handle_network(now, network);
    let out = outputs(&mut agent);
    (now, agent, out)
}

/// The one change of the network that the data plane is told.
fn change(out: &[Output]) -> Option<&NetworkChange> {
    let mut changes = out.iter().filter_map(|o| {
        let Output::ChangeNetwork(change) = o else {
            return None;
        };
        Some(change)
    });
    let change = changes.next();
    assert!(changes.next().is_none());
    change
}

/// How many addresses, peers and routes the host is given.
fn configured(out: &[Output]) -> Option<[usize; 3]> {
    out.iter().find_map(|o| {
        let Output::Configure(overlay) = o else {
            return None;
        };
        let [addresses, peers] = [&overlay.addresses, &overlay.peers].map(BTreeSet::len);
        Some([addresses, peers, overlay.routes.len()])
    })
}

#[test]
fn the_configuration_socket_shows_peers_and_what_they_are_allowed() {
    let (now, agent, _) = taken(network(2));
    let device = crate::uapi::DeviceStatus {
        listen_port: 41641,
        ..Default::default()
    };
    let reply = agent.configuration(now, &device, &|_| {
        let activity = Activity {
            tx_bytes: 5,
            ..Activity::default()
        };
        (activity, Some(Duration::new(7, 9)))
    });
    let text = std::str::from_utf8(reply.as_bytes()).unwrap();
    let peer = format!("public_key={}\n", node(2).0.to_hex());
    assert!(
        text.starts_with(&format!("listen_port=41641\n{peer}")),
        "{text}"
    );
    for line in [
        "last_handshake_time_sec=7",
        "last_handshake_time_nsec=9",
        "tx_bytes=5",
        "allowed_ip=10.7.0.2/32",
        "ringtail_name=b",
        "ringtail_relay=nyc",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in {text}");
    }
    assert!(
        !text.contains("\nendpoint="),
        "there is no direct path yet: {text}"
    );
    assert!(text.ends_with("errno=0\n\n"));
}

#[test]
fn a_network_reaches_relays_shards_and_interface_and_again_only_when_it_changed() {
    let (now, mut agent, out) = taken(network(2));
    let given = change(&out).unwrap();
    let (_, local) = given.rules.as_ref().unwrap();
    let local = local.as_ref().map(Vec::len);
    assert_eq!(
        (given.peers.len(), local),
        (1, Some(2)),
        "own address and the route we offer"
    );
    assert!(
        out.iter()
            .any(|o| matches!(o, Output::SetHome(RegionId(900))))
    );
    assert!(out.iter().any(|o| matches!(o, Output::SetDerpMap(_))));
    assert_eq!(configured(&out), Some([1, 1, 0]));
    agent.handle_network(now, network(2));
    assert!(outputs(&mut agent).is_empty());
}

/// What `ringtail status` says.
fn status(agent: &Agent, now: Instant) -> Value {
    let around = Surroundings {
        mtu: 1280,
        shards: 1,
        driver: "epoll",
        coordination: Some("http://10.0.0.1".into()),
        coordination_state: "connected".into(),
    };
    agent.status(now, &around, &|_| Activity::default())
}

/// A peer of a large network.
fn one_of_many(number: u32) -> Arc<NetworkPeer> {
    let mut key = [7; 32];
    key[..4].copy_from_slice(&number.to_le_bytes());
    let address = IpNet::from(IpAddr::V4((0x0a40_0000 + number).into()));
    Arc::new(NetworkPeer {
        name: format!("n{number}.tail.test."),
        node_key: NodePublic(key),
        home: Some(900),
        addresses: vec![address],
        allowed_ips: vec![address],
        endpoints: vec![SocketAddr::from(([203, 0, 113, 7], 41641))],
        ..NetworkPeer::default()
    })
}

#[test]
fn a_change_of_one_peer_among_thousands_is_told_of_that_peer_alone() {
    let many = |count, first: u32| Network {
        peers: (first..count).map(one_of_many).collect(),
        ..network(2)
    };
    let (now, mut agent, first) = taken(many(10_000, 0));
    assert_eq!(peers_given(&first), Some(10_000));
    // Everything is made anew, as a map that comes is.
    let mut told = |network: Network| {
        agent.handle_network(now, network);
        let out = outputs(&mut agent);
        let change = change(&out).cloned();
        let named = |o: &&Output| matches!(o, Output::Story("peer", _));
        let named = out.iter().filter(named).count();
        let paths = out.iter().filter(|o| matches!(o, Output::SetPath(..)));
        (change, named, paths.count())
    };
    // Who is online, or where, is no matter of the data plane's.
    let mut network = many(10_000, 0);
    Arc::make_mut(&mut network.peers[3]).online = Some(false);
    assert!(matches!(told(network), (None, 1, 0)));
    let mut network = many(10_000, 0);
    Arc::make_mut(&mut network.peers[5_000]).home = Some(901);
    assert!(
        matches!(told(network), (None, 2, 1)),
        "and the first is online again"
    );
    let (change, named, paths) = told(many(10_001, 0));
    let change = change.unwrap();
    assert_eq!((change.peers.len(), change.gone.len()), (1, 0));
    assert!(change.reserved.is_none() && change.rules.is_none());
    assert_eq!((named, paths), (2, 2));
    let (change, named, paths) = told(many(10_001, 1));
    let change = change.unwrap();
    assert_eq!(
        (change.peers.len(), &change.gone[..]),
        (0, &[PeerId(0)][..])
    );
    assert_eq!((named, paths), (0, 0));
}

fn peers_given(out: &[Output]) -> Option<usize> {
    change(out).map(|change| change.peers.len())
}

const NOON: OffsetDateTime = time::macros::datetime!(2026-11-29 12:00 UTC);

#[test]
fn a_peers_key_expires_by_the_wall_clock_with_nobody_to_tell_us() {
    let (now, mut agent) = (start(), agent(1, false));
    let hour = Duration::from_secs(3600);
    let mut cached = network(2);
    Arc::make_mut(&mut cached.peers[0]).key_expiry = Some(WireTime(NOON + hour));
    agent.handle_wall_clock(now, NOON);
    agent.handle_network(now, cached.clone());
    assert_eq!(peers_given(&outputs(&mut agent)), Some(1));
    // The timer is the expiry's; what the agent is woken for before it changes nothing.
    assert!(agent.poll_timeout().unwrap() <= now + hour);
    agent.handle_wall_clock(now + hour / 2, NOON + hour / 2);
    assert_eq!(peers_given(&outputs(&mut agent)), None);
    agent.handle_wall_clock(now + hour, NOON + hour);
    let out = outputs(&mut agent);
    assert_eq!(peers_given(&out), Some(0));
    let held = |o: &Output| matches!(o, Output::Story("held_back", what) if what["peer"] == "b");
    assert!(out.iter().any(held));
    let shown = &status(&agent, now + hour)["peers"][0];
    assert_eq!(shown["name"], "b");
    assert_eq!(shown["expired"], true);
    assert_eq!(shown["key_expiry"], "2026-11-29T13:00:00Z");
    agent.handle_ping(now + hour, 1, "b");
    let why = |o: &Output| matches!(o, Output::Answer(1, answer) if answer["error"] == "b is held back: its key has expired");
    assert!(outputs(&mut agent).iter().any(why));
    // Told once.
    agent.handle_wall_clock(now + 2 * hour, NOON + 2 * hour);
    assert!(outputs(&mut agent).is_empty());
    // A clock that was wrong is put right.
    agent.handle_wall_clock(now + 2 * hour, NOON);
    assert_eq!(peers_given(&outputs(&mut agent)), Some(1));
    // A cached map is judged at once.
    let mut restarted = self::agent(1, false);
    restarted.handle_wall_clock(now, NOON + 2 * hour);
    restarted.handle_network(now, cached);
    assert_eq!(peers_given(&outputs(&mut restarted)), Some(0));
}

#[test]
fn a_wall_clock_that_is_set_makes_no_key_of_coordinations_map_expire() {
    let (now, hour) = (start(), Duration::from_secs(3600));
    for (right, wrong) in [(NOON, NOON - 2000 * hour), (NOON - 2000 * hour, NOON)] {
        let mut agent = agent(1, false);
        // Our clock is 2000 hours off, and the map says when the keys expire by it.
        let mut told = network(2);
        Arc::make_mut(&mut told.peers[0]).key_expiry = Some(WireTime(wrong + hour));
        told.own.key_expiry = Some(WireTime(wrong + 2 * hour));
        agent.handle_wall_clock(now, wrong);
        agent.handle_map(now, told);
        outputs(&mut agent);
        let minute = hour / 60;
        agent.handle_wall_clock(now + minute, right + minute);
        let out = outputs(&mut agent);
        let held = |o: &Output| matches!(o, Output::Story("held_back" | "expired", _));
        assert!(!out.iter().any(held), "{right}");
        assert_ne!(peers_given(&out), Some(0));
        assert!(out.iter().any(|o| matches!(o, Output::AskForMap)));
        let shown = status(&agent, now + minute);
        assert_eq!(shown["peers"][0]["expired"], false);
        let due = standing::text(Some(WireTime(right + hour))).unwrap();
        assert_eq!(shown["peers"][0]["key_expiry"], due.as_str());
        // They expire when they should, and a clock that goes on as it is asks for nothing.
        agent.handle_wall_clock(now + hour, right + hour);
        let out = outputs(&mut agent);
        assert_eq!(peers_given(&out), Some(0));
        assert!(!out.iter().any(|o| matches!(o, Output::AskForMap)));
        agent.handle_wall_clock(now + 2 * hour, right + 2 * hour);
        let expired = |o: &Output| matches!(o, Output::Story("expired", _));
        assert!(outputs(&mut agent).iter().any(expired));
    }
}

#[test]
fn whoever_may_not_take_part_is_held_back_with_the_reason() {
    let wire_node = |id: u8| wire::Node {
        id: id.into(),
        key: node(id).0,
        home_derp: 900,
        ..wire::Node::default()
    };
    let peers = [
        wire_node(2),
        wire::Node {
            expired: true,
            ..wire_node(3)
        },
        wire::Node {
            is_jailed: true,
            ..wire_node(4)
        },
        wire::Node {
            home_derp: 0,
            ..wire_node(5)
        },
        wire::Node {
            unsigned_peer_api_only: true,
            ..wire_node(6)
        },
    ];
    // Neither is authorised, as Headscale says of a node whose key has expired, too.
    for (expired, unapproved) in [(true, false), (false, true)] {
        let own = wire::Node {
            expired,
            ..wire_node(1)
        };
        let message = wire::MapResponse {
            node: Some(Arc::new(own)),
            peers: Some(peers.iter().cloned().map(Arc::new).collect()),
            ..wire::MapResponse::default()
        };
        let mut map = MapState::new(node(1).0);
        map.handle_response(NOON, message).unwrap();
        let network = Network::from(&map.snapshot(NOON, &[]).unwrap());
        let own = (network.own.expired, network.own.unapproved);
        assert_eq!(own, (expired, unapproved));
        let taking_part: Vec<NodePublic> = network.peers.iter().map(|p| p.node_key).collect();
        assert_eq!(taking_part, [node(2).0]);
        let mut why: Vec<_> = network
            .held_back
            .iter()
            .map(|held| (held.node_key, held.why))
            .collect();
        why.sort_by_key(|(_, why)| why.name());
        let expected = [
            (node(3).0, HoldReason::Expired),
            (node(4).0, HoldReason::Jailed),
            (node(6).0, HoldReason::NoAccess),
            (node(5).0, HoldReason::Unreachable),
        ];
        assert_eq!(why, expected);
    }
}

#[test]
fn our_own_expiry_is_noticed_by_our_own_clock_and_told_once() {
    let (now, mut agent) = (start(), agent(1, false));
    let minute = Duration::from_secs(60);
    let mut told = network(2);
    told.own.key_expiry = Some(WireTime(NOON + minute));
    told.own.health = vec!["the disk is full".into()];
    agent.handle_wall_clock(now, NOON);
    agent.handle_network(now, told.clone());
    outputs(&mut agent);
    let before = status(&agent, now);
    assert_eq!(before["expired"], false);
    assert_eq!(before["key_expiry"], "2026-11-29T12:01:00Z");
    assert_eq!(before["health"], json!(["the disk is full"]));
    assert_eq!(before["coordination"]["state"], "connected");
    agent.handle_wall_clock(now + minute, NOON + minute);
    let expired = |o: &Output| matches!(o, Output::Story("expired", _));
    assert!(outputs(&mut agent).iter().any(expired));
    let after = status(&agent, now + minute);
    assert_eq!(after["expired"], true);
    let health = after["health"][0].as_str().unwrap();
    assert!(health.contains("2026-11-29T12:01:00Z") && health.contains("--auth-key-file"));
    let state = after["coordination"]["state"].as_str().unwrap();
    assert!(state.contains("expired"), "{state}");
    agent.handle_wall_clock(now + 2 * minute, NOON + 2 * minute);
    assert!(outputs(&mut agent).is_empty());
    // An administrator has extended it.
    told.own.key_expiry = Some(WireTime(NOON + 9 * minute));
    agent.handle_network(now + 2 * minute, told);
    assert_eq!(status(&agent, now)["expired"], false);
}

#[test]
fn exit_routes_and_what_is_not_the_peers_reach_neither_shards_nor_interface() {
    let mut told = network(2);
    let offers = ["10.7.0.2/32", "10.7.0.0/16", "0.0.0.0/0", "10.7.0.1/32"];
    Arc::make_mut(&mut told.peers[0]).allowed_ips =
        offers.map(|text| text.parse().unwrap()).to_vec();
    told.held_back = vec![HeldBack {
        name: "gone.tail.test.".into(),
        addresses: vec!["10.7.0.3/32".parse().unwrap()],
        ..HeldBack::default()
    }];
    let (_, _, out) = taken(told);
    let text = |prefixes: &[Prefix]| -> Vec<String> {
        let text = |prefix: &Prefix| format!("{}/{}", prefix.addr, prefix.bits);
        prefixes.iter().map(text).collect()
    };
    let given = change(&out).unwrap();
    let theirs = text(&given.peers[0].allowed_ips);
    assert_eq!(theirs, ["10.7.0.2/32", "10.7.0.0/16"]);
    assert_eq!(
        text(given.reserved.as_ref().unwrap()),
        ["10.7.0.1/32", "10.7.0.3/32"]
    );
    assert!(matches!(configured(&out), Some([_, 1, 1])));
}

#[test]
fn a_kick_pings_the_peer_directly_but_not_in_relay_only_mode() {
    for relay_only in [false, true] {
        let (now, mut agent) = (start(), agent(1, relay_only));
        agent.handle_network(now, network(2));
        outputs(&mut agent);
        agent.handle_dataplane(now, &Event::Kick(PeerId(0)), &Activity::default());
        let to: SocketAddr = "203.0.113.2:41641".parse().unwrap();
        let out = outputs(&mut agent);
        let is_there = |o: &Output| matches!(o, Output::Datagram { to: t, .. } if *t == to);
        assert_eq!(out.iter().any(is_there), !relay_only);
        let decided = |o: &Output| matches!(o, Output::SetPath(_, to) if to.udp.is_some());
        assert!(!out.iter().any(decided), "nothing has answered yet");
    }
}

#[test]
fn strangers_are_counted_wherever_they_come_from() {
    let (now, mut agent, _) = taken(network(2));
    let stranger = node(9).0;
    assert_eq!(
        agent.handle_relayed_data(now, RegionId(900), stranger, 3),
        None
    );
    assert!(
        agent
            .handle_relayed_data(now, RegionId(900), node(2).0, 1)
            .is_some()
    );
    agent.handle_datagram(now, now, "203.0.113.9:1".parse().unwrap(), None, b"junk");
    let mut disco = ringtail_dataplane::DISCO_MAGIC.to_vec();
    disco.resize(120, 7);
    agent.handle_datagram(now, now, "203.0.113.9:1".parse().unwrap(), None, &disco);
    let status = status(&agent, now);
    assert_eq!(status["drops"]["relay_unknown_source"], 3);
    assert_eq!(status["drops"]["discovery_junk"], 1);
    let unknown = status["drops"].as_object().unwrap().iter();
    let unknown = unknown.filter(|(name, count)| name.starts_with("disco_") && **count == 1);
    assert_eq!(unknown.count(), 1, "{status:#}");
    assert_eq!(status["peers"][0]["name"], "b");
    assert_eq!(status["home"]["region"], "nyc");
}

#[test]
fn a_ping_ends_with_one_answer_also_for_nobody_and_for_silence() {
    let (now, mut agent, _) = taken(network(2));
    agent.handle_ping(now, 7, "nobody");
    let out = outputs(&mut agent);
    assert!(
        matches!(&out[0], Output::Answer(7, a) if a["error"].as_str().unwrap().contains("nobody"))
    );
    assert!(matches!(out[1], Output::AnswerEnd(7)));

    agent.handle_ping(now, 8, "b");
    let (mut at, mut answers) = (now, Vec::new());
    while answers.is_empty() && at < now + Duration::from_secs(20) {
        at = agent.poll_timeout().unwrap().max(at);
        agent.handle_timeout(at, &|_| Activity::default());
        answers = outputs(&mut agent);
        answers.retain(|o| matches!(o, Output::Answer(..) | Output::AnswerEnd(_)));
    }
    assert!(
        matches!(&answers[..], [Output::Answer(8, a), Output::AnswerEnd(8)] if a["reason"].is_string())
    );
}

#[test]
fn a_ping_through_the_tunnel_goes_where_the_peer_is_inside() {
    let mut given = network(2);
    given
        .addresses
        .push("fd7a:115c:a1e0::1/128".parse().unwrap());
    let peer = Arc::make_mut(&mut given.peers[0]);
    peer.addresses
        .push("fd7a:115c:a1e0::2/128".parse().unwrap());
    peer.allowed_ips.clone_from(&peer.addresses);
    peer.peerapi = [None, Some(4002)];
    let (now, mut agent, _) = taken(given.clone());
    let inside = |agent: &Agent, peer: &str| {
        let found = agent.inside(peer)?;
        Ok((
            found.ours.to_string(),
            found.theirs.to_string(),
            found.peerapi,
        ))
    };
    let at = |ours: &str, theirs: &str, port| Ok::<_, String>((ours.into(), theirs.into(), port));
    let by_v6 = at("fd7a:115c:a1e0::1", "fd7a:115c:a1e0::2", Some(4002));
    assert_eq!(inside(&agent, "b"), by_v6, "there is its peer API");
    assert_eq!(inside(&agent, "fd7a:115c:a1e0::2"), by_v6);
    assert_eq!(inside(&agent, "10.7.0.2"), at("10.7.0.1", "10.7.0.2", None));
    assert!(inside(&agent, "c").unwrap_err().contains("c"));
    // What this node has no address of, and what is not routed to the peer, is not where it is.
    given.addresses.pop();
    agent.handle_network(now, given.clone());
    assert_eq!(inside(&agent, "b"), at("10.7.0.1", "10.7.0.2", None));
    Arc::make_mut(&mut given.peers[0]).allowed_ips.remove(0);
    agent.handle_network(now, given);
    assert!(inside(&agent, "b").unwrap_err().contains("no address"));
}

#[test]
fn the_network_survives_the_cache_unchanged() {
    let before = network(2);
    let text = serde_json::to_string(&before).unwrap();
    assert_eq!(serde_json::from_str::<Network>(&text).unwrap(), before);
}

/// Whom the agent wants shaken hands with.
fn initiated(out: &[Output]) -> Vec<PeerId> {
    let initiated = out.iter().filter_map(|output| {
        let Output::Initiate(id) = output else {
            return None;
        };
        Some(*id)
    });
    initiated.collect()
}

#[test]
fn peers_of_the_run_before_are_greeted_once_they_are_known() {
    let (now, mut agent) = (start(), agent(1, false));
    let silent = |_| Activity::default();
    agent.remember_sessions(now, vec![node(3).0, node(2).0]);
    assert_ne!(agent.poll_timeout(), Some(now));
    agent.handle_network(now, network(2));
    assert_eq!(agent.poll_timeout(), Some(now));
    agent.handle_timeout(now, &silent);
    assert_eq!(initiated(&outputs(&mut agent)), [PeerId(0)]);
    agent.handle_timeout(now, &silent);
    assert_eq!(initiated(&outputs(&mut agent)), []);
    // Nobody was heard yet: the next run tries them again.
    assert_eq!(agent.sessions(now, &silent), [node(3).0, node(2).0]);
}

#[test]
fn a_peer_with_another_disco_key_that_was_heard_lately_is_greeted() {
    let (now, mut agent) = (start(), agent(1, false));
    let heard = |_| Activity {
        last_received: Some(now),
        ..Activity::default()
    };
    let mut told = network(2);
    agent.handle_network(now, told.clone());
    for (secs, key, greeted) in [(1, 2, 0), (2, 9, 1), (3, 9, 0)] {
        let now = now + Duration::from_secs(secs);
        Arc::make_mut(&mut told.peers[0]).disco_key = Some(node(key).1.public());
        Arc::make_mut(&mut told.peers[0]).online = Some(secs % 2 == 0);
        agent.handle_network(now, told.clone());
        agent.handle_timeout(now, &heard);
        let initiated = initiated(&outputs(&mut agent));
        assert_eq!(initiated.len(), greeted, "{secs}: {initiated:?}");
    }
}

#[test]
fn after_a_sleep_those_heard_shortly_before_it_are_greeted() {
    let (now, mut agent, _) = taken(network(2));
    let slept = Duration::from_secs(7200);
    let woken = now + slept + Duration::from_secs(300);
    for (heard_secs, greeted) in [(100, 0), (290, 1)] {
        let heard = move |_| Activity {
            last_received: Some(now + Duration::from_secs(heard_secs)),
            ..Activity::default()
        };
        agent.handle_resume(woken, slept, &heard);
        agent.handle_timeout(woken, &heard);
        let out = outputs(&mut agent);
        assert_eq!(initiated(&out).len(), greeted, "heard at {heard_secs} s");
        assert!(out.iter().any(|o| matches!(o, Output::ListInterfaces)));
    }
}

#[test]
fn what_cannot_be_opened_is_told_of_a_peer_only_from_where_it_is_known_to_be() {
    let (now, mut agent, _) = taken(network(2));
    for (from, known) in [("203.0.113.2:41641", true), ("203.0.113.2:41642", false)] {
        let event = Event::Unopened(from.parse().unwrap(), 200);
        agent.handle_dataplane(now, &event, &Activity::default());
        let out = outputs(&mut agent);
        let told = |o: &Output| matches!(o, Output::Unopened(PeerId(0), 200));
        assert_eq!(out.iter().any(told), known, "{from}");
        assert_eq!(
            out.len(),
            usize::from(known),
            "and nothing is sent: {out:?}"
        );
    }
}

/// The DISCO Ping number `n` of the node with this seed to the one with seed 1.
fn disco_ping(seed: u8, n: u8) -> Vec<u8> {
    let (node_key, private) = node(seed);
    let ping = disco::Message::Ping {
        tx_id: [n; 12],
        node_key: Some(node_key),
        padding: 0,
    };
    disco::SharedKey::new(&private, &node(1).1.public())
        .unwrap()
        .seal(&private.public(), [n; 24], &ping)
}

#[test]
fn what_others_route_hides_no_address_of_a_peer() {
    for routes in [
        &["0.0.0.0/0", "::/0"][..],
        &["203.0.0.0/8"],
        &["203.0.113.2/32"],
    ] {
        let mut network = network(2);
        network.peers.push(Arc::new(NetworkPeer {
            name: "exit.tail.test.".into(),
            node_key: node(3).0,
            allowed_ips: routes.iter().map(|net| net.parse().unwrap()).collect(),
            ..NetworkPeer::default()
        }));
        let (now, mut agent, _) = taken(network);
        agent.handle_dataplane(now, &Event::Kick(PeerId(0)), &Activity::default());
        let to: SocketAddr = "203.0.113.2:41641".parse().unwrap();
        assert!(!sent(&mut agent, to).is_empty(), "{routes:?}");
        agent.handle_datagram(now, now, to, None, &disco_ping(2, 1));
        assert!(!sent(&mut agent, to).is_empty(), "{routes:?}: a Pong");
        // A node's own address inside the tunnel is no address outside of it.
        let inner = "10.7.0.2:41641".parse().unwrap();
        agent.handle_datagram(now, now, inner, None, &disco_ping(2, 2));
        let bad: u64 = agent
            .paths
            .drops()
            .filter(|(name, _)| name.contains("bad_source"))
            .map(|(_, n)| n)
            .sum();
        assert_eq!((sent(&mut agent, to).len(), bad), (0, 1));
    }
}

/// What the agent sends to `to`, with the address it is to leave from.
fn sent(agent: &mut Agent, to: SocketAddr) -> Vec<Option<IpAddr>> {
    let outputs = outputs(agent).into_iter();
    let datagrams = outputs.filter_map(|output| {
        let Output::Datagram { to: t, local, .. } = output else {
            return None;
        };
        (t == to).then_some(local)
    });
    datagrams.collect()
}

#[test]
fn a_peer_is_answered_from_the_address_it_came_to_and_asked_from_there() {
    let (now, mut agent, _) = taken(network(2));
    let peer: SocketAddr = "203.0.113.2:41641".parse().unwrap();
    let ping = |n| disco_ping(2, n);
    let [first, second] = ["198.51.100.2", "192.0.2.2"].map(|ip| ip.parse::<IpAddr>().unwrap());
    agent.handle_datagram(now, now, peer, Some(first), &ping(1));
    let answers = sent(&mut agent, peer);
    assert_eq!(answers, [Some(first); 2], "a Pong and a Ping");
    // Another uplink: its Ping is answered by it, and later Pings leave there too.
    let later = now + Duration::from_secs(1);
    agent.handle_datagram(later, later, peer, Some(second), &ping(2));
    assert!(
        sent(&mut agent, peer)
            .iter()
            .all(|local| *local == Some(second))
    );
    agent.handle_timeout(later + Duration::from_secs(1), &|_| Activity::default());
    let quick = sent(&mut agent, peer);
    assert!(!quick.is_empty() && quick.iter().all(|local| *local == Some(second)));
    // Without that address routing chooses again.
    let eth = crate::netcheck::Interface {
        name: "eth0".into(),
        addrs: vec![first],
    };
    agent.handle_interfaces(later, &[eth], true);
    outputs(&mut agent);
    agent.handle_datagram(later, later, peer, None, &ping(3));
    assert!(sent(&mut agent, peer).iter().all(Option::is_none));
}

#[test]
fn what_a_part_says_is_told_once_and_shown_until_it_says_something_else() {
    let mut agent = agent(1, false);
    outputs(&mut agent);
    agent.set_health("dns", vec!["no upstream answers".into()]);
    agent.set_health("dns", vec!["no upstream answers".into()]);
    assert_eq!(agent.health(start()), ["no upstream answers"]);
    agent.set_health("dns", Vec::new());
    assert!(agent.health(start()).is_empty());
    let told = outputs(&mut agent).into_iter();
    let told = told.filter(|output| matches!(output, Output::Story("health", _)));
    assert_eq!(told.count(), 2);
}

#[test]
fn routes_are_used_only_while_somebody_wants_them() {
    let mut told = network(2);
    Arc::make_mut(&mut told.peers[0]).allowed_ips.extend(
        ["10.20.0.0/16", "fd7a:115c:a1e0:b1a:0:7:a01:0/112"]
            .map(|net| net.parse::<IpNet>().unwrap()),
    );
    let (now, mut agent, out) = taken(told);
    assert_eq!(configured(&out), Some([1, 1, 2]));
    agent.handle_prefs(
        now,
        Prefs {
            accept_routes: false,
            ..prefs()
        },
    );
    let out = outputs(&mut agent);
    assert_eq!(configured(&out), Some([1, 1, 0]));
    let change = change(&out).unwrap();
    assert_eq!(change.peers.len(), 1);
    assert_eq!(change.peers[0].allowed_ips.len(), 1, "nor is it a source");
    let health = agent.health(now);
    assert_eq!(
        health,
        ["2 routes of other nodes are not used: --accept-routes takes them"]
    );
    agent.handle_prefs(now, prefs());
    assert_eq!(configured(&outputs(&mut agent)), Some([1, 1, 2]));
    assert_eq!(agent.health(now), [""; 0]);
}

#[test]
fn a_chosen_exit_node_is_the_way_out_or_there_is_none() {
    let exit_of = |out: &[Output]| {
        out.iter().rev().find_map(|o| {
            let Output::Configure(overlay) = o else {
                return None;
            };
            Some(overlay.exit.map(|exit| exit.takes))
        })
    };
    let (now, mut agent) = (start(), agent(1, false));
    let wants = Prefs {
        exit_node: Some("b".into()),
        ..prefs()
    };
    agent.handle_prefs(now, wants);
    assert_eq!(exit_of(&outputs(&mut agent)), Some(Some([false; 2])));
    let mut told = network(2);
    let all = ["0.0.0.0/0", "::/0"].map(|net| net.parse::<IpNet>().unwrap());
    Arc::make_mut(&mut told.peers[0]).allowed_ips.extend(all);
    agent.handle_network(now, told.clone());
    let out = outputs(&mut agent);
    assert_eq!(exit_of(&out), Some(Some([true; 2])));
    assert_eq!(configured(&out), Some([1, 1, 0]));
    assert_eq!(change(&out).unwrap().peers[0].allowed_ips.len(), 3);
    assert_eq!(agent.health(now), [""; 0]);
    Arc::make_mut(&mut told.peers[0]).online = Some(false);
    agent.handle_network(now, told.clone());
    assert!(agent.health(now)[0].starts_with("exit node b is offline"));
    assert_eq!(exit_of(&outputs(&mut agent)), None, "it may come back");
    told.peers.clear();
    agent.handle_network(now, told);
    assert!(agent.health(now)[0].contains("no such node"));
    assert_eq!(exit_of(&outputs(&mut agent)), Some(Some([false; 2])));
    agent.handle_prefs(now, prefs());
    assert_eq!(exit_of(&outputs(&mut agent)), Some(None));
    assert_eq!(agent.health(now), [""; 0]);
}

#[test]
fn what_this_node_cannot_serve_is_not_announced_and_probes_are_answered_for_the_rest() {
    let (now, mut agent) = (start(), agent(1, false));
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    let prefs = |routes: &[&str]| Prefs {
        advertise_exit_node: true,
        advertise_routes: routes.iter().map(|text| net(text)).collect(),
        ..prefs()
    };
    for (offered, lost, announced, routes_lost) in [
        (
            &["10.9.0.0/16"][..],
            &[][..],
            &["10.9.0.0/16", "0.0.0.0/0", "::/0"][..],
            false,
        ),
        (
            &["10.9.0.0/16"],
            &["10.9.0.0/16"],
            &["0.0.0.0/0", "::/0"],
            true,
        ),
        // A kernel that forwards no IPv6.
        (
            &["10.9.0.0/16", "fd07::/64"],
            &["fd07::/64", "::/0"],
            &["10.9.0.0/16", "0.0.0.0/0"],
            false,
        ),
        (&[], &["::/0"], &["0.0.0.0/0"], false),
    ] {
        agent.handle_prefs(now, prefs(offered));
        agent.handle_lost(lost.iter().map(|text| net(text)).collect());
        let report = agent.self_report();
        let announced: Vec<IpNet> = announced.iter().map(|text| net(text)).collect();
        assert_eq!(
            (report.routes, report.routes_lost),
            (announced, routes_lost)
        );
    }
}

#[test]
fn an_exit_node_lets_nobody_into_networks_of_its_own_but_those_that_it_offers() {
    let (now, mut agent) = (start(), agent(1, false));
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    agent.handle_prefs(
        now,
        Prefs {
            advertise_exit_node: true,
            advertise_routes: ["10.9.0.0/16", "203.0.113.0/25"].map(net).into(),
            ..prefs()
        },
    );
    assert_eq!(agent.self_report().routes.len(), 4);
    let subnets = ["203.0.113.201/24", "192.168.7.1/24"].map(net);
    agent.handle_subnets(now, subnets.into());
    let inside = |prefixes: &[Prefix], ip: &str| {
        let ip: IpAddr = ip.parse().unwrap();
        prefixes.iter().any(|p| IpNet::from(*p).contains(&ip))
    };
    agent.handle_network(now, network(2));
    let out = outputs(&mut agent);
    let (_, local) = change(&out).unwrap().rules.clone().unwrap();
    let local = local.unwrap();
    for (ip, right) in [
        ("8.8.8.8", true),
        ("2600::1", true),
        ("10.7.0.1", true),
        ("10.9.1.1", true),
        ("10.10.1.1", false),
        ("203.0.113.7", true),
        ("203.0.113.200", false),
        ("203.0.113.201", true),
        ("192.168.7.1", false),
        ("192.168.8.1", false),
        ("fd00::1", false),
    ] {
        assert_eq!(inside(&local, ip), right, "{ip}");
    }
    let overlay = |out: &[Output]| {
        let overlay = out.iter().find_map(|o| {
            let Output::Configure(overlay) = o else {
                return None;
            };
            Some(overlay.clone())
        });
        overlay.unwrap()
    };
    for (ip, right) in [
        ("8.8.8.8", false),
        ("10.10.1.1", true),
        ("192.168.7.1", true),
    ] {
        let (ip, shut): (IpAddr, _) = (ip.parse().unwrap(), overlay(&out).shut);
        assert_eq!(shut.iter().any(|net| net.contains(&ip)), right, "{ip}");
    }
    // What a routing daemon hands in is as open as what a person offers.
    let handed = net("10.10.0.0/16");
    agent.handle_handed(now, [handed].into());
    let out = outputs(&mut agent);
    let (_, local) = change(&out).unwrap().rules.clone().unwrap();
    assert!(inside(&local.unwrap(), "10.10.1.1"));
    assert!(overlay(&out).offered.contains(&handed));
}

#[test]
fn who_uses_an_exit_node_reaches_of_what_it_offers_what_is_approved() {
    let (now, mut agent) = (start(), agent(1, false));
    let lan: IpNet = "192.168.7.0/24".parse().unwrap();
    let exit = Prefs {
        advertise_exit_node: true,
        advertise_routes: [lan].into(),
        ..prefs()
    };
    agent.handle_prefs(now, exit.clone());
    let mut told = network(2);
    told.own.routes = Some(vec![]);
    let mut open = |told: &Network, prefs: &Prefs| {
        agent.handle_network(now, told.clone());
        agent.handle_prefs(now, prefs.clone());
        _ = outputs(&mut agent);
        let host = agent.overlay.as_ref().unwrap();
        let local = agent
            .local
            .iter()
            .any(|net| IpNet::from(*net).contains(&lan));
        assert_ne!(local, host.unapproved.contains(&lan));
        (local, agent.health(now))
    };
    let line = "192.168.7.0/24 is offered, not approved: who uses this exit node does not reach it";
    let shut = (false, vec![line.to_owned()]);
    assert_eq!(open(&told, &exit), shut);
    let router = Prefs {
        advertise_exit_node: false,
        ..exit.clone()
    };
    assert_eq!(
        open(&told, &router),
        (true, vec![]),
        "nobody has a route there"
    );
    assert_eq!(open(&told, &exit), shut);
    told.own.routes = Some(vec![lan]);
    assert_eq!(open(&told, &exit), (true, vec![]));
    // It was our turn, and is another's.
    told.own.routes = Some(vec![]);
    Arc::make_mut(&mut told.peers[0]).allowed_ips.push(lan);
    assert_eq!(open(&told, &exit), (true, vec![]));
    Arc::make_mut(&mut told.peers[0]).allowed_ips.pop();
    assert_eq!(open(&told, &exit), shut, "approved no more");
}

#[test]
fn behind_shields_no_rule_counts_and_the_map_keeps_them_for_later() {
    let (now, mut agent, out) = taken(network(2));
    let rules = |out: &[Output]| Some(change(out)?.rules.clone()?.0);
    assert_eq!(rules(&out), Some(Rules::AllowAll));
    let up = Prefs {
        shields_up: true,
        ..prefs()
    };
    agent.handle_prefs(now, up);
    let out = outputs(&mut agent);
    assert_eq!(rules(&out), Some(Rules::default()));
    assert!(agent.self_report().shields_up);
    // A map with other rules changes nothing for who would get in.
    let mut other = network(2);
    other.rules = Arc::new(Rules::List(vec![Rule {
        sources: vec![],
        destinations: vec![],
        protocols: vec![6],
    }]));
    agent.handle_network(now, other.clone());
    let out = outputs(&mut agent);
    assert!(rules(&out).is_none_or(|rules| rules == Rules::default()));
    agent.handle_prefs(now, prefs());
    assert_eq!(rules(&outputs(&mut agent)), Some((*other.rules).clone()));
    assert!(!agent.self_report().shields_up);
}
