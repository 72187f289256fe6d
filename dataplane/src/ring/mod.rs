//! Waiting and receiving: two drivers behind one interface.
//!
//! A [`Driver`] owns the receive buffers of a shard and turns what arrives at its TUN queue and UDP
//! sockets into [`TunRx`] and [`UdpRx`]. One [`Driver::turn`] waits if told to, then hands out
//! everything that is there, bounded by the number of buffers. Sending is not its business: plain
//! system calls from the loop cost the same as submissions, so both drivers share that path.
//!
//! * [`uring`]: multishot reads and receives into provided buffers: many receives are pending at
//!   once, which is what makes small packets cheap. Needs Linux 6.7. What the kernel may write into is
//!   the business of [`lender`] alone, and of the buffers it has ([`provided`]).
//! * [`epoll`]: readiness, then reads until nothing is left. For older kernels, for sandboxes that
//!   forbid io_uring, and as the honest comparison.
//!
//! `faults` has both meet, in tests, what the kernel may answer.

mod epoll;
mod lender;
mod provided;
mod uring;

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::config::DriverKind;
use crate::packet::PacketBuf;
use crate::stats::Counters;
use crate::sys::socket::Ancillary;
use crate::udp::Sockets;

/// Buffers for TUN reads. Rings of provided buffers are first in, first out, so each buffer is
/// cycled through the cache; more help small packets, fewer help large ones.
pub(crate) const TUN_BUFFERS: u16 = 32;
/// Buffers for UDP receives of both families.
pub(crate) const UDP_BUFFERS: u16 = 8;

/// A packet or super-packet from the TUN, its virtio-net header in front.
#[derive(Debug)]
pub(crate) struct TunRx {
    pub(crate) buf: PacketBuf,
}

/// A datagram from the underlay, or several that GRO has put back to back.
#[derive(Debug)]
pub(crate) struct UdpRx {
    pub(crate) buf: PacketBuf,
    pub(crate) from: SocketAddr,
    /// Of all datagrams; `local` in device mode.
    pub(crate) ancillary: Ancillary,
}

/// What a driver receives from. The first and the last belong to the shard and outlive the driver.
#[derive(Clone)]
pub(crate) struct Sources<'a> {
    pub(crate) tun: BorrowedFd<'a>,
    pub(crate) udp: Arc<Sockets>,
    /// The shard's bell.
    pub(crate) wake: BorrowedFd<'a>,
}

/// What a turn found, besides packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// The bell was rung.
    pub(crate) woken: bool,
    /// More may be waiting: do not sleep before the next turn.
    pub(crate) more: bool,
    /// The TUN device is gone.
    pub(crate) tun_gone: bool,
}

/// Either driver.
pub(crate) enum Driver<'a> {
    IoUring(Box<uring::Uring<'a>>),
    Epoll(Box<epoll::Epoll<'a>>),
}

impl<'a> Driver<'a> {
    /// Makes a driver of the given kind on the calling thread, which must be the one that uses it. With
    /// io_uring everything it needs has been tried then.
    ///
    /// # Errors
    /// One line for people: what is missing.
    pub(crate) fn new(kind: DriverKind, sources: Sources<'a>) -> io::Result<Driver<'a>> {
        Ok(match kind {
            DriverKind::IoUring => Driver::IoUring(Box::new(uring::Uring::new(sources)?)),
            DriverKind::Epoll => Driver::Epoll(Box::new(epoll::Epoll::new(sources)?)),
        })
    }

    /// Receives from other UDP sockets from now on, and gives up the old ones.
    ///
    /// # Errors
    /// The kernel cannot watch them. The old ones are given up all the same.
    pub(crate) fn rebind(&mut self, udp: Arc<Sockets>) -> io::Result<()> {
        match self {
            Driver::IoUring(driver) => {
                driver.rebind(udp);
                Ok(())
            }
            Driver::Epoll(driver) => driver.rebind(udp),
        }
    }

    /// Waits up to `wait` (`None`: until something comes; zero: not at all) and appends what has
    /// arrived.
    ///
    /// # Errors
    /// It cannot go on: the kernel refuses to wait, or a source is none any more.
    pub(crate) fn turn(
        &mut self,
        wait: Option<Duration>,
        tun: &mut Vec<TunRx>,
        udp: &mut Vec<UdpRx>,
        counters: &mut Counters,
    ) -> io::Result<Found> {
        match self {
            Driver::IoUring(driver) => driver.turn(wait, tun, udp, counters),
            Driver::Epoll(driver) => driver.turn(wait, tun, udp, counters),
        }
    }
}

/// Errors of a TUN read that mean the device is gone rather than in a bad state.
fn means_gone(errno: i32) -> bool {
    matches!(
        errno,
        libc::EBADFD | libc::ENODEV | libc::EBADF | libc::ENXIO
    )
}
