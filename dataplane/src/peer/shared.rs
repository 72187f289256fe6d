//! What all threads share of one peer, for as long as its key stays the same.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{ActivityBlock, Terms};
use crate::channel::{Loan, lock};
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
    /// The address that something authentic came from last, relays aside.
    heard_from: Mutex<Option<SocketAddr>>,
    /// Routes have changed: the local address is not the right one any more.
    unstick: AtomicBool,
    /// What the owner lends to other shards, and the packets from the TUN that are on their way to it.
    pub(crate) loan: Loan<Terms>,
}

impl PeerShared {
    /// Where the peer is. Off the warm path: it takes a lock.
    pub(crate) fn whereabouts(&self) -> Whereabouts {
        *lock(&self.whereabouts)
    }

    /// Notes where the peer is now. Called when it has moved, which is rare.
    pub(crate) fn set_whereabouts(&self, now: Whereabouts) {
        *lock(&self.whereabouts) = now;
    }

    /// The address that something authentic came from last, relays aside. Off the warm path.
    pub(crate) fn heard_from(&self) -> Option<SocketAddr> {
        *lock(&self.heard_from)
    }

    /// Notes that it is another one now, which is rare.
    pub(crate) fn set_heard_from(&self, from: SocketAddr) {
        *lock(&self.heard_from) = Some(from);
    }

    /// Makes the owner forget which local address the peer is answered from.
    pub(crate) fn unstick(&self) {
        self.unstick.store(true, Ordering::Relaxed);
    }

    /// True from [`PeerShared::unstick`] until the owner obeys.
    #[inline]
    pub(crate) fn is_to_unstick(&self) -> bool {
        self.unstick.load(Ordering::Relaxed)
    }

    /// True once after [`PeerShared::unstick`]; one load where nothing was asked.
    pub(crate) fn take_unstick(&self) -> bool {
        self.is_to_unstick() && self.unstick.swap(false, Ordering::Relaxed)
    }
}
