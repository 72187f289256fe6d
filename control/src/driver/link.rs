//! A netlink watch: says when addresses, routes or links of the host changed.
//!
//! A host may change all the time: routes of BGP, interfaces of containers. A burst is told when it is
//! over, or [`LATEST`] after its first change if it does not end. Notices that the kernel could not
//! hold, and those that came while the watch had to be opened anew, count as a change: nobody knows
//! what they said.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteType};
use rtnetlink::sys::SocketAddr;
use tokio::sync::mpsc;

use super::clock::{at, now};

/// Changes come in bursts; one report follows when it was quiet for so long,
const QUIET: Duration = Duration::from_millis(250);
/// or so long after the first.
const LATEST: Duration = Duration::from_secs(1);
/// A watch that cannot be opened is tried again after this,
const REOPEN_MIN: Duration = Duration::from_millis(100);
/// doubled each time up to this.
const REOPEN_MAX: Duration = Duration::from_secs(10);
/// Notices in a row after which others have their turn.
const NOTICES_MAX: u32 = 64;

/// Watches the host until nobody listens, and sends one unit per burst of changes that concern
/// anything but our routes and the interface of index `own_tun`; changes while the last report is
/// unread are part of it.
pub async fn watch(own_tun: u32, changed: mpsc::Sender<()>) {
    let mut notices = Notices::new(&[
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ]);
    let (mut burst, mut taken) = (Burst::default(), 0);
    while !changed.is_closed() {
        tokio::select! {
            notice = notices.next() => {
                if notice.is_none_or(|payload| concerns(&payload, own_tun)) {
                    burst.note(now());
                }
                taken += 1;
                if taken % NOTICES_MAX == 0 {
                    tokio::task::yield_now().await;
                }
            }
            () = at(burst.due()) => {
                burst = Burst::default();
                // A full queue already holds a report that nobody has read.
                let _ = changed.try_send(());
            }
        }
    }
}

/// Changes that have not been told.
#[derive(Clone, Copy, Debug, Default)]
struct Burst {
    /// The first and the last.
    times: Option<(Instant, Instant)>,
}

impl Burst {
    fn note(&mut self, now: Instant) {
        let (first, _) = self.times.unwrap_or((now, now));
        self.times = Some((first, now));
    }

    fn due(self) -> Option<Instant> {
        self.times
            .map(|(first, last)| (last + QUIET).min(first + LATEST))
    }
}

type Messages =
    futures_util::stream::BoxStream<'static, (NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// The kernel's notices of some groups, for ever.
struct Notices {
    groups: &'static [MulticastGroup],
    messages: Option<Messages>,
    /// It was open once.
    opened: bool,
    pause: Duration,
}

impl Notices {
    fn new(groups: &'static [MulticastGroup]) -> Self {
        Self {
            groups,
            messages: None,
            opened: false,
            pause: Duration::ZERO,
        }
    }

    /// The next notice, or `None` where some are missing. Dropping the future loses nothing.
    async fn next(&mut self) -> Option<NetlinkPayload<RouteNetlinkMessage>> {
        loop {
            if let Some(messages) = &mut self.messages {
                if let Some((message, _)) = messages.next().await {
                    self.pause = Duration::ZERO;
                    let lost = matches!(message.payload, NetlinkPayload::Overrun(_));
                    return (!lost).then_some(message.payload);
                }
                tracing::warn!("the netlink watch broke off: opening it anew");
                (self.messages, self.pause) = (None, self.pause.max(REOPEN_MIN));
            }
            tokio::time::sleep(self.pause).await;
            match rtnetlink::new_multicast_connection(self.groups) {
                Ok((connection, _, messages)) => {
                    tokio::task::spawn_local(connection);
                    self.messages = Some(messages.boxed());
                    if std::mem::replace(&mut self.opened, true) {
                        return None;
                    }
                }
                Err(error) => {
                    if self.pause < REOPEN_MAX {
                        tracing::warn!(%error, "changes of the network are not noticed for now");
                    }
                    self.pause = (self.pause * 2).clamp(REOPEN_MIN, REOPEN_MAX);
                }
            }
        }
    }
}

/// How our own interface is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnLink {
    /// Whether it is up.
    pub up: bool,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// Watches one interface until nobody listens, and tells how it is whenever the kernel says so. Its
/// removal is not told: the data plane notices it, and tells it from a move to another namespace.
pub async fn watch_own(index: u32, news: mpsc::Sender<OwnLink>) {
    let mut notices = Notices::new(&[MulticastGroup::Link]);
    // What happened before the watch began, and again where notices are missing.
    let mut ask = true;
    loop {
        let link = if std::mem::take(&mut ask) {
            look(index).await.unwrap_or_else(|error| {
                tracing::debug!(%error, "own interface");
                None
            })
        } else {
            match notices.next().await {
                None => {
                    ask = true;
                    None
                }
                Some(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)))
                    if message.header.index == index =>
                {
                    own_link(&message)
                }
                Some(_) => None,
            }
        };
        if let Some(link) = link
            && news.send(link).await.is_err()
        {
            return;
        }
    }
}

/// How an interface is at the moment; `None` if there is none.
///
/// # Errors
/// There is no netlink.
pub async fn look(index: u32) -> anyhow::Result<Option<OwnLink>> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot ask netlink")?;
    tokio::task::spawn_local(connection);
    let mut found = handle.link().get().match_index(index).execute();
    Ok(found.try_next().await?.as_ref().and_then(own_link))
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

/// Whether a notice is about anything but what is ours.
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
            route_concerns(m, own_tun)
        }
        _ => false,
    }
}

/// Whether a route may lead packets of the underlay. Those to the host itself, to groups and to
/// everybody come and go with addresses and interfaces, which are told as such.
fn route_concerns(route: &RouteMessage, own_tun: u32) -> bool {
    // Not all routes of ours lead into the tunnel.
    let ours = u8::from(route.header.protocol) == crate::hostnet::PROTOCOL
        || route
            .attributes
            .iter()
            .any(|a| matches!(a, RouteAttribute::Oif(index) if *index == own_tun));
    let kind = route.header.kind;
    let about_us = matches!(
        kind,
        RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast
    );
    // What the kernel notes of single destinations is no route of the host's.
    let cloned = route.header.flags.contains(RouteFlags::Cloned);
    !ours && !about_us && !cloned
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    const OWN: u32 = 7;

    /// When a burst is told, for changes at these times; all in milliseconds.
    fn told(changes: impl Iterator<Item = u64>, end_ms: u64) -> Vec<u64> {
        let began = start();
        let at = |ms| began + Duration::from_millis(ms);
        let (mut burst, mut told) = (Burst::default(), Vec::new());
        let mut changes = changes.peekable();
        for ms in 0..end_ms {
            if burst.due().is_some_and(|due| due <= at(ms)) {
                burst = Burst::default();
                told.push(ms);
            }
            while changes.next_if_eq(&ms).is_some() {
                burst.note(at(ms));
            }
        }
        told
    }

    #[test]
    fn a_burst_is_told_when_it_is_over_or_after_a_second() {
        assert_eq!(told([0, 100, 200].into_iter(), 3000), [450]);
        assert_eq!(told([0, 1000].into_iter(), 3000), [250, 1250]);
        // A host that never rests.
        let restless = told((0..10_000).step_by(10), 10_000);
        assert!(restless.windows(2).all(|pair| pair[1] - pair[0] <= 1010));
        assert!((9..=10).contains(&restless.len()), "{restless:?}");
    }

    fn route(change: impl FnOnce(&mut RouteMessage)) -> NetlinkPayload<RouteNetlinkMessage> {
        let mut message = RouteMessage::default();
        message.header.table = 254;
        message.header.kind = RouteType::Unicast;
        message.attributes.push(RouteAttribute::Oif(2));
        change(&mut message);
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(message))
    }

    #[test]
    fn routes_of_ours_and_of_the_host_itself_do_not_concern() {
        assert!(concerns(&route(|_| ()), OWN));
        assert!(concerns(&route(|m| m.header.table = 101), OWN));
        for ours in [
            route(|m| m.attributes.push(RouteAttribute::Oif(7))),
            route(|m| m.header.protocol = crate::hostnet::PROTOCOL.into()),
            route(|m| m.header.kind = RouteType::Local),
            route(|m| m.header.kind = RouteType::Multicast),
            route(|m| m.header.flags.insert(RouteFlags::Cloned)),
        ] {
            assert!(!concerns(&ours, OWN), "{ours:?}");
        }
    }

    #[tokio::test(flavor = "local")]
    async fn a_watch_that_broke_off_is_opened_anew_and_counts_as_a_change() {
        let mut notices = Notices::new(&[MulticastGroup::Link]);
        // The kernel held more than it could, then the socket failed.
        let overrun = NetlinkPayload::Overrun(Vec::new());
        let overrun = NetlinkMessage::new(Default::default(), overrun);
        let broken = futures_util::stream::iter([(overrun, SocketAddr::new(0, 0))]);
        (notices.messages, notices.opened) = (Some(broken.boxed()), true);
        assert!(notices.next().await.is_none());
        assert!(notices.next().await.is_none());
        assert!(notices.messages.is_some(), "open again");
    }
}
