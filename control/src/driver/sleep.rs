//! Notices that the machine has slept.
//!
//! The kernel wakes nobody for that by itself: timers go on where they stood. But a timer of the wall
//! clock with `TFD_TIMER_CANCEL_ON_SET` ends at once when that clock jumps, and after a suspend it
//! does, also where nobody sets it. Whether it was a suspend, two other clocks tell: the one that counts
//! sleep has gained on the one that does not. Who runs anyway may look at them at any time.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::unix::AsyncFd;

use super::{clock, runtime};

/// Shorter sleeps change nothing that matters; differences between two readings of the clocks are
/// far below it.
const SLEEP_MIN: Duration = Duration::from_secs(1);
/// The timer never rings in earnest: its time is the end of what 32 bits of seconds can tell.
const NEVER: i64 = u32::MAX as i64;

/// Watches the clocks.
pub(super) struct Watch {
    /// None where the kernel refuses it: then sleep is noticed at the next look.
    timer: Option<AsyncFd<OwnedFd>>,
    slept: Duration,
}

impl Watch {
    /// Sleep counts from here.
    pub(super) fn new() -> Self {
        let timer = timer().inspect_err(|error| {
            tracing::warn!(%error, "a suspend will be noticed late");
        });
        Self {
            timer: timer.ok(),
            slept: ringtail_dataplane::slept(),
        }
    }

    /// How long the machine has slept since the last look; whoever waits in [`clock::at`] is told.
    pub(super) fn look(&mut self) -> Option<Duration> {
        let slept = self.gained(ringtail_dataplane::slept())?;
        clock::resumed();
        tracing::info!(?slept, "the machine has slept");
        Some(slept)
    }

    fn gained(&mut self, slept: Duration) -> Option<Duration> {
        // What is too short is kept, and adds up to what a later look finds.
        let gained = slept.checked_sub(self.slept)?;
        if gained < SLEEP_MIN {
            return None;
        }
        self.slept = slept;
        Some(gained)
    }

    /// Waits until it is time for a look: the wall clock has jumped.
    pub(super) async fn jump(&self) {
        let Some(timer) = &self.timer else {
            return std::future::pending().await;
        };
        let Ok(mut ready) = timer.readable().await else {
            return std::future::pending().await;
        };
        // ECANCELED, and with that it is unreadable until the next jump.
        let _ = rustix::io::read(timer.get_ref(), &mut [0; 8]);
        ready.clear_ready();
    }
}

/// Watches for ever, for the sake of those who wait in [`clock::at`].
pub(super) async fn watch() {
    let mut watch = Watch::new();
    loop {
        watch.jump().await;
        watch.look();
    }
}

fn timer() -> std::io::Result<AsyncFd<OwnedFd>> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let never = Itimerspec {
        it_interval: zero,
        it_value: Timespec {
            tv_sec: NEVER,
            ..zero
        },
    };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    timerfd_settime(&timer, flags, &never)?;
    runtime::watch_descriptor(timer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "local")]
    async fn without_a_jump_of_the_wall_clock_nothing_is_noticed() {
        let mut watch = Watch::new();
        assert!(watch.timer.is_some());
        let waited = tokio::time::timeout(Duration::from_millis(20), watch.jump()).await;
        assert!(waited.is_err(), "no jump");
        assert!(watch.look().is_none());
    }

    #[test]
    fn short_sleeps_add_up_and_a_late_reading_counts_for_nothing() {
        let ms = Duration::from_millis;
        let mut watch = Watch {
            timer: None,
            slept: ms(500),
        };
        assert_eq!(watch.gained(ms(1100)), None);
        assert_eq!(
            watch.gained(ms(300)),
            None,
            "the thread was held up between the clocks"
        );
        assert_eq!(watch.gained(ms(1400)), None);
        assert_eq!(watch.gained(ms(1600)), Some(ms(1100)));
        assert_eq!(watch.gained(ms(1600)), None);
    }
}
