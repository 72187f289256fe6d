//! Sets of addresses, as sorted ranges that neither touch nor overlap.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};

/// A set of IPv4 and IPv6 addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges {
    /// First and last address of each range, of IPv4 and of IPv6.
    families: [Vec<(u128, u128)>; 2],
}

fn bounds(net: &IpNet) -> (usize, u128, u128) {
    match net {
        IpNet::V4(net) => {
            let bits = |addr: Ipv4Addr| u128::from(addr.to_bits());
            (0, bits(net.network()), bits(net.broadcast()))
        }
        IpNet::V6(net) => (1, net.network().to_bits(), net.broadcast().to_bits()),
    }
}

impl Ranges {
    /// The addresses of these prefixes.
    pub(super) fn of<'a>(nets: impl IntoIterator<Item = &'a IpNet>) -> Self {
        let mut ranges = Self::default();
        for net in nets {
            let (family, first, last) = bounds(net);
            ranges.families[family].push((first, last));
        }
        ranges.merge();
        ranges
    }

    fn merge(&mut self) {
        for family in &mut self.families {
            family.sort_unstable();
            let mut merged: Vec<(u128, u128)> = Vec::with_capacity(family.len());
            for (first, last) in family.drain(..) {
                match merged.last_mut() {
                    Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                    Some(_) | None => merged.push((first, last)),
                }
            }
            *family = merged;
        }
    }

    /// The addresses of all of these.
    pub(super) fn union<'a>(sets: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut all = Self::default();
        for set in sets {
            for (own, more) in all.families.iter_mut().zip(&set.families) {
                own.extend(more);
            }
        }
        all.merge();
        all
    }

    /// Without the addresses of these prefixes.
    pub(super) fn without(mut self, nets: &[IpNet]) -> Self {
        for net in nets {
            let (family, first, last) = bounds(net);
            let ranges = &mut self.families[family];
            let mut left = Vec::with_capacity(ranges.len() + 1);
            for (start, end) in ranges.drain(..) {
                if last < start || end < first {
                    left.push((start, end));
                    continue;
                }
                if start < first {
                    left.push((start, first - 1));
                }
                if last < end {
                    left.push((last + 1, end));
                }
            }
            *ranges = left;
        }
        self
    }

    pub(super) fn is_empty(&self) -> bool {
        self.families.iter().all(Vec::is_empty)
    }

    pub(super) fn contains(&self, addr: IpAddr) -> bool {
        self.overlaps(&IpNet::from(addr))
    }

    /// Whether any address of the prefix is in it.
    pub(super) fn overlaps(&self, net: &IpNet) -> bool {
        let (family, first, last) = bounds(net);
        let ranges = &self.families[family];
        let at = ranges.partition_point(|(_, end)| *end < first);
        ranges.get(at).is_some_and(|(start, _)| *start <= last)
    }

    /// Whether all addresses of the other are in it.
    pub(super) fn covers(&self, other: &Self) -> bool {
        let mut families = self.families.iter().zip(&other.families);
        families.all(|(own, other)| {
            other.iter().all(|(first, last)| {
                let at = own.partition_point(|(_, end)| end < last);
                own.get(at).is_some_and(|(start, _)| start <= first)
            })
        })
    }

    /// As few prefixes as cover it, IPv4 first, by address.
    pub(super) fn prefixes(&self) -> Vec<IpNet> {
        let [v4, v6] = &self.families;
        let v4 = v4.iter().flat_map(|(first, last)| {
            let addr = |bits: u128| Ipv4Addr::from_bits(u32::try_from(bits).unwrap_or(u32::MAX));
            Ipv4Subnets::new(addr(*first), addr(*last), 0).map(IpNet::V4)
        });
        let v6 = v6.iter().flat_map(|(first, last)| {
            let addr = Ipv6Addr::from_bits;
            Ipv6Subnets::new(addr(*first), addr(*last), 0).map(IpNet::V6)
        });
        v4.chain(v6).collect()
    }
}

/// A prefix as the filter of a map writes it: a single address without its length.
pub(super) fn text(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() {
        net.addr().to_string()
    } else {
        net.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn sets_are_as_few_prefixes_as_cover_them() {
        let of = |texts: &[&str]| Ranges::of(&nets(texts));
        let set = of(&["10.0.0.2/32", "10.0.0.3/32", "10.0.0.0/31", "fd00::/64"]);
        assert_eq!(set.prefixes(), nets(&["10.0.0.0/30", "fd00::/64"]));
        let rest = of(&["0.0.0.0/0"]).without(&nets(&["128.0.0.0/1", "0.0.0.0/2"]));
        assert_eq!(rest.prefixes(), nets(&["64.0.0.0/2"]));
        let all = of(&["0.0.0.0/0", "::/0"]);
        assert_eq!(all.prefixes(), nets(&["0.0.0.0/0", "::/0"]));
        assert!(all.covers(&set) && !set.covers(&all) && set.covers(&Ranges::default()));
        assert!(all.without(&nets(&["0.0.0.0/0", "::/0"])).is_empty());
    }

    #[test]
    fn questions_of_a_set_match_a_walk_over_its_addresses() {
        // All prefixes of 10.0.0.0/28, against sets of sixteen bits.
        let prefixes: Vec<IpNet> = (28..=32)
            .flat_map(|len| Ipv4Subnets::new([10, 0, 0, 0].into(), [10, 0, 0, 15].into(), len))
            .map(IpNet::V4)
            .collect();
        let addr = |n: u8| IpAddr::from([10, 0, 0, n]);
        for bits in (0_u32..1 << 16).step_by(37) {
            let own: Vec<IpNet> = (0..16)
                .filter(|n| bits >> n & 1 == 1)
                .map(|n| IpNet::from(addr(n)))
                .collect();
            let set = Ranges::of(&own);
            for n in 0..16 {
                assert_eq!(set.contains(addr(n)), bits >> n & 1 == 1);
            }
            for net in &prefixes {
                let mut inside = (0..16).filter(|n| net.contains(&addr(*n)));
                assert_eq!(
                    set.overlaps(net),
                    inside.any(|n| bits >> n & 1 == 1),
                    "{net}"
                );
                let mut inside = (0..16).filter(|n| net.contains(&addr(*n)));
                let all = inside.all(|n| bits >> n & 1 == 1);
                assert_eq!(set.covers(&Ranges::of([net])), all, "{net}");
            }
            assert_eq!(Ranges::union([&set, &set]), set);
            assert!(set.without(&own).is_empty());
        }
    }
}
