//! The control side's handle: starts the threads, talks to them, ends them.

#![forbid(unsafe_code)]

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, PoisonError, RwLock, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::channel::hub::{PeerTable, RelayIn};
use crate::channel::{
    Activity, Datagrams, Event, Hub, PathDecision, PeerConfig, PeerId, Prefix, RegionId, RelayOut,
    Rules,
};
use crate::config::{Config, DriverChoice, DriverKind, Engine, MTU_MIN, SHARDS_MAX, StartError};
use crate::filter::CompiledRules;
use crate::shard::{self, Seat};
use crate::stats::{DropReason, Published, Snapshot};
use crate::tun::Device;
use crate::udp::{Group, Sockets, Wanted};
use crate::{handshake, ring, sys};

/// A running data plane. Dropping it stops and joins its threads and removes the interface.
///
/// No method waits for a shard. All may be called from any thread; [`Dataplane::poll_event`],
/// [`Dataplane::poll_relay`] and [`Dataplane::poll_stray`] from one at a time.
pub struct Dataplane {
    hub: Arc<Hub>,
    threads: Vec<JoinHandle<()>>,
    epoch: Instant,
    tun_name: String,
    port: u16,
    driver: DriverKind,
    offloads: OffloadsInUse,
    discovery: Sockets,
    shards: Vec<Published>,
    handshake: Published,
    /// For the control side's own look-ups; shards have it by message.
    table: RwLock<Arc<PeerTable>>,
}

/// Offloads that the kernel agreed to at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OffloadsInUse {
    /// TCP super-packets from and to the TUN.
    pub tso: bool,
    /// UDP super-packets from and to the TUN.
    pub uso: bool,
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
        let lanes = if reason == DropReason::RelayOutFull {
            self.relay_out_dropped
        } else if reason == DropReason::RelayInFull {
            self.relay_in_dropped
        } else {
            0
        };
        self.total().drops(reason) + lanes
    }
}

impl Dataplane {
    /// Opens the TUN device and the sockets, starts the threads, and returns once all of them run.
    /// The interface is left down and without addresses.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left behind.
    #[expect(clippy::disallowed_methods, reason = "the epoch of all activity times")]
    pub fn start(config: Config) -> Result<Dataplane, StartError> {
        check(&config)?;
        let kind = choose_driver(config.driver)?;
        let epoch = Instant::now();
        let device = Device::open(&config.tun_name, config.shards, config.offloads.tun).map_err(
            |source| StartError::Tun {
                name: config.tun_name.clone(),
                source,
            },
        )?;
        let group = Group::open(Wanted {
            port: config.listen_port,
            shards: config.shards,
            fwmark: config.fwmark,
            gso: config.offloads.gso,
            gro: config.offloads.gro,
        })
        .map_err(|source| StartError::Udp {
            port: config.listen_port,
            source,
        })?;
        let hub = Arc::new(Hub::new(epoch, config.shards).map_err(StartError::Threads)?);
        let mut dataplane = Dataplane {
            hub,
            threads: Vec::new(),
            epoch,
            tun_name: device.name.clone(),
            port: group.port,
            driver: kind,
            offloads: OffloadsInUse {
                tso: device.offloads.tso,
                uso: device.offloads.uso,
                gso: group.gso,
                gro: group.gro,
            },
            discovery: group.discovery,
            shards: (0..config.shards).map(|_| Published::default()).collect(),
            handshake: Published::default(),
            table: RwLock::new(Arc::new(PeerTable::new(Vec::new(), config.shards))),
        };
        // Dropping `dataplane` on the way out stops what has been started.
        dataplane
            .spawn(&config, device, group.data, group.handshake)
            .map_err(StartError::Threads)?;
        tracing::info!(
            tun = dataplane.tun_name,
            port = dataplane.port,
            shards = config.shards,
            driver = kind.as_str(),
            offloads = ?dataplane.offloads,
            "data plane started"
        );
        Ok(dataplane)
    }

    fn spawn(
        &mut self,
        config: &Config,
        device: Device,
        data: Vec<Sockets>,
        handshake: Sockets,
    ) -> io::Result<()> {
        let cpus = if config.pin {
            sys::allowed_cpus()
        } else {
            Vec::new()
        };
        let (ready, started) = mpsc::channel();
        for (index, (queue, sockets)) in device.queues.into_iter().zip(data).enumerate() {
            let seat = Seat {
                id: u8::try_from(index).map_err(io::Error::other)?,
                hub: Arc::clone(&self.hub),
                queue,
                sockets,
                gso: self.offloads.gso,
                driver: self.driver,
                cpu: cpus.get(index % cpus.len().max(1)).copied(),
                private_key: config.private_key.clone(),
                mtu: usize::from(config.mtu),
                published: self.shards[index].clone(),
            };
            let ready = ready.clone();
            let thread = thread::Builder::new()
                .name(format!("rt-shard-{index}"))
                .spawn(move || shard::run(seat, &ready))?;
            self.threads.push(thread);
        }
        drop(ready);
        for _ in 0..config.shards {
            started
                .recv()
                .unwrap_or_else(|_| Err(io::Error::other("a shard's thread died at its start")))?;
        }
        let hub = Arc::clone(&self.hub);
        let key = config.private_key.clone();
        let published = self.handshake.clone();
        let thread = thread::Builder::new()
            .name("rt-handshake".to_owned())
            .spawn(move || handshake::run(&hub, &handshake, &key, &published))?;
        self.threads.push(thread);
        Ok(())
    }

    /// The UDP port of both families.
    #[must_use]
    pub fn local_port(&self) -> u16 {
        self.port
    }

    /// The interface's name.
    #[must_use]
    pub fn tun_name(&self) -> &str {
        &self.tun_name
    }

    /// The driver in use.
    #[must_use]
    pub fn driver(&self) -> DriverKind {
        self.driver
    }

    /// The offloads the kernel agreed to.
    #[must_use]
    pub fn offloads(&self) -> OffloadsInUse {
        self.offloads
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
    /// No more file descriptors.
    pub fn discovery_sockets(&self) -> io::Result<(UdpSocket, Option<UdpSocket>)> {
        let v6 = self
            .discovery
            .v6
            .as_ref()
            .map(UdpSocket::try_clone)
            .transpose()?;
        Ok((self.discovery.v4.try_clone()?, v6))
    }

    /// Replaces all peers. Those whose keys, preshared keys and keep-alive are unchanged keep their
    /// sessions and paths. Ids at or above [`PEERS_MAX`](crate::PEERS_MAX) are not used.
    pub fn set_peers(&self, peers: Vec<PeerConfig>) {
        let table = Arc::new(PeerTable::new(peers, self.hub.inboxes.len()));
        for inbox in &self.hub.inboxes {
            drop(inbox.peers.force_push(Arc::clone(&table)));
            inbox.wake.ring();
        }
        drop(self.hub.handshake_peers.force_push(Arc::clone(&table)));
        self.hub.handshake_wake.signal();
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = table;
    }

    fn table(&self) -> Arc<PeerTable> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces a peer's path. The latest decision counts; none is lost. For a new peer call
    /// [`Dataplane::set_peers`] first.
    pub fn set_path(&self, peer: PeerId, decision: PathDecision) {
        for inbox in &self.hub.inboxes {
            inbox.paths.set(peer, decision.clone());
            inbox.wake.ring();
        }
    }

    /// Replaces the packet filter. `local` are our own addresses and the routes we advertise:
    /// packets to others are refused, whatever the rules; `None` skips that.
    pub fn set_rules(&self, rules: &Rules, local: Option<&[Prefix]>) {
        let compiled = Arc::new(CompiledRules::compile(rules, local));
        for inbox in &self.hub.inboxes {
            drop(inbox.rules.force_push(Arc::clone(&compiled)));
            inbox.wake.ring();
        }
    }

    /// Asks for a handshake with a peer, unless one is going on.
    pub fn initiate(&self, peer: PeerId) {
        for inbox in &self.hub.inboxes {
            // A full queue means that many handshakes are asked for already: one more is lost.
            let _full = inbox.asks.push(peer);
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
    pub fn poll_relay(&self) -> Option<RelayOut> {
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
        let owner = self.table().owner(peer);
        let Some(inbox) = owner.and_then(|owner| self.hub.inboxes.get(usize::from(owner))) else {
            self.recycle(datagrams);
            return false;
        };
        inbox.relay.push(RelayIn {
            peer,
            region,
            datagrams,
        });
        inbox.wake.ring();
        true
    }

    /// What the shards know of a peer's traffic; all `None` and 0 for an id out of range.
    #[must_use]
    pub fn activity(&self, peer: PeerId) -> Activity {
        let block = self.hub.activity.get(peer.0 as usize);
        block.map_or_else(Activity::default, |block| block.snapshot(self.epoch))
    }

    /// Reads all counters; they are a few milliseconds old.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
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

fn check(config: &Config) -> Result<(), StartError> {
    if !(1..=SHARDS_MAX).contains(&config.shards) {
        return Err(StartError::Config("shards must be 1 to 64"));
    }
    if config.mtu < MTU_MIN {
        return Err(StartError::Config("mtu must be at least 576"));
    }
    match config.engine {
        Engine::Boringtun => Ok(()),
    }
}

fn choose_driver(choice: DriverChoice) -> Result<DriverKind, StartError> {
    match choice {
        DriverChoice::Epoll => Ok(DriverKind::Epoll),
        DriverChoice::IoUring => ring::probe()
            .map(|()| DriverKind::IoUring)
            .map_err(StartError::IoUring),
        DriverChoice::Auto => Ok(match ring::probe() {
            Ok(()) => DriverKind::IoUring,
            Err(why) => {
                tracing::warn!("{why}: using the epoll driver");
                DriverKind::Epoll
            }
        }),
    }
}
