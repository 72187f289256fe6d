//! A [`Session`] over a byte stream: reads and writes plaintext, moves records.
//!
//! Writes are gathered into records in one buffer and leave together; nothing more is taken while
//! [`WRITE_BUFFER_MAX`] bytes wait. On the client's side the early payload is taken out of what
//! is read. Any error of the channel is final.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::noise::{EarlyPayload, Error, RECORD_LEN_MAX, Session};

/// The value of `Upgrade` with which a client asks for Noise, exactly, and of the header with its
/// handshake.
pub(super) const UPGRADE: &str = "tailscale-control-protocol";
pub(super) const HANDSHAKE: &str = "X-Tailscale-Handshake";

/// Sealed bytes that may wait for the socket.
const WRITE_BUFFER_MAX: usize = 64 * 1024;

/// Bytes read from the socket at a time.
const READ_LEN: usize = 4 * RECORD_LEN_MAX;

/// Plaintext in, plaintext out.
#[derive(Debug)]
pub struct NoiseStream<T> {
    io: T,
    session: Session,
    /// Sealed, not complete yet.
    sealed_in: BytesMut,
    /// Opened, not read yet.
    plain_in: BytesMut,
    /// Sealed, not written yet.
    sealed_out: BytesMut,
    early: Option<EarlyPayload>,
    failed: Option<Error>,
}

impl<T> NoiseStream<T> {
    /// The client's end: the early payload is skipped when there is one. `read_ahead` is what came
    /// glued to the handshake.
    pub fn client(io: T, session: Session, read_ahead: BytesMut) -> Self {
        Self::new(io, session, read_ahead, Some(EarlyPayload::default()))
    }

    /// The server's end.
    pub fn server(io: T, session: Session) -> Self {
        Self::new(io, session, BytesMut::new(), None)
    }

    fn new(io: T, session: Session, sealed_in: BytesMut, early: Option<EarlyPayload>) -> Self {
        Self {
            io,
            session,
            sealed_in,
            plain_in: BytesMut::new(),
            sealed_out: BytesMut::new(),
            early,
            failed: None,
        }
    }

    /// Opens what has arrived; whether there is plaintext to hand out.
    fn open(&mut self) -> Result<bool, Error> {
        self.session
            .opener
            .open(&mut self.sealed_in, &mut self.plain_in)?;
        if let Some(early) = &mut self.early {
            if !early.strip(&mut self.plain_in)? {
                return Ok(false);
            }
            // Nothing read yet means nothing decided yet.
            if !self.plain_in.is_empty() {
                self.early = None;
            }
        }
        Ok(!self.plain_in.is_empty())
    }
}

fn broken(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl<T: AsyncRead + Unpin> NoiseStream<T> {
    /// Waits for the first plaintext, which stays to be read; false if the end comes first. Only then
    /// is it sure that the other side has the key it spoke of: the first message of a handshake can
    /// be repeated by anybody who saw it.
    ///
    /// # Errors
    /// As reading.
    pub async fn proven(&mut self) -> io::Result<bool> {
        std::future::poll_fn(|cx| self.poll_plain(cx)).await?;
        Ok(!self.plain_in.is_empty())
    }

    /// Reads until there is plaintext, or the end.
    fn poll_plain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if let Some(error) = &self.failed {
                return Poll::Ready(Err(broken(error.clone())));
            }
            let ready = (self.early.is_none() && !self.plain_in.is_empty())
                || match self.open() {
                    Ok(ready) => ready,
                    Err(error) => {
                        self.failed = Some(error);
                        continue;
                    }
                };
            if ready {
                return Poll::Ready(Ok(()));
            }
            let mut chunk = [0; READ_LEN];
            let mut read = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                // An end inside a record was cut off by somebody; a clean one is the end.
                return Poll::Ready(if self.sealed_in.is_empty() {
                    Ok(())
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                });
            }
            self.sealed_in.extend_from_slice(read.filled());
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for NoiseStream<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        ready!(this.poll_plain(cx))?;
        let len = this.plain_in.len().min(buf.remaining());
        buf.put_slice(&this.plain_in[..len]);
        this.plain_in.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> NoiseStream<T> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.sealed_out.is_empty() {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.sealed_out))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sealed_out.advance(written);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for NoiseStream<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.sealed_out.len() >= WRITE_BUFFER_MAX {
            ready!(this.poll_drain(cx))?;
        }
        let len = buf.len().min(WRITE_BUFFER_MAX);
        let sealed = this.session.sealer.seal(&buf[..len], &mut this.sealed_out);
        sealed.map_err(broken)?;
        Poll::Ready(Ok(len))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::MachinePrivate;
    use crate::noise::{Initiator, encode_early, respond};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    fn sessions() -> (Session, Session) {
        let [client, control, e_c, e_s] = [1, 2, 3, 4].map(|b| MachinePrivate::clamped([b; 32]));
        let (initiator, message) = Initiator::new(130, &client, &control.public(), e_c).unwrap();
        let (accepted, answer) = respond(&control, &message, &e_s).unwrap();
        (initiator.finish(&answer).unwrap(), accepted.session)
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_the_early_payload_is_not_seen() {
        let (ours, theirs) = sessions();
        let (a, b) = tokio::io::duplex(1000);
        let mut client = NoiseStream::client(a, ours, BytesMut::new());
        let mut server = NoiseStream::server(b, theirs);
        let text: Vec<u8> = (0..100_000_u32).map(|i| i.to_le_bytes()[0]).collect();
        let sent = text.clone();
        let task = tokio::spawn(async move {
            server
                .write_all(&encode_early(b"{\"nodeKeyChallenge\":\"\"}"))
                .await
                .unwrap();
            server.write_all(&sent).await.unwrap();
            server.flush().await.unwrap();
            let mut back = vec![0; sent.len()];
            server.read_exact(&mut back).await.unwrap();
            assert_eq!(back, sent);
        });
        let mut got = vec![0; text.len()];
        client.read_exact(&mut got).await.unwrap();
        assert_eq!(got, text);
        client.write_all(&got).await.unwrap();
        client.flush().await.unwrap();
        task.await.unwrap();
        assert_eq!(
            client.read(&mut got).await.unwrap(),
            0,
            "a clean end is an end"
        );
    }

    #[tokio::test]
    async fn what_came_glued_to_the_handshake_is_read_first() {
        let (ours, mut theirs) = sessions();
        let mut ahead = BytesMut::new();
        theirs.sealer.seal(b"first", &mut ahead).unwrap();
        let (a, _b) = tokio::io::duplex(1000);
        let mut client = NoiseStream::client(a, ours, ahead);
        let mut got = [0; 5];
        client.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"first");
    }

    #[tokio::test]
    async fn garbage_and_a_cut_record_are_errors_that_stay() {
        for garbage in [
            &b"GET / HTTP/1.1\r\n"[..],
            &[4, 0xff, 0xff],
            &[4, 0, 20, 1, 2],
        ] {
            let (ours, _) = sessions();
            let (a, mut b) = tokio::io::duplex(1000);
            b.write_all(garbage).await.unwrap();
            drop(b);
            let mut client = NoiseStream::client(a, ours, BytesMut::new());
            assert!(client.read(&mut [0; 10]).await.is_err());
            assert!(client.read(&mut [0; 10]).await.is_err());
        }
    }
}
