//! Map streams: what each was sent, what may differ since, and its next message.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use time::OffsetDateTime;

use super::presence::{Presence, Rivals, TWO_MACHINES};
use super::view::{difference_of, own_node};
use super::{Entry, OFFLINE_DELAY, Server, TICK};
use crate::coord::frames::Codec;
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
    pub(super) codec: Codec,
    pub(super) keep_alive: bool,
    pub(super) started: bool,
    /// Nodes that may differ from what was sent.
    pub(super) dirty: BTreeSet<i64>,
    pub(super) sent: BTreeMap<i64, Arc<Node>>,
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
        let zstd = request.compress == "zstd";
        let session = Session {
            node,
            codec: if zstd { Codec::Zstd } else { Codec::Plain },
            keep_alive: request.keep_alive,
            started: false,
            dirty: BTreeSet::new(),
            sent: BTreeMap::new(),
            told_rivals: false,
            next_keep_alive: now + period,
            period,
        };
        self.sessions.insert(id, session);
        let of_node = self
            .sessions
            .iter()
            .filter(|(_, session)| session.node == node);
        let of_node: Vec<SessionId> = of_node.map(|(id, _)| *id).collect();
        if of_node.len() > SESSIONS_PER_NODE_MAX {
            self.ended.push((of_node[0], None));
        }
        let replaces = self
            .sessions
            .iter()
            .any(|(other, session)| session.node == node && *other != id && session.started);
        if let Some(entry) = self.nodes.get_mut(&node) {
            if !replaces {
                entry.rivals = Rivals::default();
            } else if entry.rivals.took_over(now, &entry.record.endpoints) {
                tracing::warn!(node = entry.record.name, "{TWO_MACHINES}");
            }
            entry.presence = match entry.presence {
                Presence::Online(streams) => Presence::Online(streams + 1),
                Presence::Leaving(..) | Presence::Offline(_) => Presence::Online(1),
            };
            entry.record.last_seen = Some(wall);
            self.unsaved.insert(node);
            self.presence_unsaved = true;
            self.rebuild(now, node);
        }
        id
    }

    /// A stream ended, from either side.
    pub fn handle_session_end(&mut self, now: Instant, wall: OffsetDateTime, id: SessionId) {
        let Some(session) = self.sessions.remove(&id) else {
            return;
        };
        let Some(entry) = self.nodes.get_mut(&session.node) else {
            return;
        };
        entry.presence = match entry.presence {
            Presence::Online(streams) if streams > 1 => Presence::Online(streams - 1),
            Presence::Online(_) => {
                entry.record.last_seen = Some(wall);
                self.unsaved.insert(session.node);
                self.presence_unsaved = true;
                Presence::Leaving(now + OFFLINE_DELAY, Some(true))
            }
            other @ (Presence::Leaving(..) | Presence::Offline(_)) => other,
        };
    }

    /// How a stream's messages are compressed.
    pub fn codec(&self, id: SessionId) -> Codec {
        self.sessions
            .get(&id)
            .map_or(Codec::Plain, |session| session.codec)
    }

    /// Streams the driver has to end now, some with a last message.
    pub fn take_ended(&mut self) -> Vec<(SessionId, Option<Box<MapResponse>>)> {
        std::mem::take(&mut self.ended)
    }

    /// All open streams.
    pub fn session_ids(&self) -> Vec<SessionId> {
        self.sessions.keys().copied().collect()
    }

    /// Whether collected changes are due; after every stream was asked, [`Server::end_tick`].
    pub fn tick_is_due(&self, now: Instant) -> bool {
        self.tick.is_some_and(|at| at <= now)
    }

    /// Every stream was asked. `again` when some could not take their message yet.
    pub fn end_tick(&mut self, now: Instant, again: bool) {
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
        let session = self.sessions.get(&id)?;
        let node = session.node;
        let started = session.started;
        let alive_due = session.next_keep_alive <= now;
        let message = if !started {
            self.nodes.get(&node)?;
            Some(self.full_for(wall, id))
        } else if self.tick_is_due(now) {
            self.difference(wall, id)
        } else {
            None
        };
        let session = self.sessions.get_mut(&id)?;
        let message = message.or_else(|| {
            (alive_due && session.keep_alive).then(|| MapResponse {
                keep_alive: true,
                ..MapResponse::default()
            })
        });
        if message.is_some() || alive_due {
            session.next_keep_alive = now + session.period;
        }
        if !started {
            // The new stream stands: older ones of the same node end.
            let older = self.sessions.iter();
            let older = older.filter(|(other, session)| session.node == node && **other < id);
            self.ended.extend(older.map(|(other, _)| (*other, None)));
        }
        message
    }

    /// A stream cannot take a message now: what waits there is a sign of life as well.
    pub fn handle_full(&mut self, now: Instant, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id)
            && session.next_keep_alive <= now
        {
            session.next_keep_alive = now + session.period;
        }
    }

    /// The complete map for a session; notes what was sent.
    fn full_for(&mut self, wall: OffsetDateTime, id: SessionId) -> MapResponse {
        let Some(node) = self.sessions.get(&id).map(|session| session.node) else {
            return MapResponse::default();
        };
        let mut message = self.full(wall, node);
        let rivals = self.nodes.get(&node).map(|entry| &entry.rivals);
        if let Some(rivals) = rivals.filter(|rivals| !rivals.turns.is_empty()) {
            message.health = Some(rivals.health());
        }
        let told_rivals = rivals.is_some_and(|rivals| rivals.seen);
        let sent: BTreeMap<i64, Arc<Node>> = self
            .seen_by(node)
            .map(|(id, entry)| (*id, Arc::clone(&entry.wire)))
            .collect();
        if let Some(session) = self.sessions.get_mut(&id) {
            // An empty list of peers is invisible, so what is gone is named.
            let gone = session.sent.keys().filter(|id| !sent.contains_key(id));
            let gone: Vec<i64> = gone.copied().collect();
            if !gone.is_empty() && message.peers.as_ref().is_none_or(Vec::is_empty) {
                message.peers_removed = Some(gone);
            }
            session.sent = sent;
            session.told_rivals = told_rivals;
            session.dirty.clear();
            session.started = true;
        }
        message
    }

    /// What changed for a session since its last message; none when nothing did.
    fn difference(&mut self, wall: OffsetDateTime, id: SessionId) -> Option<MapResponse> {
        let all = self.sees_peers(self.sessions.get(&id)?.node);
        let session = self.sessions.get_mut(&id)?;
        let (mut changed, mut patches, mut removed) = (Vec::new(), Vec::new(), Vec::new());
        let mut own = None;
        for id in std::mem::take(&mut session.dirty) {
            let entry = self.nodes.get(&id);
            let Some(entry) = entry.filter(|_| all || id == session.node) else {
                if session.sent.remove(&id).is_some() && id != session.node {
                    removed.push(id);
                }
                continue;
            };
            let old = session.sent.insert(id, Arc::clone(&entry.wire));
            if old
                .as_ref()
                .is_some_and(|old| Arc::ptr_eq(old, &entry.wire))
            {
                continue;
            }
            if id == session.node {
                own = Some(own_node(&entry.wire));
                continue;
            }
            match old.and_then(|old| difference_of(&old, &entry.wire)) {
                Some(patch) => patches.push(patch),
                None => changed.push(Arc::clone(&entry.wire)),
            }
        }
        let rivals = self.nodes.get(&session.node).map(|entry| &entry.rivals);
        let rivals = rivals.filter(|rivals| rivals.seen != session.told_rivals);
        let health = rivals.map(Rivals::health);
        session.told_rivals ^= health.is_some();
        let nodes_stay = changed.is_empty() && patches.is_empty() && removed.is_empty();
        if own.is_none() && nodes_stay && health.is_none() {
            return None;
        }
        Some(MapResponse {
            control_time: Some(WireTime(wall)),
            node: own,
            peers_changed: (!changed.is_empty()).then_some(changed),
            peers_removed: (!removed.is_empty()).then_some(removed),
            peers_changed_patch: (!patches.is_empty()).then_some(patches),
            health,
            ..MapResponse::default()
        })
    }

    pub(super) fn mark_dirty(&mut self, now: Instant, id: i64) {
        for session in self.sessions.values_mut() {
            session.dirty.insert(id);
        }
        self.tick.get_or_insert(now + TICK);
    }

    /// What a node may see has changed: its streams compare everything anew.
    pub(super) fn look_around(&mut self, now: Instant, id: i64) {
        let sessions = self.sessions.values_mut();
        for session in sessions.filter(|session| session.node == id) {
            session.dirty.extend(self.nodes.keys());
        }
        self.tick.get_or_insert(now + TICK);
    }
}

/// The last message of a stream whose node was removed. A tailscaled goes on with its last map for
/// as long as it finds itself unknown; an expiry in the past makes it ask to be logged in.
pub(super) fn farewell(entry: &Entry, session: &Session) -> MapResponse {
    let mut node = Node::clone(&entry.wire);
    node.key_expiry = Some(WireTime(OffsetDateTime::UNIX_EPOCH));
    (node.expired, node.machine_authorized) = (true, false);
    let peers = session.sent.keys().filter(|id| **id != session.node);
    MapResponse {
        node: Some(own_node(&node)),
        peers_removed: Some(peers.copied().collect()),
        ..MapResponse::default()
    }
}
