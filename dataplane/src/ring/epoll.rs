//! The epoll driver: readiness, then reads until nothing is left, bounded per turn.

#![forbid(unsafe_code)]

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::{Found, Sources, TUN_BUFFERS, TunRx, UDP_BUFFERS, UdpRx, means_gone};
use crate::packet::Pool;
use crate::stats::{Counters, DropReason};
use crate::sys::poll::Poll;
use crate::sys::socket::is_final;
use crate::sys::{read, socket};
use crate::udp::Sockets;

const TOKEN_TUN: u64 = 0;
const TOKEN_UDP4: u64 = 1;
const TOKEN_UDP6: u64 = 2;
const TOKEN_WAKE: u64 = 3;

/// Descriptors that were readable and have not yet said otherwise.
#[derive(Clone, Copy, Debug, Default)]
struct Ready {
    tun: bool,
    udp4: bool,
    udp6: bool,
}

pub(crate) struct Epoll<'a> {
    sources: Sources<'a>,
    poll: Poll,
    tun_pool: Pool,
    udp_pool: Pool,
    ready: Ready,
}

impl<'a> Epoll<'a> {
    pub(super) fn new(sources: Sources<'a>) -> io::Result<Epoll<'a>> {
        let poll = Poll::new()?;
        poll.add(sources.tun, TOKEN_TUN)?;
        watch(&poll, &sources.udp)?;
        poll.add(sources.wake, TOKEN_WAKE)?;
        Ok(Epoll {
            sources,
            poll,
            tun_pool: Pool::new(TUN_BUFFERS),
            udp_pool: Pool::new(UDP_BUFFERS),
            ready: Ready::default(),
        })
    }

    /// The old sockets leave the instance when their last descriptor is closed, which is not ours
    /// to know: they are taken out by hand.
    pub(super) fn rebind(&mut self, udp: Arc<Sockets>) -> io::Result<()> {
        for socket in self.sources.udp.both() {
            self.poll.remove(socket.as_fd())?;
        }
        watch(&self.poll, &udp)?;
        self.sources.udp = udp;
        Ok(())
    }

    pub(super) fn turn(
        &mut self,
        wait: Option<Duration>,
        tun: &mut Vec<TunRx>,
        udp: &mut Vec<UdpRx>,
        counters: &mut Counters,
    ) -> io::Result<Found> {
        let mut found = Found::default();
        let ready = &mut self.ready;
        self.poll.wait(wait, |token| match token {
            TOKEN_TUN => ready.tun = true,
            TOKEN_UDP4 => ready.udp4 = true,
            TOKEN_UDP6 => ready.udp6 = true,
            _ => found.woken = true,
        })?;
        if self.ready.udp4 {
            let udp4 = &self.sources.udp.v4;
            self.ready.udp4 = drain_udp(udp4, &mut self.udp_pool, udp, counters)?;
        }
        if let Some(udp6) = &self.sources.udp.v6
            && self.ready.udp6
        {
            self.ready.udp6 = drain_udp(udp6, &mut self.udp_pool, udp, counters)?;
        }
        if self.ready.tun {
            self.ready.tun = self.drain_tun(tun, &mut found, counters)?;
        }
        found.more = self.ready.tun || self.ready.udp4 || self.ready.udp6;
        Ok(found)
    }

    /// Reads packets until none is left (false) or no buffer is free (true).
    fn drain_tun(
        &mut self,
        tun: &mut Vec<TunRx>,
        found: &mut Found,
        counters: &mut Counters,
    ) -> io::Result<bool> {
        while let Some(mut buf) = self.tun_pool.take() {
            match read(self.sources.tun, buf.bytes_mut()) {
                // A TUN has no end.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => {
                    buf.narrow(0, len);
                    tun.push(TunRx { buf });
                }
                Err(libc::EAGAIN | libc::EINTR) => return Ok(false),
                Err(errno) if means_gone(errno) => {
                    // It would be readable for ever.
                    found.tun_gone = self.poll.remove(self.sources.tun).is_ok();
                    return Ok(false);
                }
                // It took the packet along, as a rule; the next turn tries again.
                Err(_) => {
                    counters.drop_one(DropReason::TunReadFailed);
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

fn watch(poll: &Poll, udp: &Sockets) -> io::Result<()> {
    poll.add(udp.v4.as_fd(), TOKEN_UDP4)?;
    match &udp.v6 {
        Some(udp6) => poll.add(udp6.as_fd(), TOKEN_UDP6),
        None => Ok(()),
    }
}

/// Receives until nothing is left (false) or no buffer is free (true).
fn drain_udp(
    socket: &UdpSocket,
    pool: &mut Pool,
    udp: &mut Vec<UdpRx>,
    counters: &mut Counters,
) -> io::Result<bool> {
    while let Some(mut buf) = pool.take() {
        match socket::receive(socket.as_fd(), buf.bytes_mut()) {
            Ok(Some(received)) => {
                if received.truncated {
                    counters.drop_one(DropReason::UdpTruncated);
                    continue;
                }
                buf.narrow(0, received.len);
                udp.push(UdpRx {
                    buf,
                    from: received.from,
                    ancillary: received.ancillary,
                });
            }
            Ok(None) => return Ok(false),
            Err(error) if error.raw_os_error().is_some_and(is_final) => return Err(error),
            // One the socket has kept for us, such as a bad ICMP; it is gone now, and the next turn goes on.
            Err(_) => {
                counters.drop_one(DropReason::UdpReadFailed);
                return Ok(false);
            }
        }
    }
    Ok(true)
}
