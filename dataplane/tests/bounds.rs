//! Whether a data plane stays below the sum of `BOUNDS.md` in the worst case that a host of the LAN can
//! make: it sends as much as it can to every peer, and none of them answers.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests of drivers sleep and read the clock, and helpers of tests fail as tests do"
)]

mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use ringtail_dataplane::stats::{DropReason, Meter};
use ringtail_dataplane::{
    Config, Dataplane, NetworkChange, PathDecision, PeerConfig, PeerId, Prefix, Rules,
};
use support::{End, Lab, lab_or_skip, resident, stranger};

const SHARDS: usize = 2;
/// What the scan brings at least; without a budget it would all be kept.
const SCANNED: u64 = 480 << 20;
const SCAN_TIME_MAX: Duration = Duration::from_secs(20);
/// A packet is large, so that few do.
const MTU: u16 = 60_000;
const DATAGRAM: usize = MTU as usize - 28;
/// Beyond so many, peers have no path: sessions are made, but no handshakes begun, each of which costs a
/// build without optimisation more than a millisecond.
const PATHS_MAX: u32 = 1_000;

/// The sum of the process's memory that the document promises for so many peers.
fn promised(peers: u32) -> u64 {
    let text = include_str!("../BOUNDS.md");
    let mut lines = text.lines().filter(|line| line.starts_with('|'));
    let heading = lines.next().unwrap();
    let wanted = format!(
        "{},{:03} peers, {SHARDS} shards",
        peers / 1000,
        peers % 1000
    );
    let column = heading.split('|').position(|cell| cell.trim() == wanted);
    let sum = lines
        .find(|line| line.starts_with("| **together**"))
        .unwrap();
    let cell = sum.split('|').nth(column.unwrap()).unwrap();
    let mebibytes: u64 = cell.trim().strip_suffix(" MiB").unwrap().parse().unwrap();
    mebibytes << 20
}

fn address(peer: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x6440_0000 + peer)
}

fn peer(id: u32) -> PeerConfig {
    let addr = IpAddr::V4(address(id));
    stranger(id, vec![Prefix { addr, bits: 32 }])
}

/// Nobody is there.
fn dead_end() -> PathDecision {
    PathDecision {
        generation: 1,
        udp: Some(SocketAddr::new(End::B.outer4(), 9)),
        local: None,
        derp: None,
        trust_until: None,
        silence_limit: Duration::from_secs(1),
        path_mtu: 1500,
        relayed_alone: false,
    }
}

fn scanned(dataplane: &Dataplane) -> u64 {
    dataplane.stats().total().get(Meter::TunBytesIn)
}

#[test]
fn a_scan_of_all_peers_stays_below_the_documents_sum() {
    lab_or_skip!();
    for peers in [1_000, 10_000] {
        let lab = Lab::new();
        let name = lab.name(End::A);
        let before = resident();
        let dataplane = lab.inside(End::A, || {
            Dataplane::start(Config {
                mtu: MTU,
                shards: SHARDS,
                ..support::config([1; 32])
            })
            .unwrap()
        });
        support::run(&format!("ip -n {name} link set rt0 mtu {MTU} up"));
        support::run(&format!("ip -n {name} addr add 10.9.0.1/32 dev rt0"));
        support::run(&format!("ip -n {name} route add 100.64.0.0/16 dev rt0"));
        dataplane.change_network(NetworkChange {
            peers: (0..peers).map(peer).collect(),
            rules: Some((Rules::List(Vec::new()), None)),
            ..NetworkChange::default()
        });
        for id in 0..peers.min(PATHS_MAX) {
            dataplane.set_path(PeerId(id), dead_end());
        }
        let start = Instant::now();
        let socket = lab.inside(End::A, || UdpSocket::bind("10.9.0.1:0").unwrap());
        let mut highest = 0;
        let mut sent = 0u32;
        while scanned(&dataplane) < SCANNED && start.elapsed() < SCAN_TIME_MAX {
            for _ in 0..50 {
                // A full queue is no matter: what counts is what the shards have read.
                let _sent = socket.send_to(&[0x5a; DATAGRAM], (address(sent % peers), 7));
                sent += 1;
            }
            highest = highest.max(resident());
        }
        let growth = highest.max(resident()).saturating_sub(before);
        let promised = promised(peers);
        let dropped = dataplane.stats().drops(DropReason::NoSession);
        println!(
            "{peers} peers, {sent} sent, {} MiB in {:?}: {} MiB of {} MiB; {dropped} dropped",
            scanned(&dataplane) >> 20,
            start.elapsed(),
            growth >> 20,
            promised >> 20
        );
        assert!(
            scanned(&dataplane) >= SCANNED,
            "the scan was too slow to show anything"
        );
        assert!(SCANNED > promised, "less than the sum shows nothing");
        assert!(growth <= promised, "{growth} of {promised}");
        let kept = dropped * DATAGRAM as u64;
        assert!(kept > SCANNED / 2, "what is not kept is counted: {dropped}");
    }
}
