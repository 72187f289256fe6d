//! News from the shards, for the two loops that wait for it: a node's and a device's.

use std::os::fd::OwnedFd;

use ringtail_dataplane::Dataplane;
use tokio::io::unix::AsyncFd;

use super::runtime;

/// What a visit to the shards' queues found.
pub(super) enum FromShards {
    /// All there was.
    All,
    /// Enough for now; more waits.
    More,
    /// The end: the TUN is gone.
    TunGone,
    /// The end: a thread of the data plane failed.
    Failed(String),
}

/// Readable when a visit finds something. The data plane makes it unreadable again.
pub(super) fn news(dataplane: &Dataplane) -> std::io::Result<AsyncFd<OwnedFd>> {
    runtime::watch_descriptor(dataplane.event_fd().try_clone_to_owned()?)
}
