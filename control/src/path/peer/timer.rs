//! What time alone does.

use std::time::{Duration, Instant};

use ringtail_dataplane::Activity;

use super::super::limit::rested;
use super::super::mtu::Step;
use super::super::pings::Sent;
use super::super::shared::Shared;
use super::super::{
    Event, GOOD_ENOUGH_LATENCY, HEARTBEAT_INTERVAL, JUDGING_INTERVAL, LAST_GOOD_INTERVAL,
    PING_BACK_INTERVAL, Purpose, Reason, Route, UPGRADE_UDP_DIRECT_INTERVAL,
};
use super::{Peer, State};

/// Sent so lately, a stream counts as running.
const STREAM_RUNS: Duration = Duration::from_millis(1500);

/// Time that arrivals over the best address buy for an unanswered heartbeat.
const HEARD_GRACE: Duration = Duration::from_secs(2);

impl Peer {
    /// The next moment at which something is due.
    pub(in super::super) fn next_timeout(&self, now: Instant) -> Option<Instant> {
        let by_state = match &self.state {
            State::Direct(best) => {
                // Trust lasts up to and including its end.
                let lapse = best.trust_until + Duration::from_nanos(1);
                let search = best.mtu.next_timeout().filter(|_| self.heartbeat.is_some());
                [Some(lapse), search]
            }
            State::Held { until } => [Some(*until), None],
            State::Relay | State::Probing { .. } | State::Fallback(_) => [None, None],
        };
        let recovering = self
            .last_good_next
            .filter(|_| self.heartbeat.is_some() && self.recovering(now).is_some());
        let quick = self
            .candidates
            .iter()
            .filter_map(|(_, c)| c.quick_at())
            .min();
        let suspect = self
            .suspect
            .map(|suspect| suspect.next.min(suspect.verdict_at));
        let test = self
            .validation
            .as_ref()
            .and_then(|test| test.next_timeout());
        [
            self.pings.next_timeout(),
            self.heartbeat,
            self.announce.pending,
            self.round_more,
            self.call_round_due,
            recovering,
            quick,
            suspect,
            test,
        ]
        .into_iter()
        .chain(by_state)
        .flatten()
        .min()
    }

    /// Does everything that is due.
    pub(in super::super) fn handle_timeout(
        &mut self,
        now: Instant,
        sh: &mut Shared,
        activity: &dyn Fn() -> Activity,
    ) {
        while let Some(sent) = self.pings.take_expired(now) {
            self.expire(now, sh, &sent);
        }
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if self.validation.is_some() {
            self.run_validation(now, sh);
            self.judge_validation(now, sh);
        }
        if self.suspect.is_some() {
            self.check_suspect(now, sh, activity);
        }
        if let State::Direct(best) = &self.state
            && now > best.trust_until
        {
            let reason = if self.heartbeat.is_some() {
                Reason::TrustExpired
            } else {
                Reason::Idle
            };
            self.fall_back(now, sh, reason);
        }
        if due(self.heartbeat) {
            self.activity = activity();
            self.tick(now, sh);
        }
        if let State::Held { until } = self.state
            && until <= now
        {
            self.release(now, sh, Reason::HoldOver);
        }
        if due(self.announce.pending) {
            self.send_call_me_maybe(now, sh);
        }
        if due(self.call_round_due) {
            self.call_round(now, sh);
        }
        if due(self.round_more) {
            self.ping_due(now, sh);
        }
        if due(self.last_good_next) {
            self.ping_recovering(now, sh);
        }
        self.ping_quickly(now, sh);
        self.search_mtu(now, sh);
        self.settle(now, sh);
    }

    /// A Ping got no Pong in its time.
    fn expire(&mut self, now: Instant, sh: &mut Shared, sent: &Sent) {
        if let Purpose::User(id) = sent.purpose {
            let another = self.pings.iter().any(|other| other.purpose == sent.purpose);
            if !another {
                let peer = self.id;
                sh.event(Event::PingTimeout { id, peer });
            }
        }
        let Route::Direct(addr) = sent.to else {
            return;
        };
        let trusted = self.trusted(now);
        let Some(best) = self.best_mut().filter(|best| best.addr == addr) else {
            return;
        };
        if sent.purpose == Purpose::Heartbeat {
            best.quality.heartbeat(false);
        }
        if !trusted && best.last_pong < sent.at {
            self.clear_best(now, sh, Reason::PingTimeout);
        }
    }

    /// The heartbeat: asks the best address, judges it, and looks for something better.
    fn tick(&mut self, now: Instant, sh: &mut Shared) {
        self.last_sent = self.last_sent.max(self.activity.last_sent);
        if !self.active(now) {
            self.heartbeat = None;
            return;
        }
        let interval = if self.one_way(now) {
            JUDGING_INTERVAL
        } else {
            HEARTBEAT_INTERVAL
        };
        self.heartbeat = Some(now + interval);
        self.relayed = self.relayed.filter(|relayed| !relayed.over(now));
        let alarm = self.best_mut().and_then(|best| best.quality.tick());
        self.ping_best(now, sh, false);
        if let Some(alarm) = alarm {
            self.alarm(now, sh, alarm);
        }
        if self.wanted(now) {
            self.start_round(now, sh, true, Reason::Data);
        }
    }

    /// Whether we send and nothing authenticated comes back over the best address: then only Pings
    /// tell whether it works.
    fn one_way(&self, now: Instant) -> bool {
        let back = self.activity.last_received_direct;
        let heard = back.is_some_and(|at| now.saturating_duration_since(at) <= JUDGING_INTERVAL);
        self.best().is_some() && self.sent_within(now, STREAM_RUNS) && !heard
    }

    /// Whether a tick should start a round.
    fn wanted(&self, now: Instant) -> bool {
        match &self.state {
            State::Held { .. } => false,
            State::Probing { held_until } => held_until.is_none(),
            State::Relay | State::Fallback(_) => true,
            State::Direct(best) => {
                best.latency > GOOD_ENOUGH_LATENCY
                    && rested(now, self.last_full, UPGRADE_UDP_DIRECT_INTERVAL)
            }
        }
    }

    /// A heartbeat is unanswered: asks again, and in the end goes both ways. Arrivals over that very
    /// address buy some time: they prove the other direction, and that only Pongs are slow.
    fn check_suspect(&mut self, now: Instant, sh: &mut Shared, activity: &dyn Fn() -> Activity) {
        let Some(mut suspect) = self.suspect else {
            return;
        };
        let Some(addr) = self.best_addr() else {
            self.suspect = None;
            return;
        };
        if suspect.verdict_at <= now {
            let heard = || {
                activity()
                    .last_received_direct
                    .is_some_and(|at| at > suspect.since)
            };
            if !suspect.urgent && heard() {
                suspect.urgent = true;
                suspect.verdict_at = now + HEARD_GRACE;
                self.suspect = Some(suspect);
            } else {
                self.suspect = None;
                self.fall_back(now, sh, Reason::Silent);
            }
            return;
        }
        if suspect.next <= now {
            suspect.next = now + suspect.gap;
            self.suspect = Some(suspect);
            self.ping(now, sh, Route::Direct(addr), Purpose::Discovery);
        }
    }

    /// The quick Pings that follow a round's while nothing is trusted.
    fn ping_quickly(&mut self, now: Instant, sh: &mut Shared) {
        let trusted = self.trusted(now);
        let mut due = Vec::new();
        for (addr, candidate) in self.candidates.iter_mut() {
            if trusted || candidate.blocked(now) {
                candidate.quick = None;
            }
            let Some(at) = candidate.quick_at() else {
                candidate.quick = None;
                continue;
            };
            if at <= now {
                candidate.quick = candidate.quick.map(|(base, done)| (base, done + 1));
                if rested(now, candidate.last_ping, PING_BACK_INTERVAL) {
                    due.push(*addr);
                }
            }
        }
        for addr in due {
            self.ping(now, sh, Route::Direct(addr), Purpose::Discovery);
        }
    }

    /// The address that worked last, or is best but untrusted, is asked again and again while data
    /// flows.
    fn ping_recovering(&mut self, now: Instant, sh: &mut Shared) {
        let addr = self.recovering(now).filter(|_| self.heartbeat.is_some());
        self.last_good_next = addr.map(|_| now + LAST_GOOD_INTERVAL);
        let Some(addr) = addr else {
            return;
        };
        let due = self.candidates.get(&addr).is_some_and(|candidate| {
            !candidate.blocked(now) && rested(now, candidate.last_ping, LAST_GOOD_INTERVAL / 2)
        });
        if due && self.validation.is_none() {
            self.ping(now, sh, Route::Direct(addr), Purpose::Discovery);
        }
    }

    /// The background search for larger packets on a direct path.
    fn search_mtu(&mut self, now: Instant, sh: &mut Shared) {
        let State::Direct(best) = &mut self.state else {
            return;
        };
        if self.heartbeat.is_none() {
            return;
        }
        let addr = best.addr;
        match best.mtu.poll(now) {
            Some(Step::Probe(wire)) => {
                self.ping(now, sh, Route::Direct(addr), Purpose::Mtu(wire));
            }
            Some(Step::Test) => {
                best.retest = true;
                self.test_best(now, sh);
            }
            None => {}
        }
    }
}
