//! What is answered here, and what is passed on to whom.
//!
//! Names of nodes and extra records are answered; so is everything else below a suffix that the network
//! says is ours: it does not exist. Other suffixes go to the resolvers that the network names, and the
//! rest to its resolvers for all names, or to the host's own. The most specific suffix counts. This is
//! `net/dns/resolver/tsdns.go` of tailscaled seen from outside, with one difference on purpose: a name with
//! several addresses has all of them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::rr::{Name, RecordType};
use ipnet::IpNet;

use super::Upstream;
use crate::netmap::prefix::{DNS_SERVICE_V4, DNS_SERVICE_V6};
use crate::netmap::wire::{DnsConfig, Resolver};

/// What a question for the address of the service itself is answered with.
const SERVICE_NAME: &str = "magicdns.localhost-tailscale-daemon.";
/// Octets of 100.64.0.0/10 behind the first, and the name of fd7a:115c:a1e0::/48: whose addresses have
/// names here.
const REVERSE_V4: std::ops::Range<u8> = 64..128;
const REVERSE_V6: &str = "0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa";
/// Resolvers that cannot be asked and are told of at most.
const UNUSABLE_TOLD_MAX: usize = 16;

/// Ourselves, as far as names go.
#[derive(Clone, Copy, Debug)]
pub struct Own<'a> {
    /// Our FQDN.
    pub name: &'a str,
    /// Our inner addresses.
    pub addresses: &'a [IpNet],
    /// Peers' names have IPv6 addresses beside IPv4 ones.
    pub names_have_v6: bool,
}

/// The way out in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Exit {
    /// There is none.
    #[default]
    None,
    /// There is one that does not look names up.
    Silent,
    /// There is one that looks names up for us.
    Resolver(Upstream),
}

/// Everything that a question is decided by.
#[derive(Debug, Default)]
pub struct Zones {
    /// Our network's suffix, in which a single label is looked for too.
    network: Option<Name>,
    names: HashMap<Name, Vec<IpAddr>>,
    addresses: HashMap<IpAddr, Name>,
    /// By suffix; without any it is ours to answer.
    routes: HashMap<Name, Option<Arc<[Upstream]>>>,
    /// For all other names; without them the host's own are asked.
    default: Option<Arc<[Upstream]>>,
    /// Resolvers that cannot be asked, with the reason.
    unusable: Vec<String>,
    /// Names that are none.
    left_out: usize,
}

/// What becomes of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The name has these addresses of the type asked for.
    Addresses(Vec<IpAddr>),
    /// The address has this name.
    Pointer(Name),
    /// The name has nothing of that type.
    NoData,
    /// There is no such name.
    NoName,
    /// The type is none that is answered here.
    NotImplemented,
    /// Ask these; if there are none, nobody can be asked.
    Forward(Arc<[Upstream]>),
    /// Ask whom the host would ask.
    ForwardToHost,
}

impl Zones {
    /// From what the network says. Names of nodes come with all their inner addresses; of equal names the
    /// first counts, and an extra record takes the place of a node's.
    pub fn new<'a>(
        config: &DnsConfig,
        own: Own<'a>,
        nodes: impl Iterator<Item = (&'a str, &'a [IpNet])>,
        exit: &Exit,
    ) -> Self {
        let mut zones = Self::default();
        for (name, addresses) in std::iter::once((own.name, own.addresses)).chain(nodes) {
            zones.add_node(own, name, addresses);
        }
        let mut extra: HashMap<Name, Vec<IpAddr>> = HashMap::new();
        for record in &config.extra_records {
            match read_name(&record.name) {
                Some(name) => {
                    let reverse = zones.addresses.entry(record.value);
                    reverse.or_insert_with(|| name.clone());
                    let addresses = extra.entry(name).or_default();
                    if !addresses.contains(&record.value) {
                        addresses.push(record.value);
                    }
                }
                None => zones.left_out += 1,
            }
        }
        zones.names.extend(extra);
        zones.network = read_name(own.name).map(|name| name.base_name());
        let suffixes = own_suffixes(own.name);
        let suffixes = suffixes
            .filter(|_| config.proxied)
            .filter_map(|text| read_name(&text));
        zones.routes = suffixes.map(|suffix| (suffix, None)).collect();
        zones.add_routes(config, own.addresses, exit);
        zones
    }

    fn add_node(&mut self, own: Own<'_>, name: &str, addresses: &[IpNet]) {
        let Some(name) = read_name(name) else {
            self.left_out += usize::from(!name.is_empty());
            return;
        };
        let is_v4 = |net: &&IpNet| net.addr().is_ipv4();
        let v6_alone = own.addresses.iter().any(|net| net.addr().is_ipv6())
            && !own.addresses.iter().any(|net| is_v4(&net));
        let has_v4 = addresses.iter().any(|net| is_v4(&net));
        let tells = |net: &&IpNet| match (net.addr().is_ipv4(), v6_alone) {
            (v4, true) => !v4,
            (v4, false) => v4 || !has_v4 || own.names_have_v6,
        };
        for net in addresses {
            self.addresses
                .entry(net.addr())
                .or_insert_with(|| name.clone());
        }
        let told = addresses.iter().filter(tells).map(IpNet::addr).collect();
        self.names.entry(name).or_insert(told);
    }

    fn add_routes(&mut self, config: &DnsConfig, own: &[IpNet], exit: &Exit) {
        // With an exit node that looks names up, only resolvers that say so are asked beside it.
        let chosen = |resolvers: &[Resolver]| -> Vec<Resolver> {
            let asked = |resolver: &&Resolver| match exit {
                Exit::None | Exit::Silent => true,
                Exit::Resolver(_) => resolver.use_with_exit_node,
            };
            resolvers.iter().filter(asked).cloned().collect()
        };
        for (suffix, resolvers) in &config.routes {
            let asked = chosen(resolvers);
            if asked.is_empty() != resolvers.is_empty() {
                continue;
            }
            let upstreams = (!asked.is_empty()).then(|| self.usable(&asked, own));
            match read_name(suffix) {
                // That no name exists at all is not for a network to say.
                Some(name) if name.is_root() => {
                    // Without anybody to ask, the host's own are.
                    self.default = upstreams.filter(|upstreams| !upstreams.is_empty());
                }
                Some(name) => {
                    self.routes.insert(name, upstreams);
                }
                None => self.left_out += 1,
            }
        }
        let asked = chosen(&config.resolvers);
        let default = match (exit, asked.is_empty()) {
            (Exit::Resolver(upstream), true) => Arc::from([upstream.clone()]),
            (Exit::Silent, true) => self.usable(&config.fallback_resolvers, own),
            (Exit::None, true) => Arc::default(),
            (Exit::None | Exit::Silent | Exit::Resolver(_), false) => self.usable(&asked, own),
        };
        if !default.is_empty() {
            self.default = Some(default);
        }
    }

    /// Those that can be asked; none of them is ourselves.
    fn usable(&mut self, resolvers: &[Resolver], own: &[IpNet]) -> Arc<[Upstream]> {
        let mut usable = Vec::with_capacity(resolvers.len());
        for resolver in resolvers {
            let upstream = Upstream::parse(&resolver.addr);
            match upstream {
                Ok(upstream) if is_own(upstream.address().ip(), own) => {
                    self.tell_unusable(&resolver.addr, "that is this node itself");
                }
                Ok(upstream) if usable.contains(&upstream) => {}
                Ok(upstream) => usable.push(upstream),
                Err(why) => self.tell_unusable(&resolver.addr, why),
            }
        }
        usable.into()
    }

    fn tell_unusable(&mut self, resolver: &str, why: &str) {
        let sentence = format!("the resolver {resolver:?} is not asked: {why}");
        if self.unusable.len() < UNUSABLE_TOLD_MAX && !self.unusable.contains(&sentence) {
            self.unusable.push(sentence);
        }
    }

    /// What becomes of a question.
    pub fn decide(&self, name: &Name, kind: RecordType) -> Decision {
        let name = absolute(name);
        if kind == RecordType::PTR
            && let Some(found) = self.reverse(&name)
        {
            return Decision::Pointer(found);
        }
        let service = service_address(&name, kind);
        let alone = || self.names.get(&self.in_network(&name)?).cloned();
        let known = service.or_else(|| self.names.get(&name).cloned());
        if let Some(addresses) = known.or_else(alone) {
            return answer(addresses, kind);
        }
        // RFC 7686: such names are never asked for.
        if last_label(&name).is_some_and(|label| label == b"onion") {
            return Decision::NoName;
        }
        match self.route(&name) {
            Some((_, None)) => Decision::NoName,
            Some((_, Some(upstreams))) => Decision::Forward(Arc::clone(upstreams)),
            None => match &self.default {
                Some(default) => Decision::Forward(Arc::clone(default)),
                None => Decision::ForwardToHost,
            },
        }
    }

    /// A single label as a name of our network.
    fn in_network(&self, name: &Name) -> Option<Name> {
        let network = self.network.as_ref().filter(|_| name.num_labels() == 1)?;
        name.clone().append_domain(network).ok()
    }

    /// The suffix of ours that a name lies in, for whoever wants to know how long that is true.
    pub fn zone(&self, name: &Name) -> Option<Name> {
        let (suffix, upstreams) = self.route(&absolute(name))?;
        upstreams.is_none().then_some(suffix)
    }

    /// Resolvers that cannot be asked, in sentences.
    pub fn unusable(&self) -> &[String] {
        &self.unusable
    }

    /// How many names were none.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// Who is asked for names that no suffix covers, if not the host's own.
    pub fn for_all_names(&self) -> Option<&[Upstream]> {
        self.default.as_deref()
    }

    /// Whether a resolver is asked for anything.
    pub fn asks(&self, upstream: &Upstream) -> bool {
        let routes = self.routes.values().flatten();
        let mut all = routes.chain(&self.default);
        all.any(|upstreams| upstreams.contains(upstream))
    }

    fn reverse(&self, name: &Name) -> Option<Name> {
        let net = name.parse_arpa_name().ok()?;
        let address = net.addr();
        if net.prefix_len() != net.max_prefix_len() {
            return None;
        }
        if address == DNS_SERVICE_V4 || address == DNS_SERVICE_V6 {
            return read_name(SERVICE_NAME);
        }
        self.addresses.get(&address).cloned()
    }

    fn route(&self, name: &Name) -> Option<(Name, Option<&Arc<[Upstream]>>)> {
        let mut suffix = name.clone();
        loop {
            if let Some(upstreams) = self.routes.get(&suffix) {
                return Some((suffix, upstreams.as_ref()));
            }
            if suffix.is_root() {
                return None;
            }
            suffix = suffix.base_name();
        }
    }
}

/// The suffixes that are ours where the names of nodes are to be answered for.
pub(super) fn own_suffixes(own_name: &str) -> impl Iterator<Item = String> {
    let network = own_name
        .split_once('.')
        .map(|(_, rest)| rest.trim_end_matches('.').to_owned());
    let network = network.filter(|suffix| !suffix.is_empty());
    let reverse = REVERSE_V4.map(|octet| format!("{octet}.100.in-addr.arpa"));
    network
        .into_iter()
        .chain(reverse)
        .chain([REVERSE_V6.to_owned()])
}

/// Whether an address is one of ours: who is asked there asks us.
fn is_own(ip: IpAddr, own: &[IpNet]) -> bool {
    let service = ip == DNS_SERVICE_V4 || ip == DNS_SERVICE_V6;
    service || own.iter().any(|net| net.addr() == ip)
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "there are dozens of types that no address has"
)]
fn answer(addresses: Vec<IpAddr>, kind: RecordType) -> Decision {
    let v4 = match kind {
        RecordType::A => Some(true),
        RecordType::AAAA => Some(false),
        RecordType::ANY => None,
        RecordType::NS | RecordType::SOA | RecordType::AXFR | RecordType::HINFO => {
            return Decision::NotImplemented;
        }
        _ => return Decision::NoData,
    };
    let wanted = |ip: &IpAddr| v4.is_none_or(|v4| ip.is_ipv4() == v4);
    let addresses: Vec<IpAddr> = addresses.into_iter().filter(wanted).collect();
    if addresses.is_empty() {
        return Decision::NoData;
    }
    Decision::Addresses(addresses)
}

fn service_address(name: &Name, kind: RecordType) -> Option<Vec<IpAddr>> {
    let service = matches!(kind, RecordType::A | RecordType::AAAA);
    (service && read_name(SERVICE_NAME).as_ref() == Some(name))
        .then(|| vec![DNS_SERVICE_V4.into(), DNS_SERVICE_V6.into()])
}

fn last_label(name: &Name) -> Option<&[u8]> {
    name.iter().next_back()
}

/// In lower case, and with its end named.
fn absolute(name: &Name) -> Name {
    let mut name = name.to_lowercase();
    name.set_fqdn(true);
    name
}

/// A name of the map; international ones become what is asked for.
pub(super) fn read_name(text: &str) -> Option<Name> {
    let name = Name::from_str_relaxed(text).ok()?;
    Some(absolute(&name))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts
            .iter()
            .map(|text| IpNet::from(text.parse::<IpAddr>().unwrap()))
            .collect()
    }

    /// A network of three nodes.
    fn zones(config: Value, exit: &Exit) -> Zones {
        let config: DnsConfig = serde_json::from_value(config).unwrap();
        let own = nets(&["100.64.0.1", "fd7a:115c:a1e0::1"]);
        let peer = nets(&["100.64.0.2", "fd7a:115c:a1e0::2"]);
        let v6_alone = nets(&["fd7a:115c:a1e0::3"]);
        let nodes = [
            ("Bob.lab.example.", peer.as_slice()),
            ("six.lab.example", v6_alone.as_slice()),
        ];
        let own = Own {
            name: "alice.lab.example.",
            addresses: &own,
            names_have_v6: false,
        };
        Zones::new(&config, own, nodes.into_iter(), exit)
    }

    /// What becomes of a question, in words.
    fn ask(zones: &Zones, name: &str, kind: RecordType) -> String {
        match zones.decide(&Name::from_str_relaxed(name).unwrap(), kind) {
            Decision::Addresses(found) => found
                .iter()
                .map(IpAddr::to_string)
                .collect::<Vec<_>>()
                .join(" "),
            Decision::Pointer(name) => name.to_ascii(),
            Decision::NoData => "no data".into(),
            Decision::NoName => "no name".into(),
            Decision::NotImplemented => "not implemented".into(),
            Decision::Forward(to) => {
                let to: Vec<String> = to.iter().map(Upstream::to_string).collect();
                format!("> {}", to.join(" "))
            }
            Decision::ForwardToHost => "> host".into(),
        }
    }

    #[test]
    fn names_of_nodes_are_answered_in_any_case_and_what_is_not_there_does_not_exist() {
        let zones = zones(json!({"Proxied": true}), &Exit::None);
        use RecordType as T;
        for (name, kind, answer) in [
            ("bob.lab.example.", T::A, "100.64.0.2"),
            ("BOB.Lab.Example", T::A, "100.64.0.2"),
            ("alice.lab.example.", T::A, "100.64.0.1"),
            ("bob.lab.example.", T::AAAA, "no data"),
            ("six.lab.example.", T::AAAA, "fd7a:115c:a1e0::3"),
            ("six.lab.example.", T::A, "no data"),
            ("bob.lab.example.", T::ANY, "100.64.0.2"),
            ("bob.lab.example.", T::MX, "no data"),
            ("bob.lab.example.", T::SOA, "not implemented"),
            ("carol.lab.example.", T::A, "no name"),
            ("www.bob.lab.example.", T::A, "no name"),
            ("lab.example.", T::A, "no name"),
            ("bob.lab.example.org.", T::A, "> host"),
            ("bob", T::A, "100.64.0.2"),
            ("carol", T::A, "> host"),
            (".", T::NS, "> host"),
            ("x.onion.", T::A, "no name"),
            ("2.0.64.100.in-addr.arpa.", T::PTR, "bob.lab.example."),
            ("9.0.64.100.in-addr.arpa.", T::PTR, "no name"),
            ("64.100.in-addr.arpa.", T::PTR, "no name"),
            ("1.0.0.10.in-addr.arpa.", T::PTR, "> host"),
            ("100.100.100.100.in-addr.arpa.", T::PTR, SERVICE_NAME),
            (SERVICE_NAME, T::A, "100.100.100.100"),
        ] {
            assert_eq!(ask(&zones, name, kind), answer, "{name} {kind}");
        }
        let reverse = |last: &str| Name::from(last.parse::<std::net::Ipv6Addr>().unwrap());
        for (address, answer) in [
            ("fd7a:115c:a1e0::2", "bob.lab.example."),
            ("fd7a:115c:a1e0::9", "no name"),
            ("2001:db8::9", "> host"),
        ] {
            let name = reverse(address).to_ascii();
            assert_eq!(ask(&zones, &name, T::PTR), answer, "{address}");
        }
    }

    #[test]
    fn the_most_specific_suffix_counts_and_the_rest_goes_to_the_default() {
        let config = json!({
            "Proxied": true,
            "Resolvers": [{"Addr": "192.0.2.1"}, {"Addr": "192.0.2.1:53"}, {"Addr": "https://x/q"}, {"Addr": "100.100.100.100"}],
            "Routes": {
                "corp.example": [{"Addr": "10.0.0.53"}],
                "EU.corp.example.": [{"Addr": "10.0.0.54"}, {"Addr": "10.0.0.55:5353"}],
                "void.corp.example": [],
                "broken.example": [{"Addr": "https://x/q"}],
            },
        });
        let zones = zones(config, &Exit::None);
        for (name, answer) in [
            ("a.corp.example", "> 10.0.0.53"),
            ("corp.example", "> 10.0.0.53"),
            ("notcorp.example", "> 192.0.2.1"),
            ("b.eu.corp.example", "> 10.0.0.54 10.0.0.55:5353"),
            ("a.void.corp.example", "no name"),
            ("a.broken.example", "> "),
            ("bob.lab.example", "100.64.0.2"),
        ] {
            assert_eq!(ask(&zones, name, RecordType::A), answer, "{name}");
        }
        assert_eq!(zones.unusable().len(), 2, "{:?}", zones.unusable());
    }

    #[test]
    fn extra_records_are_names_too_and_an_international_one_is_found_as_it_is_asked_for() {
        let config = json!({"Proxied": true, "ExtraRecords": [
            {"Name": "web.lab.example", "Value": "100.64.0.9"},
            {"Name": "web.lab.example.", "Value": "fd7a:115c:a1e0::9"},
            {"Name": "web.lab.example.", "Value": "100.64.0.8"},
            {"Name": "bob.lab.example", "Value": "10.0.0.1"},
            {"Name": "bücher.example", "Value": "10.0.0.2"},
            {"Name": "a..b", "Value": "10.0.0.3"},
        ]});
        let zones = zones(config, &Exit::None);
        assert_eq!(
            ask(&zones, "web.lab.example", RecordType::A),
            "100.64.0.9 100.64.0.8"
        );
        assert_eq!(
            ask(&zones, "web.lab.example", RecordType::AAAA),
            "fd7a:115c:a1e0::9"
        );
        assert_eq!(ask(&zones, "bob.lab.example", RecordType::A), "10.0.0.1");
        assert_eq!(
            ask(&zones, "9.0.64.100.in-addr.arpa", RecordType::PTR),
            "web.lab.example."
        );
        assert_eq!(
            ask(&zones, "xn--bcher-kva.example", RecordType::A),
            "10.0.0.2"
        );
        assert_eq!(zones.left_out(), 1);
    }

    #[test]
    fn with_an_exit_node_names_are_looked_up_there_but_for_resolvers_that_say_otherwise() {
        let doh = Upstream::parse("http://100.64.0.7:80/dns-query").unwrap();
        let exit = Exit::Resolver(doh);
        let config = |extra: Value| {
            json!({"Proxied": true, "Resolvers": [{"Addr": "192.0.2.1"}, extra],
                "FallbackResolvers": [{"Addr": "192.0.2.9"}],
                "Routes": {"corp.example": [{"Addr": "10.0.0.53"}],
                    "kept.example": [{"Addr": "10.0.0.54", "UseWithExitNode": true}, {"Addr": "10.0.0.55"}]}})
        };
        let at_exit = "> http://100.64.0.7:80/dns-query";
        let with = |extra, exit: &Exit| zones(config(extra), exit);
        let with_exit = with(json!(null), &exit);
        assert_eq!(ask(&with_exit, "a.example", RecordType::A), at_exit);
        assert_eq!(ask(&with_exit, "a.corp.example", RecordType::A), at_exit);
        assert_eq!(
            ask(&with_exit, "a.kept.example", RecordType::A),
            "> 10.0.0.54"
        );
        assert_eq!(
            ask(&with_exit, "bob.lab.example", RecordType::A),
            "100.64.0.2"
        );
        let extra = json!({"Addr": "192.0.2.2", "UseWithExitNode": true});
        assert_eq!(
            ask(&with(extra, &exit), "a.example", RecordType::A),
            "> 192.0.2.2"
        );
        let silent = with(json!(null), &Exit::Silent);
        assert_eq!(ask(&silent, "a.example", RecordType::A), "> 192.0.2.1");
    }
}
