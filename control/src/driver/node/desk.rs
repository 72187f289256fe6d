//! What of a node stays while it is down: its settings, and the sockets by which it is asked.

use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::host_name;
use crate::config::{Layers, NodeConfig, Prefs, PrefsChange};
use crate::driver::local_api::{self, Call, GROUP_SOCKET_DIR, Reader};
use crate::driver::state::StateDir;
use crate::driver::unix_socket::SocketFile;

/// Questions that wait for an answer.
const QUESTIONS_MAX: usize = 64;

/// See above.
pub(super) struct Desk {
    pub(super) calls: mpsc::Receiver<Call>,
    layers: Layers,
    from_network_file: bool,
    state: StateDir,
    /// While there is somebody behind them.
    _sockets: Vec<SocketFile>,
}

impl Desk {
    /// Opens the sockets. The caller holds the state directory's lock.
    ///
    /// # Errors
    /// The owner's cannot be made. A node can do without the group's, as where one of another namespace has
    /// that name.
    pub(super) fn open(
        config: &NodeConfig,
        state: StateDir,
        layers: Layers,
        tun: &str,
    ) -> anyhow::Result<Self> {
        let (sender, calls) = mpsc::channel(QUESTIONS_MAX);
        let (listener, file) = local_api::listen(&state.socket())?;
        let mut sockets = vec![file];
        let serve = local_api::serve(listener, Reader::Owner, sender.clone());
        tokio::task::spawn_local(serve);
        if let Some(group) = &config.status_group {
            let path = Path::new(GROUP_SOCKET_DIR).join(format!("{tun}.sock"));
            match local_api::listen_for_group(&path, group) {
                Ok((listener, file)) => {
                    sockets.push(file);
                    tracing::info!(%group, socket = %path.display(), "this group may look at the node");
                    tokio::task::spawn_local(local_api::serve(listener, Reader::Group, sender));
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(%group, error, "this group cannot look at the node");
                }
            }
        }
        Ok(Self {
            calls,
            layers,
            from_network_file: config.network.is_some(),
            state,
            _sockets: sockets,
        })
    }

    /// The settings in force.
    pub(super) fn prefs(&self) -> Prefs {
        let chosen = self.layers.chosen();
        chosen.settled(&host_name(), self.from_network_file)
    }

    /// The settings in force, for people.
    pub(super) fn tell_prefs(&self) -> Value {
        json!({"prefs": self.prefs(), "until_restart": self.layers.hidden()})
    }

    /// Takes a change, and remembers it for the runs to come.
    ///
    /// # Errors
    /// A sentence that says why nothing changes.
    pub(super) fn set(&mut self, change: &PrefsChange) -> anyhow::Result<Value> {
        let changed = self.layers.changed(change).map_err(anyhow::Error::msg)?;
        let written = self.state.write_set(changed.set());
        written.context("nothing is changed")?;
        tracing::info!(change = %json!(change), "settings changed");
        self.layers = changed;
        Ok(self.tell_prefs())
    }
}
