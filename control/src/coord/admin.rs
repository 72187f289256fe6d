//! What an administrator has done with a node, while the server runs or not.
//!
//! An [`Order`] names a node in words. [`plan`] finds it among the stored ones and says what is to
//! be written; whoever owns the store commits that, and a running server then puts it into force
//! by [`Server::put`](super::server::Server::put). Nothing here knows whether a server runs; whom it
//! may let in who waits is known to a server alone.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::address;
use super::routes::{APPROVALS_MAX, announced};
use super::server::{NodeRecord, Write};
use crate::key::{MachinePublic, NodePublic};
use crate::policy::is_tag;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Order {
    /// A stored node is changed.
    Node {
        /// Its id, name, an inner address, its node key or its machine key.
        node: String,
        /// How.
        change: Change,
    },
    /// The machine that waits under a code is let in.
    Admit {
        /// As the machine's user was shown it; the URL it is in will do.
        code: String,
        /// Whose node it is from now on.
        user: Option<String>,
    },
}

/// What is done with a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// It is no member any more, and nothing of it stays.
    Delete,
    /// Its key is no good from now on; it stays what it is, and comes back with an auth key.
    Expire,
    /// It is called this from now on, whatever its host is.
    Rename(String),
    /// It has these tags and no others; with none it is its user's.
    Tag(Vec<String>),
    /// These routes, without host bits, count when it announces them.
    Approve(Vec<IpNet>),
    /// These, each of them approved, do not any more.
    Revoke(Vec<IpNet>),
}

impl Change {
    /// The order that has it done to a node.
    pub fn of(self, node: impl Into<String>) -> Order {
        let node = node.into();
        Order::Node { node, change: self }
    }
}

/// An order that was carried out: the node as it is, or was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Its id.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// False when everything was so already.
    pub changed: bool,
    /// The auth key that let it in.
    pub auth_key: Option<i64>,
    /// What it announces.
    pub announced: Vec<IpNet>,
    /// What is approved for it.
    pub approved: Vec<IpNet>,
    /// Its tags.
    pub tags: Vec<String>,
}

/// Why an order is not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing goes by that.
    #[error(
        "no node is {0:?}: name it by id, name, address or key, as `ringtail coord nodes` lists them"
    )]
    Unknown(String),
    /// Two do, and the text says which.
    #[error("{0}")]
    Ambiguous(String),
    /// No such approval.
    #[error("{1} is not approved for {0}: `ringtail coord routes` lists what is")]
    NotApproved(String, IpNet),
    /// The policy would approve it again.
    #[error(
        "the policy approves {1} for {0} (autoApprovers): take it out of the policy file and send SIGHUP, then \
         revoke it; or `ringtail coord nodes expire` the node"
    )]
    ByPolicy(String, IpNet),
    /// It would be more than [`APPROVALS_MAX`].
    #[error("{0} would have more than {APPROVALS_MAX} approved routes")]
    TooMany(String),
    /// No machine waits under it, not or no more.
    #[error(
        "no machine waits under {0:?}: a code is good for 30 minutes, and until the server stops; \
         whoever asks again is shown another"
    )]
    NoSuchCode(String),
    /// Nobody of that name.
    #[error("no user is {0:?}: `ringtail coord users` lists them, and `users add` makes one")]
    NoSuchUser(String),
    /// Not fit for the name of a node.
    #[error(
        "{0:?} cannot be a node's name: write 1 to 63 letters, digits and -, none of these at an end"
    )]
    BadName(String),
    /// Another node has it.
    #[error("node {1} has the name {0:?} already")]
    NameTaken(String, i64),
    /// Not fit for a tag.
    #[error("{0:?} is no tag: write tag: and a name that begins with a letter")]
    BadTag(String),
    /// A machine that waits cannot be let in.
    #[error("{0}")]
    NoPlace(String),
    /// Who waits is known to a server that runs.
    #[error("the coordination server does not run here, so no machine waits for it")]
    NobodyWaits,
    /// Not masked.
    #[error("{0} has bits set behind the prefix")]
    HostBits(IpNet),
}

/// What is to be written, if anything, to change the node that goes by `node`, and what is said of it
/// afterwards.
///
/// # Errors
/// [`Refusal`]; nothing is to be done then.
pub fn plan<'a>(
    nodes: impl Iterator<Item = &'a NodeRecord> + Clone,
    node: &str,
    change: &Change,
    wall: OffsetDateTime,
) -> Result<(Option<Write>, Done), Refusal> {
    let old = find(nodes.clone(), node)?;
    let mut record = old.clone();
    match change {
        Change::Delete => {
            return Ok((Some(Write::Delete(old.id)), Done::of(old, true)));
        }
        // Whole seconds, as it is stored: a restart must not change it.
        Change::Expire => {
            let now = wall.replace_nanosecond(0).unwrap_or(wall);
            record.expires.get_or_insert(now);
        }
        Change::Rename(name) => {
            let name = name.to_ascii_lowercase();
            if address::name(&name, |_| false) != name {
                return Err(Refusal::BadName(name));
            }
            let taken = |other: &&NodeRecord| other.name == name && other.id != old.id;
            if let Some(other) = nodes.clone().find(taken) {
                return Err(Refusal::NameTaken(name, other.id));
            }
            (record.name, record.name_fixed) = (name, true);
        }
        Change::Tag(tags) => {
            if let Some(bad) = tags.iter().find(|tag| !is_tag(tag)) {
                return Err(Refusal::BadTag(bad.clone()));
            }
            record.tags.clone_from(tags);
            record.tags.sort_unstable();
            record.tags.dedup();
            if !tags.is_empty() {
                record.good_until = None;
            }
        }
        Change::Approve(routes) => {
            if let Some(bad) = routes.iter().find(|route| route.trunc() != **route) {
                return Err(Refusal::HostBits(*bad));
            }
            record.approved.extend(routes);
            record.approved.sort_unstable();
            record.approved.dedup();
            if record.approved.len() > APPROVALS_MAX {
                return Err(Refusal::TooMany(record.name));
            }
        }
        Change::Revoke(routes) => {
            if let Some(other) = routes.iter().find(|route| !old.approved.contains(route)) {
                return Err(Refusal::NotApproved(record.name, *other));
            }
            record.approved.retain(|route| !routes.contains(route));
        }
    }
    let changed = record != *old;
    let done = Done::of(&record, changed);
    Ok((changed.then(|| Write::Save(Box::new(record))), done))
}

impl Done {
    /// What is said of this node.
    pub fn of(record: &NodeRecord, changed: bool) -> Self {
        Self {
            id: record.id,
            name: record.name.clone(),
            changed,
            auth_key: record.auth_key,
            announced: announced(&record.hostinfo),
            approved: record.approved.clone(),
            tags: record.tags.clone(),
        }
    }
}

/// The node somebody means. A name may be a number, too: then two nodes can be meant.
fn find<'a>(
    nodes: impl Iterator<Item = &'a NodeRecord>,
    text: &str,
) -> Result<&'a NodeRecord, Refusal> {
    let text = text.trim();
    let meant: Vec<&NodeRecord> = nodes.filter(|node| is_meant(node, text)).collect();
    match meant[..] {
        [] => Err(Refusal::Unknown(text.to_owned())),
        [one] => Ok(one),
        [one, other, ..] => Err(Refusal::Ambiguous(format!(
            "{text:?} can be node {} ({}) or node {} ({}): name it by its address or key",
            one.id, one.name, other.id, other.name
        ))),
    }
}

fn is_meant(node: &NodeRecord, text: &str) -> bool {
    node.name.eq_ignore_ascii_case(text)
        || text.parse() == Ok(node.id)
        || text.parse() == Ok(node.v4)
        || text.parse() == Ok(node.v6)
        || text
            .parse::<NodePublic>()
            .is_ok_and(|key| key == node.node_key)
        || text
            .parse::<MachinePublic>()
            .is_ok_and(|key| key == node.machine)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;
    use serde_json::json;

    const WALL: OffsetDateTime = time::macros::datetime!(2026-11-22 05:00:00.25 UTC);

    fn node(id: u8, name: &str) -> NodeRecord {
        NodeRecord {
            id: id.into(),
            machine: MachinePublic([id; 32]),
            node_key: NodePublic([id ^ 0x80; 32]),
            disco: None,
            user: 1,
            tags: Vec::new(),
            name: name.to_owned(),
            name_fixed: false,
            v4: [100, 64, 0, id].into(),
            v6: Ipv6Addr::from_bits(id.into()),
            capver: 130,
            hostinfo: json!({"RoutableIPs": ["10.1.0.0/16"]}),
            endpoints: Vec::new(),
            auth_key: Some(5),
            ephemeral: false,
            expires: None,
            good_until: None,
            approved: Vec::new(),
            last_seen: None,
            created: WALL,
        }
    }

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_node_is_named_by_any_of_what_is_its_own_and_never_guessed() {
        let nodes = [node(1, "web"), node(2, "1"), node(3, "web-1")];
        let meant = |text: &str| find(nodes.iter(), text).map(|node| node.id);
        for (text, id) in [
            ("web", 1),
            ("WEB ", 1),
            ("2", 2),
            ("web-1", 3),
            ("100.64.0.3", 3),
            ("::1", 1),
            (&nodes[1].node_key.to_string(), 2),
            (&nodes[2].machine.to_string(), 3),
        ] {
            assert_eq!(meant(text), Ok(id), "{text}");
        }
        for text in [
            "",
            "we",
            "web-2",
            "4",
            "-1",
            "0",
            "100.64.0.9",
            "web.tail.internal",
            "*",
        ] {
            assert_eq!(
                meant(text),
                Err(Refusal::Unknown(text.to_owned())),
                "{text}"
            );
        }
        let both = meant("1").unwrap_err().to_string();
        assert!(
            both.contains("node 1 (web)") && both.contains("node 2 (1)"),
            "{both}"
        );
    }

    #[test]
    fn an_order_changes_the_one_thing_it_names() {
        let nodes = [node(1, "a"), node(2, "b")];
        let orders = |change: &Change| plan(nodes.iter(), "b", change, WALL);
        let (write, done) = orders(&Change::Delete).unwrap();
        assert_eq!(
            (write, done.id, done.auth_key),
            (Some(Write::Delete(2)), 2, Some(5))
        );
        let (write, _) = orders(&Change::Expire).unwrap();
        let mut want = nodes[1].clone();
        want.expires = WALL.replace_nanosecond(0).ok();
        assert_eq!(write, Some(Write::Save(Box::new(want.clone()))));
        // Again, later: it has been so since then.
        let later = WALL + time::Duration::HOUR;
        let again = plan([want].iter(), "b", &Change::Expire, later).unwrap();
        assert!(again.0.is_none() && !again.1.changed);

        let approve = |routes: &[&str]| Change::Approve(nets(routes));
        let revoke = |routes: &[&str]| Change::Revoke(nets(routes));
        let (write, done) = orders(&approve(&["10.1.0.0/16", "::/0", "10.1.0.0/16"])).unwrap();
        let mut want = nodes[1].clone();
        want.approved = nets(&["10.1.0.0/16", "::/0"]);
        assert_eq!(write, Some(Write::Save(Box::new(want.clone()))));
        assert_eq!(
            (done.approved, done.announced),
            (want.approved.clone(), nets(&["10.1.0.0/16"]))
        );
        let refused = orders(&approve(&["10.1.0.1/16"]));
        assert_eq!(refused, Err(Refusal::HostBits(nets(&["10.1.0.1/16"])[0])));
        let wide = revoke(&["10.0.0.0/8"]);
        assert!(plan([want.clone()].iter(), "b", &wide, WALL).is_err());
        let (_, done) = plan([want].iter(), "b", &revoke(&["::/0"]), WALL).unwrap();
        assert_eq!(done.approved, nets(&["10.1.0.0/16"]));
    }
}
