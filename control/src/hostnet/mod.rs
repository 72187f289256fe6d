//! What the host's network is to look like for the tunnel, as a core: wanted state from the network
//! map, the settings and what the host has; difference to what is there; nothing is read or
//! written here. `driver/hostnet/` does that, on a thread of its own.
//!
//! Rooms: `plan` is what is to be there (policy rules, routes), `steps` in which order it comes about; `firewall` is
//! what nftables is to hold, `forwarding` which interfaces forward, `health` which of the offered prefixes can be
//! reached.
//!
//! **The host's network is somebody else's.** Its tables are not touched. Our routes stand in a
//! table of our own (52 unless told otherwise), and one rule of each family leads there, among
//! tailscaled's (5210 to 5270; [`Places`]). What is ours bears the protocol number [`PROTOCOL`], by
//! which a start finds what a killed run left behind; what does not bear it is never deleted.
//!
//! **Which route wins.** Between the host's and ours the longer one, and the host's among equals. Our
//! table is asked first, so it holds a *throw* route for each of the host's that is as long as one of
//! ours around it, or longer: the look-up goes on behind our rule as if we were not there, through the
//! host's own rules, source routing and refusals included. (Rules that ask the host's main table before
//! ours, the other way to say it, would never be late for a new route; but they decide by that
//! table ahead of the host's own rules, and a shorter `unreachable` route of the host ends their look-up.)
//! A route that the host gets later is thrown as soon as the kernel tells of it. What is less specific
//! than ours loses, with one exception: a subnet to which the host is connected keeps all
//! of itself, so a route or an address of a node inside it is not installed at all. Addresses of the ranges
//! that are there for networks like ours (100.64.0.0/10, fd7a:115c:a1e0::/48) are, as tailscaled has them:
//! providers use the former too.
//!
//! **Underlay.** What carries our mark, or leaves from our UDP port, jumps over our table, and those of other
//! ringtails on this host, to an end marker, and meets the host's own rules behind. The rule for the
//! port is there for a strict `rp_filter`: the kernel looks up the way back of an arriving packet without a
//! mark, but with the ports of the flow, once some rule needs them that is not bound to `lo`: the
//! end marker, which decides nothing, names the port for that reason alone. Our TCP connections
//! have no port of their own, and the host's resolver no mark: these few addresses are thrown back
//! to the host one by one, and only where one of our routes covers them. With an exit node that would let every
//! program out to them, so there the former are thrown only where `rp_filter` would drop what they answer
//! ([`WayBack`]), or our sockets have no mark.
//!
//! **An exit node** has both families whole in our table, whatever defaults the host has: what it does not
//! take goes nowhere ([`Way::Unreachable`]) and never to the host's own default. Then, the other way
//! round, little of the host's is thrown: networks of guests on this host, what means something on a link
//! only, where it must be the addresses that our TCP connections go to; and its subnets and routes if somebody wants the local
//! networks to stay outside, though never one that is as wide as the Internet. Resolvers are not.
//!
//! **Never installed:** what this node itself offers, and what the agent does not let through (exit
//! routes of others, whole or in pieces, and addresses that no host has).
//!
//! nftables and forwarding are no part of [`State`] and [`steps`]: each is changed as a whole.

pub mod firewall;
pub mod forwarding;
mod health;
mod plan;
mod steps;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;

use crate::netmap::prefix::EVERYWHERE;

pub use health::Lans;
pub use plan::{lies_in, meets, plan, stays};
pub use steps::{Step, by_hand, steps};

/// Route and rule protocol number (`RTA_PROTOCOL`, `FRA_PROTOCOL`) of what is ours.
pub const PROTOCOL: u8 = 114;
/// The table unless told otherwise, which is tailscaled's.
pub const TABLE_DEFAULT: u8 = 52;
/// Tables tried, from the default on, if nobody chose one.
pub const TABLES_TRIED: u8 = 8;
/// The largest table there can be: 253 to 255 are the host's.
pub const TABLE_MAX: u8 = 252;
/// The mark of underlay sockets unless told otherwise, which is tailscaled's.
pub const MARK_DEFAULT: u32 = 0x8_0000;
/// Bits of a mark that count, if it is the default one.
const MARK_DEFAULT_MASK: u32 = 0xff_0000;
/// Conflicts told at most.
pub const CONFLICTS_MAX: usize = 64;
/// Addresses outside of the tunnel that were dialled, at most; the oldest goes.
pub const DIALLED_MAX: usize = 64;
/// The host's main table.
pub(crate) const MAIN: u8 = 254;

/// What does not change while a node runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Our table.
    pub table: u8,
    /// The mark of underlay sockets; 0 is none.
    pub fwmark: u32,
    /// UDP port of the underlay.
    pub port: u16,
    /// Index of the TUN interface.
    pub tun: u32,
    /// Whether the kernel takes policy rules, IPv4 and IPv6. Where it does not, only peers' own
    /// addresses are routed, in the main table and beside what is there.
    pub rules: [bool; 2],
}

/// What the network wants of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlay {
    /// Own inner addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Peers' own inner addresses.
    pub peers: BTreeSet<IpAddr>,
    /// Addresses at which services of the network are to be had on this host itself, unless another program
    /// has them already.
    pub services: BTreeSet<IpAddr>,
    /// Everything else that peers route.
    pub routes: BTreeSet<IpNet>,
    /// What this node routes for others, the Internet apart.
    pub offered: BTreeSet<IpNet>,
    /// Those of [`Self::offered`] into which traffic goes with an address of this host.
    pub snat: BTreeSet<IpNet>,
    /// Whether this node lets others out to the Internet.
    pub offers_exit: bool,
    /// Where those do not get that it lets out, but for what is [`Self::offered`].
    pub shut: BTreeSet<IpNet>,
    /// What of [`Self::offered`] is nevertheless for them as if it were not.
    pub unapproved: BTreeSet<IpNet>,
    /// Whether rules of ours may stand before those of the host's firewall that would drop what is forwarded.
    pub may_open_firewall: bool,
    /// Whether forwarding may be switched on.
    pub may_forward: bool,
    /// The way out that somebody chose: then what goes to the Internet goes there or nowhere.
    pub exit: Option<Exit>,
}

/// A chosen exit node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exit {
    /// Whether it takes IPv4, and IPv6; neither while there is no such node.
    pub takes: [bool; 2],
    /// Whether the networks that this host is connected to stay outside of the tunnel.
    pub allow_lan: bool,
}

impl Overlay {
    /// Whether this node forwards for others.
    pub fn forwards(&self) -> bool {
        self.offers_exit || !self.offered.is_empty()
    }

    /// Everything that leads into the tunnel, if nothing speaks against it; the Internet only where something can.
    pub fn nets(&self) -> BTreeSet<IpNet> {
        let peers = self.peers.iter().copied().map(IpNet::from);
        let exit = self.exit.filter(|exit| exit.allow_lan).map(|_| EVERYWHERE);
        let routes = self.routes.iter().map(IpNet::trunc);
        peers
            .chain(routes)
            .chain(exit.into_iter().flatten())
            .collect()
    }
}

/// What the host has of its own; nothing here is ours.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Subnets of its addresses, those of our TUN left out.
    pub connected: BTreeSet<IpNet>,
    /// Those of them that are for guests on this host alone: virtual machines and containers.
    pub guests: BTreeSet<IpNet>,
    /// The bridges that such guests are on.
    pub guest_links: BTreeSet<u32>,
    /// Destinations in the tables that its rules lead to, those by our TUN left out.
    pub routes: BTreeSet<IpNet>,
    /// Its routes and subnets that say how to reach what this node offers, and the interfaces by which they lead.
    pub ways: BTreeSet<(IpNet, u32)>,
    /// Its interfaces that are up and have a carrier.
    pub carrying: BTreeSet<u32>,
    /// Names of its interfaces.
    pub links: BTreeMap<u32, String>,
    /// What of the ranges that networks like ours have their addresses from it has by other interfaces: the subnets of
    /// its addresses, a whole range where an address has none, for anybody may be behind that, and its routes.
    pub elsewhere: BTreeSet<(u32, IpNet)>,
    /// Servers that its resolver asks.
    pub resolvers: Vec<IpAddr>,
    /// Where our TCP connections go.
    pub dialled: Vec<IpAddr>,
    /// What its interfaces ask of the senders of IPv4 packets.
    pub way_back: WayBack,
    /// Whether the TUN can have IPv6 addresses.
    pub ipv6: bool,
}

/// What an interface asks of the sender of an IPv4 packet (`rp_filter`), the least first. The kernel looks for the way
/// back to it without the mark that our own packets have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum WayBack {
    /// Nothing (0).
    #[default]
    Unasked,
    /// That the host has a way there (2).
    Any,
    /// That it leads by the same interface (1).
    Same,
}

/// Everything that we add to a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Addresses of the TUN, each with its full length.
    pub addresses: BTreeSet<IpAddr>,
    /// Policy rules.
    pub rules: BTreeSet<Rule>,
    /// Routes of our table.
    pub routes: BTreeSet<Route>,
}

/// A policy rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// Its place; smaller ones are asked first.
    pub priority: u32,
    /// Whether it is for IPv6.
    pub v6: bool,
    /// What it does.
    pub action: Action,
    /// Mark and mask it is for.
    pub mark: Option<(u32, u32)>,
    /// Whether it is for what the host itself sends (`iif lo`).
    pub local: bool,
    /// The UDP source port it is for.
    pub port: Option<u16>,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Looks into a table.
    Table(u32),
    /// Goes on at a later rule.
    Goto(u32),
    /// Nothing.
    Nop,
}

/// A route of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The destination.
    pub net: IpNet,
    /// Where it stands.
    pub table: u8,
    /// Where it leads.
    pub way: Way,
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Back to the rules behind our table.
    Throw,
    /// Nowhere: who sends is told at once.
    Unreachable,
    /// Into the tunnel.
    Tunnel,
    /// Elsewhere: what an earlier run left.
    Stale,
}

/// A route of the network that meets one of the host's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Conflict {
    /// The network's.
    pub route: IpNet,
    /// The host's.
    pub host_route: IpNet,
    /// How they lie.
    pub relation: Relation,
}

/// How a route of the network lies to one of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Relation {
    /// The same prefix: the host's is in force, ours as soon as the host's goes.
    Same,
    /// It covers the host's, which stays in force for its part.
    Covers,
    /// It lies inside a subnet that the host is connected to: it is not installed.
    InsideConnected,
    /// It lies inside a route of the host: it is in force for its part.
    Inside,
    /// It is a node's address, and the host's resolver asks a server of that address: it is not used.
    Resolver,
}

impl Conflict {
    /// A sentence about it.
    pub fn describe(&self) -> String {
        let route = self.route;
        let host = self.host_route;
        match self.relation {
            Relation::Same => {
                format!("{route}: the host has a route of its own, which stays in force")
            }
            Relation::Covers => format!("{route}: the host's {host} inside stays in force"),
            Relation::InsideConnected => format!(
                "{route} is not installed: it lies inside {host}, to which the host is connected"
            ),
            Relation::Resolver => {
                format!("{route} is not used: the host's resolver asks a server of that address")
            }
            Relation::Inside => format!("{route} takes a part of the host's {host}"),
        }
    }
}

/// What [`Problem`]s are about.
pub const HOST_PARTS: [&str; 4] = ["host", "firewall", "forwarding", "ha"];

/// Something of the host's network that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// What it is about: one of [`HOST_PARTS`].
    pub part: &'static str,
    /// A sentence, with the command that helps if there is one.
    pub text: String,
}

/// A network interface, as far as it says who is behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// The bridge it is a port of.
    pub bridge: Option<u32>,
    /// Whether it is a bridge.
    pub is_bridge: bool,
    /// Whether its other end is on this host: a pair's, or a program's.
    pub is_virtual: bool,
    /// Whether packets can leave by it.
    pub carries: bool,
}

/// The bridges that nobody is on but guests of this host. `real` are those that were seen with another port: one of
/// which that is gone is a network that is down, and not the guests'.
pub fn guest_bridges(links: &[Link], real: &mut BTreeSet<u32>) -> BTreeSet<u32> {
    let bridges = links.iter().filter(|link| link.is_bridge);
    let all: BTreeSet<u32> = bridges.map(|link| link.index).collect();
    let ports = links.iter().filter(|link| !link.is_virtual);
    real.extend(ports.filter_map(|link| link.bridge));
    real.retain(|bridge| all.contains(bridge));
    all.difference(real).copied().collect()
}

/// What [`plan`] finds.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// What is to be there.
    pub state: State,
    /// Where it meets what the host has, at most [`CONFLICTS_MAX`].
    pub conflicts: Vec<Conflict>,
    /// Conflicts beyond those.
    pub more_conflicts: usize,
    /// Addresses that stay outside of the tunnel although a route of the network covers them.
    pub kept_out: Vec<IpAddr>,
}

impl Settings {
    /// The mark and the bits of it that count, if there is one.
    fn mark(&self) -> Option<(u32, u32)> {
        let mask = if self.fwmark == MARK_DEFAULT {
            MARK_DEFAULT_MASK
        } else {
            u32::MAX
        };
        (self.fwmark != 0).then_some((self.fwmark, mask))
    }
}

/// A node's like any other, for tests.
#[cfg(test)]
pub(crate) fn settings() -> Settings {
    Settings {
        table: TABLE_DEFAULT,
        fwmark: MARK_DEFAULT,
        port: 41_641,
        tun: 9,
        rules: [true; 2],
    }
}

/// Where the rules for a table stand. Of the tables that are tried by themselves each has places of its own
/// among tailscaled's, so that what one ringtail keeps out of the tunnel jumps over the others' tables too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// The jump of what carries our mark.
    pub marked: u32,
    /// The jump of what leaves from our port.
    pub port: u32,
    /// The way into the table.
    pub table: u32,
    /// Where the jumps lead.
    pub end: u32,
}

impl Places {
    /// The places for a table.
    pub fn of(table: u8) -> Self {
        let base = 100 * u32::from(TABLE_DEFAULT);
        let (base, nth) = match table.checked_sub(TABLE_DEFAULT) {
            Some(nth) if nth < TABLES_TRIED => (base, nth.into()),
            Some(_) | None => (100 * u32::from(table), 0),
        };
        Self {
            marked: base + 11 + 2 * nth,
            port: base + 12 + 2 * nth,
            table: base + 31 + nth,
            end: base + 62 + nth,
        }
    }

    fn all(self) -> [u32; 4] {
        [self.marked, self.port, self.table, self.end]
    }
}

/// The table to which a rule at this place would belong.
pub fn table_of_priority(priority: u32) -> Option<u8> {
    (1..=TABLE_MAX).find(|table| Places::of(*table).all().contains(&priority))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bridge_with_a_real_port_is_no_guests() {
        let link = |index, bridge, is_bridge, is_virtual| Link {
            index,
            name: String::new(),
            bridge,
            is_bridge,
            is_virtual,
            carries: true,
        };
        let links = [
            link(1, None, false, false),
            link(2, Some(10), false, false),
            link(3, Some(10), false, true),
            link(4, Some(11), false, true),
            link(10, None, true, false),
            link(11, None, true, false),
            link(12, None, true, false),
            // A bridge in a bridge: what is behind it is not known.
            link(13, Some(14), true, false),
            link(14, None, true, false),
        ];
        let mut real = BTreeSet::new();
        let guests = BTreeSet::from([11, 12, 13]);
        assert_eq!(guest_bridges(&links, &mut real), guests);
        // The network card is pulled out: its bridge is as real as before, until it goes itself.
        let mut without = links.to_vec();
        without.retain(|link| link.is_virtual || link.is_bridge);
        assert_eq!(guest_bridges(&without, &mut real), guests);
        without.retain(|link| guests.contains(&link.index));
        assert_eq!(guest_bridges(&without, &mut real), guests);
        assert!(real.is_empty());
    }

    #[test]
    fn every_table_has_places_of_its_own_and_the_first_eight_jump_over_each_other() {
        let mut taken = BTreeSet::new();
        for table in 1..=TABLE_MAX {
            for place in Places::of(table).all() {
                assert!(taken.insert(place), "{place} of {table}");
                assert_eq!(table_of_priority(place), Some(table));
            }
        }
        let tried = (TABLE_DEFAULT..).take(TABLES_TRIED.into()).map(Places::of);
        let tried: Vec<Places> = tried.collect();
        for (one, other) in tried
            .iter()
            .flat_map(|one| tried.iter().map(move |o| (one, o)))
        {
            assert!(one.port < other.table && one.marked < other.table);
            assert!(one.end > other.table && (5211..=5270).contains(&one.end));
        }
        assert_eq!(table_of_priority(5210), None);
        assert_eq!(table_of_priority(6015), None);
    }
}
