//! What tests of many rooms begin with.

#![forbid(unsafe_code)]

use rand::SeedableRng;
use rand::rngs::StdRng;

/// A generator whose seed is another in every run; a test that fails shows it.
pub(crate) fn seeded() -> StdRng {
    let seed: u64 = rand::random();
    println!("seed {seed:#x}");
    StdRng::seed_from_u64(seed)
}
