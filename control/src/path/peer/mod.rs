//! One peer's machine: what is known of it, what is being tried, and what its data does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringtail_dataplane::{Activity, PathDecision, PeerId, RegionId};

use super::candidate::Candidates;
use super::limit::{Limit, PEER_CALLS_PER_S, PEER_PINGS_PER_S, PEER_PONGS_PER_S};
use super::mtu::{Carries, MTU_UNPROVED, MtuSearch, wire_mtu};
use super::pings::Pings;
use super::quality::Quality;
use super::score::Rank;
use super::shared::Shared;
use super::validation::Validation;
use super::{BestStatus, LAST_GOOD_DURATION, PeerSetup, SESSION_ACTIVE_TIMEOUT, StateName, Status};
use crate::disco::SharedKey;
use crate::key::{DiscoPublic, NodePublic};

mod receive;
mod round;
mod state;
mod timer;

/// The peer's DISCO key and the secret we share.
#[derive(Clone)]
pub(super) struct PeerKey {
    pub(super) public: DiscoPublic,
    pub(super) secret: Arc<SharedKey>,
}

/// The state, with what only it has.
enum State {
    Relay,
    /// In a wake out of Held, the end of holding: until then nothing is begun by ourselves.
    Probing {
        held_until: Option<Instant>,
    },
    Direct(Best),
    Fallback(Best),
    Held {
        until: Instant,
    },
}

/// The address that passed validation.
#[derive(Clone, Copy)]
struct Best {
    addr: SocketAddr,
    /// That of the last Pong.
    latency: Duration,
    last_pong: Instant,
    trust_until: Instant,
    quality: Quality,
    mtu: MtuSearch,
    /// It must pass validation again before it is used alone.
    retest: bool,
}

impl Best {
    fn rank(&self) -> Rank {
        Rank {
            addr: self.addr,
            latency: self.latency,
            mtu: self.mtu.known().unwrap_or(MTU_UNPROVED),
            fragments: self.fragments(),
        }
    }

    /// Whether full packets pass in fragments only.
    fn fragments(&self) -> bool {
        self.mtu.carries() == Carries::Fragments
    }
}

/// The current round: five seconds in which each candidate is asked once.
#[derive(Clone, Copy, Default)]
struct Round {
    started: Option<Instant>,
    /// Something left: a Ping or a CallMeMaybe.
    asked: bool,
    answered: bool,
}

/// When the peer was told our endpoints, and whether it is to be told soon.
#[derive(Clone, Copy, Default)]
struct Announce {
    last: Option<Instant>,
    /// Waiting for fresh endpoints, or for the least interval: until then.
    pending: Option<Instant>,
}

/// A heartbeat that has no Pong yet.
#[derive(Clone, Copy)]
struct Suspect {
    since: Instant,
    /// The next Ping to make sure.
    next: Instant,
    gap: Duration,
    /// The path counts as silent then.
    verdict_at: Instant,
    /// Something else speaks against the path: data unanswered, or the peer's call.
    urgent: bool,
}

/// So long, and with so many Pongs meanwhile, a peer that is heard by relay alone says nothing
/// against our direction: its own is the bad one.
const RELAYED_LASTS: Duration = Duration::from_secs(3);
const RELAYED_PONGS: u32 = 3;
/// Not heard by relay for so long, it uses the direct path again.
const RELAYED_OVER: Duration = Duration::from_secs(10);

/// While we are direct, the peer's packets come by relay: since when, the last ones, and how often
/// the best address has answered meanwhile.
#[derive(Clone, Copy)]
struct Relayed {
    since: Instant,
    last: Instant,
    pongs: u32,
}

impl Relayed {
    fn lasts(self) -> bool {
        self.pongs >= RELAYED_PONGS
            && self.last.saturating_duration_since(self.since) >= RELAYED_LASTS
    }

    fn over(self, now: Instant) -> bool {
        now.saturating_duration_since(self.last) >= RELAYED_OVER
    }
}

/// One peer.
pub(super) struct Peer {
    pub(super) id: PeerId,
    pub(super) node_key: NodePublic,
    key: Option<PeerKey>,
    home: Option<RegionId>,
    /// Where the peer was heard by relay last.
    heard_region: Option<RegionId>,
    endpoints: Vec<SocketAddr>,

    state: State,
    state_since: Instant,
    switches: u32,
    candidates: Candidates,
    pings: Pings,
    validation: Option<Validation>,
    /// Numbers the bursts of all validations.
    bursts: u32,

    round: Round,
    /// When all candidates were considered last.
    last_full: Option<Instant>,
    /// A round was cut short by the rate: it goes on then.
    round_more: Option<Instant>,
    /// Rounds in a row without any Pong, and times held since the last one.
    silent_rounds: u32,
    holds: u32,
    /// It was direct once, in this run or in the one remembered: it is not held.
    was_direct: bool,
    call_round_at: Option<Instant>,
    /// A round for a CallMeMaybe that came too early.
    call_round_due: Option<Instant>,
    announce: Announce,

    /// The next tick; none while the session is idle.
    heartbeat: Option<Instant>,
    last_sent: Option<Instant>,
    activity: Activity,
    suspect: Option<Suspect>,
    relayed: Option<Relayed>,
    /// The address that was best before it was lost, when, and its next Ping.
    last_good: Option<(SocketAddr, Instant)>,
    last_good_next: Option<Instant>,

    relay_rtt: Option<(Instant, Duration)>,
    relay_ping_at: Option<Instant>,

    ping_rate: Limit,
    pong_rate: Limit,
    call_rate: Limit,
    generation: u64,
    decided: Option<PathDecision>,
}

impl Peer {
    pub(super) fn new(now: Instant, setup: &PeerSetup, key: Option<PeerKey>) -> Self {
        Self {
            id: setup.id,
            node_key: setup.node_key,
            key,
            home: setup.home,
            heard_region: None,
            endpoints: Vec::new(),
            state: State::Relay,
            state_since: now,
            switches: 0,
            candidates: Candidates::default(),
            pings: Pings::default(),
            validation: None,
            bursts: 0,
            round: Round::default(),
            last_full: None,
            round_more: None,
            silent_rounds: 0,
            holds: 0,
            was_direct: false,
            call_round_at: None,
            call_round_due: None,
            announce: Announce::default(),
            heartbeat: None,
            last_sent: None,
            activity: Activity::default(),
            suspect: None,
            relayed: None,
            last_good: None,
            last_good_next: None,
            relay_rtt: None,
            relay_ping_at: None,
            ping_rate: Limit::new(now, PEER_PINGS_PER_S),
            pong_rate: Limit::new(now, PEER_PONGS_PER_S),
            call_rate: Limit::new(now, PEER_CALLS_PER_S),
            generation: 0,
            decided: None,
        }
    }

    /// Sets how many candidates there may be, since others need some too.
    pub(super) fn set_candidates_max(&mut self, max: usize) {
        self.candidates.set_max(max);
    }

    /// Takes what coordination says of the peer now; news wake a held peer.
    pub(super) fn set(&mut self, now: Instant, sh: &mut Shared, setup: &PeerSetup) {
        let moved = self.home != setup.home;
        self.home = setup.home;
        let mut endpoints = setup.endpoints.clone();
        endpoints.retain(|addr| sh.admission.admits_named(*addr));
        endpoints.truncate(super::CANDIDATES_MAX);
        let changed = endpoints != self.endpoints;
        let (new, full) = self.candidates.set_map(now, &endpoints);
        if full {
            sh.counters.count(super::Drop::CandidatesFull);
        }
        if (moved || changed) && self.decided.is_some() {
            let named = |addr: &SocketAddr| endpoints.contains(addr);
            if !self
                .candidates
                .iter()
                .any(|(addr, c)| c.cached.is_some() && named(addr))
            {
                self.candidates.forget_cached();
            }
        }
        self.endpoints = endpoints;
        if moved || changed {
            self.wake(now, sh);
        }
        if new && !self.trusted(now) && self.active(now) {
            self.start_round(now, sh, true, super::Reason::Wake);
        }
    }

    /// The peer has another DISCO key: a new round can start at once, the best address keeps its
    /// trust while it lasts.
    pub(super) fn set_key(&mut self, now: Instant, sh: &mut Shared, key: Option<PeerKey>) {
        self.key = key;
        for (_, candidate) in self.candidates.iter_mut() {
            (candidate.last_round, candidate.last_got) = (None, None);
        }
        self.validation = None;
        self.wake(now, sh);
        if !self.trusted(now) && self.active(now) {
            self.start_round(now, sh, true, super::Reason::Wake);
        }
    }

    pub(super) fn disco_key(&self) -> Option<DiscoPublic> {
        self.key.as_ref().map(|key| key.public)
    }

    /// An address that worked in an earlier run.
    pub(super) fn remember(&mut self, now: Instant, addr: SocketAddr) {
        self.was_direct = true;
        if let Some(candidate) = self.candidates.entry(now, addr) {
            candidate.cached.get_or_insert(0);
        }
    }

    /// The addresses that answered, best first, with the time since and the round trip.
    pub(super) fn worked(&self, now: Instant) -> Vec<(SocketAddr, Duration, Duration)> {
        let best = self.best_addr();
        let answered = self.candidates.iter().filter_map(|(addr, candidate)| {
            let (at, rtt) = candidate.pong?;
            Some((*addr, now.saturating_duration_since(at), rtt))
        });
        let mut worked: Vec<_> = answered.collect();
        worked.sort_by_key(|(addr, age, _)| (Some(*addr) != best, *age));
        worked
    }

    /// The relay to reach the peer by: its home, else where it was heard last.
    pub(super) fn region(&self) -> Option<RegionId> {
        self.home.or(self.heard_region)
    }

    /// Whether the peer may be at this address.
    pub(super) fn has_candidate(&self, addr: &SocketAddr) -> bool {
        self.candidates.get(addr).is_some()
    }

    fn best(&self) -> Option<&Best> {
        match &self.state {
            State::Direct(best) | State::Fallback(best) => Some(best),
            State::Relay | State::Probing { .. } | State::Held { .. } => None,
        }
    }

    pub(super) fn best_addr(&self) -> Option<SocketAddr> {
        self.best().map(|best| best.addr)
    }

    fn best_mut(&mut self) -> Option<&mut Best> {
        match &mut self.state {
            State::Direct(best) | State::Fallback(best) => Some(best),
            State::Relay | State::Probing { .. } | State::Held { .. } => None,
        }
    }

    /// Whether data goes by the best address alone.
    fn trusted(&self, now: Instant) -> bool {
        match &self.state {
            State::Direct(best) => now <= best.trust_until,
            State::Fallback(_) | State::Relay | State::Probing { .. } | State::Held { .. } => false,
        }
    }

    /// Whether we are passive: held, or in the one round that a call out of Held allows.
    fn passive(&self) -> bool {
        match self.state {
            State::Held { .. } => true,
            State::Probing { held_until } => held_until.is_some(),
            State::Relay | State::Direct(_) | State::Fallback(_) => false,
        }
    }

    /// Whether rounds are far apart: the path that worked once has been silent for long.
    fn slow(&self, sh: &Shared) -> bool {
        let limit = sh.config.retry_limit;
        let gone = limit > 0 && self.silent_rounds >= limit && self.best().is_none();
        self.was_direct && gone
    }

    /// Whether the session is in use.
    fn active(&self, now: Instant) -> bool {
        self.sent_within(now, SESSION_ACTIVE_TIMEOUT)
    }

    fn sent_within(&self, now: Instant, time: Duration) -> bool {
        self.last_sent
            .is_some_and(|at| now.saturating_duration_since(at) <= time)
    }

    /// The address that should be Direct again soon, while there is hope.
    fn recovering(&self, now: Instant) -> Option<SocketAddr> {
        match &self.state {
            State::Fallback(best) => Some(best.addr),
            State::Relay | State::Probing { held_until: None } => {
                let (addr, lost_at) = self.last_good?;
                (now.saturating_duration_since(lost_at) <= LAST_GOOD_DURATION).then_some(addr)
            }
            State::Direct(_) | State::Held { .. } | State::Probing { .. } => None,
        }
    }

    /// The decision as it is now, with the generation of the last one given.
    fn decision(&self, sh: &Shared) -> PathDecision {
        let test = self.validation.as_ref().filter(|test| test.data);
        let tested = test.map(|test| test.addr);
        let needed = |addr| wire_mtu(sh.config.tunnel_mtu, addr);
        let (udp, trust_until, path_mtu) = match &self.state {
            State::Relay | State::Held { .. } => (None, None, None),
            State::Probing { .. } => (tested, None, tested.map(needed)),
            State::Direct(best) => (Some(best.addr), Some(best.trust_until), best.mtu.known()),
            State::Fallback(best) => (Some(best.addr), None, best.mtu.known()),
        };
        PathDecision {
            generation: self.generation,
            udp,
            local: None,
            derp: self.region(),
            trust_until,
            silence_limit: sh.config.silence_limit,
            path_mtu: path_mtu.unwrap_or(MTU_UNPROVED),
            relayed_alone: self.relayed.is_some_and(Relayed::lasts),
        }
    }

    /// The decision, if it is another than the last one given.
    pub(super) fn poll_decision(&mut self, sh: &Shared) -> Option<PathDecision> {
        let mut decision = self.decision(sh);
        if self.decided.as_ref() == Some(&decision) {
            return None;
        }
        self.generation += 1;
        decision.generation = self.generation;
        self.decided = Some(decision.clone());
        Some(decision)
    }

    fn state_name(&self) -> StateName {
        match self.state {
            State::Relay => StateName::Relay,
            State::Probing { .. } => StateName::Probing,
            State::Direct(_) => StateName::Direct,
            State::Fallback(_) => StateName::Fallback,
            State::Held { .. } => StateName::Held,
        }
    }

    pub(super) fn status(&self, now: Instant, sh: &Shared) -> Status {
        Status {
            state: self.state_name(),
            since: now.saturating_duration_since(self.state_since),
            decision: self.decision(sh),
            region: self.region(),
            relay_rtt: self.relay_rtt.map(|(_, rtt)| rtt),
            best: self.best().map(|best| BestStatus {
                addr: best.addr,
                rtt: best.quality.rtt(),
                jitter: best.quality.jitter(),
                loss_pct: best.quality.loss_pct(),
                mtu: best.mtu.known(),
                fragments: best.fragments(),
                last_pong: now.saturating_duration_since(best.last_pong),
            }),
            validating: self.validation.as_ref().map(|test| test.addr),
            candidates: self
                .candidates
                .iter()
                .map(|(addr, candidate)| (*addr, candidate.pong.map(|(_, rtt)| rtt)))
                .collect(),
            switches: self.switches,
        }
    }
}
