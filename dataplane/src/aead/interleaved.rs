#![forbid(unsafe_code)]
//! The AEAD (RFC 8439 §2.8) over a batch, for processors without fast wide multiplication: rounds of
//! ChaCha20 in vectors, and amid them Poly1305 in scalar code.
//!
//! Group after group (see [`deal`](super::deal)), the rounds of one run while the MAC takes in the
//! ciphertext of the group before it, a few blocks in each double round. Nothing of the one depends on
//! the other, so an out-of-order processor does both at once. One group later is early enough in both
//! directions: when sealing, the ciphertext is there; when opening, it is still there, because the
//! keystream of a group waits until the MAC has passed. In either case the one-time keys, which are
//! blocks like others, are known.

use zeroize::optimization_barrier;

use super::TAG_LEN;
use super::chacha20::{self, DOUBLE_ROUNDS, columns, diagonals, xor};
use super::deal::{Dealer, Group, Run};
use super::lanes::{BLOCK_LEN, Lanes};
use super::packet::{Packet, end_blocks, padded};
use super::poly1305::{self, Factor, Poly1305, Sum};

/// How many blocks of the MAC are taken in amid a double round. A group is `4 * N` of them: 32 with
/// AVX2, and ten double rounds. They are a chain of dependent multiplications, which with four amid
/// each of eight double rounds would be waited for there, and be idle in the other two.
pub(super) const AMID: usize = 3;

/// What the kernel spends its time with. A processor may have ways of its own.
pub(super) trait Steps<const N: usize>: Lanes<N> {
    /// A double round.
    #[inline(always)]
    fn double_round(cpu: Self::Cpu, words: &mut [Self; 16]) {
        columns(cpu, words);
        diagonals(cpu, words);
    }

    /// A double round, and amid it some blocks into a MAC.
    #[inline(always)]
    fn double_round_and_mac(
        cpu: Self::Cpu,
        words: &mut [Self; 16],
        h: &mut Sum,
        r: &Factor,
        blocks: &[[u8; 16]; AMID],
    ) {
        Self::double_round(cpu, words);
        for block in blocks {
            *h = Self::absorb(cpu, *h, r, block);
        }
    }

    /// Takes a block into a MAC.
    #[inline(always)]
    fn absorb(_: Self::Cpu, h: Sum, r: &Factor, block: &[u8; 16]) -> Sum {
        poly1305::absorb(h, r, block)
    }
}

/// Seals or opens the batch, `N` blocks of ChaCha20 at a time.
#[inline(always)]
pub(super) fn run<L: Steps<N>, P: Packet, const N: usize>(cpu: L::Cpu, batch: &mut [P]) {
    let mut keystream = [[0; BLOCK_LEN]; N];
    let mut mac = Poly1305::default();
    let mut dealer = Dealer::default();
    let (mut one, mut other) = (Group::<N>::empty(), Group::empty());
    let (mut before, mut group) = (&mut one, &mut other);
    dealer.deal(batch, group);
    let mut start;
    loop {
        start = chacha20::start(cpu, batch, group.origins());
        let mut words = start;
        let mut rounds = Rounds::<L, N> {
            cpu,
            words: &mut words,
            left: if group.runs().is_empty() {
                0
            } else {
                DOUBLE_ROUNDS
            },
        };
        for run in before.runs() {
            let packet = &batch[run.packet];
            if let Some(key) = run.key(&keystream) {
                mac = Poly1305::new(key);
                absorb::<L, N>(cpu, &mut mac, packet.associated());
            }
            let (blocks, _) = packet.text()[run.start..run.end()].as_chunks();
            rounds.absorb(&mut mac, blocks);
            finish::<L, P, N>(cpu, run, &mut batch[run.packet], &mac, &keystream);
        }
        rounds.rest();
        if group.runs().is_empty() {
            break;
        }
        chacha20::finish(words, &start, &mut keystream);
        (before, group) = (group, before);
        dealer.deal(batch, group);
        if P::SEALING {
            for run in before.runs() {
                let text = &mut batch[run.packet].text_mut()[run.start..];
                xor(text, run.len, run.keystream(&keystream));
            }
        }
    }
    keystream = [[0; BLOCK_LEN]; N];
    optimization_barrier(&keystream);
    mac = Poly1305::default();
    optimization_barrier(&mac);
    start = [L::splat(cpu, 0); 16];
    optimization_barrier(&start);
}

/// The rounds of one group.
struct Rounds<'a, L: Steps<N>, const N: usize> {
    cpu: L::Cpu,
    words: &'a mut [L; 16],
    /// Double rounds to do.
    left: usize,
}

impl<L: Steps<N>, const N: usize> Rounds<'_, L, N> {
    /// Takes the blocks into the MAC, amid the rounds as long as there are some.
    #[inline(always)]
    fn absorb(&mut self, mac: &mut Poly1305, blocks: &[[u8; 16]]) {
        let (pieces, _) = blocks.as_chunks();
        let amid = pieces.len().min(self.left);
        self.left -= amid;
        let mut h = mac.h;
        for piece in &pieces[..amid] {
            L::double_round_and_mac(self.cpu, self.words, &mut h, &mac.r, piece);
        }
        for block in &blocks[AMID * amid..] {
            h = L::absorb(self.cpu, h, &mac.r, block);
        }
        mac.h = h;
    }

    /// Does the rounds that are left.
    #[inline(always)]
    fn rest(&mut self) {
        for _ in 0..self.left {
            L::double_round(self.cpu, self.words);
        }
    }
}

/// Ends a run whose blocks the MAC has taken in: decrypts it if the packet is being opened, and
/// settles the packet if it ends here.
#[inline(always)]
fn finish<L: Steps<N>, P: Packet, const N: usize>(
    cpu: L::Cpu,
    run: &Run,
    packet: &mut P,
    mac: &Poly1305,
    keystream: &[[u8; BLOCK_LEN]; N],
) {
    let mut tag = [0; TAG_LEN];
    if run.last {
        let mut mac = *mac;
        let (end, end_len) = end_blocks(packet, run.end());
        for block in &end[..end_len] {
            mac.h = L::absorb(cpu, mac.h, &mac.r, block);
        }
        tag = mac.tag();
    }
    if !P::SEALING {
        let text = &mut packet.text_mut()[run.start..];
        xor(text, run.len, run.keystream(keystream));
    }
    if run.last {
        packet.settle(tag);
    }
}

/// Takes in associated data, filled up with zeros to whole blocks.
#[inline(always)]
fn absorb<L: Steps<N>, const N: usize>(cpu: L::Cpu, mac: &mut Poly1305, data: &[u8]) {
    for piece in data.chunks(16) {
        mac.h = L::absorb(cpu, mac.h, &mac.r, &padded(piece));
    }
}
