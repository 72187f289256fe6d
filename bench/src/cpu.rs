//! What work costs: CPU seconds of the whole machine and of single processes.
//!
//! The machine's figure is `CPUs x wall time - (idle + iowait)`: the kernel's user and system
//! columns are sampled by the tick and wrong by a large factor at partial load, while idle time
//! is exact. A process's user plus system total is exact; how it splits between the two is not,
//! so only the sum is shown. Time stolen by a hypervisor counts as used, and is reported beside.

#![forbid(unsafe_code)]

use crate::clock;
use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// `USER_HZ`: the unit of every figure in /proc is 10 ms on all Linux builds of today.
const TICKS_PER_SECOND: f64 = 100.0;

/// A process to account for: `NAME=PID`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) name: String,
    pub(crate) pid: u32,
}

impl std::str::FromStr for Process {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Process> {
        let (name, pid) = text
            .split_once('=')
            .ok_or_else(|| anyhow!("want NAME=PID: {text}"))?;
        Ok(Process {
            name: name.into(),
            pid: pid.parse().context("bad process id")?,
        })
    }
}

/// CPU seconds spent over a span.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cost {
    /// Length of the span in seconds.
    pub(crate) wall_s: f64,
    /// Busy CPU seconds of the whole machine.
    pub(crate) machine_s: f64,
    /// The part of them that a hypervisor took.
    pub(crate) steal_s: f64,
    /// User plus system seconds per named process; a process that ended is left out.
    pub(crate) processes_s: BTreeMap<String, f64>,
}

/// A reading of all counters, taken at the start of a span.
#[derive(Debug)]
pub(crate) struct Meter {
    started: Instant,
    machine: Machine,
    processes: Vec<(Process, f64)>,
}

impl Meter {
    /// Reads every counter now.
    pub(crate) fn start(processes: &[Process]) -> anyhow::Result<Meter> {
        Ok(Meter {
            started: clock::now(),
            machine: Machine::read()?,
            processes: processes
                .iter()
                .filter_map(|p| Some((p.clone(), process_seconds(p.pid)?)))
                .collect(),
        })
    }

    /// The cost since `start`.
    pub(crate) fn stop(&self) -> anyhow::Result<Cost> {
        let machine = Machine::read()?;
        let wall_s = clock::now().duration_since(self.started).as_secs_f64();
        let mut processes_s = BTreeMap::new();
        for (process, before) in &self.processes {
            if let Some(after) = process_seconds(process.pid) {
                *processes_s.entry(process.name.clone()).or_insert(0.0) += after - before;
            }
        }
        Ok(Cost {
            wall_s,
            machine_s: (machine.cpus * wall_s - (machine.idle_s - self.machine.idle_s)).max(0.0),
            steal_s: machine.steal_s - self.machine.steal_s,
            processes_s,
        })
    }
}

#[derive(Debug, PartialEq)]
struct Machine {
    cpus: f64,
    idle_s: f64,
    steal_s: f64,
}

impl Machine {
    fn read() -> anyhow::Result<Machine> {
        let text = std::fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        Machine::parse(&text).ok_or_else(|| anyhow!("/proc/stat has an unknown form"))
    }

    fn parse(text: &str) -> Option<Machine> {
        let total = text.lines().find(|line| line.starts_with("cpu "))?;
        let columns: Vec<f64> = total
            .split_ascii_whitespace()
            .skip(1)
            .map_while(|word| word.parse().ok())
            .collect();
        let cpus = text
            .lines()
            .filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "))
            .count();
        Some(Machine {
            cpus: f64::from(u32::try_from(cpus).ok()?),
            idle_s: (columns.get(3)? + columns.get(4)?) / TICKS_PER_SECOND,
            steal_s: columns.get(7).copied().unwrap_or(0.0) / TICKS_PER_SECOND,
        })
    }
}

/// User plus system seconds of a process and all its threads, none once it is gone.
fn process_seconds(pid: u32) -> Option<f64> {
    parse_process(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name in parentheses may hold spaces and parentheses, so fields count from the last one.
fn parse_process(stat: &str) -> Option<f64> {
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_ascii_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_line_gives_idle_with_iowait_and_the_number_of_cpus() {
        let text = "cpu  100 0 50 900 100 0 5 25 0 0\ncpu0 1 2 3\ncpu1 1 2 3\nintr 5\n";
        let got = Machine::parse(text);
        assert_eq!(
            got,
            Some(Machine {
                cpus: 2.0,
                idle_s: 10.0,
                steal_s: 0.25
            })
        );
    }

    #[test]
    fn a_process_name_with_spaces_and_parentheses_shifts_no_field() {
        let stat = "42 (a ) b(c) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0";
        assert_eq!(parse_process(stat), Some(2.0));
    }

    #[test]
    fn a_busy_loop_costs_about_its_own_time() -> anyhow::Result<()> {
        let me = Process {
            name: "me".into(),
            pid: std::process::id(),
        };
        let meter = Meter::start(&[me])?;
        let start = clock::now();
        let mut spun = 0u64;
        while start.elapsed().as_millis() < 300 {
            spun = std::hint::black_box(spun + 1);
        }
        let cost = meter.stop()?;
        assert!(cost.processes_s["me"] > 0.05, "{cost:?}");
        assert!(cost.machine_s > 0.05, "{cost:?}");
        Ok(())
    }

    #[test]
    fn a_process_is_given_as_name_and_id() {
        let got: Process = "a=17".parse().expect("well formed");
        assert_eq!(
            got,
            Process {
                name: "a".into(),
                pid: 17
            }
        );
        assert!("17".parse::<Process>().is_err());
    }
}
