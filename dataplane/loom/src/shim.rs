//! What loom has not got under the names that the modelled files use.

use std::io;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd};

use loom::sync::{Condvar, Mutex};

/// As `core::sync::atomic`.
pub(crate) mod atomic {
    pub(crate) use loom::sync::atomic::{Ordering, fence};

    use super::{Deref, DerefMut};

    /// loom's, with a `get_mut`.
    pub(crate) struct AtomicU64(loom::sync::atomic::AtomicU64);

    impl AtomicU64 {
        pub(crate) fn new(value: u64) -> AtomicU64 {
            AtomicU64(loom::sync::atomic::AtomicU64::new(value))
        }

        /// Whoever has it alone sees the newest value; what is written is written back.
        pub(crate) fn get_mut(&mut self) -> Exclusive<'_> {
            let value = self.0.with_mut(|value| *value);
            Exclusive {
                atomic: &mut self.0,
                value,
            }
        }
    }

    impl Deref for AtomicU64 {
        type Target = loom::sync::atomic::AtomicU64;
        fn deref(&self) -> &Self::Target {
            &self.0
        }
    }

    /// A value in the hands of who has it alone.
    pub(crate) struct Exclusive<'a> {
        atomic: &'a mut loom::sync::atomic::AtomicU64,
        value: u64,
    }

    impl Deref for Exclusive<'_> {
        type Target = u64;
        fn deref(&self) -> &u64 {
            &self.value
        }
    }

    impl DerefMut for Exclusive<'_> {
        fn deref_mut(&mut self) -> &mut u64 {
            &mut self.value
        }
    }

    impl PartialEq for Exclusive<'_> {
        fn eq(&self, other: &Self) -> bool {
            self.value == other.value
        }
    }

    impl Drop for Exclusive<'_> {
        fn drop(&mut self) {
            self.atomic.with_mut(|value| *value = self.value);
        }
    }
}

/// As `core::cell::UnsafeCell`: loom fails where two threads touch it without an order between them.
pub(crate) struct UnsafeCell<T>(loom::cell::UnsafeCell<T>);

impl<T> UnsafeCell<T> {
    pub(crate) fn new(value: T) -> UnsafeCell<T> {
        UnsafeCell(loom::cell::UnsafeCell::new(value))
    }

    pub(crate) fn get(&self) -> Place<'_, T> {
        Place(&self.0)
    }
}

/// What stands for the pointer into an [`UnsafeCell`].
pub(crate) struct Place<'a, T>(&'a loom::cell::UnsafeCell<T>);

impl<T> Place<'_, T> {
    /// # Safety
    /// As of the pointer's.
    pub(crate) unsafe fn write(self, value: T) {
        // SAFETY: the caller's, and loom looks.
        self.0.with_mut(|place| unsafe { place.write(value) });
    }

    /// # Safety
    /// As of the pointer's.
    pub(crate) unsafe fn read(self) -> T {
        // SAFETY: the caller's, and loom looks.
        self.0.with_mut(|place| unsafe { place.read() })
    }

    /// # Safety
    /// As of the pointer's.
    pub(crate) unsafe fn replace(self, value: T) -> T {
        // SAFETY: the caller's, and loom looks.
        self.0.with_mut(|place| unsafe { place.replace(value) })
    }
}

/// So that a queue can drop what it holds: only while nobody else has it.
impl<T> Deref for Place<'_, MaybeUninit<T>> {
    type Target = MaybeUninit<T>;
    fn deref(&self) -> &MaybeUninit<T> {
        // SAFETY: only a queue's `drop` comes here.
        self.0.with(|place| unsafe { &*place })
    }
}

impl<T> DerefMut for Place<'_, MaybeUninit<T>> {
    fn deref_mut(&mut self) -> &mut MaybeUninit<T> {
        // SAFETY: only a queue's `drop` comes here.
        self.0.with_mut(|place| unsafe { &mut *place })
    }
}

/// As crossbeam's: another thread must run before it makes sense to look again.
pub(crate) struct Backoff;

impl Backoff {
    pub(crate) fn new() -> Backoff {
        Backoff
    }

    pub(crate) fn spin(&self) {
        loom::thread::yield_now();
    }

    pub(crate) fn snooze(&self) {
        loom::thread::yield_now();
    }
}

/// As crossbeam's; cache lines are nothing to a model.
pub(crate) struct CachePadded<T>(T);

impl<T> CachePadded<T> {
    pub(crate) fn new(value: T) -> CachePadded<T> {
        CachePadded(value)
    }
}

impl<T> Deref for CachePadded<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for CachePadded<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

/// As `std::sync::Arc`, with weak references that never die: as if somebody else held on to every grant for
/// ever, which is the worst that can happen to who gets one.
#[derive(Debug)]
pub(crate) struct Arc<T>(loom::sync::Arc<T>);

impl<T> Arc<T> {
    pub(crate) fn new(value: T) -> Arc<T> {
        Arc(loom::sync::Arc::new(value))
    }

    pub(crate) fn downgrade(this: &Arc<T>) -> Weak<T> {
        Weak(Some(this.0.clone()))
    }
}

impl<T> Clone for Arc<T> {
    fn clone(&self) -> Arc<T> {
        Arc(self.0.clone())
    }
}

impl<T> Deref for Arc<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// As `std::sync::Weak`; see [`Arc`].
#[derive(Debug)]
pub(crate) struct Weak<T>(Option<loom::sync::Arc<T>>);

impl<T> Weak<T> {
    pub(crate) fn new() -> Weak<T> {
        Weak(None)
    }

    pub(crate) fn upgrade(&self) -> Option<Arc<T>> {
        self.0.clone().map(Arc)
    }
}

impl<T> Clone for Weak<T> {
    fn clone(&self) -> Weak<T> {
        Weak(self.0.clone())
    }
}

loom::lazy_static! {
    /// The one bell of a model.
    static ref BELL: Bell = Bell {
        signalled: Mutex::new(false),
        changed: Condvar::new(),
    };
}

struct Bell {
    signalled: Mutex<bool>,
    changed: Condvar,
}

/// What a driver does with the descriptor: it sleeps until somebody has signalled it.
pub(crate) fn sleep() {
    let mut signalled = BELL.signalled.lock().expect("nobody panics");
    while !*signalled {
        signalled = BELL.changed.wait(signalled).expect("nobody panics");
    }
}

/// An event descriptor.
#[derive(Debug)]
pub(crate) struct EventFd;

impl EventFd {
    pub(crate) fn new() -> io::Result<EventFd> {
        Ok(EventFd)
    }

    pub(crate) fn signal(&self) {
        *BELL.signalled.lock().expect("nobody panics") = true;
        BELL.changed.notify_one();
    }

    pub(crate) fn clear(&self) {
        *BELL.signalled.lock().expect("nobody panics") = false;
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        unreachable!("nobody polls it here")
    }
}
