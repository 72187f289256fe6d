//! The boundary: what crosses it between the control thread and the shards.

mod types;

pub use types::*;
