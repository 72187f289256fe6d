//! Map streams: what each was sent, what may differ since, and its next message.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use time::OffsetDateTime;

use super::presence::{Presence, Rivals, TWO_MACHINES};
use super::sight::{FilterHash, hash_of};
use super::view::{View, difference_of, filters, own_node};
use super::{OFFLINE_DELAY, ROUTES_DELAY, Server, TICK};
use crate::netmap::wire::{MapRequest, MapResponse, Node, WireTime};

/// Shortest and longest time between signs of life on a stream.
const KEEP_ALIVE: [Duration; 2] = [Duration::from_secs(50), Duration::from_secs(59)];

/// Streams of one node; the oldest ends when there are more.
const SESSIONS_PER_NODE_MAX: usize = 4;

/// Names an open map stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

#[derive(Debug)]
pub(super) struct Session {
    pub(super) node: i64,
    pub(super) keep_alive: bool,
    pub(super) started: bool,
    /// Nodes that may differ from what was sent, beside [`Server::changed`].
    pub(super) dirty: BTreeSet<i64>,
    pub(super) sent: View,
    /// Which filter it was sent, of which compiled policy, and how many users.
    pub(super) filter: FilterHash,
    pub(super) epoch: u64,
    pub(super) users: usize,
    /// It was told of two machines.
    pub(super) told_rivals: bool,
    pub(super) next_keep_alive: Instant,
    /// Spread of keep-alives over sessions.
    pub(super) period: Duration,
}

impl Server {
    pub(super) fn open_session(
        &mut self,
        now: Instant,
        wall: OffsetDateTime,
        node: i64,
        request: &MapRequest,
        random: f64,
    ) -> SessionId {
        let id = SessionId(self.next_session);
        self.next_session += 1;
        let [shortest, longest] = KEEP_ALIVE;
        let period = shortest + (longest - shortest).mul_f64(random.clamp(0.0, 1.0));
        let session = Session {
            node,
            keep_alive: request.keep_alive,
            started: false,
            dirty: BTreeSet::new(),
            sent: View::default(),
            filter: FilterHash::default(),
            epoch: 0,
            users: 0,
            told_rivals: false,
            next_keep_alive: now + period,
            period,
        };
        if let Some(entry) = self.nodes.get_mut(&node) {
            let mut older = entry.streams.iter().filter_map(|id| self.sessions.get(id));
            let replaces = older.any(|session| session.started);
            // What it is told of rivals may change.
            self.stale.extend(&entry.streams);
            entry.streams.push(id);
            if entry.streams.len() > SESSIONS_PER_NODE_MAX {
                self.ended.push((entry.streams[0], None));
            }
            if !replaces {
                entry.rivals = Rivals::default();
            } else if entry.rivals.took_over(now, &entry.record.endpoints) {
                tracing::warn!(node = entry.record.name, "{TWO_MACHINES}");
            }
            entry.presence = Presence::Online;
            entry.routes_until = None;
            entry.record.last_seen = Some(wall);
            self.unsaved.insert(node);
            self.presence_unsaved = true;
            self.set_alarm(node);
            self.rebuild(now, node);
        }
        self.stream_alarms.insert((session.next_keep_alive, id));
        self.young.insert(id);
        self.sessions.insert(id, session);
        id
    }

    /// A stream ended, from either side.
    pub fn handle_session_end(&mut self, now: Instant, wall: OffsetDateTime, id: SessionId) {
        let Some(session) = self.sessions.remove(&id) else {
            return;
        };
        self.stream_alarms.remove(&(session.next_keep_alive, id));
        self.young.remove(&id);
        self.stale.remove(&id);
        let Some(entry) = self.nodes.get_mut(&session.node) else {
            return;
        };
        entry.streams.retain(|other| *other != id);
        if entry.streams.is_empty() {
            entry.presence = Presence::Leaving(now + OFFLINE_DELAY, Some(true));
            if self.routers.contains(&session.node) {
                // Then another router of the same prefixes takes over.
                entry.routes_until = Some(now + ROUTES_DELAY);
            }
            entry.record.last_seen = Some(wall);
            self.unsaved.insert(session.node);
            self.presence_unsaved = true;
            self.set_alarm(session.node);
        }
    }

    /// Streams the driver has to end now, some with a last message.
    pub fn take_ended(&mut self) -> Vec<(SessionId, Option<Box<MapResponse>>)> {
        std::mem::take(&mut self.ended)
    }

    /// Streams that may have a message now; [`Server::poll_session`] has none for any other.
    pub fn due_sessions(&self, now: Instant) -> BTreeSet<SessionId> {
        let mut due = self.young.clone();
        let alive = self.stream_alarms.iter().take_while(|(at, _)| *at <= now);
        due.extend(alive.map(|(_, id)| *id));
        if self.tick_is_due(now) {
            due.extend(&self.stale);
        }
        due
    }

    /// Whether collected changes are due; after every stream that is due was asked,
    /// [`Server::end_tick`].
    pub fn tick_is_due(&self, now: Instant) -> bool {
        self.tick.is_some_and(|at| at <= now)
    }

    /// Every stream that is due was asked. `again` when some could not take their message yet: they
    /// remember by themselves what changed.
    pub fn end_tick(&mut self, now: Instant, again: bool) {
        for id in &self.stale {
            if let Some(session) = self.sessions.get_mut(id) {
                session.dirty.extend(&self.changed);
            }
        }
        self.changed.clear();
        self.tick = again.then_some(now + TICK);
    }

    /// The next message of a stream that can take one: the full map first, then differences when a
    /// tick is due, then signs of life.
    pub fn poll_session(
        &mut self,
        now: Instant,
        wall: OffsetDateTime,
        id: SessionId,
    ) -> Option<MapResponse> {
        #[cfg(test)]
        {
            self.looks += 1;
        }
        let session = self.sessions.get(&id)?;
        let node = session.node;
        let started = session.started;
        let alive_due = session.next_keep_alive <= now;
        // One whose node was removed has had its last message.
        self.nodes.get(&node)?;
        self.look();
        let message = if !started {
            Some(self.full_for(now, wall, id))
        } else if self.tick_is_due(now) {
            self.difference(wall, id)
        } else {
            None
        };
        let keep_alive = self.sessions.get(&id)?.keep_alive;
        let message = message.or_else(|| {
            (alive_due && keep_alive).then(|| MapResponse {
                keep_alive: true,
                ..MapResponse::default()
            })
        });
        if message.is_some() || alive_due {
            self.postpone_keep_alive(now, id);
        }
        if !started && let Some(entry) = self.nodes.get(&node) {
            // The new stream stands: older ones of the same node end.
            let older = entry.streams.iter().take_while(|other| **other < id);
            self.ended.extend(older.map(|other| (*other, None)));
        }
        message
    }

    /// A stream cannot take a message now: what waits there is a sign of life as well.
    pub fn handle_full(&mut self, now: Instant, id: SessionId) {
        let session = self.sessions.get(&id);
        if session.is_some_and(|session| session.next_keep_alive <= now) {
            self.postpone_keep_alive(now, id);
        }
    }

    fn postpone_keep_alive(&mut self, now: Instant, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id) {
            self.stream_alarms.remove(&(session.next_keep_alive, id));
            session.next_keep_alive = now + session.period;
            self.stream_alarms.insert((session.next_keep_alive, id));
        }
    }

    /// The complete map for a session; notes what was sent.
    fn full_for(&mut self, now: Instant, wall: OffsetDateTime, id: SessionId) -> MapResponse {
        let Some(node) = self.sessions.get(&id).map(|session| session.node) else {
            return MapResponse::default();
        };
        let mut message = self.full(wall, node);
        let rivals = self.nodes.get(&node).map(|entry| &entry.rivals);
        if let Some(rivals) = rivals.filter(|rivals| !rivals.turns.is_empty()) {
            message.health = Some(rivals.health());
        }
        let told_rivals = rivals.is_some_and(|rivals| rivals.seen);
        let sent = self.seen_by(node);
        let filter = hash_of(&self.filter_of(node));
        let (epoch, users) = (self.sight.epoch, self.config.users.len());
        self.young.remove(&id);
        self.stale.remove(&id);
        if !self.changed.is_empty() && !self.tick_is_due(now) {
            // More may change before the tick.
            self.stale.insert(id);
        }
        if let Some(session) = self.sessions.get_mut(&id) {
            // An empty list of peers is invisible, so what is gone is named.
            let gone = session.sent.keys().filter(|id| !sent.contains_key(id));
            let gone: Vec<i64> = gone.copied().collect();
            if !gone.is_empty() && message.peers.as_ref().is_none_or(Vec::is_empty) {
                message.peers_removed = Some(gone);
            }
            session.sent = sent;
            (session.filter, session.epoch, session.users) = (filter, epoch, users);
            session.told_rivals = told_rivals;
            session.dirty.clear();
            session.started = true;
        }
        message
    }

    /// What changed for a session since its last message; none when nothing did.
    fn difference(&mut self, wall: OffsetDateTime, id: SessionId) -> Option<MapResponse> {
        self.stale.remove(&id);
        let session = self.sessions.get_mut(&id)?;
        let viewer = session.node;
        let mut dirty = std::mem::take(&mut session.dirty);
        let mut sent = std::mem::take(&mut session.sent);
        let (epoch, users) = (session.epoch, session.users);
        dirty.extend(&self.changed);
        if epoch != self.sight.epoch {
            dirty.extend(self.view.keys().chain(sent.keys()));
        }
        let (mut changed, mut patches, mut removed) = (Vec::new(), Vec::new(), Vec::new());
        let (mut own, mut news) = (None, Vec::new());
        for id in dirty {
            let old = sent.get(&id);
            let Some(wire) = self.seen(viewer, id) else {
                if old.is_some() && id != viewer {
                    removed.push(id);
                    news.push((id, None));
                }
                continue;
            };
            if old.is_some_and(|old| Arc::ptr_eq(old, &wire) || **old == *wire) {
                continue;
            }
            if id == viewer {
                own = Some(own_node(&wire));
            } else {
                match old.and_then(|old| difference_of(old, &wire)) {
                    Some(patch) => patches.push(patch),
                    None => changed.push(Arc::clone(&wire)),
                }
            }
            news.push((id, Some(wire)));
        }
        if self.sees_all(viewer) {
            sent = Arc::clone(&self.view);
        } else {
            let sent = Arc::make_mut(&mut sent);
            for (id, wire) in news {
                match wire {
                    Some(wire) => drop(sent.insert(id, wire)),
                    None => drop(sent.remove(&id)),
                }
            }
        }
        let filter = (epoch != self.sight.epoch).then(|| self.filter_of(viewer));
        let filter = filter.map(|filter| (hash_of(&filter), filter));
        let new_users = users != self.config.users.len() && !changed.is_empty();
        let profiles = new_users.then(|| self.profiles());
        let (epoch, users) = (self.sight.epoch, self.config.users.len());
        let session = self.sessions.get_mut(&id)?;
        session.sent = sent;
        session.epoch = epoch;
        if new_users {
            session.users = users;
        }
        let filter = filter.and_then(|(hash, filter)| {
            let is_new = std::mem::replace(&mut session.filter, hash) != hash;
            is_new.then(|| filters(filter))
        });
        let rivals = self.nodes.get(&session.node).map(|entry| &entry.rivals);
        let rivals = rivals.filter(|rivals| rivals.seen != session.told_rivals);
        let health = rivals.map(Rivals::health);
        session.told_rivals ^= health.is_some();
        let nodes_stay = changed.is_empty() && patches.is_empty() && removed.is_empty();
        if own.is_none() && nodes_stay && health.is_none() && filter.is_none() {
            return None;
        }
        Some(MapResponse {
            control_time: Some(WireTime(wall)),
            node: own,
            peers_changed: (!changed.is_empty()).then_some(changed),
            peers_removed: (!removed.is_empty()).then_some(removed),
            peers_changed_patch: (!patches.is_empty()).then_some(patches),
            packet_filters: filter,
            user_profiles: profiles,
            health,
            ..MapResponse::default()
        })
    }

    /// A node changed: at the next tick all streams are asked.
    pub(super) fn mark_dirty(&mut self, now: Instant, id: i64) {
        if self.changed.is_empty() {
            self.stale.extend(self.sessions.keys());
        }
        self.changed.insert(id);
        self.tick.get_or_insert(now + TICK);
    }

    /// What a node may see has changed: its streams compare everything anew.
    pub(super) fn look_around(&mut self, now: Instant, id: i64) {
        let streams = self.nodes.get(&id).map(|entry| &entry.streams);
        for id in streams.into_iter().flatten() {
            if let Some(session) = self.sessions.get_mut(id) {
                session.dirty.extend(self.nodes.keys());
                self.stale.insert(*id);
            }
        }
        self.tick.get_or_insert(now + TICK);
    }
}

/// The last message of a stream whose node was removed. A tailscaled goes on with its last map for
/// as long as it finds itself unknown; an expiry in the past makes it ask to be logged in.
pub(super) fn farewell(wire: &Node, session: &Session) -> MapResponse {
    let mut node = wire.clone();
    node.key_expiry = Some(WireTime(OffsetDateTime::UNIX_EPOCH));
    (node.expired, node.machine_authorized) = (true, false);
    let peers = session.sent.keys().filter(|id| **id != session.node);
    MapResponse {
        node: Some(own_node(&node)),
        peers_removed: Some(peers.copied().collect()),
        ..MapResponse::default()
    }
}
