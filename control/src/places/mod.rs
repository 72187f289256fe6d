//! Who may be connected to a server: places for connections, counted by where they come from and by
//! whose they are.
//!
//! Anybody can connect, so whoever comes is a stranger first, and holds one of few places
//! ([`Places::enter`]). There are so many for one network of a host ([`networks`]: /32 or /64), for
//! the wider one around it (/24 or /48: what one customer is given), and in all. Nobody is turned
//! away for want of one: the newest comer takes the place of the stranger that has been one for
//! longest, in the network that is full, or, when all are taken, in the network that holds most. So
//! whoever holds many places loses his own, and whoever is quick to say who he is gets through. A
//! connection from this machine has places of its own, of which nobody outside can take any.
//!
//! A stranger that has shown who it is ([`Places::settle`]) leaves its place to the next and holds one
//! of the many for those known, so many for one owner; the owner's oldest goes when there are more.
//! When those are all taken, the owner with most of them loses its oldest; if all have one, the
//! network that holds most does, since keys may cost nothing, so that who comes from few networks
//! keeps nobody else out. If that would be no less than the newcomer's own, or that one is full, the
//! newcomer stays a stranger. An owner that is forgotten becomes a stranger again
//! ([`Places::estrange`]).
//!
//! Who has lost its place is named to the driver, which ends the connection and says so
//! ([`Places::leave`]): until then it counts as leaving, and while [`LEAVING_MAX`] of those from outside
//! are, nobody enters from there; the same for those of this machine.
//!
//! Rooms: `network` says for which networks an address counts, `limit` how often one source may fail to
//! show a good auth key, and how often a thing is logged.

pub mod limit;
mod network;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

pub use network::networks;
use network::{is_local, is_wide};

/// Connections that have lost their place and not ended yet, from outside and from this machine each.
const LEAVING_MAX: usize = 64;

/// How many places there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// In all.
    pub all: usize,
    /// For one wide network, /24 or /48.
    pub wide: usize,
    /// For one narrow network, /32 or /64.
    pub narrow: usize,
}

impl Bounds {
    /// So many in all, from wherever.
    pub const fn of_all(all: usize) -> Self {
        Self {
            all,
            wide: usize::MAX,
            narrow: usize::MAX,
        }
    }
}

/// How many places there are for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// For strangers.
    pub strangers: Bounds,
    /// For strangers that connect from this machine.
    pub local: Bounds,
    /// For those who have shown who they are. Networks of this machine are not counted.
    pub known: Bounds,
    /// For one of them.
    pub owner: usize,
}

impl Limits {
    /// The same, but not over so many descriptors: those known get what they need, strangers no
    /// more than a quarter, those of this machine no more than an eighth.
    #[must_use]
    pub fn within(mut self, descriptors: usize) -> Self {
        self.strangers.all = self.strangers.all.min(descriptors / 4).max(1);
        self.local.all = self.local.all.min(descriptors / 8).max(1);
        let rest = descriptors.saturating_sub(self.strangers.all + self.local.all);
        self.known.all = self.known.all.min(rest).max(1);
        self
    }
}

/// Names a connection; later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PlaceId(u64);

/// A connection that came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entered {
    /// Its name.
    pub id: PlaceId,
    /// Whose place it took: to be ended.
    pub displaced: Option<PlaceId>,
}

/// What becomes of a stranger that has shown who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It is known. Whose place it took is to be ended.
    Known(Option<PlaceId>),
    /// There is no place: it stays a stranger.
    Full,
    /// It has lost its place already.
    Gone,
}

/// How many places are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// By strangers.
    pub strangers: usize,
    /// By strangers from this machine.
    pub local: usize,
    /// By those who are known.
    pub known: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Stranger,
    Local,
    Known,
}

/// Where a connection comes from.
#[derive(Clone, Copy, Debug)]
struct Origin {
    /// What it is as a stranger.
    class: Class,
    networks: [IpNet; 2],
}

/// See the module's text. `K` names an owner: a machine's or a node's key.
#[derive(Debug)]
pub struct Places<K> {
    limits: Limits,
    next: u64,
    strangers: BTreeMap<PlaceId, Origin>,
    known: BTreeMap<PlaceId, (K, Origin)>,
    owners: BTreeMap<K, BTreeSet<PlaceId>>,
    /// By what they were as strangers.
    leaving: BTreeMap<PlaceId, Class>,
    /// Strangers of this machine.
    local: usize,
    /// Places taken per class and network.
    networks: BTreeMap<(Class, IpNet), usize>,
}

impl<K: Copy + Ord> Places<K> {
    /// All places free.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            next: 0,
            strangers: BTreeMap::new(),
            known: BTreeMap::new(),
            owners: BTreeMap::new(),
            leaving: BTreeMap::new(),
            local: 0,
            networks: BTreeMap::new(),
        }
    }

    /// A connection comes from this address. None when too many of its kind that lost their place are
    /// still there.
    pub fn enter(&mut self, source: IpAddr) -> Option<Entered> {
        let local = source.to_canonical().is_loopback();
        let class = if local { Class::Local } else { Class::Stranger };
        if self.leaving.values().filter(|of| **of == class).count() >= LEAVING_MAX {
            return None;
        }
        let origin = Origin {
            class,
            networks: networks(source),
        };
        let displaced = self.in_the_way(origin);
        if let Some(id) = displaced {
            self.displace(id);
        }
        let id = PlaceId(self.next);
        self.next += 1;
        self.strangers.insert(id, origin);
        self.count(origin.class, origin.networks);
        Some(Entered { id, displaced })
    }

    /// A stranger has shown that it is `owner`.
    pub fn settle(&mut self, id: PlaceId, owner: K) -> Settled {
        if self.known.contains_key(&id) {
            return Settled::Known(None);
        }
        let Some(&origin) = self.strangers.get(&id) else {
            return Settled::Gone;
        };
        let own = self.owners.get(&owner);
        let displaced = match own.filter(|own| own.len() >= self.limits.owner) {
            Some(own) => own.first().copied(),
            None => {
                let bounds = self.limits.known;
                let taken = origin.networks.map(|net| self.taken_of(Class::Known, net));
                let crowded = taken[0] >= bounds.narrow || taken[1] >= bounds.wide;
                if crowded && origin.class != Class::Local {
                    return Settled::Full;
                }
                if self.known.len() < bounds.all {
                    None
                } else {
                    let most = self.owners.values().max_by_key(|own| own.len());
                    let most = most.filter(|own| own.len() > 1);
                    let oldest = most.and_then(|own| own.first().copied());
                    let gone = oldest.or_else(|| self.oldest_known_of_most(origin));
                    if gone.is_none() {
                        return Settled::Full;
                    }
                    gone
                }
            }
        };
        if let Some(id) = displaced {
            self.displace(id);
        }
        self.remove(id);
        self.known.insert(id, (owner, origin));
        self.owners.entry(owner).or_default().insert(id);
        self.count(Class::Known, origin.networks);
        Settled::Known(displaced)
    }

    /// Nobody knows this owner any more: these connections of his are strangers again.
    pub fn estrange(&mut self, owner: K) -> Vec<PlaceId> {
        let own = self.owners.get(&owner);
        let own: Vec<PlaceId> = own.into_iter().flatten().copied().collect();
        for id in &own {
            if let Some((_, origin)) = self.known.get(id).copied() {
                self.remove(*id);
                self.strangers.insert(*id, origin);
                self.count(origin.class, origin.networks);
            }
        }
        own
    }

    /// Descriptors have run out: the stranger that has to make room, if there is one.
    pub fn make_room(&mut self) -> Option<PlaceId> {
        let class = [Class::Stranger, Class::Local]
            .into_iter()
            .max_by_key(|class| self.taken(*class))?;
        let id = self.oldest_of_most(class, None)?;
        self.displace(id);
        Some(id)
    }

    /// A connection has ended, by itself or because it lost its place.
    pub fn leave(&mut self, id: PlaceId) {
        if self.leaving.remove(&id).is_none() {
            self.remove(id);
        }
    }

    /// How many places are taken.
    pub fn count_taken(&self) -> Taken {
        Taken {
            strangers: self.taken(Class::Stranger),
            local: self.taken(Class::Local),
            known: self.known.len(),
        }
    }

    /// Who has to go for one more stranger from these networks.
    fn in_the_way(&self, origin: Origin) -> Option<PlaceId> {
        let Origin { class, networks } = origin;
        let bounds = match class {
            Class::Local => self.limits.local,
            Class::Stranger | Class::Known => self.limits.strangers,
        };
        let [narrow, wide] = networks;
        if self.taken_of(class, narrow) >= bounds.narrow {
            self.oldest_in(class, narrow)
        } else if self.taken_of(class, wide) >= bounds.wide {
            self.oldest_of_most(class, Some(wide))
        } else if self.taken(class) >= bounds.all {
            self.oldest_of_most(class, None)
        } else {
            None
        }
    }

    fn oldest_in(&self, class: Class, network: IpNet) -> Option<PlaceId> {
        let mut of_class = self.of_class(class);
        of_class
            .find(|(_, origin)| origin.networks.contains(&network))
            .map(|(id, _)| id)
    }

    /// The oldest stranger of the narrow network that holds most: of those in this wide one, or in
    /// the wide one that holds most. It is the oldest of all when everybody has as many.
    fn oldest_of_most(&self, class: Class, within: Option<IpNet>) -> Option<PlaceId> {
        let of_class = self.of_class(class);
        let inside =
            of_class.filter(|(_, origin)| within.is_none_or(|net| net == origin.networks[1]));
        let weighed = inside.map(|(id, origin)| {
            let [narrow, wide] = origin.networks.map(|net| self.taken_of(class, net));
            (wide, narrow, std::cmp::Reverse(id))
        });
        weighed.max().map(|(_, _, std::cmp::Reverse(id))| id)
    }

    /// The oldest of those known in the narrow network that holds most, in the wide one that holds most:
    /// if it holds more than the newcomer's own will. So who comes back finds no place that he could not
    /// have had before, and nobody takes turns with anybody.
    fn oldest_known_of_most(&self, newcomer: Origin) -> Option<PlaceId> {
        let most = |within: Option<IpNet>| {
            let known = self.networks.iter().filter(|((class, network), _)| {
                // Of a /24 or /48, or of what is in the one that holds most.
                let fits = match within {
                    None => is_wide(network),
                    Some(wide) => !is_wide(network) && wide.contains(network),
                };
                *class == Class::Known && fits && !is_local(network)
            });
            let most = known.max_by_key(|(_, taken)| **taken);
            most.map(|((_, network), taken)| (*network, *taken))
        };
        let [narrow, wide] = newcomer.networks;
        let (crowd, in_crowd) = most(None)?;
        let (host, of_host) = most(Some(crowd))?;
        let (own, theirs) = if crowd == wide {
            (narrow, of_host)
        } else {
            (wide, in_crowd)
        };
        if self.taken_of(Class::Known, own) + 1 >= theirs {
            return None;
        }
        let mut known = self.known.iter();
        let oldest = known.find(|(_, (_, origin))| origin.networks[0] == host);
        oldest.map(|(id, _)| *id)
    }

    fn of_class(&self, class: Class) -> impl Iterator<Item = (PlaceId, Origin)> {
        let strangers = self.strangers.iter().map(|(id, origin)| (*id, *origin));
        strangers.filter(move |(_, origin)| origin.class == class)
    }

    fn displace(&mut self, id: PlaceId) {
        if let Some(origin) = self.remove(id) {
            self.leaving.insert(id, origin.class);
        }
    }

    fn remove(&mut self, id: PlaceId) -> Option<Origin> {
        if let Some(origin) = self.strangers.remove(&id) {
            self.discount(origin.class, origin.networks);
            return Some(origin);
        }
        let (owner, origin) = self.known.remove(&id)?;
        self.discount(Class::Known, origin.networks);
        if let Some(own) = self.owners.get_mut(&owner) {
            own.remove(&id);
            if own.is_empty() {
                self.owners.remove(&owner);
            }
        }
        Some(origin)
    }

    fn taken(&self, class: Class) -> usize {
        match class {
            Class::Stranger => self.strangers.len() - self.local,
            Class::Local => self.local,
            Class::Known => self.known.len(),
        }
    }

    fn taken_of(&self, class: Class, network: IpNet) -> usize {
        self.networks.get(&(class, network)).copied().unwrap_or(0)
    }

    fn count(&mut self, class: Class, networks: [IpNet; 2]) {
        self.local += usize::from(class == Class::Local);
        for network in networks {
            *self.networks.entry((class, network)).or_default() += 1;
        }
    }

    fn discount(&mut self, class: Class, networks: [IpNet; 2]) {
        self.local -= usize::from(class == Class::Local);
        for network in networks {
            if let Some(taken) = self.networks.get_mut(&(class, network)) {
                *taken -= 1;
                if *taken == 0 {
                    self.networks.remove(&(class, network));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
