#![forbid(unsafe_code)]
//! ChaCha20 over the texts of a set, for [`lockstep`](super::lockstep).
//!
//! The blocks of all texts, one text behind the other, are shared out evenly: a lane has a run of them, whose
//! next block it does in each step, and where a text ends in its run it restarts at the next one.

use zeroize::optimization_barrier;

use super::chacha20::{self, DOUBLE_ROUNDS, Origin, double_round_amid, xor, xor_block};
use super::lanes::{BLOCK_LEN, Lanes};
use super::packet::Packet;
use super::set::{Member, Set};

/// ChaCha20 over a set, a block of every lane's share in each step.
pub(super) struct Cipher<L, const N: usize> {
    /// What the next blocks start from, and what of their rounds is done ahead.
    start: [L; 16],
    ahead: [L; 16],
    shares: [Share; N],
    /// Steps that the longest share takes.
    pub(super) steps: usize,
    /// Lanes that have something left of their shares, the first ones.
    busy: usize,
    /// So many steps come before the next in which a busy lane has its last block of a text.
    plain: usize,
    keystream: [[u8; BLOCK_LEN]; N],
    /// A bit for each lane whose keystream waits to be used; its share is not advanced yet.
    waiting: u32,
}

impl<L: Lanes<N>, const N: usize> Cipher<L, N> {
    /// With the lanes at the beginnings of their shares.
    #[inline(always)]
    pub(super) fn new<P: Packet>(cpu: L::Cpu, set: &Set<'_, P, N>) -> Self {
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
        (self.busy, self.plain) = (0, usize::MAX);
        for share in self.shares.iter().take_while(|share| share.end > 0) {
            let waits = (self.waiting >> self.busy & 1) as usize;
            self.plain = self.plain.min(share.end - share.block - waits - 1);
            self.busy += 1;
        }
    }

    /// Begins a step: the words after the first double round.
    #[inline(always)]
    pub(super) fn first_double_round(&self, cpu: L::Cpu) -> [L; 16] {
        chacha20::first_double_round(cpu, &self.start, &self.ahead)
    }

    /// Double round `i` of the nine behind the first. Before eight of them the waiting keystream changes the
    /// texts of two lanes each. All of them at the end of their own step would be some 400 instructions
    /// with next to none for the vector units, an eighth of a step's time by estimate.
    #[inline(always)]
    pub(super) fn double_round<P: Packet>(
        &mut self,
        cpu: L::Cpu,
        set: &mut Set<'_, P, N>,
        words: &mut [L; 16],
        i: usize,
    ) {
        const { assert!(N <= 2 * (DOUBLE_ROUNDS - 2)) }
        for lane in 2 * i..N.min(2 * i + 2) {
            if self.waiting >> lane & 1 == 1 {
                let share = &mut self.shares[lane];
                let (blocks, _) = set.packets[share.packet].text_mut().as_chunks_mut();
                xor_block(&mut blocks[share.block], &self.keystream[lane]);
                share.block += 1;
            }
        }
        double_round_amid(cpu, words);
    }

    /// Ends a step. The keystream waits, but for lanes that have their last block of a text: they use theirs and
    /// go on to another one.
    #[inline(always)]
    pub(super) fn finish<P: Packet>(
        &mut self,
        cpu: L::Cpu,
        set: &mut Set<'_, P, N>,
        words: [L; 16],
    ) {
        chacha20::finish(words, &self.start, &mut self.keystream);
        self.start[12] = self.start[12].add(L::splat(cpu, 1));
        self.waiting = (1 << self.busy) - 1;
        if self.plain > 0 {
            self.plain -= 1;
            return;
        }
        let mut restarted = false;
        let (packets, members) = set.parts();
        let lanes = self.shares.iter_mut().zip(&self.keystream).zip(0..);
        for ((share, keystream), lane) in lanes.take(self.busy) {
            if share.block + 1 < share.end {
                continue;
            }
            self.waiting &= !(1 << lane);
            let from = share.block * BLOCK_LEN;
            let len = (members[share.member].text_len - from).min(BLOCK_LEN);
            let text = &mut packets[share.packet].text_mut()[from..];
            xor(text, len, std::slice::from_ref(keystream));
            *share = Share::new(members, share.member, share.end, share.later);
            if let Some(origin) = share.origin(lane) {
                chacha20::restart(cpu, &mut self.start, packets, origin);
                restarted = true;
            }
        }
        if restarted {
            self.ahead = chacha20::ahead(cpu, &self.start);
        }
        self.look_ahead();
    }

    /// Overwrites keys and keystream.
    #[inline(always)]
    pub(super) fn forget(&mut self, cpu: L::Cpu) {
        self.start = [L::splat(cpu, 0); 16];
        self.ahead = self.start;
        self.keystream = [[0; BLOCK_LEN]; N];
        optimization_barrier(self);
    }
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
    /// `left` blocks from block `block` on, counted from the beginning of the member's text.
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
