//! How often one source may fail to show a good auth key.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Failures per source and window.
const FAILURES_MAX: u32 = 10;

/// Length of the window.
const WINDOW: Duration = Duration::from_secs(60);

/// Sources remembered; when there are more, those whose window ended first are forgotten.
const SOURCES_MAX: usize = 4096;

/// Counts failures per source address.
#[derive(Debug, Default)]
pub struct FailureLimit {
    sources: BTreeMap<IpAddr, (Instant, u32)>,
}

impl FailureLimit {
    /// How long the source has to wait before its next attempt counts; none when it may try.
    pub fn check(&self, now: Instant, source: IpAddr) -> Option<Duration> {
        let (end, failures) = self.sources.get(&source)?;
        (*failures >= FAILURES_MAX && now < *end).then(|| *end - now)
    }

    /// Notes a failure.
    pub fn handle_failure(&mut self, now: Instant, source: IpAddr) {
        if self.sources.len() >= SOURCES_MAX && !self.sources.contains_key(&source) {
            self.sources.retain(|_, (end, _)| *end > now);
            if self.sources.len() >= SOURCES_MAX {
                let oldest = self.sources.iter().min_by_key(|(_, (end, _))| *end);
                let oldest = oldest.map(|(source, _)| *source);
                oldest.and_then(|source| self.sources.remove(&source));
            }
        }
        let entry = self.sources.entry(source).or_insert((now + WINDOW, 0));
        if entry.0 <= now {
            *entry = (now + WINDOW, 0);
        }
        entry.1 = entry.1.saturating_add(1);
    }
}

/// How many lines of one kind a log gets per window: whoever is refused may ask for ever.
const LINES_MAX: u32 = 20;

/// Bounds what strangers can have written to the log.
#[derive(Debug, Default)]
pub struct LogLimit {
    end: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl LogLimit {
    /// Whether a line may be written now; how many were left out since the last that was.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.end.is_none_or(|end| end <= now) {
            self.end = Some(now + WINDOW);
            self.lines = 0;
        }
        if self.lines >= LINES_MAX {
            self.left_out += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_gets_so_many_lines_a_minute_and_the_number_of_those_left_out() {
        let t0 = crate::coord::tests::start();
        let mut limit = LogLimit::default();
        let written = (0..100).filter(|_| limit.admit(t0).is_some()).count();
        assert_eq!(written, 20);
        assert_eq!(limit.admit(t0 + WINDOW), Some(80));
        assert_eq!(limit.admit(t0 + WINDOW), Some(0));
    }

    #[test]
    fn ten_failures_close_the_door_for_a_minute_and_memory_is_bounded() {
        let t0 = crate::coord::tests::start();
        let source: IpAddr = "10.0.0.1".parse().unwrap();
        let mut limit = FailureLimit::default();
        for _ in 0..10 {
            assert_eq!(limit.check(t0, source), None);
            limit.handle_failure(t0, source);
        }
        assert_eq!(limit.check(t0, source), Some(WINDOW));
        assert_eq!(limit.check(t0 + WINDOW, source), None);
        for n in 0..10_000_u32 {
            limit.handle_failure(t0, IpAddr::from(n.to_be_bytes()));
        }
        assert!(limit.sources.len() <= SOURCES_MAX);
    }
}
