//! Waking a sleeping thread, and only a sleeping one.
//!
//! A cross-CPU wake-up costs about 28 us and an eventfd write 200 ns, so a sender pays only if the
//! receiver said that it is about to sleep. The receiver says so *before* it looks at its lanes a
//! last time; the sender pushes *before* it looks at the flag. Sequentially consistent order makes
//! sure that at least one of the two sees the other.
//!
//! The atomics come from the parent module's `sync`, so that `dataplane/loom` compiles this very file
//! against loom's.

#![forbid(unsafe_code)]

use super::sync::{AtomicBool, Ordering, fence};
use crate::sys::EventFd;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// One thread's bell.
#[derive(Debug)]
pub(crate) struct Wake {
    event: EventFd,
    sleeping: AtomicBool,
}

impl Wake {
    pub(crate) fn new() -> io::Result<Wake> {
        Ok(Wake {
            event: EventFd::new()?,
            sleeping: AtomicBool::new(false),
        })
    }

    /// Called by a sender after its push.
    pub(crate) fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::Relaxed) {
            self.event.signal();
        }
    }

    /// Called by the receiver before its last look at its lanes; if it finds something there it
    /// calls [`Wake::awake`] and does not sleep.
    pub(crate) fn about_to_sleep(&self) {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Called by the receiver after its sleep.
    pub(crate) fn awake(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    /// Makes the descriptor unreadable again; called when the driver reports it.
    pub(crate) fn clear(&self) {
        self.event.clear();
    }
}

impl AsFd for Wake {
    /// The descriptor the receiver's driver waits on.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
