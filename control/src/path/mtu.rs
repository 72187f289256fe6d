//! Looking for the largest packet that a path in use carries.
//!
//! A path is promoted with the size its test proved. From there the search tries the known steps
//! upwards in the background, each with two don't-fragment Pings a second apart, and stops at the
//! first step that fails twice. It repeats every ten minutes, and at once when the kernel says that
//! a packet was too big. A Pong proves one direction only, which is the one we need.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Wire packets tried, in bytes.
const STEPS: [u16; 4] = [1400, 1500, 8000, 9000];
const TRIES: u32 = 2;
const TRY_WAIT: Duration = Duration::from_secs(1);
const REPEAT: Duration = Duration::from_secs(10 * 60);
/// What every path is assumed to carry when nothing was proved, in bytes.
pub(super) const MTU_UNPROVED: u16 = 1280;

/// Bytes around a tunnel packet on the wire: IP, UDP and WireGuard headers.
fn overhead(to: SocketAddr) -> u16 {
    if to.is_ipv4() {
        20 + 8 + 32
    } else {
        40 + 8 + 32
    }
}

/// The wire packet, in bytes, that carries a full packet of the tunnel.
pub(super) fn wire_mtu(tunnel_mtu: u16, to: SocketAddr) -> u16 {
    tunnel_mtu.saturating_add(overhead(to))
}

/// The UDP payload of a wire packet, in bytes.
pub(super) fn payload_len(wire: u16, to: SocketAddr) -> usize {
    usize::from(wire.saturating_sub(overhead(to) - 32))
}

/// The search on one best address.
#[derive(Clone, Copy, Debug)]
pub(super) struct MtuSearch {
    /// Largest size known to pass.
    known: u16,
    /// What promotion proved: where a repetition starts.
    base: u16,
    /// Largest size answered in this run.
    passed: u16,
    limit: u16,
    trying: Option<(u16, u32)>,
    next: Option<Instant>,
}

impl MtuSearch {
    /// A search from `base` up to `limit`, which starts now; with a `limit` of 0 there is none.
    pub(super) fn new(now: Instant, base: u16, limit: u16) -> Self {
        Self {
            known: base,
            base,
            passed: base,
            limit,
            trying: None,
            next: (limit > 0).then_some(now),
        }
    }

    pub(super) fn known(&self) -> u16 {
        self.known
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.next
    }

    /// The size of the next probe, if one is due.
    pub(super) fn poll(&mut self, now: Instant) -> Option<u16> {
        self.next.filter(|at| *at <= now)?;
        let (size, tries) = match self.trying {
            Some((size, tries)) if tries < TRIES => (size, tries),
            Some(_) => return self.finish(now),
            None => match self.step_above(self.passed) {
                Some(size) => (size, 0),
                None => return self.finish(now),
            },
        };
        self.trying = Some((size, tries + 1));
        self.next = Some(now + TRY_WAIT);
        Some(size)
    }

    /// A probe of this size was answered.
    pub(super) fn pong(&mut self, now: Instant, size: u16) {
        self.passed = self.passed.max(size);
        self.known = self.known.max(size);
        if self.trying.is_some_and(|(trying, _)| trying <= size) {
            self.trying = None;
            self.next = Some(now);
        }
    }

    /// The kernel refused a packet as too big: only what promotion proved still counts.
    pub(super) fn too_big(&mut self, now: Instant) {
        if self.limit > 0 {
            *self = Self::new(now, self.base, self.limit);
        }
    }

    fn finish(&mut self, now: Instant) -> Option<u16> {
        self.known = self.passed;
        *self = Self {
            known: self.known,
            next: Some(now + REPEAT),
            ..Self::new(now, self.base, self.limit)
        };
        None
    }

    fn step_above(&self, size: u16) -> Option<u16> {
        let mut steps = STEPS.into_iter();
        steps.find(|step| *step > size && *step <= self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::test_clock::start;

    fn run(search: &mut MtuSearch, mut now: Instant, passes: u16) -> (Vec<u16>, Instant) {
        let mut probes = Vec::new();
        loop {
            now = now.max(search.next_timeout().unwrap());
            let Some(size) = search.poll(now) else {
                return (probes, now);
            };
            probes.push(size);
            if size <= passes {
                search.pong(now, size);
            }
        }
    }

    #[test]
    fn the_search_stops_at_the_first_step_that_fails_twice_and_repeats() {
        let mut search = MtuSearch::new(start(), 1340, 9000);
        let (probes, now) = run(&mut search, start(), 1500);
        assert_eq!(probes, [1400, 1500, 8000, 8000]);
        assert_eq!(search.known(), 1500);
        assert_eq!(search.next_timeout(), Some(now + REPEAT));
        // The path shrank meanwhile.
        let (probes, _) = run(&mut search, now, 1400);
        assert_eq!(probes, [1400, 1500, 1500]);
        assert_eq!(search.known(), 1400);
    }

    #[test]
    fn nothing_beyond_the_link_is_tried_and_too_big_starts_again() {
        let mut search = MtuSearch::new(start(), 1480, 1500);
        let (probes, now) = run(&mut search, start(), 9000);
        assert_eq!(probes, [1500]);
        search.too_big(now);
        assert_eq!((search.known(), search.next_timeout()), (1480, Some(now)));
    }

    #[test]
    fn sizes_are_those_of_the_page() {
        let v4 = "203.0.113.7:1".parse().unwrap();
        let v6 = "[2001:db8::7]:1".parse().unwrap();
        for (wire, len4, len6) in [
            (1280, 1252, 1232),
            (1360, 1332, 1312),
            (1400, 1372, 1352),
            (1500, 1472, 1452),
            (8000, 7972, 7952),
            (9000, 8972, 8952),
        ] {
            assert_eq!(payload_len(wire, v4), len4);
            assert_eq!(payload_len(wire, v6), len6);
        }
        assert_eq!((wire_mtu(1280, v4), wire_mtu(1280, v6)), (1340, 1360));
        assert_eq!((wire_mtu(1420, v4), wire_mtu(1420, v6)), (1480, 1500));
    }
}
