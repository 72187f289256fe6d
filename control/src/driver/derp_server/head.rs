//! A connection until it becomes DERP: TLS, and an HTTP request or several.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::sync::Arc;

use bytes::BufMut as _;
use rustix::buffer::spare_capacity;
use rustix::io::{Errno, retry_on_intr};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{HEAD_LIMIT, Shared, WRITE_LIMIT};
use crate::derp::budget::{Account, FLOOR, Part};
use crate::derp::queue::Chunk;
use crate::derp::server::ServerError;
use crate::derp::upgrade::{self, HEAD_LEN_MAX, Port, Request};
use crate::driver::tls::{ServerTls, TlsError};

/// Ciphertext read at a time from a client.
pub(super) const READ_LEN: usize = 256 << 10;

/// The same from a stranger.
const HEAD_READ_LEN: usize = 8 << 10;

/// Requests on one connection before it has to become DERP or go.
const REQUESTS_MAX: u32 = 100;

/// Output buffers that a thread keeps for whoever writes next.
const BUFFERS_MAX: usize = 4;

/// Why a connection ended, for the log.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Protocol(#[from] ServerError),
    #[error("{0} in time")]
    Late(&'static str),
    #[error("its HTTP heads are longer than {HEAD_LEN_MAX} bytes, or none")]
    Head,
    #[error("it holds more memory than there is for everybody")]
    Memory,
    #[error("{0}")]
    Refused(String),
    #[error("closed")]
    Closed,
}

/// Buffers of a thread: what a connection reads is used up at once, and what it writes is mostly gone
/// at once, so that only slow clients hold memory of their own.
#[derive(Default)]
struct Buffers {
    inbox: Vec<u8>,
    outs: Vec<Vec<u8>>,
    run: Chunk,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// The thread's chunk for a run, if it is there.
pub(super) fn take_run() -> Option<Chunk> {
    let run = BUFFERS.with_borrow_mut(|buffers| std::mem::take(&mut buffers.run));
    (run.held_bytes() > 0).then_some(run)
}

/// Gives the chunk of a run back, if it has memory; here it is again if the thread has one.
pub(super) fn put_run(run: Chunk) -> Option<Chunk> {
    if run.held_bytes() == 0 {
        return None;
    }
    BUFFERS.with_borrow_mut(|buffers| {
        if buffers.run.held_bytes() > 0 {
            return Some(run);
        }
        buffers.run = run;
        None
    })
}

/// A connection with TLS around it.
pub(super) struct Conn {
    pub(super) stream: TcpStream,
    pub(super) tls: ServerTls,
    pub(super) account: Arc<Account>,
    charged: Part,
}

impl Conn {
    pub(super) fn new(stream: TcpStream, tls: ServerTls, account: Arc<Account>) -> Self {
        Self {
            stream,
            tls,
            account,
            charged: Part::default(),
        }
    }

    /// Reads once, up to `most` bytes, and hands the plaintext to `sink`; gives back how much came,
    /// `None` is nothing.
    pub(super) fn try_read(
        &mut self,
        most: usize,
        sink: impl FnMut(&[u8]),
    ) -> Result<Option<usize>, Ended> {
        let lent = most >= READ_LEN;
        let mut inbox = if lent {
            BUFFERS.with_borrow_mut(|buffers| std::mem::take(&mut buffers.inbox))
        } else {
            Vec::with_capacity(self.tls.inbox.len() + most)
        };
        inbox.clear();
        inbox.extend_from_slice(&self.tls.inbox);
        std::mem::swap(&mut inbox, &mut self.tls.inbox);
        let result = self.read_into_inbox(most, sink);
        std::mem::swap(&mut inbox, &mut self.tls.inbox);
        // What is left is part of a record, or nothing.
        self.tls.inbox.clear();
        if inbox.is_empty() {
            self.tls.inbox = Vec::new();
        } else {
            self.tls.inbox.extend_from_slice(&inbox);
        }
        if lent {
            BUFFERS.with_borrow_mut(|buffers| buffers.inbox = inbox);
        }
        result
    }

    fn read_into_inbox(
        &mut self,
        most: usize,
        sink: impl FnMut(&[u8]),
    ) -> Result<Option<usize>, Ended> {
        let inbox = &mut self.tls.inbox;
        inbox.reserve(most);
        let stream = &self.stream;
        let mut read = Ok(None);
        // A short read has emptied the socket: forgetting its readiness with it saves the call that
        // would only say so. What comes after the read is ready again.
        let _ = stream.try_io(Interest::READABLE, || {
            let got = retry_on_intr(|| rustix::io::read(stream, spare_capacity(inbox)));
            read = match got {
                Ok(0) => Err(Ended::Closed),
                Ok(len) => Ok(Some(len)),
                Err(Errno::AGAIN) => Ok(None),
                Err(error) => Err(io::Error::from(error).into()),
            };
            match read {
                Ok(Some(len)) if len >= most => Ok(()),
                Ok(_) | Err(_) => Err(io::ErrorKind::WouldBlock.into()),
            }
        });
        let read = read?;
        if read.is_some() {
            self.tls.handle_input(sink)?;
        }
        Ok(read)
    }

    /// Reads a stranger's next bytes behind `plain`.
    pub(super) async fn read_behind(&mut self, plain: &mut Vec<u8>) -> Result<(), Ended> {
        loop {
            self.stream.readable().await?;
            let read = self.try_read(HEAD_READ_LEN, |part| plain.extend_from_slice(part));
            if read?.is_some() {
                return self.charge(plain.capacity(), 0);
            }
        }
    }

    /// Charges the connection's account with its buffers, what came and is not used up, and `more`.
    ///
    /// # Errors
    /// [`Ended::Memory`]: what came is more than there is for it.
    pub(super) fn charge(&mut self, came: usize, more: usize) -> Result<(), Ended> {
        let held = self.tls.held_bytes() + came + more;
        self.account.charge(&mut self.charged, held);
        let came = came + self.tls.inbox.capacity();
        if came > FLOOR && came > self.account.room() {
            return Err(Ended::Memory);
        }
        Ok(())
    }

    /// Takes a buffer to write into, if there is none.
    pub(super) fn borrow_out(&mut self) {
        let buffer = BUFFERS.with_borrow_mut(|buffers| buffers.outs.pop());
        self.tls.give_back(buffer.unwrap_or_default());
    }

    /// Keeps no more memory for output than waits to be written.
    pub(super) fn return_out(&mut self) {
        if !self.tls.out().is_empty() {
            return self.tls.fit_out();
        }
        let (buffer, _) = self.tls.take_out();
        BUFFERS.with_borrow_mut(|buffers| {
            // Most have none to give back: those must not take the places.
            if !buffer.is_empty() && buffers.outs.len() < BUFFERS_MAX {
                buffers.outs.push(buffer);
            }
        });
    }

    /// Writes what is to be written as far as the socket takes it; true if something is left, and
    /// how much was taken.
    pub(super) fn try_flush(&mut self, writes: &mut u64) -> Result<(bool, usize), Ended> {
        let mut total = 0;
        while !self.tls.out().is_empty() {
            match self.stream.try_write(self.tls.out()) {
                Ok(0) => return Err(Ended::Closed),
                Ok(len) => {
                    self.tls.sent(len);
                    total += len;
                    *writes += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok((true, total));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok((false, total))
    }

    /// Writes everything, to a client that takes it.
    pub(super) async fn flush(&mut self) -> Result<(), Ended> {
        let all = async {
            let mut writes = 0;
            while self.try_flush(&mut writes)?.0 {
                self.stream.writable().await?;
            }
            Ok(())
        };
        within(WRITE_LIMIT, "nothing read by the client", all).await
    }
}

/// The same, if it is over before `limit` is.
pub(super) async fn within<T>(
    limit: std::time::Duration,
    what: &'static str,
    work: impl Future<Output = Result<T, Ended>>,
) -> Result<T, Ended> {
    timeout(limit, work).await.unwrap_or(Err(Ended::Late(what)))
}

/// Shakes hands; what the client said behind that goes to `head`.
pub(super) async fn handshake(conn: &mut Conn, head: &mut Vec<u8>) -> Result<(), Ended> {
    while !conn.tls.is_established() {
        conn.read_behind(head).await?;
        conn.flush().await?;
    }
    Ok(())
}

/// Answers requests until one is the upgrade (then `head` holds what came behind it) or the
/// connection is over. All heads together are no longer than one may be.
pub(super) async fn requests(
    shared: &Shared,
    conn: &mut Conn,
    head: &mut Vec<u8>,
    loopback: bool,
) -> Result<Option<bool>, Ended> {
    let show = || shared.vars();
    let vars: Option<&(dyn Fn() -> String + Sync)> = loopback.then_some(&show);
    let mut answered = 0;
    for _ in 0..REQUESTS_MAX {
        let mut looked_at = 0;
        let (len, request) = loop {
            if let Some(found) = parse(head, &mut looked_at, Port::Main, vars)? {
                break found;
            }
            if answered + head.len() >= HEAD_LEN_MAX {
                return Err(Ended::Head);
            }
            if conn.tls.is_closed() {
                return Ok(None);
            }
            match conn.read_behind(head).await {
                Ok(()) => {}
                Err(Ended::Closed) if head.is_empty() => return Ok(None),
                Err(error) => return Err(error),
            }
        };
        answered += len;
        if answered > HEAD_LEN_MAX {
            return Err(Ended::Head);
        }
        head.drain(..len);
        match request {
            Request::Derp { fast_start, .. } => return Ok(Some(fast_start)),
            Request::Other { response, close } => {
                shared.counters.http_requests.add(1);
                conn.tls.seal(&response)?;
                if close {
                    conn.tls.close();
                }
                conn.flush().await?;
                if close {
                    return Ok(None);
                }
            }
        }
    }
    Ok(None)
}

/// Reads a head, if what came since it was `looked_at` may have ended it: a line at least.
fn parse(
    head: &[u8],
    looked_at: &mut usize,
    port: Port,
    vars: Option<&(dyn Fn() -> String + Sync)>,
) -> Result<Option<(usize, Request)>, Ended> {
    let new = std::mem::replace(looked_at, head.len());
    if head.len() < HEAD_LEN_MAX && !head[new..].contains(&b'\n') {
        return Ok(None);
    }
    upgrade::parse_request(head, port, vars.map(|vars| vars as _)).map_err(|_| Ended::Head)
}

/// Serves `/generate_204` without TLS.
pub(super) async fn serve_plain(shared: &Shared, mut stream: TcpStream, account: &Account) {
    let mut charged = Part::default();
    let exchange = async {
        let mut head = Vec::new();
        let mut looked_at = 0;
        let response = loop {
            match parse(&head, &mut looked_at, Port::Plain, None)? {
                Some((_, Request::Other { response, .. })) => break response,
                Some((_, Request::Derp { .. })) => return Err(Ended::Head),
                None => {}
            }
            let mut room = (&mut head).limit(HEAD_READ_LEN);
            if stream.read_buf(&mut room).await? == 0 {
                return Err(Ended::Closed);
            }
            account.charge(&mut charged, head.capacity());
            if head.capacity() > FLOOR && account.excess() > 0 {
                return Err(Ended::Memory);
            }
        };
        stream.write_all(&response).await?;
        Ok(stream.shutdown().await?)
    };
    if within(HEAD_LIMIT, "no HTTP request", exchange)
        .await
        .is_err()
    {
        shared.counters.http_failures.add(1);
    }
}
