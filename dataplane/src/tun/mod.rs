//! The TUN device: its queues (`device`), and which packets may be written to them as one (`merging`).

mod device;
mod merging;

pub(crate) use device::{Device, Queue};
pub use merging::{Kind, Kinds};
pub(crate) use merging::{Merging, write};
