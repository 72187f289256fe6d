//! The data plane of ringtail.
//!
//! Packets walk through rooms in one direction; decisions enter by one door, events leave by
//! another:
//!
//! ```text
//! outbound   tun -> route -> seal -> udp
//! inbound    udp -> classify -> open -> filter -> coalesce -> tun
//! control    Command in, at the start of a turn;  Event out, at its end
//! ```
//!
//! [`Dataplane::start`] opens a multi-queue TUN device and one reuse-port group of UDP sockets per
//! family, and starts one pinned thread per shard and one that reads handshake messages. While packets
//! flow, shards share two things of a peer: a line of counters, and what its owner lends the others so
//! that they may seal for it. The control side talks to them through [`Dataplane`], whose
//! methods never wait:
//!
//! ```no_run
//! # use ringtail_dataplane::*;
//! # fn f(config: Config, network: NetworkConfig, decision: PathDecision) -> Result<(), StartError> {
//! let dataplane = Dataplane::start(config)?;
//! dataplane.set_network(network);
//! dataplane.set_path(PeerId(0), decision);
//! while let Some(event) = dataplane.poll_event() { /* … */ }
//! # Ok(()) }
//! ```

pub mod aead;
#[doc(hidden)]
pub mod bench_support;
#[cfg(test)]
mod bounds;
mod channel;
pub mod classify;
pub mod coalesce;
mod config;
mod context;
mod dataplane;
pub mod filter;
pub mod fuzzing;
mod handshake;
mod hub;
pub mod noise;
mod open;
pub mod packet;
mod peer;
mod ring;
pub mod route;
mod routes;
mod seal;
mod session;
mod shard;
pub mod stats;
mod sys;
mod threads;
pub mod tun;
mod types;
mod udp;

pub use config::{
    Config, DriverChoice, DriverKind, Engine, MTU_MAX, MTU_MIN, Offloads, SHARDS_MAX, StartError,
    pinned_by_default, shards_by_default,
};
pub use dataplane::{Dataplane, OffloadsInUse, Stats};
pub use routes::rest_after;
pub use sys::{now, slept, steady_wall, steady_wall_at_least};
pub use types::{
    Activity, Datagrams, Event, NetworkChange, NetworkConfig, PEERS_MAX, PathDecision, PeerConfig,
    PeerId, Prefix, RegionId, RelayOut, Rule, Rules,
};
pub use udp::set_dont_fragment;
