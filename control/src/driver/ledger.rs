//! What of the host's we have changed, in `host.json` of the state directory, so that it can be put back
//! after any kind of end: by the node itself, by its [`keeper`](super::keeper) when it was killed, by the
//! next start, or by `ringtail restore`.
//!
//! An [`Entry`] is on disk, synced, *before* the change it tells of ([`Ledger::before`]), and leaves when
//! the change is undone ([`Ledger::done`]). So an entry may tell of a change that never came about: putting
//! back ([`Ledger::restore`]) looks first, and leaves alone what is not, or no more, as we made it.
//!
//! Whoever changes another kind of thing adds an entry here, and an arm to [`put_back`] which calls a
//! function of his driver: one that needs neither a node nor a runtime, since the keeper has none.
//!
//! One process at a time has a ledger open: who starts while a keeper still puts back waits for it.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use super::files::{self, Readers};
use super::state::StateDir;
use super::{dns_host, hostnet, lock};

/// Entries at most; more changes are refused.
pub const ENTRIES_MAX: usize = 1024;
/// Where `ip netns` keeps its networks.
const NETNS_DIR: &str = "/run/netns";
/// Where sysctl values are.
const SYSCTL: &str = "/proc/sys";

/// One thing of the host's that we change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Entry {
    /// A sysctl value.
    Sysctl {
        /// Below `/proc/sys`, with slashes: `net/ipv4/conf/eth0/forwarding`.
        path: String,
        /// What it was, without the newline.
        before: String,
        /// What we make it.
        ours: String,
        /// Another value: where that is on, ours is left, for somebody has meant it since.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        unless: Option<String>,
    },
    /// Rules and routes of ours in and around a routing table, which do not all go with the TUN.
    Routes {
        /// The table.
        table: u8,
    },
    /// The coordination server has been told of routes that lead through us: others send there until
    /// it is told otherwise.
    Announced(Announced),
    /// The host's resolver asks ours.
    Resolver(dns_host::Change),
}

/// How to reach the server that was told of our routes; the keys are in `keys.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announced {
    /// The server.
    pub url: String,
    /// The name we go by.
    pub hostname: String,
    /// Mark of sockets that stay outside of the tunnel; 0 is none.
    pub fwmark: u32,
    /// Who may vouch for the server, if not the web's roots.
    pub ca_file: Option<PathBuf>,
}

impl Entry {
    /// Whether both tell of the same thing: the later one takes the place of the earlier.
    fn same_thing(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Sysctl { path: one, .. }, Self::Sysctl { path: two, .. }) => one == two,
            (Self::Routes { table: one }, Self::Routes { table: two }) => one == two,
            (Self::Announced(_), Self::Announced(_)) => true,
            (Self::Resolver(one), Self::Resolver(two)) => one == two,
            (
                Self::Sysctl { .. } | Self::Routes { .. } | Self::Announced(_) | Self::Resolver(_),
                _,
            ) => false,
        }
    }

    /// Takes over from an earlier entry about the same thing: what was there before us is still that.
    fn inherit(&mut self, earlier: &Self) {
        if let (
            Self::Sysctl { before, unless, .. },
            Self::Sysctl {
                before: first,
                unless: first_unless,
                ..
            },
        ) = (self, earlier)
        {
            before.clone_from(first);
            unless.clone_from(first_unless);
        }
    }

    /// Whether it means something after a reboot, and in another network namespace.
    fn outlives_the_kernel(&self) -> bool {
        match self {
            Self::Sysctl { .. } | Self::Routes { .. } => false,
            Self::Announced(_) | Self::Resolver(_) => true,
        }
    }
}

/// Undoes one change, if it is there. What cannot be found any more (an interface that went) is undone.
fn put_back(entry: &Entry) -> anyhow::Result<()> {
    match entry {
        Entry::Sysctl {
            path,
            before,
            ours,
            unless,
        } => put_back_sysctl(path, before, ours, unless.as_deref()),
        Entry::Routes { table } => hostnet::remove_left(*table),
        // By who has a network: `keeper`.
        Entry::Announced(_) => Ok(()),
        Entry::Resolver(change) => dns_host::put_back(change),
    }
}

fn put_back_sysctl(
    path: &str,
    before: &str,
    ours: &str,
    unless: Option<&str>,
) -> anyhow::Result<()> {
    let Some(now) = sysctl(path)? else {
        return Ok(());
    };
    let theirs = match unless {
        Some(other) => sysctl(other)?.is_some_and(|value| value != "0"),
        None => false,
    };
    if now == ours && before != ours && !theirs {
        std::fs::write(Path::new(SYSCTL).join(path), before)
            .with_context(|| format!("cannot set {path} to {before}"))?;
        tracing::info!(sysctl = path, value = before, "put back");
    }
    Ok(())
}

/// A value, if it is there.
fn sysctl(path: &str) -> anyhow::Result<Option<String>> {
    let names = Path::new(path);
    if !names
        .components()
        .all(|name| matches!(name, Component::Normal(_)))
    {
        bail!("{path:?} is no sysctl value");
    }
    match std::fs::read_to_string(Path::new(SYSCTL).join(names)) {
        Ok(value) => Ok(Some(value.trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {path}")),
    }
}

/// The boot and the network namespace that an entry is of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    boot: String,
    netns: u64,
}

impl Place {
    /// This one; what cannot be found out is the same everywhere.
    fn here() -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let netns = std::fs::metadata("/proc/self/ns/net").map(|found| found.ino());
        Self {
            boot: boot.trim_end().to_owned(),
            netns: netns.unwrap_or_default(),
        }
    }
}

/// The file.
#[derive(Serialize, Deserialize)]
struct Page<E> {
    #[serde(flatten)]
    place: Place,
    entries: Vec<E>,
}

/// An open ledger; a clone is the same one. Any thread may use it.
#[derive(Clone, Debug)]
pub struct Ledger(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    place: Place,
    entries: Vec<Entry>,
    _lock: Flock<File>,
}

impl Ledger {
    /// Opens the ledger of a state directory, with what an earlier run left in it. Waits at most so long for
    /// another process that has it open.
    ///
    /// # Errors
    /// The other goes on, the directory does not take the file, or it tells of changes that another network
    /// namespace still has.
    pub fn open(state: &StateDir, wait: Duration) -> anyhow::Result<Self> {
        let path = state.file("host.lock");
        let lock = files::lock(&path, wait)?.with_context(|| {
            format!(
                "another process looks after what was changed of this host ({} is locked)",
                path.display()
            )
        })?;
        let path = state.file("host.json");
        let place = Place::here();
        let left = read(&path).unwrap_or_else(|error| {
            tracing::warn!(
                error = format!("{error:#}"),
                "what an earlier run changed of the host is not known"
            );
            None
        });
        let (of, mut entries) = left.unwrap_or_default();
        if of != place {
            let goes = |entry: &Entry| !entry.outlives_the_kernel();
            if entries.iter().any(goes) && of.boot == place.boot && netns_is_there(of.netns) {
                bail!(
                    "what {} says is changed in another network namespace, which is still there: run `ringtail \
                     restore` in that one first (`ip netns exec NAME`, `nsenter`)",
                    path.display()
                );
            }
            entries.retain(Entry::outlives_the_kernel);
        }
        Ok(Self(Arc::new(Mutex::new(Inner {
            path,
            place,
            entries,
            _lock: lock,
        }))))
    }

    /// Writes down a change that is about to be made. When it returns, that is on disk.
    ///
    /// # Errors
    /// It is not: the change must not be made.
    pub fn before(&self, mut entry: Entry) -> io::Result<()> {
        let mut inner = lock(&self.0);
        let mut entries = inner.entries.clone();
        let full = entries.len() >= ENTRIES_MAX;
        match entries.iter_mut().find(|known| known.same_thing(&entry)) {
            Some(known) => {
                entry.inherit(known);
                *known = entry;
            }
            None if full => {
                return Err(io::Error::other(format!(
                    "over {ENTRIES_MAX} changes of the host"
                )));
            }
            None => entries.push(entry),
        }
        inner.replace(entries)
    }

    /// Strikes out a change that was undone. Should that not reach the disk, the worst is that it is looked
    /// for in vain.
    pub fn done(&self, entry: &Entry) {
        let mut inner = lock(&self.0);
        let rest = inner
            .entries
            .iter()
            .filter(|known| !known.same_thing(entry));
        let rest = rest.cloned().collect();
        if let Err(error) = inner.replace(rest) {
            tracing::warn!(%error, "the ledger of the host's changes");
        }
    }

    /// Undoes everything that is in it but what needs a network, the latest first; what could be undone is
    /// struck out. Gives the problems, for people.
    pub fn restore(&self) -> Vec<String> {
        let entries = lock(&self.0).entries.clone();
        let mut problems = Vec::new();
        for entry in entries.iter().rev() {
            match put_back(entry) {
                Ok(()) if matches!(entry, Entry::Announced(_)) => {}
                Ok(()) => self.done(entry),
                Err(error) => problems.push(format!("{error:#}")),
            }
        }
        problems
    }

    /// Where our routes were announced, if they were.
    pub fn announced(&self) -> Option<Announced> {
        let inner = lock(&self.0);
        inner.entries.iter().find_map(|entry| match entry {
            Entry::Announced(announced) => Some(announced.clone()),
            Entry::Sysctl { .. } | Entry::Routes { .. } | Entry::Resolver(_) => None,
        })
    }

    /// Whether nothing has to be put back.
    pub fn is_empty(&self) -> bool {
        lock(&self.0).entries.is_empty()
    }
}

impl Inner {
    fn replace(&mut self, entries: Vec<Entry>) -> io::Result<()> {
        if entries == self.entries {
            return Ok(());
        }
        let page = Page {
            place: self.place.clone(),
            entries,
        };
        files::write(&self.path, &serde_json::to_vec_pretty(&page)?)
            .map_err(|error| io::Error::other(format!("{error:#}")))?;
        self.entries = page.entries;
        Ok(())
    }
}

/// What is written there, if there is anything, and where it is of. What this version does not know is left out.
fn read(path: &Path) -> anyhow::Result<Option<(Place, Vec<Entry>)>> {
    let Some(text) = files::read(path, Readers::Nobody)? else {
        return Ok(None);
    };
    let page: Page<serde_json::Value> =
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))?;
    let mut entries = Vec::new();
    for entry in page.entries.into_iter().take(ENTRIES_MAX) {
        match serde_json::from_value::<Entry>(entry) {
            Ok(entry) => entries.push(entry),
            Err(error) => tracing::warn!(%error, "a change of the host is not understood"),
        }
    }
    Ok(Some((page.place, entries)))
}

/// Whether there is such a network namespace, as far as can be seen from here: a process is in it, or it has a name.
/// That of a container is not, once the container has ended.
fn netns_is_there(netns: u64) -> bool {
    let is_it = |path: PathBuf| std::fs::metadata(path).is_ok_and(|found| found.ino() == netns);
    let paths = |dir: &str| {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path())
    };
    paths(NETNS_DIR).any(is_it) || paths("/proc").any(|process| is_it(process.join("ns/net")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn sysctl(path: &str, before: &str, ours: &str) -> Entry {
        let [path, before, ours] = [path, before, ours].map(str::to_owned);
        Entry::Sysctl {
            path,
            before,
            ours,
            unless: None,
        }
    }

    fn announced(url: &str) -> Entry {
        Entry::Announced(Announced {
            url: url.to_owned(),
            hostname: "r".into(),
            fwmark: 0x8_0000,
            ca_file: None,
        })
    }

    fn open(state: &StateDir) -> Ledger {
        Ledger::open(state, Duration::ZERO).unwrap()
    }

    #[test]
    fn what_is_noted_is_on_disk_before_the_change_and_read_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let ledger = open(&state);
        assert!(ledger.is_empty() && !state.file("host.json").exists());
        let entry = sysctl("net/ipv4/conf/no-such-link/forwarding", "0", "1");
        ledger.before(entry.clone()).unwrap();
        let mode = state.file("host.json").metadata().unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        ledger.before(announced("http://10.0.0.1")).unwrap();
        assert!(
            Ledger::open(&state, Duration::from_millis(20)).is_err(),
            "one process at a time"
        );
        drop(ledger);
        let ledger = open(&state);
        assert_eq!(
            lock(&ledger.0).entries,
            [entry.clone(), announced("http://10.0.0.1")]
        );
        assert_eq!(ledger.announced().unwrap().url, "http://10.0.0.1");
        // An interface that went has nothing to put back; what needs a network stays.
        assert!(ledger.restore().is_empty());
        assert_eq!(lock(&ledger.0).entries, [announced("http://10.0.0.1")]);
        ledger.done(&announced(""));
        drop(ledger);
        assert!(open(&state).is_empty());
    }

    #[test]
    fn the_first_value_is_the_one_to_put_back_and_only_where_ours_still_stands() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let ledger = open(&state);
        ledger.before(sysctl("a", "0", "1")).unwrap();
        ledger.before(sysctl("a", "1", "2")).unwrap();
        assert_eq!(lock(&ledger.0).entries, [sysctl("a", "0", "2")]);
        // A value that nobody may write, and which is not what the entry calls ours.
        let path = "kernel/random/boot_id";
        let there = std::fs::read_to_string(Path::new(SYSCTL).join(path)).unwrap();
        put_back_sysctl(path, "before", "ours", None).unwrap();
        assert_eq!(
            std::fs::read_to_string(Path::new(SYSCTL).join(path)).unwrap(),
            there
        );
        // Where another value is on it is left; one that is not there is not on.
        let there = there.trim_end();
        put_back_sysctl(path, "before", there, Some("kernel/pid_max")).unwrap();
        for unless in [None, Some("no/such/value")] {
            let refused = put_back_sysctl(path, "before", there, unless).unwrap_err();
            assert!(refused.to_string().contains("cannot set"), "{refused}");
        }
        for path in ["/etc/hosts", "../../etc/hosts", "net/../../../etc/hosts"] {
            assert!(put_back_sysctl(path, "0", "1", None).is_err(), "{path}");
        }
    }

    #[test]
    fn a_problem_leaves_its_entry_for_the_next_try() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let ledger = open(&state);
        ledger.before(sysctl("../x", "0", "1")).unwrap();
        ledger.before(sysctl("no/such/value", "0", "1")).unwrap();
        assert_eq!(ledger.restore().len(), 1);
        assert_eq!(lock(&ledger.0).entries, [sysctl("../x", "0", "1")]);
    }

    #[test]
    fn another_boot_or_namespace_voids_what_went_with_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let entries = vec![
            serde_json::to_value(sysctl("a", "0", "1")).unwrap(),
            serde_json::to_value(announced("u")).unwrap(),
            serde_json::json!({"what": "of-a-later-version"}),
        ];
        let here = Place::here();
        assert!(!here.boot.is_empty() && here.netns != 0);
        for (place, kept) in [
            (here.clone(), vec![sysctl("a", "0", "1"), announced("u")]),
            (
                Place {
                    boot: "other".into(),
                    ..here.clone()
                },
                vec![announced("u")],
            ),
            // One that has gone.
            (Place { netns: 1, ..here }, vec![announced("u")]),
        ] {
            let page = Page {
                place,
                entries: entries.clone(),
            };
            let text = serde_json::to_vec(&page).unwrap();
            files::write(&state.file("host.json"), &text).unwrap();
            assert_eq!(lock(&open(&state).0).entries, kept);
        }
        std::fs::write(state.file("host.json"), "{").unwrap();
        assert!(open(&state).is_empty(), "said, and gone on");
    }

    /// Where we may make one: root may.
    #[test]
    fn what_another_namespace_still_has_is_not_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let mut other = std::process::Command::new("unshare")
            .args(["-n", "cat"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It answers once it is there.
        let (mut stdin, mut stdout) = (other.stdin.take().unwrap(), other.stdout.take().unwrap());
        let there = io::Write::write_all(&mut stdin, b"x")
            .and_then(|()| io::Read::read_exact(&mut stdout, &mut [0]));
        if there.is_err() {
            other.wait().unwrap();
            eprintln!("skipped: what_another_namespace_still_has_is_not_forgotten needs root");
            return;
        }
        let netns = std::fs::metadata(format!("/proc/{}/ns/net", other.id())).unwrap();
        let page = Page {
            place: Place {
                netns: netns.ino(),
                ..Place::here()
            },
            entries: vec![sysctl("a", "0", "1"), announced("u")],
        };
        let text = serde_json::to_vec(&page).unwrap();
        files::write(&state.file("host.json"), &text).unwrap();
        let refused = Ledger::open(&state, Duration::ZERO).unwrap_err();
        assert!(refused.to_string().contains("another network namespace"));
        assert_eq!(std::fs::read(state.file("host.json")).unwrap(), text);
        drop(stdin);
        other.wait().unwrap();
        assert_eq!(lock(&open(&state).0).entries, [announced("u")]);
    }

    #[test]
    fn no_more_is_taken_than_can_be_kept() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let ledger = open(&state);
        let nth = |n: usize| sysctl(&n.to_string(), "0", "1");
        lock(&ledger.0).entries = (0..ENTRIES_MAX).map(nth).collect();
        assert!(ledger.before(nth(ENTRIES_MAX)).is_err());
        ledger.before(sysctl("7", "0", "2")).unwrap();
    }
}
