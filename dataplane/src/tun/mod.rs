//! The TUN device: queues, virtio-net header, super-packets and their segments.

mod device;
pub mod segment;
pub mod vnet;

pub(crate) use device::{Device, Queue};
