//! Which counters of a keypair have been seen: a bitmap ring as in RFC 6479.
//!
//! The window is a whole number of words: the newest counter and the oldest that counts lie so many
//! words apart, whatever their bits are. The ring has one word more, so that both have a place. When
//! the newest moves on, whole words are cleared, and never a part of one.
//!
//! A counter is looked up before its message is authenticated, to drop what is known early, and
//! entered after, so that a forged one changes nothing.

#![forbid(unsafe_code)]

use super::REJECT_AFTER_MESSAGES;

/// Bits of a word of the ring.
const WORD_BITS: u64 = 64;
/// Words of the ring; a power of two.
const WORDS: u64 = 128;
const RING_LEN: usize = 128;
const _: () = assert!(RING_LEN as u64 == WORDS);
/// How far behind the newest counter one may be: 8128, as in the kernel's WireGuard.
pub(crate) const WINDOW: u64 = (WORDS - 1) * WORD_BITS;

/// The counters seen under one receiving key.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    /// The newest counter seen, plus one; 0 if none was.
    next: u64,
    ring: [u64; RING_LEN],
}

/// Where a counter's bit is: its word, as an index into the ring, and the bit in it.
fn place(counter: u64) -> (usize, u64) {
    let word = (counter / WORD_BITS) & (WORDS - 1);
    (word as usize, 1 << (counter % WORD_BITS))
}

impl Window {
    /// A window that has seen nothing.
    pub(crate) fn new() -> Window {
        Window {
            next: 0,
            ring: [0; RING_LEN],
        }
    }

    /// True if a message with this counter may still be accepted.
    #[inline]
    pub(crate) fn admits(&self, counter: u64) -> bool {
        if counter >= REJECT_AFTER_MESSAGES {
            return false;
        }
        if counter >= self.next {
            return true;
        }
        if self.next - 1 - counter > WINDOW {
            return false;
        }
        let (word, bit) = place(counter);
        self.ring[word] & bit == 0
    }

    /// Enters the counter of an authentic message. False if it may not be accepted: it was entered
    /// before, or has fallen out of the window since.
    #[inline]
    pub(crate) fn accept(&mut self, counter: u64) -> bool {
        if !self.admits(counter) {
            return false;
        }
        if counter >= self.next {
            self.advance(counter);
        }
        let (word, bit) = place(counter);
        self.ring[word] |= bit;
        true
    }

    /// Makes `counter`, which is newer than all, the newest.
    fn advance(&mut self, counter: u64) {
        // The words behind the newest one's up to the counter's: those that come into use.
        let first = self.next.div_ceil(WORD_BITS);
        let last = counter / WORD_BITS;
        for word in first..=last.min(first.saturating_add(WORDS - 1)) {
            self.ring[place(word * WORD_BITS).0] = 0;
        }
        self.next = counter + 1;
    }

    /// The newest counter plus one, and the ring: what [`Window::from_parts`] takes.
    pub(crate) fn parts(&self) -> (u64, &[u64]) {
        (self.next, &self.ring)
    }

    /// A window as it was exported; `None` if the ring has another length or the counter is none.
    pub(crate) fn from_parts(next: u64, ring: &[u64]) -> Option<Window> {
        if next > REJECT_AFTER_MESSAGES {
            return None;
        }
        Some(Window {
            next,
            ring: ring.try_into().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::RngExt;

    use super::*;

    /// The window by its definition.
    #[derive(Default)]
    struct Oracle {
        seen: HashSet<u64>,
        newest: Option<u64>,
    }

    impl Oracle {
        fn accept(&mut self, counter: u64) -> bool {
            let in_window = self
                .newest
                .is_none_or(|newest| counter > newest || newest - counter <= WINDOW);
            if counter >= REJECT_AFTER_MESSAGES || !in_window {
                return false;
            }
            self.newest = self.newest.max(Some(counter));
            self.seen.insert(counter)
        }
    }

    fn compare(counters: impl IntoIterator<Item = u64>) {
        let (mut window, mut oracle) = (Window::new(), Oracle::default());
        for (i, counter) in counters.into_iter().enumerate() {
            let expected = oracle.accept(counter);
            assert_eq!(window.admits(counter), expected, "step {i}: {counter}");
            assert_eq!(window.accept(counter), expected, "step {i}: {counter}");
            assert!(!window.admits(counter), "step {i}: {counter} twice");
        }
    }

    /// The verdict of each row, in turn.
    fn judge(rows: &[(u64, bool)]) {
        let mut window = Window::new();
        for (i, (counter, verdict)) in rows.iter().enumerate() {
            assert_eq!(window.accept(*counter), *verdict, "row {i}: {counter}");
        }
        compare(rows.iter().map(|(counter, _)| *counter));
    }

    #[test]
    fn verdicts_at_the_edges() {
        const LIMIT: u64 = REJECT_AFTER_MESSAGES;
        judge(&[
            (0, true),
            (0, false),
            (1, true),
            (9, true),
            (8, true),
            (7, true),
            (7, false),
            (WINDOW, true),
            (WINDOW - 1, true),
            (WINDOW - 1, false),
            (WINDOW + 4, true),
            // 8128 behind is inside, 8129 is not.
            (4, true),
            (3, false),
            (WINDOW * 2 + 10, true),
            (WINDOW + 10, true),
            (WINDOW + 9, false),
            (WINDOW * 2 + 9, true),
            (LIMIT - 1, true),
            (LIMIT, false),
            (u64::MAX, false),
            (LIMIT - 1, false),
            (LIMIT - 1 - WINDOW, true),
            (LIMIT - 2 - WINDOW, false),
            (0, false),
        ]);
        const { assert!(WINDOW == 8128) };
    }

    /// What the self-tests of the kernel's WireGuard and of wireguard-go ask in turn.
    #[test]
    fn verdicts_are_those_of_the_kernels_and_wireguard_gos_self_tests() {
        const LIMIT: u64 = REJECT_AFTER_MESSAGES;
        // The first newest counter for which 0 is too old.
        const AHEAD: u64 = WINDOW + 1;
        judge(&[
            (0, true),
            (1, true),
            (1, false),
            (9, true),
            (8, true),
            (7, true),
            (7, false),
            (AHEAD, true),
            (AHEAD - 1, true),
            (AHEAD - 1, false),
            (AHEAD - 2, true),
            (2, true),
            (2, false),
            (AHEAD + 16, true),
            (3, false),
            (AHEAD + 16, false),
            (AHEAD * 4, true),
            (AHEAD * 4 - (AHEAD - 1), true),
            (10, false),
            (AHEAD * 4 - AHEAD, false),
            (AHEAD * 4 - (AHEAD + 1), false),
            (AHEAD * 4 - (AHEAD - 2), true),
            (AHEAD * 4 + 1 - AHEAD, false),
            (0, false),
            (LIMIT, false),
            (LIMIT - 1, true),
            (LIMIT, false),
            (LIMIT - 1, false),
            (LIMIT - 2, true),
            (LIMIT + 1, false),
            (LIMIT + 2, false),
            (LIMIT - 2, false),
            (LIMIT - 3, true),
            (0, false),
        ]);
        // And all counters but the oldest, which comes last.
        for (newest, verdict) in [(WINDOW, true), (WINDOW + 1, false)] {
            let mut window = Window::new();
            assert!((1..=newest).all(|counter| window.accept(counter)));
            assert_eq!(window.accept(0), verdict, "behind {newest}");
            assert!((0..=newest).rev().all(|counter| !window.accept(counter)));
        }
    }

    #[test]
    fn asking_changes_nothing() {
        let mut window = Window::new();
        assert!(window.admits(70_000));
        assert!(window.accept(3), "a forged newer counter did not move it");
    }

    /// Steps of every size a word, a ring and a window can make.
    #[test]
    fn adversarial_sequences_match_a_set() {
        for step in [
            1,
            63,
            64,
            65,
            WINDOW - 1,
            WINDOW,
            WINDOW + 1,
            WINDOW + 63,
            WINDOW + 64,
            WINDOW + 65,
            3 * WINDOW,
        ] {
            for start in [0, 1, 63, 64, REJECT_AFTER_MESSAGES - 5 * WINDOW] {
                let newest = (0..12).map(|i| start.saturating_add(i * step));
                compare(newest.flat_map(|newest| {
                    [
                        0,
                        1,
                        63,
                        64,
                        65,
                        WINDOW - 65,
                        WINDOW - 64,
                        WINDOW - 1,
                        WINDOW,
                        WINDOW + 1,
                    ]
                    .map(|behind| newest.saturating_sub(behind))
                }));
            }
        }
    }

    #[test]
    fn random_sequences_match_a_set() {
        let mut rng = crate::seeded();
        for _ in 0..60 {
            let mut newest: u64 = if rng.random_bool(0.3) {
                REJECT_AFTER_MESSAGES - rng.random_range(0..20_000)
            } else {
                rng.random_range(0..1 << 40)
            };
            let spread = [10, 100, 5_000, 9_000, 20_000][rng.random_range(0..5)];
            let counters: Vec<u64> = (0..2_000)
                .map(|_| {
                    if rng.random_bool(0.5) {
                        newest = newest.saturating_add(rng.random_range(0..spread));
                        newest
                    } else {
                        newest.saturating_sub(rng.random_range(0..spread))
                    }
                })
                .collect();
            compare(counters);
        }
    }

    #[test]
    fn a_window_goes_on_from_its_parts() {
        let mut window = Window::new();
        for counter in [0, 5, 900, 20_000, 19_000] {
            window.accept(counter);
        }
        let (next, ring) = window.parts();
        let mut again = Window::from_parts(next, ring).expect("its own parts");
        assert!(!again.accept(19_000) && !again.accept(900) && again.accept(18_999));
        assert!(Window::from_parts(0, &[0; 4]).is_none());
        assert!(Window::from_parts(u64::MAX, &[0; 128]).is_none());
    }
}
