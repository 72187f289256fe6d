//! When peers last shook hands, as wall clock time: read once per handshake, so that the time told
//! does not move with every look, nor with a later change of the clock.

use std::time::{Duration, Instant};

use ringtail_dataplane::PeerId;

use super::clock::{now, since_1970};

/// The last handshake of each peer by both clocks; [`ringtail_dataplane::PEERS_MAX`] at most.
#[derive(Default)]
pub struct Handshakes(Vec<Option<(Instant, Duration)>>);

impl Handshakes {
    /// The time since the Unix epoch of a peer's handshake that happened at `at`.
    pub fn wall_time(&mut self, peer: PeerId, at: Instant) -> Duration {
        let index = peer.0 as usize;
        if self.0.len() <= index {
            self.0.resize(index + 1, None);
        }
        let known = self.0[index].filter(|(when, _)| *when == at);
        let (_, wall) = *self.0[index].insert(known.unwrap_or_else(|| {
            let age = now().saturating_duration_since(at);
            (at, since_1970().saturating_sub(age))
        }));
        wall
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handshake_keeps_its_time_until_the_next() {
        let mut handshakes = Handshakes::default();
        let start = now();
        let earlier = start - Duration::from_secs(5);
        let first = handshakes.wall_time(PeerId(3), earlier);
        let age = since_1970().saturating_sub(first);
        assert!((5..8).contains(&age.as_secs()), "{age:?}");
        std::thread::yield_now();
        assert_eq!(handshakes.wall_time(PeerId(3), earlier), first);
        assert!(handshakes.wall_time(PeerId(3), start) > first);
        assert!(handshakes.wall_time(PeerId(0), start) > first);
    }
}
