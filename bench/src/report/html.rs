//! One page that needs nothing but itself.

use super::svg::{self, escape};
use super::{Results, Row, table};
use std::fmt::Write as _;

const STYLE: &str = "
:root { --bg:#fcfcfa; --fg:#1d1d1b; --muted:#8a8a84; --line:#e2e2dc; --bad:#c8372d;
  --c1:#0b6e4f; --c2:#59a686; --c3:#c06a1c; --c4:#7a5195; --c5:#3a6ea5; --c6:#a8842c; --c7:#157a86;
  --direct:#0b6e4f; --relay:#b9b9b2; --probing:#8fb3d0; --fallback:#dd8a2f; --held:#7d7d77; --in:#fff }
@media (prefers-color-scheme: dark) { :root { --bg:#161715; --fg:#e6e6e1; --muted:#8d8d86; --line:#33342f;
  --bad:#ff6b5e; --c1:#3ecf9a; --c2:#7fb8a0; --c3:#f0a35c; --c4:#c39bd8; --c5:#7fb2e5; --c6:#d9b960; --c7:#5ec6d2;
  --direct:#1f8f68; --relay:#55564f; --probing:#3f6a8c; --fallback:#b86a17; --held:#3b3c37 } }
body { background:var(--bg); color:var(--fg); font:15px/1.5 system-ui,sans-serif; margin:2rem auto; max-width:960px; padding:0 1rem }
h1 { font-size:1.5rem } h2 { font-size:1.15rem; margin-top:2.2rem; border-bottom:1px solid var(--line) }
pre { font-size:12px; overflow-x:auto; line-height:1.45 }
table { border-collapse:collapse; font-size:14px } td,th { padding:.25rem .8rem .25rem 0; text-align:left; border-bottom:1px solid var(--line) }
.met { color:var(--direct) } .missed { color:var(--bad); font-weight:600 }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(380px,1fr)); gap:1.2rem 2rem }
svg { width:100%; height:auto; font:12px system-ui,sans-serif } svg text { fill:var(--fg) } svg .t { font-weight:600 }
svg .v { fill:var(--fg) } svg .g { stroke:var(--line); fill:none } svg .m { stroke:var(--muted); stroke-dasharray:3 3 }
svg .in { fill:var(--in) } .k { color:var(--muted); font-size:13px; margin:.2rem 0 }
.s-direct { fill:var(--direct) } .s-relay { fill:var(--relay) } .s-probing { fill:var(--probing) }
.s-fallback { fill:var(--fallback) } .s-held { fill:var(--held) }
";

/// The whole page.
pub(super) fn page(results: &Results) -> String {
    let mut page = format!(
        "<!doctype html><html lang='en'><meta charset='utf-8'>\
         <meta name='viewport' content='width=device-width,initial-scale=1'>\
         <title>ringtail, measured</title><style>{STYLE}</style><h1>ringtail, measured</h1>"
    );
    if !results.machine.is_null() {
        let _ = write!(
            page,
            "<pre>{}</pre>",
            escape(&table::head(&results.machine))
        );
    }
    if !results.targets.is_empty() {
        page.push_str("<h2>Targets</h2><table><tr><th>target<th>goal<th>this run<th></tr>");
        for target in &results.targets {
            let verdict = if target.met { "met" } else { "missed" };
            let _ = write!(
                page,
                "<tr><td>{}<td>{}<td>{}<td class='{verdict}'>{verdict}</tr>",
                escape(&target.what),
                escape(&target.goal),
                escape(&target.got)
            );
        }
        page.push_str("</table>");
    }
    if results.act_one.is_some() {
        let _ = write!(
            page,
            "<h2>Act one: relay, direct, blocked, direct again</h2>{}<pre>{}</pre>",
            svg::timeline(results),
            escape(&table::act_one(results))
        );
    }
    for (layout, cc) in results.layouts() {
        let rows: Vec<&Row> = results.rows_of(&layout, &cc).collect();
        let _ = write!(
            page,
            "<h2>Act two: {} layout, {}</h2><div class='charts'>{}</div>\
             <h2>CPU cost: seconds of the whole machine per delivered GB</h2><div class='charts'>{}</div>\
             <h2>Latency through the tunnel</h2><div class='charts'>{}</div>",
            escape(&layout),
            escape(&cc.to_uppercase()),
            svg::throughput(&rows),
            svg::costs(&rows),
            svg::latencies(&rows)
        );
    }
    if !results.rows.is_empty() {
        let _ = write!(
            page,
            "<h2>All tables</h2><pre>{}</pre>",
            escape(&table::act_two(results))
        );
    }
    page.push_str("</html>\n");
    page
}

#[cfg(test)]
mod tests {
    use super::super::tests::{cell, results};
    use super::*;
    use crate::cell::Kind;

    #[test]
    fn the_page_asks_for_nothing_from_anywhere() {
        let mut got = results(vec![cell("ringtail", "direct", Kind::Tcp1, 1, 4.0)]);
        got.act_one = Some(super::super::story::tests::act_one());
        let page = page(&got);
        for outside in ["http://", "https://", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(page.contains("ringtail direct"));
    }
}
