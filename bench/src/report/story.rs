//! Act one in figures: when each end was on which path, and what every switch cost.

use crate::events::{self, Event};
use crate::ping::Echo;
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The three switches, by the lab's event that starts each; the next one's start ends it.
const SWITCHES: [(&str, &str); 3] = [
    ("ping_start", "relay to direct"),
    ("block", "direct path blocked, fallback to relay"),
    ("unblock", "direct again"),
];

/// A ping that was under way for so long at most when the direct path was blocked was lost by that, and
/// not by the switch before.
const UNDER_WAY_MAX_NS: u64 = 250_000_000;

/// What happened in act one. Times are seconds since its start.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ActOne {
    /// Each end's path from a time on.
    pub(crate) paths: Vec<PathChange>,
    pub(crate) switches: Vec<Switch>,
    /// What the lab did, for the chart.
    pub(crate) marks: Vec<(f64, String)>,
    /// Send time and round trip in milliseconds; none was lost.
    pub(crate) pings: Vec<(f64, Option<f64>)>,
    pub(crate) end_s: f64,
    /// All events, as the nodes wrote them.
    pub(crate) events: Vec<Event>,
}

/// A node's path changes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct PathChange {
    pub(crate) at_s: f64,
    pub(crate) node: String,
    pub(crate) state: String,
    pub(crate) addr: String,
}

/// One switch of paths under a ping stream.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Switch {
    pub(crate) name: String,
    pub(crate) from_s: f64,
    pub(crate) to_s: f64,
    pub(crate) sent: usize,
    pub(crate) lost: usize,
    /// The longest time without an answered ping.
    pub(crate) blackout_s: f64,
    /// From the switch's start until both ends were direct.
    pub(crate) direct_after_s: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct PingFile {
    echoes: Vec<Echo>,
}

impl ActOne {
    /// Reads the event files; none when act one was not played.
    pub(crate) fn read(directory: &Path) -> anyhow::Result<Option<ActOne>> {
        let files: Vec<_> = ["lab", "a", "b", "ping"]
            .map(|n| directory.join(format!("{n}.events")))
            .into();
        let all = events::read_all(&files)?;
        let echoes = match std::fs::read(directory.join("ping.json")) {
            Ok(bytes) => {
                serde_json::from_slice::<PingFile>(&bytes)
                    .context("ping.json")?
                    .echoes
            }
            Err(_) => Vec::new(),
        };
        Ok(ActOne::of(all, &echoes))
    }

    fn of(events: Vec<Event>, echoes: &[Echo]) -> Option<ActOne> {
        let lab = |name: &str| {
            events
                .iter()
                .find(|e| e.node == "lab" && e.event == name)
                .map(|e| e.t_ns)
        };
        let start_ns = lab("start")?;
        let end_ns = lab("end").or_else(|| events.last().map(|e| e.t_ns))?;
        let since = |t_ns: u64| seconds(t_ns) - seconds(start_ns);
        let paths: Vec<PathChange> = events
            .iter()
            .filter(|event| event.event == "path")
            .map(|event| PathChange {
                at_s: since(event.t_ns),
                node: event.node.clone(),
                state: event.text("state"),
                addr: event.text("addr"),
            })
            .collect();
        let starts: Vec<(u64, &str)> = SWITCHES
            .iter()
            .filter_map(|(mark, name)| Some((lab(mark)?, *name)))
            .collect();
        let first_sent = |at_ns: u64| {
            if lab("block") == Some(at_ns) {
                first_lost(
                    &echoes[..echoes.partition_point(|echo| echo.sent_ns < at_ns)],
                    at_ns,
                )
            } else {
                at_ns
            }
        };
        let mut switches = Vec::new();
        for (index, (from_ns, name)) in starts.iter().enumerate() {
            let to_ns = starts.get(index + 1).map_or(end_ns, |(next, _)| *next);
            let (from_s, to_s) = (since(*from_ns), since(to_ns));
            let sent = first_sent(*from_ns)..first_sent(to_ns);
            let within: Vec<Echo> = echoes
                .iter()
                .filter(|echo| sent.contains(&echo.sent_ns))
                .copied()
                .collect();
            switches.push(Switch {
                name: (*name).into(),
                from_s,
                to_s,
                sent: within.len(),
                lost: within.iter().filter(|echo| echo.rtt_us.is_none()).count(),
                blackout_s: blackout_s(&within),
                direct_after_s: both_direct_at(&paths, from_s, to_s)
                    .filter(|_| !name.contains("blocked"))
                    .map(|at| at - from_s),
            });
        }
        let marks = ["ping_start", "block", "unblock"]
            .iter()
            .filter_map(|name| Some((since(lab(name)?), name.replace('_', " "))))
            .collect();
        Some(ActOne {
            paths,
            switches,
            marks,
            pings: echoes
                .iter()
                .map(|echo| (since(echo.sent_ns), echo.rtt_us.map(|us| us / 1e3)))
                .collect(),
            end_s: since(end_ns),
            events,
        })
    }

    /// Seconds from the first packet until both ends were direct.
    pub(crate) fn direct_after_s(&self) -> Option<f64> {
        self.switches.first()?.direct_after_s
    }

    /// Pings lost in a switch.
    pub(crate) fn lost(&self, switch: usize) -> Option<f64> {
        let lost = u32::try_from(self.switches.get(switch)?.lost).ok()?;
        Some(f64::from(lost))
    }

    /// Longest silence in a switch.
    pub(crate) fn blackout_s(&self, switch: usize) -> Option<f64> {
        Some(self.switches.get(switch)?.blackout_s)
    }
}

/// When the later of two ends first became direct between two times.
fn both_direct_at(paths: &[PathChange], from_s: f64, to_s: f64) -> Option<f64> {
    let first = |node: &str| {
        let mut own = paths
            .iter()
            .filter(|change| change.node == node && change.state == "direct");
        own.find(|change| (from_s..to_s).contains(&change.at_s))
            .map(|change| change.at_s)
    };
    Some(first("a")?.max(first("b")?))
}

/// Longest time between two answered pings' sending that had only lost ones between; a silence at
/// the end counts up to the last ping.
fn blackout_s(echoes: &[Echo]) -> f64 {
    let mut longest = 0.0f64;
    let mut lost_since: Option<u64> = None;
    for echo in echoes {
        if let Some(since) = lost_since {
            longest = longest.max(seconds(echo.sent_ns - since));
        }
        match echo.rtt_us {
            None => lost_since = lost_since.or(Some(echo.sent_ns)),
            Some(_) => lost_since = None,
        }
    }
    longest
}

/// When the first of those pings was sent that were lost one after the other right up to `at_ns`;
/// `at_ns` if there are none.
fn first_lost(before: &[Echo], at_ns: u64) -> u64 {
    before
        .iter()
        .rev()
        .take_while(|echo| echo.rtt_us.is_none() && at_ns - echo.sent_ns <= UNDER_WAY_MAX_NS)
        .last()
        .map_or(at_ns, |echo| echo.sent_ns)
}

fn seconds(t_ns: u64) -> f64 {
    std::time::Duration::from_nanos(t_ns).as_secs_f64()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    pub(crate) fn act_one() -> ActOne {
        let line = |text: &str| serde_json::from_str::<Event>(text).expect("a valid event");
        let mut events = Vec::new();
        for (t, name) in [
            (0, "start"),
            (2, "ping_start"),
            (10, "block"),
            (20, "unblock"),
            (30, "end"),
        ] {
            events.push(line(&format!(
                r#"{{"t_ns":{},"node":"lab","event":"{name}"}}"#,
                t * S
            )));
        }
        for (ms, node, state) in [
            (2_300, "a", "direct"),
            (2_400, "b", "direct"),
            (11_200, "a", "fallback"),
            (11_300, "b", "fallback"),
            (23_000, "a", "direct"),
            (22_000, "b", "direct"),
        ] {
            events.push(line(&format!(
                r#"{{"t_ns":{},"node":"{node}","event":"path","state":"{state}","addr":"x"}}"#,
                ms * 1_000_000u64
            )));
        }
        events.sort_by_key(|event| event.t_ns);
        let echoes: Vec<Echo> = (200..3000u64)
            .map(|n| Echo {
                sent_ns: n * 10_000_000,
                rtt_us: (!(1000..1120).contains(&n)).then_some(500.0),
            })
            .collect();
        ActOne::of(events, &echoes).expect("a start")
    }

    #[test]
    fn every_switch_has_its_losses_and_its_blackout() {
        let got = act_one();
        let lost: Vec<_> = got.switches.iter().map(|switch| switch.lost).collect();
        assert_eq!(lost, [0, 120, 0]);
        assert!((got.switches[1].blackout_s - 1.2).abs() < 1e-6);
        assert!((got.direct_after_s().expect("direct") - 0.4).abs() < 1e-6);
        assert!((got.switches[2].direct_after_s.expect("direct") - 3.0).abs() < 1e-6);
        assert_eq!(got.switches[1].direct_after_s, None);
    }

    #[test]
    fn pings_under_way_when_the_path_is_blocked_are_lost_by_that() {
        let echoes = |lost: &[u64]| -> Vec<Echo> {
            let echo = |n| Echo {
                sent_ns: n * 10_000_000,
                rtt_us: (!lost.contains(&n)).then_some(500.0),
            };
            (200..1000).map(echo).collect()
        };
        let at = 10 * S;
        assert_eq!(first_lost(&echoes(&[]), at), at);
        assert_eq!(first_lost(&echoes(&[990, 998, 999]), at), 998 * 10_000_000);
        // So long nothing is under way.
        let all: Vec<u64> = (900..1000).collect();
        assert_eq!(first_lost(&echoes(&all), at), 975 * 10_000_000);
    }

    #[test]
    fn without_a_start_there_was_no_act_one() {
        assert!(ActOne::of(Vec::new(), &[]).is_none());
    }
}
