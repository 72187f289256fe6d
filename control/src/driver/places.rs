//! The connections of a server behind [`Places`]: who may come in, who has to go, and what is kept of
//! each.
//!
//! A server makes one [`Door`] and asks it for a [`Place`] for every connection it accepts
//! ([`Door::enter`]); none means: close it. The connection's task serves while neither [`Place::ended`]
//! nor, if strangers have a time limit, [`Place::outstayed`] is over, and drops the place with the
//! socket. When the other side has proven who it is, [`Place::settle`]; when the owner is forgotten,
//! [`Door::estrange`]. What is kept of a connection (`T`, an `Arc`: the door has a clone) is the server's
//! own. Why one is ended is a [`Why`]: the door itself only displaces, the other reasons are the relay's
//! ([`Door::end`]).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::clock::{at, now};
use super::counters::{self, counters};
use crate::places::{Limits, PlaceId, Places, Settled, Taken};

/// Why a connection is ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Somebody else needs the place.
    Displaced,
    /// It holds more memory than there is for everybody.
    Memory,
    /// Its owner may not be served any more.
    Removed,
}

/// What a connection is to its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Stranger,
    /// A stranger that may stay until then.
    Waiting(Instant),
    Known,
    Ended(Why),
}

counters! {
    /// Who was turned away, and who had to go.
    pub(super) struct Counters(counters::Shared) {
        /// Connections for which there was no place.
        refused_full,
        /// Connections for which there was no place when it was known whose they are.
        refused_known_full,
        /// Connections that lost their place.
        displaced,
        /// Times descriptors ran out.
        no_descriptor,
        /// Strangers that sent more than they may.
        strangers_talkative,
    }
}

/// Lets connections in; all tasks of a server share one.
#[derive(Debug)]
pub struct Door<K, T = ()> {
    inner: Mutex<Inner<K, T>>,
    pub(super) counters: Counters,
}

#[derive(Debug)]
struct Inner<K, T> {
    places: Places<K>,
    connections: BTreeMap<PlaceId, (watch::Sender<Standing>, T)>,
}

/// A connection's place, held until it is dropped.
#[derive(Debug)]
pub struct Place<K: Copy + Ord, T = ()> {
    id: PlaceId,
    door: Arc<Door<K, T>>,
    standing: watch::Receiver<Standing>,
    pub(super) kept: T,
}

impl<K: Copy + Ord, T: Clone> Door<K, T> {
    /// A door behind which all places are free.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                places: Places::new(limits),
                connections: BTreeMap::new(),
            }),
            counters: Counters::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner<K, T>> {
        super::lock(&self.inner)
    }

    /// A place for a connection from this address, for which another may have to go. None: close it. What
    /// is kept is made once there is a place: who is refused costs no more.
    pub fn enter(
        self: &Arc<Self>,
        source: IpAddr,
        keep: impl FnOnce() -> T,
    ) -> Option<Place<K, T>> {
        let mut inner = self.lock();
        let Some(entered) = inner.places.enter(source) else {
            self.counters.refused_full.add(1);
            return None;
        };
        self.displace(&inner, entered.displaced);
        let (sender, standing) = watch::channel(Standing::Stranger);
        let kept = keep();
        inner.connections.insert(entered.id, (sender, kept.clone()));
        Some(Place {
            id: entered.id,
            door: Arc::clone(self),
            standing,
            kept,
        })
    }

    /// Nothing could be accepted because descriptors have run out: a stranger makes room.
    pub fn make_room(&self) {
        self.counters.no_descriptor.add(1);
        let mut inner = self.lock();
        let gone = inner.places.make_room();
        self.displace(&inner, gone);
    }

    /// This owner is known no more: his connections are strangers from now on.
    pub fn estrange(&self, owner: K) {
        let mut inner = self.lock();
        for id in inner.places.estrange(owner) {
            inner.set_standing(id, Standing::Stranger);
        }
    }

    /// Ends a connection, if it is still there.
    pub fn end(&self, id: PlaceId, why: Why) {
        self.lock().set_standing(id, Standing::Ended(why));
    }

    fn displace(&self, inner: &Inner<K, T>, id: Option<PlaceId>) {
        if let Some(id) = id
            && inner.set_standing(id, Standing::Ended(Why::Displaced))
        {
            self.counters.displaced.add(1);
        }
    }

    /// Ends every connection of which this is true.
    pub fn end_those(&self, why: Why, which: impl Fn(&T) -> bool) {
        let inner = self.lock();
        for (id, (_, kept)) in &inner.connections {
            if which(kept) {
                inner.set_standing(*id, Standing::Ended(why));
            }
        }
    }

    /// Everybody who is connected, and what is kept of each.
    pub fn all(&self) -> Vec<(PlaceId, T)> {
        let inner = self.lock();
        let kept = inner.connections.iter();
        kept.map(|(id, (_, kept))| (*id, kept.clone())).collect()
    }

    /// How many places are taken.
    pub fn taken(&self) -> Taken {
        self.lock().places.count_taken()
    }

    /// Names and values: counters since the start, then how many places are held.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let taken = self.taken();
        let mut list = self.counters.snapshot();
        list.extend([
            ("gauge_strangers", taken.strangers as u64),
            ("gauge_local_strangers", taken.local as u64),
            ("gauge_known", taken.known as u64),
        ]);
        list
    }
}

impl<K, T> Inner<K, T> {
    /// Tells a connection's task; that it is to end is told once. Whether that was news.
    fn set_standing(&self, id: PlaceId, now: Standing) -> bool {
        let Some((standing, _)) = self.connections.get(&id) else {
            return false;
        };
        standing.send_if_modified(|before| {
            let changes = *before != now && !matches!(before, Standing::Ended(_));
            if changes {
                *before = now;
            }
            changes
        })
    }
}

impl<K: Copy + Ord, T: Clone> Place<K, T> {
    /// The other side has shown that it is `owner`. Where there is no place for one more that is known,
    /// it stays what it is.
    pub fn settle(&self, owner: K) -> Settled {
        let mut inner = self.door.lock();
        let settled = inner.places.settle(self.id, owner);
        match settled {
            Settled::Known(gone) => {
                self.door.displace(&inner, gone);
                inner.set_standing(self.id, Standing::Known);
            }
            Settled::Full => self.door.counters.refused_known_full.add(1),
            Settled::Gone => {}
        }
        settled
    }

    /// Whether it is known now.
    pub fn is_known(&self) -> bool {
        *self.standing.borrow() == Standing::Known
    }

    /// A stranger has sent more than strangers may.
    pub fn count_talkative(&self) {
        self.door.counters.strangers_talkative.add(1);
    }

    /// Over when the connection is to be ended.
    pub async fn ended(&self) -> Why {
        let mut standing = self.standing.clone();
        loop {
            if let Standing::Ended(why) = *standing.borrow_and_update() {
                return why;
            }
            let changed = standing.changed().await;
            changed.expect("the sender lives in the door for as long as the place does");
        }
    }

    /// A stranger is expected to have nothing to say before this time: it may stay for so long.
    pub fn wait_until(&self, until: Instant) {
        if !self.is_known() {
            self.door
                .lock()
                .set_standing(self.id, Standing::Waiting(until));
        }
    }

    /// Over when this has been a stranger's place for `limit` without a break, or for as long as it may
    /// wait.
    pub async fn outstayed(&self, limit: Duration) {
        let mut standing = self.standing.clone();
        let mut since = now();
        loop {
            let now_is = *standing.borrow_and_update();
            let until = match now_is {
                Standing::Stranger | Standing::Ended(_) => Some(since + limit),
                Standing::Waiting(until) => Some(until),
                Standing::Known => None,
            };
            tokio::select! {
                () = at(until) => return,
                changed = standing.changed() => {
                    changed.expect("the sender lives in the door for as long as the place does");
                }
            }
            if now_is == Standing::Known {
                since = now();
            }
        }
    }
}

impl<K: Copy + Ord, T> Drop for Place<K, T> {
    fn drop(&mut self) {
        let mut inner = super::lock(&self.door.inner);
        inner.places.leave(self.id);
        // The place has the last clone: what is kept is dropped after this, not under the lock.
        inner.connections.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::places::Bounds;

    const SOON: Duration = Duration::from_millis(50);

    fn door(narrow: usize) -> Arc<Door<u8>> {
        let strangers = Bounds {
            all: 8,
            wide: 8,
            narrow,
        };
        Door::new(Limits {
            strangers,
            local: strangers,
            known: Bounds::of_all(8),
            owner: 1,
        })
    }

    fn becomes_known(place: &Place<u8>, owner: u8) -> bool {
        matches!(place.settle(owner), Settled::Known(_))
    }

    async fn is_over<T>(wait: impl Future<Output = T>) -> bool {
        tokio::time::timeout(SOON, wait).await.is_ok()
    }

    #[tokio::test]
    async fn who_is_displaced_hears_of_it_and_who_is_known_is_not() {
        let door = door(1);
        let source = IpAddr::from([10, 0, 0, 1]);
        let first = door.enter(source, || ()).unwrap();
        assert!(!is_over(first.ended()).await);
        let second = door.enter(source, || ()).unwrap();
        assert!(is_over(first.ended()).await);
        assert!(becomes_known(&second, 1) && second.is_known());
        let third = door.enter(source, || ()).unwrap();
        assert!(!is_over(second.ended()).await);
        assert!(!becomes_known(&first, 1), "its place is gone");
        assert!(becomes_known(&third, 1));
        assert!(is_over(second.ended()).await, "one for each owner");
        drop((first, second));
        let list: BTreeMap<_, _> = door.list().into_iter().collect();
        assert_eq!((list["displaced"], list["gauge_known"]), (2, 1));
        drop(third);
        assert!(door.lock().connections.is_empty());
    }

    #[test]
    fn nothing_is_made_for_who_is_refused() {
        let door = door(1);
        let made = std::cell::Cell::new(0);
        let comes = || door.enter([10, 0, 0, 1].into(), || made.set(made.get() + 1));
        let inside: Vec<_> = std::iter::from_fn(comes).collect();
        assert_eq!(
            (made.get(), door.counters.refused_full.get()),
            (inside.len(), 1)
        );
    }

    #[tokio::test]
    async fn who_was_to_end_already_is_counted_for_that_alone() {
        let door = door(1);
        let source = IpAddr::from([10, 0, 0, 1]);
        let first = door.enter(source, || ()).unwrap();
        door.end(first.id, Why::Memory);
        let _second = door.enter(source, || ()).unwrap();
        assert_eq!(first.ended().await, Why::Memory);
        assert_eq!(door.counters.displaced.get(), 0);
        let _third = door.enter(source, || ()).unwrap();
        assert_eq!(door.counters.displaced.get(), 1);
    }

    #[tokio::test]
    async fn only_a_stranger_outstays_his_time_also_one_that_was_known() {
        let door = door(8);
        let place = door.enter(IpAddr::from([10, 0, 0, 1]), || ()).unwrap();
        assert!(is_over(place.outstayed(SOON / 10)).await);
        let wait = place.outstayed(SOON / 10);
        assert!(becomes_known(&place, 1));
        let mut wait = std::pin::pin!(wait);
        assert!(!is_over(&mut wait).await);
        door.estrange(1);
        assert!(!place.is_known());
        assert!(is_over(wait).await);
    }
}
