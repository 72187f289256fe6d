#![forbid(unsafe_code)]
//! Internet checksums: ones'-complement sums (RFC 1071) at memory speed.
//!
//! A sum is kept as 32-bit halves added into 64-bit lanes ([`sum_of`]): no carry to propagate inside
//! the loop. Words are taken in little-endian order and the folded result is swapped, which gives the
//! same number (RFC 1071 §2 B).

use super::header::IpVersion;
use crate::sys::sum_of;

/// A running ones'-complement sum. Bytes added with [`Sum::add_bytes`] count from an even offset,
/// so only the last slice may have an odd length.
///
/// The accumulator holds little-endian 16-bit words and cannot overflow: 2^32 additions of 32-bit
/// values fit, which is 16 GiB of data.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// The sum of nothing.
    pub const ZERO: Sum = Sum(0);

    /// Adds a slice; an odd last byte is padded with zero behind it.
    #[must_use]
    #[inline]
    pub fn add_bytes(self, bytes: &[u8]) -> Sum {
        Sum(self.0 + sum_of(bytes))
    }

    /// Adds a 16-bit field given as a number.
    #[must_use]
    #[inline]
    pub fn add_u16(self, value: u16) -> Sum {
        Sum(self.0 + u64::from(value.swap_bytes()))
    }

    /// Adds a 32-bit field given as a number.
    #[must_use]
    #[inline]
    pub fn add_u32(self, value: u32) -> Sum {
        Sum(self.0 + u64::from(value.swap_bytes()))
    }

    /// The folded sum, not complemented: what `NEEDS_CSUM` wants in the checksum field.
    #[must_use]
    #[inline]
    pub fn fold(self) -> u16 {
        let sum = (self.0 >> 32) + (self.0 & 0xffff_ffff);
        let sum = (sum >> 32) + (sum & 0xffff_ffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "two folds of 32 bits leave 16"
        )]
        let swapped = sum as u16;
        swapped.swap_bytes()
    }

    /// The checksum: the complement of [`Sum::fold`].
    #[must_use]
    #[inline]
    pub fn finish(self) -> u16 {
        !self.fold()
    }
}

/// The checksum over a slice: 0 when the slice contains a right one.
#[inline]
pub fn of(bytes: &[u8]) -> u16 {
    Sum::ZERO.add_bytes(bytes).finish()
}

/// The sum of a TCP or UDP pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1). `addresses` is source and
/// destination as they stand in the IP header: 8 or 32 bytes. `len` is the transport header and
/// payload in bytes.
#[inline]
pub fn pseudo_header(addresses: &[u8], protocol: u8, len: u32) -> Sum {
    debug_assert!(
        matches!(addresses.len(), 8 | 32),
        "two addresses of one family"
    );
    Sum(sum_of(addresses))
        .add_u16(u16::from(protocol))
        .add_u32(len)
}

/// Source and destination address bytes of an IP header, as [`pseudo_header`] takes them, or `None`
/// if the header is too short.
#[inline]
pub fn addresses(version: IpVersion, packet: &[u8]) -> Option<&[u8]> {
    match version {
        IpVersion::V4 => packet.get(12..20),
        IpVersion::V6 => packet.get(8..40),
    }
}

/// A checksum after one 16-bit word under it changed (RFC 1624, equation 3).
#[inline]
pub fn update(checksum: u16, before: u16, after: u16) -> u16 {
    Sum::ZERO
        .add_u16(!checksum)
        .add_u16(!before)
        .add_u16(after)
        .finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::sum_words;
    use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

    /// RFC 1071 §4.1, word by word: the oracle.
    fn reference(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap()
    }

    /// 0 and 0xffff are the same number in ones' complement; which of them a sum of non-zero bytes
    /// shows is the same for every order of addition.
    #[test]
    fn every_length_and_alignment_agrees_with_rfc_1071() {
        let seed = 0x5eed_0001;
        let mut rng = StdRng::seed_from_u64(seed);
        let mut bytes = vec![0u8; 2100];
        rng.fill_bytes(&mut bytes);
        for start in 0..8 {
            for len in 0..2048 {
                let slice = &bytes[start..start + len];
                assert_eq!(
                    Sum::ZERO.add_bytes(slice).fold(),
                    reference(slice),
                    "start {start}, length {len}, seed {seed:#x}"
                );
            }
        }
    }

    #[test]
    fn every_backend_agrees_on_extreme_bytes() {
        for fill in [0x00, 0xff, 0x80, 0x01] {
            let bytes = vec![fill; 65_535];
            assert_eq!(Sum::ZERO.add_bytes(&bytes).fold(), reference(&bytes));
            assert_eq!(sum_words(&bytes), sum_of(&bytes));
        }
    }

    #[test]
    fn parts_add_up_to_the_whole() {
        let mut rng = StdRng::seed_from_u64(2);
        let mut bytes = vec![0u8; 3000];
        rng.fill_bytes(&mut bytes);
        for _ in 0..500 {
            let cut = rng.random_range(0..1500) * 2;
            let (a, b) = bytes.split_at(cut);
            assert_eq!(
                Sum::ZERO.add_bytes(a).add_bytes(b).fold(),
                Sum::ZERO.add_bytes(&bytes).fold()
            );
        }
        let numbers = Sum::ZERO.add_u16(0x1234).add_u32(0x5678_9abc);
        assert_eq!(
            numbers.fold(),
            reference(&[0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc])
        );
    }

    #[test]
    fn known_answer_of_an_ipv4_header() {
        // A header in wide use as an example; its checksum is b861.
        let header: [u8; 20] = [
            0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8,
            0x00, 0x01, 0xc0, 0xa8, 0x00, 0xc7,
        ];
        assert_eq!(of(&header), 0);
        let mut blank = header;
        blank[10..12].fill(0);
        assert_eq!(of(&blank), 0xb861);
    }

    #[test]
    fn an_updated_checksum_is_the_one_computed_anew() {
        let mut rng = StdRng::seed_from_u64(3);
        for _ in 0..1000 {
            let mut bytes = [0u8; 20];
            rng.fill_bytes(&mut bytes);
            let old = of(&bytes);
            let before = u16::from_be_bytes([bytes[4], bytes[5]]);
            let after: u16 = rng.random();
            bytes[4..6].copy_from_slice(&after.to_be_bytes());
            let updated = update(old, before, after);
            // Compared as ones'-complement numbers, where 0 is 0xffff.
            assert_eq!(updated % 0xffff, of(&bytes) % 0xffff);
        }
    }
}
