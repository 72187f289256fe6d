#![forbid(unsafe_code)]
//! What a set of rules lets through, by destination.
//!
//! Every distinct destination prefix has an entry with the ports that any rule opens there, for each of
//! the protocols that have ports. A few prefixes are tried one by one; more are found by longest
//! prefix, and each is linked to the next shorter one that covers it. A few ranges of ports are tried one
//! by one; of more there is a bit for each port.

use std::net::IpAddr;

use super::rules::{Ask, CompiledRule, Protocols, index_u32};
use crate::packet::header::{SCTP, TCP, UDP};
use crate::route::{PrefixMap, covers};
use crate::types::Prefix;

/// Prefixes tried one by one at most.
const PREFIXES_FEW: usize = 4;
/// Ranges of ports tried one by one at most.
const RANGES_FEW: usize = 8;
/// Ranges searched at most: as many take an eighth of the memory that a bit for each port takes.
const RANGES_MAX: usize = 256;
/// What one part ([`Table::parts`]) costs at worst: the place, and a range for each protocol.
#[cfg(test)]
pub(crate) const PART_COST: usize = size_of::<Destination>() + WITH_PORTS.len() * 32;

/// Protocols that are asked for with a port.
const WITH_PORTS: [u8; 3] = [TCP, UDP, SCTP];

/// The table. Immutable.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// Shorter prefixes first.
    destinations: Box<[Destination]>,
    /// Where they are, if they are not few.
    places: Option<PrefixMap<u32>>,
}

#[derive(Clone, Debug)]
struct Destination {
    prefix: Prefix,
    /// That of the next shorter prefix that covers this one, if they are not few.
    parent: Option<u32>,
    /// Protocols that a rule lets through for all ports.
    all_ports: Protocols,
    /// In the order of [`WITH_PORTS`].
    ports: [Ports; WITH_PORTS.len()],
}

/// A set of ports.
#[derive(Clone, Debug)]
enum Ports {
    /// Ranges in their order, both ends included, that do not meet.
    Ranges(Box<[(u16, u16)]>),
    /// One bit for each.
    Bits(Box<[u64]>),
}

impl Table {
    /// The table of these rules.
    pub(super) fn new<'a>(rules: impl Iterator<Item = &'a CompiledRule>) -> Table {
        let mut parts: Vec<_> = rules
            .flat_map(|rule| {
                let parts = rule.destinations.iter();
                parts.map(move |(prefix, first, last)| (*prefix, *first, *last, &rule.protocols))
            })
            .collect();
        // Shorter prefixes first, so that a parent is in the map before its children; ranges in order.
        parts.sort_by_key(|(prefix, first, ..)| (prefix.bits, prefix.addr, *first));
        let of_one = parts.chunk_by(|(one, ..), (other, ..)| one == other);
        let mut destinations: Vec<Destination> = of_one
            .map(|parts| Destination {
                prefix: parts[0].0,
                parent: None,
                all_ports: all_ports(parts),
                ports: WITH_PORTS.map(|protocol| {
                    let has = parts.iter().filter(|part| part.3.contains(protocol));
                    Ports::of(has.map(|(_, first, last, _)| (*first, *last)))
                }),
            })
            .collect();
        let places = (destinations.len() > PREFIXES_FEW).then(|| {
            let mut places = PrefixMap::default();
            for (at, destination) in destinations.iter_mut().enumerate() {
                // Only shorter or equally long ones are there yet, and equal ones are not.
                destination.parent = places.lookup(destination.prefix.addr);
                places.insert(destination.prefix, index_u32(at));
            }
            places
        });
        Table {
            destinations: destinations.into(),
            places,
        }
    }

    /// How large it is: of each destination the ranges of the protocol that has most, one at least.
    pub(super) fn parts(&self) -> usize {
        let of_one = |one: &Destination| one.ports.iter().map(Ports::ranges).max();
        let parts = self.destinations.iter().filter_map(of_one);
        parts.map(|ranges| ranges.max(1)).sum()
    }

    /// Whether any of the rules lets such a packet through.
    #[inline]
    pub(super) fn matches(&self, ask: Ask, dst: IpAddr) -> bool {
        let Some(places) = &self.places else {
            let mut all = self.destinations.iter();
            return all.any(|one| covers(&one.prefix, dst) && one.matches(ask));
        };
        let mut at = places.lookup(dst);
        while let Some(index) = at {
            let destination = &self.destinations[index as usize];
            if destination.matches(ask) {
                return true;
            }
            at = destination.parent;
        }
        false
    }
}

impl Destination {
    #[inline]
    fn matches(&self, ask: Ask) -> bool {
        match ask {
            Ask::Any => true,
            Ask::AllPorts(protocol) => self.all_ports.contains(protocol),
            Ask::Port(protocol, port) => {
                let at = WITH_PORTS.iter().position(|one| *one == protocol);
                at.is_some_and(|at| self.ports[at].contains(port))
            }
        }
    }
}

/// Protocols of the parts that name all ports at once: two halves are not the whole.
fn all_ports(parts: &[(Prefix, u16, u16, &Protocols)]) -> Protocols {
    let mut all = Protocols::default();
    for (_, first, last, protocols) in parts {
        if (*first, *last) == (0, u16::MAX) {
            all.add(protocols);
        }
    }
    all
}

impl Ports {
    /// The ports of these ranges, which come in the order of their first ones.
    fn of(ranges: impl Iterator<Item = (u16, u16)>) -> Ports {
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (first, last) in ranges.filter(|(first, last)| first <= last) {
            match merged.last_mut() {
                Some((_, before)) if first <= before.saturating_add(1) => {
                    *before = last.max(*before);
                }
                Some(_) | None => merged.push((first, last)),
            }
        }
        if merged.len() <= RANGES_MAX {
            return Ports::Ranges(merged.into());
        }
        let mut bits = vec![0; (usize::from(u16::MAX) + 1) / 64];
        for port in merged.into_iter().flat_map(|(first, last)| first..=last) {
            bits[usize::from(port / 64)] |= 1 << (port % 64);
        }
        Ports::Bits(bits.into())
    }

    /// How many ranges take as much memory.
    fn ranges(&self) -> usize {
        match self {
            Ports::Ranges(ranges) => ranges.len(),
            Ports::Bits(_) => RANGES_MAX,
        }
    }

    #[inline]
    fn contains(&self, port: u16) -> bool {
        match self {
            Ports::Ranges(ranges) if ranges.len() <= RANGES_FEW => ranges
                .iter()
                .any(|(first, last)| (*first..=*last).contains(&port)),
            Ports::Ranges(ranges) => {
                let after = ranges.partition_point(|(first, _)| *first <= port);
                after > 0 && port <= ranges[after - 1].1
            }
            Ports::Bits(bits) => bits[usize::from(port / 64)] >> (port % 64) & 1 != 0,
        }
    }
}
