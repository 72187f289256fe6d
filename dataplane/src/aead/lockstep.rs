#![forbid(unsafe_code)]
//! The AEAD (RFC 8439 §2.8) over a batch, for processors that multiply fast in wide vectors: ChaCha20
//! with a lane for each block, and Poly1305 with a lane for each packet.
//!
//! The batch is taken in sets of at most `N` packets, and every set needs two passes: ChaCha20 over its
//! texts and then Poly1305 over its ciphertexts when sealing, the other way round when opening, so that
//! what has a wrong tag is never decrypted. The second pass of a set is made together with the first one
//! of the set behind it, by `both`: in a turn a block of ChaCha20 in every lane, and amid its rounds four
//! blocks of every packet's MAC. Nothing of the one depends on the other, so an out-of-order processor does
//! the one in the places that the other leaves free. Where the two differ in length, and with a batch of
//! one set, the passes run alone.

use std::array::from_fn;

use zeroize::optimization_barrier;

use super::TAG_LEN;
use super::chacha20::{self, DOUBLE_ROUNDS, Origin};
use super::cipher::Cipher;
use super::lanes::{BLOCK_LEN, Lanes, Limbs};
use super::macs::{Macs, Sums};
use super::packet::{self, Packet, end_blocks};
use super::set::Set;

/// Seals or opens the batch: `N` lanes of ChaCha20, and two vectors of `V` MACs.
#[inline(always)]
pub(super) fn run<L, M, P, const N: usize, const V: usize>(cpu: L::Cpu, mut batch: &mut [P])
where
    L: Lanes<N>,
    M: Limbs<V, Cpu = L::Cpu>,
    P: Packet,
{
    const { assert!(N == 2 * V) }
    let mut before = Set::<P, N>::take(&mut [].as_mut_slice());
    loop {
        let mut set = Set::take(&mut batch);
        if P::SEALING {
            let tags = both::<L, M, P, N, V>(cpu, &mut set, &before);
            before.settle(tags);
        } else {
            let tags = both::<L, M, P, N, V>(cpu, &mut before, &set);
            set.settle(tags);
        }
        if set.members().is_empty() {
            break;
        }
        before = set;
    }
}

/// Changes the texts of the one set by their keystreams, and gives the tags of the other.
#[inline(always)]
fn both<L, M, P, const N: usize, const V: usize>(
    cpu: L::Cpu,
    to_cipher: &mut Set<'_, P, N>,
    to_authenticate: &Set<'_, P, N>,
) -> [[u8; TAG_LEN]; N]
where
    L: Lanes<N>,
    M: Limbs<V, Cpu = L::Cpu>,
    P: Packet,
{
    let mut cipher = Cipher::<L, N>::new(cpu, to_cipher);
    let mut macs = [Macs::<M, V>::zero(cpu); 2];
    let mut blocks = [Blocks::default(); N];
    // How far each vector goes by fours, which its shortest text limits.
    let mut turns = [0; 2];
    let members = to_authenticate.members();
    if !members.is_empty() {
        // Lanes without a packet do the first one's again.
        for (lane, blocks) in blocks.iter_mut().enumerate() {
            let member = members.get(lane).unwrap_or(&members[0]);
            *blocks = Blocks::of(&to_authenticate.packets[member.packet], member.text_len);
        }
        for (turns, members) in turns.iter_mut().zip(members.chunks(V)) {
            *turns = members[members.len() - 1].text_len / (4 * 16);
        }
        begin::<L, M, P, N, V>(cpu, to_authenticate, &mut macs);
    }
    let mut fours = [[].as_slice(); N];
    for (fours, blocks) in fours.iter_mut().zip(&blocks) {
        *fours = blocks.fours();
    }

    // A block of a vector for a double round: about as many instructions as the processor looks ahead.
    let together = cipher.steps.min(turns[1]);
    for turn in 0..together {
        let mut words = cipher.first_double_round(cpu);
        for (k, macs) in macs.iter_mut().enumerate() {
            let rows = rows(&fours, k, turn);
            let mut sums = Sums::zero(cpu);
            let [b2, b3] = macs.two(rows, 1);
            macs.add_product(&mut sums, b3, 3);
            cipher.double_round(cpu, to_cipher, &mut words, 4 * k);
            macs.add_product(&mut sums, b2, 2);
            cipher.double_round(cpu, to_cipher, &mut words, 4 * k + 1);
            let [b0, b1] = macs.two(rows, 0);
            macs.add_product(&mut sums, b1, 1);
            cipher.double_round(cpu, to_cipher, &mut words, 4 * k + 2);
            macs.add_product(&mut sums, b0, 0);
            cipher.double_round(cpu, to_cipher, &mut words, 4 * k + 3);
            macs.carry(&sums);
        }
        cipher.double_round(cpu, to_cipher, &mut words, DOUBLE_ROUNDS - 2);
        cipher.finish(cpu, to_cipher, words);
    }
    for _ in together..cipher.steps {
        let mut words = cipher.first_double_round(cpu);
        for i in 0..DOUBLE_ROUNDS - 1 {
            cipher.double_round(cpu, to_cipher, &mut words, i);
        }
        cipher.finish(cpu, to_cipher, words);
    }
    cipher.forget(cpu);

    for turn in together..turns[0] {
        for (k, macs) in macs.iter_mut().enumerate() {
            if turn < turns[k] {
                macs.absorb_four(rows(&fours, k, turn));
            }
        }
    }
    let mut tags = [[0; TAG_LEN]; N];
    for (k, macs) in macs.iter_mut().enumerate() {
        if k * V < members.len() {
            let blocks = &blocks[k * V..][..V];
            for i in 4 * turns[k]..blocks[0].len() {
                macs.absorb(from_fn(|v| blocks[v].get(i)));
            }
            macs.tags(&mut tags.as_chunks_mut().0[k]);
        }
    }
    macs = [Macs::zero(cpu); 2];
    optimization_barrier(&macs);
    tags
}

/// The ciphertext of a packet as blocks of the MAC.
#[derive(Clone, Copy, Default)]
struct Blocks<'a> {
    whole: &'a [[u8; 16]],
    /// What follows them.
    end: [[u8; 16]; 2],
    end_len: usize,
}

impl<'a> Blocks<'a> {
    #[inline(always)]
    fn of<P: Packet>(packet: &'a P, text_len: usize) -> Self {
        let (end, end_len) = end_blocks(packet, text_len);
        Blocks {
            whole: &packet.text().as_chunks().0[..text_len / 16],
            end,
            end_len,
        }
    }

    /// How many there are.
    #[inline(always)]
    fn len(&self) -> usize {
        self.whole.len() + self.end_len
    }

    /// The whole blocks by fours.
    #[inline(always)]
    fn fours(&self) -> &'a [[[u8; 16]; 4]] {
        self.whole.as_chunks().0
    }

    #[inline(always)]
    fn get(&self, i: usize) -> Option<&[u8; 16]> {
        match i.checked_sub(self.whole.len()) {
            Some(i) => self.end[..self.end_len].get(i),
            None => self.whole.get(i),
        }
    }
}

/// Of every text of vector `k` the four blocks number `turn`.
#[inline(always)]
fn rows<'a, const N: usize, const V: usize>(
    fours: &[&'a [[[u8; 16]; 4]]; N],
    k: usize,
    turn: usize,
) -> [&'a [[u8; 16]; 4]; V] {
    let mut rows = [&[[0; 16]; 4]; V];
    for (v, row) in rows.iter_mut().enumerate() {
        *row = &fours[k * V + v][turn];
    }
    rows
}

/// Starts the MACs of the set, which has members.
#[inline(always)]
fn begin<L, M, P, const N: usize, const V: usize>(
    cpu: L::Cpu,
    set: &Set<'_, P, N>,
    macs: &mut [Macs<M, V>; 2],
) where
    L: Lanes<N>,
    M: Limbs<V, Cpu = L::Cpu>,
    P: Packet,
{
    // Block 0 of a packet begins with its one-time key.
    let members = set.members();
    let origins = members.iter().zip(0..);
    let origins = origins.map(|(member, lane)| Origin {
        lane,
        packet: member.packet,
        block: 0,
    });
    let mut start = chacha20::start::<L, P, N>(cpu, set.packets, origins);
    let mut keys = [[0; BLOCK_LEN]; N];
    chacha20::blocks(cpu, &start, &mut keys);
    for (macs, keys) in macs.iter_mut().zip(keys.as_chunks().0) {
        *macs = Macs::new(cpu, keys.each_ref());
    }
    start = [L::splat(cpu, 0); 16];
    optimization_barrier(&start);
    keys = [[0; BLOCK_LEN]; N];
    optimization_barrier(&keys);

    // There is none in WireGuard.
    let associated = |lane: usize| {
        let member = members.get(lane);
        member.map_or([].as_slice(), |member| {
            set.packets[member.packet].associated()
        })
    };
    let most = (0..members.len()).map(|lane| associated(lane).len().div_ceil(16));
    for i in 0..most.max().unwrap_or(0) {
        for (k, macs) in macs.iter_mut().enumerate() {
            let mut padded = [None; V];
            for (v, padded) in padded.iter_mut().enumerate() {
                *padded = associated(k * V + v).chunks(16).nth(i).map(packet::padded);
            }
            macs.absorb(from_fn(|v| padded[v].as_ref()));
        }
    }
}
