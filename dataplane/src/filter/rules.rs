#![forbid(unsafe_code)]
//! Packet filter rules in the form the filter asks them.
//!
//! Sources are found by longest prefix: every distinct source prefix of a family is a node with the
//! rules that name it, linked to the next shorter prefix that covers it. A lookup walks from the
//! longest match to the root, so it sees every rule whose sources cover the address and no other.
//!
//! What a node's rules let through stands in a [`Table`] by destination, which all nodes with the same
//! rules share, so that what a packet costs does not grow with their number. Tables can be larger
//! than the rules they are made of: where they would hold more than [`TABLE_PARTS_MAX`], the nodes that
//! are left ask their rules one by one ([`CompiledRules::without_table`] says how many).
//!
//! Compile on the control side and share the result by `Arc`.

use std::collections::HashMap;
use std::net::IpAddr;

use super::table::Table;
use crate::route::{PrefixMap, covers, masked};
use crate::types::{Prefix, Rules};

/// Parts ([`Table::parts`]) that all tables of a filter hold at most.
pub(crate) const TABLE_PARTS_MAX: usize = 1 << 17;
/// Destinations, as the rules write them, that are made into tables at most, whether these fit or not: it
/// bounds the caller's time.
const WRITTEN_MAX: usize = 8 * TABLE_PARTS_MAX;

/// Compiled [`Rules`]. Immutable.
#[derive(Clone, Debug)]
pub struct CompiledRules {
    allow_all: bool,
    local: Option<PrefixMap<()>>,
    sources: PrefixMap<u32>,
    nodes: Vec<Node>,
    tables: Vec<Table>,
    /// All of them while a node has no table, else none.
    rules: Vec<CompiledRule>,
    without_table: usize,
}

/// One source prefix.
#[derive(Clone, Debug)]
struct Node {
    lets_in: LetsIn,
    /// The node of the next shorter prefix that covers this one.
    parent: Option<u32>,
}

/// What the rules that name a source let through.
#[derive(Clone, Debug)]
enum LetsIn {
    /// By this table.
    Table(u32),
    /// Each of these rules is to be asked.
    Rules(Vec<u32>),
}

#[derive(Clone, Debug)]
pub(super) struct CompiledRule {
    /// One bit per protocol number.
    pub(super) protocols: Protocols,
    pub(super) destinations: Vec<(Prefix, u16, u16)>,
}

/// A set of protocols: one bit for each number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Protocols([u64; 4]);

impl Protocols {
    fn of(protocols: &[u8]) -> Protocols {
        let mut bits = [0; 4];
        for protocol in protocols {
            bits[usize::from(protocol >> 6)] |= 1 << (protocol & 63);
        }
        Protocols(bits)
    }

    #[inline]
    pub(super) fn contains(&self, protocol: u8) -> bool {
        self.0[usize::from(protocol >> 6)] & (1 << (protocol & 63)) != 0
    }

    pub(super) fn add(&mut self, others: &Protocols) {
        for (bits, others) in self.0.iter_mut().zip(others.0) {
            *bits |= others;
        }
    }
}

/// What a packet asks of the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Any rule between the addresses, whatever its protocols and ports (ICMP).
    Any,
    /// A rule with this protocol (TCP, UDP or SCTP) and destination port.
    Port(u8, u16),
    /// A rule with this protocol and all ports: protocols without ports.
    AllPorts(u8),
}

impl CompiledRules {
    /// Every authenticated peer may send anything its allowed IPs cover.
    #[cfg(feature = "internals")]
    pub fn allow_all() -> CompiledRules {
        CompiledRules::compile(&Rules::AllowAll, None)
    }

    /// Nothing is ours and nobody may send anything: what holds until somebody says what may.
    pub fn closed() -> CompiledRules {
        CompiledRules::compile(&Rules::default(), Some(&[]))
    }

    /// Compiles rules. `local`, if given, are our own addresses and the routes we advertise:
    /// packets to others are refused, whatever the rules.
    pub fn compile(rules: &Rules, local: Option<&[Prefix]>) -> CompiledRules {
        let mut compiled = CompiledRules {
            allow_all: *rules == Rules::AllowAll,
            local: local.map(|prefixes| {
                let mut map = PrefixMap::default();
                for prefix in prefixes {
                    map.insert(*prefix, ());
                }
                map
            }),
            sources: PrefixMap::default(),
            nodes: Vec::new(),
            tables: Vec::new(),
            rules: Vec::new(),
            without_table: 0,
        };
        let Rules::List(list) = rules else {
            return compiled;
        };
        let mut named: Vec<(Prefix, u32)> = Vec::new();
        for rule in list {
            let index = index_u32(compiled.rules.len());
            compiled.rules.push(CompiledRule {
                protocols: Protocols::of(&rule.protocols),
                destinations: rule
                    .destinations
                    .iter()
                    .map(|(prefix, first, last)| (masked(*prefix), *first, *last))
                    .collect(),
            });
            named.extend(rule.sources.iter().map(|source| (masked(*source), index)));
        }
        // Shorter prefixes first, so that a node's parent is in the map before it.
        named.sort_unstable_by_key(|(prefix, index)| (prefix.bits, prefix.addr, *index));
        named.dedup();
        for (prefix, rule) in named {
            compiled.add_source(prefix, rule);
        }
        compiled.make_tables();
        compiled
    }

    /// Whether everything is allowed.
    #[inline]
    pub fn is_allow_all(&self) -> bool {
        self.allow_all
    }

    /// Whether it was said what is ours.
    #[inline]
    pub fn knows_local(&self) -> bool {
        self.local.is_some()
    }

    /// Sources whose rules are asked one by one, since there is no room for what they let through.
    pub(crate) fn without_table(&self) -> usize {
        self.without_table
    }

    /// Whether flows are remembered under these rules: where they are a list, and where one may follow.
    #[inline]
    pub(super) fn remembers(&self) -> bool {
        !self.allow_all || self.knows_local()
    }

    /// Whether a destination is ours or one we route for; true if that is not known.
    #[inline]
    pub fn is_local(&self, dst: IpAddr) -> bool {
        self.local
            .as_ref()
            .is_none_or(|local| local.lookup(dst).is_some())
    }

    /// Whether any rule lets such a packet in.
    pub fn matches(&self, ask: Ask, src: IpAddr, dst: IpAddr) -> bool {
        let mut at = self.sources.lookup(src);
        while let Some(index) = at {
            let node = &self.nodes[index as usize];
            let lets_in = match &node.lets_in {
                LetsIn::Table(table) => self.tables[*table as usize].matches(ask, dst),
                LetsIn::Rules(rules) => rules
                    .iter()
                    .any(|rule| self.rules[*rule as usize].matches(ask, dst)),
            };
            if lets_in {
                return true;
            }
            at = node.parent;
        }
        false
    }

    fn add_source(&mut self, prefix: Prefix, rule: u32) {
        let node = match self.sources.get(prefix) {
            Some(node) => node,
            None => {
                let node = index_u32(self.nodes.len());
                // Only shorter or equally long prefixes are in the map, and equal ones are not.
                let parent = self.sources.lookup(prefix.addr);
                self.nodes.push(Node {
                    lets_in: LetsIn::Rules(Vec::new()),
                    parent,
                });
                self.sources.insert(prefix, node);
                node
            }
        };
        if let LetsIn::Rules(rules) = &mut self.nodes[node as usize].lets_in {
            rules.push(rule);
        }
    }

    /// Puts tables in the place of rules, one for all nodes with the same, while there is room.
    fn make_tables(&mut self) {
        let mut made: HashMap<Vec<u32>, u32> = HashMap::new();
        let (mut room, mut writing) = (TABLE_PARTS_MAX, WRITTEN_MAX);
        for node in &mut self.nodes {
            let LetsIn::Rules(rules) = &mut node.lets_in else {
                continue;
            };
            let table = match made.get(rules.as_slice()) {
                Some(table) => *table,
                None => {
                    let of = rules.iter().map(|rule| &self.rules[*rule as usize]);
                    let Some(table) = table_within(&mut room, &mut writing, of) else {
                        self.without_table += 1;
                        continue;
                    };
                    self.tables.push(table);
                    let table = index_u32(self.tables.len() - 1);
                    made.insert(std::mem::take(rules), table);
                    table
                }
            };
            node.lets_in = LetsIn::Table(table);
        }
        if self.without_table == 0 {
            self.rules = Vec::new();
        }
    }
}

/// The table of these rules, if there is room for it, and for the destinations they write.
fn table_within<'a>(
    room: &mut usize,
    writing: &mut usize,
    rules: impl Iterator<Item = &'a CompiledRule> + Clone,
) -> Option<Table> {
    let written = rules.clone().map(|rule| rule.destinations.len()).sum();
    *writing = writing.checked_sub(written)?;
    let table = Table::new(rules);
    *room = room.checked_sub(table.parts())?;
    Some(table)
}

impl CompiledRule {
    pub(super) fn matches(&self, ask: Ask, dst: IpAddr) -> bool {
        let port_fits = |first: u16, last: u16| match ask {
            Ask::Any => true,
            Ask::Port(_, port) => first <= port && port <= last,
            Ask::AllPorts(_) => first == 0 && last == u16::MAX,
        };
        let protocol_fits = match ask {
            Ask::Any => true,
            Ask::Port(protocol, _) | Ask::AllPorts(protocol) => self.protocols.contains(protocol),
        };
        protocol_fits
            && self
                .destinations
                .iter()
                .any(|(prefix, first, last)| port_fits(*first, *last) && covers(prefix, dst))
    }
}

pub(super) fn index_u32(index: usize) -> u32 {
    u32::try_from(index).expect("a filter of four billion rules does not fit into memory")
}

#[cfg(test)]
impl CompiledRules {
    /// Of each node, whether it has a table.
    pub(super) fn tables(&self) -> Vec<bool> {
        let nodes = self.nodes.iter();
        nodes
            .map(|node| matches!(node.lets_in, LetsIn::Table(_)))
            .collect()
    }
}
