//! Sending runs of equal datagrams: one GSO send where the kernel takes it, singly where not.

#![forbid(unsafe_code)]

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use super::Sockets;
use crate::sys::socket::{send, send_each};

/// Bytes one send takes at most: a UDP payload over IPv4.
pub(crate) const SEND_BYTES_MAX: usize = 65_507;
/// Datagrams one GSO send takes at most: `UDP_MAX_SEGMENTS` of newer kernels, and of older ones.
const SEGMENTS_MAX: usize = 128;
const SEGMENTS_MAX_OLD: usize = 64;

/// How a run went out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Datagrams the kernel took.
    pub(crate) datagrams: usize,
    /// Datagrams it did not take.
    pub(crate) failed: usize,
    /// System calls made.
    pub(crate) calls: usize,
    /// Why not: the first errno.
    pub(crate) error: Option<i32>,
    /// The kernel refused the batch but took its datagrams one by one: the path does not carry
    /// GSO, usually because its MTU is too small.
    pub(crate) gso_refused: bool,
}

/// The two sockets of a shard, for sending.
#[derive(Debug)]
pub(crate) struct Sender {
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    gso: bool,
    segments_max: usize,
}

impl Sender {
    /// Takes over the sockets (which the receiving side keeps duplicates of).
    pub(crate) fn new(sockets: Sockets, gso: bool) -> Sender {
        Sender {
            v4: sockets.v4,
            v6: sockets.v6,
            gso,
            segments_max: SEGMENTS_MAX,
        }
    }

    /// Whether batches leave as batches.
    pub(crate) fn gso(&self) -> bool {
        self.gso
    }

    /// Sends `bytes`, datagrams of `stride` bytes of which the last may be shorter, to `to`, with
    /// the TOS byte `tos`. `singly` keeps GSO out of it. Never waits.
    pub(crate) fn send(
        &mut self,
        to: SocketAddr,
        bytes: &[u8],
        stride: usize,
        tos: u8,
        singly: bool,
    ) -> Sent {
        let mut total = Sent::default();
        let stride = stride.max(1);
        let mut rest = bytes;
        while !rest.is_empty() {
            let most = self.segments_max.min(SEND_BYTES_MAX / stride).max(1) * stride;
            let (chunk, after) = rest.split_at(most.min(rest.len()));
            match self.send_chunk(to, chunk, stride, tos, singly || total.gso_refused) {
                Ok(sent) => {
                    total.datagrams += sent.datagrams;
                    total.failed += sent.failed;
                    total.calls += sent.calls;
                    total.gso_refused |= sent.gso_refused;
                    total.error = total.error.or(sent.error);
                    rest = after;
                }
                // The limits are lower now: cut again.
                Err(Again) => total.calls += 1,
            }
        }
        total
    }

    fn send_chunk(
        &mut self,
        to: SocketAddr,
        chunk: &[u8],
        stride: usize,
        tos: u8,
        singly: bool,
    ) -> Result<Sent, Again> {
        let datagrams = chunk.len().div_ceil(stride);
        let failure = |error, failed| Sent {
            datagrams: datagrams - failed,
            failed,
            calls: 1,
            error: Some(error),
            gso_refused: false,
        };
        let (Some(fd), Ok(size)) = (self.socket(to), u16::try_from(stride)) else {
            return Ok(failure(libc::EAFNOSUPPORT, datagrams));
        };
        let single = datagrams == 1;
        if single || (self.gso && !singly) {
            let error = match send(fd, to, chunk, (!single).then_some(size), tos) {
                Ok(()) => {
                    return Ok(Sent {
                        datagrams,
                        calls: 1,
                        ..Sent::default()
                    });
                }
                Err(error) => error,
            };
            if single {
                return Ok(failure(error, 1));
            }
            match error {
                // The device under the route cannot do what segmentation needs.
                libc::EIO => {
                    self.gso = false;
                    tracing::warn!(
                        "the kernel refuses UDP GSO on the way to {to}: sending singly from now on"
                    );
                }
                libc::EINVAL if datagrams > SEGMENTS_MAX_OLD => {
                    self.segments_max = SEGMENTS_MAX_OLD;
                    return Err(Again);
                }
                libc::EINVAL | libc::EMSGSIZE => {}
                other => return Ok(failure(other, datagrams)),
            }
            let mut sent = self.send_singly(to, chunk, size, tos);
            sent.calls += 1;
            sent.gso_refused = true;
            return Ok(sent);
        }
        Ok(self.send_singly(to, chunk, size, tos))
    }

    fn send_singly(&self, to: SocketAddr, chunk: &[u8], stride: u16, tos: u8) -> Sent {
        let datagrams = chunk.len().div_ceil(usize::from(stride));
        let Some(fd) = self.socket(to) else {
            return Sent {
                failed: datagrams,
                error: Some(libc::EAFNOSUPPORT),
                ..Sent::default()
            };
        };
        let (sent, error) = send_each(fd, to, chunk, stride, tos);
        Sent {
            datagrams: sent,
            failed: datagrams - sent,
            calls: datagrams.div_ceil(SEGMENTS_MAX_OLD),
            error,
            gso_refused: false,
        }
    }

    fn socket(&self, to: SocketAddr) -> Option<BorrowedFd<'_>> {
        match to {
            SocketAddr::V4(_) => Some(self.v4.as_fd()),
            SocketAddr::V6(_) => self.v6.as_ref().map(AsFd::as_fd),
        }
    }
}

/// The chunk was not sent; limits have been lowered.
struct Again;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn pair() -> (Sender, UdpSocket, SocketAddr) {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let to = receiver.local_addr().unwrap();
        let sockets = Sockets {
            v4: UdpSocket::bind("127.0.0.1:0").unwrap(),
            v6: None,
        };
        (Sender::new(sockets, true), receiver, to)
    }

    fn lengths(receiver: &UdpSocket, count: usize) -> Vec<usize> {
        let mut bytes = [0; 2000];
        (0..count)
            .map(|_| receiver.recv(&mut bytes).unwrap())
            .collect()
    }

    #[test]
    fn a_run_leaves_in_one_call() {
        let (mut sender, receiver, to) = pair();
        let sent = sender.send(to, &[1; 350], 100, 0, false);
        assert_eq!((sent.datagrams, sent.calls, sent.error), (4, 1, None));
        assert_eq!(lengths(&receiver, 4), [100, 100, 100, 50]);
    }

    #[test]
    fn a_run_longer_than_the_limit_is_cut() {
        let (mut sender, receiver, to) = pair();
        let sent = sender.send(to, &[1; 10 * 200], 10, 0, false);
        assert_eq!((sent.datagrams, sent.error), (200, None));
        assert!(sent.calls >= 2);
        assert_eq!(lengths(&receiver, 200), vec![10; 200]);
    }

    #[test]
    fn singly_means_without_gso() {
        let (mut sender, receiver, to) = pair();
        let sent = sender.send(to, &[1; 250], 100, 0, true);
        assert_eq!((sent.datagrams, sent.failed), (3, 0));
        assert!(!sent.gso_refused);
        assert_eq!(lengths(&receiver, 3), [100, 100, 50]);
    }

    #[test]
    fn a_family_without_socket_fails_whole() {
        let (mut sender, _receiver, _to) = pair();
        let sent = sender.send("[::1]:9".parse().unwrap(), &[1; 250], 100, 0, false);
        assert_eq!((sent.datagrams, sent.failed), (0, 3));
        assert_eq!(sent.error, Some(libc::EAFNOSUPPORT));
    }
}
