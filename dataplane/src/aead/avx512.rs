//! Sixteen lanes in the registers of AVX-512.

use std::arch::x86_64::*;

use super::kernel;
use super::lanes::Lanes;
use super::packet::Packet;

/// Proof of AVX-512F, and of BMI2 for the multiplications of Poly1305.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512(());

impl Avx512 {
    /// The proof, where the processor has both.
    pub(super) fn detect() -> Option<Avx512> {
        (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("bmi2"))
            .then_some(Avx512(()))
    }

    /// Seals or opens the batch.
    pub(super) fn run<P: Packet>(self, batch: &mut [P]) {
        // SAFETY: `self` proves AVX-512F and BMI2.
        unsafe { run(self, batch) }
    }
}

/// All of the kernel is inlined here, so that it is compiled with these features.
#[target_feature(enable = "avx512f,bmi2")]
fn run<P: Packet>(cpu: Avx512, batch: &mut [P]) {
    kernel::run::<Words, P, 16, 2, 2>(cpu, batch);
}

#[derive(Clone, Copy)]
struct Words(__m512i);

impl Lanes<16> for Words {
    type Cpu = Avx512;

    #[inline(always)]
    fn splat(_: Avx512, word: u32) -> Words {
        // SAFETY: `Avx512` proves AVX-512F.
        Words(unsafe { _mm512_set1_epi32(word.cast_signed()) })
    }

    #[inline(always)]
    fn numbers(_: Avx512) -> Words {
        // SAFETY: `Avx512` proves AVX-512F.
        Words(unsafe { numbers() })
    }

    #[inline(always)]
    fn then(self, first: u32, other: Words) -> Words {
        let from_there = 0xffff << first;
        // SAFETY: a `Words` exists, so AVX-512F does.
        Words(unsafe { _mm512_mask_mov_epi32(self.0, from_there, other.0) })
    }

    #[inline(always)]
    fn add(self, other: Words) -> Words {
        // SAFETY: a `Words` exists, so AVX-512F does.
        Words(unsafe { _mm512_add_epi32(self.0, other.0) })
    }

    #[inline(always)]
    fn xor(self, other: Words) -> Words {
        // SAFETY: a `Words` exists, so AVX-512F does.
        Words(unsafe { _mm512_xor_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn rotate<const BITS: i32>(self, _: Avx512) -> Words {
        // SAFETY: a `Words` exists, so AVX-512F does.
        Words(unsafe { _mm512_rol_epi32::<BITS>(self.0) })
    }

    #[inline(always)]
    fn store(words: [Words; 16], blocks: &mut [[u8; 64]; 16]) {
        // SAFETY: `Words` exist, so AVX-512F does.
        let lanes = unsafe { transpose(words) };
        for (block, lane) in blocks.iter_mut().zip(lanes) {
            // SAFETY: AVX-512F as above, and `block` has the 64 bytes that are written.
            unsafe { _mm512_storeu_si512(block.as_mut_ptr().cast(), lane) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn numbers() -> __m512i {
    _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
}

/// Sixteen vectors of sixteen words, transposed: vector `i` of the result holds lane `i` of each.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [Words; 16]) -> [__m512i; 16] {
    let row = rows.map(|words| words.0);
    // Within each quarter of the registers: pairs of words, then fours. `fours[i][j]` has, in its
    // quarter `q`, words 4i to 4i + 3 of lane 4q + j.
    let fours: [[__m512i; 4]; 4] = std::array::from_fn(|i| {
        let (a, b, c, d) = (row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3]);
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab_low, cd_low),
            _mm512_unpackhi_epi64(ab_low, cd_low),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ]
    });
    // Then the quarters find each other, a transposition of 4 by 4 quarters for each `j`.
    let mut lanes = [_mm512_setzero_si512(); 16];
    for j in 0..4 {
        let [a, b, c, d] = std::array::from_fn(|i| fours[i][j]);
        let ab_even = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
        let ab_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
        let cd_even = _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d);
        let cd_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d);
        lanes[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_even, cd_even);
        lanes[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_odd, cd_odd);
        lanes[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_even, cd_even);
        lanes[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_odd, cd_odd);
    }
    lanes
}
