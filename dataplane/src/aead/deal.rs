#![forbid(unsafe_code)]
//! Deals the blocks of a batch out to lanes.
//!
//! A packet of `n` blocks of text is `n + 1` blocks of ChaCha20: block 0 is its one-time key, block
//! `b` covers the 64 bytes of text from `64 * (b - 1)` on. A *group* is what one pass of the rounds
//! computes, a block for each lane. `T` packets are under way at the same time, each on its *track*
//! with an equal share of every group, because the MAC of one packet is a chain of dependent
//! multiplications and only several chains keep the multiplier busy. When a packet ends, its track
//! takes the next one; when none is left, the other tracks share the lanes. So every lane works until
//! the batch ends, whatever the lengths.

use super::chacha20::Origin;
use super::lanes::BLOCK_LEN;
use super::packet::Packet;

/// Neighbouring lanes with successive blocks of one packet.
#[derive(Clone, Copy, Default)]
pub(super) struct Run {
    /// Index in the batch.
    pub(super) packet: usize,
    pub(super) track: usize,
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

/// What one pass of the rounds computes. Runs are in *rows*, each with at most one run of each
/// track, tracks ascending.
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

/// Splits the first row off.
#[inline(always)]
pub(super) fn split_row(runs: &[Run]) -> (&[Run], &[Run]) {
    let mut len = runs.len().min(1);
    while len < runs.len() && runs[len].track > runs[len - 1].track {
        len += 1;
    }
    runs.split_at(len)
}

/// Where the dealing stands.
pub(super) struct Dealer<const T: usize> {
    /// The next packet to take.
    next: usize,
    tracks: [Track; T],
}

/// A packet under way.
#[derive(Clone, Copy, Default)]
struct Track {
    packet: usize,
    text_len: u32,
    /// The next block, and how many there are with it.
    block: u32,
    left: u32,
}

impl<const T: usize> Dealer<T> {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Dealer {
            next: 0,
            tracks: [Track::default(); T],
        }
    }

    /// Deals the next group; an empty one at the end of the batch.
    #[inline(always)]
    pub(super) fn deal<P: Packet, const N: usize>(&mut self, batch: &[P], group: &mut Group<N>) {
        group.len = 0;
        let mut lane = 0;
        while lane < Group::<N>::LANES {
            let active = self.take_packets(batch);
            if active == 0 {
                return;
            }
            let share = (Group::<N>::LANES - lane).div_ceil(active);
            for (i, track) in self.tracks.iter_mut().enumerate() {
                let lanes = track.left.min(share).min(Group::<N>::LANES - lane);
                if lanes > 0 {
                    group.runs[group.len] = track.run(i, lane, lanes);
                    group.len += 1;
                    lane += lanes;
                }
            }
        }
    }

    /// Gives every free track a packet, and returns how many are under way.
    #[inline(always)]
    fn take_packets<P: Packet>(&mut self, batch: &[P]) -> u32 {
        let mut active = 0;
        for track in &mut self.tracks {
            while track.left == 0 && self.next < batch.len() {
                if let Some(text_len) = batch[self.next].text_len() {
                    *track = Track {
                        packet: self.next,
                        text_len,
                        block: 0,
                        left: 1 + text_len.div_ceil(64),
                    };
                }
                self.next += 1;
            }
            active += u32::from(track.left > 0);
        }
        active
    }
}

impl Track {
    /// Takes the next `lanes` blocks.
    #[inline(always)]
    fn run(&mut self, track: usize, lane: u32, lanes: u32) -> Run {
        let start = self.block.saturating_sub(1) as usize * BLOCK_LEN;
        let end = (self.block + lanes - 1) as usize * BLOCK_LEN;
        let run = Run {
            packet: self.packet,
            track,
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
