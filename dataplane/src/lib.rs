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

pub mod channel;
pub mod classify;
pub mod coalesce;
pub mod filter;
pub mod packet;
pub mod route;
pub mod stats;
pub mod tun;
