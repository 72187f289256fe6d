//! Path decisions on their way to a shard: per peer one slot, in which the latest decision replaces
//! an unread one, and a queue of the ids whose slot is full. No burst of decisions is ever lost or
//! grows, and nobody waits.

#![forbid(unsafe_code)]

use crossbeam::atomic::AtomicCell;
use crossbeam::queue::ArrayQueue;

use crate::types::{PEERS_MAX, PathDecision, PeerId};

/// The slots of one shard.
pub(crate) struct PathSlots {
    slots: Box<[AtomicCell<Option<Box<PathDecision>>>]>,
    dirty: ArrayQueue<PeerId>,
}

impl PathSlots {
    pub(crate) fn new() -> PathSlots {
        const {
            assert!(
                AtomicCell::<Option<Box<PathDecision>>>::is_lock_free(),
                "a slot is one pointer"
            );
        }
        PathSlots {
            slots: (0..PEERS_MAX).map(|_| AtomicCell::new(None)).collect(),
            dirty: ArrayQueue::new(PEERS_MAX),
        }
    }

    /// Puts a decision into the peer's slot. False if the id is out of range.
    pub(crate) fn set(&self, peer: PeerId, decision: PathDecision) -> bool {
        let Some(slot) = self.slots.get(peer.0 as usize) else {
            return false;
        };
        // A full slot is in the queue already, so an id is there at most once and the queue, which
        // has room for all ids, is never full.
        if slot.swap(Some(Box::new(decision))).is_none() {
            let pushed = self.dirty.push(peer);
            debug_assert!(pushed.is_ok(), "an id is queued once");
        }
        true
    }

    /// Takes one unread decision.
    pub(crate) fn take(&self) -> Option<(PeerId, PathDecision)> {
        let peer = self.dirty.pop()?;
        let decision = self.slots[peer.0 as usize].take()?;
        Some((peer, *decision))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.dirty.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn decision(generation: u64) -> PathDecision {
        PathDecision {
            generation,
            udp: None,
            local: None,
            derp: None,
            trust_until: None,
            silence_limit: Duration::from_secs(1),
            path_mtu: 1500,
            relayed_alone: false,
        }
    }

    #[test]
    fn the_latest_decision_replaces_an_unread_one() {
        let slots = PathSlots::new();
        for generation in 1..=3 * PEERS_MAX as u64 {
            assert!(slots.set(PeerId(7), decision(generation)));
        }
        slots.set(PeerId(8), decision(1));
        let (peer, latest) = slots.take().unwrap();
        assert_eq!((peer, latest.generation), (PeerId(7), 3 * PEERS_MAX as u64));
        assert_eq!(slots.take().unwrap().0, PeerId(8));
        assert!(slots.take().is_none());
    }

    #[test]
    fn an_id_out_of_range_is_refused() {
        let slots = PathSlots::new();
        assert!(!slots.set(PeerId(u32::try_from(PEERS_MAX).unwrap()), decision(1)));
        assert!(slots.is_empty());
    }

    #[test]
    fn no_decision_is_lost_between_two_threads() {
        let slots = PathSlots::new();
        const LAST: u64 = 20_000;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for generation in 1..=LAST {
                    slots.set(PeerId(1), decision(generation));
                }
            });
            let mut seen = 0;
            while seen < LAST {
                if let Some((_, decision)) = slots.take() {
                    assert!(decision.generation > seen, "newer ones only");
                    seen = decision.generation;
                }
            }
        });
    }
}
