#![no_main]

use std::time::Instant;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ringtail_dataplane::fuzzing::handshake(Instant::now(), bytes)
});
