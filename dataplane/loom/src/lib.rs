//! Loans between shards under loom, which tries every order of loads and stores the memory model allows (with
//! so many switches of threads as [`check`] says).
//!
//! What is modelled is the data plane's own: `channel/loan.rs` and `channel/wake.rs` are compiled from their
//! places, and the queue that carries packets from shard to shard, crossbeam's `ArrayQueue`, from its source,
//! all of them against loom's atomics, locks and cells. What the shards do with them, turn by turn, is in
//! [`tests`], a few lines each as `shard/` has them.
#![cfg(test)]

extern crate alloc;

#[path = "../../src/channel/loan.rs"]
#[expect(dead_code, reason = "some is for the data plane alone")]
mod loan;
#[path = "../../src/channel/wake.rs"]
mod wake;

/// The queue between shards.
#[expect(dead_code, reason = "some is for others")]
mod queue {
    include!(concat!(env!("OUT_DIR"), "/array_queue.rs"));
}

mod shim;
mod tests;

/// What the two modules of the data plane are compiled against.
mod sync {
    pub(crate) use std::sync::PoisonError;

    pub(crate) use loom::sync::Mutex;
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

    pub(crate) use super::shim::{Arc, Weak};
}

/// The bell's descriptor: here something that loom can wait for.
mod sys {
    pub(crate) use super::shim::EventFd;
}
