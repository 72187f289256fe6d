//! The coordination client: one task that keeps a node registered and its map current.
//!
//! ```text
//! GET /key (unless the key is known) -> POST /ts2021, Noise, HTTP/2 inside
//!   -> POST /machine/register -> POST /machine/map (stream)   + lite updates, pings
//!        ^                                  |
//!        +-- backoff <- lost, silent, 5xx --+
//! ```
//!
//! What to do next is decided in [`crate::coord::client`]; this file moves the bytes. It runs on
//! the control thread, spawns local tasks only, and never waits for whoever reads its events: a
//! netmap that was not read yet is replaced by a newer one.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::RootCertStore;
use serde::Serialize;
use tokio::io::AsyncReadExt as _;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::clock::{at, now, wall};
use super::control_url::{ByteStream, ControlUrl};
use super::names::Names;
use super::noise_stream::{HANDSHAKE, NoiseStream, UPGRADE};
use super::underlay::Underlay;
use crate::coord::afresh::{Afresh, served};
use crate::coord::client::{
    AfterMap, LiteGate, Outcome, WATCHDOG, after_map_status, log_out_request, map_request,
    register_request, removed, worth_reporting,
};
use crate::coord::frames::{Codec, FrameReader};
use crate::coord::{Backoff, CoordConfig, CoordEvent, SelfState};
use crate::key::{MachinePrivate, MachinePublic};
use crate::netmap::wire::{
    CAPABILITY_VERSION, KeyResponse, MapResponse, PingRequest, RegisterResponse,
};
use crate::netmap::{MapState, Netmap};
use crate::noise::{HEADER_LEN, Initiator};

/// Dial, upgrade and Noise handshake together.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Of it, for DNS, whose first server may be dead.
const LOOK_UP_LIMIT: Duration = Duration::from_secs(8);

/// A registration that no human has to settle.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(30);

/// A lite update, or the answer to a ping.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// Body of an answer that is no map stream, at most.
const ANSWER_LEN_MAX: usize = 1 << 20;

/// Body of `/key` at most.
const KEY_LEN_MAX: usize = 64 * 1024;

/// A person has not been waited for as long as this: a server that has another address to visit so soon
/// is asked again later.
const VISIT_MIN: Duration = Duration::from_secs(60);

/// Dial, handshake and request of a log-out together.
const LOG_OUT_LIMIT: Duration = Duration::from_secs(15);

/// Events that may wait for the agent; netmaps do not queue, the newest replaces the older one.
const EVENTS_MAX: usize = 16;

/// HTTP/2 PING and how long its answer may take: finds dead paths before the watchdog does.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);

/// Receive windows: a full map of a large network is several MB and must not stall.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// A running coordination client; dropping it ends it and closes its connection.
#[derive(Debug)]
pub struct CoordClient {
    _task: AbortOnDrop,
    redial: Arc<Notify>,
    leave: Leave,
}

impl CoordClient {
    /// Starts the client on the current thread's local task set. `own_state` is read whenever it
    /// changes; drop its sender only to stop reporting.
    ///
    /// # Errors
    /// When the URL is none, or names a public address over plain HTTP.
    ///
    /// # Panics
    /// Outside a tokio `LocalSet` (tokio-uring's runtime has one).
    pub fn start(
        config: CoordConfig,
        names: Names,
        underlay: Underlay,
        roots: Arc<RootCertStore>,
        own_state: watch::Receiver<SelfState>,
    ) -> anyhow::Result<(Self, mpsc::Receiver<CoordEvent>)> {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let client = Client::new(config, names, underlay, roots, own_state, events)?;
        let redial = Arc::clone(&client.redial);
        let leave = client.leave.0.clone();
        let _task = AbortOnDrop(tokio::task::spawn_local(client.run()));
        let client = Self {
            _task,
            redial,
            leave,
        };
        Ok((client, receiver))
    }

    /// The network changed: drop the connection and dial again at once.
    pub fn redial(&self) {
        self.redial.notify_one();
    }

    /// Tells the server that this node routes nothing any more, whatever its own state says; returns when the server
    /// has taken that. For a node that is about to leave.
    ///
    /// # Errors
    /// It cannot be told.
    pub async fn leave(&self) -> anyhow::Result<()> {
        let (done, taken) = oneshot::channel();
        self.leave.send(done).await?;
        Ok(taken.await?)
    }
}

/// Tells the server that this node routes nothing, by a connection of its own: for a node that is no more.
/// Of the rest the server keeps what it has.
///
/// # Errors
/// It cannot be reached, or refuses.
pub async fn withdraw(
    config: &CoordConfig,
    names: &Names,
    underlay: &Underlay,
    roots: &Arc<RootCertStore>,
) -> anyhow::Result<()> {
    let (_own_state, own_state) = watch::channel(SelfState::default());
    let (events, _) = mpsc::channel(1);
    let client = Client::new(
        config.clone(),
        names.clone(),
        underlay.clone(),
        roots.clone(),
        own_state,
        events,
    )?;
    let control = match client.control {
        Some(control) => control,
        None => client.fetch_key().await?,
    };
    let sender = client.dial(control).await?;
    let status = client.lite_update(sender, &SelfState::default())?.await?;
    anyhow::ensure!(status == StatusCode::OK, "HTTP {status}");
    Ok(())
}

/// Takes the node's key out of force at the coordination server, which forgets an ephemeral node.
///
/// # Errors
/// It could not be told, or refuses.
pub async fn log_out(
    config: CoordConfig,
    names: Names,
    underlay: Underlay,
    roots: Arc<RootCertStore>,
) -> anyhow::Result<()> {
    let (events, _) = mpsc::channel(EVENTS_MAX);
    let (_, own_state) = watch::channel(SelfState::default());
    let client = Client::new(config, names, underlay, roots, own_state, events)?;
    timeout(LOG_OUT_LIMIT, client.log_out())
        .await
        .unwrap_or_else(|_| Err(anyhow!("no answer within 15 s")))
}

/// Why a connection ended.
enum Failure {
    /// No use trying again.
    Fatal(String),
    /// No use trying again with this key.
    KeyExpired,
    /// Try again after the backoff, or after the time the server asked for.
    Retry(anyhow::Error, Option<Duration>),
    /// Try again at once.
    Redial,
    /// The agent is gone.
    Closed,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Retry(error, None)
    }
}

struct Client {
    config: CoordConfig,
    url: ControlUrl,
    names: Names,
    own_state: watch::Receiver<SelfState>,
    events: mpsc::Sender<CoordEvent>,
    redial: Arc<Notify>,
    /// Who is about to leave waits until the server knows.
    leave: (Leave, mpsc::Receiver<oneshot::Sender<()>>),
    os_version: String,
    /// The server's key, configured or seen.
    control: Option<MachinePublic>,
    /// Whether this process was let in once.
    registered: bool,
    /// Whether it had a network map since: who knew us then and does not now has removed us.
    had_map: bool,
    backoff: Backoff,
}

type Leave = mpsc::Sender<oneshot::Sender<()>>;
type Sender = http2::SendRequest<Full<Bytes>>;

impl Client {
    fn new(
        config: CoordConfig,
        names: Names,
        underlay: Underlay,
        roots: Arc<RootCertStore>,
        own_state: watch::Receiver<SelfState>,
        events: mpsc::Sender<CoordEvent>,
    ) -> anyhow::Result<Self> {
        let mut url = ControlUrl::parse(&config.url)?;
        (url.underlay, url.roots) = (underlay, roots);
        let os_release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
        Ok(Self {
            control: config.control_key,
            os_version: os_release.unwrap_or_default().trim().to_owned(),
            config,
            url,
            names,
            own_state,
            events,
            redial: Arc::default(),
            leave: mpsc::channel(1),
            registered: false,
            had_map: false,
            backoff: Backoff::default(),
        })
    }

    async fn log_out(self) -> anyhow::Result<()> {
        let control = match self.control {
            Some(control) => control,
            None => self.fetch_key().await?,
        };
        let mut sender = self.dial(control).await?;
        let state = self.own_state.borrow().clone();
        let request = log_out_request(&self.config, &state, &self.os_version);
        let request = self.request("/machine/register", &request)?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = read_body(response.into_body(), ANSWER_LEN_MAX).await?;
        // Whom it does not know, it does not let in either.
        if !status.is_success() && status != StatusCode::NOT_FOUND {
            let text = String::from_utf8_lossy(&body);
            anyhow::bail!("HTTP {status} {}", text.trim());
        }
        Ok(())
    }

    async fn run(mut self) {
        let redial = Arc::clone(&self.redial);
        loop {
            let failure = tokio::select! {
                connection = self.connection() => match connection {
                    Ok(never) => match never {},
                    Err(failure) => failure,
                },
                () = redial.notified() => Failure::Redial,
            };
            let (error, wait) = match failure {
                Failure::Closed => return,
                Failure::Redial => continue,
                Failure::Fatal(text) => {
                    let _ = self.events.send(CoordEvent::Fatal(text)).await;
                    return;
                }
                Failure::KeyExpired => {
                    let _ = self.events.send(CoordEvent::KeyExpired).await;
                    return;
                }
                Failure::Retry(error, wait) => (error, wait),
            };
            let retry_in = self.backoff.fail(rand::random());
            let retry_in = wait.unwrap_or(retry_in);
            let lost = CoordEvent::Lost {
                error: format!("{error:#}"),
                retry_in,
            };
            if self.events.send(lost).await.is_err() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(retry_in) => {}
                () = redial.notified() => {}
            }
        }
    }

    /// One connection, from dial to loss.
    async fn connection(&mut self) -> Result<std::convert::Infallible, Failure> {
        let control = match self.control {
            Some(control) => control,
            None => {
                let control = self.fetch_key().await?;
                if self.url.is_exposed() {
                    tracing::warn!(
                        url = %self.config.url,
                        key = %control,
                        "the coordination server's key is trusted as it came, over plain HTTP: if somebody on the \
                         way has put his own in its place, he decides about this network. It is held to from now \
                         on. Compare it with what the server printed, or give that by --control-key"
                    );
                }
                self.emit(CoordEvent::ControlKey(control)).await?;
                self.control = Some(control);
                control
            }
        };
        let mut sender = match self.dial(control).await {
            Ok(sender) => sender,
            Err(error) => {
                // A wrong key looks like any other loss: ask for the key again.
                if let Ok(fetched) = self.fetch_key().await
                    && fetched != control
                {
                    return Err(self.key_changed(control, fetched));
                }
                return Err(error.into());
            }
        };
        if !self.registered {
            self.register(&mut sender).await?;
        }
        let mut registered_again = false;
        loop {
            let silent_until = now() + WATCHDOG;
            let (status, text) = match self.poll_map(&mut sender, silent_until).await? {
                Polled::Stream(body) => return self.stream(sender, body, silent_until).await,
                Polled::Refused(status, text) => (status, text),
            };
            match after_map_status(status, &text) {
                AfterMap::Register if self.had_map => {
                    return Err(Failure::Fatal(removed(&self.config.url)));
                }
                AfterMap::Register | AfterMap::JoinAgain if !registered_again => {
                    registered_again = true;
                    self.register(&mut sender).await?;
                }
                AfterMap::Read | AfterMap::Register | AfterMap::JoinAgain => {
                    let error = anyhow!("the coordination server does not know us: {text}");
                    return Err(error.into());
                }
                AfterMap::Fatal(text) => return Err(Failure::Fatal(text)),
                AfterMap::Retry(text) => return Err(anyhow!(text).into()),
            }
        }
    }

    /// Another key than the one we hold to. Before we were ever let in that is a mistake somebody
    /// has to look at; later it may be an attacker, whom we outwait.
    fn key_changed(&self, ours: MachinePublic, theirs: MachinePublic) -> Failure {
        let text = format!(
            "the coordination server at {} shows the key {theirs}, but {ours} is expected: if the \
             server was set up anew, give its key by --control-key; otherwise somebody else is \
             answering in its place",
            self.config.url
        );
        if self.registered {
            Failure::Retry(anyhow!(text), None)
        } else {
            Failure::Fatal(text)
        }
    }

    async fn emit(&self, event: CoordEvent) -> Result<(), Failure> {
        self.events.send(event).await.map_err(|_| Failure::Closed)
    }

    async fn connect(&self, authenticated_inside: bool) -> anyhow::Result<Box<dyn ByteStream>> {
        self.url
            .connect(&self.names, LOOK_UP_LIMIT, authenticated_inside)
            .await
    }

    /// `GET /key`: the server's Noise key.
    async fn fetch_key(&self) -> anyhow::Result<MachinePublic> {
        let fetch = async {
            let io = self.connect(self.control.is_some()).await?;
            let (mut sender, _driver) = http1(io).await?;
            let request = Request::get(format!("/key?v={CAPABILITY_VERSION}"))
                .header(header::HOST, self.url.authority())
                .body(Empty::<Bytes>::new())?;
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = read_body(response.into_body(), KEY_LEN_MAX).await?;
            if status != StatusCode::OK {
                anyhow::bail!("/key: HTTP {status}");
            }
            let answer: KeyResponse = serde_json::from_slice(&body)
                .context("/key: not the answer of a coordination server")?;
            if answer.public_key.is_zero() {
                anyhow::bail!("/key: the server is too old, it has no Noise key");
            }
            Ok(answer.public_key)
        };
        timeout(DIAL_TIMEOUT, fetch)
            .await
            .unwrap_or_else(|_| Err(anyhow!("/key: no answer within 10 s")))
            .with_context(|| format!("cannot fetch the key of {}", self.config.url))
    }

    /// TCP, TLS, upgrade, Noise, HTTP/2.
    async fn dial(&self, control: MachinePublic) -> anyhow::Result<Sender> {
        let dial = async {
            let io = self.connect(true).await?;
            let ephemeral = MachinePrivate::generate();
            let (initiator, message) = Initiator::new(
                CAPABILITY_VERSION,
                &self.config.machine,
                &control,
                ephemeral,
            )?;
            let (mut sender, driver) = http1(io).await?;
            let handshake = base64::engine::general_purpose::STANDARD.encode(message);
            let request = Request::post("/ts2021")
                .header(header::HOST, self.url.authority())
                .header(header::UPGRADE, UPGRADE)
                .header(header::CONNECTION, "upgrade")
                .header(header::CONTENT_LENGTH, 0)
                .header(HANDSHAKE, handshake)
                .body(Empty::<Bytes>::new())?;
            let response = sender.send_request(request).await?;
            let protocol = response.headers().get(header::UPGRADE);
            if response.status() != StatusCode::SWITCHING_PROTOCOLS
                || protocol.is_none_or(|protocol| protocol != UPGRADE)
            {
                anyhow::bail!("/ts2021: HTTP {}", response.status());
            }
            let upgraded = hyper::upgrade::on(response).await?;
            drop(driver);
            let mut io = TokioIo::new(upgraded);
            let mut answer = vec![0; HEADER_LEN];
            io.read_exact(&mut answer)
                .await
                .context("the server closed during the Noise handshake")?;
            let body_len = Initiator::answer_body_len([answer[0], answer[1], answer[2]])?;
            answer.resize(HEADER_LEN + body_len, 0);
            io.read_exact(&mut answer[HEADER_LEN..]).await?;
            let session = initiator.finish(&answer)?;
            let io = NoiseStream::client(io, session, BytesMut::new());
            let (sender, connection) = http2::Builder::new(LocalExecutor)
                .timer(TokioTimer::new())
                .keep_alive_interval(PING_EVERY)
                .keep_alive_timeout(PING_TIMEOUT)
                .keep_alive_while_idle(true)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .handshake(TokioIo::new(io))
                .await?;
            // It ends when the last request and the last sender are gone.
            tokio::task::spawn_local(async {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "the coordination connection ended");
                }
            });
            Ok(sender)
        };
        timeout(DIAL_TIMEOUT, dial)
            .await
            .unwrap_or_else(|_| Err(anyhow!("no connection within 10 s")))
            .with_context(|| {
                let url = &self.config.url;
                format!("cannot reach the coordination server at {url}")
            })
    }

    /// Registers; with a human's help when the server asks for it.
    async fn register(&mut self, sender: &mut Sender) -> Result<(), Failure> {
        // An auth key needs no person.
        let known = self.config.followup.clone();
        let known = known.filter(|_| self.config.auth_key.is_none());
        let mut followup = known.unwrap_or_default();
        if !followup.is_empty() {
            self.emit(CoordEvent::AuthUrl(followup.clone())).await?;
        }
        loop {
            let asked = now();
            let state = self.own_state.borrow().clone();
            let request = register_request(&self.config, &state, &self.os_version, &followup);
            let request = self.request("/machine/register", &request)?;
            let response = if followup.is_empty() {
                let answer = timeout(REGISTER_TIMEOUT, sender.send_request(request)).await;
                answer.map_err(|_| anyhow!("no answer to the registration within 30 s"))?
            } else {
                // It takes as long as the human takes; HTTP/2 PING watches the connection.
                sender.send_request(request).await
            };
            let response = response.context("the registration was cut off")?;
            let (status, wait) = (response.status(), retry_after(&response));
            let body = read_body(response.into_body(), ANSWER_LEN_MAX).await?;
            if status != StatusCode::OK {
                let text = String::from_utf8_lossy(&body).into_owned();
                if let AfterMap::Fatal(text) = after_map_status(status.as_u16(), &text) {
                    return Err(Failure::Fatal(text));
                }
                let error = anyhow!("registration: HTTP {status} {}", text.trim());
                return Err(Failure::Retry(error, wait));
            }
            let answer: RegisterResponse = serde_json::from_slice(&body)
                .context("cannot read the answer to the registration")?;
            match Outcome::of(&answer) {
                Outcome::Registered(user) => {
                    self.registered = true;
                    self.config.followup = None;
                    return self.emit(CoordEvent::Registered { user }).await;
                }
                Outcome::AskHuman(url) => {
                    if url != followup {
                        self.emit(CoordEvent::AuthUrl(url.clone())).await?;
                    }
                    if !followup.is_empty() && now() < asked + VISIT_MIN {
                        tokio::time::sleep(self.backoff.fail(rand::random())).await;
                    }
                    // It is still good when the connection is lost meanwhile.
                    self.config.followup = Some(url.clone());
                    followup = url;
                }
                Outcome::KeyExpired => return Err(Failure::KeyExpired),
                Outcome::Fatal(text) => return Err(Failure::Fatal(text)),
                Outcome::Retry(text) => return Err(anyhow!(text).into()),
            }
        }
    }

    /// Asks for the map stream.
    async fn poll_map(
        &mut self,
        sender: &mut Sender,
        silent_until: Instant,
    ) -> Result<Polled, Failure> {
        let state = self.own_state.borrow_and_update().clone();
        let request = map_request(&self.config, &state, &self.os_version, true);
        let request = self.request("/machine/map", &request)?;
        let rest = silent_until.saturating_duration_since(now());
        let answer = timeout(rest, sender.send_request(request)).await;
        let response = answer
            .map_err(|_| anyhow!("no answer to the map request within 120 s"))?
            .context("the map request was cut off")?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok(Polled::Stream(response.into_body()));
        }
        let body = read_body(response.into_body(), ANSWER_LEN_MAX).await?;
        let text = String::from_utf8_lossy(&body).into_owned();
        Ok(Polled::Refused(status.as_u16(), text))
    }

    /// Reads the map stream to its end, reporting our own state beside it.
    async fn stream(
        &mut self,
        sender: Sender,
        mut body: Incoming,
        mut silent_until: Instant,
    ) -> Result<std::convert::Infallible, Failure> {
        let events = self.events.clone();
        let mut frames = FrameReader::new(Codec::Zstd);
        let mut map = MapState::new(self.config.node);
        let mut pending: Option<Arc<Netmap>> = None;
        let mut expiry: Option<Instant> = None;
        let mut reported = self.own_state.borrow().clone();
        let mut own_state_open = true;
        let mut lite = LiteGate::default();
        let mut in_flight: Option<JoinHandle<anyhow::Result<StatusCode>>> = None;
        let mut answered_ping = String::new();
        let mut afresh = Afresh::default();
        // The stream that was asked for beside this one, and whether the server ended this one for it.
        let mut next: Option<JoinHandle<anyhow::Result<Response<Incoming>>>> = None;
        let mut ended = false;
        // A server that takes no state from the poll gets it by a lite update.
        lite.handle_change(now());
        loop {
            let lite_due = lite.poll_timeout();
            let afresh_due = afresh.poll_timeout();
            tokio::select! {
                frame = body.frame(), if !ended => {
                    ended = next.is_some() && !matches!(frame, Some(Ok(_)));
                    if ended {
                        continue;
                    }
                    let frame = frame.ok_or_else(|| anyhow!("the server ended the map stream"))?;
                    let frame = frame.context("the map stream was cut off")?;
                    let Ok(data) = frame.into_data() else { continue };
                    frames.handle_bytes(&data);
                    while let Some(message) =
                        frames.poll_message().map_err(anyhow::Error::from)?
                    {
                        silent_until = now() + WATCHDOG;
                        if message.keep_alive {
                            lite.handle_keep_alive(now());
                        }
                        self.answer_ping(&sender, &message, &mut answered_ping);
                        afresh.handle_message(now(), &message, &map, &reported);
                        let (first, before) = (map.is_empty(), served(&map, &reported));
                        if self.handle_message(&mut map, message)? {
                            if !first && served(&map, &reported) != before {
                                afresh.handle_served(now());
                            }
                            pending = self.snapshot(&map);
                            expiry = expiry_of(&map);
                        }
                    }
                }
                permit = events.reserve(), if pending.is_some() => {
                    let permit = permit.map_err(|_| Failure::Closed)?;
                    if let Some(netmap) = pending.take() {
                        permit.send(CoordEvent::Netmap(netmap));
                    }
                }
                () = at(Some(silent_until)) => {
                    return Err(anyhow!("nothing came on the map stream for 120 s").into());
                }
                () = at(expiry) => {
                    pending = self.snapshot(&map);
                    expiry = expiry_of(&map);
                }
                changed = self.own_state.changed(), if own_state_open => {
                    own_state_open = changed.is_ok();
                    let state = self.own_state.borrow_and_update().clone();
                    if worth_reporting(&reported, &state) {
                        lite.handle_change(now());
                    }
                    if reported.routes != state.routes {
                        pending = self.snapshot(&map);
                        afresh.handle_offers(now(), &state);
                    }
                    reported = state;
                }
                () = at(afresh_due), if next.is_none() => {
                    if afresh.poll_ask(now()) {
                        tracing::debug!("the map is asked for anew: what it says of our routes may be old");
                        let stream = self.another_stream(sender.clone(), &reported)?;
                        next = Some(tokio::task::spawn_local(stream));
                    }
                }
                answer = done(&mut next), if next.is_some() => {
                    next = None;
                    match answer {
                        Ok(response) if response.status() == StatusCode::OK => {
                            // From here on the server has put all that it tells us into the new one as well.
                            body = response.into_body();
                            frames = FrameReader::new(Codec::Zstd);
                            map = MapState::new(self.config.node);
                            (expiry, ended) = (None, false);
                            silent_until = now() + WATCHDOG;
                        }
                        _ if ended => return Err(anyhow!("the server ended the map stream").into()),
                        Ok(response) => {
                            tracing::debug!(status = %response.status(), "no other map stream");
                        }
                        Err(error) => tracing::debug!(%error, "no other map stream"),
                    }
                }
                () = at(lite_due) => {
                    if lite.poll_send(now()) {
                        let update = self.lite_update(sender.clone(), &reported)?;
                        in_flight = Some(tokio::task::spawn_local(update));
                    }
                }
                Some(done) = self.leave.1.recv() => {
                    let leaving = SelfState { routes: Vec::new(), ..reported.clone() };
                    // Behind what is on its way, which says otherwise.
                    if let Some(before) = in_flight.take() {
                        let _ = before.await;
                    }
                    let status = self.lite_update(sender.clone(), &leaving)?.await?;
                    if status == StatusCode::OK {
                        // Who asked may have given up.
                        let _ = done.send(());
                    }
                }
                result = done(&mut in_flight), if in_flight.is_some() => {
                    in_flight = None;
                    let delivered = match result {
                        Ok(StatusCode::OK) => true,
                        Ok(status) => {
                            if after_map_status(status.as_u16(), "") == AfterMap::Register {
                                // The map request of the next connection settles what becomes of us.
                                let error = anyhow!("the coordination server does not know us any more");
                                return Err(error.into());
                            }
                            tracing::debug!(%status, "a lite update was refused");
                            false
                        }
                        Err(error) => {
                            tracing::debug!(%error, "a lite update failed");
                            false
                        }
                    };
                    lite.handle_done(now(), delivered, rand::random());
                }
            }
        }
    }

    /// Applies a message; whether the netmap may differ now.
    fn handle_message(
        &mut self,
        map: &mut MapState,
        message: MapResponse,
    ) -> Result<bool, Failure> {
        let wall = wall();
        let lock = map.tailnet_lock();
        let applied = map
            .handle_response(wall, message)
            .map_err(|error| anyhow!("the map stream is useless: {error}"))?;
        if applied.first {
            self.had_map = true;
            self.backoff.reset();
        }
        if map.tailnet_lock() && !lock {
            tracing::warn!("this network uses tailnet lock, which ringtail does not check");
        }
        Ok(applied.changed)
    }

    fn snapshot(&self, map: &MapState) -> Option<Arc<Netmap>> {
        let routes = &self.own_state.borrow().routes;
        map.snapshot(wall(), routes).map(Arc::new)
    }

    fn request(&self, path: &str, body: &impl Serialize) -> anyhow::Result<Request<Full<Bytes>>> {
        let body = serde_json::to_vec(body).context("cannot write a request")?;
        Request::post(format!("https://{}{path}", self.url.authority()))
            .header(header::CONTENT_TYPE, "application/json")
            .header("Ts-Lb", self.config.node.to_string())
            .body(Full::new(Bytes::from(body)))
            .context("cannot build a request")
    }

    /// Reports our state; the answer has no body worth reading.
    fn lite_update(
        &self,
        mut sender: Sender,
        state: &SelfState,
    ) -> anyhow::Result<impl Future<Output = anyhow::Result<StatusCode>> + use<>> {
        let request = map_request(&self.config, state, &self.os_version, false);
        let request = self.request("/machine/map", &request)?;
        Ok(async move {
            let response = timeout(REQUEST_TIMEOUT, sender.send_request(request)).await??;
            let status = response.status();
            read_body(response.into_body(), ANSWER_LEN_MAX).await?;
            Ok(status)
        })
    }

    /// Asks for another map stream beside the one there is.
    fn another_stream(
        &self,
        mut sender: Sender,
        state: &SelfState,
    ) -> anyhow::Result<impl Future<Output = anyhow::Result<Response<Incoming>>> + use<>> {
        let request = map_request(&self.config, state, &self.os_version, true);
        let request = self.request("/machine/map", &request)?;
        Ok(async move { Ok(timeout(REQUEST_TIMEOUT, sender.send_request(request)).await??) })
    }

    /// Gives a sign of life when the server asks for one, once per address.
    fn answer_ping(&self, sender: &Sender, message: &MapResponse, answered: &mut String) {
        let Some(ping) = &message.ping_request else {
            return;
        };
        if ping.url.is_empty() || ping.url == *answered {
            return;
        }
        if ping.types.is_empty() && self.own_state.borrow().routes_lost {
            tracing::debug!(
                "a probe is not answered: what this node offers to route is out of its reach"
            );
            return;
        }
        answered.clone_from(&ping.url);
        let (ping, url, names, sender) = (
            ping.clone(),
            self.url.clone(),
            self.names.clone(),
            sender.clone(),
        );
        tokio::task::spawn_local(async move {
            match timeout(REQUEST_TIMEOUT, pong(&ping, &url, &names, sender)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "cannot answer a ping of the server"),
                Err(_) => tracing::debug!("a ping of the server was not answered in time"),
            }
        });
    }
}

enum Polled {
    Stream(Incoming),
    Refused(u16, String),
}

/// Answers a ping request: HEAD for the empty type, a small HTTP answer for `c2n`. Outside Noise
/// only the coordination server itself is visited, lest we probe others for somebody.
async fn pong(
    ping: &PingRequest,
    url: &ControlUrl,
    names: &Names,
    mut sender: Sender,
) -> anyhow::Result<()> {
    let target: http::Uri = ping.url.parse().context("not a URL")?;
    let path = target.path_and_query().map_or("/", |path| path.as_str());
    let (method, body) = match ping.types.as_str() {
        "" => (Method::HEAD, Vec::new()),
        "c2n" => (Method::POST, c2n_answer(ping)?),
        other => anyhow::bail!("ping type {other:?} is not supported"),
    };
    if ping.types.is_empty() && !ping.url_is_noise {
        let host = target.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        anyhow::ensure!(host == url.host(), "{host} is not the coordination server");
        let io = url.connect(names, LOOK_UP_LIMIT, true).await?;
        let (mut sender, _driver) = http1(io).await?;
        let request = Request::head(path)
            .header(header::HOST, url.authority())
            .body(Empty::<Bytes>::new())?;
        sender.send_request(request).await?;
        return Ok(());
    }
    let request = Request::builder()
        .method(method)
        .uri(format!("https://{}{path}", url.authority()))
        .body(Full::new(Bytes::from(body)))?;
    sender.send_request(request).await?;
    Ok(())
}

/// The serialised HTTP/1.1 answer to the request a `c2n` ping carries: `/echo` gives its body
/// back, nothing else exists.
fn c2n_answer(ping: &PingRequest) -> anyhow::Result<Vec<u8>> {
    let payload = ping.payload.as_deref().unwrap_or_default();
    let request = base64::engine::general_purpose::STANDARD.decode(payload)?;
    let end = request.windows(4).position(|four| four == b"\r\n\r\n");
    let (head, body) = request.split_at(end.map_or(request.len(), |end| end + 4));
    let mut words = head.split(|byte| *byte == b' ');
    let mut answer;
    if words.nth(1) == Some(b"/echo") {
        answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/plain; \
                   charset=utf-8\r\n\r\n"
            .to_vec();
        answer.extend_from_slice(body);
    } else {
        answer = b"HTTP/1.1 400 Bad Request\r\n\r\nunknown c2n path".to_vec();
    }
    Ok(answer)
}

/// Reads a whole body within a limit.
async fn read_body(body: Incoming, len_max: usize) -> anyhow::Result<Bytes> {
    let body = Limited::new(body, len_max).collect().await;
    let body = body.map_err(|error| anyhow!("cannot read an answer: {error}"))?;
    Ok(body.to_bytes())
}

/// Seconds of a `Retry-After` header; when it is missing, a date or over an hour, 5 to 10 s, and
/// only for 429.
fn retry_after<B>(response: &Response<B>) -> Option<Duration> {
    if response.status() != StatusCode::TOO_MANY_REQUESTS {
        return None;
    }
    let text = response.headers().get(header::RETRY_AFTER)?.to_str().ok();
    let seconds = text.and_then(|text| text.parse::<u64>().ok());
    let random = 5.0 + 5.0 * rand::random::<f64>();
    Some(match seconds {
        Some(seconds) if seconds <= 3600 => Duration::from_secs(seconds),
        Some(_) | None => Duration::from_secs_f64(random),
    })
}

/// When the next key in the map expires.
fn expiry_of(map: &MapState) -> Option<Instant> {
    let wall = wall();
    let wait = map.next_expiry(wall)? - wall;
    // A timer far in the future is set again when it is reached.
    let wait = Duration::try_from(wait).unwrap_or_default();
    Some(now() + wait.min(Duration::from_secs(86_400)) + Duration::from_millis(1))
}

/// The end of a spawned request.
async fn done<T>(task: &mut Option<JoinHandle<anyhow::Result<T>>>) -> anyhow::Result<T> {
    match task {
        Some(task) => task.await?,
        None => std::future::pending().await,
    }
}

/// HTTP/1 for requests without a body, for as long as both are held.
async fn http1(
    io: Box<dyn ByteStream>,
) -> hyper::Result<(http1::SendRequest<Empty<Bytes>>, AbortOnDrop)> {
    let (sender, connection) = http1::handshake(TokioIo::new(io)).await?;
    let driver = tokio::task::spawn_local(async {
        let _ = connection.with_upgrades().await;
    });
    Ok((sender, AbortOnDrop(driver)))
}

/// Ends a task when whoever needs it is gone.
#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Spawns hyper's tasks beside us.
#[derive(Clone, Copy, Debug)]
struct LocalExecutor;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async {
            future.await;
        });
    }
}
