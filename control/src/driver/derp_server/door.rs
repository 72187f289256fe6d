//! The relay's door: how many connections there may be, what is kept of each, and how memory or the
//! verifier ends one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use super::Shared;
use super::registry::Client;
use crate::derp::budget::{self, Account, FLOOR};
use crate::driver::places::{self, Why};
use crate::key::NodePublic;
use crate::places::{Bounds, Limits};

/// Connections of strangers, who have not said who they are: in all, for one /24 or /48, and for one
/// /32 or /64. A whole office may come back at once when a relay was restarted.
const STRANGERS: Bounds = Bounds {
    all: 2048,
    wide: 512,
    narrow: 256,
};

/// Connections of one key. A node that comes back leaves its old one behind for a while.
const OWNER_MAX: usize = 8;

pub(super) type Door = places::Door<NodePublic, Arc<Connection>>;
pub(super) type Place = places::Place<NodePublic, Arc<Connection>>;

/// What is kept of a connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) from: SocketAddr,
    pub(super) account: Arc<Account>,
    /// Once it is known whose it is.
    pub(super) client: OnceLock<Arc<Client>>,
}

impl Connection {
    fn key(&self) -> Option<&NodePublic> {
        Some(self.client.get()?.slot.key())
    }
}

/// So many connections of clients, within so many descriptors.
pub(super) fn limits(connections_max: usize, descriptors: usize) -> Limits {
    let limits = Limits {
        strangers: Bounds {
            all: STRANGERS.all.min(connections_max),
            ..STRANGERS
        },
        local: Bounds::of_all(STRANGERS.all.min(connections_max)),
        known: Bounds {
            all: connections_max,
            wide: (connections_max / 2).max(STRANGERS.narrow),
            narrow: (connections_max / 4).max(STRANGERS.narrow),
        },
        owner: OWNER_MAX,
    }
    .within(descriptors);
    if limits.known.all < connections_max {
        let most = limits.known.all;
        tracing::warn!("no more than {most} clients: the limit of open files allows no more");
    }
    limits
}

impl Shared {
    /// A connection comes in. None when there is no place.
    pub(super) fn enter(&self, from: SocketAddr) -> Option<Place> {
        self.door.enter(from.ip(), || {
            Arc::new(Connection {
                from,
                account: Arc::new(self.budget.account(from.ip())),
                client: OnceLock::new(),
            })
        })
    }

    /// Whose connections there are, and from where: each key once.
    pub(super) fn connected(&self) -> BTreeMap<NodePublic, SocketAddr> {
        let all = self.door.all().into_iter();
        all.filter_map(|(_, one)| Some((*one.key()?, one.from)))
            .collect()
    }

    /// Ends the connections of a key.
    pub(super) fn remove(&self, key: &NodePublic) {
        self.door
            .end_those(Why::Removed, |one| one.key() == Some(key));
    }

    /// When memory is short, takes from whoever holds most: what waits for him, oldest first, and if he
    /// holds too much all the same, his connection.
    pub(super) fn relieve(&self) {
        if !self.budget.is_short() {
            return;
        }
        let all = self.door.all();
        let used: Vec<_> = all
            .iter()
            .map(|(_, one)| (one.account.network(), one.account.used()))
            .collect();
        let keep = budget::levels(&used, self.budget.relaxed());
        for ((id, one), keep) in all.iter().zip(keep) {
            let keep = keep.max(FLOOR);
            if let Some(client) = one.client.get() {
                client.shed(keep, &self.counters);
            }
            if one.account.used() > keep {
                self.door.end(*id, Why::Memory);
            }
        }
    }

    /// Counts why a connection was ended.
    pub(super) fn tell(&self, from: SocketAddr, why: Why) {
        let text = match why {
            // The door has counted it.
            Why::Displaced => "a place was needed",
            Why::Memory => {
                self.counters.memory_cuts.add(1);
                "it held too much memory"
            }
            Why::Removed => {
                self.counters.verify_removed.add(1);
                "the verifier refuses it now"
            }
        };
        tracing::debug!(%from, "client ended: {text}");
    }
}
