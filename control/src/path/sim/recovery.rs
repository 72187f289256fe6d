//! Peers that were direct: what is lost for long comes back soon, and what answers already is used at
//! once.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::matrix::{pair, site};
use super::script::{C1, Out, Script, Z, addr, ms};
use super::shard::PEER;
use super::world::{MS, SECOND, World};
use crate::netcheck::Interface;
use crate::path::{CachedPath, Config, LinkChange, StateName, Validate};

/// Slow rounds are six seconds apart, and a validation takes some round trips.
const BACK_AFTER: Duration = Duration::from_millis(6500);

/// One that judges and retries as tailscaled does.
fn tailscale_like() -> Config {
    Config {
        validate: Validate::Fast,
        retry_limit: 0,
        ..Config::default()
    }
}

/// What was blocked at `began` is open: both are direct again within `limit`, and stay so. What was sent from two
/// seconds after `began` on, and until the end, has arrived.
pub(super) fn comes_back(world: &mut World, began: Instant, limit: Duration, name: &str) {
    let took = world.run_until(60 * SECOND, World::both_direct);
    assert!(
        took.is_some_and(|took| took <= limit),
        "back after {took:?}: {name}"
    );
    world.run(10 * SECOND);
    assert!(world.both_direct(), "stays direct: {name}");
    let end = world.end_pings();
    assert_eq!(world.lost(0, began + 2 * SECOND..end), 0, "{name}");
}

/// Direct, then down for so long with traffic, then open: when are both direct again?
fn down_for(world: &mut World, time: Duration, stun_too: bool, name: &str) {
    world.ping_from(0, Duration::ZERO, 200 * MS);
    let took = world.run_until(2 * SECOND, World::both_direct);
    assert!(took.is_some(), "direct at first: {name}");
    world.run(10 * SECOND);
    let began = world.now;
    world.weather.blocked = [true; 2];
    world.weather.no_stun = stun_too;
    world.run(time);
    assert!(!world.both_direct(), "noticed: {name}");
    world.weather.blocked = [false; 2];
    world.weather.no_stun = false;
    comes_back(world, began, BACK_AFTER, name);
}

#[test]
fn a_path_that_was_direct_is_direct_soon_after_it_opens_however_long_it_was_down() {
    for seconds in [70, 600, 3600] {
        for (a, b) in [("easy", "easy"), ("public", "hard"), ("adf", "easy_fw")] {
            for (seed, stun_too) in [(1, false), (2, true)] {
                for other in ["ringtail", "tailscale"] {
                    let name = format!("{seconds} s, {a} and {b}, {other}, STUN too {stun_too}");
                    let mut world = pair(seed, &Config::default(), a, b);
                    if other == "tailscale" {
                        world.restart(1, &tailscale_like());
                    }
                    down_for(&mut world, Duration::from_secs(seconds), stun_too, &name);
                }
            }
        }
    }
}

/// Direct to C1 at ten seconds, which does not answer from then until `end`, in milliseconds.
fn silent_until(end: u64) -> Script {
    let mut script = Script::new(Config::default(), &[C1]);
    script.answer(C1, ms(10));
    script.run_with_data(ms(10_000), ms(500));
    assert_eq!(script.status().state, StateName::Direct);
    script.silence(C1);
    script.run_with_data(ms(end), ms(500));
    script
}

#[test]
fn a_peer_that_only_answers_is_found_again_at_the_slow_pace() {
    for minutes in [3, 10, 60] {
        let end = 10_000 + minutes * 60_000;
        let mut script = silent_until(end);
        // A Ping every six seconds, a CallMeMaybe every thirty.
        let count = |wanted| script.count(end - 60_000, end, &wanted);
        let (pings, calls) = (count(Out::Ping(addr(C1))), count(Out::CallMeMaybe));
        assert!((9..=11).contains(&pings), "{pings}");
        assert!((1..=2).contains(&calls), "{calls}");
        script.answer(C1, ms(10));
        script.run_with_data(ms(end) + BACK_AFTER, ms(500));
        assert_eq!(script.status().state, StateName::Direct, "{minutes} min");
    }
}

#[test]
fn the_pace_is_quick_again_when_packets_come_or_after_a_long_pause() {
    let slow = || silent_until(120_200);
    let quick = |script: &Script, from: u64, at: &str| {
        script.count(from, from + 1000, &Out::Ping(addr(at))) >= 5
    };
    let mut heard = slow();
    heard.event(&ringtail_dataplane::Event::NewSource(PEER, addr(Z)));
    heard.run_to(ms(121_200));
    assert!(quick(&heard, 120_200, Z));
    let mut pinged = slow();
    pinged.receive_ping(Z);
    pinged.run_to(ms(121_200));
    assert!(quick(&pinged, 120_200, Z));
    let mut paused = slow();
    paused.run_to(ms(300_000));
    paused.data();
    paused.run_to(ms(301_000));
    assert!(quick(&paused, 300_000, C1));
}

#[test]
fn a_peer_remembered_as_direct_is_not_held_and_packets_wake_one_that_is() {
    let mut script = Script::new(Config::default(), &[C1]);
    let path = CachedPath {
        node_key: script.setup.node_key,
        addr: addr(C1),
        age: Duration::from_secs(60),
        rtt: ms(10),
        mtu: 1500,
    };
    script.paths.load_cached_paths(script.now, &[path]);
    script.run_with_data(ms(400_000), ms(500));
    assert_eq!(script.status().state, StateName::Probing);
    let mut held = Script::new(Config::default(), &[C1]);
    held.run_with_data(ms(60_000), ms(500));
    assert_eq!(held.status().state, StateName::Held);
    held.event(&ringtail_dataplane::Event::NewSource(PEER, addr(Z)));
    held.run_with_data(ms(75_000), ms(500));
    let calls = held.times(&Out::CallMeMaybe);
    assert!(
        calls.iter().filter(|at| **at >= 60_000).count() >= 2,
        "{calls:?}"
    );
}

/// A node at home or on the internet, and one with two addresses on the internet.
fn two_addresses(seed: u64, a: &str) -> World {
    let (boxes, place) = site(a, 1);
    let addrs: Vec<IpAddr> = vec![[203, 0, 113, 12].into(), [203, 0, 113, 13].into()];
    let places = [place, (super::net::INTERNET, addrs, vec![])];
    let mut world = World::new(seed, &Config::default(), boxes, places);
    world.ping_from(0, Duration::ZERO, 50 * MS);
    let took = world.run_until(2 * SECOND, World::both_direct);
    assert!(took.is_some(), "direct at first");
    world
}

/// Until both are direct by what works now.
fn both_moved(world: &mut World, name: &str) -> Duration {
    let there: Vec<IpAddr> = world.nodes[1].addrs.clone();
    let began = world.now;
    let took = world.run_until(30 * SECOND, |world| {
        let best = world.status(0).best;
        world.both_alive(began) && best.is_some_and(|best| there.contains(&best.addr.ip()))
    });
    took.unwrap_or_else(|| panic!("never: {name}"))
}

#[test]
fn when_the_best_address_dies_another_that_answers_takes_over_at_once() {
    for a in ["public", "easy", "adf", "hard"] {
        // Rounds are a minute apart: before, in and after one.
        for after in (0..14)
            .map(|n| 55_000 * MS + n * 700 * MS)
            .chain([3 * SECOND])
        {
            let mut world = two_addresses(3, a);
            world.run(after);
            world.nodes[1].addrs.remove(0);
            let began = world.now;
            let name = format!("{a}, after {after:?}");
            let took = both_moved(&mut world, &name);
            assert!(took <= 2 * SECOND, "{took:?}: {name}");
            world.assert_gap(began, 2 * SECOND, &name);
        }
    }
}

#[test]
fn a_new_address_costs_little_more_than_noticing_it() {
    for a in ["public", "easy", "hard"] {
        for (n, told) in [(0, true), (1, true), (2, false), (3, false)] {
            let mut world = two_addresses(n, a);
            world.run(55 * SECOND + MS * u32::try_from(n * 900).unwrap());
            // Its host notices the change, or does not.
            world.nodes[1].addrs = vec![[203, 0, 113, 14].into()];
            if told {
                let addrs = world.nodes[1].addrs.clone();
                let name = "eth0".into();
                let now = world.now;
                let node = &mut world.nodes[1];
                let eth = Interface { name, addrs };
                node.netcheck.set_interfaces(now, &[eth], "ringtail0", true);
                node.paths.handle_link_change(now, LinkChange::Major);
                world.pump(1);
            }
            let name = format!("{a}, told {told}");
            let took = both_moved(&mut world, &name);
            // Unnoticed, it takes a second of silence, a STUN request and a CallMeMaybe.
            let limit = if told { 1500 * MS } else { 2500 * MS };
            assert!(took <= limit, "{took:?}: {name}");
        }
    }
}

/// Here nobody tells a node of the other's new endpoints but the other itself: coordination is down.
#[test]
fn a_nat_that_gets_another_address_costs_little_more_than_noticing_it() {
    for (a, b) in [
        ("public", "easy"),
        ("easy", "easy"),
        ("adf", "easy"),
        ("hard", "fullcone"),
        ("public", "hard"),
    ] {
        for n in 0..4 {
            let mut world = pair(n, &Config::default(), a, b);
            world.ping_from(0, Duration::ZERO, 50 * MS);
            let took = world.run_until(2 * SECOND, World::both_direct);
            assert!(took.is_some(), "direct at first: {a} and {b}");
            world.run(55 * SECOND + MS * u32::try_from(n * 900).unwrap());
            let began = world.now;
            let nat = world.boxes.last_mut().unwrap();
            nat.move_to([203, 0, 113, 14].into());
            let name = format!("{a} and {b}, {n}");
            let took = world.run_until(30 * SECOND, |world| world.both_alive(began));
            let took = took.unwrap_or_else(|| panic!("never: {name}"));
            assert!(took <= 5 * SECOND, "{took:?}: {name}");
            world.assert_gap(began, 1500 * MS, &name);
        }
    }
}
