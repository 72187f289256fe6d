//! The Noise channel to a coordination server: `Noise_IK_25519_ChaChaPoly_BLAKE2s`.
//!
//! A connection's life: the client makes an [`Initiator`] from the server's public key and sends
//! the 101 bytes of message 1 in an HTTP header; the server answers through [`respond`] with 51
//! bytes; both then hold a [`Session`], one [`Sealer`] and one [`Opener`] of records. The server
//! may put one early payload before its first HTTP/2 byte, which [`EarlyPayload`] takes out again.
//!
//! Headers and record counters are big-endian, unlike stock Noise (control/controlbase in
//! tailscale/tailscale v1.102.3; `protocol/coordination-transport.md` §4, §5).
//!
//! Rooms: `handshake` is both roles of it, `record` the byte stream after it, `early` the payload
//! before HTTP/2.

mod early;
mod handshake;
mod record;

pub use early::{EARLY_JSON_LEN_MAX, EARLY_MAGIC, EarlyPayload, encode_early};
pub use handshake::{Accepted, Initiator, Session, respond};
pub use record::{Opener, Sealer};

/// Bytes of message 1, its 5-byte header included.
pub const INITIATION_LEN: usize = 101;

/// Bytes of message 2, its 3-byte header included.
pub const RESPONSE_LEN: usize = 51;

/// Bytes of the header of every message but the first.
pub const HEADER_LEN: usize = 3;

/// A whole record at most, header included.
pub const RECORD_LEN_MAX: usize = 4096;

/// Plaintext of one record at most.
pub const PLAINTEXT_LEN_MAX: usize = RECORD_LEN_MAX - HEADER_LEN - TAG_LEN;

pub(crate) const TAG_LEN: usize = 16;

const TYPE_INITIATION: u8 = 1;
const TYPE_RESPONSE: u8 = 2;
const TYPE_ERROR: u8 = 3;
const TYPE_RECORD: u8 = 4;

/// Why a channel failed. All are final for the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A message of another type was due.
    #[error("message type {0} where another was due")]
    Type(u8),
    /// A length field outside its bounds.
    #[error("length {0} is out of bounds")]
    Length(usize),
    /// Authentication failed: another key, a changed byte, or a record out of order.
    #[error("authentication failed")]
    Authentication,
    /// A Diffie-Hellman result of all zeros: the other side sent a point of low order.
    #[error("the other side's key is of low order")]
    LowOrder,
    /// All counters of a direction are used.
    #[error("record counter exhausted")]
    Exhausted,
    /// The server refused the handshake; its text is not authenticated.
    #[error("the server refused the handshake: {0:?}")]
    Refused(String),
}

#[cfg(test)]
mod vectors {
    //! The test vectors and the recorded session, by field name.

    use serde_json::Value;

    use crate::key::MachinePrivate;

    pub(super) struct Vectors {
        pub(super) json: Value,
    }

    impl Vectors {
        pub(super) fn read() -> Self {
            let text = include_str!("../../tests/vectors/coordination-vectors.json");
            Self {
                json: serde_json::from_str(text).unwrap(),
            }
        }

        pub(super) fn text(&self, name: &str) -> &str {
            self.json[name].as_str().unwrap()
        }

        pub(super) fn bytes(&self, name: &str) -> Vec<u8> {
            hex::decode(self.text(name)).unwrap()
        }

        /// The private key whose halves are `<name>_private` and `<name>_public`.
        pub(super) fn private(&self, name: &str) -> MachinePrivate {
            let key = private(self.text(&format!("{name}_private")));
            assert_eq!(key.public().to_hex(), self.text(&format!("{name}_public")));
            key
        }
    }

    pub(super) fn private(text: &str) -> MachinePrivate {
        MachinePrivate::clamped(hex::decode(text).unwrap().try_into().unwrap())
    }

    pub(super) fn recorded() -> Value {
        let text = include_str!("../../tests/vectors/coordination/noise-session.json");
        serde_json::from_str(text).unwrap()
    }
}
