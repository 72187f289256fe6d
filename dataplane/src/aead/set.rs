#![forbid(unsafe_code)]
//! Sets of packets for [`lockstep`](super::lockstep).

use super::TAG_LEN;
use super::lanes::BLOCK_LEN;
use super::packet::Packet;

/// Packets that are worked on together, the longest first.
pub(super) struct Set<'a, P, const N: usize> {
    pub(super) packets: &'a mut [P],
    members: [Member; N],
    len: usize,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Member {
    /// Index among the packets.
    pub(super) packet: usize,
    pub(super) text_len: usize,
}

impl Member {
    /// Blocks of ChaCha20 that its text needs.
    pub(super) fn blocks(&self) -> usize {
        self.text_len.div_ceil(BLOCK_LEN)
    }
}

impl<'a, P: Packet, const N: usize> Set<'a, P, N> {
    /// Takes packets off the batch until the set is full with such as are not to be left alone, or the
    /// batch is empty.
    #[inline(always)]
    pub(super) fn take(batch: &mut &'a mut [P]) -> Self {
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

    /// Those of the packets that are worked on.
    #[inline(always)]
    pub(super) fn members(&self) -> &[Member] {
        &self.members[..self.len]
    }

    /// Both borrowed at once.
    #[inline(always)]
    pub(super) fn parts(&mut self) -> (&mut [P], &[Member]) {
        (self.packets, &self.members[..self.len])
    }

    /// Settles every member with its tag. One whose tag was wrong has no text from then on.
    #[inline(always)]
    pub(super) fn settle(&mut self, tags: [[u8; TAG_LEN]; N]) {
        for (member, tag) in self.members[..self.len].iter_mut().zip(tags) {
            if !self.packets[member.packet].settle(tag) {
                member.text_len = 0;
            }
        }
    }
}
