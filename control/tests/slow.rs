//! Slow clients on every listener: many connections at each stage of each protocol, which say nothing, or a byte
//! now and then, or read nothing. They end by the deadline of their stage and are counted, who behaves is served
//! all the while, and memory and descriptors stay within bounds.
//!
//! The servers are the program itself, so that its descriptors and memory can be counted. All is held at once,
//! in real time: the longest deadline is a minute.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod address;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use ringtail::derp::client::{Client, Hello};
use ringtail::derp::frame::{self, FrameType};
use ringtail::driver::local_api::{self, Request};
use ringtail::driver::tls::roots;
use ringtail::driver::tls::verify::Verifiers;
use ringtail::driver::{clock, runtime, uapi};
use ringtail::key::{MachinePrivate, MachinePublic, NodePrivate, NodePublic};
use ringtail::netmap::DerpNode;
use ringtail::noise::Initiator;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Connections of each kind.
const EACH: usize = 20;
/// Between the bytes of who says something.
const DRIP: Duration = Duration::from_millis(700);
/// What a machine that others use, too, may take beyond a deadline.
const SLACK: Duration = Duration::from_secs(10);
/// Who behaves is served within this.
const SERVED: Duration = Duration::from_secs(5);
/// What all the slow ones may cost a server.
const MEMORY_MAX: u64 = 64 << 20;

/// One that begins well, and then goes on slowly.
#[derive(Clone)]
struct Slow {
    /// Said at once.
    first: Vec<u8>,
    /// Said over and over, a byte at a time; nothing is silence.
    then: &'static [u8],
    /// Not read for so long.
    deaf: Duration,
}

fn says(first: &str, then: &'static str) -> Slow {
    Slow {
        first: first.as_bytes().to_vec(),
        then: then.as_bytes(),
        deaf: Duration::ZERO,
    }
}

fn deaf(first: &str, secs: u64) -> Slow {
    Slow {
        deaf: Duration::from_secs(secs),
        ..says(first, "")
    }
}

/// Goes on until the other side ends it; how long that took.
async fn hold(io: impl AsyncRead + AsyncWrite, slow: Slow) -> Duration {
    let start = clock::now();
    let (mut read, mut write) = tokio::io::split(io);
    let ended = async {
        sleep(slow.deaf).await;
        let mut bytes = vec![0; 64 << 10];
        while read.read(&mut bytes).await.is_ok_and(|len| len > 0) {}
    };
    let speaks = async {
        let _ = write.write_all(&slow.first).await;
        for byte in slow.then.iter().cycle() {
            if write.write_all(&[*byte]).await.is_err() || write.flush().await.is_err() {
                break;
            }
            sleep(DRIP).await;
        }
        std::future::pending().await
    };
    tokio::select! {
        () = ended => {}
        () = speaks => {}
    }
    start.elapsed()
}

/// What holds a listener, until every connection has ended.
#[derive(Default)]
struct Holders(JoinSet<()>);

impl Holders {
    /// Many of one kind, each of which has to end within `deadline`. `connect` gets as far as it says.
    fn add<C, F>(&mut self, stage: &'static str, deadline: Duration, slow: &Slow, connect: C)
    where
        C: Fn() -> F,
        F: Future<Output: AsyncRead + AsyncWrite + Send> + Send + 'static,
    {
        for _ in 0..EACH {
            let (slow, connecting) = (slow.clone(), connect());
            self.0.spawn(async move {
                let io = connecting.await;
                let limit = deadline + slow.deaf + SLACK;
                let held = timeout(limit, hold(io, slow)).await;
                assert!(held.is_ok(), "{stage}: still there after {limit:?}");
            });
        }
    }

    async fn join(mut self) {
        while let Some(ended) = self.0.join_next().await {
            ended.unwrap();
        }
    }
}

/// A server; it ends with this.
struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    fn start(args: &[&str], dir: &Path) -> Server {
        let log = dir.join("log");
        let file = std::fs::File::create(&log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_ringtail"))
            // A huge page counts for 2 MiB, whatever is held of it.
            .env("MIMALLOC_ALLOW_THP", "0")
            .args(args)
            .args(["--state-dir", dir.to_str().unwrap()])
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .stdin(Stdio::null())
            .spawn();
        Server {
            child: child.unwrap(),
            log,
        }
    }

    /// What it has printed behind these words, once it has.
    async fn said(&self, behind: &str) -> String {
        for _ in 0..600 {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            if let Some((_, rest)) = log.split_once(behind) {
                let end = |c: char| !c.is_ascii_hexdigit() && c != '.' && c != ':';
                return rest.split(end).next().unwrap_or_default().to_owned();
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("{behind:?} is missing in {}", self.log.display());
    }

    fn descriptors(&self) -> usize {
        let dir = format!("/proc/{}/fd", self.child.id());
        std::fs::read_dir(dir).unwrap().count()
    }

    fn memory(&self) -> u64 {
        let status = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        kib.unwrap().parse::<u64>().unwrap() << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn tcp(to: SocketAddr) -> TcpStream {
    TcpStream::connect(to).await.unwrap()
}

/// What is answered, to the end.
async fn exchange(mut io: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
    io.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A relay may end without a farewell of TLS.
    let _ = io.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
}

/// Asks over and over; each is answered in time, until this is dropped.
async fn is_served<F: Future<Output = bool>>(who: &str, ask: impl Fn() -> F) {
    // All the others are there.
    sleep(Duration::from_secs(1)).await;
    loop {
        let answer = timeout(SERVED, ask()).await;
        assert_eq!(answer.ok(), Some(true), "{who} does not serve who behaves");
        sleep(Duration::from_millis(300)).await;
    }
}

/// Watches what a server holds, until this is dropped.
async fn is_bounded(server: &Server, descriptors_max: usize) {
    let (memory, descriptors) = (server.memory(), server.descriptors());
    loop {
        let more = server.memory().saturating_sub(memory);
        assert!(more <= MEMORY_MAX, "{more} bytes more");
        let more = server.descriptors().saturating_sub(descriptors);
        assert!(more <= descriptors_max, "{more} descriptors more");
        sleep(Duration::from_millis(300)).await;
    }
}

/// Every descriptor is given back.
async fn is_as_before(server: &Server, descriptors: usize) {
    for _ in 0..100 {
        if server.descriptors() <= descriptors {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("{} descriptors, not {descriptors}", server.descriptors());
}

/// The sum of some of the counters that a server shows, as lines or JSON.
fn counted(shown: &str, names: &[&str]) -> u64 {
    let of = |name: &str| {
        let (_, rest) = shown.split_once(name)?;
        let digits = rest.trim_start_matches(['"', ':', ' ']);
        let end = digits.find(|c: char| !c.is_ascii_digit());
        digits[..end.unwrap_or(digits.len())].parse::<u64>().ok()
    };
    names.iter().filter_map(|name| of(name)).sum()
}

type Tls = tokio_rustls::client::TlsStream<TcpStream>;

/// TLS that asks nobody for his papers.
async fn tls(to: SocketAddr) -> Tls {
    let node = DerpNode {
        host_name: to.ip().to_string(),
        insecure_for_tests: true,
        ..DerpNode::default()
    };
    let verifiers = Verifiers::new(roots::web());
    let (config, name) = verifiers.client_config(&node).unwrap();
    let connector = tokio_rustls::TlsConnector::from(config);
    connector.connect(name, tcp(to).await).await.unwrap()
}

/// A client of a relay that has shown who it is.
async fn greeted(to: SocketAddr, key: NodePrivate) -> Tls {
    let mut io = tls(to).await;
    let hello = Hello {
        host: "127.0.0.1",
        ideal_node: None,
        relay: None,
        home: true,
    };
    let mut client = Client::new(key, &hello, rand::random(), clock::now());
    let mut bytes = vec![0; 4096];
    while !client.is_ready() {
        let mut out = Vec::new();
        client.poll_transmit(&mut out);
        io.write_all(&out).await.unwrap();
        let len = io.read(&mut bytes).await.unwrap();
        assert!(len > 0, "the relay ended it");
        let input = &bytes[..len];
        client
            .handle_input(clock::now(), input, &mut |_| ())
            .unwrap();
    }
    let mut out = Vec::new();
    client.poll_transmit(&mut out);
    io.write_all(&out).await.unwrap();
    io.flush().await.unwrap();
    io
}

/// A Noise session with a coordination server, and nothing in it.
async fn upgraded(to: SocketAddr, control: MachinePublic) -> TcpStream {
    let machine = MachinePrivate::generate();
    let (_initiator, message) =
        Initiator::new(130, &machine, &control, MachinePrivate::generate()).unwrap();
    let text = base64::engine::general_purpose::STANDARD.encode(message);
    let request = format!(
        "POST /ts2021 HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: \
         tailscale-control-protocol\r\nX-Tailscale-Handshake: {text}\r\n\r\n"
    );
    let mut io = tcp(to).await;
    io.write_all(request.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    io.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 101");
    io
}

/// A way to a server on which nothing moves any more, in either direction, once it is told so. Gives the time
/// from then until the server ends it.
async fn stalling(
    to: SocketAddr,
) -> (
    SocketAddr,
    tokio::sync::watch::Sender<bool>,
    JoinSet<Duration>,
) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let (stall, stalled) = tokio::sync::watch::channel(false);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = tcp(to).await;
            let mut told = stalled.clone();
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => continue,
                _ = told.wait_for(|stalled| *stalled) => {}
            }
            return hold(far, deaf("", 30)).await;
        }
    });
    (at, stall, tasks)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_coordination_server_outlasts_slow_clients_of_every_stage() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key").to_str().unwrap().to_owned();
    let args = ["coord", "--addr", "127.0.0.1:0", "--auth-key-file", &key];
    let server = Server::start(&args, dir.path());
    let address: SocketAddr = server.said("http://").await.parse().unwrap();
    let answer = exchange(tcp(address).await, &get("/key?v=130")).await;
    // The first is for clients of old.
    let (_, rest) = answer.rsplit_once("mkey:").unwrap();
    let control: MachinePublic = format!("mkey:{}", &rest[..64]).parse().unwrap();

    // A member whose map stream will stand still.
    let (by, stall, stalled) = stalling(address).await;
    let url = format!("http://{by}");
    let member = tempfile::tempdir().unwrap();
    let watch = [
        "coord",
        "watch",
        &url,
        "--auth-key-file",
        &key,
        "--hostname",
        "member",
    ];
    let member = Server::start(&watch, member.path());
    member.said("member").await;
    sleep(Duration::from_secs(2)).await;
    let descriptors = server.descriptors();
    stall.send(true).unwrap();

    let secs = Duration::from_secs;
    let mut holders = Holders::default();
    let plain = || tcp(address);
    holders.add("silent", secs(10), &says("", ""), plain);
    let head = says("GET /key?v=130 HTTP/1.1\r\n", "X: y\r\n");
    holders.add("a head", secs(10), &head, plain);
    let idle = says("GET /health HTTP/1.1\r\nHost: a\r\n\r\n", "");
    holders.add("between requests", secs(60), &idle, plain);
    let body = "POST /verify HTTP/1.1\r\nHost: a\r\nContent-Length: 4000\r\n\r\n";
    holders.add("a body", secs(60), &says(body, " "), plain);
    let noise = move || upgraded(address, control);
    holders.add("Noise, silent", secs(60), &says("", ""), noise);
    let record = says("\u{4}\u{4}", "\u{0}");
    holders.add("a Noise record", secs(60), &record, noise);
    let all = 6 * EACH;

    tokio::select! {
        () = holders.join() => {}
        () = is_bounded(&server, all + 50) => {}
        () = is_served("coord", async || {
            let answer = exchange(tcp(address).await, &get("/key?v=130")).await;
            answer.contains("mkey:")
        }) => {}
    }
    let took = stalled.join_all().await;
    assert!(
        took.iter().all(|took| *took < secs(30 + 15) + SLACK),
        "{took:?}"
    );
    drop(member);
    is_as_before(&server, descriptors).await;
    let shown = exchange(tcp(address).await, &get("/metrics")).await;
    let names = ["_timed_out ", "_bad_http ", "_bad_stream ", "_bad_noise "];
    let names = names.map(|name| format!("\nringtail_coord{name}"));
    let ended = counted(&shown, &names.each_ref().map(String::as_str));
    assert!(
        ended >= (all - 2 * EACH) as u64,
        "{ended} of {all}:\n{shown}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_relay_outlasts_slow_clients_of_every_stage() {
    let dir = tempfile::tempdir().unwrap();
    let [main, plain, stun] = [10_001, 10_002, 10_003].map(address::of_this_process);
    let addr = main.to_string();
    let args = [
        "derp",
        "--hostname",
        "127.0.0.1",
        "--addr",
        &addr,
        "--http-port",
        "10002",
        "--stun-port",
        "10003",
    ];
    let server = Server::start(&args, dir.path());
    server.said("relay is up").await;
    let descriptors = server.descriptors();

    let secs = Duration::from_secs;
    let mut holders = Holders::default();
    let new_key = || NodePrivate::clamped(rand::random());
    holders.add("silent", secs(10), &says("", ""), || tcp(main));
    // The head of a ClientHello of 512 bytes.
    let hello = says("\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}\u{0}\u{1}", "\u{3}");
    holders.add("a TLS record", secs(10), &hello, || tcp(main));
    holders.add("TLS, silent", secs(30), &says("", ""), || tls(main));
    let head = says("GET /derp HTTP/1.1\r\n", "X: y\r\n");
    holders.add("a head", secs(30), &head, || tls(main));
    let upgrade = "GET /derp HTTP/1.1\r\nHost: a\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n";
    holders.add("no ClientInfo", secs(10), &says(upgrade, ""), || tls(main));
    holders.add("a ClientInfo", secs(10), &says(upgrade, "\u{2}"), || {
        tls(main)
    });
    let mut part = Vec::new();
    frame::put(&mut part, FrameType::SEND_PACKET, &[&[1; 1000]]);
    let part = Slow {
        first: part[..40].to_vec(),
        ..says("", "\u{1}")
    };
    holders.add("a frame", secs(10), &part, move || greeted(main, new_key()));
    holders.add("without TLS, silent", secs(30), &says("", ""), || {
        tcp(plain)
    });
    holders.add("without TLS, a head", secs(30), &head, || tcp(plain));
    let all = 9 * EACH;

    // Two that read nothing while others send to them.
    for _ in 0..2 {
        let key = new_key();
        let to = key.public();
        holders.0.spawn(async move {
            let io = greeted(main, key).await;
            let held = timeout(secs(40) + SLACK, hold(io, deaf("", 25))).await;
            assert!(held.is_ok(), "a deaf client is kept");
        });
        holders
            .0
            .spawn(async move { flood(greeted(main, new_key()).await, to).await });
    }

    tokio::select! {
        () = holders.join() => {}
        () = is_bounded(&server, all + 50) => {}
        () = is_served("derp", async || {
            let answer = exchange(tls(main).await, &get("/derp/latency-check")).await;
            answer.starts_with("HTTP/1.1 200")
        }) => {}
        () = is_served("stun", async || {
            let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let request = ringtail::stun::request(rand::random());
            let mut answer = [0; 200];
            socket.send_to(&request, stun).await.unwrap();
            socket.recv(&mut answer).await.is_ok_and(|len| len > 20)
        }) => {}
        () = is_served("the portal check", async || {
            let answer = exchange(tcp(plain).await, &get("/generate_204")).await;
            answer.starts_with("HTTP/1.1 204")
        }) => {}
    }
    is_as_before(&server, descriptors).await;
    let shown = exchange(tls(main).await, &get("/debug/vars")).await;
    let names = [
        "tls_failures",
        "http_failures",
        "hello_failures",
        "frame_timeouts",
    ];
    let ended = counted(&shown, &names);
    assert!(
        ended >= (all - 2 * EACH) as u64,
        "{ended} of {all}:\n{shown}"
    );
}

/// Sends to a client for twenty seconds, whatever becomes of it.
async fn flood(io: Tls, to: NodePublic) {
    let (mut read, mut write) = tokio::io::split(io);
    let mut packets = Vec::new();
    for _ in 0..64 {
        frame::put_send_packet(&mut packets, &to, &[4; 1000]);
    }
    let sends = async {
        while write.write_all(&packets).await.is_ok() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    let mut bytes = vec![0; 4096];
    let reads = async { while read.read(&mut bytes).await.is_ok_and(|len| len > 0) {} };
    let both = async { tokio::join!(sends, reads) };
    let _ = timeout(Duration::from_secs(20), both).await;
}

/// The sockets by which programs of this machine talk to a node and a device: in this process, with a loop
/// behind them that answers at length.
#[test]
fn local_sockets_outlast_slow_clients_of_every_stage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    runtime::block_on(|_| async move {
        let status = path.join("status");
        let (calls, mut called) = tokio::sync::mpsc::channel(4);
        let (listener, _file) = local_api::listen(&status)?;
        tokio::task::spawn_local(local_api::serve(listener, local_api::Reader::Owner, calls));
        tokio::task::spawn_local(async move {
            while let Some(call) = called.recv().await {
                let long = "x".repeat(1 << 20);
                let _ = call.answers.send(serde_json::json!({ "long": long })).await;
            }
        });
        let socket = uapi::Socket::bind(&path, "wg9")?;
        let (calls, mut called) = tokio::sync::mpsc::channel(4);
        tokio::task::spawn_local(uapi::serve(socket.listener()?, calls));
        tokio::task::spawn_local(async move {
            while let Some(call) = called.recv().await {
                let _ = call.reply.send(long_reply());
            }
        });
        let device = path.join("wg9.sock");

        let secs = Duration::from_secs;
        let mut holders = Holders::default();
        let to = |path: &Path| {
            let path = path.to_owned();
            move || {
                let path = path.clone();
                async move { UnixStream::connect(path).await.unwrap() }
            }
        };
        holders.add("status, silent", secs(5), &says("", ""), to(&status));
        let part = says("{\"request\":\"status\"", " ");
        holders.add("status, a line", secs(5), &part, to(&status));
        let asks = deaf("{\"request\":\"status\"}\n", 15);
        holders.add("status, deaf", secs(5), &asks, to(&status));
        // A device's client may be idle for a minute; so many are too many, and make room.
        holders.add("uapi, silent", secs(60), &says("", ""), to(&device));
        holders.add(
            "uapi, a line",
            secs(30),
            &says("set=1\nprivate_key=", "0"),
            to(&device),
        );
        holders.add("uapi, deaf", secs(20), &deaf("get=1\n\n", 15), to(&device));
        let watched = async {
            // All have been accepted, or made room.
            sleep(Duration::from_secs(2)).await;
            loop {
                let (status, device) = (connections(&status), connections(&device));
                assert!(status <= 40, "{status} connections of a bound of 32");
                assert!(device <= 3 * EACH + 10, "{device} connections");
                sleep(Duration::from_millis(300)).await;
            }
        };
        tokio::select! {
            () = holders.join() => {}
            () = watched => {}
            () = is_served("status", async || {
                let mut long = 0;
                let each = |answer: serde_json::Value| {
                    long = answer["long"].as_str().map_or(0, str::len);
                    Ok(())
                };
                local_api::ask(&status, &Request::Status, each).await.is_ok() && long == 1 << 20
            }) => {}
            () = is_served("uapi", async || {
                let mut io = UnixStream::connect(&device).await.unwrap();
                io.write_all(b"get=1\n\n").await.unwrap();
                io.shutdown().await.unwrap();
                let mut answer = String::new();
                io.read_to_string(&mut answer).await.unwrap();
                answer.ends_with("errno=0\n\n")
            }) => {}
        }
        for _ in 0..100 {
            if connections(&status) + connections(&device) == 0 {
                return Ok(());
            }
            sleep(Duration::from_millis(100)).await;
        }
        anyhow::bail!("connections are left")
    })
    .unwrap();
}

/// The connections to a local socket: each has its name, as the socket itself has.
fn connections(path: &Path) -> usize {
    let all = std::fs::read_to_string("/proc/net/unix").unwrap();
    let named = all
        .lines()
        .filter(|line| line.ends_with(path.to_str().unwrap()));
    named.count().saturating_sub(1)
}

fn long_reply() -> ringtail::uapi::Reply {
    let extras = (0..20_000).map(|n| (format!("n{n}"), "x".repeat(60)));
    let status = ringtail::uapi::DeviceStatus {
        extras: extras.collect(),
        ..Default::default()
    };
    ringtail::uapi::Reply::to_get(&status, 0, 0).finish()
}
