//! Where a peer is found: at its home, or where it was heard.
//!
//! A relay passes on to those who are connected to it. A peer is connected to its home, and for a
//! while to the homes of those it sends to, ours among them. What we know of its home may be old: it
//! has moved, its relay has died, or it has lost its memory, with no coordination to tell us. So:
//!
//! * no connection of ours to its home, but one to where it was heard: that one;
//! * it was heard at its home too, or nowhere else: its home;
//! * the relay there has said that it is not: where it was heard;
//! * neither yet: both, for five seconds at most, which is many times what an answer takes;
//! * the relay at its home has said that it is not there, it was heard nowhere, and nobody can tell us
//!   where it went: its home and one other region after the other, for a while.
//!
//! Who asks for a session with a peer that is not there yet, or is searched, would ask again only
//! after five seconds, so the last initiation is kept, and goes out again a few times.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ringtail_dataplane::{PEERS_MAX, RegionId};

use crate::key::NodePublic;

/// Peers remembered.
pub const ROUTES_MAX: usize = PEERS_MAX;
/// Packets go both ways for so long at most.
const DOUBT_LIMIT: Duration = Duration::from_secs(5);
/// What a relay said of a peer's absence is asked again after this.
const ABSENT_FOR: Duration = Duration::from_secs(60);

/// A region is tried for so long in a search, and a search takes so long.
const SEARCH_STEP: Duration = Duration::from_secs(3);
const SEARCH_LIMIT: Duration = Duration::from_secs(15);
/// A handshake initiation: its length in bytes, and its first byte.
const INITIATION_LEN: usize = 148;
const INITIATION_TYPE: u8 = 1;
/// Pauses before an initiation goes out again, from the word that the peer is not there.
const AGAIN_AFTER: [Duration; 3] = [
    Duration::from_millis(300),
    Duration::from_millis(600),
    Duration::from_millis(1200),
];

/// An initiation that nothing was heard after.
#[derive(Clone, Debug)]
struct Unheard {
    packet: Box<[u8]>,
    /// The peer's home as far as we know.
    home: RegionId,
    /// How often it has been sent again.
    again: usize,
    /// It is to be sent again.
    due: bool,
}

/// What is known of one peer.
#[derive(Clone, Debug, Default)]
struct Seen {
    /// Where it was heard last, and where before that.
    heard: Option<RegionId>,
    before: Option<RegionId>,
    /// The relay there said that it is not.
    absent: Option<(RegionId, Instant)>,
    /// Its home that is in doubt, since when.
    doubt: Option<(RegionId, Instant)>,
    unheard: Option<Unheard>,
}

/// What is known of all peers, as long as the connections stand.
#[derive(Clone, Debug, Default)]
pub struct Routes(BTreeMap<NodePublic, Seen>);

impl Routes {
    /// A packet of the peer came from a relay of this region; `false` if there is no room to
    /// remember it.
    pub fn heard(&mut self, peer: NodePublic, region: RegionId) -> bool {
        let Some(seen) = self.entry(peer) else {
            return false;
        };
        seen.unheard = None;
        if seen.heard != Some(region) {
            (seen.heard, seen.before) = (Some(region), seen.heard);
        }
        seen.absent = seen.absent.filter(|(absent, _)| *absent != region);
        true
    }

    fn entry(&mut self, peer: NodePublic) -> Option<&mut Seen> {
        if self.0.len() >= ROUTES_MAX && !self.0.contains_key(&peer) {
            self.0.retain(|_, seen| seen.heard.is_some());
            if self.0.len() >= ROUTES_MAX {
                return None;
            }
        }
        Some(self.0.entry(peer).or_default())
    }

    /// A packet goes to a peer whose home is `home` as far as we know. An initiation is kept until
    /// the peer is heard.
    pub fn sent(&mut self, peer: &NodePublic, home: RegionId, packet: &[u8]) {
        if packet.len() == INITIATION_LEN
            && packet.first() == Some(&INITIATION_TYPE)
            && let Some(seen) = self.entry(*peer)
        {
            seen.unheard = Some(Unheard {
                packet: packet.into(),
                home,
                again: 0,
                due: false,
            });
        }
    }

    /// A relay of this region says that the peer is not there. Gives the pause before
    /// [`Self::take_again`] is wanted.
    pub fn gone(&mut self, now: Instant, peer: &NodePublic, region: RegionId) -> Option<Duration> {
        let seen = self.0.get_mut(peer)?;
        seen.leave(region);
        // A search counts from the first time.
        let known = seen.absent.filter(|(absent, at)| {
            *absent == region && now.saturating_duration_since(*at) < ABSENT_FOR
        });
        seen.absent = known.or(Some((region, now)));
        let unheard = seen.unheard.as_mut()?;
        let pause = *AGAIN_AFTER.get(unheard.again)?;
        if unheard.due {
            return None;
        }
        unheard.again += 1;
        unheard.due = true;
        Some(pause)
    }

    /// The initiation that is to be sent again now, unless the peer was heard since, and the peer's
    /// home.
    pub fn take_again(&mut self, peer: &NodePublic) -> Option<(RegionId, Box<[u8]>)> {
        let unheard = self.0.get_mut(peer)?.unheard.as_mut()?;
        std::mem::take(&mut unheard.due).then(|| (unheard.home, unheard.packet.clone()))
    }

    /// The connection to this region is lost.
    pub fn lost(&mut self, region: RegionId) {
        for seen in self.0.values_mut() {
            seen.leave(region);
        }
        self.0
            .retain(|_, seen| seen.heard.is_some() || seen.unheard.is_some());
    }

    /// Where a peer was heard last.
    #[cfg(test)]
    pub(crate) fn last(&self, peer: &NodePublic) -> Option<RegionId> {
        self.0.get(peer)?.heard
    }

    /// How many are remembered.
    pub fn count(&self) -> usize {
        self.0.values().filter(|seen| seen.heard.is_some()).count()
    }

    /// The regions that a packet for a peer goes to, whose home is `home` as far as we know. `ready`
    /// says which regions we are connected to; `regions` are those to search for it, none if
    /// somebody would tell us where it is.
    pub fn ways(
        &mut self,
        now: Instant,
        peer: &NodePublic,
        home: RegionId,
        ready: impl Fn(RegionId) -> bool,
        regions: impl Iterator<Item = RegionId>,
    ) -> [Option<RegionId>; 2] {
        let at_home = [Some(home), None];
        let Some(seen) = self.0.get_mut(peer) else {
            return at_home;
        };
        let elsewhere = |at: &RegionId| *at != home && ready(*at);
        let Some(route) = seen.heard.filter(elsewhere) else {
            return [Some(home), seen.search(now, home, regions)];
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
    /// The region to try now besides the peer's home.
    fn search(
        &self,
        now: Instant,
        home: RegionId,
        regions: impl Iterator<Item = RegionId>,
    ) -> Option<RegionId> {
        let (_, since) = self.absent.filter(|(absent, _)| *absent == home)?;
        let took = now.saturating_duration_since(since);
        if took >= SEARCH_LIMIT {
            return None;
        }
        let step = usize::try_from(took.as_millis() / SEARCH_STEP.as_millis()).ok()?;
        let mut others: Vec<RegionId> = regions.filter(|region| *region != home).collect();
        let before = others.iter().filter(|region| **region < home).count();
        others.sort_unstable();
        others.rotate_left(before);
        others.get(step.checked_rem(others.len())?).copied()
    }

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
    use crate::testing::start;

    const HOME: RegionId = RegionId(3);
    const OURS: RegionId = RegionId(1);
    const BOTH: [Option<RegionId>; 2] = [Some(HOME), Some(OURS)];
    const AT_HOME: [Option<RegionId>; 2] = [Some(HOME), None];
    const ELSEWHERE: [Option<RegionId>; 2] = [Some(OURS), None];

    fn peer() -> NodePublic {
        NodePrivate::clamped([1; 32]).public()
    }

    fn ways(routes: &mut Routes, ms: u64, now: Instant) -> [Option<RegionId>; 2] {
        let at = now + Duration::from_millis(ms);
        routes.ways(at, &peer(), HOME, |_| true, std::iter::empty())
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
        assert_eq!(
            routes.ways(now, &peer(), HOME, not_home, std::iter::empty()),
            ELSEWHERE
        );
        assert_eq!(
            routes.ways(now, &peer(), HOME, |_| false, std::iter::empty()),
            AT_HOME
        );
        routes.lost(OURS);
        assert_eq!((routes.last(&peer()), routes.count()), (None, 0));
        assert_eq!(
            routes.ways(now, &peer(), HOME, not_home, std::iter::empty()),
            AT_HOME
        );
    }

    #[test]
    fn a_peer_that_is_not_at_home_and_was_heard_nowhere_is_searched_for_a_while() {
        let (now, mut routes) = (start(), Routes::default());
        let ways = |routes: &mut Routes, ms| {
            let at = now + Duration::from_millis(ms);
            let regions = [1, 2, 3, 4].map(RegionId).into_iter();
            routes.ways(at, &peer(), HOME, |_| true, regions)
        };
        routes.sent(&peer(), HOME, &[1; INITIATION_LEN]);
        assert_eq!(ways(&mut routes, 0), AT_HOME);
        routes.gone(now, &peer(), HOME);
        for (ms, region) in [(0, 4), (2999, 4), (3000, 1), (6000, 2), (9000, 4)] {
            assert_eq!(ways(&mut routes, ms), [Some(HOME), Some(RegionId(region))]);
        }
        routes.gone(now + Duration::from_secs(14), &peer(), HOME);
        assert_eq!(ways(&mut routes, 15_000), AT_HOME, "not for ever");
        routes.heard(peer(), RegionId(4));
        assert_eq!(ways(&mut routes, 16_000), [Some(RegionId(4)), None]);
    }

    #[test]
    fn an_initiation_to_a_peer_that_is_not_there_goes_out_again_a_few_times() {
        let (now, mut routes) = (start(), Routes::default());
        routes.sent(&peer(), HOME, &[4; INITIATION_LEN]);
        assert_eq!(routes.gone(now, &peer(), HOME), None, "data");
        let packet = [1; INITIATION_LEN];
        routes.sent(&peer(), HOME, &packet);
        assert_eq!(routes.take_again(&peer()), None, "nobody said anything");
        for pause in AGAIN_AFTER {
            assert_eq!(routes.gone(now, &peer(), HOME), Some(pause));
            assert_eq!(routes.gone(now, &peer(), OURS), None, "once at a time");
            let again = routes.take_again(&peer());
            assert_eq!(again, Some((HOME, packet.into())));
        }
        assert_eq!(routes.gone(now, &peer(), HOME), None);
        routes.sent(&peer(), HOME, &packet);
        assert!(routes.gone(now, &peer(), HOME).is_some());
        routes.heard(peer(), OURS);
        assert_eq!(routes.take_again(&peer()), None, "it was heard");
    }
}
