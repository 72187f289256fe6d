#![forbid(unsafe_code)]
//! Packets to seal and to open, as the kernel sees them.

use std::hint::black_box;

use super::{HEADER_LEN, Open, Seal, TAG_LEN, well_formed};

/// A packet as the kernel sees it.
pub(super) trait Packet {
    /// Whether the text is plaintext and becomes ciphertext, or the other way round.
    const SEALING: bool;

    /// The key, as little-endian words.
    fn key(&self) -> &[u32; 8];
    /// The nonce, as little-endian words.
    fn nonce(&self) -> [u32; 3];
    /// What is authenticated besides the text: nothing in WireGuard, but the published vectors have
    /// it.
    fn associated(&self) -> &[u8] {
        &[]
    }
    /// The length of the text; `None` for a packet to leave alone.
    fn text_len(&self) -> Option<u32>;
    /// The text and at least [`TAG_LEN`] bytes behind it.
    fn text(&self) -> &[u8];
    /// The same.
    fn text_mut(&mut self) -> &mut [u8];
    /// Takes the tag, computed over the ciphertext. False if it is not the one that the packet came
    /// with: then the text is not to be touched again.
    fn settle(&mut self, tag: [u8; TAG_LEN]) -> bool;
}

/// What the MAC takes in behind the whole blocks of the ciphertext, and how many blocks that is: the
/// tail filled up with zeros, if there is one, and the lengths (RFC 8439 §2.8).
#[inline(always)]
pub(super) fn end_blocks<P: Packet>(packet: &P, text_len: usize) -> ([[u8; 16]; 2], usize) {
    let lengths = packet.associated().len() as u128 | (text_len as u128) << 64;
    let mut end = [lengths.to_le_bytes(); 2];
    let tail_len = text_len % 16;
    if tail_len > 0 {
        let tail = packet.text()[text_len - tail_len..].first_chunk();
        let tail = u128::from_le_bytes(*tail.expect("a tag's room is behind the text"));
        end[0] = (tail & low_bytes(tail_len)).to_le_bytes();
    }
    (end, 1 + usize::from(tail_len > 0))
}

/// These at most 16 bytes, filled up with zeros.
#[inline(always)]
pub(super) fn padded(piece: &[u8]) -> [u8; 16] {
    let mut block = [0; 16];
    block[..piece.len()].copy_from_slice(piece);
    block
}

/// The mask of the lowest `n` bytes; all of them from 16 on.
#[inline(always)]
pub(super) fn low_bytes(n: usize) -> u128 {
    if n < 16 { !(!0 << (8 * n)) } else { !0 }
}

impl Packet for Seal<'_> {
    const SEALING: bool = true;

    #[inline(always)]
    fn key(&self) -> &[u32; 8] {
        &self.key.words
    }

    #[inline(always)]
    fn nonce(&self) -> [u32; 3] {
        nonce(self.counter)
    }

    #[inline(always)]
    fn text_len(&self) -> Option<u32> {
        text_len(self.message)
    }

    #[inline(always)]
    fn text(&self) -> &[u8] {
        &self.message[HEADER_LEN..]
    }

    #[inline(always)]
    fn text_mut(&mut self) -> &mut [u8] {
        &mut self.message[HEADER_LEN..]
    }

    #[inline(always)]
    fn settle(&mut self, tag: [u8; TAG_LEN]) -> bool {
        if let Some(room) = self.message.last_chunk_mut() {
            *room = tag;
        }
        true
    }
}

impl Packet for Open<'_> {
    const SEALING: bool = false;

    #[inline(always)]
    fn key(&self) -> &[u32; 8] {
        &self.key.words
    }

    #[inline(always)]
    fn nonce(&self) -> [u32; 3] {
        nonce(self.counter)
    }

    #[inline(always)]
    fn text_len(&self) -> Option<u32> {
        text_len(self.message)
    }

    #[inline(always)]
    fn text(&self) -> &[u8] {
        &self.message[HEADER_LEN..]
    }

    #[inline(always)]
    fn text_mut(&mut self) -> &mut [u8] {
        &mut self.message[HEADER_LEN..]
    }

    #[inline(always)]
    fn settle(&mut self, tag: [u8; TAG_LEN]) -> bool {
        let received = self.message.last_chunk().copied().map(u128::from_le_bytes);
        // The barrier keeps the comparison one of all 16 bytes: whatever the compiler could tell
        // about the two tags, it must have their whole difference here.
        let differs = received.map(|tag_sent| black_box(tag_sent ^ u128::from_le_bytes(tag)));
        self.ok = differs == Some(0);
        if !self.ok {
            self.wipe();
        }
        self.ok
    }
}

/// Four zero bytes and the counter, little-endian (WireGuard paper §5.4.6).
#[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
#[inline(always)]
fn nonce(counter: u64) -> [u32; 3] {
    [0, counter as u32, (counter >> 32) as u32]
}

#[inline(always)]
fn text_len(message: &[u8]) -> Option<u32> {
    if !well_formed(message) {
        return None;
    }
    u32::try_from(message.len() - HEADER_LEN - TAG_LEN).ok()
}
