//! A running node: the loop that feeds the agent from the outside and carries out what it says.
//!
//! Start: state directory and lock, keys, data plane (TUN, sockets, shards), then on this thread
//! the runtime with the discovery sockets, relay connections, coordination client, netlink and the
//! status socket. Everything that happens reaches the agent here, one at a time; relayed packets
//! pass between the shards and the relay connections without it. A node ends on SIGTERM or SIGINT,
//! when the TUN is taken away, or when coordination says for good that it may not join.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use ringtail_dataplane::channel::RegionId;
use ringtail_dataplane::{Config, Dataplane, DriverChoice, Engine, Offloads};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use zeroize::Zeroizing;

use super::coord_client::CoordClient;
use super::discovery::{Datagram, Discovery};
use super::events::EventLog;
use super::interface::{Interface, interfaces};
use super::local_api::{self, Call, Request};
use super::relay::{RelayEvent, RelayEvents, RelayOptions, RelayPool};
use super::runtime::{self, Kind};
use super::state::{Keys, STATE_DIR_DEFAULT, StateDir};
use crate::agent::{Agent, Network, Output, Setup, Surroundings};
use crate::config::{DriverName, NodeConfig, StaticNetwork, ValidateMode};
use crate::coord::{CoordConfig, CoordEvent, SelfState};
use crate::key::{MachinePublic, NodePublic};
use crate::path::{self, CachedPath, LinkChange, Validate};

/// Batches and events taken from the shards before the loop looks elsewhere.
const SHARD_BATCH_MAX: usize = 256;
/// The same for the relay connections.
const RELAY_BATCH_MAX: usize = 256;
/// Questions of the status socket that wait for an answer.
const QUESTIONS_MAX: usize = 64;
/// Results of look-ups and measurements that wait for the loop.
const RESULTS_MAX: usize = 64;
/// Caches are written this often when they changed.
const SAVE_PERIOD: Duration = Duration::from_secs(10);
/// Inner MTU unless told otherwise: what every Tailscale node uses.
const MTU_DEFAULT: u16 = 1280;
/// Name of the TUN interface unless told otherwise.
const TUN_DEFAULT: &str = "ringtail0";

const NETMAP_CACHE: &str = "netmap.json";
const ENDPOINTS_CACHE: &str = "endpoints.json";

/// Runs a node until it is told to stop.
///
/// # Errors
/// When it cannot start, or cannot go on.
pub fn run(config: NodeConfig) -> anyhow::Result<()> {
    let dir = config
        .state_dir
        .clone()
        .unwrap_or_else(|| PathBuf::from(STATE_DIR_DEFAULT));
    let state = StateDir::open(&dir)?;
    let _lock = state.lock()?;
    let keys = state.keys()?;
    let hostname = config.hostname.clone().unwrap_or_else(host_name);
    let source = Source::read(&config, &state)?;
    let dataplane = Dataplane::start(dataplane_config(&config, &keys)).context("cannot start")?;
    runtime::block_on(async |kind| {
        let parts = Parts {
            config,
            state,
            keys,
            hostname,
            source,
            dataplane,
            kind,
        };
        Node::start(parts).await?.run().await
    })
}

/// Who tells us about the network.
enum Source {
    Static(Box<Network>),
    Coord {
        url: String,
        auth_key: Option<Zeroizing<String>>,
        control_key: Option<MachinePublic>,
    },
}

impl Source {
    fn read(config: &NodeConfig, state: &StateDir) -> anyhow::Result<Self> {
        if let Some(path) = &config.network {
            return Ok(Self::Static(Box::new(StaticNetwork::read(path)?.into())));
        }
        let url = config
            .coord
            .clone()
            .context("neither --coord nor --network is given")?;
        let auth_key = match &config.auth_key_file {
            None => None,
            Some(path) => {
                let text = std::fs::read_to_string(path).map(Zeroizing::new);
                let text = text.with_context(|| format!("cannot read {}", path.display()))?;
                Some(Zeroizing::new(text.trim().to_owned()))
            }
        };
        let given = config.control_key.as_deref().map(str::parse).transpose();
        let given = given.context("--control-key")?;
        let stored = state
            .keys()?
            .control
            .filter(|(of, _)| *of == url)
            .map(|(_, key)| key);
        Ok(Self::Coord {
            url,
            auth_key,
            control_key: given.or(stored),
        })
    }
}

fn dataplane_config(config: &NodeConfig, keys: &Keys) -> Config {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Config {
        tun_name: config.tun.clone().unwrap_or_else(|| TUN_DEFAULT.to_owned()),
        mtu: config.mtu.unwrap_or(MTU_DEFAULT),
        shards: config
            .shards
            .unwrap_or(cores)
            .min(ringtail_dataplane::SHARDS_MAX),
        pin: config.pin.unwrap_or(true),
        driver: match config.driver.unwrap_or_default() {
            DriverName::Auto => DriverChoice::Auto,
            DriverName::IoUring => DriverChoice::IoUring,
            DriverName::Epoll => DriverChoice::Epoll,
        },
        offloads: Offloads {
            tun: config.tun_offload.unwrap_or(true),
            gso: config.udp_gso.unwrap_or(true),
            gro: config.udp_gro.unwrap_or(true),
        },
        listen_port: config.listen_port.unwrap_or(NodeConfig::LISTEN_PORT),
        fwmark: config.fwmark.unwrap_or(0),
        private_key: Zeroizing::new(*keys.node.as_bytes()),
        engine: Engine::default(),
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() {
        "ringtail".into()
    } else {
        name.to_owned()
    }
}

struct Parts {
    config: NodeConfig,
    state: StateDir,
    keys: Keys,
    hostname: String,
    source: Source,
    dataplane: Dataplane,
    kind: Kind,
}

/// A direct path remembered over a restart, on disk.
#[derive(Serialize, Deserialize)]
struct StoredPath {
    node_key: NodePublic,
    addr: SocketAddr,
    /// Seconds since 1970 of the last Pong.
    at: u64,
    rtt_us: u64,
    mtu: u16,
}

/// What look-ups and measurements in tasks of their own bring back.
enum Finding {
    Resolved(Vec<(String, Vec<IpAddr>)>),
    HttpsLatency(RegionId, Option<Duration>),
}

/// What a visit to the shards' queues found.
enum Taken {
    /// All there was.
    All,
    /// Enough for now; more waits.
    More,
    /// The end: the TUN is gone.
    TunGone,
}

struct Node {
    agent: Agent,
    dataplane: Dataplane,
    discovery: Discovery,
    relays: RelayPool,
    relay_events: RelayEvents,
    coord: Option<mpsc::Receiver<CoordEvent>>,
    coord_client: Option<CoordClient>,
    self_state: watch::Sender<SelfState>,
    interface: watch::Sender<Option<(BTreeSet<IpNet>, BTreeSet<IpNet>)>>,
    link_changed: mpsc::Receiver<()>,
    calls: mpsc::Receiver<Call>,
    questions: BTreeMap<u64, Call>,
    questions_asked: u64,
    findings: (mpsc::Sender<Finding>, mpsc::Receiver<Finding>),
    log: EventLog,
    state: StateDir,
    keys: Keys,
    surroundings: Surroundings,
    default_sources: [Option<IpAddr>; 2],
    unsaved: Option<Network>,
}

impl Node {
    async fn start(parts: Parts) -> anyhow::Result<Self> {
        let Parts {
            config,
            state,
            keys,
            hostname,
            source,
            dataplane,
            kind,
        } = parts;
        let mtu = config.mtu.unwrap_or(MTU_DEFAULT);
        let log = EventLog::open(config.events.as_deref(), &hostname)?;
        let (v4, v6) = dataplane.discovery_sockets()?;
        let interface = Interface::open(dataplane.tun_name()).await?;
        interface.up(mtu).await?;
        let tun_index = interface.index();
        let (link_sender, link_changed) = mpsc::channel(1);
        tokio::task::spawn_local(async move {
            if let Err(error) = super::link::watch(tun_index, link_sender).await {
                tracing::warn!(%error, "changes of the network will not be noticed");
            }
        });
        let (calls_sender, calls) = mpsc::channel(QUESTIONS_MAX);
        tokio::task::spawn_local(local_api::serve(
            local_api::listen(&state.socket())?,
            calls_sender,
        ));
        let (relays, relay_events) = RelayPool::new(RelayOptions {
            private: keys.node.clone(),
            fwmark: config.fwmark.unwrap_or(0),
            io: kind,
        });
        let agent = Agent::new(
            Setup {
                node_key: keys.node.public(),
                disco_key: keys.disco.clone(),
                hostname: hostname.clone(),
                paths: path::Config {
                    tunnel_mtu: mtu,
                    validate: match config.validate.unwrap_or_default() {
                        ValidateMode::Full => Validate::Full,
                        ValidateMode::Fast => Validate::Fast,
                    },
                    retry_limit: config.retry_limit.unwrap_or(path::RETRY_LIMIT),
                    ..path::Config::default()
                },
                relay_only: config.relay_only,
                local_port: dataplane.local_port(),
                port_is_fixed: config.listen_port.is_some_and(|port| port != 0),
                tun: dataplane.tun_name().to_owned(),
                routes_offered: config.advertise_routes.clone(),
            },
            rand::random(),
        );
        let surroundings = Surroundings {
            hostname: hostname.clone(),
            node_key: keys.node.public(),
            disco_key: keys.disco.public(),
            tun: dataplane.tun_name().to_owned(),
            mtu,
            shards: dataplane.stats().shards.len(),
            driver: dataplane.driver().as_str(),
            listen_port: dataplane.local_port(),
            coordination: None,
            coordination_state: "static network file".into(),
        };
        let mut node = Self {
            agent,
            discovery: Discovery::new(v4, v6)?,
            relays,
            relay_events,
            coord: None,
            coord_client: None,
            self_state: watch::Sender::default(),
            interface: watch::Sender::default(),
            link_changed,
            calls,
            questions: BTreeMap::new(),
            questions_asked: 0,
            findings: mpsc::channel(RESULTS_MAX),
            log,
            state,
            keys,
            surroundings,
            default_sources: [None, None],
            unsaved: None,
            dataplane,
        };
        tokio::task::spawn_local(configure_interface(interface, node.interface.subscribe()));
        node.join(source, hostname)?;
        Ok(node)
    }

    /// Takes the static network, or the last one known and the coordination client.
    fn join(&mut self, source: Source, hostname: String) -> anyhow::Result<()> {
        let now = now();
        self.list_interfaces(now);
        match source {
            Source::Static(network) => self.agent.handle_network(now, *network),
            Source::Coord {
                url,
                auth_key,
                control_key,
            } => {
                self.surroundings.coordination = Some(url.clone());
                self.surroundings.coordination_state = "connecting".into();
                if let Some(network) = self.state.read_cache::<Network>(NETMAP_CACHE) {
                    tracing::info!(
                        peers = network.peers.len(),
                        "using the network map of the last run"
                    );
                    self.agent.handle_network(now, network);
                }
                let config = CoordConfig {
                    url,
                    auth_key,
                    hostname,
                    machine: self.keys.machine.clone(),
                    node: self.keys.node.public(),
                    disco: self.keys.disco.public(),
                    control_key,
                };
                let (client, events) = CoordClient::start(config, self.self_state.subscribe())?;
                self.coord = Some(events);
                self.coord_client = Some(client);
            }
        }
        self.load_paths(now);
        Ok(())
    }

    async fn run(mut self) -> anyhow::Result<()> {
        let shards = watch_descriptor(self.dataplane.event_fd().try_clone_to_owned()?)?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut save = tokio::time::interval(SAVE_PERIOD);
        let mut datagrams: Vec<Datagram> = Vec::new();
        tracing::info!(
            tun = self.dataplane.tun_name(),
            port = self.dataplane.local_port(),
            driver = self.dataplane.driver().as_str(),
            node_key = %self.keys.node.public(),
            "node is up"
        );
        let ended = loop {
            self.carry_out();
            let due = self.agent.poll_timeout();
            tokio::select! {
                _ = terminate.recv() => break Ok(()),
                _ = interrupt.recv() => break Ok(()),
                ready = shards.readable() => {
                    let mut ready = ready?;
                    match self.take_from_shards() {
                        Taken::More => ready.retain_ready(),
                        // The data plane has made its descriptor unreadable again.
                        Taken::All => ready.clear_ready(),
                        Taken::TunGone => break Err(anyhow::anyhow!("the TUN interface was taken away")),
                    }
                }
                event = self.relay_events.recv() => {
                    if let Some(event) = event {
                        self.take_from_relays(event);
                    }
                }
                received = self.discovery.receive(&mut datagrams) => {
                    received?;
                    let now = now();
                    for datagram in datagrams.drain(..) {
                        self.agent.handle_datagram(now, datagram.at, datagram.from, &datagram.bytes);
                    }
                }
                event = next(&mut self.coord) => {
                    if let Some(event) = event && let Err(error) = self.take_from_coord(event) {
                        break Err(error);
                    }
                }
                Some(call) = self.calls.recv() => self.take_call(call),
                Some(finding) = self.findings.1.recv() => self.take_finding(finding),
                Some(()) = self.link_changed.recv() => self.link_changed(),
                () = sleep_until(due) => {
                    let dataplane = &self.dataplane;
                    self.agent.handle_timeout(now(), &|id| dataplane.activity(id));
                }
                _ = save.tick() => self.save(),
            }
        };
        self.save();
        ended
    }

    /// Does everything the agent asks for; nothing here waits.
    fn carry_out(&mut self) {
        while let Some(output) = self.agent.poll_output() {
            match output {
                Output::SetPeers(peers) => self.dataplane.set_peers(peers),
                Output::SetRules { rules, local } => self.dataplane.set_rules(&rules, Some(&local)),
                Output::SetPath(peer, decision) => self.dataplane.set_path(peer, decision),
                Output::Configure { addresses, routes } => {
                    self.interface.send_replace(Some((addresses, routes)));
                }
                Output::Datagram { to, bytes } => {
                    if let Err(error) = self.discovery.send(to, &bytes) {
                        let errno = error.raw_os_error().unwrap_or_default();
                        self.agent.handle_send_error(now(), to, errno);
                    }
                }
                Output::Stun { to, bytes } => {
                    if let Err(error) = self.discovery.send(to, &bytes) {
                        let errno = error.raw_os_error().unwrap_or_default();
                        self.agent.handle_stun_error(now(), to, errno);
                    }
                }
                Output::Relay { region, to, bytes } => self.relays.send_disco(region, &to, &bytes),
                Output::SetDerpMap(map) => self.relays.set_map(&map),
                Output::SetHome(region) => self.relays.set_home(Some(region)),
                Output::Publish => {
                    let report = self.agent.self_report();
                    self.self_state.send_if_modified(|old| {
                        let changed = *old != report;
                        *old = report;
                        changed
                    });
                }
                Output::Resolve(hosts) => self.resolve(hosts),
                Output::MeasureHttps(regions) => self.measure_https(&regions),
                Output::ListInterfaces => self.list_interfaces(now()),
                Output::Story(event, fields) => self.log.write(event, fields),
                Output::Answer(question, answer) => {
                    if let Some(call) = self.questions.get(&question) {
                        // A client that does not read its answers loses them.
                        let _ = call.answers.try_send(answer);
                    }
                }
                Output::AnswerEnd(question) => {
                    self.questions.remove(&question);
                }
            }
        }
    }

    /// Takes events, relayed batches and strays of the shards.
    fn take_from_shards(&mut self) -> Taken {
        let now = now();
        for _ in 0..SHARD_BATCH_MAX {
            let event = self.dataplane.poll_event();
            let relayed = self.dataplane.poll_relay();
            let stray = self.dataplane.poll_stray();
            if event.is_none() && relayed.is_none() && stray.is_none() {
                return Taken::All;
            }
            if let Some((from, bytes)) = stray {
                self.agent.handle_datagram(now, now, from, &bytes);
            }
            if let Some(event) = event {
                use ringtail_dataplane::channel::Event;
                let activity = match &event {
                    Event::TunGone => return Taken::TunGone,
                    Event::Kick(id)
                    | Event::Active(id)
                    | Event::NewSource(id, _)
                    | Event::Silent(id)
                    | Event::SendError(id, ..)
                    | Event::SessionUp(id)
                    | Event::SessionDown(id) => self.dataplane.activity(*id),
                };
                self.agent.handle_dataplane(now, &event, &activity);
            }
            if let Some(batch) = relayed {
                let packets = batch.datagrams.lens.len();
                if let Some(key) = self
                    .agent
                    .handle_relay_out(batch.peer, batch.region, packets)
                {
                    self.relays.send_data(batch.region, &key, &batch.datagrams);
                }
                self.dataplane.recycle(batch.datagrams);
            }
        }
        Taken::More
    }

    fn take_from_relays(&mut self, first: RelayEvent) {
        let now = now();
        let mut next = Some(first);
        let mut taken = 0;
        while let Some(event) = next {
            self.take_relay_event(now, event);
            taken += 1;
            next = if taken < RELAY_BATCH_MAX {
                self.relay_events.try_recv()
            } else {
                None
            };
        }
    }

    fn take_relay_event(&mut self, now: Instant, event: RelayEvent) {
        match event {
            RelayEvent::Data { region, src, data } => {
                let packets = data.lens.len();
                if let Some(peer) = self.agent.handle_relayed_data(now, region, src, packets)
                    && !self.dataplane.relay_in(peer, region, data)
                {
                    self.agent.count_relayed_too_late(packets);
                }
            }
            RelayEvent::Disco {
                region,
                src,
                packet,
            } => {
                self.agent.handle_relayed_disco(now, region, src, &packet);
            }
            event @ (RelayEvent::Connecting { .. }
            | RelayEvent::Connected { .. }
            | RelayEvent::Lost { .. }
            | RelayEvent::Closed { .. }
            | RelayEvent::HomeUnreachable { .. }
            | RelayEvent::PeerGone { .. }
            | RelayEvent::Health { .. }
            | RelayEvent::Restarting { .. }) => self.agent.handle_relay_news(now, &event),
        }
    }

    /// An error means that the node may not join, and says why.
    fn take_from_coord(&mut self, event: CoordEvent) -> anyhow::Result<()> {
        match event {
            CoordEvent::ControlKey(key) => {
                if let Some(url) = self.surroundings.coordination.clone() {
                    self.keys.control = Some((url, key));
                    self.state.save_keys(&self.keys)?;
                }
            }
            CoordEvent::Registered { user } => {
                self.agent.handle_coordination(true);
                self.surroundings.coordination_state = format!("registered as {user}");
                tracing::info!(%user, "registered");
            }
            CoordEvent::Netmap(map) => {
                self.agent.handle_coordination(true);
                self.surroundings.coordination_state = "connected".into();
                let network = Network::from(&*map);
                self.agent.handle_network(now(), network.clone());
                self.unsaved = Some(network);
            }
            CoordEvent::AuthUrl(url) => {
                self.surroundings.coordination_state = format!("waiting for approval at {url}");
                tracing::warn!(%url, "a person must let this node in: visit the address");
            }
            CoordEvent::Lost { error, retry_in } => {
                self.agent.handle_coordination(false);
                self.surroundings.coordination_state = format!("unreachable: {error}");
                tracing::warn!(%error, ?retry_in, "coordination lost; the last network map stays in force");
            }
            CoordEvent::Fatal(text) => bail!("{text}"),
        }
        Ok(())
    }

    fn take_call(&mut self, call: Call) {
        let now = now();
        match &call.request {
            Request::Status => {
                let dataplane = &self.dataplane;
                let mut status = self
                    .agent
                    .status(now, &self.surroundings, &|id| dataplane.activity(id));
                let relays = self.relays.status();
                let shards = self.dataplane.stats();
                super::status::complete(&mut status, &relays, &shards, self.log.lost());
                let _ = call.answers.try_send(status);
            }
            Request::Ping { peer } => {
                let (question, peer) = (self.next_question(), peer.clone());
                self.questions.insert(question, call);
                self.agent.handle_ping(now, question, &peer);
            }
            Request::Netcheck => {
                let question = self.next_question();
                self.questions.insert(question, call);
                self.agent.handle_netcheck_question(now, question);
            }
        }
    }

    fn next_question(&mut self) -> u64 {
        // Whoever gave up waiting makes room.
        self.questions.retain(|_, call| !call.answers.is_closed());
        self.questions_asked += 1;
        self.questions_asked
    }

    fn take_finding(&mut self, finding: Finding) {
        match finding {
            Finding::Resolved(found) => self.agent.handle_resolved(now(), found),
            Finding::HttpsLatency(region, latency) => {
                self.agent.handle_https_latency(now(), region, latency);
            }
        }
    }

    /// Another default route or source address makes every path doubtful; anything else may only
    /// have changed our endpoints.
    fn link_changed(&mut self) {
        let change = if self.note_default_sources() {
            LinkChange::Major
        } else {
            LinkChange::Minor
        };
        tracing::info!(?change, "the host's network changed");
        self.relays.link_changed();
        if let (LinkChange::Major, Some(coord)) = (change, &self.coord_client) {
            coord.redial();
        }
        self.agent.handle_link_change(now(), change);
    }

    fn note_default_sources(&mut self) -> bool {
        let fresh = FAR_AWAY.map(super::interface::source_address);
        let changed = fresh != self.default_sources;
        self.default_sources = fresh;
        changed
    }

    fn list_interfaces(&mut self, now: Instant) {
        self.note_default_sources();
        match interfaces() {
            Ok(found) => {
                let os_has_ipv6 = std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
                self.agent.handle_interfaces(now, &found, os_has_ipv6);
            }
            Err(error) => tracing::warn!(%error, "own addresses stay unknown"),
        }
    }

    fn resolve(&self, hosts: Vec<String>) {
        let findings = self.findings.0.clone();
        tokio::task::spawn_local(async move {
            let mut found = Vec::with_capacity(hosts.len());
            for host in hosts {
                let addresses = match tokio::net::lookup_host((host.as_str(), 0)).await {
                    Ok(addresses) => addresses.map(|addr| addr.ip()).collect(),
                    Err(_) => Vec::new(),
                };
                found.push((host, addresses));
            }
            let _ = findings.send(Finding::Resolved(found)).await;
        });
    }

    fn measure_https(&self, regions: &[RegionId]) {
        for &region in regions {
            let (findings, latency) = (self.findings.0.clone(), self.relays.https_latency(region));
            tokio::task::spawn_local(async move {
                let latency = latency.await.ok();
                let _ = findings.send(Finding::HttpsLatency(region, latency)).await;
            });
        }
    }

    /// Writes caches that changed; a full disk must not end a node.
    fn save(&mut self) {
        if let Some(network) = self.unsaved.take()
            && let Err(error) = self.state.write_cache(NETMAP_CACHE, &network)
        {
            tracing::warn!(error = format!("{error:#}"), "the network map is not saved");
        }
        let wall = since_1970();
        let paths: Vec<StoredPath> = self
            .agent
            .cached_paths(now())
            .into_iter()
            .map(|path| StoredPath {
                node_key: path.node_key,
                addr: path.addr,
                at: wall.saturating_sub(path.age).as_secs(),
                rtt_us: u64::try_from(path.rtt.as_micros()).unwrap_or(u64::MAX),
                mtu: path.mtu,
            })
            .collect();
        if paths.is_empty() {
            return;
        }
        if let Err(error) = self.state.write_cache(ENDPOINTS_CACHE, &paths) {
            tracing::warn!(
                error = format!("{error:#}"),
                "direct addresses are not saved"
            );
        }
    }

    fn load_paths(&mut self, now: Instant) {
        let wall = since_1970();
        let stored: Vec<StoredPath> = self.state.read_cache(ENDPOINTS_CACHE).unwrap_or_default();
        let paths: Vec<CachedPath> = stored
            .into_iter()
            .map(|path| CachedPath {
                node_key: path.node_key,
                addr: path.addr,
                age: wall.saturating_sub(Duration::from_secs(path.at)),
                rtt: Duration::from_micros(path.rtt_us),
                mtu: path.mtu,
            })
            .collect();
        self.agent.load_cached_paths(now, &paths);
    }
}

/// Addresses of the internet, to ask the kernel which source it would use; nothing is sent.
const FAR_AWAY: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(8, 8, 8, 8)), 53),
    SocketAddr::new(
        IpAddr::V6(Ipv6Addr::new(0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8888)),
        53,
    ),
];

#[expect(
    deprecated,
    reason = "the caveat is about types that lend their descriptor; this one owns it"
)]
fn watch_descriptor(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

/// Keeps the interface as the latest wish says; a refusal is logged and the next wish tried.
async fn configure_interface(
    mut interface: Interface,
    mut wishes: watch::Receiver<Option<(BTreeSet<IpNet>, BTreeSet<IpNet>)>>,
) {
    while wishes.changed().await.is_ok() {
        let wish = wishes.borrow_and_update().clone();
        let Some((addresses, routes)) = wish else {
            continue;
        };
        if let Err(error) = interface.configure(&addresses, &routes).await {
            tracing::warn!(
                error = format!("{error:#}"),
                "the interface is not as it should be"
            );
        }
    }
}

/// The next event, or never where there is no source or it has ended.
async fn next<T>(source: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    let Some(receiver) = source else {
        return std::future::pending().await;
    };
    let event = receiver.recv().await;
    if event.is_none() {
        *source = None;
    }
    event
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

#[expect(clippy::disallowed_methods, reason = "drivers own the clock")]
fn now() -> Instant {
    Instant::now()
}

#[expect(
    clippy::disallowed_methods,
    reason = "ages on disk are told by wall time"
)]
fn since_1970() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}
