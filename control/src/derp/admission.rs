//! Whom a relay serves, when it does not serve everybody: what a verifier is asked and answers, what it
//! said lately, and lists of keys.
//!
//! Source: `tailcfg.DERPAdmitClientRequest` and `verifyClient` of `derp/derpserver` in
//! tailscale/tailscale.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::key::NodePublic;

/// How long a yes is good for: a client that comes back in that time is not asked about again.
pub const YES_KEPT: Duration = Duration::from_secs(30);

/// How long a no is: a node may be let in the moment after.
pub const NO_KEPT: Duration = Duration::from_secs(3);

/// Answers remembered.
pub const ANSWERS_MAX: usize = 16 << 10;

/// Bytes of an answer that are read.
pub const ANSWER_LEN_MAX: usize = 4096;

/// Bytes of a list of keys.
pub const LIST_LEN_MAX: u64 = 16 << 20;

/// May this client be served?
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Question {
    /// Its key.
    pub node_public: NodePublic,
    /// Where it connects from.
    pub source: IpAddr,
}

/// The verifier's answer.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Answer {
    /// Whether it may.
    #[serde(default)]
    pub allow: bool,
}

/// What the verifier said lately.
#[derive(Debug, Default)]
pub struct Answers {
    of_key: HashMap<NodePublic, (Instant, bool)>,
    /// The keys as they came, so that the oldest goes when there are too many.
    order: VecDeque<(NodePublic, Instant)>,
}

impl Answers {
    /// What it said of this key, if that is still good.
    pub fn get(&self, now: Instant, key: &NodePublic) -> Option<bool> {
        let (until, allow) = *self.of_key.get(key)?;
        (now < until).then_some(allow)
    }

    /// Remembers what it says now.
    pub fn put(&mut self, now: Instant, key: NodePublic, allow: bool) {
        let until = now + if allow { YES_KEPT } else { NO_KEPT };
        self.of_key.insert(key, (until, allow));
        self.order.push_back((key, until));
        while let Some((oldest, until)) = self.order.front().copied() {
            if until > now && self.order.len() <= ANSWERS_MAX {
                break;
            }
            self.order.pop_front();
            // A later answer has an entry of its own further back.
            if self
                .of_key
                .get(&oldest)
                .is_some_and(|(end, _)| *end == until)
            {
                self.of_key.remove(&oldest);
            }
        }
    }
}

/// Why a list of keys is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} is no node key: write nodekey: and 64 hex digits, one key a line")]
pub struct ListError {
    /// Which line, from 1.
    pub line: usize,
}

/// Reads a list of node keys: one a line; what follows a `#` is a comment.
///
/// # Errors
/// The first line that is something else.
pub fn parse_list(text: &str) -> Result<BTreeSet<NodePublic>, ListError> {
    let mut keys = BTreeSet::new();
    for (line, text) in (1..).zip(text.lines()) {
        let text = text.split('#').next().unwrap_or_default().trim();
        if !text.is_empty() {
            keys.insert(text.parse().map_err(|_| ListError { line })?);
        }
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> NodePublic {
        let mut key = NodePublic([7; 32]);
        key.0[..8].copy_from_slice(&n.to_be_bytes());
        key
    }

    #[test]
    fn the_question_is_the_one_that_derper_asks() {
        let question = Question {
            node_public: NodePublic([0xab; 32]),
            source: "192.0.2.7".parse().unwrap(),
        };
        let text = serde_json::to_string(&question).unwrap();
        let hex = "ab".repeat(32);
        assert_eq!(
            text,
            format!(r#"{{"NodePublic":"nodekey:{hex}","Source":"192.0.2.7"}}"#)
        );
        let allows = |text| serde_json::from_str(text).map(|answer: Answer| answer.allow);
        assert!(allows(r#"{"Allow":true,"Other":1}"#).unwrap());
        assert!(!allows(r#"{"Allow":false}"#).unwrap());
        assert!(!allows("{}").unwrap());
        assert!(allows("<html>").is_err());
    }

    #[test]
    fn answers_are_good_for_their_time_and_the_oldest_are_forgotten() {
        let start = crate::testing::start();
        let mut answers = Answers::default();
        answers.put(start, key(1), true);
        answers.put(start, key(2), false);
        assert_eq!(answers.get(start, &key(1)), Some(true));
        assert_eq!(answers.get(start, &key(2)), Some(false));
        assert_eq!(answers.get(start + NO_KEPT, &key(2)), None);
        let later = start + YES_KEPT - Duration::from_millis(1);
        assert_eq!(answers.get(later, &key(1)), Some(true));
        // The later answer counts.
        answers.put(later, key(1), false);
        assert_eq!(answers.get(later, &key(1)), Some(false));
        for n in 0..3 * ANSWERS_MAX {
            answers.put(later, key(10 + n), true);
        }
        assert!(answers.of_key.len() <= ANSWERS_MAX && answers.order.len() <= ANSWERS_MAX);
        assert_eq!(answers.get(later, &key(9 + 3 * ANSWERS_MAX)), Some(true));
        answers.put(later + YES_KEPT, key(1), true);
        assert_eq!((answers.of_key.len(), answers.order.len()), (1, 1));
    }

    #[test]
    fn lists_have_keys_and_comments_and_the_bad_line_is_named() {
        let good = format!("# all of ours\n\n  nodekey:{}  # a\n", "01".repeat(32));
        let keys = parse_list(&good).unwrap();
        assert_eq!(keys.into_iter().collect::<Vec<_>>(), [NodePublic([1; 32])]);
        let bad = format!("{good}nodekey:12\n");
        assert_eq!(parse_list(&bad), Err(ListError { line: 4 }));
    }
}
