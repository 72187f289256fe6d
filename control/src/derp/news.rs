//! What becomes of a node's connection to a region's relay.

use std::net::SocketAddr;
use std::time::Duration;

use super::client::Said;

/// News of one region's connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A relay is being dialled.
    Connecting {
        /// Where.
        addr: SocketAddr,
    },
    /// A relay is connected, and packets may go.
    Connected {
        /// Where.
        addr: SocketAddr,
        /// From the begin of dialling until packets may go.
        took: Duration,
        /// Whether it is the home.
        home: bool,
    },
    /// A connection or a dial failed. It is tried again by itself where there is a reason to.
    Lost {
        /// Whether it is the home.
        home: bool,
        /// Why, for people.
        error: String,
    },
    /// A connection is no longer needed: idle for 60 s, or its region left the map.
    Closed,
    /// Two redials of the home in a row failed: it should move now, whatever was heard of it.
    HomeUnreachable,
    /// What the relay says itself; its times are bounded.
    Said(Said),
}
