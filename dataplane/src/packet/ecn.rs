#![forbid(unsafe_code)]
//! Explicit congestion notification through the tunnel: RFC 6040, normal mode.
//!
//! Sealing copies the inner ECN field to the outer header (DSCP is not copied). Opening combines
//! the two by the table of RFC 6040 §4.2 (figure 4), so that a CE mark set on the underlay reaches
//! the inner transport.

use super::checksum;
use super::header::{IpVersion, TOS_V4_OFFSET};

/// The ECN bits of a TOS or traffic class byte.
pub const ECN_MASK: u8 = 0b11;
/// Not ECN-capable.
pub const NOT_ECT: u8 = 0b00;
/// ECN-capable, codepoint 1 (L4S).
pub const ECT1: u8 = 0b01;
/// ECN-capable, codepoint 0.
pub const ECT0: u8 = 0b10;
/// Congestion experienced.
pub const CE: u8 = 0b11;

/// The outer TOS byte for an inner TOS byte: its ECN bits, DSCP zero (RFC 6040 §4.1).
pub fn encapsulate(inner_tos: u8) -> u8 {
    inner_tos & ECN_MASK
}

/// The inner TOS byte after decapsulation, or `None` where the packet must be dropped: CE outside
/// and not ECN-capable inside (RFC 6040 §4.2).
pub fn combine(inner_tos: u8, outer_tos: u8) -> Option<u8> {
    let ecn = match (inner_tos & ECN_MASK, outer_tos & ECN_MASK) {
        (NOT_ECT, CE) => return None,
        (NOT_ECT, _) => NOT_ECT,
        (CE, _) | (_, CE) => CE,
        (ECT0, ECT1) => ECT1,
        (inner, _) => inner,
    };
    Some((inner_tos & !ECN_MASK) | ecn)
}

/// Writes the TOS or traffic class byte of an IP packet whose headers were parsed. The IPv4 header
/// checksum is updated (RFC 1624), so a wrong one stays wrong.
///
/// # Panics
/// If this is shorter than an IP header.
pub fn set_tos(packet: &mut [u8], version: IpVersion, tos: u8) {
    match version {
        IpVersion::V4 => {
            let old = std::mem::replace(&mut packet[TOS_V4_OFFSET], tos);
            if old != tos {
                let [before, after] = [old, tos].map(|tos| u16::from_be_bytes([packet[0], tos]));
                let sum = u16::from_be_bytes([packet[10], packet[11]]);
                packet[10..12].copy_from_slice(&checksum::update(sum, before, after).to_be_bytes());
            }
        }
        IpVersion::V6 => {
            packet[0] = (packet[0] & 0xf0) | (tos >> 4);
            packet[1] = (packet[1] & 0x0f) | (tos << 4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 6040 figure 4: rows by inner, columns Not-ECT, ECT(0), ECT(1), CE outside.
    #[test]
    fn decapsulation_follows_figure_4() {
        let outer = [NOT_ECT, ECT0, ECT1, CE];
        let rows = [
            (NOT_ECT, [Some(NOT_ECT), Some(NOT_ECT), Some(NOT_ECT), None]),
            (ECT0, [Some(ECT0), Some(ECT0), Some(ECT1), Some(CE)]),
            (ECT1, [Some(ECT1), Some(ECT1), Some(ECT1), Some(CE)]),
            (CE, [Some(CE), Some(CE), Some(CE), Some(CE)]),
        ];
        for (inner, row) in rows {
            for (outer, want) in outer.into_iter().zip(row) {
                let dscp = 0xb8;
                let got = combine(dscp | inner, 0x48 | outer);
                assert_eq!(
                    got,
                    want.map(|ecn| dscp | ecn),
                    "{inner:02b} in {outer:02b}"
                );
            }
        }
    }

    #[test]
    fn encapsulation_copies_ecn_and_leaves_dscp_behind() {
        assert_eq!(encapsulate(0xb8 | CE), CE);
        assert_eq!(encapsulate(0xb8 | ECT0), ECT0);
        assert_eq!(encapsulate(0xfc), NOT_ECT);
    }

    #[test]
    fn a_ce_mark_reaches_an_ipv4_packet_and_its_checksum_stays_right() {
        let mut packet = [0u8; 20];
        packet[0] = 0x45;
        packet[1] = ECT0;
        packet[3] = 20;
        packet[8] = 64;
        packet[12..20].copy_from_slice(&[100, 64, 0, 1, 100, 64, 0, 2]);
        let sum = checksum::of(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum::of(&packet), 0);
        set_tos(&mut packet, IpVersion::V4, CE);
        assert_eq!(packet[1], CE);
        assert_eq!(checksum::of(&packet), 0);
    }

    #[test]
    fn a_ce_mark_reaches_an_ipv6_packet_and_the_flow_label_stays() {
        let mut packet = [0u8; 40];
        packet[..4].copy_from_slice(&[0x6b, 0xa1, 0x23, 0x45]);
        set_tos(&mut packet, IpVersion::V6, 0xbb);
        assert_eq!(packet[..4], [0x6b, 0xb1, 0x23, 0x45]);
    }
}
