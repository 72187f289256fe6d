//! One pinned thread: its ring, its queue, its peers. The only place that knows the order of rooms.
//!
//! A [turn](Shard::turn) waits for packets, then walks what came through the rooms: inbound first,
//! because acknowledgements free the senders; then outbound; then timers. The clock is read once.
//! Work per turn is bounded by the driver's buffers and the constants below; what is left keeps the
//! shard from sleeping before the next turn.
//!
//! Rooms: `inbound` and `outbound` are the order of rooms, `transmit` where sealed batches leave.

#![forbid(unsafe_code)]

mod inbound;
mod outbound;
mod transmit;

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use crossbeam::queue::ArrayQueue;
#[cfg(test)]
pub(crate) use transmit::RELAY_JOIN_MAX;
use transmit::Transmit;

use crate::classify::INITIATION_LEN;
use crate::coalesce::Coalescer;
use crate::config::{self, DriverKind};
use crate::context::Context;
use crate::filter::Filter;
use crate::hub::{FLOWS_TOLD_MAX, Handed, Hub, Inbox, Network, PINGS_MAX, Settings};
use crate::noise::{Bucket, LOAD_BURST, LOAD_PER_SECOND};
use crate::packet::header::Headers;
use crate::peer::table::{PeerEntry, PeerTable};
use crate::peer::{Guests, Kind, PeerShared, Peers, Way};
use crate::ring::{Driver, Sources, TunRx, UdpRx};
use crate::seal;
use crate::session::{Change, Engine, MESSAGE_LEN_MAX, Opened};
use crate::stats::{DropReason, Meter, Published, Room};
use crate::sys;
use crate::tun::{Merging, Queue};
use crate::types::{Event, PeerId};
use crate::udp::{Sender, Sockets};

/// Path decisions applied per turn at most.
const DECISIONS_PER_TURN_MAX: usize = 256;
/// Handshake messages handled per turn at most, and as many of relays (but for the rest of a batch that
/// is begun): each costs up to four Diffie-Hellman computations.
const HANDSHAKES_PER_TURN_MAX: usize = 8;
/// Batches taken from other shards per turn at most.
const HANDED_PER_TURN_MAX: usize = 16;
/// Reports taken from other shards per turn at most.
const REPORTS_PER_TURN_MAX: usize = 1024;
/// Batches taken from relays per turn at most.
const RELAYED_PER_TURN_MAX: usize = 16;
/// Sessions whose time has come that are called per turn at most.
const TIMEOUTS_PER_TURN_MAX: usize = 256;
/// Initiations because of data that cannot be opened: so many a second, and at once.
const UNOPENED_PER_SECOND: u32 = 50;
const UNOPENED_BURST: u32 = 100;
/// Handshake messages of relays that are handled, so many a second and at once: no address can be proved
/// there. Of one peer as many as it has use for (it sends one in five seconds), of all together as many
/// as the handshake thread takes before it asks for proof.
pub(crate) const RELAYED_PER_SECOND: u32 = 2;
pub(crate) const RELAYED_BURST: u32 = 10;
/// Pings by TSMP that one peer has answered, so many a second and at once.
const PINGS_PER_SECOND: u32 = 10;
const PINGS_BURST: u32 = 10;
/// Who is heard is not asked for a handshake because of such data.
const UNOPENED_QUIET: Duration = Duration::from_secs(1);
/// Counters are published this often while packets flow, and once after.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(5);

/// What a shard is given to live on.
pub(crate) struct Seat {
    pub(crate) id: u8,
    pub(crate) hub: Arc<Hub>,
    /// Of the TUN, one for each shard: it reads its own, and may write to any.
    pub(crate) queues: Arc<[Queue]>,
    /// What is merged for them.
    pub(crate) merging: Arc<Merging>,
    pub(crate) gso: bool,
    pub(crate) driver: DriverKind,
    pub(crate) cpu: Option<usize>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) roam: bool,
    pub(crate) kind: config::Engine,
    pub(crate) published: Published,
}

/// The body of a shard's thread. Says through `ready` whether it could start, and ends unless `go` says
/// that all could. The sockets are those it begins with; nobody here may hold on to them when others
/// come.
///
/// # Errors
/// The driver cannot go on.
pub(crate) fn run(
    seat: Seat,
    sockets: Arc<Sockets>,
    ready: mpsc::Sender<io::Result<()>>,
    go: &mpsc::Receiver<()>,
) -> io::Result<()> {
    if let Some(cpu) = seat.cpu
        && !sys::pin_to(cpu)
    {
        tracing::warn!(shard = seat.id, cpu, "cannot pin");
    }
    let hub = Arc::clone(&seat.hub);
    let inbox = &hub.inboxes[usize::from(seat.id)];
    let sources = Sources {
        tun: seat.queues[usize::from(seat.id)].as_fd(),
        udp: Arc::clone(&sockets),
        wake: inbox.wake.as_fd(),
    };
    let started = Driver::new(seat.driver, sources)
        .map(|driver| (driver, Shard::new(&seat, inbox, sockets, sys::now())));
    let (mut driver, mut shard) = match started {
        Ok(started) => started,
        Err(error) => {
            // Nobody listens only if the start has failed elsewhere already.
            drop(ready.send(Err(error)));
            return Ok(());
        }
    };
    drop(ready.send(Ok(())));
    // Others cannot be told of by those who wait.
    drop(ready);
    if go.recv().is_err() {
        return Ok(());
    }

    let mut tun = Vec::with_capacity(64);
    let mut udp = Vec::with_capacity(64);
    let mut more = false;
    while !hub.stopping() {
        inbox.wake.about_to_sleep();
        let wait = shard.wait(more);
        let found = driver
            .turn(wait, &mut tun, &mut udp, &mut shard.ctx.counters)
            .map_err(|error| failed("the driver failed", &error))?;
        inbox.wake.awake();
        if found.woken {
            inbox.wake.clear();
        }
        if found.tun_gone {
            tracing::error!("the TUN device is gone");
            hub.outbox.event(Event::TunGone);
        }
        more = found.more;
        shard.ctx.now = sys::now();
        shard.ctx.lap(Room::Ring);
        shard.turn(&mut tun, &mut udp);
        if let Some(sockets) = inbox.sockets.pop() {
            driver
                .rebind(Arc::clone(&sockets))
                .map_err(|error| failed("the new sockets cannot be read", &error))?;
            shard.tx.rebind(sockets);
        }
    }
    Ok(())
}

fn failed(what: &str, error: &io::Error) -> io::Error {
    io::Error::other(format!("{what}: {error}"))
}

fn engine(inbox: &Inbox, id: u8, kind: config::Engine, settings: &Settings) -> Option<Engine> {
    let key = settings.private_key.as_ref()?;
    let rng = rand::make_rng();
    let mut engine = Engine::new(kind, key, settings.mtu, id, rng);
    engine.keep_key(settings.previous());
    engine.show_awaited(Arc::clone(&inbox.awaited));
    Some(engine)
}

/// What waits in a queue, so much of it at most.
fn up_to<T>(most: usize, queue: &ArrayQueue<T>) -> impl Iterator<Item = T> {
    std::iter::from_fn(|| queue.pop()).take(most)
}

/// Everything one shard owns but its driver.
struct Shard<'a> {
    id: u8,
    hub: &'a Hub,
    inbox: &'a Inbox,
    queues: &'a [Queue],
    merging: &'a Merging,
    ctx: Context,
    settings: Arc<Settings>,
    kind: config::Engine,
    /// None while there is no private key.
    engine: Option<Engine>,
    peers: Peers,
    guests: Guests,
    table: Arc<PeerTable>,
    filter: Filter,
    opened: Opened,
    /// Packets of `opened` that passed the filter, with their headers.
    passed: Vec<(usize, Headers)>,
    coalescer: Coalescer,
    runs: seal::Runs,
    tx: Transmit,
    published: Published,
    publish_at: Instant,
    unopened: Bucket,
    relayed: Bucket,
    /// Pings of ours that have no answer yet, the latest last.
    pinged: ArrayVec<(PeerId, u64), PINGS_MAX>,
}

impl<'a> Shard<'a> {
    fn new(seat: &'a Seat, inbox: &'a Inbox, sockets: Arc<Sockets>, now: Instant) -> Shard<'a> {
        let sender = Sender::new(sockets, seat.gso);
        let mut coalescer = Coalescer::new();
        coalescer.set_kinds(seat.merging.kinds());
        Shard {
            id: seat.id,
            hub: &seat.hub,
            inbox,
            queues: &seat.queues,
            merging: &seat.merging,
            ctx: Context::new(now),
            settings: Arc::clone(&seat.settings),
            kind: seat.kind,
            engine: engine(inbox, seat.id, seat.kind, &seat.settings),
            peers: Peers::new(seat.roam, seat.hub.inboxes.len()),
            guests: Guests::default(),
            table: Arc::default(),
            filter: Filter::of_one_shard(seat.hub.inboxes.len()),
            opened: Opened::new(seat.kind),
            passed: Vec::with_capacity(128),
            coalescer,
            runs: seal::Runs::new(),
            tx: Transmit::new(Arc::clone(&seat.hub), sender),
            published: seat.published.clone(),
            publish_at: now,
            unopened: Bucket::new(now, UNOPENED_PER_SECOND, UNOPENED_BURST),
            relayed: Bucket::new(now, LOAD_PER_SECOND, LOAD_BURST),
            pinged: ArrayVec::new(),
        }
    }

    /// How long the driver may wait for packets; called with the bell armed.
    fn wait(&self, more: bool) -> Option<Duration> {
        if more || self.hub.stopping() || !self.inbox.is_empty() {
            return Some(Duration::ZERO);
        }
        let next = [
            self.peers.next_deadline(),
            self.guests.report_due(),
            (self.publish_at > self.ctx.now).then_some(self.publish_at),
        ];
        let next = next.into_iter().flatten().min()?;
        Some(next.saturating_duration_since(self.ctx.now))
    }

    fn turn(&mut self, tun: &mut Vec<TunRx>, udp: &mut Vec<UdpRx>) {
        self.ctx.counters.add(Meter::Turns, 1);
        let idle = tun.is_empty() && udp.is_empty();
        self.commands();
        self.reports();
        self.ctx.lap(Room::Shard);

        for batch in udp.drain(..) {
            self.inbound(batch, None);
        }
        self.handed();
        self.relayed();
        // What is opened waits for no handshake.
        self.write_tun();
        self.handshakes();

        let table = Arc::clone(&self.table);
        let mut routes = table.routes.cursor();
        for packet in tun.drain(..) {
            self.outbound(packet, &mut routes, false);
        }
        self.flush_runs();
        self.timers();

        let hub = self.hub;
        self.guests.report(self.ctx.now, |owner, report| {
            hub.tell(owner, |inbox| inbox.reports.push(report).is_ok())
        });
        self.tx.flush_relay();
        for event in self.ctx.events.drain(..) {
            self.hub.outbox.event(event);
        }
        self.publish(idle);
        self.ctx.lap(Room::Shard);
    }

    /// Takes new settings, peers with their rules, path decisions and requests.
    fn commands(&mut self) {
        if let Some(settings) = self.inbox.settings.pop() {
            self.apply(settings);
        }
        if let Some(network) = self.inbox.network.pop() {
            self.apply_network(network);
        }
        for _ in 0..DECISIONS_PER_TURN_MAX {
            let Some((id, aim)) = self.inbox.paths.take() else {
                break;
            };
            // Made after a network that came while we were here: it is for a peer of that one.
            if let Some(network) = self.inbox.network.pop() {
                self.apply_network(network);
            }
            let now = self.ctx.now;
            let Some(peer) = self.peers.get(id) else {
                continue;
            };
            // What waits for an answer to an initiation that may have gone nowhere gets a new one.
            let again = peer.aim(now, aim) && !peer.ready(now);
            let wanted = peer.called || !peer.waiting.is_empty();
            if again && (wanted || peer.session().is_some_and(|s| s.initiating())) {
                self.initiate(id, true);
            }
            self.peers.touch(now, id);
        }
        while let Some(id) = self.inbox.asks.pop() {
            self.initiate(id, false);
        }
        while let Some((id, bytes)) = self.inbox.unopened.pop() {
            self.unopened(id, bytes);
        }
        while let Some((id, ping)) = self.inbox.pings.pop() {
            self.ping(id, &ping);
        }
    }

    /// Takes over peers and rules together; no packet is looked at in between.
    fn apply_network(&mut self, network: Network) {
        let Network {
            table: newer,
            rules,
            peerapi,
        } = network;
        let rules = self.filter.set_rules(self.ctx.now, rules);
        self.filter.set_peerapi(peerapi);
        let table = Arc::clone(&self.table);
        if !Arc::ptr_eq(&table, &newer) {
            self.set_peers(newer);
        }
        self.hub.outbox.retire(Network {
            table,
            rules,
            peerapi,
        });
    }

    /// Takes over the peers that are not as they were, and routes.
    fn set_peers(&mut self, table: Arc<PeerTable>) {
        self.flush_runs();
        let before = std::mem::replace(&mut self.table, table);
        let (id, now) = (self.id, self.ctx.now);
        let (mut wanted, mut dropped) = (Vec::new(), 0);
        let (peers, guests, engine) = (&mut self.peers, &mut self.guests, &mut self.engine);
        let visited = self.table.differences(&before, |peer, before, after| {
            let mine = after.filter(|after| after.owner == id);
            if peers.set(now, engine.as_mut(), peer, mine, &mut dropped) {
                wanted.push(peer);
            }
            let stays = |(before, after): (&PeerEntry, &PeerEntry)| {
                Arc::ptr_eq(&before.shared, &after.shared)
            };
            if !before.zip(after).is_some_and(stays) {
                guests.forget(peer);
            }
        });
        self.ctx.counters.add(Meter::PeersVisited, visited as u64);
        self.ctx.counters.drop_many(DropReason::NoSession, dropped);
        if self.table.moved_since(&before) {
            self.filter.owners_changed();
        }
        for id in wanted {
            self.initiate(id, false);
        }
    }

    /// Takes over our keys and the MTU. Another key ends every session, but where it renews the one before,
    /// or one before that: settings in between may have passed unread.
    fn apply(&mut self, settings: Arc<Settings>) {
        self.flush_runs();
        let before = std::mem::replace(&mut self.settings, Arc::clone(&settings));
        let renewals = settings.renewals.wrapping_sub(before.renewals);
        let goes_on = match (&settings.private_key, &mut self.engine) {
            (None, None) => true,
            (Some(key), Some(engine)) if settings.line == before.line => {
                engine.renew_key(key, renewals, settings.previous())
            }
            _ => false,
        };
        match &mut self.engine {
            Some(engine) if goes_on => {
                engine.set_mtu(settings.mtu);
                if renewals > 0 || settings.previous_key != before.previous_key {
                    self.peers.forget_keys_before(engine);
                }
            }
            _ if goes_on => {}
            _ => {
                self.engine = engine(self.inbox, self.id, self.kind, &settings);
                for id in self.peers.end_sessions() {
                    self.initiate(id, false);
                }
            }
        }
    }

    /// Sends an initiation to a peer of ours, unless one is outstanding (`again`: even then).
    fn initiate(&mut self, id: PeerId, again: bool) {
        let now = self.ctx.now;
        let Some(engine) = &mut self.engine else {
            return;
        };
        let Some(peer) = self.peers.wake(now, id, engine) else {
            return;
        };
        peer.called = peer.path.way(now) == Way::default();
        if peer.called {
            // An initiation would go nowhere, and the one that can go would have to keep its
            // distance from it. The first way to the peer brings us back here.
            let _silent = peer
                .path
                .sending(now, id, Kind::Handshake, &mut self.ctx.events);
            return;
        }
        let mut out = [0; MESSAGE_LEN_MAX];
        let Some(session) = peer.session() else {
            return;
        };
        if let Some(len) = session.initiate(engine, self.ctx.moment(), again, &mut out) {
            self.tx
                .message(&mut self.ctx, peer, Kind::Handshake, &out[..len]);
        }
        self.peers.touch(now, id);
    }

    /// So many bytes came from where the peer is that no session of ours can open. We may have been
    /// started anew, or have slept, and the peer goes on with keys that we have lost: it gets one
    /// initiation, along its path as it is.
    ///
    /// Anybody may have sent them. So it costs the peer's credit, not more than what came; there is no
    /// repetition, and no look for other ways, which a first packet of ours would bring; and peers that
    /// are heard otherwise are left alone.
    fn unopened(&mut self, id: PeerId, bytes: usize) {
        let now = self.ctx.now;
        let Some(peer) = self.peers.get(id) else {
            return;
        };
        if peer.path.heard_within(now, UNOPENED_QUIET) {
            return;
        }
        let brought = peer.unopened.add(now, bytes);
        let way = peer.path.way(now);
        let ways = usize::from(way.udp.is_some()) + usize::from(way.relay.is_some());
        if ways == 0 || brought < ways * INITIATION_LEN {
            return;
        }
        let Some(engine) = &mut self.engine else {
            return;
        };
        let Some(peer) = self.peers.wake(now, id, engine) else {
            return;
        };
        let mut out = [0; MESSAGE_LEN_MAX];
        if let Some(session) = peer.session()
            && session.may_initiate(now)
            && self.unopened.take(now)
            && let Some(len) = session.initiate_once(engine, self.ctx.moment(), &mut out)
        {
            peer.unopened.clear();
            self.tx
                .message(&mut self.ctx, peer, Kind::Keepalive, &out[..len]);
        }
        self.peers.touch(now, id);
    }

    /// Takes note of what other shards have sealed for peers of this one, and of flows they have
    /// begun: before anything that came in, for it may be the reply.
    fn reports(&mut self) {
        // As many as can wait: a reply may be next.
        for flow in up_to(FLOWS_TOLD_MAX, &self.inbox.flows) {
            self.filter.learn(self.ctx.now, flow);
        }
        for report in up_to(REPORTS_PER_TURN_MAX, &self.inbox.reports) {
            let now = self.ctx.now;
            if let Some(peer) = self.peers.get(report.peer) {
                peer.reported(now, report, self.engine.as_mut(), &mut self.ctx.events);
                self.peers.touch(now, report.peer);
            }
        }
    }

    /// Takes what other shards have handed over.
    fn handed(&mut self) {
        let mut packets_of: ArrayVec<Arc<PeerShared>, HANDED_PER_TURN_MAX> = ArrayVec::new();
        for handed in up_to(HANDED_PER_TURN_MAX, &self.inbox.handed) {
            match handed {
                Handed::Udp(batch, others) => self.inbound(batch, Some(others)),
                Handed::Tun(packet, shared) => {
                    let table = Arc::clone(&self.table);
                    self.outbound(packet, &mut table.routes.cursor(), true);
                    packets_of.push(shared);
                }
            }
        }
        if !packets_of.is_empty() {
            self.flush_runs();
            packets_of.iter().for_each(|shared| shared.loan.arrived());
        }
    }

    /// Hands something over to the shard that owns it; a full lane drops it, and false is returned.
    fn hand_over(&mut self, shard: u8, packets: u64, what: Handed) -> bool {
        let counters = &mut self.ctx.counters;
        let Some(inbox) = self.hub.inboxes.get(usize::from(shard)) else {
            counters.drop_many(DropReason::UnknownIndex, packets);
            return false;
        };
        let room = inbox.handed.push(what).is_ok();
        if room {
            counters.add(Meter::HandedOver, packets);
            inbox.wake.ring();
        } else {
            counters.drop_many(DropReason::HandOverFull, packets);
        }
        room
    }

    /// Lets time pass for the peers that want it now.
    fn timers(&mut self) {
        for _ in 0..TIMEOUTS_PER_TURN_MAX {
            let Some(id) = self.peers.take_due(self.ctx.now) else {
                return;
            };
            self.timeout(id);
            self.peers.touch(self.ctx.now, id);
        }
    }

    fn timeout(&mut self, id: PeerId) {
        let (now, Some(peer)) = (self.ctx.now, self.peers.get(id)) else {
            return;
        };
        let quiet_for = peer.path.quiet_for(now);
        if let (Some(engine), Some(session)) = (&mut self.engine, peer.session())
            && session.poll_timeout().is_some_and(|at| at <= now)
        {
            let at = self.ctx.moment();
            let mut out = [0; MESSAGE_LEN_MAX];
            let outcome = session.handle_timeout(engine, at, quiet_for, &mut out);
            self.tx.outcome(&mut self.ctx, peer, &outcome, &out);
            if outcome.change == Change::Down {
                self.ctx.events.push(Event::SessionDown(id));
            }
        }
        // Not when keys end: what waits may have begun to in this turn, and asked for new ones. Nor when
        // trying ends, which our engine does this long after the newest packet.
        let dropped = self.peers.drop_stale(now, id);
        self.ctx.counters.drop_many(DropReason::NoSession, dropped);
    }

    /// Makes the counters visible every few milliseconds while packets flow, and once after.
    fn publish(&mut self, idle: bool) {
        if self.ctx.now >= self.publish_at {
            self.ctx
                .counters
                .add(Meter::FlowsEvicted, self.filter.take_evicted());
            if let Some(at) = self.filter.forgotten() {
                self.hub.has_forgotten(self.id, at);
            }
            self.ctx.tell_waiting(PUBLISH_INTERVAL);
            self.published.publish(&self.ctx.counters);
            if !idle {
                self.publish_at = self.ctx.now + PUBLISH_INTERVAL;
            }
        }
    }
}

#[cfg(test)]
mod tests;
