//! Eight lanes in the registers of AVX2.

use std::arch::x86_64::*;

use super::assembly::{self, Words};
use super::interleaved::{self, AMID, Steps};
use super::lanes::Lanes;
use super::packet::Packet;
use super::poly1305::{Factor, Sum};

/// Proof of AVX2, and of BMI2 for the multiplications of Poly1305.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

impl Avx2 {
    /// The proof, where the processor has both.
    pub(super) fn detect() -> Option<Avx2> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi2")).then_some(Avx2(()))
    }

    /// Seals or opens the batch.
    pub(super) fn run<P: Packet>(self, batch: &mut [P]) {
        // SAFETY: `self` proves AVX2 and BMI2.
        unsafe { run(self, batch) }
    }
}

/// All of the kernel is inlined here, so that it is compiled with these features.
#[target_feature(enable = "avx2,bmi2")]
fn run<P: Packet>(cpu: Avx2, batch: &mut [P]) {
    interleaved::run::<Words, P, 8>(cpu, batch);
}

impl Steps<8> for Words {
    #[inline(always)]
    fn double_round(_: Avx2, words: &mut [Words; 16]) {
        // SAFETY: `Avx2` proves AVX2.
        unsafe { assembly::double_round(words) }
    }

    #[inline(always)]
    fn double_round_and_mac(
        _: Avx2,
        words: &mut [Words; 16],
        h: &mut Sum,
        r: &Factor,
        blocks: &[[u8; 16]; AMID],
    ) {
        // SAFETY: `Avx2` proves AVX2 and BMI2.
        unsafe { assembly::double_round_and_mac(words, h, r, blocks) }
    }

    #[inline(always)]
    fn absorb(_: Avx2, h: Sum, r: &Factor, block: &[u8; 16]) -> Sum {
        // SAFETY: `Avx2` proves BMI2.
        unsafe { assembly::absorb(h, r, block) }
    }
}

impl Lanes<8> for Words {
    type Cpu = Avx2;

    #[inline(always)]
    fn splat(_: Avx2, word: u32) -> Words {
        // SAFETY: `Avx2` proves AVX2.
        Words(unsafe { _mm256_set1_epi32(word.cast_signed()) })
    }

    #[inline(always)]
    fn numbers(_: Avx2) -> Words {
        // SAFETY: `Avx2` proves AVX2.
        Words(unsafe { numbers() })
    }

    #[inline(always)]
    fn then(self, first: u32, other: Words) -> Words {
        // SAFETY: a `Words` exists, so AVX2 does.
        Words(unsafe { then(self.0, first, other.0) })
    }

    #[inline(always)]
    fn add(self, other: Words) -> Words {
        // SAFETY: a `Words` exists, so AVX2 does.
        Words(unsafe { _mm256_add_epi32(self.0, other.0) })
    }

    #[inline(always)]
    fn xor(self, other: Words) -> Words {
        // SAFETY: a `Words` exists, so AVX2 does.
        Words(unsafe { _mm256_xor_si256(self.0, other.0) })
    }

    #[inline(always)]
    fn rotate<const BITS: i32>(self, _: Avx2) -> Words {
        // SAFETY: a `Words` exists, so AVX2 does.
        Words(unsafe { rotate::<BITS>(self.0) })
    }

    #[inline(always)]
    fn store(words: [Words; 16], blocks: &mut [[u8; 64]; 8]) {
        for (half, words) in words.as_chunks().0.iter().enumerate() {
            // SAFETY: `Words` exist, so AVX2 does.
            let lanes = unsafe { transpose(words) };
            for (block, lane) in blocks.iter_mut().zip(lanes) {
                let to = &mut block.as_chunks_mut::<32>().0[half];
                // SAFETY: AVX2 as above, and `to` has the 32 bytes that are written.
                unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), lane) };
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn numbers() -> __m256i {
    _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)
}

#[inline]
#[target_feature(enable = "avx2")]
fn then(below: __m256i, first: u32, from: __m256i) -> __m256i {
    let is_below = _mm256_cmpgt_epi32(_mm256_set1_epi32(first.cast_signed()), numbers());
    _mm256_blendv_epi8(from, below, is_below)
}

#[inline]
#[target_feature(enable = "avx2")]
fn rotate<const BITS: i32>(x: __m256i) -> __m256i {
    match BITS {
        16 => _mm256_or_si256(_mm256_slli_epi32::<16>(x), _mm256_srli_epi32::<16>(x)),
        12 => _mm256_or_si256(_mm256_slli_epi32::<12>(x), _mm256_srli_epi32::<20>(x)),
        8 => _mm256_or_si256(_mm256_slli_epi32::<8>(x), _mm256_srli_epi32::<24>(x)),
        7 => _mm256_or_si256(_mm256_slli_epi32::<7>(x), _mm256_srli_epi32::<25>(x)),
        _ => unreachable!("ChaCha20 rotates by 16, 12, 8 and 7"),
    }
}

/// Eight vectors of eight words, transposed: vector `i` of the result holds lane `i` of each.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(rows: &[Words; 8]) -> [__m256i; 8] {
    let row = |i: usize| rows[i].0;
    // Pairs of words, then fours of words, within each half of the registers ...
    let pairs = |i: usize| {
        (
            _mm256_unpacklo_epi32(row(i), row(i + 1)),
            _mm256_unpackhi_epi32(row(i), row(i + 1)),
        )
    };
    let fours = |i: usize| {
        let ((a, b), (c, d)) = (pairs(i), pairs(i + 2));
        [
            _mm256_unpacklo_epi64(a, c),
            _mm256_unpackhi_epi64(a, c),
            _mm256_unpacklo_epi64(b, d),
            _mm256_unpackhi_epi64(b, d),
        ]
    };
    // ... then the halves find each other: low ones are lanes 0 to 3, high ones lanes 4 to 7.
    let (front, back) = (fours(0), fours(4));
    std::array::from_fn(|i| match i {
        0..4 => _mm256_permute2x128_si256::<0x20>(front[i], back[i]),
        _ => _mm256_permute2x128_si256::<0x31>(front[i - 4], back[i - 4]),
    })
}

#[cfg(test)]
mod tests {
    use std::array::from_fn;

    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;
    use crate::aead::chacha20::{columns, diagonals};
    use crate::aead::poly1305::{self, Poly1305};

    /// Any word, and often one that makes for long carries.
    fn word(rng: &mut StdRng) -> u64 {
        match rng.random_range(0..4) {
            0 => u64::MAX,
            1 => u64::MAX - rng.random_range(0..8),
            2 => 0,
            _ => rng.random(),
        }
    }

    fn block(rng: &mut StdRng) -> [u8; 16] {
        let [low, high] = from_fn(|_| u128::from(word(rng)));
        (low | high << 64).to_le_bytes()
    }

    fn stored(words: [Words; 16]) -> [[u8; 64]; 8] {
        let mut blocks = [[0; 64]; 8];
        Words::store(words, &mut blocks);
        blocks
    }

    #[test]
    fn the_assembly_computes_what_the_portable_steps_do() {
        let Some(cpu) = Avx2::detect() else { return };
        let rng = &mut StdRng::seed_from_u64(8439);
        for _ in 0..20_000 {
            let mut words: [Words; 16] = from_fn(|_| {
                let lanes = (0..8).map(|lane| (lane, Words::splat(cpu, rng.random())));
                lanes.fold(Words::splat(cpu, 0), |words, (lane, word)| {
                    words.then(lane, word)
                })
            });
            let mut portable = words;
            columns(cpu, &mut portable);
            diagonals(cpu, &mut portable);

            // The largest sum that the documentation of `Sum` allows, or less.
            let mut h: Sum = [word(rng), word(rng), word(rng) & 7];
            let key: [[u8; 16]; 2] = from_fn(|_| block(rng));
            let mac = Poly1305::new(key.as_flattened().first_chunk().unwrap());
            let blocks: [[u8; 16]; AMID] = from_fn(|_| block(rng));
            let macs = blocks.iter().fold(h, |h, block| {
                let next = poly1305::absorb(h, &mac.r, block);
                assert_eq!(Words::absorb(cpu, h, &mac.r, block), next, "{h:x?}");
                next
            });

            let mut alone = words;
            Words::double_round(cpu, &mut alone);
            Words::double_round_and_mac(cpu, &mut words, &mut h, &mac.r, &blocks);
            assert_eq!(stored(alone), stored(portable));
            assert_eq!(stored(words), stored(portable));
            assert_eq!(h, macs);
        }
    }
}
