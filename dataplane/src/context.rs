//! What every room of a shard is handed besides its batch: the time, the counters, the events.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use crate::session::Moment;
use crate::stats::{Counters, Room};
use crate::sys::{self, cycles, steady_wall, thread_time};
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
    rested: Rested,
}

/// How things stood when waiting was last told from work.
struct Rested {
    at: Instant,
    used: Duration,
    cycles: u64,
    ring: u64,
}

impl Context {
    pub(crate) fn new(now: Instant) -> Context {
        Context {
            now,
            counters: Counters::default(),
            events: Vec::with_capacity(EVENTS_ROOM),
            lap: cycles(),
            rested: Rested {
                at: sys::now(),
                used: thread_time(),
                cycles: cycles(),
                ring: 0,
            },
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

    /// Charges what the thread was off its core since the last call to nobody's work: a shard waits in the
    /// ring, whose cycles they were. (So is what others took of the core meanwhile.) The thread's own time is
    /// a system call: it is asked for once in `interval` at most.
    pub(crate) fn tell_waiting(&mut self, interval: Duration) {
        if self.now.saturating_duration_since(self.rested.at) < interval {
            return;
        }
        let (at, used, cycles) = (sys::now(), thread_time(), cycles());
        let last = &self.rested;
        let passed = at.saturating_duration_since(last.at);
        let off = passed.saturating_sub(used.saturating_sub(last.used));
        let waited = u128::from(cycles.wrapping_sub(last.cycles)) * off.as_nanos();
        let waited = u64::try_from(waited / passed.as_nanos().max(1)).unwrap_or(0);
        let ring = self
            .counters
            .recharge(Room::Ring, Room::Wait, last.ring, waited);
        self.rested = Rested {
            at,
            used,
            cycles,
            ring,
        };
    }
}
