//! The control side of ringtail: everything but moving packets.
//!
//! Imports point one way: `cli` -> `driver` -> `agent` -> cores, and a core takes only from those
//! named before it.
//!
//! Cores decide, and touch neither socket nor clock:
//! - `key`: node, machine and DISCO keys and their text forms.
//! - `rate`: token buckets.
//! - `places`: who may be connected to a server, counted by network and by owner.
//! - `stun`: requests and answers of STUN.
//! - `disco`: the messages by which peers find paths, and which of them a socket lets in.
//! - `noise`: the encrypted channel to a coordination server.
//! - `derp`: the relay protocol, both ends of a connection, and what waits to be sent.
//! - `path`: per peer, which way packets take: candidates, Pings, scores.
//! - `netmap`: peers, DERP map and rules as coordination tells them, and merging what changes.
//! - `netcheck`: what the NAT is like, own endpoints, the home region.
//! - `policy`: a file that says who may reach what, and what it means for each node.
//! - `coord`: registration and the map stream, both ends.
//! - `dns`: names: what is answered for, what is passed on, what the host's resolver is to ask.
//! - `uapi`: the configuration protocol of userspace WireGuard.
//! - `device`: the device it configures.
//! - `hostnet`: the routes, rules, firewall and forwarding that the host should have.
//! - `config`: what a person gives a node: options and the file of a static network.
//!
//! The rim:
//! - `agent`: wires the cores of a node together and decides what the data plane is told.
//! - `driver`: sockets, TLS, netlink, files, clocks; one file or folder for each outside thing.
//! - `cli`: arguments and printing.
//! - `fuzzing`: what the fuzz targets run, with the feature `internals`.
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
pub mod dns;
pub mod driver;
#[cfg(any(test, feature = "internals"))]
pub mod fuzzing;
pub mod hostnet;
pub mod key;
pub mod netcheck;
pub mod netmap;
pub mod noise;
pub mod path;
pub mod places;
pub mod policy;
pub mod rate;
pub mod stun;
#[cfg(test)]
mod testing;
pub mod uapi;
