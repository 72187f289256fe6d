//! The io_uring driver: one multishot read of the TUN queue and one multishot `recvmsg` per socket,
//! each into a ring of provided buffers.
//!
//! The kernel takes a buffer only when a packet is there, and posts a completion per packet while
//! the request stays armed. A request ends (no `F_MORE`) when no buffer was left: nothing is lost,
//! the data stays in its queue, and the request is armed again once buffers have come home. Any
//! other error, and a lack of buffers where there are some, makes the driver hold back before it
//! arms again, for longer each time it repeats, because one that repeats at once would spin the
//! loop.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::RecvMsgOut;

use super::lender::{Lender, Source, layout_of_datagrams};
use super::{Found, Sources, TunRx, UdpRx, means_gone};
use crate::packet::PacketBuf;
use crate::stats::{Counters, DropReason, Meter};
use crate::sys::socket::{is_final, parse_control, parse_name};
use crate::udp::Sockets;

/// Turns a request rests after an error that will not end by itself: one after the first, twice as
/// many each time that nothing came in between, and this many at most.
const REST_TURNS_MAX: u32 = 64;
/// Waits are cut to this while a request rests.
const REST_WAIT: Duration = Duration::from_millis(10);
/// And to this while all buffers of a request are with other shards: they come home without a
/// bell, and packets are waiting.
const STARVED_WAIT: Duration = Duration::from_micros(100);

/// The armed requests, by the low byte of the tag; the rest counts the generations of sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Tun,
    Udp4,
    Udp6,
    Wake,
}

impl Request {
    const ALL: [Request; 4] = [Request::Tun, Request::Udp4, Request::Udp6, Request::Wake];

    fn source(self) -> Source {
        match self {
            Request::Tun => Source::Tun,
            Request::Udp4 | Request::Udp6 => Source::Udp,
            Request::Wake => Source::Bell,
        }
    }
}

const GENERATION_SHIFT: u32 = 8;

#[derive(Clone, Copy, Debug, Default)]
struct State {
    fd: Option<RawFd>,
    armed: bool,
    /// Turns left to rest, and how many they were the last time, if nothing has come since.
    rest: u32,
    rested: u32,
    /// Completions of an older generation are of a socket that was given up.
    generation: u64,
}

impl State {
    fn tag(&self, request: Request) -> u64 {
        request as u64 | self.generation << GENERATION_SHIFT
    }

    /// It has ended with an error.
    fn hold_back(&mut self) {
        self.rest = (2 * self.rested).clamp(1, REST_TURNS_MAX);
        self.rested = self.rest;
    }
}

pub(crate) struct Uring<'a> {
    lender: Lender,
    states: [State; 4],
    /// Keeps the descriptors open; dropped after the requests that are about them.
    sources: Sources<'a>,
}

impl<'a> Uring<'a> {
    /// Makes all that the driver needs and tries it, since limits and sandboxes may refuse any part.
    pub(super) fn new(sources: Sources<'a>) -> io::Result<Uring<'a>> {
        let lender = Lender::new()?;
        let mut states = [State::default(); 4];
        states[Request::Tun as usize].fd = Some(sources.tun.as_raw_fd());
        states[Request::Udp4 as usize].fd = Some(sources.udp.v4.as_raw_fd());
        states[Request::Udp6 as usize].fd = sources.udp.v6.as_ref().map(AsRawFd::as_raw_fd);
        states[Request::Wake as usize].fd = Some(sources.wake.as_raw_fd());
        Ok(Uring {
            lender,
            states,
            sources,
        })
    }

    /// Receives from other sockets. A request holds its socket, and with it the port, for as long
    /// as it is armed: those of the old ones are cancelled. What they have received already is
    /// handed out by the next turn.
    pub(super) fn rebind(&mut self, udp: Arc<Sockets>) {
        let fds = [
            (Request::Udp4, Some(udp.v4.as_raw_fd())),
            (Request::Udp6, udp.v6.as_ref().map(AsRawFd::as_raw_fd)),
        ];
        for (request, fd) in fds {
            let state = &mut self.states[request as usize];
            if state.armed {
                let cancelled = self.lender.cancel(Source::Udp, state.tag(request));
                if let Err(error) = cancelled {
                    tracing::debug!(%error, "an old receive cannot be cancelled");
                }
            }
            *state = State {
                fd,
                generation: state.generation + 1,
                ..State::default()
            };
        }
        self.sources.udp = udp;
    }

    pub(super) fn turn(
        &mut self,
        wait: Option<Duration>,
        tun: &mut Vec<TunRx>,
        udp: &mut Vec<UdpRx>,
        counters: &mut Counters,
    ) -> io::Result<Found> {
        self.lender.lend();
        let limit = self.arm();
        self.lender
            .enter([wait, limit].into_iter().flatten().min())?;
        self.reap(tun, udp, counters)
    }

    /// Arms what is not armed. Gives the longest wait until it should be tried again with what had
    /// to be left out.
    fn arm(&mut self) -> Option<Duration> {
        let mut limit: Option<Duration> = None;
        let mut leave_out = |wait: Duration| limit = Some(limit.map_or(wait, |l| l.min(wait)));
        for request in Request::ALL {
            let state = &mut self.states[request as usize];
            let Some(fd) = state.fd else { continue };
            if state.armed {
                continue;
            }
            if state.rest > 0 {
                state.rest -= 1;
                leave_out(REST_WAIT);
                continue;
            }
            if self.lender.is_starved(request.source()) {
                leave_out(STARVED_WAIT);
                continue;
            }
            state.armed = self.lender.arm(request.source(), fd, state.tag(request));
        }
        limit
    }

    fn reap(
        &mut self,
        tun: &mut Vec<TunRx>,
        udp: &mut Vec<UdpRx>,
        counters: &mut Counters,
    ) -> io::Result<Found> {
        let mut found = Found::default();
        let mut failed = None;
        for completion in self.lender.completions() {
            let [kind, ..] = completion.tag.to_le_bytes();
            let Some(request) = Request::ALL.get(usize::from(kind)).copied() else {
                continue;
            };
            let state = &mut self.states[request as usize];
            let mut given_up = State::default();
            let current = completion.tag == state.tag(request);
            let state = if current { state } else { &mut given_up };
            if !completion.more {
                state.armed = false;
            }
            let len = match completion.result {
                Ok(len) => len,
                Err(errno) => {
                    match (request, errno) {
                        (_, libc::ENOBUFS) => {
                            counters.add(Meter::NoBuffers, 1);
                            // Else it goes on as soon as a buffer comes home.
                            if !completion.starved {
                                state.hold_back();
                            }
                        }
                        (Request::Tun, errno) if means_gone(errno) => {
                            state.fd = None;
                            found.tun_gone = true;
                        }
                        // Of a socket that was given up it means nothing.
                        (_, errno) if is_final(errno) && current => {
                            failed = Some(io::Error::from_raw_os_error(errno));
                        }
                        (Request::Tun, _) => {
                            counters.drop_one(DropReason::TunReadFailed);
                            state.hold_back();
                        }
                        (Request::Udp4 | Request::Udp6, _) if current => {
                            counters.drop_one(DropReason::UdpReadFailed);
                            state.hold_back();
                        }
                        (Request::Udp4 | Request::Udp6 | Request::Wake, _) => state.hold_back(),
                    }
                    continue;
                }
            };
            state.rested = 0;
            match (request, completion.buffer) {
                (Request::Wake, _) => found.woken = true,
                // A TUN has no end.
                (Request::Tun, _) if len == 0 => {
                    failed = Some(io::ErrorKind::UnexpectedEof.into());
                }
                (Request::Tun, Some(buf)) => tun.push(TunRx { buf }),
                (Request::Udp4 | Request::Udp6, Some(buf)) => match datagrams(buf) {
                    Some(rx) => udp.push(rx),
                    None => counters.drop_one(DropReason::UdpTruncated),
                },
                // A completion without a buffer carries nothing.
                (Request::Tun | Request::Udp4 | Request::Udp6, None) => {}
            }
        }
        failed.map_or(Ok(found), Err)
    }
}

/// Turns a completed multishot receive into a batch: the buffer holds a 16-byte header, the source
/// address, control messages and the payload, the first three at their full reserved lengths.
fn datagrams(mut buf: PacketBuf) -> Option<UdpRx> {
    let len = buf.bytes().len();
    let (from, ancillary, payload_len) = {
        let out = RecvMsgOut::parse(buf.bytes(), layout_of_datagrams()).ok()?;
        if out.is_payload_truncated() || out.is_control_data_truncated() {
            return None;
        }
        (
            parse_name(out.name_data())?,
            parse_control(out.control_data()),
            out.payload_data().len(),
        )
    };
    buf.narrow(len - payload_len, payload_len);
    Some(UdpRx {
        buf,
        from,
        ancillary,
    })
}

#[cfg(test)]
#[path = "faults.rs"]
mod tests;
