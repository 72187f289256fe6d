//! The boundary: what crosses it between the control thread, the handshake thread and the shards.
//!
//! Nobody ever waits for anybody here. Tables and rules go through cells that hold the newest only,
//! from which each reader finds out what has changed for it; path decisions through one slot per peer and a queue of ids; packets through
//! lanes bounded in entries and bytes that drop their oldest, counted. A thread is woken through
//! its event descriptor, and only if it sleeps.

mod activity;
mod awaited;
mod lane;
mod loan;
mod paths;
mod shared;
pub(crate) mod strangers;
mod types;
mod wake;

pub(crate) mod hub;
pub(crate) mod table;

/// The locks, atomics and references of [`loan`] and [`wake`].
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
    pub(super) use std::sync::{Arc, Mutex, PoisonError, Weak};
}

pub(crate) use activity::{ActivityBlock, Arrived};
pub(crate) use awaited::Awaited;
#[cfg(test)]
pub(crate) use awaited::PLACES;
pub(crate) use hub::Hub;
pub(crate) use lane::{Lane, Load};
pub(crate) use loan::{Borrowed, Lent, Loan};
pub(crate) use paths::PathSlots;
pub(crate) use shared::{PeerShared, Whereabouts};
pub use types::*;
pub(crate) use wake::Wake;
