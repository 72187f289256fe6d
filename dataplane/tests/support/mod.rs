//! Two namespaces joined by a veth, a data plane in each, and plain sockets to use them.
//!
//! ```text
//!  A: 192.0.2.1, 2001:db8::1  ---- v0 ==veth== v0 ----  B: 192.0.2.2, 2001:db8::2
//!     inner 10.9.0.1, fd00:9::1                            inner 10.9.0.2, fd00:9::2
//! ```
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "test support: each file uses a part, and panics are failures"
)]
#![expect(
    clippy::disallowed_methods,
    reason = "tests of drivers sleep and read the clock"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ringtail_dataplane::{
    Config, Dataplane, DriverChoice, Engine, Event, NetworkChange, Offloads, PEERS_MAX,
    PathDecision, PeerConfig, PeerId, Prefix, RegionId, Rules, StartError,
};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

/// The other end, in both data planes.
pub(crate) const PEER: PeerId = PeerId(5);

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// Ends the test that begins with it where no [`Lab`] can be made.
macro_rules! lab_or_skip {
    () => {
        if !$crate::support::lab_can_be_made(std::any::type_name_of_val(&|| ())) {
            return;
        }
    };
}
pub(crate) use lab_or_skip;

/// False where namespaces cannot be made, aloud; that is a failure under `RINGTAIL_NO_SKIP=1`. `test` is
/// the name of something in it.
pub(crate) fn lab_can_be_made(test: &str) -> bool {
    let test = test.trim_end_matches("::{{closure}}");
    // SAFETY: no arguments, no memory.
    let root = unsafe { libc::geteuid() } == 0;
    let can = root && std::path::Path::new("/dev/net/tun").exists();
    if !can {
        assert!(
            std::env::var("RINGTAIL_NO_SKIP").as_deref() != Ok("1"),
            "{test} needs root and /dev/net/tun"
        );
        eprintln!("{test} skipped: it needs root and /dev/net/tun");
    }
    can
}

pub(crate) fn run(command: &str) {
    let mut words = command.split_whitespace();
    let status = Command::new(words.next().unwrap())
        .args(words)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{command}");
}

/// Longer than it takes to repeat an initiation that got no answer: 5 s, and jitter.
const SOON: Duration = Duration::from_secs(20);

/// Waits until something is so. Counters are a few milliseconds behind, and a busy machine may
/// stand still for longer.
#[track_caller]
pub(crate) fn soon(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Ends the traffic of a test, also of one that fails.
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    A,
    B,
}

impl End {
    pub(crate) fn other(self) -> End {
        match self {
            End::A => End::B,
            End::B => End::A,
        }
    }
    fn number(self) -> u8 {
        match self {
            End::A => 1,
            End::B => 2,
        }
    }
    pub(crate) fn outer4(self) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, self.number()).into()
    }
    pub(crate) fn outer6(self) -> IpAddr {
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, self.number().into()).into()
    }
    pub(crate) fn inner4(self) -> IpAddr {
        Ipv4Addr::new(10, 9, 0, self.number()).into()
    }
    pub(crate) fn inner6(self) -> IpAddr {
        Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, self.number().into()).into()
    }
    /// A key that makes the owner shard differ between runs would hide failures: it is fixed.
    pub(crate) fn key(self) -> [u8; 32] {
        [self.number(); 32]
    }
}

/// The two namespaces; gone when dropped.
pub(crate) struct Lab {
    prefix: String,
}

impl Lab {
    pub(crate) fn new() -> Lab {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let lab = Lab {
            prefix: format!("rtt{}x{n}", std::process::id()),
        };
        let (a, b) = (lab.name(End::A), lab.name(End::B));
        run(&format!("ip netns add {a}"));
        run(&format!("ip netns add {b}"));
        run(&format!(
            "ip -n {a} link add v0 type veth peer name v0 netns {b}"
        ));
        for end in [End::A, End::B] {
            let name = lab.name(end);
            run(&format!("ip -n {name} link set lo up"));
            run(&format!("ip -n {name} link set v0 up"));
            run(&format!("ip -n {name} addr add {}/24 dev v0", end.outer4()));
            lab.add6(end, "v0", end.outer6());
        }
        lab
    }

    pub(crate) fn name(&self, end: End) -> String {
        format!("{}{end:?}", self.prefix)
    }

    /// Gives an interface an IPv6 address. The kernel has it before it takes packets for it, which it
    /// sees to later.
    fn add6(&self, end: End, interface: &str, address: IpAddr) {
        let name = self.name(end);
        run(&format!(
            "ip -n {name} addr add {address}/64 dev {interface} nodad"
        ));
        let command = format!("-n {name} -6 route show table local");
        soon("the address is there", || {
            let output = Command::new("ip").args(command.split_whitespace()).output();
            let local = String::from_utf8(output.unwrap().stdout).unwrap();
            local.contains(&format!("local {address} dev {interface} "))
        });
    }

    /// Runs `body` on a thread inside the end's namespace.
    pub(crate) fn inside<T: Send>(&self, end: End, body: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.name(end));
        thread::scope(|scope| {
            scope
                .spawn(move || {
                    let namespace = File::open(path).unwrap();
                    // SAFETY: no memory is passed; only this thread changes its namespace.
                    let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
                    assert_eq!(result, 0, "setns");
                    body()
                })
                .join()
                .unwrap()
        })
    }

    /// Drops everything between the ends silently: each has a wrong neighbour.
    pub(crate) fn cut(&self) {
        self.neighbours("replace", "lladdr 02:00:00:00:00:99 nud permanent");
    }

    pub(crate) fn mend(&self) {
        self.neighbours("del", "");
    }

    fn neighbours(&self, act: &str, what: &str) {
        for end in [End::A, End::B] {
            let name = self.name(end);
            for addr in [end.other().outer4(), end.other().outer6()] {
                run(&format!("ip -n {name} neigh {act} {addr} dev v0 {what}"));
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for end in [End::A, End::B] {
            let name = self.name(end);
            let _status = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

/// A data plane `rt0` of two shards, at any port.
pub(crate) fn config(key: [u8; 32]) -> Config {
    Config {
        tun_name: "rt0".to_owned(),
        mtu: 1420,
        shards: 2,
        pin: false,
        driver: DriverChoice::Auto,
        offloads: Offloads::default(),
        listen_port: 0,
        fwmark: 0,
        private_key: Some(Zeroizing::new(key)),
        roam: false,
        engine: Engine::Ringtail,
    }
}

/// A data plane `rt1` of its own, in the namespace of the thread that calls.
pub(crate) fn start_another(driver: DriverChoice, port: u16) -> Result<Dataplane, StartError> {
    Dataplane::start(Config {
        tun_name: "rt1".to_owned(),
        driver,
        listen_port: port,
        ..config([9; 32])
    })
}

/// How the data planes are to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) driver: DriverChoice,
    pub(crate) shards: usize,
    pub(crate) pin: bool,
    pub(crate) offloads: Offloads,
    pub(crate) mtu: u16,
    pub(crate) fwmark: u32,
    /// Device mode.
    pub(crate) roam: bool,
    /// Of A and of B.
    pub(crate) engines: [Engine; 2],
    /// Nobody tells B who may reach it.
    pub(crate) b_untold: bool,
    /// Of all paths. A machine that stands still for so long has other shards stop sealing, which a test
    /// that sees who seals does not want.
    pub(crate) silence_limit: Duration,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            driver: DriverChoice::Auto,
            shards: 1,
            pin: false,
            offloads: Offloads::default(),
            mtu: 1420,
            fwmark: 0,
            roam: false,
            engines: [Engine::Ringtail; 2],
            b_untold: false,
            silence_limit: Duration::from_secs(1),
        }
    }
}

impl Setup {
    pub(crate) fn with_shards(shards: usize) -> Setup {
        Setup {
            shards,
            ..Setup::default()
        }
    }
}

/// Two data planes in a lab, and a relay between them: a thread that carries batches across.
pub(crate) struct Pair {
    pub(crate) a: Arc<Dataplane>,
    pub(crate) b: Arc<Dataplane>,
    pub(crate) lab: Lab,
    stop: Arc<AtomicBool>,
    relay: Option<thread::JoinHandle<()>>,
    /// Batches are carried only while this is set.
    pub(crate) relay_open: Arc<AtomicBool>,
    generation: AtomicU32,
    silence_limit: Duration,
    started: Instant,
}

impl Pair {
    pub(crate) fn new(setup: Setup) -> Pair {
        let lab = Lab::new();
        let start = |end: End| {
            let dataplane = lab.inside(end, || {
                Dataplane::start(Config {
                    mtu: setup.mtu,
                    shards: setup.shards,
                    pin: setup.pin,
                    driver: setup.driver,
                    offloads: setup.offloads,
                    fwmark: setup.fwmark,
                    roam: setup.roam,
                    engine: match end {
                        End::A => setup.engines[0],
                        End::B => setup.engines[1],
                    },
                    ..config(end.key())
                })
                .unwrap()
            });
            let name = lab.name(end);
            run(&format!("ip -n {name} link set rt0 mtu {} up", setup.mtu));
            run(&format!(
                "ip -n {name} addr add {}/24 dev rt0",
                end.inner4()
            ));
            lab.add6(end, "rt0", end.inner6());
            let untold = end == End::B && setup.b_untold;
            dataplane.change_network(NetworkChange {
                peers: vec![peer(end.other())],
                rules: (!untold).then_some((Rules::AllowAll, None)),
                ..NetworkChange::default()
            });
            Arc::new(dataplane)
        };
        let (a, b) = (start(End::A), start(End::B));
        let stop = Arc::new(AtomicBool::new(false));
        let relay_open = Arc::new(AtomicBool::new(true));
        let relay = carry(&a, &b, &stop, &relay_open);
        Pair {
            a,
            b,
            lab,
            stop,
            relay: Some(relay),
            relay_open,
            generation: AtomicU32::new(0),
            silence_limit: setup.silence_limit,
            started: Instant::now(),
        }
    }

    pub(crate) fn of(&self, end: End) -> &Dataplane {
        match end {
            End::A => &self.a,
            End::B => &self.b,
        }
    }

    /// A socket of an end's own, where nobody waits for longer than [`SOON`].
    pub(crate) fn bind(&self, end: End, ip: IpAddr) -> UdpSocket {
        let socket = self.lab.inside(end, || UdpSocket::bind((ip, 0)).unwrap());
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket
    }

    /// Sets the paths of both ends: over IPv4 or IPv6 or not at all, by relay or not, trusted for so
    /// long.
    pub(crate) fn paths(&self, outer: Option<fn(End) -> IpAddr>, relay: bool, trust: Duration) {
        let generation = u64::from(self.generation.fetch_add(1, Ordering::Relaxed)) + 1;
        for end in [End::A, End::B] {
            let port = self.of(end.other()).local_port();
            self.of(end).set_path(
                PEER,
                PathDecision {
                    generation,
                    udp: outer.map(|outer| SocketAddr::new(outer(end.other()), port)),
                    local: None,
                    derp: relay.then_some(RegionId(7)),
                    trust_until: Some(Instant::now() + trust),
                    silence_limit: self.silence_limit,
                    path_mtu: 1500,
                    relayed_alone: false,
                },
            );
        }
    }

    /// Direct in both directions over IPv4, trusted for an hour.
    pub(crate) fn direct(&self) {
        self.paths(Some(End::outer4), false, HOUR);
    }

    /// So many pings, all answered, the first of them perhaps by a repeated handshake. Each is a program of
    /// its own: one that sends several waits twice the longest round trip so far for the last, which on a
    /// busy machine is no time.
    pub(crate) fn ping(&self, from: End, to: IpAddr, count: u32) -> bool {
        let all = (0..count).all(|number| {
            if number > 0 {
                thread::sleep(Duration::from_millis(50));
            }
            self.answered(from, to, SOON)
        });
        if !all {
            self.report();
        }
        all
    }

    /// One ping that is expected to be lost, given little time.
    pub(crate) fn quiet_ping(&self, from: End, to: IpAddr) -> bool {
        self.answered(from, to, Duration::from_millis(500))
    }

    fn answered(&self, from: End, to: IpAddr, patience: Duration) -> bool {
        let name = self.lab.name(from);
        let patience = patience.as_secs_f64();
        let command = format!("netns exec {name} ping -q -c 1 -W {patience} {to}");
        let output = Command::new("ip")
            .args(command.split_whitespace())
            .output()
            .unwrap();
        output.status.success()
    }

    /// Sends `len` bytes by TCP from an end to the other's address and checks every one there.
    pub(crate) fn transfer(&self, from: End, to: IpAddr, len: usize) {
        self.transfer_from(from, to, len, |_, _| true);
    }

    /// The same between a pair of own and far address that is wanted.
    pub(crate) fn transfer_from(
        &self,
        from: End,
        to: IpAddr,
        len: usize,
        wanted: impl Fn(SocketAddr, SocketAddr) -> bool + Sync,
    ) {
        let listener = self
            .lab
            .inside(from.other(), || TcpListener::bind((to, 0)).unwrap());
        let to = listener.local_addr().unwrap();
        thread::scope(|scope| {
            let receiver = scope.spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                stream
                    .set_read_timeout(Some(Duration::from_secs(20)))
                    .unwrap();
                let mut pattern = Pattern::default();
                let mut bytes = vec![0; 1 << 16];
                let mut expected = vec![0; 1 << 16];
                let mut total = 0;
                loop {
                    let n = stream.read(&mut bytes).expect("data in time");
                    if n == 0 {
                        break;
                    }
                    pattern.fill(&mut expected[..n]);
                    assert!(
                        bytes[..n] == expected[..n],
                        "corrupt between {total} and {}",
                        total + n
                    );
                    total += n;
                }
                stream.write_all(&[1]).unwrap();
                total
            });
            self.lab.inside(from, || {
                let own = if to.is_ipv4() {
                    from.inner4()
                } else {
                    from.inner6()
                };
                let mut others = Vec::new();
                let socket = loop {
                    let socket = socket2::Socket::new(
                        socket2::Domain::for_address(to),
                        socket2::Type::STREAM,
                        None,
                    )
                    .unwrap();
                    socket.bind(&SocketAddr::new(own, 0).into()).unwrap();
                    let own = socket.local_addr().unwrap().as_socket().unwrap();
                    if wanted(own, to) {
                        break socket;
                    }
                    others.push(socket);
                };
                socket
                    .connect_timeout(&to.into(), Duration::from_secs(10))
                    .unwrap();
                let mut stream = TcpStream::from(socket);
                stream
                    .set_write_timeout(Some(Duration::from_secs(20)))
                    .unwrap();
                stream
                    .set_read_timeout(Some(Duration::from_secs(20)))
                    .unwrap();
                let mut pattern = Pattern::default();
                let mut bytes = vec![0; 1 << 16];
                let mut left = len;
                while left > 0 {
                    let n = left.min(bytes.len());
                    pattern.fill(&mut bytes[..n]);
                    stream.write_all(&bytes[..n]).expect("room in time");
                    left -= n;
                }
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                stream.read_exact(&mut [0]).expect("the receiver's word");
            });
            assert_eq!(receiver.join().unwrap(), len);
        });
    }

    /// Waits for an event of one end.
    pub(crate) fn wait_event(
        &self,
        end: End,
        limit: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Option<Event> {
        let deadline = Instant::now() + limit;
        loop {
            while let Some(event) = self.of(end).poll_event() {
                if wanted(&event) {
                    return Some(event);
                }
            }
            if Instant::now() > deadline {
                return None;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Prints counters, for a test that is about to fail.
    pub(crate) fn report(&self) {
        use ringtail_dataplane::stats::{DropReason, Meter};
        for end in [End::A, End::B] {
            let total = self.of(end).stats().total();
            let mut line = format!("{end:?} after {:?}:", self.started.elapsed());
            for &meter in Meter::ALL {
                if total.get(meter) > 0 {
                    line += &format!(" {}={}", meter.name(), total.get(meter));
                }
            }
            for &reason in DropReason::ALL {
                if total.drops(reason) > 0 {
                    line += &format!(" DROP {}={}", reason.name(), total.drops(reason));
                }
            }
            eprintln!("{line}");
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(relay) = self.relay.take() {
            assert!(
                relay.join().is_ok() || thread::panicking(),
                "the relay's thread"
            );
        }
    }
}

/// An end as the other one's peer.
pub(crate) fn peer(end: End) -> PeerConfig {
    let public = PublicKey::from(&StaticSecret::from(end.key()));
    PeerConfig {
        allowed_ips: [(end.inner4(), 32), (end.inner6(), 128)]
            .map(|(addr, bits)| Prefix { addr, bits })
            .into(),
        ..PeerConfig::new(PEER, *public.as_bytes())
    }
}

/// A peer with a key of its own, that nobody holds.
pub(crate) fn stranger(id: u32, allowed_ips: Vec<Prefix>) -> PeerConfig {
    let mut public_key = [0x5a; 32];
    public_key[..4].copy_from_slice(&id.to_le_bytes());
    PeerConfig {
        allowed_ips,
        ..PeerConfig::new(PeerId(id), public_key)
    }
}

/// From now on these are all peers; of equal prefixes the last one's counts.
pub(crate) fn set_peers(dataplane: &Dataplane, peers: Vec<PeerConfig>) {
    let all = 0..u32::try_from(PEERS_MAX).unwrap();
    dataplane.change_network(NetworkChange {
        gone: all.map(PeerId).collect(),
        peers,
        ..NetworkChange::default()
    });
}

/// From now on nobody may begin to speak to this one.
pub(crate) fn close(dataplane: &Dataplane) {
    dataplane.change_network(NetworkChange {
        rules: Some((Rules::List(Vec::new()), None)),
        ..NetworkChange::default()
    });
}

/// The process's memory, in bytes.
pub(crate) fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    let kilobytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes * 1024
}

fn carry(
    a: &Arc<Dataplane>,
    b: &Arc<Dataplane>,
    stop: &Arc<AtomicBool>,
    open: &Arc<AtomicBool>,
) -> thread::JoinHandle<()> {
    let (a, b, stop, open) = (
        Arc::clone(a),
        Arc::clone(b),
        Arc::clone(stop),
        Arc::clone(open),
    );
    thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            let mut idle = true;
            for (from, to) in [(&a, &b), (&b, &a)] {
                while let Some(out) = from.poll_relay() {
                    idle = false;
                    assert_eq!((out.peer, out.region), (PEER, RegionId(7)));
                    let sum: usize = out.datagrams.lens.iter().map(|len| usize::from(*len)).sum();
                    assert_eq!(sum, out.datagrams.bytes.len());
                    if open.load(Ordering::Relaxed) {
                        assert!(to.relay_in(PEER, RegionId(7), out.datagrams));
                    } else {
                        from.recycle(out.datagrams);
                    }
                }
            }
            if idle {
                thread::sleep(Duration::from_millis(1));
            }
        }
    })
}

/// Has every send of the socket leave as datagrams of `len` bytes, the last perhaps shorter.
pub(crate) fn send_in_trains_of(socket: &UdpSocket, len: libc::c_int) {
    // SAFETY: the value is 4 readable bytes for the length of the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const len).cast(),
            4,
        )
    };
    assert_eq!(result, 0);
}

/// Bytes that depend on their position: xorshift.
struct Pattern(u64);

impl Default for Pattern {
    fn default() -> Pattern {
        Pattern(0x9e37_79b9_7f4a_7c15)
    }
}

impl Pattern {
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *byte = self.0.to_le_bytes()[3];
        }
    }
}
