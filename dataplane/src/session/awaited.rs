//! Which receiver indexes an answer is awaited under: our initiations that are outstanding, and our
//! responses that the peer has not confirmed yet (a cookie reply may answer either).
//!
//! The shard that owns the sessions writes, the handshake thread reads: so it drops what answers
//! nothing before that costs anything, and lets answers pass it by however many others come. An index
//! has 24 random bits, so who guesses is wrong but for one in 16 million.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Places, of 4 bytes each, and how far from its own an index is put at most.
pub(crate) const PLACES: usize = 4096;
const WINDOW: usize = 8;
/// A place that is free; an index of that value is always awaited.
const FREE: u32 = 0;

/// The awaited indexes of one shard. One thread writes, any may read.
#[derive(Debug)]
pub(crate) struct Awaited {
    places: Box<[AtomicU32]>,
    /// Bits of an index that count; boringtun's sessions count in the others.
    mask: AtomicU32,
    /// How many found no place. While there are some, every index may be awaited.
    more: AtomicU32,
}

impl Default for Awaited {
    fn default() -> Self {
        Awaited {
            places: (0..PLACES).map(|_| AtomicU32::new(FREE)).collect(),
            mask: AtomicU32::new(u32::MAX),
            more: AtomicU32::new(0),
        }
    }
}

impl Awaited {
    /// The places that an index may be in.
    fn window(&self, index: u32) -> impl Iterator<Item = &AtomicU32> {
        // 24 bits are random; what names the shard is the same in all.
        let [a, _, c, d] = index.to_le_bytes();
        let start = usize::from(u16::from_le_bytes([c, d])) ^ usize::from(a) << 4;
        (start..start + WINDOW).map(|at| &self.places[at % PLACES])
    }

    /// An answer is awaited under this index from now on.
    pub(crate) fn insert(&self, index: u32) {
        let free = self.window(index).find(|place| place.load(Relaxed) == FREE);
        match free {
            Some(place) => place.store(index, Relaxed),
            None => self.more.store(self.more.load(Relaxed) + 1, Relaxed),
        }
    }

    /// No more. To be called once for each [`Awaited::insert`].
    pub(crate) fn remove(&self, index: u32) {
        let place = self
            .window(index)
            .find(|place| place.load(Relaxed) == index);
        match place {
            Some(place) => place.store(FREE, Relaxed),
            None => {
                let more = self.more.load(Relaxed);
                self.more.store(more.saturating_sub(1), Relaxed);
            }
        }
    }

    /// Forgets all, and minds these bits of indexes from now on.
    pub(crate) fn begin(&self, mask: u32) {
        self.mask.store(mask, Relaxed);
        self.places
            .iter()
            .for_each(|place| place.store(FREE, Relaxed));
        self.more.store(0, Relaxed);
    }

    /// Whether an answer may be awaited under this index.
    pub(crate) fn contains(&self, index: u32) -> bool {
        let index = index & self.mask.load(Relaxed);
        index == FREE
            || self.window(index).any(|place| place.load(Relaxed) == index)
            || self.more.load(Relaxed) > 0
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn an_index_is_awaited_from_when_it_is_put_in_until_it_is_taken_out() {
        let mut rng = StdRng::seed_from_u64(3);
        let awaited = Awaited::default();
        let indexes: Vec<u32> = (0..400).map(|_| rng.random_range(1..=u32::MAX)).collect();
        for index in &indexes {
            awaited.insert(*index);
        }
        assert!(indexes.iter().all(|index| awaited.contains(*index)));
        let guessed = (0..100_000)
            .filter(|_| awaited.contains(rng.random_range(1..=u32::MAX)))
            .count();
        assert!(guessed < 3, "{guessed}");
        for index in &indexes {
            awaited.remove(*index);
            assert!(!awaited.contains(*index));
        }
    }

    #[test]
    fn more_than_there_are_places_for_lose_nobodys_answer() {
        let awaited = Awaited::default();
        let indexes: Vec<u32> = (1..=6000u32).map(|n| n.wrapping_mul(0x9e37_79b9)).collect();
        for index in &indexes {
            awaited.insert(*index);
        }
        assert!(indexes.iter().all(|index| awaited.contains(*index)));
        for index in &indexes {
            awaited.remove(*index);
        }
        assert!(indexes.iter().all(|index| !awaited.contains(*index)));
        awaited.insert(7);
        awaited.begin(!0xff);
        assert!(!awaited.contains(0x107));
        awaited.insert(0x100);
        assert!(awaited.contains(0x107) && !awaited.contains(0x207));
    }
}
