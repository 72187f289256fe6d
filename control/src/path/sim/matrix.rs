//! Every pair of NATs, in both starting orders and with 0, 20 and 200 ms between the starts.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::Value;

use super::net::{Filtering, INTERNET, Mapping, Middlebox, Zone};
use super::script::ms;
use super::world::{MS, PORT, SECOND, World};
use crate::path::{Config, StateName};

const KINDS: [&str; 12] = [
    "public",
    "public_fw",
    "fullcone",
    "adf",
    "easy",
    "adm",
    "hard",
    "one2one",
    "easy_fw",
    "easy_pm",
    "hard_pm",
    "udp_blocked",
];

/// Where a node stands: its zone, addresses and configured endpoints.
pub(super) type Place = (Zone, Vec<IpAddr>, Vec<SocketAddr>);

/// A site of the lab, 1 or 2, with its boxes.
pub(super) fn site(kind: &str, index: u8) -> (Vec<Middlebox>, Place) {
    let wan = IpAddr::from([203, 0, 113, 10 + index]);
    let host = IpAddr::from([192, 168, index, 2]);
    let (lan, behind): (Zone, Zone) = (usize::from(index) * 10, usize::from(index) * 10 + 1);
    let nat = |mapping, filtering| Middlebox::new(mapping, filtering, INTERNET, vec![lan], wan);
    let firewall = |outside, ip| {
        let inside = vec![behind];
        Middlebox::new(Mapping::None, Filtering::Apdf, outside, inside, ip)
    };
    let plain = |nat| (vec![nat], (lan, vec![host], vec![]));
    let forwarded = |mut nat: Middlebox| {
        let inner = SocketAddr::new(host, PORT);
        nat.forwards.insert(50001, (lan, inner));
        (
            vec![nat],
            (lan, vec![host], vec![SocketAddr::new(wan, 50001)]),
        )
    };
    match kind {
        "public" => (vec![], (INTERNET, vec![wan], vec![])),
        "public_fw" => (vec![firewall(INTERNET, wan)], (behind, vec![wan], vec![])),
        "fullcone" => plain(nat(Mapping::Eim, Filtering::Eif)),
        "adf" => plain(nat(Mapping::Eim, Filtering::Adf)),
        "easy" => plain(nat(Mapping::Eim, Filtering::Apdf)),
        "adm" => plain(nat(Mapping::Adm, Filtering::Apdf)),
        "hard" => plain(nat(Mapping::Apdm, Filtering::Apdf)),
        "one2one" => {
            let mut nat = nat(Mapping::OneToOne, Filtering::Eif);
            nat.forwards.insert(0, (lan, SocketAddr::new(host, PORT)));
            plain(nat)
        }
        "easy_fw" => {
            let boxes = vec![nat(Mapping::Eim, Filtering::Apdf), firewall(lan, host)];
            (boxes, (behind, vec![host], vec![]))
        }
        "easy_pm" => forwarded(nat(Mapping::Eim, Filtering::Apdf)),
        "hard_pm" => forwarded(nat(Mapping::Apdm, Filtering::Apdf)),
        "udp_blocked" => plain(nat(Mapping::Eim, Filtering::Blocked)),
        other => panic!("no such site: {other}"),
    }
}

/// A world of two sites.
pub(super) fn pair(seed: u64, config: &Config, a: &str, b: &str) -> World {
    let ((mut boxes, place_a), (more, place_b)) = (site(a, 1), site(b, 2));
    boxes.extend(more);
    World::new(seed, config, boxes, [place_a, place_b])
}

fn verdicts() -> BTreeMap<(String, String), bool> {
    let rows: Vec<Value> =
        serde_json::from_str(include_str!("../../../tests/vectors/nat-truth-table.json")).unwrap();
    let mut verdicts = BTreeMap::new();
    for row in rows {
        let side = |name: &str| row[name].as_str().unwrap_or_default().to_owned();
        let known = |name: &str| KINDS.contains(&name);
        let (a, b) = (side("a"), side("b"));
        if known(&a) && known(&b) {
            verdicts.insert((a, b), row["expect"] == "direct");
        }
    }
    verdicts
}

/// Time from the first data to both being direct.
fn run_pair(
    seed: u64,
    a: &str,
    b: &str,
    first: usize,
    between: Duration,
    direct: bool,
) -> Duration {
    let name = format!("{a} and {b}, {first} starts, the other {between:?} later, seed {seed}");
    let mut world = pair(seed, &Config::default(), a, b);
    let began = world.now;
    world.ping_from(first, Duration::ZERO, 50 * MS);
    world.ping_from(1 - first, between, 50 * MS);
    let took = world.run_until(15 * SECOND, World::both_direct);
    if direct {
        assert!(took.is_some(), "not direct: {name}");
        world.run(began + 15 * SECOND - world.now);
        assert!(world.both_direct(), "did not stay direct: {name}");
    } else {
        assert_eq!(took, None, "direct: {name}");
        for node in [0, 1] {
            let state = world.state(node);
            let relayed = [StateName::Relay, StateName::Probing, StateName::Held];
            assert!(relayed.contains(&state), "{state:?}: {name}");
        }
    }
    let end = world.end_pings();
    for node in [0, 1] {
        assert_eq!(world.lost(node, began..end), 0, "lost: {name}");
    }
    took.unwrap_or_default()
}

#[test]
fn every_pair_of_nats_ends_as_the_truth_table_says_and_soon() {
    let verdicts = verdicts();
    assert_eq!(verdicts.len(), KINDS.len() * (KINDS.len() + 1) / 2);
    let mut slowest = (Duration::ZERO, String::new());
    for ((a, b), direct) in &verdicts {
        for (first, between) in [(0, 0), (0, 20), (1, 20), (0, 200), (1, 200)] {
            let took = run_pair(between, a, b, first, ms(between), *direct);
            // From the moment both have data to send, whoever was first.
            let name = format!("{a} and {b}, {first} first, {between} ms");
            assert!(took < 500 * MS, "{took:?}: {name}");
            slowest = slowest.max((took, name));
        }
    }
    println!("slowest: {slowest:?}");
}

#[test]
fn one_sided_data_makes_both_direct_in_half_a_second() {
    for (a, b) in [
        ("easy", "easy"),
        ("easy_fw", "adf"),
        ("public_fw", "easy"),
        ("hard", "adf"),
    ] {
        for first in [0, 1] {
            let mut world = pair(3, &Config::default(), a, b);
            world.ping_from(first, Duration::ZERO, 50 * MS);
            let took = world.run_until(SECOND, World::both_direct).unwrap();
            assert!(took < 500 * MS, "{a} and {b}, {first} pings: {took:?}");
        }
    }
}

#[test]
fn a_host_firewall_behind_a_port_mapping_keeps_a_hard_nat_on_the_relay() {
    for kind in ["easy_pm", "hard_pm"] {
        let (mut boxes, (lan, addrs, configured)) = site(kind, 1);
        let firewall = Middlebox::new(Mapping::None, Filtering::Apdf, lan, vec![19], addrs[0]);
        boxes.push(firewall);
        let (more, other) = site("hard", 2);
        boxes.extend(more);
        let places = [(19, addrs, configured), other];
        let mut world = World::new(1, &Config::default(), boxes, places);
        world.ping_from(0, Duration::ZERO, 50 * MS);
        assert_eq!(
            world.run_until(15 * SECOND, World::both_direct),
            None,
            "{kind}"
        );
    }
}

fn lan_pair(boxes: Vec<Middlebox>, zones: [Zone; 2], addrs: [[u8; 4]; 2]) -> World {
    let [a, b] = addrs.map(IpAddr::from);
    let places = [(zones[0], vec![a], vec![]), (zones[1], vec![b], vec![])];
    let mut world = World::new(1, &Config::default(), boxes, places);
    world.ping_from(0, Duration::ZERO, 50 * MS);
    world
}

#[test]
fn the_other_cases_of_the_page() {
    let wan = IpAddr::from([203, 0, 113, 20]);
    let home = |index: u8, outside, ip| {
        let lan = vec![usize::from(index) * 10];
        Middlebox::new(Mapping::Eim, Filtering::Apdf, outside, lan, ip)
    };
    let router = |inside, hairpin| {
        let filtering = if hairpin {
            Filtering::Eif
        } else {
            Filtering::Apdf
        };
        let mut router = Middlebox::new(Mapping::Eim, filtering, INTERNET, inside, wan);
        router.hairpin = hairpin;
        router
    };
    let direct = |world: &mut World| world.run_until(15 * SECOND, World::both_direct).is_some();

    let lan = [[192, 168, 5, 2], [192, 168, 5, 3]];
    let mut same_lan = lan_pair(vec![router(vec![10], false)], [10, 10], lan);
    assert!(direct(&mut same_lan), "same LAN");
    let blocked = Middlebox::new(Mapping::Eim, Filtering::Blocked, INTERNET, vec![10], wan);
    assert!(
        direct(&mut lan_pair(vec![blocked], [10, 10], lan)),
        "same LAN, WAN blocked"
    );

    let apart = [[192, 168, 5, 2], [192, 168, 6, 2]];
    for hairpin in [false, true] {
        let boxes = vec![router(vec![10, 20], hairpin)];
        let mut segments = lan_pair(boxes, [10, 20], apart);
        assert_eq!(direct(&mut segments), hairpin, "isolated segments");

        let isp = router(vec![30], hairpin);
        let homes = [1, 2].map(|n| home(n, 30, IpAddr::from([100, 64, 0, 10 + n])));
        let boxes = [vec![isp], homes.into()].concat();
        let mut cgnat = lan_pair(boxes, [10, 20], apart);
        assert_eq!(direct(&mut cgnat), hairpin, "one CGNAT");
    }

    for (isp, other, wanted) in [
        (Mapping::Eim, "easy", true),
        (Mapping::Eim, "hard", false),
        (Mapping::Apdm, "easy", false),
        (Mapping::Apdm, "public", true),
        (Mapping::Apdm, "adf", true),
    ] {
        let isp_box = Middlebox::new(isp, Filtering::Apdf, INTERNET, vec![30], wan);
        let home_box = home(1, 30, IpAddr::from([100, 64, 0, 11]));
        let (more, place) = site(other, 2);
        let boxes = [vec![isp_box, home_box], more].concat();
        let inner = (10, vec![IpAddr::from([192, 168, 1, 2])], vec![]);
        let mut world = World::new(1, &Config::default(), boxes, [inner, place]);
        world.ping_from(0, Duration::ZERO, 50 * MS);
        assert_eq!(
            direct(&mut world),
            wanted,
            "home behind {isp:?} CGNAT and {other}"
        );
    }
}

#[test]
fn ipv6_behind_firewalls_is_found_where_ipv4_is_impossible() {
    for kind in ["udp_blocked", "hard"] {
        let (mut boxes, places): (Vec<_>, Vec<_>) = [1u8, 2]
            .map(|index| {
                let (mut boxes, (lan, mut addrs, configured)) = site(kind, index);
                let v6 = IpAddr::from([0x2001, 0xdb8, u16::from(index), 0, 0, 0, 0, 2]);
                let inside = vec![lan];
                let wall = Middlebox::new(Mapping::None, Filtering::Apdf, INTERNET, inside, v6);
                boxes.push(wall);
                addrs.push(v6);
                (boxes, (lan, addrs, configured))
            })
            .into_iter()
            .unzip();
        let boxes = boxes.drain(..).flatten().collect();
        let mut world = World::new(1, &Config::default(), boxes, places.try_into().unwrap());
        world.ping_from(0, Duration::ZERO, 50 * MS);
        let took = world.run_until(SECOND, World::both_direct).unwrap();
        assert!(took < 500 * MS, "{took:?}");
        assert!(world.status(0).best.unwrap().addr.is_ipv6());
    }
}

#[test]
fn stun_blocked_and_udp_not_still_goes_direct_by_what_the_peer_sees() {
    // A knows its LAN address only, and so does C, but B, which is open, sees their mappings; what B
    // tells A is good for everybody, because A's mapping does not depend on the destination.
    let mut world = pair(5, &Config::default(), "easy", "public");
    world.weather.no_stun = true;
    world.run(400 * SECOND);
    world.introduce();
    let (lan, public) = (
        "192.168.1.2:41641".parse().unwrap(),
        "203.0.113.11:41641".parse().unwrap(),
    );
    assert_eq!(world.nodes[0].endpoints, [lan]);
    world.ping_from(1, Duration::ZERO, 50 * MS);
    let took = world.run_until(2 * SECOND, World::both_direct).unwrap();
    assert!(took < 500 * MS, "{took:?}");
    assert_eq!(world.nodes[0].endpoints, [public, lan]);
}
