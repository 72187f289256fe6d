//! The story in the words of the event file: what the path machine reports, as names and fields.

use serde_json::{Value, json};

use crate::path::{Phase, Purpose, Route, Story};

/// A duration in milliseconds with microsecond grain.
pub fn millis(duration: std::time::Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// The event's name and fields. `region` gives a region's code by its number.
pub(super) fn describe(
    peer: &str,
    what: &Story,
    region: impl Fn(u32) -> String,
) -> (&'static str, Value) {
    let way = |route: &Route| match route {
        Route::Direct(addr) => ("direct", addr.to_string()),
        Route::Relay(id) => ("relay", region(id.0)),
    };
    match what {
        Story::PingTx { route, purpose } => {
            let (via, to) = way(route);
            (
                "ping_tx",
                json!({"peer": peer, "via": via, "to": to, "purpose": purpose_name(*purpose)}),
            )
        }
        Story::PongRx { route, rtt } => {
            let (via, from) = way(route);
            (
                "pong_rx",
                json!({"peer": peer, "via": via, "from": from, "rtt_ms": millis(*rtt)}),
            )
        }
        Story::PingRx { route } => {
            let (via, from) = way(route);
            ("ping_rx", json!({"peer": peer, "via": via, "from": from}))
        }
        Story::CallMeMaybeTx { endpoints } => {
            ("cmm_tx", json!({"peer": peer, "endpoints": endpoints}))
        }
        Story::CallMeMaybeRx { endpoints } => {
            ("cmm_rx", json!({"peer": peer, "endpoints": endpoints}))
        }
        Story::Validate { addr, phase } => ("validate", validation(peer, addr, phase)),
        Story::Path {
            state,
            addr,
            reason,
        } => (
            "path",
            json!({"peer": peer, "state": state.name(), "addr": addr, "reason": reason.name()}),
        ),
        Story::Heartbeat {
            addr,
            rtt,
            loss_pct,
            jitter,
        } => (
            "heartbeat",
            json!({"peer": peer, "addr": addr, "rtt_ms": millis(*rtt), "loss_pct": loss_pct,
                   "jitter_ms": millis(*jitter)}),
        ),
    }
}

fn validation(peer: &str, addr: &std::net::SocketAddr, phase: &Phase) -> Value {
    match phase {
        Phase::Start => json!({"peer": peer, "addr": addr, "phase": "start"}),
        Phase::Pass {
            rtt,
            loss_pct,
            mtu,
            fragments,
        } => {
            json!({"peer": peer, "addr": addr, "phase": "pass", "rtt_ms": millis(*rtt),
                   "loss_pct": loss_pct, "mtu": mtu, "fragments": fragments})
        }
        Phase::Fail {
            test,
            rtt,
            loss_pct,
        } => {
            json!({"peer": peer, "addr": addr, "phase": "fail", "test": test.name(),
                   "rtt_ms": rtt.map(millis), "loss_pct": loss_pct})
        }
    }
}

fn purpose_name(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Discovery => "discovery",
        Purpose::PingBack => "ping_back",
        Purpose::Heartbeat => "heartbeat",
        Purpose::Validate(_) => "validate",
        Purpose::Mtu(_) => "mtu",
        Purpose::Fragments(_) => "fragments",
        Purpose::RelayLatency => "relay_latency",
        Purpose::User(_) => "user",
    }
}
