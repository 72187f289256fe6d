//! DISCO: the messages two nodes find their paths with.
//!
//! A message is a [`Message`]; [`SharedKey::seal`] makes it a datagram and [`SharedKey::open`] reads
//! it back. A datagram names its sender's DISCO key in clear, so the receiver looks the key up first
//! ([`sender`]) and spends no cryptography on strangers. What else comes by the one UDP port, the data
//! plane's `classify` tells apart. Who sends what, when and to whom is the `path` machine's.
//!
//! Datagram: magic (6) | sender's DISCO key (32) | nonce (24) | Poly1305 tag (16) | ciphertext.
//! The box is NaCl's `crypto_box` (X25519, HSalsa20, XSalsa20-Poly1305, tag first). Plain text:
//! type (1) | version (1) | payload. Integers are big-endian. An address and port is 18 bytes: IPv6
//! or v4-mapped address, port. Source: `protocol/disco.md`, disco/disco.go in tailscale/tailscale.
//!
//! Rooms: the messages are here; `filter` is what the kernel lets through to the discovery socket.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crypto_box::aead::AeadInPlace as _;
use crypto_box::{Nonce, PublicKey, SalsaBox, SecretKey, Tag};
use ringtail_dataplane::DISCO_MAGIC;

use crate::key::{DiscoPrivate, DiscoPublic, KEY_LEN, NodePublic};

pub mod filter;

/// Length of a nonce in bytes; a new random one for every datagram.
pub const NONCE_LEN: usize = 24;

/// Length of an unpadded sealed Ping in bytes.
pub const PING_LEN: usize = 124;

/// Endpoints that a CallMeMaybe may name, sent or taken; the rest is ignored.
pub const CALL_ME_MAYBE_ENDPOINTS_MAX: usize = 64;

/// The address that stands for "by relay" inside a Pong, its port being the region.
pub const DERP_FAKE_IP: Ipv4Addr = Ipv4Addr::new(127, 3, 3, 40);

const KEY_AT: usize = DISCO_MAGIC.len();
const NONCE_AT: usize = KEY_AT + KEY_LEN;
const TAG_AT: usize = NONCE_AT + NONCE_LEN;
const TAG_LEN: usize = 16;
const BODY_AT: usize = TAG_AT + TAG_LEN;
const ADDRESS_LEN: usize = 18;
const VERSION: u8 = 0;

const PING: u8 = 0x01;
const PONG: u8 = 0x02;
const CALL_ME_MAYBE: u8 = 0x03;
const PEER_RELAY: std::ops::RangeInclusive<u8> = 0x04..=0x09;

/// Names a Ping and its Pong: 96 random bits.
pub type TxId = [u8; 12];

/// The DISCO key a datagram says it is from, or `None` if it is no DISCO datagram.
pub fn sender(datagram: &[u8]) -> Option<DiscoPublic> {
    let mut key = [0; KEY_LEN];
    key.copy_from_slice(datagram.strip_prefix(&DISCO_MAGIC)?.get(..KEY_LEN)?);
    Some(DiscoPublic(key))
}

/// The nonce of a DISCO datagram, or `None` if that is too short.
pub fn nonce(datagram: &[u8]) -> Option<&[u8; NONCE_LEN]> {
    datagram.get(NONCE_AT..)?.first_chunk()
}

/// The precomputed secret of two DISCO keys, the same for both directions. Making one costs an
/// X25519, so it is kept for as long as the peer's key stays the same.
pub struct SharedKey(SalsaBox);

/// Why a datagram could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Shorter than header and tag.
    #[error("too short for a sealed message")]
    Short,
    /// Sealed with another key, or damaged.
    #[error("does not open with this key")]
    Forged,
}

impl SharedKey {
    /// The secret between us and `theirs`; `None` for the all-zero key, which everyone could
    /// compute.
    pub fn new(ours: &DiscoPrivate, theirs: &DiscoPublic) -> Option<Self> {
        let public = PublicKey::from(theirs.0);
        let usable = !theirs.is_zero();
        usable.then(|| Self(SalsaBox::new(&public, &SecretKey::from(*ours.as_bytes()))))
    }

    /// The datagram that carries `message`: 78 bytes longer than its plain text.
    pub fn seal(&self, from: &DiscoPublic, nonce: [u8; NONCE_LEN], message: &Message) -> Vec<u8> {
        let mut datagram = Vec::with_capacity(BODY_AT + message.encoded_len());
        datagram.extend_from_slice(&DISCO_MAGIC);
        datagram.extend_from_slice(&from.0);
        datagram.extend_from_slice(&nonce);
        datagram.extend_from_slice(&[0; TAG_LEN]);
        message.encode(&mut datagram);
        let tag = self
            .0
            .encrypt_in_place_detached(Nonce::from_slice(&nonce), b"", &mut datagram[BODY_AT..])
            .expect("the box takes every plain text without associated data");
        datagram[TAG_AT..BODY_AT].copy_from_slice(&tag);
        datagram
    }

    /// The plain text of a datagram.
    ///
    /// # Errors
    /// [`OpenError`]; an old key in flight is normal, so neither is worth a log line.
    pub fn open(&self, datagram: &[u8]) -> Result<Vec<u8>, OpenError> {
        let (header, body) = datagram.split_at_checked(BODY_AT).ok_or(OpenError::Short)?;
        let nonce = Nonce::from_slice(&header[NONCE_AT..TAG_AT]);
        let mut plain = body.to_vec();
        self.0
            .decrypt_in_place_detached(nonce, b"", &mut plain, Tag::from_slice(&header[TAG_AT..]))
            .map_err(|_| OpenError::Forged)?;
        Ok(plain)
    }
}

/// A message between two nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// "Can you hear me here?"
    Ping {
        /// Repeated by the Pong.
        tx_id: TxId,
        /// The sender's node key: a hint, not proof. Very old nodes leave it out.
        node_key: Option<NodePublic>,
        /// Zero bytes behind it, in bytes: they make the datagram as large as the path must carry.
        padding: usize,
    },
    /// "Yes, and you look like this."
    Pong {
        /// That of the Ping.
        tx_id: TxId,
        /// Where the Ping came from, or [`DERP_FAKE_IP`] and the region.
        source: SocketAddr,
    },
    /// "I have just sent Pings to all addresses I know of you; ping me at these."
    CallMeMaybe {
        /// All current endpoints of the sender, duplicates included.
        endpoints: Vec<SocketAddr>,
    },
}

/// Why a plain text is no message to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Shorter than its type needs.
    #[error("cut off")]
    Short,
    /// One of the peer relay messages, which are not spoken.
    #[error("a peer relay message")]
    PeerRelay,
    /// A type nobody has defined yet.
    #[error("unknown type")]
    UnknownType,
}

impl Message {
    /// Reads a plain text. Bytes behind a Ping or Pong are padding. A CallMeMaybe of another version
    /// or of an odd length counts as an empty one.
    ///
    /// # Errors
    /// [`ParseError`].
    pub fn parse(plain: &[u8]) -> Result<Self, ParseError> {
        let ([kind, version], payload) = plain.split_first_chunk().ok_or(ParseError::Short)?;
        match *kind {
            PING => {
                let (tx_id, rest) = payload.split_first_chunk().ok_or(ParseError::Short)?;
                let (node_key, padding) = match rest.split_first_chunk() {
                    Some((key, padding)) => (Some(NodePublic(*key)), padding),
                    None => (None, rest),
                };
                Ok(Self::Ping {
                    tx_id: *tx_id,
                    node_key,
                    padding: padding.len(),
                })
            }
            PONG => {
                let (tx_id, rest) = payload.split_first_chunk().ok_or(ParseError::Short)?;
                let (source, _) = rest.split_first_chunk().ok_or(ParseError::Short)?;
                Ok(Self::Pong {
                    tx_id: *tx_id,
                    source: read_address(source),
                })
            }
            CALL_ME_MAYBE => {
                let (chunks, rest) = payload.as_chunks::<ADDRESS_LEN>();
                let valid = *version == VERSION && rest.is_empty();
                let endpoints = chunks.iter().filter(|_| valid).map(read_address);
                Ok(Self::CallMeMaybe {
                    endpoints: endpoints.collect(),
                })
            }
            kind if PEER_RELAY.contains(&kind) => Err(ParseError::PeerRelay),
            _ => Err(ParseError::UnknownType),
        }
    }

    /// Length of the plain text in bytes.
    pub fn encoded_len(&self) -> usize {
        match self {
            Self::Ping {
                node_key, padding, ..
            } => 2 + 12 + node_key.map_or(0, |_| KEY_LEN) + padding,
            Self::Pong { .. } => 2 + 12 + ADDRESS_LEN,
            Self::CallMeMaybe { endpoints } => 2 + ADDRESS_LEN * endpoints.len(),
        }
    }

    /// Appends the plain text.
    pub fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Self::Ping {
                tx_id,
                node_key,
                padding,
            } => {
                to.extend_from_slice(&[PING, VERSION]);
                to.extend_from_slice(tx_id);
                if let Some(key) = node_key {
                    to.extend_from_slice(&key.0);
                }
                to.resize(to.len() + padding, 0);
            }
            Self::Pong { tx_id, source } => {
                to.extend_from_slice(&[PONG, VERSION]);
                to.extend_from_slice(tx_id);
                to.extend_from_slice(&address(*source));
            }
            Self::CallMeMaybe { endpoints } => {
                to.extend_from_slice(&[CALL_ME_MAYBE, VERSION]);
                for endpoint in endpoints {
                    to.extend_from_slice(&address(*endpoint));
                }
            }
        }
    }
}

/// The padding that makes a Ping with node key a UDP payload of `payload_len` bytes; 0 if it is
/// that long already.
pub fn ping_padding(payload_len: usize) -> usize {
    payload_len.saturating_sub(PING_LEN)
}

fn address(at: SocketAddr) -> [u8; ADDRESS_LEN] {
    let ip = match at.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut bytes = [0; ADDRESS_LEN];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&at.port().to_be_bytes());
    bytes
}

fn read_address(bytes: &[u8; ADDRESS_LEN]) -> SocketAddr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes[..16]);
    let ip = IpAddr::from(Ipv6Addr::from(octets)).to_canonical();
    SocketAddr::new(ip, u16::from_be_bytes([bytes[16], bytes[17]]))
}

#[cfg(test)]
mod tests;
