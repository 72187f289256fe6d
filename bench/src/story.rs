//! The story: what the nodes, the lab and the pings report, merged by time, in plain words, live.

#![forbid(unsafe_code)]

use crate::clock;
use crate::events::{Event, Tail};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

/// Events are held so long before printing, so that two files' lines come out in their true order.
const HOLD: Duration = Duration::from_millis(120);
/// Pause between two looks at the files.
const POLL: Duration = Duration::from_millis(30);

/// `story`: which files, and until when.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Event files; each may appear later.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Time zero, in nanoseconds since the Unix epoch; now when left out.
    #[arg(long)]
    start_ns: Option<u64>,
    /// End once this file exists and all has been printed.
    #[arg(long)]
    stop_file: Option<PathBuf>,
    /// Print every event, also those that repeat all the time.
    #[arg(long)]
    all: bool,
}

/// Prints events until the stop file appears.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let start_ns = args.start_ns.unwrap_or_else(clock::unix_ns);
    let mut tails: Vec<Tail> = args.files.iter().cloned().map(Tail::new).collect();
    let mut held: Vec<Event> = Vec::new();
    let mut teller = Teller {
        colour: std::io::stdout().is_terminal(),
        all: args.all,
        ..Teller::default()
    };
    loop {
        // Looked at before reading, so that nothing written before the file is missed.
        let stopping = args.stop_file.as_ref().is_some_and(|file| file.exists());
        for tail in &mut tails {
            held.extend(tail.read()?);
        }
        held.sort_by_key(|event| event.t_ns);
        let until = if stopping {
            u64::MAX
        } else {
            clock::unix_ns() - u64::try_from(HOLD.as_nanos())?
        };
        let ready = held.partition_point(|event| event.t_ns <= until);
        let mut out = std::io::stdout().lock();
        for event in held.drain(..ready) {
            if let Some(line) = teller.line(start_ns, &event) {
                writeln!(out, "{line}")?;
            }
        }
        out.flush()?;
        if stopping {
            return Ok(());
        }
        clock::sleep(POLL);
    }
}

/// Turns events into lines; remembers what it has said, so that it does not repeat itself.
#[derive(Debug, Default)]
pub(crate) struct Teller {
    colour: bool,
    all: bool,
    said: std::collections::BTreeMap<String, u32>,
}

/// Lines of one kind after which only `--all` prints more of it.
const REPEATS_MAX: u32 = 2;

impl Teller {
    /// The line for one event, none when it would only repeat.
    pub(crate) fn line(&mut self, start_ns: u64, event: &Event) -> Option<String> {
        // The lab's marks are for the report; what it has to say it says in notes.
        let mark = event.node == "lab" && event.event != "note";
        if !self.all && (mark || self.repeats(event)) {
            return None;
        }
        let since_ms = (i128::from(event.t_ns) - i128::from(start_ns)) / 1_000_000;
        let sign = if since_ms < 0 { "-" } else { "" };
        let since_ms = since_ms.abs();
        let time = format!("{sign}{}.{:03} s", since_ms / 1000, since_ms % 1000);
        let text = sentence(event);
        let who = match event.node.as_str() {
            "lab" => "lab ",
            "ping" => "ping",
            "a" => "A   ",
            "b" => "B   ",
            other => other,
        };
        Some(if self.colour {
            format!(
                "\x1b[2m{time:>10}\x1b[0m  {}{who}\x1b[0m {text}",
                colour(event)
            )
        } else {
            format!("{time:>10}  {who} {text}")
        })
    }

    /// Events that come in numbers are told a few times, then left out until a path changes.
    fn repeats(&mut self, event: &Event) -> bool {
        if event.node == "lab" {
            self.said.retain(|key, _| key.starts_with(FOR_GOOD));
            return false;
        }
        if event.event == "path" {
            return false;
        }
        let f = |field: &str| event.text(field);
        let (key, most) = match event.event.as_str() {
            // The test of a path is told by its result.
            "ping_tx" | "pong_rx" | "ping_rx"
                if matches!(
                    f("purpose").as_str(),
                    "validate" | "mtu" | "fragments" | "heartbeat"
                ) =>
            {
                return true;
            }
            "ping_tx" => (format!("{}{}", f("to"), f("via")), 1),
            "pong_rx" | "ping_rx" => (format!("{}{}", f("from"), f("via")), 1),
            "heartbeat" | "cmm_tx" | "cmm_rx" => (String::new(), REPEATS_MAX),
            "netmap" => (format!("{FOR_GOOD}{}", f("peers")), 1),
            "netcheck" => (format!("{FOR_GOOD}{}{}", f("region"), f("family")), 1),
            "derp_map" | "endpoints" => (format!("{FOR_GOOD}{}", f(&event.event)), REPEATS_MAX),
            _ => return false,
        };
        let mark = if key.starts_with(FOR_GOOD) {
            FOR_GOOD
        } else {
            ""
        };
        let key = format!("{mark}{}/{}/{key}", event.node, event.event);
        let count = self.said.entry(key).or_insert(0);
        *count += 1;
        *count > most
    }
}

/// Starts the keys of what stays said, whatever the lab does.
const FOR_GOOD: &str = "!";

fn colour(event: &Event) -> &'static str {
    match (
        event.node.as_str(),
        event.event.as_str(),
        event.text("state").as_str(),
    ) {
        (_, "path", "direct") => "\x1b[1;32m",
        (_, "path", "fallback" | "relay") => "\x1b[1;33m",
        (_, "ping_gap" | "derp_lost", _) => "\x1b[1;31m",
        ("a", _, _) => "\x1b[36m",
        ("b", _, _) => "\x1b[35m",
        ("lab", _, _) => "\x1b[1m",
        _ => "",
    }
}

/// One event in words.
pub(crate) fn sentence(event: &Event) -> String {
    let f = |field: &str| event.text(field);
    let ms = |field: &str| event.number(field).map_or_else(String::new, short_ms);
    let peer = || f("peer").to_uppercase();
    // Where a disco message went to or came from: an address, or a relay.
    let place = |field: &str| match f("via").as_str() {
        "relay" => format!("relay {}", f(field)),
        _ => f(field),
    };
    match event.event.as_str() {
        "note" => f("text"),
        "derp_map" => format!("has the relay map: {}", f("regions")),
        "netcheck" => format!(
            "measures relay {}: {} ({})",
            f("region"),
            ms("latency_ms"),
            f("family")
        ),
        "home" => format!(
            "chooses {} as its home relay ({})",
            f("region"),
            ms("latency_ms")
        ),
        "derp_connecting" => format!("connects to relay {} at {} by TLS", f("region"), f("addr")),
        "derp_connected" => format!(
            "is connected to relay {}{} after {}",
            f("region"),
            if f("home") == "true" {
                ", its home,"
            } else {
                ""
            },
            ms("ms")
        ),
        "derp_closed" => format!("closes its connection to relay {}", f("region")),
        "endpoints" => format!("can itself be reached at {}", f("endpoints")),
        "derp_lost" => format!("lost relay {}: {}", f("region"), f("error")),
        "netmap" => format!("has the network map: {} peer(s)", f("peers")),
        "peer" => match f("home").as_str() {
            "" => format!("learns of {}, which has no home relay yet", peer()),
            home => {
                format!(
                    "learns of {}: home {home}, endpoints {}",
                    peer(),
                    f("endpoints")
                )
            }
        },
        "relay_first" if f("dir") == "rx" => {
            format!(
                "gets the first packet from {} over relay {}",
                peer(),
                f("region")
            )
        }
        "relay_first" => format!(
            "sends its first packet to {} over relay {}",
            peer(),
            f("region")
        ),
        "ping_tx" => {
            let purpose = f("purpose").replace('_', " ");
            format!("disco Ping to {} at {} ({purpose})", peer(), place("to"))
        }
        "pong_rx" => {
            format!(
                "disco Pong from {} at {}: {}",
                peer(),
                place("from"),
                ms("rtt_ms")
            )
        }
        "ping_rx" => format!("answers a disco Ping of {} from {}", peer(), place("from")),
        "cmm_tx" => format!("sends CallMeMaybe to {}: {}", peer(), f("endpoints")),
        "cmm_rx" => format!("gets CallMeMaybe from {}: {}", peer(), f("endpoints")),
        "validate" => match f("phase").as_str() {
            "start" => format!("tests the path to {} at {}", peer(), f("addr")),
            "pass" => format!(
                "accepts {} for {}: {}, {} % lost, {} bytes pass",
                f("addr"),
                peer(),
                ms("rtt_ms"),
                f("loss_pct"),
                f("mtu")
            ),
            _ => format!(
                "passes over {} for {}: {} % lost",
                f("addr"),
                peer(),
                f("loss_pct")
            ),
        },
        "path" => {
            let addr = f("addr");
            let reason = match f("reason").as_str() {
                "" => String::new(),
                reason => format!(" ({reason})"),
            };
            match f("state").as_str() {
                "direct" => format!("==> {} is DIRECT at {addr}{reason}", peer()),
                "relay" => format!("==> {} by RELAY{reason}", peer()),
                "fallback" => format!("==> {} FALLS BACK to relay and {addr}{reason}", peer()),
                "probing" => format!("==> {} by relay, PROBING for a direct path{reason}", peer()),
                "held" => format!("==> {} HELD on the relay{reason}", peer()),
                other => format!("==> {} {other}{reason}", peer()),
            }
        }
        "heartbeat" => format!(
            "heartbeat of {} at {}: {}, {} % lost, jitter {}",
            peer(),
            f("addr"),
            ms("rtt_ms"),
            f("loss_pct"),
            ms("jitter_ms")
        ),
        "session" if f("up") == "true" => format!("has a WireGuard session with {}", peer()),
        "session" => format!("has no WireGuard session with {} any more", peer()),
        "ping_first" => format!("first answer through the tunnel, {}", ms("rtt_ms")),
        "ping_gap" => format!(
            "{} pings unanswered, a gap of {}",
            f("unanswered"),
            ms("ms")
        ),
        other => {
            let fields: Vec<_> = event
                .fields
                .keys()
                .map(|key| format!("{key} {}", event.text(key)))
                .collect();
            format!("{other}: {}", fields.join(", "))
        }
    }
}

fn short_ms(ms: f64) -> String {
    if ms >= 1000.0 {
        format!("{:.2} s", ms / 1000.0)
    } else if ms >= 10.0 {
        format!("{ms:.0} ms")
    } else {
        format!("{ms:.2} ms")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(line: &str) -> Event {
        serde_json::from_str(line).expect("a valid event")
    }

    #[test]
    fn a_line_has_time_since_start_speaker_and_words() {
        let got = event(
            r#"{"t_ns":3500000000,"node":"a","event":"home","region":"nyc","latency_ms":0.31}"#,
        );
        let line = Teller::default().line(2_000_000_000, &got);
        assert_eq!(
            line.as_deref(),
            Some("   1.500 s  A    chooses nyc as its home relay (0.31 ms)")
        );
    }

    #[test]
    fn heartbeats_are_not_repeated_for_ever_but_come_back_after_a_change() {
        let mut teller = Teller::default();
        let beat = event(r#"{"t_ns":1,"node":"a","event":"heartbeat","peer":"b","rtt_ms":1}"#);
        let lab = event(r#"{"t_ns":1,"node":"lab","event":"note","text":"blocked"}"#);
        let shown = (0..10).filter(|_| teller.line(0, &beat).is_some()).count();
        assert_eq!(shown, 2);
        assert!(teller.line(0, &lab).is_some());
        assert!(teller.line(0, &beat).is_some());
    }

    #[test]
    fn an_unknown_event_is_told_with_its_fields() {
        let got = event(r#"{"t_ns":1,"node":"c","event":"moon","phase":"full"}"#);
        assert_eq!(sentence(&got), "moon: phase full");
    }
}
