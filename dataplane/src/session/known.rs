//! A small model of the keypairs that a session of ours holds, for the tests, the fuzzer and
//! `dataplane/oracle`. It knows nothing of alarms or cryptography: only which handshakes were
//! completed when, and which keypair each message goes to.

#![forbid(unsafe_code)]

use std::time::Instant;

use super::keypair::PREVIOUS_MAX;
use super::{REJECT_AFTER_TIME, ZERO_AFTER_TIME};

/// One keypair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair {
    /// The index under which it receives.
    index: u32,
    born: Instant,
}

/// The keypairs of an end, by the rules of [`super::keypair::Keypairs`].
#[derive(Clone, Debug, Default)]
pub struct Known {
    current: Option<Pair>,
    next: Option<Pair>,
    /// The newest first.
    previous: [Option<Pair>; PREVIOUS_MAX],
    derived: Option<Instant>,
}

impl Known {
    fn retire(&mut self, pair: Option<Pair>) {
        if pair.is_some() {
            self.previous.rotate_right(1);
            self.previous[0] = pair;
        }
    }

    /// It answered an initiation, under this index of its own.
    pub fn answered(&mut self, index: u32, now: Instant) {
        self.next = Some(Pair { index, born: now });
        self.derived = Some(now);
    }

    /// Its own initiation, which had this index, was answered.
    pub fn completed(&mut self, index: u32, now: Instant) {
        let (current, next) = (self.current.take(), self.next.take());
        self.retire(current);
        self.retire(next);
        self.current = Some(Pair { index, born: now });
        self.derived = Some(now);
    }

    /// A good message came for an index. True if that makes the next keypair the current one.
    pub fn received(&mut self, index: u32) -> bool {
        let confirms = self.next.is_some_and(|next| next.index == index);
        if confirms {
            let current = self.current.take();
            self.retire(current);
            self.current = self.next.take();
        }
        confirms
    }

    /// Time has passed.
    pub fn passed(&mut self, now: Instant) {
        if self
            .derived
            .is_some_and(|derived| now >= derived + ZERO_AFTER_TIME)
        {
            *self = Known::default();
        }
    }

    /// True if a message for an index can be opened.
    #[must_use]
    pub fn holds(&self, index: u32, now: Instant) -> bool {
        [self.current, self.next]
            .into_iter()
            .chain(self.previous)
            .flatten()
            .any(|pair| pair.index == index && now - pair.born < REJECT_AFTER_TIME)
    }

    /// True if there are keys to seal with, unless their counters are used up.
    #[must_use]
    pub fn ready(&self, now: Instant) -> bool {
        self.current
            .is_some_and(|current| now - current.born < REJECT_AFTER_TIME)
    }
}
