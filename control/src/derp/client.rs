//! The client's end of one relay connection, from the first byte inside TLS on.
//!
//! With fast start the request and ClientInfo leave together and packets may follow at once;
//! otherwise they wait for the 101 response and the ServerKey frame. Nothing waits for
//! ServerInfo. A relay that says nothing for [`SILENT_LIMIT`] is asked by a Ping, and one that
//! does not answer within [`PONG_LIMIT`] is dead: stricter than tailscaled, which has only the
//! read limit of 120 s.

use std::time::{Duration, Instant};

use super::frame::{self, Decoder, FrameError, FrameType, PeerGoneReason};
use super::info::{self, ClientInfo, InfoError, NONCE_LEN, ServerInfo};
use super::upgrade::{self, HeadError};
use crate::key::{NodePrivate, NodePublic};
use crate::rate::{Bucket, Rate};

/// Silence after which the relay is asked by a Ping; KeepAlive comes every 60 to 65 s.
pub const SILENT_LIMIT: Duration = Duration::from_secs(75);

/// How long a Pong may take.
pub const PONG_LIMIT: Duration = Duration::from_secs(10);

/// How long a Pong may take after the host's network changed.
pub const LINK_CHANGE_LIMIT: Duration = Duration::from_secs(3);

/// Why a connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The upgrade failed.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// A frame breaks a limit, or the first one is wrong.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// ServerInfo does not open or parse.
    #[error("ServerInfo: {0}")]
    Info(#[from] InfoError),
    /// The relay's frames come from another key than its certificate named.
    #[error("the relay's first frame and its certificate name different keys")]
    OtherKey,
    /// Nothing came for too long, also no Pong.
    #[error("the relay answers nothing any more")]
    Silent,
}

/// What a relay says beside packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// A peer left or was never there.
    PeerGone {
        /// Which.
        peer: NodePublic,
        /// Which of both.
        reason: PeerGoneReason,
    },
    /// The relay has a problem, in its words, or none any more.
    Health(Option<String>),
    /// The relay is about to restart.
    Restarting {
        /// When to come back.
        reconnect_in: Duration,
        /// How long to try.
        try_for: Duration,
    },
}

/// What came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A packet of another client; may be empty.
    Packet {
        /// Whose.
        source: NodePublic,
        /// What, in the input.
        packet: &'a [u8],
    },
    /// Something else.
    Said(Said),
    /// The Pong to our Ping came; the time it took.
    Pong(Duration),
}

/// What a connection begins with.
#[derive(Clone, Debug)]
pub struct Hello<'a> {
    /// The `Host` header.
    pub host: &'a str,
    /// The region's first node, when another is asked.
    pub ideal_node: Option<&'a str>,
    /// The relay's key from its meta-certificate: fast start.
    pub relay: Option<NodePublic>,
    /// Whether this is the home relay.
    pub home: bool,
}

#[derive(Debug)]
enum Stage {
    /// Waiting for the 101 response, of which this has come.
    Http(Vec<u8>),
    /// Waiting for ServerKey; ClientInfo has not been sent.
    ServerKey,
    /// ClientInfo is sent.
    Ready,
}

/// One connection.
#[derive(Debug)]
pub struct Client {
    private: NodePrivate,
    nonce: [u8; NONCE_LEN],
    relay: Option<NodePublic>,
    stage: Stage,
    home: bool,
    decoder: Decoder,
    out: Vec<u8>,
    heard: Instant,
    ping: Option<Ping>,
    /// The rate the relay asked for; each frame is charged whole, header included.
    bucket: Option<Bucket>,
}

#[derive(Clone, Copy, Debug)]
struct Ping {
    bytes: [u8; 8],
    sent: Instant,
    limit: Duration,
}

impl Client {
    /// Begins a connection. `nonce` is random and used once.
    pub fn new(
        private: NodePrivate,
        hello: &Hello<'_>,
        nonce: [u8; NONCE_LEN],
        now: Instant,
    ) -> Self {
        let mut client = Self {
            private,
            nonce,
            relay: hello.relay,
            stage: Stage::Http(Vec::new()),
            home: hello.home,
            decoder: Decoder::default(),
            out: Vec::new(),
            heard: now,
            ping: None,
            bucket: None,
        };
        let fast = hello.relay.is_some();
        upgrade::put_request(&mut client.out, hello.host, hello.ideal_node, fast);
        if let Some(relay) = hello.relay {
            client.introduce(&relay);
        }
        client
    }

    /// Whether ClientInfo is out, so that packets may follow.
    pub fn is_ready(&self) -> bool {
        matches!(self.stage, Stage::Ready)
    }

    /// The relay's key, once known.
    pub fn relay(&self) -> Option<NodePublic> {
        self.relay
    }

    /// Appends what has to be written before any packet.
    pub fn poll_transmit(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.out);
    }

    /// Whether [`Client::poll_transmit`] has something.
    pub fn wants_transmit(&self) -> bool {
        !self.out.is_empty()
    }

    /// Says whether this relay is the home from now on.
    pub fn set_home(&mut self, home: bool) {
        if self.home != home {
            self.home = home;
            if self.is_ready() {
                frame::put_note_preferred(&mut self.out, home);
            }
        }
    }

    /// Asks the relay for a sign of life within `limit`, unless an earlier question is open.
    pub fn ping(&mut self, bytes: [u8; 8], limit: Duration, now: Instant) {
        if self.ping.is_none() && self.is_ready() {
            frame::put(&mut self.out, FrameType::PING, &[&bytes]);
            self.ping = Some(Ping {
                bytes,
                sent: now,
                limit,
            });
        }
    }

    /// How many of `frames_len` bytes of SendPacket frames, which follow each other in
    /// `frame_lens`, the relay's rate limit lets through now: the number of frames.
    pub fn admit(&mut self, frame_lens: impl Iterator<Item = usize>, now: Instant) -> usize {
        let Some(bucket) = &mut self.bucket else {
            return usize::MAX;
        };
        bucket.refill(now);
        frame_lens
            .take_while(|&len| bucket.take(len as u64))
            .count()
    }

    /// Whether the relay asked for a rate limit.
    pub fn is_limited(&self) -> bool {
        self.bucket.is_some()
    }

    /// When [`Client::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Instant {
        match self.ping {
            Some(ping) => ping.sent + ping.limit,
            None => self.heard + SILENT_LIMIT,
        }
    }

    /// Pings a silent relay.
    ///
    /// # Errors
    /// [`ClientError::Silent`] when the Ping before was not answered.
    pub fn handle_timeout(&mut self, now: Instant, random: [u8; 8]) -> Result<(), ClientError> {
        if now < self.poll_timeout() {
            return Ok(());
        }
        if self.ping.is_some() || !self.is_ready() {
            return Err(ClientError::Silent);
        }
        self.ping(random, PONG_LIMIT, now);
        Ok(())
    }

    /// Takes bytes from the relay and hands what they say to `sink`.
    ///
    /// # Errors
    /// [`ClientError`]: the connection is of no use any more. Events before it were handed out.
    pub fn handle_input(
        &mut self,
        now: Instant,
        input: &[u8],
        sink: &mut impl FnMut(Event<'_>),
    ) -> Result<(), ClientError> {
        if input.is_empty() {
            return Ok(());
        }
        self.heard = now;
        let rest;
        let mut frames = input;
        if let Stage::Http(held) = &mut self.stage {
            held.extend_from_slice(input);
            let Some((len, status)) = upgrade::parse_response(held)? else {
                return Ok(());
            };
            if status != 101 {
                return Err(HeadError::Status(status).into());
            }
            rest = held.split_off(len);
            frames = &rest;
            self.stage = Stage::ServerKey;
        }
        // The decoder is lent out while frames borrow from it.
        let mut decoder = std::mem::take(&mut self.decoder);
        let result = self.handle_frames(now, &mut decoder, frames, sink);
        self.decoder = decoder;
        result
    }

    fn handle_frames(
        &mut self,
        now: Instant,
        decoder: &mut Decoder,
        mut input: &[u8],
        sink: &mut impl FnMut(Event<'_>),
    ) -> Result<(), ClientError> {
        while let Some(raw) = decoder.next(&mut input, frame::client_verdict)? {
            let body = raw.body();
            if matches!(self.stage, Stage::ServerKey) {
                if raw.kind != FrameType::SERVER_KEY {
                    return Err(FrameError::Unexpected(raw.kind).into());
                }
                let relay = frame::parse_server_key(body)?;
                self.relay = Some(relay);
                self.introduce(&relay);
                continue;
            }
            match raw.kind {
                FrameType::RECV_PACKET => {
                    if let Some((source, packet)) = frame::split_key(body) {
                        sink(Event::Packet { source, packet });
                    }
                }
                FrameType::SERVER_KEY => self.check_repeated_key(body)?,
                FrameType::SERVER_INFO => self.handle_server_info(body, now)?,
                FrameType::PING => self.answer(body),
                FrameType::PONG => {
                    if let Some(ping) = self.ping.take_if(|ping| body.starts_with(&ping.bytes)) {
                        sink(Event::Pong(now.saturating_duration_since(ping.sent)));
                    }
                }
                FrameType::PEER_GONE => {
                    if let Some((peer, reason)) = frame::parse_peer_gone(body) {
                        sink(Event::Said(Said::PeerGone { peer, reason }));
                    }
                }
                FrameType::HEALTH => {
                    let text = std::str::from_utf8(body).unwrap_or("(not text)");
                    let problem = (!text.is_empty()).then(|| text.to_owned());
                    sink(Event::Said(Said::Health(problem)));
                }
                FrameType::RESTARTING => {
                    if let Some((reconnect_in, try_for)) = frame::parse_restarting(body) {
                        sink(Event::Said(Said::Restarting {
                            reconnect_in: Duration::from_millis(u64::from(reconnect_in)),
                            try_for: Duration::from_millis(u64::from(try_for)),
                        }));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn introduce(&mut self, relay: &NodePublic) {
        info::put_client_info(
            &mut self.out,
            &self.private,
            relay,
            self.nonce,
            &ClientInfo::node(),
        );
        if self.home {
            frame::put_note_preferred(&mut self.out, true);
        }
        self.stage = Stage::Ready;
    }

    /// With fast start ServerKey only repeats what the certificate said.
    fn check_repeated_key(&self, body: &[u8]) -> Result<(), ClientError> {
        if self.relay == Some(frame::parse_server_key(body)?) {
            Ok(())
        } else {
            Err(ClientError::OtherKey)
        }
    }

    /// Answers a Ping, unless many answers wait already: the relay asks faster than it reads.
    fn answer(&mut self, body: &[u8]) {
        let waiting_few = self.out.len() < frame::PING_LEN_MAX;
        if let Some((bytes, _)) = body.split_first_chunk::<8>().filter(|_| waiting_few) {
            frame::put(&mut self.out, FrameType::PONG, &[bytes]);
        }
    }

    fn handle_server_info(&mut self, body: &[u8], now: Instant) -> Result<(), ClientError> {
        let relay = self
            .relay
            .ok_or(FrameError::Unexpected(FrameType::SERVER_INFO))?;
        let said: ServerInfo = info::open_server_info(&self.private, &relay, body)?;
        let rate = Rate {
            per_second: said.bytes_per_second,
            burst: said.bytes_burst.max(frame::PACKET_LEN_MAX as u64 + 37),
        };
        self.bucket = (rate.per_second > 0).then(|| Bucket::new(rate, now));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::derp::frame::HEADER_LEN;
    use crate::derp::testing::{live, vectors};
    use crate::testing::start;

    fn hello(relay: Option<NodePublic>, home: bool) -> Hello<'static> {
        Hello {
            host: "derp1.example.com",
            ideal_node: None,
            relay,
            home,
        }
    }

    /// Node A of the vectors, at a relay with this key if it is known.
    fn client(relay: Option<NodePublic>, home: bool, now: Instant) -> Client {
        let nonce = std::array::from_fn(|i| u8::try_from(i).unwrap());
        Client::new(vectors().private("node_a"), &hello(relay, home), nonce, now)
    }

    fn transmit(client: &mut Client) -> Vec<u8> {
        let mut out = Vec::new();
        client.poll_transmit(&mut out);
        out
    }

    fn feed(client: &mut Client, now: Instant, bytes: &[u8]) -> Result<Vec<String>, ClientError> {
        let mut events = Vec::new();
        client.handle_input(now, bytes, &mut |event| events.push(format!("{event:?}")))?;
        Ok(events)
    }

    #[test]
    fn the_slow_path_waits_for_101_and_server_key_split_at_any_byte() {
        let v = vectors();
        let now = start();
        let mut stream = v.http("response_101").into_bytes();
        stream.extend(v.derp("server_key_frame"));
        stream.extend(v.derp("server_info_frame"));
        stream.extend(v.derp("recv_packet_from_a"));
        for at in 0..=stream.len() {
            let mut client = client(None, true, now);
            assert_eq!(transmit(&mut client), v.http("request").as_bytes());
            assert!(!client.is_ready());
            let mut events = feed(&mut client, now, &stream[..at]).unwrap();
            events.extend(feed(&mut client, now, &stream[at..]).unwrap());
            let mut want = v.derp("client_info_frame");
            want.extend(v.derp("note_preferred_true"));
            assert_eq!(transmit(&mut client), want);
            assert!(client.is_ready());
            assert_eq!(events.len(), 1, "{events:?}");
        }
    }

    #[test]
    fn fast_start_says_everything_at_once() {
        let v = vectors();
        let now = start();
        let mut client = client(Some(v.public("derp_server")), false, now);
        let mut want = v.http("request_fast_start").into_bytes();
        want.extend(v.derp("client_info_frame"));
        assert_eq!(transmit(&mut client), want);
        assert!(client.is_ready());
        // A packet may come before ServerInfo.
        let mut stream = v.derp("server_key_frame");
        stream.extend(v.derp("recv_packet_from_a"));
        stream.extend(v.derp("server_info_frame"));
        assert_eq!(feed(&mut client, now, &stream).unwrap().len(), 1);
    }

    #[test]
    fn recorded_relays_are_followed_to_the_end() {
        let now = start();
        for session in live("derp-session").sessions() {
            let private: NodePrivate = session.key("client_private");
            let relay = NodePublic(session.bytes("server_public").try_into().unwrap());
            let slow = session.http("s2c");
            let mut stream = slow.clone().unwrap_or_default();
            stream.extend(session.direction("s2c").concat());
            let known = slow.is_none().then_some(relay);
            let mut client = Client::new(private, &hello(known, false), [1; 24], now);
            let events = feed(&mut client, now, &stream).unwrap();
            let packets = events.iter().filter(|e| e.starts_with("Packet")).count();
            assert_eq!(packets, session.frames("RecvPacket").len());
            let gone = events
                .iter()
                .filter(|e| e.starts_with("Said(PeerGone"))
                .count();
            assert_eq!(gone, session.frames("PeerGone").len());
            assert_eq!(client.relay(), Some(relay));
        }
    }

    #[test]
    fn pings_are_answered_and_a_silent_relay_is_asked_and_then_given_up() {
        let v = vectors();
        let start = start();
        let mut client = client(Some(v.public("derp_server")), true, start);
        transmit(&mut client);
        let said = feed(&mut client, start, &v.derp("ping")).unwrap();
        assert!(said.is_empty());
        assert_eq!(transmit(&mut client), v.derp("pong"));

        let due = client.poll_timeout();
        assert_eq!(due, start + SILENT_LIMIT);
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8];
        client.handle_timeout(due, bytes).unwrap();
        assert_eq!(transmit(&mut client), v.derp("ping"));
        // The answer arms the silence limit again; without one the relay is dead.
        let answered = due + Duration::from_millis(30);
        let events = feed(&mut client, answered, &v.derp("pong")).unwrap();
        assert_eq!(events, ["Pong(30ms)"]);
        let due = client.poll_timeout();
        assert_eq!(due, answered + SILENT_LIMIT);
        client.handle_timeout(due, [9; 8]).unwrap();
        let due = client.poll_timeout();
        assert_eq!(client.handle_timeout(due, [9; 8]), Err(ClientError::Silent));
    }

    #[test]
    fn health_restarting_and_peer_gone_are_handed_out() {
        let v = vectors();
        let now = start();
        let mut client = client(Some(v.public("derp_server")), true, now);
        let mut stream = Vec::new();
        for name in [
            "health_problem",
            "health_clear",
            "restarting_1000ms_5000ms",
            "peer_gone_b_legacy_no_reason",
            "keep_alive",
        ] {
            stream.extend(v.derp(name));
        }
        frame::put(&mut stream, FrameType(0x7f), &[&[0; 100]]);
        let events = feed(&mut client, now, &stream).unwrap();
        assert_eq!(events[0], "Said(Health(Some(\"duplicate connection\")))");
        assert_eq!(events[1], "Said(Health(None))");
        assert!(events[2].contains("1s") && events[2].contains("5s"));
        assert!(events[3].contains("Disconnected"));
        assert_eq!(events.len(), 4);
    }

    #[test]
    fn a_relay_that_is_none_is_left() {
        let v = vectors();
        let now = start();
        let says = |relay, bytes: &[u8]| feed(&mut client(relay, true, now), now, bytes);
        assert_eq!(
            says(None, b"HTTP/1.1 404 Not Found\r\n\r\n"),
            Err(HeadError::Status(404).into())
        );
        assert_eq!(
            says(None, b"\x15\x03\x03\0\x02"),
            Err(HeadError::Syntax.into())
        );
        let mut wrong = v.derp("server_key_frame");
        wrong[HEADER_LEN] ^= 1;
        let mut stream = v.http("response_101").into_bytes();
        stream.extend(&wrong);
        assert_eq!(says(None, &stream), Err(FrameError::Magic.into()));
        let mut stream = v.http("response_101").into_bytes();
        stream.extend(v.derp("keep_alive"));
        assert_eq!(
            says(None, &stream),
            Err(FrameError::Unexpected(FrameType::KEEP_ALIVE).into())
        );
        assert_eq!(
            says(Some(v.public("node_b")), &v.derp("server_key_frame")),
            Err(ClientError::OtherKey)
        );
        let relay = Some(v.public("derp_server"));
        assert!(says(relay, b"\x05\xff\xff\xff\xff").is_err());
        assert!(says(relay, b"\x01\0\0\0\x27").is_err());
    }

    #[test]
    fn a_rate_the_relay_asks_for_is_kept() {
        let v = vectors();
        let start = start();
        let server = v.private("derp_server");
        let a = v.public("node_a");
        let mut client = client(Some(server.public()), true, start);
        assert!(!client.is_limited());
        let asked = ServerInfo {
            version: 2,
            bytes_per_second: 1000,
            bytes_burst: 0,
        };
        let mut stream = Vec::new();
        info::put_server_info(&mut stream, &server, &a, [3; 24], &asked);
        feed(&mut client, start, &stream).unwrap();
        let frames = |n| std::iter::repeat_n(1000, n);
        // The burst is at least one largest packet, which is 65 such frames.
        assert_eq!(client.admit(frames(100), start), 65);
        assert_eq!(client.admit(frames(100), start), 0);
        let later = start + Duration::from_secs(10);
        assert_eq!(client.admit(frames(100), later), 10);
    }
}
