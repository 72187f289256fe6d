#![forbid(unsafe_code)]
//! The fallback: ring's one-packet ChaCha20-Poly1305, packet after packet.

use ring::aead::{Aad, Nonce};

use super::{HEADER_LEN, Open, Seal, TAG_LEN, well_formed};

/// Seals every packet of the batch; headers are written already.
pub(super) fn seal(batch: &mut [Seal<'_>]) {
    for packet in batch {
        let text_end = packet.message.len() - TAG_LEN;
        let (text, tag) = packet.message[HEADER_LEN..].split_at_mut(text_end - HEADER_LEN);
        let sealed =
            packet
                .key
                .ring()
                .seal_in_place_separate_tag(nonce(packet.counter), Aad::empty(), text);
        let sealed = sealed.expect("a message is far shorter than ring's limit of 256 GiB");
        tag.copy_from_slice(sealed.as_ref());
    }
}

/// Opens every packet of the batch.
pub(super) fn open(batch: &mut [Open<'_>]) {
    for packet in batch {
        if !well_formed(packet.message) {
            continue;
        }
        let (key, nonce) = (packet.key.ring(), nonce(packet.counter));
        let text = &mut packet.message[HEADER_LEN..];
        packet.ok = key.open_in_place(nonce, Aad::empty(), text).is_ok();
        if !packet.ok {
            packet.wipe();
        }
    }
}

/// Four zero bytes and the counter, little-endian (WireGuard paper §5.4.6).
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}
