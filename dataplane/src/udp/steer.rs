//! Which socket of the group gets a datagram: a classic BPF program over the payload.
//!
//! The members of the group, in order of joining: a data socket per shard, the handshake socket,
//! and, unless in device mode, the discovery socket. The first four bytes decide as one word (a STUN answer begins with 01 01,
//! so one byte is not enough): transport data goes to the shard named by byte 5, which is bits 8 to
//! 15 of the receiver index that we chose; handshake messages to the handshake socket; everything
//! else to the discovery socket, or where there is none to the handshake thread, which counts it. A datagram shorter than a load makes the program fail, which
//! counts as index 0: shard 0 takes it in its stride.
//!
//! The program sees the first datagram of a GRO batch only; shards hand on what is not theirs.

#![forbid(unsafe_code)]

use libc::sock_filter;

/// First payload word of a data message, as loaded (big-endian).
const WORD_DATA: u32 = 0x0400_0000;
/// First payload words of handshake messages: initiation, response, cookie reply.
const WORDS_HANDSHAKE: [u32; 3] = [0x0100_0000, 0x0200_0000, 0x0300_0000];
/// Byte of a data message that names the owner shard: bits 8 to 15 of the receiver index, which
/// starts at byte 4 and is little-endian.
pub(crate) const SHARD_BYTE: u32 = 5;

fn op(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter {
        code: u16::try_from(code).expect("classic BPF codes are below 256"),
        jt,
        jf,
        k,
    }
}

/// Builds the program for a group with `shards` data sockets, and a discovery socket or none.
pub(crate) fn program(shards: u32, discovery: bool) -> Vec<sock_filter> {
    let handshake = shards;
    let discovery = shards + u32::from(discovery);
    let load_word = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let load_byte = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let modulo = libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K;
    let ret = libc::BPF_RET | libc::BPF_K;
    vec![
        op(load_word, 0, 0, 0),
        op(equal, 4, 0, WORD_DATA),
        op(equal, 6, 0, WORDS_HANDSHAKE[0]),
        op(equal, 5, 0, WORDS_HANDSHAKE[1]),
        op(equal, 4, 0, WORDS_HANDSHAKE[2]),
        op(ret, 0, 0, discovery),
        // An index that names no shard is garbage; any shard may count it.
        op(load_byte, 0, 0, SHARD_BYTE),
        op(modulo, 0, 0, shards),
        op(libc::BPF_RET | BPF_A, 0, 0, 0),
        op(ret, 0, 0, handshake),
    ]
}

/// `BPF_A` of `linux/filter.h`: return the accumulator.
const BPF_A: u32 = 0x10;
