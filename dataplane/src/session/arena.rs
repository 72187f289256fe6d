//! Where opened packets lie until the next room has taken them.

#![forbid(unsafe_code)]

/// Opened packets of one batch, back to back in one reused piece of memory.
pub(crate) struct Arena {
    bytes: Box<[u8]>,
    used: usize,
    spans: Vec<(u32, u32)>,
}

/// A GRO batch has at most 65507 bytes; the last datagram needs room for its tag besides.
const ARENA_LEN: usize = 2 * 65_536;

impl Arena {
    pub(crate) fn new() -> Arena {
        Arena {
            bytes: vec![0; ARENA_LEN].into(),
            used: 0,
            spans: Vec::with_capacity(128),
        }
    }

    /// Forgets all packets.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
        self.spans.clear();
    }

    /// Number of packets.
    pub(crate) fn len(&self) -> usize {
        self.spans.len()
    }

    /// Free space of at least `len` bytes, if there is that much.
    pub(crate) fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        self.bytes
            .get_mut(self.used..)
            .filter(|room| room.len() >= len)
    }

    /// The first `len` bytes of the free space are a packet.
    pub(crate) fn push(&mut self, len: usize) {
        let as_u32 = |n: usize| u32::try_from(n).expect("the arena is small");
        self.spans.push((as_u32(self.used), as_u32(len)));
        self.used += len;
        debug_assert!(self.used <= self.bytes.len(), "inside the room given");
    }

    /// Packet `i`.
    pub(crate) fn packet(&self, i: usize) -> &[u8] {
        let (start, len) = self.spans[i];
        &self.bytes[start as usize..][..len as usize]
    }
}
