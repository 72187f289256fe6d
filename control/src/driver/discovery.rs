//! The discovery sockets: DISCO and STUN datagrams on the tunnel's own UDP port.
//!
//! The data plane opens them as members of its reuse-port group; here they are read in batches,
//! with the kernel's time of arrival and the address they were sent to, and written to. A datagram
//! for the wrong family or without a route is not an error worth ending anything: it is reported to
//! the caller by its errno. What is no STUN answer and bears no peer's DISCO key the kernel drops before
//! it takes room here ([`filter`]). What the kernel would send into our own tunnel has no route: somebody may
//! have put one there by hand.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use ringtail_dataplane::set_dont_fragment;
use socket2::{SockFilter, SockRef};
use std::os::fd::{AsFd as _, AsRawFd as _};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::clock::{now, since_1970, thread_time};
use super::interface::source_address;
use crate::disco::filter;
use crate::key::DiscoPublic;

/// Largest datagram read whole, in bytes: a jumbo probe fits.
const DATAGRAM_LEN_MAX: usize = 16 * 1024;
/// Datagrams of one family taken per wake-up, so that a flood leaves time for everything else, the
/// other family too.
const BATCH_LEN_MAX: usize = 32;

/// What the kernel said of an address counts so long.
const ROUTE_LIFE: Duration = Duration::from_secs(2);
/// Addresses it was asked about, at most.
const ROUTES_MAX: usize = 1024;

/// Both families of the discovery port.
pub struct Discovery {
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    buffer: Vec<u8>,
    routes: Routes,
    /// Our own addresses inside the tunnel.
    inner: BTreeSet<IpAddr>,
    /// Peers' keys, sorted.
    peers: Vec<DiscoPublic>,
}

/// Which of our addresses the kernel would send from: five system calls, so answers are kept a while.
#[derive(Debug)]
struct Routes {
    /// The sockets' mark. Without one, a socket that only asks would be routed otherwise than they are.
    fwmark: u32,
    answers: RefCell<BTreeMap<IpAddr, (Option<IpAddr>, Instant)>>,
}

impl Routes {
    fn source(&self, now: Instant, to: SocketAddr) -> Option<IpAddr> {
        let mut answers = self.answers.borrow_mut();
        if let Some((source, at)) = answers.get(&to.ip())
            && now.saturating_duration_since(*at) < ROUTE_LIFE
        {
            return *source;
        }
        if answers.len() >= ROUTES_MAX {
            answers.clear();
        }
        let source = source_address(to, self.fwmark);
        answers.insert(to.ip(), (source, now));
        source
    }
}

/// One datagram as it came.
#[derive(Debug, PartialEq, Eq)]
pub struct Datagram {
    /// When the kernel got it.
    pub at: Instant,
    /// The sender; IPv4 is never in its mapped IPv6 form.
    pub from: SocketAddr,
    /// Which of our addresses it was sent to, if the socket was told to say so.
    pub local: Option<IpAddr>,
    /// The payload.
    pub bytes: Vec<u8>,
}

impl Discovery {
    /// Takes over non-blocking sockets of the data plane, which carry this mark.
    ///
    /// # Errors
    /// When the runtime does not take them.
    pub fn new(
        v4: std::net::UdpSocket,
        v6: Option<std::net::UdpSocket>,
        fwmark: u32,
    ) -> anyhow::Result<Self> {
        let adopt = |socket: std::net::UdpSocket| -> anyhow::Result<UdpSocket> {
            socket.set_nonblocking(true)?;
            setsockopt(&socket, sockopt::ReceiveTimestampns, &true)
                .context("cannot get receive timestamps")?;
            UdpSocket::from_std(socket).context("cannot watch the discovery socket")
        };
        let sockets = Self {
            v4: adopt(v4)?,
            v6: v6.map(adopt).transpose()?,
            buffer: vec![0; DATAGRAM_LEN_MAX],
            routes: Routes {
                fwmark,
                answers: RefCell::default(),
            },
            inner: BTreeSet::new(),
            peers: Vec::new(),
        };
        sockets.filter();
        Ok(sockets)
    }

    /// From now on DISCO datagrams that bear one of these keys are let through.
    pub fn set_peers(&mut self, mut keys: Vec<DiscoPublic>) {
        keys.sort_unstable();
        keys.dedup();
        if self.peers != keys {
            self.peers = keys;
            self.filter();
        }
    }

    /// Has the kernel look at what comes. Where it does not take the program, for want of memory or
    /// because it must not, more comes here than need be: all of it is looked at again.
    fn filter(&self) {
        let programs = [filter::program(&self.peers), filter::any_sender()];
        for socket in [Some(&self.v4), self.v6.as_ref()].into_iter().flatten() {
            if let Err(error) = install(&SockRef::from(socket), &programs) {
                tracing::debug!(%error, "the kernel filters nothing for the discovery socket");
            }
        }
    }

    /// Takes our own addresses inside the tunnel.
    pub fn set_inner(&mut self, inner: BTreeSet<IpAddr>) {
        self.inner = inner;
        self.routes_changed();
    }

    /// What the kernel said before counts no more.
    pub fn routes_changed(&mut self) {
        self.routes.answers.get_mut().clear();
    }

    /// Which of our addresses to name in what is sent to `to`: none where routing chooses it anyway,
    /// lest it sticks when routing changes its mind.
    pub fn named_source(&self, to: SocketAddr, local: Option<IpAddr>) -> Option<IpAddr> {
        local.filter(|local| self.routes.source(now(), to) != Some(*local))
    }

    /// Whether what is sent to `to` would leave from an inner address, that is, through the TUN.
    fn leads_inside(&self, to: SocketAddr) -> bool {
        self.routes.fwmark != 0
            && !self.inner.is_empty()
            && self
                .routes
                .source(now(), to)
                .is_some_and(|source| self.inner.contains(&source))
    }

    /// Waits for datagrams and appends up to 32 of each family to `out`. Returns the [`thread_time`] at which
    /// that began.
    ///
    /// # Errors
    /// Only when waiting itself fails; errors of single datagrams are skipped.
    pub async fn receive(&mut self, out: &mut Vec<Datagram>) -> io::Result<Duration> {
        let never = std::future::pending;
        tokio::select! {
            ready = self.v4.readable() => ready?,
            ready = async {
                match &self.v6 {
                    Some(v6) => v6.readable().await,
                    None => never().await,
                }
            } => ready?,
        }
        let (clock, began) = (Clock::now(), thread_time());
        for socket in [Some(&self.v4), self.v6.as_ref()].into_iter().flatten() {
            for _ in 0..BATCH_LEN_MAX {
                match socket.try_io(Interest::READABLE, || {
                    read_one(socket, &mut self.buffer, &clock)
                }) {
                    Ok(Some(datagram)) => out.push(datagram),
                    Ok(None) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // ICMP errors of earlier sends surface here.
                    Err(_) => {}
                }
            }
        }
        Ok(began)
    }

    /// Sends one datagram, from `local` if that is still ours, else from where routing says, and with
    /// the don't-fragment bit if that is asked for.
    ///
    /// # Errors
    /// What the kernel said; `EAFNOSUPPORT` when the family is not to be had, `EMSGSIZE` when the
    /// datagram may not be fragmented and is larger than the device's MTU. `ENETUNREACH` also for what
    /// would go into our own tunnel.
    pub fn send(
        &self,
        to: SocketAddr,
        local: Option<IpAddr>,
        bytes: &[u8],
        dont_fragment: bool,
    ) -> io::Result<()> {
        let socket = match to {
            SocketAddr::V4(_) => &self.v4,
            SocketAddr::V6(_) => self
                .v6
                .as_ref()
                .ok_or_else(|| io::Error::from_raw_os_error(Errno::EAFNOSUPPORT as i32))?,
        };
        if self.leads_inside(to) {
            return Err(io::Error::from_raw_os_error(nix::libc::ENETUNREACH));
        }
        if !dont_fragment {
            return send_now(socket, to, local, bytes);
        }
        // The bit is the socket's, and only this thread sends from it.
        set_dont_fragment(socket.as_fd(), to.is_ipv6(), true)?;
        let sent = send_now(socket, to, local, bytes);
        set_dont_fragment(socket.as_fd(), to.is_ipv6(), false)?;
        sent
    }
}

/// Sends from `local` if that is still ours, else from where routing says.
fn send_now(
    socket: &UdpSocket,
    to: SocketAddr,
    local: Option<IpAddr>,
    bytes: &[u8],
) -> io::Result<()> {
    match send_from(socket, to, local, bytes) {
        Err(error) if local.is_some() && !is_about_datagram(error) => {
            Ok(send_from(socket, to, None, bytes)?)
        }
        result => Ok(result?),
    }
}

/// Whether leaving out the source would change nothing.
fn is_about_datagram(error: Errno) -> bool {
    use Errno::{EAGAIN, EMSGSIZE, ENOBUFS, EPERM};
    [EAGAIN, EMSGSIZE, ENOBUFS, EPERM].contains(&error)
}

/// Straight to the kernel: nobody waits for room here, and the runtime may not have noticed yet that
/// a new socket can be written to.
fn send_from(
    socket: &UdpSocket,
    to: SocketAddr,
    local: Option<IpAddr>,
    bytes: &[u8],
) -> nix::Result<()> {
    // Routing, which knows the source, picks the interface.
    let v4 = local.and_then(|ip| match ip {
        IpAddr::V4(ip) => Some(in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: in_addr {
                s_addr: u32::from_ne_bytes(ip.octets()),
            },
            ipi_addr: in_addr { s_addr: 0 },
        }),
        IpAddr::V6(_) => None,
    });
    let v6 = local.and_then(|ip| match ip {
        IpAddr::V6(ip) => Some(in6_pktinfo {
            ipi6_addr: in6_addr {
                s6_addr: ip.octets(),
            },
            ipi6_ifindex: 0,
        }),
        IpAddr::V4(_) => None,
    });
    let control: Vec<ControlMessage<'_>> = match to {
        SocketAddr::V4(_) => v4.iter().map(ControlMessage::Ipv4PacketInfo).collect(),
        SocketAddr::V6(_) => v6.iter().map(ControlMessage::Ipv6PacketInfo).collect(),
    };
    sendmsg(
        socket.as_raw_fd(),
        &[io::IoSlice::new(bytes)],
        &control,
        MsgFlags::MSG_DONTWAIT,
        Some(&SockaddrStorage::from(to)),
    )?;
    Ok(())
}

fn read_one(socket: &UdpSocket, buffer: &mut [u8], clock: &Clock) -> io::Result<Option<Datagram>> {
    let mut control = nix::cmsg_space!(nix::sys::time::TimeSpec, in6_pktinfo, [u8; 64]);
    let mut parts = [io::IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )
    .map_err(io::Error::from)?;
    let (mut stamp, mut local) = (None, None);
    for one in message.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmTimestampns(at) = one {
            stamp = Some(Duration::from(at));
        } else if let ControlMessageOwned::Ipv4PacketInfo(info) = one {
            local = Some(IpAddr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()));
        } else if let ControlMessageOwned::Ipv6PacketInfo(info) = one {
            local = Some(IpAddr::from(info.ipi6_addr.s6_addr));
        }
    }
    let (len, truncated) = (message.bytes, message.flags.contains(MsgFlags::MSG_TRUNC));
    let from = message.address.and_then(socket_addr);
    let Some(from) = from.filter(|_| !truncated) else {
        return Ok(None);
    };
    Ok(Some(Datagram {
        at: clock.instant_of(stamp),
        from,
        local,
        bytes: buffer[..len].to_vec(),
    }))
}

fn socket_addr(address: SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address
        .as_sockaddr_in()
        .map(|a| SocketAddr::from((a.ip(), a.port())));
    v4.or_else(|| {
        let v6 = address.as_sockaddr_in6()?;
        Some(match v6.ip().to_canonical() {
            IpAddr::V4(ip) => (ip, v6.port()).into(),
            IpAddr::V6(_) => SocketAddr::V6((*v6).into()),
        })
    })
}

/// One reading of both clocks, to carry the kernel's wall-clock stamps over to `Instant`.
struct Clock {
    monotonic: Instant,
    realtime: Duration,
}

impl Clock {
    fn now() -> Self {
        Self {
            monotonic: now(),
            realtime: since_1970(),
        }
    }

    /// A stamp of the future, or one older than a second (the wall clock was set), counts as now.
    fn instant_of(&self, stamp: Option<Duration>) -> Instant {
        let age = stamp
            .and_then(|stamp| self.realtime.checked_sub(stamp))
            .unwrap_or_default();
        if age > Duration::from_secs(1) {
            return self.monotonic;
        }
        self.monotonic.checked_sub(age).unwrap_or(self.monotonic)
    }
}

/// Puts the first of the programs that the kernel takes in the place of the last. If it takes none, none is
/// left: the last would keep new peers out.
fn install(socket: &SockRef<'_>, programs: &[Vec<SockFilter>]) -> io::Result<()> {
    let mut result = Ok(());
    for program in programs {
        // A socket has room (`optmem_max`) for the old and the new together, or not.
        result = socket.attach_filter(program).or_else(|_| {
            let _none_was_there = socket.detach_filter();
            socket.attach_filter(program)
        });
        if result.is_ok() {
            break;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: DiscoPublic = DiscoPublic([7; 32]);

    /// What the kernel lets through once [`PEER`] is one.
    fn datagram(len: usize) -> Vec<u8> {
        let mut bytes = [&ringtail_dataplane::DISCO_MAGIC[..], &PEER.0].concat();
        bytes.resize(len, 0);
        bytes
    }

    /// Both families on loopback, and where they are.
    fn on_loopback() -> (Discovery, SocketAddr, SocketAddr) {
        let [v4, v6] = ["127.0.0.1:0", "[::1]:0"].map(|at| std::net::UdpSocket::bind(at).unwrap());
        let (to4, to6) = (v4.local_addr().unwrap(), v6.local_addr().unwrap());
        (Discovery::new(v4, Some(v6), 0).unwrap(), to4, to6)
    }

    #[tokio::test(flavor = "local")]
    async fn datagrams_of_both_families_arrive_with_their_time() {
        let (mut sockets, to4, to6) = on_loopback();
        sockets.set_peers(vec![PEER]);
        let before = Clock::now().monotonic;
        let (four, six) = (datagram(104), datagram(106));
        sockets.send(to4, None, &four, false).unwrap();
        sockets.send(to6, None, &six, false).unwrap();
        let mut got = Vec::new();
        while got.len() < 2 {
            sockets.receive(&mut got).await.unwrap();
        }
        got.sort_by_key(|datagram| datagram.bytes.len());
        assert!(got[0].bytes == four && got[0].from == to4);
        assert!(got[1].bytes == six && got[1].from == to6);
        for datagram in &got {
            assert!(datagram.at >= before && datagram.at <= Clock::now().monotonic);
        }
    }

    #[tokio::test(flavor = "local")]
    async fn a_flood_of_one_family_is_read_in_parts_and_junk_not_at_all() {
        let (mut sockets, to4, to6) = on_loopback();
        let strangers = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        // Before there are peers, and a key that is none's.
        strangers.send_to(&datagram(124), to4).unwrap();
        sockets.set_peers(vec![PEER]);
        let mut other = datagram(124);
        other[6] ^= 1;
        for _ in 0..50 {
            for junk in [&b"junk"[..], &[0; 1200], &other] {
                strangers.send_to(junk, to4).unwrap();
            }
            strangers.send_to(&datagram(124), to4).unwrap();
        }
        sockets.send(to6, None, &datagram(124), false).unwrap();
        let mut got = Vec::new();
        let mut of_batches = Vec::new();
        while got.len() < 51 {
            let before = got.len();
            sockets.receive(&mut got).await.unwrap();
            of_batches.push(got.len() - before);
        }
        assert!(of_batches == [33, 18], "{of_batches:?}");
        assert!(got[32].from == to6, "the other family has its turn");
        assert!(got.iter().all(|got| got.bytes == datagram(124)));
    }

    #[test]
    fn a_filter_that_the_kernel_does_not_take_leaves_no_old_one_in_force() {
        let to = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        to.set_nonblocking(true).unwrap();
        let from = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = SockRef::from(&to);
        let mut stranger = datagram(124);
        stranger[6] ^= 1;
        let arrives = |what: &[u8]| {
            from.send_to(what, to.local_addr().unwrap()).unwrap();
            to.recv(&mut [0; 200]).is_ok()
        };
        let peer = || filter::program(&[PEER]);
        let too_long = || (0..500).flat_map(|_| peer()).collect();
        for (programs, junk, other) in [
            (vec![peer()], false, false),
            (vec![too_long(), filter::any_sender()], false, true),
            (vec![peer()], false, false),
            (vec![too_long(), too_long()], true, true),
        ] {
            let installed = install(&socket, &programs);
            assert_eq!(installed.is_err(), junk);
            assert!(arrives(&datagram(124)));
            assert_eq!((arrives(b"junk"), arrives(&stranger)), (junk, other));
        }
    }

    #[tokio::test(flavor = "local")]
    async fn what_would_leave_from_an_inner_address_has_no_route() {
        let probe = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        if SockRef::from(&probe).set_mark(1).is_err() {
            println!("skipped: marks need CAP_NET_ADMIN");
            return;
        }
        for (mark, inner, refused) in [
            (1, "127.0.0.1", true),
            (1, "10.7.0.1", false),
            (0, "127.0.0.1", false),
        ] {
            let v4 = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            let to = v4.local_addr().unwrap();
            let mut sockets = Discovery::new(v4, None, mark).unwrap();
            sockets.set_inner(BTreeSet::from([inner.parse().unwrap()]));
            let sent = sockets.send(to, None, b"ping", false);
            let errno = sent.err().and_then(|error| error.raw_os_error());
            assert!(errno == refused.then_some(nix::libc::ENETUNREACH));
        }
    }

    #[tokio::test(flavor = "local")]
    async fn only_what_may_be_fragmented_is_larger_than_the_device() {
        // Loopback carries 64 KiB: a little less than a UDP payload over IPv6 can be.
        let (sockets, _, to) = on_loopback();
        let bytes = vec![0; 65_527];
        for _ in 0..2 {
            let refused = sockets.send(to, None, &bytes, true).unwrap_err();
            assert!(refused.raw_os_error() == Some(nix::libc::EMSGSIZE));
            sockets.send(to, None, &bytes, false).unwrap();
        }
    }

    #[tokio::test(flavor = "local")]
    async fn an_answer_leaves_from_the_address_that_the_question_was_sent_to() {
        let v4 = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        setsockopt(&v4, sockopt::Ipv4PacketInfo, &true).unwrap();
        let port = v4.local_addr().unwrap().port();
        let mut sockets = Discovery::new(v4, None, 0).unwrap();
        sockets.set_peers(vec![PEER]);
        let peer = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let ours: IpAddr = "127.0.0.9".parse().unwrap();
        peer.send_to(&datagram(124), (ours, port)).await.unwrap();
        let mut got = Vec::new();
        sockets.receive(&mut got).await.unwrap();
        assert!(got[0].local == Some(ours));
        let strangers: IpAddr = "192.0.2.9".parse().unwrap();
        for (local, from) in [
            (Some(ours), "127.0.0.9"),
            (None, "127.0.0.1"),
            // No longer ours: the datagram leaves all the same.
            (Some(strangers), "127.0.0.1"),
        ] {
            sockets.send(got[0].from, local, b"pong", false).unwrap();
            let (_, seen) = peer.recv_from(&mut [0; 16]).await.unwrap();
            assert!(
                seen == (from.parse::<IpAddr>().unwrap(), port).into(),
                "{seen}"
            );
        }
    }

    #[tokio::test(flavor = "local")]
    async fn the_kernel_is_asked_for_a_source_once_in_two_seconds_and_after_a_change() {
        let v4 = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut sockets = Discovery::new(v4, None, 0).unwrap();
        let to = SocketAddr::from(([127, 0, 0, 1], 9));
        let (true_one, false_one) = (to.ip(), IpAddr::from([127, 0, 0, 9]));
        let asked = now();
        let source = |sockets: &Discovery, age| {
            let at = asked + Duration::from_millis(age);
            sockets.routes.source(at, to)
        };
        assert!(source(&sockets, 0) == Some(true_one));
        let lie = |sockets: &mut Discovery| {
            let answers = sockets.routes.answers.get_mut();
            answers.insert(to.ip(), (Some(false_one), asked));
        };
        lie(&mut sockets);
        assert!(source(&sockets, 1_999) == Some(false_one));
        assert!(source(&sockets, 2_000) == Some(true_one));
        lie(&mut sockets);
        sockets.routes_changed();
        assert!(source(&sockets, 0) == Some(true_one));
        // What routing chooses anyway is not named.
        assert!(sockets.named_source(to, Some(true_one)).is_none());
        assert!(sockets.named_source(to, Some(false_one)) == Some(false_one));
    }

    #[test]
    fn a_stamp_from_a_clock_that_jumped_counts_as_now() {
        let clock = Clock::now();
        assert_eq!(
            clock.instant_of(Some(clock.realtime + Duration::from_secs(9))),
            clock.monotonic
        );
        assert_eq!(clock.instant_of(Some(Duration::ZERO)), clock.monotonic);
        let age = Duration::from_millis(5);
        assert_eq!(
            clock.instant_of(Some(clock.realtime - age)),
            clock.monotonic - age
        );
    }
}
