//! The sockets of a node: all on one port, in one reuse-port group per family.
//!
//! The first socket is bound plainly and told of reuse afterwards, so that a second program's bind
//! fails instead of joining; our own later sockets join. Indexes in the group are in order of
//! joining, and the steering program counts on that: data sockets, doors of the handshake thread,
//! discovery.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::steer::{self, Door};
use crate::config::share;
use crate::sys::socket::{attach_reuseport_filter, drops, set_int, tell_local, tell_tos};

/// A data socket's buffer in each direction in bytes, and what each has at least where there are so many
/// that together they would have more than the second. (The kernel takes twice as much, for what it
/// keeps with the packets.) One 64 KiB GSO batch is charged by its true size, which takes a large part
/// of the default: 25 % throughput and 100k retransmits.
pub(crate) const SOCKET_BUFFER: usize = 8 << 20;
pub(crate) const SOCKET_BUFFERS_MAX: usize = 32 << 20;
pub(crate) const SOCKET_BUFFER_MIN: usize = 1 << 20;
/// The control thread's and the handshake thread's sockets carry small datagrams.
pub(crate) const SMALL_SOCKET_BUFFER: usize = 1 << 20;
/// Those of the handshake thread that a flood alone can fill. Where everything else goes keeps the size
/// above, so that what comes while the thread waits for a core is not lost.
pub(crate) const DOOR_SOCKET_BUFFER: usize = 256 << 10;
/// Attempts to find a port that is free in both families.
const PORT_ATTEMPTS: usize = 16;

/// The two sockets of one thread; IPv6 is missing where the host has none.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) v4: UdpSocket,
    pub(crate) v6: Option<UdpSocket>,
}

impl Sockets {
    /// Those that there are.
    pub(crate) fn both(&self) -> impl Iterator<Item = &UdpSocket> {
        [Some(&self.v4), self.v6.as_ref()].into_iter().flatten()
    }
}

/// The sockets of the handshake thread, in the order of [`steer::Door`].
#[derive(Debug)]
pub(crate) struct Doors {
    doors: Vec<Arc<Sockets>>,
    shards: u32,
    discovery: bool,
    /// What IPv6 networks are told apart by in the steering program.
    salt: [u32; 2],
}

impl Doors {
    /// Those of each door, in order.
    pub(crate) fn each(&self) -> impl Iterator<Item = &Sockets> {
        self.doors.iter().map(|sockets| &**sockets)
    }

    /// What answers leave by; none where the host has not the family.
    pub(crate) fn towards(&self, to: SocketAddr) -> Option<&UdpSocket> {
        let sockets = self.doors.last()?;
        if to.is_ipv4() {
            Some(&sockets.v4)
        } else {
            sockets.v6.as_ref()
        }
    }

    /// From now on what comes from these addresses gets the door of those we know
    /// ([`steer::Door::Known`]).
    ///
    /// # Errors
    /// The kernel refuses the program, for its length as a rule; the one before stays.
    pub(crate) fn know(&self, addresses: &BTreeSet<IpAddr>) -> io::Result<()> {
        self.doors.iter().take(1).try_for_each(|sockets| {
            sockets.both().try_for_each(|socket| {
                let v6 = socket.local_addr()?.is_ipv6();
                let known = steer::Sources::new(v6, self.salt, addresses);
                let program = steer::program(self.shards, self.discovery, &known);
                attach_reuseport_filter(socket.as_fd(), &program)
            })
        })
    }
}

/// All sockets of a node, shared with the threads that use them.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) port: u16,
    /// One per shard.
    pub(crate) data: Vec<Arc<Sockets>>,
    pub(crate) handshake: Arc<Doors>,
    /// Non-blocking; none in device mode.
    pub(crate) discovery: Option<Arc<Sockets>>,
    /// Whether the kernel takes `UDP_SEGMENT` and `UDP_GRO`.
    pub(crate) gso: bool,
    pub(crate) gro: bool,
}

/// What [`Group::open`] is to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) port: u16,
    pub(crate) shards: usize,
    pub(crate) fwmark: u32,
    pub(crate) gso: bool,
    pub(crate) gro: bool,
    /// Device mode: all receives say where they arrived, and there is no discovery socket. Elsewhere
    /// those that are answered by themselves do: handshakes and discovery.
    pub(crate) device: bool,
}

impl Wanted {
    fn members(&self) -> usize {
        self.shards + Door::COUNT + usize::from(!self.device)
    }
}

impl Group {
    /// Opens, binds, sets up and steers all sockets.
    ///
    /// # Errors
    /// The port is taken, or a socket option that cannot be done without is refused. A host without
    /// IPv6 is not an error.
    pub(crate) fn open(wanted: Wanted) -> io::Result<Group> {
        let mut attempts = if wanted.port == 0 { PORT_ATTEMPTS } else { 1 };
        let (v4, v6, port) = loop {
            attempts -= 1;
            let v4 = members(
                SocketAddr::from((Ipv4Addr::UNSPECIFIED, wanted.port)),
                wanted,
            )?;
            let port = v4[0].local_addr()?.port();
            match members(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), wanted) {
                Ok(v6) => break (v4, Some(v6), port),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    if attempts == 0 {
                        return Err(error);
                    }
                }
                Err(error) => {
                    tracing::info!(%error, "no IPv6 here: the underlay is IPv4 only");
                    break (v4, None, port);
                }
            }
        };
        let mut pairs = pair_up(v4, v6);
        let discovery = if wanted.device { None } else { pairs.pop() };
        let handshake = Doors {
            doors: pairs.split_off(wanted.shards),
            shards: u32::try_from(wanted.shards).map_err(|_| io::ErrorKind::InvalidInput)?,
            discovery: discovery.is_some(),
            salt: rand::random(),
        };
        for socket in discovery.iter().flat_map(|sockets| sockets.both()) {
            socket.set_nonblocking(true)?;
        }
        let gso = wanted.gso && probe(&pairs, "UDP_SEGMENT", libc::UDP_SEGMENT, 0);
        let gro = wanted.gro && probe(&pairs, "UDP_GRO", libc::UDP_GRO, 1);
        Ok(Group {
            port,
            data: pairs,
            handshake: Arc::new(handshake),
            discovery,
            gso,
            gro,
        })
    }

    /// Sets the mark of every socket; what leaves from now on carries it. 0 is none.
    pub(crate) fn set_mark(&self, mark: u32) -> io::Result<()> {
        self.all()
            .try_for_each(|socket| SockRef::from(socket).set_mark(mark))
    }

    /// Datagrams that the kernel has dropped because a socket's buffer was full; those of the discovery
    /// socket are [`Self::discovery_drops`].
    pub(crate) fn overflowed(&self) -> u64 {
        let sockets = self.data.iter().chain(&self.handshake.doors);
        dropped(sockets)
    }

    /// Datagrams that the kernel has dropped for the discovery socket, because its buffer was full or a
    /// filter of its owner refused them: the kernel does not tell which.
    pub(crate) fn discovery_drops(&self) -> u64 {
        dropped(self.discovery.iter())
    }

    fn all(&self) -> impl Iterator<Item = &UdpSocket> {
        let sockets = self.data.iter().chain(&self.handshake.doors);
        sockets
            .chain(&self.discovery)
            .flat_map(|sockets| sockets.both())
    }
}

fn dropped<'a>(sockets: impl Iterator<Item = &'a Arc<Sockets>>) -> u64 {
    sockets
        .flat_map(|sockets| sockets.both())
        .map(|socket| u64::from(drops(socket.as_fd())))
        .sum()
}

/// Sets an offload on every data socket; false, with one log line, if the kernel refuses.
fn probe(data: &[Arc<Sockets>], what: &str, option: i32, value: i32) -> bool {
    let mut sockets = data.iter().flat_map(|sockets| sockets.both());
    let set = sockets.try_for_each(|s| set_int(s.as_fd(), libc::SOL_UDP, option, value));
    if let Err(error) = &set {
        tracing::warn!(%error, "the kernel refuses {what}: going on without");
    }
    set.is_ok()
}

fn pair_up(v4: Vec<UdpSocket>, v6: Option<Vec<UdpSocket>>) -> Vec<Arc<Sockets>> {
    let v6: Vec<Option<UdpSocket>> = match v6 {
        Some(v6) => v6.into_iter().map(Some).collect(),
        None => v4.iter().map(|_| None).collect(),
    };
    v4.into_iter()
        .zip(v6)
        .map(|(v4, v6)| Arc::new(Sockets { v4, v6 }))
        .collect()
}

/// Opens all members of one family's group, in order.
fn members(at: SocketAddr, wanted: Wanted) -> io::Result<Vec<UdpSocket>> {
    let first = member(at, wanted, true)?;
    let at = SocketAddr::new(at.ip(), first.local_addr()?.port());
    let mut sockets = vec![first];
    while sockets.len() < wanted.members() {
        sockets.push(member(at, wanted, false)?);
    }
    for (index, socket) in sockets.iter().enumerate() {
        let role = match index.checked_sub(wanted.shards) {
            None => Role::Data,
            Some(door) if door < Door::Others as usize => Role::Door,
            Some(_) => Role::Small,
        };
        set_up(socket, at, wanted, role)?;
    }
    let shards = u32::try_from(wanted.shards).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = steer::program(shards, !wanted.device, &steer::Sources::default());
    attach_reuseport_filter(sockets[0].as_fd(), &program)?;
    Ok(sockets)
}

/// Sets what becomes of datagrams that are larger than an MTU on their way.
///
/// Off, as data goes: no don't-fragment bit, since until path MTU discovery reaches the TUN a packet
/// too large for the underlay is better fragmented than lost. What the route says of its MTU does
/// not count over IPv4: a route that says less than the path's test has proved would have every
/// datagram cut in two here and cost us GSO; a router that must cut, cuts. IPv6 has no routers that
/// fragment, so there the host cuts by what the route says.
///
/// On, as probes of a path's MTU go: with the bit (over IPv6 unfragmented), whatever the route says
/// of its MTU. What is larger than the device's is refused with `EMSGSIZE`.
///
/// # Errors
/// When the socket is not of that family.
pub fn set_dont_fragment(socket: BorrowedFd<'_>, ipv6: bool, on: bool) -> io::Result<()> {
    let (level, name, value) = match (ipv6, on) {
        (false, false) => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_OMIT,
        ),
        (false, true) => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_PROBE,
        ),
        (true, false) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DONT,
        ),
        (true, true) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_PROBE,
        ),
    };
    set_int(socket, level, name, value)
}

fn member(at: SocketAddr, wanted: Wanted, first: bool) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(at), Type::DGRAM, Some(Protocol::UDP))?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if wanted.fwmark != 0 {
        socket.set_mark(wanted.fwmark)?;
    }
    if first {
        socket.bind(&at.into())?;
        socket.set_reuse_port(true)?;
    } else {
        socket.set_reuse_port(true)?;
        socket.bind(&at.into())?;
    }
    Ok(socket.into())
}

/// A data socket's buffer beside those of so many shards, in each direction.
pub(crate) fn data_buffer(shards: usize) -> usize {
    let sockets = 2 * shards;
    share(SOCKET_BUFFERS_MAX, sockets, SOCKET_BUFFER_MIN).min(SOCKET_BUFFER)
}

/// What a socket is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Data,
    Door,
    Small,
}

fn set_up(socket: &UdpSocket, at: SocketAddr, wanted: Wanted, role: Role) -> io::Result<()> {
    let fd = socket.as_fd();
    let size = match role {
        Role::Data => data_buffer(wanted.shards),
        Role::Door => DOOR_SOCKET_BUFFER,
        Role::Small => SMALL_SOCKET_BUFFER,
    };
    let size = i32::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    for (force, plain) in [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
    ] {
        // Forcing goes past the host's limit and needs CAP_NET_ADMIN; the plain call takes what the
        // limit allows.
        if set_int(fd, libc::SOL_SOCKET, force, size).is_err() {
            set_int(fd, libc::SOL_SOCKET, plain, size)?;
        }
    }
    if at.is_ipv4() && wanted.device {
        // The kernel cuts what is larger than the route's MTU, as it does for the kernel's own tunnel.
        let discover = libc::IP_PMTUDISC_DONT;
        set_int(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, discover)?;
    } else {
        set_dont_fragment(fd, at.is_ipv6(), false)?;
    }
    tell_tos(fd, at)?;
    if wanted.device || role != Role::Data {
        tell_local(fd, at)?;
    }
    debug_assert!(wanted.shards > 0, "checked by the configuration");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const WANTED: Wanted = Wanted {
        port: 0,
        shards: 2,
        fwmark: 0,
        gso: true,
        gro: true,
        device: false,
    };

    /// A member of the group, by its index there.
    fn socket(group: &Group, index: usize, v6: bool) -> &UdpSocket {
        let mut all = group.data.iter().chain(&group.handshake.doors);
        let sockets = all.nth(index).or(group.discovery.as_ref()).unwrap();
        if v6 {
            sockets.v6.as_ref().unwrap()
        } else {
            &sockets.v4
        }
    }

    /// Sends a datagram and sees to it that it comes out of the member of that index.
    fn reaches(group: &Group, from: &str, datagram: &[u8], index: usize) {
        let sender = UdpSocket::bind(from).unwrap();
        let v6 = sender.local_addr().unwrap().is_ipv6();
        let host: IpAddr = if v6 {
            Ipv6Addr::LOCALHOST.into()
        } else {
            Ipv4Addr::LOCALHOST.into()
        };
        sender.send_to(datagram, (host, group.port)).unwrap();
        let socket = socket(group, index, v6);
        socket.set_nonblocking(false).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let mut bytes = [0; 256];
        let len = socket
            .recv(&mut bytes)
            .unwrap_or_else(|e| panic!("{datagram:?} from {from}: {e}"));
        assert_eq!(&bytes[..len], datagram);
    }

    fn initiation(mac2: [u8; 16]) -> [u8; 148] {
        let mut message = [0x55; 148];
        message[..4].copy_from_slice(&[1, 0, 0, 0]);
        message[132..].copy_from_slice(&mac2);
        message
    }

    /// Index in the group of a door, of two shards.
    fn door(door: Door) -> usize {
        2 + door as usize
    }

    #[test]
    fn handshake_messages_are_told_apart() {
        let group = Group::open(WANTED).unwrap();
        for from in ["127.0.0.1:0", "[::1]:0"] {
            let others = door(Door::Others);
            reaches(&group, from, &initiation([0; 16]), others);
            for at in 0..16 {
                let mut mac2 = [0; 16];
                mac2[at] = 1;
                reaches(&group, from, &initiation(mac2), door(Door::Proven));
            }
            // What is cut, or goes on, carries no cookie.
            reaches(&group, from, &initiation([1; 16])[..147], others);
            reaches(
                &group,
                from,
                &[&initiation([1; 16])[..], &[1]].concat(),
                others,
            );
            for (kind, len) in [(2, 92), (3, 64)] {
                let mut answer = vec![7; len];
                answer[..4].copy_from_slice(&[kind, 0, 0, 0]);
                reaches(&group, from, &answer, door(Door::Answers));
            }
        }
    }

    #[test]
    fn known_addresses_have_a_door_of_their_own_among_few_and_many() {
        let group = Group::open(WANTED).unwrap();
        let known: IpAddr = "127.0.0.3".parse().unwrap();
        for many in [0, 3, 40, 1500u32] {
            let others = (0..many).map(|n| IpAddr::from((0x7f00_0100 + n).to_be_bytes()));
            let networks = (0..many).map(|n| {
                IpAddr::from(Ipv6Addr::new(
                    0x2001,
                    0xdb8,
                    7,
                    u16::try_from(n).unwrap(),
                    1,
                    2,
                    3,
                    4,
                ))
            });
            let all = others.chain(networks);
            group.handshake.know(&all.chain([known]).collect()).unwrap();
            let mut answer = [9; 92];
            answer[..4].copy_from_slice(&[2, 0, 0, 0]);
            for message in [
                &answer[..],
                &initiation([0; 16]),
                &initiation([1; 16]),
                &[3, 0, 0, 0],
            ] {
                reaches(&group, "127.0.0.3:0", message, door(Door::Known));
            }
            for n in (0..many.min(900)).step_by(7) {
                let from = Ipv4Addr::from((0x7f00_0100 + n).to_be_bytes());
                reaches(&group, &format!("{from}:0"), &answer, door(Door::Known));
            }
            reaches(
                &group,
                "127.0.0.2:0",
                &initiation([0; 16]),
                door(Door::Others),
            );
            reaches(&group, "127.0.0.4:0", &answer, door(Door::Answers));
            reaches(&group, "[::1]:0", &answer, door(Door::Answers));
            reaches(&group, "127.0.0.3:0", &[4, 0, 0, 0, 0x77, 1, 1, 2], 1);
        }
        let loopback = BTreeSet::from([IpAddr::from(Ipv6Addr::LOCALHOST)]);
        group.handshake.know(&loopback).unwrap();
        reaches(&group, "[::1]:0", &initiation([0; 16]), door(Door::Known));
        reaches(
            &group,
            "127.0.0.3:0",
            &initiation([0; 16]),
            door(Door::Others),
        );
        group.handshake.know(&BTreeSet::new()).unwrap();
        reaches(&group, "[::1]:0", &initiation([0; 16]), door(Door::Others));
    }

    #[test]
    fn few_shards_have_large_buffers_and_many_share_as_much() {
        assert_eq!([1, 2].map(data_buffer), [SOCKET_BUFFER; 2]);
        for shards in 3..=crate::config::SHARDS_MAX {
            let size = data_buffer(shards);
            assert!(size == SOCKET_BUFFER_MIN || size * 2 * shards <= SOCKET_BUFFERS_MAX);
        }
        // What the sockets themselves say is twice as much; without the right to force it, less.
        let of_many = Wanted {
            shards: 8,
            ..WANTED
        };
        let group = Group::open(of_many).unwrap();
        for socket in group.data.iter().flat_map(|sockets| sockets.both()) {
            let socket = SockRef::from(socket);
            assert!(socket.recv_buffer_size().unwrap() <= 2 * data_buffer(8));
            assert!(socket.send_buffer_size().unwrap() <= 2 * data_buffer(8));
        }
    }

    #[test]
    fn every_message_reaches_its_socket() {
        let group = Group::open(WANTED).unwrap();
        let data = |shard: u8| [4, 0, 0, 0, 0x77, shard, 1, 2];
        let (answers, others) = (door(Door::Answers), door(Door::Others));
        let discovery = others + 1;
        let cases: [(&[u8], usize); 9] = [
            (&data(0), 0),
            (&data(1), 1),
            (&data(7), 1),
            (&[4, 0], 0),
            (&[1, 0, 0, 0, 9], others),
            (&[2, 0, 0, 0], answers),
            (&[3, 0, 0, 0, 5], answers),
            (&[1, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42], discovery),
            (b"TS\xf0\x9f\x92\xac", discovery),
        ];
        for (datagram, index) in cases {
            reaches(&group, "127.0.0.1:0", datagram, index);
        }
    }

    #[test]
    fn in_device_mode_the_handshake_thread_gets_the_rest() {
        let group = Group::open(Wanted {
            device: true,
            ..WANTED
        })
        .unwrap();
        assert!(group.discovery.is_none());
        for datagram in [&b"whatever"[..], &[1, 0, 0, 0, 9]] {
            reaches(&group, "127.0.0.1:0", datagram, door(Door::Others));
        }
    }

    #[test]
    fn what_the_kernel_drops_is_known() {
        let group = Group::open(Wanted {
            device: true,
            ..WANTED
        })
        .unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, group.port));
        assert_eq!(group.overflowed(), 0);
        for _ in 0..3 * SMALL_SOCKET_BUFFER / 1400 {
            sender.send_to(&[1; 1400], to).unwrap();
        }
        assert!(group.overflowed() > 0);
    }

    #[test]
    fn a_second_group_on_the_same_port_is_refused() {
        let group = Group::open(WANTED).unwrap();
        let error = Group::open(Wanted {
            port: group.port,
            ..WANTED
        })
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
