//! Where the program listens in tests.

use std::net::SocketAddr;

/// An address of loopback that is this process's alone (ids of processes have 22 bits): nobody else takes a
/// port there.
pub(crate) fn of_this_process(port: u16) -> SocketAddr {
    let [_, a, b, c] = std::process::id().to_be_bytes();
    SocketAddr::from(([127, 64 + a, b, c], port))
}
