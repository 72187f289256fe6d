#![forbid(unsafe_code)]
//! What the kernel needs of a processor: vectors of 32-bit words, one lane for each block of
//! ChaCha20.

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
    /// These lanes below lane `first`, and those of `other` from there on.
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
