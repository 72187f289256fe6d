//! The cycle counter behind the per-room costs, and what a thread has used of its core.

use std::time::Duration;

/// Returns the processor time of the calling thread since its start.
pub(crate) fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is writable for the length of the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
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
#[expect(clippy::disallowed_methods, reason = "this is the clock")]
pub(crate) fn cycles() -> u64 {
    use std::sync::OnceLock;
    use std::time::Instant;
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

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
