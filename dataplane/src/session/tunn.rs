//! A session on boringtun's `Tunn`, for comparison: `--engine boringtun`. The only user of that
//! crate.
//!
//! Life of a session:
//!
//! 1. No keys: packets wait with the caller. [`Tunnel::initiate`] makes an initiation; the shard
//!    retries by [`Tunnel::tick`] every `REKEY_TIMEOUT` for `REKEY_ATTEMPT_TIME`.
//! 2. A response (as initiator), or the first data under a new index (as responder), makes the
//!    session [ready](Tunnel::ready): [`Change::Up`].
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

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::{
    COUNTED_BITS, Change, FRESH, INITIATION_INTERVAL_MIN, MESSAGE_LEN_MAX, OpenReport, Opened,
    Outcome, PADDING, QUIET_LIMIT, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT, REKEY_TIMEOUT_JITTER_MAX,
    Staged, padded_len,
};
use crate::packet::segment::Plan;
use crate::stats::DropReason;

/// How often a session in use is ticked.
const TICK: Duration = Duration::from_millis(250);
/// Longest inner packet, in bytes.
const PACKET_LEN_MAX: usize = 65_535;

/// What all sessions of a shard have in common.
pub(super) struct Common {
    private: StaticSecret,
    /// Only checks MAC1: load is measured before a message gets here.
    limiter: Arc<RateLimiter>,
    /// One padded packet.
    scratch: Box<[u8]>,
}

impl Common {
    pub(super) fn new(private_key: &Zeroizing<[u8; 32]>) -> Common {
        let private = StaticSecret::from(**private_key);
        let limiter = Arc::new(RateLimiter::new(&PublicKey::from(&private), u64::MAX));
        Common {
            private,
            limiter,
            scratch: vec![0; PACKET_LEN_MAX + PADDING].into(),
        }
    }
}

/// An outstanding initiation of ours.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    started: Instant,
    last: Instant,
}

/// One peer's session.
pub(crate) struct Tunnel {
    tunn: Box<Tunn>,
    /// Our part of its receiver indexes.
    pub(super) index: u32,
    ready: bool,
    attempt: Option<Attempt>,
    /// When the last handshake completed, by the caller's clock; the first tick after it.
    fresh_since: Option<Instant>,
    /// The receiver indexes whose handshakes have been reported, newest first.
    known: [Option<u32>; 2],
    keepalive: bool,
    tick_at: Instant,
}

impl Tunnel {
    /// A session under an index whose low [`COUNTED_BITS`] are free.
    pub(super) fn new(
        common: &Common,
        now: Instant,
        public_key: &[u8; 32],
        preshared_key: Option<[u8; 32]>,
        keepalive: Option<u16>,
        index: u32,
    ) -> Tunnel {
        let keepalive = keepalive.filter(|&secs| secs > 0);
        let tunn = Tunn::new(
            common.private.clone(),
            PublicKey::from(*public_key),
            preshared_key,
            keepalive,
            index >> COUNTED_BITS,
            Some(Arc::clone(&common.limiter)),
        );
        Tunnel {
            tunn: Box::new(tunn),
            index,
            ready: false,
            attempt: None,
            fresh_since: None,
            known: [None; 2],
            keepalive: keepalive.is_some(),
            tick_at: now,
        }
    }

    /// When [`Tunnel::tick`] wants to be called.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        (!self.dormant()).then_some(self.tick_at)
    }

    /// True if it has keys to seal with.
    pub(crate) fn ready(&self) -> bool {
        self.ready
    }

    /// True if nothing will happen here until somebody has something to send or receive: ticks may
    /// stop.
    fn dormant(&self) -> bool {
        !self.ready && self.attempt.is_none() && !self.keepalive
    }

    /// True while an initiation of ours waits for its response.
    pub(crate) fn initiating(&self) -> bool {
        self.attempt.is_some()
    }

    /// Seals segments `range` of a planned packet, back to back. Segments are staged inside
    /// `packet`, which is used up front to back.
    ///
    /// # Panics
    /// If `out` is shorter than the sealed lengths together, or the session is not ready.
    pub(super) fn seal(
        &mut self,
        common: &mut Common,
        mtu: usize,
        plan: &Plan,
        packet: &mut [u8],
        range: Range<usize>,
        out: &mut [u8],
    ) -> Staged {
        assert!(self.ready, "packets wait with the caller");
        let mut staged = Staged::default();
        for i in range {
            let segment = plan.stage(i, packet);
            let len = segment.len();
            let padded = padded_len(len, mtu);
            let plain = if padded == len {
                &packet[segment]
            } else {
                common.scratch[..len].copy_from_slice(&packet[segment]);
                common.scratch[len..padded].fill(0);
                &common.scratch[..padded]
            };
            // `Tunn` wants 148 bytes of room for any message.
            match self.tunn.encapsulate(plain, &mut out[staged.bytes..]) {
                TunnResult::WriteToNetwork(message) => {
                    staged.bytes += message.len();
                    staged.segments += 1;
                }
                // What is sealed by now goes out.
                TunnResult::Done
                | TunnResult::Err(_)
                | TunnResult::WriteToTunnelV4(..)
                | TunnResult::WriteToTunnelV6(..) => break,
            }
        }
        staged
    }

    /// Opens datagrams that all carry the receiver index `index` into the arena; what fails is
    /// given to `dropped`.
    pub(crate) fn open<'a>(
        &mut self,
        index: u32,
        datagrams: impl Iterator<Item = &'a [u8]>,
        arena: &mut Opened,
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
                let len = message.len();
                self.went_out(now);
                Some(len)
            }
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => None,
        }
    }

    /// An initiation leaves now.
    fn went_out(&mut self, now: Instant) {
        let started = self.attempt.map_or(now, |attempt| attempt.started);
        self.attempt = Some(Attempt { started, last: now });
    }

    /// Lets time pass: retries, rekeying, keep-alives, expiry. `quiet_for` is how long data has been
    /// sent without an answer.
    pub(crate) fn tick(&mut self, now: Instant, quiet_for: Duration, out: &mut [u8]) -> Outcome {
        self.tick_at = now + TICK;
        let was_ready = self.ready;
        let mut outcome = Outcome::default();
        match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(message) => {
                outcome.message = Some(message.len());
                outcome.handshake = message.first() == Some(&1);
                if outcome.handshake {
                    self.went_out(now);
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
            outcome.set_handshake(self.initiate(now, false, out));
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
                if now.saturating_duration_since(attempt.last)
                    >= REKEY_TIMEOUT + REKEY_TIMEOUT_JITTER_MAX =>
            {
                outcome.set_handshake(self.initiate(now, true, out));
            }
            None if self.keepalive && !self.ready => {
                outcome.set_handshake(self.initiate(now, false, out));
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
