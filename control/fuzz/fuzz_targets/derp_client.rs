#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ringtail::fuzzing::derp_client(std::time::Instant::now(), bytes);
});
