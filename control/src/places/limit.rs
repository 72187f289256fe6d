//! How often one source may fail to show a good auth key, and how often one thing may be logged.
//!
//! Failures count for the network of one host and for the wider one around it
//! ([`networks`]), so that addresses nobody has to pay for buy no attempts. The memory
//! is bounded, and nobody can be pushed out of it who has to wait: what is forgotten for a newcomer
//! is who failed least. Whoever comes from more networks than it holds is not seen again by it, so
//! newcomers to a full memory share one last count.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::networks;

/// Failures per window: of one host's network, and of one customer's.
const FAILURES_MAX: [u32; 2] = [10, 40];

/// Failures per window of all who came to a full memory, and of all who come from this machine: a proxy
/// here brings everybody's.
const OTHERS_MAX: u32 = 6000;

/// Length of the window.
const WINDOW: Duration = Duration::from_secs(60);

/// Networks remembered.
const NETWORKS_MAX: usize = 1024;

/// Failures since the first of them.
#[derive(Clone, Copy, Debug)]
struct Failures {
    /// When they are forgotten.
    end: Instant,
    count: u32,
    max: u32,
}

impl Failures {
    fn none(now: Instant, max: u32) -> Self {
        Self {
            end: now + WINDOW,
            count: 0,
            max,
        }
    }

    fn add(&mut self, now: Instant) {
        if self.end <= now {
            *self = Self::none(now, self.max);
        }
        self.count = self.count.saturating_add(1);
    }

    fn wait(&self, now: Instant) -> Option<Duration> {
        (self.count >= self.max && now < self.end).then(|| self.end - now)
    }
}

/// Counts failures per source.
#[derive(Debug, Default)]
pub struct FailureLimit {
    networks: BTreeMap<IpNet, Failures>,
    others: Option<Failures>,
}

impl FailureLimit {
    /// How long the source has to wait before its next attempt counts; none when it may try.
    pub fn check(&self, now: Instant, source: IpAddr) -> Option<Duration> {
        let networks = networks(source);
        let own = networks.iter().filter_map(|net| self.networks.get(net));
        let is_new = own.clone().next().is_none();
        let others = self.others.as_ref().filter(|_| is_new);
        own.chain(others).filter_map(|own| own.wait(now)).max()
    }

    /// Notes a failure.
    pub fn handle_failure(&mut self, now: Instant, source: IpAddr) {
        let max = if source.to_canonical().is_loopback() {
            [OTHERS_MAX; 2]
        } else {
            FAILURES_MAX
        };
        for (network, max) in networks(source).into_iter().zip(max) {
            if let Some(failures) = self.networks.get_mut(&network) {
                failures.add(now);
                continue;
            }
            if self.networks.len() >= NETWORKS_MAX && !self.forget(now) {
                self.others
                    .get_or_insert_with(|| Failures::none(now, OTHERS_MAX))
                    .add(now);
            }
            if self.networks.len() < NETWORKS_MAX {
                let mut failures = Failures::none(now, max);
                failures.add(now);
                self.networks.insert(network, failures);
            }
        }
    }

    /// Forgets who failed least, the longest ago, and need not wait. Whether its time was over.
    fn forget(&mut self, now: Instant) -> bool {
        let weighed = self.networks.iter().map(|(network, failures)| {
            let is_over = failures.end <= now;
            let count = if is_over { 0 } else { failures.count };
            (failures.wait(now), count, failures.end, *network, is_over)
        });
        let Some((None, _, _, network, is_over)) = weighed.min() else {
            return false;
        };
        self.networks.remove(&network);
        is_over
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
        let t0 = crate::testing::start();
        let mut limit = LogLimit::default();
        let written = (0..100).filter(|_| limit.admit(t0).is_some()).count();
        assert_eq!(written, 20);
        assert_eq!(limit.admit(t0 + WINDOW), Some(80));
        assert_eq!(limit.admit(t0 + WINDOW), Some(0));
    }

    fn fail(limit: &mut FailureLimit, now: Instant, source: &str, times: u32) {
        for _ in 0..times {
            limit.handle_failure(now, source.parse().unwrap());
        }
    }

    fn wait(limit: &FailureLimit, now: Instant, source: &str) -> Option<Duration> {
        limit.check(now, source.parse().unwrap())
    }

    #[test]
    fn one_who_fails_behind_a_proxy_of_this_machine_keeps_nobody_else_there_out() {
        let t0 = crate::testing::start();
        for proxy in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            let mut limit = FailureLimit::default();
            fail(&mut limit, t0, proxy, 1000);
            assert_eq!(wait(&limit, t0, proxy), None, "{proxy}");
            fail(&mut limit, t0, proxy, 5000);
            assert_eq!(wait(&limit, t0, proxy), Some(WINDOW), "{proxy}");
            assert_eq!(wait(&limit, t0, "10.0.0.1"), None);
        }
    }

    #[test]
    fn ten_failures_close_the_door_for_a_minute() {
        let t0 = crate::testing::start();
        let mut limit = FailureLimit::default();
        fail(&mut limit, t0, "10.0.0.1", 9);
        assert_eq!(wait(&limit, t0, "10.0.0.1"), None);
        fail(&mut limit, t0, "::ffff:10.0.0.1", 1);
        assert_eq!(wait(&limit, t0, "10.0.0.1"), Some(WINDOW));
        assert_eq!(wait(&limit, t0, "10.0.0.2"), None);
        assert_eq!(wait(&limit, t0 + WINDOW, "10.0.0.1"), None);
        fail(&mut limit, t0 + WINDOW, "10.0.0.1", 1);
        assert_eq!(wait(&limit, t0 + WINDOW, "10.0.0.1"), None, "counted anew");
    }

    #[test]
    fn addresses_of_one_host_and_hosts_of_one_customer_fail_together() {
        let t0 = crate::testing::start();
        let mut limit = FailureLimit::default();
        for n in 0..10 {
            fail(&mut limit, t0, &format!("2001:db8:0:1::{n}"), 1);
        }
        assert_eq!(wait(&limit, t0, "2001:db8:0:1::ffff"), Some(WINDOW));
        assert_eq!(wait(&limit, t0, "2001:db8:0:2::1"), None);
        for n in 0..30 {
            fail(&mut limit, t0, &format!("2001:db8:0:{n}::1"), 1);
        }
        assert_eq!(wait(&limit, t0, "2001:db8:0:ffff::1"), Some(WINDOW));
        assert_eq!(wait(&limit, t0, "2001:db8:1::1"), None);
    }

    #[test]
    fn nobody_who_has_to_wait_is_forgotten_and_memory_is_bounded() {
        let t0 = crate::testing::start();
        let mut limit = FailureLimit::default();
        fail(&mut limit, t0, "192.0.2.1", 10);
        fail(&mut limit, t0, "192.0.3.1", 9);
        for n in 0..3000_u32 {
            let source = IpAddr::from((0x0a00_0000 + n * 256).to_be_bytes());
            limit.handle_failure(t0 + WINDOW / 2, source);
        }
        assert!(limit.networks.len() <= NETWORKS_MAX);
        let late = t0 + WINDOW - Duration::from_secs(1);
        assert!(wait(&limit, late, "192.0.2.1").is_some());
        fail(&mut limit, late, "192.0.3.1", 1);
        assert!(
            wait(&limit, late, "192.0.3.1").is_some(),
            "nor who failed most"
        );
        // Even one who could fill the whole memory with those who wait tries only so often.
        let mut tries = 0;
        for n in 0..60_000_u32 {
            let source = IpAddr::from((0x0b00_0000 + n % 1500 * 256).to_be_bytes());
            if limit.check(late, source).is_none() {
                limit.handle_failure(late, source);
                tries += 1;
            }
        }
        assert!(limit.networks.len() <= NETWORKS_MAX);
        assert!(tries < 15_000, "{tries}");
        assert!(wait(&limit, late, "203.0.113.1").is_some());
        let after = late + WINDOW;
        assert_eq!(wait(&limit, after, "203.0.113.1"), None);
        fail(&mut limit, after, "203.0.113.1", 1);
        let own = networks("203.0.113.1".parse().unwrap());
        let noted = own.iter().all(|net| limit.networks.contains_key(net));
        assert!(noted, "what is over makes room");
    }
}
