//! What was served and refused.

use std::sync::atomic::{AtomicU64, Ordering};

/// What was served and what was refused, since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections accepted.
    pub connections: AtomicU64,
    /// Connections that ended with broken HTTP or TLS.
    pub bad_http: AtomicU64,
    /// Upgrades refused: wrong headers.
    pub bad_upgrade: AtomicU64,
    /// Noise handshakes refused: not decodable, or another server's key.
    pub bad_noise: AtomicU64,
    /// Connections and requests with a capability version that is too low.
    pub bad_version: AtomicU64,
    /// Connections that ended with broken records or broken HTTP/2.
    pub bad_stream: AtomicU64,
    /// Requests refused: not JSON, or of a wrong shape.
    pub bad_request: AtomicU64,
    /// Requests refused: body over the limit.
    pub too_large: AtomicU64,
    /// Requests for paths that do not exist.
    pub not_found: AtomicU64,
    /// Map requests of nodes we do not know.
    pub unknown_node: AtomicU64,
    /// Registrations refused.
    pub refused_registration: AtomicU64,
    /// Registrations put off because of too many failures from one address.
    pub rate_limited: AtomicU64,
    /// Connections and requests that took too long, those of strangers above all.
    pub timed_out: AtomicU64,
    /// Connections that could not be accepted.
    pub accept_errors: AtomicU64,
    /// Registrations that succeeded.
    pub registrations: AtomicU64,
    /// Nodes that logged out.
    pub log_outs: AtomicU64,
    /// Map requests that succeeded.
    pub map_requests: AtomicU64,
    /// Messages given to map streams.
    pub messages: AtomicU64,
    /// Failures of the store.
    pub store_errors: AtomicU64,
    /// Map requests of nodes whose key has expired that were refused.
    pub expired_node: AtomicU64,
    /// Announced routes that were not looked at, because a node had more than there may be.
    pub routes_left_out: AtomicU64,
    /// What administrators had done with nodes.
    pub orders: AtomicU64,
}

impl Counters {
    /// Names and values, as `/metrics` shows them.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let all = [
            ("connections", &self.connections),
            ("bad_http", &self.bad_http),
            ("bad_upgrade", &self.bad_upgrade),
            ("bad_noise", &self.bad_noise),
            ("bad_version", &self.bad_version),
            ("bad_stream", &self.bad_stream),
            ("bad_request", &self.bad_request),
            ("too_large", &self.too_large),
            ("not_found", &self.not_found),
            ("unknown_node", &self.unknown_node),
            ("refused_registration", &self.refused_registration),
            ("rate_limited", &self.rate_limited),
            ("timed_out", &self.timed_out),
            ("accept_errors", &self.accept_errors),
            ("registrations", &self.registrations),
            ("log_outs", &self.log_outs),
            ("map_requests", &self.map_requests),
            ("messages", &self.messages),
            ("store_errors", &self.store_errors),
            ("expired_node", &self.expired_node),
            ("routes_left_out", &self.routes_left_out),
            ("orders", &self.orders),
        ];
        all.map(|(name, value)| (name, value.load(Ordering::Relaxed)))
            .to_vec()
    }
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
