//! Rates, rests, and the names of what is dropped.

use std::time::{Duration, Instant};

use ringtail_dataplane::named;

use crate::rate::{Bucket, Rate};

/// Pings sent to one peer per second.
pub(super) const PEER_PINGS_PER_S: u32 = 50;
/// Of these, kept back for answers, heartbeats and validation when a round takes its share.
pub(super) const ROUND_RESERVE: u32 = 15;
/// Pongs sent to one peer per second.
pub(super) const PEER_PONGS_PER_S: u32 = 120;
/// Of these, kept back for addresses that answer when another asks: who sends a peer's old Pings again
/// cannot use up what its own are answered from.
pub(super) const PONG_RESERVE: u32 = 20;
/// CallMeMaybes taken of one peer per second: each may have us ping 64 addresses.
pub(super) const PEER_CALLS_PER_S: u32 = 10;
/// Datagrams opened per second that bear one DISCO key. A peer sends a tenth of it at most.
pub(super) const KEY_OPENS_PER_S: u32 = 1000;
/// Of these, kept back for what comes by relay or from where the peer is known to be: anybody can
/// write its key on a datagram.
pub(super) const OPENS_RESERVE: u32 = 500;
/// Pings sent by the node per second.
pub(super) const NODE_PINGS_PER_S: u32 = 1000;

/// Limits what is done to so many times per second, and so many at once: a bucket of thousandths, so
/// that no part of one is lost between two that are close to each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit(Bucket);

impl Limit {
    pub(super) fn new(now: Instant, per_s: u32) -> Self {
        let per_second = u64::from(per_s) * 1000;
        let burst = per_second;
        Self(Bucket::new(Rate { per_second, burst }, now))
    }

    /// Takes one unless that leaves fewer than `reserve`.
    pub(super) fn take(&mut self, now: Instant, reserve: u32) -> bool {
        self.0.refill(now);
        self.0.take_above(1000, u64::from(reserve) * 1000)
    }
}

/// Whether what was done `last` then, or never, was done so long ago.
pub(super) fn rested(now: Instant, last: Option<Instant>, time: Duration) -> bool {
    last.is_none_or(|at| now.saturating_duration_since(at) >= time)
}

named! {
    /// Why a datagram, or something of our own, was dropped. All are counted by name.
    pub enum Drop {
        /// No DISCO datagram.
        NotDisco = "disco_not_disco",
        /// DISCO through a peer relay.
        PeerRelay = "disco_peer_relay",
        /// The sender's DISCO key is no peer's.
        UnknownSender = "disco_unknown_sender",
        /// Damaged, or sealed with another key.
        Forged = "disco_forged",
        /// The plain text is cut off.
        Malformed = "disco_malformed",
        /// A message type nobody has defined.
        UnknownType = "disco_unknown_type",
        /// Seen before, by its nonce.
        Replayed = "disco_replayed",
        /// Not opened, because too many bear this sender's key.
        OpenRate = "disco_open_rate",
        /// A CallMeMaybe not taken, because the peer sends too many.
        CallRate = "disco_call_rate",
        /// A Ping seen before.
        DuplicatePing = "disco_duplicate_ping",
        /// A Pong to no Ping of ours, or to one forgotten.
        UnknownPong = "disco_unknown_pong",
        /// A CallMeMaybe over UDP, where anyone can replay it.
        CallMeMaybeOverUdp = "disco_call_me_maybe_over_udp",
        /// By relay, from a node key that does not own the DISCO key.
        WrongRelaySource = "disco_wrong_relay_source",
        /// From an address that can be nobody's: unspecified, multicast, loopback, port 0.
        BadSource = "disco_bad_source",
        /// A Pong not sent because the peer pings too much.
        PongRate = "disco_pong_rate",
        /// A Ping not sent because the peer's share, or the node's, is used up.
        PingRate = "disco_ping_rate",
        /// No room for another candidate.
        CandidatesFull = "path_candidates_full",
        /// A Ping forgotten before its time for want of room.
        PingsFull = "path_pings_full",
        /// A datagram not queued because the driver does not fetch them.
        TransmitsFull = "path_transmits_full",
        /// An event lost because the driver does not fetch them.
        EventsFull = "path_events_full",
    }
}

impl std::error::Error for Drop {}

#[cfg(test)]
mod tests {
    use ringtail_dataplane::stats::Counts;

    use super::*;

    #[test]
    fn a_bucket_gives_its_rate_and_keeps_its_reserve() {
        let start = crate::testing::start();
        let mut bucket = Limit::new(start, 50);
        let taken = |bucket: &mut Limit, now, reserve| {
            (0..100).filter(|_| bucket.take(now, reserve)).count()
        };
        assert_eq!(taken(&mut bucket, start, 15), 35);
        assert_eq!(taken(&mut bucket, start, 0), 15);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(100), 0), 5);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(9), 0), 50);
    }

    #[test]
    fn counters_are_in_the_order_of_the_names() {
        let mut counters = Counts::new(Drop::ALL);
        counters.count(Drop::EventsFull);
        let named = || counters.iter().map(|(drop, n)| (drop.name(), n));
        assert_eq!(named().last(), Some(("path_events_full", 1)));
        assert_eq!(named().map(|(_, n)| n).sum::<u64>(), 1);
    }
}
