//! What was served and refused.

use crate::driver::counters::{self, counters};

counters! {
    /// What was served and what was refused, since the start.
    pub(super) struct Counters(counters::Shared) {
        /// Connections accepted.
        connections,
        /// Connections that ended with broken HTTP or TLS.
        bad_http,
        /// Upgrades refused: wrong headers.
        bad_upgrade,
        /// Noise handshakes refused: not decodable, or another server's key.
        bad_noise,
        /// Connections and requests with a capability version that is too low.
        bad_version,
        /// Connections that ended with broken records or broken HTTP/2.
        bad_stream,
        /// Requests refused: not JSON, or of a wrong shape.
        bad_request,
        /// Requests refused: body over the limit.
        too_large,
        /// Requests for paths that do not exist.
        not_found,
        /// Map requests of nodes we do not know.
        unknown_node,
        /// Registrations refused.
        refused_registration,
        /// Registrations put off because of too many failures from one address.
        rate_limited,
        /// Connections and requests that took too long, those of strangers above all.
        timed_out,
        /// Connections that could not be accepted.
        accept_errors,
        /// Machines that were told that a person has to let them in.
        asked_for_approval,
        /// Registrations put off because too many wait for that.
        crowded,
        /// Registrations that succeeded.
        registrations,
        /// Nodes that logged out.
        log_outs,
        /// Map requests that succeeded.
        map_requests,
        /// Messages given to map streams.
        messages,
        /// Failures of the store.
        store_errors,
        /// Map requests of nodes whose key has expired that were refused.
        expired_node,
        /// Announced routes that were not looked at, because a node had more than there may be.
        routes_left_out,
        /// What administrators had done with nodes.
        orders,
    }
}
