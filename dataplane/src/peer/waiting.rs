//! Packets that wait for a session, as they came from the TUN: a super-packet stays one, but is
//! counted as all its packets where it is dropped.
//!
//! Anybody inside can make packets wait, for every peer that there is. So all peers of a shard share a
//! [`Budget`], and where it is exceeded somebody loses its oldest packet: of those who have waited for an
//! answer in vain for [`IN_VAIN`], else of all, who has most (to a power of two), and of equals who
//! began first. A scan of peers that are not there loses its own packets so, and a peer that is about to
//! answer keeps what it has.

#![forbid(unsafe_code)]

use std::cmp::Reverse;
use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::channel::PeerId;
use crate::config::share;

/// Packets (a super-packet is one here) and bytes that wait per peer at most; the oldest go first, as in
/// the kernel's WireGuard.
pub(crate) const PACKETS_MAX: usize = 128;
const BYTES_MAX: usize = 512 << 10;

/// Bytes that wait in all shards together, and in one of many at least. Whole queues of 32 peers, whose
/// handshakes take one round trip.
pub(crate) const NODE_BYTES_MAX: usize = 16 << 20;
pub(crate) const SHARD_BYTES_MIN: usize = 1 << 20;
/// What one peer's queue costs besides what it holds: its place among the ranks, and room for packets.
#[cfg(test)]
pub(crate) const QUEUE_COST: usize = 2 * size_of::<Rank>() + 4 * size_of::<(Box<[u8]>, u64)>();
/// What keeping a packet costs besides its bytes.
const PACKET_COST: usize = 64;

/// After this without a new packet the others are dropped: as long as WireGuard tries to reach a
/// peer (`REKEY_ATTEMPT_TIME`).
const AGE_MAX: Duration = Duration::from_secs(90);

/// Who has not answered for so long has missed an initiation (`REKEY_TIMEOUT`), or is not there.
const IN_VAIN: Duration = Duration::from_secs(5);

/// Who loses first: the greatest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    in_vain: bool,
    /// The power of two that its bytes reach.
    size: u32,
    began: Reverse<Instant>,
    peer: PeerId,
}

/// What waits at all peers of a shard together.
#[derive(Debug)]
pub(crate) struct Budget {
    bytes_max: usize,
    bytes: usize,
    /// Everybody who has something.
    ranks: BTreeSet<Rank>,
}

impl Budget {
    /// The part of one shard of so many.
    pub(crate) fn new(shards: usize) -> Budget {
        Budget {
            bytes_max: share(NODE_BYTES_MAX, shards, SHARD_BYTES_MIN),
            bytes: 0,
            ranks: BTreeSet::new(),
        }
    }

    /// Who has to drop its oldest packet, if somebody has to.
    pub(crate) fn loser(&self) -> Option<PeerId> {
        let over = self.bytes > self.bytes_max;
        self.ranks.last().filter(|_| over).map(|rank| rank.peer)
    }
}

/// The queue of one peer. Without memory until first used. Whatever changes it tells the budget.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// Each with its virtio-net header, and how many packets it stands for.
    packets: VecDeque<(Box<[u8]>, u64)>,
    bytes: usize,
    newest: Option<Instant>,
    /// Since when there is no answer, although everything may have been dropped meanwhile.
    began: Option<Instant>,
    /// What the budget has of it: its place, and its bytes with their cost.
    counted: Option<(Rank, usize)>,
}

impl Waiting {
    /// Appends what stands for so many packets of a peer; returns how many older ones of it had to go.
    pub(crate) fn push(
        &mut self,
        budget: &mut Budget,
        now: Instant,
        peer: PeerId,
        packet: &[u8],
        packets: u64,
    ) -> u64 {
        let quiet = |newest: Instant| now.saturating_duration_since(newest) >= AGE_MAX;
        if self.began.is_none() || self.newest.is_none_or(quiet) {
            self.began = Some(now);
        }
        self.newest = Some(now);
        self.bytes += packet.len();
        self.packets.push_back((packet.into(), packets));
        let mut dropped = 0;
        while self.packets.len() > PACKETS_MAX || (self.bytes > BYTES_MAX && self.packets.len() > 1)
        {
            dropped += self.take().map_or(0, |(_, packets)| packets);
        }
        self.count(budget, now, peer);
        dropped
    }

    /// Takes the oldest packet, for there are keys.
    pub(crate) fn pop(&mut self, budget: &mut Budget) -> Option<Box<[u8]>> {
        // The next to wait wait for another answer.
        self.began = None;
        self.shrink(budget).map(|(packet, _)| packet)
    }

    /// Drops the oldest packet, for there is too much; returns how many packets it stands for.
    pub(crate) fn drop_oldest(&mut self, budget: &mut Budget) -> u64 {
        self.shrink(budget).map_or(0, |(_, packets)| packets)
    }

    /// Drops everything and returns how many packets that were.
    pub(crate) fn clear(&mut self, budget: &mut Budget) -> u64 {
        self.uncount(budget);
        let dropped = self.packets.iter().map(|(_, packets)| packets).sum();
        *self = Waiting::default();
        dropped
    }

    fn take(&mut self) -> Option<(Box<[u8]>, u64)> {
        let oldest = self.packets.pop_front()?;
        self.bytes -= oldest.0.len();
        if self.packets.is_empty() {
            self.packets = VecDeque::new();
        }
        Some(oldest)
    }

    /// Takes the oldest packet, and a place in the budget that is no higher.
    fn shrink(&mut self, budget: &mut Budget) -> Option<(Box<[u8]>, u64)> {
        let rank = self.uncount(budget);
        let oldest = self.take();
        if let Some(rank) = rank.filter(|_| !self.packets.is_empty()) {
            self.enter(budget, rank);
        }
        oldest
    }

    fn count(&mut self, budget: &mut Budget, now: Instant, peer: PeerId) {
        self.uncount(budget);
        let began = self.began.unwrap_or(now);
        let in_vain = now.saturating_duration_since(began) >= IN_VAIN;
        let rank = Rank {
            in_vain,
            size: 0,
            began: Reverse(began),
            peer,
        };
        self.enter(budget, rank);
    }

    fn enter(&mut self, budget: &mut Budget, rank: Rank) {
        let cost = self.bytes + PACKET_COST * self.packets.len();
        let size = cost.ilog2();
        let rank = Rank { size, ..rank };
        budget.bytes += cost;
        budget.ranks.insert(rank);
        self.counted = Some((rank, cost));
    }

    fn uncount(&mut self, budget: &mut Budget) -> Option<Rank> {
        let (rank, cost) = self.counted.take()?;
        budget.bytes -= cost;
        budget.ranks.remove(&rank);
        Some(rank)
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

    /// A queue and its budget.
    #[derive(Debug)]
    struct Alone(Waiting, Budget);

    impl Alone {
        fn new() -> Alone {
            Alone(Waiting::default(), Budget::new(1))
        }

        fn push(&mut self, packet: &[u8], packets: u64) -> u64 {
            self.0.push(&mut self.1, now(), PeerId(0), packet, packets)
        }

        fn pop(&mut self) -> Option<Box<[u8]>> {
            self.0.pop(&mut self.1)
        }

        fn clear(&mut self) -> u64 {
            let dropped = self.0.clear(&mut self.1);
            assert_eq!((self.1.bytes, self.1.ranks.len()), (0, 0));
            dropped
        }
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many() {
        let mut alone = Alone::new();
        for i in 0..PACKETS_MAX {
            assert_eq!(alone.push(&[u8::try_from(i).unwrap()], 1), 0);
        }
        assert_eq!(alone.push(&[200], 1), 1);
        assert_eq!(alone.pop().as_deref(), Some(&[1][..]));
        assert_eq!(alone.clear(), PACKETS_MAX as u64 - 1);
        assert!(alone.0.is_empty());
    }

    #[test]
    fn the_oldest_go_when_they_are_too_large() {
        let mut alone = Alone::new();
        let large = vec![0; 60_000];
        let dropped: u64 = (0..20).map(|_| alone.push(&large, 1)).sum();
        assert_eq!(dropped, 20 - (BYTES_MAX / 60_000) as u64);
        assert_eq!(
            alone.push(&vec![0; BYTES_MAX + 1], 1),
            BYTES_MAX as u64 / 60_000
        );
        assert!(alone.pop().is_some(), "the newest always stays");
    }

    #[test]
    fn a_super_packet_that_goes_counts_as_all_its_packets() {
        let mut alone = Alone::new();
        let large = vec![0; BYTES_MAX / 2];
        assert_eq!(alone.push(&large, 45), 0);
        assert_eq!(alone.push(&large, 1), 0);
        assert_eq!(alone.push(&large, 44), 45);
        assert_eq!(alone.clear(), 45);
        assert_eq!(alone.clear(), 0);
    }

    #[test]
    fn packets_grow_stale() {
        let start = now();
        let Alone(mut waiting, mut budget) = Alone::new();
        assert_eq!(waiting.stale_at(), None);
        waiting.push(&mut budget, start, PeerId(0), &[1], 1);
        assert_eq!(waiting.stale_at(), Some(start + AGE_MAX));
        waiting.push(&mut budget, start, PeerId(0), &[2], 1);
        waiting.pop(&mut budget);
        assert_eq!(waiting.stale_at(), Some(start + AGE_MAX), "what is left");
        waiting.pop(&mut budget);
        assert_eq!(waiting.stale_at(), None);
    }

    #[test]
    fn what_waits_after_an_answer_has_waited_for_nobody_in_vain() {
        let start = now();
        let Alone(mut waiting, mut budget) = Alone::new();
        let mut wait = |waiting: &mut Waiting, secs| {
            let now = start + Duration::from_secs(secs);
            waiting.push(&mut budget, now, PeerId(0), &[1], 1);
            let in_vain = budget.ranks.last().is_some_and(|rank| rank.in_vain);
            if secs == 6 {
                waiting.pop(&mut budget);
            }
            in_vain
        };
        let in_vain = [0, 4, 6, 7, 11, 12].map(|secs| wait(&mut waiting, secs));
        assert_eq!(in_vain, [false, false, true, false, false, true]);
    }

    /// Peers of one shard of so many.
    struct Peers(Vec<Waiting>, Budget);

    impl Peers {
        fn new(peers: usize, shards: usize) -> Peers {
            let waiting = (0..peers).map(|_| Waiting::default()).collect();
            Peers(waiting, Budget::new(shards))
        }

        fn push(&mut self, now: Instant, peer: usize, len: usize) -> u64 {
            let id = PeerId(u32::try_from(peer).unwrap());
            let mut dropped = self.0[peer].push(&mut self.1, now, id, &vec![0; len], 1);
            while let Some(loser) = self.1.loser() {
                dropped += self.0[loser.0 as usize].drop_oldest(&mut self.1);
            }
            let bytes = |waiting: &Waiting| waiting.bytes + PACKET_COST * waiting.packets.len();
            if peer.is_multiple_of(1000) {
                assert_eq!(self.1.bytes, self.0.iter().map(bytes).sum::<usize>());
            }
            assert!(self.1.bytes <= self.1.bytes_max);
            dropped
        }
    }

    /// Everybody scanned again and again, with full packets, and one that answers late: what it has of
    /// each size stays. Without a budget the scan would hold 100 MB, and go on to 1.5 GB.
    #[test]
    fn a_scan_of_dead_peers_starves_none_that_is_about_to_answer() {
        const DEAD: usize = 3_000;
        const LIVE: usize = DEAD;
        for (begins, len) in [(0, 60), (0, 1400), (7, 1400), (7, 60_000), (20, 60_000)] {
            let mut peers = Peers::new(DEAD + 1, 2);
            let start = now();
            let mut dropped = 0;
            for round in 0..25u64 {
                let now = start + Duration::from_secs(round);
                for dead in 0..DEAD {
                    dropped += peers.push(now, dead, 1400);
                    if round == begins && dead == DEAD / 2 {
                        assert_eq!(peers.0[LIVE].packets.len(), 0);
                        dropped += peers.push(now, LIVE, len);
                    }
                }
                let kept = peers.0[LIVE].packets.len();
                if (begins..begins + 4).contains(&round) {
                    assert_eq!(kept, 1, "{len} bytes, begun at {begins}, after {round} s");
                }
            }
            let scanned = 25 * DEAD as u64 + 1;
            let kept: usize = peers.0.iter().map(|waiting| waiting.packets.len()).sum();
            assert_eq!(dropped + kept as u64, scanned, "each is counted");
            assert!(kept > 4_000, "the budget is used: {kept}");
        }
    }

    #[test]
    fn who_has_most_loses_first_and_of_equals_who_began_first() {
        let mut peers = Peers::new(40, 1);
        let start = now();
        for peer in 0..31 {
            for _ in 0..8 {
                assert_eq!(
                    peers.push(start + Duration::from_millis(peer as u64), peer, 60_000),
                    0
                );
            }
        }
        // The small ones cost nobody but the large.
        for i in 0..20_000 {
            peers.push(start + Duration::from_millis(100), 31 + i % 9, 1400);
        }
        let kept: Vec<usize> = peers
            .0
            .iter()
            .map(|waiting| waiting.packets.len())
            .collect();
        assert!(
            kept[31..].iter().all(|kept| *kept == PACKETS_MAX),
            "{kept:?}"
        );
        assert!(kept[..31].is_sorted(), "the first began first: {kept:?}");
        assert_eq!(kept[30], 8, "{kept:?}");
    }
}
