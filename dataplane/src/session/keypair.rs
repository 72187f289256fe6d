//! The keys of one session: a sealing half that any shard may use, and an opening half with its
//! replay window; and which keypairs a session holds.

#![forbid(unsafe_code)]

use std::mem::offset_of;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;

use super::counter::Counter;
use super::indexes::Indexes;
use super::window::Window;
use super::{BATCH_MAX, OVERHEAD, REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES};
use crate::aead::{Aead, Key, Seal};
use crate::config::SHARDS_MAX;
use crate::stats::DropReason;

// However many shards pass the limit at once, the counter does not wrap.
const _: () = assert!((SHARDS_MAX * BATCH_MAX) as u64 <= u64::MAX - REJECT_AFTER_MESSAGES);

/// Keypairs that are kept after they were replaced. The kernel keeps one, but handshakes that cross
/// make two at once, one by each end, and the ends seal with different ones. When they cross again,
/// the peer seals with its older one until it has our answer; by then our older one and its new one
/// may have been retired after it.
pub(super) const PREVIOUS_MAX: usize = 3;

/// The sealing half of a keypair: a key, the peer's index, and a counter that any number of threads
/// may take from.
pub(crate) struct Sealing {
    key: Key,
    remote_index: u32,
    /// On a line of its own: every batch of every shard writes it, and all read what is beside it.
    counter: Counter,
    born: Instant,
    pub(super) initiator: bool,
}

const _: () = assert!(
    offset_of!(Sealing, counter).is_multiple_of(64) && size_of::<Counter>().is_multiple_of(64)
);

impl std::fmt::Debug for Sealing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealing")
            .field("remote_index", &self.remote_index)
            .field("counter", &self.counter)
            .finish_non_exhaustive()
    }
}

impl Sealing {
    /// Takes `n` counters in a row and returns the first; `None` if there are not so many left
    /// before `REJECT_AFTER_MESSAGES`. At most [`BATCH_MAX`] at a time.
    #[inline]
    pub(crate) fn reserve(&self, n: usize) -> Option<u64> {
        debug_assert!(
            n <= BATCH_MAX,
            "the counter has room for so many per thread"
        );
        self.counter.reserve(n as u64)
    }

    /// Takes up to `n` counters that nothing is sealed under, as long as some are left.
    #[cfg(feature = "internals")]
    pub(super) fn use_up(&self, n: u64) {
        let left = REJECT_AFTER_MESSAGES - self.counter.peek();
        let _first = self.counter.reserve(n.min(left));
    }

    /// True if the key may still be used (WireGuard paper §6.2).
    #[inline]
    pub(crate) fn usable(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.born) < REJECT_AFTER_TIME
            && self.counter.peek() < REJECT_AFTER_MESSAGES
    }

    /// True if the key is to be replaced although it may still be used: after
    /// `REKEY_AFTER_MESSAGES` by whoever sends, after `age` by who began the handshake (§6.2).
    #[inline]
    pub(crate) fn wants_rekey(&self, now: Instant, age: Duration) -> bool {
        self.counter.peek() >= REKEY_AFTER_MESSAGES
            || (self.initiator && now.saturating_duration_since(self.born) >= age)
    }

    /// Seals a batch in place: messages of `stride` bytes, of which only the last may be shorter,
    /// each with its plaintext behind 16 bytes of room for the header and 16 for the tag behind it.
    /// At most [`BATCH_MAX`].
    ///
    /// # Errors
    /// [`DropReason::SessionExpired`] if the key may no longer be used; nothing is sealed then.
    pub(crate) fn seal(
        &self,
        aead: &Aead,
        now: Instant,
        messages: &mut [u8],
        stride: usize,
    ) -> Result<(), DropReason> {
        let count = messages.len().div_ceil(stride.max(1));
        let first = Some(count)
            .filter(|_| self.usable(now))
            .and_then(|count| self.reserve(count))
            .ok_or(DropReason::SessionExpired)?;
        let mut batch: ArrayVec<Seal<'_>, BATCH_MAX> = ArrayVec::new();
        for (message, counter) in messages.chunks_mut(stride.max(OVERHEAD)).zip(first..) {
            batch.push(Seal {
                key: &self.key,
                receiver: self.remote_index,
                counter,
                message,
            });
        }
        aead.seal(&mut batch);
        Ok(())
    }

    /// The parts that an export holds: key, index and next counter. Whoever else holds this half
    /// seals no more with it.
    pub(super) fn close(&self) -> (&Key, u32, u64) {
        (&self.key, self.remote_index, self.counter.close())
    }

    /// The counter of the next message.
    #[cfg(test)]
    pub(super) fn next_counter(&self) -> u64 {
        self.counter.peek()
    }
}

/// A keypair, from a handshake's end to when it is replaced or too old.
pub(crate) struct Keypair {
    pub(super) sealing: Arc<Sealing>,
    pub(super) opening: Key,
    pub(super) window: Window,
    /// The index the peer writes into what it sends us.
    pub(super) local_index: u32,
    pub(super) born: Instant,
}

/// Bytes of a keypair with both halves.
#[cfg(test)]
pub(crate) const fn keypair_cost() -> usize {
    // The reference counts before it take as much as its alignment.
    size_of::<Keypair>() + align_of::<Sealing>() + size_of::<Sealing>() + size_of::<usize>()
}

/// What a keypair is made of.
pub(super) struct Material<'a> {
    pub(super) send: &'a [u8; 32],
    pub(super) receive: &'a [u8; 32],
    pub(super) local_index: u32,
    pub(super) remote_index: u32,
    pub(super) born: Instant,
    pub(super) initiator: bool,
    pub(super) next_counter: u64,
    pub(super) window: Window,
}

impl Keypair {
    pub(super) fn new(material: Material<'_>) -> Box<Keypair> {
        Box::new(Keypair {
            sealing: Arc::new(Sealing {
                key: Key::new(material.send),
                remote_index: material.remote_index,
                counter: Counter::new(material.next_counter, REJECT_AFTER_MESSAGES),
                born: material.born,
                initiator: material.initiator,
            }),
            opening: Key::new(material.receive),
            window: material.window,
            local_index: material.local_index,
            born: material.born,
        })
    }

    /// True if what was sealed under it may still be opened (WireGuard paper §6.2).
    pub(super) fn opens(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.born) < REJECT_AFTER_TIME
    }
}

/// The keypairs of a session.
///
/// `next` is one that we answered and the peer has not used yet: we may not seal with it, since the
/// peer may never have got our response (paper §6.1). It becomes `current` with its first message.
/// Those that were replaced, newest first, still open what is under way.
#[derive(Default)]
pub(crate) struct Keypairs {
    pub(super) current: Option<Box<Keypair>>,
    pub(super) next: Option<Box<Keypair>>,
    pub(super) previous: [Option<Box<Keypair>>; PREVIOUS_MAX],
}

impl Keypairs {
    /// The keypair we began is complete: it is the current one.
    pub(super) fn completed(&mut self, keypair: Box<Keypair>, indexes: &mut Indexes) {
        indexes.settle(keypair.local_index);
        let current = self.current.replace(keypair);
        self.retire(current, indexes);
        // The peer will seal with `next` if our answer reaches it.
        let next = self.next.take();
        if let Some(next) = &next {
            indexes.settle(next.local_index);
        }
        self.retire(next, indexes);
    }

    /// We answered an initiation.
    pub(super) fn answered(&mut self, keypair: Box<Keypair>, indexes: &mut Indexes) {
        if let Some(old) = self.next.replace(keypair) {
            indexes.release(old.local_index);
        }
    }

    /// The peer has used `next`.
    pub(super) fn confirmed(&mut self, indexes: &mut Indexes) {
        if let Some(next) = self.next.take() {
            indexes.settle(next.local_index);
            let current = self.current.replace(next);
            self.retire(current, indexes);
        }
    }

    fn retire(&mut self, keypair: Option<Box<Keypair>>, indexes: &mut Indexes) {
        if keypair.is_none() {
            return;
        }
        self.previous.rotate_right(1);
        if let Some(oldest) = std::mem::replace(&mut self.previous[0], keypair) {
            indexes.release(oldest.local_index);
        }
    }

    /// The keypair with the index, and whether it is `next`.
    #[inline]
    pub(super) fn find(&mut self, index: u32) -> Option<(&mut Keypair, bool)> {
        let next = self
            .next
            .as_ref()
            .is_some_and(|next| next.local_index == index);
        let keypair = [&mut self.current, &mut self.next]
            .into_iter()
            .chain(&mut self.previous)
            .flatten()
            .find(|keypair| keypair.local_index == index)?;
        Some((keypair, next))
    }

    /// Forgets all keys, which erases them once no shard uses them any more.
    pub(super) fn clear(&mut self, indexes: &mut Indexes) {
        let Keypairs {
            current,
            next,
            previous,
        } = std::mem::take(self);
        for keypair in [current, next].into_iter().chain(previous).flatten() {
            indexes.release(keypair.local_index);
        }
    }

    /// True if there are none.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.current.is_none() && self.next.is_none() && self.previous.iter().all(Option::is_none)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::sys::now;

    fn sealing(next: u64) -> Arc<Sealing> {
        let keypair = Keypair::new(Material {
            send: &[1; 32],
            receive: &[2; 32],
            local_index: 1,
            remote_index: 2,
            born: now(),
            initiator: false,
            next_counter: next,
            window: Window::new(),
        });
        Arc::clone(&keypair.sealing)
    }

    #[test]
    fn many_threads_take_each_counter_once_and_overshoot_without_wrapping() {
        let sealing = sealing(REJECT_AFTER_MESSAGES - 50_000);
        let take = || {
            let mut taken = Vec::new();
            while let Some(first) = sealing.reserve(BATCH_MAX) {
                taken.push(first);
            }
            // Refused stays refused, and costs no more room.
            for _ in 0..100 {
                assert_eq!(sealing.reserve(BATCH_MAX), None);
            }
            taken
        };
        let all: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..SHARDS_MAX).map(|_| scope.spawn(take)).collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(all.len(), 50_000 / BATCH_MAX);
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        assert!(
            all.iter()
                .all(|first| first + BATCH_MAX as u64 <= REJECT_AFTER_MESSAGES)
        );
        assert!(!sealing.usable(now()));
    }

    #[test]
    fn the_last_counters_are_used_and_none_above() {
        let sealing = sealing(REJECT_AFTER_MESSAGES - 3);
        assert_eq!(sealing.reserve(2), Some(REJECT_AFTER_MESSAGES - 3));
        assert_eq!(sealing.reserve(1), Some(REJECT_AFTER_MESSAGES - 1));
        assert_eq!(sealing.reserve(1), None);
    }

    #[test]
    fn a_closed_key_gives_its_next_counter_and_no_more() {
        let sealing = sealing(7);
        assert_eq!(sealing.reserve(2), Some(7));
        assert_eq!(sealing.close().2, 9);
        assert_eq!(sealing.reserve(1), None);
        assert_eq!(sealing.close().2, REJECT_AFTER_MESSAGES, "nothing is left");
        assert!(!sealing.usable(now()));
        // A batch that did not fit has added to the sum.
        let sealing = self::sealing(REJECT_AFTER_MESSAGES - 3);
        assert_eq!(sealing.reserve(5), None);
        assert_eq!(sealing.close().2, REJECT_AFTER_MESSAGES);
    }

    #[test]
    fn a_used_up_key_seals_nothing_of_a_batch() {
        let aead = Aead::detect();
        let sealing = sealing(REJECT_AFTER_MESSAGES - 2);
        let mut messages = [7u8; 48 * 3];
        let untouched = messages;
        let result = sealing.seal(&aead, now(), &mut messages, 48);
        assert_eq!(result, Err(DropReason::SessionExpired));
        assert_eq!(messages, untouched);
    }
}
