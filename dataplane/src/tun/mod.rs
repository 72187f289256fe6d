//! The TUN device: queues, and what is merged for them.

mod device;
mod merging;

pub(crate) use device::{Device, Queue};
pub use merging::{Kind, Kinds};
pub(crate) use merging::{Merging, write};
