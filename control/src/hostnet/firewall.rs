//! What nftables is to hold for us: a table of our own, and where the host's own firewall would drop
//! what is for the tunnel, rules of ours before its others.
//!
//! **Our table** (`ringtail-` and the number of the routing table) says: who may bear an address of the network's
//! ranges ([`guard`]); what of the forwarded we drop and count; that TCP learns of the
//! tunnel's MTU although nobody hears ICMP; and whose traffic leaves with an address of this host.
//! An `accept` there is no more than "nothing against it": the host's own chains decide after ours.
//!
//! **The host's tables.** For the same reason nothing in our table can let pass what a chain of the host drops. So
//! where one would drop everything that it does not know (its policy, or its last rule), [`gates`]
//! finds the places for two or three plain rules, which are taken away at the end. They bear a comment, by
//! which whoever cleans up finds them, and iptables shows them as rules of its own.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Host, Overlay, Settings};
use crate::netmap::prefix::{DNS_SERVICE_V4, DNS_SERVICE_V6, V4_RANGE, V6_RANGE};

/// Index of the loopback interface.
const LOOPBACK: u32 = 1;

/// A chain of our table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: &'static str,
    /// Where packets come by.
    pub hook: Hook,
    /// Whether it translates addresses.
    pub nat: bool,
    /// Its place among the chains of the hook: smaller ones come first.
    pub priority: i32,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

/// Where packets come by a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// To the host itself.
    Input,
    /// Through it.
    Forward,
    /// On the way out.
    Postrouting,
}

/// What a rule does with what all of `when` is true of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The conditions.
    pub when: Vec<Match>,
    /// What is done, in order.
    pub then: Vec<Do>,
}

/// A condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// It came in by this interface, or by any other.
    From(u32, bool),
    /// It leaves by this interface, or by any other.
    To(u32, bool),
    /// It is IPv6, or IPv4.
    V6(bool),
    /// Its source lies there.
    Source(IpNet),
    /// Its destination lies there.
    Destination(IpNet),
    /// It begins a TCP connection, or answers that.
    Syn,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Do {
    /// Counts it.
    Count,
    /// Lowers the segment size to what the routes of both directions carry.
    Clamp,
    /// Gives it an address of the interface by which it leaves.
    Masquerade,
    /// Drops it.
    Drop,
    /// Ends this chain.
    Accept,
}

/// Counts what came out of the tunnel and goes on to the host's own chains.
pub const THROUGH: &str = "through";
/// Counts what of that got past them.
pub const PASSED: &str = "passed";
/// Count what comes from beside the tunnel with an address of the network's ranges.
pub const GUARDS: [&str; 2] = ["guard-input", "guard-forward"];
/// Has the rules without which no interface may be made to forward.
pub const FORWARD: &str = "forward";

/// Everything that our table is to hold. `woken` are the interfaces, IPv4 and IPv6, that forward for our
/// sake alone: what goes between them and others than the tunnel is dropped, as it was before.
pub fn firewall(
    settings: &Settings,
    overlay: &Overlay,
    host: &Host,
    woken: &BTreeSet<(u32, bool)>,
) -> Vec<Chain> {
    let tun = settings.tun;
    let guard = guard(tun, overlay, host);
    let mut services = Vec::new();
    for service in [IpAddr::from(DNS_SERVICE_V4), IpAddr::from(DNS_SERVICE_V6)] {
        // The host itself asks there, and its guests, who may have its resolver's file.
        let mut when = vec![
            Match::From(LOOPBACK, false),
            Match::Destination(service.into()),
        ];
        let guests = host.guest_links.iter();
        when.extend(guests.map(|bridge| Match::From(*bridge, false)));
        // Another program's tunnel may have that address too, and takes what is for it before this.
        if guards(overlay, service) {
            services.push(rule(when, &[Do::Count, Do::Drop]));
        }
    }
    let chain = |name, hook, priority, rules| Chain {
        name,
        hook,
        nat: false,
        priority,
        rules,
    };
    let mut chains = vec![
        chain(GUARDS[0], Hook::Input, -150, guard.clone()),
        chain("services", Hook::Input, -149, services),
        chain(GUARDS[1], Hook::Forward, -160, guard),
        chain(FORWARD, Hook::Forward, -150, forward(tun, overlay, woken)),
    ];
    if !overlay.forwards() {
        return chains;
    }
    let ways = [Match::From(tun, true), Match::To(tun, true)];
    let clamp = ways.map(|way| rule(vec![way, Match::Syn], &[Do::Clamp]));
    chains.push(chain("mss", Hook::Forward, -145, clamp.into()));
    let out = || vec![Match::From(tun, true), Match::To(tun, false)];
    chains.push(chain(
        THROUGH,
        Hook::Forward,
        -140,
        vec![rule(out(), &[Do::Count])],
    ));
    chains.push(Chain {
        name: "masquerade",
        hook: Hook::Postrouting,
        nat: true,
        priority: 100,
        rules: masquerade(tun, overlay),
    });
    let passed = vec![rule(out(), &[Do::Count])];
    chains.push(chain(PASSED, Hook::Postrouting, 300, passed));
    chains
}

fn rule(when: Vec<Match>, then: &[Do]) -> Rule {
    Rule {
        when,
        then: then.to_vec(),
    }
}

/// Whether addresses of the range in which this one lies are this network's.
fn guards(overlay: &Overlay, ip: IpAddr) -> bool {
    ranges(overlay).any(|range| range.contains(&ip))
}

fn ranges(overlay: &Overlay) -> impl Iterator<Item = IpNet> {
    let ranges = [IpNet::V4(V4_RANGE), IpNet::V6(V6_RANGE)];
    let own = &overlay.addresses;
    ranges
        .into_iter()
        .filter(|range| own.iter().any(|ip| range.contains(ip)))
}

/// Sources of the network's ranges come out of the tunnel, and from nowhere else: whoever is on a network
/// beside could else speak as a node to the host, or through it. A host may have such addresses elsewhere too
/// (a provider's network, another tunnel): those stay as they are.
fn guard(tun: u32, overlay: &Overlay, host: &Host) -> Vec<Rule> {
    let mut rules = Vec::new();
    for range in ranges(overlay) {
        let elsewhere = host.elsewhere.iter();
        for (interface, net) in elsewhere.filter(|(_, net)| range.contains(net)) {
            let when = vec![Match::From(*interface, true), Match::Source(*net)];
            rules.push(rule(when, &[Do::Accept]));
        }
        let when = vec![
            Match::From(tun, false),
            Match::From(LOOPBACK, false),
            Match::Source(range),
        ];
        rules.push(rule(when, &[Do::Count, Do::Drop]));
    }
    rules
}

fn forward(tun: u32, overlay: &Overlay, woken: &BTreeSet<(u32, bool)>) -> Vec<Rule> {
    let mut rules = Vec::new();
    for (interface, v6) in woken {
        let when = vec![
            Match::From(*interface, true),
            Match::V6(*v6),
            Match::To(tun, false),
        ];
        rules.push(rule(when, &[Do::Count, Do::Drop]));
    }
    // From one peer to another by way of this host: none of them asked for that, and it may go in circles.
    let back = vec![Match::From(tun, true), Match::To(tun, true)];
    rules.push(rule(back, &[Do::Count, Do::Drop]));
    if overlay.offers_exit {
        let to = |net: &IpNet| vec![Match::From(tun, true), Match::Destination(*net)];
        // A rule for each of what is offered, not for each piece of what is left of the rest: those may be hundreds.
        let open = overlay.offered.difference(&overlay.unapproved);
        rules.extend(open.map(|net| rule(to(net), &[Do::Accept])));
        let shut = overlay.shut.iter();
        rules.extend(shut.map(|net| rule(to(net), &[Do::Count, Do::Drop])));
    }
    rules
}

fn masquerade(tun: u32, overlay: &Overlay) -> Vec<Rule> {
    let mut offered: Vec<&IpNet> = overlay.offered.iter().collect();
    // The longest prefix says what is done.
    offered.sort_by_key(|net| std::cmp::Reverse(net.prefix_len()));
    // By the interface, which kernels know here since 5.7, and not by a mark: tailscaled and another ringtail on this
    // host masquerade by theirs what they carry, and would take ours for it.
    let out = || vec![Match::From(tun, true), Match::To(tun, false)];
    let mut rules: Vec<Rule> = offered
        .into_iter()
        .map(|net| {
            let mut when = out();
            when.push(Match::Destination(*net));
            let snat = overlay.snat.contains(net);
            rule(when, &[if snat { Do::Masquerade } else { Do::Accept }])
        })
        .collect();
    if overlay.offers_exit {
        rules.push(rule(out(), &[Do::Masquerade]));
    }
    rules
}

/// A base chain of the host that filters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// The address family of its table, as the kernel numbers them (`NFPROTO_*`).
    pub family: u8,
    /// Its table.
    pub table: String,
    /// Its name.
    pub chain: String,
    /// Where packets come by it.
    pub hook: Hook,
    /// Whether what no rule decides is dropped.
    pub policy_drops: bool,
    /// Its rules.
    pub rules: Vec<Found>,
    /// Who looks after it.
    pub manager: Option<Manager>,
}

/// A rule in a chain of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// By which the kernel knows it.
    pub handle: u64,
    /// Its comment.
    pub comment: Option<String>,
    /// Whether it drops or refuses whatever comes to it.
    pub drops: bool,
    /// What it accepts all of, if that is what a rule of ours would.
    pub accepts: Option<Gate>,
}

/// What a rule of ours in a chain of the host accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gate {
    /// What comes out of the tunnel.
    FromTunnel,
    /// What goes into it.
    ToTunnel,
    /// Datagrams to the underlay's port.
    Port(u16),
}

impl Gate {
    /// The comment of such a rule, for a routing table of ours.
    pub fn comment(self, table: u8) -> String {
        let base = comment(table);
        match self {
            Self::FromTunnel => format!("{base} in"),
            Self::ToTunnel => format!("{base} out"),
            Self::Port(port) => format!("{base} port {port}"),
        }
    }
}

/// How comments of our rules begin, for a routing table of ours; also the name of our own table.
pub fn comment(table: u8) -> String {
    format!("ringtail-{table}")
}

/// The routing table of whoever calls a rule or a table so, if that is a ringtail.
pub fn table_of(name: &str) -> Option<u8> {
    let name = name.split(' ').next()?;
    let table = name.strip_prefix("ringtail-")?.parse().ok()?;
    (comment(table) == name).then_some(table)
}

/// Whether a rule with such a comment is one of ours, of that routing table.
pub fn is_ours(found: &str, table: u8) -> bool {
    found
        .strip_prefix(&comment(table))
        .is_some_and(|rest| rest.starts_with(' '))
}

/// A change in a chain of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Put a rule at its top.
    Insert(Gate),
    /// Remove the rule with this handle.
    Remove(u64),
}

impl Base {
    /// Whether the chain drops what it does not know.
    pub fn drops(&self) -> bool {
        self.policy_drops || self.rules.iter().any(|rule| rule.drops)
    }

    /// The rules that are to stand in it, if they may.
    fn wanted(&self, settings: &Settings, forwards: bool) -> Vec<Gate> {
        match self.hook {
            Hook::Input if self.drops() => vec![Gate::FromTunnel, Gate::Port(settings.port)],
            Hook::Forward if self.drops() && forwards => vec![Gate::FromTunnel, Gate::ToTunnel],
            Hook::Input | Hook::Forward | Hook::Postrouting => Vec::new(),
        }
    }

    /// Which of these rules this chain lacks, whoever made them.
    pub fn missing(&self, settings: &Settings, forwards: bool) -> Vec<Gate> {
        let standing = self.standing();
        let mut wanted = self.wanted(settings, forwards);
        wanted.retain(|gate| !standing.iter().any(|rule| rule.accepts == Some(*gate)));
        wanted
    }

    /// The rules that packets come to: those behind one that drops everything are dead.
    fn standing(&self) -> &[Found] {
        let end = self.rules.iter().position(|rule| rule.drops);
        &self.rules[..end.unwrap_or(self.rules.len())]
    }
}

/// The changes in a chain of the host that make it let pass what is for the tunnel, or, if that may not be, take
/// all of ours away.
pub fn gates(settings: &Settings, may_open: bool, forwards: bool, base: &Base) -> Vec<Change> {
    let wanted = if may_open {
        base.wanted(settings, forwards)
    } else {
        Vec::new()
    };
    let mut left: BTreeSet<Gate> = wanted.iter().copied().collect();
    let live = base.standing().len();
    let ours = |found: &Found| {
        let comment = found.comment.as_deref();
        comment.is_some_and(|comment| is_ours(comment, settings.table))
    };
    // Somebody else's rule does as well.
    for found in base.standing().iter().filter(|found| !ours(found)) {
        left.retain(|gate| found.accepts != Some(*gate));
    }
    let mut changes = Vec::new();
    for (at, found) in base.rules.iter().enumerate() {
        // One of each is enough, and one that no packet comes to is none.
        let serves = at < live && found.accepts.is_some_and(|gate| left.remove(&gate));
        if ours(found) && !serves {
            changes.push(Change::Remove(found.handle));
        }
    }
    let missing = wanted.into_iter().filter(|gate| left.contains(gate));
    changes.extend(missing.map(Change::Insert));
    changes
}

/// Who else looks after a chain of the host, and has a command of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manager {
    /// firewalld.
    Firewalld,
    /// ufw.
    Ufw,
}

impl Base {
    /// A sentence for people about what this chain drops for want of these rules, with the command that helps.
    pub fn describe(&self, tun: &str, missing: &[Gate]) -> String {
        let family = match self.family {
            1 => "inet",
            2 => "ip",
            _ => "ip6",
        };
        let (table, chain) = (&self.table, &self.chain);
        let one = |gate: &Gate| match (self.manager, self.hook, gate) {
            (Some(Manager::Firewalld), _, Gate::Port(port)) => {
                format!("firewall-cmd --add-port={port}/udp")
            }
            (Some(Manager::Firewalld), _, Gate::FromTunnel | Gate::ToTunnel) => {
                format!("firewall-cmd --zone=trusted --add-interface={tun}")
            }
            (Some(Manager::Ufw), Hook::Forward, Gate::FromTunnel) => {
                format!("ufw route allow in on {tun}")
            }
            (Some(Manager::Ufw), _, Gate::ToTunnel) => format!("ufw route allow out on {tun}"),
            (Some(Manager::Ufw), _, Gate::FromTunnel) => format!("ufw allow in on {tun}"),
            (Some(Manager::Ufw), _, Gate::Port(port)) => format!("ufw allow {port}/udp"),
            (None, _, gate) => {
                let accepts = match gate {
                    Gate::FromTunnel => format!("iifname {tun}"),
                    Gate::ToTunnel => format!("oifname {tun}"),
                    Gate::Port(port) => format!("udp dport {port}"),
                };
                format!("nft insert rule {family} {table} {chain} {accepts} accept")
            }
        };
        let mut commands: Vec<String> = missing.iter().map(one).collect();
        commands.dedup();
        let what = match self.hook {
            Hook::Input => "sent to this host by the network",
            Hook::Forward | Hook::Postrouting => "forwarded for the network",
        };
        format!(
            "the host's firewall drops what is {what} (chain {chain} of table {family} {table}): {}",
            commands.join(" && ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hostnet::settings;

    const TUN: u32 = 9;
    const LAN: u32 = 3;
    const WAN: u32 = 2;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn router(offered: &[&str], snat: &[&str]) -> Overlay {
        Overlay {
            addresses: ["100.64.0.1", "fd7a:115c:a1e0::1"]
                .map(|ip| ip.parse().unwrap())
                .into(),
            offered: offered.iter().map(|text| net(text)).collect(),
            snat: snat.iter().map(|text| net(text)).collect(),
            ..Overlay::default()
        }
    }

    /// A packet as our chains see it.
    #[derive(Clone, Copy)]
    struct Packet {
        from: u32,
        to: u32,
        source: IpAddr,
        destination: IpAddr,
        syn: bool,
    }

    #[derive(Debug, Default, PartialEq, Eq)]
    struct Fate {
        dropped: Option<&'static str>,
        masqueraded: bool,
        clamped: bool,
    }

    /// What the chains of these hooks do with a packet, in the order of their priority, as the kernel has it.
    fn walk(chains: &[Chain], hooks: &[Hook], packet: Packet) -> Fate {
        let mut fate = Fate::default();
        for hook in hooks {
            let mut here: Vec<&Chain> = chains.iter().filter(|chain| chain.hook == *hook).collect();
            here.sort_by_key(|chain| chain.priority);
            for chain in here {
                'chain: for rule in &chain.rules {
                    if !rule.when.iter().all(|when| holds(*when, &packet)) {
                        continue;
                    }
                    for verb in &rule.then {
                        match verb {
                            Do::Count => {}
                            Do::Clamp => fate.clamped = true,
                            Do::Masquerade => {
                                assert!(chain.nat);
                                fate.masqueraded = true;
                                break 'chain;
                            }
                            Do::Drop => {
                                fate.dropped = Some(chain.name);
                                return fate;
                            }
                            Do::Accept => break 'chain,
                        }
                    }
                }
            }
        }
        fate
    }

    fn holds(when: Match, packet: &Packet) -> bool {
        match when {
            Match::From(interface, is) => (packet.from == interface) == is,
            Match::To(interface, is) => (packet.to == interface) == is,
            Match::V6(v6) => packet.source.is_ipv6() == v6,
            Match::Source(net) => net.contains(&packet.source),
            Match::Destination(net) => net.contains(&packet.destination),
            Match::Syn => packet.syn,
        }
    }

    fn packet(from: u32, to: u32, source: &str, destination: &str) -> Packet {
        Packet {
            from,
            to,
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            syn: true,
        }
    }

    const THROUGH_HOST: [Hook; 2] = [Hook::Forward, Hook::Postrouting];

    fn through(chains: &[Chain], packet: Packet) -> Fate {
        walk(chains, &THROUGH_HOST, packet)
    }

    #[test]
    fn what_comes_out_of_the_tunnel_leaves_masqueraded_where_that_is_wanted_and_clamped_everywhere()
    {
        let overlay = router(
            &[
                "192.168.7.0/24",
                "192.168.0.0/16",
                "10.0.0.0/8",
                "fd07::/64",
            ],
            &["192.168.0.0/16", "fd07::/64"],
        );
        let chains = firewall(&settings(), &overlay, &Host::default(), &BTreeSet::new());
        for (to, masqueraded) in [
            ("192.168.9.1", true),
            ("192.168.7.1", false),
            ("10.9.9.9", false),
        ] {
            let fate = through(&chains, packet(TUN, LAN, "100.64.0.2", to));
            let wanted = Fate {
                masqueraded,
                clamped: true,
                ..Fate::default()
            };
            assert_eq!(fate, wanted, "{to}");
        }
        let v6 = through(&chains, packet(TUN, LAN, "fd7a:115c:a1e0::2", "fd07::9"));
        assert!(v6.masqueraded && v6.dropped.is_none());
        // And the other way, where nothing is masqueraded.
        let back = through(&chains, packet(LAN, TUN, "192.168.9.1", "100.64.0.2"));
        assert!(back.clamped && !back.masqueraded && back.dropped.is_none());
        // Another program's tunnel, as tailscaled's: what it carries is its own.
        let other = through(&chains, packet(7, LAN, "100.64.0.9", "192.168.9.1"));
        assert!(!other.masqueraded);
        let beside = through(&chains, packet(LAN, WAN, "192.168.9.1", "192.168.7.1"));
        assert_eq!(beside, Fate::default(), "the host's own traffic is its own");
        let circle = through(&chains, packet(TUN, TUN, "100.64.0.2", "100.64.0.3"));
        assert_eq!(circle.dropped, Some(FORWARD));
    }

    #[test]
    fn nobody_beside_the_tunnel_speaks_as_a_node() {
        let host = Host {
            elsewhere: [
                (WAN, net("100.72.1.0/24")),
                (LAN, net("100.73.0.9/32")),
                (7, V4_RANGE.into()),
            ]
            .into(),
            guest_links: [5].into(),
            ..Host::default()
        };
        let chains = firewall(&settings(), &router(&[], &[]), &host, &BTreeSet::new());
        for (from, source, dropped) in [
            (LAN, "100.64.0.2", true),
            (LAN, "fd7a:115c:a1e0::2", true),
            (WAN, "100.64.0.2", true),
            (LAN, "100.72.1.5", true),
            (LAN, "192.168.7.9", false),
            (LAN, "fd7a:115c:a1e1::2", false),
            // A provider's network, and another tunnel.
            (WAN, "100.72.1.5", false),
            (7, "100.99.0.1", false),
            // A container with a route of its own.
            (LAN, "100.73.0.9", false),
            (LAN, "100.73.0.10", true),
            (TUN, "100.64.0.2", false),
            (LOOPBACK, "100.64.0.1", false),
        ] {
            let local = if source.contains(':') {
                "fd7a:115c:a1e0::1"
            } else {
                "100.64.0.1"
            };
            let to_host = walk(&chains, &[Hook::Input], packet(from, 0, source, local));
            assert_eq!(to_host.dropped.is_some(), dropped, "{source} by {from}");
            let fate = through(&chains, packet(from, WAN, source, "192.168.7.1"));
            assert_eq!(
                fate.dropped.is_some(),
                dropped,
                "{source} by {from}, through"
            );
        }
        let asks = packet(LAN, 0, "192.168.7.9", "100.100.100.100");
        assert!(walk(&chains, &[Hook::Input], asks).dropped.is_some());
        let guest = packet(5, 0, "172.17.0.2", "100.100.100.100");
        assert_eq!(walk(&chains, &[Hook::Input], guest).dropped, None);
        let other = Overlay {
            addresses: ["10.77.0.1".parse().unwrap()].into(),
            ..Overlay::default()
        };
        let chains = firewall(&settings(), &other, &host, &BTreeSet::new());
        let fate = walk(
            &chains,
            &[Hook::Input],
            packet(LAN, 0, "100.64.0.2", "10.77.0.1"),
        );
        assert_eq!(fate.dropped, None, "a range that is not this network's");
    }

    #[test]
    fn an_interface_that_forwards_for_our_sake_forwards_nothing_else() {
        let overlay = router(&["192.168.7.0/24"], &[]);
        let woken = [(LAN, false)].into();
        let chains = firewall(&settings(), &overlay, &Host::default(), &woken);
        let fate = |from, to, source, destination| {
            through(&chains, packet(from, to, source, destination)).dropped
        };
        assert_eq!(fate(LAN, WAN, "192.168.7.9", "9.9.9.9"), Some(FORWARD));
        assert_eq!(fate(LAN, TUN, "192.168.7.9", "100.64.0.2"), None);
        assert_eq!(fate(WAN, TUN, "203.0.113.9", "100.64.0.2"), None);
        assert_eq!(
            fate(LAN, WAN, "fd07::9", "2001:db8::1"),
            None,
            "IPv6 was on before"
        );
    }

    #[test]
    fn users_of_the_exit_get_out_and_not_in() {
        let mut overlay = router(&["192.168.7.0/24"], &[]);
        overlay.offers_exit = true;
        // What is offered is open although it lies in what is shut.
        overlay.shut = ["192.168.0.0/16", "10.0.0.0/8", "fe80::/10"]
            .map(net)
            .into();
        let chains = firewall(&settings(), &overlay, &Host::default(), &BTreeSet::new());
        let fate = |to: &str| {
            let source = if to.contains(':') {
                "fd7a:115c:a1e0::2"
            } else {
                "100.64.0.2"
            };
            through(&chains, packet(TUN, WAN, source, to))
        };
        assert!(fate("9.9.9.9").masqueraded && fate("2001:db8::1").masqueraded);
        assert_eq!(fate("192.168.8.1").dropped, Some(FORWARD));
        assert_eq!(fate("10.1.1.1").dropped, Some(FORWARD));
        let offered = fate("192.168.7.1");
        assert!(offered.dropped.is_none() && !offered.masqueraded && offered.clamped);
        overlay.unapproved = overlay.offered.clone();
        let chains = firewall(&settings(), &overlay, &Host::default(), &BTreeSet::new());
        let waits = through(&chains, packet(TUN, WAN, "100.64.0.2", "192.168.7.1"));
        assert_eq!(waits.dropped, Some(FORWARD));
        overlay.unapproved.clear();
        // Scattered prefixes take one rule each.
        let many = (0..=255).map(|n| net(&format!("10.{n}.{n}.0/24")));
        overlay.offered.extend(many);
        let rules = forward(TUN, &overlay, &BTreeSet::new()).len();
        assert_eq!(rules, 1 + overlay.offered.len() + overlay.shut.len());
    }

    #[test]
    fn what_is_a_ringtails_says_of_which_table_it_is() {
        for (name, table) in [
            ("ringtail-52", Some(52)),
            ("ringtail-53 port 41641", Some(53)),
            ("ringtail-052", None),
            ("ringtail-999 in", None),
            ("ringtail-52x", None),
            ("tailscale-52", None),
            ("", None),
        ] {
            assert_eq!(table_of(name), table, "{name}");
        }
    }

    fn accepts(comment: &str) -> Option<Gate> {
        let (_, rest) = comment.split_once(' ')?;
        match rest {
            "in" => Some(Gate::FromTunnel),
            "out" => Some(Gate::ToTunnel),
            port => Some(Gate::Port(port.strip_prefix("port ")?.parse().unwrap())),
        }
    }

    fn base(hook: Hook, policy_drops: bool, rules: &[(Option<&str>, bool)]) -> Base {
        let rules = rules
            .iter()
            .zip(1..)
            .map(|((comment, drops), handle)| Found {
                handle,
                comment: comment.map(str::to_owned),
                drops: *drops,
                accepts: comment.and_then(accepts),
            });
        Base {
            family: 2,
            table: "filter".into(),
            chain: "FORWARD".into(),
            hook,
            policy_drops,
            rules: rules.collect(),
            manager: None,
        }
    }

    #[test]
    fn a_chain_that_drops_gets_rules_and_no_other() {
        let both = [
            Change::Insert(Gate::FromTunnel),
            Change::Insert(Gate::ToTunnel),
        ];
        let of = |base: &Base| gates(&settings(), true, true, base);
        assert_eq!(of(&base(Hook::Forward, true, &[])), both);
        assert_eq!(
            of(&base(Hook::Forward, false, &[(None, false), (None, true)])),
            both
        );
        assert_eq!(of(&base(Hook::Forward, false, &[(None, false)])), []);
        let input = [
            Change::Insert(Gate::FromTunnel),
            Change::Insert(Gate::Port(41_641)),
        ];
        assert_eq!(of(&base(Hook::Input, true, &[])), input);
        assert_eq!(
            gates(&settings(), true, false, &base(Hook::Forward, true, &[])),
            []
        );
        assert_eq!(
            gates(&settings(), false, true, &base(Hook::Forward, true, &[])),
            []
        );
    }

    #[test]
    fn our_rules_are_known_again_and_go_when_they_are_not_needed() {
        let there = [
            (Some("ringtail-52 in"), false),
            (Some("ringtail-52 out"), false),
            (Some("ringtail-52 in"), false),
            (Some("somebody"), false),
        ];
        let of = |base: &Base, may| gates(&settings(), may, true, base);
        let drops = base(Hook::Forward, true, &there);
        assert_eq!(
            of(&drops, true),
            [Change::Remove(3)],
            "one of each is enough"
        );
        assert!(drops.missing(&settings(), true).is_empty());
        let all = [1, 2, 3].map(Change::Remove);
        assert_eq!(of(&drops, false), all);
        assert_eq!(of(&base(Hook::Forward, false, &there), true), all);
        let old_port = base(Hook::Input, true, &[(Some("ringtail-52 port 7"), false)]);
        let changes = of(&old_port, true);
        assert!(changes.contains(&Change::Remove(1)) && changes.len() == 3);
        let behind = base(
            Hook::Forward,
            false,
            &[(None, true), (Some("ringtail-52 in"), false)],
        );
        assert_eq!(
            behind.missing(&settings(), true),
            [Gate::FromTunnel, Gate::ToTunnel]
        );
        assert_eq!(
            of(&behind, true),
            [
                Change::Remove(2),
                Change::Insert(Gate::FromTunnel),
                Change::Insert(Gate::ToTunnel)
            ]
        );
    }

    #[test]
    fn a_rule_of_somebody_else_that_does_the_same_is_enough() {
        let of = |first: &str| {
            let there = [(Some(first), false), (Some("ringtail-52 out"), false)];
            gates(&settings(), true, true, &base(Hook::Forward, true, &there))
        };
        for theirs in ["ringtail-53 in", "ringtail-521 in", "somebody in"] {
            assert_eq!(of(theirs), [], "{theirs}");
        }
        assert_eq!(
            of("somebody out"),
            [Change::Remove(2), Change::Insert(Gate::FromTunnel)]
        );
        assert_eq!(of("somebody"), [Change::Insert(Gate::FromTunnel)]);
    }

    #[test]
    fn the_command_is_the_one_of_whoever_looks_after_the_chain() {
        let mut chain = base(Hook::Forward, true, &[]);
        let gates = [Gate::FromTunnel, Gate::ToTunnel];
        let of = |chain: &Base| chain.describe("ringtail0", &gates);
        assert!(of(&chain).ends_with(
            "(chain FORWARD of table ip filter): nft insert rule ip filter FORWARD iifname ringtail0 accept \
             && nft insert rule ip filter FORWARD oifname ringtail0 accept"
        ));
        chain.manager = Some(Manager::Firewalld);
        assert!(of(&chain).ends_with(": firewall-cmd --zone=trusted --add-interface=ringtail0"));
        chain.manager = Some(Manager::Ufw);
        assert!(
            of(&chain)
                .ends_with(": ufw route allow in on ringtail0 && ufw route allow out on ringtail0")
        );
    }
}
