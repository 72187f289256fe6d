//! The reading half of a connection from which a stranger may send only so much.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::tcp::OwnedReadHalf;

use crate::driver::places::Place;
use crate::key::MachinePublic;

/// Counts what is read while its place is a stranger's. Over the limit reading fails: whatever a
/// protocol above lets a peer send for nothing (pings, resets, settings, headers without end), a
/// stranger cannot send much of it.
#[derive(Debug)]
pub(super) struct Metered {
    io: OwnedReadHalf,
    place: Arc<Place<MachinePublic>>,
    left: usize,
}

impl Metered {
    pub(super) fn new(
        io: OwnedReadHalf,
        place: Arc<Place<MachinePublic>>,
        bytes_max: usize,
    ) -> Self {
        Self {
            io,
            place,
            left: bytes_max,
        }
    }
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        let len = buf.filled().len() - before;
        if self.place.is_known() {
            return read;
        }
        match self.left.checked_sub(len) {
            Some(left) => {
                self.left = left;
                read
            }
            None => {
                self.place.count_talkative();
                self.left = 0;
                Poll::Ready(Err(io::Error::other("a stranger sends too much")))
            }
        }
    }
}
