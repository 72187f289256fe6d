//! How long to wait after a failure.

use std::time::Duration;

/// Longest wait before the random factor.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// Counts failures in a row: after number n the wait is `min(n*n*10 ms, 30 s)` times a random
/// factor from 0.5 to 1.5 (`protocol/coordination-register.md` §4).
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Notes a failure and gives the wait; `random` is from 0 to 1.
    pub fn fail(&mut self, random: f64) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let n = u64::from(self.failures.min(1000));
        let wait = Duration::from_millis(n * n * 10).min(WAIT_MAX);
        wait.mul_f64(0.5 + random.clamp(0.0, 1.0))
    }

    /// Notes a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_by_the_square_up_to_half_a_minute() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..4).map(|_| backoff.fail(0.5).as_millis()).collect();
        assert_eq!(waits, [10, 40, 90, 160]);
        for _ in 0..2000 {
            backoff.fail(0.0);
        }
        assert_eq!(backoff.fail(0.0), Duration::from_secs(15));
        assert_eq!(backoff.fail(1.0), Duration::from_secs(45));
        backoff.reset();
        assert_eq!(backoff.fail(0.5), Duration::from_millis(10));
    }
}
