//! Who is who: node keys, names and inner addresses of the peers, and their indices in the data
//! plane.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ringtail_dataplane::channel::{PEERS_MAX, PeerConfig, PeerId};

use super::network::{NetworkPeer, prefix};
use crate::key::NodePublic;

/// The peers of the current network. A node key keeps its index for as long as it is here; an
/// index is given out again only after the data plane has seen a table without it.
#[derive(Debug, Default)]
pub struct Directory {
    by_key: BTreeMap<NodePublic, PeerId>,
    by_id: BTreeMap<PeerId, NetworkPeer>,
    free: BTreeSet<PeerId>,
    /// Peers left out because the data plane holds no more.
    refused: u64,
}

impl Directory {
    /// Takes a new list of peers.
    pub fn update(&mut self, peers: &[NetworkPeer]) {
        let wanted: BTreeSet<NodePublic> = peers.iter().map(|peer| peer.node_key).collect();
        let gone: Vec<_> = self
            .by_key
            .iter()
            .filter(|(key, _)| !wanted.contains(*key))
            .map(|(k, i)| (*k, *i))
            .collect();
        let free_now = std::mem::take(&mut self.free);
        for (key, id) in gone {
            self.by_key.remove(&key);
            self.by_id.remove(&id);
            self.free.insert(id);
        }
        let mut free_now = free_now.into_iter();
        for peer in peers {
            let id = match self.by_key.get(&peer.node_key) {
                Some(id) => *id,
                None => {
                    let next = u32::try_from(self.by_id.len() + self.free.len() + free_now.len());
                    let fresh = next.ok().filter(|n| (*n as usize) < PEERS_MAX).map(PeerId);
                    let Some(id) = free_now.next().or(fresh) else {
                        self.refused += 1;
                        continue;
                    };
                    self.by_key.insert(peer.node_key, id);
                    id
                }
            };
            self.by_id.insert(id, peer.clone());
        }
        self.free.extend(free_now);
    }

    /// Who has another DISCO key in a new list of peers than now. Of tailscaled every process has one of its own.
    pub fn with_another_disco_key(&self, peers: &[NetworkPeer]) -> Vec<PeerId> {
        let changed = |peer: &NetworkPeer| {
            let id = self.id(&peer.node_key)?;
            let now = self.peer(id)?.disco_key?;
            (peer.disco_key? != now).then_some(id)
        };
        peers.iter().filter_map(changed).collect()
    }

    /// A peer's index.
    pub fn id(&self, key: &NodePublic) -> Option<PeerId> {
        self.by_key.get(key).copied()
    }

    /// A peer by its index.
    pub fn peer(&self, id: PeerId) -> Option<&NetworkPeer> {
        self.by_id.get(&id)
    }

    /// All peers with their indices.
    pub fn iter(&self) -> impl Iterator<Item = (PeerId, &NetworkPeer)> {
        self.by_id.iter().map(|(id, peer)| (*id, peer))
    }

    /// Finds the peer a person means: by name (whole, or its first label), inner address, or key.
    ///
    /// # Errors
    /// A sentence that says what is known instead.
    pub fn find(&self, text: &str) -> Result<PeerId, String> {
        let found = self
            .iter()
            .find(|(_, peer)| is_meant(text, &peer.name, peer.node_key, &peer.addresses));
        found.map(|(id, _)| id).ok_or_else(|| {
            let names: Vec<&str> = self
                .by_id
                .values()
                .map(|p| p.name.as_str())
                .take(20)
                .collect();
            format!("no peer is called {text}; known are: {}", names.join(", "))
        })
    }

    /// The table for the data plane.
    pub fn peer_configs(&self) -> Vec<PeerConfig> {
        self.iter()
            .map(|(id, peer)| PeerConfig {
                id,
                public_key: peer.node_key.0,
                preshared_key: None,
                allowed_ips: peer.allowed_ips.iter().map(prefix).collect(),
                persistent_keepalive: None,
            })
            .collect()
    }

    /// Peers left out for lack of room so far.
    pub fn refused(&self) -> u64 {
        self.refused
    }
}

/// Whether a person means this node: by name (whole, or its first label), inner address, or key.
pub(super) fn is_meant(text: &str, name: &str, key: NodePublic, addresses: &[IpNet]) -> bool {
    let wanted = text.trim_end_matches('.');
    let name = name.trim_end_matches('.');
    let label = name.split('.').next().unwrap_or(name);
    let address: Option<IpAddr> = text.parse().ok();
    name.eq_ignore_ascii_case(wanted)
        || label.eq_ignore_ascii_case(wanted)
        || text.parse() == Ok(key)
        || address.is_some_and(|a| addresses.iter().any(|net| net.addr() == a))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(seed: u8, name: &str) -> NetworkPeer {
        NetworkPeer {
            name: name.into(),
            node_key: NodePublic([seed; 32]),
            addresses: vec![format!("10.7.0.{seed}/32").parse().unwrap()],
            allowed_ips: vec![format!("10.7.0.{seed}/32").parse().unwrap()],
            ..NetworkPeer::default()
        }
    }

    #[test]
    fn an_index_stays_with_its_key_and_rests_for_one_table_before_reuse() {
        let mut directory = Directory::default();
        directory.update(&[peer(1, "a"), peer(2, "b")]);
        let (a, b) = (directory.find("a").unwrap(), directory.find("b").unwrap());
        directory.update(&[peer(2, "b"), peer(3, "c")]);
        assert_eq!(directory.id(&NodePublic([2; 32])), Some(b));
        let c = directory.find("c").unwrap();
        assert_ne!(
            c, a,
            "a's index has not been seen free by the data plane yet"
        );
        directory.update(&[peer(2, "b"), peer(3, "c"), peer(4, "d")]);
        assert_eq!(directory.find("d"), Ok(a));
        assert_eq!(directory.find("c"), Ok(c));
    }

    #[test]
    fn people_find_a_peer_by_name_label_address_or_key() {
        let mut directory = Directory::default();
        directory.update(&[peer(5, "Edge1.tail.test.")]);
        let key = NodePublic([5; 32]).to_string();
        for text in ["edge1", "edge1.tail.test", "10.7.0.5", key.as_str()] {
            assert!(directory.find(text).is_ok(), "{text}");
        }
        assert!(directory.find("edge2").unwrap_err().contains("Edge1"));
    }

    #[test]
    fn more_peers_than_the_data_plane_holds_are_counted_not_lost_silently() {
        let peers: Vec<NetworkPeer> = (0..PEERS_MAX + 3)
            .map(|n| {
                let mut key = [0; 32];
                key[..8].copy_from_slice(&(n as u64 + 1).to_le_bytes());
                NetworkPeer {
                    node_key: NodePublic(key),
                    ..NetworkPeer::default()
                }
            })
            .collect();
        let mut directory = Directory::default();
        directory.update(&peers);
        assert_eq!(
            (directory.iter().count(), directory.refused()),
            (PEERS_MAX, 3)
        );
    }
}
