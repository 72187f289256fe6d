//! Which table is ours: free of other programs' routes, and of other ringtails.
//!
//! A running ringtail holds a socket in the abstract namespace, which is one per network namespace and goes
//! with its process however that ends. So what bears our protocol number in a table whose socket
//! nobody holds was left behind, and is removed.

use std::collections::BTreeSet;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use anyhow::{Context as _, bail};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::netlink::Netlink;
use crate::hostnet::{
    Action, Route, State, TABLE_DEFAULT, TABLE_MAX, Way, steps, table_of_priority,
};

/// The host's main table.
pub(super) const MAIN: u8 = 254;
/// Tables tried unless one is chosen.
const TRIED: u8 = 8;

/// A table that is ours while this lives.
pub(super) struct Claim {
    pub(super) table: u8,
    /// None where a stranger sits on the name, which gives no right to the table.
    _held: Option<UnixListener>,
}

/// Removes what dead runs left, then takes the chosen table, or the first free one.
///
/// # Errors
/// When the chosen table, or every one tried, is another program's or another ringtail's.
pub(super) fn claim(netlink: &mut Netlink, chosen: Option<u8>) -> anyhow::Result<Claim> {
    for table in with_traces(netlink)? {
        if let Some(_held) = hold(table)? {
            let there = traces(netlink, table)?;
            tracing::info!(
                table,
                rules = there.rules.len(),
                routes = there.routes.len(),
                "removing what an earlier run left"
            );
            for step in steps(&State::default(), &there) {
                // The index is for routes into a tunnel that is no more: none is left.
                if let Err(error) = netlink.carry_out(&step, 0) {
                    tracing::warn!(%error, ?step, "it stays");
                }
            }
        }
    }
    let tried = match chosen {
        Some(table) => table..=table,
        None => TABLE_DEFAULT..=TABLE_DEFAULT + TRIED - 1,
    };
    for table in tried {
        let why = match hold(table)? {
            None => format!("table {table} is another ringtail's"),
            Some(held) if !used_by_others(netlink, table)? => {
                return Ok(Claim { table, _held: held });
            }
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

/// Holds a table's name; none while another ringtail does. The inner none is for a name that
/// somebody without privileges sits on.
fn hold(table: u8) -> anyhow::Result<Option<Option<UnixListener>>> {
    let name = SocketAddr::from_abstract_name(format!("ringtail-table-{table}"))?;
    let holder = match UnixListener::bind_addr(&name) {
        Ok(listener) => return Ok(Some(Some(listener))),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => UnixStream::connect_addr(&name),
        Err(error) => return Err(error).context("cannot hold the routing table"),
    };
    let owner = holder
        .ok()
        .and_then(|stream| getsockopt(&stream, PeerCredentials).ok())
        .map(|peer| peer.uid());
    let own = nix::unistd::geteuid().as_raw();
    Ok(match owner {
        Some(uid) if uid == 0 || uid == own => None,
        Some(_) | None => Some(None),
    })
}

/// Tables with rules or routes of our protocol number.
fn with_traces(netlink: &mut Netlink) -> anyhow::Result<BTreeSet<u8>> {
    let mut found = BTreeSet::new();
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
fn traces(netlink: &mut Netlink, table: u8) -> anyhow::Result<State> {
    let mut there = State::default();
    for v6 in [false, true] {
        let rules = netlink.rules(v6).unwrap_or_default().into_iter();
        let ours = rules
            .filter(|found| found.ours && table_of_priority(found.rule.priority) == Some(table));
        there.rules.extend(ours.map(|found| found.rule));
        let _ = netlink.routes(v6, table, true, &mut |route| {
            let way = Way::Stale;
            there.routes.insert(Route {
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
