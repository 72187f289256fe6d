//! Sums of 32-bit words, for Internet checksums. The vector loop is here because it takes unsafe code to
//! call a function that is compiled for AVX2. Safe loops in such a function took 1.15 to 2.8 times as
//! long, as the compiler pleased, and twice as long without AVX2.

/// Slices shorter than this go through the plain loop.
const VECTOR_LEN_MIN: usize = 128;

/// The sum of the 32-bit words of a slice, in little-endian order; zeros fill up the last.
#[inline]
pub(crate) fn sum_of(bytes: &[u8]) -> u64 {
    // Below this the vector set-up costs more than it saves.
    if bytes.len() < VECTOR_LEN_MIN {
        sum_words(bytes)
    } else {
        sum_long(bytes)
    }
}

/// The portable loop, by words of 8 bytes.
#[inline]
pub(crate) fn sum_words(bytes: &[u8]) -> u64 {
    let halves = |word: u64| (word & 0xffff_ffff) + (word >> 32);
    let (words, rest) = bytes.as_chunks::<8>();
    let sum: u64 = words
        .iter()
        .map(|word| halves(u64::from_le_bytes(*word)))
        .sum();
    if rest.is_empty() {
        return sum;
    }
    // The last word overlaps the one before it, whose bytes are shifted out: cheaper than copying
    // up to 7 bytes into a word of zeros.
    let last = match bytes.last_chunk::<8>() {
        Some(last) => u64::from_le_bytes(*last) >> (64 - 8 * rest.len()),
        None => rest
            .iter()
            .rev()
            .fold(0, |word, byte| (word << 8) | u64::from(*byte)),
    };
    sum + halves(last)
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn sum_long(bytes: &[u8]) -> u64 {
    // Detection is a cached load and a test.
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, as detected in the line above.
        unsafe { sum_avx2(bytes) }
    } else {
        sum_words(bytes)
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline]
fn sum_long(bytes: &[u8]) -> u64 {
    sum_words(bytes)
}

/// The same sum, 64 bytes at a time: even and odd 32-bit words of two registers, each into an
/// accumulator of its own.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(bytes: &[u8]) -> u64 {
    use std::arch::x86_64::{
        __m256i, _mm_add_epi64, _mm_cvtsi128_si64, _mm_extract_epi64, _mm256_add_epi64,
        _mm256_and_si256, _mm256_castsi256_si128, _mm256_extracti128_si256, _mm256_loadu_si256,
        _mm256_set1_epi64x, _mm256_setzero_si256, _mm256_srli_epi64,
    };

    let (halves, rest) = bytes.as_chunks::<32>();
    let (blocks, odd) = halves.as_chunks::<2>();
    let low_half = _mm256_set1_epi64x(0xffff_ffff);
    let load = |half: &[u8; 32]| -> __m256i {
        // SAFETY: the array is 32 readable bytes, and the load needs no alignment.
        unsafe { _mm256_loadu_si256(half.as_ptr().cast()) }
    };
    let mut sums = [_mm256_setzero_si256(); 4];
    for [a, b] in blocks {
        let (a, b) = (load(a), load(b));
        sums[0] = _mm256_add_epi64(sums[0], _mm256_and_si256(a, low_half));
        sums[1] = _mm256_add_epi64(sums[1], _mm256_srli_epi64::<32>(a));
        sums[2] = _mm256_add_epi64(sums[2], _mm256_and_si256(b, low_half));
        sums[3] = _mm256_add_epi64(sums[3], _mm256_srli_epi64::<32>(b));
    }
    if let Some(a) = odd.first().map(load) {
        sums[0] = _mm256_add_epi64(sums[0], _mm256_and_si256(a, low_half));
        sums[1] = _mm256_add_epi64(sums[1], _mm256_srli_epi64::<32>(a));
    }
    let sum = _mm256_add_epi64(
        _mm256_add_epi64(sums[0], sums[1]),
        _mm256_add_epi64(sums[2], sums[3]),
    );
    let sum = _mm_add_epi64(
        _mm256_castsi256_si128(sum),
        _mm256_extracti128_si256::<1>(sum),
    );
    let [low, high] = [_mm_cvtsi128_si64(sum), _mm_extract_epi64::<1>(sum)];
    low.cast_unsigned() + high.cast_unsigned() + sum_words(rest)
}
