//! Two of our sessions over a network that delays, reorders, doubles and loses, for days of a clock
//! that jumps from event to event.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};

use rand::RngExt;

use super::*;
use crate::seeded;

/// What waits for keys at an end at most, as in `peer::waiting`.
const WAITING_MAX: usize = 128;

/// How the network treats a datagram. Times in milliseconds.
#[derive(Clone, Copy)]
struct Weather {
    latency: (u64, u64),
    loss: f64,
    doubled: f64,
}

const CALM: Weather = Weather {
    latency: (20, 20),
    loss: 0.0,
    doubled: 0.0,
};

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Deliver(usize, Vec<u8>),
    /// An application has a packet with this number.
    Packet(usize, u32),
    Wake(usize),
}

struct Network {
    rng: StdRng,
    weather: Weather,
    now: Duration,
    ends: [End; 2],
    waiting: [VecDeque<u32>; 2],
    /// Since when packets wait.
    waits_since: [Option<Duration>; 2],
    longest_wait: Duration,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    sequence: u64,
    /// When each end is woken next.
    woken: [Option<Duration>; 2],
    sealed: HashMap<u32, u32>,
    /// Which packet each datagram holds.
    numbers: HashMap<Vec<u8>, u32>,
    /// Packets that arrived when their key was too old there. The responder's is older than the
    /// initiator's by the time that a response takes.
    too_old: HashSet<u32>,
    /// How often each packet arrived.
    arrived: HashMap<u32, u32>,
    initiations: u32,
}

/// A packet that carries a number.
fn numbered(number: u32) -> Vec<u8> {
    let mut packet = ipv4(24 + (number % 1300) as usize);
    packet[20..24].copy_from_slice(&number.to_be_bytes());
    packet
}

impl Network {
    fn new(seed: u64, weather: Weather) -> Network {
        let end = |own, peer, salt| {
            let mut end = end(OURS, own, &peer_config(peer, None));
            end.engine.own.rng = StdRng::seed_from_u64(seed ^ salt);
            end
        };
        Network {
            rng: StdRng::seed_from_u64(seed),
            weather,
            now: Duration::ZERO,
            ends: [end(1, 2, 0x1111), end(2, 1, 0x2222)],
            waiting: Default::default(),
            waits_since: [None; 2],
            longest_wait: Duration::ZERO,
            events: BinaryHeap::new(),
            sequence: 0,
            woken: [None; 2],
            sealed: HashMap::new(),
            numbers: HashMap::new(),
            too_old: HashSet::new(),
            arrived: HashMap::new(),
            initiations: 0,
        }
    }

    fn push(&mut self, at: Duration, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((at, self.sequence, event)));
    }

    fn moment(&self) -> Moment {
        at(self.now)
    }

    fn transmit(&mut self, from: usize, message: Vec<u8>) {
        self.initiations += u32::from(message[0] == 1);
        let copies = 1 + u32::from(self.rng.random_bool(self.weather.doubled));
        for _ in 0..copies {
            if self.rng.random_bool(self.weather.loss) {
                continue;
            }
            let (least, most) = self.weather.latency;
            let latency = Duration::from_millis(self.rng.random_range(least..=most));
            self.push(
                self.now + latency,
                Event::Deliver(1 - from, message.clone()),
            );
        }
    }

    fn send(&mut self, from: usize, number: u32) {
        let now = self.moment();
        if self.ends[from].ready(now) {
            let datagram = self.ends[from].seal(now, &numbered(number));
            *self.sealed.entry(number).or_default() += 1;
            self.numbers.insert(datagram.clone(), number);
            self.transmit(from, datagram);
            return;
        }
        self.waiting[from].push_back(number);
        if self.waiting[from].len() > WAITING_MAX {
            self.waiting[from].pop_front();
        }
        self.waits_since[from].get_or_insert(self.now);
        if let Some(message) = self.ends[from].try_initiate(now, false) {
            self.transmit(from, message);
        }
    }

    fn up(&mut self, end: usize) {
        if let Some(since) = self.waits_since[end].take() {
            self.longest_wait = self.longest_wait.max(self.now - since);
        }
        while let Some(number) = self.waiting[end].pop_front() {
            self.send(end, number);
        }
    }

    fn deliver(&mut self, to: usize, message: &[u8]) {
        let now = self.moment();
        let change = if message[0] == 4 {
            let got = self.ends[to].open(now, &[message]);
            if got.dropped == [DropReason::SessionExpired] {
                self.too_old.extend(self.numbers.get(message));
            }
            for packet in got.packets {
                let number = u32::from_be_bytes(*packet[20..].first_chunk().unwrap());
                assert_eq!(packet, numbered(number));
                *self.arrived.entry(number).or_default() += 1;
            }
            got.report.change
        } else {
            let Ok((outcome, reply)) = self.ends[to].handshake(now, message) else {
                return;
            };
            if !reply.is_empty() {
                self.transmit(to, reply);
            }
            outcome.change
        };
        if change == Change::Up {
            self.up(to);
        }
    }

    /// Lets everything happen until a time.
    fn run(&mut self, until: Duration) {
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            if at > until {
                self.push(at, event);
                break;
            }
            assert!(at >= self.now);
            self.now = at;
            match event {
                Event::Deliver(to, message) => self.deliver(to, &message),
                Event::Packet(from, number) => self.send(from, number),
                Event::Wake(end) => {
                    if self.woken[end] == Some(at) {
                        self.woken[end] = None;
                    }
                }
            }
            self.wake_ups();
        }
        self.now = until;
    }

    fn assert_waits_end_within(&self, span: Duration) {
        assert!(self.longest_wait <= span, "{:?}", self.longest_wait);
    }

    fn assert_only_old_ones_are_lost(&self) {
        let lost = self.sealed.keys();
        let lost: Vec<_> = lost.filter(|n| !self.arrived.contains_key(n)).collect();
        assert!(lost.iter().all(|n| self.too_old.contains(n)), "{lost:?}");
        // A pause would have to end just then.
        assert!(lost.len() < 10, "{lost:?}");
    }

    /// Handles what is due, and has each end woken for what comes next.
    fn wake_ups(&mut self) {
        let now = self.moment();
        for end in 0..2 {
            let mut steps = 0;
            while let Some(next) = self.ends[end].session.poll_timeout() {
                if next > now.now {
                    let next = next - *START;
                    if self.woken[end].is_none_or(|woken| next < woken) {
                        self.woken[end] = Some(next);
                        self.push(next, Event::Wake(end));
                    }
                    break;
                }
                let (outcome, message) = self.ends[end].step(now);
                if let Some(message) = message {
                    self.transmit(end, message);
                }
                if outcome.change == Change::Down {
                    self.waiting[end].clear();
                    self.waits_since[end] = None;
                }
                steps += 1;
                assert!(steps < 10, "time makes no endless work");
            }
            let indexes = self.ends[end].engine.own.indexes.len();
            assert!(
                indexes <= 6,
                "{indexes} indexes: five keypairs and an initiation"
            );
        }
    }
}

/// The paper's bound is the next retry; here nobody waits at all: whichever initiation comes first
/// is answered, and that answer counts.
#[test]
fn simultaneous_starts_never_stall() {
    let mut rng = seeded();
    let mut crossed = 0;
    for _ in 0..500 {
        let mut network = Network::new(rng.random(), CALM);
        let apart = rng.random_range(0..30);
        network.push(Duration::ZERO, Event::Packet(0, 1));
        network.push(Duration::from_millis(apart), Event::Packet(1, 2));
        network.run(Duration::from_secs(30));
        crossed += u32::from(network.initiations == 2);
        assert_eq!(network.arrived.len(), 2);
        // One round trip of 40 ms, and half of one until the responder has heard of it.
        assert!(
            network.longest_wait <= Duration::from_millis(60),
            "{apart} ms apart"
        );
    }
    assert!(crossed > 200, "{crossed} of them crossed");
}

/// Days of traffic that comes and goes at both ends. Nothing is lost but by the network, nothing
/// arrives twice, and whoever has data is heard soon.
fn days(weather: Weather) -> Network {
    const DAYS: u64 = 3;
    let mut network = Network::new(seeded().random(), weather);
    let mut clock = [Duration::ZERO; 2];
    let end_of_time = Duration::from_secs(DAYS * 86_400);
    for number in 0..6_000 {
        let from = network.rng.random_range(0..2);
        let gap_ms = match network.rng.random_range(0..100) {
            0..80 => network.rng.random_range(0..50),
            80..90 => network.rng.random_range(0..20_000),
            90..98 => network.rng.random_range(0..300_000),
            _ => network.rng.random_range(0..DAYS * 4_000_000),
        };
        // Now and then both begin at once.
        let start = if gap_ms > 100_000 {
            clock[0].max(clock[1])
        } else {
            clock[from]
        };
        clock[from] = start + Duration::from_millis(gap_ms);
        if clock[from] < end_of_time {
            network.push(clock[from], Event::Packet(from, number));
        }
    }
    network.run(end_of_time);
    assert!(
        network.arrived.values().all(|times| *times == 1),
        "nothing twice"
    );
    assert!(network.sealed.values().all(|times| *times == 1));
    network
}

#[test]
fn days_of_calm_lose_nothing_but_what_is_too_old_and_never_stall() {
    let network = days(CALM);
    let sent = network.sealed.len();
    assert!(sent > 1_000, "{sent} packets");
    network.assert_only_old_ones_are_lost();
    assert!(
        network.initiations > 50,
        "{} initiations",
        network.initiations
    );
    network.assert_waits_end_within(Duration::from_millis(60));
}

#[test]
fn days_of_reordering_and_doubles_lose_nothing_but_what_is_too_old() {
    let weather = Weather {
        latency: (5, 400),
        loss: 0.0,
        doubled: 0.2,
    };
    let network = days(weather);
    network.assert_only_old_ones_are_lost();
    // A late response can belong to an initiation that has been repeated for a new attempt.
    network.assert_waits_end_within(Duration::from_secs(6));
}

#[test]
fn days_of_storm_deliver_what_the_network_does() {
    let weather = Weather {
        latency: (5, 400),
        loss: 0.3,
        doubled: 0.1,
    };
    let network = days(weather);
    let (sent, arrived) = (network.sealed.len(), network.arrived.len());
    assert!(arrived * 100 >= sent * 60, "{arrived} of {sent}");
    // A handshake fails with a probability of one half; ninety seconds are seventeen of them.
    network.assert_waits_end_within(Duration::from_secs(96));
}
