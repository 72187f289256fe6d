//! Which of our addresses to send from: where a host has several uplinks and a route per source
//! address, what leaves with the wrong one is dropped on the way, or does not pass the peer's NAT.
//!
//! A Ping is answered from the address it came to; that is the caller's. Everything else to an
//! address of a peer leaves from where that address reaches us: the address of ours that its last
//! Pong came to, or without a Pong lately the one that its last Ping came to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use crate::path::{Heard, PING_TIMEOUT};

/// Addresses of peers that are remembered.
const SOURCES_MAX: usize = 16_384;

/// By the peer's address.
#[derive(Debug, Default)]
pub(super) struct Sources(BTreeMap<SocketAddr, Source>);

#[derive(Clone, Copy, Debug)]
struct Source {
    local: IpAddr,
    /// When something came from there last, and when a Pong did.
    heard: Instant,
    pong: Option<Instant>,
}

impl Sources {
    /// Something authentic came from a peer's address to one of ours.
    pub(super) fn heard(&mut self, now: Instant, from: SocketAddr, local: IpAddr, what: Heard) {
        let pong = (what == Heard::Pong).then_some(now);
        if !self.0.contains_key(&from) && self.0.len() >= SOURCES_MAX {
            let quietest = self.0.iter().min_by_key(|(_, source)| source.heard);
            if let Some(quietest) = quietest.map(|(addr, _)| *addr) {
                self.0.remove(&quietest);
            }
        }
        let fresh = Source {
            local,
            heard: now,
            pong,
        };
        let source = self.0.entry(from).or_insert(fresh);
        let proved = |at: Instant| now.saturating_duration_since(at) < PING_TIMEOUT;
        if source.local == local {
            source.heard = now;
            source.pong = pong.or(source.pong);
        } else if !source.pong.is_some_and(proved) {
            *source = fresh;
        }
    }

    /// What to send from to a peer's address; `None` leaves it to routing.
    pub(super) fn of(&self, to: SocketAddr) -> Option<IpAddr> {
        self.0.get(&to).map(|source| source.local)
    }

    /// These are our addresses now.
    pub(super) fn retain(&mut self, ours: &BTreeSet<IpAddr>) {
        self.0.retain(|_, source| ours.contains(&source.local));
    }

    /// The network under us is another one.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::start;

    fn ours(last: u8) -> IpAddr {
        IpAddr::from([198, 51, 100, last])
    }

    fn peer(last: u8) -> SocketAddr {
        SocketAddr::from(([203, 0, 113, last], 41641))
    }

    #[test]
    fn the_address_that_a_pong_came_to_stays_while_pongs_come() {
        let now = start();
        let mut sources = Sources::default();
        assert_eq!(sources.of(peer(1)), None);
        sources.heard(now, peer(1), ours(1), Heard::Ping);
        sources.heard(now, peer(1), ours(2), Heard::Ping);
        assert_eq!(sources.of(peer(1)), Some(ours(2)), "the last Ping's");
        sources.heard(now, peer(1), ours(1), Heard::Pong);
        sources.heard(now, peer(1), ours(2), Heard::Ping);
        assert_eq!(sources.of(peer(1)), Some(ours(1)), "the Pong's");
        let later = now + PING_TIMEOUT;
        sources.heard(
            later - Duration::from_millis(1),
            peer(1),
            ours(2),
            Heard::Ping,
        );
        assert_eq!(sources.of(peer(1)), Some(ours(1)));
        sources.heard(later, peer(1), ours(2), Heard::Ping);
        assert_eq!(sources.of(peer(1)), Some(ours(2)), "no Pong lately");
        assert_eq!(sources.of(peer(2)), None, "of another peer");
    }

    #[test]
    fn an_address_that_is_not_ours_any_more_is_forgotten() {
        let now = start();
        let mut sources = Sources::default();
        sources.heard(now, peer(1), ours(1), Heard::Pong);
        sources.heard(now, peer(2), ours(2), Heard::Pong);
        sources.retain(&BTreeSet::from([ours(2)]));
        assert_eq!(
            (sources.of(peer(1)), sources.of(peer(2))),
            (None, Some(ours(2)))
        );
        sources.clear();
        assert_eq!(sources.of(peer(2)), None);
    }

    #[test]
    fn the_table_has_a_bound_and_forgets_the_quietest() {
        let now = start();
        let mut sources = Sources::default();
        for n in 0..=u32::try_from(SOURCES_MAX).unwrap() {
            let at = now + Duration::from_millis(n.into());
            let from = SocketAddr::from((std::net::Ipv4Addr::from(n), 1));
            sources.heard(at, from, ours(1), Heard::Ping);
        }
        assert_eq!(sources.0.len(), SOURCES_MAX);
        assert!(!sources.0.contains_key(&"0.0.0.0:1".parse().unwrap()));
    }
}
