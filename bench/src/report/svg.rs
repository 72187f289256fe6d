//! The charts, as inline SVG. Colours are CSS variables of the page, so that they follow its theme.

use super::story::ActOne;
use super::{Figures, Results, Row, Spread};
use crate::cell::Kind;
use std::fmt::Write as _;

/// Colours of the page, by program, so that one program looks the same in every chart.
pub(super) fn colour(name: &str) -> &'static str {
    match name {
        "ringtail direct" => "var(--c1)",
        "ringtail relay" => "var(--c2)",
        "ringtail-device" => "var(--c7)",
        "wireguard-go" => "var(--c3)",
        "boringtun-cli" => "var(--c4)",
        "gotatun" => "var(--c5)",
        "kernel" => "var(--c6)",
        _ => "var(--muted)",
    }
}

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// One bar: its label; its length, least and greatest over rounds.
struct Bar {
    name: String,
    spread: Spread,
}

/// Horizontal bars. A plain link may be many times faster than any tunnel: what exceeds the
/// others by far is cut, with its figure beside it.
fn bars(title: &str, unit: &str, bars: &[Bar]) -> String {
    const WIDTH: f64 = 420.0;
    const LEFT: f64 = 112.0;
    const ROW: f64 = 24.0;
    const ROOM_FOR_FIGURE: f64 = 92.0;
    if bars.is_empty() {
        return String::new();
    }
    let most = |names: &dyn Fn(&Bar) -> bool| {
        bars.iter()
            .filter(|bar| names(bar))
            .map(|bar| bar.spread.median)
            .fold(0.0, f64::max)
    };
    let tunnels = most(&|bar| bar.name != "veth");
    let all = most(&|_| true);
    let full = if tunnels > 0.0 && all > tunnels * 1.6 {
        tunnels * 1.25
    } else {
        all
    };
    let scale = (WIDTH - LEFT - ROOM_FOR_FIGURE) / if full > 0.0 { full } else { 1.0 };
    let height = 30.0 + ROW * f64::from(u32::try_from(bars.len()).unwrap_or(0)) + 4.0;
    let mut svg = format!(
        "<svg viewBox='0 0 {WIDTH} {height}' role='img'><title>{t}</title>\
         <text class='t' x='0' y='15'>{t}</text>",
        t = escape(&format!("{title}, {unit}"))
    );
    let mut y = 30.0;
    for bar in bars {
        let Spread { median, min, max } = bar.spread;
        let cut = median > full;
        let length = (median.min(full) * scale).max(1.0);
        let middle = y + 12.5;
        let _ = write!(
            svg,
            "<text x='{x}' y='{middle}' text-anchor='end'>{name}</text>\
             <rect x='{LEFT}' y='{y}' width='{length:.1}' height='17' rx='2' fill='{colour}'/>",
            x = LEFT - 8.0,
            name = escape(&bar.name),
            colour = colour(&bar.name),
        );
        if cut {
            // Two slanted gaps: this bar is longer than it is drawn.
            for gap in [14.0, 8.0] {
                let x = LEFT + length - gap;
                let _ = write!(
                    svg,
                    "<path d='M{x:.1} {a:.1} l-5 19' stroke='var(--bg)' stroke-width='2.5'/>",
                    a = y - 1.0
                );
            }
        }
        let mut figure = short(median);
        if min < max {
            let (a, b) = (LEFT + min.min(full) * scale, LEFT + max.min(full) * scale);
            let _ = write!(
                svg,
                "<path d='M{a:.1} {m:.1} H{b:.1}' stroke='var(--fg)' stroke-width='1.5'/>",
                m = y + 8.5
            );
            figure = format!("{figure} ({}–{})", short(min), short(max));
        }
        let _ = write!(
            svg,
            "<text class='v' x='{x:.1}' y='{middle}'>{figure}</text>",
            x = LEFT + length + 6.0
        );
        y += ROW;
    }
    svg.push_str("</svg>");
    svg
}

/// Three digits that matter.
fn short(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// A chart of bars for every kind of traffic.
pub(super) fn throughput(rows: &[&Row]) -> String {
    let rate = |kind| chart(rows, kind, "Gb/s", |figures| figures.gbps);
    [
        rate(Kind::Tcp1),
        rate(Kind::Tcp4),
        rate(Kind::Reverse),
        rate(Kind::Bidir),
        chart(rows, Kind::UdpSmall, "kpps", |figures| figures.kpps),
        rate(Kind::UdpFull),
    ]
    .concat()
}

/// CPU seconds of the whole machine per delivered GB.
pub(super) fn costs(rows: &[&Row]) -> String {
    let unit = "CPU s/GB, less is better";
    let cost = |kind| chart(rows, kind, unit, |figures| figures.cpu_s_per_gb);
    [Kind::Tcp1, Kind::Tcp4].map(cost).concat()
}

/// A bar for every program that has such a figure.
fn chart(
    rows: &[&Row],
    kind: Kind,
    unit: &str,
    figure: impl Fn(&Figures) -> Option<Spread>,
) -> String {
    let bar = |row: &&Row| {
        Some(Bar {
            name: row.name(),
            spread: figure(row.figures.get(&kind)?)?,
        })
    };
    let list: Vec<Bar> = rows.iter().filter_map(bar).collect();
    bars(kind.title(), unit, &list)
}

/// Latency by percentile, one line a program; both axes logarithmic (the tail in the x axis).
pub(super) fn latencies(rows: &[&Row]) -> String {
    let mut charts = String::new();
    for (kind, title) in [(Kind::Ping, "idle"), (Kind::Tcp4, "under 4 TCP streams")] {
        let lines: Vec<(String, &[(f64, f64)])> = rows
            .iter()
            .filter_map(|row| {
                let points = row.figures.get(&kind)?.ping_distribution.as_slice();
                (!points.is_empty()).then(|| (row.name(), points))
            })
            .collect();
        charts.push_str(&distribution(title, &lines));
    }
    charts
}

fn distribution(title: &str, lines: &[(String, &[(f64, f64)])]) -> String {
    const WIDTH: f64 = 420.0;
    const HEIGHT: f64 = 280.0;
    const LEFT: f64 = 52.0;
    const RIGHT: f64 = 104.0;
    const TOP: f64 = 28.0;
    const BOTTOM: f64 = 30.0;
    let values = || {
        lines
            .iter()
            .flat_map(|(_, points)| points.iter().map(|point| point.1))
    };
    let most = values().fold(0.0, f64::max);
    if most <= 0.0 {
        return String::new();
    }
    let low = values()
        .filter(|v| *v > 0.0)
        .fold(f64::MAX, f64::min)
        .log10()
        .floor();
    let high = most.log10().ceil().max(low + 1.0);
    // 0 at the median's left end, 1 for 90, 2 for 99, 3 for 99.9 percent.
    let x = |percentile: f64| {
        let tail = -(1.0 - percentile.min(99.9) / 100.0).log10();
        LEFT + tail / 3.0 * (WIDTH - LEFT - RIGHT)
    };
    let y = |us: f64| {
        let part = (us.max(10f64.powf(low)).log10() - low) / (high - low);
        HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)
    };
    let mut svg = format!(
        "<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'><title>ping {t}</title>\
         <text class='t' x='0' y='15'>ping, {t}, microseconds</text>",
        t = escape(title)
    );
    svg += &decades((low, high), (LEFT, WIDTH - RIGHT), "", y);
    for percentile in [50.0, 90.0, 99.0, 99.9] {
        let _ = write!(
            svg,
            "<path class='g' d='M{p:.1} {TOP} V{b}'/><text x='{p:.1}' y='{t}' text-anchor='middle'>p{percentile}</text>",
            p = x(percentile),
            b = HEIGHT - BOTTOM,
            t = HEIGHT - BOTTOM + 17.0
        );
    }
    let mut labels: Vec<(f64, &str)> = Vec::new();
    for (name, points) in lines {
        let path: Vec<String> = points
            .iter()
            .filter(|(percentile, _)| *percentile < 100.0)
            .map(|(percentile, us)| format!("{:.1} {:.1}", x(*percentile), y(*us)))
            .collect();
        let _ = write!(
            svg,
            "<path d='M{}' fill='none' stroke='{}' stroke-width='2'/>",
            path.join(" L"),
            colour(name)
        );
        if let Some((_, us)) = points.iter().rfind(|(percentile, _)| *percentile < 100.0) {
            labels.push((y(*us), name));
        }
    }
    // Names stand at the ends of their lines, pushed apart where they would overlap.
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut last = f64::MIN;
    for (at, name) in labels {
        let at = at.max(last + 13.0);
        last = at;
        let _ = write!(
            svg,
            "<text x='{tx}' y='{ty:.1}' style='fill:{c}'>{n}</text>",
            tx = WIDTH - RIGHT + 6.0,
            ty = at + 4.0,
            c = colour(name),
            n = escape(name)
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Act one: each end's path over time, and every ping with its round trip or its loss.
pub(super) fn timeline(results: &Results) -> String {
    let Some(act) = &results.act_one else {
        return String::new();
    };
    const WIDTH: f64 = 900.0;
    const HEIGHT: f64 = 300.0;
    const LEFT: f64 = 60.0;
    const LANE: f64 = 22.0;
    const TOP: f64 = 34.0;
    const BOTTOM: f64 = 26.0;
    let end = act.end_s.max(1.0);
    let x = |s: f64| LEFT + s.clamp(0.0, end) / end * (WIDTH - LEFT - 6.0);
    let lanes_bottom = TOP + 2.0 * (LANE + 6.0);
    let (low, high) = rtt_decades(act);
    let y = |ms: f64| {
        let part = ((ms.log10() - low) / (high - low)).clamp(0.0, 1.0);
        HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - lanes_bottom - 22.0)
    };
    let mut svg = format!(
        "<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'><title>paths and pings over time</title>"
    );
    for (lane, node) in ["a", "b"].iter().enumerate() {
        let top = TOP + f64::from(u32::try_from(lane).unwrap_or(0)) * (LANE + 6.0);
        let _ = write!(
            svg,
            "<text x='{}' y='{}' text-anchor='end'>{}</text>",
            LEFT - 8.0,
            top + 15.0,
            node.to_uppercase()
        );
        let own: Vec<_> = act
            .paths
            .iter()
            .filter(|change| change.node == *node)
            .collect();
        let mut spans = vec![(0.0, "relay")];
        spans.extend(
            own.iter()
                .map(|change| (change.at_s, change.state.as_str())),
        );
        for (index, (from, state)) in spans.iter().enumerate() {
            let to = spans.get(index + 1).map_or(end, |next| next.0);
            if to <= *from {
                continue;
            }
            let width = x(to) - x(*from);
            let _ = write!(
                svg,
                "<rect x='{:.1}' y='{top}' width='{width:.1}' height='{LANE}' class='s-{state}'><title>{} s {state}</title></rect>",
                x(*from),
                short(*from)
            );
            if width > 44.0 {
                let _ = write!(
                    svg,
                    "<text class='in' x='{:.1}' y='{}'>{}</text>",
                    x(*from) + 5.0,
                    top + 15.0,
                    escape(state)
                );
            }
        }
    }
    for (at, name) in &act.marks {
        let _ = write!(
            svg,
            "<path class='m' d='M{a:.1} 20 V{b}'/><text x='{c:.1}' y='14'>{d}</text>",
            a = x(*at),
            b = HEIGHT - BOTTOM,
            c = x(*at) - 2.0,
            d = escape(name)
        );
    }
    svg += &decades((low, high), (LEFT, WIDTH), " ms", y);
    let mut second = 0.0;
    let step = if end > 60.0 { 10.0 } else { 5.0 };
    while second <= end {
        let _ = write!(
            svg,
            "<text x='{:.1}' y='{}' text-anchor='middle'>{second} s</text>",
            x(second),
            HEIGHT - 8.0
        );
        second += step;
    }
    let (mut answered, mut lost) = (String::new(), String::new());
    for (at, rtt) in &act.pings {
        match rtt {
            Some(ms) => {
                let _ = write!(answered, "M{:.1} {:.1}h1.6", x(*at), y(*ms));
            }
            None => {
                let _ = write!(lost, "M{:.1} {:.1}v12", x(*at), lanes_bottom + 2.0);
            }
        }
    }
    let _ = write!(
        svg,
        "<path d='{answered}' stroke='var(--c1)' stroke-width='1.6'/>\
         <path d='{lost}' stroke='var(--bad)' stroke-width='1.2'/></svg>\
         <p class='k'>Bars: the path each end sends on. Dots: round trips of 100 pings a second from A to B. \
         Red: pings that were lost.</p>"
    );
    svg
}

/// The lines of a logarithmic axis from one power of ten to another, between two edges, where `y` has them.
fn decades(
    (low, high): (f64, f64),
    (left, right): (f64, f64),
    unit: &str,
    y: impl Fn(f64) -> f64,
) -> String {
    let mut svg = String::new();
    let mut decade = low;
    while decade <= high {
        let value = 10f64.powf(decade);
        let _ = write!(
            svg,
            "<path class='g' d='M{left} {v:.1} H{right}'/><text x='{l}' y='{w:.1}' text-anchor='end'>{value}{unit}</text>",
            v = y(value),
            w = y(value) + 4.0,
            l = left - 6.0
        );
        decade += 1.0;
    }
    svg
}

/// Decades of milliseconds that the round trips span.
fn rtt_decades(act: &ActOne) -> (f64, f64) {
    let rtts = || {
        act.pings
            .iter()
            .filter_map(|(_, rtt)| *rtt)
            .filter(|rtt| *rtt > 0.0)
    };
    let least = rtts().fold(f64::MAX, f64::min);
    let most = rtts().fold(0.0, f64::max);
    if most <= 0.0 {
        return (-1.0, 2.0);
    }
    let low = least.log10().floor();
    (low, most.log10().ceil().max(low + 1.0))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{cell, results};
    use super::*;

    #[test]
    fn a_bar_far_above_all_tunnels_is_cut_but_keeps_its_figure() {
        let got = results(vec![
            cell("ringtail", "direct", Kind::Tcp1, 1, 5.0),
            cell("veth", "direct", Kind::Tcp1, 1, 50.0),
        ]);
        let rows: Vec<&Row> = got.rows.iter().collect();
        let svg = throughput(&rows);
        assert!(svg.contains("50.0") && svg.contains("5.00"), "{svg}");
        assert_eq!(svg.matches("stroke='var(--bg)'").count(), 2, "{svg}");
    }

    #[test]
    fn text_in_charts_is_escaped() {
        assert_eq!(escape("a<b & \"c\""), "a&lt;b &amp; &quot;c&quot;");
    }

    #[test]
    fn the_timeline_draws_every_ping() {
        let mut got = results(Vec::new());
        got.act_one = Some(super::super::story::tests::act_one());
        let svg = timeline(&got);
        assert_eq!(svg.matches("h1.6").count(), 2680);
        assert_eq!(svg.matches("v12").count(), 120);
        assert!(
            svg.contains("s-direct") && svg.contains("s-fallback"),
            "{svg}"
        );
    }
}
