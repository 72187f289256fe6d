//! What the network wants of the host's resolver.

use std::net::IpAddr;

/// Whom the host's resolver is to ask, and what for. Without servers it is no wish at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostDns {
    /// The servers, best first: our own.
    pub servers: Vec<IpAddr>,
    /// Domains in which names without a dot are looked for, in this order; no dot at the end.
    pub search: Vec<String>,
    /// Domains whose names the servers are asked for, besides those of `search`.
    pub match_domains: Vec<String>,
    /// They are asked for all other names as well.
    pub default: bool,
}
