//! The control side of ringtail: everything but moving packets.
#![forbid(unsafe_code)]

pub mod key;
pub mod netmap;
pub mod stun;
