//! Initiations that wait to be answered with a cookie, more of which come than cookies are given.
//!
//! Whoever comes has the same chance, wherever in the flood the message stands (reservoir sampling,
//! Vitter's algorithm R): first come, first served would mean that what the flood sends just after each
//! look at the sockets gets everything.

#![forbid(unsafe_code)]

use std::net::SocketAddr;

use rand::{Rng, RngExt};

use crate::noise::INITIATION_LEN;
use crate::sys::socket::Local;

/// An initiation, where it came from and where it arrived.
#[derive(Clone, Copy)]
pub(super) struct Unproven {
    pub(super) from: SocketAddr,
    pub(super) local: Option<Local>,
    pub(super) message: [u8; INITIATION_LEN],
}

/// Those of one class that came since the last draw.
pub(super) struct Reservoir {
    /// No more than this are kept.
    len_max: usize,
    kept: Vec<Unproven>,
    came: u64,
}

impl Reservoir {
    pub(super) fn new(len_max: usize) -> Reservoir {
        Reservoir {
            len_max,
            kept: Vec::with_capacity(len_max),
            came: 0,
        }
    }

    /// Takes part in the next draw, or does not, by chance; false if somebody is out.
    pub(super) fn offer(
        &mut self,
        from: SocketAddr,
        local: Option<Local>,
        message: &[u8],
        rng: &mut impl Rng,
    ) -> bool {
        let Ok(message) = message.try_into() else {
            return false;
        };
        let unproven = Unproven {
            from,
            local,
            message,
        };
        self.came += 1;
        if self.kept.len() < self.len_max {
            self.kept.push(unproven);
            return true;
        }
        let at = usize::try_from(rng.random_range(0..self.came)).unwrap_or(usize::MAX);
        if let Some(kept) = self.kept.get_mut(at) {
            *kept = unproven;
        }
        false
    }

    /// Draws one.
    pub(super) fn draw(&mut self, rng: &mut impl Rng) -> Option<Unproven> {
        if self.kept.is_empty() {
            return None;
        }
        let at = rng.random_range(0..self.kept.len());
        Some(self.kept.swap_remove(at))
    }

    /// Ends the draw; returns how many are left without.
    pub(super) fn end(&mut self) -> u64 {
        let left = self.kept.len() as u64;
        self.kept.clear();
        self.came = 0;
        left
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    fn from(n: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], n))
    }

    #[test]
    fn everybody_has_the_same_chance_wherever_he_stands() {
        let mut rng = StdRng::seed_from_u64(11);
        let mut reservoir = Reservoir::new(16);
        let mut drawn = [0u32; 1000];
        for _ in 0..2000 {
            for n in 0..1000 {
                reservoir.offer(from(n), None, &[0; INITIATION_LEN], &mut rng);
            }
            for _ in 0..5 {
                drawn[usize::from(reservoir.draw(&mut rng).unwrap().from.port())] += 1;
            }
            assert_eq!(reservoir.end(), 11);
        }
        // Ten each.
        for part in drawn.chunks(100) {
            let sum: u32 = part.iter().sum();
            assert!((850..1150).contains(&sum), "{sum}");
        }
    }

    #[test]
    fn who_is_out_is_told_and_memory_is_bounded() {
        let mut rng = StdRng::seed_from_u64(12);
        let mut reservoir = Reservoir::new(3);
        let kept = (0..100)
            .filter(|n| reservoir.offer(from(*n), None, &[0; INITIATION_LEN], &mut rng))
            .count();
        assert_eq!((kept, reservoir.end()), (3, 3));
        assert!(!reservoir.offer(from(1), None, &[0; 5], &mut rng));
        assert!(reservoir.draw(&mut rng).is_none());
    }
}
