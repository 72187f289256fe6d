//! What the kernel may answer, and what has to follow: nothing is lost but what is counted, every buffer comes
//! home, every request is armed again, and traffic goes on.

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use super::super::{Driver, TUN_BUFFERS, UDP_BUFFERS};
use super::*;
use crate::config::DriverKind;
use crate::stats::{Published, Snapshot};
use crate::sys::EventFd;

/// Turns within which traffic goes on after one fault.
const TURNS_MAX: usize = 5;
/// Longer than any of them may take.
const WAIT: Duration = Duration::from_millis(200);

/// What a shard has around its driver; a pair of Unix sockets stands for the TUN.
struct Lab {
    tun: [UnixDatagram; 2],
    udp: Arc<Sockets>,
    bell: EventFd,
    far: UdpSocket,
}

impl Lab {
    fn new() -> Lab {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        for end in [&ours, &theirs] {
            end.set_nonblocking(true).unwrap();
        }
        let any = || UdpSocket::bind("127.0.0.1:0").unwrap();
        Lab {
            tun: [ours, theirs],
            udp: Arc::new(Sockets {
                v4: any(),
                v6: None,
            }),
            bell: EventFd::new().unwrap(),
            far: any(),
        }
    }

    fn sources(&self) -> Sources<'_> {
        Sources {
            tun: self.tun[0].as_fd(),
            udp: Arc::clone(&self.udp),
            wake: self.bell.as_fd(),
        }
    }

    /// One packet for the TUN, or one datagram, with a number in it.
    fn send(&self, to: Request, number: u8) {
        match to {
            Request::Tun => drop(self.tun[1].send(&[number; 100]).unwrap()),
            Request::Udp4 | Request::Udp6 => {
                let at: SocketAddr = self.udp.v4.local_addr().unwrap();
                self.far.send_to(&[number; 100], at).unwrap();
            }
            Request::Wake => self.bell.signal(),
        }
    }
}

/// What has come, and what was counted.
#[derive(Default)]
struct Seen {
    tun: Vec<TunRx>,
    udp: Vec<UdpRx>,
    rings: u8,
    counters: Counters,
}

impl Seen {
    fn turn(&mut self, driver: &mut Driver<'_>, bell: &EventFd) -> Found {
        let turn = driver.turn(Some(WAIT), &mut self.tun, &mut self.udp, &mut self.counters);
        let found = turn.expect("no fault of these ends a driver");
        if found.woken {
            bell.clear();
            self.rings += 1;
        }
        found
    }

    fn counted(&self) -> Snapshot {
        let published = Published::default();
        published.publish(&self.counters);
        published.read()
    }

    fn count(&self, of: Request) -> usize {
        match of {
            Request::Tun => self.tun.len(),
            Request::Udp4 | Request::Udp6 => self.udp.len(),
            Request::Wake => usize::from(self.rings),
        }
    }

    /// Until so many have come; the number of turns.
    fn until(
        &mut self,
        of: Request,
        count: usize,
        driver: &mut Driver<'_>,
        bell: &EventFd,
    ) -> usize {
        for turn in 0..=TURNS_MAX {
            if self.count(of) >= count {
                return turn;
            }
            self.turn(driver, bell);
        }
        panic!(
            "{of:?}: {} of {count} after {TURNS_MAX} turns",
            self.count(of)
        );
    }

    fn numbers(&self) -> [Vec<u8>; 2] {
        let last = |bytes: &[u8]| *bytes.last().unwrap();
        [
            self.tun.iter().map(|rx| last(rx.buf.bytes())).collect(),
            self.udp.iter().map(|rx| last(rx.buf.bytes())).collect(),
        ]
    }
}

fn driver(lab: &Lab, kind: DriverKind) -> Driver<'_> {
    Driver::new(kind, lab.sources()).expect("both drivers are there")
}

fn uring<'a, 'b>(driver: &'a mut Driver<'b>) -> &'a mut Uring<'b> {
    match driver {
        Driver::IoUring(uring) => uring,
        Driver::Epoll(_) => panic!("io_uring is asked for"),
    }
}

const KINDS: [DriverKind; 2] = [DriverKind::IoUring, DriverKind::Epoll];
/// There is no IPv6 socket here; its request is as the other's.
const REQUESTS: [Request; 3] = [Request::Tun, Request::Udp4, Request::Wake];

/// Every buffer is at home, or lent: as many as there are can be filled at once.
fn all_buffers_are_there(lab: &Lab, driver: &mut Driver<'_>) {
    let mut seen = Seen::default();
    for (of, count) in [(Request::Tun, TUN_BUFFERS), (Request::Udp4, UDP_BUFFERS)] {
        for number in 0..count {
            // A Unix socket holds fewer than there are buffers.
            lab.send(of, number.to_le_bytes()[0]);
            seen.until(of, usize::from(number) + 1, driver, &lab.bell);
        }
    }
}

#[test]
fn without_buffers_nothing_is_lost_and_reading_goes_on_when_one_comes_home() {
    for kind in KINDS {
        let lab = Lab::new();
        let mut driver = driver(&lab, kind);
        for (of, buffers) in [(Request::Tun, TUN_BUFFERS), (Request::Udp4, UDP_BUFFERS)] {
            for round in 0..3 {
                let mut seen = Seen::default();
                let buffers = usize::from(buffers);
                let (mut sent, mut came) = (0u8, Vec::<u8>::new());
                while seen.count(of) < buffers {
                    lab.send(of, sent);
                    sent += 1;
                    seen.until(of, usize::from(sent), &mut driver, &lab.bell);
                }
                // All are away; three more wait where they are.
                for _ in 0..3 {
                    lab.send(of, sent);
                    sent += 1;
                }
                for _ in 0..3 {
                    let found = seen.turn(&mut driver, &lab.bell);
                    let says = found.more || seen.counted().get(Meter::NoBuffers) > 0;
                    assert!(says, "{kind:?}, {of:?}, round {round}");
                }
                assert_eq!(seen.count(of), buffers, "{kind:?}");
                // One comes home, and one more is read; then all do.
                for (home, then) in [(1, buffers), (buffers, 2)] {
                    let [tun, udp] = seen.numbers();
                    let numbers = if of == Request::Tun { tun } else { udp };
                    came.extend(&numbers[..home]);
                    seen.tun.drain(..home.min(seen.tun.len()));
                    seen.udp.drain(..home.min(seen.udp.len()));
                    seen.until(of, then, &mut driver, &lab.bell);
                }
                let [tun, udp] = seen.numbers();
                came.extend(tun.iter().chain(&udp));
                assert!(came.iter().copied().eq(0..sent), "{kind:?}: {came:?}");
                assert_eq!(seen.counted().drops_total(), 0);
            }
        }
        all_buffers_are_there(&lab, &mut driver);
    }
}

#[test]
fn a_call_that_is_refused_for_now_loses_and_doubles_nothing() {
    let faults = [
        Some(libc::EBUSY),
        Some(libc::EAGAIN),
        Some(libc::EINTR),
        None,
    ];
    for fault in faults {
        let lab = Lab::new();
        let mut driver = driver(&lab, DriverKind::IoUring);
        let mut seen = Seen::default();
        // At the first call, with every request still to be submitted; then while they are armed.
        for round in 1..=3u8 {
            uring(&mut driver).lender.faults.calls = VecDeque::from([fault; 3]);
            for of in REQUESTS {
                lab.send(of, round);
            }
            for _ in 0..3 {
                seen.turn(&mut driver, &lab.bell);
            }
            for of in REQUESTS {
                seen.until(of, usize::from(round), &mut driver, &lab.bell);
            }
        }
        seen.turn(&mut driver, &lab.bell);
        assert_eq!(seen.numbers(), [[1, 2, 3]; 2], "{fault:?}");
        drop(seen);
        all_buffers_are_there(&lab, &mut driver);
        // And at the end, where what was lent has to come back.
        uring(&mut driver).lender.faults.calls = VecDeque::from([fault; 3]);
    }
}

#[test]
fn a_request_that_ends_with_an_error_is_armed_again_within_a_few_turns() {
    let errnos = [
        libc::ECANCELED,
        libc::EINTR,
        libc::EAGAIN,
        libc::ENOMEM,
        libc::ENOBUFS,
        libc::EIO,
        libc::ECONNREFUSED,
    ];
    for (of, errno) in REQUESTS
        .into_iter()
        .flat_map(|of| errnos.map(|errno| (of, errno)))
    {
        let lab = Lab::new();
        let mut driver = driver(&lab, DriverKind::IoUring);
        let mut seen = Seen::default();
        lab.send(of, 1);
        seen.until(of, 1, &mut driver, &lab.bell);
        let Uring { lender, states, .. } = uring(&mut driver);
        lender.faults.end = Some(errno);
        let tag = states[of as usize].tag(of);
        lender.cancel(of.source(), tag).expect("it is armed");
        seen.turn(&mut driver, &lab.bell);
        assert!(
            !uring(&mut driver).states[of as usize].armed,
            "{of:?}, {errno}"
        );
        lab.send(of, 2);
        seen.until(of, 2, &mut driver, &lab.bell);
        let drops = |reason| seen.counted().drops(reason);
        let counted = (
            drops(DropReason::TunReadFailed),
            drops(DropReason::UdpReadFailed),
            seen.counted().get(Meter::NoBuffers),
        );
        let want = match of {
            Request::Wake => (0, 0, u64::from(errno == libc::ENOBUFS)),
            _ if errno == libc::ENOBUFS => (0, 0, 1),
            Request::Tun => (1, 0, 0),
            Request::Udp4 | Request::Udp6 => (0, 1, 0),
        };
        assert_eq!(counted, want, "{of:?}, {errno}");
        drop(seen);
        all_buffers_are_there(&lab, &mut driver);
    }
}

#[test]
fn a_buffer_that_comes_with_an_error_comes_home_and_traffic_goes_on() {
    for of in [Request::Tun, Request::Udp4] {
        let lab = Lab::new();
        let mut driver = driver(&lab, DriverKind::IoUring);
        let mut seen = Seen::default();
        // As often as there are buffers, and once more.
        for round in 0..=TUN_BUFFERS {
            uring(&mut driver).lender.faults.spoilt = Some(libc::EIO);
            lab.send(of, 1);
            while uring(&mut driver).lender.faults.spoilt.is_some() {
                seen.turn(&mut driver, &lab.bell);
            }
            lab.send(of, 2);
            seen.until(of, 1, &mut driver, &lab.bell);
            seen.tun.clear();
            seen.udp.clear();
            let counted = seen.counted();
            let read_failed =
                counted.drops(DropReason::TunReadFailed) + counted.drops(DropReason::UdpReadFailed);
            assert_eq!(read_failed, u64::from(round) + 1, "{of:?}");
        }
        all_buffers_are_there(&lab, &mut driver);
    }
}

/// One that repeats at once does not spin the loop, and what it keeps away comes when it is over. A lack of
/// buffers while there are some is one too.
#[test]
fn an_error_that_repeats_makes_the_request_rest_for_longer_and_longer() {
    for (of, errno) in REQUESTS
        .into_iter()
        .flat_map(|of| [libc::EIO, libc::ENOBUFS].map(|errno| (of, errno)))
    {
        let lab = Lab::new();
        let mut driver = driver(&lab, DriverKind::IoUring);
        let mut seen = Seen::default();
        lab.send(of, 0);
        seen.until(of, 1, &mut driver, &lab.bell);
        uring(&mut driver).lender.faults.end = Some(errno);
        let mut rests = Vec::new();
        for _ in 0..8 {
            let Uring { lender, states, .. } = uring(&mut driver);
            let tag = states[of as usize].tag(of);
            lender.cancel(of.source(), tag).expect("it is armed");
            let mut turns = 0;
            while turns == 0 || !uring(&mut driver).states[of as usize].armed {
                turns += 1;
                driver
                    .turn(
                        Some(Duration::ZERO),
                        &mut seen.tun,
                        &mut seen.udp,
                        &mut seen.counters,
                    )
                    .unwrap();
            }
            rests.push(turns - 2);
        }
        assert_eq!(rests, [1, 2, 4, 8, 16, 32, 64, 64], "{of:?}, {errno}");
        lab.send(of, 1);
        seen.until(of, 2, &mut driver, &lab.bell);
        assert_eq!(uring(&mut driver).states[of as usize].rested, 0);
    }
}

/// Some kernels end a request with its last packet, and say so only by leaving out `F_MORE`.
#[test]
fn a_request_that_ends_with_a_packet_is_armed_again() {
    let lab = Lab::new();
    let mut driver = driver(&lab, DriverKind::IoUring);
    uring(&mut driver).lender.faults.single = true;
    let mut seen = Seen::default();
    for number in 1..=100 {
        for of in [Request::Tun, Request::Wake] {
            lab.send(of, number);
            let before = seen.count(of);
            seen.until(of, before + 1, &mut driver, &lab.bell);
        }
        if number % 10 == 0 {
            let [tun, _] = seen.numbers();
            assert!(tun.iter().copied().eq(number - 9..=number), "{tun:?}");
            seen.tun.clear();
        }
    }
    uring(&mut driver).lender.faults.single = false;
    all_buffers_are_there(&lab, &mut driver);
}

/// A real one: what a datagram of ours has brought back by ICMP.
#[test]
fn an_error_that_the_socket_has_kept_is_counted_and_traffic_goes_on() {
    for kind in KINDS {
        let lab = Lab::new();
        let mut driver = driver(&lab, kind);
        let mut seen = Seen::default();
        lab.send(Request::Udp4, 1);
        seen.until(Request::Udp4, 1, &mut driver, &lab.bell);
        let nobody = UdpSocket::bind("127.0.0.1:0").unwrap();
        let closed = nobody.local_addr().unwrap();
        drop(nobody);
        // Only a connected socket hears of it.
        lab.udp.v4.connect(closed).unwrap();
        lab.udp.v4.send(&[0]).unwrap();
        for _ in 0..3 {
            driver
                .turn(
                    Some(Duration::from_millis(20)),
                    &mut seen.tun,
                    &mut seen.udp,
                    &mut seen.counters,
                )
                .unwrap();
        }
        assert_eq!(
            seen.counted().drops(DropReason::UdpReadFailed),
            1,
            "{kind:?}"
        );
        lab.udp.v4.connect(lab.far.local_addr().unwrap()).unwrap();
        lab.send(Request::Udp4, 2);
        seen.until(Request::Udp4, 2, &mut driver, &lab.bell);
        drop(seen);
        all_buffers_are_there(&lab, &mut driver);
    }
}
