//! The peers a shard owns: session, path, packets that wait, and when they want to be called.
//!
//! Nobody walks through all peers: whoever wants to be called at some time stands in a queue of
//! [`Deadlines`], and the others cost nothing.

#![forbid(unsafe_code)]

mod deadlines;
mod path;
mod waiting;

use std::sync::Arc;
use std::time::Instant;

use deadlines::Deadlines;
pub(crate) use path::{Kind, Path, Source, Way};
use waiting::Waiting;

use crate::channel::hub::PeerEntry;
use crate::channel::{Arrived, Event, PEERS_MAX, PathDecision, PeerConfig, PeerId, PeerShared};
use crate::session::{Engine, Session};
use crate::sys::socket::Local;

/// One peer that this shard owns.
pub(crate) struct Peer {
    pub(crate) id: PeerId,
    pub(crate) config: Arc<PeerConfig>,
    pub(crate) shared: Arc<PeerShared>,
    /// Made when first needed: it costs a Diffie-Hellman computation.
    session: Option<Session>,
    pub(crate) path: Path,
    pub(crate) waiting: Waiting,
}

/// The table.
pub(crate) struct Peers {
    /// Endpoints follow the peers: device mode.
    roam: bool,
    by_id: Vec<Option<Box<Peer>>>,
    deadlines: Deadlines,
}

impl Peers {
    pub(crate) fn new(roam: bool) -> Peers {
        Peers {
            roam,
            by_id: Vec::new(),
            deadlines: Deadlines::default(),
        }
    }

    /// The peer, if this shard owns it.
    pub(crate) fn get(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.by_id.get_mut(id.0 as usize)?.as_deref_mut()
    }

    /// Takes over a new table of the peers this shard owns. Peers whose keys are the same keep
    /// their sessions and paths. Returns those that shall have a session although nobody has
    /// anything to send (a persistent keep-alive is new), and how many packets waited for peers
    /// that are gone.
    pub(crate) fn replace(
        &mut self,
        now: Instant,
        mut engine: Option<&mut Engine>,
        entries: impl Iterator<Item = PeerEntry>,
    ) -> (Vec<PeerId>, u64) {
        let mut close = |session: Option<Session>| {
            // Without an engine there are no sessions.
            if let (Some(engine), Some(session)) = (engine.as_deref_mut(), session) {
                engine.close(session);
            }
        };
        let mut old = std::mem::take(&mut self.by_id);
        let mut wanted = Vec::new();
        for PeerEntry { config, shared, .. } in entries {
            let at = config.id.0 as usize;
            if at >= PEERS_MAX {
                continue;
            }
            if self.by_id.len() <= at {
                self.by_id.resize_with(at + 1, || None);
            }
            // Not by its key: it may have gone and come back between two of our turns.
            let kept = old
                .get_mut(at)
                .and_then(|old| old.take_if(|old| Arc::ptr_eq(&old.shared, &shared)));
            let kept_alive = kept
                .as_ref()
                .is_some_and(|peer| keepalive(&peer.config).is_some());
            let peer = match kept {
                Some(mut peer) => {
                    close(peer.reconfigure(now, config));
                    peer
                }
                None => Box::new(Peer::new(config, shared, self.roam)),
            };
            if keepalive(&peer.config).is_some() && (!kept_alive || peer.session.is_none()) {
                wanted.push(peer.id);
            }
            self.by_id[at] = Some(peer);
        }
        let mut dropped = 0;
        for mut gone in old.into_iter().flatten() {
            dropped += gone.waiting.clear();
            close(gone.session.take());
            self.deadlines.remove(gone.id);
        }
        self.deadlines.make_room(self.by_id.len());
        for at in 0..self.by_id.len() {
            if let Some(id) = self.by_id[at].as_ref().map(|peer| peer.id) {
                self.touch(id);
            }
        }
        (wanted, dropped)
    }

    /// Ends every session: our key has changed, and the engine with it. Returns those that shall have a new one at once,
    /// because packets wait or a persistent keep-alive is set.
    pub(crate) fn end_sessions(&mut self) -> Vec<PeerId> {
        let mut wanted = Vec::new();
        for peer in self.by_id.iter_mut().flatten() {
            peer.session = None;
            if !peer.waiting.is_empty() || keepalive(&peer.config).is_some() {
                wanted.push(peer.id);
            }
        }
        wanted
    }

    /// The peer with a session, made if it has none.
    pub(crate) fn wake(
        &mut self,
        now: Instant,
        id: PeerId,
        engine: &mut Engine,
    ) -> Option<&mut Peer> {
        let peer = self.by_id.get_mut(id.0 as usize)?.as_deref_mut()?;
        if peer.session.is_none() {
            peer.session = Some(engine.session(now, &peer.config));
        }
        self.touch(id);
        self.get(id)
    }

    /// Looks at when a peer wants to be called next. To be called once after each batch that
    /// concerned it.
    #[inline]
    pub(crate) fn touch(&mut self, id: PeerId) {
        let peer = self.by_id.get(id.0 as usize).and_then(Option::as_ref);
        if let Some(at) = peer.and_then(|peer| peer.deadline()) {
            self.deadlines.no_later(id, at);
        }
    }

    /// When the first peer may want to be called.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.next()
    }

    /// Takes a peer whose time may have come out of the queue; [`Peers::touch`] puts it back.
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<PeerId> {
        self.deadlines.take_due(now)
    }
}

/// The interval in seconds, if there is one; 0 means none.
fn keepalive(config: &PeerConfig) -> Option<u16> {
    config.persistent_keepalive.filter(|&seconds| seconds > 0)
}

impl Peer {
    fn new(config: Arc<PeerConfig>, shared: Arc<PeerShared>, roam: bool) -> Peer {
        Peer {
            id: config.id,
            config,
            shared,
            session: None,
            path: if roam {
                Path::following()
            } else {
                Path::default()
            },
            waiting: Waiting::default(),
        }
    }

    /// Takes over a configuration with the same public key. What the session cannot change while it
    /// lives ends it: then it is returned.
    fn reconfigure(&mut self, now: Instant, config: Arc<PeerConfig>) -> Option<Session> {
        let old = std::mem::replace(&mut self.config, config);
        let new = &self.config;
        self.session
            .take_if(|session| !session.reconfigure(now, &old, new))
    }

    /// Takes a path decision over, in device mode an endpoint. True if the peer can be reached in a
    /// way it could not before.
    pub(crate) fn decide(&mut self, now: Instant, decision: PathDecision) -> bool {
        let reachable = self.path.decide(now, decision);
        self.tell_whereabouts();
        reachable
    }

    /// Notes an authentic arrival and says how it came.
    pub(crate) fn arrived(
        &mut self,
        now: Instant,
        source: Source,
        local: Option<Local>,
        events: &mut Vec<Event>,
    ) -> Arrived {
        let way = self.path.arrived(now, self.id, source, local, events);
        self.tell_whereabouts();
        way
    }

    /// The kernel refuses the local address, or routes have changed: routing chooses again.
    pub(crate) fn unstick(&mut self) {
        self.path.unstick();
        self.tell_whereabouts();
    }

    fn tell_whereabouts(&mut self) {
        if let Some(whereabouts) = self.path.take_move() {
            self.shared.set_whereabouts(whereabouts);
        }
    }

    /// The session, if it was ever needed.
    pub(crate) fn session(&mut self) -> Option<&mut Session> {
        self.session.as_mut()
    }

    /// True if packets can be sealed now.
    pub(crate) fn ready(&self, now: Instant) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| session.ready(now))
    }

    /// When something is to be done here although nobody sends or receives.
    #[inline]
    fn deadline(&self) -> Option<Instant> {
        let session = self.session.as_ref().and_then(Session::poll_timeout);
        let waiting = self.waiting.stale_at();
        session.into_iter().chain(waiting).min()
    }
}

#[cfg(test)]
mod tests;
