//! WireGuard's handshake, `Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s`, as messages and nothing else
//! (WireGuard paper §5). No I/O, no clock, no randomness of its own: all are arguments.
//!
//! A handshake from both ends:
//!
//! ```text
//! initiator                                  responder
//! initiation() -> Initiated  --148 bytes-->  Gate::handle() or peek_initiation() -> PeekedInitiation
//!                                            consume_initiation() -> ConsumedInitiation
//!                                            (the timestamp is new, 20 ms have passed)
//! consume_response()         <--92 bytes---  response() -> TransportKeys
//!   -> TransportKeys
//! CookieStore::receive()     <--64 bytes---  Gate::challenge(), under load
//! ```
//!
//! [`PeekedInitiation`] is an initiation of which we know who made it, and no more. It can be sent to
//! another thread, so that the Diffie-Hellman computation behind it is done once. Nothing that fails
//! here changes the state of a handshake that goes on: every step works on a copy of the transcript.
//!
//! The caller (`session/`) keeps per peer the last [`Tai64n`] it consumed and the time of that, the
//! last one it sent, and a [`CookieStore`]; the handshake thread keeps a [`Gate`].
//!
//! Rooms: `message` is the layouts, `handshake` both ends of the two messages, `symmetric` the
//! primitives, `keys` what is computed once per key, `tai64n` timestamps; `gate` is what every message
//! passes, `cookie` what it gives and takes, `sources` the limit per source, `recent` who was seen
//! lately.
//!
//! What section 5 of the paper asks for, and the tests (in `tests/` where nothing else is said) that
//! show it (`session::` stands for `session/tests/rules.rs`); section 6 is the session's:
//!
//! | rule | shown by |
//! |---|---|
//! | 5.1: nothing that is not authentic is answered | `gate::each_refusal_has_its_reason` (the reply stays untouched) |
//! | 5.1: the responder takes only newer timestamps | `tai64n::timestamps_grow_whatever_the_clock_does`, `both_ends_agree_on_keys…`; the comparison is the session's, `session::an_initiation_that_is_not_newer_is_a_replay` |
//! | 5.1: 20 ms between initiations ([`ANSWER_INTERVAL_MIN`]) | kept by the session, `session::initiations_less_than_twenty_milliseconds_apart_are_not_answered` |
//! | 5.2: a preshared key is mixed in, zeros stand for none | `known::every_byte_of_a_handshake…`, `refusals::ends_that_disagree…` |
//! | 5.3: MAC1 before anything else, always | `gate::each_refusal_has_its_reason`, `refusals::every_damaged_byte…` |
//! | 5.3: a cookie is needed under load, and otherwise never; where we differ, a few from known addresses and awaited answers need none | `gate::without_load_nobody_needs_a_cookie…`, `gate::under_load_only_a_cookie_opens_the_gate`, `gate::load_lasts_a_second…`, `gate::under_load_a_known_address…`, `gate::under_load_answers_that_are_awaited…`, `gate::an_index_has_its_share…` |
//! | who is new gets his cookie before who floods (not in the paper) | `gate::who_was_not_seen_for_five_seconds_has_returned_and_later_is_new` |
//! | 5.3: a proven source is limited | `gate::under_load_a_source_has_five_messages…`, `gate::a_whole_network_of_ipv6…`, `gate::a_flood_of_sources_fills_a_fixed_table`, `gate::cookies_are_given_out_at_a_bounded_rate…` |
//! | 5.3: a cookie is bound to address and secret | `cookies::a_cookie_proves_one_address_and_port_only`, `gate::a_cookie_dies_with_the_secret` |
//! | 5.3: a cookie reply is sealed and bound to the message it answers | `cookies::a_reply_counts_only_for_the_last_message_and_once`, `cookies::every_damaged_byte_of_a_reply…`, `cookies::a_reply_of_another_responder…` |
//! | 5.4: constants, HASH, MAC, HMAC, KDF, DH, AEAD | `known::every_byte_of_a_handshake…`, `known::every_byte_of_a_cookie…` |
//! | 5.4: keys are fresh and ephemeral | `two_responses_to_one_initiation_differ…` |
//! | 5.4.1: both ends agree, whichever begins | `both_ends_agree_on_keys…`, `oracle::boringtun_answers_our_initiations`, `oracle::boringtun_takes_our_answers` |
//! | 5.4.2, 5.4.3: layouts, exact lengths, reserved bytes zero | `known::…`, `refusals::only_the_exact_length_is_taken`, `gate::each_refusal_has_its_reason` |
//! | 5.4.2: the initiation proves who made it | `refusals::messages_of_strangers…`, `refusals::every_damaged_byte_of_an_initiation…` |
//! | 5.4.3: the response answers this initiation | `refusals::a_response_to_another_initiation…`, `refusals::every_damaged_byte_of_a_response…` |
//! | 5.4.4: MAC1, MAC2, no MAC2 without a cookie | `known::every_byte_of_a_cookie…`, `cookies::a_cookie_is_good_for_two_minutes…` |
//! | 5.4.4: a cookie is forgotten after 120 s | `cookies::a_cookie_is_good_for_two_minutes_at_the_initiator` |
//! | 5.4.5: transport keys, one per direction | `known::every_byte_of_a_handshake…`, `oracle::…` (data both ways) |
//! | 5.4.7: cookie reply; the secret changes every 120 s | `known::every_byte_of_a_cookie…`, `cookies::the_secret_changes_every_two_minutes…`, `oracle::we_take_boringtuns_cookies…`, `oracle::boringtun_takes_our_cookies…` |
//! | the kernel's and RFC 7748's rule: points of low order are refused | `refusals::a_peer_of_low_order…`, `refusals::an_ephemeral_key_of_low_order…`, `refusals::an_initiator_that_claims…` |

#![forbid(unsafe_code)]

mod cookie;
mod gate;
mod handshake;
mod keys;
mod message;
mod recent;
mod sources;
mod symmetric;
mod tai64n;

use std::time::Duration;

#[cfg(feature = "internals")]
pub use cookie::consume_cookie_reply;
pub use cookie::{Cookie, CookieStore, CookieStoreState};
pub(crate) use gate::{Bucket, LOAD_BURST, LOAD_PER_SECOND};
pub use gate::{Gate, Novelty, Standing, Verdict};
pub use handshake::{
    INITIATED_LEN, Initiated, PeekedInitiation, TransportKeys, consume_initiation,
    consume_response, initiation, peek_initiation, response,
};
#[cfg(feature = "internals")]
pub use keys::public_key;
pub use keys::{LocalKeys, Ours, Previous, Remote};
pub(crate) use sources::Sources;
pub use symmetric::{SymmetricState, dh};
pub use tai64n::Tai64n;
#[cfg(test)]
pub(crate) use {recent::RECENT_LEN, sources::SOURCES_MAX};

pub use crate::classify::{COOKIE_LEN as COOKIE_REPLY_LEN, INITIATION_LEN, RESPONSE_LEN, TAG_LEN};
use crate::stats::DropReason;

/// Length of a key, a hash and a shared secret in bytes.
pub const KEY_LEN: usize = 32;
/// Length of MAC1, MAC2 and a cookie in bytes.
pub const MAC_LEN: usize = 16;
/// Initiations of one peer that come sooner than this after the one answered last are not answered
/// (paper §5.1; the kernel and wireguard-go take fifty a second as well).
pub const ANSWER_INTERVAL_MIN: Duration = Duration::from_millis(20);

/// `Debug` that says what a value is, and nothing of what is in it.
macro_rules! secret {
    ($($name:ident),*) => {$(
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(concat!(stringify!($name), "(secret)"))
            }
        }
    )*};
}

secret!(
    Cookie,
    CookieStoreState,
    LocalKeys,
    Previous,
    Remote,
    SymmetricState
);

/// Why a message is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The message has not the length of its type.
    #[error("wrong length")]
    Length,
    /// The message is of another type, or has reserved bytes that are not zero.
    #[error("wrong type")]
    Kind,
    /// MAC1 is wrong: the sender does not know the receiver's public key.
    #[error("wrong mac1")]
    Mac1,
    /// A public key of low order: the shared secret would be zero.
    #[error("public key of low order")]
    LowOrder,
    /// What is sealed cannot be opened: made by somebody else, for somebody else, or damaged.
    #[error("not authentic")]
    Authentication,
    /// The message names another handshake.
    #[error("another index")]
    WrongIndex,
    /// The message was made by another peer.
    #[error("another peer")]
    UnknownPeer,
    /// A cookie came that was not asked for.
    #[error("no cookie expected")]
    NoCookieExpected,
}

impl From<Error> for DropReason {
    /// What a message that fails so is counted under.
    fn from(error: Error) -> DropReason {
        match error {
            Error::Length => DropReason::MessageLength,
            Error::Kind => DropReason::UnknownMessage,
            Error::Mac1 => DropReason::HandshakeMac,
            Error::LowOrder => DropReason::HandshakeLowOrder,
            Error::Authentication => DropReason::HandshakeInvalid,
            Error::WrongIndex => DropReason::UnknownIndex,
            Error::UnknownPeer => DropReason::HandshakeUnknownPeer,
            Error::NoCookieExpected => DropReason::CookieInvalid,
        }
    }
}

/// Gives an initiation or response to `remote` a right MAC1 and no MAC2, as anybody can who knows the
/// public key: for tests and floods.
#[cfg(feature = "internals")]
pub fn put_mac1(remote: &Remote, message: &mut [u8]) {
    message::put_macs(&remote.labels.mac1, None, message);
}

#[cfg(test)]
mod tests;
