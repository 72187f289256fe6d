//! A running node: the loop that feeds the agent from the outside and carries out what it says.
//!
//! Start: state directory and lock, keys, data plane (TUN, sockets, shards), then on this thread
//! the runtime with the discovery sockets, relay connections, coordination client, netlink and the
//! status socket. Everything that happens reaches the agent here, one at a time; relayed packets
//! pass between the shards and the relay connections without it. A node ends on SIGTERM or SIGINT,
//! when the TUN is taken away, when coordination says for good that it may not join, when a thread of
//! the data plane fails, or when anything panics.
//!
//! Rooms: `life` is the process, in which a node may come and go, `desk` what of it stays meanwhile; `start`
//! builds the node, `intake` takes what comes from every side, `plain` is what the settings file says of plain
//! peers, `login` lets it into its network and out, `renew` gives it another key, `caches` is its memory on
//! disk.

mod caches;
mod desk;
mod intake;
mod life;
mod login;
mod ping;
mod plain;
mod renew;
mod start;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ringtail_dataplane::{Dataplane, DriverKind, Engine, TimeBudget};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::clock::{at, now, thread_time, wall};
use super::coord_client::CoordClient;
use super::discovery::{Datagram, Discovery};
use super::dns::Dns;
use super::dns_host::HostResolver;
use super::events::EventLog;
use super::handshakes::Handshakes;
use super::hostnet::HostNet;
use super::keeper::{Keeper, LEDGER_WAIT};
use super::ledger::{Announced, Entry, Ledger};
use super::local_api::Call;
use super::names::Names;
use super::panics::Panics;
use super::relay::{RelayEvents, RelayPool};
use super::runtime;
use super::shards::{self, FromShards};
use super::signals::{Blocked, Signals, Told};
use super::sleep;
use super::state::{Keys, STATE_DIR_DEFAULT, StateDir};
use super::timestamps::Timestamps;
use super::tls::roots;
use super::uapi;
use crate::agent::{Agent, Network, Output, Surroundings};
use crate::config::{Layers, NodeConfig, PrefsChange};
use crate::coord::{CoordEvent, NotAdmitted, SelfState};
use crate::key::NodePublic;
use crate::netcheck::Interface;
use caches::StoredPath;
use desk::Desk;
use intake::{Finding, Pace};
use life::{Life, Parts};
use login::{Coordination, Login};
use renew::Renewal;
use start::{auth_key, host_name, underlay_mark};

/// Caches are written this often when they changed.
const SAVE_PERIOD: Duration = Duration::from_secs(10);
/// They are written so soon after a session with a peer began that they do not name.
const SAVE_SOON: Duration = Duration::from_secs(1);

/// Thousandths of this thread's time for what comes to the discovery socket, while packets are relayed
/// and while none are.
const DISCOVERY_SHARES: [u16; 2] = [100, 500];
/// The same for questions of local programs.
const CALL_SHARES: [u16; 2] = [50, 250];
/// Time that is saved up for either at most: a few thousand datagrams.
const SAVED_MAX: Duration = Duration::from_millis(20);
/// And overdrawn.
const OVERDRAWN_MAX: Duration = Duration::from_millis(50);
/// Packets count as being relayed so long after the last.
const RELAYING: Duration = Duration::from_millis(100);

/// A process that ends waits so long for the server to hear that it routes nothing any more, and one that stays
/// when its node goes down: nobody does it for that.
const LEAVE_LIMIT: Duration = Duration::from_millis(300);
const LEAVE_LIMIT_STAYS: Duration = Duration::from_secs(3);

/// Runs a node until it is told to stop; of the settings that may change, `flags` says what stands on the
/// command line.
///
/// # Errors
/// When it cannot start, or cannot go on.
pub fn run(mut config: NodeConfig, flags: PrefsChange) -> anyhow::Result<()> {
    let signals = Blocked::new()?;
    let panics = Panics::watch();
    config.fwmark = Some(underlay_mark(config.fwmark));
    let dir = config
        .state_dir
        .clone()
        .unwrap_or_else(|| PathBuf::from(STATE_DIR_DEFAULT));
    let state = StateDir::open(&dir)?;
    let _lock = state.lock()?;
    let ledger = Ledger::open(&state, LEDGER_WAIT)?;
    for problem in ledger.restore() {
        tracing::warn!(problem, "what an earlier run changed of the host stays");
    }
    let layers = Layers::new(flags, state.read_set()?, config.prefs.clone());
    let layers = layers.map_err(anyhow::Error::msg)?;
    for name in layers.hidden() {
        tracing::warn!("{name} is given on the command line, and counts for what was `set`");
    }
    let auth_key = auth_key(&config)?;
    let roots = roots::load(config.ca_file.as_deref())?;
    let parts = Parts::make(&config, &state, auth_key.clone())?;
    let io_uring = parts.dataplane.driver() == DriverKind::IoUring;
    let run = async |kind| {
        let signals = signals.listen()?;
        let mut keeper = Keeper::start(&state);
        let life = Life {
            config,
            state,
            ledger: ledger.clone(),
            auth_key,
            roots,
            kind,
            signals: &signals,
            panics: &panics,
            keeper: &mut keeper,
        };
        let ended = life.run(layers, parts).await;
        if ended.as_ref().is_err_and(|error| error.is::<NotAdmitted>())
            && let Some(announced) = ledger.announced()
        {
            // A server that does not know us sends nobody here.
            ledger.done(&Entry::Announced(announced));
        }
        keeper.dismiss(&ledger);
        ended
    };
    if io_uring {
        runtime::block_on_uring(run)
    } else {
        runtime::block_on(run)
    }
}

/// Why a node has ended, and its process goes on, or ends without a fault.
enum Ended {
    /// The process was told to end.
    Told,
    /// Somebody took it down.
    Down(Call),
    /// Somebody took it out of the network.
    LoggedOut(Call),
    /// The network did not let it in.
    Refused(String),
}

impl Ended {
    /// How long the server may take to hear that nothing is routed here any more; nothing if it knows.
    fn leave_limit(&self) -> Option<Duration> {
        match self {
            Self::Down(_) => Some(LEAVE_LIMIT_STAYS),
            Self::LoggedOut(_) => None,
            Self::Told | Self::Refused(_) => Some(LEAVE_LIMIT),
        }
    }
}

struct Node {
    agent: Agent,
    /// Dropped while what it points to still answers.
    resolver: HostResolver,
    /// Dropped before the TUN goes.
    hostnet: HostNet,
    dns: Dns,
    dataplane: Dataplane,
    discovery: Discovery,
    /// What the discovery socket may cost, and what local programs may.
    discovery_budget: TimeBudget,
    call_budget: TimeBudget,
    /// When packets were relayed last.
    relayed_at: Option<Instant>,
    names: Names,
    relays: RelayPool,
    relay_events: RelayEvents,
    coord: Option<mpsc::Receiver<CoordEvent>>,
    coord_client: Option<CoordClient>,
    /// How the coordination server is reached; nothing where the network comes from a file.
    coordination: Option<Coordination>,
    login: Login,
    renewal: Renewal,
    self_state: watch::Sender<SelfState>,
    ledger: Ledger,
    /// Noted before the coordination server is told of routes.
    announced: Option<Announced>,
    link_changed: mpsc::Receiver<()>,
    sleep: sleep::Watch,
    timestamps: Timestamps,
    minor_change: Pace,
    new_address: Pace,
    addresses: Vec<Interface>,
    /// The configuration socket; none where it could not be made.
    _configuration_socket: Option<uapi::Socket>,
    /// What is asked there.
    configuration: Option<mpsc::Receiver<uapi::Call>>,
    handshakes: RefCell<Handshakes>,
    questions: BTreeMap<u64, Call>,
    questions_asked: u64,
    /// Who waits for the answer to a ping by TSMP, by its number.
    pongs: BTreeMap<u64, oneshot::Sender<u16>>,
    findings: (mpsc::Sender<Finding>, mpsc::Receiver<Finding>),
    /// What runs beside and ends with the node.
    _tasks: JoinSet<()>,
    log: EventLog,
    state: StateDir,
    keys: Keys,
    fwmark: u32,
    engine: Engine,
    surroundings: Surroundings,
    /// The static network file, if that is who tells us of the network.
    network_file: Option<PathBuf>,
    /// The log says that the node is up.
    told_up: bool,
    default_sources: [Option<IpAddr>; 2],
    unsaved: Option<Network>,
    /// Whom the run after this will shake hands with first, as it is on disk.
    sessions_saved: Vec<NodePublic>,
    paths_saved: Vec<StoredPath>,
    home_saved: Option<u32>,
    save_at: Instant,
}

impl Node {
    async fn run(
        mut self,
        desk: &mut Desk,
        signals: &Signals,
        panics: &Panics,
        keeper: &mut Keeper,
    ) -> anyhow::Result<Ended> {
        let shards = shards::news(&self.dataplane)?;
        let mut datagrams: Vec<Datagram> = Vec::new();
        tracing::info!(
            tun = self.dataplane.tun_name(),
            port = self.dataplane.local_port(),
            driver = self.dataplane.driver().name(),
            node_key = %self.keys.node.public(),
            "node has started"
        );
        if !self.agent.has_network() {
            tracing::info!("waiting for coordination: there is no network map yet");
        }
        if desk.prefs().exit_node.is_some() {
            // Nobody is told that the node is up while packets still go out beside it.
            self.carry_out();
            self.hostnet.settled().await;
        }
        self.tell_up();
        let ended = loop {
            if let Some(slept) = self.sleep.look() {
                self.resumed(slept);
            }
            self.carry_out();
            let due = self.agent.poll_timeout();
            let turn = now();
            let busy = self.relayed_at.is_some_and(|at| turn < at + RELAYING);
            let share = |[relaying, otherwise]: [u16; 2]| if busy { relaying } else { otherwise };
            let discovery_opens = self.discovery_budget.opens(turn, share(DISCOVERY_SHARES));
            let calls_open = self.call_budget.opens(turn, share(CALL_SHARES));
            tokio::select! {
                told = signals.next() => match told {
                    Ok(Told::End(_)) => break Ok(Ended::Told),
                    Ok(Told::ReadAgain) => self.read_again(),
                    Err(error) => break Err(error),
                },
                () = keeper.watch() => {}
                words = panics.first() => break Err(anyhow::anyhow!("{words}")),
                ready = shards.readable() => {
                    let mut ready = ready?;
                    match self.take_from_shards() {
                        FromShards::More => ready.retain_ready(),
                        // The data plane has made its descriptor unreadable again.
                        FromShards::All => ready.clear_ready(),
                        FromShards::TunGone => break Err(anyhow::anyhow!("the TUN interface was taken away")),
                        FromShards::Failed(why) => break Err(anyhow::anyhow!("the data plane failed: {why}")),
                    }
                }
                event = self.relay_events.recv() => {
                    if let Some(event) = event {
                        self.take_from_relays(event);
                    }
                }
                received = after(discovery_opens, self.discovery.receive(&mut datagrams)) => {
                    let began = received?;
                    let now = now();
                    for datagram in datagrams.drain(..) {
                        let Datagram { at, from, local, bytes } = datagram;
                        self.agent.handle_datagram(now, at, from, local, &bytes);
                    }
                    self.carry_out();
                    self.discovery_budget.spend(thread_time().saturating_sub(began));
                    // There may be more at once: the relays' connections have their turn first.
                    tokio::task::yield_now().await;
                }
                event = next(&mut self.coord) => {
                    let ended = event.map_or(Ok(None), |event| self.take_from_coord(event));
                    if let Some(ended) = ended.transpose() {
                        break ended;
                    }
                }
                news = self.renewal.next() => {
                    if let Some(ended) = self.take_renewal_news(news).transpose() {
                        break ended;
                    }
                }
                Some(call) = after(calls_open, desk.calls.recv()) => {
                    let began = thread_time();
                    let ended = self.take_call(call, desk);
                    self.call_budget.spend(thread_time().saturating_sub(began));
                    if let Some(ended) = ended {
                        break Ok(ended);
                    }
                }
                Some(call) = after(calls_open, next(&mut self.configuration)) => {
                    let began = thread_time();
                    self.take_configuration_call(call);
                    self.call_budget.spend(thread_time().saturating_sub(began));
                }
                Some(finding) = self.findings.1.recv() => {
                    if let Some(ended) = self.take_finding(finding) {
                        break Ok(ended);
                    }
                }
                () = self.hostnet.news() => self.take_host_news(),
                () = self.dns.changed() => self.names_changed(),
                report = self.resolver.changed() => self.take_resolver_news(report),
                Some(()) = self.link_changed.recv() => self.link_changed(),
                () = at(self.minor_change.due()) => self.link_changed(),
                () = at(due) => {
                    let dataplane = &self.dataplane;
                    self.agent.handle_wall_clock(now(), wall());
                    self.agent.handle_timeout(now(), &|id| dataplane.activity(id));
                }
                () = self.sleep.jump() => self.agent.handle_wall_clock(now(), wall()),
                () = at(Some(self.timestamps.due())) => self.timestamps.renew(),
                () = at(Some(self.save_at)) => {
                    if !self.dataplane.tun_is_there() {
                        break Err(anyhow::anyhow!("the TUN interface was taken away"));
                    }
                    self.agent.handle_wall_clock(now(), wall());
                    self.save();
                    self.names_changed();
                    self.save_at = now() + SAVE_PERIOD;
                }
            }
        };
        self.save();
        let limit = (ended.as_ref()).map_or(Some(LEAVE_LIMIT), Ended::leave_limit);
        if let Some(limit) = limit {
            self.leave(limit).await;
        }
        self.timestamps.close();
        ended
    }

    /// Does everything the agent asks for; nothing here waits.
    fn carry_out(&mut self) {
        while let Some(output) = self.agent.poll_output() {
            match output {
                Output::ChangeNetwork(change) => self.dataplane.change_network(change),
                Output::SetPath(peer, mut decision) => {
                    let named = |to| self.discovery.named_source(to, decision.local);
                    decision.local = decision.udp.and_then(named);
                    self.dataplane.set_path(peer, decision);
                }
                Output::Initiate(peer) => self.dataplane.initiate(peer),
                Output::SetPeers { nodes, disco } => {
                    self.pools().for_each(|pool| pool.set_peers(nodes.clone()));
                    self.discovery.set_peers(disco);
                }
                Output::Unopened(peer, bytes) => self.dataplane.unopened(peer, bytes),
                Output::Configure(overlay) => {
                    self.discovery.set_inner(overlay.addresses.clone());
                    self.hostnet.set_overlay(overlay);
                }
                Output::SetDns(wish) => {
                    self.dns.set_wish(wish);
                    self.names_changed();
                }
                Output::Datagram {
                    peer,
                    to,
                    local,
                    bytes,
                    dont_fragment,
                } => {
                    let local = self.discovery.named_source(to, local);
                    if let Err(error) = self.discovery.send(to, local, &bytes, dont_fragment) {
                        let errno = error.raw_os_error().unwrap_or_default();
                        self.agent
                            .handle_send_error(now(), peer, to, errno, bytes.len());
                    }
                }
                Output::Stun { to, bytes } => {
                    if let Err(error) = self.discovery.send(to, None, &bytes, false) {
                        let errno = error.raw_os_error().unwrap_or_default();
                        self.agent.handle_stun_error(now(), to, errno);
                    }
                }
                Output::Relay { region, to, bytes } => {
                    for relays in [Some(&self.relays), self.renewal.relays()]
                        .into_iter()
                        .flatten()
                    {
                        relays.send_disco(region, &to, &bytes);
                    }
                }
                Output::SetDerpMap(map) => self.pools().for_each(|pool| pool.set_map(&map)),
                Output::SetHome(region) => {
                    self.pools().for_each(|pool| pool.set_home(Some(region)));
                    self.save_home();
                }
                Output::Publish => {
                    let report = self.agent.self_report();
                    self.note_routes(&report);
                    self.self_state.send_if_modified(|old| {
                        let changed = *old != report;
                        *old = report;
                        changed
                    });
                }
                Output::AskForMap => {
                    if let Some(coord) = &self.coord_client {
                        coord.redial();
                    }
                }
                Output::Resolve(host) => self.resolve(host),
                Output::MeasureHttps(regions) => self.measure_https(&regions),
                Output::ListInterfaces => self.list_interfaces(now()),
                Output::Story(event, fields) => self.log.write(event, fields),
                Output::Answer(question, answer) => {
                    if let Some(call) = self.questions.get(&question) {
                        call.tell(answer);
                    }
                }
                Output::AnswerEnd(question) => {
                    self.questions.remove(&question);
                }
            }
        }
    }
}

impl Node {
    /// Others are not to send here any more. Should the server not hear of it in time, the keeper goes on
    /// when the process ends.
    async fn leave(&self, limit: Duration) {
        let (Some(announced), Some(coord)) = (self.ledger.announced(), &self.coord_client) else {
            return;
        };
        match tokio::time::timeout(limit, coord.leave()).await {
            Ok(Ok(())) => self.ledger.done(&Entry::Announced(announced)),
            Ok(Err(error)) => tracing::debug!(error = format!("{error:#}"), "left to the keeper"),
            Err(_) => tracing::debug!("left to the keeper"),
        }
    }

    /// Routes that are announced have to be withdrawn after any kind of end, under the name we have then: the
    /// server would take another for a new one.
    fn note_routes(&mut self, report: &SelfState) {
        if let (Some(announced), Some(name)) = (&mut self.announced, &report.hostname) {
            announced.hostname.clone_from(name);
        }
        if let Some(announced) = self.announced.clone()
            && !report.routes.is_empty()
            && let Err(error) = self.ledger.before(Entry::Announced(announced))
        {
            tracing::warn!(%error, "if this node is killed, others will go on sending here for a while");
        }
    }
}

/// Does it, but not before `opens`.
async fn after<T>(opens: Instant, what: impl Future<Output = T>) -> T {
    at(Some(opens)).await;
    what.await
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
