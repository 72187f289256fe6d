//! Rules, routes and addresses by rtnetlink(7), one question at a time. The kernel answers while it
//! is being asked, so nothing here waits long.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use ipnet::IpNet;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressScope, CacheInfo,
};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use rtnetlink::packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::again::again;
use crate::hostnet::{Action, Link, MAIN, PROTOCOL, Route, Rule, Step, Way};
use crate::netmap::prefix::{DNS_SERVICE_V4, DNS_SERVICE_V6};

/// One answer, or a part of a long one.
const BUFFER_LEN: usize = 64 << 10;
/// For a kernel that does not answer at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// `RTNLGRP_*` of what concerns us: links, addresses, routes, rules, and whether interfaces forward, of both families.
const GROUPS: [u32; 9] = [1, 5, 9, 7, 11, 8, 19, 24, 25];

/// Asks and changes.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// A rule as it is there.
pub(super) struct FoundRule {
    pub(super) rule: Rule,
    pub(super) ours: bool,
}

/// A route as it is there.
pub(super) struct FoundRoute {
    pub(super) net: IpNet,
    pub(super) table: u32,
    pub(super) kind: RouteType,
    /// By which it leads: several where it has several next hops.
    pub(super) interfaces: Vec<u32>,
    pub(super) ours: bool,
}

/// An address as it is there.
pub(super) struct FoundAddress {
    pub(super) address: IpAddr,
    pub(super) subnet: Option<IpNet>,
    pub(super) interface: u32,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket2::SockRef::from(&socket).set_read_timeout(Some(ANSWER_TIMEOUT))?;
        // Lets the kernel filter; one that cannot is filtered here all the same.
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// The policy rules of one family.
    pub(super) fn rules(&mut self, v6: bool) -> io::Result<Vec<FoundRule>> {
        let mut question = RuleMessage::default();
        question.header.family = family(v6);
        let question = RouteNetlinkMessage::GetRule(question);
        self.collect(&question, &|message| {
            let RouteNetlinkMessage::NewRule(message) = message else {
                return None;
            };
            parse_rule(&message).filter(|_| message.header.family == family(v6))
        })
    }

    /// Hands over routes of one family: of one table (0: of all), of any protocol or only ours. What changes
    /// meanwhile may be handed over twice.
    pub(super) fn routes(
        &mut self,
        v6: bool,
        table: u8,
        ours_only: bool,
        each: &mut dyn FnMut(FoundRoute),
    ) -> io::Result<()> {
        let mut question = RouteMessage::default();
        question.header.address_family = family(v6);
        question.header.table = table;
        if ours_only {
            question.header.protocol = RouteProtocol::Other(PROTOCOL);
        }
        let question = RouteNetlinkMessage::GetRoute(question);
        let each = &mut |message| {
            if let RouteNetlinkMessage::NewRoute(message) = message
                && message.header.address_family == family(v6)
                && let Some(route) = parse_route(&message)
                && (table == 0 || route.table == u32::from(table))
                && (!ours_only || route.ours)
            {
                each(route);
            }
        };
        match again(|| self.ask(question.clone(), NLM_F_DUMP, &mut *each)) {
            // A table in which nothing ever stood.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// All addresses of both families.
    pub(super) fn addresses(&mut self) -> io::Result<Vec<FoundAddress>> {
        let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.collect(&question, &|message| {
            let RouteNetlinkMessage::NewAddress(message) = message else {
                return None;
            };
            parse_address(&message)
        })
    }

    /// All interfaces.
    pub(super) fn links(&mut self) -> io::Result<Vec<Link>> {
        let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.collect(&question, &|message| {
            let RouteNetlinkMessage::NewLink(message) = message else {
                return None;
            };
            Some(parse_link(&message))
        })
    }

    /// Makes one change.
    pub(super) fn carry_out(&mut self, step: &Step, tun: u32) -> io::Result<()> {
        let (message, flags) = match step {
            Step::AddAddress(ip) => (
                RouteNetlinkMessage::NewAddress(address_message(*ip, tun)),
                NLM_F_CREATE | NLM_F_EXCL,
            ),
            Step::DeleteAddress(ip) => (
                RouteNetlinkMessage::DelAddress(address_message(*ip, tun)),
                0,
            ),
            Step::AddRule(rule) => (
                RouteNetlinkMessage::NewRule(rule_message(rule)),
                NLM_F_CREATE | NLM_F_EXCL,
            ),
            Step::DeleteRule(rule) => (RouteNetlinkMessage::DelRule(rule_message(rule)), 0),
            // Beside another of the same prefix in our own table, which is removed next.
            Step::AddRoute(route) => {
                let exclusive = if route.table == MAIN { NLM_F_EXCL } else { 0 };
                (
                    RouteNetlinkMessage::NewRoute(route_message(route, tun)),
                    NLM_F_CREATE | exclusive,
                )
            }
            Step::DeleteRoute(route) => {
                (RouteNetlinkMessage::DelRoute(route_message(route, tun)), 0)
            }
        };
        self.ask(message, NLM_F_ACK | flags, &mut |_| {})
    }

    /// Everything of a kind, as it was at one moment.
    fn collect<T>(
        &mut self,
        question: &RouteNetlinkMessage,
        parse: &dyn Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        again(|| {
            let mut found = Vec::new();
            self.ask(question.clone(), NLM_F_DUMP, &mut |message| {
                found.extend(parse(message));
            })?;
            Ok(found)
        })
    }

    /// Asks, and hands over every answer until the last.
    ///
    /// # Errors
    /// `EINTR` if what it tells of changed meanwhile: something that was there all the time may be missing.
    fn ask(
        &mut self,
        question: RouteNetlinkMessage,
        flags: u16,
        each: &mut dyn FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(question));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut buffer = Vec::with_capacity(BUFFER_LEN);
        let mut torn = false;
        loop {
            buffer.clear();
            self.socket.recv(&mut buffer, 0)?;
            let sequence = self.sequence;
            let mut end = None;
            each_message(&buffer, &mut |answer| {
                if answer.header.sequence_number != sequence || end.is_some() {
                    return;
                }
                torn |= answer.header.flags & NLM_F_DUMP_INTR != 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => each(message),
                    NetlinkPayload::Done(done) if done.code == 0 => end = Some(Ok(())),
                    NetlinkPayload::Done(done) => {
                        end = Some(Err(io::Error::from_raw_os_error(-done.code)));
                    }
                    NetlinkPayload::Error(error) if error.code.is_none() => end = Some(Ok(())),
                    NetlinkPayload::Error(error) => end = Some(Err(error.to_io())),
                    NetlinkPayload::Noop | NetlinkPayload::Overrun(_) | _ => {}
                }
            });
            match end {
                Some(Ok(())) if torn => return Err(io::Error::from_raw_os_error(nix::libc::EINTR)),
                Some(end) => return end,
                None => {}
            }
        }
    }
}

/// `struct nlmsghdr`, in bytes.
const HEADER_LEN: usize = 16;
/// Messages of the kernel taken at once, in buffers; the rest waits a moment.
const READS_MAX: usize = 256;
/// Index of the loopback interface.
const LOOPBACK: u32 = 1;

/// Says when links, addresses, routes or rules changed.
pub(super) struct Watch(Socket);

impl Watch {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Takes what has come; what was too much for the socket may have been anything.
    pub(super) fn take(&self) -> News {
        let mut news = News::default();
        let mut buffer = Vec::with_capacity(BUFFER_LEN);
        for _ in 0..READS_MAX {
            buffer.clear();
            match self.0.recv(&mut buffer, 0) {
                Ok(_) => each_message(&buffer, &mut |message| {
                    let NetlinkPayload::InnerMessage(message) = message.payload else {
                        return;
                    };
                    if let RouteNetlinkMessage::NewRoute(route) = &message {
                        news.routes.extend(parse_route(route));
                    }
                    news.soon |= matches!(
                        message,
                        RouteNetlinkMessage::NewAddress(_)
                            | RouteNetlinkMessage::DelAddress(_)
                            | RouteNetlinkMessage::NewLink(_)
                            | RouteNetlinkMessage::DelLink(_)
                    );
                }),
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {
                    news.soon = true;
                }
                Err(_) => break,
            }
        }
        news
    }
}

/// What the kernel tells of by itself.
#[derive(Default)]
pub(super) struct News {
    /// Routes that are new.
    pub(super) routes: Vec<FoundRoute>,
    /// Whether addresses or interfaces may have changed, which is to be looked at soon.
    pub(super) soon: bool,
}

/// Hands over each message in a buffer that can be read; what cannot is somebody else's.
fn each_message(bytes: &[u8], each: &mut dyn FnMut(NetlinkMessage<RouteNetlinkMessage>)) {
    let mut rest = bytes;
    while let Some(len) = rest.first_chunk::<4>() {
        let len = usize::try_from(u32::from_ne_bytes(*len)).unwrap_or(usize::MAX);
        let Some(one) = rest.get(..len).filter(|one| one.len() >= HEADER_LEN) else {
            break;
        };
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        if let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(one) {
            each(message);
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn family(v6: bool) -> AddressFamily {
    if v6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    }
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.v6);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
    message.header.action = match rule.action {
        Action::Table(table) => {
            attributes.push(RuleAttribute::Table(table));
            RuleAction::ToTable
        }
        Action::Goto(target) => {
            attributes.push(RuleAttribute::Goto(target));
            RuleAction::Goto
        }
        Action::Nop => RuleAction::Nop,
    };
    if let Some((mark, mask)) = rule.mark {
        attributes.push(RuleAttribute::FwMark(mark));
        attributes.push(RuleAttribute::FwMask(mask));
    }
    if rule.local {
        attributes.push(RuleAttribute::Iifname("lo".to_owned()));
    }
    if let Some(port) = rule.port {
        attributes.push(RuleAttribute::IpProtocol(IpProtocol::Udp));
        attributes.push(RuleAttribute::SourcePortRange(RulePortRange {
            start: port,
            end: port,
        }));
    }
    message
}

/// None for a rule of a kind that we never make, and that is not ours.
fn parse_rule(message: &RuleMessage) -> Option<FoundRule> {
    let mut table = u32::from(message.header.table);
    let mut target = 0;
    let mut ours = false;
    let (mut mark, mut mask) = (None, u32::MAX);
    let mut rule = Rule {
        priority: 0,
        v6: message.header.family == AddressFamily::Inet6,
        action: Action::Nop,
        mark: None,
        local: false,
        port: None,
    };
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "rules can do much that ours do not"
    )]
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Protocol(protocol) => ours = u8::from(*protocol) == PROTOCOL,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Goto(priority) => target = *priority,
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = *value,
            RuleAttribute::Iifname(name) => rule.local = name == "lo",
            RuleAttribute::SourcePortRange(range) => rule.port = Some(range.start),
            _ => {}
        }
    }
    rule.mark = mark.map(|mark| (mark, mask));
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "rules can do much that ours do not"
    )]
    let action = match message.header.action {
        RuleAction::ToTable => Action::Table(table),
        RuleAction::Goto => Action::Goto(target),
        RuleAction::Nop => Action::Nop,
        _ => return None,
    };
    rule.action = action;
    Some(FoundRule { rule, ours })
}

fn route_message(route: &Route, tun: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    let v6 = route.net.addr().is_ipv6();
    header.address_family = family(v6);
    header.destination_prefix_length = route.net.prefix_len();
    header.table = route.table;
    header.protocol = RouteProtocol::Other(PROTOCOL);
    let destination = match route.net.addr() {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    };
    message.attributes = vec![RouteAttribute::Destination(destination)];
    // When the host adds a route, the kernel looks for its gateway among routes of this scope and
    // narrower ones only: with a wider one it would find the tunnel instead.
    let near = if v6 {
        RouteScope::Universe
    } else {
        RouteScope::Link
    };
    match route.way {
        Way::Throw => {
            header.kind = RouteType::Throw;
            header.scope = near;
            // As the kernel has it; without, a deletion would take any route of that prefix.
            if v6 {
                message.attributes.push(RouteAttribute::Oif(LOOPBACK));
            }
        }
        Way::Tunnel => {
            header.kind = RouteType::Unicast;
            header.scope = near;
            message.attributes.push(RouteAttribute::Oif(tun));
        }
        Way::Unreachable => {
            header.kind = RouteType::Unreachable;
            header.scope = near;
            if v6 {
                message.attributes.push(RouteAttribute::Oif(LOOPBACK));
            }
        }
        // Only ever deleted: whatever it is, scope "nowhere" stands for any.
        Way::Stale => header.scope = RouteScope::NoWhere,
    }
    message
}

fn parse_route(message: &RouteMessage) -> Option<FoundRoute> {
    let mut table = u32::from(message.header.table);
    let mut destination = None;
    let mut interfaces = Vec::new();
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "routes have dozens of attributes"
    )]
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => {
                destination = Some(IpAddr::V4(*ip));
            }
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => {
                destination = Some(IpAddr::V6(*ip));
            }
            RouteAttribute::Oif(index) => interfaces.push(*index),
            RouteAttribute::MultiPath(hops) => {
                interfaces.extend(hops.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    let any = if message.header.address_family == AddressFamily::Inet6 {
        IpAddr::from([0; 16])
    } else {
        IpAddr::from([0; 4])
    };
    let ip = destination.unwrap_or(any);
    Some(FoundRoute {
        net: IpNet::new(ip, message.header.destination_prefix_length).ok()?,
        table,
        kind: message.header.kind,
        interfaces,
        ours: u8::from(message.header.protocol) == PROTOCOL,
    })
}

/// With its full length, and without a route of its own in the main table (IPv6 would add one).
fn address_message(ip: IpAddr, tun: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(ip.is_ipv6());
    message.header.prefix_len = if ip.is_ipv6() { 128 } else { 32 };
    message.header.index = tun;
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    // Where a service is to be had, and nobody's source: of this host alone, and not preferred.
    if ip == DNS_SERVICE_V4 {
        message.header.scope = AddressScope::Host;
    } else if ip == DNS_SERVICE_V6 {
        let mut times = CacheInfo::default();
        times.ifa_valid = u32::MAX;
        message.attributes.push(AddressAttribute::CacheInfo(times));
    }
    if ip.is_ipv6() {
        let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
        message.attributes.push(AddressAttribute::Flags(flags));
    }
    message
}

fn parse_address(message: &AddressMessage) -> Option<FoundAddress> {
    let (mut local, mut far) = (None, None);
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "addresses have a dozen attributes"
    )]
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => far = Some(*ip),
            _ => {}
        }
    }
    // The subnet is the far end's where the two differ, as on a point-to-point link.
    let address = local.or(far)?;
    let subnet = IpNet::new(far.unwrap_or(address), message.header.prefix_len).ok()?;
    Some(FoundAddress {
        address,
        subnet: (subnet.prefix_len() < subnet.max_prefix_len()).then_some(subnet.trunc()),
        interface: message.header.index,
    })
}

fn parse_link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        bridge: None,
        is_bridge: false,
        is_virtual: false,
        // Up, with a carrier, and not waiting for more (IEEE 802.1X).
        carries: (message.header.flags)
            .contains(LinkFlags::Up | LinkFlags::LowerUp | LinkFlags::Running),
    };
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "interfaces have dozens of attributes"
    )]
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(index) => link.bridge = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.is_bridge = *kind == InfoKind::Bridge;
                        link.is_virtual = matches!(kind, InfoKind::Veth | InfoKind::Tun);
                    }
                }
            }
            _ => {}
        }
    }
    link
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::route::RouteNextHop;

    use super::*;
    use crate::hostnet::{Exit, Host, Overlay, plan, settings};

    #[test]
    fn rules_and_routes_are_read_back_as_they_were_written() {
        let overlay = Overlay {
            routes: ["10.0.0.0/8", "fd00::/48"]
                .map(|net| net.parse().unwrap())
                .into(),
            offered: ["10.5.0.0/16".parse().unwrap()].into(),
            exit: Some(Exit {
                takes: [true, false],
                allow_lan: false,
            }),
            ..Overlay::default()
        };
        let host = Host {
            ipv6: true,
            ..Host::default()
        };
        let state = plan(&settings(), &overlay, &host).state;
        assert_eq!((state.rules.len(), state.routes.len()), (8, 8));
        for rule in &state.rules {
            let found = parse_rule(&rule_message(rule)).unwrap();
            assert_eq!((found.rule, found.ours), (*rule, true));
        }
        for route in &state.routes {
            let found = parse_route(&route_message(route, 9)).unwrap();
            let kind = match route.way {
                Way::Throw => RouteType::Throw,
                Way::Unreachable => RouteType::Unreachable,
                Way::Tunnel | Way::Stale => RouteType::Unicast,
            };
            assert_eq!((found.net, found.kind), (route.net, kind));
            assert_eq!((found.table, found.ours), (52, true));
            if kind == RouteType::Unicast {
                assert_eq!(found.interfaces, [9]);
            }
        }
    }

    #[test]
    fn a_route_with_several_next_hops_leads_by_the_interface_of_each() {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.destination_prefix_length = 16;
        message.header.kind = RouteType::Unicast;
        let hops = [2, 3].map(|interface| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = interface;
            hop
        });
        message.attributes = vec![
            RouteAttribute::Destination(RouteAddress::Inet([10, 50, 0, 0].into())),
            RouteAttribute::MultiPath(hops.into()),
        ];
        let found = parse_route(&message).unwrap();
        assert_eq!(
            (found.net, found.interfaces),
            ("10.50.0.0/16".parse().unwrap(), vec![2, 3])
        );
    }
}
