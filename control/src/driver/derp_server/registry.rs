//! Who is connected, and what waits for whom.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use tokio::sync::Notify;

use super::{CONTROL_QUEUE_BYTES, Counters, DATA_QUEUE_BYTES, DISCO_QUEUE_BYTES};
use crate::derp::DUPLICATE;
use crate::derp::budget::{Account, Part};
use crate::derp::frame::{self, FrameType, PeerGoneReason};
use crate::derp::queue::{Chunk, Dropped, FrameQueue};
use crate::driver::lock;
use crate::key::NodePublic;

/// So often connections of one key have taken turns in writing when two machines use the key: a
/// client that reconnects leaves its old connection with a few writes at most. Then they are told.
const TURNS: u64 = 8;

/// Receivers remembered per sending key, so that they hear when it leaves,
const DELIVERED_MAX: usize = 16 << 10;
/// and the memory that each takes, about.
const DELIVERED_BYTES: usize = 64;

/// All connected keys.
#[derive(Debug, Default)]
pub(super) struct Registry {
    keys: RwLock<HashMap<NodePublic, Arc<Slot>>>,
    next_id: AtomicU64,
}

/// One key. Several connections may share it; the one that last wrote gets the traffic.
#[derive(Debug)]
pub(super) struct Slot {
    key: NodePublic,
    active: AtomicU64,
    /// How often another connection became active by writing, while there were several.
    turns: AtomicU64,
    members: Mutex<Vec<Arc<Client>>>,
    /// Connections that got something from this key.
    delivered: Mutex<Delivered>,
    /// For those.
    account: Account,
}

#[derive(Debug, Default)]
struct Delivered {
    to: BTreeMap<u64, Weak<Client>>,
    /// Receivers that came since those who are gone were forgotten last.
    since: usize,
    charged: Part,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) id: u64,
    pub(super) slot: Arc<Slot>,
    outbox: Mutex<Outbox>,
    account: Arc<Account>,
    pub(super) wake: Notify,
}

/// What waits for one connection.
#[derive(Debug)]
pub(super) struct Outbox {
    pub(super) data: FrameQueue,
    pub(super) disco: FrameQueue,
    /// PeerGone and Health frames.
    pub(super) control: Vec<u8>,
    charged: Part,
    closed: bool,
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.data.is_empty() && self.disco.is_empty() && self.control.is_empty()
    }

    fn held_bytes(&self) -> usize {
        self.data.held_bytes() + self.disco.held_bytes() + self.control.capacity()
    }

    /// Charges the client's account with what waits now.
    pub(super) fn charge(&mut self, account: &Account) {
        let held = self.held_bytes();
        account.charge(&mut self.charged, held);
    }

    /// Drops what waits, oldest first and data before DISCO, until it takes `over` bytes less.
    fn shed(&mut self, over: usize, counters: &Counters) {
        let target = self.held_bytes().saturating_sub(over);
        let rest = self.held_bytes() - self.data.held_bytes();
        let data = self.data.shed(target.saturating_sub(rest));
        let rest = self.held_bytes() - self.disco.held_bytes();
        let disco = self.disco.shed(target.saturating_sub(rest));
        counters.dropped_memory.add(data.frames + disco.frames);
    }
}

/// Which queue a run belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Data,
    Disco,
}

impl Registry {
    pub(super) fn keys_count(&self) -> usize {
        self.keys
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Adds a connection, which becomes its key's active one.
    pub(super) fn register(
        &self,
        key: NodePublic,
        account: Arc<Account>,
        counters: &Counters,
    ) -> Arc<Client> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed) + 1;
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        let slot = keys.entry(key).or_insert_with(|| {
            Arc::new(Slot {
                key,
                active: AtomicU64::new(id),
                turns: AtomicU64::new(0),
                members: Mutex::default(),
                delivered: Mutex::default(),
                account: account.sibling(),
            })
        });
        let client = Arc::new(Client {
            id,
            slot: slot.clone(),
            outbox: Mutex::new(Outbox {
                data: FrameQueue::lean(DATA_QUEUE_BYTES),
                disco: FrameQueue::lean(DISCO_QUEUE_BYTES),
                control: Vec::new(),
                charged: Part::default(),
                closed: false,
            }),
            account,
            wake: Notify::new(),
        });
        let mut members = lock(&slot.members);
        counters.clients.add(1);
        counters
            .duplicate_clients
            .add(u64::from(!members.is_empty()));
        members.push(client.clone());
        slot.active.store(id, Ordering::Relaxed);
        drop(members);
        client
    }

    /// Removes a connection. When it was its key's last, everybody who heard from the key is told.
    pub(super) fn unregister(&self, client: &Arc<Client>, counters: &Counters) {
        let slot = &client.slot;
        {
            let mut outbox = lock(&client.outbox);
            outbox.closed = true;
            let left = outbox.data.clear().frames + outbox.disco.clear().frames;
            outbox.control = Vec::new();
            outbox.charge(&client.account);
            counters.dropped_gone_disconnected.add(left);
        }
        let last = {
            let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
            let mut members = lock(&slot.members);
            members.retain(|member| member.id != client.id);
            if let [only] = &members[..]
                && slot.turns.swap(0, Ordering::Relaxed) >= TURNS
            {
                only.tell_health("");
            }
            if let Some(newest) = members.last() {
                let active = slot.active.load(Ordering::Relaxed);
                if active == client.id {
                    slot.active.store(newest.id, Ordering::Relaxed);
                }
                false
            } else {
                keys.remove(&slot.key);
                true
            }
        };
        if last {
            let delivered = std::mem::take(&mut lock(&slot.delivered).to);
            for receiver in delivered.values().filter_map(Weak::upgrade) {
                receiver.tell_gone(&slot.key, PeerGoneReason::Disconnected, counters);
            }
        }
    }

    /// The connection that gets a key's traffic.
    pub(super) fn find(&self, key: &NodePublic) -> Option<Arc<Client>> {
        let slot = self
            .keys
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(key)?
            .clone();
        let active = slot.active.load(Ordering::Relaxed);
        let members = lock(&slot.members);
        members
            .iter()
            .find(|member| member.id == active)
            .or_else(|| members.last())
            .cloned()
    }
}

impl Slot {
    pub(super) fn key(&self) -> &NodePublic {
        &self.key
    }

    /// Remembers that `receiver` heard from this key, if there is room.
    fn remember(&self, receiver: &Arc<Client>) {
        let mut delivered = lock(&self.delivered);
        let Delivered { to, since, charged } = &mut *delivered;
        if to.contains_key(&receiver.id) {
            return;
        }
        *since += 1;
        if *since > to.len() / 2 + 16 {
            to.retain(|_, client| client.strong_count() > 0);
            *since = 0;
        }
        if to.len() < DELIVERED_MAX && self.account.excess() == 0 {
            to.insert(receiver.id, Arc::downgrade(receiver));
        }
        self.account.charge(charged, to.len() * DELIVERED_BYTES);
    }
}

impl Client {
    /// The connection wrote something: from now on it gets its key's traffic.
    pub(super) fn wrote(&self) {
        if self.slot.active.load(Ordering::Relaxed) == self.id {
            return;
        }
        self.slot.active.store(self.id, Ordering::Relaxed);
        if self.slot.turns.fetch_add(1, Ordering::Relaxed) + 1 == TURNS {
            let members = lock(&self.slot.members).clone();
            tracing::warn!(key = %self.slot.key, connections = members.len(), "two machines use one node key");
            for member in members {
                member.tell_health(DUPLICATE);
            }
        }
    }

    /// Queues a Health frame: a problem, or its end if the text is empty.
    fn tell_health(&self, problem: &str) {
        let mut outbox = self.outbox();
        if outbox.closed || outbox.control.len() >= CONTROL_QUEUE_BYTES {
            return;
        }
        frame::put(
            &mut outbox.control,
            FrameType::HEALTH,
            &[problem.as_bytes()],
        );
        drop(outbox);
        self.wake.notify_one();
    }

    /// Remembers that `receiver` got something from this connection's key.
    pub(super) fn delivered_to(&self, receiver: &Arc<Client>) {
        self.slot.remember(receiver);
    }

    /// What waits; locked for the time of a few pointer moves only.
    pub(super) fn outbox(&self) -> MutexGuard<'_, Outbox> {
        lock(&self.outbox)
    }

    /// Puts `frames` whole frames into a queue and leaves `run` empty.
    pub(super) fn push(&self, lane: Lane, run: &mut Chunk, frames: u64, counters: &Counters) {
        let mut outbox = self.outbox();
        if outbox.closed {
            drop(outbox);
            run.clear();
            return counters.dropped_gone_disconnected.add(frames);
        }
        let idle = outbox.is_empty();
        let dropped = match lane {
            Lane::Data => outbox.data.push_run(run),
            Lane::Disco => outbox.disco.push_run(run),
        };
        outbox.charge(&self.account);
        let over = self.account.excess();
        if over > 0 {
            outbox.shed(over, counters);
            outbox.charge(&self.account);
        }
        drop(outbox);
        counters.packets_queued.add(frames);
        counters.runs_queued.add(1);
        let Dropped { frames, .. } = dropped;
        if frames > 0 {
            let counter = match lane {
                Lane::Data => &counters.dropped_queue_head_data,
                Lane::Disco => &counters.dropped_queue_head_disco,
            };
            counter.add(frames);
        }
        // A task that has something waiting looks again by itself before it sleeps.
        if idle {
            counters.wakes.add(1);
            self.wake.notify_one();
        }
    }

    /// Drops what waits, until the client makes the relay hold `keep` bytes, if that is enough.
    pub(super) fn shed(&self, keep: usize, counters: &Counters) {
        let mut outbox = self.outbox();
        let over = self.account.used().saturating_sub(keep);
        if over > 0 {
            outbox.shed(over, counters);
            outbox.charge(&self.account);
        }
    }

    /// Queues a PeerGone frame.
    pub(super) fn tell_gone(&self, peer: &NodePublic, reason: PeerGoneReason, counters: &Counters) {
        let mut outbox = self.outbox();
        let full = outbox.control.len() >= CONTROL_QUEUE_BYTES || self.account.excess() > 0;
        if outbox.closed || full {
            return counters.peer_gone_dropped.add(1);
        }
        frame::put_peer_gone(&mut outbox.control, peer, reason);
        outbox.charge(&self.account);
        drop(outbox);
        let counter = match reason {
            PeerGoneReason::NotHere => &counters.peer_gone_not_here,
            PeerGoneReason::Disconnected | PeerGoneReason::Other(_) => {
                &counters.peer_gone_disconnected
            }
        };
        counter.add(1);
        self.wake.notify_one();
    }
}
