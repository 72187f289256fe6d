//! When the names of relays are looked up, and what they gave last.
//!
//! All at once when the map brings them, again every [`REFRESH`] (a relay may move), at once when the
//! host's network changed, and after a failure soon, a little later each time: nobody tells us that
//! DNS works again. A name that some node needs waits at most [`RETRY_MAX`] for its next chance. The
//! last good answer stays in use while new look-ups fail.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// A name is looked up again so long after an answer.
pub(super) const REFRESH: Duration = Duration::from_secs(30);
/// Pause after the first failure; it doubles with each.
const RETRY_MIN: Duration = Duration::from_millis(500);
/// The longest pause of a name without which a node is out of reach.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(3);
/// Changes of the network ask for a name no more often than this: some change all the time.
const HURRY_MIN: Duration = Duration::from_secs(2);

/// The names of a map.
#[derive(Debug, Default)]
pub(super) struct Names(BTreeMap<String, Entry>);

#[derive(Debug)]
struct Entry {
    /// The last good answer. An address keeps its place as long as it is in the answers: resolvers
    /// turn them round for the sake of balance.
    addrs: Vec<IpAddr>,
    failures: u32,
    asked_at: Option<Instant>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// To be looked up then.
    Due(Instant),
    /// Being looked up; `again` asks for another look-up right after.
    Asked { again: bool },
}

impl Names {
    /// Takes the names of a new map. What is known of those that stay is kept.
    pub(super) fn set(&mut self, now: Instant, names: impl Iterator<Item = String>) {
        let mut old = std::mem::take(&mut self.0);
        let fresh = || Entry {
            addrs: Vec::new(),
            failures: 0,
            asked_at: None,
            state: State::Due(now),
        };
        self.0 = names
            .map(|name| {
                let entry = old.remove(&name).unwrap_or_else(fresh);
                (name, entry)
            })
            .collect();
    }

    /// The last good answer, empty without one.
    pub(super) fn addrs(&self, name: &str) -> &[IpAddr] {
        self.0.get(name).map_or(&[], |entry| &entry.addrs)
    }

    /// The next name to be looked up now; it is to be answered, good or bad.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<String> {
        let (name, entry) = self.0.iter_mut().find(|(_, entry)| match entry.state {
            State::Due(at) => at <= now,
            State::Asked { .. } => false,
        })?;
        entry.state = State::Asked { again: false };
        entry.asked_at = Some(now);
        Some(name.clone())
    }

    /// The network changed: what was true elsewhere need not be true here.
    pub(super) fn hurry(&mut self, now: Instant) {
        for entry in self.0.values_mut() {
            entry.state = match entry.state {
                State::Due(at) => State::Due(at.min(entry.soonest(now))),
                State::Asked { .. } => State::Asked { again: true },
            };
        }
    }

    /// Takes the answer to a look-up, empty if it failed; `needed` says that a node is out of reach
    /// without. True if the addresses changed.
    pub(super) fn answer(
        &mut self,
        now: Instant,
        name: &str,
        found: Vec<IpAddr>,
        needed: bool,
    ) -> bool {
        let Some(entry) = self.0.get_mut(name) else {
            return false;
        };
        let hurry = (entry.state == State::Asked { again: true }).then(|| entry.soonest(now));
        if found.is_empty() {
            let pause = RETRY_MIN.saturating_mul(1 << entry.failures.min(16));
            let most = if needed { RETRY_MAX } else { REFRESH };
            entry.failures = entry.failures.saturating_add(1);
            entry.state = State::Due(hurry.unwrap_or_else(|| now + pause.min(most)));
            return false;
        }
        entry.failures = 0;
        entry.state = State::Due(hurry.unwrap_or_else(|| now + REFRESH));
        let old = std::mem::take(&mut entry.addrs);
        let stays = |addr: &IpAddr| found.contains(addr);
        entry.addrs = old.iter().copied().filter(stays).collect();
        for addr in found {
            if !entry.addrs.contains(&addr) {
                entry.addrs.push(addr);
            }
        }
        entry.addrs != old
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let due = self.0.values().filter_map(|entry| match entry.state {
            State::Due(at) => Some(at),
            State::Asked { .. } => None,
        });
        due.min()
    }
}

impl Entry {
    /// When a changed network may ask.
    fn soonest(&self, now: Instant) -> Instant {
        self.asked_at.map_or(now, |at| now.max(at + HURRY_MIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    const NAME: &str = "relay.example";

    fn names(now: Instant) -> Names {
        let mut names = Names::default();
        names.set(now, [NAME.to_owned()].into_iter());
        names
    }

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn failures_are_tried_again_a_little_later_each_time() {
        let mut now = start();
        let mut names = names(now);
        let mut pauses = Vec::new();
        for needed in [true, true, true, true, true, false, false, false, false] {
            assert_eq!(names.take_due(now).as_deref(), Some(NAME));
            assert_eq!(names.next_timeout(), None, "one look-up at a time");
            assert!(!names.answer(now, NAME, Vec::new(), needed));
            let next = names.next_timeout().unwrap();
            pauses.push((next - now).as_millis());
            now = next;
        }
        assert_eq!(
            pauses,
            [500, 1000, 2000, 3000, 3000, 16000, 30000, 30000, 30000]
        );
    }

    #[test]
    fn an_address_keeps_its_place_while_it_is_in_the_answers() {
        let now = start();
        let mut names = names(now);
        assert!(names.answer(now, NAME, vec![ip(1), ip(2)], true));
        assert!(
            !names.answer(now, NAME, vec![ip(2), ip(1)], true),
            "turned round"
        );
        assert_eq!(names.addrs(NAME), [ip(1), ip(2)]);
        assert!(!names.answer(now, NAME, vec![], true));
        assert_eq!(names.addrs(NAME), [ip(1), ip(2)], "the last good ones");
        assert!(names.answer(now, NAME, vec![ip(3), ip(2)], true));
        assert_eq!(names.addrs(NAME), [ip(2), ip(3)]);
        assert_eq!(names.next_timeout(), Some(now + REFRESH));
    }

    #[test]
    fn a_changed_network_asks_at_once_also_after_a_look_up_under_way() {
        let now = start();
        let mut names = names(now);
        let later = now + HURRY_MIN;
        assert_eq!(names.take_due(now).as_deref(), Some(NAME));
        names.answer(now, NAME, vec![ip(1)], true);
        names.hurry(now);
        assert_eq!(names.next_timeout(), Some(later), "but not all the time");
        assert_eq!(names.take_due(later).as_deref(), Some(NAME));
        names.hurry(later);
        assert_eq!(names.take_due(later), None);
        let answered = later + 3 * HURRY_MIN;
        names.answer(answered, NAME, vec![ip(1)], true);
        assert_eq!(names.take_due(answered).as_deref(), Some(NAME));
    }

    #[test]
    fn a_new_map_keeps_what_is_known() {
        let now = start();
        let mut names = names(now);
        names.answer(now, NAME, vec![ip(1)], true);
        names.set(now, [NAME.to_owned(), "other".to_owned()].into_iter());
        assert_eq!(names.addrs(NAME), [ip(1)]);
        assert_eq!(names.take_due(now).as_deref(), Some("other"));
        assert_eq!(names.take_due(now), None);
        assert!(!names.answer(now, "gone", vec![ip(1)], true));
    }
}
