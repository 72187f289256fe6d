//! What [`interleaved`](super::interleaved) spends its time with, in assembly for AVX2 and BMI2.
//!
//! The compiler has two difficulties with it. A double round of ChaCha20 has 16 vectors and as many
//! registers, and needs one more register at a time: so one vector has to be aside in memory, but the
//! compiler puts some ten aside. And Poly1305 is chains of carries, which it breaks up in order to mix
//! them with vectors. Here a block of Poly1305 is 25 instructions, which the compiler does in 37.
//!
//! The functions compute what their namesakes do in `interleaved::Steps`, which are the reference for the
//! tests. There is no branch, and no address depends on anything but the pointers.

use std::arch::asm;
use std::arch::x86_64::__m256i;
use std::mem::MaybeUninit;

use super::poly1305::{Factor, Sum};

/// A word of eight blocks.
#[derive(Clone, Copy)]
pub(super) struct Words(pub(super) __m256i);

/// Shuffles of bytes that rotate words left by 16 and by 8.
#[repr(align(32))]
struct Rotations(#[expect(dead_code, reason = "the assembly reads it")] [[u8; 16]; 4]);

static ROTATIONS: Rotations = Rotations([
    [2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13],
    [2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13],
    [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14],
    [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14],
]);

/// An instruction: its name, where the result goes, and the other operands.
macro_rules! op {
    ($name:literal, $to:literal $(, $from:expr)*) => {
        concat!($name, " ", $to, $(", ", $from,)* "\n")
    };
}

/// A quarter round; `$t` is overwritten. `$c_at_first` is where `$c` is before, if in memory.
macro_rules! quarter_round {
    ($a:literal, $b:literal, $c:literal, $d:literal, $t:literal, $c_at_first:literal) => {
        concat!(
            op!("vpaddd", $a, $a, $b),
            op!("vpxor", $d, $d, $a),
            op!("vpshufb", $d, $d, "[rip + {rotations}]"),
            op!("vpaddd", $c, $d, $c_at_first),
            op!("vpxor", $b, $b, $c),
            op!("vpslld", $t, $b, 12),
            op!("vpsrld", $b, $b, 20),
            op!("vpor", $b, $b, $t),
            op!("vpaddd", $a, $a, $b),
            op!("vpxor", $d, $d, $a),
            op!("vpshufb", $d, $d, "[rip + {rotations} + 32]"),
            op!("vpaddd", $c, $c, $d),
            op!("vpxor", $b, $b, $c),
            op!("vpslld", $t, $b, 7),
            op!("vpsrld", $b, $b, 25),
            op!("vpor", $b, $b, $t),
        )
    };
    ($a:literal, $b:literal, $c:literal, $d:literal, $t:literal) => {
        quarter_round!($a, $b, $c, $d, $t, $c)
    };
}

/// The first part of block number `$i` of Poly1305: adds it and `2^128` to the sum, which is in `rdx`,
/// `$h1` and `h2`, and multiplies the first two words. Of the product,
///
/// - `h0 * r0 + h1 * s` is in `x0` and `x1`, to be had as it is,
/// - `h0 * r1 + h1 * r0` is in `$y0` and `y1`, to be had times 2^64.
macro_rules! multiply {
    ($i:literal, $h1:literal, $y0:literal) => {
        concat!(
            op!("add", "rdx", concat!("[{blocks} + 16 * ", $i, "]")),
            op!("adc", $h1, concat!("[{blocks} + 16 * ", $i, " + 8]")),
            op!("adc", "{h2}", 1),
            op!("mulx", "{x1}", "{x0}", "[{r}]"),
            op!("mulx", "{y1}", $y0, "[{r} + 8]"),
            op!("mov", "rdx", $h1),
            op!("mulx", "{t}", $h1, "[{r} + 16]"),
            op!("add", "{x0}", $h1),
            op!("adc", "{x1}", "{t}"),
            op!("mulx", "{t}", $h1, "[{r}]"),
            op!("add", $y0, $h1),
            op!("adc", "{y1}", "{t}"),
        )
    };
}

/// The second part: `h2 * s` belongs to `x1`, which has room for it (11.25 * 2^60 are added to less than
/// 2.25 * 2^60), and `h2 * r0` to `y1`; then what is above `2^130` goes back in at the bottom, five
/// times. The sum is in `rdx`, `$y0` and `h2` afterwards: the second word is where `multiply` had put
/// `$y0`, and the next block has the two names the other way round.
macro_rules! reduce {
    ($y0:literal) => {
        concat!(
            op!("mov", "{t}", "{h2}"),
            op!("imul", "{t}", "[{r} + 16]"),
            op!("imul", "{h2}", "[{r}]"),
            op!("add", "{x1}", "{t}"),
            op!("add", $y0, "{x1}"),
            op!("adc", "{y1}", "{h2}"),
            op!("mov", "{h2:e}", "{y1:e}"),
            op!("and", "{h2:e}", 3),
            op!("shr", "{y1}", 2),
            op!("lea", "rdx", "[{y1} + 4 * {y1}]"),
            op!("add", "rdx", "{x0}"),
            op!("adc", $y0, 0),
            op!("adc", "{h2}", 0),
        )
    };
}

/// A double round, with six pieces of other code amid it. The vector that is aside is one that waits for
/// its quarter round.
macro_rules! double_round {
    (
        $words:ident, $aside:ident,
        [$p0:expr, $p1:expr, $p2:expr, $p3:expr, $p4:expr, $p5:expr],
        $($operands:tt)*
    ) => {
        asm!(
            op!("vmovdqa", "[{aside}]", "{w11}"),
            quarter_round!("{w0}", "{w4}", "{w8}", "{w12}", "{w11}"),
            $p0,
            quarter_round!("{w1}", "{w5}", "{w9}", "{w13}", "{w11}"),
            $p1,
            quarter_round!("{w2}", "{w6}", "{w10}", "{w14}", "{w11}"),
            op!("vmovdqa", "[{aside} + 32]", "{w8}"),
            quarter_round!("{w3}", "{w7}", "{w11}", "{w15}", "{w8}", "[{aside}]"),
            $p2,
            quarter_round!("{w0}", "{w5}", "{w10}", "{w15}", "{w8}"),
            $p3,
            quarter_round!("{w1}", "{w6}", "{w11}", "{w12}", "{w8}"),
            quarter_round!("{w3}", "{w4}", "{w9}", "{w14}", "{w8}"),
            op!("vmovdqa", "[{aside}]", "{w11}"),
            $p4,
            quarter_round!("{w2}", "{w7}", "{w8}", "{w13}", "{w11}", "[{aside} + 32]"),
            $p5,
            op!("vmovdqa", "{w11}", "[{aside}]"),
            w0 = inout(ymm_reg) $words[0].0,
            w1 = inout(ymm_reg) $words[1].0,
            w2 = inout(ymm_reg) $words[2].0,
            w3 = inout(ymm_reg) $words[3].0,
            w4 = inout(ymm_reg) $words[4].0,
            w5 = inout(ymm_reg) $words[5].0,
            w6 = inout(ymm_reg) $words[6].0,
            w7 = inout(ymm_reg) $words[7].0,
            w8 = inout(ymm_reg) $words[8].0,
            w9 = inout(ymm_reg) $words[9].0,
            w10 = inout(ymm_reg) $words[10].0,
            w11 = inout(ymm_reg) $words[11].0,
            w12 = inout(ymm_reg) $words[12].0,
            w13 = inout(ymm_reg) $words[13].0,
            w14 = inout(ymm_reg) $words[14].0,
            w15 = inout(ymm_reg) $words[15].0,
            rotations = sym ROTATIONS,
            aside = in(reg) $aside.as_mut_ptr(),
            $($operands)*
        )
    };
}

/// A double round of eight blocks.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn double_round(words: &mut [Words; 16]) {
    let mut aside = MaybeUninit::<[__m256i; 2]>::uninit();
    // SAFETY: AVX2 is there; what is read and written in memory is all of `aside`, aligned, and what is
    // only read is `ROTATIONS`; every register it changes is an operand.
    unsafe {
        double_round!(
            words,
            aside,
            ["", "", "", "", "", ""],
            options(nostack, preserves_flags),
        );
    }
}

/// The same, and amid it three blocks of a MAC.
#[inline]
#[target_feature(enable = "avx2,bmi2")]
pub(super) fn double_round_and_mac(
    words: &mut [Words; 16],
    h: &mut Sum,
    r: &Factor,
    blocks: &[[u8; 16]; 3],
) {
    let mut aside = MaybeUninit::<[__m256i; 2]>::uninit();
    // SAFETY: as above, and BMI2 is there; what else is read in memory is all of `blocks` and `r`.
    unsafe {
        double_round!(words, aside,
            [
                multiply!(0, "{h1}", "{y0}"), reduce!("{y0}"),
                multiply!(1, "{y0}", "{h1}"), reduce!("{h1}"),
                multiply!(2, "{h1}", "{y0}"), reduce!("{y0}")
            ],
            inout("rdx") h[0],
            h1 = inout(reg) h[1] => _,
            h2 = inout(reg) h[2],
            x0 = out(reg) _,
            x1 = out(reg) _,
            y0 = out(reg) h[1],
            y1 = out(reg) _,
            t = out(reg) _,
            blocks = in(reg) blocks.as_ptr(),
            r = in(reg) r.as_ptr(),
            options(nostack),
        );
    }
}

/// A block of a MAC.
#[inline]
#[target_feature(enable = "bmi2")]
pub(super) fn absorb([mut h0, mut h1, mut h2]: Sum, r: &Factor, block: &[u8; 16]) -> Sum {
    // SAFETY: BMI2 is there; what is read in memory is all of `block` and `r`, nothing is written; every
    // register it changes is an operand.
    unsafe {
        asm!(
            multiply!(0, "{h1}", "{y0}"),
            reduce!("{y0}"),
            inout("rdx") h0,
            h1 = inout(reg) h1 => _,
            h2 = inout(reg) h2,
            x0 = out(reg) _,
            x1 = out(reg) _,
            y0 = out(reg) h1,
            y1 = out(reg) _,
            t = out(reg) _,
            blocks = in(reg) block.as_ptr(),
            r = in(reg) r.as_ptr(),
            options(pure, readonly, nostack),
        );
    }
    [h0, h1, h2]
}
