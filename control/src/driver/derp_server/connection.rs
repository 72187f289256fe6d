//! One connection from its first byte to its last; what it is before DERP is in [`super::head`].
//!
//! Nothing that a client does makes it hold more than a bounded amount here: its output is encrypted
//! once the output before it is written, at most [`WRITE_LEN`] and a chunk at a time; one Pong waits
//! for that, and while it does the client is not read; what others send it lies in its queues.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::door::Place;
use super::head::{self, Conn, Ended, READ_LEN, within};
use super::registry::Client;
use super::router::Router;
use super::{
    FRAME_LIMIT, HEAD_LIMIT, HELLO_LIMIT, KEEP_ALIVE, KEEP_ALIVE_JITTER, PROGRESS_MIN, Shared,
    TLS_LIMIT, WRITE_LIMIT, now,
};
use crate::derp::frame::{self, FrameType};
use crate::derp::queue::Chunk;
use crate::derp::server::{ServerError, Session};
use crate::derp::upgrade;
use crate::driver::tls::ServerTls;
use crate::key::NodePublic;
use crate::places::Settled;
use crate::rate::Bucket;

/// Ciphertext gathered for one write.
const WRITE_LEN: usize = 128 << 10;

/// Writes in a row before the client is listened to again.
const WRITES_MAX: u32 = 16;

/// How often is looked whether a client that owes has still to wait.
const RATE_LOOK: Duration = Duration::from_secs(1);

/// Serves a connection until it ends: to the TLS port, or `/generate_204` without TLS.
pub(super) async fn serve(
    shared: Arc<Shared>,
    stream: TcpStream,
    from: SocketAddr,
    place: Place,
    secure: bool,
) {
    let account = &place.kept.account;
    let served = async {
        if !secure {
            return head::serve_plain(&shared, stream, account).await;
        }
        match ServerTls::server(shared.tls.clone()) {
            Ok(tls) => {
                let conn = Conn::new(stream, tls, account.clone());
                converse(&shared, conn, from, &place).await;
            }
            Err(error) => tracing::error!(%error, "TLS configuration"),
        }
    };
    tokio::select! {
        () = served => {}
        why = place.ended() => shared.tell(from, why),
    }
}

async fn converse(shared: &Shared, mut conn: Conn, from: SocketAddr, place: &Place) {
    let counters = &shared.counters;
    let conn = &mut conn;
    let note = |counter, error: &Ended, what| {
        let counter = match error {
            Ended::Memory => &counters.memory_cuts,
            Ended::Io(_)
            | Ended::Tls(_)
            | Ended::Protocol(_)
            | Ended::Late(_)
            | Ended::Head
            | Ended::Refused(_)
            | Ended::Closed => counter,
        };
        counter.add(1);
        tracing::debug!(%from, %error, "{what}");
    };
    let mut plain = Vec::new();
    let shaken = head::handshake(conn, &mut plain);
    if let Err(error) = within(TLS_LIMIT, "no TLS handshake", shaken).await {
        note(&counters.tls_failures, &error, "TLS handshake failed");
        // The alert says why; a client that does not listen is not waited for.
        let _ = within(Duration::from_secs(1), "no alert taken", conn.flush()).await;
        return;
    }
    let loopback = from.ip().to_canonical().is_loopback();
    let asked = head::requests(shared, conn, &mut plain, loopback);
    let fast_start = match within(HEAD_LIMIT, "no upgrade", asked).await {
        Ok(Some(fast_start)) => fast_start,
        Ok(None) => return,
        Err(error) => {
            return note(&counters.http_failures, &error, "no upgrade");
        }
    };
    let mut session = Session::default();
    let greeted = greet(shared, conn, &mut session, &mut plain, fast_start);
    let key = match within(HELLO_LIMIT, "no ClientInfo", greeted).await {
        Ok(key) => key,
        Err(error) => {
            note(&counters.hello_failures, &error, "no client");
            return close(conn);
        }
    };
    if let Err(error) = admit(shared, key, from.ip(), place).await {
        tracing::debug!(%from, %error, "client refused");
        return close(conn);
    }
    let client = Registered::new(shared, key, place);
    let mut relay = Relay::new(shared, session, &client.0);
    let result = relay.run(conn, plain).await;
    counters.unknown_frames.add(relay.session.unknown_frames());
    match result {
        Err(error @ (Ended::Protocol(_) | Ended::Tls(_) | Ended::Memory)) => {
            note(&counters.protocol_errors, &error, "client cut");
        }
        // What was late is counted where that was seen.
        Err(error) => tracing::debug!(%from, %error, "client gone"),
        Ok(()) => {}
    }
    close(conn);
}

fn close(conn: &mut Conn) {
    conn.tls.close();
    let mut writes = 0;
    let _ = conn.try_flush(&mut writes);
}

/// Says who the relay is and hears who the client is; what it said behind that stays in `plain`.
async fn greet(
    shared: &Shared,
    conn: &mut Conn,
    session: &mut Session,
    plain: &mut Vec<u8>,
    fast_start: bool,
) -> Result<NodePublic, Ended> {
    let mut greeting = Vec::new();
    if fast_start {
        shared.counters.fast_starts.add(1);
    } else {
        upgrade::put_switching(&mut greeting, &shared.private.public());
    }
    Session::put_greeting(&mut greeting, &shared.private);
    conn.tls.seal(&greeting)?;
    conn.flush().await?;
    loop {
        let mut rest = &plain[..];
        let hello = session.handle_hello(&shared.private, &mut rest)?;
        let used = plain.len() - rest.len();
        plain.drain(..used);
        if let Some((key, _)) = hello {
            return Ok(key);
        }
        if conn.tls.is_closed() {
            return Err(Ended::Closed);
        }
        conn.read_behind(plain).await?;
        conn.charge(plain.capacity() + session.memory_bytes(), 0)?;
    }
}

/// Finds a place for whoever has shown whose key it has.
async fn admit(
    shared: &Shared,
    key: NodePublic,
    source: IpAddr,
    place: &Place,
) -> Result<(), Ended> {
    if let Some(verifier) = &shared.verifier {
        let verdict = verifier.admit(shared, key, source.to_canonical()).await;
        verdict.map_err(Ended::Refused)?;
    }
    match place.settle(key) {
        Settled::Full => Err(Ended::Refused("no place is free for it".to_owned())),
        // Who has lost its place is told so.
        Settled::Known(_) | Settled::Gone => Ok(()),
    }
}

/// A client in the registry, for as long as this lives.
struct Registered<'a>(Arc<Client>, &'a Shared);

impl<'a> Registered<'a> {
    fn new(shared: &'a Shared, key: NodePublic, place: &Place) -> Self {
        let account = place.kept.account.clone();
        let client = shared.registry.register(key, account, &shared.counters);
        let _ = place.kept.client.set(Arc::clone(&client));
        Self(client, shared)
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        let Self(client, shared) = self;
        shared.registry.unregister(client, &shared.counters);
    }
}

/// The DERP part of a connection.
struct Relay<'a> {
    shared: &'a Shared,
    session: Session,
    router: Router<'a>,
    /// Frames of the relay itself that wait to be encrypted, but for the Pong.
    control: Vec<u8>,
    keep_alive_every: Duration,
    keep_alive_at: Instant,
    /// Since when the socket takes too little, and how much it took since.
    stalled: Option<(Instant, usize)>,
    /// Since when a frame of the client is incomplete.
    incomplete_since: Option<Instant>,
    /// What the client may send.
    bucket: Option<Bucket>,
}

/// How far writing got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    /// Nothing waits.
    All,
    /// The socket takes no more.
    Full,
    /// There is more, and others want their turn.
    Some,
}

impl<'a> Relay<'a> {
    fn new(shared: &'a Shared, session: Session, me: &'a Arc<Client>) -> Self {
        let keep_alive_every = KEEP_ALIVE + KEEP_ALIVE_JITTER.mul_f64(rand::random());
        Self {
            shared,
            session,
            router: Router::new(shared, me),
            control: Vec::new(),
            keep_alive_every,
            keep_alive_at: now() + keep_alive_every,
            stalled: None,
            incomplete_since: None,
            bucket: None,
        }
    }

    /// Runs until the connection ends; `first` is what came behind ClientInfo.
    async fn run(&mut self, conn: &mut Conn, first: Vec<u8>) -> Result<(), Ended> {
        let key = *self.router.me.slot.key();
        let private = &self.shared.private;
        Session::put_welcome(&mut self.control, private, &key, rand::random());
        // One timer for the connection's life, set where its time changes; it stands still while the
        // machine sleeps, and so do the clients' connections.
        let timer = tokio::time::sleep(self.keep_alive_every);
        tokio::pin!(timer);
        let mut timer_due = self.keep_alive_at;

        // These came before there was a bucket.
        self.handle_plain(&first)?;
        self.router.finish_read();
        drop(first);
        loop {
            if conn.tls.is_closed() {
                return Err(Ended::Closed);
            }
            let written = self.write(conn)?;
            let paid_at = self.paid_at();
            let answers = self.router.pong.is_some() || !self.control.is_empty();
            let reading = paid_at.is_none() && !(written == Written::Full && answers);
            if !reading {
                // It cannot end its frame before it is read again.
                self.incomplete_since = None;
            } else if self.session.is_inside_frame() {
                self.incomplete_since = self.incomplete_since.or_else(|| Some(now()));
            }
            self.settle(conn)?;

            let due = self.due(paid_at);
            if timer_due != due {
                timer_due = due;
                let rest = due.saturating_duration_since(now());
                timer.as_mut().reset(tokio::time::Instant::now() + rest);
            }
            let read = reading.then_some(Interest::READABLE);
            let write = (written == Written::Full).then_some(Interest::WRITABLE);
            let interest = match (read, write) {
                (Some(read), Some(write)) => Some(read | write),
                (one, other) => one.or(other),
            };
            tokio::select! {
                ready = ready(&conn.stream, interest) => {
                    if ready?.is_readable() && reading && self.read(conn)? {
                        // Who sends without a pause does not keep a thread: others have their turn, and
                        // the sockets are asked for news, before the next read.
                        tokio::task::yield_now().await;
                    }
                }
                () = self.router.me.wake.notified(), if written == Written::All => {}
                () = tokio::task::yield_now(), if written == Written::Some => {}
                () = &mut timer => self.handle_timeout(written)?,
            }
        }
    }

    /// When [`Relay::handle_timeout`] is due.
    fn due(&self, paid_at: Option<Instant>) -> Instant {
        let stalled = self.stalled.map(|(since, _)| since + WRITE_LIMIT);
        let incomplete = self.incomplete_since.map(|since| since + FRAME_LIMIT);
        // The rate may be lifted while the client owes for hours.
        let paid = paid_at.map(|at| at.min(now() + RATE_LOOK));
        let others = [paid, stalled, incomplete].into_iter().flatten();
        others.fold(self.keep_alive_at, Instant::min)
    }

    fn handle_timeout(&mut self, written: Written) -> Result<(), Ended> {
        let counters = &self.shared.counters;
        let at = now();
        if self
            .stalled
            .is_some_and(|(since, _)| at >= since + WRITE_LIMIT)
        {
            counters.write_timeouts.add(1);
            return Err(Ended::Late("too little read by the client"));
        }
        let incomplete = self.incomplete_since;
        if incomplete.is_some_and(|since| at >= since + FRAME_LIMIT) {
            counters.frame_timeouts.add(1);
            return Err(Ended::Late("no end of a frame"));
        }
        if at >= self.keep_alive_at {
            self.keep_alive_at = at + self.keep_alive_every;
            if written != Written::Full {
                frame::put(&mut self.control, FrameType::KEEP_ALIVE, &[]);
                counters.keep_alives.add(1);
            }
        }
        Ok(())
    }

    /// When the client may be read again, if its rate does not allow it now.
    fn paid_at(&mut self) -> Option<Instant> {
        // A debt at a rate that is in force no more is none.
        self.rate()?;
        let bucket = self.bucket.as_mut()?;
        bucket.refill(now());
        bucket.ready_at()
    }

    /// Reads once, and handles all of it; whether there is more, most likely.
    fn read(&mut self, conn: &mut Conn) -> Result<bool, Ended> {
        let mut result = Ok(());
        let mut len = 0;
        let most = match self.rate() {
            Some(bucket) => {
                usize::try_from(bucket.rate().burst).map_or(READ_LEN, |n| n.min(READ_LEN))
            }
            None => READ_LEN,
        };
        let read = conn.try_read(most, |plain| {
            len += plain.len();
            if result.is_ok() {
                result = self.handle_plain(plain);
            }
        });
        self.router.finish_read();
        if let Some(bucket) = &mut self.bucket {
            bucket.charge(len as u64);
            self.shared
                .counters
                .rate_pauses
                .add(u64::from(bucket.ready_at().is_some()));
        }
        result?;
        let read = read?;
        if read.is_some() {
            self.shared.counters.reads.add(1);
        }
        Ok(read.is_some_and(|len| len >= most))
    }

    /// The bucket for the rate that is set now.
    fn rate(&mut self) -> Option<&Bucket> {
        let rate = self.shared.client_rate.get();
        if self.bucket.as_ref().map(Bucket::rate) != rate {
            self.bucket = rate.map(|rate| Bucket::new(rate, now()));
        }
        self.bucket.as_ref()
    }

    fn handle_plain(&mut self, plain: &[u8]) -> Result<(), ServerError> {
        let router = &mut self.router;
        let unknown_before = self.session.unknown_frames();
        let frames = self
            .session
            .handle_input(&self.shared.private, plain, &mut |event| {
                router.handle(event);
            })?;
        let ended = frames + self.session.unknown_frames() - unknown_before;
        if ended > 0 {
            // Any frame makes an older connection of the same key the active one.
            router.me.wrote();
            self.incomplete_since = None;
        }
        Ok(())
    }

    /// Keeps no more memory than what waits needs, and charges the client with that.
    fn settle(&mut self, conn: &mut Conn) -> Result<(), Ended> {
        conn.return_out();
        let held = self.control.capacity() + self.router.settle();
        conn.charge(self.session.memory_bytes(), held)
    }

    /// Writes until nothing waits or the socket is full.
    fn write(&mut self, conn: &mut Conn) -> Result<Written, Ended> {
        let mut writes = 0;
        let mut left = WRITES_MAX;
        let written = loop {
            let (full, taken) = conn.try_flush(&mut writes)?;
            if full {
                let (since, before) = self.stalled.unwrap_or_else(|| (now(), 0));
                let took = before + taken;
                self.stalled = Some(if took < PROGRESS_MIN {
                    (since, took)
                } else {
                    (now(), 0)
                });
                break Written::Full;
            }
            self.stalled = None;
            if left == 0 {
                break Written::Some;
            }
            left -= 1;
            if !self.encrypt(conn)? {
                break Written::All;
            }
        };
        self.shared.counters.writes.add(writes);
        Ok(written)
    }

    /// Encrypts what waits, up to one write's worth, when all before it is written; false if nothing
    /// waits.
    fn encrypt(&mut self, conn: &mut Conn) -> Result<bool, Ended> {
        debug_assert!(conn.tls.out().is_empty(), "the last output is written");
        let counters = &self.shared.counters;
        let me = self.router.me;
        let mut bytes = 0;
        let mut used: Option<Chunk> = None;
        if let Some(ping) = self.router.pong.take() {
            frame::put(&mut self.control, FrameType::PONG, &[&ping]);
            counters.sent_pong.add(1);
        }
        loop {
            let taken = {
                let mut outbox = me.outbox();
                if !outbox.control.is_empty() {
                    self.control.append(&mut outbox.control);
                    outbox.control = Vec::new();
                }
                let room = conn.tls.out().len() < WRITE_LEN;
                let taken = room.then(|| outbox.disco.pop().or_else(|| outbox.data.pop()));
                outbox.charge(&conn.account);
                taken.flatten()
            };
            if let Some(chunk) = used.take() {
                self.shared.recycle(chunk);
            }
            if bytes == 0 && (taken.is_some() || !self.control.is_empty()) {
                conn.borrow_out();
            }
            if !self.control.is_empty() {
                conn.tls.seal(&self.control)?;
                bytes += self.control.len();
                self.control = Vec::new();
            }
            let Some(chunk) = taken else { break };
            conn.tls.seal(chunk.frames())?;
            bytes += chunk.len();
            used = Some(chunk);
        }
        counters.bytes_sent.add(bytes as u64);
        Ok(bytes > 0)
    }
}

async fn ready(
    stream: &TcpStream,
    interest: Option<Interest>,
) -> std::io::Result<tokio::io::Ready> {
    match interest {
        Some(interest) => stream.ready(interest).await,
        None => std::future::pending().await,
    }
}
