//! Which resolvers do not answer, for people.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::dns::Upstream;
use crate::driver::lock;

/// A resolver that leaves so many questions in a row without an answer,
const QUESTIONS: u32 = 3;
/// for so long, is told of.
const SILENCE: Duration = Duration::from_secs(2);
/// Such resolvers remembered at most.
const SILENT_MAX: usize = 256;

/// What is known of those that do not answer.
#[derive(Default)]
pub(super) struct Silent {
    /// Since when, and how many questions there were.
    known: Mutex<BTreeMap<Upstream, (Instant, u32)>>,
    told: watch::Sender<BTreeSet<Upstream>>,
}

impl Silent {
    /// Those that are told of, for whoever waits for a change.
    pub(super) fn subscribe(&self) -> watch::Receiver<BTreeSet<Upstream>> {
        self.told.subscribe()
    }

    /// A question was put to a resolver: it answered, be it that it cannot, or did not.
    pub(super) fn note(&self, now: Instant, upstream: &Upstream, answered: bool) {
        let mut known = lock(&self.known);
        if answered {
            known.remove(upstream);
            self.told.send_if_modified(|told| told.remove(upstream));
            return;
        }
        if known.len() >= SILENT_MAX && !known.contains_key(upstream) {
            return;
        }
        let (since, questions) = known.entry(upstream.clone()).or_insert((now, 0));
        *questions = questions.saturating_add(1);
        if *questions >= QUESTIONS && now.saturating_duration_since(*since) >= SILENCE {
            let tell = |told: &mut BTreeSet<Upstream>| told.insert(upstream.clone());
            self.told.send_if_modified(tell);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    #[test]
    fn a_resolver_is_silent_after_some_questions_and_some_time_until_it_answers() {
        let [one, other] = [1, 2].map(|last| Upstream::Plain(([192, 0, 2, last], 53).into()));
        let (silent, at) = (Silent::default(), |ms| start() + Duration::from_millis(ms));
        let mut told = silent.subscribe();
        for _ in 0..5 {
            silent.note(at(0), &one, false);
        }
        assert!(told.borrow().is_empty(), "all at once is a hiccup");
        silent.note(at(1), &other, false);
        silent.note(at(9000), &other, false);
        assert!(told.borrow().is_empty(), "two questions are few");
        silent.note(at(2000), &one, false);
        assert_eq!(*told.borrow_and_update(), [one.clone()].into());
        silent.note(at(3000), &one, false);
        assert!(!told.has_changed().unwrap(), "it is told once");
        silent.note(at(4000), &one, true);
        assert!(told.borrow_and_update().is_empty());
        silent.note(at(9000), &one, false);
        assert!(!told.has_changed().unwrap(), "it begins anew");
        for last in 0..2 * SILENT_MAX {
            let last = u16::try_from(last).unwrap();
            silent.note(
                at(0),
                &Upstream::Plain(([192, 0, 2, 9], last).into()),
                false,
            );
        }
        assert_eq!(lock(&silent.known).len(), SILENT_MAX);
    }
}
