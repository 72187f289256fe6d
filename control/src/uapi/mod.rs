//! The configuration protocol of userspace WireGuard: what `wg`, `wg-quick` and the libraries built
//! on them speak over a device's socket (wireguard.com/xplatform; `protocol/uapi.md`).
//!
//! A connection's life: [`Parser`] takes bytes as they come and gives one [`Request`] after the
//! other, however they are cut or pipelined. A `get` is answered by a [`Reply`] built from a
//! snapshot. A `set` becomes a whole [`Transaction`] or an [`Errno`]; only a whole one ever reaches
//! [`crate::device::Device`], so that a bad line changes nothing. That is our own choice:
//! wireguard-go keeps what came before the bad line.
//!
//! The sign of an error number differs, because `wg` reads it differently: negative in the reply to
//! a `set`, positive in the reply to a `get`.
//!
//! Rooms: `parser` cuts the stream into requests, `transaction` is a `set`, `reply` the answer to a
//! `get`, `value` reads keys, numbers, prefixes and endpoints.

mod parser;
mod reply;
mod transaction;
mod value;

pub use parser::{LINE_LEN_MAX, Parser, READ_LEN_MAX, Request};
pub use reply::{DeviceStatus, PeerStatus, Reply};
pub use transaction::{PresharedKey, STEPS_MAX, Step, Transaction};

#[cfg(test)]
mod tests;

/// A Linux error number, positive; its meaning in this protocol is in `protocol/uapi.md` §4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// Not permitted: what is asked for belongs to somebody else, such as coordination.
    pub const PERMISSION: Self = Self(nix::libc::EPERM);
    /// Reading failed, or a line was too long.
    pub const IO: Self = Self(nix::libc::EIO);
    /// Unknown key, key in the wrong section, or a value out of range.
    pub const INVALID: Self = Self(nix::libc::EINVAL);
    /// More peers, prefixes or lines than we hold.
    pub const NO_SPACE: Self = Self(nix::libc::ENOSPC);
    /// A line without `=`.
    pub const PROTOCOL: Self = Self(nix::libc::EPROTO);
    /// The port or the mark could not be given to the sockets.
    pub const ADDRESS_IN_USE: Self = Self(nix::libc::EADDRINUSE);
}
