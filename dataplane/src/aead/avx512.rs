//! Sixteen blocks of ChaCha20, or eight MACs, in the registers of AVX-512. The MACs multiply by IFMA.

use std::arch::x86_64::*;

use super::lanes::{Lanes, Limbs};
use super::lockstep;
use super::packet::Packet;

/// Proof of AVX-512F and IFMA.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512(());

impl Avx512 {
    /// The proof, where the processor has both.
    pub(super) fn detect() -> Option<Avx512> {
        (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512ifma"))
            .then_some(Avx512(()))
    }

    /// Seals or opens the batch.
    pub(super) fn run<P: Packet>(self, batch: &mut [P]) {
        // SAFETY: `self` proves AVX-512F and IFMA.
        unsafe { run(self, batch) }
    }
}

/// All of the kernel is inlined here, so that it is compiled with these features.
#[target_feature(enable = "avx512f,avx512ifma")]
fn run<P: Packet>(cpu: Avx512, batch: &mut [P]) {
    lockstep::run::<Words, Quads, P, 16, 8>(cpu, batch);
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
        #[expect(clippy::cast_possible_truncation, reason = "a bit for each lane")]
        let from_there = (0xffff_u32 << first) as u16;
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

#[derive(Clone, Copy)]
struct Quads(__m512i);

impl Limbs<8> for Quads {
    type Cpu = Avx512;

    #[inline(always)]
    fn splat(_: Avx512, word: u64) -> Quads {
        // SAFETY: `Avx512` proves AVX-512F.
        Quads(unsafe { _mm512_set1_epi64(word.cast_signed()) })
    }

    #[inline(always)]
    fn load(_: Avx512, blocks: [&[u8; 16]; 8]) -> [Quads; 2] {
        // SAFETY: `Avx512` proves AVX-512F.
        unsafe { load(blocks) }
    }

    #[inline(always)]
    fn store([low, high]: [Quads; 2], blocks: &mut [[u8; 16]; 8]) {
        // SAFETY: `Quads` exist, so AVX-512F does.
        unsafe { store(low, high, blocks) }
    }

    #[inline(always)]
    fn add(self, other: Quads) -> Quads {
        // SAFETY: a `Quads` exists, so AVX-512F does.
        Quads(unsafe { _mm512_add_epi64(self.0, other.0) })
    }

    #[inline(always)]
    fn and(self, other: Quads) -> Quads {
        // SAFETY: a `Quads` exists, so AVX-512F does.
        Quads(unsafe { _mm512_and_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn or(self, other: Quads) -> Quads {
        // SAFETY: a `Quads` exists, so AVX-512F does.
        Quads(unsafe { _mm512_or_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn shl<const BITS: u32>(self) -> Quads {
        // SAFETY: a `Quads` exists, so AVX-512F does.
        Quads(unsafe { _mm512_slli_epi64::<BITS>(self.0) })
    }

    #[inline(always)]
    fn shr<const BITS: u32>(self) -> Quads {
        // SAFETY: a `Quads` exists, so AVX-512F does.
        Quads(unsafe { _mm512_srli_epi64::<BITS>(self.0) })
    }

    #[inline(always)]
    fn add_low_product(self, x: Quads, y: Quads) -> Quads {
        // SAFETY: a `Quads` exists, so AVX-512F and IFMA do.
        Quads(unsafe { _mm512_madd52lo_epu64(self.0, x.0, y.0) })
    }

    #[inline(always)]
    fn add_high_product(self, x: Quads, y: Quads) -> Quads {
        // SAFETY: a `Quads` exists, so AVX-512F and IFMA do.
        Quads(unsafe { _mm512_madd52hi_epu64(self.0, x.0, y.0) })
    }

    #[inline(always)]
    fn where_set(self, mask: u8, other: Quads) -> Quads {
        // SAFETY: a `Quads` exists, so AVX-512F does.
        Quads(unsafe { _mm512_mask_mov_epi64(self.0, mask, other.0) })
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(blocks: [&[u8; 16]; 8]) -> [Quads; 2] {
    // Blocks 0, 2, 4 and 6, and the others.
    let [mut even, mut odd] = [_mm512_setzero_si512(); 2];
    even = _mm512_inserti32x4::<0>(even, block(blocks[0]));
    even = _mm512_inserti32x4::<1>(even, block(blocks[2]));
    even = _mm512_inserti32x4::<2>(even, block(blocks[4]));
    even = _mm512_inserti32x4::<3>(even, block(blocks[6]));
    odd = _mm512_inserti32x4::<0>(odd, block(blocks[1]));
    odd = _mm512_inserti32x4::<1>(odd, block(blocks[3]));
    odd = _mm512_inserti32x4::<2>(odd, block(blocks[5]));
    odd = _mm512_inserti32x4::<3>(odd, block(blocks[7]));
    let low = _mm512_unpacklo_epi64(even, odd);
    let high = _mm512_unpackhi_epi64(even, odd);
    [Quads(low), Quads(high)]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn block(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: these are the 16 bytes that are read.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(Quads(low): Quads, Quads(high): Quads, blocks: &mut [[u8; 16]; 8]) {
    let even = _mm512_unpacklo_epi64(low, high);
    let odd = _mm512_unpackhi_epi64(low, high);
    let pieces = [
        _mm512_extracti32x4_epi32::<0>(even),
        _mm512_extracti32x4_epi32::<0>(odd),
        _mm512_extracti32x4_epi32::<1>(even),
        _mm512_extracti32x4_epi32::<1>(odd),
        _mm512_extracti32x4_epi32::<2>(even),
        _mm512_extracti32x4_epi32::<2>(odd),
        _mm512_extracti32x4_epi32::<3>(even),
        _mm512_extracti32x4_epi32::<3>(odd),
    ];
    for (block, piece) in blocks.iter_mut().zip(pieces) {
        // SAFETY: these are the 16 bytes that are written.
        unsafe { _mm_storeu_si128(block.as_mut_ptr().cast(), piece) };
    }
}
