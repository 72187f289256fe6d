//! Which socket of the group gets a datagram: a classic BPF program over the payload.
//!
//! The members of the group, in order of joining: a data socket per shard, the sockets of the handshake
//! thread by [`Door`], and, unless in device mode, the discovery socket. The first four bytes decide as
//! one word (a STUN answer begins with 01 01, so one byte is not enough): transport data goes to the
//! shard named by byte 5, which is bits 8 to 15 of the receiver index that we chose; handshake messages
//! to a door; everything else to the discovery socket, or where there is none to the handshake thread,
//! which counts it. A datagram shorter than a load makes the program fail, which counts as index 0:
//! shard 0 takes it in its stride.
//!
//! Handshake messages can be made up by anybody, at any rate, and what fills a socket keeps out whatever
//! else would go there. So they are told apart here, where it costs a few nanoseconds: what comes from
//! an address that we know, what answers, what claims to carry a cookie, and the rest. A flood fills the
//! door it comes by, and the thread gives each its turn.
//!
//! The program sees the first datagram of a GRO batch only; shards hand on what is not theirs.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::net::IpAddr;

use libc::sock_filter;

use crate::classify::INITIATION_LEN;
use crate::sys::bpf::{EQUAL, LOAD, RETURN, op};

/// First payload word of a data message, as loaded (big-endian).
const WORD_DATA: u32 = 0x0400_0000;
/// First payload words of handshake messages: initiation, response, cookie reply.
const WORDS_HANDSHAKE: [u32; 3] = [0x0100_0000, 0x0200_0000, 0x0300_0000];
/// Byte of a data message that names the owner shard: bits 8 to 15 of the receiver index, which
/// starts at byte 4 and is little-endian.
pub(crate) const SHARD_BYTE: u32 = 5;
/// Addresses that a program knows at most: with three instructions each it stays below the kernel's
/// 4096 (`BPF_MAXINSNS`).
const ADDRESSES_MAX: usize = 1000;
/// Addresses that are compared one after another.
const RUN: usize = 4;
/// Where MAC2 of an initiation begins: its last four words.
const MAC2_AT: u32 = 132;
/// `SKF_NET_OFF` of `linux/filter.h`: loads from there on are of the network header.
const NETWORK: u32 = 0xfff0_0000;
/// Where the source address begins there.
const SOURCE4_AT: u32 = 12;
const SOURCE6_AT: u32 = 8;

/// The sockets of the handshake thread, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Door {
    /// Messages from addresses that we know.
    Known,
    /// Responses and cookie replies.
    Answers,
    /// Initiations with a MAC2.
    Proven,
    /// Everything else.
    Others,
}

impl Door {
    /// How many there are.
    pub(crate) const COUNT: usize = 4;
}

/// Which sources a family's program tells apart, as what it has in its accumulator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sources {
    /// Of a family whose program is to know some.
    pub(crate) v6: bool,
    /// What makes one word of an IPv6 /64; random, so that nobody can choose networks that meet.
    pub(crate) salt: [u32; 2],
    words: BTreeSet<u32>,
}

impl Sources {
    /// Of these addresses those of one family: IPv4 addresses, IPv6 /64s.
    pub(crate) fn new(v6: bool, salt: [u32; 2], addresses: &BTreeSet<IpAddr>) -> Sources {
        let salt = salt.map(|word| word | 1);
        let words = addresses.iter().filter_map(|ip| match ip {
            IpAddr::V4(ip) => (!v6).then(|| ip.to_bits()),
            IpAddr::V6(ip) => v6.then(|| {
                let word = |at: usize| {
                    let [a, b] = [ip.segments()[at], ip.segments()[at + 1]];
                    u32::from(a) << 16 | u32::from(b)
                };
                word(0).wrapping_mul(salt[0]) ^ word(2).wrapping_mul(salt[1])
            }),
        });
        Sources {
            v6,
            salt,
            words: words.take(ADDRESSES_MAX).collect(),
        }
    }
}

fn len(program: &[sock_filter]) -> u32 {
    u32::try_from(program.len()).expect("programs are short")
}

/// Builds the program for a group with `shards` data sockets, and a discovery socket or none.
pub(crate) fn program(shards: u32, discovery: bool, known: &Sources) -> Vec<sock_filter> {
    let door = |door: Door| shards + u32::from(door as u8);
    let others = door(Door::Others);
    let discovery = others + u32::from(discovery);
    let load_byte = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    let modulo = libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K;
    let initiation = u32::try_from(INITIATION_LEN).expect("148");
    let mut program = vec![
        op(LOAD, 0, 0, 0),
        op(EQUAL, 4, 0, WORD_DATA),
        op(EQUAL, 6, 0, WORDS_HANDSHAKE[0]),
        op(EQUAL, 5, 0, WORDS_HANDSHAKE[1]),
        op(EQUAL, 4, 0, WORDS_HANDSHAKE[2]),
        op(RETURN, 0, 0, discovery),
        // An index that names no shard is garbage; any shard may count it.
        op(load_byte, 0, 0, SHARD_BYTE),
        op(modulo, 0, 0, shards),
        op(libc::BPF_RET | BPF_A, 0, 0, 0),
    ];
    if !known.words.is_empty() {
        load_source(&mut program, known);
        let words: Vec<u32> = known.words.iter().copied().collect();
        search(&mut program, &words, door(Door::Known));
    }
    program.extend([
        op(LOAD, 0, 0, 0),
        op(EQUAL, 1, 0, WORDS_HANDSHAKE[0]),
        op(RETURN, 0, 0, door(Door::Answers)),
        // So that the loads behind it succeed.
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_LEN, 0, 0, 0),
        op(EQUAL, 1, 0, initiation),
        op(RETURN, 0, 0, others),
    ]);
    for word in 0..4u8 {
        // To the end of the words behind it, or just on.
        let proven = 2 * (3 - word) + 1;
        program.push(op(LOAD, 0, 0, MAC2_AT + 4 * u32::from(word)));
        program.push(op(EQUAL, 0, proven, 0));
    }
    program.push(op(RETURN, 0, 0, others));
    program.push(op(RETURN, 0, 0, door(Door::Proven)));
    program
}

/// One word of the source into the accumulator.
fn load_source(program: &mut Vec<sock_filter>, known: &Sources) {
    if !known.v6 {
        program.push(op(LOAD, 0, 0, NETWORK + SOURCE4_AT));
        return;
    }
    let times = libc::BPF_ALU | libc::BPF_MUL | libc::BPF_K;
    program.extend([
        op(LOAD, 0, 0, NETWORK + SOURCE6_AT),
        op(times, 0, 0, known.salt[0]),
        op(libc::BPF_MISC | BPF_TAX, 0, 0, 0),
        op(LOAD, 0, 0, NETWORK + SOURCE6_AT + 4),
        op(times, 0, 0, known.salt[1]),
        op(libc::BPF_ALU | libc::BPF_XOR | libc::BPF_X, 0, 0, 0),
    ]);
}

/// Returns `found` if the accumulator is one of the sorted words, else goes on behind all this.
fn search(program: &mut Vec<sock_filter>, words: &[u32], found: u32) {
    let mut leave = Vec::new();
    branch(program, words, found, &mut leave);
    let end = len(program);
    for at in leave {
        let at: usize = at;
        let behind = u32::try_from(at + 1).expect("programs are short");
        program[at] = op(ALWAYS, 0, 0, end - behind);
    }
}

/// A binary search down to runs; where each run ends without success is noted in `leave`.
fn branch(program: &mut Vec<sock_filter>, words: &[u32], found: u32, leave: &mut Vec<usize>) {
    let at_least = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    if words.len() <= RUN {
        for word in words {
            program.push(op(EQUAL, 0, 1, *word));
            program.push(op(RETURN, 0, 0, found));
        }
        leave.push(program.len());
        program.push(op(ALWAYS, 0, 0, 0));
        return;
    }
    let (below, above) = words.split_at(words.len() / 2);
    program.push(op(at_least, 0, 1, above[0]));
    let jump = program.len();
    program.push(op(ALWAYS, 0, 0, 0));
    branch(program, below, found, leave);
    let behind = u32::try_from(jump + 1).expect("programs are short");
    program[jump] = op(ALWAYS, 0, 0, len(program) - behind);
    branch(program, above, found, leave);
}

/// `BPF_A` and `BPF_TAX` of `linux/filter.h`: return the accumulator; copy it to the index register.
const BPF_A: u32 = 0x10;
const BPF_TAX: u32 = 0x00;
const ALWAYS: u32 = libc::BPF_JMP | libc::BPF_JA;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_program_is_not_too_long_for_the_kernel() {
        let addresses = (0..5000u32).map(|n| IpAddr::from(n.to_be_bytes()));
        let known = Sources::new(false, [1, 1], &addresses.collect());
        assert!(program(64, true, &known).len() < 4096);
    }
}
