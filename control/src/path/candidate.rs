//! Candidates: addresses at which a peer may be reached, and where we know them from.
//!
//! A candidate lives while some source still names it: the network map, the latest CallMeMaybe, a
//! Ping (or packets) received from it in the last 45 s, or the memory of an earlier run.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::limit::rested;
use super::{
    CANDIDATES_ALL_MAX, CANDIDATES_MAX, CANDIDATES_MIN, DISCO_PING_INTERVAL, QUICK_PINGS,
    SESSION_ACTIVE_TIMEOUT,
};
use crate::disco::TxId;

/// Unanswered rounds that a remembered address is given.
const CACHED_ROUNDS_MAX: u8 = 3;

/// Pinged so lately, a candidate need not be asked again because the best address is doubted.
const DOUBT_REST: Duration = Duration::from_millis(500);

/// What we know of one address.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidate {
    /// The network map names it.
    pub(super) in_map: bool,
    /// When a CallMeMaybe named it last.
    pub(super) called_at: Option<Instant>,
    /// When a Ping or an authenticated packet came from it last.
    pub(super) heard_at: Option<Instant>,
    /// It worked in an earlier run; the number of rounds it has not answered since.
    pub(super) cached: Option<u8>,
    /// The last Ping received from it.
    pub(super) last_got: Option<TxId>,
    /// When a round pinged it last; the 5 s limit counts from here.
    pub(super) last_round: Option<Instant>,
    /// When any Ping left for it last.
    pub(super) last_ping: Option<Instant>,
    /// The quick Pings that follow a round's: its time, and how many have gone.
    pub(super) quick: Option<(Instant, usize)>,
    /// Its last Pong and round trip.
    pub(super) pong: Option<(Instant, Duration)>,
    /// It became a candidate because packets came from it, at this time.
    pub(super) new_source_at: Option<Instant>,
    /// It failed validation and is left alone until then.
    pub(super) blocked_until: Option<Instant>,
    /// By its last test, full packets pass in fragments only.
    pub(super) fragments: bool,
    /// By its last test, they do not pass at all: no data goes there while the next one runs.
    pub(super) narrow: bool,
}

impl Candidate {
    /// Whether no source names it any more.
    fn deletable(&self, now: Instant) -> bool {
        let heard = self
            .heard_at
            .is_some_and(|at| now.saturating_duration_since(at) <= SESSION_ACTIVE_TIMEOUT);
        !self.in_map && self.called_at.is_none() && self.cached.is_none() && !heard
    }

    /// Whether a round may ping it now.
    pub(super) fn due(&self, now: Instant) -> bool {
        rested(now, self.last_round, DISCO_PING_INTERVAL) && !self.blocked(now)
    }

    /// Whether it failed validation a short time ago.
    pub(super) fn blocked(&self, now: Instant) -> bool {
        self.blocked_until.is_some_and(|until| now < until)
    }

    /// When the next quick Ping is due.
    pub(super) fn quick_at(&self) -> Option<Instant> {
        let (base, done) = self.quick?;
        QUICK_PINGS.get(done).map(|after| base + *after)
    }

    /// Whether it answered within this time.
    pub(super) fn answered_within(&self, now: Instant, time: Duration) -> bool {
        self.pong
            .is_some_and(|(at, _)| now.saturating_duration_since(at) <= time)
    }

    /// Forgets how it behaved, not where it is known from.
    pub(super) fn wipe(&mut self) {
        (self.last_round, self.last_ping, self.quick) = (None, None, None);
        (self.pong, self.blocked_until) = (None, None);
        (self.fragments, self.narrow) = (false, false);
    }
}

/// The candidates of one peer.
#[derive(Clone, Debug)]
pub(super) struct Candidates {
    by_addr: BTreeMap<SocketAddr, Candidate>,
    max: usize,
}

impl Default for Candidates {
    fn default() -> Self {
        Self {
            by_addr: BTreeMap::new(),
            max: CANDIDATES_MAX,
        }
    }
}

/// How many candidates each of so many peers may have.
pub(crate) fn candidates_max(peers: usize) -> usize {
    let share = CANDIDATES_ALL_MAX / peers.max(1);
    share.clamp(CANDIDATES_MIN, CANDIDATES_MAX)
}

impl Candidates {
    /// Sets how many there may be; those that are there already stay for as long as they are named.
    pub(super) fn set_max(&mut self, max: usize) {
        self.max = max;
    }

    pub(super) fn get(&self, addr: &SocketAddr) -> Option<&Candidate> {
        self.by_addr.get(addr)
    }

    pub(super) fn get_mut(&mut self, addr: &SocketAddr) -> Option<&mut Candidate> {
        self.by_addr.get_mut(addr)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&SocketAddr, &Candidate)> {
        self.by_addr.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (&SocketAddr, &mut Candidate)> {
        self.by_addr.iter_mut()
    }

    /// The candidate at `addr`, made if need be. When the table is full, deletable ones go, and then
    /// the one known from its packets alone that was quiet for longest; none if all are still named.
    pub(super) fn entry(&mut self, now: Instant, addr: SocketAddr) -> Option<&mut Candidate> {
        if !self.by_addr.contains_key(&addr) && self.by_addr.len() >= self.max {
            self.by_addr
                .retain(|_, candidate| !candidate.deletable(now));
        }
        if !self.by_addr.contains_key(&addr) && self.by_addr.len() >= self.max {
            let only_heard = self.by_addr.iter().filter(|(_, candidate)| {
                !candidate.in_map && candidate.called_at.is_none() && candidate.cached.is_none()
            });
            let quietest = only_heard.min_by_key(|(_, candidate)| candidate.heard_at);
            let quietest = *quietest?.0;
            self.by_addr.remove(&quietest);
        }
        Some(self.by_addr.entry(addr).or_default())
    }

    /// Takes the network map's endpoints. Returns `(new, full)`: whether one is new, and whether there was
    /// no room for one; those that it no longer names become deletable, and remembered ones that it does
    /// not name are forgotten.
    pub(super) fn set_map(&mut self, now: Instant, endpoints: &[SocketAddr]) -> (bool, bool) {
        for (addr, candidate) in &mut self.by_addr {
            candidate.in_map = endpoints.contains(addr);
        }
        let (mut new, mut full) = (false, false);
        for addr in endpoints {
            new |= !self.by_addr.contains_key(addr);
            match self.entry(now, *addr) {
                Some(candidate) => candidate.in_map = true,
                None => full = true,
            }
        }
        (new, full)
    }

    /// All may be pinged by a round now, but those that have just been.
    pub(super) fn end_rest(&mut self, now: Instant) {
        for candidate in self.by_addr.values_mut() {
            if rested(now, candidate.last_ping, DOUBT_REST) {
                candidate.last_round = None;
            }
        }
    }

    /// Forgets remembered addresses that nothing else names: the peer has moved.
    pub(super) fn forget_cached(&mut self) {
        for candidate in self.by_addr.values_mut() {
            candidate.cached = None;
        }
    }

    /// Takes the endpoints of a CallMeMaybe and removes what only an earlier one named, but `keep`.
    /// Returns `(removed, full)`: those that went, and whether there was no room for one.
    pub(super) fn set_called(
        &mut self,
        now: Instant,
        endpoints: &[SocketAddr],
        keep: Option<SocketAddr>,
    ) -> (Vec<SocketAddr>, bool) {
        let mut removed = Vec::new();
        self.by_addr.retain(|addr, candidate| {
            let named = candidate.called_at.is_none() || endpoints.contains(addr);
            let keep = named || Some(*addr) == keep;
            if !keep {
                removed.push(*addr);
            }
            keep
        });
        let mut full = false;
        for addr in endpoints {
            match self.entry(now, *addr) {
                Some(candidate) => candidate.called_at = Some(now),
                None => full = true,
            }
        }
        (removed, full)
    }

    /// Removes what nothing names any more, but `keep`.
    pub(super) fn sweep(&mut self, now: Instant, keep: Option<SocketAddr>) {
        self.by_addr
            .retain(|addr, candidate| Some(*addr) == keep || !candidate.deletable(now));
    }

    /// A round ended without a Pong: remembered addresses have a limited number of these.
    pub(super) fn round_unanswered(&mut self, round_at: Instant) {
        for candidate in self.by_addr.values_mut() {
            let answered = candidate.pong.is_some_and(|(at, _)| at >= round_at);
            if candidate.last_round.is_some_and(|at| at >= round_at) && !answered {
                candidate.cached = candidate
                    .cached
                    .map(|rounds| rounds + 1)
                    .filter(|rounds| *rounds < CACHED_ROUNDS_MAX);
            }
        }
    }
}

/// Which addresses can be candidates at all.
#[derive(Clone, Debug, Default)]
pub(super) struct Admission {
    pub(super) loopback: bool,
    /// The nodes' own inner addresses: nothing is pinged through the tunnel.
    pub(super) inner: BTreeSet<IpAddr>,
}

impl Admission {
    /// Whether an address may be pinged.
    pub(super) fn admits(&self, addr: SocketAddr) -> bool {
        let ip = addr.ip();
        let never = match ip {
            IpAddr::V4(ip) => ip.is_broadcast(),
            IpAddr::V6(_) => false,
        };
        let inner = self.inner.contains(&ip);
        let nobody = ip.is_unspecified() || ip.is_multicast() || never || addr.port() == 0;
        !nobody && !inner && (self.loopback || !ip.is_loopback())
    }

    /// As [`Self::admits`], for addresses that the peer names: a link-local one has no meaning
    /// without its interface.
    pub(super) fn admits_named(&self, addr: SocketAddr) -> bool {
        let link_local = match addr.ip() {
            IpAddr::V4(_) => false,
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        self.admits(addr) && !link_local
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    fn addr(n: u8) -> SocketAddr {
        SocketAddr::from(([203, 0, 113, n], 41641))
    }

    #[test]
    fn a_newer_call_me_maybe_removes_what_only_an_earlier_one_named() {
        let now = start();
        let mut all = Candidates::default();
        let _ = all.set_map(now, &[addr(1)]);
        all.set_called(now, &[addr(2), addr(3)], None);
        let (removed, _) = all.set_called(now, &[addr(3)], None);
        assert_eq!(removed, [addr(2)]);
        assert!(all.get(&addr(1)).is_some() && all.get(&addr(3)).is_some());
        let (removed, _) = all.set_called(now, &[], Some(addr(3)));
        assert!(removed.is_empty() && all.get(&addr(3)).is_some());
    }

    #[test]
    fn candidates_go_when_nothing_names_them_any_more() {
        let now = start();
        let mut all = Candidates::default();
        let _ = all.set_map(now, &[addr(1)]);
        all.entry(now, addr(2)).unwrap().heard_at = Some(now);
        let _ = all.set_map(now, &[]);
        all.sweep(now + SESSION_ACTIVE_TIMEOUT, None);
        assert!(all.get(&addr(1)).is_none() && all.get(&addr(2)).is_some());
        all.sweep(
            now + SESSION_ACTIVE_TIMEOUT + Duration::from_millis(1),
            None,
        );
        assert!(all.get(&addr(2)).is_none());
    }

    #[test]
    fn a_full_table_gives_up_the_quietest_stranger_and_never_a_named_one() {
        let now = start();
        let named: Vec<SocketAddr> = (1..=120).map(addr).collect();
        let mut all = Candidates::default();
        let _ = all.set_map(now, &named);
        for n in 0..20 {
            let at = now + Duration::from_millis(u64::from(n));
            all.entry(at, addr(200 + n)).unwrap().heard_at = Some(at);
        }
        assert_eq!(all.iter().count(), CANDIDATES_MAX);
        assert!(named.iter().all(|addr| all.get(addr).is_some()));
        assert!(all.get(&addr(200)).is_none() && all.get(&addr(219)).is_some());
        let (_, full) = all.set_map(now, &(1..=129).map(addr).collect::<Vec<_>>());
        assert!(full);
    }

    #[test]
    fn peers_of_a_large_network_have_fewer_each() {
        assert_eq!([1, 2_048].map(candidates_max), [CANDIDATES_MAX; 2]);
        for peers in 1..=ringtail_dataplane::PEERS_MAX {
            let each = candidates_max(peers);
            assert!(each * peers <= CANDIDATES_ALL_MAX && each >= CANDIDATES_MIN);
        }
        let now = start();
        let mut all = Candidates::default();
        let _ = all.set_map(now, &(1..=20).map(addr).collect::<Vec<_>>());
        all.set_max(candidates_max(10_000));
        let (_, full) = all.set_called(now, &(100..=164).map(addr).collect::<Vec<_>>(), None);
        assert_eq!((all.iter().count(), full), (26, true));
    }

    #[test]
    fn a_remembered_address_gets_three_rounds() {
        let now = start();
        let mut all = Candidates::default();
        all.entry(now, addr(1)).unwrap().cached = Some(0);
        for round in 1..=3 {
            assert!(all.get(&addr(1)).is_some(), "round {round}");
            all.get_mut(&addr(1)).unwrap().last_round = Some(now);
            all.round_unanswered(now);
            all.sweep(now, None);
        }
        assert!(all.get(&addr(1)).is_none());
    }

    #[test]
    fn addresses_that_are_nobodys_are_not_admitted() {
        let mut admission = Admission {
            loopback: false,
            inner: BTreeSet::from(
                ["100.100.1.1", "fd7a:115c:a1e0::1"].map(|ip| ip.parse().unwrap()),
            ),
        };
        for (text, admitted, named) in [
            ("203.0.113.7:1", true, true),
            ("192.168.1.1:1", true, true),
            ("203.0.113.7:0", false, false),
            ("0.0.0.0:1", false, false),
            ("255.255.255.255:1", false, false),
            ("224.0.0.1:1", false, false),
            ("127.0.0.1:1", false, false),
            ("[::1]:1", false, false),
            ("[ff02::1]:1", false, false),
            ("[fe80::1]:1", true, false),
            ("[2001:db8::1]:1", true, true),
            ("100.100.1.1:1", false, false),
            ("100.100.1.2:1", true, true),
            ("[fd7a:115c:a1e0::1]:1", false, false),
        ] {
            let addr = text.parse().unwrap();
            assert_eq!(admission.admits(addr), admitted, "{text}");
            assert_eq!(admission.admits_named(addr), named, "{text}");
        }
        admission.loopback = true;
        assert!(admission.admits("127.0.0.1:1".parse().unwrap()));
    }
}
