//! A netlink watch: says when addresses, routes or links of the host changed.

use std::time::Duration;

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use tokio::sync::mpsc;

/// Changes come in bursts; one report follows when it was quiet for so long.
const QUIET: Duration = Duration::from_millis(250);

/// Watches the host for ever and sends one unit per burst of changes that concern interfaces other
/// than `own_tun`; changes while the last report is unread are part of it.
///
/// # Errors
/// When no netlink socket is to be had, or the kernel closes it.
pub async fn watch(own_tun: u32, changed: mpsc::Sender<()>) -> anyhow::Result<()> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ];
    let (connection, _handle, mut messages) =
        rtnetlink::new_multicast_connection(&groups).context("cannot watch netlink")?;
    tokio::task::spawn_local(connection);
    while let Some((message, _)) = messages.next().await {
        if !concerns(&message.payload, own_tun) {
            continue;
        }
        while let Ok(Some(_)) = tokio::time::timeout(QUIET, messages.next()).await {}
        // A full queue already holds a report that nobody has read.
        let _ = changed.try_send(());
    }
    anyhow::bail!("the kernel closed the netlink watch")
}

/// How our own interface is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnLink {
    /// Whether it is up.
    pub up: bool,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// Watches one interface for ever and tells how it is whenever the kernel says so. Its removal is
/// not told: the data plane notices it, and tells it from a move to another namespace.
///
/// # Errors
/// When no netlink socket is to be had, or the kernel closes it.
pub async fn watch_own(index: u32, news: mpsc::Sender<OwnLink>) -> anyhow::Result<()> {
    let (connection, handle, mut messages) =
        rtnetlink::new_multicast_connection(&[MulticastGroup::Link])
            .context("cannot watch netlink")?;
    tokio::task::spawn_local(connection);
    // What happened before the watch began.
    let mut found = handle.link().get().match_index(index).execute();
    while let Ok(Some(message)) = found.try_next().await {
        if let Some(link) = own_link(&message)
            && news.send(link).await.is_err()
        {
            return Ok(());
        }
    }
    while let Some((message, _)) = messages.next().await {
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) = message.payload
            && message.header.index == index
            && let Some(link) = own_link(&message)
            && news.send(link).await.is_err()
        {
            return Ok(());
        }
    }
    anyhow::bail!("the kernel closed the netlink watch")
}

/// None for a message about something else of the interface, such as its place in a bridge.
fn own_link(message: &LinkMessage) -> Option<OwnLink> {
    let mtu = message.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::Mtu(mtu) = attribute {
            Some(*mtu)
        } else {
            None
        }
    });
    Some(OwnLink {
        up: message.header.flags.contains(LinkFlags::Up),
        mtu: mtu?,
    })
}

/// Whether a message is about anything but our own interface.
fn concerns(payload: &NetlinkPayload<RouteNetlinkMessage>, own_tun: u32) -> bool {
    let NetlinkPayload::InnerMessage(message) = payload else {
        return false;
    };
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "netlink has dozens of unrelated messages"
    )]
    match message {
        RouteNetlinkMessage::NewAddress(m) | RouteNetlinkMessage::DelAddress(m) => {
            m.header.index != own_tun
        }
        RouteNetlinkMessage::NewLink(m) | RouteNetlinkMessage::DelLink(m) => {
            m.header.index != own_tun
                && m.attributes
                    .iter()
                    .any(|a| matches!(a, LinkAttribute::OperState(_)))
        }
        RouteNetlinkMessage::NewRoute(m) | RouteNetlinkMessage::DelRoute(m) => {
            use rtnetlink::packet_route::route::RouteAttribute;
            // Not all routes of ours lead into the tunnel.
            u8::from(m.header.protocol) != crate::hostnet::PROTOCOL
                && !m
                    .attributes
                    .iter()
                    .any(|a| matches!(a, RouteAttribute::Oif(i) if *i == own_tun))
        }
        _ => false,
    }
}
