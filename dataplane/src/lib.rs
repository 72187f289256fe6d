//! The data plane of ringtail.
//!
//! Packets walk through rooms in one direction; decisions enter by one door, events leave by
//! another:
//!
//! ```text
//! outbound   tun -> route -> seal -> udp
//! inbound    udp -> classify -> open -> filter -> coalesce -> tun
//! control    settings, networks, paths in, at the start of a turn;  Event out, at its end
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
//! # fn f(config: Config, network: NetworkChange, decision: PathDecision) -> Result<(), StartError> {
//! let dataplane = Dataplane::start(config)?;
//! dataplane.change_network(network);
//! dataplane.set_path(PeerId(0), decision);
//! while let Some(event) = dataplane.poll_event() { /* … */ }
//! # Ok(()) }
//! ```
//!
//! Each room takes only from those named before it (a test of `rooms` holds this against the sources,
//! and draws it):
//! - `sys`: the system calls, wrapped so that they are safe.
//! - `stats`: counters, drop reasons, cycles of each room.
//! - `types`: what the control side says and is told.
//! - `config`: what a data plane is started with.
//! - `budget`: a share of a thread's time.
//! - `aead`: ChaCha20-Poly1305, many packets at once.
//! - `classify`: what a datagram is, and whose.
//! - `packet`: buffers, headers, checksums, super-packets and their segments.
//! - `channel`: lanes, loans, slots and bells between threads.
//! - `noise`: the messages of handshakes, and who may have one.
//! - `route`: which peer an address belongs to.
//! - `udp`: sockets, steering, sending.
//! - `open`: receive batches, taken apart by session.
//! - `tun`: the device.
//! - `coalesce`: opened packets become super-packets.
//! - `filter`: what may come in.
//! - `ring`: io_uring and epoll.
//! - `session`: keys, timers, replay windows; sealing and opening.
//! - `peer`: a peer's path, what waits for it, what is lent of it; the table of all.
//! - `context`: what every room of a turn is handed.
//! - `seal`: packets become runs of sealed datagrams.
//! - `hub`: what the threads share, and what waits for each.
//! - `handshake`: the thread that reads handshake messages.
//! - `shard`: the thread that moves packets, and the order of rooms in a turn.
//! - `routes`: the thread that watches routes in device mode.
//! - `threads`: how all of them start and end.
//! - `dataplane`: the handle.
//! - `bench_support`: what benches run.
//! - `fuzzing`: what fuzz targets run.
//!
//! The feature `internals` opens the rooms that benches, fuzz targets and tests look into; without it
//! the compiler sees what nobody calls. The feature `boringtun` adds the engine that ours is compared with.

#![cfg_attr(
    not(feature = "internals"),
    allow(unreachable_pub, reason = "open with `internals`")
)]

#[cfg(feature = "internals")]
pub mod aead;
#[cfg(not(feature = "internals"))]
mod aead;
#[cfg(feature = "internals")]
pub mod bench_support;
#[cfg(test)]
mod bounds;
mod budget;
mod channel;
#[cfg(feature = "internals")]
pub mod classify;
#[cfg(not(feature = "internals"))]
mod classify;
#[cfg(feature = "internals")]
pub mod coalesce;
#[cfg(not(feature = "internals"))]
mod coalesce;
mod config;
mod context;
mod dataplane;
#[cfg(feature = "internals")]
pub mod filter;
#[cfg(not(feature = "internals"))]
mod filter;
#[cfg(feature = "internals")]
pub mod fuzzing;
mod handshake;
mod hub;
#[cfg(feature = "internals")]
pub mod noise;
#[cfg(not(feature = "internals"))]
mod noise;
mod open;
#[cfg(feature = "internals")]
pub mod packet;
#[cfg(not(feature = "internals"))]
mod packet;
mod peer;
mod ring;
#[cfg(test)]
mod rooms;
#[cfg(feature = "internals")]
pub mod route;
#[cfg(not(feature = "internals"))]
mod route;
mod routes;
mod seal;
mod session;
mod shard;
pub mod stats;
mod sys;
mod threads;
#[cfg(feature = "internals")]
pub mod tun;
#[cfg(not(feature = "internals"))]
mod tun;
mod types;
mod udp;

/// A generator of a new seed, which is printed.
#[cfg(test)]
fn seeded() -> rand::rngs::StdRng {
    let seed = rand::random();
    println!("seed {seed:#x}");
    rand::SeedableRng::seed_from_u64(seed)
}

pub use budget::TimeBudget;
pub use classify::{Class, DISCO_MAGIC, STUN_COOKIE, STUN_HEADER_LEN, classify};
pub use config::{
    Config, DriverChoice, DriverKind, Engine, MTU_MAX, MTU_MIN, Offloads, SHARDS_MAX, StartError,
    pinned_by_default, shards_by_default,
};
pub use dataplane::{Dataplane, OffloadsInUse, RENEWAL, Stats};
pub use noise::{SymmetricState, dh};
pub use routes::rest_after;
pub use sys::{now, slept, steady_wall, steady_wall_at_least};
pub use tun::{Kind as SuperPacketKind, Kinds as SuperPacketKinds};
pub use types::{
    Activity, Datagrams, Event, NetworkChange, PEERS_MAX, PathDecision, PeerApi, PeerConfig,
    PeerId, Ping, Prefix, RegionId, RelayBatch, Rule, Rules,
};
pub use udp::set_dont_fragment;
