#![forbid(unsafe_code)]
//! Deals the blocks of a batch out to lanes.
//!
//! A packet of `n` blocks of text is `n + 1` blocks of ChaCha20: block 0 is its one-time key, block
//! `b` covers the 64 bytes of text from `64 * (b - 1)` on. A *group* is what one pass of the rounds
//! computes, a block for each lane. Packets are dealt one after the other, and where one ends the next
//! begins in the same group: so every lane works until the batch ends, whatever the lengths.

use super::chacha20::Origin;
use super::lanes::BLOCK_LEN;
use super::packet::Packet;

/// Neighbouring lanes with successive blocks of one packet.
#[derive(Clone, Copy, Default)]
pub(super) struct Run {
    /// Index in the batch.
    pub(super) packet: usize,
    /// The number of the first block.
    pub(super) block: u32,
    /// The lane of the first block, and how many there are.
    pub(super) lane: u32,
    pub(super) lanes: u32,
    /// Where its text starts in the packet's, and how long it is.
    pub(super) start: usize,
    pub(super) len: usize,
    /// Whether the packet ends here.
    pub(super) last: bool,
}

impl Run {
    /// Where its text ends in the packet's.
    #[inline(always)]
    pub(super) fn end(&self) -> usize {
        self.start + self.len
    }

    /// The one-time key, where the packet starts here.
    #[inline(always)]
    pub(super) fn key<'a>(&self, blocks: &'a [[u8; BLOCK_LEN]]) -> Option<&'a [u8; 32]> {
        if self.block > 0 {
            return None;
        }
        blocks[self.lane as usize].first_chunk()
    }

    /// The keystream of its text.
    #[inline(always)]
    pub(super) fn keystream<'a>(&self, blocks: &'a [[u8; BLOCK_LEN]]) -> &'a [[u8; BLOCK_LEN]] {
        let first = self.lane + u32::from(self.block == 0);
        &blocks[first as usize..(self.lane + self.lanes) as usize]
    }
}

/// What one pass of the rounds computes: runs, lanes ascending.
pub(super) struct Group<const N: usize> {
    runs: [Run; N],
    len: usize,
}

impl<const N: usize> Group<N> {
    #[expect(clippy::cast_possible_truncation, reason = "8 or 16 lanes")]
    const LANES: u32 = N as u32;

    #[inline(always)]
    pub(super) fn empty() -> Self {
        Group {
            runs: [Run::default(); N],
            len: 0,
        }
    }

    #[inline(always)]
    pub(super) fn runs(&self) -> &[Run] {
        &self.runs[..self.len]
    }

    /// Where the lanes start from.
    #[inline(always)]
    pub(super) fn origins(&self) -> impl Iterator<Item = Origin> + Clone {
        self.runs().iter().map(|run| Origin {
            lane: run.lane,
            packet: run.packet,
            block: run.block,
        })
    }
}

/// Where the dealing stands: at first at the beginning of the batch.
#[derive(Default)]
pub(super) struct Dealer {
    /// The next packet to take.
    next: usize,
    /// The packet under way, and the length of its text.
    packet: usize,
    text_len: u32,
    /// Its next block, and how many there are with it.
    block: u32,
    left: u32,
}

impl Dealer {
    /// Deals the next group; an empty one at the end of the batch.
    #[inline(always)]
    pub(super) fn deal<P: Packet, const N: usize>(&mut self, batch: &[P], group: &mut Group<N>) {
        group.len = 0;
        let mut lane = 0;
        while lane < Group::<N>::LANES && self.take_packet(batch) {
            let lanes = self.left.min(Group::<N>::LANES - lane);
            group.runs[group.len] = self.run(lane, lanes);
            group.len += 1;
            lane += lanes;
        }
    }

    /// Goes on to the next packet where one has ended. False at the end of the batch.
    #[inline(always)]
    fn take_packet<P: Packet>(&mut self, batch: &[P]) -> bool {
        while self.left == 0 {
            let Some(packet) = batch.get(self.next) else {
                return false;
            };
            if let Some(text_len) = packet.text_len() {
                self.packet = self.next;
                self.text_len = text_len;
                self.block = 0;
                self.left = 1 + text_len.div_ceil(64);
            }
            self.next += 1;
        }
        true
    }

    /// Takes the next `lanes` blocks.
    #[inline(always)]
    fn run(&mut self, lane: u32, lanes: u32) -> Run {
        let start = self.block.saturating_sub(1) as usize * BLOCK_LEN;
        let end = (self.block + lanes - 1) as usize * BLOCK_LEN;
        let run = Run {
            packet: self.packet,
            block: self.block,
            lane,
            lanes,
            start,
            len: end.min(self.text_len as usize) - start,
            last: lanes == self.left,
        };
        self.block += lanes;
        self.left -= lanes;
        run
    }
}
