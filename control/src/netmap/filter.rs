//! The packet filter: from the server's rules to [`Rules`] for the data plane.
//!
//! Texts become prefixes (`*` both families, a range the fewest prefixes that cover it, `cap:` the
//! addresses of the peers that have the attribute), protocols are spelt out, and destinations are
//! cut down to what is local: our own addresses and the routes we advertise
//! (`protocol/coordination-map.md` §9). The one rule that lets everybody do everything becomes
//! [`Rules::AllowAll`], the data plane's fast path; it is a little wider than the rule's letter,
//! which means TCP, UDP and ICMP to local destinations.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, IpSubnets};
use ringtail_dataplane::{Rule, Rules};

use super::wire::{FilterRule, Node};

/// Sources and destinations of a compiled filter: a source can stand for an attribute that every peer
/// has, and a destination for each of our routes. What is more is left out, which lets fewer in.
pub const COMPILED_MAX: usize = 1 << 18;

/// TCP, UDP, ICMP, ICMPv6: what a rule without protocols is about.
pub const DEFAULT_PROTOCOLS: [u8; 4] = [6, 17, 1, 58];

/// Compiles rules. `local` are our own addresses and advertised routes, `peers` the peer table.
/// A filter with the long dead `SrcBits` or `Bits` is refused whole: nothing may come in.
pub fn compile<'a>(
    rules: impl Iterator<Item = &'a FilterRule> + Clone,
    local: &[IpNet],
    peers: impl Iterator<Item = &'a Arc<Node>> + Clone,
) -> Rules {
    let dead = |rule: &FilterRule| {
        !rule.src_bits.is_empty() || rule.dst_ports.iter().any(|dst| dst.bits.is_some())
    };
    if rules.clone().any(dead) {
        return Rules::List(Vec::new());
    }
    if rules.clone().any(|rule| *rule == FilterRule::allow_all()) {
        return Rules::AllowAll;
    }
    let mut room = COMPILED_MAX;
    let compiled: Vec<Rule> = rules
        .filter_map(|rule| {
            let rule = compile_rule(rule, local, peers.clone(), room)?;
            room = room.checked_sub(rule.sources.len() + rule.destinations.len())?;
            Some(rule)
        })
        .collect();
    // A peer without network access that the filter lets in makes the filter suspect: deny all.
    let barred = peers.filter(|peer| peer.unsigned_peer_api_only);
    let mut addresses = barred.flat_map(|peer| peer.addresses.iter());
    let admits = |address: &IpNet| {
        let mut sources = compiled.iter().flat_map(|rule| &rule.sources);
        sources.any(|source| IpNet::from(*source).contains(&address.addr()))
    };
    if addresses.any(admits) {
        return Rules::List(Vec::new());
    }
    Rules::List(compiled)
}

fn compile_rule<'a>(
    rule: &FilterRule,
    local: &[IpNet],
    peers: impl Iterator<Item = &'a Arc<Node>> + Clone,
    room: usize,
) -> Option<Rule> {
    let mut protocols: Vec<u8> = rule
        .ip_proto
        .iter()
        .filter_map(|p| u8::try_from(*p).ok())
        .collect();
    if rule.ip_proto.is_empty() {
        protocols = DEFAULT_PROTOCOLS.to_vec();
    }
    let mut sources = Vec::new();
    for text in &rule.src_ips {
        if sources.len() > room {
            return None;
        }
        if let Some(attribute) = text.strip_prefix("cap:") {
            let has = |peer: &&Arc<Node>| {
                peer.cap_map
                    .as_ref()
                    .is_some_and(|map| map.contains_key(attribute))
            };
            let owners = peers.clone().filter(has);
            sources.extend(owners.flat_map(|peer| peer.addresses.iter().copied()));
        } else {
            sources.extend(parse(text));
        }
    }
    let mut destinations = Vec::new();
    for destination in &rule.dst_ports {
        if destinations.len() > room {
            return None;
        }
        for net in parse(&destination.ip) {
            let cut = local.iter().filter_map(|local| intersection(&net, local));
            let ports = destination.ports;
            destinations.extend(cut.map(|net| (net.into(), ports.first, ports.last)));
        }
    }
    if sources.is_empty() || destinations.is_empty() || protocols.is_empty() {
        return None;
    }
    Some(Rule {
        sources: sources.into_iter().map(Into::into).collect(),
        destinations,
        protocols,
    })
}

/// The prefixes a text stands for; none when it does not parse or has host bits set.
fn parse(text: &str) -> Vec<IpNet> {
    if text == "*" {
        let v4 = IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0);
        let v6 = IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0);
        return vec![v4, v6];
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return vec![address.into()];
    }
    if let Ok(net) = text.parse::<IpNet>() {
        return if net.trunc() == net {
            vec![net]
        } else {
            Vec::new()
        };
    }
    let ends = text.split_once('-').map(|(a, b)| (a.parse(), b.parse()));
    match ends {
        Some((Ok(IpAddr::V4(a)), Ok(IpAddr::V4(b)))) if a <= b => {
            IpSubnets::from(ipnet::Ipv4Subnets::new(a, b, 0)).collect()
        }
        Some((Ok(IpAddr::V6(a)), Ok(IpAddr::V6(b)))) if a <= b => {
            IpSubnets::from(ipnet::Ipv6Subnets::new(a, b, 0)).collect()
        }
        Some(_) | None => Vec::new(),
    }
}

/// The smaller of two prefixes when one holds the other.
fn intersection(a: &IpNet, b: &IpNet) -> Option<IpNet> {
    let (a, b) = (a.trunc(), b.trunc());
    if a.contains(&b) {
        Some(b)
    } else if b.contains(&a) {
        Some(a)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::Value;

    #[derive(Deserialize)]
    struct Packet {
        why: String,
        proto: u8,
        src: IpAddr,
        dst: IpAddr,
        #[serde(default)]
        dport: u16,
        #[serde(default)]
        sport: u16,
        #[serde(default)]
        tcp_flags: String,
        icmp: Option<(u8, u8)>,
        #[serde(default)]
        outbound_before: Option<Value>,
        #[serde(default)]
        src_peer_capmap: Option<super::super::wire::CapMap>,
        #[serde(default)]
        shields_up: bool,
        accept: bool,
    }

    /// The decision procedure of `protocol/coordination-map.md` §9 over compiled rules, scanned
    /// line by line: what the data plane's filter has to agree with.
    fn decide(rules: &Rules, local: &[IpNet], packet: &Packet) -> bool {
        let list = match rules {
            Rules::AllowAll => return true,
            Rules::List(list) => list,
        };
        let matches = |by_proto: bool, whole_range: bool| {
            list.iter().any(|rule| {
                (!by_proto || rule.protocols.contains(&packet.proto))
                    && rule
                        .sources
                        .iter()
                        .any(|net| IpNet::from(*net).contains(&packet.src))
                    && rule.destinations.iter().any(|(net, first, last)| {
                        let ports = if whole_range {
                            (*first, *last) == (0, u16::MAX)
                        } else {
                            !by_proto || (*first..=*last).contains(&packet.dport)
                        };
                        IpNet::from(*net).contains(&packet.dst) && ports
                    })
            })
        };
        if packet.dst.is_multicast() || !local.iter().any(|net| net.contains(&packet.dst)) {
            return false;
        }
        match (packet.proto, packet.icmp) {
            (1, Some((0 | 3 | 11 | 12, _))) | (58, Some((1..=4 | 129, _))) => true,
            (1 | 58, _) => matches(false, false),
            (6, _) => packet.tcp_flags != "S" || matches(true, false),
            (17 | 132, _) => {
                let reply = packet.outbound_before.as_ref().is_some_and(|out| {
                    out["dst"] == packet.src.to_string()
                        && out["dport"] == packet.sport
                        && out["src"] == packet.dst.to_string()
                        && out["sport"] == packet.dport
                });
                reply || matches(true, false)
            }
            (99, _) => true,
            (_, _) => matches(true, true),
        }
    }

    #[test]
    fn compiled_rules_decide_every_packet_of_the_table() {
        let text = include_str!("../../tests/vectors/coordination-cases.json");
        let table: Value = serde_json::from_str(text).unwrap();
        let table = &table["filter"];
        let rules: Vec<FilterRule> = serde_json::from_value(table["rules"].clone()).unwrap();
        let local: Vec<IpNet> = serde_json::from_value(table["local"].clone()).unwrap();
        let packets: Vec<Packet> = serde_json::from_value(table["packets"].clone()).unwrap();
        assert_eq!(packets.len(), 27);
        for packet in packets {
            let peer = Arc::new(Node {
                addresses: vec![packet.src.into()],
                cap_map: packet.src_peer_capmap.clone(),
                ..Node::default()
            });
            let list: &[FilterRule] = if packet.shields_up { &[] } else { &rules };
            let compiled = compile(list.iter(), &local, [peer].iter());
            assert_eq!(
                decide(&compiled, &local, &packet),
                packet.accept,
                "{}",
                packet.why
            );
        }
    }

    #[test]
    fn the_allow_all_rule_is_the_fast_path_and_no_rule_denies_all() {
        let none: [Arc<Node>; 0] = [];
        let all = [FilterRule::allow_all()];
        assert!(matches!(
            compile(all.iter(), &[], none.iter()),
            Rules::AllowAll
        ));
        let Rules::List(list) = compile([].iter(), &[], none.iter()) else {
            panic!("an empty filter denies all");
        };
        assert!(list.is_empty());
    }

    #[test]
    fn an_attribute_of_all_peers_in_every_rule_does_not_multiply() {
        let peer = |i: u32| {
            let address = IpAddr::V4(Ipv4Addr::from_bits(0x6440_0000 + i));
            Arc::new(Node {
                addresses: vec![address.into()],
                cap_map: Some([("all".to_owned(), None)].into_iter().collect()),
                ..Node::default()
            })
        };
        let peers: Vec<Arc<Node>> = (0..4096).map(peer).collect();
        let mut rule = FilterRule::allow_all();
        rule.src_ips = vec!["cap:all".to_owned(); 8];
        let rules = vec![rule; 100];
        let local = ["10.0.0.0/8".parse().unwrap()];
        let Rules::List(list) = compile(rules.iter(), &local, peers.iter()) else {
            panic!("a list");
        };
        let len = |rule: &Rule| rule.sources.len() + rule.destinations.len();
        let total: usize = list.iter().map(len).sum();
        assert!(total <= COMPILED_MAX && total > COMPILED_MAX / 2, "{total}");
    }

    #[test]
    fn application_grants_admit_nobody_and_do_no_harm_whatever_is_in_them() {
        let values = vec![serde_json::json!({"kind": "x".repeat(1000)}); 1000];
        let grant = serde_json::json!([
            {"Dsts": ["*"], "CapMap": {"example.com/cap": values}, "Caps": ["any"]},
        ]);
        let read = |text: String| serde_json::from_str::<FilterRule>(&text).unwrap();
        let alone = read(format!(r#"{{"SrcIPs": ["*"], "CapGrant": {grant}}}"#));
        let ports = r#"[{"IP": "*", "Ports": {"First": 22, "Last": 22}}]"#;
        let beside = format!(r#"{{"SrcIPs": ["*"], "DstPorts": {ports}, "CapGrant": {grant}}}"#);
        let local: Vec<IpNet> = vec!["100.64.0.1/32".parse().unwrap()];
        let none: [Arc<Node>; 0] = [];
        let rules = [alone, read(beside)];
        let Rules::List(list) = compile(rules.iter(), &local, none.iter()) else {
            panic!("a list");
        };
        let ports = list.iter().flat_map(|rule| &rule.destinations);
        let ports: Vec<_> = ports.map(|(_, first, last)| (*first, *last)).collect();
        assert_eq!(ports, [(22, 22)]);
    }

    #[test]
    fn a_range_becomes_the_fewest_prefixes_and_host_bits_are_refused() {
        let texts =
            |text: &str| -> Vec<String> { parse(text).iter().map(IpNet::to_string).collect() };
        assert_eq!(
            texts("100.64.0.3-100.64.0.6"),
            ["100.64.0.3/32", "100.64.0.4/31", "100.64.0.6/32"]
        );
        assert_eq!(texts("10.0.0.1/8"), [""; 0]);
        assert_eq!(texts("10.0.0.9-10.0.0.1"), [""; 0]);
        assert_eq!(texts("fd7a::1-fd7a::1"), ["fd7a::1/128"]);
    }

    #[test]
    fn a_filter_that_admits_a_barred_peer_is_discarded() {
        let rule = FilterRule {
            src_ips: vec!["100.64.0.0/24".to_owned()],
            ..FilterRule::allow_all()
        };
        let mut peer = Node {
            addresses: vec!["100.64.0.9/32".parse().unwrap()],
            ..Node::default()
        };
        let local: Vec<IpNet> = vec!["100.64.0.1/32".parse().unwrap()];
        let count = |peer: &Node| {
            let peers = [Arc::new(peer.clone())];
            match compile([&rule].into_iter(), &local, peers.iter()) {
                Rules::List(list) => list.len(),
                Rules::AllowAll => usize::MAX,
            }
        };
        assert_eq!(count(&peer), 1);
        peer.unsigned_peer_api_only = true;
        assert_eq!(count(&peer), 0);
    }
}
