//! Peers to shake hands with without anything to send: those whom the run before, or the time before
//! a sleep, had sessions with. They may go on with keys that are lost here, and a standard peer notices
//! only after fifteen seconds that nobody answers. The other way round, a peer whose DISCO key has changed
//! is a tailscaled that was started anew: it has lost the keys that we go on with.
//!
//! They are asked a few at a time, the one heard last first, so that a node with thousands of peers
//! neither floods its relay nor meets all their answers at once.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use ringtail_dataplane::{Activity, PeerId};

use crate::key::NodePublic;

/// A session is in use for so long after something was heard of the peer: keys are not older.
pub(super) const LATELY: Duration = Duration::from_secs(180);
/// Peers remembered for the next run, or waiting to be asked, at most.
pub(super) const REMEMBERED_MAX: usize = 1024;
/// Peers asked at once, and the time to the next.
const BATCH: usize = 32;
const PAUSE: Duration = Duration::from_millis(200);

/// Who is to be asked.
#[derive(Debug, Default)]
pub(super) struct Revival {
    waiting: VecDeque<PeerId>,
    /// Those who were started anew, of whom only those heard lately are asked.
    restarted: BTreeSet<PeerId>,
    next: Option<Instant>,
    /// Of the run before, and until when they count for the next although not heard since.
    remembered: Vec<NodePublic>,
    remembered_until: Option<Instant>,
    /// Those of them that no network map has named yet.
    unknown: Vec<NodePublic>,
}

impl Revival {
    /// Takes the peers of the run before, heard last first.
    pub(super) fn remember(&mut self, now: Instant, peers: Vec<NodePublic>) {
        self.remembered = peers;
        self.remembered.truncate(REMEMBERED_MAX);
        self.remembered_until = Some(now + LATELY);
        self.unknown.clone_from(&self.remembered);
    }

    /// There are new peers: those of the run before are asked.
    pub(super) fn meet(&mut self, now: Instant, id: impl Fn(&NodePublic) -> Option<PeerId>) {
        let mut known = Vec::new();
        self.unknown.retain(|key| {
            known.extend(id(key));
            id(key).is_none()
        });
        self.ask(now, known);
    }

    /// Sees to it that these are asked.
    pub(super) fn ask(&mut self, now: Instant, peers: impl IntoIterator<Item = PeerId>) {
        for id in peers {
            if self.waiting.len() < REMEMBERED_MAX && !self.waiting.contains(&id) {
                self.waiting.push_back(id);
            }
        }
        if !self.waiting.is_empty() {
            self.next.get_or_insert(now);
        }
    }

    /// These were started anew: they are asked if they were heard lately.
    pub(super) fn restarted(&mut self, now: Instant, peers: impl IntoIterator<Item = PeerId>) {
        self.restarted.extend(peers);
        if !self.restarted.is_empty() {
            self.next.get_or_insert(now);
        }
    }

    /// When [`Self::take_due`] has somebody.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.next
    }

    /// Those to be asked now.
    pub(super) fn take_due(
        &mut self,
        now: Instant,
        activity: &dyn Fn(PeerId) -> Activity,
    ) -> Vec<PeerId> {
        if self.next.is_none_or(|at| now < at) {
            return Vec::new();
        }
        let in_use = |id: &PeerId| heard_lately(&activity(*id), now).is_some();
        let restarted = std::mem::take(&mut self.restarted);
        self.ask(now, restarted.into_iter().filter(in_use));
        let batch = self.waiting.len().min(BATCH);
        let due = self.waiting.drain(..batch).collect();
        self.next = (!self.waiting.is_empty()).then(|| now + PAUSE);
        due
    }

    /// The peers to be remembered for the next run: those heard lately, by when, and for a while
    /// those of the run before, who may not have found back yet.
    pub(super) fn to_remember(
        &self,
        now: Instant,
        mut heard: Vec<(Instant, NodePublic)>,
    ) -> Vec<NodePublic> {
        heard.retain(|(at, _)| now.saturating_duration_since(*at) < LATELY);
        heard.sort_unstable_by_key(|(at, _)| std::cmp::Reverse(*at));
        heard.truncate(REMEMBERED_MAX);
        let mut peers: Vec<NodePublic> = heard.into_iter().map(|(_, key)| key).collect();
        if self.remembered_until.is_some_and(|until| now < until) {
            let before: Vec<NodePublic> = self
                .remembered
                .iter()
                .filter(|key| !peers.contains(key))
                .copied()
                .collect();
            peers.extend(before);
        }
        peers.truncate(REMEMBERED_MAX);
        peers
    }
}

/// When a peer was last heard, if that was less than [`LATELY`] before `until`.
pub(crate) fn heard_lately(activity: &Activity, until: Instant) -> Option<Instant> {
    let lately = |at: &Instant| until.saturating_duration_since(*at) < LATELY;
    activity.last_received.filter(lately)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::NodePrivate;
    use crate::testing::start;

    fn keys(count: usize) -> Vec<NodePublic> {
        let key = |_| NodePrivate::generate().public();
        (0..count).map(key).collect()
    }

    fn quiet(_: PeerId) -> Activity {
        Activity::default()
    }

    #[test]
    fn a_peer_that_was_started_anew_is_asked_if_it_was_heard_lately() {
        let now = start() + LATELY;
        let mut revival = Revival::default();
        revival.restarted(now, [1, 2, 3].map(PeerId));
        assert_eq!(revival.poll_timeout(), Some(now));
        let heard = |id: PeerId| Activity {
            last_received: match id.0 {
                1 => now.checked_sub(LATELY),
                2 => Some(now),
                _ => None,
            },
            ..Activity::default()
        };
        assert_eq!(revival.take_due(now, &heard), [PeerId(2)]);
        assert_eq!(revival.poll_timeout(), None);
    }

    #[test]
    fn peers_are_asked_a_few_at_a_time_and_once() {
        let now = start();
        let mut revival = Revival::default();
        assert_eq!(revival.poll_timeout(), None);
        let many: Vec<PeerId> = (0..70).map(PeerId).collect();
        revival.ask(now, many.clone());
        revival.ask(now, many.clone());
        assert_eq!(revival.poll_timeout(), Some(now));
        let (mut asked, mut at) = (Vec::new(), now);
        while let Some(next) = revival.poll_timeout() {
            assert!(asked.is_empty() || next >= at + PAUSE);
            assert_eq!(revival.take_due(next - Duration::from_nanos(1), &quiet), []);
            let due = revival.take_due(next, &quiet);
            assert!(!due.is_empty() && due.len() <= BATCH);
            asked.extend(due);
            at = next;
        }
        assert_eq!(asked, many);
    }

    #[test]
    fn peers_of_the_run_before_are_asked_when_a_map_names_them() {
        let now = start();
        let before = keys(3);
        let mut revival = Revival::default();
        revival.remember(now, before.clone());
        revival.meet(now, |_| None);
        assert_eq!(revival.poll_timeout(), None);
        revival.meet(now, |key| (*key == before[2]).then_some(PeerId(7)));
        assert_eq!(revival.take_due(now, &quiet), [PeerId(7)]);
        let id = |key: &NodePublic| before.iter().position(|k| k == key);
        revival.meet(now, |key| Some(PeerId(u32::try_from(id(key)?).ok()?)));
        assert_eq!(revival.take_due(now, &quiet), [PeerId(0), PeerId(1)]);
        revival.meet(now, |_| Some(PeerId(9)));
        assert_eq!(revival.poll_timeout(), None, "each once");
    }

    #[test]
    fn a_crash_before_anybody_answered_forgets_nobody() {
        let now = start();
        let (before, new) = (keys(2), keys(2));
        let mut revival = Revival::default();
        revival.remember(now, before.clone());
        let at = |secs| now + Duration::from_secs(secs);
        let heard = || vec![(at(1), new[0]), (at(2), before[1]), (at(3), new[1])];
        let early = revival.to_remember(at(4), heard());
        assert_eq!(early, [new[1], before[1], new[0], before[0]]);
        let later = revival.to_remember(at(181), heard());
        assert_eq!(later, [new[1], before[1]], "180 s after they were heard");
    }
}
