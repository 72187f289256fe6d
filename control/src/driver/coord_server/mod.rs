//! The coordination server's sockets: listeners, upgrade, Noise, HTTP/2, and the one task that
//! owns the state.
//!
//! ```text
//! accept -> (TLS) -> HTTP/1: /key /health /verify /metrics
//!                          /ts2021 -> Noise -> HTTP/2: /machine/register, /machine/map
//!                                                 |  Ask            ^ MapResponse (per stream)
//!                                             the actor: coord::server::Server, one Store
//! ```
//!
//! Anybody may finish the Noise handshake. A connection is a stranger's, with a small place
//! ([`super::places`]), little to send and little time, until it has proven to be of a machine of
//! which a node is stored: by its first Noise record, or when a registration made it one. The actor
//! says so, and says when it is over. Every refusal is counted in [`Counters`], those for want of a
//! place in the [`Door`].
//!
//! Rooms: `outer` is listeners, TLS, HTTP/1 and what a stranger may, of which `metered` counts the bytes;
//! `inner` is Noise and HTTP/2 with the limits of streams, pings and bodies; `answer` takes bodies in and
//! gives answers out; `actor` owns the state; `counters`. Limits of more than one of them are here.

mod actor;
mod answer;
mod counters;
mod inner;
mod metered;
mod outer;

use self::counters::Counters;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot};
use tokio::task::JoinHandle;

use self::actor::{Actor, Ask, tell_unknown_users};
use self::answer::Encoder;
use self::outer::accept;
use crate::coord::admin::{Done, Order};
use crate::coord::server::{Server, ServerConfig, SessionId};
use crate::driver::clock::now;
use crate::driver::coord_store::{Database, Store};
use crate::driver::places::{Door, Place};
use crate::driver::{descriptors, sleep};
use crate::key::{MachinePrivate, MachinePublic};
use crate::netmap::wire::DnsConfig;
use crate::netmap::{DerpMap, PEERS_MAX};
use crate::places::{Bounds, Limits};
use crate::policy::Policy;

/// Connections at most: every node that there can be has one, and another that takes its place.
const LIMITS: Limits = Limits {
    strangers: Bounds {
        all: 512,
        wide: 128,
        narrow: 64,
    },
    // A proxy on this machine brings all strangers from one address.
    local: Bounds {
        all: 256,
        wide: 256,
        narrow: 128,
    },
    known: Bounds::of_all(PEERS_MAX + PEERS_MAX / 4),
    owner: 8,
};

/// Descriptors that are not for connections: listeners, the state file.
const DESCRIPTORS_KEPT: usize = 64;

/// Head of the HTTP request, and Noise after the upgrade.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Questions of strangers that wait for the actor, so that those known do not wait behind them.
const STRANGER_ASKS_MAX: usize = 8;

/// Head of an HTTP request.
const HEADER_LEN_MAX: usize = 16 * 1024;

/// Questions that may wait for the actor.
const ASKS_MAX: usize = 256;

/// What a running server is made of.
pub struct CoordServerConfig {
    /// Bound sockets.
    pub listeners: Vec<std::net::TcpListener>,
    /// Certificate and key, when the listeners speak TLS.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// The server's Noise key.
    pub control: MachinePrivate,
    /// Its state file.
    pub database: Database,
    /// Names, addresses, relays. Users are those of the state file.
    pub server: ServerConfig,
    /// Who may reach what; none: all may do everything.
    pub policy: Option<Policy>,
}

/// What may be replaced while a server runs: none of it stays as it is.
#[derive(Debug, Default)]
pub struct Settings {
    /// The relays.
    pub derp_map: Option<DerpMap>,
    /// Resolvers and extra names.
    pub dns: Option<DnsConfig>,
    /// Who may reach what.
    pub policy: Option<Policy>,
}

/// A running server; dropping it ends every connection at once, [`CoordServer::stop`] writes what
/// waits to be written first.
#[derive(Debug)]
pub struct CoordServer {
    shared: Arc<Shared>,
    actor: JoinHandle<()>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    control: MachinePrivate,
    asks: mpsc::Sender<Ask>,
    ended: mpsc::UnboundedSender<SessionId>,
    counters: Arc<Counters>,
    door: Arc<Door<MachinePublic>>,
    stranger_asks: Semaphore,
    encoder: Encoder,
    /// Every connection's task ends when this closes.
    alive: tokio::sync::watch::Sender<()>,
}

impl Shared {
    /// Asks the actor; a stranger's question waits for those of other strangers. None when the
    /// server is stopping.
    async fn ask<T>(
        &self,
        is_known: bool,
        ask: impl FnOnce(oneshot::Sender<T>) -> Ask,
    ) -> Option<T> {
        let _turn: Option<SemaphorePermit<'_>> = if is_known {
            None
        } else {
            Some(self.stranger_asks.acquire().await.ok()?)
        };
        let (answer, answered) = oneshot::channel();
        self.asks.send(ask(answer)).await.ok()?;
        answered.await.ok()
    }

    /// Names and values, as `/metrics` shows them.
    fn list(&self) -> Vec<(&'static str, u64)> {
        let mut list = self.counters.snapshot();
        list.extend(self.door.list());
        list
    }
}

/// A connection's place, and whose it is said to be.
#[derive(Clone, Debug)]
struct Client {
    machine: MachinePublic,
    place: Arc<Place<MachinePublic>>,
}

impl CoordServer {
    /// Loads the state and begins to listen, on the current tokio runtime.
    ///
    /// # Errors
    /// When the state cannot be loaded or a listener is not usable.
    pub fn start(config: CoordServerConfig) -> anyhow::Result<Self> {
        let loaded = config.database.load().context("cannot load the state")?;
        descriptors::raise_limit();
        let limits = LIMITS.within(descriptors::left().saturating_sub(DESCRIPTORS_KEPT));
        tracing::info!(
            nodes = limits.known.all,
            strangers = limits.strangers.all,
            "connections at most"
        );
        let now = now();
        let users = loaded.users;
        let mut server = Server::new(
            now,
            ServerConfig {
                users,
                ..config.server
            },
            loaded.nodes,
            loaded.last_id,
            loaded.last_host,
        );
        server.set_policy(now, config.policy);
        tell_unknown_users(&server);
        let (asks, asked) = mpsc::channel(ASKS_MAX);
        let (ended, ends) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            control: config.control,
            asks,
            ended,
            counters: Arc::default(),
            door: Door::new(limits),
            stranger_asks: Semaphore::new(STRANGER_ASKS_MAX),
            encoder: Encoder::default(),
            alive: tokio::sync::watch::Sender::new(()),
        });
        let store = Store::start(config.database)?;
        let actor = Actor::new(server, store, &shared);
        let actor = tokio::spawn(actor.run(asked, ends));
        let mut tasks = vec![tokio::spawn(sleep::watch())];
        for listener in config.listeners {
            listener
                .set_nonblocking(true)
                .context("cannot use a listener")?;
            let listener = TcpListener::from_std(listener).context("cannot use a listener")?;
            let acceptor = config.tls.clone().map(tokio_rustls::TlsAcceptor::from);
            tasks.push(tokio::spawn(accept(
                listener,
                acceptor,
                Arc::clone(&shared),
            )));
        }
        Ok(Self {
            shared,
            actor,
            tasks,
        })
    }

    /// What was served and refused, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters.snapshot()
    }

    /// Replaces what is given; all nodes are told.
    pub async fn set(&self, settings: Settings) {
        let _ = self
            .shared
            .asks
            .send(Ask::Settings(Box::new(settings)))
            .await;
    }

    /// The way by which administrators' orders reach it.
    pub fn orders(&self) -> Orders {
        Orders {
            asks: self.shared.asks.clone(),
        }
    }

    /// Waits until one of its tasks ends by itself, and says which: there is no going on without.
    pub async fn failed(&mut self) -> &'static str {
        tokio::select! {
            _ = &mut self.actor => "the task with the state failed",
            _ = futures_util::future::select_all(&mut self.tasks), if !self.tasks.is_empty() => {
                "a listener failed"
            }
        }
    }

    /// Writes what waits to be written and ends.
    pub async fn stop(self) {
        let (done, finished) = oneshot::channel();
        if self.shared.asks.send(Ask::Stop(done)).await.is_ok() {
            let _ = finished.await;
        }
    }
}

impl Drop for CoordServer {
    fn drop(&mut self) {
        self.actor.abort();
        for task in &self.tasks {
            task.abort();
        }
        // Connections hear of it and end.
        let _ = self.shared.alive.send(());
    }
}

/// Has administrators' orders carried out by a running server.
#[derive(Clone, Debug)]
pub struct Orders {
    asks: mpsc::Sender<Ask>,
}

impl Orders {
    /// Carries one out: it is stored and in force when this returns.
    ///
    /// # Errors
    /// A sentence for people: why not. Nothing was done then.
    pub async fn give(&self, order: Order) -> Result<Done, String> {
        let stopping = || "the server is stopping".to_owned();
        let (answer, done) = oneshot::channel();
        let ask = Ask::Order(order, answer);
        self.asks.send(ask).await.map_err(|_| stopping())?;
        done.await.map_err(|_| stopping())?
    }
}
