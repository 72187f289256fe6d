//! Which packets may be written as one, and what is done where the kernel does not take that.
//!
//! A kernel that gives super-packets need not take them: `virtio_net_hdr_to_skb` has refused right
//! ones with EINVAL in more than one release. What is refused is written again as the packets it is
//! made of. A kind that has been refused a few times is merged no more, by any shard.

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use zerocopy::IntoBytes;

use crate::named;
use crate::packet::segment::plan;
use crate::packet::vnet::{VNET_HDR_LEN, VnetHdr};

/// Refusals after which a kind is merged no more.
const REFUSALS_MAX: u32 = 3;

named! {
    /// A kind of super-packet.
    #[repr(u8)]
    pub enum Kind {
        /// TCP over IPv4.
        Tcp4 = "tcp4",
        /// TCP over IPv6.
        Tcp6 = "tcp6",
        /// UDP over IPv4.
        Udp4 = "udp4",
        /// UDP over IPv6.
        Udp6 = "udp6",
    }
}

/// A set of kinds.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Kinds(u8);

impl fmt::Debug for Kinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl Kinds {
    /// All of them.
    pub const ALL: Kinds = Kinds((1 << Kind::ALL.len()) - 1);
    /// None of them.
    pub const NONE: Kinds = Kinds(0);

    /// Whether a kind is among them.
    #[must_use]
    #[inline]
    pub fn has(self, kind: Kind) -> bool {
        self.0 & (1 << kind as u8) != 0
    }

    /// The same set with one kind more.
    #[must_use]
    pub fn with(self, kind: Kind) -> Kinds {
        Kinds(self.0 | (1 << kind as u8))
    }

    /// Those among them.
    pub fn iter(self) -> impl Iterator<Item = Kind> {
        let all = Kind::ALL.iter().copied();
        all.filter(move |kind| self.has(*kind))
    }
}

/// What the shards of one device merge, and what the kernel has refused of it.
#[derive(Debug)]
pub(crate) struct Merging {
    /// What may be merged as long as nothing is refused.
    wanted: Kinds,
    /// What has been refused too often, as [`Kinds`].
    refused: AtomicU8,
    refusals: [AtomicU32; Kind::ALL.len()],
}

impl Merging {
    /// Begins with all of `wanted`.
    pub(crate) fn new(wanted: Kinds) -> Merging {
        Merging {
            wanted,
            refused: AtomicU8::new(0),
            refusals: Default::default(),
        }
    }

    /// What to merge now.
    pub(crate) fn kinds(&self) -> Kinds {
        Kinds(self.wanted.0 & !self.refused().0)
    }

    /// What is merged no more because the kernel refused it.
    pub(crate) fn refused(&self) -> Kinds {
        Kinds(self.refused.load(Ordering::Relaxed))
    }

    /// Counts a refusal. True if it was the last there will be.
    pub(crate) fn refuse(&self, kind: Kind) -> bool {
        let before = self.refusals[kind as usize].fetch_add(1, Ordering::Relaxed);
        let last = before + 1 == REFUSALS_MAX;
        if last {
            let _others = self.refused.fetch_or(1 << kind as u8, Ordering::Relaxed);
        }
        last
    }
}

/// How a packet or super-packet was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    /// Packets taken.
    pub(crate) packets: usize,
    /// Packets not taken.
    pub(crate) failed: usize,
    /// Writes that succeeded.
    pub(crate) writes: usize,
    /// Bytes of them.
    pub(crate) bytes: usize,
    /// Why the kernel did not take the super-packet, although it took packets of it: an errno.
    pub(crate) refused: Option<i32>,
}

/// Writes one packet or super-packet (which stands for so many `packets`) behind its virtio-net header
/// through `write`, whose error is an errno. A super-packet that is refused is written again as the
/// packets it is made of, in order; `bytes` is used up by that.
pub(crate) fn write(
    bytes: &mut [u8],
    packets: usize,
    mut write: impl FnMut(&[u8]) -> Result<(), i32>,
) -> Written {
    let mut written = Written::default();
    let errno = match write(bytes) {
        Ok(()) => {
            return Written {
                packets,
                writes: 1,
                bytes: bytes.len(),
                ..written
            };
        }
        Err(errno) => errno,
    };
    // The interface is down, or gone, or full: nothing gets in.
    let closed = matches!(errno, libc::EIO | libc::EBADFD | libc::EAGAIN);
    let planned = VnetHdr::split(bytes).and_then(|(header, packet)| plan(&header, packet));
    let (false, false, Ok(plan)) = (closed, packets == 1, planned) else {
        return Written {
            failed: packets,
            ..written
        };
    };
    for i in 0..plan.len() {
        // A segment lies behind its place for a virtio-net header: over what has been written already.
        let at = plan.stage(i, &mut bytes[VNET_HDR_LEN..]);
        let packet = &mut bytes[at.start..at.end + VNET_HDR_LEN];
        packet[..VNET_HDR_LEN].copy_from_slice(VnetHdr::PLAIN.as_bytes());
        if write(packet).is_ok() {
            written.packets += 1;
            written.writes += 1;
            written.bytes += packet.len();
        } else {
            written.failed += 1;
        }
    }
    // Memory comes back.
    let refused = written.packets > 0 && !matches!(errno, libc::ENOMEM | libc::ENOBUFS);
    written.refused = refused.then_some(errno);
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coalesce::Coalescer;
    use crate::packet::build::{Builder, Tcp};
    use crate::packet::header::Headers;
    use crate::packet::vnet::{GSO_NONE, GSO_UDP_L4};
    use crate::tun::device::TunOffloads;

    /// Packets of one flow of each kind by turns, ten of each, the last one shorter.
    fn packets() -> Vec<Vec<u8>> {
        let v4 = |protocol| format!("10.0.0.1:{protocol}").parse().unwrap();
        let v6 = |protocol| format!("[fd00::1]:{protocol}").parse().unwrap();
        let mut packets = Vec::new();
        for i in 0..10u8 {
            let payload = [i; 1000];
            let payload = &payload[..if i == 9 { 300 } else { 1000 }];
            let tcp = Tcp {
                seq: 1000 * u32::from(i),
                ..Tcp::default()
            };
            for address in [v4, v6] {
                let builder = |port| Builder {
                    id: i.into(),
                    ..Builder::new(address(port), address(2))
                };
                packets.push(builder(6).tcp(&tcp, payload));
                packets.push(builder(17).udp(payload));
            }
        }
        packets
    }

    /// What a kernel that refuses some gets of `packets`, and what a shard does about it.
    fn through(
        merging: &Merging,
        coalescer: &mut Coalescer,
        refuses: impl Fn(&VnetHdr) -> Option<i32>,
    ) -> (Vec<(VnetHdr, Vec<u8>)>, Vec<Written>) {
        let mut taken = Vec::new();
        coalescer.set_kinds(merging.kinds());
        for packet in packets() {
            let headers = Headers::parse(&packet).unwrap();
            coalescer.push(&headers, &packet, 0).unwrap();
        }
        let mut batch = coalescer.take();
        let written = (0..batch.len()).map(|i| {
            let (packets, kind) = (batch.segments(i), batch.kind(i));
            let written = write(batch.get_mut(i), packets, |bytes| {
                let (header, packet) = VnetHdr::split(bytes).unwrap();
                match refuses(&header) {
                    Some(errno) => Err(errno),
                    None => {
                        taken.push((header, packet.to_vec()));
                        Ok(())
                    }
                }
            });
            if let (Some(_), Some(kind)) = (written.refused, kind) {
                merging.refuse(kind);
            }
            written
        });
        let written = written.collect();
        coalescer.recycle(batch);
        (taken, written)
    }

    fn flow(packet: &[u8]) -> (u8, bool) {
        let headers = Headers::parse(packet).unwrap();
        (headers.protocol, headers.src.is_ipv4())
    }

    #[test]
    fn what_is_refused_is_written_as_the_packets_it_was_made_of_in_order() {
        let for_now = [libc::ENOMEM, libc::ENOBUFS];
        for errno in [libc::EINVAL, libc::EOPNOTSUPP, libc::EMSGSIZE]
            .into_iter()
            .chain(for_now)
        {
            let merging = Merging::new(Kinds::ALL);
            let refuses = |header: &VnetHdr| (header.gso_type != GSO_NONE).then_some(errno);
            let (taken, written) = through(&merging, &mut Coalescer::new(), refuses);
            assert_eq!(written.len(), 4);
            assert!(written.iter().all(|w| w.packets == 10 && w.failed == 0));
            let counts = written.iter().all(|w| w.refused == Some(errno));
            assert_eq!(counts, !for_now.contains(&errno));
            let packets = packets();
            for kind in [(6, true), (6, false), (17, true), (17, false)] {
                let of = |packet: &&Vec<u8>| flow(packet) == kind;
                let sent: Vec<_> = packets.iter().filter(of).collect();
                let came = taken.iter().map(|(_, packet)| packet);
                assert!(came.filter(of).eq(sent), "{kind:?}");
            }
            assert!(taken.iter().all(|(header, _)| *header == VnetHdr::PLAIN));
        }
    }

    #[test]
    fn a_kind_that_is_refused_a_few_times_is_merged_no_more_and_the_others_are() {
        let merging = Merging::new(Kinds::ALL);
        let mut coalescer = Coalescer::new();
        let refuses = |header: &VnetHdr| (header.gso_type == GSO_UDP_L4).then_some(libc::EINVAL);
        for turn in 0..10 {
            let (taken, written) = through(&merging, &mut coalescer, refuses);
            assert_eq!(written.iter().map(|w| w.packets).sum::<usize>(), 40);
            let merged = taken
                .iter()
                .filter(|(header, _)| header.gso_type != GSO_NONE);
            assert_eq!(merged.count(), 2, "TCP, in turn {turn}");
            let refused = written.iter().filter(|w| w.refused.is_some()).count();
            assert_eq!(refused, if turn < 3 { 2 } else { 0 }, "UDP, in turn {turn}");
        }
        assert!(merging.refused().iter().eq([Kind::Udp4, Kind::Udp6]));
        assert!(merging.kinds().iter().eq([Kind::Tcp4, Kind::Tcp6]));
    }

    #[test]
    fn what_the_device_does_not_give_it_is_not_given() {
        for (tso, uso, merged) in [(false, false, 0), (true, false, 2), (true, true, 4)] {
            let merging = Merging::new(TunOffloads { tso, uso }.kinds());
            let (taken, _) = through(&merging, &mut Coalescer::new(), |_| None);
            let supers = taken
                .iter()
                .filter(|(header, _)| header.gso_type != GSO_NONE);
            assert_eq!(supers.count(), merged);
            assert!(merging.refused().iter().eq([]));
        }
    }

    #[test]
    fn an_interface_that_takes_nothing_says_nothing_of_merging() {
        let merging = Merging::new(Kinds::ALL);
        for errno in [
            libc::EIO,
            libc::EBADFD,
            libc::EINVAL,
            libc::EAGAIN,
            libc::ENOBUFS,
        ] {
            let (taken, written) = through(&merging, &mut Coalescer::new(), |_| Some(errno));
            assert_eq!(taken.len(), 0);
            assert!(
                written
                    .iter()
                    .all(|w| w.failed == 10 && w.refused.is_none())
            );
        }
        assert_eq!(merging.kinds(), Kinds::ALL);
    }
}
