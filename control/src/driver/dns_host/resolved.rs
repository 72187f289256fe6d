//! systemd-resolved, by D-Bus (org.freedesktop.resolve1(5)).
//!
//! What is set belongs to the link, so it goes with the TUN after any kind of end. resolved forgets it when
//! somebody restarts it: [`Resolved::restarted`] tells of that.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use nix::libc::{AF_INET, AF_INET6};
use zbus::Connection;
use zbus::fdo::{DBusProxy, NameOwnerChangedStream};
use zbus::names::BusName;

use crate::dns::HostDns;
use crate::dns::host::is_domain;

/// Its name on the bus.
const NAME: &str = "org.freedesktop.resolve1";
/// Its stub, 127.0.0.53 port 53, as `/proc/net/udp` has it on machines of little and of big endian.
const STUB_SOCKET: &str = if cfg!(target_endian = "little") {
    "3500007F:0035"
} else {
    "7F000035:0035"
};
/// A call waits so long at most.
const CALL_WAIT: Duration = Duration::from_secs(1);
/// Domains of a link that it takes.
const DOMAINS_MAX: usize = 256;

#[zbus::proxy(
    interface = "org.freedesktop.resolve1.Manager",
    default_service = "org.freedesktop.resolve1",
    default_path = "/org/freedesktop/resolve1"
)]
trait Manager {
    #[zbus(name = "SetLinkDNS")]
    fn set_link_dns(&self, link: i32, servers: &[(i32, Vec<u8>)]) -> zbus::Result<()>;
    #[zbus(name = "SetLinkDomains")]
    fn set_link_domains(&self, link: i32, domains: &[(String, bool)]) -> zbus::Result<()>;
    #[zbus(name = "SetLinkDefaultRoute")]
    fn set_link_default_route(&self, link: i32, yes: bool) -> zbus::Result<()>;
    #[zbus(name = "SetLinkLLMNR")]
    fn set_link_llmnr(&self, link: i32, mode: &str) -> zbus::Result<()>;
    #[zbus(name = "SetLinkMulticastDNS")]
    fn set_link_multicast_dns(&self, link: i32, mode: &str) -> zbus::Result<()>;
    #[zbus(name = "SetLinkDNSSEC")]
    fn set_link_dnssec(&self, link: i32, mode: &str) -> zbus::Result<()>;
    #[zbus(name = "SetLinkDNSOverTLS")]
    fn set_link_dns_over_tls(&self, link: i32, mode: &str) -> zbus::Result<()>;
    fn flush_caches(&self) -> zbus::Result<()>;
    fn revert_link(&self, link: i32) -> zbus::Result<()>;
}

/// A connection to it.
pub(super) struct Resolved {
    manager: ManagerProxy<'static>,
    owners: NameOwnerChangedStream,
}

impl Resolved {
    /// Calls it, which starts it where it is installed and does not run.
    ///
    /// # Errors
    /// It does not answer, or looks after another network namespace, where our link's number is another's.
    pub(super) async fn connect() -> anyhow::Result<Self> {
        let bus = zbus::connection::Builder::system().method_timeout(CALL_WAIT);
        let bus = tokio::time::timeout(CALL_WAIT, bus.build()).await??;
        ping(&bus)
            .await
            .context("systemd-resolved does not answer")?;
        let names = DBusProxy::new(&bus).await?;
        let owners = names
            .receive_name_owner_changed_with_args(&[(0, NAME)])
            .await?;
        let name = BusName::try_from(NAME).expect("well-formed");
        let process = names.get_connection_unix_process_id(name).await?;
        if !is_here(process) {
            anyhow::bail!("systemd-resolved looks after another network namespace");
        }
        let manager = ManagerProxy::new(&bus).await?;
        Ok(Self { manager, owners })
    }

    /// Sets what the network wants for a link.
    ///
    /// # Errors
    /// It refuses, or does not answer in time.
    pub(super) async fn set(&self, link: i32, wish: &HostDns) -> anyhow::Result<()> {
        let set = self.set_all(link, wish).await;
        if set.is_err()
            && let Err(error) = self.revert(link).await
        {
            tracing::debug!(error = format!("{error:#}"), "systemd-resolved");
        }
        set
    }

    async fn set_all(&self, link: i32, wish: &HostDns) -> anyhow::Result<()> {
        // Before the server: one without domains is asked for all names.
        let set = self.manager.set_link_domains(link, &domains(wish)).await;
        set.context("systemd-resolved refuses our domains")?;
        // Older ones do not know it, nor all of the others below.
        let route = self.manager.set_link_default_route(link, wish.default);
        let route = route.await;
        let servers: Vec<_> = wish.servers.iter().copied().map(server).collect();
        let set = self.manager.set_link_dns(link, &servers).await;
        set.context("systemd-resolved refuses our server")?;
        let off = [
            route,
            self.manager.set_link_llmnr(link, "no").await,
            self.manager.set_link_multicast_dns(link, "no").await,
            self.manager.set_link_dnssec(link, "no").await,
            self.manager.set_link_dns_over_tls(link, "no").await,
            self.manager.flush_caches().await,
        ];
        for error in off.into_iter().filter_map(Result::err) {
            tracing::debug!(%error, "systemd-resolved");
        }
        Ok(())
    }

    /// Takes back what was set for a link.
    ///
    /// # Errors
    /// It does not answer; what was set goes with the link.
    pub(super) async fn revert(&self, link: i32) -> anyhow::Result<()> {
        self.manager.revert_link(link).await?;
        self.manager.flush_caches().await?;
        Ok(())
    }

    /// Waits until it has been started anew, or until the bus is gone (`false`).
    pub(super) async fn restarted(&mut self) -> bool {
        while let Some(signal) = self.owners.next().await {
            if signal.args().is_ok_and(|args| args.new_owner().is_some()) {
                return true;
            }
        }
        false
    }
}

/// Whether a process, which may be that of another namespace of processes by this number, is systemd-resolved and has the
/// network that we have.
fn is_here(process: u32) -> bool {
    let proc = |file: &str| format!("/proc/{process}/{file}");
    let comm = std::fs::read_to_string(proc("comm")).unwrap_or_default();
    let network = std::fs::read_link(proc("ns/net"));
    // The kernel keeps 15 bytes of a name.
    "systemd-resolved".starts_with(comm.trim_end())
        && comm.len() > 8
        && match (network, std::fs::read_link("/proc/self/ns/net")) {
            (Ok(theirs), Ok(ours)) => theirs == ours,
            // Only root may see that: then its stub has to be here.
            (Err(_), _) | (_, Err(_)) => std::fs::read_to_string("/proc/net/udp")
                .is_ok_and(|sockets| sockets.contains(STUB_SOCKET)),
        }
}

async fn ping(bus: &Connection) -> zbus::Result<()> {
    let peer = zbus::fdo::PeerProxy::builder(bus).destination(NAME);
    let peer = peer.path("/org/freedesktop/resolve1").build().await?;
    peer.ping().await
}

fn server(address: IpAddr) -> (i32, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
    }
}

/// Names and whether each is only for choosing the server: those of `search` are for both, and the root is for
/// everything. Where there are too many for it, we are asked for everything: what is not ours we pass on.
fn domains(wish: &HostDns) -> Vec<(String, bool)> {
    let mut domains: Vec<(String, bool)> = Vec::new();
    let search = wish.search.iter().map(|domain| (domain.as_str(), false));
    let others = wish
        .match_domains
        .iter()
        .map(|domain| (domain.as_str(), true));
    let too_many = wish.search.len() + wish.match_domains.len() >= DOMAINS_MAX;
    let all = (wish.default || too_many).then_some((".", true));
    let others = others.filter(|_| !too_many);
    let search = search.take(DOMAINS_MAX - 1);
    for (domain, routes) in search.chain(others).chain(all) {
        let known = |(known, _): &(String, bool)| known.eq_ignore_ascii_case(domain);
        if is_domain(domain) && !domains.iter().any(known) {
            domains.push((domain.to_owned(), routes));
        }
    }
    domains
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_for_searching_is_not_named_again_for_routing_and_the_root_is_last() {
        let text = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let wish = HostDns {
            servers: Vec::new(),
            search: text(&["lab.example", "two words"]),
            match_domains: text(&["Lab.example", "corp.example", "corp.example"]),
            default: true,
        };
        let found = domains(&wish);
        let found: Vec<(&str, bool)> = found
            .iter()
            .map(|(name, only)| (name.as_str(), *only))
            .collect();
        assert_eq!(
            found,
            [("lab.example", false), ("corp.example", true), (".", true)]
        );
        assert_eq!(domains(&HostDns::default()), []);
        let many = HostDns {
            search: text(&["lab.example", "a..b", &"a".repeat(64)]),
            match_domains: (0..DOMAINS_MAX).map(|n| format!("n{n}.example")).collect(),
            ..HostDns::default()
        };
        let all = [("lab.example".to_owned(), false), (".".to_owned(), true)];
        assert_eq!(domains(&many), all);
    }

    #[test]
    fn an_address_goes_in_network_byte_order() {
        assert_eq!(
            server([100, 100, 100, 100].into()),
            (2, vec![100, 100, 100, 100])
        );
        assert_eq!(server("fd7a::53".parse().unwrap()).1.len(), 16);
    }
}
