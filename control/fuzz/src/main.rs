//! Feeds libFuzzer's inputs to the target that RINGTAIL_FUZZ names.
#![no_main]

use std::sync::LazyLock;
use std::time::Instant;

static TARGET: LazyLock<fn(Instant, &[u8])> = LazyLock::new(|| {
    let wanted = std::env::var("RINGTAIL_FUZZ").expect("RINGTAIL_FUZZ names a target");
    let targets = ringtail_dataplane::fuzzing::TARGETS;
    let mut all = targets.iter().chain(ringtail::fuzzing::TARGETS);
    let (_, run) = all
        .find(|(name, _)| *name == wanted)
        .expect("there is such a target");
    *run
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| TARGET(Instant::now(), bytes));
