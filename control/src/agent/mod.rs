//! Wires the cores together: the network map, the path machine and netcheck on one side, the data
//! plane and the relays on the other.
//!
//! [`Agent`] is a core like those it joins: it takes what happened (a new network, a datagram, an
//! event of a shard, time) and gives [`Output`]s for the driver to carry out. A node's life: the
//! first network brings peers, rules and the DERP map; netcheck measures the relays and the agent
//! takes the nearest as home; own endpoints go to coordination and into every CallMeMaybe; from
//! then on the path machine decides per peer and the agent passes its decisions to the shards.
//!
//! Rooms: `network` is what we were told, `allowed` which prefixes of it count, `exit` the way out, `approval` which of
//! our offers count, `enforce` puts it into force; `directory` is who is who, `sources` which address to send from,
//! `revival` whom to greet, `naming` what names come to, `standing` who may not take part, `health` what does not work,
//! `twin` a copy of us, `check` netcheck and the home region; `status`, `story`, `whois` and `configuration` are what
//! people see.

mod allowed;
mod approval;
mod check;
mod configuration;
mod directory;
mod enforce;
mod exit;
mod health;
mod naming;
mod network;
mod plain;
mod revival;
mod sources;
mod standing;
mod status;
mod story;
mod twin;
mod whois;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use ringtail_dataplane::{
    Activity, Class, Event, NetworkChange, PathDecision, PeerId, Prefix, RegionId, classify,
};
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::config::Prefs;
use crate::dns::Wish;
use crate::hostnet::Overlay;
use crate::key::{DiscoPrivate, DiscoPublic, NodePublic};
use crate::netcheck::{Netcheck, OwnEndpoint};
use crate::netmap::DerpMap;
use crate::path::{self, LinkChange, Manager, PingId, Route, Via};

use allowed::Allowed;
use exit::ExitNode;
use health::Health;
use naming::Named;
use plain::Fitted;
use sources::Sources;
use twin::Twin;

pub use directory::Directory;
pub use health::HEALTH_LINES_MAX;
pub use network::{HeldBack, HoldReason, Network, NetworkPeer, Standing};
pub use plain::Plain;
pub use status::Surroundings;
pub use story::millis;

use revival::Revival;
pub(crate) use revival::heard_lately;

/// The tunnel counts as used for so long after its last packet.
const TUNNEL_ACTIVE: Duration = Duration::from_secs(45);
/// So often the agent looks whether it still is.
const ACTIVE_CHECK_PERIOD: Duration = Duration::from_secs(5);
/// User pings that wait for their answer at most.
const PINGS_MAX: usize = 256;
// The network map drops no endpoint of a peer that the path machine has room for.
const _: () = assert!(crate::netmap::ENDPOINTS_MAX >= path::CANDIDATES_MAX);

/// What does not change while a node runs.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Own WireGuard key.
    pub node_key: NodePublic,
    /// What DISCO is sealed with.
    pub disco_key: DiscoPrivate,
    /// How paths are judged.
    pub paths: path::Config,
    /// No direct paths at all.
    pub relay_only: bool,
    /// UDP port of the tunnel.
    pub local_port: u16,
    /// Whether somebody chose that port.
    pub port_is_fixed: bool,
    /// Name of the TUN interface.
    pub tun: String,
    /// TCP ports of our peer API, IPv4 and IPv6.
    pub peerapi: [Option<u16>; 2],
}

/// What the driver is to do.
#[derive(Clone, Debug)]
pub enum Output {
    /// Tell the data plane what is another of peers and rules, as one. What counts as us: own addresses
    /// and the routes we offer.
    ChangeNetwork(NetworkChange),
    /// Give the data plane this decision.
    SetPath(PeerId, PathDecision),
    /// Ask the data plane for a handshake with this peer.
    Initiate(PeerId),
    /// Tell the data plane that so many bytes came from this peer that it cannot open.
    Unopened(PeerId, usize),
    /// These are the peers: whoever else sends, by relay or to the discovery socket, is a stranger.
    SetPeers {
        /// Their node keys.
        nodes: Vec<NodePublic>,
        /// Their DISCO keys; none where DISCO is not wanted.
        disco: Vec<DiscoPublic>,
    },
    /// Give the TUN these addresses, and the host routes into it.
    Configure(Overlay),
    /// Answer for names by this, and have the host's resolver ask for them.
    SetDns(Arc<Wish>),
    /// Send a DISCO datagram from the discovery socket; a failure goes to
    /// [`Agent::handle_send_error`].
    Datagram {
        /// To whom.
        peer: PeerId,
        /// Where to.
        to: SocketAddr,
        /// Which of our addresses to send it from; without one routing chooses.
        local: Option<IpAddr>,
        /// The payload.
        bytes: Vec<u8>,
        /// With the don't-fragment bit.
        dont_fragment: bool,
    },
    /// Send a STUN request from the discovery socket; a failure goes to
    /// [`Agent::handle_stun_error`].
    Stun {
        /// The relay's STUN address.
        to: SocketAddr,
        /// The payload.
        bytes: Vec<u8>,
    },
    /// Send a DISCO packet by relay.
    Relay {
        /// The region.
        region: RegionId,
        /// The receiver.
        to: NodePublic,
        /// The payload.
        bytes: Vec<u8>,
    },
    /// Give the relay connections this map.
    SetDerpMap(DerpMap),
    /// Make this region the home.
    SetHome(RegionId),
    /// The wall clock was set: have coordination say anew what its times are by it.
    AskForMap,
    /// Own endpoints or the home changed: tell coordination ([`Agent::self_report`]).
    Publish,
    /// Look up this host name for STUN and give the answer to [`Agent::handle_resolved`].
    Resolve(String),
    /// Measure these regions by HTTPS and give the result to [`Agent::handle_https_latency`].
    MeasureHttps(Vec<RegionId>),
    /// Read the host's interfaces again and give them to [`Agent::handle_interfaces`].
    ListInterfaces,
    /// Write an event to the log.
    Story(&'static str, Value),
    /// An answer to a question of the status socket, by the number the driver gave.
    Answer(u64, Value),
    /// No more answers to that question.
    AnswerEnd(u64),
}

/// A peer inside the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inside {
    /// Who it is.
    pub peer: PeerId,
    /// What people call it.
    pub name: String,
    /// The address of ours that it is reached from.
    pub ours: IpAddr,
    /// Its own.
    pub theirs: IpAddr,
    /// The TCP port of its peer API there.
    pub peerapi: Option<u16>,
}

/// All of a node that decides.
pub struct Agent {
    setup: Setup,
    /// What a person wants.
    prefs: Prefs,
    /// What became of the exit node that is wanted.
    exit: ExitNode,
    /// Addresses of the host's interfaces, with the lengths of their subnets.
    subnets: BTreeSet<IpNet>,
    /// What a routing daemon of the host offers.
    handed: BTreeSet<IpNet>,
    /// What this node offers and cannot reach.
    lost: BTreeSet<IpNet>,
    /// What of it the network has approved, and has not, where that decides who gets there.
    approved: BTreeSet<IpNet>,
    unapproved: BTreeSet<IpNet>,
    /// Where peers get, as the data plane was told.
    local: Vec<Prefix>,
    /// Whether it was told that nobody may begin anything, whatever the rules.
    shielded: bool,
    /// What the host is to have, as it was told.
    overlay: Option<Overlay>,
    /// The settings file's own peers.
    plain: Vec<Arc<NetworkPeer>>,
    /// The filter as it is fitted to them.
    fitted: Option<Fitted>,
    /// The network as told.
    told: Option<Network>,
    /// What of it is in force.
    network: Option<Network>,
    /// Which prefixes of peers count, and which do not.
    allowed: Allowed,
    /// Those that do not, in sentences.
    refused: BTreeSet<String>,
    health: Health,
    /// Names, as they were told last.
    named: Named,
    /// The wall clock as told last, when that was, and when the next key expires by it.
    wall: OffsetDateTime,
    wall_told: Option<Instant>,
    /// The network is coordination's word in this run: its times were right when they came, whatever
    /// the wall clock said.
    times_are_right: bool,
    next_expiry: Option<OffsetDateTime>,
    /// When to be told the wall clock again.
    expiry_check: Option<Instant>,
    directory: Directory,
    paths: Manager,
    netcheck: Netcheck,
    revival: Revival,
    home: Option<RegionId>,
    /// Ways to peers whose first packet has been told: by relay, out and in.
    relay_told: BTreeSet<(PeerId, bool)>,
    /// User pings by number: the question and the peer.
    pings: BTreeMap<PingId, u64>,
    /// Questions that wait for the end of a netcheck.
    netcheck_waiters: Vec<u64>,
    /// When to look whether the tunnel is still in use; none while it is not.
    active_check: Option<Instant>,
    /// Own endpoints, best first.
    endpoints: Vec<OwnEndpoint>,
    /// Where peers reach us.
    sources: Sources,
    twin: Twin,
    /// How often coordination was told again what it had wrong.
    corrections: u32,
    /// Whose datagram is being answered, and which address of ours it came to.
    answering: Option<(SocketAddr, IpAddr)>,
    drops: BTreeMap<&'static str, u64>,
    out: VecDeque<Output>,
}

impl Agent {
    /// An agent that knows nobody yet. `seed` comes from the operating system.
    pub fn new(now: Instant, setup: Setup, seed: [u8; 32]) -> Self {
        let mut rng = StdRng::from_seed(seed);
        let paths = Manager::new(
            now,
            setup.paths.clone(),
            setup.node_key,
            setup.disco_key.clone(),
            StdRng::from_seed(rng.random()),
        );
        let netcheck = Netcheck::new(
            setup.local_port,
            setup.port_is_fixed,
            setup.paths.loopback,
            StdRng::from_seed(rng.random()),
        );
        Self {
            setup,
            prefs: Prefs::default(),
            exit: ExitNode::default(),
            subnets: BTreeSet::new(),
            handed: BTreeSet::new(),
            lost: BTreeSet::new(),
            approved: BTreeSet::new(),
            unapproved: BTreeSet::new(),
            local: Vec::new(),
            shielded: false,
            overlay: None,
            plain: Vec::new(),
            fitted: None,
            told: None,
            network: None,
            allowed: Allowed::default(),
            refused: BTreeSet::new(),
            health: Health::default(),
            named: Named::default(),
            wall: OffsetDateTime::UNIX_EPOCH,
            wall_told: None,
            times_are_right: false,
            next_expiry: None,
            expiry_check: None,
            directory: Directory::default(),
            paths,
            netcheck,
            revival: Revival::default(),
            home: None,
            relay_told: BTreeSet::new(),
            pings: BTreeMap::new(),
            netcheck_waiters: Vec::new(),
            active_check: None,
            endpoints: Vec::new(),
            sources: Sources::default(),
            twin: Twin::default(),
            corrections: 0,
            answering: None,
            drops: BTreeMap::new(),
            out: VecDeque::new(),
        }
    }

    /// Takes a datagram of the discovery socket, sent to our address `local` where that is known.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        at: Instant,
        from: SocketAddr,
        local: Option<IpAddr>,
        bytes: &[u8],
    ) {
        match classify(bytes) {
            Class::Stun => {
                // Netcheck has counted what it refuses.
                let _ = self.netcheck.handle_datagram(at, bytes);
            }
            Class::Disco if self.setup.relay_only => self.drop_one("disco_relay_only"),
            Class::Disco => {
                // The manager has counted what it refuses.
                if let (Ok(what), Some(local)) =
                    (self.paths.handle_datagram(at, from, bytes), local)
                {
                    self.sources.heard(at, from, local, what);
                    self.answering = Some((from, local));
                }
            }
            Class::PeerRelay => self.drop_one("peer_relay"),
            // Steering sends WireGuard elsewhere: what is left is junk.
            Class::Data(_) | Class::Handshake | Class::Invalid(_) => {
                self.drop_one("discovery_junk");
            }
        }
        self.settle(now);
    }

    /// Takes a DISCO packet that came by relay.
    pub fn handle_relayed_disco(
        &mut self,
        now: Instant,
        region: RegionId,
        from: NodePublic,
        bytes: &[u8],
    ) {
        // The manager has counted what it refuses.
        let _ = self.paths.handle_relayed(now, region, from, bytes);
        self.settle(now);
    }

    /// Tells whose WireGuard packets these are that came by relay; strangers' are counted.
    pub fn handle_relayed_data(
        &mut self,
        now: Instant,
        region: RegionId,
        from: NodePublic,
        packets: usize,
    ) -> Option<PeerId> {
        let Some(id) = self.directory.id(&from) else {
            self.drop_many("relay_unknown_source", packets);
            return None;
        };
        self.tell_relay_first(id, region, false);
        self.paths.handle_relay_arrival(now, id, region);
        self.settle(now);
        Some(id)
    }

    /// Packets came by relay for a peer that the data plane no longer has.
    pub fn count_relayed_too_late(&mut self, packets: usize) {
        self.drop_many("relay_peer_gone", packets);
    }

    /// Tells the node key behind a batch that leaves by relay.
    pub fn handle_relay_out(
        &mut self,
        id: PeerId,
        region: RegionId,
        packets: usize,
    ) -> Option<NodePublic> {
        let Some(key) = self.directory.peer(id).map(|peer| peer.node_key) else {
            self.drop_many("relay_unknown_peer", packets);
            return None;
        };
        self.tell_relay_first(id, region, true);
        Some(key)
    }

    /// Takes news of the data plane.
    pub fn handle_dataplane(&mut self, now: Instant, event: &Event, activity: &Activity) {
        match *event {
            Event::SessionUp(id) | Event::SessionDown(id) => {
                let up = matches!(event, Event::SessionUp(_));
                let peer = self.peer_name(id);
                self.story("session", json!({"peer": peer, "up": up}));
            }
            Event::Kick(_) | Event::Active(_) => {
                self.active_check = self.active_check.or(Some(now + ACTIVE_CHECK_PERIOD));
                self.netcheck.set_active(now, true);
            }
            Event::Unopened(from, bytes) => {
                let id = self.paths.peer_at(from);
                self.out.extend(id.map(|id| Output::Unopened(id, bytes)));
            }
            Event::NewSource(..)
            | Event::Silent(_)
            | Event::SendError(..)
            | Event::Pong(..)
            | Event::TunGone
            | Event::Failed(_) => {}
        }
        self.paths.handle_event(now, event, activity);
        self.settle(now);
    }

    /// The machine has slept for so long. Whatever was true of the network may not be, and peers may
    /// go on with keys that are too old here, or have dropped those that seem fresh.
    pub fn handle_resume(
        &mut self,
        now: Instant,
        slept: Duration,
        activity: &dyn Fn(PeerId) -> Activity,
    ) {
        self.handle_link_change(now, LinkChange::Major);
        let before = now.checked_sub(slept).unwrap_or(now);
        let mut heard: Vec<(Instant, PeerId)> = self
            .directory
            .iter()
            .filter_map(|(id, _)| Some((heard_lately(&activity(id), before)?, id)))
            .collect();
        heard.sort_unstable_by_key(|(at, _)| std::cmp::Reverse(*at));
        self.revival.ask(now, heard.into_iter().map(|(_, id)| id));
        self.settle(now);
    }

    /// The peers to be remembered for the next run ([`Self::remember_sessions`]).
    pub fn sessions(&self, now: Instant, activity: &dyn Fn(PeerId) -> Activity) -> Vec<NodePublic> {
        let heard = self
            .directory
            .iter()
            .filter_map(|(id, peer)| Some((activity(id).last_received?, peer.node_key)));
        self.revival.to_remember(now, heard.collect())
    }

    /// Takes the peers that an earlier run had sessions with, heard last first: there will be
    /// handshakes with those of them that are peers now, or become it.
    pub fn remember_sessions(&mut self, now: Instant, peers: Vec<NodePublic>) {
        self.revival.remember(now, peers);
        self.revival.meet(now, |key| self.directory.id(key));
        self.settle(now);
    }

    /// A datagram of ours for a peer, of `len` bytes, could not be sent.
    pub fn handle_send_error(
        &mut self,
        now: Instant,
        peer: PeerId,
        to: SocketAddr,
        errno: i32,
        len: usize,
    ) {
        if errno == nix::libc::EMSGSIZE {
            // A probe of the path's MTU, larger than the device's: an answer, and no fault.
            self.paths.handle_too_big(now, peer, to, len);
        } else {
            self.drop_one("disco_send_error");
            self.paths.handle_send_error(now, peer, to, errno);
        }
        self.settle(now);
    }

    /// A STUN request could not be sent.
    pub fn handle_stun_error(&mut self, now: Instant, to: SocketAddr, errno: i32) {
        self.drop_one("stun_send_error");
        // A host firewall's refusal is a loss on the way, not a missing route.
        if errno != nix::libc::EPERM {
            self.netcheck.handle_send_error(to);
        }
        self.settle(now);
    }

    /// Coordination can be told of a new home, or not; without it the home stays where peers
    /// expect us.
    pub fn handle_coordination(&mut self, up: bool) {
        self.netcheck.set_control_up(up);
    }

    /// Takes the home relay of an earlier run, before there is a network: peers may know of no other
    /// while coordination is down.
    pub fn remember_home(&mut self, region: RegionId) {
        self.netcheck.remember_home(region);
    }

    /// The home relay that peers know of, to be remembered for the next run.
    pub fn told_home(&self) -> Option<RegionId> {
        self.netcheck.told_home()
    }

    /// The host's network changed: read its addresses again, then decide how deep it went.
    pub fn handle_link_change(&mut self, now: Instant, change: LinkChange) {
        if change == LinkChange::Major {
            self.sources.clear();
        }
        self.paths.handle_link_change(now, change);
        self.netcheck.handle_link_change(now);
        self.out.push_back(Output::ListInterfaces);
        self.settle(now);
    }

    /// Pings a peer for the question `question`; the answers follow as [`Output::Answer`].
    pub fn handle_ping(&mut self, now: Instant, question: u64, peer: &str) {
        let started = self.node_called(peer).and_then(|id| {
            if self.pings.len() >= PINGS_MAX {
                return Err("too many pings are under way; try again".into());
            }
            let ping = self.paths.ping(now, id);
            ping.ok_or_else(|| {
                let name = self.peer_name(id);
                format!("{name} has neither a relay nor an address to ping")
            })
        });
        match started {
            Ok(ping) => {
                self.pings.insert(ping, question);
            }
            Err(error) => self.answer(question, json!({"error": error})),
        }
        self.settle(now);
    }

    /// Where a person's ping of this peer through the tunnel goes: to the address that is named, or else to the
    /// first that fits, with a peer API if there is such.
    ///
    /// # Errors
    /// There is no such node, or it is not to be reached so: a sentence.
    pub fn inside(&self, peer: &str) -> Result<Inside, String> {
        let id = self.node_called(peer)?;
        let name = self.peer_name(id);
        let none = || format!("{name} has no address that this node reaches by the tunnel");
        let own = self.network.as_ref().map(|network| &network.addresses);
        let (Some(own), Some(there)) = (own, self.directory.peer(id)) else {
            return Err(none());
        };
        let named: Option<IpAddr> = peer.parse().ok();
        let addresses = there.addresses.iter().filter_map(|net| {
            let theirs = net.addr();
            let ours = own.iter().map(IpNet::addr);
            // What is somebody else's by now leads elsewhere.
            let counts = there.allowed_ips.iter().any(|net| net.contains(&theirs));
            let fits = counts && named.is_none_or(|named| named == theirs);
            Some(Inside {
                peer: id,
                name: name.clone(),
                ours: ours
                    .filter(|_| fits)
                    .find(|ours| ours.is_ipv4() == theirs.is_ipv4())?,
                theirs,
                peerapi: there.peerapi[usize::from(theirs.is_ipv6())],
            })
        });
        addresses
            .min_by_key(|at| at.peerapi.is_none())
            .ok_or_else(none)
    }

    /// The node that a person means, which is none of the settings file's peers.
    fn node_called(&self, peer: &str) -> Result<PeerId, String> {
        let found = self.directory.find(peer);
        let held_back = || self.network.as_ref()?.why_held_back(peer);
        let id = found.map_err(|unknown| held_back().unwrap_or(unknown))?;
        if self.paths.is_plain(id) {
            return Err(format!(
                "{} is but a WireGuard peer: ping an address that it has inside the tunnel",
                self.peer_name(id)
            ));
        }
        Ok(id)
    }

    /// Does what is due. `activity` reads what the shards know of a peer's traffic.
    pub fn handle_timeout(&mut self, now: Instant, activity: &dyn Fn(PeerId) -> Activity) {
        self.paths.handle_timeout(now, activity);
        self.netcheck.handle_timeout(now);
        self.correct(now);
        let due = self.revival.take_due(now, activity).into_iter();
        self.out.extend(due.map(Output::Initiate));
        if self.active_check.is_some_and(|at| at <= now) {
            let used = |id| {
                let last = activity(id);
                last.last_sent
                    .max(last.last_received)
                    .is_some_and(|t| now < t + TUNNEL_ACTIVE)
            };
            let active = self.directory.iter().any(|(id, _)| used(id));
            self.active_check = active.then(|| now + ACTIVE_CHECK_PERIOD);
            self.netcheck.set_active(now, active);
        }
        self.settle(now);
    }

    /// When [`Self::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        [
            self.paths.poll_timeout(),
            self.netcheck.poll_timeout(),
            self.revival.poll_timeout(),
            self.twin.correct_at(),
            self.active_check,
            self.expiry_check,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// A peer's node key.
    pub fn peer_key(&self, id: PeerId) -> Option<NodePublic> {
        self.directory.peer(id).map(|peer| peer.node_key)
    }

    /// Paths worth remembering over a restart.
    pub fn cached_paths(&self, now: Instant) -> Vec<path::CachedPath> {
        self.paths.cached_paths(now)
    }

    /// Takes paths remembered from an earlier run, once there are peers.
    pub fn load_cached_paths(&mut self, now: Instant, paths: &[path::CachedPath]) {
        self.paths.load_cached_paths(now, paths);
        self.settle(now);
    }

    /// A region's code by its number, or the number.
    pub fn region_code(&self, id: RegionId) -> String {
        let regions = self
            .network
            .as_ref()
            .map(|network| &network.derp_map.regions);
        match regions.and_then(|regions| regions.get(&id.0)) {
            Some(region) if !region.region_code.is_empty() => region.region_code.clone(),
            Some(_) | None => id.0.to_string(),
        }
    }

    /// Adds an event to the story.
    pub fn story(&mut self, event: &'static str, fields: Value) {
        self.out.push_back(Output::Story(event, fields));
    }

    fn peer_name(&self, id: PeerId) -> String {
        self.directory
            .peer(id)
            .map_or_else(|| format!("#{}", id.0), |peer| short_name(&peer.name))
    }

    fn drop_one(&mut self, reason: &'static str) {
        self.drop_many(reason, 1);
    }

    fn drop_many(&mut self, reason: &'static str, count: usize) {
        *self.drops.entry(reason).or_default() += count as u64;
    }

    /// Drains the path machine and netcheck into outputs.
    fn settle(&mut self, now: Instant) {
        let answering = self.answering.take();
        while let Some((id, mut decision)) = self.paths.poll_decision() {
            decision.local = decision.udp.and_then(|to| self.sources.of(to));
            self.out.push_back(Output::SetPath(id, decision));
        }
        while let Some(transmit) = self.paths.poll_transmit() {
            match transmit.via {
                Via::Udp(_) if self.setup.relay_only => {}
                Via::Udp(to) => self.out.push_back(Output::Datagram {
                    peer: transmit.peer,
                    to,
                    local: match answering {
                        Some((from, local)) if from == to => Some(local),
                        Some(_) | None => self.sources.of(to),
                    },
                    bytes: transmit.bytes,
                    dont_fragment: transmit.dont_fragment,
                }),
                Via::Derp { region, node_key } => {
                    self.out.push_back(Output::Relay {
                        region,
                        to: node_key,
                        bytes: transmit.bytes,
                    });
                }
            }
        }
        while let Some(event) = self.paths.poll_event() {
            self.path_event(now, event);
        }
        self.settle_netcheck(now);
    }

    fn path_event(&mut self, now: Instant, event: path::Event) {
        match event {
            // EPERM is a firewall's refusal, and a new socket would meet the same rule: look at our
            // endpoints again instead of binding anew.
            path::Event::RestunWanted(_) | path::Event::RebindWanted => {
                self.netcheck.start(now, false)
            }
            path::Event::Reported { peer, addr } => self.reported(now, peer, addr),
            path::Event::PingReply {
                id,
                peer,
                route,
                rtt,
            } => {
                let peer = self.peer_name(peer);
                let latency_ms = millis(rtt);
                let answer = match route {
                    Route::Direct(address) => json!({"peer": peer, "via": "direct",
                        "address": address, "latency_ms": latency_ms}),
                    Route::Relay(region) => json!({"peer": peer, "via": "relay",
                        "region": self.region_code(region), "latency_ms": latency_ms}),
                };
                self.answer_ping(id, answer);
            }
            path::Event::PingTimeout { id, peer } => {
                let peer = self.peer_name(peer);
                self.answer_ping(id, json!({"peer": peer, "reason": "no answer within 5 s"}));
            }
            path::Event::Story { peer, what } => {
                let name = self.peer_name(peer);
                let (event, fields) =
                    story::describe(&name, &what, |id| self.region_code(RegionId(id)));
                self.story(event, fields);
            }
        }
    }

    /// One answer is enough: the first of any way.
    fn answer_ping(&mut self, ping: PingId, answer: Value) {
        if let Some(question) = self.pings.remove(&ping) {
            self.answer(question, answer);
        }
    }

    fn answer(&mut self, question: u64, answer: Value) {
        let end = Output::AnswerEnd(question);
        self.out.extend([Output::Answer(question, answer), end]);
    }

    fn tell_relay_first(&mut self, id: PeerId, region: RegionId, out: bool) {
        if self.relay_told.insert((id, out)) {
            let dir = if out { "tx" } else { "rx" };
            let fields =
                json!({"peer": self.peer_name(id), "region": self.region_code(region), "dir": dir});
            self.story("relay_first", fields);
        }
    }
}

/// A name without the network's domain.
fn short_name(name: &str) -> String {
    name.split('.').next().unwrap_or(name).to_owned()
}

#[cfg(test)]
mod tests;
