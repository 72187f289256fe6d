//! Which peer wants to be called next: a binary heap with at most one entry per peer.
//!
//! Deadlines mostly move away: every batch puts off what silence would bring. So an entry is left
//! where it is when its peer's deadline gets later, and whoever finds it due asks the peer anew. A
//! batch costs a comparison then, an idle peer nothing, and a peer in use one look per deadline.

#![forbid(unsafe_code)]

use std::time::Instant;

use crate::types::PeerId;

/// Not in the heap.
const ABSENT: u32 = u32::MAX;

/// The deadlines of one shard's peers. Memory is allocated when peers are made, not when they
/// are called.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    /// A binary heap, the earliest first.
    heap: Vec<(Instant, PeerId)>,
    /// Where each peer is in it.
    places: Vec<u32>,
}

impl Deadlines {
    /// Makes room for peers with ids below `ids`.
    pub(super) fn make_room(&mut self, ids: usize) {
        if self.places.len() < ids {
            self.places.resize(ids, ABSENT);
            self.heap.reserve(ids - self.heap.len());
        }
    }

    /// When the first peer is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.heap.first().map(|(at, _)| *at)
    }

    /// Sees to it that a peer is due at `at` or earlier.
    #[inline]
    pub(super) fn no_later(&mut self, id: PeerId, at: Instant) {
        let Some(&place) = self.places.get(id.0 as usize) else {
            return;
        };
        if place == ABSENT {
            self.heap.push((at, id));
            self.rise(self.heap.len() - 1);
        } else if let Some(entry) = self.heap.get_mut(place as usize)
            && at < entry.0
        {
            entry.0 = at;
            self.rise(place as usize);
        }
    }

    /// Takes a peer out whose time has come.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<PeerId> {
        let (at, id) = *self.heap.first()?;
        if at > now {
            return None;
        }
        self.remove(id);
        Some(id)
    }

    /// Forgets a peer.
    pub(super) fn remove(&mut self, id: PeerId) {
        let Some(place) = self.places.get_mut(id.0 as usize) else {
            return;
        };
        let at = std::mem::replace(place, ABSENT) as usize;
        if at >= self.heap.len() {
            return;
        }
        self.heap.swap_remove(at);
        if at < self.heap.len() {
            let at = self.rise(at);
            self.sink(at);
        }
    }

    fn put(&mut self, at: usize, entry: (Instant, PeerId)) {
        self.heap[at] = entry;
        self.places[entry.1.0 as usize] = u32::try_from(at).expect("below PEERS_MAX");
    }

    /// Moves an entry up to its place and returns that.
    fn rise(&mut self, mut at: usize) -> usize {
        let entry = self.heap[at];
        while at > 0 {
            let above = (at - 1) / 2;
            if self.heap[above].0 <= entry.0 {
                break;
            }
            self.put(at, self.heap[above]);
            at = above;
        }
        self.put(at, entry);
        at
    }

    /// Moves an entry down to its place.
    fn sink(&mut self, mut at: usize) {
        let entry = self.heap[at];
        loop {
            let left = 2 * at + 1;
            let Some(mut below) = self.heap.get(left).map(|_| left) else {
                break;
            };
            if self
                .heap
                .get(left + 1)
                .is_some_and(|right| right.0 < self.heap[left].0)
            {
                below = left + 1;
            }
            if self.heap[below].0 >= entry.0 {
                break;
            }
            self.put(at, self.heap[below]);
            at = below;
        }
        self.put(at, entry);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use rand::RngExt;

    use super::*;
    use crate::seeded;

    #[test]
    fn random_operations_match_a_map() {
        let mut rng = seeded();
        let start = crate::sys::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut deadlines = Deadlines::default();
        let mut model: BTreeMap<u32, u64> = BTreeMap::new();
        deadlines.make_room(50);
        deadlines.no_later(PeerId(50), at(0));
        for _ in 0..50_000 {
            let id = rng.random_range(0..50);
            match rng.random_range(0..4) {
                0 | 1 => {
                    let ms = rng.random_range(0..1000);
                    deadlines.no_later(PeerId(id), at(ms));
                    let entry = model.entry(id).or_insert(ms);
                    *entry = ms.min(*entry);
                }
                2 => {
                    deadlines.remove(PeerId(id));
                    model.remove(&id);
                }
                _ => {
                    let ms = rng.random_range(0..600);
                    let due = deadlines.take_due(at(ms)).map(|id| id.0);
                    let first = model.values().min().copied();
                    assert_eq!(due.is_some(), first.is_some_and(|first| first <= ms));
                    let removed = due.map(|id| model.remove(&id).expect("it is in the model"));
                    assert_eq!(removed, first.filter(|_| due.is_some()), "the earliest");
                }
            }
            assert_eq!(deadlines.next(), model.values().min().map(|ms| at(*ms)));
        }
    }
}
