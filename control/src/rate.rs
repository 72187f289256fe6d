//! Token buckets: so much per second, and so much at once.

use std::time::{Duration, Instant};

/// How much passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Per second; not 0.
    pub per_second: u64,
    /// At once, after a pause.
    pub burst: u64,
}

/// A bucket that began full.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    rate: Rate,
    /// What may pass now; a debt if negative.
    left: i64,
    filled: Instant,
}

impl Bucket {
    /// A full one.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            left: signed(rate.burst),
            filled: now,
        }
    }

    /// The rate it was made with.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Puts in what the time since the last call is worth.
    pub fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).as_micros();
        let earned = passed.saturating_mul(u128::from(self.rate.per_second)) / 1_000_000;
        if earned > 0 {
            let earned = i64::try_from(earned).unwrap_or(i64::MAX);
            let full = signed(self.rate.burst);
            self.left = self.left.saturating_add(earned).min(full);
            self.filled = now;
        }
    }

    /// Lets `amount` pass, if there is so much.
    pub fn take(&mut self, amount: u64) -> bool {
        self.take_above(amount, 0)
    }

    /// Lets `amount` pass, unless that leaves less than `reserve`.
    pub fn take_above(&mut self, amount: u64, reserve: u64) -> bool {
        let amount = signed(amount);
        let enough = self.left >= amount.saturating_add(signed(reserve));
        if enough {
            self.left -= amount;
        }
        enough
    }

    /// Charges what has passed already; the bucket may be in debt then.
    pub fn charge(&mut self, amount: u64) {
        self.left = self.left.saturating_sub(signed(amount));
    }

    /// When there is no debt any more; none if there is none at the last refill.
    pub fn ready_at(&self) -> Option<Instant> {
        let debt = u64::try_from(self.left.checked_neg()?).ok()?;
        let wait = u128::from(debt) * 1_000_000 / u128::from(self.rate.per_second.max(1));
        let wait = Duration::from_micros(u64::try_from(wait).unwrap_or(u64::MAX));
        (debt > 0).then(|| self.filled + wait.min(WAIT_MAX) + Duration::from_micros(1))
    }
}

/// No debt is waited for longer at once.
const WAIT_MAX: Duration = Duration::from_secs(3600);

fn signed(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "an origin for virtual time")]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_the_burst_and_the_rate_whatever_the_steps() {
        for step in [1, 7, 100, 1000] {
            let start = Instant::now();
            let rate = Rate {
                per_second: 10_000,
                burst: 5000,
            };
            let mut bucket = Bucket::new(rate, start);
            let mut passed = 0;
            for at in (0..60_000).step_by(step) {
                let now = start + Duration::from_millis(at);
                bucket.refill(now);
                if bucket.ready_at().is_none_or(|ready| ready <= now) {
                    bucket.charge(1500);
                    passed += 1500_i64;
                }
            }
            let most = 5000 + 60 * 10_000;
            assert!(passed <= most + 1500, "{step}: {passed}");
            if step <= 100 {
                assert!(passed >= most - 3000, "{step}: {passed}");
            }
        }
    }

    #[test]
    fn a_debt_says_when_it_is_paid() {
        let start = Instant::now();
        let rate = Rate {
            per_second: 1000,
            burst: 100,
        };
        let mut bucket = Bucket::new(rate, start);
        assert_eq!(bucket.ready_at(), None);
        assert!(bucket.take(100) && !bucket.take(1));
        bucket.charge(2000);
        let ready = bucket.ready_at().unwrap();
        assert_eq!((ready - start).as_millis(), 2000);
        bucket.refill(ready);
        assert_eq!(bucket.ready_at(), None);
        // No rate is so slow that the arithmetic fails.
        let never = Rate {
            per_second: 0,
            burst: 0,
        };
        let mut bucket = Bucket::new(never, start);
        bucket.charge(u64::MAX);
        bucket.refill(start + Duration::from_secs(1 << 40));
        assert!(bucket.ready_at().is_some());
    }
}
