//! The state of a coordination server: nodes, map streams, who is online, which routes count.
//!
//! A node comes in by [`Server::plan_register`]: the plan is committed to the store first and then
//! put into force by [`Server::apply`], so nothing is answered that a crash could undo. Map
//! requests report a node's state and may open a session ([`Server::handle_map`]). Changes are
//! collected for [`TICK`]; then every session that can take a message is given the difference
//! between what it was sent and what holds now ([`Server::poll_session`]). A slow reader therefore
//! never makes a queue grow: it gets one larger difference later. What has to survive a restart
//! beyond the committed part is written behind ([`Server::take_writes`]).
//!
//! A node that was removed is sent one last message and its streams end. One whose key has expired
//! is told of itself and of nobody else, and what it reports is not taken; it counts as a peer that
//! has expired until it registers anew. What an administrator orders is planned in [`super::admin`].
//!
//! Rules: `protocol/coordination-server.md` §4 to §6. Everybody may reach everybody in this
//! version, so every node sees every other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::STAYED_AWAY;
use super::address::{self, AddressPlan};
use super::auth_key::KeyCheck;
use super::frames::Codec;
use super::routes::{self, announced, left_out};
use crate::key::{DiscoPublic, MachinePublic, NodePublic};
use crate::netmap::wire::{
    CapMap, Debug, FilterRule, MapRequest, MapResponse, Node, PeerChange, RegisterLogin,
    RegisterRequest, RegisterResponse, RegisterUser, UserProfile, WireTime,
};
use crate::netmap::{DerpMap, PEERS_MAX};

/// Clients below this capability version are refused, as Headscale 0.29 does.
pub const CAPABILITY_VERSION_MIN: i64 = 113;

/// Changes within this time go out together.
pub const TICK: Duration = Duration::from_millis(100);

/// A stream that ended leaves its node online for this long, so that a reconnect disturbs nobody.
pub const OFFLINE_DELAY: Duration = Duration::from_secs(10);

/// After a start nobody is told that a node is offline before this has passed: real clients need
/// up to 10 s to come back.
pub const START_GRACE: Duration = Duration::from_secs(30);

/// Shortest and longest time between signs of life on a stream.
const KEEP_ALIVE: [Duration; 2] = [Duration::from_secs(50), Duration::from_secs(59)];

/// Endpoints kept per node.
pub const ENDPOINTS_MAX: usize = 64;

/// `Hostinfo` at most, as JSON bytes: every peer gets a copy.
pub const HOSTINFO_LEN_MAX: usize = 16 * 1024;

/// Streams of one node; the oldest ends when there are more.
const SESSIONS_PER_NODE_MAX: usize = 4;

/// Ephemeral nodes that stayed away and would be told so, at most: the latest.
const STAYED_AWAY_MAX: usize = 1024;

/// The one owner of all nodes of this version.
const USER_ID: i64 = 1;

/// What a server is told at its start.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Suffix of all names, without dots at the ends.
    pub base_domain: String,
    /// Name of the owner of all nodes.
    pub user: String,
    /// Shown to clients as the network's name.
    pub domain: String,
    /// Where addresses come from.
    pub addresses: AddressPlan,
    /// The relays.
    pub derp_map: DerpMap,
    /// An ephemeral node is forgotten when it stays away for this long.
    pub ephemeral_timeout: Duration,
}

/// A node as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeRecord {
    /// Never reused.
    pub id: i64,
    /// The machine it lives on; stays.
    pub machine: MachinePublic,
    /// Its WireGuard key; changes when it registers anew.
    pub node_key: NodePublic,
    /// Its disco key, once reported.
    pub disco: Option<DiscoPublic>,
    /// First label of its name.
    pub name: String,
    /// Inner address.
    pub v4: Ipv4Addr,
    /// Inner address.
    pub v6: Ipv6Addr,
    /// Capability version of its last request.
    pub capver: i64,
    /// As reported.
    pub hostinfo: Value,
    /// As reported, filtered.
    pub endpoints: Vec<SocketAddr>,
    /// The key that let it in.
    pub auth_key: Option<i64>,
    /// Forgotten when it stays away.
    pub ephemeral: bool,
    /// When the key became no good, if it did. Always a moment that has come: a clock that is set
    /// back brings nobody back.
    pub expires: Option<OffsetDateTime>,
    /// Routes that count when it announces them; sorted, without host bits.
    pub approved: Vec<IpNet>,
    /// End of its last stream.
    pub last_seen: Option<OffsetDateTime>,
    /// First registration.
    pub created: OffsetDateTime,
}

/// What a registration leads to; all but the answer has to be committed before [`Server::apply`].
#[derive(Clone, Debug, PartialEq)]
pub enum Registration {
    /// Nothing changes.
    Answer(RegisterResponse),
    /// A new node, let in by this key.
    Insert(Box<NodeRecord>, i64),
    /// A known machine with a new node key, let in by this key.
    Rekey(Box<NodeRecord>, i64),
    /// A log-out: the node's key expires now.
    Expire(Box<NodeRecord>),
    /// A log-out of an ephemeral node, which is forgotten.
    Delete(i64),
}

/// Names an open map stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// What a map request leads to.
#[derive(Clone, Debug, PartialEq)]
pub enum MapAnswer {
    /// State taken; the answer is empty.
    Taken,
    /// One message, then the end.
    Once(Box<MapResponse>),
    /// Messages from now on.
    Stream(SessionId),
}

/// Why a map request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapRefusal {
    /// HTTP 400.
    #[error("unsupported client version: ({0})")]
    Version(i64),
    /// HTTP 404: no such node on this machine.
    #[error("node not found")]
    NotFound,
    /// HTTP 404: there was one, and nobody removed it.
    #[error("{STAYED_AWAY}")]
    StayedAway,
    /// HTTP 400.
    #[error("Hostinfo is over {HOSTINFO_LEN_MAX} bytes")]
    Hostinfo,
    /// HTTP 400: nothing of such a node is taken, and it is told nothing but by a stream.
    #[error("the key of this node has expired")]
    Expired,
}

/// A change for the store, written behind.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// The node's latest state.
    Save(Box<NodeRecord>),
    /// The node is gone.
    Delete(i64),
    /// These nodes, and no others, are connected.
    Online(Vec<i64>),
}

/// See the module's text.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    nodes: BTreeMap<i64, Entry>,
    by_key: BTreeMap<NodePublic, i64>,
    by_machine: BTreeMap<MachinePublic, i64>,
    sessions: BTreeMap<SessionId, Session>,
    primaries: BTreeMap<IpNet, i64>,
    next_session: u64,
    next_id: i64,
    last_host: u32,
    /// When the changes collected so far go out.
    tick: Option<Instant>,
    unsaved: BTreeSet<i64>,
    deleted: BTreeSet<i64>,
    /// Ephemeral nodes that were forgotten because they stayed away, in this run.
    stayed_away: VecDeque<(MachinePublic, NodePublic)>,
    /// Whether the store is to be told who is connected.
    presence_unsaved: bool,
    /// Sessions to be ended by the driver, and the last message of each.
    ended: Vec<(SessionId, Option<Box<MapResponse>>)>,
    /// Announced routes that were not looked at since [`Server::take_left_out`].
    left_out: usize,
    /// Machines whose node is gone, which the driver knows no more.
    forgotten: Vec<MachinePublic>,
}

#[derive(Debug)]
struct Entry {
    record: NodeRecord,
    rivals: Rivals,
    /// As peers see it; replaced when anything visible changed.
    wire: Arc<Node>,
    presence: Presence,
    /// Routes that count.
    routes: Vec<IpNet>,
}

/// What both are told.
const TWO_MACHINES: &str = "two machines use this node's keys and take its place in turns: one of \
                            their state directories is a copy of the other";
/// Last takings over that are looked at,
const TURNS: usize = 4;
/// and the time within which they have to be: a machine whose stream ended comes back at once, and one
/// that changes its network again and again takes longer. After as long without any it is over.
const TURNS_TIME: Duration = Duration::from_secs(60);

/// Streams of a node that took the place of one that still stood, as those of two machines with the
/// same keys do, in turns. One machine that reconnects does not come back to the endpoints it had.
#[derive(Debug, Default)]
struct Rivals {
    turns: VecDeque<(Instant, Vec<SocketAddr>)>,
    seen: bool,
}

impl Rivals {
    /// A stream takes the place of another, from a machine with these endpoints. True if that shows
    /// that there are two.
    fn took_over(&mut self, now: Instant, endpoints: &[SocketAddr]) -> bool {
        let old = |at: Instant| now.saturating_duration_since(at) > TURNS_TIME;
        while self.turns.front().is_some_and(|(at, _)| old(*at)) || self.turns.len() >= TURNS {
            self.turns.pop_front();
        }
        self.turns.push_back((now, endpoints.to_vec()));
        let turns: Vec<&[SocketAddr]> = self.turns.iter().map(|(_, of)| &of[..]).collect();
        let before = self.seen;
        self.seen = matches!(turns[..], [a, b, c, d] if a != b && a == c && b == d);
        self.seen && !before
    }

    /// When the two of them will be one again.
    fn poll_timeout(&self) -> Option<Instant> {
        let (last, _) = self.turns.back().filter(|_| self.seen)?;
        Some(*last + TURNS_TIME)
    }

    /// What the node is told.
    fn health(&self) -> Vec<String> {
        let problem = self.seen.then(|| TWO_MACHINES.to_owned());
        problem.into_iter().collect()
    }
}

/// Whether a node is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    /// Streams open.
    Online(u32),
    /// The last stream ended (or we started); peers are told at this time.
    Leaving(Instant, Option<bool>),
    /// Peers know; an ephemeral node is forgotten at this time.
    Offline(Option<Instant>),
}

#[derive(Debug)]
struct Session {
    node: i64,
    codec: Codec,
    keep_alive: bool,
    started: bool,
    /// Nodes that may differ from what was sent.
    dirty: BTreeSet<i64>,
    sent: BTreeMap<i64, Arc<Node>>,
    /// It was told of two machines.
    told_rivals: bool,
    next_keep_alive: Instant,
    /// Spread of keep-alives over sessions.
    period: Duration,
}

impl Server {
    /// A server with what the store holds. `last_host` is the host number given out last, and
    /// `last_id` the highest node id ever used.
    pub fn new(
        now: Instant,
        config: ServerConfig,
        records: Vec<NodeRecord>,
        last_id: i64,
        last_host: u32,
    ) -> Self {
        let mut server = Self {
            config,
            nodes: BTreeMap::new(),
            by_key: BTreeMap::new(),
            by_machine: BTreeMap::new(),
            sessions: BTreeMap::new(),
            primaries: BTreeMap::new(),
            next_session: 1,
            next_id: last_id + 1,
            last_host,
            tick: None,
            unsaved: BTreeSet::new(),
            deleted: BTreeSet::new(),
            stayed_away: VecDeque::new(),
            // Whoever was connected to the server before is not to this one.
            presence_unsaved: true,
            ended: Vec::new(),
            left_out: 0,
            forgotten: Vec::new(),
        };
        for record in records {
            server.next_id = server.next_id.max(record.id + 1);
            let id = record.id;
            server.insert(record, Presence::Leaving(now + START_GRACE, None));
            server.rebuild(now, id);
        }
        server
    }

    /// What clients are told of the relays.
    pub fn derp_map(&self) -> &DerpMap {
        &self.config.derp_map
    }

    /// Replaces the relays; every open stream is told by a full message.
    pub fn set_derp_map(&mut self, now: Instant, derp_map: DerpMap) {
        if self.config.derp_map == derp_map {
            return;
        }
        self.config.derp_map = derp_map;
        for session in self.sessions.values_mut() {
            session.started = false;
        }
        self.tick.get_or_insert(now + TICK);
    }

    /// How many nodes there are, and how many have a stream open.
    pub fn counts(&self) -> (usize, usize) {
        let online = |entry: &&Entry| matches!(entry.presence, Presence::Online(_));
        (self.nodes.len(), self.nodes.values().filter(online).count())
    }

    /// The node with this key on this machine.
    fn find(&self, machine: MachinePublic, key: NodePublic) -> Option<&Entry> {
        let entry = self.nodes.get(self.by_key.get(&key)?)?;
        (entry.record.machine == machine).then_some(entry)
    }

    /// Whether a node of this machine is stored: all others are strangers.
    pub fn knows(&self, machine: MachinePublic) -> bool {
        self.by_machine.contains_key(&machine)
    }

    /// Whether a relay should serve this node.
    pub fn is_member(&self, key: NodePublic) -> bool {
        let entry = self.by_key.get(&key).and_then(|id| self.nodes.get(id));
        entry.is_some_and(|entry| !expired(&entry.record))
    }

    /// Whether this registration succeeds without looking at its auth key: a node that is known
    /// and good. Real clients send their old key again whenever they start.
    pub fn needs_no_key(
        &self,
        wall: OffsetDateTime,
        machine: MachinePublic,
        request: &RegisterRequest,
    ) -> bool {
        let found = self.find(machine, request.node_key);
        is_logout(wall, request) || found.is_some_and(|entry| !expired(&entry.record))
    }

    /// Decides on a registration of the machine; `key` is what its auth key is worth.
    pub fn plan_register(
        &self,
        wall: OffsetDateTime,
        machine: MachinePublic,
        request: &RegisterRequest,
        key: &KeyCheck,
    ) -> Registration {
        let refuse = |text: &str| {
            Registration::Answer(RegisterResponse {
                error: text.to_owned(),
                ..RegisterResponse::default()
            })
        };
        if request.node_key.is_zero() || machine.is_zero() {
            return refuse("node key missing");
        }
        let found = self.find(machine, request.node_key);
        if is_logout(wall, request) {
            return match found {
                None => refuse("node not found"),
                Some(entry) if entry.record.ephemeral => Registration::Delete(entry.record.id),
                Some(entry) => {
                    let mut record = entry.record.clone();
                    record.expires = Some(wall);
                    Registration::Expire(Box::new(record))
                }
            };
        }
        if found.is_some_and(|entry| !expired(&entry.record)) {
            return Registration::Answer(self.welcome());
        }
        let KeyCheck::Valid { id: key, ephemeral } = *key else {
            if found.is_some() && *key == KeyCheck::Absent {
                return Registration::Answer(RegisterResponse {
                    node_key_expired: true,
                    ..RegisterResponse::default()
                });
            }
            return refuse(key.error().unwrap_or("auth key needed"));
        };
        // Said only to whom we would let in: who has which key is nobody else's business.
        if found.is_none() && self.by_key.contains_key(&request.node_key) {
            return refuse("node key already in use by another machine");
        }
        let hostinfo = request.hostinfo.clone().unwrap_or_else(|| json!({}));
        if !hostinfo.is_object() || hostinfo.to_string().len() > HOSTINFO_LEN_MAX {
            return refuse("Hostinfo is missing or too large");
        }
        let known = self
            .by_machine
            .get(&machine)
            .and_then(|id| self.nodes.get(id));
        if let Some(entry) = known {
            let mut record = entry.record.clone();
            record.node_key = request.node_key;
            record.expires = None;
            record.capver = request.version;
            record.auth_key = Some(key);
            record.ephemeral = ephemeral;
            self.take_hostinfo(&mut record, hostinfo);
            return Registration::Rekey(Box::new(record), key);
        }
        if self.nodes.len() >= PEERS_MAX {
            return refuse("the network is full");
        }
        let in_use = |v4: Ipv4Addr, v6: Ipv6Addr| {
            let mut records = self.nodes.values().map(|entry| &entry.record);
            records.any(|record| record.v4 == v4 || record.v6 == v6)
        };
        let plan = &self.config.addresses;
        let host = plan.next(self.last_host, in_use);
        let Some((v4, v6)) = host.and_then(|host| plan.addresses(host)) else {
            return refuse("all addresses are in use");
        };
        let mut record = NodeRecord {
            id: self.next_id,
            machine,
            node_key: request.node_key,
            disco: None,
            name: self.free_name(self.next_id, &hostinfo),
            v4,
            v6,
            capver: request.version,
            hostinfo: json!({}),
            endpoints: Vec::new(),
            auth_key: Some(key),
            ephemeral,
            expires: None,
            approved: Vec::new(),
            last_seen: None,
            created: wall,
        };
        self.take_hostinfo(&mut record, hostinfo);
        Registration::Insert(Box::new(record), key)
    }

    /// The host number behind a record's address: to be stored with it.
    pub fn host_number(&self, record: &NodeRecord) -> u32 {
        self.config.addresses.number(record.v4)
    }

    /// Puts a committed registration into force and gives the answer.
    pub fn apply(&mut self, now: Instant, registration: Registration) -> RegisterResponse {
        match registration {
            Registration::Answer(answer) => answer,
            Registration::Insert(record, _) => {
                self.last_host = self.host_number(&record);
                self.next_id = self.next_id.max(record.id + 1);
                let id = record.id;
                // Not connected yet, and nobody was told otherwise.
                let presence = Presence::Leaving(now + OFFLINE_DELAY, Some(false));
                self.insert(*record, presence);
                self.rebuild(now, id);
                self.welcome()
            }
            Registration::Rekey(record, _) => {
                let id = record.id;
                self.replace(now, *record);
                self.starts_anew(now, id);
                self.welcome()
            }
            Registration::Expire(record) => {
                self.replace(now, *record);
                RegisterResponse {
                    node_key_expired: true,
                    ..self.welcome()
                }
            }
            Registration::Delete(id) => {
                self.delete(now, id);
                RegisterResponse {
                    node_key_expired: true,
                    ..RegisterResponse::default()
                }
            }
        }
    }

    /// A node that was away has as long to connect as a new one, and whether it is forgotten after that
    /// depends on the key it came back with.
    fn starts_anew(&mut self, now: Instant, id: i64) {
        if let Some(entry) = self.nodes.get_mut(&id)
            && matches!(entry.presence, Presence::Offline(_))
        {
            entry.presence = Presence::Leaving(now + OFFLINE_DELAY, Some(false));
        }
    }

    fn welcome(&self) -> RegisterResponse {
        RegisterResponse {
            user: RegisterUser {
                id: USER_ID,
                display_name: self.config.user.clone(),
            },
            login: RegisterLogin {
                id: USER_ID,
                provider: String::new(),
                login_name: self.config.user.clone(),
                display_name: self.config.user.clone(),
            },
            machine_authorized: true,
            ..RegisterResponse::default()
        }
    }

    fn insert(&mut self, record: NodeRecord, presence: Presence) {
        self.by_key.insert(record.node_key, record.id);
        self.by_machine.insert(record.machine, record.id);
        self.stayed_away
            .retain(|(machine, _)| *machine != record.machine);
        self.left_out += left_out(&record.hostinfo);
        let routes = effective(&record);
        let entry = Entry {
            record,
            rivals: Rivals::default(),
            wire: Arc::default(),
            presence,
            routes,
        };
        self.nodes.insert(entry.record.id, entry);
    }

    /// Puts a changed record in the place of the old one.
    fn replace(&mut self, now: Instant, record: NodeRecord) {
        let id = record.id;
        let Some(entry) = self.nodes.get_mut(&id) else {
            return;
        };
        self.by_key.remove(&entry.record.node_key);
        self.by_key.insert(record.node_key, id);
        if entry.record.hostinfo != record.hostinfo {
            self.left_out += left_out(&record.hostinfo);
        }
        entry.routes = effective(&record);
        let sight_changes = expired(&entry.record) != expired(&record);
        entry.record = record;
        self.unsaved.insert(id);
        self.rebuild(now, id);
        if sight_changes {
            self.look_around(now, id);
        }
    }

    /// What a node may see has changed: its streams compare everything anew.
    fn look_around(&mut self, now: Instant, id: i64) {
        let sessions = self.sessions.values_mut();
        for session in sessions.filter(|session| session.node == id) {
            session.dirty.extend(self.nodes.keys());
        }
        self.tick.get_or_insert(now + TICK);
    }

    /// Puts into force what an administrator ordered; it is in the store.
    pub fn put(&mut self, now: Instant, order: Write) {
        match order {
            Write::Save(record) => self.replace(now, *record),
            Write::Delete(id) => self.delete(now, id),
            Write::Online(_) => {}
        }
    }

    /// Every node as it is stored, by ascending id.
    pub fn records(&self) -> impl Iterator<Item = &NodeRecord> {
        self.nodes.values().map(|entry| &entry.record)
    }

    /// How many announced routes were not looked at since this was asked last.
    pub fn take_left_out(&mut self) -> usize {
        std::mem::take(&mut self.left_out)
    }

    /// Forgets a node: its streams end with a last message, and peers are told that it is gone.
    fn delete(&mut self, now: Instant, id: i64) {
        let Some(entry) = self.nodes.remove(&id) else {
            return;
        };
        self.by_key.remove(&entry.record.node_key);
        self.by_machine.remove(&entry.record.machine);
        self.forgotten.push(entry.record.machine);
        self.unsaved.remove(&id);
        self.deleted.insert(id);
        let own = self
            .sessions
            .iter()
            .filter(|(_, session)| session.node == id);
        let own = own.map(|(session, state)| (*session, Some(Box::new(farewell(&entry, state)))));
        self.ended.extend(own);
        self.mark_dirty(now, id);
        self.refresh_routes(now);
    }

    /// Handles a map request of the machine.
    ///
    /// # Errors
    /// With the HTTP status of each [`MapRefusal`].
    pub fn handle_map(
        &mut self,
        now: Instant,
        wall: OffsetDateTime,
        machine: MachinePublic,
        request: &MapRequest,
        random: f64,
    ) -> Result<MapAnswer, MapRefusal> {
        if request.version < CAPABILITY_VERSION_MIN {
            return Err(MapRefusal::Version(request.version));
        }
        let Some(entry) = self.find(machine, request.node_key) else {
            let away = self.stayed_away.contains(&(machine, request.node_key));
            return Err(if away {
                MapRefusal::StayedAway
            } else {
                MapRefusal::NotFound
            });
        };
        let mut record = entry.record.clone();
        let id = record.id;
        if expired(&record) {
            // By a stream it hears how it stands, and when that changes.
            return if request.stream {
                Ok(MapAnswer::Stream(
                    self.open_session(now, wall, id, request, random),
                ))
            } else {
                Err(MapRefusal::Expired)
            };
        }
        record.capver = request.version;
        if !request.disco_key.is_zero() {
            record.disco = Some(request.disco_key);
        }
        if let Some(endpoints) = &request.endpoints {
            record.endpoints = endpoints.iter().copied().filter(is_endpoint).collect();
            record.endpoints.truncate(ENDPOINTS_MAX);
        }
        if let Some(hostinfo) = request.hostinfo.clone().filter(Value::is_object) {
            if hostinfo.to_string().len() > HOSTINFO_LEN_MAX {
                return Err(MapRefusal::Hostinfo);
            }
            self.take_hostinfo(&mut record, hostinfo);
        }
        if entry.record != record {
            self.replace(now, record);
        }
        if !request.stream {
            if request.omit_peers {
                return Ok(MapAnswer::Taken);
            }
            return Ok(MapAnswer::Once(Box::new(self.full(wall, id))));
        }
        Ok(MapAnswer::Stream(
            self.open_session(now, wall, id, request, random),
        ))
    }

    fn open_session(
        &mut self,
        now: Instant,
        wall: OffsetDateTime,
        node: i64,
        request: &MapRequest,
        random: f64,
    ) -> SessionId {
        let id = SessionId(self.next_session);
        self.next_session += 1;
        let [shortest, longest] = KEEP_ALIVE;
        let period = shortest + (longest - shortest).mul_f64(random.clamp(0.0, 1.0));
        let zstd = request.compress == "zstd";
        let session = Session {
            node,
            codec: if zstd { Codec::Zstd } else { Codec::Plain },
            keep_alive: request.keep_alive,
            started: false,
            dirty: BTreeSet::new(),
            sent: BTreeMap::new(),
            told_rivals: false,
            next_keep_alive: now + period,
            period,
        };
        self.sessions.insert(id, session);
        let of_node = self
            .sessions
            .iter()
            .filter(|(_, session)| session.node == node);
        let of_node: Vec<SessionId> = of_node.map(|(id, _)| *id).collect();
        if of_node.len() > SESSIONS_PER_NODE_MAX {
            self.ended.push((of_node[0], None));
        }
        let replaces = self
            .sessions
            .iter()
            .any(|(other, session)| session.node == node && *other != id && session.started);
        if let Some(entry) = self.nodes.get_mut(&node) {
            if !replaces {
                entry.rivals = Rivals::default();
            } else if entry.rivals.took_over(now, &entry.record.endpoints) {
                tracing::warn!(node = entry.record.name, "{TWO_MACHINES}");
            }
            entry.presence = match entry.presence {
                Presence::Online(streams) => Presence::Online(streams + 1),
                Presence::Leaving(..) | Presence::Offline(_) => Presence::Online(1),
            };
            entry.record.last_seen = Some(wall);
            self.unsaved.insert(node);
            self.presence_unsaved = true;
            self.rebuild(now, node);
        }
        id
    }

    /// A stream ended, from either side.
    pub fn handle_session_end(&mut self, now: Instant, wall: OffsetDateTime, id: SessionId) {
        let Some(session) = self.sessions.remove(&id) else {
            return;
        };
        let Some(entry) = self.nodes.get_mut(&session.node) else {
            return;
        };
        entry.presence = match entry.presence {
            Presence::Online(streams) if streams > 1 => Presence::Online(streams - 1),
            Presence::Online(_) => {
                entry.record.last_seen = Some(wall);
                self.unsaved.insert(session.node);
                self.presence_unsaved = true;
                Presence::Leaving(now + OFFLINE_DELAY, Some(true))
            }
            other @ (Presence::Leaving(..) | Presence::Offline(_)) => other,
        };
    }

    /// Does what is due: nodes go offline, ephemeral ones are forgotten.
    pub fn handle_timeout(&mut self, now: Instant) {
        let mut gone = Vec::new();
        let mut left = Vec::new();
        let mut settled = Vec::new();
        for (id, entry) in &mut self.nodes {
            if entry.rivals.poll_timeout().is_some_and(|at| at <= now) {
                entry.rivals = Rivals::default();
                settled.push(*id);
            }
            match entry.presence {
                Presence::Leaving(at, _) if at <= now => {
                    let forget = entry
                        .record
                        .ephemeral
                        .then(|| now + self.config.ephemeral_timeout);
                    entry.presence = Presence::Offline(forget);
                    left.push(*id);
                }
                Presence::Offline(Some(at)) if at <= now => gone.push(*id),
                Presence::Online(_) | Presence::Leaving(..) | Presence::Offline(_) => {}
            }
        }
        for id in left {
            self.rebuild(now, id);
        }
        for id in settled {
            self.mark_dirty(now, id);
        }
        for id in gone {
            if let Some(Entry { record, .. }) = self.nodes.get(&id) {
                if self.stayed_away.len() >= STAYED_AWAY_MAX {
                    self.stayed_away.pop_front();
                }
                self.stayed_away
                    .push_back((record.machine, record.node_key));
            }
            self.delete(now, id);
        }
    }

    /// When [`Server::handle_timeout`] or [`Server::poll_session`] has something to do next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let presence = self
            .nodes
            .values()
            .filter_map(|entry| match entry.presence {
                Presence::Leaving(at, _) | Presence::Offline(Some(at)) => Some(at),
                Presence::Online(_) | Presence::Offline(None) => None,
            });
        let rivals = self.nodes.values();
        let rivals = rivals.filter_map(|entry| entry.rivals.poll_timeout());
        let alive = self
            .sessions
            .values()
            .map(|session| session.next_keep_alive);
        presence.chain(rivals).chain(alive).chain(self.tick).min()
    }

    /// How a stream's messages are compressed.
    pub fn codec(&self, id: SessionId) -> Codec {
        self.sessions
            .get(&id)
            .map_or(Codec::Plain, |session| session.codec)
    }

    /// Streams the driver has to end now, some with a last message.
    pub fn take_ended(&mut self) -> Vec<(SessionId, Option<Box<MapResponse>>)> {
        std::mem::take(&mut self.ended)
    }

    /// Machines that were forgotten since this was asked last.
    pub fn take_forgotten(&mut self) -> Vec<MachinePublic> {
        std::mem::take(&mut self.forgotten)
    }

    /// All open streams.
    pub fn session_ids(&self) -> Vec<SessionId> {
        self.sessions.keys().copied().collect()
    }

    /// Whether collected changes are due; after every stream was asked, [`Server::end_tick`].
    pub fn tick_is_due(&self, now: Instant) -> bool {
        self.tick.is_some_and(|at| at <= now)
    }

    /// Every stream was asked. `again` when some could not take their message yet.
    pub fn end_tick(&mut self, now: Instant, again: bool) {
        self.tick = again.then_some(now + TICK);
    }

    /// The next message of a stream that can take one: the full map first, then differences when a
    /// tick is due, then signs of life.
    pub fn poll_session(
        &mut self,
        now: Instant,
        wall: OffsetDateTime,
        id: SessionId,
    ) -> Option<MapResponse> {
        let session = self.sessions.get(&id)?;
        let node = session.node;
        let started = session.started;
        let alive_due = session.next_keep_alive <= now;
        let message = if !started {
            self.nodes.get(&node)?;
            Some(self.full_for(wall, id))
        } else if self.tick_is_due(now) {
            self.difference(wall, id)
        } else {
            None
        };
        let session = self.sessions.get_mut(&id)?;
        let message = message.or_else(|| {
            (alive_due && session.keep_alive).then(|| MapResponse {
                keep_alive: true,
                ..MapResponse::default()
            })
        });
        if message.is_some() || alive_due {
            session.next_keep_alive = now + session.period;
        }
        if !started {
            // The new stream stands: older ones of the same node end.
            let older = self.sessions.iter();
            let older = older.filter(|(other, session)| session.node == node && **other < id);
            self.ended.extend(older.map(|(other, _)| (*other, None)));
        }
        message
    }

    /// A stream cannot take a message now: what waits there is a sign of life as well.
    pub fn handle_full(&mut self, now: Instant, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id)
            && session.next_keep_alive <= now
        {
            session.next_keep_alive = now + session.period;
        }
    }

    /// The complete map for a session; notes what was sent.
    fn full_for(&mut self, wall: OffsetDateTime, id: SessionId) -> MapResponse {
        let Some(node) = self.sessions.get(&id).map(|session| session.node) else {
            return MapResponse::default();
        };
        let mut message = self.full(wall, node);
        let rivals = self.nodes.get(&node).map(|entry| &entry.rivals);
        if let Some(rivals) = rivals.filter(|rivals| !rivals.turns.is_empty()) {
            message.health = Some(rivals.health());
        }
        let told_rivals = rivals.is_some_and(|rivals| rivals.seen);
        let sent: BTreeMap<i64, Arc<Node>> = self
            .seen_by(node)
            .map(|(id, entry)| (*id, Arc::clone(&entry.wire)))
            .collect();
        if let Some(session) = self.sessions.get_mut(&id) {
            // An empty list of peers is invisible, so what is gone is named.
            let gone = session.sent.keys().filter(|id| !sent.contains_key(id));
            let gone: Vec<i64> = gone.copied().collect();
            if !gone.is_empty() && message.peers.as_ref().is_none_or(Vec::is_empty) {
                message.peers_removed = Some(gone);
            }
            session.sent = sent;
            session.told_rivals = told_rivals;
            session.dirty.clear();
            session.started = true;
        }
        message
    }

    /// Whether a node sees its peers, and not itself alone.
    fn sees_peers(&self, id: i64) -> bool {
        let entry = self.nodes.get(&id);
        entry.is_some_and(|entry| !expired(&entry.record))
    }

    /// What a node is told of: itself, and its peers.
    fn seen_by(&self, id: i64) -> impl Iterator<Item = (&i64, &Entry)> {
        let all = self.sees_peers(id);
        let nodes = self.nodes.iter();
        nodes.filter(move |(other, _)| all || **other == id)
    }

    fn full(&self, wall: OffsetDateTime, id: i64) -> MapResponse {
        let peers = self.seen_by(id).filter(|(peer, _)| **peer != id);
        let mut routes: BTreeMap<String, Vec<Value>> = (64..128)
            .map(|octet| (format!("{octet}.100.in-addr.arpa"), Vec::new()))
            .collect();
        routes.insert("0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa".to_owned(), Vec::new());
        MapResponse {
            control_time: Some(WireTime(wall)),
            node: self.nodes.get(&id).map(|entry| own_node(&entry.wire)),
            peers: Some(peers.map(|(_, entry)| Arc::clone(&entry.wire)).collect()),
            derp_map: Some((&self.config.derp_map).into()),
            dns_config: Some(json!({
                "Domains": [self.config.base_domain], "Proxied": true, "Routes": routes,
            })),
            domain: Some(self.config.domain.clone()),
            packet_filters: Some([("base".to_owned(), Some(vec![FilterRule::allow_all()]))].into()),
            user_profiles: Some(vec![UserProfile {
                id: USER_ID,
                login_name: self.config.user.clone(),
                display_name: self.config.user.clone(),
            }]),
            collect_services: Some(false),
            debug: Some(Debug {
                disable_log_tail: true,
                ..Debug::default()
            }),
            ..MapResponse::default()
        }
    }

    /// What changed for a session since its last message; none when nothing did.
    fn difference(&mut self, wall: OffsetDateTime, id: SessionId) -> Option<MapResponse> {
        let all = self.sees_peers(self.sessions.get(&id)?.node);
        let session = self.sessions.get_mut(&id)?;
        let (mut changed, mut patches, mut removed) = (Vec::new(), Vec::new(), Vec::new());
        let mut own = None;
        for id in std::mem::take(&mut session.dirty) {
            let entry = self.nodes.get(&id);
            let Some(entry) = entry.filter(|_| all || id == session.node) else {
                if session.sent.remove(&id).is_some() && id != session.node {
                    removed.push(id);
                }
                continue;
            };
            let old = session.sent.insert(id, Arc::clone(&entry.wire));
            if old
                .as_ref()
                .is_some_and(|old| Arc::ptr_eq(old, &entry.wire))
            {
                continue;
            }
            if id == session.node {
                own = Some(own_node(&entry.wire));
                continue;
            }
            match old.and_then(|old| difference_of(&old, &entry.wire)) {
                Some(patch) => patches.push(patch),
                None => changed.push(Arc::clone(&entry.wire)),
            }
        }
        let rivals = self.nodes.get(&session.node).map(|entry| &entry.rivals);
        let rivals = rivals.filter(|rivals| rivals.seen != session.told_rivals);
        let health = rivals.map(Rivals::health);
        session.told_rivals ^= health.is_some();
        let nodes_stay = changed.is_empty() && patches.is_empty() && removed.is_empty();
        if own.is_none() && nodes_stay && health.is_none() {
            return None;
        }
        Some(MapResponse {
            control_time: Some(WireTime(wall)),
            node: own,
            peers_changed: (!changed.is_empty()).then_some(changed),
            peers_removed: (!removed.is_empty()).then_some(removed),
            peers_changed_patch: (!patches.is_empty()).then_some(patches),
            health,
            ..MapResponse::default()
        })
    }

    /// What the store has to be told, oldest state gone.
    pub fn take_writes(&mut self) -> Vec<Write> {
        let saves = std::mem::take(&mut self.unsaved);
        let saves = saves.into_iter().filter_map(|id| {
            let entry = self.nodes.get(&id)?;
            Some(Write::Save(Box::new(entry.record.clone())))
        });
        let deletes = std::mem::take(&mut self.deleted);
        let online = std::mem::take(&mut self.presence_unsaved).then(|| {
            let online = |entry: &&Entry| matches!(entry.presence, Presence::Online(_));
            let ids = self.nodes.values().filter(online);
            Write::Online(ids.map(|entry| entry.record.id).collect())
        });
        saves
            .chain(deletes.into_iter().map(Write::Delete))
            .chain(online)
            .collect()
    }

    /// The store could not take these: they stay to be written.
    pub fn handle_write_failure(&mut self, writes: &[Write]) {
        for write in writes {
            match write {
                Write::Save(record) if self.nodes.contains_key(&record.id) => {
                    self.unsaved.insert(record.id);
                }
                Write::Save(_) => {}
                Write::Delete(id) => {
                    self.deleted.insert(*id);
                }
                Write::Online(_) => self.presence_unsaved = true,
            }
        }
    }

    /// Whether [`Server::take_writes`] would give something.
    pub fn has_writes(&self) -> bool {
        !self.unsaved.is_empty() || !self.deleted.is_empty() || self.presence_unsaved
    }

    fn mark_dirty(&mut self, now: Instant, id: i64) {
        for session in self.sessions.values_mut() {
            session.dirty.insert(id);
        }
        self.tick.get_or_insert(now + TICK);
    }

    /// Builds a node's visible form anew; when it differs, all streams will hear of it.
    fn rebuild(&mut self, now: Instant, id: i64) {
        let routes = self
            .nodes
            .get(&id)
            .is_some_and(|entry| !entry.routes.is_empty());
        if routes || self.primaries.values().any(|router| *router == id) {
            self.refresh_routes(now);
        }
        self.rebuild_one(now, id);
    }

    fn rebuild_one(&mut self, now: Instant, id: i64) {
        let Some(entry) = self.nodes.get(&id) else {
            return;
        };
        let wire = self.wire(entry);
        if *entry.wire == wire {
            return;
        }
        if let Some(entry) = self.nodes.get_mut(&id) {
            entry.wire = Arc::new(wire);
        }
        self.mark_dirty(now, id);
    }

    /// Chooses the router of every prefix among the nodes that are online.
    fn refresh_routes(&mut self, now: Instant) {
        let online = |presence: Presence| {
            matches!(
                presence,
                Presence::Online(_) | Presence::Leaving(_, None | Some(true))
            )
        };
        let candidates = self.nodes.iter();
        let candidates = candidates.filter(|(_, entry)| online(entry.presence));
        let candidates = candidates.map(|(id, entry)| (*id, &entry.routes[..]));
        let new = routes::primaries(&self.primaries, candidates);
        let old = std::mem::replace(&mut self.primaries, new);
        if old != self.primaries {
            let touched = old.values().chain(self.primaries.values()).copied();
            for id in touched.collect::<BTreeSet<i64>>() {
                self.rebuild_one(now, id);
            }
        }
    }

    fn wire(&self, entry: &Entry) -> Node {
        let record = &entry.record;
        let addresses: Vec<IpNet> = vec![
            IpNet::from(IpAddr::V4(record.v4)),
            IpNet::from(IpAddr::V6(record.v6)),
        ];
        let primary = |net: &&IpNet| self.primaries.get(net) == Some(&record.id);
        let primary_routes: Vec<IpNet> = entry.routes.iter().filter(primary).copied().collect();
        let exits = entry.routes.iter().filter(|net| routes::is_exit(net));
        let mut allowed_ips = addresses.clone();
        allowed_ips.extend(exits);
        allowed_ips.extend(&primary_routes);
        let (online, offline) = match entry.presence {
            Presence::Online(_) => (Some(true), false),
            Presence::Leaving(_, online) => (online, online == Some(false)),
            Presence::Offline(_) => (Some(false), true),
        };
        let home = record.hostinfo["NetInfo"]["PreferredDERP"].as_u64();
        // Measurements of a host's network are of no use to its peers, and change often.
        let mut hostinfo = record.hostinfo.clone();
        if let Some(fields) = hostinfo.as_object_mut() {
            fields.remove("NetInfo");
        }
        let expired = expired(record);
        Node {
            id: record.id,
            stable_id: record.id.to_string(),
            name: format!("{}.{}.", record.name, self.config.base_domain),
            user: USER_ID,
            key: record.node_key,
            key_expiry: record.expires.map(WireTime),
            machine: Some(record.machine),
            disco_key: record.disco,
            addresses,
            allowed_ips: Some(allowed_ips),
            endpoints: record.endpoints.clone(),
            home_derp: home.and_then(|home| u32::try_from(home).ok()).unwrap_or(0),
            hostinfo: Some(hostinfo),
            created: Some(WireTime(record.created)),
            cap: record.capver,
            primary_routes,
            last_seen: record.last_seen.filter(|_| offline).map(WireTime),
            online,
            machine_authorized: !expired,
            expired,
            ..Node::default()
        }
    }

    /// Takes over what a host says of itself: its measurements stay when it says nothing of them,
    /// and its name follows its host name.
    fn take_hostinfo(&self, record: &mut NodeRecord, mut hostinfo: Value) {
        if hostinfo.get("NetInfo").is_none_or(Value::is_null) {
            let kept = record
                .hostinfo
                .get("NetInfo")
                .filter(|info| !info.is_null());
            if let Some(kept) = kept.cloned() {
                hostinfo["NetInfo"] = kept;
            }
        }
        if hostinfo.get("Hostname") != record.hostinfo.get("Hostname") {
            record.name = self.free_name(record.id, &hostinfo);
        }
        record.hostinfo = hostinfo;
    }

    /// A name for node `id` that no other node has.
    fn free_name(&self, id: i64, hostinfo: &Value) -> String {
        let hostname = hostinfo["Hostname"].as_str().unwrap_or_default();
        address::name(hostname, |name| {
            let mut others = self.nodes.values().filter(|entry| entry.record.id != id);
            others.any(|entry| entry.record.name == name)
        })
    }
}

fn expired(record: &NodeRecord) -> bool {
    record.expires.is_some()
}

/// Routes of a node that count: announced, approved for it, and its key is good.
fn effective(record: &NodeRecord) -> Vec<IpNet> {
    if record.approved.is_empty() || expired(record) {
        return Vec::new();
    }
    let mut routes = announced(&record.hostinfo);
    routes.retain(|route| record.approved.binary_search(route).is_ok());
    routes
}

/// Whether a registration is a log-out: an expiry in the past asks for that, and wins over everything
/// else in the request.
pub fn is_logout(wall: OffsetDateTime, request: &RegisterRequest) -> bool {
    let expiry = request.expiry.and_then(WireTime::get);
    expiry.is_some_and(|expiry| expiry < wall)
}

/// The node as itself is told of it.
fn own_node(wire: &Node) -> Arc<Node> {
    let mut node = wire.clone();
    let mut cap_map = CapMap::new();
    cap_map.insert(
        "https://tailscale.com/cap/is-admin".to_owned(),
        Some(Vec::new()),
    );
    cap_map.insert("default-auto-update".to_owned(), Some(vec![json!(false)]));
    node.cap_map = Some(cap_map);
    Arc::new(node)
}

/// The last message of a stream whose node was removed. A tailscaled goes on with its last map for
/// as long as it finds itself unknown; an expiry in the past makes it ask to be logged in.
fn farewell(entry: &Entry, session: &Session) -> MapResponse {
    let mut node = Node::clone(&entry.wire);
    node.key_expiry = Some(WireTime(OffsetDateTime::UNIX_EPOCH));
    (node.expired, node.machine_authorized) = (true, false);
    let peers = session.sent.keys().filter(|id| **id != session.node);
    MapResponse {
        node: Some(own_node(&node)),
        peers_removed: Some(peers.copied().collect()),
        ..MapResponse::default()
    }
}

/// Whether an address can be an endpoint: no multicast, no link-local IPv6, not unspecified.
fn is_endpoint(endpoint: &SocketAddr) -> bool {
    let ip = endpoint.ip();
    let link_local = match endpoint {
        SocketAddr::V4(_) => false,
        SocketAddr::V6(v6) => v6.ip().is_unicast_link_local() || v6.scope_id() != 0,
    };
    endpoint.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !link_local
}

/// The change that leads from `old` to `new`, if the protocol can say it field by field.
fn difference_of(old: &Node, new: &Node) -> Option<PeerChange> {
    let mut change = PeerChange {
        node_id: new.id,
        ..PeerChange::default()
    };
    let mut patched = old.clone();
    if old.home_derp != new.home_derp && new.home_derp != 0 {
        change.derp_region = new.home_derp;
        patched.home_derp = new.home_derp;
    }
    // An empty list cannot be told: Go leaves it out.
    if old.endpoints != new.endpoints && !new.endpoints.is_empty() {
        change.endpoints = Some(new.endpoints.clone());
        patched.endpoints.clone_from(&new.endpoints);
    }
    if old.key != new.key {
        change.key = Some(new.key);
        patched.key = new.key;
    }
    if old.disco_key != new.disco_key && new.disco_key.is_some() {
        change.disco_key = new.disco_key;
        patched.disco_key = new.disco_key;
    }
    if old.online != new.online && new.online.is_some() {
        change.online = new.online;
        patched.online = new.online;
    }
    if old.last_seen != new.last_seen && new.last_seen.is_some() {
        change.last_seen = new.last_seen;
    }
    // Meaningless while online, so it may stay behind there.
    patched.last_seen = new.last_seen;
    if old.cap != new.cap && new.cap != 0 {
        change.cap = new.cap;
        patched.cap = new.cap;
    }
    (patched == *new).then_some(change)
}

#[cfg(test)]
mod tests;
