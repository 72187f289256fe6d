//! The TUN device: queues, virtio-net header, super-packets and their segments.

mod device;
mod merging;
pub mod segment;
pub mod vnet;

pub(crate) use device::{Device, Queue};
pub use merging::{Kind, Kinds};
pub(crate) use merging::{Merging, write};
