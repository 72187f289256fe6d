//! What a node remembers over a restart besides its keys: the network map, direct addresses, its home
//! relay, and whom it had sessions with.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ringtail_dataplane::channel::RegionId;
use serde::{Deserialize, Serialize};

use super::{Node, now};
use crate::key::NodePublic;
use crate::path::CachedPath;

pub(super) const NETMAP_CACHE: &str = "netmap.json";
const HOME_CACHE: &str = "home.json";
const SESSIONS_CACHE: &str = "sessions.json";
const ENDPOINTS_CACHE: &str = "endpoints.json";

/// A direct path remembered over a restart, on disk.
#[derive(Serialize, Deserialize)]
struct StoredPath {
    node_key: NodePublic,
    addr: SocketAddr,
    /// Seconds since 1970 of the last Pong.
    at: u64,
    rtt_us: u64,
    mtu: u16,
}

impl Node {
    /// Writes caches that changed; a full disk must not end a node.
    pub(super) fn save(&mut self) {
        if let Some(network) = self.unsaved.take()
            && let Err(error) = self.state.write_cache(NETMAP_CACHE, &network)
        {
            tracing::warn!(error = format!("{error:#}"), "the network map is not saved");
        }
        self.save_home();
        let dataplane = &self.dataplane;
        let sessions = self.agent.sessions(now(), &|id| dataplane.activity(id));
        let set = |keys: &[NodePublic]| keys.iter().copied().collect::<BTreeSet<_>>();
        // Their order matters little, and changes always.
        if set(&sessions) != set(&self.sessions_saved) {
            match self.state.write_cache(SESSIONS_CACHE, &sessions) {
                Ok(()) => self.sessions_saved = sessions,
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "sessions are not saved");
                }
            }
        }
        let wall = since_1970();
        let paths: Vec<StoredPath> = self
            .agent
            .cached_paths(now())
            .into_iter()
            .map(|path| StoredPath {
                node_key: path.node_key,
                addr: path.addr,
                at: wall.saturating_sub(path.age).as_secs(),
                rtt_us: u64::try_from(path.rtt.as_micros()).unwrap_or(u64::MAX),
                mtu: path.mtu,
            })
            .collect();
        if paths.is_empty() {
            return;
        }
        if let Err(error) = self.state.write_cache(ENDPOINTS_CACHE, &paths) {
            tracing::warn!(
                error = format!("{error:#}"),
                "direct addresses are not saved"
            );
        }
    }

    /// Writes the home relay if peers know of another now.
    pub(super) fn save_home(&mut self) {
        let home = self.agent.told_home().map(|region| region.0);
        if home.is_none() || home == self.home_saved {
            return;
        }
        match self.state.write_cache(HOME_CACHE, &home) {
            Ok(()) => self.home_saved = home,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "the home relay is not saved");
            }
        }
    }

    /// The home relay of the run before: peers that cannot be told of another expect us there.
    pub(super) fn load_home(&mut self) {
        let home: Option<Option<u32>> = self.state.read_cache(HOME_CACHE);
        if let Some(Some(home)) = home {
            self.home_saved = Some(home);
            self.agent.remember_home(RegionId(home));
        }
    }

    /// Peers that the run before had sessions with, some of whom do not know that it has ended.
    pub(super) fn load_sessions(&mut self, now: Instant) {
        let peers: Vec<NodePublic> = self.state.read_cache(SESSIONS_CACHE).unwrap_or_default();
        self.sessions_saved.clone_from(&peers);
        self.agent.remember_sessions(now, peers);
    }

    pub(super) fn load_paths(&mut self, now: Instant) {
        let wall = since_1970();
        let stored: Vec<StoredPath> = self.state.read_cache(ENDPOINTS_CACHE).unwrap_or_default();
        let paths: Vec<CachedPath> = stored
            .into_iter()
            .map(|path| CachedPath {
                node_key: path.node_key,
                addr: path.addr,
                age: wall.saturating_sub(Duration::from_secs(path.at)),
                rtt: Duration::from_micros(path.rtt_us),
                mtu: path.mtu,
            })
            .collect();
        self.agent.load_cached_paths(now, &paths);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "ages on disk are told by wall time"
)]
fn since_1970() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}
