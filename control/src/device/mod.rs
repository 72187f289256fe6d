//! A WireGuard device as its configuration socket sees it: keys, mark and peers with their allowed
//! IPs, and the table of it for the data plane.
//!
//! [`Device`] is a core. A [`Transaction`] is first checked ([`Device::check`]), then the driver
//! gives port and mark to the sockets, which may fail, and then [`Device::apply`] carries the rest
//! out, which cannot; it says what the data plane has to be told. A prefix has one owner: giving it
//! to another peer moves it (cryptokey routing, WireGuard paper §2).
//!
//! Rooms: the device is here; `status` is the reply to `get`.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;

use ringtail_dataplane::{PEERS_MAX, PeerConfig, PeerId, Prefix};
use zeroize::Zeroizing;

use crate::key::{NodePrivate, NodePublic};
use crate::uapi::{Errno, PresharedKey, Step, Transaction};

mod status;
#[cfg(test)]
mod tests;

/// Allowed IPs of all peers together at most.
pub const ALLOWED_IPS_MAX: usize = 1 << 20;

/// The configuration of one device.
#[derive(Clone, Debug, Default)]
pub struct Device {
    private_key: Option<NodePrivate>,
    public_key: Option<NodePublic>,
    fwmark: u32,
    peers: BTreeMap<PeerId, Peer>,
    by_key: HashMap<NodePublic, PeerId>,
    /// Peers in the order they were made, which is the order of `get`.
    order: BTreeMap<u64, PeerId>,
    /// Who has a prefix, and the place among the owner's.
    owners: HashMap<Prefix, (PeerId, u64)>,
    /// Ids that the data plane has seen free.
    free: VecDeque<PeerId>,
    /// Ids freed since the last table was made for the data plane.
    resting: VecDeque<PeerId>,
    /// Ids from here on were never given out.
    fresh: u32,
    /// Grows with everything whose order counts.
    sequence: u64,
}

/// One peer as configured.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The peer's key.
    pub key: NodePublic,
    sequence: u64,
    /// The preshared key, if there is one.
    pub preshared_key: Option<PresharedKey>,
    /// The address last configured.
    pub endpoint: Option<SocketAddr>,
    /// Keep-alive period in seconds; 0 is off.
    pub keepalive: u16,
    allowed_ips: BTreeMap<u64, Prefix>,
}

/// What a transaction changed, for the data plane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// There is another private key, or none any more.
    pub private_key: bool,
    /// Who is new, another or no more: [`Device::peers_now`].
    pub peers: BTreeSet<PeerId>,
    /// These peers were sent to a new address.
    pub endpoints: BTreeMap<PeerId, SocketAddr>,
}

impl Peer {
    /// The prefixes of the peer, oldest first.
    pub fn allowed_ips(&self) -> impl Iterator<Item = Prefix> {
        self.allowed_ips.values().copied()
    }
}

/// The peer that the section at hand is about.
#[derive(Clone, Copy)]
enum Section {
    /// None: it is our own key, or it was removed.
    Ignored,
    Peer {
        id: PeerId,
        made_here: bool,
    },
}

impl Device {
    /// Own private key, if there is one.
    pub fn private_key(&self) -> Option<&NodePrivate> {
        self.private_key.as_ref()
    }

    /// Mark on every underlay socket; 0 is none.
    pub fn fwmark(&self) -> u32 {
        self.fwmark
    }

    /// All peers, oldest first.
    pub fn peers(&self) -> impl Iterator<Item = (PeerId, &Peer)> {
        self.order.values().map(|id| (*id, &self.peers[id]))
    }

    /// Number of peers.
    pub fn peers_len(&self) -> usize {
        self.peers.len()
    }

    /// Number of prefixes of all peers.
    pub fn allowed_ips_len(&self) -> usize {
        self.owners.len()
    }

    /// Says whether there is room for everything the transaction may add, at every step of it.
    ///
    /// # Errors
    /// [`Errno::NO_SPACE`] if not.
    pub fn check(&self, transaction: &Transaction) -> Result<(), Errno> {
        let kept = !transaction.replace_peers;
        let mut peers = if kept { self.peers.len() } else { 0 };
        let mut prefixes = if kept { self.owners.len() } else { 0 };
        // The peers named so far, and whether they are there by now.
        let mut named: HashMap<&NodePublic, bool> = HashMap::new();
        let (mut selected, mut made_here) = (None, false);
        for step in &transaction.steps {
            match step {
                Step::Peer(key) => {
                    let there = named
                        .entry(key)
                        .or_insert_with(|| kept && self.by_key.contains_key(key));
                    made_here = !*there;
                    *there = true;
                    peers += usize::from(made_here);
                    if peers > PEERS_MAX {
                        return Err(Errno::NO_SPACE);
                    }
                    selected = Some(key);
                }
                Step::UpdateOnly if !made_here => {}
                Step::Remove | Step::UpdateOnly => {
                    if let Some(key) = selected.take() {
                        named.insert(key, false);
                        peers -= 1;
                    }
                }
                Step::Allow(_) => prefixes += 1,
                Step::PresharedKey(_)
                | Step::Endpoint(_)
                | Step::Keepalive(_)
                | Step::ReplaceAllowedIps
                | Step::Disallow(_) => {}
            }
        }
        if prefixes > ALLOWED_IPS_MAX {
            return self.clone().check_prefixes(transaction);
        }
        Ok(())
    }

    /// Tries the transaction out: of the prefixes it gives, some may be there, or come for others.
    fn check_prefixes(mut self, transaction: &Transaction) -> Result<(), Errno> {
        let mut changes = self.begin(transaction);
        let mut section = Section::Ignored;
        for step in &transaction.steps {
            section = self.step(section, step.clone(), &mut changes);
            if self.owners.len() > ALLOWED_IPS_MAX {
                return Err(Errno::NO_SPACE);
            }
        }
        Ok(())
    }

    /// Carries out a transaction that [`Device::check`] has let through. The port is not kept here:
    /// the data plane knows it.
    pub fn apply(&mut self, transaction: Transaction) -> Changes {
        let mut changes = self.begin(&transaction);
        let mut section = Section::Ignored;
        for step in transaction.steps {
            section = self.step(section, step, &mut changes);
        }
        changes
    }

    /// What comes before the steps.
    fn begin(&mut self, transaction: &Transaction) -> Changes {
        let mut changes = Changes::default();
        if let Some(key) = &transaction.private_key {
            self.set_private_key(key.clone(), &mut changes);
        }
        if let Some(fwmark) = transaction.fwmark {
            self.fwmark = fwmark;
        }
        if transaction.replace_peers {
            for id in self.peers.keys().copied().collect::<Vec<_>>() {
                self.remove(id, &mut changes);
            }
        }
        changes
    }

    fn set_private_key(&mut self, key: Option<NodePrivate>, changes: &mut Changes) {
        if key.as_ref().map(NodePrivate::as_bytes)
            == self.private_key.as_ref().map(NodePrivate::as_bytes)
        {
            return;
        }
        self.public_key = key.as_ref().map(NodePrivate::public);
        self.private_key = key;
        changes.private_key = true;
        let own = self.public_key.and_then(|key| self.by_key.get(&key));
        if let Some(own) = own.copied() {
            self.remove(own, changes);
        }
    }

    fn step(&mut self, section: Section, step: Step, changes: &mut Changes) -> Section {
        if let Step::Peer(key) = step {
            return self.select(key, changes);
        }
        let Section::Peer { id, made_here } = section else {
            return section;
        };
        let peer = self
            .peers
            .get_mut(&id)
            .expect("a removed peer ends its section");
        match step {
            Step::Remove => {
                self.remove(id, changes);
                return Section::Ignored;
            }
            Step::UpdateOnly if made_here => {
                self.remove(id, changes);
                return Section::Ignored;
            }
            Step::UpdateOnly | Step::Peer(_) => {}
            Step::PresharedKey(key) => {
                if peer.preshared_key != key {
                    changes.peers.insert(id);
                }
                peer.preshared_key = key;
            }
            Step::Endpoint(endpoint) => {
                peer.endpoint = Some(endpoint);
                changes.endpoints.insert(id, endpoint);
            }
            Step::Keepalive(seconds) => {
                if peer.keepalive != seconds {
                    changes.peers.insert(id);
                }
                peer.keepalive = seconds;
            }
            Step::ReplaceAllowedIps => {
                if !peer.allowed_ips.is_empty() {
                    changes.peers.insert(id);
                }
                for prefix in std::mem::take(&mut peer.allowed_ips).values() {
                    self.owners.remove(prefix);
                }
            }
            Step::Allow(prefix) => self.allow(id, prefix, changes),
            Step::Disallow(prefix) => {
                if self.owners.get(&prefix).is_some_and(|(of, _)| *of == id) {
                    self.disown(prefix);
                    changes.peers.insert(id);
                }
            }
        }
        section
    }

    fn select(&mut self, key: NodePublic, changes: &mut Changes) -> Section {
        if Some(key) == self.public_key {
            return Section::Ignored;
        }
        if let Some(&id) = self.by_key.get(&key) {
            return Section::Peer {
                id,
                made_here: false,
            };
        }
        let id = self.take_id();
        self.sequence += 1;
        let peer = Peer {
            key,
            sequence: self.sequence,
            preshared_key: None,
            endpoint: None,
            keepalive: 0,
            allowed_ips: BTreeMap::new(),
        };
        self.peers.insert(id, peer);
        self.by_key.insert(key, id);
        self.order.insert(self.sequence, id);
        changes.peers.insert(id);
        Section::Peer {
            id,
            made_here: true,
        }
    }

    /// An id for a new peer: one that rested for a table, else one never used. Only when all are
    /// taken, one that the data plane still knows under its old holder, whose key tells it apart.
    fn take_id(&mut self) -> PeerId {
        if let Some(id) = self.free.pop_front() {
            return id;
        }
        if (self.fresh as usize) < PEERS_MAX {
            self.fresh += 1;
            return PeerId(self.fresh - 1);
        }
        self.resting
            .pop_front()
            .expect("check has made sure of an id")
    }

    fn remove(&mut self, id: PeerId, changes: &mut Changes) {
        let Some(peer) = self.peers.remove(&id) else {
            return;
        };
        self.by_key.remove(&peer.key);
        self.order.remove(&peer.sequence);
        for prefix in peer.allowed_ips.values() {
            self.owners.remove(prefix);
        }
        self.resting.push_back(id);
        changes.peers.insert(id);
        changes.endpoints.remove(&id);
    }

    /// Gives the prefix to a peer, last of its own, and takes it from whoever had it.
    fn allow(&mut self, id: PeerId, prefix: Prefix, changes: &mut Changes) {
        let before = self.disown(prefix);
        if before != Some(id) {
            changes.peers.extend(before);
            changes.peers.insert(id);
        }
        self.sequence += 1;
        self.owners.insert(prefix, (id, self.sequence));
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.allowed_ips.insert(self.sequence, prefix);
        }
    }

    /// Takes the prefix from its owner, if it has one, and says who that was.
    fn disown(&mut self, prefix: Prefix) -> Option<PeerId> {
        let (id, place) = self.owners.remove(&prefix)?;
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.allowed_ips.remove(&place);
        }
        Some(id)
    }

    /// What the data plane is to be told of these: who is there as it is now, and who is not. Ids that
    /// are free by then may be given out again afterwards.
    pub fn peers_now(&mut self, ids: &BTreeSet<PeerId>) -> (Vec<PeerConfig>, Vec<PeerId>) {
        self.free.append(&mut self.resting);
        let (there, gone): (Vec<PeerId>, Vec<PeerId>) =
            ids.iter().partition(|id| self.peers.contains_key(id));
        let there = there
            .into_iter()
            .filter_map(|id| Some((id, self.peers.get(&id)?)));
        let configs = there.map(|(id, peer)| PeerConfig {
            id,
            public_key: peer.key.0,
            preshared_key: peer.preshared_key.as_ref().map(|key| Zeroizing::new(key.0)),
            allowed_ips: peer.allowed_ips().collect(),
            persistent_keepalive: (peer.keepalive > 0).then_some(peer.keepalive),
            outsider: false,
        });
        (configs.collect(), gone)
    }
}
