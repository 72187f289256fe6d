//! Hours of random weather, from a printed seed, against a small model of what must hold.

use std::time::Duration;

use rand::RngExt as _;

use super::matrix::pair;
use super::world::{MS, SECOND, World};
use crate::path::{Config, StateName};

const KINDS: [&str; 5] = ["easy", "public_fw", "adf", "fullcone", "easy_fw"];

/// Changes the weather, at random.
fn change(world: &mut World, hours_calm: bool) {
    let roll = world.rng.random_range(0..10);
    let weather = &mut world.weather;
    match roll {
        0 => weather.blocked = [true, true],
        1 => weather.blocked = [true, false],
        2 => weather.blocked = [false, true],
        3 => weather.loss = 300,
        4 => weather.jitter = 30 * MS,
        5 => weather.delay = 80 * MS,
        6 if !hours_calm => {
            let router = world.rng.random_range(0..world.boxes.len());
            world.boxes[router].rebind();
        }
        _ => {
            weather.blocked = [false; 2];
            weather.loss = 0;
            weather.jitter = Duration::ZERO;
            weather.delay = 10 * MS;
        }
    }
}

/// An hour of changes between 5 and 60 s apart; the relay is always clean.
fn hour(seed: u64) {
    println!("seed {seed}");
    let pick = |n: u64| KINDS[usize::try_from(n).unwrap() % KINDS.len()];
    let mut world = pair(seed, &Config::default(), pick(seed), pick(seed / 5));
    world.ping_from(0, Duration::ZERO, 200 * MS);
    let end = world.now + 3600 * SECOND;
    while world.now < end {
        change(&mut world, seed.is_multiple_of(2));
        let time = Duration::from_secs(world.rng.random_range(5..60));
        let from = world.now;
        world.run(time);
        // Whatever happens to the direct path, the relay carries the stream after two seconds; a
        // path that loses a third of its packets may be in use until the alarm rings.
        let lossy = world.weather.loss > 0;
        let gap = world.longest_gap(0, from);
        assert!(
            lossy || gap <= 2 * SECOND + 500 * MS,
            "seed {seed}: silence of {gap:?}"
        );
    }
    // In fair weather both are direct again, at the latest after the longest hold.
    world.weather.blocked = [false; 2];
    (world.weather.loss, world.weather.jitter) = (0, Duration::ZERO);
    let took = world.run_until(3600 * SECOND, World::both_direct);
    assert!(
        took.is_some(),
        "seed {seed}: {:?} {:?}",
        world.state(0),
        world.state(1)
    );
    assert_ne!(world.state(0), StateName::Held);
    let begin = world.now;
    world.run(30 * SECOND);
    let end = world.end_pings();
    assert_eq!(world.lost(0, begin..end), 0, "seed {seed}");
}

#[test]
fn hours_of_random_weather_never_silence_the_stream_for_long() {
    for seed in 1..=6 {
        hour(seed);
    }
}
