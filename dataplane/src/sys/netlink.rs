//! Two questions for the kernel's routing: "has anything changed?" and "by which interface?"
//!
//! Messages are those of rtnetlink(7): a 16-byte `nlmsghdr` (length, type, flags, sequence, port),
//! a 12-byte `rtmsg`, then attributes of a 4-byte header (length, type) and a value, each padded to
//! 4 bytes. Numbers are in native order, addresses as on the wire.

use std::io::{self, Read as _};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::called;
use super::socket::socklen;

/// `RTMGRP_IPV4_ROUTE`, `RTMGRP_IPV4_RULE`, `RTMGRP_IPV6_ROUTE`, `RTNLGRP_IPV6_RULE`.
const GROUPS: u32 = 0x40 | 0x80 | 0x400 | 1 << 18;
/// `RTA_*` of `linux/rtnetlink.h`.
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_MARK: u16 = 16;
const HEADER_LEN: usize = 16;
const ROUTE_LEN: usize = 12;
/// One answer, or a batch of notices; what is longer is cut, which nobody minds.
const BUFFER_LEN: usize = 8192;
/// The kernel answers while the question is being sent; this is for one that does not.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(200);

/// Tells of changed routes and rules.
#[derive(Debug)]
pub(crate) struct RouteNotices(Socket);

/// Asks for routes.
#[derive(Debug)]
pub(crate) struct RouteQuery {
    socket: Socket,
    sequence: u32,
}

fn open(groups: u32) -> io::Result<Socket> {
    let routing = Some(Protocol::from(libc::NETLINK_ROUTE));
    let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, routing)?;
    // SAFETY: all-zero is a valid `sockaddr_nl`.
    let mut name: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    name.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).map_err(io::Error::other)?;
    name.nl_groups = groups;
    // SAFETY: `name` is readable for its length during the call.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const name).cast(),
            socklen(size_of_val(&name)),
        )
    };
    called(result).map(|_| socket)
}

impl RouteNotices {
    pub(crate) fn new() -> io::Result<RouteNotices> {
        let socket = open(GROUPS)?;
        socket.set_nonblocking(true)?;
        Ok(RouteNotices(socket))
    }

    /// Takes what has come. True if there was something, or more than the kernel could hold.
    pub(crate) fn take(&self) -> bool {
        let mut bytes = [0; BUFFER_LEN];
        let mut any = false;
        loop {
            match (&self.0).read(&mut bytes) {
                Ok(_) => any = true,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(_) => return any,
            }
        }
    }
}

impl AsFd for RouteNotices {
    /// Readable when something has changed.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl RouteQuery {
    pub(crate) fn new() -> io::Result<RouteQuery> {
        let socket = open(0)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let sequence = 0;
        Ok(RouteQuery { socket, sequence })
    }

    /// The interface by which a packet with this mark would leave from `from` to `to`.
    ///
    /// # Errors
    /// There is no such route, `from` is not ours, or the kernel does not answer.
    pub(crate) fn interface(&mut self, from: IpAddr, to: IpAddr, mark: u32) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let question = question(self.sequence, from, to, mark)?;
        self.socket.send(&question)?;
        let mut bytes = [0; BUFFER_LEN];
        loop {
            let len = self.socket.read(&mut bytes)?;
            // An answer to an older question, which came too late, is passed over.
            if let Some(answer) = answer(&bytes[..len], self.sequence) {
                return answer;
            }
        }
    }
}

fn octets(addr: IpAddr) -> ([u8; 16], usize) {
    let mut bytes = [0; 16];
    match addr {
        IpAddr::V4(addr) => {
            bytes[..4].copy_from_slice(&addr.octets());
            (bytes, 4)
        }
        IpAddr::V6(addr) => (addr.octets(), 16),
    }
}

fn question(sequence: u32, from: IpAddr, to: IpAddr, mark: u32) -> io::Result<Vec<u8>> {
    let family = if to.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let ((to, len), (from, _)) = (octets(to), octets(from));
    let bits = u8::try_from(len * 8).map_err(io::Error::other)?;
    let family = u8::try_from(family).map_err(io::Error::other)?;
    let mut message = vec![0; HEADER_LEN];
    message.extend([family, bits, bits, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut attribute = |kind: u16, value: &[u8]| {
        let len = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        message.extend(len.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(value);
    };
    attribute(RTA_DST, &to[..len]);
    attribute(RTA_SRC, &from[..len]);
    attribute(RTA_MARK, &mark.to_ne_bytes());
    let len = u32::try_from(message.len()).map_err(io::Error::other)?;
    let flags = u16::try_from(libc::NLM_F_REQUEST).map_err(io::Error::other)?;
    message[..4].copy_from_slice(&len.to_ne_bytes());
    message[4..6].copy_from_slice(&libc::RTM_GETROUTE.to_ne_bytes());
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
    message[8..12].copy_from_slice(&sequence.to_ne_bytes());
    Ok(message)
}

/// The interface an answer names, or its error; `None` if it answers something else.
fn answer(message: &[u8], sequence: u32) -> Option<io::Result<u32>> {
    let word = |at: usize| {
        let bytes = message.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_ne_bytes(*bytes))
    };
    if word(8)? != sequence {
        return None;
    }
    let kind = u16::from_ne_bytes([message[4], message[5]]);
    if i32::from(kind) == libc::NLMSG_ERROR {
        let errno = word(HEADER_LEN)?.cast_signed().checked_neg()?;
        return Some(Err(io::Error::from_raw_os_error(errno)));
    }
    let mut rest = message.get(HEADER_LEN + ROUTE_LEN..)?;
    while let Some([a, b, c, d]) = rest.first_chunk::<4>() {
        let len = usize::from(u16::from_ne_bytes([*a, *b]));
        let value = rest.get(4..len)?;
        if u16::from_ne_bytes([*c, *d]) == RTA_OIF {
            return Some(Ok(u32::from_ne_bytes(*value.first_chunk::<4>()?)));
        }
        rest = rest.get(len.next_multiple_of(4)..)?;
    }
    Some(Err(io::ErrorKind::InvalidData.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_ourselves_is_the_loopback() {
        let mut query = RouteQuery::new().unwrap();
        for addr in ["127.0.0.1", "::1"] {
            let addr: IpAddr = addr.parse().unwrap();
            assert_eq!(query.interface(addr, addr, 0).unwrap(), 1, "{addr}");
        }
        let (stranger, home) = ("192.0.2.99".parse().unwrap(), "127.0.0.1".parse().unwrap());
        let error = query.interface(stranger, home, 0).unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
    }

    #[test]
    fn nothing_is_told_while_nothing_changes() {
        assert!(!RouteNotices::new().unwrap().take());
    }

    #[test]
    fn broken_answers_are_errors_or_passed_over() {
        let mut message = vec![0; 64];
        message[8..12].copy_from_slice(&7u32.to_ne_bytes());
        assert!(answer(&message, 6).is_none());
        for len in 0..message.len() {
            for fill in [0, 1, 4, 200, 255] {
                let mut cut = message[..len].to_vec();
                cut.iter_mut().skip(28).for_each(|byte| *byte = fill);
                if let Some(Ok(interface)) = answer(&cut, 7) {
                    panic!("{interface} from {cut:?}");
                }
            }
        }
    }
}
