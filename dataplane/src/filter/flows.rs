#![forbid(unsafe_code)]
//! Memory of outbound flows, so that their replies pass the filter.
//!
//! A set-associative table of fixed size: a flow's hash names a bucket of a few places, and a new
//! flow takes the place of an expired one or of the one longest unused there, which is counted. No
//! allocation after creation, no chains, one or two cache lines per lookup. Expiry is checked at
//! lookup, so nothing has to sweep.

use std::time::{Duration, Instant};

use crate::packet::header::Flow;

/// Flows remembered at most, per shard.
pub const FLOWS_MAX: usize = 65_536;
/// A flow unused for this long is forgotten.
pub const FLOW_TIMEOUT: Duration = Duration::from_secs(300);
/// A flow in use is reported as new again this often, so that the shard that filters its replies
/// keeps it too.
pub const FLOW_REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// Places per bucket.
const WAYS: usize = 8;
const BUCKETS: usize = FLOWS_MAX / WAYS;
const _: () = assert!(BUCKETS.is_power_of_two());

/// The table. Flows are stored in the direction of their replies.
#[derive(Debug)]
pub struct FlowMemory {
    buckets: Box<[[Option<Entry>; WAYS]]>,
    epoch: Instant,
    evicted: u64,
}

/// One flow. Times are whole seconds since the epoch of the table.
#[derive(Clone, Copy, Debug)]
struct Entry {
    flow: Flow,
    used: u32,
    reported: u32,
}

impl FlowMemory {
    /// An empty table; times before `epoch` count as `epoch`. Takes about 4 MiB.
    pub fn new(epoch: Instant) -> FlowMemory {
        FlowMemory {
            buckets: vec![[None; WAYS]; BUCKETS].into_boxed_slice(),
            epoch,
            evicted: 0,
        }
    }

    /// Remembers that `reply` may come in. True if it was unknown, or last reported longer than
    /// [`FLOW_REPORT_INTERVAL`] ago.
    pub fn remember(&mut self, now: Instant, reply: Flow) -> bool {
        let now = self.seconds(now);
        let bucket = &mut self.buckets[bucket_of(&reply)];
        if let Some(entry) = bucket
            .iter_mut()
            .flatten()
            .find(|entry| entry.flow == reply)
        {
            let expired = entry.expired(now);
            let due = now - entry.reported.min(now) >= seconds_of(FLOW_REPORT_INTERVAL);
            entry.used = now;
            if expired || due {
                entry.reported = now;
            }
            return expired || due;
        }
        let entry = Entry {
            flow: reply,
            used: now,
            reported: now,
        };
        let free = bucket
            .iter()
            .position(|place| place.is_none_or(|entry| entry.expired(now)));
        let place = match free {
            Some(place) => place,
            None => {
                self.evicted += 1;
                oldest(bucket)
            }
        };
        bucket[place] = Some(entry);
        true
    }

    /// Forgets a flow.
    pub fn forget(&mut self, reply: &Flow) {
        for place in &mut self.buckets[bucket_of(reply)] {
            place.take_if(|entry| entry.flow == *reply);
        }
    }

    /// Whether the inbound `flow` answers a remembered one; that counts as use.
    pub fn admits(&mut self, now: Instant, flow: &Flow) -> bool {
        let now = self.seconds(now);
        let bucket = &mut self.buckets[bucket_of(flow)];
        let entry = bucket
            .iter_mut()
            .flatten()
            .find(|entry| entry.flow == *flow);
        match entry {
            Some(entry) if !entry.expired(now) => {
                entry.used = now;
                true
            }
            Some(_) | None => false,
        }
    }

    /// Flows that made room for newer ones while still valid, since the last call.
    pub fn take_evicted(&mut self) -> u64 {
        std::mem::take(&mut self.evicted)
    }

    fn seconds(&self, now: Instant) -> u32 {
        seconds_of(now.saturating_duration_since(self.epoch))
    }
}

impl Entry {
    fn expired(&self, now: u32) -> bool {
        now.saturating_sub(self.used) >= seconds_of(FLOW_TIMEOUT)
    }
}

fn oldest(bucket: &[Option<Entry>; WAYS]) -> usize {
    let used = |place: &usize| bucket[*place].map_or(0, |entry| entry.used);
    (0..WAYS).min_by_key(used).unwrap_or(0)
}

/// Whole seconds; 2^32 of them are 136 years.
fn seconds_of(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

#[expect(clippy::cast_possible_truncation, reason = "any bits of the hash do")]
fn bucket_of(flow: &Flow) -> usize {
    flow.hash() as usize % BUCKETS
}
