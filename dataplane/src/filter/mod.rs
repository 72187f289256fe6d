#![forbid(unsafe_code)]
//! What may come in from a peer.
//!
//! Two questions, asked of every opened packet in this order:
//!
//! 1. [`source_allowed`]: is the inner source among the sender's allowed IPs? Always asked.
//! 2. [`Filter::admit`]: do the rules let it in? Outbound packets are not filtered but for TSMP, only
//!    remembered, so that replies pass ([`Filter::remember`]).
//!
//! The rules are Tailscale's (`wgengine/filter`): the filter guards connections, not packets, and
//! keeps no TCP state: what is not a pure SYN passes and dies at a host without such a connection.
//!
//! - Destination multicast or link-local (but 169.254.169.254): dropped.
//! - Destination not local: dropped.
//! - Later fragments pass from 80 bytes on (nothing below can have a transport header overwritten);
//!   the receiver cannot assemble them without the first, which was filtered.
//! - ICMP and ICMPv6: echo replies and errors pass, the rest if any rule joins the two addresses.
//! - TCP: pure SYNs need a rule, but for the port of our [`PeerApi`], which judges for itself.
//!   UDP, SCTP: a remembered flow or a rule.
//! - TSMP (99) is the node's own business and never reaches the kernel; its pings are answered.
//!   None leaves but the node's own.
//! - Other protocols need a rule that names them, for all ports.
//!
//! A filter is [closed](Filter::closed) until it is given rules: then no fragment, no answer and no
//! TCP segment passes either, since nothing is ours.
//!
//! A change of rules counts from the next packet on, also for flows that the old ones let in: replies
//! are remembered of flows that began here, and no rule is asked about them. Of a flow that a peer began, by
//! leave of a rule, it is remembered that it did ([`Memory`]): our answers do not make it one of ours.
//!
//! With [`Rules::AllowAll`](crate::types::Rules) no rule is asked, but flows are remembered all the same:
//! a list may follow, or shields go up, and what began here goes on. A plain device, of which nobody said
//! what is its own, remembers nothing before its first list, or before another shard tells it of a flow.
//!
//! Rooms: `rules` is whose packets a rule is about, `table` where it lets them; `flows` remembers what
//! began here, `tsmp` is what ends in the node.

mod flows;
mod rules;
mod table;
mod tsmp;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

use crate::packet::header::{
    Flow, Fragment, HashKey, Headers, ICMP, ICMPV6, IpVersion, SCTP, TCP, TCP_ACK, TCP_SYN, TSMP,
    UDP,
};
use crate::route::Cursor;
use crate::stats::DropReason;
use crate::types::{PeerApi, PeerId};
#[cfg(test)]
pub(crate) use flows::{FLOW_COST, SHARD_FLOWS_MIN};
#[cfg(test)]
use flows::{FLOW_REPORT_INTERVAL, FLOW_TIMEOUT, FLOWS_MAX};
pub use flows::{FlowMemory, Tell};
pub(crate) use flows::{flows_max, theirs_max};
pub use rules::{Ask, CompiledRules};
pub(crate) use tsmp::{TSMP_LEN_MAX, answered, ping, pong};
#[cfg(test)]
pub(crate) use {rules::TABLE_PARTS_MAX, table::PART_COST};

/// The metadata address of clouds: link-local, yet routed to by subnet routers.
const CLOUD_METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// What was asked of the rules, for a source and a destination.
type Asked = (Ask, IpAddr, IpAddr);
/// Things that were let in and are known again.
const LET_IN_PLACES: usize = 64;
/// A later fragment below this offset, in units of 8 bytes, could reach into a transport header
/// (60 bytes of IPv4 header and 20 of TCP).
const FRAGMENT_OFFSET_MIN: u16 = 10;

/// Whether the packet's source is among the allowed IPs of the peer that sealed it.
///
/// # Errors
/// [`DropReason::SourceNotAllowed`] if not.
#[inline]
pub fn source_allowed(
    routes: &mut Cursor<'_>,
    sender: PeerId,
    headers: &Headers,
) -> Result<(), DropReason> {
    if routes.lookup(headers.src) == Some(sender) {
        Ok(())
    } else {
        Err(DropReason::SourceNotAllowed)
    }
}

/// The filter of one shard.
#[derive(Debug)]
pub struct Filter {
    rules: Arc<CompiledRules>,
    peerapi: PeerApi,
    /// Exists from the first rules on under which flows are remembered, or flow of another shard.
    flows: Option<Memory>,
    flows_max: usize,
    /// The last destination found to be ours, under these rules: nearly every packet has it again.
    local_before: Option<IpAddr>,
    /// Things asked that these rules let in, each at its place by hash: the packets of a flow ask the same
    /// again.
    let_in_before: Box<[Option<Asked>; LET_IN_PLACES]>,
}

/// Flows in use, by the side that began them; no flow is in both, and which one it is in stays so until
/// neither side has used it for five minutes.
#[derive(Debug)]
struct Memory {
    /// The replies to flows that began here.
    ours: FlowMemory,
    /// Flows that a rule let in. Apart from ours, so that those who may begin flows cannot make us forget ours.
    theirs: FlowMemory,
}

impl Memory {
    /// Notes an outbound packet by its reply, unless it answers what a peer began.
    fn remember(
        &mut self,
        now: Instant,
        reply: Flow,
        owner_forgot: Option<Instant>,
    ) -> Option<Tell> {
        if self.theirs.admits(now, &reply) {
            return None;
        }
        self.ours.remember(now, reply, owner_forgot)
    }

    /// Notes an inbound packet of a flow that is none of ours.
    fn begun_there(&mut self, now: Instant, flow: Flow, let_in: bool) {
        if let_in {
            self.theirs.remember(now, flow, None);
        } else {
            // What was let in before and goes on is theirs all the same.
            self.theirs.admits(now, &flow);
        }
    }
}

impl Filter {
    /// A filter that lets nothing in yet, and remembers nothing.
    #[cfg(feature = "internals")]
    pub fn closed() -> Filter {
        Filter::of_one_shard(1)
    }

    /// The same for one shard of so many, whose memory is smaller where there are many.
    pub(crate) fn of_one_shard(shards: usize) -> Filter {
        Filter {
            rules: Arc::new(CompiledRules::closed()),
            peerapi: PeerApi::default(),
            flows: None,
            flows_max: flows_max(shards),
            local_before: None,
            let_in_before: Box::new([None; LET_IN_PLACES]),
        }
    }

    /// A filter with these rules.
    #[cfg(feature = "internals")]
    pub fn new(now: Instant, rules: Arc<CompiledRules>) -> Filter {
        let mut filter = Filter::closed();
        filter.set_rules(now, rules);
        filter
    }

    /// Replaces the rules and gives back those that were. Remembered flows stay.
    pub fn set_rules(&mut self, now: Instant, rules: Arc<CompiledRules>) -> Arc<CompiledRules> {
        if rules.remembers() {
            self.memory(now);
        }
        self.local_before = None;
        self.let_in_before.fill(None);
        std::mem::replace(&mut self.rules, rules)
    }

    /// Says where our peerapi listens from now on.
    pub fn set_peerapi(&mut self, peerapi: PeerApi) {
        self.peerapi = peerapi;
    }

    /// The port of our peerapi at one of our addresses; 0 for none.
    pub(crate) fn peerapi_port(&self, at: IpAddr) -> u16 {
        self.peerapi.port(at).unwrap_or(0)
    }

    /// Whether the packet may open a connection to our peerapi; one that hides that may.
    pub(crate) fn opens_peerapi(&self, headers: &Headers, packet: &[u8]) -> bool {
        if headers.protocol != TCP || matches!(headers.fragment, Fragment::Later(_)) {
            return false;
        }
        let Some(port) = self.peerapi.port(headers.dst) else {
            return false;
        };
        let opens = |flags| flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
        let tcp = headers.tcp(packet);
        tcp.is_none_or(|tcp| opens(tcp.flags) && tcp.dst_port.get() == port)
    }

    /// Lets an opened packet in or says why not. `headers` are those of `packet`.
    ///
    /// # Errors
    /// One of the `Filter*` reasons, [`DropReason::FilterConsumed`] for what was for the node itself, or
    /// [`DropReason::InnerMalformed`] for a truncated transport header.
    #[inline]
    pub fn admit(
        &mut self,
        now: Instant,
        headers: &Headers,
        packet: &[u8],
    ) -> Result<(), DropReason> {
        if self.rules.is_allow_all() {
            self.admit_local(headers.dst)?;
            // Where nothing is said of what is ours, this is no node of a tailnet but a plain device.
            if !self.rules.knows_local() {
                return Ok(());
            }
            if headers.protocol == TSMP {
                return Err(DropReason::FilterConsumed);
            }
            self.note_inbound(now, headers, packet);
            return Ok(());
        }
        self.decide(now, headers, packet)
    }

    /// Whether an outbound packet is one that nobody but the node itself may send: peers believe what it
    /// says by TSMP, also of the key that its paths are found with. A plain device passes it on.
    #[inline]
    pub(crate) fn keeps_from_leaving(&self, headers: &Headers) -> bool {
        headers.protocol == TSMP && self.rules.knows_local()
    }

    /// Notes an outbound packet (a super-packet counts as one) to a peer of this shard. Gives back the
    /// flow of its replies if it is new here, or in use for another [`FLOW_REPORT_INTERVAL`].
    #[inline]
    pub fn remember(&mut self, now: Instant, headers: &Headers, packet: &[u8]) -> Option<Flow> {
        let tell = self.remember_for(now, headers, packet, || None)?;
        Some(tell.reply)
    }

    /// Notes an outbound packet to a peer of another shard. Gives back what that shard must [`learn`]
    /// before the packet leaves, if anything. `owner_forgot` is what [`Filter::forgotten`] says there.
    ///
    /// [`learn`]: Filter::learn
    #[inline]
    #[must_use = "the owner shard must learn a new flow"]
    pub fn remember_for(
        &mut self,
        now: Instant,
        headers: &Headers,
        packet: &[u8],
        owner_forgot: impl FnOnce() -> Option<Instant>,
    ) -> Option<Tell> {
        if !self.rules.remembers() || !matches!(headers.protocol, UDP | SCTP) {
            return None;
        }
        // Later fragments have no ports; the first one stood for them.
        headers.ports(packet)?;
        let reply = headers.flow(packet).reversed();
        self.flows.as_mut()?.remember(now, reply, owner_forgot())
    }

    /// Takes back what [`Filter::remember_for`] gave: the owner could not be told.
    pub fn untold(&mut self, tell: &Tell) {
        if let Some(flows) = &mut self.flows {
            flows.ours.untold(tell);
        }
    }

    /// Takes over a flow that another shard remembered, under a list that we may not have seen yet: it
    /// does not tell us again with every packet.
    pub fn learn(&mut self, now: Instant, reply: Flow) {
        self.memory(now).remember(now, reply, None);
    }

    /// Takes note that peers may have other owners now.
    pub fn owners_changed(&mut self) {
        if let Some(flows) = &mut self.flows {
            flows.ours.owners_changed();
        }
    }

    /// Every flow used at or after this moment is still known; every one at all if there is none.
    pub fn forgotten(&self) -> Option<Instant> {
        self.flows.as_ref()?.ours.forgotten()
    }

    fn memory(&mut self, now: Instant) -> &mut Memory {
        let of = |flows_max| FlowMemory::new(now, HashKey::random(), flows_max);
        self.flows.get_or_insert_with(|| Memory {
            ours: of(self.flows_max),
            theirs: of(theirs_max(self.flows_max)),
        })
    }

    /// Remembered flows that made room for newer ones, since the last call.
    pub fn take_evicted(&mut self) -> u64 {
        self.flows.as_mut().map_or(0, |flows| {
            flows.ours.take_evicted() + flows.theirs.take_evicted()
        })
    }

    /// Everybody may reach us; nobody may use us as a router to what we do not offer.
    #[inline]
    fn admit_local(&mut self, dst: IpAddr) -> Result<(), DropReason> {
        if self.local_before == Some(dst) {
            return Ok(());
        }
        if !self.rules.is_local(dst) {
            return Err(DropReason::FilterNotLocal);
        }
        self.local_before = Some(dst);
        Ok(())
    }

    /// Notes a packet that nothing had to let in.
    #[inline]
    fn note_inbound(&mut self, now: Instant, headers: &Headers, packet: &[u8]) {
        if !matches!(headers.protocol, UDP | SCTP) || headers.ports(packet).is_none() {
            return;
        }
        let flow = headers.flow(packet);
        if let Some(flows) = &mut self.flows
            && !flows.ours.admits(now, &flow)
        {
            flows.begun_there(now, flow, true);
        }
    }

    /// The verdict of the rules.
    fn decide(&mut self, now: Instant, headers: &Headers, packet: &[u8]) -> Result<(), DropReason> {
        if !destination_allowed(headers.dst) {
            return Err(DropReason::FilterDestination);
        }
        self.admit_local(headers.dst)?;
        if let Fragment::Later(offset) = headers.fragment {
            return if offset < FRAGMENT_OFFSET_MIN {
                Err(DropReason::FilterFragment)
            } else {
                Ok(())
            };
        }
        match headers.protocol {
            ICMP | ICMPV6 => self.decide_icmp(headers, packet),
            TCP => match headers.tcp(packet) {
                None => truncated(headers),
                Some(tcp) if tcp.flags & (TCP_SYN | TCP_ACK) != TCP_SYN => Ok(()),
                Some(tcp) if self.peerapi.port(headers.dst) == Some(tcp.dst_port.get()) => Ok(()),
                Some(tcp) => self.ask(headers, Ask::Port(TCP, tcp.dst_port.get())),
            },
            UDP | SCTP => {
                let header_len = if headers.protocol == UDP { 8 } else { 12 };
                if headers.transport(packet).len() < header_len {
                    return truncated(headers);
                }
                let flow = headers.flow(packet);
                let known = self.flows.as_mut();
                if known.is_some_and(|flows| flows.ours.admits(now, &flow)) {
                    return Ok(());
                }
                let answer = self.ask(headers, Ask::Port(headers.protocol, flow.dst_port));
                if let Some(flows) = &mut self.flows {
                    flows.begun_there(now, flow, answer.is_ok());
                }
                answer
            }
            TSMP => Err(DropReason::FilterConsumed),
            // Rules ask for protocols and ports; nobody gets past them by hiding these.
            _ if headers.is_hidden() => Err(match headers.fragment {
                Fragment::Whole => DropReason::FilterDenied,
                Fragment::First | Fragment::Later(_) => DropReason::FilterFragment,
            }),
            protocol => self.ask(headers, Ask::AllPorts(protocol)),
        }
    }

    fn decide_icmp(&mut self, headers: &Headers, packet: &[u8]) -> Result<(), DropReason> {
        let Some((kind, _)) = headers.icmp(packet) else {
            return truncated(headers);
        };
        let answer = match headers.version {
            // Echo reply, unreachable, time exceeded, parameter problem.
            IpVersion::V4 => matches!(kind, 0 | 3 | 11 | 12),
            // Echo reply, unreachable, packet too big, time exceeded, parameter problem.
            IpVersion::V6 => matches!(kind, 129 | 1..=4),
        };
        if answer {
            Ok(())
        } else {
            self.ask(headers, Ask::Any)
        }
    }

    fn ask(&mut self, headers: &Headers, ask: Ask) -> Result<(), DropReason> {
        let asked = (ask, headers.src, headers.dst);
        let before = &mut self.let_in_before[place_of(&asked)];
        if *before == Some(asked) {
            return Ok(());
        }
        if !self.rules.matches(ask, headers.src, headers.dst) {
            return Err(DropReason::FilterDenied);
        }
        *before = Some(asked);
        Ok(())
    }
}

/// Who looks for another thing with the same place makes the rules be asked, and no more.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "any bits of the hash do")]
fn place_of((ask, src, dst): &Asked) -> usize {
    let (protocol, dst_port) = match *ask {
        Ask::Any => (ICMP, 0),
        Ask::Port(protocol, port) => (protocol, port),
        Ask::AllPorts(protocol) => (protocol, 0),
    };
    let flow = Flow {
        src: *src,
        dst: *dst,
        protocol,
        src_port: 0,
        dst_port,
    };
    flow.hash() as usize % LET_IN_PLACES
}

/// A packet that ends inside its transport header; as a first fragment it is an attempt to hide the
/// header from the filter.
fn truncated(headers: &Headers) -> Result<(), DropReason> {
    Err(match headers.fragment {
        Fragment::Whole => DropReason::InnerMalformed,
        Fragment::First | Fragment::Later(_) => DropReason::FilterFragment,
    })
}

fn destination_allowed(dst: IpAddr) -> bool {
    match dst {
        IpAddr::V4(dst) => !dst.is_multicast() && (!dst.is_link_local() || dst == CLOUD_METADATA),
        IpAddr::V6(dst) => !dst.is_multicast() && !dst.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod flows_tests;
#[cfg(test)]
mod tests;
