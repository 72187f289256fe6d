#![forbid(unsafe_code)]
//! Explicit congestion notification through the tunnel: RFC 6040, normal mode.
//!
//! Sealing copies the inner ECN field to the outer header (DSCP is not copied). Opening combines
//! the two by the table of RFC 6040 §4.2 (figure 4), so that a CE mark set on the underlay reaches
//! the inner transport.

use super::checksum;
use super::header::{IpVersion, TOS_V4_OFFSET};
use crate::stats::DropReason;

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

/// Rewrites the ECN field of an opened IP packet by the outer TOS byte it came with. The IPv4
/// header checksum is updated (RFC 1624), so a wrong one stays wrong.
///
/// # Errors
/// [`DropReason::EcnCongested`] by the rule of [`combine`]; [`DropReason::InnerMalformed`] if this
/// is not the start of an IP header.
pub fn decapsulate(packet: &mut [u8], outer_tos: u8) -> Result<(), DropReason> {
    match IpVersion::of(packet)? {
        IpVersion::V4 => {
            let Some(header) = packet.first_chunk_mut::<20>() else {
                return Err(DropReason::InnerMalformed);
            };
            let old = header[TOS_V4_OFFSET];
            let new = combine(old, outer_tos).ok_or(DropReason::EcnCongested)?;
            if new != old {
                let before = u16::from_be_bytes([header[0], old]);
                let after = u16::from_be_bytes([header[0], new]);
                let sum = u16::from_be_bytes([header[10], header[11]]);
                header[10..12].copy_from_slice(&checksum::update(sum, before, after).to_be_bytes());
                header[TOS_V4_OFFSET] = new;
            }
        }
        IpVersion::V6 => {
            let Some(header) = packet.first_chunk_mut::<2>() else {
                return Err(DropReason::InnerMalformed);
            };
            let old = (header[0] << 4) | (header[1] >> 4);
            let new = combine(old, outer_tos).ok_or(DropReason::EcnCongested)?;
            header[1] = (header[1] & 0x0f) | (new << 4);
        }
    }
    Ok(())
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
        decapsulate(&mut packet, CE).unwrap();
        assert_eq!(packet[1], CE);
        assert_eq!(checksum::of(&packet), 0);
    }

    #[test]
    fn a_ce_mark_reaches_an_ipv6_packet_and_the_flow_label_stays() {
        let mut packet = [0u8; 40];
        packet[..4].copy_from_slice(&[0x6b, 0xa1, 0x23, 0x45]);
        decapsulate(&mut packet, CE).unwrap();
        assert_eq!(packet[..4], [0x6b, 0xb1, 0x23, 0x45]);
    }

    #[test]
    fn short_or_foreign_bytes_are_malformed() {
        for bytes in [
            &mut [][..],
            &mut [0x45; 19][..],
            &mut [0x60][..],
            &mut [0x15; 40][..],
        ] {
            assert_eq!(decapsulate(bytes, CE), Err(DropReason::InnerMalformed));
        }
    }
}
