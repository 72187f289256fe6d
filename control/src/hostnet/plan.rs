//! What is to be there.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    Action, CONFLICTS_MAX, Conflict, DIALLED_MAX, Host, MAIN, Overlay, Places, Plan, Relation,
    Route, Rule, Settings, Way, WayBack,
};
use crate::netmap::prefix::{EVERYWHERE, V4_RANGE, V6_RANGE, is_exit, v4, v6};

/// What is never sent to an exit node: it means something on a link only. An address is got and neighbours
/// are found there.
const NEAR: [IpNet; 3] = [
    v4([169, 254, 0, 0], 16),
    v4([255; 4], 32),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
];
/// What goes with local networks.
const NEAR_LAN: [IpNet; 2] = [v4([224, 0, 0, 0], 4), v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8)];

/// Computes what is to be there, and tells where it meets what the host has.
pub fn plan(settings: &Settings, overlay: &Overlay, host: &Host) -> Plan {
    let mut plan = Plan::default();
    let usable = |v6: bool| !v6 || host.ipv6;
    let mut tell = Teller::default();
    for ip in overlay.addresses.iter().copied() {
        match host_own(host, ip) {
            Some((theirs, relation)) => tell.conflict(ip.into(), theirs, relation),
            None if usable(ip.is_ipv6()) => _ = plan.state.addresses.insert(ip),
            None => {}
        }
    }
    for ip in overlay
        .services
        .iter()
        .copied()
        .filter(|ip| usable(ip.is_ipv6()))
    {
        let net = IpNet::from(ip);
        if host.routes.contains(&net) {
            tell.conflict(net, net, Relation::Same);
        } else {
            plan.state.addresses.insert(ip);
        }
    }
    let connected = match overlay.exit {
        Some(exit) if !exit.allow_lan => &host.guests,
        Some(_) | None => &host.connected,
    };
    let routes = host.routes.iter().filter(|net| stays(overlay, host, net));
    let own: BTreeSet<IpNet> = connected.iter().chain(routes).copied().collect();
    let mut tunnel: BTreeSet<IpNet> = BTreeSet::new();
    for net in overlay.routes.iter().map(IpNet::trunc) {
        let itself = net.prefix_len() == net.max_prefix_len()
            && (overlay.addresses.contains(&net.addr()) || overlay.peers.contains(&net.addr()));
        let offered = overlay.offered.contains(&net);
        let v6 = net.addr().is_ipv6();
        // The agent lets no exit route through; here one would take everything.
        if itself || offered || is_exit(&net) || !usable(v6) {
            continue;
        }
        if let Some(subnet) = longest_around(connected, &net) {
            tell.conflict(net, subnet, Relation::InsideConnected);
        } else if settings.rules[usize::from(v6)] {
            meet(&mut tell, &own, &net);
            tunnel.insert(net);
        }
    }
    let mut nowhere: BTreeSet<IpNet> = BTreeSet::new();
    if let Some(exit) = overlay.exit {
        for net in EVERYWHERE {
            let v6 = net.addr().is_ipv6();
            if settings.rules[usize::from(v6)] {
                tunnel.insert(net);
                if !exit.takes[usize::from(v6)] || !usable(v6) {
                    nowhere.insert(net);
                }
            }
        }
        // Of what stays the host's, subnets are what somebody asked for; other routes may surprise, but for those
        // to a single address.
        let single = |net: &&IpNet| net.prefix_len() == net.max_prefix_len();
        let others = own
            .iter()
            .filter(|net| !single(net) && !lies_in(connected, net));
        for net in others {
            let all = EVERYWHERE[usize::from(net.addr().is_ipv6())];
            tell.conflict(all, *net, Relation::Covers);
        }
    }
    plan.kept_out = kept_out(settings, overlay, host, &tunnel);
    let peers = overlay.peers.iter().copied();
    let peers = peers.filter(|ip| usable(ip.is_ipv6()) && !overlay.addresses.contains(ip));
    let offered = overlay.offered.iter().copied();
    let covered: Vec<IpNet> = offered.filter(|net| lies_in(&tunnel, net)).collect();
    for ip in peers {
        let net = IpNet::from(ip);
        if let Some((theirs, relation)) = host_own(host, ip) {
            tell.conflict(net, theirs, relation);
            continue;
        }
        if own.contains(&net) {
            tell.conflict(net, net, Relation::Same);
        } else if let Some(subnet) = longest_around(&host.connected, &net) {
            tell.conflict(net, subnet, Relation::Inside);
        }
        tunnel.insert(net);
    }
    let kept_out = plan.kept_out.iter().copied().map(IpNet::from);
    let with_rules = |net: &IpNet| settings.rules[usize::from(net.addr().is_ipv6())];
    let theirs = tunnel.iter().flat_map(|net| within(&own, net)).copied();
    let near = overlay.exit.iter().flat_map(|exit| {
        let lan = NEAR_LAN.iter().filter(|_| exit.allow_lan);
        NEAR.iter().chain(lan).copied()
    });
    let throw: BTreeSet<IpNet> = kept_out
        .chain(covered)
        .chain(theirs)
        .chain(near)
        .filter(with_rules)
        .collect();
    plan.state.rules = rules(settings);
    let route = |net: IpNet, way| Route {
        net,
        table: if with_rules(&net) {
            settings.table
        } else {
            MAIN
        },
        way,
    };
    let into = tunnel
        .difference(&throw)
        .map(|net| match nowhere.contains(net) {
            true => route(*net, Way::Unreachable),
            false => route(*net, Way::Tunnel),
        });
    plan.state.routes = into.collect();
    let back = throw.iter().map(|net| route(*net, Way::Throw));
    plan.state.routes.extend(back);
    plan.conflicts = tell.told;
    plan.more_conflicts = tell.more;
    plan
}

/// Whether a route of the host stays in force where it meets ours, as far as the exit node is concerned:
/// beside one, nothing that leads to the Internet does, and only what its guests need unless local networks
/// stay outside.
pub fn stays(overlay: &Overlay, host: &Host, net: &IpNet) -> bool {
    match overlay.exit {
        None => true,
        Some(exit) if exit.allow_lan => !is_exit(net),
        Some(_) => lies_in(&host.guests, net),
    }
}

/// The rules for both families.
fn rules(settings: &Settings) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::new();
    let at = Places::of(settings.table);
    for v6 in [false, true] {
        if !settings.rules[usize::from(v6)] {
            continue;
        }
        let plain = Rule {
            priority: at.end,
            v6,
            action: Action::Nop,
            mark: None,
            local: false,
            port: None,
        };
        // Decides nothing, but has the kernel look for ports in what arrives (module doc).
        rules.insert(Rule {
            port: Some(settings.port),
            ..plain
        });
        let jump = Rule {
            action: Action::Goto(at.end),
            ..plain
        };
        if let Some(mark) = settings.mark() {
            rules.insert(Rule {
                priority: at.marked,
                mark: Some(mark),
                ..jump
            });
        }
        rules.insert(Rule {
            priority: at.port,
            local: true,
            port: Some(settings.port),
            ..jump
        });
        rules.insert(Rule {
            priority: at.table,
            action: Action::Table(settings.table.into()),
            ..plain
        });
    }
    rules
}

/// The addresses that are thrown back to the host's table.
fn kept_out(
    settings: &Settings,
    overlay: &Overlay,
    host: &Host,
    tunnel: &BTreeSet<IpNet>,
) -> Vec<IpAddr> {
    // With an exit node every program would go out there. Our own sockets have their mark; only the kernel's look for
    // the way back goes without, and finds the exit node, or none.
    let needed = |ip: &&IpAddr| {
        let Some(exit) = overlay.exit else {
            return true;
        };
        let asked = match host.way_back {
            WayBack::Unasked => false,
            WayBack::Any => !exit.takes[0],
            WayBack::Same => true,
        };
        settings.mark().is_none() || ip.is_ipv4() && asked
    };
    let dialled = host.dialled.iter().take(DIALLED_MAX).filter(needed);
    // Who asks for names tells where he goes: with an exit node that is for it alone to hear.
    let resolvers = host.resolvers.iter().filter(|_| overlay.exit.is_none());
    let mut found: Vec<IpAddr> = resolvers
        .chain(dialled)
        .copied()
        // A server that is a peer is meant to be reached through the tunnel.
        .filter(|ip| {
            let node = overlay.peers.contains(ip) || overlay.addresses.contains(ip);
            !node || host_own(host, *ip).is_some()
        })
        .filter(|ip| lies_in(tunnel, &IpNet::from(*ip)))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// What of the host's an address of a node would take away: a subnet that the host is connected to, or a
/// resolver that it asks. The ranges that are there for such networks are left to them: a provider's
/// network may lie in one.
fn host_own(host: &Host, ip: IpAddr) -> Option<(IpNet, Relation)> {
    let left_to_nodes = match ip {
        IpAddr::V4(ip) => V4_RANGE.contains(&ip),
        IpAddr::V6(ip) => V6_RANGE.contains(&ip),
    };
    if left_to_nodes {
        return None;
    }
    let single = IpNet::from(ip);
    if host.resolvers.contains(&ip) {
        return Some((single, Relation::Resolver));
    }
    let subnet = longest_around(&host.connected, &single)?;
    Some((subnet, Relation::InsideConnected))
}

/// Tells where a route of the network meets the host's.
fn meet(tell: &mut Teller, host: &BTreeSet<IpNet>, net: &IpNet) {
    if host.contains(net) {
        tell.conflict(*net, *net, Relation::Same);
    } else if let Some(around) = longest_around(host, net) {
        tell.conflict(*net, around, Relation::Inside);
    }
    for inside in within(host, net).filter(|inside| *inside != net) {
        tell.conflict(*net, *inside, Relation::Covers);
    }
}

/// Those of `nets` that lie within `net`, itself included.
fn within<'a>(nets: &'a BTreeSet<IpNet>, net: &'a IpNet) -> impl Iterator<Item = &'a IpNet> {
    let last = IpNet::from(net.broadcast());
    nets.range(*net..=last)
        .filter(|inside| net.contains(*inside))
}

/// The longest prefix in `nets` that is shorter than `net` and holds it.
fn longest_around(nets: &BTreeSet<IpNet>, net: &IpNet) -> Option<IpNet> {
    (0..net.prefix_len())
        .rev()
        .filter_map(|len| IpNet::new(net.addr(), len).ok())
        .map(|around| around.trunc())
        .find(|around| nets.contains(around))
}

/// Whether `net` is one of `nets` or lies in one.
pub fn lies_in(nets: &BTreeSet<IpNet>, net: &IpNet) -> bool {
    nets.contains(net) || longest_around(nets, net).is_some()
}

/// Whether a route of the host meets one of these: is equal, around or inside.
pub fn meets(nets: &BTreeSet<IpNet>, net: &IpNet) -> bool {
    lies_in(nets, net) || within(nets, net).next().is_some()
}

/// Collects conflicts, up to their bound.
#[derive(Default)]
struct Teller {
    told: Vec<Conflict>,
    more: usize,
}

impl Teller {
    fn conflict(&mut self, route: IpNet, host_route: IpNet, relation: Relation) {
        if self.told.len() < CONFLICTS_MAX {
            self.told.push(Conflict {
                route,
                host_route,
                relation,
            });
        } else {
            self.more += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hostnet::{Exit, settings};

    fn nets(list: &[&str]) -> BTreeSet<IpNet> {
        list.iter().map(|net| net.parse().unwrap()).collect()
    }

    fn ips(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|ip| ip.parse().unwrap()).collect()
    }

    fn overlay(peers: &[&str], routes: &[&str]) -> Overlay {
        Overlay {
            addresses: ips(&["100.64.0.1", "fd7a:115c:a1e0::1"])
                .into_iter()
                .collect(),
            peers: ips(peers).into_iter().collect(),
            routes: nets(routes),
            ..Overlay::default()
        }
    }

    fn host(connected: &[&str], routes: &[&str]) -> Host {
        Host {
            connected: nets(connected),
            routes: nets(routes),
            ipv6: true,
            ..Host::default()
        }
    }

    /// What the kernel does with `ip`, by the rules' own words: whose table answers. What our rules leave
    /// open, the host's own rules decide.
    fn kernel(plan: &Plan, ip: &str, marked: bool) -> &'static str {
        let ip: IpAddr = ip.parse().unwrap();
        let mut from = 0;
        let rules = plan.state.rules.iter();
        for rule in rules.filter(|rule| rule.v6 == ip.is_ipv6()) {
            if rule.priority < from || rule.port.is_some() || rule.mark.is_some() && !marked {
                continue;
            }
            match rule.action {
                Action::Nop => {}
                Action::Goto(target) => from = target,
                Action::Table(_) => {
                    let ours = plan.state.routes.iter();
                    let longest = ours
                        .filter(|route| route.net.contains(&ip))
                        .max_by_key(|route| route.net.prefix_len());
                    match longest.map(|route| route.way) {
                        Some(Way::Tunnel) => return "tunnel",
                        Some(Way::Unreachable) => return "nowhere",
                        Some(Way::Throw | Way::Stale) | None => {}
                    }
                }
            }
        }
        "host"
    }

    #[test]
    fn the_longest_prefix_wins_and_the_host_among_equals() {
        let connected = ["192.168.1.0/24", "172.17.0.0/16", "fd01::/64"];
        let wants = overlay(
            &["100.64.0.2", "192.168.1.77"],
            &[
                "192.168.1.0/24",
                "172.16.0.0/12",
                "10.1.0.0/16",
                "10.1.2.3/32",
                "fd01::/48",
            ],
        );
        let plan = plan(
            &settings(),
            &wants,
            &host(&connected, &["10.0.0.0/8", "10.1.2.3/32"]),
        );
        for (ip, table) in [
            ("192.168.1.5", "host"),
            // A peer's own address, to which the host is connected already.
            ("192.168.1.77", "host"),
            ("172.17.0.2", "host"),
            ("172.18.0.2", "tunnel"),
            ("10.1.9.9", "tunnel"),
            ("10.1.2.3", "host"),
            ("10.2.0.1", "host"),
            ("8.8.8.8", "host"),
            ("100.64.0.2", "tunnel"),
            ("fd01::7", "host"),
            ("fd01:0:0:1::7", "tunnel"),
        ] {
            assert_eq!(kernel(&plan, ip, false), table, "{ip}");
            assert_eq!(kernel(&plan, ip, true), "host", "{ip} with our mark");
        }
    }

    #[test]
    fn every_length_agrees_with_a_plain_search() {
        // One route of ours and one of the host's, of any two lengths, around one address.
        for (ip, lens) in [("10.9.8.7", 8..=32_u8), ("fd09:8:7::6", 7..=128)] {
            let addr: IpAddr = ip.parse().unwrap();
            for (ours, theirs) in lens.clone().flat_map(|a| lens.clone().map(move |b| (a, b))) {
                let net = |len| IpNet::new(addr, len).unwrap().trunc();
                let wants = Overlay {
                    routes: BTreeSet::from([net(ours)]),
                    ..Overlay::default()
                };
                let mut has = host(&[], &[]);
                has.routes.insert(net(theirs));
                let plan = plan(&settings(), &wants, &has);
                let right = if ours <= theirs { "host" } else { "tunnel" };
                assert_eq!(kernel(&plan, ip, false), right, "{ours} {theirs}");
            }
        }
    }

    #[test]
    fn a_neighbour_in_the_range_of_overlays_is_told_of_where_a_peer_has_its_address() {
        let has = host(&["100.64.0.0/24"], &["100.64.0.0/24"]);
        let plan = plan(&settings(), &overlay(&["100.64.0.2"], &[]), &has);
        assert_eq!(kernel(&plan, "100.64.0.2", false), "tunnel");
        assert_eq!(kernel(&plan, "100.64.0.3", false), "host");
        assert_eq!(plan.conflicts[0].relation, Relation::Inside);
    }

    #[test]
    fn default_routes_stay_out_whole_or_in_pieces() {
        let wants = overlay(
            &[],
            &["0.0.0.0/0", "::/0", "0.0.0.0/1", "8.0.0.0/7", "2000::/3"],
        );
        let plan = plan(&settings(), &wants, &host(&[], &[]));
        assert_eq!(plan.state.routes, BTreeSet::new());
    }

    fn with_exit(takes: [bool; 2], allow_lan: bool) -> Overlay {
        Overlay {
            exit: Some(Exit { takes, allow_lan }),
            ..overlay(&["100.64.0.2"], &["10.20.0.0/16"])
        }
    }

    /// A host on a LAN, with guests on a bridge, static routes and another VPN's halves of the Internet.
    fn busy_host() -> Host {
        let lan = ["192.168.1.0/24", "2001:db8:1::/64", "172.17.0.0/16"];
        let routes = [
            "192.168.1.0/24",
            "172.17.0.0/16",
            "10.50.0.0/16",
            "10.20.7.0/24",
            "0.0.0.0/1",
            "128.0.0.0/1",
        ];
        Host {
            guests: nets(&["172.17.0.0/16"]),
            resolvers: ips(&["192.168.1.1", "8.8.8.8"]),
            dialled: ips(&["203.0.113.9", "2001:db8:9::9"]),
            ..host(&lan, &routes)
        }
    }

    #[test]
    fn with_an_exit_node_all_goes_there_but_the_underlay_and_what_stays_near() {
        for (ip, shut, lan) in [
            ("8.8.8.8", "tunnel", "tunnel"),
            ("200.1.1.1", "tunnel", "tunnel"),
            ("2600::1", "tunnel", "tunnel"),
            ("192.168.1.7", "tunnel", "host"),
            ("192.168.1.1", "tunnel", "host"),
            ("2001:db8:1::7", "tunnel", "host"),
            ("10.50.0.1", "tunnel", "host"),
            ("10.20.7.1", "tunnel", "host"),
            ("10.20.8.1", "tunnel", "tunnel"),
            ("100.64.0.2", "tunnel", "tunnel"),
            ("172.17.0.2", "host", "host"),
            ("203.0.113.9", "tunnel", "tunnel"),
            ("2001:db8:9::9", "tunnel", "tunnel"),
            ("169.254.1.1", "host", "host"),
            ("255.255.255.255", "host", "host"),
            ("224.0.0.251", "tunnel", "host"),
            ("fe80::1", "host", "host"),
        ] {
            for (allow_lan, table) in [(false, shut), (true, lan)] {
                let plan = plan(&settings(), &with_exit([true; 2], allow_lan), &busy_host());
                assert_eq!(kernel(&plan, ip, false), table, "{ip} {allow_lan}");
                assert_eq!(kernel(&plan, ip, true), "host", "{ip} with our mark");
                assert_eq!(plan.kept_out, ips(&[]));
            }
        }
        let told = plan(&settings(), &with_exit([true; 2], true), &busy_host()).conflicts;
        let told: Vec<String> = told.iter().map(Conflict::describe).collect();
        assert!(
            told.contains(&"0.0.0.0/0: the host's 10.50.0.0/16 inside stays in force".to_owned()),
            "{told:?}"
        );
    }

    #[test]
    fn what_the_exit_node_does_not_take_goes_nowhere() {
        for takes in [[true, false], [false, true], [false, false]] {
            for ipv6 in [false, true] {
                let mut has = busy_host();
                has.ipv6 = ipv6;
                let plan = plan(&settings(), &with_exit(takes, false), &has);
                let way = |net: &str| {
                    let net: IpNet = net.parse().unwrap();
                    let found = plan.state.routes.iter().find(|route| route.net == net);
                    found.map(|route| route.way)
                };
                let right = |takes| Some(if takes { Way::Tunnel } else { Way::Unreachable });
                assert_eq!(way("0.0.0.0/0"), right(takes[0]), "{takes:?}");
                assert_eq!(way("::/0"), right(takes[1] && ipv6), "{takes:?} {ipv6}");
                assert_eq!(kernel(&plan, "203.0.113.9", true), "host");
                assert_eq!(kernel(&plan, "100.64.0.2", false), "tunnel");
            }
        }
    }

    #[test]
    fn with_an_exit_node_what_we_dial_is_open_to_all_only_where_answers_would_be_dropped() {
        for (way_back, takes, marked, kept_out) in [
            (WayBack::Unasked, [true; 2], true, &[][..]),
            (WayBack::Unasked, [false; 2], true, &[]),
            (WayBack::Any, [true; 2], true, &[]),
            // Nothing leads there then, for who does not bear the mark.
            (WayBack::Any, [false, true], true, &["203.0.113.9"]),
            (WayBack::Same, [true; 2], true, &["203.0.113.9"]),
            (WayBack::Same, [false; 2], true, &["203.0.113.9"]),
            (
                WayBack::Unasked,
                [true; 2],
                false,
                &["203.0.113.9", "2001:db8:9::9"],
            ),
        ] {
            let mut settings = settings();
            if !marked {
                settings.fwmark = 0;
            }
            let has = Host {
                way_back,
                ..busy_host()
            };
            let plan = plan(&settings, &with_exit(takes, false), &has);
            assert_eq!(plan.kept_out, ips(kept_out), "{way_back:?} {takes:?}");
            let other = kept_out
                .is_empty()
                .then_some(["nowhere", "tunnel"][usize::from(takes[0])]);
            let table = kernel(&plan, "203.0.113.9", false);
            assert_eq!(table, other.unwrap_or("host"), "{way_back:?} {takes:?}");
        }
    }

    #[test]
    fn what_this_node_offers_is_not_routed_into_the_tunnel() {
        let mut wants = overlay(&["100.64.0.2"], &["192.168.7.0/24", "10.0.0.0/8"]);
        wants.offered = nets(&["192.168.7.0/24", "10.5.0.0/16"]);
        let plan = plan(&settings(), &wants, &host(&[], &[]));
        assert_eq!(kernel(&plan, "192.168.7.9", false), "host");
        assert_eq!(kernel(&plan, "10.5.1.1", false), "host");
        assert_eq!(kernel(&plan, "10.6.1.1", false), "tunnel");
    }

    #[test]
    fn a_subnet_of_the_host_keeps_all_of_itself() {
        let wants = overlay(&[], &["192.168.1.0/25", "192.168.1.64/26"]);
        let plan = plan(
            &settings(),
            &wants,
            &host(&["192.168.1.0/24"], &["192.168.1.0/24"]),
        );
        assert_eq!(plan.state.routes, BTreeSet::new());
        let told: Vec<Relation> = plan.conflicts.iter().map(|c| c.relation).collect();
        assert_eq!(told, [Relation::InsideConnected; 2]);
    }

    #[test]
    fn conflicts_are_told_by_kind_and_bounded() {
        let wants = overlay(&[], &["10.0.0.0/8", "192.168.1.0/24", "172.16.5.0/24"]);
        let has = host(
            &["10.3.0.0/16", "192.168.1.0/24"],
            &["172.16.0.0/12", "10.4.0.0/16"],
        );
        let found = plan(&settings(), &wants, &has);
        let told: Vec<(String, Relation)> = found
            .conflicts
            .iter()
            .map(|c| (c.host_route.to_string(), c.relation))
            .collect();
        let expected = [
            ("10.3.0.0/16", Relation::Covers),
            ("10.4.0.0/16", Relation::Covers),
            ("172.16.0.0/12", Relation::Inside),
            ("192.168.1.0/24", Relation::Same),
        ];
        assert_eq!(
            told,
            expected.map(|(net, relation)| (net.to_owned(), relation))
        );
        let many: Vec<String> = (0..200).map(|n| format!("10.{n}.0.0/16")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let found = plan(&settings(), &wants, &host(&[], &many));
        assert_eq!(
            (found.conflicts.len(), found.more_conflicts),
            (CONFLICTS_MAX, 200 - CONFLICTS_MAX)
        );
    }

    #[test]
    fn a_service_of_the_network_is_on_this_host_unless_another_program_has_it() {
        let mut wants = overlay(&["100.64.0.2"], &[]);
        wants.services = ips(&["100.100.100.100", "fd7a:115c:a1e0::53"])
            .into_iter()
            .collect();
        let free = plan(&settings(), &wants, &host(&[], &[]));
        assert!(wants.services.is_subset(&free.state.addresses));
        assert!(free.conflicts.is_empty());
        let taken = plan(&settings(), &wants, &host(&[], &["100.100.100.100/32"]));
        let left: Vec<&IpAddr> = wants
            .services
            .intersection(&taken.state.addresses)
            .collect();
        assert_eq!(left, [&"fd7a:115c:a1e0::53".parse::<IpAddr>().unwrap()]);
        assert_eq!(
            taken.conflicts[0].route,
            "100.100.100.100/32".parse().unwrap()
        );
    }

    #[test]
    fn resolvers_and_dialled_addresses_stay_outside_but_peers_do_not() {
        let wants = overlay(&["100.64.0.2", "10.9.9.9", "10.9.9.53"], &["10.0.0.0/8"]);
        let mut has = host(&[], &[]);
        has.resolvers = ips(&["10.0.0.53", "8.8.8.8", "10.9.9.53", "100.64.0.2"]);
        has.dialled = ips(&["10.0.0.7", "203.0.113.1", "10.0.0.53", "10.9.9.9"]);
        let plan = plan(&settings(), &wants, &has);
        assert_eq!(plan.kept_out, ips(&["10.0.0.7", "10.0.0.53", "10.9.9.53"]));
        for (ip, table) in [
            ("10.0.0.53", "host"),
            ("10.0.0.7", "host"),
            ("10.0.0.8", "tunnel"),
            ("10.9.9.9", "tunnel"),
            // Some network calls one of its nodes as the host's resolver is called.
            ("10.9.9.53", "host"),
            ("100.64.0.2", "tunnel"),
        ] {
            assert_eq!(kernel(&plan, ip, false), table, "{ip}");
        }
    }

    #[test]
    fn no_node_has_an_address_of_a_subnet_or_a_resolver_of_the_host() {
        let mut wants = overlay(&["192.168.1.1", "fd01::1", "100.64.0.2"], &[]);
        wants.addresses = ips(&["192.168.1.5", "9.9.9.9", "100.64.0.1"])
            .into_iter()
            .collect();
        let mut has = host(&["192.168.1.0/24", "fd01::/64", "100.64.0.0/20"], &[]);
        has.resolvers = ips(&["9.9.9.9"]);
        let plan = plan(&settings(), &wants, &has);
        assert_eq!(
            plan.state.addresses,
            ips(&["100.64.0.1"]).into_iter().collect()
        );
        let routed: Vec<IpNet> = plan.state.routes.iter().map(|route| route.net).collect();
        assert_eq!(routed, ["100.64.0.2/32".parse().unwrap()]);
        let told: Vec<Relation> = plan.conflicts.iter().map(|c| c.relation).collect();
        let subnet = Relation::InsideConnected;
        assert_eq!(
            told,
            [Relation::Resolver, subnet, Relation::Inside, subnet, subnet]
        );
    }

    #[test]
    fn without_policy_rules_only_peers_are_routed() {
        let mut settings = settings();
        settings.rules = [false, true];
        let wants = overlay(&["100.64.0.2", "fd7a::2"], &["10.0.0.0/8", "fd00::/48"]);
        let plan = plan(&settings, &wants, &host(&[], &[]));
        let routes: Vec<String> = plan
            .state
            .routes
            .iter()
            .map(|r| format!("{} {}", r.net, r.table))
            .collect();
        assert_eq!(
            routes,
            ["100.64.0.2/32 254", "fd00::/48 52", "fd7a::2/128 52"]
        );
        assert!(plan.state.rules.iter().all(|rule| rule.v6));
    }

    #[test]
    fn a_host_without_ipv6_gets_none() {
        let wants = overlay(&["fd7a::2"], &["fd00::/48"]);
        let mut has = host(&[], &[]);
        has.ipv6 = false;
        let plan = plan(&settings(), &wants, &has);
        assert_eq!(plan.state.routes, BTreeSet::new());
        assert_eq!(
            plan.state.addresses,
            ips(&["100.64.0.1"]).into_iter().collect()
        );
    }
}
