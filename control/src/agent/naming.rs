//! Names: what the DNS service answers, what the host's resolver is told, and what the peer API is for.

use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::sync::Arc;

use ipnet::IpNet;
use ringtail_dataplane::{NetworkChange, PeerApi, Rules};

use super::network::apart;
use super::{Agent, Network, NetworkPeer, Output};
use crate::dns::{Exit, Own, Upstream, Wish};
use crate::netmap::wire::DnsConfig;

/// Where an exit node's peer API looks names up.
const DNS_PATH: &str = "/dns-query";

/// What was told last was made of this.
#[derive(Debug, Default)]
pub(super) struct Named {
    basis: Basis,
    peers: Vec<Arc<NetworkPeer>>,
    peerapi: PeerApi,
}

/// What names depend on beside the peers.
#[derive(Debug, Default, PartialEq)]
struct Basis {
    config: Option<Arc<DnsConfig>>,
    name: String,
    addresses: Vec<IpNet>,
    names_have_v6: bool,
    /// Our owner, unless we are nobody's.
    owner: Option<i64>,
    held_back: Vec<(String, Vec<IpNet>)>,
    exit: Exit,
    accepted: bool,
    lets_out: Option<Arc<Rules>>,
}

impl Agent {
    /// Has names answered for as the network and a person want it now, if that is otherwise than before.
    pub(super) fn tell_names(&mut self) {
        if let Some(peerapi) = self.new_peerapi() {
            self.out.push_back(Output::ChangeNetwork(NetworkChange {
                peerapi: Some(peerapi),
                ..NetworkChange::default()
            }));
        }
        let none = Network::default();
        let network = self.network.as_ref().unwrap_or(&none);
        let basis = self.basis(network);
        let (before, after) = apart(&self.named.peers, &network.peers);
        let same_peers = before.len() == after.len()
            && before.iter().zip(after).all(|(a, b)| names_the_same(a, b));
        if self.named.basis != basis || !same_peers {
            let wish = wish(&basis, &network.peers);
            self.out.push_back(Output::SetDns(Arc::new(wish)));
        }
        self.named.peers.clone_from(&network.peers);
        self.named.basis = basis;
    }

    /// Where our peer API is to be had, if that is elsewhere than the data plane was told.
    pub(super) fn new_peerapi(&mut self) -> Option<PeerApi> {
        let own = self.network.as_ref().map(|network| &network.addresses);
        let peerapi = self.peerapi(own.map_or(&[], Vec::as_slice));
        let new = self.named.peerapi != peerapi;
        self.named.peerapi = peerapi;
        new.then_some(peerapi)
    }

    fn basis(&self, network: &Network) -> Basis {
        let own = &network.own;
        let prefs = &self.prefs;
        let held_back = network.held_back.iter();
        Basis {
            // Whom nobody lets in has no use for servers inside of the network.
            config: network.dns.clone().filter(|_| !own.expired),
            name: own.name.clone(),
            addresses: network.addresses.clone(),
            names_have_v6: own.names_have_v6,
            owner: own.tags.is_empty().then_some(own.user),
            held_back: held_back
                .map(|node| (node.name.clone(), node.addresses.clone()))
                .collect(),
            exit: self.exit_for_names(network),
            accepted: prefs.accept_dns,
            lets_out: prefs.advertise_exit_node.then(|| network.rules.clone()),
        }
    }

    /// What coordination is told of our peer API: its ports.
    pub(super) fn services(&self) -> [Option<u16>; 2] {
        let open = !self.prefs.shields_up;
        self.setup.peerapi.map(|port| port.filter(|_| open))
    }

    /// Where our peer API is to be had.
    fn peerapi(&self, own: &[IpNet]) -> PeerApi {
        let [v4, v6] = self.services();
        let mut api = PeerApi::default();
        for net in own {
            match net.addr() {
                IpAddr::V4(ip) => api.v4 = api.v4.or_else(|| Some(SocketAddrV4::new(ip, v4?))),
                IpAddr::V6(ip) => {
                    api.v6 = api.v6.or_else(|| Some(SocketAddrV6::new(ip, v6?, 0, 0)));
                }
            }
        }
        api
    }

    /// What the way out means for names.
    fn exit_for_names(&self, network: &Network) -> Exit {
        if self.prefs.exit_node.is_none() {
            return Exit::None;
        }
        let key = self.exit.key();
        let peer = network.peers.iter().find(|peer| Some(peer.node_key) == key);
        let Some(peer) = peer.filter(|peer| peer.peerapi_dns) else {
            return Exit::Silent;
        };
        let family = |v6: bool| move |net: &&IpNet| net.addr().is_ipv6() == v6;
        let at = |v6: bool| {
            let port = peer.peerapi[usize::from(v6)]?;
            network.addresses.iter().find(family(v6))?;
            let there = peer.addresses.iter().find(family(v6))?;
            Some(SocketAddr::new(there.addr(), port))
        };
        match at(false).or_else(|| at(true)) {
            Some(there) => Exit::Resolver(Upstream::Http(there, DNS_PATH.to_owned())),
            None => Exit::Silent,
        }
    }
}

fn names_the_same(a: &NetworkPeer, b: &NetworkPeer) -> bool {
    let owner = |peer: &NetworkPeer| (peer.user, peer.tags.is_empty());
    a.name == b.name && a.addresses == b.addresses && owner(a) == owner(b)
}

fn wish(basis: &Basis, peers: &[Arc<NetworkPeer>]) -> Wish {
    // The name of a plain peer is for people: it may be that of a host which all the world knows.
    let in_network = |peer: &&Arc<NetworkPeer>| peer.plain.is_none();
    let mut wish = match &basis.config {
        Some(config) => {
            let own = Own {
                name: &basis.name,
                addresses: &basis.addresses,
                names_have_v6: basis.names_have_v6,
            };
            let nodes = peers
                .iter()
                .filter(in_network)
                .map(|peer| (peer.name.as_str(), peer.addresses.as_slice()));
            let held_back = basis.held_back.iter();
            let held_back = held_back.map(|(name, nets)| (name.as_str(), nets.as_slice()));
            Wish::new(
                config,
                own,
                nodes.chain(held_back),
                &basis.exit,
                basis.accepted,
            )
        }
        None => Wish::default(),
    };
    let ours = |peer: &NetworkPeer| peer.tags.is_empty() && Some(peer.user) == basis.owner;
    let addresses = |peer: &Arc<NetworkPeer>| {
        let ours = ours(peer);
        let addresses: Vec<IpAddr> = peer.addresses.iter().map(IpNet::addr).collect();
        addresses.into_iter().map(move |ip| (ip, ours))
    };
    wish.peers = peers
        .iter()
        .filter(in_network)
        .flat_map(addresses)
        .collect();
    wish.lets_out.clone_from(&basis.lets_out);
    let asks_us = wish.host.as_ref().is_some_and(|host| host.default);
    wish.behind_tunnel = asks_us || basis.exit != Exit::None;
    wish
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::json;

    use super::super::tests::{agent, network, outputs};
    use super::*;
    use crate::config::Prefs;
    use crate::dns::Decision;

    fn named() -> Network {
        let mut network = network(2);
        let config = json!({"Proxied": true, "Domains": ["tail.test"]});
        network.dns = Some(serde_json::from_value(config).unwrap());
        network.own.name = "a.tail.test.".into();
        network
    }

    fn told(out: &[Output]) -> Option<Arc<Wish>> {
        out.iter().rev().find_map(|output| {
            let Output::SetDns(wish) = output else {
                return None;
            };
            Some(Arc::clone(wish))
        })
    }

    fn taken(agent: &mut Agent, now: Instant, network: Network) -> Option<Arc<Wish>> {
        agent.handle_network(now, network);
        told(&outputs(agent))
    }

    fn asked(wish: &Wish, name: &str) -> Decision {
        let name = name.parse().unwrap();
        wish.zones.decide(&name, hickory_proto::rr::RecordType::A)
    }

    #[test]
    fn names_are_told_when_they_change_and_not_for_anything_else() {
        let now = crate::testing::start();
        let mut agent = agent(1, false);
        let wish = taken(&mut agent, now, named()).unwrap();
        assert_eq!(
            asked(&wish, "b.tail.test."),
            Decision::Addresses(vec![[10, 7, 0, 2].into()])
        );
        assert!(wish.host.is_some() && !wish.behind_tunnel);
        let change = |change: fn(&mut NetworkPeer)| {
            let mut network = named();
            change(Arc::make_mut(&mut network.peers[0]));
            network
        };
        let online = change(|peer| peer.online = Some(true));
        assert!(taken(&mut agent, now, online).is_none());
        let renamed = change(|peer| peer.name = "c.tail.test.".into());
        let wish = taken(&mut agent, now, renamed).unwrap();
        assert_eq!(asked(&wish, "b.tail.test."), Decision::NoName);
        let mut expired = named();
        expired.own.expired = true;
        let wish = taken(&mut agent, now, expired).unwrap();
        assert!(wish.host.is_none() && wish.service().is_empty());
    }

    #[test]
    fn a_plain_peers_name_is_no_name_of_the_network() {
        let now = crate::testing::start();
        let mut agent = agent(1, false);
        let mut network = named();
        let peer = Arc::make_mut(&mut network.peers[0]);
        peer.name = "vpn.example.com".into();
        peer.plain = Some(crate::agent::Plain::default());
        let wish = taken(&mut agent, now, network).unwrap();
        let decided = asked(&wish, "vpn.example.com.");
        assert_eq!(decided, Decision::ForwardToHost);
        assert!(wish.peers.is_empty(), "it uses no peer API");
    }

    #[test]
    fn with_an_exit_node_names_go_there_or_nowhere_else_that_the_host_knew() {
        let now = crate::testing::start();
        let mut agent = agent(1, false);
        let mut prefs = Prefs {
            exit_node: Some("b".into()),
            accept_dns: true,
            ..Prefs::default()
        };
        agent.handle_prefs(now, prefs.clone());
        let mut network = named();
        let peer = Arc::make_mut(&mut network.peers[0]);
        peer.allowed_ips.extend(crate::netmap::prefix::EVERYWHERE);
        (peer.peerapi, peer.peerapi_dns) = ([Some(4321), None], true);
        let wish = taken(&mut agent, now, network.clone()).unwrap();
        let Decision::Forward(to) = asked(&wish, "example.org.") else {
            panic!("names outside are not passed on");
        };
        assert_eq!(to[0].to_string(), "http://10.7.0.2:4321/dns-query");
        assert!(wish.host.as_ref().is_some_and(|host| host.default));
        Arc::make_mut(&mut network.peers[0]).peerapi = [None; 2];
        let wish = taken(&mut agent, now, network).unwrap();
        assert_eq!(asked(&wish, "example.org."), Decision::ForwardToHost);
        assert!(wish.behind_tunnel);
        assert!(wish.host.as_ref().is_some_and(|host| host.default));
        prefs.exit_node = None;
        prefs.shields_up = true;
        agent.handle_prefs(now, prefs);
        let out = outputs(&mut agent);
        assert_eq!(
            asked(&told(&out).unwrap(), "example.org."),
            Decision::ForwardToHost
        );
        let shut = out.iter().any(|output| {
            matches!(output, Output::ChangeNetwork(change) if change.peerapi == Some(PeerApi::default()))
        });
        assert!(shut, "nobody may reach us any more");
        assert_eq!(agent.services(), [None; 2]);
    }
}
