//! Our own session: handshakes, keypairs, and the rules of the WireGuard paper's sections 5 and 6.
//!
//! A machine without a clock, a socket or a source of randomness. Three things drive it: messages
//! ([`Machine::handle_handshake`], [`Machine::open`]), batches to seal ([`Machine::seal`]), and time
//! ([`Machine::handle_timeout`], wanted at [`Machine::poll_timeout`]). Only messages and time make
//! it say something, at most one message a call; what a batch calls for, such as a new handshake
//! after `REKEY_AFTER_TIME`, is an alarm that is due at once. Alarms are set once per batch.
//!
//! The parent module's doc has the rules, and the tests that show them.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;

use super::keypair::{Keypair, Keypairs, Material, Sealing};
use super::timers::{Alarm, Alarms};
use super::window::Window;
use super::{
    BATCH_MAX, Change, FRESH, INITIATION_INTERVAL_MIN, KEEPALIVE_TIMEOUT, MESSAGE_LEN_MAX, Moment,
    OpenReport, Opened, Outcome, Own, QUIET_LIMIT, RECEIVE_REKEY_AFTER_TIME, REJECT_AFTER_TIME,
    REKEY_AFTER_TIME, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT, RENEWAL_QUIET_LIMIT, RENEWAL_RETRY,
    Stamps, ZERO_AFTER_TIME,
};
use crate::aead::{Aead, Open};
use crate::classify::{
    COOKIE_LEN, DATA_HEADER_LEN, DATA_LEN_MIN, INITIATION_LEN, RESPONSE_LEN, TAG_LEN, data_counter,
};
use crate::noise::{self, CookieStore, Initiated, PeekedInitiation, Remote, Tai64n, TransportKeys};
use crate::stats::DropReason;
use crate::types::PeerId;

/// One peer's session.
pub(crate) struct Machine {
    pub(super) peer: PeerId,
    pub(super) remote: Remote,
    /// Of the key of ours that `remote` and `initiated` are for, and of the one that the newest handshake
    /// was made under.
    generation: u32,
    met: Option<u32>,
    /// When they were first for that key.
    since: Instant,
    pub(super) keys: Keypairs,
    /// Our outstanding initiation. It stays when the peer's is answered: whichever response comes
    /// completes a handshake, so initiations that cross stall nobody.
    pub(super) initiated: Option<Initiated>,
    /// Since when we have been trying to reach the peer; none if its initiation is not to be repeated.
    pub(super) attempt: Option<Instant>,
    /// When the last initiation or response was sent.
    pub(super) handshake_sent: Option<Instant>,
    /// When the last initiation was answered, and its timestamp.
    pub(super) answered: Option<Instant>,
    pub(super) newest: Option<Tai64n>,
    /// The timestamp of our last initiation.
    pub(super) stamped: Option<Tai64n>,
    pub(super) cookies: CookieStore,
    pub(super) alarms: Alarms,
    /// Data came while a passive keep-alive was due already: another one follows it.
    pub(super) another_keepalive: bool,
    /// The handshake that arriving data asks for near the end of a key has been asked for.
    pub(super) late_rekey: bool,
    pub(super) keepalive: Option<Duration>,
    /// [`Change::Up`] was the last that was said.
    pub(super) up: bool,
}

impl Machine {
    /// A session without keys; `remote` is for the key of ours of that `generation`. A persistent
    /// keep-alive, in seconds, is due at once.
    pub(super) fn new(
        now: Instant,
        peer: PeerId,
        remote: Remote,
        generation: u32,
        keepalive: Option<u16>,
    ) -> Machine {
        let mut machine = Machine {
            peer,
            remote,
            generation,
            met: None,
            since: now,
            keys: Keypairs::default(),
            initiated: None,
            attempt: None,
            handshake_sent: None,
            answered: None,
            newest: None,
            stamped: None,
            cookies: CookieStore::default(),
            alarms: Alarms::default(),
            another_keepalive: false,
            late_rekey: false,
            keepalive: None,
            up: false,
        };
        machine.set_keepalive(now, keepalive);
        machine
    }

    /// Goes over to the key that is ours now: not when it changes, for that costs a Diffie-Hellman
    /// computation each.
    fn renew(&mut self, own: &mut Own, now: Instant) {
        if self.generation == own.generation {
            return;
        }
        self.remote = self.remote.towards(&own.local);
        (self.generation, self.since) = (own.generation, now);
        if self.initiated.is_some() {
            self.forget_initiation(own);
            self.want_initiation(own, now);
        }
    }

    /// Erases what the peer shares with a key of ours that counts no more.
    pub(super) fn forget_shared(&mut self, own: &Own) {
        let counts = match own.generation.wrapping_sub(self.generation) {
            0 => true,
            1 => own.previous.is_some(),
            _ => false,
        };
        if !counts {
            self.remote.forget_shared();
        }
    }

    /// Whether our key is being renewed, and the peer was not met under the new one.
    fn renewing(&self, own: &Own, now: Instant) -> bool {
        own.ours(now).previous().is_some() && self.met != Some(own.generation)
    }

    /// How long no initiation follows a handshake message. While our key is being renewed, half of the time
    /// for which we have tried with it: each initiation voids the one before, so in the end one has to wait
    /// for its response, however long that takes.
    fn retry_after(&self, own: &Own, now: Instant) -> Duration {
        if !self.renewing(own, now) {
            return REKEY_TIMEOUT;
        }
        let tried = if self.generation == own.generation {
            now.saturating_duration_since(self.since)
        } else {
            Duration::ZERO
        };
        (tried / 2).clamp(RENEWAL_RETRY, REKEY_TIMEOUT)
    }

    /// Changes the persistent keep-alive; one that begins is due at once.
    pub(crate) fn set_keepalive(&mut self, now: Instant, seconds: Option<u16>) {
        let interval = seconds
            .filter(|secs| *secs > 0)
            .map(|secs| Duration::from_secs(u64::from(secs)));
        if interval == self.keepalive {
            return;
        }
        self.keepalive = interval;
        match interval {
            Some(_) => self.alarms.set(Alarm::PersistentKeepalive, now),
            None => self.alarms.clear(Alarm::PersistentKeepalive),
        }
    }

    /// Changes the preshared key, for handshakes from now on; the live session stays.
    pub(crate) fn set_preshared(&mut self, preshared: Option<&[u8; 32]>) {
        self.remote.set_preshared(preshared);
    }

    /// The timestamps that the next machine for the peer goes on from.
    pub(super) fn stamps(&self) -> Stamps {
        Stamps {
            newest: self.newest,
            stamped: self.stamped,
        }
    }

    /// Goes on from the timestamps of the machine before.
    pub(super) fn set_stamps(&mut self, stamps: Stamps) {
        let Stamps { newest, stamped } = stamps;
        self.newest = newest;
        self.stamped = stamped;
    }

    /// True if it has keys to seal with.
    pub(crate) fn ready(&self, now: Instant) -> bool {
        self.sealing().is_some_and(|sealing| sealing.usable(now))
    }

    /// Takes counters of the current keys that nothing is sealed under.
    #[cfg(feature = "internals")]
    pub(super) fn use_up(&mut self, counters: u64) {
        if let Some(sealing) = self.sealing() {
            sealing.use_up(counters);
        }
    }

    fn sealing(&self) -> Option<&Sealing> {
        Some(&self.keys.current.as_ref()?.sealing)
    }

    /// The sealing half of the current keys, for other shards to seal with.
    pub(super) fn lend(&self, now: Instant) -> Option<&Arc<Sealing>> {
        let sealing = &self.keys.current.as_ref()?.sealing;
        sealing.usable(now).then_some(sealing)
    }

    /// True while an initiation of ours waits for its response.
    pub(crate) fn initiating(&self) -> bool {
        self.initiated.is_some()
    }

    /// When [`Machine::handle_timeout`] wants to be called; `None` while only somebody who sends or
    /// receives can make anything happen.
    #[inline]
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.alarms.next()
    }

    /// Gives all indexes back. The machine is of no use afterwards.
    pub(super) fn close(&mut self, own: &mut Own) {
        self.keys.clear(&mut own.indexes);
        self.forget_initiation(own);
    }

    /// Writes an initiation, unless a handshake message went out less than `REKEY_TIMEOUT` ago
    /// (paper §6.1); then one follows by itself, as long as there are no keys by then. With `again`
    /// the distance is [`INITIATION_INTERVAL_MIN`]: there is a new way to the peer.
    ///
    /// The time for which we try counts from here.
    pub(super) fn initiate(
        &mut self,
        own: &mut Own,
        at: Moment,
        again: bool,
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Option<usize> {
        if self.attempt.is_some() || self.initiated.is_some() {
            self.attempt = Some(at.now);
        }
        let distance = if again {
            INITIATION_INTERVAL_MIN
        } else {
            self.retry_after(own, at.now)
        };
        if let Some(sent) = self.handshake_sent
            && at.now.saturating_duration_since(sent) < distance
        {
            if self.initiated.is_none() {
                self.want_initiation(own, at.now);
            } else if again {
                self.alarms.set_no_later(Alarm::Retransmit, sent + distance);
            }
            return None;
        }
        self.send_initiation(own, at, out)
    }

    /// Writes an initiation that is not repeated, if [`Machine::may_initiate`]. Data that is sent
    /// meanwhile makes an attempt of it.
    pub(super) fn initiate_once(
        &mut self,
        own: &mut Own,
        at: Moment,
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Option<usize> {
        if !self.may_initiate(at.now) {
            return None;
        }
        let made = self.send_initiation(own, at, out);
        self.attempt = None;
        made
    }

    /// True if no initiation is outstanding, and no handshake message went out less than
    /// `REKEY_TIMEOUT` ago.
    pub(super) fn may_initiate(&self, now: Instant) -> bool {
        self.initiated.is_none() && !within(self.handshake_sent, now, REKEY_TIMEOUT)
    }

    /// Sees to it that an initiation goes out as soon as one may, unless one is outstanding.
    fn want_initiation(&mut self, own: &Own, now: Instant) {
        if self.initiated.is_none() {
            let distance = self.retry_after(own, now);
            let earliest = self
                .handshake_sent
                .map_or(now, |sent| now.max(sent + distance));
            self.alarms.set_no_later(Alarm::Initiate, earliest);
        }
    }

    fn send_initiation(
        &mut self,
        own: &mut Own,
        at: Moment,
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Option<usize> {
        self.forget_initiation(own);
        self.renew(own, at.now);
        self.alarms.clear(Alarm::Initiate);
        let index = own.indexes.claim(&mut own.rng, self.peer);
        let stamp = Tai64n::next(at.wall, self.stamped);
        let made = noise::initiation(
            &own.local,
            &self.remote,
            index,
            stamp,
            self.cookies.cookie(at.now),
            &mut own.rng,
            out,
        );
        own.renew_rng();
        let Ok(initiated) = made else {
            // A public key of low order: there is nobody to talk to, ever.
            own.indexes.release(index);
            self.attempt = None;
            return None;
        };
        self.cookies.sent(initiated.mac1());
        self.initiated = Some(initiated);
        self.stamped = Some(stamp);
        self.handshake_sent = Some(at.now);
        self.attempt.get_or_insert(at.now);
        let retry_after = self.retry_after(own, at.now) + own.jitter();
        self.alarms.set(Alarm::Retransmit, at.now + retry_after);
        self.authentic_sent(at.now);
        Some(INITIATION_LEN)
    }

    fn forget_initiation(&mut self, own: &mut Own) {
        if let Some(initiated) = self.initiated.take() {
            own.indexes.release(initiated.index());
        }
        self.alarms.clear(Alarm::Retransmit);
    }

    /// Handles a handshake message that names this session (or, an initiation, its peer). `peeked` is
    /// what the handshake thread has found out about an initiation already.
    ///
    /// # Errors
    /// The reason to drop it; nothing has changed then.
    pub(super) fn handle_handshake(
        &mut self,
        own: &mut Own,
        at: Moment,
        message: &[u8],
        peeked: Option<&PeekedInitiation>,
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Result<Outcome, DropReason> {
        match message.len() {
            INITIATION_LEN => {
                let own_half;
                let peeked = match peeked {
                    Some(peeked) => peeked,
                    None => {
                        let local = own.ours(at.now).addressed(message)?;
                        own_half = noise::peek_initiation(local, message)?;
                        &own_half
                    }
                };
                self.answer(own, at, peeked, out)
            }
            RESPONSE_LEN => self.complete(own, at, message, out),
            COOKIE_LEN => {
                // It is used by the next message, which goes out when it would have (§5.4.7).
                self.cookies.receive(at.now, &self.remote, message)?;
                Ok(Outcome::default())
            }
            _ => Err(DropReason::MessageLength),
        }
    }

    /// Answers an initiation.
    fn answer(
        &mut self,
        own: &mut Own,
        at: Moment,
        peeked: &PeekedInitiation,
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Result<Outcome, DropReason> {
        let renewed = peeked.is_to(&own.local);
        let generation = own.generation.wrapping_sub(u32::from(!renewed));
        let local = own.key_of(generation, at.now);
        let local = local.filter(|local| peeked.is_to(local));
        let local = local.ok_or(DropReason::HandshakeMac)?;
        let for_other;
        let remote = if generation == self.generation {
            &self.remote
        } else {
            for_other = self.remote.towards(local);
            &for_other
        };
        let received = noise::consume_initiation(peeked, remote)?;
        let timestamp = received.timestamp();
        if self.newest.is_some_and(|newest| timestamp <= newest) {
            return Err(DropReason::HandshakeReplayed);
        }
        if within(self.answered, at.now, noise::ANSWER_INTERVAL_MIN) {
            return Err(DropReason::HandshakeTooSoon);
        }
        let index = own.indexes.claim(&mut own.rng, self.peer);
        let cookie = self.cookies.cookie(at.now);
        let room = out
            .first_chunk_mut::<RESPONSE_LEN>()
            .expect("a response is the shorter message");
        let made = noise::response(remote, received, index, cookie, &mut own.rng, room);
        own.renew_rng();
        let (keys, mac1) = made.inspect_err(|_| own.indexes.release(index))?;
        if renewed {
            self.renew(own, at.now);
            self.met = Some(generation);
        }
        self.newest = Some(timestamp);
        self.answered = Some(at.now);
        self.handshake_sent = Some(at.now);
        self.cookies.sent(&mac1);
        self.keys
            .answered(keypair(&keys, at.now, false), &mut own.indexes);
        self.derived(at.now);
        self.authentic_received();
        self.authentic_sent(at.now);
        Ok(Outcome {
            message: Some(RESPONSE_LEN),
            handshake: true,
            change: Change::Same,
        })
    }

    /// Completes our handshake, and shows the peer that it is complete.
    fn complete(
        &mut self,
        own: &mut Own,
        at: Moment,
        message: &[u8],
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Result<Outcome, DropReason> {
        let initiated = self.initiated.as_ref().ok_or(DropReason::UnknownIndex)?;
        let local = own.key_of(self.generation, at.now);
        let local = local.ok_or(DropReason::HandshakeMac)?;
        let keys = noise::consume_response(local, &self.remote, initiated, message)?;
        // The index goes on as the keypair's.
        self.initiated = None;
        self.met = Some(self.generation);
        self.keys
            .completed(keypair(&keys, at.now, true), &mut own.indexes);
        self.derived(at.now);
        self.authentic_received();
        self.established(own, at.now);
        Ok(Outcome {
            message: self.keepalive_message(own, at.now, out),
            handshake: false,
            change: Change::Up,
        })
    }

    /// New keys exist, confirmed or not.
    fn derived(&mut self, now: Instant) {
        self.alarms.set(Alarm::ZeroKeys, now + ZERO_AFTER_TIME);
    }

    /// The current keypair is new, and both ends have it.
    fn established(&mut self, own: &mut Own, now: Instant) {
        self.forget_initiation(own);
        self.alarms.clear(Alarm::Initiate);
        self.attempt = None;
        self.late_rekey = false;
        self.up = true;
        self.alarms
            .set(Alarm::Expire, self.born(now) + REJECT_AFTER_TIME);
    }

    /// When the current keys were made; now if there are none.
    fn born(&self, now: Instant) -> Instant {
        let current = self.keys.current.as_ref();
        current.map_or(now, |current| current.born)
    }

    /// Something authentic arrived.
    #[inline]
    fn authentic_received(&mut self) {
        self.alarms.clear(Alarm::NewHandshake);
    }

    /// Something that the peer will find authentic is sent.
    #[inline]
    fn authentic_sent(&mut self, now: Instant) {
        self.alarms.clear(Alarm::PassiveKeepalive);
        self.another_keepalive = false;
        self.traversed(now);
    }

    /// Something authentic passed, either way.
    #[inline]
    fn traversed(&mut self, now: Instant) {
        if let Some(interval) = self.keepalive {
            self.alarms.set(Alarm::PersistentKeepalive, now + interval);
        }
    }

    /// A keep-alive, if there are keys for it.
    fn keepalive_message(
        &mut self,
        own: &Own,
        now: Instant,
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Option<usize> {
        let message = &mut out[..DATA_LEN_MIN];
        self.sealing()?
            .seal(&own.aead, now, message, DATA_LEN_MIN)
            .ok()?;
        self.sealed(own, now);
        Some(DATA_LEN_MIN)
    }

    /// Seals a batch of messages that hold data in place (see [`Sealing::seal`]).
    ///
    /// # Errors
    /// [`DropReason::SessionExpired`] if there are no keys to seal with.
    pub(super) fn seal(
        &mut self,
        own: &mut Own,
        now: Instant,
        messages: &mut [u8],
        stride: usize,
    ) -> Result<(), DropReason> {
        let current = self.keys.current.as_ref();
        let sealing = &current.ok_or(DropReason::SessionExpired)?.sealing;
        let sealed = sealing.seal(&own.aead, now, messages, stride);
        if sealed.is_err() {
            // The last counters are gone, or the last second is.
            self.want_initiation(own, now);
            return sealed;
        }
        self.expect_answer(own, now);
        self.sealed(own, now);
        Ok(())
    }

    /// Other shards have sealed data under keys that were lent to them, the last of it at `at`;
    /// `heard` is when something authentic arrived after that, if it did. What would have followed
    /// at once, had this machine sealed, follows now.
    pub(super) fn sealed_elsewhere(
        &mut self,
        own: &mut Own,
        now: Instant,
        at: Instant,
        heard: Option<Instant>,
    ) {
        match heard {
            None => {
                self.expect_answer(own, at);
                self.authentic_sent(at);
            }
            // It has been answered. A passive keep-alive is still owed, but for what came since.
            Some(heard) if self.alarms.get(Alarm::PassiveKeepalive).is_some() => {
                self.another_keepalive = false;
                self.alarms
                    .set(Alarm::PassiveKeepalive, heard + KEEPALIVE_TIMEOUT);
            }
            Some(_) => {}
        }
        self.rekey_if_due(own, now);
    }

    /// Data was sealed: unless something comes back, there is a new handshake.
    fn expect_answer(&mut self, own: &mut Own, now: Instant) {
        if self.renewing(own, now) {
            self.alarms
                .set_no_later(Alarm::NewHandshake, now + RENEWAL_QUIET_LIMIT);
        } else if self.alarms.get(Alarm::NewHandshake).is_none() {
            let fresh_until = self.born(now) + FRESH + own.jitter();
            self.alarms
                .set(Alarm::NewHandshake, (now + QUIET_LIMIT).max(fresh_until));
        }
    }

    /// A batch was sealed, keep-alives included.
    fn sealed(&mut self, own: &Own, now: Instant) {
        self.authentic_sent(now);
        self.rekey_if_due(own, now);
    }

    /// Who seals asks for new keys in time (§6.2).
    fn rekey_if_due(&mut self, own: &Own, now: Instant) {
        if self
            .sealing()
            .is_some_and(|sealing| sealing.wants_rekey(now, REKEY_AFTER_TIME))
        {
            self.want_initiation(own, now);
        }
    }

    /// Opens datagrams that all carry the receiver index `index`, in place: `stride` bytes each, of
    /// which only the last may be shorter. What was opened is noted in `opened`, by where its
    /// plaintext lies in `datagrams`; what fails is given to `dropped`.
    pub(super) fn open(
        &mut self,
        own: &mut Own,
        now: Instant,
        index: u32,
        datagrams: &mut [u8],
        stride: usize,
        opened: &mut Opened,
        mut dropped: impl FnMut(DropReason),
    ) -> OpenReport {
        let mut report = OpenReport::default();
        let stride = stride.max(1);
        let Some((keypair, is_next)) = self.keys.find(index) else {
            (0..datagrams.len().div_ceil(stride)).for_each(|_| dropped(DropReason::UnknownIndex));
            return report;
        };
        if !keypair.opens(now) {
            (0..datagrams.len().div_ceil(stride)).for_each(|_| dropped(DropReason::SessionExpired));
            report.expired = true;
            return report;
        }
        let with_data = opened.len();
        for (i, chunk) in datagrams.chunks_mut(stride * BATCH_MAX).enumerate() {
            let start = i * stride * BATCH_MAX;
            open_chunk(
                &own.aead,
                keypair,
                start,
                chunk,
                stride,
                opened,
                &mut report,
                &mut dropped,
            );
        }
        let with_data = opened.len() > with_data;
        if report.datagrams == 0 {
            return report;
        }
        if is_next {
            self.keys.confirmed(&mut own.indexes);
            self.established(own, now);
            report.change = Change::Up;
        }
        self.authentic_received();
        self.traversed(now);
        if with_data {
            match self.alarms.get(Alarm::PassiveKeepalive) {
                Some(_) => self.another_keepalive = true,
                None => self
                    .alarms
                    .set(Alarm::PassiveKeepalive, now + KEEPALIVE_TIMEOUT),
            }
        }
        let late = |sealing: &Sealing| sealing.wants_rekey(now, RECEIVE_REKEY_AFTER_TIME);
        if !self.late_rekey && self.sealing().is_some_and(late) {
            self.late_rekey = true;
            self.want_initiation(own, now);
        }
        report
    }

    /// Lets time pass: handles alarms that are due until one of them has something to send. To be
    /// called again while [`Machine::poll_timeout`] is not in the future.
    pub(super) fn handle_timeout(
        &mut self,
        own: &mut Own,
        at: Moment,
        out: &mut [u8; MESSAGE_LEN_MAX],
    ) -> Outcome {
        let mut outcome = Outcome::default();
        while outcome.message.is_none()
            && let Some(alarm) = self.alarms.take_due(at.now)
        {
            match alarm {
                Alarm::ZeroKeys => {
                    self.keys.clear(&mut own.indexes);
                    self.went_down(&mut outcome);
                }
                Alarm::Expire => self.went_down(&mut outcome),
                Alarm::Retransmit if self.tried_long_enough(at.now) => {
                    self.forget_initiation(own);
                    let tried = self.attempt.take().is_some();
                    self.alarms.clear(Alarm::PassiveKeepalive);
                    if (tried || self.up) && !self.ready(at.now) {
                        self.up = false;
                        outcome.change = Change::Down;
                    }
                }
                Alarm::Retransmit => outcome.set_handshake(self.send_initiation(own, at, out)),
                Alarm::Initiate | Alarm::NewHandshake => {
                    outcome.set_handshake(self.initiate(own, at, false, out));
                }
                Alarm::PassiveKeepalive => {
                    let another = std::mem::take(&mut self.another_keepalive);
                    outcome.message = self.keepalive_message(own, at.now, out);
                    if another {
                        self.alarms
                            .set(Alarm::PassiveKeepalive, at.now + KEEPALIVE_TIMEOUT);
                    }
                }
                Alarm::PersistentKeepalive => {
                    self.traversed(at.now);
                    outcome.message = self.keepalive_message(own, at.now, out);
                    if outcome.message.is_none() {
                        outcome.set_handshake(self.initiate(own, at, false, out));
                    }
                }
            }
        }
        outcome
    }

    fn tried_long_enough(&self, now: Instant) -> bool {
        self.attempt
            .is_none_or(|since| now.saturating_duration_since(since) >= REKEY_ATTEMPT_TIME)
    }

    /// The last usable keys are gone.
    fn went_down(&mut self, outcome: &mut Outcome) {
        if std::mem::take(&mut self.up) {
            outcome.change = Change::Down;
        }
    }
}

/// Whether it was less than `span` ago.
fn within(last: Option<Instant>, now: Instant, span: Duration) -> bool {
    last.is_some_and(|last| now.saturating_duration_since(last) < span)
}

fn keypair(keys: &TransportKeys, now: Instant, initiator: bool) -> Box<Keypair> {
    Keypair::new(Material {
        send: &keys.send,
        receive: &keys.receive,
        local_index: keys.local_index,
        remote_index: keys.remote_index,
        born: now,
        initiator,
        next_counter: 0,
        window: Window::new(),
    })
}

/// Opens up to [`BATCH_MAX`] datagrams, which lie `start` bytes into the run.
fn open_chunk(
    aead: &Aead,
    keypair: &mut Keypair,
    start: usize,
    datagrams: &mut [u8],
    stride: usize,
    opened: &mut Opened,
    report: &mut OpenReport,
    dropped: &mut impl FnMut(DropReason),
) {
    let Keypair {
        opening, window, ..
    } = keypair;
    let mut batch: ArrayVec<Open<'_>, BATCH_MAX> = ArrayVec::new();
    let mut offsets: ArrayVec<usize, BATCH_MAX> = ArrayVec::new();
    for (i, message) in datagrams.chunks_mut(stride).enumerate() {
        match data_counter(message) {
            Some(counter) if message.len() >= DATA_LEN_MIN => {
                // What is known already is not worth opening.
                if window.admits(counter) {
                    offsets.push(start + i * stride);
                    batch.push(Open {
                        key: opening,
                        counter,
                        message,
                        ok: false,
                    });
                } else {
                    dropped(DropReason::Replayed);
                }
            }
            Some(_) | None => dropped(DropReason::MessageLength),
        }
    }
    aead.open(&mut batch);
    for (datagram, offset) in batch.iter().zip(offsets) {
        if !datagram.ok {
            dropped(DropReason::OpenFailed);
        } else if !window.accept(datagram.counter) {
            // Twice in this batch.
            dropped(DropReason::Replayed);
        } else {
            let len = datagram.message.len();
            report.datagrams += 1;
            report.bytes += len;
            if len > DATA_LEN_MIN {
                opened.push_in_place(offset + DATA_HEADER_LEN, len - DATA_HEADER_LEN - TAG_LEN);
            }
        }
    }
}
