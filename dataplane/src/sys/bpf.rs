//! Instructions of classic BPF.

#![forbid(unsafe_code)]

use libc::sock_filter;

/// Loads a word of the packet, in network byte order.
pub(crate) const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
/// Compares the accumulator with a number.
pub(crate) const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
/// Ends with a number.
pub(crate) const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// An instruction: what to do, how many to skip where a comparison holds and where not, and a number.
pub(crate) fn op(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter {
        code: u16::try_from(code).expect("classic BPF codes are below 256"),
        jt,
        jf,
        k,
    }
}
