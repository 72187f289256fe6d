//! Pings on their way: who was asked, when, and why.
//!
//! All have the same time to live, so the queue is in the order of their timeouts and needs no timer
//! of its own.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Instant;

use super::{PING_TIMEOUT, PINGS_OUTSTANDING_MAX, Purpose, Route};
use crate::disco::TxId;

/// One Ping without Pong.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) tx_id: TxId,
    pub(super) to: Route,
    pub(super) at: Instant,
    pub(super) purpose: Purpose,
}

/// The Pings of one peer, oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Pings(VecDeque<Sent>);

impl Pings {
    /// Remembers a Ping; the oldest gives way when there are too many, and is returned.
    pub(super) fn push(&mut self, sent: Sent) -> Option<Sent> {
        let full = self.0.len() >= PINGS_OUTSTANDING_MAX;
        let oldest = full.then(|| self.0.pop_front()).flatten();
        self.0.push_back(sent);
        oldest
    }

    /// Takes the Ping that a Pong belongs to.
    pub(super) fn take(&mut self, tx_id: &TxId) -> Option<Sent> {
        let at = self.0.iter().position(|sent| sent.tx_id == *tx_id)?;
        self.0.remove(at)
    }

    /// Forgets a don't-fragment Ping of this size that never left; `false` if there is none.
    pub(super) fn refused(&mut self, to: SocketAddr, wire: u16) -> bool {
        let refused =
            |sent: &Sent| sent.to == Route::Direct(to) && sent.purpose == Purpose::Mtu(wire);
        let at = self.0.iter().rposition(refused);
        at.and_then(|at| self.0.remove(at)).is_some()
    }

    /// Takes the oldest Ping if its time is over.
    pub(super) fn take_expired(&mut self, now: Instant) -> Option<Sent> {
        let expired = self.next_timeout().is_some_and(|at| at <= now);
        expired.then(|| self.0.pop_front()).flatten()
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.0.front().map(|sent| sent.at + PING_TIMEOUT)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Sent> {
        self.0.iter()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
