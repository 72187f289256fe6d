//! When a node has the whole map said anew, since the server does not tell it what became of its own routes.
//!
//! Headscale v0.29.2 tells all nodes of an approval, or of another router of a prefix, by the rules and peers that follow
//! from it (`PolicyChange` in hscontrol/types/change), and a node nothing of itself. What a new stream begins with says
//! it, so such a message is a hint to ask for one beside the other, which goes on until then: no probe is missed. A new
//! stream of a router has Headscale send the same to all, its own echo included, behind the news that somebody came
//! online: that is no hint, lest two routers ask in turns for ever. Nor does a router ask that cannot reach what it
//! offers: Headscale takes a new stream for a sign of health.
//!
//! Ours, and Tailscale's service, tell a node of itself.

use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::SelfState;
use crate::netmap::MapState;
use crate::netmap::wire::MapResponse;

/// A hint is followed so much later, for several come together.
const DELAY: Duration = Duration::from_millis(100);
/// Between two of what is asked at least; twice as long after each.
const WAIT_MIN: Duration = Duration::from_secs(3);
/// And at most: after twice as long without asking it is short again.
const WAIT_MAX: Duration = Duration::from_secs(120);
/// Between two of what is asked where traffic waits.
const URGENT_WAIT: Duration = Duration::from_secs(1);
/// What comes so soon after we asked, or after somebody came online, follows from that. Headscale gathers changes
/// for 0.8 s.
const ECHO: Duration = Duration::from_secs(2);
/// News may hide in an echo: it is asked for then, after each time that was not for this, and where an approval is
/// awaited.
const AFTER_ECHO: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Afresh {
    due: Option<Instant>,
    asked: Option<Instant>,
    wait: Duration,
    echo_until: Option<Instant>,
    /// What is due is not just to look behind an echo.
    news: bool,
}

/// The prefixes that are for the server to approve of a node for which its word counts: one that lets others out to the
/// Internet, and can reach what it offers besides.
fn offered(state: &SelfState) -> impl Iterator<Item = &IpNet> {
    let exit = state.routes.iter().any(|net| net.prefix_len() == 0);
    let counts = exit && !state.routes_lost;
    let nets = state.routes.iter().filter(|net| net.prefix_len() > 0);
    nets.filter(move |_| counts)
}

/// Those of a node's offers that others have as their routers, by the map.
pub fn served(map: &MapState, state: &SelfState) -> Vec<IpNet> {
    let theirs = |net: &&IpNet| map.has_router(net);
    offered(state).filter(theirs).copied().collect()
}

impl Afresh {
    /// The node offers something else: what the map says of it may be older than that.
    pub fn handle_offers(&mut self, now: Instant, state: &SelfState) {
        if offered(state).next().is_some() {
            self.news = true;
            self.ask_at(self.earliest(now));
        } else {
            (self.due, self.news) = (None, false);
        }
    }

    /// Takes a message before it is applied; `map` is that of the stream.
    pub fn handle_message(
        &mut self,
        now: Instant,
        message: &MapResponse,
        map: &MapState,
        state: &SelfState,
    ) {
        let patches = message.peers_changed_patch.iter().flatten();
        let mut patched = patches.map(|change| change.online);
        let mut changed = message.online_change.iter().flatten();
        if patched.any(|online| online == Some(true)) || changed.any(|(_, online)| *online) {
            self.echo_until = self.echo_until.max(Some(now + ECHO));
        }
        if message.node.is_some() {
            return;
        }
        let rules = message.packet_filter.is_some() || message.packet_filters.is_some();
        if !rules || offered(state).next().is_none() {
            return;
        }
        if self.echo_until.is_none_or(|until| until <= now) {
            self.news = true;
            self.ask_at(self.earliest(now));
        } else if offered(state).any(|net| !map.is_ours(net)) {
            self.ask_at(self.earliest(now + AFTER_ECHO));
        }
    }

    /// Others have become the routers of something that we offer, or are it no more: it may be ours now, and traffic for
    /// it is on its way.
    pub fn handle_served(&mut self, now: Instant) {
        let again = self.asked.map_or(now, |asked| asked + URGENT_WAIT);
        (self.due, self.news) = (Some(again.max(now)), true);
    }

    /// Whether to ask now; saying yes counts as having asked.
    pub fn poll_ask(&mut self, now: Instant) -> bool {
        if self.due.is_none_or(|due| now < due) {
            return false;
        }
        let long_ago = self.asked.is_none_or(|asked| now >= asked + 2 * WAIT_MAX);
        self.wait = if long_ago {
            WAIT_MIN
        } else {
            (self.wait * 2).clamp(WAIT_MIN, WAIT_MAX)
        };
        self.asked = Some(now);
        let behind = self.earliest(now + AFTER_ECHO);
        self.due = std::mem::take(&mut self.news).then_some(behind);
        self.echo_until = self.echo_until.max(Some(now + ECHO));
        true
    }

    /// When [`Self::poll_ask`] says yes next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.due
    }

    fn earliest(&self, now: Instant) -> Instant {
        let again = self.asked.map(|asked| asked + self.wait);
        again.map_or(now + DELAY, |again| again.max(now + DELAY))
    }

    fn ask_at(&mut self, at: Instant) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;
    use crate::key::NodePublic;
    use crate::netmap::wire::{Node, PeerChange};

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn offers(routes: &[&str]) -> SelfState {
        SelfState {
            routes: nets(routes),
            ..SelfState::default()
        }
    }

    /// The map of a node that these prefixes are approved for.
    fn map(approved: &[&str]) -> MapState {
        let key = NodePublic([1; 32]);
        let mut map = MapState::new(key);
        let node = Node {
            id: 1,
            key,
            allowed_ips: Some(nets(approved)),
            ..Node::default()
        };
        let first = MapResponse {
            node: Some(Arc::new(node)),
            ..MapResponse::default()
        };
        map.handle_response(time::macros::datetime!(2026-11-22 05:00 UTC), first)
            .unwrap();
        map
    }

    fn policy() -> MapResponse {
        MapResponse {
            packet_filters: Some(BTreeMap::new()),
            ..MapResponse::default()
        }
    }

    fn online() -> MapResponse {
        MapResponse {
            peers_changed_patch: Some(vec![PeerChange {
                node_id: 2,
                online: Some(true),
                ..PeerChange::default()
            }]),
            ..MapResponse::default()
        }
    }

    const LAN: [&str; 3] = ["0.0.0.0/0", "::/0", "192.168.8.0/24"];

    #[test]
    fn an_exit_node_with_subnets_asks_when_the_rules_are_sent_without_it() {
        let t0 = crate::testing::start();
        let s = |s| t0 + Duration::from_secs(s);
        let lost = SelfState {
            routes_lost: true,
            ..offers(&LAN)
        };
        for (state, asks) in [
            (offers(&LAN), true),
            (offers(&LAN[..2]), false),
            (offers(&LAN[2..]), false),
            (lost, false),
        ] {
            let mut afresh = Afresh::default();
            afresh.handle_message(t0, &online(), &map(&[]), &state);
            assert_eq!(afresh.poll_timeout(), None);
            afresh.handle_message(s(5), &policy(), &map(&[]), &state);
            assert_eq!(afresh.poll_ask(s(6)), asks, "{state:?}");
            assert_eq!(afresh.poll_ask(s(17)), asks, "once more, and no more");
            assert_eq!(afresh.poll_timeout(), None);
        }
        let own = MapResponse {
            node: Some(Arc::default()),
            ..policy()
        };
        let mut afresh = Afresh::default();
        afresh.handle_message(t0, &own, &map(&[]), &offers(&LAN));
        assert_eq!(afresh.poll_timeout(), None, "it was told of itself");
        afresh.handle_offers(t0, &offers(&LAN));
        assert!(afresh.poll_ask(t0 + DELAY));
    }

    #[test]
    fn what_follows_from_asking_is_no_reason_to_ask() {
        let t0 = crate::testing::start();
        let s = |s| t0 + Duration::from_secs(s);
        let state = offers(&LAN);
        let mut afresh = Afresh::default();
        afresh.handle_message(t0, &policy(), &map(&LAN), &state);
        assert!(afresh.poll_ask(s(1)));
        // The own echo, then that of another router that asks.
        afresh.handle_message(s(2), &policy(), &map(&LAN), &state);
        assert!(!afresh.poll_ask(s(11)) && afresh.poll_ask(s(12)));
        afresh.handle_message(s(13), &policy(), &map(&LAN), &state);
        assert_eq!(afresh.poll_timeout(), None);
        afresh.handle_message(s(60), &online(), &map(&LAN), &state);
        afresh.handle_message(s(61), &policy(), &map(&LAN), &state);
        assert_eq!(afresh.poll_timeout(), None);
        // Unless something is awaited, which may be in it.
        afresh.handle_message(s(61), &policy(), &map(&LAN[..2]), &state);
        assert_eq!(afresh.poll_timeout(), Some(s(71) + DELAY));
    }

    #[test]
    fn it_asks_ever_more_seldom_but_at_once_when_another_router_is_gone() {
        let t0 = crate::testing::start();
        let state = offers(&LAN);
        let mut afresh = Afresh::default();
        let mut now = t0;
        let mut asked = Vec::new();
        while asked.len() < 8 {
            afresh.handle_message(now, &policy(), &map(&[]), &state);
            if afresh.poll_ask(now) {
                asked.push(now);
            }
            now += Duration::from_millis(100);
        }
        let waits = asked.windows(2).map(|pair| (pair[1] - pair[0]).as_secs());
        assert_eq!(waits.collect::<Vec<_>>(), [3, 6, 12, 24, 48, 96, 120]);
        afresh.handle_served(now);
        assert!(afresh.poll_ask(now + URGENT_WAIT));
        now += 2 * WAIT_MAX;
        assert!(afresh.poll_ask(now));
        now += 2 * WAIT_MAX;
        afresh.handle_message(now, &policy(), &map(&[]), &state);
        assert_eq!(afresh.poll_timeout(), Some(now + DELAY), "long ago");
    }
}
