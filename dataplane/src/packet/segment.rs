#![forbid(unsafe_code)]
//! Cuts what one TUN read gave into the packets it stands for.
//!
//! A TUN queue with `TUNSETOFFLOAD` hands over super-packets: one IP packet of up to 65535 bytes
//! whose payload is to be cut every `gso_size` bytes (TSO for TCP, USO for UDP), or one ordinary
//! packet whose transport checksum is left to us. [`plan`] checks the virtio-net header against the
//! packet and precomputes what all segments share; [`Plan::write`] or [`Plan::stage`] then makes
//! one segment at a time:
//!
//! - IPv4: `total_len`, identification + i, header checksum; IPv6: `payload_len`.
//! - TCP: sequence number + i × `gso_size`; FIN and PSH only on the last segment, CWR only on the
//!   first; checksum. UDP: length; checksum, with 0 sent as 0xffff.
//!
//! The checksum field of a super-packet covers the whole of it (a pseudo-header sum), so every
//! segment's checksum is computed anew: over the payload by [`checksum`], over the rest by adding
//! the few fields that differ to a sum made once.

use std::ops::Range;

use super::vnet::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, VnetHdr};
use crate::packet::checksum::{self, Sum};
use crate::packet::header::{
    Fragment, Headers, IpVersion, TCP, TCP_CHECKSUM_OFFSET, TCP_CWR, TCP_FIN, TCP_PSH, TcpHeader,
    UDP, UDP_CHECKSUM_OFFSET, UdpHeader,
};
use crate::stats::DropReason;

/// Longest IP and transport header of a super-packet, in bytes: IPv4 and TCP with all options are
/// 120, which leaves IPv6 with TCP options 60 bytes of extension headers.
pub const HEADERS_LEN_MAX: usize = 160;

/// How to cut one packet. Made by [`plan`] and valid for that packet only.
#[derive(Clone, Debug)]
pub struct Plan {
    headers: Headers,
    cut: Cut,
    count: usize,
}

/// The three shapes of a packet from the TUN.
#[derive(Clone, Debug)]
enum Cut {
    /// One finished packet.
    Finished,
    /// One packet; the checksum over `start..` goes to `at`.
    Checksum { start: usize, at: usize },
    /// A super-packet.
    Segments(Template),
}

/// What all segments of a super-packet share.
#[derive(Clone, Debug)]
struct Template {
    /// Headers with the fields that differ zeroed.
    bytes: [u8; HEADERS_LEN_MAX],
    /// IP and transport header together, in bytes.
    header_len: usize,
    gso_size: usize,
    /// IPv4 identification of the first segment.
    id: u16,
    /// Sum over the zeroed IPv4 header.
    ip_sum: Sum,
    /// Sum over the pseudo-header without its length and the zeroed transport header.
    transport_sum: Sum,
    transport: Transport,
}

#[derive(Clone, Copy, Debug)]
enum Transport {
    /// `offset_flags` is the data offset and flags word of the super-packet.
    Tcp {
        seq: u32,
        offset_flags: u16,
    },
    Udp,
}

/// Checks a packet from the TUN against its virtio-net header and says how to cut it. `hdr_len` of
/// the header is ignored: kernels that forward put other things there.
///
/// # Errors
/// [`DropReason::InnerMalformed`] if the IP or transport header is not one;
/// [`DropReason::VnetInvalid`] if the virtio-net header asks for what the packet cannot give.
pub fn plan(vnet: &VnetHdr, packet: &[u8]) -> Result<Plan, DropReason> {
    let headers = Headers::parse(packet)?;
    let packet = &packet[..headers.total_len];
    let gso = vnet.gso_type & !GSO_ECN;
    let cut = match (gso, headers.version, headers.protocol) {
        (GSO_NONE, _, _) => plan_whole(vnet, &headers)?,
        (GSO_TCPV4, IpVersion::V4, TCP) | (GSO_TCPV6, IpVersion::V6, TCP) => {
            Cut::Segments(plan_tcp(vnet, &headers, packet)?)
        }
        (GSO_UDP_L4, _, UDP) => Cut::Segments(plan_udp(vnet, &headers, packet)?),
        _ => return Err(DropReason::VnetInvalid),
    };
    let count = match &cut {
        Cut::Finished | Cut::Checksum { .. } => 1,
        Cut::Segments(template) => (headers.total_len - template.header_len)
            .div_ceil(template.gso_size)
            .max(1),
    };
    Ok(Plan {
        headers,
        cut,
        count,
    })
}

impl Plan {
    /// Number of segments, at least 1. Small `gso_size` can make it tens of thousands: cut in
    /// turns, not into an array.
    #[allow(
        clippy::len_without_is_empty,
        reason = "never empty; public with `internals` only"
    )]
    pub fn len(&self) -> usize {
        self.count
    }

    /// The headers of the packet, for routing and flow memory.
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// IP length of segment `i` in bytes: all but the last are equally long.
    ///
    /// # Panics
    /// If `i` is not below [`Plan::len`].
    pub fn segment_len(&self, i: usize) -> usize {
        assert!(i < self.count, "segment {i} of {}", self.count);
        match &self.cut {
            Cut::Finished | Cut::Checksum { .. } => self.headers.total_len,
            Cut::Segments(template) => template.header_len + self.payload(template, i).len(),
        }
    }

    /// Writes segment `i` to the start of `dst` and returns its length. `packet` is the IP packet
    /// the plan was made from, untouched.
    ///
    /// # Panics
    /// If `i` is not below [`Plan::len`] or `dst` is shorter than [`Plan::segment_len`].
    pub fn write(&self, i: usize, packet: &[u8], dst: &mut [u8]) -> usize {
        let len = self.segment_len(i);
        let dst = &mut dst[..len];
        match &self.cut {
            Cut::Finished => dst.copy_from_slice(&packet[..len]),
            Cut::Checksum { start, at } => {
                dst.copy_from_slice(&packet[..len]);
                complete(dst, *start, *at);
            }
            Cut::Segments(template) => {
                let payload = &packet[self.payload(template, i)];
                let (header, rest) = dst.split_at_mut(template.header_len);
                rest.copy_from_slice(payload);
                template.write_header(i, i + 1 == self.count, &self.headers, payload, header);
            }
        }
        len
    }

    /// Makes segment `i` inside `packet` without copying its payload, and returns where it lies: its
    /// headers are written in front of the payload, over the end of segment `i - 1`. So segments are
    /// staged in order, and each is consumed (sealed into another buffer) before the next.
    ///
    /// # Panics
    /// If `i` is not below [`Plan::len`] or `packet` is shorter than the plan's packet.
    pub fn stage(&self, i: usize, packet: &mut [u8]) -> Range<usize> {
        let len = self.segment_len(i);
        match &self.cut {
            Cut::Finished => 0..len,
            Cut::Checksum { start, at } => {
                complete(&mut packet[..len], *start, *at);
                0..len
            }
            Cut::Segments(template) => {
                let payload = self.payload(template, i);
                let (front, back) = packet.split_at_mut(payload.start);
                let start = front.len() - template.header_len;
                template.write_header(
                    i,
                    i + 1 == self.count,
                    &self.headers,
                    &back[..payload.len()],
                    &mut front[start..],
                );
                start..payload.end
            }
        }
    }

    /// Where the payload of segment `i` lies in the packet.
    fn payload(&self, template: &Template, i: usize) -> Range<usize> {
        let start = template.header_len + i * template.gso_size;
        start..(start + template.gso_size).min(self.headers.total_len)
    }
}

fn plan_whole(vnet: &VnetHdr, headers: &Headers) -> Result<Cut, DropReason> {
    if !vnet.needs_csum() {
        return Ok(Cut::Finished);
    }
    let start = usize::from(vnet.csum_start.get());
    let at = start + usize::from(vnet.csum_offset.get());
    // A checksum inside the IP header is none the kernel asks for.
    if start < headers.l4_offset || at + 2 > headers.total_len {
        return Err(DropReason::VnetInvalid);
    }
    Ok(Cut::Checksum { start, at })
}

fn plan_tcp(vnet: &VnetHdr, headers: &Headers, packet: &[u8]) -> Result<Template, DropReason> {
    let tcp = *headers.tcp(packet).ok_or(DropReason::InnerMalformed)?;
    let tcp_len = usize::from(tcp.data_offset >> 4) * 4;
    if tcp_len < size_of::<TcpHeader>() || headers.transport(packet).len() < tcp_len {
        return Err(DropReason::InnerMalformed);
    }
    let transport = Transport::Tcp {
        seq: tcp.seq.get(),
        offset_flags: u16::from_be_bytes([tcp.data_offset, tcp.flags]),
    };
    let mut template = Template::new(
        vnet,
        headers,
        packet,
        tcp_len,
        TCP_CHECKSUM_OFFSET,
        transport,
    )?;
    let at = headers.l4_offset;
    // Sequence number, data offset and flags, checksum.
    template.bytes[at + 4..at + 8].fill(0);
    template.bytes[at + 12..at + 14].fill(0);
    template.bytes[at + 16..at + 18].fill(0);
    Ok(template.summed(headers))
}

fn plan_udp(vnet: &VnetHdr, headers: &Headers, packet: &[u8]) -> Result<Template, DropReason> {
    headers.udp(packet).ok_or(DropReason::InnerMalformed)?;
    let mut template = Template::new(
        vnet,
        headers,
        packet,
        size_of::<UdpHeader>(),
        UDP_CHECKSUM_OFFSET,
        Transport::Udp,
    )?;
    // Length and checksum.
    let at = headers.l4_offset;
    template.bytes[at + 4..at + 8].fill(0);
    Ok(template.summed(headers))
}

impl Template {
    /// Copies the headers, with the fields of the IP header that differ zeroed.
    fn new(
        vnet: &VnetHdr,
        headers: &Headers,
        packet: &[u8],
        transport_len: usize,
        checksum_offset: usize,
        transport: Transport,
    ) -> Result<Template, DropReason> {
        let header_len = headers.l4_offset + transport_len;
        let lies = vnet.gso_size.get() == 0
            || headers.fragment != Fragment::Whole
            || header_len > HEADERS_LEN_MAX
            || (vnet.needs_csum()
                && (usize::from(vnet.csum_start.get()) != headers.l4_offset
                    || usize::from(vnet.csum_offset.get()) != checksum_offset));
        if lies {
            return Err(DropReason::VnetInvalid);
        }
        let mut bytes = [0; HEADERS_LEN_MAX];
        bytes[..header_len].copy_from_slice(&packet[..header_len]);
        let id = match headers.version {
            IpVersion::V4 => {
                let id = u16::from_be_bytes([bytes[4], bytes[5]]);
                // Total length and identification, checksum.
                bytes[2..6].fill(0);
                bytes[10..12].fill(0);
                id
            }
            IpVersion::V6 => {
                bytes[4..6].fill(0);
                0
            }
        };
        Ok(Template {
            bytes,
            header_len,
            gso_size: usize::from(vnet.gso_size.get()),
            id,
            ip_sum: Sum::ZERO,
            transport_sum: Sum::ZERO,
            transport,
        })
    }

    /// Fills in the sums over the zeroed headers.
    fn summed(mut self, headers: &Headers) -> Template {
        let (ip, transport) = self.bytes[..self.header_len].split_at(headers.l4_offset);
        if headers.version == IpVersion::V4 {
            self.ip_sum = Sum::ZERO.add_bytes(ip);
        }
        let addresses = checksum::addresses(headers.version, ip).unwrap_or_default();
        self.transport_sum =
            checksum::pseudo_header(addresses, headers.protocol, 0).add_bytes(transport);
        self
    }

    /// Writes the headers of segment `i` to `out`, which is `header_len` long.
    fn write_header(
        &self,
        i: usize,
        last: bool,
        headers: &Headers,
        payload: &[u8],
        out: &mut [u8],
    ) {
        out.copy_from_slice(&self.bytes[..self.header_len]);
        let (ip, transport) = out.split_at_mut(headers.l4_offset);
        let total_len = self.header_len + payload.len();
        match headers.version {
            IpVersion::V4 => {
                let total_len = low_u16(total_len);
                let id = self.id.wrapping_add(low_u16(i));
                ip[2..4].copy_from_slice(&total_len.to_be_bytes());
                ip[4..6].copy_from_slice(&id.to_be_bytes());
                let sum = self.ip_sum.add_u16(total_len).add_u16(id).finish();
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            IpVersion::V6 => {
                let payload_len = low_u16(total_len - 40);
                ip[4..6].copy_from_slice(&payload_len.to_be_bytes());
            }
        }
        let transport_len = low_u16(total_len - headers.l4_offset);
        let sum = self.transport_sum.add_bytes(payload).add_u16(transport_len);
        match self.transport {
            Transport::Tcp { seq, offset_flags } => {
                let seq = seq.wrapping_add(low_u32(i * self.gso_size));
                let mut cleared = 0;
                if i != 0 {
                    cleared |= TCP_CWR;
                }
                if !last {
                    cleared |= TCP_FIN | TCP_PSH;
                }
                let offset_flags = offset_flags & !u16::from(cleared);
                transport[4..8].copy_from_slice(&seq.to_be_bytes());
                transport[12..14].copy_from_slice(&offset_flags.to_be_bytes());
                let sum = sum.add_u32(seq).add_u16(offset_flags).finish();
                transport[16..18].copy_from_slice(&sum.to_be_bytes());
            }
            Transport::Udp => {
                transport[4..6].copy_from_slice(&transport_len.to_be_bytes());
                let sum = non_zero(sum.add_u16(transport_len).finish());
                transport[6..8].copy_from_slice(&sum.to_be_bytes());
            }
        }
    }
}

/// Completes a checksum whose field already holds the pseudo-header sum, as the kernel's
/// `skb_checksum_help` does: 0 becomes 0xffff, which is the same number and not "none".
fn complete(packet: &mut [u8], start: usize, at: usize) {
    let sum = non_zero(checksum::of(&packet[start..]));
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

fn non_zero(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

/// The low 16 bits: lengths here are below 65536, identifications wrap.
#[expect(clippy::cast_possible_truncation, reason = "wrapping is wanted")]
fn low_u16(value: usize) -> u16 {
    value as u16
}

/// The low 32 bits, as sequence numbers count.
#[expect(clippy::cast_possible_truncation, reason = "wrapping is wanted")]
fn low_u32(value: usize) -> u32 {
    value as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::build::{Builder, Tcp};
    use crate::packet::vnet::{GSO_UDP, NEEDS_CSUM};
    use crate::seeded;
    use rand::{Rng, RngExt};
    use zerocopy::FromBytes;

    /// A super-packet as the kernel hands it over, beside the segments it must become. The segments
    /// are built one by one from their fields, not cut.
    struct Case {
        vnet: VnetHdr,
        packet: Vec<u8>,
        segments: Vec<Vec<u8>>,
    }

    fn builder(v6: bool) -> Builder {
        let (src, dst) = if v6 {
            ("[fd7a::1]:40000", "[fd7a::2]:5201")
        } else {
            ("100.64.0.1:40000", "100.64.0.2:5201")
        };
        Builder::new(src.parse().unwrap(), dst.parse().unwrap())
    }

    /// Puts the pseudo-header sum into the checksum field, as the kernel does.
    fn leave_checksum(packet: &mut [u8], at: usize) {
        let headers = Headers::parse(packet).unwrap();
        let addresses = checksum::addresses(headers.version, packet).unwrap();
        let len = u32::try_from(packet.len() - headers.l4_offset).unwrap();
        let sum = checksum::pseudo_header(addresses, headers.protocol, len).fold();
        let at = headers.l4_offset + at;
        packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }

    fn tcp_case(builder: Builder, tcp: Tcp<'_>, payload: &[u8], gso_size: u16) -> Case {
        let mut packet = builder.tcp(&tcp, payload);
        leave_checksum(&mut packet, TCP_CHECKSUM_OFFSET);
        let ip_len = if builder.src.is_ipv4() { 20 } else { 40 };
        let gso_type = if builder.src.is_ipv4() {
            GSO_TCPV4
        } else {
            GSO_TCPV6
        };
        let gso_type = if tcp.flags & TCP_CWR != 0 {
            gso_type | GSO_ECN
        } else {
            gso_type
        };
        let chunks: Vec<&[u8]> = payload.chunks(usize::from(gso_size)).collect();
        let mut segments = Vec::new();
        for (i, chunk) in chunks.iter().enumerate() {
            let mut flags = tcp.flags;
            if i > 0 {
                flags &= !TCP_CWR;
            }
            if i + 1 < chunks.len() {
                flags &= !(TCP_FIN | TCP_PSH);
            }
            let offset = u32::from(gso_size) * u32::try_from(i).unwrap();
            let id = builder.id.wrapping_add(u16::try_from(i).unwrap());
            let tcp = Tcp {
                seq: tcp.seq.wrapping_add(offset),
                flags,
                ..tcp
            };
            segments.push(Builder { id, ..builder }.tcp(&tcp, chunk));
        }
        // A forwarding kernel puts nonsense into hdr_len.
        let vnet = VnetHdr::new(gso_type, 0xffff, gso_size, ip_len, 16);
        Case {
            vnet,
            packet,
            segments,
        }
    }

    fn udp_case(builder: Builder, payload: &[u8], gso_size: u16) -> Case {
        let mut packet = builder.udp(payload);
        leave_checksum(&mut packet, UDP_CHECKSUM_OFFSET);
        let ip_len = if builder.src.is_ipv4() { 20 } else { 40 };
        let segments = payload
            .chunks(usize::from(gso_size))
            .zip(0u16..)
            .map(|(chunk, i)| {
                Builder {
                    id: builder.id.wrapping_add(i),
                    ..builder
                }
                .udp(chunk)
            })
            .collect();
        Case {
            vnet: VnetHdr::new(GSO_UDP_L4, 0, gso_size, ip_len, 6),
            packet,
            segments,
        }
    }

    fn check(case: &Case) {
        let plan = plan(&case.vnet, &case.packet).unwrap();
        assert_eq!(plan.len(), case.segments.len());
        let mut staged = case.packet.clone();
        let mut dst = vec![0xaa; 70_000];
        for (i, want) in case.segments.iter().enumerate() {
            assert_eq!(plan.segment_len(i), want.len());
            assert!(plan.segment_len(i) <= plan.segment_len(0));
            let len = plan.write(i, &case.packet, &mut dst);
            assert!(dst[..len] == want[..], "segment {i} written");
            let range = plan.stage(i, &mut staged);
            assert!(staged[range] == want[..], "segment {i} staged");
        }
    }

    #[test]
    fn super_packets_become_the_segments_built_from_their_fields() {
        let mut rng = seeded();
        let mut payload = vec![0u8; 65_000];
        rng.fill_bytes(&mut payload);
        for _ in 0..400 {
            let mut builder = builder(rng.random());
            builder.tos = rng.random();
            builder.id = rng.random();
            builder.label = rng.random();
            let gso_size = rng.random_range(1..3000);
            let segments = rng.random_range(1..50) * usize::from(gso_size);
            let len = segments.min(payload.len()) - rng.random_range(0..usize::from(gso_size));
            let options = [1u8; 40];
            let tcp = Tcp {
                seq: rng.random::<u32>() | 0xffff_0000,
                ack: rng.random(),
                flags: rng.random::<u8>() | TCP_CWR,
                window: rng.random(),
                options: &options[..rng.random_range(0..=10) * 4],
            };
            check(&tcp_case(builder, tcp, &payload[..len.max(1)], gso_size));
            check(&udp_case(builder, &payload[..len.max(1)], gso_size));
        }
    }

    #[test]
    fn a_full_super_packet_becomes_45_and_a_tail() {
        let payload = vec![7; 65_535 - 52];
        let tcp = Tcp {
            flags: 0x18,
            options: &[1; 12],
            ..Tcp::default()
        };
        let case = tcp_case(builder(false), tcp, &payload, 1368);
        check(&case);
        assert_eq!(case.segments.len(), 48);
        let last = &case.segments[47];
        assert_eq!(Headers::parse(last).unwrap().tcp(last).unwrap().flags, 0x18);
    }

    #[test]
    fn a_udp_segment_whose_checksum_comes_out_as_zero_carries_ffff() {
        // The last word of the payload is chosen so that the sum is all ones.
        let builder = builder(false);
        let mut payload = vec![0u8; 20];
        let packet = builder.udp(&payload);
        let sum = [packet[26], packet[27]];
        payload[8..10].copy_from_slice(&sum);
        let mut doubled = payload.clone();
        doubled.extend(&payload);
        let case = udp_case(builder, &doubled, 20);
        check(&case);
        assert_eq!(case.segments[0][26..28], [0xff, 0xff]);
    }

    #[test]
    fn a_lone_packet_gets_its_checksum_and_nothing_else_changes() {
        for v6 in [false, true] {
            let want = builder(v6).udp(b"lone");
            let mut packet = want.clone();
            leave_checksum(&mut packet, UDP_CHECKSUM_OFFSET);
            packet.extend([0xee; 3]);
            let ip_len = if v6 { 40 } else { 20 };
            let vnet = VnetHdr::new(GSO_NONE, 0, 0, ip_len, 6);
            check(&Case {
                vnet,
                packet,
                segments: vec![want.clone()],
            });
            check(&Case {
                vnet: VnetHdr::PLAIN,
                packet: want.clone(),
                segments: vec![want],
            });
        }
    }

    #[test]
    fn a_super_packet_of_one_segment_or_without_payload_is_one_packet() {
        let tcp = Tcp {
            flags: 0x91,
            ..Tcp::default()
        };
        check(&tcp_case(builder(false), tcp, &[1; 100], 100));
        let mut empty = tcp_case(builder(false), tcp, &[], 100);
        empty.segments = vec![builder(false).tcp(&tcp, &[])];
        check(&empty);
    }

    #[test]
    fn headers_that_lie_are_dropped() {
        let good = tcp_case(builder(false), Tcp::default(), &[1; 5000], 1000);
        let v6 = tcp_case(builder(true), Tcp::default(), &[1; 5000], 1000);
        let udp = udp_case(builder(false), &[1; 5000], 1000);
        let invalid = |vnet: VnetHdr, packet: &[u8]| {
            assert_eq!(
                plan(&vnet, packet).unwrap_err(),
                DropReason::VnetInvalid,
                "{vnet:?}"
            );
        };
        invalid(VnetHdr::new(GSO_TCPV4, 40, 0, 20, 16), &good.packet);
        invalid(VnetHdr::new(GSO_TCPV4, 40, 1000, 24, 16), &good.packet);
        invalid(VnetHdr::new(GSO_TCPV4, 40, 1000, 20, 6), &good.packet);
        invalid(VnetHdr::new(GSO_TCPV6, 40, 1000, 20, 16), &good.packet);
        invalid(VnetHdr::new(GSO_TCPV4, 60, 1000, 40, 16), &v6.packet);
        invalid(VnetHdr::new(GSO_UDP_L4, 40, 1000, 20, 6), &good.packet);
        invalid(VnetHdr::new(GSO_TCPV4, 40, 1000, 20, 16), &udp.packet);
        invalid(VnetHdr::new(GSO_UDP, 28, 1000, 20, 6), &udp.packet);
        invalid(VnetHdr::new(77, 28, 1000, 20, 6), &udp.packet);
        // Checksum places: inside the IP header, across the end, far away.
        invalid(VnetHdr::new(GSO_NONE, 0, 0, 10, 0), &udp.packet);
        invalid(VnetHdr::new(GSO_NONE, 0, 0, 20, 5007), &udp.packet);
        invalid(VnetHdr::new(GSO_NONE, 0, 0, 0xffff, 0xffff), &udp.packet);
        // Super-packets that are fragments.
        let fragment = Builder {
            fragment: 0x2000,
            ..builder(false)
        }
        .udp(&[1; 5000]);
        invalid(udp.vnet, &fragment);
    }

    #[test]
    fn transport_headers_that_are_cut_or_too_short_are_dropped() {
        let good = tcp_case(builder(false), Tcp::default(), &[1; 40], 10);
        let malformed = |vnet: &VnetHdr, packet: &[u8]| {
            let refused = plan(vnet, packet).unwrap_err();
            assert_eq!(refused, DropReason::InnerMalformed);
        };
        for words in [0u8, 4, 16] {
            let mut packet = good.packet.clone();
            packet[32] = words << 4;
            malformed(&good.vnet, &packet);
        }
        malformed(&good.vnet, &builder(false).ip(TCP, &[0; 19]));
        let vnet = VnetHdr::new(GSO_UDP_L4, 0, 10, 20, 6);
        malformed(&vnet, &builder(false).ip(UDP, &[0; 7]));
        malformed(&vnet, &[]);
    }

    /// Random headers over damaged packets: every plan that is made can be carried out.
    #[test]
    fn whatever_is_planned_can_be_cut() {
        let mut rng = seeded();
        let tcp = Tcp {
            flags: 0x18,
            options: &[1; 8],
            ..Tcp::default()
        };
        let mut dst = vec![0; 70_000];
        let mut planned = 0;
        for _ in 0..30_000 {
            let builder = builder(rng.random());
            let payload = vec![0x5a; rng.random_range(0..300)];
            let mut packet = if rng.random() {
                builder.tcp(&tcp, &payload)
            } else {
                builder.udp(&payload)
            };
            for _ in 0..rng.random_range(0..3) {
                let at = rng.random_range(0..packet.len().min(64));
                packet[at] = rng.random();
            }
            let mut vnet = [0u8; 10];
            vnet[0] = rng.random::<u8>() & NEEDS_CSUM;
            vnet[1] = [0, 1, 3, 4, 5, 0x81][rng.random_range(0..6)];
            vnet[4] = rng.random_range(0..40);
            vnet[6] = [20, 40, rng.random()][rng.random_range(0..3)];
            vnet[8] = [6, 16, rng.random()][rng.random_range(0..3)];
            let vnet = VnetHdr::read_from_bytes(&vnet).unwrap();
            let Ok(plan) = plan(&vnet, &packet) else {
                continue;
            };
            planned += 1;
            let mut staged = packet.clone();
            for i in 0..plan.len() {
                let len = plan.write(i, &packet, &mut dst);
                let range = plan.stage(i, &mut staged);
                assert!(staged[range] == dst[..len]);
                if plan.len() > 1 {
                    assert_eq!(Headers::parse(&dst[..len]).unwrap().total_len, len);
                }
            }
        }
        assert!(planned > 3000, "only {planned} plans");
    }
}
