//! The rate limit per source (WireGuard paper §5.3), for handshakes twenty messages a second and five
//! at once from one IPv4 address or one IPv6 /64, as in the kernel and wireguard-go. (wireguard-go
//! counts whole IPv6 addresses; a host commands at least a /64 of them.)
//!
//! The table has a fixed number of places in sets of a few. A source whose bucket is full again is
//! as good as forgotten, so its place is taken by the next that needs one: there is nothing to
//! sweep, and forgetting never gives anybody more than the limit. Where every place of a set is in
//! use, a new source is refused. Sources are hashed with a key of our own, so nobody can choose
//! addresses that meet in a set.

use std::hash::BuildHasher as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Handshake messages one source may send a second.
pub(super) const PER_SOURCE_PER_SECOND: u32 = 20;
/// Handshake messages one source may send at once.
pub(super) const PER_SOURCE_BURST: u32 = 5;
/// Sources known at a time, at most; 16 bytes each.
#[cfg(test)]
pub(crate) const SOURCES_MAX: usize = SETS * WAYS;

const SETS: usize = 4096;
const WAYS: usize = 4;

/// A source and the moment, in nanoseconds since the table was made, at which its bucket is full.
#[derive(Clone, Copy, Default)]
struct Place {
    source: u64,
    full_at: u64,
}

pub(crate) struct Sources {
    start: Instant,
    /// What one message takes, and what a bucket may lack before it, in nanoseconds.
    cost: u64,
    lack_max: u64,
    hasher: std::hash::RandomState,
    /// Empty until the first is needed.
    places: Box<[[Place; WAYS]]>,
}

impl Sources {
    /// Each source may send `per_second` messages a second, and `burst` at once; both at least one.
    pub(crate) fn new(now: Instant, per_second: u32, burst: u32) -> Sources {
        let cost = nanos(Duration::from_secs(1) / per_second);
        Sources {
            start: now,
            cost,
            lack_max: cost * u64::from(burst - 1),
            hasher: std::hash::RandomState::new(),
            places: Box::default(),
        }
    }

    /// Takes one message from a source's bucket; false if it is empty.
    pub(crate) fn allow(&mut self, now: Instant, from: IpAddr) -> bool {
        self.take(now, source(from))
    }

    /// The same for what is told apart by something else than an address.
    pub(crate) fn take(&mut self, now: Instant, source: u64) -> bool {
        if self.places.is_empty() {
            self.places = vec![[Place::default(); WAYS]; SETS].into();
        }
        let now = nanos(now.saturating_duration_since(self.start));
        let set = usize::try_from(self.hasher.hash_one(source) % SETS as u64).unwrap_or(0);
        let set = &mut self.places[set];
        let known = set.iter().position(|place| place.source == source);
        let Some(at) = known.or_else(|| set.iter().position(|place| place.full_at <= now)) else {
            return false;
        };
        let place = &mut set[at];
        let full_at = if place.source == source {
            place.full_at.max(now)
        } else {
            now
        };
        place.source = source;
        if full_at - now > self.lack_max {
            return false;
        }
        place.full_at = full_at + self.cost;
        true
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 2)
}

/// One number per limited source. IPv4 addresses get a prefix that no IPv6 network can have: those
/// of `ff..` are multicast and send nothing.
pub(super) fn source(from: IpAddr) -> u64 {
    match from {
        IpAddr::V4(ip) => (0xff << 56) | u64::from(ip.to_bits()),
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => source(IpAddr::V4(ip)),
            None => u64::try_from(ip.to_bits() >> 64).unwrap_or(0),
        },
    }
}
