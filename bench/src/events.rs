//! Event files: JSON lines that nodes, the lab script and the ping stream append to.
//!
//! `{"t_ns": 1700000000000000000, "node": "a", "event": "path", "state": "direct", …}`
//! `t_ns` is nanoseconds since the Unix epoch; every other field depends on the event.

#![forbid(unsafe_code)]

use crate::clock;
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Pause between two looks at a file.
const POLL: Duration = Duration::from_millis(10);

/// One line of an event file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Event {
    /// Nanoseconds since the Unix epoch.
    pub(crate) t_ns: u64,
    /// Who says it: "a", "b", "lab", "ping", …
    #[serde(default)]
    pub(crate) node: String,
    /// The event's name.
    pub(crate) event: String,
    /// Everything else.
    #[serde(flatten)]
    pub(crate) fields: Map<String, Value>,
}

impl Event {
    /// A field as the words a person reads: strings bare, lists joined, numbers short.
    pub(crate) fn text(&self, field: &str) -> String {
        self.fields.get(field).map(words).unwrap_or_default()
    }

    /// A numeric field.
    pub(crate) fn number(&self, field: &str) -> Option<f64> {
        self.fields.get(field)?.as_f64()
    }
}

fn words(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => match value.as_f64() {
            Some(number) if number.fract() != 0.0 => format!("{number:.1}"),
            Some(_) | None => value.to_string(),
        },
        Value::Array(items) => items.iter().map(words).collect::<Vec<_>>().join(", "),
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| format!("{key} {}", words(value)))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

/// Appends a line to a file in a single write, so that several writers may share it.
pub(crate) fn append(path: &Path, what: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    let mut file = File::options().create(true).append(true).open(path)?;
    file.write_all(&line)?;
    Ok(())
}

/// Reads an event file as it grows; a file that does not exist yet is empty.
#[derive(Debug)]
pub(crate) struct Tail {
    path: PathBuf,
    offset: u64,
    partial: Vec<u8>,
}

impl Tail {
    /// A reader at the start of the file.
    pub(crate) fn new(path: PathBuf) -> Tail {
        Tail {
            path,
            offset: 0,
            partial: Vec::new(),
        }
    }

    /// All whole lines that were added since the last call; lines that are no events are skipped.
    pub(crate) fn read(&mut self) -> anyhow::Result<Vec<Event>> {
        let Ok(mut file) = File::open(&self.path) else {
            return Ok(Vec::new());
        };
        file.seek(SeekFrom::Start(self.offset))?;
        let before = self.partial.len();
        file.read_to_end(&mut self.partial)
            .with_context(|| format!("reading {}", self.path.display()))?;
        self.offset += u64::try_from(self.partial.len() - before)?;
        let Some(end) = self.partial.iter().rposition(|byte| *byte == b'\n') else {
            return Ok(Vec::new());
        };
        let whole: Vec<u8> = self.partial.drain(..=end).collect();
        Ok(whole
            .split(|byte| *byte == b'\n')
            .filter_map(|l| serde_json::from_slice(l).ok())
            .collect())
    }
}

/// All events of several files, in the order of their times.
pub(crate) fn read_all(paths: &[PathBuf]) -> anyhow::Result<Vec<Event>> {
    let mut events = Vec::new();
    for path in paths {
        events.extend(Tail::new(path.clone()).read()?);
    }
    events.sort_by_key(|event| event.t_ns);
    Ok(events)
}

/// `wait`: until an event appears.
#[derive(Debug, clap::Args)]
pub(crate) struct WaitArgs {
    /// The event file.
    file: PathBuf,
    /// Name of the event.
    event: String,
    /// A field that must have this value, as FIELD=VALUE; VALUE may list several, split by `|`.
    #[arg(long = "where", value_name = "FIELD=VALUE")]
    conditions: Vec<String>,
    /// Only events at or after this time count, in nanoseconds since the Unix epoch.
    #[arg(long, default_value_t = 0)]
    since_ns: u64,
    /// Seconds to wait before giving up with exit code 1.
    #[arg(long, default_value_t = 10.0)]
    timeout: f64,
}

/// Prints the first matching event as JSON, or fails after the timeout.
pub(crate) fn wait(args: &WaitArgs) -> anyhow::Result<()> {
    let mut tail = Tail::new(args.file.clone());
    let deadline = clock::now() + Duration::from_secs_f64(args.timeout);
    loop {
        for event in tail.read()? {
            if event.event == args.event
                && event.t_ns >= args.since_ns
                && args
                    .conditions
                    .iter()
                    .all(|condition| matches(&event, condition))
            {
                println!("{}", serde_json::to_string(&event)?);
                return Ok(());
            }
        }
        if clock::now() > deadline {
            bail!(
                "no event \"{}\" {} in {} within {} s",
                args.event,
                args.conditions.join(" "),
                args.file.display(),
                args.timeout
            );
        }
        clock::sleep(POLL);
    }
}

fn matches(event: &Event, condition: &str) -> bool {
    let Some((field, value)) = condition.split_once('=') else {
        return false;
    };
    let got = event.text(field);
    value.split('|').any(|wanted| wanted == got)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(line: &str) -> Event {
        serde_json::from_str(line).expect("a valid event")
    }

    #[test]
    fn fields_become_words() {
        let got = event(
            r#"{"t_ns":5,"node":"a","event":"x","list":["p","q"],"ms":1.26,"n":3,"ok":true}"#,
        );
        assert_eq!(got.text("list"), "p, q");
        assert_eq!(got.text("ms"), "1.3");
        assert_eq!(got.text("n"), "3");
        assert_eq!(got.text("ok"), "true");
        assert_eq!(got.text("none"), "");
    }

    #[test]
    fn a_condition_may_list_values() {
        let got = event(r#"{"t_ns":5,"node":"a","event":"path","state":"relay"}"#);
        assert!(matches(&got, "state=fallback|relay"));
        assert!(!matches(&got, "state=direct"));
        assert!(!matches(&got, "state"));
    }

    #[test]
    fn a_tail_gives_whole_lines_only_and_skips_what_is_no_event() -> anyhow::Result<()> {
        let path = std::env::temp_dir().join(format!("rt-tail-{}", std::process::id()));
        let mut tail = Tail::new(path.clone());
        assert!(tail.read()?.is_empty());
        std::fs::write(&path, "junk\n{\"t_ns\":1,\"event\":\"one\"}\n{\"t_ns\":2,")?;
        let first = tail.read()?;
        assert_eq!(first.len(), 1);
        assert_eq!(first[0].event, "one");
        let mut file = File::options().append(true).open(&path)?;
        file.write_all(b"\"event\":\"two\"}\n")?;
        let second = tail.read()?;
        assert_eq!(second.len(), 1);
        assert_eq!(second[0].event, "two");
        std::fs::remove_file(path)?;
        Ok(())
    }
}
