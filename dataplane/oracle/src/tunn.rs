//! A small model of a `Tunn`: which handshakes and sessions it holds, and which counters it takes.

use std::time::Duration;

/// Sessions it keeps, each in the place that its index has modulo this.
const SLOTS: usize = 8;
/// How far behind the newest counter one may be.
const WINDOW: u64 = 1024;
const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);

#[derive(Clone, Copy)]
struct Slot {
    index: u32,
    born: Duration,
    /// The newest counter received, plus one.
    next: u64,
}

/// What it holds. Times count from when it was made.
#[derive(Default)]
pub struct Tunn {
    /// It reckons with the time of its last tick.
    clock: Duration,
    slots: [Option<Slot>; SLOTS],
    /// When the last handshake was completed or answered.
    established: Duration,
    /// When the first of the initiations in a row went out.
    started: Duration,
    /// Initiations that may still be answered, the newer one first.
    outstanding: [Option<u32>; 2],
    /// It has given up.
    expired: bool,
}

impl Tunn {
    pub fn ticked(&mut self, now: Duration) {
        self.clock = now;
        for slot in &mut self.slots {
            *slot = slot.filter(|slot| now - slot.born <= REJECT_AFTER_TIME);
        }
        let unanswered = self.outstanding[0].is_some() && now - self.started >= REKEY_ATTEMPT_TIME;
        let idle = now - self.established >= 3 * REJECT_AFTER_TIME;
        if !self.expired && (idle || unanswered) {
            *self = Tunn {
                clock: now,
                established: now,
                started: now,
                expired: true,
                ..Tunn::default()
            };
        }
    }

    /// It sent an initiation with this index.
    pub fn initiated(&mut self, index: u32, now: Duration) {
        if std::mem::take(&mut self.expired) {
            (self.clock, self.established) = (now, now);
        }
        if self.outstanding[0].is_none() {
            self.started = self.clock;
        }
        self.outstanding = [Some(index), self.outstanding[0]];
    }

    /// It answered an initiation, under this index of its own.
    pub fn answered(&mut self, index: u32) {
        self.expired = false;
        self.outstanding = [None, self.outstanding[0]];
        self.establish(index);
    }

    /// True if it takes a response to its initiation with this index.
    pub fn awaits(&self, index: u32) -> bool {
        self.outstanding.contains(&Some(index))
    }

    /// Its initiation with this index was answered.
    pub fn completed(&mut self, index: u32) {
        for outstanding in &mut self.outstanding {
            *outstanding = outstanding.filter(|outstanding| *outstanding != index);
        }
        self.establish(index);
    }

    fn establish(&mut self, index: u32) {
        self.established = self.clock;
        self.slots[index as usize % SLOTS] = Some(Slot {
            index,
            born: self.clock,
            next: 0,
        });
    }

    /// Takes a good message that it has not seen, unless there are no keys for it or its counter is
    /// too old.
    pub fn takes(&mut self, index: u32, counter: u64) -> bool {
        let slot = self.slots[index as usize % SLOTS].as_mut();
        let Some(slot) = slot.filter(|slot| slot.index == index) else {
            return false;
        };
        let takes = counter + WINDOW >= slot.next;
        slot.next = slot.next.max(counter + 1);
        takes
    }
}
