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

/// A driver, what has come by it, and what was counted.
struct Rig<'a> {
    lab: &'a Lab,
    driver: Driver<'a>,
    tun: Vec<TunRx>,
    udp: Vec<UdpRx>,
    rings: u8,
    counters: Counters,
}

impl<'a> Rig<'a> {
    fn new(lab: &'a Lab, kind: DriverKind) -> Rig<'a> {
        Rig {
            lab,
            driver: Driver::new(kind, lab.sources()).expect("both drivers are there"),
            tun: Vec::new(),
            udp: Vec::new(),
            rings: 0,
            counters: Counters::default(),
        }
    }

    fn uring(&mut self) -> &mut Uring<'a> {
        match &mut self.driver {
            Driver::IoUring(uring) => uring,
            Driver::Epoll(_) => panic!("io_uring is asked for"),
        }
    }

    /// Ends a request with an error.
    fn end(&mut self, of: Request, errno: i32) {
        let Uring { lender, states, .. } = self.uring();
        lender.faults.end = Some(errno);
        let tag = states[of as usize].tag(of);
        lender.cancel(of.source(), tag).expect("it is armed");
    }

    fn turn(&mut self, wait: Duration) -> Found {
        let (tun, udp) = (&mut self.tun, &mut self.udp);
        let turn = self.driver.turn(Some(wait), tun, udp, &mut self.counters);
        let found = turn.expect("no fault of these ends a driver");
        if found.woken {
            self.lab.bell.clear();
            self.rings += 1;
        }
        found
    }

    /// What has come is done with.
    fn forget(&mut self) {
        self.tun.clear();
        self.udp.clear();
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

    /// Until so many have come.
    fn until(&mut self, of: Request, count: usize) {
        for _ in 0..=TURNS_MAX {
            if self.count(of) >= count {
                return;
            }
            self.turn(WAIT);
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

    /// Every buffer is at home, or lent: as many as there are can be filled at once.
    fn all_buffers_are_there(&mut self) {
        self.forget();
        for (of, count) in [(Request::Tun, TUN_BUFFERS), (Request::Udp4, UDP_BUFFERS)] {
            for number in 0..count {
                // A Unix socket holds fewer than there are buffers.
                self.lab.send(of, number.to_le_bytes()[0]);
                self.until(of, usize::from(number) + 1);
            }
        }
        self.forget();
    }
}

const KINDS: [DriverKind; 2] = [DriverKind::IoUring, DriverKind::Epoll];
/// There is no IPv6 socket here; its request is as the other's.
const REQUESTS: [Request; 3] = [Request::Tun, Request::Udp4, Request::Wake];

#[test]
fn without_buffers_nothing_is_lost_and_reading_goes_on_when_one_comes_home() {
    for kind in KINDS {
        let lab = Lab::new();
        let mut rig = Rig::new(&lab, kind);
        for (of, buffers) in [(Request::Tun, TUN_BUFFERS), (Request::Udp4, UDP_BUFFERS)] {
            for round in 0..3 {
                rig.forget();
                rig.counters = Counters::default();
                let buffers = usize::from(buffers);
                let (mut sent, mut came) = (0u8, Vec::<u8>::new());
                while rig.count(of) < buffers {
                    lab.send(of, sent);
                    sent += 1;
                    rig.until(of, usize::from(sent));
                }
                // All are away; three more wait where they are.
                for _ in 0..3 {
                    lab.send(of, sent);
                    sent += 1;
                }
                for _ in 0..3 {
                    let found = rig.turn(WAIT);
                    let says = found.more || rig.counted().get(Meter::NoBuffers) > 0;
                    assert!(says, "{kind:?}, {of:?}, round {round}");
                }
                assert_eq!(rig.count(of), buffers, "{kind:?}");
                // One comes home, and one more is read; then all do.
                for (home, then) in [(1, buffers), (buffers, 2)] {
                    let [tun, udp] = rig.numbers();
                    let numbers = if of == Request::Tun { tun } else { udp };
                    came.extend(&numbers[..home]);
                    rig.tun.drain(..home.min(rig.tun.len()));
                    rig.udp.drain(..home.min(rig.udp.len()));
                    rig.until(of, then);
                }
                let [tun, udp] = rig.numbers();
                came.extend(tun.iter().chain(&udp));
                assert!(came.iter().copied().eq(0..sent), "{kind:?}: {came:?}");
                assert_eq!(rig.counted().drops_total(), 0);
            }
        }
        rig.all_buffers_are_there();
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
        let mut rig = Rig::new(&lab, DriverKind::IoUring);
        // At the first call, with every request still to be submitted; then while they are armed.
        for round in 1..=3u8 {
            rig.uring().lender.faults.calls = VecDeque::from([fault; 3]);
            for of in REQUESTS {
                lab.send(of, round);
            }
            for _ in 0..3 {
                rig.turn(WAIT);
            }
            for of in REQUESTS {
                rig.until(of, usize::from(round));
            }
        }
        rig.turn(WAIT);
        assert_eq!(rig.numbers(), [[1, 2, 3]; 2], "{fault:?}");
        rig.all_buffers_are_there();
        // And at the end, where what was lent has to come back.
        rig.uring().lender.faults.calls = VecDeque::from([fault; 3]);
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
        let mut rig = Rig::new(&lab, DriverKind::IoUring);
        lab.send(of, 1);
        rig.until(of, 1);
        rig.end(of, errno);
        rig.turn(WAIT);
        assert!(!rig.uring().states[of as usize].armed, "{of:?}, {errno}");
        lab.send(of, 2);
        rig.until(of, 2);
        let drops = |reason| rig.counted().drops(reason);
        let counted = (
            drops(DropReason::TunReadFailed),
            drops(DropReason::UdpReadFailed),
            rig.counted().get(Meter::NoBuffers),
        );
        let want = match of {
            Request::Wake => (0, 0, u64::from(errno == libc::ENOBUFS)),
            _ if errno == libc::ENOBUFS => (0, 0, 1),
            Request::Tun => (1, 0, 0),
            Request::Udp4 | Request::Udp6 => (0, 1, 0),
        };
        assert_eq!(counted, want, "{of:?}, {errno}");
        rig.all_buffers_are_there();
    }
}

#[test]
fn a_buffer_that_comes_with_an_error_comes_home_and_traffic_goes_on() {
    for of in [Request::Tun, Request::Udp4] {
        let lab = Lab::new();
        let mut rig = Rig::new(&lab, DriverKind::IoUring);
        // As often as there are buffers, and once more.
        for round in 0..=TUN_BUFFERS {
            rig.uring().lender.faults.spoilt = Some(libc::EIO);
            lab.send(of, 1);
            while rig.uring().lender.faults.spoilt.is_some() {
                rig.turn(WAIT);
            }
            lab.send(of, 2);
            rig.until(of, 1);
            rig.forget();
            let counted = rig.counted();
            let read_failed =
                counted.drops(DropReason::TunReadFailed) + counted.drops(DropReason::UdpReadFailed);
            assert_eq!(read_failed, u64::from(round) + 1, "{of:?}");
        }
        rig.all_buffers_are_there();
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
        let mut rig = Rig::new(&lab, DriverKind::IoUring);
        lab.send(of, 0);
        rig.until(of, 1);
        let mut rests = Vec::new();
        for _ in 0..8 {
            rig.end(of, errno);
            let mut turns = 0;
            while turns == 0 || !rig.uring().states[of as usize].armed {
                turns += 1;
                rig.turn(Duration::ZERO);
            }
            rests.push(turns - 2);
        }
        assert_eq!(rests, [1, 2, 4, 8, 16, 32, 64, 64], "{of:?}, {errno}");
        lab.send(of, 1);
        rig.until(of, 2);
        assert_eq!(rig.uring().states[of as usize].rested, 0);
    }
}

/// Some kernels end a request with its last packet, and say so only by leaving out `F_MORE`.
#[test]
fn a_request_that_ends_with_a_packet_is_armed_again() {
    let lab = Lab::new();
    let mut rig = Rig::new(&lab, DriverKind::IoUring);
    rig.uring().lender.faults.single = true;
    for number in 1..=100 {
        for of in [Request::Tun, Request::Wake] {
            lab.send(of, number);
            let before = rig.count(of);
            rig.until(of, before + 1);
        }
        if number % 10 == 0 {
            let [tun, _] = rig.numbers();
            assert!(tun.iter().copied().eq(number - 9..=number), "{tun:?}");
            rig.tun.clear();
        }
    }
    rig.uring().lender.faults.single = false;
    rig.all_buffers_are_there();
}

/// A real one: what a datagram of ours has brought back by ICMP.
#[test]
fn an_error_that_the_socket_has_kept_is_counted_and_traffic_goes_on() {
    for kind in KINDS {
        let lab = Lab::new();
        let mut rig = Rig::new(&lab, kind);
        lab.send(Request::Udp4, 1);
        rig.until(Request::Udp4, 1);
        let nobody = UdpSocket::bind("127.0.0.1:0").unwrap();
        let closed = nobody.local_addr().unwrap();
        drop(nobody);
        // Only a connected socket hears of it.
        lab.udp.v4.connect(closed).unwrap();
        lab.udp.v4.send(&[0]).unwrap();
        for _ in 0..3 {
            rig.turn(Duration::from_millis(20));
        }
        assert_eq!(
            rig.counted().drops(DropReason::UdpReadFailed),
            1,
            "{kind:?}"
        );
        lab.udp.v4.connect(lab.far.local_addr().unwrap()).unwrap();
        lab.send(Request::Udp4, 2);
        rig.until(Request::Udp4, 2);
        rig.all_buffers_are_there();
    }
}
