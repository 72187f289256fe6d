//! Which receiver indexes are in use, and for whom.
//!
//! We choose the index under which a peer writes to us. Bits 8 to 15 name the shard that owns the
//! session, which is what the sockets are steered by; the other 24 are random, so that an index
//! says nothing about the peer to whoever guesses. None is given out again while it is in use.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use rand::{Rng, RngExt};

use super::Awaited;
use crate::types::PeerId;

/// The indexes of one shard.
pub(crate) struct Indexes {
    shard: u8,
    /// Bits of an index that we choose once; under boringtun the session counts in the others.
    mask: u32,
    /// Keys are ours and random, so they need no hash, and nobody outside can choose any.
    holders: HashMap<u32, Holder, BuildHasherDefault<Spread>>,
    /// Where the handshake thread sees under which of them an answer is awaited.
    shown: Option<Arc<Awaited>>,
}

/// Whose an index is.
#[derive(Clone, Copy)]
struct Holder {
    peer: PeerId,
    /// An answer to a handshake message of ours may come under it.
    awaited: bool,
}

/// Spreads random 24-bit numbers over 64 bits: the table looks at the highest and the lowest.
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }
    fn write_u32(&mut self, n: u32) {
        // 2^64 divided by the golden ratio, made odd (Knuth's multiplicative hash).
        self.0 = (self.0 ^ u64::from(n)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

impl Indexes {
    /// An empty table. `counted_bits` low bits of an index are left to the session.
    pub(crate) fn new(shard: u8, counted_bits: u32) -> Indexes {
        Indexes {
            shard,
            mask: u32::MAX << counted_bits,
            holders: HashMap::default(),
            shown: None,
        }
    }

    /// From now on shows under which indexes answers are awaited. Before the first is claimed.
    pub(crate) fn show(&mut self, to: Arc<Awaited>) {
        to.begin(self.mask);
        self.shown = Some(to);
    }

    /// A new index for a peer.
    pub(crate) fn claim(&mut self, rng: &mut impl Rng, peer: PeerId) -> u32 {
        loop {
            let [a, _, c, d] = rng.random::<[u8; 4]>();
            let index = u32::from_le_bytes([a, self.shard, c, d]) & self.mask;
            // A few of millions are in use: the first try nearly always does.
            if self.take_up(index, peer) {
                return index;
            }
        }
    }

    /// Takes up an index that another process had claimed. False if it is in use or not this
    /// shard's.
    pub(crate) fn take_up(&mut self, index: u32, peer: PeerId) -> bool {
        let index_masked = index & self.mask;
        let free =
            index.to_le_bytes()[1] == self.shard && !self.holders.contains_key(&index_masked);
        if free {
            let awaited = true;
            self.holders.insert(index_masked, Holder { peer, awaited });
            if let Some(shown) = &self.shown {
                shown.insert(index_masked);
            }
        }
        free
    }

    /// The handshake that the index was claimed for is over: data comes under it, and no answer.
    pub(crate) fn settle(&mut self, index: u32) {
        let index = index & self.mask;
        let holder = self.holders.get_mut(&index);
        if holder.is_some_and(|holder| std::mem::take(&mut holder.awaited))
            && let Some(shown) = &self.shown
        {
            shown.remove(index);
        }
    }

    /// Whose an index is.
    #[inline]
    pub(crate) fn holder(&self, index: u32) -> Option<PeerId> {
        let holder = self.holders.get(&(index & self.mask));
        holder.map(|holder| holder.peer)
    }

    /// Gives an index back.
    pub(crate) fn release(&mut self, index: u32) {
        self.settle(index);
        let released = self.holders.remove(&(index & self.mask));
        debug_assert!(released.is_some(), "an index is released once");
    }

    /// Number of indexes in use.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.holders.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn indexes_name_the_shard_are_random_otherwise_and_not_reused_while_held() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut indexes = Indexes::new(5, 0);
        let mut held = BTreeSet::new();
        let (mut ones, mut zeros) = (0u32, u32::MAX);
        for i in 0..60_000u32 {
            let index = indexes.claim(&mut rng, PeerId(i % 100));
            assert_eq!(index.to_le_bytes()[1], 5);
            assert_eq!(indexes.holder(index), Some(PeerId(i % 100)));
            assert!(held.insert(index), "{index:#x} twice");
            (ones, zeros) = (ones | index, zeros & index);
        }
        assert_eq!((ones & !0xff00, zeros & !0xff00), (!0xff00, 0));
        for index in &held {
            indexes.release(*index);
            assert_eq!(indexes.holder(*index), None);
        }
        assert_eq!(indexes.len(), 0);
    }

    #[test]
    fn low_bits_can_be_left_to_the_session() {
        let mut rng = StdRng::seed_from_u64(8);
        let mut indexes = Indexes::new(3, 8);
        let index = indexes.claim(&mut rng, PeerId(9));
        assert_eq!(index & 0xffff, 0x0300);
        assert_eq!(indexes.holder(index | 0xab), Some(PeerId(9)));
        indexes.release(index | 1);
        assert_eq!(indexes.holder(index), None);
    }

    #[test]
    fn an_index_is_taken_up_only_by_its_shard_and_if_free() {
        let mut indexes = Indexes::new(3, 0);
        assert!(indexes.take_up(0x1122_0344, PeerId(1)));
        assert!(!indexes.take_up(0x1122_0344, PeerId(2)));
        assert!(!indexes.take_up(0x1122_0444, PeerId(2)));
        assert_eq!(indexes.holder(0x1122_0344), Some(PeerId(1)));
    }

    #[test]
    fn answers_are_awaited_until_the_handshake_is_over() {
        let mut rng = StdRng::seed_from_u64(9);
        let shown = Arc::new(Awaited::default());
        let mut indexes = Indexes::new(5, 0);
        indexes.show(Arc::clone(&shown));
        let [done, given_up] = [0, 1].map(|n| indexes.claim(&mut rng, PeerId(n)));
        assert!(shown.contains(done) && shown.contains(given_up));
        indexes.settle(done);
        indexes.settle(done);
        indexes.release(given_up);
        assert!(!shown.contains(done) && !shown.contains(given_up));
        indexes.release(done);
        assert_eq!(indexes.len(), 0);
    }
}
