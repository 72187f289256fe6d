//! One connection: TLS, an HTTP request or several, and then DERP until it ends.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::registry::{Client, Lane};
use super::{
    HEAD_LIMIT, HELLO_LIMIT, KEEP_ALIVE, KEEP_ALIVE_JITTER, Shared, TLS_LIMIT, WRITE_LIMIT, add,
    now,
};
use crate::derp::frame::{self, FrameType, HEADER_LEN, PeerGoneReason};
use crate::derp::is_disco;
use crate::derp::queue::{CHUNK_LEN, Chunk};
use crate::derp::server::{Event, ServerError, Session};
use crate::derp::upgrade::{self, HEAD_LEN_MAX, Port, Request};
use crate::driver::tls::{ServerTls, TlsError};
use crate::key::{KEY_LEN, NodePublic};

/// Ciphertext read at a time by a busy connection.
const READ_LEN_MAX: usize = 256 << 10;

/// The same for a quiet one.
const READ_LEN_MIN: usize = 8 << 10;

/// Ciphertext gathered for one write.
const WRITE_LEN: usize = 128 << 10;

/// Requests on one connection before it has to become DERP or go.
const REQUESTS_MAX: u32 = 100;

/// Receivers a connection remembers having told the registry of.
const KNOWN_MAX: usize = 4096;

/// PeerGone(not here) per sending connection: this many at once, and one more per second.
const NOT_HERE_BURST: f64 = 3.0;

/// Why a connection ended, for the log.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Protocol(#[from] ServerError),
    #[error("{0} in time")]
    Late(&'static str),
    #[error("closed")]
    Closed,
}

/// A connection with TLS around it.
struct Conn {
    stream: TcpStream,
    tls: ServerTls,
    read_len: usize,
}

impl Conn {
    /// Reads once into the inbox and gives back how much came.
    async fn fill(&mut self) -> Result<usize, Ended> {
        loop {
            self.stream.readable().await?;
            if let Some(len) = self.try_fill()? {
                return Ok(len);
            }
        }
    }

    /// Reads what is there; `None` is nothing.
    fn try_fill(&mut self) -> Result<Option<usize>, Ended> {
        let before = self.tls.inbox.len();
        self.tls.inbox.reserve(self.read_len);
        match self.stream.try_read_buf(&mut self.tls.inbox) {
            Ok(0) => Err(Ended::Closed),
            Ok(len) => {
                if self.tls.inbox.len() < self.tls.inbox.capacity() {
                    // The socket is empty now: forgetting its readiness here saves the call that
                    // would only say so.
                    let _ = self.stream.try_io(Interest::READABLE, || {
                        Err::<(), _>(io::ErrorKind::WouldBlock.into())
                    });
                }
                // Room follows need: thousands of quiet clients must not hold 256 KiB each.
                if self.tls.inbox.len() - before >= self.read_len {
                    self.read_len = (self.read_len * 2).min(READ_LEN_MAX);
                }
                Ok(Some(len))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes what is to be written as far as the socket takes it; true if something is left.
    fn try_flush(&mut self, writes: &mut u64) -> Result<(bool, usize), Ended> {
        let mut total = 0;
        while !self.tls.out().is_empty() {
            match self.stream.try_write(self.tls.out()) {
                Ok(0) => return Err(Ended::Closed),
                Ok(len) => {
                    self.tls.sent(len);
                    total += len;
                    *writes += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok((true, total));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok((false, total))
    }

    /// Writes everything.
    async fn flush(&mut self) -> Result<(), Ended> {
        let mut writes = 0;
        while self.try_flush(&mut writes)?.0 {
            self.stream.writable().await?;
        }
        Ok(())
    }
}

/// Serves a connection to the TLS port until it ends.
pub(super) async fn serve(shared: Arc<Shared>, stream: TcpStream, from: SocketAddr) {
    let counters = &shared.counters;
    let tls = match ServerTls::server(shared.tls.clone()) {
        Ok(tls) => tls,
        Err(error) => {
            tracing::error!(%error, "TLS configuration");
            return;
        }
    };
    let mut conn = Conn {
        stream,
        tls,
        read_len: READ_LEN_MIN,
    };
    let mut head = Vec::new();
    let shaken = timeout(TLS_LIMIT, handshake(&mut conn, &mut head)).await;
    if let Err(error) = shaken.unwrap_or(Err(Ended::Late("no TLS handshake"))) {
        add(&counters.tls_failures, 1);
        tracing::debug!(%from, %error, "TLS handshake failed");
        // The alert says why; a client that does not listen is not waited for.
        let _ = timeout(Duration::from_secs(1), conn.flush()).await;
        return;
    }
    let loopback = from.ip().to_canonical().is_loopback();
    let fast_start = match requests(&shared, &mut conn, &mut head, loopback).await {
        Ok(Some(fast_start)) => fast_start,
        Ok(None) => return,
        Err(error) => {
            add(&counters.http_failures, 1);
            tracing::debug!(%from, %error, "no upgrade");
            return;
        }
    };
    let mut relay = Relay::new(&shared);
    let result = relay.run(&mut conn, &head, fast_start).await;
    if let Some(me) = relay.router.me.take() {
        shared.registry.unregister(&me, counters);
        add(&counters.unknown_frames, relay.session.unknown_frames());
    }
    if let Err(error) = result {
        match &error {
            Ended::Protocol(_) if !relay.session.is_greeted() => {
                add(&counters.hello_failures, 1);
            }
            Ended::Protocol(_) | Ended::Tls(_) => add(&counters.protocol_errors, 1),
            Ended::Late(_) | Ended::Io(_) | Ended::Closed => {}
        }
        tracing::debug!(%from, %error, "client gone");
    }
    conn.tls.close();
    let mut writes = 0;
    let _ = conn.try_flush(&mut writes);
}

async fn handshake(conn: &mut Conn, head: &mut Vec<u8>) -> Result<(), Ended> {
    loop {
        conn.tls
            .handle_input(|plain| head.extend_from_slice(plain))?;
        if conn.tls.is_established() {
            return Ok(());
        }
        conn.flush().await?;
        conn.fill().await?;
    }
}

/// Answers requests until one is the upgrade (then `head` holds what came behind it) or the
/// connection is over.
async fn requests(
    shared: &Shared,
    conn: &mut Conn,
    head: &mut Vec<u8>,
    loopback: bool,
) -> Result<Option<bool>, Ended> {
    let show = || shared.vars();
    let vars: Option<&(dyn Fn() -> String + Sync)> = loopback.then_some(&show);
    for _ in 0..REQUESTS_MAX {
        let one = async {
            loop {
                let parsed = upgrade::parse_request(head, Port::Main, vars.map(|v| v as _));
                if let Some(found) = parsed.map_err(|_| Ended::Late("no HTTP request"))? {
                    return Ok::<_, Ended>(Some(found));
                }
                conn.flush().await?;
                if conn.tls.is_closed() {
                    return Ok(None);
                }
                match conn.fill().await {
                    Ok(_) => {}
                    Err(Ended::Closed) if head.is_empty() => return Ok(None),
                    Err(error) => return Err(error),
                }
                conn.tls
                    .handle_input(|plain| head.extend_from_slice(plain))?;
            }
        };
        let found = timeout(HEAD_LIMIT, one)
            .await
            .unwrap_or(Err(Ended::Late("no HTTP request")))?;
        let Some((len, request)) = found else {
            return Ok(None);
        };
        head.drain(..len);
        match request {
            Request::Derp { fast_start, .. } => return Ok(Some(fast_start)),
            Request::Other { response, close } => {
                add(&shared.counters.http_requests, 1);
                conn.tls.seal(&response)?;
                if close {
                    conn.tls.close();
                }
                timeout(WRITE_LIMIT, conn.flush())
                    .await
                    .unwrap_or(Err(Ended::Late("no response taken")))?;
                if close {
                    return Ok(None);
                }
            }
        }
    }
    Ok(None)
}

/// Serves `/generate_204` without TLS.
pub(super) async fn serve_plain(shared: Arc<Shared>, mut stream: TcpStream) {
    let mut head = Vec::with_capacity(1024);
    let exchange = async {
        loop {
            match upgrade::parse_request(&head, Port::Plain, None) {
                Ok(None) if stream.read_buf(&mut head).await? > 0 => {}
                Ok(Some((_, Request::Other { response, .. }))) => {
                    stream.write_all(&response).await?;
                    return stream.shutdown().await;
                }
                Ok(_) | Err(_) => {
                    add(&shared.counters.http_failures, 1);
                    return Ok(());
                }
            }
            debug_assert!(head.len() <= 2 * HEAD_LEN_MAX, "the parser bounds the head");
        }
    };
    if timeout(HEAD_LIMIT, exchange).await.is_err() {
        add(&shared.counters.http_failures, 1);
    }
}

/// The DERP part of a connection.
struct Relay<'a> {
    shared: &'a Shared,
    session: Session,
    router: Router<'a>,
    /// Plaintext of the relay itself that waits to be encrypted.
    control: Vec<u8>,
    keep_alive_every: Duration,
}

/// Where the frames of one client go.
struct Router<'a> {
    shared: &'a Shared,
    me: Option<Arc<Client>>,
    hello: Option<NodePublic>,
    /// Packets in a row for one destination, as RecvPacket frames.
    run: Chunk,
    run_frames: u64,
    run_to: NodePublic,
    /// A single DISCO frame on its way.
    disco: Chunk,
    /// Receivers that are remembered already.
    known: HashSet<u64>,
    pong: Option<[u8; 8]>,
    not_here: f64,
    not_here_at: Instant,
    packets: u64,
    bytes: u64,
}

impl<'a> Relay<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self {
            shared,
            session: Session::default(),
            router: Router {
                shared,
                me: None,
                hello: None,
                run: Chunk::default(),
                run_frames: 0,
                run_to: NodePublic::default(),
                disco: Chunk::default(),
                known: HashSet::new(),
                pong: None,
                not_here: NOT_HERE_BURST,
                not_here_at: now(),
                packets: 0,
                bytes: 0,
            },
            control: Vec::new(),
            keep_alive_every: KEEP_ALIVE + KEEP_ALIVE_JITTER.mul_f64(rand::random()),
        }
    }

    /// Runs until the connection ends; `first` is what came behind the upgrade.
    async fn run(&mut self, conn: &mut Conn, first: &[u8], fast_start: bool) -> Result<(), Ended> {
        let counters = &self.shared.counters;
        if fast_start {
            add(&counters.fast_starts, 1);
        } else {
            upgrade::put_switching(&mut self.control, &self.shared.private.public());
        }
        Session::put_greeting(&mut self.control, &self.shared.private);
        let hello_by = now() + HELLO_LIMIT;
        let mut keep_alive_at = now() + self.keep_alive_every;
        let mut stalled_at: Option<Instant> = None;
        // One timer for the connection's life, set where its time changes; it stands still while the
        // machine sleeps, and so do the clients' connections.
        let timer = tokio::time::sleep(HELLO_LIMIT);
        tokio::pin!(timer);
        let mut timer_due = hello_by;

        let mut failed = self.handle_plain(first).err();
        self.finish_input();
        loop {
            if failed.is_none() {
                let result = conn.tls.handle_input(|plain| {
                    if failed.is_none() {
                        failed = self.handle_plain(plain).err();
                    }
                });
                self.finish_input();
                result?;
            }
            if let Some(error) = failed {
                return Err(error.into());
            }
            if conn.tls.is_closed() {
                return Err(Ended::Closed);
            }

            // Write until nothing waits or the socket is full.
            let mut writes = 0;
            let full = loop {
                let more = self.encrypt(conn)?;
                let (full, taken) = conn.try_flush(&mut writes)?;
                if taken > 0 {
                    stalled_at = None;
                }
                if full || !more {
                    break full;
                }
            };
            add(&counters.writes, writes);
            if full {
                stalled_at = stalled_at.or_else(|| Some(now()));
            }

            let mut due = keep_alive_at;
            if !self.session.is_greeted() {
                due = due.min(hello_by);
            }
            if let Some(since) = stalled_at.filter(|_| full) {
                due = due.min(since + WRITE_LIMIT);
            }
            if timer_due != due {
                timer_due = due;
                let rest = due.saturating_duration_since(now());
                timer.as_mut().reset(tokio::time::Instant::now() + rest);
            }
            let interest = if full {
                Interest::READABLE | Interest::WRITABLE
            } else {
                Interest::READABLE
            };
            let me = self.router.me.as_deref();
            tokio::select! {
                ready = conn.stream.ready(interest) => {
                    if ready?.is_readable() && conn.try_fill()?.is_some() {
                        add(&counters.reads, 1);
                    }
                }
                () = woken(me), if !full => {}
                () = &mut timer => {
                    let at = now();
                    if !self.session.is_greeted() && at >= hello_by {
                        add(&counters.hello_failures, 1);
                        return Err(Ended::Late("no ClientInfo"));
                    }
                    if full && stalled_at.is_some_and(|since| at >= since + WRITE_LIMIT) {
                        add(&counters.write_timeouts, 1);
                        return Err(Ended::Late("nothing read by the client"));
                    }
                    if at >= keep_alive_at {
                        keep_alive_at = at + self.keep_alive_every;
                        if self.session.is_greeted() && !full {
                            frame::put(&mut self.control, FrameType::KEEP_ALIVE, &[]);
                            add(&counters.keep_alives, 1);
                        }
                        conn.read_len = READ_LEN_MIN;
                        conn.tls.shrink();
                    }
                }
            }
        }
    }

    fn handle_plain(&mut self, plain: &[u8]) -> Result<(), ServerError> {
        let router = &mut self.router;
        let unknown_before = self.session.unknown_frames();
        let frames = self
            .session
            .handle_input(&self.shared.private, plain, &mut |event| {
                router.handle(event);
            })?;
        // Any frame makes an older connection of the same key the active one.
        if let Some(me) = &router.me
            && frames + self.session.unknown_frames() > unknown_before
        {
            me.wrote();
        }
        Ok(())
    }

    /// What follows from all the frames of one read.
    fn finish_input(&mut self) {
        let counters = &self.shared.counters;
        let router = &mut self.router;
        if let Some(key) = router.hello.take() {
            let private = &self.shared.private;
            Session::put_welcome(&mut self.control, private, &key, rand::random());
        }
        router.flush();
        if let Some(bytes) = router.pong.take() {
            frame::put(&mut self.control, FrameType::PONG, &[&bytes]);
            add(&counters.sent_pong, 1);
        }
        if router.packets > 0 {
            add(&counters.packets_received, router.packets);
            add(&counters.bytes_received, router.bytes);
            (router.packets, router.bytes) = (0, 0);
        }
    }

    /// Encrypts what waits, up to one write's worth; false if nothing waits any more.
    fn encrypt(&mut self, conn: &mut Conn) -> Result<bool, Ended> {
        let counters = &self.shared.counters;
        let mut bytes = 0;
        if !self.control.is_empty() {
            conn.tls.seal(&self.control)?;
            bytes += self.control.len();
            self.control.clear();
        }
        let mut more = false;
        if let Some(me) = &self.router.me {
            let mut used: Option<(Lane, Chunk)> = None;
            loop {
                let taken = {
                    let mut outbox = me.outbox();
                    match used.take() {
                        Some((Lane::Data, chunk)) => outbox.data.recycle(chunk),
                        Some((Lane::Disco, chunk)) => outbox.disco.recycle(chunk),
                        None => {}
                    }
                    self.control.append(&mut outbox.control);
                    if conn.tls.out().len() >= WRITE_LEN {
                        more = true;
                        break;
                    }
                    match outbox.disco.pop() {
                        Some(chunk) => Some((Lane::Disco, chunk)),
                        None => outbox.data.pop().map(|chunk| (Lane::Data, chunk)),
                    }
                };
                if !self.control.is_empty() {
                    conn.tls.seal(&self.control)?;
                    bytes += self.control.len();
                    self.control.clear();
                }
                let Some((lane, chunk)) = taken else { break };
                conn.tls.seal(chunk.frames())?;
                bytes += chunk.len();
                used = Some((lane, chunk));
            }
        }
        add(&counters.bytes_sent, bytes as u64);
        Ok(more)
    }
}

async fn woken(me: Option<&Client>) {
    match me {
        Some(me) => me.wake.notified().await,
        None => std::future::pending().await,
    }
}

impl Router<'_> {
    fn handle(&mut self, event: Event<'_>) {
        let counters = &self.shared.counters;
        match event {
            Event::Hello { key, .. } => {
                self.me = Some(self.shared.registry.register(key, counters));
                self.hello = Some(key);
            }
            Event::Send {
                destination,
                packet,
            } => self.send(destination, packet),
            Event::Preferred(true) => add(&counters.home_moves_in, 1),
            Event::Preferred(false) => add(&counters.home_moves_out, 1),
            Event::Ping(bytes) => {
                add(&counters.got_ping, 1);
                if self.pong.is_none() {
                    self.pong = Some(bytes);
                } else {
                    add(&counters.pings_ignored, 1);
                }
            }
        }
    }

    fn send(&mut self, destination: NodePublic, packet: &[u8]) {
        let Some(me) = &self.me else {
            debug_assert!(false, "packets come after Hello");
            return;
        };
        self.packets += 1;
        self.bytes += packet.len() as u64;
        let source = *me.slot.key();
        if is_disco(packet) {
            add(&self.shared.counters.disco_received, 1);
            frame::put_recv_packet(self.disco.buffer(), &source, packet);
            let mut disco = std::mem::take(&mut self.disco);
            self.deliver(destination, Lane::Disco, &mut disco, 1);
            self.disco = disco;
            return;
        }
        let len = HEADER_LEN + KEY_LEN + packet.len();
        if self.run_to != destination || self.run.len() + len > CHUNK_LEN {
            self.flush();
            self.run_to = destination;
        }
        frame::put_recv_packet(self.run.buffer(), &source, packet);
        self.run_frames += 1;
    }

    fn flush(&mut self) {
        if self.run_frames > 0 {
            let mut run = std::mem::take(&mut self.run);
            let frames = std::mem::take(&mut self.run_frames);
            self.deliver(self.run_to, Lane::Data, &mut run, frames);
            self.run = run;
        }
    }

    /// Puts a run into the destination's queue and leaves it empty.
    fn deliver(&mut self, destination: NodePublic, lane: Lane, run: &mut Chunk, frames: u64) {
        let shared = self.shared;
        let Some(me) = &self.me else { return };
        let Some(receiver) = shared.registry.find(&destination) else {
            run.clear();
            add(&shared.counters.dropped_unknown_dest, frames);
            if lane == Lane::Disco {
                self.tell_not_here(&destination);
            }
            return;
        };
        if self.known.insert(receiver.id) {
            if self.known.len() > KNOWN_MAX {
                self.known.clear();
            }
            me.delivered_to(&receiver);
        }
        receiver.push(lane, run, frames, &shared.counters);
    }

    fn tell_not_here(&mut self, peer: &NodePublic) {
        let at = now();
        let earned = (at - self.not_here_at).as_secs_f64();
        self.not_here_at = at;
        self.not_here = (self.not_here + earned).min(NOT_HERE_BURST);
        let counters = &self.shared.counters;
        if self.not_here < 1.0 {
            return add(&counters.peer_gone_limited, 1);
        }
        self.not_here -= 1.0;
        if let Some(me) = &self.me {
            me.tell_gone(peer, PeerGoneReason::NotHere, counters);
        }
    }
}
