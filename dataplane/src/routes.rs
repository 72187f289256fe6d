//! Device mode's watch over routes: answers stick to the local address that a peer's datagrams are
//! sent to, but not when routing has moved the peer to another interface.
//!
//! A thread of its own, asleep until the kernel tells of a changed route or rule. Then it asks, for
//! every peer with a local address, by which interface a datagram from there would leave now. If
//! that is not the one the peer's datagrams arrive by, the address is given up, and routing chooses
//! one until the peer is heard at another address, or at this one a second later. A host whose routes
//! change all the time costs a tenth of a core at most.

#![forbid(unsafe_code)]

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::hub::Hub;
use crate::peer::PeerShared;
use crate::sys::netlink::{RouteNotices, RouteQuery};
use crate::sys::now;
use crate::sys::socket::wait_readable;

/// After a round of questions it rests so many times as long as that took.
const REST_FACTOR: u32 = 10;
/// And at least so long: routes change in bursts.
const REST_MIN: Duration = Duration::from_millis(20);

/// How long to rest after a look at what others changed that took `took`, so that a host whose
/// routes change all the time costs a tenth of a core at most.
pub fn rest_after(took: Duration) -> Duration {
    (took * REST_FACTOR).max(REST_MIN)
}

/// What the thread works with, opened where the data plane is started.
#[derive(Debug)]
pub(crate) struct Routes {
    notices: RouteNotices,
    query: RouteQuery,
}

impl Routes {
    pub(crate) fn open() -> io::Result<Routes> {
        Ok(Routes {
            notices: RouteNotices::new()?,
            query: RouteQuery::new()?,
        })
    }

    /// The body of the thread; ends when the hub stops.
    ///
    /// # Errors
    /// It cannot wait.
    pub(crate) fn run(mut self, hub: &Hub) -> io::Result<()> {
        let fds = [hub.routes_wake.as_fd(), self.notices.as_fd()].map(|fd| fd.as_raw_fd());
        while !hub.stopping() {
            wait_readable(&fds, -1)?;
            let start = now();
            if self.notices.take() {
                self.check(hub);
                let rest = rest_after(now() - start).as_millis();
                let rest = i32::try_from(rest).unwrap_or(i32::MAX);
                wait_readable(&fds[..1], rest)?;
            }
        }
        Ok(())
    }

    fn check(&mut self, hub: &Hub) {
        let (table, mark) = (hub.table(), hub.mark.load(Ordering::Relaxed));
        for peer in table.peers() {
            if self.left(&peer.shared, mark) {
                peer.shared.unstick();
            }
        }
    }

    /// True if datagrams to the peer leave by another interface than its own arrive by.
    fn left(&mut self, peer: &PeerShared, mark: u32) -> bool {
        let at = peer.whereabouts();
        let (Some(to), Some(local)) = (at.endpoint, at.local) else {
            return false;
        };
        // Its interface is part of such an address.
        if matches!(to.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local()) {
            return false;
        }
        match self.query.interface(local.addr, to.ip(), mark) {
            Ok(interface) => interface != local.interface,
            // Nothing leaves by any way, and the next route is told of.
            Err(error) => !matches!(
                error.raw_os_error(),
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH)
            ),
        }
    }
}
