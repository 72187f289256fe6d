//! Packets that wait for a session, as they came from the TUN: a super-packet stays one, but is
//! counted as all its packets where it is dropped.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Packets (a super-packet is one here) and bytes that wait per peer at most; the oldest go first, as in
/// the kernel's WireGuard.
const PACKETS_MAX: usize = 128;
const BYTES_MAX: usize = 512 << 10;

/// After this without a new packet the others are dropped: as long as WireGuard tries to reach a
/// peer (`REKEY_ATTEMPT_TIME`).
const AGE_MAX: Duration = Duration::from_secs(90);

/// The queue of one peer. Without memory until first used.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// Each with its virtio-net header, and how many packets it stands for.
    packets: VecDeque<(Box<[u8]>, u64)>,
    bytes: usize,
    newest: Option<Instant>,
}

impl Waiting {
    /// Appends what stands for so many packets; returns how many older ones had to go.
    pub(crate) fn push(&mut self, now: Instant, packet: &[u8], packets: u64) -> u64 {
        self.newest = Some(now);
        self.bytes += packet.len();
        self.packets.push_back((packet.into(), packets));
        let mut dropped = 0;
        while self.packets.len() > PACKETS_MAX || (self.bytes > BYTES_MAX && self.packets.len() > 1)
        {
            dropped += self.take().map_or(0, |(_, packets)| packets);
        }
        dropped
    }

    /// Takes the oldest packet.
    pub(crate) fn pop(&mut self) -> Option<Box<[u8]>> {
        self.take().map(|(packet, _)| packet)
    }

    fn take(&mut self) -> Option<(Box<[u8]>, u64)> {
        let oldest = self.packets.pop_front()?;
        self.bytes -= oldest.0.len();
        Some(oldest)
    }

    /// Drops everything and returns how many packets that were.
    pub(crate) fn clear(&mut self) -> u64 {
        let dropped = self.packets.iter().map(|(_, packets)| packets).sum();
        *self = Waiting::default();
        dropped
    }

    /// When so long nothing will have been added that what is here is of no use to anybody.
    pub(crate) fn stale_at(&self) -> Option<Instant> {
        let newest = self.newest.filter(|_| !self.packets.is_empty())?;
        newest.checked_add(AGE_MAX)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any instant will do")]
    fn now() -> Instant {
        Instant::now()
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many() {
        let mut waiting = Waiting::default();
        for i in 0..PACKETS_MAX {
            assert_eq!(waiting.push(now(), &[u8::try_from(i).unwrap()], 1), 0);
        }
        assert_eq!(waiting.push(now(), &[200], 1), 1);
        assert_eq!(waiting.pop().as_deref(), Some(&[1][..]));
        assert_eq!(waiting.clear(), PACKETS_MAX as u64 - 1);
        assert!(waiting.is_empty());
    }

    #[test]
    fn the_oldest_go_when_they_are_too_large() {
        let mut waiting = Waiting::default();
        let large = vec![0; 60_000];
        let dropped: u64 = (0..20).map(|_| waiting.push(now(), &large, 1)).sum();
        assert_eq!(dropped, 20 - (BYTES_MAX / 60_000) as u64);
        assert_eq!(
            waiting.push(now(), &vec![0; BYTES_MAX + 1], 1),
            BYTES_MAX as u64 / 60_000
        );
        assert!(waiting.pop().is_some(), "the newest always stays");
    }

    #[test]
    fn a_super_packet_that_goes_counts_as_all_its_packets() {
        let mut waiting = Waiting::default();
        let large = vec![0; BYTES_MAX / 2];
        assert_eq!(waiting.push(now(), &large, 45), 0);
        assert_eq!(waiting.push(now(), &large, 1), 0);
        assert_eq!(waiting.push(now(), &large, 44), 45);
        assert_eq!(waiting.clear(), 45);
        assert_eq!(waiting.clear(), 0);
    }

    #[test]
    fn packets_grow_stale() {
        let start = now();
        let mut waiting = Waiting::default();
        assert_eq!(waiting.stale_at(), None);
        waiting.push(start, &[1], 1);
        assert_eq!(waiting.stale_at(), Some(start + AGE_MAX));
        waiting.pop();
        assert_eq!(waiting.stale_at(), None);
    }
}
