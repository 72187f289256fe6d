//! Lanes in plain arrays, so that the kernel is tested on every processor.

use std::array::from_fn;

use rand::{Rng as _, RngExt as _};

use crate::aead::lanes::{Lanes, Limbs};
use crate::aead::macs::Macs;
use crate::aead::packet::Packet;
use crate::aead::poly1305::Poly1305;
use crate::aead::{interleaved, lockstep};

#[derive(Clone, Copy)]
struct Portable<const N: usize>([u32; N]);

/// The kernel as AVX2 has it, without AVX2.
pub(super) fn run_interleaved<P: Packet>(batch: &mut [P]) {
    interleaved::run::<Portable<8>, P, 8>((), batch);
}

/// The kernel as AVX-512 has it, without AVX-512.
pub(super) fn run_lockstep<P: Packet>(batch: &mut [P]) {
    lockstep::run::<Portable<16>, Quads, P, 16, 8>((), batch);
}

impl<const N: usize> interleaved::Steps<N> for Portable<N> {}

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

#[derive(Clone, Copy)]
struct Quads([u64; 8]);

impl Quads {
    fn each(self, other: Quads, of: impl Fn(u64, u64) -> u64) -> Quads {
        Quads(from_fn(|lane| of(self.0[lane], other.0[lane])))
    }
}

/// The product of the low 52 bits.
fn product(x: u64, y: u64) -> u128 {
    let low = |word: u64| u128::from(word & ((1 << 52) - 1));
    low(x) * low(y)
}

impl Limbs<8> for Quads {
    type Cpu = ();

    fn splat((): (), word: u64) -> Self {
        Quads([word; 8])
    }

    fn load((): (), blocks: [&[u8; 16]; 8]) -> [Self; 2] {
        let half = |block: &[u8; 16], half: usize| u64::from_le_bytes(block.as_chunks().0[half]);
        [0, 1].map(|i| Quads(blocks.map(|block| half(block, i))))
    }

    fn load_two((): (), rows: [&[[u8; 16]; 2]; 8]) -> [[Self; 2]; 2] {
        [0, 1].map(|i| Self::load((), rows.map(|row| &row[i])))
    }

    fn store([low, high]: [Self; 2], blocks: &mut [[u8; 16]; 8]) {
        for (lane, block) in blocks.iter_mut().enumerate() {
            block[..8].copy_from_slice(&low.0[lane].to_le_bytes());
            block[8..].copy_from_slice(&high.0[lane].to_le_bytes());
        }
    }

    fn add(self, other: Self) -> Self {
        self.each(other, |x, y| x + y)
    }

    fn and(self, other: Self) -> Self {
        self.each(other, |x, y| x & y)
    }

    fn or(self, other: Self) -> Self {
        self.each(other, |x, y| x | y)
    }

    fn shl<const BITS: u32>(self) -> Self {
        Quads(self.0.map(|word| word << BITS))
    }

    fn shr<const BITS: u32>(self) -> Self {
        Quads(self.0.map(|word| word >> BITS))
    }

    fn add_low_product(self, x: Self, y: Self) -> Self {
        let low = |x, y| u64::try_from(product(x, y) & ((1 << 52) - 1)).unwrap();
        self.add(x.each(y, low))
    }

    fn add_high_product(self, x: Self, y: Self) -> Self {
        self.add(x.each(y, |x, y| u64::try_from(product(x, y) >> 52).unwrap()))
    }

    fn where_set(self, mask: u8, other: Self) -> Self {
        let of = |lane| if mask >> lane & 1 == 1 { other } else { self };
        Quads(from_fn(|lane| of(lane).0[lane]))
    }
}

/// The tag of a message of whole blocks, by the MACs that work in lockstep: every lane has it.
pub(super) fn lockstep_tag(key: &[u8; 32], blocks: &[[u8; 16]]) -> [u8; 16] {
    let mut first = [0; 64];
    first[..32].copy_from_slice(key);
    let mut macs = Macs::<Quads, 8>::new((), [&first; 8]);
    let (fours, rest) = blocks.as_chunks();
    fours.iter().for_each(|four| macs.absorb_four([four; 8]));
    rest.iter().for_each(|block| macs.absorb([Some(block); 8]));
    let mut tags = [[0; 16]; 8];
    macs.tags(&mut tags);
    assert_eq!(tags, [tags[0]; 8]);
    tags[0]
}

/// Where carries and reductions are longest: bytes that are all ones, all zeros, or nearly so.
#[test]
fn macs_in_lockstep_are_the_scalar_ones() {
    let mut rng = crate::seeded();
    for _ in 0..2000 {
        let mut fill = |bytes: &mut [u8]| match rng.random_range(0..4) {
            0 => bytes.fill(0xff),
            1 => bytes.fill(0),
            2 => rng.fill_bytes(bytes),
            _ => {
                bytes.fill(0xff);
                bytes[0] = 0xfa + rng.random_range(0..6);
            }
        };
        let (mut keys, mut texts) = ([[0; 64]; 8], [[[0; 16]; 12]; 8]);
        keys.iter_mut().for_each(|key| fill(key));
        texts
            .as_flattened_mut()
            .iter_mut()
            .for_each(|block| fill(block));
        let lens: [usize; 8] = from_fn(|_| rng.random_range(0..=12));

        let mut macs = Macs::<Quads, 8>::new((), keys.each_ref());
        let shortest = lens.into_iter().min().unwrap_or(0);
        let in_step = shortest - shortest % 4;
        for i in (0..in_step).step_by(4) {
            macs.absorb_four(from_fn(|v| texts[v][i..].first_chunk().unwrap()));
        }
        for i in in_step..12 {
            macs.absorb(from_fn(|v| texts[v][..lens[v]].get(i)));
        }
        let mut tags = [[0; 16]; 8];
        macs.tags(&mut tags);

        for v in 0..8 {
            let mut mac = Poly1305::new(keys[v].first_chunk().unwrap());
            texts[v][..lens[v]]
                .iter()
                .for_each(|block| mac.block(block));
            assert_eq!(
                tags[v],
                mac.tag(),
                "{:x?} {:x?}",
                keys[v],
                &texts[v][..lens[v]]
            );
        }
    }
}
