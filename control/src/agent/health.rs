//! What of a node does not work, in sentences for people: each part says its own, and it is logged
//! when it comes and when it goes.

use std::collections::BTreeMap;

use serde_json::json;

use super::Agent;

/// Sentences of one part at most.
pub const HEALTH_LINES_MAX: usize = 32;

/// What each part says at the moment; a part that has nothing to say is not there.
#[derive(Debug, Default)]
pub(super) struct Health(BTreeMap<&'static str, Vec<String>>);

impl Health {
    /// All of it, part by part.
    pub(super) fn lines(&self) -> impl Iterator<Item = String> {
        self.0.values().flatten().cloned()
    }
}

impl Agent {
    /// This is everything that `part` (`host`, `firewall`, `dns`, `exit`, ...) has to say from now on; what
    /// is over [`HEALTH_LINES_MAX`] is left out.
    pub fn set_health(&mut self, part: &'static str, mut lines: Vec<String>) {
        lines.truncate(HEALTH_LINES_MAX);
        let before = self.health.0.remove(part).unwrap_or_default();
        for line in lines.iter().filter(|line| !before.contains(line)) {
            tracing::warn!(part, "{line}");
        }
        for line in before.iter().filter(|line| !lines.contains(line)) {
            tracing::info!(part, "no more: {line}");
        }
        if before != lines {
            self.story("health", json!({"part": part, "problems": lines}));
        }
        if !lines.is_empty() {
            self.health.0.insert(part, lines);
        }
    }
}
