//! What threads pass things through, whatever these are; [`hub`](crate::hub) puts it together.
//!
//! Nobody ever waits for anybody here. What is newest of a peer goes through its slot and a queue of ids;
//! packets through lanes bounded in entries and bytes that drop their oldest, counted; what is lent is
//! the lender's until it lets go. A thread is woken through its event descriptor, and only if it sleeps.
//!
//! Rooms: `slots` is what is new of peers, `lane` a bounded queue, `loan` what is lent, `wake` the
//! sleeping thread.

mod lane;
mod loan;
mod slots;
mod wake;

/// The locks, atomics and references of [`loan`] and [`wake`].
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
    pub(super) use std::sync::{Arc, Mutex, PoisonError, Weak};
}

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use lane::{Lane, Load};
pub(crate) use loan::{Borrowed, Lent, Loan};
pub(crate) use slots::Slots;
pub(crate) use wake::Wake;

/// Locks, also what a thread that panicked has left behind: what stands there is whole at any time.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
