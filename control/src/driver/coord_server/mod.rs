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

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as TaskContext, Poll, ready};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Frame, Incoming};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::clock::{at, now, wall};
use super::control_url::ByteStream;
use super::coord_store::{Database, Store};
use super::metered::Metered;
use super::noise_stream::NoiseStream;
use super::places::{Door, Place};
use super::{descriptors, sleep};
use crate::coord::admin::{self, Done, Order};
use crate::coord::auth_key::{self, KeyCheck};
use crate::coord::frames::{Codec, encode};
use crate::coord::limit::{FailureLimit, LogLimit};
use crate::coord::server::{
    CAPABILITY_VERSION_MIN, MapAnswer, MapRefusal, Registration, Server, ServerConfig, SessionId,
    is_logout,
};
use crate::key::{MachinePrivate, MachinePublic, NodePublic};
use crate::netmap::wire::{
    KeyResponse, MapRequest, MapResponse, RegisterRequest, RegisterResponse,
};
use crate::netmap::{DerpMap, PEERS_MAX};
use crate::noise::{INITIATION_LEN, encode_early, respond};
use crate::places::{Bounds, Limits};

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

/// How long nothing is accepted after that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Head of the HTTP request, and Noise after the upgrade.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A stranger's connection is closed after this.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes a stranger may send on one connection, in all.
const STRANGER_BYTES_MAX: usize = 256 * 1024;

/// Questions of strangers that wait for the actor, so that those known do not wait behind them.
const STRANGER_ASKS_MAX: usize = 8;

/// Body of a register or map request.
const BODY_LEN_MAX: usize = 1 << 20;

/// Body of a `/verify` request.
const VERIFY_LEN_MAX: usize = 4096;

/// The same of a stranger, who can only want to register.
const STRANGER_BODY_LEN_MAX: usize = 64 * 1024;

/// Requests that are read, asked about and answered at a time on one connection: a node sends few, and
/// the others are not to wait behind many of one.
const AT_WORK_MAX: usize = 4;

/// Time for a request's body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The same for a stranger's.
const STRANGER_BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Head of an HTTP request.
const HEADER_LEN_MAX: usize = 16 * 1024;

/// Requests that may run at a time on one connection, also those whose answers are not read: each of
/// them may hold a whole map. A node has a map stream, now and then an older one, and reports.
const STREAMS_MAX: u32 = 8;

/// The same on one that began as a stranger's: enough for a map stream and what a node reports.
const STRANGER_STREAMS_MAX: u32 = 2;

/// Streams a stranger may have us reset before its connection ends.
const STRANGER_RESETS_MAX: usize = 16;

/// HTTP/2 PING and how long its answer may take.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);

/// Questions that may wait for the actor.
const ASKS_MAX: usize = 256;

/// Messages a map stream may be behind; what comes later is folded into one difference.
const STREAM_QUEUE_MAX: usize = 2;

/// How long a change may wait to be written behind.
const WRITE_DELAY: Duration = Duration::from_secs(2);

/// Requests larger than this have no business in a receive window.
const STREAM_WINDOW: u32 = 1 << 20;

/// The same for a stranger's.
const STRANGER_WINDOW: u32 = 64 * 1024;

/// What was served and what was refused, since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections accepted.
    pub connections: AtomicU64,
    /// Connections that ended with broken HTTP or TLS.
    pub bad_http: AtomicU64,
    /// Upgrades refused: wrong headers.
    pub bad_upgrade: AtomicU64,
    /// Noise handshakes refused: not decodable, or another server's key.
    pub bad_noise: AtomicU64,
    /// Connections and requests with a capability version that is too low.
    pub bad_version: AtomicU64,
    /// Connections that ended with broken records or broken HTTP/2.
    pub bad_stream: AtomicU64,
    /// Requests refused: not JSON, or of a wrong shape.
    pub bad_request: AtomicU64,
    /// Requests refused: body over the limit.
    pub too_large: AtomicU64,
    /// Requests for paths that do not exist.
    pub not_found: AtomicU64,
    /// Map requests of nodes we do not know.
    pub unknown_node: AtomicU64,
    /// Registrations refused.
    pub refused_registration: AtomicU64,
    /// Registrations put off because of too many failures from one address.
    pub rate_limited: AtomicU64,
    /// Connections and requests that took too long, those of strangers above all.
    pub timed_out: AtomicU64,
    /// Connections that could not be accepted.
    pub accept_errors: AtomicU64,
    /// Registrations that succeeded.
    pub registrations: AtomicU64,
    /// Nodes that logged out.
    pub log_outs: AtomicU64,
    /// Map requests that succeeded.
    pub map_requests: AtomicU64,
    /// Messages given to map streams.
    pub messages: AtomicU64,
    /// Failures of the store.
    pub store_errors: AtomicU64,
    /// Map requests of nodes whose key has expired that were refused.
    pub expired_node: AtomicU64,
    /// Announced routes that were not looked at, because a node had more than there may be.
    pub routes_left_out: AtomicU64,
    /// What administrators had done with nodes.
    pub orders: AtomicU64,
}

impl Counters {
    /// Names and values, as `/metrics` shows them.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let all = [
            ("connections", &self.connections),
            ("bad_http", &self.bad_http),
            ("bad_upgrade", &self.bad_upgrade),
            ("bad_noise", &self.bad_noise),
            ("bad_version", &self.bad_version),
            ("bad_stream", &self.bad_stream),
            ("bad_request", &self.bad_request),
            ("too_large", &self.too_large),
            ("not_found", &self.not_found),
            ("unknown_node", &self.unknown_node),
            ("refused_registration", &self.refused_registration),
            ("rate_limited", &self.rate_limited),
            ("timed_out", &self.timed_out),
            ("accept_errors", &self.accept_errors),
            ("registrations", &self.registrations),
            ("log_outs", &self.log_outs),
            ("map_requests", &self.map_requests),
            ("messages", &self.messages),
            ("store_errors", &self.store_errors),
            ("expired_node", &self.expired_node),
            ("routes_left_out", &self.routes_left_out),
            ("orders", &self.orders),
        ];
        all.map(|(name, value)| (name, value.load(Ordering::Relaxed)))
            .to_vec()
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

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
    /// Names, addresses, relays.
    pub server: ServerConfig,
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
    counters: Counters,
    door: Arc<Door<MachinePublic>>,
    stranger_asks: Semaphore,
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
        let mut list = self.counters.list();
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

/// A question to the actor.
#[derive(Debug)]
enum Ask {
    /// A machine has proven its key.
    Greet(Client, oneshot::Sender<()>),
    Register(
        Client,
        IpAddr,
        Box<RegisterRequest>,
        oneshot::Sender<Registered>,
    ),
    Map(
        Client,
        Box<MapRequest>,
        oneshot::Sender<Result<Mapped, MapRefusal>>,
    ),
    Verify(NodePublic, oneshot::Sender<bool>),
    DerpMap(DerpMap),
    Order(Order, oneshot::Sender<Result<Done, String>>),
    Stop(oneshot::Sender<()>),
}

#[derive(Debug)]
enum Registered {
    Answer(RegisterResponse),
    TooMany(Duration),
    StoreFailed,
}

#[derive(Debug)]
enum Mapped {
    Taken,
    Once(Box<MapResponse>),
    Stream(SessionId, Codec, mpsc::Receiver<MapResponse>),
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
        let server = Server::new(
            now,
            config.server,
            loaded.nodes,
            loaded.last_id,
            loaded.last_host,
        );
        let (asks, asked) = mpsc::channel(ASKS_MAX);
        let (ended, ends) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            control: config.control,
            asks,
            ended,
            counters: Counters::default(),
            door: Door::new(limits),
            stranger_asks: Semaphore::new(STRANGER_ASKS_MAX),
            alive: tokio::sync::watch::Sender::new(()),
        });
        let actor = Actor {
            server,
            store: Store::start(config.database)?,
            shared: Arc::downgrade(&shared),
            streams: BTreeMap::new(),
            failures: FailureLimit::default(),
            refusals: LogLimit::default(),
            write_at: None,
        };
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

    /// What was served and refused.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Replaces the relays; all nodes are told.
    pub async fn set_derp_map(&self, derp_map: DerpMap) {
        let _ = self.shared.asks.send(Ask::DerpMap(derp_map)).await;
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

/// Owns the state; every question passes through here, one at a time.
struct Actor {
    server: Server,
    store: Store,
    shared: std::sync::Weak<Shared>,
    streams: BTreeMap<SessionId, mpsc::Sender<MapResponse>>,
    failures: FailureLimit,
    refusals: LogLimit,
    write_at: Option<Instant>,
}

impl Actor {
    async fn run(
        mut self,
        mut asked: mpsc::Receiver<Ask>,
        mut ends: mpsc::UnboundedReceiver<SessionId>,
    ) {
        let mut timeout = self.server.poll_timeout();
        loop {
            tokio::select! {
                ask = asked.recv() => match ask {
                    Some(Ask::Stop(done)) => {
                        self.write().await;
                        let _ = done.send(());
                        return;
                    }
                    // What strangers may ask for ever is not to cost a look at every stream.
                    Some(ask) => if !self.handle(ask).await {
                        continue;
                    },
                    None => return,
                },
                Some(id) = ends.recv() => self.end(id),
                () = at(timeout) => self.server.handle_timeout(now()),
                () = at(self.write_at) => self.write().await,
            }
            self.tell_left_out();
            self.pump();
            self.forget();
            timeout = self.server.poll_timeout();
            if self.write_at.is_none() && self.server.has_writes() {
                self.write_at = Some(now() + WRITE_DELAY);
            }
        }
    }

    /// Answers; whether anything may have changed.
    async fn handle(&mut self, ask: Ask) -> bool {
        match ask {
            Ask::Greet(client, answer) => {
                self.recognise(&client);
                let _ = answer.send(());
                false
            }
            Ask::Register(client, source, request, answer) => {
                let machine = client.machine;
                let registered = self.register(machine, source, &request).await;
                self.tell_refusal(machine, source, &request, &registered);
                self.recognise(&client);
                // What could not be stored is to be tried again: there is something to do.
                let refused = match &registered {
                    Registered::Answer(answer) => !answer.error.is_empty(),
                    Registered::TooMany(_) => true,
                    Registered::StoreFailed => false,
                };
                let _ = answer.send(registered);
                !refused
            }
            Ask::Map(client, request, answer) => {
                let wall = wall();
                let random = rand::random();
                let mapped = self
                    .server
                    .handle_map(now(), wall, client.machine, &request, random);
                let refused = mapped.is_err();
                let mapped = mapped.map(|mapped| match mapped {
                    MapAnswer::Taken => Mapped::Taken,
                    MapAnswer::Once(message) => Mapped::Once(message),
                    MapAnswer::Stream(id) => {
                        // One more for the last message.
                        let (sender, receiver) = mpsc::channel(STREAM_QUEUE_MAX + 1);
                        self.streams.insert(id, sender);
                        Mapped::Stream(id, self.server.codec(id), receiver)
                    }
                });
                // The asker may be gone; then its stream ends with the receiver.
                if let Err(Ok(Mapped::Stream(id, ..))) = answer.send(mapped) {
                    self.end(id);
                }
                !refused
            }
            Ask::Verify(key, answer) => {
                let member = self.server.is_member(key);
                let _ = answer.send(member);
                false
            }
            Ask::DerpMap(derp_map) => {
                self.server.set_derp_map(now(), derp_map);
                true
            }
            Ask::Order(order, answer) => {
                let _ = answer.send(self.carry_out(&order).await);
                true
            }
            Ask::Stop(_) => false,
        }
    }

    /// A machine is known if a node of it is stored, and for nothing else.
    fn recognise(&self, client: &Client) {
        if self.server.knows(client.machine) && !client.place.is_known() {
            client.place.becomes_known(client.machine);
        }
    }

    /// Machines whose nodes are gone are strangers, also on connections that stand.
    fn forget(&mut self) {
        let forgotten = self.server.take_forgotten();
        if let Some(shared) = self.shared.upgrade() {
            for machine in forgotten {
                shared.door.estrange(machine);
            }
        }
    }

    async fn register(
        &mut self,
        machine: MachinePublic,
        source: IpAddr,
        request: &RegisterRequest,
    ) -> Registered {
        let wall = wall();
        let text = request.auth.as_ref().map(|auth| auth.auth_key.clone());
        let text = text.filter(|text| !text.is_empty());
        let key = match text {
            Some(text) if !self.server.needs_no_key(wall, machine, request) => {
                if let Some(wait) = self.failures.check(now(), source) {
                    return Registered::TooMany(wait);
                }
                let name = auth_key::name(&text);
                let found = self
                    .store
                    .call(move |database| database.find_key(&name))
                    .await;
                match found {
                    Ok(key) => KeyCheck::of(&text, key.as_ref(), wall),
                    Err(error) => return self.store_failed(&error),
                }
            }
            Some(_) | None => KeyCheck::Absent,
        };
        let plan = self.server.plan_register(wall, machine, request, &key);
        if let KeyCheck::Unknown | KeyCheck::Expired | KeyCheck::Used = key {
            self.failures.handle_failure(now(), source);
        }
        let (record, host) = match &plan {
            Registration::Answer(answer) => return Registered::Answer(answer.clone()),
            Registration::Insert(record, _) => (record, self.server.host_number(record)),
            Registration::Rekey(record, _) | Registration::Expire(record) => (record, 0),
            Registration::Delete(_) => return self.commit(plan, 0).await,
        };
        tracing::info!(node = record.id, name = record.name, machine = %machine.short(),
                       key = %record.node_key.short(), "registration");
        self.commit(plan, host).await
    }

    /// Writes to the log whom we did not let in and why; never the key that was shown.
    fn tell_refusal(
        &mut self,
        machine: MachinePublic,
        source: IpAddr,
        request: &RegisterRequest,
        registered: &Registered,
    ) {
        let why = match registered {
            Registered::Answer(answer) if !answer.error.is_empty() => answer.error.as_str(),
            Registered::Answer(answer)
                if answer.node_key_expired && !is_logout(wall(), request) =>
            {
                "its key has expired, and it shows no auth key"
            }
            Registered::TooMany(_) => "too many bad auth keys from this address",
            // Let in, logged out, or in the log already.
            Registered::Answer(_) | Registered::StoreFailed => return,
        };
        let Some(left_out) = self.refusals.admit(now()) else {
            return;
        };
        let name = request
            .hostinfo
            .as_ref()
            .and_then(|info| info["Hostname"].as_str());
        let name: String = name.unwrap_or_default().chars().take(63).collect();
        tracing::warn!(%source, ?name, machine = %machine.short(), why, "a join was refused");
        if left_out > 0 {
            tracing::warn!(
                left_out,
                "more joins were refused than the log has lines for"
            );
        }
    }

    /// Plans an order, commits it, then puts it into force.
    async fn carry_out(&mut self, order: &Order) -> Result<Done, String> {
        let planned = admin::plan(self.server.records(), order, wall());
        let (write, done) = planned.map_err(|refusal| refusal.to_string())?;
        if let Some(write) = write {
            self.write().await;
            let copy = [write.clone()];
            if let Err(error) = self.store.call(move |database| database.write(&copy)).await {
                self.store_failed(&error);
                return Err(format!("the server cannot store this now: {error:#}"));
            }
            self.server.put(now(), write);
        }
        if let Some(shared) = self.shared.upgrade() {
            count(&shared.counters.orders);
        }
        tracing::info!(
            node = done.id,
            name = done.name,
            ?order,
            "an administrator's order"
        );
        Ok(done)
    }

    /// Counts the routes that some node announced in vain.
    fn tell_left_out(&mut self) {
        let left_out = self.server.take_left_out();
        if left_out == 0 {
            return;
        }
        if let Some(shared) = self.shared.upgrade() {
            let more = u64::try_from(left_out).unwrap_or(u64::MAX);
            let counter = &shared.counters.routes_left_out;
            counter.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// Commits, then applies. What waits to be written goes first, so that names and addresses
    /// that became free are free in the store too.
    async fn commit(&mut self, plan: Registration, host: u32) -> Registered {
        self.write().await;
        let copy = plan.clone();
        let committed = self
            .store
            .call(move |database| database.commit(&copy, host))
            .await;
        match committed {
            Ok(true) => Registered::Answer(self.server.apply(now(), plan)),
            Ok(false) => Registered::Answer(RegisterResponse {
                error: KeyCheck::Used.error().unwrap_or_default().to_owned(),
                ..RegisterResponse::default()
            }),
            Err(error) => self.store_failed(&error),
        }
    }

    fn store_failed(&self, error: &anyhow::Error) -> Registered {
        tracing::error!(
            error = format!("{error:#}"),
            "the state file cannot be used"
        );
        if let Some(shared) = self.shared.upgrade() {
            count(&shared.counters.store_errors);
        }
        Registered::StoreFailed
    }

    /// Writes what was collected; what fails stays to be written.
    async fn write(&mut self) {
        self.write_at = None;
        let writes = self.server.take_writes();
        if writes.is_empty() {
            return;
        }
        let copy = writes.clone();
        if let Err(error) = self.store.call(move |database| database.write(&copy)).await {
            self.store_failed(&error);
            self.server.handle_write_failure(&writes);
        }
    }

    fn end(&mut self, id: SessionId) {
        self.streams.remove(&id);
        self.server.handle_session_end(now(), wall(), id);
    }

    /// Gives every stream that can take one its next message.
    fn pump(&mut self) {
        let (now, wall) = (now(), wall());
        let tick = self.server.tick_is_due(now);
        let mut behind = false;
        for id in self.server.session_ids() {
            let Some(stream) = self.streams.get(&id) else {
                continue;
            };
            // A full queue is a slow reader: it gets one larger difference later.
            let room = stream.capacity() > 1;
            let permit = stream.try_reserve().ok().filter(|_| room);
            let Some(permit) = permit else {
                behind = true;
                self.server.handle_full(now, id);
                continue;
            };
            if let Some(message) = self.server.poll_session(now, wall, id) {
                if let Some(shared) = self.shared.upgrade() {
                    count(&shared.counters.messages);
                }
                permit.send(message);
            }
        }
        if tick {
            self.server.end_tick(now, behind);
        }
        for (id, last) in self.server.take_ended() {
            if let (Some(stream), Some(last)) = (self.streams.get(&id), last) {
                let _ = stream.try_send(*last);
            }
            self.end(id);
        }
    }
}

async fn accept(
    listener: TcpListener,
    tls: Option<tokio_rustls::TlsAcceptor>,
    shared: Arc<Shared>,
) {
    let mut failing = false;
    loop {
        let (stream, source) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                count(&shared.counters.accept_errors);
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "cannot accept a connection");
                }
                if descriptors::are_short(&error) {
                    shared.door.make_room();
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        failing = false;
        count(&shared.counters.connections);
        let Some(place) = shared.door.enter(source.ip()) else {
            // Those who lost their place have to be gone first: let them.
            tokio::task::yield_now().await;
            continue;
        };
        let place = Arc::new(place);
        let (tls, shared) = (tls.clone(), Arc::clone(&shared));
        tokio::spawn(async move {
            let mut alive = shared.alive.subscribe();
            tokio::select! {
                () = connection(stream, source, tls, Arc::clone(&shared), Arc::clone(&place)) => {}
                () = place.displaced() => {}
                () = place.outstayed(STRANGER_TIMEOUT) => count(&shared.counters.timed_out),
                _ = alive.changed() => {}
            }
        });
    }
}

async fn connection(
    stream: TcpStream,
    source: SocketAddr,
    tls: Option<tokio_rustls::TlsAcceptor>,
    shared: Arc<Shared>,
    place: Arc<Place<MachinePublic>>,
) {
    // Small messages on long-lived connections.
    let _ = stream.set_nodelay(true);
    let stream = Metered::new(stream, Arc::clone(&place), STRANGER_BYTES_MAX);
    let stream: Box<dyn ByteStream> = match tls {
        None => Box::new(stream),
        Some(tls) => match timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
            Ok(Ok(stream)) => Box::new(stream),
            Ok(Err(_)) => return count(&shared.counters.bad_http),
            Err(_) => return count(&shared.counters.timed_out),
        },
    };
    let (upgrades, mut upgraded) = mpsc::channel(1);
    let outer = Arc::new(Outer {
        shared: Arc::clone(&shared),
        upgrades,
        source: source.ip(),
    });
    let service = service_fn(|request| {
        let outer = Arc::clone(&outer);
        async move { Ok::<_, Infallible>(outer.serve(request).await) }
    });
    let http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HANDSHAKE_TIMEOUT)
        .max_buf_size(HEADER_LEN_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = http.await {
        tracing::debug!(%source, %error, "broken HTTP");
        return count(if error.is_timeout() {
            &shared.counters.timed_out
        } else {
            &shared.counters.bad_http
        });
    }
    if let Ok(upgrade) = upgraded.try_recv() {
        inner(upgrade, source.ip(), shared, place).await;
    }
}

/// A client that was answered 101, with what it sent in its header.
struct Upgrade {
    on: hyper::upgrade::OnUpgrade,
    initiation: Vec<u8>,
}

/// The outer HTTP/1 paths of one connection.
struct Outer {
    shared: Arc<Shared>,
    upgrades: mpsc::Sender<Upgrade>,
    source: IpAddr,
}

type Answer = Response<Full<Bytes>>;

impl Outer {
    async fn serve(&self, request: Request<Incoming>) -> Answer {
        let counters = &self.shared.counters;
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/key") => self.key(request.uri().query().unwrap_or_default()),
            (&Method::POST, "/ts2021") => self.upgrade(request),
            (&Method::GET | &Method::HEAD, "/health") => json(r#"{"status":"pass"}"#.to_owned()),
            (&Method::POST, "/verify") => self.verify(request).await,
            (&Method::GET, "/metrics") if self.source.to_canonical().is_loopback() => {
                let lines = self.shared.list();
                let lines = lines
                    .iter()
                    .map(|(name, n)| format!("ringtail_coord_{name} {n}\n"));
                text(StatusCode::OK, &lines.collect::<String>())
            }
            _ => {
                count(&counters.not_found);
                text(StatusCode::NOT_FOUND, "not found\n")
            }
        }
    }

    fn key(&self, query: &str) -> Answer {
        let version = query.split('&').find_map(|pair| pair.strip_prefix("v="));
        if version
            .and_then(|version| version.parse::<u32>().ok())
            .is_none()
        {
            count(&self.shared.counters.bad_request);
            return text(
                StatusCode::BAD_REQUEST,
                "the parameter v must be a number\n",
            );
        }
        let answer = KeyResponse {
            legacy_public_key: MachinePublic::default(),
            public_key: self.shared.control.public(),
        };
        json(serde_json::to_string(&answer).unwrap_or_default())
    }

    fn upgrade(&self, mut request: Request<Incoming>) -> Answer {
        let refuse = |why: &str| {
            count(&self.shared.counters.bad_upgrade);
            text(StatusCode::BAD_REQUEST, why)
        };
        let headers = request.headers();
        match headers
            .get(header::UPGRADE)
            .map(http::HeaderValue::as_bytes)
        {
            None => return refuse("missing next protocol\n"),
            Some(b"tailscale-control-protocol") => {}
            Some(_) => return refuse("unknown next protocol\n"),
        }
        let Some(handshake) = headers.get("X-Tailscale-Handshake") else {
            return refuse("missing Tailscale handshake header\n");
        };
        let initiation = base64::engine::general_purpose::STANDARD.decode(handshake.as_bytes());
        let Ok(initiation) = initiation else {
            return refuse("invalid tailscale handshake header\n");
        };
        if initiation.len() != INITIATION_LEN {
            return refuse("invalid tailscale handshake header\n");
        }
        let on = hyper::upgrade::on(&mut request);
        // A connection has one upgrade; a second request cannot follow the first 101.
        if self.upgrades.try_send(Upgrade { on, initiation }).is_err() {
            return refuse("upgraded already\n");
        }
        let mut answer = Response::new(Full::default());
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = answer.headers_mut();
        let protocol = http::HeaderValue::from_static("tailscale-control-protocol");
        headers.insert(header::UPGRADE, protocol);
        headers.insert(
            header::CONNECTION,
            http::HeaderValue::from_static("upgrade"),
        );
        answer
    }

    /// A relay asks whether it should serve a node.
    async fn verify(&self, request: Request<Incoming>) -> Answer {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Verify {
            node_public: NodePublic,
        }
        let body = read_body(
            request.into_body(),
            VERIFY_LEN_MAX,
            STRANGER_BODY_TIMEOUT,
            &self.shared,
        );
        let body = match body.await {
            Ok(body) => body,
            Err(answer) => return answer,
        };
        let Ok(verify) = serde_json::from_slice::<Verify>(&body) else {
            count(&self.shared.counters.bad_request);
            return text(StatusCode::BAD_REQUEST, "not a verify request\n");
        };
        let ask = |answer| Ask::Verify(verify.node_public, answer);
        let allow = self.shared.ask(false, ask).await.unwrap_or(false);
        json(format!(r#"{{"Allow":{allow}}}"#))
    }
}

/// Noise and HTTP/2 on an upgraded connection.
async fn inner(
    upgrade: Upgrade,
    source: IpAddr,
    shared: Arc<Shared>,
    place: Arc<Place<MachinePublic>>,
) {
    let counters = &shared.counters;
    let ephemeral = MachinePrivate::generate();
    let Ok((accepted, answer)) = respond(&shared.control, &upgrade.initiation, &ephemeral) else {
        return count(&counters.bad_noise);
    };
    let Ok(Ok(io)) = timeout(HANDSHAKE_TIMEOUT, upgrade.on).await else {
        return count(&counters.bad_http);
    };
    if i64::from(accepted.version) < CAPABILITY_VERSION_MIN {
        return count(&counters.bad_version);
    }
    let mut session = accepted.session;
    let challenge = MachinePrivate::generate().public().to_hex();
    let early = encode_early(format!(r#"{{"nodeKeyChallenge":"chalpub:{challenge}"}}"#).as_bytes());
    let mut first = BytesMut::from(&answer[..]);
    if session.sealer.seal(&early, &mut first).is_err() {
        return count(&counters.bad_stream);
    }
    let mut io = TokioIo::new(io);
    match timeout(HANDSHAKE_TIMEOUT, io.write_all(&first)).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return count(&counters.bad_stream),
        Err(_) => return count(&counters.timed_out),
    }
    let mut stream = NoiseStream::server(io, session);
    match timeout(HANDSHAKE_TIMEOUT, stream.proven()).await {
        Ok(Ok(true)) => {}
        Ok(Ok(false) | Err(_)) => return count(&counters.bad_stream),
        Err(_) => return count(&counters.timed_out),
    }
    let client = Client {
        machine: accepted.machine,
        place: Arc::clone(&place),
    };
    let greet = |answer| Ask::Greet(client.clone(), answer);
    if shared.ask(false, greet).await.is_none() {
        return;
    }
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .max_header_list_size(u32::try_from(HEADER_LEN_MAX).unwrap_or(u32::MAX));
    // What may wait to be read is bounded by the windows, whatever the number of streams.
    if place.is_known() {
        http.max_concurrent_streams(STREAMS_MAX)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(2 * STREAM_WINDOW);
    } else {
        http.max_concurrent_streams(STRANGER_STREAMS_MAX)
            .max_local_error_reset_streams(STRANGER_RESETS_MAX)
            .initial_stream_window_size(STRANGER_WINDOW)
            .initial_connection_window_size(STRANGER_STREAMS_MAX * STRANGER_WINDOW);
    }
    let inner = Arc::new(Inner {
        shared: Arc::clone(&shared),
        client,
        source,
        at_work: Semaphore::new(AT_WORK_MAX),
    });
    let service = service_fn(move |request| {
        let inner = Arc::clone(&inner);
        async move { Ok::<_, Infallible>(inner.serve(request).await) }
    });
    let served = http.serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%source, %error, "a connection broke");
        count(&counters.bad_stream);
    }
}

/// The paths inside one Noise connection.
struct Inner {
    shared: Arc<Shared>,
    client: Client,
    source: IpAddr,
    at_work: Semaphore,
}

type InnerAnswer = Response<UnsyncBoxBody<Bytes, Infallible>>;

impl Inner {
    async fn serve(&self, request: Request<Incoming>) -> InnerAnswer {
        let _turn = self.at_work.acquire().await;
        let answer = match (request.method(), request.uri().path()) {
            (&Method::POST, "/machine/register") => self.register(request).await,
            (&Method::POST, "/machine/map") => return self.map(request).await,
            _ => {
                count(&self.shared.counters.not_found);
                text(StatusCode::NOT_IMPLEMENTED, "not implemented\n")
            }
        };
        answer.map(BodyExt::boxed_unsync)
    }

    async fn register(&self, request: Request<Incoming>) -> Answer {
        let counters = &self.shared.counters;
        let request: RegisterRequest = match self.read(request).await {
            Ok(request) => request,
            Err(answer) => return answer,
        };
        if request.version < CAPABILITY_VERSION_MIN {
            count(&counters.bad_version);
            let why = format!("unsupported client version: ({})\n", request.version);
            return text(StatusCode::BAD_REQUEST, &why);
        }
        let is_logout = is_logout(wall(), &request);
        let ask =
            |answer| Ask::Register(self.client.clone(), self.source, Box::new(request), answer);
        match self.ask(ask).await {
            Some(Registered::Answer(answer)) => {
                count(match (answer.error.is_empty(), answer.node_key_expired) {
                    (true, false) => &counters.registrations,
                    (true, true) if is_logout => &counters.log_outs,
                    (true, true) | (false, _) => &counters.refused_registration,
                });
                json(serde_json::to_string(&answer).unwrap_or_default())
            }
            Some(Registered::TooMany(wait)) => {
                count(&counters.rate_limited);
                let why = "too many bad auth keys from this address\n";
                let mut answer = text(StatusCode::TOO_MANY_REQUESTS, why);
                let seconds = http::HeaderValue::from(wait.as_secs() + 1);
                answer.headers_mut().insert(header::RETRY_AFTER, seconds);
                answer
            }
            Some(Registered::StoreFailed) | None => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the server cannot store this now\n",
            ),
        }
    }

    async fn map(&self, request: Request<Incoming>) -> InnerAnswer {
        let counters = &self.shared.counters;
        let request: MapRequest = match self.read(request).await {
            Ok(request) => request,
            Err(answer) => return answer.map(BodyExt::boxed_unsync),
        };
        let codec = if request.compress == "zstd" {
            Codec::Zstd
        } else {
            Codec::Plain
        };
        let ask = |answer| Ask::Map(self.client.clone(), Box::new(request), answer);
        let mapped = match self.ask(ask).await {
            Some(Ok(mapped)) => mapped,
            Some(Err(refusal)) => {
                let status = match refusal {
                    MapRefusal::NotFound | MapRefusal::StayedAway => {
                        count(&counters.unknown_node);
                        StatusCode::NOT_FOUND
                    }
                    MapRefusal::Version(_) => {
                        count(&counters.bad_version);
                        StatusCode::BAD_REQUEST
                    }
                    MapRefusal::Hostinfo => {
                        count(&counters.too_large);
                        StatusCode::BAD_REQUEST
                    }
                    // To 401, 403 and 404 clients answer by a new registration.
                    MapRefusal::Expired => {
                        count(&counters.expired_node);
                        StatusCode::BAD_REQUEST
                    }
                };
                return text(status, &format!("{refusal}\n")).map(BodyExt::boxed_unsync);
            }
            None => {
                let answer = text(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "the server is stopping\n",
                );
                return answer.map(BodyExt::boxed_unsync);
            }
        };
        count(&counters.map_requests);
        match mapped {
            Mapped::Taken => Response::new(Full::default().boxed_unsync()),
            Mapped::Once(message) => {
                let bytes = encode(codec, &message).unwrap_or_default();
                Response::new(Full::new(Bytes::from(bytes)).boxed_unsync())
            }
            Mapped::Stream(id, codec, messages) => {
                let body = MapBody {
                    id,
                    codec,
                    messages,
                    ended: self.shared.ended.clone(),
                };
                Response::new(body.boxed_unsync())
            }
        }
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Option<T> {
        self.shared.ask(self.client.place.is_known(), ask).await
    }

    async fn read<T: serde::de::DeserializeOwned>(
        &self,
        request: Request<Incoming>,
    ) -> Result<T, Answer> {
        let (len_max, time) = if self.client.place.is_known() {
            (BODY_LEN_MAX, BODY_TIMEOUT)
        } else {
            (STRANGER_BODY_LEN_MAX, STRANGER_BODY_TIMEOUT)
        };
        let body = read_body(request.into_body(), len_max, time, &self.shared).await?;
        serde_json::from_slice(&body).map_err(|error| {
            count(&self.shared.counters.bad_request);
            text(
                StatusCode::BAD_REQUEST,
                &format!("cannot read the request: {error}\n"),
            )
        })
    }
}

/// The never-ending body of a map stream; when it is dropped, the session ends.
struct MapBody {
    id: SessionId,
    codec: Codec,
    messages: mpsc::Receiver<MapResponse>,
    ended: mpsc::UnboundedSender<SessionId>,
}

impl Body for MapBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some(message) = ready!(self.messages.poll_recv(cx)) else {
            return Poll::Ready(None);
        };
        match encode(self.codec, &message) {
            Ok(bytes) => Poll::Ready(Some(Ok(Frame::data(Bytes::from(bytes))))),
            Err(error) => {
                tracing::error!(%error, "a map cannot be sent");
                Poll::Ready(None)
            }
        }
    }
}

impl Drop for MapBody {
    fn drop(&mut self) {
        // The actor is gone when the server stops.
        let _ = self.ended.send(self.id);
    }
}

fn text(status: StatusCode, body: &str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body.to_owned())));
    *answer.status_mut() = status;
    let kind = http::HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}

fn json(body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    let kind = http::HeaderValue::from_static("application/json");
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}

/// Reads a whole body within a limit and in time.
fn read_body(
    body: Incoming,
    len_max: usize,
    time: Duration,
    shared: &Shared,
) -> impl Future<Output = Result<Bytes, Answer>> + Send {
    let counters = &shared.counters;
    async move {
        match timeout(time, Limited::new(body, len_max).collect()).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                count(&counters.too_large);
                Err(text(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "the body is too large\n",
                ))
            }
            Ok(Err(_)) => {
                count(&counters.bad_request);
                Err(text(StatusCode::BAD_REQUEST, "the body was cut off\n"))
            }
            Err(_) => {
                count(&counters.timed_out);
                Err(text(
                    StatusCode::REQUEST_TIMEOUT,
                    "the body came too slowly\n",
                ))
            }
        }
    }
}
