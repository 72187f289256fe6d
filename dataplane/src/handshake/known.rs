//! Whom the handshake thread knows by address: the peers that were heard from lately.
//!
//! While there is pressure the list is made anew every second. What comes from an address of it gets a
//! socket of its own (`udp/steer.rs`), so that a flood from elsewhere does not stand before it, and a
//! few messages of each are taken without a proof. Addresses can be made up: one that more comes from
//! than a peer sends loses the socket for as long as that goes on, and costs the others nothing. Its
//! peer cannot come through then; where its keys grow old, we go to it: the response to our initiation
//! is awaited, and passes.

#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::hub::Hub;
use crate::peer::table::PeerTable;
use crate::types::PeerId;

/// A peer is known for so long after something authentic came from it: until the keys are too old, and
/// its initiations have been repeated as long as they are.
const KNOWN_FOR: Duration = Duration::from_secs(300);
/// How often the list is made anew under pressure.
const REFRESH: Duration = Duration::from_secs(1);
/// Messages above its share between two lists after which an address is taken for made up.
const PRESSED_MAX: u32 = 50;
/// Age of the keys at which we go to a peer that cannot come to us, and how often.
const GO_AFTER: Duration = Duration::from_secs(120);
const GO_EVERY: Duration = Duration::from_secs(5);

struct Known {
    peer: PeerId,
    owner: u8,
    handshake: Option<Instant>,
    went: Option<Instant>,
}

/// What a peer costs in the list at worst, where every other place is free.
#[cfg(test)]
pub(crate) const KNOWN_COST: usize = 2
    * (size_of::<(SocketAddr, Known)>() + 1 + size_of::<(IpAddr, u32)>() + 1)
    + size_of::<IpAddr>();

/// The list.
#[derive(Default)]
pub(super) struct KnownAddresses {
    by_address: HashMap<SocketAddr, Known>,
    pressed: HashMap<IpAddr, u32>,
    made: Option<Instant>,
    /// The addresses that the sockets were told of.
    shown: BTreeSet<IpAddr>,
}

impl KnownAddresses {
    /// Whether a peer was heard from this address lately.
    pub(super) fn contains(&self, from: SocketAddr) -> bool {
        self.by_address.contains_key(&from)
    }

    /// The sockets are others, and were told of nothing yet.
    pub(super) fn forget_shown(&mut self) {
        self.shown.clear();
        self.made = None;
    }

    /// Makes the list anew if it is time; returns the addresses that deserve a socket of their own, if
    /// they are others than before.
    pub(super) fn refresh(
        &mut self,
        now: Instant,
        epoch: Instant,
        table: &PeerTable,
    ) -> Option<&BTreeSet<IpAddr>> {
        let since = self.made.map(|made| now.saturating_duration_since(made));
        if since.is_some_and(|since| since < REFRESH) {
            return None;
        }
        self.made = Some(now);
        let before = std::mem::take(&mut self.by_address);
        for entry in table.peers() {
            let activity = entry.shared.activity.snapshot(epoch);
            let lately = |heard: Instant| now.saturating_duration_since(heard) < KNOWN_FOR;
            if !activity.last_received.is_some_and(lately) {
                continue;
            }
            if let Some(from) = entry.shared.heard_from() {
                let known = Known {
                    peer: entry.config.id,
                    owner: entry.owner,
                    handshake: activity.last_handshake,
                    went: before.get(&from).and_then(|known| known.went),
                };
                self.by_address.insert(from, known);
            }
        }
        let pressed = std::mem::take(&mut self.pressed);
        let made_up = |ip: &IpAddr| pressed.get(ip).is_some_and(|&count| count > PRESSED_MAX);
        let addresses = self.by_address.keys().map(SocketAddr::ip);
        let show: BTreeSet<IpAddr> = addresses.filter(|ip| !made_up(ip)).collect();
        if show == self.shown {
            return None;
        }
        self.shown = show;
        Some(&self.shown)
    }

    /// More comes from a known address than a peer sends. Goes to that peer if need be.
    pub(super) fn pressed(&mut self, now: Instant, hub: &Hub, from: SocketAddr) {
        let Some(known) = self.by_address.get_mut(&from) else {
            return;
        };
        *self.pressed.entry(from.ip()).or_default() += 1;
        let over = |at: Option<Instant>, span| {
            at.is_none_or(|at| now.saturating_duration_since(at) >= span)
        };
        if over(known.handshake, GO_AFTER) && over(known.went, GO_EVERY) {
            known.went = Some(now);
            let peer = known.peer;
            // A full queue means that much is asked for already; the next message asks again.
            let _told = hub.tell(known.owner, |inbox| inbox.asks.push(peer).is_ok());
        }
    }
}
