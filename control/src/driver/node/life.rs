//! The life of a node's process: the node takes part, is taken down, and takes part again.
//!
//! A node that is down is not there at all: no TUN, no sockets, no routes, no connections. What stays is
//! the process with its lock, its settings and its status socket ([`Desk`]). It comes up as at a start, but
//! that a failure then is for whoever asked, and does not end the process.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use ringtail_dataplane::{Dataplane, StartError};
use rustls::RootCertStore;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use zeroize::Zeroizing;

use super::caches::CACHES;
use super::desk::Desk;
use super::login::{LOGIN_FILE, coord_config};
use super::start::{Source, dataplane_config};
use super::{Ended, Node};
use crate::config::{Layers, NodeConfig};
use crate::coord::NotAdmitted;
use crate::driver::coord_client;
use crate::driver::keeper::Keeper;
use crate::driver::ledger::{Entry, Ledger};
use crate::driver::local_api::{Call, Request};
use crate::driver::names::Names;
use crate::driver::panics::Panics;
use crate::driver::runtime::Kind;
use crate::driver::signals::{Signals, Told};
use crate::driver::state::{Keys, StateDir};
use crate::driver::underlay::Underlay;
use crate::key::NodePrivate;

/// The kernel may still be about to let go of the sockets and the TUN of before: starting is tried so often
/// then, and so far apart.
const STARTS: u32 = 20;
const START_PAUSE: Duration = Duration::from_millis(100);

/// What a node is made of.
pub(super) struct Parts {
    pub(super) keys: Keys,
    pub(super) source: Source,
    pub(super) dataplane: Dataplane,
}

impl Parts {
    /// Reads what is on disk and starts the data plane, in this order: a wrong file is told before anything
    /// changes.
    ///
    /// # Errors
    /// What is wrong, or cannot be had.
    pub(super) fn make(
        config: &NodeConfig,
        state: &StateDir,
        auth_key: Option<Zeroizing<String>>,
    ) -> anyhow::Result<Self> {
        let (keys, source) = Self::read(config, state, auth_key)?;
        let dataplane = Dataplane::start(dataplane_config(config, &keys));
        Ok(Self {
            keys,
            source,
            dataplane: dataplane.context("cannot start")?,
        })
    }

    fn read(
        config: &NodeConfig,
        state: &StateDir,
        auth_key: Option<Zeroizing<String>>,
    ) -> anyhow::Result<(Keys, Source)> {
        let keys = state.keys()?;
        let source = Source::read(config, &keys, auth_key)?;
        Ok((keys, source))
    }
}

/// Why a node is down.
enum Why {
    Told,
    LoggedOut,
    Refused(String),
}

impl Why {
    /// In a word.
    fn name(&self) -> &'static str {
        match self {
            Self::Told => "down",
            Self::LoggedOut => "logged out",
            Self::Refused(_) => "refused",
        }
    }

    /// In a sentence that says what to do.
    fn sentence(&self) -> String {
        match self {
            Self::Told => "this node is down: `ringtail up` takes part again".into(),
            Self::LoggedOut => {
                "this node is logged out: `ringtail login` lets a person take it in again, \
                 `ringtail up` tries its auth key"
                    .into()
            }
            Self::Refused(why) => {
                format!("{why}; `ringtail login` lets a person take this node in")
            }
        }
    }
}

/// What tells the coordination server that this node leaves.
type LogOut = JoinHandle<anyhow::Result<()>>;

/// How that ended, or never where nobody wants it.
async fn logged_out(leaving: &mut Option<(Call, LogOut)>) -> anyhow::Result<()> {
    match leaving {
        Some((_, task)) => task.await?,
        None => std::future::pending().await,
    }
}

/// See above.
pub(super) struct Life<'a> {
    pub(super) config: NodeConfig,
    pub(super) state: StateDir,
    pub(super) ledger: Ledger,
    pub(super) auth_key: Option<Zeroizing<String>>,
    pub(super) roots: Arc<RootCertStore>,
    pub(super) kind: Kind,
    pub(super) signals: &'a Signals,
    pub(super) panics: &'a Panics,
    pub(super) keeper: &'a mut Keeper,
}

impl Life<'_> {
    /// Lives until the process is told to end.
    ///
    /// # Errors
    /// The first start fails, or the node cannot go on.
    pub(super) async fn run(mut self, layers: Layers, parts: Parts) -> anyhow::Result<()> {
        let tun = parts.dataplane.tun_name().to_owned();
        let mut desk = Desk::open(&self.config, self.state.clone(), layers, &tun)?;
        let mut node = self.start(parts, &desk).await?;
        let mut first = true;
        loop {
            let ended = node
                .run(&mut desk, self.signals, self.panics, self.keeper)
                .await?;
            let why = match ended {
                Ended::Told => return Ok(()),
                Ended::Refused(why) if first => return Err(NotAdmitted(why).into()),
                Ended::Refused(why) => Why::Refused(why),
                Ended::Down(call) => {
                    call.answer(json!({"state": "down"}));
                    Why::Told
                }
                Ended::LoggedOut(call) => {
                    self.forget()?;
                    call.answer(json!({"state": "logged out"}));
                    Why::LoggedOut
                }
            };
            tracing::info!("{}", why.sentence());
            node = match self.wait(why, &mut desk).await? {
                Some(node) => node,
                None => return Ok(()),
            };
            first = false;
        }
    }

    async fn start(&self, parts: Parts, desk: &Desk) -> anyhow::Result<Node> {
        let (config, state) = (self.config.clone(), self.state.clone());
        let (ledger, roots) = (self.ledger.clone(), Arc::clone(&self.roots));
        Node::start(config, state, ledger, desk.prefs(), parts, roots, self.kind).await
    }

    /// Down, until somebody wants the node up and it can be had, or the process to end.
    async fn wait(&mut self, mut why: Why, desk: &mut Desk) -> anyhow::Result<Option<Node>> {
        let mut leaving = None;
        loop {
            let call = tokio::select! {
                told = self.signals.next() => match told? {
                    Told::End(_) => return Ok(None),
                    Told::ReadAgain => {
                        tracing::info!("SIGHUP: files are read when the node is up again");
                        continue;
                    }
                },
                () = self.keeper.watch() => continue,
                words = self.panics.first() => anyhow::bail!("{words}"),
                told = logged_out(&mut leaving) => {
                    let told = told.and_then(|()| self.forget());
                    if told.is_ok() {
                        why = Why::LoggedOut;
                    }
                    if let Some((call, _)) = leaving.take() {
                        call.answer_result(told.map(|()| json!({"state": why.name()})));
                    }
                    continue;
                }
                Some(call) = desk.calls.recv() => call,
            };
            match &call.request {
                Request::Up | Request::Login | Request::Logout if leaving.is_some() => {
                    call.refuse("this node is being logged out already");
                }
                Request::Up | Request::Login => {
                    let made = tokio::select! {
                        made = self.again(&call, desk) => made,
                        told = self.told_to_end() => return told.map(|()| None),
                    };
                    match made {
                        Ok(mut node) => {
                            node.take_call(call, desk);
                            return Ok(Some(node));
                        }
                        Err(error) => call.refuse(&format!("{error:#}")),
                    }
                }
                Request::Down => call.answer(json!({"state": why.name()})),
                Request::Status => {
                    let status = self.status(&why, desk);
                    call.answer(status);
                }
                Request::Prefs => call.answer(desk.tell_prefs()),
                Request::Set { change } => {
                    let answer = desk.set(change);
                    call.answer_result(answer);
                }
                Request::Logout => match self.log_out() {
                    Ok(task) => leaving = Some((call, task)),
                    Err(error) => call.refuse(&format!("{error:#}")),
                },
                Request::Ip { .. }
                | Request::Whois { .. }
                | Request::DnsStatus
                | Request::DnsQuery { .. }
                | Request::ExitNodes
                | Request::Ping { .. }
                | Request::Netcheck => call.refuse(&why.sentence()),
            }
        }
    }

    /// Comes up again: by a person if he wants to log in, else by the auth key, if there is one. That renews the
    /// node's key later in any case.
    async fn again(&self, call: &Call, desk: &Desk) -> anyhow::Result<Node> {
        let by_key = self
            .auth_key
            .clone()
            .filter(|_| call.request == Request::Up);
        let mut tried = 0;
        let parts = loop {
            tried += 1;
            match Parts::make(&self.config, &self.state, by_key.clone()) {
                Err(error) if tried < STARTS && error.downcast_ref::<StartError>().is_some() => {
                    tokio::time::sleep(START_PAUSE).await;
                }
                made => break made?,
            }
        };
        tracing::info!("the node comes up again");
        let mut node = self.start(parts, desk).await?;
        node.renew_by(self.auth_key.clone());
        Ok(node)
    }

    fn status(&self, why: &Why, desk: &Desk) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "state": why.name(),
            "hostname": desk.prefs().hostname,
            "addresses": [],
            "expired": false,
            "health": [why.sentence()],
            "coordination": {
                "kind": self.config.coord.as_deref().unwrap_or("static"),
                "state": why.name(),
            },
            "peers": [],
            "drops": {},
        })
    }

    async fn told_to_end(&self) -> anyhow::Result<()> {
        while let Told::ReadAgain = self.signals.next().await? {}
        Ok(())
    }

    /// Takes the key out of force while the node is down, beside whatever else happens: the server may not answer.
    fn log_out(&self) -> anyhow::Result<LogOut> {
        let (keys, source) = Parts::read(&self.config, &self.state, None)?;
        let config = coord_config(&source, &keys, "")
            .context("this node takes its network from a file: there is nowhere to log out")?;
        let underlay = Underlay {
            fwmark: self.config.fwmark.unwrap_or(0),
            outside: None,
        };
        let roots = Arc::clone(&self.roots);
        let task = coord_client::log_out(config, Names::default(), underlay, roots);
        Ok(tokio::task::spawn_local(task))
    }

    /// Becomes another node of the same machine: with another node key, and without what was known of the
    /// network.
    fn forget(&self) -> anyhow::Result<()> {
        let mut keys = self.state.keys()?;
        (keys.node, keys.next, keys.since) = (NodePrivate::generate(), None, None);
        self.state.save_keys(&keys)?;
        for file in CACHES.into_iter().chain([LOGIN_FILE]) {
            self.state.remove(file)?;
        }
        // The server has our key as expired, and nobody sends there.
        if let Some(announced) = self.ledger.announced() {
            self.ledger.done(&Entry::Announced(announced));
        }
        Ok(())
    }
}
