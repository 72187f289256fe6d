//! The transport under TLS: whole buffers are given away and come back, by tokio or tokio-uring.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use tokio_uring::buf::BoundedBuf as _;

use crate::driver::runtime::Kind;
use crate::driver::underlay::Underlay;

/// A connected TCP stream on the control thread.
#[derive(Clone)]
pub enum Stream {
    /// By readiness.
    Tokio(Rc<tokio::net::TcpStream>),
    /// By completion.
    Uring(Rc<tokio_uring::net::TcpStream>),
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tokio(_) => "Stream(tokio)",
            Self::Uring(_) => "Stream(tokio-uring)",
        })
    }
}

impl Stream {
    /// Connects outside of the tunnel.
    ///
    /// # Errors
    /// What the socket calls give; setting a mark needs CAP_NET_ADMIN.
    pub async fn connect(addr: SocketAddr, underlay: &Underlay, kind: Kind) -> io::Result<Self> {
        let stream = underlay.connect(addr).await?;
        Ok(match kind {
            Kind::Tokio => Self::Tokio(Rc::new(stream)),
            Kind::Uring => {
                let stream = stream.into_std()?;
                // io_uring answers EAGAIN instead of waiting on a non-blocking socket.
                stream.set_nonblocking(false)?;
                Self::Uring(Rc::new(tokio_uring::net::TcpStream::from_std(stream)))
            }
        })
    }

    /// Appends what has come to `buffer`, up to its capacity; 0 is the end of the stream.
    pub async fn read(&self, mut buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
        match self {
            Self::Tokio(stream) => loop {
                let result = match stream.readable().await {
                    Ok(()) => stream.try_read_buf(&mut buffer),
                    Err(error) => Err(error),
                };
                match result {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    result => return (result, buffer),
                }
            },
            Self::Uring(stream) => {
                let (from, to) = (buffer.len(), buffer.capacity());
                let (result, slice) = stream.read(buffer.slice(from..to)).await;
                (result, slice.into_inner())
            }
        }
    }

    /// Writes the first `len` bytes of `buffer`.
    pub async fn write_all(&self, buffer: Vec<u8>, len: usize) -> (io::Result<()>, Vec<u8>) {
        match self {
            Self::Tokio(stream) => {
                let mut rest = &buffer[..len];
                while !rest.is_empty() {
                    let written = match stream.writable().await {
                        Ok(()) => stream.try_write(rest),
                        Err(error) => Err(error),
                    };
                    match written {
                        Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), buffer),
                        Ok(n) => rest = &rest[n..],
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return (Err(error), buffer),
                    }
                }
                (Ok(()), buffer)
            }
            Self::Uring(stream) => {
                let (result, slice) = stream.write_all(buffer.slice(..len)).await;
                (result, slice.into_inner())
            }
        }
    }

    /// Ends the connection now, so that whoever waits on it wakes.
    pub fn shutdown(&self) {
        match self {
            Self::Tokio(stream) => {
                // The descriptor closes with the last clone; the peer should hear of it now.
                let _ = socket2::SockRef::from(&**stream).shutdown(std::net::Shutdown::Both);
            }
            Self::Uring(stream) => {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
    }
}
