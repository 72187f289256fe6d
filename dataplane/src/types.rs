//! What crosses the boundary between the control thread and the shards.

use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Names a peer on both sides of the boundary: an index below [`PEERS_MAX`], given by the control
/// side, kept for as long as the peer's node key stays the same, and then free for reuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub u32);

/// Peers a data plane holds at most.
pub const PEERS_MAX: usize = 16_384;

/// A DERP region, as numbered by the DERP map; positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub u32);

/// An IP prefix in masked form: host bits are zero. As text it is `ADDR/BITS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "IpNet", into = "IpNet")]
pub struct Prefix {
    /// Network address.
    pub addr: IpAddr,
    /// Leading bits that count: 0 to 32 for IPv4, 0 to 128 for IPv6.
    pub bits: u8,
}

impl From<IpNet> for Prefix {
    fn from(net: IpNet) -> Self {
        Self {
            addr: net.network(),
            bits: net.prefix_len(),
        }
    }
}

impl From<Prefix> for IpNet {
    /// The address alone where it has fewer bits than the prefix.
    fn from(prefix: Prefix) -> Self {
        Self::new(prefix.addr, prefix.bits).unwrap_or_else(|_| prefix.addr.into())
    }
}

/// One peer as the data plane knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerConfig {
    /// The peer's index.
    pub id: PeerId,
    /// WireGuard public key (Curve25519, 32 bytes), which is also the DERP address.
    pub public_key: [u8; 32],
    /// WireGuard preshared key (32 bytes), if any.
    pub preshared_key: Option<zeroize::Zeroizing<[u8; 32]>>,
    /// Inner prefixes routed to the peer and accepted from it (cryptokey routing).
    pub allowed_ips: Vec<Prefix>,
    /// Persistent keep-alive in seconds, if any (WireGuard paper §6.5 is about the passive one).
    pub persistent_keepalive: Option<u16>,
    /// It is none of the network's: our peerapi is closed to it, and its pings by TSMP are not answered.
    pub outsider: bool,
}

impl PeerConfig {
    /// A peer without a preshared key, allowed IPs and keep-alive.
    #[must_use]
    pub fn new(id: PeerId, public_key: [u8; 32]) -> PeerConfig {
        PeerConfig {
            id,
            public_key,
            preshared_key: None,
            allowed_ips: Vec::new(),
            persistent_keepalive: None,
            outsider: false,
        }
    }
}

/// What is another in the network, in which there are no peers and nobody may reach us at first. Every
/// shard takes it over in one step: no packet of a new peer meets older rules, none of a peer that went
/// meets newer ones. What it costs depends on what it names, not on how many peers there are.
#[derive(Clone, Debug, Default)]
pub struct NetworkChange {
    /// Peers that are new or have another configuration, each once. A prefix that is new for one goes
    /// to it from whoever had it, unless it is reserved; who lost it is not given it back.
    pub peers: Vec<PeerConfig>,
    /// Peers that are no more. Who is in `peers` too stays, and gets its prefixes anew.
    pub gone: Vec<PeerId>,
    /// What belongs to no peer even where the allowed IPs of one cover it, if that is another: own
    /// addresses, those of nodes that are held back. A longer prefix of a peer inside counts, an equal one
    /// does not.
    pub reserved: Option<Vec<Prefix>>,
    /// Who may reach us, and our own addresses with the routes we advertise, if one of them is another:
    /// packets to others are refused, whatever the rules; `None` skips that.
    pub rules: Option<(Rules, Option<Vec<Prefix>>)>,
    /// Where our peerapi listens, if that is another.
    pub peerapi: Option<PeerApi>,
}

/// Where our peerapi listens by TCP: an own address of each family with its port, if it does. Every peer of
/// the network may connect there, whatever the rules: it judges by itself who may do what. Pings by TSMP,
/// which are answered in any case, are told the port. For a peer that is an
/// [outsider](PeerConfig::outsider) there is neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerApi {
    /// By IPv4.
    pub v4: Option<SocketAddrV4>,
    /// By IPv6.
    pub v6: Option<SocketAddrV6>,
}

impl PeerApi {
    /// The port at one of our addresses.
    #[inline]
    #[must_use]
    pub fn port(&self, at: IpAddr) -> Option<u16> {
        match at {
            IpAddr::V4(at) => self.v4.filter(|api| *api.ip() == at).map(|api| api.port()),
            IpAddr::V6(at) => self.v6.filter(|api| *api.ip() == at).map(|api| api.port()),
        }
    }
}

impl NetworkChange {
    /// Whether it names nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let peers = self.peers.is_empty() && self.gone.is_empty();
        let rules = self.rules.is_none() && self.peerapi.is_none();
        peers && self.reserved.is_none() && rules
    }
}

/// How to reach one peer: an immutable record, replaced whole; only the newest counts
/// (`protocol/paths.md` §16).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathDecision {
    /// Grows with every decision for the peer.
    pub generation: u64,
    /// The best direct address, trusted or not.
    pub udp: Option<SocketAddr>,
    /// Which of our addresses to send to `udp` from, where routing would choose another: the one
    /// that the path was validated with.
    pub local: Option<IpAddr>,
    /// The region at which the peer can be reached by relay.
    pub derp: Option<RegionId>,
    /// `udp` is used alone up to this moment; after it data goes both ways. The shard compares it
    /// with its own clock, so a stalled control thread degrades to both, never to a black hole.
    pub trust_until: Option<Instant>,
    /// Data sent for this long with nothing authenticated back over `udp` means both ways too.
    pub silence_limit: Duration,
    /// Largest wire packet (IP header included) known to pass on `udp`, in bytes.
    pub path_mtu: u16,
    /// The peer sends by relay though our direction is known to work: its arrivals by relay say
    /// nothing against `udp`.
    pub relayed_alone: bool,
}

/// Who may reach us; by default nobody. In a file, `null` or the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Rules {
    /// Every authenticated peer may send anything its allowed IPs cover to what is ours.
    AllowAll,
    /// Inbound packets need a rule or a remembered outbound flow; an empty list denies all.
    List(Vec<Rule>),
}

impl Default for Rules {
    fn default() -> Rules {
        Rules::List(Vec::new())
    }
}

/// One packet filter rule: any source prefix, any destination, one of the protocols.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Source prefixes.
    pub sources: Vec<Prefix>,
    /// Destination prefixes with an inclusive port range each; ports do not matter for protocols
    /// without ports.
    pub destinations: Vec<(Prefix, u16, u16)>,
    /// IP protocol numbers. The control side expands "default" before it gets here.
    pub protocols: Vec<u8>,
}

/// Sealed WireGuard datagrams of one peer on their way to or from a relay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Datagrams {
    /// The datagrams back to back.
    pub bytes: Vec<u8>,
    /// Their lengths in bytes, in order; they add up to `bytes.len()`.
    pub lens: Vec<u16>,
}

/// A batch that leaves or came by relay.
#[derive(Clone, Debug)]
pub struct RelayBatch {
    /// Whom it is for or from.
    pub peer: PeerId,
    /// The region of the relay: the way out is that of the peer's latest [`PathDecision`].
    pub region: RegionId,
    /// The sealed datagrams.
    pub datagrams: Datagrams,
}

/// What the shards tell the control thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Data was sent while no path was trusted; at most one per peer and 100 ms. Also sent when a
    /// handshake starts without any path.
    Kick(PeerId),
    /// First data after at least 3 s without: arms the heartbeat even when the path is trusted.
    Active(PeerId),
    /// An authenticated packet came from an address other than the decided one.
    NewSource(PeerId, SocketAddr),
    /// The silence limit passed: the shard has begun to send both ways by itself.
    Silent(PeerId),
    /// Sending to the address failed with this errno (`ENETUNREACH`, `EPERM`, `EMSGSIZE`, …).
    SendError(PeerId, SocketAddr, i32),
    /// A handshake completed; keys are fresh.
    SessionUp(PeerId),
    /// No usable session is left.
    SessionDown(PeerId),
    /// The peer has answered the [`Ping`] of this number; its peerapi is at this TCP port, 0 for none.
    Pong(PeerId, u64, u16),
    /// So many bytes of data came from the address that belong to no session: whoever is there may
    /// have keys that we have lost. Tell [`Dataplane::unopened`](crate::Dataplane::unopened) if a peer
    /// is known to be there. A few a second at most; anybody can cause it.
    Unopened(SocketAddr, usize),
    /// The TUN device is gone; nothing more will be moved. Now and then this is not told: see
    /// [`Dataplane::tun_is_there`](crate::Dataplane::tun_is_there).
    TunGone,
    /// A thread of the data plane failed, for this reason: what it did, nobody does any more. Comes
    /// before all other events, and is never lost.
    Failed(String),
}

/// A ping by TSMP, which a node answers itself, whatever its filter and host say. Addresses are of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ping {
    /// By which the answer is known.
    pub number: u64,
    /// One of ours.
    pub src: IpAddr,
    /// One of the peer's own.
    pub dst: IpAddr,
}

/// What the shards know of one peer's traffic, read without disturbing them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Activity {
    /// Last authenticated arrival on any path.
    pub last_received: Option<Instant>,
    /// Last authenticated arrival from the decided UDP address.
    pub last_received_direct: Option<Instant>,
    /// Last data or handshake message sent (keep-alives count).
    pub last_sent: Option<Instant>,
    /// Last completed handshake.
    pub last_handshake: Option<Instant>,
    /// Sealed bytes sent, both paths.
    pub tx_bytes: u64,
    /// Sealed bytes received and authenticated, both paths.
    pub rx_bytes: u64,
    /// Of `tx_bytes`, those that left by relay.
    pub tx_relay_bytes: u64,
    /// Of `rx_bytes`, those that came by relay.
    pub rx_relay_bytes: u64,
}
