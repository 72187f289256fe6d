//! Lists of operations on a coordination server, beside a small model that says what must hold: what the
//! fuzzer and the tests run.
//!
//! The model knows who is a member, with which keys, what was approved for whom, and whose streams stand. A
//! client at the other end of each stream merges what comes, message by message, as it travels. Whenever all
//! have read everything, each knows what a map asked for at that moment would say, and that is what the model
//! says: members are there, nobody else is, addresses are unique, a prefix has one router, which may be it.
//!
//! Machines come with keys of their own and with those of others, servers are stopped and killed, stores
//! fail, readers sleep.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde_json::json;
use time::OffsetDateTime;

use super::address::AddressPlan;
use super::admin::{self, Change};
use super::auth_key::KeyCheck;
use super::frames::{FrameReader, encode};
use super::server::{
    Code, ENDPOINTS_MAX, FIRST_USER, HOSTINFO_LEN_MAX, MapAnswer, MapRefusal, NodeRecord,
    OFFLINE_DELAY, PENDING_TIME, Registration, START_GRACE, Server, ServerConfig, SessionId, TICK,
    Waits, Write,
};
use crate::key::{DiscoPublic, MachinePublic, NodePublic};
use crate::netmap::wire::{DnsConfig, MapRequest, MapResponse, Node, RegisterRequest, WireTime};
use crate::netmap::{DerpMap, MapState};

pub(super) const WALL: OffsetDateTime = time::macros::datetime!(2026-11-22 05:00 UTC);
const EPHEMERAL_TIMEOUT: Duration = Duration::from_secs(300);
/// Machines, and keys: fewer than two for each, so that they meet.
const MACHINES: u8 = 5;
const KEYS: u8 = 7;
/// Prefixes that are announced and approved; the last is one to everywhere.
const ROUTES: [&str; 3] = ["10.20.0.0/16", "fd00:20::/64", "0.0.0.0/0"];
/// Streams that one node can have beside those that are on their way out.
const STREAMS_MAX: usize = 4;
/// Alarms within the longest time that is let pass at once: ten a second for those who sleep.
const STEPS_MAX: usize = 10_000;

fn machine(n: u8) -> MachinePublic {
    MachinePublic([n + 1; 32])
}

fn key(n: u8) -> NodePublic {
    NodePublic([0x80 + n; 32])
}

fn routes(bits: u8) -> BTreeSet<IpNet> {
    let chosen = (0..).zip(ROUTES).filter(|(at, _)| bits >> at & 1 == 1);
    chosen
        .map(|(_, text)| text.parse().expect("written above"))
        .collect()
}

/// What the model knows of a member.
#[derive(Clone, Debug)]
struct Member {
    machine: u8,
    key: u8,
    expired: bool,
    ephemeral: bool,
    announced: BTreeSet<IpNet>,
    approved: BTreeSet<IpNet>,
    /// What an administrator has named it.
    name: Option<String>,
    tags: Vec<String>,
    /// Without a stream: when peers are told, and whether it counts as there until then.
    leaves: Option<(Duration, bool)>,
}

impl Member {
    fn counting(&self) -> BTreeSet<IpNet> {
        if self.expired {
            return BTreeSet::new();
        }
        self.announced
            .intersection(&self.approved)
            .copied()
            .collect()
    }
}

/// A stream, and who reads it.
struct Stream {
    member: i64,
    map: MapState,
    awake: bool,
}

struct World {
    start: Instant,
    now: Duration,
    server: Server,
    members: BTreeMap<i64, Member>,
    streams: BTreeMap<SessionId, Stream>,
    /// Machines that a person has to let in: with which key, and until when they wait.
    waiting: BTreeMap<u8, (u8, Duration)>,
    /// What a store would hold, and what it was given out last.
    stored: BTreeMap<i64, NodeRecord>,
    last: (i64, u32),
    messages: usize,
}

/// Runs a list of operations: a byte that says which, and two that say on what. Returns how many messages
/// were read.
///
/// # Panics
/// If server, clients and model disagree.
pub(crate) fn run(start: Instant, bytes: &[u8]) -> usize {
    let mut world = World {
        start,
        now: Duration::ZERO,
        server: Server::new(start, config(), Vec::new(), 0, 0),
        members: BTreeMap::new(),
        streams: BTreeMap::new(),
        waiting: BTreeMap::new(),
        stored: BTreeMap::new(),
        last: (0, 0),
        messages: 0,
    };
    for operation in bytes.chunks_exact(3) {
        world.operate(operation[0], operation[1], operation[2]);
        world.check_records();
    }
    world.settle();
    world.messages
}

pub(super) fn config() -> ServerConfig {
    ServerConfig {
        base_domain: "tail.test".to_owned(),
        users: [(FIRST_USER, "ringtail".to_owned())].into(),
        domain: "tail.test".to_owned(),
        addresses: AddressPlan::default(),
        derp_map: DerpMap::default(),
        dns: DnsConfig::default(),
        ephemeral_timeout: EPHEMERAL_TIMEOUT,
        key_expiry: None,
    }
}

impl World {
    fn at(&self) -> Instant {
        self.start + self.now
    }

    fn wall(&self) -> OffsetDateTime {
        WALL + self.now
    }

    fn operate(&mut self, operation: u8, who: u8, what: u8) {
        let (of, with) = (who % MACHINES, (who / MACHINES) % KEYS);
        match operation % 16 {
            0 | 1 => self.register(of, with, what),
            // With the key that it has, so that short lists get somewhere.
            2 | 3 => {
                let with = self.member_of(of).map_or(with, |(_, member)| member.key);
                self.open(of, with, what);
            }
            4 => self.open(of, with, what),
            5 | 6 => {
                let with = self.member_of(of).map_or(with, |(_, member)| member.key);
                self.report(of, with, what);
            }
            7 => self.hang_up(what),
            8 => self.doze(what),
            9 => self.order(who, what),
            10 => self.pump(),
            11 => self.pass(Duration::from_millis(u64::from(what))),
            12 => self.pass(Duration::from_secs(u64::from(what) * 2)),
            13 => self.save(what & 1 == 1),
            14 if what < 64 => self.restart(what & 1 == 1),
            15 if who & 1 == 1 => self.approve(who / 2 % MACHINES),
            _ => self.settle(),
        }
    }

    fn member_of(&self, of: u8) -> Option<(i64, &Member)> {
        let mut members = self.members.iter();
        let found = members.find(|(_, member)| member.machine == of);
        found.map(|(id, member)| (*id, member))
    }

    fn found(&self, of: u8, with: u8) -> Option<(i64, &Member)> {
        self.member_of(of).filter(|(_, member)| member.key == with)
    }

    fn register(&mut self, of: u8, with: u8, what: u8) {
        let log_out = what & 0x30 == 0x30;
        let ephemeral = what & 8 == 8;
        let check = match what & 7 {
            0 => KeyCheck::Absent,
            1 => KeyCheck::Unknown,
            2 => KeyCheck::Expired,
            3 => KeyCheck::Used,
            _ => KeyCheck::Valid {
                id: 1,
                ephemeral,
                user: FIRST_USER,
                tags: Vec::new(),
            },
        };
        let valid = what & 7 > 3;
        let code = Code::new(u64::from(of));
        let request = RegisterRequest {
            version: 130,
            node_key: key(with),
            expiry: log_out.then(|| WireTime(self.wall() - time::Duration::HOUR)),
            // Names clash.
            hostinfo: Some(json!({"Hostname": format!("host{}", what >> 6)})),
            ..RegisterRequest::default()
        };
        let plan = self
            .server
            .plan_register(self.wall(), machine(of), &request, &check, code);
        let found = self
            .found(of, with)
            .map(|(id, member)| (id, member.clone()));
        let taken = self.members.values().any(|other| other.key == with);
        // What must be decided, as the model has it.
        match &plan {
            Registration::Insert(record, _) => {
                let new = self.member_of(of).is_none();
                assert!(valid && new && !taken && !log_out, "{of} {with} is let in");
                assert!(
                    !self.members.contains_key(&record.id),
                    "an id is never used again"
                );
            }
            Registration::Rekey(record, _) => {
                let known = self.member_of(of).map(|(id, _)| id) == Some(record.id);
                let expired = found.as_ref().is_some_and(|(_, member)| member.expired);
                assert!(valid && known && !log_out && (!taken || expired));
            }
            Registration::Expire(_) | Registration::Delete(_) => {
                let (_, member) = found.as_ref().expect("it is known");
                let deleted = matches!(plan, Registration::Delete(_));
                assert!(log_out && member.ephemeral == deleted);
            }
            Registration::Pending(applicant) => {
                assert!(what & 7 == 0 && found.is_none() && !log_out);
                assert_eq!((applicant.machine, applicant.code), (machine(of), code));
            }
            Registration::Answer(answer) => {
                let good = found.as_ref().is_some_and(|(_, member)| !member.expired);
                let welcome = answer.error.is_empty() && !answer.node_key_expired;
                assert_eq!(welcome, good && !log_out, "{answer:?}");
            }
        }
        // The store may fail: then nothing of it has happened.
        if what == 0xff {
            return;
        }
        self.carry_out(of, with, ephemeral, plan);
    }

    /// A person lets in a machine that waits, or would if it did.
    fn approve(&mut self, of: u8) {
        let code = Code::new(of.into()).to_string();
        let plan = self.server.plan_approval(self.wall(), &code, None);
        let waiting = self.waiting.get(&of).copied();
        let Some((with, _)) = waiting.filter(|(_, until)| self.now < *until) else {
            assert!(plan.is_err(), "{of} does not wait: {plan:?}");
            return;
        };
        let mut others = self.members.values().filter(|other| other.machine != of);
        if others.any(|other| other.key == with) {
            assert!(plan.is_err(), "its key is another's: {plan:?}");
            return;
        }
        let plan = plan.expect("it waits");
        let rekey = matches!(plan, Registration::Rekey(..));
        assert_eq!(self.member_of(of).is_some(), rekey, "{plan:?}");
        self.carry_out(of, with, false, plan);
    }

    /// Puts a plan into force, and what it means for the model.
    fn carry_out(&mut self, of: u8, with: u8, ephemeral: bool, plan: Registration) {
        // What waits is written before anything is committed, as names and keys may have moved.
        self.save(false);
        match &plan {
            Registration::Insert(record, _) => {
                self.last = (record.id, self.server.host_number(record));
                self.stored.insert(record.id, NodeRecord::clone(record));
                let member = Member {
                    machine: of,
                    key: with,
                    expired: false,
                    ephemeral,
                    announced: BTreeSet::new(),
                    approved: BTreeSet::new(),
                    name: None,
                    tags: Vec::new(),
                    leaves: Some((self.now + OFFLINE_DELAY, false)),
                };
                self.members.insert(record.id, member);
                self.waiting.remove(&of);
            }
            Registration::Rekey(record, _) => {
                self.stored.insert(record.id, NodeRecord::clone(record));
                let member = self.members.get_mut(&record.id).expect("checked above");
                (member.key, member.expired, member.ephemeral) = (with, false, ephemeral);
                member.announced.clear();
                if member.leaves.is_some_and(|(at, _)| at <= self.now) {
                    member.leaves = Some((self.now + OFFLINE_DELAY, false));
                }
                self.waiting.remove(&of);
            }
            Registration::Expire(record) => {
                self.stored.insert(record.id, NodeRecord::clone(record));
                let member = self.members.get_mut(&record.id).expect("checked above");
                member.expired = true;
            }
            Registration::Delete(id) => {
                self.stored.remove(id);
                self.members.remove(id);
            }
            Registration::Pending(applicant) => {
                let source = [192, 0, 2, of].into();
                let applicant = applicant.as_ref().clone();
                let waits = self.server.handle_applicant(self.at(), source, applicant);
                assert!(matches!(waits, Waits::Told(_)), "{waits:?}");
                let until = self.now + PENDING_TIME;
                let waiting = self.waiting.entry(of).or_insert((with, until));
                if waiting.1 <= self.now {
                    waiting.1 = until;
                }
                waiting.0 = with;
                return;
            }
            Registration::Answer(_) => {}
        }
        self.server.apply(self.at(), plan);
        self.end_streams();
    }

    /// What an administrator does.
    fn order(&mut self, who: u8, what: u8) {
        let ids: Vec<i64> = self.members.keys().copied().collect();
        let id = ids.get(usize::from(who) % ids.len().max(1)).copied();
        let node = id.unwrap_or(99).to_string();
        let nets = routes(what >> 3).into_iter().collect();
        let other = format!("name{}", what >> 6);
        let tags = vec![format!("tag:t{}", what >> 6)];
        let change = match what & 7 {
            0 => Change::Delete,
            1 => Change::Expire,
            2 if what & 8 == 8 => Change::Rename(other.clone()),
            2 => Change::Tag(tags.clone()),
            3 | 4 => Change::Revoke(nets),
            _ => Change::Approve(nets),
        };
        self.save(false);
        let plan = admin::plan(self.server.records(), &node, &change, self.wall());
        let Some(member) = id.and_then(|id| self.members.get_mut(&id)) else {
            assert!(plan.is_err(), "nobody goes by that");
            return;
        };
        let nets = routes(what >> 3);
        match &change {
            Change::Delete => {}
            Change::Expire => member.expired = true,
            Change::Rename(_) => {
                let other = self.stored.values().find(|of| of.name == other);
                if other.is_some_and(|other| Some(other.id) != id) {
                    assert!(plan.is_err(), "the name is taken");
                    return;
                }
                member.name = Some(format!("name{}", what >> 6));
            }
            Change::Tag(_) => member.tags = tags,
            Change::Approve(_) => member.approved.extend(nets),
            Change::Revoke(_) if nets.is_subset(&member.approved) => {
                member.approved.retain(|net| !nets.contains(net));
            }
            Change::Revoke(_) => {
                assert!(plan.is_err(), "it was not approved");
                return;
            }
        }
        let (write, _) = plan.expect("it names a member");
        match write {
            Some(Write::Save(record)) => {
                self.stored.insert(record.id, NodeRecord::clone(&record));
                self.server.put(self.at(), Write::Save(record));
            }
            Some(Write::Delete(id)) => {
                self.stored.remove(&id);
                self.members.remove(&id);
                self.server.put(self.at(), Write::Delete(id));
            }
            Some(Write::Online(_)) | None => {}
        }
        self.end_streams();
    }

    fn request(&self, with: u8, what: u8) -> MapRequest {
        MapRequest {
            version: 130,
            keep_alive: true,
            compress: if what & 1 == 1 { "zstd" } else { "" }.to_owned(),
            node_key: key(with),
            ..MapRequest::default()
        }
    }

    fn open(&mut self, of: u8, with: u8, what: u8) {
        let mut request = self.request(with, what);
        request.stream = true;
        let random = f64::from(what) / 255.0;
        let (at, wall) = (self.at(), self.wall());
        let answer = self
            .server
            .handle_map(at, wall, machine(of), &request, random);
        let Some((id, _)) = self.found(of, with) else {
            let unknown = matches!(answer, Err(MapRefusal::NotFound | MapRefusal::StayedAway));
            assert!(unknown, "{answer:?}");
            return;
        };
        let Ok(MapAnswer::Stream(session)) = answer else {
            panic!("{answer:?}");
        };
        let stream = Stream {
            member: id,
            map: MapState::new(key(with)),
            awake: true,
        };
        self.streams.insert(session, stream);
        if let Some(member) = self.members.get_mut(&id) {
            member.leaves = None;
        }
        self.end_streams();
    }

    /// A report without a stream.
    fn report(&mut self, of: u8, with: u8, what: u8) {
        let mut request = self.request(with, 0);
        request.omit_peers = true;
        let nets = routes(what >> 2);
        let large = what == 0xfe;
        request.hostinfo = Some(json!({
            "Hostname": format!("host{}", what & 3),
            "NetInfo": {"PreferredDERP": what >> 5},
            "RoutableIPs": nets.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "Filler": "x".repeat(if large { HOSTINFO_LEN_MAX } else { 0 }),
        }));
        let count = if what == 0xfd {
            500
        } else {
            u16::from(what & 3)
        };
        let endpoints = (0..count).map(|port| ([192, 0, 2, of], port + 1).into());
        request.endpoints = Some(endpoints.collect());
        request.disco_key = DiscoPublic([what | 1; 32]);
        let (at, wall) = (self.at(), self.wall());
        let answer = self.server.handle_map(at, wall, machine(of), &request, 0.0);
        let found = self
            .found(of, with)
            .map(|(id, member)| (id, member.expired));
        match (found, answer) {
            (None, Err(MapRefusal::NotFound | MapRefusal::StayedAway))
            | (Some((_, true)), Err(MapRefusal::Expired)) => {}
            (Some((_, false)), Err(MapRefusal::Hostinfo)) => assert!(large),
            (Some((id, false)), Ok(MapAnswer::Taken)) => {
                assert!(!large);
                let member = self.members.get_mut(&id).expect("found above");
                member.announced = nets;
            }
            (found, answer) => panic!("{found:?} is told {answer:?}"),
        }
    }

    fn hang_up(&mut self, what: u8) {
        let ids: Vec<SessionId> = self.streams.keys().copied().collect();
        if let Some(id) = ids.get(usize::from(what) % ids.len().max(1)) {
            self.end(*id);
        }
    }

    fn doze(&mut self, what: u8) {
        let count = self.streams.len().max(1);
        let stream = self.streams.values_mut().nth(usize::from(what) % count);
        if let Some(stream) = stream {
            stream.awake = !stream.awake;
        }
    }

    fn end(&mut self, id: SessionId) {
        let (at, wall) = (self.at(), self.wall());
        self.server.handle_session_end(at, wall, id);
        let Some(stream) = self.streams.remove(&id) else {
            return;
        };
        let more = self
            .streams
            .values()
            .any(|other| other.member == stream.member);
        if let Some(member) = self.members.get_mut(&stream.member).filter(|_| !more) {
            member.leaves = Some((self.now + OFFLINE_DELAY, true));
        }
    }

    /// Streams that the server ends do, after their last message.
    fn end_streams(&mut self) {
        for (id, last) in self.server.take_ended() {
            if let (Some(last), Some(stream)) = (last, self.streams.get_mut(&id)) {
                // One that has not had its first map yet is told no more than that.
                if stream.map.node().is_some() {
                    read(&mut stream.map, &last);
                    let told = stream.map.node().is_some_and(|node| node.expired);
                    assert!(told && stream.map.peers().is_empty(), "a farewell");
                }
                let member = stream.member;
                assert!(!self.members.contains_key(&member), "only who is removed");
            }
            self.end(id);
        }
    }

    /// Gives every stream whose reader is awake what is due.
    fn pump(&mut self) {
        let (at, wall) = (self.at(), self.wall());
        self.server.handle_timeout(at, wall);
        let due = self.server.tick_is_due(at);
        let mut asleep = false;
        for id in self.server.due_sessions(at) {
            let stream = self.streams.get_mut(&id).expect("it was opened here");
            if !stream.awake {
                asleep = true;
                self.server.handle_full(at, id);
                continue;
            }
            if let Some(message) = self.server.poll_session(at, wall, id) {
                read(&mut stream.map, &message);
                self.messages += 1;
            }
        }
        if due {
            self.server.end_tick(at, asleep);
        }
        self.end_streams();
        // Who stays away is forgotten, if it is ephemeral.
        let now = self.now;
        self.members.retain(|_, member| {
            let left = member.leaves.filter(|_| member.ephemeral);
            left.is_none_or(|(at, _)| now < at + EPHEMERAL_TIMEOUT)
        });
    }

    /// Lets time pass, through every alarm on the way.
    fn pass(&mut self, by: Duration) {
        let until = self.now + by;
        for _ in 0..STEPS_MAX {
            let next = self.server.poll_timeout();
            let Some(next) = next.filter(|next| *next <= self.start + until) else {
                self.now = until;
                return self.pump();
            };
            self.now = self.now.max(next.saturating_duration_since(self.start));
            self.pump();
        }
        panic!("alarms without end");
    }

    /// What waits to be written is, or the store fails.
    fn save(&mut self, fails: bool) {
        let writes = self.server.take_writes();
        if fails {
            self.server.handle_write_failure(&writes);
            assert!(writes.is_empty() || self.server.has_writes());
            return;
        }
        for write in writes {
            match write {
                Write::Save(record) => drop(self.stored.insert(record.id, *record)),
                Write::Delete(id) => drop(self.stored.remove(&id)),
                Write::Online(ids) => {
                    assert!(ids.iter().all(|id| self.members.contains_key(id)));
                }
            }
        }
    }

    /// The server ends, or is killed before it has written everything, and another one starts. Nothing that
    /// was answered is undone by that.
    fn restart(&mut self, killed: bool) {
        if !killed {
            self.save(false);
        }
        self.streams.clear();
        self.waiting.clear();
        let records: Vec<NodeRecord> = self.stored.values().cloned().collect();
        let (last_id, last_host) = self.last;
        self.server = Server::new(self.at(), config(), records, last_id, last_host);
        let before = std::mem::take(&mut self.members);
        for (id, record) in &self.stored {
            let known = before.get(id);
            // Whoever stayed away is forgotten again: that alone may have been lost.
            assert!(
                known.is_some() || (killed && record.ephemeral),
                "{record:?}"
            );
            let member = Member {
                machine: record.machine.0[0] - 1,
                key: record.node_key.0[0] - 0x80,
                expired: record.expires.is_some(),
                ephemeral: record.ephemeral,
                announced: super::routes::announced(&record.hostinfo)
                    .into_iter()
                    .collect(),
                approved: record.approved.iter().copied().collect(),
                name: record.name_fixed.then(|| record.name.clone()),
                tags: record.tags.clone(),
                leaves: Some((self.now + START_GRACE, true)),
            };
            if let Some(known) = known {
                let of = |member: &Member| {
                    let Member {
                        machine,
                        key,
                        expired,
                        ephemeral,
                        ..
                    } = *member;
                    let (name, tags) = (member.name.clone(), member.tags.clone());
                    let given = (member.approved.clone(), name, tags);
                    (machine, key, expired, ephemeral, given)
                };
                assert_eq!(of(known), of(&member), "what was committed");
                assert!(killed || known.announced == member.announced);
            }
            self.members.insert(*id, member);
        }
        assert!(
            before.keys().all(|id| self.members.contains_key(id)),
            "nobody is lost"
        );
    }

    /// The server's records are the model's members, and nothing of theirs is there twice.
    fn check_records(&mut self) {
        // The model forgets who stays away when the server is asked, and so does the server.
        self.pump();
        let records: Vec<&NodeRecord> = self.server.records().collect();
        let ids = records.iter().map(|record| record.id);
        assert!(ids.eq(self.members.keys().copied()), "{:?}", self.members);
        for record in &records {
            let member = &self.members[&record.id];
            assert_eq!(record.machine, machine(member.machine));
            assert_eq!(record.node_key, key(member.key));
            assert_eq!(record.expires.is_some(), member.expired);
            assert!(record.endpoints.len() <= ENDPOINTS_MAX);
            let approved: BTreeSet<IpNet> = record.approved.iter().copied().collect();
            assert_eq!(approved, member.approved);
            assert_eq!(record.tags, member.tags);
            assert!(member.name.as_ref().is_none_or(|name| record.name == *name));
        }
        let count = records.len();
        let unique = |of: BTreeSet<String>| assert_eq!(of.len(), count, "{of:?}");
        unique(records.iter().map(|r| r.name.clone()).collect());
        unique(records.iter().map(|r| r.v4.to_string()).collect());
        unique(records.iter().map(|r| r.v6.to_string()).collect());
        unique(records.iter().map(|r| r.node_key.to_string()).collect());
        for n in 0..KEYS {
            let good = |member: &Member| member.key == n && !member.expired;
            let member = self.members.values().any(good);
            assert_eq!(self.server.is_member(key(n)), member);
        }
        for id in self.members.keys() {
            let of = self.streams.values().filter(|stream| stream.member == *id);
            assert!(of.count() <= STREAMS_MAX + 1, "streams of one node");
        }
    }

    /// All read everything: each knows what a map asked for now says, and that is what the model says.
    fn settle(&mut self) {
        self.streams
            .values_mut()
            .for_each(|stream| stream.awake = true);
        // What falls due meanwhile is to be told of as well.
        let mut steps = 0..STEPS_MAX;
        loop {
            self.pump();
            let next = self.server.poll_timeout();
            let Some(next) = next.filter(|next| *next <= self.at() + TICK) else {
                break;
            };
            self.now = self.now.max(next.saturating_duration_since(self.start));
            assert!(steps.next().is_some(), "alarms without end");
        }
        let mut maps = BTreeMap::new();
        for (id, member) in self.members.clone() {
            if !member.expired {
                maps.insert(id, self.ask(&member));
            }
        }
        for stream in self.streams.values() {
            let own = stream.map.node().expect("all have read their map");
            let expired = self.members[&stream.member].expired;
            assert_eq!((own.id, own.expired), (stream.member, expired));
            match maps.get(&stream.member) {
                Some(asked) => {
                    let node = asked.node().expect("a map has its node");
                    assert_eq!(comparable(own), comparable(node));
                    assert_eq!(peers(&stream.map), peers(asked));
                }
                None => assert!(stream.map.peers().is_empty(), "it has expired"),
            }
        }
        self.check_maps(&maps);
    }

    /// A map of this moment.
    fn ask(&mut self, member: &Member) -> MapState {
        let request = self.request(member.key, 0);
        let (at, wall) = (self.at(), self.wall());
        let of = machine(member.machine);
        let answer = self.server.handle_map(at, wall, of, &request, 0.0);
        let Ok(MapAnswer::Once(message)) = answer else {
            panic!("{answer:?}");
        };
        let mut map = MapState::new(key(member.key));
        read(&mut map, &message);
        map
    }

    fn check_maps(&self, maps: &BTreeMap<i64, MapState>) {
        let mut routers: BTreeMap<IpNet, BTreeSet<i64>> = BTreeMap::new();
        for (id, map) in maps {
            let known = map.peers().keys().chain([id]).copied();
            let all: BTreeSet<i64> = self.members.keys().copied().collect();
            assert_eq!(known.collect::<BTreeSet<_>>(), all, "what {id} knows");
            let nodes = map.peers().values().map(|node| &**node).chain(map.node());
            for node in nodes {
                let member = &self.members[&node.id];
                assert_eq!((node.key, node.expired), (key(member.key), member.expired));
                assert_eq!(node.tags, member.tags);
                let counting = member.counting();
                let allowed = node.allowed_ips.iter().flatten();
                let other = allowed.filter(|net| !node.addresses.contains(net));
                let other: BTreeSet<IpNet> = other.copied().collect();
                assert!(other.is_subset(&counting), "{other:?} of {counting:?}");
                for net in &node.primary_routes {
                    assert!(counting.contains(net) && net.prefix_len() > 0);
                    routers.entry(*net).or_default().insert(node.id);
                }
            }
        }
        // Somebody is the router of what somebody who is there can route, and is there, too.
        let there = |member: &Member| {
            let until = member.leaves;
            until.is_none_or(|(until, counts)| counts && self.now < until)
        };
        for text in &ROUTES[..2] {
            let net: IpNet = text.parse().expect("written above");
            let could = self
                .members
                .iter()
                .filter(|(_, member)| member.counting().contains(&net) && there(member));
            let could: BTreeSet<i64> = could.map(|(id, _)| *id).collect();
            let is = routers.get(&net).cloned().unwrap_or_default();
            assert!(is.is_subset(&could), "{net}: {is:?} of {could:?}");
            let wanted = usize::from(!could.is_empty() && !maps.is_empty());
            assert_eq!(is.len(), wanted, "{net}: {is:?} of {could:?}");
        }
    }
}

/// As it travels: what JSON cannot say must not be relied on.
fn read(map: &mut MapState, message: &MapResponse) {
    let codec = super::frames::Codec::Zstd;
    let bytes = encode(codec, message).expect("a message of ours");
    let mut reader = FrameReader::new(codec);
    reader.handle_bytes(&bytes);
    let message = reader.poll_message().expect("it is whole");
    let message = message.expect("it is one");
    map.handle_response(WALL, message).expect("it has our node");
}

fn peers(map: &MapState) -> BTreeMap<i64, Node> {
    let peers = map.peers().iter();
    peers.map(|(id, node)| (*id, comparable(node))).collect()
}

/// Without what may stay behind: when an online node was last seen.
pub(super) fn comparable(node: &Node) -> Node {
    let mut node = node.clone();
    node.normalise();
    if node.online != Some(false) {
        node.last_seen = None;
    }
    node
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{random_lists, start};

    #[test]
    fn a_plain_list_gets_as_far_as_a_route() {
        let list = [
            // Two machines join and listen, one announces a prefix, which is approved for it.
            [0, 0, 4],
            [0, 6, 4],
            [2, 0, 0],
            [2, 6, 1],
            [5, 1, 1 << 2],
            [9, 1, 5 | 1 << 3],
            [15, 0, 0],
        ];
        assert!(run(start(), list.as_flattened()) > 2);
    }

    #[test]
    fn random_operations_match_the_model() {
        random_lists(30, 200, |bytes| {
            run(start(), bytes);
        });
    }
}
