//! From a results directory to tables, one JSON file and one HTML page.
//!
//! A results directory holds what the run wrote: `machine.json`, `cells.jsonl` (see
//! [`crate::cell::Cell`]), `lab.events`, `a.events`, `b.events`, `ping.events` (see
//! [`crate::events::Event`]) and `ping.json`. Any of them may be missing.

#![forbid(unsafe_code)]

mod html;
mod story;
mod svg;
mod table;

pub(crate) use story::ActOne;

use crate::cell::{Cell, Kind};
use crate::ping;
use anyhow::Context;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// `report`: which directory, and what to make of it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The results directory.
    directory: PathBuf,
    /// Which act's tables to print.
    #[arg(long, value_enum, default_value_t = Act::Both)]
    act: Act,
    /// Write the page here.
    #[arg(long)]
    html: Option<PathBuf>,
    /// Write all results here, as JSON.
    #[arg(long)]
    json_out: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Act {
    One,
    Two,
    Both,
}

/// Prints tables and writes the files that were asked for.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let results = Results::read(&args.directory)?;
    if args.act != Act::Two {
        print!("{}", table::act_one(&results));
    }
    if args.act != Act::One {
        print!("{}", table::act_two(&results));
        print!("{}", table::targets(&results));
    }
    if let Some(path) = &args.json_out {
        std::fs::write(path, serde_json::to_vec_pretty(&results)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &args.html {
        std::fs::write(path, html::page(&results))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Everything a run found; this is also the JSON file.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    /// Name and version of this form.
    schema: &'static str,
    machine: Value,
    act_one: Option<ActOne>,
    /// Medians over rounds.
    rows: Vec<Row>,
    /// What was aimed at, and what was reached.
    targets: Vec<Target>,
    /// Every single measurement.
    cells: Vec<Cell>,
}

/// One program in one layout under one congestion control.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) program: String,
    pub(crate) path: String,
    pub(crate) layout: String,
    pub(crate) cc: String,
    /// By kind of traffic.
    pub(crate) figures: BTreeMap<Kind, Figures>,
}

impl Row {
    /// "ringtail direct", "tailscaled relay"; of the others the bare name, for theirs is direct.
    pub(crate) fn name(&self) -> String {
        if self.program == "ringtail" || self.path != "direct" {
            format!("{} {}", self.program, self.path)
        } else {
            self.program.clone()
        }
    }

    pub(crate) fn gbps(&self, kind: Kind) -> Option<f64> {
        Some(self.figures.get(&kind)?.gbps?.median)
    }

    pub(crate) fn cpu(&self, kind: Kind) -> Option<f64> {
        Some(self.figures.get(&kind)?.cpu_s_per_gb?.median)
    }
}

/// What one kind of traffic came to.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Figures {
    pub(crate) gbps: Option<Spread>,
    pub(crate) kpps: Option<Spread>,
    pub(crate) loss_pct: Option<Spread>,
    pub(crate) retransmits: Option<Spread>,
    pub(crate) cpu_s_per_gb: Option<Spread>,
    /// CPU seconds per GB of single processes.
    pub(crate) process_s_per_gb: BTreeMap<String, f64>,
    pub(crate) ping_p50_us: Option<Spread>,
    pub(crate) ping_p99_us: Option<Spread>,
    /// (percentile, microseconds) of the first round.
    pub(crate) ping_distribution: Vec<(f64, f64)>,
    /// Why a measurement is missing.
    pub(crate) errors: Vec<String>,
}

/// Median, least and greatest over rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// None of nothing.
    fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let (first, last) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        };
        Some(Spread {
            median,
            min: first,
            max: last,
        })
    }
}

/// A goal of this project, and where this run stands.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Target {
    pub(crate) what: String,
    pub(crate) goal: String,
    pub(crate) got: String,
    pub(crate) met: bool,
}

impl Results {
    /// Reads a results directory.
    pub(crate) fn read(directory: &Path) -> anyhow::Result<Results> {
        let machine = std::fs::read(directory.join("machine.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or(Value::Null);
        let mut cells: Vec<Cell> = Vec::new();
        if let Ok(text) = std::fs::read_to_string(directory.join("cells.jsonl")) {
            for line in text.lines() {
                cells.push(serde_json::from_str(line).context("a bad line in cells.jsonl")?);
            }
        }
        let act_one = ActOne::read(directory)?;
        let rows = rows(&cells);
        let targets = targets(&rows, act_one.as_ref());
        Ok(Results {
            schema: "ringtail-bench/1",
            machine,
            act_one,
            rows,
            targets,
            cells,
        })
    }

    /// Rows of a layout and congestion control.
    fn rows_of<'a>(&'a self, layout: &'a str, cc: &'a str) -> impl Iterator<Item = &'a Row> {
        self.rows
            .iter()
            .filter(move |row| row.layout == layout && row.cc == cc)
    }

    /// All (layout, congestion control) pairs, in order of appearance.
    fn layouts(&self) -> Vec<(String, String)> {
        let mut pairs = Vec::new();
        for row in &self.rows {
            let pair = (row.layout.clone(), row.cc.clone());
            if !pairs.contains(&pair) {
                pairs.push(pair);
            }
        }
        pairs
    }
}

/// Cells by program, layout and congestion control, in order of appearance. UDP and idle pings know
/// no congestion control: they stand in the first one's row only.
fn rows(cells: &[Cell]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let mut alike: Vec<BTreeMap<Kind, Vec<&Cell>>> = Vec::new();
    for cell in cells {
        let same = |row: &Row| {
            row.program == cell.program
                && row.path == cell.path
                && row.layout == cell.layout
                && row.cc == cell.cc
        };
        let at = rows.iter().position(same).unwrap_or_else(|| {
            rows.push(Row {
                program: cell.program.clone(),
                path: cell.path.clone(),
                layout: cell.layout.clone(),
                cc: cell.cc.clone(),
                figures: BTreeMap::new(),
            });
            alike.push(BTreeMap::new());
            rows.len() - 1
        });
        alike[at].entry(cell.kind).or_default().push(cell);
    }
    for (row, alike) in rows.iter_mut().zip(&alike) {
        row.figures = alike
            .iter()
            .map(|(kind, cells)| (*kind, figures(cells)))
            .collect();
    }
    rows
}

fn figures(cells: &[&Cell]) -> Figures {
    let spread = |value: &dyn Fn(&Cell) -> Option<f64>| {
        Spread::of(cells.iter().filter_map(|cell| value(cell)).collect())
    };
    let of_ping = |value: &dyn Fn(&ping::Summary) -> f64| {
        // A stream without a single answer has no percentiles.
        spread(&|cell| {
            cell.ping
                .as_ref()
                .filter(|ping| ping.lost < ping.sent)
                .map(value)
        })
    };
    let mut process_s_per_gb: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for cell in cells {
        let (Some(cpu), Some(traffic)) = (&cell.cpu, &cell.traffic) else {
            continue;
        };
        if traffic.bytes > 0.0 {
            for (name, seconds) in &cpu.processes_s {
                let cost = seconds / (traffic.bytes / 1e9);
                process_s_per_gb.entry(name.clone()).or_default().push(cost);
            }
        }
    }
    Figures {
        gbps: spread(&|cell| Some(cell.traffic?.gbps)),
        kpps: spread(&|cell| Some(cell.traffic?.pps? / 1e3)),
        loss_pct: spread(&|cell| cell.traffic?.loss_pct),
        retransmits: spread(&|cell| cell.traffic?.retransmits),
        cpu_s_per_gb: spread(&|cell| cell.cpu_s_per_gb),
        process_s_per_gb: process_s_per_gb
            .into_iter()
            .filter_map(|(name, costs)| Some((name, Spread::of(costs)?.median)))
            .collect(),
        ping_p50_us: of_ping(&|ping| ping.p50_us),
        ping_p99_us: of_ping(&|ping| ping.p99_us),
        ping_distribution: cells
            .iter()
            .find_map(|cell| Some(cell.ping.as_ref()?.distribution.clone()))
            .unwrap_or_default(),
        errors: cells.iter().filter_map(|cell| cell.error.clone()).collect(),
    }
}

/// The best figure of a program over all layouts under CUBIC: best is compared against best.
fn best(
    rows: &[Row],
    program: &str,
    path: &str,
    figure: impl Fn(&Row) -> Option<f64>,
) -> Option<f64> {
    rows.iter()
        .filter(|row| row.program == program && row.path == path && row.cc == "cubic")
        .filter_map(figure)
        .max_by(f64::total_cmp)
}

fn targets(rows: &[Row], act_one: Option<&ActOne>) -> Vec<Target> {
    let mut targets = Vec::new();
    let tcp1 = |program, path| best(rows, program, path, |row| row.gbps(Kind::Tcp1));
    // The least cost, as the greatest of its negative.
    let cost =
        |program, path| best(rows, program, path, |row| Some(-row.cpu(Kind::Tcp1)?)).map(|c| -c);
    let mut at_least = |what: &str, goal: f64, got: Option<f64>| {
        targets.extend(got.map(|got| Target {
            what: what.into(),
            goal: format!("at least {goal:.2}"),
            got: format!("{got:.2}"),
            met: got >= goal,
        }));
    };
    let direct = tcp1("ringtail", "direct");
    let over = |a: Option<f64>, b: Option<f64>| Some(a? / b.filter(|b| *b > 0.0)?);
    for (peer, goal) in [
        ("wireguard-go", 2.2),
        ("gotatun", 2.5),
        ("boringtun-cli", 2.5),
    ] {
        let ratio = over(direct, tcp1(peer, "direct"));
        let what = format!("TCP 1 stream, ringtail direct / {peer}");
        at_least(&what, goal, ratio);
    }
    let device = over(tcp1("ringtail-device", "direct"), direct);
    let what = "TCP 1 stream, ringtail device / ringtail direct";
    at_least(what, 0.9, device);
    for router in ["ringtail-router", "ringtail-router-snat"] {
        let ratio = over(tcp1(router, "direct"), direct);
        let what = format!("TCP 1 stream, {router} from host to host / ringtail direct");
        at_least(&what, 0.95, ratio);
    }
    let relay = over(tcp1("ringtail", "relay"), direct);
    let what = "TCP 1 stream, ringtail relay / ringtail direct";
    at_least(what, 0.25, relay);
    let mut at_most = |what: &str, goal: f64, got: Option<f64>, unit: &str| {
        targets.extend(got.map(|got| Target {
            what: what.into(),
            goal: format!("at most {goal}{unit}"),
            got: format!("{got:.2}{unit}"),
            met: got <= goal,
        }));
    };
    let cheaper = over(cost("ringtail", "direct"), cost("wireguard-go", "direct"));
    at_most(
        "CPU seconds per GB, ringtail direct / wireguard-go",
        0.45,
        cheaper,
        "",
    );
    if let Some(act_one) = act_one {
        at_most(
            "first packet until both ends are direct",
            0.5,
            act_one.direct_after_s(),
            " s",
        );
        at_most("pings lost from relay to direct", 0.0, act_one.lost(0), "");
        at_most(
            "blackout when the direct path dies silently",
            2.0,
            act_one.blackout_s(1),
            " s",
        );
    }
    targets
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cell::Traffic;
    use crate::cpu::Cost;

    pub(crate) fn cell(program: &str, path: &str, kind: Kind, round: u32, gbps: f64) -> Cell {
        Cell {
            program: program.into(),
            path: path.into(),
            layout: "unpinned".into(),
            cc: "cubic".into(),
            round,
            kind,
            error: None,
            traffic: Some(Traffic {
                bytes: 1e9,
                seconds: 4.0,
                gbps,
                ..Traffic::default()
            }),
            cpu: Some(Cost {
                machine_s: 2.0,
                ..Cost::default()
            }),
            cpu_s_per_gb: Some(8.0 / gbps),
            ping: None,
        }
    }

    pub(crate) fn results(cells: Vec<Cell>) -> Results {
        let rows = rows(&cells);
        let targets = targets(&rows, None);
        Results {
            schema: "test",
            machine: Value::Null,
            act_one: None,
            rows,
            targets,
            cells,
        }
    }

    #[test]
    fn a_spread_has_the_true_median_of_odd_and_even_counts() {
        assert_eq!(Spread::of(vec![]), None);
        assert_eq!(
            Spread::of(vec![3.0, 1.0, 2.0]),
            Some(Spread {
                median: 2.0,
                min: 1.0,
                max: 3.0
            })
        );
        assert_eq!(Spread::of(vec![4.0, 1.0]).map(|s| s.median), Some(2.5));
    }

    #[test]
    fn rounds_join_into_rows_and_keep_their_order() {
        let got = rows(&[
            cell("ringtail", "direct", Kind::Tcp1, 1, 4.0),
            cell("veth", "direct", Kind::Tcp1, 1, 20.0),
            cell("ringtail", "direct", Kind::Tcp1, 2, 6.0),
            cell("ringtail", "relay", Kind::Tcp1, 1, 1.0),
            cell("tailscaled", "direct", Kind::Tcp1, 1, 1.0),
            cell("tailscaled", "derper", Kind::Tcp1, 1, 1.0),
        ]);
        let names: Vec<_> = got.iter().map(Row::name).collect();
        assert_eq!(
            names,
            [
                "ringtail direct",
                "veth",
                "ringtail relay",
                "tailscaled",
                "tailscaled derper"
            ]
        );
        assert_eq!(got[0].gbps(Kind::Tcp1), Some(5.0));
    }

    #[test]
    fn targets_compare_best_with_best_and_say_when_they_are_missed() {
        let mut pinned = cell("wireguard-go", "direct", Kind::Tcp1, 1, 3.0);
        pinned.layout = "pinned".into();
        let rows = rows(&[
            cell("ringtail", "direct", Kind::Tcp1, 1, 4.0),
            cell("ringtail", "relay", Kind::Tcp1, 1, 1.2),
            cell("wireguard-go", "direct", Kind::Tcp1, 1, 2.0),
            pinned,
        ]);
        let got = targets(&rows, None);
        let met: Vec<_> = got.iter().map(|t| (t.got.as_str(), t.met)).collect();
        assert_eq!(met, [("1.33", false), ("0.30", true), ("0.75", false)]);
    }
}
