//! A connection from which a stranger may send only so much.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::places::Place;

/// Counts what is read while its place is a stranger's. Over the limit reading fails: whatever a
/// protocol above lets a peer send for nothing (pings, resets, settings, headers without end), a
/// stranger cannot send much of it.
#[derive(Debug)]
pub(super) struct Metered<T, K: Copy + Ord> {
    io: T,
    place: Arc<Place<K>>,
    left: usize,
}

impl<T, K: Copy + Ord> Metered<T, K> {
    pub(super) fn new(io: T, place: Arc<Place<K>>, bytes_max: usize) -> Self {
        Self {
            io,
            place,
            left: bytes_max,
        }
    }
}

impl<T: AsyncRead + Unpin, K: Copy + Ord> AsyncRead for Metered<T, K> {
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

impl<T: AsyncWrite + Unpin, K: Copy + Ord> AsyncWrite for Metered<T, K> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
