//! The clocks of this tool: all reading of time and all sleeping is here.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The monotonic clock, for spans.
#[expect(clippy::disallowed_methods, reason = "the driver's clock")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Nanoseconds since the Unix epoch, the time base of event files.
#[expect(clippy::disallowed_methods, reason = "the driver's clock")]
pub(crate) fn unix_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Sleeps for `span`.
#[expect(
    clippy::disallowed_methods,
    reason = "a measuring tool waits for what it measures"
)]
pub(crate) fn sleep(span: Duration) {
    std::thread::sleep(span);
}
