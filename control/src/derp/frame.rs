//! Frames: `type (1) | length (4, big-endian) | body (length)`, and their incremental decoder.
//!
//! The decoder judges a length as soon as the five header bytes are there, before anything of the
//! body is kept, so a frame that announces 4 GiB costs nothing. A frame that lies whole in the
//! input is handed out where it lies; only one that is split between two inputs is collected.

use crate::key::{KEY_LEN, NodePublic};

/// Length of the header in front of every body.
pub const HEADER_LEN: usize = 5;

/// The largest packet in SendPacket, ForwardPacket and RecvPacket, without the keys.
pub const PACKET_LEN_MAX: usize = 65_536;

/// The largest frame body a client accepts.
pub const CLIENT_FRAME_LEN_MAX: usize = 1 << 20;

/// The largest ServerKey body a client accepts.
pub const SERVER_KEY_LEN_MAX: usize = 1 << 10;

/// The largest ClientInfo body a relay accepts.
pub const CLIENT_INFO_LEN_MAX: usize = 256 << 10;

/// The shortest ClientInfo body: key and nonce (the box is judged when it is opened).
pub const CLIENT_INFO_LEN_MIN: usize = KEY_LEN + 24;

/// The longest Ping body a receiver tolerates.
pub const PING_LEN_MAX: usize = 1000;

/// The bytes of a Ping that are echoed.
pub const PING_LEN: usize = 8;

/// The type byte of a frame; any value is possible on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameType(pub u8);

impl FrameType {
    /// Relay to client: magic and the relay's public key.
    pub const SERVER_KEY: Self = Self(0x01);
    /// Client to relay: who the client is, with a sealed JSON object.
    pub const CLIENT_INFO: Self = Self(0x02);
    /// Relay to client: a sealed JSON object.
    pub const SERVER_INFO: Self = Self(0x03);
    /// Client to relay: destination key, packet.
    pub const SEND_PACKET: Self = Self(0x04);
    /// Relay to client: source key, packet.
    pub const RECV_PACKET: Self = Self(0x05);
    /// Relay to client: empty, no answer.
    pub const KEEP_ALIVE: Self = Self(0x06);
    /// Client to relay: 1 if this is the client's home, else 0.
    pub const NOTE_PREFERRED: Self = Self(0x07);
    /// Relay to client: a key that left or was never there, and which of both.
    pub const PEER_GONE: Self = Self(0x08);
    /// Meshed relay to relay: source key, destination key, packet.
    pub const FORWARD_PACKET: Self = Self(0x0a);
    /// Meshed relay to relay: asks for PeerPresent and PeerGone of every key.
    pub const WATCH_CONNS: Self = Self(0x10);
    /// Meshed relay to relay: close all connections of a key.
    pub const CLOSE_PEER: Self = Self(0x11);
    /// Both directions: 8 bytes to echo.
    pub const PING: Self = Self(0x12);
    /// Both directions: the echo.
    pub const PONG: Self = Self(0x13);
    /// Relay to client: a problem in words, or empty when it is over.
    pub const HEALTH: Self = Self(0x14);
    /// Relay to client: reconnect-in and try-for, both in milliseconds.
    pub const RESTARTING: Self = Self(0x15);
}

/// Why a stream of frames cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The announced length is outside what this type may have.
    #[error("a frame of type {:#04x} announces {len} bytes", kind.0)]
    Length {
        /// The frame's type.
        kind: FrameType,
        /// The announced body length in bytes.
        len: u32,
    },
    /// The relay's first frame is not a ServerKey.
    #[error("the first frame has type {:#04x}, not the wanted one", .0.0)]
    Unexpected(FrameType),
    /// The ServerKey body has another magic.
    #[error("not a DERP relay: wrong magic in its first frame")]
    Magic,
}

/// What to do with a frame whose header has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Hand out its body.
    Take,
    /// Read and forget its body, whatever its length.
    Skip,
    /// The stream is over.
    Refuse,
}

/// What a client does with each frame type and length (the limits of derp.go and derp_client.go).
pub fn client_verdict(kind: FrameType, len: usize) -> Verdict {
    let fits = match kind {
        FrameType::SERVER_KEY => (MAGIC_AND_KEY_LEN..=SERVER_KEY_LEN_MAX).contains(&len),
        FrameType::SERVER_INFO => (24..=24 + CLIENT_FRAME_LEN_MAX).contains(&len),
        FrameType::RECV_PACKET => (KEY_LEN..=KEY_LEN + PACKET_LEN_MAX).contains(&len),
        FrameType::KEEP_ALIVE
        | FrameType::PEER_GONE
        | FrameType::PING
        | FrameType::PONG
        | FrameType::HEALTH
        | FrameType::RESTARTING => len <= CLIENT_FRAME_LEN_MAX,
        _ if len <= CLIENT_FRAME_LEN_MAX => return Verdict::Skip,
        _ => false,
    };
    if fits { Verdict::Take } else { Verdict::Refuse }
}

/// What a relay does with each frame type and length after ClientInfo (derpserver).
pub fn server_verdict(kind: FrameType, len: usize) -> Verdict {
    let fits = match kind {
        FrameType::SEND_PACKET => (KEY_LEN..=KEY_LEN + PACKET_LEN_MAX).contains(&len),
        FrameType::FORWARD_PACKET => (2 * KEY_LEN..=2 * KEY_LEN + PACKET_LEN_MAX).contains(&len),
        FrameType::NOTE_PREFERRED => len == 1,
        FrameType::WATCH_CONNS => len == 0,
        FrameType::CLOSE_PEER => len == KEY_LEN,
        FrameType::PING => (PING_LEN..=PING_LEN_MAX).contains(&len),
        _ => return Verdict::Skip,
    };
    if fits { Verdict::Take } else { Verdict::Refuse }
}

/// What a relay does with frames before ClientInfo: only that one is allowed.
pub fn hello_verdict(kind: FrameType, len: usize) -> Verdict {
    let fits = kind == FrameType::CLIENT_INFO
        && (CLIENT_INFO_LEN_MIN..=CLIENT_INFO_LEN_MAX).contains(&len);
    if fits { Verdict::Take } else { Verdict::Refuse }
}

/// Memory for split frames that a decoder keeps between them: those of one packet fit.
const CARRY_KEPT: usize = 4 << 10;

const MAGIC_AND_KEY_LEN: usize = super::MAGIC.len() + KEY_LEN;

/// One whole frame, header included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawFrame<'a> {
    /// The type.
    pub kind: FrameType,
    /// Header and body as they came.
    pub whole: &'a [u8],
}

impl<'a> RawFrame<'a> {
    /// The bytes behind the header.
    pub fn body(&self) -> &'a [u8] {
        &self.whole[HEADER_LEN..]
    }
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The beginning of a frame whose rest has not come; empty between frames.
    carry: Vec<u8>,
    /// The frame in `carry` was handed out and is forgotten at the next call.
    spent: bool,
    /// Bytes of a skipped body that have not come.
    skip: u64,
    /// Frames that were skipped.
    skipped: u64,
}

impl Decoder {
    /// Takes the next whole frame from the front of `input`, or `None` once `input` is used up.
    ///
    /// `verdict` is asked once per frame with its type and length. Frames it skips are dropped
    /// and counted in [`Decoder::skipped`].
    ///
    /// # Errors
    /// [`FrameError::Length`] when `verdict` refuses; the decoder is of no use after it.
    pub fn next<'s, 'i: 's>(
        &'s mut self,
        input: &mut &'i [u8],
        verdict: impl Fn(FrameType, usize) -> Verdict,
    ) -> Result<Option<RawFrame<'s>>, FrameError> {
        if self.spent {
            self.spent = false;
            self.carry.clear();
            // One large frame must not pin its memory for the connection's life.
            self.carry.shrink_to(CARRY_KEPT);
        }
        loop {
            if self.skip > 0 {
                let part = usize::try_from(self.skip).map_or(input.len(), |n| n.min(input.len()));
                *input = &input[part..];
                self.skip -= part as u64;
                if self.skip > 0 {
                    return Ok(None);
                }
            }
            if self.carry.is_empty() {
                let Some((kind, len)) = header(input) else {
                    self.fill(input, HEADER_LEN);
                    return Ok(None);
                };
                if !self.takes(kind, len, &verdict)? {
                    *input = &input[HEADER_LEN..];
                    continue;
                }
                let whole_len = HEADER_LEN + len as usize;
                if let Some((whole, rest)) = input.split_at_checked(whole_len) {
                    *input = rest;
                    return Ok(Some(RawFrame { kind, whole }));
                }
                self.fill(input, whole_len);
                return Ok(None);
            }
            if self.carry.len() < HEADER_LEN {
                self.fill(input, HEADER_LEN);
                let Some((kind, len)) = header(&self.carry) else {
                    return Ok(None);
                };
                if !self.takes(kind, len, &verdict)? {
                    self.carry.clear();
                    continue;
                }
            }
            let Some((kind, len)) = header(&self.carry) else {
                return Ok(None);
            };
            self.fill(input, HEADER_LEN + len as usize);
            if self.carry.len() < HEADER_LEN + len as usize {
                return Ok(None);
            }
            self.spent = true;
            return Ok(Some(RawFrame {
                kind,
                whole: &self.carry,
            }));
        }
    }

    /// Frames skipped so far.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Bytes of memory the decoder takes.
    pub fn memory_bytes(&self) -> usize {
        self.carry.capacity()
    }

    /// Bytes the decoder holds of a frame that is not complete.
    pub fn held_bytes(&self) -> usize {
        if self.spent { 0 } else { self.carry.len() }
    }

    /// Whether a frame is wanted; the body of one that is not is skipped from here on.
    fn takes(
        &mut self,
        kind: FrameType,
        len: u32,
        verdict: impl Fn(FrameType, usize) -> Verdict,
    ) -> Result<bool, FrameError> {
        match verdict(kind, len as usize) {
            Verdict::Refuse => Err(FrameError::Length { kind, len }),
            Verdict::Skip => {
                self.skipped += 1;
                self.skip = u64::from(len);
                Ok(false)
            }
            Verdict::Take => Ok(true),
        }
    }

    fn fill(&mut self, input: &mut &[u8], want: usize) {
        let part = (want - self.carry.len()).min(input.len());
        let (head, rest) = input.split_at(part);
        self.carry.extend_from_slice(head);
        *input = rest;
    }
}

/// Type and body length of the frame at the front of `bytes`, if its header is there.
pub fn header(bytes: &[u8]) -> Option<(FrameType, u32)> {
    let (head, _) = bytes.split_first_chunk::<HEADER_LEN>()?;
    let [kind, len @ ..] = *head;
    Some((FrameType(kind), u32::from_be_bytes(len)))
}

/// A header for a body of `len` bytes.
///
/// # Panics
/// Above 4 GiB, which nothing here builds.
pub fn encode_header(kind: FrameType, len: usize) -> [u8; HEADER_LEN] {
    let len = u32::try_from(len).expect("bodies are bounded far below 4 GiB");
    let [a, b, c, d] = len.to_be_bytes();
    [kind.0, a, b, c, d]
}

/// Appends a frame whose body is the given parts in order.
pub fn put(out: &mut Vec<u8>, kind: FrameType, parts: &[&[u8]]) {
    let len = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&encode_header(kind, len));
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// Splits a body that begins with a node key (SendPacket, RecvPacket, PeerGone, ClosePeer).
pub fn split_key(body: &[u8]) -> Option<(NodePublic, &[u8])> {
    let (key, rest) = body.split_first_chunk::<KEY_LEN>()?;
    Some((NodePublic(*key), rest))
}

/// Why a relay says that a peer is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerGoneReason {
    /// It was connected and left the region (0x00, also meant by a frame without reason).
    Disconnected,
    /// The relay does not know it (0x01).
    NotHere,
    /// A reason of a newer relay.
    Other(u8),
}

impl PeerGoneReason {
    /// From the wire.
    pub fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Disconnected,
            1 => Self::NotHere,
            other => Self::Other(other),
        }
    }

    /// To the wire.
    pub fn to_byte(self) -> u8 {
        match self {
            Self::Disconnected => 0,
            Self::NotHere => 1,
            Self::Other(other) => other,
        }
    }
}

/// Appends a ServerKey frame: magic, key.
pub fn put_server_key(out: &mut Vec<u8>, key: &NodePublic) {
    put(out, FrameType::SERVER_KEY, &[&super::MAGIC, &key.0]);
}

/// The key of a ServerKey body; bytes behind it are for the future.
///
/// # Errors
/// [`FrameError::Magic`], [`FrameError::Length`].
pub fn parse_server_key(body: &[u8]) -> Result<NodePublic, FrameError> {
    let rest = body.strip_prefix(&super::MAGIC).ok_or(FrameError::Magic)?;
    let (key, _) = split_key(rest).ok_or_else(|| FrameError::Length {
        kind: FrameType::SERVER_KEY,
        len: u32::try_from(body.len()).unwrap_or(u32::MAX),
    })?;
    Ok(key)
}

/// Appends a SendPacket frame: destination, packet.
pub fn put_send_packet(out: &mut Vec<u8>, destination: &NodePublic, packet: &[u8]) {
    put(out, FrameType::SEND_PACKET, &[&destination.0, packet]);
}

/// Appends a RecvPacket frame: source, packet.
pub fn put_recv_packet(out: &mut Vec<u8>, source: &NodePublic, packet: &[u8]) {
    put(out, FrameType::RECV_PACKET, &[&source.0, packet]);
}

/// Appends a NotePreferred frame.
pub fn put_note_preferred(out: &mut Vec<u8>, home: bool) {
    put(out, FrameType::NOTE_PREFERRED, &[&[u8::from(home)]]);
}

/// Appends a PeerGone frame: key, reason.
pub fn put_peer_gone(out: &mut Vec<u8>, peer: &NodePublic, reason: PeerGoneReason) {
    put(out, FrameType::PEER_GONE, &[&peer.0, &[reason.to_byte()]]);
}

/// Key and reason of a PeerGone body; one without reason is the old form.
pub fn parse_peer_gone(body: &[u8]) -> Option<(NodePublic, PeerGoneReason)> {
    let (key, rest) = split_key(body)?;
    let reason = rest.first().copied().unwrap_or(0);
    Some((key, PeerGoneReason::from_byte(reason)))
}

/// Reconnect-in and try-for of a Restarting body, in milliseconds.
pub fn parse_restarting(body: &[u8]) -> Option<(u32, u32)> {
    let (reconnect_in, rest) = body.split_first_chunk::<4>()?;
    let (try_for, _) = rest.split_first_chunk::<4>()?;
    Some((
        u32::from_be_bytes(*reconnect_in),
        u32::from_be_bytes(*try_for),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::derp::testing::{live, vectors};

    fn take_all(_: FrameType, _: usize) -> Verdict {
        Verdict::Take
    }

    fn cut(
        pieces: &[&[u8]],
        verdict: impl Fn(FrameType, usize) -> Verdict,
    ) -> Result<Vec<Vec<u8>>, FrameError> {
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for piece in pieces {
            let mut input = *piece;
            while let Some(frame) = decoder.next(&mut input, &verdict)? {
                frames.push(frame.whole.to_vec());
            }
        }
        Ok(frames)
    }

    #[test]
    fn every_vector_frame_is_built_and_read_as_published() {
        let v = vectors();
        let hex = |name: &str| v.derp(name);
        let (a, b) = (v.public("node_a"), v.public("node_b"));
        let wireguard = hex::decode("04000000deadbeef").unwrap();
        let mut out = Vec::new();
        let mut built = |f: &dyn Fn(&mut Vec<u8>)| {
            out.clear();
            f(&mut out);
            out.clone()
        };
        assert_eq!(
            built(&|o| put_server_key(o, &v.public("derp_server"))),
            hex("server_key_frame")
        );
        assert_eq!(
            built(&|o| put_send_packet(o, &b, &wireguard)),
            hex("send_packet_to_b")
        );
        assert_eq!(
            built(&|o| put_recv_packet(o, &a, &wireguard)),
            hex("recv_packet_from_a")
        );
        assert_eq!(
            built(&|o| put(o, FrameType::FORWARD_PACKET, &[&a.0, &b.0, &wireguard])),
            hex("forward_packet_a_to_b")
        );
        assert_eq!(
            built(&|o| put(o, FrameType::KEEP_ALIVE, &[])),
            hex("keep_alive")
        );
        assert_eq!(
            built(&|o| put_note_preferred(o, true)),
            hex("note_preferred_true")
        );
        assert_eq!(
            built(&|o| put_note_preferred(o, false)),
            hex("note_preferred_false")
        );
        for (name, reason) in [
            ("peer_gone_b_disconnected", PeerGoneReason::Disconnected),
            ("peer_gone_b_not_here", PeerGoneReason::NotHere),
        ] {
            assert_eq!(built(&|o| put_peer_gone(o, &b, reason)), hex(name));
            assert_eq!(parse_peer_gone(&hex(name)[HEADER_LEN..]), Some((b, reason)));
        }
        assert_eq!(
            parse_peer_gone(&hex("peer_gone_b_legacy_no_reason")[HEADER_LEN..]),
            Some((b, PeerGoneReason::Disconnected))
        );
        assert_eq!(
            parse_restarting(&hex("restarting_1000ms_5000ms")[HEADER_LEN..]),
            Some((1000, 5000))
        );
        assert_eq!(
            parse_server_key(&hex("server_key_frame")[HEADER_LEN..]),
            Ok(v.public("derp_server"))
        );
        assert!(is_disco_send(&hex("send_packet_disco_call_me_maybe_to_b")));
        assert!(!is_disco_send(&hex("send_packet_to_b")));
    }

    fn is_disco_send(frame: &[u8]) -> bool {
        let (_, packet) = split_key(&frame[HEADER_LEN..]).unwrap();
        crate::derp::is_disco(packet)
    }

    #[test]
    fn a_recorded_stream_split_at_any_byte_gives_the_same_frames() {
        for name in ["derp-session", "tailscaled-as-client"] {
            for stream in live(name).frame_streams() {
                let whole: Vec<u8> = stream.concat();
                assert_eq!(cut(&[&whole], take_all).unwrap(), stream);
                for at in 0..=whole.len() {
                    let (head, tail) = whole.split_at(at);
                    assert_eq!(
                        cut(&[head, tail], take_all).unwrap(),
                        stream,
                        "split at {at}"
                    );
                }
                let bytes: Vec<&[u8]> = whole.chunks(1).collect();
                assert_eq!(cut(&bytes, take_all).unwrap(), stream);
            }
        }
    }

    #[test]
    fn the_limits_of_the_table_hold_for_a_client() {
        use Verdict::{Refuse, Skip, Take};
        let rows = [
            (FrameType::SERVER_KEY, 39, Refuse),
            (FrameType::SERVER_KEY, 40, Take),
            (FrameType::SERVER_KEY, 1024, Take),
            (FrameType::SERVER_KEY, 1025, Refuse),
            (FrameType::SERVER_INFO, 23, Refuse),
            (FrameType::SERVER_INFO, 24 + (1 << 20), Take),
            (FrameType::SERVER_INFO, 25 + (1 << 20), Refuse),
            (FrameType::RECV_PACKET, 31, Refuse),
            (FrameType::RECV_PACKET, 32, Take),
            (FrameType::RECV_PACKET, 32 + 65_536, Take),
            (FrameType::RECV_PACKET, 33 + 65_536, Refuse),
            (FrameType(0x7f), 1 << 20, Skip),
            (FrameType(0x7f), (1 << 20) + 1, Refuse),
            (FrameType::KEEP_ALIVE, 0xffff_ffff, Refuse),
        ];
        for (kind, len, want) in rows {
            assert_eq!(client_verdict(kind, len), want, "{kind:?} {len}");
        }
    }

    #[test]
    fn the_limits_of_the_table_hold_for_a_relay() {
        use Verdict::{Refuse, Skip, Take};
        let rows = [
            (FrameType::SEND_PACKET, 31, Refuse),
            (FrameType::SEND_PACKET, 32, Take),
            (FrameType::SEND_PACKET, 32 + 65_536, Take),
            (FrameType::SEND_PACKET, 32 + 65_537, Refuse),
            (FrameType::SEND_PACKET, 0xffff_ffff, Refuse),
            (FrameType::FORWARD_PACKET, 63, Refuse),
            (FrameType::FORWARD_PACKET, 64 + 65_536, Take),
            (FrameType::FORWARD_PACKET, 65 + 65_536, Refuse),
            (FrameType::NOTE_PREFERRED, 0, Refuse),
            (FrameType::NOTE_PREFERRED, 1, Take),
            (FrameType::NOTE_PREFERRED, 2, Refuse),
            (FrameType::WATCH_CONNS, 1, Refuse),
            (FrameType::CLOSE_PEER, 33, Refuse),
            (FrameType::PING, 7, Refuse),
            (FrameType::PING, 8, Take),
            (FrameType::PING, 1000, Take),
            (FrameType::PING, 1001, Refuse),
            (FrameType::PONG, 3, Skip),
            (FrameType::CLIENT_INFO, 9, Skip),
            (FrameType(0xff), 0xffff_ffff, Skip),
        ];
        for (kind, len, want) in rows {
            assert_eq!(server_verdict(kind, len), want, "{kind:?} {len}");
        }
        assert_eq!(hello_verdict(FrameType::CLIENT_INFO, 55), Refuse);
        assert_eq!(hello_verdict(FrameType::CLIENT_INFO, 56), Take);
        assert_eq!(hello_verdict(FrameType::CLIENT_INFO, 256 << 10), Take);
        assert_eq!(
            hello_verdict(FrameType::CLIENT_INFO, (256 << 10) + 1),
            Refuse
        );
        assert_eq!(hello_verdict(FrameType::PING, 8), Refuse);
    }

    #[test]
    fn four_gib_are_refused_by_their_header_alone() {
        let mut decoder = Decoder::default();
        let mut input: &[u8] = &[0x04, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(
            decoder.next(&mut input, server_verdict),
            Err(FrameError::Length {
                kind: FrameType::SEND_PACKET,
                len: u32::MAX
            })
        );
        assert_eq!(decoder.held_bytes(), 0);
    }

    #[test]
    fn an_unknown_frame_is_skipped_without_being_kept_and_the_stream_stays_in_sync() {
        let mut stream = Vec::new();
        put(&mut stream, FrameType(0x7f), &[&[9; 100]]);
        put(&mut stream, FrameType(0xff), &[&vec![7; 2_000_000]]);
        put(&mut stream, FrameType::PING, &[b"12345678"]);
        for size in [1, 3, 4096, stream.len()] {
            let pieces: Vec<&[u8]> = stream.chunks(size).collect();
            let frames = cut(&pieces, server_verdict).unwrap();
            assert_eq!(frames, [b"\x12\0\0\0\x0812345678".to_vec()]);
        }
        let mut decoder = Decoder::default();
        let mut input: &[u8] = &stream[..1_000_000];
        assert_eq!(decoder.next(&mut input, server_verdict), Ok(None));
        assert_eq!(decoder.held_bytes(), 0);
        assert_eq!(decoder.skipped(), 2);
    }

    #[test]
    fn a_wrong_magic_is_not_a_relay() {
        let mut frame = vectors().derp("server_key_frame");
        frame[HEADER_LEN] ^= 1;
        assert_eq!(
            parse_server_key(&frame[HEADER_LEN..]),
            Err(FrameError::Magic)
        );
    }

    #[test]
    fn random_bytes_never_panic_and_never_hold_more_than_one_frame() {
        use rand::{Rng as _, RngExt as _, SeedableRng as _};
        let mut rng = rand::rngs::SmallRng::seed_from_u64(7);
        for _ in 0..2000 {
            let mut bytes = vec![0; rng.random_range(0..4000)];
            rng.fill_bytes(&mut bytes);
            // Mostly known types with small lengths, so that the decoder gets further.
            for chunk in bytes.chunks_mut(64) {
                chunk[0] %= 0x18;
                chunk[1..].iter_mut().take(3).for_each(|b| *b = 0);
            }
            let mut decoder = Decoder::default();
            let mut input = &bytes[..];
            while let Ok(Some(_)) = decoder.next(&mut input, server_verdict) {}
            assert!(decoder.held_bytes() <= HEADER_LEN + 2 * KEY_LEN + PACKET_LEN_MAX);
        }
    }
}
