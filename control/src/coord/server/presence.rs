//! Who is online: streams come and go, nodes leave, and two machines may share one node.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use time::OffsetDateTime;

use super::store::expired;
use super::{Entry, Server, TICK};

/// The host's clock is looked at so often, at least, while keys are to expire by it.
const EXPIRY_LOOK: Duration = Duration::from_secs(60);

/// Ephemeral nodes that stayed away and would be told so, at most: the latest.
const STAYED_AWAY_MAX: usize = 1024;

/// What both are told.
pub(super) const TWO_MACHINES: &str = "two machines use this node's keys and take its place in turns: one of their state \
     directories is a copy of the other";

/// Last takings over that are looked at,
const TURNS: usize = 4;
/// and the time within which they have to be: a machine whose stream ended comes back at once, and one
/// that changes its network again and again takes longer. After as long without any it is over.
pub(super) const TURNS_TIME: Duration = Duration::from_secs(60);

/// Streams of a node that took the place of one that still stood, as those of two machines with the
/// same keys do, in turns. One machine that reconnects does not come back to the endpoints it had.
#[derive(Debug, Default)]
pub(super) struct Rivals {
    pub(super) turns: VecDeque<(Instant, Vec<SocketAddr>)>,
    pub(super) seen: bool,
}

impl Rivals {
    /// A stream takes the place of another, from a machine with these endpoints. True if that shows
    /// that there are two.
    pub(super) fn took_over(&mut self, now: Instant, endpoints: &[SocketAddr]) -> bool {
        let old = |at: Instant| now.saturating_duration_since(at) > TURNS_TIME;
        while self.turns.front().is_some_and(|(at, _)| old(*at)) || self.turns.len() >= TURNS {
            self.turns.pop_front();
        }
        self.turns.push_back((now, endpoints.to_vec()));
        let turns: Vec<&[SocketAddr]> = self.turns.iter().map(|(_, of)| &of[..]).collect();
        let before = self.seen;
        self.seen = matches!(turns[..], [a, b, c, d] if a != b && a == c && b == d);
        self.seen && !before
    }

    /// When the two of them will be one again.
    fn poll_timeout(&self) -> Option<Instant> {
        let (last, _) = self.turns.back().filter(|_| self.seen)?;
        Some(*last + TURNS_TIME)
    }

    /// What the node is told.
    pub(super) fn health(&self) -> Vec<String> {
        let problem = self.seen.then(|| TWO_MACHINES.to_owned());
        problem.into_iter().collect()
    }
}

/// Whether a node is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    /// Streams are open.
    Online,
    /// The last stream ended (or we started); peers are told at this time.
    Leaving(Instant, Option<bool>),
    /// Peers know; an ephemeral node is forgotten at this time.
    Offline(Option<Instant>),
}

impl Server {
    /// Does what is due: nodes go offline, ephemeral ones are forgotten, keys expire.
    pub fn handle_timeout(&mut self, now: Instant, wall: OffsetDateTime) {
        self.pending.handle_timeout(now);
        let mut gone = Vec::new();
        let mut left = Vec::new();
        let mut ripe = Vec::new();
        let mut gives_way = false;
        let due = self.node_alarms.iter().take_while(|(at, _)| *at <= now);
        let due: BTreeSet<i64> = due.map(|(_, id)| *id).collect();
        #[cfg(test)]
        {
            self.looks += due.len();
        }
        for id in &due {
            let Some(entry) = self.nodes.get_mut(id) else {
                continue;
            };
            if entry.rivals.poll_timeout().is_some_and(|at| at <= now) {
                entry.rivals = Rivals::default();
                self.stale.extend(&entry.streams);
                self.tick.get_or_insert(now + TICK);
            }
            if entry.routes_until.is_some_and(|at| at <= now) {
                entry.routes_until = None;
                gives_way = true;
            }
            match entry.presence {
                Presence::Leaving(at, _) if at <= now => {
                    let forget = entry
                        .record
                        .ephemeral
                        .then(|| now + self.config.ephemeral_timeout);
                    entry.presence = Presence::Offline(forget);
                    left.push(*id);
                }
                Presence::Offline(Some(at)) if at <= now => gone.push(*id),
                Presence::Online | Presence::Leaving(..) | Presence::Offline(_) => {}
            }
            if entry.expires_at.is_some_and(|at| at <= now) {
                ripe.push(*id);
            }
            self.set_alarm(*id);
        }
        if gives_way {
            self.refresh_routes(now);
        }
        for id in ripe {
            self.see_expiry(now, wall, id);
        }
        for id in left {
            self.rebuild(now, id);
        }
        for id in gone {
            if let Some(Entry { record, .. }) = self.nodes.get(&id) {
                if self.stayed_away.len() >= STAYED_AWAY_MAX {
                    self.stayed_away.pop_front();
                }
                self.stayed_away
                    .push_back((record.machine, record.node_key));
            }
            self.delete(now, id);
        }
    }

    /// A key may have expired by the host's clock, which may have been set meanwhile.
    fn see_expiry(&mut self, now: Instant, wall: OffsetDateTime, id: i64) {
        let Some(entry) = self.nodes.get_mut(&id) else {
            return;
        };
        entry.expires_at = None;
        let Some(until) = entry.record.good_until.filter(|_| !expired(&entry.record)) else {
            return self.set_alarm(id);
        };
        let left = Duration::try_from(until - wall).unwrap_or_default();
        if left.is_zero() {
            let mut record = entry.record.clone();
            record.expires = Some(until);
            return self.replace(now, record);
        }
        entry.expires_at = Some(now + left.min(EXPIRY_LOOK));
        self.set_alarm(id);
    }

    /// When [`Server::handle_timeout`] or [`Server::poll_session`] has something to do next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let node = self.node_alarms.first().map(|(at, _)| *at);
        let stream = self.stream_alarms.first().map(|(at, _)| *at);
        let pending = self.pending.poll_timeout();
        let alarms = [node, stream, self.tick, pending];
        alarms.into_iter().flatten().min()
    }

    /// A node's presence or its rivals changed: so does its alarm.
    pub(super) fn set_alarm(&mut self, id: i64) {
        let Some(entry) = self.nodes.get_mut(&id) else {
            return;
        };
        let next = entry.poll_timeout();
        if let Some(at) = std::mem::replace(&mut entry.alarm, next) {
            self.node_alarms.remove(&(at, id));
        }
        self.node_alarms.extend(next.map(|at| (at, id)));
    }
}

impl Entry {
    /// When its presence changes by itself, or its rivals are one again.
    fn poll_timeout(&self) -> Option<Instant> {
        let presence = match self.presence {
            Presence::Leaving(at, _) | Presence::Offline(Some(at)) => Some(at),
            Presence::Online | Presence::Offline(None) => None,
        };
        let own = [
            presence,
            self.routes_until,
            self.rivals.poll_timeout(),
            self.expires_at,
        ];
        own.into_iter().flatten().min()
    }
}
