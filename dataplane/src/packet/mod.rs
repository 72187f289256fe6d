//! Packets: buffers, typed header views, checksums, ECN.

pub mod checksum;
pub mod ecn;
pub mod header;
