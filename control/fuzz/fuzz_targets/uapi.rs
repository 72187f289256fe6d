#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ringtail::fuzzing::uapi(bytes));
