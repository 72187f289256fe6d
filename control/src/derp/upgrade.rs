//! The HTTP heads around DERP: the upgrade as a client writes and reads it, and as a relay reads
//! and answers it, with the few other endpoints a relay has. Heads are parsed by `httparse`; what
//! follows a head is DERP already and stays with the caller.
//!
//! Source: `derp/derphttp`, `derp/derpserver`, `cmd/derper` in tailscale/tailscale.

use std::fmt::Write as _;

use crate::key::NodePublic;

/// The longest HTTP head that is read, in bytes.
pub const HEAD_LEN_MAX: usize = 16 << 10;

/// The most headers a head may have.
pub const HEADERS_MAX: usize = 64;

/// The longest `X-Tailscale-Challenge` that is answered.
const CHALLENGE_LEN_MAX: usize = 64;

/// Why an HTTP head was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// Longer than [`HEAD_LEN_MAX`].
    #[error("the HTTP head is longer than {HEAD_LEN_MAX} bytes")]
    TooLong,
    /// Not HTTP/1, or more than [`HEADERS_MAX`] headers.
    #[error("not an HTTP/1 head")]
    Syntax,
    /// The relay answered the upgrade with this status instead of 101.
    #[error("the relay answered the upgrade with HTTP status {0}")]
    Status(u16),
}

/// Appends the client's upgrade request, in the form Go writes it.
///
/// `host` is the node's host name, with `:port` unless that is 443. `ideal_node` names the
/// region's first node when another one is asked.
pub fn put_request(out: &mut Vec<u8>, host: &str, ideal_node: Option<&str>, fast_start: bool) {
    let mut text = format!(
        "GET /derp HTTP/1.1\r\nHost: {host}\r\nUser-Agent: Go-http-client/1.1\r\n\
         Connection: Upgrade\r\n"
    );
    if fast_start {
        text.push_str("Derp-Fast-Start: 1\r\n");
    }
    if let Some(name) = ideal_node {
        write!(text, "Ideal-Node: {name}\r\n").expect("a String takes every write");
    }
    text.push_str("Upgrade: DERP\r\n\r\n");
    out.extend_from_slice(text.as_bytes());
}

/// Appends the request of a latency check, as netcheck does it.
pub fn put_latency_request(out: &mut Vec<u8>, host: &str) {
    let text = format!(
        "GET /derp/latency-check HTTP/1.1\r\nHost: {host}\r\n\
         User-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n\r\n"
    );
    out.extend_from_slice(text.as_bytes());
}

/// The value of a `Host` header.
pub fn host_header(host: &str, port: u16) -> String {
    let host = if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    };
    if port == 443 {
        host
    } else {
        format!("{host}:{port}")
    }
}

/// Reads the head of a response: its length in bytes and its status, or `None` while it is not
/// complete.
///
/// # Errors
/// [`HeadError`] other than [`HeadError::Status`].
pub fn parse_response(input: &[u8]) -> Result<Option<(usize, u16)>, HeadError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let Some(len) = head_len(input, |head| response.parse(head))? else {
        return Ok(None);
    };
    Ok(Some((len, response.code.ok_or(HeadError::Syntax)?)))
}

/// Where a head ends; `None` while it is not complete.
fn head_len<'a>(
    input: &'a [u8],
    parse: impl FnOnce(&'a [u8]) -> httparse::Result<usize>,
) -> Result<Option<usize>, HeadError> {
    match parse(&input[..input.len().min(HEAD_LEN_MAX)]) {
        Ok(httparse::Status::Complete(len)) => Ok(Some(len)),
        Ok(httparse::Status::Partial) if input.len() >= HEAD_LEN_MAX => Err(HeadError::TooLong),
        Ok(httparse::Status::Partial) => Ok(None),
        Err(_) => Err(HeadError::Syntax),
    }
}

/// What a request to a relay asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The DERP upgrade. With `fast_start` no HTTP response is sent.
    Derp {
        /// `Derp-Fast-Start: 1` was there.
        fast_start: bool,
        /// The client would rather be at this node.
        ideal_node: Option<String>,
    },
    /// Anything else, with the whole response to send.
    Other {
        /// Head and body.
        response: Vec<u8>,
        /// The connection ends after the response.
        close: bool,
    },
}

/// Where a request came in: the endpoints differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// The TLS port.
    Main,
    /// The plain port of captive portal checks.
    Plain,
}

/// Reads the head of a request: its length in bytes and what it asks for, or `None` while it is
/// not complete. `vars` makes the body of `/debug/vars` for a caller that may see it.
///
/// # Errors
/// [`HeadError::TooLong`] and [`HeadError::Syntax`]: close.
pub fn parse_request(
    input: &[u8],
    port: Port,
    vars: Option<&dyn Fn() -> String>,
) -> Result<Option<(usize, Request)>, HeadError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let Some(len) = head_len(input, |head| request.parse(head))? else {
        return Ok(None);
    };
    let method = request.method.unwrap_or("");
    let target = request.path.unwrap_or("/");
    let path = target.split('?').next().unwrap_or("/");
    let header = |name: &str| {
        request
            .headers
            .iter()
            .find(|h| h.name.eq_ignore_ascii_case(name))
            .map(|h| h.value)
    };
    let is = |name: &str, want: &str| {
        header(name).is_some_and(|value| value.eq_ignore_ascii_case(want.as_bytes()))
    };
    // A body would have to be read before the next request; nothing here wants one.
    let has_body = header("transfer-encoding").is_some()
        || header("content-length").is_some_and(|value| value != b"0");
    let close = has_body || request.version == Some(0) || is("connection", "close");
    let head_only = method == "HEAD";
    let answer = |status: &str, extra: &str, body: &str| Request::Other {
        response: response(status, extra, body, close, head_only),
        close,
    };
    let text = "Content-Type: text/plain; charset=utf-8\r\n";

    let request = match (port, path) {
        (_, "/generate_204") => {
            let mut extra = "Cache-Control: no-cache, no-store, must-revalidate, no-transform, \
                             max-age=0\r\n"
                .to_owned();
            if let Some(challenge) = header("x-tailscale-challenge").and_then(challenge) {
                extra.push_str("X-Tailscale-Response: response ");
                extra.push_str(challenge);
                extra.push_str("\r\n");
            }
            answer("204 No Content", &extra, "")
        }
        (Port::Plain, _) => answer("404 Not Found", text, "only TLS here\n"),
        (Port::Main, "/derp") => {
            if is("upgrade", "derp") || is("upgrade", "websocket") && !derp_subprotocol(&header) {
                let ideal = header("ideal-node").and_then(|v| std::str::from_utf8(v).ok());
                Request::Derp {
                    fast_start: header("derp-fast-start") == Some(b"1"),
                    ideal_node: ideal.map(str::to_owned),
                }
            } else {
                answer(
                    "426 Upgrade Required",
                    "Upgrade: DERP\r\n",
                    "DERP requires connection upgrade\n",
                )
            }
        }
        (Port::Main, "/derp/probe" | "/derp/latency-check") => match method {
            "GET" | "HEAD" => answer("200 OK", "Access-Control-Allow-Origin: *\r\n", ""),
            _ => answer("405 Method Not Allowed", text, "bogus probe method\n"),
        },
        (Port::Main, "/robots.txt") => answer("200 OK", text, "User-agent: *\nDisallow: /\n"),
        (Port::Main, "/debug/vars") => match vars {
            Some(vars) => answer("200 OK", "Content-Type: application/json\r\n", &vars()),
            None => answer("403 Forbidden", text, "debug access denied\n"),
        },
        (Port::Main, _) => answer(
            "200 OK",
            "Content-Type: text/html; charset=utf-8\r\n",
            "<html><body><h1>DERP</h1><p>A relay of a private network (ringtail).</p></body></html>\n",
        ),
    };
    Ok(Some((len, request)))
}

/// Appends the answer to an upgrade without fast start.
pub fn put_switching(out: &mut Vec<u8>, relay: &NodePublic) {
    let text = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\
         Derp-Version: {}\r\nDerp-Public-Key: {}\r\n\r\n",
        super::PROTOCOL_VERSION,
        relay.to_hex()
    );
    out.extend_from_slice(text.as_bytes());
}

/// A WebSocket that names the `derp` subprotocol is real WebSocket, which is not spoken here; one
/// that does not is an old client that speaks DERP right away.
fn derp_subprotocol<'a>(header: &impl Fn(&str) -> Option<&'a [u8]>) -> bool {
    header("sec-websocket-protocol").is_some_and(|value| {
        value
            .split(|&b| b == b',')
            .any(|part| part.trim_ascii().eq_ignore_ascii_case(b"derp"))
    })
}

fn challenge(value: &[u8]) -> Option<&str> {
    let allowed = |b: &u8| b.is_ascii_alphanumeric() || b".-_:".contains(b);
    let good = (1..=CHALLENGE_LEN_MAX).contains(&value.len()) && value.iter().all(allowed);
    good.then(|| std::str::from_utf8(value).ok()).flatten()
}

fn response(status: &str, extra: &str, body: &str, close: bool, head_only: bool) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status}\r\n{extra}");
    if !status.starts_with("204") {
        write!(text, "Content-Length: {}\r\n", body.len()).expect("a String takes every write");
    }
    if close {
        text.push_str("Connection: close\r\n");
    }
    text.push_str("\r\n");
    if !head_only {
        text.push_str(body);
    }
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::derp::testing::{live, vectors};

    fn ask(text: &str) -> Request {
        let (len, request) = parse_request(text.as_bytes(), Port::Main, None)
            .unwrap()
            .unwrap();
        assert_eq!(len, text.len());
        request
    }

    fn answer(text: &str) -> String {
        match ask(text) {
            Request::Other { response, .. } => String::from_utf8(response).unwrap(),
            Request::Derp { .. } => panic!("upgraded: {text}"),
        }
    }

    #[test]
    fn the_requests_are_the_published_ones() {
        let v = vectors();
        let build = |ideal, fast| {
            let mut out = Vec::new();
            put_request(&mut out, "derp1.example.com", ideal, fast);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(build(None, false), v.http("request"));
        assert_eq!(build(None, true), v.http("request_fast_start"));
        assert_eq!(build(Some("1a"), false), v.http("request_not_ideal"));
        let mut out = Vec::new();
        put_switching(&mut out, &v.public("derp_server"));
        assert_eq!(String::from_utf8(out).unwrap(), v.http("response_101"));
    }

    #[test]
    fn recorded_heads_are_understood_and_what_follows_is_left() {
        for session in live("derp-session").sessions() {
            let mut request = session.http("c2s").unwrap();
            let head = request.len();
            request.extend(b"\x02\0\0\0\x68rest");
            let fast = session.http("s2c").is_none();
            let want = Request::Derp {
                fast_start: fast,
                ideal_node: None,
            };
            assert_eq!(
                parse_request(&request, Port::Main, None),
                Ok(Some((head, want)))
            );
            for len in 0..head {
                assert_eq!(parse_request(&request[..len], Port::Main, None), Ok(None));
            }
            if let Some(response) = session.http("s2c") {
                assert_eq!(parse_response(&response), Ok(Some((response.len(), 101))));
            }
        }
        let recording = live("tailscaled-as-client");
        let sessions = recording.sessions();
        let request = String::from_utf8(sessions[1].http("c2s").unwrap()).unwrap();
        let want = String::from_utf8(sessions[1].http("s2c").unwrap()).unwrap();
        assert_eq!(answer(&request), want);
        let mut built = Vec::new();
        put_latency_request(&mut built, "198.18.0.31");
        assert_eq!(String::from_utf8(built).unwrap(), request);
    }

    #[test]
    fn an_upgrade_is_taken_by_its_upgrade_header_alone() {
        for head in [
            "GET /derp HTTP/1.1\r\nUpgrade: DERP\r\n\r\n",
            "POST /derp?x=1 HTTP/1.0\r\nupgrade: derp\r\n\r\n",
            "GET /derp HTTP/1.1\r\nUpgrade: WebSocket\r\n\r\n",
        ] {
            assert!(
                matches!(
                    ask(head),
                    Request::Derp {
                        fast_start: false,
                        ..
                    }
                ),
                "{head}"
            );
        }
        for head in [
            "GET /derp HTTP/1.1\r\n\r\n",
            "GET /derp HTTP/1.1\r\nUpgrade: derp, foo\r\n\r\n",
            "GET /derp HTTP/1.1\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: derp\r\n\r\n",
        ] {
            let text = answer(head);
            assert!(text.starts_with("HTTP/1.1 426 "), "{text}");
            assert!(text.ends_with("DERP requires connection upgrade\n"));
        }
        let fast = ask("GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n");
        assert!(matches!(
            fast,
            Request::Derp {
                fast_start: true,
                ..
            }
        ));
        let slow = ask("GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: true\r\n\r\n");
        assert!(matches!(
            slow,
            Request::Derp {
                fast_start: false,
                ..
            }
        ));
    }

    #[test]
    fn the_other_endpoints_answer_as_the_page_says() {
        let text =
            answer("GET /generate_204?t=5 HTTP/1.1\r\nX-Tailscale-Challenge: ts_1.a-b:c\r\n\r\n");
        assert!(text.starts_with("HTTP/1.1 204 No Content\r\n"));
        assert!(text.contains("X-Tailscale-Response: response ts_1.a-b:c\r\n"));
        let text = answer("GET /generate_204 HTTP/1.1\r\nX-Tailscale-Challenge: a b\r\n\r\n");
        assert!(!text.contains("X-Tailscale-Response"));
        assert!(answer("PUT /derp/probe HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
        assert!(answer("HEAD /derp/probe HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
        assert!(answer("GET /derp/ HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200 "));
        assert!(answer("GET /nothing HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200 "));
        assert!(answer("GET /debug/vars HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 403 "));
        assert!(answer("GET /robots.txt HTTP/1.1\r\n\r\n").contains("Disallow: /"));
        let post = "POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n";
        assert!(matches!(ask(post), Request::Other { close: true, .. }));
    }

    #[test]
    fn endless_and_malformed_heads_are_refused() {
        let mut long = b"GET /derp HTTP/1.1\r\n".to_vec();
        while long.len() < HEAD_LEN_MAX {
            long.extend(b"A: b\r\n");
        }
        assert!(parse_request(&long, Port::Main, None).is_err());
        let mut long = b"GET /".to_vec();
        long.resize(HEAD_LEN_MAX, b'a');
        assert_eq!(
            parse_request(&long, Port::Main, None),
            Err(HeadError::TooLong)
        );
        assert_eq!(
            parse_request(b"\x16\x03\x01\x02\0\x01", Port::Main, None),
            Err(HeadError::Syntax)
        );
        assert_eq!(parse_response(b"DERP\r\n\r\n"), Err(HeadError::Syntax));
    }
}
