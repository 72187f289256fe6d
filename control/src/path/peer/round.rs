//! Pings and announcements out.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::RngExt as _;

use super::super::limit::{ROUND_RESERVE, rested};
use super::super::mtu::{payload_len, wire_len};
use super::super::pings::Sent;
use super::super::shared::Shared;
use super::super::{
    ANNOUNCE_CHANGED_INTERVAL, ANNOUNCE_INTERVAL, ANNOUNCE_WAIT, CANDIDATES_PINGED_MAX,
    DISCO_PING_INTERVAL, Drop, Purpose, RELAY_RTT_FRESH, Reason, RestunReason, Route,
    SLOW_ANNOUNCE_INTERVAL, SLOW_ROUND_INTERVAL, Story, Transmit, Via,
};
use super::{Peer, Round};
use crate::disco::{Message, ping_padding};

/// A round that was cut short goes on after this.
const ROUND_MORE_AFTER: Duration = Duration::from_millis(100);

impl Peer {
    /// A discovery round: Pings to all candidates that have rested, and an announcement where the
    /// round may announce and the last one is old enough. Rounds of our own are counted, and too
    /// many silent ones hold the peer.
    pub(super) fn start_round(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        announce: bool,
        reason: Reason,
    ) {
        if self.key.is_none() || announce && self.passive() {
            return;
        }
        if announce && self.slow(sh) && !rested(now, self.last_full, SLOW_ROUND_INTERVAL) {
            return;
        }
        if announce && self.count_round(now, sh) {
            return;
        }
        self.probe(now, sh, reason);
        self.last_full = Some(now);
        let keep = self
            .best_addr()
            .or_else(|| self.last_good.map(|(addr, _)| addr));
        self.candidates.sweep(now, keep);
        self.measure_relay(now, sh);
        self.ping_due(now, sh);
        if announce {
            self.announce(now, sh, false);
        }
    }

    /// Ends the last round if its time is over and begins a new one; `true` if that holds the peer.
    fn count_round(&mut self, now: Instant, sh: &mut Shared) -> bool {
        if let Some(at) = self.round.started {
            if now.saturating_duration_since(at) < DISCO_PING_INTERVAL {
                return false;
            }
            if self.round.asked && !self.round.answered {
                self.silent_rounds += 1;
                self.candidates.round_unanswered(at);
            }
        }
        let limit = sh.config.retry_limit;
        let silent = limit > 0 && self.silent_rounds >= limit && self.best().is_none();
        if silent && !self.was_direct {
            self.hold(now, sh);
            return true;
        }
        self.round = Round {
            started: Some(now),
            asked: false,
            answered: false,
        };
        false
    }

    /// Pings the candidates that have rested: those that worked first, IPv6 before IPv4.
    pub(super) fn ping_due(&mut self, now: Instant, sh: &mut Shared) {
        let last_good = self.last_good.map(|(addr, _)| addr);
        let best = self.best_addr();
        let due = self
            .candidates
            .iter()
            .filter(|(_, candidate)| candidate.due(now));
        let mut due: Vec<_> = due
            .map(|(addr, candidate)| {
                let known = [best, last_good].contains(&Some(*addr)) || candidate.pong.is_some();
                (!known, addr.is_ipv4(), *addr)
            })
            .collect();
        due.sort_unstable();
        let quick = !self.trusted(now) && !self.slow(sh);
        self.round_more = None;
        for (_, _, addr) in due.into_iter().take(CANDIDATES_PINGED_MAX) {
            if !self.ping(now, sh, Route::Direct(addr), Purpose::Discovery) {
                self.round_more = Some(now + ROUND_MORE_AFTER);
                break;
            }
            if let Some(candidate) = self.candidates.get_mut(&addr) {
                candidate.last_round = Some(now);
                candidate.quick = quick.then_some((now, 0));
            }
        }
    }

    /// One Ping over the relay tells how long the detour is.
    fn measure_relay(&mut self, now: Instant, sh: &mut Shared) {
        if !rested(now, self.relay_ping_at, RELAY_RTT_FRESH) {
            return;
        }
        if let Some(region) = self.region() {
            self.ping(now, sh, Route::Relay(region), Purpose::RelayLatency);
            self.relay_ping_at = Some(now);
        }
    }

    /// Sends a Ping unless the rates forbid it; `false` if nothing was sent.
    pub(super) fn ping(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        to: Route,
        purpose: Purpose,
    ) -> bool {
        let (reserve, limited) = match purpose {
            Purpose::Discovery => (ROUND_RESERVE, true),
            Purpose::User(_) => (0, false),
            Purpose::PingBack
            | Purpose::Heartbeat
            | Purpose::Validate(_)
            | Purpose::Mtu(_)
            | Purpose::Fragments(_)
            | Purpose::RelayLatency => (0, true),
        };
        if limited && !(self.ping_rate.take(now, reserve) && sh.pings.take(now, 0)) {
            sh.counters.count(Drop::PingRate);
            return false;
        }
        let padding = match (purpose, to) {
            (Purpose::Mtu(wire) | Purpose::Fragments(wire), Route::Direct(addr)) => {
                ping_padding(payload_len(wire, addr))
            }
            _ => 0,
        };
        let dont_fragment = matches!(purpose, Purpose::Mtu(_));
        let tx_id = sh.rng.random();
        let message = Message::Ping {
            tx_id,
            node_key: Some(sh.node_key),
            padding,
        };
        if !self.send(sh, to, dont_fragment, &message) {
            return false;
        }
        let sent = Sent {
            tx_id,
            to,
            at: now,
            purpose,
        };
        if self.pings.push(sent).is_some() {
            sh.counters.count(Drop::PingsFull);
        }
        self.round.asked = true;
        if let Route::Direct(addr) = to
            && let Some(candidate) = self.candidates.get_mut(&addr)
        {
            candidate.last_ping = Some(now);
        }
        sh.tell(self.id, Story::PingTx { route: to, purpose });
        true
    }

    /// A heartbeat to the best address; an `urgent` one if something speaks against it.
    pub(super) fn ping_best(&mut self, now: Instant, sh: &mut Shared, urgent: bool) {
        let Some(addr) = self.best_addr() else {
            return;
        };
        if self.ping(now, sh, Route::Direct(addr), Purpose::Heartbeat) {
            self.suspect(now, urgent);
        }
    }

    /// Sends the probes of the running validation that are due.
    pub(super) fn run_validation(&mut self, now: Instant, sh: &mut Shared) {
        while let Some(test) = &mut self.validation
            && let Some(probe) = test.poll_probe(now)
        {
            let to = Route::Direct(test.addr);
            self.ping(now, sh, to, probe);
        }
    }

    /// The kernel refused a don't-fragment Ping of `len` bytes, which is larger than the device's
    /// MTU: it counts as lost at once.
    pub(in super::super) fn too_big(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        to: SocketAddr,
        len: usize,
    ) {
        let wire = wire_len(len, to);
        if !self.pings.refused(to, wire) {
            return;
        }
        if let Some(test) = self.validation.as_mut().filter(|test| test.addr == to) {
            test.refused(now);
            self.run_validation(now, sh);
            self.judge_validation(now, sh);
        }
        if let Some(best) = self.best_mut().filter(|best| best.addr == to) {
            best.mtu.refused(now, wire);
        }
    }

    /// Seals and queues a message; `false` without a key.
    pub(super) fn send(
        &mut self,
        sh: &mut Shared,
        to: Route,
        dont_fragment: bool,
        message: &Message,
    ) -> bool {
        let Some(key) = &self.key else {
            return false;
        };
        let nonce = sh.rng.random();
        let bytes = key.secret.seal(&sh.disco_key, nonce, message);
        let via = match to {
            Route::Direct(addr) => Via::Udp(addr),
            Route::Relay(region) => Via::Derp {
                region,
                node_key: self.node_key,
            },
        };
        sh.transmit(Transmit {
            peer: self.id,
            via,
            dont_fragment,
            bytes,
        });
        true
    }

    /// Tells the peer where to ping us, at its own pace: every [`ANNOUNCE_INTERVAL`] at most
    /// ([`SLOW_ANNOUNCE_INTERVAL`] if it has been silent for long), or
    /// [`ANNOUNCE_CHANGED_INTERVAL`] when it is `urgent` because our endpoints changed or the direct
    /// path went silent. Old endpoints are looked up again first, but not waited for longer than
    /// [`ANNOUNCE_WAIT`].
    pub(super) fn announce(&mut self, now: Instant, sh: &mut Shared, urgent: bool) {
        if self.key.is_none() || self.region().is_none() {
            return;
        }
        let interval = match (urgent, self.slow(sh)) {
            (true, _) => ANNOUNCE_CHANGED_INTERVAL,
            (false, true) => SLOW_ANNOUNCE_INTERVAL,
            (false, false) => ANNOUNCE_INTERVAL,
        };
        let allowed = self.announce.last.map(|at| at + interval);
        match (urgent, self.announce.pending) {
            (false, Some(_)) => {}
            (false, None) if allowed.is_some_and(|at| now < at) => {}
            (false, None) if sh.own_stale(now) => {
                sh.want_restun(now, RestunReason::Stale);
                self.announce.pending = Some(now + ANNOUNCE_WAIT);
            }
            (true, _) if allowed.is_some_and(|at| now < at) => self.announce.pending = allowed,
            (false, None) | (true, _) => self.send_call_me_maybe(now, sh),
        }
    }

    /// Our endpoints were looked up: who waits for them is told now, and if they changed, every
    /// peer with recent traffic.
    pub(in super::super) fn own_endpoints(&mut self, now: Instant, sh: &mut Shared, changed: bool) {
        if changed {
            self.wake(now, sh);
        }
        if changed && self.active(now) && !self.passive() {
            self.announce(now, sh, true);
        } else if self.announce.pending.is_some() {
            self.announce.pending = None;
            self.send_call_me_maybe(now, sh);
        }
    }

    pub(super) fn send_call_me_maybe(&mut self, now: Instant, sh: &mut Shared) {
        self.announce.pending = None;
        let Some(region) = self.region() else {
            return;
        };
        let endpoints = sh.own.clone();
        let message = Message::CallMeMaybe {
            endpoints: endpoints.clone(),
        };
        if self.send(sh, Route::Relay(region), false, &message) {
            self.announce.last = Some(now);
            self.round.asked = true;
            sh.tell(self.id, Story::CallMeMaybeTx { endpoints });
        }
    }

    /// A ping that a user asked for: by the best address if there is one, by relay else, and to the
    /// candidates besides. `false` if there is no way to send it.
    pub(in super::super) fn user_ping(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        purpose: Purpose,
    ) -> bool {
        self.wake(now, sh);
        if let Some(addr) = self.best_addr().filter(|_| self.trusted(now)) {
            return self.ping(now, sh, Route::Direct(addr), purpose);
        }
        let all: Vec<SocketAddr> = self.candidates.iter().map(|(addr, _)| *addr).collect();
        let mut sent = false;
        if let Some(region) = self.region() {
            sent = self.ping(now, sh, Route::Relay(region), purpose);
        }
        for addr in all.into_iter().take(CANDIDATES_PINGED_MAX) {
            sent |= self.ping(now, sh, Route::Direct(addr), purpose);
        }
        self.announce(now, sh, false);
        sent
    }
}
