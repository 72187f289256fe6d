//! Who may be told of to the control thread because of data that no session opens ([`Event::Unopened`]).
//!
//! Anybody can send such data, and the control thread has to look for each source among all peers. So
//! it is told of few a second, and of fewer from one source: a flood leaves room for peers elsewhere,
//! unless it comes from several addresses, or in the name of many.
//!
//! [`Event::Unopened`]: crate::types::Event::Unopened

#![forbid(unsafe_code)]

use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Instant;

use crate::noise::{Bucket, Sources};

/// So often a second, and at once, by all shards together.
pub(crate) const PER_SECOND: u32 = 20;
pub(crate) const BURST: u32 = 20;
/// The same because of one IPv4 address or IPv6 /64.
pub(crate) const OF_ONE_PER_SECOND: u32 = 4;
pub(crate) const OF_ONE_BURST: u32 = 4;

/// The limits of all shards.
pub(crate) struct Strangers(Mutex<Limits>);

struct Limits {
    sources: Sources,
    all: Bucket,
}

impl Strangers {
    pub(crate) fn new(now: Instant) -> Strangers {
        Strangers(Mutex::new(Limits {
            sources: Sources::new(now, OF_ONE_PER_SECOND, OF_ONE_BURST),
            all: Bucket::new(now, PER_SECOND, BURST),
        }))
    }

    /// Whether this one may be told of. No shard waits for another here: of two at once one is not told.
    pub(crate) fn allow(&self, now: Instant, from: IpAddr) -> bool {
        let Ok(mut limits) = self.0.try_lock() else {
            return false;
        };
        limits.sources.allow(now, from) && limits.all.take(now)
    }
}
