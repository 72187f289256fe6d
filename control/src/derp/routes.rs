//! Where a peer is found: at its home, or where it was heard.
//!
//! A relay passes on to those who are connected to it. A peer is connected to its home, and for a
//! while to the homes of those it sends to, ours among them. What we know of its home may be old: it
//! has moved, its relay has died, or it has lost its memory, with no coordination to tell us. So:
//!
//! * no connection of ours to its home, but one to where it was heard: that one;
//! * it was heard at its home too, or nowhere else: its home;
//! * the relay there has said that it is not: where it was heard;
//! * neither yet: both, for five seconds at most, which is many times what an answer takes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ringtail_dataplane::channel::{PEERS_MAX, RegionId};

use crate::key::NodePublic;

/// Peers remembered.
pub const ROUTES_MAX: usize = PEERS_MAX;
/// Packets go both ways for so long at most.
const DOUBT_LIMIT: Duration = Duration::from_secs(5);
/// What a relay said of a peer's absence is asked again after this.
const ABSENT_FOR: Duration = Duration::from_secs(60);

/// What is known of one peer.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Where it was heard last, and where before that.
    heard: Option<RegionId>,
    before: Option<RegionId>,
    /// The relay there said that it is not.
    absent: Option<(RegionId, Instant)>,
    /// Its home that is in doubt, since when.
    doubt: Option<(RegionId, Instant)>,
}

/// What is known of all peers, as long as the connections stand.
#[derive(Clone, Debug, Default)]
pub struct Routes(BTreeMap<NodePublic, Seen>);

impl Routes {
    /// A packet of the peer came from a relay of this region; `false` if there is no room to
    /// remember it.
    pub fn heard(&mut self, peer: NodePublic, region: RegionId) -> bool {
        if self.0.len() >= ROUTES_MAX && !self.0.contains_key(&peer) {
            return false;
        }
        let seen = self.0.entry(peer).or_default();
        if seen.heard != Some(region) {
            (seen.heard, seen.before) = (Some(region), seen.heard);
        }
        seen.absent = seen.absent.filter(|(absent, _)| *absent != region);
        true
    }

    /// A relay of this region says that the peer is not there.
    pub fn gone(&mut self, now: Instant, peer: &NodePublic, region: RegionId) {
        if let Some(seen) = self.0.get_mut(peer) {
            seen.leave(region);
            seen.absent = Some((region, now));
        }
    }

    /// The connection to this region is lost.
    pub fn lost(&mut self, region: RegionId) {
        for seen in self.0.values_mut() {
            seen.leave(region);
        }
        self.0.retain(|_, seen| seen.heard.is_some());
    }

    /// Where a peer was heard last.
    pub fn last(&self, peer: &NodePublic) -> Option<RegionId> {
        self.0.get(peer)?.heard
    }

    /// How many are remembered.
    pub fn len(&self) -> usize {
        self.0.values().filter(|seen| seen.heard.is_some()).count()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The regions that a packet for a peer goes to, whose home is `home` as far as we know. `ready`
    /// says which regions we are connected to.
    pub fn ways(
        &mut self,
        now: Instant,
        peer: &NodePublic,
        home: RegionId,
        ready: impl Fn(RegionId) -> bool,
    ) -> [Option<RegionId>; 2] {
        let at_home = [Some(home), None];
        let Some(seen) = self.0.get_mut(peer) else {
            return at_home;
        };
        let elsewhere = |at: &RegionId| *at != home && ready(*at);
        let Some(route) = seen.heard.filter(elsewhere) else {
            return at_home;
        };
        if !ready(home) {
            return [Some(route), None];
        }
        if seen.before == Some(home) {
            seen.doubt = None;
            return at_home;
        }
        let over = |at: Instant, limit| now.saturating_duration_since(at) >= limit;
        if let Some((absent, at)) = seen.absent.filter(|(absent, _)| *absent == home) {
            if !over(at, ABSENT_FOR) {
                return [Some(route), None];
            }
            debug_assert_eq!(absent, home);
            (seen.absent, seen.doubt) = (None, None);
        }
        match seen.doubt.filter(|(doubted, _)| *doubted == home) {
            Some((_, since)) if over(since, DOUBT_LIMIT) => at_home,
            Some(_) => [Some(home), Some(route)],
            None => {
                seen.doubt = Some((home, now));
                [Some(home), Some(route)]
            }
        }
    }
}

impl Seen {
    fn leave(&mut self, region: RegionId) {
        if self.heard == Some(region) {
            self.heard = self.before.take();
        } else if self.before == Some(region) {
            self.before = None;
        }
        self.doubt = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::NodePrivate;
    use crate::path::test_clock::start;

    const HOME: RegionId = RegionId(3);
    const OURS: RegionId = RegionId(1);
    const BOTH: [Option<RegionId>; 2] = [Some(HOME), Some(OURS)];
    const AT_HOME: [Option<RegionId>; 2] = [Some(HOME), None];
    const ELSEWHERE: [Option<RegionId>; 2] = [Some(OURS), None];

    fn peer() -> NodePublic {
        NodePrivate::from_random([1; 32]).public()
    }

    fn ways(routes: &mut Routes, ms: u64, now: Instant) -> [Option<RegionId>; 2] {
        routes.ways(now + Duration::from_millis(ms), &peer(), HOME, |_| true)
    }

    #[test]
    fn a_peer_that_answers_at_home_is_sent_to_there_alone() {
        let (now, mut routes) = (start(), Routes::default());
        assert_eq!(ways(&mut routes, 0, now), AT_HOME);
        routes.heard(peer(), OURS);
        assert_eq!(ways(&mut routes, 1, now), BOTH);
        routes.heard(peer(), HOME);
        assert_eq!(ways(&mut routes, 2, now), AT_HOME);
        // Its data comes by our home, as everybody's does.
        routes.heard(peer(), OURS);
        assert_eq!(ways(&mut routes, 90_000, now), AT_HOME);
    }

    #[test]
    fn a_peer_that_is_not_at_home_is_sent_to_where_it_was_heard() {
        let (now, mut routes) = (start(), Routes::default());
        routes.heard(peer(), OURS);
        assert_eq!(ways(&mut routes, 0, now), BOTH);
        routes.gone(now, &peer(), HOME);
        assert_eq!(ways(&mut routes, 1, now), ELSEWHERE);
        // Asked again after a minute, with nothing lost meanwhile.
        assert_eq!(ways(&mut routes, 60_000, now), BOTH);
        routes.gone(now + Duration::from_secs(60), &peer(), HOME);
        assert_eq!(ways(&mut routes, 60_100, now), ELSEWHERE);
        // It leaves that relay: what is left is its home.
        routes.gone(now + Duration::from_secs(61), &peer(), OURS);
        assert_eq!(ways(&mut routes, 61_000, now), AT_HOME);
    }

    #[test]
    fn both_ways_end_with_a_lost_connection_and_after_five_seconds() {
        let (now, mut routes) = (start(), Routes::default());
        routes.heard(peer(), OURS);
        assert_eq!(ways(&mut routes, 0, now), BOTH);
        assert_eq!(ways(&mut routes, 4999, now), BOTH);
        assert_eq!(ways(&mut routes, 5000, now), AT_HOME);
        let not_home = |region| region != HOME;
        assert_eq!(routes.ways(now, &peer(), HOME, not_home), ELSEWHERE);
        assert_eq!(routes.ways(now, &peer(), HOME, |_| false), AT_HOME);
        routes.lost(OURS);
        assert_eq!((routes.last(&peer()), routes.len()), (None, 0));
        assert_eq!(routes.ways(now, &peer(), HOME, not_home), AT_HOME);
    }
}
