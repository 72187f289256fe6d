//! Packets: buffers, typed header views, checksums, ECN.

pub mod build;
pub mod checksum;
pub mod ecn;
pub mod header;
