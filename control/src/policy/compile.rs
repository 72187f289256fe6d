//! From a policy and the nodes there are to each node's packet filter, and to who sees whom.
//!
//! A node's filter has the rules with destinations that are its own addresses, in its subnet routes, or
//! for an exit node on the internet. Two nodes see each other when a rule lets one reach the other, or a
//! subnet behind one, or the internet through an exit node; a peer's subnet is told to whom a rule lets
//! reach it or be reached from it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use super::ranges::{Ranges, text};
use super::{Alias, Owner, PARTS_MAX, Policy, Rule};
use crate::netmap::prefix::{V4_RANGE, V6_RANGE};
use crate::netmap::wire::{FilterRule, PortDestination, PortRange};

/// Inside the range of nodes, yet never one's: virtual machines of ChromeOS are there.
const CHROME_OS: IpNet = IpNet::V4(Ipv4Net::new_assert(
    std::net::Ipv4Addr::new(100, 115, 92, 0),
    23,
));

/// What of the address space is no internet: private, link-local, nodes. Of IPv6 only 2000::/3 is.
const NOT_INTERNET: [&str; 5] = [
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "169.254.0.0/16",
];

/// Sources of a rule whose nodes are held at a time, before they are merged.
const SOURCES_AT_ONCE: usize = 256;

fn internet() -> Ranges {
    let net = |text: &str| text.parse::<IpNet>().expect("written here");
    let all = [net("0.0.0.0/0"), net("2000::/3")];
    Ranges::of(&all).without(&NOT_INTERNET.map(net))
}

/// What of a node matters to a policy.
#[derive(Clone, Debug)]
pub struct PolicyNode {
    /// Its id.
    pub id: i64,
    /// Its own, inside the network.
    pub addresses: [IpAddr; 2],
    /// Name of its owner, of no matter to one with tags.
    pub user: String,
    /// Its tags.
    pub tags: Vec<String>,
    /// Announced and approved.
    pub routes: Vec<IpNet>,
}

impl PolicyNode {
    fn subnets(&self) -> impl Iterator<Item = &IpNet> {
        self.routes.iter().filter(|route| route.prefix_len() > 0)
    }

    fn is_exit(&self) -> bool {
        self.routes.iter().any(|route| route.prefix_len() == 0)
    }

    /// Whether it, or a subnet behind it, is in the set.
    fn is_in(&self, set: &Ranges) -> bool {
        self.addresses.iter().any(|addr| set.contains(*addr))
            || self.subnets().any(|route| set.overlaps(route))
    }
}

/// What a destination of a rule is compared with.
#[derive(Debug)]
struct Destination {
    set: Ranges,
    is_internet: bool,
    wire: PortDestination,
}

/// A rule with addresses in the place of names.
#[derive(Debug)]
struct Flow {
    sources: Ranges,
    /// On the wire, with subnets that `*` means beside it.
    wire_sources: Vec<String>,
    protocol: Option<u8>,
    destinations: Vec<Destination>,
    /// All of them.
    reach: Ranges,
    reaches_internet: bool,
}

/// A policy in force, for the nodes that there were.
#[derive(Debug)]
pub struct Compiled {
    nodes: Vec<PolicyNode>,
    index: BTreeMap<i64, usize>,
    /// None: all may do everything.
    flows: Option<Vec<Flow>>,
    /// Whom each node sees, a bit for each.
    sees: Vec<Vec<u64>>,
    left_out: usize,
}

impl Compiled {
    /// The policy for these nodes.
    pub fn new(policy: &Policy, nodes: Vec<PolicyNode>) -> Self {
        let index = nodes.iter().enumerate().map(|(at, node)| (node.id, at));
        let mut compiled = Self {
            index: index.collect(),
            flows: None,
            sees: Vec::new(),
            left_out: 0,
            nodes,
        };
        if let Some(rules) = &policy.rules {
            compiled.flows = Some(compiled.flows_of(policy, rules));
            compiled.look_around();
        }
        compiled
    }

    /// Rules that were left out because the policy would have more than [`PARTS_MAX`] parts with the
    /// nodes there are: they let nobody in.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// Whether one is told of the other.
    pub fn sees(&self, viewer: i64, peer: i64) -> bool {
        if self.flows.is_none() {
            return true;
        }
        let (Some(viewer), Some(peer)) = (self.index.get(&viewer), self.index.get(&peer)) else {
            return false;
        };
        let row = self.sees.get(*viewer);
        row.is_some_and(|row| row[peer / 64] >> (peer % 64) & 1 == 1)
    }

    /// Whether a subnet behind a peer is told to this node.
    pub fn may_use(&self, viewer: i64, route: &IpNet) -> bool {
        let Some(flows) = &self.flows else {
            return true;
        };
        let Some(node) = self.index.get(&viewer).map(|at| &self.nodes[*at]) else {
            return false;
        };
        flows.iter().any(|flow| {
            (node.is_in(&flow.sources) && flow.reach.overlaps(route))
                || (flow.sources.overlaps(route) && node.is_in(&flow.reach))
        })
    }

    /// The packet filter of a node.
    pub fn filter(&self, id: i64) -> Vec<FilterRule> {
        let Some(flows) = &self.flows else {
            return vec![FilterRule::allow_all()];
        };
        let Some(node) = self.index.get(&id).map(|at| &self.nodes[*at]) else {
            return Vec::new();
        };
        let mut rules = Vec::new();
        for flow in flows {
            let is_its = |destination: &&Destination| {
                node.is_in(&destination.set) || (destination.is_internet && node.is_exit())
            };
            let own = flow.destinations.iter().filter(is_its);
            let own: Vec<PortDestination> = own.map(|of| of.wire.clone()).collect();
            if !own.is_empty() {
                rules.push(FilterRule {
                    src_ips: flow.wire_sources.clone(),
                    dst_ports: own,
                    ip_proto: flow.protocol.into_iter().map(i64::from).collect(),
                    ..FilterRule::default()
                });
            }
        }
        rules
    }

    fn flows_of(&mut self, policy: &Policy, rules: &[Rule]) -> Vec<Flow> {
        let names = Names::new(policy, &self.nodes);
        let mut taken = Taken::default();
        for rule in rules {
            names.flows(rule, &mut taken);
        }
        self.left_out = taken.left_out;
        taken.flows
    }

    fn look_around(&mut self) {
        let words = self.nodes.len().div_ceil(64);
        let mut sees = vec![vec![0_u64; words]; self.nodes.len()];
        for flow in self.flows.iter().flatten() {
            let (mut from, mut to) = (vec![0_u64; words], vec![0_u64; words]);
            for (at, node) in self.nodes.iter().enumerate() {
                if node.is_in(&flow.sources) {
                    from[at / 64] |= 1 << (at % 64);
                }
                if node.is_in(&flow.reach) || (flow.reaches_internet && node.is_exit()) {
                    to[at / 64] |= 1 << (at % 64);
                }
            }
            let is_in = |set: &[u64], at: usize| set[at / 64] >> (at % 64) & 1 == 1;
            for (at, row) in sees.iter_mut().enumerate() {
                for (own, more) in [(&from, &to), (&to, &from)] {
                    if is_in(own, at) {
                        row.iter_mut()
                            .zip(more)
                            .for_each(|(bits, more)| *bits |= more);
                    }
                }
            }
        }
        self.sees = sees;
    }
}

/// Whom names stand for, among the nodes there are.
struct Names<'a> {
    policy: &'a Policy,
    nodes: &'a [PolicyNode],
    /// Nodes without tags, by owner.
    users: BTreeMap<&'a str, Ranges>,
    tags: BTreeMap<&'a str, Ranges>,
    member: Ranges,
    tagged: Ranges,
    any: Ranges,
    internet: Ranges,
    /// As [`Alias::Any`] is a source, it means these as well.
    subnets: Vec<String>,
}

impl<'a> Names<'a> {
    fn new(policy: &'a Policy, nodes: &'a [PolicyNode]) -> Self {
        let mut users: BTreeMap<&str, Vec<IpNet>> = BTreeMap::new();
        let mut tags: BTreeMap<&str, Vec<IpNet>> = BTreeMap::new();
        let (mut member, mut tagged) = (Vec::new(), Vec::new());
        let mut subnets: Vec<&IpNet> = Vec::new();
        for node in nodes {
            let own = node.addresses.map(IpNet::from);
            if node.tags.is_empty() {
                users.entry(&node.user).or_default().extend(own);
                member.extend(own);
            } else {
                tagged.extend(own);
            }
            for tag in &node.tags {
                tags.entry(tag).or_default().extend(own);
            }
            subnets.extend(node.subnets());
        }
        subnets.sort_unstable();
        subnets.dedup();
        let sets = |of: BTreeMap<&'a str, Vec<IpNet>>| {
            let sets = of.into_iter().map(|(name, nets)| (name, Ranges::of(&nets)));
            sets.collect()
        };
        let any = [IpNet::V4(V4_RANGE), IpNet::V6(V6_RANGE)];
        Self {
            policy,
            nodes,
            users: sets(users),
            tags: sets(tags),
            member: Ranges::of(&member),
            tagged: Ranges::of(&tagged),
            any: Ranges::of(&any).without(&[CHROME_OS]),
            internet: internet(),
            subnets: subnets.into_iter().map(text).collect(),
        }
    }

    fn set(&self, alias: &Alias) -> Ranges {
        let empty = Ranges::default;
        match alias {
            Alias::Any => self.any.clone(),
            Alias::Prefix(net) => Ranges::of([net]),
            Alias::Member => self.member.clone(),
            Alias::Tagged => self.tagged.clone(),
            Alias::Internet => self.internet.clone(),
            Alias::Own => empty(),
            Alias::Of(Owner::User(name)) => {
                self.users.get(name.as_str()).cloned().unwrap_or_else(empty)
            }
            Alias::Of(Owner::Tag(tag)) => {
                self.tags.get(tag.as_str()).cloned().unwrap_or_else(empty)
            }
            Alias::Of(Owner::Group(group)) => {
                let members = self.policy.groups.get(group).into_iter().flatten();
                Ranges::union(members.filter_map(|name| self.users.get(name.as_str())))
            }
        }
    }

    /// What a rule comes to: one flow, and one for each user whose nodes may reach each other by it.
    fn flows(&self, rule: &Rule, taken: &mut Taken) {
        // Some at a time, since each may stand for everybody.
        let mut sources = Ranges::default();
        for aliases in rule.sources.chunks(SOURCES_AT_ONCE) {
            let sets: Vec<Ranges> = aliases.iter().map(|alias| self.set(alias)).collect();
            sources = Ranges::union(sets.iter().chain([&sources]));
        }
        let mut wire_sources: Vec<String> = sources.prefixes().iter().map(text).collect();
        if rule.sources.contains(&Alias::Any) {
            wire_sources.extend(self.subnets.iter().cloned());
            // So does what is compared with it.
            let nets = self.nodes.iter().flat_map(PolicyNode::subnets);
            sources = Ranges::union([&sources, &Ranges::of(nets)]);
        }
        let others = rule.destinations.iter();
        let others = others.filter(|(alias, _)| *alias != Alias::Own);
        let to = others.map(|(alias, ports)| (self.places(alias), ports.as_slice()));
        taken.flow(&sources, wire_sources, rule.protocol, to);
        let own = rule.destinations.iter();
        let own = own.filter(|(alias, _)| *alias == Alias::Own);
        let ports: Vec<PortRange> = own.flat_map(|(_, ports)| ports).copied().collect();
        if ports.is_empty() {
            return;
        }
        for (user, set) in &self.users {
            let of_user = |node: &&PolicyNode| node.tags.is_empty() && node.user == *user;
            let own = self.nodes.iter().filter(of_user);
            let own = own.flat_map(|node| node.addresses.map(IpNet::from));
            let from: Vec<IpNet> = own.filter(|net| sources.overlaps(net)).collect();
            let from = Ranges::of(&from);
            let wire = from.prefixes().iter().map(text).collect();
            let to = [(places_of(set, false), ports.as_slice())];
            taken.flow(&from, wire, rule.protocol, to);
        }
    }

    fn places(&self, alias: &Alias) -> Vec<Place> {
        if *alias == Alias::Any {
            let all = ["0.0.0.0/0", "::/0"].map(|net| net.parse().expect("written here"));
            return vec![Place {
                set: Ranges::of(&all),
                is_internet: true,
                ip: "*".to_owned(),
            }];
        }
        let set = self.set(alias);
        let inside = |net: &IpNet| self.internet.covers(&Ranges::of([net]));
        let is_internet = set.prefixes().iter().all(inside);
        places_of(&set, is_internet)
    }
}

/// A destination of a rule without its ports.
struct Place {
    set: Ranges,
    is_internet: bool,
    ip: String,
}

impl Place {
    fn with(&self, ports: PortRange) -> Destination {
        Destination {
            set: self.set.clone(),
            is_internet: self.is_internet,
            wire: PortDestination {
                ip: self.ip.clone(),
                ports,
                ..PortDestination::default()
            },
        }
    }
}

fn places_of(set: &Ranges, is_internet: bool) -> Vec<Place> {
    let each = set.prefixes().into_iter().map(|net| Place {
        set: Ranges::of([&net]),
        is_internet,
        ip: text(&net),
    });
    each.collect()
}

/// The flows of a policy within [`PARTS_MAX`]: from the first on that is too much all are left out.
#[derive(Default)]
struct Taken {
    flows: Vec<Flow>,
    parts: usize,
    left_out: usize,
}

impl Taken {
    /// Takes a flow from `sources` to each of the places at each port beside it, or leaves it out. What it comes to
    /// is counted before it is unfolded: a place and a port may have a part each, and together millions.
    fn flow<'a>(
        &mut self,
        sources: &Ranges,
        wire_sources: Vec<String>,
        protocol: Option<u8>,
        to: impl IntoIterator<Item = (Vec<Place>, &'a [PortRange])>,
    ) {
        if sources.is_empty() {
            return;
        }
        let mut parts = self.parts.saturating_add(wire_sources.len());
        let mut destinations = Vec::new();
        for (places, ports) in to {
            parts = parts.saturating_add(places.len().saturating_mul(ports.len()));
            if parts > PARTS_MAX {
                (self.parts, self.left_out) = (parts, self.left_out + 1);
                return;
            }
            let each = |place: &Place| {
                ports
                    .iter()
                    .map(|ports| place.with(*ports))
                    .collect::<Vec<_>>()
            };
            destinations.extend(places.iter().flat_map(each));
        }
        if destinations.is_empty() {
            return;
        }
        self.parts = parts;
        let reach = Ranges::union(destinations.iter().map(|destination| &destination.set));
        let all = ["0.0.0.0/0", "::/0"].map(|net| net.parse::<IpNet>().expect("written here"));
        let mut all = all.iter().map(|net| Ranges::of([net]));
        let reaches_internet = all.any(|all| reach.covers(&all)) || reach.covers(&internet());
        self.flows.push(Flow {
            sources: sources.clone(),
            wire_sources,
            protocol,
            destinations,
            reach,
            reaches_internet,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random_lists;

    fn node(id: u8, user: &str, tags: &[&str], routes: &[&str]) -> PolicyNode {
        PolicyNode {
            id: id.into(),
            addresses: [
                [100, 64, 0, id].into(),
                [0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, id.into()].into(),
            ],
            user: user.to_owned(),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            routes: routes.iter().map(|net| net.parse().unwrap()).collect(),
        }
    }

    fn compile(text: &str, nodes: &[PolicyNode]) -> Compiled {
        let text = format!(
            r#"{{"groups": {{"group:ops": ["ann@", "bob@"]}}, "tagOwners": {{"tag:web": [], "tag:db": []}}, {text}}}"#
        );
        Compiled::new(&Policy::parse(&text).unwrap(), nodes.to_vec())
    }

    fn accepts(rules: &[FilterRule], from: IpAddr, to: IpAddr, protocol: i64, port: u16) -> bool {
        let is_in = |text: &str, addr: IpAddr| {
            let net = text.parse::<IpNet>().ok();
            text == "*" || text.parse() == Ok(addr) || net.is_some_and(|net| net.contains(&addr))
        };
        rules.iter().any(|rule| {
            let usual = rule.ip_proto.is_empty() && [1, 6, 17, 58].contains(&protocol);
            (usual || rule.ip_proto.contains(&protocol))
                && rule.src_ips.iter().any(|text| is_in(text, from))
                && rule
                    .dst_ports
                    .iter()
                    .any(|of| is_in(&of.ip, to) && (of.ports.first..=of.ports.last).contains(&port))
        })
    }

    #[test]
    fn without_rules_all_is_open_and_with_none_all_is_shut() {
        let nodes = [node(1, "ann", &[], &[]), node(2, "bob", &[], &[])];
        let open = Compiled::new(&Policy::default(), nodes.to_vec());
        assert!(open.sees(1, 2) && open.filter(1) == [FilterRule::allow_all()]);
        let shut = compile(r#""acls": []"#, &nodes);
        assert!(!shut.sees(1, 2) && shut.filter(1).is_empty());
        assert!(!shut.may_use(1, &"10.0.0.0/8".parse().unwrap()));
    }

    #[test]
    fn routers_and_exits_get_the_rules_for_what_is_behind_them() {
        let nodes = [
            node(1, "ann", &[], &[]),
            node(2, "bob", &[], &["10.20.0.0/16"]),
            node(3, "cem", &[], &["0.0.0.0/0", "::/0"]),
            node(4, "cem", &[], &[]),
        ];
        let policy = compile(
            r#""acls": [{"action":"accept","src":["ann@"],"dst":["10.20.3.0/24:22"]},
                        {"action":"accept","src":["bob@"],"dst":["autogroup:internet:*"]},
                        {"action":"accept","src":["10.20.0.0/16"],"dst":["cem@:80"]}]"#,
            &nodes,
        );
        let ann = nodes[0].addresses[0];
        let lan = |text: &str| text.parse::<IpAddr>().unwrap();
        let router = policy.filter(2);
        assert!(accepts(&router, ann, lan("10.20.3.7"), 6, 22));
        assert!(!accepts(&router, ann, lan("10.20.4.7"), 6, 22));
        assert!(!accepts(&router, ann, nodes[1].addresses[0], 6, 22));
        let exit = policy.filter(3);
        let bob = nodes[1].addresses[1];
        assert!(accepts(&exit, bob, lan("2001:db8::1"), 17, 53));
        assert!(!accepts(&exit, bob, lan("fd00::1"), 17, 53));
        assert!(!accepts(&exit, bob, lan("192.168.1.1"), 17, 53));
        assert!(accepts(
            &exit,
            lan("10.20.9.9"),
            nodes[2].addresses[0],
            6,
            80
        ));
        assert!(policy.filter(1).is_empty());
        // Who may reach a subnet sees its router, who uses an exit sees that, and who is reached from a
        // subnet sees its router, too.
        let pairs = [(1, 2), (2, 3), (2, 4)];
        for a in 1..=4 {
            for b in 1..=4 {
                if a == b {
                    continue;
                }
                let expected = pairs.contains(&(a, b)) || pairs.contains(&(b, a));
                assert_eq!(policy.sees(a, b), expected, "{a} {b}");
            }
        }
        let net = "10.20.0.0/16".parse().unwrap();
        assert!(policy.may_use(1, &net) && policy.may_use(3, &net) && policy.may_use(4, &net));
        let nobody = compile(
            r#""acls": [{"action":"accept","src":["ann@"],"dst":["bob@:*"]}]"#,
            &nodes,
        );
        assert!(nobody.sees(1, 2) && !nobody.may_use(1, &net));
    }

    #[test]
    fn everybody_as_source_is_nodes_and_approved_subnets() {
        let nodes = [
            node(1, "ann", &[], &["10.20.0.0/16"]),
            node(2, "bob", &[], &[]),
        ];
        let policy = compile(
            r#""acls": [{"action":"accept","src":["*"],"dst":["bob@:*"]}]"#,
            &nodes,
        );
        let filter = policy.filter(2);
        let from = |text: &str| {
            let to = nodes[1].addresses[0];
            accepts(&filter, text.parse().unwrap(), to, 6, 1)
        };
        assert!(from("100.64.0.1") && from("fd7a:115c:a1e0::9") && from("10.20.0.9"));
        assert!(!from("10.21.0.9") && !from("192.0.2.1") && !from("100.115.92.1"));
    }

    #[test]
    fn what_would_be_too_much_is_left_out_and_lets_nobody_in() {
        // Every second address, so that they do not merge.
        let nodes: Vec<PolicyNode> = (0..100).map(|n| node(2 * n, "ann", &[], &[])).collect();
        let rule = r#"{"action":"accept","src":["ann@"],"dst":["ann@:22"]},"#;
        let policy = compile(&format!(r#""acls": [{}]"#, rule.repeat(300)), &nodes);
        assert_eq!(policy.left_out(), 300 - PARTS_MAX / 400);
        assert_eq!(policy.filter(2).len(), PARTS_MAX / 400);
    }

    #[test]
    fn what_would_be_too_much_is_not_unfolded_first() {
        let ports = vec![
            PortRange {
                first: 22,
                last: 22
            };
            PARTS_MAX / 2
        ];
        let places = || {
            let nets: Vec<IpNet> = (0..3_u8)
                .map(|n| IpNet::from(IpAddr::from([100, 64, 0, 2 * n])))
                .collect();
            places_of(&Ranges::of(&nets), false)
        };
        let sources = Ranges::of(&[IpNet::V4(V4_RANGE)]);
        let mut taken = Taken::default();
        let beyond = std::iter::from_fn(|| panic!("what is beyond the bound is not looked at"));
        let to = std::iter::once((places(), ports.as_slice())).chain(beyond);
        taken.flow(&sources, vec!["*".to_owned()], None, to);
        assert_eq!((taken.flows.len(), taken.left_out), (0, 1));
        taken.flow(
            &sources,
            vec!["*".to_owned()],
            None,
            [(places(), &ports[..1])],
        );
        assert_eq!(
            (taken.flows.len(), taken.left_out),
            (0, 2),
            "as all that follows"
        );
        // By itself: some 10^7 parts of 10^2 bytes.
        let nodes: Vec<PolicyNode> = (0..100).map(|n| node(2 * n, "ann", &[], &[])).collect();
        let ports: Vec<String> = (1..=30_000).map(|n| (2 * n).to_string()).collect();
        let ports = ports.join(",");
        let policy = compile(
            &format!(r#""acls": [{{"action":"accept","src":["ann@"],"dst":["ann@:{ports}"]}}]"#),
            &nodes,
        );
        assert_eq!((policy.left_out(), policy.filter(2)), (1, Vec::new()));
    }

    /// A source or destination of a rule, and whether it means a node.
    fn name(choice: u8, as_source: bool) -> (&'static str, fn(&PolicyNode, &PolicyNode) -> bool) {
        match choice % 8 {
            0 => ("*", |_, _| true),
            1 => ("ann@", |node, _| node.tags.is_empty() && node.user == "ann"),
            2 => ("group:ops", |node, _| {
                node.tags.is_empty() && ["ann", "bob"].contains(&node.user.as_str())
            }),
            3 => ("tag:web", |node, _| {
                node.tags.contains(&"tag:web".to_owned())
            }),
            4 => ("autogroup:member", |node, _| node.tags.is_empty()),
            5 => ("autogroup:tagged", |node, _| !node.tags.is_empty()),
            6 if !as_source => ("autogroup:self", |node, from| {
                node.tags.is_empty() && from.tags.is_empty() && node.user == from.user
            }),
            _ => ("100.64.0.2", |node, _| node.id == 2),
        }
    }

    #[test]
    fn filters_admit_what_the_rules_say_in_words() {
        let nodes = [
            node(1, "ann", &[], &[]),
            node(2, "ann", &[], &[]),
            node(3, "bob", &[], &[]),
            node(4, "cem", &[], &[]),
            node(5, "ann", &["tag:web"], &[]),
            node(6, "bob", &["tag:db", "tag:web"], &[]),
        ];
        random_lists(200, 24, |bytes| {
            let (mut text, mut rules) = (Vec::new(), Vec::new());
            for of in bytes.chunks_exact(4) {
                let (source, from) = name(of[0], true);
                let (destination, to) = name(of[1], false);
                let own_only = [0, 1, 2, 4].contains(&(of[0] % 8));
                if destination == "autogroup:self" && !own_only {
                    continue;
                }
                let (proto, numbers): (_, &[i64]) = match of[2] % 3 {
                    0 => ("", &[1, 6, 17]),
                    1 => ("tcp", &[6]),
                    _ => ("47", &[47]),
                };
                let ports = if proto == "47" || of[3] & 1 == 0 {
                    "*"
                } else {
                    "22"
                };
                text.push(format!(
                    r#"{{"action":"accept","proto":"{proto}","src":["{source}"],"dst":["{destination}:{ports}"]}}"#
                ));
                rules.push((from, to, numbers, ports, source, destination));
            }
            let policy = compile(&format!(r#""acls": [{}]"#, text.join(",")), &nodes);
            for from in &nodes {
                for to in &nodes {
                    let mut seen = false;
                    for (protocol, port) in [(6, 22), (6, 80), (17, 22), (1, 0), (47, 0)] {
                        for family in 0..2 {
                            let expected = rules.iter().any(
                                |(is_from, is_to, numbers, ports, source, destination)| {
                                    // An address is that one alone, not the node's other.
                                    let plain = |name: &str| name != "100.64.0.2" || family == 0;
                                    numbers.contains(&protocol)
                                        && (*ports == "*" || port == 22)
                                        && is_from(from, from)
                                        && plain(source)
                                        && is_to(to, from)
                                        && plain(destination)
                                },
                            );
                            let (a, b) = (from.addresses[family], to.addresses[family]);
                            let filter = policy.filter(to.id);
                            assert_eq!(
                                accepts(&filter, a, b, protocol, port),
                                expected,
                                "{} to {}, {protocol} {port}: {text:?}",
                                from.id,
                                to.id
                            );
                            seen |= expected;
                        }
                    }
                    if seen {
                        assert!(policy.sees(from.id, to.id) && policy.sees(to.id, from.id));
                    }
                }
            }
        });
    }
}
