#![forbid(unsafe_code)]
//! Merges opened packets of one flow into super-packets for the TUN: GRO in userspace.
//!
//! A packet that was opened and passed the filter is copied in once ([`Coalescer::push`]): its payload
//! to the end of the super-packet that it continues, or the whole of it to a place of its own. At the
//! end of a turn [`Coalescer::take`] gives the finished batch (`output`).
//!
//! Packets lie back to back in slabs, each behind 10 bytes for its virtio-net header. A super-packet
//! that is no longer last in its slab moves once, to a slab of its own, when it grows again.
//!
//! # What is merged
//!
//! TCP over IPv4 and IPv6, and UDP (USO). Of one flow, with every header field that a super-packet
//! has only once the same ([`segment`]); no longer than the first; TCP in sequence. A shorter packet or
//! PSH ends a super-packet. Every packet's checksums are verified before it is merged: the kernel
//! takes a super-packet's word for it. A packet that stays alone is written as it came, checksum
//! untouched, for the kernel to judge.
//!
//! A few flows are open at once. Super-packets leave in the order of their first packets, and within
//! a flow nothing overtakes: what cannot be merged closes the flow's open super-packet.

mod output;
mod segment;

#[cfg(test)]
pub(crate) use output::SLAB_LEN;
pub use output::{SUPER_PACKET_LEN_MAX, SuperPackets};

use crate::packet::ecn;
use crate::packet::header::{Headers, TCP_PSH};
use crate::stats::DropReason;
use crate::tun::Kinds;
use output::Item;
use segment::{FlowId, HEADERS_LEN_MAX, Segment, Shape, Transport};

/// Offset of the flags in a TCP header.
const TCP_FLAGS_OFFSET: usize = 13;

/// Datagrams of a UDP super-packet at most: a TUN refuses more than the kernel's `UDP_MAX_SEGMENTS`
/// with EINVAL, and that is 64 on older kernels (128 on newer).
pub const UDP_SEGMENTS_MAX: usize = 64;
/// Flows open at once. With more the longest open one is closed.
pub const FLOWS_OPEN_MAX: usize = 16;
/// Slabs of a batch after which [`Coalescer::is_full`] asks for the batch to be taken (132 KiB
/// each).
pub const SLABS_FULL: usize = 16;
/// Batches whose memory is kept.
pub(crate) const SPARES_MAX: usize = 1;

/// Forms the TUN writes of one shard.
#[derive(Debug)]
pub struct Coalescer {
    batch: SuperPackets,
    spares: Vec<SuperPackets>,
    /// Super-packets that may still grow, oldest first.
    open: Vec<Open>,
    /// The slab in which packets start.
    nursery: Option<usize>,
    /// What is merged.
    kinds: Kinds,
}

/// A super-packet that may still grow.
#[derive(Clone, Copy, Debug)]
struct Open {
    item: usize,
    first: Segment,
    next_seq: u32,
    /// Headers of the first packet, as it came.
    header: [u8; HEADERS_LEN_MAX],
}

impl Default for Coalescer {
    fn default() -> Self {
        Coalescer::new()
    }
}

impl Coalescer {
    /// A coalescer without any packet memory yet; it allocates as it first fills and then keeps
    /// that.
    pub fn new() -> Coalescer {
        Coalescer {
            batch: SuperPackets::default(),
            spares: Vec::with_capacity(SPARES_MAX),
            open: Vec::with_capacity(FLOWS_OPEN_MAX),
            nursery: None,
            kinds: Kinds::ALL,
        }
    }

    /// Merges only these kinds from now on.
    pub fn set_kinds(&mut self, kinds: Kinds) {
        self.open.retain(|open| kinds.has(open.first.kind()));
        self.kinds = kinds;
    }

    /// Takes a packet. `headers` are its headers; what lies behind `headers.total_len` is padding.
    /// `outer_tos` is the TOS byte it came with, whose ECN bits are combined with the packet's (RFC
    /// 6040).
    ///
    /// # Errors
    /// [`DropReason::EcnCongested`] by that rule; the packet is gone then.
    ///
    /// # Panics
    /// If `packet` is shorter than its `headers` say.
    pub fn push(
        &mut self,
        headers: &Headers,
        packet: &[u8],
        outer_tos: u8,
    ) -> Result<(), DropReason> {
        let packet = &packet[..headers.total_len];
        let tos = ecn::combine(headers.tos, outer_tos).ok_or(DropReason::EcnCongested)?;
        let flow = FlowId(headers.flow(packet).hash());
        match segment::shape(headers, packet) {
            Shape::Segment(next) if self.kinds.has(next.kind()) => {
                self.merge(headers, packet, tos, flow, next);
            }
            Shape::Barrier => {
                if let Some(at) = self.find(headers, packet, flow) {
                    self.open.remove(at);
                }
                self.place(headers, packet, tos, flow, None);
            }
            Shape::Fragment => {
                self.open.retain(|open| {
                    !segment::same_addresses(open.first.version, &open.header, headers, packet)
                });
                self.place(headers, packet, tos, flow, None);
            }
            Shape::Segment(_) | Shape::Alone => {
                self.place(headers, packet, tos, flow, None);
            }
        }
        Ok(())
    }

    /// Whether there is nothing to take.
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Whether the batch should be taken before more packets come, so that memory stays bounded.
    pub fn is_full(&self) -> bool {
        self.batch.slabs_used >= SLABS_FULL
    }

    /// The finished batch; the coalescer starts a new one in recycled memory.
    pub fn take(&mut self) -> SuperPackets {
        self.open.clear();
        self.nursery = None;
        let next = self.spares.pop().unwrap_or_default();
        let mut batch = std::mem::replace(&mut self.batch, next);
        batch.finish();
        batch
    }

    /// Takes back a batch that has been written, for its memory.
    pub fn recycle(&mut self, mut batch: SuperPackets) {
        batch.clear();
        if self.spares.len() < SPARES_MAX {
            self.spares.push(batch);
        }
    }

    /// The open super-packet of the packet's flow.
    fn find(&self, headers: &Headers, packet: &[u8], flow: FlowId) -> Option<usize> {
        self.open.iter().position(|open| {
            self.batch.items[open.item].flow == flow
                && segment::same_flow(open.first.version, &open.header, headers, packet)
        })
    }

    /// Appends the packet to its flow's super-packet, or starts a new one with it.
    fn merge(&mut self, headers: &Headers, packet: &[u8], tos: u8, flow: FlowId, next: Segment) {
        let right = segment::checksums_right(&next, packet);
        if let Some(at) = self.find(headers, packet, flow) {
            if right && self.fits(&self.open[at], &next, packet, tos) {
                self.append(at, packet, next);
                return;
            }
            self.open.remove(at);
        }
        let item = self.place(headers, packet, tos, flow, Some(next));
        if right && !next.pushes() {
            self.open(item, next);
        }
    }

    /// Whether a packet with right checksums continues an open super-packet of its flow.
    fn fits(&self, open: &Open, next: &Segment, packet: &[u8], tos: u8) -> bool {
        let item = &self.batch.items[open.item];
        next.ip_len == open.first.ip_len
            && next.header_len == open.first.header_len
            && next.payload_len <= open.first.payload_len
            && item.len + next.payload_len <= SUPER_PACKET_LEN_MAX
            && match next.transport {
                Transport::Tcp { seq, .. } => seq == open.next_seq,
                Transport::Udp => item.segments < UDP_SEGMENTS_MAX,
            }
            && segment::headers_fit(next, item.segments, &open.header, packet, tos)
    }

    /// Adds the packet's payload to the open super-packet `at`.
    fn append(&mut self, at: usize, packet: &[u8], next: Segment) {
        let index = self.open[at].item;
        let mut item = self.batch.items[index];
        if self.batch.slabs[item.slab].end != item.end() {
            // Other packets follow it in its slab: it moves, this once.
            item = self.batch.moved(item);
        }
        let end = item.end();
        item.len += next.payload_len;
        item.segments += 1;
        self.batch.items[index] = item;
        let slab = &mut self.batch.slabs[item.slab];
        slab.bytes[end..item.end()].copy_from_slice(&packet[next.header_len..]);
        slab.end = item.end();

        let open = &mut self.open[at];
        open.next_seq = open.next_seq.wrapping_add(next.payload_len_u32());
        if next.pushes() {
            let flags = item.packet_at() + next.ip_len + TCP_FLAGS_OFFSET;
            slab.bytes[flags] |= TCP_PSH;
        }
        if next.pushes() || next.payload_len < open.first.payload_len {
            self.open.remove(at);
        }
    }

    /// Makes the packet an item of its own, with this TOS byte, and returns its index.
    fn place(
        &mut self,
        headers: &Headers,
        packet: &[u8],
        tos: u8,
        flow: FlowId,
        first: Option<Segment>,
    ) -> usize {
        let at = self.batch.slab_with_room(self.nursery);
        self.nursery = Some(at);
        let slab = &mut self.batch.slabs[at];
        let item = Item {
            slab: at,
            start: slab.end,
            len: packet.len(),
            segments: 1,
            flow,
            first,
        };
        let bytes = &mut slab.bytes[item.packet_at()..item.end()];
        bytes.copy_from_slice(packet);
        ecn::set_tos(bytes, headers.version, tos);
        slab.end = item.end();
        self.batch.items.push(item);
        self.batch.items.len() - 1
    }

    /// Lets later packets continue an item.
    fn open(&mut self, index: usize, first: Segment) {
        let item = &self.batch.items[index];
        let at = item.packet_at();
        let mut header = [0; HEADERS_LEN_MAX];
        header[..first.header_len]
            .copy_from_slice(&self.batch.slabs[item.slab].bytes[at..at + first.header_len]);
        let next_seq = match first.transport {
            Transport::Tcp { seq, .. } => seq.wrapping_add(first.payload_len_u32()),
            Transport::Udp => 0,
        };
        if self.open.len() == FLOWS_OPEN_MAX {
            self.open.remove(0);
        }
        self.open.push(Open {
            item: index,
            first,
            next_seq,
            header,
        });
    }
}

#[cfg(test)]
mod tests;
