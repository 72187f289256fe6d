//! Everything that touches the outside: sockets, TLS, netlink, files, clocks. One file or folder per
//! outside thing; drivers decide nothing.
//!
//! What runs, one loop each:
//! - [`node`]: a node: the agent between the data plane and everything below.
//! - [`device`]: a WireGuard device without coordination.
//! - [`coord_server`]: the coordination server.
//! - [`derp_server`]: the relay.
//!
//! Towards other machines:
//! - [`relay`]: connections to relays.
//! - [`coord_client`]: the connection to the coordination server; [`control_url`]: where that is.
//! - [`discovery`]: the UDP sockets of DISCO and STUN.
//! - [`dns`]: questions for names, from this host and from peers that leave by us.
//! - [`tls`]: relays' TLS, who may vouch for a certificate, what a relay has to show.
//! - [`noise_stream`]: coordination's Noise as a byte stream.
//! - [`names`]: look-ups; `race`: a connection to the first address that takes one; [`underlay`]: TCP
//!   outside of the tunnel.
//!
//! The host:
//! - [`hostnet`]: policy rules, routes and addresses; nftables and forwarding.
//! - [`dns_host`]: whom the host's resolver asks.
//! - [`interface`]: the TUN's MTU and state, own addresses; [`link`]: changes of the network, told.
//! - [`ledger`]: what of the host's was changed; [`keeper`]: the process that puts it back when the node
//!   was killed.
//! - [`clock`], `sleep`: the time, and that the machine has slept.
//!
//! Programs of this machine:
//! - [`unix_socket`]: sockets that are ours alone; `accept`: the loop that serves them.
//! - [`local_api`]: `ringtail status` and the like; [`status`]: what drivers add to what the agent
//!   says of node and peers.
//! - [`uapi`]: the configuration socket that `wg` speaks to.
//! - [`coord_admin`]: administrators' orders to a coordination server.
//!
//! Files:
//! - [`files`]: reading and replacing them; [`state`]: keys, caches and the lock of a directory.
//! - [`coord_store`]: the coordination server's database.
//! - `timestamps`: the time that handshakes may carry, over restarts; [`events`]: the event file.
//!
//! The process:
//! - [`runtime`], [`signals`], [`panics`], [`background`], [`descriptors`].
//!
//! Shared: [`places`], a server's connections; `counters`, counters by name; of node and device
//! `shards`, news of the data plane, and [`handshakes`], when peers shook hands by the wall clock.

use std::sync::{Mutex, MutexGuard, PoisonError};

mod accept;
pub mod background;
pub mod clock;
pub mod control_url;
pub mod coord_admin;
pub mod coord_client;
pub mod coord_server;
pub mod coord_store;
mod counters;
pub mod derp_server;
pub mod descriptors;
pub mod device;
pub mod discovery;
pub mod dns;
pub mod dns_host;
pub mod events;
pub mod files;
pub mod handshakes;
pub mod hostnet;
pub mod interface;
pub mod keeper;
pub mod ledger;
pub mod link;
pub mod local_api;
pub mod names;
pub mod node;
pub mod noise_stream;
pub mod panics;
pub mod places;
mod race;
pub mod relay;
pub mod runtime;
mod shards;
pub mod signals;
mod sleep;
pub mod state;
pub mod status;
mod timestamps;
pub mod tls;
pub mod uapi;
pub mod underlay;
pub mod unix_socket;

/// Locks what is plain data, still whole if a holder panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
