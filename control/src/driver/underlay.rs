//! TCP connections to relays and to the coordination server: outside the tunnel, whatever routes go
//! into it.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::hostnet::Outside;

/// Unacknowledged data for this long means that the connection is dead.
pub const USER_TIMEOUT: Duration = Duration::from_secs(15);

/// How connections stay outside of the tunnel.
#[derive(Clone, Debug, Default)]
pub struct Underlay {
    /// Mark of the sockets; 0 is none.
    pub fwmark: u32,
    /// For what a mark is not enough (`crate::hostnet`).
    pub outside: Option<Outside>,
}

impl Underlay {
    /// Connects, with the mark of underlay sockets if it is not 0, without Nagle's delay.
    ///
    /// # Errors
    /// What the socket calls give; setting a mark needs CAP_NET_ADMIN.
    pub async fn connect(&self, addr: SocketAddr) -> io::Result<TcpStream> {
        let socket = Socket::new(
            Domain::for_address(addr),
            Type::STREAM.nonblocking(),
            Some(Protocol::TCP),
        )?;
        if self.fwmark != 0 {
            socket.set_mark(self.fwmark)?;
        }
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
        if let Some(outside) = &self.outside {
            outside.keep_out(addr.ip()).await;
        }
        TcpSocket::from_std_stream(socket.into())
            .connect(addr)
            .await
    }
}

#[cfg(test)]
mod tests {
    use socket2::SockRef;

    use super::*;

    #[tokio::test]
    async fn a_connection_has_the_mark_and_the_timeout() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let stream = Underlay::default().connect(addr).await.unwrap();
        let socket = SockRef::from(&stream);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(USER_TIMEOUT));
        assert!(socket.tcp_nodelay().unwrap());
        let marked = Underlay {
            fwmark: 0x1234,
            outside: None,
        };
        match marked.connect(addr).await {
            Ok(stream) => assert_eq!(SockRef::from(&stream).mark().unwrap(), 0x1234),
            // Without CAP_NET_ADMIN.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
        }
    }
}
