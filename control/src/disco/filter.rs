//! What the kernel lets through to the discovery socket: a classic BPF program over the datagram.
//!
//! Anybody can send to the port, a hundred thousand datagrams a second and more, and what reaches the
//! socket's buffer takes a place there from what counts, and then the control thread's time. So the
//! kernel looks first, at the sender's cost more than ours: STUN answers pass, and DISCO datagrams
//! that are long enough and begin with a key of a peer, by its first four bytes. (Who knows a peer's
//! key gets past; what is behind it is opened, within limits: `path/manager.rs`.)
//!
//! The program sees the datagram with its UDP header. A load behind the datagram's end ends it, and
//! drops the datagram.

use nix::libc;
use ringtail_dataplane::{DISCO_MAGIC, STUN_COOKIE};
use socket2::SockFilter;

use super::{TAG_AT, TAG_LEN};
use crate::key::DiscoPublic;

/// Keys looked for at most: for more, every DISCO datagram passes. The program for so many has three
/// instructions for a key; the kernel takes 4096.
pub const KEYS_MAX: usize = 1024;

/// Keys compared one after the other; more are divided first.
const LEAF_LEN_MAX: usize = 4;
/// Bytes before the payload.
const UDP_HEADER_LEN: u32 = 8;
/// Header, tag, type and version of the shortest DISCO datagram.
const DISCO_LEN_MIN: usize = TAG_AT + TAG_LEN + 2;
/// Type of a STUN answer, "Binding success"; the cookie is behind it.
const STUN_ANSWER: u32 = 0x0101;

/// What the program says: the whole datagram, or nothing of it.
const PASS: u32 = u32::MAX;
const DROP: u32 = 0;

/// The program that lets DISCO datagrams of these keys pass, or all if there are too many, and STUN
/// answers.
pub fn program(keys: &[DiscoPublic]) -> Vec<SockFilter> {
    let mut words: Vec<u32> = keys.iter().map(first_word).collect();
    words.sort_unstable();
    words.dedup();
    program_for((words.len() <= KEYS_MAX).then_some(&words))
}

/// The program that lets every DISCO datagram pass.
pub fn any_sender() -> Vec<SockFilter> {
    program_for(None)
}

fn program_for(words: Option<&Vec<u32>>) -> Vec<SockFilter> {
    let [a, b, c, d, e, f] = DISCO_MAGIC;
    let (magic, magic_rest) = (u32::from_be_bytes([a, b, c, d]), u16::from_be_bytes([e, f]));
    let len_min = UDP_HEADER_LEN + u32::try_from(DISCO_LEN_MIN).expect("small");
    let mut program = vec![
        load_word(0),
        equal(magic, 6, 0),
        load_half(0),
        equal(STUN_ANSWER, 0, 3),
        load_word(4),
        equal(u32::from_be_bytes(STUN_COOKIE), 0, 1),
        verdict(PASS),
        verdict(DROP),
        load_half(4),
        equal(magic_rest.into(), 0, 2),
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_LEN, 0, 0, 0),
        at_least(len_min, 1, 0),
        verdict(DROP),
        load_word(6),
    ];
    match words {
        None => program.push(verdict(PASS)),
        Some(words) => search(words, &mut program),
    }
    program
}

/// Compares what is loaded with some of the words, sorted, and says what becomes of the datagram.
fn search(words: &[u32], program: &mut Vec<SockFilter>) {
    if words.len() <= LEAF_LEN_MAX {
        for word in words {
            program.extend([equal(*word, 0, 1), verdict(PASS)]);
        }
        return program.push(verdict(DROP));
    }
    let (low, high) = words.split_at(words.len() / 2);
    program.push(at_least(high[0], 0, 1));
    // Conditional jumps reach 255 instructions only.
    let jump = program.len();
    program.push(verdict(DROP));
    search(low, program);
    let over = program.len() - jump - 1;
    let over = u32::try_from(over).expect("a program has at most 4096 instructions");
    program[jump] = op(libc::BPF_JMP | libc::BPF_JA, 0, 0, over);
    search(high, program);
}

fn first_word(key: &DiscoPublic) -> u32 {
    u32::from_be_bytes([key.0[0], key.0[1], key.0[2], key.0[3]])
}

fn op(code: u32, jt: u8, jf: u8, k: u32) -> SockFilter {
    let code = u16::try_from(code).expect("classic BPF codes are below 256");
    SockFilter::new(code, jt, jf, k)
}

/// Loads four bytes of the payload, big-endian.
fn load_word(at: u32) -> SockFilter {
    let code = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    op(code, 0, 0, UDP_HEADER_LEN + at)
}

/// Loads two.
fn load_half(at: u32) -> SockFilter {
    let code = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
    op(code, 0, 0, UDP_HEADER_LEN + at)
}

/// Jumps over so many instructions if what is loaded is `k`, or if not.
fn equal(k: u32, jt: u8, jf: u8) -> SockFilter {
    op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, jt, jf, k)
}

/// The same if it is `k` or more.
fn at_least(k: u32, jt: u8, jf: u8) -> SockFilter {
    op(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, jt, jf, k)
}

fn verdict(bytes: u32) -> SockFilter {
    op(libc::BPF_RET | libc::BPF_K, 0, 0, bytes)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::stun;

    fn key(n: u32) -> DiscoPublic {
        let mut key = [7; 32];
        // Spread over the whole range, and not in order.
        key[..4].copy_from_slice(&n.wrapping_mul(2_654_435_761).to_be_bytes());
        DiscoPublic(key)
    }

    fn disco(key: &DiscoPublic, len: usize) -> Vec<u8> {
        let mut datagram = [&DISCO_MAGIC[..], &key.0].concat();
        datagram.resize(len, 0);
        datagram
    }

    /// Sends it all to a socket with this program; what came is what went through.
    fn through(ip: &str, program: &[SockFilter], sent: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let to = UdpSocket::bind((ip, 0)).unwrap();
        socket2::SockRef::from(&to).attach_filter(program).unwrap();
        let from = UdpSocket::bind((ip, 0)).unwrap();
        let mut got = Vec::new();
        to.set_nonblocking(true).unwrap();
        for datagram in sent {
            from.send_to(datagram, to.local_addr().unwrap()).unwrap();
            let mut bytes = [0; 2048];
            if let Ok(len) = to.recv(&mut bytes) {
                got.push(bytes[..len].to_vec());
            }
        }
        got
    }

    #[test]
    fn peers_disco_and_stun_answers_pass_and_nothing_else_does() {
        let request = stun::request([5; 12]);
        let answer = stun::respond(&request, "192.0.2.1:9".parse().unwrap());
        let answer = answer.unwrap().as_ref().to_vec();
        let passing = [
            disco(&key(1), DISCO_LEN_MIN),
            disco(&key(2), 1400),
            answer.clone(),
        ];
        let mut cut_magic = disco(&key(1), 124);
        cut_magic[5] ^= 1;
        let mut no_cookie = answer.clone();
        no_cookie[7] ^= 1;
        let refused = [
            disco(&key(3), 124),
            disco(&key(1), DISCO_LEN_MIN - 1),
            DISCO_MAGIC.to_vec(),
            cut_magic,
            no_cookie,
            request.to_vec(),
            answer[..6].to_vec(),
            vec![4; 148],
            b"TS".to_vec(),
            vec![],
        ];
        for ip in ["127.0.0.1", "::1"] {
            let sent = [&refused[..], &passing, &refused].concat();
            let got = through(ip, &program(&[key(1), key(2)]), &sent);
            assert_eq!(got, passing, "{ip}");
        }
    }

    #[test]
    fn every_key_of_a_network_is_found_and_no_other() {
        for count in [0, 1, 4, 5, 9, 100, 1000, 1024] {
            let keys: Vec<DiscoPublic> = (0..count).map(key).collect();
            let program = program(&keys);
            assert!(program.len() <= 4096, "{count}: {}", program.len());
            let known: Vec<_> = keys.iter().map(|key| disco(key, 124)).collect();
            let strangers: Vec<_> = (count..count + 50).map(|n| disco(&key(n), 124)).collect();
            let sent = [&known[..], &strangers].concat();
            assert_eq!(through("127.0.0.1", &program, &sent), known, "{count}");
        }
    }

    #[test]
    fn of_more_keys_than_can_be_looked_for_all_pass() {
        let keys: Vec<DiscoPublic> = (0..1025).map(key).collect();
        let sent = [disco(&key(1024), 124), disco(&key(5000), 124), vec![0; 124]];
        let got = through("127.0.0.1", &program(&keys), &sent);
        assert_eq!(got, sent[..2]);
        assert_eq!(through("127.0.0.1", &any_sender(), &sent), sent[..2]);
    }
}
