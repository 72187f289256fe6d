//! Two data planes in two namespaces, with real kernels in between: both drivers, one and two
//! shards, both families inside and outside, relay and direct paths, a blocked path, a small MTU,
//! garbage.
#![expect(
    clippy::disallowed_methods,
    reason = "tests of drivers sleep and read the clock"
)]

mod support;

use std::cell::Cell;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ringtail_dataplane::packet::build::Builder;
use ringtail_dataplane::packet::header::{Flow, TCP, UDP};
use ringtail_dataplane::stats::{DropReason, Meter};
use ringtail_dataplane::{DriverChoice, DriverKind, Event, Offloads, PeerConfig, StartError};
use support::{
    End, HOUR, PEER, Pair, Setup, Stop, close, lab_or_skip, peer, run, set_peers, soon,
    start_another,
};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

/// An event is there at once, on a machine that does not stand still.
const TOLD: Duration = Duration::from_secs(10);
const MIB: usize = 1 << 20;

/// Two ends that are direct.
fn direct(setup: Setup) -> Pair {
    let pair = Pair::new(setup);
    pair.direct();
    pair
}

#[track_caller]
fn told(pair: &Pair, end: End, event: Event) {
    let heard = pair.wait_event(end, TOLD, |heard| *heard == event);
    assert!(heard.is_some(), "{event:?}");
}

/// Pings and transfers in both directions and both inner families, over both outer families.
fn all_families(driver: DriverChoice, shards: usize, kind: DriverKind) {
    let pair = Pair::new(Setup {
        driver,
        ..Setup::with_shards(shards)
    });
    assert_eq!(pair.a.driver(), kind);
    pair.direct();
    assert!(pair.ping(End::A, End::B.inner4(), 5));
    assert!(pair.ping(End::B, End::A.inner6(), 5));
    pair.transfer(End::A, End::B.inner4(), 8 * MIB);
    pair.transfer(End::B, End::A.inner6(), 8 * MIB);
    pair.paths(Some(End::outer6), false, HOUR);
    pair.transfer(End::A, End::B.inner6(), 4 * MIB);
    pair.transfer(End::B, End::A.inner4(), 4 * MIB);
    let total = pair.a.stats().total();
    assert!(
        total.get(Meter::UdpPacketsOut) > 8000,
        "the data went this way"
    );
    // Before there are keys, packets are handed over to the owner.
    let handed_over = total.get(Meter::HandedOver) + pair.b.stats().total().get(Meter::HandedOver);
    if shards == 1 {
        assert_eq!(handed_over, 0);
    }
    eprintln!(
        "handed over: {handed_over} of {}",
        total.get(Meter::TunPacketsIn)
    );
    for reason in [
        DropReason::OpenFailed,
        DropReason::InnerMalformed,
        DropReason::SourceNotAllowed,
        DropReason::SealFailed,
    ] {
        assert_eq!(total.drops(reason), 0, "{}", reason.name());
    }
}

#[test]
fn one_shard_with_io_uring() {
    lab_or_skip!();
    all_families(DriverChoice::IoUring, 1, DriverKind::IoUring);
}

#[test]
fn two_shards_with_io_uring() {
    lab_or_skip!();
    all_families(DriverChoice::IoUring, 2, DriverKind::IoUring);
}

#[test]
fn one_shard_with_epoll() {
    lab_or_skip!();
    all_families(DriverChoice::Epoll, 1, DriverKind::Epoll);
}

#[test]
fn two_shards_with_epoll() {
    lab_or_skip!();
    all_families(DriverChoice::Epoll, 2, DriverKind::Epoll);
}

#[test]
fn without_any_offload_everything_still_arrives() {
    lab_or_skip!();
    let offloads = Offloads {
        tun: false,
        gso: false,
        gro: false,
    };
    let pair = direct(Setup {
        offloads,
        ..Setup::default()
    });
    assert!(pair.ping(End::A, End::B.inner4(), 3));
    pair.transfer(End::A, End::B.inner4(), 2 * MIB);
}

#[test]
fn traffic_moves_from_relay_to_direct_and_back_when_the_path_dies_silently() {
    lab_or_skip!();
    for shards in [1, 2] {
        from_relay_to_direct_and_back(shards);
    }
}

fn from_relay_to_direct_and_back(shards: usize) {
    let pair = Pair::new(Setup::with_shards(shards));
    pair.paths(None, true, Duration::ZERO);
    assert!(pair.ping(End::A, End::B.inner4(), 3), "by relay");
    pair.transfer(End::A, End::B.inner4(), MIB);
    assert_eq!(pair.a.stats().total().get(Meter::UdpPacketsOut), 0);
    told(&pair, End::A, Event::Kick(PEER));
    assert!(pair.a.activity(PEER).rx_relay_bytes > 0);
    assert!(pair.a.activity(PEER).last_handshake.is_some());

    pair.paths(Some(End::outer4), true, HOUR);
    assert!(pair.ping(End::A, End::B.inner4(), 3), "direct");
    let by_relay = nothing_goes_by_relay(&pair);
    assert!(pair.a.activity(PEER).last_received_direct.is_some());

    pair.lab.cut();
    while pair.a.poll_event().is_some() {}
    let start = Instant::now();
    pair.transfer(End::A, End::B.inner4(), MIB);
    let blackout = start.elapsed();
    assert!(
        blackout < Duration::from_secs(8),
        "over the relay again after {blackout:?}"
    );
    assert!(pair.a.activity(PEER).tx_relay_bytes > by_relay);
    told(&pair, End::A, Event::Silent(PEER));

    pair.lab.mend();
    pair.transfer(End::B, End::A.inner4(), MIB);
    assert!(pair.ping(End::A, End::B.inner4(), 3), "direct speaks again");
    nothing_goes_by_relay(&pair);
}

/// Transfers over a path that is trusted, and returns what went by relay before that. A second in
/// which the other end stands still is silence like any other, so that it gets more than one try.
#[track_caller]
fn nothing_goes_by_relay(pair: &Pair) -> u64 {
    for _ in 0..5 {
        let before = pair.a.activity(PEER).tx_relay_bytes;
        pair.transfer(End::A, End::B.inner4(), MIB);
        if pair.a.activity(PEER).tx_relay_bytes == before {
            return before;
        }
    }
    panic!("the direct path is never trusted");
}

#[test]
fn an_untrusted_path_means_both_ways_and_doubles_are_dropped() {
    lab_or_skip!();
    let pair = Pair::new(Setup::default());
    pair.paths(Some(End::outer4), true, Duration::ZERO);
    assert!(pair.ping(End::A, End::B.inner4(), 10));
    pair.transfer(End::A, End::B.inner4(), MIB);
    soon("the second copies", || {
        pair.b.stats().drops(DropReason::Replayed) > 10
    });
    let activity = pair.a.activity(PEER);
    assert!(activity.tx_relay_bytes > 0 && activity.tx_bytes > activity.tx_relay_bytes);
}

#[test]
fn an_underlay_with_a_small_mtu_is_crossed_in_fragments() {
    lab_or_skip!();
    let pair = Pair::new(Setup::default());
    for end in [End::A, End::B] {
        run(&format!(
            "ip -n {} link set v0 mtu 1300",
            pair.lab.name(end)
        ));
    }
    pair.direct();
    pair.transfer(End::A, End::B.inner4(), 2 * MIB);
    pair.paths(Some(End::outer6), false, HOUR);
    pair.transfer(End::B, End::A.inner4(), 2 * MIB);
}

#[test]
fn a_route_that_says_less_than_the_path_carries_costs_no_batches() {
    lab_or_skip!();
    let pair = Pair::new(Setup::default());
    for end in [End::A, End::B] {
        run(&format!(
            "ip -n {} route add {}/32 dev v0 mtu 1300",
            pair.lab.name(end),
            end.other().outer4()
        ));
    }
    pair.direct();
    let counts = || {
        let (a, b) = (pair.a.stats().total(), pair.b.stats().total());
        (a.get(Meter::UdpPacketsOut), b.get(Meter::UdpReceives))
    };
    // Where a machine stands still, TCP starts anew with small packets.
    let mut tries = Vec::new();
    loop {
        let before = counts();
        pair.transfer(End::A, End::B.inner4(), 8 * MIB);
        let after = counts();
        let (packets, receives) = (after.0 - before.0, after.1 - before.1);
        assert!(packets > 6000, "{packets}");
        if receives * 4 < packets {
            break;
        }
        tries.push((packets, receives));
        assert!(tries.len() < 5, "packets, and receives of them: {tries:?}");
    }
}

#[test]
fn both_ends_may_start_at_once() {
    lab_or_skip!();
    for _ in 0..3 {
        let pair = direct(Setup::default());
        pair.a.initiate(PEER);
        pair.b.initiate(PEER);
        let start = Instant::now();
        assert!(pair.ping(End::A, End::B.inner4(), 1));
        assert!(
            start.elapsed() < Duration::from_secs(4),
            "not only after the 5 s of a repeated initiation: {:?}",
            start.elapsed()
        );
        told(&pair, End::A, Event::SessionUp(PEER));
        told(&pair, End::B, Event::SessionUp(PEER));
    }
}

#[test]
fn either_engine_talks_to_the_other_on_several_shards() {
    lab_or_skip!();
    use ringtail_dataplane::Engine::{Boringtun, Ringtail};
    for engines in [
        [Ringtail, Boringtun],
        [Boringtun, Ringtail],
        [Boringtun, Boringtun],
    ] {
        let pair = direct(Setup {
            engines,
            ..Setup::with_shards(2)
        });
        for (from, to) in [(End::A, End::B), (End::B, End::A)] {
            assert!(pair.ping(from, to.inner4(), 2), "{engines:?}");
            pair.transfer(from, to.inner4(), 4 << 20);
            pair.transfer(from, to.inner6(), 4 << 20);
        }
    }
}

/// Flows are sealed by the shard whose queue they are read on, whoever owns the peer.
#[test]
fn with_two_shards_either_seals_for_the_peer() {
    lab_or_skip!();
    let pair = direct(Setup {
        silence_limit: HOUR,
        ..Setup::with_shards(2)
    });
    // The queue for a flow is that which its replies were written to, and replies are written by their
    // hash: half of these flows are sealed by one shard, half by the other.
    let sent = || {
        pair.a
            .stats()
            .shards
            .iter()
            .map(|shard| shard.get(Meter::UdpPacketsOut))
            .collect()
    };
    for i in 0..16 {
        let before: Vec<u64> = sent();
        let shard = i % 2;
        pair.transfer_from(End::A, End::B.inner4(), MIB, |own, to| {
            let replies = Flow {
                src: to.ip(),
                dst: own.ip(),
                protocol: TCP,
                src_port: to.port(),
                dst_port: own.port(),
            };
            (replies.hash() >> 32) % 2 == shard
        });
        let by_shard = || -> Vec<u64> {
            sent()
                .iter()
                .zip(&before)
                .map(|(now, before)| now - before)
                .collect()
        };
        let least = MIB as u64 / 1420;
        soon("the last counters", || {
            by_shard().iter().sum::<u64>() >= least
        });
        let by_shard = by_shard();
        let shard = usize::try_from(shard).unwrap();
        // What leaves before the first reply is read anywhere: an initial window, and what is sent again of it.
        assert!(
            by_shard[1 - shard] * 20 <= by_shard[shard],
            "flow {i}: {by_shard:?}, and by the hash all of shard {shard}"
        );
    }
    let total = pair.a.stats().total();
    let lent = total.get(Meter::SealedForOthers);
    let out = total.get(Meter::UdpPacketsOut);
    // Eight MiB by the shard that does not own the peer, and eight by the owner.
    let half = 8 * MIB as u64 / 1420;
    assert!(lent >= half && out - lent >= half, "{lent} of {out}");
    // Until there are keys, and while what was handed over then is on its way.
    let handed_over = total.get(Meter::HandedOver);
    assert!(handed_over <= 50, "{handed_over} of {out}");
}

/// Replies pass the filter of the owner, also where another shard sealed the request.
#[test]
fn replies_to_flows_of_any_shard_pass_the_filter() {
    lab_or_skip!();
    let pair = Pair::new(Setup::with_shards(2));
    // Nobody may begin to speak to A.
    close(&pair.a);
    pair.direct();
    let echo = pair.bind(End::B, End::B.inner4());
    echo.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let to = echo.local_addr().unwrap();
    const FLOWS: usize = 32;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = [0; 64];
            for _ in 0..2 * FLOWS {
                let (len, from) = echo.recv_from(&mut bytes).expect("every request");
                echo.send_to(&bytes[..len], from).unwrap();
            }
        });
        let sockets: Vec<UdpSocket> = pair.lab.inside(End::A, || {
            let socket = |_| UdpSocket::bind((End::A.inner4(), 0)).unwrap();
            (0..FLOWS).map(socket).collect()
        });
        for socket in sockets.iter().chain(&sockets) {
            socket
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            socket.send_to(b"anybody there?", to).unwrap();
            let mut bytes = [0; 64];
            assert_eq!(socket.recv(&mut bytes).expect("a reply"), 14);
        }
    });
    soon("some flows of the other shard", || {
        pair.a.stats().total().get(Meter::SealedForOthers) >= 4
    });
    assert_eq!(pair.a.stats().drops(DropReason::FilterDenied), 0);
}

/// A quiet flow is not forgotten by the owner beside more flows than it has ever had room for, while the
/// shard that sealed it thinks that it has been told.
#[test]
fn quiet_flows_are_answered_beside_160000_others() {
    lab_or_skip!();
    const QUIET: usize = 200;
    const PER_MS: u32 = 8;
    const ROUND: Duration = Duration::from_secs(10);
    /// On their way at once at most: less than any queue holds, however slow the machine is.
    const WINDOW: u64 = 400;
    let pair = Pair::new(Setup {
        silence_limit: HOUR,
        ..Setup::with_shards(2)
    });
    close(&pair.a);
    pair.direct();
    assert!(pair.ping(End::A, End::B.inner4(), 1));
    let socket = |end: End| UdpSocket::bind((end.inner4(), 0)).unwrap();
    let echo = pair.lab.inside(End::B, || socket(End::B));
    let (flood, quiet): (Vec<_>, Vec<_>) = pair.lab.inside(End::A, || {
        let sockets = |count| (0..count).map(|_| socket(End::A)).collect();
        (sockets(3), sockets(QUIET))
    });
    let to = echo.local_addr().unwrap();
    let over = AtomicBool::new(false);
    echo.set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let start = Instant::now();
    std::thread::scope(|scope| {
        let stopper = Stop(&over);
        scope.spawn(|| {
            let mut bytes = [0; 64];
            while !over.load(Ordering::Relaxed) {
                if let Ok((len, from)) = echo.recv_from(&mut bytes) {
                    echo.send_to(&bytes[..len], from).unwrap();
                }
            }
        });
        let (mut sent, mut asked) = (0, 0);
        let carried = || pair.b.stats().total().get(Meter::TunPacketsOut);
        // Those of the flood that can still come, what is carried besides, and when that last changed.
        let (mut under_way, mut before, mut since) = (0, carried(), Instant::now());
        while sent < 160_000 || asked < 2 * u32::try_from(QUIET).unwrap() {
            let passed = start.elapsed();
            let due = u32::try_from(passed.as_millis()).unwrap() * PER_MS;
            let now = carried();
            if now > before {
                under_way -= under_way.min(now - before);
                (before, since) = (now, Instant::now());
            } else if since.elapsed() > Duration::from_secs(1) {
                under_way = 0;
            }
            while sent < due.min(160_000) && under_way < WINDOW {
                // Nobody listens there, and B's kernel says so now and then.
                let port = u16::try_from(1024 + sent % 64_000).unwrap();
                let by = &flood[usize::try_from(sent / 64_000).unwrap()];
                let taken = by.send_to(b"x", (End::B.inner4(), port));
                under_way += u64::from(taken.is_ok());
                sent += 1;
            }
            if passed >= ROUND / u32::try_from(QUIET).unwrap() * asked {
                let by = usize::try_from(asked).unwrap() % QUIET;
                quiet[by].send_to(b"anybody there?", to).unwrap();
                asked += 1;
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        let asked = usize::try_from(asked).unwrap();
        let answers = Cell::new(0);
        for socket in &quiet {
            socket.set_nonblocking(true).unwrap();
        }
        // Nothing is sent twice, and queues of a busy machine run over: those are not the filter's.
        soon("nine of ten are answered", || {
            for socket in &quiet {
                let come = std::iter::from_fn(|| socket.recv(&mut [0; 64]).ok()).count();
                answers.set(answers.get() + come);
            }
            answers.get() * 10 >= asked * 9
        });
        std::thread::sleep(Duration::from_millis(500));
        drop(stopper);
        pair.report();
        assert_eq!(pair.a.stats().drops(DropReason::FilterDenied), 0);
    });
    assert!(pair.a.stats().total().get(Meter::SealedForOthers) >= 10_000);
}

/// What waited for keys, what was handed over meanwhile, and what shards seal themselves thereafter:
/// every flow arrives as it was sent.
#[test]
fn no_flow_is_reordered_while_sealing_moves_to_its_shard() {
    lab_or_skip!();
    const FLOWS: usize = 8;
    /// Of each flow once there are keys.
    const PACKETS: u32 = 400;
    /// On their way at once at most: less than what waits for keys, and than what any queue holds.
    const WINDOW: u64 = 96;
    // Pinned: the kernel itself reorders what a thread sends while it moves from one CPU to another.
    let pair = direct(Setup {
        pin: true,
        silence_limit: HOUR,
        ..Setup::with_shards(2)
    });
    let receiver = pair.bind(End::B, End::B.inner4());
    let to = receiver.local_addr().unwrap();
    let arrived = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut next = std::collections::HashMap::new();
            let mut ended = 0;
            let mut bytes = [0; 64];
            while ended < FLOWS {
                let (len, from) = receiver.recv_from(&mut bytes).expect("every packet");
                let number = u32::from_le_bytes(*bytes.first_chunk().unwrap());
                let expected = next.entry(from).or_insert(0);
                assert_eq!(number, *expected, "of {from}");
                *expected = number + 1;
                ended += usize::from(len > 4);
                arrived.fetch_add(1, Ordering::Relaxed);
            }
            assert_eq!(next.len(), FLOWS);
        });
        pair.lab.inside(End::A, || {
            let sockets: Vec<UdpSocket> = (0..FLOWS)
                .map(|_| UdpSocket::bind((End::A.inner4(), 0)).unwrap())
                .collect();
            let (mut number, mut left, mut sent) = (0u32, PACKETS, 0);
            let deadline = Instant::now() + Duration::from_secs(60);
            while left > 0 {
                left -= u32::from(pair.a.activity(PEER).last_handshake.is_some());
                let bytes = number.to_le_bytes();
                // The last of a flow is longer.
                let packet = [bytes, bytes].concat();
                let packet = &packet[..if left > 0 { 4 } else { 8 }];
                for socket in &sockets {
                    while sent - arrived.load(Ordering::Relaxed) >= WINDOW {
                        assert!(Instant::now() < deadline, "lost, of {sent}");
                        std::thread::sleep(Duration::from_micros(50));
                    }
                    socket.send_to(packet, to).unwrap();
                    sent += 1;
                }
                number += 1;
            }
        });
    });
    // What waits for keys is all of the window; then most leaves by the shard that reads it.
    let lent = pair.a.stats().total().get(Meter::SealedForOthers);
    assert!(lent >= u64::from(PACKETS), "{lent}");
}

/// IPv6 whose transport header no room can see is carried like any other, alone and between others.
#[test]
fn ipv6_with_more_extension_headers_than_are_walked_is_carried() {
    lab_or_skip!();
    for shards in [1, 2] {
        let pair = direct(Setup::with_shards(shards));
        assert!(pair.ping(End::A, End::B.inner6(), 1));
        let receiver = pair.bind(End::B, End::B.inner6());
        let to = receiver.local_addr().unwrap();
        let raw = pair.lab.inside(End::A, || {
            socket2::Socket::new(
                socket2::Domain::IPV6,
                socket2::Type::RAW,
                Some(socket2::Protocol::from(libc::IPPROTO_RAW)),
            )
            .unwrap()
        });
        let builder = Builder::new((End::A.inner6(), 7).into(), to);
        let to = SocketAddr::new(to.ip(), 0).into();
        let mut bytes = [0; 64];
        for count in [0, 8, 9, 0, 40, 100] {
            // Destination options, each of six bytes of padding.
            let mut body = [60, 0, 1, 4, 0, 0, 0, 0].repeat(count);
            if let Some(last) = body.len().checked_sub(8) {
                body[last] = UDP;
            }
            body.extend(&builder.udp(&[7; 10])[40..]);
            let first = if count > 0 { 60 } else { UDP };
            raw.send_to(&builder.ip(first, &body), &to).unwrap();
            let len = receiver.recv(&mut bytes).expect("every packet");
            assert_eq!(bytes[..len], [7; 10], "behind {count}");
        }
        for end in [End::A, End::B] {
            let stats = pair.of(end).stats();
            assert_eq!(stats.drops(DropReason::InnerMalformed), 0);
        }
    }
}

#[test]
fn garbage_is_counted_and_nothing_else_happens() {
    lab_or_skip!();
    let pair = direct(Setup::with_shards(2));
    assert!(pair.ping(End::A, End::B.inner4(), 1));
    let to = SocketAddr::new(End::B.outer4(), pair.b.local_port());
    pair.lab.inside(End::A, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let mut seed = 1u32;
        for round in 0..600usize {
            let mut datagram: Vec<u8> = (0..round % 300)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    seed.to_be_bytes()[0]
                })
                .collect();
            if datagram.len() >= 4 {
                datagram[..4].copy_from_slice(&[u8::try_from(round % 5).unwrap(), 0, 0, 0]);
            }
            socket.send_to(&datagram, to).unwrap();
        }
    });
    assert!(pair.ping(End::A, End::B.inner4(), 3));
    soon("all is counted", || {
        let stats = pair.b.stats();
        let counts = [
            DropReason::MessageLength,
            DropReason::UnknownIndex,
            DropReason::UnknownMessage,
            DropReason::HandshakeMac,
        ]
        .map(|reason| stats.drops(reason));
        // What looks like nothing goes to the discovery socket, which nobody reads here.
        counts[0] > 200 && counts[1] > 50 && counts.iter().sum::<u64>() > 400
    });
}

#[test]
fn a_second_node_on_the_same_port_is_refused() {
    lab_or_skip!();
    let pair = Pair::new(Setup::default());
    let port = pair.a.local_port();
    let error = pair
        .lab
        .inside(End::A, || start_another(DriverChoice::Auto, port).err());
    assert!(matches!(error, Some(StartError::Udp { .. })), "{error:?}");
}

/// A CE mark set on the way reaches the inner packet if that is ECN-capable, and drops it if not
/// (RFC 6040 §4.2); what the sender says inside is seen outside.
#[test]
fn congestion_marks_travel_through_the_tunnel() {
    lab_or_skip!();
    let pair = direct(Setup::default());
    assert!(pair.ping(End::A, End::B.inner4(), 1));
    let b = pair.lab.name(End::B);
    let nft = |rules: &str| {
        let status = std::process::Command::new("ip")
            .args(["netns", "exec", &b, "nft", rules])
            .status()
            .unwrap();
        assert!(status.success(), "{rules}");
    };
    nft(
        "add table ip t; add chain ip t pre { type filter hook prerouting priority -300; };
         add rule ip t pre iifname \"v0\" ip ecn ect0 counter comment outer;
         add rule ip t pre iifname \"v0\" udp dport != 9 ip ecn set ce;
         add rule ip t pre iifname \"rt0\" udp dport 9 ip ecn ce counter comment inner;
         add rule ip t pre iifname \"rt0\" udp dport 9 ip ecn != ce counter comment unmarked",
    );
    let send = |tos: u32| {
        pair.lab.inside(End::A, || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket2::SockRef::from(&socket).set_tos_v4(tos).unwrap();
            for _ in 0..20 {
                socket.send_to(b"mark me", (End::B.inner4(), 9)).unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(100));
    };
    let counters = || {
        let output = std::process::Command::new("ip")
            .args(["netns", "exec", &b, "nft", "list", "table", "ip", "t"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ["outer", "inner", "unmarked"].map(|name| {
            let line = text
                .lines()
                .find(|line| line.ends_with(&format!("\"{name}\"")))
                .unwrap();
            let words: Vec<&str> = line.split_whitespace().collect();
            let at = words.iter().position(|word| *word == "packets").unwrap();
            words[at + 1].parse::<u32>().unwrap()
        })
    };
    send(2);
    soon("20 marks", || {
        pair.b.stats().total().get(Meter::CongestionMarks) >= 20 && counters()[1] >= 1
    });
    let [outer, inner, unmarked] = counters();
    assert!(outer >= 1, "ECT(0) outside as inside");
    assert!(inner >= 1, "as one or more super-packets");
    assert_eq!(unmarked, 0);
    assert_eq!(pair.b.stats().total().get(Meter::CongestionMarks), 20);
    send(0);
    soon("20 drops", || {
        pair.b.stats().drops(DropReason::EcnCongested) >= 20
    });
    assert_eq!(counters()[1..], [inner, 0], "not ECN-capable: dropped");
    assert_eq!(pair.b.stats().drops(DropReason::EcnCongested), 20);
}

/// The mark is on the sockets: a rule of the underlay's routing can tell our packets apart.
#[test]
fn underlay_packets_carry_the_fwmark() {
    lab_or_skip!();
    let pair = direct(Setup {
        fwmark: 0x1234,
        ..Setup::default()
    });
    assert!(pair.ping(End::A, End::B.inner4(), 1));
    let a = pair.lab.name(End::A);
    run(&format!("ip -n {a} rule add fwmark 0x1234 prohibit"));
    run(&format!("ip -n {a} route flush cache"));
    while pair.a.poll_event().is_some() {}
    assert!(!pair.quiet_ping(End::A, End::B.inner4()));
    let error = pair.wait_event(End::A, TOLD, |e| {
        matches!(e, Event::SendError(PEER, _, libc::EACCES))
    });
    assert!(error.is_some(), "the rule caught it");
}

#[test]
fn a_renewed_key_drops_nothing_of_peers_that_know_it_and_those_that_do_not() {
    lab_or_skip!();
    let pair = direct(Setup::default());
    pair.direct();
    let to_a = End::A.inner4();
    let to_b = End::B.inner4();
    assert!(pair.ping(End::B, to_a, 2));
    let renewed = Zeroizing::new([0x77; 32]);
    pair.a.renew_key(&renewed);
    let handshake = || pair.b.activity(PEER).last_handshake;
    let before = handshake();
    assert!(pair.ping(End::A, to_b, 3) && pair.ping(End::B, to_a, 3));
    assert_eq!(handshake(), before, "the session goes on");
    // The peer is told of the new key, and has no session under it: who sends first makes one.
    for (key, first) in [(&renewed, End::A), (&Zeroizing::new([0x78; 32]), End::B)] {
        pair.a.renew_key(key);
        let public = PublicKey::from(&StaticSecret::from(**key));
        set_peers(
            &pair.b,
            vec![PeerConfig {
                public_key: *public.as_bytes(),
                ..peer(End::A)
            }],
        );
        pair.direct();
        let other = first.other();
        let (from, to) = (
            pair.bind(first, first.inner4()),
            pair.bind(other, other.inner4()),
        );
        to.set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let told = Instant::now();
        while to.recv(&mut [0; 8]).is_err() {
            from.send_to(b"x", to.local_addr().unwrap()).unwrap();
            assert!(told.elapsed() < Duration::from_secs(4), "{first:?}");
        }
    }
}
