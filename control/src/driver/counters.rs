//! Counters by name, declared in one place, so that none is counted and not shown.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// A counter of tasks on one thread.
#[derive(Debug, Default)]
pub(super) struct Local(Cell<u64>);

/// A counter of tasks on many threads.
#[derive(Debug, Default)]
pub(super) struct Shared(AtomicU64);

impl Local {
    /// Counts `n` more.
    pub(super) fn add(&self, n: u64) {
        self.0.set(self.0.get() + n);
    }

    /// How many there were.
    pub(super) fn get(&self) -> u64 {
        self.0.get()
    }
}

impl Shared {
    /// Counts `n` more.
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// How many there were.
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Declares a struct of counters of one kind, as visible as their struct. Its `snapshot` gives names and
/// values, as declared.
macro_rules! counters {
    (
        $(#[$of_all:meta])*
        $vis:vis struct $all:ident($kind:ty) {
            $($(#[$doc:meta])* $name:ident,)*
        }
    ) => {
        $(#[$of_all])*
        #[derive(Debug, Default)]
        $vis struct $all {
            $($(#[$doc])* $vis $name: $kind,)*
        }

        impl $all {
            /// Names and values.
            $vis fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)*]
            }
        }
    };
}

pub(super) use counters;
