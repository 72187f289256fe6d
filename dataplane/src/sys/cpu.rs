//! CPU affinity.

#![forbid(unsafe_code)]

use core_affinity::CoreId;

/// Returns the CPUs of the inherited affinity mask, in order; empty if the kernel does not tell.
pub(crate) fn allowed_cpus() -> Vec<usize> {
    core_affinity::get_core_ids()
        .unwrap_or_default()
        .into_iter()
        .map(|core| core.id)
        .collect()
}

/// Pins the calling thread to `cpu`; false if the kernel refuses.
pub(crate) fn pin_to(cpu: usize) -> bool {
    core_affinity::set_for_current(CoreId { id: cpu })
}
