//! A block of numbers with one writer and any number of readers that never disturb it.
//!
//! The classic sequence lock: the writer makes the sequence odd, stores the words, makes it even;
//! a reader that saw the same even sequence before and after has a consistent block. All words are
//! atomics, so a torn read is detected, not undefined. The atomics come from the parent module's
//! `sync`, so that the loom test compiles this very file against loom's.

use super::sync::{AtomicU64, Ordering, fence};

/// `N` numbers, written together and read together.
pub(super) struct SeqBlock<const N: usize> {
    sequence: AtomicU64,
    words: [AtomicU64; N],
}

impl<const N: usize> SeqBlock<N> {
    /// A block of zeros.
    pub(super) fn new() -> Self {
        SeqBlock {
            sequence: AtomicU64::new(0),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Publishes all words. One thread at a time may call this; two at once would make readers see
    /// a mixture, nothing worse.
    pub(super) fn publish(&self, words: &[u64; N]) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence
            .store(sequence.wrapping_add(1), Ordering::Relaxed);
        // The odd sequence is visible before any of the words.
        fence(Ordering::Release);
        for (slot, word) in self.words.iter().zip(words) {
            slot.store(*word, Ordering::Relaxed);
        }
        self.sequence
            .store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// One attempt at a consistent copy; `None` if the writer was at it.
    pub(super) fn try_read(&self) -> Option<[u64; N]> {
        let before = self.sequence.load(Ordering::Acquire);
        if before % 2 == 1 {
            return None;
        }
        let words = std::array::from_fn(|i| self.words[i].load(Ordering::Relaxed));
        // All words are read before the sequence is read again.
        fence(Ordering::Acquire);
        (self.sequence.load(Ordering::Relaxed) == before).then_some(words)
    }

    /// The words as they are, possibly of two publications.
    pub(super) fn read_torn(&self) -> [u64; N] {
        std::array::from_fn(|i| self.words[i].load(Ordering::Relaxed))
    }
}
