//! How large the packets are that a path carries.
//!
//! What a path must carry is a full packet of the tunnel. Before it is used, don't-fragment Pings of
//! that size are sent; if none is answered, as large ones that routers may cut. **Whole**: a
//! don't-fragment Ping was answered. **Fragments**: only one that may be cut was; the path is used,
//! since fragments carry a gigabit per second where the relay is a detour, and shown so; an address
//! that is known to carry full packets whole goes before it. A path that answers neither is refused,
//! because it would swallow every full packet. Data leaves without the bit, as those Pings do.
//!
//! On a path in use the search looks for the largest size that passes with the bit, which is the MTU
//! that is shown: two Pings a second apart per step, upwards from what the tunnel needs to the first
//! step that fails, or to the least that every path should carry if that one fails already. It
//! repeats every ten minutes, and soon when the kernel says that a packet was too big. If a path no
//! longer carries whole what it did, its test is repeated. A Pong proves one direction only, which is
//! the one we need.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Wire packets tried above what the tunnel needs, in bytes.
const STEPS: [u16; 4] = [1400, 1500, 8000, 9000];
/// What is tried below.
const FLOOR: u16 = MTU_UNPROVED;
const TRIES: u32 = 2;
const TRY_WAIT: Duration = Duration::from_secs(1);
const REPEAT: Duration = Duration::from_secs(10 * 60);
/// Least time between two runs because a packet was too big.
const TOO_BIG_REST: Duration = Duration::from_secs(10);
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

/// The wire packet of a UDP payload of `len` bytes; the reverse of [`payload_len`].
pub(super) fn wire_len(len: usize, to: SocketAddr) -> u16 {
    u16::try_from(len + usize::from(overhead(to) - 32)).unwrap_or(u16::MAX)
}

/// How a path takes packets as large as the tunnel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carries {
    /// Whole: a don't-fragment Ping of that size was answered.
    Whole,
    /// Only if they may be cut on the way.
    Fragments,
    /// Nothing so large was answered.
    Unknown,
}

/// What the search wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A don't-fragment Ping for a wire packet of so many bytes.
    Probe(u16),
    /// The path's test repeated: full packets no longer pass whole.
    Test,
}

/// The search on one best address.
#[derive(Clone, Copy, Debug)]
pub(super) struct MtuSearch {
    /// The wire packet of a full tunnel packet, in bytes.
    needed: u16,
    limit: u16,
    carries: Carries,
    /// Largest size known to pass, by this run or the last.
    known: Option<u16>,
    /// In this run: the largest size answered, and the least that was not.
    passed: Option<u16>,
    failed: Option<u16>,
    trying: Option<(u16, u32)>,
    next: Option<Instant>,
    finished: Option<Instant>,
}

impl MtuSearch {
    /// A search up to `limit`, which starts now, on a path whose test for wire packets of `needed`
    /// bytes ended with `carries`; with a `limit` of 0 there is none.
    pub(super) fn new(now: Instant, needed: u16, carries: Carries, limit: u16) -> Self {
        let (passed, failed) = match carries {
            Carries::Whole => (Some(needed), None),
            Carries::Fragments => (None, Some(needed)),
            Carries::Unknown => (None, None),
        };
        Self {
            needed,
            limit,
            carries,
            known: passed,
            passed,
            failed,
            trying: None,
            next: (limit > 0).then_some(now),
            finished: None,
        }
    }

    /// Largest wire packet, in bytes, that a don't-fragment Ping has proved.
    pub(super) fn known(&self) -> Option<u16> {
        self.known
    }

    pub(super) fn carries(&self) -> Carries {
        self.carries
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.next
    }

    /// What is to be done, if anything is due.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Step> {
        self.next.filter(|at| *at <= now)?;
        if let Some((size, TRIES..)) = self.trying {
            (self.failed, self.trying) = (Some(size), None);
        }
        let fresh = || self.next_size().map(|size| (size, 0));
        let Some((size, tries)) = self.trying.or_else(fresh) else {
            return self.finish(now);
        };
        self.trying = Some((size, tries + 1));
        self.next = Some(now + TRY_WAIT);
        Some(Step::Probe(size))
    }

    /// A probe of this size was answered.
    pub(super) fn pong(&mut self, now: Instant, size: u16) {
        self.passed = self.passed.max(Some(size));
        self.known = self.known.max(Some(size));
        if size >= self.needed {
            self.carries = Carries::Whole;
        }
        if self.trying.is_some_and(|(trying, _)| trying <= size) {
            self.trying = None;
            self.next = Some(now);
        }
    }

    /// The kernel refused a probe of this size: it is larger than the device's MTU.
    pub(super) fn refused(&mut self, now: Instant, size: u16) {
        if self.trying.is_some_and(|(trying, _)| trying == size) {
            (self.failed, self.trying) = (Some(size), None);
            self.next = Some(now);
        }
    }

    /// The kernel refused a packet of the tunnel as too big: look again.
    pub(super) fn too_big(&mut self, now: Instant) {
        let rested = |at: Instant| now.saturating_duration_since(at) >= TOO_BIG_REST;
        if self.finished.is_some_and(rested) && self.trying.is_none() {
            self.next = Some(now);
        }
    }

    fn finish(&mut self, now: Instant) -> Option<Step> {
        let narrowed = self.carries == Carries::Whole && self.passed < Some(self.needed);
        self.known = self.passed;
        (self.passed, self.failed) = (None, None);
        (self.finished, self.next) = (Some(now), Some(now + REPEAT));
        narrowed.then_some(Step::Test)
    }

    fn next_size(&self) -> Option<u16> {
        let below = |size: &u16| self.failed.is_none_or(|failed| *size < failed);
        match (self.passed, self.failed) {
            (None, None) => Some(self.needed),
            (None, Some(_)) => Some(FLOOR).filter(below),
            (Some(passed), _) => {
                let mut steps = STEPS.into_iter().filter(below);
                steps.find(|step| *step > passed && *step <= self.limit)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    const NEEDED: u16 = 1340;

    /// One run on a path that passes so much: the sizes probed, its end, and whether a test is due.
    fn run(search: &mut MtuSearch, mut now: Instant, passes: u16) -> (Vec<u16>, Instant, bool) {
        let mut probes = Vec::new();
        loop {
            now = now.max(search.next_timeout().unwrap());
            let size = match search.poll(now) {
                Some(Step::Probe(size)) => size,
                Some(Step::Test) => return (probes, now, true),
                None => return (probes, now, false),
            };
            probes.push(size);
            if size <= passes {
                search.pong(now, size);
            }
        }
    }

    #[test]
    fn the_search_stops_at_the_first_step_that_fails_twice_and_repeats() {
        let mut search = MtuSearch::new(start(), NEEDED, Carries::Whole, 9000);
        let (probes, now, _) = run(&mut search, start(), 1500);
        assert_eq!(probes, [1400, 1500, 8000, 8000]);
        assert_eq!(search.known(), Some(1500));
        assert_eq!(search.next_timeout(), Some(now + REPEAT));
        // The path shrank meanwhile.
        let (probes, _, test) = run(&mut search, now, 1400);
        assert_eq!((probes, test), (vec![1340, 1400, 1500, 1500], false));
        assert_eq!(search.known(), Some(1400));
    }

    #[test]
    fn a_path_that_only_takes_fragments_is_measured_below_and_found_wide_again() {
        let mut search = MtuSearch::new(start(), 1480, Carries::Fragments, 1500);
        assert_eq!(search.known(), None);
        let (probes, now, test) = run(&mut search, start(), 1300);
        assert_eq!((probes, test), (vec![1280, 1400, 1400], false));
        assert_eq!(search.known(), Some(1280));
        assert_eq!(search.carries(), Carries::Fragments);
        let (probes, now, _) = run(&mut search, now, 1500);
        assert_eq!(probes, [1480, 1500]);
        assert_eq!(
            (search.known(), search.carries()),
            (Some(1500), Carries::Whole)
        );
        // Narrow again: whether anything large passes is for the test to say.
        let (probes, _, test) = run(&mut search, now, 1300);
        assert_eq!((probes, test), (vec![1480, 1480, 1280, 1400, 1400], true));
        assert_eq!(search.known(), Some(1280));
    }

    #[test]
    fn nothing_beyond_the_link_is_tried_and_too_big_starts_again_but_not_at_once() {
        let mut search = MtuSearch::new(start(), 1480, Carries::Whole, 1500);
        let (probes, now, _) = run(&mut search, start(), 9000);
        assert_eq!(probes, [1500]);
        search.too_big(now);
        assert_eq!(search.next_timeout(), Some(now + REPEAT));
        let later = now + TOO_BIG_REST;
        search.too_big(later);
        assert_eq!(search.next_timeout(), Some(later));
    }

    #[test]
    fn what_the_device_refuses_is_not_tried_again() {
        let mut search = MtuSearch::new(start(), NEEDED, Carries::Whole, 1500);
        assert_eq!(search.poll(start()), Some(Step::Probe(1400)));
        search.refused(start(), 1400);
        assert_eq!(search.poll(start()), None);
        assert_eq!(search.known(), Some(NEEDED));
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
            assert_eq!((wire_len(len4, v4), wire_len(len6, v6)), (wire, wire));
        }
        assert_eq!((wire_mtu(1280, v4), wire_mtu(1280, v6)), (1340, 1360));
        assert_eq!((wire_mtu(1420, v4), wire_mtu(1420, v6)), (1480, 1500));
    }
}
