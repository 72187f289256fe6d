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
        for (block, Words(lane)) in blocks.iter_mut().zip(transpose(words)) {
            // SAFETY: `Words` exist, so AVX-512F does, and `block` has the 64 bytes that are written.
            unsafe { _mm512_storeu_si512(block.as_mut_ptr().cast(), lane) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn numbers() -> __m512i {
    _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
}

/// Shuffles of two vectors, as functions that must be inlined, which those with a `target_feature` cannot be
/// told: a transposition that is called takes and gives its vectors through memory.
macro_rules! shuffles {
    ($($name:ident = $intrinsic:ident;)*) => {$(
        #[inline(always)]
        fn $name(Words(a): Words, Words(b): Words) -> Words {
            // SAFETY: `Words` exist, so AVX-512F does.
            Words(unsafe { $intrinsic(a, b) })
        }
    )*};
}

shuffles! {
    low_words = _mm512_unpacklo_epi32;
    high_words = _mm512_unpackhi_epi32;
    low_pairs = _mm512_unpacklo_epi64;
    high_pairs = _mm512_unpackhi_epi64;
    even_quarters = even_quarters_of;
    odd_quarters = odd_quarters_of;
}

#[inline]
#[target_feature(enable = "avx512f")]
fn even_quarters_of(a: __m512i, b: __m512i) -> __m512i {
    _mm512_shuffle_i64x2::<0b10_00_10_00>(a, b)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn odd_quarters_of(a: __m512i, b: __m512i) -> __m512i {
    _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b)
}

/// Sixteen vectors of sixteen words, transposed: vector `i` of the result holds lane `i` of each.
#[inline(always)]
fn transpose(row: [Words; 16]) -> [Words; 16] {
    // Within each quarter of the registers: pairs of words, then fours. `fours[i][j]` has, in its
    // quarter `q`, words 4i to 4i + 3 of lane 4q + j.
    let mut fours = [[row[0]; 4]; 4];
    for (i, fours) in fours.iter_mut().enumerate() {
        let (a, b, c, d) = (row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3]);
        let (ab_low, ab_high) = (low_words(a, b), high_words(a, b));
        let (cd_low, cd_high) = (low_words(c, d), high_words(c, d));
        *fours = [
            low_pairs(ab_low, cd_low),
            high_pairs(ab_low, cd_low),
            low_pairs(ab_high, cd_high),
            high_pairs(ab_high, cd_high),
        ];
    }
    // Then the quarters find each other, a transposition of 4 by 4 quarters for each `j`.
    let mut lanes = row;
    for j in 0..4 {
        let (a, b, c, d) = (fours[0][j], fours[1][j], fours[2][j], fours[3][j]);
        let (ab_even, ab_odd) = (even_quarters(a, b), odd_quarters(a, b));
        let (cd_even, cd_odd) = (even_quarters(c, d), odd_quarters(c, d));
        lanes[j] = even_quarters(ab_even, cd_even);
        lanes[4 + j] = even_quarters(ab_odd, cd_odd);
        lanes[8 + j] = odd_quarters(ab_even, cd_even);
        lanes[12 + j] = odd_quarters(ab_odd, cd_odd);
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
    fn load_two(cpu: Avx512, rows: [&[[u8; 16]; 2]; 8]) -> [[Quads; 2]; 2] {
        // Rows are paired so that their lanes come out in order.
        let (a, b) = (pair(cpu, rows[0], rows[2]), pair(cpu, rows[1], rows[3]));
        let (c, d) = (pair(cpu, rows[4], rows[6]), pair(cpu, rows[5], rows[7]));
        let (ab_low, ab_high) = (low_pairs(a, b), high_pairs(a, b));
        let (cd_low, cd_high) = (low_pairs(c, d), high_pairs(c, d));
        // The first blocks are the even quarters.
        let (first_low, second_low) = (even_quarters(ab_low, cd_low), odd_quarters(ab_low, cd_low));
        let (first_high, second_high) = (
            even_quarters(ab_high, cd_high),
            odd_quarters(ab_high, cd_high),
        );
        [
            [Quads(first_low.0), Quads(first_high.0)],
            [Quads(second_low.0), Quads(second_high.0)],
        ]
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

/// Two rows side by side.
#[inline(always)]
fn pair(_: Avx512, row: &[[u8; 16]; 2], other: &[[u8; 16]; 2]) -> Words {
    // SAFETY: `Avx512` proves AVX-512F.
    Words(unsafe { pair_of(row, other) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pair_of(row: &[[u8; 16]; 2], other: &[[u8; 16]; 2]) -> __m512i {
    // SAFETY: these are the 32 bytes that are read.
    let row = unsafe { _mm256_loadu_si256(row.as_ptr().cast()) };
    // SAFETY: and these.
    let other = unsafe { _mm256_loadu_si256(other.as_ptr().cast()) };
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(row), other)
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
