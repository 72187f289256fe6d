//! WireGuard sessions: handshakes, timers, keys, counters, replay windows.
//!
//! A [`Session`] takes batches and gives batches: it seals the segments of one run in the caller's
//! send buffer, and opens the datagrams of one GRO batch. Nothing outside this folder knows how.
//! There are two kinds, chosen by [`crate::Engine`]: our own ([`Machine`]), and boringtun's `Tunn`
//! ([`Tunnel`]) for comparison and as oracle: in `dataplane/oracle` each opens what the other seals,
//! under virtual time.
//!
//! # Life of a session of ours
//!
//! 1. No keys: packets wait with the caller. [`Session::initiate`] makes an initiation, which an
//!    alarm repeats. The peer's initiations are answered at any time, also while our own one is
//!    outstanding.
//! 2. A response completes our handshake: its keypair is the current one, and a keep-alive shows the
//!    peer that it is. As responder we have a *next* keypair, which becomes current with the first
//!    message under it. Either is [`Change::Up`].
//! 3. The current keypair seals; it, the next one and the three before it open. Alarms ask for new
//!    keys, send keep-alives, and end what is too old ([`Change::Down`]).
//!
//! A keypair is two halves. The sealing half is a key and an atomic counter: a batch takes its
//! counters by one addition, so any shard may seal. The opening half is a key and a replay window,
//! which belong to the shard that owns the peer: bits 8 to 15 of the receiver index name it, and
//! [`Indexes`] knows which peer an index belongs to.
//!
//! Rooms: `machine` is our session (messages, batches, what an alarm does), `timers` its alarms,
//! `keypair` the keys and their end, `counter` how many messages they sealed, `window` which they
//! opened, `indexes` and `awaited` whose a receiver index is, `opened` what a batch held, `state` the
//! session as data, `tunn` boringtun's. For tests and fuzzing: `end` is one end of a tunnel, `known` a model
//! of its keypairs, `operations` what is done with two, `model` the counter under loom.
//!
//! # The rules, and the tests that show them
//!
//! Sections are the WireGuard paper's. Messages themselves (§5.4) are [`crate::noise`]'s; the tests
//! named here are in `session/tests`, in `rules` unless said otherwise; … stands for the rest of a
//! name. A test sees to it that they exist.
//!
//! | Rule | Test |
//! |---|---|
//! | §5.1 an initiation whose timestamp is not newer is a replay | `an_initiation_that_is_not_newer_is_a_replay`, `peer::timestamps_are_remembered_while_our_key_is_gone` |
//! | §5.1 initiations less than 20 ms apart are not answered | `initiations_less_than_twenty_milliseconds_apart_are_not_answered` |
//! | §5.2 a preshared key, which may change | `without_the_same_preshared_key_there_is_no_session_and_a_new_one_counts_from_the_next` |
//! | §5.3, §5.4.7, §6.6 a cookie goes into the next message, for 120 s, and makes none by itself | `a_cookie_goes_into_the_next_message_for_two_minutes` |
//! | §5.4 ephemeral keys of the past are gone | `the_generator_does_not_keep_the_ephemeral_keys_it_gave` |
//! | §5.4 exact message lengths | `basics::messages_of_wrong_lengths_are_dropped` |
//! | §5.1, §5.4.4 MAC1; what is not authentic is not answered | `basics::a_message_with_a_wrong_mac_or_from_a_stranger_is_dropped` |
//! | §5.4.6 counters from zero, one per message and key; keep-alives without a packet | `basics::counters_begin_at_zero_and_every_message_of_a_key_has_the_next` |
//! | §5.4.6 padding to 16 bytes with zeros, not past the MTU | `basics::packets_of_every_length_pass_padded_to_sixteen_but_not_past_the_mtu`, `basics::padding_is_zeros` |
//! | §5.4.6 replay window, counters below `REJECT_AFTER_MESSAGES` | those of `window` |
//! | §6.1 the responder waits for the first message under new keys | `the_responder_does_not_seal_before_the_initiator_has`, `a_bad_message_does_not_confirm_the_next_keys` |
//! | §6.1 the initiator shows by its first message, a keep-alive if need be, that it has the keys | `basics::counters_begin_at_zero_and_every_message_of_a_key_has_the_next` |
//! | §6.3 previous keys still open | `basics::a_second_handshake_replaces_the_keys_while_data_flows`, `crossing_rekeys_lose_nothing_that_is_under_way`, `rekeys_that_cross_again_…` |
//! | §6.1, §6.4 `REKEY_TIMEOUT` and jitter between initiations, `REKEY_ATTEMPT_TIME` | `an_initiation_is_repeated_after_five_seconds_and_jitter_for_ninety_seconds`, `no_initiation_follows_a_handshake_message_within_five_seconds` |
//! | §6.4 new data begins the attempt anew | `new_data_begins_the_ninety_seconds_anew` |
//! | §6.2 `REKEY_AFTER_MESSAGES` | `after_two_to_the_sixty_messages_whoever_sends_rekeys` |
//! | §6.2 `REKEY_AFTER_TIME` when sending, initiator only | `the_initiator_that_sends_rekeys_after_two_minutes_and_the_responder_does_not`, `a_keepalive_after_two_minutes_rekeys_too` |
//! | §6.2 165 s when receiving, initiator only | `the_initiator_that_receives_rekeys_after_165_seconds_once` |
//! | §6.2 `REJECT_AFTER_TIME` | `keys_are_not_used_after_three_minutes` |
//! | §6.2 `REJECT_AFTER_MESSAGES` | `the_last_counter_is_below_reject_after_messages`, those of `keypair` and `model` |
//! | §6.3 zeroing after three times `REJECT_AFTER_TIME` | `keys_are_erased_after_nine_minutes_without_new_ones` |
//! | §6.5 passive keep-alive after `KEEPALIVE_TIMEOUT` | `data_that_is_not_answered_for_ten_seconds_is_answered_by_a_keepalive`, `data_that_goes_on_is_answered_by_a_keepalive_every_ten_seconds` |
//! | §6.5 data without any answer: a new handshake, here after 3 s, and 15 s under fresh keys | `data_that_gets_no_answer_makes_a_handshake` |
//! | persistent keep-alive (not in the paper; as in the kernel) | `a_persistent_keepalive_is_sent_when_nothing_else_was`, `a_persistent_keepalive_tries_without_end` |
//! | all this where another shard seals with lent keys | `keys_that_are_lent_…`, `data_sealed_elsewhere_…` |
//! | public keys of low order are refused | `a_peer_with_a_key_of_low_order_is_never_spoken_to` |
//! | initiations that cross stall nobody | `basics::crossing_…`, `network::simultaneous_starts_never_stall` |
//!
//! # Where we differ
//!
//! * Our outstanding initiation survives that we answer the peer's. The kernel and wireguard-go
//!   forget theirs, and two of them that start at once wait for the retry.
//! * Three previous keypairs are kept, since handshakes that cross make two at once, and may cross
//!   again before the peer seals with either.
//! * Data without an answer makes a handshake after [`QUIET_LIMIT`] instead of 15 s, once keys are
//!   older than [`FRESH`]: a peer that was restarted is reached again soon.
//! * A new way to the peer gets a new initiation at once ([`INITIATION_INTERVAL_MIN`]).
//! * Data that cannot be opened makes one initiation ([`Session::initiate_once`]): a peer may go on
//!   with keys that we have lost.
//! * Our key can be renewed under living sessions ([`Engine::renew_key`]): we begin handshakes with the
//!   new one, and answer those for the one before for a while. Who has no session under the new one may
//!   have given up the old ones: initiations come sooner ([`RENEWAL_QUIET_LIMIT`], [`RENEWAL_RETRY`]).
//! * An attempt that is given up drops its ephemeral key at once, and each retry the one before, so
//!   none lives until §6.3 erases it.

#![forbid(unsafe_code)]

mod awaited;
mod counter;
#[cfg(feature = "internals")]
mod end;
mod indexes;
mod keypair;
#[cfg(feature = "internals")]
mod known;
mod machine;
#[cfg(test)]
mod model;
mod opened;
#[cfg(feature = "internals")]
pub(crate) mod operations;
mod state;
mod timers;
#[cfg(feature = "boringtun")]
mod tunn;
mod window;

mod sync {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering};
}

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use zeroize::Zeroizing;

pub(crate) use awaited::Awaited;
#[cfg(test)]
pub(crate) use awaited::PLACES;
#[cfg(feature = "internals")]
pub use end::{End, Got};
#[cfg(feature = "internals")]
pub use known::Known;
pub(crate) use machine::Machine;
pub(crate) use opened::Opened;
#[cfg(feature = "boringtun")]
use tunn::Tunnel;
#[cfg(test)]
pub(crate) use {keypair::keypair_cost, opened::SPANS_ROOM};

use crate::aead::Aead;
use crate::classify::DATA_HEADER_LEN;
use crate::config;
use crate::noise::{LocalKeys, Ours, PeekedInitiation, Previous, Remote, Tai64n};
use crate::packet::segment::Plan;
use crate::stats::DropReason;
use crate::types::{PeerConfig, PeerId};
use indexes::Indexes;
pub(crate) use keypair::Sealing;

/// Bytes a data message adds: header of 16 and tag of 16.
pub(crate) const OVERHEAD: usize = 32;
/// Space any message of [`Session`] but a data message needs at most.
pub(crate) const MESSAGE_LEN_MAX: usize = 148;
/// Messages sealed or opened at once at most: the kernel's `UDP_MAX_SEGMENTS`.
pub(crate) const BATCH_MAX: usize = 128;
/// Low bits of a receiver index that boringtun's `Tunn` counts up per handshake.
const COUNTED_BITS: u32 = 8;
/// Data messages are padded to a multiple of this (WireGuard paper §5.4.6).
const PADDING: usize = 16;

// WireGuard paper §6.1, by its names.
/// Messages after which whoever sends asks for new keys.
const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// Messages after which a key is not used any more: the room above is for the replay window there,
/// and for batches of several threads here.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Age at which the initiator of a key that sends asks for a new one.
const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// Age at which a key is not used any more.
const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// How long initiations are repeated.
const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// Time between initiations.
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Data that was received and not answered for this long is answered by a keep-alive.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// What is added to `REKEY_TIMEOUT` at random at most, so that two ends do not keep step (§6.1).
const REKEY_TIMEOUT_JITTER_MAX: Duration = Duration::from_millis(334);
/// Age at which the initiator of a key that receives asks for a new one (§6.2): 165 s.
const RECEIVE_REKEY_AFTER_TIME: Duration = Duration::from_secs(
    REJECT_AFTER_TIME.as_secs() - KEEPALIVE_TIMEOUT.as_secs() - REKEY_TIMEOUT.as_secs(),
);
/// Time without new keys after which all old ones are erased (§6.3).
const ZERO_AFTER_TIME: Duration = Duration::from_secs(3 * REJECT_AFTER_TIME.as_secs());

// Ours.
/// A new way to the peer deserves a new initiation at once, but not more often than this:
/// responders ignore more than fifty a second.
const INITIATION_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Data without any answer for this long makes a new handshake, if the keys are not fresh: a peer
/// that lost them in a restart cannot say so. The paper waits 15 s (§6.5), and so do we under keys
/// that are younger than [`FRESH`]: a stream that gets no answers by its nature costs a handshake
/// only so often.
const QUIET_LIMIT: Duration = Duration::from_secs(3);
/// And keys are fresh for this long.
const FRESH: Duration = Duration::from_secs(15);
/// The same, and the time between initiations at first, while our key is being renewed and the peer has not
/// been met under the new one: it may have given up our sessions with the old, and learns of the new one at
/// any moment.
const RENEWAL_QUIET_LIMIT: Duration = Duration::from_millis(250);
const RENEWAL_RETRY: Duration = Duration::from_millis(400);

/// When a call happens: a time to reckon with, and the wall clock (since the start of 1970), which
/// goes into initiations and nowhere else.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The time to reckon with.
    pub now: Instant,
    /// The wall clock.
    pub wall: Duration,
}

/// What all sessions of a shard have in common.
pub(crate) struct Engine {
    mtu: usize,
    own: Own,
    /// Present if sessions are boringtun's.
    #[cfg(feature = "boringtun")]
    tunn: Option<Box<tunn::Common>>,
}

/// The parts that our own sessions use.
struct Own {
    local: LocalKeys,
    /// The key before it, until it is erased.
    previous: Option<Previous>,
    /// Grows with every renewal.
    generation: u32,
    aead: Aead,
    rng: StdRng,
    indexes: Indexes,
}

impl Own {
    /// The keys that messages may be made for.
    fn ours(&self, now: Instant) -> Ours<'_> {
        Ours::at(now, &self.local, self.previous.as_ref())
    }

    /// The key of a generation, while it counts.
    fn key_of(&self, generation: u32, now: Instant) -> Option<&LocalKeys> {
        let ours = self.ours(now);
        match self.generation.wrapping_sub(generation) {
            0 => Some(ours.local()),
            1 => ours.previous(),
            _ => None,
        }
    }

    /// Erases the generator and goes on with one that it has seeded. To be called when it has given
    /// an ephemeral key: a generator keeps its seed, so whoever came by it later could compute every
    /// key it ever gave.
    fn renew_rng(&mut self) {
        self.rng = StdRng::from_rng(&mut self.rng);
    }

    /// What is added to a time so that two ends do not keep step (§6.1).
    fn jitter(&mut self) -> Duration {
        self.rng
            .random_range(Duration::ZERO..=REKEY_TIMEOUT_JITTER_MAX)
    }
}

fn padded_len(len: usize, mtu: usize) -> usize {
    len.next_multiple_of(PADDING).min(mtu).max(len)
}

impl Engine {
    /// An engine of the kind for our private key, on one shard; packets are padded up to `mtu`
    /// bytes at most.
    pub(crate) fn new(
        kind: config::Engine,
        private_key: &Zeroizing<[u8; 32]>,
        mtu: usize,
        shard: u8,
        rng: StdRng,
    ) -> Engine {
        let counted_bits = match kind {
            config::Engine::Ringtail => 0,
            config::Engine::Boringtun => COUNTED_BITS,
        };
        Engine {
            mtu,
            own: Own {
                local: LocalKeys::new(private_key),
                previous: None,
                generation: 0,
                aead: Aead::detect(),
                rng,
                indexes: Indexes::new(shard, counted_bits),
            },
            #[cfg(feature = "boringtun")]
            tunn: (kind == config::Engine::Boringtun)
                .then(|| Box::new(tunn::Common::new(private_key))),
        }
    }

    /// Makes messages with the key from now on that has renewed ours, so many times (0: it is the same);
    /// those for the one before it are answered up to a moment. False if it cannot: boringtun's sessions
    /// have theirs for their life.
    #[must_use]
    pub(crate) fn renew_key(
        &mut self,
        key: &Zeroizing<[u8; 32]>,
        renewals: u32,
        previous: Option<(&Zeroizing<[u8; 32]>, Instant)>,
    ) -> bool {
        if renewals > 0 {
            #[cfg(feature = "boringtun")]
            if self.tunn.is_some() {
                return false;
            }
            self.own.local = LocalKeys::new(key);
            self.own.generation = self.own.generation.wrapping_add(renewals);
        }
        self.keep_key(previous);
        true
    }

    /// What is made for this key before ours is answered up to a moment.
    pub(crate) fn keep_key(&mut self, previous: Option<(&Zeroizing<[u8; 32]>, Instant)>) {
        self.own.previous = previous.map(|(key, until)| Previous::new(key, until));
    }

    /// Shows the handshake thread under which receiver indexes answers are awaited.
    pub(crate) fn show_awaited(&mut self, to: Arc<Awaited>) {
        self.own.indexes.show(to);
    }

    /// Pads up to another MTU from now on.
    pub(crate) fn set_mtu(&mut self, mtu: usize) {
        self.mtu = mtu;
    }

    /// Length of the data message for an inner packet of `len` bytes.
    #[inline]
    pub(crate) fn sealed_len(&self, len: usize) -> usize {
        padded_len(len, self.mtu) + OVERHEAD
    }

    /// Puts segments `range` of a planned packet into a send buffer, each with the room that
    /// [`Sealing::seal`] wants: header, plaintext padded with zeros, tag.
    ///
    /// # Panics
    /// If `out` is shorter than the sealed lengths together.
    pub(crate) fn stage(
        &self,
        plan: &Plan,
        packet: &[u8],
        range: Range<usize>,
        out: &mut [u8],
    ) -> Staged {
        let mut staged = Staged::default();
        for i in range {
            let len = plan.segment_len(i);
            let padded = padded_len(len, self.mtu);
            let message = &mut out[staged.bytes..][..padded + OVERHEAD];
            let plain = &mut message[DATA_HEADER_LEN..][..padded];
            plan.write(i, packet, plain);
            plain[len..].fill(0);
            staged.bytes += message.len();
            staged.segments += 1;
        }
        staged
    }

    /// Seals staged messages, as [`Session::seal`] does, under keys that another shard has lent.
    ///
    /// # Errors
    /// [`DropReason::SessionExpired`]; nothing is sealed then.
    pub(crate) fn seal_lent(
        &self,
        sealing: &Sealing,
        now: Instant,
        messages: &mut [u8],
        stride: usize,
    ) -> Result<(), DropReason> {
        sealing.seal(&self.own.aead, now, messages, stride)
    }

    /// The peer whose session has the receiver index.
    #[inline]
    pub(crate) fn holder(&self, receiver_index: u32) -> Option<PeerId> {
        self.own.indexes.holder(receiver_index)
    }

    /// A session with a peer.
    pub(crate) fn session(&mut self, now: Instant, config: &PeerConfig) -> Session {
        let preshared = config.preshared_key.as_deref();
        let keepalive = config.persistent_keepalive;
        #[cfg(feature = "boringtun")]
        if let Some(common) = &self.tunn {
            let index = self.own.indexes.claim(&mut self.own.rng, config.id);
            let key = &config.public_key;
            let tunnel = Tunnel::new(common, now, key, preshared.copied(), keepalive, index);
            return Session::Boringtun(Box::new(tunnel));
        }
        let remote = Remote::new(&self.own.local, &config.public_key, preshared);
        let generation = self.own.generation;
        let machine = Machine::new(now, config.id, remote, generation, keepalive);
        Session::Ours(Box::new(machine))
    }

    /// Ends a session.
    pub(crate) fn close(&mut self, session: Session) {
        match session {
            Session::Ours(mut machine) => machine.close(&mut self.own),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(tunnel) => self.own.indexes.release(tunnel.index),
        }
    }

    /// What a session of boringtun's needs.
    #[cfg(feature = "boringtun")]
    fn common(&mut self) -> &mut tunn::Common {
        let common = self.tunn.as_deref_mut();
        common.expect("sessions of this kind come from an engine that has it")
    }
}

#[cfg_attr(
    not(test),
    expect(
        dead_code,
        reason = "for the hand-over to a new process, design decision 16"
    )
)]
impl Engine {
    /// Ends a session and returns what another process goes on with; boringtun's cannot.
    pub(crate) fn export(&mut self, now: Instant, session: Session) -> Option<state::SessionState> {
        match session {
            Session::Ours(machine) => Some(machine.export(&mut self.own, now)),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(_) => {
                self.close(session);
                None
            }
        }
    }

    /// Takes up a session that was exported; `None` if it cannot be.
    pub(crate) fn import(
        &mut self,
        now: Instant,
        config: &PeerConfig,
        state: &state::SessionState,
    ) -> Option<Session> {
        let preshared = config.preshared_key.as_deref();
        let remote = Remote::new(&self.own.local, &config.public_key, preshared);
        let mut machine = Machine::import(&mut self.own, now, config.id, remote, state)?;
        machine.set_keepalive(now, config.persistent_keepalive);
        Some(Session::Ours(Box::new(machine)))
    }
}

/// Whether keys came or went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Change {
    /// Neither.
    #[default]
    Same,
    /// A handshake completed: keys are fresh.
    Up,
    /// The last keys are gone, or the peer does not answer.
    Down,
}

/// What a message or the passing of time brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Length of a message to send, at the start of the caller's buffer.
    pub message: Option<usize>,
    /// The message is a handshake message (not a keep-alive).
    pub handshake: bool,
    /// Whether keys came or went.
    pub change: Change,
}

impl Outcome {
    /// There may be a handshake message to send.
    fn set_handshake(&mut self, message: Option<usize>) {
        self.message = message;
        self.handshake = message.is_some();
    }
}

/// What opening a batch brought, besides the packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// Datagrams that were authentic and new, keep-alives included.
    pub datagrams: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Whether keys came.
    pub change: Change,
    /// The keys are too old to open anything: the peer goes on with what we have given up.
    pub expired: bool,
}

/// Messages that were put into a send buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Staged {
    pub(crate) segments: usize,
    pub(crate) bytes: usize,
}

/// What is remembered of a peer when its session ends with our key, for the next one: the same key
/// may come back, and then an old initiation must still be old. The kernel and wireguard-go keep it
/// in the peer too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stamps {
    /// Of the peer's newest initiation.
    newest: Option<Tai64n>,
    /// Of our last one.
    stamped: Option<Tai64n>,
}

/// One peer's session.
pub(crate) enum Session {
    /// Our own.
    Ours(Box<Machine>),
    /// boringtun's.
    #[cfg(feature = "boringtun")]
    Boringtun(Box<Tunnel>),
}

impl Session {
    /// Takes over another preshared key, which counts from the next handshake, or keep-alive. False
    /// if it cannot: `Tunn` holds both for its life, so the session has to be made anew.
    #[cfg_attr(
        not(feature = "boringtun"),
        expect(unused_variables, reason = "it is boringtun's")
    )]
    pub(crate) fn reconfigure(&mut self, now: Instant, old: &PeerConfig, new: &PeerConfig) -> bool {
        match self {
            Session::Ours(machine) => {
                machine.set_preshared(new.preshared_key.as_deref());
                machine.set_keepalive(now, new.persistent_keepalive);
                true
            }
            #[cfg(feature = "boringtun")]
            Session::Boringtun(_) => {
                old.preshared_key == new.preshared_key
                    && old.persistent_keepalive == new.persistent_keepalive
            }
        }
    }

    /// What the peer's next session is to know.
    pub(crate) fn stamps(&self) -> Stamps {
        match self {
            Session::Ours(machine) => machine.stamps(),
            #[cfg(feature = "boringtun")]
            // boringtun does not tell.
            Session::Boringtun(_) => Stamps::default(),
        }
    }

    /// Tells a new session what the one before it knew.
    pub(crate) fn set_stamps(&mut self, stamps: Stamps) {
        match self {
            Session::Ours(machine) => machine.set_stamps(stamps),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(_) => {}
        }
    }

    /// Erases what it has of keys of ours that count no more, but the keys of data.
    pub(crate) fn forget_keys_before(&mut self, engine: &Engine) {
        match self {
            Session::Ours(machine) => machine.forget_shared(&engine.own),
            #[cfg(feature = "boringtun")]
            // It does not live through a renewal.
            Session::Boringtun(_) => {}
        }
    }

    /// True if it has keys to seal with.
    pub(crate) fn ready(&self, now: Instant) -> bool {
        match self {
            Session::Ours(machine) => machine.ready(now),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(tunnel) => tunnel.ready(),
        }
    }

    /// The sealing half of its keys, for other shards to seal with ([`Engine::seal_lent`]), if there
    /// are any now. What they seal is to be told by [`Session::sealed_elsewhere`].
    #[inline]
    pub(crate) fn lend(&self, now: Instant) -> Option<&Arc<Sealing>> {
        match self {
            Session::Ours(machine) => machine.lend(now),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(_) => None,
        }
    }

    /// Takes note that other shards have sealed data, the last of it at `at`; `heard` is when
    /// something authentic arrived after that, if it did.
    pub(crate) fn sealed_elsewhere(
        &mut self,
        engine: &mut Engine,
        now: Instant,
        at: Instant,
        heard: Option<Instant>,
    ) {
        match self {
            Session::Ours(machine) => machine.sealed_elsewhere(&mut engine.own, now, at, heard),
            #[cfg(feature = "boringtun")]
            // Its keys are lent to nobody.
            Session::Boringtun(_) => {}
        }
    }

    /// True while an initiation of ours waits for its response.
    pub(crate) fn initiating(&self) -> bool {
        match self {
            Session::Ours(machine) => machine.initiating(),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(tunnel) => tunnel.initiating(),
        }
    }

    /// When [`Session::handle_timeout`] wants to be called; `None` while only somebody who sends or
    /// receives can make anything happen.
    #[inline]
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        match self {
            Session::Ours(machine) => machine.poll_timeout(),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(tunnel) => tunnel.poll_timeout(),
        }
    }

    /// Puts segments `range` of a planned packet, all of one sealed length, back to back into a
    /// send buffer, for [`Session::seal`]. Our engine leaves them as they are, boringtun has sealed
    /// them. What is missing behind the range's end could not be sealed.
    ///
    /// # Panics
    /// If `out` is shorter than the sealed lengths together, or the session is not ready.
    pub(crate) fn stage(
        &mut self,
        engine: &mut Engine,
        plan: &Plan,
        packet: &mut [u8],
        range: Range<usize>,
        out: &mut [u8],
    ) -> Staged {
        match self {
            Session::Ours(_) => engine.stage(plan, packet, range, out),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(tunnel) => {
                let mtu = engine.mtu;
                tunnel.seal(engine.common(), mtu, plan, packet, range, out)
            }
        }
    }

    /// Seals staged messages of `stride` bytes, of which only the last may be shorter: the whole
    /// batch, or nothing. At most [`BATCH_MAX`].
    ///
    /// # Errors
    /// The reason to drop it.
    pub(crate) fn seal(
        &mut self,
        engine: &mut Engine,
        now: Instant,
        messages: &mut [u8],
        stride: usize,
    ) -> Result<(), DropReason> {
        match self {
            Session::Ours(machine) => machine.seal(&mut engine.own, now, messages, stride),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(_) => Ok(()),
        }
    }

    /// Opens a run of datagrams that all carry the receiver index `index`: `stride` bytes each, of
    /// which only the last may be shorter. The packets are in `opened` (their plaintext perhaps in
    /// `datagrams`); what fails is given to `dropped`.
    pub(crate) fn open(
        &mut self,
        engine: &mut Engine,
        now: Instant,
        index: u32,
        datagrams: &mut [u8],
        stride: usize,
        opened: &mut Opened,
        dropped: impl FnMut(DropReason),
    ) -> OpenReport {
        opened.clear();
        match self {
            Session::Ours(machine) => {
                let own = &mut engine.own;
                machine.open(own, now, index, datagrams, stride, opened, dropped)
            }
            #[cfg(feature = "boringtun")]
            Session::Boringtun(tunnel) => {
                tunnel.open(index, datagrams.chunks(stride.max(1)), opened, dropped)
            }
        }
    }

    /// Handles a handshake message that names this session (or, an initiation, its peer). `peeked` is
    /// what the handshake thread has found out about an initiation already.
    ///
    /// # Errors
    /// The reason to drop it.
    pub(crate) fn handle_handshake(
        &mut self,
        engine: &mut Engine,
        at: Moment,
        message: &[u8],
        peeked: Option<&PeekedInitiation>,
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Result<Outcome, DropReason> {
        match self {
            Session::Ours(machine) => {
                machine.handle_handshake(&mut engine.own, at, message, peeked, out)
            }
            #[cfg(feature = "boringtun")]
            Session::Boringtun(tunnel) => tunnel.handle_handshake(message, out),
        }
    }

    /// Makes an initiation, unless one went out a moment ago; `again` makes another although one is
    /// outstanding.
    pub(crate) fn initiate(
        &mut self,
        engine: &mut Engine,
        at: Moment,
        again: bool,
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Option<usize> {
        match self {
            Session::Ours(machine) => machine.initiate(&mut engine.own, at, again, out),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(tunnel) => tunnel.initiate(at.now, again, out),
        }
    }

    /// Makes an initiation that is not repeated, unless one is outstanding or a handshake message went
    /// out less than `REKEY_TIMEOUT` ago.
    pub(crate) fn initiate_once(
        &mut self,
        engine: &mut Engine,
        at: Moment,
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Option<usize> {
        match self {
            Session::Ours(machine) => machine.initiate_once(&mut engine.own, at, out),
            #[cfg(feature = "boringtun")]
            // It repeats each of its initiations.
            Session::Boringtun(tunnel) => tunnel.initiate(at.now, false, out),
        }
    }

    /// True if [`Session::initiate_once`] would make one.
    pub(crate) fn may_initiate(&self, now: Instant) -> bool {
        match self {
            Session::Ours(machine) => machine.may_initiate(now),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(tunnel) => !tunnel.initiating(),
        }
    }

    /// Lets time pass: retries, rekeying, keep-alives, expiry. To be called again while
    /// [`Session::poll_timeout`] is not in the future. `quiet_for` is how long data has been sent
    /// without an answer, which boringtun does not tell.
    #[cfg_attr(
        not(feature = "boringtun"),
        expect(unused_variables, reason = "it is boringtun's")
    )]
    pub(crate) fn handle_timeout(
        &mut self,
        engine: &mut Engine,
        at: Moment,
        quiet_for: Duration,
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Outcome {
        match self {
            Session::Ours(machine) => machine.handle_timeout(&mut engine.own, at, out),
            #[cfg(feature = "boringtun")]
            Session::Boringtun(tunnel) => tunnel.tick(at.now, quiet_for, out),
        }
    }
}

#[cfg(test)]
mod tests;
