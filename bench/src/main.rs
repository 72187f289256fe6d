//! The bench tool: link emulator and report.

fn main() {}
