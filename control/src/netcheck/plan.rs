//! Which probe leaves when (`protocol/netcheck.md` §4).

use std::collections::BTreeMap;
use std::time::Duration;

use ringtail_dataplane::RegionId;

use crate::netmap::{DerpMap, DerpNode, DerpRegion, Family};

/// Regions that an incremental check measures besides the home.
const INCREMENTAL_REGIONS: usize = 3;
const FULL_TRIES: u32 = 3;
const FULL_RETRANSMIT: Duration = Duration::from_millis(100);
const UNKNOWN_RETRANSMIT: Duration = Duration::from_millis(200);
const HOME_TRIES: u32 = 4;
const LATE_TRY_EXTRA: Duration = Duration::from_millis(50);

/// The probes of one region and family. The first answer ends the set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ProbeSet {
    pub(super) region: RegionId,
    pub(super) v6: bool,
    /// When each try leaves, from the start of the check.
    pub(super) delays: Vec<Duration>,
}

/// What the plan depends on besides the map.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    /// An interface has a usable address of the family.
    pub(super) have4: bool,
    pub(super) have6: bool,
    pub(super) home: Option<RegionId>,
    /// Latencies of the last report.
    pub(super) latency: BTreeMap<RegionId, Duration>,
    /// The last report had any latency of the family.
    pub(super) had4: bool,
    pub(super) had6: bool,
}

/// Every region, three tries per family.
pub(super) fn full(map: &DerpMap, known: &Known) -> Vec<ProbeSet> {
    let delays: Vec<Duration> = (0..FULL_TRIES).map(|n| FULL_RETRANSMIT * n).collect();
    let mut sets = Vec::new();
    for (id, region) in measurable(map) {
        for v6 in [false, true] {
            let have = if v6 { known.have6 } else { known.have4 };
            if have && may_have(region, v6) {
                let (region, delays) = (id, delays.clone());
                sets.push(ProbeSet { region, v6, delays });
            }
        }
    }
    sets
}

/// The nearest three regions and the home.
pub(super) fn incremental(map: &DerpMap, known: &Known) -> Vec<ProbeSet> {
    let mut regions: Vec<(RegionId, &DerpRegion)> = measurable(map)
        .filter(|(id, region)| !region.avoid || known.home == Some(*id))
        .collect();
    let latency = |id: &RegionId| known.latency.get(id).copied();
    regions.sort_by_key(|(id, _)| (latency(id).is_none(), latency(id)));
    let far = regions.split_off(regions.len().min(INCREMENTAL_REGIONS));
    regions.extend(far.into_iter().filter(|(id, _)| known.home == Some(*id)));

    let both = known.have6 && known.had4 && known.had6;
    let mut sets = Vec::new();
    for (index, (id, region)) in regions.into_iter().enumerate() {
        let home = known.home == Some(id);
        let near = index < 2 || home;
        let (mut do4, mut do6) = (known.have4, known.have6);
        if !near && both {
            (do4, do6) = (index % 2 == 0, index % 2 == 1);
        }
        if !near && !known.had6 {
            do6 = false;
        }
        let tries = match (home, near) {
            (true, _) => HOME_TRIES,
            (false, true) => 2,
            (false, false) => 1,
        };
        let step = latency(&id).map_or(UNKNOWN_RETRANSMIT, |latency| latency * 6 / 5);
        let delay = |n: u32| step * n + LATE_TRY_EXTRA * if n > 1 { n } else { 0 };
        for v6 in [false, true] {
            let wanted = if v6 { do6 } else { do4 };
            if !wanted || !may_have(region, v6) {
                continue;
            }
            let tries = if v6 && !known.had6 { 1 } else { tries };
            sets.push(ProbeSet {
                region: id,
                v6,
                delays: (0..tries).map(delay).collect(),
            });
        }
    }
    sets
}

/// The regions that may be measured at all.
fn measurable(map: &DerpMap) -> impl Iterator<Item = (RegionId, &DerpRegion)> {
    let usable = map
        .regions
        .iter()
        .filter(|(_, region)| !region.no_measure_no_home && !region.nodes.is_empty());
    usable.map(|(id, region)| (RegionId(*id), region))
}

fn may_have(region: &DerpRegion, v6: bool) -> bool {
    region.nodes.iter().any(|node| node_may_have(node, v6))
}

fn node_may_have(node: &DerpNode, v6: bool) -> bool {
    let off = if v6 {
        node.v6() == Family::Off
    } else {
        node.v4() == Family::Off
    };
    node.stun_port().is_some() && (!off || !node.stun_test_ip.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relays of both families.
    fn map(regions: u32) -> DerpMap {
        let mut map = DerpMap::of_regions(regions);
        for node in map
            .regions
            .values_mut()
            .flat_map(|region| &mut region.nodes)
        {
            node.ipv6.clear();
        }
        map
    }

    fn known(latencies: &[u64]) -> Known {
        let ids = (1..).map(RegionId);
        let times = latencies.iter().map(|ms| Duration::from_millis(*ms));
        Known {
            have4: true,
            have6: true,
            home: Some(RegionId(1)),
            latency: ids.zip(times).collect(),
            had4: true,
            had6: true,
        }
    }

    fn rows(sets: &[ProbeSet]) -> Vec<(u32, char, Vec<u128>)> {
        let row = |set: &ProbeSet| {
            let delays = set.delays.iter().map(Duration::as_millis).collect();
            (set.region.0, if set.v6 { '6' } else { '4' }, delays)
        };
        sets.iter().map(row).collect()
    }

    #[test]
    fn the_incremental_example_of_the_page() {
        let sets = incremental(&map(4), &known(&[10, 20, 30, 40]));
        let wanted = [
            (1, '4', vec![0, 12, 124, 186]),
            (1, '6', vec![0, 12, 124, 186]),
            (2, '4', vec![0, 24]),
            (2, '6', vec![0, 24]),
            (3, '4', vec![0]),
        ];
        assert_eq!(rows(&sets), wanted);
    }

    #[test]
    fn a_home_below_a_millisecond_is_asked_four_times_as_seen_live() {
        let mut near = known(&[0, 0]);
        (near.have6, near.had6) = (false, false);
        let wanted = [(1, '4', vec![0, 0, 100, 150]), (2, '4', vec![0, 0])];
        assert_eq!(rows(&incremental(&map(2), &near)), wanted);
    }

    #[test]
    fn a_far_home_is_always_in_the_plan() {
        let mut far = known(&[50, 20, 30, 40]);
        far.have6 = false;
        let regions: Vec<u32> = rows(&incremental(&map(4), &far))
            .iter()
            .map(|r| r.0)
            .collect();
        assert_eq!(regions, [2, 3, 4, 1]);
    }

    #[test]
    fn ipv6_is_asked_once_where_it_never_answered_and_not_at_far_regions() {
        let mut without = known(&[10, 20, 30]);
        without.had6 = false;
        let wanted = [
            (1, '4', vec![0, 12, 124, 186]),
            (1, '6', vec![0]),
            (2, '4', vec![0, 24]),
            (2, '6', vec![0]),
            (3, '4', vec![0]),
        ];
        assert_eq!(rows(&incremental(&map(3), &without)), wanted);
    }

    #[test]
    fn a_full_plan_has_three_tries_per_region_and_family() {
        let mut map = map(3);
        map.regions.get_mut(&2).unwrap().avoid = true;
        map.regions.get_mut(&3).unwrap().no_measure_no_home = true;
        map.regions.get_mut(&1).unwrap().nodes[0].ipv6 = "none".into();
        let wanted = [
            (1, '4', vec![0, 100, 200]),
            (2, '4', vec![0, 100, 200]),
            (2, '6', vec![0, 100, 200]),
        ];
        assert_eq!(rows(&full(&map, &known(&[]))), wanted);
        map.regions.get_mut(&1).unwrap().nodes[0].stun_port = -1;
        assert_eq!(rows(&full(&map, &known(&[]))), wanted[1..]);
    }
}
