#![forbid(unsafe_code)]
//! Builds whole, valid packets, plainly and slowly: for tests, benches and self-tests, where they
//! are the other opinion on what the rooms compute.

use std::net::{IpAddr, SocketAddr};

use super::checksum::{self, Sum};
use super::header::{ICMP, ICMPV6, IpVersion, TCP, TCP_ACK, TCP_PSH, UDP};
use super::vnet::{GSO_TCPV4, VnetHdr};

/// What the IP header of the built packets says. Addresses are of one family.
#[derive(Clone, Copy, Debug)]
pub struct Builder {
    /// Source address and port.
    pub src: SocketAddr,
    /// Destination address and port.
    pub dst: SocketAddr,
    /// TOS or traffic class.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// IPv4 identification.
    pub id: u16,
    /// IPv4 flags and fragment offset.
    pub fragment: u16,
    /// IPv6 flow label, 20 bits.
    pub label: u32,
}

/// The fields of a TCP header that differ between packets of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Tcp<'a> {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Flags.
    pub flags: u8,
    /// Window.
    pub window: u16,
    /// Options, a multiple of 4 bytes, at most 40.
    pub options: &'a [u8],
}

impl Default for Tcp<'_> {
    /// An acknowledgement in the middle of a connection, without options.
    fn default() -> Self {
        Tcp {
            seq: 1,
            ack: 1,
            flags: TCP_ACK,
            window: 500,
            options: &[],
        }
    }
}

impl Builder {
    /// Packets from `src` to `dst` with ordinary other fields: TTL 64, do not fragment.
    pub fn new(src: SocketAddr, dst: SocketAddr) -> Builder {
        Builder {
            src,
            dst,
            tos: 0,
            ttl: 64,
            id: 1,
            fragment: 0x4000,
            label: 0,
        }
    }

    /// A TCP packet.
    pub fn tcp(&self, tcp: &Tcp<'_>, payload: &[u8]) -> Vec<u8> {
        let mut body = Vec::with_capacity(60 + payload.len());
        body.extend(self.src.port().to_be_bytes());
        body.extend(self.dst.port().to_be_bytes());
        body.extend(tcp.seq.to_be_bytes());
        body.extend(tcp.ack.to_be_bytes());
        let words = u8::try_from(5 + tcp.options.len() / 4).expect("options are at most 40 bytes");
        body.extend([words << 4, tcp.flags]);
        body.extend(tcp.window.to_be_bytes());
        body.extend([0; 4]);
        body.extend(tcp.options);
        body.extend(payload);
        self.with_checksum(TCP, body, 16)
    }

    /// A TCP packet over IPv4 that is to be cut into segments of `mss` bytes behind 52 of headers, and
    /// its virtio-net header, as the TUN gives them.
    pub fn super_packet(&self, payload: &[u8], mss: u16) -> (VnetHdr, Vec<u8>) {
        let tcp = Tcp {
            flags: TCP_ACK | TCP_PSH,
            options: &[1; 12],
            ..Tcp::default()
        };
        let header = VnetHdr::new(GSO_TCPV4, 52, mss, 20, 16);
        (header, self.tcp(&tcp, payload))
    }

    /// A UDP packet.
    pub fn udp(&self, payload: &[u8]) -> Vec<u8> {
        let mut body = Vec::with_capacity(8 + payload.len());
        body.extend(self.src.port().to_be_bytes());
        body.extend(self.dst.port().to_be_bytes());
        body.extend(len_u16(8 + payload.len()).to_be_bytes());
        body.extend([0; 2]);
        body.extend(payload);
        self.with_checksum(UDP, body, 6)
    }

    /// An ICMP or ICMPv6 packet.
    pub fn icmp(&self, kind: u8, code: u8, payload: &[u8]) -> Vec<u8> {
        let mut body = vec![kind, code, 0, 0];
        body.extend(payload);
        match self.version() {
            IpVersion::V4 => {
                let sum = checksum::of(&body);
                body[2..4].copy_from_slice(&sum.to_be_bytes());
                self.ip(ICMP, &body)
            }
            IpVersion::V6 => self.with_checksum(ICMPV6, body, 2),
        }
    }

    /// An IP packet with any payload.
    pub fn ip(&self, protocol: u8, body: &[u8]) -> Vec<u8> {
        let mut packet = Vec::with_capacity(40 + body.len());
        match self.version() {
            IpVersion::V4 => {
                packet.extend([0x45, self.tos]);
                packet.extend(len_u16(20 + body.len()).to_be_bytes());
                packet.extend(self.id.to_be_bytes());
                packet.extend(self.fragment.to_be_bytes());
                packet.extend([self.ttl, protocol, 0, 0]);
                packet.extend(self.addresses());
                let sum = checksum::of(&packet);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            IpVersion::V6 => {
                let word = (6 << 28) | (u32::from(self.tos) << 20) | (self.label & 0xf_ffff);
                packet.extend(word.to_be_bytes());
                packet.extend(len_u16(body.len()).to_be_bytes());
                packet.extend([protocol, self.ttl]);
                packet.extend(self.addresses());
            }
        }
        packet.extend(body);
        packet
    }

    fn version(&self) -> IpVersion {
        if self.src.is_ipv4() {
            IpVersion::V4
        } else {
            IpVersion::V6
        }
    }

    fn addresses(&self) -> Vec<u8> {
        let octets = |addr: IpAddr| match addr {
            IpAddr::V4(addr) => addr.octets().to_vec(),
            IpAddr::V6(addr) => addr.octets().to_vec(),
        };
        [octets(self.src.ip()), octets(self.dst.ip())].concat()
    }

    fn with_checksum(&self, protocol: u8, mut body: Vec<u8>, at: usize) -> Vec<u8> {
        let len = u32::try_from(body.len()).expect("a packet is below 64 KiB");
        let sum = Sum::ZERO
            .add_bytes(&self.addresses())
            .add_u16(u16::from(protocol))
            .add_u32(len)
            .add_bytes(&body)
            .finish();
        let sum = if sum == 0 && protocol == UDP {
            0xffff
        } else {
            sum
        };
        body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        self.ip(protocol, &body)
    }
}

fn len_u16(len: usize) -> u16 {
    u16::try_from(len).expect("a packet is below 64 KiB")
}
