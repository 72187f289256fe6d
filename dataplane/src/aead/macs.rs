#![forbid(unsafe_code)]
//! Poly1305 (RFC 8439 §2.5) of `V` messages side by side, a lane for each, radix 2^44.
//!
//! A number modulo `2^130 - 5` is three limbs, of 44, 44 and 42 bits, lowest first. Limbs may be a few
//! bits longer between operations: they are multiplied as numbers of 52 bits. No branch and no index
//! depends on data.

use super::TAG_LEN;
use super::lanes::{BLOCK_LEN, Limbs};

const LIMB: u64 = (1 << 44) - 1;
const TOP_LIMB: u64 = (1 << 42) - 1;

/// `V` authenticators: their one-time keys, and the sums so far.
#[derive(Clone, Copy)]
pub(super) struct Macs<M: Limbs<V>, const V: usize> {
    cpu: M::Cpu,
    /// The sums, as [`carried`] leaves them.
    h: [M; 3],
    /// The clamped multipliers `r`, and `r^2`, `r^3` and `r^4`.
    powers: [Factor<M>; 4],
    /// Added at the end.
    pad: [M; 3],
}

/// What is multiplied by.
#[derive(Clone, Copy)]
struct Factor<M> {
    limbs: [M; 3],
    /// The upper two, times 20. A product of limbs whose weights make 2^132 or more goes back in at the
    /// bottom: 2^130 is 5 modulo the prime, and so 2^132 is 20. Below 2^50.
    wrapped: [M; 2],
}

/// Products, added up limb by limb: of each the low 52 bits, and apart the high ones.
pub(super) struct Sums<M> {
    low: [M; 3],
    high: [M; 3],
}

impl<M: Limbs<V>, const V: usize> Macs<M, V> {
    /// Without keys: a place for some.
    #[inline(always)]
    pub(super) fn zero(cpu: M::Cpu) -> Self {
        let zero = [M::splat(cpu, 0); 3];
        let factor = Factor {
            limbs: zero,
            wrapped: [zero[0]; 2],
        };
        Macs {
            cpu,
            h: zero,
            powers: [factor; 4],
            pad: zero,
        }
    }

    /// Starts with the one-time keys that these blocks begin with.
    #[inline(always)]
    pub(super) fn new(cpu: M::Cpu, keys: [&[u8; BLOCK_LEN]; V]) -> Self {
        let (mut r, mut pad) = ([&[0; 16]; V], [&[0; 16]; V]);
        for (v, key) in keys.into_iter().enumerate() {
            let (halves, _) = key.as_chunks();
            (r[v], pad[v]) = (&halves[0], &halves[1]);
        }
        let [low, high] = M::load(cpu, r);
        let clamped = [
            low.and(M::splat(cpu, 0x0fff_fffc_0fff_ffff)),
            high.and(M::splat(cpu, 0x0fff_fffc_0fff_fffc)),
        ];
        let mut macs = Self::zero(cpu);
        let mut power = split(cpu, clamped);
        macs.powers[0] = factor(power);
        for i in 1..4 {
            let mut next = Sums::zero(cpu);
            multiply(&mut next, &power, &macs.powers[0]);
            power = carried(cpu, &next);
            macs.powers[i] = factor(power);
        }
        macs.pad = split(cpu, M::load(cpu, pad));
        macs
    }

    /// Takes in four blocks of every message: `h = (h + b0) * r^4 + b1 * r^3 + b2 * r^2 + b3 * r`, each
    /// block with its bit 128. One chain of carries serves all four.
    ///
    /// These are the parts that other work can be put between.
    #[inline(always)]
    pub(super) fn absorb_four(&mut self, rows: [&[[u8; 16]; 4]; V]) {
        let mut sums = Sums::zero(self.cpu);
        let [b2, b3] = self.two(rows, 1);
        self.add_product(&mut sums, b3, 3);
        self.add_product(&mut sums, b2, 2);
        let [b0, b1] = self.two(rows, 0);
        self.add_product(&mut sums, b1, 1);
        self.add_product(&mut sums, b0, 0);
        self.carry(&sums);
    }

    /// The halves of blocks `2 * i` and `2 * i + 1` of four.
    #[inline(always)]
    pub(super) fn two(&self, rows: [&[[u8; 16]; 4]; V], i: usize) -> [[M; 2]; 2] {
        let mut pairs = [&[[0; 16]; 2]; V];
        for (pair, row) in pairs.iter_mut().zip(rows) {
            *pair = &row.as_chunks().0[i];
        }
        M::load_two(self.cpu, pairs)
    }

    /// Adds the product of block `i`, 0 to 3, which has these halves. The one of block 0 is best the last,
    /// because it waits for `h`.
    #[inline(always)]
    pub(super) fn add_product(&self, sums: &mut Sums<M>, halves: [M; 2], i: usize) {
        let mut x = self.block(halves);
        if i == 0 {
            x = add(x, self.h);
        }
        multiply(sums, &x, &self.powers[3 - i]);
    }

    /// Takes in the four blocks, with the products of all.
    #[inline(always)]
    pub(super) fn carry(&mut self, sums: &Sums<M>) {
        self.h = carried(self.cpu, sums);
    }

    /// Takes in a block of every message that has one: `h = (h + block) * r`.
    #[inline(always)]
    pub(super) fn absorb(&mut self, blocks: [Option<&[u8; 16]>; V]) {
        let (mut present, mut all) = (0, [&[0; 16]; V]);
        for (v, block) in blocks.into_iter().enumerate() {
            if let Some(block) = block {
                present |= 1 << v;
                all[v] = block;
            }
        }
        if present == 0 {
            return;
        }
        let mut sums = Sums::zero(self.cpu);
        let block = add(self.h, self.block(M::load(self.cpu, all)));
        multiply(&mut sums, &block, &self.powers[0]);
        let changed = carried(self.cpu, &sums);
        for (h, changed) in self.h.iter_mut().zip(changed) {
            *h = h.where_set(present, changed);
        }
    }

    /// Gives the tags.
    #[inline(always)]
    pub(super) fn tags(&self, tags: &mut [[u8; TAG_LEN]; V]) {
        let limb = M::splat(self.cpu, LIMB);
        // All carries, so that the sum is below 2^130. If the last but one is not 0, then `h1` is
        // small, and the last ends there.
        let [h0, h1, h2] = self.h;
        let h2 = h2.add(h1.shr::<44>());
        let h1 = h1.and(limb);
        let h0 = h0.add(five_times(h2.shr::<42>()));
        let h2 = h2.and(M::splat(self.cpu, TOP_LIMB));
        let h1 = h1.add(h0.shr::<44>());
        let h0 = h0.and(limb);
        // The sum modulo the prime: `h + 5` passes 2^130 exactly where `h` passes the prime. Then it is
        // `h + 5` without that bit, which is above the 128 that count.
        let passed = h0.add(M::splat(self.cpu, 5)).shr::<44>();
        let passed = h2.add(h1.add(passed).shr::<44>()).shr::<42>();
        let h0 = h0.add(five_times(passed));
        // The pad, modulo 2^128.
        let [t0, t1, t2] = add([h0, h1, h2], self.pad);
        let t1 = t1.add(t0.shr::<44>());
        let t2 = t2.add(t1.shr::<44>());
        let low = t0.and(limb).or(t1.shl::<44>());
        let high = t1.and(limb).shr::<20>().or(t2.shl::<24>());
        M::store([low, high], tags);
    }

    /// The limbs of the blocks with these halves, each with its bit 128.
    #[inline(always)]
    fn block(&self, halves: [M; 2]) -> [M; 3] {
        let [low, middle, top] = split(self.cpu, halves);
        [low, middle, top.or(M::splat(self.cpu, 1 << (128 - 88)))]
    }
}

impl<M> Sums<M> {
    /// Of no products.
    #[inline(always)]
    pub(super) fn zero<const V: usize>(cpu: M::Cpu) -> Self
    where
        M: Limbs<V>,
    {
        let zero = [M::splat(cpu, 0); 3];
        Sums {
            low: zero,
            high: zero,
        }
    }
}

/// Adds the products of `x`, with limbs below 2^46, and the factor.
#[inline(always)]
fn multiply<M: Limbs<V>, const V: usize>(sums: &mut Sums<M>, x: &[M; 3], by: &Factor<M>) {
    for (j, x) in x.iter().enumerate() {
        for i in 0..3 {
            // Limb `i` is made of limb `j` of the one and limb `i - j`, modulo 3, of the other.
            let of = if j <= i {
                by.limbs[i - j]
            } else {
                by.wrapped[2 + i - j]
            };
            sums.low[i] = sums.low[i].add_low_product(*x, of);
            sums.high[i] = sums.high[i].add_high_product(*x, of);
        }
    }
}

/// The number that the sums of at most twelve products a limb stand for. Its lowest limb is below 2^44, the
/// next below 2^44 + 2^11, the top one below 2^42.
///
/// What has the weight 2^52 in a limb of 44 bits has 2^8 in the next, and 2^10 above one of 42. A high
/// part is below 2^(46 + 50 - 52), and twelve of them below 2^48; in the top limb, where nothing is wrapped,
/// below 2^42. So nothing below reaches 2^58.
#[inline(always)]
fn carried<M: Limbs<V>, const V: usize>(cpu: M::Cpu, Sums { low, high }: &Sums<M>) -> [M; 3] {
    let limb = M::splat(cpu, LIMB);
    let up = low[0].shr::<44>().add(high[0].shl::<8>());
    let middle = low[1].add(up);
    let up = middle.shr::<44>().add(high[1].shl::<8>());
    let top = low[2].add(up);
    let up = top.shr::<42>().add(high[2].shl::<10>());
    let bottom = low[0].and(limb).add(five_times(up));
    [
        bottom.and(limb),
        middle.and(limb).add(bottom.shr::<44>()),
        top.and(M::splat(cpu, TOP_LIMB)),
    ]
}

#[inline(always)]
fn factor<M: Limbs<V>, const V: usize>(limbs: [M; 3]) -> Factor<M> {
    let [_, middle, top] = limbs;
    Factor {
        limbs,
        wrapped: [five_times(middle).shl::<2>(), five_times(top).shl::<2>()],
    }
}

#[inline(always)]
fn five_times<M: Limbs<V>, const V: usize>(x: M) -> M {
    x.add(x.shl::<2>())
}

#[inline(always)]
fn add<M: Limbs<V>, const V: usize>(x: [M; 3], y: [M; 3]) -> [M; 3] {
    [x[0].add(y[0]), x[1].add(y[1]), x[2].add(y[2])]
}

/// The limbs of numbers of 128 bits, whose halves these are.
#[inline(always)]
fn split<M: Limbs<V>, const V: usize>(cpu: M::Cpu, [low, high]: [M; 2]) -> [M; 3] {
    let limb = M::splat(cpu, LIMB);
    [
        low.and(limb),
        low.shr::<44>().or(high.shl::<20>()).and(limb),
        high.shr::<24>(),
    ]
}
