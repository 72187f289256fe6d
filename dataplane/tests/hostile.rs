//! What strangers, broken networks and other people's peers may send: nothing crashes, everything
//! is counted by reason, and the tunnel next to it works on.
//!
//! The attacker is a peer made by hand from the public parts of the engine: it can shake hands and
//! seal whatever it likes, and so has real messages of every type to mutate.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests of drivers sleep and read the clock, and helpers of tests fail as tests do"
)]

mod support;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use ringtail_dataplane::aead::{Aead, Key, Seal};
use ringtail_dataplane::noise::{
    Gate, LocalKeys, Remote, Standing, Tai64n, Verdict, consume_initiation, consume_response,
    initiation, peek_initiation, response,
};
use ringtail_dataplane::packet::build::Builder;
use ringtail_dataplane::stats::{DropReason, Meter};
use ringtail_dataplane::{Dataplane, DriverChoice, Engine, PeerConfig, PeerId, Prefix};
use support::{End, PEER, Pair, Setup, lab_or_skip, peer, send_in_trains_of, set_peers};
use x25519_dalek::{PublicKey, StaticSecret};

/// The attacker, as a peer of B.
const HAND: PeerId = PeerId(9);
const HAND_KEY: [u8; 32] = [33; 32];
const HAND_INNER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 9);
/// Datagrams of each kind and type.
const COUNT: usize = 10_000;
/// Datagrams sent before it is waited until they are counted: fewer than any socket holds.
const CHUNK: usize = 250;

/// Keys of one session of the attacker.
struct Session {
    send: Key,
    /// The victim's index.
    receiver: u32,
}

struct Hand {
    local: LocalKeys,
    remote: Remote,
    socket: UdpSocket,
    to: SocketAddr,
    aead: Aead,
    stamp: Option<Tai64n>,
}

impl Hand {
    /// An attacker in A's namespace, known to B as [`HAND`].
    fn new(pair: &Pair) -> Hand {
        let public = PublicKey::from(&StaticSecret::from(HAND_KEY));
        let hand = PeerConfig {
            allowed_ips: vec![Prefix {
                addr: HAND_INNER.into(),
                bits: 32,
            }],
            ..PeerConfig::new(HAND, *public.as_bytes())
        };
        set_peers(&pair.b, vec![peer(End::A), hand]);
        let local = LocalKeys::new(&HAND_KEY);
        let victim = PublicKey::from(&StaticSecret::from(End::B.key()));
        let socket = pair.lab.inside(End::A, || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(15)))
                .unwrap();
            socket
        });
        Hand {
            remote: Remote::new(&local, victim.as_bytes(), None),
            local,
            socket,
            to: SocketAddr::new(End::B.outer4(), pair.b.local_port()),
            aead: Aead::detect(),
            stamp: None,
        }
    }

    fn initiation(&mut self) -> (ringtail_dataplane::noise::Initiated, [u8; 148]) {
        let wall = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let stamp = Tai64n::next(wall, self.stamp);
        self.stamp = Some(stamp);
        let mut message = [0; 148];
        let index = rand::random();
        let (local, remote) = (&self.local, &self.remote);
        let initiated = initiation(
            local,
            remote,
            index,
            stamp,
            None,
            &mut rand::rng(),
            &mut message,
        );
        (initiated.unwrap(), message)
    }

    fn receive(&self, kind: u8) -> Vec<u8> {
        let mut bytes = [0; 2000];
        loop {
            let len = self.socket.recv(&mut bytes).expect("an answer");
            if bytes[0] == kind {
                return bytes[..len].to_vec();
            }
        }
    }

    /// Shakes hands as initiator; returns the session and our initiation.
    fn shake(&mut self) -> (Session, Vec<u8>) {
        // The victim answers one initiation in 20 ms.
        thread::sleep(Duration::from_millis(50));
        let (initiated, message) = self.initiation();
        self.socket.send_to(&message, self.to).unwrap();
        let answer = self.receive(2);
        let keys = consume_response(&self.local, &self.remote, &initiated, &answer).unwrap();
        let session = Session {
            send: Key::new(&keys.send),
            receiver: keys.remote_index,
        };
        (session, message.to_vec())
    }

    /// Shakes hands as responder; returns our response.
    fn answer(&mut self, b: &Dataplane) -> Vec<u8> {
        b.set_endpoint(HAND, self.address());
        b.initiate(HAND);
        let message = self.receive(1);
        let peeked = peek_initiation(&self.local, &message).unwrap();
        let received = consume_initiation(&peeked, &self.remote).unwrap();
        let mut answer = [0; 92];
        let index = rand::random();
        let made = response(
            &self.remote,
            received,
            index,
            None,
            &mut rand::rng(),
            &mut answer,
        );
        made.unwrap();
        self.socket.send_to(&answer, self.to).unwrap();
        // It confirms with a keep-alive.
        self.receive(4);
        answer.to_vec()
    }

    /// A cookie reply to an initiation of the victim's, which thereby stays without answer.
    fn cookie(&mut self, b: &Dataplane) -> Vec<u8> {
        b.set_endpoint(HAND, self.address());
        b.initiate(HAND);
        let message = self.receive(1);
        let now = Instant::now();
        let (mut rng, mut reply) = (rand::rng(), [0; 64]);
        let mut gate = Gate::new(now, Some(LocalKeys::new(&HAND_KEY).into()), &mut rng);
        let from = self.to;
        let novelty = loop {
            let verdict = gate.handle(now, from, Standing::Stranger, &message, &mut rng);
            if let Verdict::Unproven(novelty) = verdict {
                break novelty;
            }
        };
        gate.challenge(now, from, novelty, &message, &mut rng, &mut reply)
            .unwrap();
        self.socket.send_to(&reply, self.to).unwrap();
        reply.to_vec()
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::new(End::A.outer4(), self.socket.local_addr().unwrap().port())
    }

    /// A data message with a UDP packet of `len` bytes in it.
    fn data(&self, session: &Session, counter: u64, len: usize) -> Vec<u8> {
        let builder = Builder::new(
            SocketAddr::from((HAND_INNER, 9)),
            SocketAddr::new(End::B.inner4(), 9),
        );
        let packet = builder.udp(&vec![7; len]);
        let mut message = vec![0; 16 + packet.len().next_multiple_of(16) + 16];
        message[16..16 + packet.len()].copy_from_slice(&packet);
        self.aead.seal(&mut [Seal {
            key: &session.send,
            receiver: session.receiver,
            counter,
            message: &mut message,
        }]);
        message
    }

    /// Sends datagrams of one length, but for the last, in one segmented send.
    fn send_train(&self, datagrams: &[Vec<u8>]) {
        let size = libc::c_int::try_from(datagrams[0].len()).unwrap();
        send_in_trains_of(&self.socket, size);
        self.socket.send_to(&datagrams.concat(), self.to).unwrap();
        send_in_trains_of(&self.socket, 0);
    }
}

/// Datagrams that came and went no further.
fn refused(dataplane: &Dataplane) -> u64 {
    let stats = dataplane.stats();
    DropReason::ALL
        .iter()
        // What the TUN gave us and what could not be sent is not of these.
        .filter(|reason| **reason >= DropReason::RelayInFull)
        .map(|reason| stats.drops(*reason))
        .sum()
}

fn delivered(dataplane: &Dataplane) -> u64 {
    dataplane.stats().total().get(Meter::TunPacketsOut)
}

fn reasons(dataplane: &Dataplane) -> String {
    let stats = dataplane.stats();
    let mut text = String::new();
    for reason in DropReason::ALL {
        if stats.drops(*reason) > 0 {
            text += &format!(" {}={}", reason.name(), stats.drops(*reason));
        }
    }
    text
}

#[track_caller]
fn soon(what: &str, dataplane: &Dataplane, count: impl Fn(&Dataplane) -> u64, want: u64) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while count(dataplane) < want {
        assert!(
            Instant::now() < deadline,
            "{what}: {} of {want};{}",
            count(dataplane),
            reasons(dataplane)
        );
        thread::sleep(Duration::from_millis(1));
    }
}

/// Sends [`COUNT`] datagrams and sees that each is counted as refused, and none passes.
fn assault(what: &str, b: &Dataplane, hand: &Hand, mut make: impl FnMut(usize) -> Vec<u8>) {
    let (before, passed) = (refused(b), delivered(b));
    for i in 0..COUNT {
        hand.socket.send_to(&make(i), hand.to).unwrap();
        if (i + 1) % CHUNK == 0 {
            soon(what, b, refused, before + i as u64 + 1);
        }
    }
    thread::sleep(Duration::from_millis(20));
    assert_eq!(refused(b) - before, COUNT as u64, "{what}:{}", reasons(b));
    assert_eq!(delivered(b), passed, "{what}: nothing came through");
}

/// A changed copy: bits, bytes, a shorter or a longer one.
fn mutate(rng: &mut StdRng, real: &[u8]) -> Vec<u8> {
    loop {
        let mut bytes = real.to_vec();
        match rng.random_range(0..5) {
            0 | 1 => {
                let at = rng.random_range(0..bytes.len());
                bytes[at] ^= 1 << rng.random_range(0..8);
            }
            2 => {
                for _ in 0..rng.random_range(1..8) {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] = rng.random();
                }
            }
            3 => bytes.truncate(rng.random_range(0..bytes.len())),
            _ => {
                let more = rng.random_range(1..200);
                bytes.resize(real.len() + more, rng.random());
            }
        }
        if bytes != real {
            return bytes;
        }
    }
}

fn lab(driver: DriverChoice) -> Pair {
    let pair = Pair::new(Setup {
        driver,
        roam: true,
        ..Setup::with_shards(2)
    });
    let to = SocketAddr::new(End::B.outer4(), pair.b.local_port());
    pair.a.set_endpoint(PEER, to);
    assert!(pair.ping(End::A, End::B.inner4(), 1));
    // Router solicitations and the like of a fresh interface have passed.
    thread::sleep(Duration::from_millis(300));
    pair
}

fn seed() -> StdRng {
    let seed = std::env::var("RINGTAIL_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(rand::random);
    eprintln!("RINGTAIL_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

fn random_datagrams(driver: DriverChoice) {
    let pair = lab(driver);
    let hand = Hand::new(&pair);
    let mut rng = seed();
    for (kind, usual) in [(0u8, 100), (1, 148), (2, 92), (3, 64), (4, 128), (200, 148)] {
        assault(&format!("random of type {kind}"), &pair.b, &hand, |i| {
            let len = if i % 2 == 0 {
                usual
            } else {
                rng.random_range(0..1500)
            };
            let mut bytes = vec![0; len];
            rng.fill_bytes(&mut bytes);
            if let Some(head) = bytes.first_chunk_mut::<4>() {
                *head = [kind, 0, 0, 0];
            }
            bytes
        });
    }
    assert!(pair.ping(End::A, End::B.inner4(), 3));
    pair.transfer(End::A, End::B.inner4(), 1 << 20);
    eprintln!("{}", reasons(&pair.b));
}

#[test]
fn random_datagrams_are_counted_with_io_uring() {
    lab_or_skip!();
    random_datagrams(DriverChoice::IoUring);
}

#[test]
fn random_datagrams_are_counted_with_epoll() {
    lab_or_skip!();
    random_datagrams(DriverChoice::Epoll);
}

#[test]
fn mutated_messages_of_every_type_are_counted() {
    lab_or_skip!();
    let pair = lab(DriverChoice::Auto);
    let mut hand = Hand::new(&pair);
    let mut rng = seed();
    let (session, first) = hand.shake();
    let data = hand.data(&session, 0, 200);
    let passed = delivered(&pair.b);
    hand.socket.send_to(&data, hand.to).unwrap();
    soon("the real one", &pair.b, delivered, passed + 1);
    assault("mutated data", &pair.b, &hand, |_| mutate(&mut rng, &data));
    assault("mutated initiations", &pair.b, &hand, |_| {
        mutate(&mut rng, &first)
    });
    let answer = hand.answer(&pair.b);
    assault("mutated responses", &pair.b, &hand, |_| {
        mutate(&mut rng, &answer)
    });
    // Sessions that are young are not made anew: this one is forgotten.
    let peers = vec![peer(End::A)];
    set_peers(&pair.b, peers);
    let mut hand = Hand::new(&pair);
    let cookie = hand.cookie(&pair.b);
    assault("mutated cookie replies", &pair.b, &hand, |_| {
        mutate(&mut rng, &cookie)
    });
    assert!(pair.ping(End::A, End::B.inner4(), 3));
    eprintln!("{}", reasons(&pair.b));
}

#[test]
fn replays_and_the_edges_of_the_window() {
    lab_or_skip!();
    let pair = lab(DriverChoice::Auto);
    let b = &pair.b;
    let mut hand = Hand::new(&pair);
    let (session, first) = hand.shake();
    let check = |counter: u64, passes: bool| {
        let (gone, through) = (refused(b), delivered(b));
        let message = hand.data(&session, counter, 50);
        hand.socket.send_to(&message, hand.to).unwrap();
        let what = format!("counter {counter}, {passes}");
        if passes {
            soon(&what, b, delivered, through + 1);
            assert_eq!(refused(b), gone, "{what}:{}", reasons(b));
        } else {
            soon(&what, b, refused, gone + 1);
            assert_eq!(delivered(b), through, "{what}");
        }
    };
    let reject_after = u64::MAX - (1 << 13);
    // boringtun's window is of 1024, and it knows no last counter.
    let ours = Engine::default() != Engine::Boringtun;
    for (counter, passes) in [
        (0, true),
        (0, false),
        (5, true),
        (1, true),
        (1, false),
        (5, false),
        (100_000, true),
        (100_000 - 8128, true),
        (100_000 - 8128, false),
        (100_000 - 8129, false),
        (6, false),
        (99_999, true),
        (99_999, false),
        (u64::MAX, false),
        (reject_after, false),
        (reject_after + 1, false),
        (100_001, true),
        (reject_after - 1, true),
        (reject_after - 1, false),
        (reject_after, false),
        (u64::MAX, false),
        (reject_after - 8129, true),
        (reject_after - 8130, false),
        (200_000, false),
    ] {
        if ours || counter < 10 {
            check(counter, passes);
        }
    }
    assert!(b.stats().drops(DropReason::Replayed) >= 3, "{}", reasons(b));

    // A whole recorded conversation, played again, later and from somewhere else.
    let other = pair
        .lab
        .inside(End::A, || UdpSocket::bind("0.0.0.0:0").unwrap());
    let (gone, through, at) = (refused(b), delivered(b), b.endpoint(HAND));
    other.send_to(&first, hand.to).unwrap();
    let recorded: &[u64] = if ours { &[0, 1, 5, 99_999] } else { &[0, 1, 5] };
    for &counter in recorded {
        let again = hand.data(&session, counter, 50);
        other.send_to(&again, hand.to).unwrap();
    }
    soon("recorded", b, refused, gone + 1 + recorded.len() as u64);
    assert_eq!((delivered(b), b.endpoint(HAND)), (through, at));
    let (session, _) = hand.shake();
    let through = delivered(b);
    let message = hand.data(&session, 0, 50);
    hand.socket.send_to(&message, hand.to).unwrap();
    soon("a new session", b, delivered, through + 1);
}

fn trains(driver: DriverChoice) {
    let pair = lab(driver);
    let b = &pair.b;
    let mut hand = Hand::new(&pair);
    let (session, _) = hand.shake();
    let other_shard = {
        let [_, shard, ..] = session.receiver.to_le_bytes();
        1 - shard
    };
    let mut counter = 0;
    let mut good = |hand: &Hand| {
        counter += 1;
        hand.data(&session, counter, 68)
    };
    let len = good(&hand).len();
    let foreign = |shard: u8| {
        let mut bytes = vec![9; len];
        bytes[..8].copy_from_slice(&[4, 0, 0, 0, 0x55, shard, 0x55, 0x55]);
        bytes
    };
    let initiation = {
        let mut bytes = vec![3; len];
        bytes[..4].copy_from_slice(&[1, 0, 0, 0]);
        bytes
    };
    let noise = vec![0xee; len];
    // Each train: what is in it, how many of it pass at most, and whether all those must. The
    // kernel steers a train by its first datagram.
    let mut trains = Vec::new();
    for _ in 0..50 {
        trains.push((vec![good(&hand), good(&hand), good(&hand)], 3));
        trains.push((vec![good(&hand), foreign(other_shard), good(&hand)], 2));
        trains.push((
            vec![good(&hand), initiation.clone(), noise.clone(), good(&hand)],
            2,
        ));
        // Led by somebody else's: ours cross to our shard once.
        trains.push((vec![foreign(other_shard), good(&hand), good(&hand)], 2));
        trains.push((vec![foreign(77), noise.clone(), foreign(other_shard)], 0));
        trains.push((vec![initiation.clone(), noise.clone()], 0));
        // The last one is cut short, in its head, its text and its tag.
        for cut in [1, 3, 7, 15, 31, 33, len - 1] {
            let mut short = good(&hand);
            short.truncate(cut);
            trains.push((vec![good(&hand), good(&hand), short], 2));
        }
    }
    let sent: u64 = trains.iter().map(|(train, _)| train.len() as u64).sum();
    let pass: u64 = trains.iter().map(|(_, pass)| *pass).sum();
    let (gone, through) = (refused(b), delivered(b));
    let taken = |b: &Dataplane| refused(b) + delivered(b);
    for (train, _) in &trains {
        let before = taken(b);
        hand.send_train(train);
        soon("a train", b, taken, before + train.len() as u64);
    }
    thread::sleep(Duration::from_millis(50));
    let (gone, through) = (refused(b) - gone, delivered(b) - through);
    assert_eq!((gone + through, through), (sent, pass), "{}", reasons(b));

    // As large as UDP can be, and nothing at all.
    let gone = refused(b);
    for kind in 0..=5 {
        for len in [0, 1, 4, 1500, 9000, 30_000, 65_507] {
            let mut bytes = vec![kind; len];
            if let Some(head) = bytes.first_chunk_mut::<4>() {
                *head = [kind, 0, 0, 0];
            }
            hand.socket.send_to(&bytes, hand.to).unwrap();
        }
    }
    soon("sizes", b, refused, gone + 6 * 7);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(refused(b), gone + 6 * 7, "{}", reasons(b));
    assert!(pair.ping(End::A, End::B.inner4(), 3));
    eprintln!("{}", reasons(b));
}

#[test]
fn trains_of_good_and_bad_are_taken_apart_with_io_uring() {
    lab_or_skip!();
    trains(DriverChoice::IoUring);
}

#[test]
fn trains_of_good_and_bad_are_taken_apart_with_epoll() {
    lab_or_skip!();
    trains(DriverChoice::Epoll);
}
