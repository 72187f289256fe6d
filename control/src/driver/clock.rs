//! The clock: drivers read it here and pass the time on as an argument.

use std::time::Instant;

/// The time now.
#[expect(clippy::disallowed_methods, reason = "drivers own the clock")]
#[must_use]
pub fn now() -> Instant {
    Instant::now()
}
