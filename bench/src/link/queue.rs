//! One direction of an emulated wire: what enters leaves later, or not at all.
//!
//! The wire is a transmitter of a given rate behind a bounded queue, followed by a delay. A packet
//! waits until those before it are sent, takes its own length over the rate to send, then travels
//! `delay`, give or take `jitter`. Packets never overtake each other: jitter that would reorder
//! them holds the later one back, as a queue in a router does. Loss is an independent coin toss
//! per packet, from the seed. No clock and no socket is known here, so tests run in virtual time.

#![forbid(unsafe_code)]

use rand::{Rng, RngExt};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The nature of one direction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shape {
    /// Time from the end of sending to arrival.
    pub(crate) delay: Duration,
    /// Largest deviation from `delay`, either way, evenly spread.
    pub(crate) jitter: Duration,
    /// Probability of losing a packet, 0 to 1.
    pub(crate) loss: f64,
    /// Bits per second; none is unlimited.
    pub(crate) rate_bps: Option<u64>,
    /// Bytes that may wait for the transmitter; what comes on top is dropped. Bounds what is in
    /// flight as well where no rate is set.
    pub(crate) queue_bytes_max: usize,
}

/// What became of the packets of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) passed: u64,
    pub(crate) lost: u64,
    pub(crate) overflowed: u64,
}

/// Packets under way in one direction.
#[derive(Debug)]
pub(crate) struct LinkQueue {
    shape: Shape,
    in_flight: VecDeque<Flying>,
    in_flight_bytes: usize,
    /// When the transmitter is free again.
    sent_until: Option<Instant>,
    counters: Counters,
}

#[derive(Debug)]
struct Flying {
    due: Instant,
    packet: Vec<u8>,
}

impl LinkQueue {
    /// An empty wire.
    pub(crate) fn new(shape: Shape) -> LinkQueue {
        LinkQueue {
            shape,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            sent_until: None,
            counters: Counters::default(),
        }
    }

    /// Puts a packet on the wire, or drops and counts it.
    pub(crate) fn handle_packet<R: Rng>(&mut self, now: Instant, packet: Vec<u8>, rng: &mut R) {
        if self.shape.loss > 0.0 && rng.random::<f64>() < self.shape.loss {
            self.counters.lost += 1;
            return;
        }
        let start = self.sent_until.map_or(now, |until| until.max(now));
        let waiting = self.bytes_waiting(start.duration_since(now));
        if waiting.saturating_add(packet.len()) > self.shape.queue_bytes_max {
            self.counters.overflowed += 1;
            return;
        }
        let sent = start + self.send_time(packet.len());
        self.sent_until = Some(sent);
        let mut due = sent + self.shape.delay;
        if !self.shape.jitter.is_zero() {
            let around = rng.random_range(0.0..2.0);
            due = (due + self.shape.jitter.mul_f64(around))
                .checked_sub(self.shape.jitter)
                .map_or(sent, |due| due.max(sent));
        }
        if let Some(before) = self.in_flight.back() {
            due = due.max(before.due);
        }
        self.in_flight_bytes += packet.len();
        self.in_flight.push_back(Flying { due, packet });
    }

    /// The next packet that has arrived by `now`.
    pub(crate) fn poll_arrival(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.in_flight.front()?.due > now {
            return None;
        }
        let flying = self.in_flight.pop_front()?;
        self.in_flight_bytes -= flying.packet.len();
        self.counters.passed += 1;
        Some(flying.packet)
    }

    /// When the next packet arrives.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.in_flight.front().map(|flying| flying.due)
    }

    /// What became of the packets so far.
    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes not yet sent, from the time the transmitter still needs; with no rate, all in flight.
    fn bytes_waiting(&self, backlog: Duration) -> usize {
        let Some(rate_bps) = self.shape.rate_bps else {
            return self.in_flight_bytes;
        };
        let bytes = u128::from(rate_bps) * backlog.as_nanos() / 8_000_000_000;
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    fn send_time(&self, bytes: usize) -> Duration {
        let Some(rate_bps) = self.shape.rate_bps else {
            return Duration::ZERO;
        };
        let bits = u64::try_from(bytes).unwrap_or(u64::MAX).saturating_mul(8);
        Duration::from_nanos(bits.saturating_mul(1_000_000_000) / rate_bps.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn shape() -> Shape {
        Shape {
            queue_bytes_max: 1 << 20,
            ..Shape::default()
        }
    }

    fn zero() -> (Instant, StdRng) {
        (crate::clock::now(), StdRng::seed_from_u64(7))
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_packet_arrives_after_the_delay_and_not_before() {
        let (t0, mut rng) = zero();
        let mut wire = LinkQueue::new(Shape {
            delay: 20 * MS,
            ..shape()
        });
        wire.handle_packet(t0, vec![1; 100], &mut rng);
        assert_eq!(wire.poll_timeout(), Some(t0 + 20 * MS));
        assert_eq!(
            wire.poll_arrival(t0 + 20 * MS - Duration::from_nanos(1)),
            None
        );
        assert_eq!(wire.poll_arrival(t0 + 20 * MS), Some(vec![1; 100]));
        assert_eq!(wire.poll_timeout(), None);
    }

    #[test]
    fn a_rate_spaces_packets_by_their_length() {
        let (t0, mut rng) = zero();
        // 8 Mb/s: 1000 bytes take one millisecond.
        let mut wire = LinkQueue::new(Shape {
            delay: 5 * MS,
            rate_bps: Some(8_000_000),
            ..shape()
        });
        for _ in 0..3 {
            wire.handle_packet(t0, vec![0; 1000], &mut rng);
        }
        let mut arrivals = Vec::new();
        while let Some(due) = wire.poll_timeout() {
            arrivals.push(due - t0);
            wire.poll_arrival(due);
        }
        assert_eq!(arrivals, [6 * MS, 7 * MS, 8 * MS]);
        // An idle transmitter starts at once.
        wire.handle_packet(t0 + 100 * MS, vec![0; 1000], &mut rng);
        assert_eq!(wire.poll_timeout(), Some(t0 + 106 * MS));
    }

    #[test]
    fn what_exceeds_the_queue_is_dropped_and_counted() {
        let (t0, mut rng) = zero();
        let mut wire = LinkQueue::new(Shape {
            rate_bps: Some(8_000_000),
            queue_bytes_max: 3000,
            ..Shape::default()
        });
        for _ in 0..10 {
            wire.handle_packet(t0, vec![0; 1000], &mut rng);
        }
        assert_eq!(wire.counters().overflowed, 7);
        // Once the queue has drained there is room again.
        wire.handle_packet(t0 + 3 * MS, vec![0; 1000], &mut rng);
        assert_eq!(wire.counters().overflowed, 7);
    }

    #[test]
    fn jitter_stays_in_its_bounds_and_never_reorders() {
        let (t0, mut rng) = zero();
        let mut wire = LinkQueue::new(Shape {
            delay: 20 * MS,
            jitter: 5 * MS,
            ..shape()
        });
        let mut sent = VecDeque::new();
        let (mut smallest, mut largest) = (Duration::MAX, Duration::ZERO);
        for step in 0..2000u32 {
            let now = t0 + step * MS;
            while let Some(packet) = wire.poll_arrival(now) {
                let (number, at): (u32, Instant) = sent.pop_front().expect("in order");
                assert_eq!(packet, number.to_be_bytes());
                let late = now - at;
                smallest = smallest.min(late);
                largest = largest.max(late);
            }
            sent.push_back((step, now));
            wire.handle_packet(now, step.to_be_bytes().to_vec(), &mut rng);
        }
        assert!(smallest >= 15 * MS && smallest < 18 * MS, "{smallest:?}");
        assert!(largest > 22 * MS && largest <= 26 * MS, "{largest:?}");
    }

    #[test]
    fn loss_is_near_its_probability_and_repeats_with_its_seed() {
        let lost = |seed| {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut wire = LinkQueue::new(Shape {
                loss: 0.05,
                ..shape()
            });
            let t0 = crate::clock::now();
            for _ in 0..10_000 {
                wire.handle_packet(t0, vec![0; 10], &mut rng);
                wire.poll_arrival(t0);
            }
            let counters = wire.counters();
            assert_eq!(counters.lost + counters.passed, 10_000);
            counters.lost
        };
        assert!((400..600).contains(&lost(1)), "{}", lost(1));
        assert_eq!(lost(1), lost(1));
        assert_ne!(lost(1), lost(2));
    }
}
