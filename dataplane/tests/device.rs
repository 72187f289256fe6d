//! Device mode between real kernels: endpoints that follow their peers, answers from where they
//! were asked, and everything that may change while packets flow.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests of drivers sleep and read the clock, and helpers of tests fail as tests do"
)]

mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use ringtail_dataplane::stats::{DropReason, Meter};
use ringtail_dataplane::{DriverChoice, Event, PeerConfig, StartError};
use support::{End, PEER, Pair, Setup, Stop, lab_or_skip, peer, run, set_peers, soon};
use zeroize::Zeroizing;

const MIB: usize = 1 << 20;

fn device(setup: Setup) -> Pair {
    Pair::new(Setup {
        roam: true,
        ..setup
    })
}

/// In device mode, with keys: A was told where B is, and was answered.
#[track_caller]
fn joined(setup: Setup) -> Pair {
    let pair = device(setup);
    endpoint(&pair, End::A, End::B.outer4());
    assert!(pair.ping(End::A, End::B.inner4(), 1));
    pair
}

/// Both drivers, with two shards.
fn drivers() -> [Setup; 2] {
    [DriverChoice::IoUring, DriverChoice::Epoll].map(|driver| Setup {
        driver,
        ..Setup::with_shards(2)
    })
}

fn at(pair: &Pair, end: End, ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, pair.of(end).local_port())
}

/// Tells `end` that the other one is at `ip`.
fn endpoint(pair: &Pair, end: End, ip: IpAddr) {
    let to = at(pair, end.other(), ip);
    pair.of(end).set_endpoint(PEER, to);
    assert_eq!(pair.of(end).endpoint(PEER), Some(to), "seen at once");
    // Its owner takes it in its next turn: what another shard has to send before goes the old way.
    thread::sleep(Duration::from_millis(100));
}

/// `end` has the other one at `ip`.
#[track_caller]
fn sees(pair: &Pair, end: End, ip: IpAddr) {
    let seen = Some(at(pair, end.other(), ip));
    assert_eq!(pair.of(end).endpoint(PEER), seen);
}

/// Moves A to another port.
fn listen(pair: &Pair, port: u16) -> Result<u16, StartError> {
    pair.lab.inside(End::A, || pair.a.set_listen_port(port))
}

/// A hardly wakes.
#[track_caller]
fn idles(pair: &Pair) {
    let turns = || pair.a.stats().total().get(Meter::Turns);
    let before = turns();
    thread::sleep(Duration::from_millis(300));
    let woken = turns() - before;
    assert!(woken < 200, "{woken} turns");
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn the_endpoint_follows_the_peer_and_nobody_else() {
    lab_or_skip!();
    for setup in drivers() {
        let pair = device(setup);
        let a = pair.lab.name(End::A);
        assert_eq!(pair.b.endpoint(PEER), None);
        endpoint(&pair, End::A, End::B.outer4());
        assert!(pair.ping(End::A, End::B.inner4(), 1));
        sees(&pair, End::B, End::A.outer4());

        // Another address.
        run(&format!("ip -n {a} addr del 192.0.2.1/24 dev v0"));
        run(&format!("ip -n {a} addr add 192.0.2.11/24 dev v0"));
        assert!(pair.ping(End::A, End::B.inner4(), 1));
        sees(&pair, End::B, addr("192.0.2.11"));
        pair.transfer(End::B, End::A.inner4(), MIB);

        // Another family, chosen by the other end; nothing of the old one is on its way.
        thread::sleep(Duration::from_millis(200));
        endpoint(&pair, End::B, End::A.outer6());
        assert!(pair.ping(End::B, End::A.inner6(), 1));
        sees(&pair, End::A, End::B.outer6());

        // What does not authenticate moves nothing.
        let to = at(&pair, End::B, End::B.outer4());
        pair.lab.inside(End::A, || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            for kind in 1..=4u8 {
                for len in [32, 64, 92, 148, 1000] {
                    let mut bytes = vec![7; len];
                    bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
                    socket.send_to(&bytes, to).unwrap();
                }
            }
        });
        thread::sleep(Duration::from_millis(50));
        sees(&pair, End::B, End::A.outer6());
    }
}

#[test]
fn answers_leave_from_the_address_that_was_asked() {
    lab_or_skip!();
    for setup in drivers() {
        let pair = device(setup);
        let b = pair.lab.name(End::B);
        let (a4, a6) = (End::A.inner4(), End::A.inner6());
        for (second, bits, first, inner, back) in [
            ("192.0.2.22", 24, End::B.outer4(), End::B.inner4(), a4),
            ("2001:db8::22", 64, End::B.outer6(), End::B.inner6(), a6),
        ] {
            let nodad = if bits == 64 { "nodad" } else { "" };
            run(&format!(
                "ip -n {b} addr add {second}/{bits} dev v0 {nodad}"
            ));
            endpoint(&pair, End::A, addr(second));
            assert!(pair.ping(End::A, inner, 3));
            pair.transfer(End::A, inner, MIB);
            let asked = at(&pair, End::B, addr(second));
            assert_eq!(pair.a.endpoint(PEER), Some(asked), "and the handshake too");
            // The address goes: not too sticky.
            run(&format!("ip -n {b} addr del {second}/{bits} dev v0"));
            if first.is_ipv6() {
                run(&format!("ip -n {b} addr del {first}/{bits} dev v0"));
                run(&format!("ip -n {b} addr add {first}/{bits} dev v0 nodad"));
            }
            assert!(pair.ping(End::B, back, 2));
            sees(&pair, End::A, first);
        }
    }
}

#[test]
fn link_local_endpoints_have_a_scope() {
    lab_or_skip!();
    for setup in drivers() {
        let pair = device(setup);
        for end in [End::A, End::B] {
            let name = pair.lab.name(end);
            let own = if end == End::A { "fe80::a" } else { "fe80::b" };
            run(&format!("ip -n {name} addr add {own}/64 dev v0 nodad"));
        }
        let index = pair.lab.inside(End::A, || {
            let text = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
            let line = text.lines().find(|line| line.ends_with("v0")).unwrap();
            u32::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
        });
        let to =
            std::net::SocketAddrV6::new("fe80::b".parse().unwrap(), pair.b.local_port(), 0, index);
        pair.a.set_endpoint(PEER, to.into());
        assert!(pair.ping(End::A, End::B.inner4(), 2));
        pair.transfer(End::A, End::B.inner6(), MIB);
        pair.transfer(End::B, End::A.inner4(), MIB);
        assert_eq!(pair.a.endpoint(PEER), Some(to.into()));
        let Some(SocketAddr::V6(from)) = pair.b.endpoint(PEER) else {
            panic!("{:?}", pair.b.endpoint(PEER));
        };
        assert!(from.scope_id() > 0, "{from}");
    }
}

/// UDP sockets of the end's namespace; other tests of the process are in others.
fn sockets(pair: &Pair, end: End) -> usize {
    pair.lab.inside(end, || {
        ["udp", "udp6"]
            .map(|file| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap())
            .iter()
            .map(|table| table.lines().count() - 1)
            .sum()
    })
}

#[test]
fn the_port_changes_while_packets_flow() {
    lab_or_skip!();
    for setup in drivers() {
        let pair = joined(setup);
        let old = pair.a.local_port();
        let before = sockets(&pair, End::A);
        assert!(before > 0);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let stopper = Stop(&stop);
            let traffic = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    pair.transfer(End::A, End::B.inner4(), 4 * MIB);
                }
            });
            let mut last = old;
            for _ in 0..20 {
                let port = listen(&pair, 0).unwrap();
                assert_ne!(port, last);
                assert_eq!(pair.a.local_port(), port);
                soon("the other end follows", || {
                    pair.b.endpoint(PEER).map(|at| at.port()) == Some(port)
                });
                last = port;
            }
            drop(stopper);
            traffic.join().unwrap();
        });
        pair.transfer(End::B, End::A.inner6(), MIB);
        soon("the old sockets are closed", || {
            sockets(&pair, End::A) == before
        });

        // A port that is taken: nothing changes.
        let port = pair.a.local_port();
        let taken = pair.bind(End::A, Ipv4Addr::UNSPECIFIED.into());
        let error = listen(&pair, taken.local_addr().unwrap().port()).unwrap_err();
        let StartError::Udp { source, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(source.raw_os_error(), Some(libc::EADDRINUSE));
        assert_eq!(pair.a.local_port(), port);
        assert!(pair.ping(End::A, End::B.inner4(), 2));
        // The first one is free again.
        assert_eq!(listen(&pair, old).unwrap(), old);
        assert!(pair.ping(End::A, End::B.inner4(), 2));
        assert_eq!(pair.b.endpoint(PEER).unwrap().port(), old);
    }
}

#[test]
fn the_mark_changes_on_every_socket_and_on_later_ones() {
    lab_or_skip!();
    let pair = joined(Setup::with_shards(2));
    let a = pair.lab.name(End::A);
    for family in ["-4", "-6"] {
        run(&format!("ip {family} -n {a} rule add fwmark 0x77 prohibit"));
    }
    let lost = || pair.a.stats().drops(DropReason::SendFailed);
    assert_eq!(lost(), 0);
    pair.a.set_fwmark(0x77).unwrap();
    assert!(!pair.quiet_ping(End::A, End::B.inner4()));
    soon("the rule caught it", || lost() > 0);
    listen(&pair, 0).unwrap();
    let before = lost();
    assert!(!pair.quiet_ping(End::A, End::B.inner4()));
    soon("and the new port's", || lost() > before);
    pair.a.set_fwmark(0).unwrap();
    assert!(pair.ping(End::A, End::B.inner4(), 1));
}

#[test]
fn our_key_changes_with_sessions_up() {
    lab_or_skip!();
    let pair = joined(Setup::default());
    pair.a.set_private_key(None);
    assert!(!pair.quiet_ping(End::A, End::B.inner4()));
    assert!(!pair.quiet_ping(End::B, End::A.inner4()));
    // The other end knows us by this key from now on.
    let key = Zeroizing::new([77; 32]);
    let public = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(*key));
    set_peers(
        &pair.b,
        vec![PeerConfig {
            public_key: *public.as_bytes(),
            ..peer(End::A)
        }],
    );
    assert_eq!(
        pair.b.endpoint(PEER),
        None,
        "another peer under the same id"
    );
    assert_eq!(pair.b.activity(PEER).rx_bytes, 0);
    pair.a.set_private_key(Some(&key));
    assert!(pair.ping(End::A, End::B.inner4(), 1));
    pair.transfer(End::B, End::A.inner4(), MIB);
}

#[test]
fn peers_come_and_go_with_traffic_flowing() {
    lab_or_skip!();
    for setup in drivers() {
        let pair = joined(setup);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let _stopper = Stop(&stop);
            scope.spawn(|| {
                pair.lab.inside(End::A, || {
                    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        // Without a route it is refused. Paced: what is looked at is whether pings
                        // find their way, not how long the queue of a busy machine is.
                        let _sent = socket.send_to(&[1; 1000], (End::B.inner4(), 9));
                        thread::sleep(Duration::from_micros(200));
                    }
                });
            });
            for round in 0..50u32 {
                set_peers(&pair.a, Vec::new());
                // Initiations within 20 ms of another are not answered, and repeated after 5 s.
                let checked = round % 10 == 0;
                let pause = if checked { 40 } else { round % 4 };
                thread::sleep(Duration::from_millis(u64::from(pause)));
                set_peers(&pair.a, vec![peer(End::B)]);
                endpoint(&pair, End::A, End::B.outer4());
                if checked {
                    // One may be pushed out by the others while they wait for keys.
                    soon("it works again", || {
                        pair.quiet_ping(End::A, End::B.inner4())
                    });
                }
            }
        });
        // The last initiation may have come too soon after the one before it.
        soon("it works in the end", || {
            pair.quiet_ping(End::A, End::B.inner4())
        });
        assert!(pair.ping(End::A, End::B.inner4(), 2));
    }
}

#[test]
fn prefixes_move_between_peers() {
    lab_or_skip!();
    let pair = joined(Setup::default());
    let other = PeerConfig {
        id: ringtail_dataplane::PeerId(6),
        public_key: [9; 32],
        allowed_ips: vec![peer(End::B).allowed_ips[0]],
        ..peer(End::B)
    };
    set_peers(&pair.a, vec![peer(End::B), other.clone()]);
    assert!(
        !pair.quiet_ping(End::A, End::B.inner4()),
        "it is the other's"
    );
    assert!(pair.ping(End::A, End::B.inner6(), 1), "this one stayed");
    let before = pair.a.stats().drops(DropReason::SourceNotAllowed);
    assert!(!pair.quiet_ping(End::B, End::A.inner4()));
    soon("counted", || {
        pair.a.stats().drops(DropReason::SourceNotAllowed) > before
    });
    set_peers(&pair.a, vec![other, peer(End::B)]);
    assert!(pair.ping(End::A, End::B.inner4(), 1), "the last one has it");
}

#[test]
fn a_keep_alive_starts_at_once_and_a_preshared_key_counts_from_the_next_handshake() {
    lab_or_skip!();
    let pair = device(Setup::default());
    endpoint(&pair, End::A, End::B.outer4());
    set_peers(
        &pair.a,
        vec![PeerConfig {
            persistent_keepalive: Some(25),
            ..peer(End::B)
        }],
    );
    soon("it handshakes by itself", || {
        pair.b.activity(PEER).last_handshake.is_some()
    });
    let secret = Zeroizing::new([5; 32]);
    for (dataplane, end) in [(&pair.a, End::B), (&pair.b, End::A)] {
        set_peers(
            dataplane,
            vec![PeerConfig {
                preshared_key: Some(secret.clone()),
                ..peer(end)
            }],
        );
    }
    assert!(pair.ping(End::A, End::B.inner4(), 2));
    pair.transfer(End::B, End::A.inner4(), MIB);
}

/// `../shared/protocol/uapi.md` 5.3: ten pings of 84 bytes in a fresh session.
#[test]
fn bytes_are_counted_as_wireguard_counts_them() {
    lab_or_skip!();
    let pair = device(Setup::default());
    endpoint(&pair, End::A, End::B.outer4());
    assert!(pair.ping(End::A, End::B.inner4(), 10));
    let data = 10 * 128;
    let keepalive = 32;
    soon("all is counted", || {
        let (a, b) = (pair.a.activity(PEER), pair.b.activity(PEER));
        a.rx_bytes >= data + 92 && b.rx_bytes >= a.tx_bytes
    });
    let (a, b) = (pair.a.activity(PEER), pair.b.activity(PEER));
    assert!(
        [data + 148, data + 148 + keepalive].contains(&a.tx_bytes),
        "{a:?}"
    );
    assert_eq!(a.rx_bytes, data + 92);
    assert_eq!(b.rx_bytes, a.tx_bytes);
    assert_eq!(b.tx_bytes, a.rx_bytes);
}

/// The kernel's own conformance test has this: a route by another interface takes precedence.
#[test]
fn answers_do_not_stick_when_the_route_moves_to_another_interface() {
    lab_or_skip!();
    for setup in drivers() {
        let pair = device(setup);
        let (a, b) = (pair.lab.name(End::A), pair.lab.name(End::B));
        run(&format!(
            "ip -n {a} link add v1 type veth peer name v1 netns {b}"
        ));
        run(&format!("ip -n {b} link set v1 up"));
        run(&format!("ip -n {a} addr add 192.0.2.3/24 dev v1"));
        run(&format!("ip -n {a} link set v1 up"));
        for name in [&a, &b] {
            for device in ["all", "v0", "v1"] {
                run(&format!(
                    "ip netns exec {name} sysctl -qw net.ipv4.conf.{device}.rp_filter=0"
                ));
            }
        }
        run(&format!("ip -n {a} route flush dev v0"));
        run(&format!("ip -n {a} route flush dev v1"));
        run(&format!(
            "ip -n {a} route add 192.0.2.0/24 dev v0 src 192.0.2.1 metric 2"
        ));
        endpoint(&pair, End::A, End::B.outer4());
        assert!(pair.ping(End::A, End::B.inner4(), 1));
        sees(&pair, End::B, End::A.outer4());
        run(&format!(
            "ip -n {a} route add 192.0.2.0/24 dev v1 src 192.0.2.3 metric 1"
        ));
        soon("the other end sees the new source", || {
            pair.quiet_ping(End::A, End::B.inner4())
                && pair.b.endpoint(PEER) == Some(at(&pair, End::A, addr("192.0.2.3")))
        });
    }
}

/// Where a route is replaced by taking it away first, nothing has moved.
#[test]
fn answers_stick_through_a_moment_without_a_route() {
    lab_or_skip!();
    for setup in drivers() {
        let pair = device(setup);
        let b = pair.lab.name(End::B);
        let second = addr("192.0.2.22");
        run(&format!("ip -n {b} addr add {second}/24 dev v0"));
        endpoint(&pair, End::A, second);
        assert!(pair.ping(End::A, End::B.inner4(), 1));
        let route = "192.0.2.0/24 dev v0 proto kernel scope link src 192.0.2.2";
        run(&format!("ip -n {b} route del {route}"));
        thread::sleep(Duration::from_millis(100));
        run(&format!("ip -n {b} route add {route}"));
        assert!(pair.ping(End::A, End::B.inner4(), 2));
        sees(&pair, End::A, second);
    }
}

/// Every inner and outer family, in super-packets.
#[test]
fn all_four_combinations_carry_super_packets() {
    lab_or_skip!();
    for setup in drivers() {
        let pair = device(setup);
        let used = pair.a.offloads();
        assert!(used.tso && used.uso && used.gso && used.gro, "{used:?}");
        for outer in [End::B.outer4(), End::B.outer6()] {
            endpoint(&pair, End::A, outer);
            for inner in [End::B.inner4(), End::B.inner6()] {
                // Where a machine stands still, TCP starts anew with small packets.
                let mut tries: Vec<_> = Vec::new();
                while tries.last().is_none_or(|last: &Batches| !last.are_large()) {
                    assert!(tries.len() < 5, "{inner} over {outer}: {tries:?}");
                    tries.push(batches(&pair, inner));
                }
                eprintln!("{inner} over {outer}: {tries:?}");
            }
        }
    }
}

/// How many packets went in how many operations, on their way from A to B.
#[derive(Debug)]
struct Batches {
    read: (u64, u64),
    sent: (u64, u64),
    received: (u64, u64),
    written: (u64, u64),
    datagrams: usize,
}

impl Batches {
    fn are_large(&self) -> bool {
        let over = |(packets, operations), ratio: u64| packets > ratio * operations;
        over(self.read, 6)
            && over(self.sent, 6)
            && over(self.received, 4)
            && over(self.written, 4)
            && self.datagrams == 40 * 20
    }
}

fn batches(pair: &Pair, inner: IpAddr) -> Batches {
    let before = (pair.a.stats().total(), pair.b.stats().total());
    pair.transfer(End::A, inner, 8 * MIB);
    let datagrams = udp_segments(pair, inner);
    let after = (pair.a.stats().total(), pair.b.stats().total());
    let a = |meter| after.0.get(meter) - before.0.get(meter);
    let b = |meter| after.1.get(meter) - before.1.get(meter);
    Batches {
        read: (a(Meter::TunPacketsIn), a(Meter::TunReads)),
        sent: (a(Meter::UdpPacketsOut), a(Meter::UdpSends)),
        received: (b(Meter::UdpPacketsIn), b(Meter::UdpReceives)),
        written: (b(Meter::TunPacketsOut), b(Meter::TunWrites)),
        datagrams,
    }
}

/// Sends 20 UDP super-packets of 40 datagrams of 1000 bytes and returns how many datagrams arrive.
fn udp_segments(pair: &Pair, to: IpAddr) -> usize {
    let receiver = pair.bind(End::B, to);
    let options = socket2::SockRef::from(&receiver);
    options.set_recv_buffer_size(4 * MIB).unwrap();
    let patience = Some(Duration::from_millis(500));
    receiver.set_read_timeout(patience).unwrap();
    let to = receiver.local_addr().unwrap();
    pair.lab.inside(End::A, || {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        support::send_in_trains_of(&socket, 1000);
        for _ in 0..20 {
            socket.send_to(&[6; 40_000], to).unwrap();
            thread::sleep(Duration::from_millis(2));
        }
    });
    let mut bytes = [0; 2000];
    std::iter::from_fn(|| receiver.recv(&mut bytes).ok())
        .inspect(|&len| assert_eq!(len, 1000))
        .count()
}

#[test]
fn the_interface_goes_down_and_up() {
    lab_or_skip!();
    for setup in drivers() {
        let pair = device(setup);
        endpoint(&pair, End::A, End::B.outer4());
        pair.transfer(End::A, End::B.inner4(), MIB);
        let a = pair.lab.name(End::A);
        for _ in 0..3 {
            run(&format!("ip -n {a} link set rt0 down"));
            // What arrives meanwhile cannot be written.
            assert!(!pair.quiet_ping(End::B, End::A.inner4()));
            idles(&pair);
            run(&format!("ip -n {a} link set rt0 up"));
            run(&format!(
                "ip -n {a} addr replace {}/64 dev rt0 nodad",
                End::A.inner6()
            ));
            assert!(pair.ping(End::B, End::A.inner4(), 2));
            assert!(pair.ping(End::A, End::B.inner6(), 2));
            pair.transfer(End::A, End::B.inner4(), 2 * MIB);
        }
        assert!(
            pair.wait_event(End::A, Duration::ZERO, |e| *e == Event::TunGone)
                .is_none(),
            "it was never gone"
        );
    }
}

#[test]
fn the_removal_of_the_interface_is_told_and_costs_nothing() {
    lab_or_skip!();
    let mut told = 0;
    for setup in drivers() {
        for up in [true, false] {
            let pair = joined(setup);
            assert!(pair.a.tun_is_there());
            let a = pair.lab.name(End::A);
            if !up {
                run(&format!("ip -n {a} link set rt0 down"));
            }
            run(&format!("ip -n {a} link del rt0"));
            let limit = Duration::from_secs(5);
            let event = pair.wait_event(End::A, limit, |e| *e == Event::TunGone);
            // Once in hundreds of times the kernel does not wake any shard.
            told += usize::from(event.is_some());
            assert!(!pair.a.tun_is_there(), "{setup:?} up {up}");
            idles(&pair);
            // And only once by each shard.
            let mut more = 0;
            while let Some(event) = pair.a.poll_event() {
                more += usize::from(event == Event::TunGone);
            }
            assert!(more < setup.shards, "{more} more");
        }
    }
    assert!(told > 0);
}

#[test]
fn jumbo_tunnels_work_and_what_is_too_large_for_the_underlay_is_fragmented() {
    lab_or_skip!();
    for mtu in [1420, 8900, 65_400] {
        let pair = device(Setup {
            mtu,
            ..Setup::default()
        });
        endpoint(&pair, End::A, End::B.outer4());
        pair.transfer(End::A, End::B.inner4(), 4 * MIB);
        pair.transfer(End::B, End::A.inner6(), 4 * MIB);
        pair.a.set_mtu(1280);
        run(&format!(
            "ip -n {} link set rt0 mtu 1280",
            pair.lab.name(End::A)
        ));
        pair.transfer(End::A, End::B.inner4(), MIB);
        let total = pair.a.stats().total();
        for reason in [
            DropReason::TooBig,
            DropReason::SendFailed,
            DropReason::SealFailed,
        ] {
            assert_eq!(total.drops(reason), 0, "{} at {mtu}", reason.name());
        }
    }
}
