//! From what is there to what is wanted, in an order that harms nobody on the way.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Action, Route, Rule, State, Way, lies_in};
use crate::netmap::prefix::{V4_RANGE, V6_RANGE};

/// Commands told to people at most.
const BY_HAND_MAX: usize = 16;

/// One change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Give the TUN an address.
    AddAddress(IpAddr),
    /// Take one from it.
    DeleteAddress(IpAddr),
    /// Add a rule.
    AddRule(Rule),
    /// Remove a rule.
    DeleteRule(Rule),
    /// Add a route.
    AddRoute(Route),
    /// Remove a route.
    DeleteRoute(Route),
}

/// The changes, in order: what protects the host comes before what it is protected from, and goes
/// after it. The jumps are there before the rule that they jump over; a throw route comes before the
/// route around it.
pub fn steps(wanted: &State, there: &State) -> Vec<Step> {
    let mut new_rules: Vec<Rule> = wanted.rules.difference(&there.rules).copied().collect();
    new_rules.sort_by_key(|rule| (rank(rule), *rule));
    let mut old_rules: Vec<Rule> = there.rules.difference(&wanted.rules).copied().collect();
    old_rules.sort_by_key(|rule| (std::cmp::Reverse(rank(rule)), *rule));
    let mut new_routes: Vec<Route> = wanted.routes.difference(&there.routes).copied().collect();
    new_routes.sort_by_key(|route| (route.way, *route));
    let mut old_routes: Vec<Route> = there.routes.difference(&wanted.routes).copied().collect();
    old_routes.sort_by_key(|route| (std::cmp::Reverse(route.way), *route));
    let new_addresses = wanted.addresses.difference(&there.addresses);
    let old_addresses = there.addresses.difference(&wanted.addresses);
    new_addresses
        .map(|address| Step::AddAddress(*address))
        .chain(new_rules.into_iter().map(Step::AddRule))
        .chain(new_routes.into_iter().map(Step::AddRoute))
        .chain(old_routes.into_iter().map(Step::DeleteRoute))
        .chain(old_rules.into_iter().map(Step::DeleteRule))
        .chain(old_addresses.map(|address| Step::DeleteAddress(*address)))
        .collect()
}

/// The commands by which somebody who may does what this process may not, for the TUN `tun`. `led` is what leads into
/// it already. A range that is there for networks like ours is one route: peers come and go.
pub fn by_hand(tun: &str, denied: &[Step], led: &BTreeSet<IpNet>) -> Vec<String> {
    let mut commands: Vec<String> = Vec::new();
    for step in denied {
        let command = match step {
            Step::AddAddress(ip) => format!("ip address add {} dev {tun}", IpNet::from(*ip)),
            Step::AddRoute(route) if route.way == Way::Tunnel && !lies_in(led, &route.net) => {
                let ranges = [IpNet::V4(V4_RANGE), IpNet::V6(V6_RANGE)];
                let range = ranges.into_iter().find(|range| range.contains(&route.net));
                format!("ip route add {} dev {tun}", range.unwrap_or(route.net))
            }
            Step::AddRoute(_)
            | Step::AddRule(_)
            | Step::DeleteAddress(_)
            | Step::DeleteRule(_)
            | Step::DeleteRoute(_) => continue,
        };
        if commands.len() < BY_HAND_MAX && !commands.contains(&command) {
            commands.push(command);
        }
    }
    commands
}

/// Rules of a lower rank are there while one of a higher is.
fn rank(rule: &Rule) -> u8 {
    match rule.action {
        Action::Nop => 0,
        Action::Goto(_) => 1,
        Action::Table(_) => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hostnet::{Exit, Host, MAIN, Overlay, Way, plan, settings};

    fn plan_of(routes: &[&str], offered: &[&str]) -> State {
        let overlay = Overlay {
            routes: routes.iter().map(|net| net.parse().unwrap()).collect(),
            offered: offered.iter().map(|net| net.parse().unwrap()).collect(),
            ..Overlay::default()
        };
        let host = Host {
            ipv6: true,
            ..Host::default()
        };
        plan(&settings(), &overlay, &host).state
    }

    /// Applies steps one by one and looks after each: no rule leads into our table without the jumps over it,
    /// and no route into the tunnel is there without the throw routes inside.
    fn walk(from: &State, to: &State) {
        let mut now = from.clone();
        for step in steps(to, from) {
            match step {
                Step::AddAddress(address) => assert!(now.addresses.insert(address)),
                Step::DeleteAddress(address) => assert!(now.addresses.remove(&address)),
                Step::AddRule(rule) => assert!(now.rules.insert(rule)),
                Step::DeleteRule(rule) => assert!(now.rules.remove(&rule)),
                Step::AddRoute(route) => assert!(now.routes.insert(route)),
                Step::DeleteRoute(route) => assert!(now.routes.remove(&route)),
            }
            let leads = |rule: &&Rule| rule.action == Action::Table(52);
            for rule in now.rules.iter().filter(leads) {
                let jumps = |r: &&Rule| r.v6 == rule.v6 && matches!(r.action, Action::Goto(_));
                assert_eq!(now.rules.iter().filter(jumps).count(), 2, "{step:?}");
                assert!(
                    now.rules.iter().any(|r| r.action == Action::Nop),
                    "{step:?}"
                );
            }
            for state in [from, to] {
                for throw in state.routes.iter().filter(|r| r.way == Way::Throw) {
                    let covers = |r: &&Route| r.way > Way::Throw && r.net.contains(&throw.net);
                    if state == to
                        && now
                            .routes
                            .iter()
                            .any(|r| covers(&r) && to.routes.contains(r))
                    {
                        assert!(now.routes.contains(throw), "{step:?} bares {throw:?}");
                    }
                }
            }
        }
        assert_eq!(&now, to);
    }

    #[test]
    fn what_is_denied_is_said_as_commands_without_what_somebody_did() {
        let route = |net: &str, way| {
            Step::AddRoute(Route {
                net: net.parse().unwrap(),
                table: MAIN,
                way,
            })
        };
        let denied = [
            Step::AddAddress("100.64.0.1".parse().unwrap()),
            Step::AddAddress("fd7a:115c:a1e0::1".parse().unwrap()),
            route("100.64.0.2/32", Way::Tunnel),
            route("100.64.0.3/32", Way::Tunnel),
            route("10.77.0.2/32", Way::Tunnel),
            route("10.0.0.0/8", Way::Throw),
            Step::DeleteAddress("100.64.0.9".parse().unwrap()),
        ];
        let led = |nets: &[&str]| nets.iter().map(|net| net.parse().unwrap()).collect();
        let addresses = [
            "ip address add 100.64.0.1/32 dev tun7",
            "ip address add fd7a:115c:a1e0::1/128 dev tun7",
        ];
        let routes = [
            "ip route add 100.64.0.0/10 dev tun7",
            "ip route add 10.77.0.2/32 dev tun7",
        ];
        let all = by_hand("tun7", &denied, &led(&[]));
        assert_eq!(all, [addresses, routes].concat());
        let rest = by_hand("tun7", &denied, &led(&["100.64.0.0/10", "10.77.0.2/32"]));
        assert_eq!(rest, addresses);
        let many = (0..99).map(|last| Step::AddAddress([10, 9, 9, last].into()));
        let many: Vec<Step> = many.collect();
        assert_eq!(by_hand("tun7", &many, &led(&[])).len(), BY_HAND_MAX);
    }

    #[test]
    fn nothing_is_bare_on_the_way_between_any_two_states() {
        let exit = |takes| {
            let overlay = Overlay {
                exit: Some(Exit {
                    takes,
                    allow_lan: true,
                }),
                ..Overlay::default()
            };
            let host = Host {
                ipv6: true,
                connected: ["192.168.1.0/24".parse().unwrap()].into(),
                dialled: vec!["203.0.113.9".parse().unwrap()],
                ..Host::default()
            };
            plan(&settings(), &overlay, &host).state
        };
        let states = [
            exit([true, true]),
            exit([true, false]),
            exit([false, false]),
            State::default(),
            plan_of(&["10.0.0.0/8", "fd00::/48"], &["10.5.0.0/16"]),
            plan_of(
                &["10.0.0.0/8", "192.168.7.0/24"],
                &["10.5.0.0/16", "192.168.7.0/24"],
            ),
            plan_of(&["10.5.0.0/16"], &[]),
        ];
        for from in &states {
            for to in &states {
                walk(from, to);
            }
        }
        assert_eq!(steps(&states[4], &states[4]), []);
        // From one way out to none, and back: at every moment something says where the Internet is.
        let defaults = |state: &State| {
            let all = state.routes.iter();
            all.filter(|route| route.net.prefix_len() == 0 && !route.net.addr().is_ipv6())
                .count()
        };
        for (from, to) in [(0, 2), (2, 0)] {
            let mut now = states[from].clone();
            for step in steps(&states[to], &states[from]) {
                match step {
                    Step::AddRoute(route) => _ = now.routes.insert(route),
                    Step::DeleteRoute(route) => _ = now.routes.remove(&route),
                    Step::AddAddress(_)
                    | Step::DeleteAddress(_)
                    | Step::AddRule(_)
                    | Step::DeleteRule(_) => {}
                }
                assert!(defaults(&now) >= 1, "{step:?}");
            }
        }
    }
}
