//! What all threads share of one peer, for as long as its key stays the same.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, Weak};

use super::ActivityBlock;
use crate::peer::Grant;
use crate::sys::socket::Local;

/// Where a peer was last seen, and where it found us: the two ends of the path in device mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Whereabouts {
    /// The peer's address.
    pub(crate) endpoint: Option<SocketAddr>,
    /// Our address that its datagrams arrive at.
    pub(crate) local: Option<Local>,
}

/// One peer's part of the shared memory. A new holder of its id gets a new one, so nothing of the
/// old one can leak into it.
#[derive(Debug, Default)]
pub(crate) struct PeerShared {
    pub(crate) activity: ActivityBlock,
    whereabouts: Mutex<Whereabouts>,
    /// Routes have changed: the local address is not the right one any more.
    unstick: AtomicBool,
    /// What the owner lends to other shards; dead where that is nothing.
    grant: Mutex<Weak<Grant>>,
    /// Packets from the TUN that were handed to the owner and not yet sent by it.
    handed: AtomicUsize,
}

impl PeerShared {
    /// What the owner lends, to be remembered by the caller: it takes a lock, but never waits for it.
    pub(crate) fn grant(&self) -> Weak<Grant> {
        let grant = self.grant.try_lock();
        grant.map_or_else(|_busy| Weak::new(), |grant| Weak::clone(&grant))
    }

    /// Lends something else from now on. Who else holds the lock copies a pointer and lets go.
    pub(crate) fn set_grant(&self, grant: Weak<Grant>) {
        *self.grant.lock().unwrap_or_else(PoisonError::into_inner) = grant;
    }

    /// A packet from the TUN is about to be handed to the owner.
    pub(crate) fn hand(&self) {
        self.handed.fetch_add(1, Ordering::Relaxed);
    }

    /// One that was handed over has been sent, dropped, or set aside until there are keys.
    pub(crate) fn unhand(&self) {
        // Whoever sees the last one gone sends after it.
        self.handed.fetch_sub(1, Ordering::Release);
    }

    /// True while packets are on their way through the owner.
    #[inline]
    pub(crate) fn handed(&self) -> bool {
        self.handed.load(Ordering::Acquire) > 0
    }

    /// Where the peer is. Off the warm path: it takes a lock.
    pub(crate) fn whereabouts(&self) -> Whereabouts {
        *self
            .whereabouts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes where the peer is now. Called when it has moved, which is rare.
    pub(crate) fn set_whereabouts(&self, now: Whereabouts) {
        *self
            .whereabouts
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = now;
    }

    /// Makes the owner forget which local address the peer is answered from.
    pub(crate) fn unstick(&self) {
        self.unstick.store(true, Ordering::Relaxed);
    }

    /// True once after [`PeerShared::unstick`]; one load where nothing was asked.
    pub(crate) fn take_unstick(&self) -> bool {
        self.unstick.load(Ordering::Relaxed) && self.unstick.swap(false, Ordering::Relaxed)
    }
}
