//! One session of ours and one of boringtun's, joined by a network that loses, delays, reorders,
//! doubles and damages, under a clock for each that jumps.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use mock_instant::MockClock;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, RngExt, SeedableRng};
use ringtail_dataplane::fuzzing::{Change, End, Known, Moment};
use ringtail_dataplane::{Engine, PeerConfig, PeerId};

use crate::tunn::Tunn;

pub const OURS: usize = 0;
pub const THEIRS: usize = 1;

const MTU: usize = 1420;
/// Packets that wait for keys at an end at most.
const WAITING_MAX: usize = 128;
/// Steps of time that can be due at one moment at most.
const STEPS_MAX: u32 = 12;
/// Initiations less than this apart are not answered by us.
const FLOOR: Duration = Duration::from_millis(20);

#[expect(clippy::disallowed_methods, reason = "any moment to count from")]
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// How the network treats a datagram; chances, and milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    pub latency: (u64, u64),
    pub loss: f64,
    pub doubled: f64,
    pub damaged: f64,
    pub shuffled: f64,
}

pub const CALM: Weather = Weather {
    latency: (20, 20),
    loss: 0.0,
    doubled: 0.0,
    damaged: 0.0,
    shuffled: 0.0,
};

pub const STORM: Weather = Weather {
    latency: (5, 400),
    loss: 0.25,
    doubled: 0.15,
    damaged: 0.02,
    shuffled: 0.5,
};

#[derive(Clone)]
struct Datagram {
    bytes: Vec<u8>,
    /// What was sealed, unless it is a keep-alive or a handshake message.
    packet: Option<Vec<u8>>,
    /// Initiations have the order in which they were made.
    order: u64,
    damaged: bool,
}

pub enum Event {
    /// Datagrams that arrive together at an end.
    Deliver(usize, Vec<Arrival>),
    /// An application at an end has so many packets, one at least.
    Packets(usize, usize),
    /// An end's clock jumps ahead, and then we are busy for a while before we look at our alarms.
    Jump(usize, Duration, Duration),
    /// Our wall clock is set so many seconds ahead or back.
    SetWall(i64),
    /// So many counters of our keys are used up.
    UseUp(u64),
    Weather(Weather),
}

/// A datagram on its way.
pub struct Arrival(Datagram);

/// What happened, for the test to see that enough did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Packets sealed, by end.
    pub sealed: [u64; 2],
    /// Packets that the other end opened, by the end that sealed them.
    pub opened: [u64; 2],
    /// Data messages refused as the models said: replays, damaged ones, old keys.
    pub refused: u64,
    /// Handshakes completed, by the end that began them.
    pub handshakes: [u64; 2],
    /// Handshake messages refused.
    pub handshakes_refused: u64,
}

pub struct Network {
    pub rng: StdRng,
    pub tally: Tally,
    weather: Weather,
    now: Duration,
    /// How far each end's clock is ahead.
    ahead: [Duration; 2],
    /// Until when we are busy.
    busy: Duration,
    wall_ahead: i64,
    ends: [End; 2],
    ours: Known,
    theirs: Tunn,
    /// Our keys' counters are used up.
    used_up: bool,
    /// The index of our last initiation.
    initiated: Option<u32>,
    /// When we answered last.
    answered: Option<Duration>,
    /// The newest initiation that each end took.
    newest: [Option<u64>; 2],
    arrived: [HashSet<Vec<u8>>; 2],
    waiting: [VecDeque<Vec<u8>>; 2],
    /// A clock jumped while a response was on its way: its keys are of different ages at the two ends.
    pub uneven: bool,
    events: BTreeMap<(Duration, u64), Event>,
    sequence: u64,
    packets: u32,
}

fn index_at(message: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*message[at..].first_chunk().expect("long enough"))
}

fn counter(message: &[u8]) -> u64 {
    u64::from_le_bytes(*message[8..].first_chunk().expect("long enough"))
}

impl Network {
    pub fn new(seed: u64, weather: Weather) -> Network {
        let mut rng = StdRng::seed_from_u64(seed);
        MockClock::set_time(Duration::ZERO);
        let private = [[1; 32], [2; 32]];
        let preshared: Option<[u8; 32]> = rng.random_bool(0.5).then(|| rng.random());
        let ends = [Engine::Ringtail, Engine::Boringtun].map(|kind| {
            let own = usize::from(kind == Engine::Boringtun);
            let keepalive = rng.random_bool(0.3).then(|| rng.random_range(5..30));
            let peer = PeerConfig {
                id: PeerId(7),
                public_key: ringtail_dataplane::fuzzing::public_key(&private[1 - own]),
                preshared_key: preshared.map(Into::into),
                allowed_ips: Vec::new(),
                persistent_keepalive: keepalive,
                outsider: false,
            };
            let seeded = StdRng::seed_from_u64(rng.next_u64());
            End::new(kind, &private[own].into(), MTU, 0, seeded, *START, &peer)
        });
        Network {
            rng,
            tally: Tally::default(),
            weather,
            now: Duration::ZERO,
            ahead: [Duration::ZERO; 2],
            busy: Duration::ZERO,
            wall_ahead: 0,
            ends,
            ours: Known::default(),
            theirs: Tunn::default(),
            used_up: false,
            initiated: None,
            answered: None,
            newest: [None; 2],
            arrived: Default::default(),
            waiting: Default::default(),
            uneven: false,
            events: BTreeMap::new(),
            sequence: 0,
            packets: 0,
        }
    }

    pub fn now(&self) -> Duration {
        self.now
    }

    pub fn push(&mut self, at: Duration, event: Event) {
        self.sequence += 1;
        self.events.insert((at, self.sequence), event);
    }

    /// An end's time, which its calls get.
    fn at(&self, end: usize) -> Moment {
        let own = self.now + self.ahead[end];
        if end == THEIRS {
            MockClock::set_time(own);
        }
        let wall = 1_700_000_000_i64.saturating_add(self.wall_ahead);
        Moment {
            now: *START + own,
            wall: Duration::from_secs(wall.max(0).unsigned_abs()) + own,
        }
    }

    fn ticked(&mut self) {
        self.theirs.ticked(self.now + self.ahead[THEIRS]);
    }

    /// Sends what an end made.
    fn send(&mut self, from: usize, bytes: Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        if bytes[0] == 1 {
            let index = index_at(&bytes, 4);
            if from == OURS {
                self.initiated = Some(index);
            } else {
                self.theirs.initiated(index, self.now + self.ahead[THEIRS]);
            }
        }
        self.sequence += 1;
        self.transmit(
            from,
            vec![Datagram {
                bytes,
                packet: None,
                order: self.sequence,
                damaged: false,
            }],
        );
    }

    fn transmit(&mut self, from: usize, run: Vec<Datagram>) {
        let weather = self.weather;
        let mut kept = Vec::new();
        for datagram in run {
            if self.rng.random_bool(weather.loss) {
                continue;
            }
            if self.rng.random_bool(weather.doubled) {
                kept.push(Arrival(datagram.clone()));
            }
            if self.rng.random_bool(weather.damaged) {
                let mut datagram = datagram.clone();
                // MAC2 means nothing without load, and the type says what it is.
                let mac2 = if datagram.bytes[0] == 4 { 0 } else { 16 };
                let at = self.rng.random_range(4..datagram.bytes.len() - mac2);
                datagram.bytes[at] ^= 1 << self.rng.random_range(0..8);
                datagram.damaged = true;
                kept.push(Arrival(datagram));
            }
            kept.push(Arrival(datagram));
        }
        if self.rng.random_bool(weather.shuffled) {
            kept.shuffle(&mut self.rng);
        }
        while !kept.is_empty() {
            let rest = kept.split_off(self.rng.random_range(1..=kept.len()));
            let (least, most) = weather.latency;
            let latency = Duration::from_millis(self.rng.random_range(least..=most));
            self.push(self.now + latency, Event::Deliver(1 - from, kept));
            kept = rest;
        }
    }

    /// A packet that carries a number, and random bytes.
    fn packet(&mut self, len: usize) -> Vec<u8> {
        self.packets += 1;
        let mut packet = vec![0; len];
        self.rng.fill_bytes(&mut packet[24..]);
        packet[..20].copy_from_slice(&[
            0x45, 0, 0, 0, 0, 0, 0, 0, 64, 253, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        let total = u16::try_from(len).expect("below the MTU");
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet[20..24].copy_from_slice(&self.packets.to_be_bytes());
        packet
    }

    fn packets(&mut self, from: usize, count: usize) {
        let len = self.rng.random_range(24..=MTU);
        let last = self.rng.random_range(24..=len);
        let lens = std::iter::repeat_n(len, count - 1).chain([last]);
        let packets = lens.map(|len| self.packet(len)).collect();
        self.seal(from, packets);
    }

    /// Packets of one length (the last may be shorter) want to be sent: under keys, or later.
    fn seal(&mut self, from: usize, packets: Vec<Vec<u8>>) {
        let at = self.at(from);
        let ready = self.ends[from].ready(at);
        if from == OURS {
            let known = self.ours.ready(at.now);
            assert!(ready == known || (known && self.used_up), "keys {known}");
        }
        if ready {
            let run: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
            match self.ends[from].try_seal_run(at, &run) {
                Ok(sealed) => {
                    assert_eq!(sealed.len(), packets.len());
                    self.tally.sealed[from] += packets.len() as u64;
                    let datagrams = sealed.into_iter().zip(packets);
                    let datagrams = datagrams.map(|(bytes, packet)| Datagram {
                        bytes,
                        packet: Some(packet),
                        order: 0,
                        damaged: false,
                    });
                    return self.transmit(from, datagrams.collect());
                }
                Err(reason) => assert!(from == OURS && self.used_up, "{reason:?}"),
            }
        }
        self.waiting[from].extend(packets);
        let excess = self.waiting[from].len().saturating_sub(WAITING_MAX);
        self.waiting[from].drain(..excess);
        let again = self.rng.random_bool(0.1);
        self.woken(from);
        if let Some(message) = self.ends[from].try_initiate(at, again) {
            self.send(from, message);
        }
    }

    /// boringtun's end brings its clock up to date before a handshake if it slept.
    fn woken(&mut self, end: usize) {
        if end == THEIRS && self.ends[THEIRS].poll_timeout().is_none() {
            self.ticked();
        }
    }

    fn up(&mut self, end: usize) {
        for packet in std::mem::take(&mut self.waiting[end]) {
            self.seal(end, vec![packet]);
        }
    }

    fn handshake(&mut self, to: usize, datagram: &Datagram) {
        let at = self.at(to);
        self.woken(to);
        let bytes = &datagram.bytes;
        let initiation = bytes[0] == 1;
        let sound = if initiation {
            let newer = self.newest[to].is_none_or(|newest| datagram.order > newest);
            let own = self.now + self.ahead[OURS];
            newer && (to == THEIRS || self.answered.is_none_or(|last| own - last >= FLOOR))
        } else if to == OURS {
            self.ends[OURS].initiating() && self.initiated == Some(index_at(bytes, 8))
        } else {
            self.theirs.awaits(index_at(bytes, 8))
        };
        let sound = sound && !datagram.damaged;
        let handled = self.ends[to].handshake(at, bytes);
        assert_eq!(
            handled.as_ref().map(|_| ()).map_err(|_| ()),
            sound.then_some(()).ok_or(()),
            "message {} to end {to}: {:?}",
            bytes[0],
            handled.err()
        );
        let Ok((outcome, reply)) = handled else {
            self.tally.handshakes_refused += 1;
            return;
        };
        if initiation {
            self.newest[to] = Some(datagram.order);
            let index = index_at(&reply, 4);
            if to == OURS {
                self.answered = Some(self.now + self.ahead[OURS]);
                self.ours.answered(index, at.now);
            } else {
                self.theirs.answered(index);
            }
        } else {
            let index = index_at(bytes, 8);
            if to == OURS {
                self.ours.completed(index, at.now);
                self.used_up = false;
            } else {
                self.theirs.completed(index);
            }
            self.tally.handshakes[to] += 1;
            assert_eq!(outcome.change, Change::Up);
        }
        self.send(to, reply);
        if outcome.change == Change::Up {
            self.up(to);
        }
    }

    /// Opens datagrams of one length and index.
    fn open(&mut self, to: usize, run: &[&Datagram]) {
        let at = self.at(to);
        let mut good = 0;
        let mut expected = Vec::new();
        for datagram in run {
            let index = index_at(&datagram.bytes, 4);
            let takes = !datagram.damaged
                && !self.arrived[to].contains(&datagram.bytes)
                && if to == OURS {
                    self.ours.holds(index, at.now)
                } else {
                    self.theirs.takes(index, counter(&datagram.bytes))
                };
            if takes {
                self.arrived[to].insert(datagram.bytes.clone());
                good += 1;
                expected.extend(datagram.packet.clone());
            }
        }
        let bytes: Vec<&[u8]> = run.iter().map(|datagram| &*datagram.bytes).collect();
        let got = self.ends[to].open(at, &bytes);
        assert_eq!(
            (got.report.datagrams, got.dropped.len()),
            (good, run.len() - good),
            "to end {to}: {:?}",
            got.dropped
        );
        assert!(got.packets == expected, "what is opened is what was sealed");
        self.tally.opened[1 - to] += expected.len() as u64;
        self.tally.refused += got.dropped.len() as u64;
        if to == OURS {
            let confirms = good > 0 && self.ours.received(index_at(bytes[0], 4));
            assert_eq!(got.report.change == Change::Up, confirms);
            self.used_up &= !confirms;
        }
        if got.report.change == Change::Up {
            self.up(to);
        }
    }

    fn deliver(&mut self, to: usize, arrivals: &[Arrival]) {
        let together = |a: &Arrival, b: &Arrival| {
            let (a, b) = (&a.0.bytes, &b.0.bytes);
            a[0] == 4 && b[0] == 4 && a.len() == b.len() && a[4..8] == b[4..8]
        };
        for run in arrivals.chunk_by(together) {
            let run: Vec<&Datagram> = run.iter().map(|Arrival(datagram)| datagram).collect();
            if run[0].bytes[0] == 4 {
                self.open(to, &run);
            } else {
                self.handshake(to, run[0]);
            }
        }
    }

    /// Handles an end's alarms that are due.
    fn wake(&mut self, end: usize) {
        let at = self.at(end);
        for _ in 0..STEPS_MAX {
            let due = self.ends[end].poll_timeout();
            if due.is_none_or(|due| due > at.now) {
                if end == OURS {
                    // Not before: while we are busy a handshake can make old keys live on.
                    self.ours.passed(at.now);
                }
                return;
            }
            if end == THEIRS {
                self.ticked();
            }
            let (outcome, message) = self.ends[end].step(at);
            self.send(end, message.unwrap_or_default());
            if outcome.change == Change::Down {
                self.waiting[end].clear();
            }
        }
        panic!("alarms without end");
    }

    /// True while a response is on its way.
    fn responding(&self) -> bool {
        self.events.values().any(|event| {
            let Event::Deliver(_, arrivals) = event else {
                return false;
            };
            arrivals
                .iter()
                .any(|Arrival(datagram)| datagram.bytes[0] == 2)
        })
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Deliver(to, arrivals) => self.deliver(to, &arrivals),
            Event::Packets(from, count) => self.packets(from, count),
            Event::Jump(end, by, busy) => {
                self.uneven |= self.responding();
                self.ahead[end] += by;
                if end == OURS {
                    self.busy = self.now + busy;
                } else {
                    // What a `Tunn` makes before its first tick is as old as the one before.
                    self.wake(THEIRS);
                }
            }
            Event::SetWall(by) => self.wall_ahead += by,
            Event::UseUp(counters) => {
                self.ends[OURS].use_up(counters);
                self.used_up = !self.ends[OURS].ready(self.at(OURS));
            }
            Event::Weather(weather) => self.weather = weather,
        }
    }

    /// When an end's alarms are looked at next.
    fn next_wake(&self, end: usize) -> Option<Duration> {
        let due = self.ends[end].poll_timeout()?.duration_since(*START);
        let at = due.saturating_sub(self.ahead[end]);
        Some(if end == OURS { at.max(self.busy) } else { at })
    }

    /// Lets everything happen until a time.
    pub fn run(&mut self, until: Duration) {
        loop {
            let wakes = [OURS, THEIRS].map(|end| self.next_wake(end).map(|at| (at, end)));
            let wake = wakes.into_iter().flatten().min();
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let next = wake.map(|(at, _)| at).into_iter().chain(event).min();
            let Some(next) = next.filter(|next| *next <= until) else {
                break;
            };
            self.now = self.now.max(next);
            match wake {
                Some((at, end)) if event.is_none_or(|event| at < event) => self.wake(end),
                _ => {
                    if let Some((_, event)) = self.events.pop_first() {
                        self.happen(event);
                    }
                }
            }
        }
        self.now = until;
    }
}
