//! The policy file: who may reach what, in the field's own format, HuJSON: JSON with comments and
//! trailing commas.
//!
//! ```text
//! text -> parse -> Policy -> compile(nodes) -> Compiled: per node its filter, its peers, their routes
//! ```
//!
//! It knows `groups`, `hosts`, `tagOwners`, `acls` and `autoApprovers`, and means by them what
//! Headscale does. What else there may be in such a file is refused with its place, never passed
//! over: a rule that is not understood might have been one that denies. So are rules that cannot be
//! meant: an unknown group, host or tag, a port where there are none, a chain of tags that owns itself.
//! A user nobody has added yet is no error, since nodes join later, and stands for nobody.
//!
//! Rooms: `parse` reads the text, `compile` turns a policy and nodes into filters, `ranges` are sets of
//! addresses.

mod compile;
mod parse;
mod ranges;

pub use self::compile::{Compiled, PolicyNode};

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::netmap::wire::PortRange;

/// Longest file, in bytes.
pub const POLICY_LEN_MAX: usize = 1 << 20;

/// Rules of one policy at most.
pub const RULES_MAX: usize = 10_000;

/// Sources, destinations and ports of all rules together, at most; as many parts may the filter of the
/// whole network have when it is compiled.
pub const PARTS_MAX: usize = 100_000;

/// Where a file is wrong, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct PolicyError {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// For people.
    pub message: String,
}

/// Whom something is given to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    /// By name.
    User(String),
    /// `group:…`
    Group(String),
    /// `tag:…`
    Tag(String),
}

/// Whom or what a rule names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Alias {
    Any,
    Of(Owner),
    Prefix(IpNet),
    /// `autogroup:member`: nodes without tags.
    Member,
    /// `autogroup:tagged`.
    Tagged,
    /// `autogroup:internet`, as a destination.
    Internet,
    /// `autogroup:self`, as a destination: the source's own other nodes.
    Own,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    /// Empty: TCP, UDP and ICMP.
    protocol: Option<u8>,
    sources: Vec<Alias>,
    destinations: Vec<(Alias, Vec<PortRange>)>,
}

/// A policy that makes sense.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Names of users, by group.
    groups: BTreeMap<String, BTreeSet<String>>,
    tag_owners: BTreeMap<String, Vec<Owner>>,
    /// None: all may do everything.
    rules: Option<Vec<Rule>>,
    /// Who approves its own routes, within which prefix.
    routes: Vec<(IpNet, Vec<Owner>)>,
    exit: Vec<Owner>,
}

impl Policy {
    /// Reads a policy file.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        parse::parse(text)
    }

    /// How many rules it has.
    pub fn rules(&self) -> usize {
        self.rules.as_ref().map_or(0, Vec::len)
    }

    /// Whether a user may give its nodes this tag.
    pub fn may_tag(&self, user: &str, tag: &str) -> bool {
        let mut seen = BTreeSet::new();
        let mut ask = vec![tag];
        while let Some(tag) = ask.pop() {
            // Chains end: the parser refuses circles.
            if !seen.insert(tag) {
                continue;
            }
            for owner in self.tag_owners.get(tag).into_iter().flatten() {
                match owner {
                    Owner::User(name) if name == user => return true,
                    Owner::Group(group) if self.has_member(group, user) => return true,
                    Owner::Tag(other) => ask.push(other),
                    Owner::User(_) | Owner::Group(_) => {}
                }
            }
        }
        false
    }

    /// Whether a route counts for a node as soon as that announces it.
    pub fn approves(&self, user: &str, tags: &[String], route: &IpNet) -> bool {
        let is_one = |owner: &Owner| self.is_owner(owner, user, tags);
        if route.prefix_len() == 0 {
            return self.exit.iter().any(is_one);
        }
        let mut within = self.routes.iter().filter(|(net, _)| net.contains(route));
        within.any(|(_, owners)| owners.iter().any(is_one))
    }

    /// Users it names.
    pub fn users(&self) -> BTreeSet<&str> {
        let rules = self.rules.iter().flatten();
        let aliases = rules.flat_map(|rule| {
            let destinations = rule.destinations.iter().map(|(alias, _)| alias);
            rule.sources.iter().chain(destinations)
        });
        let owners = aliases.filter_map(|alias| match alias {
            Alias::Of(owner) => Some(owner),
            Alias::Any
            | Alias::Prefix(_)
            | Alias::Member
            | Alias::Tagged
            | Alias::Internet
            | Alias::Own => None,
        });
        let owners = owners.chain(self.tag_owners.values().flatten());
        let owners = owners.chain(self.routes.iter().flat_map(|(_, owners)| owners));
        let users = owners.chain(&self.exit).filter_map(|owner| match owner {
            Owner::User(name) => Some(name.as_str()),
            Owner::Group(_) | Owner::Tag(_) => None,
        });
        let members = self.groups.values().flatten().map(String::as_str);
        users.chain(members).collect()
    }

    fn has_member(&self, group: &str, user: &str) -> bool {
        let members = self.groups.get(group);
        members.is_some_and(|members| members.contains(user))
    }

    /// Whether a node is one of them: one with tags is nobody's but its tags'.
    fn is_owner(&self, owner: &Owner, user: &str, tags: &[String]) -> bool {
        match owner {
            Owner::User(name) => tags.is_empty() && name == user,
            Owner::Group(group) => tags.is_empty() && self.has_member(group, user),
            Owner::Tag(tag) => tags.contains(tag),
        }
    }
}

/// Whether this can be a tag: `tag:`, a letter, and letters, digits, `-` and `.`.
pub fn is_tag(text: &str) -> bool {
    let Some(name) = text.strip_prefix("tag:") else {
        return false;
    };
    let fits = |letter: char| letter.is_ascii_alphanumeric() || letter == '-' || letter == '.';
    name.starts_with(|first: char| first.is_ascii_alphabetic()) && name.chars().all(fits)
}
