//! Which sources have been seen lately, in memory of a fixed size.
//!
//! Under load somebody new is to be answered before those who keep sending. Who sends from an address
//! that was not seen in the last seconds comes first. WireGuard repeats an initiation after five
//! seconds at the earliest, so by then its sender is new again; a flood has to come from ever new
//! addresses to be taken for so many new peers.
//!
//! A source is one IPv4 address or one IPv6 /64. It sets bits that a keyed hash chooses, so nobody can
//! choose addresses that stand in for others; a source is taken for one that was seen by chance alone,
//! 5 times in 1000 beside 65,536 that were.

use std::time::{Duration, Instant};

use rand::{Rng, RngExt as _};

/// A source counts as seen for this long after it was last seen, and for up to a [`PERIOD`] more.
const SEEN_FOR: Duration = Duration::from_millis(3900);

/// Bits of a period's memory.
const BITS: usize = 1 << 20;
const WORDS: usize = BITS / 64;
/// Periods that are remembered: the running one, and whole ones before it.
const PERIODS: usize = 5;
const PERIOD: Duration = Duration::from_millis(975);
const _: () = assert!(SEEN_FOR.as_millis() == PERIOD.as_millis() * (PERIODS as u128 - 1));

/// Bytes of it all.
#[cfg(test)]
pub(crate) const RECENT_LEN: usize = PERIODS * BITS / 8;
/// The lower half of a product.
const MASK: u128 = u64::MAX as u128;

/// See the module's text. 640 KiB, once anybody was seen.
pub(super) struct Recent {
    /// What sources are hashed with: a product of 128 bits with secret numbers, folded. Nobody outside
    /// sees what comes of it.
    keys: [u64; 2],
    /// The bits of all periods; the words of one place are neighbours.
    words: Box<[[u64; PERIODS]]>,
    /// Which period runs, and since when.
    running: usize,
    since: Instant,
}

impl Recent {
    pub(super) fn new(now: Instant, rng: &mut impl Rng) -> Recent {
        Recent {
            keys: rng.random(),
            words: Box::default(),
            running: 0,
            since: now,
        }
    }

    /// Notes a source; true if it was not seen lately.
    pub(super) fn is_new(&mut self, now: Instant, source: u64) -> bool {
        self.let_time_pass(now);
        let hash = self.hash(source);
        // In which periods all of its bits are set.
        let mut seen = [true; PERIODS];
        for part in [hash, hash >> 21, hash >> 42] {
            let at = usize::try_from(part % BITS as u64).unwrap_or(0);
            let bit = 1 << (at % 64);
            let periods = &mut self.words[at / 64];
            for (seen, word) in seen.iter_mut().zip(&*periods) {
                *seen &= word & bit != 0;
            }
            periods[self.running] |= bit;
        }
        !seen.contains(&true)
    }

    fn hash(&self, source: u64) -> u64 {
        let product = u128::from(source ^ self.keys[0]) * u128::from(self.keys[1] | 1);
        let folded = (product >> 64) ^ (product & MASK);
        // Once more, so that neighbours do not stay in line.
        let product = folded * u128::from(self.keys[0] | 1);
        u64::try_from((product >> 64) ^ (product & MASK)).unwrap_or(0)
    }

    fn let_time_pass(&mut self, now: Instant) {
        if self.words.is_empty() {
            self.words = vec![[0; PERIODS]; WORDS].into();
            self.since = now;
        }
        let passed = now.saturating_duration_since(self.since);
        if passed >= PERIOD * u32::try_from(PERIODS).unwrap_or(1) {
            self.words.fill([0; PERIODS]);
            self.since = now;
        } else if passed >= PERIOD {
            self.running = (self.running + 1) % PERIODS;
            let oldest = self.running;
            self.words.iter_mut().for_each(|word| word[oldest] = 0);
            self.since += PERIOD;
            self.let_time_pass(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any moment to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_source_is_new_again_when_wireguard_would_repeat_itself() {
        for offset in [0, 700, 974] {
            let start = start();
            let mut recent = Recent::new(start, &mut StdRng::seed_from_u64(offset));
            recent.is_new(start, 0);
            let mut now = start + Duration::from_millis(offset);
            for _ in 0..100 {
                assert!(recent.is_new(now, 7));
                now += SEEN_FOR - Duration::from_millis(1);
                assert!(!recent.is_new(now, 7));
                now += Duration::from_secs(5);
            }
        }
    }

    #[test]
    fn few_are_taken_for_others_beside_a_flood_and_none_after_it() {
        let mut now = start();
        let mut recent = Recent::new(now, &mut StdRng::seed_from_u64(1));
        for round in 0..20u32 {
            now += Duration::from_millis(300);
            let new = (0..65_536)
                .filter(|source| recent.is_new(now, *source))
                .count();
            assert_eq!(new > 60_000, round == 0, "{round}: {new}");
        }
        let taken = (100_000..110_000)
            .filter(|source| !recent.is_new(now, *source))
            .count();
        assert!(taken < 100, "{taken} of 10000");
        now += Duration::from_secs(5);
        assert!((0..1000).all(|source| recent.is_new(now, source)));
        now += Duration::from_secs(1 << 40);
        assert!((0..1000).all(|source| recent.is_new(now, source)));
    }
}
