//! For tests: a moment to count from, and random lists of operations, as the fuzz targets of the same
//! names get them from the fuzzer.

use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

/// Some moment to count from.
#[expect(
    clippy::disallowed_methods,
    reason = "an Instant cannot be made otherwise"
)]
pub(crate) fn start() -> Instant {
    Instant::now()
}

/// Calls `run` with so many lists of below `len_max` operations of three bytes, or as many as
/// `RINGTAIL_OPERATION_LISTS` says; prints the seed they are made from.
pub(crate) fn random_lists(lists: u32, len_max: usize, mut run: impl FnMut(&[u8])) {
    let seed: u64 = rand::random();
    println!("seed {seed:#x}");
    let mut rng = StdRng::seed_from_u64(seed);
    let asked = std::env::var("RINGTAIL_OPERATION_LISTS").ok();
    let lists = asked.and_then(|text| text.parse().ok()).unwrap_or(lists);
    for _ in 0..lists {
        let mut bytes = vec![0; 3 * rng.random_range(1..len_max)];
        rng.fill_bytes(&mut bytes);
        run(&bytes);
    }
}
