#![forbid(unsafe_code)]
//! The AEAD (RFC 8439 §2.8) over a batch, for processors without fast wide multiplication: rounds of
//! ChaCha20 in vectors, and between them Poly1305 in scalar code.
//!
//! Group after group (see [`deal`](super::deal)), the rounds of one run while the MAC takes in the
//! ciphertext of the group before it, a few blocks behind each half double round. Nothing of the
//! one depends on the other, so an out-of-order processor does both at once. One group later is
//! early enough in both directions: when sealing, the ciphertext is there; when opening, it is still
//! there, because the keystream of a group waits until the MAC has passed. In either case the
//! one-time keys, which are blocks like others, are known.

use std::array::from_fn;

use zeroize::optimization_barrier;

use super::TAG_LEN;
use super::chacha20::{self, DOUBLE_ROUNDS, columns, diagonals, xor};
use super::deal::{Dealer, Group, Run, split_row};
use super::lanes::{BLOCK_LEN, Lanes};
use super::packet::{Packet, end_blocks, padded};
use super::poly1305::Poly1305;

/// Seals or opens the batch: `N` lanes, `T` packets under way, and of each `Q` blocks of its MAC in
/// half a double round. A group is `4 * N` blocks of the MAC, and there are 20 halves to do them in.
#[inline(always)]
pub(super) fn run<L: Lanes<N>, P: Packet, const N: usize, const T: usize, const Q: usize>(
    cpu: L::Cpu,
    batch: &mut [P],
) {
    const { assert!(N <= 5 * T * Q) }
    let mut keystream = [[0; BLOCK_LEN]; N];
    let mut macs = [Poly1305::default(); T];
    let mut dealer = Dealer::<T>::new();
    let (mut one, mut other) = (Group::<N>::empty(), Group::empty());
    let (mut before, mut group) = (&mut one, &mut other);
    dealer.deal(batch, group);
    loop {
        let start = chacha20::start(cpu, batch, group.origins());
        let mut words = start;
        let mut rounds = Rounds::<L, N> {
            cpu,
            words: &mut words,
            left: if group.runs().is_empty() {
                0
            } else {
                DOUBLE_ROUNDS
            },
        };
        let mut rows = before.runs();
        while !rows.is_empty() {
            let (row, later) = split_row(rows);
            rows = later;
            let mut blocks = [[].as_slice(); T];
            for run in row {
                let packet = &batch[run.packet];
                if let Some(key) = run.key(&keystream) {
                    macs[run.track] = Poly1305::new(key);
                    absorb(&mut macs[run.track], packet.associated());
                }
                (blocks[run.track], _) = packet.text()[run.start..run.end()].as_chunks();
            }
            rounds.absorb::<T, Q>(&mut macs, blocks);
            for run in row {
                finish(run, &mut batch[run.packet], &macs[run.track], &keystream);
            }
        }
        rounds.rest();
        if group.runs().is_empty() {
            break;
        }
        chacha20::finish(words, &start, &mut keystream);
        (before, group) = (group, before);
        dealer.deal(batch, group);
        if P::SEALING {
            for run in before.runs() {
                let text = &mut batch[run.packet].text_mut()[run.start..];
                xor(text, run.len, run.keystream(&keystream));
            }
        }
    }
    keystream = [[0; BLOCK_LEN]; N];
    optimization_barrier(&keystream);
    macs = [Poly1305::default(); T];
    optimization_barrier(&macs);
}

/// The rounds of one group.
struct Rounds<'a, L: Lanes<N>, const N: usize> {
    cpu: L::Cpu,
    words: &'a mut [L; 16],
    /// Double rounds to do.
    left: usize,
}

impl<L: Lanes<N>, const N: usize> Rounds<'_, L, N> {
    /// Takes every track's blocks into its MAC, as much of it as can be amid the rounds.
    ///
    /// The loops with rounds have no branch inside, and a fixed number of blocks in each turn: with
    /// anything else the compiler moves the vectors to memory and back around the scalar code.
    #[inline(always)]
    fn absorb<const T: usize, const Q: usize>(
        &mut self,
        macs: &mut [Poly1305; T],
        mut blocks: [&[[u8; 16]]; T],
    ) {
        // All tracks side by side, while all have blocks.
        let least = blocks
            .iter()
            .fold(usize::MAX, |least, blocks| least.min(blocks.len()));
        let turns = (least / (2 * Q)).min(self.left);
        if turns > 0 {
            self.left -= turns;
            let mut now = *macs;
            let of: [&[[u8; 16]]; T] = from_fn(|t| &blocks[t][..2 * Q * turns]);
            for turn in 0..turns {
                columns(self.cpu, self.words);
                for q in 0..Q {
                    for t in 0..T {
                        now[t].block(&of[t][2 * Q * turn + q]);
                    }
                }
                diagonals(self.cpu, self.words);
                for q in Q..2 * Q {
                    for t in 0..T {
                        now[t].block(&of[t][2 * Q * turn + q]);
                    }
                }
            }
            for t in 0..T {
                macs[t].resume(&now[t]);
                blocks[t] = &blocks[t][2 * Q * turns..];
            }
        }

        // Then the track with the most, at the same pace.
        let (lone, most) = (0..T).fold((0, 0), |(lone, most), t| {
            if blocks[t].len() > most {
                (t, blocks[t].len())
            } else {
                (lone, most)
            }
        });
        let turns = (most / (2 * Q * T)).min(self.left);
        if turns > 0 {
            self.left -= turns;
            let mut now = macs[lone];
            let (of, later) = blocks[lone].split_at(2 * Q * T * turns);
            for of in of.chunks_exact(2 * Q * T) {
                let (first, second) = of.split_at(Q * T);
                columns(self.cpu, self.words);
                for block in first {
                    now.block(block);
                }
                diagonals(self.cpu, self.words);
                for block in second {
                    now.block(block);
                }
            }
            macs[lone].resume(&now);
            blocks[lone] = later;
        }

        // What is left of them, with the rounds done or blocks too few for another turn.
        let most = blocks.iter().map(|blocks| blocks.len()).max();
        for i in 0..most.unwrap_or(0) {
            for (mac, blocks) in macs.iter_mut().zip(blocks) {
                if let Some(block) = blocks.get(i) {
                    mac.block(block);
                }
            }
        }
    }

    /// Does the rounds that are left.
    #[inline(always)]
    fn rest(&mut self) {
        for _ in 0..self.left {
            columns(self.cpu, self.words);
            diagonals(self.cpu, self.words);
        }
    }
}

/// Ends a run whose blocks the MAC has taken in: decrypts it if the packet is being opened, and
/// settles the packet if it ends here.
#[inline(always)]
fn finish<P: Packet, const N: usize>(
    run: &Run,
    packet: &mut P,
    mac: &Poly1305,
    keystream: &[[u8; BLOCK_LEN]; N],
) {
    let mut tag = [0; TAG_LEN];
    if run.last {
        let mut mac = *mac;
        let (end, end_len) = end_blocks(packet, run.end());
        end[..end_len].iter().for_each(|block| mac.block(block));
        tag = mac.tag();
    }
    if !P::SEALING {
        let text = &mut packet.text_mut()[run.start..];
        xor(text, run.len, run.keystream(keystream));
    }
    if run.last {
        packet.settle(tag);
    }
}

/// Takes in associated data, filled up with zeros to whole blocks.
#[inline(always)]
fn absorb(mac: &mut Poly1305, data: &[u8]) {
    for piece in data.chunks(16) {
        mac.block(&padded(piece));
    }
}
