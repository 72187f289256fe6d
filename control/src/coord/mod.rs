//! Coordination: how a node joins a network and keeps its map current, and the server's side.
//!
//! Protocol ts2021 (`protocol/coordination.md`). The machines here decide and never touch a socket
//! or a clock; `driver::coord_client` and `driver::coord_server` move the bytes.
//!
//! Rooms: `client` is a node's side, where `afresh` says when it asks for the whole map, `server` the other; there
//! `address` says which addresses and name a node gets, `auth_key` what lets a machine in, `admin` what an administrator
//! orders, `routes` who carries which prefix. `frames` cuts a map stream into messages, `renewal` says when a key is
//! renewed, `backoff` spaces attempts, `operations` is what the fuzzer and the tests do with a server.

pub mod address;
pub mod admin;
pub mod afresh;
pub mod auth_key;
mod backoff;
pub mod client;
pub mod frames;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod operations;
pub mod renewal;
pub mod routes;
pub mod server;

pub use backoff::Backoff;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;
use zeroize::Zeroizing;

use crate::key::{DiscoPublic, MachinePrivate, MachinePublic, NodePublic};
use crate::netmap::Netmap;
use crate::netmap::wire::EndpointKind;

/// What ringtail's server says, beside HTTP 404, to an ephemeral node that it has forgotten because it
/// stayed away. Every other node that is not found was removed by somebody.
pub const STAYED_AWAY: &str = "node not found: it was ephemeral and stayed away";

/// What a coordination client needs to know once.
#[derive(Clone, Debug)]
pub struct CoordConfig {
    /// `https://host[:port]`, or `http://…` on loopback and private addresses only.
    pub url: String,
    /// Pre-auth key for the first registration, if any. Never logged.
    pub auth_key: Option<Zeroizing<String>>,
    /// Short host name; the server makes the node's name from it.
    pub hostname: String,
    /// Tags to ask for at a registration.
    pub tags: Vec<String>,
    /// This host's identity towards the server.
    pub machine: MachinePrivate,
    /// Our WireGuard public key.
    pub node: NodePublic,
    /// The WireGuard public key that it takes the place of, while that is renewed.
    pub old_node: Option<NodePublic>,
    /// The address that a person was to visit when an earlier connection, or run, ended: the registration
    /// goes on there.
    pub followup: Option<String>,
    /// Our disco public key.
    pub disco: DiscoPublic,
    /// The server's key, when it is known already: another one is refused. With it, a TLS
    /// certificate need not be trusted, because Noise authenticates the server.
    pub control_key: Option<MachinePublic>,
}

/// What a node reports about itself; the agent replaces it whole whenever something changes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SelfState {
    /// Our UDP endpoints, best first, and how each became known.
    pub endpoints: Vec<(SocketAddr, EndpointKind)>,
    /// Home relay region; none before the first netcheck.
    pub home_derp: Option<u32>,
    /// Measured latency of relay regions: region, whether over IPv6, round trip. Changes of
    /// latency alone are not reported to the server.
    pub derp_latency: Vec<(u32, bool, Duration)>,
    /// Whether the NAT maps differently per destination, once known.
    pub mapping_varies: Option<bool>,
    /// Whether UDP gets through at all, once known.
    pub working_udp: Option<bool>,
    /// Whether IPv6 reaches the internet, once known.
    pub working_ipv6: Option<bool>,
    /// Prefixes we offer to route, masked.
    pub routes: Vec<IpNet>,
    /// None of the prefixes that we are to route can be reached: then the server's probes, by which it finds out
    /// which router of a prefix to choose, are not answered.
    pub routes_lost: bool,
    /// Name for people, where it is another than [`CoordConfig::hostname`] by now.
    pub hostname: Option<String>,
    /// Refuse all inbound connections.
    pub shields_up: bool,
    /// TCP ports of our peer API, IPv4 and IPv6.
    pub peerapi: [Option<u16>; 2],
    /// Grows when the server is to be told all this again, because what it has is not what we gave it.
    pub corrections: u32,
    /// Further `Hostinfo` fields as a JSON object; they win over ours of the same name.
    pub hostinfo: Option<Value>,
}

/// What the coordination client tells the agent.
#[derive(Clone, Debug)]
pub enum CoordEvent {
    /// The server's key, as fetched: to be stored and given back as
    /// [`CoordConfig::control_key`] from then on. Sent when none was configured.
    ControlKey(MachinePublic),
    /// The server knows us; `user` is the owner's name.
    Registered {
        /// Name of the owner, for people.
        user: String,
    },
    /// A whole new state of the network.
    Netmap(Arc<Netmap>),
    /// A human must visit this address to let the node in.
    AuthUrl(String),
    /// Our key has expired, and the server wants to see another one. Nothing more will be tried with it.
    KeyExpired,
    /// The server cannot be reached or said no for now; the last netmap stays in force.
    Lost {
        /// Cause, for people.
        error: String,
        /// When the next attempt starts.
        retry_in: Duration,
    },
    /// Nothing more will be tried; the text says what to do.
    Fatal(String),
}

/// The network does not let this node in, or no more; the text says what a person is to do. No use
/// trying again before that.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotAdmitted(pub String);
