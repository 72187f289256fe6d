//! The control side of ringtail: everything but moving packets.
//!
//! Cores decide and touch neither socket nor clock: `key`, `netmap`, `uapi`. The rim is
//! `agent`, which wires the cores together, `driver`, which touches the outside, and `cli`.
#![forbid(unsafe_code)]

pub mod agent;
#[cfg(test)]
mod bounds;
pub mod cli;
pub mod config;
pub mod coord;
pub mod derp;
pub mod device;
pub mod disco;
pub mod driver;
pub mod fuzzing;
pub mod hostnet;
pub mod key;
#[cfg(test)]
mod lists;
pub mod netcheck;
pub mod netmap;
pub mod noise;
pub mod path;
pub mod places;
pub mod rate;
pub mod stun;
pub mod uapi;
