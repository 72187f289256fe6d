//! The early payload: what a server may say before its first HTTP/2 byte.
//!
//! Five bytes of magic, a u32 big-endian length, JSON. Spread over any number of records, and
//! optional: without the magic the same nine bytes are the head of an HTTP/2 SETTINGS frame.

use bytes::{Buf as _, BufMut as _, BytesMut};

use super::Error;

/// What an early payload begins with.
pub const EARLY_MAGIC: [u8; 5] = *b"\xff\xff\xffTS";

/// JSON of an early payload at most, in bytes; a node key challenge is 95.
pub const EARLY_JSON_LEN_MAX: usize = 16 * 1024;

const HEAD_LEN: usize = EARLY_MAGIC.len() + 4;

/// Takes the early payload out of the front of a plaintext stream.
#[derive(Debug, Default)]
pub struct EarlyPayload {
    done: bool,
}

impl EarlyPayload {
    /// Whether what is in `plaintext` from now on belongs to HTTP/2. Call it again with more
    /// appended as long as it says no.
    ///
    /// # Errors
    /// [`Error::Length`] when the payload announces more than [`EARLY_JSON_LEN_MAX`].
    pub fn strip(&mut self, plaintext: &mut BytesMut) -> Result<bool, Error> {
        if self.done {
            return Ok(true);
        }
        let common = plaintext.len().min(EARLY_MAGIC.len());
        if plaintext[..common] != EARLY_MAGIC[..common] {
            self.done = true;
            return Ok(true);
        }
        let Some(head) = plaintext.first_chunk::<HEAD_LEN>() else {
            return Ok(false);
        };
        let len = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > EARLY_JSON_LEN_MAX {
            return Err(Error::Length(len));
        }
        if plaintext.len() < HEAD_LEN + len {
            return Ok(false);
        }
        // The challenge inside is used by no client and asks for no reply.
        plaintext.advance(HEAD_LEN + len);
        self.done = true;
        Ok(true)
    }
}

/// The early payload that carries this JSON.
pub fn encode_early(json: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(HEAD_LEN + json.len());
    out.put_slice(&EARLY_MAGIC);
    out.put_u32(u32::try_from(json.len()).expect("a challenge is short"));
    out.put_slice(json);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

    #[test]
    fn it_is_taken_out_wherever_it_is_split() {
        let mut stream = encode_early(br#"{"nodeKeyChallenge":"chalpub:00"}"#);
        stream.extend_from_slice(&SETTINGS);
        for at in 0..=stream.len() {
            let mut early = EarlyPayload::default();
            let mut plaintext = BytesMut::from(&stream[..at]);
            early.strip(&mut plaintext).unwrap();
            plaintext.extend_from_slice(&stream[at..]);
            assert!(early.strip(&mut plaintext).unwrap());
            assert_eq!(plaintext[..], SETTINGS, "split at {at}");
        }
        let (mut early, mut plaintext) = (EarlyPayload::default(), BytesMut::new());
        for byte in &stream {
            plaintext.extend_from_slice(&[*byte]);
            early.strip(&mut plaintext).unwrap();
        }
        assert_eq!(plaintext[..], SETTINGS, "byte by byte");
    }

    #[test]
    fn without_it_nothing_is_lost() {
        let mut early = EarlyPayload::default();
        let mut plaintext = BytesMut::from(&SETTINGS[..]);
        assert!(early.strip(&mut plaintext).unwrap());
        assert_eq!(plaintext[..], SETTINGS);
        // A later magic is data.
        let mut later = encode_early(b"{}");
        assert!(early.strip(&mut later).unwrap());
        assert_eq!(later[..], encode_early(b"{}")[..]);
    }

    #[test]
    fn an_oversized_announcement_is_refused() {
        let mut plaintext = BytesMut::from(&EARLY_MAGIC[..]);
        plaintext.put_u32(10 * 1024 * 1024 + 1);
        let refused = EarlyPayload::default().strip(&mut plaintext);
        assert_eq!(refused, Err(Error::Length(10 * 1024 * 1024 + 1)));
    }
}
