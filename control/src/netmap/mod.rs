//! The network map: who is in the network and which relays it uses.

mod derp_map;

pub use derp_map::*;
