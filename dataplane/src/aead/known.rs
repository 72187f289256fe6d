#![forbid(unsafe_code)]
//! The question every backend answers before it is used: a batch of several lengths and two keys,
//! sealed, compared with tags computed beforehand (by a plain implementation of RFC 8439 outside of
//! this project, over Python's integers), and opened again, with one packet damaged.

use std::array::from_fn;

use super::{HEADER_LEN, Key, MESSAGE_LEN_MIN, Open, Seal, TAG_LEN};

/// Length of the text in bytes, and the tag read as one big-endian number. Packet `i` has byte `j`
/// of its text `j * j + i`, and the counter `COUNTER * (i + 1)`; the packets `3 * k` and the two
/// behind it share a key, whose byte `j` is `7 * j + k`. All wrapping.
const QUESTION: [(usize, u128); 11] = [
    (0, 0x2be1e663a49c69581c55d8397ccef20f),
    (1, 0xcc7da0d757963a217137132f7426f437),
    (16, 0x91e2646a289f553f90903b4c9bef1f6d),
    (63, 0x997bed111b14a9dc55f7e4ad0a8967fe),
    (64, 0xbb6c948a9aaa2e79887f24c782085950),
    (65, 0x5a9b25bf10e19201a9730e4ec179122c),
    (200, 0xd9887bd7a3c97d96ae3363c9a4cba186),
    (447, 0xb11c02ae2d195bba333736fe65ec7749),
    (448, 0xc2181f0831332feae9ea52505e7cc69a),
    (513, 0x50c8eea634816fe7f52b7d706d07cfc4),
    (1420, 0xd23c8dac535ef8dfa63aa51592337ab2),
];
const COUNTER: u64 = 0x0123_4567_89ab_cdef;
const LEN_MAX: usize = MESSAGE_LEN_MIN + 1420;
/// The packet that is damaged before it is opened.
const DAMAGED: usize = 6;

/// Whether a backend seals and opens as it must.
pub(super) fn answers(
    seal: impl FnOnce(&mut [Seal<'_>]),
    open: impl FnOnce(&mut [Open<'_>]),
) -> bool {
    let keys: [Key; 4] = from_fn(|k| Key::new(&from_fn(|j| low_byte(7 * j + k))));
    let mut messages = [[0; LEN_MAX]; QUESTION.len()];
    let mut counters = [0; QUESTION.len()];
    for (i, message) in messages.iter_mut().enumerate() {
        counters[i] = COUNTER.wrapping_mul(i as u64 + 1);
        fill(i, message);
    }

    let mut packets = messages.iter_mut().enumerate();
    let mut batch: [Seal<'_>; QUESTION.len()] = from_fn(|i| {
        let (_, message) = packets.next().expect("one message for each packet");
        Seal {
            key: &keys[i / 3],
            receiver: 0,
            counter: counters[i],
            message: &mut message[..MESSAGE_LEN_MIN + QUESTION[i].0],
        }
    });
    seal(&mut batch);
    let sealed = batch.iter().zip(QUESTION).all(|(packet, (_, tag))| {
        packet.message[packet.message.len() - TAG_LEN..] == tag.to_be_bytes()
    });

    messages[DAMAGED][HEADER_LEN] ^= 1;
    let mut packets = messages.iter_mut().enumerate();
    let mut batch: [Open<'_>; QUESTION.len()] = from_fn(|i| {
        let (_, message) = packets.next().expect("one message for each packet");
        Open {
            key: &keys[i / 3],
            counter: counters[i],
            message: &mut message[..MESSAGE_LEN_MIN + QUESTION[i].0],
            ok: i == DAMAGED,
        }
    });
    open(&mut batch);
    let opened = batch.iter().enumerate().all(|(i, packet)| {
        let mut expected = [0; LEN_MAX];
        if i != DAMAGED {
            fill(i, &mut expected);
        }
        let text_end = HEADER_LEN + QUESTION[i].0;
        packet.ok == (i != DAMAGED)
            && packet.message[HEADER_LEN..text_end] == expected[HEADER_LEN..text_end]
    });
    sealed && opened
}

/// Writes the text of packet `i`.
fn fill(i: usize, message: &mut [u8; LEN_MAX]) {
    for (j, byte) in message[HEADER_LEN..].iter_mut().enumerate() {
        *byte = low_byte(j * j + i);
    }
}

fn low_byte(n: usize) -> u8 {
    n.to_le_bytes()[0]
}
