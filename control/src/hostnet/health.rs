//! Whether this node can serve the prefixes that it offers: a router whose LAN is gone is to say so, for then
//! coordination gives its place to another, and finds out by itself only after a long time, if ever.
//!
//! A prefix is lost when the interface by which the host reaches it is down or has no carrier, or when a way that
//! there was is gone. It counts again after it was back for [`BACK`], so that a link that flaps gives no place back
//! and forth. What is reached by the default route alone is never lost while it was never reached otherwise:
//! nobody can tell such a LAN from the Internet. A guests' bridge carries for ever, and does not keep a wide prefix
//! alive in which there was another way.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;

/// A prefix that was lost is served again when it was back for so long.
const BACK: Duration = Duration::from_secs(3);

/// How the offered prefixes are.
#[derive(Clone, Debug, Default)]
pub struct Lans(BTreeMap<IpNet, Lan>);

#[derive(Clone, Copy, Debug, Default)]
struct Lan {
    /// The host once had a way there that was not its default route.
    had_way: bool,
    /// One of those into it led elsewhere than to guests.
    had_lan: bool,
    /// None while it is well.
    lost: Option<Lost>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lost {
    /// It is.
    Now,
    /// It is back, and counts from then on.
    Until(Instant),
}

impl Lans {
    /// Looks again: at what is offered, the host's subnets and routes with the interfaces by which they lead (ours
    /// left out), the interfaces that are up and have a carrier, and those of them that guests of this host are on.
    pub fn look(
        &mut self,
        now: Instant,
        offered: &BTreeSet<IpNet>,
        ways: &BTreeSet<(IpNet, u32)>,
        carrying: &BTreeSet<u32>,
        guests: &BTreeSet<u32>,
    ) {
        self.0.retain(|net, _| offered.contains(net));
        for net in offered.iter().filter(|net| net.prefix_len() > 0) {
            let lan = self.0.entry(*net).or_default();
            let into = ways.iter().filter(|(way, _)| net.contains(way));
            lan.had_lan |= { into }.any(|(_, interface)| !guests.contains(interface));
            let counts = |interface: &u32| !(lan.had_lan && guests.contains(interface));
            let way = way(net, ways, carrying, &counts);
            lan.had_way |= way == Some(true);
            let well = way.unwrap_or(!lan.had_way);
            lan.lost = match (well, lan.lost) {
                (false, _) => Some(Lost::Now),
                (true, None) => None,
                (true, Some(Lost::Now)) => Some(Lost::Until(now + BACK)),
                (true, Some(Lost::Until(at))) => (at > now).then_some(Lost::Until(at)),
            };
        }
    }

    /// The prefixes that cannot be served.
    pub fn lost(&self) -> BTreeSet<IpNet> {
        let lost = self.0.iter().filter(|(_, lan)| lan.lost.is_some());
        lost.map(|(net, _)| *net).collect()
    }

    /// When [`Self::look`] is due although nothing changed.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let due = self.0.values().filter_map(|lan| match lan.lost {
            Some(Lost::Until(at)) => Some(at),
            Some(Lost::Now) | None => None,
        });
        due.min()
    }
}

/// Whether a prefix is reached by an interface that carries: by one that leads into it or to it; else by the
/// longest way around it. None if only the default route is around it. Of those into it, interfaces that do not
/// count are left out.
fn way(
    net: &IpNet,
    ways: &BTreeSet<(IpNet, u32)>,
    carrying: &BTreeSet<u32>,
    counts: &dyn Fn(&u32) -> bool,
) -> Option<bool> {
    let carries = |(_, interface): &&(IpNet, u32)| carrying.contains(interface);
    let into = || {
        ways.iter()
            .filter(|(way, interface)| net.contains(way) && counts(interface))
    };
    if into().next().is_some() {
        return Some(into().any(|way| carries(&way)));
    }
    let around = || {
        ways.iter()
            .filter(|(way, _)| way.prefix_len() > 0 && way.contains(net))
    };
    let longest = around().map(|(way, _)| way.prefix_len()).max()?;
    let mut those = around().filter(|(way, _)| way.prefix_len() == longest);
    Some(those.any(|way| carries(&way)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    const LAN: u32 = 2;
    const WAN: u32 = 3;
    const GUESTS: u32 = 4;
    const NONE: BTreeSet<u32> = BTreeSet::new();

    fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn ways(texts: &[(&str, u32)]) -> BTreeSet<(IpNet, u32)> {
        let parse = |(text, interface): &(&str, u32)| (text.parse().unwrap(), *interface);
        texts.iter().map(parse).collect()
    }

    #[test]
    fn the_interface_that_leads_there_decides() {
        let lan_and_wan = [
            ("10.1.0.0/16", LAN),
            ("192.0.2.0/24", WAN),
            ("0.0.0.0/0", WAN),
        ];
        for (prefix, there, carrying, well) in [
            // The LAN itself, a part of it, and more than it.
            ("10.1.0.0/16", &lan_and_wan[..], &[LAN, WAN][..], true),
            ("10.1.0.0/16", &lan_and_wan, &[WAN], false),
            ("10.1.7.0/24", &lan_and_wan, &[WAN], false),
            ("10.0.0.0/8", &lan_and_wan, &[WAN], false),
            ("10.0.0.0/8", &lan_and_wan, &[LAN], true),
            // By the default route alone: nobody can say.
            ("10.2.0.0/16", &lan_and_wan, &[], true),
            ("0.0.0.0/0", &lan_and_wan, &[], true),
            ("10.2.0.0/16", &[], &[], true),
            // Two ways; the longer one counts where one lies in the other.
            (
                "10.1.0.0/16",
                &[("10.1.0.0/16", LAN), ("10.1.0.0/16", WAN)],
                &[WAN],
                true,
            ),
            (
                "10.1.7.0/24",
                &[("10.1.0.0/16", LAN), ("10.0.0.0/8", WAN)],
                &[WAN],
                false,
            ),
            (
                "fd00:7::/64",
                &[("fd00:7::/64", LAN), ("::/0", WAN)],
                &[WAN],
                false,
            ),
        ] {
            let mut lans = Lans::default();
            let (ways, carrying) = (ways(there), carrying.iter().copied().collect());
            lans.look(start(), &nets(&[prefix]), &ways, &carrying, &NONE);
            assert_eq!(
                lans.lost().is_empty(),
                well,
                "{prefix} {there:?} {carrying:?}"
            );
        }
    }

    #[test]
    fn a_way_that_was_there_and_is_gone_is_a_loss_although_the_default_route_would_take_it() {
        let (offered, up) = (nets(&["10.1.0.0/16"]), BTreeSet::from([LAN, WAN]));
        let with = ways(&[("10.1.0.0/16", LAN), ("0.0.0.0/0", WAN)]);
        let without = ways(&[("0.0.0.0/0", WAN)]);
        let mut lans = Lans::default();
        lans.look(start(), &offered, &without, &up, &NONE);
        assert!(lans.lost().is_empty(), "it has not been there yet");
        lans.look(start(), &offered, &with, &up, &NONE);
        assert!(lans.lost().is_empty());
        lans.look(start(), &offered, &without, &up, &NONE);
        assert_eq!(lans.lost(), offered);
        // What is not offered any more is forgotten.
        lans.look(start(), &nets(&[]), &without, &up, &NONE);
        assert!(lans.lost().is_empty() && lans.0.is_empty());
    }

    #[test]
    fn what_flaps_stays_lost_until_it_was_back_for_a_while() {
        let (offered, up, down) = (nets(&["10.1.0.0/16"]), [LAN].into(), [].into());
        let ways = ways(&[("10.1.0.0/16", LAN)]);
        let mut lans = Lans::default();
        let mut now = start();
        for _ in 0..10 {
            lans.look(now, &offered, &ways, &down, &NONE);
            assert_eq!((lans.lost(), lans.poll_timeout()), (offered.clone(), None));
            now += Duration::from_secs(1);
            lans.look(now, &offered, &ways, &up, &NONE);
            now += BACK / 2;
            lans.look(now, &offered, &ways, &up, &NONE);
            assert_eq!(lans.lost(), offered);
        }
        assert_eq!(lans.poll_timeout(), Some(now + BACK / 2));
        lans.look(now + BACK / 2, &offered, &ways, &up, &NONE);
        assert!(lans.lost().is_empty() && lans.poll_timeout().is_none());
    }

    #[test]
    fn guests_do_not_keep_alive_what_they_are_a_part_of() {
        let (wide, own) = (nets(&["192.168.0.0/16"]), nets(&["192.168.122.0/24"]));
        let both = ways(&[("192.168.77.0/24", LAN), ("192.168.122.0/24", GUESTS)]);
        let bridge = ways(&[("192.168.122.0/24", GUESTS)]);
        let (up, down) = ([LAN, GUESTS].into(), [GUESTS].into());
        let mut lans = Lans::default();
        let guests = BTreeSet::from([GUESTS]);
        let mut lost = |offered: &BTreeSet<IpNet>, ways, carrying| {
            lans.look(start(), offered, ways, carrying, &guests);
            lans.lost()
        };
        assert!(
            lost(&wide, &bridge, &down).is_empty(),
            "there is nothing else"
        );
        assert!(lost(&wide, &both, &up).is_empty());
        assert_eq!(lost(&wide, &both, &down), wide);
        assert_eq!(lost(&wide, &bridge, &down), wide, "the interface is gone");
        // What is theirs alone carries for ever.
        assert!(lost(&own, &both, &down).is_empty());
    }
}
