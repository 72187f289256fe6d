//! The clocks: the time that everything here is dated by, the cycle counter behind the per-room
//! costs, and what a thread has used of its core.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Returns the time to reckon with, which goes on while the machine sleeps (`CLOCK_BOOTTIME`).
///
/// An [`Instant`] of the standard library stands still in a suspend. Dated by it, keys that a peer
/// has long erased would seem fresh after one, and a direct path trusted. So this is the first call's
/// `Instant` and the boot time that has passed since, and every age in both crates is told by it:
/// it must not be mixed with `Instant::now`. A wait in the kernel does not count sleep; who waits
/// until a time asks here again afterwards. No system call: the kernel answers in user space.
#[expect(clippy::disallowed_methods, reason = "this is the clock")]
#[must_use]
pub fn now() -> Instant {
    static START: OnceLock<(Instant, Duration)> = OnceLock::new();
    let boot = read(libc::CLOCK_BOOTTIME);
    let (start, at) = *START.get_or_init(|| (Instant::now(), boot));
    start + boot.saturating_sub(at)
}

/// Returns the time spent asleep since the machine was started, to within the time that passes
/// between two readings of clocks; only its growth says anything.
#[must_use]
pub fn slept() -> Duration {
    // In this order a delay between the two makes it less, never more.
    let boot = read(libc::CLOCK_BOOTTIME);
    boot.saturating_sub(read(libc::CLOCK_MONOTONIC))
}

/// Returns the wall clock since 1970 as it is known to this process: the system's where that is ahead
/// of all it said before, else what it said before and the time since. For what must not go back:
/// the timestamps of initiations, of which peers want newer ones only.
#[must_use]
pub fn steady_wall() -> Duration {
    WALL.read(read(libc::CLOCK_BOOTTIME), read(libc::CLOCK_REALTIME))
}

/// From now on [`steady_wall`] is not behind this time since 1970, which an earlier process may have told.
pub fn steady_wall_at_least(time: Duration) {
    WALL.read(read(libc::CLOCK_BOOTTIME), time);
}

static WALL: Wall = Wall(AtomicU64::new(0));

/// A wall clock that never goes back, as the time at which the boot clock was zero, in nanoseconds
/// since 1970.
struct Wall(AtomicU64);

impl Wall {
    fn read(&self, boot: Duration, system: Duration) -> Duration {
        let nanos = system.saturating_sub(boot).as_nanos();
        // Enough for five hundred years.
        let start = u64::try_from(nanos).unwrap_or(u64::MAX);
        let latest = self.0.fetch_max(start, Ordering::Relaxed).max(start);
        Duration::from_nanos(latest).saturating_add(boot)
    }
}

fn read(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is writable for the length of the call.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// Returns the processor time of the calling thread since its start.
pub(crate) fn thread_time() -> Duration {
    read(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Returns the processor's time-stamp counter: constant rate on every machine of interest, about
/// 20 cycles to read, no system call. Elsewhere the monotonic clock in nanoseconds stands in.
#[cfg(target_arch = "x86_64")]
pub(crate) fn cycles() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux leaves it enabled in user mode.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Returns the monotonic clock in nanoseconds, where no cycle counter is at hand.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn cycles() -> u64 {
    u64::try_from(read(libc::CLOCK_MONOTONIC).as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_goes_on_as_the_clock_of_the_standard_library_does_while_nobody_sleeps() {
        // Theirs is read first and last, so that a thread that has to wait in between makes it longer.
        let (theirs, ours, slept) = (std_now(), now(), slept());
        let mut passed = Duration::ZERO;
        while passed < Duration::from_millis(20) {
            passed = now() - ours;
        }
        let theirs = std_now() - theirs;
        assert!(theirs >= passed, "{theirs:?} {passed:?}");
        assert!(self::slept() < slept + Duration::from_secs(1));
    }

    #[expect(clippy::disallowed_methods, reason = "the clock to compare with")]
    fn std_now() -> Instant {
        Instant::now()
    }

    #[test]
    fn the_wall_clock_follows_the_systems_ahead_and_never_back() {
        let secs = Duration::from_secs;
        let wall = Wall(AtomicU64::new(0));
        assert_eq!(wall.read(secs(100), secs(1_000_000)), secs(1_000_000));
        assert_eq!(wall.read(secs(101), secs(1_000_001)), secs(1_000_001));
        // Set back by a day: it goes on by the boot clock.
        assert_eq!(wall.read(secs(103), secs(913_603)), secs(1_000_003));
        // Set ahead.
        assert_eq!(wall.read(secs(104), secs(1_000_010)), secs(1_000_010));
        assert_eq!(
            wall.read(secs(105), secs(0)),
            secs(1_000_011),
            "before 1970"
        );
        assert_eq!(wall.read(secs(106), secs(1_000_012)), secs(1_000_012));
        wall.read(secs(107), Duration::MAX);
        assert!(wall.read(secs(108), secs(5)) > secs(u64::MAX / 1_000_000_000));
    }

    #[test]
    fn a_time_that_was_told_before_is_not_told_again() {
        let told = steady_wall() + Duration::from_secs(3600);
        steady_wall_at_least(told);
        let next = steady_wall();
        assert!(next >= told && next < told + Duration::from_secs(60));
    }

    #[test]
    fn thread_time_counts_work() {
        let before = thread_time();
        let mut sum = 0u64;
        for i in 0..3_000_000u64 {
            sum = std::hint::black_box(sum.wrapping_add(i));
        }
        let used = thread_time() - before;
        assert!(used > Duration::from_micros(300), "{used:?} for {sum}");
    }
}
