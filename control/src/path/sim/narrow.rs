//! Paths that are too narrow for the tunnel's full packets, in both directions or in one.

use std::net::IpAddr;
use std::time::Duration;

use super::matrix::pair;
use super::net::INTERNET;
use super::script::{C1, Out, Script, addr, ms};
use super::shard::PEER;
use super::world::{MS, SECOND, World};
use crate::path::{Config, FailedTest, StateName};

/// A full packet of the tunnel: 1340 bytes on the wire.
const FULL: usize = 1312;

#[test]
fn a_path_that_takes_full_packets_in_fragments_is_used_and_shown_so() {
    let mut world = pair(21, &Config::default(), "easy", "easy");
    (world.weather.mtu, world.weather.fragments) = (1300, true);
    world.weather.data_len = FULL;
    let began = world.now;
    world.ping_from(0, Duration::ZERO, 50 * MS);
    let took = world.run_until(10 * SECOND, World::both_direct);
    assert!(took.is_some_and(|took| took <= SECOND), "{took:?}");
    world.run(10 * SECOND);
    for node in [0, 1] {
        let best = world.status(node).best.unwrap();
        assert_eq!((best.mtu, best.fragments), (Some(1280), true));
        assert_eq!(world.status(node).decision.path_mtu, 1280);
        assert_eq!(world.fails(node), []);
    }
    // It becomes wide: the search that repeats finds out, and narrow again.
    world.weather.mtu = 1500;
    world.run(620 * SECOND);
    let best = world.status(0).best.unwrap();
    assert_eq!((best.mtu, best.fragments), (Some(1500), false));
    world.weather.mtu = 1300;
    world.run(620 * SECOND);
    let best = world.status(0).best.unwrap();
    assert_eq!((best.mtu, best.fragments), (Some(1280), true));
    assert!(world.both_direct());
    let end = world.end_pings();
    assert_eq!(world.lost(0, began..end), 0);
}

#[test]
fn a_path_that_no_longer_carries_full_packets_at_all_is_left() {
    let mut world = pair(22, &Config::default(), "easy", "easy");
    world.ping_from(0, Duration::ZERO, 50 * MS);
    world.run(5 * SECOND);
    assert!(world.both_direct());
    world.weather.mtu = 1300;
    let left = world.run_until(620 * SECOND, |world| {
        world.state(0) != StateName::Direct && world.state(1) != StateName::Direct
    });
    assert!(left.is_some());
    assert_eq!(world.fails(0), [FailedTest::Mtu]);
}

#[test]
fn where_one_direction_is_narrow_nothing_is_sent_twice_after_ten_seconds() {
    for narrow in [0, 1] {
        for (a, b) in [("easy", "easy"), ("public", "hard")] {
            let mut world = pair(23, &Config::default(), a, b);
            world.weather.mtu = 1300;
            world.weather.narrow_from = [narrow == 0, narrow == 1];
            world.weather.data_len = FULL;
            let began = world.now;
            world.ping_from(0, Duration::ZERO, 20 * MS);
            world.run(10 * SECOND);
            let name = format!("{a} and {b}, {narrow}");
            assert_eq!(world.state(1 - narrow), StateName::Direct, "{name}");
            let before = world.sent_twice;
            world.run(120 * SECOND);
            let twice = [0, 1].map(|node: usize| world.sent_twice[node] - before[node]);
            // Of 6,000 each.
            assert!(twice.iter().all(|count| *count <= 60), "{twice:?}: {name}");
            // The wide direction dies: noticed all the same, though the peer is heard by relay.
            let died = world.now;
            world.weather.blocked = [true; 2];
            world.run(10 * SECOND);
            world.assert_gap(died, 2 * SECOND, &name);
            world.weather.blocked = [false; 2];
            world.run(10 * SECOND);
            assert_eq!(world.state(1 - narrow), StateName::Direct, "{name}");
            let end = world.end_pings();
            // What was on its way went with it.
            assert_eq!(world.lost(0, began..died - 100 * MS), 0, "{name}");
            assert_eq!(world.lost(0, died + 2 * SECOND..end), 0, "{name}");
        }
    }
}

#[test]
fn an_address_that_carries_packets_whole_goes_before_one_that_does_not() {
    // IPv6 is preferred, but a tunnel of 1300 bytes carries it here.
    let v6 = |n| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n]);
    let places = [1u8, 2].map(|n| {
        let addrs = vec![IpAddr::from([203, 0, 113, 10 + n]), v6(u16::from(n))];
        (INTERNET, addrs, vec![])
    });
    let mut world = World::new(24, &Config::default(), vec![], places);
    (world.weather.mtu, world.weather.fragments) = (1350, true);
    world.ping_from(0, Duration::ZERO, 50 * MS);
    world.run(70 * SECOND);
    for node in [0, 1] {
        let best = world.status(node).best.unwrap();
        assert!(best.addr.is_ipv4() && !best.fragments, "{best:?}");
    }
    // 1360 over IPv6 were needed; over IPv4 1340 are enough.
    assert_eq!(world.status(0).best.unwrap().mtu, Some(1340));
}

#[test]
fn what_the_device_refuses_is_taken_for_an_answer_at_once() {
    let large = |script: &Script| {
        let sent = script.out.iter();
        sent.filter(|(_, out)| matches!(out, Out::LargePing(..)))
            .count()
    };
    let mut script = Script::new(Config::default(), &[C1]);
    script.answer(C1, ms(10));
    script.data();
    script.run_to(ms(11));
    assert_eq!(large(&script), 1);
    // EMSGSIZE in place of the Pong to the large one.
    let mut refused = Script::new(Config::default(), &[C1]);
    refused.answer_some(C1, ms(10), |_, large| !large);
    refused.data();
    refused.run_to(ms(10));
    refused
        .paths
        .handle_too_big(refused.now, PEER, addr(C1), FULL);
    refused.answer(C1, ms(10));
    refused.run_to(ms(400));
    let sent = refused.sent(10, 11);
    assert!(sent.contains(&Out::SplitPing(addr(C1), FULL)), "{sent:?}");
    assert_eq!(refused.status().state, StateName::Direct);
    assert!(refused.status().best.unwrap().fragments);
    // A size that nothing on its way has is nobody's.
    refused
        .paths
        .handle_too_big(refused.now, PEER, addr(C1), 9999);
}
