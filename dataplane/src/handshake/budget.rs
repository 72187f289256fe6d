//! How much of a core handshake messages may cost.
//!
//! A message costs the thread 3 us (to be read and have a wrong MAC1) to 80 us (a Diffie-Hellman
//! computation), and anybody may send any number of them. So the thread has a budget of processor
//! time, whatever it is spent on. While there is some, messages are taken as they come. When it is
//! spent, the thread looks at its sockets only as often as [`PAUSE`] says and works off what the
//! budget has gained meanwhile; what comes in between fills the sockets' buffers, and what does not
//! fit there is dropped by the kernel before it costs this thread anything.

use std::time::{Duration, Instant};

/// One part in so many of a core, in the long run.
const SHARE: u32 = 16;
/// Processor time that may be used at once: a few hundred handshakes.
const BURST: Duration = Duration::from_millis(25);
/// How long the thread looks at nothing once the budget is spent.
pub(super) const PAUSE: Duration = Duration::from_millis(5);

/// The budget.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    /// Nanoseconds of processor time; below zero after the last piece of work was a large one.
    level: i64,
    at: Instant,
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

impl Budget {
    pub(super) fn new(now: Instant) -> Budget {
        Budget {
            level: nanos(BURST),
            at: now,
        }
    }

    /// Charges what was used, credits the time that has passed.
    pub(super) fn charge(&mut self, now: Instant, used: Duration) {
        let passed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        self.level = self
            .level
            .saturating_add(nanos(passed / SHARE))
            .min(nanos(BURST))
            .saturating_sub(nanos(used));
    }

    /// True if the thread must pause.
    pub(super) fn spent(&self) -> bool {
        self.level <= 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any moment to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    /// Works in pieces of `piece` whenever it may, for `span`; returns the share of the time.
    fn share(piece: Duration, span: Duration) -> f64 {
        let mut now = start();
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
        let expected = 1.0 / f64::from(SHARE);
        for piece in [20, 500, 3000] {
            let share = share(Duration::from_micros(piece), Duration::from_secs(20));
            assert!(
                (expected * 0.95..expected * 1.1).contains(&share),
                "{piece} us: {share}"
            );
        }
    }

    #[test]
    fn a_burst_is_taken_at_once_and_saved_time_is_bounded() {
        let mut now = start();
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
}
