//! The state directory: keys, caches, and the lock that keeps a second node out.
//!
//! | file | holds | mode |
//! |---|---|---|
//! | `keys.json` | machine, node and DISCO private keys, the pinned control key, the node key to come | 0600 |
//! | `netmap.json` | the last network map and whose it is, so that a node comes up while coordination is down | 0600 |
//! | `endpoints.json` | validated direct addresses per peer | 0600 |
//! | `sessions.json` | node keys of the peers that had sessions lately, to shake hands with after a restart | 0600 |
//! | `timestamp` | how far the wall clock may have come, for the timestamps of the next run's handshakes | 0600 |
//! | `host.json` | what of the host's was changed, to be put back ([`ledger`](super::ledger)) | 0600 |
//! | `home.json` | the home relay that peers know of | 0600 |
//! | `set.toml` | what `ringtail set` changed | 0600 |
//! | `login.json` | the address that a person is to visit, while that is waited for | 0600 |
//! | `ringtail.sock` | the status socket | 0600 |
//! | `lock` | held by the running node | 0600 |
//! | `host.lock` | held by whoever has `host.json` open: the node, after its end its keeper | 0600 |
//!
//! The DISCO key is kept too, unlike Tailscale's: without coordination peers could not learn a
//! new one. How files are read and replaced is [`files`]' matter.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::files::{self, Readers};
use super::local_api::SOCKET_NAME;
use crate::config::PrefsChange;
use crate::key::{DiscoPrivate, MachinePrivate, MachinePublic, NodePrivate};

/// Where a node keeps its state unless told otherwise.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/ringtail";

/// Who looks whether a node runs (a keeper does) holds its lock for less than that.
const LOOKED_AT: Duration = Duration::from_millis(100);

/// What `ringtail set` changed.
const SET_FILE: &str = "set.toml";

/// See `driver/timestamps.rs`.
pub const TIMESTAMP_FILE: &str = "timestamp";

/// A node's identity. Everything secret is wiped when dropped.
#[derive(Clone, Debug)]
pub struct Keys {
    /// Identity of the host towards the coordination server.
    pub machine: MachinePrivate,
    /// WireGuard identity.
    pub node: NodePrivate,
    /// What is to take its place, while that is not certain.
    pub next: Option<NodePrivate>,
    /// When the node key was let in, in seconds since 1970, where that is known.
    pub since: Option<u64>,
    /// What DISCO messages are sealed with.
    pub disco: DiscoPrivate,
    /// The coordination server's key, once it has been seen, with the URL it belongs to.
    pub control: Option<(String, MachinePublic)>,
}

/// The text form of [`Keys`] on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeysFile {
    machine_key: Zeroizing<String>,
    node_key: Zeroizing<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next_node_key: Option<Zeroizing<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node_key_since: Option<u64>,
    disco_key: Zeroizing<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    control_url: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    control_key: Option<MachinePublic>,
}

/// An open state directory.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

/// Proof that this process is the only node on a state directory; dropping it lets the next in.
#[derive(Debug)]
pub struct StateLock {
    _file: Flock<File>,
}

impl StateDir {
    /// Opens the directory, making it (0700) when it is missing, and closing it to others who could
    /// write there.
    ///
    /// # Errors
    /// When it cannot be made, is not a directory, or is another user's.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        files::make_dir(path)?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file of the directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The status socket.
    pub fn socket(&self) -> PathBuf {
        self.file(SOCKET_NAME)
    }

    /// Takes the lock of the directory.
    ///
    /// # Errors
    /// When another process holds it.
    pub fn lock(&self) -> anyhow::Result<StateLock> {
        let file = files::lock(&self.file("lock"), LOOKED_AT)?.with_context(|| {
            format!(
                "another ringtail node runs on {}; stop it, or give this one its own --state-dir",
                self.path.display()
            )
        })?;
        Ok(StateLock { _file: file })
    }

    /// Whether a process holds the lock of the directory now.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub fn is_in_use(&self) -> anyhow::Result<bool> {
        let path = self.file("lock");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot open {}", path.display()));
            }
        };
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_) => Ok(false),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(true),
            Err((_, errno)) => {
                Err(errno).with_context(|| format!("cannot lock {}", path.display()))
            }
        }
    }

    /// Loads the keys, making and saving new ones the first time.
    ///
    /// # Errors
    /// When the file is open to others or another's, damaged, or cannot be written.
    pub fn keys(&self) -> anyhow::Result<Keys> {
        let path = self.file("keys.json");
        let Some(text) = files::read(&path, Readers::Nobody)? else {
            let keys = Keys {
                machine: MachinePrivate::generate(),
                node: NodePrivate::generate(),
                next: None,
                since: None,
                disco: DiscoPrivate::generate(),
                control: None,
            };
            self.save_keys(&keys)?;
            return Ok(keys);
        };
        // serde_json's message can quote the offending text, which may be a key.
        let file: KeysFile = serde_json::from_slice(&text).map_err(|error| {
            anyhow::anyhow!(
                "{} is damaged at line {}; restore it, or remove it to get a new identity",
                path.display(),
                error.line()
            )
        })?;
        let which = |name: &str| format!("{}: {name}", path.display());
        let next = file.next_node_key.as_ref().map(|text| text.parse());
        Ok(Keys {
            machine: (file.machine_key.parse()).with_context(|| which("machine_key"))?,
            node: (file.node_key.parse()).with_context(|| which("node_key"))?,
            next: next.transpose().with_context(|| which("next_node_key"))?,
            since: file.node_key_since,
            disco: (file.disco_key.parse()).with_context(|| which("disco_key"))?,
            control: file.control_url.zip(file.control_key),
        })
    }

    /// Saves the keys.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_keys(&self, keys: &Keys) -> anyhow::Result<()> {
        let (control_url, control_key) = keys.control.clone().unzip();
        let file = KeysFile {
            machine_key: keys.machine.to_text(),
            node_key: keys.node.to_text(),
            next_node_key: keys.next.as_ref().map(NodePrivate::to_text),
            node_key_since: keys.since,
            disco_key: keys.disco.to_text(),
            control_url,
            control_key,
        };
        let text = Zeroizing::new(serde_json::to_vec_pretty(&file)?);
        files::write(&self.file("keys.json"), &text)
    }

    /// Reads what was `set` in the node's settings.
    ///
    /// # Errors
    /// The file is damaged or another's: without it the node may do what it was told not to.
    pub fn read_set(&self) -> anyhow::Result<PrefsChange> {
        let path = self.file(SET_FILE);
        let Some(text) = files::read(&path, Readers::Anybody)? else {
            return Ok(PrefsChange::default());
        };
        let text = std::str::from_utf8(&text).ok();
        let set = text.and_then(|text| toml::from_str(text).ok());
        set.with_context(|| {
            let path = path.display();
            format!(
                "{path} is damaged; remove it, and what `ringtail set` had changed is as before"
            )
        })
    }

    /// Remembers what was `set`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_set(&self, set: &PrefsChange) -> anyhow::Result<()> {
        files::write(&self.file(SET_FILE), toml::to_string(set)?.as_bytes())
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// When it stays.
    pub fn remove(&self, name: &str) -> anyhow::Result<()> {
        let path = self.file(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Reads a cache, or nothing when it is missing, of another shape, or may be somebody else's
    /// word: a cache may be lost.
    pub fn read_cache<T: serde::de::DeserializeOwned>(&self, name: &str) -> Option<T> {
        let read = || -> anyhow::Result<Option<T>> {
            let text = files::read(&self.file(name), Readers::Anybody)?;
            Ok(text.map(|text| serde_json::from_slice(&text)).transpose()?)
        };
        read().unwrap_or_else(|error| {
            tracing::warn!(
                file = name,
                error = format!("{error:#}"),
                "cache left aside"
            );
            None
        })
    }

    /// Replaces a cache.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_cache(&self, name: &str, value: &impl Serialize) -> anyhow::Result<()> {
        files::write(&self.file(name), &serde_json::to_vec(value)?)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn keys_are_made_once_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("state")).unwrap();
        let mut keys = state.keys().unwrap();
        assert_eq!(state.keys().unwrap().node.public(), keys.node.public());
        keys.control = Some(("http://10.0.0.1".into(), keys.machine.public()));
        let next = NodePrivate::generate();
        (keys.next, keys.since) = (Some(next.clone()), Some(1_800_000_000));
        state.save_keys(&keys).unwrap();
        let again = state.keys().unwrap();
        let public = again.next.map(|key| key.public());
        assert_eq!((public, again.since), (Some(next.public()), keys.since));
        assert_eq!(
            (again.control, again.disco.public()),
            (keys.control, keys.disco.public())
        );
    }

    #[test]
    fn a_key_file_open_to_others_is_refused_and_a_damaged_one_does_not_leak() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        state.keys().unwrap();
        let path = state.file("keys.json");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(state.keys().unwrap_err().to_string().contains("chmod 600"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "{\"machine_key\":\"secret-text\"").unwrap();
        let error = format!("{:#}", state.keys().unwrap_err());
        assert!(
            error.contains("damaged") && !error.contains("secret-text"),
            "{error}"
        );
    }

    #[test]
    fn a_cache_that_others_can_write_is_nobodys_word() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        state.write_cache("home.json", &7).unwrap();
        assert_eq!(state.read_cache("home.json"), Some(7));
        let others = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(state.file("home.json"), others).unwrap();
        assert_eq!(state.read_cache::<u32>("home.json"), None);
        state.write_cache("home.json", &8).unwrap();
        assert_eq!(state.read_cache("home.json"), Some(8));
    }

    #[test]
    fn what_was_set_is_read_back_and_a_damaged_file_is_no_setting() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert_eq!(state.read_set().unwrap(), PrefsChange::default());
        let set = PrefsChange {
            exit_node: Some("b".into()),
            advertise_routes: Some("10.0.0.0/8".parse().unwrap()),
            ..PrefsChange::default()
        };
        state.write_set(&set).unwrap();
        assert_eq!(state.read_set().unwrap(), set);
        std::fs::write(state.file(SET_FILE), "exit_node = 7").unwrap();
        let error = state.read_set().unwrap_err().to_string();
        assert!(error.contains("set.toml is damaged"), "{error}");
        state.remove(SET_FILE).unwrap();
        state.remove(SET_FILE).unwrap();
    }

    #[test]
    fn a_second_node_is_kept_out_until_the_first_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let lock = state.lock().unwrap();
        assert!(
            state
                .lock()
                .unwrap_err()
                .to_string()
                .contains("another ringtail node")
        );
        drop(lock);
        // Somebody who only looks is waited for.
        let looking = Flock::lock(
            File::open(state.file("lock")).unwrap(),
            FlockArg::LockSharedNonblock,
        )
        .unwrap();
        let looker = std::thread::spawn(move || {
            std::thread::park_timeout(LOOKED_AT / 4);
            drop(looking);
        });
        state.lock().unwrap();
        looker.join().unwrap();
    }
}
