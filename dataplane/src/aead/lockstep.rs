#![forbid(unsafe_code)]
//! The AEAD (RFC 8439 §2.8) over a batch, for processors that multiply fast in wide vectors: ChaCha20
//! with a lane for each block, and Poly1305 with a lane for each packet.
//!
//! The batch is taken in sets of at most `N` packets, longest first. A set's one-time keys are
//! computed first, a lane for each packet. Then ChaCha20 passes over all texts of the set and Poly1305
//! over all its ciphertexts, in this order when sealing and the other way round when opening: what
//! has a wrong tag is never decrypted. A set of full packets stays in the first cache meanwhile.

use std::array::from_fn;

use zeroize::optimization_barrier;

use super::TAG_LEN;
use super::chacha20::{self, Origin, xor};
use super::lanes::{BLOCK_LEN, Lanes, Limbs};
use super::macs::Macs;
use super::packet::{self, Packet, end_blocks};

/// Seals or opens the batch: `N` lanes of ChaCha20, and two vectors of `V` MACs.
#[inline(always)]
pub(super) fn run<L, M, P, const N: usize, const V: usize>(cpu: L::Cpu, batch: &mut [P])
where
    L: Lanes<N>,
    M: Limbs<V, Cpu = L::Cpu>,
    P: Packet,
{
    const { assert!(N == 2 * V) }
    let mut keys = [[0; BLOCK_LEN]; N];
    let mut next = 0;
    while let Some(mut set) = Set::<N>::take(batch, &mut next) {
        // Block 0 of a packet begins with its one-time key.
        let origins = set.members().iter().zip(0..);
        let origins = origins.map(|(member, lane)| Origin {
            lane,
            packet: member.packet,
            block: 0,
        });
        let start = chacha20::start::<L, P, N>(cpu, batch, origins);
        chacha20::blocks(cpu, &start, &mut keys);
        if P::SEALING {
            cipher::<L, P, N>(cpu, batch, &set);
        }
        let tags = if set.len <= V {
            authenticate::<M, P, N, V, 1>(cpu, batch, &set, &keys)
        } else {
            authenticate::<M, P, N, V, 2>(cpu, batch, &set, &keys)
        };
        for (member, tag) in set.members[..set.len].iter_mut().zip(tags) {
            if !batch[member.packet].settle(tag) {
                member.text_len = 0;
            }
        }
        if !P::SEALING {
            cipher::<L, P, N>(cpu, batch, &set);
        }
    }
    keys = [[0; BLOCK_LEN]; N];
    optimization_barrier(&keys);
}

/// Packets that are worked on together, the longest first.
struct Set<const N: usize> {
    members: [Member; N],
    len: usize,
}

#[derive(Clone, Copy, Default)]
struct Member {
    /// Index in the batch.
    packet: usize,
    text_len: usize,
}

impl Member {
    /// Blocks of ChaCha20 that its text needs.
    fn blocks(&self) -> usize {
        self.text_len.div_ceil(BLOCK_LEN)
    }
}

impl<const N: usize> Set<N> {
    /// The next packets of the batch from `next` on that are not to be left alone, if there are any.
    #[inline(always)]
    fn take<P: Packet>(batch: &[P], next: &mut usize) -> Option<Self> {
        let mut set = Set {
            members: [Member::default(); N],
            len: 0,
        };
        while set.len < N && *next < batch.len() {
            let packet = *next;
            *next += 1;
            if let Some(text_len) = batch[packet].text_len() {
                let text_len = text_len as usize;
                // Batches come sorted nearly always.
                let mut at = set.len;
                while at > 0 && set.members[at - 1].text_len < text_len {
                    set.members[at] = set.members[at - 1];
                    at -= 1;
                }
                set.members[at] = Member { packet, text_len };
                set.len += 1;
            }
        }
        (set.len > 0).then_some(set)
    }

    #[inline(always)]
    fn members(&self) -> &[Member] {
        &self.members[..self.len]
    }
}

/// A lane's share of the texts: `left` blocks, from block `block` of the text of `member` on, and where
/// that ends, of the next one's.
#[derive(Clone, Copy, Default)]
struct Share {
    member: usize,
    block: usize,
    left: usize,
}

impl Share {
    /// Steps over `blocks` blocks, and members without any; whether that leads to another member.
    #[inline(always)]
    fn advance(&mut self, members: &[Member], mut blocks: usize) -> bool {
        let before = self.member;
        while self.member < members.len() {
            let here = members[self.member].blocks() - self.block;
            if blocks < here {
                self.block += blocks;
                break;
            }
            blocks -= here;
            (self.member, self.block) = (self.member + 1, 0);
        }
        self.member != before
    }

    /// Where lane `lane` starts to work on it; `None` behind the last text.
    #[inline(always)]
    fn origin(&self, members: &[Member], lane: u32) -> Option<Origin> {
        let packet = members.get(self.member)?.packet;
        #[expect(clippy::cast_possible_truncation, reason = "a text is below 64 KiB")]
        let block = self.block as u32 + 1;
        Some(Origin {
            lane,
            packet,
            block,
        })
    }
}

/// Changes the texts of the set by their keystreams.
#[inline(always)]
fn cipher<L: Lanes<N>, P: Packet, const N: usize>(cpu: L::Cpu, batch: &mut [P], set: &Set<N>) {
    let members = set.members();
    // Every lane has an equal share, the last ones less.
    let total: usize = members.iter().map(Member::blocks).sum();
    let steps = total.div_ceil(N);
    let mut shares = [Share::default(); N];
    let (mut share, mut left) = (Share::default(), total);
    share.advance(members, 0);
    for lane in &mut shares {
        share.left = steps.min(left);
        *lane = share;
        left -= share.left;
        share.advance(members, share.left);
    }

    let origins = shares.iter().zip(0..);
    let origins = origins.filter_map(|(share, lane)| share.origin(members, lane));
    let mut start = chacha20::start::<L, P, N>(cpu, batch, origins);
    let mut keystream = [[0; BLOCK_LEN]; N];
    for _ in 0..steps {
        chacha20::blocks(cpu, &start, &mut keystream);
        start[12] = start[12].add(L::splat(cpu, 1));
        for ((share, keystream), lane) in shares.iter_mut().zip(&keystream).zip(0..) {
            if share.left > 0 {
                let Member { packet, text_len } = members[share.member];
                let from = share.block * BLOCK_LEN;
                let text = &mut batch[packet].text_mut()[from..];
                let len = (text_len - from).min(BLOCK_LEN);
                xor(text, len, std::slice::from_ref(keystream));
                share.left -= 1;
                if share.advance(members, 1)
                    && share.left > 0
                    && let Some(origin) = share.origin(members, lane)
                {
                    chacha20::restart(cpu, &mut start, batch, origin);
                }
            }
        }
    }
    keystream = [[0; BLOCK_LEN]; N];
    optimization_barrier(&keystream);
}

/// The ciphertext of a packet as blocks of the MAC.
#[derive(Clone, Copy)]
struct Blocks<'a> {
    whole: &'a [[u8; 16]],
    /// What follows them.
    end: [[u8; 16]; 2],
    end_len: usize,
}

impl<'a> Blocks<'a> {
    #[inline(always)]
    fn of<P: Packet>(packet: &'a P, text_len: usize) -> Self {
        let (end, end_len) = end_blocks(packet, text_len);
        Blocks {
            whole: &packet.text().as_chunks().0[..text_len / 16],
            end,
            end_len,
        }
    }

    /// How many there are.
    #[inline(always)]
    fn len(&self) -> usize {
        self.whole.len() + self.end_len
    }

    #[inline(always)]
    fn get(&self, i: usize) -> Option<&[u8; 16]> {
        match i.checked_sub(self.whole.len()) {
            Some(i) => self.end[..self.end_len].get(i),
            None => self.whole.get(i),
        }
    }
}

/// The tags of the set, which fits into `K` vectors.
#[inline(always)]
fn authenticate<M, P, const N: usize, const V: usize, const K: usize>(
    cpu: M::Cpu,
    batch: &[P],
    set: &Set<N>,
    keys: &[[u8; BLOCK_LEN]; N],
) -> [[u8; TAG_LEN]; N]
where
    M: Limbs<V>,
    P: Packet,
{
    // Lanes without a packet do the first one's again.
    let members = set.members();
    let member = |lane: usize| members.get(lane).unwrap_or(&members[0]);
    let blocks = |lane: usize| {
        let member = member(lane);
        Blocks::of(&batch[member.packet], member.text_len)
    };
    let blocks: [[Blocks<'_>; V]; K] = from_fn(|k| from_fn(|v| blocks(k * V + v)));
    let mut macs = [Macs::<M, V>::zero(cpu); K];
    for (k, macs) in macs.iter_mut().enumerate() {
        *macs = Macs::new(cpu, from_fn(|v| &keys[k * V + v]));
    }

    // There is none in WireGuard.
    let associated = |lane: usize| batch[member(lane).packet].associated();
    let most = (0..set.len).map(|lane| associated(lane).len().div_ceil(16));
    for i in 0..most.max().unwrap_or(0) {
        for (k, macs) in macs.iter_mut().enumerate() {
            let mut padded = [None; V];
            for (v, padded) in padded.iter_mut().enumerate() {
                *padded = associated(k * V + v).chunks(16).nth(i).map(packet::padded);
            }
            macs.absorb(from_fn(|v| padded[v].as_ref()));
        }
    }

    // Each vector by twos, in step, as far as its shortest goes; then as long as any has blocks.
    let in_step: [usize; K] = from_fn(|k| {
        let last = set.len.min((k + 1) * V) - 1;
        let shortest = set.members[last].text_len / 16;
        shortest - shortest % 2
    });
    for i in (0..in_step[0]).step_by(2) {
        for ((macs, blocks), in_step) in macs.iter_mut().zip(&blocks).zip(in_step) {
            if i < in_step {
                let first = from_fn(|v| &blocks[v].whole[i]);
                let second = from_fn(|v| &blocks[v].whole[i + 1]);
                macs.absorb_two(first, second);
            }
        }
    }
    for ((macs, blocks), in_step) in macs.iter_mut().zip(&blocks).zip(in_step) {
        for i in in_step..blocks[0].len() {
            macs.absorb(from_fn(|v| blocks[v].get(i)));
        }
    }

    let mut tags = [[0; TAG_LEN]; N];
    for (macs, tags) in macs.iter_mut().zip(tags.as_chunks_mut().0) {
        macs.take_tags(tags);
    }
    optimization_barrier(&macs);
    tags
}
