#![forbid(unsafe_code)]
//! Allowed IPs: which peer an inner address belongs to (cryptokey routing, WireGuard paper §2).
//!
//! Outbound, the destination's owner gets the packet; inbound, the source's owner must be the
//! sender. One prefix belongs to one peer: giving it to another takes it from the first.

mod prefix_map;

use std::collections::HashMap;
use std::net::IpAddr;

use crate::channel::{PeerId, Prefix};
pub(crate) use prefix_map::Mixer;
pub use prefix_map::{PrefixMap, covers, masked};

/// The allowed-IPs table.
#[derive(Clone, Debug, Default)]
pub struct Table {
    owners: PrefixMap<PeerId>,
    peers: HashMap<u32, Held, Mixer>,
}

/// The prefixes of one peer.
#[derive(Clone, Debug, Default)]
struct Held {
    /// Every prefix given to the peer; those that went to another peer since stay until there are
    /// more of them than of the peer's own, so that moving one costs no search.
    given: Vec<Prefix>,
    /// How many of `given` are still the peer's.
    live: usize,
}

/// Stale entries a peer's list may always have.
const STALE_SLACK: usize = 16;

impl Table {
    /// A table of these peers' prefixes; of equal ones the last peer's counts.
    pub fn from_peers<'a>(peers: impl IntoIterator<Item = (PeerId, &'a [Prefix])>) -> Table {
        let mut table = Table::default();
        for (peer, prefixes) in peers {
            for prefix in prefixes {
                table.insert(*prefix, peer);
            }
        }
        table
    }

    /// Gives a prefix to a peer and returns the peer that had it.
    pub fn insert(&mut self, prefix: Prefix, peer: PeerId) -> Option<PeerId> {
        let prefix = masked(prefix);
        let before = self.owners.insert(prefix, peer);
        if before == Some(peer) {
            return before;
        }
        if let Some(before) = before {
            self.lost_one(before);
        }
        let held = self.peers.entry(peer.0).or_default();
        held.given.push(prefix);
        held.live += 1;
        // A prefix that left and came back may be listed twice; the bound counts that as stale.
        self.tidy(peer);
        before
    }

    /// Takes a prefix from a peer; false if it was not the peer's.
    pub fn remove(&mut self, prefix: Prefix, peer: PeerId) -> bool {
        let prefix = masked(prefix);
        if self.owners.get(prefix) != Some(peer) {
            return false;
        }
        self.owners.remove(prefix);
        self.lost_one(peer);
        true
    }

    /// Takes every prefix from a peer.
    pub fn remove_peer(&mut self, peer: PeerId) {
        let Some(held) = self.peers.remove(&peer.0) else {
            return;
        };
        for prefix in held.given {
            if self.owners.get(prefix) == Some(peer) {
                self.owners.remove(prefix);
            }
        }
    }

    /// The peer of the longest prefix that covers the address.
    #[inline]
    pub fn lookup(&self, addr: IpAddr) -> Option<PeerId> {
        self.owners.lookup(addr)
    }

    /// A peer's prefixes, in no particular order.
    pub fn prefixes(&self, peer: PeerId) -> Vec<Prefix> {
        let mut prefixes: Vec<Prefix> = match self.peers.get(&peer.0) {
            Some(held) => held.given.clone(),
            None => Vec::new(),
        };
        self.retain_owned(&mut prefixes, peer);
        prefixes
    }

    /// Number of prefixes.
    pub fn len(&self) -> usize {
        self.owners.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.owners.is_empty()
    }

    /// For one batch: remembers the last answer, since packets come in runs of one address.
    pub fn cursor(&self) -> Cursor<'_> {
        Cursor {
            table: self,
            last: None,
        }
    }

    fn lost_one(&mut self, peer: PeerId) {
        if let Some(held) = self.peers.get_mut(&peer.0) {
            held.live -= 1;
        }
        self.tidy(peer);
    }

    /// Drops stale entries of a peer's list when they outnumber the others.
    fn tidy(&mut self, peer: PeerId) {
        let Some(held) = self.peers.get_mut(&peer.0) else {
            return;
        };
        if held.given.len() <= held.live * 2 + STALE_SLACK {
            return;
        }
        let mut given = std::mem::take(&mut held.given);
        self.retain_owned(&mut given, peer);
        if let Some(held) = self.peers.get_mut(&peer.0) {
            held.given = given;
        }
    }

    /// Keeps what is the peer's, each once.
    fn retain_owned(&self, prefixes: &mut Vec<Prefix>, peer: PeerId) {
        prefixes.sort_unstable_by_key(|prefix| (prefix.addr, prefix.bits));
        prefixes.dedup();
        prefixes.retain(|prefix| self.owners.get(*prefix) == Some(peer));
    }
}

/// Lookups of one batch.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    table: &'a Table,
    last: Option<(IpAddr, Option<PeerId>)>,
}

impl Cursor<'_> {
    /// The same as [`Table::lookup`], at the price of a comparison for a repeated address.
    #[inline]
    pub fn lookup(&mut self, addr: IpAddr) -> Option<PeerId> {
        if let Some((last, peer)) = self.last
            && last == addr
        {
            return peer;
        }
        let peer = self.table.lookup(addr);
        self.last = Some((addr, peer));
        peer
    }
}

/// The peer of each destination of a batch, appended to `peers` in order; `None` has no route.
pub fn assign(
    table: &Table,
    destinations: impl IntoIterator<Item = IpAddr>,
    peers: &mut Vec<Option<PeerId>>,
) {
    let mut cursor = table.cursor();
    peers.extend(destinations.into_iter().map(|addr| cursor.lookup(addr)));
}
