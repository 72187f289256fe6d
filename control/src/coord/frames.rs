//! Messages on the body of a map stream: u32 little-endian length, then JSON, plain or as one
//! zstd frame (`protocol/coordination-map.md` §2).

use std::io::Read as _;

use bytes::{Buf as _, BytesMut};

use crate::netmap::wire::MapResponse;

/// A message on the wire at most, in bytes.
pub const MESSAGE_LEN_MAX: usize = 64 << 20;

/// A message after decompression at most, in bytes.
pub const JSON_LEN_MAX: u64 = 256 << 20;

/// zstd level: the least work; maps compress well at any.
const ZSTD_LEVEL: i32 = 1;

/// How messages of a stream are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Codec {
    /// Not at all.
    #[default]
    Plain,
    /// One independent zstd frame per message.
    Zstd,
}

/// Why a stream of messages cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The announced length is over the limit.
    #[error("a message of {0} bytes is over the limit")]
    TooLong(usize),
    /// zstd says no, or the result would be too long.
    #[error("cannot decompress a message: {0}")]
    Zstd(std::io::Error),
    /// The JSON is not a map response.
    #[error("cannot read a message: {0}")]
    Json(serde_json::Error),
}

/// Puts messages together from the pieces of a body.
#[derive(Debug)]
pub struct FrameReader {
    codec: Codec,
    buffer: BytesMut,
}

impl FrameReader {
    /// For a new body.
    pub fn new(codec: Codec) -> Self {
        Self {
            codec,
            buffer: BytesMut::new(),
        }
    }

    /// Takes a piece of the body.
    pub fn handle_bytes(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete message.
    ///
    /// # Errors
    /// The stream is useless after any.
    pub fn poll_message(&mut self) -> Result<Option<MapResponse>, FrameError> {
        let Some(head) = self.buffer.first_chunk::<4>() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_le_bytes(*head)).unwrap_or(usize::MAX);
        if len > MESSAGE_LEN_MAX {
            return Err(FrameError::TooLong(len));
        }
        if self.buffer.len() < 4 + len {
            return Ok(None);
        }
        self.buffer.advance(4);
        let message = self.buffer.split_to(len);
        let parsed = match self.codec {
            Codec::Plain => serde_json::from_slice(&message),
            Codec::Zstd => serde_json::from_slice(&decompress(&message)?),
        };
        parsed.map(Some).map_err(FrameError::Json)
    }
}

fn decompress(message: &[u8]) -> Result<Vec<u8>, FrameError> {
    let decoder = zstd::stream::read::Decoder::with_buffer(message).map_err(FrameError::Zstd)?;
    let mut json = Vec::new();
    let read = decoder
        .single_frame()
        .take(JSON_LEN_MAX + 1)
        .read_to_end(&mut json);
    let len = read.map_err(FrameError::Zstd)?;
    if len as u64 > JSON_LEN_MAX {
        return Err(FrameError::TooLong(len));
    }
    Ok(json)
}

/// One message, framed.
///
/// # Errors
/// When the message cannot be written as JSON or grows over the limit.
pub fn encode(codec: Codec, message: &MapResponse) -> Result<Vec<u8>, FrameError> {
    let json = serde_json::to_vec(message).map_err(FrameError::Json)?;
    let body = match codec {
        Codec::Plain => json,
        Codec::Zstd => zstd::bulk::compress(&json, ZSTD_LEVEL).map_err(FrameError::Zstd)?,
    };
    if body.len() > MESSAGE_LEN_MAX {
        return Err(FrameError::TooLong(body.len()));
    }
    let len = u32::try_from(body.len()).map_err(|_| FrameError::TooLong(body.len()))?;
    let mut out = Vec::with_capacity(4 + body.len());
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&body);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn recorded_frames_of_headscale_hold_the_recorded_messages() {
        let text = include_str!("../../tests/vectors/coordination/map-frames.json");
        let recorded: Value = serde_json::from_str(text).unwrap();
        let messages = recorded["messages"].as_array().unwrap();
        let stream: Vec<u8> = messages
            .iter()
            .flat_map(|message| hex::decode(message["hex"].as_str().unwrap()).unwrap())
            .collect();
        for piece_len in [1, 7, 1000, stream.len()] {
            let mut reader = FrameReader::new(Codec::Zstd);
            let mut seen = Vec::new();
            for piece in stream.chunks(piece_len) {
                reader.handle_bytes(piece);
                while let Some(message) = reader.poll_message().unwrap() {
                    seen.push(message);
                }
            }
            assert_eq!(seen.len(), messages.len());
            for (message, recorded) in seen.iter().zip(messages) {
                let want: MapResponse = serde_json::from_value(recorded["json"].clone()).unwrap();
                assert_eq!(*message, want);
            }
        }
    }

    #[test]
    fn the_keep_alive_of_the_vectors_is_written_and_read() {
        let text = include_str!("../../tests/vectors/coordination-vectors.json");
        let vectors: Value = serde_json::from_str(text).unwrap();
        let keep_alive = MapResponse {
            keep_alive: true,
            ..MapResponse::default()
        };
        let frame = encode(Codec::Plain, &keep_alive).unwrap();
        assert_eq!(
            hex::encode(&frame),
            vectors["map_framing"]["bytes"].as_str().unwrap()
        );
        for codec in [Codec::Plain, Codec::Zstd] {
            let mut reader = FrameReader::new(codec);
            reader.handle_bytes(&encode(codec, &keep_alive).unwrap());
            assert_eq!(reader.poll_message().unwrap(), Some(keep_alive.clone()));
            assert_eq!(reader.poll_message().unwrap(), None);
        }
    }

    #[test]
    fn oversized_broken_and_exploding_messages_are_refused() {
        let read = |codec, bytes: &[u8]| {
            let mut reader = FrameReader::new(codec);
            reader.handle_bytes(bytes);
            reader.poll_message()
        };
        assert!(matches!(
            read(Codec::Plain, &[0xff; 8]),
            Err(FrameError::TooLong(_))
        ));
        assert!(matches!(
            read(Codec::Plain, b"\x02\0\0\0]]"),
            Err(FrameError::Json(_))
        ));
        assert!(matches!(
            read(Codec::Zstd, b"\x04\0\0\0abcd"),
            Err(FrameError::Zstd(_))
        ));
        let mut deep = vec![0, 0, 1, 0];
        deep.extend(vec![b'['; 65_536]);
        assert!(matches!(
            read(Codec::Plain, &deep),
            Err(FrameError::Json(_))
        ));
        // Some 300 MB of spaces in a few kilobytes.
        let bomb = zstd::bulk::compress(&vec![b' '; 300 << 20], 1).unwrap();
        let mut frame = u32::try_from(bomb.len()).unwrap().to_le_bytes().to_vec();
        frame.extend(bomb);
        assert!(matches!(
            read(Codec::Zstd, &frame),
            Err(FrameError::TooLong(_))
        ));
    }
}
