//! From the text of a policy file to a [`Policy`], or to the place where it is wrong.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use jsonc_parser::ast::{Object, Value};
use jsonc_parser::common::Ranged as _;
use jsonc_parser::{CollectOptions, CommentCollectionStrategy, ParseOptions, parse_to_ast};

use super::{
    Alias, Owner, PARTS_MAX, POLICY_LEN_MAX, Policy, PolicyError, RULES_MAX, Rule, is_tag,
};
use crate::netmap::wire::PortRange;

/// Fields that Headscale or Tailscale know, and we do not.
const NOT_HERE: [&str; 8] = [
    "grants",
    "ssh",
    "sshTests",
    "nodeAttrs",
    "tests",
    "postures",
    "ipsets",
    "randomizeClientPort",
];

/// HuJSON is JSON with comments and trailing commas, and nothing more.
const OPTIONS: ParseOptions = ParseOptions {
    allow_comments: true,
    allow_trailing_commas: true,
    allow_loose_object_property_names: false,
    allow_missing_commas: false,
    allow_single_quoted_strings: false,
    allow_hexadecimal_numbers: false,
    allow_unary_plus_numbers: false,
    allow_bare_decimal_point_numbers: false,
    allow_non_finite_numbers: false,
    allow_extended_string_escapes: false,
};

const ALL_PORTS: PortRange = PortRange {
    first: 0,
    last: u16::MAX,
};

/// Names of protocols and their numbers.
const PROTOCOLS: [(&str, u8); 14] = [
    ("icmp", 1),
    ("igmp", 2),
    ("ipv4", 4),
    ("ip-in-ip", 4),
    ("tcp", 6),
    ("egp", 8),
    ("igp", 9),
    ("udp", 17),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", 58),
    ("sctp", 132),
    ("fc", 133),
];
/// Of these, those that have ports.
const WITH_PORTS: [u8; 3] = [6, 17, 132];

/// Why something is wrong, and at which byte.
type Wrong = (usize, String);

pub(super) fn parse(text: &str) -> Result<Policy, PolicyError> {
    if text.len() > POLICY_LEN_MAX {
        return Err(at(
            text,
            (0, format!("the file has more than {POLICY_LEN_MAX} bytes")),
        ));
    }
    read(text).map_err(|wrong| at(text, wrong))
}

/// Line and column of a byte.
fn at(text: &str, (byte, message): Wrong) -> PolicyError {
    let mut byte = byte.min(text.len());
    while !text.is_char_boundary(byte) {
        byte -= 1;
    }
    let before = &text[..byte];
    let line_start = before.rfind('\n').map_or(0, |end| end + 1);
    PolicyError {
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
        message,
    }
}

fn wrong<T>(value: &Value<'_>, message: impl Into<String>) -> Result<T, Wrong> {
    Err((value.start(), message.into()))
}

fn read(text: &str) -> Result<Policy, Wrong> {
    let collect = CollectOptions {
        comments: CommentCollectionStrategy::Off,
        tokens: false,
    };
    let parsed = parse_to_ast(text, &collect, &OPTIONS)
        .map_err(|error| (error.range().start, error.kind().to_string()))?;
    let Some(root) = parsed.value else {
        return Err((
            0,
            "the file is empty: write {} for a policy without rules".to_owned(),
        ));
    };
    let fields = fields(&root)?;
    let mut reader = Reader::default();
    // Names first, so that it does not matter in which order they stand.
    let sections: [(&str, Section); 5] = [
        ("groups", Reader::groups),
        ("hosts", Reader::hosts),
        ("tagOwners", Reader::tag_owners),
        ("autoApprovers", Reader::auto_approvers),
        ("acls", Reader::rules),
    ];
    for (name, value) in &fields {
        let is = |known: &str| known.eq_ignore_ascii_case(name);
        if let Some(known) = NOT_HERE.into_iter().find(|known| is(known)) {
            if !is_empty(value) {
                return wrong(
                    value,
                    format!("{known} is not supported by ringtail coord: Headscale knows it"),
                );
            }
        } else if !sections.iter().any(|(known, _)| is(known)) {
            return wrong(value, format!("there is no field {name:?} in a policy"));
        }
    }
    for (known, section) in sections {
        let mut named = fields
            .iter()
            .filter(|(name, _)| known.eq_ignore_ascii_case(name));
        if let Some((_, value)) = named.next() {
            section(&mut reader, value)?;
        }
        if let Some((_, value)) = named.next() {
            return wrong(value, format!("{known} is there twice"));
        }
    }
    Ok(reader.policy)
}

type Section = fn(&mut Reader, &Value<'_>) -> Result<(), Wrong>;

fn is_empty(value: &Value<'_>) -> bool {
    match value {
        Value::Object(object) => object.properties.is_empty(),
        Value::Array(array) => array.elements.is_empty(),
        Value::BooleanLit(flag) => !flag.value,
        Value::NullKeyword(_) => true,
        Value::StringLit(_) | Value::NumberLit(_) => false,
    }
}

/// Names and values of an object; no name twice.
fn fields<'a, 'b>(value: &'b Value<'a>) -> Result<Vec<(&'b str, &'b Value<'a>)>, Wrong> {
    let Value::Object(Object { properties, .. }) = value else {
        return wrong(value, "expected an object: { … }");
    };
    let mut seen = BTreeSet::new();
    let mut fields = Vec::with_capacity(properties.len());
    for property in properties {
        let name = property.name.as_str();
        if !seen.insert(name) {
            return Err((property.range.start, format!("{name:?} is there twice")));
        }
        fields.push((name, &property.value));
    }
    Ok(fields)
}

fn list<'a, 'b>(value: &'b Value<'a>) -> Result<&'b [Value<'a>], Wrong> {
    match value {
        Value::Array(array) => Ok(&array.elements),
        Value::Object(_)
        | Value::StringLit(_)
        | Value::NumberLit(_)
        | Value::BooleanLit(_)
        | Value::NullKeyword(_) => wrong(value, "expected a list: [ … ]"),
    }
}

fn string<'b>(value: &'b Value<'_>) -> Result<&'b str, Wrong> {
    match value {
        Value::StringLit(text) => Ok(text.value.trim()),
        Value::Object(_)
        | Value::Array(_)
        | Value::NumberLit(_)
        | Value::BooleanLit(_)
        | Value::NullKeyword(_) => wrong(value, "expected a string: \"…\""),
    }
}

/// The name of a user, who is written with an `@`: at the end, where the name has none.
fn user(text: &str) -> Option<String> {
    text.contains('@')
        .then(|| text.strip_suffix('@').unwrap_or(text).to_owned())
}

#[derive(Default)]
struct Reader {
    policy: Policy,
    hosts: BTreeMap<String, IpNet>,
    parts: usize,
}

impl Reader {
    fn groups(&mut self, value: &Value<'_>) -> Result<(), Wrong> {
        for (name, members) in fields(value)? {
            if !name.starts_with("group:") {
                return wrong(
                    members,
                    format!("a group is named group:…, and not {name:?}"),
                );
            }
            let mut users = BTreeSet::new();
            for member in list(members)? {
                self.count(member, 1)?;
                let text = string(member)?;
                if text.starts_with("group:") {
                    return wrong(member, "a group cannot be a member of a group");
                }
                let Some(user) = user(text) else {
                    return wrong(
                        member,
                        format!("{text:?} is no user: a user is written with an @, as {text}@"),
                    );
                };
                users.insert(user);
            }
            self.policy.groups.insert(name.to_owned(), users);
        }
        Ok(())
    }

    fn hosts(&mut self, value: &Value<'_>) -> Result<(), Wrong> {
        for (name, address) in fields(value)? {
            self.count(address, 1)?;
            if name.contains('@') || name.contains(':') {
                return wrong(address, format!("{name:?} cannot be the name of a host"));
            }
            let text = string(address)?;
            let Some(net) = prefix(text) else {
                return wrong(address, format!("{text:?} is no address and no prefix"));
            };
            self.hosts.insert(name.to_owned(), net);
        }
        Ok(())
    }

    fn tag_owners(&mut self, value: &Value<'_>) -> Result<(), Wrong> {
        let tags = fields(value)?;
        // A tag may own another that stands further down.
        for (tag, owners) in &tags {
            if !is_tag(tag) {
                return wrong(
                    owners,
                    format!("{tag:?} is no tag: write tag: and a name that begins with a letter"),
                );
            }
            self.policy.tag_owners.insert((*tag).to_owned(), Vec::new());
        }
        for (tag, owners) in &tags {
            let owners = self.owners(owners)?;
            self.policy.tag_owners.insert((*tag).to_owned(), owners);
        }
        for (tag, owners) in &tags {
            if self.owns_itself(tag) {
                return wrong(owners, format!("{tag} owns itself, by way of other tags"));
            }
        }
        Ok(())
    }

    /// Whether a chain of owners leads from a tag to itself.
    fn owns_itself(&self, tag: &str) -> bool {
        let mut seen = BTreeSet::new();
        let mut ask = vec![tag];
        while let Some(next) = ask.pop() {
            for owner in self.policy.tag_owners.get(next).into_iter().flatten() {
                if let Owner::Tag(other) = owner {
                    if other == tag {
                        return true;
                    }
                    if seen.insert(other.as_str()) {
                        ask.push(other);
                    }
                }
            }
        }
        false
    }

    fn auto_approvers(&mut self, value: &Value<'_>) -> Result<(), Wrong> {
        for (name, value) in fields(value)? {
            if name.eq_ignore_ascii_case("exitNode") {
                self.policy.exit = self.owners(value)?;
            } else if name.eq_ignore_ascii_case("routes") {
                for (net, owners) in fields(value)? {
                    let Some(net) = prefix(net) else {
                        return wrong(owners, format!("{net:?} is no prefix"));
                    };
                    let owners = self.owners(owners)?;
                    self.policy.routes.push((net, owners));
                }
            } else {
                return wrong(value, format!("there is no {name:?} in autoApprovers"));
            }
        }
        Ok(())
    }

    fn owners(&mut self, value: &Value<'_>) -> Result<Vec<Owner>, Wrong> {
        let mut owners = Vec::new();
        for value in list(value)? {
            self.count(value, 1)?;
            let text = string(value)?;
            match self.owner(value, text)? {
                Some(owner) => owners.push(owner),
                None => {
                    return wrong(
                        value,
                        format!("{text:?} is no user (written with an @), group: or tag:"),
                    );
                }
            }
        }
        Ok(owners)
    }

    /// A user, or a group or tag that there is.
    fn owner(&self, value: &Value<'_>, text: &str) -> Result<Option<Owner>, Wrong> {
        if let Some(name) = user(text) {
            return Ok(Some(Owner::User(name)));
        }
        if text.starts_with("group:") {
            if !self.policy.groups.contains_key(text) {
                return wrong(value, format!("{text} is not in groups"));
            }
            return Ok(Some(Owner::Group(text.to_owned())));
        }
        if text.starts_with("tag:") {
            if !self.policy.tag_owners.contains_key(text) {
                return wrong(value, format!("{text} is not in tagOwners"));
            }
            return Ok(Some(Owner::Tag(text.to_owned())));
        }
        Ok(None)
    }

    fn rules(&mut self, value: &Value<'_>) -> Result<(), Wrong> {
        let mut rules = Vec::new();
        for value in list(value)? {
            if rules.len() >= RULES_MAX {
                return wrong(value, format!("there are more than {RULES_MAX} rules"));
            }
            rules.push(self.rule(value)?);
        }
        self.policy.rules = Some(rules);
        Ok(())
    }

    fn rule(&mut self, value: &Value<'_>) -> Result<Rule, Wrong> {
        let (mut action, mut protocol, mut sources, mut destinations) = (None, None, None, None);
        for (name, value) in fields(value)? {
            let field = match name {
                // A field of a tool's own.
                _ if name.starts_with('#') => continue,
                _ if name.eq_ignore_ascii_case("action") => &mut action,
                _ if name.eq_ignore_ascii_case("proto") => &mut protocol,
                _ if name.eq_ignore_ascii_case("src") => &mut sources,
                _ if name.eq_ignore_ascii_case("dst") => &mut destinations,
                _ => return wrong(value, format!("there is no {name:?} in a rule")),
            };
            if field.replace(value).is_some() {
                return wrong(value, format!("{name} is there twice"));
            }
        }
        let (Some(action), Some(sources), Some(destinations)) = (action, sources, destinations)
        else {
            return wrong(value, "a rule has action, src and dst");
        };
        if string(action)? != "accept" {
            return wrong(
                action,
                "the action of a rule is \"accept\": what no rule accepts is denied",
            );
        }
        let number = protocol.map(protocol_number).transpose()?.flatten();
        let mut rule = Rule {
            protocol: number,
            sources: Vec::new(),
            destinations: Vec::new(),
        };
        for source in list(sources)? {
            self.count(source, 1)?;
            let alias = self.alias(source, string(source)?)?;
            if matches!(alias, Alias::Internet | Alias::Own) {
                return wrong(source, "this can be a destination only");
            }
            rule.sources.push(alias);
        }
        for destination in list(destinations)? {
            let text = string(destination)?;
            let (name, ports) = split(text).map_err(|why| (destination.start(), why))?;
            let ports = port_ranges(ports).map_err(|why| (destination.start(), why))?;
            self.count(destination, ports.len())?;
            let alias = self.alias(destination, &name)?;
            if number.is_some_and(|number| !WITH_PORTS.contains(&number)) && ports != [ALL_PORTS] {
                return wrong(destination, "this protocol has no ports: write :*");
            }
            rule.destinations.push((alias, ports));
        }
        if let Some(bad) = bad_source_of_own(&rule) {
            return wrong(
                &list(sources)?[bad],
                "with autogroup:self as destination, sources are users, groups, autogroup:member or *",
            );
        }
        Ok(rule)
    }

    fn alias(&self, value: &Value<'_>, text: &str) -> Result<Alias, Wrong> {
        if let Some(net) = prefix(text) {
            return Ok(Alias::Prefix(net));
        }
        if text == "*" {
            return Ok(Alias::Any);
        }
        if let Some(owner) = self.owner(value, text)? {
            return Ok(Alias::Of(owner));
        }
        match text {
            "autogroup:member" => Ok(Alias::Member),
            "autogroup:tagged" => Ok(Alias::Tagged),
            "autogroup:internet" => Ok(Alias::Internet),
            "autogroup:self" => Ok(Alias::Own),
            _ if text.starts_with("autogroup:") => wrong(
                value,
                format!(
                    "{text} is not supported: there are autogroup:member, autogroup:tagged, \
                     autogroup:internet and autogroup:self"
                ),
            ),
            _ => match self.hosts.get(text) {
                Some(net) => Ok(Alias::Prefix(*net)),
                None if text.contains(':') => wrong(value, format!("{text:?} means nothing here")),
                None => wrong(
                    value,
                    format!("{text:?} is not in hosts (a user is written with an @, as {text}@)"),
                ),
            },
        }
    }

    fn count(&mut self, value: &Value<'_>, parts: usize) -> Result<(), Wrong> {
        self.parts += parts;
        if self.parts > PARTS_MAX {
            return wrong(value, format!("the policy has more than {PARTS_MAX} parts"));
        }
        Ok(())
    }
}

/// Which source cannot stand in a rule to one's own nodes.
fn bad_source_of_own(rule: &Rule) -> Option<usize> {
    let own = |(alias, _): &(Alias, Vec<PortRange>)| *alias == Alias::Own;
    if !rule.destinations.iter().any(own) {
        return None;
    }
    rule.sources.iter().position(|source| match source {
        Alias::Any | Alias::Member | Alias::Of(Owner::User(_) | Owner::Group(_)) => false,
        Alias::Of(Owner::Tag(_))
        | Alias::Prefix(_)
        | Alias::Tagged
        | Alias::Internet
        | Alias::Own => true,
    })
}

fn prefix(text: &str) -> Option<IpNet> {
    let net = text.parse::<IpNet>().ok();
    let net = net.or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    net.map(|net| net.trunc())
}

/// The number of a protocol that is given by name or number; none is all that usually travel.
fn protocol_number(value: &Value<'_>) -> Result<Option<u8>, Wrong> {
    let text: Cow<'_, str> = match value {
        Value::NumberLit(number) => number.value.into(),
        Value::StringLit(_)
        | Value::Object(_)
        | Value::Array(_)
        | Value::BooleanLit(_)
        | Value::NullKeyword(_) => string(value)?.to_ascii_lowercase().into(),
    };
    if text.is_empty() {
        return Ok(None);
    }
    let named = PROTOCOLS.iter().find(|(name, _)| *name == text);
    let number = named.map(|(_, number)| *number).or_else(|| {
        let digits = !text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|_| digits)
    });
    match number {
        Some(number) => Ok(Some(number)),
        None => wrong(
            value,
            format!(
                "{text:?} is no protocol: write its name, such as tcp, or its number, 1 to 255"
            ),
        ),
    }
}

/// What stands before and after the last colon. An IPv6 address may be in brackets.
fn split(text: &str) -> Result<(String, &str), String> {
    let missing = || format!("{text:?} has no port: write {text}:* for all");
    let (name, ports) = text.rsplit_once(':').ok_or_else(missing)?;
    if name.is_empty() || ports.is_empty() {
        return Err(missing());
    }
    let Some(inner) = name.strip_prefix('[') else {
        return Ok((name.to_owned(), ports));
    };
    let bad = || format!("{text:?}: brackets are for IPv6 addresses, as [fd00::1]:80");
    let (address, rest) = inner.split_once(']').ok_or_else(bad)?;
    if address.parse::<Ipv6Addr>().is_err() || !(rest.is_empty() || rest.starts_with('/')) {
        return Err(bad());
    }
    Ok((format!("{address}{rest}"), ports))
}

/// `*`, or ports and ranges of them, with commas between.
fn port_ranges(text: &str) -> Result<Vec<PortRange>, String> {
    if text == "*" {
        return Ok(vec![ALL_PORTS]);
    }
    let bad = |part: &str| {
        format!("{part:?} is no port: write *, or 22, 80-90, with commas between, up to 65535")
    };
    let ranges = text.split(',').map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let port = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u16>().ok().filter(|_| digits)
        };
        let (Some(first), Some(last)) = (port(first), port(last)) else {
            return Err(bad(part));
        };
        if first > last || (first == 0 && !part.contains('-')) {
            return Err(bad(part));
        }
        Ok(PortRange { first, last })
    });
    ranges.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Result<Rule, PolicyError> {
        let text = format!(
            r#"{{"groups": {{"group:ops": ["ann@", "bob@example.com"]}},
               "hosts": {{"lan": "10.20.0.0/16", "www": "192.0.2.7"}},
               "tagOwners": {{"tag:web": ["group:ops"], "tag:ci": ["tag:web"]}},
               "acls": [{text}]}}"#
        );
        let mut policy = Policy::parse(&text)?;
        Ok(policy.rules.as_mut().unwrap().remove(0))
    }

    fn ports(first: u16, last: u16) -> PortRange {
        PortRange { first, last }
    }

    #[test]
    fn names_become_what_they_stand_for() {
        let found = rule(
            r##"{"action": "accept", "Proto": "TCP", "#note": [1], // why
               "src": ["ann@", " group:ops", "autogroup:member", "lan", "100.64.0.1", "*", "tag:ci",],
               "dst": ["tag:web:80,443", "www:22-25", "[fd00::1]:53", "[fd00::]/64:0-9", "fd00::2:8",
                       "autogroup:internet:*", /* all of it */ "10.1.2.3/8:*"]}"##,
        )
        .unwrap();
        let net = |text: &str| Alias::Prefix(text.parse().unwrap());
        let user = |name: &str| Alias::Of(Owner::User(name.to_owned()));
        assert_eq!(found.protocol, Some(6));
        assert_eq!(
            found.sources,
            [
                user("ann"),
                Alias::Of(Owner::Group("group:ops".to_owned())),
                Alias::Member,
                net("10.20.0.0/16"),
                net("100.64.0.1/32"),
                Alias::Any,
                Alias::Of(Owner::Tag("tag:ci".to_owned())),
            ]
        );
        assert_eq!(
            found.destinations,
            [
                (
                    Alias::Of(Owner::Tag("tag:web".to_owned())),
                    vec![ports(80, 80), ports(443, 443)]
                ),
                (net("192.0.2.7/32"), vec![ports(22, 25)]),
                (net("fd00::1/128"), vec![ports(53, 53)]),
                (net("fd00::/64"), vec![ports(0, 9)]),
                (net("fd00::2/128"), vec![ports(8, 8)]),
                (Alias::Internet, vec![ALL_PORTS]),
                (net("10.0.0.0/8"), vec![ALL_PORTS]),
            ]
        );
        for (proto, number) in [
            (r#""""#, None),
            (r#""icmp""#, Some(1)),
            (r#""47""#, Some(47)),
            ("132", Some(132)),
            (r#""IPv6-ICMP""#, Some(58)),
        ] {
            let text =
                format!(r#"{{"action":"accept","proto":{proto},"src":["*"],"dst":["*:*"]}}"#);
            assert_eq!(rule(&text).unwrap().protocol, number, "{proto}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let with = |src: &str, dst: &str| {
            rule(&format!(
                r#"{{"action":"accept","src":["{src}"],"dst":["{dst}"]}}"#
            ))
        };
        for (src, dst, why) in [
            ("ann", "*:*", "ann@"),
            ("group:no", "*:*", "not in groups"),
            ("tag:no", "*:*", "not in tagOwners"),
            ("autogroup:internet", "*:*", "destination only"),
            ("autogroup:self", "*:*", "destination only"),
            ("autogroup:nonroot", "*:*", "not supported"),
            ("*", "*", "has no port"),
            ("*", "tag:web:", "has no port"),
            ("*", ":80", "has no port"),
            ("*", "nowhere:80", "not in hosts"),
            ("*", "[10.0.0.1]:80", "brackets"),
            ("*", "www:0", "no port"),
            ("*", "www:9-8", "no port"),
            ("*", "www:70000", "no port"),
            ("*", "www:80,", "no port"),
            ("*", "www:+80", "no port"),
            ("tag:web", "autogroup:self:*", "autogroup:self"),
            ("lan", "autogroup:self:*", "autogroup:self"),
        ] {
            let error = with(src, dst).unwrap_err();
            assert!(error.message.contains(why), "{src} {dst}: {error}");
        }
        for (text, why) in [
            ("7", "expected an object"),
            ("{}", "action, src and dst"),
            (r#"{"action":"deny","src":[],"dst":[]}"#, "accept"),
            (
                r#"{"action":"accept","src":"*","dst":[]}"#,
                "expected a list",
            ),
            (
                r#"{"action":"accept","src":[7],"dst":[]}"#,
                "expected a string",
            ),
            (
                r#"{"action":"accept","src":[],"dst":[],"user":[]}"#,
                "no \"user\"",
            ),
            (r#"{"action":"accept","src":[],"src":[],"dst":[]}"#, "twice"),
            (r#"{"action":"accept","src":[],"SRC":[],"dst":[]}"#, "twice"),
            (
                r#"{"action":"accept","proto":"*","src":[],"dst":[]}"#,
                "no protocol",
            ),
            (
                r#"{"action":"accept","proto":"06","src":[],"dst":[]}"#,
                "no protocol",
            ),
            (
                r#"{"action":"accept","proto":256,"src":[],"dst":[]}"#,
                "no protocol",
            ),
            (
                r#"{"action":"accept","proto":"gre","src":["*"],"dst":["*:80"]}"#,
                "no ports",
            ),
        ] {
            let error = rule(text).unwrap_err();
            assert!(error.message.contains(why), "{text}: {error}");
        }
        for (text, why) in [
            ("", "empty"),
            ("[]", "expected an object"),
            (r#"{"acl": []}"#, "no field"),
            (r#"{"acls": [], "ACLs": []}"#, "twice"),
            (r#"{"grants": [{}]}"#, "Headscale"),
            (r#"{"groups": {"ops": []}}"#, "group:"),
            (
                r#"{"groups": {"group:a": ["group:a"]}}"#,
                "cannot be a member",
            ),
            (r#"{"groups": {"group:a": ["ann"]}}"#, "ann@"),
            (r#"{"hosts": {"a": "b"}}"#, "no address"),
            (r#"{"hosts": {"a:b": "10.0.0.1"}}"#, "name of a host"),
            (r#"{"tagOwners": {"tag:1": []}}"#, "begins with a letter"),
            (r#"{"tagOwners": {"tag:a": ["tag:b"]}}"#, "not in tagOwners"),
            (
                r#"{"tagOwners": {"tag:a": ["tag:b"], "tag:b": ["tag:a"]}}"#,
                "owns itself",
            ),
            (r#"{"autoApprovers": {"routes": {"x": []}}}"#, "no prefix"),
            (
                r#"{"autoApprovers": {"exitNode": ["10.0.0.1"]}}"#,
                "no user",
            ),
        ] {
            let error = Policy::parse(text).unwrap_err();
            assert!(error.message.contains(why), "{text}: {error}");
        }
        // Empty, they say nothing.
        let text = r#"{"grants": [], "ssh": [], "randomizeClientPort": false, "tests": null}"#;
        assert_eq!(Policy::parse(text), Ok(Policy::default()));
    }

    #[test]
    fn comments_and_trailing_commas_are_all_that_is_more_than_json() {
        let text =
            "// first\n/* and */ { /* in */ \"acls\" /* odd */ : [ // places\n ] , }\n// last";
        assert!(Policy::parse(text).unwrap().rules.unwrap().is_empty());
        for text in [
            "{acls: []}",
            "{'acls': []}",
            "{\"acls\": [] \"hosts\": {}}",
            "{\"acls\": []} {}",
            "{\"acls\": [}",
            "{\"acls\": [",
            "{\"hosts\": {\"a\\x41\": \"10.0.0.1\"}}",
            "{,}",
            "{\"acls\": [,]}",
        ] {
            assert!(Policy::parse(text).is_err(), "{text}");
        }
        let deep = "[".repeat(100_000);
        assert!(Policy::parse(&deep).is_err());
    }

    #[test]
    fn the_place_of_what_is_wrong_is_told() {
        let mut text = "{\"acls\": [\n".to_owned();
        for _ in 0..998 {
            text.push_str("  {\"action\": \"accept\", \"src\": [\"*\"], \"dst\": [\"*:*\"]},\n");
        }
        let broken =
            format!("{text}  {{\"action\": \"äccept\", \"src\": [\"*\"], \"dst\": [\"x:*\"]}}]}}");
        let error = Policy::parse(&broken).unwrap_err();
        assert_eq!((error.line, error.column), (1000, 14), "{error}");
        let unknown = broken.replace("äccept", "accept");
        let error = Policy::parse(&unknown).unwrap_err();
        assert_eq!((error.line, error.column), (1000, 46), "{error}");
        assert_eq!(
            error.to_string(),
            "line 1000, column 46: \"x\" is not in hosts (a user is written with an @, as x@)"
        );
        let open = format!("{text}  é = 1");
        let error = Policy::parse(&open).unwrap_err();
        assert_eq!((error.line, error.column), (1000, 3), "{error}");
    }

    #[test]
    fn what_is_read_is_bounded() {
        let one = r#"{"action":"accept","src":["*"],"dst":["*:1"]},"#;
        let rules = |count| format!("{{\"acls\":[{}]}}", one.repeat(count));
        assert_eq!(Policy::parse(&rules(RULES_MAX)).unwrap().rules(), RULES_MAX);
        let error = Policy::parse(&rules(RULES_MAX + 1)).unwrap_err();
        assert!(error.message.contains("more than 10000 rules"), "{error}");
        let many = format!(
            r#"{{"action":"accept","src":[{}],"dst":[]}}"#,
            r#""*","#.repeat(100_000)
        );
        let error = rule(&many).unwrap_err();
        assert!(error.message.contains("parts"), "{error}");
        let long = " ".repeat(POLICY_LEN_MAX + 1);
        let error = Policy::parse(&long).unwrap_err();
        assert_eq!((error.line, error.column), (1, 1));
    }

    #[test]
    fn owners_of_tags_and_routes_are_who_the_file_names() {
        let policy = Policy::parse(
            r#"{"groups": {"group:ops": ["ann@"]},
                "tagOwners": {"tag:a": ["tag:b"], "tag:b": ["group:ops"], "tag:c": []},
                "autoApprovers": {"routes": {"10.0.0.0/8": ["tag:a"], "fd00::/8": ["bob@"]},
                                  "exitNode": ["group:ops"]}}"#,
        )
        .unwrap();
        assert!(policy.may_tag("ann", "tag:a") && policy.may_tag("ann", "tag:b"));
        assert!(!policy.may_tag("ann", "tag:c") && !policy.may_tag("bob", "tag:a"));
        assert!(!policy.may_tag("ann", "tag:other"));
        let approves = |user: &str, tags: &[&str], route: &str| {
            let tags: Vec<String> = tags.iter().map(|tag| (*tag).to_owned()).collect();
            policy.approves(user, &tags, &route.parse().unwrap())
        };
        assert!(approves("", &["tag:a"], "10.0.0.0/8") && approves("", &["tag:a"], "10.1.0.0/16"));
        assert!(!approves("ann", &[], "10.0.0.0/8") && !approves("", &["tag:b"], "10.0.0.0/8"));
        assert!(!approves("", &["tag:a"], "0.0.0.0/0") && !approves("", &["tag:a"], "8.0.0.0/5"));
        assert!(approves("bob", &[], "fd00:1::/64") && !approves("bob", &["tag:c"], "fd00:1::/64"));
        assert!(approves("ann", &[], "::/0") && !approves("bob", &[], "0.0.0.0/0"));
        assert_eq!(policy.users(), ["ann", "bob"].into());
    }
}
