//! The listeners, TLS, and the outer HTTP/1: keys, upgrades, verification, metrics.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::actor::Ask;
use super::answer::{Answer, STRANGER_BODY_TIMEOUT, json, read_body, text};
use super::inner::{Upgrade, inner};
use super::metered::Metered;
use super::{HANDSHAKE_TIMEOUT, HEADER_LEN_MAX, Shared};
use crate::coord::server::{Code, PENDING_TIME};
use crate::driver::control_url::ByteStream;
use crate::driver::descriptors;
use crate::driver::noise_stream::{HANDSHAKE, UPGRADE};
use crate::driver::places::Place;
use crate::key::{MachinePublic, NodePublic};
use crate::netmap::wire::KeyResponse;
use crate::noise::INITIATION_LEN;

/// How long nothing is accepted after that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// A stranger's connection is closed after this.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes a stranger may send on one connection, in all.
const STRANGER_BYTES_MAX: usize = 256 * 1024;

/// Body of a `/verify` request.
const VERIFY_LEN_MAX: usize = 4096;

/// Where people are sent who are to have their machine let in.
const REGISTER: &str = "/register/";

pub(super) async fn accept(
    listener: TcpListener,
    tls: Option<tokio_rustls::TlsAcceptor>,
    shared: Arc<Shared>,
) {
    let mut failing = false;
    loop {
        let (stream, source) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                shared.counters.accept_errors.add(1);
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "cannot accept a connection");
                }
                if descriptors::are_short(&error) {
                    shared.door.make_room();
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        failing = false;
        shared.counters.connections.add(1);
        let Some(place) = shared.door.enter(source.ip(), || ()) else {
            // Those who lost their place have to be gone first: let them.
            tokio::task::yield_now().await;
            continue;
        };
        let place = Arc::new(place);
        let (tls, shared) = (tls.clone(), Arc::clone(&shared));
        tokio::spawn(async move {
            let mut alive = shared.alive.subscribe();
            tokio::select! {
                () = connection(stream, source, tls, Arc::clone(&shared), Arc::clone(&place)) => {}
                _ = place.ended() => {}
                () = place.outstayed(STRANGER_TIMEOUT) => shared.counters.timed_out.add(1),
                _ = alive.changed() => {}
            }
        });
    }
}

async fn connection(
    stream: TcpStream,
    source: SocketAddr,
    tls: Option<tokio_rustls::TlsAcceptor>,
    shared: Arc<Shared>,
    place: Arc<Place<MachinePublic>>,
) {
    // Small messages on long-lived connections.
    let _ = stream.set_nodelay(true);
    let scheme = if tls.is_some() { "https" } else { "http" };
    let own = stream.local_addr().map(|own| own.to_string());
    let stream = Metered::new(stream, Arc::clone(&place), STRANGER_BYTES_MAX);
    let stream: Box<dyn ByteStream> = match tls {
        None => Box::new(stream),
        Some(tls) => match timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
            Ok(Ok(stream)) => Box::new(stream),
            Ok(Err(_)) => return shared.counters.bad_http.add(1),
            Err(_) => return shared.counters.timed_out.add(1),
        },
    };
    let (upgrades, mut upgraded) = mpsc::channel(1);
    let outer = Arc::new(Outer {
        shared: Arc::clone(&shared),
        upgrades,
        source: source.ip(),
        scheme,
        own: own.unwrap_or_default(),
    });
    let service = service_fn(|request| {
        let outer = Arc::clone(&outer);
        async move { Ok::<_, Infallible>(outer.serve(request).await) }
    });
    let http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HANDSHAKE_TIMEOUT)
        .max_buf_size(HEADER_LEN_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = http.await {
        tracing::debug!(%source, %error, "broken HTTP");
        let counters = &shared.counters;
        let (late, bad) = (&counters.timed_out, &counters.bad_http);
        return if error.is_timeout() { late } else { bad }.add(1);
    }
    if let Ok(upgrade) = upgraded.try_recv() {
        inner(upgrade, source.ip(), shared, place).await;
    }
}

/// The outer HTTP/1 paths of one connection.
struct Outer {
    shared: Arc<Shared>,
    upgrades: mpsc::Sender<Upgrade>,
    source: IpAddr,
    scheme: &'static str,
    /// The address we are reached by.
    own: String,
}

impl Outer {
    async fn serve(&self, request: Request<Incoming>) -> Answer {
        let counters = &self.shared.counters;
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/key") => self.key(request.uri().query().unwrap_or_default()),
            (&Method::POST, "/ts2021") => self.upgrade(request),
            (&Method::GET | &Method::HEAD, "/health") => json(r#"{"status":"pass"}"#.to_owned()),
            (&Method::POST, "/verify") => {
                let answer = self.verify(request).await;
                answer.unwrap_or_else(|refusal| refusal)
            }
            (&Method::GET, path) if path.starts_with(REGISTER) => register_page(path),
            (&Method::GET, "/metrics") if self.source.to_canonical().is_loopback() => {
                let lines = self.shared.list();
                let lines = lines
                    .iter()
                    .map(|(name, n)| format!("ringtail_coord_{name} {n}\n"));
                text(StatusCode::OK, &lines.collect::<String>())
            }
            _ => {
                counters.not_found.add(1);
                text(StatusCode::NOT_FOUND, "not found\n")
            }
        }
    }

    fn key(&self, query: &str) -> Answer {
        let version = query.split('&').find_map(|pair| pair.strip_prefix("v="));
        if version.is_none_or(|version| version.parse::<u32>().is_err()) {
            self.shared.counters.bad_request.add(1);
            return text(
                StatusCode::BAD_REQUEST,
                "the parameter v must be a number\n",
            );
        }
        let answer = KeyResponse {
            legacy_public_key: MachinePublic::default(),
            public_key: self.shared.control.public(),
        };
        json(serde_json::to_string(&answer).unwrap_or_default())
    }

    fn upgrade(&self, mut request: Request<Incoming>) -> Answer {
        let refuse = |why: &str| {
            self.shared.counters.bad_upgrade.add(1);
            text(StatusCode::BAD_REQUEST, why)
        };
        let headers = request.headers();
        match headers.get(header::UPGRADE) {
            None => return refuse("missing next protocol\n"),
            Some(protocol) if protocol == UPGRADE => {}
            Some(_) => return refuse("unknown next protocol\n"),
        }
        let Some(handshake) = headers.get(HANDSHAKE) else {
            return refuse("missing Tailscale handshake header\n");
        };
        let initiation = base64::engine::general_purpose::STANDARD.decode(handshake.as_bytes());
        let initiation = initiation.ok().filter(|it| it.len() == INITIATION_LEN);
        let Some(initiation) = initiation else {
            return refuse("invalid tailscale handshake header\n");
        };
        let host = headers
            .get(header::HOST)
            .and_then(|host| host.to_str().ok());
        let host = host.filter(|host| is_host(host)).unwrap_or(&self.own);
        let base = format!("{}://{host}", self.scheme);
        let on = hyper::upgrade::on(&mut request);
        // A connection has one upgrade; a second request cannot follow the first 101.
        let upgrade = Upgrade {
            on,
            initiation,
            base,
        };
        if self.upgrades.try_send(upgrade).is_err() {
            return refuse("upgraded already\n");
        }
        Response::builder()
            .status(StatusCode::SWITCHING_PROTOCOLS)
            .header(header::UPGRADE, UPGRADE)
            .header(header::CONNECTION, "upgrade")
            .body(Full::default())
            .expect("these headers can be sent")
    }

    /// A relay asks whether it should serve a node.
    async fn verify(&self, request: Request<Incoming>) -> Result<Answer, Answer> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Verify {
            node_public: NodePublic,
        }
        let body = read_body(
            request.into_body(),
            VERIFY_LEN_MAX,
            STRANGER_BODY_TIMEOUT,
            &self.shared,
        );
        let Ok(verify) = serde_json::from_slice::<Verify>(&body.await?) else {
            self.shared.counters.bad_request.add(1);
            return Err(text(StatusCode::BAD_REQUEST, "not a verify request\n"));
        };
        let ask = |answer| Ask::Verify(verify.node_public, answer);
        let allow = self.shared.ask(false, ask).await.unwrap_or(false);
        Ok(json(format!(r#"{{"Allow":{allow}}}"#)))
    }
}

/// Says how a machine is let in. Whether one waits under the code is for the administrator to know.
fn register_page(path: &str) -> Answer {
    let code = path.strip_prefix(REGISTER).unwrap_or_default();
    let Ok(code) = code.parse::<Code>() else {
        return text(
            StatusCode::NOT_FOUND,
            "this is not a code of a machine that waits\n",
        );
    };
    let page = format!(
        "A machine asks to join this network. Whoever runs the network lets it in by this command, on the\n\
         host of the coordination server (with its --state-dir, if it was given one):\n\n    \
         ringtail coord nodes approve {code}\n\n\
         The code is good for {} minutes. Let in only what you know to be yours.\n",
        PENDING_TIME.as_secs() / 60
    );
    text(StatusCode::OK, &page)
}

/// Whether this may stand in a URL as host and port.
fn is_host(text: &str) -> bool {
    let fits = |letter: u8| letter.is_ascii_alphanumeric() || b".-:[]_".contains(&letter);
    (1..=260).contains(&text.len()) && text.bytes().all(fits)
}
