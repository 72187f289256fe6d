//! The TUN interface's addresses, routes and MTU, and the host's own addresses, by netlink.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use crate::netcheck;
use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};

/// One TUN interface, driven by netlink. The kernel removes everything with the interface.
pub struct Interface {
    handle: Handle,
    index: u32,
    name: String,
    addresses: BTreeSet<IpNet>,
    routes: BTreeSet<IpNet>,
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
            addresses: BTreeSet::new(),
            routes: BTreeSet::new(),
        })
    }

    /// The interface's index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Sets the MTU (bytes) and brings the interface up.
    ///
    /// # Errors
    /// When the kernel refuses, as for an MTU it does not support.
    pub async fn up(&self, mtu: u16) -> anyhow::Result<()> {
        self.change(self.link(mtu).up())
            .await
            .with_context(|| format!("cannot bring {} up with MTU {mtu}", self.name))
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

    fn link(&self, mtu: u16) -> LinkMessageBuilder<LinkUnspec> {
        LinkMessageBuilder::default()
            .index(self.index)
            .append_extra_attribute(LinkAttribute::Mtu(mtu.into()))
    }

    async fn change(&self, link: LinkMessageBuilder<LinkUnspec>) -> Result<(), rtnetlink::Error> {
        self.handle.link().set(link.build()).execute().await
    }

    /// Makes the interface's addresses and the routes through it exactly these.
    ///
    /// Own addresses are set with their full length, so that only `routes` decide what goes into
    /// the tunnel. Default routes are left out: sending everything through a peer needs policy
    /// routing beside it. The first failure is reported after the rest has been tried.
    ///
    /// # Errors
    /// The first address or route that the kernel refused.
    pub async fn configure(
        &mut self,
        addresses: &BTreeSet<IpNet>,
        routes: &BTreeSet<IpNet>,
    ) -> anyhow::Result<()> {
        let mut result = Ok(());
        let mut keep = |outcome: anyhow::Result<()>| {
            let ok = outcome.is_ok();
            if result.is_ok() {
                result = outcome;
            }
            ok
        };
        let single = |net: &IpNet| IpNet::from(net.addr());
        let wanted: BTreeSet<IpNet> = addresses.iter().map(single).collect();
        for gone in self
            .addresses
            .difference(&wanted)
            .copied()
            .collect::<Vec<_>>()
        {
            if keep(self.delete_address(gone.addr()).await) {
                self.addresses.remove(&gone);
            }
        }
        for new in wanted
            .difference(&self.addresses)
            .copied()
            .collect::<Vec<_>>()
        {
            let added = self
                .handle
                .address()
                .add(self.index, new.addr(), new.prefix_len())
                .execute()
                .await
                .with_context(|| format!("cannot give {} the address {new}", self.name));
            if keep(added) {
                self.addresses.insert(new);
            }
        }
        let wanted: BTreeSet<IpNet> = routes
            .iter()
            .map(IpNet::trunc)
            .filter(|net| net.prefix_len() > 0 && !self.addresses.contains(net))
            .collect();
        for gone in self.routes.difference(&wanted).copied().collect::<Vec<_>>() {
            let deleted = self
                .handle
                .route()
                .del(self.route(gone))
                .execute()
                .await
                .with_context(|| format!("cannot remove the route {gone} from {}", self.name));
            if keep(deleted) {
                self.routes.remove(&gone);
            }
        }
        for new in wanted.difference(&self.routes).copied().collect::<Vec<_>>() {
            let added = self
                .handle
                .route()
                .add(self.route(new))
                .replace()
                .execute()
                .await
                .with_context(|| format!("cannot route {new} to {}", self.name));
            if keep(added) {
                self.routes.insert(new);
            }
        }
        result
    }

    async fn delete_address(&self, address: IpAddr) -> anyhow::Result<()> {
        let mut found = self
            .handle
            .address()
            .get()
            .set_link_index_filter(self.index)
            .set_address_filter(address)
            .execute();
        while let Some(message) = found.try_next().await? {
            self.handle
                .address()
                .del(message)
                .execute()
                .await
                .with_context(|| format!("cannot take the address {address} from {}", self.name))?;
        }
        Ok(())
    }

    fn route(&self, net: IpNet) -> RouteMessage {
        let attributes = match net {
            IpNet::V4(net) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(net.addr(), net.prefix_len())
                .output_interface(self.index)
                .scope(rtnetlink::packet_route::route::RouteScope::Link)
                .build(),
            IpNet::V6(net) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(net.addr(), net.prefix_len())
                .output_interface(self.index)
                .build(),
        };
        debug_assert!(attributes.attributes.iter().any(|attribute| matches!(
            attribute,
            RouteAttribute::Destination(RouteAddress::Inet(_) | RouteAddress::Inet6(_))
        )));
        attributes
    }
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

/// The address the host would send from towards `destination`; nothing is sent.
pub fn source_address(destination: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr = match destination {
        SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = std::net::UdpSocket::bind(any).ok()?;
    socket.connect(destination).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
