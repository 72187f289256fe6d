//! The relay on loopback: our own pool of clients, and clients that mean no good.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test says which events it expects"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use ringtail_dataplane::{Datagrams, RegionId};
use serde_json::Value;
use tokio::time::timeout;

use super::*;
use crate::derp::client::{Client as ClientMachine, Event, Hello, Said};
use crate::derp::frame::{FrameType, put, put_send_packet};
use crate::derp::news::News;
use crate::derp::{cert, info};
use crate::driver::names::Names;
use crate::driver::relay::{RelayEvent, RelayEvents, RelayOptions, RelayPool};
use crate::driver::runtime::Kind;
use crate::driver::tls::ClientTls;
use crate::driver::tls::roots;
use crate::driver::tls::stream::Stream;
use crate::driver::tls::verify::{Verifiers, pin_of};
use crate::driver::underlay::Underlay;
use crate::netmap::{DerpMap, DerpNode, DerpRegion};

mod limits;

const REGION: RegionId = RegionId(900);
const PATIENCE: Duration = Duration::from_secs(30);

fn key(n: u8) -> NodePrivate {
    NodePrivate::clamped([n; 32])
}

struct Lab {
    node: DerpNode,
    addr: SocketAddr,
    vars: Box<dyn Fn() -> String>,
    dir: tempfile::TempDir,
    handle: DerpHandle,
}

impl Lab {
    /// A relay on loopback, running in this thread's runtime.
    fn start() -> Self {
        Self::start_with(|_| ())
    }

    /// A relay with other options.
    fn start_with(change: impl FnOnce(&mut DerpOptions)) -> Self {
        Self::start_as(tempfile::tempdir().unwrap(), 0, change)
    }

    fn start_as(dir: tempfile::TempDir, port: u16, change: impl FnOnce(&mut DerpOptions)) -> Self {
        let private = identity::relay_key(&dir.path().join("derp-key.json")).unwrap();
        let (chain, key) = identity::self_signed(dir.path(), "127.0.0.1").unwrap();
        let pin = pin_of(&chain[0]);
        let mut options = DerpOptions {
            private,
            chain,
            key,
            listen: vec![SocketAddr::from(([127, 0, 0, 1], port))],
            stun_port: Some(0),
            stun_any: false,
            http_port: Some(0),
            connections_max: 50,
            memory_max: 64 << 20,
            verify: None,
            client_rate: None,
            accept_rate: None,
        };
        change(&mut options);
        let server = DerpServer::bind(options).unwrap();
        let handle = server.handle();
        let addr = server.addrs().unwrap()[0];
        let node = DerpNode {
            name: "900a".to_owned(),
            region_id: REGION.0,
            host_name: "127.0.0.1".to_owned(),
            ipv4: "127.0.0.1".to_owned(),
            ipv6: "none".to_owned(),
            cert_name: pin,
            derp_port: addr.port(),
            stun_port: i32::from(server.stun_addrs().unwrap()[0].port()),
            ..DerpNode::default()
        };
        let shared = server.shared.clone();
        let vars = Box::new(move || shared.vars());
        tokio::spawn(server.run(std::future::pending()));
        Self {
            node,
            addr,
            vars,
            dir,
            handle,
        }
    }

    fn map(&self) -> DerpMap {
        let region = DerpRegion {
            region_id: REGION.0,
            nodes: vec![self.node.clone()],
            ..DerpRegion::default()
        };
        DerpMap {
            regions: BTreeMap::from([(REGION.0, region)]),
            ..DerpMap::default()
        }
    }

    fn pool(&self, n: u8, io: Kind) -> (RelayPool, RelayEvents) {
        let (pool, events) = RelayPool::new(RelayOptions {
            names: Names::default(),
            private: key(n),
            underlay: Underlay::default(),
            io,
            roots: roots::web(),
        });
        pool.set_map(&self.map());
        (pool, events)
    }

    /// A pool that is at home here.
    async fn joined(&self, n: u8, io: Kind) -> (RelayPool, RelayEvents) {
        let (pool, mut events) = self.pool(n, io);
        pool.set_home(Some(REGION));
        assert!(connected(&mut events).await.0);
        (pool, events)
    }

    fn count(&self, name: &str) -> u64 {
        let vars: Value = serde_json::from_str(&(self.vars)()).unwrap();
        vars[name]
            .as_u64()
            .unwrap_or_else(|| panic!("no counter {name}"))
    }

    async fn wait_count(&self, name: &str, at_least: u64) {
        self.wait_until(name, |count| count >= at_least).await;
    }

    async fn wait_until(&self, name: &str, good: impl Fn(u64) -> bool) {
        for _ in 0..6000 {
            if good(self.count(name)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{name} stays at {}: {}", self.count(name), (self.vars)());
    }

    async fn connect(&self) -> Stream {
        let underlay = Underlay::default();
        let stream = Stream::connect(self.addr, &underlay, Kind::Tokio);
        stream.await.unwrap()
    }

    async fn tls(&self) -> (Stream, ClientTls) {
        let stream = self.connect().await;
        let (config, name) = Verifiers::new(roots::web())
            .client_config(&self.node)
            .unwrap();
        let mut tls = ClientTls::client(config, name).unwrap();
        while !tls.is_established() {
            tls.handle_input(|_| ()).unwrap();
            flush(&stream, &mut tls).await.unwrap();
            if !tls.is_established() {
                assert!(fill(&stream, &mut tls).await.unwrap() > 0);
            }
        }
        (stream, tls)
    }

    /// A connection on which ClientInfo has been said.
    async fn raw(&self, private: NodePrivate) -> Raw {
        let (stream, tls) = self.tls().await;
        let (chain, _) = tls.peer_chain();
        let relay = cert::relay_key(chain.iter().map(AsRef::as_ref)).map(|(key, _)| key);
        let hello = Hello {
            host: "127.0.0.1",
            ideal_node: None,
            relay,
            home: true,
        };
        let client = ClientMachine::new(private, &hello, rand::random(), now());
        let mut raw = Raw {
            stream,
            tls,
            client,
        };
        raw.send(&[]).await;
        raw
    }
}

async fn flush(stream: &Stream, tls: &mut ClientTls) -> io::Result<()> {
    let (out, len) = tls.take_out();
    stream.write_all(out, len).await.0
}

/// Writes what is to be written; whether the relay still takes it.
async fn say(stream: &Stream, tls: &mut ClientTls, bytes: &[u8]) -> bool {
    tls.seal(bytes).unwrap();
    flush(stream, tls).await.is_ok()
}

async fn fill(stream: &Stream, tls: &mut ClientTls) -> io::Result<usize> {
    let (result, mut buffer) = stream.read(Vec::with_capacity(64 << 10)).await;
    tls.inbox.append(&mut buffer);
    result
}

struct Raw {
    stream: Stream,
    tls: ClientTls,
    client: ClientMachine,
}

impl Raw {
    async fn send(&mut self, frames: &[u8]) {
        let mut out = Vec::new();
        self.client.poll_transmit(&mut out);
        out.extend_from_slice(frames);
        // The relay may have closed already; the test looks at that elsewhere.
        say(&self.stream, &mut self.tls, &out).await;
    }

    /// Events of the next read; `None` at the end of the connection.
    async fn recv(&mut self) -> Option<Vec<String>> {
        let mut events = Vec::new();
        let len = timeout(PATIENCE, fill(&self.stream, &mut self.tls))
            .await
            .expect("the relay says something in time")
            .unwrap_or(0);
        let client = &mut self.client;
        self.tls
            .handle_input(|plain| {
                client
                    .handle_input(now(), plain, &mut |event: Event<'_>| {
                        events.push(format!("{event:?}"));
                    })
                    .unwrap();
            })
            .unwrap();
        (len > 0 && !self.tls.is_closed()).then_some(events)
    }

    async fn wait_for(&mut self, what: &str) -> String {
        loop {
            let events = self.recv().await.expect("the relay keeps the connection");
            if let Some(found) = events.into_iter().find(|e| e.contains(what)) {
                return found;
            }
        }
    }

    async fn wait_packets(&mut self, wanted: usize) {
        let mut got = 0;
        while got < wanted {
            let events = self.recv().await.unwrap();
            got += events.iter().filter(|e| e.contains("Packet")).count();
        }
    }

    async fn wait_closed(&mut self) {
        while self.recv().await.is_some() {}
    }

    /// The relay answers it.
    async fn is_served(&mut self) {
        self.client.ping(*b"stillup!", PATIENCE, now());
        self.send(&[]).await;
        self.wait_for("Pong").await;
    }
}

async fn next(events: &mut RelayEvents) -> RelayEvent {
    timeout(PATIENCE, events.recv()).await.unwrap().unwrap()
}

/// Whether the next connection is the home's, and how long it took.
async fn connected(events: &mut RelayEvents) -> (bool, Duration) {
    loop {
        if let RelayEvent::News {
            news: News::Connected { home, took, .. },
            ..
        } = next(events).await
        {
            return (home, took);
        }
    }
}

/// So many frames with a packet for this key.
fn packets(count: usize, to: u8, packet: &[u8]) -> Vec<u8> {
    let mut frames = Vec::new();
    for _ in 0..count {
        put_send_packet(&mut frames, &key(to).public(), packet);
    }
    frames
}

fn frame(kind: FrameType, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    put(&mut frame, kind, &[body]);
    frame
}

fn batch(count: usize, len: usize, fill: u8) -> Datagrams {
    Datagrams {
        bytes: vec![fill; count * len],
        lens: vec![u16::try_from(len).unwrap(); count],
    }
}

fn disco_packet(n: u8) -> Vec<u8> {
    let mut packet = b"TS\xf0\x9f\x92\xac".to_vec();
    packet.extend([n; 80]);
    packet
}

#[tokio::test(flavor = "local")]
async fn two_pools_exchange_batches_and_disco_in_order() {
    let lab = Lab::start();
    let (a, _a_events) = lab.joined(1, Kind::Tokio).await;
    let (b, mut b_events) = lab.joined(2, Kind::Tokio).await;
    // Fast start announces before the relay has read ClientInfo.
    lab.wait_count("clients", 2).await;
    assert_eq!(lab.count("fast_starts"), 2);

    let to_b = key(2).public();
    for i in 0..50 {
        a.send_data(REGION, &to_b, &batch(20, 1300, i));
        a.send_disco(REGION, &to_b, &disco_packet(i));
        tokio::task::yield_now().await;
    }
    let (mut data, mut disco) = (Vec::new(), Vec::new());
    while data.len() < 1000 || disco.len() < 50 {
        match next(&mut b_events).await {
            RelayEvent::Data {
                region,
                src,
                data: d,
            } => {
                assert_eq!((region, src), (REGION, key(1).public()));
                let mut rest = &d.bytes[..];
                for &len in &d.lens {
                    assert_eq!(len, 1300);
                    let (packet, tail) = rest.split_at(usize::from(len));
                    assert!(packet.iter().all(|&byte| byte == packet[0]));
                    data.push(packet[0]);
                    rest = tail;
                }
                assert!(rest.is_empty());
            }
            RelayEvent::Disco { packet, .. } => {
                assert_eq!(packet, disco_packet(packet[10]));
                disco.push(packet[10]);
            }
            other => panic!("{other:?}"),
        }
    }
    let want: Vec<u8> = (0..50).flat_map(|i| [i; 20]).collect();
    assert_eq!(data, want);
    assert_eq!(disco, (0..50).collect::<Vec<u8>>());
    assert_eq!(b.route(&key(1).public()), Some(REGION));
    let regions = b.status().regions;
    assert!(regions.iter().any(|region| region.heard_secs.is_some()));
    // Packets travelled in runs, not one by one.
    assert!(lab.count("runs_queued") < 200 + 50, "{}", (lab.vars)());
    // The least of three: a busy machine may stand still.
    let mut latency = Duration::MAX;
    for _ in 0..3 {
        latency = latency.min(a.https_latency(REGION).await.unwrap().0);
    }
    assert!(latency < Duration::from_secs(1));
    let status = serde_json::to_value(a.status()).unwrap();
    assert_eq!(status["regions"][0]["connected"], true);
    assert_eq!(status["counters"]["tx_packets"], 1050);
}

#[tokio::test(flavor = "local")]
async fn what_strangers_send_takes_no_place_of_what_peers_send() {
    let lab = Lab::start();
    let (victim, mut events) = lab.joined(1, Kind::Tokio).await;
    victim.set_peers(vec![key(2).public()]);
    let (peer, _peer_events) = lab.joined(2, Kind::Tokio).await;
    let (stranger, _stranger_events) = lab.joined(3, Kind::Tokio).await;
    lab.wait_count("clients", 3).await;

    // Nobody fetches events while it comes: ten times of what may wait.
    let to = key(1).public();
    peer.send_data(REGION, &to, &batch(3, 1300, 7));
    let refused = || victim.status().counters["rx_dropped_stranger"];
    let mut sent = 0;
    while refused() < 60_000 {
        stranger.send_data(REGION, &to, &batch(100, 1300, 1));
        stranger.send_disco(REGION, &to, &disco_packet(1));
        sent += 101;
        tokio::time::sleep(Duration::from_micros(200)).await;
        assert!(sent < 6_000_000, "{} of {sent}", refused());
    }
    peer.send_disco(REGION, &to, &disco_packet(7));
    let (mut packets, mut disco) = (0, 0);
    while packets < 3 || disco < 1 {
        match next(&mut events).await {
            RelayEvent::Data { src, data, .. } => {
                assert_eq!(src, key(2).public());
                packets += data.lens.len();
            }
            RelayEvent::Disco { src, .. } => {
                assert_eq!(src, key(2).public());
                disco += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    let counters = victim.status().counters;
    assert_eq!(counters["rx_dropped_agent_slow"], 0);
    assert_eq!(victim.route(&key(3).public()), None);
    // Who becomes a peer is heard from then on.
    victim.set_peers(vec![key(2).public(), key(3).public()]);
    stranger.send_disco(REGION, &to, &disco_packet(9));
    loop {
        if let RelayEvent::Disco { src, packet, .. } = next(&mut events).await
            && packet == disco_packet(9)
        {
            return assert_eq!(src, key(3).public());
        }
    }
}

#[tokio::test(flavor = "local")]
async fn a_peer_that_is_not_at_its_home_is_reached_where_it_was_heard() {
    const FAR: RegionId = RegionId(901);
    let (near, far) = (Lab::start(), Lab::start());
    let mut map = near.map();
    let mut region = far.map().regions[&REGION.0].clone();
    (region.region_id, region.nodes[0].region_id) = (FAR.0, FAR.0);
    map.regions.insert(FAR.0, region);
    let (a, mut a_events) = near.joined(1, Kind::Tokio).await;
    let (b, mut b_events) = near.joined(2, Kind::Tokio).await;
    a.set_map(&map);
    near.wait_count("clients", 2).await;
    // A believes B's home to be the far relay, which says that it is not there.
    a.send_disco(FAR, &key(2).public(), &disco_packet(1));
    far.wait_count("dropped_unknown_dest", 1).await;
    b.send_data(REGION, &key(1).public(), &batch(1, 100, 7));
    while !matches!(next(&mut a_events).await, RelayEvent::Data { .. }) {}
    a.send_data(FAR, &key(2).public(), &batch(1, 100, 9));
    while !matches!(next(&mut b_events).await, RelayEvent::Data { .. }) {}
}

#[tokio::test(flavor = "local")]
async fn a_peer_that_leaves_is_told_and_its_route_forgotten() {
    let lab = Lab::start();
    let (a, mut a_events) = lab.joined(1, Kind::Tokio).await;
    let (b, mut b_events) = lab.pool(2, Kind::Tokio);
    lab.wait_count("clients", 1).await;
    // B has no home: the packet itself makes it dial.
    b.send_data(REGION, &key(1).public(), &batch(1, 100, 7));
    while !matches!(next(&mut a_events).await, RelayEvent::Data { .. }) {}
    assert_eq!(a.route(&key(2).public()), Some(REGION));
    drop(b);
    connected(&mut b_events).await;
    loop {
        if let RelayEvent::News {
            news: News::Said(Said::PeerGone { peer, .. }),
            ..
        } = next(&mut a_events).await
        {
            break assert_eq!(peer, key(2).public());
        }
    }
    assert_eq!(a.route(&key(2).public()), None);
    // Packets to it are counted now, and DISCO is answered, three times at once at most.
    for i in 0..6 {
        a.send_disco(REGION, &key(2).public(), &disco_packet(i));
    }
    a.send_data(REGION, &key(2).public(), &batch(2, 100, 1));
    lab.wait_count("dropped_unknown_dest", 8).await;
    assert_eq!(lab.count("peer_gone_not_here"), 3);
    assert_eq!(lab.count("peer_gone_limited"), 3);
}

#[tokio::test(flavor = "local")]
async fn a_relay_that_dies_is_reported_redialled_and_given_up_as_home() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let lab = {
        let _inside = runtime.enter();
        Lab::start()
    };
    let (a, mut events) = lab.joined(1, Kind::Tokio).await;
    runtime.shutdown_background();
    let lost = now();
    loop {
        let RelayEvent::News { region, news } = next(&mut events).await else {
            panic!("packets from a dead relay");
        };
        match news {
            News::HomeUnreachable => break assert_eq!(region, REGION),
            News::Lost { home, .. } => assert!(home),
            News::Connecting { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(now() - lost < Duration::from_secs(5));
    // Back at the same address with the same key, it is found again.
    let again = Lab::start_as(lab.dir, lab.addr.port(), |_| ());
    assert!(connected(&mut events).await.0);
    assert!(a.status().regions[0].connected);
    drop(again);
}

#[tokio::test(flavor = "local")]
async fn the_second_node_of_a_region_costs_little_and_is_remembered() {
    let lab = Lab::start();
    // A port where nobody listens, and one where TCP connects but nothing answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut map = lab.map();
    let nodes = &mut map.regions.get_mut(&REGION.0).unwrap().nodes;
    let dead = DerpNode {
        name: "900z".to_owned(),
        derp_port: silent.local_addr().unwrap().port(),
        ..lab.node.clone()
    };
    nodes.insert(0, dead);
    let (a, mut events) = lab.pool(1, Kind::Tokio);
    a.set_map(&map);
    a.set_home(Some(REGION));
    let (_, took) = connected(&mut events).await;
    assert!(took >= Duration::from_millis(250), "{took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    // The next dials of the region begin with the node that worked: one of them, at least,
    // is quicker than those that begin with the other can be.
    let mut least = Duration::MAX;
    for _ in 0..5 {
        let begin = now();
        a.https_latency(REGION).await.unwrap();
        least = least.min(now() - begin);
    }
    assert!(least < Duration::from_millis(250), "{least:?}");
}

#[tokio::test(flavor = "local")]
async fn a_newer_connection_of_a_key_gets_the_traffic_until_the_older_writes() {
    let lab = Lab::start();
    let mut sender = lab.raw(key(1)).await;
    let mut older = lab.raw(key(2)).await;
    lab.wait_count("clients", 2).await;
    let mut newer = lab.raw(key(2)).await;
    lab.wait_count("clients", 3).await;
    assert_eq!(lab.count("duplicate_clients"), 1);
    let first = packets(1, 2, b"first");
    sender.send(&first).await;
    newer.wait_for("Packet").await;
    // Any frame will do, even one without meaning.
    older.send(&frame(FrameType(0x66), b"hello")).await;
    older.is_served().await;
    sender.send(&first).await;
    older.wait_for("Packet").await;
    // Two machines that go on taking turns are told so, and the one that is left of the end.
    let mut told = 0;
    for _ in 0..8 {
        for client in [&mut newer, &mut older] {
            client.client.ping(*b"12345678", PATIENCE, now());
            client.send(&[]).await;
            loop {
                let events = client.recv().await.unwrap();
                let about = |word| events.iter().filter(move |e| e.contains(word)).count();
                told += about("duplicate connection");
                if about("Pong") > 0 {
                    break;
                }
            }
        }
    }
    assert_eq!(told, 2, "each once");
    drop(older);
    newer.wait_for("Health(None)").await;
    // The one that is left takes over, and nobody is told of a departure.
    lab.wait_until("gauge_connections", |count| count == 2)
        .await;
    sender.send(&first).await;
    newer.wait_for("Packet").await;
    assert_eq!(lab.count("peer_gone_disconnected"), 0);
}

#[tokio::test(flavor = "local")]
async fn hostile_clients_are_closed_and_counted_and_others_go_on() {
    let lab = Lab::start();
    let mut good = lab.raw(key(1)).await;
    lab.wait_count("clients", 1).await;

    // Random bytes instead of TLS, and a TLS record that never ends.
    for junk in [
        &[0xa5; 4000][..],
        b"GET /derp HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\xff\xff",
    ] {
        let stream = lab.connect().await;
        let (result, _) = stream.write_all(junk.to_vec(), junk.len()).await;
        result.unwrap();
    }
    lab.wait_count("tls_failures", 3).await;

    // Random bytes instead of HTTP.
    let (stream, mut tls) = lab.tls().await;
    assert!(say(&stream, &mut tls, &[0x5a; 40_000]).await);
    lab.wait_count("http_failures", 1).await;

    // A head that never ends.
    let (stream, mut tls) = lab.tls().await;
    let head = format!("GET /derp HTTP/1.1\r\nA: {}", "b".repeat(60_000));
    assert!(say(&stream, &mut tls, head.as_bytes()).await);
    lab.wait_count("http_failures", 2).await;

    // ClientInfo sealed for another relay, announced with 4 GiB, and another frame first.
    let mut wrong = Vec::new();
    let other = key(9).public();
    info::put_client_info(
        &mut wrong,
        &key(3),
        &other,
        [1; 24],
        &info::ClientInfo::node(),
    );
    let firsts = [
        &wrong[..],
        b"\x02\xff\xff\xff\xff",
        b"\x12\0\0\0\x0812345678",
    ];
    for (i, first) in (1..).zip(firsts) {
        let (stream, mut tls) = lab.tls().await;
        let mut hello = Vec::new();
        crate::derp::upgrade::put_request(&mut hello, "127.0.0.1", None, true);
        hello.extend_from_slice(first);
        assert!(say(&stream, &mut tls, &hello).await);
        lab.wait_count("hello_failures", i).await;
    }

    // Frames that break a limit, mesh frames, and random bytes behind ClientInfo.
    let oversized = frame(FrameType::SEND_PACKET, &vec![0; 32 + 65_537]);
    let bad: [&[u8]; 6] = [
        b"\x04\xff\xff\xff\xff",
        b"\x04\0\0\0\x1f",
        &oversized,
        b"\x10\0\0\0\0",
        b"\x0a\xff\xff\xff\xff",
        b"\x12\0\0\x10\0",
    ];
    for (i, frames) in (1..).zip(bad) {
        let mut raw = lab.raw(key(40 + u8::try_from(i).unwrap())).await;
        raw.send(frames).await;
        raw.wait_closed().await;
        lab.wait_count("protocol_errors", i).await;
    }

    // A frame cut off by the end of the connection, and an unknown one of 4 GiB: no error.
    let mut raw = lab.raw(key(60)).await;
    raw.send(b"\x04\0\0\x10\0abc").await;
    drop(raw);
    let mut raw = lab.raw(key(61)).await;
    raw.send(b"\xff\xff\xff\xff\xff").await;
    raw.send(&vec![0; 3_000_000]).await;
    drop(raw);

    assert_eq!(lab.count("protocol_errors"), 6);
    good.is_served().await;
    lab.wait_until("gauge_keys", |count| count == 1).await;
}

#[tokio::test(flavor = "local")]
async fn random_frames_never_hurt_anybody_else() {
    use rand::{Rng as _, RngExt as _, SeedableRng as _};
    let lab = Lab::start();
    let mut good = lab.raw(key(1)).await;
    let mut rng = rand::rngs::SmallRng::seed_from_u64(5);
    for i in 0..40 {
        let mut raw = lab.raw(key(100 + i)).await;
        let mut frames = Vec::new();
        for _ in 0..rng.random_range(1..30) {
            let kind = FrameType(rng.random_range(0..0x18));
            let mut body = vec![0; rng.random_range(0..200)];
            rng.fill_bytes(&mut body);
            put(&mut frames, kind, &[&body]);
        }
        raw.send(&frames).await;
    }
    good.is_served().await;
}

#[tokio::test(flavor = "local")]
async fn a_client_that_reads_nothing_loses_its_oldest_packets_and_is_cut() {
    let lab = Lab::start();
    let mut slow = lab.raw(key(2)).await;
    let mut good = lab.raw(key(3)).await;
    let mut sender = lab.raw(key(1)).await;
    lab.wait_count("clients", 3).await;
    // Who heard from a client is told when it goes.
    slow.send(&packets(1, 1, b"hello")).await;
    sender.wait_for("Packet").await;
    let flood = packets(40, 2, &[4; 1400]);
    let begin = now();
    let mut sent = 0_u64;
    while lab.count("write_timeouts") == 0 {
        sender.send(&flood).await;
        sent += 40;
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(now() - begin < Duration::from_secs(60), "{}", (lab.vars)());
    }
    assert!(lab.count("dropped_queue_head_data") > 0, "{}", (lab.vars)());
    // The sender was never stopped, and hears that the slow one is gone.
    lab.wait_count("packets_received", sent).await;
    sender.wait_for("PeerGone").await;
    sender.send(&packets(1, 3, b"on we go")).await;
    good.wait_for("Packet").await;
    drop(slow);
}

#[tokio::test(flavor = "local")]
async fn too_many_connections_are_refused() {
    let lab = Lab::start();
    let mut held = Vec::new();
    for _ in 0..60 {
        held.push(lab.connect().await);
    }
    lab.wait_count("accepts_refused", 10).await;
    assert_eq!(lab.count("gauge_connections"), 50);
}

#[tokio::test(flavor = "local")]
async fn stun_beside_it_answers_nodes_only() {
    let lab = Lab::start();
    let stun = SocketAddr::from(([127, 0, 0, 1], lab.node.stun_port().unwrap()));
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for junk in [&b"hello"[..], &[0; 1400], &[0xff; 40]] {
        socket.send_to(junk, stun).await.unwrap();
    }
    let tx_id = std::array::from_fn(|i| u8::try_from(i).unwrap());
    let request = crate::stun::request(tx_id);
    socket.send_to(&request, stun).await.unwrap();
    let mut answer = [0; 100];
    let (len, _) = timeout(PATIENCE, socket.recv_from(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let response = crate::stun::parse_response(&answer[..len]).unwrap();
    assert_eq!(response.address, socket.local_addr().unwrap());
    assert_eq!(lab.count("stun_ignored"), 3);
    assert_eq!(lab.count("stun_answered"), 1);
}

#[test]
fn the_pool_works_on_tokio_uring_too() {
    let started = tokio_uring::Runtime::new(&tokio_uring::builder());
    let Ok(runtime) = started else {
        println!("io_uring is not to be had here");
        return;
    };
    runtime.block_on(async {
        let lab = Lab::start();
        let (a, _a_events) = lab.joined(1, Kind::Uring).await;
        let (_b, mut b_events) = lab.joined(2, Kind::Uring).await;
        lab.wait_count("clients", 2).await;
        a.send_data(REGION, &key(2).public(), &batch(500, 1300, 3));
        let mut got = 0;
        while got < 500 {
            if let RelayEvent::Data { data, .. } = next(&mut b_events).await {
                got += data.lens.len();
            }
        }
    });
}
