//! The messages' layouts (WireGuard paper §5.4.2, §5.4.3, §5.4.7). Integers are little-endian, and
//! the type is a byte followed by three zeros, read as one integer: what has other bytes there is
//! none of these messages, as in the kernel and wireguard-go.

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::symmetric::mac;
use super::{
    COOKIE_REPLY_LEN, Cookie, Error, INITIATION_LEN, KEY_LEN, MAC_LEN, RESPONSE_LEN, TAG_LEN,
    Tai64n,
};

pub(super) const KIND_INITIATION: u32 = 1;
pub(super) const KIND_RESPONSE: u32 = 2;
pub(super) const KIND_COOKIE_REPLY: u32 = 3;
/// Nonce of XChaCha20-Poly1305 in bytes.
pub(super) const NONCE_LEN: usize = 24;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Initiation {
    pub(super) kind: U32,
    pub(super) sender: U32,
    pub(super) ephemeral: [u8; KEY_LEN],
    pub(super) sealed_static: [u8; KEY_LEN + TAG_LEN],
    pub(super) sealed_timestamp: [u8; Tai64n::LEN + TAG_LEN],
    pub(super) macs: Macs,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Response {
    pub(super) kind: U32,
    pub(super) sender: U32,
    pub(super) receiver: U32,
    pub(super) ephemeral: [u8; KEY_LEN],
    pub(super) sealed_nothing: [u8; TAG_LEN],
    pub(super) macs: Macs,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct CookieReply {
    pub(super) kind: U32,
    pub(super) receiver: U32,
    pub(super) nonce: [u8; NONCE_LEN],
    pub(super) sealed_cookie: [u8; MAC_LEN + TAG_LEN],
}

/// The end of an initiation and of a response.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Macs {
    pub(super) mac1: [u8; MAC_LEN],
    pub(super) mac2: [u8; MAC_LEN],
}

const MACS_LEN: usize = size_of::<Macs>();
const _: () = assert!(size_of::<Initiation>() == INITIATION_LEN);
const _: () = assert!(size_of::<Response>() == RESPONSE_LEN);
const _: () = assert!(size_of::<CookieReply>() == COOKIE_REPLY_LEN);

/// Views a message of exactly one type.
///
/// # Errors
/// [`Error::Length`], [`Error::Kind`].
pub(super) fn view<T>(message: &[u8], kind: u32) -> Result<&T, Error>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    let view = T::ref_from_bytes(message).map_err(|_| Error::Length)?;
    if kind_of(message) == Some(kind) {
        Ok(view)
    } else {
        Err(Error::Kind)
    }
}

/// The type of a message, with the reserved bytes above it.
pub(super) fn kind_of(message: &[u8]) -> Option<u32> {
    message
        .first_chunk()
        .map(|kind: &[u8; 4]| u32::from_le_bytes(*kind))
}

/// Cuts an initiation or a response into what MAC1 is over, and the MACs; `None` if it is too
/// short for that.
pub(super) fn split_macs(message: &[u8]) -> Option<(&[u8], &Macs)> {
    let (body, macs) = message.split_last_chunk::<MACS_LEN>()?;
    Some((body, Macs::ref_from_bytes(macs).ok()?))
}

/// Checks MAC1, in constant time.
///
/// # Errors
/// [`Error::Mac1`].
pub(super) fn check_mac1(key: &[u8; KEY_LEN], message: &[u8]) -> Result<(), Error> {
    let (body, macs) = split_macs(message).ok_or(Error::Length)?;
    if equal(&mac(key, body, &[]), &macs.mac1) {
        Ok(())
    } else {
        Err(Error::Mac1)
    }
}

/// Checks MAC2, in constant time.
pub(super) fn check_mac2(cookie: &Cookie, message: &[u8]) -> bool {
    split_macs(message)
        .is_some_and(|(body, macs)| equal(&mac(&cookie.0, body, &macs.mac1), &macs.mac2))
}

/// Writes both MACs at the end of a message and returns MAC1. Without a cookie MAC2 is zero.
pub(super) fn put_macs(
    key: &[u8; KEY_LEN],
    cookie: Option<&Cookie>,
    message: &mut [u8],
) -> [u8; MAC_LEN] {
    let body = message.len() - MACS_LEN;
    let (body, macs) = message.split_at_mut(body);
    let mac1 = mac(key, body, &[]);
    let mac2 = cookie.map_or([0; MAC_LEN], |cookie| mac(&cookie.0, body, &mac1));
    macs[..MAC_LEN].copy_from_slice(&mac1);
    macs[MAC_LEN..].copy_from_slice(&mac2);
    mac1
}

/// Compares in constant time: every byte is looked at whatever the first ones say.
pub(super) fn equal(a: &[u8; MAC_LEN], b: &[u8; MAC_LEN]) -> bool {
    u128::from_ne_bytes(*a) ^ u128::from_ne_bytes(*b) == 0
}
