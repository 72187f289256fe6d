//! What every room of a shard is handed besides its batch: the time, the counters, the events.

#![forbid(unsafe_code)]

use std::time::Instant;

use crate::session::Moment;
use crate::stats::{Counters, Room};
use crate::sys::{cycles, steady_wall};
use crate::types::Event;

/// Room for events of one turn before the vector grows.
const EVENTS_ROOM: usize = 64;

pub(crate) struct Context {
    /// The time of this turn, read once.
    pub(crate) now: Instant,
    pub(crate) counters: Counters,
    /// Events of this turn, sent at its end.
    pub(crate) events: Vec<Event>,
    lap: u64,
}

impl Context {
    pub(crate) fn new(now: Instant) -> Context {
        Context {
            now,
            counters: Counters::default(),
            events: Vec::with_capacity(EVENTS_ROOM),
            lap: cycles(),
        }
    }

    /// The time of this turn with the wall clock, which is read now: a handshake may begin.
    pub(crate) fn moment(&self) -> Moment {
        Moment {
            now: self.now,
            wall: steady_wall(),
        }
    }

    /// Charges the cycles since the last call to a room: called where a batch leaves it.
    #[inline]
    pub(crate) fn lap(&mut self, room: Room) {
        let now = cycles();
        self.counters.charge(room, now.wrapping_sub(self.lap));
        self.lap = now;
    }
}
