//! Lanes in plain arrays, so that the kernel is tested on every processor.

use std::array::from_fn;

use crate::aead::kernel;
use crate::aead::lanes::Lanes;
use crate::aead::packet::Packet;

#[derive(Clone, Copy)]
struct Portable<const N: usize>([u32; N]);

/// The kernel as AVX2 has it, without AVX2.
pub(super) fn run_8<P: Packet>(batch: &mut [P]) {
    kernel::run::<Portable<8>, P, 8, 2, 1>((), batch);
}

/// The kernel as AVX-512 has it, without AVX-512.
pub(super) fn run_16<P: Packet>(batch: &mut [P]) {
    kernel::run::<Portable<16>, P, 16, 2, 2>((), batch);
}

impl<const N: usize> Lanes<N> for Portable<N> {
    type Cpu = ();

    fn splat((): (), word: u32) -> Self {
        Portable([word; N])
    }

    fn numbers((): ()) -> Self {
        Portable(from_fn(|lane| u32::try_from(lane).unwrap()))
    }

    fn then(self, first: u32, other: Self) -> Self {
        let of = |lane| if lane < first as usize { self } else { other };
        Portable(from_fn(|lane| of(lane).0[lane]))
    }

    fn add(self, other: Self) -> Self {
        Portable(from_fn(|lane| self.0[lane].wrapping_add(other.0[lane])))
    }

    fn xor(self, other: Self) -> Self {
        Portable(from_fn(|lane| self.0[lane] ^ other.0[lane]))
    }

    fn rotate<const BITS: i32>(self, (): ()) -> Self {
        Portable(self.0.map(|word| word.rotate_left(BITS.cast_unsigned())))
    }

    fn store(words: [Self; 16], blocks: &mut [[u8; 64]; N]) {
        for (lane, block) in blocks.iter_mut().enumerate() {
            for (bytes, word) in block.as_chunks_mut().0.iter_mut().zip(&words) {
                *bytes = word.0[lane].to_le_bytes();
            }
        }
    }
}
