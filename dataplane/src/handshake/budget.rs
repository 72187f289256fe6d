//! How much of a core handshake messages may cost.
//!
//! A message costs the thread 1 us (to be read and found to be nothing new) to 80 us (a Diffie-Hellman
//! computation), and anybody may send any number of them. So the thread has a budget of processor
//! time, whatever it is spent on: a small share of a core while the shards move data, a large one while
//! they do not. While there is some, messages are taken as they come. When it is spent, the thread
//! looks at its sockets only as often as [`PAUSE`] says and works off what the budget has gained
//! meanwhile; what comes in between fills the sockets' buffers, and what does not fit there is dropped
//! by the kernel before it costs this thread anything.

use std::time::{Duration, Instant};

use crate::budget::TimeBudget;

/// Thousandths of a core, in the long run: what it takes to read 130,000 messages a second. What is not
/// read may be a new peer's.
const SHARE_BUSY: u16 = 125;
/// The same while there is next to no data that the time would be taken from.
const SHARE_IDLE: u16 = 500;
/// Packets of data a second from which on there is some.
const BUSY_PER_SECOND: u64 = 2000;
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Processor time that may be used at once: when a flood begins, the first seconds decide whether who is
/// new can be told from it.
const BURST: Duration = Duration::from_millis(400);
/// How long the thread looks at nothing once the budget is spent, or while there is much to read: many
/// messages at once cost less than one by one. What comes meanwhile fits into the sockets' buffers.
pub(super) const PAUSE: Duration = Duration::from_millis(2);

/// The budget.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    time: TimeBudget,
    share: u16,
    /// Packets of data there had been, and when.
    seen: (u64, Instant),
}

impl Budget {
    pub(super) fn new(now: Instant) -> Budget {
        Budget {
            time: TimeBudget::new(now, BURST, Duration::MAX),
            share: SHARE_BUSY,
            seen: (0, now),
        }
    }

    /// Charges what was used, credits the time that has passed.
    pub(super) fn charge(&mut self, now: Instant, used: Duration) {
        self.time.refill(now, self.share);
        self.time.spend(used);
    }

    /// Looks, if it is time, at how many packets of data there have been, and sets the share.
    pub(super) fn mind(&mut self, now: Instant, packets: impl FnOnce() -> u64) {
        let (before, since) = self.seen;
        let passed = now.saturating_duration_since(since);
        if passed < LOOK_EVERY {
            return;
        }
        self.seen = (packets(), now);
        // The first look, or one after a long time, says nothing of now.
        let moved = u128::from(self.seen.0.saturating_sub(before)) * 1000;
        let busy = moved >= u128::from(BUSY_PER_SECOND) * passed.as_millis();
        self.share = if busy || passed > 2 * LOOK_EVERY {
            SHARE_BUSY
        } else {
            SHARE_IDLE
        };
    }

    /// True if the thread must pause.
    pub(super) fn spent(&self) -> bool {
        self.time.is_spent()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;

    /// Works in pieces of `piece` whenever it may, for `span`; returns the share of the time.
    fn share(piece: Duration, span: Duration) -> f64 {
        let mut now = sys::now();
        let mut budget = Budget::new(now);
        let end = now + span;
        let mut used = Duration::ZERO;
        while now < end {
            if budget.spent() {
                now += PAUSE;
                budget.charge(now, Duration::ZERO);
            } else {
                now += piece;
                used += piece;
                budget.charge(now, piece);
            }
        }
        used.as_secs_f64() / span.as_secs_f64()
    }

    #[test]
    fn endless_work_gets_its_share_whatever_its_pieces() {
        let expected = f64::from(SHARE_BUSY) / 1000.0;
        for piece in [20, 500, 3000] {
            let share = share(Duration::from_micros(piece), Duration::from_secs(100));
            assert!(
                (expected * 0.95..expected * 1.1).contains(&share),
                "{piece} us: {share}"
            );
        }
    }

    #[test]
    fn a_burst_is_taken_at_once_and_saved_time_is_bounded() {
        let mut now = sys::now();
        let mut budget = Budget::new(now);
        now += Duration::from_secs(3600);
        budget.charge(now, BURST - Duration::from_nanos(1));
        assert!(!budget.spent());
        budget.charge(now, Duration::from_nanos(1));
        assert!(budget.spent());
        // Time that runs backwards gives nothing.
        budget.charge(now - Duration::from_secs(1), Duration::ZERO);
        assert!(budget.spent());
    }

    #[test]
    fn without_data_the_share_is_larger_and_with_the_first_data_it_is_not() {
        let mut now = sys::now();
        let mut budget = Budget::new(now);
        let mut packets = 0;
        for (per_look, share) in [
            (100, SHARE_IDLE),
            (20_000, SHARE_BUSY),
            (BUSY_PER_SECOND / 5 - 1, SHARE_IDLE),
            (BUSY_PER_SECOND / 5, SHARE_BUSY),
        ] {
            now += LOOK_EVERY;
            packets += per_look;
            budget.mind(now, || packets);
            budget.mind(now + LOOK_EVERY / 2, || unreachable!("it is not time"));
            assert_eq!(budget.share, share, "{per_look}");
        }
        budget.mind(now + Duration::from_secs(60), || packets);
        assert_eq!(budget.share, SHARE_BUSY);
    }
}
