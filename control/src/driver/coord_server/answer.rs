//! Bodies: short answers, and reading a request within a limit and in time.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use tokio::time::timeout;

use super::Shared;
use super::counters::count;

/// Time for a stranger's body to arrive.
pub(super) const STRANGER_BODY_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) type Answer = Response<Full<Bytes>>;

pub(super) fn text(status: StatusCode, body: &str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body.to_owned())));
    *answer.status_mut() = status;
    let kind = http::HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}

pub(super) fn json(body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    let kind = http::HeaderValue::from_static("application/json");
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
        match timeout(time, Limited::new(body, len_max).collect()).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                count(&counters.too_large);
                Err(text(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "the body is too large\n",
                ))
            }
            Ok(Err(_)) => {
                count(&counters.bad_request);
                Err(text(StatusCode::BAD_REQUEST, "the body was cut off\n"))
            }
            Err(_) => {
                count(&counters.timed_out);
                Err(text(
                    StatusCode::REQUEST_TIMEOUT,
                    "the body came too slowly\n",
                ))
            }
        }
    }
}
