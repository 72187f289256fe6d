#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringtail::fuzzing::map_stream(bytes));
