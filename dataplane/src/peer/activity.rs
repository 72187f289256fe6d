//! What the shards know of a peer's traffic, in one cache line per peer: written once per batch, of
//! what is received by the owner, of what is sent by any shard; read by the control thread at any time.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::types::Activity;

/// One peer's line. Times are nanoseconds since the data plane's epoch, plus one; 0 is "never".
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct ActivityBlock {
    last_received: AtomicU64,
    last_received_direct: AtomicU64,
    last_sent: AtomicU64,
    last_handshake: AtomicU64,
    tx_bytes: AtomicU64,
    rx_bytes: AtomicU64,
    tx_relay_bytes: AtomicU64,
    rx_relay_bytes: AtomicU64,
}

/// Nanoseconds since the epoch, plus one; 0 is "never".
pub(crate) fn to_ns(epoch: Instant, at: Instant) -> u64 {
    u64::try_from(at.saturating_duration_since(epoch).as_nanos())
        .unwrap_or(u64::MAX)
        .saturating_add(1)
}

/// The reverse of [`to_ns`].
pub(crate) fn from_ns(epoch: Instant, ns: u64) -> Option<Instant> {
    epoch.checked_add(Duration::from_nanos(ns.checked_sub(1)?))
}

/// Adds without a locked instruction: only the owner receives.
fn add(counter: &AtomicU64, n: usize) {
    counter.store(counter.load(Relaxed).wrapping_add(n as u64), Relaxed);
}

impl ActivityBlock {
    /// Notes a batch of `bytes` sealed bytes received and authenticated.
    pub(crate) fn received(&self, epoch: Instant, now: Instant, bytes: usize, way: Arrived) {
        let ns = to_ns(epoch, now);
        self.last_received.store(ns, Relaxed);
        add(&self.rx_bytes, bytes);
        match way {
            Arrived::Direct => self.last_received_direct.store(ns, Relaxed),
            Arrived::OtherUdp => {}
            Arrived::Relay => add(&self.rx_relay_bytes, bytes),
        }
    }

    /// Notes sealed bytes sent, by UDP and by relay; what goes both ways counts twice.
    pub(crate) fn sent(&self, epoch: Instant, now: Instant, udp_bytes: usize, relay_bytes: usize) {
        self.last_sent.fetch_max(to_ns(epoch, now), Relaxed);
        let bytes = udp_bytes + relay_bytes;
        self.tx_bytes.fetch_add(bytes as u64, Relaxed);
        if relay_bytes > 0 {
            // Only the owner uses relays.
            add(&self.tx_relay_bytes, relay_bytes);
        }
    }

    /// Notes a completed handshake.
    pub(crate) fn handshaken(&self, epoch: Instant, now: Instant) {
        self.last_handshake.store(to_ns(epoch, now), Relaxed);
    }

    /// Reads the line. Fields written at about the same time may be of neighbouring batches.
    pub(crate) fn snapshot(&self, epoch: Instant) -> Activity {
        Activity {
            last_received: from_ns(epoch, self.last_received.load(Relaxed)),
            last_received_direct: from_ns(epoch, self.last_received_direct.load(Relaxed)),
            last_sent: from_ns(epoch, self.last_sent.load(Relaxed)),
            last_handshake: from_ns(epoch, self.last_handshake.load(Relaxed)),
            tx_bytes: self.tx_bytes.load(Relaxed),
            rx_bytes: self.rx_bytes.load(Relaxed),
            tx_relay_bytes: self.tx_relay_bytes.load(Relaxed),
            rx_relay_bytes: self.rx_relay_bytes.load(Relaxed),
        }
    }
}

/// How a batch arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrived {
    /// From the decided UDP address.
    Direct,
    /// From another UDP address.
    OtherUdp,
    /// From a relay.
    Relay,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_tells_what_was_noted() {
        let epoch = crate::sys::now();
        let at = |ms| epoch + Duration::from_millis(ms);
        let block = ActivityBlock::default();
        assert!(block.snapshot(epoch).last_received.is_none());
        block.received(epoch, at(0), 100, Arrived::Direct);
        block.received(epoch, at(5), 50, Arrived::Relay);
        block.sent(epoch, at(7), 10, 20);
        let seen = block.snapshot(epoch);
        assert_eq!(seen.last_received, Some(at(5)));
        assert_eq!(seen.last_received_direct, Some(at(0)));
        assert_eq!(seen.last_sent, Some(at(7)));
        assert_eq!((seen.rx_bytes, seen.rx_relay_bytes), (150, 50));
        assert_eq!((seen.tx_bytes, seen.tx_relay_bytes), (30, 20));
    }
}
