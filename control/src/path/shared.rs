//! What all peers of a node have in common: keys, own endpoints, randomness, and the ways out.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use ringtail_dataplane::PeerId;
use ringtail_dataplane::stats::Counts;

use super::candidate::Admission;
use super::limit::{Limit, NODE_PINGS_PER_S, rested};
use super::{
    Config, Drop, ENDPOINTS_FRESH_ENOUGH, EVENTS_MAX, Event, RestunReason, Story, TRANSMITS_MAX,
    Transmit,
};
use crate::key::{DiscoPublic, NodePublic};

/// A rebind is asked for this often at most.
const REBIND_INTERVAL: Duration = Duration::from_secs(5);
/// A re-STUN is asked for this often at most.
const RESTUN_INTERVAL: Duration = Duration::from_secs(2);

pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) node_key: NodePublic,
    pub(super) disco_key: DiscoPublic,
    pub(super) rng: StdRng,
    /// Own endpoints, best first.
    pub(super) own: Vec<SocketAddr>,
    own_at: Option<Instant>,
    pub(super) admission: Admission,
    pub(super) counters: Counts<Drop>,
    pub(super) pings: Limit,
    pub(super) transmits: VecDeque<Transmit>,
    stories: VecDeque<Event>,
    /// What the driver must do; these are never lost.
    restun: Option<RestunReason>,
    restun_at: Option<Instant>,
    rebind: bool,
    rebind_at: Option<Instant>,
}

impl Shared {
    pub(super) fn new(
        now: Instant,
        config: Config,
        node_key: NodePublic,
        disco_key: DiscoPublic,
        rng: StdRng,
    ) -> Self {
        let admission = Admission {
            loopback: config.loopback,
            inner: BTreeSet::new(),
        };
        Self {
            config,
            node_key,
            disco_key,
            rng,
            own: Vec::new(),
            own_at: None,
            admission,
            counters: Counts::new(Drop::ALL),
            pings: Limit::new(now, NODE_PINGS_PER_S),
            transmits: VecDeque::new(),
            stories: VecDeque::new(),
            restun: None,
            restun_at: None,
            rebind: false,
            rebind_at: None,
        }
    }

    /// Takes a new set of own endpoints; returns whether it differs from the last, order ignored.
    pub(super) fn set_own(&mut self, now: Instant, mut endpoints: Vec<SocketAddr>) -> bool {
        let mut seen = BTreeSet::new();
        endpoints.retain(|addr| seen.insert(*addr));
        endpoints.truncate(super::OWN_ENDPOINTS_MAX);
        let before: BTreeSet<_> = self.own.iter().copied().collect();
        let after: BTreeSet<_> = endpoints.iter().copied().collect();
        self.own = endpoints;
        self.own_at = Some(now);
        before != after
    }

    /// Whether own endpoints should be looked up again before they are announced.
    pub(super) fn own_stale(&self, now: Instant) -> bool {
        self.own_at
            .is_none_or(|at| now.saturating_duration_since(at) > ENDPOINTS_FRESH_ENOUGH)
    }

    pub(super) fn transmit(&mut self, transmit: Transmit) {
        if self.transmits.len() >= TRANSMITS_MAX {
            self.counters.count(Drop::TransmitsFull);
            return;
        }
        self.transmits.push_back(transmit);
    }

    pub(super) fn event(&mut self, event: Event) {
        if self.stories.len() >= EVENTS_MAX {
            self.stories.pop_front();
            self.counters.count(Drop::EventsFull);
        }
        self.stories.push_back(event);
    }

    pub(super) fn tell(&mut self, peer: PeerId, what: Story) {
        self.event(Event::Story { peer, what });
    }

    pub(super) fn want_restun(&mut self, now: Instant, reason: RestunReason) {
        if reason == RestunReason::LinkChange || rested(now, self.restun_at, RESTUN_INTERVAL) {
            self.restun = Some(reason);
            self.restun_at = Some(now);
        }
    }

    pub(super) fn want_rebind(&mut self, now: Instant) {
        if rested(now, self.rebind_at, REBIND_INTERVAL) {
            self.rebind = true;
            self.rebind_at = Some(now);
        }
    }

    pub(super) fn poll_event(&mut self) -> Option<Event> {
        if let Some(reason) = self.restun.take() {
            return Some(Event::RestunWanted(reason));
        }
        if std::mem::take(&mut self.rebind) {
            return Some(Event::RebindWanted);
        }
        self.stories.pop_front()
    }
}
