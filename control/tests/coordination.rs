//! Our coordination client and our server, over loopback.
#![expect(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "test helpers outside test functions; a test waits for one event and skips the rest"
)]

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ringtail::coord::admin::{Change, Order};
use ringtail::coord::auth_key::{self, AuthKey};
use ringtail::coord::server::ServerConfig;
use ringtail::coord::{CoordConfig, CoordEvent, SelfState};
use ringtail::driver::coord_client::CoordClient;
use ringtail::driver::coord_server::{CoordServer, CoordServerConfig};
use ringtail::driver::coord_store::Database;
use ringtail::driver::names::Names;
use ringtail::driver::tls::roots;
use ringtail::driver::underlay::Underlay;
use ringtail::key::{DiscoPrivate, MachinePrivate, MachinePublic, NodePrivate};
use ringtail::netmap::wire::EndpointKind;
use ringtail::netmap::{DerpMap, Netmap};
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

const CONTROL: [u8; 32] = [0x42; 32];
/// How long a machine that others use, too, may take for what comes at once.
const PATIENCE: Duration = Duration::from_secs(30);
/// What is asked for is a second; a build without optimisation may stand still for longer.
const SOON: Duration = Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 1 });

fn derp_map() -> DerpMap {
    serde_json::from_str(
        r#"{"Regions":{"900":{"RegionID":900,"RegionCode":"lab","RegionName":"Lab",
            "Nodes":[{"Name":"900a","RegionID":900,"HostName":"127.0.0.1"}]}}}"#,
    )
    .unwrap()
}

fn database(dir: &Path) -> Database {
    Database::open(&dir.join("coord.db")).unwrap()
}

fn put_key(dir: &Path, text: &str, reusable: bool) {
    put_key_of_kind(dir, text, reusable, false);
}

fn put_key_of_kind(dir: &Path, text: &str, reusable: bool, ephemeral: bool) {
    let key = AuthKey {
        id: 0,
        name: auth_key::name(text),
        hash: auth_key::hash(text),
        reusable,
        ephemeral,
        user: 1,
        tags: Vec::new(),
        used: false,
        expires: None,
        created: OffsetDateTime::now_utc(),
    };
    database(dir).put_key(&key).unwrap();
}

fn listen(port: u16) -> std::io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], port)).into())?;
    socket.listen(128)?;
    Ok(TcpListener::from(socket))
}

/// A server with its state in `dir`, on any port.
fn serve(dir: &Path) -> (CoordServer, SocketAddr) {
    serve_on(listen(0).unwrap(), dir, CONTROL)
}

/// A server with a key that lets anybody in: its directory, and where it is.
fn serve_anybody() -> (TempDir, CoordServer, SocketAddr) {
    let dir = tempfile::tempdir().unwrap();
    put_key(dir.path(), "the key", true);
    let (server, address) = serve(dir.path());
    (dir, server, address)
}

/// Another one at the address of one that was dropped, once that has let go of it; the noise key
/// may differ.
async fn serve_again(dir: &Path, address: SocketAddr, control: [u8; 32]) -> CoordServer {
    let listener = soon(async || listen(address.port()).ok()).await;
    serve_on(listener, dir, control).0
}

/// What is there at last.
async fn soon<T>(get: impl AsyncFn() -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(got) = get().await {
                return got;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    waited.expect("it comes in time")
}

fn serve_on(listener: TcpListener, dir: &Path, control: [u8; 32]) -> (CoordServer, SocketAddr) {
    let address = listener.local_addr().unwrap();
    let server = CoordServer::start(CoordServerConfig {
        listeners: vec![listener],
        tls: None,
        control: MachinePrivate::clamped(control),
        database: database(dir),
        server: ServerConfig {
            base_domain: "tail.test".to_owned(),
            users: std::collections::BTreeMap::new(),
            dns: ringtail::netmap::wire::DnsConfig::default(),
            key_expiry: None,
            domain: "tail.test".to_owned(),
            addresses: ringtail::coord::address::AddressPlan::default(),
            derp_map: derp_map(),
            ephemeral_timeout: Duration::from_secs(1),
        },
        policy: None,
    });
    (server.unwrap(), address)
}

struct Node {
    // Dropped first: the client ends before its channels.
    _client: CoordClient,
    events: mpsc::Receiver<CoordEvent>,
    state: watch::Sender<SelfState>,
    config: CoordConfig,
}

impl Node {
    fn config(address: SocketAddr, seed: u8, auth_key: Option<&str>) -> CoordConfig {
        CoordConfig {
            url: format!("http://{address}"),
            auth_key: auth_key.map(|key| key.to_owned().into()),
            hostname: format!("node{seed}"),
            tags: Vec::new(),
            machine: MachinePrivate::clamped([seed; 32]),
            node: NodePrivate::clamped([seed ^ 0x80; 32]).public(),
            old_node: None,
            followup: None,
            disco: DiscoPrivate::clamped([seed ^ 0xc0; 32]).public(),
            control_key: None,
        }
    }

    fn start(config: CoordConfig) -> Self {
        let (state, own_state) = watch::channel(SelfState::default());
        let (client, events) = CoordClient::start(
            config.clone(),
            Names::default(),
            Underlay::default(),
            roots::web(),
            own_state,
        )
        .unwrap();
        Self {
            _client: client,
            events,
            state,
            config,
        }
    }

    fn join(address: SocketAddr, seed: u8, auth_key: &str) -> Self {
        Self::start(Self::config(address, seed, Some(auth_key)))
    }

    /// The first event the function takes.
    async fn event<T>(&mut self, mut take: impl FnMut(CoordEvent) -> Option<T>) -> T {
        let wait = async {
            loop {
                let event = self.events.recv().await.expect("the client runs");
                if let Some(taken) = take(event) {
                    return taken;
                }
            }
        };
        let waited = tokio::time::timeout(PATIENCE, wait).await;
        waited.expect("the event comes in time")
    }

    async fn netmap(&mut self, good: impl Fn(&Netmap) -> bool) -> Arc<Netmap> {
        self.event(|event| match event {
            CoordEvent::Netmap(netmap) if good(&netmap) => Some(netmap),
            CoordEvent::Fatal(text) => panic!("fatal: {text}"),
            _ => None,
        })
        .await
    }

    async fn fatal(&mut self) -> String {
        self.event(|event| match event {
            CoordEvent::Fatal(text) => Some(text),
            CoordEvent::Netmap(_) => panic!("let in"),
            _ => None,
        })
        .await
    }

    /// Why it ended, which it did without joining again.
    async fn removed(&mut self) -> String {
        self.event(|event| match event {
            CoordEvent::Fatal(text) => Some(text),
            CoordEvent::Registered { .. } => panic!("it joined again by itself"),
            _ => None,
        })
        .await
    }

    fn report(&self, endpoint: &str, home: u32) {
        self.state.send_modify(|state| {
            state.endpoints = vec![(endpoint.parse().unwrap(), EndpointKind::Local)];
            state.home_derp = Some(home);
        });
    }
}

fn count(server: &CoordServer, name: &str) -> u64 {
    let all = server.counters();
    all.iter().find(|(of, _)| *of == name).unwrap().1
}

fn all(netmap: &Netmap) -> Vec<i64> {
    let peers = netmap.peers.iter().chain(&netmap.held_back);
    let mut ids: Vec<i64> = peers.map(|peer| peer.id).collect();
    ids.sort_unstable();
    ids
}

#[tokio::test(flavor = "local")]
async fn nodes_join_see_each_other_and_hear_of_changes_soon() {
    let (_dir, server, address) = serve_anybody();
    let mut first = Node::join(address, 1, "the key");
    let key = first.event(|event| match event {
        CoordEvent::ControlKey(key) => Some(key),
        _ => None,
    });
    assert_eq!(key.await, MachinePrivate::clamped(CONTROL).public());
    let user = first.event(|event| match event {
        CoordEvent::Registered { user } => Some(user),
        _ => None,
    });
    assert_eq!(user.await, "ringtail");
    let alone = first.netmap(|_| true).await;
    assert_eq!(all(&alone), [0; 0]);
    assert_eq!(alone.self_node.name, "node1.tail.test.");
    assert_eq!(alone.self_node.addresses[0].to_string(), "100.64.0.1/32");
    assert_eq!(
        alone.self_node.addresses[1].to_string(),
        "fd7a:115c:a1e0::1/128"
    );
    assert_eq!(*alone.derp_map, derp_map());
    assert!(alone.self_node.machine_authorized);
    assert!(matches!(alone.rules, ringtail_dataplane::Rules::AllowAll));

    let begun = Instant::now();
    let mut second = Node::join(address, 2, "the key");
    let disco = second.config.disco;
    let both = first.netmap(|netmap| netmap.peers.iter().any(|p| p.disco == Some(disco)));
    let both = both.await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!(both.peers[0].key, second.config.node);
    assert_eq!(both.peers[0].name, "node2.tail.test.");
    assert_eq!(both.peers[0].online, Some(true));
    let seen = second.netmap(|_| true).await;
    assert_eq!(all(&seen), [1]);

    let begun = Instant::now();
    second.report("192.0.2.7:41641", 900);
    let seen = first
        .netmap(|netmap| netmap.peers[0].home == Some(900))
        .await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!(
        seen.peers[0].endpoints,
        ["192.0.2.7:41641".parse().unwrap()]
    );

    second
        .state
        .send_modify(|state| state.routes = vec!["10.20.0.0/16".parse().unwrap()]);
    let approve = Change::Approve(vec!["10.20.0.0/16".parse().unwrap()]);
    server.orders().give(approve.of("node2")).await.unwrap();
    let routed = first
        .netmap(|netmap| netmap.peers[0].allowed_ips.len() == 3)
        .await;
    assert_eq!(routed.peers[0].allowed_ips[2].to_string(), "10.20.0.0/16");
}

#[tokio::test(flavor = "local")]
async fn a_killed_server_comes_back_with_everything_and_so_do_its_nodes() {
    let (dir, server, address) = serve_anybody();
    let mut first = Node::join(address, 1, "the key");
    let second = Node::join(address, 2, "the key");
    second.report("192.0.2.7:41641", 900);
    let before = first
        .netmap(|netmap| {
            netmap
                .peers
                .first()
                .is_some_and(|peer| peer.home == Some(900) && !peer.endpoints.is_empty())
        })
        .await;
    // What is reported is written behind.
    soon(async || {
        let stored = database(dir.path());
        let nodes = stored.load().unwrap().nodes;
        nodes
            .iter()
            .any(|node| !node.endpoints.is_empty() && node.hostinfo.to_string().contains("900"))
            .then_some(())
    })
    .await;
    drop(server);
    let lost = first.event(|event| match event {
        CoordEvent::Lost { error, .. } => Some(error),
        _ => None,
    });
    assert!(!lost.await.is_empty());
    // The second node stays away, so what is told of it comes from the store.
    drop(second);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let _server = serve_again(dir.path(), address, CONTROL).await;
    let after = first.netmap(|netmap| !netmap.peers.is_empty()).await;
    assert_eq!(after.self_node.id, before.self_node.id);
    assert_eq!(after.self_node.addresses, before.self_node.addresses);
    assert_eq!(after.self_node.name, before.self_node.name);
    let (old, new) = (&before.peers[0], &after.peers[0]);
    assert_eq!(
        (old.id, &old.addresses, old.key),
        (new.id, &new.addresses, new.key)
    );
    assert_eq!(
        (&old.endpoints, old.disco, old.home),
        (&new.endpoints, new.disco, new.home)
    );
    assert_eq!(new.online, None, "not known so soon after a start");
    // A new node gets a new id and address.
    let mut third = Node::join(address, 3, "the key");
    let netmap = third.netmap(|_| true).await;
    assert_eq!(netmap.self_node.id, 3);
    assert_eq!(all(&netmap), [1, 2]);
}

#[tokio::test(flavor = "local")]
async fn a_node_restarts_without_its_key_and_keeps_its_address_with_a_new_node_key() {
    let dir = tempfile::tempdir().unwrap();
    put_key(dir.path(), "once", false);
    put_key(dir.path(), "again", false);
    let (_server, address) = serve(dir.path());
    let mut node = Node::join(address, 1, "once");
    let first = node.netmap(|_| true).await;
    drop(node);
    let mut node = Node::start(Node::config(address, 1, None));
    assert_eq!(node.netmap(|_| true).await.self_node, first.self_node);
    drop(node);
    // The used key does no harm to a node that is known.
    let mut node = Node::join(address, 1, "once");
    node.netmap(|_| true).await;
    drop(node);
    let mut config = Node::config(address, 1, Some("again"));
    config.node = NodePrivate::clamped([9; 32]).public();
    let mut node = Node::start(config);
    let renewed = node.netmap(|_| true).await;
    assert_eq!(renewed.self_node.id, first.self_node.id);
    assert_eq!(renewed.self_node.addresses, first.self_node.addresses);
    assert_ne!(renewed.self_node.key, first.self_node.key);
}

#[tokio::test(flavor = "local")]
async fn bad_credentials_and_a_wrong_server_are_final_and_say_what_to_do() {
    let (_dir, server, address) = serve_anybody();
    let text = Node::join(address, 1, "another key").fatal().await;
    assert!(
        text.contains("keys create") && text.contains("invalid pre auth key"),
        "{text}"
    );
    assert!(!text.contains("another key"), "{text}");
    let mut config = Node::config(address, 1, Some("the key"));
    config.control_key = Some(MachinePublic([7; 32]));
    let text = Node::start(config).fatal().await;
    assert!(text.contains("--control-key"), "{text}");
    let refused = count(&server, "refused_registration") + count(&server, "bad_noise");
    assert_eq!(refused, 2);
}

#[tokio::test(flavor = "local")]
async fn who_has_no_key_is_shown_a_url_and_let_in_by_an_administrator() {
    let (_dir, server, address) = serve_anybody();
    let mut node = Node::start(Node::config(address, 1, None));
    let url = node
        .event(|event| match event {
            CoordEvent::AuthUrl(url) => Some(url),
            CoordEvent::Netmap(_) => panic!("let in"),
            _ => None,
        })
        .await;
    let begun = format!("http://{address}/register/");
    let code = url.strip_prefix(&begun).expect("it is this server's");
    let head = format!("GET /register/{code} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let page = exchange(address, head.as_bytes()).await;
    let page = String::from_utf8(page).unwrap();
    assert!(
        page.contains(&format!("ringtail coord nodes approve {code}\n")),
        "{page}"
    );
    let admit = |code: &str, user: Option<&str>| Order::Admit {
        code: code.to_owned(),
        user: user.map(ToOwned::to_owned),
    };
    let orders = server.orders();
    for (code, user) in [("0000-0000", None), (code, Some("nobody"))] {
        assert!(
            orders.give(admit(code, user)).await.is_err(),
            "{code} {user:?}"
        );
    }
    orders.give(admit(&url, None)).await.unwrap();
    node.netmap(|netmap| netmap.self_node.id == 1).await;
    assert!(
        orders.give(admit(&url, None)).await.is_err(),
        "it is used up"
    );
    assert_eq!(count(&server, "asked_for_approval"), 1);
}

#[tokio::test(flavor = "local")]
async fn who_was_in_and_is_known_no_more_ends_instead_of_joining_again_by_its_key() {
    let (dir, empty) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    put_key(dir.path(), "the key", true);
    put_key(empty.path(), "the key", true);
    let (server, address) = serve(dir.path());
    let mut node = Node::join(address, 1, "the key");
    node.netmap(|_| true).await;
    drop(server);
    // As after an administrator has removed the node.
    let _server = serve_again(empty.path(), address, CONTROL).await;
    let text = node.removed().await;
    assert!(
        text.contains("removed") && text.contains("--auth-key-file"),
        "{text}"
    );
    let nodes = database(empty.path());
    assert!(nodes.load().unwrap().nodes.is_empty());
    // A person starts it anew.
    Node::start(node.config.clone()).netmap(|_| true).await;
}

#[tokio::test(flavor = "local")]
async fn a_deleted_node_ends_at_once_and_an_expired_one_has_nobody_until_it_comes_with_a_key() {
    let (dir, server, address) = serve_anybody();
    let orders = server.orders();
    let mut first = Node::join(address, 1, "the key");
    first.netmap(|_| true).await;
    let mut second = Node::join(address, 2, "the key");
    second.netmap(|netmap| all(netmap) == [1]).await;
    first.netmap(|netmap| all(netmap) == [2]).await;

    let begun = Instant::now();
    orders.give(Change::Expire.of("node2")).await.unwrap();
    let own = second.netmap(|netmap| netmap.self_node.expired).await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!(all(&own), [0; 0]);
    let held = first.netmap(|netmap| netmap.peers.is_empty()).await;
    assert!(held.held_back[0].expired);
    // It goes on reporting; nobody hears of it, and it does not come again and again.
    second.report("192.0.2.66:66", 901);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let expired = count(&server, "expired_node");
    assert!((1..50).contains(&expired), "{expired}");
    let requests = count(&server, "map_requests");
    assert!(requests < 20, "{requests}");
    let stored = database(dir.path());
    assert!(stored.load().unwrap().nodes[1].endpoints.is_empty());
    // A person starts it anew.
    let config = second.config.clone();
    drop(second);
    let mut second = Node::start(config);
    let back = second.netmap(|netmap| all(netmap) == [1]).await;
    assert_eq!(
        (
            back.self_node.id,
            back.self_node.expired,
            &back.self_node.addresses
        ),
        (2, false, &own.self_node.addresses)
    );
    first.netmap(|netmap| netmap.peers.len() == 1).await;

    let node = back.self_node.addresses[0].addr().to_string();
    let begun = Instant::now();
    orders.give(Change::Delete.of(node)).await.unwrap();
    let gone = first.netmap(|netmap| all(netmap).is_empty());
    gone.await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    let text = second.removed().await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert!(text.contains("removed"), "{text}");
    assert_eq!(stored.load().unwrap().nodes.len(), 1);
    // Its key is good for anybody, so it can come again, as somebody else.
    let mut again = Node::start(second.config.clone());
    let again = again.netmap(|_| true).await;
    assert_eq!(again.self_node.id, 3);
    assert_ne!(again.self_node.addresses, own.self_node.addresses);
}

/// A way to the server that can be cut.
async fn way(listener: TcpListener, address: SocketAddr) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let mut open = tokio::task::JoinSet::new();
    loop {
        let (mut near, _) = listener.accept().await.unwrap();
        open.spawn(async move {
            let mut far = tokio::net::TcpStream::connect(address).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
        });
    }
}

#[tokio::test(flavor = "local")]
async fn an_ephemeral_node_that_was_cut_off_for_long_joins_again_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    put_key_of_kind(dir.path(), "the key", true, true);
    let (_server, address) = serve(dir.path());
    let listener = listen(0).unwrap();
    let front = listener.local_addr().unwrap();
    let standing = tokio::task::spawn_local(way(listener, address));
    let mut node = Node::join(front, 1, "the key");
    let before = node.netmap(|_| true).await;
    standing.abort();
    let stored = database(dir.path());
    soon(async || stored.load().unwrap().nodes.is_empty().then_some(())).await;
    let listener = soon(async || listen(front.port()).ok()).await;
    tokio::task::spawn_local(way(listener, address));
    let after = node.netmap(|map| map.self_node.id != before.self_node.id);
    assert_eq!(after.await.self_node.key, before.self_node.key);
}

#[tokio::test(flavor = "local")]
async fn a_server_that_shows_another_key_later_is_outwaited() {
    let (dir, server, address) = serve_anybody();
    let mut node = Node::join(address, 1, "the key");
    node.netmap(|_| true).await;
    drop(server);
    let server = serve_again(dir.path(), address, [0x43; 32]).await;
    let shown = node.event(|event| match event {
        CoordEvent::Lost { error, .. } => error.contains("shows the key").then_some(()),
        CoordEvent::Fatal(text) => panic!("{text}"),
        _ => None,
    });
    shown.await;
    drop(server);
    let _server = serve_again(dir.path(), address, CONTROL).await;
    node.netmap(|_| true).await;
}

#[tokio::test(flavor = "local")]
async fn a_single_use_key_raced_by_two_machines_lets_exactly_one_in() {
    for round in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        put_key(dir.path(), "once", false);
        let (_server, address) = serve(dir.path());
        let mut nodes = [1, 2].map(|seed| Node::join(address, seed, "once"));
        let mut outcomes = Vec::new();
        for node in &mut nodes {
            outcomes.push(
                node.event(|event| match event {
                    CoordEvent::Netmap(_) => Some(true),
                    CoordEvent::Fatal(text) => {
                        assert!(text.contains("used"), "{text}");
                        Some(false)
                    }
                    _ => None,
                })
                .await,
            );
        }
        outcomes.sort_unstable();
        assert_eq!(outcomes, [false, true], "round {round}");
    }
}

async fn exchange(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    // The server may close before it has read everything.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    let _ = tokio::time::timeout(PATIENCE, read).await.expect("an end");
    answer
}

#[tokio::test(flavor = "local")]
async fn malformed_input_is_counted_and_disturbs_nobody() {
    let (_dir, server, address) = serve_anybody();
    let mut node = Node::join(address, 1, "the key");
    node.netmap(|_| true).await;
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |len: usize| -> Vec<u8> {
        (0..len)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                seed.to_be_bytes()[0]
            })
            .collect()
    };
    for len in [0, 1, 20, 1000, 40_000] {
        exchange(address, &random(len)).await;
    }
    for path in ["/", "/key", "/key?v=x", "/machine/map", "/%00", "/verify"] {
        for method in ["GET", "POST", "PUT"] {
            let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\n");
            let mut request = format!("{head}Content-Length: 100\r\n\r\n").into_bytes();
            request.extend(random(100));
            exchange(address, &request).await;
        }
    }
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000));
    exchange(address, long.as_bytes()).await;
    let large = "POST /verify HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n";
    let answer = exchange(address, format!("{large}{}", "x".repeat(99_999)).as_bytes()).await;
    assert!(
        answer.starts_with(b"HTTP/1.1 413"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    let upgrade = |handshake: &str, more: &[u8]| -> Vec<u8> {
        let head = format!(
            "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: tailscale-control-protocol\r\n\
                     Connection: upgrade\r\n{handshake}Content-Length: 0\r\n\r\n"
        );
        [head.as_bytes(), more].concat()
    };
    for (handshake, answer) in [
        (String::new(), "missing Tailscale handshake header"),
        (
            "X-Tailscale-Handshake: !\r\n".to_owned(),
            "invalid tailscale handshake header",
        ),
        (
            "X-Tailscale-Handshake: AAAA\r\n".to_owned(),
            "invalid tailscale handshake header",
        ),
    ] {
        let got = exchange(address, &upgrade(&handshake, b"")).await;
        let got = String::from_utf8_lossy(&got).into_owned();
        assert!(got.contains(answer), "{got}");
    }
    // A good handshake of a stranger, then noise instead of Noise.
    use base64::Engine as _;
    let control = MachinePrivate::clamped(CONTROL).public();
    for (version, garbage) in [
        (130, random(5000)),
        (130, vec![4, 0xff, 0xff]),
        (112, Vec::new()),
    ] {
        let stranger = MachinePrivate::clamped([0x77; 32]);
        let e = MachinePrivate::generate();
        let (_, message) =
            ringtail::noise::Initiator::new(version, &stranger, &control, e).unwrap();
        let message = base64::engine::general_purpose::STANDARD.encode(message);
        let handshake = format!("X-Tailscale-Handshake: {message}\r\n");
        let answer = exchange(address, &upgrade(&handshake, &garbage)).await;
        assert!(answer.starts_with(b"HTTP/1.1 101"));
    }
    let random_handshake = base64::engine::general_purpose::STANDARD.encode(random(101));
    let handshake = format!("X-Tailscale-Handshake: {random_handshake}\r\n");
    exchange(address, &upgrade(&handshake, b"")).await;

    // Nobody else noticed.
    node.report("192.0.2.9:1", 900);
    let mut other = Node::join(address, 2, "the key");
    other
        .netmap(|netmap| netmap.peers.iter().any(|p| p.home == Some(900)))
        .await;
    let counted: std::collections::BTreeMap<_, _> = server.counters().into_iter().collect();
    for name in [
        "bad_http",
        "bad_upgrade",
        "bad_noise",
        "bad_version",
        "bad_stream",
        "bad_request",
        "too_large",
        "not_found",
    ] {
        assert!(counted[name] > 0, "{name}: {counted:?}");
    }
    assert_eq!(counted["registrations"], 2);
}
