//! Eight lanes in the registers of AVX2.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::interleaved::{self, Steps};
use super::lanes::Lanes;
use super::packet::Packet;

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
fn run<P: Packet>(_: Avx2, batch: &mut [P]) {
    let to_rotate_16 = _mm_set_epi8(13, 12, 15, 14, 9, 8, 11, 10, 5, 4, 7, 6, 1, 0, 3, 2);
    let to_rotate_8 = _mm_set_epi8(14, 13, 12, 15, 10, 9, 8, 11, 6, 5, 4, 7, 2, 1, 0, 3);
    // The compiler makes two shuffles of each one whose mask it knows.
    let cpu = Constants {
        to_rotate_16: black_box(_mm256_broadcastsi128_si256(to_rotate_16)),
        to_rotate_8: black_box(_mm256_broadcastsi128_si256(to_rotate_8)),
    };
    interleaved::run::<Words, P, 8>(cpu, batch);
}

/// Made with a proof of AVX2, and a proof like it.
#[derive(Clone, Copy)]
struct Constants {
    to_rotate_16: __m256i,
    to_rotate_8: __m256i,
}

#[derive(Clone, Copy)]
struct Words(__m256i);

impl Steps<8> for Words {}

impl Lanes<8> for Words {
    type Cpu = Constants;

    #[inline(always)]
    fn splat(_: Constants, word: u32) -> Words {
        // SAFETY: `Constants` prove AVX2.
        Words(unsafe { _mm256_set1_epi32(word.cast_signed()) })
    }

    #[inline(always)]
    fn numbers(_: Constants) -> Words {
        // SAFETY: `Constants` prove AVX2.
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
    fn rotate<const BITS: i32>(self, constants: Constants) -> Words {
        // SAFETY: a `Words` exists, so AVX2 does.
        Words(unsafe { rotate::<BITS>(self.0, constants) })
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

/// Whole bytes move by a shuffle, in one instruction; the other rotations take three.
#[inline]
#[target_feature(enable = "avx2")]
fn rotate<const BITS: i32>(x: __m256i, constants: Constants) -> __m256i {
    match BITS {
        16 => _mm256_shuffle_epi8(x, constants.to_rotate_16),
        8 => _mm256_shuffle_epi8(x, constants.to_rotate_8),
        12 => _mm256_or_si256(_mm256_slli_epi32::<12>(x), _mm256_srli_epi32::<20>(x)),
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
