//! The TUN device: virtio-net header, super-packets and their segments.

pub mod segment;
pub mod vnet;
