//! One region's connection: dial, run, dial again.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use ringtail_dataplane::{Datagrams, RegionId};
use tokio::sync::Notify;

use super::dial::{CONNECT_LIMIT, Dialled, READ_LEN};
use super::{
    Counters, DATA_QUEUE_BYTES, DISCO_QUEUE_BYTES, IDLE_LIMIT, Inner, RegionStatus, RelayEvent, now,
};
use crate::derp::client::{Client, Event, Hello, Said};
use crate::derp::frame::{self, HEADER_LEN};
use crate::derp::news::News;
use crate::derp::queue::{Chunk, FrameQueue};
use crate::derp::{cert, is_disco, upgrade};
use crate::driver::clock;
use crate::driver::tls::ClientTls;
use crate::driver::tls::stream::Stream;
use crate::key::NodePublic;
use crate::netmap::DerpRegion;

/// Ciphertext gathered for one write: eight full records.
const WRITE_LEN: usize = 128 << 10;

/// The longest pause between dials, before jitter.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// The longest a relay may ask for patience while it restarts.
const RESTART_PATIENCE_MAX: Duration = Duration::from_secs(120);

/// Failed dials in a row after which the log says why, once.
const WARN_FAILURES: u32 = 3;

/// Failed dials in a row after which a home is given up.
const HOME_FAILURES: u32 = 2;

/// A region with a connection or a wish for one.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) region: RegionId,
    pub(super) definition: DerpRegion,
    pub(super) data: RefCell<FrameQueue>,
    pub(super) disco: RefCell<FrameQueue>,
    pub(super) heard: Cell<Option<Instant>>,
    home: Cell<bool>,
    asked_at: Cell<Instant>,
    live: RefCell<Option<Rc<Live>>>,
    failures: Cell<u32>,
    problem: RefCell<Option<String>>,
    /// Why the last dial failed.
    error: RefCell<Option<String>>,
    /// Until then failed dials of a relay that announced a restart are no news.
    patience_until: Cell<Option<Instant>>,
    /// When a relay that announced a restart wants to be dialled.
    resume_at: Cell<Option<Instant>>,
    /// Something waits to be written.
    wake: Notify,
    /// A deadline became earlier, or a pause is to end.
    hurry: Notify,
    /// The connection, or the dial for one, is to be given up and begun anew.
    restart: Notify,
    stopped: Cell<bool>,
    stop: Notify,
}

/// A connection that stands.
#[derive(Debug)]
struct Live {
    addr: SocketAddr,
    since: Instant,
    stream: Stream,
    tls: RefCell<ClientTls>,
    client: RefCell<Client>,
}

/// Why a connection ended without an error.
enum End {
    /// There was no reason for it any more.
    Idle,
}

impl Link {
    pub(super) fn new(region: RegionId, definition: DerpRegion, now: Instant) -> Self {
        Self {
            region,
            definition,
            data: RefCell::new(FrameQueue::new(DATA_QUEUE_BYTES)),
            disco: RefCell::new(FrameQueue::new(DISCO_QUEUE_BYTES)),
            heard: Cell::new(None),
            home: Cell::new(false),
            asked_at: Cell::new(now),
            live: RefCell::new(None),
            failures: Cell::new(0),
            problem: RefCell::new(None),
            error: RefCell::new(None),
            patience_until: Cell::new(None),
            resume_at: Cell::new(None),
            wake: Notify::new(),
            hurry: Notify::new(),
            restart: Notify::new(),
            stopped: Cell::new(false),
            stop: Notify::new(),
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        let live = self.live.borrow();
        live.as_ref()
            .is_some_and(|live| live.client.borrow().is_ready())
    }

    pub(super) fn set_home(&self, home: bool) {
        if self.home.replace(home) != home
            && let Some(live) = &*self.live.borrow()
        {
            live.client.borrow_mut().set_home(home);
            self.wake.notify_one();
        }
    }

    pub(super) fn is_home(&self) -> bool {
        self.home.get()
    }

    /// When something was last put into a queue.
    pub(super) fn asked_at(&self) -> Instant {
        self.asked_at.get()
    }

    /// Something was put into a queue.
    pub(super) fn asked(&self) {
        self.asked_at.set(now());
        self.wake.notify_one();
    }

    /// Wants a sign of life within `limit`, or dials at once.
    pub(super) fn probe(&self, limit: Duration) {
        if let Some(live) = &*self.live.borrow() {
            live.client.borrow_mut().ping(rand::random(), limit, now());
            self.wake.notify_one();
        }
        self.hurry.notify_one();
    }

    /// Gives up the connection, or the dial for one, and dials at once if there is a reason to.
    pub(super) fn restart(&self) {
        self.failures.set(0);
        self.restart.notify_waiters();
    }

    pub(super) fn stop(&self) {
        self.stopped.set(true);
        self.stop.notify_one();
    }

    pub(super) fn status(&self, now: Instant) -> RegionStatus {
        let live = self.live.borrow();
        let live = live.as_deref();
        let secs = |at: Instant| now.saturating_duration_since(at).as_secs();
        RegionStatus {
            region: self.region.0,
            code: self.definition.region_code.clone(),
            home: self.home.get(),
            connected: live.is_some_and(|live| live.client.borrow().is_ready()),
            addr: live.map(|live| live.addr),
            relay_key: live
                .and_then(|live| live.client.borrow().relay())
                .map(NodePublic::to_hex),
            connected_secs: live.map(|live| secs(live.since)),
            heard_secs: self.heard.get().map(secs),
            queued_bytes: self.data.borrow().len_bytes() + self.disco.borrow().len_bytes(),
            problem: self.problem.borrow().clone(),
            failures: self.failures.get(),
            error: self.error.borrow().clone(),
        }
    }

    fn has_something_to_say(&self) -> bool {
        !self.data.borrow().is_empty() || !self.disco.borrow().is_empty()
    }

    fn idle_at(&self) -> Option<Instant> {
        (!self.home.get()).then(|| self.asked_at.get() + IDLE_LIMIT)
    }
}

/// Keeps the region connected for as long as there is a reason to.
pub(super) async fn run(inner: Rc<Inner>, link: Rc<Link>) {
    loop {
        let result = tokio::select! {
            result = connect_and_run(&inner, &link) => result,
            () = link.restart.notified() => Err(anyhow!("given up to dial anew")),
            () = link.stop.notified() => Ok(End::Idle),
        };
        let established = link.live.take();
        if let Some(live) = &established {
            live.stream.shutdown();
            inner.forget_routes(link.region);
        }
        if link.stopped.get() {
            return;
        }
        match result {
            Ok(End::Idle) => return inner.close(&link),
            Err(error) => report(&inner, &link, established.is_some(), &error),
        }
        if !link.home.get() && !link.has_something_to_say() {
            return inner.close(&link);
        }
        tokio::select! {
            () = tokio::time::sleep(pause(&link)) => {}
            () = link.hurry.notified() => {}
            () = link.restart.notified() => {}
            () = link.stop.notified() => return,
        }
        // A peer's region that stays away keeps nothing waiting for ever.
        if link.idle_at().is_some_and(|at| at <= now()) {
            return inner.close(&link);
        }
    }
}

fn report(inner: &Inner, link: &Link, established: bool, error: &anyhow::Error) {
    let counters = &inner.counters;
    let (counter, failures) = if established {
        (&counters.losses, 0)
    } else {
        (&counters.dial_failures, link.failures.get() + 1)
    };
    counter.add(1);
    let (region, home) = (link.region, link.home.get());
    link.failures.set(failures);
    let error = format!("{error:#}");
    if failures == WARN_FAILURES {
        tracing::warn!(region = region.0, home, %error, "the relay cannot be reached");
    } else {
        tracing::debug!(region = region.0, home, failures, %error, "relay connection failed");
    }
    link.error.replace(Some(error.clone()));
    inner.tell(region, News::Lost { home, error });
    let patient = link.patience_until.get().is_some_and(|until| now() < until);
    if home && failures >= HOME_FAILURES && !patient {
        inner.tell(region, News::HomeUnreachable);
    }
}

/// `min(n² · 10 ms, 5 s) · uniform(0.5, 1.5)`, or what a restarting relay asked for.
fn pause(link: &Link) -> Duration {
    if let Some(at) = link.resume_at.take() {
        return at.saturating_duration_since(now());
    }
    let n = link.failures.get() + 1;
    let base = Duration::from_millis(10) * n.saturating_mul(n);
    base.min(BACKOFF_MAX).mul_f64(0.5 + rand::random::<f64>())
}

async fn connect_and_run(inner: &Rc<Inner>, link: &Rc<Link>) -> anyhow::Result<End> {
    let started = now();
    let region = link.region;
    let first = inner.good_nodes.borrow().get(&region).copied();
    let on_attempt = |addr| inner.tell(region, News::Connecting { addr });
    let dial = inner
        .dialler
        .dial(&link.definition, first.unwrap_or(0), &on_attempt);
    let dialled = tokio::time::timeout(CONNECT_LIMIT, dial)
        .await
        .context("no connection in time")??;
    inner.good_nodes.borrow_mut().insert(region, dialled.index);

    let live = Rc::new(begin(inner, link, dialled));
    link.live.replace(Some(live.clone()));
    tokio::select! {
        result = read(inner, link, &live, started) => result,
        result = write(&inner.counters, link, &live) => result,
        result = watch(link, &live, started) => result,
    }
}

/// Tells the agent that packets may go.
fn announce(inner: &Inner, link: &Link, live: &Live, started: Instant) {
    inner.counters.connects.add(1);
    let news = News::Connected {
        addr: live.addr,
        took: now() - started,
        home: link.home.get(),
    };
    inner.tell(link.region, news);
}

/// The request, and with fast start ClientInfo, wait in the client machine for the first write.
fn begin(inner: &Inner, link: &Link, dialled: Dialled) -> Live {
    let node = &link.definition.nodes[dialled.index];
    let host = upgrade::host_header(&node.host_name, node.derp_port());
    let ideal = link.definition.nodes.iter().position(|n| !n.stun_only);
    let ideal_node = ideal
        .filter(|&i| i != dialled.index)
        .map(|i| link.definition.nodes[i].name.as_str());
    let (chain, protected) = dialled.tls.peer_chain();
    // Under TLS 1.2 certificates travel in the clear and prove nothing of the key.
    let relay = protected
        .then(|| cert::relay_key(chain.iter().map(AsRef::as_ref)))
        .flatten()
        .map(|(key, _)| key);
    let hello = Hello {
        host: &host,
        ideal_node,
        relay,
        home: link.home.get(),
    };
    let client = Client::new(inner.private.clone(), &hello, rand::random(), now());
    Live {
        addr: dialled.addr,
        since: now(),
        stream: dialled.stream,
        tls: RefCell::new(dialled.tls),
        client: RefCell::new(client),
    }
}

/// Packets of one peer in a row.
struct Run {
    region: RegionId,
    src: NodePublic,
    /// Whether that is a peer.
    wanted: bool,
    data: Datagrams,
    /// Bytes of the run before, as a guess for the next.
    last_len: usize,
}

impl Run {
    fn flush(&mut self, inner: &Inner) {
        if self.data.lens.is_empty() {
            return;
        }
        self.last_len = self.data.bytes.len();
        let data = std::mem::take(&mut self.data);
        let (region, src) = (self.region, self.src);
        inner
            .events
            .push(RelayEvent::Data { region, src, data }, &inner.counters);
    }

    fn push(&mut self, packet: &[u8], inner: &Inner) {
        let Ok(len) = u16::try_from(packet.len()) else {
            return inner.counters.rx_dropped_oversize.add(1);
        };
        if self.data.lens.is_empty() {
            self.data.bytes.reserve(self.last_len.max(packet.len()));
        }
        self.data.bytes.extend_from_slice(packet);
        self.data.lens.push(len);
    }
}

async fn read(
    inner: &Rc<Inner>,
    link: &Link,
    live: &Live,
    started: Instant,
) -> anyhow::Result<End> {
    let counters = &inner.counters;
    let mut announced = false;
    let mut buffer = Vec::with_capacity(READ_LEN);
    let mut run = Run {
        region: link.region,
        src: NodePublic::default(),
        wanted: false,
        data: Datagrams::default(),
        last_len: 0,
    };
    loop {
        // What came with the handshake's last flight is looked at before anything is awaited.
        {
            let at = now();
            let mut tls = live.tls.borrow_mut();
            let mut client = live.client.borrow_mut();
            let mut failed = None;
            tls.handle_input(|plain| {
                if failed.is_none() {
                    let result = client.handle_input(at, plain, &mut |event| {
                        handle_event(inner, link, &mut run, event);
                    });
                    failed = result.err();
                }
            })?;
            run.flush(inner);
            if let Some(error) = failed {
                return Err(error.into());
            }
            if tls.is_closed() {
                bail!("the relay closed the connection");
            }
            if client.wants_transmit() || !tls.out().is_empty() {
                link.wake.notify_one();
            }
            if !announced && client.is_ready() {
                announced = true;
                announce(inner, link, live, started);
                link.hurry.notify_one();
            }
        }
        let (result, back) = live.stream.read(buffer).await;
        buffer = back;
        if result? == 0 {
            bail!("the relay closed the connection");
        }
        link.heard.set(Some(now()));
        link.failures.set(0);
        link.error.replace(None);
        link.patience_until.set(None);
        counters.rx_reads.add(1);
        let mut tls = live.tls.borrow_mut();
        if tls.inbox.is_empty() {
            std::mem::swap(&mut tls.inbox, &mut buffer);
            buffer.reserve(READ_LEN);
        } else {
            tls.inbox.append(&mut buffer);
        }
    }
}

fn handle_event(inner: &Rc<Inner>, link: &Link, run: &mut Run, event: Event<'_>) {
    let (region, counters) = (link.region, &inner.counters);
    match event {
        Event::Packet { source, packet } => {
            counters.rx_packets.add(1);
            counters.rx_bytes.add(packet.len() as u64);
            if run.src != source {
                run.flush(inner);
                run.src = source;
                run.wanted = inner.knows(&source);
                if run.wanted {
                    inner.learn_route(source, region);
                }
            }
            if !run.wanted {
                // It may be a peer's next time.
                run.src = NodePublic::default();
                return counters.rx_dropped_stranger.add(1);
            }
            if is_disco(packet) {
                let disco = RelayEvent::Disco {
                    region,
                    src: source,
                    packet: packet.to_vec(),
                };
                inner.events.push(disco, counters);
            } else if !packet.is_empty() {
                run.push(packet, inner);
            }
        }
        Event::Said(said) => {
            let said = match said {
                Said::PeerGone { peer, .. } => {
                    run.flush(inner);
                    // The next packet of the same peer has to teach its route again.
                    run.src = NodePublic::default();
                    inner.forget_route(&peer, region);
                    said
                }
                Said::Health(problem) => {
                    link.problem.replace(problem.clone());
                    Said::Health(problem)
                }
                Said::Restarting {
                    reconnect_in,
                    try_for,
                } => {
                    let reconnect_in = reconnect_in.min(RESTART_PATIENCE_MAX);
                    let try_for = try_for.min(RESTART_PATIENCE_MAX);
                    link.resume_at.set(Some(now() + reconnect_in));
                    link.patience_until
                        .set(Some(now() + reconnect_in + try_for));
                    Said::Restarting {
                        reconnect_in,
                        try_for,
                    }
                }
            };
            inner.tell(region, News::Said(said));
        }
        Event::Pong(took) => tracing::debug!(region = region.0, ?took, "relay answered a Ping"),
    }
}

async fn write(counters: &Counters, link: &Link, live: &Live) -> anyhow::Result<End> {
    let mut control = Vec::new();
    loop {
        let (out, len) = {
            let mut tls = live.tls.borrow_mut();
            let mut client = live.client.borrow_mut();
            client.poll_transmit(&mut control);
            if !control.is_empty() {
                tls.seal(&control)?;
                control.clear();
            }
            while client.is_ready() && tls.out().len() < WRITE_LEN {
                let disco = link.disco.borrow_mut().pop();
                let (queue, chunk) = match disco {
                    Some(chunk) => (&link.disco, Some(chunk)),
                    None => (&link.data, link.data.borrow_mut().pop()),
                };
                let Some(mut chunk) = chunk else { break };
                if client.is_limited() {
                    limit(counters, &mut client, &mut chunk);
                }
                tls.seal(chunk.frames())?;
                counters.tx_chunks.add(1);
                queue.borrow_mut().recycle(chunk);
            }
            tls.take_out()
        };
        if len == 0 {
            live.tls.borrow_mut().give_back(out);
            link.wake.notified().await;
            continue;
        }
        counters.tx_writes.add(1);
        let (result, out) = live.stream.write_all(out, len).await;
        result?;
        live.tls.borrow_mut().give_back(out);
    }
}

/// Cuts off the frames above the relay's rate.
fn limit(counters: &Counters, client: &mut Client, chunk: &mut Chunk) {
    let mut lens = Vec::new();
    let mut rest = chunk.frames();
    while let Some((_, body)) = frame::header(rest) {
        let len = HEADER_LEN + body as usize;
        lens.push(len);
        rest = &rest[len.min(rest.len())..];
    }
    let admitted = client.admit(lens.iter().copied(), now()).min(lens.len());
    let keep = lens[..admitted].iter().sum();
    chunk.truncate(keep);
    counters
        .tx_dropped_rate_limit
        .add((lens.len() - admitted) as u64);
}

/// Ends the connection when the relay is dead or nobody needs it.
async fn watch(link: &Link, live: &Live, started: Instant) -> anyhow::Result<End> {
    loop {
        let at = now();
        let ready = live.client.borrow().is_ready();
        if !ready && at >= started + CONNECT_LIMIT {
            bail!("the relay did not answer the upgrade in time");
        }
        if link.idle_at().is_some_and(|idle| idle <= at) {
            return Ok(End::Idle);
        }
        let due = {
            let mut client = live.client.borrow_mut();
            if ready {
                client.handle_timeout(at, rand::random())?;
                if client.wants_transmit() {
                    link.wake.notify_one();
                }
                client.poll_timeout()
            } else {
                started + CONNECT_LIMIT
            }
        };
        let due = link.idle_at().map_or(due, |idle| due.min(idle));
        tokio::select! {
            () = clock::at(Some(due)) => {}
            () = link.hurry.notified() => {}
        }
    }
}
