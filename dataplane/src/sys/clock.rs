//! The cycle counter behind the per-room costs.

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
