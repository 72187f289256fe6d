//! nftables by its own netlink protocol, without the program of that name.
//!
//! Our table has an owner, this socket (kernels since 5.12): nobody else changes it, `nft flush ruleset` leaves it
//! alone, and it goes when the socket does, however the process ends. Where that is refused it is an ordinary
//! table, and whoever cleans up removes it by its name.
//!
//! Sources: `linux/netfilter/nf_tables.h`, `nfnetlink.h`; what nft(8) sends, by `nft --debug=netlink`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use ipnet::IpNet;
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::again::again;
use crate::hostnet::firewall::{
    Base, Chain, Do, Found, Gate, Hook, Manager, Match, Rule, comment, is_ours, table_of,
};

/// One answer, or a part of a long one.
const BUFFER_LEN: usize = 64 << 10;
/// The longest message that we send: some thousand rules.
const SEND_LEN: usize = 2 << 20;
/// For a kernel that does not answer at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Chains of the host that are looked at, at most.
const BASES_MAX: usize = 64;
/// Rules of such a chain that are looked at, at most.
const RULES_MAX: usize = 4096;
/// Messages taken at once from [`Watch`]; the rest waits a moment.
const READS_MAX: usize = 256;

/// `NFPROTO_INET`, `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const INET: u8 = 1;
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// `NFNL_SUBSYS_NFTABLES` in the upper half of a message's type.
const SUBSYSTEM: u16 = 10;
/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// `NFNL_MSG_BATCH_BEGIN` and `_END`.
const BATCH: [u16; 2] = [0x10, 0x11];
/// `NFT_MSG_*`.
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DELETE_RULE: u16 = 8;
const GET_GENERATION: u16 = 16;
/// `NLM_F_*`.
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
/// In an answer: what it tells of has changed meanwhile.
const TORN: u16 = 0x10;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
/// `NLMSG_ERROR` and `NLMSG_DONE`.
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `struct nlmsghdr` and `struct nfgenmsg`, in bytes.
const HEADERS_LEN: usize = 20;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// `NFT_TABLE_F_OWNER`.
const OWNER: u32 = 2;
/// `NFT_META_*`.
const META_IIF: u32 = 4;
const META_OIF: u32 = 5;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
/// `NFT_PAYLOAD_NETWORK_HEADER` and `NFT_PAYLOAD_TRANSPORT_HEADER`.
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
/// Verdicts.
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// `NFTNL_UDATA_RULE_COMMENT`.
const COMMENT: u8 = 0;

/// Attributes in the making: each a length and a kind in the host's byte order, and a value, up to four bytes.
#[derive(Clone, Default)]
struct Attrs(Vec<u8>);

impl Attrs {
    fn put(mut self, kind: u16, value: &[u8]) -> Self {
        let len = u16::try_from(value.len() + 4).expect("what we write is short");
        self.0.extend(len.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn number(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_be_bytes())
    }

    fn text(self, kind: u16, value: &str) -> Self {
        self.put(kind, format!("{value}\0").as_bytes())
    }

    fn nest(self, kind: u16, inner: &Self) -> Self {
        self.put(kind | NESTED, &inner.0)
    }
}

fn attrs() -> Attrs {
    Attrs::default()
}

/// An expression. All of ours compute in register 1.
fn expr(name: &str, data: &Attrs) -> Attrs {
    attrs().text(1, name).nest(2, data)
}

fn meta(key: u32) -> Attrs {
    expr("meta", &attrs().number(1, 1).number(2, key))
}

fn payload(base: u32, offset: u32, len: u32) -> Attrs {
    let data = attrs().number(1, 1).number(2, base);
    expr("payload", &data.number(3, offset).number(4, len))
}

/// The register, bit by bit, `and mask xor toggle`.
fn bits(mask: &[u8], toggle: &[u8]) -> Attrs {
    let len = u32::try_from(mask.len()).expect("a register is short");
    let data = attrs().number(1, 1).number(2, 1).number(3, len);
    let [mask, toggle] = [mask, toggle].map(|bytes| attrs().put(1, bytes));
    expr("bitwise", &data.nest(4, &mask).nest(5, &toggle))
}

/// Goes on only if the register is this value, or is not.
fn compare(equal: bool, value: &[u8]) -> Attrs {
    let data = attrs().number(1, 1).number(2, u32::from(!equal));
    expr("cmp", &data.nest(3, &attrs().put(1, value)))
}

fn verdict(code: u32) -> Attrs {
    let code = attrs().nest(2, &attrs().number(1, code));
    expr("immediate", &attrs().number(1, 0).nest(2, &code))
}

fn counter() -> Attrs {
    expr("counter", &attrs())
}

/// Looks into the address at such an offset of the IPv4 header, and of the IPv6 one.
fn address(net: &IpNet, offset: [u32; 2]) -> Vec<Attrs> {
    let (family, offset, len) = match net {
        IpNet::V4(_) => (IPV4, offset[0], 4),
        IpNet::V6(_) => (IPV6, offset[1], 16),
    };
    let mut list = vec![meta(META_NFPROTO), compare(true, &[family])];
    if net.prefix_len() == 0 {
        return list;
    }
    list.push(payload(NETWORK, offset, len));
    let (mask, network) = match net {
        IpNet::V4(net) => (
            net.netmask().octets().to_vec(),
            net.network().octets().to_vec(),
        ),
        IpNet::V6(net) => (
            net.netmask().octets().to_vec(),
            net.network().octets().to_vec(),
        ),
    };
    if net.prefix_len() < net.max_prefix_len() {
        list.push(bits(&mask, &vec![0; mask.len()]));
    }
    list.push(compare(true, &network));
    list
}

fn condition(when: Match) -> Vec<Attrs> {
    match when {
        Match::From(interface, is) => vec![meta(META_IIF), compare(is, &interface.to_ne_bytes())],
        Match::To(interface, is) => vec![meta(META_OIF), compare(is, &interface.to_ne_bytes())],
        Match::V6(v6) => {
            let family = if v6 { IPV6 } else { IPV4 };
            vec![meta(META_NFPROTO), compare(true, &[family])]
        }
        Match::Source(net) => address(&net, [12, 8]),
        Match::Destination(net) => address(&net, [16, 24]),
        // The flags SYN and RST, of which the first is set.
        Match::Syn => vec![
            meta(META_L4PROTO),
            compare(true, &[6]),
            payload(TRANSPORT, 13, 1),
            bits(&[6], &[0]),
            compare(true, &[2]),
        ],
    }
}

fn action(then: Do) -> Vec<Attrs> {
    match then {
        Do::Count => vec![counter()],
        // The segment size that the routes of both directions carry, in the wire's byte order, into TCP's second
        // option, from its third byte on; the kernel never raises it.
        Do::Clamp => vec![
            expr("rt", &attrs().number(1, 1).number(2, 3)),
            expr(
                "byteorder",
                &attrs()
                    .number(1, 1)
                    .number(2, 1)
                    .number(3, 1)
                    .number(4, 2)
                    .number(5, 2),
            ),
            expr(
                "exthdr",
                &attrs()
                    .put(2, &[2])
                    .number(3, 2)
                    .number(4, 2)
                    .number(6, 1)
                    .number(7, 1),
            ),
        ],
        Do::Masquerade => vec![expr("masq", &attrs())],
        Do::Drop => vec![verdict(DROP)],
        Do::Accept => vec![verdict(ACCEPT)],
    }
}

fn expressions(rule: &Rule) -> Vec<Attrs> {
    let when = rule.when.iter().flat_map(|when| condition(*when));
    let then = rule.then.iter().flat_map(|then| action(*then));
    when.chain(then).collect()
}

/// The conditions of a rule of ours among the host's, as iptables would write them, so that it can read them.
fn opening(gate: Gate, tun: &str) -> Vec<Attrs> {
    // All sixteen bytes: the whole name.
    let mut name = tun.as_bytes().to_vec();
    name.resize(16, 0);
    match gate {
        Gate::FromTunnel => vec![meta(META_IIFNAME), compare(true, &name)],
        Gate::ToTunnel => vec![meta(META_OIFNAME), compare(true, &name)],
        Gate::Port(port) => vec![
            meta(META_L4PROTO),
            compare(true, &[17]),
            payload(TRANSPORT, 2, 2),
            compare(true, &port.to_be_bytes()),
        ],
    }
}

/// What is done in one step, or not at all.
struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    fn new(sequence: u32) -> Self {
        Self::of(sequence, &attrs())
    }

    /// With attributes for the whole: the generation that it is for.
    fn of(sequence: u32, attrs: &Attrs) -> Self {
        let mut batch = Self {
            bytes: Vec::new(),
            sequence,
        };
        batch.message(BATCH[0], REQUEST, 0, SUBSYSTEM, attrs);
        batch
    }

    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, attrs: &Attrs) {
        let header = header(kind, flags, self.sequence, family, resource, attrs.0.len());
        self.sequence = self.sequence.wrapping_add(1);
        self.bytes.extend(header);
        self.bytes.extend(&attrs.0);
    }

    fn ask(&mut self, what: u16, flags: u16, family: u8, attrs: &Attrs) {
        self.message(SUBSYSTEM << 8 | what, REQUEST | flags, family, 0, attrs);
    }

    fn rule(&mut self, place: &Place<'_>, flags: u16, list: &[Attrs], comment: Option<&str>) {
        let list = list.iter().fold(attrs(), |all, one| all.nest(1, one));
        let mut rule = attrs()
            .text(1, place.table)
            .text(2, place.chain)
            .nest(4, &list);
        if let Some(comment) = comment {
            let len = u8::try_from(comment.len() + 1).expect("our comments are short");
            let mut data = vec![COMMENT, len];
            data.extend(comment.as_bytes());
            data.push(0);
            rule = rule.put(7, &data);
        }
        self.ask(NEW_RULE, CREATE | flags, place.family, &rule);
    }
}

fn header(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, len: usize) -> Vec<u8> {
    let len = u32::try_from(HEADERS_LEN + len).expect("what we write is short");
    let mut bytes = Vec::with_capacity(HEADERS_LEN);
    bytes.extend(len.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes
}

/// Where a chain is.
struct Place<'a> {
    family: u8,
    table: &'a str,
    chain: &'a str,
}

impl Base {
    fn place(&self) -> Place<'_> {
        Place {
            family: self.family,
            table: &self.table,
            chain: &self.chain,
        }
    }
}

/// nftables, as long as this lives.
pub(super) struct Nft {
    socket: Socket,
    sequence: u32,
    /// Our table's name.
    table: String,
    /// Whether it goes with the socket; not known before it is there.
    owned: Option<bool>,
    /// The chains that are in it.
    there: BTreeMap<&'static str, Chain>,
}

/// What does not stand as it should: a chain of ours, and why.
pub(super) type Refused = (&'static str, io::Error);

impl Nft {
    /// For the table that goes with a routing table.
    pub(super) fn open(table: u8) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket2::SockRef::from(&socket).set_read_timeout(Some(ANSWER_TIMEOUT))?;
        // A chain is one message. Without the right to more room there is no table of ours either.
        let _ = setsockopt(&socket, sockopt::SndBufForce, &SEND_LEN);
        Ok(Self {
            socket,
            sequence: 1,
            table: comment(table),
            owned: None,
            there: BTreeMap::new(),
        })
    }

    /// Makes our table hold these chains and no other. Each chain changes in one step, so nothing passes
    /// meanwhile that passes neither before nor after; what one chain needs and the kernel lacks is no loss for the
    /// others.
    ///
    /// # Errors
    /// There cannot be such a table at all.
    pub(super) fn set(&mut self, chains: &[Chain]) -> io::Result<Vec<Refused>> {
        if self.owned.is_none() {
            self.make_table()?;
        }
        let mut refused = Vec::new();
        for chain in chains {
            if self.there.get(chain.name) == Some(chain) {
                continue;
            }
            match self.set_chain(chain) {
                Ok(()) => _ = self.there.insert(chain.name, chain.clone()),
                Err(error) => refused.push((chain.name, error)),
            }
        }
        let gone: Vec<&'static str> = self.there.keys().copied().collect();
        for name in gone {
            if chains.iter().any(|chain| chain.name == name) {
                continue;
            }
            match self.delete_chain(name) {
                Ok(()) => _ = self.there.remove(name),
                Err(error) => refused.push((name, error)),
            }
        }
        Ok(refused)
    }

    fn make_table(&mut self) -> io::Result<()> {
        for owned in [true, false] {
            let mut batch = Batch::new(self.sequence);
            let flags = if owned { OWNER } else { 0 };
            let table = attrs().text(1, &self.table).number(2, flags);
            batch.ask(NEW_TABLE, CREATE | ACK, INET, &table);
            match self.commit(batch) {
                Ok(()) => {
                    self.owned = Some(owned);
                    break;
                }
                Err(error) if owned && error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn set_chain(&mut self, chain: &Chain) -> io::Result<()> {
        let table = self.table.clone();
        let place = Place {
            family: INET,
            table: &table,
            chain: chain.name,
        };
        let mut batch = Batch::new(self.sequence);
        let hook = match chain.hook {
            Hook::Input => 1,
            Hook::Forward => 2,
            Hook::Postrouting => 4,
        };
        // Two's complement, as the kernel reads it.
        let priority = u32::from_ne_bytes(chain.priority.to_ne_bytes());
        let hook = attrs().number(1, hook).number(2, priority);
        let kind = if chain.nat { "nat" } else { "filter" };
        let new = attrs().text(1, &table).text(3, chain.name).nest(4, &hook);
        batch.ask(
            NEW_CHAIN,
            CREATE,
            INET,
            &new.number(5, ACCEPT).text(7, kind),
        );
        let all = attrs().text(1, &table).text(2, chain.name);
        // Without a handle: whatever rules there are.
        batch.ask(DELETE_RULE, ACK, INET, &all);
        for rule in &chain.rules {
            batch.rule(&place, APPEND, &expressions(rule), None);
        }
        self.commit(batch)
    }

    fn delete_chain(&mut self, name: &str) -> io::Result<()> {
        let table = self.table.clone();
        let mut batch = Batch::new(self.sequence);
        batch.ask(DELETE_RULE, 0, INET, &attrs().text(1, &table).text(2, name));
        batch.ask(
            DELETE_CHAIN,
            ACK,
            INET,
            &attrs().text(1, &table).text(3, name),
        );
        self.commit(batch)
    }

    /// Whether our table is there still, if it is one that others could remove.
    pub(super) fn look(&mut self) {
        if self.owned != Some(false) {
            return;
        }
        let mut found = 0;
        let table = self.table.clone();
        let counted = self.chains(&mut |chain| found += usize::from(chain.table == table));
        if counted.is_ok() && found < self.there.len() {
            self.owned = None;
            self.there.clear();
        }
    }

    /// Removes our table.
    pub(super) fn remove(&mut self) -> io::Result<()> {
        if self.owned.is_none() {
            return Ok(());
        }
        self.owned = None;
        self.there.clear();
        let table = self.table.clone();
        self.delete_table(&table)
    }

    fn delete_table(&mut self, table: &str) -> io::Result<()> {
        let mut batch = Batch::new(self.sequence);
        batch.ask(DELETE_TABLE, ACK, INET, &attrs().text(1, table));
        self.commit(batch)
    }

    /// Packets that the rules of one of our chains have counted.
    pub(super) fn counted(&mut self, chain: &str) -> io::Result<u64> {
        let table = self.table.clone();
        let place = Place {
            family: INET,
            table: &table,
            chain,
        };
        again(|| {
            let mut packets = 0;
            self.rules(&place, &mut |message| {
                packets += parse_rule(message, "").packets
            })?;
            Ok(packets)
        })
    }

    /// The host's own chains that filter what it gets and what it forwards.
    pub(super) fn bases(&mut self, tun: &str) -> io::Result<Vec<Base>> {
        again(|| self.bases_now(tun))
    }

    fn bases_now(&mut self, tun: &str) -> io::Result<Vec<Base>> {
        let (mut found, mut firewalld, mut ufw) = (Vec::new(), false, false);
        let own = self.table.clone();
        self.chains(&mut |chain| {
            firewalld |= chain.table == "firewalld";
            ufw |= chain.chain.starts_with("ufw-");
            if let Some(hook) = chain.hook
                && chain.table != own
                && !chain.table.starts_with("ringtail-")
                && found.len() < BASES_MAX
            {
                found.push(Base {
                    family: chain.family,
                    manager: (chain.table == "firewalld").then_some(Manager::Firewalld),
                    table: chain.table,
                    chain: chain.chain,
                    hook,
                    policy_drops: chain.drops,
                    rules: Vec::new(),
                });
            }
        })?;
        for base in &mut found {
            // Of iptables' chains, which ufw has beside its own.
            if ufw && base.table == "filter" {
                base.manager = Some(Manager::Ufw);
            }
            let mut rules = Vec::new();
            self.rules(&base.place(), &mut |message| {
                if rules.len() < RULES_MAX {
                    rules.push(parse_rule(message, tun).found);
                }
            })?;
            base.rules = rules;
        }
        Ok(found)
    }

    /// Puts a rule of ours at the top of a chain of the host.
    pub(super) fn insert(
        &mut self,
        base: &Base,
        what: Gate,
        tun: &str,
        table: u8,
    ) -> io::Result<()> {
        let mut batch = Batch::new(self.sequence);
        let mut list = opening(what, tun);
        list.extend([counter(), verdict(ACCEPT)]);
        batch.rule(&base.place(), ACK, &list, Some(&what.comment(table)));
        self.commit(batch)
    }

    /// Removes a rule of ours from a chain of the host: what has its handle by now may be another's.
    pub(super) fn delete(&mut self, base: &Base, handle: u64, table: u8) -> io::Result<()> {
        again(|| {
            let generation = self.generation()?;
            let mut there = false;
            self.rules(&base.place(), &mut |message| {
                let found = parse_rule(message, "").found;
                let comment = found.comment.as_deref();
                let ours = comment.is_some_and(|comment| is_ours(comment, table));
                there |= found.handle == handle && ours;
            })?;
            if !there {
                return Ok(());
            }
            let mut batch = Batch::of(self.sequence, &attrs().number(1, generation));
            let rule = attrs().text(1, &base.table).text(2, &base.chain);
            let rule = rule.put(3, &handle.to_be_bytes());
            batch.ask(DELETE_RULE, ACK, base.family, &rule);
            self.commit(batch)
        })
    }

    fn commit(&mut self, mut batch: Batch) -> io::Result<()> {
        let first = self.sequence;
        batch.message(BATCH[1], REQUEST, 0, SUBSYSTEM, &attrs());
        self.sequence = batch.sequence;
        self.socket.send(&batch.bytes, 0)?;
        let ours =
            |sequence: u32| sequence.wrapping_sub(first) < batch.sequence.wrapping_sub(first);
        let mut buffer = Vec::with_capacity(BUFFER_LEN);
        // One acknowledgement is asked for, and what is wrong is told before it or in its place. The kernel has
        // answered when the sending returns.
        let (mut answered, mut first_error) = (false, None);
        loop {
            buffer.clear();
            let wait = if answered { nix::libc::MSG_DONTWAIT } else { 0 };
            match self.socket.recv(&mut buffer, wait) {
                Err(error) if answered && error.kind() == io::ErrorKind::WouldBlock => break,
                result => _ = result?,
            }
            each_message(&buffer, &mut |message| {
                if ours(message.sequence) && message.kind == ERROR {
                    answered = true;
                    if first_error.is_none() {
                        first_error = message.errno();
                    }
                }
            });
        }
        match first_error {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }

    /// Asks, and hands over every answer until the last.
    ///
    /// # Errors
    /// [`io::ErrorKind::Interrupted`] if the answers do not belong together.
    fn ask(
        &mut self,
        what: u16,
        flags: u16,
        family: u8,
        of: &Attrs,
        each: &mut dyn FnMut(&Message<'_>),
    ) -> io::Result<()> {
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(1);
        let kind = SUBSYSTEM << 8 | what;
        let mut bytes = header(kind, REQUEST | flags, sequence, family, 0, of.0.len());
        bytes.extend(&of.0);
        self.socket.send(&bytes, 0)?;
        let mut buffer = Vec::with_capacity(BUFFER_LEN);
        let (mut end, mut torn) = (None, false);
        while end.is_none() {
            buffer.clear();
            self.socket.recv(&mut buffer, 0)?;
            each_message(&buffer, &mut |message| {
                if message.sequence != sequence || end.is_some() {
                    return;
                }
                torn |= message.is_torn();
                match message.kind {
                    DONE | ERROR => end = Some(message.errno()),
                    _ => each(message),
                }
            });
        }
        match end.flatten() {
            None if torn => Err(io::ErrorKind::Interrupted.into()),
            None => Ok(()),
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Which state of all rules it is: any change makes another.
    fn generation(&mut self) -> io::Result<u32> {
        let mut found = None;
        self.ask(GET_GENERATION, ACK, 0, &attrs(), &mut |message| {
            found = number(message.attribute(1));
        })?;
        found.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn chains(&mut self, each: &mut dyn FnMut(FoundChain)) -> io::Result<()> {
        self.ask(GET_CHAIN, DUMP, 0, &attrs(), &mut |message| {
            if let Some(chain) = parse_chain(message) {
                each(chain);
            }
        })
    }

    fn rules(&mut self, place: &Place<'_>, each: &mut dyn FnMut(&Message<'_>)) -> io::Result<()> {
        let of = attrs().text(1, place.table).text(2, place.chain);
        let result = self.ask(GET_RULE, DUMP, place.family, &of, &mut |message| {
            if message.family == place.family
                && text(message.attribute(1)) == place.table
                && text(message.attribute(2)) == place.chain
            {
                each(message);
            }
        });
        match result {
            // It went meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

/// The routing tables of ringtails, dead or alive, that have something in nftables: a table of theirs, or rules in
/// the host's chains. None where it cannot be looked for.
pub(super) fn with_traces() -> BTreeSet<u8> {
    let found = Nft::open(0).and_then(|mut nft| {
        let mut found = BTreeSet::new();
        again(|| {
            nft.chains(&mut |chain| {
                found.extend(table_of(&chain.table).filter(|_| chain.family == INET));
            })
        })?;
        for base in nft.bases("")? {
            let comments = base.rules.iter().filter_map(|rule| rule.comment.as_deref());
            found.extend(comments.filter_map(table_of));
        }
        Ok(found)
    });
    found
        .inspect_err(|error| tracing::debug!(%error, "nftables cannot be looked at"))
        .unwrap_or_default()
}

/// Removes what a run that is dead left: our table, if it has no owner, and our rules in the host's chains.
///
/// # Errors
/// Something of ours is there and stays.
pub(super) fn remove_left(table: u8) -> io::Result<()> {
    // Where it cannot be looked for, we cannot have left anything.
    let Ok(mut nft) = Nft::open(table) else {
        return Ok(());
    };
    let mut ours = false;
    let name = nft.table.clone();
    let find = &mut |chain: FoundChain| ours |= chain.table == name && chain.family == INET;
    match again(|| nft.chains(&mut *find)) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
        Err(_) => return Ok(()),
        Ok(()) => {}
    }
    // One with an owner goes with its process, which may be about to end only.
    if ours
        && let Err(error) = nft.delete_table(&name)
        && error.raw_os_error() != Some(nix::libc::EPERM)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    for base in nft.bases("")? {
        for rule in &base.rules {
            if rule
                .comment
                .as_deref()
                .is_some_and(|found| is_ours(found, table))
            {
                nft.delete(&base, rule.handle, table)?;
            }
        }
    }
    Ok(())
}

/// A chain as it is there.
struct FoundChain {
    family: u8,
    table: String,
    chain: String,
    /// Where packets come by it, if it is a base chain that filters what is sent to the host or forwarded.
    hook: Option<Hook>,
    drops: bool,
}

fn parse_chain(message: &Message<'_>) -> Option<FoundChain> {
    let family = message.family;
    if ![INET, IPV4, IPV6].contains(&family) {
        return None;
    }
    let hook = message.attribute(4).unwrap_or_default();
    let hook = match (number(find(hook, 1)), text(message.attribute(7))) {
        (Some(1), "filter") => Some(Hook::Input),
        (Some(2), "filter") => Some(Hook::Forward),
        _ => None,
    };
    Some(FoundChain {
        family,
        table: text(message.attribute(1)).to_owned(),
        chain: text(message.attribute(3)).to_owned(),
        hook,
        drops: hook.is_some() && number(message.attribute(5)) == Some(DROP),
    })
}

struct FoundRule {
    found: Found,
    /// What its counters have.
    packets: u64,
}

fn parse_rule(message: &Message<'_>, tun: &str) -> FoundRule {
    let mut rule = FoundRule {
        found: Found {
            handle: wide(message.attribute(3)).unwrap_or_default(),
            comment: user_comment(message.attribute(7).unwrap_or_default()),
            ..Found::default()
        },
        packets: 0,
    };
    // What decides to which packets it applies.
    let mut conditions = Vec::new();
    for (_, one) in pieces(message.attribute(4).unwrap_or_default()) {
        let data = find(one, 2).unwrap_or_default();
        let verdict = find(data, 2).and_then(|data| find(data, 2));
        let verdict = verdict.and_then(|verdict| number(find(verdict, 1)));
        // iptables has targets of its own in a wrapping.
        let target = text(find(data, 1));
        match text(find(one, 1)) {
            "counter" => {
                let packets = wide(find(data, 2)).unwrap_or_default();
                rule.packets = rule.packets.saturating_add(packets);
            }
            "immediate" if verdict == Some(ACCEPT) => {
                rule.found.accepts = accepted(&conditions, tun);
            }
            "immediate" if verdict == Some(DROP) => rule.found.drops = conditions.is_empty(),
            "reject" => rule.found.drops = conditions.is_empty(),
            "target" if ["DROP", "REJECT"].contains(&target) => {
                rule.found.drops = conditions.is_empty();
            }
            "log" => {}
            _ => conditions.push(one),
        }
    }
    rule
}

/// What of ours a rule with these conditions accepts: that, if it has just the conditions of ours.
fn accepted(conditions: &[&[u8]], tun: &str) -> Option<Gate> {
    let port = conditions.last().and_then(|last| {
        let value = find(find(find(last, 2)?, 3)?, 1)?;
        Some(Gate::Port(u16::from_be_bytes(*value.first_chunk()?)))
    });
    let gates = [Gate::FromTunnel, Gate::ToTunnel].into_iter().chain(port);
    let same = |own: &[Attrs]| {
        own.len() == conditions.len()
            && own
                .iter()
                .zip(conditions)
                .all(|(own, found)| same(&own.0, found))
    };
    gates.into_iter().find(|gate| same(&opening(*gate, tun)))
}

/// Whether two expressions are the same, as far as ours goes: which register is used does not matter, nor with how many
/// zeros a name ends.
fn same(own: &[u8], found: &[u8]) -> bool {
    let value = |data| {
        let bytes: &[u8] = find(data, 1).unwrap_or_default();
        let end = bytes.iter().rposition(|byte| *byte != 0);
        bytes[..end.map_or(0, |end| end + 1)].to_vec()
    };
    text(find(own, 1)) == text(find(found, 1))
        && pieces(find(own, 2).unwrap_or_default()).all(|(kind, ours)| {
            let theirs = find(found, 2).and_then(|data| find(data, kind));
            let theirs = theirs.unwrap_or_default();
            let name = kind == 3 && text(find(own, 1)) == "cmp";
            kind == 1 || theirs == ours || name && value(theirs) == value(ours)
        })
}

/// The comment among a rule's user data: each piece a kind, a length, and so many bytes.
fn user_comment(mut data: &[u8]) -> Option<String> {
    while let [kind, len, rest @ ..] = data {
        let (value, rest) = rest.split_at_checked(usize::from(*len))?;
        if *kind == COMMENT {
            return Some(text(Some(value)).to_owned());
        }
        data = rest;
    }
    None
}

/// A message of the kernel.
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    /// Behind `struct nlmsghdr`.
    body: &'a [u8],
}

impl Message<'_> {
    /// Whether what is dumped was changed meanwhile.
    fn is_torn(&self) -> bool {
        self.kind != ERROR && self.flags & TORN != 0
    }

    /// The error in an answer, if it is one; zero is none.
    fn errno(&self) -> Option<i32> {
        let code = i32::from_ne_bytes(*self.body.first_chunk()?);
        (code != 0).then_some(code.wrapping_neg())
    }

    /// An attribute behind `struct nfgenmsg`.
    fn attribute(&self, kind: u16) -> Option<&[u8]> {
        find(self.body.get(4..)?, kind)
    }
}

fn each_message(bytes: &[u8], each: &mut dyn FnMut(&Message<'_>)) {
    let mut rest = bytes;
    while let Some((head, _)) = rest.split_at_checked(16) {
        let word = |at: usize| {
            head.get(at..)?
                .first_chunk::<4>()
                .copied()
                .map(u32::from_ne_bytes)
        };
        let half = |at: usize| {
            head.get(at..)?
                .first_chunk::<2>()
                .copied()
                .map(u16::from_ne_bytes)
        };
        let (Some(len), Some(kind), Some(flags), Some(sequence)) =
            (word(0), half(4), half(6), word(8))
        else {
            break;
        };
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let Some(body) = rest.get(16..len) else {
            break;
        };
        each(&Message {
            kind,
            flags,
            sequence,
            family: body.first().copied().unwrap_or_default(),
            body,
        });
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
}

/// The attributes in there: kind and value.
fn pieces(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let value = rest.get(4..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        // Without the flags in its upper bits.
        Some((kind & 0x3fff, value))
    })
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    pieces(bytes)
        .find(|(found, _)| *found == kind)
        .map(|(_, value)| value)
}

fn number(value: Option<&[u8]>) -> Option<u32> {
    value?.first_chunk().copied().map(u32::from_be_bytes)
}

fn wide(value: Option<&[u8]>) -> Option<u64> {
    value?.first_chunk().copied().map(u64::from_be_bytes)
}

fn text(value: Option<&[u8]>) -> &str {
    let bytes = value.unwrap_or_default();
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).unwrap_or_default()
}

/// Says when somebody changed the rules of nftables.
pub(super) struct Watch(Socket);

impl Watch {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.add_membership(GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Takes what has come; what it says does not matter.
    pub(super) fn take(&self) {
        let mut buffer = Vec::with_capacity(BUFFER_LEN);
        for _ in 0..READS_MAX {
            buffer.clear();
            match self.0.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {}
                Err(_) => break,
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message as the kernel would hand out the rule that a batch makes.
    fn read_back(list: &[Attrs], comment: Option<&str>) -> Found {
        let place = Place {
            family: IPV4,
            table: "filter",
            chain: "FORWARD",
        };
        let mut batch = Batch::new(7);
        batch.rule(&place, ACK, list, comment);
        let mut found = Vec::new();
        each_message(&batch.bytes, &mut |message| {
            if message.kind == SUBSYSTEM << 8 | NEW_RULE {
                assert_eq!((message.sequence, message.family), (8, IPV4));
                assert_eq!(text(message.attribute(2)), "FORWARD");
                found.push(parse_rule(message, "ringtail0").found);
            }
        });
        assert_eq!(found.len(), 1);
        found.remove(0)
    }

    #[test]
    fn a_rule_among_the_hosts_is_read_back_as_it_was_written() {
        for gate in [
            Gate::FromTunnel,
            Gate::ToTunnel,
            Gate::Port(41_641),
            Gate::Port(512),
        ] {
            let mut list = opening(gate, "ringtail0");
            list.extend([counter(), verdict(ACCEPT)]);
            let comment = gate.comment(52);
            let found = read_back(&list, Some(&comment));
            assert_eq!(found.accepts, Some(gate));
            assert_eq!(found.comment.as_deref(), Some(comment.as_str()));
            assert!(!found.drops && is_ours(&comment, 52));
            // One condition more, and it is another rule.
            list.insert(0, payload(NETWORK, 12, 4));
            assert_eq!(read_back(&list, None).accepts, None);
            let other = [opening(gate, "ringtail1"), vec![verdict(ACCEPT)]].concat();
            let same_port = matches!(gate, Gate::Port(_));
            assert_eq!(read_back(&other, None).accepts.is_some(), same_port);
        }
        // As iptables writes a name.
        let short = [
            meta(META_IIFNAME),
            compare(true, b"ringtail0\0"),
            verdict(ACCEPT),
        ];
        assert_eq!(read_back(&short, None).accepts, Some(Gate::FromTunnel));
        let no = [
            meta(META_IIFNAME),
            compare(false, b"ringtail0\0"),
            verdict(ACCEPT),
        ];
        assert_eq!(read_back(&no, None).accepts, None);
    }

    #[test]
    fn a_rule_that_drops_everything_is_told_from_one_that_has_conditions() {
        let reject = expr("reject", &attrs().number(1, 0));
        let wrapped = expr("target", &attrs().text(1, "REJECT"));
        for last in [verdict(DROP), reject, wrapped] {
            assert!(read_back(&[counter(), last.clone()], None).drops);
            let some = [meta(META_L4PROTO), compare(true, &[6]), counter(), last];
            assert!(!read_back(&some, None).drops);
        }
        assert!(!read_back(&[counter(), verdict(ACCEPT)], None).drops);
        assert!(!read_back(&[counter()], None).drops);
    }

    #[test]
    fn expressions_are_written_as_nft_writes_them() {
        // `ip saddr 100.64.0.0/10 drop` behind the family, by `nft --debug=netlink`.
        let net = "100.64.0.0/10".parse().unwrap();
        let list = address(&net, [12, 8]);
        let hex = |attrs: &Attrs| {
            attrs
                .0
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        assert_eq!(list.len(), 5);
        assert_eq!(
            hex(&list[2]),
            "0c0001007061796c6f61640024000280\
             0800010000000001080002000000000108000300\
             0000000c0800040000000004"
        );
        assert_eq!(
            hex(&list[4]),
            "08000100636d700020000280080001000000000108000200000000000c000380\
             0800010064400000"
        );
        let all = "::/0".parse().unwrap();
        assert_eq!(address(&all, [12, 8]).len(), 2, "the family says it");
        let one = "fd7a::1/128".parse().unwrap();
        assert_eq!(address(&one, [12, 8]).len(), 4, "no bits to leave out");
    }

    #[test]
    fn what_cannot_be_read_is_no_message() {
        for bytes in [&[][..], &[0; 16], &[255; 40], &[4, 0, 0, 0]] {
            each_message(bytes, &mut |_| {});
            assert_eq!(find(bytes, 9), None);
            assert_eq!(
                user_comment(bytes.get(2..).unwrap_or_default())
                    .as_deref()
                    .unwrap_or(""),
                ""
            );
        }
        assert_eq!(pieces(&[3, 0, 1, 0]).count(), 0);
    }

    #[test]
    fn an_answer_says_that_it_is_torn() {
        // The kernel says so in any message of the answer, also in the last; an error is no such answer.
        for (kind, flags, torn) in [
            (DONE, TORN | 2, true),
            (DONE, 2, false),
            (ERROR, TORN, false),
        ] {
            let bytes = header(kind, flags, 7, 0, 0, 0);
            let mut seen = Vec::new();
            each_message(&bytes, &mut |message| seen.push(message.is_torn()));
            assert_eq!(seen, [torn]);
        }
    }
}
