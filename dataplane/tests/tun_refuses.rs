//! A kernel that refuses every super-packet written to the TUN, as some releases do with kinds of them.
//!
//! What stands for it is a seccomp filter, under which `write` fails with EINVAL for what is longer than
//! any single packet. Nothing else here writes so much at once: sockets are sent to.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "../src/sys/bpf.rs"]
mod bpf;
#[path = "../src/sys/refuse.rs"]
mod refuse;
mod support;

use std::net::{IpAddr, UdpSocket};

use refuse::refuse;
use ringtail_dataplane::stats::{DropReason, Meter};
use ringtail_dataplane::tun::{Kind, Kinds};
use ringtail_dataplane::{DriverChoice, Offloads};
use support::{End, Pair, Setup, lab_or_skip, soon};

const MIB: usize = 1 << 20;
/// Refusals of one kind after which it is merged no more, times the super-packets of it that a batch has
/// beside the last one of them.
const REFUSED_MAX: u64 = 3 + 64;

/// Makes `write` of more than a packet fail with EINVAL, in this thread and those that it starts.
fn refuse_super_packets() {
    let longer = (2, libc::BPF_JGT, 1420 + 10);
    refuse(&[libc::SYS_write], longer, libc::EINVAL);
}

/// Numbered datagrams that leave in trains all come, in order: never more are on their way than have
/// room everywhere.
fn trains(pair: &Pair, to: IpAddr) {
    const TRAINS: u32 = 40;
    const TRAIN: u32 = 30;
    let receiver = pair.bind(End::B, to);
    let sender = pair.lab.inside(End::A, || {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(receiver.local_addr().unwrap()).unwrap();
        support::send_in_trains_of(&socket, 500);
        socket
    });
    let mut bytes = [0; 1000];
    for train in 0..TRAINS {
        let numbers = train * TRAIN..(train + 1) * TRAIN;
        let datagram = |number: u32| [number.to_be_bytes(); 125].concat();
        let all: Vec<u8> = numbers.clone().flat_map(datagram).collect();
        sender.send(&all).unwrap();
        for number in numbers {
            let len = receiver.recv(&mut bytes).expect("every datagram");
            assert_eq!(bytes[..len], datagram(number), "datagram {number}");
        }
    }
}

#[test]
fn what_the_kernel_refuses_is_written_singly_and_soon_not_merged_any_more() {
    lab_or_skip!();
    refuse_super_packets();
    for (driver, shards) in [(DriverChoice::Auto, 1), (DriverChoice::Epoll, 2)] {
        let pair = Pair::new(Setup {
            driver,
            ..Setup::with_shards(shards)
        });
        pair.direct();
        assert!(pair.ping(End::A, End::B.inner4(), 3));
        for to in [End::B.inner4(), End::B.inner6()] {
            pair.transfer(End::A, to, 8 * MIB);
            trains(&pair, to);
        }
        let total = pair.b.stats().total();
        assert_eq!(total.drops(DropReason::TunWriteFailed), 0);
        let used = pair.b.offloads();
        assert_eq!((used.merging, used.refused), (Kinds::NONE, Kinds::ALL));
        let most = REFUSED_MAX * shards as u64 * Kind::ALL.len() as u64;
        let refused = total.get(Meter::TunRefused);
        assert!((12..=most).contains(&refused), "{refused} refused");
        assert!(used.tso, "reads are another matter");

        // Now that nothing is merged, nothing is refused, and every packet is a write.
        pair.transfer(End::A, End::B.inner4(), MIB);
        let counted = || {
            let total = pair.b.stats().total();
            (total.get(Meter::TunWrites), total.get(Meter::TunPacketsOut))
        };
        soon("the counters to catch up", || counted().0 == counted().1);
        assert_eq!(pair.b.stats().total().get(Meter::TunRefused), refused);
    }

    // Whoever knows of the fault switches merging off from the start.
    let pair = Pair::new(Setup {
        offloads: Offloads {
            tun: false,
            ..Offloads::default()
        },
        ..Setup::default()
    });
    pair.direct();
    for to in [End::B.inner4(), End::B.inner6()] {
        pair.transfer(End::A, to, 4 * MIB);
        trains(&pair, to);
    }
    let used = pair.b.offloads();
    assert_eq!((used.merging, used.refused), (Kinds::NONE, Kinds::NONE));
    let total = pair.b.stats().total();
    assert_eq!(total.get(Meter::TunRefused), 0);
    assert_eq!(total.drops(DropReason::TunWriteFailed), 0);
}
