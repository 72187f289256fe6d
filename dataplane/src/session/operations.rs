//! Lists of operations on two joined sessions, beside a small model that says what must come out:
//! what the fuzzer and the tests run.
//!
//! The model keeps, for each end, which keypairs there are ([`Known`]), which handshakes go on, and
//! which datagrams arrived; the network keeps every message, and may deliver each any number of
//! times, in any order, whole or damaged.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;
use zeroize::Zeroizing;

use super::{
    Change, End, Got, INITIATION_INTERVAL_MIN, Known, Moment, OVERHEAD, REKEY_ATTEMPT_TIME,
    REKEY_TIMEOUT,
};
use crate::config::Engine;
use crate::noise;
use crate::types::{PeerConfig, PeerId};

/// Messages the network remembers at most; the oldest go.
const IN_FLIGHT_MAX: usize = 64;
/// Alarms that can be due at one moment at most, with what they bring about.
const STEPS_MAX: usize = 12;

#[derive(Clone)]
struct Message {
    to: usize,
    /// Grows with each message.
    number: u32,
    bytes: Vec<u8>,
}

/// What the model knows of one end.
#[derive(Default)]
struct Seen {
    keys: Known,
    last_initiation: Option<Instant>,
    /// Its index, and when the first of its attempt was made, while no handshake has completed since.
    initiated: Option<(u32, Instant)>,
    /// When it last answered an initiation, and the number of that.
    answered: Option<(Instant, u32)>,
    arrived: HashSet<Vec<u8>>,
}

struct World {
    now: Duration,
    start: Instant,
    ends: [End; 2],
    seen: [Seen; 2],
    in_flight: Vec<Message>,
    sent: u32,
    sealed: u32,
}

/// Runs a list of operations: a byte that says which, and one that says on what. Returns how many
/// datagrams were opened.
///
/// # Panics
/// If the sessions and the model disagree.
pub(crate) fn run(start: Instant, bytes: &[u8]) -> usize {
    let mut world = World::new(start);
    for pair in bytes.chunks_exact(2) {
        world.operate(pair[0], pair[1]);
        world.check();
    }
    world.seen.iter().map(|seen| seen.arrived.len()).sum()
}

fn index_at(message: &[u8], at: usize) -> u32 {
    let bytes = message.get(at..).and_then(<[u8]>::first_chunk);
    u32::from_le_bytes(*bytes.expect("messages here are long enough"))
}

impl World {
    fn new(start: Instant) -> World {
        let keys = [[1; 32], [2; 32]];
        let ends = [0, 1].map(|own: usize| {
            let rng = StdRng::seed_from_u64(own as u64);
            let key = Zeroizing::new(keys[own]);
            let peer = PeerConfig::new(PeerId(7), noise::public_key(&keys[1 - own]));
            let shard = u8::from(own == 1);
            End::new(Engine::Ringtail, &key, 1420, shard, rng, start, &peer)
        });
        World {
            now: Duration::ZERO,
            start,
            ends,
            seen: Default::default(),
            in_flight: Vec::new(),
            sent: 0,
            sealed: 0,
        }
    }

    fn moment(&self) -> Moment {
        Moment {
            now: self.start + self.now,
            wall: Duration::from_secs(1_000_000) + self.now,
        }
    }

    fn operate(&mut self, operation: u8, operand: u8) {
        let end = usize::from(operation & 1);
        let which = usize::from(operand);
        match (operation >> 1) % 10 {
            0 => self.initiate(end, operand & 1 == 1),
            1 | 2 => self.deliver(which, None, false),
            // The newest, so that short lists get somewhere.
            3 | 4 => self.deliver(self.in_flight.len().wrapping_sub(1), None, operand & 1 == 1),
            5 => self.deliver(which, Some(which), false),
            6 => self.seal(end, which),
            7 => self.pass(Duration::from_millis(u64::from(operand))),
            8 => self.pass(Duration::from_secs(u64::from(operand))),
            _ => self.pass_to_alarm(end),
        }
    }

    fn transmit(&mut self, from: usize, bytes: &[u8]) {
        if self.in_flight.len() == IN_FLIGHT_MAX {
            self.in_flight.remove(0);
        }
        self.sent += 1;
        self.in_flight.push(Message {
            to: 1 - from,
            number: self.sent,
            bytes: bytes.to_vec(),
        });
    }

    /// An initiation of an end goes out: it keeps its distance.
    fn initiation(&mut self, end: usize, least: Duration, bytes: &[u8]) {
        let now = self.moment().now;
        if let Some(last) = self.seen[end].last_initiation.replace(now) {
            assert!(now - last >= least, "{:?} after the last", now - last);
        }
        let since = self.seen[end].initiated.map_or(now, |(_, since)| since);
        self.seen[end].initiated = Some((index_at(bytes, 4), since));
        self.transmit(end, bytes);
    }

    fn initiate(&mut self, end: usize, again: bool) {
        if let Some(message) = self.ends[end].try_initiate(self.moment(), again) {
            let least = if again {
                INITIATION_INTERVAL_MIN
            } else {
                REKEY_TIMEOUT
            };
            self.initiation(end, least, &message);
        }
    }

    fn deliver(&mut self, which: usize, damage: Option<usize>, keep: bool) {
        if self.in_flight.is_empty() {
            return;
        }
        let which = which % self.in_flight.len();
        let message = if keep {
            self.in_flight[which].clone()
        } else {
            self.in_flight.remove(which)
        };
        let (to, number, mut bytes) = (message.to, message.number, message.bytes);
        if let Some(at) = damage {
            // MAC2 is nothing without load: any other byte counts. So does the counter.
            let len = if bytes[0] == 4 {
                bytes.len()
            } else {
                bytes.len() - 16
            };
            bytes[at % len] ^= 0x80;
        }
        if bytes[0] == 4 && damage.is_none_or(|at| at % bytes.len() >= 4) {
            self.open(to, &bytes, damage.is_some());
        } else {
            self.handshake(to, &bytes, number, damage.is_some());
        }
    }

    /// True if an end has to take a handshake message that is not damaged.
    fn is_due(&self, end: usize, bytes: &[u8], number: u32) -> bool {
        let seen = &self.seen[end];
        let now = self.moment().now;
        if bytes[0] == 1 {
            seen.answered.is_none_or(|(last, newest)| {
                number > newest && now - last >= noise::ANSWER_INTERVAL_MIN
            })
        } else {
            seen.initiated.is_some_and(|(index, since)| {
                let given_up = now - since >= REKEY_ATTEMPT_TIME && !self.ends[end].initiating();
                index == index_at(bytes, 8) && !given_up
            })
        }
    }

    fn handshake(&mut self, end: usize, bytes: &[u8], number: u32, damaged: bool) {
        let at = self.moment();
        let due = !damaged && self.is_due(end, bytes, number);
        let result = self.ends[end].handshake(at, bytes);
        assert_eq!(result.is_ok(), due, "{result:?}");
        let Ok((outcome, message)) = result else {
            return;
        };
        assert!(outcome.message.is_some(), "either is answered");
        let seen = &mut self.seen[end];
        if bytes[0] == 1 {
            seen.answered = Some((at.now, number));
            seen.keys.answered(index_at(&message, 4), at.now);
        } else {
            seen.initiated = None;
            seen.keys.completed(index_at(bytes, 8), at.now);
            assert_eq!(outcome.change, Change::Up);
        }
        self.transmit(end, &message);
    }

    fn open(&mut self, end: usize, bytes: &[u8], damaged: bool) {
        let at = self.moment();
        let index = index_at(bytes, 4);
        let Got {
            report, packets, ..
        } = self.ends[end].open(at, &[bytes]);
        let Seen {
            keys,
            arrived,
            initiated,
            ..
        } = &mut self.seen[end];
        let good = !damaged && keys.holds(index, at.now) && !arrived.contains(bytes);
        assert_eq!(report.datagrams, usize::from(good), "index {index:#x}");
        assert_eq!(packets.len() == 1, good && bytes.len() > OVERHEAD);
        let confirms = good && keys.received(index);
        assert_eq!(report.change == Change::Up, confirms);
        if confirms {
            *initiated = None;
        }
        if good {
            if let [packet] = packets.as_slice() {
                assert!(packet.iter().all(|byte| *byte == packet[0]));
            }
            arrived.insert(bytes.to_vec());
        }
    }

    fn seal(&mut self, end: usize, len: usize) {
        let at = self.moment();
        let End {
            engine, session, ..
        } = &mut self.ends[end];
        let ready = session.ready(at.now);
        let len = 16 * (len + 1);
        self.sealed += 1;
        let mut message = vec![self.sealed.to_le_bytes()[0]; len + OVERHEAD];
        let stride = message.len();
        // Not by the end itself: that seals packets, and these are bytes of any length.
        let sealed = session.seal(engine, at.now, &mut message, stride);
        assert_eq!(sealed.is_ok(), ready);
        if sealed.is_ok() {
            assert!(
                self.in_flight
                    .iter()
                    .all(|other| other.bytes[..16] != message[..16]),
                "no counter twice"
            );
            self.transmit(end, &message);
        }
    }

    fn pass_to_alarm(&mut self, end: usize) {
        if let Some(at) = self.ends[end].poll_timeout() {
            let ahead = at.saturating_duration_since(self.moment().now);
            self.pass(ahead);
        }
    }

    /// Lets time pass, through every alarm on the way.
    fn pass(&mut self, by: Duration) {
        let until = self.now + by;
        loop {
            let due = self.ends.iter().filter_map(End::poll_timeout).min();
            let Some(at) = due.filter(|at| *at <= self.start + until) else {
                break;
            };
            self.now = self.now.max(at - self.start);
            for end in 0..2 {
                self.wake(end);
            }
        }
        self.now = until;
        for seen in &mut self.seen {
            seen.keys.passed(self.start + until);
        }
    }

    fn wake(&mut self, end: usize) {
        let at = self.moment();
        for _ in 0..STEPS_MAX {
            if self.ends[end]
                .poll_timeout()
                .is_none_or(|next| next > at.now)
            {
                return;
            }
            let (outcome, message) = self.ends[end].step(at);
            match message {
                // A new way may have asked for one sooner than the paper has it.
                Some(message) if outcome.handshake => {
                    self.initiation(end, INITIATION_INTERVAL_MIN, &message);
                }
                Some(message) => self.transmit(end, &message),
                None => {}
            }
        }
        panic!("alarms without end");
    }

    fn check(&self) {
        let at = self.moment();
        for (end, seen) in self.ends.iter().zip(&self.seen) {
            assert_eq!(end.ready(at), seen.keys.ready(at.now));
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, RngExt};

    use super::*;
    use crate::sys::now;

    /// A handshake delivered step by step, then data each way.
    #[test]
    fn a_plain_list_gets_as_far_as_data() {
        const INITIATE: u8 = 0;
        const DELIVER_NEWEST: u8 = 3 << 1;
        const SEAL: u8 = 6 << 1;
        let list = [
            INITIATE,
            DELIVER_NEWEST,
            DELIVER_NEWEST,
            DELIVER_NEWEST,
            SEAL,
            DELIVER_NEWEST,
            SEAL | 1,
            DELIVER_NEWEST,
        ];
        let bytes: Vec<u8> = list.into_iter().flat_map(|op| [op, 0]).collect();
        assert_eq!(run(now(), &bytes), 3, "a keep-alive and two packets");
    }

    #[test]
    fn random_operations_match_the_model() {
        let mut rng = crate::seeded();
        let lists = std::env::var("RINGTAIL_OPERATION_LISTS")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(30);
        for _ in 0..lists {
            let mut bytes = vec![0; 2 * rng.random_range(1..300)];
            rng.fill_bytes(&mut bytes);
            run(now(), &bytes);
        }
    }
}
