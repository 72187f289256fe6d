//! The relay: DERP over TLS, with STUN beside it.
//!
//! One task per client on a runtime of many threads. What a client sends is forwarded in runs: all
//! packets of one read for one destination become one chunk of frames, put into the destination's
//! queue under one lock with one wake-up at most. The destination's task takes chunks and has
//! full TLS records without copying them together. Queues are bounded in bytes and lose their
//! oldest frames, DISCO has a queue of its own, so no client slows another down.
//!
//! Everything that a client makes the relay hold is bounded for it, for its network and in all
//! ([`crate::derp::budget`]), and so are connections ([`crate::places`]).
//!
//! Behaviour: `protocol/derp.md` §4 to §8 (derpserver and cmd/derper of tailscale/tailscale).
//! Differences on purpose: queues in bytes instead of 32 packets, the write limit counts from the
//! last progress instead of per frame, admission fails closed, and no mesh or WebSocket.
//!
//! Rooms: `head` is a connection before DERP, `connection` one from its first byte to its last, with its
//! rate; `door` is how many there may be and how memory ends one, `verify` who may be served; `registry`
//! is who can be reached and what waits for whom, `router` forwards; `stun` answers beside it,
//! [`identity`] is key and certificate on disk, `operations` a check of the registry for tests.

mod connection;
mod door;
mod head;
pub mod identity;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod operations;
mod registry;
mod router;
mod stun;
mod verify;

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use crate::derp::budget::Budget;
use crate::derp::frame::PACKET_LEN_MAX;
use crate::derp::queue::{Chunk, Spares};
use crate::driver::clock::now;
use crate::driver::counters::{self, counters};
use crate::driver::underlay::USER_TIMEOUT;
use crate::driver::{descriptors, lock, tls};
use crate::key::{KEY_LEN, NodePrivate};
use crate::rate::{Bucket, Rate};
use door::Door;
use registry::Registry;
use verify::Verifier;
pub use verify::{VerifyBy, VerifyOptions};

/// Bytes of data frames that wait per client at most.
pub const DATA_QUEUE_BYTES: usize = 1 << 20;

/// Bytes of DISCO frames that wait per client at most.
pub const DISCO_QUEUE_BYTES: usize = 64 << 10;

/// Bytes of PeerGone frames that wait per client at most.
pub const CONTROL_QUEUE_BYTES: usize = 64 << 10;

/// For the TLS handshake.
pub const TLS_LIMIT: Duration = Duration::from_secs(10);

/// For the requests of a connection, until one is the upgrade.
pub const HEAD_LIMIT: Duration = Duration::from_secs(30);

/// For ClientInfo after the upgrade.
pub const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// KeepAlive comes this often, plus a fixed random part of [`KEEP_ALIVE_JITTER`].
pub const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// See [`KEEP_ALIVE`].
pub const KEEP_ALIVE_JITTER: Duration = Duration::from_secs(5);

/// A client whose socket is full and takes less than [`PROGRESS_MIN`] bytes in this time is cut.
pub const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// See [`WRITE_LIMIT`]: a TLS record.
pub const PROGRESS_MIN: usize = 16 << 10;

/// For a frame of a client to arrive whole.
pub const FRAME_LIMIT: Duration = Duration::from_secs(10);

/// How often is looked whether memory is short.
const RELIEF_EVERY: Duration = Duration::from_millis(100);

/// Descriptors for anything but connections.
const DESCRIPTORS_SPARE: usize = 64;

/// The smallest burst of a rate: one largest frame, as derper has it.
pub const BURST_MIN: u64 = (PACKET_LEN_MAX + KEY_LEN) as u64;

/// Bytes the kernel holds unsent per client before the queues fill, where DISCO overtakes and the
/// oldest goes first.
const NOT_SENT_BYTES: u32 = 256 << 10;

/// Pending connections the kernel keeps.
const BACKLOG: i32 = 1024;

/// Pause after the system ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How a relay is made.
#[derive(Debug)]
pub struct DerpOptions {
    /// The relay's key.
    pub private: NodePrivate,
    /// Certificate chain, leaf first, without meta-certificate.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
    /// Where to listen for DERP. `[::]` is every address of both families; port 0 takes any.
    pub listen: Vec<SocketAddr>,
    /// UDP port of STUN on the same addresses; 0 takes any, `None` is no STUN.
    pub stun_port: Option<u16>,
    /// Answer any valid Binding request, for debugging.
    pub stun_any: bool,
    /// TCP port of `/generate_204` without TLS on the same addresses, if any.
    pub http_port: Option<u16>,
    /// Connections of clients at most; strangers have places of their own.
    pub connections_max: usize,
    /// Bytes at most that clients make the relay hold, all together.
    pub memory_max: usize,
    /// Serve only whom this knows.
    pub verify: Option<VerifyOptions>,
    /// What one client may send, in bytes.
    pub client_rate: Option<Rate>,
    /// How many connections are accepted, in thousandths.
    pub accept_rate: Option<Rate>,
}

/// A relay with its sockets bound.
#[derive(Debug)]
pub struct DerpServer {
    shared: Arc<Shared>,
    listeners: Vec<TcpListener>,
    plain: Vec<TcpListener>,
    stun: Vec<UdpSocket>,
    stun_any: bool,
}

/// What all tasks share.
#[derive(Debug)]
struct Shared {
    private: NodePrivate,
    tls: Arc<ServerConfig>,
    registry: Registry,
    budget: Arc<Budget>,
    door: Arc<Door>,
    verifier: Option<Verifier>,
    client_rate: SharedRate,
    accept_rate: Option<Mutex<Bucket>>,
    spares: Mutex<Spares>,
    counters: Counters,
    started: Instant,
}

/// A rate that may change while it is in force.
#[derive(Debug, Default)]
struct SharedRate {
    /// 0 is none.
    per_second: AtomicU64,
    burst: AtomicU64,
}

impl SharedRate {
    fn set(&self, rate: Option<Rate>) {
        let burst = rate.map_or(0, |rate| rate.burst.max(BURST_MIN));
        self.burst.store(burst, Ordering::Relaxed);
        let per_second = rate.map_or(0, |rate| rate.per_second);
        self.per_second.store(per_second, Ordering::Relaxed);
    }

    fn get(&self) -> Option<Rate> {
        let per_second = self.per_second.load(Ordering::Relaxed);
        let burst = self.burst.load(Ordering::Relaxed);
        (per_second > 0).then_some(Rate { per_second, burst })
    }
}

counters! {
    /// What happened, by name.
    struct Counters(counters::Shared) {
        /// TCP connections accepted.
        accepts,
        /// Closed at once because of the rate limit.
        accepts_limited,
        /// Times the system gave no connection, for want of descriptors mostly.
        accept_errors,
        /// Closed because the verifier refuses the key.
        verify_refused,
        /// Closed because the verifier gave no answer; and times it gave none about those connected.
        verify_failures,
        /// Served although the verifier gave no answer.
        verify_failed_open,
        /// Ended because the verifier refuses the key now.
        verify_removed,
        /// Connections whose TLS handshake failed or took too long.
        tls_failures,
        /// Connections that sent no acceptable HTTP head in time.
        http_failures,
        /// HTTP requests other than the upgrade.
        http_requests,
        /// Upgrades with fast start.
        fast_starts,
        /// Connections closed because of ClientInfo, or its absence.
        hello_failures,
        /// Clients cut because of a frame they must not send.
        protocol_errors,
        /// Clients that came.
        clients,
        /// Of them, further connections of a key.
        duplicate_clients,
        /// Packets from clients.
        packets_received,
        /// Their bytes.
        bytes_received,
        /// Of the packets, DISCO.
        disco_received,
        /// Packets put into queues.
        packets_queued,
        /// Plaintext bytes encrypted for clients.
        bytes_sent,
        /// Runs put into queues, to be compared with `packets_queued`.
        runs_queued,
        /// Times a client's task was woken for a run.
        wakes,
        /// Reads that brought something.
        reads,
        /// Write calls that took something.
        writes,
        /// Frames of types that mean nothing here.
        unknown_frames,
        /// NotePreferred with 1.
        home_moves_in,
        /// NotePreferred with 0.
        home_moves_out,
        /// Pings of clients.
        got_ping,
        /// Pongs sent.
        sent_pong,
        /// Pings whose Pong had not been sent when the next one came.
        pings_ignored,
        /// KeepAlives sent.
        keep_alives,
        /// PeerGone sent because a peer left.
        peer_gone_disconnected,
        /// PeerGone sent because a peer is not here.
        peer_gone_not_here,
        /// PeerGone kept back by the rate limit.
        peer_gone_limited,
        /// PeerGone lost because the client reads nothing.
        peer_gone_dropped,
        /// Data packets lost from the head of a queue.
        dropped_queue_head_data,
        /// DISCO packets lost from the head of a queue.
        dropped_queue_head_disco,
        /// Packets for a key that is not connected.
        dropped_unknown_dest,
        /// Packets for a client that was just leaving, or still queued when it left.
        dropped_gone_disconnected,
        /// Packets lost because the receiver holds more memory than there is for everybody.
        dropped_memory,
        /// Clients cut because they hold too much all the same.
        memory_cuts,
        /// Clients cut because they read too little.
        write_timeouts,
        /// Clients cut because they did not end a frame.
        frame_timeouts,
        /// Times a client was not read from because it was over its rate.
        rate_pauses,
        /// STUN answers.
        stun_answered,
        /// UDP datagrams that are no STUN request of a node.
        stun_ignored,
        /// STUN answers the system did not take.
        stun_send_errors,
    }
}

impl DerpServer {
    /// Binds the sockets. The meta-certificate is made here, anew at every start.
    ///
    /// # Errors
    /// A port that is taken, or a key that does not fit the certificate.
    pub fn bind(options: DerpOptions) -> anyhow::Result<Self> {
        let mut chain = options.chain;
        chain.push(identity::meta_certificate(&options.private.public())?);
        let tls = tls::server_config(chain, options.key)
            .context("the certificate and its key do not work together")?;
        let on = |port: u16| {
            let listen = options.listen.iter();
            listen.map(move |addr| SocketAddr::new(addr.ip(), port))
        };
        let listeners = listen_all(options.listen.iter().copied(), listen_tcp)?;
        let plain = listen_all(options.http_port.into_iter().flat_map(on), listen_tcp)?;
        let stun = listen_all(options.stun_port.into_iter().flat_map(on), listen_udp)?;
        let descriptors = descriptors::left().saturating_sub(DESCRIPTORS_SPARE);
        let shared = Shared {
            private: options.private,
            tls: Arc::new(tls),
            registry: Registry::default(),
            budget: Arc::new(Budget::new(options.memory_max)),
            door: Door::new(door::limits(options.connections_max, descriptors)),
            verifier: options.verify.map(Verifier::new).transpose()?,
            client_rate: SharedRate::default(),
            accept_rate: options
                .accept_rate
                .map(|rate| Mutex::new(Bucket::new(rate, now()))),
            spares: Mutex::default(),
            counters: Counters::default(),
            started: now(),
        };
        shared.client_rate.set(options.client_rate);
        Ok(Self {
            shared: Arc::new(shared),
            listeners,
            plain,
            stun,
            stun_any: options.stun_any,
        })
    }

    /// Where DERP listens.
    ///
    /// # Errors
    /// The system does not say.
    pub fn addrs(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    /// Where STUN listens.
    ///
    /// # Errors
    /// The system does not say.
    pub fn stun_addrs(&self) -> io::Result<Vec<SocketAddr>> {
        self.stun.iter().map(UdpSocket::local_addr).collect()
    }

    /// What changes the relay while it runs.
    pub fn handle(&self) -> DerpHandle {
        DerpHandle(self.shared.clone())
    }

    /// Serves until `shutdown` is over; then every connection ends.
    ///
    /// # Errors
    /// One of those who wait for connections, or for STUN, has failed: there is no going on without.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let mut tasks = tokio::task::JoinSet::new();
        for listener in self.listeners {
            tasks.spawn(accept(self.shared.clone(), listener, true));
        }
        for plain in self.plain {
            tasks.spawn(accept(self.shared.clone(), plain, false));
        }
        for stun in self.stun {
            tasks.spawn(stun::serve(self.shared.clone(), stun, self.stun_any));
        }
        tasks.spawn(watch(self.shared));
        let ended = tokio::select! {
            () = shutdown => Ok(()),
            Some(failed) = tasks.join_next() => {
                let why = failed.err().map_or_else(String::new, |error| format!(": {error}"));
                Err(anyhow::anyhow!("a listener of the relay failed{why}"))
            }
        };
        tasks.shutdown().await;
        ended
    }
}

impl Shared {
    /// Whether the rate of connections lets one more in.
    fn may_accept(&self) -> bool {
        self.accept_rate.as_ref().is_none_or(|bucket| {
            let mut bucket = lock(bucket);
            bucket.refill(now());
            bucket.take(1000)
        })
    }

    /// A chunk with room for a full run.
    fn spare(&self) -> Chunk {
        lock(&self.spares).take()
    }

    /// Keeps a chunk's memory for the next.
    fn recycle(&self, chunk: Chunk) {
        lock(&self.spares).put(chunk);
    }

    fn vars(&self) -> String {
        let mut vars: std::collections::BTreeMap<_, _> =
            self.counters.snapshot().into_iter().collect();
        let door = &self.door.counters;
        // Of the door's counters, by the names they have here; `accept_errors` has those for want of
        // descriptors, and what strangers send is not counted.
        // Closed because there are too many: who comes, or a stranger who makes room.
        let refused = door.refused_full.get() + door.displaced.get();
        vars.insert("accepts_refused", refused);
        // Closed because there is no place left for those who have said who they are.
        vars.insert("places_full", door.refused_known_full.get());
        let taken = self.door.taken();
        let strangers = taken.strangers + taken.local;
        vars.insert("gauge_connections", (strangers + taken.known) as u64);
        vars.insert("gauge_strangers", strangers as u64);
        vars.insert("gauge_memory_bytes", self.budget.used() as u64);
        vars.insert("gauge_keys", self.registry.keys_count() as u64);
        vars.insert("uptime_secs", (now() - self.started).as_secs());
        serde_json::to_string_pretty(&vars).expect("names and numbers always serialise")
    }
}

/// Changes a running relay.
#[derive(Clone, Debug)]
pub struct DerpHandle(Arc<Shared>);

impl DerpHandle {
    /// From now on one client may send so many bytes.
    pub fn set_client_rate(&self, rate: Option<Rate>) {
        self.0.client_rate.set(rate);
    }

    /// The verifier's file is to be read again, and everybody who is connected asked about.
    pub fn verify_again(&self) {
        if let Some(verifier) = &self.0.verifier {
            verifier.read_again.notify_one();
        }
    }
}

/// Looks after those who are connected.
async fn watch(shared: Arc<Shared>) {
    let relief = async {
        loop {
            tokio::time::sleep(RELIEF_EVERY).await;
            shared.relieve();
        }
    };
    let verify = async {
        match &shared.verifier {
            Some(verifier) => verifier.watch(&shared).await,
            None => std::future::pending().await,
        }
    };
    tokio::join!(relief, verify);
}

async fn accept(shared: Arc<Shared>, listener: TcpListener, secure: bool) {
    let mut connections = tokio::task::JoinSet::new();
    let counters = &shared.counters;
    loop {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, from)) => {
                counters.accepts.add(1);
                if !shared.may_accept() {
                    counters.accepts_limited.add(1);
                    continue;
                }
                let Some(place) = shared.enter(from) else {
                    continue;
                };
                let shared = shared.clone();
                connections.spawn(async move {
                    if let Err(error) = prepare(&stream) {
                        tracing::debug!(%from, %error, "socket options");
                    }
                    connection::serve(shared, stream, from, place, secure).await;
                });
            }
            Err(error) => {
                // Connections that died in the queue are nothing; descriptors there are again when
                // somebody leaves.
                counters.accept_errors.add(1);
                tracing::debug!(%error, "accept");
                if descriptors::are_short(&error) {
                    shared.door.make_room();
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(Duration::from_secs(600)))?;
    socket.set_tcp_notsent_lowat(NOT_SENT_BYTES)
}

fn listen_all<T>(
    addrs: impl Iterator<Item = SocketAddr>,
    listen: impl Fn(SocketAddr) -> io::Result<T>,
) -> anyhow::Result<Vec<T>> {
    addrs
        .map(|addr| listen(addr).with_context(|| format!("cannot listen on {addr}")))
        .collect()
}

fn listen_tcp(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = bound(addr, Type::STREAM, Protocol::TCP)?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

fn listen_udp(addr: SocketAddr) -> io::Result<UdpSocket> {
    UdpSocket::from_std(bound(addr, Type::DGRAM, Protocol::UDP)?.into())
}

/// A bound socket; both families on one for `[::]`, or IPv4 alone where the host has no IPv6.
fn bound(addr: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let everywhere = addr.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let socket = match Socket::new(
        Domain::for_address(addr),
        kind.nonblocking(),
        Some(protocol),
    ) {
        Err(_) if everywhere => {
            let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, addr.port()));
            return bound(v4, kind, protocol);
        }
        socket => socket?,
    };
    if protocol == Protocol::TCP {
        socket.set_reuse_address(true)?;
    }
    if addr.is_ipv6() {
        socket.set_only_v6(!everywhere)?;
    }
    socket.bind(&addr.into())?;
    Ok(socket)
}

#[cfg(test)]
mod tests;
