//! The clock: drivers read it here and pass the time on as an argument.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use tokio::sync::Notify;

/// The time now, which goes on while the machine sleeps.
pub use ringtail_dataplane::now;

/// The wall clock, by which people and keys reckon.
#[must_use]
pub fn wall() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

/// The wall clock as time since 1970, as files and the kernel have it.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "drivers own the clock")]
pub fn since_1970() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default()
}

/// The processor's time that this thread has had.
#[must_use]
pub fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let secs = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanos = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(secs, nanos)
}

/// Told by whoever notices that the machine has slept.
static RESUMED: Notify = Notify::const_new();

/// Sleeps until then, or for ever. The runtime's timers stand still while the machine sleeps, so the
/// wait is reckoned anew after [`resumed`].
pub(super) async fn at(due: Option<Instant>) {
    let Some(due) = due else {
        return std::future::pending().await;
    };
    loop {
        let resumed = RESUMED.notified();
        let rest = due.saturating_duration_since(now());
        if rest.is_zero() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            () = resumed => {}
        }
    }
}

/// The machine has slept: whoever waits in [`at`] looks at the clock again.
pub(super) fn resumed() {
    RESUMED.notify_waiters();
}
