//! Who is who: node keys, names and inner addresses of the peers, and their indices in the data
//! plane.
//!
//! Of a new list of peers it says what is another ([`Changes`]): only that is told to others, for a
//! network of thousands changes all the time.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ringtail_dataplane::{PEERS_MAX, PeerConfig, PeerId};

use zeroize::Zeroizing;

use super::network::{NetworkPeer, apart};
use crate::key::NodePublic;

/// The peers of the current network. A node key keeps its index for as long as it is here; an
/// index is given out again only after the data plane has seen a table without it.
#[derive(Debug, Default)]
pub struct Directory {
    by_key: HashMap<NodePublic, PeerId>,
    by_id: BTreeMap<PeerId, Arc<NetworkPeer>>,
    /// The list as it was given last.
    last: Vec<Arc<NetworkPeer>>,
    free: BTreeSet<PeerId>,
    /// Peers left out because the data plane holds no more.
    refused: u64,
}

/// What is another in a list of peers than in the one before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Who is new, or of whom something else is told.
    pub told: Vec<PeerId>,
    /// Of those, who is new or another to the data plane.
    pub routed: Vec<PeerId>,
    /// Of those, who has another DISCO key than before. Of tailscaled every process has one of its own.
    pub restarted: Vec<PeerId>,
    /// Who is no more.
    pub gone: Vec<PeerId>,
}

impl Directory {
    /// Takes a new list of peers, and says what is another in it.
    pub fn update(&mut self, peers: &[Arc<NetworkPeer>]) -> Changes {
        let mut changes = Changes::default();
        let last = std::mem::replace(&mut self.last, peers.to_vec());
        // Whoever had no place may have one now.
        let (before, after) = if self.by_id.len() < last.len() {
            (&last[..], peers)
        } else {
            apart(&last, peers)
        };
        if !before.is_empty() {
            let keys = |peers: &[Arc<NetworkPeer>]| -> HashSet<NodePublic> {
                peers.iter().map(|peer| peer.node_key).collect()
            };
            let named = keys(after);
            let missing = before.iter().map(|peer| peer.node_key);
            let mut missing: Vec<NodePublic> = missing.filter(|key| !named.contains(key)).collect();
            if !missing.is_empty() {
                // A key may be there twice.
                let named = keys(peers);
                missing.retain(|key| !named.contains(key));
            }
            for key in missing {
                if let Some(id) = self.by_key.remove(&key) {
                    self.by_id.remove(&id);
                    changes.gone.push(id);
                }
            }
        }
        let free_now = std::mem::replace(&mut self.free, changes.gone.iter().copied().collect());
        let mut free_now = free_now.into_iter();
        for peer in after {
            let id = match self.id(&peer.node_key) {
                Some(id) => id,
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
            let before = self.by_id.get(&id);
            if before == Some(peer) {
                continue;
            }
            changes.told.push(id);
            let same = |before: &Arc<NetworkPeer>| {
                before.allowed_ips == peer.allowed_ips && before.plain == peer.plain
            };
            if !before.is_some_and(same) {
                changes.routed.push(id);
            }
            if let Some((before, after)) = before.and_then(|b| b.disco_key).zip(peer.disco_key)
                && before != after
            {
                changes.restarted.push(id);
            }
            self.by_id.insert(id, Arc::clone(peer));
        }
        self.free.extend(free_now);
        changes
    }

    /// A peer's index.
    pub fn id(&self, key: &NodePublic) -> Option<PeerId> {
        self.by_key.get(key).copied()
    }

    /// A peer by its index.
    pub fn peer(&self, id: PeerId) -> Option<&NetworkPeer> {
        self.by_id.get(&id).map(|peer| &**peer)
    }

    /// All peers with their indices.
    pub fn iter(&self) -> impl Iterator<Item = (PeerId, &NetworkPeer)> {
        self.by_id.iter().map(|(id, peer)| (*id, &**peer))
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

    /// These peers for the data plane.
    pub fn peer_configs(&self, ids: &[PeerId]) -> Vec<PeerConfig> {
        let peers = ids.iter().filter_map(|id| Some((*id, self.peer(*id)?)));
        peers
            .map(|(id, peer)| {
                let plain = peer.plain.as_ref();
                let preshared_key = plain.and_then(|plain| plain.preshared_key.as_ref());
                PeerConfig {
                    preshared_key: preshared_key.map(|key| Zeroizing::new(key.0)),
                    persistent_keepalive: plain.map(|p| p.keepalive).filter(|s| *s > 0),
                    outsider: plain.is_some(),
                    allowed_ips: peer.allowed_ips.iter().map(|net| (*net).into()).collect(),
                    ..PeerConfig::new(id, peer.node_key.0)
                }
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

    fn peer(seed: u8, name: &str) -> Arc<NetworkPeer> {
        Arc::new(NetworkPeer {
            name: name.into(),
            node_key: NodePublic([seed; 32]),
            addresses: vec![format!("10.7.0.{seed}/32").parse().unwrap()],
            allowed_ips: vec![format!("10.7.0.{seed}/32").parse().unwrap()],
            ..NetworkPeer::default()
        })
    }

    #[test]
    fn only_what_is_another_is_told() {
        let mut directory = Directory::default();
        let all = [peer(1, "a"), peer(2, "b"), peer(3, "c"), peer(4, "d")];
        let first = directory.update(&all);
        assert_eq!((first.told.len(), first.routed.len()), (4, 4));
        assert_eq!(directory.update(&all), Changes::default());
        let id = |seed: u8| directory.id(&NodePublic([seed; 32])).unwrap();
        let ids = [1, 2, 3, 4].map(id);
        let other = |mut peer: Arc<NetworkPeer>, change: fn(&mut NetworkPeer)| {
            change(Arc::make_mut(&mut peer));
            peer
        };
        let key = |seed| Some(crate::key::DiscoPublic([seed; 32]));
        let offline = other(peer(1, "a"), |peer| peer.online = Some(false));
        let keyed = other(peer(3, "c"), |peer| {
            peer.disco_key = Some(crate::key::DiscoPublic([7; 32]));
        });
        let wider = other(peer(4, "d"), |peer| {
            peer.allowed_ips.push("10.8.0.0/16".parse().unwrap())
        });
        // Another order, and copies of what is as it was.
        let changes = directory.update(&[wider.clone(), keyed.clone(), offline.clone()]);
        assert_eq!(changes.gone, [ids[1]]);
        assert_eq!(changes.told, [ids[3], ids[2], ids[0]]);
        assert_eq!(changes.routed, [ids[3]]);
        assert_eq!(changes.restarted, [], "it had none before");
        let mut keyed = keyed;
        Arc::make_mut(&mut keyed).disco_key = key(8);
        let changes = directory.update(&[wider, keyed, offline]);
        assert_eq!(
            (&changes.told[..], &changes.restarted[..]),
            (&ids[2..3], &ids[2..3])
        );
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
        let peers: Vec<Arc<NetworkPeer>> = (0..PEERS_MAX + 3)
            .map(|n| {
                let mut key = [0; 32];
                key[..8].copy_from_slice(&(n as u64 + 1).to_le_bytes());
                Arc::new(NetworkPeer {
                    node_key: NodePublic(key),
                    ..NetworkPeer::default()
                })
            })
            .collect();
        let mut directory = Directory::default();
        directory.update(&peers);
        assert_eq!(
            (directory.iter().count(), directory.refused()),
            (PEERS_MAX, 3)
        );
        // Where others go there is room, once the data plane has seen them gone.
        directory.update(&peers[5..]);
        directory.update(&peers[5..]);
        assert_eq!(directory.iter().count(), PEERS_MAX - 2);
        assert!(directory.id(&peers[PEERS_MAX + 2].node_key).is_some());
    }
}
