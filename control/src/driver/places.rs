//! The connections of a server behind [`Places`]: who may come in, and who has to go.
//!
//! A server makes one [`Door`] and asks it for a [`Place`] for every connection it accepts
//! ([`Door::enter`]); none means: close it. The connection's task serves while neither
//! [`Place::displaced`] nor [`Place::outstayed`] is over, and drops the place with the socket. When
//! the other side has proven who it is, [`Place::becomes_known`]; when the owner is forgotten,
//! [`Door::estrange`]. Refused, displaced and held places are counted ([`Door::list`]).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;

use super::clock::{at, now};
use crate::places::{Limits, PlaceId, Places, Settled, Taken};

/// What a connection is to its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Stranger,
    Known,
    /// It has lost its place.
    Displaced,
}

/// Lets connections in; all tasks of a server share one.
#[derive(Debug)]
pub struct Door<K> {
    inner: Mutex<Inner<K>>,
    refused: AtomicU64,
    refused_known: AtomicU64,
    displaced: AtomicU64,
    no_descriptor: AtomicU64,
    talkative: AtomicU64,
}

#[derive(Debug)]
struct Inner<K> {
    places: Places<K>,
    standings: BTreeMap<PlaceId, watch::Sender<Standing>>,
}

/// A connection's place, held until it is dropped.
#[derive(Debug)]
pub struct Place<K: Copy + Ord> {
    id: PlaceId,
    door: Arc<Door<K>>,
    standing: watch::Receiver<Standing>,
}

impl<K: Copy + Ord> Door<K> {
    /// A door behind which all places are free.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                places: Places::new(limits),
                standings: BTreeMap::new(),
            }),
            refused: AtomicU64::new(0),
            refused_known: AtomicU64::new(0),
            displaced: AtomicU64::new(0),
            no_descriptor: AtomicU64::new(0),
            talkative: AtomicU64::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner<K>> {
        self.inner
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A place for a connection from this address, for which another may have to go. None: close it.
    pub fn enter(self: &Arc<Self>, source: IpAddr) -> Option<Place<K>> {
        let mut inner = self.lock();
        let Some(entered) = inner.places.enter(source) else {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        self.displace(&mut inner, entered.displaced);
        let (sender, standing) = watch::channel(Standing::Stranger);
        inner.standings.insert(entered.id, sender);
        Some(Place {
            id: entered.id,
            door: Arc::clone(self),
            standing,
        })
    }

    /// Nothing could be accepted because descriptors have run out: a stranger makes room.
    pub fn make_room(&self) {
        self.no_descriptor.fetch_add(1, Ordering::Relaxed);
        let mut inner = self.lock();
        let gone = inner.places.make_room();
        self.displace(&mut inner, gone);
    }

    /// This owner is known no more: his connections are strangers from now on.
    pub fn estrange(&self, owner: K) {
        let mut inner = self.lock();
        for id in inner.places.estrange(owner) {
            if let Some(standing) = inner.standings.get(&id) {
                standing.send_replace(Standing::Stranger);
            }
        }
    }

    fn displace(&self, inner: &mut Inner<K>, id: Option<PlaceId>) {
        if let Some(standing) = id.and_then(|id| inner.standings.get(&id)) {
            self.displaced.fetch_add(1, Ordering::Relaxed);
            standing.send_replace(Standing::Displaced);
        }
    }

    /// Names and values: counters since the start, then how many places are held.
    pub fn list(&self) -> [(&'static str, u64); 8] {
        let Taken {
            strangers,
            local,
            known,
        } = self.lock().places.count_taken();
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("refused_full", of(&self.refused)),
            ("refused_known_full", of(&self.refused_known)),
            ("displaced", of(&self.displaced)),
            ("no_descriptor", of(&self.no_descriptor)),
            ("strangers_talkative", of(&self.talkative)),
            ("gauge_strangers", strangers as u64),
            ("gauge_local_strangers", local as u64),
            ("gauge_known", known as u64),
        ]
    }
}

impl<K: Copy + Ord> Place<K> {
    /// The other side has shown that it is `owner`. False if there is no place for one more that is
    /// known: it stays what it is.
    pub fn becomes_known(&self, owner: K) -> bool {
        let mut inner = self.door.lock();
        match inner.places.settle(self.id, owner) {
            Settled::Known(gone) => {
                self.door.displace(&mut inner, gone);
                if let Some(standing) = inner.standings.get(&self.id) {
                    standing.send_if_modified(|standing| {
                        std::mem::replace(standing, Standing::Known) != Standing::Known
                    });
                }
                true
            }
            Settled::Full => {
                self.door.refused_known.fetch_add(1, Ordering::Relaxed);
                false
            }
            Settled::Gone => false,
        }
    }

    /// Whether it is known now.
    pub fn is_known(&self) -> bool {
        *self.standing.borrow() == Standing::Known
    }

    /// A stranger has sent more than strangers may.
    pub fn count_talkative(&self) {
        self.door.talkative.fetch_add(1, Ordering::Relaxed);
    }

    /// Over when another has taken the place.
    pub async fn displaced(&self) {
        let mut standing = self.standing.clone();
        // The sender lives in the door for as long as the place does.
        let _ = standing
            .wait_for(|standing| *standing == Standing::Displaced)
            .await;
    }

    /// Over when this has been a stranger's place for `limit` without a break.
    pub async fn outstayed(&self, limit: Duration) {
        let mut standing = self.standing.clone();
        loop {
            let until = now() + limit;
            tokio::select! {
                () = at(Some(until)) => return,
                _ = standing.wait_for(|standing| *standing == Standing::Known) => {}
            }
            let _ = standing
                .wait_for(|standing| *standing != Standing::Known)
                .await;
        }
    }
}

impl<K: Copy + Ord> Drop for Place<K> {
    fn drop(&mut self) {
        let mut inner = self.door.lock();
        inner.places.leave(self.id);
        inner.standings.remove(&self.id);
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

    async fn is_over(wait: impl Future<Output = ()>) -> bool {
        tokio::time::timeout(SOON, wait).await.is_ok()
    }

    #[tokio::test]
    async fn who_is_displaced_hears_of_it_and_who_is_known_is_not() {
        let door = door(1);
        let source = IpAddr::from([10, 0, 0, 1]);
        let first = door.enter(source).unwrap();
        assert!(!is_over(first.displaced()).await);
        let second = door.enter(source).unwrap();
        assert!(is_over(first.displaced()).await);
        assert!(second.becomes_known(1) && second.is_known());
        let third = door.enter(source).unwrap();
        assert!(!is_over(second.displaced()).await);
        assert!(!first.becomes_known(1), "its place is gone");
        assert!(third.becomes_known(1));
        assert!(is_over(second.displaced()).await, "one for each owner");
        drop((first, second));
        let list: BTreeMap<_, _> = door.list().into();
        assert_eq!((list["displaced"], list["gauge_known"]), (2, 1));
        drop(third);
        assert!(door.lock().standings.is_empty());
    }

    #[tokio::test]
    async fn only_a_stranger_outstays_his_time_also_one_that_was_known() {
        let door = door(8);
        let place = door.enter(IpAddr::from([10, 0, 0, 1])).unwrap();
        assert!(is_over(place.outstayed(SOON / 10)).await);
        let wait = place.outstayed(SOON / 10);
        assert!(place.becomes_known(1));
        let mut wait = std::pin::pin!(wait);
        assert!(!is_over(&mut wait).await);
        door.estrange(1);
        assert!(!place.is_known());
        assert!(is_over(wait).await);
    }
}
