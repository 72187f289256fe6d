//! Packets: buffers, typed header views, checksums, ECN, super-packets
//! and their segments.

#[cfg(feature = "internals")]
pub mod build;
pub mod checksum;
pub mod ecn;
pub mod header;
mod pool;
pub mod segment;
pub mod vnet;

pub(crate) use pool::{BUF_LEN, Lent, PacketBuf, Pool};
