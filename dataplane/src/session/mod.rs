//! WireGuard sessions: handshake, timers, keys. The only user of boringtun.
//!
//! This is the seam where our own engine goes. A [`Session`] takes batches and gives batches: it
//! seals the segments of one super-packet back to back into the caller's send buffer, and opens the
//! datagrams of one GRO batch into an [`Arena`]. Nothing outside this folder knows how.
//!
//! Life of a session under boringtun:
//!
//! 1. No keys: packets wait with the caller. [`Session::initiate`] makes an initiation; the shard
//!    retries by [`Session::tick`] every `REKEY_TIMEOUT` for `REKEY_ATTEMPT_TIME`.
//! 2. A response (as initiator), or the first data under a new index (as responder), makes the
//!    session [ready](Session::ready): [`Change::Up`].
//! 3. Ticks ask for a new handshake after `REKEY_AFTER_TIME`, send keep-alives, and drop keys after
//!    `REJECT_AFTER_TIME`: [`Change::Down`].
//!
//! `Tunn` rounds its clock to its last tick, so a session that slept is ticked before it is used,
//! and one that is in use is ticked every [`TICK`]. It is never given a packet while it has no
//! keys: it would queue it where nobody sees it.
//!
//! **Crossing handshakes.** When both ends initiate at once, `Tunn` answers the peer's initiation
//! and keeps its own outstanding one beside it, so either response completes. But it forgets the
//! retransmission timer of its own one; if responses are lost both ends would wait for each other.
//! So the session keeps a timer of its own and initiates again.

#![forbid(unsafe_code)]

mod arena;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

pub(crate) use arena::Arena;

use crate::channel::PeerConfig;
use crate::stats::DropReason;
use crate::tun::segment::Plan;

/// Bytes a data message adds: header of 16 and tag of 16.
pub(crate) const OVERHEAD: usize = 32;
/// Space any message of [`Session`] but a data message needs at most.
pub(crate) const MESSAGE_LEN_MAX: usize = 148;
/// How often a session in use is ticked.
pub(crate) const TICK: Duration = Duration::from_millis(250);
/// WireGuard paper §6.1: an initiation is repeated after this, plus jitter.
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Jitter on top of it, at most.
const REKEY_JITTER: Duration = Duration::from_millis(334);
/// WireGuard paper §6.1: and given up after this.
const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// A second initiation to a peer is not sent sooner than this: responders ignore more than fifty a
/// second, and a new path deserves a new try at once.
const INITIATION_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Data without any answer for this long makes a new handshake, if the keys are not fresh: a peer
/// that lost them in a restart cannot say so. WireGuard itself waits 15 s (paper §6.5).
const QUIET_LIMIT: Duration = Duration::from_secs(3);
/// And keys are fresh for this long, so that a stream that gets no answers by its nature costs a
/// handshake only so often.
const FRESH: Duration = Duration::from_secs(15);
/// Data messages are padded to a multiple of this (WireGuard paper §5.4.6).
const PADDING: usize = 16;

/// What all sessions of a shard have in common.
pub(crate) struct Engine {
    private: StaticSecret,
    /// Only checks MAC1: load is measured before a message gets here.
    limiter: Arc<RateLimiter>,
    mtu: usize,
    /// One padded packet.
    scratch: Box<[u8]>,
}

/// Longest inner packet, in bytes.
const PACKET_LEN_MAX: usize = 65_535;

impl Engine {
    /// An engine for our private key; packets are padded up to `mtu` bytes at most.
    pub(crate) fn new(private_key: &Zeroizing<[u8; 32]>, mtu: usize) -> Engine {
        let private = StaticSecret::from(**private_key);
        let limiter = Arc::new(RateLimiter::new(&PublicKey::from(&private), u64::MAX));
        Engine {
            private,
            limiter,
            mtu,
            scratch: vec![0; PACKET_LEN_MAX + PADDING].into(),
        }
    }

    /// Pads up to another MTU from now on.
    pub(crate) fn set_mtu(&mut self, mtu: usize) {
        self.mtu = mtu;
    }

    /// Length of the data message for an inner packet of `len` bytes.
    pub(crate) fn sealed_len(&self, len: usize) -> usize {
        self.padded_len(len) + OVERHEAD
    }

    fn padded_len(&self, len: usize) -> usize {
        len.next_multiple_of(PADDING).min(self.mtu).max(len)
    }

    /// A session with a peer. `index` is 24 bits; the session adds eight of its own below.
    pub(crate) fn session(
        &self,
        public_key: &[u8; 32],
        preshared_key: Option<[u8; 32]>,
        keepalive: Option<u16>,
        index: u32,
    ) -> Session {
        let tunn = Tunn::new(
            self.private.clone(),
            PublicKey::from(*public_key),
            preshared_key,
            keepalive.filter(|&secs| secs > 0),
            index,
            Some(Arc::clone(&self.limiter)),
        );
        Session {
            tunn: Box::new(tunn),
            ready: false,
            attempt: None,
            fresh_since: None,
            known: [None; 2],
            keepalive: keepalive.is_some_and(|secs| secs > 0),
        }
    }
}

/// Whether keys came or went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Change {
    /// Neither.
    #[default]
    Same,
    /// A handshake completed: keys are fresh.
    Up,
    /// The last keys are gone, or the peer does not answer.
    Down,
}

/// An outstanding initiation of ours.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    started: Instant,
    last: Instant,
}

/// One peer's session.
pub(crate) struct Session {
    tunn: Box<Tunn>,
    ready: bool,
    attempt: Option<Attempt>,
    /// When the last handshake completed, by the caller's clock; the first tick after it.
    fresh_since: Option<Instant>,
    /// The receiver indexes whose handshakes have been reported, newest first.
    known: [Option<u32>; 2],
    keepalive: bool,
}

/// What a message or a tick brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Length of a message to send, at the start of the caller's buffer.
    pub(crate) message: Option<usize>,
    /// The message is a handshake message (not a keep-alive).
    pub(crate) handshake: bool,
    pub(crate) change: Change,
}

/// What opening a batch brought, besides the packets in the arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct OpenReport {
    /// Datagrams that were authentic and new, keep-alives included.
    pub(crate) datagrams: usize,
    /// Their bytes.
    pub(crate) bytes: usize,
    pub(crate) change: Change,
}

impl Session {
    /// Takes over another preshared key or keep-alive. False if it cannot: `Tunn` holds both for its
    /// life, so the session has to be made anew.
    pub(crate) fn reconfigure(&mut self, old: &PeerConfig, new: &PeerConfig) -> bool {
        old.preshared_key == new.preshared_key
            && old.persistent_keepalive == new.persistent_keepalive
    }

    /// True if it has keys to seal with.
    pub(crate) fn ready(&self) -> bool {
        self.ready
    }

    /// True if nothing will happen here until somebody has something to send or receive: ticks may
    /// stop.
    pub(crate) fn dormant(&self) -> bool {
        !self.ready && self.attempt.is_none() && !self.keepalive
    }

    /// True while an initiation of ours waits for its response.
    pub(crate) fn initiating(&self) -> bool {
        self.attempt.is_some()
    }

    /// Seals segments `range` of a planned packet, back to back, and returns the bytes written.
    /// Segments are staged inside `packet`, which is used up front to back.
    ///
    /// # Panics
    /// If `out` is shorter than the sealed lengths together, or the session is not ready.
    pub(crate) fn seal(
        &mut self,
        engine: &mut Engine,
        plan: &Plan,
        packet: &mut [u8],
        range: Range<usize>,
        out: &mut [u8],
    ) -> Result<usize, DropReason> {
        assert!(self.ready, "packets wait with the caller");
        let mut written = 0;
        for i in range {
            let segment = plan.stage(i, packet);
            let len = segment.len();
            let padded = engine.padded_len(len);
            let plain = if padded == len {
                &packet[segment]
            } else {
                engine.scratch[..len].copy_from_slice(&packet[segment]);
                engine.scratch[len..padded].fill(0);
                &engine.scratch[..padded]
            };
            // `Tunn` wants 148 bytes of room for any message.
            match self.tunn.encapsulate(plain, &mut out[written..]) {
                TunnResult::WriteToNetwork(message) => written += message.len(),
                TunnResult::Done
                | TunnResult::Err(_)
                | TunnResult::WriteToTunnelV4(..)
                | TunnResult::WriteToTunnelV6(..) => return Err(DropReason::SealFailed),
            }
        }
        Ok(written)
    }

    /// Opens datagrams that all carry the receiver index `index` into the arena; what fails is
    /// given to `dropped`.
    pub(crate) fn open<'a>(
        &mut self,
        index: u32,
        datagrams: impl Iterator<Item = &'a [u8]>,
        arena: &mut Arena,
        mut dropped: impl FnMut(DropReason),
    ) -> OpenReport {
        let mut report = OpenReport::default();
        for datagram in datagrams {
            let Some(room) = arena.room(datagram.len()) else {
                dropped(DropReason::TooBig);
                continue;
            };
            match self.tunn.decapsulate(None, datagram, room) {
                TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                    let len = packet.len();
                    arena.push(len);
                }
                // A keep-alive.
                TunnResult::Done => {}
                TunnResult::WriteToNetwork(_) => {
                    dropped(DropReason::MessageLength);
                    continue;
                }
                TunnResult::Err(error) => {
                    dropped(reason(&error));
                    continue;
                }
            }
            report.datagrams += 1;
            report.bytes += datagram.len();
        }
        if report.datagrams > 0 && !self.known.contains(&Some(index)) {
            self.learn(index);
            report.change = Change::Up;
        }
        report
    }

    /// Handles a handshake message that names this session (or, an initiation, its peer).
    ///
    /// # Errors
    /// The reason to drop it.
    pub(crate) fn handle_handshake(
        &mut self,
        message: &[u8],
        out: &mut [u8],
    ) -> Result<Outcome, DropReason> {
        self.wake_clock();
        match self.tunn.decapsulate(None, message, out) {
            TunnResult::WriteToNetwork(reply) => {
                let len = reply.len();
                // A response completes our initiation at once; an initiation only once the peer
                // has shown that it got our response.
                let index = response_receiver(message);
                if let Some(index) = index {
                    self.learn(index);
                }
                Ok(Outcome {
                    message: Some(len),
                    handshake: index.is_none(),
                    change: if index.is_some() {
                        Change::Up
                    } else {
                        Change::Same
                    },
                })
            }
            // A cookie was taken; it is used by the next initiation.
            TunnResult::Done => Ok(Outcome::default()),
            TunnResult::Err(error) => Err(reason(&error)),
            TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {
                Err(DropReason::HandshakeInvalid)
            }
        }
    }

    /// Brings `Tunn`'s clock, which is that of its last tick, up to date after a sleep. A sleeping
    /// session has no keys and no attempt, so there is nothing it could ask for.
    fn wake_clock(&mut self) {
        if self.dormant() {
            let mut spare = [0; MESSAGE_LEN_MAX];
            let _expired = self.tunn.update_timers(&mut spare);
        }
    }

    fn learn(&mut self, index: u32) {
        self.known = [Some(index), self.known[0]];
        self.attempt = None;
        self.fresh_since = None;
        self.ready = self.tunn.time_since_last_handshake().is_some();
    }

    /// Makes an initiation, unless one went out a moment ago; `again` makes another although one is
    /// outstanding.
    pub(crate) fn initiate(&mut self, now: Instant, again: bool, out: &mut [u8]) -> Option<usize> {
        if let Some(attempt) = self.attempt
            && (!again || now.saturating_duration_since(attempt.last) < INITIATION_INTERVAL_MIN)
        {
            return None;
        }
        self.wake_clock();
        match self.tunn.format_handshake_initiation(out, true) {
            TunnResult::WriteToNetwork(message) => {
                let started = self.attempt.map_or(now, |attempt| attempt.started);
                self.attempt = Some(Attempt { started, last: now });
                Some(message.len())
            }
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => None,
        }
    }

    /// Lets time pass: retries, rekeying, keep-alives, expiry. `quiet_for` is how long data has been
    /// sent without an answer.
    pub(crate) fn tick(&mut self, now: Instant, quiet_for: Duration, out: &mut [u8]) -> Outcome {
        let was_ready = self.ready;
        let mut outcome = Outcome::default();
        match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(message) => {
                outcome.message = Some(message.len());
                outcome.handshake = message.first() == Some(&1);
                if outcome.handshake {
                    let started = self.attempt.map_or(now, |attempt| attempt.started);
                    self.attempt = Some(Attempt { started, last: now });
                }
            }
            TunnResult::Err(_) => {
                // Expired: 90 s without answer, or nothing for three lives of a key.
                if self.attempt.take().is_some() {
                    outcome.change = Change::Down;
                }
            }
            TunnResult::Done
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => {}
        }
        self.ready = self.tunn.time_since_last_handshake().is_some();
        if was_ready && !self.ready {
            outcome.change = Change::Down;
        }
        if outcome.message.is_none() {
            self.retry(now, out, &mut outcome);
        }
        let fresh_since = *self.fresh_since.get_or_insert(now);
        let stale = now.saturating_duration_since(fresh_since) >= FRESH;
        if outcome.message.is_none() && self.ready && stale && quiet_for >= QUIET_LIMIT {
            outcome.message = self.initiate(now, false, out);
            outcome.handshake = true;
        }
        outcome
    }

    /// The timer that `Tunn` forgets when handshakes cross, and the endless retries of a peer with
    /// a persistent keep-alive.
    fn retry(&mut self, now: Instant, out: &mut [u8], outcome: &mut Outcome) {
        match self.attempt {
            Some(attempt)
                if now.saturating_duration_since(attempt.started) >= REKEY_ATTEMPT_TIME =>
            {
                self.attempt = None;
                if !self.ready {
                    outcome.change = Change::Down;
                }
            }
            Some(attempt)
                if now.saturating_duration_since(attempt.last) >= REKEY_TIMEOUT + REKEY_JITTER =>
            {
                outcome.message = self.initiate(now, true, out);
                outcome.handshake = true;
            }
            None if self.keepalive && !self.ready => {
                outcome.message = self.initiate(now, false, out);
                outcome.handshake = true;
            }
            Some(_) | None => {}
        }
    }
}

/// The receiver index of a handshake response; `None` for other messages.
fn response_receiver(message: &[u8]) -> Option<u32> {
    if message.first() != Some(&2) {
        return None;
    }
    Some(u32::from_le_bytes(*message.get(8..)?.first_chunk::<4>()?))
}

fn reason(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidCounter
        | WireGuardError::DuplicateCounter
        | WireGuardError::WrongTai64nTimestamp => DropReason::Replayed,
        WireGuardError::InvalidAeadTag => DropReason::OpenFailed,
        WireGuardError::NoCurrentSession | WireGuardError::ConnectionExpired => {
            DropReason::SessionExpired
        }
        WireGuardError::WrongIndex => DropReason::UnknownIndex,
        WireGuardError::InvalidPacket | WireGuardError::IncorrectPacketLength => {
            DropReason::InnerMalformed
        }
        WireGuardError::UnderLoad => DropReason::HandshakeLimited,
        WireGuardError::DestinationBufferTooSmall => DropReason::TooBig,
        WireGuardError::UnexpectedPacket
        | WireGuardError::WrongPacketType
        | WireGuardError::WrongKey
        | WireGuardError::InvalidTai64nTimestamp
        | WireGuardError::InvalidMac
        | WireGuardError::LockFailed => DropReason::HandshakeInvalid,
    }
}

#[cfg(test)]
mod tests;
