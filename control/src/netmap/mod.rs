//! The network map: who is in the network, which relays it uses, who may send what to whom.
//!
//! [`wire`] has the JSON types, [`MapState`] applies a map stream's messages, [`Netmap`] is the
//! snapshot handed to the agent. [`filter`] makes the server's packet filter rules into the data
//! plane's, which compiles them for look-ups in its `filter/rules.rs`.
//!
//! Rooms: `wire` is the JSON, `merge` the table that a stream's messages fill, `snapshot` what it comes
//! to, `derp_map` the relays, `prefix` what a prefix can stand for, `filter` the packet filter.

mod derp_map;
pub mod filter;
mod merge;
pub mod prefix;
mod snapshot;
pub mod wire;

pub use derp_map::*;
pub use merge::*;
pub use snapshot::*;
