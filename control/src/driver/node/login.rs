//! How a node is let into its network, and how it leaves it: by an auth key, or by a person who visits an
//! address, which is remembered until he has.

use std::sync::Arc;

use rustls::RootCertStore;
use serde::{Deserialize, Serialize};
use serde_json::json;
use zeroize::Zeroizing;

use super::intake::Finding;
use super::start::Source;
use super::{Ended, Node, wall};
use crate::coord::CoordConfig;
use crate::coord::renewal::DAY;
use crate::driver::clock::since_1970;
use crate::driver::coord_client;
use crate::driver::coord_client::CoordClient;
use crate::driver::local_api::Call;
use crate::driver::state::{Keys, StateDir};
use crate::driver::underlay::Underlay;
use crate::key::NodePublic;

/// The address that a person is to visit.
pub(super) const LOGIN_FILE: &str = "login.json";
/// Programs that wait for the node to be let in at most; the oldest makes room.
const WAITING_MAX: usize = 16;

/// What is in [`LOGIN_FILE`].
#[derive(Serialize, Deserialize)]
struct Pending {
    coordination: String,
    node_key: NodePublic,
    url: String,
}

/// What it takes to reach the coordination server.
#[derive(Clone)]
pub(super) struct Coordination {
    pub(super) config: CoordConfig,
    pub(super) underlay: Underlay,
    pub(super) roots: Arc<RootCertStore>,
}

impl Coordination {
    /// What the client is told for another node key.
    pub(super) fn config_of(&self, node: NodePublic) -> CoordConfig {
        CoordConfig {
            node,
            old_node: None,
            followup: None,
            ..self.config.clone()
        }
    }
}

/// How it stands with being let in.
#[derive(Default)]
pub(super) struct Login {
    /// Our owner, since we were let in.
    user: Option<String>,
    /// What a person is to visit.
    url: Option<String>,
    /// Who wants to know when we are in.
    waiting: Vec<Call>,
    /// Who wants us out.
    leaving: Option<Call>,
}

impl Login {
    /// Whether this run was let in.
    pub(super) fn is_in(&self) -> bool {
        self.user.is_some()
    }

    /// What a person is to visit.
    pub(super) fn url(&self) -> Option<&str> {
        self.url.as_deref()
    }

    /// It is of no use any more.
    pub(super) fn forget_url(&mut self) {
        self.url = None;
    }
}

/// What the coordination client is told; nothing where the network comes from a file.
pub(super) fn coord_config(source: &Source, keys: &Keys, hostname: &str) -> Option<CoordConfig> {
    let Source::Coord {
        url,
        auth_key,
        tags,
        control_key,
    } = source
    else {
        return None;
    };
    Some(CoordConfig {
        url: url.clone(),
        auth_key: auth_key.clone(),
        hostname: hostname.to_owned(),
        tags: tags.clone(),
        machine: keys.machine.clone(),
        node: keys.node.public(),
        old_node: None,
        followup: None,
        disco: keys.disco.public(),
        control_key: *control_key,
    })
}

/// The address that a person was to visit for this key when the run before ended.
pub(super) fn pending(state: &StateDir, config: &CoordConfig) -> Option<String> {
    let pending: Pending = state.read_cache(LOGIN_FILE)?;
    let same = pending.coordination == config.url && pending.node_key == config.node;
    same.then_some(pending.url)
}

impl Node {
    /// Starts the coordination client for the key that we have, with the auth key or with none.
    pub(super) fn connect_coordination(&mut self, by_key: bool) {
        let Some(to) = self.coordination.clone() else {
            return;
        };
        let mut config = to.config_of(self.keys.node.public());
        config.followup = pending(&self.state, &config);
        config.auth_key = config.auth_key.filter(|_| by_key);
        let (names, own_state) = (self.names.clone(), self.self_state.subscribe());
        match CoordClient::start(config, names, to.underlay, to.roots, own_state) {
            Ok((client, events)) => {
                self.coord = Some(events);
                self.coord_client = Some(client);
            }
            // Its URL was looked at before.
            Err(error) => tracing::error!(error = format!("{error:#}"), "no coordination"),
        }
    }

    /// What renews our key from now on; how we are let in is settled before.
    pub(super) fn renew_by(&mut self, auth_key: Option<Zeroizing<String>>) {
        if let Some(coordination) = &mut self.coordination {
            coordination.config.auth_key = auth_key;
        }
    }

    /// A person has to visit this address so that `node_key` is let in.
    pub(super) fn ask_person(&mut self, node_key: NodePublic, url: String) {
        if self.login.url.as_ref() == Some(&url) {
            // Another connection waits for the same.
            return;
        }
        tracing::warn!(%url, "a person must let this node in: visit the address (`ringtail login` shows it again)");
        if let Some(coordination) = &self.coordination {
            let pending = Pending {
                coordination: coordination.config.url.clone(),
                node_key,
                url: url.clone(),
            };
            self.write(LOGIN_FILE, &pending, "the address to visit is");
        }
        for call in &self.login.waiting {
            call.tell(json!({"url": url}));
        }
        self.login.url = Some(url);
    }

    /// The server has let us in, or takes us back by the key that we had.
    pub(super) fn let_in(&mut self, user: String) {
        tracing::info!(%user, "registered");
        if self.keys.since.is_none() {
            self.keys.since = Some(since_1970().as_secs());
            if let Err(error) = self.state.save_keys(&self.keys) {
                tracing::debug!(
                    error = format!("{error:#}"),
                    "since when we are in is not saved"
                );
            }
        }
        self.login.user = Some(user.clone());
        if self.renewal.asks_person() || self.next_is_asked_for() {
            // The address is the next key's, and so is whoever waits until it is visited.
            return;
        }
        if let Err(error) = self.state.remove(LOGIN_FILE) {
            tracing::warn!(error = format!("{error:#}"), "the address visited stays");
        }
        for call in self.login.waiting.drain(..) {
            call.answer(json!({"state": "in", "user": user}));
        }
        self.login.url = None;
    }

    /// The server does not let us in.
    pub(super) fn refused(&mut self, why: &str) {
        for call in self.login.waiting.drain(..) {
            call.refuse(why);
        }
    }

    /// `ringtail login`: waits until we are in.
    pub(super) fn take_login(&mut self, call: Call) {
        if self.coordination.is_none() {
            call.refuse("this node takes its network from a file: there is nowhere to log in");
            return;
        }
        if let Some(user) = &self.login.user
            && !self.key_ends()
        {
            call.answer(json!({"state": "in", "user": user, "before": true}));
            return;
        }
        match &self.login.url {
            Some(url) => call.tell(json!({"url": url})),
            None => call.tell(json!({"state": self.surroundings.coordination_state})),
        }
        if self.login.waiting.len() >= WAITING_MAX {
            self.login.waiting.remove(0);
        }
        self.login.waiting.push(call);
        if self.login.is_in() || self.agent.key_has_expired() {
            self.renew(true);
        }
    }

    /// Whether our key has expired, or does within a day.
    fn key_ends(&self) -> bool {
        let soon = |until| until - wall() < DAY;
        self.agent.key_has_expired() || self.agent.key_expiry().is_some_and(soon)
    }

    /// `ringtail logout`: what becomes of it, [`Self::logged_out`] takes.
    pub(super) fn take_logout(&mut self, call: Call) {
        let Some(to) = self.coordination.clone() else {
            call.refuse("this node takes its network from a file: there is nowhere to log out");
            return;
        };
        if self.login.leaving.is_some() {
            call.refuse("this node is being logged out already");
            return;
        }
        self.login.leaving = Some(call);
        let (findings, names) = (self.findings.0.clone(), self.names.clone());
        tokio::task::spawn_local(async move {
            let told = coord_client::log_out(to.config, names, to.underlay, to.roots).await;
            let told = told.map_err(|error| format!("{error:#}"));
            let _ = findings.send(Finding::LoggedOut(told)).await;
        });
    }

    /// The coordination server was told that we leave, or could not be.
    pub(super) fn logged_out(&mut self, told: Result<(), String>) -> Option<Ended> {
        let call = self.login.leaving.take()?;
        match told {
            Ok(()) => Some(Ended::LoggedOut(call)),
            Err(why) => {
                call.refuse(&format!(
                    "the coordination server could not be told, and this node stays in the network: {why}"
                ));
                None
            }
        }
    }
}
