//! The counter of a sealing key, from which any number of threads take.
//!
//! The atomics come from the parent module's `sync`, so that the loom test compiles this very file
//! against loom's.

use super::sync::{AtomicU64, Ordering};

/// Numbers from 0 to below a limit, each given out once.
///
/// A batch takes its numbers with one addition, and the limit is looked at before it. So after the
/// limit every thread may add one batch more, and none twice: its own addition has shown it that
/// the limit is passed. The room between the limit and 2^64 is for these (see [`Counter::new`]).
///
/// It fills a cache line, so that what threads write here is not beside what they only read.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Counter {
    next: AtomicU64,
    limit: u64,
}

impl Counter {
    /// A counter that gives `next..limit`.
    ///
    /// What many threads add at once beyond the limit must not wrap: their number times the longest
    /// batch is at most `u64::MAX - limit`.
    pub(super) fn new(next: u64, limit: u64) -> Counter {
        Counter {
            next: AtomicU64::new(next),
            limit,
        }
    }

    /// Takes `n` numbers in a row and returns the first; `None` if there are not so many left.
    #[inline]
    pub(super) fn reserve(&self, n: u64) -> Option<u64> {
        // Numbers order nothing else: each is taken once, by whoever adds first.
        if self.next.load(Ordering::Relaxed) >= self.limit {
            return None;
        }
        let first = self.next.fetch_add(n, Ordering::Relaxed);
        (first <= self.limit && n <= self.limit - first).then_some(first)
    }

    /// Takes all that are left and returns the first of them, the limit at most. It never lowers the
    /// sum, which may be above the limit: the room there is for additions that are under way.
    pub(super) fn close(&self) -> u64 {
        let next = self.next.fetch_max(self.limit, Ordering::Relaxed);
        next.min(self.limit)
    }

    /// The number that would be next, the limit at most.
    pub(super) fn peek(&self) -> u64 {
        self.next.load(Ordering::Relaxed).min(self.limit)
    }
}
