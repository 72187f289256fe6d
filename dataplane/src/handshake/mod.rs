//! The thread that reads handshake messages, so that a flood of them fills sockets of its own and
//! nothing else.
//!
//! What passes the [`Gate`] goes to the shard that owns the peer: an initiation with the one
//! Diffie-Hellman computation that told whose it is, other messages as they came. The thread's work
//! is bounded by its [`Budget`] of processor time.
//!
//! One look takes what waits on every socket, a burst of each in turn, so that none holds the others
//! up: which one a message is on says what it may be worth ([`steer`](crate::udp)), and a flood cannot
//! but fill the one it is on. Who needs a cookie waits in one of two reservoirs ([`Reservoir`]) until the
//! look ends; then as many are drawn as there are cookies to give, and all of them leave in one call.
//!
//! Rooms: `known` is whom the thread knows by address, `budget` what messages may cost, `reservoir` who
//! waits for a cookie; `flood` has the thread meet floods, in tests.

#![forbid(unsafe_code)]

mod budget;
mod known;
mod reservoir;

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use budget::{Budget, PAUSE};
#[cfg(test)]
pub(crate) use known::KNOWN_COST;
use known::KnownAddresses;
use rand::rngs::StdRng;
use reservoir::Reservoir;

use crate::classify::{COOKIE_LEN, owner_shard, receiver_index};
use crate::hub::{HandshakeMessage, Hub, Settings};
use crate::noise::{Gate, LocalKeys, Novelty, PeekedInitiation, Previous, Standing, Verdict};
use crate::peer::table::PeerTable;
use crate::stats::{Counters, DropReason, Meter, Published};
use crate::sys::socket::{Leave, Local, Many, receive_many, send_many, wait_readable};
use crate::sys::{now, thread_time};
use crate::types::PeerId;
use crate::udp::{Door, Doors};

/// Messages read at once.
const BURST_MAX: usize = 32;
/// Bursts read from the sockets of a door before the others get their turn, and the budget is looked at:
/// what is known or answers costs little to tell from a flood.
const BURSTS: [usize; Door::COUNT] = [4, 4, 1, 1];
/// Messages of one look from which on there is pressure.
const PRESSURE_MIN: usize = 64;
/// Who needs a cookie and may get one at the end of a look, at most: of sources that are new, and of
/// others.
const RESERVOIR_LEN_MAX: [usize; 2] = [256, 16];
/// Longest datagram read; a handshake message has 148 bytes, and longer ones only need to be seen
/// to be too long.
const DATAGRAM_LEN_MAX: usize = 256;
/// No limit for a wait.
const FOREVER: i32 = -1;

/// The body of the thread; ends when the hub stops. What the shards publish says whether there is data.
///
/// # Errors
/// It cannot wait, or a socket is none any more.
pub(crate) fn run(
    hub: &Hub,
    mut doors: Arc<Doors>,
    settings: &Settings,
    published: &Published,
    shards: &[Published],
) -> io::Result<()> {
    let pause_ms = i32::try_from(PAUSE.as_millis()).unwrap_or(FOREVER);
    let mut fds = readable(hub, &doors);
    let mut worker = Worker::new(now(), settings, rand::make_rng());
    let mut budget = Budget::new(now());
    let mut used = thread_time();
    let mut pressure = false;
    let mut many = Many::<BURST_MAX, DATAGRAM_LEN_MAX>::new();
    while !hub.stopping() {
        if budget.spent() || pressure {
            wait_readable(&fds[..1], pause_ms)?;
        } else {
            wait_readable(&fds, worker.wait_ms(now()))?;
        }
        hub.handshake_wake.clear();
        worker.hear(hub);
        worker.end_renewal(now(), hub);
        if let Some(newer) = hub.handshake_sockets.pop() {
            doors = newer;
            fds = readable(hub, &doors);
            worker.known.forget_shown();
        }
        let mut taken = 0;
        loop {
            let now = now();
            let before = std::mem::replace(&mut used, thread_time());
            budget.charge(now, used.saturating_sub(before));
            if budget.spent() {
                break;
            }
            let taken_before = taken;
            taken += worker.strays(now, hub);
            for (door, bursts) in doors.each().zip(BURSTS) {
                for socket in door.both() {
                    for _ in 0..bursts {
                        let count = worker.drain(now, hub, socket, &mut many)?;
                        taken += count;
                        if count < BURST_MAX {
                            break;
                        }
                    }
                }
            }
            if taken == taken_before {
                break;
            }
        }
        pressure = taken >= PRESSURE_MIN;
        if pressure {
            budget.mind(now(), || shards.iter().map(moved).sum());
        }
        worker.end_look(now(), hub, &doors, pressure);
        published.publish(&worker.counters);
    }
    Ok(())
}

/// Packets of data that a shard has moved.
fn moved(shard: &Published) -> u64 {
    let shard = shard.read();
    shard.get(Meter::UdpPacketsIn) + shard.get(Meter::TunPacketsIn)
}

fn readable(hub: &Hub, doors: &Doors) -> Vec<RawFd> {
    let bell = hub.handshake_wake.as_fd().as_raw_fd();
    let sockets = doors.each().flat_map(|door| door.both());
    let sockets = sockets.map(AsRawFd::as_raw_fd);
    std::iter::once(bell).chain(sockets).collect()
}

fn local_keys(settings: &Settings) -> Option<Arc<LocalKeys>> {
    let key = settings.private_key.as_ref()?;
    Some(Arc::new(LocalKeys::new(key)))
}

fn previous_keys(settings: &Settings) -> Option<Arc<Previous>> {
    let (key, until) = settings.previous_key.as_ref()?;
    Some(Arc::new(Previous::new(key, *until)))
}

/// What the thread works with: the gate, whom it knows, and what waits.
struct Worker {
    gate: Gate,
    /// When the key before ours counts no more, while there is one.
    renewal_ends: Option<Instant>,
    rng: StdRng,
    /// Peers by public key, with their owner shards: those of `table`.
    peers: HashMap<[u8; 32], (PeerId, u8)>,
    table: Arc<PeerTable>,
    known: KnownAddresses,
    /// Who waits for a cookie, in the order of [`RESERVOIR_LEN_MAX`].
    reservoirs: [Reservoir; 2],
    /// Replies that leave at the end of a look.
    replies: Vec<(Leave, [u8; COOKIE_LEN])>,
    counters: Counters,
}

/// Where a message goes.
#[derive(Debug)]
struct Passed {
    /// Known for an initiation.
    peer: Option<PeerId>,
    peeked: Option<Box<PeekedInitiation>>,
    shard: u8,
}

/// What a peer costs by its key at worst, where every other place is free.
#[cfg(test)]
pub(crate) const KEY_COST: usize = 2 * (size_of::<([u8; 32], (PeerId, u8))>() + 1);

/// What becomes of a message that does not pass.
#[derive(Debug, PartialEq, Eq)]
enum Stopped {
    /// It may get a cookie.
    Unproven(Novelty),
    Dropped(DropReason),
}

impl Worker {
    fn new(now: Instant, settings: &Settings, mut rng: StdRng) -> Worker {
        Worker {
            gate: Gate::new(now, local_keys(settings), &mut rng),
            renewal_ends: None,
            rng,
            peers: HashMap::new(),
            table: Arc::default(),
            known: KnownAddresses::default(),
            reservoirs: RESERVOIR_LEN_MAX.map(Reservoir::new),
            replies: Vec::with_capacity(RESERVOIR_LEN_MAX[0] + RESERVOIR_LEN_MAX[1]),
            counters: Counters::default(),
        }
    }

    /// Takes the newest key and peers.
    fn hear(&mut self, hub: &Hub) {
        if let Some(settings) = hub.handshake_settings.pop() {
            self.gate.set_local(local_keys(&settings));
            self.gate.set_previous(previous_keys(&settings));
            self.renewal_ends = settings.previous_key.as_ref().map(|(_, until)| *until);
        }
        if let Some(table) = hub.handshake_peers.pop() {
            self.set_peers(table);
        }
    }

    /// How long to wait for messages, in milliseconds.
    fn wait_ms(&self, now: Instant) -> i32 {
        self.renewal_ends.map_or(FOREVER, |until| {
            let left = until.saturating_duration_since(now).as_millis() + 1;
            i32::try_from(left).unwrap_or(i32::MAX)
        })
    }

    /// Has every thread erase the key before ours once its time is over.
    fn end_renewal(&mut self, now: Instant, hub: &Hub) {
        if self.renewal_ends.is_some_and(|until| until <= now) {
            self.renewal_ends = None;
            hub.change_settings(|settings| {
                settings.previous_key.take_if(|(_, until)| *until <= now);
            });
        }
    }

    fn set_peers(&mut self, table: Arc<PeerTable>) {
        let peers = &mut self.peers;
        let visited = table.differences(&self.table, |id, before, after| {
            if let Some(before) = before {
                let key = before.config.public_key;
                // Another peer may have its key by now.
                if peers.get(&key).is_some_and(|(of, _)| *of == id) {
                    peers.remove(&key);
                }
            }
            if let Some(after) = after {
                peers.insert(after.config.public_key, (id, after.owner));
            }
        });
        self.counters.add(Meter::PeersVisited, visited as u64);
        self.table = table;
    }

    /// Takes what reached a shard instead, up to a burst; returns how many.
    fn strays(&mut self, now: Instant, hub: &Hub) -> usize {
        for taken in 0..BURST_MAX {
            let Some(stray) = hub.handshake_strays.pop() else {
                return taken;
            };
            self.handle(now, hub, stray.from, stray.local, &stray.bytes);
        }
        BURST_MAX
    }

    /// Takes one burst from a socket; returns how many.
    fn drain(
        &mut self,
        now: Instant,
        hub: &Hub,
        socket: &UdpSocket,
        many: &mut Many<BURST_MAX, DATAGRAM_LEN_MAX>,
    ) -> io::Result<usize> {
        let count = receive_many(socket.as_fd(), many)?;
        if count > 0 {
            self.counters.add(Meter::UdpReceives, 1);
        }
        for (from, local, message) in many.iter() {
            self.counters.add(Meter::UdpPacketsIn, 1);
            self.counters.add(Meter::UdpBytesIn, message.len() as u64);
            self.handle(now, hub, from, local, message);
        }
        Ok(count)
    }

    fn handle(
        &mut self,
        now: Instant,
        hub: &Hub,
        from: SocketAddr,
        local: Option<Local>,
        message: &[u8],
    ) {
        let standing = self.standing(hub, from, message);
        match self.check(now, from, standing, message) {
            Ok(passed) => {
                if let Err(reason) = hand_on(hub, from, local, message, passed) {
                    self.counters.drop_one(reason);
                }
            }
            Err(Stopped::Dropped(reason)) => self.counters.drop_one(reason),
            Err(Stopped::Unproven(novelty)) => {
                if standing == Standing::Known {
                    self.known.pressed(now, hub, from);
                }
                if !self.reservoirs[novelty as usize].offer(from, local, message, &mut self.rng) {
                    self.counters.drop_one(DropReason::HandshakeLimited);
                }
            }
        }
    }

    /// What is known of a message before it is looked at.
    fn standing(&self, hub: &Hub, from: SocketAddr, message: &[u8]) -> Standing {
        match receiver_index(message) {
            Some(index) if hub.awaits(index) => Standing::Awaited,
            Some(_) => Standing::Stranger,
            None if self.known.contains(from) => Standing::Known,
            None => Standing::Stranger,
        }
    }

    /// Judges a message.
    fn check(
        &mut self,
        now: Instant,
        from: SocketAddr,
        standing: Standing,
        message: &[u8],
    ) -> Result<Passed, Stopped> {
        match self
            .gate
            .handle(now, from, standing, message, &mut self.rng)
        {
            Verdict::Initiation(peeked) => {
                let known = self.peers.get(peeked.peer());
                let &(peer, shard) =
                    known.ok_or(Stopped::Dropped(DropReason::HandshakeUnknownPeer))?;
                Ok(Passed {
                    peer: Some(peer),
                    peeked: Some(Box::new(peeked)),
                    shard,
                })
            }
            Verdict::Response(index) | Verdict::CookieReply(index) => Ok(Passed {
                peer: None,
                peeked: None,
                shard: owner_shard(index),
            }),
            Verdict::Unproven(novelty) => Err(Stopped::Unproven(novelty)),
            Verdict::Drop(reason) => Err(Stopped::Dropped(reason)),
        }
    }

    /// Answers those who are drawn, and brings the list of known addresses up to date.
    fn end_look(&mut self, now: Instant, hub: &Hub, doors: &Doors, pressure: bool) {
        self.draw(now);
        for v4 in [true, false] {
            let (ours, theirs) = std::mem::take(&mut self.replies)
                .into_iter()
                .partition(|(leave, _)| leave.to.is_ipv4() == v4);
            self.replies = theirs;
            self.send(doors, &ours);
        }
        self.replies.clear();
        if (pressure || self.gate.under_load(now))
            && let Some(addresses) = self.known.refresh(now, hub.epoch, &self.table)
            && let Err(error) = doors.know(addresses)
        {
            // Known addresses still need no proof; their messages wait among the others.
            tracing::debug!(%error, "known addresses get no socket of their own");
        }
    }

    /// Draws from the reservoirs and writes the replies.
    fn draw(&mut self, now: Instant) {
        for novelty in [Novelty::New, Novelty::Again] {
            while let Some(drawn) = self.reservoirs[novelty as usize].draw(&mut self.rng) {
                let mut reply = [0; COOKIE_LEN];
                let written = self.gate.challenge(
                    now,
                    drawn.from,
                    novelty,
                    &drawn.message,
                    &mut self.rng,
                    &mut reply,
                );
                match written {
                    Ok(()) => {
                        self.counters.drop_one(DropReason::HandshakeCookie);
                        let leave = Leave {
                            local: drawn.local,
                            ..Leave::to(drawn.from)
                        };
                        self.replies.push((leave, reply));
                    }
                    Err(reason) => {
                        self.counters.drop_one(reason);
                        if reason == DropReason::HandshakeLimited {
                            break;
                        }
                    }
                }
            }
            let left = self.reservoirs[novelty as usize].end();
            self.counters.drop_many(DropReason::HandshakeLimited, left);
        }
    }

    /// Sends replies of one family.
    fn send(&mut self, doors: &Doors, replies: &[(Leave, [u8; COOKIE_LEN])]) {
        let Some((first, _)) = replies.first() else {
            return;
        };
        let socket = doors.towards(first.to);
        let sent = socket.map_or(0, |socket| send_many(socket.as_fd(), replies)) as u64;
        self.counters.add(Meter::UdpSends, 1);
        self.counters.add(Meter::UdpPacketsOut, sent);
        self.counters
            .add(Meter::UdpBytesOut, sent * COOKIE_LEN as u64);
    }
}

/// Gives a message to its shard.
///
/// # Errors
/// No shard has sessions under the index it names, or the shard's queue is full.
fn hand_on(
    hub: &Hub,
    from: SocketAddr,
    local: Option<Local>,
    message: &[u8],
    passed: Passed,
) -> Result<(), DropReason> {
    let inbox = hub.inboxes.get(usize::from(passed.shard));
    let inbox = inbox.ok_or(DropReason::UnknownIndex)?;
    let message = HandshakeMessage::new(passed.peer, from, local, message);
    let mut message = message.ok_or(DropReason::MessageLength)?;
    message.peeked = passed.peeked;
    let pushed = inbox.handshakes.push(message);
    inbox.wake.ring();
    pushed.map_err(|_| DropReason::HandshakeQueueFull)
}

#[cfg(test)]
mod flood;
#[cfg(test)]
mod tests;
