#![forbid(unsafe_code)]
//! Memory of flows: of outbound ones, so that their replies pass the filter, and of inbound ones.
//!
//! A hash table with chains over a store of fixed size, whose entries also stand in one list, the
//! one longest unused first. A new flow that finds the store full takes the place of that one, which
//! is counted: so a flow is forgotten only when as many others as fit have been used since. Expiry is
//! checked at look-up, so nothing has to sweep. The hash has a key: peers choose addresses and ports,
//! and may not choose a chain.
//!
//! A look-up reads one cache line of chains and one for each flow of the chain. Moving to the end of the
//! list writes up to three others; use is noted to a [`TICK`], so that a busy flow moves ten times a
//! second at most.
//!
//! *Two shards.* The shard that seals tells the owner of a flow when it begins, and again every
//! [`FLOW_REPORT_INTERVAL`], which keeps it there; and to a new owner. An owner that is short of room forgets sooner, and
//! says up to when it has forgotten ([`FlowMemory::forgotten`]): whatever was used later it still has.
//! So who seals tells again once half of the time from there to now has passed since it last told, and
//! the other half is left for the reply to come in.

use std::time::{Duration, Instant};

use crate::config::share;
use crate::packet::header::{Flow, HashKey};

/// Flows remembered at most, per shard.
pub(crate) const FLOWS_MAX: usize = 262_144;
/// Flows remembered by all shards together, and by one of many at least.
pub(crate) const NODE_FLOWS_MAX: usize = 1 << 20;
pub(crate) const SHARD_FLOWS_MIN: usize = 32_768;
/// A flow unused for this long is forgotten.
pub(crate) const FLOW_TIMEOUT: Duration = Duration::from_secs(300);
/// A flow in use is reported as new again this often, so that the shard that filters its replies
/// keeps it too.
pub(crate) const FLOW_REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// The unit of all times in the table; 2^32 of them are 13 years.
const TICK: Duration = Duration::from_millis(TICK_MS);
const TICK_MS: u64 = 100;
const _: () =
    assert!(1000 % TICK_MS == 0 && FLOWS_MAX.is_power_of_two() && FLOWS_MAX < NONE as usize);
/// Stands for no entry in place of an entry's index.
const NONE: u32 = u32::MAX;

/// Something to tell the owner of a flow's peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tell {
    /// The flow of the replies.
    pub reply: Flow,
    /// The owner has not heard of it yet: without it, replies are refused.
    pub new: bool,
}

/// The table. Flows are stored in the direction of their replies.
#[derive(Debug)]
pub struct FlowMemory {
    /// The first entry of each chain.
    chains: Box<[u32]>,
    entries: Vec<Entry>,
    /// The ends of the list.
    oldest: u32,
    newest: u32,
    /// The first of the entries that were given back, which form a chain.
    free: u32,
    key: HashKey,
    epoch: Instant,
    /// Grows when peers may have got other owners.
    owners: u32,
    evicted: u64,
    /// The newest use of a flow that was evicted while still valid.
    forgotten: Option<u32>,
}

/// One flow and its neighbours, in a cache line. Times are ticks since the epoch of the table.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Entry {
    flow: Flow,
    used: u32,
    reported: u32,
    /// Who owned what when it was reported.
    owners: u32,
    next: u32,
    older: u32,
    newer: u32,
}
const _: () = assert!(size_of::<Entry>() == 64 && align_of::<Entry>() == 64);

/// Bytes for one flow: its entry, and the start of a chain.
pub(crate) const FLOW_COST: usize = size_of::<Entry>() + size_of::<u32>();
const _: () = assert!(FLOWS_MAX * FLOW_COST == 17 << 20);

/// Flows remembered at most by one shard of so many: a power of two.
pub(crate) fn flows_max(shards: usize) -> usize {
    let part = share(NODE_FLOWS_MAX, shards, SHARD_FLOWS_MIN).min(FLOWS_MAX);
    1 << part.ilog2()
}

/// Flows begun by peers of which that is remembered, where so many that began here are.
pub(crate) fn theirs_max(flows_max: usize) -> usize {
    flows_max / 4
}

impl FlowMemory {
    /// An empty table for `flows_max` flows, a power of two; times before `epoch` count as `epoch`.
    /// Reserves [`FLOW_COST`] bytes for each (17 MiB for [`FLOWS_MAX`]): the starts of chains are
    /// touched now, a cache line for each flow when it comes.
    pub fn new(epoch: Instant, key: HashKey, flows_max: usize) -> FlowMemory {
        debug_assert!(flows_max.is_power_of_two() && flows_max <= FLOWS_MAX);
        FlowMemory {
            chains: vec![NONE; flows_max].into_boxed_slice(),
            entries: Vec::with_capacity(flows_max),
            oldest: NONE,
            newest: NONE,
            free: NONE,
            key,
            epoch,
            owners: 0,
            evicted: 0,
            forgotten: None,
        }
    }

    /// Remembers that `reply` may come in. Says what to tell the owner of its peer, if that is
    /// another shard, where `owner_forgot` is what [`FlowMemory::forgotten`] says there.
    #[inline]
    pub fn remember(
        &mut self,
        now: Instant,
        reply: Flow,
        owner_forgot: Option<Instant>,
    ) -> Option<Tell> {
        let now = self.ticks(now);
        let chain = self.chain_of(&reply);
        let Some(at) = self.find(chain, &reply) else {
            self.insert(now, chain, reply);
            return Some(Tell { reply, new: true });
        };
        let entry = &self.entries[at as usize];
        let new = entry.expired(now) || entry.owners != self.owners;
        let tell = new || self.due(now, entry.reported, owner_forgot);
        self.touch(at, now);
        if tell {
            let entry = &mut self.entries[at as usize];
            (entry.reported, entry.owners) = (now, self.owners);
        }
        tell.then_some(Tell { reply, new })
    }

    /// Takes back the last answer of [`FlowMemory::remember`]: the owner could not be told. A flow
    /// that is new to the owner is forgotten, any other told with its next packet.
    pub fn untold(&mut self, tell: &Tell) {
        let chain = self.chain_of(&tell.reply);
        let Some(at) = self.find(chain, &tell.reply) else {
            return;
        };
        if tell.new {
            self.unchain(chain, at);
            self.unlist(at);
            self.entries[at as usize].next = self.free;
            self.free = at;
        } else {
            // A moment at which nobody was told.
            let entry = &mut self.entries[at as usize];
            entry.reported = entry.used.saturating_sub(ticks_of(FLOW_REPORT_INTERVAL));
        }
    }

    /// Whether the inbound `flow` answers a remembered one; that counts as use.
    #[inline]
    pub fn admits(&mut self, now: Instant, flow: &Flow) -> bool {
        let now = self.ticks(now);
        let Some(at) = self.find(self.chain_of(flow), flow) else {
            return false;
        };
        if self.entries[at as usize].expired(now) {
            return false;
        }
        self.touch(at, now);
        true
    }

    /// Takes note that peers may have other owners now, who have heard of nothing yet.
    pub fn owners_changed(&mut self) {
        self.owners = self.owners.wrapping_add(1);
    }

    /// Flows that made room for newer ones while still valid, since the last call.
    pub fn take_evicted(&mut self) -> u64 {
        std::mem::take(&mut self.evicted)
    }

    /// No flow used at or after this moment has made room for another; none at all if there is none.
    pub fn forgotten(&self) -> Option<Instant> {
        let ticks = self.forgotten?.saturating_add(1);
        self.epoch.checked_add(TICK.saturating_mul(ticks))
    }

    /// Whether the owner is to hear again of a flow that it was told of at `reported`.
    fn due(&self, now: u32, reported: u32, owner_forgot: Option<Instant>) -> bool {
        let age = now.saturating_sub(reported);
        age >= ticks_of(FLOW_REPORT_INTERVAL)
            || owner_forgot.is_some_and(|forgot| {
                let kept_for = now.saturating_sub(self.ticks(forgot));
                age > 0 && age >= kept_for.div_ceil(2)
            })
    }

    fn insert(&mut self, now: u32, chain: usize, flow: Flow) {
        let at = self.place(now);
        let entry = Entry {
            flow,
            used: now,
            reported: now,
            owners: self.owners,
            next: self.chains[chain],
            older: NONE,
            newer: NONE,
        };
        match self.entries.get_mut(at as usize) {
            Some(place) => *place = entry,
            None => self.entries.push(entry),
        }
        self.chains[chain] = at;
        self.list(at);
    }

    /// A place for another flow: of one that has expired, or given back, or not used yet, or that of
    /// the one longest unused.
    fn place(&mut self, now: u32) -> u32 {
        let oldest = self.entries.get(self.oldest as usize);
        let expired = oldest.is_some_and(|entry| entry.expired(now));
        if !expired {
            if self.free != NONE {
                let at = self.free;
                self.free = self.entries[at as usize].next;
                return at;
            }
            if self.entries.len() < self.chains.len() {
                return u32::try_from(self.entries.len()).unwrap_or(NONE);
            }
        }
        let at = self.oldest;
        let Entry { flow, used, .. } = self.entries[at as usize];
        if !expired {
            self.evicted += 1;
            self.forgotten = self.forgotten.max(Some(used));
        }
        self.unchain(self.chain_of(&flow), at);
        self.unlist(at);
        at
    }

    #[inline]
    fn find(&self, chain: usize, flow: &Flow) -> Option<u32> {
        let mut at = self.chains[chain];
        while let Some(entry) = self.entries.get(at as usize) {
            if entry.flow == *flow {
                return Some(at);
            }
            at = entry.next;
        }
        None
    }

    /// Notes use, and moves the entry to the newest ones.
    #[inline]
    fn touch(&mut self, at: u32, now: u32) {
        let entry = &mut self.entries[at as usize];
        if entry.used != now {
            entry.used = now;
            self.unlist(at);
            self.list(at);
        }
    }

    /// Puts an entry at the newest end of the list.
    fn list(&mut self, at: u32) {
        let before = std::mem::replace(&mut self.newest, at);
        match self.entries.get_mut(before as usize) {
            Some(before) => before.newer = at,
            None => self.oldest = at,
        }
        let entry = &mut self.entries[at as usize];
        (entry.older, entry.newer) = (before, NONE);
    }

    /// Takes an entry out of the list.
    fn unlist(&mut self, at: u32) {
        let Entry { older, newer, .. } = self.entries[at as usize];
        match self.entries.get_mut(older as usize) {
            Some(entry) => entry.newer = newer,
            None => self.oldest = newer,
        }
        match self.entries.get_mut(newer as usize) {
            Some(entry) => entry.older = older,
            None => self.newest = older,
        }
    }

    /// Takes an entry out of its chain.
    fn unchain(&mut self, chain: usize, at: u32) {
        let next = self.entries[at as usize].next;
        let mut before = self.chains[chain];
        if before == at {
            self.chains[chain] = next;
            return;
        }
        while let Some(entry) = self.entries.get_mut(before as usize) {
            if entry.next == at {
                entry.next = next;
                return;
            }
            before = entry.next;
        }
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash do")]
    fn chain_of(&self, flow: &Flow) -> usize {
        flow.keyed_hash(&self.key) as usize & (self.chains.len() - 1)
    }

    #[inline]
    fn ticks(&self, at: Instant) -> u32 {
        ticks_of(at.saturating_duration_since(self.epoch))
    }
}

impl Entry {
    #[inline]
    fn expired(&self, now: u32) -> bool {
        now.saturating_sub(self.used) >= ticks_of(FLOW_TIMEOUT)
    }
}

#[inline]
fn ticks_of(duration: Duration) -> u32 {
    let part = u64::from(duration.subsec_millis()) / TICK_MS;
    u32::try_from(duration.as_secs() * (1000 / TICK_MS) + part).unwrap_or(u32::MAX)
}

#[cfg(test)]
impl FlowMemory {
    /// Whether the flow has a place, expired or not.
    pub(super) fn knows(&self, flow: &Flow) -> bool {
        self.find(self.chain_of(flow), flow).is_some()
    }

    /// The most flows that one look-up can have to compare.
    pub(super) fn longest_chain(&self) -> usize {
        let len = |first: &u32| {
            let mut at = *first;
            std::iter::from_fn(|| {
                let entry = self.entries.get(at as usize)?;
                at = entry.next;
                Some(())
            })
            .count()
        };
        self.chains.iter().map(len).max().unwrap_or(0)
    }
}
