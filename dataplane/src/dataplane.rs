//! The control side's handle: starts the threads, talks to them, ends them.

#![forbid(unsafe_code)]

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use crate::channel::lock;
use crate::config::{
    Config, DriverChoice, DriverKind, Engine, MTU_MAX, MTU_MIN, SHARDS_MAX, StartError,
};
use crate::filter::CompiledRules;
use crate::hub::{Hub, Inbox, Settings};
use crate::peer::table::PeerEntry;
use crate::peer::{Aim, Whereabouts};
use crate::routes::Routes;
use crate::session::OVERHEAD;
use crate::shard::{self, Seat};
use crate::stats::{DropReason, Published, Snapshot};
use crate::tun::{Device, Kinds, Merging, Queue};
use crate::types::{
    Activity, Datagrams, Event, NetworkChange, PathDecision, PeerId, Ping, RegionId, RelayBatch,
};
use crate::udp::{Group, SEND_BYTES_MAX, Wanted};
use crate::{handshake, sys, threads};

/// How long the key before a renewed one counts.
pub const RENEWAL: Duration = Duration::from_secs(30);

/// A running data plane. Dropping it stops and joins its threads and removes the interface.
///
/// No method waits for a shard. All may be called from any thread; [`Dataplane::poll_event`],
/// [`Dataplane::poll_relay`] and [`Dataplane::poll_stray`] from one at a time.
pub struct Dataplane {
    hub: Arc<Hub>,
    threads: Vec<JoinHandle<()>>,
    epoch: Instant,
    /// Another descriptor of a queue that a shard reads.
    tun: OwnedFd,
    tun_name: String,
    driver: DriverKind,
    /// As they were at start.
    offloads: OffloadsInUse,
    merging: Arc<Merging>,
    roam: bool,
    underlay: Mutex<Underlay>,
    shards: Vec<Published>,
    handshake: Published,
}

/// The sockets as they are now.
struct Underlay {
    group: Group,
    wanted: Wanted,
    /// Datagrams dropped by full sockets that have been replaced since.
    overflowed: u64,
}

/// Offloads that the kernel agreed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OffloadsInUse {
    /// TCP super-packets from the TUN.
    pub tso: bool,
    /// UDP super-packets from the TUN.
    pub uso: bool,
    /// Super-packets to the TUN: what is merged now.
    pub merging: Kinds,
    /// Super-packets that are not written to the TUN any more because the kernel refused them.
    pub refused: Kinds,
    /// Many datagrams in one send.
    pub gso: bool,
    /// Many datagrams in one receive.
    pub gro: bool,
}

/// Counters of a data plane at one moment.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Per shard.
    pub shards: Vec<Snapshot>,
    /// Of the handshake thread.
    pub handshake: Snapshot,
    /// Datagrams dropped because the lane to the relay client was full.
    pub relay_out_dropped: u64,
    /// Datagrams dropped because a lane from the relay client was full.
    pub relay_in_dropped: u64,
    /// Datagrams that the kernel dropped because a socket's buffer was full.
    pub sockets_overflowed: u64,
    /// Events lost because nobody polled.
    pub events_lost: u64,
}

impl Stats {
    /// The sum over all threads.
    #[must_use]
    pub fn total(&self) -> Snapshot {
        let mut total = Snapshot::sum(&self.shards);
        total.merge(&self.handshake);
        total
    }

    /// Packets dropped for a reason, anywhere.
    #[must_use]
    pub fn drops(&self, reason: DropReason) -> u64 {
        let elsewhere = if reason == DropReason::RelayOutFull {
            self.relay_out_dropped
        } else if reason == DropReason::RelayInFull {
            self.relay_in_dropped
        } else if reason == DropReason::SocketFull {
            self.sockets_overflowed
        } else {
            0
        };
        self.total().drops(reason) + elsewhere
    }
}

impl Dataplane {
    /// Opens the TUN device and the sockets, starts the threads, and returns once all of them run.
    /// The interface is left down and without addresses.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left behind.
    pub fn start(config: Config) -> Result<Dataplane, StartError> {
        check(&config)?;
        let epoch = sys::now();
        let device = Device::open(&config.tun_name, config.shards, config.offloads.tun).map_err(
            |source| StartError::Tun {
                name: config.tun_name.clone(),
                source,
            },
        )?;
        let wanted = Wanted {
            port: config.listen_port,
            shards: config.shards,
            fwmark: config.fwmark,
            gso: config.offloads.gso,
            gro: config.offloads.gro,
            device: config.roam,
        };
        let group = open_group(wanted)?;
        let hub = Arc::new(Hub::new(epoch, config.shards).map_err(StartError::Threads)?);
        hub.mark.store(config.fwmark, Ordering::Relaxed);
        let merging = Arc::new(Merging::new(device.offloads.kinds()));
        let mut dataplane = Dataplane {
            hub,
            threads: Vec::new(),
            epoch,
            tun: device.descriptor().map_err(StartError::Threads)?,
            tun_name: device.name.clone(),
            driver: DriverKind::Epoll,
            offloads: OffloadsInUse {
                tso: device.offloads.tso,
                uso: device.offloads.uso,
                merging: merging.kinds(),
                refused: merging.refused(),
                gso: group.gso,
                gro: group.gro,
            },
            merging,
            roam: config.roam,
            underlay: Mutex::new(Underlay {
                group,
                wanted,
                overflowed: 0,
            }),
            shards: (0..config.shards).map(|_| Published::default()).collect(),
            handshake: Published::default(),
        };
        *lock(&dataplane.hub.settings) = Arc::new(Settings {
            private_key: config.private_key.clone(),
            mtu: usize::from(config.mtu),
            ..Settings::default()
        });
        // Dropping `dataplane` on the way out stops what has been started.
        dataplane.spawn(&config, device.queues.into())?;
        tracing::info!(
            tun = dataplane.tun_name,
            port = dataplane.local_port(),
            shards = config.shards,
            driver = dataplane.driver.name(),
            offloads = ?dataplane.offloads,
            "data plane started"
        );
        Ok(dataplane)
    }

    fn spawn(&mut self, config: &Config, queues: Arc<[Queue]>) -> Result<(), StartError> {
        self.driver = match config.driver {
            DriverChoice::Epoll => DriverKind::Epoll,
            DriverChoice::Auto | DriverChoice::IoUring => DriverKind::IoUring,
        };
        match self.spawn_shards(config, &queues) {
            Err(StartError::IoUring(why)) if config.driver == DriverChoice::Auto => {
                tracing::warn!("{why}: using the epoll driver");
                self.driver = DriverKind::Epoll;
                self.spawn_shards(config, &queues)
            }
            started => started,
        }?;
        let sockets = Arc::clone(&self.underlay().group.handshake);
        let settings = Arc::clone(&lock(&self.hub.settings));
        let (hub, published) = (Arc::clone(&self.hub), self.handshake.clone());
        let shards = self.shards.clone();
        let thread = threads::spawn(&self.hub, "rt-handshake", move || {
            handshake::run(&hub, sockets, &settings, &published, &shards)
        });
        self.threads.push(thread.map_err(StartError::Threads)?);
        if self.roam {
            self.watch_routes();
        }
        Ok(())
    }

    /// Starts all shards with the driver in `self`, or none.
    fn spawn_shards(&mut self, config: &Config, queues: &Arc<[Queue]>) -> Result<(), StartError> {
        let (ready, started) = mpsc::channel();
        let mut waiting = Vec::new();
        let mut begun = Vec::new();
        let spawned = (0..config.shards).try_for_each(|index| {
            let (go, gone) = mpsc::channel();
            waiting.push(go);
            let thread = self.spawn_shard(index, config, queues, ready.clone(), gone)?;
            begun.push(thread);
            io::Result::Ok(())
        });
        drop(ready);
        let all_started = spawned.map_err(StartError::Threads).and_then(|()| {
            // A thread that dies says nothing, and takes its end of the channel with it.
            let answers = (0..config.shards).map(|_| {
                let dead = || Err(io::Error::other("a shard's thread died at its start"));
                started.recv().unwrap_or_else(|_| dead())
            });
            let all = answers.collect::<io::Result<()>>();
            all.map_err(|error| match self.driver {
                DriverKind::IoUring => StartError::IoUring(error.to_string()),
                DriverKind::Epoll => StartError::Threads(error),
            })
        });
        if all_started.is_ok() {
            // One that has died since is told of as any that does later.
            for go in &waiting {
                let _alive = go.send(());
            }
            self.threads.append(&mut begun);
        }
        drop(waiting);
        for thread in begun {
            // What it died of has been logged.
            drop(thread.join());
        }
        all_started
    }

    fn spawn_shard(
        &self,
        index: usize,
        config: &Config,
        queues: &Arc<[Queue]>,
        ready: mpsc::Sender<io::Result<()>>,
        go: mpsc::Receiver<()>,
    ) -> io::Result<JoinHandle<()>> {
        let cpus = if config.pin {
            sys::allowed_cpus()
        } else {
            Vec::new()
        };
        let sockets = Arc::clone(&self.underlay().group.data[index]);
        let seat = Seat {
            id: u8::try_from(index).map_err(io::Error::other)?,
            hub: Arc::clone(&self.hub),
            queues: Arc::clone(queues),
            merging: Arc::clone(&self.merging),
            gso: self.offloads.gso,
            driver: self.driver,
            cpu: cpus.get(index % cpus.len().max(1)).copied(),
            settings: Arc::clone(&lock(&self.hub.settings)),
            roam: config.roam,
            kind: config.engine,
            published: self.shards[index].clone(),
        };
        threads::spawn(&self.hub, &format!("rt-shard-{index}"), move || {
            shard::run(seat, sockets, ready, &go)
        })
    }

    /// Without it, answers stick to an address until a send from there fails.
    fn watch_routes(&mut self) {
        let hub = Arc::clone(&self.hub);
        let started = Routes::open()
            .and_then(|routes| threads::spawn(&self.hub, "rt-routes", move || routes.run(&hub)));
        match started {
            Ok(thread) => self.threads.push(thread),
            Err(error) => tracing::warn!(%error, "routes cannot be watched"),
        }
    }

    fn underlay(&self) -> MutexGuard<'_, Underlay> {
        lock(&self.underlay)
    }

    /// The UDP port of both families.
    #[must_use]
    pub fn local_port(&self) -> u16 {
        self.underlay().group.port
    }

    /// Moves to another UDP port of both families, 0 for any free one, and returns it. The new
    /// sockets are ready before the old ones are given up; what is on its way to those is lost.
    /// For device mode: the discovery sockets, which the control side has duplicates of, change too.
    ///
    /// # Errors
    /// The port is taken ([`StartError::Udp`]); everything stays as it was.
    pub fn set_listen_port(&self, port: u16) -> Result<u16, StartError> {
        let mut underlay = self.underlay();
        if port != 0 && port == underlay.group.port {
            return Ok(port);
        }
        let wanted = Wanted {
            port,
            ..underlay.wanted
        };
        let group = open_group(wanted)?;
        let port = group.port;
        for (inbox, sockets) in self.hub.inboxes.iter().zip(&group.data) {
            drop(inbox.sockets.force_push(Arc::clone(sockets)));
            inbox.wake.ring();
        }
        let handshake = Arc::clone(&group.handshake);
        drop(self.hub.handshake_sockets.force_push(handshake));
        self.hub.handshake_wake.signal();
        underlay.overflowed += underlay.group.overflowed();
        underlay.wanted = wanted;
        underlay.group = group;
        Ok(port)
    }

    /// Sets the mark (`SO_MARK`) of every underlay socket, present and future; 0 is none.
    ///
    /// # Errors
    /// No `CAP_NET_ADMIN`.
    pub fn set_fwmark(&self, mark: u32) -> io::Result<()> {
        let mut underlay = self.underlay();
        underlay.group.set_mark(mark)?;
        underlay.wanted.fwmark = mark;
        self.hub.mark.store(mark, Ordering::Relaxed);
        Ok(())
    }

    /// Changes our private key, or removes it: then nothing handshakes. Sessions end; the next
    /// packet, or a persistent keep-alive, handshakes anew.
    pub fn set_private_key(&self, key: Option<&Zeroizing<[u8; 32]>>) {
        self.hub.change_settings(|settings| settings.set_key(key));
    }

    /// Changes our private key while peers go over to the new public key one by one. Sessions live on
    /// until the peer or we replace them; what we begin, we begin under the new key, and repeat it twice
    /// a second at first where a peer does not know that yet; handshakes for the old key are answered for
    /// [`RENEWAL`], then it is erased, with what it shares with peers. The same key again begins that time
    /// anew. Without a key before, and under boringtun, this is [`Dataplane::set_private_key`].
    pub fn renew_key(&self, key: &Zeroizing<[u8; 32]>) {
        let until = sys::now() + RENEWAL;
        self.hub
            .change_settings(|settings| settings.renew_key(key, until));
    }

    /// Changes the largest inner packet, up to which sealing pads. The interface's MTU is the
    /// caller's to set.
    pub fn set_mtu(&self, mtu: u16) {
        self.hub
            .change_settings(|settings| settings.mtu = usize::from(mtu));
    }

    /// The interface's name.
    #[must_use]
    pub fn tun_name(&self) -> &str {
        &self.tun_name
    }

    /// Whether the TUN interface is still there, for one system call. As a rule a shard tells of its
    /// removal by [`Event::TunGone`]. But the kernel (`tun_detach_all`) wakes who waits for a packet
    /// first and takes the interface away then: who looks between the two goes back to sleep, and is
    /// not woken again. So this is to be asked now and then.
    #[must_use]
    pub fn tun_is_there(&self) -> bool {
        !sys::has_failed(self.tun.as_fd())
    }

    /// The driver in use.
    #[must_use]
    pub fn driver(&self) -> DriverKind {
        self.driver
    }

    /// The offloads the kernel agreed to, less what it has refused since.
    #[must_use]
    pub fn offloads(&self) -> OffloadsInUse {
        OffloadsInUse {
            merging: self.merging.kinds(),
            refused: self.merging.refused(),
            ..self.offloads
        }
    }

    /// The moment that [`Activity`] times count from inside; before every one of them.
    #[must_use]
    pub fn epoch(&self) -> Instant {
        self.epoch
    }

    /// Non-blocking duplicates of the discovery sockets, IPv4 and (where there is any) IPv6: DISCO
    /// and STUN arrive here, and leave from here, on the node's port.
    ///
    /// # Errors
    /// No more file descriptors. In device mode there are none to begin with.
    pub fn discovery_sockets(&self) -> io::Result<(UdpSocket, Option<UdpSocket>)> {
        let underlay = self.underlay();
        let sockets = underlay.group.discovery.as_ref();
        let sockets = sockets.ok_or(io::ErrorKind::Unsupported)?;
        let v6 = sockets.v6.as_ref().map(UdpSocket::try_clone).transpose()?;
        Ok((sockets.v4.try_clone()?, v6))
    }

    /// Changes peers and packet filter, which every shard takes over in one step. Until the first
    /// call there are no peers and nothing may come in. Peers that are named with the id and key they had
    /// keep their sessions, paths and counters; another preshared key counts from the next handshake,
    /// another keep-alive at once. Ids at or above [`PEERS_MAX`](crate::PEERS_MAX) are not used.
    /// Nothing about peers that are not named is touched.
    pub fn change_network(&self, change: NetworkChange) {
        let NetworkChange {
            peers,
            gone,
            reserved,
            rules,
            peerapi,
        } = change;
        let rules = rules.map(|(rules, local)| CompiledRules::compile(&rules, local.as_deref()));
        let same_table = peers.is_empty() && gone.is_empty() && reserved.is_none();
        if same_table && rules.is_none() && peerapi.is_none() {
            return;
        }
        let newest = &self.hub.network;
        let mut current = newest.write().unwrap_or_else(PoisonError::into_inner);
        if !same_table {
            let shards = self.hub.inboxes.len();
            let table = current.table.changed(peers, &gone, reserved, shards);
            current.table = Arc::new(table);
        }
        if let Some(rules) = rules {
            let (sources, before) = (rules.without_table(), current.rules.without_table());
            if sources > 0 && before == 0 {
                tracing::warn!(
                    sources,
                    "the packet filter is too large for its tables: what these sources send costs more \
                     the more rules name them"
                );
            }
            current.rules = Arc::new(rules);
        }
        current.peerapi = peerapi.unwrap_or(current.peerapi);
        self.hub.outbox.free_retired();
        for inbox in &self.hub.inboxes {
            drop(inbox.network.force_push(current.clone()));
            inbox.wake.ring();
        }
        if !same_table {
            let table = Arc::clone(&current.table);
            drop(self.hub.handshake_peers.force_push(table));
            self.hub.handshake_wake.signal();
        }
    }

    /// Replaces a peer's path, but in device mode. The latest decision counts; none is lost. A peer that
    /// [`Dataplane::change_network`] has not told of has none.
    pub fn set_path(&self, peer: PeerId, decision: PathDecision) {
        debug_assert!(!self.roam, "endpoints are all there is in device mode");
        self.hub.aim(peer, Aim::Decided(decision));
    }

    /// Where a peer is, in device mode: its configured endpoint, or where it has roamed to since.
    #[must_use]
    pub fn endpoint(&self, peer: PeerId) -> Option<SocketAddr> {
        self.hub.table().get(peer)?.shared.whereabouts().endpoint
    }

    /// Sets a peer's endpoint in device mode; the peer may roam from there. For a new peer call
    /// [`Dataplane::change_network`] first.
    pub fn set_endpoint(&self, peer: PeerId, endpoint: SocketAddr) {
        debug_assert!(self.roam, "elsewhere paths are decided");
        let table = self.hub.table();
        let Some(entry) = table.get(peer) else { return };
        // Whoever asks sees it at once; the owner shard says the same when it gets there.
        entry.shared.set_whereabouts(Whereabouts {
            endpoint: Some(endpoint),
            local: None,
        });
        self.hub.aim(peer, Aim::Endpoint(endpoint));
    }

    /// Asks for a handshake with a peer, unless one is going on.
    pub fn initiate(&self, peer: PeerId) {
        // A full queue means that many handshakes are asked for already: one more is lost.
        let put = |inbox: &Inbox| inbox.asks.push(peer).is_ok();
        let _told = self.hub.tell_owner(peer, put);
    }

    /// Data that could not be opened came from where the peer is known to be ([`Event::Unopened`]). If
    /// it adds up to what an initiation sends, and nothing else was heard of the peer for a second, the
    /// owner shard sends one initiation, along the peer's path as it is: rate-limited, and not repeated.
    pub fn unopened(&self, peer: PeerId, bytes: usize) {
        // A full queue means that there is more than enough to do.
        let put = |inbox: &Inbox| inbox.unopened.push((peer, bytes)).is_ok();
        let _told = self.hub.tell_owner(peer, put);
    }

    /// Pings a peer by TSMP; its answer is an [`Event::Pong`], if one comes while it is among the latest few
    /// that were asked for. Without a session it waits for one as any packet does.
    pub fn ping(&self, peer: PeerId, ping: Ping) {
        // A full queue means that many are under way: one more is lost, as on the wire.
        let put = |inbox: &Inbox| inbox.pings.push((peer, ping)).is_ok();
        let _told = self.hub.tell_owner(peer, put);
    }

    /// The peer whose endpoint this is, in device mode.
    #[must_use]
    pub fn peer_at(&self, endpoint: SocketAddr) -> Option<PeerId> {
        let table = self.hub.table();
        let at = |entry: &&PeerEntry| entry.shared.whereabouts().endpoint == Some(endpoint);
        table.peers().find(at).map(|entry| entry.config.id)
    }

    /// The machine has slept: every shard looks at the clock now instead of when a wait that began
    /// before it ends. Sessions and paths that are too old meanwhile are not used any more.
    pub fn resumed(&self) {
        for inbox in &self.hub.inboxes {
            inbox.wake.ring();
        }
    }

    /// Readable when one of the `poll_` methods has something. After a wake-up call each until it
    /// gives `None`; only then wait again.
    #[must_use]
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.hub.outbox.as_fd()
    }

    /// Takes one event.
    #[must_use]
    pub fn poll_event(&self) -> Option<Event> {
        self.hub.outbox.poll_event()
    }

    /// Takes one batch that leaves by relay. Give its buffers back by [`Dataplane::recycle`].
    #[must_use]
    pub fn poll_relay(&self) -> Option<RelayBatch> {
        self.hub.outbox.poll_relay()
    }

    /// Takes one DISCO or STUN datagram that reached a shard's socket, glued to data by a network
    /// card.
    #[must_use]
    pub fn poll_stray(&self) -> Option<(SocketAddr, Vec<u8>)> {
        self.hub.outbox.poll_stray()
    }

    /// Takes buffers back for reuse.
    pub fn recycle(&self, datagrams: Datagrams) {
        self.hub.outbox.recycle(datagrams);
    }

    /// Delivers what came from a relay for the peer whose key the relay named. Bounded: the oldest
    /// batches go, counted. False if the peer went while its datagrams were on their way: they are
    /// dropped, and the caller counts them.
    #[must_use]
    pub fn relay_in(&self, peer: PeerId, region: RegionId, datagrams: Datagrams) -> bool {
        let Some(owner) = self.hub.table().owner(peer) else {
            self.recycle(datagrams);
            return false;
        };
        let batch = RelayBatch {
            peer,
            region,
            datagrams,
        };
        self.hub.tell(owner, |inbox| {
            inbox.relay.push(batch);
            true
        })
    }

    /// What the shards know of a peer's traffic; all `None` and 0 for an id out of range.
    #[must_use]
    pub fn activity(&self, peer: PeerId) -> Activity {
        let table = self.hub.table();
        table.get(peer).map_or_else(Activity::default, |entry| {
            entry.shared.activity.snapshot(self.epoch)
        })
    }

    /// Datagrams that the kernel has dropped for the discovery sockets: their buffer was full, or a filter
    /// that their owner attached refused them.
    #[must_use]
    pub fn discovery_drops(&self) -> u64 {
        self.underlay().group.discovery_drops()
    }

    /// Reads all counters; they are a few milliseconds old.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let underlay = self.underlay();
        Stats {
            sockets_overflowed: underlay.overflowed + underlay.group.overflowed(),
            shards: self.shards.iter().map(Published::read).collect(),
            handshake: self.handshake.read(),
            relay_out_dropped: self.hub.outbox.relay_dropped(),
            relay_in_dropped: self
                .hub
                .inboxes
                .iter()
                .map(|inbox| inbox.relay.dropped())
                .sum(),
            events_lost: self.hub.outbox.events_lost(),
        }
    }
}

impl Drop for Dataplane {
    fn drop(&mut self) {
        self.hub.stop();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the data plane panicked");
            }
        }
    }
}

fn open_group(wanted: Wanted) -> Result<Group, StartError> {
    Group::open(wanted).map_err(|source| StartError::Udp {
        port: wanted.port,
        source,
    })
}

const _: () = assert!(MTU_MAX as usize + OVERHEAD == SEND_BYTES_MAX);

fn check(config: &Config) -> Result<(), StartError> {
    if !(1..=SHARDS_MAX).contains(&config.shards) {
        return Err(StartError::Config("shards must be 1 to 64"));
    }
    if !(MTU_MIN..=MTU_MAX).contains(&config.mtu) {
        return Err(StartError::Config("mtu must be 576 to 65475"));
    }
    if config.engine == Engine::Boringtun && cfg!(not(feature = "boringtun")) {
        return Err(StartError::Config(
            "boringtun's engine is not in this program: build it with --features boringtun",
        ));
    }
    Ok(())
}
