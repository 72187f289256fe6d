//! What a peer has sent that could not be opened: it has keys that we have lost.
//!
//! Anybody can make such datagrams in a peer's name. So they are worth a handshake only by what they
//! brought: they have to add up to at least what the initiation sends.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// After such a pause what came before counts no more.
const LASTS: Duration = Duration::from_secs(5);
/// More is not remembered than a few initiations need.
const BYTES_MAX: usize = 1024;

/// Bytes that could not be opened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Unopened {
    bytes: usize,
    last: Option<Instant>,
}

impl Unopened {
    /// Adds `bytes` and returns all that count now.
    pub(crate) fn add(&mut self, now: Instant, bytes: usize) -> usize {
        let stale = |last: Instant| now.saturating_duration_since(last) >= LASTS;
        if self.last.is_none_or(stale) {
            self.bytes = 0;
        }
        self.last = Some(now);
        self.bytes = self.bytes.saturating_add(bytes).min(BYTES_MAX);
        self.bytes
    }

    /// They have been answered.
    pub(crate) fn clear(&mut self) {
        *self = Unopened::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_add_up_until_there_is_a_pause() {
        let start = crate::sys::now();
        let at = |secs| start + Duration::from_secs(secs);
        let mut unopened = Unopened::default();
        assert_eq!(unopened.add(at(0), 32), 32);
        assert_eq!(unopened.add(at(4), 32), 64);
        assert_eq!(unopened.add(at(8), 100), 164);
        assert_eq!(unopened.add(at(13), 32), 32, "after five seconds");
        assert_eq!(unopened.add(at(13), usize::MAX), BYTES_MAX);
        unopened.clear();
        assert_eq!(unopened.add(at(13), 1), 1);
    }
}
