//! The peer API: HTTP that peers, and nobody else, reach at our inner addresses. They ask whether we are
//! there (`tailscale ping --peerapi`), and those who leave by us have us look names up, as every
//! tailscaled expects of its exit node (`ipn/ipnlocal/peerapi.go`).
//!
//! It listens on the tunnel's interface and no other: whoever gets here is a peer, at an address
//! that is his.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Settings;
use super::forward::DNS_MESSAGE;
use super::server::Resolver;
use crate::dns::MESSAGE_LEN_MAX;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 256;
/// Of one address.
const CONNECTIONS_EACH_MAX: usize = 32;
/// A connection lives no longer.
const CONNECTION_LIMIT: Duration = Duration::from_secs(120);
/// A request is to be there so soon.
const HEADER_LIMIT: Duration = Duration::from_secs(10);
/// The head of a request in bytes; a question may stand in its first line.
const HEAD_LEN_MAX: usize = 16 << 10;
/// How long nothing is accepted after that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Where names are looked up.
const DNS_PATH: &str = "/dns-query";

/// Listens for IPv4 and IPv6, as far as the host has them.
pub(super) struct PeerApi {
    listeners: [Option<std::net::TcpListener>; 2],
}

impl PeerApi {
    /// Opens it on this interface, at ports that the kernel chooses.
    pub(super) fn open(tun: &str) -> Self {
        let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let listeners = any.map(|any| {
            let opened = listen(any, tun);
            if let Err(error) = &opened {
                tracing::warn!(%error, family = if any.is_ipv4() { "IPv4" } else { "IPv6" }, "no peer API");
            }
            opened.ok()
        });
        Self { listeners }
    }

    /// Its ports, IPv4 and IPv6.
    pub(super) fn ports(&self) -> [Option<u16>; 2] {
        let port = |listener: &Option<std::net::TcpListener>| {
            Some(listener.as_ref()?.local_addr().ok()?.port())
        };
        [port(&self.listeners[0]), port(&self.listeners[1])]
    }

    /// Answers until it is dropped.
    pub(super) async fn serve(
        self,
        settings: watch::Receiver<Arc<Settings>>,
        resolver: Arc<Resolver>,
    ) {
        let mut work = JoinSet::new();
        for listener in self.listeners.into_iter().flatten() {
            match TcpListener::from_std(listener) {
                Ok(listener) => {
                    work.spawn(accept(listener, settings.clone(), Arc::clone(&resolver)));
                }
                Err(error) => tracing::warn!(%error, "no peer API"),
            }
        }
        while work.join_next().await.is_some() {}
        // Without a listener there is nothing to do; others go on.
        std::future::pending().await
    }
}

/// Asks a peer's for nothing, and whether it is there.
///
/// # Errors
/// It does not answer, or not that it is.
pub(in crate::driver) async fn visit(at: SocketAddr) -> io::Result<()> {
    let stream = TokioIo::new(TcpStream::connect(at).await?);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream)
        .await
        .map_err(io::Error::other)?;
    let mut work = JoinSet::new();
    work.spawn(connection);
    let request = Request::head("/")
        .header(header::HOST, at.to_string())
        .body(Full::<Bytes>::default())
        .map_err(io::Error::other)?;
    let response = sender.send_request(request).await;
    match response.map_err(io::Error::other)?.status() {
        StatusCode::OK => Ok(()),
        status => Err(io::Error::other(format!("it says {status}"))),
    }
}

fn listen(any: IpAddr, tun: &str) -> io::Result<std::net::TcpListener> {
    let addr = SocketAddr::new(any, 0);
    let socket = Socket::new(
        Domain::for_address(addr),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind_device(Some(tun.as_bytes()))?;
    socket.bind(&addr.into())?;
    socket.listen(64)?;
    Ok(socket.into())
}

async fn accept(
    listener: TcpListener,
    settings: watch::Receiver<Arc<Settings>>,
    resolver: Arc<Resolver>,
) {
    let mut work: JoinSet<IpAddr> = JoinSet::new();
    let mut from: Vec<IpAddr> = Vec::new();
    loop {
        let accepted = listener.accept().await;
        while let Some(gone) = work.try_join_next() {
            let place = gone
                .ok()
                .and_then(|ip| from.iter().position(|known| *known == ip));
            place.map(|place| from.swap_remove(place));
        }
        let (stream, peer) = match accepted {
            Ok((stream, peer)) => (stream, peer.ip()),
            Err(_) => {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let of_peer = from.iter().filter(|ip| **ip == peer).count();
        let known = settings.borrow().wish.peers.contains_key(&peer);
        if !known || from.len() >= CONNECTIONS_MAX || of_peer >= CONNECTIONS_EACH_MAX {
            resolver.counters.connections_refused.add(1);
            continue;
        }
        from.push(peer);
        let api = Api {
            peer,
            settings: settings.clone(),
            resolver: Arc::clone(&resolver),
        };
        work.spawn(async move {
            // Too late, or not HTTP: there is nobody to tell.
            let _ = timeout(CONNECTION_LIMIT, connection(stream, api)).await;
            peer
        });
    }
}

async fn connection(stream: TcpStream, api: Api) {
    let service = service_fn(|request| {
        let api = &api;
        async move { Ok::<_, Infallible>(api.answer(request).await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .max_buf_size(HEAD_LEN_MAX);
    let served = http.serve_connection(TokioIo::new(stream), service).await;
    if let Err(error) = served {
        tracing::debug!(%error, peer = %api.peer, "peer API");
    }
}

/// A connection's own.
struct Api {
    peer: IpAddr,
    settings: watch::Receiver<Arc<Settings>>,
    resolver: Arc<Resolver>,
}

impl Api {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let headers = request.headers();
        // A page in somebody's browser is no peer.
        if headers.contains_key(header::ORIGIN) || headers.contains_key(header::REFERER) {
            return text(StatusCode::FORBIDDEN, "no pages\n");
        }
        match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/") => text(StatusCode::OK, "This is a ringtail.\n"),
            (_, DNS_PATH) => self.look_up(request).await,
            _ => text(StatusCode::NOT_FOUND, "there is nothing\n"),
        }
    }

    async fn look_up(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let wish = Arc::clone(&self.settings.borrow().wish);
        if !wish.lets_look_up(self.peer) {
            return text(
                StatusCode::FORBIDDEN,
                "names are looked up for those who may leave by this node\n",
            );
        }
        let question = match read_question(request).await {
            Ok(question) => question,
            Err((status, why)) => return text(status, why),
        };
        match self.resolver.answer_peer(&question).await {
            Some(answer) => {
                let mut response = Response::new(Full::new(answer.into()));
                let kind = header::HeaderValue::from_static(DNS_MESSAGE);
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                response
            }
            None => text(StatusCode::BAD_REQUEST, "that is no question\n"),
        }
    }
}

/// The question of a request (RFC 8484 §4.1), or what is wrong with it.
async fn read_question(request: Request<Incoming>) -> Result<Vec<u8>, (StatusCode, &'static str)> {
    match *request.method() {
        Method::GET => {
            let query = request.uri().query().unwrap_or_default();
            let mut fields = query.split('&');
            let encoded = fields.find_map(|field| field.strip_prefix("dns="));
            let question = encoded.and_then(|text| BASE64_URL_SAFE_NO_PAD.decode(text).ok());
            question.ok_or((StatusCode::BAD_REQUEST, "?dns= is to have a message\n"))
        }
        Method::POST => {
            let kind = request.headers().get(header::CONTENT_TYPE);
            if kind.is_none_or(|kind| kind != DNS_MESSAGE) {
                return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, "that is no message\n"));
            }
            let body = Limited::new(request.into_body(), MESSAGE_LEN_MAX);
            let read = timeout(HEADER_LIMIT, body.collect()).await;
            let late = (StatusCode::REQUEST_TIMEOUT, "that takes too long\n");
            let read = read.map_err(|_| late)?;
            let body = read.map_err(|_| (StatusCode::PAYLOAD_TOO_LARGE, "that is too long\n"))?;
            Ok(body.to_bytes().into())
        }
        _ => Err((StatusCode::METHOD_NOT_ALLOWED, "GET or POST\n")),
    }
}

fn text(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
