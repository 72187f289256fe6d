#![forbid(unsafe_code)]
//! Poly1305 (RFC 8439 §2.5) in scalar code, radix 2^64.
//!
//! Four full multiplications and two short ones a block. No branch and no index depends on data:
//! only additions, shifts, and 64-bit multiplications, which take the same time for all operands on
//! every x86-64 processor with BMI2.

use super::TAG_LEN;

/// One message's authenticator: its one-time key, and the sum so far.
#[derive(Clone, Copy, Default)]
pub(super) struct Poly1305 {
    pub(super) h: Sum,
    pub(super) r: Factor,
    /// Added at the end.
    pad: [u64; 2],
}

/// The sum so far. Not fully reduced, but below 2^130 + 2^66 ([`absorb`]).
pub(super) type Sum = [u64; 3];

/// The clamped multiplier, below 2^124, in two words, and behind it `s`, which is 5/4 of the second: a
/// whole number, because clamping clears the low two bits. As 2^130 is 5 modulo the prime, the second
/// word times 2^128 is as good as `s`.
pub(super) type Factor = [u64; 3];

impl Poly1305 {
    /// Starts with this one-time key.
    #[inline(always)]
    pub(super) fn new(key: &[u8; 32]) -> Poly1305 {
        let (words, _) = key.as_chunks();
        let [r0, r1, pad0, pad1] = std::array::from_fn(|i| u64::from_le_bytes(words[i]));
        let (r0, r1) = (r0 & 0x0fff_fffc_0fff_ffff, r1 & 0x0fff_fffc_0fff_fffc);
        Poly1305 {
            h: [0; 3],
            r: [r0, r1, r1 + (r1 >> 2)],
            pad: [pad0, pad1],
        }
    }

    /// Takes in a block.
    #[cfg(test)]
    pub(super) fn block(&mut self, block: &[u8; 16]) {
        self.h = absorb(self.h, &self.r, block);
    }

    /// The tag.
    #[inline(always)]
    pub(super) fn tag(&self) -> [u8; TAG_LEN] {
        // The sum modulo the prime, of which 128 bits count. The sum is below twice the prime, and `h + 5`
        // passes 2^130 exactly where `h` passes the prime: that is worth 5.
        let low = join(self.h[0], self.h[1]);
        let (_, carry) = low.overflowing_add(5);
        let passed = (self.h[2] + u64::from(carry)) >> 2;
        low.wrapping_add(u128::from(passed * 5))
            .wrapping_add(join(self.pad[0], self.pad[1]))
            .to_le_bytes()
    }
}

/// Takes in a block of 16 bytes: `(h + block + 2^128) * r` modulo `2^130 - 5`, below 2^130 + 2^66.
#[inline(always)]
pub(super) fn absorb(h: Sum, [r0, r1, s]: &Factor, block: &[u8; 16]) -> Sum {
    let (low, carry) = join(h[0], h[1]).overflowing_add(u128::from_le_bytes(*block));
    let (h0, h1) = split(low);
    let h2 = h[2] + 1 + u64::from(carry);

    // Below, no sum reaches 2^128: r and s are below 2^60 and 2^61 a word. Nor do the products
    // with h2, which is at most 6, reach 2^64.
    let (a, b) = (wide(h0, *r0), wide(h0, *r1));
    let (c, d) = (wide(h1, *s), wide(h1, *r0));
    let (d0, up) = split(a + c);
    let (d1, up) = split(b + d + u128::from(h2 * s) + u128::from(up));
    let d2 = h2 * r0 + up;

    // What is above 2^130 goes back in at the bottom, five times: below 2^62 * 5, and so below 2^66.
    let (low, carry) = join(d0, d1).overflowing_add(u128::from((d2 >> 2) * 5));
    let (h0, h1) = split(low);
    [h0, h1, (d2 & 3) + u64::from(carry)]
}

fn wide(a: u64, b: u64) -> u128 {
    u128::from(a) * u128::from(b)
}

fn join(low: u64, high: u64) -> u128 {
    u128::from(low) | u128::from(high) << 64
}

#[expect(clippy::cast_possible_truncation, reason = "both halves are returned")]
fn split(x: u128) -> (u64, u64) {
    (x as u64, (x >> 64) as u64)
}
