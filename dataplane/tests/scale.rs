//! Many peers: how long a change of all of them takes, what an idle one costs in memory and in
//! processor time. One test, so that nothing else uses the process; it prints what it measures.
//!
//! `cargo test --release -p ringtail-dataplane --test scale -- --nocapture`
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests of drivers sleep and read the clock, and helpers of tests fail as tests do"
)]

mod support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use ringtail_dataplane::{Config, Dataplane, PeerConfig, Prefix};
use support::{End, Lab, lab_or_skip, resident, set_peers, stranger};

/// Peers and prefixes of the large configuration.
const PEERS: u32 = 2_000;
const PREFIXES: u32 = 130_560;
/// Idle peers.
const IDLE_PEERS: u32 = 10_000;
/// How long they are watched.
const IDLE: Duration = Duration::from_secs(3);
/// What they may use of a core meanwhile.
const IDLE_SHARE: f64 = 0.01;
/// What an idle peer may cost in memory, its two prefixes and our caller's copy of both included.
const BYTES_PER_PEER: u64 = 2048;
/// A build without optimisation on a busy machine is much slower than what is asked for.
const CHANGE_MAX: Duration = Duration::from_secs(if cfg!(debug_assertions) { 10 } else { 1 });

/// Peers that share so many prefixes of both families evenly.
fn peers(count: u32, prefixes: u32) -> Vec<PeerConfig> {
    let mut peers: Vec<PeerConfig> = (0..count).map(|id| stranger(id, Vec::new())).collect();
    for i in 0..prefixes {
        let prefix = if i % 2 == 0 {
            Prefix {
                addr: IpAddr::V4(Ipv4Addr::from_bits(0x6400_0000 + i)),
                bits: 32,
            }
        } else {
            let bits = (0xfd00 << 112) | u128::from(i) << 64;
            Prefix {
                addr: IpAddr::V6(Ipv6Addr::from_bits(bits)),
                bits: 64,
            }
        };
        peers[((i / 2) % count) as usize].allowed_ips.push(prefix);
    }
    peers
}

/// Processor time of the process so far.
fn used() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is writable for the length of the call.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap(),
        u32::try_from(time.tv_nsec).unwrap(),
    )
}

/// Until the shards have taken over what they were given.
fn settle() {
    let mut last = used();
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let now = used();
        if now - last < Duration::from_millis(5) {
            return;
        }
        last = now;
    }
}

#[test]
fn many_peers_are_set_quickly_and_cost_little() {
    lab_or_skip!();
    let lab = Lab::new();
    let before = resident();
    let dataplane = lab.inside(End::A, || {
        Dataplane::start(Config {
            roam: true,
            ..support::config([1; 32])
        })
        .unwrap()
    });
    support::run(&format!("ip -n {} link set rt0 up", lab.name(End::A)));
    settle();
    let empty = resident();
    println!("without peers: {} KiB", (empty - before) / 1024);

    let idle = peers(IDLE_PEERS, 2 * IDLE_PEERS);
    set_peers(&dataplane, idle);
    settle();
    let per_peer = resident().saturating_sub(empty) / u64::from(IDLE_PEERS);
    println!("{IDLE_PEERS} idle peers of 2 prefixes: {per_peer} bytes each");
    assert!(per_peer <= BYTES_PER_PEER, "{per_peer} bytes");

    let (start, start_used) = (Instant::now(), used());
    std::thread::sleep(IDLE);
    let share = (used() - start_used).as_secs_f64() / start.elapsed().as_secs_f64();
    println!("{IDLE_PEERS} idle peers: {:.3} % of a core", share * 100.0);
    assert!(share < IDLE_SHARE, "{share}");

    let large = peers(PEERS, PREFIXES);
    let again = large.clone();
    let start = Instant::now();
    set_peers(&dataplane, large);
    let first = start.elapsed();
    settle();
    let start = Instant::now();
    set_peers(&dataplane, again);
    let second = start.elapsed();
    println!(
        "{PEERS} peers with {PREFIXES} prefixes: set in {first:?}, replaced by the same in {second:?}"
    );
    assert!(first.max(second) < CHANGE_MAX);
    settle();
    let start = Instant::now();
    set_peers(&dataplane, Vec::new());
    println!("removed in {:?}", start.elapsed());
    assert!(start.elapsed() < CHANGE_MAX);
}
