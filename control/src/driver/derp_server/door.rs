//! Who is connected: places, what each connection holds, and how one is ended from outside.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::Notify;

use super::Shared;
use super::registry::Client;
use crate::derp::budget::{self, Account, Budget, FLOOR};
use crate::key::NodePublic;
use crate::places::{Bounds, Limits, PlaceId, Places, Settled, Taken};

/// Connections of strangers, who have not said who they are: in all, for one /24 or /48, and for one
/// /32 or /64. A whole office may come back at once when a relay was restarted.
const STRANGERS: Bounds = Bounds {
    all: 2048,
    wide: 512,
    narrow: 256,
};

/// Connections of one key. A node that comes back leaves its old one behind for a while.
const OWNER_MAX: usize = 8;

/// Why a connection is ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// Somebody else needs the place.
    Displaced,
    /// It holds more than there is for everybody.
    Memory,
    /// The verifier does not know its key any more.
    Removed,
}

/// How a connection hears that it is to end.
#[derive(Debug, Default)]
pub(super) struct Ending {
    why: OnceLock<Why>,
    told: Notify,
}

impl Ending {
    fn end(&self, why: Why) {
        let _ = self.why.set(why);
        self.told.notify_one();
    }

    /// Waits until it is told to.
    pub(super) async fn told(&self) -> Why {
        loop {
            self.told.notified().await;
            if let Some(why) = self.why.get() {
                return *why;
            }
        }
    }
}

/// Everybody who is connected.
#[derive(Debug)]
pub(super) struct Doors {
    budget: Arc<Budget>,
    inside: Mutex<Inside>,
}

#[derive(Debug)]
struct Inside {
    places: Places<NodePublic>,
    connections: BTreeMap<PlaceId, Connection>,
}

#[derive(Clone, Debug)]
struct Connection {
    from: SocketAddr,
    ending: Arc<Ending>,
    account: Arc<Account>,
    /// Once it is known whose it is.
    client: Option<Arc<Client>>,
}

/// A connection's place, left when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    shared: Arc<Shared>,
    id: PlaceId,
    pub(super) ending: Arc<Ending>,
    pub(super) account: Arc<Account>,
}

impl Doors {
    /// So many connections of clients, within so many descriptors, and so many bytes for all.
    pub(super) fn new(connections_max: usize, descriptors: usize, memory_max: usize) -> Self {
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
        Self {
            budget: Arc::new(Budget::new(memory_max)),
            inside: Mutex::new(Inside {
                places: Places::new(limits),
                connections: BTreeMap::new(),
            }),
        }
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many places are taken, and how many bytes are held.
    pub(super) fn count(&self) -> (Taken, usize) {
        (self.inside().places.count_taken(), self.budget.used())
    }

    /// Ends somebody who has not said who he is, because there are no descriptors.
    pub(super) fn make_room(&self) -> bool {
        let mut inside = self.inside();
        let id = inside.places.make_room();
        inside.end(id, Why::Displaced);
        id.is_some()
    }

    /// Whose connections there are, and from where: each key once.
    pub(super) fn keys(&self) -> BTreeMap<NodePublic, SocketAddr> {
        let inside = self.inside();
        let clients = inside.connections.values();
        clients
            .filter_map(|one| Some((*one.client.as_ref()?.slot.key(), one.from)))
            .collect()
    }

    /// Ends the connections of a key; how many.
    pub(super) fn remove(&self, key: &NodePublic) -> usize {
        let inside = self.inside();
        let of_key = inside.connections.values().filter(|one| {
            let client = one.client.as_ref();
            client.is_some_and(|client| client.slot.key() == key)
        });
        of_key.map(|one| one.ending.end(Why::Removed)).count()
    }

    /// When memory is short, takes from whoever holds most: what waits for him, oldest first, and if he
    /// holds too much all the same, his connection.
    pub(super) fn relieve(&self, shared: &Shared) {
        if !self.budget.is_short() {
            return;
        }
        let all: Vec<Connection> = self.inside().connections.values().cloned().collect();
        let used: Vec<_> = all
            .iter()
            .map(|one| (one.account.network(), one.account.used()))
            .collect();
        let keep = budget::levels(&used, self.budget.relaxed());
        for (one, keep) in all.iter().zip(keep) {
            let keep = keep.max(FLOOR);
            if let Some(client) = &one.client {
                client.shed(keep, &shared.counters);
            }
            if one.account.used() > keep {
                one.ending.end(Why::Memory);
            }
        }
    }
}

impl Inside {
    fn end(&self, id: Option<PlaceId>, why: Why) {
        if let Some(one) = id.and_then(|id| self.connections.get(&id)) {
            one.ending.end(why);
        }
    }
}

impl Place {
    /// A connection comes in. None when there is no place.
    pub(super) fn enter(shared: &Arc<Shared>, from: SocketAddr) -> Option<Self> {
        let doors = &shared.doors;
        let mut inside = doors.inside();
        let entered = inside.places.enter(from.ip())?;
        inside.end(entered.displaced, Why::Displaced);
        let connection = Connection {
            from,
            ending: Arc::default(),
            account: Arc::new(doors.budget.account(from.ip())),
            client: None,
        };
        let place = Self {
            shared: Arc::clone(shared),
            id: entered.id,
            ending: Arc::clone(&connection.ending),
            account: Arc::clone(&connection.account),
        };
        inside.connections.insert(entered.id, connection);
        Some(place)
    }

    /// Whose it is has been shown. False if there is no place for him.
    pub(super) fn settle(&self, key: NodePublic) -> bool {
        let mut inside = self.shared.doors.inside();
        match inside.places.settle(self.id, key) {
            Settled::Known(displaced) => {
                inside.end(displaced, Why::Displaced);
                true
            }
            Settled::Full => false,
            // It is told so.
            Settled::Gone => true,
        }
    }

    /// The client it has become.
    pub(super) fn holds(&self, client: &Arc<Client>) {
        let mut inside = self.shared.doors.inside();
        if let Some(one) = inside.connections.get_mut(&self.id) {
            one.client = Some(Arc::clone(client));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inside = self.shared.doors.inside();
        inside.places.leave(self.id);
        let gone = inside.connections.remove(&self.id);
        drop(inside);
        drop(gone);
    }
}

/// Counts why a connection was ended.
pub(super) fn tell(shared: &Shared, from: SocketAddr, why: Why) {
    let counters = &shared.counters;
    let (counter, text) = match why {
        Why::Displaced => (&counters.accepts_refused, "a place was needed"),
        Why::Memory => (&counters.memory_cuts, "it held too much memory"),
        Why::Removed => (&counters.verify_removed, "the verifier refuses it now"),
    };
    counter.add(1);
    tracing::debug!(%from, "client ended: {text}");
}
