//! Cuts super-packets into segments at the tail of a send run, and seals the run.
//!
//! A run is what one GSO send takes: datagrams of one length back to back, of which only the last
//! may be shorter, for one peer and with one TOS byte. It closes at the first shorter datagram, at
//! the kernel's limits, and when peer or TOS change; a super-packet that does not fit whole leaves
//! its rest in the next run, where the next super-packet joins it (48 segments are 45 and 3).

#![forbid(unsafe_code)]

use crate::channel::PeerId;
use crate::packet::ecn;
use crate::peer::{Addressee, Kind};
use crate::session::{BATCH_MAX, Engine, MESSAGE_LEN_MAX};
use crate::shard::context::Context;
use crate::stats::DropReason;
use crate::tun::segment::Plan;
use crate::udp::SEND_BYTES_MAX;

/// Memory of a run: a full send, and room behind it for the engine's largest message.
pub(crate) const RUN_LEN: usize = SEND_BYTES_MAX + MESSAGE_LEN_MAX;

/// Sealed datagrams of one peer on their way out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch<'a> {
    pub(crate) kind: Kind,
    pub(crate) bytes: &'a [u8],
    /// Bytes of every datagram but the last, which may be shorter.
    pub(crate) stride: usize,
    /// Outer TOS byte.
    pub(crate) tos: u8,
}

impl Batch<'_> {
    /// Number of datagrams.
    pub(crate) fn datagrams(&self) -> usize {
        self.bytes.len().div_ceil(self.stride.max(1))
    }
}

/// Where sealed batches for such an addressee go.
pub(crate) trait Outlet<A> {
    fn send(&mut self, ctx: &mut Context, to: &mut A, batch: Batch<'_>);
}

/// The run that is being filled. Its datagrams are sealed together when it is sent, so a batch is as
/// long as can be, also where the TUN gives lone packets.
pub(crate) struct Run {
    bytes: Box<[u8]>,
    len: usize,
    stride: usize,
    datagrams: usize,
    /// The last datagram is shorter than the others.
    closed: bool,
    tos: u8,
    peer: Option<PeerId>,
}

impl Run {
    pub(crate) fn new() -> Run {
        Run {
            bytes: vec![0; RUN_LEN].into(),
            len: 0,
            stride: 0,
            datagrams: 0,
            closed: false,
            tos: 0,
            peer: None,
        }
    }

    /// Whom the datagrams are for; `None` while there are none.
    pub(crate) fn peer(&self) -> Option<PeerId> {
        self.peer
    }

    /// How many datagrams of `len` bytes may still join.
    fn room_for(&self, len: usize, tos: u8) -> usize {
        if self.datagrams == 0 {
            return (SEND_BYTES_MAX / len).min(BATCH_MAX);
        }
        if self.closed || len > self.stride || tos != self.tos {
            return 0;
        }
        let room = ((SEND_BYTES_MAX - self.len) / len).min(BATCH_MAX - self.datagrams);
        // A shorter one is the last.
        if len < self.stride { room.min(1) } else { room }
    }

    fn extend(&mut self, peer: PeerId, datagrams: usize, len: usize, tos: u8) {
        if self.datagrams == 0 {
            self.stride = len;
            self.tos = tos;
            self.peer = Some(peer);
        }
        self.closed = len < self.stride;
        self.datagrams += datagrams;
        self.len += datagrams * len;
    }

    /// Seals and sends what is there. `to` is whom the run is for.
    pub(crate) fn flush<A: Addressee>(
        &mut self,
        ctx: &mut Context,
        engine: &mut Engine,
        to: &mut A,
        outlet: &mut impl Outlet<A>,
    ) {
        if self.datagrams > 0 {
            debug_assert_eq!(self.peer, Some(to.id()), "a run has one peer");
            let messages = &mut self.bytes[..self.len];
            if let Err(reason) = to.seal(engine, ctx.now, messages, self.stride) {
                ctx.counters.drop_many(reason, self.clear() as u64);
                return;
            }
            let batch = Batch {
                kind: Kind::Data,
                bytes: &self.bytes[..self.len],
                stride: self.stride,
                tos: self.tos,
            };
            ctx.counters.batch_outbound(self.datagrams);
            outlet.send(ctx, to, batch);
        }
        self.clear();
    }

    /// Forgets what is there and returns how many datagrams that were.
    pub(crate) fn clear(&mut self) -> usize {
        self.len = 0;
        self.closed = false;
        self.peer = None;
        std::mem::take(&mut self.datagrams)
    }
}

/// Cuts a planned packet for a peer that has keys into the run, which must be empty or the same
/// peer's, sealing and sending it as often as it is full. What remains in the run is the caller's to
/// flush.
pub(crate) fn packet<A: Addressee>(
    ctx: &mut Context,
    engine: &mut Engine,
    to: &mut A,
    plan: &Plan,
    packet: &mut [u8],
    run: &mut Run,
    outlet: &mut impl Outlet<A>,
) {
    let tos = ecn::encapsulate(plan.headers().tos);
    let count = plan.len();
    // All segments but the last are equally long, before and after padding.
    let last_len = engine.sealed_len(plan.segment_len(count - 1));
    let mut next = 0;
    while next < count {
        let len = engine.sealed_len(plan.segment_len(next));
        if len > SEND_BYTES_MAX {
            ctx.counters
                .drop_many(DropReason::TooBig, (count - next) as u64);
            return;
        }
        let alike = if last_len == len {
            count - next
        } else {
            count - 1 - next
        };
        let room = run.room_for(len, tos);
        if room == 0 {
            run.flush(ctx, engine, to, outlet);
            continue;
        }
        let now = alike.min(room);
        let tail = &mut run.bytes[run.len..];
        let staged = to.stage(engine, plan, packet, next..next + now, tail);
        debug_assert_eq!(staged.bytes, staged.segments * len, "sealed_len is exact");
        if staged.segments > 0 {
            run.extend(to.id(), staged.segments, len, tos);
        }
        if staged.segments < now {
            let failed = now - staged.segments;
            ctx.counters
                .drop_many(DropReason::SealFailed, failed as u64);
        }
        next += now;
    }
}

#[cfg(test)]
mod tests;
