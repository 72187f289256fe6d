//! What passes between the owner of a peer and the shards that seal for it: what it lends them, and
//! how many packets are on their way to it.
//!
//! *What is lent* is the owner's, who ends it by letting go ([`Lent`]). Whoever borrows it holds on to it
//! while they fill runs, and otherwise only by a weak reference ([`Borrowed`]); who opens the first asks
//! whether it has ended, because another's run may keep it alive.
//!
//! *Packets.* The owner sends what was handed to it before it counts that as arrived, and whoever hands
//! something over counts it before. So a shard that finds the count at zero sends after everything that it
//! has handed over.
//!
//! The locks, atomics and references come from the parent module's `sync`, so that `dataplane/loom`
//! compiles this very file against loom's.

use super::sync::{Arc, AtomicBool, AtomicUsize, Mutex, Ordering, PoisonError, Weak};

/// Something lent, until who lends it lets it go.
#[derive(Debug)]
pub(crate) struct Grant<T> {
    lent: T,
    ended: AtomicBool,
}

/// A grant in the owner's hands: when they let it go it has ended, whoever still holds on to it.
#[derive(Debug)]
pub(crate) struct Lent<T>(Arc<Grant<T>>);

impl<T> Lent<T> {
    pub(crate) fn new(lent: T) -> Lent<T> {
        Lent(Arc::new(Grant {
            lent,
            ended: AtomicBool::new(false),
        }))
    }

    /// What is lent.
    #[inline]
    pub(crate) fn get(&self) -> &T {
        &self.0.lent
    }

    /// What others remember.
    pub(crate) fn offer(&self) -> Weak<Grant<T>> {
        Arc::downgrade(&self.0)
    }
}

impl<T> Drop for Lent<T> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
    }
}

/// What is lent now, if anything, and the packets under way to the lender.
#[derive(Debug)]
pub(crate) struct Loan<T> {
    lent: Mutex<Weak<Grant<T>>>,
    handed: AtomicUsize,
}

impl<T> Default for Loan<T> {
    fn default() -> Loan<T> {
        Loan {
            lent: Mutex::new(Weak::new()),
            handed: AtomicUsize::new(0),
        }
    }
}

impl<T> Loan<T> {
    /// What is lent, for the caller to remember: it takes a lock, but does not wait for it. Nothing
    /// where the lender is about to change it.
    fn get(&self) -> Weak<Grant<T>> {
        let lent = self.lent.try_lock();
        lent.map_or_else(|_busy| Weak::new(), |lent| Weak::clone(&lent))
    }

    /// Lends something else from now on. Who else holds the lock copies a pointer and lets go.
    pub(crate) fn set(&self, lent: &Lent<T>) {
        *self.lent.lock().unwrap_or_else(PoisonError::into_inner) = lent.offer();
    }

    /// Hands a packet to the lender: `push` says whether there was room for it.
    pub(crate) fn hand(&self, push: impl FnOnce() -> bool) {
        self.handed.fetch_add(1, Ordering::Relaxed);
        if !push() {
            self.arrived();
        }
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

/// What one shard has from the owner of a peer.
#[derive(Debug)]
pub(crate) struct Borrowed<T> {
    known: Weak<Grant<T>>,
    /// Held while runs are open.
    held: Option<Arc<Grant<T>>>,
}

impl<T> Default for Borrowed<T> {
    fn default() -> Borrowed<T> {
        Borrowed {
            known: Weak::new(),
            held: None,
        }
    }
}

impl<T> Borrowed<T> {
    /// Takes up what is lent, if it is still of use (`counts`) and nothing is to be waited for. True if it
    /// is held, from now until [`Borrowed::release`].
    #[inline]
    pub(crate) fn take_up(&mut self, loan: &Loan<T>, counts: impl Fn(&T) -> bool) -> bool {
        if self.held.is_none() {
            // While packets that were handed over are on their way, those after them go the same way.
            if loan.busy() {
                return false;
            }
            self.held = standing(&self.known, &counts).or_else(|| {
                self.known = loan.get();
                standing(&self.known, &counts)
            });
        }
        self.held.is_some()
    }

    /// What is held.
    #[inline]
    pub(crate) fn get(&self) -> Option<&T> {
        self.held.as_ref().map(|grant| &grant.lent)
    }

    /// The run is closed.
    #[inline]
    pub(crate) fn release(&mut self) {
        self.held = None;
    }
}

/// The grant, if it has not ended and is of use.
#[inline]
fn standing<T>(known: &Weak<Grant<T>>, counts: impl Fn(&T) -> bool) -> Option<Arc<Grant<T>>> {
    known
        .upgrade()
        .filter(|grant| !grant.ended.load(Ordering::Acquire) && counts(&grant.lent))
}
