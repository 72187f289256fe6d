//! What clients that mean no good make the relay hold: the program's memory is measured from outside.
#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test ends by panicking, and has to wait"
)]

mod address;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ringtail::derp::cert;
use ringtail::derp::client::{Client, Event, Hello};
use ringtail::derp::frame::{FrameType, put, put_send_packet};
use ringtail::driver::tls::ClientTls;
use ringtail::driver::tls::roots;
use ringtail::driver::tls::verify::Verifiers;
use ringtail::key::{NodePrivate, NodePublic};
use ringtail::netmap::{DerpMap, DerpNode};
use socket2::{Domain, Socket, Type};

const MIB: u64 = 1 << 20;

/// How long each kind of client is at it; RINGTAIL_ATTACK_S says otherwise.
fn attack_time() -> Duration {
    let given = std::env::var("RINGTAIL_ATTACK_S").ok();
    Duration::from_secs(given.map_or(8, |text| text.parse().unwrap()))
}

fn key(n: u8) -> NodePrivate {
    NodePrivate::clamped([n; 32])
}

/// `ringtail derp`, ended when this is dropped.
struct Relay {
    child: Child,
    node: DerpNode,
    addr: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Relay {
    fn start(options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        static PORT: AtomicU16 = AtomicU16::new(10_000);
        let addr = address::of_this_process(PORT.fetch_add(1, Ordering::Relaxed));
        let mut child = Command::new(env!("CARGO_BIN_EXE_ringtail"))
            // A huge page counts for 2 MiB, whatever is held of it.
            .env("MIMALLOC_ALLOW_THP", "0")
            .args([
                "derp",
                "--hostname",
                "127.0.0.1",
                "--no-stun",
                "--threads",
                "2",
            ])
            .args(["--addr", &addr.to_string(), "--state-dir"])
            .arg(dir.path())
            .args(options)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut text = String::new();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap());
        while !text.ends_with("\n}\n") {
            assert!(lines.read_line(&mut text).unwrap() > 0, "it ended: {text}");
        }
        let map: DerpMap = serde_json::from_str(&text).unwrap();
        let region = map.regions.into_values().next().unwrap();
        Self {
            child,
            node: region.nodes.into_iter().next().unwrap(),
            addr,
            _dir: dir,
        }
    }

    /// Memory of its own that the process has, in bytes.
    fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("RssAnon:"))
            .unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib * 1024
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A client that does as the test says.
struct Link {
    stream: TcpStream,
    tls: ClientTls,
    client: Client,
}

impl Link {
    /// A connection from this address, with a receive buffer of this size, on which it has said who it
    /// is.
    fn connect(relay: &Relay, from: [u8; 4], buffer: usize, private: NodePrivate) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(buffer).unwrap();
        socket
            .bind(&SocketAddr::from((Ipv4Addr::from(from), 0)).into())
            .unwrap();
        socket.connect(&relay.addr.into()).unwrap();
        socket.set_tcp_nodelay(true).unwrap();
        let stream = TcpStream::from(socket);
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let (config, name) = Verifiers::new(roots::web())
            .client_config(&relay.node)
            .unwrap();
        let mut tls = ClientTls::client(config, name).unwrap();
        let mut bytes = [0; 16 << 10];
        loop {
            tls.handle_input(|_| ()).unwrap();
            let (out, len) = tls.take_out();
            (&stream).write_all(&out[..len]).unwrap();
            if tls.is_established() {
                break;
            }
            let len = (&stream).read(&mut bytes).unwrap();
            assert!(len > 0, "the relay closes");
            tls.inbox.extend_from_slice(&bytes[..len]);
        }
        let (chain, _) = tls.peer_chain();
        let key = cert::relay_key(chain.iter().map(AsRef::as_ref)).map(|(key, _)| key);
        let hello = Hello {
            host: "127.0.0.1",
            ideal_node: None,
            relay: key,
            home: true,
        };
        let client = Client::new(private, &hello, [7; 24], Instant::now());
        let mut link = Self {
            stream,
            tls,
            client,
        };
        assert!(link.send(&[]));
        link
    }

    /// False once the relay has closed.
    fn send(&mut self, frames: &[u8]) -> bool {
        let mut out = Vec::new();
        self.client.poll_transmit(&mut out);
        out.extend_from_slice(frames);
        self.tls.seal(&out).unwrap();
        self.flush()
    }

    fn flush(&mut self) -> bool {
        let (out, len) = self.tls.take_out();
        let sent = (&self.stream).write_all(&out[..len]).is_ok();
        self.tls.give_back(out);
        sent
    }

    /// What it sends itself, by its key's number, comes when it is known.
    fn meet_itself(&mut self, n: u8) {
        assert!(self.send(&packets(1, &key(n).public(), &[1; 1000])));
        self.wait_packets(1);
    }

    /// Reads until this many packets have come.
    fn wait_packets(&mut self, wanted: usize) {
        let mut got = 0;
        let mut bytes = [0; 16 << 10];
        while got < wanted {
            let len = self.stream.read(&mut bytes).unwrap();
            assert!(len > 0, "the relay closes");
            self.tls.inbox.extend_from_slice(&bytes[..len]);
            let client = &mut self.client;
            self.tls
                .handle_input(|plain| {
                    let mut sink = |event: Event<'_>| {
                        got += usize::from(format!("{event:?}").contains("Packet"));
                    };
                    client
                        .handle_input(Instant::now(), plain, &mut sink)
                        .unwrap();
                })
                .unwrap();
        }
    }
}

/// So many frames with a packet for this key.
fn packets(count: usize, to: &NodePublic, packet: &[u8]) -> Vec<u8> {
    let mut frames = Vec::new();
    for _ in 0..count {
        put_send_packet(&mut frames, to, packet);
    }
    frames
}

/// Two clients that mean well.
struct Pair {
    sender: Link,
    receiver: Link,
}

impl Pair {
    /// They have met often: what is there for good is there.
    fn new(relay: &Relay) -> Self {
        let mut receiver = Link::connect(relay, [127, 0, 0, 1], 64 << 10, key(2));
        receiver.meet_itself(2);
        let sender = Link::connect(relay, [127, 0, 0, 1], 64 << 10, key(1));
        let mut pair = Self { sender, receiver };
        for _ in 0..200 {
            pair.meet();
        }
        pair
    }

    /// The relay serves them.
    fn meet(&mut self) {
        let frame = packets(1, &key(2).public(), &[1; 1000]);
        assert!(self.sender.send(&frame));
        self.receiver.wait_packets(1);
    }
}

/// Ends the attack, also when the test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Looks at the relay's memory while `attack` runs, and at the pair: by how much it grew at most.
fn growth(relay: &Relay, pair: &mut Pair, attack: impl FnOnce(&AtomicBool) + Send) -> u64 {
    let before = relay.memory();
    let over = AtomicBool::new(false);
    let mut most = before;
    std::thread::scope(|scope| {
        let attacker = scope.spawn(|| attack(&over));
        let ending = End(&over);
        let end = Instant::now() + attack_time();
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
            most = most.max(relay.memory());
            pair.meet();
        }
        drop(ending);
        attacker.join().unwrap();
    });
    let grown = most - before;
    eprintln!(
        "it had {} KiB and grew by {} KiB",
        before / 1024,
        grown / 1024
    );
    grown
}

#[test]
fn a_client_that_pings_and_reads_slowly_does_not_make_it_grow() {
    let relay = Relay::start(&[]);
    let mut pair = Pair::new(&relay);
    let pings = AtomicU64::new(0);
    let grown = growth(&relay, &mut pair, |over| {
        let mut links: Vec<_> = (0..4)
            .map(|n| Link::connect(&relay, [127, 0, 1, n], 4096, key(10 + n)))
            .collect();
        std::thread::scope(|scope| {
            for link in &mut links {
                scope.spawn(|| {
                    let mut ping = Vec::new();
                    put(&mut ping, FrameType::PING, &[b"12345678"]);
                    link.stream.set_nonblocking(true).unwrap();
                    let mut bytes = [0; 128];
                    while !over.load(Ordering::Relaxed) {
                        // A record for each Ping, so that each may be a read for the relay.
                        for _ in 0..50 {
                            link.tls.seal(&ping).unwrap();
                        }
                        let (out, len) = link.tls.take_out();
                        let mut rest = &out[..len];
                        while !rest.is_empty() && !over.load(Ordering::Relaxed) {
                            match (&link.stream).write(&rest[..rest.len().min(35)]) {
                                Ok(len) => rest = &rest[len..],
                                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                                    std::thread::sleep(Duration::from_millis(1));
                                }
                                Err(_) => return,
                            }
                        }
                        link.tls.give_back(out);
                        pings.fetch_add(50, Ordering::Relaxed);
                        let _ = (&link.stream).read(&mut bytes);
                    }
                });
            }
        });
    });
    let pings = pings.into_inner();
    assert!(pings > 1000, "{pings}");
    assert!(grown < 12 * MIB, "{} KiB by {pings} Pings", grown / 1024);
}

#[test]
fn many_who_do_not_read_hold_no_more_than_what_there_is_for_all() {
    let relay = Relay::start(&["--memory-max", "8"]);
    let mut pair = Pair::new(&relay);
    let sent = AtomicU64::new(0);
    let grown = growth(&relay, &mut pair, |over| {
        let _readers: Vec<_> = (0..80)
            .map(|n| Link::connect(&relay, [127, 0, 1, n / 2], 4096, key(100 + n)))
            .collect();
        std::thread::scope(|scope| {
            for n in 0..2 {
                let (relay, sent) = (&relay, &sent);
                scope.spawn(move || {
                    let mut link = Link::connect(relay, [127, 0, 2, n], 4096, key(50 + n));
                    while !over.load(Ordering::Relaxed) {
                        for to in 0..80 {
                            let frames = packets(40, &key(100 + to).public(), &[9; 1400]);
                            if !link.send(&frames) {
                                return;
                            }
                            sent.fetch_add(frames.len() as u64, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
    });
    let sent = sent.into_inner();
    assert!(sent > 12 * MIB, "{} MiB sent", sent / MIB);
    // What there is for all, and what is not counted: eighty connections' own state, buffers of threads,
    // what the allocator keeps.
    assert!(grown < 56 * MIB, "{} MiB", grown / MIB);
}

#[test]
fn frames_and_hellos_that_do_not_end_are_held_for_all_within_bounds() {
    let relay = Relay::start(&["--memory-max", "4"]);
    let mut pair = Pair::new(&relay);
    let grown = growth(&relay, &mut pair, |over| {
        let mut links = Vec::new();
        for n in 0..200 {
            let mut link = Link::connect(&relay, [127, 0, 1, n], 4096, key(3 + n));
            let mut part = vec![4, 0, 1, 0, 0];
            part.resize(65_000, 0);
            link.send(&part);
            links.push(link);
            if over.load(Ordering::Relaxed) {
                break;
            }
        }
        while !over.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    assert!(grown < 16 * MIB, "{} MiB", grown / MIB);
}

#[test]
fn who_comes_while_others_send_without_a_pause_is_served_soon() {
    let relay = Relay::start(&[]);
    let over = AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    // To keys that nobody has: the least to send for the most to do.
    let mut frames = Vec::new();
    for n in 0..200 {
        let mut disco = b"TS\xf0\x9f\x92\xac".to_vec();
        disco.resize(100, 1);
        put_send_packet(&mut frames, &key(n).public(), &disco);
    }
    let (relay, over, sent, frames) = (&relay, &over, &sent, &frames);
    std::thread::scope(|scope| {
        let ending = End(over);
        for n in 0..4 {
            scope.spawn(move || {
                let mut link = Link::connect(relay, [127, 0, 2, n], 4096, key(200 + n));
                while !over.load(Ordering::Relaxed) && link.send(frames) {
                    sent.fetch_add(200, Ordering::Relaxed);
                }
            });
        }
        std::thread::sleep(Duration::from_secs(1));
        let mut slowest = Duration::ZERO;
        let begun = Instant::now();
        while begun.elapsed() < attack_time() {
            let at = Instant::now();
            let mut link = Link::connect(relay, [127, 0, 0, 1], 64 << 10, key(250));
            link.meet_itself(250);
            slowest = slowest.max(at.elapsed());
        }
        drop(ending);
        let sent = sent.load(Ordering::Relaxed);
        eprintln!("{sent} frames; the slowest was served after {slowest:?}");
        assert!(sent > 10_000, "{sent}");
        assert!(slowest < Duration::from_secs(4), "{slowest:?}");
    });
}
