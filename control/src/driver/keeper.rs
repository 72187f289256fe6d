//! The keeper: a process beside the node that outlives it for a moment, should it be killed.
//!
//! It is this program once more (`ringtail keeper`), which holds one end of a socket pair and does nothing
//! but wait until the other end closes. The kernel does that for a node however it ends. Then it waits for the
//! process to be gone, takes the [ledger](super::ledger), puts back what is still written in there, tells
//! the coordination server that our routes lead nowhere any more, and ends. Where the node ended tidily
//! nothing is left to do.
//!
//! A keeper that dies is replaced by the node. Are both killed (a cgroup, the machine), the next start puts
//! back what it finds, or `ringtail restore`.
//!
//! A new node that starts meanwhile waits for the ledger, but not for the coordination server, which it will tell
//! by itself what it routes; is the new one first, it puts back what the killed one left, and the keeper has
//! nothing to do.

use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::AsyncReadExt as _;

use super::clock::now;
use super::coord_client;
use super::ledger::{Announced, Entry, Ledger};
use super::names::Names;
use super::runtime;
use super::state::StateDir;
use super::tls::roots;
use super::underlay::Underlay;
use crate::config::AuthKey;
use crate::coord::CoordConfig;

/// The node needs it no more: nothing is left to put back.
const DISMISSED: u8 = b'.';
/// How long a process may take to be gone after its descriptors are.
const GONE_LIMIT_MS: u16 = 2000;
/// Who starts waits so long for a keeper that still puts back.
pub const LEDGER_WAIT: Duration = Duration::from_secs(6);
/// The server is told of our end within this, or not at all.
pub const WITHDRAW_LIMIT: Duration = Duration::from_secs(4);
/// Between two attempts of that; the host's names may be but coming back.
const WITHDRAW_PAUSE: Duration = Duration::from_millis(100);
/// Who begins has the ledger after that.
const BEGIN_LIMIT: Duration = Duration::from_secs(1);
/// Beginnings that fail, before the keeper leaves the rest to the next.
const BEGINNINGS_MAX: usize = 16;
/// A keeper that died is replaced so often at most.
const REPLACE_PERIOD: Duration = Duration::from_secs(5);

/// What a node has of its keeper.
#[derive(Debug)]
pub struct Keeper {
    state: std::path::PathBuf,
    running: Option<(tokio::net::UnixStream, Child)>,
    started: Instant,
}

impl Keeper {
    /// Starts it, inside a runtime. A node without one goes on: the next start does its work.
    pub fn start(state: &StateDir) -> Self {
        let mut keeper = Self {
            state: state.path().to_owned(),
            running: None,
            started: now(),
        };
        keeper.run();
        keeper
    }

    fn run(&mut self) {
        self.started = now();
        self.running = spawn(&self.state)
            .inspect_err(|error| {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "no keeper: if this node is killed, the host is as it was only after its next start"
                );
            })
            .ok();
    }

    /// Replaces a keeper that has died; returns then. Dropping the future loses nothing.
    pub async fn watch(&mut self) {
        if let Some((stream, child)) = &mut self.running {
            // It never says anything.
            while stream.read_u8().await.is_ok() {}
            let status = child.wait();
            tracing::warn!(?status, "the keeper ended: starting another");
            self.running = None;
        }
        super::clock::at(Some(self.started + REPLACE_PERIOD)).await;
        self.run();
    }

    /// Lets it go after a tidy end, if nothing is left to put back; else it does what is left.
    pub fn dismiss(self, ledger: &Ledger) {
        let Some((stream, mut child)) = self.running else {
            return;
        };
        if ledger.is_empty() && stream.try_write(&[DISMISSED]).is_ok() {
            // It has nothing to do but to end.
            let _ = child.wait();
        }
    }
}

fn spawn(state: &Path) -> anyhow::Result<(tokio::net::UnixStream, Child)> {
    let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
    ours.set_nonblocking(true)?;
    // The program that runs, should another stand in its place by now.
    let child = Command::new("/proc/self/exe")
        .arg0("ringtail")
        .args(["keeper", "--state-dir"])
        .arg(state)
        .env_remove(AuthKey::VARIABLE)
        // Not for what is typed to the node: Ctrl-C is sent to a whole group.
        .process_group(0)
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start this program once more")?;
    Ok((tokio::net::UnixStream::from_std(ours)?, child))
}

/// The life of a keeper.
///
/// # Errors
/// It was not started by a node, or cannot put back all.
#[expect(
    clippy::disallowed_methods,
    reason = "a process of its own, which has nothing else to do"
)]
pub fn run(state: &Path) -> anyhow::Result<()> {
    // A service manager that stops the node signals every process of it: this one ends after the node.
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]
        .into_iter()
        .collect();
    signals.thread_block().context("cannot block signals")?;
    // What `ps` and `top` show.
    let _ = std::fs::write("/proc/self/comm", "ringtail-keeper");
    let stdin = std::io::stdin();
    let peer = getsockopt(&stdin.as_fd(), PeerCredentials)
        .context("a node starts its keeper by itself; did you mean `ringtail restore`?")?;
    // None if it has ended already.
    let process =
        Pid::from_raw(peer.pid()).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let mut word = [0];
    while let Ok(1) = stdin.lock().read(&mut word) {
        if word[0] == DISMISSED {
            return Ok(());
        }
    }
    if let Some(process) = process {
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        // If it does not end, its hold on the ledger says so.
        let _ = poll(&mut fds, PollTimeout::from(GONE_LIMIT_MS));
    }
    let state = StateDir::open(state)?;
    for _ in 0..BEGINNINGS_MAX {
        let Ok(ledger) = Ledger::open(&state, Duration::ZERO) else {
            tracing::debug!("another node has the ledger");
            return Ok(());
        };
        restore(&state, &ledger, &|| state.is_in_use().unwrap_or(false))?;
        if ledger.announced().is_none() {
            return Ok(());
        }
        drop(ledger);
        // Who has begun takes the ledger and does the rest, or has failed by then.
        std::thread::sleep(BEGIN_LIMIT);
    }
    // What is left, the next start or `ringtail restore` does.
    Ok(())
}

/// Puts back everything that is in a ledger, and says so to the server that was told of our routes, unless a new node
/// has begun.
///
/// # Errors
/// Not all could be put back; says what.
pub fn restore(
    state: &StateDir,
    ledger: &Ledger,
    has_begun: &(dyn Fn() -> bool + Sync),
) -> anyhow::Result<()> {
    if ledger.is_empty() {
        return Ok(());
    }
    tracing::warn!("putting back what a node left changed of this host");
    // Beside each other: the server is not to wait for the host, nor the host for the server.
    std::thread::scope(|scope| {
        let withdrawn = scope.spawn(|| match ledger.announced() {
            Some(announced) => withdraw(state, announced, has_begun),
            None => Ok(false),
        });
        let problems = ledger.restore();
        let withdrawn = withdrawn.join();
        for problem in &problems {
            tracing::warn!(problem, "something of ours stays behind");
        }
        let withdrawn = withdrawn.unwrap_or_else(|_| Err(anyhow::anyhow!("the thread panicked")));
        if let (Ok(true), Some(announced)) = (&withdrawn, ledger.announced()) {
            ledger.done(&Entry::Announced(announced));
        }
        withdrawn?;
        anyhow::ensure!(problems.is_empty(), "{}", problems.join("; "));
        Ok(())
    })
}

/// Tells the server that no routes lead through us, until it hears that: whether it did. If not, somebody has begun
/// who does it in our place.
fn withdraw(
    state: &StateDir,
    announced: Announced,
    has_begun: &dyn Fn() -> bool,
) -> anyhow::Result<bool> {
    let keys = state.keys()?;
    let roots = roots::load(announced.ca_file.as_deref())?;
    let control_key = keys.control.filter(|(url, _)| *url == announced.url);
    let config = CoordConfig {
        url: announced.url,
        auth_key: None,
        hostname: announced.hostname,
        tags: Vec::new(),
        machine: keys.machine,
        node: keys.node.public(),
        old_node: None,
        followup: None,
        disco: keys.disco.public(),
        control_key: control_key.map(|(_, key)| key),
    };
    let underlay = Underlay {
        fwmark: announced.fwmark,
        outside: None,
    };
    let mut knows = false;
    runtime::block_on(async |_| {
        let until = now() + WITHDRAW_LIMIT;
        let names = Names::default();
        let heard = async {
            loop {
                match coord_client::withdraw(&config, &names, &underlay, &roots).await {
                    Ok(()) => break,
                    Err(error) => {
                        tracing::debug!(
                            error = format!("{error:#}"),
                            "the server cannot be told yet"
                        );
                    }
                }
                tokio::time::sleep(WITHDRAW_PAUSE).await;
            }
        };
        let given_up = async {
            while now() < until && !has_begun() {
                tokio::time::sleep(WITHDRAW_PAUSE).await;
            }
        };
        tokio::select! {
            () = heard => {
                tracing::info!("the coordination server knows that no routes lead here any more");
                knows = true;
            }
            () = given_up => {
                anyhow::ensure!(has_begun(), "the coordination server still sends others here");
            }
        }
        Ok(())
    })?;
    Ok(knows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_was_not_told_stays_in_the_ledger() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let ledger = Ledger::open(&state, Duration::ZERO).unwrap();
        // It takes connections and never answers.
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let announced = Announced {
            url: format!("http://{}", server.local_addr().unwrap()),
            hostname: "a".into(),
            fwmark: 0,
            ca_file: None,
        };
        ledger.before(Entry::Announced(announced.clone())).unwrap();
        restore(&state, &ledger, &|| true).unwrap();
        assert_eq!(ledger.announced(), Some(announced));
    }
}
