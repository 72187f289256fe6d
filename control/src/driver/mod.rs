//! Everything that touches the outside: sockets, TLS, netlink, files, clocks. One file per
//! outside thing; drivers decide nothing.

mod accept;
pub mod background;
pub mod clock;
pub mod control_url;
pub mod coord_admin;
pub mod coord_client;
pub mod coord_server;
pub mod coord_store;
pub mod derp_server;
pub mod descriptors;
pub mod device;
pub mod discovery;
pub mod events;
pub mod files;
pub mod handshakes;
pub mod hostnet;
pub mod interface;
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
pub mod signals;
mod sleep;
pub mod state;
pub mod status;
mod timestamps;
pub mod tls;
pub mod uapi;
pub mod underlay;
pub mod unix_socket;
