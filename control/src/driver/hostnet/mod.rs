//! Keeps the host's rules, routes, firewall and forwarding, and the TUN's addresses, as [`crate::hostnet`] wants them.
//!
//! A thread of its own, so that thousands of routes hold nobody up: it wakes for a new wish, for a
//! connection that is about to be made, and when the kernel tells of a change; then it reads what is
//! there and carries out the difference. What others remove (a network manager that flushes rules, an
//! interface that goes down and up) comes back that way. Dropping [`HostNet`] removes everything and
//! waits until that is done; what a killed process left, the next start removes.
//!
//! Rooms: `worker` is the thread, `netlink` the kernel's messages (`again` where they are torn), `table` whose table it
//! is; `router` has nftables (`nft`) and forwarding (`sysctl`) as they should be.

mod again;
mod netlink;
mod nft;
mod router;
mod sysctl;
mod table;
mod worker;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use ipnet::IpNet;
use tokio::sync::{Notify, oneshot};

use crate::driver::ledger::{Entry, Ledger};
use crate::driver::lock;
use crate::hostnet::{Conflict, DIALLED_MAX, Host, Lans, Overlay, Problem, Settings};
use netlink::{Netlink, Watch};
use router::Router;
use worker::Worker;

/// A connection waits so long at most for its address to be kept out of the tunnel.
const KEEP_OUT_WAIT: Duration = Duration::from_millis(300);
/// And who wants something else of the host so long for that.
const SETTLED_WAIT: Duration = Duration::from_secs(2);
/// Addresses that wait to be kept out at most.
const ASKED_MAX: usize = 64;

/// What a node says of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Our table.
    pub table: u8,
    /// The network's services on this host that were looked for among the host's routes.
    pub services: BTreeSet<IpAddr>,
    /// Where routes of the network meet the host's.
    pub conflicts: Vec<Conflict>,
    /// More of them than are listed.
    pub more_conflicts: usize,
    /// Addresses outside of the tunnel although a route covers them.
    pub kept_out: Vec<IpAddr>,
    /// The bridges that guests of this host are on, and nobody else.
    pub guest_links: BTreeSet<u32>,
    /// What stands in the table of [`Options::handed_in`].
    pub handed: BTreeSet<IpNet>,
    /// Addresses that the TUN is to have and was not given.
    pub missing: BTreeSet<IpAddr>,
    /// What this node offers and cannot reach itself, or not forward to.
    pub lost: BTreeSet<IpNet>,
    /// What is not as it should be.
    pub problems: Vec<Problem>,
}

/// How to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// The table somebody chose; else the first free one from the default on.
    pub table: Option<u8>,
    /// A table of a routing daemon, whose routes are offered to others.
    pub handed_in: Option<u32>,
    /// Mark of underlay sockets; 0 is none.
    pub fwmark: u32,
    /// UDP port of the underlay.
    pub port: u16,
    /// Name and index of the TUN.
    pub tun: (String, u32),
    /// Where changes are noted before they are made.
    pub ledger: Ledger,
}

/// Removes what a run that is dead left in and around a table.
///
/// # Errors
/// There is no netlink.
pub fn remove_left(table: u8) -> anyhow::Result<()> {
    let mut netlink = Netlink::open().context("cannot open a netlink socket")?;
    table::remove_left(&mut netlink, table)
}

/// The host's network, as long as this lives.
#[derive(Debug)]
pub struct HostNet {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Keeps addresses out of the tunnel.
#[derive(Clone, Debug)]
pub struct Outside(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    wishes: Mutex<Wishes>,
    report: Mutex<Report>,
    /// Whenever other problems are reported than before.
    news: Notify,
    wake: UnixStream,
}

#[derive(Debug, Default)]
struct Wishes {
    overlay: Option<Overlay>,
    resolvers: Option<Vec<IpAddr>>,
    asked: Vec<(IpAddr, oneshot::Sender<()>)>,
    /// Who waits until all of them are carried out.
    waiting: Vec<oneshot::Sender<()>>,
    stop: bool,
}

/// What [`Wishes::take`] found.
#[derive(Debug, Default)]
struct Taken {
    /// Whether to end.
    stop: bool,
    /// Whether the network wants something else now, or the host asks other servers.
    overlay: bool,
    /// Whether there is an address that was not kept out before.
    dialled: bool,
    /// Who waits for it all to be so.
    waiting: Vec<oneshot::Sender<()>>,
}

impl Wishes {
    /// Takes all of them, the addresses to the front of those dialled: the one that nobody dialled for
    /// longest goes.
    fn take(&mut self, overlay: &mut Overlay, host: &mut Host) -> Taken {
        let mut taken = Taken {
            stop: self.stop,
            waiting: std::mem::take(&mut self.waiting),
            ..Taken::default()
        };
        if let Some(wanted) = self.overlay.take() {
            *overlay = wanted;
            taken.overlay = true;
        }
        if let Some(resolvers) = self.resolvers.take() {
            host.resolvers = resolvers;
            taken.overlay = true;
        }
        let dialled = &mut host.dialled;
        for (address, done) in self.asked.drain(..) {
            match dialled.iter().position(|known| *known == address) {
                Some(place) => dialled[..=place].rotate_right(1),
                None => {
                    dialled.insert(0, address);
                    taken.dialled = true;
                }
            }
            taken.waiting.push(done);
        }
        dialled.truncate(DIALLED_MAX);
        taken
    }
}

impl HostNet {
    /// Takes a table, removes what earlier runs left, and starts the thread.
    ///
    /// # Errors
    /// When there is no netlink, or the table is another program's; says what to do.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        let mut netlink = Netlink::open().context("cannot open a netlink socket")?;
        let watch = Watch::open().context("cannot watch netlink")?;
        // Without nftables there is nothing to watch.
        let rules = nft::Watch::open().ok();
        let claim = table::claim(&mut netlink, options.table)?;
        let table = claim.table;
        options.ledger.before(Entry::Routes { table })?;
        let (wake, woken) = UnixStream::pair().context("cannot make a socket pair")?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            wishes: Mutex::default(),
            report: Mutex::new(Report {
                table: claim.table,
                ..Report::default()
            }),
            news: Notify::new(),
            wake,
        });
        let worker = Worker {
            settings: Settings {
                table: claim.table,
                fwmark: options.fwmark,
                port: options.port,
                tun: options.tun.1,
                rules: [true; 2],
            },
            tun_name: options.tun.0,
            claim,
            ledger: options.ledger.clone(),
            netlink,
            overlay: Overlay::default(),
            host: Host::default(),
            real_bridges: BTreeSet::new(),
            tables: BTreeSet::new(),
            tunnel: BTreeSet::new(),
            too_many: false,
            added: BTreeSet::new(),
            denied: None,
            led: BTreeSet::new(),
            missing: BTreeSet::new(),
            told: BTreeSet::new(),
            lans: Lans::default(),
            handed_in: options.handed_in,
            handed: BTreeSet::new(),
            too_many_handed: false,
            router: Router::new(table, options.ledger),
            services: BTreeSet::new(),
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new()
            .name("hostnet".into())
            .spawn(move || worker.run(&watch, rules.as_ref(), &woken))
            .context("cannot start a thread")?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Takes what the network wants now; only the latest counts.
    pub fn set_overlay(&self, overlay: Overlay) {
        lock(&self.shared.wishes).overlay = Some(overlay);
        self.shared.wake();
    }

    /// Takes the servers that the host's resolver asks: they stay outside of the tunnel.
    pub fn set_resolvers(&self, resolvers: &[SocketAddr]) {
        let resolvers = resolvers.iter().map(SocketAddr::ip).collect();
        lock(&self.shared.wishes).resolvers = Some(resolvers);
        self.shared.wake();
    }

    /// Waits until what was wanted last is so, or for a while: who chose an exit node is not to be told that it is
    /// chosen while packets still go out beside it.
    pub fn settled(&self) -> impl Future<Output = ()> + use<> {
        let (done, wait) = oneshot::channel();
        {
            let mut wishes = lock(&self.shared.wishes);
            if wishes.waiting.len() < ASKED_MAX {
                wishes.waiting.push(done);
            }
        }
        self.shared.wake();
        async {
            let _ = tokio::time::timeout(SETTLED_WAIT, wait).await;
        }
    }

    /// How it stands.
    pub fn report(&self) -> Report {
        lock(&self.shared.report).clone()
    }

    /// Waits until [`Self::report`] has other problems.
    pub async fn news(&self) {
        self.shared.news.notified().await;
    }

    /// For whoever makes connections outside of the tunnel.
    pub fn outside(&self) -> Outside {
        Outside(Arc::clone(&self.shared))
    }
}

impl Drop for HostNet {
    fn drop(&mut self) {
        lock(&self.shared.wishes).stop = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // If it panicked, that has been printed, and the next start cleans up.
            let _ = thread.join();
        }
    }
}

impl Outside {
    /// Keeps an address out of the tunnel, whatever routes cover it; returns when that is so, or
    /// after a while.
    pub async fn keep_out(&self, address: IpAddr) {
        let (done, wait) = oneshot::channel();
        {
            let mut wishes = lock(&self.0.wishes);
            if wishes.asked.len() >= ASKED_MAX || wishes.stop {
                return;
            }
            wishes.asked.push((address, done));
        }
        self.0.wake();
        let _ = tokio::time::timeout(KEEP_OUT_WAIT, wait).await;
    }
}

impl Shared {
    fn wake(&self) {
        // A full pipe wakes as well.
        let _ = (&self.wake).write(&[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(wishes: &mut Wishes, address: [u8; 4]) -> oneshot::Receiver<()> {
        let (done, wait) = oneshot::channel();
        wishes.asked.push((address.into(), done));
        wait
    }

    #[test]
    fn a_wish_that_is_taken_is_told_of_whenever_it_came() {
        let (mut overlay, mut host) = (Overlay::default(), Host::default());
        let mut wishes = Wishes::default();
        let taken = wishes.take(&mut overlay, &mut host);
        assert!(!taken.overlay && !taken.dialled && !taken.stop);
        let wanted = Overlay {
            peers: BTreeSet::from([[100, 64, 0, 2].into()]),
            ..Overlay::default()
        };
        wishes.overlay = Some(wanted.clone());
        let (done, mut settled) = oneshot::channel();
        wishes.waiting.push(done);
        let taken = wishes.take(&mut overlay, &mut host);
        assert!(taken.overlay && taken.waiting.len() == 1);
        assert!(settled.try_recv().is_err(), "not before it is carried out");
        assert_eq!(overlay, wanted);
        assert!(!wishes.take(&mut overlay, &mut host).overlay);
        assert_eq!(overlay, wanted);
    }

    #[test]
    fn what_is_dialled_again_stays_and_nobody_is_told_too_early() {
        let (mut overlay, mut host) = (Overlay::default(), Host::default());
        let mut wishes = Wishes::default();
        let server = [10, 4, 0, 2];
        let mut first = asking(&mut wishes, server);
        // The same address twice, before it is kept out: both wait.
        let mut second = asking(&mut wishes, server);
        let taken = wishes.take(&mut overlay, &mut host);
        assert!(taken.dialled);
        assert_eq!(taken.waiting.len(), 2);
        assert!(first.try_recv().is_err() && second.try_recv().is_err());
        for other in 0..3 * DIALLED_MAX {
            let other = [10, 9, 0, u8::try_from(other).unwrap()];
            drop(asking(&mut wishes, other));
            assert!(wishes.take(&mut overlay, &mut host).dialled);
            assert_eq!(host.dialled[0], IpAddr::from(other));
            if other[3] % 32 == 0 {
                drop(asking(&mut wishes, server));
                let again = wishes.take(&mut overlay, &mut host);
                assert!(!again.dialled, "it was kept out all the time");
                assert_eq!(again.waiting.len(), 1);
                assert_eq!(
                    host.dialled[..2],
                    [IpAddr::from(server), IpAddr::from(other)]
                );
            }
        }
        assert_eq!(host.dialled.len(), DIALLED_MAX);
        assert!(host.dialled.contains(&server.into()));
    }
}
