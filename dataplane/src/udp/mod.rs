//! The underlay: one reuse-port group of sockets per family, and sending in GSO batches.
//!
//! Rooms: `group` is the sockets, `steer` the program that says which of them gets a datagram, `sender`
//! sends runs.

#![forbid(unsafe_code)]

mod group;
mod sender;
mod steer;

pub use group::set_dont_fragment;
#[cfg(test)]
pub(crate) use group::{DOOR_SOCKET_BUFFER, SMALL_SOCKET_BUFFER, data_buffer};
pub(crate) use group::{Doors, Group, Sockets, Wanted};
pub(crate) use sender::{SEND_BYTES_MAX, Sender};
pub(crate) use steer::Door;
