//! How much of the control thread's time goes to what anybody can have it do.
//!
//! One thread carries relayed data, decides about paths, and reads what strangers send to a port that
//! is open to all. The last of these gets a share of the thread's time, a small one while the thread
//! has packets to carry, and some in advance, so that a burst of what counts is answered at once.
//! What does not come within the share waits in the kernel's buffer, which is bounded, and is dropped
//! there.

use std::time::{Duration, Instant};

/// Time saved up at most, in nanoseconds: a few thousand datagrams.
const SAVED_MAX: i64 = 20_000_000;
/// Overdrawn at most: one piece of work that took long is not paid for ever.
const OVERDRAWN_MAX: i64 = 50_000_000;
/// What is there when an overdrawn budget opens again.
const GRAIN: i64 = 500_000;

/// A share of one thread's time.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Per hundred of the time, while there is other work and while there is none.
    share_busy: i64,
    share_idle: i64,
    /// What may be spent, in nanoseconds.
    left: i64,
    filled_at: Instant,
}

impl Budget {
    /// A full budget of so many per cent of the time: while the thread has other work, and while it has
    /// none.
    pub fn new(now: Instant, share_busy: u8, share_idle: u8) -> Self {
        Self {
            share_busy: share_busy.max(1).into(),
            share_idle: share_idle.max(1).into(),
            left: SAVED_MAX,
            filled_at: now,
        }
    }

    /// When more may be spent: `now` if there is something left. `busy` says whether the thread has had
    /// other work since the last call.
    pub fn opens(&mut self, now: Instant, busy: bool) -> Instant {
        let share = if busy {
            self.share_busy
        } else {
            self.share_idle
        };
        let since = nanos(now.saturating_duration_since(self.filled_at));
        self.filled_at = self.filled_at.max(now);
        self.left = (self.left + since.saturating_mul(share) / 100).min(SAVED_MAX);
        if self.left > 0 {
            return now;
        }
        let missing = (GRAIN - self.left) * 100 / share;
        now + Duration::from_nanos(missing.unsigned_abs())
    }

    /// So much of the processor's time was spent.
    pub fn spend(&mut self, took: Duration) {
        self.left = self.left.saturating_sub(nanos(took)).max(-OVERDRAWN_MAX);
    }
}

/// Bounded so that products stay in range: two minutes are more than any budget saves.
fn nanos(time: Duration) -> i64 {
    const MAX: i64 = 120_000_000_000;
    i64::try_from(time.as_nanos()).unwrap_or(MAX).min(MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::test_clock::start;

    const MS: Duration = Duration::from_millis(1);

    /// A thread that is never without datagrams to read for `seconds`, each batch taking `batch`, and
    /// does other work in between as long as it may not. Returns the time that went to datagrams, and
    /// the longest pause between two batches.
    fn flooded(
        budget: &mut Budget,
        busy: bool,
        batch: Duration,
        seconds: u64,
    ) -> (Duration, Duration) {
        let began = start();
        let end = began + Duration::from_secs(seconds);
        let (mut now, mut spent, mut last, mut pause) =
            (began, Duration::ZERO, began, Duration::ZERO);
        while now < end {
            let opens = budget.opens(now, busy);
            if opens <= now {
                pause = pause.max(now - last);
                budget.spend(batch);
                (now, spent) = (now + batch, spent + batch);
                last = now;
            } else {
                // Timers have milliseconds.
                now = opens.max(now + MS);
            }
        }
        (spent, pause)
    }

    #[test]
    fn a_flood_gets_its_share_and_no_more_whatever_it_costs() {
        for micros in [5, 100, 700, 3_000, 30_000] {
            let batch = Duration::from_micros(micros);
            for (busy, share) in [(true, 0.1), (false, 0.5)] {
                let mut budget = Budget::new(start(), 10, 50);
                let (spent, pause) = flooded(&mut budget, busy, batch, 10);
                let got = spent.as_secs_f64() / 10.0;
                assert!(got < share + 0.01, "{batch:?}, busy {busy}: {got}");
                assert!(got > share * 0.7, "{batch:?}, busy {busy}: {got}");
                // Nor is it ever shut out: what counts among it is read soon.
                let longest = (batch * 10).max(10 * MS) + MS;
                assert!(pause <= longest, "{batch:?}, busy {busy}: {pause:?}");
            }
        }
    }

    #[test]
    fn what_comes_now_and_then_never_waits() {
        let mut now = start();
        let mut budget = Budget::new(now, 10, 50);
        for _ in 0..10_000 {
            assert_eq!(budget.opens(now, true), now);
            budget.spend(Duration::from_micros(90));
            now += MS;
        }
        // Then a burst of several milliseconds is still read at once.
        for _ in 0..15 {
            assert_eq!(budget.opens(now, true), now);
            budget.spend(MS);
        }
    }

    #[test]
    fn one_long_piece_of_work_is_forgiven_in_half_a_second() {
        let now = start();
        let mut budget = Budget::new(now, 10, 50);
        budget.spend(Duration::from_secs(3600));
        let opens = budget.opens(now, true);
        assert!(opens > now && opens <= now + 510 * MS, "{:?}", opens - now);
        assert_eq!(budget.opens(opens, true), opens);
        // A clock that stood still, or went on for a year, hurts nothing.
        assert_eq!(budget.opens(opens, true), opens);
        let late = now + Duration::from_secs(31_536_000);
        assert_eq!(budget.opens(late, false), late);
        budget.spend(20 * MS);
        assert!(budget.opens(late, false) > late);
    }
}
