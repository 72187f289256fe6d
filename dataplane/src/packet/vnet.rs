#![forbid(unsafe_code)]
//! The header in front of every packet of a TUN queue with `IFF_VNET_HDR`.
//!
//! Layout (`struct virtio_net_hdr`, virtio 1.2 §5.1.6; 10 bytes, native byte order, as TUN keeps it
//! unless told otherwise):
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | `flags`: bit 0 `NEEDS_CSUM` |
//! | 1 | 1 | `gso_type` |
//! | 2 | 2 | `hdr_len`: a hint, ignored on reads (forwarding kernels put the whole packet there) |
//! | 4 | 2 | `gso_size`: payload of a segment |
//! | 6 | 2 | `csum_start` |
//! | 8 | 2 | `csum_offset`, from `csum_start` |

use zerocopy::byteorder::native_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::stats::DropReason;

/// Length of the header in bytes.
pub const VNET_HDR_LEN: usize = 10;

/// `flags`: the checksum at `csum_start + csum_offset` holds the pseudo-header sum; whoever sends
/// the packet on completes it.
pub const NEEDS_CSUM: u8 = 1;

/// `gso_type`: one ordinary packet.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: UDP fragmentation, which we never ask for.
#[cfg(test)]
pub const GSO_UDP: u8 = 3;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: UDP segmentation (USO), either family.
pub const GSO_UDP_L4: u8 = 5;
/// Bit of `gso_type`: the TCP header has CWR set.
pub const GSO_ECN: u8 = 0x80;

/// The header, see the module's table.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
)]
#[repr(C)]
pub struct VnetHdr {
    /// `NEEDS_CSUM` or nothing.
    pub flags: u8,
    /// One of `GSO_*`, with `GSO_ECN` or without.
    pub gso_type: u8,
    /// Headers of a segment in bytes; only a hint.
    pub hdr_len: U16,
    /// Payload of a segment in bytes.
    pub gso_size: U16,
    /// Where the checksum starts to count, in bytes from the IP header.
    pub csum_start: U16,
    /// Where the checksum is stored, in bytes from `csum_start`.
    pub csum_offset: U16,
}

const _: () = assert!(size_of::<VnetHdr>() == VNET_HDR_LEN);

impl VnetHdr {
    /// The header of one whole packet with finished checksums: all zero.
    pub const PLAIN: VnetHdr = VnetHdr {
        flags: 0,
        gso_type: GSO_NONE,
        hdr_len: U16::ZERO,
        gso_size: U16::ZERO,
        csum_start: U16::ZERO,
        csum_offset: U16::ZERO,
    };

    /// The header of a packet whose checksum is left to the receiver of the header.
    pub fn new(
        gso_type: u8,
        hdr_len: u16,
        gso_size: u16,
        csum_start: u16,
        csum_offset: u16,
    ) -> Self {
        VnetHdr {
            flags: NEEDS_CSUM,
            gso_type,
            hdr_len: hdr_len.into(),
            gso_size: gso_size.into(),
            csum_start: csum_start.into(),
            csum_offset: csum_offset.into(),
        }
    }

    /// Splits what one TUN read gave into header and IP packet.
    ///
    /// # Errors
    /// [`DropReason::TunShort`] if the read is shorter than the header.
    #[inline]
    pub fn split(read: &[u8]) -> Result<(VnetHdr, &[u8]), DropReason> {
        VnetHdr::read_from_prefix(read).map_err(|_| DropReason::TunShort)
    }

    /// The same for a buffer that [`Plan::stage`](super::segment::Plan::stage) will write to.
    ///
    /// # Errors
    /// [`DropReason::TunShort`] if the read is shorter than the header.
    #[inline]
    pub fn split_mut(read: &mut [u8]) -> Result<(VnetHdr, &mut [u8]), DropReason> {
        let (header, packet) = read
            .split_at_mut_checked(VNET_HDR_LEN)
            .ok_or(DropReason::TunShort)?;
        let header = VnetHdr::read_from_bytes(header).map_err(|_| DropReason::TunShort)?;
        Ok((header, packet))
    }

    /// Whether the checksum is to be completed.
    pub fn needs_csum(&self) -> bool {
        self.flags & NEEDS_CSUM != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_kernel_has_them() {
        let header = VnetHdr::new(GSO_TCPV4, 0x0102, 0x0304, 0x0506, 0x0708);
        let mut want = vec![NEEDS_CSUM, GSO_TCPV4];
        for field in [0x0102u16, 0x0304, 0x0506, 0x0708] {
            want.extend(field.to_ne_bytes());
        }
        assert_eq!(header.as_bytes(), want);
        let mut read = want.clone();
        read.extend([0x45, 0]);
        let (again, packet) = VnetHdr::split(&read).unwrap();
        assert_eq!((again, packet), (header, &[0x45, 0][..]));
        assert_eq!(again.csum_start.get(), 0x0506);
        let (again, packet) = VnetHdr::split_mut(&mut read).unwrap();
        assert_eq!((again, &*packet), (header, &[0x45, 0][..]));
    }

    #[test]
    fn a_short_read_is_dropped() {
        for len in 0..VNET_HDR_LEN {
            assert_eq!(
                VnetHdr::split(&vec![0; len]).unwrap_err(),
                DropReason::TunShort
            );
            assert_eq!(
                VnetHdr::split_mut(&mut vec![0; len]).unwrap_err(),
                DropReason::TunShort
            );
        }
    }
}
