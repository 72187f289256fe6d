//! The peers and the routes to them, as every thread has them.
//!
//! A table never changes. The control side makes the next one from the last ([`PeerTable::changed`]),
//! and the two share all but what is different, so that neither making one nor letting one go depends
//! on how many peers there are. Each thread is given the newest whole, whatever it has missed in
//! between, and finds out by itself how that differs from its own ([`PeerTable::differences`]).

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::PeerShared;
use crate::route::{self, SharedMap};
use crate::types::{PEERS_MAX, PeerConfig, PeerId, Prefix};

/// One peer of the table.
#[derive(Clone, Debug)]
pub(crate) struct PeerEntry {
    pub(crate) config: Arc<PeerConfig>,
    /// The same in every table for as long as id and key are.
    pub(crate) shared: Arc<PeerShared>,
    /// The shard that owns the peer.
    pub(crate) owner: u8,
}

impl PeerEntry {
    /// Whether nothing about the peer is another.
    fn is(&self, other: &PeerEntry) -> bool {
        Arc::ptr_eq(&self.config, &other.config) && Arc::ptr_eq(&self.shared, &other.shared)
    }
}

/// The owner of what belongs to no peer; beyond every peer's id.
const NOBODY: PeerId = PeerId(u32::MAX);

/// The peers and the routes to them.
#[derive(Clone, Debug, Default)]
pub(crate) struct PeerTable {
    pub(crate) routes: route::Table,
    by_id: SharedMap<PeerId, PeerEntry>,
    reserved: Arc<[Prefix]>,
    /// How often an address that was some peer's may have become another's, or nobody's.
    moves: u64,
}

impl PeerTable {
    /// The table that comes after this one when `peers` are new or another and those in `gone` are no
    /// more. `reserved` takes the place of what was reserved. A prefix goes from who had it to the
    /// peer that it is new for, but what is reserved does not.
    pub(crate) fn changed(
        &self,
        peers: Vec<PeerConfig>,
        gone: &[PeerId],
        reserved: Option<Vec<Prefix>>,
        shards: usize,
    ) -> PeerTable {
        let mut table = self.clone();
        if let Some(reserved) = reserved.filter(|reserved| **reserved != *self.reserved) {
            for prefix in self.reserved.iter() {
                table.take(*prefix, NOBODY);
            }
            for prefix in &reserved {
                table.give(*prefix, NOBODY);
            }
            table.reserved = reserved.into();
        }
        for id in gone {
            if let Some(entry) = table.by_id.remove(*id) {
                table.take_all(&entry.config);
            }
        }
        let mut given = Vec::new();
        for config in peers {
            let Some(entry) = self.entry(config, shards) else {
                continue;
            };
            let before = table.by_id.insert(entry.config.id, entry.clone());
            // Another key is another peer, of another shard perhaps.
            let stays = |before: &PeerEntry| {
                Arc::ptr_eq(&before.shared, &entry.shared)
                    && before.config.allowed_ips == entry.config.allowed_ips
            };
            if !before.as_ref().is_some_and(stays) {
                if let Some(before) = before {
                    table.take_all(&before.config);
                }
                given.push(entry.config);
            }
        }
        for config in given {
            for prefix in &config.allowed_ips {
                if table.routes.owner(*prefix) != Some(NOBODY) {
                    table.give(*prefix, config.id);
                }
            }
        }
        table
    }

    /// The entry of a peer in the table after this one: the same if nothing is another.
    fn entry(&self, config: PeerConfig, shards: usize) -> Option<PeerEntry> {
        if config.id.0 as usize >= PEERS_MAX {
            tracing::error!(peer = config.id.0, "peer id out of range: not used");
            return None;
        }
        let known = self
            .get(config.id)
            .filter(|known| known.config.public_key == config.public_key);
        if let Some(known) = known.filter(|known| *known.config == config) {
            return Some(known.clone());
        }
        Some(PeerEntry {
            owner: owner_of(&config.public_key, shards),
            shared: known.map_or_else(Arc::default, |known| Arc::clone(&known.shared)),
            config: Arc::new(config),
        })
    }

    fn take_all(&mut self, from: &PeerConfig) {
        for prefix in &from.allowed_ips {
            self.take(*prefix, from.id);
        }
    }

    fn take(&mut self, prefix: Prefix, from: PeerId) {
        let taken = self.routes.remove(prefix, from);
        self.moves += u64::from(taken && from != NOBODY);
    }

    fn give(&mut self, prefix: Prefix, to: PeerId) {
        let wider = self.routes.owner_of_wider(prefix);
        let before = self.routes.insert(prefix, to).or(wider);
        let moved = before.is_some_and(|before| before != to && before != NOBODY);
        self.moves += u64::from(moved);
    }

    /// A peer.
    pub(crate) fn get(&self, peer: PeerId) -> Option<&PeerEntry> {
        self.by_id.get(peer)
    }

    /// Every peer.
    pub(crate) fn peers(&self) -> impl Iterator<Item = &PeerEntry> {
        self.by_id.iter().map(|(_, entry)| entry)
    }

    /// Calls `each` for every id under which `before` has another peer, or another configuration of
    /// it, or none, or this table has none: with the older and the newer entry. Returns how many
    /// entries were looked at, which does not depend on how many peers there are.
    pub(crate) fn differences<'a>(
        &'a self,
        before: &'a PeerTable,
        each: impl FnMut(PeerId, Option<&'a PeerEntry>, Option<&'a PeerEntry>),
    ) -> usize {
        self.by_id.differences(&before.by_id, PeerEntry::is, each)
    }

    /// Whether an address may be another peer's than in `before`, or nobody's any more.
    pub(crate) fn moved_since(&self, before: &PeerTable) -> bool {
        self.moves != before.moves
    }

    /// The shard that owns a peer.
    pub(crate) fn owner(&self, peer: PeerId) -> Option<u8> {
        self.get(peer).map(|peer| peer.owner)
    }
}

/// Returns the shard that owns a peer: a hash of its key, for as long as the key lives.
///
/// Keys are uniform already; folding all of the key keeps a peer from choosing its shard cheaply.
pub(crate) fn owner_of(public_key: &[u8; 32], shards: usize) -> u8 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in public_key {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let shards = shards as u64;
    u8::try_from((hash >> 32) % shards).expect("SHARDS_MAX is below 256")
}

#[cfg(test)]
mod tests;
