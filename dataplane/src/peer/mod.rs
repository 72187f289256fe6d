//! The peers a shard owns: session, path, packets that wait, and when they want to be called.
//!
//! Nobody walks through all peers: whoever wants to be called at some time stands in a queue of
//! [`Deadlines`], and the others cost nothing.
//!
//! Rooms: `table` is the peers and the routes to them as every thread has them, `shared` what all
//! threads have of one peer, its traffic in `activity`; `path` which way its datagrams go, `guest`
//! peers of other shards, `waiting` packets without a session, `unopened` what no key opened,
//! `deadlines` who is called next.

#![forbid(unsafe_code)]

pub(crate) mod activity;
mod deadlines;
mod guest;
mod path;
mod shared;
pub(crate) mod table;
mod unopened;
mod waiting;

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

pub(crate) use activity::{ActivityBlock, Arrived};
use deadlines::Deadlines;
pub(crate) use guest::{Guest, Guests, Report, Terms};
pub(crate) use path::{Aim, Kind, Path, Source, Way};
pub(crate) use shared::{PeerShared, Whereabouts};
use table::PeerEntry;
use unopened::Unopened;
use waiting::{Budget, Waiting};
#[cfg(test)]
pub(crate) use waiting::{NODE_BYTES_MAX, PACKETS_MAX, QUEUE_COST, SHARD_BYTES_MIN};

use crate::channel::Lent;
use crate::noise::Bucket;
use crate::packet::segment::Plan;
use crate::session::{Engine, Session, Staged, Stamps};
use crate::stats::DropReason;
use crate::sys::socket::Local;
use crate::types::{Event, PEERS_MAX, PeerConfig, PeerId};

/// Whom a run of sealed datagrams is for: a peer of this shard, or a guest.
pub(crate) trait Addressee {
    /// Its id.
    fn id(&self) -> PeerId;

    /// As [`Session::stage`].
    fn stage(
        &mut self,
        engine: &mut Engine,
        plan: &Plan,
        packet: &mut [u8],
        range: Range<usize>,
        out: &mut [u8],
    ) -> Staged;

    /// As [`Session::seal`].
    ///
    /// # Errors
    /// The reason to drop it.
    fn seal(
        &mut self,
        engine: &mut Engine,
        now: Instant,
        messages: &mut [u8],
        stride: usize,
    ) -> Result<(), DropReason>;
}

/// What the kernel found fault with when it was given datagrams, and what is to be made of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Trouble {
    /// The local address is refused: routing chooses again.
    pub(crate) source: bool,
    /// A batch is refused, but not its datagrams one by one.
    pub(crate) gso: bool,
    /// Sending to the address fails with this errno.
    pub(crate) error: Option<(SocketAddr, i32)>,
}

impl Trouble {
    pub(crate) fn any(&self) -> bool {
        *self != Trouble::default()
    }

    pub(crate) fn add(&mut self, newer: Trouble) {
        self.source |= newer.source;
        self.gso |= newer.gso;
        self.error = newer.error.or(self.error);
    }
}

/// One peer that this shard owns.
pub(crate) struct Peer {
    pub(crate) id: PeerId,
    pub(crate) config: Arc<PeerConfig>,
    pub(crate) shared: Arc<PeerShared>,
    /// Made when first needed: it costs a Diffie-Hellman computation.
    session: Option<Session>,
    /// What the session before it knew.
    stamps: Stamps,
    /// What is lent to other shards.
    grant: Option<Lent<Terms>>,
    pub(crate) path: Path,
    pub(crate) waiting: Waiting,
    pub(crate) unopened: Unopened,
    /// What is left of its share in handshake messages by relay; full where there is none.
    pub(crate) relayed: Option<Bucket>,
    /// The same of its share in answers to pings by TSMP.
    pub(crate) pings: Option<Bucket>,
    /// The address that the handshake thread knows it by.
    heard_from: Option<SocketAddr>,
    /// An initiation was asked for when there was no way to the peer: the first way is to bring it.
    pub(crate) called: bool,
}

/// The table.
pub(crate) struct Peers {
    /// Endpoints follow the peers: device mode.
    roam: bool,
    /// There are other shards to lend to.
    lends: bool,
    by_id: Vec<Option<Box<Peer>>>,
    deadlines: Deadlines,
    /// Of what waits at all of them.
    budget: Budget,
}

impl Peers {
    /// The peers of one shard of so many.
    pub(crate) fn new(roam: bool, shards: usize) -> Peers {
        Peers {
            roam,
            lends: shards > 1,
            by_id: Vec::new(),
            deadlines: Deadlines::default(),
            budget: Budget::new(shards),
        }
    }

    /// The peer, if this shard owns it.
    pub(crate) fn get(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.by_id.get_mut(id.0 as usize)?.as_deref_mut()
    }

    /// Keeps what stands for so many packets until there are keys. Returns how many others, of this peer
    /// or another, had to go.
    pub(crate) fn wait(&mut self, now: Instant, id: PeerId, packet: &[u8], packets: u64) -> u64 {
        let Some(peer) = self.by_id.get_mut(id.0 as usize).and_then(Option::as_mut) else {
            return packets;
        };
        let mut dropped = peer
            .waiting
            .push(&mut self.budget, now, id, packet, packets);
        while let Some(loser) = self.budget.loser() {
            let peer = self
                .by_id
                .get_mut(loser.0 as usize)
                .and_then(Option::as_mut);
            let peer = peer.expect("who goes leaves the budget");
            dropped += peer.waiting.drop_oldest(&mut self.budget);
        }
        dropped
    }

    /// Takes the oldest packet that waits for a peer, if it can be sealed now.
    pub(crate) fn next_waiting(&mut self, now: Instant, id: PeerId) -> Option<Box<[u8]>> {
        let peer = self.by_id.get_mut(id.0 as usize)?.as_mut()?;
        if !peer.ready(now) {
            return None;
        }
        peer.waiting.pop(&mut self.budget)
    }

    /// Drops what has waited for too long, and returns how many packets that were.
    pub(crate) fn drop_stale(&mut self, now: Instant, id: PeerId) -> u64 {
        let peer = self.by_id.get_mut(id.0 as usize).and_then(Option::as_mut);
        let stale = peer.filter(|peer| peer.waiting.stale_at().is_some_and(|at| at <= now));
        stale.map_or(0, |peer| peer.waiting.clear(&mut self.budget))
    }

    /// Takes over what is under an id from now on, if this shard owns that: nothing, a new peer, or the
    /// one that is there with another configuration, which keeps session and path. True if it shall
    /// have a session although nobody has anything to send (a persistent keep-alive is new). Adds to
    /// `dropped` the packets that waited for one that is gone.
    pub(crate) fn set(
        &mut self,
        now: Instant,
        engine: Option<&mut Engine>,
        id: PeerId,
        entry: Option<&PeerEntry>,
        dropped: &mut u64,
    ) -> bool {
        let at = id.0 as usize;
        if at >= PEERS_MAX {
            return false;
        }
        let place = self.by_id.get_mut(at);
        // Not by its key: it may have gone and come back between two of our turns.
        let kept = |old: &Peer| entry.is_some_and(|new| Arc::ptr_eq(&old.shared, &new.shared));
        let (mut kept, gone) = match place.and_then(Option::take) {
            Some(old) if kept(&old) => (Some(old), None),
            old => (None, old),
        };
        let kept_alive = kept
            .as_ref()
            .is_some_and(|peer| keepalive(&peer.config).is_some());
        let mut closed = None;
        if let (Some(peer), Some(entry)) = (&mut kept, entry) {
            closed = peer.reconfigure(now, Arc::clone(&entry.config));
        }
        if let Some(mut gone) = gone {
            *dropped += gone.waiting.clear(&mut self.budget);
            closed = gone.session.take();
            self.deadlines.remove(id);
        }
        // Without an engine there are no sessions.
        if let (Some(engine), Some(session)) = (engine, closed) {
            engine.close(session);
        }
        let Some(entry) = entry else { return false };
        let peer = kept.unwrap_or_else(|| Box::new(Peer::new(entry, self.roam)));
        let wanted = keepalive(&peer.config).is_some() && (!kept_alive || peer.session.is_none());
        if self.by_id.len() <= at {
            self.by_id.resize_with(at + 1, || None);
            self.deadlines.make_room(self.by_id.len());
        }
        self.by_id[at] = Some(peer);
        self.touch(now, id);
        wanted
    }

    /// Ends every session: our key has changed, and the engine with it. Returns those that shall have a new one at once,
    /// because packets wait or a persistent keep-alive is set.
    pub(crate) fn end_sessions(&mut self) -> Vec<PeerId> {
        let mut wanted = Vec::new();
        for peer in self.by_id.iter_mut().flatten() {
            if let Some(session) = peer.session.take() {
                peer.stamps = session.stamps();
            }
            peer.grant = None;
            if !peer.waiting.is_empty() || keepalive(&peer.config).is_some() {
                wanted.push(peer.id);
            }
        }
        wanted
    }

    /// Erases what sessions have of keys of ours that count no more.
    pub(crate) fn forget_keys_before(&mut self, engine: &Engine) {
        let peers = self.by_id.iter_mut().flatten();
        for session in peers.filter_map(|peer| peer.session.as_mut()) {
            session.forget_keys_before(engine);
        }
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
            let mut session = engine.session(now, &peer.config);
            session.set_stamps(peer.stamps);
            peer.session = Some(session);
        }
        self.touch(now, id);
        self.get(id)
    }

    /// Looks at when a peer wants to be called next, and at what may be lent to other shards. To be
    /// called once after each batch, decision or report that concerned it, when everything for it has
    /// been sent: what others send with the loan comes later then.
    #[inline]
    pub(crate) fn touch(&mut self, now: Instant, id: PeerId) {
        self.reckon(id);
        if self.lends
            && let Some(peer) = self.get(id)
        {
            peer.lend(now);
        }
    }

    /// Looks at when a peer wants to be called next, while something for it may still be in a run.
    #[inline]
    pub(crate) fn reckon(&mut self, id: PeerId) {
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
    fn new(entry: &PeerEntry, roam: bool) -> Peer {
        Peer {
            id: entry.config.id,
            config: Arc::clone(&entry.config),
            shared: Arc::clone(&entry.shared),
            session: None,
            stamps: Stamps::default(),
            grant: None,
            path: if roam {
                Path::following()
            } else {
                Path::default()
            },
            waiting: Waiting::default(),
            unopened: Unopened::default(),
            relayed: None,
            pings: None,
            heard_from: None,
            called: false,
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

    /// Takes over where the peer is to be sent to. True if it can be reached in a way it could not before.
    pub(crate) fn aim(&mut self, now: Instant, aim: Aim) -> bool {
        let reachable = match aim {
            Aim::Decided(decision) => self.path.decide(now, decision),
            Aim::Endpoint(endpoint) => self.path.set_endpoint(endpoint),
        };
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
        if let Source::Udp(from) = source
            && self.heard_from != Some(from)
        {
            self.heard_from = Some(from);
            self.shared.set_heard_from(from);
        }
        way
    }

    /// The kernel refuses the local address, or routes have changed: routing chooses again.
    pub(crate) fn unstick(&mut self, now: Instant) {
        self.path.unstick(now);
        self.tell_whereabouts();
    }

    /// Draws the consequences of what the kernel found fault with.
    pub(crate) fn troubled(&mut self, now: Instant, trouble: Trouble, events: &mut Vec<Event>) {
        if trouble.source || self.shared.take_unstick() {
            self.unstick(now);
        }
        if trouble.gso {
            self.path.rest_gso(now);
        }
        if let Some((to, errno)) = trouble.error {
            self.path.failed(now, self.id, to, errno, events);
        }
    }

    /// Takes note of what another shard has sealed and sent.
    pub(crate) fn reported(
        &mut self,
        now: Instant,
        report: Report,
        engine: Option<&mut Engine>,
        events: &mut Vec<Event>,
    ) {
        self.path.sent_elsewhere(report.at, self.id, events);
        self.troubled(now, report.trouble, events);
        let heard = self.path.heard_after(report.at);
        if let (Some(session), Some(engine)) = (&mut self.session, engine) {
            session.sealed_elsewhere(engine, now, report.at, heard);
        }
    }

    /// Lends what may be lent now, in place of what was.
    #[inline]
    fn lend(&mut self, now: Instant) {
        let session = self.session.as_ref().filter(|_| self.waiting.is_empty());
        let sealing = session.and_then(|session| session.lend(now));
        let loan = sealing.and_then(|sealing| Some((sealing, self.path.lend(now)?)));
        let Some((sealing, (way, until))) = loan else {
            self.grant = None;
            return;
        };
        let same = self.grant.as_ref();
        if same.is_some_and(|grant| grant.get().are(sealing, way, until)) {
            return;
        }
        let grant = Lent::new(Terms::new(Arc::clone(sealing), way, until));
        self.shared.loan.set(&grant);
        self.grant = Some(grant);
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

impl Addressee for Peer {
    fn id(&self) -> PeerId {
        self.id
    }

    fn stage(
        &mut self,
        engine: &mut Engine,
        plan: &Plan,
        packet: &mut [u8],
        range: Range<usize>,
        out: &mut [u8],
    ) -> Staged {
        self.session
            .as_mut()
            .map_or_else(Staged::default, |session| {
                session.stage(engine, plan, packet, range, out)
            })
    }

    fn seal(
        &mut self,
        engine: &mut Engine,
        now: Instant,
        messages: &mut [u8],
        stride: usize,
    ) -> Result<(), DropReason> {
        let session = self.session.as_mut().ok_or(DropReason::NoSession)?;
        session.seal(engine, now, messages, stride)
    }
}

#[cfg(test)]
mod tests;
