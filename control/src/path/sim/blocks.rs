//! Direct paths that die, come back, move or were never any good.

use std::time::Duration;

use super::matrix::pair;
use super::recovery::comes_back;
use super::world::{MS, SECOND, World};
use crate::path::{Config, FailedTest, StateName, Validate};

/// Two easy NATs, direct, A pinging 20 times a second.
fn direct(seed: u64) -> World {
    direct_between(seed, "easy", "easy")
}

fn direct_between(seed: u64, a: &str, b: &str) -> World {
    let mut world = pair(seed, &Config::default(), a, b);
    world.ping_from(0, Duration::ZERO, 50 * MS);
    let took = world.run_until(SECOND, World::both_direct);
    assert!(took.is_some(), "direct at first");
    world.run(10 * SECOND);
    assert!(world.both_direct(), "still direct");
    world
}

fn away_from_direct(world: &World, node: usize) -> bool {
    world.state(node) != StateName::Direct
}

/// Blocks, then opens; checks blackout, loss and return.
fn block_and_open(seed: u64, blocked: [bool; 2], for_how_long: Duration) {
    let name = format!("{blocked:?} for {for_how_long:?}, seed {seed}");
    let mut world = direct(seed);
    world.run(MS * u32::try_from(seed * 311 % 3000).unwrap());
    let began = world.now;
    world.weather.blocked = blocked;
    world.run(for_how_long);
    world.assert_gap(began, 2 * SECOND, &name);
    assert!(
        away_from_direct(&world, 0) || away_from_direct(&world, 1),
        "noticed: {name}"
    );
    // After the first two seconds nothing is lost, neither then nor on the way back.
    let opened = world.now;
    world.weather.blocked = [false; 2];
    comes_back(&mut world, began, 2 * SECOND, &name);
    assert!(world.longest_gap(0, opened) <= SECOND + 100 * MS, "{name}");
}

#[test]
fn a_silent_block_costs_two_seconds_at_most_and_the_way_back_nothing() {
    for seed in 1..=10 {
        for blocked in [[true, true], [true, false], [false, true]] {
            block_and_open(seed, blocked, 20 * SECOND);
        }
    }
}

#[test]
fn a_short_block_and_a_long_one_end_the_same_way() {
    for seconds in [2, 4, 7, 30, 35] {
        block_and_open(2, [true, true], Duration::from_secs(seconds));
    }
}

#[test]
fn a_one_way_stream_stays_on_one_path_and_leaves_it_when_it_dies() {
    let mut world = direct(4);
    world.weather.echo = false;
    world.run(3 * SECOND);
    let relayed = world.sent_relayed;
    let direct_before = world.sent_direct;
    world.run(30 * SECOND);
    let doubled = world.sent_relayed - relayed;
    let all = world.sent_direct - direct_before;
    assert!(doubled * 50 < all, "{doubled} of {all} went both ways");
    let began = world.now;
    world.weather.blocked = [true, true];
    world.run(10 * SECOND);
    world.assert_gap(began, 2 * SECOND, "it dies");
    world.weather.blocked = [false, false];
    let took = world.run_until(10 * SECOND, |world| world.state(0) == StateName::Direct);
    assert!(took.is_some_and(|took| took <= 2 * SECOND), "{took:?}");
}

#[test]
fn a_new_mapping_is_followed_in_seconds_whoever_gets_it() {
    for (a, b) in [
        ("easy", "easy"),
        ("fullcone", "easy"),
        ("easy", "public"),
        ("easy", "adf"),
    ] {
        for moved in [0, 1] {
            let mut world = direct_between(6, a, b);
            let Some(router) = world.boxes.get_mut(moved) else {
                continue;
            };
            router.rebind();
            let began = world.now;
            world.run(100 * MS);
            let took = world.run_until(10 * SECOND, |world| {
                let found = |node: usize| {
                    let best = world.status(node).best;
                    best.is_some_and(|best| best.last_pong < 100 * MS)
                };
                world.both_direct() && found(0) && found(1)
            });
            let name = format!("{a} and {b}, {moved} moved");
            world.assert_gap(began, 2 * SECOND, &name);
            let took = took.unwrap_or_else(|| panic!("{name}"));
            assert!(took <= 4 * SECOND, "{name}: {took:?}");
        }
    }
}

#[test]
fn an_idle_path_whose_mapping_died_comes_back_with_the_first_data() {
    let mut world = direct(7);
    world.stop_pings();
    world.run(150 * SECOND);
    assert!(away_from_direct(&world, 0) && away_from_direct(&world, 1));
    let began = world.now;
    world.ping_from(0, Duration::ZERO, 50 * MS);
    let took = world.run_until(5 * SECOND, World::both_direct).unwrap();
    assert!(took <= 500 * MS, "{took:?}");
    let end = world.end_pings();
    assert_eq!(world.lost(0, began..end), 0);
}

#[test]
fn a_path_that_carries_no_full_packet_is_never_used() {
    let mut world = pair(8, &Config::default(), "easy", "easy");
    world.weather.mtu = 1300;
    let began = world.now;
    world.ping_from(0, Duration::ZERO, 50 * MS);
    assert_eq!(world.run_until(60 * SECOND, World::both_direct), None);
    let tests = world.fails(0);
    assert!(
        !tests.is_empty() && tests.iter().all(|test| *test == FailedTest::Mtu),
        "{tests:?}"
    );
    let end = world.end_pings();
    assert_eq!(world.lost(0, began..end), 0);
}

#[test]
fn a_lossy_path_is_passed_over_and_taken_when_it_is_clean_again() {
    let mut world = pair(9, &Config::default(), "easy", "easy");
    world.weather.loss = 500;
    world.ping_from(0, Duration::ZERO, 50 * MS);
    for _ in 0..60 {
        world.run(SECOND);
        assert!(away_from_direct(&world, 0) && away_from_direct(&world, 1));
    }
    world.weather.loss = 0;
    let took = world.run_until(40 * SECOND, World::both_direct);
    assert!(took.is_some(), "after the block of thirty seconds");
}

#[test]
fn a_path_that_becomes_lossy_is_left_by_the_quality_alarm() {
    let mut world = direct(10);
    world.weather.loss = 450;
    let took = world.run_until(180 * SECOND, |world| {
        away_from_direct(world, 0) && away_from_direct(world, 1) && world.status(0).best.is_none()
    });
    assert!(took.is_some());
    world.run(5 * SECOND);
    let began = world.now;
    world.run(15 * SECOND);
    let end = world.end_pings();
    assert_eq!(world.lost(0, began..end), 0, "the relay is clean");
}

#[test]
fn without_a_relay_any_path_that_answers_is_used() {
    let mut world = pair(11, &Config::default(), "easy", "public");
    world.weather.loss = 300;
    for node in [0, 1] {
        world.nodes[node].setup.home = None;
    }
    world.introduce();
    world.ping_from(0, Duration::ZERO, 50 * MS);
    assert!(world.run_until(20 * SECOND, World::both_direct).is_some());
}

#[test]
fn larger_packets_are_found_in_the_background() {
    let config = Config {
        link_mtu: 9000,
        ..Config::default()
    };
    let mut world = pair(12, &config, "public", "public");
    world.weather.mtu = 9000;
    world.ping_from(0, Duration::ZERO, 50 * MS);
    world.run(SECOND);
    assert_eq!(world.status(0).best.unwrap().mtu, Some(9000));
    assert_eq!(world.status(0).decision.path_mtu, 9000);
    world.weather.mtu = 1480;
    world.run(620 * SECOND);
    assert_eq!(world.status(0).best.unwrap().mtu, Some(1400));
}

#[test]
fn fast_validation_is_direct_with_the_first_pong() {
    let config = Config {
        validate: Validate::Fast,
        ..Config::default()
    };
    let mut world = pair(13, &config, "easy", "easy");
    world.ping_from(0, Duration::ZERO, 50 * MS);
    let took = world.run_until(SECOND, World::both_direct).unwrap();
    assert!(took <= 100 * MS, "{took:?}");
}

#[test]
fn a_peer_that_vanishes_is_given_up_and_found_again() {
    let mut world = direct(14);
    world.nodes[1].switched_off = true;
    world.run(20 * SECOND);
    assert!(world.status(0).best.is_none());
    assert_eq!(world.state(0), StateName::Probing);
    world.run(60 * SECOND);
    // It was direct: not held, however long it is away.
    assert_eq!(world.state(0), StateName::Probing);
    world.restart(1, &Config::default());
    world.ping_from(1, Duration::ZERO, 50 * MS);
    let took = world.run_until(10 * SECOND, World::both_direct);
    assert!(took.is_some_and(|took| took <= SECOND), "{took:?}");
}
