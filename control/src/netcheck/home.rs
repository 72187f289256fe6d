//! Which relay is home (`protocol/netcheck.md` §6, without its forced region).
//!
//! The nearest by the best latency of the last five minutes wins, but against the present home only
//! if it is a third and ten milliseconds faster than that is now. A home that was heard lately is
//! not left because one check missed it.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use ringtail_dataplane::RegionId;

use super::HISTORY;

const GAIN_MIN: Duration = Duration::from_millis(10);
/// A frame so lately means that the home works.
const HEARD_WINDOW: Duration = Duration::from_secs(8);
/// The same where nothing at all could be measured.
const NO_DATA_WINDOW: Duration = Duration::from_secs(120);
/// A region whose relay could not be reached is not chosen for this long.
const DOWN_DURATION: Duration = Duration::from_secs(60);
/// Reports kept; checks are seconds apart.
const REPORTS_MAX: usize = 512;

type Latencies = BTreeMap<RegionId, Duration>;

/// The history that the choice looks back on.
#[derive(Clone, Debug, Default)]
pub(super) struct HomeChoice {
    reports: VecDeque<(Instant, Latencies)>,
    /// When a frame came from each region last.
    heard: BTreeMap<RegionId, Instant>,
    down: BTreeMap<RegionId, Instant>,
    pub(super) scores: BTreeMap<RegionId, f64>,
}

impl HomeChoice {
    /// A frame came from a relay of this region.
    pub(super) fn heard(&mut self, now: Instant, region: RegionId) {
        self.heard.insert(region, now);
        self.down.remove(&region);
    }

    /// The relays of this region cannot be reached: its past speaks for it no longer.
    pub(super) fn down(&mut self, now: Instant, region: RegionId) {
        self.heard.remove(&region);
        self.down.insert(region, now + DOWN_DURATION);
        for (_, latencies) in &mut self.reports {
            latencies.remove(&region);
        }
    }

    /// Forgets regions that the map no longer has.
    pub(super) fn retain(&mut self, known: impl Fn(RegionId) -> bool) {
        self.heard.retain(|region, _| known(*region));
        self.down.retain(|region, _| known(*region));
        for (_, latencies) in &mut self.reports {
            latencies.retain(|region, _| known(*region));
        }
    }

    /// Adds a report whose check began at `started` and gives the region it makes home, or `None` if
    /// it says nothing.
    pub(super) fn add(
        &mut self,
        now: Instant,
        started: Instant,
        latencies: &Latencies,
        previous: Option<RegionId>,
    ) -> Option<RegionId> {
        self.reports.push_back((now, latencies.clone()));
        self.choose(now, started, previous)
    }

    /// The home by the reports so far, the last of which counts as the present.
    pub(super) fn choose(
        &mut self,
        now: Instant,
        started: Instant,
        previous: Option<RegionId>,
    ) -> Option<RegionId> {
        let age = |at: Instant| now.saturating_duration_since(at);
        self.reports.retain(|(at, _)| age(*at) <= HISTORY);
        if self.reports.len() > REPORTS_MAX {
            self.reports.pop_front();
        }
        self.down.retain(|_, until| now < *until);
        let mut current = self
            .reports
            .back()
            .map(|(_, latest)| latest.clone())
            .unwrap_or_default();
        current.retain(|region, _| !self.down.contains_key(region));
        let heard_within = |region, window| {
            let at: Option<&Instant> = self.heard.get(&region);
            at.is_some_and(|at| *at > started || age(*at) <= window)
        };
        let best = |region: RegionId| {
            let past = self
                .reports
                .iter()
                .filter_map(|(_, latencies)| latencies.get(&region));
            past.min().map(|latency| self.scored(region, *latency))
        };
        let ranked = current
            .keys()
            .filter_map(|region| Some((best(*region)?, *region)));
        let pick = ranked.min();
        let Some((best_pick, pick)) = pick else {
            return previous.filter(|home| heard_within(*home, NO_DATA_WINDOW));
        };
        let Some(home) = previous.filter(|home| *home != pick) else {
            return Some(pick);
        };
        let now_home = current
            .get(&home)
            .map(|latency| self.scored(home, *latency));
        if now_home.is_some() || heard_within(home, HEARD_WINDOW) {
            let old = now_home.unwrap_or_default();
            let enough = old
                .checked_sub(best_pick)
                .is_some_and(|gain| gain >= GAIN_MIN);
            if !enough || best_pick > old / 3 * 2 {
                return Some(home);
            }
        }
        Some(pick)
    }

    fn scored(&self, region: RegionId, latency: Duration) -> Duration {
        let score = self
            .scores
            .get(&region)
            .copied()
            .filter(|score| *score > 0.0);
        score.map_or(latency, |score| {
            Duration::try_from_secs_f64(latency.as_secs_f64() * score).unwrap_or(Duration::MAX)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    fn report(entries: &[(u32, u64)]) -> Latencies {
        let entry = |(id, ms): &(u32, u64)| (RegionId(*id), Duration::from_millis(*ms));
        entries.iter().map(entry).collect()
    }

    /// Reports at their seconds, and frames heard at theirs; gives the last choice, 0 for none.
    fn run(choice: &mut HomeChoice, steps: &[(u64, &[(u32, u64)])], heard: &[(u32, u64)]) -> u32 {
        let begin = start();
        let at = |s: u64| begin + Duration::from_secs(s);
        let mut home = None;
        let mut heard = heard.to_vec();
        for (seconds, entries) in steps {
            heard.retain(|(region, s)| {
                if s <= seconds {
                    choice.heard(at(*s), RegionId(*region));
                }
                s > seconds
            });
            home = choice.add(at(*seconds), at(*seconds), &report(entries), home);
        }
        home.map_or(0, |region| region.0)
    }

    #[test]
    fn the_table_of_the_page() {
        type Row<'a> = (
            &'a str,
            &'a [(u64, &'a [(u32, u64)])],
            &'a [(u32, u64)],
            u32,
        );
        let rows: &[Row<'_>] = &[
            ("first", &[(0, &[(1, 20), (2, 25)])], &[], 1),
            (
                "gain 8",
                &[(0, &[(1, 20), (2, 25)]), (25, &[(1, 20), (2, 12)])],
                &[],
                1,
            ),
            (
                "28 > 26.67",
                &[(0, &[(1, 40), (2, 50)]), (25, &[(1, 40), (2, 28)])],
                &[],
                1,
            ),
            (
                "26",
                &[(0, &[(1, 40), (2, 50)]), (25, &[(1, 40), (2, 26)])],
                &[],
                2,
            ),
            (
                "best of 1 is still 20",
                &[(0, &[(1, 20), (2, 25)]), (30, &[(1, 90), (2, 25)])],
                &[],
                1,
            ),
            (
                "306 s later",
                &[(0, &[(1, 20), (2, 25)]), (306, &[(1, 90), (2, 25)])],
                &[],
                2,
            ),
            (
                "1 missing",
                &[(0, &[(1, 20), (2, 25)]), (25, &[(2, 25)])],
                &[],
                2,
            ),
            (
                "1 missing but heard 5 s ago",
                &[(0, &[(1, 20), (2, 25)]), (25, &[(2, 25)])],
                &[(1, 20)],
                1,
            ),
            (
                "nothing at 30 s, heard at 10 s",
                &[(0, &[(1, 20), (2, 25)]), (30, &[])],
                &[(1, 10)],
                1,
            ),
            (
                "nothing at 200 s, heard at 10 s",
                &[(0, &[(1, 20), (2, 25)]), (200, &[])],
                &[(1, 10)],
                0,
            ),
        ];
        for (name, steps, heard, wanted) in rows {
            let home = run(&mut HomeChoice::default(), steps, heard);
            assert_eq!(home, *wanted, "{name}");
        }
    }

    #[test]
    fn scores_multiply_latencies_and_silly_ones_are_ignored() {
        let mut choice = HomeChoice {
            scores: [(RegionId(1), 0.5), (RegionId(2), 0.0), (RegionId(3), -1.0)].into(),
            ..HomeChoice::default()
        };
        let home = run(&mut choice, &[(0, &[(1, 30), (2, 24), (3, 16)])], &[]);
        assert_eq!(home, 1);
    }

    #[test]
    fn a_region_that_is_down_is_left_at_once_and_for_a_while() {
        let mut choice = HomeChoice::default();
        let (begin, one) = (start(), Some(RegionId(1)));
        let both = report(&[(1, 10), (2, 40)]);
        choice.heard(begin, RegionId(1));
        assert_eq!(choice.add(begin, begin, &both, None), one);
        choice.down(begin, RegionId(1));
        assert_eq!(choice.choose(begin, begin, one), Some(RegionId(2)));
        let soon = begin + Duration::from_secs(30);
        assert_eq!(
            choice.add(soon, soon, &both, Some(RegionId(2))),
            Some(RegionId(2))
        );
        let later = begin + Duration::from_secs(61);
        assert_eq!(choice.add(later, later, &both, Some(RegionId(2))), one);
    }
}
