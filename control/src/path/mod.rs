//! How each peer is reached: by relay, directly, or both.
//!
//! A peer begins at **Relay**: data for it goes to its home relay. The first data (a kick from the
//! data plane), a CallMeMaybe or a Ping from the peer begins **Probing**: a round of DISCO Pings to
//! all candidates (the addresses the network map, the peer's CallMeMaybe and its own Pings gave us,
//! and those that worked before), repeated quickly while nothing is trusted, and a CallMeMaybe by
//! relay so that the peer pings us through the hole that our Pings opened. The first candidate that
//! answers, or the best of several, is validated by a burst of Pings: loss, latency, and Pings as
//! large as a full packet, which pass whole, or in fragments, or not (`mtu`); meanwhile data goes both
//! ways, so nothing is lost. What passes is promoted: **Direct**, used alone for as long as Pongs keep
//! coming (trust is renewed by each and runs out after 6.5 s). When trust runs out, a heartbeat stays
//! unanswered or sending fails, the peer is in **Fallback**: data goes both ways until a Pong from the
//! address (Direct again) or until a Ping to it times out (Probing again, by relay alone). The moment
//! the best address is doubted, the others are asked, and one that answered lately is validated at
//! once.
//!
//! After eight silent rounds a peer that never was direct is **Held**: no Pings of our own for
//! minutes, until something changes or the peer calls. One that was direct, in this run or as the
//! memory of the last one says, is not given up: both ends would wait for each other. It stays in
//! Probing at a slow pace for as long as data flows, and any authenticated arrival over UDP, or data
//! after a long pause, quickens it.
//!
//! [`Manager`] holds all peers behind the verbs of every core. In: [`Manager::set_peers`],
//! [`Manager::set_own_endpoints`], DISCO datagrams from the socket and from relays, events of the
//! data plane, time. Out: datagrams to send ([`Transmit`]), one [`PathDecision`] per peer for the
//! shards, and [`Event`]s: what the driver should do, and the story for people. It knows no socket
//! and no clock, and its randomness is given to it.
//!
//! Each end decides its own sending direction alone, and everything on the wire means what it means
//! between tailscaled nodes. Where one direction is too narrow, one end stays on the relay; the other
//! hears it there and doubts its own direction at first, until Pongs have shown for some seconds that
//! it works all the same. Rules and numbers: `protocol/paths.md`; §15 and §15.1 where we differ
//! from Tailscale on purpose.
//!
//! Rooms: `manager` is all peers, `shared` what they have in common; `peer` is one peer's machine, in
//! `state` (transitions, decision, trust begun and renewed), `round` (Pings out and in which order,
//! announcing), `receive` (DISCO in) and `timer` (ticks, trust that ends, silence); `candidate`, `pings`,
//! `validation`, `quality` and `mtu` are its parts; `score` ranks addresses; `plain` is a peer that has none of this; `limit` holds rates and the
//! names of what is dropped, `seen` what was received already. `sim` is the tests' networks.

use std::net::SocketAddr;
use std::time::Duration;

use ringtail_dataplane::{PathDecision, PeerId, RegionId, named};

use crate::key::{DiscoPublic, NodePublic};

mod candidate;
mod limit;
mod manager;
mod mtu;
mod peer;
mod pings;
mod plain;
mod quality;
mod score;
mod seen;
mod shared;
mod validation;

#[cfg(test)]
mod sim;

#[cfg(test)]
pub(crate) use candidate::candidates_max;
pub use limit::Drop;
pub use manager::Manager;

/// A Ping without Pong is forgotten after this.
pub const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Least time between two rounds' Pings to one candidate.
pub const DISCO_PING_INTERVAL: Duration = Duration::from_secs(5);
/// Period of Pings to the best address while the session is active.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(3);
/// The same while we send and nothing comes back: only Pings can judge a one-way stream.
pub const JUDGING_INTERVAL: Duration = Duration::from_secs(1);
/// Exclusive use of the best address after a Pong.
pub const TRUST_UDP_ADDR_DURATION: Duration = Duration::from_millis(6500);
/// No WireGuard packet sent for so long: heartbeats stop. Also the life of candidates that are known
/// from Pings alone.
pub const SESSION_ACTIVE_TIMEOUT: Duration = Duration::from_secs(45);
/// A better path is looked for this often although direct works.
pub const UPGRADE_UDP_DIRECT_INTERVAL: Duration = Duration::from_secs(60);
/// Unless its latency is at or below this.
pub const GOOD_ENOUGH_LATENCY: Duration = Duration::from_millis(5);
/// Own endpoints older than this are asked for again before they are announced.
pub const ENDPOINTS_FRESH_ENOUGH: Duration = Duration::from_secs(27);
/// How long an announcement waits for fresh endpoints; then it goes with those we have, and again
/// when others turn up.
pub const ANNOUNCE_WAIT: Duration = Duration::from_millis(150);
/// Least time between two announcements of unchanged endpoints to one peer.
pub const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(5);
/// Least time between two announcements of changed endpoints to one peer.
pub const ANNOUNCE_CHANGED_INTERVAL: Duration = Duration::from_millis(500);
/// While nothing is trusted, a candidate is pinged again so long after a round's Ping.
pub const QUICK_PINGS: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
];
/// Least time between two answers in kind to Pings from one address.
pub const PING_BACK_INTERVAL: Duration = Duration::from_millis(50);
/// The address that worked last is pinged this often after it was lost, while data flows.
pub const LAST_GOOD_INTERVAL: Duration = Duration::from_secs(1);
/// For so long.
pub const LAST_GOOD_DURATION: Duration = Duration::from_secs(60);
/// At most one round per peer and this time because of CallMeMaybe; addresses that are new to us are
/// pinged at once all the same.
pub const CALL_ME_MAYBE_ROUND_INTERVAL: Duration = Duration::from_secs(1);
/// A candidate that failed validation is left alone for this long.
pub const BLOCKED_DURATION: Duration = Duration::from_secs(30);
/// Rounds without any Pong before a peer is held, unless configured otherwise. One that was direct
/// before is never held: its rounds become slow.
pub const RETRY_LIMIT: u32 = 8;
/// Time between the slow rounds of a peer that was direct: one Ping to each candidate.
pub const SLOW_ROUND_INTERVAL: Duration = Duration::from_secs(6);
/// Time between two announcements of unchanged endpoints at that pace.
pub const SLOW_ANNOUNCE_INTERVAL: Duration = Duration::from_secs(30);
/// First time of holding; it doubles with each repetition.
pub const HOLD_MIN: Duration = Duration::from_secs(5 * 60);
/// Longest time of holding.
pub const HOLD_MAX: Duration = Duration::from_secs(60 * 60);
/// Data without an answer over the direct path for so long: both ways.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(1);
/// The network map's view of a measured relay round trip is renewed after this.
pub const RELAY_RTT_FRESH: Duration = Duration::from_secs(5 * 60);
/// Remembered paths older than this are not used.
pub const CACHED_PATH_AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Candidates of one peer.
pub const CANDIDATES_MAX: usize = 128;
/// Candidates of all peers together. Where there are more than 2,048 peers, each may have fewer, down to
/// the second number; no host has so many addresses.
pub const CANDIDATES_ALL_MAX: usize = 1 << 18;
/// What each peer may have in any network.
pub const CANDIDATES_MIN: usize = 16;
/// Candidates pinged in one round.
pub const CANDIDATES_PINGED_MAX: usize = 64;
/// Pings of one peer without Pong or timeout yet.
pub const PINGS_OUTSTANDING_MAX: usize = 320;
/// Remembered paths of one peer.
pub const CACHED_PATHS_MAX: usize = 4;
/// Datagrams waiting for [`Manager::poll_transmit`].
pub const TRANSMITS_MAX: usize = 8192;
/// Events waiting for [`Manager::poll_event`]; the oldest story goes first.
pub const EVENTS_MAX: usize = 4096;
/// Own endpoints that are announced.
pub const OWN_ENDPOINTS_MAX: usize = crate::disco::CALL_ME_MAYBE_ENDPOINTS_MAX;

/// How a node judges its paths.
#[derive(Clone, Debug)]
pub struct Config {
    /// MTU of the tunnel in bytes: a direct path must carry such packets.
    pub tunnel_mtu: u16,
    /// Largest wire packet worth looking for, in bytes: the MTU of the egress interface.
    pub link_mtu: u16,
    /// How a candidate is tested before it is used.
    pub validate: Validate,
    /// Silent rounds before a peer is held; 0 is Tailscale's behaviour: never.
    pub retry_limit: u32,
    /// What the shards get as silence limit.
    pub silence_limit: Duration,
    /// Whether loopback addresses can be candidates: for labs on one machine.
    pub loopback: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tunnel_mtu: 1280,
            link_mtu: 1500,
            validate: Validate::Full,
            retry_limit: RETRY_LIMIT,
            silence_limit: SILENCE_LIMIT,
            loopback: false,
        }
    }
}

/// How a candidate is tested before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validate {
    /// Loss, latency and MTU.
    Full,
    /// One Pong is enough, as for tailscaled.
    Fast,
}

/// One peer as coordination describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSetup {
    /// Its index on both sides of the boundary.
    pub id: PeerId,
    /// Its WireGuard key and DERP address.
    pub node_key: NodePublic,
    /// Its DISCO key; without one it is reached by relay alone, and without that either at the first of its
    /// endpoints or where it is heard from.
    pub disco_key: Option<DiscoPublic>,
    /// Its home region.
    pub home: Option<RegionId>,
    /// Its endpoints.
    pub endpoints: Vec<SocketAddr>,
}

impl PeerSetup {
    /// Whether it is but a WireGuard peer.
    fn is_plain(&self) -> bool {
        self.disco_key.is_none() && self.home.is_none()
    }
}

/// A path that worked, worth trying first after a restart. The driver stores it with wall-clock time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedPath {
    /// Whose.
    pub node_key: NodePublic,
    /// The address.
    pub addr: SocketAddr,
    /// Time since its last Pong.
    pub age: Duration,
    /// Round trip then.
    pub rtt: Duration,
    /// Largest wire packet then, in bytes.
    pub mtu: u16,
}

/// A way between two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Route {
    /// Direct, by UDP with this address.
    Direct(SocketAddr),
    /// Through a relay of this region.
    Relay(RegionId),
}

/// Where a datagram goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// From the discovery socket to this address.
    Udp(SocketAddr),
    /// By relay, in a SendPacket frame.
    Derp {
        /// The region, which is the peer's home: connect to it if need be.
        region: RegionId,
        /// The receiver.
        node_key: NodePublic,
    },
}

/// One sealed DISCO datagram to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// To whom.
    pub peer: PeerId,
    /// Where.
    pub via: Via,
    /// Set the don't-fragment bit and ignore the cached route MTU (`IP_MTU_DISCOVER` = PROBE).
    pub dont_fragment: bool,
    /// The payload.
    pub bytes: Vec<u8>,
}

/// What a peer said over UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// It asks whether we can be reached.
    Ping,
    /// It answered a Ping of ours.
    Pong,
}

/// Names a ping that a user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PingId(pub u64);

/// Why a Ping was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A round: is this candidate any good?
    Discovery,
    /// The peer pinged us, or packets came, from there.
    PingBack,
    /// Is the best address still good?
    Heartbeat,
    /// One of the burst of this number, which tests a candidate.
    Validate(u32),
    /// A large one with the don't-fragment bit: does the path carry wire packets of so many bytes?
    Mtu(u16),
    /// As large a one without: does it carry them in fragments?
    Fragments(u16),
    /// By relay: how long is the detour?
    RelayLatency,
    /// A user asked.
    User(PingId),
}

/// What [`Manager::poll_event`] gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Own endpoints are old or doubtful: run a netcheck now, then [`Manager::set_own_endpoints`].
    RestunWanted(RestunReason),
    /// Sending is forbidden by the host (`EPERM`): bind the sockets anew. At most every 5 s.
    RebindWanted,
    /// A peer sees us at this address: a candidate for the own endpoints.
    Reported {
        /// Who says so.
        peer: PeerId,
        /// The address.
        addr: SocketAddr,
    },
    /// The answer to [`Manager::ping`].
    PingReply {
        /// Which ping.
        id: PingId,
        /// Whose answer.
        peer: PeerId,
        /// The way it went.
        route: Route,
        /// Round trip.
        rtt: Duration,
    },
    /// No answer to [`Manager::ping`] within [`PING_TIMEOUT`].
    PingTimeout {
        /// Which ping.
        id: PingId,
        /// Who did not answer.
        peer: PeerId,
    },
    /// Something for the story.
    Story {
        /// About whom.
        peer: PeerId,
        /// What happened.
        what: Story,
    },
}

/// Why own endpoints should be looked up again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestunReason {
    /// They are to be announced and older than [`ENDPOINTS_FRESH_ENOUGH`].
    Stale,
    /// Data goes out and nothing comes back: our mapping may have changed.
    Silence,
    /// The network changed.
    LinkChange,
}

/// What happens on the way to a peer, for people and for the event log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Story {
    /// A Ping left.
    PingTx {
        /// Where to.
        route: Route,
        /// Why.
        purpose: Purpose,
    },
    /// A Pong to a Ping of ours came.
    PongRx {
        /// The way of Ping and Pong.
        route: Route,
        /// Round trip.
        rtt: Duration,
    },
    /// The peer pinged us.
    PingRx {
        /// From where.
        route: Route,
    },
    /// We told the peer where to ping us.
    CallMeMaybeTx {
        /// Our endpoints.
        endpoints: Vec<SocketAddr>,
    },
    /// The peer told us where to ping it.
    CallMeMaybeRx {
        /// Its endpoints.
        endpoints: Vec<SocketAddr>,
    },
    /// A candidate is being tested, or was.
    Validate {
        /// The candidate.
        addr: SocketAddr,
        /// How far it is.
        phase: Phase,
    },
    /// The state changed.
    Path {
        /// The new one.
        state: StateName,
        /// The best address in that state, or the one under validation.
        addr: Option<SocketAddr>,
        /// Why.
        reason: Reason,
    },
    /// A Pong to a heartbeat.
    Heartbeat {
        /// The best address.
        addr: SocketAddr,
        /// Round trip of this one.
        rtt: Duration,
        /// Lost of the last 20, in percent.
        loss_pct: u8,
        /// Smoothed change between round trips.
        jitter: Duration,
    },
}

/// How far a validation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The burst begins.
    Start,
    /// The candidate may be used.
    Pass {
        /// Median round trip.
        rtt: Duration,
        /// Lost in the last burst, in percent of those sent so far.
        loss_pct: u8,
        /// Largest wire packet known to pass whole, in bytes.
        mtu: Option<u16>,
        /// Full packets pass, but only in fragments.
        fragments: bool,
    },
    /// The candidate is left alone for [`BLOCKED_DURATION`].
    Fail {
        /// What it failed at.
        test: FailedTest,
        /// Median round trip, if any Pong came.
        rtt: Option<Duration>,
        /// Lost in the last burst, in percent.
        loss_pct: u8,
    },
}

named! {
    /// What a candidate failed at.
    pub enum FailedTest {
        /// Too many Pings unanswered.
        Loss = "loss",
        /// Far slower than the relay.
        Latency = "latency",
        /// Full packets do not pass, not even in fragments.
        Mtu = "mtu",
    }
}

named! {
    /// The states of a peer, by their names in the event log.
    pub enum StateName {
        /// By relay; nothing is being tried.
        Relay = "relay",
        /// By relay, and to the candidate under validation; candidates are being tried.
        Probing = "probing",
        /// By the best address alone.
        Direct = "direct",
        /// By the best address and by relay.
        Fallback = "fallback",
        /// By relay; trying has been given up for a while.
        Held = "held",
        /// To the one address of a peer that speaks no DISCO and has no relay.
        Plain = "plain",
    }
}

named! {
    /// Why a state changed, by its name in the event log.
    pub enum Reason {
        /// Data was sent.
        Data = "data",
        /// The peer asked to be pinged.
        CallMeMaybe = "call_me_maybe",
        /// The peer pinged us.
        PingReceived = "ping_received",
        /// A candidate passed validation.
        Validated = "validated",
        /// A better one did.
        Better = "better",
        /// The best address answered again.
        PongAgain = "pong_again",
        /// No Pong for [`TRUST_UDP_ADDR_DURATION`].
        TrustExpired = "trust_expired",
        /// The same with no data to keep heartbeats going.
        Idle = "idle",
        /// Data or a heartbeat stayed unanswered.
        Silent = "silent",
        /// The peer's packets come from another address, and the best one is quiet.
        NewSource = "new_source",
        /// A Ping to the best address timed out.
        PingTimeout = "ping_timeout",
        /// Nothing answered, and no more data.
        NoAnswer = "no_answer",
        /// The kernel refused to send there.
        SendError = "send_error",
        /// The network changed.
        LinkChange = "link_change",
        /// The best address failed its test.
        Quality = "quality",
        /// The peer no longer names the best address.
        Withdrawn = "withdrawn",
        /// [`Config::retry_limit`] rounds without any Pong.
        RetryLimit = "retry_limit",
        /// The time of holding is over.
        HoldOver = "hold_over",
        /// Something changed that makes another try worth it.
        Wake = "wake",
    }
}

/// What `ringtail status` shows of one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The state.
    pub state: StateName,
    /// Time in it.
    pub since: Duration,
    /// The decision the shards have, or will have soon.
    pub decision: PathDecision,
    /// The relay used for the peer.
    pub region: Option<RegionId>,
    /// Last measured round trip by relay.
    pub relay_rtt: Option<Duration>,
    /// The best address and how good it is.
    pub best: Option<BestStatus>,
    /// The candidate under validation.
    pub validating: Option<SocketAddr>,
    /// All candidates with their last round trip.
    pub candidates: Vec<(SocketAddr, Option<Duration>)>,
    /// How often the best address changed or was lost.
    pub switches: u32,
}

impl Status {
    /// The address that is sent to or that is best known.
    pub fn address(&self) -> Option<SocketAddr> {
        let plain = self.decision.udp.filter(|_| self.state == StateName::Plain);
        self.best.map(|best| best.addr).or(plain)
    }
}

/// Quality of a best address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BestStatus {
    /// The address.
    pub addr: SocketAddr,
    /// Smoothed round trip.
    pub rtt: Duration,
    /// Smoothed change between round trips.
    pub jitter: Duration,
    /// Heartbeats lost of the last 20, in percent.
    pub loss_pct: u8,
    /// Largest wire packet proved to pass whole, in bytes.
    pub mtu: Option<u16>,
    /// Full packets of the tunnel pass, but only in fragments.
    pub fragments: bool,
    /// Time since the last Pong.
    pub last_pong: Duration,
}

/// How deep a change of the network goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkChange {
    /// The default route or its address changed: no path can be trusted.
    Major,
    /// Something else: own endpoints may have changed.
    Minor,
}

/// Bytes of one candidate in its table, which is half full at least.
#[cfg(test)]
pub(crate) fn candidate_cost() -> usize {
    3 * size_of::<(SocketAddr, candidate::Candidate)>() / 2
}

/// Bytes of one Ping on its way.
#[cfg(test)]
pub(crate) fn ping_cost() -> usize {
    size_of::<pings::Sent>()
}

/// Pings on their way that a node's rate allows.
#[cfg(test)]
pub(crate) fn pings_max() -> usize {
    let a_second = usize::try_from(limit::NODE_PINGS_PER_S).unwrap();
    a_second * (1 + usize::try_from(PING_TIMEOUT.as_secs()).unwrap())
}
