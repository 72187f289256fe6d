//! Event descriptors: how one thread wakes another out of its driver.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};

use super::called;

/// A non-blocking eventfd used as a flag: readable once signalled, until cleared.
#[derive(Debug)]
pub(crate) struct EventFd(File);

impl EventFd {
    /// Makes one, not signalled.
    pub(crate) fn new() -> io::Result<EventFd> {
        // SAFETY: no pointers are passed.
        let fd = called(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        // SAFETY: the call returned a new descriptor that nobody else owns.
        Ok(EventFd(unsafe { File::from_raw_fd(fd) }))
    }

    /// Makes it readable. Nothing can go wrong that the other side would not notice itself: the
    /// only error is a counter at its limit, which is readable too.
    pub(crate) fn signal(&self) {
        let _at_its_limit = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// Makes it not readable.
    pub(crate) fn clear(&self) {
        let _not_readable = (&self.0).read(&mut [0; 8]);
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn readable(event: &EventFd) -> bool {
        let mut poll = libc::pollfd {
            fd: event.as_fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: `poll` is one valid entry for the length of the call.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    }

    #[test]
    fn an_event_is_readable_from_signal_to_clear() {
        let event = EventFd::new().unwrap();
        assert!(!readable(&event));
        event.signal();
        event.signal();
        assert!(readable(&event));
        event.clear();
        assert!(!readable(&event));
    }
}
