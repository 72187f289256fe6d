//! The two messages of the handshake, from both ends (WireGuard paper §5.4.2, §5.4.3, §5.4.5).

use rand::CryptoRng;
use x25519_dalek::{PublicKey, StaticSecret};
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromZeros as _, IntoBytes as _};
use zeroize::{Zeroize as _, ZeroizeOnDrop, Zeroizing};

use super::message::{
    Initiation, KIND_INITIATION, KIND_RESPONSE, Response, check_mac1, put_macs, view,
};
use super::symmetric::{SymmetricState, dh};
use super::{
    Cookie, Error, INITIATION_LEN, KEY_LEN, LocalKeys, MAC_LEN, RESPONSE_LEN, Remote, TAG_LEN,
    Tai64n,
};

/// The initiator between its message and the response to it.
pub struct Initiated {
    index: u32,
    mac1: [u8; MAC_LEN],
    ephemeral: StaticSecret,
    transcript: SymmetricState,
}

/// Length of [`Initiated::export`] in bytes.
pub const INITIATED_LEN: usize = 4 + MAC_LEN + 3 * KEY_LEN;

impl Initiated {
    /// The index we gave ourselves, which the response names.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// MAC1 of the message, which a cookie reply to it is bound to.
    #[must_use]
    pub fn mac1(&self) -> &[u8; MAC_LEN] {
        &self.mac1
    }

    /// The whole state: index (little-endian), MAC1, ephemeral private key, hash, chaining key.
    #[must_use]
    pub fn export(&self) -> Zeroizing<[u8; INITIATED_LEN]> {
        let (hash, chain) = self.transcript.to_parts();
        let mut out = Zeroizing::new([0; INITIATED_LEN]);
        let mut at = 0;
        for part in [
            &self.index.to_le_bytes()[..],
            &self.mac1,
            self.ephemeral.as_bytes(),
            &hash,
            &*chain,
        ] {
            out[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        out
    }

    /// The opposite of [`Initiated::export`].
    #[must_use]
    pub fn import(bytes: &[u8; INITIATED_LEN]) -> Initiated {
        fn take<const LEN: usize>(rest: &mut &[u8]) -> [u8; LEN] {
            let (part, after) = rest
                .split_first_chunk()
                .expect("the lengths add up to INITIATED_LEN");
            *rest = after;
            *part
        }
        let mut rest = &bytes[..];
        let index = u32::from_le_bytes(take(&mut rest));
        let mac1 = take(&mut rest);
        let ephemeral = StaticSecret::from(take::<KEY_LEN>(&mut rest));
        let hash = take(&mut rest);
        let chain = Zeroizing::new(take(&mut rest));
        Initiated {
            index,
            mac1,
            ephemeral,
            transcript: SymmetricState::from_parts(hash, chain),
        }
    }
}

impl ZeroizeOnDrop for Initiated {}

impl std::fmt::Debug for Initiated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Initiated({:#010x})", self.index)
    }
}

/// What the first computation on an initiation gives: who made it. It is authentic only once
/// [`consume_initiation`] says so.
pub struct PeekedInitiation {
    peer: [u8; KEY_LEN],
    /// The key of ours that it was made for.
    to: [u8; KEY_LEN],
    sender_index: u32,
    ephemeral: [u8; KEY_LEN],
    sealed_timestamp: [u8; Tai64n::LEN + TAG_LEN],
    transcript: SymmetricState,
}

impl PeekedInitiation {
    /// The public key of whoever made it.
    #[must_use]
    pub fn peer(&self) -> &[u8; KEY_LEN] {
        &self.peer
    }

    /// Whether it was made for this key of ours.
    #[must_use]
    pub fn is_to(&self, local: &LocalKeys) -> bool {
        self.to == local.public
    }
}

impl Drop for PeekedInitiation {
    fn drop(&mut self) {
        self.peer.zeroize();
    }
}

impl std::fmt::Debug for PeekedInitiation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PeekedInitiation({:#010x})", self.sender_index)
    }
}

/// An authentic initiation. The caller looks at the timestamp before it answers.
pub struct ConsumedInitiation {
    timestamp: Tai64n,
    sender_index: u32,
    ephemeral: [u8; KEY_LEN],
    transcript: SymmetricState,
}

impl ConsumedInitiation {
    /// When it was made, by the initiator's clock: one not above the last is a replay.
    #[must_use]
    pub fn timestamp(&self) -> Tai64n {
        self.timestamp
    }

    /// The initiator's index.
    #[cfg(test)]
    #[must_use]
    pub fn sender_index(&self) -> u32 {
        self.sender_index
    }
}

impl std::fmt::Debug for ConsumedInitiation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ConsumedInitiation({:#010x})", self.sender_index)
    }
}

/// The keys of a completed handshake.
pub struct TransportKeys {
    /// Seals what we send.
    pub send: Zeroizing<[u8; KEY_LEN]>,
    /// Opens what we receive.
    pub receive: Zeroizing<[u8; KEY_LEN]>,
    /// Names these keys in what we receive.
    pub local_index: u32,
    /// Names these keys in what we send.
    pub remote_index: u32,
}

impl std::fmt::Debug for TransportKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TransportKeys")
            .field("local_index", &self.local_index)
            .field("remote_index", &self.remote_index)
            .finish_non_exhaustive()
    }
}

fn ephemeral(rng: &mut impl CryptoRng) -> (StaticSecret, [u8; KEY_LEN]) {
    let secret = StaticSecret::random_from_rng(rng);
    let public = PublicKey::from(&secret).to_bytes();
    (secret, public)
}

/// Writes an initiation (paper §5.4.2) under the index that is to name our keys.
///
/// # Errors
/// [`Error::LowOrder`] if the peer's key is no usable point.
pub fn initiation(
    local: &LocalKeys,
    remote: &Remote,
    index: u32,
    timestamp: Tai64n,
    cookie: Option<&Cookie>,
    rng: &mut impl CryptoRng,
    out: &mut [u8; INITIATION_LEN],
) -> Result<Initiated, Error> {
    let shared = remote.shared()?;
    let (secret, public) = ephemeral(rng);
    let mut message = Initiation::new_zeroed();
    message.kind = U32::new(KIND_INITIATION);
    message.sender = U32::new(index);
    message.ephemeral = public;
    let mut transcript = SymmetricState::start(&remote.labels.start, &public);
    let key = transcript.mix_key(&*dh(&secret, &remote.public)?);
    message.sealed_static[..KEY_LEN].copy_from_slice(&local.public);
    transcript.seal(&key, &mut message.sealed_static);
    let key = transcript.mix_key(&shared);
    message.sealed_timestamp[..Tai64n::LEN].copy_from_slice(&timestamp.0);
    transcript.seal(&key, &mut message.sealed_timestamp);
    out.copy_from_slice(message.as_bytes());
    let mac1 = put_macs(&remote.labels.mac1, cookie, out);
    Ok(Initiated {
        index,
        mac1,
        ephemeral: secret,
        transcript,
    })
}

/// Finds out whose initiation a message is: MAC1 and one Diffie-Hellman computation.
///
/// # Errors
/// Length, type or MAC1 are wrong, the ephemeral key is of low order, or it was made for another
/// key than ours.
pub fn peek_initiation(local: &LocalKeys, message: &[u8]) -> Result<PeekedInitiation, Error> {
    let initiation = view(message, KIND_INITIATION)?;
    check_mac1(&local.labels.mac1, message)?;
    peek_checked(local, initiation)
}

/// [`peek_initiation`] behind the check of MAC1.
pub(super) fn peek_checked(
    local: &LocalKeys,
    message: &Initiation,
) -> Result<PeekedInitiation, Error> {
    let mut transcript = SymmetricState::start(&local.labels.start, &message.ephemeral);
    let key = transcript.mix_key(&*dh(&local.private, &message.ephemeral)?);
    let mut sealed_static = message.sealed_static;
    transcript.open(&key, &mut sealed_static)?;
    let mut peer = [0; KEY_LEN];
    peer.copy_from_slice(&sealed_static[..KEY_LEN]);
    sealed_static.zeroize();
    Ok(PeekedInitiation {
        peer,
        to: local.public,
        sender_index: message.sender.get(),
        ephemeral: message.ephemeral,
        sealed_timestamp: message.sealed_timestamp,
        transcript,
    })
}

/// Authenticates an initiation of the peer that [`PeekedInitiation::peer`] names.
///
/// # Errors
/// [`Error::UnknownPeer`] if `remote` is another one, [`Error::LowOrder`] if its key is no usable
/// point, [`Error::Authentication`] if it did not make the message.
pub fn consume_initiation(
    peeked: &PeekedInitiation,
    remote: &Remote,
) -> Result<ConsumedInitiation, Error> {
    if peeked.peer != remote.public {
        return Err(Error::UnknownPeer);
    }
    let mut transcript = peeked.transcript.fork();
    let key = transcript.mix_key(&*remote.shared()?);
    let mut timestamp = peeked.sealed_timestamp;
    transcript.open(&key, &mut timestamp)?;
    let (timestamp, _tag) = timestamp
        .split_first_chunk()
        .expect("a timestamp and its tag");
    Ok(ConsumedInitiation {
        timestamp: Tai64n(*timestamp),
        sender_index: peeked.sender_index,
        ephemeral: peeked.ephemeral,
        transcript,
    })
}

/// Writes the response (paper §5.4.3) under the index that is to name our keys, and gives the keys
/// and the MAC1 that a cookie reply to it would be bound to.
///
/// # Errors
/// [`Error::LowOrder`].
pub fn response(
    remote: &Remote,
    received: ConsumedInitiation,
    index: u32,
    cookie: Option<&Cookie>,
    rng: &mut impl CryptoRng,
    out: &mut [u8; RESPONSE_LEN],
) -> Result<(TransportKeys, [u8; MAC_LEN]), Error> {
    let (secret, public) = ephemeral(rng);
    let mut message = Response::new_zeroed();
    message.kind = U32::new(KIND_RESPONSE);
    message.sender = U32::new(index);
    message.receiver = U32::new(received.sender_index);
    message.ephemeral = public;
    let mut transcript = received.transcript;
    transcript.mix_public(&public);
    transcript.mix_secret(&*dh(&secret, &received.ephemeral)?);
    transcript.mix_secret(&*dh(&secret, &remote.public)?);
    let key = transcript.mix_preshared(&remote.preshared);
    transcript.seal(&key, &mut message.sealed_nothing);
    out.copy_from_slice(message.as_bytes());
    let mac1 = put_macs(&remote.labels.mac1, cookie, out);
    let [receive, send] = transcript.split();
    let keys = TransportKeys {
        send,
        receive,
        local_index: index,
        remote_index: received.sender_index,
    };
    Ok((keys, mac1))
}

/// Completes our handshake with the response to it. A bad message leaves `initiated` as it was, so
/// that the true one can still come.
///
/// # Errors
/// Length, type or MAC1 are wrong, it names another index, its ephemeral key is of low order, or
/// it does not answer our initiation with our keys.
pub fn consume_response(
    local: &LocalKeys,
    remote: &Remote,
    initiated: &Initiated,
    message: &[u8],
) -> Result<TransportKeys, Error> {
    let response: &Response = view(message, KIND_RESPONSE)?;
    if response.receiver.get() != initiated.index {
        return Err(Error::WrongIndex);
    }
    check_mac1(&local.labels.mac1, message)?;
    let mut transcript = initiated.transcript.fork();
    transcript.mix_public(&response.ephemeral);
    transcript.mix_secret(&*dh(&initiated.ephemeral, &response.ephemeral)?);
    transcript.mix_secret(&*dh(&local.private, &response.ephemeral)?);
    let key = transcript.mix_preshared(&remote.preshared);
    transcript.open(&key, &mut response.sealed_nothing.clone())?;
    let [send, receive] = transcript.split();
    Ok(TransportKeys {
        send,
        receive,
        local_index: initiated.index,
        remote_index: response.sender.get(),
    })
}
