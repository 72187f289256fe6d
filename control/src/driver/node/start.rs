//! Starting a node: from settings and keys to everything that runs.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use ringtail_dataplane::{Config, Offloads, TimeBudget};
use rustls::RootCertStore;
use socket2::SockRef;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use super::caches::stored_map;
use super::intake::Pace;
use super::life::Parts;
use super::login::{Coordination, Login, coord_config};
use super::plain;
use super::renew::Renewal;
use super::{Node, OVERDRAWN_MAX, SAVE_PERIOD, SAVED_MAX, now, wall};
use crate::agent::{Agent, Network, Setup, Surroundings};
use crate::config::{AuthKey, NodeConfig, Prefs, StaticNetwork, ValidateMode};
use crate::driver::control_url::ControlUrl;
use crate::driver::discovery::Discovery;
use crate::driver::dns::Dns;
use crate::driver::dns_host::HostResolver;
use crate::driver::events::EventLog;
use crate::driver::files;
use crate::driver::hostnet::{self, HostNet};
use crate::driver::interface::Interface;
use crate::driver::ledger::{Announced, Ledger};
use crate::driver::names::Names;
use crate::driver::relay::{RelayOptions, RelayPool};
use crate::driver::runtime::Kind;
use crate::driver::state::{Keys, StateDir, TIMESTAMP_FILE};
use crate::driver::timestamps::Timestamps;
use crate::driver::underlay::Underlay;
use crate::driver::{link, sleep, uapi};
use crate::hostnet::MARK_DEFAULT;
use crate::key::MachinePublic;
use crate::path::{self, Validate};

/// Questions of the configuration socket that wait for an answer.
const QUESTIONS_MAX: usize = 64;
/// Results of look-ups and measurements that wait for the loop.
const RESULTS_MAX: usize = 64;
/// Inner MTU unless told otherwise: what every Tailscale node uses.
const MTU_DEFAULT: u16 = 1280;
/// Name of the TUN interface unless told otherwise.
const TUN_DEFAULT: &str = "ringtail0";

/// Who tells us about the network.
pub(super) enum Source {
    Static(Box<Network>),
    Coord {
        url: String,
        auth_key: Option<Zeroizing<String>>,
        tags: Vec<String>,
        control_key: Option<MachinePublic>,
    },
}

impl Source {
    /// Reads who it is; `auth_key` is what may let us in.
    ///
    /// # Errors
    /// A file or a key is wrong.
    pub(super) fn read(
        config: &NodeConfig,
        keys: &Keys,
        auth_key: Option<Zeroizing<String>>,
    ) -> anyhow::Result<Self> {
        if let Some(path) = &config.network {
            return Ok(Self::Static(Box::new(StaticNetwork::read(path)?.into())));
        }
        let url = config
            .coord
            .clone()
            .context("neither --coord nor --network is given")?;
        let tags = config.advertise_tags.clone();
        let given = config.control_key.as_deref().map(str::parse).transpose();
        let given = given.context("--control-key")?;
        let stored = keys.control.as_ref().filter(|(of, _)| *of == url);
        Ok(Self::Coord {
            url,
            auth_key,
            tags: tags.map(|tags| tags.0).unwrap_or_default(),
            control_key: given.or_else(|| stored.map(|(_, key)| *key)),
        })
    }
}

/// The auth key, from where somebody has put it: the command line, a file, the environment.
///
/// # Errors
/// The file cannot be read.
pub(super) fn auth_key(config: &NodeConfig) -> anyhow::Result<Option<Zeroizing<String>>> {
    let mut file = config.auth_key_file.as_deref();
    if let Some(AuthKey(key)) = &config.auth_key {
        let Some(named) = key.strip_prefix("file:") else {
            tracing::warn!(
                "the auth key stands on the command line, where every user of this host can read it: \
                 better give --auth-key-file or {}",
                AuthKey::VARIABLE
            );
            return Ok(Some(key.clone()));
        };
        file = Some(Path::new(named));
    }
    if let Some(file) = file {
        let key = files::read_auth_key(file)?;
        if key.is_empty() {
            tracing::warn!(file = %file.display(), "there is no auth key in this file");
        }
        return Ok(Some(key).filter(|key| !key.is_empty()));
    }
    let key = std::env::var(AuthKey::VARIABLE).map(Zeroizing::new);
    let key = key.ok().map(|key| Zeroizing::new(key.trim().to_owned()));
    Ok(key.filter(|key| !key.is_empty()))
}

/// The mark of underlay sockets: the chosen one, or the default where this process may set marks.
pub(super) fn underlay_mark(chosen: Option<u32>) -> u32 {
    chosen.unwrap_or_else(|| {
        let probe = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0));
        match probe.and_then(|socket| SockRef::from(&socket).set_mark(MARK_DEFAULT)) {
            Ok(()) => MARK_DEFAULT,
            Err(error) => {
                tracing::warn!(%error, "underlay sockets get no mark");
                0
            }
        }
    })
}

pub(super) fn dataplane_config(config: &NodeConfig, keys: &Keys) -> Config {
    Config {
        tun_name: config.tun.clone().unwrap_or_else(|| TUN_DEFAULT.to_owned()),
        mtu: config.mtu.unwrap_or(MTU_DEFAULT),
        shards: config
            .shards
            .unwrap_or_else(ringtail_dataplane::shards_by_default)
            .min(ringtail_dataplane::SHARDS_MAX),
        pin: config
            .pin
            .unwrap_or_else(ringtail_dataplane::pinned_by_default),
        driver: config.driver.unwrap_or_default().into(),
        offloads: Offloads {
            tun: config.tun_offload.unwrap_or(true),
            gso: config.udp_gso.unwrap_or(true),
            gro: config.udp_gro.unwrap_or(true),
        },
        listen_port: config.listen_port.unwrap_or(NodeConfig::LISTEN_PORT),
        fwmark: config.fwmark.unwrap_or(0),
        private_key: Some(Zeroizing::new(*keys.node.as_bytes())),
        roam: false,
        engine: config.engine.unwrap_or_default().into(),
    }
}

/// The host's name, which a node has unless told otherwise.
pub(super) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() {
        "ringtail".into()
    } else {
        name.to_owned()
    }
}

impl Node {
    pub(super) async fn start(
        config: NodeConfig,
        state: StateDir,
        ledger: Ledger,
        prefs: Prefs,
        parts: Parts,
        roots: Arc<RootCertStore>,
        kind: Kind,
    ) -> anyhow::Result<Self> {
        let Parts {
            keys,
            source,
            dataplane,
        } = parts;
        let hostname = prefs.hostname.clone();
        let mtu = config.mtu.unwrap_or(MTU_DEFAULT);
        let log = EventLog::open(config.events.as_deref(), &hostname)?;
        let (v4, v6) = dataplane.discovery_sockets()?;
        let interface = Interface::open(dataplane.tun_name()).await?;
        interface.up(mtu).await?;
        let tun_index = interface.index();
        let hostnet = HostNet::start(hostnet::Options {
            table: config.table,
            handed_in: config.advertise_routes_from,
            fwmark: config.fwmark.unwrap_or(0),
            port: dataplane.local_port(),
            tun: (dataplane.tun_name().to_owned(), tun_index),
            ledger: ledger.clone(),
        })?;
        let tun = (dataplane.tun_name(), tun_index);
        let resolver = HostResolver::start(tun, &state, ledger.clone())?;
        hostnet.set_resolvers(&resolver.report().outside);
        let dns = Dns::start(dataplane.tun_name())?;
        dns.set_host_resolvers(resolver.report().base.servers);
        let underlay = Underlay {
            fwmark: config.fwmark.unwrap_or(0),
            outside: Some(hostnet.outside()),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn_local(async move { interface.keep_mtu_capped().await });
        let (link_sender, link_changed) = mpsc::channel(1);
        tasks.spawn_local(link::watch(tun_index, link_sender));
        let configuration =
            serve_configuration(dataplane.tun_name(), &mut tasks).inspect_err(|error| {
                tracing::warn!(error = format!("{error:#}"), "`wg` will not see this node");
            });
        let (_configuration_socket, configuration) = configuration.ok().unzip();
        let names = Names::default();
        let (relays, relay_events) = RelayPool::new(RelayOptions {
            names: names.clone(),
            private: keys.node.clone(),
            underlay: underlay.clone(),
            io: kind,
            roots: roots.clone(),
        });
        let mut agent = Agent::new(
            now(),
            Setup {
                node_key: keys.node.public(),
                disco_key: keys.disco.clone(),
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
                peerapi: dns.peerapi(),
            },
            rand::random(),
        );
        agent.set_plain_peers(plain::peers(&config.peers)?);
        let findings = mpsc::channel(RESULTS_MAX);
        plain::follow_names(
            &config.peers,
            &names,
            underlay.fwmark,
            &findings.0,
            &mut tasks,
        );
        let surroundings = Surroundings {
            mtu,
            shards: dataplane.stats().shards.len(),
            driver: dataplane.driver().name(),
            coordination: None,
            coordination_state: "static network file".into(),
        };
        let mut node = Self {
            agent,
            discovery: Discovery::new(v4, v6, config.fwmark.unwrap_or(0))?,
            discovery_budget: TimeBudget::new(now(), SAVED_MAX, OVERDRAWN_MAX),
            call_budget: TimeBudget::new(now(), SAVED_MAX, OVERDRAWN_MAX),
            relayed_at: None,
            names,
            relays,
            relay_events,
            coord: None,
            coord_client: None,
            coordination: None,
            login: Login::default(),
            renewal: Renewal::new(),
            self_state: watch::Sender::default(),
            ledger,
            announced: None,
            resolver,
            hostnet,
            dns,
            link_changed,
            sleep: sleep::Watch::new(),
            timestamps: Timestamps::open(state.file(TIMESTAMP_FILE)),
            minor_change: Pace::default(),
            new_address: Pace::default(),
            addresses: Vec::new(),
            _configuration_socket,
            configuration,
            handshakes: RefCell::default(),
            questions: BTreeMap::new(),
            questions_asked: 0,
            pongs: BTreeMap::new(),
            findings,
            _tasks: tasks,
            log,
            state,
            keys,
            fwmark: config.fwmark.unwrap_or(0),
            engine: config.engine.unwrap_or_default().into(),
            surroundings,
            network_file: config.network.clone(),
            told_up: false,
            default_sources: [None, None],
            unsaved: None,
            paths_saved: Vec::new(),
            home_saved: None,
            sessions_saved: Vec::new(),
            save_at: now() + SAVE_PERIOD,
            dataplane,
        };
        if let Source::Coord { url, .. } = &source {
            node.announced = Some(Announced {
                url: url.clone(),
                hostname: hostname.clone(),
                fwmark: node.fwmark,
                ca_file: config.ca_file.clone(),
            });
        }
        node.join(source, prefs, underlay, roots)?;
        Ok(node)
    }

    /// Takes the static network, or the last one known and the coordination client.
    fn join(
        &mut self,
        source: Source,
        prefs: Prefs,
        underlay: Underlay,
        roots: Arc<RootCertStore>,
    ) -> anyhow::Result<()> {
        let now = now();
        self.list_interfaces(now);
        self.agent.handle_wall_clock(now, wall());
        let hostname = prefs.hostname.clone();
        self.agent.handle_prefs(now, prefs);
        match (coord_config(&source, &self.keys, &hostname), source) {
            (Some(config), _) => {
                self.surroundings.coordination = Some(config.url.clone());
                self.surroundings.coordination_state = "connecting".into();
                self.relays.set_alone(true);
                self.load_home();
                if let Some(network) = stored_map(&self.state, &config.url) {
                    tracing::info!(
                        peers = network.peers.len(),
                        "using the network map of the last run"
                    );
                    self.agent.handle_network(now, network);
                }
                // A URL that is none is told before anything else happens.
                ControlUrl::parse(&config.url)?;
                self.coordination = Some(Coordination {
                    config,
                    underlay,
                    roots,
                });
                if !self.resume_renewal() {
                    self.connect_coordination(true);
                }
            }
            (None, Source::Static(network)) => self.agent.handle_network(now, *network),
            (None, Source::Coord { .. }) => {}
        }
        self.load_paths(now);
        self.load_sessions(now);
        Ok(())
    }
}

/// Opens the configuration socket. A node can do without: on one machine, nodes in different
/// namespaces may have interfaces of one name, and only the first of them gets the socket.
fn serve_configuration(
    interface: &str,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<(uapi::Socket, mpsc::Receiver<uapi::Call>)> {
    let socket = uapi::Socket::bind(Path::new(uapi::SOCKET_DIR), interface)?;
    let (sender, calls) = mpsc::channel(QUESTIONS_MAX);
    tasks.spawn_local(uapi::serve(socket.listener()?, sender));
    Ok((socket, calls))
}
