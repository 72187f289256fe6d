#![forbid(unsafe_code)]
//! Merges opened packets of one flow into super-packets for the TUN: GRO in userspace.
//!
//! Life of a packet: the opener asks for room ([`Coalescer::tail`]), decrypts into it, looks at what
//! came out (headers, filter), and either commits it ([`Coalescer::commit`]) or asks for room again,
//! which undoes the reservation. At the end of a turn [`Coalescer::take`] gives the finished batch.
//!
//! # Where packets lie
//!
//! Packets lie back to back in slabs, each behind 10 bytes for its virtio-net header. The room
//! offered is placed so that, if the next packet continues the flow of the last one, its payload
//! falls exactly behind what is there: the room starts one header length *before* the end of the
//! super-packet, and the bytes overlapped are saved and put back. A packet that turns out to be
//! something else is moved. A super-packet that is no longer last in its slab moves once, to a slab
//! of its own, when it grows again.
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
pub use output::{SUPER_PACKET_LEN_MAX, SuperPackets, TAIL_LEN_MAX};

use crate::packet::ecn;
use crate::packet::header::{Headers, TCP_PSH};
use crate::packet::vnet::VNET_HDR_LEN;
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
    /// The item that grew last: the next packet is expected to continue it.
    recent: Option<usize>,
    /// The slab in which packets start.
    nursery: Option<usize>,
    /// What is merged.
    kinds: Kinds,
    reserved: Option<Reserved>,
    saved: [u8; HEADERS_LEN_MAX],
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

/// Room given to the opener.
#[derive(Clone, Copy, Debug)]
struct Reserved {
    slab: usize,
    at: usize,
    len: usize,
    /// Bytes from `at` that belong to a super-packet and are saved.
    saved_len: usize,
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
            recent: None,
            nursery: None,
            kinds: Kinds::ALL,
            reserved: None,
            saved: [0; HEADERS_LEN_MAX],
        }
    }

    /// Merges only these kinds from now on.
    pub fn set_kinds(&mut self, kinds: Kinds) {
        self.open.retain(|open| kinds.has(open.first.kind()));
        self.kinds = kinds;
    }

    /// Room of exactly `len` bytes for the next packet, with arbitrary content. A room that was not
    /// committed is taken back.
    ///
    /// # Panics
    /// If `len` is above [`TAIL_LEN_MAX`].
    pub fn tail(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= TAIL_LEN_MAX, "no datagram is {len} bytes long");
        self.abandon();
        let reserved = match self.behind_recent(len) {
            Some(reserved) => reserved,
            None => {
                let (slab, at) = self.next_start();
                Reserved {
                    slab,
                    at: at + VNET_HDR_LEN,
                    len,
                    saved_len: 0,
                }
            }
        };
        self.reserved = Some(reserved);
        let bytes = &mut self.batch.slabs[reserved.slab].bytes;
        let overlapped = &bytes[reserved.at..reserved.at + reserved.saved_len];
        self.saved[..reserved.saved_len].copy_from_slice(overlapped);
        &mut bytes[reserved.at..reserved.at + len]
    }

    /// Takes the packet at the start of the room that [`Coalescer::tail`] gave. `headers` are its
    /// headers; what lies behind `headers.total_len` is padding. `outer_tos` is the TOS byte it came
    /// with, whose ECN bits are combined with the packet's (RFC 6040).
    ///
    /// # Errors
    /// [`DropReason::EcnCongested`] by that rule; the packet is gone then.
    ///
    /// # Panics
    /// If there is no room reserved, or the packet is longer than it.
    pub fn commit(&mut self, headers: &Headers, outer_tos: u8) -> Result<(), DropReason> {
        let reserved = self.reserved.expect("commit follows tail");
        let len = headers.total_len;
        assert!(
            len <= reserved.len,
            "the packet was parsed from the reserved room"
        );
        let bytes = &mut self.batch.slabs[reserved.slab].bytes;
        let packet = &mut bytes[reserved.at..reserved.at + len];
        if let Err(reason) = ecn::decapsulate(packet, outer_tos) {
            self.abandon();
            return Err(reason);
        }
        match segment::shape(headers, packet) {
            Shape::Segment(next) if self.kinds.has(next.kind()) => {
                self.merge(reserved, headers, next)
            }
            Shape::Barrier(flow) => {
                if let Some(at) = self.find(headers, flow, reserved) {
                    self.open.remove(at);
                }
                self.place(reserved, len, None);
            }
            Shape::Fragment => {
                self.close_between(headers, reserved);
                self.place(reserved, len, None);
            }
            Shape::Segment(_) | Shape::Alone => {
                self.place(reserved, len, None);
            }
        }
        Ok(())
    }

    /// Copies a packet in: [`Coalescer::tail`] and [`Coalescer::commit`] for those who have it
    /// elsewhere.
    ///
    /// # Errors
    /// As [`Coalescer::commit`].
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
        self.tail(packet.len()).copy_from_slice(packet);
        self.commit(headers, outer_tos)
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
        self.abandon();
        self.open.clear();
        self.recent = None;
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

    /// Room that overlaps the end of the recent super-packet by its header length.
    fn behind_recent(&self, len: usize) -> Option<Reserved> {
        let recent = self.recent?;
        let open = self.open.iter().find(|open| open.item == recent)?;
        let item = &self.batch.items[recent];
        let slab = &self.batch.slabs[item.slab];
        let saved_len = open.first.header_len;
        let at = item.end() - saved_len;
        let fits = slab.end == item.end()
            && at + len <= slab.bytes.len()
            && saved_len <= len
            && item.len + open.first.payload_len <= SUPER_PACKET_LEN_MAX;
        fits.then_some(Reserved {
            slab: item.slab,
            at,
            len,
            saved_len,
        })
    }

    /// Where a new packet's virtio-net header goes: slab and offset.
    fn next_start(&mut self) -> (usize, usize) {
        let slab = self.batch.slab_with_room(self.nursery);
        self.nursery = Some(slab);
        (slab, self.batch.slabs[slab].end)
    }

    /// Puts back what the reservation overlapped and ends it.
    fn abandon(&mut self) {
        if let Some(Reserved {
            slab,
            at,
            saved_len,
            ..
        }) = self.reserved.take()
        {
            self.batch.slabs[slab].bytes[at..at + saved_len]
                .copy_from_slice(&self.saved[..saved_len]);
        }
    }

    /// The reserved packet.
    fn packet(&self, reserved: Reserved, len: usize) -> &[u8] {
        &self.batch.slabs[reserved.slab].bytes[reserved.at..reserved.at + len]
    }

    /// The open super-packet of the reserved packet's flow.
    fn find(&self, headers: &Headers, flow: FlowId, reserved: Reserved) -> Option<usize> {
        let packet = self.packet(reserved, headers.total_len);
        self.open.iter().position(|open| {
            open.first.flow == flow
                && segment::same_flow(open.first.version, &open.header, headers, packet)
        })
    }

    /// Closes every super-packet between the addresses of a fragment, in its direction.
    fn close_between(&mut self, headers: &Headers, reserved: Reserved) {
        let bytes = &self.batch.slabs[reserved.slab].bytes[reserved.at..];
        self.open.retain(|open| {
            !segment::same_addresses(open.first.version, &open.header, headers, bytes)
        });
    }

    /// Appends the reserved packet to its flow's super-packet, or starts a new one with it.
    fn merge(&mut self, reserved: Reserved, headers: &Headers, next: Segment) {
        let packet = self.packet(reserved, headers.total_len);
        let right = segment::checksums_right(&next, packet);
        if let Some(at) = self.find(headers, next.flow, reserved) {
            if right && self.fits(&self.open[at], &next, packet) {
                self.append(at, reserved, next);
                return;
            }
            self.open.remove(at);
        }
        let item = self.place(reserved, headers.total_len, Some(next));
        if right && !next.pushes() {
            self.open(item, next);
        }
    }

    /// Whether a packet with right checksums continues an open super-packet of its flow.
    fn fits(&self, open: &Open, next: &Segment, packet: &[u8]) -> bool {
        let item = &self.batch.items[open.item];
        next.ip_len == open.first.ip_len
            && next.header_len == open.first.header_len
            && next.payload_len <= open.first.payload_len
            && item.len + next.payload_len <= SUPER_PACKET_LEN_MAX
            && match next.transport {
                Transport::Tcp { seq, .. } => seq == open.next_seq,
                Transport::Udp => item.segments < UDP_SEGMENTS_MAX,
            }
            && segment::headers_fit(next, item.segments, &open.header, packet)
    }

    /// Adds the reserved packet's payload to the open super-packet `at`.
    fn append(&mut self, at: usize, reserved: Reserved, next: Segment) {
        let index = self.open[at].item;
        let end = {
            let item = &self.batch.items[index];
            (item.slab, item.end())
        };
        let source = (reserved.slab, reserved.at + next.header_len);
        if source == end {
            // As predicted: the payload is where it belongs.
            self.abandon();
        } else if self.batch.slabs[end.0].end == end.1 {
            self.batch.copy(source, end, next.payload_len);
            self.abandon();
        } else {
            // Other packets follow it in its slab: it moves, this once.
            let slab = self.batch.fresh_slab();
            let item = self.batch.items[index];
            // The reserved room may overlap its end, so its bytes are put back in between.
            self.batch
                .copy(source, (slab, VNET_HDR_LEN + item.len), next.payload_len);
            self.abandon();
            self.batch.copy(
                (item.slab, item.packet_at()),
                (slab, VNET_HDR_LEN),
                item.len,
            );
            self.batch.items[index].slab = slab;
            self.batch.items[index].start = 0;
        }
        let item = &mut self.batch.items[index];
        item.len += next.payload_len;
        item.segments += 1;
        self.batch.slabs[item.slab].end = item.end();
        self.recent = Some(index);

        let open = &mut self.open[at];
        open.next_seq = open.next_seq.wrapping_add(next.payload_len_u32());
        if next.pushes() {
            let flags = item.packet_at() + next.ip_len + TCP_FLAGS_OFFSET;
            self.batch.slabs[item.slab].bytes[flags] |= TCP_PSH;
        }
        if next.pushes() || next.payload_len < open.first.payload_len {
            self.open.remove(at);
        }
    }

    /// Makes the reserved packet an item of its own and returns its index.
    fn place(&mut self, reserved: Reserved, len: usize, first: Option<Segment>) -> usize {
        let (slab, start) = self.next_start();
        let target = (slab, start + VNET_HDR_LEN);
        if (reserved.slab, reserved.at) != target {
            self.batch.copy((reserved.slab, reserved.at), target, len);
        }
        // The packet is out of the overlap now: it starts behind the end of every other.
        self.abandon();
        let item = Item {
            slab,
            start,
            len,
            segments: 1,
            first,
        };
        self.batch.slabs[slab].end = item.end();
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
        self.recent = Some(index);
    }
}

#[cfg(test)]
mod tests;
