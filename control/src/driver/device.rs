//! A running WireGuard device: the loop between the configuration socket, the data plane and the
//! interface.
//!
//! Start: signals are blocked; the socket, which keeps the name; the data plane (TUN, UDP sockets,
//! shards); then on this thread the runtime with the socket's clients and netlink. The interface is
//! left down and without addresses, as `wg-quick` expects. A device ends on SIGTERM or SIGINT, when
//! its interface is removed, or when its socket's file is deleted; interface and socket go with it.
//! It ends with an error when a thread of the data plane fails, or anything panics.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use ringtail_dataplane::SuperPacketKind as Kind;
use ringtail_dataplane::stats::DropReason;
use ringtail_dataplane::{
    Config, Dataplane, DriverChoice, Engine, Event, MTU_MAX, NetworkChange, Offloads,
    OffloadsInUse, PeerId, Rules, Stats,
};
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use super::clock::{at, now};
use super::handshakes::Handshakes;
use super::interface::Interface;
use super::link::{self, OwnLink};
use super::panics::Panics;
use super::runtime;
use super::shards::{self, FromShards};
use super::signals::{Blocked, Signals};
use super::sleep;
use super::state::{StateDir, TIMESTAMP_FILE};
use super::timestamps::Timestamps;
use super::uapi::{self, Call, SOCKET_DIR, Socket};
use crate::agent::heard_lately;
use crate::device::Device;
use crate::key::NodePrivate;
use crate::uapi::{DeviceStatus, Errno, PeerStatus, Reply, Request, Transaction};

/// The socket's file and the interface are looked for this often: so long a device outlives the
/// deletion of the file, or of the interface where the shards have missed it.
const PRESENCE_CHECK_PERIOD: Duration = Duration::from_millis(250);
/// Requests that wait for the loop.
const CALLS_MAX: usize = 16;
/// News of the interface that wait for the loop.
const LINK_NEWS_MAX: usize = 16;
/// Peers greeted after a sleep of the machine at most; the others follow when there is a packet.
const RESUMED_MAX: usize = 128;
/// Events taken before the loop looks elsewhere.
const EVENTS_MAX: usize = 256;

/// How a device is to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the interface; `%d` stands for the first free number.
    pub name: String,
    /// Inner MTU at first, in bytes; later the interface's counts.
    pub mtu: u16,
    /// Data plane threads.
    pub shards: usize,
    /// Keep each shard on one core.
    pub pin: bool,
    /// The shards' I/O driver.
    pub driver: DriverChoice,
    /// Offloads to try.
    pub offloads: Offloads,
    /// The WireGuard transport.
    pub engine: Engine,
    /// Where the time of the last handshake is kept, if anywhere.
    pub state_dir: Option<PathBuf>,
}

/// Runs a device until it is told to stop. `ready` is called once interface and socket exist.
///
/// # Errors
/// When it cannot start, or cannot go on.
pub fn run(options: Options, ready: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let signals = Blocked::new()?;
    let panics = Panics::watch();
    let dir = Path::new(SOCKET_DIR);
    // With a pattern the kernel sees to it that the name is free.
    let socket = if options.name.contains('%') {
        None
    } else {
        Some(Socket::bind(dir, &options.name)?)
    };
    let dataplane = Dataplane::start(config(&options)).context("cannot start")?;
    // A WireGuard interface filters by allowed IPs alone.
    dataplane.change_network(NetworkChange {
        rules: Some((Rules::AllowAll, None)),
        ..NetworkChange::default()
    });
    let socket = match socket {
        Some(socket) => socket,
        None => Socket::bind(dir, dataplane.tun_name())?,
    };
    runtime::block_on(async |_| {
        let signals = signals.listen()?;
        let interface = Interface::open(dataplane.tun_name()).await?;
        interface.set_mtu(options.mtu).await?;
        let index = interface.index();
        let (link_sender, link_news) = mpsc::channel(LINK_NEWS_MAX);
        tokio::task::spawn_local(link::watch_own(index, link_sender));
        let (calls_sender, calls) = mpsc::channel(CALLS_MAX);
        tokio::task::spawn_local(uapi::serve(socket.listener()?, calls_sender));
        let timestamps = timestamps(options.state_dir.as_deref(), dataplane.tun_name())?;
        ready()?;
        let running = Running {
            device: Device::default(),
            handshakes: RefCell::default(),
            link: OwnLink {
                up: false,
                mtu: options.mtu.into(),
            },
            interface,
            dataplane,
            timestamps,
            options,
        };
        running
            .run(&socket, &signals, &panics, calls, link_news)
            .await
    })
}

fn config(options: &Options) -> Config {
    Config {
        tun_name: options.name.clone(),
        mtu: options.mtu,
        shards: options.shards,
        pin: options.pin,
        driver: options.driver,
        offloads: options.offloads,
        listen_port: 0,
        fwmark: 0,
        private_key: None,
        roam: true,
        engine: options.engine,
    }
}

/// The time that handshakes may have carried, by the interface's name; to be taken up before there is a
/// private key. Who asks for it and cannot have it is told while somebody listens.
fn timestamps(dir: Option<&Path>, tun_name: &str) -> anyhow::Result<Option<Timestamps>> {
    let Some(dir) = dir else {
        return Ok(None);
    };
    let path = StateDir::open(dir)?.file(&format!("{tun_name}.{TIMESTAMP_FILE}"));
    Timestamps::open_writable(path).map(Some)
}

struct Running {
    device: Device,
    interface: Interface,
    dataplane: Dataplane,
    handshakes: RefCell<Handshakes>,
    link: OwnLink,
    timestamps: Option<Timestamps>,
    options: Options,
}

impl Running {
    async fn run(
        mut self,
        socket: &Socket,
        signals: &Signals,
        panics: &Panics,
        mut calls: mpsc::Receiver<Call>,
        mut link_news: mpsc::Receiver<OwnLink>,
    ) -> anyhow::Result<()> {
        let shards = shards::news(&self.dataplane)?;
        let mut presence_check = tokio::time::interval(PRESENCE_CHECK_PERIOD);
        tracing::info!(
            interface = self.dataplane.tun_name(),
            shards = self.options.shards,
            driver = self.dataplane.driver().name(),
            "device is there"
        );
        let mut sleep = sleep::Watch::new();
        let why = loop {
            if let Some(slept) = sleep.look() {
                self.resumed(slept);
            }
            tokio::select! {
                signal = signals.end() => break signal?,
                words = panics.first() => bail!("{words}"),
                ready = shards.readable() => {
                    let mut ready = ready?;
                    match self.take_from_shards() {
                        FromShards::More => ready.retain_ready(),
                        // The data plane has made its descriptor unreadable again.
                        FromShards::All => ready.clear_ready(),
                        FromShards::TunGone => break "the interface is gone",
                        FromShards::Failed(why) => bail!("the data plane failed: {why}"),
                    }
                }
                Some(Call { request, reply }) = calls.recv() => {
                    // A client that went away does not want it.
                    let _ = reply.send(self.answer(request));
                }
                Some(link) = link_news.recv() => self.link_changed(link).await,
                () = sleep.jump() => {}
                () = at(self.timestamps.as_ref().map(Timestamps::due)) => {
                    self.timestamps.iter_mut().for_each(Timestamps::renew);
                }
                _ = presence_check.tick() => {
                    if !socket.is_there() {
                        break "the socket's file is gone";
                    }
                    if !self.dataplane.tun_is_there() {
                        break "the interface is gone";
                    }
                }
            }
        };
        if let Some(timestamps) = self.timestamps {
            timestamps.close();
        }
        tracing::info!(why, "device ends");
        Ok(())
    }

    fn take_from_shards(&mut self) -> FromShards {
        for _ in 0..EVENTS_MAX {
            let event = self.dataplane.poll_event();
            let relayed = self.dataplane.poll_relay();
            let stray = self.dataplane.poll_stray();
            if event.is_none() && relayed.is_none() && stray.is_none() {
                return FromShards::All;
            }
            if let Some(batch) = relayed {
                // There are no relays here: nothing asks for them.
                self.dataplane.recycle(batch.datagrams);
            }
            match event {
                None => {}
                Some(Event::TunGone) => return FromShards::TunGone,
                Some(Event::Failed(why)) => return FromShards::Failed(why),
                Some(Event::SessionUp(id)) => {
                    // Its time is read now, while it is new.
                    let _ = self.last_handshake(id);
                    tracing::debug!(peer = id.0, "session up");
                }
                Some(Event::SendError(id, to, errno)) => {
                    tracing::debug!(peer = id.0, %to, errno, "cannot send");
                }
                Some(Event::Unopened(from, bytes)) => {
                    if let Some(id) = self.dataplane.peer_at(from) {
                        self.dataplane.unopened(id, bytes);
                    }
                }
                Some(
                    Event::Kick(_)
                    | Event::Active(_)
                    | Event::NewSource(..)
                    | Event::Silent(_)
                    | Event::SessionDown(_)
                    | Event::Pong(..),
                ) => {}
            }
        }
        FromShards::More
    }

    /// The machine has slept for so long. Peers may go on with keys that are too old here, or have
    /// dropped those that seem fresh: who was heard shortly before is greeted.
    fn resumed(&self, slept: Duration) {
        self.dataplane.resumed();
        let at = now();
        let before = at.checked_sub(slept).unwrap_or(at);
        let heard = |id: &PeerId| heard_lately(&self.dataplane.activity(*id), before).is_some();
        self.device
            .peers()
            .map(|(id, _)| id)
            .filter(heard)
            .take(RESUMED_MAX)
            .for_each(|id| self.dataplane.initiate(id));
    }

    /// Follows the interface. Peers with a keep-alive get one as soon as it is up.
    async fn link_changed(&mut self, link: OwnLink) {
        let before = std::mem::replace(&mut self.link, link);
        if link.mtu != before.mtu {
            let mtu = u16::try_from(link.mtu).unwrap_or(MTU_MAX).min(MTU_MAX);
            tracing::debug!(mtu, "the interface's MTU changed");
            self.dataplane.set_mtu(mtu);
            self.interface.cap_mtu(link).await;
        }
        if link.up != before.up {
            tracing::debug!(up = link.up, "the interface changed");
            let all = self.device.peers();
            let kept_alive = all.filter(|(_, peer)| peer.keepalive > 0);
            let kept_alive = kept_alive.map(|(id, _)| id).collect();
            self.publish(&kept_alive);
        }
    }

    fn answer(&mut self, request: Request) -> Reply {
        match request {
            Request::Get => self.status(),
            Request::BadGet(errno) => Reply::to_bad_get(errno),
            Request::Set(transaction) => {
                let done = transaction.and_then(|transaction| self.set(transaction));
                if let Err(errno) = done {
                    tracing::debug!(errno = errno.0, "a configuration was refused");
                }
                Reply::to_set(done)
            }
        }
    }

    /// Carries out a transaction, or leaves everything as it was.
    fn set(&mut self, transaction: Transaction) -> Result<(), Errno> {
        self.device.check(&transaction)?;
        let port_before = self.dataplane.local_port();
        if let Some(port) = transaction.listen_port {
            self.dataplane.set_listen_port(port).map_err(|error| {
                tracing::warn!(%error, "the port stays as it was");
                Errno::ADDRESS_IN_USE
            })?;
        }
        if let Some(mark) = transaction.fwmark
            && mark != self.device.fwmark()
            && let Err(error) = self.dataplane.set_fwmark(mark)
        {
            tracing::warn!(%error, "the mark stays as it was");
            if transaction.listen_port.is_some()
                && let Err(error) = self.dataplane.set_listen_port(port_before)
            {
                tracing::warn!(%error, "the port before is taken meanwhile");
            }
            return Err(Errno::ADDRESS_IN_USE);
        }
        let changes = self.device.apply(transaction);
        if changes.private_key {
            let key = self.device.private_key();
            let key = key.map(|key| Zeroizing::new(*NodePrivate::as_bytes(key)));
            self.dataplane.set_private_key(key.as_ref());
        }
        self.publish(&changes.peers);
        for (id, endpoint) in changes.endpoints {
            self.dataplane.set_endpoint(id, endpoint);
        }
        Ok(())
    }

    /// Tells the data plane of these peers. Keep-alives rest while the interface is down.
    fn publish(&mut self, ids: &BTreeSet<PeerId>) {
        let (mut peers, gone) = self.device.peers_now(ids);
        if !self.link.up {
            for peer in &mut peers {
                peer.persistent_keepalive = None;
            }
        }
        self.dataplane.change_network(NetworkChange {
            peers,
            gone,
            ..NetworkChange::default()
        });
    }

    fn status(&self) -> Reply {
        let stats = self.dataplane.stats();
        let status = DeviceStatus {
            listen_port: self.dataplane.local_port(),
            extras: extras(&self.dataplane, self.options.engine, &stats, self.link.mtu),
            ..DeviceStatus::default()
        };
        self.device.reply(status, &|id| self.traffic(id))
    }

    fn traffic(&self, id: PeerId) -> PeerStatus<'static> {
        let activity = self.dataplane.activity(id);
        let endpoint = self.dataplane.endpoint(id);
        PeerStatus {
            endpoint,
            last_handshake: self.last_handshake(id),
            tx_bytes: activity.tx_bytes,
            rx_bytes: activity.rx_bytes,
            extras: vec![("path", endpoint.map_or("none", |_| "direct").to_owned())],
            ..PeerStatus::default()
        }
    }

    fn last_handshake(&self, id: PeerId) -> Option<Duration> {
        let at: Instant = self.dataplane.activity(id).last_handshake?;
        Some(self.handshakes.borrow_mut().wall_time(id, at))
    }
}

/// The keys of our own about the device itself.
pub(super) fn extras(
    dataplane: &Dataplane,
    engine: Engine,
    stats: &Stats,
    mtu: u32,
) -> Vec<(String, String)> {
    let offloads = dataplane.offloads();
    let mut extras: Vec<(String, String)> = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("shards", stats.shards.len().to_string()),
        ("driver", dataplane.driver().name().to_owned()),
        ("engine", format!("{engine:?}").to_lowercase()),
        ("offloads", listed(offloads_by_name(offloads))),
        (
            "tun_merging",
            listed(offloads.merging.iter().map(Kind::name)),
        ),
        (
            "tun_refused",
            listed(offloads.refused.iter().map(Kind::name)),
        ),
        ("mtu", mtu.to_string()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect();
    extras.extend(drops(stats));
    extras
}

/// The offloads in use by name, but for those of TUN writes.
pub(super) fn offloads_by_name(offloads: OffloadsInUse) -> impl Iterator<Item = &'static str> {
    let names = [
        ("tso", offloads.tso),
        ("uso", offloads.uso),
        ("gso", offloads.gso),
        ("gro", offloads.gro),
    ];
    names
        .into_iter()
        .filter_map(|(name, used)| used.then_some(name))
}

/// Names with commas, or `none`.
fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(",")
    }
}

/// Dropped packets: all, then by reason those that are not zero.
fn drops(stats: &Stats) -> Vec<(String, String)> {
    let counts: Vec<(&str, u64)> = DropReason::ALL
        .iter()
        .map(|reason| (reason.name(), stats.drops(*reason)))
        .filter(|(_, count)| *count > 0)
        .collect();
    let total: u64 = counts.iter().map(|(_, count)| count).sum();
    std::iter::once(("drops".to_owned(), total.to_string()))
        .chain(
            counts
                .iter()
                .map(|(name, count)| (format!("drops_{name}"), count.to_string())),
        )
        .collect()
}
