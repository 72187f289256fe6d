//! Registrations: who is let in, with which name and addresses, and who logs out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use serde_json::{Value, json};
use time::OffsetDateTime;

use super::pending::{Applicant, Code, Pass};
use super::presence::Presence;
use super::store::{NodeRecord, Write, expired};
use super::{FIRST_USER, HOSTINFO_LEN_MAX, OFFLINE_DELAY, Server, TAGGED_USER, TAGGED_USER_NAME};
use crate::coord::address;
use crate::coord::auth_key::KeyCheck;
use crate::key::MachinePublic;
use crate::netmap::PEERS_MAX;
use crate::netmap::wire::{
    RegisterLogin, RegisterRequest, RegisterResponse, RegisterUser, WireTime,
};

const BAD_HOSTINFO: &str = "Hostinfo is missing or too large";

/// What a registration leads to; what changes a node has to be committed before [`Server::apply`].
#[derive(Clone, Debug, PartialEq)]
pub enum Registration {
    /// Nothing changes.
    Answer(RegisterResponse),
    /// A person has to let the machine in.
    Pending(Box<Applicant>),
    /// A new node, let in by this key, or by a person.
    Insert(Box<NodeRecord>, Option<i64>),
    /// A known machine with a new node key, let in by this key, or by a person.
    Rekey(Box<NodeRecord>, Option<i64>),
    /// A log-out: the node's key expires now.
    Expire(Box<NodeRecord>),
    /// A log-out of an ephemeral node, which is forgotten.
    Delete(i64),
}

impl Registration {
    /// The node that is let in by it, or changes.
    pub fn record(&self) -> Option<&NodeRecord> {
        match self {
            Self::Answer(_) | Self::Pending(_) | Self::Delete(_) => None,
            Self::Insert(record, _) | Self::Rekey(record, _) | Self::Expire(record) => Some(record),
        }
    }
}

impl Server {
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

    /// Decides on a registration of the machine; `key` is what its auth key is worth. Whoever has none
    /// waits under `code`, unless it waits under another already.
    pub fn plan_register(
        &self,
        wall: OffsetDateTime,
        machine: MachinePublic,
        request: &RegisterRequest,
        key: &KeyCheck,
        code: Code,
    ) -> Registration {
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
            return Registration::Answer(self.welcome(found.map(|entry| &entry.record)));
        }
        let hostinfo = request.hostinfo.clone().unwrap_or_else(|| json!({}));
        let fits = hostinfo.is_object() && hostinfo.to_string().len() <= HOSTINFO_LEN_MAX;
        let applicant = Applicant {
            code: self.code_of(machine).unwrap_or(code),
            machine,
            node_key: request.node_key,
            capver: request.version,
            hostinfo,
            followup: Code::of_url(&request.followup),
        };
        let pass = match *key {
            KeyCheck::Valid {
                id,
                ephemeral,
                user,
                ref tags,
            } => Pass {
                auth_key: Some(id),
                ephemeral,
                user: Some(user),
                tags: tags.clone(),
            },
            KeyCheck::Absent if found.is_some() => {
                return Registration::Answer(RegisterResponse {
                    node_key_expired: true,
                    ..RegisterResponse::default()
                });
            }
            KeyCheck::Absent if fits => return Registration::Pending(Box::new(applicant)),
            KeyCheck::Absent => return refuse(BAD_HOSTINFO),
            KeyCheck::Unknown | KeyCheck::Expired | KeyCheck::Used => {
                return refuse(key.error().unwrap_or_default());
            }
        };
        if !fits {
            return refuse(BAD_HOSTINFO);
        }
        let plan = self.admit(wall, applicant, pass);
        plan.unwrap_or_else(|why| refuse(&why))
    }

    /// Lets a machine in, or says why not.
    pub(super) fn admit(
        &self,
        wall: OffsetDateTime,
        applicant: Applicant,
        pass: Pass,
    ) -> Result<Registration, String> {
        let Applicant {
            machine, node_key, ..
        } = applicant;
        let auth_key = pass.auth_key;
        // Said only to whom we would let in: who has which key is nobody else's business.
        if self.find(machine, node_key).is_none() && self.by_key.contains_key(&node_key) {
            return Err("node key already in use by another machine".to_owned());
        }
        let known = self
            .by_machine
            .get(&machine)
            .and_then(|id| self.nodes.get(id));
        if let Some(entry) = known {
            let mut record = entry.record.clone();
            record.node_key = node_key;
            record.expires = None;
            record.capver = applicant.capver;
            record.auth_key = auth_key;
            record.ephemeral = pass.ephemeral;
            // Approvals are an owner's; another's node has none.
            if pass.user.is_some_and(|user| user != record.user) {
                record.approved.clear();
                record.tags.clear();
            }
            self.give(&mut record, pass, &applicant.hostinfo, wall)?;
            self.take_hostinfo(&mut record, applicant.hostinfo);
            self.approve_own(&mut record);
            return Ok(Registration::Rekey(Box::new(record), auth_key));
        }
        if self.nodes.len() >= PEERS_MAX {
            return Err("the network is full".to_owned());
        }
        let in_use = |v4: Ipv4Addr, v6: Ipv6Addr| {
            let taken = |address: IpAddr| self.addresses.contains(&address);
            taken(v4.into()) || taken(v6.into())
        };
        let plan = &self.config.addresses;
        let host = plan.next(self.last_host, in_use);
        let Some((v4, v6)) = host.and_then(|host| plan.addresses(host)) else {
            return Err("all addresses are in use".to_owned());
        };
        let mut record = NodeRecord {
            id: self.next_id,
            machine,
            node_key,
            disco: None,
            user: FIRST_USER,
            tags: Vec::new(),
            name: self.free_name(self.next_id, &applicant.hostinfo),
            name_fixed: false,
            v4,
            v6,
            capver: applicant.capver,
            hostinfo: json!({}),
            endpoints: Vec::new(),
            auth_key,
            ephemeral: pass.ephemeral,
            expires: None,
            good_until: None,
            approved: Vec::new(),
            last_seen: None,
            created: wall,
        };
        self.give(&mut record, pass, &applicant.hostinfo, wall)?;
        self.take_hostinfo(&mut record, applicant.hostinfo);
        self.approve_own(&mut record);
        Ok(Registration::Insert(Box::new(record), auth_key))
    }

    /// Gives a node its owner and tags, and its key a time. Tags that it asks for itself are of its auth
    /// key, or its owner may give them by the policy.
    fn give(
        &self,
        record: &mut NodeRecord,
        pass: Pass,
        hostinfo: &Value,
        wall: OffsetDateTime,
    ) -> Result<(), String> {
        record.user = pass.user.unwrap_or(record.user);
        if !pass.tags.is_empty() {
            record.tags = pass.tags;
        }
        let asked = hostinfo["RequestTags"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        let mut asked: Vec<&str> = asked.iter().filter_map(Value::as_str).collect();
        asked.sort_unstable();
        asked.dedup();
        let has = |tag: &&str| record.tags.iter().any(|own| own == tag);
        if !asked.iter().all(has) {
            let may = |tag: &&str| pass.auth_key.is_none() && self.may_tag(record.user, tag);
            let refused: Vec<&str> = asked.iter().filter(|tag| !may(tag)).copied().collect();
            if !refused.is_empty() {
                // Headscale's text, which clients know.
                let refused = refused.join(" ");
                return Err(format!(
                    "requested tags [{refused}] are invalid or not permitted"
                ));
            }
            record.tags = asked.into_iter().map(ToOwned::to_owned).collect();
        }
        record.good_until = self.good_until(wall, record);
        Ok(())
    }

    /// When a key ends that this node is given now. Past the calendar's end is never.
    fn good_until(&self, wall: OffsetDateTime, record: &NodeRecord) -> Option<OffsetDateTime> {
        let time = (self.config.key_expiry).filter(|_| record.tags.is_empty())?;
        let until = wall.checked_add(time.try_into().ok()?)?;
        // Whole seconds, as it is stored.
        until.replace_nanosecond(0).ok()
    }

    /// Completes an administrator's order before it is committed: a node that loses its tags has a key that ends.
    pub fn complete(&self, wall: OffsetDateTime, order: &mut Write) {
        if let Write::Save(record) = order
            && record.tags.is_empty()
            && (self.nodes.get(&record.id)).is_some_and(|entry| !entry.record.tags.is_empty())
        {
            record.good_until = self.good_until(wall, record);
        }
    }

    /// The host number behind a record's address: to be stored with it.
    pub fn host_number(&self, record: &NodeRecord) -> u32 {
        self.config.addresses.number(record.v4)
    }

    /// Puts a committed registration into force and gives the answer. One that is pending is for
    /// [`Server::handle_applicant`]; nothing comes of it here.
    pub fn apply(&mut self, now: Instant, registration: Registration) -> RegisterResponse {
        match registration {
            Registration::Answer(answer) => answer,
            Registration::Pending(_) => RegisterResponse::default(),
            Registration::Insert(record, _) => {
                self.waits_no_more(record.machine);
                self.last_host = self.host_number(&record);
                self.next_id = self.next_id.max(record.id + 1);
                let id = record.id;
                // Not connected yet, and nobody was told otherwise.
                let presence = Presence::Leaving(now + OFFLINE_DELAY, Some(false));
                self.insert(*record, presence);
                self.watch_expiry(now, id);
                self.rebuild(now, id);
                self.welcome_to(id)
            }
            Registration::Rekey(record, _) => {
                let id = record.id;
                self.waits_no_more(record.machine);
                self.replace(now, *record);
                self.starts_anew(now, id);
                self.welcome_to(id)
            }
            Registration::Expire(record) => {
                let id = record.id;
                self.replace(now, *record);
                RegisterResponse {
                    node_key_expired: true,
                    ..self.welcome_to(id)
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
            self.set_alarm(id);
        }
    }

    fn welcome_to(&self, id: i64) -> RegisterResponse {
        self.welcome(self.nodes.get(&id).map(|entry| &entry.record))
    }

    fn welcome(&self, record: Option<&NodeRecord>) -> RegisterResponse {
        let owned = record.filter(|record| record.tags.is_empty());
        let (id, name) = match owned.map(|record| record.user) {
            Some(id) => (id, self.user_name(id)),
            None => (TAGGED_USER, TAGGED_USER_NAME),
        };
        RegisterResponse {
            user: RegisterUser {
                id,
                display_name: name.to_owned(),
            },
            login: RegisterLogin {
                id,
                provider: String::new(),
                login_name: name.to_owned(),
                display_name: name.to_owned(),
            },
            machine_authorized: true,
            ..RegisterResponse::default()
        }
    }

    /// Takes over what a host says of itself: its measurements stay when it says nothing of them,
    /// and its name follows its host name.
    pub(super) fn take_hostinfo(&self, record: &mut NodeRecord, mut hostinfo: Value) {
        if hostinfo.get("NetInfo").is_none_or(Value::is_null) {
            let kept = record
                .hostinfo
                .get("NetInfo")
                .filter(|info| !info.is_null());
            if let Some(kept) = kept.cloned() {
                hostinfo["NetInfo"] = kept;
            }
        }
        if !record.name_fixed && hostinfo.get("Hostname") != record.hostinfo.get("Hostname") {
            record.name = self.free_name(record.id, &hostinfo);
        }
        record.hostinfo = hostinfo;
    }

    /// A name for node `id` that no other node has.
    fn free_name(&self, id: i64, hostinfo: &Value) -> String {
        let hostname = hostinfo["Hostname"].as_str().unwrap_or_default();
        address::name(hostname, |name| {
            self.names.get(name).is_some_and(|other| *other != id)
        })
    }
}

fn refuse(text: &str) -> Registration {
    Registration::Answer(RegisterResponse {
        error: text.to_owned(),
        ..RegisterResponse::default()
    })
}

/// Whether a registration is a log-out: an expiry in the past asks for that, and wins over everything
/// else in the request.
pub fn is_logout(wall: OffsetDateTime, request: &RegisterRequest) -> bool {
    let expiry = request.expiry.and_then(WireTime::get);
    expiry.is_some_and(|expiry| expiry < wall)
}
