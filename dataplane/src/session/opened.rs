//! Which packets a batch held, once it is opened, and where they lie.

#![forbid(unsafe_code)]

use crate::config::Engine;

/// The opened packets of one run of datagrams. Our engine opens a run where it lies; boringtun
/// opens into an arena of its own, back to back in one reused piece of memory.
pub(crate) struct Opened {
    spans: Vec<(u32, u32)>,
    arena: Box<[u8]>,
    #[cfg(feature = "boringtun")]
    used: usize,
}

/// A GRO batch has at most 65507 bytes; the last datagram needs room for its tag besides.
const ARENA_LEN: usize = 2 * 65_536;
/// As many data messages as a receive can hold.
pub(crate) const SPANS_ROOM: usize = 65_536 / 32;

impl Opened {
    /// For the sessions of an engine.
    pub(crate) fn new(kind: Engine) -> Opened {
        let arena_len = match kind {
            Engine::Ringtail => 0,
            Engine::Boringtun => ARENA_LEN,
        };
        Opened {
            spans: Vec::with_capacity(SPANS_ROOM),
            arena: vec![0; arena_len].into(),
            #[cfg(feature = "boringtun")]
            used: 0,
        }
    }

    /// Forgets all packets.
    pub(crate) fn clear(&mut self) {
        #[cfg(feature = "boringtun")]
        {
            self.used = 0;
        }
        self.spans.clear();
    }

    /// Number of packets.
    pub(crate) fn len(&self) -> usize {
        self.spans.len()
    }

    /// A packet of `len` bytes lies so far into the run.
    #[inline]
    pub(crate) fn push_in_place(&mut self, start: usize, len: usize) {
        let as_u32 = |n: usize| u32::try_from(n).expect("a run is below 64 KiB");
        self.spans.push((as_u32(start), as_u32(len)));
    }

    /// Free space of at least `len` bytes in the arena, if there is that much.
    #[cfg(feature = "boringtun")]
    pub(crate) fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        self.arena
            .get_mut(self.used..)
            .filter(|room| room.len() >= len)
    }

    /// The first `len` bytes of the free space are a packet.
    #[cfg(feature = "boringtun")]
    pub(crate) fn push(&mut self, len: usize) {
        self.push_in_place(self.used, len);
        self.used += len;
        debug_assert!(self.used <= self.arena.len(), "inside the room given");
    }

    /// Packet `i` of the run that was opened.
    #[inline]
    pub(crate) fn packet<'a>(&'a self, i: usize, run: &'a [u8]) -> &'a [u8] {
        let (start, len) = self.spans[i];
        let bytes = if self.arena.is_empty() {
            run
        } else {
            &self.arena
        };
        &bytes[start as usize..][..len as usize]
    }
}
