//! Sending runs of equal datagrams: one GSO send where the kernel takes it, singly where not.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::Sockets;
use crate::sys::socket::{Leave, send, send_each, source_refused};

/// Bytes one send takes at most: a UDP payload over IPv4.
pub(crate) const SEND_BYTES_MAX: usize = 65_507;
/// Datagrams one GSO send takes at most. Newer kernels take 128, but where nothing on the way cuts the
/// send (veth) its receiver gets all of it at once: wireguard-go and tailscaled split no more than 64,
/// lose the batch, and stop reading the socket after ten of them. Nothing tells which peers are ours.
const SEGMENTS_MAX: usize = 64;

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
    /// The kernel refused the source asked for; the datagrams left from where routing said. False where
    /// they would not leave from there either, or not as a batch.
    pub(crate) source_refused: bool,
}

/// The two sockets of a shard, for sending.
#[derive(Debug)]
pub(crate) struct Sender {
    sockets: Arc<Sockets>,
    gso: bool,
}

impl Sender {
    /// Shares the sockets with the receiving side.
    pub(crate) fn new(sockets: Arc<Sockets>, gso: bool) -> Sender {
        Sender { sockets, gso }
    }

    /// Sends from other sockets from now on.
    pub(crate) fn rebind(&mut self, sockets: Arc<Sockets>) {
        self.sockets = sockets;
    }

    /// Whether batches leave as batches.
    pub(crate) fn gso(&self) -> bool {
        self.gso
    }

    /// Sends `bytes`, datagrams of `stride` bytes of which the last may be shorter. `singly` keeps
    /// GSO out of it. Never waits.
    pub(crate) fn send(
        &mut self,
        mut leave: Leave,
        bytes: &[u8],
        stride: usize,
        singly: bool,
    ) -> Sent {
        let mut total = Sent::default();
        let stride = stride.max(1);
        let mut rest = bytes;
        while !rest.is_empty() {
            let most = SEGMENTS_MAX.min(SEND_BYTES_MAX / stride).max(1) * stride;
            let (chunk, after) = rest.split_at(most.min(rest.len()));
            let singly = singly || total.gso_refused;
            let mut sent = self.send_chunk(&leave, chunk, stride, singly);
            if leave.local.is_some()
                && sent.datagrams == 0
                && sent.error.is_some_and(source_refused)
            {
                leave.local = None;
                total.calls += sent.calls;
                sent = self.send_chunk(&leave, chunk, stride, singly);
                // Where it goes no better without the source, that was not at fault.
                total.source_refused = sent.datagrams > 0 && !sent.gso_refused;
            }
            total.calls += sent.calls;
            total.datagrams += sent.datagrams;
            total.failed += sent.failed;
            total.gso_refused |= sent.gso_refused;
            total.error = total.error.or(sent.error);
            rest = after;
        }
        total
    }

    fn send_chunk(&mut self, leave: &Leave, chunk: &[u8], stride: usize, singly: bool) -> Sent {
        let to = leave.to;
        let datagrams = chunk.len().div_ceil(stride);
        let failure = |error, failed| Sent {
            datagrams: datagrams - failed,
            failed,
            calls: 1,
            error: Some(error),
            ..Sent::default()
        };
        let (Some(fd), Ok(size)) = (self.socket(to), u16::try_from(stride)) else {
            return failure(libc::EAFNOSUPPORT, datagrams);
        };
        let single = datagrams == 1;
        if single || (self.gso && !singly) {
            let error = match send(fd, leave, chunk, (!single).then_some(size)) {
                Ok(()) => {
                    return Sent {
                        datagrams,
                        calls: 1,
                        ..Sent::default()
                    };
                }
                Err(error) => error,
            };
            if single {
                return failure(error, 1);
            }
            match error {
                // The device under the route cannot do what segmentation needs.
                libc::EIO => {
                    self.gso = false;
                    tracing::warn!(
                        "the kernel refuses UDP GSO on the way to {to}: sending singly from now on"
                    );
                }
                // Which of the two is refused shows without the source.
                libc::EINVAL if leave.local.is_some() => return failure(error, datagrams),
                libc::EINVAL | libc::EMSGSIZE => {}
                other => return failure(other, datagrams),
            }
            let mut sent = self.send_singly(leave, chunk, size);
            sent.calls += 1;
            sent.gso_refused = true;
            return sent;
        }
        self.send_singly(leave, chunk, size)
    }

    fn send_singly(&self, leave: &Leave, chunk: &[u8], stride: u16) -> Sent {
        let datagrams = chunk.len().div_ceil(usize::from(stride));
        let Some(fd) = self.socket(leave.to) else {
            return Sent {
                failed: datagrams,
                error: Some(libc::EAFNOSUPPORT),
                ..Sent::default()
            };
        };
        let (sent, error) = send_each(fd, leave, chunk, stride);
        Sent {
            datagrams: sent,
            failed: datagrams - sent,
            calls: datagrams.div_ceil(SEGMENTS_MAX),
            error,
            ..Sent::default()
        }
    }

    fn socket(&self, to: SocketAddr) -> Option<BorrowedFd<'_>> {
        match to {
            SocketAddr::V4(_) => Some(self.sockets.v4.as_fd()),
            SocketAddr::V6(_) => self.sockets.v6.as_ref().map(AsFd::as_fd),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;
    use std::time::Duration;

    use super::*;
    use crate::sys::socket::{Local, receive, set_int, wait_readable};

    fn pair() -> (Sender, UdpSocket, SocketAddr) {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let to = receiver.local_addr().unwrap();
        let sockets = Sockets {
            v4: UdpSocket::bind("0.0.0.0:0").unwrap(),
            v6: None,
        };
        (Sender::new(Arc::new(sockets), true), receiver, to)
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
        let sent = sender.send(Leave::to(to), &[1; 350], 100, false);
        assert_eq!((sent.datagrams, sent.calls, sent.error), (4, 1, None));
        assert_eq!(lengths(&receiver, 4), [100, 100, 100, 50]);
    }

    /// Nothing cuts a send over loopback: a receiver that takes batches sees it as it left.
    #[test]
    fn no_send_has_more_datagrams_than_every_peer_can_split() {
        let (mut sender, receiver, to) = pair();
        set_int(receiver.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 1).unwrap();
        let mut bytes = [0; 65_535];
        // Sealed datagrams of a train of 100 bytes, and of TCP with an MSS of 536.
        for (stride, count) in [(10, 200), (160, 400), (608, 122)] {
            let sent = sender.send(Leave::to(to), &[1; 80_000][..stride * count], stride, false);
            assert_eq!((sent.datagrams, sent.error), (count, None));
            let mut left = count;
            while left > 0 {
                wait_readable(&[receiver.as_raw_fd()], 2000).unwrap();
                let received = receive(receiver.as_fd(), &mut bytes).unwrap().unwrap();
                let datagrams = received.len.div_ceil(stride);
                assert_eq!(datagrams, left.min(64), "of {count}");
                left -= datagrams;
            }
        }
    }

    #[test]
    fn singly_means_without_gso() {
        let (mut sender, receiver, to) = pair();
        let sent = sender.send(Leave::to(to), &[1; 250], 100, true);
        assert_eq!((sent.datagrams, sent.failed), (3, 0));
        assert!(!sent.gso_refused);
        assert_eq!(lengths(&receiver, 3), [100, 100, 50]);
    }

    #[test]
    fn a_family_without_socket_fails_whole() {
        let (mut sender, _receiver, _to) = pair();
        let sent = sender.send(Leave::to("[::1]:9".parse().unwrap()), &[1; 250], 100, false);
        assert_eq!((sent.datagrams, sent.failed), (0, 3));
        assert_eq!(sent.error, Some(libc::EAFNOSUPPORT));
    }

    #[test]
    fn a_source_that_is_gone_is_left_out() {
        let (mut sender, receiver, to) = pair();
        let leave = |addr: &str| Leave {
            local: Some(Local {
                addr: addr.parse().unwrap(),
                interface: 1,
            }),
            ..Leave::to(to)
        };
        let mut from = [0; 100];
        let sent = sender.send(leave("127.0.0.9"), &[1; 250], 100, false);
        assert_eq!((sent.datagrams, sent.source_refused), (3, false));
        let (_, source) = receiver.recv_from(&mut from).unwrap();
        assert_eq!(source.ip().to_string(), "127.0.0.9");
        assert_eq!(lengths(&receiver, 2), [100, 50]);
        for singly in [false, true] {
            let sent = sender.send(leave("192.0.2.9"), &[1; 250], 100, singly);
            assert_eq!((sent.datagrams, sent.failed, sent.error), (3, 0, None));
            assert!(sent.source_refused && !sent.gso_refused);
            assert_eq!(lengths(&receiver, 3), [100, 100, 50]);
        }
    }
}
