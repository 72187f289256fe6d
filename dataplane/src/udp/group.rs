//! The sockets of a node: all on one port, in one reuse-port group per family.
//!
//! The first socket is bound plainly and told of reuse afterwards, so that a second program's bind
//! fails instead of joining; our own later sockets join. Indexes in the group are in order of
//! joining, and the steering program counts on that: data sockets, handshake, discovery.

#![forbid(unsafe_code)]

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use socket2::{Domain, Protocol, Socket, Type};

use super::steer;
use crate::sys::socket::{attach_reuseport_filter, set_int};

/// Socket buffers in bytes. One 64 KiB GSO batch is charged by its true size, which takes a large
/// part of the default: 25 % throughput and 100k retransmits.
const SOCKET_BUFFER: usize = 8 << 20;
/// The control thread's and the handshake thread's sockets carry small datagrams.
const SMALL_SOCKET_BUFFER: usize = 1 << 20;
/// Attempts to find a port that is free in both families.
const PORT_ATTEMPTS: usize = 16;

/// The two sockets of one thread; IPv6 is missing where the host has none.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) v4: UdpSocket,
    pub(crate) v6: Option<UdpSocket>,
}

/// All sockets of a node.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) port: u16,
    /// One per shard.
    pub(crate) data: Vec<Sockets>,
    pub(crate) handshake: Sockets,
    /// Non-blocking.
    pub(crate) discovery: Sockets,
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
        let (Some(discovery), Some(handshake)) = (pairs.pop(), pairs.pop()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        discovery.v4.set_nonblocking(true)?;
        if let Some(v6) = &discovery.v6 {
            v6.set_nonblocking(true)?;
        }
        let gso = wanted.gso && probe(&pairs, "UDP_SEGMENT", libc::UDP_SEGMENT, 0);
        let gro = wanted.gro && probe(&pairs, "UDP_GRO", libc::UDP_GRO, 1);
        Ok(Group {
            port,
            data: pairs,
            handshake,
            discovery,
            gso,
            gro,
        })
    }
}

/// Sets an offload on every data socket; false, with one log line, if the kernel refuses.
fn probe(data: &[Sockets], what: &str, option: i32, value: i32) -> bool {
    for sockets in data {
        for socket in [Some(&sockets.v4), sockets.v6.as_ref()]
            .into_iter()
            .flatten()
        {
            if let Err(error) = set_int(socket.as_fd(), libc::SOL_UDP, option, value) {
                tracing::warn!(%error, "the kernel refuses {what}: going on without");
                return false;
            }
        }
    }
    true
}

fn pair_up(v4: Vec<UdpSocket>, v6: Option<Vec<UdpSocket>>) -> Vec<Sockets> {
    let v6: Vec<Option<UdpSocket>> = match v6 {
        Some(v6) => v6.into_iter().map(Some).collect(),
        None => v4.iter().map(|_| None).collect(),
    };
    v4.into_iter()
        .zip(v6)
        .map(|(v4, v6)| Sockets { v4, v6 })
        .collect()
}

/// Opens all members of one family's group, in order.
fn members(at: SocketAddr, wanted: Wanted) -> io::Result<Vec<UdpSocket>> {
    let first = member(at, wanted, true)?;
    let at = SocketAddr::new(at.ip(), first.local_addr()?.port());
    let mut sockets = vec![first];
    while sockets.len() < wanted.shards + 2 {
        sockets.push(member(at, wanted, false)?);
    }
    for (index, socket) in sockets.iter().enumerate() {
        set_up(socket, at, wanted, index < wanted.shards)?;
    }
    let shards = u32::try_from(wanted.shards).map_err(|_| io::ErrorKind::InvalidInput)?;
    attach_reuseport_filter(sockets[0].as_fd(), &steer::program(shards))?;
    Ok(sockets)
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

fn set_up(socket: &UdpSocket, at: SocketAddr, wanted: Wanted, data: bool) -> io::Result<()> {
    let fd = socket.as_fd();
    let size = if data {
        SOCKET_BUFFER
    } else {
        SMALL_SOCKET_BUFFER
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
    // No don't-fragment bit: until path MTU discovery reaches the TUN, a packet too large for the
    // underlay is better fragmented than lost.
    if at.is_ipv4() {
        set_int(
            fd,
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DONT,
        )?;
        set_int(fd, libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
    } else {
        set_int(
            fd,
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DONT,
        )?;
        set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
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
    };

    #[test]
    fn every_message_reaches_its_socket() {
        let group = Group::open(WANTED).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, group.port));
        let data = |shard: u8| [4, 0, 0, 0, 0x77, shard, 1, 2];
        let sockets = [
            &group.data[0].v4,
            &group.data[1].v4,
            &group.handshake.v4,
            &group.discovery.v4,
        ];
        let cases: [(&[u8], usize); 9] = [
            (&data(0), 0),
            (&data(1), 1),
            (&data(7), 1),
            (&[4, 0], 0),
            (&[1, 0, 0, 0, 9], 2),
            (&[2, 0, 0, 0], 2),
            (&[3, 0, 0, 0, 5], 2),
            (&[1, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42], 3),
            (b"TS\xf0\x9f\x92\xac", 3),
        ];
        for (datagram, index) in cases {
            sender.send_to(datagram, to).unwrap();
            let socket = sockets[index];
            socket.set_nonblocking(false).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(2)))
                .unwrap();
            let mut bytes = [0; 64];
            let len = socket
                .recv(&mut bytes)
                .unwrap_or_else(|e| panic!("{datagram:?}: {e}"));
            assert_eq!(&bytes[..len], datagram);
        }
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
