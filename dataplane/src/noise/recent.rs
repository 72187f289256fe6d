//! Which sources have been seen lately, in memory of a fixed size.
//!
//! Under load somebody new is to be answered before those who keep sending. Who sends from an address
//! that was not seen in the last seconds comes first. WireGuard repeats an initiation after five
//! seconds at the earliest, so by then its sender is new again; a flood has to come from ever new
//! addresses to be taken for so many new peers.
//!
//! A flood can come from ever new addresses, all of them made up. Whoever makes them up by chance does
//! not come from the same one again five seconds later, and at no time in between; who waits for an
//! answer does. So these are told from the others too.
//!
//! A source is one IPv4 address or one IPv6 /64. It sets bits that a keyed hash chooses, so nobody can
//! choose addresses that stand in for others. A source is taken for one that came again by chance alone,
//! 2 times in 1000 beside 200,000 others a second, and for one that was seen 5 times in 1000.

use std::time::{Duration, Instant};

use rand::{Rng, RngExt as _};

/// A source counts as seen for this long after it was last seen, and for up to a [`PERIOD`] more.
const SEEN_FOR: Duration = Duration::from_millis(3900);

/// Bits of a period's memory, and how many of them a source sets.
const BITS: usize = 1 << 22;
const MARKS: u64 = 4;
const WORDS: usize = BITS / 64;
/// Periods in which a source was seen lately: the running one, and whole ones before it.
const LATELY: usize = 5;
/// Periods that are remembered. The first ones after those have to do with who repeats himself after five
/// seconds to five and a third.
const PERIODS: usize = LATELY + 2;
const PERIOD: Duration = Duration::from_millis(975);
const _: () = assert!(SEEN_FOR.as_millis() == PERIOD.as_millis() * (LATELY as u128 - 1));

/// Bytes of it all.
#[cfg(test)]
pub(crate) const RECENT_LEN: usize = PERIODS * BITS / 8;
/// The lower half of a product.
const MASK: u128 = u64::MAX as u128;

/// What is remembered of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing.
    Never,
    /// It was seen in the last seconds.
    Lately,
    /// It was seen as long ago as WireGuard waits before it repeats itself, and not since.
    Returned,
}

/// See the module's text. 3.5 MiB, once anybody was seen.
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

    /// Notes a source; says what was remembered of it.
    pub(super) fn see(&mut self, now: Instant, source: u64) -> Seen {
        self.let_time_pass(now);
        let hash = self.hash(source);
        // In which periods all of its bits are set.
        let mut seen = [true; PERIODS];
        let step = hash.rotate_left(32) | 1;
        for part in (0..MARKS).map(|n| hash.wrapping_add(step.wrapping_mul(n))) {
            let at = usize::try_from(part % BITS as u64).unwrap_or(0);
            let bit = 1 << (at % 64);
            let periods = &mut self.words[at / 64];
            for (seen, word) in seen.iter_mut().zip(&*periods) {
                *seen &= word & bit != 0;
            }
            periods[self.running] |= bit;
        }
        // The running period is followed by the oldest.
        seen.rotate_left((self.running + 1) % PERIODS);
        let (before, lately) = seen.split_at(PERIODS - LATELY);
        if lately.contains(&true) {
            Seen::Lately
        } else if before.contains(&true) {
            Seen::Returned
        } else {
            Seen::Never
        }
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
    use crate::sys::now;

    #[test]
    fn a_source_that_repeats_itself_as_wireguard_does_has_returned() {
        for offset in [0, 300, 700, 974] {
            let start = now();
            let mut recent = Recent::new(start, &mut StdRng::seed_from_u64(offset));
            recent.see(start, 0);
            let mut now = start + Duration::from_millis(offset);
            assert_eq!(recent.see(now, 7), Seen::Never);
            for n in 0..100 {
                now += SEEN_FOR - Duration::from_millis(1);
                assert_eq!(recent.see(now, 7), Seen::Lately);
                now += Duration::from_millis(5000 + n * 4);
                assert_eq!(recent.see(now, 7), Seen::Returned);
            }
            now += Duration::from_secs(7);
            assert_eq!(recent.see(now, 7), Seen::Never);
        }
    }

    #[test]
    fn few_are_taken_for_others_beside_a_flood_and_none_after_it() {
        let mut now = now();
        let mut recent = Recent::new(now, &mut StdRng::seed_from_u64(1));
        for round in 0..20u32 {
            now += Duration::from_millis(300);
            let new = (0..65_536)
                .filter(|source| recent.see(now, *source) == Seen::Never)
                .count();
            assert_eq!(new > 60_000, round == 0, "{round}: {new}");
        }
        let others = 100_000..110_000;
        let taken = others.filter(|source| recent.see(now, *source) != Seen::Never);
        assert!(taken.count() < 100);
        now += Duration::from_secs(7);
        assert!((0..1000).all(|source| recent.see(now, source) == Seen::Never));
        now += Duration::from_secs(1 << 40);
        assert!((0..1000).all(|source| recent.see(now, source) == Seen::Never));
    }

    #[test]
    fn next_to_nobody_of_a_flood_from_ever_new_addresses_has_returned() {
        let mut now = now();
        let mut recent = Recent::new(now, &mut StdRng::seed_from_u64(2));
        let (mut returned, mut lately) = (0, 0);
        for source in 0..8 * 200_000 {
            now += Duration::from_micros(5);
            match recent.see(now, source) {
                Seen::Returned => returned += 1,
                Seen::Lately => lately += 1,
                Seen::Never => {}
            }
        }
        assert!(
            returned < 8 * 400 && lately < 8 * 1000,
            "{returned} {lately}"
        );
    }
}
