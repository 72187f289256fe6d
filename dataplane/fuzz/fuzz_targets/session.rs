#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ringtail_dataplane::fuzzing::session(std::time::Instant::now(), bytes);
});
