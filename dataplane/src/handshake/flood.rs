//! The thread in virtual time, beside floods: sockets with buffers that fill, a budget that what is done
//! is charged to at the prices of the real thing, and peers with WireGuard's timers.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use rand::{Rng, RngExt, SeedableRng};
use zeroize::Zeroizing;

use super::*;
use crate::noise::{
    CookieStore, INITIATION_LEN, RESPONSE_LEN, Remote, Tai64n, initiation, put_mac1,
};
use crate::peer::Arrived;
use crate::types::PeerConfig;

/// Messages that fit into the sockets' buffers, by door: 768 bytes of memory each.
const ROOM: [usize; 4] = [680, 680, 680, 2700];
/// What things cost the thread: to read and judge a message, a Diffie-Hellman computation, a reply.
const PRICE: Duration = Duration::from_nanos(900);
const PRICE_DH: Duration = Duration::from_micros(60);
const PRICE_REPLY: Duration = Duration::from_micros(6);
/// Every message waits in one of these.
type Waiting = (SocketAddr, Rc<[u8]>);

/// What a flood consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A right MAC1.
    Strangers,
    /// A right MAC1 and a MAC2 that is made up.
    Proven,
    Noise,
    /// Responses with a right MAC1, and cookie replies, to indexes that are guessed.
    Answers,
    Everything,
}

/// Where it comes from.
#[derive(Clone, Copy, Debug)]
enum From {
    Addresses(u32),
    /// A peer's address, made up.
    Peer(u8),
}

/// A peer, at an address of its own.
struct Far {
    n: u8,
    at: SocketAddr,
    keys: LocalKeys,
    cookies: CookieStore,
    began: Option<Instant>,
    /// When it sends its next initiation.
    next: Option<Instant>,
    came_through: Option<Instant>,
}

struct Lab {
    epoch: Instant,
    now: Instant,
    rng: StdRng,
    hub: Hub,
    worker: Worker,
    budget: Budget,
    doors: [VecDeque<Waiting>; 4],
    known: std::collections::BTreeSet<std::net::IpAddr>,
    peers: Vec<Far>,
    messages: Vec<Rc<[u8]>>,
    rate: u32,
    from: From,
    sent: u32,
    /// Answers that came through.
    answered: usize,
}

fn at(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 51_820))
}

impl Lab {
    /// A node with peers 2 to 20, of which nobody was heard, and a flood that has gone on for a second.
    fn new(kind: Kind, rate: u32, from: From) -> Lab {
        let seed = u64::from(rate) + kind as u64;
        println!("{kind:?}, {rate}/s from {from:?}, seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let epoch = now();
        let settings = Settings {
            private_key: Some(Zeroizing::new([1; 32])),
            mtu: 1420,
            ..Settings::default()
        };
        let peers: Vec<Far> = (2..=20).map(Far::new).collect();
        let configs = peers
            .iter()
            .map(|peer| PeerConfig::new(PeerId(peer.n.into()), *peer.keys.public()));
        let mut worker = Worker::new(epoch, &settings, StdRng::from_rng(&mut rng));
        let table = PeerTable::default().changed(configs.collect(), &[], None, 1);
        worker.set_peers(Arc::new(table));
        Lab {
            epoch,
            now: epoch,
            hub: Hub::new(epoch, 1).unwrap(),
            worker,
            budget: Budget::new(epoch),
            doors: Default::default(),
            known: Default::default(),
            peers,
            messages: (0..512).map(|i| made(kind, i, &mut rng)).collect(),
            rate,
            from,
            sent: 0,
            answered: 0,
            rng,
        }
    }

    /// The peer was heard from its address just now, and shook hands so long ago.
    fn heard(&mut self, n: u8, keys_are: Duration) {
        let entry = self.worker.table.get(PeerId(u32::from(n))).unwrap();
        let activity = &entry.shared.activity;
        entry.shared.set_heard_from(at(n));
        activity.received(self.epoch, self.now, 100, Arrived::Direct);
        activity.handshaken(self.epoch, self.now - keys_are);
    }

    fn begins(&mut self, n: u8, after: Duration) {
        let peer = self.peers.iter_mut().find(|peer| peer.n == n).unwrap();
        peer.began = Some(self.now + after);
        peer.next = peer.began;
    }

    fn took(&self, n: u8) -> Option<Duration> {
        let peer = self.peers.iter().find(|peer| peer.n == n)?;
        Some(peer.came_through? - peer.began?)
    }

    fn run(&mut self, span: Duration) {
        let end = self.now + span;
        while self.now < end {
            self.now += PAUSE;
            self.budget.charge(self.now, Duration::ZERO);
            self.flood_for(PAUSE);
            self.look();
        }
    }

    fn flood_for(&mut self, span: Duration) {
        let micros = usize::try_from(span.as_micros()).unwrap();
        let count = self.rate as usize * micros / 1_000_000;
        let due: Vec<usize> = (0..self.peers.len())
            .filter(|i| self.peers[*i].next.is_some_and(|next| next <= self.now))
            .collect();
        let moments: Vec<usize> = due
            .iter()
            .map(|_| self.rng.random_range(0..=count))
            .collect();
        for place in 0..=count {
            for (i, _) in due.iter().zip(&moments).filter(|(_, at)| **at == place) {
                let message = self.peers[*i].initiate(self.now, &mut self.rng);
                self.arrive(self.peers[*i].at, message);
            }
            if place < count {
                self.sent = self.sent.wrapping_add(1);
                let from = match self.from {
                    From::Addresses(count) => {
                        let host = self.sent.wrapping_mul(40_503) % count;
                        SocketAddr::from(((0xc612_0000 + host).to_be_bytes(), 4000))
                    }
                    From::Peer(n) => at(n),
                };
                let message = Rc::clone(&self.messages[self.sent as usize % self.messages.len()]);
                self.arrive(from, message);
            }
        }
    }

    /// What `udp/steer.rs` does.
    fn arrive(&mut self, from: SocketAddr, message: Rc<[u8]>) {
        let door = if self.known.contains(&from.ip()) {
            0
        } else if message[0] != 1 {
            1
        } else if message[132..] != [0; 16] {
            2
        } else {
            3
        };
        if self.doors[door].len() < ROOM[door] {
            self.doors[door].push_back((from, message));
        }
    }

    fn look(&mut self) {
        let mut taken = 0;
        while !self.budget.spent() {
            let before = taken;
            for (door, bursts) in BURSTS.into_iter().enumerate() {
                for _ in 0..bursts * BURST_MAX {
                    let Some((from, message)) = self.doors[door].pop_front() else {
                        break;
                    };
                    taken += 1;
                    let mut price = PRICE;
                    if message[0] == 1 && !self.worker.gate.under_load(self.now) {
                        price += PRICE_DH;
                    }
                    self.worker
                        .handle(self.now, &self.hub, from, None, &message);
                    while let Some(passed) = self.hub.inboxes[0].handshakes.pop() {
                        price += PRICE_DH;
                        self.pass(&passed);
                    }
                    self.budget.charge(self.now, price);
                }
            }
            if taken == before {
                break;
            }
        }
        self.worker.draw(self.now);
        let replies = std::mem::take(&mut self.worker.replies);
        let used = PRICE_REPLY * u32::try_from(replies.len()).unwrap();
        self.budget.charge(self.now, used);
        for (leave, reply) in replies {
            if let Some(peer) = self.peers.iter_mut().find(|peer| peer.at == leave.to) {
                peer.cookie(self.now, &reply);
            }
        }
        let table = Arc::clone(&self.worker.table);
        if let Some(known) = self.worker.known.refresh(self.now, self.epoch, &table) {
            self.known = known.clone();
        }
    }

    fn pass(&mut self, passed: &HandshakeMessage) {
        let id = passed.peer;
        self.answered += usize::from(id.is_none());
        let peer = self
            .peers
            .iter_mut()
            .find(|peer| id == Some(PeerId(u32::from(peer.n))));
        if let Some(peer) = peer {
            peer.came_through = Some(self.now);
            peer.next = None;
        }
    }
}

impl Far {
    fn new(n: u8) -> Far {
        Far {
            n,
            at: at(n),
            keys: LocalKeys::new(&[n; 32]),
            cookies: CookieStore::default(),
            began: None,
            next: None,
            came_through: None,
        }
    }

    fn us(&self) -> Remote {
        Remote::new(&self.keys, LocalKeys::new(&[1; 32]).public(), None)
    }

    fn initiate(&mut self, now: Instant, rng: &mut StdRng) -> Rc<[u8]> {
        let again =
            Duration::from_secs(5) + rng.random_range(Duration::ZERO..=Duration::from_millis(333));
        self.next = Some(now + again);
        let mut out = [0; INITIATION_LEN];
        let stamp = Tai64n::next(Duration::from_secs(1), None);
        let cookie = self.cookies.cookie(now).cloned();
        let remote = self.us();
        let made = initiation(
            &self.keys,
            &remote,
            5,
            stamp,
            cookie.as_ref(),
            rng,
            &mut out,
        );
        self.cookies.sent(made.unwrap().mac1());
        Rc::from(&out[..])
    }

    fn cookie(&mut self, now: Instant, reply: &[u8]) {
        let remote = self.us();
        // Most answer what the flood sent in the peer's name.
        let _other = self.cookies.receive(now, &remote, reply);
    }
}

fn made(kind: Kind, i: usize, rng: &mut StdRng) -> Rc<[u8]> {
    let kind = match (kind, i % 4) {
        (Kind::Everything, 0) => Kind::Strangers,
        (Kind::Everything, 1) => Kind::Proven,
        (Kind::Everything, 2) => Kind::Noise,
        (Kind::Everything, _) => Kind::Answers,
        (kind, _) => kind,
    };
    let mut stranger = Far::new(200);
    stranger.keys = LocalKeys::new(&rng.random());
    let mut message = if kind == Kind::Answers {
        vec![2; if i % 8 < 4 { RESPONSE_LEN } else { COOKIE_LEN }]
    } else {
        stranger.initiate(now(), rng).to_vec()
    };
    match kind {
        Kind::Strangers => {}
        Kind::Proven => rng.fill_bytes(&mut message[132..]),
        Kind::Noise => rng.fill_bytes(&mut message[4..]),
        Kind::Answers => {
            rng.fill_bytes(&mut message[4..]);
            let kind = if message.len() == COOKIE_LEN { 3 } else { 2 };
            message[..4].copy_from_slice(&[kind, 0, 0, 0]);
            (message[5], message[9]) = (0, 0);
            if message.len() == RESPONSE_LEN {
                put_mac1(&stranger.us(), &mut message);
            }
        }
        Kind::Everything => unreachable!("one of the others"),
    }
    Rc::from(message)
}

const SECOND: Duration = Duration::from_secs(1);

/// As long ago as an hour of rekeys goes on with, and too fresh to be replaced.
const OLD: Duration = Duration::from_secs(125);

#[test]
fn a_new_peer_comes_through_within_six_seconds() {
    for (kind, rate, sources) in [
        (Kind::Strangers, 45_000, 65_536),
        (Kind::Everything, 60_000, 65_536),
        (Kind::Strangers, 120_000, 1),
        (Kind::Strangers, 60_000, 1 << 24),
    ] {
        let mut lab = Lab::new(kind, rate, From::Addresses(sources));
        // With so many addresses, until the cookies that were saved up are gone.
        lab.run(if sources > 65_536 {
            SECOND * 2
        } else {
            SECOND / 10
        });
        for n in 2..10 {
            lab.begins(n, SECOND / 10 * u32::from(n));
        }
        lab.run(SECOND * 13 / 2);
        let took: Vec<_> = (2..10).map(|n| lab.took(n)).collect();
        let in_time = |took: &&Option<_>| took.is_some_and(|took| took < 6 * SECOND);
        assert_eq!(took.iter().filter(in_time).count(), 8, "{took:?}");
    }
}

#[test]
fn a_peer_heard_lately_comes_through_at_once_at_any_rate() {
    for (kind, from) in [
        (Kind::Strangers, From::Addresses(65_536)),
        (Kind::Proven, From::Peer(3)),
        (Kind::Everything, From::Peer(3)),
    ] {
        let mut lab = Lab::new(kind, 400_000, from);
        lab.now += 300 * SECOND;
        for n in 2..10 {
            lab.heard(n, OLD);
        }
        // Long enough for a list that knows what is made up.
        lab.run(SECOND * 11 / 10);
        let others = || (2..10).filter(|n| *n != 3);
        for n in others() {
            lab.begins(n, SECOND / 100 * u32::from(n));
        }
        lab.run(SECOND / 5);
        for n in others() {
            let took = lab.took(n);
            assert!(took.is_some_and(|took| took < SECOND / 20), "{n}: {took:?}");
        }
    }
}

#[test]
fn to_a_peer_in_whose_name_a_flood_comes_we_go_ourselves() {
    for (age, asks) in [(OLD, 1), (SECOND * 60, 0)] {
        let mut lab = Lab::new(Kind::Strangers, 60_000, From::Peer(3));
        lab.now += 300 * SECOND;
        lab.heard(3, age);
        lab.run(SECOND * 3);
        let asked: Vec<_> = std::iter::from_fn(|| lab.hub.inboxes[0].asks.pop()).collect();
        assert_eq!(asked, vec![PeerId(3); asks]);
    }
}

#[test]
fn the_response_we_await_comes_through_beside_a_flood_of_guesses() {
    // From an address nobody was heard from, and from one at any rate.
    for (rate, heard) in [(100_000, false), (400_000, true)] {
        let mut lab = Lab::new(Kind::Answers, rate, From::Addresses(65_536));
        if heard {
            lab.now += 300 * SECOND;
            lab.heard(7, OLD);
        }
        lab.run(SECOND / 2);
        let awaited = &lab.hub.inboxes[0].awaited;
        awaited.insert(0x1234_0056);
        let us = Far::new(7).us();
        let mut response = [3; RESPONSE_LEN];
        response[..4].copy_from_slice(&[2, 0, 0, 0]);
        response[8..12].copy_from_slice(&0x1234_0056u32.to_le_bytes());
        put_mac1(&us, &mut response);
        assert_eq!(lab.answered, 0, "nothing that was guessed");
        lab.arrive(at(7), Rc::from(&response[..]));
        lab.run(SECOND / 20);
        assert_eq!(lab.answered, 1);
    }
}
