//! Nodes as they are stored, and what the store is told of them behind.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use serde_json::Value;
use time::OffsetDateTime;

use super::presence::Presence;
use super::{Entry, Server};
use crate::key::{DiscoPublic, MachinePublic, NodePublic};

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
    /// Its owner, of no matter while it has tags.
    pub user: i64,
    /// Its tags, sorted.
    pub tags: Vec<String>,
    /// First label of its name.
    pub name: String,
    /// The name was given by an administrator, and does not follow the host's.
    pub name_fixed: bool,
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
    /// When it will, by itself.
    pub good_until: Option<OffsetDateTime>,
    /// Routes that count when it announces them; sorted, without host bits.
    pub approved: Vec<IpNet>,
    /// End of its last stream.
    pub last_seen: Option<OffsetDateTime>,
    /// First registration.
    pub created: OffsetDateTime,
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

impl Server {
    /// What the store has to be told, oldest state gone.
    pub fn take_writes(&mut self) -> Vec<Write> {
        let saves = std::mem::take(&mut self.unsaved);
        let saves = saves.into_iter().filter_map(|id| {
            let entry = self.nodes.get(&id)?;
            Some(Write::Save(Box::new(entry.record.clone())))
        });
        let deletes = std::mem::take(&mut self.deleted);
        let online = std::mem::take(&mut self.presence_unsaved).then(|| {
            let online = |entry: &&Entry| entry.presence == Presence::Online;
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
}

pub(super) fn expired(record: &NodeRecord) -> bool {
    record.expires.is_some()
}
