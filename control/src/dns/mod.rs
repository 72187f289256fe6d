//! Names: what the network wants of the host's resolver, and what the host has.
//!
//! Rooms: `wish` is what the network wants of the host's resolver, `host` how that host is told.

pub mod host;
mod wish;

pub use wish::HostDns;
