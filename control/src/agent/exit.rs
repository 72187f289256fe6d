//! The way out: which node was chosen to send what goes to the Internet through, and how it stands
//! with it; and, as a way out for others, where those get.
//!
//! **Chosen is chosen.** While a name is given, what goes to the Internet goes to that node or nowhere:
//! also while there is no network yet, while the node is not there, and for the family that it does
//! not take. Whoever wants it otherwise says so. A node that was found by its name stays the one
//! meant until it leaves the network, whatever it or another is called by then.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;
use ringtail_dataplane::Prefix;

use super::directory::is_meant;
use super::{Agent, Network, NetworkPeer};
use crate::config::{Forwarding, HostFirewall, Prefs};
use crate::hostnet::{Exit, Overlay};
use crate::key::NodePublic;
use crate::netmap::prefix::{EVERYWHERE, NOT_INTERNET, without};

/// What became of the choice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum ExitNode {
    /// Nobody chose any.
    #[default]
    None,
    /// This node.
    Found {
        /// Its key.
        key: NodePublic,
        /// Whether it takes IPv4, and IPv6.
        takes: [bool; 2],
    },
    /// None that could be used, and why.
    Missing(String),
}

impl ExitNode {
    /// Looks for the node that was chosen; `known` is the one that it was so far.
    pub(super) fn of(prefs: &Prefs, network: Option<&Network>, known: Option<NodePublic>) -> Self {
        let Some(name) = &prefs.exit_node else {
            return Self::None;
        };
        let missing = |why: &str| Self::Missing(format!("exit node {name}: {why}"));
        let Some(network) = network else {
            return missing("there is no network map yet");
        };
        let known = network
            .peers
            .iter()
            .find(|peer| Some(peer.node_key) == known);
        let meant =
            |peer: &&Arc<NetworkPeer>| is_meant(name, &peer.name, peer.node_key, &peer.addresses);
        let Some(peer) = known.or_else(|| network.peers.iter().find(meant)) else {
            let own = name.eq_ignore_ascii_case(&prefs.hostname)
                || network
                    .addresses
                    .iter()
                    .any(|net| name.parse() == Ok(net.addr()));
            return match network.why_held_back(name) {
                Some(why) => missing(&why),
                None if own => missing("that is this node itself"),
                None => missing("no such node is in the network"),
            };
        };
        let takes = [false, true].map(|v6| {
            let mut nets = peer.allowed_ips.iter();
            nets.any(|net| net.prefix_len() == 0 && net.addr().is_ipv6() == v6)
        });
        if takes == [false; 2] {
            return missing("it does not offer to be one, or no administrator has approved it");
        }
        Self::Found {
            key: peer.node_key,
            takes,
        }
    }

    /// The key of the node in use.
    pub(super) fn key(&self) -> Option<NodePublic> {
        match self {
            Self::Found { key, .. } => Some(*key),
            Self::None | Self::Missing(_) => None,
        }
    }
}

impl Agent {
    /// What a person wants of the host, whatever the network says.
    pub(super) fn wishes(&self) -> Overlay {
        let prefs = &self.prefs;
        let offered = prefs.advertise_routes.iter().copied();
        let takes = match &self.exit {
            ExitNode::None => None,
            ExitNode::Found { takes, .. } => Some(*takes),
            ExitNode::Missing(_) => Some([false; 2]),
        };
        Overlay {
            snat: offered
                .filter(|net| prefs.snat_subnet_routes.covers(net))
                .collect(),
            offered: prefs.advertise_routes.clone(),
            offers_exit: prefs.advertise_exit_node,
            shut: self.shut().into_iter().collect(),
            may_open_firewall: prefs.host_firewall == HostFirewall::Open,
            may_forward: prefs.forwarding == Forwarding::On,
            exit: takes.map(|takes| Exit {
                takes,
                allow_lan: prefs.exit_node_allow_lan_access,
            }),
            ..Overlay::default()
        }
    }

    /// What coordination is told that we route for others.
    pub(super) fn offers(&self) -> impl Iterator<Item = IpNet> {
        let everywhere = self.prefs.advertise_exit_node.then_some(EVERYWHERE);
        let routes = self.prefs.advertise_routes.iter().copied();
        routes.chain(everywhere.into_iter().flatten())
    }

    /// Where those do not get that this node lets out to the Internet.
    fn shut(&self) -> Vec<IpNet> {
        if !self.prefs.advertise_exit_node {
            return Vec::new();
        }
        let near = NOT_INTERNET.iter().chain(&self.subnets).copied();
        without(near, self.prefs.advertise_routes.iter().copied())
    }

    /// Where peers get: to this node itself, to what it routes, and if it is a way out to the Internet.
    pub(super) fn local(&self, network: &Network) -> Vec<Prefix> {
        let own: BTreeSet<IpNet> = network.addresses.iter().copied().collect();
        let own = own.iter().map(|net| IpNet::from(net.addr()));
        let offered = self.prefs.advertise_routes.iter().copied();
        let out = if self.prefs.advertise_exit_node {
            let near = NOT_INTERNET.iter().chain(&self.subnets).copied();
            without(EVERYWHERE, near)
        } else {
            Vec::new()
        };
        own.chain(offered).chain(out).map(Into::into).collect()
    }
}
