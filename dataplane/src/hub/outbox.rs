//! What waits for the control thread.

#![forbid(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam::queue::ArrayQueue;

use super::{Network, STRAYS_MAX};
use crate::channel::Lane;
use crate::sys::EventFd;
use crate::types::{Datagrams, Event, RelayBatch};

/// Batches that wait for the control thread at most, and their bytes.
pub(crate) const RELAY_OUT_ENTRIES_MAX: usize = 1024;
pub(crate) const RELAY_OUT_BYTES_MAX: usize = 4 << 20;
/// Events that wait for the control thread at most.
pub(crate) const EVENTS_MAX: usize = 4096;
/// Emptied relay buffers kept for reuse.
pub(crate) const SPARE_MAX: usize = 64;
/// Networks that a shard has done with, waiting to be freed at most.
const RETIRED_MAX: usize = 64;

/// What waits for the control thread. Its descriptor is readable when something does.
pub(crate) struct Outbox {
    /// The first thread that failed.
    failed: ArrayQueue<String>,
    events: ArrayQueue<Event>,
    events_lost: AtomicU64,
    relay: Lane<RelayBatch>,
    spare: ArrayQueue<Datagrams>,
    strays: ArrayQueue<(SocketAddr, Vec<u8>)>,
    retired: ArrayQueue<Network>,
    event: EventFd,
    signalled: AtomicBool,
}

impl Outbox {
    /// What waits from so many shards.
    pub(super) fn new(shards: usize) -> io::Result<Outbox> {
        Ok(Outbox {
            failed: ArrayQueue::new(1),
            events: ArrayQueue::new(EVENTS_MAX),
            events_lost: AtomicU64::new(0),
            relay: Lane::new(RELAY_OUT_ENTRIES_MAX, RELAY_OUT_BYTES_MAX),
            spare: ArrayQueue::new(SPARE_MAX),
            strays: ArrayQueue::new(STRAYS_MAX),
            retired: ArrayQueue::new(RETIRED_MAX * shards.max(1)),
            event: EventFd::new()?,
            signalled: AtomicBool::new(false),
        })
    }

    pub(crate) fn event(&self, event: Event) {
        if self.events.push(event).is_err() {
            self.events_lost.fetch_add(1, Ordering::Relaxed);
        }
        self.signal();
    }

    /// Tells that a thread failed. The others will soon be at odds with what is left: the first counts.
    pub(crate) fn failed(&self, why: String) {
        // The log has every one.
        drop(self.failed.push(why));
        self.signal();
    }

    pub(crate) fn relay(&self, out: RelayBatch) {
        self.relay.push(out);
        self.signal();
    }

    /// Passes on a datagram for the control thread that reached a shard; false if there is no room.
    pub(crate) fn stray(&self, from: SocketAddr, datagram: &[u8]) -> bool {
        let pushed = self.strays.push((from, datagram.to_vec())).is_ok();
        self.signal();
        pushed
    }

    /// Gives back a network that another has followed: whoever lets the last copy go frees what nobody
    /// uses any more, perhaps thousands of peers, and that shall not be a shard.
    pub(crate) fn retire(&self, network: Network) {
        // There is room, or the control side is not there any more.
        drop(self.retired.push(network));
        self.signal();
    }

    /// Frees what shards have done with. Not for a shard.
    pub(crate) fn free_retired(&self) {
        while self.retired.pop().is_some() {}
    }

    /// An empty buffer for [`Outbox::relay`], a used one if there is any.
    pub(crate) fn buffer(&self) -> Datagrams {
        self.spare.pop().unwrap_or_default()
    }

    /// Takes a buffer back.
    pub(crate) fn recycle(&self, mut datagrams: Datagrams) {
        datagrams.bytes.clear();
        datagrams.lens.clear();
        // A full store means enough are at hand: this one is freed.
        drop(self.spare.push(datagrams));
    }

    fn signal(&self) {
        if !self.signalled.swap(true, Ordering::SeqCst) {
            self.event.signal();
        }
    }

    /// Pops from either queue; when it is empty, makes the descriptor unreadable and looks again,
    /// so that what came in between is not left behind a silent descriptor.
    fn poll<T>(&self, pop: impl Fn() -> Option<T>) -> Option<T> {
        if let Some(found) = pop() {
            return Some(found);
        }
        if self.signalled.load(Ordering::Relaxed) {
            self.event.clear();
            self.signalled.store(false, Ordering::SeqCst);
            self.free_retired();
            let events = self.events.len() + self.failed.len();
            if events > 0 || !self.relay.is_empty() || !self.strays.is_empty() {
                self.signal();
            }
        }
        pop()
    }

    pub(crate) fn poll_event(&self) -> Option<Event> {
        self.poll(|| {
            let failed = self.failed.pop().map(Event::Failed);
            failed.or_else(|| self.events.pop())
        })
    }

    pub(crate) fn poll_relay(&self) -> Option<RelayBatch> {
        self.poll(|| self.relay.pop())
    }

    pub(crate) fn poll_stray(&self) -> Option<(SocketAddr, Vec<u8>)> {
        self.poll(|| self.strays.pop())
    }

    pub(crate) fn events_lost(&self) -> u64 {
        self.events_lost.load(Ordering::Relaxed)
    }

    pub(crate) fn relay_dropped(&self) -> u64 {
        self.relay.dropped()
    }
}

impl AsFd for Outbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::SHARDS_MAX;
    use crate::types::{PeerId, RegionId};

    #[test]
    fn what_any_shard_has_done_with_waits_for_the_control_side() {
        let outbox = Outbox::new(SHARDS_MAX).unwrap();
        let done = Network::closed();
        for _ in 0..5 * SHARDS_MAX {
            outbox.retire(done.clone());
        }
        assert_eq!(Arc::strong_count(&done.table), 1 + 5 * SHARDS_MAX);
        assert_eq!(outbox.poll_event(), None);
        assert_eq!(Arc::strong_count(&done.table), 1);
    }

    #[test]
    fn the_outbox_stays_readable_until_both_queues_are_empty() {
        let outbox = Outbox::new(1).unwrap();
        outbox.event(Event::TunGone);
        outbox.relay(RelayBatch {
            peer: PeerId(1),
            region: RegionId(2),
            datagrams: Datagrams {
                bytes: vec![1, 2],
                lens: vec![2],
            },
        });
        assert_eq!(outbox.poll_event(), Some(Event::TunGone));
        assert_eq!(outbox.poll_event(), None);
        assert!(
            outbox.signalled.load(Ordering::SeqCst),
            "the relay lane has one"
        );
        assert!(outbox.poll_relay().is_some());
        assert!(outbox.poll_relay().is_none());
        assert!(!outbox.signalled.load(Ordering::SeqCst));
    }
}
