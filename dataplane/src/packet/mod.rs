//! Packets: buffers, typed header views, checksums, ECN, super-packets
//! and their segments.
//!
//! Rooms: `pool` is the buffers, `header` the views, `vnet` the TUN's header in front of a packet,
//! `segment` cuts a super-packet, `checksum` and `ecn` what their names say; `build` makes whole
//! packets, for tests.

#[cfg(feature = "internals")]
pub mod build;
pub mod checksum;
pub mod ecn;
pub mod header;
mod pool;
pub mod segment;
pub mod vnet;

pub(crate) use pool::{BUF_LEN, Lent, PacketBuf, Pool};
