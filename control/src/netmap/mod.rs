//! The network map: who is in the network, which relays it uses, who may send what to whom.
//!
//! [`wire`] has the JSON types, [`MapState`] applies a map stream's messages, [`Netmap`] is the
//! snapshot handed to the agent, [`filter`] compiles packet filter rules for the data plane.

mod derp_map;
pub mod filter;
mod merge;
pub mod prefix;
mod snapshot;
pub mod wire;

pub use derp_map::*;
pub use merge::*;
pub use snapshot::*;
