//! The state directory: keys, caches, and the lock that keeps a second node out.
//!
//! | file | holds | mode |
//! |---|---|---|
//! | `keys.json` | machine, node and DISCO private keys, the pinned control key | 0600 |
//! | `netmap.json` | the last network map, so that a node comes up while coordination is down | 0600 |
//! | `endpoints.json` | validated direct addresses per peer | 0600 |
//! | `sessions.json` | node keys of the peers that had sessions lately, to shake hands with after a restart | 0600 |
//! | `timestamp` | how far the wall clock may have come, for the timestamps of the next run's handshakes | 0600 |
//! | `home.json` | the home relay that peers know of | 0600 |
//! | `ringtail.sock` | the status socket | 0600 |
//! | `lock` | held by the running node | 0600 |
//!
//! The DISCO key is kept too, unlike Tailscale's: without coordination peers could not learn a
//! new one. Files are replaced whole: written beside, synced, renamed.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::key::{DiscoPrivate, MachinePrivate, MachinePublic, NodePrivate};

/// Where a node keeps its state unless told otherwise.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/ringtail";

/// See `driver/timestamps.rs`.
pub const TIMESTAMP_FILE: &str = "timestamp";

/// Largest file read back, in bytes: a network map of 10,000 nodes is a few MB.
const FILE_LEN_MAX: u64 = 64 << 20;

/// A node's identity. Everything secret is wiped when dropped.
#[derive(Clone, Debug)]
pub struct Keys {
    /// Identity of the host towards the coordination server.
    pub machine: MachinePrivate,
    /// WireGuard identity.
    pub node: NodePrivate,
    /// What DISCO messages are sealed with.
    pub disco: DiscoPrivate,
    /// The coordination server's key, once it has been seen, with the URL it belongs to.
    pub control: Option<(String, MachinePublic)>,
}

/// The text form of [`Keys`] on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeysFile {
    machine_key: Secret,
    node_key: Secret,
    disco_key: Secret,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    control_url: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    control_key: Option<MachinePublic>,
}

/// Text that is wiped when dropped.
#[derive(Serialize, Deserialize, zeroize::ZeroizeOnDrop)]
#[serde(transparent)]
struct Secret(String);

/// An open state directory.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
}

/// Proof that this process is the only node on a state directory; dropping it lets the next in.
#[derive(Debug)]
pub struct StateLock {
    _file: Flock<File>,
}

impl StateDir {
    /// Opens the directory, making it (0700) when it is missing.
    ///
    /// # Errors
    /// When it cannot be made or is not a directory.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .with_context(|| format!("cannot make the state directory {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// A file of the directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The status socket.
    pub fn socket(&self) -> PathBuf {
        self.file("ringtail.sock")
    }

    /// Takes the lock of the directory.
    ///
    /// # Errors
    /// When another process holds it.
    pub fn lock(&self) -> anyhow::Result<StateLock> {
        let path = self.file("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(StateLock { _file: file }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => bail!(
                "another ringtail node runs on {}; stop it, or give this one its own --state-dir",
                self.path.display()
            ),
            Err((_, errno)) => {
                Err(errno).with_context(|| format!("cannot lock {}", path.display()))
            }
        }
    }

    /// Whether a process holds the lock of the directory now.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub fn is_in_use(&self) -> anyhow::Result<bool> {
        let path = self.file("lock");
        let file = match OpenOptions::new().read(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
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
    /// When the file is readable by others, damaged, or cannot be written.
    pub fn keys(&self) -> anyhow::Result<Keys> {
        let path = self.file("keys.json");
        let Some(text) = self.read_secret("keys.json")? else {
            let keys = Keys {
                machine: MachinePrivate::generate(),
                node: NodePrivate::generate(),
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
        Ok(Keys {
            machine: file
                .machine_key
                .0
                .parse()
                .with_context(|| which("machine_key"))?,
            node: file.node_key.0.parse().with_context(|| which("node_key"))?,
            disco: file
                .disco_key
                .0
                .parse()
                .with_context(|| which("disco_key"))?,
            control: file.control_url.zip(file.control_key),
        })
    }

    /// Saves the keys.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_keys(&self, keys: &Keys) -> anyhow::Result<()> {
        let secret = |text: &str| Secret(text.to_owned());
        let (control_url, control_key) = keys.control.clone().unzip();
        let file = KeysFile {
            machine_key: secret(&keys.machine.to_text()),
            node_key: secret(&keys.node.to_text()),
            disco_key: secret(&keys.disco.to_text()),
            control_url,
            control_key,
        };
        let text = Zeroizing::new(serde_json::to_vec_pretty(&file)?);
        self.write("keys.json", &text)
    }

    /// Reads a cache, or nothing when it is missing or of another shape: a cache may be lost.
    pub fn read_cache<T: serde::de::DeserializeOwned>(&self, name: &str) -> Option<T> {
        let text = self.read(name).ok()??;
        match serde_json::from_slice(&text) {
            Ok(value) => Some(value),
            Err(error) => {
                tracing::warn!(file = name, %error, "cache left aside");
                None
            }
        }
    }

    /// Replaces a cache.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_cache(&self, name: &str, value: &impl Serialize) -> anyhow::Result<()> {
        self.write(name, &serde_json::to_vec(value)?)
    }

    /// Reads a whole file into memory that is wiped; `None` when there is no such file.
    fn read(&self, name: &str) -> anyhow::Result<Option<Zeroizing<Vec<u8>>>> {
        let path = self.file(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        // The whole length at once: a growing buffer would leave copies of secrets behind.
        let len = file.metadata()?.len().min(FILE_LEN_MAX);
        let mut text = Zeroizing::new(Vec::with_capacity(usize::try_from(len)? + 1));
        file.take(FILE_LEN_MAX)
            .read_to_end(&mut text)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(text))
    }

    fn read_secret(&self, name: &str) -> anyhow::Result<Option<Zeroizing<Vec<u8>>>> {
        let path = self.file(name);
        if let Ok(metadata) = path.metadata()
            && metadata.permissions().mode() & 0o077 != 0
        {
            bail!(
                "{} holds secrets and is open to others; run: chmod 600 {}",
                path.display(),
                path.display()
            );
        }
        self.read(name)
    }

    fn write(&self, name: &str, text: &[u8]) -> anyhow::Result<()> {
        write_private(&self.file(name), text)
    }
}

/// Replaces a file whole, with mode 0600: a reader sees the old or the new text, never a part.
///
/// # Errors
/// When the folder does not take the file.
pub fn write_private(path: &Path, text: &[u8]) -> anyhow::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".new{}", std::process::id()));
    let beside = PathBuf::from(beside);
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(text)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_made_once_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("state")).unwrap();
        let mut keys = state.keys().unwrap();
        assert_eq!(state.keys().unwrap().node.public(), keys.node.public());
        keys.control = Some(("http://10.0.0.1".into(), keys.machine.public()));
        state.save_keys(&keys).unwrap();
        let again = state.keys().unwrap();
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
        state.lock().unwrap();
    }
}
