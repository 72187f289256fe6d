//! A model of the shard's part: the sending rule of `protocol/paths.md` §4, §15.1 and §16, and the
//! events it gives.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ringtail_dataplane::{Activity, Event, PathDecision, PeerId, RegionId};

pub(super) const PEER: PeerId = PeerId(0);
const KICK_INTERVAL: Duration = Duration::from_millis(100);
const ACTIVE_AFTER: Duration = Duration::from_secs(3);
const SOURCE_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Default)]
pub(super) struct Shard {
    pub(super) decision: Option<PathDecision>,
    pub(super) activity: Activity,
    pub(super) events: Vec<Event>,
    kicked: Option<Instant>,
    sourced: Option<Instant>,
    /// Data sent since the last arrival over the current address.
    unanswered: Option<Instant>,
    /// Nothing came back for the silence limit.
    silent: bool,
    /// While trusted, a packet came by relay first.
    outrun: bool,
    seen: BTreeSet<(bool, u64)>,
}

/// The ways one packet leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ways {
    pub(super) udp: Option<SocketAddr>,
    pub(super) relay: Option<RegionId>,
}

impl Shard {
    /// Another address, or the same with longer trust (a Pong came), ends both doubts.
    pub(super) fn decide(&mut self, now: Instant, decision: PathDecision) {
        if let Some(old) = &self.decision {
            assert!(old.generation < decision.generation, "generations grow");
        }
        let old = self.decision.replace(decision);
        let (udp, trust) = old.map_or((None, None), |old| (old.udp, old.trust_until));
        let Some(decision) = &self.decision else {
            return;
        };
        let moved = udp != decision.udp;
        if moved || decision.trust_until > trust {
            let grace = decision.silence_limit / 3;
            self.unanswered = self.unanswered.filter(|_| !moved).map(|_| now + grace);
            (self.silent, self.outrun) = (false, false);
        }
    }

    /// A packet leaves.
    pub(super) fn send(&mut self, now: Instant) -> Ways {
        let Some(decision) = self.decision.clone() else {
            return Ways::default();
        };
        let last = self.activity.last_sent.replace(now);
        if last.is_none_or(|at| now - at >= ACTIVE_AFTER) {
            self.events.push(Event::Active(PEER));
        }
        let trusted = self.trusted(now);
        if !trusted && self.kicked.is_none_or(|at| now - at >= KICK_INTERVAL) {
            self.kicked = Some(now);
            self.events.push(Event::Kick(PEER));
        }
        let limit = decision.silence_limit;
        let over = |at: Instant| now.saturating_duration_since(at) >= limit;
        if trusted {
            if !self.silent && self.unanswered.is_some_and(over) {
                self.silent = true;
                self.events.push(Event::Silent(PEER));
            }
            self.unanswered.get_or_insert(now);
        }
        let alone = trusted && !self.silent && !self.outrun;
        Ways {
            udp: decision.udp,
            relay: decision.derp.filter(|_| !alone),
        }
    }

    fn trusted(&self, now: Instant) -> bool {
        let trusting = |decision: &PathDecision| {
            decision.udp.is_some() && decision.trust_until.is_some_and(|until| now <= until)
        };
        self.decision.as_ref().is_some_and(trusting)
    }

    /// A packet arrives; `false` for a duplicate, which the replay check refuses: it authenticates
    /// nothing.
    pub(super) fn receive(
        &mut self,
        now: Instant,
        from: Option<SocketAddr>,
        id: (bool, u64),
    ) -> bool {
        if !self.seen.insert(id) {
            return false;
        }
        self.activity.last_received = Some(now);
        let decided = self.decision.as_ref().and_then(|decision| decision.udp);
        match from {
            Some(from) if decided == Some(from) => {
                self.activity.last_received_direct = Some(now);
                self.unanswered = None;
                (self.silent, self.outrun) = (false, false);
            }
            Some(from) => {
                if self.sourced.is_none_or(|at| now - at >= SOURCE_INTERVAL) {
                    self.sourced = Some(now);
                    self.events.push(Event::NewSource(PEER, from));
                }
            }
            None => {
                let alone = self.decision.as_ref().is_some_and(|d| d.relayed_alone);
                self.outrun |= self.trusted(now) && !alone;
            }
        }
        true
    }
}
