//! Whether another machine uses this node's keys: a state directory that was copied, with a disk or an
//! image.
//!
//! Both machines are connected then, and peers and relays talk to whichever they heard last. Nobody
//! says so in as many words. But coordination tells us the endpoints that it has of us: if they are
//! none that we gave it, somebody else did. And a relay may tell that two connections with our key
//! take turns.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Coordination may still show the endpoints of the run before for so long after our first ones.
const SETTLE: Duration = Duration::from_secs(10);
/// So long a sign counts; not every use of the keys gives one.
const MEMORY: Duration = Duration::from_secs(24 * 60 * 60);
/// So long after the last sign the next one is told anew.
const TELL_INTERVAL: Duration = Duration::from_secs(10 * 60);
/// What coordination has wrong is corrected so long after it was seen: the other machine may have just
/// started, and what it hears before it has settled is no sign to it.
const CORRECT_AFTER: Duration = SETTLE.saturating_add(Duration::from_secs(2));
/// Coordination is told this often at most what it has wrong.
const CORRECT_INTERVAL: Duration = Duration::from_secs(60);
/// Endpoints of ours that are remembered.
const OURS_MAX: usize = 1024;

/// What is known of the other machine.
#[derive(Debug, Default)]
pub(super) struct Twin {
    /// Endpoints that we had, and when last.
    ours: BTreeMap<SocketAddr, Instant>,
    /// When we had the first.
    since: Option<Instant>,
    /// What coordination has of us, since we have settled.
    told: Vec<SocketAddr>,
    /// Since when they are another machine's: that is to be corrected, which shows it that we are here.
    wrong: Option<Instant>,
    corrected: Option<Instant>,
    /// The last sign of it, and where it was seen.
    seen: Option<(Instant, String)>,
}

impl Twin {
    /// These are our endpoints now.
    pub(super) fn ours(&mut self, now: Instant, endpoints: impl Iterator<Item = SocketAddr>) {
        for addr in endpoints {
            self.since.get_or_insert(now);
            self.ours.insert(addr, now);
        }
        while self.ours.len() > OURS_MAX {
            let oldest = self.ours.iter().min_by_key(|(_, at)| **at);
            let Some(oldest) = oldest.map(|(addr, _)| *addr) else {
                return;
            };
            self.ours.remove(&oldest);
        }
    }

    /// Coordination has these endpoints of us. True if that is news of another machine.
    pub(super) fn told(&mut self, now: Instant, endpoints: &[SocketAddr]) -> bool {
        let settled = self.since.is_some_and(|at| now >= at + SETTLE);
        if !settled || self.told == endpoints {
            return false;
        }
        self.told = endpoints.to_vec();
        let foreign = endpoints.iter().find(|addr| !self.ours.contains_key(addr));
        let since = self.wrong.unwrap_or(now);
        self.wrong = foreign.map(|_| since);
        foreign.is_some_and(|addr| self.sign(now, addr.to_string()))
    }

    /// When coordination is to be told our endpoints again, if it is.
    pub(super) fn correct_at(&self) -> Option<Instant> {
        let first = self.wrong? + CORRECT_AFTER;
        let next = self.corrected.map(|last| last + CORRECT_INTERVAL);
        Some(next.map_or(first, |next| first.max(next)))
    }

    /// Whether that is now.
    pub(super) fn take_correction(&mut self, now: Instant) -> bool {
        let due = self.correct_at().is_some_and(|at| at <= now);
        if due {
            (self.wrong, self.corrected) = (None, Some(now));
        }
        due
    }

    /// A relay has two connections that use our key in turns. True if that is news.
    pub(super) fn doubled(&mut self, now: Instant, relay: &str) -> bool {
        self.sign(now, format!("relay {relay}"))
    }

    fn sign(&mut self, now: Instant, place: String) -> bool {
        let before = self.seen.replace((now, place));
        before.is_none_or(|(at, _)| now >= at + TELL_INTERVAL)
    }

    /// What is wrong, for people.
    pub(super) fn health(&self, now: Instant) -> Option<String> {
        let (at, place) = self.seen.as_ref()?;
        let age = now.saturating_duration_since(*at);
        (age < MEMORY).then(|| {
            format!(
                "another machine uses this node's keys (seen {} s ago, {place}): its state \
                 directory is a copy of ours; give one of both an empty one",
                age.as_secs()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    fn addr(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 41641))
    }

    #[test]
    fn endpoints_that_we_never_had_are_another_machines() {
        let now = start();
        let mut twin = Twin::default();
        // What is left of the run before.
        assert!(!twin.told(now, &[addr(7)]));
        twin.ours(now, [addr(1), addr(2)].into_iter());
        twin.ours(now, [addr(2)].into_iter());
        assert!(!twin.told(now, &[addr(7), addr(1)]));
        let later = now + SETTLE;
        assert!(!twin.told(later, &[addr(1)]), "given up, but ours");
        assert_eq!(twin.health(later), None);
        assert!(twin.told(later, &[addr(2), addr(9)]));
        assert!(!twin.told(later, &[addr(2), addr(9)]), "nothing new");
        let health = twin.health(later + Duration::from_secs(5)).unwrap();
        assert!(health.contains("seen 5 s ago, 192.0.2.9:41641"), "{health}");
        assert!(!twin.told(later, &[addr(9)]), "told a moment ago");
        assert!(twin.told(later + TELL_INTERVAL, &[addr(8)]));
        assert_eq!(twin.health(later + TELL_INTERVAL + MEMORY), None);
    }

    #[test]
    fn coordination_is_corrected_once_a_minute_at_most() {
        let now = start();
        let mut twin = Twin::default();
        twin.ours(now, [addr(1)].into_iter());
        let at = now + SETTLE;
        twin.told(at, &[addr(9)]);
        let at = at + CORRECT_AFTER;
        assert_eq!(twin.correct_at(), Some(at));
        assert!(twin.take_correction(at) && !twin.take_correction(at));
        twin.told(at, &[addr(1)]);
        assert_eq!(twin.correct_at(), None);
        twin.told(at, &[addr(9)]);
        assert!(!twin.take_correction(at + CORRECT_AFTER));
        let later = at + CORRECT_INTERVAL;
        assert_eq!(twin.correct_at(), Some(later));
        assert!(twin.take_correction(later));
        assert_eq!(twin.correct_at(), None);
    }

    #[test]
    fn a_copy_that_starts_hears_of_us_once_it_has_settled() {
        let began = start();
        let (mut runs, mut copy) = (Twin::default(), Twin::default());
        runs.ours(began, [addr(1)].into_iter());
        // The copy is told of us at once, and we of it, a moment after its start.
        let now = began + Duration::from_secs(60);
        copy.ours(now, [addr(2)].into_iter());
        assert!(!copy.told(now, &[addr(1)]));
        assert!(runs.told(now, &[addr(2)]));
        // What we say then is as before; to the copy it is news.
        let now = runs.correct_at().unwrap();
        assert!(runs.take_correction(now));
        assert!(copy.told(now, &[addr(1)]));
        assert!(copy.health(now).is_some());
    }

    #[test]
    fn a_relay_may_tell_too() {
        let now = start();
        let mut twin = Twin::default();
        assert!(twin.doubled(now, "fra") && !twin.doubled(now, "fra"));
        assert!(twin.health(now).unwrap().contains("relay fra"));
    }

    #[test]
    fn what_is_remembered_of_ours_has_a_bound() {
        let now = start();
        let mut twin = Twin::default();
        for n in 0..=u32::try_from(OURS_MAX).unwrap() {
            let at = now + Duration::from_millis(n.into());
            twin.ours(at, [SocketAddr::from((n.to_be_bytes(), 1))].into_iter());
        }
        assert_eq!(twin.ours.len(), OURS_MAX);
    }
}
