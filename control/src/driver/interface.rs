//! The TUN interface's MTU and state, and the host's own addresses, by netlink.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use crate::netcheck;
use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use nix::sys::socket::SockaddrStorage;
use ringtail_dataplane::MTU_MAX;
use rtnetlink::packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec};
use tokio::sync::mpsc;

use super::link::{self, OwnLink};

/// One TUN interface, driven by netlink. The kernel removes everything with the interface.
pub struct Interface {
    handle: Handle,
    index: u32,
    name: String,
}

impl Interface {
    /// Finds the interface and keeps a netlink socket open for it.
    ///
    /// # Errors
    /// When there is no such interface or no netlink.
    pub async fn open(name: &str) -> anyhow::Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("cannot open a netlink socket")?;
        tokio::task::spawn_local(connection);
        let link = handle
            .link()
            .get()
            .match_name(name.to_owned())
            .execute()
            .try_next()
            .await
            .with_context(|| format!("cannot find interface {name}"))?
            .with_context(|| format!("interface {name} is gone"))?;
        Ok(Self {
            handle,
            index: link.header.index,
            name: name.to_owned(),
        })
    }

    /// The interface's index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Sets the MTU (bytes) and brings the interface up, without a link-local address, which would
    /// bring a route of its own into the host's main table. Where that may not be, one that somebody made
    /// and brought up beforehand will do.
    ///
    /// # Errors
    /// When the kernel refuses, as for an MTU it does not support.
    pub async fn up(&self, mtu: u16) -> anyhow::Result<()> {
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let none = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![none])]);
        // A host without IPv6 refuses, and has no such address anyway.
        let _ = self
            .change(self.link(mtu).append_extra_attribute(none))
            .await;
        let Err(error) = self.change(self.link(mtu).up()).await else {
            return Ok(());
        };
        let there = link::look(self.index).await?;
        if there.is_some_and(|there| there.up && there.mtu <= mtu.into()) {
            tracing::info!(%error, "the interface is up, and nothing of it is changed");
            return Ok(());
        }
        let name = &self.name;
        Err(error).with_context(|| {
            format!(
                "cannot bring {name} up with MTU {mtu} (who may does it by `ip link set {name} up mtu {mtu}`)"
            )
        })
    }

    /// Sets the MTU (bytes) and leaves the interface up or down as it is.
    ///
    /// # Errors
    /// When the kernel refuses, as for an MTU it does not support.
    pub async fn set_mtu(&self, mtu: u16) -> anyhow::Result<()> {
        self.change(self.link(mtu))
            .await
            .with_context(|| format!("cannot give {} the MTU {mtu}", self.name))
    }

    /// Gives the interface the largest MTU that has a use if it has a larger one: the kernel would let
    /// packets in that fit no datagram. What cannot be changed is logged.
    pub async fn cap_mtu(&self, link: OwnLink) {
        if link.mtu > MTU_MAX.into() {
            tracing::warn!(asked = link.mtu, "no MTU above {MTU_MAX} fits a datagram");
            if let Err(error) = self.set_mtu(MTU_MAX).await {
                tracing::warn!(%error, "larger packets are dropped");
            }
        }
    }

    /// Does so for ever, whenever somebody changes it.
    pub async fn keep_mtu_capped(&self) {
        let (sender, mut news) = mpsc::channel(1);
        let capped = async {
            while let Some(link) = news.recv().await {
                self.cap_mtu(link).await;
            }
        };
        tokio::join!(link::watch_own(self.index, sender), capped);
    }

    fn link(&self, mtu: u16) -> LinkMessageBuilder<LinkUnspec> {
        LinkMessageBuilder::default()
            .index(self.index)
            .append_extra_attribute(LinkAttribute::Mtu(mtu.into()))
    }

    async fn change(&self, link: LinkMessageBuilder<LinkUnspec>) -> Result<(), rtnetlink::Error> {
        self.handle.link().set(link.build()).execute().await
    }
}

/// The name of an interface, if there is one by this index.
pub fn interface_name(index: u32) -> Option<String> {
    nix::net::if_::if_indextoname(index)
        .ok()?
        .into_string()
        .ok()
}

/// All interfaces that are up, with their addresses of both families.
///
/// # Errors
/// When the system does not list them.
pub fn interfaces() -> anyhow::Result<Vec<netcheck::Interface>> {
    let up = nix::net::if_::InterfaceFlags::IFF_UP;
    let mut found: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for entry in nix::ifaddrs::getifaddrs().context("cannot list interface addresses")? {
        let Some(address) = entry.address.filter(|_| entry.flags.contains(up)) else {
            continue;
        };
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        let ip = v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())));
        if let Some(ip) = ip {
            found.entry(entry.interface_name).or_default().push(ip);
        }
    }
    Ok(found
        .into_iter()
        .map(|(name, addrs)| netcheck::Interface { name, addrs })
        .collect())
}

/// The addresses of all interfaces but `tun`, with the lengths of their subnets.
///
/// # Errors
/// When the system does not list them.
pub fn subnets(tun: &str) -> anyhow::Result<BTreeSet<IpNet>> {
    let entries = nix::ifaddrs::getifaddrs().context("cannot list interface addresses")?;
    let others = entries.filter(|entry| entry.interface_name != tun);
    let nets = others.filter_map(|entry| {
        let ip = |address: SockaddrStorage| -> Option<IpAddr> {
            let v4 = address.as_sockaddr_in().map(|a| a.ip().into());
            v4.or_else(|| address.as_sockaddr_in6().map(|a| a.ip().into()))
        };
        IpNet::with_netmask(ip(entry.address?)?, ip(entry.netmask?)?).ok()
    });
    Ok(nets.collect())
}

/// The address the host would send from towards `destination`, outside of the tunnel if there is a
/// mark; nothing is sent.
pub fn source_address(destination: SocketAddr, fwmark: u32) -> Option<IpAddr> {
    let any: SocketAddr = match destination {
        SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = std::net::UdpSocket::bind(any).ok()?;
    if fwmark != 0 {
        socket2::SockRef::from(&socket).set_mark(fwmark).ok()?;
    }
    socket.connect(destination).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
