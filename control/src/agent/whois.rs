//! Who is who, for people and programs: addresses of a node, and the node of an address.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::directory::is_meant;
use super::{Agent, Network, NetworkPeer};

impl Network {
    /// The name that people know an owner by.
    pub(super) fn user_name(&self, id: i64) -> Option<String> {
        let user = self.users.get(&id)?;
        let names = [&user.login_name, &user.display_name];
        names.into_iter().find(|name| !name.is_empty()).cloned()
    }

    /// Who owns a node: its tags, if it has any, stand in for a person.
    pub(super) fn owner(&self, user: i64, tags: &[String]) -> Option<String> {
        if tags.is_empty() {
            self.user_name(user)
        } else {
            Some(tags.join(" "))
        }
    }
}

impl Agent {
    /// The inner addresses of the peer that a person means, or our own.
    ///
    /// # Errors
    /// There is no such peer, or no network yet: a sentence.
    pub fn addresses_of(&self, peer: Option<&str>) -> Result<Value, String> {
        let network = self.network.as_ref().ok_or(NO_NETWORK)?;
        let own = |text: &str| {
            is_meant(
                text,
                &network.own.name,
                self.setup.node_key,
                &network.addresses,
            )
        };
        let addresses = match peer {
            Some(text) if !own(text) => {
                let found = self.directory.find(text);
                let found =
                    found.map_err(|unknown| network.why_held_back(text).unwrap_or(unknown))?;
                self.directory.peer(found).map(|peer| &peer.addresses)
            }
            Some(_) | None => Some(&network.addresses),
        };
        let addresses = addresses.into_iter().flatten().map(IpNet::addr);
        Ok(json!({"addresses": addresses.collect::<Vec<_>>()}))
    }

    /// The nodes that offer to be a way out to the Internet, for each family whether an administrator has
    /// approved that.
    pub fn exit_nodes(&self) -> Value {
        let used = self.exit_peer().map(|peer| peer.node_key);
        let network = self.told.as_ref();
        let peers = network.into_iter().flat_map(|network| &network.peers);
        let offering = peers.filter(|peer| everywhere(&peer.routable) != [false; 2]);
        let nodes = offering.map(|peer| {
            let [ipv4, ipv6] = everywhere(&peer.allowed_ips);
            json!({
                "name": peer.name.trim_end_matches('.'),
                "addresses": peer.addresses.iter().map(IpNet::addr).collect::<Vec<_>>(),
                "online": peer.online,
                "approved": {"ipv4": ipv4, "ipv6": ipv6},
                "in_use": used == Some(peer.node_key),
            })
        });
        json!({"nodes": nodes.collect::<Vec<_>>()})
    }

    /// Who has this address, or routes the narrowest prefix that holds it.
    ///
    /// # Errors
    /// Nobody does: a sentence.
    pub fn whois(&self, address: IpAddr) -> Result<Value, String> {
        let network = self.network.as_ref().ok_or(NO_NETWORK)?;
        let has = |addresses: &[IpNet]| addresses.iter().any(|net| net.addr() == address);
        if has(&network.addresses) {
            let own = &network.own;
            return Ok(json!({
                "name": own.name.trim_end_matches('.'),
                "node_key": self.setup.node_key,
                "addresses": network.addresses.iter().map(IpNet::addr).collect::<Vec<_>>(),
                "owner": network.owner(own.user, &own.tags),
                "self": true,
            }));
        }
        if let Some(held) = network.held_back.iter().find(|node| has(&node.addresses)) {
            return Ok(json!({
                "name": held.name.trim_end_matches('.'),
                "node_key": held.node_key,
                "addresses": held.addresses.iter().map(IpNet::addr).collect::<Vec<_>>(),
                "held_back": held.why.name(),
            }));
        }
        let widest = |peer: &NetworkPeer| -> Option<IpNet> {
            let holds = peer.allowed_ips.iter().filter(|net| net.contains(&address));
            holds.max_by_key(|net| net.prefix_len()).copied()
        };
        let routes = network
            .peers
            .iter()
            .filter_map(|peer| Some((widest(peer)?, peer)));
        let (net, peer) = routes
            .max_by_key(|(net, _)| net.prefix_len())
            .ok_or_else(|| format!("nobody has {address} in this network"))?;
        Ok(json!({
            "name": peer.name.trim_end_matches('.'),
            "node_key": peer.node_key,
            "addresses": peer.addresses.iter().map(IpNet::addr).collect::<Vec<_>>(),
            "owner": network.owner(peer.user, &peer.tags),
            "routes": (!has(&peer.addresses)).then_some(net),
        }))
    }
}

/// Whether these hold everything of IPv4, and of IPv6.
fn everywhere(nets: &[IpNet]) -> [bool; 2] {
    let whole = |net: &IpNet| net.prefix_len() == 0;
    [false, true].map(|v6| {
        nets.iter()
            .any(|net| whole(net) && net.addr().is_ipv6() == v6)
    })
}

/// What is known before the first map.
const NO_NETWORK: &str = "there is no network map yet: `ringtail status` says why";

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::agent::tests::agent;
    use crate::key::NodePublic;
    use crate::netmap::wire::UserProfile;
    use crate::testing::start;

    fn peer(seed: u8, name: &str, addresses: &[&str], allowed: &[&str]) -> Arc<NetworkPeer> {
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect();
        Arc::new(NetworkPeer {
            name: name.into(),
            node_key: NodePublic([seed; 32]),
            addresses: nets(addresses),
            allowed_ips: nets(allowed),
            user: 7,
            ..NetworkPeer::default()
        })
    }

    #[test]
    fn exit_nodes_are_listed_with_what_is_approved_of_them() {
        let mut agent = agent(1, false);
        assert_eq!(agent.exit_nodes()["nodes"], json!([]));
        let mut exit = (*peer(2, "b.lab.example.", &["100.64.0.2/32"], &["0.0.0.0/0"])).clone();
        exit.routable = vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
        let plain = peer(3, "c.lab.example.", &["100.64.0.3/32"], &["100.64.0.3/32"]);
        agent.handle_network(
            start(),
            Network {
                peers: vec![Arc::new(exit), plain],
                ..Network::default()
            },
        );
        let listed = agent.exit_nodes();
        assert_eq!(listed["nodes"].as_array().unwrap().len(), 1);
        let node = &listed["nodes"][0];
        assert_eq!(node["name"], "b.lab.example");
        assert_eq!(node["approved"], json!({"ipv4": true, "ipv6": false}));
        assert_eq!(node["in_use"], false);
    }

    #[test]
    fn an_address_belongs_to_its_node_and_else_to_who_routes_it_most_narrowly() {
        let mut agent = agent(1, false);
        let any: IpAddr = "10.1.2.3".parse().unwrap();
        assert!(agent.whois(any).unwrap_err().contains("no network map"));
        let user = UserProfile {
            login_name: "alice".into(),
            ..UserProfile::default()
        };
        let network = Network {
            addresses: vec!["100.64.0.1/32".parse().unwrap()],
            own: crate::agent::Standing {
                name: "a.lab.example.".into(),
                tags: vec!["tag:r".into()],
                ..Default::default()
            },
            peers: vec![
                peer(
                    2,
                    "b.lab.example.",
                    &["100.64.0.2/32"],
                    &["100.64.0.2/32", "10.0.0.0/8"],
                ),
                peer(
                    3,
                    "c.lab.example.",
                    &["100.64.0.3/32"],
                    &["100.64.0.3/32", "10.1.0.0/16"],
                ),
            ],
            users: Arc::new([(7, user)].into()),
            ..Network::default()
        };
        agent.handle_prefs(
            start(),
            crate::config::Prefs {
                accept_routes: true,
                ..Default::default()
            },
        );
        agent.handle_network(start(), network);
        let whois = |address: &str| agent.whois(address.parse().unwrap());
        assert_eq!(whois("100.64.0.2").unwrap()["name"], "b.lab.example");
        assert_eq!(whois("100.64.0.2").unwrap()["owner"], "alice");
        assert!(whois("100.64.0.2").unwrap()["routes"].is_null());
        assert_eq!(whois("10.1.2.3").unwrap()["name"], "c.lab.example");
        assert_eq!(whois("10.1.2.3").unwrap()["routes"], "10.1.0.0/16");
        assert_eq!(whois("10.2.2.3").unwrap()["name"], "b.lab.example");
        assert_eq!(whois("100.64.0.1").unwrap()["owner"], "tag:r");
        assert!(whois("192.0.2.1").is_err());
        let of = |peer: Option<&str>| {
            agent
                .addresses_of(peer)
                .map(|found| found["addresses"][0].clone())
        };
        assert_eq!(of(None).unwrap(), "100.64.0.1");
        assert_eq!(of(Some("A")).unwrap(), "100.64.0.1");
        assert_eq!(of(Some("c.lab.example")).unwrap(), "100.64.0.3");
        assert!(of(Some("z")).unwrap_err().contains("known are"));
    }
}
