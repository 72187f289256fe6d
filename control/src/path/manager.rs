//! All peers of a node behind the verbs of a core.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use rand::rngs::StdRng;
use ringtail_dataplane::{Activity, Class, PEERS_MAX, PathDecision, PeerId, RegionId, classify};

use super::candidate::candidates_max;
use super::limit::{KEY_OPENS_PER_S, Limit, OPENS_RESERVE};
use super::peer::{Peer, PeerKey};
use super::plain::Plain;
use super::seen::Seen;
use super::shared::Shared;
use super::{
    CACHED_PATH_AGE_MAX, CACHED_PATHS_MAX, CachedPath, Config, Drop, Event, Heard, LinkChange,
    PeerSetup, PingId, Purpose, Route, Status, Transmit,
};
use crate::disco::{self, Message, OpenError, ParseError, SharedKey};
use crate::key::{DiscoPrivate, DiscoPublic, NodePublic};

/// The path machines of all peers.
///
/// After every verb that takes `&mut self`, drain [`Self::poll_transmit`], [`Self::poll_decision`]
/// and [`Self::poll_event`], then sleep until [`Self::poll_timeout`].
pub struct Manager {
    shared: Shared,
    disco: DiscoPrivate,
    peers: BTreeMap<PeerId, Peer>,
    /// Those that are but WireGuard peers; nobody is here and there.
    plain: BTreeMap<PeerId, Plain>,
    /// Of each of them.
    candidates_max: usize,
    by_node: BTreeMap<NodePublic, PeerId>,
    /// Several nodes of one process share a DISCO key.
    by_disco: BTreeMap<DiscoPublic, Sender>,
    /// When each peer wants to be looked at, in order; the other way round in `due_of`.
    due: BTreeSet<(Instant, PeerId)>,
    due_of: BTreeMap<PeerId, Instant>,
    decisions: VecDeque<PeerId>,
    undelivered: BTreeMap<PeerId, PathDecision>,
    pings: u64,
}

/// A DISCO key of peers.
struct Sender {
    secret: Arc<SharedKey>,
    ids: Vec<PeerId>,
    /// Datagrams that may be opened.
    opens: Limit,
    seen: Seen,
}

impl Manager {
    /// A manager without peers, for the node with these keys. `rng` makes transaction ids and
    /// nonces: seed it from the operating system.
    pub fn new(
        now: Instant,
        config: Config,
        node_key: NodePublic,
        disco: DiscoPrivate,
        rng: StdRng,
    ) -> Self {
        Self {
            shared: Shared::new(now, config, node_key, disco.public(), rng),
            disco,
            peers: BTreeMap::new(),
            plain: BTreeMap::new(),
            candidates_max: candidates_max(0),
            by_node: BTreeMap::new(),
            by_disco: BTreeMap::new(),
            due: BTreeSet::new(),
            due_of: BTreeMap::new(),
            decisions: VecDeque::new(),
            undelivered: BTreeMap::new(),
            pings: 0,
        }
    }

    /// Takes peers that are new or another, at most [`PEERS_MAX`] in all, and those that are no more.
    /// One whose node key is unchanged keeps its paths; under another node key an id is a new peer. A
    /// changed home, endpoint or DISCO key wakes a held peer. Others are not touched.
    pub fn set_peers(&mut self, now: Instant, peers: &[PeerSetup], gone: &[PeerId]) {
        for id in gone {
            self.forget(*id);
        }
        let new = peers
            .iter()
            .filter(|setup| !self.peers.contains_key(&setup.id));
        let max = candidates_max(self.peers.len() + new.count());
        if std::mem::replace(&mut self.candidates_max, max) != max {
            for peer in self.peers.values_mut() {
                peer.set_candidates_max(max);
            }
        }
        for setup in peers {
            let plain = self.plain.get(&setup.id).map(|known| known.node_key);
            let known = self.peers.get(&setup.id).map(|known| known.node_key);
            let another = known.or(plain).is_some_and(|key| key != setup.node_key);
            if another || plain.is_some() != setup.is_plain() {
                self.forget(setup.id);
            }
            let known = self.peers.get(&setup.id);
            if known.is_none() && self.peers.len() + self.plain.len() >= PEERS_MAX {
                continue;
            }
            if setup.is_plain() {
                self.set_plain(now, setup);
                continue;
            }
            let before = known.and_then(Peer::disco_key);
            let secret = setup
                .disco_key
                .and_then(|public| self.know(now, public, setup.id));
            let peer = self
                .peers
                .entry(setup.id)
                .or_insert_with(|| Peer::new(now, setup, secret.clone()));
            let after = secret.as_ref().map(|key| key.public);
            if peer.disco_key() != after {
                peer.set_key(now, &mut self.shared, secret);
            }
            peer.set_candidates_max(max);
            peer.set(now, &mut self.shared, setup);
            if before != after {
                self.disown(before, setup.id);
            }
            self.by_node.insert(setup.node_key, setup.id);
            self.settle(now, setup.id);
        }
    }

    fn set_plain(&mut self, now: Instant, setup: &PeerSetup) {
        let new = || Plain::new(now, setup.node_key);
        let plain = self.plain.entry(setup.id).or_insert_with(new);
        let admission = &self.shared.admission;
        let moved = plain.set(now, setup, |addr| admission.admits(addr));
        self.by_node.insert(setup.node_key, setup.id);
        self.tell_plain(setup.id, moved);
    }

    /// Gives the decision about a plain peer that has moved.
    fn tell_plain(&mut self, id: PeerId, moved: bool) {
        if let Some(plain) = self.plain.get(&id).filter(|_| moved)
            && self.undelivered.insert(id, plain.decision()).is_none()
        {
            self.decisions.push_back(id);
        }
    }

    /// We have another node key from now on.
    pub fn set_own_key(&mut self, node_key: NodePublic) {
        self.shared.node_key = node_key;
    }

    /// Whether this peer is known, by these keys.
    pub fn has(&self, setup: &PeerSetup) -> bool {
        if setup.is_plain() {
            let known = self.plain.get(&setup.id);
            return known.is_some_and(|known| known.node_key == setup.node_key);
        }
        let known = self.peers.get(&setup.id);
        known.is_some_and(|known| {
            known.node_key == setup.node_key && known.disco_key() == setup.disco_key
        })
    }

    /// The DISCO key as this peer's, among others; none for one that is no key.
    fn know(&mut self, now: Instant, public: DiscoPublic, id: PeerId) -> Option<PeerKey> {
        let sender = match self.by_disco.entry(public) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let secret = SharedKey::new(&self.disco, &public)?;
                place.insert(Sender {
                    secret: Arc::new(secret),
                    ids: Vec::new(),
                    opens: Limit::new(now, KEY_OPENS_PER_S),
                    seen: Seen::default(),
                })
            }
        };
        if let Err(place) = sender.ids.binary_search(&id) {
            sender.ids.insert(place, id);
        }
        let secret = Arc::clone(&sender.secret);
        Some(PeerKey { public, secret })
    }

    /// A DISCO key is not this peer's any more.
    fn disown(&mut self, public: Option<DiscoPublic>, id: PeerId) {
        if let Some(public) = public
            && let Some(sender) = self.by_disco.get_mut(&public)
        {
            sender.ids.retain(|other| *other != id);
            if sender.ids.is_empty() {
                self.by_disco.remove(&public);
            }
        }
    }

    fn forget(&mut self, id: PeerId) {
        if let Some(plain) = self.plain.remove(&id) {
            self.undelivered.remove(&id);
            if self.by_node.get(&plain.node_key) == Some(&id) {
                self.by_node.remove(&plain.node_key);
            }
        }
        let Some(peer) = self.peers.remove(&id) else {
            return;
        };
        self.undelivered.remove(&id);
        self.unschedule(id);
        self.disown(peer.disco_key(), id);
        if self.by_node.get(&peer.node_key) == Some(&id) {
            self.by_node.remove(&peer.node_key);
        }
    }

    /// Takes the own endpoints found by a netcheck, best first; those beyond
    /// [`OWN_ENDPOINTS_MAX`](super::OWN_ENDPOINTS_MAX) are not announced. To be called after every
    /// check, changed or not: it says how fresh they are.
    pub fn set_own_endpoints(&mut self, now: Instant, endpoints: Vec<SocketAddr>) {
        let changed = self.shared.set_own(now, endpoints);
        self.for_all(now, |peer, shared| peer.own_endpoints(now, shared, changed));
    }

    /// Takes the nodes' own addresses inside the tunnel, which are never candidates, and returns those
    /// that were none before or are none now: a peer with endpoints there is to be set again.
    pub fn set_inner_addresses(&mut self, inner: BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        let before = std::mem::replace(&mut self.shared.admission.inner, inner);
        let now = &self.shared.admission.inner;
        before.symmetric_difference(now).copied().collect()
    }

    /// The network under us changed, or a port mapping or the NAT's behaviour did (minor).
    pub fn handle_link_change(&mut self, now: Instant, change: LinkChange) {
        self.shared
            .want_restun(now, super::RestunReason::LinkChange);
        self.for_all(now, |peer, shared| peer.link_changed(now, shared, change));
    }

    /// Takes a DISCO datagram from the underlay port, received at `now`, and says what it was.
    ///
    /// # Errors
    /// Why it was dropped; it has been counted under that name.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        from: SocketAddr,
        bytes: &[u8],
    ) -> Result<Heard, Drop> {
        let result = self.datagram(now, canonical(from), bytes);
        self.counted(result)
    }

    /// Takes a DISCO datagram that came by relay from the node `source`.
    ///
    /// # Errors
    /// Why it was dropped; it has been counted under that name.
    pub fn handle_relayed(
        &mut self,
        now: Instant,
        region: RegionId,
        source: NodePublic,
        bytes: &[u8],
    ) -> Result<(), Drop> {
        let result = self.relayed(now, region, source, bytes);
        self.counted(result)
    }

    /// WireGuard packets of the peer came by this relay: the way back if it has no known home, and
    /// a reason to ask the direct path whether it still works. Once per batch is enough.
    pub fn handle_relay_arrival(&mut self, now: Instant, peer: PeerId, region: RegionId) {
        let news = |peer: &Peer| !peer.expects_relayed(region);
        if self.peers.get(&peer).is_some_and(news) {
            self.with(now, peer, |peer, shared| {
                peer.heard_by_relay(now, shared, region)
            });
        }
    }

    /// Takes news of the data plane, with the activity of the peer they are about.
    pub fn handle_event(
        &mut self,
        now: Instant,
        event: &ringtail_dataplane::Event,
        activity: &Activity,
    ) {
        match *event {
            ringtail_dataplane::Event::Kick(id) => {
                self.with(now, id, |peer, shared| peer.kicked(now, shared, activity));
            }
            ringtail_dataplane::Event::Active(id) => {
                self.with(now, id, |peer, shared| {
                    peer.activated(now, shared, activity)
                });
            }
            ringtail_dataplane::Event::Silent(id) => {
                self.with(now, id, |peer, shared| peer.silent(now, shared, activity));
            }
            ringtail_dataplane::Event::NewSource(id, from) => {
                let from = canonical(from);
                let admits = self.shared.admission.admits(from);
                if let Some(plain) = self.plain.get_mut(&id).filter(|_| admits) {
                    let moved = plain.move_to(now, from);
                    self.tell_plain(id, moved);
                }
                self.with(now, id, |peer, shared| peer.new_source(now, shared, from));
            }
            ringtail_dataplane::Event::SendError(id, to, errno) => {
                self.handle_send_error(now, id, to, errno);
            }
            ringtail_dataplane::Event::SessionUp(_)
            | ringtail_dataplane::Event::SessionDown(_)
            | ringtail_dataplane::Event::Pong(..)
            | ringtail_dataplane::Event::Unopened(..)
            | ringtail_dataplane::Event::TunGone
            | ringtail_dataplane::Event::Failed(_) => {}
        }
    }

    /// Sending to the peer at `to` failed with this errno: data, or a [`Transmit`].
    pub fn handle_send_error(&mut self, now: Instant, id: PeerId, to: SocketAddr, errno: i32) {
        self.with(now, id, |peer, shared| {
            peer.send_error(now, shared, to, errno)
        });
    }

    /// The kernel refused a don't-fragment [`Transmit`] to the peer at `to`, of `len` bytes: it is
    /// larger than the device's MTU (`EMSGSIZE`).
    pub fn handle_too_big(&mut self, now: Instant, id: PeerId, to: SocketAddr, len: usize) {
        self.with(now, id, |peer, shared| peer.too_big(now, shared, to, len));
    }

    /// Does what is due. `activity` reads what the shards know of a peer's traffic.
    pub fn handle_timeout(&mut self, now: Instant, activity: &dyn Fn(PeerId) -> Activity) {
        while let Some((at, id)) = self.due.first().copied()
            && at <= now
        {
            self.unschedule(id);
            let activity = || activity(id);
            self.with(now, id, |peer, shared| {
                peer.handle_timeout(now, shared, &activity)
            });
        }
    }

    /// When [`Self::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.shared.transmits.pop_front()
    }

    /// The next changed decision, for the data plane's `set_path`; only the newest per peer. Every
    /// Pong from the address in use renews `trust_until` and thereby gives a new one.
    pub fn poll_decision(&mut self) -> Option<(PeerId, PathDecision)> {
        loop {
            let id = self.decisions.pop_front()?;
            if let Some(decision) = self.undelivered.remove(&id) {
                return Some((id, decision));
            }
        }
    }

    /// The next event: first what the driver must do, then the story, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.shared.poll_event()
    }

    /// Pings a peer for a user, by the direct path if there is one, else by relay and to all
    /// candidates. The first answer of each way comes as [`Event::PingReply`]; `None` if the peer is
    /// unknown or there is no way to reach it.
    pub fn ping(&mut self, now: Instant, peer: PeerId) -> Option<PingId> {
        self.pings += 1;
        let id = PingId(self.pings);
        let sent = self.with(now, peer, |peer, shared| {
            peer.user_ping(now, shared, Purpose::User(id))
        });
        sent.unwrap_or(false).then_some(id)
    }

    /// Whether a peer speaks no DISCO and has no relay.
    pub fn is_plain(&self, peer: PeerId) -> bool {
        self.plain.contains_key(&peer)
    }

    /// How a peer is reached now.
    pub fn status(&self, now: Instant, peer: PeerId) -> Option<Status> {
        let plain = || self.plain.get(&peer).map(|plain| plain.status(now));
        let peer = self.peers.get(&peer);
        peer.map(|peer| peer.status(now, &self.shared))
            .or_else(plain)
    }

    /// The id of a node.
    pub fn peer_of(&self, node_key: &NodePublic) -> Option<PeerId> {
        self.by_node.get(node_key).copied()
    }

    /// The peer that is known to be at this address, by its best one rather than by a candidate. All
    /// are asked, in one walk; the data plane lets twenty such questions a second through, and an
    /// index by address would be some 20 MiB for 10,000 peers.
    pub fn peer_at(&self, addr: SocketAddr) -> Option<PeerId> {
        let addr = canonical(addr);
        let is_there = |(_, plain): &(&PeerId, &Plain)| plain.at == Some(addr);
        if let Some((id, _)) = self.plain.iter().find(is_there) {
            return Some(*id);
        }
        let mut candidate_of = None;
        for (id, peer) in &self.peers {
            if peer.best_addr() == Some(addr) {
                return Some(*id);
            }
            if candidate_of.is_none() && peer.has_candidate(&addr) {
                candidate_of = Some(*id);
            }
        }
        candidate_of
    }

    /// Paths worth remembering over a restart, at most [`CACHED_PATHS_MAX`] per peer.
    pub fn cached_paths(&self, now: Instant) -> Vec<CachedPath> {
        let mut all = Vec::new();
        for peer in self.peers.values() {
            let best = peer.status(now, &self.shared).best;
            let worked = peer.worked(now).into_iter().take(CACHED_PATHS_MAX);
            all.extend(worked.map(|(addr, age, rtt)| {
                CachedPath {
                    node_key: peer.node_key,
                    addr,
                    age,
                    rtt,
                    mtu: best
                        .filter(|best| best.addr == addr)
                        .and_then(|best| best.mtu)
                        .unwrap_or(super::mtu::MTU_UNPROVED),
                }
            }));
        }
        all
    }

    /// Takes paths remembered from an earlier run, after [`Self::set_peers`]: they are pinged in the
    /// first round, and used for nothing before they answer. Old ones are ignored.
    pub fn load_cached_paths(&mut self, now: Instant, paths: &[CachedPath]) {
        let mut taken: BTreeMap<NodePublic, usize> = BTreeMap::new();
        for path in paths {
            let count = taken.entry(path.node_key).or_default();
            let fresh = path.age <= CACHED_PATH_AGE_MAX && *count < CACHED_PATHS_MAX;
            if !fresh || !self.shared.admission.admits_named(path.addr) {
                continue;
            }
            *count += 1;
            if let Some(id) = self.peer_of(&path.node_key) {
                self.with(now, id, |peer, _| peer.remember(now, path.addr));
            }
        }
    }

    /// Everything dropped so far, by name.
    pub fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counters = self.shared.counters.iter();
        counters.map(|(drop, count)| (drop.name(), count))
    }

    fn counted<T>(&mut self, result: Result<T, Drop>) -> Result<T, Drop> {
        result.inspect_err(|drop| self.shared.counters.count(*drop))
    }

    /// The DISCO key that a datagram bears, if it is a peer's: strangers cost no cryptography.
    fn sender(&self, bytes: &[u8]) -> Result<DiscoPublic, Drop> {
        if classify(bytes) == Class::PeerRelay {
            return Err(Drop::PeerRelay);
        }
        let sender = disco::sender(bytes).ok_or(Drop::NotDisco)?;
        let known = self.by_disco.contains_key(&sender);
        known.then_some(sender).ok_or(Drop::UnknownSender)
    }

    /// Opens a datagram that bears a peer's key, unless it was seen before or there are too many.
    /// `expected` says that it came from where the peer is known to be.
    fn open(
        &mut self,
        now: Instant,
        sender: &DiscoPublic,
        bytes: &[u8],
        expected: bool,
    ) -> Result<Message, Drop> {
        let sender = self.by_disco.get_mut(sender).ok_or(Drop::UnknownSender)?;
        let nonce = disco::nonce(bytes).ok_or(Drop::Malformed)?;
        if sender.seen.contains(nonce) {
            return Err(Drop::Replayed);
        }
        let reserve = if expected { 0 } else { OPENS_RESERVE };
        if !sender.opens.take(now, reserve) {
            return Err(Drop::OpenRate);
        }
        let plain = sender.secret.open(bytes).map_err(|error| match error {
            OpenError::Short => Drop::Malformed,
            OpenError::Forged => Drop::Forged,
        })?;
        sender.seen.insert(nonce);
        Message::parse(&plain).map_err(|error| match error {
            ParseError::Short => Drop::Malformed,
            ParseError::PeerRelay => Drop::PeerRelay,
            ParseError::UnknownType => Drop::UnknownType,
        })
    }

    fn ids_of(&self, sender: &DiscoPublic) -> Vec<PeerId> {
        let sender = self.by_disco.get(sender);
        sender.map_or_else(Vec::new, |sender| sender.ids.clone())
    }

    fn datagram(&mut self, now: Instant, from: SocketAddr, bytes: &[u8]) -> Result<Heard, Drop> {
        let sender = self.sender(bytes)?;
        if !self.shared.admission.admits(from) {
            return Err(Drop::BadSource);
        }
        let ids = self.ids_of(&sender);
        let answers = |id| self.peers.get(id).is_some_and(|peer| peer.answers(&from));
        let expected = ids.iter().any(answers);
        let message = self.open(now, &sender, bytes, expected)?;
        match message {
            Message::Ping {
                tx_id, node_key, ..
            } => {
                // The node key is a hint: it counts if that node owns the DISCO key.
                let hinted = node_key.and_then(|key| self.peer_of(&key));
                let hinted = hinted.filter(|id| ids.contains(id));
                let about = hinted.map_or_else(|| ids.clone(), |id| vec![id]);
                for id in &about {
                    let heard = self.with(now, *id, |peer, shared| {
                        peer.ping_received(now, shared, from, tx_id)
                    });
                    heard.unwrap_or(Ok(()))?;
                }
                let answering = about.first().copied().ok_or(Drop::UnknownSender)?;
                let route = Route::Direct(from);
                let sent = self.with(now, answering, |peer, shared| {
                    peer.pong(now, shared, route, tx_id)
                });
                sent.unwrap_or(Ok(())).map(|()| Heard::Ping)
            }
            Message::Pong { tx_id, source } => self
                .pong(now, &ids, true, &tx_id, source)
                .map(|()| Heard::Pong),
            Message::CallMeMaybe { .. } => Err(Drop::CallMeMaybeOverUdp),
        }
    }

    fn relayed(
        &mut self,
        now: Instant,
        region: RegionId,
        source: NodePublic,
        bytes: &[u8],
    ) -> Result<(), Drop> {
        let sender = self.sender(bytes)?;
        let id = self.peer_of(&source).ok_or(Drop::WrongRelaySource)?;
        if !self.ids_of(&sender).contains(&id) {
            return Err(Drop::WrongRelaySource);
        }
        let message = self.open(now, &sender, bytes, true)?;
        let about = match message {
            Message::Ping { tx_id, .. } => self.with(now, id, |peer, shared| {
                peer.relay_is(region);
                peer.relayed_ping_received(now, shared, region, tx_id)
            }),
            Message::Pong { tx_id, source } => {
                return self.pong(now, &[id], false, &tx_id, source);
            }
            Message::CallMeMaybe { endpoints } => self.with(now, id, |peer, shared| {
                peer.relay_is(region);
                peer.called(now, shared, &endpoints)
            }),
        };
        about.unwrap_or(Ok(()))
    }

    fn pong(
        &mut self,
        now: Instant,
        ids: &[PeerId],
        direct: bool,
        tx_id: &disco::TxId,
        source: SocketAddr,
    ) -> Result<(), Drop> {
        for id in ids {
            let taken = self.with(now, *id, |peer, shared| {
                peer.pong_received(now, shared, direct, tx_id, source)
            });
            if taken == Some(Ok(())) {
                return Ok(());
            }
        }
        Err(Drop::UnknownPong)
    }

    /// Runs something on a peer, then looks after its timer and its decision.
    fn with<T>(
        &mut self,
        now: Instant,
        id: PeerId,
        what: impl FnOnce(&mut Peer, &mut Shared) -> T,
    ) -> Option<T> {
        let done = what(self.peers.get_mut(&id)?, &mut self.shared);
        self.settle(now, id);
        Some(done)
    }

    fn for_all(&mut self, now: Instant, mut what: impl FnMut(&mut Peer, &mut Shared)) {
        let ids: Vec<PeerId> = self.peers.keys().copied().collect();
        for id in ids {
            self.with(now, id, &mut what);
        }
    }

    fn settle(&mut self, now: Instant, id: PeerId) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if let Some(decision) = peer.poll_decision(&self.shared)
            && self.undelivered.insert(id, decision).is_none()
        {
            self.decisions.push_back(id);
        }
        let next = peer.next_timeout(now);
        if self.due_of.get(&id).copied() != next {
            self.unschedule(id);
            if let Some(at) = next {
                self.due.insert((at, id));
                self.due_of.insert(id, at);
            }
        }
    }

    fn unschedule(&mut self, id: PeerId) {
        if let Some(at) = self.due_of.remove(&id) {
            self.due.remove(&(at, id));
        }
    }
}

/// An IPv4 address as such, also where a dual-stack socket saw it.
fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
