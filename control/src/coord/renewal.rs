//! When a node's key is renewed, and when a person is told that it expires.
//!
//! A key has a life: from when it was let in to when it expires. With an auth key at hand the node goes over
//! to a new key when a tenth of that is left, and a day before the end at the earliest; a part of the time is
//! random, so that nodes which joined together are not renewed together. Without one, a person is told a
//! day before.

use std::time::Duration;

use time::OffsetDateTime;

/// So long before the end a person is told, and a key is renewed at the earliest.
pub const DAY: Duration = Duration::from_secs(86_400);
/// And so long at the latest: a registration takes its time.
const LEAST: Duration = Duration::from_secs(2);
/// Between two attempts at most.
const RETRY_MAX: Duration = Duration::from_secs(3600);
/// It is looked again so often, because clocks are set.
const LOOK_PERIOD: Duration = Duration::from_secs(3600);

/// A key's life, by our wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyLife {
    /// When it was let in.
    pub since: OffsetDateTime,
    /// When it expires.
    pub until: OffsetDateTime,
}

/// What is to be done about a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing before so much time.
    Later(Duration),
    /// It expires within a day, and nothing renews it: a person is to be told. Look again after so much time.
    Told(Duration),
    /// It is to be renewed.
    Renew,
}

impl KeyLife {
    /// How long before its end the key is renewed; `random` is from 0 to 1.
    fn lead(&self, random: f64) -> Duration {
        let life = Duration::try_from(self.until - self.since).unwrap_or_default();
        let most = (life / 10).min(DAY);
        most.mul_f64(1.0 - random.clamp(0.0, 1.0) / 4.0).max(LEAST)
    }

    /// What is to be done; `renewable` where nobody is needed for it. An expired key is past all of it: an
    /// administrator may have meant it.
    pub fn due(&self, wall: OffsetDateTime, renewable: bool, random: f64) -> Due {
        let left = Duration::try_from(self.until - wall).unwrap_or_default();
        let lead = if renewable { self.lead(random) } else { DAY };
        if left.is_zero() {
            return Due::Later(LOOK_PERIOD);
        }
        match left.checked_sub(lead) {
            Some(wait) if !wait.is_zero() => Due::Later(wait.min(LOOK_PERIOD)),
            Some(_) | None if renewable => Due::Renew,
            Some(_) | None => Due::Told(LOOK_PERIOD),
        }
    }

    /// The wait for another attempt after one that failed.
    pub fn retry(&self, wall: OffsetDateTime) -> Duration {
        let left = Duration::try_from(self.until - wall).unwrap_or_default();
        (left / 4).clamp(LEAST, RETRY_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(seconds: u64) -> (OffsetDateTime, KeyLife) {
        let since = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let until = since + Duration::from_secs(seconds);
        (since, KeyLife { since, until })
    }

    #[test]
    fn a_key_is_renewed_in_the_last_tenth_of_its_life_and_a_day_before_its_end_at_the_earliest() {
        let days = 86_400;
        for (seconds, first, last) in [
            (180 * days, 179 * days, 179 * days + 21_600),
            (10 * days, 9 * days, 9 * days + 21_600),
            (100, 90, 93),
            (1, 0, 0),
        ] {
            let (since, life) = life(seconds);
            let renewed = |random: f64| {
                let mut after = Duration::ZERO;
                while let Due::Later(wait) = life.due(since + after, true, random) {
                    assert!(!wait.is_zero());
                    after += wait;
                }
                after.as_secs()
            };
            assert_eq!(renewed(0.0), first, "{seconds}");
            let late = renewed(1.0);
            assert!(late.abs_diff(last) <= 1, "{seconds}: {late}");
        }
    }

    #[test]
    fn without_an_auth_key_a_person_is_told_a_day_before_and_nothing_is_renewed() {
        let (since, life) = life(180 * 86_400);
        let at = |before: u64| life.due(life.until - Duration::from_secs(before), false, 0.5);
        assert_eq!(life.due(since, false, 0.5), Due::Later(LOOK_PERIOD));
        assert_eq!(at(86_401), Due::Later(Duration::from_secs(1)));
        assert_eq!(at(86_400), Due::Told(LOOK_PERIOD));
        assert_eq!(at(1), Due::Told(LOOK_PERIOD));
        assert_eq!(at(0), Due::Later(LOOK_PERIOD), "expired: told elsewhere");
    }

    #[test]
    fn attempts_are_nearer_to_each_other_towards_the_end() {
        let (_, life) = life(180 * 86_400);
        let left = |seconds: u64| {
            life.retry(life.until - Duration::from_secs(seconds))
                .as_secs()
        };
        assert_eq!(left(86_400), 3600);
        assert_eq!(left(400), 100);
        assert_eq!(left(1), 2);
        let past = life.until + Duration::from_secs(5);
        assert_eq!(life.retry(past), LEAST);
    }
}
