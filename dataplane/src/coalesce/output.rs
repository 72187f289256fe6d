#![forbid(unsafe_code)]
//! What the coalescer gives to the TUN writer: finished packets, each behind its virtio-net header,
//! in memory that the batch owns.

use zerocopy::IntoBytes;

use super::segment::{FlowId, Segment, Transport};
use crate::packet::checksum;
use crate::packet::header::{IpVersion, TCP, TCP_CHECKSUM_OFFSET, UDP, UDP_CHECKSUM_OFFSET};
use crate::packet::vnet::{GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, VNET_HDR_LEN, VnetHdr};
use crate::tun::Kind;

/// Longest IP packet written to a TUN, in bytes.
pub const SUPER_PACKET_LEN_MAX: usize = 65_535;
/// A packet starts at most here in its slab, so that it can always grow to the full length.
const START_MAX: usize = 65_536;
/// Slabs are this long, in bytes.
pub(crate) const SLAB_LEN: usize = 132 * 1024;
const _: () = assert!(SLAB_LEN >= START_MAX + VNET_HDR_LEN + SUPER_PACKET_LEN_MAX);

/// A batch of packets and super-packets ready to be written to a TUN queue, in order.
///
/// The batch owns its memory, so writes may still be in flight when the coalescer fills the next
/// one; [`Coalescer::recycle`](super::Coalescer::recycle) takes the memory back.
#[derive(Debug, Default)]
pub struct SuperPackets {
    pub(super) slabs: Vec<Slab>,
    /// How many slabs are in use; the rest is kept for later.
    pub(super) slabs_used: usize,
    pub(super) items: Vec<Item>,
}

/// Memory for packets back to back, each behind room for its virtio-net header.
#[derive(Debug)]
pub(super) struct Slab {
    pub(super) bytes: Box<[u8]>,
    /// Where the next packet's virtio-net header would start.
    pub(super) end: usize,
}

/// One write: where it lies and what it is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) slab: usize,
    /// Offset of the virtio-net header.
    pub(super) start: usize,
    /// Length of the IP packet, virtio-net header not counted.
    pub(super) len: usize,
    pub(super) segments: usize,
    pub(super) flow: FlowId,
    /// What the first packet was, if it may be merged.
    pub(super) first: Option<Segment>,
}

impl Item {
    /// Offset of the IP packet.
    pub(super) fn packet_at(&self) -> usize {
        self.start + VNET_HDR_LEN
    }

    /// Offset behind the IP packet.
    pub(super) fn end(&self) -> usize {
        self.packet_at() + self.len
    }
}

impl SuperPackets {
    /// Number of writes.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Write `i`: virtio-net header and IP packet.
    ///
    /// # Panics
    /// If `i` is not below [`SuperPackets::len`].
    #[cfg(feature = "internals")]
    pub fn get(&self, i: usize) -> &[u8] {
        let item = &self.items[i];
        &self.slabs[item.slab].bytes[item.start..item.end()]
    }

    /// The same, to be written to: its content is nobody's any more then.
    pub(crate) fn get_mut(&mut self, i: usize) -> &mut [u8] {
        let item = &self.items[i];
        &mut self.slabs[item.slab].bytes[item.start..item.end()]
    }

    /// What write `i` is, if it is of a kind that may be merged.
    pub(crate) fn kind(&self, i: usize) -> Option<Kind> {
        self.items[i].first.map(|first| first.kind())
    }

    /// The hash of the [flow](crate::packet::header::Flow::hash) of write `i`.
    pub(crate) fn flow_hash(&self, i: usize) -> u64 {
        self.items[i].flow.0
    }

    /// Number of packets merged into write `i`.
    ///
    /// # Panics
    /// If `i` is not below [`SuperPackets::len`].
    pub fn segments(&self, i: usize) -> usize {
        self.items[i].segments
    }

    /// All writes in order.
    #[cfg(feature = "internals")]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        (0..self.len()).map(|i| self.get(i))
    }

    /// Forgets the packets and keeps the memory.
    pub(super) fn clear(&mut self) {
        self.slabs_used = 0;
        self.items.clear();
    }

    /// A slab in which a packet may start, by index; its `end` says where.
    pub(super) fn slab_with_room(&mut self, current: Option<usize>) -> usize {
        match current {
            Some(slab) if self.slabs[slab].end <= START_MAX => slab,
            Some(_) | None => self.fresh_slab(),
        }
    }

    /// An empty slab, by index.
    pub(super) fn fresh_slab(&mut self) -> usize {
        let slab = self.slabs_used;
        match self.slabs.get_mut(slab) {
            Some(slab) => slab.end = 0,
            None => {
                let bytes = vec![0; SLAB_LEN].into_boxed_slice();
                self.slabs.push(Slab { bytes, end: 0 });
            }
        }
        self.slabs_used += 1;
        slab
    }

    /// Copies a packet to the start of an empty slab and returns what it is there.
    pub(super) fn moved(&mut self, from: Item) -> Item {
        let to = Item {
            slab: self.fresh_slab(),
            start: 0,
            ..from
        };
        if let Ok([source, target]) = self.slabs.get_disjoint_mut([from.slab, to.slab]) {
            target.bytes[to.packet_at()..to.end()]
                .copy_from_slice(&source.bytes[from.packet_at()..from.end()]);
        }
        to
    }

    /// Writes the headers that only the whole of a super-packet determines.
    pub(super) fn finish(&mut self) {
        for item in &self.items {
            let bytes = &mut self.slabs[item.slab].bytes[item.start..item.end()];
            let (vnet, packet) = bytes.split_at_mut(VNET_HDR_LEN);
            let header = match item.first {
                Some(first) if item.segments > 1 => finish_super_packet(&first, packet),
                Some(_) | None => VnetHdr::PLAIN,
            };
            vnet.copy_from_slice(header.as_bytes());
        }
    }
}

/// Fixes lengths and checksums of a super-packet; the transport checksum becomes the sum of the
/// pseudo-header, as `NEEDS_CSUM` wants it.
fn finish_super_packet(first: &Segment, packet: &mut [u8]) -> VnetHdr {
    let total_len = below_64k(packet.len());
    let transport_len = below_64k(packet.len() - first.ip_len);
    match first.version {
        IpVersion::V4 => {
            packet[2..4].copy_from_slice(&total_len.to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum::of(&packet[..first.ip_len]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        IpVersion::V6 => packet[4..6].copy_from_slice(&transport_len.to_be_bytes()),
    }
    let (gso_type, protocol, checksum_offset) = match (first.transport, first.version) {
        (Transport::Tcp { .. }, IpVersion::V4) => (GSO_TCPV4, TCP, TCP_CHECKSUM_OFFSET),
        (Transport::Tcp { .. }, IpVersion::V6) => (GSO_TCPV6, TCP, TCP_CHECKSUM_OFFSET),
        (Transport::Udp, _) => {
            let at = first.ip_len + 4;
            packet[at..at + 2].copy_from_slice(&transport_len.to_be_bytes());
            (GSO_UDP_L4, UDP, UDP_CHECKSUM_OFFSET)
        }
    };
    let addresses = checksum::addresses(first.version, packet).unwrap_or_default();
    let sum = checksum::pseudo_header(addresses, protocol, u32::from(transport_len)).fold();
    let at = first.ip_len + checksum_offset;
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    VnetHdr::new(
        gso_type,
        below_64k(first.header_len),
        below_64k(first.payload_len),
        below_64k(first.ip_len),
        below_64k(checksum_offset),
    )
}

fn below_64k(len: usize) -> u16 {
    u16::try_from(len).expect("merging stops at SUPER_PACKET_LEN_MAX")
}
