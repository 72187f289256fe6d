//! DISCO and news of the data plane in.

use std::net::SocketAddr;
use std::time::Instant;

use ringtail_dataplane::{Activity, RegionId};

use super::super::limit::{PONG_RESERVE, rested};
use super::super::pings::Sent;
use super::super::shared::Shared;
use super::super::{
    CALL_ME_MAYBE_ROUND_INTERVAL, Drop, Event, HEARTBEAT_INTERVAL, JUDGING_INTERVAL,
    PING_BACK_INTERVAL, PING_TIMEOUT, Purpose, Reason, RestunReason, Route, Story,
};
use super::{Peer, Relayed, State};
use crate::disco::{CALL_ME_MAYBE_ENDPOINTS_MAX, DERP_FAKE_IP, Message, TxId};

impl Peer {
    /// A Ping over UDP: its source is a candidate, and is pinged back at once if it is new or
    /// nothing is trusted. Whether to answer it is [`Self::pong`]'s.
    ///
    /// # Errors
    /// [`Drop::DuplicatePing`].
    pub(in super::super) fn ping_received(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        from: SocketAddr,
        tx_id: TxId,
    ) -> Result<(), Drop> {
        let known = self.candidates.get(&from);
        if known.is_some_and(|candidate| candidate.last_got == Some(tx_id)) {
            return Err(Drop::DuplicatePing);
        }
        let route = Route::Direct(from);
        sh.tell(self.id, Story::PingRx { route });
        self.heard_at(now, sh, from, Some(tx_id));
        Ok(())
    }

    /// An authenticated packet of the data plane came from another address than the decided one.
    pub(in super::super) fn new_source(&mut self, now: Instant, sh: &mut Shared, from: SocketAddr) {
        if sh.admission.admits(from) && self.best_addr() != Some(from) {
            self.heard_at(now, sh, from, None);
        }
    }

    /// The peer was heard at an address.
    fn heard_at(&mut self, now: Instant, sh: &mut Shared, from: SocketAddr, ping: Option<TxId>) {
        // UDP passes again, in one direction at least. A held peer that only pings us gets one round.
        if ping.is_none() || self.slow(sh) {
            self.wake(now, sh);
        }
        let untrusted = !self.trusted(now);
        let is_best = self.best_addr() == Some(from);
        let known = self.candidates.get(&from);
        let answers = known.is_some_and(|known| known.answered_within(now, PING_TIMEOUT));
        let new =
            known.is_none_or(|known| !answers && (known.new_source_at.is_none() || ping.is_none()));
        // Packets from an address that answers: if the best one is quiet, both are asked. The best
        // is not left for it before it has had its time, or two good paths would take turns.
        let over = |at: Instant| now.saturating_duration_since(at) >= JUDGING_INTERVAL;
        let best_quiet = self.best().is_none_or(|best| over(best.last_pong));
        let back = ping.is_none() && answers && best_quiet;
        let Some(candidate) = self.candidates.entry(now, from) else {
            sh.counters.count(Drop::CandidatesFull);
            return;
        };
        candidate.heard_at = Some(now);
        candidate.last_got = ping.or(candidate.last_got);
        if new && !is_best {
            candidate.new_source_at = Some(now);
        }
        let busy = !rested(now, candidate.last_ping, PING_BACK_INTERVAL);
        let asked = new || back || untrusted && !answers;
        if busy || candidate.blocked(now) || !asked || is_best && !untrusted {
            return;
        }
        self.probe(now, sh, Reason::PingReceived);
        let sent = self.ping(now, sh, Route::Direct(from), Purpose::PingBack);
        let quick = (sent && untrusted).then_some((now, 0));
        if let Some(candidate) = self.candidates.get_mut(&from)
            && candidate.quick.is_none()
        {
            candidate.quick = quick;
        }
        if (new || back) && !untrusted {
            // If the peer has moved, the best address stays silent while this one answers.
            self.ping_best(now, sh, false);
        }
    }

    /// A Ping by relay: it has no other consequence than its Pong.
    pub(in super::super) fn relayed_ping_received(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        region: RegionId,
        tx_id: TxId,
    ) -> Result<(), Drop> {
        let route = Route::Relay(region);
        sh.tell(self.id, Story::PingRx { route });
        self.pong(now, sh, route, tx_id)
    }

    /// Answers a Ping the way it came.
    ///
    /// # Errors
    /// [`Drop::PongRate`].
    pub(in super::super) fn pong(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        to: Route,
        tx_id: TxId,
    ) -> Result<(), Drop> {
        let answers = match to {
            Route::Direct(addr) => self.answers(&addr),
            Route::Relay(_) => true,
        };
        let reserve = if answers { 0 } else { PONG_RESERVE };
        if !self.pong_rate.take(now, reserve) {
            return Err(Drop::PongRate);
        }
        let source = match to {
            Route::Direct(addr) => addr,
            // The fake address has room for small regions only; others read as 0.
            Route::Relay(region) => (DERP_FAKE_IP, u16::try_from(region.0).unwrap_or(0)).into(),
        };
        self.send(sh, to, false, &Message::Pong { tx_id, source });
        Ok(())
    }

    /// A Pong: the only thing that makes a path.
    ///
    /// # Errors
    /// [`Drop::UnknownPong`] if this peer has no such Ping on its way.
    pub(in super::super) fn pong_received(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        direct: bool,
        tx_id: &TxId,
        reported: SocketAddr,
    ) -> Result<(), Drop> {
        let sent = self.pings.take(tx_id).ok_or(Drop::UnknownPong)?;
        let rtt = now.saturating_duration_since(sent.at);
        let (route, peer) = (sent.to, self.id);
        sh.tell(peer, Story::PongRx { route, rtt });
        if let Purpose::User(id) = sent.purpose {
            sh.event(Event::PingReply {
                id,
                peer,
                route,
                rtt,
            });
        }
        match route {
            Route::Relay(_) => self.relay_rtt = Some((now, rtt)),
            Route::Direct(addr) if direct => {
                if sh.admission.admits(reported) && !sh.own.contains(&reported) {
                    let addr = reported;
                    sh.event(Event::Reported { peer, addr });
                }
                self.direct_pong(now, sh, addr, &sent);
            }
            Route::Direct(_) => {}
        }
        Ok(())
    }

    fn direct_pong(&mut self, now: Instant, sh: &mut Shared, addr: SocketAddr, sent: &Sent) {
        let rtt = now.saturating_duration_since(sent.at);
        let Some(candidate) = self.candidates.get_mut(&addr) else {
            return;
        };
        candidate.pong = Some((now, rtt));
        candidate.quick = None;
        if let Some(rounds) = &mut candidate.cached {
            *rounds = 0;
        }
        self.round.answered = true;
        (self.silent_rounds, self.holds) = (0, 0);
        if let State::Probing { held_until } = &mut self.state {
            *held_until = None;
        }
        if let Some(test) = self.validation.as_mut().filter(|test| test.addr == addr) {
            test.pong(now, rtt, sent.purpose);
            self.judge_validation(now, sh);
        }
        if self.best_addr() == Some(addr) {
            self.best_answered(now, sh, rtt);
            let id = self.id;
            let Some(best) = self.best_mut() else {
                return;
            };
            if let Purpose::Mtu(wire) = sent.purpose {
                best.mtu.pong(now, wire);
            }
            if sent.purpose == Purpose::Heartbeat {
                best.quality.heartbeat(true);
                let what = Story::Heartbeat {
                    addr,
                    rtt,
                    loss_pct: best.quality.loss_pct(),
                    jitter: best.quality.jitter(),
                };
                sh.tell(id, what);
            }
        } else {
            self.consider(now, sh, addr);
        }
    }

    /// Whether the peer has answered from this address.
    pub(in super::super) fn answers(&self, addr: &SocketAddr) -> bool {
        let candidate = self.candidates.get(addr);
        candidate.is_some_and(|candidate| candidate.pong.is_some())
    }

    /// A CallMeMaybe: the peer has pinged us and waits for our Pings at these addresses. They go
    /// out at once, whatever our own rounds do; it is never answered in kind.
    ///
    /// # Errors
    /// [`Drop::CallRate`].
    pub(in super::super) fn called(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        endpoints: &[SocketAddr],
    ) -> Result<(), Drop> {
        if !self.call_rate.take(now, 0) {
            return Err(Drop::CallRate);
        }
        let mut wanted: Vec<SocketAddr> = Vec::new();
        for addr in endpoints {
            let room = wanted.len() < CALL_ME_MAYBE_ENDPOINTS_MAX;
            if room && sh.admission.admits_named(*addr) && !wanted.contains(addr) {
                wanted.push(*addr);
            }
        }
        // The address that was lost may come back before the peer knows of it again.
        let keep = self.last_good.map(|(addr, _)| addr);
        let (removed, full) = self.candidates.set_called(now, &wanted, keep);
        if full {
            sh.counters.count(Drop::CandidatesFull);
        }
        let what = Story::CallMeMaybeRx {
            endpoints: wanted.clone(),
        };
        sh.tell(self.id, what);
        if self
            .validation
            .as_ref()
            .is_some_and(|test| removed.contains(&test.addr))
        {
            self.validation = None;
        }
        if self.best_addr().is_some_and(|addr| removed.contains(&addr)) {
            self.clear_best(now, sh, Reason::Withdrawn);
        }
        // It calls because it has no path it trusts: ours may be good in one direction only.
        self.ping_best(now, sh, true);
        let early = self
            .call_round_at
            .map(|at| at + CALL_ME_MAYBE_ROUND_INTERVAL)
            .filter(|at| now < *at);
        self.call_round_due = early;
        match early {
            // Addresses that were never asked are due all the same.
            Some(_) => self.start_round(now, sh, false, Reason::CallMeMaybe),
            None => self.call_round(now, sh),
        }
        Ok(())
    }

    /// The round that a CallMeMaybe asks for: all candidates, rested or not.
    pub(super) fn call_round(&mut self, now: Instant, sh: &mut Shared) {
        (self.call_round_at, self.call_round_due) = (Some(now), None);
        for (_, candidate) in self.candidates.iter_mut() {
            candidate.last_round = None;
        }
        self.start_round(now, sh, false, Reason::CallMeMaybe);
    }

    /// Data was sent while nothing was trusted.
    pub(in super::super) fn kicked(&mut self, now: Instant, sh: &mut Shared, activity: &Activity) {
        self.sent(now, activity);
        if !self.trusted(now) {
            self.start_round(now, sh, true, Reason::Data);
        }
    }

    /// Data flows again after a pause.
    pub(in super::super) fn activated(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        activity: &Activity,
    ) {
        self.sent(now, activity);
        let quiet = self.best().is_some_and(|best| {
            now.saturating_duration_since(best.last_pong) >= HEARTBEAT_INTERVAL
        });
        if quiet {
            self.ping_best(now, sh, false);
        }
    }

    /// The shard has begun to send both ways, because nothing came back.
    pub(in super::super) fn silent(&mut self, now: Instant, sh: &mut Shared, activity: &Activity) {
        self.sent(now, activity);
        if self.best().is_some() {
            self.ping_best(now, sh, true);
            self.candidates.end_rest(now);
            self.ping_due(now, sh);
            // If it is a stream that nobody answers, heartbeats judge it from now on.
            let soon = now + JUDGING_INTERVAL;
            self.heartbeat = self.heartbeat.map(|at| at.min(soon));
            sh.want_restun(now, RestunReason::Silence);
            self.announce(now, sh, true);
        }
    }

    fn sent(&mut self, now: Instant, activity: &Activity) {
        self.activity = *activity;
        self.last_sent = Some(now);
        if self.heartbeat.is_none() && self.was_direct {
            // After a long pause, what was silent before says nothing.
            self.silent_rounds = 0;
        }
        self.heartbeat.get_or_insert(now + HEARTBEAT_INTERVAL);
    }

    /// The kernel refused to send to an address.
    pub(in super::super) fn send_error(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        to: SocketAddr,
        errno: i32,
    ) {
        let is_best = self.best_addr() == Some(to);
        match errno {
            EHOSTUNREACH | ENETUNREACH => {
                if let Some(candidate) = self.candidates.get_mut(&to) {
                    // A route may come back soon: the quick Pings go on.
                    let (rested, quick) = (candidate.last_round, candidate.quick);
                    candidate.wipe();
                    (candidate.last_round, candidate.quick) = (rested, quick);
                }
                if is_best {
                    self.clear_best(now, sh, Reason::SendError);
                    self.last_good = None;
                }
            }
            // The host's firewall: as good as lost on the way.
            EPERM => sh.want_rebind(now),
            EMSGSIZE => {
                if let Some(best) = self.best_mut().filter(|best| best.addr == to) {
                    best.mtu.too_big(now);
                }
            }
            _ if is_best => {
                self.fall_back(now, sh, Reason::SendError);
                self.ping_best(now, sh, true);
            }
            _ => {}
        }
    }

    /// Whether packets of the peer by this relay are no news.
    pub(in super::super) fn expects_relayed(&self, region: RegionId) -> bool {
        self.heard_region == Some(region) && !matches!(self.state, State::Direct(_))
    }

    /// The peer uses this relay.
    pub(in super::super) fn relay_is(&mut self, region: RegionId) {
        self.heard_region = Some(region);
    }

    /// Packets of the peer came by relay. If we are direct, the peer may have lost the direct path:
    /// the best address must show that it works, which also tells the shards.
    pub(in super::super) fn heard_by_relay(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        region: RegionId,
    ) {
        self.heard_region = Some(region);
        let State::Direct(best) = &self.state else {
            return;
        };
        let quiet = now.saturating_duration_since(best.last_pong) >= JUDGING_INTERVAL;
        let fresh = Relayed {
            since: now,
            last: now,
            pongs: 0,
        };
        let relayed = self.relayed.filter(|relayed| !relayed.over(now));
        self.relayed = Some(Relayed {
            last: now,
            ..relayed.unwrap_or(fresh)
        });
        if quiet && self.suspect.is_none() {
            self.ping_best(now, sh, true);
        }
    }
}

// Linux errno values, the same on every architecture we build for.
const EPERM: i32 = 1;
const EMSGSIZE: i32 = 90;
const ENETUNREACH: i32 = 101;
const EHOSTUNREACH: i32 = 113;
