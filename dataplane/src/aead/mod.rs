//! Multi-packet ChaCha20-Poly1305 (RFC 8439) for WireGuard transport data.
//!
//! [`Aead::seal`] and [`Aead::open`] take a batch of packets of any lengths, each with its own key
//! and counter, and work in place in the caller's buffers. Backends are chosen once per process
//! ([`Aead::detect`]), after each has answered a known question.
//!
//! A message on the wire (WireGuard paper §5.4.6), lengths in bytes:
//!
//! ```text
//! 0    1           4              8            16              len-16        len
//! | 4 | 0  0  0 | receiver LE | counter LE | text, 0..=65535 | tag           |
//! ```
//!
//! The nonce is four zero bytes and the counter, little-endian; there is no associated data.

mod known;
mod ring;
#[cfg(test)]
mod tests;

use std::fmt;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use ::ring::aead::{CHACHA20_POLY1305, LessSafeKey, UnboundKey};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes before the text: type, three zero bytes, receiver index, counter.
pub const HEADER_LEN: usize = 16;
/// Bytes of the Poly1305 tag behind the text.
pub const TAG_LEN: usize = 16;
/// The shortest message: a keep-alive, with no text.
pub const MESSAGE_LEN_MIN: usize = HEADER_LEN + TAG_LEN;
/// The longest message: more than any datagram holds.
pub const MESSAGE_LEN_MAX: usize = MESSAGE_LEN_MIN + 65_535;

/// A transport key of one direction, in the forms the backends want. Zeroised on drop.
///
/// Moving it leaves a copy behind, as with any value: put it where it stays (an `Arc`, a `Box`).
pub struct Key {
    words: [u32; 8],
    /// `MaybeUninit` so that dropping may overwrite it with zeros, which are no valid key of ring's.
    ring: MaybeUninit<LessSafeKey>,
}

impl Key {
    /// The key of these 32 bytes.
    #[must_use]
    pub fn new(bytes: &[u8; 32]) -> Key {
        let (words, _) = bytes.as_chunks();
        let ring = UnboundKey::new(&CHACHA20_POLY1305, bytes).expect("32 bytes are a key");
        Key {
            words: std::array::from_fn(|i| u32::from_le_bytes(words[i])),
            ring: MaybeUninit::new(LessSafeKey::new(ring)),
        }
    }

    /// The 32 bytes, for an export of the session.
    #[must_use]
    pub fn to_bytes(&self) -> Zeroizing<[u8; 32]> {
        let mut bytes = Zeroizing::new([0; 32]);
        for (chunk, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(self.words) {
            *chunk = word.to_le_bytes();
        }
        bytes
    }

    fn ring(&self) -> &LessSafeKey {
        // SAFETY: `new` initialises it, and only `drop` overwrites it.
        unsafe { self.ring.assume_init_ref() }
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // `LessSafeKey` owns nothing, so nothing leaks by not dropping it.
        const { assert!(!std::mem::needs_drop::<LessSafeKey>()) }
        self.words.zeroize();
        self.ring.zeroize();
    }
}

impl ZeroizeOnDrop for Key {}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// One packet to seal.
#[derive(Debug)]
pub struct Seal<'a> {
    /// The sending key of the session.
    pub key: &'a Key,
    /// The peer's index for this session; goes into the header.
    pub receiver: u32,
    /// Never used before with this key; goes into the header and is the nonce.
    pub counter: u64,
    /// The message, [`MESSAGE_LEN_MIN`] to [`MESSAGE_LEN_MAX`] bytes: room for the header, the text
    /// in place, room for the tag.
    pub message: &'a mut [u8],
}

/// One packet to open.
#[derive(Debug)]
pub struct Open<'a> {
    /// The receiving key of the session.
    pub key: &'a Key,
    /// As the header says it: the header is not read again here.
    pub counter: u64,
    /// The whole datagram, header first.
    pub message: &'a mut [u8],
    /// Set by [`Aead::open`]: whether the tag was right. If so the text is in place of the
    /// ciphertext; if not, zeros are. Any length but [`MESSAGE_LEN_MIN`] to [`MESSAGE_LEN_MAX`] is
    /// refused.
    pub ok: bool,
}

impl Open<'_> {
    /// Overwrites what may hold text that nobody vouches for.
    fn wipe(&mut self) {
        if let Some(text_end) = self.message.len().checked_sub(TAG_LEN)
            && let Some(text) = self.message.get_mut(HEADER_LEN..text_end)
        {
            text.fill(0);
        }
    }
}

/// An implementation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// 16 blocks of ChaCha20 at a time (AVX-512F).
    Avx512,
    /// 8 blocks of ChaCha20 at a time (AVX2).
    Avx2,
    /// One packet at a time, by the ring crate. Runs everywhere.
    Ring,
}

impl Backend {
    /// Every backend, fastest first.
    pub const ALL: [Backend; 3] = [Backend::Avx512, Backend::Avx2, Backend::Ring];

    /// Its name in flags and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Backend::Avx512 => "avx512",
            Backend::Avx2 => "avx2",
            Backend::Ring => "ring",
        }
    }

    fn has_cpu(self) -> bool {
        match self {
            Backend::Avx512 | Backend::Avx2 => false,
            Backend::Ring => true,
        }
    }
}

/// Seals and opens batches by one backend.
#[derive(Clone, Copy, Debug)]
pub struct Aead {
    backend: Backend,
}

impl Aead {
    /// The fastest backend that this processor can run and that answers its known question; looked
    /// for once per process.
    #[must_use]
    pub fn detect() -> Aead {
        static FASTEST: OnceLock<Aead> = OnceLock::new();
        *FASTEST.get_or_init(|| {
            let fastest = Backend::ALL.into_iter().find_map(Aead::force);
            fastest.expect("ring runs everywhere and answers its question")
        })
    }

    /// This backend, or nothing where the processor lacks what it needs or its answer to the known
    /// question is wrong.
    #[must_use]
    pub fn force(backend: Backend) -> Option<Aead> {
        let aead = Aead { backend };
        (backend.has_cpu() && known::answers(aead)).then_some(aead)
    }

    /// The backend in use.
    #[must_use]
    pub fn backend(self) -> Backend {
        self.backend
    }

    /// Seals every packet in place: writes header and tag, and the ciphertext over the text.
    ///
    /// # Panics
    ///
    /// Where a message is shorter than [`MESSAGE_LEN_MIN`] or longer than [`MESSAGE_LEN_MAX`]:
    /// messages to seal are the caller's own making. Nothing has been sealed then.
    pub fn seal(&self, batch: &mut [Seal<'_>]) {
        for packet in &mut *batch {
            assert!(
                well_formed(packet.message),
                "a message to seal has room for header and tag, and fits a datagram"
            );
            packet.message[..4].copy_from_slice(&[4, 0, 0, 0]);
            packet.message[4..8].copy_from_slice(&packet.receiver.to_le_bytes());
            packet.message[8..16].copy_from_slice(&packet.counter.to_le_bytes());
        }
        match self.backend {
            Backend::Avx512 | Backend::Avx2 | Backend::Ring => ring::seal(batch),
        }
    }

    /// Opens every packet in place and sets its `ok`. A bad packet changes nothing for the others.
    pub fn open(&self, batch: &mut [Open<'_>]) {
        match self.backend {
            Backend::Avx512 | Backend::Avx2 | Backend::Ring => ring::open(batch),
        }
    }
}

fn well_formed(message: &[u8]) -> bool {
    (MESSAGE_LEN_MIN..=MESSAGE_LEN_MAX).contains(&message.len())
}
