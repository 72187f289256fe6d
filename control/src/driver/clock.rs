//! The clock: drivers read it here and pass the time on as an argument.

use std::time::Instant;

/// The time now.
#[expect(clippy::disallowed_methods, reason = "drivers own the clock")]
#[must_use]
pub fn now() -> Instant {
    Instant::now()
}

/// Sleeps until then, or for ever.
pub(super) async fn at(due: Option<impl Into<tokio::time::Instant>>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
