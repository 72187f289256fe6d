#![forbid(unsafe_code)]
//! Typed views of inner packets: IPv4, IPv6, TCP and UDP headers, and what the rooms ask of them.
//!
//! [`Headers::parse`] walks a packet once (IPv6 extension headers included) and checks every
//! length; later rooms take the result instead of walking again. Layouts are derive-checked
//! zero-copy types, all of alignment 1.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::stats::DropReason;

/// ICMP for IPv4.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// Tailscale's own message protocol between nodes.
pub const TSMP: u8 = 99;
/// SCTP.
pub const SCTP: u8 = 132;

/// TCP flag: last of the sender's data.
pub const TCP_FIN: u8 = 0x01;
/// TCP flag: opens a connection.
pub const TCP_SYN: u8 = 0x02;
/// TCP flag: deliver without waiting for more.
pub const TCP_PSH: u8 = 0x08;
/// TCP flag: the acknowledgement number counts.
pub const TCP_ACK: u8 = 0x10;
/// TCP flag: congestion window reduced.
pub const TCP_CWR: u8 = 0x80;

/// Offset of the TOS byte in an IPv4 header.
pub const TOS_V4_OFFSET: usize = 1;
/// IPv6 extension headers walked at most; what is behind more of them is not seen.
pub const EXTENSION_HEADERS_MAX: usize = 8;

/// The family of an inner packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpVersion {
    /// The version a packet's first byte claims.
    ///
    /// # Errors
    /// [`DropReason::InnerMalformed`] if there is none or it is neither 4 nor 6.
    #[inline]
    pub fn of(packet: &[u8]) -> Result<IpVersion, DropReason> {
        match packet.first().map(|byte| byte >> 4) {
            Some(4) => Ok(IpVersion::V4),
            Some(6) => Ok(IpVersion::V6),
            Some(_) | None => Err(DropReason::InnerMalformed),
        }
    }
}

/// IPv4 header without options, 20 bytes (RFC 791 §3.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Ipv4Header {
    /// Version 4 in the high half, header length in 32-bit words in the low half.
    pub version_ihl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Header and payload in bytes.
    pub total_len: U16,
    /// Identification, for reassembly.
    pub id: U16,
    /// Flags (bit 14: do not fragment, bit 13: more fragments) and offset in units of 8 bytes.
    pub fragment: U16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol of the payload.
    pub protocol: u8,
    /// Checksum over the header.
    pub checksum: U16,
    /// Source address.
    pub src: [u8; 4],
    /// Destination address.
    pub dst: [u8; 4],
}

/// "Do not fragment" in [`Ipv4Header::fragment`].
pub const IPV4_DF: u16 = 0x4000;
/// "More fragments" in [`Ipv4Header::fragment`].
pub const IPV4_MF: u16 = 0x2000;

/// IPv6 fixed header, 40 bytes (RFC 8200 §3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Ipv6Header {
    /// Version (4 bits), traffic class (8), flow label (20).
    pub version_class_label: U32,
    /// What follows this header, in bytes.
    pub payload_len: U16,
    /// Protocol or first extension header.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub src: [u8; 16],
    /// Destination address.
    pub dst: [u8; 16],
}

/// TCP header without options, 20 bytes (RFC 9293 §3.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct TcpHeader {
    /// Source port.
    pub src_port: U16,
    /// Destination port.
    pub dst_port: U16,
    /// Sequence number of the first payload byte.
    pub seq: U32,
    /// Acknowledgement number.
    pub ack: U32,
    /// Header length in 32-bit words in the high half; reserved bits below.
    pub data_offset: u8,
    /// `TCP_*` flags.
    pub flags: u8,
    /// Receive window.
    pub window: U16,
    /// Checksum over pseudo-header, header and payload.
    pub checksum: U16,
    /// Urgent pointer.
    pub urgent: U16,
}

/// UDP header, 8 bytes (RFC 768).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct UdpHeader {
    /// Source port.
    pub src_port: U16,
    /// Destination port.
    pub dst_port: U16,
    /// Header and payload in bytes.
    pub len: U16,
    /// Checksum over pseudo-header, header and payload; 0 for none (IPv4 only).
    pub checksum: U16,
}

const _: () = assert!(size_of::<Ipv4Header>() == 20);
const _: () = assert!(size_of::<Ipv6Header>() == 40);
const _: () = assert!(size_of::<TcpHeader>() == 20);
const _: () = assert!(size_of::<UdpHeader>() == 8);

/// Offset of the checksum in a TCP header.
pub const TCP_CHECKSUM_OFFSET: usize = 16;
/// Offset of the checksum in a UDP header.
pub const UDP_CHECKSUM_OFFSET: usize = 6;

/// A packet's place in its datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// Not fragmented (an IPv6 atomic fragment counts as such).
    Whole,
    /// The first fragment: it has the transport header.
    First,
    /// A later fragment, at this offset in units of 8 bytes.
    Later(u16),
}

/// What one walk over an inner packet's headers found. Every offset and length lies inside the
/// packet it was parsed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Family.
    pub version: IpVersion,
    /// TOS or traffic class: DSCP and ECN.
    pub tos: u8,
    /// Transport protocol, behind any extension headers; [`Headers::is_hidden`] tells where there is
    /// none to see.
    pub protocol: u8,
    /// Place in the datagram.
    pub fragment: Fragment,
    /// Where the transport header starts, or what hides it, in bytes.
    pub l4_offset: usize,
    /// The IP packet in bytes; what follows in the buffer is padding.
    pub total_len: usize,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
}

impl Headers {
    /// Walks the headers of an IP packet; bytes behind its own length are allowed (WireGuard pads).
    ///
    /// # Errors
    /// [`DropReason::InnerMalformed`] if the IP header is truncated or its lengths contradict each
    /// other.
    #[inline]
    pub fn parse(packet: &[u8]) -> Result<Headers, DropReason> {
        match IpVersion::of(packet)? {
            IpVersion::V4 => parse_v4(packet),
            IpVersion::V6 => parse_v6(packet),
        }
        .ok_or(DropReason::InnerMalformed)
    }

    /// Whether the transport header was not reached: behind more than [`EXTENSION_HEADERS_MAX`] IPv6
    /// extension headers, or behind one that the packet cuts off. `protocol` is that header's number.
    #[inline]
    pub fn is_hidden(&self) -> bool {
        self.version == IpVersion::V6
            && is_extension(self.protocol)
            && !matches!(self.fragment, Fragment::Later(_))
    }

    /// The transport header and payload; empty if the packet ends before it.
    #[inline]
    pub fn transport<'a>(&self, packet: &'a [u8]) -> &'a [u8] {
        packet
            .get(self.l4_offset..self.total_len)
            .unwrap_or_default()
    }

    /// The same where that is of this protocol, and begins in this fragment.
    #[inline]
    fn transport_of<'a>(&self, protocol: u8, packet: &'a [u8]) -> Option<&'a [u8]> {
        let here = self.protocol == protocol && !matches!(self.fragment, Fragment::Later(_));
        here.then(|| self.transport(packet))
    }

    /// The TCP header, if the packet has a whole one.
    #[inline]
    pub fn tcp<'a>(&self, packet: &'a [u8]) -> Option<&'a TcpHeader> {
        let transport = self.transport_of(TCP, packet)?;
        let (header, _) = TcpHeader::ref_from_prefix(transport).ok()?;
        Some(header)
    }

    /// The UDP header, if the packet has one.
    #[inline]
    pub fn udp<'a>(&self, packet: &'a [u8]) -> Option<&'a UdpHeader> {
        let transport = self.transport_of(UDP, packet)?;
        let (header, _) = UdpHeader::ref_from_prefix(transport).ok()?;
        Some(header)
    }

    /// Source and destination port of TCP, UDP and SCTP.
    #[inline]
    pub fn ports(&self, packet: &[u8]) -> Option<(u16, u16)> {
        if !matches!(self.protocol, TCP | UDP | SCTP) {
            return None;
        }
        let transport = self.transport_of(self.protocol, packet)?;
        let bytes = transport.first_chunk::<4>()?;
        Some((
            u16::from_be_bytes([bytes[0], bytes[1]]),
            u16::from_be_bytes([bytes[2], bytes[3]]),
        ))
    }

    /// Type and code of ICMP and ICMPv6.
    #[inline]
    pub fn icmp(&self, packet: &[u8]) -> Option<(u8, u8)> {
        let proper = match self.version {
            IpVersion::V4 => ICMP,
            IpVersion::V6 => ICMPV6,
        };
        let bytes = self.transport_of(proper, packet)?.first_chunk::<2>()?;
        Some((bytes[0], bytes[1]))
    }

    /// The packet's flow. Ports are 0 where there are none, so all fragments but the first of a
    /// datagram share one flow.
    #[inline]
    pub fn flow(&self, packet: &[u8]) -> Flow {
        let (src_port, dst_port) = self.ports(packet).unwrap_or_default();
        Flow {
            src: self.src,
            dst: self.dst,
            protocol: self.protocol,
            src_port,
            dst_port,
        }
    }
}

/// The five-tuple, as seen in the packet's own direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Transport protocol.
    pub protocol: u8,
    /// Source port, or 0.
    pub src_port: u16,
    /// Destination port, or 0.
    pub dst_port: u16,
}

impl Flow {
    /// The flow of the answers.
    #[must_use]
    #[inline]
    pub fn reversed(self) -> Flow {
        Flow {
            src: self.dst,
            dst: self.src,
            protocol: self.protocol,
            src_port: self.dst_port,
            dst_port: self.src_port,
        }
    }

    /// A well-mixed hash of the flow, the same in every process. Not proof against somebody who
    /// looks for collisions: bound what depends on it, or use [`Flow::keyed_hash`].
    #[inline]
    pub fn hash(&self) -> u64 {
        let ports = (u64::from(self.src_port) << 24)
            | (u64::from(self.dst_port) << 8)
            | u64::from(self.protocol);
        let addresses = match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                (u64::from(src.to_bits()) << 32) | u64::from(dst.to_bits())
            }
            (src, dst) => mix(
                mix_address(src, 0x243f_6a88_85a3_08d3),
                mix_address(dst, 0x1319_8a2e_0370_7344),
            ),
        };
        mix(
            addresses ^ 0xa409_3822_299f_31d0,
            ports ^ 0x082e_fa98_ec4e_6c89,
        )
    }

    /// A hash of the flow for who knows the key: whoever does not cannot look for collisions, though
    /// they may choose addresses and ports.
    #[inline]
    pub fn keyed_hash(&self, key: &HashKey) -> u64 {
        let HashKey([k0, k1, k2, k3, k4, k5]) = *key;
        let ports = (u64::from(self.src_port) << 24)
            | (u64::from(self.dst_port) << 8)
            | u64::from(self.protocol);
        let addresses = match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                (u64::from(src.to_bits()) << 32) | u64::from(dst.to_bits())
            }
            (src, dst) => {
                let (src, dst) = (halves(bits_of(src)), halves(bits_of(dst)));
                let src = mix(src.0 ^ k2, src.1 ^ k3);
                mix(src ^ k0, mix(dst.0 ^ k4, dst.1 ^ k5) ^ k1)
            }
        };
        // The second round hides from the first that it is nearly linear in the ports.
        mix(mix(addresses ^ k0, ports ^ k1) ^ k4, k5 | 1)
    }
}

/// What [`Flow::keyed_hash`] is keyed with: random, and never told.
#[derive(Clone)]
pub struct HashKey(pub [u64; 6]);

impl HashKey {
    /// A key of its own.
    #[must_use]
    pub fn random() -> HashKey {
        HashKey(rand::random())
    }
}

impl std::fmt::Debug for HashKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HashKey")
    }
}

fn bits_of(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn mix_address(address: IpAddr, seed: u64) -> u64 {
    match address {
        IpAddr::V4(v4) => u64::from(v4.to_bits()) ^ seed,
        IpAddr::V6(v6) => {
            let (high, low) = halves(v6.to_bits());
            mix(high ^ seed, low ^ 0x452821e638d01377)
        }
    }
}

/// Multiplies to 128 bits and folds the halves: every input bit reaches every output bit.
#[inline]
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let (high, low) = halves(u128::from(a) * u128::from(b));
    high ^ low
}

#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "splits the number into its halves"
)]
fn halves(value: u128) -> (u64, u64) {
    ((value >> 64) as u64, value as u64)
}

fn parse_v4(packet: &[u8]) -> Option<Headers> {
    let (header, _) = Ipv4Header::ref_from_prefix(packet).ok()?;
    let header_len = usize::from(header.version_ihl & 0x0f) * 4;
    let total_len = usize::from(header.total_len.get());
    if header_len < size_of::<Ipv4Header>() || total_len < header_len || packet.len() < total_len {
        return None;
    }
    let field = header.fragment.get();
    let offset = field & 0x1fff;
    let fragment = match (offset, field & IPV4_MF != 0) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First,
        (offset, _) => Fragment::Later(offset),
    };
    Some(Headers {
        version: IpVersion::V4,
        tos: header.tos,
        protocol: header.protocol,
        fragment,
        l4_offset: header_len,
        total_len,
        src: IpAddr::V4(Ipv4Addr::from(header.src)),
        dst: IpAddr::V4(Ipv4Addr::from(header.dst)),
    })
}

fn parse_v6(packet: &[u8]) -> Option<Headers> {
    let (header, _) = Ipv6Header::ref_from_prefix(packet).ok()?;
    let total_len = size_of::<Ipv6Header>() + usize::from(header.payload_len.get());
    let packet = packet.get(..total_len)?;
    let [first, second, ..] = *packet.first_chunk::<2>()?;
    let (protocol, l4_offset, fragment) = walk_extensions(packet, header.next_header);
    Some(Headers {
        version: IpVersion::V6,
        tos: (first << 4) | (second >> 4),
        protocol,
        fragment,
        l4_offset,
        total_len,
        src: IpAddr::V6(Ipv6Addr::from(header.src)),
        dst: IpAddr::V6(Ipv6Addr::from(header.dst)),
    })
}

/// Walks IPv6 extension headers (RFC 8200 §4) to the transport header: its protocol, its offset and
/// the packet's place in its datagram. A chain that is too long or runs past the packet is walked as far
/// as it goes, and the first header that was not is what is found: a forwarding kernel does not look.
fn walk_extensions(packet: &[u8], first: u8) -> (u8, usize, Fragment) {
    let mut next = first;
    let mut offset = size_of::<Ipv6Header>();
    let mut fragment = Fragment::Whole;
    for _ in 0..EXTENSION_HEADERS_MAX {
        if !is_extension(next) {
            break;
        }
        let rest = packet.get(offset..).unwrap_or_default();
        let Some(header) = rest.first_chunk::<8>() else {
            break;
        };
        let len = match next {
            FRAGMENT => 8,
            AUTHENTICATION => 8 + usize::from(header[1]) * 4,
            _ => 8 + usize::from(header[1]) * 8,
        };
        if len > rest.len() {
            break;
        }
        if next == FRAGMENT {
            let field = u16::from_be_bytes([header[2], header[3]]);
            fragment = match (field >> 3, field & 1 != 0) {
                (0, false) => Fragment::Whole,
                (0, true) => Fragment::First,
                (units, _) => Fragment::Later(units),
            };
        }
        next = header[0];
        offset += len;
        // What follows the header of a later fragment is payload, not headers.
        if matches!(fragment, Fragment::Later(_)) {
            break;
        }
    }
    (next, offset, fragment)
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;

/// Whether a next header is one that has another behind it, which we know how to find.
fn is_extension(next: u8) -> bool {
    matches!(
        next,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION | MOBILITY | HIP | SHIM6
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::build::{Builder, Tcp};
    use crate::seeded;
    use rand::{Rng, RngExt};

    fn v4() -> Builder {
        Builder::new(
            "100.64.0.1:1000".parse().unwrap(),
            "100.64.0.2:2000".parse().unwrap(),
        )
    }

    fn v6() -> Builder {
        Builder::new(
            "[fd7a::1]:1000".parse().unwrap(),
            "[fd7a::2]:2000".parse().unwrap(),
        )
    }

    #[test]
    fn fields_are_found_in_both_families() {
        let tcp = Tcp {
            seq: 7,
            options: &[1; 12],
            ..Tcp::default()
        };
        for (builder, l4_offset) in [(v4(), 20), (v6(), 40)] {
            let builder = Builder {
                tos: 0xb9,
                ..builder
            };
            let mut packet = builder.tcp(&tcp, b"hello");
            let len = packet.len();
            packet.extend([0; 11]);
            let headers = Headers::parse(&packet).unwrap();
            assert_eq!(headers.tos, 0xb9);
            assert_eq!(headers.protocol, TCP);
            assert_eq!((headers.l4_offset, headers.total_len), (l4_offset, len));
            assert_eq!(
                (headers.src, headers.dst),
                (builder.src.ip(), builder.dst.ip())
            );
            assert_eq!(headers.ports(&packet), Some((1000, 2000)));
            assert_eq!(headers.tcp(&packet).unwrap().seq.get(), 7);
            assert!(headers.udp(&packet).is_none());
            assert!(headers.icmp(&packet).is_none());
            let flow = headers.flow(&packet);
            assert_eq!(flow.reversed().reversed(), flow);
            assert_ne!(flow.reversed().hash(), flow.hash());
            // Every truncation is malformed.
            for cut in 0..len {
                assert_eq!(
                    Headers::parse(&packet[..cut]),
                    Err(DropReason::InnerMalformed),
                    "cut at {cut}"
                );
            }
        }
    }

    #[test]
    fn ipv4_lengths_that_contradict_each_other_are_malformed() {
        let good = v4().udp(b"x");
        for (at, value) in [
            (0, 0x44),
            (0, 0x4f),
            (0, 0x55),
            (3, 19),
            (3, 200),
            (0, 0x05),
        ] {
            let mut packet = good.clone();
            packet[at] = value;
            assert!(Headers::parse(&packet).is_err(), "byte {at} = {value:#x}");
        }
    }

    #[test]
    fn ipv4_fragments_are_told_apart() {
        for (field, want) in [
            (0x0000, Fragment::Whole),
            (0x4000, Fragment::Whole),
            (0x2000, Fragment::First),
            (0x2001, Fragment::Later(1)),
            (0x00b9, Fragment::Later(0xb9)),
        ] {
            let packet = Builder {
                fragment: field,
                ..v4()
            }
            .udp(b"payload");
            let headers = Headers::parse(&packet).unwrap();
            assert_eq!(headers.fragment, want);
            let later = matches!(want, Fragment::Later(_));
            assert_eq!(headers.ports(&packet).is_none(), later);
        }
    }

    /// Puts extension headers in front of a UDP packet and says what the walk should find.
    fn with_extensions(chain: &[(u8, Vec<u8>)]) -> Vec<u8> {
        let udp = v6().udp(b"payload");
        let mut body = Vec::new();
        for (i, (_, bytes)) in chain.iter().enumerate() {
            let at = body.len();
            body.extend(bytes);
            body[at] = chain.get(i + 1).map_or(UDP, |(kind, _)| *kind);
        }
        body.extend(&udp[40..]);
        v6().ip(chain.first().map_or(UDP, |(kind, _)| *kind), &body)
    }

    #[test]
    fn ipv6_extension_headers_are_walked() {
        let eight = |len: u8| [vec![0, len], vec![0; 6 + usize::from(len) * 8]].concat();
        let authentication = [vec![0, 4], vec![0; 22]].concat();
        let atomic = vec![0, 0, 0, 0, 1, 2, 3, 4];
        let first = vec![0, 0, 0, 1, 1, 2, 3, 4];
        let later = vec![0, 0, 0x05, 0xa0, 1, 2, 3, 4];
        for (chain, extra, fragment) in [
            (vec![], 0, Fragment::Whole),
            (
                vec![(0, eight(0)), (60, eight(2)), (43, eight(1))],
                48,
                Fragment::Whole,
            ),
            (vec![(51, authentication)], 24, Fragment::Whole),
            (vec![(44, atomic)], 8, Fragment::Whole),
            (vec![(0, eight(0)), (44, first)], 16, Fragment::First),
            (vec![(44, later)], 8, Fragment::Later(180)),
        ] {
            let packet = with_extensions(&chain);
            let headers = Headers::parse(&packet).unwrap();
            assert_eq!(headers.protocol, UDP);
            assert_eq!(headers.l4_offset, 40 + extra);
            assert_eq!(headers.fragment, fragment);
        }
    }

    /// The kernel carries them, and so do we: what they hide is not seen, and nothing else is wrong.
    #[test]
    fn endless_or_overlong_extension_headers_hide_the_transport() {
        let eight = |len: u8| [vec![0, len], vec![0; 6]].concat();
        let many = |count| with_extensions(&vec![(60, eight(0)); count]);
        let visible = Headers::parse(&many(EXTENSION_HEADERS_MAX)).unwrap();
        assert!(!visible.is_hidden());
        assert_eq!((visible.protocol, visible.l4_offset), (UDP, 40 + 64));
        // Too many; the ninth is there in part; the second runs past the end.
        let mut cut = many(EXTENSION_HEADERS_MAX + 1);
        cut.truncate(40 + 64 + 4);
        cut[4..6].copy_from_slice(&68u16.to_be_bytes());
        let overlong = with_extensions(&[(0, eight(0)), (60, eight(255))]);
        for (packet, protocol, l4_offset) in [
            (many(EXTENSION_HEADERS_MAX + 1), 60, 40 + 64),
            (many(150), 60, 40 + 64),
            (cut, 60, 40 + 64),
            (overlong, 60, 48),
            (v6().ip(44, &[0; 7]), 44, 40),
            (v6().ip(51, &[]), 51, 40),
        ] {
            let headers = Headers::parse(&packet).unwrap();
            assert!(headers.is_hidden());
            assert_eq!((headers.protocol, headers.l4_offset), (protocol, l4_offset));
            assert_eq!(
                (headers.total_len, headers.fragment),
                (packet.len(), Fragment::Whole)
            );
            assert_eq!(headers.ports(&packet), None);
            assert_eq!(headers.flow(&packet).dst_port, 0);
        }
        // IPv4 numbers its protocols alike, but has no such headers.
        let v4 = Headers::parse(&v4().ip(60, &[0; 8])).unwrap();
        assert!(!v4.is_hidden());
    }

    /// Random bytes that look like IP often enough to get past the first checks.
    #[test]
    fn random_bytes_never_panic_and_offsets_stay_inside() {
        let mut rng = seeded();
        for _ in 0..200_000 {
            let mut bytes = vec![0u8; rng.random_range(0..120)];
            rng.fill_bytes(&mut bytes);
            if let Some(first) = bytes.first_mut() {
                *first = [0x45, 0x46, 0x60, 0x4f, *first][rng.random_range(0..5)];
            }
            if bytes.len() > 6 && rng.random() {
                bytes[2] = 0;
                bytes[4] = 0;
                bytes[6] = [0, 43, 44, 51, 60, 17][rng.random_range(0..6)];
            }
            if let Ok(headers) = Headers::parse(&bytes) {
                assert!(headers.l4_offset <= headers.total_len);
                assert!(headers.total_len <= bytes.len());
                let _ = (
                    headers.flow(&bytes).hash(),
                    headers.tcp(&bytes),
                    headers.icmp(&bytes),
                );
            }
        }
    }

    #[test]
    fn flows_spread_over_a_few_buckets_evenly() {
        let mut buckets = [0u32; 8];
        for port in 0..8000u16 {
            let flow = Flow {
                src: "100.64.0.1".parse().unwrap(),
                dst: "100.64.0.2".parse().unwrap(),
                protocol: TCP,
                src_port: 32_768 + port,
                dst_port: 443,
            };
            buckets[usize::try_from(flow.hash() % 8).unwrap()] += 1;
        }
        assert!(
            buckets.iter().all(|n| (850..1150).contains(n)),
            "{buckets:?}"
        );
    }
}
