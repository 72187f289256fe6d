//! What a node remembers over a restart besides its keys: the network map, direct addresses, its home
//! relay, and whom it had sessions with.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ringtail_dataplane::RegionId;
use serde::{Deserialize, Serialize};

use super::{Node, now};
use crate::agent::Network;
use crate::driver::clock::since_1970;
use crate::driver::state::StateDir;
use crate::key::NodePublic;
use crate::path::CachedPath;

const NETMAP_CACHE: &str = "netmap.json";
const HOME_CACHE: &str = "home.json";
const SESSIONS_CACHE: &str = "sessions.json";
const ENDPOINTS_CACHE: &str = "endpoints.json";

/// All of them, but [`HOME_CACHE`]: what was known of a network that this node is in no more.
pub(super) const CACHES: [&str; 3] = [NETMAP_CACHE, SESSIONS_CACHE, ENDPOINTS_CACHE];

/// A path that answers again and again is written anew so often: how old paths are counts in hours
/// ([`CACHED_PATH_AGE_MAX`](crate::path::CACHED_PATH_AGE_MAX)).
const PATH_AGE_STEP: Duration = Duration::from_secs(15 * 60);

/// A direct path remembered over a restart, on disk.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredPath {
    node_key: NodePublic,
    addr: SocketAddr,
    /// Seconds since 1970 of the last Pong.
    at: u64,
    rtt_us: u64,
    mtu: u16,
}

/// The last network map, and whose it is.
#[derive(Serialize, Deserialize)]
struct StoredMap {
    coordination: String,
    network: Network,
}

/// The network map of the run before. Another coordination server's is of another network, whose peers and routes are
/// nothing to us.
pub(super) fn stored_map(state: &StateDir, coordination: &str) -> Option<Network> {
    let stored: StoredMap = state.read_cache(NETMAP_CACHE)?;
    (stored.coordination == coordination).then_some(stored.network)
}

impl Node {
    /// Writes caches that changed; a full disk must not end a node.
    pub(super) fn save(&mut self) {
        let of = self.surroundings.coordination.clone();
        if let (Some(network), Some(coordination)) = (self.unsaved.take(), of) {
            let map = StoredMap {
                coordination,
                network,
            };
            self.write(NETMAP_CACHE, &map, "the network map is");
        }
        self.save_home();
        let dataplane = &self.dataplane;
        let sessions = self.agent.sessions(now(), &|id| dataplane.activity(id));
        let set = |keys: &[NodePublic]| keys.iter().copied().collect::<BTreeSet<_>>();
        // Their order matters little, and changes always.
        if set(&sessions) != set(&self.sessions_saved)
            && self.write(SESSIONS_CACHE, &sessions, "sessions are")
        {
            self.sessions_saved = sessions;
        }
        self.save_paths();
    }

    /// Replaces a cache; whether that is done. What it is about, with its verb, is for the log.
    pub(super) fn write(&self, name: &str, value: &impl Serialize, what: &str) -> bool {
        let written = self.state.write_cache(name, value);
        if let Err(error) = &written {
            tracing::warn!(error = format!("{error:#}"), "{what} not saved");
        }
        written.is_ok()
    }

    fn save_paths(&mut self) {
        let since_1970 = since_1970();
        let paths: Vec<StoredPath> = self
            .agent
            .cached_paths(now())
            .into_iter()
            .map(|path| StoredPath {
                node_key: path.node_key,
                addr: path.addr,
                at: since_1970.saturating_sub(path.age).as_secs(),
                rtt_us: u64::try_from(path.rtt.as_micros()).unwrap_or(u64::MAX),
                mtu: path.mtu,
            })
            .collect();
        if !paths.is_empty()
            && worth_writing(&self.paths_saved, &paths)
            && self.write(ENDPOINTS_CACHE, &paths, "direct addresses are")
        {
            self.paths_saved = paths;
        }
    }

    /// Writes the home relay if peers know of another now.
    pub(super) fn save_home(&mut self) {
        let home = self.agent.told_home().map(|region| region.0);
        if home.is_some()
            && home != self.home_saved
            && self.write(HOME_CACHE, &home, "the home relay is")
        {
            self.home_saved = home;
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
        let since_1970 = since_1970();
        let stored: Vec<StoredPath> = self.state.read_cache(ENDPOINTS_CACHE).unwrap_or_default();
        let paths: Vec<CachedPath> = stored
            .iter()
            .map(|path| CachedPath {
                node_key: path.node_key,
                addr: path.addr,
                age: since_1970.saturating_sub(Duration::from_secs(path.at)),
                rtt: Duration::from_micros(path.rtt_us),
                mtu: path.mtu,
            })
            .collect();
        self.agent.load_cached_paths(now, &paths);
        self.paths_saved = stored;
    }
}

/// Whether what is on disk says something else than `paths`, but for times that make no difference.
fn worth_writing(saved: &[StoredPath], paths: &[StoredPath]) -> bool {
    let of = |path: &StoredPath| (path.node_key, path.addr, path.mtu);
    let kept: BTreeMap<_, u64> = saved.iter().map(|path| (of(path), path.at)).collect();
    let apart = |path: &StoredPath| {
        let at = kept.get(&of(path));
        at.is_none_or(|at| at.abs_diff(path.at) >= PATH_AGE_STEP.as_secs())
    };
    saved.len() != paths.len() || paths.iter().any(apart)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::NodePrivate;

    #[test]
    fn a_network_map_is_of_its_coordination_server_alone() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert_eq!(stored_map(&state, "https://a.example"), None);
        let network = Network {
            addresses: vec!["100.64.0.1/32".parse().unwrap()],
            ..Network::default()
        };
        // As it was stored before: nobody knows whose it is.
        state.write_cache(NETMAP_CACHE, &network).unwrap();
        assert_eq!(stored_map(&state, "https://a.example"), None);
        let map = StoredMap {
            coordination: "https://a.example".into(),
            network: network.clone(),
        };
        state.write_cache(NETMAP_CACHE, &map).unwrap();
        assert_eq!(stored_map(&state, "https://b.example"), None);
        assert_eq!(stored_map(&state, "https://a.example"), Some(network));
    }

    #[test]
    fn paths_are_written_when_they_change_and_not_for_every_pong() {
        let path = |seed: u8, addr: &str, at, mtu| StoredPath {
            node_key: NodePrivate::clamped([seed; 32]).public(),
            addr: addr.parse().unwrap(),
            at,
            rtt_us: at % 1000,
            mtu,
        };
        let (near, far) = ("192.0.2.1:7", "192.0.2.2:7");
        let saved = [path(1, near, 1_000, 1280), path(2, far, 1_000, 1280)];
        let now = |paths: &[StoredPath]| worth_writing(&saved, paths);
        assert!(worth_writing(&[], &saved));
        // The order is that of keys and ages, and another says nothing.
        assert!(!now(&[
            path(2, far, 1_890, 1280),
            path(1, near, 1_010, 1280)
        ]));
        // Of one of them: its time, address, size, peer, and that it is gone.
        assert!(now(&[
            path(2, far, 1_900, 1280),
            path(1, near, 1_010, 1280)
        ]));
        assert!(now(&[path(2, far, 10, 1280), path(1, near, 1_000, 1280)]));
        assert!(now(&[
            path(2, near, 1_000, 1280),
            path(1, near, 1_000, 1280)
        ]));
        assert!(now(&[
            path(2, far, 1_000, 1420),
            path(1, near, 1_000, 1280)
        ]));
        assert!(now(&[
            path(3, far, 1_000, 1280),
            path(1, near, 1_000, 1280)
        ]));
        assert!(now(&[path(1, near, 1_000, 1280)]));
    }
}
