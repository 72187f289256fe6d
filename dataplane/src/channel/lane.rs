//! A lane: a queue bounded in entries and bytes that drops its oldest entry rather than wait, and
//! counts what it drops.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use crossbeam::queue::ArrayQueue;

/// What a lane needs to know of its entries.
pub(crate) trait Load {
    /// Bytes the entry stands for.
    fn bytes(&self) -> usize;
    /// Packets the entry stands for: what a drop counts.
    fn packets(&self) -> usize;
}

/// The queue. Any thread may push and pop; nobody waits.
pub(crate) struct Lane<T> {
    queue: ArrayQueue<T>,
    bytes: AtomicUsize,
    bytes_max: usize,
    dropped: AtomicU64,
}

impl<T: Load> Lane<T> {
    /// Makes a lane of at most `entries_max` entries and about `bytes_max` bytes (one entry may
    /// stand above it).
    pub(crate) fn new(entries_max: usize, bytes_max: usize) -> Lane<T> {
        Lane {
            queue: ArrayQueue::new(entries_max),
            bytes: AtomicUsize::new(0),
            bytes_max,
            dropped: AtomicU64::new(0),
        }
    }

    /// Appends an entry; the oldest ones go, counted, while there is no room.
    pub(crate) fn push(&self, entry: T) {
        let len = entry.bytes();
        while self.bytes.load(Relaxed) + len > self.bytes_max {
            let Some(oldest) = self.pop() else { break };
            self.count(&oldest);
        }
        self.bytes.fetch_add(len, Relaxed);
        if let Some(oldest) = self.queue.force_push(entry) {
            self.bytes.fetch_sub(oldest.bytes(), Relaxed);
            self.count(&oldest);
        }
    }

    fn count(&self, dropped: &T) {
        self.dropped.fetch_add(dropped.packets() as u64, Relaxed);
    }

    pub(crate) fn pop(&self) -> Option<T> {
        let entry = self.queue.pop()?;
        self.bytes.fetch_sub(entry.bytes(), Relaxed);
        Some(entry)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Packets dropped since the start.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Load for Vec<u8> {
        fn bytes(&self) -> usize {
            self.len()
        }
        fn packets(&self) -> usize {
            2
        }
    }

    #[test]
    fn the_oldest_entries_go_first_and_are_counted() {
        let lane = Lane::new(3, 100);
        for i in 0..5 {
            lane.push(vec![i; 10]);
        }
        assert_eq!(lane.dropped(), 4, "two entries of two packets");
        assert_eq!(lane.pop(), Some(vec![2; 10]));
        lane.push(vec![9; 95]);
        assert_eq!(lane.pop(), Some(vec![9; 95]), "only bytes made room");
        assert_eq!(lane.dropped(), 8);
        assert!(lane.is_empty());
    }

    #[test]
    fn an_entry_above_the_byte_limit_stands_alone() {
        let lane = Lane::new(3, 10);
        lane.push(vec![0; 50]);
        assert_eq!(lane.pop(), Some(vec![0; 50]));
        assert_eq!(lane.dropped(), 0);
    }
}
