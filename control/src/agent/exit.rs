//! The way out: which node was chosen to send what goes to the Internet through, and how it stands
//! with it; and, as a way out for others, where those get.
//!
//! **Chosen is chosen.** While a name is given, what goes to the Internet goes to that node or nowhere:
//! also while there is no network yet, while the node is not there, and for the family that it does
//! not take. Whoever wants it otherwise says so. A node that was found by its name stays the one
//! meant until it leaves the network, whatever it or another is called by then, under another key
//! too, and while it is held back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use ringtail_dataplane::Prefix;
use serde_json::{Value, json};

use super::directory::is_meant;
use super::{Agent, Network, NetworkPeer, Output, short_name, standing};
use crate::config::{Forwarding, HostFirewall, Prefs};
use crate::hostnet::{Exit, Overlay};
use crate::key::NodePublic;
use crate::netmap::prefix::{EVERYWHERE, NOT_INTERNET, aggregated, without};

/// What became of the choice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum ExitNode {
    /// Nobody chose any.
    #[default]
    None,
    /// This node.
    Found {
        /// It.
        node: Meant,
        /// Whether it takes IPv4, and IPv6.
        takes: [bool; 2],
    },
    /// None that could be used.
    Missing {
        /// Why.
        why: String,
        /// The one that is meant, if it was found.
        node: Option<Meant>,
    },
}

/// A node that was found, as it is known again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Meant {
    /// Its key, which may be renewed.
    key: NodePublic,
    /// What the server calls it for good; empty where the network is a file.
    stable_id: String,
}

impl Meant {
    fn new(key: NodePublic, stable_id: &str) -> Self {
        Self {
            key,
            stable_id: stable_id.to_owned(),
        }
    }

    fn is(&self, key: NodePublic, stable_id: &str) -> bool {
        self.key == key || !stable_id.is_empty() && self.stable_id == stable_id
    }
}

impl ExitNode {
    /// Looks for the node that was chosen; `known` is the one that it was so far.
    pub(super) fn of(prefs: &Prefs, network: Option<&Network>, known: Option<&Meant>) -> Self {
        let Some(name) = &prefs.exit_node else {
            return Self::None;
        };
        let missing = |why: &str, node: Option<Meant>| Self::Missing {
            why: format!("exit node {name}: {why}"),
            node,
        };
        let Some(network) = network else {
            return missing("there is no network map yet", known.cloned());
        };
        let is_known = |key, stable_id: &str| known.is_some_and(|known| known.is(key, stable_id));
        let mut peers = network.peers.iter();
        let known = peers.find(|peer| is_known(peer.node_key, &peer.stable_id));
        let mut held_back = network.held_back.iter();
        let away = held_back.find(|node| is_known(node.node_key, &node.stable_id));
        if let (None, Some(node)) = (known, away) {
            let meant = Meant::new(node.node_key, &node.stable_id);
            return missing(&node.sentence(), Some(meant));
        }
        let meant =
            |peer: &&Arc<NetworkPeer>| is_meant(name, &peer.name, peer.node_key, &peer.addresses);
        let Some(peer) = known.or_else(|| network.peers.iter().find(meant)) else {
            let own = name.eq_ignore_ascii_case(&prefs.hostname)
                || network
                    .addresses
                    .iter()
                    .any(|net| name.parse() == Ok(net.addr()));
            return match network.why_held_back(name) {
                Some(why) => missing(&why, None),
                None if own => missing("that is this node itself", None),
                None => missing("no such node is in the network", None),
            };
        };
        let takes = [false, true].map(|v6| {
            let mut nets = peer.allowed_ips.iter();
            nets.any(|net| net.prefix_len() == 0 && net.addr().is_ipv6() == v6)
        });
        let node = Meant::new(peer.node_key, &peer.stable_id);
        if takes == [false; 2] {
            let why = "it does not offer to be one, or no administrator has approved it";
            return missing(why, Some(node));
        }
        Self::Found { node, takes }
    }

    /// The node that is meant, if it was found: it stays that.
    pub(super) fn meant(&self) -> Option<&Meant> {
        match self {
            Self::Found { node, .. } => Some(node),
            Self::Missing { node, .. } => node.as_ref(),
            Self::None => None,
        }
    }

    /// The key of the node in use.
    pub(super) fn key(&self) -> Option<NodePublic> {
        match self {
            Self::Found { node, .. } => Some(node.key),
            Self::None | Self::Missing { .. } => None,
        }
    }
}

impl Agent {
    /// Says what is wrong with the exit node that somebody chose.
    pub(super) fn tell_exit(&mut self) {
        let line = match &self.exit {
            ExitNode::None => None,
            ExitNode::Missing { why, .. } => {
                Some(format!("{why}: nothing goes out to the Internet"))
            }
            ExitNode::Found { .. } => self.exit_peer().and_then(|peer| {
                if peer.online != Some(false) {
                    return None;
                }
                let since = standing::text(peer.last_seen);
                let since = since.map_or_else(String::new, |at| format!(" since {at}"));
                let name = short_name(&peer.name);
                Some(format!(
                    "exit node {name} is offline{since}: nothing goes out to the Internet"
                ))
            }),
        };
        self.set_health("exit", line.into_iter().collect());
    }

    /// The exit node in use.
    pub fn exit_peer(&self) -> Option<&NetworkPeer> {
        let id = self.directory.id(&self.exit.key()?)?;
        self.directory.peer(id)
    }

    /// The exit node for people: none where nobody chose one.
    pub(super) fn exit_status(&self) -> Value {
        let Some(wanted) = &self.prefs.exit_node else {
            return Value::Null;
        };
        let [v4, v6] = match self.exit {
            ExitNode::Found { takes, .. } => takes,
            ExitNode::None | ExitNode::Missing { .. } => [false; 2],
        };
        let node = self.exit_peer().map(|peer| short_name(&peer.name));
        let allow_lan = self.prefs.exit_node_allow_lan_access;
        json!({"wanted": wanted, "node": node, "ipv4": v4, "ipv6": v6, "allow_lan": allow_lan})
    }

    /// What a person wants of the host, whatever the network says.
    pub(super) fn wishes(&self) -> Overlay {
        let prefs = &self.prefs;
        let offered: BTreeSet<IpNet> = self.offered().collect();
        let takes = match &self.exit {
            ExitNode::None => None,
            ExitNode::Found { takes, .. } => Some(*takes),
            ExitNode::Missing { .. } => Some([false; 2]),
        };
        Overlay {
            snat: (offered.iter().copied())
                .filter(|net| prefs.snat_subnet_routes.covers(net))
                .collect(),
            offered,
            offers_exit: prefs.advertise_exit_node,
            shut: self.shut(),
            unapproved: self.unapproved.clone(),
            may_open_firewall: prefs.host_firewall == HostFirewall::Open,
            may_forward: prefs.forwarding == Forwarding::On,
            exit: takes.map(|takes| Exit {
                takes,
                allow_lan: prefs.exit_node_allow_lan_access,
            }),
            ..Overlay::default()
        }
    }

    /// The prefixes that we offer to route for others: by a person's wish, and by that of a routing daemon.
    pub(super) fn offered(&self) -> impl Iterator<Item = IpNet> {
        self.prefs.advertise_routes.union(&self.handed).copied()
    }

    /// What coordination is told that we route for others.
    pub(super) fn offers(&self) -> impl Iterator<Item = IpNet> {
        let everywhere = self.prefs.advertise_exit_node.then_some(EVERYWHERE);
        let everywhere = everywhere.into_iter().flatten();
        let offered = self.offered().chain(everywhere);
        offered.filter(|net| !self.lost.contains(net))
    }

    /// Takes the prefixes that a routing daemon of the host offers.
    pub fn handle_handed(&mut self, now: Instant, handed: BTreeSet<IpNet>) {
        if self.handed != handed {
            self.handed = handed;
            self.out.push_back(Output::Publish);
            self.enforce(now);
        }
    }

    /// Takes which of the prefixes that this node offers it cannot reach itself, or not forward to: they are not announced, so that
    /// another router gets them.
    pub fn handle_lost(&mut self, lost: BTreeSet<IpNet>) {
        if self.lost != lost {
            self.lost = lost;
            self.out.push_back(Output::Publish);
        }
    }

    /// What is not the Internet, seen from this host.
    fn near(&self) -> impl Iterator<Item = IpNet> {
        NOT_INTERNET.iter().chain(&self.subnets).copied()
    }

    /// Where those do not get that this node lets out to the Internet, but for what of it is offered and approved.
    fn shut(&self) -> BTreeSet<IpNet> {
        if !self.prefs.advertise_exit_node {
            return BTreeSet::new();
        }
        aggregated(self.near()).into_iter().collect()
    }

    /// Where peers get: to this node itself, to what it routes, and if it is a way out to the Internet.
    pub(super) fn local(&self, network: &Network) -> Vec<Prefix> {
        let own: BTreeSet<IpNet> = network.addresses.iter().copied().collect();
        let own = own.iter().map(|net| IpNet::from(net.addr()));
        let mut out = Vec::new();
        if self.prefs.advertise_exit_node {
            out = without(EVERYWHERE, self.near());
            // This host itself is no network of its own.
            let hosts = self.subnets.iter().map(|net| IpNet::from(net.addr()));
            out.extend(without(hosts, NOT_INTERNET));
        }
        own.chain(self.open()).chain(out).map(Into::into).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::HeldBack;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn peer(number: u8, name: &str, allowed: &[&str]) -> Arc<NetworkPeer> {
        Arc::new(NetworkPeer {
            name: format!("{name}.tail.test."),
            node_key: NodePublic([number; 32]),
            addresses: vec![net(&format!("100.64.0.{number}/32"))],
            allowed_ips: allowed.iter().map(|text| net(text)).collect(),
            ..NetworkPeer::default()
        })
    }

    fn network(peers: Vec<Arc<NetworkPeer>>) -> Network {
        Network {
            addresses: vec![net("100.64.0.1/32")],
            peers,
            ..Network::default()
        }
    }

    fn wants(name: &str) -> Prefs {
        Prefs {
            hostname: "a".into(),
            exit_node: Some(name.into()),
            ..Prefs::default()
        }
    }

    #[test]
    fn an_exit_node_is_found_by_name_or_address_and_else_it_is_said_why_not() {
        let mut told = network(vec![
            peer(2, "b", &["100.64.0.2/32", "0.0.0.0/0", "::/0"]),
            peer(3, "c", &["100.64.0.3/32", "0.0.0.0/0"]),
            peer(4, "d", &["100.64.0.4/32", "0.0.0.0/1", "10.0.0.0/8"]),
        ]);
        told.held_back = vec![HeldBack {
            name: "e.tail.test.".into(),
            node_key: NodePublic([5; 32]),
            addresses: vec![net("100.64.0.5/32")],
            ..HeldBack::default()
        }];
        let key = |number| NodePublic([number; 32]);
        for (name, number, takes) in [
            ("b", 2, [true, true]),
            ("B.tail.test", 2, [true, true]),
            ("100.64.0.3", 3, [true, false]),
        ] {
            let found = ExitNode::of(&wants(name), Some(&told), None);
            let node = Meant::new(key(number), "");
            assert_eq!(found, ExitNode::Found { node, takes }, "{name}");
        }
        for (name, why) in [
            ("a", "that is this node itself"),
            ("100.64.0.1", "that is this node itself"),
            ("d", "no administrator has approved it"),
            ("e", "its key has expired"),
            ("100.64.0.5", "its key has expired"),
            ("z", "no such node is in the network"),
        ] {
            let found = ExitNode::of(&wants(name), Some(&told), None);
            let ExitNode::Missing { why: said, .. } = found else {
                panic!("{name} {found:?}");
            };
            assert!(said.starts_with(&format!("exit node {name}: ")), "{said}");
            assert!(said.ends_with(why), "{said}");
        }
        let early = ExitNode::of(&wants("b"), None, None);
        assert!(matches!(early, ExitNode::Missing { .. }));
        assert_eq!(ExitNode::of(&Prefs::default(), None, None), ExitNode::None);
    }

    fn known_as(stable_id: &str, peer: Arc<NetworkPeer>) -> Arc<NetworkPeer> {
        Arc::new(NetworkPeer {
            stable_id: stable_id.into(),
            ..(*peer).clone()
        })
    }

    #[test]
    fn the_node_that_was_meant_stays_it_when_names_and_keys_change() {
        let exit = ["0.0.0.0/0", "::/0"];
        let key = |number| Some(NodePublic([number; 32]));
        // With a server's names for them, and from a file, where the key alone tells.
        for (first, second) in [("n1", "n2"), ("", "")] {
            let at_first = network(vec![known_as(first, peer(2, "b", &exit))]);
            let mut found = ExitNode::of(&wants("b"), Some(&at_first), None);
            let mut then = |told: &Network| {
                found = ExitNode::of(&wants("b"), Some(told), found.meant());
                found.clone()
            };
            let other = known_as(second, peer(3, "b", &exit));
            let renamed = known_as(first, peer(2, "was-b", &exit));
            let told = network(vec![other.clone(), renamed.clone()]);
            assert_eq!(then(&told).key(), key(2));
            // Held back, or no way out for a while, it is not the other that is meant.
            let mut held = network(vec![other.clone()]);
            held.held_back = vec![HeldBack::expired(&renamed)];
            let no_exit = known_as(first, peer(2, "was-b", &[]));
            for away in [held, network(vec![other.clone(), no_exit])] {
                let ExitNode::Missing { why, .. } = then(&away) else {
                    panic!("{away:?}");
                };
                assert!(why.starts_with("exit node b: "), "{why}");
                assert_eq!(then(&told).key(), key(2));
            }
            // Under another key it is the same only by the server's name.
            let renewed = known_as(first, peer(4, "was-b", &exit));
            let renewed = then(&network(vec![other.clone(), renewed]));
            assert_eq!(renewed.key(), key(if first.is_empty() { 3 } else { 4 }));
            // Only when it has left, the other is.
            assert_eq!(then(&network(vec![other])).key(), key(3));
        }
    }
}
