//! Passing a question on: the message of whoever asks, as it is but for its number.
//!
//! Over UDP first, each time from a port of its own, so that a liar has to guess port and number. TCP
//! where UDP gets no answer, or a shortened one and whoever asks came by TCP. The next resolver is asked when
//! one has failed, or beside one that takes its time.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::silent::Silent;
use crate::dns::{MESSAGE_LEN_MAX, Upstream, message};
use crate::driver::clock::now;

/// Type of the body of DNS over HTTP (RFC 8484 §6).
pub(super) const DNS_MESSAGE: &str = "application/dns-message";

/// Nobody waits longer for an answer.
const LIMIT: Duration = Duration::from_secs(5);
/// A resolver that takes longer gets company.
const STAGGER: Duration = Duration::from_millis(300);
/// Resolvers asked at a time.
const AT_A_TIME: usize = 2;
/// A question is sent again by UDP after this, and given up there after twice as long.
const UDP_RETRY: Duration = Duration::from_secs(1);
/// Longest answer by UDP in bytes; whoever asks for longer ones gets them by TCP.
pub(crate) const UDP_ANSWER_LEN_MAX: usize = 4096;
/// Wrong answers to one question before we stop listening.
const LIES_MAX: usize = 64;

/// By which way a question came: how long the answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Over {
    /// UDP.
    Udp,
    /// TCP or HTTP.
    Stream,
}

/// Asks until somebody has an answer; one that says it failed counts if there is no better. The
/// number of the answer is that of the question. `silent` hears who answered and who did not.
pub(super) async fn forward(
    upstreams: Arc<[Upstream]>,
    question: Arc<[u8]>,
    over: Over,
    silent: &Silent,
) -> io::Result<Vec<u8>> {
    let id = message::id(&question);
    // Whom we have asked, as far as that goes in their order, and whether he has answered.
    let mut heard = Vec::new();
    let asked = timeout(LIMIT, ask_all(&upstreams, question, over, &mut heard)).await;
    // Of two that are asked at the same time the one that was asked later, and is still out, may be about to answer.
    let last = heard.iter().rposition(|answered| *answered);
    let heard = &heard[..last.map_or(heard.len(), |last| last + 1)];
    for (upstream, answered) in upstreams.iter().zip(heard) {
        silent.note(now(), upstream, *answered);
    }
    let answer = asked.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    Ok(message::with_id(&answer, id))
}

async fn ask_all(
    upstreams: &[Upstream],
    question: Arc<[u8]>,
    over: Over,
    heard: &mut Vec<bool>,
) -> io::Result<Vec<u8>> {
    let mut waiting = upstreams.iter().enumerate();
    let mut asked = JoinSet::new();
    let mut ask_next = |asked: &mut JoinSet<(usize, io::Result<Vec<u8>>)>,
                        heard: &mut Vec<bool>| {
        if let Some((at, upstream)) = waiting.next() {
            let (upstream, question) = (upstream.clone(), Arc::clone(&question));
            heard.push(false);
            asked.spawn(async move { (at, ask(upstream, question, over).await) });
        }
    };
    ask_next(&mut asked, heard);
    let mut failed = Err(io::Error::from(io::ErrorKind::HostUnreachable));
    loop {
        tokio::select! {
            done = asked.join_next() => {
                if let Some(Ok((at, result))) = &done {
                    heard[*at] = result.is_ok();
                }
                match done.map(|done| done.map(|(_, result)| result)) {
                    None => return failed,
                    Some(Ok(Ok(answer))) if is_good(&answer) => return Ok(answer),
                    Some(Ok(Ok(answer))) => failed = Ok(answer),
                    Some(Ok(Err(error))) => failed = failed.or(Err(error)),
                    Some(Err(error)) => failed = failed.map_err(|_| io::Error::other(error)),
                }
                ask_next(&mut asked, heard);
            }
            () = sleep(STAGGER), if asked.len() < AT_A_TIME => ask_next(&mut asked, heard),
        }
    }
}

/// Whether somebody answered, be it that there is no such name; SERVFAIL and REFUSED say that he cannot.
fn is_good(answer: &[u8]) -> bool {
    message::code(answer).is_some_and(|code| code != 2 && code != 5)
}

async fn ask(upstream: Upstream, question: Arc<[u8]>, over: Over) -> io::Result<Vec<u8>> {
    let question = message::with_id(&question, rand::random());
    match upstream {
        Upstream::Plain(addr) => match by_udp(addr, &question).await {
            Ok(answer) if message::is_truncated(&answer) && over == Over::Stream => {
                by_tcp(addr, &question).await.or(Ok(answer))
            }
            Ok(answer) => Ok(answer),
            Err(_) => by_tcp(addr, &question).await,
        },
        Upstream::Http(addr, path) => by_http(addr, &path, question).await,
    }
}

async fn by_udp(to: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    // The kernel lets nobody else's datagrams in from now on.
    socket.connect(to).await?;
    let mut buffer = vec![0; UDP_ANSWER_LEN_MAX + 1];
    for _ in 0..2 {
        socket.send(question).await?;
        let heard = timeout(UDP_RETRY, async {
            for _ in 0..LIES_MAX {
                let len = socket.recv(&mut buffer).await?;
                if message::answers(question, &buffer[..len]) {
                    return Ok(Some(len));
                }
            }
            io::Result::Ok(None)
        });
        match heard.await {
            Ok(Ok(Some(len))) if len <= UDP_ANSWER_LEN_MAX => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            Ok(Ok(_)) => return Err(io::ErrorKind::InvalidData.into()),
            Ok(Err(error)) => return Err(error),
            Err(_) => {}
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

async fn by_tcp(to: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(to).await?;
    write_framed(&mut stream, question).await?;
    let answer = read_framed(&mut stream).await?;
    if message::answers(question, &answer) {
        Ok(answer)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

async fn by_http(to: SocketAddr, path: &str, question: Vec<u8>) -> io::Result<Vec<u8>> {
    let stream = TokioIo::new(TcpStream::connect(to).await?);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream)
        .await
        .map_err(io::Error::other)?;
    let mut work = JoinSet::new();
    work.spawn(connection);
    let request = http::Request::post(path)
        .header(http::header::HOST, to.to_string())
        .header(http::header::CONTENT_TYPE, DNS_MESSAGE)
        .header(http::header::ACCEPT, DNS_MESSAGE)
        .body(Full::new(Bytes::from(question.clone())))
        .map_err(io::Error::other)?;
    let response = sender
        .send_request(request)
        .await
        .map_err(io::Error::other)?;
    if response.status() != http::StatusCode::OK {
        return Err(io::Error::other(format!(
            "the exit node says {}",
            response.status()
        )));
    }
    let body = Limited::new(response.into_body(), MESSAGE_LEN_MAX);
    let answer = body.collect().await.map_err(io::Error::other)?.to_bytes();
    if message::answers(&question, &answer) {
        Ok(answer.into())
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// Reads a message with its length in front, two octets (RFC 1035 §4.2.2).
pub(super) async fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes one; longer ones than there can be are refused.
pub(super) async fn write_framed(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let framed = [&len.to_be_bytes(), message].concat();
    stream.write_all(&framed).await
}
