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
//! No question costs a walk over all nodes or streams: alarms stand in order of time, names and
//! addresses in sets, and [`Server::due_sessions`] names who is to be asked. Once in a tick, if
//! something changed, all streams are.
//!
//! A node that was removed is sent one last message and its streams end. One whose key has expired
//! is told of itself and of nobody else, and what it reports is not taken; it counts as a peer that
//! has expired until it registers anew. What an administrator orders is planned in [`super::admin`].
//!
//! Rules: `protocol/coordination-server.md` §4 to §6. Without a policy everybody may reach everybody, so
//! every node sees every other, and all streams share one view; with one, each has its own.
//!
//! Rooms: `register` lets nodes in and out, `pending` are those a person has to let in, `reports` takes their map requests, `presence` is who is
//! online, `sessions` what each stream was sent, `sight` who is told of whom, `view` how a node is told of, `store` what is kept.

mod pending;
mod presence;
mod register;
mod reports;
mod sessions;
mod sight;
mod store;
mod view;

pub use self::pending::{Applicant, Code, PENDING_TIME, Waits};
pub use self::register::{Registration, is_logout};
pub use self::reports::{MapAnswer, MapRefusal};
pub use self::sessions::SessionId;
pub use self::store::{NodeRecord, Write};

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use time::OffsetDateTime;

use self::pending::Pending;
use self::presence::{Presence, Rivals};
use self::sessions::{Session, farewell};
use self::sight::Sight;
use self::store::expired;
use self::view::{View, effective};
use crate::coord::address::AddressPlan;
use crate::coord::admin::{Change, Done, Refusal, plan};
use crate::coord::routes::left_out;
use crate::key::{MachinePublic, NodePublic};
use crate::netmap::DerpMap;
use crate::netmap::wire::{DnsConfig, MapResponse};

/// Clients below this capability version are refused, as Headscale 0.29 does.
pub const CAPABILITY_VERSION_MIN: i64 = 113;

/// Changes within this time go out together.
pub const TICK: Duration = Duration::from_millis(100);

/// A stream that ended leaves its node online for this long, so that a reconnect disturbs nobody.
pub const OFFLINE_DELAY: Duration = Duration::from_secs(10);

/// So long its routes stay with it, if it does not take them back itself: it may be dialling anew. Half of the second
/// after which another has to serve them.
pub const ROUTES_DELAY: Duration = Duration::from_millis(500);

/// After a start nobody is told that a node is offline before this has passed: real clients need
/// up to 10 s to come back.
pub const START_GRACE: Duration = Duration::from_secs(30);

/// Endpoints kept per node.
pub const ENDPOINTS_MAX: usize = 64;

/// `Hostinfo` at most, as JSON bytes: every peer gets a copy.
pub const HOSTINFO_LEN_MAX: usize = 16 * 1024;

/// Who owns a node when nobody is named. There always is this one.
pub const FIRST_USER: i64 = 1;

/// Whom nodes with tags are shown to belong to; the number is Headscale's, which clients have seen.
const TAGGED_USER: i64 = 2_147_455_555;
const TAGGED_USER_NAME: &str = "tagged-devices";

/// Users at most.
pub const USERS_MAX: usize = 1000;

/// What a server is told at its start.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Suffix of all names, without dots at the ends.
    pub base_domain: String,
    /// Names of the owners of nodes.
    pub users: BTreeMap<i64, String>,
    /// Shown to clients as the network's name.
    pub domain: String,
    /// Where addresses come from.
    pub addresses: AddressPlan,
    /// The relays.
    pub derp_map: DerpMap,
    /// Resolvers, suffixes with others, and names beside those of nodes.
    pub dns: DnsConfig,
    /// An ephemeral node is forgotten when it stays away for this long.
    pub ephemeral_timeout: Duration,
    /// How long a node's key is good; none: for ever. Nodes with tags keep theirs.
    pub key_expiry: Option<Duration>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    nodes: BTreeMap<i64, Entry>,
    by_key: BTreeMap<NodePublic, i64>,
    by_machine: BTreeMap<MachinePublic, i64>,
    pending: Pending,
    sight: Sight,
    /// Which node has a name.
    names: BTreeMap<String, i64>,
    /// Inner addresses that nodes have.
    addresses: BTreeSet<IpAddr>,
    /// Nodes as peers see them; a stream shares what it was sent with all that were sent the same.
    view: View,
    /// When each node has something to do: [`Entry::poll_timeout`].
    node_alarms: BTreeSet<(Instant, i64)>,
    sessions: BTreeMap<SessionId, Session>,
    /// When each stream is due a sign of life.
    stream_alarms: BTreeSet<(Instant, SessionId)>,
    /// Streams that are due the full map.
    young: BTreeSet<SessionId>,
    /// Streams to be asked at the next tick.
    stale: BTreeSet<SessionId>,
    /// Nodes that changed since the last tick.
    changed: BTreeSet<i64>,
    /// Nodes that have routes that count, or had when routers were chosen last.
    routers: BTreeSet<i64>,
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
    /// Nodes and streams that were looked at because something was due.
    #[cfg(test)]
    looks: usize,
}

#[derive(Debug)]
struct Entry {
    record: NodeRecord,
    rivals: Rivals,
    presence: Presence,
    /// Until when a stream that ended counts for its routes.
    routes_until: Option<Instant>,
    /// Its open streams, the oldest first.
    streams: Vec<SessionId>,
    /// When its key is looked at, if that is to expire.
    expires_at: Option<Instant>,
    /// What stands in [`Server::node_alarms`].
    alarm: Option<Instant>,
    /// Routes that count.
    routes: Vec<IpNet>,
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
            pending: Pending::default(),
            sight: Sight::default(),
            names: BTreeMap::new(),
            addresses: BTreeSet::new(),
            view: View::default(),
            node_alarms: BTreeSet::new(),
            sessions: BTreeMap::new(),
            stream_alarms: BTreeSet::new(),
            young: BTreeSet::new(),
            stale: BTreeSet::new(),
            changed: BTreeSet::new(),
            routers: BTreeSet::new(),
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
            #[cfg(test)]
            looks: 0,
        };
        for record in records {
            server.next_id = server.next_id.max(record.id + 1);
            let id = record.id;
            server.insert(record, Presence::Leaving(now + START_GRACE, None));
            server.watch_expiry(now, id);
            server.rebuild(now, id);
        }
        server
    }

    /// Replaces the relays; every open stream is told by a full message.
    pub fn set_derp_map(&mut self, now: Instant, derp_map: DerpMap) {
        if self.config.derp_map != derp_map {
            self.config.derp_map = derp_map;
            self.begin_anew(now);
        }
    }

    /// Replaces resolvers and extra names; every open stream is told by a full message.
    pub fn set_dns(&mut self, now: Instant, dns: DnsConfig) {
        if self.config.dns != dns {
            self.config.dns = dns;
            self.begin_anew(now);
        }
    }

    /// Who may own nodes now; they never go.
    pub fn set_users(&mut self, users: BTreeMap<i64, String>) {
        self.config.users = users;
    }

    /// Whether there is this user.
    pub fn knows_user(&self, id: i64) -> bool {
        self.config.users.contains_key(&id)
    }

    fn user_name(&self, id: i64) -> &str {
        self.config.users.get(&id).map_or("", String::as_str)
    }

    fn begin_anew(&mut self, now: Instant) {
        for session in self.sessions.values_mut() {
            session.started = false;
        }
        self.young.extend(self.sessions.keys());
        self.tick.get_or_insert(now + TICK);
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

    fn insert(&mut self, record: NodeRecord, presence: Presence) {
        self.by_key.insert(record.node_key, record.id);
        self.by_machine.insert(record.machine, record.id);
        self.names.insert(record.name.clone(), record.id);
        self.addresses
            .extend([IpAddr::V4(record.v4), IpAddr::V6(record.v6)]);
        self.stayed_away
            .retain(|(machine, _)| *machine != record.machine);
        self.left_out += left_out(&record.hostinfo);
        let (id, routes) = (record.id, effective(&record));
        if !routes.is_empty() {
            self.routers.insert(id);
        }
        let entry = Entry {
            record,
            rivals: Rivals::default(),
            presence,
            routes_until: None,
            streams: Vec::new(),
            expires_at: None,
            alarm: None,
            routes,
        };
        self.nodes.insert(id, entry);
        self.sight.stale = true;
        self.set_alarm(id);
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
        if entry.record.name != record.name {
            self.names.remove(&entry.record.name);
            self.names.insert(record.name.clone(), id);
        }
        let routes = std::mem::replace(&mut entry.routes, effective(&record));
        let judged_by = |of: &NodeRecord| (of.user, of.tags.clone());
        let judged_anew = routes != entry.routes || judged_by(&entry.record) != judged_by(&record);
        if !entry.routes.is_empty() {
            self.routers.insert(id);
        }
        let sight_changes = expired(&entry.record) != expired(&record);
        entry.record = record;
        self.unsaved.insert(id);
        self.watch_expiry(now, id);
        if judged_anew && self.has_policy() {
            self.look_again(now);
        }
        self.rebuild(now, id);
        if sight_changes {
            self.look_around(now, id);
        }
    }

    /// Has a node's key looked at that is to expire.
    fn watch_expiry(&mut self, now: Instant, id: i64) {
        if let Some(entry) = self.nodes.get_mut(&id) {
            entry.expires_at = entry.record.good_until.map(|_| now);
            self.set_alarm(id);
        }
    }

    /// What an administrator's order comes to here: [`plan`], but that nothing is revoked which the policy would
    /// approve again.
    ///
    /// # Errors
    /// [`Refusal`]; nothing is to be done then.
    pub fn plan_change(
        &self,
        node: &str,
        change: &Change,
        wall: OffsetDateTime,
    ) -> Result<(Option<Write>, Done), Refusal> {
        let planned = plan(self.records(), node, change, wall)?;
        if let (Some(Write::Save(record)), Change::Revoke(routes)) = (&planned.0, change)
            && let Some(route) = routes.iter().find(|route| self.approves(record, route))
        {
            return Err(Refusal::ByPolicy(record.name.clone(), *route));
        }
        Ok(planned)
    }

    /// Puts into force what an administrator ordered; it is in the store.
    pub fn put(&mut self, now: Instant, order: Write) {
        match order {
            Write::Save(mut record) => {
                self.approve_own(&mut record);
                self.replace(now, *record);
            }
            Write::Delete(id) => self.delete(now, id),
            Write::Online(_) => {}
        }
    }

    /// Every node as it is stored, by ascending id.
    pub fn records(&self) -> impl Iterator<Item = &NodeRecord> + Clone {
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
        self.names.remove(&entry.record.name);
        self.addresses.remove(&IpAddr::V4(entry.record.v4));
        self.addresses.remove(&IpAddr::V6(entry.record.v6));
        self.forgotten.push(entry.record.machine);
        if let Some(at) = entry.alarm {
            self.node_alarms.remove(&(at, id));
        }
        self.unsaved.remove(&id);
        self.deleted.insert(id);
        self.sight.stale = true;
        if let Some(wire) = Arc::make_mut(&mut self.view).remove(&id) {
            let own = entry.streams.iter().filter_map(|session| {
                let state = self.sessions.get(session)?;
                Some((*session, Some(Box::new(farewell(&wire, state)))))
            });
            self.ended.extend(own);
        }
        self.mark_dirty(now, id);
        if self.routers.contains(&id) {
            self.refresh_routes(now);
        }
    }

    /// Machines that were forgotten since this was asked last.
    pub fn take_forgotten(&mut self) -> Vec<MachinePublic> {
        std::mem::take(&mut self.forgotten)
    }
}

#[cfg(test)]
mod tests;
