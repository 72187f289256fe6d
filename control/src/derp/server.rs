//! The relay's end of one client connection, from the end of the HTTP upgrade on.
//!
//! The machine judges frames and says what they mean; who else is connected and what waits for
//! whom is the driver's business.

use super::frame::{self, Decoder, FrameError, FrameType};
use super::info::{self, ClientInfo, InfoError, NONCE_LEN, ServerInfo};
use crate::key::{NodePrivate, NodePublic};

/// Why a client is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServerError {
    /// A frame breaks a limit, or comes before ClientInfo.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// ClientInfo does not open or parse.
    #[error("ClientInfo: {0}")]
    Info(#[from] InfoError),
    /// A frame that only a meshed relay may send.
    #[error("a frame of type {:#04x} from a client that is no meshed relay", .0.0)]
    NotMeshed(FrameType),
}

/// What a client said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Who it is, proven. Comes once and first.
    Hello {
        /// Its key and address.
        key: NodePublic,
        /// What it says of itself.
        info: ClientInfo,
    },
    /// A packet for another client; may be empty.
    Send {
        /// For whom.
        destination: NodePublic,
        /// What.
        packet: &'a [u8],
    },
    /// Whether this relay is its home.
    Preferred(bool),
    /// Asks for these bytes in a Pong.
    Ping([u8; 8]),
}

/// One client connection.
#[derive(Debug, Default)]
pub struct Session {
    decoder: Decoder,
    greeted: bool,
}

impl Session {
    /// Appends the frame the relay says first, always.
    pub fn put_greeting(out: &mut Vec<u8>, private: &NodePrivate) {
        frame::put_server_key(out, &private.public());
    }

    /// Appends the frame that answers [`Event::Hello`]. `nonce` is random.
    pub fn put_welcome(
        out: &mut Vec<u8>,
        private: &NodePrivate,
        client: &NodePublic,
        nonce: [u8; NONCE_LEN],
    ) {
        info::put_server_info(out, private, client, nonce, &ServerInfo::relay());
    }

    /// Frames of types that mean nothing here, read and thrown away.
    pub fn unknown_frames(&self) -> u64 {
        self.decoder.skipped()
    }

    /// Whether a frame has begun and not ended.
    pub fn is_inside_frame(&self) -> bool {
        self.decoder.held_bytes() > 0
    }

    /// Bytes of memory that what came of an unfinished frame takes.
    pub fn memory_bytes(&self) -> usize {
        self.decoder.memory_bytes()
    }

    /// Takes ClientInfo, once and first, from the front of `input`: who the client is, or `None` when
    /// all was taken and more is needed. For a caller that looks into that before it goes on.
    ///
    /// # Errors
    /// [`ServerError`]: close.
    pub fn handle_hello(
        &mut self,
        private: &NodePrivate,
        input: &mut &[u8],
    ) -> Result<Option<(NodePublic, ClientInfo)>, ServerError> {
        let Some(raw) = self.decoder.next(input, frame::hello_verdict)? else {
            return Ok(None);
        };
        let hello = info::open_client_info(private, raw.body())?;
        self.greeted = true;
        Ok(Some(hello))
    }

    /// Takes bytes from the client and hands what they say to `sink`; gives back the number of
    /// frames that meant something.
    ///
    /// # Errors
    /// [`ServerError`]: close. Events before it were handed out.
    pub fn handle_input(
        &mut self,
        private: &NodePrivate,
        mut input: &[u8],
        sink: &mut impl FnMut(Event<'_>),
    ) -> Result<u64, ServerError> {
        let mut frames = 0;
        if !self.greeted {
            let Some((key, info)) = self.handle_hello(private, &mut input)? else {
                return Ok(0);
            };
            frames += 1;
            sink(Event::Hello { key, info });
        }
        while let Some(raw) = self.decoder.next(&mut input, frame::server_verdict)? {
            frames += 1;
            let body = raw.body();
            match raw.kind {
                FrameType::SEND_PACKET => {
                    if let Some((destination, packet)) = frame::split_key(body) {
                        sink(Event::Send {
                            destination,
                            packet,
                        });
                    }
                }
                FrameType::NOTE_PREFERRED => sink(Event::Preferred(body != [0])),
                FrameType::PING => {
                    if let Some((bytes, _)) = body.split_first_chunk() {
                        sink(Event::Ping(*bytes));
                    }
                }
                // No relay is meshed with this one, so nobody may say these.
                other => return Err(ServerError::NotMeshed(other)),
            }
        }
        Ok(frames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::derp::testing::{live, vectors};

    fn greeted(private: &NodePrivate) -> Session {
        let mut session = Session::default();
        session
            .handle_input(private, &vectors().derp("client_info_frame"), &mut |_| ())
            .unwrap();
        assert!(session.greeted);
        session
    }

    fn feed(bytes: &[u8]) -> Result<Vec<String>, ServerError> {
        let private = vectors().private("derp_server");
        let mut events = Vec::new();
        greeted(&private)
            .handle_input(&private, bytes, &mut |event| {
                events.push(format!("{event:?}"))
            })
            .map(|_| events)
    }

    #[test]
    fn recorded_clients_are_understood_split_at_any_byte() {
        for session in live("tailscaled-as-client").sessions() {
            let private: NodePrivate = session.key("relay_private");
            let frames = session.direction("c2s");
            let stream = frames.concat();
            for at in 0..=stream.len() {
                let mut machine = Session::default();
                let mut events = 0;
                for part in [&stream[..at], &stream[at..]] {
                    machine
                        .handle_input(&private, part, &mut |_| events += 1)
                        .unwrap();
                }
                let skipped = usize::try_from(machine.unknown_frames()).unwrap();
                assert_eq!(events + skipped, frames.len());
                assert_eq!(
                    skipped,
                    session
                        .frames("Pong")
                        .iter()
                        .filter(|f| frames.contains(f))
                        .count()
                );
            }
        }
    }

    #[test]
    fn a_client_info_for_another_relay_closes() {
        let v = vectors();
        let mut session = Session::default();
        let result = session.handle_input(
            &v.private("node_b"),
            &v.derp("client_info_frame"),
            &mut |_| panic!("nothing may be said"),
        );
        assert_eq!(result, Err(InfoError::Box.into()));
        assert!(!session.greeted);
    }

    #[test]
    fn anything_before_client_info_closes() {
        let v = vectors();
        for name in ["ping", "send_packet_to_b", "keep_alive", "watch_conns"] {
            let result = Session::default().handle_input(
                &v.private("derp_server"),
                &v.derp(name),
                &mut |_| panic!("nothing may be said"),
            );
            assert!(matches!(result, Err(ServerError::Frame(_))), "{name}");
        }
    }

    #[test]
    fn frames_mean_what_the_table_says() {
        let v = vectors();
        let mut stream = v.derp("note_preferred_true");
        stream.extend(v.derp("note_preferred_false"));
        // A Ping of 28 bytes is answered with its first 8.
        frame::put(&mut stream, FrameType::PING, &[b"padded12", &[0; 20]]);
        frame::put(&mut stream, FrameType::PONG, &[&[0; 8]]);
        frame::put(&mut stream, FrameType(0x66), &[b"unknown type"]);
        frame::put_send_packet(&mut stream, &v.public("node_b"), &[]);
        let events = feed(&stream).unwrap();
        assert_eq!(events[0], "Preferred(true)");
        assert_eq!(events[1], "Preferred(false)");
        assert_eq!(events[2], format!("{:?}", Event::Ping(*b"padded12")));
        assert!(events[3].starts_with("Send"));
        assert_eq!(events.len(), 4);
    }

    #[test]
    fn broken_limits_and_mesh_frames_close() {
        let v = vectors();
        for session in [1_u8, 2] {
            let len = if session == 1 { 31 } else { 32 + 65_537 };
            let mut stream = Vec::new();
            frame::put(&mut stream, FrameType::SEND_PACKET, &[&vec![0; len]]);
            assert!(matches!(feed(&stream), Err(ServerError::Frame(_))));
        }
        assert!(feed(b"\x04\xff\xff\xff\xff").is_err());
        for name in ["watch_conns", "close_peer_b", "forward_packet_a_to_b"] {
            assert!(
                matches!(feed(&v.derp(name)), Err(ServerError::NotMeshed(_))),
                "{name}"
            );
        }
        let recorded = &live("derp-session").sessions()[2];
        let last = recorded.frames("SendPacket").pop().unwrap();
        assert!(feed(&last).is_err());
    }
}
