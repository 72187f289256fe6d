//! Transitions: every change of state goes through [`Peer::enter`].

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::RngExt as _;

use super::super::mtu::{Carries, MtuSearch, wire_mtu};
use super::super::quality::{Alarm, Quality};
use super::super::score::{Rank, better};
use super::super::shared::Shared;
use super::super::validation::{Terms, Validation, Verdict};
use super::super::{
    BLOCKED_DURATION, FailedTest, HEARTBEAT_INTERVAL, HOLD_MAX, HOLD_MIN, LAST_GOOD_INTERVAL,
    LinkChange, PING_TIMEOUT, Phase, Reason, Story, TRUST_UDP_ADDR_DURATION, Validate,
};
use super::{Best, Peer, State, Suspect};

impl Peer {
    /// Makes a transition: the only place where the state changes.
    fn enter(&mut self, now: Instant, sh: &mut Shared, state: State, reason: Reason) {
        let (name, addr) = (self.state_name(), self.best_addr());
        self.state = state;
        let now_best = self.best_addr();
        if addr != now_best || !matches!(self.state, State::Direct(_)) {
            self.relayed = None;
        }
        if addr.is_some() && now_best != addr {
            self.switches += 1;
            self.suspect = None;
        }
        if self.state_name() == name && now_best == addr {
            return;
        }
        self.state_since = now;
        let addr = now_best.or_else(|| self.validation.as_ref().map(|test| test.addr));
        let what = Story::Path {
            state: self.state_name(),
            addr,
            reason,
        };
        sh.tell(self.id, what);
    }

    /// Relay becomes Probing, a held peer gets its one round; the others stay.
    pub(super) fn probe(&mut self, now: Instant, sh: &mut Shared, reason: Reason) {
        let held_until = match self.state {
            State::Relay => None,
            State::Held { until } => Some(until),
            State::Probing { .. } | State::Direct(_) | State::Fallback(_) => return,
        };
        self.enter(now, sh, State::Probing { held_until }, reason);
    }

    /// Gives up for a while: [`HOLD_MIN`], doubled per repetition up to [`HOLD_MAX`], ±10 %.
    pub(super) fn hold(&mut self, now: Instant, sh: &mut Shared) {
        let time = HOLD_MIN
            .saturating_mul(1 << self.holds.min(8))
            .min(HOLD_MAX);
        let until = now + time.mul_f64(sh.rng.random_range(0.9..=1.1));
        self.holds += 1;
        self.silent_rounds = 0;
        self.round = super::Round::default();
        for (_, candidate) in self.candidates.iter_mut() {
            candidate.quick = None;
        }
        (self.round_more, self.last_good) = (None, None);
        self.enter(now, sh, State::Held { until }, Reason::RetryLimit);
    }

    /// Something changed that makes another try worth it.
    pub(in super::super) fn wake(&mut self, now: Instant, sh: &mut Shared) {
        if self.passive() {
            self.release(now, sh, Reason::Wake);
        } else if self.slow(sh) {
            self.silent_rounds = 0;
            if self.active(now) {
                self.start_round(now, sh, true, Reason::Wake);
            }
        }
    }

    /// Ends holding; while data flows, the next round starts at once.
    pub(super) fn release(&mut self, now: Instant, sh: &mut Shared, reason: Reason) {
        self.silent_rounds = 0;
        self.enter(now, sh, State::Relay, reason);
        if self.active(now) {
            self.start_round(now, sh, true, reason);
        }
    }

    /// Nothing is on its way any more and no data asks for more.
    pub(super) fn settle(&mut self, now: Instant, sh: &mut Shared) {
        let State::Probing { held_until } = self.state else {
            return;
        };
        if !self.pings.is_empty() || self.validation.is_some() {
            return;
        }
        match held_until {
            Some(until) => self.enter(now, sh, State::Held { until }, Reason::NoAnswer),
            None if self.heartbeat.is_none() => {
                self.enter(now, sh, State::Relay, Reason::NoAnswer);
            }
            None => {}
        }
    }

    /// Data goes both ways from now on, until the best address answers.
    pub(super) fn fall_back(&mut self, now: Instant, sh: &mut Shared, reason: Reason) {
        let State::Direct(best) = self.state else {
            return;
        };
        self.suspect = None;
        self.last_good_next = Some(now);
        self.enter(now, sh, State::Fallback(best), reason);
        self.try_others(now, sh, reason);
    }

    /// The best address is doubted or gone: the others are asked at once, however short their rest,
    /// and the best of those that answered lately is tested without waiting for another Pong.
    fn try_others(&mut self, now: Instant, sh: &mut Shared, reason: Reason) {
        if self.sent_within(now, HEARTBEAT_INTERVAL) {
            self.candidates.end_rest(now);
            self.start_round(now, sh, true, reason);
            self.consider_others(now, sh);
        }
    }

    /// The best address is given up.
    pub(super) fn clear_best(&mut self, now: Instant, sh: &mut Shared, reason: Reason) {
        let Some(addr) = self.best_addr() else {
            return;
        };
        self.last_good = Some((addr, now));
        self.last_good_next = Some(now + LAST_GOOD_INTERVAL);
        let state = if self.active(now) || !self.pings.is_empty() {
            State::Probing { held_until: None }
        } else {
            State::Relay
        };
        self.enter(now, sh, state, reason);
        self.try_others(now, sh, reason);
    }

    /// The network changed under us.
    pub(in super::super) fn link_changed(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        change: LinkChange,
    ) {
        match change {
            LinkChange::Minor => {
                self.wake(now, sh);
                if !self.trusted(now) {
                    self.try_others(now, sh, Reason::LinkChange);
                }
            }
            LinkChange::Major => {
                self.validation = None;
                self.candidates.iter_mut().for_each(|(_, c)| c.wipe());
                self.pings = super::Pings::default();
                self.announce = super::Announce::default();
                self.round = super::Round::default();
                self.relay_ping_at = None;
                self.clear_best(now, sh, Reason::LinkChange);
                self.wake(now, sh);
            }
        }
    }

    /// The best address answered.
    pub(super) fn best_answered(&mut self, now: Instant, sh: &mut Shared, rtt: Duration) {
        self.suspect = None;
        if let Some(relayed) = &mut self.relayed {
            relayed.pongs += 1;
        }
        let Some(best) = self.best_mut() else {
            return;
        };
        best.latency = rtt;
        best.last_pong = now;
        best.quality.pong(rtt);
        let (addr, retest) = (best.addr, best.retest);
        if retest {
            if self.validation.is_none() {
                self.start_validation(now, sh, addr, rtt, true, false);
            }
            return;
        }
        best.trust_until = now + TRUST_UDP_ADDR_DURATION;
        let best = *best;
        self.enter(now, sh, State::Direct(best), Reason::PongAgain);
    }

    /// A candidate answered: is it worth a test?
    pub(super) fn consider(&mut self, now: Instant, sh: &mut Shared, addr: SocketAddr) {
        let Some(candidate) = self.candidates.get(&addr) else {
            return;
        };
        let Some((pong_at, rtt)) = candidate.pong.filter(|_| !candidate.blocked(now)) else {
            return;
        };
        let early = pong_at < now;
        if let Some(test) = &self.validation {
            // What answers now goes before what only answered once.
            if early || !test.on_trust || test.addr == addr {
                return;
            }
            self.validation = None;
        }
        let (mut replaces, mut left) = (false, false);
        if let Some(best) = self.best().copied().filter(|best| best.addr != addr) {
            // Packets come from there, and the best address has been quiet since they do.
            let fresh = |at: &Instant| now.saturating_duration_since(*at) <= PING_TIMEOUT;
            let new_source = candidate.new_source_at.filter(fresh);
            let moved = new_source.is_some_and(|at| at > best.last_pong);
            replaces = moved || best.retest;
            let trusted = self.trusted(now);
            let rank = Rank::unproved(addr, rtt, candidate.fragments);
            if trusted && !replaces && !better(&rank, &best.rank()) {
                return;
            }
            left = trusted && moved;
        }
        self.start_validation(now, sh, addr, rtt, replaces, early);
        if left && self.best_addr().is_some_and(|best| best != addr) {
            self.fall_back(now, sh, Reason::NewSource);
        }
    }

    fn start_validation(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        addr: SocketAddr,
        rtt: Duration,
        replaces: bool,
        early: bool,
    ) {
        let mtu = wire_mtu(sh.config.tunnel_mtu, addr);
        if sh.config.validate == Validate::Fast {
            // An older Pong promotes nothing: the next one will.
            if early {
                return;
            }
            let last_pong = now;
            self.promote(now, sh, addr, rtt, last_pong, Carries::Unknown, replaces);
            return;
        }
        if let State::Relay | State::Held { .. } = self.state {
            self.probe(now, sh, Reason::PingReceived);
        }
        self.bursts += 1;
        let mut test = Validation::new(now, addr, rtt, mtu, self.bursts, replaces, early);
        test.data = !self.candidates.get(&addr).is_some_and(|c| c.narrow);
        self.validation = Some(test);
        let phase = Phase::Start;
        sh.tell(self.id, Story::Validate { addr, phase });
        self.run_validation(now, sh);
    }

    /// Ends a validation whose verdict is certain.
    pub(super) fn judge_validation(&mut self, now: Instant, sh: &mut Shared) {
        let terms = Terms {
            lenient: self.region().is_none(),
            relay_rtt: self.relay_rtt_at_least(now),
        };
        let burst = self.bursts + 1;
        let Some(test) = &mut self.validation else {
            return;
        };
        let addr = test.addr;
        let verdict = test.judge(now, terms, burst);
        self.bursts = burst;
        let Some(verdict) = verdict else {
            return;
        };
        let Some(test) = self.validation.take() else {
            return;
        };
        match verdict {
            Verdict::Pass(figures) => {
                let needed = wire_mtu(sh.config.tunnel_mtu, addr);
                let carries = figures.carries;
                let fragments = carries == Carries::Fragments;
                let mtu = (carries == Carries::Whole).then_some(needed);
                if let Some(candidate) = self.candidates.get_mut(&addr) {
                    (candidate.fragments, candidate.narrow) = (fragments, false);
                }
                let rtt = figures.min.unwrap_or_default();
                let phase = Phase::Pass {
                    rtt: figures.median.unwrap_or_default(),
                    loss_pct: figures.loss_pct,
                    mtu,
                    fragments,
                };
                sh.tell(self.id, Story::Validate { addr, phase });
                self.promote(now, sh, addr, rtt, test.last_pong, carries, test.replaces);
            }
            Verdict::Fail(failed, figures) => {
                let phase = Phase::Fail {
                    test: failed,
                    rtt: figures.median,
                    loss_pct: figures.loss_pct,
                };
                sh.tell(self.id, Story::Validate { addr, phase });
                match self.candidates.get_mut(&addr) {
                    // Its old Pong promised too much; a new one is as good as any.
                    Some(candidate) if test.on_trust => candidate.pong = None,
                    Some(candidate) => {
                        candidate.blocked_until = Some(now + BLOCKED_DURATION);
                        candidate.quick = None;
                        candidate.narrow = failed == FailedTest::Mtu;
                    }
                    None => {}
                }
                if self.best_addr() == Some(addr) {
                    self.clear_best(now, sh, Reason::Quality);
                    self.last_good = None;
                }
            }
        }
        self.consider_others(now, sh);
        self.settle(now, sh);
    }

    /// The best of the candidates that answered lately, if it is worth a test.
    fn consider_others(&mut self, now: Instant, sh: &mut Shared) {
        let best = self.best_addr();
        let ranks = self.candidates.iter().filter_map(|(addr, candidate)| {
            let usable = candidate.answered_within(now, PING_TIMEOUT) && !candidate.blocked(now);
            let (_, latency) = candidate.pong.filter(|_| usable && Some(*addr) != best)?;
            Some(Rank::unproved(*addr, latency, candidate.fragments))
        });
        let top = ranks.reduce(|top, rank| if better(&rank, &top) { rank } else { top });
        if let Some(top) = top {
            self.consider(now, sh, top.addr);
        }
    }

    /// A candidate passed: it becomes best, unless a trusted best is better after all.
    fn promote(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        addr: SocketAddr,
        rtt: Duration,
        last_pong: Instant,
        carries: Carries,
        replaces: bool,
    ) {
        let trust_until = last_pong + TRUST_UDP_ADDR_DURATION;
        let limit = match sh.config.validate {
            Validate::Full => sh.config.link_mtu,
            Validate::Fast => 0,
        };
        let needed = wire_mtu(sh.config.tunnel_mtu, addr);
        let mtu = MtuSearch::new(now, needed, carries, limit);
        if let Some(best) = self.best_mut().filter(|best| best.addr == addr) {
            best.retest = false;
            best.quality.absolve(rtt);
            best.last_pong = last_pong;
            best.trust_until = trust_until;
            if best.mtu.carries() != carries {
                best.mtu = mtu;
            }
            let best = *best;
            self.enter(now, sh, State::Direct(best), Reason::Validated);
            return;
        }
        let rank = Rank::unproved(addr, rtt, carries == Carries::Fragments);
        let trusted = self.trusted(now);
        let beaten = |best: &Best| !best.retest && !replaces && !better(&rank, &best.rank());
        if trusted && self.best().is_some_and(beaten) {
            return;
        }
        let best = Best {
            addr,
            latency: rtt,
            last_pong,
            trust_until,
            quality: Quality::new(rtt),
            mtu,
            retest: false,
        };
        let reason = if trusted {
            Reason::Better
        } else {
            Reason::Validated
        };
        (self.silent_rounds, self.holds) = (0, 0);
        (self.was_direct, self.last_good) = (true, None);
        self.enter(now, sh, State::Direct(best), reason);
        if self.heartbeat.is_none() && self.active(now) {
            self.heartbeat = Some(now + HEARTBEAT_INTERVAL);
        }
    }

    /// The quality of the best address has been bad for several ticks: alternatives are looked for,
    /// and if packets are lost it is tested again itself.
    pub(super) fn alarm(&mut self, now: Instant, sh: &mut Shared, alarm: Alarm) {
        let Some(best) = self.best_mut() else {
            return;
        };
        match alarm {
            Alarm::Rtt => {}
            Alarm::Loss => {
                best.retest = sh.config.validate == Validate::Full;
                self.test_best(now, sh);
            }
        }
        self.start_round(now, sh, true, Reason::Quality);
    }

    /// Begins the test of a best address that must pass again.
    pub(super) fn test_best(&mut self, now: Instant, sh: &mut Shared) {
        if let Some(best) = self.best().copied().filter(|best| best.retest)
            && self.validation.is_none()
        {
            self.start_validation(now, sh, best.addr, best.latency, true, false);
        }
    }

    /// A Ping to the best address left: if no Pong comes back soon, the path counts as silent. With
    /// another reason to doubt it (`urgent`) there is less patience.
    pub(super) fn suspect(&mut self, now: Instant, urgent: bool) {
        let Some(best) = self.best() else {
            return;
        };
        let (least, gap) = if urgent {
            (SUSPECT_URGENT_MIN, SUSPECT_URGENT_GAP)
        } else {
            (SUSPECT_MIN, SUSPECT_GAP)
        };
        let gap = gap.max(best.quality.rtt());
        let patience = least.max(best.quality.rtt() * 4 + best.quality.jitter() * 4);
        let (next, verdict_at) = (now + gap, now + patience);
        let fresh = Suspect {
            since: now,
            next,
            gap,
            verdict_at,
            urgent,
        };
        let suspect = self.suspect.get_or_insert(fresh);
        if urgent && !suspect.urgent {
            suspect.verdict_at = suspect.verdict_at.min(verdict_at);
            suspect.next = suspect.next.min(next);
            (suspect.gap, suspect.urgent) = (gap, true);
        }
    }

    /// The round trip by relay, or how long it has taken so far.
    fn relay_rtt_at_least(&self, now: Instant) -> Option<Duration> {
        let pending = self
            .relay_ping_at
            .map(|at| now.saturating_duration_since(at));
        match self.relay_rtt {
            Some((at, rtt)) if self.relay_ping_at.is_none_or(|sent| at >= sent) => Some(rtt),
            Some((_, rtt)) => pending.max(Some(rtt)),
            None => pending,
        }
    }
}

/// A heartbeat unanswered for so long, and its repetitions: silent.
const SUSPECT_MIN: Duration = Duration::from_secs(1);
/// Least time between these repetitions.
const SUSPECT_GAP: Duration = Duration::from_millis(250);
/// The same where something else speaks against the path already.
const SUSPECT_URGENT_MIN: Duration = Duration::from_millis(300);
const SUSPECT_URGENT_GAP: Duration = Duration::from_millis(100);
