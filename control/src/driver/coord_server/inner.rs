//! Noise and HTTP/2 on an upgraded connection: registrations, map requests, map streams.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use super::actor::{Ask, Mapped, Registered};
use super::answer::{Answer, STRANGER_BODY_TIMEOUT, json, read_body, text};
use super::{Client, HANDSHAKE_TIMEOUT, HEADER_LEN_MAX, Shared};
use crate::coord::frames::Codec;
use crate::coord::server::{CAPABILITY_VERSION_MIN, MapRefusal, SessionId, is_logout};
use crate::driver::clock::wall;
use crate::driver::noise_stream::NoiseStream;
use crate::driver::places::Place;
use crate::key::{MachinePrivate, MachinePublic};
use crate::netmap::wire::{MapRequest, MapResponse, RegisterRequest};
use crate::noise::{encode_early, respond};

/// Body of a register or map request.
const BODY_LEN_MAX: usize = 1 << 20;

/// The same of a stranger, who can only want to register.
const STRANGER_BODY_LEN_MAX: usize = 64 * 1024;

/// Requests that are read, asked about and answered at a time on one connection: a node sends few, and
/// the others are not to wait behind many of one.
const AT_WORK_MAX: usize = 4;

/// Time for a request's body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Requests that may run at a time on one connection, also those whose answers are not read: each of
/// them may hold a whole map. A node has a map stream, now and then an older one, and reports.
const STREAMS_MAX: u32 = 8;

/// The same on one that began as a stranger's: enough for a map stream and what a node reports.
const STRANGER_STREAMS_MAX: u32 = 2;

/// Streams a stranger may have us reset before its connection ends.
const STRANGER_RESETS_MAX: usize = 16;

/// HTTP/2 PING and how long its answer may take.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);

/// Requests larger than this have no business in a receive window.
const STREAM_WINDOW: u32 = 1 << 20;

/// The same for a stranger's.
const STRANGER_WINDOW: u32 = 64 * 1024;

/// A client that was answered 101, with what it sent in its header.
pub(super) struct Upgrade {
    pub(super) on: hyper::upgrade::OnUpgrade,
    pub(super) initiation: Vec<u8>,
    /// How it calls this server: scheme, host and port.
    pub(super) base: String,
}

/// Noise and HTTP/2 on an upgraded connection.
pub(super) async fn inner(
    upgrade: Upgrade,
    source: IpAddr,
    shared: Arc<Shared>,
    place: Arc<Place<MachinePublic>>,
) {
    let counters = &shared.counters;
    let ephemeral = MachinePrivate::generate();
    let Ok((accepted, answer)) = respond(&shared.control, &upgrade.initiation, &ephemeral) else {
        return counters.bad_noise.add(1);
    };
    let Ok(Ok(io)) = timeout(HANDSHAKE_TIMEOUT, upgrade.on).await else {
        return counters.bad_http.add(1);
    };
    if i64::from(accepted.version) < CAPABILITY_VERSION_MIN {
        return counters.bad_version.add(1);
    }
    let mut session = accepted.session;
    let challenge = MachinePrivate::generate().public().to_hex();
    let early = encode_early(format!(r#"{{"nodeKeyChallenge":"chalpub:{challenge}"}}"#).as_bytes());
    let mut first = BytesMut::from(&answer[..]);
    if session.sealer.seal(&early, &mut first).is_err() {
        return counters.bad_stream.add(1);
    }
    let mut io = TokioIo::new(io);
    match timeout(HANDSHAKE_TIMEOUT, io.write_all(&first)).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return counters.bad_stream.add(1),
        Err(_) => return counters.timed_out.add(1),
    }
    let mut stream = NoiseStream::server(io, session);
    match timeout(HANDSHAKE_TIMEOUT, stream.proven()).await {
        Ok(Ok(true)) => {}
        Ok(Ok(false) | Err(_)) => return counters.bad_stream.add(1),
        Err(_) => return counters.timed_out.add(1),
    }
    let client = Client {
        machine: accepted.machine,
        place: Arc::clone(&place),
    };
    let greet = |answer| Ask::Greet(client.clone(), answer);
    if shared.ask(false, greet).await.is_none() {
        return;
    }
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .max_header_list_size(u32::try_from(HEADER_LEN_MAX).unwrap_or(u32::MAX));
    // What may wait to be read is bounded by the windows, whatever the number of streams.
    if place.is_known() {
        http.max_concurrent_streams(STREAMS_MAX)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(2 * STREAM_WINDOW);
    } else {
        http.max_concurrent_streams(STRANGER_STREAMS_MAX)
            .max_local_error_reset_streams(STRANGER_RESETS_MAX)
            .initial_stream_window_size(STRANGER_WINDOW)
            .initial_connection_window_size(STRANGER_STREAMS_MAX * STRANGER_WINDOW);
    }
    let inner = Arc::new(Inner {
        shared: Arc::clone(&shared),
        client,
        source,
        base: upgrade.base,
        at_work: Semaphore::new(AT_WORK_MAX),
    });
    let service = service_fn(move |request| {
        let inner = Arc::clone(&inner);
        async move { Ok::<_, Infallible>(inner.serve(request).await) }
    });
    let served = http.serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%source, %error, "a connection broke");
        counters.bad_stream.add(1);
    }
}

/// The paths inside one Noise connection.
struct Inner {
    shared: Arc<Shared>,
    client: Client,
    source: IpAddr,
    base: String,
    at_work: Semaphore,
}

type InnerAnswer = Response<UnsyncBoxBody<Bytes, Infallible>>;

impl Inner {
    async fn serve(&self, request: Request<Incoming>) -> InnerAnswer {
        let _turn = self.at_work.acquire().await;
        let answer = match (request.method(), request.uri().path()) {
            (&Method::POST, "/machine/register") => self.register(request).await,
            (&Method::POST, "/machine/map") => self.map(request).await,
            _ => {
                self.shared.counters.not_found.add(1);
                Err(text(StatusCode::NOT_IMPLEMENTED, "not implemented\n"))
            }
        };
        answer.unwrap_or_else(|refusal| refusal.map(BodyExt::boxed_unsync))
    }

    async fn register(&self, request: Request<Incoming>) -> Result<InnerAnswer, Answer> {
        let counters = &self.shared.counters;
        let request: RegisterRequest = self.read(request).await?;
        if request.version < CAPABILITY_VERSION_MIN {
            counters.bad_version.add(1);
            let why = format!("unsupported client version: ({})\n", request.version);
            return Err(text(StatusCode::BAD_REQUEST, &why));
        }
        let is_logout = is_logout(wall(), &request);
        let registered = loop {
            let request = Box::new(request.clone());
            let ask = |answer| Ask::Register(self.client.clone(), self.source, request, answer);
            match self.ask(ask).await {
                // As long as the person takes. Then it is another question: the code is gone.
                Some(Registered::Wait(mut settled, until)) => {
                    self.client.place.wait_until(until + STRANGER_BODY_TIMEOUT);
                    let _ = settled.changed().await;
                }
                registered => break registered,
            }
        };
        match registered {
            Some(Registered::Answer(mut answer)) => {
                if !answer.auth_url.is_empty() {
                    answer.auth_url = format!("{}/register/{}", self.base, answer.auth_url);
                }
                let counter = match (answer.error.is_empty(), answer.node_key_expired) {
                    (true, false) if !answer.auth_url.is_empty() => &counters.asked_for_approval,
                    (true, false) => &counters.registrations,
                    (true, true) if is_logout => &counters.log_outs,
                    (true, true) | (false, _) => &counters.refused_registration,
                };
                counter.add(1);
                let answer = json(serde_json::to_string(&answer).unwrap_or_default());
                Ok(answer.map(BodyExt::boxed_unsync))
            }
            Some(Registered::TooMany(wait)) => {
                counters.rate_limited.add(1);
                Err(later("too many bad auth keys from this address\n", wait))
            }
            Some(Registered::Crowded(wait)) => {
                counters.crowded.add(1);
                Err(later("too many machines wait for approval\n", wait))
            }
            Some(Registered::Wait(..) | Registered::StoreFailed) | None => Err(text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the server cannot store this now\n",
            )),
        }
    }

    async fn map(&self, request: Request<Incoming>) -> Result<InnerAnswer, Answer> {
        let counters = &self.shared.counters;
        let request: MapRequest = self.read(request).await?;
        let codec = if request.compress == "zstd" {
            Codec::Zstd
        } else {
            Codec::Plain
        };
        let ask = |answer| Ask::Map(self.client.clone(), Box::new(request), answer);
        let mapped = match self.ask(ask).await {
            Some(Ok(mapped)) => mapped,
            Some(Err(refusal)) => {
                let (counter, status) = match refusal {
                    MapRefusal::NotFound | MapRefusal::StayedAway => {
                        (&counters.unknown_node, StatusCode::NOT_FOUND)
                    }
                    MapRefusal::Version(_) => (&counters.bad_version, StatusCode::BAD_REQUEST),
                    MapRefusal::Hostinfo => (&counters.too_large, StatusCode::BAD_REQUEST),
                    // To 401, 403 and 404 clients answer by a new registration.
                    MapRefusal::Expired => (&counters.expired_node, StatusCode::BAD_REQUEST),
                };
                counter.add(1);
                return Err(text(status, &format!("{refusal}\n")));
            }
            None => {
                return Err(text(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "the server is stopping\n",
                ));
            }
        };
        counters.map_requests.add(1);
        Ok(match mapped {
            Mapped::Taken => Response::new(Full::default().boxed_unsync()),
            Mapped::Once(message) => {
                let bytes = self.shared.encoder.encode(codec, message).await;
                Response::new(Full::new(bytes.unwrap_or_default()).boxed_unsync())
            }
            Mapped::Stream(id, messages) => {
                let stream = MapStream {
                    id,
                    codec,
                    messages,
                    shared: Arc::clone(&self.shared),
                };
                let body = StreamBody::new(stream::unfold(stream, MapStream::next));
                Response::new(body.boxed_unsync())
            }
        })
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Option<T> {
        self.shared.ask(self.client.place.is_known(), ask).await
    }

    async fn read<T: serde::de::DeserializeOwned>(
        &self,
        request: Request<Incoming>,
    ) -> Result<T, Answer> {
        let (len_max, time) = if self.client.place.is_known() {
            (BODY_LEN_MAX, BODY_TIMEOUT)
        } else {
            (STRANGER_BODY_LEN_MAX, STRANGER_BODY_TIMEOUT)
        };
        let body = read_body(request.into_body(), len_max, time, &self.shared).await?;
        serde_json::from_slice(&body).map_err(|error| {
            self.shared.counters.bad_request.add(1);
            text(
                StatusCode::BAD_REQUEST,
                &format!("cannot read the request: {error}\n"),
            )
        })
    }
}

/// Has a client come again.
fn later(why: &str, wait: Duration) -> Answer {
    let mut answer = text(StatusCode::TOO_MANY_REQUESTS, why);
    let seconds = http::HeaderValue::from(wait.as_secs() + 1);
    answer.headers_mut().insert(header::RETRY_AFTER, seconds);
    answer
}

/// The never-ending body of a map stream; when it is dropped, the session ends.
struct MapStream {
    id: SessionId,
    codec: Codec,
    messages: mpsc::Receiver<MapResponse>,
    shared: Arc<Shared>,
}

impl MapStream {
    async fn next(mut self) -> Option<(Result<Frame<Bytes>, Infallible>, Self)> {
        let message = Box::new(self.messages.recv().await?);
        match self.shared.encoder.encode(self.codec, message).await {
            Ok(bytes) => Some((Ok(Frame::data(bytes)), self)),
            Err(error) => {
                tracing::error!(%error, "a map cannot be sent");
                None
            }
        }
    }
}

impl Drop for MapStream {
    fn drop(&mut self) {
        // The actor is gone when the server stops.
        let _ = self.shared.ended.send(self.id);
    }
}
