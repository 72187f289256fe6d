//! Everything the threads of one data plane share: inboxes towards the shards and the handshake
//! thread, and the outbox towards the control thread. The rooms whose threads these are stand above it.
//!
//! No shard waits for anybody. Settings, sockets and networks go through cells that hold the newest only,
//! from which each reader finds out what has changed for it.
//!
//! Rooms: `outbox` is what waits for the control thread, `strangers` how often it is told of data that
//! no session opens.

#![forbid(unsafe_code)]

mod outbox;
pub(crate) mod strangers;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use arrayvec::ArrayVec;
use crossbeam::queue::ArrayQueue;
use crossbeam::utils::CachePadded;
use outbox::Outbox;
#[cfg(test)]
pub(crate) use outbox::{EVENTS_MAX, RELAY_OUT_BYTES_MAX, RELAY_OUT_ENTRIES_MAX, SPARE_MAX};
use strangers::Strangers;
use zeroize::Zeroizing;

use crate::channel::{Lane, Load, Slots, Wake, lock};
use crate::classify::owner_shard;
use crate::config::{SHARDS_MAX, share};
use crate::filter::CompiledRules;
use crate::noise::PeekedInitiation;
use crate::packet::header::Flow;
use crate::peer::activity::{from_ns, to_ns};
use crate::peer::table::PeerTable;
use crate::peer::{Aim, PeerShared, Report};
use crate::ring::{TunRx, UdpRx};
use crate::session::Awaited;
use crate::sys::EventFd;
use crate::sys::socket::Local;
use crate::types::{PeerApi, PeerId, Ping, RelayBatch};
use crate::udp::{Doors, Sockets};

/// Batches from relays that wait for a shard at most, and the bytes of those that wait for all shards,
/// of which each has some at least.
pub(crate) const RELAY_IN_ENTRIES_MAX: usize = 1024;
pub(crate) const RELAY_IN_BYTES_MAX: usize = 8 << 20;
pub(crate) const RELAY_IN_BYTES_MIN: usize = 512 << 10;
/// Handshake messages that wait for a shard at most.
pub(crate) const HANDSHAKES_MAX: usize = 256;
/// Receive batches and TUN packets that wait for another shard at most.
pub(crate) const HANDED_MAX: usize = 64;
/// Reports of what other shards have sealed that wait for a shard at most.
pub(crate) const REPORTS_MAX: usize = 1024;
/// Flows that other shards have begun or go on with, waiting for a shard at most.
pub(crate) const FLOWS_TOLD_MAX: usize = 4096;
/// Requests for a handshake that wait for a shard at most.
pub(crate) const ASKS_MAX: usize = 256;
/// Notes of data that could not be opened that wait for a shard at most.
pub(crate) const UNOPENED_MAX: usize = 256;
/// Pings of ours that wait for a shard at most, and for their answers there.
pub(crate) const PINGS_MAX: usize = 64;
/// Datagrams for the control or handshake thread that reached a shard, waiting at most.
pub(crate) const STRAYS_MAX: usize = 64;

/// What may change at run time and concerns every session.
#[derive(Clone, Default)]
pub(crate) struct Settings {
    /// Without one nothing handshakes.
    pub(crate) private_key: Option<Zeroizing<[u8; 32]>>,
    /// The key that this one has taken over from, and up to when it counts beside it.
    pub(crate) previous_key: Option<(Zeroizing<[u8; 32]>, Instant)>,
    /// Grows when the key becomes one that does not renew the one before: sessions end.
    pub(crate) line: u32,
    /// Grows when it becomes one that does.
    pub(crate) renewals: u32,
    /// Packets are padded up to this many bytes at most.
    pub(crate) mtu: usize,
}

impl Settings {
    /// The key before ours, and up to when it counts.
    pub(crate) fn previous(&self) -> Option<(&Zeroizing<[u8; 32]>, Instant)> {
        let (key, until) = self.previous_key.as_ref()?;
        Some((key, *until))
    }

    /// Changes the key, or removes it.
    pub(crate) fn set_key(&mut self, key: Option<&Zeroizing<[u8; 32]>>) {
        if self.private_key.as_ref() != key {
            self.private_key = key.cloned();
            self.line = self.line.wrapping_add(1);
        }
        self.previous_key = None;
    }

    /// Renews the key; the one before counts up to a moment. With the same key that is another moment.
    pub(crate) fn renew_key(&mut self, key: &Zeroizing<[u8; 32]>, until: Instant) {
        let before = self.private_key.replace(key.clone());
        let previous = if before.as_ref() == Some(key) {
            self.previous_key.take().map(|(previous, _)| previous)
        } else {
            self.renewals = self.renewals.wrapping_add(1);
            before
        };
        self.previous_key = previous.map(|previous| (previous, until));
    }
}

/// What a shard takes over in one step, so that nobody's packet is judged by one half of it.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) table: Arc<PeerTable>,
    pub(crate) rules: Arc<CompiledRules>,
    pub(crate) peerapi: PeerApi,
}

impl Network {
    /// Nobody, and nothing may come in: what holds until the first is given.
    pub(crate) fn closed() -> Network {
        Network {
            table: Arc::default(),
            rules: Arc::new(CompiledRules::closed()),
            peerapi: PeerApi::default(),
        }
    }
}

impl Load for RelayBatch {
    fn bytes(&self) -> usize {
        self.datagrams.bytes.len()
    }
    fn packets(&self) -> usize {
        self.datagrams.lens.len()
    }
}

/// Longest handshake message: an initiation (WireGuard paper §5.4.2), in bytes.
pub(crate) const HANDSHAKE_LEN_MAX: usize = 148;

/// A handshake message that passed the handshake thread.
#[derive(Debug)]
pub(crate) struct HandshakeMessage {
    /// The peer, where the message names it (an initiation); else the receiver index does.
    pub(crate) peer: Option<PeerId>,
    pub(crate) from: SocketAddr,
    /// Where it arrived, in device mode.
    pub(crate) local: Option<Local>,
    /// Of an initiation, what the handshake thread has computed already; boxed, so that its
    /// secrets stay in one place until they are overwritten.
    pub(crate) peeked: Option<Box<PeekedInitiation>>,
    /// The message.
    pub(crate) bytes: ArrayVec<u8, HANDSHAKE_LEN_MAX>,
}

impl HandshakeMessage {
    /// Copies a message; `None` if it is longer than any can be.
    pub(crate) fn new(
        peer: Option<PeerId>,
        from: SocketAddr,
        local: Option<Local>,
        message: &[u8],
    ) -> Option<HandshakeMessage> {
        Some(HandshakeMessage {
            peer,
            from,
            local,
            peeked: None,
            bytes: message.try_into().ok()?,
        })
    }
}

/// Some of the shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ShardSet(u64);

const _: () = assert!(SHARDS_MAX <= u64::BITS as usize);

impl ShardSet {
    /// Adds a shard, which is below `SHARDS_MAX`.
    pub(crate) fn insert(&mut self, shard: u8) {
        self.0 |= 1 << shard;
    }

    pub(crate) fn contains(self, shard: u8) -> bool {
        usize::from(shard) < SHARDS_MAX && self.0 & (1 << shard) != 0
    }

    /// Takes one out.
    pub(crate) fn take(&mut self) -> Option<u8> {
        let shard = u8::try_from(self.0.trailing_zeros()).ok()?;
        // Of an empty set that is 64, and nothing to clear.
        self.0 &= self.0.wrapping_sub(1);
        (usize::from(shard) < SHARDS_MAX).then_some(shard)
    }
}

/// What one shard hands to another, whole.
pub(crate) enum Handed {
    /// A GRO batch with datagrams of the other's sessions, and who is to see it after it.
    Udp(UdpRx, ShardSet),
    /// A packet or super-packet from the TUN for a peer of the other, counted there until it is sent.
    Tun(TunRx, Arc<PeerShared>),
}

/// What waits for one shard.
pub(crate) struct Inbox {
    pub(crate) wake: Wake,
    pub(crate) settings: ArrayQueue<Arc<Settings>>,
    pub(crate) sockets: ArrayQueue<Arc<Sockets>>,
    pub(crate) network: ArrayQueue<Network>,
    pub(crate) paths: Slots<Aim>,
    pub(crate) asks: ArrayQueue<PeerId>,
    /// Whom data came from that could not be opened, and its bytes.
    pub(crate) unopened: ArrayQueue<(PeerId, usize)>,
    pub(crate) pings: ArrayQueue<(PeerId, Ping)>,
    pub(crate) handshakes: ArrayQueue<HandshakeMessage>,
    pub(crate) relay: Lane<RelayBatch>,
    pub(crate) handed: ArrayQueue<Handed>,
    /// From shards that seal for peers of this one.
    pub(crate) reports: ArrayQueue<Report>,
    pub(crate) flows: ArrayQueue<Flow>,
    /// Under which indexes the shard awaits answers to its handshake messages.
    pub(crate) awaited: Arc<Awaited>,
    /// Up to when the shard's filter has forgotten flows for want of room, for those who seal for it.
    /// Written by the shard alone; see [`Hub::forgotten_by`].
    forgotten: CachePadded<AtomicU64>,
}

impl Inbox {
    /// The inbox of one shard of so many.
    fn new(shards: usize) -> io::Result<Inbox> {
        let relay_bytes_max = share(RELAY_IN_BYTES_MAX, shards, RELAY_IN_BYTES_MIN);
        Ok(Inbox {
            wake: Wake::new()?,
            settings: ArrayQueue::new(1),
            sockets: ArrayQueue::new(1),
            network: ArrayQueue::new(1),
            paths: Slots::new(),
            asks: ArrayQueue::new(ASKS_MAX),
            unopened: ArrayQueue::new(UNOPENED_MAX),
            pings: ArrayQueue::new(PINGS_MAX),
            handshakes: ArrayQueue::new(HANDSHAKES_MAX),
            relay: Lane::new(RELAY_IN_ENTRIES_MAX, relay_bytes_max),
            handed: ArrayQueue::new(HANDED_MAX),
            reports: ArrayQueue::new(REPORTS_MAX),
            flows: ArrayQueue::new(FLOWS_TOLD_MAX),
            awaited: Arc::default(),
            forgotten: CachePadded::default(),
        })
    }

    /// True if the shard may sleep.
    pub(crate) fn is_empty(&self) -> bool {
        self.handed.is_empty()
            && self.reports.is_empty()
            && self.flows.is_empty()
            && self.relay.is_empty()
            && self.handshakes.is_empty()
            && self.paths.is_empty()
            && self.network.is_empty()
            && self.asks.is_empty()
            && self.unopened.is_empty()
            && self.pings.is_empty()
            && self.settings.is_empty()
            && self.sockets.is_empty()
    }
}

/// What all threads share.
pub(crate) struct Hub {
    pub(crate) epoch: Instant,
    pub(crate) stop: AtomicBool,
    pub(crate) inboxes: Box<[Inbox]>,
    /// The newest, for who may wait for a lock: never a shard.
    pub(crate) settings: Mutex<Arc<Settings>>,
    /// For the handshake thread: its bell, and the newest of what it works with.
    pub(crate) handshake_wake: EventFd,
    pub(crate) handshake_settings: ArrayQueue<Arc<Settings>>,
    pub(crate) handshake_sockets: ArrayQueue<Arc<Doors>>,
    pub(crate) handshake_peers: ArrayQueue<Arc<PeerTable>>,
    /// Handshake messages that reached a shard instead.
    pub(crate) handshake_strays: ArrayQueue<HandshakeMessage>,
    pub(crate) outbox: Outbox,
    /// The newest network and mark, for who may wait for a lock: never a shard.
    pub(crate) network: RwLock<Network>,
    pub(crate) mark: AtomicU32,
    /// The bell of the thread that watches routes.
    pub(crate) routes_wake: EventFd,
    pub(crate) strangers: Strangers,
}

impl Hub {
    pub(crate) fn new(epoch: Instant, shards: usize) -> io::Result<Hub> {
        Ok(Hub {
            epoch,
            stop: AtomicBool::new(false),
            inboxes: (0..shards)
                .map(|_| Inbox::new(shards))
                .collect::<io::Result<_>>()?,
            settings: Mutex::default(),
            handshake_wake: EventFd::new()?,
            handshake_settings: ArrayQueue::new(1),
            handshake_sockets: ArrayQueue::new(1),
            handshake_peers: ArrayQueue::new(1),
            handshake_strays: ArrayQueue::new(STRAYS_MAX),
            outbox: Outbox::new(shards)?,
            network: RwLock::new(Network::closed()),
            mark: AtomicU32::new(0),
            routes_wake: EventFd::new()?,
            strangers: Strangers::new(epoch),
        })
    }

    /// Changes the settings of every thread.
    pub(crate) fn change_settings(&self, change: impl FnOnce(&mut Settings)) {
        let mut current = lock(&self.settings);
        let mut settings = Settings::clone(&current);
        change(&mut settings);
        *current = Arc::new(settings);
        for inbox in &self.inboxes {
            drop(inbox.settings.force_push(Arc::clone(&current)));
            inbox.wake.ring();
        }
        drop(self.handshake_settings.force_push(Arc::clone(&current)));
        self.handshake_wake.signal();
    }

    /// Up to when a shard's filter has forgotten flows for want of room, if it has.
    #[inline]
    pub(crate) fn forgotten_by(&self, shard: u8) -> Option<Instant> {
        let inbox = self.inboxes.get(usize::from(shard))?;
        from_ns(self.epoch, inbox.forgotten.load(Ordering::Relaxed))
    }

    /// Says so for a shard.
    pub(crate) fn has_forgotten(&self, shard: u8, at: Instant) {
        if let Some(inbox) = self.inboxes.get(usize::from(shard)) {
            let at = to_ns(self.epoch, at);
            inbox.forgotten.store(at, Ordering::Relaxed);
        }
    }

    /// Puts something into a shard's inbox and wakes it. False if there is no such shard, or if `put` says
    /// that there is no room: what fills it has rung.
    pub(crate) fn tell(&self, shard: u8, put: impl FnOnce(&Inbox) -> bool) -> bool {
        let inbox = self.inboxes.get(usize::from(shard));
        let told = inbox.filter(|inbox| put(inbox));
        if let Some(inbox) = told {
            inbox.wake.ring();
        }
        told.is_some()
    }

    /// As [`Hub::tell`], the owner of a peer; false also if there is no such peer.
    pub(crate) fn tell_owner(&self, peer: PeerId, put: impl FnOnce(&Inbox) -> bool) -> bool {
        let owner = self.table().owner(peer);
        owner.is_some_and(|owner| self.tell(owner, put))
    }

    /// Whether the shard that a receiver index names may await an answer under it.
    pub(crate) fn awaits(&self, index: u32) -> bool {
        let inbox = self.inboxes.get(usize::from(owner_shard(index)));
        inbox.is_some_and(|inbox| inbox.awaited.contains(index))
    }

    /// Tells the owner of a peer where it is to be sent to, and nobody else: others send along what the
    /// owner lends them.
    pub(crate) fn aim(&self, peer: PeerId, aim: Aim) {
        // An id out of range is no peer's.
        let _told = self.tell_owner(peer, |inbox| inbox.paths.set(peer, aim));
    }

    /// Asks every thread to end.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.handshake_wake.signal();
        self.routes_wake.signal();
        for inbox in &self.inboxes {
            inbox.wake.ring();
        }
    }

    /// The newest peers.
    pub(crate) fn table(&self) -> Arc<PeerTable> {
        let network = self.network.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&network.table)
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::now;
    use crate::types::PeerConfig;

    #[test]
    fn a_set_of_shards_gives_each_once() {
        let mut set = ShardSet::default();
        for shard in [63, 5, 0, 5] {
            set.insert(shard);
        }
        assert!(set.contains(63) && !set.contains(1) && !set.contains(64) && !set.contains(255));
        let all: Vec<u8> = std::iter::from_fn(|| set.take()).collect();
        assert_eq!((all, set), (vec![0, 5, 63], ShardSet::default()));
    }

    #[test]
    fn only_the_owner_of_a_peer_is_told_where_to_send() {
        let hub = Hub::new(now(), 4).unwrap();
        let peers: Vec<PeerConfig> = (0..40u8)
            .map(|n| PeerConfig::new(PeerId(n.into()), [n; 32]))
            .collect();
        let table = Arc::new(PeerTable::default().changed(peers, &[], None, 4));
        hub.network.write().unwrap().table = Arc::clone(&table);
        let rung = |inbox: &Inbox| {
            let bell = inbox.wake.as_fd().try_clone_to_owned().unwrap();
            File::from(bell).read(&mut [0; 8]).is_ok()
        };
        for peer in table.peers() {
            hub.inboxes.iter().for_each(|i| i.wake.about_to_sleep());
            let endpoint = SocketAddr::from(([192, 0, 2, 1], 1));
            hub.aim(peer.config.id, Aim::Endpoint(endpoint));
            for (shard, inbox) in hub.inboxes.iter().enumerate() {
                let mine = shard == usize::from(peer.owner);
                assert_eq!(rung(inbox), mine);
                let told = inbox.paths.take().map(|(id, _)| id);
                assert_eq!(told, mine.then_some(peer.config.id));
            }
        }
        hub.aim(PeerId(40), Aim::Endpoint(([192, 0, 2, 1], 1).into()));
        assert!(hub.inboxes.iter().all(|inbox| inbox.is_empty()));
    }
}
