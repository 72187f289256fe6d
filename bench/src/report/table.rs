//! Tables for a terminal.

use super::{Figures, Results, Row, Spread};
use crate::cell::Kind;
use serde_json::Value;
use std::fmt::Write as _;

/// Act one: what each switch cost.
pub(super) fn act_one(results: &Results) -> String {
    let Some(act) = &results.act_one else {
        return String::new();
    };
    let mut rows = vec![header(
        "switch",
        ["pings", "lost", "blackout", "both ends direct after"],
    )];
    for switch in &act.switches {
        rows.push(vec![
            switch.name.clone(),
            switch.sent.to_string(),
            switch.lost.to_string(),
            format!("{:.2} s", switch.blackout_s),
            switch
                .direct_after_s
                .map_or_else(|| "-".into(), |after| format!("{after:.2} s")),
        ]);
    }
    format!("\n{}", grid(&rows))
}

/// Act two: the head, then one block of tables for each layout and congestion control.
pub(super) fn act_two(results: &Results) -> String {
    if results.rows.is_empty() {
        return String::new();
    }
    let mut text = format!("\n{}", head(&results.machine));
    let mut layouts: Vec<String> = Vec::new();
    for (layout, _) in results.layouts() {
        if !layouts.contains(&layout) {
            layouts.push(layout);
        }
    }
    for layout in layouts {
        let controls: Vec<String> = results
            .layouts()
            .into_iter()
            .filter(|(l, _)| *l == layout)
            .map(|(_, cc)| cc)
            .collect();
        let Some(cc) = controls.first() else { continue };
        let rows: Vec<&Row> = results.rows_of(&layout, cc).collect();
        let _ = writeln!(text, "\n{layout}, {}", cc.to_uppercase());
        text.push_str(&grid(&throughput(&rows)));
        text.push_str(
            "retransmits with one stream; pings p50 / p99 in us, loaded by four streams\n\n",
        );
        for other in &controls[1..] {
            let others: Vec<&Row> = results.rows_of(&layout, other).collect();
            text.push_str(&grid(&side_by_side(&rows, &others)));
            text.push('\n');
        }
        text.push_str(&grid(&costs(&rows)));
        for table in [packets(&rows), ratios(&rows)] {
            if table.len() > 1 {
                text.push('\n');
                text.push_str(&grid(&table));
            }
        }
        for row in results.rows.iter().filter(|row| row.layout == layout) {
            for (kind, figures) in &row.figures {
                for error in &figures.errors {
                    let _ = writeln!(text, "  {} {}: {error}", row.name(), kind.title());
                }
            }
        }
    }
    text
}

/// TCP under a second congestion control, each figure beside the first one's.
fn side_by_side(first: &[&Row], second: &[&Row]) -> Vec<Vec<String>> {
    let name = |rows: &[&Row]| {
        rows.first()
            .map_or_else(String::new, |row| row.cc.to_uppercase())
    };
    let mut heads = Vec::new();
    for kind in TCP {
        heads.push(format!("{} {}", kind.title(), name(first)));
        heads.push(name(second));
    }
    let mut table = vec![header(
        &format!("{} beside {}", name(first), name(second)),
        heads.iter().map(String::as_str),
    )];
    for row in first {
        let beside = second.iter().find(|other| other.name() == row.name());
        let mut line = vec![row.name()];
        for kind in TCP {
            for row in [Some(row), beside] {
                let figures = row.and_then(|row| row.figures.get(&kind));
                line.push(figures.map_or_else(dash, rate_and_cost));
            }
        }
        table.push(line);
    }
    table
}

/// What was aimed at and what was reached.
pub(super) fn targets(results: &Results) -> String {
    if results.targets.is_empty() {
        return String::new();
    }
    let mut rows = vec![header("target", ["goal", "got", ""])];
    for target in &results.targets {
        let verdict = if target.met { "met" } else { "MISSED" };
        rows.push(vec![
            target.what.clone(),
            target.goal.clone(),
            target.got.clone(),
            verdict.into(),
        ]);
    }
    format!("\n{}", grid(&rows))
}

/// The lines above all figures.
pub(super) fn head(machine: &Value) -> String {
    let text = |field: &str| match &machine[field] {
        Value::String(text) => text.clone(),
        Value::Null => "unknown".into(),
        other @ (Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            other.to_string()
        }
    };
    let list = |field: &str| -> String {
        machine[field].as_array().map_or_else(String::new, |items| {
            items
                .iter()
                .filter_map(Value::as_str)
                .collect::<Vec<_>>()
                .join(" ")
        })
    };
    let pairs = |field: &str| -> Vec<String> {
        machine[field].as_object().map_or_else(Vec::new, |map| {
            map.iter()
                .map(|(k, v)| format!("{k} {}", v.as_str().unwrap_or("?")))
                .collect()
        })
    };
    let mut versions: Vec<String> = machine["versions"]
        .as_object()
        .map_or_else(Vec::new, |map| {
            map.values()
                .filter_map(Value::as_str)
                .map(String::from)
                .collect()
        });
    versions.push(format!("commit {}", text("commit")));
    format!(
        "{}, {} x {} ({})\ncongestion control as named (always set; this kernel's default is {}), \
         qdisc {} on the veth ({} by default)\ninner MTU {}, {} shard(s) per node, {} s per test; \
         CPU is seconds of the whole machine per delivered GB\nveth offloads: {}\n{}\n",
        text("kernel"),
        text("cpus"),
        text("processor"),
        list("simd"),
        text("congestion_default"),
        text("qdisc_underlay"),
        text("qdisc_default"),
        text("mtu"),
        text("shards"),
        text("seconds"),
        pairs("offloads_underlay").join(", "),
        versions.join("; "),
    )
}

const TCP: [Kind; 4] = [Kind::Tcp1, Kind::Tcp4, Kind::Reverse, Kind::Bidir];

fn throughput(rows: &[&Row]) -> Vec<Vec<String>> {
    let mut table = vec![header(
        "Gb/s @ CPU s/GB",
        TCP.iter()
            .map(|kind| kind.title())
            .chain(["retransm.", "idle ping", "loaded ping"]),
    )];
    for row in rows {
        let mut line = vec![row.name()];
        for kind in TCP {
            line.push(row.figures.get(&kind).map_or_else(dash, rate_and_cost));
        }
        let retransmits = row.figures.get(&Kind::Tcp1).and_then(|f| f.retransmits);
        line.push(retransmits.map_or_else(dash, |spread| format!("{:.0}", spread.median)));
        for kind in [Kind::Ping, Kind::Tcp4] {
            line.push(row.figures.get(&kind).map_or_else(dash, ping));
        }
        table.push(line);
    }
    table
}

/// CPU seconds per GB of each process, TCP one stream.
fn costs(rows: &[&Row]) -> Vec<Vec<String>> {
    let names = ["left", "right", "relay", "iperf3-server"];
    let mut table = vec![header(
        "CPU s/GB, TCP 1 stream",
        ["machine", "node A", "node B", "relay", "iperf3 server"],
    )];
    for row in rows {
        let figures = row.figures.get(&Kind::Tcp1);
        let mut line = vec![row.name(), shown(figures, |f| f.cpu_s_per_gb, 2)];
        for name in names {
            let cost = figures.and_then(|f| f.process_s_per_gb.get(name));
            line.push(cost.map_or_else(dash, |cost| format!("{cost:.2}")));
        }
        table.push(line);
    }
    table
}

fn packets(rows: &[&Row]) -> Vec<Vec<String>> {
    let mut table = vec![header(
        "UDP at saturation",
        [
            "200 B kpps",
            "lost",
            "CPU s/GB",
            "full size kpps",
            "lost",
            "Gb/s",
            "CPU s/GB",
        ],
    )];
    for row in rows {
        let (small, full) = (
            row.figures.get(&Kind::UdpSmall),
            row.figures.get(&Kind::UdpFull),
        );
        if small.is_none() && full.is_none() {
            continue;
        }
        let kpps = |f| shown(f, |f| f.kpps, 0);
        let loss = |f: Option<&Figures>| {
            f.and_then(|f| f.loss_pct)
                .map_or_else(dash, |s| format!("{:.1} %", s.median))
        };
        let cost = |f| shown(f, |f| f.cpu_s_per_gb, 2);
        table.push(vec![
            row.name(),
            kpps(small),
            loss(small),
            cost(small),
            kpps(full),
            loss(full),
            shown(full, |f| f.gbps, 2),
            cost(full),
        ]);
    }
    table
}

/// How many times as fast, and at what part of the cost, ringtail direct is.
fn ratios(rows: &[&Row]) -> Vec<Vec<String>> {
    let Some(ours) = rows
        .iter()
        .find(|row| row.program == "ringtail" && row.path == "direct")
    else {
        return Vec::new();
    };
    let mut table = vec![header(
        "ringtail direct is … times",
        TCP.iter().map(|kind| kind.title()).chain([
            "UDP 200 B",
            "UDP full size",
            "CPU of (1 stream)",
        ]),
    )];
    for row in rows {
        if row.name() == ours.name() {
            continue;
        }
        let mut line = vec![row.name()];
        for kind in TCP.into_iter().chain([Kind::UdpSmall, Kind::UdpFull]) {
            line.push(ratio(ours.gbps(kind), row.gbps(kind)));
        }
        line.push(ratio(ours.cpu(Kind::Tcp1), row.cpu(Kind::Tcp1)));
        table.push(line);
    }
    if table.len() > 1 { table } else { Vec::new() }
}

fn ratio(ours: Option<f64>, theirs: Option<f64>) -> String {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if theirs > 0.0 => format!("{:.2}", ours / theirs),
        (Some(_) | None, Some(_) | None) => dash(),
    }
}

fn rate_and_cost(figures: &Figures) -> String {
    let Some(gbps) = figures.gbps else {
        return if figures.errors.is_empty() {
            dash()
        } else {
            "failed".into()
        };
    };
    let cost = figures
        .cpu_s_per_gb
        .map_or_else(String::new, |s| format!(" @{:.2}", s.median));
    format!("{}{cost}", spread(gbps, 2))
}

fn ping(figures: &Figures) -> String {
    match (figures.ping_p50_us, figures.ping_p99_us) {
        (Some(p50), Some(p99)) => format!("{:.0} / {:.0}", p50.median, p99.median),
        (Some(_) | None, Some(_) | None) => dash(),
    }
}

/// A figure, or a dash where there is none.
fn shown(
    figures: Option<&Figures>,
    figure: impl Fn(&Figures) -> Option<Spread>,
    digits: usize,
) -> String {
    figures
        .and_then(figure)
        .map_or_else(dash, |s| spread(s, digits))
}

/// The median, and the range where rounds differ.
fn spread(spread: Spread, digits: usize) -> String {
    let Spread { median, min, max } = spread;
    if min < max {
        format!("{median:.digits$} ({min:.digits$}-{max:.digits$})")
    } else {
        format!("{median:.digits$}")
    }
}

fn dash() -> String {
    "-".into()
}

fn header<'a>(first: &'a str, rest: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    std::iter::once(first)
        .chain(rest)
        .map(String::from)
        .collect()
}

/// Columns as wide as their widest cell; the first to the left, the others to the right.
fn grid(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
        })
        .map(Option::unwrap_or_default)
        .collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            let _ = if column == 0 {
                write!(text, "{cell:<width$}")
            } else {
                write!(text, "  {cell:>width$}")
            };
        }
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
        if number == 0 {
            let width = widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1);
            let _ = writeln!(text, "{}", "-".repeat(width));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::tests::{cell, results};
    use super::*;

    #[test]
    fn a_grid_lines_up() {
        let rows = [
            vec!["x".to_string(), "longer".into()],
            vec!["yy".into(), "1".into()],
        ];
        assert_eq!(grid(&rows), "x   longer\n----------\nyy       1\n");
    }

    #[test]
    fn tables_show_rates_costs_and_ratios() {
        let got = results(vec![
            cell("ringtail", "direct", Kind::Tcp1, 1, 5.0),
            cell("wireguard-go", "direct", Kind::Tcp1, 1, 2.0),
            cell("gotatun", "direct", Kind::Tcp1, 1, 4.0),
        ]);
        let text = act_two(&got);
        assert!(text.contains("5.00 @1.60"), "{text}");
        let ratio = text.lines().rfind(|line| line.starts_with("wireguard-go"));
        assert!(
            ratio.is_some_and(|line| line.contains("2.50") && line.contains("0.40")),
            "{text}"
        );
        let targets = targets(&got);
        let ends = |what: &str| {
            let line = targets.lines().find(|line| line.starts_with(what));
            line.and_then(|line| line.split_whitespace().last())
        };
        let of = |peer| format!("TCP 1 stream, ringtail direct / {peer}");
        assert_eq!(ends(&of("wireguard-go")), Some("met"), "{targets}");
        assert_eq!(ends(&of("gotatun")), Some("MISSED"), "{targets}");
        assert_eq!(ends("CPU seconds per GB"), Some("met"), "{targets}");
    }

    #[test]
    fn a_second_congestion_control_stands_beside_the_first() {
        let mut bbr = cell("ringtail", "direct", Kind::Tcp1, 1, 5.5);
        bbr.cc = "bbr".into();
        let text = act_two(&results(vec![
            cell("ringtail", "direct", Kind::Tcp1, 1, 4.0),
            bbr,
        ]));
        let line = text.lines().find(|line| line.contains("5.50"));
        assert!(line.is_some_and(|line| line.contains("4.00")), "{text}");
    }

    #[test]
    fn a_failed_cell_is_shown_as_such_with_its_reason() {
        let mut bad = cell("gotatun", "direct", Kind::Tcp1, 1, 0.0);
        bad.traffic = None;
        bad.error = Some("it broke".into());
        let text = act_two(&results(vec![bad]));
        assert!(
            text.contains("failed") && text.contains("it broke"),
            "{text}"
        );
    }
}
