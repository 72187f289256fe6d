#![forbid(unsafe_code)]
//! What a datagram is, by its first bytes, and which shard it belongs to.
//!
//! WireGuard messages start with their type and three zero bytes, a pattern that neither STUN nor
//! Geneve nor DISCO matches, so it is tested first (Tailscale tests STUN, Geneve, DISCO in this order
//! and takes the rest as WireGuard; the outcome is the same for everything that is valid). The control
//! side asks the same function about what its own socket gets.

use crate::stats::DropReason;

/// A data message's header in bytes: type, receiver index, counter (WireGuard paper §5.4.6).
pub const DATA_HEADER_LEN: usize = 16;
/// The authentication tag behind a data message's payload, in bytes.
pub const TAG_LEN: usize = 16;
/// Shortest data message in bytes: a keep-alive.
pub const DATA_LEN_MIN: usize = DATA_HEADER_LEN + TAG_LEN;
/// Length of a handshake initiation in bytes.
pub const INITIATION_LEN: usize = 148;
/// Length of a handshake response in bytes.
pub const RESPONSE_LEN: usize = 92;
/// Length of a cookie reply in bytes.
pub const COOKIE_LEN: usize = 64;
/// First bytes of every DISCO datagram: "TS" and a speech balloon.
pub const DISCO_MAGIC: [u8; 6] = [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac];
/// Shortest DISCO datagram that is taken as one: magic and sender key.
pub const DISCO_LEN_MIN: usize = 38;
/// STUN's magic cookie at offset 4 (RFC 8489 §5).
pub const STUN_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
/// STUN's header in bytes.
pub const STUN_HEADER_LEN: usize = 20;
/// What a Geneve header names as its payload (RFC 8926 §3.4): DISCO or WireGuard, as Tailscale's peer
/// relays send them (net/packet/geneve.go).
const GENEVE_DISCO: [u8; 2] = [0x7a, 0x11];
const GENEVE_WIREGUARD: [u8; 2] = [0x7a, 0x12];

/// What a datagram is. Only the form is checked, nothing is authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// WireGuard data for the session with this receiver index.
    Data(u32),
    /// WireGuard handshake initiation, response or cookie reply, of the right length.
    Handshake,
    /// A DISCO datagram.
    Disco,
    /// A STUN message with a Binding method.
    Stun,
    /// DISCO or WireGuard behind the Geneve header of a peer relay; not spoken.
    PeerRelay,
    /// To be dropped and counted under this reason.
    Invalid(DropReason),
}

/// Classifies one datagram.
#[inline]
pub fn classify(datagram: &[u8]) -> Class {
    let Some(&[kind, 0, 0, 0]) = datagram.first_chunk::<4>() else {
        return classify_other(datagram);
    };
    let len = datagram.len();
    match kind {
        4 => match datagram.get(4..8) {
            Some(&[a, b, c, d]) if len >= DATA_LEN_MIN => {
                Class::Data(u32::from_le_bytes([a, b, c, d]))
            }
            _ => Class::Invalid(DropReason::MessageLength),
        },
        1 if len == INITIATION_LEN => Class::Handshake,
        2 if len == RESPONSE_LEN => Class::Handshake,
        3 if len == COOKIE_LEN => Class::Handshake,
        1..=3 => Class::Invalid(DropReason::MessageLength),
        _ => classify_other(datagram),
    }
}

/// Bits 8 to 15 of a receiver index: which shard opens the session. We choose the indexes, so an
/// owner at or above the number of shards means that the datagram is not ours.
#[inline]
pub fn owner_shard(receiver_index: u32) -> u8 {
    receiver_index.to_le_bytes()[1]
}

/// The receiver index of a response or cookie reply (WireGuard paper §5.4.3, §5.4.7).
#[inline]
pub fn receiver_index(message: &[u8]) -> Option<u32> {
    let at = match message.first()? {
        2 => 8,
        3 => 4,
        _ => return None,
    };
    Some(u32::from_le_bytes(*message.get(at..)?.first_chunk::<4>()?))
}

/// The message counter of a data message of at least [`DATA_LEN_MIN`] bytes.
#[inline]
pub fn data_counter(datagram: &[u8]) -> Option<u64> {
    datagram.get(8..16)?.try_into().ok().map(u64::from_le_bytes)
}

fn classify_other(datagram: &[u8]) -> Class {
    if datagram.len() >= STUN_HEADER_LEN
        && datagram[0] & 0xc0 == 0
        && datagram[1] == 0x01
        && datagram[4..8] == STUN_COOKIE
    {
        return Class::Stun;
    }
    if is_disco(datagram) {
        return Class::Disco;
    }
    if let Some(([version, flags, protocol @ .., _, _, _, 0], inner)) =
        datagram.split_first_chunk::<8>()
        && version & 0xc0 == 0
        && flags & 0x3f == 0
        && (*protocol == GENEVE_WIREGUARD || (*protocol == GENEVE_DISCO && is_disco(inner)))
    {
        return Class::PeerRelay;
    }
    Class::Invalid(DropReason::UnknownMessage)
}

fn is_disco(datagram: &[u8]) -> bool {
    datagram.len() >= DISCO_LEN_MIN && datagram.starts_with(&DISCO_MAGIC)
}

#[cfg(test)]
mod tests;
