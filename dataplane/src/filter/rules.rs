#![forbid(unsafe_code)]
//! Packet filter rules in the form the filter asks them.
//!
//! Sources are found by longest prefix: every distinct source prefix of a family is a node with the
//! rules that name it, linked to the next shorter prefix that covers it. A lookup walks from the
//! longest match to the root, so it sees every rule whose sources cover the address and no other.
//! Compile on the control side and share the result by `Arc`.

use std::net::IpAddr;

use crate::route::{PrefixMap, covers, masked};
use crate::types::{Prefix, Rules};

/// Compiled [`Rules`]. Immutable.
#[derive(Clone, Debug)]
pub struct CompiledRules {
    allow_all: bool,
    local: Option<PrefixMap<()>>,
    sources: PrefixMap<u32>,
    nodes: Vec<Node>,
    rules: Vec<CompiledRule>,
}

/// The rules that name one source prefix.
#[derive(Clone, Debug)]
struct Node {
    rules: Vec<u32>,
    /// The node of the next shorter prefix that covers this one.
    parent: Option<u32>,
}

#[derive(Clone, Debug)]
struct CompiledRule {
    /// One bit per protocol number.
    protocols: [u64; 4],
    destinations: Vec<(Prefix, u16, u16)>,
}

/// What a packet asks of the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Any rule between the addresses, whatever its protocols and ports (ICMP).
    Any,
    /// A rule with this protocol and destination port.
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
            rules: Vec::new(),
        };
        let Rules::List(list) = rules else {
            return compiled;
        };
        let mut named: Vec<(Prefix, u32)> = Vec::new();
        for rule in list {
            let index = index_u32(compiled.rules.len());
            compiled.rules.push(CompiledRule {
                protocols: protocol_bits(&rule.protocols),
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
            if node
                .rules
                .iter()
                .any(|rule| self.rules[*rule as usize].matches(ask, dst))
            {
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
                    rules: Vec::new(),
                    parent,
                });
                self.sources.insert(prefix, node);
                node
            }
        };
        self.nodes[node as usize].rules.push(rule);
    }
}

impl CompiledRule {
    fn matches(&self, ask: Ask, dst: IpAddr) -> bool {
        let port_fits = |first: u16, last: u16| match ask {
            Ask::Any => true,
            Ask::Port(_, port) => first <= port && port <= last,
            Ask::AllPorts(_) => first == 0 && last == u16::MAX,
        };
        let protocol_fits = match ask {
            Ask::Any => true,
            Ask::Port(protocol, _) | Ask::AllPorts(protocol) => {
                self.protocols[usize::from(protocol >> 6)] & (1 << (protocol & 63)) != 0
            }
        };
        protocol_fits
            && self
                .destinations
                .iter()
                .any(|(prefix, first, last)| port_fits(*first, *last) && covers(prefix, dst))
    }
}

fn protocol_bits(protocols: &[u8]) -> [u64; 4] {
    let mut bits = [0; 4];
    for protocol in protocols {
        bits[usize::from(protocol >> 6)] |= 1 << (protocol & 63);
    }
    bits
}

fn index_u32(index: usize) -> u32 {
    u32::try_from(index).expect("a filter of four billion rules does not fit into memory")
}
