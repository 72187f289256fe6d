#![forbid(unsafe_code)]
//! Which packets may become one: what a packet must be to be merged at all, and what two packets
//! must have in common.

use crate::packet::checksum;
use crate::packet::header::{
    Fragment, Headers, IPV4_DF, IpVersion, TCP, TCP_ACK, TCP_PSH, TcpHeader, UDP, UdpHeader,
};
use crate::tun::Kind;

/// Longest headers of a packet that is merged: IPv6 and TCP with all options.
pub(super) const HEADERS_LEN_MAX: usize = 40 + 60;

/// What a packet means to the open super-packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// It may be merged with others of its flow.
    Segment(Segment),
    /// It stays alone, and later packets of its flow must not be merged in front of it.
    Barrier,
    /// A fragment: it may belong to any flow between its two addresses.
    Fragment,
    /// It stays alone and belongs to no flow that is ever merged.
    Alone,
}

/// A packet that may be merged: TCP with payload and no flags but ACK and PSH, or UDP with payload
/// and checksum; no IP options or extension headers, not a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) version: IpVersion,
    pub(super) transport: Transport,
    /// IP header in bytes: 20 or 40.
    pub(super) ip_len: usize,
    /// IP and transport header in bytes.
    pub(super) header_len: usize,
    pub(super) payload_len: usize,
}

impl Segment {
    /// What a super-packet of it is.
    pub(super) fn kind(&self) -> Kind {
        match (self.transport, self.version) {
            (Transport::Tcp { .. }, IpVersion::V4) => Kind::Tcp4,
            (Transport::Tcp { .. }, IpVersion::V6) => Kind::Tcp6,
            (Transport::Udp, IpVersion::V4) => Kind::Udp4,
            (Transport::Udp, IpVersion::V6) => Kind::Udp6,
        }
    }

    /// The payload's length as sequence numbers count.
    pub(super) fn payload_len_u32(&self) -> u32 {
        u32::try_from(self.payload_len).expect("a packet is below 64 KiB")
    }

    /// Whether it carries PSH, which ends a super-packet.
    pub(super) fn pushes(&self) -> bool {
        matches!(self.transport, Transport::Tcp { push: true, .. })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Tcp { seq: u32, push: bool },
    Udp,
}

/// A hash of the five-tuple: equal for equal flows, and [`same_flow`] tells the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FlowId(pub(super) u64);

/// What a packet of a flow is to the coalescer. `headers` are those of `packet`.
#[inline]
pub(super) fn shape(headers: &Headers, packet: &[u8]) -> Shape {
    if headers.fragment != Fragment::Whole {
        return Shape::Fragment;
    }
    if !matches!(headers.protocol, TCP | UDP) || headers.ports(packet).is_none() {
        return Shape::Alone;
    }
    let ip_len = match headers.version {
        IpVersion::V4 => 20,
        IpVersion::V6 => 40,
    };
    if headers.l4_offset != ip_len {
        return Shape::Barrier;
    }
    let transport_len = headers.total_len - headers.l4_offset;
    let (l4_len, transport) = if headers.protocol == TCP {
        let Some(tcp) = headers.tcp(packet) else {
            return Shape::Barrier;
        };
        let l4_len = usize::from(tcp.data_offset >> 4) * 4;
        if l4_len < size_of::<TcpHeader>() || tcp.flags & !TCP_PSH != TCP_ACK {
            return Shape::Barrier;
        }
        (
            l4_len,
            Transport::Tcp {
                seq: tcp.seq.get(),
                push: tcp.flags & TCP_PSH != 0,
            },
        )
    } else {
        let Some(udp) = headers.udp(packet) else {
            return Shape::Barrier;
        };
        if usize::from(udp.len.get()) != transport_len || udp.checksum.get() == 0 {
            return Shape::Barrier;
        }
        (size_of::<UdpHeader>(), Transport::Udp)
    };
    if transport_len <= l4_len {
        return Shape::Barrier;
    }
    Shape::Segment(Segment {
        version: headers.version,
        transport,
        ip_len,
        header_len: ip_len + l4_len,
        payload_len: transport_len - l4_len,
    })
}

/// Whether two packets with equal [`FlowId`] are of one flow: same addresses, protocol and ports.
/// `a` starts a super-packet; `b` is a packet of `headers`.
#[inline]
pub(super) fn same_flow(version: IpVersion, a: &[u8], headers: &Headers, b: &[u8]) -> bool {
    if version != headers.version {
        return false;
    }
    let at = headers.l4_offset;
    match version {
        IpVersion::V4 => a[9] == b[9] && a[12..20] == b[12..20] && a[20..24] == b[at..at + 4],
        IpVersion::V6 => {
            a[6] == headers.protocol && a[8..40] == b[8..40] && a[40..44] == b[at..at + 4]
        }
    }
}

/// Whether two packets have the same addresses.
#[inline]
pub(super) fn same_addresses(version: IpVersion, a: &[u8], headers: &Headers, b: &[u8]) -> bool {
    version == headers.version && checksum::addresses(version, a) == checksum::addresses(version, b)
}

/// Whether `next` can follow the `merged` packets that `first` began, as far as headers go: every
/// field that a super-packet has only once must be the same. Both are of one flow and shape; `tos` is
/// the TOS byte that `next` gets.
///
/// IPv4 identifications must count up unless DF is set, where they mean nothing (RFC 6864).
#[inline]
pub(super) fn headers_fit(
    segment: &Segment,
    merged: usize,
    first: &[u8],
    next: &[u8],
    tos: u8,
) -> bool {
    let ip_fits = match segment.version {
        IpVersion::V4 => {
            let id_fits = u16::from_be_bytes([first[6], first[7]]) & IPV4_DF != 0 || {
                let id = |packet: &[u8]| u16::from_be_bytes([packet[4], packet[5]]);
                usize::from(id(next).wrapping_sub(id(first))) == merged
            };
            // Version, length, TOS; flags and offset; TTL and protocol.
            first[..2] == [next[0], tos] && first[6..10] == next[6..10] && id_fits
        }
        // Version, class, flow label; next header and hop limit.
        IpVersion::V6 => {
            let class = [(next[0] & 0xf0) | (tos >> 4), (tos << 4) | (next[1] & 0x0f)];
            first[..2] == class && first[2..4] == next[2..4] && first[6..8] == next[6..8]
        }
    };
    let a = &first[segment.ip_len..segment.header_len];
    let b = &next[segment.ip_len..segment.header_len];
    ip_fits
        && match segment.transport {
            // Acknowledgement and data offset; flags but PSH; window; urgent pointer and options.
            Transport::Tcp { .. } => {
                a[8..13] == b[8..13]
                    && (a[13] ^ b[13]) & !TCP_PSH == 0
                    && a[14..16] == b[14..16]
                    && a[18..] == b[18..]
            }
            Transport::Udp => true,
        }
}

/// Whether all checksums of a packet are right: a super-packet is delivered without a further look,
/// so a wrong one must never get into it.
#[inline]
pub(super) fn checksums_right(segment: &Segment, packet: &[u8]) -> bool {
    let (ip, transport) = packet.split_at(segment.ip_len);
    let protocol = match segment.transport {
        Transport::Tcp { .. } => TCP,
        Transport::Udp => UDP,
    };
    let Some(addresses) = checksum::addresses(segment.version, ip) else {
        return false;
    };
    let Ok(len) = u32::try_from(transport.len()) else {
        return false;
    };
    let ip_right = segment.version == IpVersion::V6 || checksum::of(ip) == 0;
    ip_right
        && checksum::pseudo_header(addresses, protocol, len)
            .add_bytes(transport)
            .finish()
            == 0
}
