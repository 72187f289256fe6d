//! A connection from which a stranger may send only so much.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::driver::places::Place;
use crate::key::MachinePublic;

/// Counts what is read while its place is a stranger's. Over the limit reading fails: whatever a
/// protocol above lets a peer send for nothing (pings, resets, settings, headers without end), a
/// stranger cannot send much of it.
#[derive(Debug)]
pub(super) struct Metered {
    io: TcpStream,
    place: Arc<Place<MachinePublic>>,
    left: usize,
}

impl Metered {
    pub(super) fn new(io: TcpStream, place: Arc<Place<MachinePublic>>, bytes_max: usize) -> Self {
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

impl AsyncWrite for Metered {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;
    use crate::driver::coord_server::LIMITS;
    use crate::driver::places::Door;

    #[tokio::test]
    async fn who_is_dropped_unheard_is_reset_without_an_end_first() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = TcpStream::connect(address).await.unwrap();
        let (stream, source) = listener.accept().await.unwrap();
        client.write_all(b"unread").await.unwrap();
        stream.readable().await.unwrap();
        let place = Door::new(LIMITS).enter(source.ip(), || ()).unwrap();
        let stream = Metered::new(stream, Arc::new(place), 1);
        assert!(stream.is_write_vectored());
        drop(stream);
        let error = client.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
