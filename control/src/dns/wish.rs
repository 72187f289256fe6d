//! What the network wants: of the service, of the host's resolver, and for peers that leave by us.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::rr::Name;
use ipnet::IpNet;
use ringtail_dataplane::Rules;
use serde_json::{Value, json};

use super::zones::own_suffixes;
use super::{Exit, Own, Upstream, Zones};
use crate::netmap::prefix::{DNS_SERVICE_V4, DNS_SERVICE_V6};
use crate::netmap::wire::DnsConfig;

/// Addresses of the Internet; whoever may ask for names there may have us do it for him.
const FAR_AWAY: [IpAddr; 2] = [
    IpAddr::V4(std::net::Ipv4Addr::new(8, 8, 8, 8)),
    IpAddr::V6(std::net::Ipv6Addr::new(
        0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8888,
    )),
];
/// The port of DNS, and the protocols it is asked by.
const DNS_PORT: u16 = 53;
const DNS_PROTOCOLS: [u8; 2] = [6, 17];

/// All of it at one moment; by default nothing is wanted.
#[derive(Debug, Default)]
pub struct Wish {
    /// What becomes of questions.
    pub zones: Zones,
    /// What the host's resolver is to be told; nothing if it is none of our business.
    pub host: Option<HostDns>,
    /// What the host's resolver asks for names outside of the network may be behind the tunnel.
    pub behind_tunnel: bool,
    /// Peers by address, and whether they are their owner's who is ours too.
    pub peers: HashMap<IpAddr, bool>,
    /// What may come in, while peers may leave by us.
    pub lets_out: Option<Arc<Rules>>,
    /// What the network says, while it says anything.
    config: Option<Arc<DnsConfig>>,
    own_addresses: Vec<IpNet>,
    own_suffix: String,
}

impl Wish {
    /// What a network with these settings wants, of a host whose resolver may be told of it or not.
    pub fn new<'a>(
        config: &Arc<DnsConfig>,
        own: Own<'a>,
        nodes: impl Iterator<Item = (&'a str, &'a [IpNet])>,
        exit: &Exit,
        accepted: bool,
    ) -> Self {
        let zones = Zones::new(config, own, nodes, exit);
        let mut match_domains: Vec<String> = config.routes.keys().cloned().collect();
        if config.proxied {
            match_domains.extend(own_suffixes(own.name));
        }
        match_domains.retain(|domain| !domain.is_empty());
        match_domains.sort_unstable();
        match_domains.dedup();
        let v4 = own.addresses.iter().any(|net| net.addr().is_ipv4());
        let server = if v4 {
            DNS_SERVICE_V4.into()
        } else {
            DNS_SERVICE_V6.into()
        };
        let host = HostDns {
            servers: vec![server],
            search: config.search.clone(),
            match_domains,
            // While all else leaves by an exit node, no server is asked beside it.
            default: zones.for_all_names().is_some() || *exit != Exit::None,
        };
        let empty = host.search.is_empty() && host.match_domains.is_empty() && !host.default;
        Self {
            zones,
            host: (accepted && !empty).then_some(host),
            config: Some(Arc::clone(config)),
            own_addresses: own.addresses.to_vec(),
            own_suffix: own_suffixes(own.name).next().unwrap_or_default(),
            ..Self::default()
        }
    }

    /// Where questions are answered.
    pub fn service(&self) -> Vec<IpAddr> {
        let mut service: Vec<IpAddr> = Vec::new();
        if self.config.is_some() {
            service.push(DNS_SERVICE_V4.into());
            if self.own_addresses.iter().any(|net| net.addr().is_ipv6()) {
                service.push(DNS_SERVICE_V6.into());
            }
        }
        service
    }

    /// Whether a peer may have us look names up: one that leaves by us, and may ask the Internet.
    pub fn lets_look_up(&self, peer: IpAddr) -> bool {
        let (Some(rules), Some(ours)) = (&self.lets_out, self.peers.get(&peer)) else {
            return false;
        };
        *ours || FAR_AWAY.iter().any(|to| admits(rules, peer, *to))
    }

    /// Whether this is a name that we do not look up for others.
    pub fn is_filtered(&self, name: &Name) -> bool {
        let name = name.to_lowercase().to_ascii();
        let name = name.trim_end_matches('.');
        let filtered = self
            .config
            .iter()
            .flat_map(|config| &config.exit_node_filtered_set);
        filtered
            .into_iter()
            .any(|entry| match entry.strip_prefix('.') {
                Some(_) => name.ends_with(entry.as_str()),
                None => name == entry,
            })
    }

    /// What of the network's wishes cannot be had, in sentences.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        let parts =
            self.config.as_ref().map_or(0, |config| config.left_out) + self.zones.left_out();
        let left_out = (parts > 0).then(|| {
            format!("{parts} parts of the network's DNS settings mean nothing, or are too many, and are left out")
        });
        self.zones.unusable().iter().cloned().chain(left_out)
    }

    /// For people.
    pub fn status(&self) -> Value {
        let Some(config) = &self.config else {
            return json!({"answers": false});
        };
        let shown = |upstreams: &[Upstream]| -> Vec<String> {
            upstreams.iter().map(Upstream::to_string).collect()
        };
        let routes: serde_json::Map<String, Value> = config
            .routes
            .iter()
            .map(|(suffix, resolvers)| {
                let resolvers = resolvers.iter().map(|resolver| resolver.addr.as_str());
                (suffix.clone(), resolvers.collect())
            })
            .collect();
        json!({
            "answers": true,
            "addresses": self.service(),
            "magic_dns": config.proxied,
            "suffix": self.own_suffix,
            "search": config.search,
            "routes": routes,
            "resolvers": self.zones.for_all_names().map(shown),
            "extra_records": config.extra_records.len(),
            "host": self.host.as_ref().map(|host| json!({
                "servers": host.servers, "for_all_names": host.default,
            })),
        })
    }
}

/// Whether rules let a peer ask for names there.
fn admits(rules: &Rules, peer: IpAddr, to: IpAddr) -> bool {
    let holds = |net: IpNet, ip: &IpAddr| net.contains(ip);
    match rules {
        Rules::AllowAll => true,
        Rules::List(rules) => rules.iter().any(|rule| {
            let ports = |first, last| (first..=last).contains(&DNS_PORT);
            let mut destinations = rule.destinations.iter();
            DNS_PROTOCOLS
                .iter()
                .any(|protocol| rule.protocols.contains(protocol))
                && rule
                    .sources
                    .iter()
                    .any(|source| holds((*source).into(), &peer))
                && destinations
                    .any(|(net, first, last)| holds((*net).into(), &to) && ports(*first, *last))
        }),
    }
}

/// Whom the host's resolver is to ask, and what for. Without servers it is no wish at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostDns {
    /// The servers, best first: our own.
    pub servers: Vec<IpAddr>,
    /// Domains in which names without a dot are looked for, in this order; no dot at the end.
    pub search: Vec<String>,
    /// Domains whose names the servers are asked for, besides those of `search`.
    pub match_domains: Vec<String>,
    /// They are asked for all other names as well.
    pub default: bool,
}

#[cfg(test)]
mod tests {
    use ringtail_dataplane::Rule;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn wish(config: Value, accepted: bool) -> Wish {
        let config: DnsConfig = serde_json::from_value(config).unwrap();
        let addresses = [net("100.64.0.1/32"), net("fd7a:115c:a1e0::1/128")];
        let own = Own {
            name: "a.lab.example.",
            addresses: &addresses,
            names_have_v6: false,
        };
        Wish::new(
            &config.into(),
            own,
            std::iter::empty(),
            &Exit::None,
            accepted,
        )
    }

    #[test]
    fn the_host_is_told_of_suffixes_and_of_all_names_only_where_there_is_somebody_to_ask() {
        let split = json!({"Proxied": true, "Domains": ["lab.example"],
            "Routes": {"corp.example": [{"Addr": "10.0.0.53"}], ".": []}});
        let host = wish(split.clone(), true).host.unwrap();
        assert_eq!(host.servers, [IpAddr::from(DNS_SERVICE_V4)]);
        assert_eq!(host.search, ["lab.example"]);
        assert!(!host.default);
        for suffix in ["lab.example", "corp.example", "64.100.in-addr.arpa"] {
            assert!(
                host.match_domains.iter().any(|domain| domain == suffix),
                "{suffix}"
            );
        }
        assert!(host.match_domains.iter().all(|domain| !domain.is_empty()));
        let all = json!({"Resolvers": [{"Addr": "192.0.2.1"}]});
        assert!(wish(all, true).host.unwrap().default);
        let none_that_can_be_asked = json!({"Resolvers": [{"Addr": "https://dns.example/q"}]});
        let unusable = wish(none_that_can_be_asked, true);
        assert_eq!(unusable.host, None);
        assert_eq!(unusable.problems().count(), 1);
        let for_the_root = json!({"Routes": {".": [{"Addr": "https://dns.example/q"}]}});
        assert!(wish(for_the_root, true).zones.for_all_names().is_none());
        assert_eq!(wish(split.clone(), false).host, None, "nobody wants that");
        assert_eq!(
            wish(split, false).service().len(),
            2,
            "it answers all the same"
        );
        assert!(Wish::default().service().is_empty());
    }

    #[test]
    fn with_an_exit_node_no_server_is_asked_beside_ours() {
        let config: DnsConfig = serde_json::from_value(json!({"Proxied": true})).unwrap();
        let config = Arc::new(config);
        let asked_for_all = |exit: &Exit| {
            let own = Own {
                name: "a.lab.example.",
                addresses: &[net("100.64.0.1/32")],
                names_have_v6: false,
            };
            let wish = Wish::new(&config, own, std::iter::empty(), exit, true);
            wish.host.is_some_and(|host| host.default)
        };
        assert!(!asked_for_all(&Exit::None));
        assert!(asked_for_all(&Exit::Silent));
    }

    #[test]
    fn names_are_looked_up_for_those_who_may_leave_by_us() {
        let [ours, let_out, kept_in, stranger] =
            [2, 3, 4, 5].map(|n| IpAddr::from([100, 64, 0, n]));
        let mut wish = wish(json!({}), true);
        wish.peers = [(ours, true), (let_out, false), (kept_in, false)].into();
        let asked =
            |wish: &Wish| [ours, let_out, kept_in, stranger].map(|ip| wish.lets_look_up(ip));
        assert_eq!(asked(&wish), [false; 4], "this is no way out");
        let rule = |source: &str, to: &str, first, last, protocol| Rule {
            sources: vec![net(source).into()],
            destinations: vec![(net(to).into(), first, last)],
            protocols: vec![protocol],
        };
        wish.lets_out = Some(Arc::new(Rules::List(vec![
            rule("100.64.0.3/32", "8.0.0.0/7", 0, 65535, 17),
            rule("100.64.0.4/32", "8.0.0.0/7", 0, 52, 17),
            rule("100.64.0.4/32", "8.0.0.0/7", 0, 65535, 1),
            rule("100.64.0.0/10", "100.64.0.1/32", 0, 65535, 6),
        ])));
        assert_eq!(asked(&wish), [true, true, false, false]);
        wish.lets_out = Some(Arc::new(Rules::AllowAll));
        assert_eq!(asked(&wish), [true, true, true, false]);
    }

    #[test]
    fn some_names_are_not_looked_up_for_others() {
        let wish = wish(
            json!({"ExitNodeFilteredSet": [".secret.example", "one.example."]}),
            true,
        );
        for (name, filtered) in [
            ("a.Secret.example.", true),
            ("secret.example.", false),
            ("ONE.example", true),
            ("a.one.example", false),
            ("notsecret.example", false),
        ] {
            let name = Name::from_str_relaxed(name).unwrap();
            assert_eq!(wish.is_filtered(&name), filtered, "{name}");
        }
    }
}
