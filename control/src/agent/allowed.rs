//! Allowed IPs: which of the prefixes that the network names for its peers count, that is, are
//! routed to a peer and accepted from it.
//!
//! Whoever may send from an address is taken for its owner by every rule, so a prefix counts only
//! where it can be nobody else's:
//!
//! - An exit route (`0.0.0.0/0`, or any piece too wide for a subnet) does not count, but the whole of a
//!   family does while its peer is the exit node in use.
//! - All else but a peer's own addresses counts only if routes are accepted at all, or it is a plain peer
//!   of the settings file.
//! - What no host has as its address (loopback, multicast, link-local) counts for nobody.
//! - Own addresses, those of nodes that are held back, and the range that the network gives its
//!   addresses from are reserved: an equal prefix does not count, and a wider one does not reach
//!   them ([`Allowed::reserved`]). A narrower one inside that range does: somebody approved it.
//! - A peer's own address is that peer's; of other equal prefixes the first peer's counts, in the
//!   order of the network, so that the answer does not depend on which came last.
//!
//! tailscaled has the first two and the last rule (`wgengine/wgcfg/nmcfg`), the others are ours.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::network::{Network, NetworkPeer};
use crate::key::NodePublic;
use crate::netmap::prefix::{has_no_hosts, is_exit};

/// What counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Allowed {
    /// Of each peer, in the order of the network.
    pub(super) peers: Vec<Vec<IpNet>>,
    /// What belongs to no peer even where a wider prefix of one covers it.
    pub(super) reserved: BTreeSet<IpNet>,
    /// What does not count, and why.
    pub(super) refused: Vec<Refused>,
}

/// A prefix that does not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// The peer it is named for, by its index in the network.
    pub(super) peer: usize,
    /// The prefix.
    pub(super) prefix: IpNet,
    /// Why not.
    pub(super) why: Why,
}

/// Why a prefix does not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// It is an exit route, and the peer is not the exit node in use, if there is one.
    Exit {
        /// Whether another is.
        other: bool,
    },
    /// It is a route, and those are not accepted.
    NotAccepted,
    /// No host has such addresses.
    NoHosts,
    /// It is our own address, a held-back node's, or the network's range.
    Reserved,
    /// It is this peer's, by its index in the network.
    Taken(usize),
}

impl Refused {
    /// A sentence for people.
    pub(super) fn sentence(&self, network: &Network) -> String {
        let name = |peer: usize| {
            let name = network.peers.get(peer).map_or("", |peer| &peer.name);
            super::short_name(name)
        };
        let why = match self.why {
            Why::Exit { other: false } => "no exit node is chosen".to_owned(),
            Why::Exit { other: true } => "another exit node is chosen".to_owned(),
            Why::NotAccepted => "routes are not accepted".to_owned(),
            Why::NoHosts => "no host has such addresses".to_owned(),
            Why::Reserved => "these addresses belong to the network itself".to_owned(),
            Why::Taken(by) => format!("{} has it already", name(by)),
        };
        let prefix = self.prefix;
        format!("{prefix} of {} is not used: {why}", name(self.peer))
    }
}

impl Allowed {
    /// Judges every prefix of a network, for somebody who accepts routes or not and sends what goes to
    /// the Internet through the node `exit`.
    pub(super) fn of(network: &Network, routes: bool, exit: Option<NodePublic>) -> Self {
        let own = network.addresses.iter().map(host);
        let held_back = network.held_back.iter().flat_map(|node| &node.addresses);
        let reserved: BTreeSet<IpNet> = own
            .chain(held_back.map(host))
            .chain(network.reserved.iter().map(IpNet::trunc))
            .collect();
        let mut owners: BTreeMap<IpNet, usize> = BTreeMap::new();
        for (index, peer) in network.peers.iter().enumerate() {
            for prefix in peer.allowed_ips.iter().map(IpNet::trunc) {
                if is_own_address(peer, &prefix) {
                    owners.entry(prefix).or_insert(index);
                }
            }
        }
        let mut allowed = Self {
            peers: Vec::with_capacity(network.peers.len()),
            reserved,
            refused: Vec::new(),
        };
        for (index, peer) in network.peers.iter().enumerate() {
            let mut counts: Vec<IpNet> = Vec::with_capacity(peer.allowed_ips.len());
            for prefix in peer.allowed_ips.iter().map(IpNet::trunc) {
                let why = if prefix.prefix_len() == 0 && exit == Some(peer.node_key) {
                    None
                } else if is_exit(&prefix) {
                    Some(Why::Exit {
                        other: exit.is_some_and(|exit| exit != peer.node_key),
                    })
                } else if !routes && peer.plain.is_none() && !is_own_address(peer, &prefix) {
                    Some(Why::NotAccepted)
                } else if has_no_hosts(&prefix) {
                    Some(Why::NoHosts)
                } else if allowed.reserved.contains(&prefix) {
                    Some(Why::Reserved)
                } else {
                    let owner = *owners.entry(prefix).or_insert(index);
                    (owner != index).then_some(Why::Taken(owner))
                };
                match why {
                    Some(why) => allowed.refused.push(Refused {
                        peer: index,
                        prefix,
                        why,
                    }),
                    None if counts.contains(&prefix) => {}
                    None => counts.push(prefix),
                }
            }
            allowed.peers.push(counts);
        }
        allowed
    }
}

/// An address as a prefix of its own, whatever network it stands in.
fn host(address: &IpNet) -> IpNet {
    IpNet::from(address.addr())
}

fn is_own_address(peer: &NetworkPeer, prefix: &IpNet) -> bool {
    let alone = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
    let is = |address: &IpAddr| prefix.addr() == *address;
    alone(prefix) && peer.addresses.iter().any(|net| is(&net.addr()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::network::HeldBack;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn peer(number: u8, allowed_ips: &[&str]) -> NetworkPeer {
        NetworkPeer {
            name: format!("peer{number}.tail.test."),
            node_key: NodePublic([number; 32]),
            addresses: vec![net(&format!("100.64.0.{number}/32"))],
            allowed_ips: allowed_ips.iter().map(|text| net(text)).collect(),
            ..NetworkPeer::default()
        }
    }

    fn network(peers: Vec<NetworkPeer>) -> Network {
        Network {
            addresses: vec![net("100.64.0.1/32"), net("fd7a:115c:a1e0::1/128")],
            reserved: vec![net("100.64.0.0/10"), net("fd7a:115c:a1e0::/48")],
            peers: peers.into_iter().map(std::sync::Arc::new).collect(),
            ..Network::default()
        }
    }

    #[test]
    fn an_exit_node_that_nobody_chose_has_its_addresses_and_subnets_only() {
        let offers = [
            "100.64.0.2/32",
            "0.0.0.0/0",
            "::/0",
            "0.0.0.0/1",
            "128.0.0.0/1",
            "::/1",
            "8000::/1",
            "2000::/3",
            "64.0.0.0/2",
            "10.0.0.0/8",
            "fc00::/7",
            "192.168.7.0/24",
        ];
        let allowed = Allowed::of(&network(vec![peer(2, &offers)]), true, None);
        let counts = ["100.64.0.2/32", "10.0.0.0/8", "fc00::/7", "192.168.7.0/24"];
        assert_eq!(allowed.peers, [counts.map(net).to_vec()]);
        assert!(
            allowed
                .refused
                .iter()
                .all(|one| one.why == Why::Exit { other: false })
        );
        assert_eq!(allowed.refused.len(), offers.len() - counts.len());
    }

    #[test]
    fn nobody_has_addresses_that_no_host_has() {
        let offers = [
            "127.0.0.0/8",
            "127.0.0.1/32",
            "169.254.3.0/24",
            "224.0.0.0/8",
            "240.0.0.0/8",
            "::1/128",
            "ff00::/8",
            "fe80::1/128",
            "::ffff:10.0.0.0/104",
        ];
        let allowed = Allowed::of(&network(vec![peer(2, &offers)]), true, None);
        assert_eq!(allowed.peers, [vec![]]);
        assert!(allowed.refused.iter().all(|one| one.why == Why::NoHosts));
        let metadata = ["169.254.169.254/32"];
        let allowed = Allowed::of(&network(vec![peer(2, &metadata)]), true, None);
        assert_eq!(allowed.peers, [metadata.map(net).to_vec()]);
    }

    #[test]
    fn what_is_reserved_is_nobodys_and_a_wider_prefix_does_not_reach_it() {
        let offers = [
            "100.64.0.2/32",
            "100.64.0.1/32",
            "100.64.0.9/32",
            "100.64.0.0/10",
            "fd7a:115c:a1e0::/48",
            "fd7a:115c:a1e0:b1a::/64",
            "100.0.0.0/8",
        ];
        let mut network = network(vec![peer(2, &offers)]);
        network.held_back = vec![HeldBack {
            name: "gone".into(),
            addresses: vec![net("100.64.0.9/32")],
            ..HeldBack::default()
        }];
        let allowed = Allowed::of(&network, true, None);
        let counts = ["100.64.0.2/32", "fd7a:115c:a1e0:b1a::/64", "100.0.0.0/8"];
        assert_eq!(allowed.peers, [counts.map(net).to_vec()]);
        for taboo in ["100.64.0.1/32", "100.64.0.9/32", "100.64.0.0/10"] {
            assert!(allowed.reserved.contains(&net(taboo)), "{taboo}");
        }
    }

    #[test]
    fn an_address_is_its_peers_and_of_equal_routes_the_first_counts() {
        let peers = vec![
            peer(2, &["100.64.0.2/32", "100.64.0.3/32", "10.1.0.0/16"]),
            peer(3, &["100.64.0.3/32", "10.1.0.0/16", "10.1.2.0/24"]),
        ];
        let network = network(peers);
        let allowed = Allowed::of(&network, true, None);
        let first = ["100.64.0.2/32", "10.1.0.0/16"].map(net).to_vec();
        let second = ["100.64.0.3/32", "10.1.2.0/24"].map(net).to_vec();
        assert_eq!(allowed.peers, [first, second]);
        let sentences: Vec<String> = allowed
            .refused
            .iter()
            .map(|one| one.sentence(&network))
            .collect();
        assert_eq!(
            sentences,
            [
                "100.64.0.3/32 of peer2 is not used: peer3 has it already",
                "10.1.0.0/16 of peer3 is not used: peer2 has it already"
            ]
        );
    }

    #[test]
    fn host_bits_do_not_hide_what_a_prefix_is() {
        let allowed = Allowed::of(
            &network(vec![peer(2, &["1.2.3.4/0", "10.1.2.3/8"])]),
            true,
            None,
        );
        assert_eq!(allowed.peers, [vec![net("10.0.0.0/8")]]);
        assert_eq!(allowed.refused[0].prefix, net("0.0.0.0/0"));
    }
}
