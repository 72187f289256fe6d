//! Packets: buffers, typed header views, checksums, ECN.

pub mod build;
pub mod checksum;
pub mod ecn;
pub mod header;
mod pool;

pub(crate) use pool::{BUF_LEN, Lent, PacketBuf, Pool};
