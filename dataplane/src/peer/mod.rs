//! The peers a shard owns: session, path, packets that wait, and how to find them by receiver
//! index.
//!
//! A receiver index has 32 bits: 16 random ones that name a slot of this table, 8 that name the
//! shard, and 8 that boringtun counts up per handshake. So an index is looked up with one load, and
//! says nothing about the peer to whoever guesses.

#![forbid(unsafe_code)]

mod path;
mod waiting;

use std::sync::Arc;
use std::time::Instant;

pub(crate) use path::{Kind, Path, Source, Way};
use waiting::Waiting;

use crate::channel::hub::PeerEntry;
use crate::channel::{Arrived, Event, PEERS_MAX, PathDecision, PeerConfig, PeerId, PeerShared};
use crate::session::{Engine, Session};
use crate::sys::socket::Local;

/// Slots of the index table: the upper 16 bits of a receiver index.
const SLOTS: usize = 1 << 16;
/// No peer has this slot.
const FREE: u16 = u16::MAX;
const _: () = assert!(PEERS_MAX < FREE as usize);

/// One peer that this shard owns.
pub(crate) struct Peer {
    pub(crate) id: PeerId,
    pub(crate) config: Arc<PeerConfig>,
    pub(crate) shared: Arc<PeerShared>,
    /// Made when first needed: it costs a Diffie-Hellman computation.
    session: Option<Session>,
    slot: u16,
    pub(crate) path: Path,
    pub(crate) waiting: Waiting,
    /// In the list of those that are ticked.
    ticking: bool,
}

/// The table.
pub(crate) struct Peers {
    shard: u8,
    /// Endpoints follow the peers: device mode.
    roam: bool,
    by_id: Vec<Option<Box<Peer>>>,
    by_slot: Box<[u16]>,
    ticking: Vec<PeerId>,
    /// Where the round of ticks stands; `None` between rounds.
    tick_at: Option<usize>,
}

impl Peers {
    pub(crate) fn new(shard: u8, roam: bool) -> Peers {
        Peers {
            shard,
            roam,
            by_id: Vec::new(),
            by_slot: vec![FREE; SLOTS].into(),
            ticking: Vec::new(),
            tick_at: None,
        }
    }

    /// The peer, if this shard owns it.
    pub(crate) fn get(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.by_id.get_mut(id.0 as usize)?.as_deref_mut()
    }

    /// The peer whose session has the receiver index.
    pub(crate) fn by_index(&mut self, receiver_index: u32) -> Option<&mut Peer> {
        let id = self.by_slot[(receiver_index >> 16) as usize];
        self.by_id.get_mut(usize::from(id))?.as_deref_mut()
    }

    /// Takes over a new table of the peers this shard owns. Peers whose keys are the same keep
    /// their sessions and paths. Returns those that shall have a session although nobody has
    /// anything to send (a persistent keep-alive is new), and how many packets waited for peers
    /// that are gone.
    pub(crate) fn replace(
        &mut self,
        entries: impl Iterator<Item = PeerEntry>,
    ) -> (Vec<PeerId>, u64) {
        let mut old = std::mem::take(&mut self.by_id);
        let mut wanted = Vec::new();
        let mut dropped = 0;
        for PeerEntry { config, shared, .. } in entries {
            let at = config.id.0 as usize;
            if at >= PEERS_MAX {
                continue;
            }
            if self.by_id.len() <= at {
                self.by_id.resize_with(at + 1, || None);
            }
            let kept = old.get_mut(at).and_then(Option::take).and_then(|mut peer| {
                if peer.config.public_key == config.public_key {
                    return Some(peer);
                }
                self.by_slot[usize::from(peer.slot)] = FREE;
                dropped += peer.waiting.clear();
                None
            });
            let kept_alive = kept
                .as_ref()
                .is_some_and(|peer| keepalive(&peer.config).is_some());
            let peer = match kept {
                Some(mut peer) => {
                    peer.reconfigure(config);
                    peer
                }
                None => {
                    let slot = self.claim_slot(config.id);
                    Box::new(Peer::new(config, shared, slot, self.roam))
                }
            };
            if keepalive(&peer.config).is_some() && (!kept_alive || peer.session.is_none()) {
                wanted.push(peer.id);
            }
            self.by_id[at] = Some(peer);
        }
        for mut gone in old.into_iter().flatten() {
            self.by_slot[usize::from(gone.slot)] = FREE;
            dropped += gone.waiting.clear();
        }
        let by_id = &self.by_id;
        self.ticking.retain(|id| {
            by_id
                .get(id.0 as usize)
                .is_some_and(|peer| peer.as_ref().is_some_and(|peer| peer.ticking))
        });
        self.tick_at = None;
        (wanted, dropped)
    }

    /// Ends every session: our key has changed. Returns those that shall have a new one at once,
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

    fn claim_slot(&mut self, id: PeerId) -> u16 {
        // Fewer peers than slots: a free one is near.
        let mut slot: u16 = rand::random();
        while self.by_slot[usize::from(slot)] != FREE {
            slot = slot.wrapping_add(1);
        }
        self.by_slot[usize::from(slot)] = u16::try_from(id.0).expect("below PEERS_MAX");
        slot
    }

    /// The peer with a session, made if it has none, and ticked from now on.
    pub(crate) fn wake(&mut self, id: PeerId, engine: &Engine) -> Option<&mut Peer> {
        let shard = self.shard;
        let peer = self.by_id.get_mut(id.0 as usize)?.as_deref_mut()?;
        if peer.session.is_none() {
            let index = (u32::from(peer.slot) << 8) | u32::from(shard);
            peer.session = Some(engine.session(
                &peer.config.public_key,
                peer.config.preshared_key.as_ref().map(|key| **key),
                peer.config.persistent_keepalive,
                index,
            ));
        }
        if !peer.ticking {
            peer.ticking = true;
            self.ticking.push(id);
        }
        Some(peer)
    }

    /// True while some peer wants ticks.
    pub(crate) fn wants_ticks(&self) -> bool {
        !self.ticking.is_empty()
    }

    /// Starts a round of ticks.
    pub(crate) fn start_round(&mut self) {
        self.tick_at = Some(0);
    }

    /// True while a round is not finished.
    pub(crate) fn in_round(&self) -> bool {
        self.tick_at.is_some()
    }

    /// Calls `tick` for up to `max` peers of the round; those for which it returns false want no
    /// more ticks.
    pub(crate) fn tick(&mut self, max: usize, mut tick: impl FnMut(&mut Peer) -> bool) {
        let Some(mut at) = self.tick_at else { return };
        for _ in 0..max {
            let Some(&id) = self.ticking.get(at) else {
                self.tick_at = None;
                return;
            };
            let peer = self
                .by_id
                .get_mut(id.0 as usize)
                .and_then(Option::as_deref_mut);
            let goes_on = peer.is_some_and(|peer| {
                let goes_on = tick(peer);
                peer.ticking = goes_on;
                goes_on
            });
            if goes_on {
                at += 1;
            } else {
                self.ticking.swap_remove(at);
            }
        }
        self.tick_at = Some(at);
    }
}

/// The interval in seconds, if there is one; 0 means none.
fn keepalive(config: &PeerConfig) -> Option<u16> {
    config.persistent_keepalive.filter(|&seconds| seconds > 0)
}

impl Peer {
    fn new(config: Arc<PeerConfig>, shared: Arc<PeerShared>, slot: u16, roam: bool) -> Peer {
        Peer {
            id: config.id,
            config,
            shared,
            session: None,
            slot,
            path: if roam {
                Path::following()
            } else {
                Path::default()
            },
            waiting: Waiting::default(),
            ticking: false,
        }
    }

    /// Takes over a configuration with the same public key. What the session cannot change while it
    /// lives ends it.
    fn reconfigure(&mut self, config: Arc<PeerConfig>) {
        let goes_on = self
            .session
            .as_mut()
            .is_none_or(|session| session.reconfigure(&self.config, &config));
        if !goes_on {
            self.session = None;
        }
        self.config = config;
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
    pub(crate) fn ready(&self) -> bool {
        self.session.as_ref().is_some_and(Session::ready)
    }

    /// True if nothing will happen before somebody sends or receives.
    pub(crate) fn dormant(&self) -> bool {
        self.waiting.is_empty() && self.session.as_ref().is_none_or(Session::dormant)
    }
}

#[cfg(test)]
mod tests;
