//! Has the host's resolver ask ours, as the network wants it ([`crate::dns`]), and puts back what was there.
//!
//! A thread of its own, for it asks other programs, which may be slow: it wakes for a new wish, when
//! `/etc/resolv.conf` changes, and when systemd-resolved was started anew; then it looks who keeps the
//! resolver's settings ([`Manager`]), and tells that one. It also tells which servers are there without us
//! ([`Report`]), wish or no wish. Dropping [`HostResolver`] puts everything back and waits for that; what a
//! killed process left, its keeper puts back by the ledger ([`put_back`]).
//!
//! Rooms: `file` is `/etc/resolv.conf` itself, `resolved` and `resolvconf` are the programs that keep it.

mod file;
mod resolvconf;
mod resolved;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::clock::now;
use super::ledger::{Entry, Ledger};
use super::runtime::watch_descriptor;
use super::state::StateDir;
use crate::dns::HostDns;
use crate::dns::host::{
    Base, Flavour, Found, Manager, asks_only_resolved, hints_at_resolved, resolv_conf,
};
use crate::netmap::prefix::{DNS_SERVICE_V4, DNS_SERVICE_V6};
use file::{Place, RESOLV_CONF, There};
use resolved::Resolved;

/// In the state directory: the text of a file that is written in place.
const COPY: &str = "resolv.conf.before";
const NSSWITCH: &str = "/etc/nsswitch.conf";
/// The servers behind systemd-resolved's stub, and those behind a stub of NetworkManager's.
const BEHIND_RESOLVED: &str = "/run/systemd/resolve/resolv.conf";
const BEHIND_NETWORK_MANAGER: &str = "/run/NetworkManager/no-stub-resolv.conf";
/// Looks without an occasion, and those after something failed.
const LOOK_PERIOD: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_secs(10);
/// Who changes the file may do it in several steps.
const SETTLE: Duration = Duration::from_millis(50);
/// Times that we replace what somebody else has just put in the place of ours, within `FIGHT_PERIOD`.
const FIGHTS_MAX: usize = 3;
const FIGHT_PERIOD: Duration = Duration::from_secs(60);

/// What is changed of the host, as the ledger has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "kebab-case")]
pub enum Change {
    /// `/etc/resolv.conf` is ours.
    File {
        /// The TUN it names.
        tun: String,
        /// The text of what was there, if that could not be moved.
        copy: PathBuf,
    },
    /// resolvconf(8) has a record of ours.
    Resolvconf {
        /// Its name.
        record: String,
    },
}

/// Undoes a change, if it is there.
///
/// # Errors
/// It is still there.
pub fn put_back(change: &Change) -> anyhow::Result<()> {
    match change {
        Change::File { tun, copy } => {
            let place = Place {
                conf: RESOLV_CONF.into(),
                copy: copy.clone(),
                tun: tun.clone(),
            };
            let undone = place.restore();
            undone.with_context(|| format!("cannot put back {RESOLV_CONF}"))
        }
        Change::Resolvconf { record } => {
            let undone = resolvconf::remove(record);
            undone.with_context(|| format!("cannot remove {record} from resolvconf"))
        }
    }
}

/// How it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Who has been told to ask us, if anybody.
    pub manager: Option<Manager>,
    /// What the resolver is set to without us; never ourselves.
    pub base: Base,
    /// Servers of the host's that are not on this machine.
    pub outside: Vec<SocketAddr>,
    /// What is not as it should be.
    pub problems: Vec<String>,
}

/// The host's resolver, as long as this lives.
#[derive(Debug)]
pub struct HostResolver {
    /// None ends the thread.
    wish: Option<watch::Sender<HostDns>>,
    report: watch::Receiver<Report>,
    thread: Option<JoinHandle<()>>,
}

impl HostResolver {
    /// Looks at the host, and starts the thread. What an earlier run left has to be put back before.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn start(
        (tun, link): (&str, u32),
        state: &StateDir,
        ledger: Ledger,
    ) -> anyhow::Result<Self> {
        let (wish, wishes) = watch::channel(HostDns::default());
        let place = Place {
            conf: RESOLV_CONF.into(),
            copy: state.file(COPY),
            tun: tun.to_owned(),
        };
        let (reports, report) = watch::channel(Report::default());
        let worker = Worker {
            record: resolvconf::record(tun),
            link: i32::try_from(link).context("the interface's number")?,
            place,
            ledger,
            wishes,
            reports,
            resolved: None,
            told: None,
            recorded: None,
            fights: Vec::new(),
        };
        // The first look is no secret: whoever routes has to know the servers.
        let (text, _) = worker.theirs();
        worker.publish(&text, Vec::new());
        let thread = std::thread::Builder::new()
            .name("resolver".into())
            .spawn(move || worker.run())
            .context("cannot start a thread")?;
        Ok(Self {
            wish: Some(wish),
            report,
            thread: Some(thread),
        })
    }

    /// Takes what the network wants now; only the latest counts.
    pub fn set(&self, wanted: HostDns) {
        if let Some(wish) = &self.wish {
            wish.send_if_modified(|wish| {
                let changed = *wish != wanted;
                *wish = wanted;
                changed
            });
        }
    }

    /// How it stands.
    pub fn report(&self) -> Report {
        self.report.borrow().clone()
    }

    /// Waits until the report is another.
    pub async fn changed(&mut self) -> Report {
        if self.report.changed().await.is_err() {
            // The thread panicked; the process ends.
            std::future::pending::<()>().await;
        }
        self.report.borrow_and_update().clone()
    }
}

impl Drop for HostResolver {
    fn drop(&mut self) {
        self.wish = None;
        if let Some(thread) = self.thread.take() {
            // If it panicked, that has been printed, and the keeper puts back.
            let _ = thread.join();
        }
    }
}

/// The thread's own.
struct Worker {
    place: Place,
    /// Our record at resolvconf.
    record: String,
    /// The TUN's number.
    link: i32,
    ledger: Ledger,
    wishes: watch::Receiver<HostDns>,
    reports: watch::Sender<Report>,
    resolved: Option<Resolved>,
    /// Who has been told what.
    told: Option<(Manager, HostDns)>,
    /// What our record at resolvconf says.
    recorded: Option<String>,
    /// When somebody else had replaced ours.
    fights: Vec<Instant>,
}

impl Worker {
    fn run(mut self) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        match runtime {
            Ok(runtime) => runtime.block_on(self.serve()),
            Err(error) => tracing::warn!(%error, "the host's resolver is left alone"),
        }
    }

    async fn serve(&mut self) {
        let watch = Watch::open().inspect_err(|error| {
            tracing::warn!(%error, "changes of the host's resolver are noticed late");
        });
        let watch = watch.ok();
        loop {
            let wish = self.wishes.borrow_and_update().clone();
            let well = self.settle(&wish).await;
            if let Some(watch) = &watch {
                watch.renew(&self.place.conf);
            }
            let period = if well { LOOK_PERIOD } else { RETRY };
            tokio::select! {
                changed = self.wishes.changed() => if changed.is_err() {
                    break;
                },
                () = changes(watch.as_ref()) => tokio::time::sleep(SETTLE).await,
                still_there = restarted(&mut self.resolved) => {
                    self.told = None;
                    if !still_there {
                        self.resolved = None;
                    }
                }
                () = tokio::time::sleep(period) => {}
            }
        }
        if let Err(error) = self.take_back().await {
            tracing::warn!(
                error = format!("{error:#}"),
                "the host's resolver is not as it was; `ringtail restore` tries again"
            );
        }
    }

    /// Makes it as it is to be, and says how it stands: whether it is well.
    async fn settle(&mut self, wish: &HostDns) -> bool {
        let (text, link) = self.theirs();
        let settled = if wish.servers.is_empty() {
            self.take_back().await
        } else {
            self.tell(wish, text.as_deref(), &link).await
        };
        let problem = settled.err().map(|error| format!("{error:#}"));
        // Told programs may have written the file anew.
        let (text, _) = self.theirs();
        let well = problem.is_none();
        self.publish(&text, problem.into_iter().collect());
        well
    }

    /// The file as it is without us, and where it leads.
    fn theirs(&self) -> (Option<String>, PathBuf) {
        let (bytes, link) = self.place.theirs();
        let text = bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        (text, link)
    }

    async fn tell(
        &mut self,
        wish: &HostDns,
        text: Option<&str>,
        link: &Path,
    ) -> anyhow::Result<()> {
        if file::is_of_another_network(&self.place.conf) {
            self.take_back().await?;
            anyhow::bail!(
                "{RESOLV_CONF} belongs to another network namespace, and is left alone: give this one a file \
                 of its own (`ip netns exec` mounts /etc/netns/NAME/resolv.conf)"
            );
        }
        let manager = self.manager(text, link).await;
        if self.told.as_ref().is_some_and(|(told, _)| *told != manager) {
            self.take_back().await?;
        }
        let is_told = self.told.as_ref().is_some_and(|(_, told)| told == wish);
        match manager {
            Manager::Resolved if !is_told => {
                let resolved = self.resolved.as_ref();
                let resolved = resolved.context("systemd-resolved does not answer")?;
                resolved.set(self.link, wish).await?;
            }
            Manager::Resolved => {}
            Manager::Resolvconf(flavour) => {
                let base = match flavour {
                    // It puts what others told it behind ours.
                    Flavour::Debian => Base::default(),
                    Flavour::Openresolv => self.others(),
                };
                let text = resolv_conf(wish, &base, &self.place.tun);
                if self.recorded.as_ref() != Some(&text) {
                    self.ledger.before(Entry::Resolver(self.change(manager)))?;
                    resolvconf::set(flavour, &self.record, &text)
                        .context("cannot tell resolvconf")?;
                    self.recorded = Some(text);
                }
            }
            Manager::File => self.write(wish, text.unwrap_or_default())?,
        }
        if !is_told {
            tracing::info!(by = manager.name(), "the host's resolver asks ours");
        }
        self.told = Some((manager, wish.clone()));
        Ok(())
    }

    /// Writes the file, unless somebody else insists on his.
    fn write(&mut self, wish: &HostDns, text: &str) -> anyhow::Result<()> {
        let was_ours = matches!(&self.told, Some((Manager::File, _)));
        if was_ours && !matches!(self.place.look(), There::Ours(_)) {
            let now = now();
            self.fights.retain(|at| now < *at + FIGHT_PERIOD);
            if self.fights.len() >= FIGHTS_MAX {
                anyhow::bail!(
                    "another program keeps writing {RESOLV_CONF}: for now it is left as that wants it"
                );
            }
            self.fights.push(now);
            tracing::info!(
                "another program has written {RESOLV_CONF}: what it wrote is kept for later"
            );
        }
        let change = Entry::Resolver(self.change(Manager::File));
        self.ledger.before(change.clone())?;
        let text = resolv_conf(wish, &self.base(text), &self.place.tun);
        let put = self.place.put(&text).inspect_err(|_| {
            if !matches!(self.place.look(), There::Ours(_)) {
                self.ledger.done(&change);
            }
        });
        put.with_context(|| format!("{RESOLV_CONF} cannot be written"))
    }

    /// Takes back whatever was told.
    async fn take_back(&mut self) -> anyhow::Result<()> {
        let Some((manager, _)) = self.told.clone() else {
            return Ok(());
        };
        match manager {
            Manager::Resolved => {
                // What is refused now goes with the link.
                if let Some(resolved) = &self.resolved
                    && let Err(error) = resolved.revert(self.link).await
                {
                    tracing::debug!(error = format!("{error:#}"), "systemd-resolved");
                }
            }
            Manager::Resolvconf(_) | Manager::File => {
                let change = self.change(manager);
                put_back(&change)?;
                self.ledger.done(&Entry::Resolver(change));
            }
        }
        (self.told, self.recorded) = (None, None);
        Ok(())
    }

    fn change(&self, manager: Manager) -> Change {
        match manager {
            Manager::Resolvconf(_) => Change::Resolvconf {
                record: self.record.clone(),
            },
            Manager::File | Manager::Resolved => Change::File {
                tun: self.place.tun.clone(),
                copy: self.place.copy.clone(),
            },
        }
    }

    /// Who keeps the settings now.
    async fn manager(&mut self, text: Option<&str>, link: &Path) -> Manager {
        let nsswitch = file::read(Path::new(NSSWITCH));
        let nsswitch = String::from_utf8_lossy(&nsswitch);
        let link = link.to_string_lossy();
        if self.resolved.is_none() && hints_at_resolved(text.unwrap_or_default(), &link, &nsswitch)
        {
            match Resolved::connect().await {
                Ok(resolved) => self.resolved = Some(resolved),
                Err(error) => tracing::debug!(error = format!("{error:#}"), "no systemd-resolved"),
            }
        }
        // It may have written the file as it started.
        let (text, _) = self.theirs();
        Manager::of(&Found {
            resolv_conf: text.as_deref(),
            nsswitch: &nsswitch,
            resolved: self.resolved.is_some(),
            resolvconf: resolvconf::flavour(),
        })
    }

    fn publish(&self, text: &Option<String>, problems: Vec<String>) {
        let base = self.base(text.as_deref().unwrap_or_default());
        let mut outside: Vec<SocketAddr> = base.elsewhere().collect();
        if outside.is_empty() {
            outside = read_base(Path::new(BEHIND_NETWORK_MANAGER))
                .elsewhere()
                .collect();
        }
        let report = Report {
            manager: self.told.as_ref().map(|(manager, _)| *manager),
            base,
            outside,
            problems,
        };
        self.reports.send_if_modified(|known| {
            let changed = *known != report;
            *known = report;
            changed
        });
    }

    /// What the resolver is set to without us.
    fn base(&self, text: &str) -> Base {
        let mut base = parse(text);
        if asks_only_resolved(text) {
            // A question that its stub gets may come back to us.
            let behind = read_base(Path::new(BEHIND_RESOLVED));
            if !behind.servers.is_empty() {
                base.servers = behind.servers;
            }
        } else if matches!(&self.told, Some((Manager::Resolvconf(_), _))) {
            // In the file is ours too; servers of its settings stand nowhere else.
            let of_file = std::mem::replace(&mut base, self.others()).servers;
            let more = of_file
                .into_iter()
                .filter(|server| !base.servers.contains(server));
            let more: Vec<SocketAddr> = more.collect();
            base.servers.extend(more);
        }
        base
    }

    /// What others told resolvconf.
    fn others(&self) -> Base {
        Base::read_records(&resolvconf::records(), &self.record, &is_ours, &index)
    }
}

fn read_base(path: &Path) -> Base {
    parse(&String::from_utf8_lossy(&file::read(path)))
}

fn parse(text: &str) -> Base {
    Base::read(text, &is_ours, &index)
}

fn is_ours(server: IpAddr) -> bool {
    [DNS_SERVICE_V4.into(), DNS_SERVICE_V6.into()].contains(&server)
}

fn index(interface: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(interface).ok()
}

/// News of the files.
struct Watch {
    inotify: Inotify,
    /// A second descriptor of the same.
    news: AsyncFd<OwnedFd>,
}

impl Watch {
    fn open() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let news = watch_descriptor(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(Self { inotify, news })
    }

    /// Watches what is there now: the folders, and the file itself, which may be mounted or a link.
    fn renew(&self, conf: &Path) {
        let names = AddWatchFlags::IN_MOVE | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE;
        let folders = [conf.parent(), Path::new(BEHIND_RESOLVED).parent()];
        for folder in folders.into_iter().flatten() {
            // The second one need not be there.
            let _ = self.inotify.add_watch(folder, names);
        }
        let own =
            AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_DELETE_SELF;
        let _ = self.inotify.add_watch(conf, own);
    }

    /// Takes the news: whether they are of the file.
    fn take(&self, name: &std::ffi::OsStr) -> io::Result<bool> {
        let mut concerns = false;
        loop {
            match self.inotify.read_events() {
                Ok(events) => {
                    // The file itself has no name.
                    concerns |= events
                        .iter()
                        .any(|event| event.name.as_deref().is_none_or(|found| found == name));
                }
                Err(Errno::EAGAIN) => return Ok(concerns),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Waits for news of the files.
async fn changes(watch: Option<&Watch>) {
    let name = Path::new(RESOLV_CONF).file_name().unwrap_or_default();
    while let Some(watch) = watch
        && let Ok(mut ready) = watch.news.readable().await
    {
        ready.clear_ready();
        match watch.take(name) {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%error, "changes of the host's resolver are noticed late");
                break;
            }
        }
    }
    std::future::pending().await
}

async fn restarted(resolved: &mut Option<Resolved>) -> bool {
    match resolved {
        Some(resolved) => resolved.restarted().await,
        None => std::future::pending().await,
    }
}
