//! What strangers can do to `ringtail coord`: hold connections, send what they like, ask for what is
//! not theirs. With sockets and a Noise client of our own, over loopback.
#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test ends by panicking, and waits"
)]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2::SendRequest;
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use ringtail::driver::noise_stream::NoiseStream;
use ringtail::key::{MachinePrivate, MachinePublic, NodePublic};
use ringtail::netmap::wire::KeyResponse;
use ringtail::noise::{HEADER_LEN, Initiator};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// How long a machine that others use, too, may take for what comes at once.
const PATIENCE: Duration = Duration::from_secs(30);
const LOG_OUT: &str = "1970-01-01T00:02:03Z";

/// A server of its own process, ended with the test.
struct Server {
    child: Child,
    address: SocketAddr,
    control: MachinePublic,
    /// It stays open: the server may say more.
    _stdout: BufReader<ChildStdout>,
    _dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// `files` is how many descriptors it may have, by the administrator's will.
    async fn start(files: Option<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("auth-key"), "the key").unwrap();
        let limit = files.map_or_else(String::new, |files| format!("ulimit -n {files};"));
        let quoted = |path: &Path| format!("'{}'", path.display());
        let command = format!(
            "{limit} exec {} coord --addr 127.0.0.1:0 --state-dir {} --auth-key-file {}",
            quoted(Path::new(env!("CARGO_BIN_EXE_ringtail"))),
            quoted(&dir.path().join("state")),
            quoted(&dir.path().join("auth-key")),
        );
        let mut child = Command::new("sh")
            // A huge page counts for 2 MiB, whatever is held of it.
            .env("MIMALLOC_ALLOW_THP", "0")
            .args(["-c", &command])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let first = tokio::task::spawn_blocking(move || {
            let (mut lines, mut said) = (BufReader::new(stdout), String::new());
            lines.read_line(&mut said).map(|_| (lines, said))
        });
        let first = tokio::time::timeout(PATIENCE, first).await;
        if first.is_err() {
            // So that the read ends, for which the runtime waits.
            let _ = child.kill();
        }
        let (lines, said) = first.expect("the server starts").unwrap().unwrap();
        let address = said
            .trim_end()
            .strip_prefix("coordination server at http://")
            .unwrap_or_else(|| panic!("it begins with its address: {said}"));
        let address: SocketAddr = address.parse().unwrap();
        let begun = Instant::now();
        let answer = loop {
            assert!(begun.elapsed() < PATIENCE, "the server starts");
            match get(address, "/key?v=130").await {
                Some(answer) => break answer,
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let answer: KeyResponse = serde_json::from_str(&answer).unwrap();
        Self {
            child,
            address,
            control: answer.public_key,
            _stdout: lines,
            _dir: dir,
        }
    }

    async fn metrics(&self) -> BTreeMap<String, u64> {
        let begun = Instant::now();
        let text = get(self.address, "/metrics").await.expect("metrics");
        assert!(begun.elapsed() < PATIENCE);
        let lines = text.lines().map(|line| line.split_once(' ').unwrap());
        let name = |name: &str| name.trim_start_matches("ringtail_coord_").to_owned();
        lines
            .map(|(key, value)| (name(key), value.parse().unwrap()))
            .collect()
    }

    /// Kilobytes of memory.
    fn rss(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(path).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmRSS:"));
        let words: Vec<&str> = line.unwrap().split_whitespace().collect();
        words[1].parse().unwrap()
    }

    async fn connect(&self, from: [u8; 4]) -> Option<TcpStream> {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket
            .bind(SocketAddr::from((Ipv4Addr::from(from), 0)))
            .unwrap();
        let connect = socket.connect(self.address);
        tokio::time::timeout(PATIENCE, connect).await.unwrap().ok()
    }

    /// A Noise connection of this machine, before anything is said on it.
    async fn noise(&self, from: [u8; 4], machine: u8) -> Option<NoiseStream<TcpStream>> {
        let mut stream = self.connect(from).await?;
        let machine = MachinePrivate::clamped([machine; 32]);
        let ephemeral = MachinePrivate::generate();
        let (initiator, message) = Initiator::new(130, &machine, &self.control, ephemeral).unwrap();
        let message = base64::engine::general_purpose::STANDARD.encode(message);
        let head = format!(
            "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: tailscale-control-protocol\r\n\
             Connection: upgrade\r\nX-Tailscale-Handshake: {message}\r\nContent-Length: 0\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await.ok()?);
        }
        assert!(answer.starts_with(b"HTTP/1.1 101"));
        let mut head = [0; HEADER_LEN];
        stream.read_exact(&mut head).await.ok()?;
        let len = Initiator::answer_body_len(head).unwrap();
        let mut answer = head.to_vec();
        answer.resize(HEADER_LEN + len, 0);
        stream.read_exact(&mut answer[HEADER_LEN..]).await.ok()?;
        let session = initiator.finish(&answer).unwrap();
        Some(NoiseStream::client(stream, session, BytesMut::new()))
    }

    /// An HTTP/2 client of this machine.
    async fn client(&self, from: [u8; 4], machine: u8) -> Option<SendRequest<Full<Bytes>>> {
        let stream = self.noise(from, machine).await?;
        let http =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (sender, connection) = http.await.ok()?;
        tokio::spawn(connection);
        Some(sender)
    }
}

/// The body of what is answered with 200 on a new connection.
async fn get(address: SocketAddr, path: &str) -> Option<String> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.starts_with("HTTP/1.1 200").then(|| body.to_owned())
    };
    tokio::time::timeout(PATIENCE, exchange).await.ok()?
}

fn node_key(n: u8) -> NodePublic {
    NodePublic([n ^ 0x80; 32])
}

fn registration(n: u8) -> Value {
    json!({"Version": 130, "NodeKey": node_key(n), "Hostinfo": {"Hostname": format!("host{n}")}})
}

async fn post(
    sender: &mut SendRequest<Full<Bytes>>,
    path: &str,
    body: Vec<u8>,
) -> Option<(StatusCode, Bytes)> {
    let request = Request::post(format!("https://x{path}"))
        .body(Full::new(Bytes::from(body)))
        .unwrap();
    let exchange = async {
        let response = sender.send_request(request).await.ok()?;
        let status = response.status();
        Some((
            status,
            response.into_body().collect().await.ok()?.to_bytes(),
        ))
    };
    tokio::time::timeout(PATIENCE, exchange).await.unwrap()
}

async fn register(sender: &mut SendRequest<Full<Bytes>>, request: &Value) -> Option<Value> {
    let body = serde_json::to_vec(request).unwrap();
    let (status, answer) = post(sender, "/machine/register", body).await?;
    assert_eq!(status, StatusCode::OK);
    Some(serde_json::from_slice(&answer).unwrap())
}

/// Registers with the good key and says that all is well.
async fn join(server: &Server, from: [u8; 4], n: u8) -> SendRequest<Full<Bytes>> {
    let mut sender = server.client(from, n).await.unwrap();
    let mut request = registration(n);
    request["Auth"] = json!({"AuthKey": "the key"});
    let answer = register(&mut sender, &request).await.unwrap();
    assert_eq!(answer["MachineAuthorized"], true, "{answer}");
    report(&mut sender, n).await;
    sender
}

/// A node that is known reports where it is.
async fn report(sender: &mut SendRequest<Full<Bytes>>, n: u8) {
    let request = json!({"Version": 130, "NodeKey": node_key(n), "OmitPeers": true,
                         "Endpoints": ["192.0.2.7:1"]});
    let body = serde_json::to_vec(&request).unwrap();
    let answer = post(sender, "/machine/map", body).await;
    assert_eq!(answer.map(|(status, _)| status), Some(StatusCode::OK));
}

#[tokio::test]
async fn a_log_out_of_nobody_makes_nobody_known() {
    let server = Server::start(None).await;
    let _known = join(&server, [127, 0, 0, 1], 1).await;
    let mut stranger = server.client([127, 0, 0, 1], 9).await.unwrap();
    // Its own node, which is nowhere, and another machine's.
    for n in [9, 1] {
        let mut request = registration(n);
        request["Expiry"] = json!(LOG_OUT);
        let answer = register(&mut stranger, &request).await.unwrap();
        assert_eq!(answer["Error"], "node not found", "{answer}");
        assert_eq!(answer["MachineAuthorized"], false, "{answer}");
        assert!(!answer.to_string().contains("ringtail"), "{answer}");
    }
    let metrics = server.metrics().await;
    assert_eq!(metrics["gauge_known"], 1);
    assert_eq!(metrics["refused_registration"], 2);
    assert_eq!((metrics["registrations"], metrics["log_outs"]), (1, 0));
}

#[tokio::test]
async fn a_stranger_sends_64_kilobytes_and_a_node_a_megabyte() {
    let server = Server::start(None).await;
    let mut known = join(&server, [127, 0, 0, 1], 1).await;
    let mut stranger = server.client([127, 0, 0, 1], 9).await.unwrap();
    let filled = |len: usize| {
        let mut request = registration(9);
        request["Filler"] = json!("x".repeat(len));
        serde_json::to_vec(&request).unwrap()
    };
    for (is_known, len, status) in [
        (false, 60 << 10, StatusCode::OK),
        (false, 65 << 10, StatusCode::PAYLOAD_TOO_LARGE),
        (true, 1000 << 10, StatusCode::OK),
        (true, 1030 << 10, StatusCode::PAYLOAD_TOO_LARGE),
    ] {
        let sender = if is_known { &mut known } else { &mut stranger };
        let answer = post(sender, "/machine/register", filled(len)).await;
        // Who goes on sending may find the stream reset instead of an answer.
        if status == StatusCode::OK || answer.is_some() {
            assert_eq!(answer.map(|(status, _)| status), Some(status), "{len}");
        }
    }
    assert_eq!(server.metrics().await["too_large"], 2);
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn frame(kind: u8, flags: u8, stream: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap().to_be_bytes();
    let mut frame = vec![len[1], len[2], len[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(body);
    frame
}

/// The number of streams that the server says it takes at a time.
async fn streams_max(server: &Server, machine: u8) -> u32 {
    let mut stream = server.noise([127, 0, 0, 1], machine).await.unwrap();
    let hello = [PREFACE, &frame(4, 0, 0, &[])].concat();
    stream.write_all(&hello).await.unwrap();
    stream.flush().await.unwrap();
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "SETTINGS come first");
    let mut settings = vec![0; usize::from(head[2])];
    stream.read_exact(&mut settings).await.unwrap();
    let setting = settings.chunks(6).find(|setting| setting[1] == 3);
    u32::from_be_bytes(setting.unwrap()[2..].try_into().unwrap())
}

#[tokio::test]
async fn a_stranger_has_two_streams_and_cannot_send_frames_for_ever() {
    let server = Server::start(None).await;
    let _known = join(&server, [127, 0, 0, 1], 1).await;
    assert_eq!(streams_max(&server, 9).await, 2);
    assert_eq!(streams_max(&server, 1).await, 8);
    // A header block that begins and never ends; HPACK as it may be.
    let begun = frame(1, 0, 1, &[0x82; 100]);
    // POST https x/: opens a stream; the next frame resets it.
    let reset = |stream: u32| {
        let head = [0x83, 0x84, 0x87, 0x41, 0x01, b'x'];
        let cancel = 8_u32.to_be_bytes();
        [frame(1, 4, stream, &head), frame(3, 0, stream, &cancel)].concat()
    };
    type Flood<'a> = (&'a str, Vec<u8>, Box<dyn Fn(u32) -> Vec<u8>>);
    let floods: [Flood<'_>; 6] = [
        ("PING", Vec::new(), Box::new(|_| frame(6, 0, 0, &[0; 8]))),
        (
            "SETTINGS",
            Vec::new(),
            Box::new(|_| frame(4, 0, 0, &[0, 4, 0, 0, 0, 9])),
        ),
        (
            "CONTINUATION",
            begun,
            Box::new(|_| frame(9, 0, 1, &[0x82; 10])),
        ),
        (
            "empty DATA",
            frame(1, 4, 1, &[0x83, 0x84, 0x87, 0x41, 1, b'x']),
            Box::new(|_| frame(0, 0, 1, &[])),
        ),
        (
            "PRIORITY",
            Vec::new(),
            Box::new(|_| frame(2, 0, 1, &[0, 0, 0, 0, 9])),
        ),
        ("reset", Vec::new(), Box::new(move |n| reset(2 * n + 1))),
    ];
    for (name, first, next) in floods {
        let mut stream = server.noise([127, 0, 0, 1], 9).await.unwrap();
        let hello = [PREFACE, &frame(4, 0, 0, &[]), &first].concat();
        stream.write_all(&hello).await.unwrap();
        let mut sent = hello.len();
        let flood = async {
            let mut answers = [0; 4096];
            for n in 0.. {
                let frames: Vec<u8> = (0..200).flat_map(|at| next(200 * n + at)).collect();
                if stream.write_all(&frames).await.is_err() || stream.flush().await.is_err() {
                    return;
                }
                sent += frames.len();
                // What the server says must not keep it from reading.
                let read =
                    tokio::time::timeout(Duration::from_millis(1), stream.read(&mut answers));
                if matches!(read.await, Ok(Ok(0) | Err(_))) {
                    return;
                }
            }
        };
        let ended = tokio::time::timeout(PATIENCE, flood).await;
        assert!(ended.is_ok(), "{name}: goes on after {sent} bytes");
        // What the kernels hold on the way comes on top of what the server takes.
        assert!(sent < 8 << 20, "{name}: {sent} bytes");
    }
    let metrics = server.metrics().await;
    assert!(metrics["strangers_talkative"] > 0, "{metrics:?}");
    assert!(metrics["bad_stream"] >= 6, "{metrics:?}");
}

/// Whether the server has not closed it.
fn stands(stream: &TcpStream) -> bool {
    let mut byte = [0];
    matches!(stream.try_read(&mut byte), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

/// Holds what connections it can from many addresses, in every stage, while nodes go on.
async fn flood(files: Option<u32>, attempts: usize, places: u64) {
    let (_, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    // Two of these may run at a time.
    let attempts = attempts.min(usize::try_from(hard / 3).unwrap_or(attempts));
    let server = Server::start(files).await;
    let mut known = join(&server, [127, 0, 0, 1], 1).await;
    let before = server.rss();
    let mut held = Vec::new();
    let mut noisy = Vec::new();
    for n in 0..attempts {
        let from = [127, 0, 9, u8::try_from(1 + n % 40).unwrap()];
        // Every tenth goes all the way in and logs out a node that is nowhere.
        if n % 10 == 0 {
            let Some(mut sender) = server.client(from, 9).await else {
                continue;
            };
            let mut request = registration(9);
            request["Expiry"] = json!(LOG_OUT);
            register(&mut sender, &request).await;
            noisy.push(sender);
        } else if let Some(mut stream) = server.connect(from).await {
            if n % 2 == 0 {
                let _ = stream.write_all(b"GET /key?v=1 HTTP/1.1\r\nHost: ").await;
            }
            held.push(stream);
        }
    }
    let metrics = server.metrics().await;
    let strangers = metrics["gauge_strangers"] + metrics["gauge_local_strangers"];
    assert!(strangers <= places, "{metrics:?}");
    assert_eq!(metrics["gauge_known"], 1, "{metrics:?}");
    assert!(metrics["displaced"] > 0, "{metrics:?}");
    assert_eq!(metrics["no_descriptor"], 0, "{metrics:?}");
    let standing = held.iter().filter(|stream| stands(stream)).count();
    assert!(standing as u64 <= places, "{standing}");
    let grown = server.rss().saturating_sub(before);
    assert!(grown < 64 << 10, "{grown} kB more than before");
    // Who is known is served as before, on the connection it has and on a new one.
    report(&mut known, 1).await;
    let mut again = server.client([127, 0, 0, 1], 1).await.unwrap();
    report(&mut again, 1).await;
    // Whoever has a key joins.
    join(&server, [127, 0, 0, 1], 2).await;
    assert_eq!(server.metrics().await["registrations"], 2);
}

#[tokio::test]
async fn thousands_of_connections_hold_few_places_and_nodes_go_on() {
    flood(None, 4000, 256).await;
}

#[tokio::test]
async fn a_server_with_few_descriptors_has_some_left_for_its_nodes() {
    flood(Some(256), 1000, 48).await;
}

#[tokio::test]
async fn a_node_that_does_not_read_its_maps_has_few_of_them_made() {
    let server = Server::start(None).await;
    let mut other = join(&server, [127, 0, 0, 1], 1).await;
    drop(join(&server, [127, 0, 0, 1], 2).await);
    let noise = server.noise([127, 0, 0, 1], 2).await.unwrap();
    let mut http = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    // A window of one byte: it takes nothing, and its connection stands.
    http.initial_stream_window_size(1);
    let (mut evil, connection) = http.handshake(TokioIo::new(noise)).await.unwrap();
    tokio::spawn(connection);
    let request = json!({"Version": 130, "NodeKey": node_key(2)});
    let body = Bytes::from(serde_json::to_vec(&request).unwrap());
    let mut ask = || {
        let request = Request::post("https://x/machine/map").body(Full::new(body.clone()));
        evil.send_request(request.unwrap())
    };
    let mut unread = Vec::new();
    // What was asked before the two have heard each other's settings comes on top.
    let waits = loop {
        let mut answer = Box::pin(ask());
        match tokio::time::timeout(Duration::from_secs(2), &mut answer).await {
            Ok(answer) => unread.push(answer.unwrap()),
            Err(_) => break answer,
        }
        assert!(unread.len() < 12, "maps that nobody reads");
    };
    report(&mut other, 1).await;
    // Who gives up what it does not read goes on.
    drop(unread);
    let answer = tokio::time::timeout(PATIENCE, waits).await.unwrap();
    assert_eq!(answer.unwrap().status(), StatusCode::OK);
}
