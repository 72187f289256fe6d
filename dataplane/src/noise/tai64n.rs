//! The timestamps in initiations (WireGuard paper §5.1, §5.4.2): a replayed initiation has an old
//! one.

use std::time::Duration;

/// Seconds of TAI64 at the start of 1970, as every WireGuard implementation counts them: leap
/// seconds are left out, since only the order matters.
const EPOCH: u64 = 0x4000_0000_0000_000a;
/// Nanoseconds are rounded down to a multiple of this, about 16.8 ms, so that initiations do not
/// tell how long exactly things take here. It is the power of two below the 20 ms that a responder
/// wants between initiations; the kernel and wireguard-go do the same.
const GRANULARITY: u32 = 1 << 24;
const NANOS_PER_SEC: u32 = 1_000_000_000;

/// A TAI64N timestamp: seconds as u64, nanoseconds as u32, both big-endian; 12 bytes, whose order
/// is that of time. A peer's may hold anything: only the order counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tai64n(pub [u8; Tai64n::LEN]);

impl Tai64n {
    /// Length in bytes.
    pub const LEN: usize = 12;

    /// The timestamp of the next initiation to a peer: the wall clock (since the start of 1970),
    /// rounded down, or one step behind `last`, the one before, if the clock has not come that far
    /// or was set back.
    #[must_use]
    pub fn next(wall: Duration, last: Option<Tai64n>) -> Tai64n {
        let now = Tai64n::new(
            EPOCH.saturating_add(wall.as_secs()),
            wall.subsec_nanos() & !(GRANULARITY - 1),
        );
        last.map_or(now, |last| now.max(last.successor()))
    }

    fn new(secs: u64, nanos: u32) -> Tai64n {
        let mut bytes = [0; Tai64n::LEN];
        bytes[..8].copy_from_slice(&secs.to_be_bytes());
        bytes[8..].copy_from_slice(&nanos.to_be_bytes());
        Tai64n(bytes)
    }

    /// The next step of the granularity.
    fn successor(self) -> Tai64n {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = self.0;
        let secs = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        let nanos = u32::from_be_bytes([i, j, k, l]) & !(GRANULARITY - 1);
        let nanos = nanos.saturating_add(GRANULARITY);
        if nanos >= NANOS_PER_SEC {
            Tai64n::new(secs.saturating_add(1), 0)
        } else {
            Tai64n::new(secs, nanos)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_is_tai64_seconds_and_rounded_nanoseconds() {
        let wall = Duration::new(1_700_000_000, 123_456_789);
        // 123456789 is 0x075bcd15; rounding clears 24 bits.
        assert_eq!(
            Tai64n::next(wall, None).0,
            [0x40, 0, 0, 0, 0x65, 0x53, 0xf1, 0x0a, 0x07, 0, 0, 0]
        );
    }

    #[test]
    fn timestamps_grow_whatever_the_clock_does() {
        let mut last = None;
        let walls = [10.0, 10.0, 10.001, 9.0, 0.0, 10.01, 10.5, 10.999, 11.0, 3.0];
        for wall in walls.into_iter().chain([3.0; 200]) {
            let next = Tai64n::next(Duration::from_secs_f64(wall), last);
            assert!(Some(next) > last, "{next:?} after {last:?}");
            assert_eq!(next.0[9..], [0; 3], "whitened");
            assert!(next.0[8] < 60, "below a second");
            last = Some(next);
        }
    }

    #[test]
    fn the_end_of_time_does_not_panic() {
        let last = Tai64n([0xff; 12]);
        let _ = Tai64n::next(Duration::MAX, Some(last));
    }
}
