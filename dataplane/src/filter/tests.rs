//! Known answers from the reference's behaviour (`coordination-cases.json`, section "filter"), and
//! a plain reading of the rules as the oracle for everything random.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, RngExt};
use serde_json::Value;

use super::*;
use crate::packet::build::{Builder, Tcp};
use crate::route::{Table, covers, masked};
use crate::seeded;
use crate::sys::now;
use crate::types::{Prefix, Rule, Rules};

const DENIED: Result<(), DropReason> = Err(DropReason::FilterDenied);
const NOT_LOCAL: Result<(), DropReason> = Err(DropReason::FilterNotLocal);

fn prefix(text: &str) -> Prefix {
    let (addr, bits) = match text.split_once('/') {
        Some((addr, bits)) => (addr.parse().unwrap(), bits.parse().unwrap()),
        None => {
            let addr: IpAddr = text.parse().unwrap();
            (addr, if addr.is_ipv4() { 32 } else { 128 })
        }
    };
    Prefix { addr, bits }
}

/// The forms of the control side's filter, spelled out as prefixes: `*`, address, prefix, range.
fn expand(text: &str) -> Vec<Prefix> {
    if text == "*" {
        return vec![prefix("0.0.0.0/0"), prefix("::/0")];
    }
    if let Some((first, last)) = text.split_once('-') {
        let bits = |text: &str| text.parse::<Ipv4Addr>().unwrap().to_bits();
        return (bits(first)..=bits(last))
            .map(|bits| Prefix {
                addr: IpAddr::V4(bits.into()),
                bits: 32,
            })
            .collect();
    }
    vec![prefix(text)]
}

/// A rule of the file; `cap:` sources stand for the packet's source where its peer has the
/// attribute, as the control side resolves them.
fn rule(json: &Value, packet: &Value) -> Rule {
    let mut sources = Vec::new();
    for source in json["SrcIPs"].as_array().unwrap() {
        let source = source.as_str().unwrap();
        match source.strip_prefix("cap:") {
            Some(attribute) if packet["src_peer_capmap"][attribute].is_array() => {
                sources.push(prefix(packet["src"].as_str().unwrap()));
            }
            Some(_) => {}
            None => sources.extend(expand(source)),
        }
    }
    let port = |json: &Value| u16::try_from(json.as_u64().unwrap()).unwrap();
    let destinations = json["DstPorts"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|entry| {
            let range = &entry["Ports"];
            expand(entry["IP"].as_str().unwrap())
                .into_iter()
                .map(|prefix| (prefix, port(&range["First"]), port(&range["Last"])))
                .collect::<Vec<_>>()
        })
        .collect();
    let protocols = match json["IPProto"].as_array() {
        Some(list) => list
            .iter()
            .map(|n| u8::try_from(n.as_u64().unwrap()).unwrap())
            .collect(),
        None => vec![TCP, UDP, ICMP, ICMPV6],
    };
    Rule {
        sources,
        destinations,
        protocols,
    }
}

/// A TCP header with these flags.
fn segment(flags: u8) -> Tcp<'static> {
    Tcp {
        seq: 1,
        ack: 1,
        flags,
        window: 1,
        options: &[],
    }
}

/// The packet of a row, with ports of a row of either direction.
fn build(row: &Value, protocol: u8) -> Vec<u8> {
    let socket = |ip: &str, port: &str| {
        let ip: IpAddr = row[ip].as_str().unwrap().parse().unwrap();
        (ip, u16::try_from(row[port].as_u64().unwrap_or(0)).unwrap()).into()
    };
    let builder = Builder::new(socket("src", "sport"), socket("dst", "dport"));
    match protocol {
        TCP => {
            let flags = row["tcp_flags"]
                .as_str()
                .unwrap()
                .bytes()
                .fold(0, |flags, flag| {
                    flags | if flag == b'S' { TCP_SYN } else { TCP_ACK }
                });
            builder.tcp(&segment(flags), b"")
        }
        UDP => builder.udp(b"x"),
        ICMP | ICMPV6 => {
            let byte = |i: usize| u8::try_from(row["icmp"][i].as_u64().unwrap()).unwrap();
            builder.icmp(byte(0), byte(1), &[0; 4])
        }
        other => builder.ip(other, &[0; 8]),
    }
}

#[test]
fn decisions_are_those_of_the_reference() {
    let file = include_str!("../../../control/tests/vectors/coordination-cases.json");
    let cases: Value = serde_json::from_str(file).unwrap();
    let cases = &cases["filter"];
    let local: Vec<Prefix> = cases["local"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| prefix(text.as_str().unwrap()))
        .collect();
    let packets = cases["packets"].as_array().unwrap();
    assert_eq!(packets.len(), 27);
    let now = now();
    for row in packets {
        // Grants have no destinations and admit no packets.
        let list = cases["rules"].as_array().unwrap();
        let list = list.iter().filter(|json| json["DstPorts"].is_array());
        let mut rules: Vec<Rule> = list.map(|json| rule(json, row)).collect();
        if row["shields_up"] == true {
            rules.clear();
        }
        let compiled = CompiledRules::compile(&Rules::List(rules), Some(&local));
        let mut filter = Filter::new(now, Arc::new(compiled));
        let protocol = u8::try_from(row["proto"].as_u64().unwrap()).unwrap();
        if row["outbound_before"].is_object() {
            let packet = build(&row["outbound_before"], protocol);
            let headers = Headers::parse(&packet).unwrap();
            assert!(filter.remember(now, &headers, &packet).is_some());
        }
        let packet = build(row, protocol);
        let headers = Headers::parse(&packet).unwrap();
        let verdict = filter.decide(now, &headers, &packet);
        let accept = matches!(verdict, Ok(()) | Err(DropReason::FilterConsumed));
        assert_eq!(accept, row["accept"] == true, "{}: {verdict:?}", row["why"]);
    }
}

fn between(src: &str, dst: &str) -> Builder {
    Builder::new(src.parse().unwrap(), dst.parse().unwrap())
}

fn deny_all(now: Instant) -> Filter {
    Filter::new(now, compiled(Rules::default()))
}

fn compiled(rules: Rules) -> Arc<CompiledRules> {
    Arc::new(CompiledRules::compile(&rules, None))
}

/// A UDP packet and its answer.
fn question_and_answer() -> [Vec<u8>; 2] {
    let (ours, theirs) = ("10.0.0.1:1", "10.0.0.2:2");
    [(ours, theirs), (theirs, ours)].map(|(src, dst)| between(src, dst).udp(b"x"))
}

fn admit(filter: &mut Filter, now: Instant, packet: &[u8]) -> Result<(), DropReason> {
    filter.admit(now, &Headers::parse(packet)?, packet)
}

fn remember(filter: &mut Filter, now: Instant, packet: &[u8]) -> Option<Flow> {
    filter.remember(now, &Headers::parse(packet).unwrap(), packet)
}

#[test]
fn allow_all_admits_everything_and_remembers_nothing() {
    let now = now();
    let mut filter = Filter::new(now, Arc::new(CompiledRules::allow_all()));
    let packet = between("10.0.0.1:1", "224.0.0.1:2").udp(b"x");
    assert_eq!(admit(&mut filter, now, &packet), Ok(()));
    assert_eq!(remember(&mut filter, now, &packet), None);
    assert!(filter.flows.is_none());
    // Memory starts with the first list and outlives later rules.
    filter.set_rules(now, compiled(Rules::default()));
    let [out, reply] = question_and_answer();
    assert_eq!(admit(&mut filter, now, &reply), DENIED);
    assert!(remember(&mut filter, now, &out).is_some());
    filter.set_rules(now, compiled(Rules::default()));
    assert_eq!(admit(&mut filter, now, &reply), Ok(()));
}

#[test]
fn what_began_under_allow_all_is_still_known_under_a_list() {
    let now = now();
    let local = [prefix("10.0.0.0/24")];
    let rules = |rules| Arc::new(CompiledRules::compile(&rules, Some(&local)));
    let mut filter = Filter::new(now, rules(Rules::AllowAll));
    let (us, them) = ("10.0.0.1:7", "10.0.0.2:2");
    let theirs = between(them, us).udp(b"x");
    let ours = between("10.0.0.1:8", them).udp(b"x");
    let reply = between(them, "10.0.0.1:8").udp(b"x");
    assert_eq!(admit(&mut filter, now, &theirs), Ok(()));
    let answer = between(us, them).udp(b"x");
    assert_eq!(remember(&mut filter, now, &answer), None);
    assert!(remember(&mut filter, now, &ours).is_some());
    assert_eq!(admit(&mut filter, now, &reply), Ok(()));
    filter.set_rules(now, rules(Rules::default()));
    // What only receives goes on; what the peer began does not, and our answers change nothing.
    assert_eq!(admit(&mut filter, now, &reply), Ok(()));
    assert_eq!(remember(&mut filter, now, &answer), None);
    assert_eq!(admit(&mut filter, now, &theirs), DENIED);
}

#[test]
fn every_peer_may_connect_to_our_peerapi_and_to_no_other_port() {
    let now = now();
    let mut filter = deny_all(now);
    let to = |dst| between("10.0.0.2:9", dst).tcp(&segment(TCP_SYN), b"");
    let api = "10.0.0.1:7";
    assert_eq!(admit(&mut filter, now, &to(api)), DENIED);
    filter.set_peerapi(PeerApi {
        v4: Some(api.parse().unwrap()),
        v6: Some("[fd7a::1]:8".parse().unwrap()),
    });
    assert_eq!(admit(&mut filter, now, &to(api)), Ok(()));
    assert_eq!(admit(&mut filter, now, &to("10.0.0.1:8")), DENIED);
    assert_eq!(admit(&mut filter, now, &to("10.0.0.3:7")), DENIED);
    let udp = between("10.0.0.2:9", api).udp(b"x");
    assert_eq!(admit(&mut filter, now, &udp), DENIED);
    let v6 = |port| {
        let us = format!("[fd7a::1]:{port}");
        between("[fd7a::2]:9", &us).tcp(&segment(TCP_SYN), b"")
    };
    assert_eq!(admit(&mut filter, now, &v6(8)), Ok(()));
    assert_eq!(admit(&mut filter, now, &v6(7)), DENIED);
    filter.set_peerapi(PeerApi::default());
    assert_eq!(admit(&mut filter, now, &to(api)), DENIED);
}

#[test]
fn tsmp_is_consumed_by_a_node_and_passed_by_a_plain_device() {
    let now = now();
    let packet = between("10.0.0.2:0", "10.0.0.1:0").ip(TSMP, b"p12345678");
    let consumed = Err(DropReason::FilterConsumed);
    let own = [prefix("10.0.0.1")];
    for (rules, local, want) in [
        (Rules::default(), Some(&own[..]), consumed),
        (Rules::AllowAll, Some(&own[..]), consumed),
        (Rules::AllowAll, None, Ok(())),
    ] {
        let rules = Arc::new(CompiledRules::compile(&rules, local));
        let mut filter = Filter::new(now, rules);
        assert_eq!(admit(&mut filter, now, &packet), want);
    }
}

#[test]
fn until_rules_are_given_nothing_passes() {
    let now = now();
    let mut filter = Filter::closed();
    let (us, them) = ("10.0.0.1:1", "10.0.0.2:2");
    let tcp = |flags| between(them, us).tcp(&segment(flags), b"x");
    let answer_to_a_ping = between(them, us).icmp(0, 0, b"x");
    for packet in [
        between(them, us).udp(b"x"),
        tcp(TCP_SYN),
        tcp(TCP_ACK),
        answer_to_a_ping,
    ] {
        assert_eq!(admit(&mut filter, now, &packet), NOT_LOCAL);
    }
    assert_eq!(
        remember(&mut filter, now, &between(us, them).udp(b"x")),
        None
    );
    assert!(filter.flows.is_none(), "no memory before it is of use");
}

#[test]
fn allow_all_makes_no_router_of_us_for_what_we_do_not_offer() {
    let now = now();
    let local = ["10.0.0.1", "10.9.0.0/16"].map(prefix);
    let rules = |local: &[Prefix]| Arc::new(CompiledRules::compile(&Rules::AllowAll, Some(local)));
    let mut filter = Filter::new(now, rules(&local));
    let to = |dst: &str| between("10.0.0.2:1", dst).udp(b"x");
    for _ in 0..2 {
        assert_eq!(admit(&mut filter, now, &to("10.0.0.1:2")), Ok(()));
        assert_eq!(admit(&mut filter, now, &to("10.9.1.1:2")), Ok(()));
        assert_eq!(admit(&mut filter, now, &to("172.17.0.1:2")), NOT_LOCAL);
    }
    // What was local under the old rules is asked for anew.
    assert_eq!(admit(&mut filter, now, &to("10.9.1.1:2")), Ok(()));
    filter.set_rules(now, rules(&local[..1]));
    assert_eq!(admit(&mut filter, now, &to("10.9.1.1:2")), NOT_LOCAL);
}

#[test]
fn a_flow_is_forgotten_after_its_timeout_unless_it_is_used() {
    let now = now();
    let mut filter = deny_all(now);
    let [out, reply] = question_and_answer();
    let second = Duration::from_secs(1);
    assert!(remember(&mut filter, now, &out).is_some());
    let later = now + FLOW_TIMEOUT - second;
    assert_eq!(admit(&mut filter, later, &reply), Ok(()));
    let later = later + FLOW_TIMEOUT - second;
    assert_eq!(admit(&mut filter, later, &reply), Ok(()));
    let later = later + FLOW_TIMEOUT;
    assert_eq!(admit(&mut filter, later, &reply), DENIED);
}

#[test]
fn a_flow_is_reported_when_new_and_then_once_a_minute() {
    let now = now();
    let mut filter = deny_all(now);
    let mut owner = deny_all(now);
    let [out, reply] = question_and_answer();
    let flow = remember(&mut filter, now, &out).unwrap();
    assert_eq!(flow, Headers::parse(&reply).unwrap().flow(&reply));
    assert_eq!(remember(&mut filter, now, &out), None);
    assert_eq!(
        remember(&mut filter, now + FLOW_REPORT_INTERVAL / 2, &out),
        None
    );
    assert_eq!(
        remember(&mut filter, now + FLOW_REPORT_INTERVAL, &out),
        Some(flow)
    );
    assert_eq!(
        remember(&mut filter, now + FLOW_REPORT_INTERVAL, &out),
        None
    );
    // The shard that was told admits the replies.
    assert_eq!(admit(&mut owner, now, &reply), DENIED);
    owner.learn(now, flow);
    assert_eq!(admit(&mut owner, now, &reply), Ok(()));
}

#[test]
fn a_flow_that_another_shard_tells_of_before_the_first_list_is_kept() {
    let now = now();
    let (mut first, mut owner) = (deny_all(now), Filter::closed());
    let [out, reply] = question_and_answer();
    let flow = remember(&mut first, now, &out).unwrap();
    owner.learn(now, flow);
    assert_eq!(
        admit(&mut owner, now, &reply),
        NOT_LOCAL,
        "as everything is"
    );
    owner.set_rules(now, Arc::clone(&first.rules));
    assert_eq!(admit(&mut owner, now, &reply), Ok(()));
    let other = between("10.0.0.2:2", "10.0.0.1:3").udp(b"x");
    assert_eq!(admit(&mut owner, now, &other), DENIED);
}

#[test]
fn memory_of_flows_is_bounded_and_evictions_are_counted() {
    let now = now();
    let mut filter = deny_all(now);
    let flows = u32::try_from(2 * FLOWS_MAX).unwrap();
    let us = "10.0.0.1:1".parse().unwrap();
    let out = |i: u32| {
        let to = IpAddr::from((0x0a00_0000 + i).to_be_bytes());
        Builder::new(us, (to, 53).into()).udp(b"")
    };
    for i in 0..flows {
        let later = now + Duration::from_millis(u64::from(i) / 100);
        assert!(remember(&mut filter, later, &out(i)).is_some());
    }
    let evicted = filter.take_evicted();
    assert!(
        (u64::from(flows) / 2..u64::from(flows) * 6 / 10).contains(&evicted),
        "{evicted}"
    );
    assert_eq!(filter.take_evicted(), 0);
    // The newest are still there.
    let kept = (flows - 1000..flows).filter(|i| remember(&mut filter, now, &out(*i)).is_none());
    assert!(kept.count() > 990);
}

#[test]
fn tcp_connections_are_guarded_by_their_first_packet() {
    let now = now();
    let mut filter = deny_all(now);
    let tcp = |flags| between("10.0.0.2:2", "10.0.0.1:1").tcp(&segment(flags), b"data");
    for (flags, want) in [
        (TCP_SYN, DENIED),
        (TCP_SYN | 0x01, DENIED),
        (TCP_SYN | 0xc0, DENIED),
        (TCP_SYN | TCP_ACK, Ok(())),
        (TCP_ACK, Ok(())),
        (0x04, Ok(())),
        (0, Ok(())),
    ] {
        assert_eq!(
            admit(&mut filter, now, &tcp(flags)),
            want,
            "flags {flags:#04x}"
        );
    }
}

#[test]
fn fragments_cannot_hide_a_transport_header() {
    let now = now();
    let mut filter = deny_all(now);
    let at = |fragment, len| {
        Builder {
            fragment,
            ..between("10.0.0.2:2", "10.0.0.1:1")
        }
        .ip(TCP, &vec![0; len])
    };
    let hidden = Err(DropReason::FilterFragment);
    // First fragments are judged by their header, and must have one.
    assert_eq!(admit(&mut filter, now, &at(0x2000, 19)), hidden);
    assert_eq!(admit(&mut filter, now, &at(0x2000, 24)), Ok(()));
    // Later ones pass unless they reach into it.
    for offset in 1..10 {
        assert_eq!(
            admit(&mut filter, now, &at(offset, 64)),
            hidden,
            "offset {offset}"
        );
        assert_eq!(admit(&mut filter, now, &at(0x2000 | offset, 64)), hidden);
    }
    assert_eq!(admit(&mut filter, now, &at(10, 64)), Ok(()));
    assert_eq!(admit(&mut filter, now, &at(0x1fff, 0)), Ok(()));
    // Whole packets without a whole header.
    for (protocol, len) in [(TCP, 19), (UDP, 7), (SCTP, 11), (ICMP, 1)] {
        let packet = between("10.0.0.2:2", "10.0.0.1:1").ip(protocol, &vec![0; len]);
        let want = Err(DropReason::InnerMalformed);
        assert_eq!(
            admit(&mut filter, now, &packet),
            want,
            "protocol {protocol}"
        );
    }
}

#[test]
fn ipv6_fragments_and_extension_headers_are_seen_through() {
    let now = now();
    let mut filter = deny_all(now);
    let builder = between("[fd7a::2]:2", "[fd7a::1]:1");
    let tcp = builder.tcp(&segment(TCP_SYN), b"")[40..].to_vec();
    let with = |kind: u8, extension: &[u8]| builder.ip(kind, &[extension, &tcp].concat());
    let destination_options = with(60, &[TCP, 0, 1, 4, 0, 0, 0, 0]);
    assert_eq!(admit(&mut filter, now, &destination_options), DENIED);
    let atomic = with(44, &[TCP, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(admit(&mut filter, now, &atomic), DENIED);
    let first = with(44, &[TCP, 0, 0, 1, 0, 0, 0, 1]);
    assert_eq!(admit(&mut filter, now, &first), DENIED);
    let early = with(44, &[TCP, 0, 0, 8, 0, 0, 0, 1]);
    assert_eq!(
        admit(&mut filter, now, &early),
        Err(DropReason::FilterFragment)
    );
    let later = with(44, &[TCP, 0, 5, 0xa0, 0, 0, 0, 1]);
    assert_eq!(admit(&mut filter, now, &later), Ok(()));
}

#[test]
fn a_transport_that_extension_headers_hide_passes_no_rule_but_allow_all() {
    let now = now();
    let builder = between("[fd7a::9]:1000", "[fd7a::1]:2000");
    // Nine and a hundred headers in front of UDP, and one that runs past the end.
    let chain = |count: usize| {
        let mut body = [60, 0, 0, 0, 0, 0, 0, 0].repeat(count);
        body[8 * (count - 1)] = UDP;
        body.extend(&builder.udp(b"hidden")[40..]);
        builder.ip(60, &body)
    };
    let mut fragment = [60, 0, 0, 1, 1, 2, 3, 4, 60, 200].to_vec();
    fragment.resize(24, 0);
    let any = |text| vec![prefix(text)];
    let every = Rules::List(vec![Rule {
        sources: any("::/0"),
        protocols: (0..=255).collect(),
        destinations: vec![(prefix("::/0"), 0, u16::MAX)],
    }]);
    let mut rules = Filter::new(now, compiled(every));
    let mut all = Filter::new(now, compiled(Rules::AllowAll));
    let local = CompiledRules::compile(&Rules::AllowAll, Some(&any("fd7a::2/128")));
    let mut no_router = Filter::new(now, Arc::new(local));
    assert_eq!(admit(&mut rules, now, &chain(8)), Ok(()));
    for (packet, reason) in [
        (chain(9), DropReason::FilterDenied),
        (chain(100), DropReason::FilterDenied),
        (builder.ip(0, &[6, 9, 0, 0]), DropReason::FilterDenied),
        (builder.ip(44, &fragment), DropReason::FilterFragment),
    ] {
        assert_eq!(admit(&mut all, now, &packet), Ok(()));
        assert_eq!(admit(&mut rules, now, &packet), Err(reason));
        assert_eq!(admit(&mut no_router, now, &packet), NOT_LOCAL);
        assert_eq!(remember(&mut rules, now, &packet), None);
    }
}

#[test]
fn icmp_of_the_other_family_is_no_icmp() {
    let now = now();
    let mut filter = deny_all(now);
    let packet = between("10.0.0.2:2", "10.0.0.1:1").ip(ICMPV6, &[1, 0, 0, 0]);
    assert!(admit(&mut filter, now, &packet).is_err());
    let packet = between("[fd7a::2]:2", "[fd7a::1]:1").ip(ICMP, &[3, 3, 0, 0]);
    assert!(admit(&mut filter, now, &packet).is_err());
}

#[test]
fn link_local_and_multicast_are_refused_whatever_the_rules() {
    let now = now();
    let every = ["0.0.0.0/0", "::/0"].map(prefix);
    let rule = Rule {
        sources: every.to_vec(),
        destinations: every.iter().map(|p| (*p, 0, u16::MAX)).collect(),
        protocols: vec![UDP],
    };
    let mut filter = Filter::new(now, compiled(Rules::List(vec![rule])));
    let refused = Err(DropReason::FilterDestination);
    for (src, dst, want) in [
        ("10.0.0.2:2", "10.0.0.1:1", Ok(())),
        ("10.0.0.2:2", "224.0.0.251:5353", refused),
        ("10.0.0.2:2", "169.254.0.1:1", refused),
        ("10.0.0.2:2", "169.254.169.254:80", Ok(())),
        ("[fd7a::2]:2", "[fd7a::1]:1", Ok(())),
        ("[fd7a::2]:2", "[ff02::1]:1", refused),
        ("[fd7a::2]:2", "[fe80::1]:1", refused),
    ] {
        assert_eq!(
            admit(&mut filter, now, &between(src, dst).udp(b"x")),
            want,
            "{dst}"
        );
    }
}

#[test]
fn a_source_must_be_the_senders_own() {
    let mut table = Table::default();
    for (peer, theirs) in [
        (1, "10.0.0.1/32"),
        (1, "10.1.0.0/16"),
        (2, "10.0.0.2/32"),
        (2, "10.1.5.0/24"),
    ] {
        table.insert(prefix(theirs), PeerId(peer));
    }
    let mut cursor = table.cursor();
    let refused = Err(DropReason::SourceNotAllowed);
    for (peer, src, want) in [
        (1, "10.0.0.1:1", Ok(())),
        (1, "10.0.0.2:1", refused),
        (2, "10.0.0.2:1", Ok(())),
        (1, "10.1.4.4:1", Ok(())),
        (1, "10.1.5.4:1", refused),
        (2, "10.1.5.4:1", Ok(())),
        (2, "192.0.2.1:1", refused),
    ] {
        let packet = between(src, "10.0.0.9:9").udp(b"x");
        let headers = Headers::parse(&packet).unwrap();
        assert_eq!(
            source_allowed(&mut cursor, PeerId(peer), &headers),
            want,
            "{src} of {peer}"
        );
    }
}

/// A rule list read literally.
fn reference(rules: &[Rule], ask: Ask, src: IpAddr, dst: IpAddr) -> bool {
    rules.iter().any(|rule| {
        rule.sources
            .iter()
            .any(|source| covers(&masked(*source), src))
            && rule.destinations.iter().any(|(prefix, first, last)| {
                covers(&masked(*prefix), dst)
                    && match ask {
                        Ask::Any => true,
                        Ask::Port(protocol, port) => {
                            rule.protocols.contains(&protocol) && (*first..=*last).contains(&port)
                        }
                        Ask::AllPorts(protocol) => {
                            rule.protocols.contains(&protocol) && (*first, *last) == (0, u16::MAX)
                        }
                    }
            })
    })
}

fn random_addr(rng: &mut StdRng) -> IpAddr {
    if rng.random() {
        IpAddr::V4((0x0a00_0000 | (rng.random::<u32>() & 0x0000_0103)).into())
    } else {
        IpAddr::V6(((0xfd7a << 112) | (rng.random::<u128>() & 0x103)).into())
    }
}

fn random_prefix(rng: &mut StdRng) -> Prefix {
    let addr = random_addr(rng);
    let width = if addr.is_ipv4() { 32 } else { 128 };
    let bits = if rng.random_bool(0.1) {
        0
    } else {
        rng.random_range(width - 10..=width)
    };
    Prefix { addr, bits }
}

#[test]
fn compiled_rules_agree_with_rules_read_literally() {
    let mut rng = seeded();
    // With ports, and without.
    let protocols = [TCP, UDP, SCTP, 0, 65, 255];
    for round in 0..300 {
        // A few ports, or so many ranges that they are searched, or have a bit for each port.
        let (rules_max, few) = [(8, 4), (8, 40), (4, 800)][round % 3];
        let ports = 4 * u16::try_from(few).unwrap();
        let rules: Vec<Rule> = (0..rng.random_range(0..rules_max))
            .map(|_| Rule {
                sources: (0..rng.random_range(0..4))
                    .map(|_| random_prefix(&mut rng))
                    .collect(),
                destinations: (0..rng.random_range(0..few))
                    .map(|_| {
                        let first = rng.random_range(0..ports);
                        let far = rng.random_bool(0.05);
                        let last = if far { u16::MAX } else { first };
                        let first = if far && rng.random() { 0 } else { first };
                        let everywhere = few > 100 && rng.random_bool(0.9);
                        let to = if everywhere {
                            prefix("10.0.0.0/8")
                        } else {
                            random_prefix(&mut rng)
                        };
                        (to, first, last)
                    })
                    .collect(),
                protocols: (0..rng.random_range(0..4))
                    .map(|_| protocols[rng.random_range(0..protocols.len())])
                    .collect(),
            })
            .collect();
        let compiled = CompiledRules::compile(&Rules::List(rules.clone()), None);
        for _ in 0..200 {
            let (src, dst) = (random_addr(&mut rng), random_addr(&mut rng));
            let protocol = protocols[rng.random_range(0..protocols.len())];
            let ask = match rng.random_range(0..6) {
                0 => Ask::Any,
                1 => Ask::AllPorts(protocol),
                _ => Ask::Port(
                    protocols[rng.random_range(0..3)],
                    rng.random_range(0..ports + 2),
                ),
            };
            assert_eq!(
                compiled.matches(ask, src, dst),
                reference(&rules, ask, src, dst),
                "{ask:?} {src} {dst} {rules:?}"
            );
        }
    }
}

/// Two lists of the same rules are a table; what has no room for one is asked rule by rule.
#[test]
fn rules_that_no_table_has_room_for_count_all_the_same() {
    let to = |net: u32, count: usize| -> Vec<_> {
        let hosts = (0..u32::try_from(count).unwrap()).map(|host| (net + host, 7));
        let host = |(bits, port)| (IpAddr::V4(Ipv4Addr::from_bits(bits)), port);
        let place = |(addr, port)| (Prefix { addr, bits: 32 }, port, port);
        hosts.map(host).map(place).collect()
    };
    let rule = |sources: &[&str], net| Rule {
        sources: sources.iter().map(|text| prefix(text)).collect(),
        destinations: to(net, TABLE_PARTS_MAX / 2 + 1),
        protocols: vec![UDP],
    };
    let rules = [
        rule(&["10.0.0.1", "10.0.0.2"], 0x0b00_0000),
        rule(&["10.0.0.2"], 0x0c00_0000),
    ];
    let filter = CompiledRules::compile(&Rules::List(rules.to_vec()), None);
    assert_eq!(filter.tables(), [true, false]);
    assert_eq!(filter.without_table(), 1);
    for (src, dst, want) in [
        ("10.0.0.1", "11.0.200.1", true),
        ("10.0.0.1", "12.0.200.1", false),
        ("10.0.0.2", "11.0.200.1", true),
        ("10.0.0.2", "12.0.200.1", true),
        ("10.0.0.2", "13.0.200.1", false),
    ] {
        let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
        let found = filter.matches(Ask::Port(UDP, 7), src, dst);
        assert_eq!(found, want, "{src} to {dst}");
        assert!(!filter.matches(Ask::Port(UDP, 8), src, dst));
    }
}

/// Rules of many groups about the same few places take no more room than the places.
#[test]
fn what_rules_say_twice_takes_room_once() {
    let ports = 0..2_000_u16;
    let to = prefix("11.0.0.1");
    let same = || ports.clone().map(|port| (to, 2 * port, 2 * port));
    let rule = |sources: &[&str], destinations| Rule {
        sources: sources.iter().map(|text| prefix(text)).collect(),
        destinations,
        protocols: vec![UDP],
    };
    let often = (0..TABLE_PARTS_MAX / 2_000).flat_map(|_| same());
    let rules = [
        rule(&["10.0.0.1", "10.0.0.2"], often.collect()),
        rule(&["10.0.0.2"], vec![(to, 7, 7); 2_000]),
    ];
    let filter = CompiledRules::compile(&Rules::List(rules.to_vec()), None);
    assert_eq!(filter.tables(), [true, true]);
    assert_eq!(filter.without_table(), 0);
    for (src, port, want) in [
        ("10.0.0.1", 3_998, true),
        ("10.0.0.1", 7, false),
        ("10.0.0.2", 3_998, true),
        ("10.0.0.2", 7, true),
        ("10.0.0.2", 9, false),
    ] {
        let (src, dst) = (src.parse().unwrap(), to.addr);
        assert_eq!(filter.matches(Ask::Port(UDP, port), src, dst), want);
    }
}

#[test]
fn a_flow_that_a_rule_let_in_is_asked_for_again_when_the_rules_change() {
    let now = now();
    let (us, them) = ("10.0.0.1:7", "10.0.0.2:2");
    let from = between(them, us);
    let packets = [
        from.udp(b"x"),
        from.tcp(&segment(TCP_SYN), b""),
        from.ip(SCTP, &[0, 2, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0]),
        from.ip(47, b"gre"),
        from.icmp(8, 0, b"echo"),
    ];
    let to = between(us, them);
    let answers = [
        to.udp(b"x"),
        to.tcp(&segment(TCP_ACK), b""),
        to.ip(SCTP, &[0, 7, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0]),
        to.ip(47, b"gre"),
        to.icmp(0, 0, b"echo"),
    ];
    let rules = |src: &str, local: &str| {
        let rule = Rule {
            sources: vec![prefix(src)],
            destinations: vec![(prefix("10.0.0.0/24"), 0, u16::MAX)],
            protocols: vec![UDP, TCP, SCTP, 47, ICMP],
        };
        let local = [prefix(local)];
        Arc::new(CompiledRules::compile(
            &Rules::List(vec![rule]),
            Some(&local),
        ))
    };
    for (packet, answer) in packets.iter().zip(answers) {
        let answered = |filter: &mut Filter, now| {
            assert_eq!(remember(filter, now, &answer), None);
            // By another shard, which does not know who began it.
            let headers = Headers::parse(&answer).unwrap();
            let reply = headers.flow(&answer).reversed();
            filter.learn(now, reply);
        };
        let mut filter = Filter::new(now, rules("10.0.0.2", "10.0.0.1"));
        for _ in 0..3 {
            assert_eq!(admit(&mut filter, now, packet), Ok(()));
            answered(&mut filter, now);
        }
        filter.set_rules(now, rules("10.0.0.3", "10.0.0.1"));
        // For as long as both go on.
        for secs in 0..=2 {
            let now = now + secs * (FLOW_TIMEOUT - Duration::from_secs(1));
            assert_eq!(admit(&mut filter, now, packet), DENIED);
            answered(&mut filter, now);
        }
        filter.set_rules(now, rules("10.0.0.2", "10.0.0.1"));
        assert_eq!(admit(&mut filter, now, packet), Ok(()));
        filter.set_rules(now, rules("10.0.0.2", "10.0.0.9"));
        assert_eq!(admit(&mut filter, now, packet), NOT_LOCAL);
    }
}

#[test]
fn a_later_fragment_goes_nowhere_but_to_what_is_ours() {
    let now = now();
    let local = [prefix("10.0.0.1")];
    let rules = CompiledRules::compile(&Rules::default(), Some(&local));
    let mut filter = Filter::new(now, Arc::new(rules));
    let to = |dst| {
        Builder {
            fragment: 100,
            ..between("10.0.0.2:2", dst)
        }
        .ip(UDP, &[0; 64])
    };
    assert_eq!(admit(&mut filter, now, &to("10.0.0.1:1")), Ok(()));
    assert_eq!(admit(&mut filter, now, &to("192.168.0.1:1")), NOT_LOCAL);
}

#[test]
fn random_packets_never_panic() {
    let mut rng = seeded();
    let now = now();
    let mut filter = deny_all(now);
    for _ in 0..100_000 {
        let mut bytes = vec![0u8; rng.random_range(20..100)];
        rng.fill_bytes(&mut bytes);
        bytes[0] = if rng.random() { 0x45 } else { 0x60 };
        if let Ok(len) = u16::try_from(bytes.len()) {
            bytes[2..4].copy_from_slice(&len.to_be_bytes());
            bytes[4..6].copy_from_slice(&len.saturating_sub(40).to_be_bytes());
        }
        bytes[9] = [1, 6, 17, 58, 132, 99][rng.random_range(0..6)];
        if let Ok(headers) = Headers::parse(&bytes) {
            let _ = filter.admit(now, &headers, &bytes);
            let _ = filter.remember(now, &headers, &bytes);
        }
    }
}
