//! One manager against a scripted peer: what leaves when, to the millisecond.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use ringtail_dataplane::{Activity, PathDecision, PeerId, RegionId};

use super::shard::PEER;
use crate::disco::{self, Message, SharedKey, TxId};
use crate::key::{DiscoPrivate, NodePrivate, NodePublic};
use crate::path::{Config, Drop, Event, Heard, Manager, PeerSetup, Status, Via};
use crate::testing;

pub(super) const REGION: RegionId = RegionId(7);
/// Where the peer may be, and where nobody says it is.
pub(super) const C1: &str = "198.51.100.1:41641";
pub(super) const Z: &str = "198.51.100.9:777";

/// What the manager sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Out {
    Ping(SocketAddr),
    /// With its UDP payload in bytes; the don't-fragment bit was asked for.
    LargePing(SocketAddr, usize),
    /// The same without the bit.
    SplitPing(SocketAddr, usize),
    RelayPing,
    Pong(SocketAddr),
    RelayPong(SocketAddr),
    CallMeMaybe,
}

/// How an address behaves: the round trip, and which of its Pings it answers.
pub(super) type Answers = (Duration, Box<dyn Fn(usize, bool) -> bool>);

pub(super) struct Script {
    pub(super) start: Instant,
    pub(super) now: Instant,
    pub(super) paths: Manager,
    pub(super) setup: PeerSetup,
    ours: NodePublic,
    our_disco: DiscoPrivate,
    pub(super) their_disco: DiscoPrivate,
    secret: SharedKey,
    answers: BTreeMap<SocketAddr, Answers>,
    /// Small Pings seen per address.
    counts: BTreeMap<SocketAddr, usize>,
    /// Round trip by relay; without one its Pings stay unanswered.
    pub(super) relay_rtt: Option<Duration>,
    /// Pongs on their way; by relay those of the fake address.
    pongs: Vec<(Instant, SocketAddr, TxId)>,
    last_sent: Cell<Option<Instant>>,
    pub(super) out: Vec<(Duration, Out)>,
    pub(super) events: Vec<(Duration, Event)>,
    pub(super) decisions: Vec<(Duration, PathDecision)>,
    pub(super) tx_ids: u8,
    /// Datagrams of the peer made so far.
    sealed: Cell<u64>,
}

pub(super) fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(super) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Another node with the same DISCO key and endpoints.
pub(super) fn twin(script: &Script) -> PeerSetup {
    PeerSetup {
        id: PeerId(1),
        node_key: NodePrivate::clamped([8; 32]).public(),
        ..script.setup.clone()
    }
}

impl Script {
    /// A peer with these endpoints in the network map, none of which answers yet, and a home.
    pub(super) fn new(config: Config, endpoints: &[&str]) -> Self {
        let start = testing::start();
        let ours = NodePrivate::clamped([1; 32]).public();
        let our_disco = DiscoPrivate::clamped([2; 32]);
        let their_disco = DiscoPrivate::clamped([4; 32]);
        let setup = PeerSetup {
            id: PEER,
            node_key: NodePrivate::clamped([3; 32]).public(),
            disco_key: Some(their_disco.public()),
            home: Some(REGION),
            endpoints: endpoints.iter().map(|text| addr(text)).collect(),
        };
        let rng = StdRng::seed_from_u64(1);
        let mut paths = Manager::new(start, config, ours, our_disco.clone(), rng);
        paths.set_own_endpoints(start, vec![addr("203.0.113.99:41641")]);
        paths.set_peers(start, std::slice::from_ref(&setup), &[]);
        let secret = SharedKey::new(&their_disco, &our_disco.public()).unwrap();
        let mut script = Self {
            start,
            now: start,
            paths,
            setup,
            ours,
            our_disco,
            their_disco,
            secret,
            answers: BTreeMap::new(),
            counts: BTreeMap::new(),
            relay_rtt: None,
            pongs: Vec::new(),
            last_sent: Cell::new(None),
            out: Vec::new(),
            events: Vec::new(),
            decisions: Vec::new(),
            tx_ids: 0,
            sealed: Cell::new(0),
        };
        script.drain();
        script
    }

    /// From now on the address answers every Ping after `rtt`.
    pub(super) fn answer(&mut self, at: &str, rtt: Duration) {
        self.answer_some(at, rtt, |_, _| true);
    }

    /// The address answers those Pings for whose number (small ones count from 0) and size (`true`
    /// is large) `which` says so.
    pub(super) fn answer_some(
        &mut self,
        at: &str,
        rtt: Duration,
        which: impl Fn(usize, bool) -> bool + 'static,
    ) {
        self.counts.remove(&addr(at));
        self.answers.insert(addr(at), (rtt, Box::new(which)));
    }

    pub(super) fn silence(&mut self, at: &str) {
        self.answers.remove(&addr(at));
        self.pongs.retain(|(_, from, _)| *from != addr(at));
    }

    /// Endpoints are looked up, with the same result.
    pub(super) fn refresh(&mut self) {
        self.paths
            .set_own_endpoints(self.now, vec![addr("203.0.113.99:41641")]);
        self.drain();
    }

    /// The tunnel sends data now; the shard's events follow its rule.
    pub(super) fn data(&mut self) {
        let pause = self.last_sent.replace(Some(self.now));
        let trusted = self.decisions.last().is_some_and(|(_, decision)| {
            decision.udp.is_some() && decision.trust_until.is_some_and(|until| self.now <= until)
        });
        let activity = self.activity();
        if pause.is_none_or(|at| self.now - at >= ms(3000)) {
            let event = ringtail_dataplane::Event::Active(PEER);
            self.paths.handle_event(self.now, &event, &activity);
        }
        if !trusted {
            let event = ringtail_dataplane::Event::Kick(PEER);
            self.paths.handle_event(self.now, &event, &activity);
        }
        self.drain();
    }

    pub(super) fn activity(&self) -> Activity {
        Activity {
            last_sent: self.last_sent.get(),
            ..Activity::default()
        }
    }

    pub(super) fn event(&mut self, event: &ringtail_dataplane::Event) {
        let activity = self.activity();
        self.paths.handle_event(self.now, event, &activity);
        self.drain();
    }

    /// Runs to `until` after the start.
    pub(super) fn run_to(&mut self, until: Duration) {
        self.drain();
        let end = self.start + until;
        let mut at_once = 0;
        loop {
            self.pongs.sort_by_key(|(at, _, _)| *at);
            let pong = self.pongs.first().map(|(at, _, _)| *at);
            let timer = self.paths.poll_timeout();
            let next = [pong, timer].into_iter().flatten().min();
            let Some(next) = next.filter(|at| *at <= end) else {
                self.now = end;
                return;
            };
            at_once = if next > self.now { 0 } else { at_once + 1 };
            assert!(at_once < 1000, "time stands still");
            self.now = next.max(self.now);
            if pong == Some(next) {
                let (_, from, tx_id) = self.pongs.remove(0);
                let source = addr("203.0.113.99:41641");
                let pong = Message::Pong { tx_id, source };
                let _ = if from.ip() == disco::DERP_FAKE_IP {
                    self.receive_relayed(&pong)
                } else {
                    self.receive(from, &pong)
                };
            } else {
                let activity = self.activity();
                self.paths.handle_timeout(self.now, &|_| activity);
                self.drain();
            }
        }
    }

    /// Runs to `until`, with data every `interval`.
    pub(super) fn run_with_data(&mut self, until: Duration, interval: Duration) {
        let mut at = self.now - self.start;
        while at < until {
            self.data();
            at = (at + interval).min(until);
            self.run_to(at);
        }
    }

    pub(super) fn seal(&self, message: &Message) -> Vec<u8> {
        let n = self.sealed.get() + 1;
        self.sealed.set(n);
        let mut nonce = [9; disco::NONCE_LEN];
        nonce[..8].copy_from_slice(&n.to_be_bytes());
        self.secret.seal(&self.their_disco.public(), nonce, message)
    }

    /// A datagram arrives over UDP, and what follows from it is not looked at yet.
    pub(super) fn udp(&mut self, from: SocketAddr, bytes: &[u8]) -> Result<Heard, Drop> {
        self.paths.handle_datagram(self.now, from, bytes)
    }

    /// The same by relay.
    pub(super) fn relayed(&mut self, source: NodePublic, bytes: &[u8]) -> Result<(), Drop> {
        self.paths.handle_relayed(self.now, REGION, source, bytes)
    }

    /// A message of the peer arrives over UDP.
    pub(super) fn receive(&mut self, from: SocketAddr, message: &Message) -> Result<(), Drop> {
        let bytes = self.seal(message);
        let result = self.udp(from, &bytes);
        self.drain();
        result.map(|_| ())
    }

    /// A message of the peer arrives by relay.
    pub(super) fn receive_relayed(&mut self, message: &Message) -> Result<(), Drop> {
        let bytes = self.seal(message);
        let result = self.relayed(self.setup.node_key, &bytes);
        self.drain();
        result
    }

    pub(super) fn call(&mut self, endpoints: &[&str]) {
        let endpoints = endpoints.iter().map(|text| addr(text)).collect();
        self.receive_relayed(&Message::CallMeMaybe { endpoints })
            .unwrap();
    }

    /// A new Ping of the peer.
    pub(super) fn their_ping(&mut self) -> Message {
        self.tx_ids += 1;
        Message::Ping {
            tx_id: [self.tx_ids; 12],
            node_key: Some(self.setup.node_key),
            padding: 0,
        }
    }

    /// A new Ping of the peer arrives over UDP.
    pub(super) fn receive_ping(&mut self, from: &str) {
        let ping = self.their_ping();
        self.receive(addr(from), &ping).unwrap();
    }

    /// The network map has these peers.
    pub(super) fn set_peers(&mut self, peers: &[PeerSetup]) {
        self.paths.set_peers(self.now, peers, &[]);
    }

    pub(super) fn status(&self) -> Status {
        self.paths.status(self.now, PEER).unwrap()
    }

    pub(super) fn best(&self) -> Option<SocketAddr> {
        self.status().best.map(|best| best.addr)
    }

    /// What left in this time, in order.
    pub(super) fn sent(&self, from: u64, to: u64) -> Vec<Out> {
        let range = ms(from)..ms(to);
        let sent = self.out.iter().filter(|(at, _)| range.contains(at));
        sent.map(|(_, out)| out.clone()).collect()
    }

    /// How often this left in this time.
    pub(super) fn count(&self, from: u64, to: u64, wanted: &Out) -> usize {
        let sent = self.sent(from, to).into_iter();
        sent.filter(|out| out == wanted).count()
    }

    /// When this left, in milliseconds.
    pub(super) fn times(&self, wanted: &Out) -> Vec<u128> {
        let sent = self.out.iter().filter(|(_, out)| out == wanted);
        sent.map(|(at, _)| at.as_millis()).collect()
    }

    fn drain(&mut self) {
        let since = self.now - self.start;
        while let Some(transmit) = self.paths.poll_transmit() {
            assert_eq!(
                disco::sender(&transmit.bytes),
                Some(self.our_disco.public())
            );
            let plain = self.secret.open(&transmit.bytes).unwrap();
            let message = Message::parse(&plain).unwrap();
            let out = match (transmit.via, message) {
                (
                    Via::Udp(to),
                    Message::Ping {
                        tx_id,
                        padding,
                        node_key,
                    },
                ) => {
                    assert_eq!(node_key, Some(self.ours));
                    let len = transmit.bytes.len();
                    self.pinged(to, tx_id, padding > 0);
                    match (padding, transmit.dont_fragment) {
                        (0, true) => panic!("small Pings may be fragmented"),
                        (0, false) => Out::Ping(to),
                        (_, true) => Out::LargePing(to, len),
                        (_, false) => Out::SplitPing(to, len),
                    }
                }
                (Via::Udp(to), Message::Pong { source, .. }) => {
                    assert_eq!(source, to);
                    Out::Pong(to)
                }
                (Via::Udp(_), Message::CallMeMaybe { .. }) => panic!("a CallMeMaybe over UDP"),
                (Via::Derp { region, node_key }, message) => {
                    assert_eq!((region, node_key), (REGION, self.setup.node_key));
                    match message {
                        Message::Ping { tx_id, .. } => {
                            let fake = (disco::DERP_FAKE_IP, 7).into();
                            let rtt = self.relay_rtt;
                            self.pongs
                                .extend(rtt.map(|rtt| (self.now + rtt, fake, tx_id)));
                            Out::RelayPing
                        }
                        Message::Pong { source, .. } => Out::RelayPong(source),
                        Message::CallMeMaybe { .. } => Out::CallMeMaybe,
                    }
                }
            };
            self.out.push((since, out));
        }
        while let Some((_, decision)) = self.paths.poll_decision() {
            self.decisions.push((since, decision));
        }
        while let Some(event) = self.paths.poll_event() {
            self.events.push((since, event));
        }
    }

    fn pinged(&mut self, to: SocketAddr, tx_id: TxId, large: bool) {
        let Some((rtt, which)) = self.answers.get(&to) else {
            return;
        };
        let count = self.counts.entry(to).or_default();
        if which(*count, large) {
            self.pongs.push((self.now + *rtt, to, tx_id));
        }
        if !large {
            *count += 1;
        }
    }
}
