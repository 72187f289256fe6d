//! The `ringtail` program.
#![forbid(unsafe_code)]

fn main() {}
