//! Bodies: short answers, maps, and reading a request within a limit and in time.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::Shared;
use crate::coord::frames::{Codec, encode};
use crate::netmap::wire::MapResponse;

/// Time for a stranger's body to arrive.
pub(super) const STRANGER_BODY_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) type Answer = Response<Full<Bytes>>;

pub(super) fn text(status: StatusCode, body: &str) -> Answer {
    let mut answer = of_kind("text/plain; charset=utf-8", body.to_owned());
    *answer.status_mut() = status;
    answer
}

pub(super) fn json(body: String) -> Answer {
    of_kind("application/json", body)
}

fn of_kind(kind: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    let kind = http::HeaderValue::from_static(kind);
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}

/// Reads a whole body within a limit and in time.
pub(super) fn read_body(
    body: Incoming,
    len_max: usize,
    time: Duration,
    shared: &Shared,
) -> impl Future<Output = Result<Bytes, Answer>> + Send {
    let counters = &shared.counters;
    async move {
        let read = timeout(time, Limited::new(body, len_max).collect()).await;
        let (counter, status, why) = match read {
            Ok(Ok(body)) => return Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => (
                &counters.too_large,
                StatusCode::PAYLOAD_TOO_LARGE,
                "the body is too large\n",
            ),
            Ok(Err(_)) => (
                &counters.bad_request,
                StatusCode::BAD_REQUEST,
                "the body was cut off\n",
            ),
            Err(_) => (
                &counters.timed_out,
                StatusCode::REQUEST_TIMEOUT,
                "the body came too slowly\n",
            ),
        };
        counter.add(1);
        Err(text(status, why))
    }
}

/// Nodes from which on a message is large: a hundred of them are some 100 kB of JSON.
const LARGE: usize = 100;

/// Large messages that are written at a time.
const LARGE_AT_ONCE: usize = 2;

/// Writes map messages. Large ones are written apart from the threads that serve connections: whole maps
/// that are asked for side by side keep nobody else waiting.
#[derive(Debug)]
pub(super) struct Encoder(Arc<Semaphore>);

impl Default for Encoder {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(LARGE_AT_ONCE)))
    }
}

impl Encoder {
    /// The message as it travels.
    ///
    /// # Errors
    /// When it cannot be written, or the server is stopping.
    pub(super) async fn encode(
        &self,
        codec: Codec,
        message: Box<MapResponse>,
    ) -> anyhow::Result<Bytes> {
        let nodes = message.peers.iter().chain(&message.peers_changed).flatten();
        let patches = message.peers_changed_patch.as_ref().map_or(0, Vec::len);
        let removed = message.peers_removed.as_ref().map_or(0, Vec::len);
        if nodes.count() + patches + removed < LARGE {
            return Ok(Bytes::from(encode(codec, &message)?));
        }
        let turn = Arc::clone(&self.0).acquire_owned().await?;
        let written = tokio::task::spawn_blocking(move || {
            // Its turn ends with the work, which goes on where nobody waits for it any more.
            let _turn = turn;
            encode(codec, &message)
        });
        Ok(Bytes::from(written.await??))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn message(nodes: usize) -> Box<MapResponse> {
        Box::new(MapResponse {
            peers: Some(vec![Arc::default(); nodes]),
            ..MapResponse::default()
        })
    }

    #[tokio::test]
    async fn whole_maps_are_written_two_at_a_time_and_a_sign_of_life_at_once() {
        let encoder = Encoder::default();
        for codec in [Codec::Plain, Codec::Zstd] {
            for nodes in [0, LARGE - 1, LARGE] {
                let (first, second) = (message(nodes), message(nodes));
                let expected = encode(codec, &first).unwrap();
                let others = encoder.0.try_acquire_many(2).unwrap();
                let at_once = encoder.encode(codec, first).now_or_never();
                assert_eq!(at_once.is_some(), nodes < LARGE, "{nodes}");
                drop(others);
                assert_eq!(encoder.encode(codec, second).await.unwrap(), expected);
            }
        }
    }

    #[test]
    fn who_asks_and_goes_away_keeps_its_turn_until_the_work_is_done() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        runtime.block_on(async {
            let (go, wait) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || wait.recv().unwrap_err());
            let encoder = Encoder::default();
            for _ in 0..LARGE_AT_ONCE {
                let asked = encoder.encode(Codec::Plain, message(LARGE));
                assert!(asked.now_or_never().is_none());
            }
            assert_eq!(encoder.0.available_permits(), 0);
            drop(go);
            busy.await.unwrap();
            drop(encoder.0.acquire_many(2).await.unwrap());
        });
    }
}
