#![forbid(unsafe_code)]
//! What the kernels need of a processor: vectors of 32-bit words, one lane for each block of ChaCha20,
//! and for [`lockstep`](super::lockstep) vectors of 64-bit words, one lane for each Poly1305.

/// Bytes of a block of ChaCha20.
pub(super) const BLOCK_LEN: usize = 64;

/// A vector of `N` words.
pub(super) trait Lanes<const N: usize>: Copy {
    /// Proof that the processor has what the operations need, and constants of theirs. A vector is
    /// only made with one, so where there is a vector its operations can run.
    type Cpu: Copy;

    /// The same word in every lane.
    fn splat(cpu: Self::Cpu, word: u32) -> Self;
    /// The lane's own number in every lane.
    fn numbers(cpu: Self::Cpu) -> Self;
    /// These lanes below lane `first`, which may be `N`, and those of `other` from there on.
    fn then(self, first: u32, other: Self) -> Self;
    /// Sums, lane by lane and wrapping.
    fn add(self, other: Self) -> Self;
    /// Exclusive or.
    fn xor(self, other: Self) -> Self;
    /// Every lane rotated left by `BITS`, one of ChaCha20's 16, 12, 8 and 7.
    fn rotate<const BITS: i32>(self, cpu: Self::Cpu) -> Self;
    /// Writes what lane `i` has in each of the 16 vectors as block `i`, little-endian.
    fn store(words: [Self; 16], blocks: &mut [[u8; BLOCK_LEN]; N]);
}

/// A vector of `V` words of 64 bits.
pub(super) trait Limbs<const V: usize>: Copy {
    /// As in [`Lanes`].
    type Cpu: Copy;

    /// The same word in every lane.
    fn splat(cpu: Self::Cpu, word: u64) -> Self;
    /// The low and the high halves, little-endian, of block `i` in lane `i`.
    fn load(cpu: Self::Cpu, blocks: [&[u8; 16]; V]) -> [Self; 2];
    /// The halves of the first blocks of the rows, and of the second ones.
    fn load_two(cpu: Self::Cpu, rows: [&[[u8; 16]; 2]; V]) -> [[Self; 2]; 2];
    /// The way back from [`load`](Self::load).
    fn store(halves: [Self; 2], blocks: &mut [[u8; 16]; V]);
    /// Sums, lane by lane and wrapping.
    fn add(self, other: Self) -> Self;
    /// Bitwise and.
    fn and(self, other: Self) -> Self;
    /// Bitwise or.
    fn or(self, other: Self) -> Self;
    /// Every lane shifted left.
    fn shl<const BITS: u32>(self) -> Self;
    /// Every lane shifted right.
    fn shr<const BITS: u32>(self) -> Self;
    /// Adds the low 52 bits of the products of the low 52 bits of `x` and `y`.
    fn add_low_product(self, x: Self, y: Self) -> Self;
    /// Adds the high 52 bits of the same.
    fn add_high_product(self, x: Self, y: Self) -> Self;
    /// The lanes of `other` where the bit of `mask` is set, these elsewhere.
    fn where_set(self, mask: u8, other: Self) -> Self;
}
