//! Plain WireGuard peers of the settings file, beside those of the network, as if they were of it: the
//! same tables, paths and filter. Where both name a key or a prefix, the network's counts.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use ringtail_dataplane::{Prefix, Rule, Rules};

use super::{Agent, Network, NetworkPeer};
use crate::key::NodePublic;
use crate::netmap::filter::COMPILED_MAX;
use crate::netmap::prefix::{EVERYWHERE, aggregated, covering, without};
use crate::uapi::PresharedKey;

/// Peers told of by name at most.
const NAMED_MAX: usize = 8;

/// What there is of a plain peer besides what others have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plain {
    /// The preshared key, if there is one.
    pub preshared_key: Option<PresharedKey>,
    /// Seconds between packets that keep a NAT open; 0 is off.
    pub keepalive: u16,
    /// It may open connections to us.
    pub allow_in: bool,
}

impl Agent {
    /// Takes the settings file's peers, before there is a network.
    pub fn set_plain_peers(&mut self, peers: Vec<NetworkPeer>) {
        self.plain = peers.into_iter().map(Arc::new).collect();
    }

    /// Whether there are any: another key of ours is another peer to them, and nobody tells them of it.
    pub fn has_plain_peers(&self) -> bool {
        !self.plain.is_empty()
    }

    /// Our key is another: says, until the node ends, whom somebody has to give it to.
    pub(super) fn tell_key_for_plain(&mut self) {
        let names: Vec<&str> = self.plain.iter().map(|peer| peer.name.as_str()).collect();
        let told = names.iter().take(NAMED_MAX).copied().collect::<Vec<_>>();
        let more = match names.len() - told.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let line = (!names.is_empty()).then(|| {
            format!(
                "this node's key is another: the settings file's peers {}{more} know the one before, and are \
                 without us until their configuration says PublicKey = {}",
                told.join(", "),
                STANDARD.encode(self.setup.node_key.0)
            )
        });
        self.set_health("plain-key", line.into_iter().collect());
    }

    /// A plain peer's host has been looked up.
    pub fn handle_plain_endpoint(&mut self, now: Instant, key: &NodePublic, endpoint: SocketAddr) {
        let peer = self.plain.iter_mut().find(|peer| peer.node_key == *key);
        if let Some(peer) = peer.filter(|peer| peer.endpoints != [endpoint]) {
            Arc::make_mut(peer).endpoints = vec![endpoint];
            self.enforce(now);
        }
    }
}

impl Network {
    /// Adds the settings file's peers, but for those whose key another node has, `own` or one of the network.
    /// Gives a sentence for each of these.
    pub(super) fn add_plain(&mut self, plain: &[Arc<NetworkPeer>], own: NodePublic) -> Vec<String> {
        if plain.is_empty() {
            return Vec::new();
        }
        let peers = self.peers.iter().map(|peer| peer.node_key);
        let held_back = self.held_back.iter().map(|node| node.node_key);
        let taken: HashSet<NodePublic> = peers.chain(held_back).chain([own]).collect();
        let (clashing, others): (Vec<_>, Vec<_>) = plain
            .iter()
            .partition(|peer| taken.contains(&peer.node_key));
        self.peers.extend(others.into_iter().cloned());
        let sentence = |peer: &&Arc<NetworkPeer>| {
            format!(
                "the settings file's peer {} is left out: the network has a node of that key",
                peer.name
            )
        };
        clashing.iter().map(sentence).collect()
    }

    /// Fits the filter to the plain peers, whose prefixes are those that count by now: what is for
    /// everybody is not for them, unless they may come in. A rule that names their addresses is. Says so if
    /// that is more than there is room for. `known` is what came of it last, and then of this.
    pub(super) fn filter_plain(&mut self, known: &mut Option<Fitted>) -> Option<String> {
        let before = known.take();
        let may_come_in = |peer: &NetworkPeer| peer.plain.as_ref().map(|plain| plain.allow_in);
        let nets = |wanted: Option<bool>| {
            let peers = self
                .peers
                .iter()
                .filter(move |peer| may_come_in(peer) == wanted);
            peers.flat_map(|peer| peer.allowed_ips.iter().map(IpNet::trunc))
        };
        let mut named: Vec<IpNet> = nets(Some(false)).collect();
        named.sort_unstable();
        let open: Vec<IpNet> = nets(Some(true)).collect();
        if named.is_empty() && open.is_empty() {
            return None;
        }
        let all_named = aggregated(named.iter().copied());
        // A narrower prefix is whoever's it is.
        let inside = |net: &IpNet| covering(&all_named, net).is_some();
        let others = nets(None).chain(nets(Some(true))).filter(inside).collect();
        let prefixes = Prefixes {
            named,
            others,
            open,
        };
        let same = |fitted: &Fitted| fitted.given == self.rules && fitted.prefixes == prefixes;
        let fitted = before.filter(same).unwrap_or_else(|| {
            let (rules, said) = fit(&self.rules, &prefixes);
            Fitted {
                given: Arc::clone(&self.rules),
                prefixes,
                rules: rules.map_or_else(|| Arc::clone(&self.rules), Arc::new),
                said,
            }
        });
        self.rules = Arc::clone(&fitted.rules);
        let said = fitted.said.clone();
        *known = (fitted.prefixes.len() <= COMPILED_MAX).then_some(fitted);
        said
    }
}

/// A filter that is fitted to plain peers, and what it is made of.
#[derive(Debug)]
pub(super) struct Fitted {
    given: Arc<Rules>,
    prefixes: Prefixes,
    rules: Arc<Rules>,
    said: Option<String>,
}

/// What of the peers the filter is fitted to.
#[derive(Debug, PartialEq, Eq)]
struct Prefixes {
    /// Of those who may not come in, in order.
    named: Vec<IpNet>,
    /// What others have of these.
    others: Vec<IpNet>,
    /// Of those who may come in.
    open: Vec<IpNet>,
}

impl Prefixes {
    fn len(&self) -> usize {
        self.named.len() + self.others.len() + self.open.len()
    }
}

/// These rules, fitted ([`Network::filter_plain`]) unless they are right as they are; and what is to be said.
fn fit(given: &Rules, prefixes: &Prefixes) -> (Option<Rules>, Option<String>) {
    let named = &prefixes.named;
    let shut = without(named.iter().copied(), prefixes.others.iter().copied());
    let open: Vec<Prefix> = prefixes.open.iter().copied().map(Prefix::from).collect();
    if shut.is_empty() && (open.is_empty() || *given == Rules::AllowAll) {
        return (None, None);
    }
    let anything = |sources: Vec<Prefix>| Rule {
        sources,
        destinations: EVERYWHERE.map(|net| (net.into(), 0, u16::MAX)).to_vec(),
        protocols: (0..=u8::MAX).collect(),
    };
    let mut rules = match given {
        Rules::AllowAll => vec![anything(EVERYWHERE.map(Prefix::from).to_vec())],
        Rules::List(rules) => rules.clone(),
    };
    // The next in order is the first that it could hold.
    let wider = |source: &IpNet| {
        let next = named.partition_point(|named| named <= source);
        named.get(next).is_some_and(|named| source.contains(named))
    };
    // What is cut is large: rules that are for the same sources share it.
    let mut cut: BTreeMap<_, Vec<(Prefix, u16, u16)>> = BTreeMap::new();
    for rule in &mut rules {
        let (wide, sources): (Vec<IpNet>, Vec<IpNet>) =
            (rule.sources.iter().map(|source| IpNet::from(*source))).partition(wider);
        if !wide.is_empty() {
            rule.sources = sources.into_iter().map(Prefix::from).collect();
            let same = cut.entry((aggregated(wide), rule.protocols.clone()));
            same.or_default().extend(&rule.destinations);
        }
    }
    rules.retain(|rule| !rule.sources.is_empty());
    let mut room = COMPILED_MAX;
    let mut left_out = 0;
    for ((wide, protocols), destinations) in cut {
        let sources = without(wide, shut.iter().copied());
        match room.checked_sub(sources.len()) {
            Some(rest) => {
                room = rest;
                rules.push(Rule {
                    sources: sources.into_iter().map(Prefix::from).collect(),
                    destinations,
                    protocols,
                });
            }
            None => left_out += 1,
        }
    }
    if !open.is_empty() {
        rules.push(anything(open));
    }
    let said = (left_out > 0).then(|| {
        format!(
            "{left_out} kinds of rules of the filter let nobody in: with the settings file's peers left out \
             of them, they would take over {COMPILED_MAX} prefixes"
        )
    });
    (Some(Rules::List(rules)), said)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::agent::Output;
    use crate::agent::network::HeldBack;
    use crate::agent::tests::{agent, network, outputs};
    use crate::config::Prefs;
    use crate::testing::start;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn peer(number: u8, allowed_ips: &[&str], allow_in: Option<bool>) -> Arc<NetworkPeer> {
        Arc::new(NetworkPeer {
            name: format!("p{number}"),
            node_key: NodePublic([number; 32]),
            allowed_ips: allowed_ips.iter().map(|text| net(text)).collect(),
            plain: allow_in.map(|allow_in| Plain {
                allow_in,
                ..Plain::default()
            }),
            ..NetworkPeer::default()
        })
    }

    fn admits(network: &Network, source: &str) -> bool {
        let source: IpAddr = source.parse().unwrap();
        match &*network.rules {
            Rules::AllowAll => true,
            Rules::List(rules) => rules.iter().any(|rule| {
                let mut sources = rule.sources.iter();
                sources.any(|net| IpNet::from(*net).contains(&source))
            }),
        }
    }

    fn rule(sources: &[&str]) -> Rule {
        Rule {
            sources: sources.iter().map(|text| net(text).into()).collect(),
            destinations: vec![(net("0.0.0.0/0").into(), 0, 65535)],
            protocols: vec![6],
        }
    }

    #[test]
    fn the_network_s_own_nodes_win_over_the_settings_file() {
        let mut network = Network {
            peers: vec![peer(1, &["100.64.0.1/32"], None)],
            held_back: vec![HeldBack {
                node_key: NodePublic([2; 32]),
                ..HeldBack::default()
            }],
            ..Network::default()
        };
        let plain: Vec<_> = [1, 2, 3, 4]
            .map(|n| peer(n, &["10.9.0.0/24"], Some(false)))
            .into();
        let said = network.add_plain(&plain, NodePublic([4; 32]));
        assert_eq!(said.len(), 3);
        assert!(said[0].contains("p1"), "{said:?}");
        let names: Vec<&str> = network
            .peers
            .iter()
            .map(|peer| peer.name.as_str())
            .collect();
        assert_eq!(names, ["p1", "p3"]);
    }

    #[test]
    fn what_is_for_everybody_is_not_for_a_plain_peer_but_what_names_it_is() {
        let peers = vec![
            peer(1, &["100.64.0.1/32", "10.9.1.0/24"], None),
            peer(2, &["10.9.0.0/16", "fd09::/64"], Some(false)),
            peer(3, &["10.8.0.0/16"], Some(true)),
        ];
        for rules in [
            Rules::AllowAll,
            Rules::List(vec![rule(&["0.0.0.0/0", "::/0"])]),
            Rules::List(vec![
                rule(&["10.0.0.0/8", "100.64.0.0/10"]),
                rule(&["::/0"]),
            ]),
        ] {
            let mut network = Network {
                peers: peers.clone(),
                rules: Arc::new(rules),
                ..Network::default()
            };
            network.filter_plain(&mut None);
            for (source, may) in [
                ("100.64.0.1", true),
                ("10.9.1.7", true),
                ("10.9.2.7", false),
                ("10.9.0.1", false),
                ("fd09::7", false),
                ("fd0a::7", true),
                ("10.8.3.4", true),
            ] {
                assert_eq!(
                    admits(&network, source),
                    may,
                    "{source}: {:?}",
                    network.rules
                );
            }
        }
        let mut network = Network {
            peers,
            rules: Arc::new(Rules::List(vec![rule(&["10.9.0.0/16", "10.9.2.7/32"])])),
            ..Network::default()
        };
        network.filter_plain(&mut None);
        assert!(
            admits(&network, "10.9.3.1"),
            "the policy names exactly this"
        );
        assert!(!admits(&network, "fd09::7"));
    }

    #[test]
    fn the_filter_is_fitted_to_many_plain_peers_once_for_rules_of_the_same_sources() {
        let everywhere = |port: u16| Rule {
            destinations: vec![(net("100.64.0.1/32").into(), port, port)],
            ..rule(&["0.0.0.0/0", "100.64.0.2/32"])
        };
        let plain = |number: u32| {
            let [_, _, a, b] = number.to_be_bytes();
            let mut key = [a; 32];
            key[0] = b;
            let mut peer = (*peer(0, &[], Some(false))).clone();
            peer.node_key = NodePublic(key);
            // None is beside another: each of them costs as much as it can.
            peer.allowed_ips = vec![net(&format!("10.{a}.{b}.77/32"))];
            Arc::new(peer)
        };
        let mut network = Network {
            peers: (0..1024).map(plain).collect(),
            rules: Arc::new(Rules::List((0..1000).map(everywhere).collect())),
            ..Network::default()
        };
        assert_eq!(network.filter_plain(&mut None), None);
        assert!(!admits(&network, "10.1.7.77") && admits(&network, "10.1.7.78"));
        let Rules::List(rules) = &*network.rules else {
            panic!("{:?}", network.rules);
        };
        let sources: usize = rules.iter().map(|rule| rule.sources.len()).sum();
        assert!(sources < 16_384, "{sources}");
        let cut = rules.last().unwrap();
        assert_eq!(cut.destinations.len(), 1000);
        assert_eq!(
            rules.len(),
            1001,
            "what names narrow sources stays as it is"
        );
        // Rules for ever other sources do not fill the memory.
        let other = |n: u8| rule(&["0.0.0.0/0", &format!("2001:db8:{n:x}::/48")]);
        network
            .peers
            .push(peer(7, &["2001:db8::1/128"], Some(false)));
        let kinds = (0..=u8::MAX).map(|n| Rule {
            protocols: vec![n],
            ..other(n)
        });
        network.rules = Arc::new(Rules::List(kinds.collect()));
        let said = network.filter_plain(&mut None).unwrap();
        assert!(said.contains("let nobody in"), "{said}");
        let Rules::List(rules) = &*network.rules else {
            panic!("{said}");
        };
        let sources: usize = rules.iter().map(|rule| rule.sources.len()).sum();
        assert!(sources <= COMPILED_MAX + 256, "{sources}");
        assert!(!admits(&network, "10.1.7.77"));
    }

    #[test]
    fn the_filter_is_fitted_anew_only_for_other_rules_or_prefixes() {
        let told = Network {
            peers: vec![
                peer(1, &["100.64.0.1/32"], None),
                peer(2, &["10.9.0.0/16"], Some(false)),
            ],
            rules: Arc::new(Rules::List(vec![rule(&["0.0.0.0/0"])])),
            ..Network::default()
        };
        let mut known = None;
        let mut fitted = |told: &Network| {
            let mut network = told.clone();
            network.filter_plain(&mut known);
            network
        };
        let first = fitted(&told);
        assert!(!admits(&first, "10.9.1.7"));
        // Whoever is none of these may change, and what is the same may have come anew.
        let mut again = told.clone();
        again.peers[0] = peer(1, &["100.64.0.9/32"], None);
        again.rules = Arc::new((*told.rules).clone());
        assert!(Arc::ptr_eq(&fitted(&again).rules, &first.rules));
        // A part of it is somebody else's, somebody may come in, the rules are others.
        again.peers[0] = peer(1, &["10.9.1.0/24"], None);
        assert!(admits(&fitted(&again), "10.9.1.7"));
        again.peers[0] = peer(1, &["10.8.0.0/16"], Some(true));
        let opened = fitted(&again);
        assert!(!admits(&opened, "10.9.1.7") && admits(&opened, "10.8.1.7"));
        again.rules = Arc::new(Rules::List(vec![rule(&["10.9.0.0/16"])]));
        assert!(admits(&fitted(&again), "10.9.1.7"));
        assert!(!admits(&fitted(&told), "10.9.1.7"));
        again.peers.clear();
        assert!(Arc::ptr_eq(&fitted(&again).rules, &again.rules));
    }

    #[test]
    fn a_plain_peer_is_told_with_its_secret_where_it_is_and_to_no_relay() {
        let (now, mut agent) = (start(), agent(1, true));
        let plain = |key: u8, allowed_ips: &[&str]| NetworkPeer {
            endpoints: vec!["203.0.113.9:51820".parse().unwrap()],
            plain: Some(Plain {
                preshared_key: Some(PresharedKey([7; 32])),
                keepalive: 25,
                allow_in: false,
            }),
            ..(*peer(key, allowed_ips, None)).clone()
        };
        // The second is the network's own node, by its key.
        let node = network(2).peers[0].node_key;
        let twin = NetworkPeer {
            node_key: node,
            ..plain(8, &["10.8.0.0/16"])
        };
        let allowed = ["10.5.0.0/16", "10.7.0.2/32", "10.7.0.1/32", "0.0.0.0/0"];
        agent.set_plain_peers(vec![plain(9, &allowed), twin]);
        agent.handle_prefs(now, Prefs::default());
        agent.handle_network(now, network(2));
        let out = outputs(&mut agent);
        let id = agent.directory.id(&NodePublic([9; 32])).unwrap();
        let change = out.iter().find_map(|output| {
            let Output::ChangeNetwork(change) = output else {
                return None;
            };
            Some(change)
        });
        let told = &change.unwrap().peers;
        assert_eq!(told.len(), 2);
        let told = told.iter().find(|peer| peer.id == id).unwrap();
        // Not what the network's node, we or the Internet have; routes need not be accepted for it.
        assert_eq!(told.allowed_ips, [net("10.5.0.0/16").into()]);
        assert_eq!(told.preshared_key.as_deref(), Some(&[7; 32]));
        assert_eq!(told.persistent_keepalive, Some(25));
        assert!(told.outsider);
        let at = |out: &[Output]| {
            out.iter().find_map(|output| {
                let Output::SetPath(of, decision) = output else {
                    return None;
                };
                (*of == id).then_some((decision.udp, decision.derp))
            })
        };
        let endpoint = |text: &str| Some(text.parse().unwrap());
        assert_eq!(at(&out), Some((endpoint("203.0.113.9:51820"), None)));
        let to_relays =
            |output: &Output| matches!(output, Output::SetPeers { nodes, .. } if *nodes == [node]);
        assert!(out.iter().any(to_relays));
        // Its name leads elsewhere.
        let moved = "203.0.113.10:51820".parse().unwrap();
        agent.handle_plain_endpoint(now, &NodePublic([9; 32]), moved);
        assert_eq!(at(&outputs(&mut agent)), Some((Some(moved), None)));
        // DISCO is not its language.
        agent.handle_ping(now, 1, "p9");
        let said = format!("{:?}", outputs(&mut agent));
        assert!(said.contains("WireGuard peer"), "{said}");
    }

    #[test]
    fn another_key_of_ours_is_told_to_whoever_keeps_the_plain_peers() {
        let (now, mut agent) = (start(), agent(1, true));
        let told = |agent: &Agent| {
            let lines = agent.health(now).into_iter();
            lines.filter(|line| line.contains("PublicKey")).collect()
        };
        agent.handle_own_key(NodePublic([5; 32]));
        assert!(!agent.has_plain_peers());
        assert_eq!(told(&agent), [""; 0]);
        let plain = (10..20).map(|n| (*peer(n, &[], Some(false))).clone());
        agent.set_plain_peers(plain.collect());
        agent.handle_own_key(NodePublic([6; 32]));
        assert!(agent.has_plain_peers());
        let said: Vec<String> = told(&agent);
        assert!(said[0].contains("p10, p11, p12, p13, p14, p15, p16, p17 and 2 more"));
        let key = STANDARD.encode([6; 32]);
        assert!(said[0].ends_with(&format!("PublicKey = {key}")), "{said:?}");
    }

    #[test]
    fn without_plain_peers_the_filter_is_left_as_it_is() {
        let rules = Arc::new(Rules::List(vec![rule(&["0.0.0.0/0"])]));
        let mut network = Network {
            peers: vec![peer(1, &["100.64.0.1/32"], None)],
            rules: rules.clone(),
            ..Network::default()
        };
        network.filter_plain(&mut None);
        assert_eq!(network.rules, rules);
    }
}
