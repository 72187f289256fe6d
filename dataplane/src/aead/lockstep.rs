#![forbid(unsafe_code)]
//! The AEAD (RFC 8439 §2.8) over a batch, for processors that multiply fast in wide vectors: ChaCha20
//! with a lane for each block, and Poly1305 with a lane for each packet.
//!
//! The batch is taken in sets of at most `N` packets, longest first, and every set needs two passes:
//! ChaCha20 over its texts and then Poly1305 over its ciphertexts when sealing, the other way round when
//! opening, so that what has a wrong tag is never decrypted. The second pass of a set and the first one of
//! the set behind it are made together (`both`), four blocks of every packet's MAC amid the rounds of 16
//! lanes: neither waits for the other, so what one leaves free of the processor is there for the other.

use std::array::from_fn;

use zeroize::optimization_barrier;

use super::TAG_LEN;
use super::chacha20::{self, DOUBLE_ROUNDS, Origin, double_round_amid, xor, xor_block};
use super::lanes::{BLOCK_LEN, Lanes, Limbs};
use super::macs::{Macs, Sums};
use super::packet::{self, Packet, end_blocks};

/// Seals or opens the batch: `N` lanes of ChaCha20, and two vectors of `V` MACs.
#[inline(always)]
pub(super) fn run<L, M, P, const N: usize, const V: usize>(cpu: L::Cpu, mut batch: &mut [P])
where
    L: Lanes<N>,
    M: Limbs<V, Cpu = L::Cpu>,
    P: Packet,
{
    const { assert!(N == 2 * V) }
    let mut before = Set::<P, N>::take(&mut [].as_mut_slice());
    loop {
        let mut set = Set::take(&mut batch);
        if P::SEALING {
            let tags = both::<L, M, P, N, V>(cpu, &mut set, &before);
            before.settle(tags);
        } else {
            let tags = both::<L, M, P, N, V>(cpu, &mut before, &set);
            set.settle(tags);
        }
        if set.len == 0 {
            break;
        }
        before = set;
    }
}

/// Packets that are worked on together, the longest first.
struct Set<'a, P, const N: usize> {
    packets: &'a mut [P],
    members: [Member; N],
    len: usize,
}

#[derive(Clone, Copy, Default)]
struct Member {
    /// Index among the packets.
    packet: usize,
    text_len: usize,
}

impl Member {
    /// Blocks of ChaCha20 that its text needs.
    fn blocks(&self) -> usize {
        self.text_len.div_ceil(BLOCK_LEN)
    }
}

impl<'a, P: Packet, const N: usize> Set<'a, P, N> {
    /// Takes packets off the batch until the set is full with such as are not to be left alone, or the
    /// batch is empty.
    #[inline(always)]
    fn take(batch: &mut &'a mut [P]) -> Self {
        let mut members = [Member::default(); N];
        let (mut len, mut end) = (0, 0);
        while len < N && end < batch.len() {
            let packet = end;
            end += 1;
            if let Some(text_len) = batch[packet].text_len() {
                let text_len = text_len as usize;
                // Batches come sorted nearly always.
                let mut at = len;
                while at > 0 && members[at - 1].text_len < text_len {
                    members[at] = members[at - 1];
                    at -= 1;
                }
                members[at] = Member { packet, text_len };
                len += 1;
            }
        }
        let (packets, later) = std::mem::take(batch).split_at_mut(end);
        *batch = later;
        Set {
            packets,
            members,
            len,
        }
    }

    #[inline(always)]
    fn members(&self) -> &[Member] {
        &self.members[..self.len]
    }

    /// Settles every member with its tag.
    #[inline(always)]
    fn settle(&mut self, tags: [[u8; TAG_LEN]; N]) {
        for (member, tag) in self.members[..self.len].iter_mut().zip(tags) {
            if !self.packets[member.packet].settle(tag) {
                member.text_len = 0;
            }
        }
    }
}

/// Changes the texts of the one set by their keystreams, and gives the tags of the other.
#[inline(always)]
fn both<L, M, P, const N: usize, const V: usize>(
    cpu: L::Cpu,
    to_cipher: &mut Set<'_, P, N>,
    to_authenticate: &Set<'_, P, N>,
) -> [[u8; TAG_LEN]; N]
where
    L: Lanes<N>,
    M: Limbs<V, Cpu = L::Cpu>,
    P: Packet,
{
    let mut cipher = Cipher::<L, N>::new(cpu, to_cipher);
    let mut macs = [Macs::<M, V>::zero(cpu); 2];
    let mut blocks = [Blocks::default(); N];
    // Of each vector, how far its shortest goes by fours.
    let mut turns = [0; 2];
    let members = to_authenticate.members();
    if !members.is_empty() {
        // Lanes without a packet do the first one's again.
        for (lane, blocks) in blocks.iter_mut().enumerate() {
            let member = members.get(lane).unwrap_or(&members[0]);
            *blocks = Blocks::of(&to_authenticate.packets[member.packet], member.text_len);
        }
        for (turns, members) in turns.iter_mut().zip(members.chunks(V)) {
            *turns = members[members.len() - 1].text_len / (4 * 16);
        }
        begin::<L, M, P, N, V>(cpu, to_authenticate, &mut macs);
    }
    let mut fours = [[].as_slice(); N];
    for (fours, blocks) in fours.iter_mut().zip(&blocks) {
        *fours = blocks.fours();
    }

    // A joint turn has four blocks of every MAC amid the rounds, one of a vector in a double round.
    let together = cipher.steps.min(turns[1]);
    for turn in 0..together {
        let mut words = cipher.first_double_round(cpu);
        for (k, macs) in macs.iter_mut().enumerate() {
            let rows = rows(&fours, k, turn);
            let mut sums = Sums::zero(cpu);
            let [b2, b3] = macs.two(rows, 1);
            macs.add_product(&mut sums, b3, 3);
            cipher.double_round(cpu, to_cipher, &mut words, 4 * k);
            macs.add_product(&mut sums, b2, 2);
            cipher.double_round(cpu, to_cipher, &mut words, 4 * k + 1);
            let [b0, b1] = macs.two(rows, 0);
            macs.add_product(&mut sums, b1, 1);
            cipher.double_round(cpu, to_cipher, &mut words, 4 * k + 2);
            macs.add_product(&mut sums, b0, 0);
            cipher.double_round(cpu, to_cipher, &mut words, 4 * k + 3);
            macs.carry(&sums);
        }
        cipher.double_round(cpu, to_cipher, &mut words, DOUBLE_ROUNDS - 2);
        cipher.finish(cpu, to_cipher, words);
    }
    for _ in together..cipher.steps {
        let mut words = cipher.first_double_round(cpu);
        for i in 0..DOUBLE_ROUNDS - 1 {
            cipher.double_round(cpu, to_cipher, &mut words, i);
        }
        cipher.finish(cpu, to_cipher, words);
    }
    cipher.keystream = [[0; BLOCK_LEN]; N];
    optimization_barrier(&cipher.keystream);

    for turn in together..turns[0] {
        for (k, macs) in macs.iter_mut().enumerate() {
            if turn < turns[k] {
                macs.absorb_four(rows(&fours, k, turn));
            }
        }
    }
    let mut tags = [[0; TAG_LEN]; N];
    for (k, macs) in macs.iter_mut().enumerate() {
        if k * V < members.len() {
            let blocks = &blocks[k * V..][..V];
            for i in 4 * turns[k]..blocks[0].len() {
                macs.absorb(from_fn(|v| blocks[v].get(i)));
            }
            macs.take_tags(&mut tags.as_chunks_mut().0[k]);
        }
    }
    optimization_barrier(&macs);
    tags
}

/// ChaCha20 over a set, a block of every lane's share in each step.
struct Cipher<L, const N: usize> {
    /// What the next blocks start from, and what of their rounds is done ahead.
    start: [L; 16],
    ahead: [L; 16],
    shares: [Share; N],
    /// Steps that the longest share takes.
    steps: usize,
    /// Lanes that have something left of their shares, the first ones.
    busy: usize,
    /// So many steps are plain: every busy lane has a whole block, and another of the same text behind it.
    plain: usize,
    keystream: [[u8; BLOCK_LEN]; N],
    /// The first so many lanes' keystream waits to be used.
    waiting: usize,
}

/// A lane's share of the texts, and where in it the lane is.
#[derive(Clone, Copy, Default)]
struct Share {
    /// Whose text the next block is of; behind the last member when nothing is left.
    member: usize,
    packet: usize,
    /// The next block, and where those of this text end for the lane.
    block: usize,
    end: usize,
    /// Blocks of texts behind this one.
    later: usize,
}

impl Share {
    /// `left` blocks, from this one behind the beginning of the member on.
    #[inline(always)]
    fn new(members: &[Member], mut member: usize, mut block: usize, left: usize) -> Share {
        while member < members.len() && block >= members[member].blocks() {
            block -= members[member].blocks();
            member += 1;
        }
        if left == 0 || member == members.len() {
            return Share {
                member: members.len(),
                ..Share::default()
            };
        }
        let here = left.min(members[member].blocks() - block);
        Share {
            member,
            packet: members[member].packet,
            block,
            end: block + here,
            later: left - here,
        }
    }

    /// Where lane `lane` goes on with it; `None` where nothing is left.
    #[inline(always)]
    fn origin(&self, lane: u32) -> Option<Origin> {
        #[expect(clippy::cast_possible_truncation, reason = "a text is below 64 KiB")]
        let block = self.block as u32 + 1;
        (self.end > 0).then_some(Origin {
            lane,
            packet: self.packet,
            block,
        })
    }
}

impl<L: Lanes<N>, const N: usize> Cipher<L, N> {
    #[inline(always)]
    fn new<P: Packet>(cpu: L::Cpu, set: &Set<'_, P, N>) -> Self {
        let members = set.members();
        // Every lane has an equal share, the last ones less.
        let total: usize = members.iter().map(Member::blocks).sum();
        let steps = total.div_ceil(N);
        let mut shares = [Share::default(); N];
        let (mut member, mut block, mut left) = (0, 0, total);
        for share in &mut shares {
            *share = Share::new(members, member, block, steps.min(left));
            (member, block) = (share.member, share.block + steps);
            left -= steps.min(left);
        }
        let origins = shares.iter().zip(0..);
        let origins = origins.filter_map(|(share, lane)| share.origin(lane));
        let start = chacha20::start::<L, P, N>(cpu, set.packets, origins);
        let mut cipher = Cipher {
            start,
            ahead: chacha20::ahead(cpu, &start),
            shares,
            steps,
            busy: 0,
            plain: 0,
            keystream: [[0; BLOCK_LEN]; N],
            waiting: 0,
        };
        cipher.look_ahead();
        cipher
    }

    /// Counts busy lanes and plain steps.
    #[inline(always)]
    fn look_ahead(&mut self) {
        let busy = self.shares.iter().take_while(|share| share.end > 0);
        (self.busy, self.plain) = busy.fold((0, usize::MAX), |(busy, plain), share| {
            (busy + 1, plain.min(share.end - share.block - 1))
        });
    }

    #[inline(always)]
    fn first_double_round(&self, cpu: L::Cpu) -> [L; 16] {
        chacha20::first_double_round(cpu, &self.start, &self.ahead)
    }

    /// One of the nine double rounds behind the first. Amid eight of them the texts of two lanes each are
    /// changed by the waiting keystream, that of the step before: at the end of its own step, that work would
    /// have no vector operations beside it.
    #[inline(always)]
    fn double_round<P: Packet>(
        &mut self,
        cpu: L::Cpu,
        set: &mut Set<'_, P, N>,
        words: &mut [L; 16],
        i: usize,
    ) {
        const { assert!(N <= 2 * (DOUBLE_ROUNDS - 2)) }
        if 2 * i < self.waiting {
            for lane in 2 * i..(2 * i + 2).min(self.waiting) {
                let share = &mut self.shares[lane];
                let (blocks, _) = set.packets[share.packet].text_mut().as_chunks_mut();
                xor_block(&mut blocks[share.block], &self.keystream[lane]);
                share.block += 1;
            }
        }
        double_round_amid(cpu, words);
    }

    /// Ends a step: has the keystream wait if the step is plain, and otherwise uses it.
    #[inline(always)]
    fn finish<P: Packet>(&mut self, cpu: L::Cpu, set: &mut Set<'_, P, N>, words: [L; 16]) {
        chacha20::finish(words, &self.start, &mut self.keystream);
        self.start[12] = self.start[12].add(L::splat(cpu, 1));
        if self.plain > 0 {
            self.plain -= 1;
            self.waiting = self.busy;
            return;
        }
        self.waiting = 0;
        let mut restarted = false;
        let lanes = self.shares.iter_mut().zip(&self.keystream).zip(0..);
        for ((share, keystream), lane) in lanes.take(self.busy) {
            let text = set.packets[share.packet].text_mut();
            let from = share.block * BLOCK_LEN;
            share.block += 1;
            if share.block < share.end {
                xor_block(&mut text.as_chunks_mut().0[from / BLOCK_LEN], keystream);
                continue;
            }
            let members = &set.members[..set.len];
            let len = (members[share.member].text_len - from).min(BLOCK_LEN);
            xor(&mut text[from..], len, std::slice::from_ref(keystream));
            *share = Share::new(members, share.member, share.block, share.later);
            if let Some(origin) = share.origin(lane) {
                chacha20::restart(cpu, &mut self.start, set.packets, origin);
                restarted = true;
            }
        }
        if restarted {
            self.ahead = chacha20::ahead(cpu, &self.start);
        }
        self.look_ahead();
    }
}

/// The ciphertext of a packet as blocks of the MAC.
#[derive(Clone, Copy, Default)]
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

    /// The whole blocks by fours.
    #[inline(always)]
    fn fours(&self) -> &'a [[[u8; 16]; 4]] {
        self.whole.as_chunks().0
    }

    #[inline(always)]
    fn get(&self, i: usize) -> Option<&[u8; 16]> {
        match i.checked_sub(self.whole.len()) {
            Some(i) => self.end[..self.end_len].get(i),
            None => self.whole.get(i),
        }
    }
}

/// Of every text of vector `k` the four blocks number `turn`.
#[inline(always)]
fn rows<'a, const N: usize, const V: usize>(
    fours: &[&'a [[[u8; 16]; 4]]; N],
    k: usize,
    turn: usize,
) -> [&'a [[u8; 16]; 4]; V] {
    let mut rows = [&[[0; 16]; 4]; V];
    for (v, row) in rows.iter_mut().enumerate() {
        *row = &fours[k * V + v][turn];
    }
    rows
}

/// Starts the MACs of the set, which has members.
#[inline(always)]
fn begin<L, M, P, const N: usize, const V: usize>(
    cpu: L::Cpu,
    set: &Set<'_, P, N>,
    macs: &mut [Macs<M, V>; 2],
) where
    L: Lanes<N>,
    M: Limbs<V, Cpu = L::Cpu>,
    P: Packet,
{
    // Block 0 of a packet begins with its one-time key.
    let members = set.members();
    let origins = members.iter().zip(0..);
    let origins = origins.map(|(member, lane)| Origin {
        lane,
        packet: member.packet,
        block: 0,
    });
    let start = chacha20::start::<L, P, N>(cpu, set.packets, origins);
    let mut keys = [[0; BLOCK_LEN]; N];
    chacha20::blocks(cpu, &start, &mut keys);
    for (macs, keys) in macs.iter_mut().zip(keys.as_chunks().0) {
        *macs = Macs::new(cpu, keys.each_ref());
    }
    keys = [[0; BLOCK_LEN]; N];
    optimization_barrier(&keys);

    // There is none in WireGuard.
    let associated = |lane: usize| {
        let member = members.get(lane);
        member.map_or([].as_slice(), |member| {
            set.packets[member.packet].associated()
        })
    };
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
}
