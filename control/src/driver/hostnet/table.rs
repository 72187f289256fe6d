//! Which table is ours: free of other programs' routes, and of other ringtails.
//!
//! A running ringtail holds a socket in the abstract namespace, which is one per network namespace and goes
//! with its process however that ends. So what bears our protocol number in a table whose socket
//! nobody holds was left behind, and is removed. Anybody may sit on such a name: where a user without
//! privileges does, only a route into an interface shows that a ringtail runs there.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket,
    sockopt::PeerCredentials,
};
use rtnetlink::packet_route::route::RouteType;

use super::netlink::Netlink;
use super::nft;
use crate::hostnet::{
    Action, Route, State, TABLE_DEFAULT, TABLE_MAX, TABLES_TRIED, Way, steps, table_of_priority,
};

/// Times a name is tried that is bound but not listened to: its holder is just about to, or just
/// ended.
const HOLD_TRIES: usize = 20;
/// Between two of them.
const HOLD_PAUSE: Duration = Duration::from_millis(5);
/// Connections turned away at once, at most: nobody keeps the thread by asking.
const TURN_AWAY_MAX: usize = 256;

/// A table that is ours while this lives.
pub(super) struct Claim {
    pub(super) table: u8,
    /// None where a stranger sits on the name, which gives no right to the table.
    held: Option<UnixListener>,
}

impl Claim {
    /// Takes and closes the connections of those that asked who holds the table, lest they fill
    /// its backlog.
    pub(super) fn turn_away(&self) {
        let Some(held) = &self.held else {
            return;
        };
        for _ in 0..TURN_AWAY_MAX {
            if held.accept().is_err() {
                break;
            }
        }
    }
}

/// Who has a table's name.
#[derive(Debug)]
enum Hold {
    /// We do, as long as this lives.
    Ours(UnixListener),
    /// Another ringtail, or somebody who does not let us see who it is.
    Taken,
    /// A user who need not be a ringtail.
    Stranger,
}

/// Removes what dead runs left, then takes the chosen table, or the first free one.
///
/// # Errors
/// When the chosen table, or every one tried, is another program's or another ringtail's.
pub(super) fn claim(netlink: &mut Netlink, chosen: Option<u8>) -> anyhow::Result<Claim> {
    for table in with_traces(netlink)? {
        remove_left(netlink, table)?;
    }
    let tried = match chosen {
        Some(table) => table..=table,
        None => TABLE_DEFAULT..=TABLE_DEFAULT + TABLES_TRIED - 1,
    };
    for table in tried {
        let held = match hold(table)? {
            Hold::Ours(listener) => Some(Some(listener)),
            Hold::Stranger => (!traces(netlink, table)?.alive).then_some(None),
            Hold::Taken => None,
        };
        let why = match held {
            None => format!("table {table} is another ringtail's"),
            Some(held) if !used_by_others(netlink, table)? => return Ok(Claim { table, held }),
            Some(_) => format!(
                "routing table {table} is another program's (tailscaled uses {TABLE_DEFAULT})"
            ),
        };
        if chosen.is_some() {
            bail!("{why}: choose one that nobody uses with --table, 1 to {TABLE_MAX}");
        }
        tracing::warn!("{why}: trying the next one");
    }
    bail!("no routing table is free: choose one that nobody uses with --table, 1 to {TABLE_MAX}");
}

/// Removes what a dead run left in and around a table; nothing, if a ringtail that runs has it.
///
/// # Errors
/// The name cannot be tried.
pub(super) fn remove_left(netlink: &mut Netlink, table: u8) -> anyhow::Result<()> {
    // Held until all is removed, lest another ringtail puts its own there meanwhile.
    let held = hold(table)?;
    let there = traces(netlink, table)?;
    let left = match &held {
        Hold::Ours(_) => true,
        Hold::Stranger => !there.alive,
        Hold::Taken => false,
    };
    if !left {
        return Ok(());
    }
    nft::remove_left(table).context("cannot remove rules of ours from the host's firewall")?;
    if there.state == State::default() {
        return Ok(());
    }
    tracing::info!(
        table,
        rules = there.state.rules.len(),
        routes = there.state.routes.len(),
        "removing what an earlier run left"
    );
    for step in steps(&State::default(), &there.state) {
        // The index is for routes into a tunnel that is no more: none is left.
        if let Err(error) = netlink.carry_out(&step, 0) {
            tracing::warn!(%error, ?step, "it stays");
        }
    }
    Ok(())
}

/// Holds a table's name, unless somebody does. Never waits for whoever that is.
fn hold(table: u8) -> anyhow::Result<Hold> {
    hold_name(&format!("ringtail-table-{table}")).context("cannot hold the routing table")
}

#[expect(
    clippy::disallowed_methods,
    reason = "a driver: it waits before anything runs"
)]
fn hold_name(name: &str) -> io::Result<Hold> {
    for _ in 0..HOLD_TRIES {
        match UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?) {
            Ok(listener) => {
                listener.set_nonblocking(true)?;
                return Ok(Hold::Ours(listener));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
        let asking = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        match connect(
            asking.as_raw_fd(),
            &UnixAddr::new_abstract(name.as_bytes())?,
        ) {
            Ok(()) => {
                let uid = getsockopt(&asking, PeerCredentials)?.uid();
                let own = nix::unistd::geteuid().as_raw();
                return Ok(if uid == 0 || uid == own {
                    Hold::Taken
                } else {
                    Hold::Stranger
                });
            }
            // Its backlog is full.
            Err(Errno::EAGAIN) => return Ok(Hold::Taken),
            Err(Errno::ECONNREFUSED) => std::thread::sleep(HOLD_PAUSE),
            Err(error) => return Err(error.into()),
        }
    }
    // Bound for good without a listener, which no ringtail does.
    Ok(Hold::Stranger)
}

/// Tables with rules or routes of our protocol number, or with something in nftables that bears their number: the
/// kernel removes those of a tunnel that is gone, but no rule in the host's firewall.
fn with_traces(netlink: &mut Netlink) -> anyhow::Result<BTreeSet<u8>> {
    let mut found = nft::with_traces();
    for v6 in [false, true] {
        // A family that is not there has none.
        let rules = netlink.rules(v6).unwrap_or_default();
        let ours = rules.iter().filter(|found| found.ours);
        found.extend(ours.filter_map(|found| table_of_priority(found.rule.priority)));
        let _ = netlink.routes(v6, 0, true, &mut |route| {
            found.extend(
                u8::try_from(route.table)
                    .ok()
                    .filter(|table| *table <= TABLE_MAX),
            );
        });
    }
    Ok(found)
}

/// What bears our protocol number in a table and among its rules.
#[derive(Default)]
struct Traces {
    state: State,
    /// Whether a route leads into a tunnel: the kernel removes those with their interface.
    alive: bool,
}

fn traces(netlink: &mut Netlink, table: u8) -> anyhow::Result<Traces> {
    let mut there = Traces::default();
    for v6 in [false, true] {
        let rules = netlink.rules(v6).unwrap_or_default().into_iter();
        let ours = rules
            .filter(|found| found.ours && table_of_priority(found.rule.priority) == Some(table));
        there.state.rules.extend(ours.map(|found| found.rule));
        let _ = netlink.routes(v6, table, true, &mut |route| {
            there.alive |= route.kind == RouteType::Unicast;
            let way = Way::Stale;
            there.state.routes.insert(Route {
                net: route.net,
                table,
                way,
            });
        });
    }
    Ok(there)
}

/// Whether routes of others stand in a table, or rules of others lead there.
fn used_by_others(netlink: &mut Netlink, table: u8) -> anyhow::Result<bool> {
    let mut used = false;
    for v6 in [false, true] {
        let rules = netlink.rules(v6).unwrap_or_default();
        let leads = Action::Table(table.into());
        used |= rules
            .iter()
            .any(|found| !found.ours && found.rule.action == leads);
        let _ = netlink.routes(v6, table, false, &mut |route| used |= !route.ours);
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    /// A name that no other test and no other run has.
    fn name(test: &str) -> String {
        format!("ringtail-test-{}-{test}", std::process::id())
    }

    fn bound(name: &str) -> OwnedFd {
        let flags = SockFlag::SOCK_CLOEXEC;
        let held = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        let address = UnixAddr::new_abstract(name.as_bytes()).unwrap();
        bind(held.as_raw_fd(), &address).unwrap();
        held
    }

    /// In a thread, as what is tested is that it comes back.
    fn held(name: &str) -> Hold {
        let (tx, rx) = mpsc::channel();
        let name = name.to_owned();
        std::thread::spawn(move || tx.send(hold_name(&name).unwrap()));
        rx.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn one_holds_until_it_ends() {
        let name = name("one");
        let ours = held(&name);
        assert!(matches!(ours, Hold::Ours(_)), "{ours:?}");
        assert!(matches!(held(&name), Hold::Taken));
        drop(ours);
        assert!(matches!(held(&name), Hold::Ours(_)));
    }

    #[test]
    fn a_holder_with_a_full_backlog_holds_nobody_up() {
        let name = name("full");
        let holder = bound(&name);
        listen(&holder, Backlog::new(0).unwrap()).unwrap();
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let _first = UnixStream::connect_addr(&address).unwrap();
        assert!(matches!(held(&name), Hold::Taken));
    }

    #[expect(clippy::disallowed_methods, reason = "the race is one of the kernel's")]
    #[test]
    fn a_holder_that_does_not_listen_yet_is_waited_for_but_not_for_ever() {
        let name = name("late");
        let holder = bound(&name);
        assert!(matches!(held(&name), Hold::Stranger));
        let listening = std::thread::spawn(move || {
            std::thread::sleep(2 * HOLD_PAUSE);
            listen(&holder, Backlog::new(1).unwrap()).unwrap();
            holder
        });
        assert!(matches!(held(&name), Hold::Taken));
        drop(listening.join().unwrap());
    }

    #[test]
    fn who_asked_does_not_fill_the_backlog() {
        let name = name("asked");
        let Hold::Ours(listener) = held(&name) else {
            panic!("somebody has it");
        };
        let claim = Claim {
            table: 1,
            held: Some(listener),
        };
        for _ in 0..3 {
            assert!(matches!(held(&name), Hold::Taken));
        }
        claim.turn_away();
        let left = claim.held.as_ref().unwrap().accept();
        assert_eq!(left.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
