#![forbid(unsafe_code)]
//! ChaCha20 (RFC 8439 §2.3), each lane a block of its own: key, nonce and block number are those of
//! the packet it is dealt to.

use std::array::from_fn;
use std::hint::black_box;

use super::lanes::{BLOCK_LEN, Lanes};
use super::packet::{Packet, low_bytes};

/// Double rounds of a block.
pub(super) const DOUBLE_ROUNDS: usize = 10;
/// "expand 32-byte k".
const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];
/// What the two halves of a double round work on, four words at a time.
const COLUMNS: [[usize; 4]; 4] = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]];
const DIAGONALS: [[usize; 4]; 4] = [[0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]];

/// From `lane` on, lanes have successive blocks of `packet`, the first of them this one.
#[derive(Clone, Copy)]
pub(super) struct Origin {
    pub(super) lane: u32,
    pub(super) packet: usize,
    pub(super) block: u32,
}

/// The words that blocks of these origins, lanes ascending, start from: constants, key, block
/// number, nonce.
#[inline(always)]
pub(super) fn start<L: Lanes<N>, P: Packet, const N: usize>(
    cpu: L::Cpu,
    batch: &[P],
    origins: impl Iterator<Item = Origin> + Clone,
) -> [L; 16] {
    let mut words = [L::splat(cpu, 0); 16];
    let Some(first) = origins.clone().next() else {
        return words;
    };
    for (word, constant) in words.iter_mut().zip(CONSTANTS) {
        *word = L::splat(cpu, constant);
    }
    // Batches of one key are the rule, and cheaper: one vector for each word of the key.
    let key = batch[first.packet].key();
    let mut one_key = true;
    for (word, key) in words[4..].iter_mut().zip(key) {
        *word = L::splat(cpu, *key);
    }
    for origin in origins.clone() {
        let packet = &batch[origin.packet];
        one_key &= std::ptr::eq(packet.key(), key);
        let below_first_lane = origin.block.wrapping_sub(origin.lane);
        let block = L::splat(cpu, below_first_lane).add(L::numbers(cpu));
        let [a, b, c] = packet.nonce();
        let nonce = [L::splat(cpu, a), L::splat(cpu, b), L::splat(cpu, c)];
        for (word, from_here) in words[12..]
            .iter_mut()
            .zip([block, nonce[0], nonce[1], nonce[2]])
        {
            *word = word.then(origin.lane, from_here);
        }
    }
    if !one_key {
        for origin in origins {
            for (word, key) in words[4..].iter_mut().zip(batch[origin.packet].key()) {
                *word = word.then(origin.lane, L::splat(cpu, *key));
            }
        }
    }
    words
}

/// Has one lane start from another origin.
#[inline(always)]
pub(super) fn restart<L: Lanes<N>, P: Packet, const N: usize>(
    cpu: L::Cpu,
    words: &mut [L; 16],
    batch: &[P],
    origin: Origin,
) {
    let packet = &batch[origin.packet];
    let [a, b, c] = packet.nonce();
    let fresh = packet.key().iter().copied().chain([origin.block, a, b, c]);
    for (word, fresh) in words[4..].iter_mut().zip(fresh) {
        let others = *word;
        let from_here = word.then(origin.lane, L::splat(cpu, fresh));
        *word = from_here.then(origin.lane + 1, others);
    }
}

/// The blocks that start from these words.
#[inline(always)]
pub(super) fn blocks<L: Lanes<N>, const N: usize>(
    cpu: L::Cpu,
    start: &[L; 16],
    keystream: &mut [[u8; BLOCK_LEN]; N],
) {
    let mut words = *start;
    for _ in 0..DOUBLE_ROUNDS {
        columns(cpu, &mut words);
        diagonals(cpu, &mut words);
    }
    finish(words, start, keystream);
}

/// What of the first half round is the same for every block of a packet: all columns but the one with
/// the block number.
#[inline(always)]
pub(super) fn ahead<L: Lanes<N>, const N: usize>(cpu: L::Cpu, start: &[L; 16]) -> [L; 16] {
    let mut words = *start;
    for of in &COLUMNS[1..] {
        quarter_round(cpu, &mut words, *of);
    }
    words
}

/// The first double round, of which this has been done ahead.
#[inline(always)]
pub(super) fn first_double_round<L: Lanes<N>, const N: usize>(
    cpu: L::Cpu,
    start: &[L; 16],
    ahead: &[L; 16],
) -> [L; 16] {
    let mut words = *ahead;
    for i in COLUMNS[0] {
        words[i] = start[i];
    }
    quarter_round(cpu, &mut words, COLUMNS[0]);
    diagonals(cpu, &mut words);
    words
}

/// One more double round, where work of another kind is written between one and the next.
///
/// It is a loop, of one turn, so that the compiler keeps it between what is written before and behind it: of a
/// single block of code it does all of the other work first, and then a processor, which looks some
/// hundred instructions ahead, finds only one kind at a time.
#[inline(always)]
pub(super) fn double_round_amid<L: Lanes<N>, const N: usize>(cpu: L::Cpu, words: &mut [L; 16]) {
    loop {
        columns(cpu, words);
        diagonals(cpu, words);
        if black_box(true) {
            break;
        }
    }
}

/// Writes the blocks that start from `start`, whose rounds have made these words.
///
/// Vectors are added in a loop and not by `from_fn`: a closure is a function of its own, and where it is not
/// inlined it is compiled without the processor's features, every operation a call through memory.
#[inline(always)]
pub(super) fn finish<L: Lanes<N>, const N: usize>(
    mut words: [L; 16],
    start: &[L; 16],
    keystream: &mut [[u8; BLOCK_LEN]; N],
) {
    for (word, start) in words.iter_mut().zip(start) {
        *word = word.add(*start);
    }
    L::store(words, keystream);
}

/// The first half of a double round.
#[inline(always)]
pub(super) fn columns<L: Lanes<N>, const N: usize>(cpu: L::Cpu, words: &mut [L; 16]) {
    for of in COLUMNS {
        quarter_round(cpu, words, of);
    }
}

/// The second half.
#[inline(always)]
pub(super) fn diagonals<L: Lanes<N>, const N: usize>(cpu: L::Cpu, words: &mut [L; 16]) {
    for of in DIAGONALS {
        quarter_round(cpu, words, of);
    }
}

#[inline(always)]
fn quarter_round<L: Lanes<N>, const N: usize>(
    cpu: L::Cpu,
    words: &mut [L; 16],
    [a, b, c, d]: [usize; 4],
) {
    words[a] = words[a].add(words[b]);
    words[d] = words[d].xor(words[a]).rotate::<16>(cpu);
    words[c] = words[c].add(words[d]);
    words[b] = words[b].xor(words[c]).rotate::<12>(cpu);
    words[a] = words[a].add(words[b]);
    words[d] = words[d].xor(words[a]).rotate::<8>(cpu);
    words[c] = words[c].add(words[d]);
    words[b] = words[b].xor(words[c]).rotate::<7>(cpu);
}

/// Changes a block by its keystream.
#[inline(always)]
pub(super) fn xor_block(block: &mut [u8; BLOCK_LEN], keystream: &[u8; BLOCK_LEN]) {
    *block = from_fn(|i| block[i] ^ keystream[i]);
}

/// Changes the first `len` bytes of `text` by the keystream. Up to 15 bytes behind them are read
/// and written, but not changed: so that the end of a packet needs no loop over bytes.
#[inline(always)]
pub(super) fn xor(text: &mut [u8], len: usize, keystream: &[[u8; BLOCK_LEN]]) {
    let (whole, rest) = text.split_at_mut(len - len % BLOCK_LEN);
    let (blocks, _) = whole.as_chunks_mut::<BLOCK_LEN>();
    for (block, keystream) in blocks.iter_mut().zip(keystream) {
        xor_block(block, keystream);
    }
    let Some(keystream) = keystream.get(blocks.len()) else {
        return;
    };
    let (keystream, _) = keystream.as_chunks::<16>();
    let (pieces, _) = rest.as_chunks_mut::<16>();
    let pieces_len = (len % BLOCK_LEN).div_ceil(16);
    for (i, (piece, key)) in pieces
        .iter_mut()
        .zip(keystream)
        .take(pieces_len)
        .enumerate()
    {
        let key = u128::from_le_bytes(*key) & low_bytes(len % BLOCK_LEN - 16 * i);
        *piece = (u128::from_le_bytes(*piece) ^ key).to_le_bytes();
    }
}
