//! Records: the byte stream of a session, cut, sealed and framed.
//!
//! A record is type 4, length u16 big-endian, ciphertext with its 16-byte tag; 4096 bytes at
//! most. The nonce is four zero bytes and the record's counter as big-endian u64, one counter per
//! direction. Records have no relation to what they carry.

use bytes::{Buf as _, BytesMut};
use chacha20poly1305::aead::{AeadInOut as _, KeyInit as _};
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce, Tag};
use zeroize::Zeroizing;

use super::{Error, HEADER_LEN, PLAINTEXT_LEN_MAX, RECORD_LEN_MAX, TAG_LEN, TYPE_RECORD};
use crate::key::KEY_LEN;

/// One direction's key and counter.
struct Cipher {
    aead: ChaCha20Poly1305,
    counter: u64,
    /// For the tests, which compare keys and not only what they produce.
    #[cfg(test)]
    key: Zeroizing<[u8; KEY_LEN]>,
}

impl Cipher {
    fn new(key: &Zeroizing<[u8; KEY_LEN]>) -> Self {
        Self {
            aead: ChaCha20Poly1305::new(&Key::from(**key)),
            counter: 0,
            #[cfg(test)]
            key: key.clone(),
        }
    }

    /// The nonce of the next record; the last counter is never used.
    fn next_nonce(&mut self) -> Result<Nonce, Error> {
        if self.counter == u64::MAX {
            return Err(Error::Exhausted);
        }
        let mut nonce = Nonce::default();
        nonce[4..].copy_from_slice(&self.counter.to_be_bytes());
        self.counter += 1;
        Ok(nonce)
    }
}

impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cipher(secret, counter {})", self.counter)
    }
}

/// Makes records.
#[derive(Debug)]
pub struct Sealer(Cipher);

impl Sealer {
    pub(super) fn new(key: &Zeroizing<[u8; KEY_LEN]>) -> Self {
        Self(Cipher::new(key))
    }

    /// Appends the records that carry `plaintext` to `out`; none for an empty one.
    ///
    /// # Errors
    /// [`Error::Exhausted`] after 2^64 - 1 records.
    pub fn seal(&mut self, plaintext: &[u8], out: &mut BytesMut) -> Result<(), Error> {
        for chunk in plaintext.chunks(PLAINTEXT_LEN_MAX) {
            let nonce = self.0.next_nonce()?;
            self.seal_record(&nonce, chunk, out);
        }
        Ok(())
    }

    fn seal_record(&self, nonce: &Nonce, chunk: &[u8], out: &mut BytesMut) {
        let body_len = chunk.len() + TAG_LEN;
        out.reserve(HEADER_LEN + body_len);
        let [high, low] = u16::try_from(body_len)
            .expect("a record is at most 4096 bytes")
            .to_be_bytes();
        out.extend_from_slice(&[TYPE_RECORD, high, low]);
        let start = out.len();
        out.extend_from_slice(chunk);
        let aead = &self.0.aead;
        let tag = aead
            .encrypt_inout_detached(nonce, &[], (&mut out[start..]).into())
            .expect("a record is far below the cipher's limit");
        out.extend_from_slice(&tag);
    }

    #[cfg(test)]
    pub(super) fn has_key(&self, key: &[u8]) -> bool {
        self.0.key[..] == *key
    }
}

/// Opens records.
#[derive(Debug)]
pub struct Opener(Cipher);

impl Opener {
    pub(super) fn new(key: &Zeroizing<[u8; KEY_LEN]>) -> Self {
        Self(Cipher::new(key))
    }

    /// Takes all complete records from the front of `input` and appends what they carry to
    /// `plaintext`. What is left in `input` is less than one record.
    ///
    /// # Errors
    /// Another message type, a length below 16 or above 4093, or failed authentication. The
    /// connection has to be closed; nothing of the bad record reaches `plaintext`.
    pub fn open(&mut self, input: &mut BytesMut, plaintext: &mut BytesMut) -> Result<(), Error> {
        while let Some(&[kind, high, low]) = input.first_chunk::<HEADER_LEN>() {
            if kind != TYPE_RECORD {
                return Err(Error::Type(kind));
            }
            let body_len = usize::from(u16::from_be_bytes([high, low]));
            if !(TAG_LEN..=RECORD_LEN_MAX - HEADER_LEN).contains(&body_len) {
                return Err(Error::Length(body_len));
            }
            if input.len() < HEADER_LEN + body_len {
                break;
            }
            let nonce = self.0.next_nonce()?;
            let mut record = input.split_to(HEADER_LEN + body_len);
            record.advance(HEADER_LEN);
            let (text, tag) = record.split_at_mut(body_len - TAG_LEN);
            let mut want = Tag::default();
            want.copy_from_slice(tag);
            self.0
                .aead
                .decrypt_inout_detached(&nonce, &[], (&mut *text).into(), &want)
                .map_err(|_| Error::Authentication)?;
            plaintext.extend_from_slice(text);
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn has_key(&self, key: &[u8]) -> bool {
        self.0.key[..] == *key
    }
}

#[cfg(test)]
mod tests {
    use super::super::vectors::{self, Vectors};
    use super::*;
    use blake2::{Blake2s256, Digest as _};

    fn key(bytes: &[u8]) -> Zeroizing<[u8; KEY_LEN]> {
        Zeroizing::new(bytes.try_into().unwrap())
    }

    fn open_all(opener: &mut Opener, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let (mut input, mut plaintext) = (BytesMut::from(bytes), BytesMut::new());
        opener.open(&mut input, &mut plaintext)?;
        assert!(input.is_empty());
        Ok(plaintext.to_vec())
    }

    #[test]
    fn records_of_both_directions_match_the_vectors() {
        let v = Vectors::read();
        for (direction, name) in [
            ("client_to_server", "key_client_to_server"),
            ("server_to_client", "key_server_to_client"),
        ] {
            let mut sealer = Sealer::new(&key(&v.bytes(name)));
            let mut opener = Opener::new(&key(&v.bytes(name)));
            for record in v.json[direction].as_array().unwrap() {
                let plaintext = match record["plaintext"].as_str() {
                    Some(text) => hex::decode(text).unwrap(),
                    None => vec![0x41; PLAINTEXT_LEN_MAX],
                };
                let mut out = BytesMut::new();
                sealer.seal(&plaintext, &mut out).unwrap();
                if let Some(frame) = record["frame"].as_str() {
                    assert_eq!(hex::encode(&out), frame);
                }
                if let Some(hash) = record.get("frame_blake2s") {
                    let seen = hex::encode(Blake2s256::digest(&out));
                    assert_eq!(seen, hash.as_str().unwrap());
                    assert_eq!(out.len() as u64, record["frame_len"].as_u64().unwrap());
                }
                assert_eq!(open_all(&mut opener, &out).unwrap(), plaintext);
            }
        }
    }

    #[test]
    fn a_little_endian_counter_is_neither_made_nor_taken() {
        let v = Vectors::read();
        let up = key(&v.bytes("key_client_to_server"));
        let wrong = v.json["wrong_endianness_check"]["frame"].as_str().unwrap();
        let (mut sealer, mut opener) = (Sealer::new(&up), Opener::new(&up));
        let mut first = BytesMut::new();
        sealer.seal(b"x", &mut first).unwrap();
        open_all(&mut opener, &first).unwrap();
        let mut second = BytesMut::new();
        sealer.seal(b"ping", &mut second).unwrap();
        assert_ne!(hex::encode(&second), wrong);
        let refused = open_all(&mut opener, &hex::decode(wrong).unwrap());
        assert_eq!(refused.unwrap_err(), Error::Authentication);
    }

    #[test]
    fn long_writes_are_cut_at_the_largest_record_and_arrive_in_any_pieces() {
        let secret = key(&[5; 32]);
        let (mut sealer, mut opener) = (Sealer::new(&secret), Opener::new(&secret));
        let text: Vec<u8> = (0..20_000_u32).map(|i| i.to_le_bytes()[0]).collect();
        let mut sealed = BytesMut::new();
        sealer.seal(&text, &mut sealed).unwrap();
        assert_eq!(
            &sealed[..3],
            [4, 0x0f, 0xfd],
            "a record of exactly 4096 bytes"
        );
        let (mut input, mut plaintext) = (BytesMut::new(), BytesMut::new());
        for piece in sealed.chunks(777) {
            input.extend_from_slice(piece);
            opener.open(&mut input, &mut plaintext).unwrap();
        }
        assert_eq!(plaintext, text);
    }

    #[test]
    fn lengths_out_of_bounds_and_other_types_are_fatal() {
        for (header, error) in [
            ([4, 0x0f, 0xfe], Error::Length(4094)),
            ([4, 0xff, 0xff], Error::Length(65_535)),
            ([4, 0, 15], Error::Length(15)),
            ([4, 0, 0], Error::Length(0)),
            ([3, 0, 16], Error::Type(3)),
            ([0, 0, 16], Error::Type(0)),
        ] {
            let mut opener = Opener::new(&key(&[5; 32]));
            assert_eq!(open_all(&mut opener, &header).unwrap_err(), error);
        }
    }

    #[test]
    fn an_empty_record_is_skipped() {
        let secret = key(&[5; 32]);
        let mut cipher = Cipher::new(&secret);
        let nonce = cipher.next_nonce().unwrap();
        let tag = cipher
            .aead
            .encrypt_inout_detached(&nonce, &[], (&mut [][..]).into())
            .unwrap();
        let mut bytes = BytesMut::from(&[4, 0, 16][..]);
        bytes.extend_from_slice(&tag);
        let mut sealer = Sealer(cipher);
        sealer.seal(b"after", &mut bytes).unwrap();
        assert_eq!(
            open_all(&mut Opener::new(&secret), &bytes).unwrap(),
            b"after"
        );
    }

    #[test]
    fn every_bit_flip_of_a_record_body_is_refused() {
        let secret = key(&[5; 32]);
        let mut sealed = BytesMut::new();
        Sealer::new(&secret).seal(b"hello", &mut sealed).unwrap();
        for bit in 24..sealed.len() * 8 {
            let mut bad = sealed.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            let refused = open_all(&mut Opener::new(&secret), &bad);
            assert_eq!(refused.unwrap_err(), Error::Authentication, "bit {bit}");
        }
    }

    #[test]
    fn the_last_counter_is_never_used() {
        let mut sealer = Sealer::new(&key(&[5; 32]));
        sealer.0.counter = u64::MAX - 1;
        let mut out = BytesMut::new();
        sealer.seal(b"last", &mut out).unwrap();
        assert_eq!(sealer.seal(b"no more", &mut out), Err(Error::Exhausted));
    }

    #[test]
    fn the_recorded_session_opens_and_seals_bit_for_bit() {
        let recorded = vectors::recorded();
        for direction in ["client_to_server", "server_to_client"] {
            let secret = recorded[format!("key_{direction}")].as_str().unwrap();
            let secret = key(&hex::decode(secret).unwrap());
            let (mut sealer, mut opener) = (Sealer::new(&secret), Opener::new(&secret));
            let records = recorded[direction].as_array().unwrap();
            assert!(records.len() > 2);
            for record in records {
                let frame = hex::decode(record["frame"].as_str().unwrap()).unwrap();
                let plaintext = open_all(&mut opener, &frame).unwrap();
                assert_eq!(
                    hex::encode(&plaintext),
                    record["plaintext"].as_str().unwrap()
                );
                let mut again = BytesMut::new();
                sealer.seal(&plaintext, &mut again).unwrap();
                assert_eq!(again, frame);
            }
        }
    }
}
