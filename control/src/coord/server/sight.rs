//! Who is told of whom: all of all, or what a policy lets them.
//!
//! A policy is compiled for the nodes there are; whenever a node comes, goes, or changes in what a policy
//! looks at, it is compiled anew before the next message of any stream ([`Server::look`]). Each stream
//! then compares everything once. Its filter and what changes for its peers go in one message.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

use super::store::{NodeRecord, expired};
use super::view::View;
use super::{Server, TICK};
use crate::coord::routes::{APPROVALS_MAX, announced};
use crate::netmap::wire::{FilterRule, Node};
use crate::policy::{Compiled, Policy, PolicyNode};

/// The policy in force.
#[derive(Debug, Default)]
pub(super) struct Sight {
    policy: Option<Policy>,
    compiled: Option<Compiled>,
    /// What it was compiled for has changed.
    pub(super) stale: bool,
    /// Grows when it is compiled.
    pub(super) epoch: u64,
}

/// Names a filter.
pub(super) type FilterHash = [u8; 32];

impl Server {
    /// Replaces the policy; none lets all do everything.
    pub fn set_policy(&mut self, now: Instant, policy: Option<Policy>) {
        if self.sight.policy == policy {
            return;
        }
        self.sight.policy = policy;
        self.sight.compiled = None;
        self.sight.epoch += 1;
        self.look_again(now);
        for id in self.nodes.keys().copied().collect::<Vec<i64>>() {
            let Some(record) = self.nodes.get(&id).map(|entry| &entry.record) else {
                continue;
            };
            let mut new = record.clone();
            self.approve_own(&mut new);
            if new != *record {
                self.replace(now, new);
            }
        }
    }

    /// Users whom the policy names, and who are none.
    pub fn unknown_users(&self) -> Vec<&str> {
        let named = self.sight.policy.iter().flat_map(Policy::users);
        let known = |user: &str| self.config.users.values().any(|name| name == user);
        named.filter(|user| !known(user)).collect()
    }

    /// Whether a user may give its nodes this tag.
    pub(super) fn may_tag(&self, user: i64, tag: &str) -> bool {
        let policy = self.sight.policy.as_ref();
        policy.is_some_and(|policy| policy.may_tag(self.user_name(user), tag))
    }

    /// Whether the policy approves a route of this node, whatever an administrator says.
    pub(super) fn approves(&self, record: &NodeRecord, route: &IpNet) -> bool {
        let user = self.user_name(record.user);
        let policy = self.sight.policy.as_ref();
        policy.is_some_and(|policy| policy.approves(user, &record.tags, route))
    }

    /// Approves what a node announces and the policy lets it.
    pub(super) fn approve_own(&self, record: &mut NodeRecord) {
        if !self.has_policy() {
            return;
        }
        let own = announced(&record.hostinfo).into_iter();
        let own = own.filter(|route| self.approves(record, route));
        let mut approved = record.approved.clone();
        approved.extend(own);
        approved.sort_unstable();
        approved.dedup();
        if approved.len() <= APPROVALS_MAX {
            record.approved = approved;
        }
    }

    /// What a policy looks at has changed.
    pub(super) fn look_again(&mut self, now: Instant) {
        self.sight.stale = true;
        self.stale.extend(self.sessions.keys());
        self.tick.get_or_insert(now + TICK);
    }

    /// Whether there is a policy that has to be told of changes.
    pub(super) fn has_policy(&self) -> bool {
        self.sight.policy.is_some()
    }

    /// Compiles the policy for the nodes there are, if anything has changed.
    pub(super) fn look(&mut self) {
        if !std::mem::take(&mut self.sight.stale) {
            return;
        }
        let Some(policy) = &self.sight.policy else {
            return;
        };
        let nodes = self.nodes.values().map(|entry| {
            let record = &entry.record;
            PolicyNode {
                id: record.id,
                addresses: [IpAddr::V4(record.v4), IpAddr::V6(record.v6)],
                user: self.user_name(record.user).to_owned(),
                tags: record.tags.clone(),
                routes: entry.routes.clone(),
            }
        });
        let compiled = Compiled::new(policy, nodes.collect());
        if compiled.left_out() > 0 {
            tracing::error!(
                rules = compiled.left_out(),
                "the policy has too many parts for so many nodes: its last rules are left out"
            );
        }
        self.sight.compiled = Some(compiled);
        self.sight.epoch += 1;
    }

    /// Whether a node is told of the same as all others that are.
    pub(super) fn sees_all(&self, id: i64) -> bool {
        let entry = self.nodes.get(&id);
        !self.has_policy() && entry.is_some_and(|entry| !expired(&entry.record))
    }

    /// How a node is told of another, or of itself.
    pub(super) fn seen(&self, viewer: i64, id: i64) -> Option<Arc<Node>> {
        let wire = self.view.get(&id)?;
        if viewer == id || self.sees_all(viewer) {
            return Some(Arc::clone(wire));
        }
        let entry = self.nodes.get(&viewer)?;
        let compiled = self.sight.compiled.as_ref()?;
        if expired(&entry.record) || !compiled.sees(viewer, id) {
            return None;
        }
        let hidden = |route: &IpNet| !compiled.may_use(viewer, route);
        let hidden: Vec<_> = wire.primary_routes.iter().copied().filter(hidden).collect();
        if hidden.is_empty() {
            return Some(Arc::clone(wire));
        }
        let mut node = Node::clone(wire);
        node.primary_routes.retain(|route| !hidden.contains(route));
        if let Some(allowed) = &mut node.allowed_ips {
            allowed.retain(|route| !hidden.contains(route));
        }
        Some(Arc::new(node))
    }

    /// What a node is told of: itself, and its peers.
    pub(super) fn seen_by(&self, viewer: i64) -> View {
        if self.sees_all(viewer) {
            return Arc::clone(&self.view);
        }
        let seen = self
            .view
            .keys()
            .filter_map(|id| Some((*id, self.seen(viewer, *id)?)));
        Arc::new(seen.collect::<BTreeMap<_, _>>())
    }

    /// The packet filter of a node.
    pub(super) fn filter_of(&self, id: i64) -> Vec<FilterRule> {
        match &self.sight.compiled {
            Some(compiled) => compiled.filter(id),
            None if self.has_policy() => Vec::new(),
            None => vec![FilterRule::allow_all()],
        }
    }
}

/// A name for a filter, so that a stream need not keep it to see that another is the same.
pub(super) fn hash_of(filter: &[FilterRule]) -> FilterHash {
    let text = serde_json::to_vec(filter).unwrap_or_default();
    Sha256::digest(text).into()
}
