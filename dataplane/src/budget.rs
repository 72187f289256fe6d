#![forbid(unsafe_code)]
//! How much of a thread's time goes to what anybody can have it do.
//!
//! A thread that works for us also reads what strangers send to a port that is open to all. That gets a
//! share of a processor's time, whatever it is spent on, and some in advance, so that a burst of what
//! counts is answered at once. What does not come within the share waits in the kernel's buffer, which
//! is bounded, and is dropped there.

use std::time::{Duration, Instant};

/// What is there when an overdrawn budget opens again, in nanoseconds.
const GRAIN: i64 = 500_000;

/// A share of one thread's processor time. Shares are in parts per thousand, not 0.
#[derive(Clone, Copy, Debug)]
pub struct TimeBudget {
    /// What may be spent, in nanoseconds; below zero after the last piece of work was a large one.
    left: i64,
    /// Saved up at most.
    saved_max: i64,
    /// Overdrawn at most.
    overdrawn_max: i64,
    filled_at: Instant,
}

impl TimeBudget {
    /// A full one. So much is saved up at most, and so much overdrawn: one piece of work that took long
    /// is not paid for ever.
    pub fn new(now: Instant, saved_max: Duration, overdrawn_max: Duration) -> Self {
        Self {
            left: nanos(saved_max),
            saved_max: nanos(saved_max),
            overdrawn_max: nanos(overdrawn_max),
            filled_at: now,
        }
    }

    /// Puts in what the time since the last call is worth at this share.
    pub fn refill(&mut self, now: Instant, share: u16) {
        let passed = nanos(now.saturating_duration_since(self.filled_at));
        self.filled_at = self.filled_at.max(now);
        self.left = (self.left + passed * i64::from(share) / 1000).min(self.saved_max);
    }

    /// So much of the processor's time was spent.
    pub fn spend(&mut self, took: Duration) {
        self.left = (self.left - nanos(took)).max(-self.overdrawn_max);
    }

    /// Whether nothing is left.
    pub fn is_spent(&self) -> bool {
        self.left <= 0
    }

    /// Refills, and says when more may be spent: `now` if there is something left.
    pub fn opens(&mut self, now: Instant, share: u16) -> Instant {
        self.refill(now, share);
        if !self.is_spent() {
            return now;
        }
        let missing = (GRAIN - self.left) * 1000 / i64::from(share.max(1));
        now + Duration::from_nanos(missing.unsigned_abs())
    }
}

/// Bounded so that sums and products stay in range: two minutes are more than any budget saves.
fn nanos(time: Duration) -> i64 {
    const MAX: i64 = 120_000_000_000;
    i64::try_from(time.as_nanos()).unwrap_or(MAX).min(MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;

    const MS: Duration = Duration::from_millis(1);

    fn new(now: Instant) -> TimeBudget {
        TimeBudget::new(now, 20 * MS, 50 * MS)
    }

    /// A thread that is never without datagrams to read for `seconds`, each batch taking `batch`, and
    /// does other work in between as long as it may not. Returns the time that went to datagrams, and
    /// the longest pause between two batches.
    fn flooded(
        budget: &mut TimeBudget,
        share: u16,
        batch: Duration,
        seconds: u64,
    ) -> (Duration, Duration) {
        let began = sys::now();
        let end = began + Duration::from_secs(seconds);
        let (mut now, mut spent, mut last, mut pause) =
            (began, Duration::ZERO, began, Duration::ZERO);
        while now < end {
            let opens = budget.opens(now, share);
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
            for (per_mille, share) in [(100, 0.1), (500, 0.5)] {
                let mut budget = new(sys::now());
                let (spent, pause) = flooded(&mut budget, per_mille, batch, 10);
                let got = spent.as_secs_f64() / 10.0;
                assert!(got < share + 0.01, "{batch:?}, {per_mille}: {got}");
                assert!(got > share * 0.7, "{batch:?}, {per_mille}: {got}");
                // Nor is it ever shut out: what counts among it is read soon.
                let longest = (batch * 10).max(10 * MS) + MS;
                assert!(pause <= longest, "{batch:?}, {per_mille}: {pause:?}");
            }
        }
    }

    #[test]
    fn what_comes_now_and_then_never_waits() {
        let mut now = sys::now();
        let mut budget = new(now);
        for _ in 0..10_000 {
            assert_eq!(budget.opens(now, 100), now);
            budget.spend(Duration::from_micros(90));
            now += MS;
        }
        // Then a burst of several milliseconds is still read at once.
        for _ in 0..15 {
            assert_eq!(budget.opens(now, 100), now);
            budget.spend(MS);
        }
    }

    #[test]
    fn one_long_piece_of_work_is_forgiven_in_half_a_second() {
        let now = sys::now();
        let mut budget = new(now);
        budget.spend(Duration::from_secs(3600));
        let opens = budget.opens(now, 100);
        assert!(opens > now && opens <= now + 510 * MS, "{:?}", opens - now);
        assert_eq!(budget.opens(opens, 100), opens);
        // A clock that stood still, or went on for a year, hurts nothing.
        assert_eq!(budget.opens(opens, 100), opens);
        let late = now + Duration::from_secs(31_536_000);
        assert_eq!(budget.opens(late, 500), late);
        budget.spend(20 * MS);
        assert!(budget.opens(late, 500) > late);
    }
}
