//! What is new about peers on its way to a shard: per peer one slot, in which the latest replaces
//! what is unread, and a queue of the ids whose slot is full. No burst is ever lost or grows, and nobody
//! waits.

use std::marker::PhantomData;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, Ordering};

use crossbeam::queue::ArrayQueue;

use crate::types::{PEERS_MAX, PeerId};

/// The slots of one shard.
pub(crate) struct Slots<T> {
    slots: Box<[Slot<T>]>,
    dirty: ArrayQueue<PeerId>,
}

impl<T> Slots<T> {
    pub(crate) fn new() -> Slots<T> {
        Slots {
            slots: (0..PEERS_MAX).map(|_| Slot::new()).collect(),
            dirty: ArrayQueue::new(PEERS_MAX),
        }
    }

    /// Puts what is newest into the peer's slot. False if the id is out of range.
    pub(crate) fn set(&self, peer: PeerId, newest: T) -> bool {
        let Some(slot) = self.slots.get(peer.0 as usize) else {
            return false;
        };
        // A full slot is in the queue already, so an id is there at most once and the queue, which
        // has room for all ids, is never full.
        if slot.swap(Some(Box::new(newest))).is_none() {
            let pushed = self.dirty.push(peer);
            debug_assert!(pushed.is_ok(), "an id is queued once");
        }
        true
    }

    /// Takes one that is unread.
    pub(crate) fn take(&self) -> Option<(PeerId, T)> {
        let peer = self.dirty.pop()?;
        let newest = self.slots[peer.0 as usize].swap(None)?;
        Some((peer, *newest))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.dirty.is_empty()
    }
}

/// A box that is not there yet, or is there until it is swapped for another. (crossbeam's `AtomicCell`
/// would hold it as an integer, which is no pointer to Miri.)
struct Slot<T> {
    /// Of a box that is the slot's alone; null when there is none.
    boxed: AtomicPtr<T>,
    /// Between threads it is as good as a lock around the value.
    _owner: PhantomData<Mutex<T>>,
}

impl<T> Slot<T> {
    fn new() -> Slot<T> {
        Slot {
            boxed: AtomicPtr::new(ptr::null_mut()),
            _owner: PhantomData,
        }
    }

    fn swap(&self, newest: Option<Box<T>>) -> Option<Box<T>> {
        let newest = newest.map_or(ptr::null_mut(), Box::into_raw);
        let before = self.boxed.swap(newest, Ordering::AcqRel);
        // SAFETY: what is not null came from `into_raw` here, and the swap took it out, so nobody else has it.
        (!before.is_null()).then(|| unsafe { Box::from_raw(before) })
    }
}

impl<T> Drop for Slot<T> {
    fn drop(&mut self) {
        drop(self.swap(None));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn the_latest_replaces_what_is_unread() {
        let slots = Slots::new();
        for generation in 1..=3 * PEERS_MAX as u64 {
            assert!(slots.set(PeerId(7), generation));
        }
        slots.set(PeerId(8), 1);
        let (peer, latest) = slots.take().unwrap();
        assert_eq!((peer, latest), (PeerId(7), 3 * PEERS_MAX as u64));
        assert_eq!(slots.take().unwrap().0, PeerId(8));
        assert!(slots.take().is_none());
    }

    #[test]
    fn an_id_out_of_range_is_refused() {
        let slots = Slots::new();
        assert!(!slots.set(PeerId(u32::try_from(PEERS_MAX).unwrap()), 1));
        assert!(slots.is_empty());
    }

    #[test]
    fn what_nobody_takes_is_dropped_with_the_slots() {
        let (slots, shared) = (Slots::new(), Arc::new(()));
        for _ in 0..3 {
            slots.set(PeerId(1), Arc::clone(&shared));
        }
        assert_eq!(Arc::strong_count(&shared), 2);
        drop(slots);
        assert_eq!(Arc::strong_count(&shared), 1);
    }

    #[test]
    fn nothing_is_lost_between_two_threads() {
        let slots = Slots::new();
        const LAST: u64 = 20_000;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for generation in 1..=LAST {
                    slots.set(PeerId(1), generation);
                }
            });
            let mut seen = 0;
            while seen < LAST {
                if let Some((_, newest)) = slots.take() {
                    assert!(newest > seen, "newer ones only");
                    seen = newest;
                }
            }
        });
    }
}
