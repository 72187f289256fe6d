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

use crate::config::share;
use crate::types::PeerId;

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
mod tests;
