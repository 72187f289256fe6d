//! How it stands with this node and with the peers that may not take part: told once, at the change.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::directory::is_meant;
use super::{Agent, HeldBack, HoldReason, Network, Output, Standing};
use crate::key::NodePublic;
use crate::netmap::wire::WireTime;

/// What a person whose node's key has expired is to do.
const RENEW: &str = "`ringtail login`, start ringtail again with an auth key (--auth-key-file), or have an \
                     administrator extend the key";

impl Agent {
    /// Tells what changes with `network` for ourselves and for peers that are held back.
    pub(super) fn tell_standing(&mut self, network: &Network) {
        let before = self.network.as_ref();
        let old = before.map_or_else(Standing::default, |before| before.own.clone());
        let new = &network.own;
        let expiry = text(new.key_expiry);
        if new.expired && !old.expired {
            tracing::error!("this node's key has expired, and peers refuse it: {RENEW}");
            self.story("expired", json!({"key_expiry": expiry}));
        } else if old.expired && !new.expired {
            tracing::info!(key_expiry = expiry, "this node's key is good again");
            self.story("renewed", json!({"key_expiry": expiry}));
        }
        if new.unapproved && !old.unapproved {
            tracing::warn!("an administrator has to approve this node before peers let it in");
        }
        for problem in new.health.iter().filter(|one| !old.health.contains(one)) {
            tracing::warn!(problem, "the coordination server reports a problem");
        }
        let held: BTreeMap<NodePublic, HoldReason> = self
            .network
            .iter()
            .flat_map(|before| &before.held_back)
            .map(|node| (node.node_key, node.why))
            .collect();
        for node in &network.held_back {
            if held.get(&node.node_key) == Some(&node.why) {
                continue;
            }
            let (peer, why) = (super::short_name(&node.name), node.why.name());
            tracing::info!(peer, why, "a peer is held back");
            self.story("held_back", json!({"peer": peer, "why": why}));
        }
    }

    /// Coordination has these endpoints of us.
    pub fn handle_told_endpoints(&mut self, now: Instant, endpoints: &[SocketAddr]) {
        if self.twin.told(now, endpoints) {
            self.tell_twin(now);
        }
        self.correct(now);
    }

    /// Tells coordination our endpoints again, if it has those of another machine.
    pub(super) fn correct(&mut self, now: Instant) {
        if self.twin.take_correction(now) {
            self.corrections = self.corrections.wrapping_add(1);
            self.out.push_back(Output::Publish);
        }
    }

    /// A relay has two connections that use our key in turns.
    pub(super) fn doubled(&mut self, now: Instant, relay: &str) {
        if self.twin.doubled(now, relay) {
            self.tell_twin(now);
        }
    }

    fn tell_twin(&mut self, now: Instant) {
        if let Some(problem) = self.twin.health(now) {
            tracing::error!("{problem}");
            self.story("twin", json!({"problem": problem}));
        }
    }

    /// When our key expires, by our wall clock, unless it has or never does.
    pub fn key_expiry(&self) -> Option<OffsetDateTime> {
        let own = &self.network.as_ref()?.own;
        own.key_expiry.filter(|_| !own.expired)?.get()
    }

    /// Whether it has.
    pub fn key_has_expired(&self) -> bool {
        let network = self.network.as_ref();
        network.is_some_and(|network| network.own.expired)
    }

    /// We have another node key from now on.
    pub fn handle_own_key(&mut self, node_key: NodePublic) {
        self.setup.node_key = node_key;
        self.paths.set_own_key(node_key);
        self.tell_key_for_plain();
        self.story("key", json!({"node_key": node_key}));
    }

    /// What is wrong, for people; nothing where all is well.
    pub(super) fn health(&self, now: Instant) -> Vec<String> {
        let own = self.network.as_ref().map(|network| &network.own);
        let expired = own.filter(|own| own.expired).map(|own| {
            let since = text(own.key_expiry).map_or_else(String::new, |at| format!(" at {at}"));
            format!("this node's key expired{since}, and peers refuse it: {RENEW}")
        });
        let unapproved = own
            .filter(|own| own.unapproved)
            .map(|_| "an administrator has to approve this node".to_owned());
        let told = own.into_iter().flat_map(|own| own.health.iter().cloned());
        let refused = self.refused.iter().cloned();
        let all = expired.into_iter().chain(unapproved);
        let all = all.chain(self.twin.health(now));
        let all = all.chain(told).chain(refused);
        all.chain(self.health.lines()).collect()
    }
}

impl Network {
    /// Why the node that a person means takes no part; none if it is not held back.
    pub(super) fn why_held_back(&self, text: &str) -> Option<String> {
        let node = self
            .held_back
            .iter()
            .find(|node| is_meant(text, &node.name, node.node_key, &node.addresses))?;
        Some(node.sentence())
    }
}

impl HeldBack {
    /// That it is, and why, for people.
    pub(super) fn sentence(&self) -> String {
        let why = match self.why {
            HoldReason::Expired => "its key has expired",
            HoldReason::Jailed => "it may not open connections to this node",
            HoldReason::Unreachable => "it has neither a DISCO key nor a relay",
            HoldReason::NoAccess => "the network gives it no access",
        };
        let name = super::short_name(&self.name);
        format!("{name} is held back: {why}")
    }
}

/// A time as people and programs read it.
pub(super) fn text(time: Option<WireTime>) -> Option<String> {
    time?
        .get()?
        .replace_nanosecond(0)
        .ok()?
        .format(&Rfc3339)
        .ok()
}
