//! The event file: what happens on the paths, as JSON lines for people and for the bench.
//!
//! Each line is `{"t_ns": <CLOCK_REALTIME, ns>, "node": <name>, "event": <name>, …}`. Lines are
//! appended whole, one write each, so that a reader that follows the file never sees half a line
//! as long as it waits for the newline.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Map, Value};

use super::clock::since_1970;

/// Writes events to a file, or nowhere.
#[derive(Debug)]
pub struct EventLog {
    node: String,
    file: Option<File>,
    /// Lines the file did not take.
    lost: u64,
}

impl EventLog {
    /// Opens the file for appending; without a file every event is only a debug line of the log.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: Option<&Path>, node: &str) -> anyhow::Result<Self> {
        let open = |path: &Path| {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o600)
                .open(path);
            file.with_context(|| format!("cannot open the event file {}", path.display()))
        };
        let file = path.map(open).transpose()?;
        Ok(Self {
            node: node.to_owned(),
            file,
            lost: 0,
        })
    }

    /// Writes one event; `fields` is a JSON object.
    pub fn write(&mut self, event: &str, fields: Value) {
        tracing::debug!(target: "ringtail::story", event, %fields);
        let Some(file) = &mut self.file else { return };
        let mut line = Map::new();
        let at = u64::try_from(since_1970().as_nanos()).unwrap_or(u64::MAX);
        line.insert("t_ns".into(), at.into());
        line.insert("node".into(), self.node.clone().into());
        line.insert("event".into(), event.into());
        if let Value::Object(fields) = fields {
            line.extend(fields);
        }
        let mut text = Value::Object(line).to_string();
        text.push('\n');
        if file.write_all(text.as_bytes()).is_err() {
            self.lost += 1;
        }
    }

    /// Lines the file did not take.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_is_one_line_with_time_node_and_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut log = EventLog::open(Some(&path), "a").unwrap();
        log.write("home", serde_json::json!({"region": "nyc"}));
        log.write("home", serde_json::json!({"region": "fra"}));
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(
            (&lines[0]["node"], &lines[1]["region"]),
            (&"a".into(), &"fra".into())
        );
        assert!(lines[0]["t_ns"].as_u64() <= lines[1]["t_ns"].as_u64());
        assert_eq!(log.lost(), 0);
    }
}
