//! Cuts super-packets into segments at the tails of send runs, and seals the runs.
//!
//! A run is datagrams of one length back to back, of which only the last may be shorter, for one peer
//! and with one TOS byte: what GSO takes in one send, or in two if they are small and many. It is sent at
//! the first shorter datagram, and at [`SEND_BYTES_MAX`] bytes or [`BATCH_MAX`] datagrams; a super-packet
//! that does not fit whole leaves its rest in the next run, where the next super-packet joins it (48
//! segments are 45 and 3).
//!
//! A few runs are open at once ([`RUNS_MAX`]), each for another peer or TOS byte, so that what comes by
//! turns leaves in batches all the same. *Nothing overtakes inside a flow:* what goes to one peer with
//! one TOS byte shares a run. A flow that changes its TOS byte (a router marks congestion) would stand
//! in two; so before a packet joins one, the peer's others that may hold some of its flow are sent.

#![forbid(unsafe_code)]

use arrayvec::ArrayVec;

use crate::context::Context;
use crate::packet::ecn;
use crate::packet::header::{Fragment, Headers};
use crate::packet::segment::Plan;
use crate::peer::{Addressee, Kind};
use crate::session::{BATCH_MAX, Engine, MESSAGE_LEN_MAX};
use crate::stats::DropReason;
use crate::types::PeerId;
use crate::udp::SEND_BYTES_MAX;

/// Runs open at once. Who needs one more sends that whose place was taken first.
pub(crate) const RUNS_MAX: usize = 8;
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

/// A run that is being filled. Its datagrams are sealed together when it is sent, so a batch is as
/// long as can be, also where the TUN gives lone packets.
pub(crate) struct Run {
    bytes: Box<[u8]>,
    len: usize,
    stride: usize,
    datagrams: usize,
    /// The last datagram is shorter than the others.
    closed: bool,
    tos: u8,
    /// Whom the datagrams are for.
    pub(crate) peer: PeerId,
    /// Which flows may be in it.
    flows: Flows,
}

/// A set of flows: one bit of a few for each, which others may share.
type Flows = u64;

/// The set with the packet's flow alone; with every flow for a packet that does not tell its own.
#[inline]
fn flow_of(headers: &Headers, packet: &[u8]) -> Flows {
    if headers.fragment != Fragment::Whole || headers.is_hidden() {
        return Flows::MAX;
    }
    let (src, dst) = headers.ports(packet).unwrap_or_default();
    let ports = u64::from(src) << 24 | u64::from(dst) << 8 | u64::from(headers.protocol);
    1 << (ports.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58)
}

impl Run {
    fn new() -> Run {
        Run {
            bytes: vec![0; RUN_LEN].into(),
            len: 0,
            stride: 0,
            datagrams: 0,
            closed: false,
            tos: 0,
            peer: PeerId(0),
            flows: 0,
        }
    }

    /// How many datagrams of `len` bytes may still join.
    fn room_for(&self, len: usize) -> usize {
        if self.datagrams == 0 {
            return (SEND_BYTES_MAX / len).min(BATCH_MAX);
        }
        if self.closed || len > self.stride {
            return 0;
        }
        let room = ((SEND_BYTES_MAX - self.len) / len).min(BATCH_MAX - self.datagrams);
        // A shorter one is the last.
        if len < self.stride { room.min(1) } else { room }
    }

    fn extend(&mut self, flow: Flows, datagrams: usize, len: usize) {
        if self.datagrams == 0 {
            self.stride = len;
        }
        self.flows |= flow;
        self.closed = len < self.stride;
        self.datagrams += datagrams;
        self.len += datagrams * len;
    }

    /// Seals and sends what is there. `to` is whom the run is for.
    // Once a batch: out of the way of each packet, which takes 5 ns less of 225.
    #[inline(never)]
    pub(crate) fn flush<A: Addressee>(
        &mut self,
        ctx: &mut Context,
        engine: &mut Engine,
        to: &mut A,
        outlet: &mut impl Outlet<A>,
    ) {
        if self.datagrams > 0 {
            debug_assert_eq!(self.peer, to.id(), "a run has one peer");
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
        self.flows = 0;
        std::mem::take(&mut self.datagrams)
    }
}

/// The runs of a shard.
pub(crate) struct Runs {
    /// Those that are being filled, by when their places were taken; never two of one peer and TOS byte.
    open: ArrayVec<Run, RUNS_MAX>,
    /// The others; that used last is last, and the next to be opened.
    spare: ArrayVec<Run, RUNS_MAX>,
}

impl Runs {
    pub(crate) fn new() -> Runs {
        Runs {
            open: ArrayVec::new(),
            spare: std::iter::repeat_with(Run::new).take(RUNS_MAX).collect(),
        }
    }

    /// Whether one has to be closed before a planned packet to a peer can be sealed.
    #[inline]
    pub(crate) fn crowded(&self, peer: PeerId, plan: &Plan) -> bool {
        let tos = ecn::encapsulate(plan.headers().tos);
        let joins = |run: &Run| run.peer == peer && run.tos == tos;
        self.open.is_full() && !self.open.iter().any(joins)
    }

    /// Where the first run of a peer is among the open ones.
    pub(crate) fn first_of(&self, peer: PeerId) -> Option<usize> {
        self.open.iter().position(|run| run.peer == peer)
    }

    /// Takes an open run out, to be flushed and given back; `None` if there are not so many.
    pub(crate) fn close(&mut self, at: usize) -> Option<Run> {
        self.open.pop_at(at)
    }

    /// Takes a run back, for its memory.
    pub(crate) fn give_back(&mut self, run: Run) {
        self.spare.push(run);
    }

    /// The run of a peer and TOS byte, where nothing that is in its others may be of this `flow`: they
    /// are sent if need be.
    #[inline]
    fn of<A: Addressee>(
        &mut self,
        ctx: &mut Context,
        engine: &mut Engine,
        to: &mut A,
        (tos, flow): (u8, Flows),
        outlet: &mut impl Outlet<A>,
    ) -> &mut Run {
        let mut found = None;
        for (at, run) in self.open.iter_mut().enumerate() {
            if run.peer != to.id() {
                continue;
            }
            if run.tos == tos {
                found = Some(at);
            } else if run.flows & flow != 0 {
                run.flush(ctx, engine, to, outlet);
            }
        }
        let at = found.unwrap_or_else(|| {
            let mut run = self.spare.pop().expect("a crowd is told of before");
            (run.peer, run.tos) = (to.id(), tos);
            self.open.push(run);
            self.open.len() - 1
        });
        &mut self.open[at]
    }
}

/// Cuts a planned packet for a peer that has keys into its run, for which there must be room
/// ([`Runs::crowded`]), sealing and sending it as often as it is full. What remains in the runs is the
/// caller's to flush.
pub(crate) fn packet<A: Addressee>(
    ctx: &mut Context,
    engine: &mut Engine,
    to: &mut A,
    plan: &Plan,
    packet: &mut [u8],
    runs: &mut Runs,
    outlet: &mut impl Outlet<A>,
) {
    let tos = ecn::encapsulate(plan.headers().tos);
    let flow = flow_of(plan.headers(), packet);
    let run = runs.of(ctx, engine, to, (tos, flow), outlet);
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
        let room = run.room_for(len);
        if room == 0 {
            run.flush(ctx, engine, to, outlet);
            continue;
        }
        let now = alike.min(room);
        let tail = &mut run.bytes[run.len..];
        let staged = to.stage(engine, plan, packet, next..next + now, tail);
        debug_assert_eq!(staged.bytes, staged.segments * len, "sealed_len is exact");
        if staged.segments > 0 {
            run.extend(flow, staged.segments, len);
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
