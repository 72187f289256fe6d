//! What network this is, how far the relays are, and at which addresses we can be reached.
//!
//! A check begins when it is asked for ([`Netcheck::start`]), 20 to 26 s after the last one while
//! the node is in use, and when the DERP map changes. It sends STUN requests to the relays as the
//! plan says (all of them every five minutes, else the three nearest and the home), from the port
//! that WireGuard uses, and ends when every answer is in, soon after three regions have answered, or
//! after three seconds. Without any answer it asks for the latencies over HTTPS
//! ([`Event::HttpsLatencyWanted`]) and takes what comes within five seconds. The end is one
//! [`Report`]; from the reports of the last five minutes the home region is chosen ([`Event::Home`]),
//! with enough hysteresis that it does not flap. The addresses that relays and peers see us at, the
//! local ones and the configured ones become the own endpoints ([`Event::Endpoints`]): they are given
//! out at the first answer already, so that nobody waits for a dead relay.
//!
//! Verbs as in every core: time and randomness are given, DNS is the driver's
//! ([`Netcheck::poll_name`], [`Netcheck::set_resolved`]). Rules and numbers:
//! `protocol/netcheck.md`; own endpoints: `protocol/paths.md` §2.
//!
//! Rooms: `plan` says which probe leaves when; `check` is one running check; `names` has relays'
//! names looked up; `home` chooses the region; `endpoints` gathers the own endpoints; `machine` ties
//! them together.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ringtail_dataplane::{RegionId, named};

mod check;
mod endpoints;
mod home;
mod machine;
mod names;
mod plan;

pub use endpoints::{Interface, OwnEndpoint};
pub use machine::Netcheck;

/// A whole report, HTTPS included, takes at most this.
pub const REPORT_LIMIT: Duration = Duration::from_secs(5);
/// STUN answers are waited for at most this.
pub const STUN_LIMIT: Duration = Duration::from_secs(3);
/// So many regions with a latency are enough.
pub const REGIONS_ENOUGH: usize = 3;
/// Time between full reports.
pub const FULL_REPORT_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// The home is chosen from reports not older than this.
pub const HISTORY: Duration = Duration::from_secs(305);
/// Periodic checks follow the last one after at least this,
pub const PERIOD_MIN: Duration = Duration::from_secs(20);
/// and at most this.
pub const PERIOD_MAX: Duration = Duration::from_secs(26);
/// Probes of one check.
pub const PROBES_MAX: usize = 1024;
/// Datagrams waiting for [`Netcheck::poll_transmit`].
pub const TRANSMITS_MAX: usize = 1024;
/// Events waiting for [`Netcheck::poll_event`]; the oldest gives way.
pub const EVENTS_MAX: usize = 256;

/// One STUN request to send from the discovery socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// The relay's STUN address.
    pub to: SocketAddr,
    /// The payload.
    pub bytes: Vec<u8>,
}

/// What [`Netcheck::poll_event`] gives.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// No STUN answer came: time one request to each of these over HTTPS
    /// (`GET /derp/latency-check`) and hand the times to [`Netcheck::handle_https_latency`].
    HttpsLatencyWanted(Vec<RegionId>),
    /// The own endpoints, best first, looked up just now; often unchanged.
    Endpoints(Vec<OwnEndpoint>),
    /// A check has ended.
    Report(Report),
    /// The home region changed, or was chosen for the first time.
    Home {
        /// The region.
        region: RegionId,
        /// Its latency in the last report, if it answered.
        latency: Option<Duration>,
    },
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Whether the whole map was measured.
    pub full: bool,
    /// At least one STUN answer came.
    pub udp: bool,
    /// One came over IPv4, or HTTPS went over it.
    pub ipv4: bool,
    /// The same for IPv6.
    pub ipv6: bool,
    /// A request could be sent over IPv4, or the host's firewall forbade it.
    pub ipv4_can_send: bool,
    /// The same for IPv6.
    pub ipv6_can_send: bool,
    /// The system has IPv6 at all.
    pub os_has_ipv6: bool,
    /// Whether the NAT gives us another port for each destination; unknown with one server.
    pub mapping_varies: Option<bool>,
    /// Lowest latency per region, any family and way.
    pub latency: BTreeMap<RegionId, Duration>,
    /// The same over IPv4.
    pub latency_v4: BTreeMap<RegionId, Duration>,
    /// The same over IPv6.
    pub latency_v6: BTreeMap<RegionId, Duration>,
    /// First IPv4 mapping seen.
    pub global_v4: Option<SocketAddr>,
    /// Last IPv6 mapping seen.
    pub global_v6: Option<SocketAddr>,
    /// How many servers saw us at each IPv4 mapping.
    pub mappings_v4: BTreeMap<SocketAddr, u32>,
    /// The same for IPv6.
    pub mappings_v6: BTreeMap<SocketAddr, u32>,
    /// Names of relays that could not be asked because they do not resolve.
    pub unresolved: Vec<String>,
    /// The home region after this report.
    pub home: Option<RegionId>,
}

impl Report {
    /// Whether UDP works; unknown if no relay could be asked, since no name resolves.
    pub fn udp_works(&self) -> Option<bool> {
        let asked = self.ipv4_can_send || self.ipv6_can_send;
        (self.udp || asked || self.unresolved.is_empty()).then_some(self.udp)
    }

    /// The public endpoints it shows: the global ones, then every other mapping that two servers
    /// saw. One seen once is taken for the noise of a hard NAT.
    pub fn public_endpoints(&self) -> Vec<SocketAddr> {
        let mut found: Vec<SocketAddr> = self.global_v4.into_iter().collect();
        let twice = |mappings: &BTreeMap<SocketAddr, u32>| -> Vec<SocketAddr> {
            let often = mappings.iter().filter(|(_, servers)| **servers >= 2);
            often.map(|(addr, _)| *addr).collect()
        };
        found.extend(twice(&self.mappings_v4));
        found.extend(self.global_v6);
        found.extend(twice(&self.mappings_v6));
        let mut seen = std::collections::BTreeSet::new();
        found.retain(|addr| seen.insert(*addr));
        found
    }
}

named! {
    /// Why a STUN datagram was dropped; all are counted by name.
    pub enum Drop {
        /// No STUN message.
        NotStun = "stun_not_stun",
        /// STUN, but no success response: an error, or a request that strayed here.
        NotSuccess = "stun_not_success",
        /// Broken attributes, or no address.
        Malformed = "stun_malformed",
        /// An answer to no request of this check, or a second one.
        UnknownId = "stun_unknown_id",
        /// An address that can be nobody's endpoint.
        BadAddress = "stun_bad_address",
        /// A request not queued because the driver does not fetch them.
        TransmitsFull = "netcheck_transmits_full",
        /// An event lost because the driver does not fetch them.
        EventsFull = "netcheck_events_full",
    }
}

impl std::error::Error for Drop {}

/// Whether an address that a server reports can be an endpoint.
fn usable(addr: SocketAddr, loopback: bool) -> bool {
    let ip = addr.ip();
    let broadcast = ip == IpAddr::from([255; 4]);
    addr.port() != 0
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !broadcast
        && (loopback || !ip.is_loopback())
}
