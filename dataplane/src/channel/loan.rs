//! What passes between the owner of a peer and the shards that seal for it: what it lends them, and
//! how many packets are on their way to it.
//!
//! The owner sends what was handed to it before it counts that as arrived, and whoever hands something
//! over counts it before. So a shard that finds the count at zero sends after everything that it has
//! handed over.
//!
//! The locks and atomics come from the parent module's `sync`, so that the loom test compiles this very
//! file against loom's.

use super::sync::{AtomicUsize, Mutex, Ordering, PoisonError};

/// Something to lend, and the packets under way to the lender.
#[derive(Debug, Default)]
pub(crate) struct Loan<T> {
    lent: Mutex<T>,
    handed: AtomicUsize,
}

impl<T: Clone + Default> Loan<T> {
    /// What is lent, for the caller to remember: it takes a lock, but does not wait for it. Nothing
    /// where the lender is about to change it.
    pub(crate) fn get(&self) -> T {
        let lent = self.lent.try_lock();
        lent.map_or_else(|_busy| T::default(), |lent| T::clone(&lent))
    }

    /// Lends something else from now on. Who else holds the lock copies a pointer and lets go.
    pub(crate) fn set(&self, lent: T) {
        *self.lent.lock().unwrap_or_else(PoisonError::into_inner) = lent;
    }

    /// A packet is about to be handed to the lender.
    pub(crate) fn hand(&self) {
        self.handed.fetch_add(1, Ordering::Relaxed);
    }

    /// One that was handed over has been sent, dropped, or set aside until there are keys.
    pub(crate) fn arrived(&self) {
        self.handed.fetch_sub(1, Ordering::Release);
    }

    /// True while packets are on their way.
    #[inline]
    pub(crate) fn busy(&self) -> bool {
        self.handed.load(Ordering::Acquire) > 0
    }
}
