//! The decisions of a coordination client, without sockets or clocks.
//!
//! A client's life: fetch the server's key once (or have it pinned), dial, register, open the map
//! stream, report its own state by lite updates on the same connection whenever that changes, and
//! start again at the dial when the connection is lost. [`Outcome`] judges what the server answers
//! to a registration, [`after_map_status`] what it answers to a map request, [`LiteGate`] says when
//! a lite update is due, [`WATCHDOG`] when a silent stream is given up; [`super::Backoff`] spaces the
//! attempts.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use time::OffsetDateTime;

use super::{Backoff, CoordConfig, STAYED_AWAY, SelfState};
use crate::netmap::wire::{
    CAPABILITY_VERSION, MapRequest, RegisterAuth, RegisterRequest, RegisterResponse, WireTime,
};

/// A node asks so often whether the server still knows it, where it has nothing to report: Headscale
/// does not tell a node that it was removed, and keeps its stream alive.
pub const CONFIRM_PERIOD: Duration = Duration::from_secs(45);

/// A stream without any complete message for this long is dead; the wait for the answer and the first
/// message counts.
pub const WATCHDOG: Duration = Duration::from_secs(120);

/// Changes of our own state within this time go out as one update.
pub const LITE_COALESCE: Duration = Duration::from_millis(100);

/// What a registration led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The server knows us; the owner's name.
    Registered(String),
    /// A human must visit this address; then the registration is repeated with it.
    AskHuman(String),
    /// The node's key has expired: only another one can be let in.
    KeyExpired,
    /// Refused for good: what to tell the user.
    Fatal(String),
    /// Refused for now.
    Retry(String),
}

impl Outcome {
    /// Judges an answer.
    pub fn of(answer: &RegisterResponse) -> Self {
        if !answer.error.is_empty() {
            return Self::of_error(&answer.error);
        }
        if answer
            .node_key_signature
            .as_ref()
            .is_some_and(|s| !s.is_null())
        {
            return Self::Fatal(
                "this network uses tailnet lock, which ringtail does not support".to_owned(),
            );
        }
        if answer.node_key_expired {
            return Self::KeyExpired;
        }
        if !answer.auth_url.is_empty() {
            return Self::ask_human(&answer.auth_url);
        }
        let names = [&answer.login.login_name, &answer.user.display_name];
        let name = names.into_iter().find(|name| !name.is_empty());
        Self::Registered(name.cloned().unwrap_or_default())
    }

    /// People open it in a browser, and it goes to their terminals as it is.
    fn ask_human(url: &str) -> Self {
        let is = |scheme: &&str| {
            let start = url.get(..scheme.len());
            start.is_some_and(|start| start.eq_ignore_ascii_case(scheme))
        };
        let odd = |char: char| char.is_control() || char.is_whitespace();
        if !url.contains(odd) && ["https://", "http://"].iter().any(is) {
            Self::AskHuman(url.to_owned())
        } else {
            Self::Fatal(format!(
                "the coordination server has a person visit {url:?}, which is no web address"
            ))
        }
    }

    /// The texts are Headscale's, which ringtail's own server uses too; they may be wrapped.
    fn of_error(error: &str) -> Self {
        let advice = [
            (
                "invalid pre auth key",
                "the server does not know this auth key",
            ),
            ("invalid auth key", "the auth key is mistyped"),
            ("authkey expired", "the auth key has expired"),
            (
                "authkey already used",
                "the auth key is for one use and was used already",
            ),
        ];
        for (text, meaning) in advice {
            if error.contains(text) {
                return Self::Fatal(format!(
                    "not let into the network: {meaning}. Make a new key (`ringtail coord keys \
                     create` on the server, or `headscale preauthkeys create`) and start again \
                     with it. The server said: {error}"
                ));
            }
        }
        let lasting = [
            "different machine key",
            "node key already in use",
            "requested tags",
            "extending key is not allowed",
        ];
        if lasting.iter().any(|text| error.contains(text)) {
            return Self::Fatal(format!("not let into the network: {error}"));
        }
        Self::Retry(format!("the coordination server refused: {error}"))
    }
}

/// What the HTTP status of a map request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AfterMap {
    /// Go on reading.
    Read,
    /// The server does not know us any more: register, then ask again.
    Register,
    /// The same, and it is no more than what becomes of an ephemeral node that was out of reach.
    JoinAgain,
    /// No use trying again: what to tell the user.
    Fatal(String),
    /// Wait and try again.
    Retry(String),
}

/// What to tell the user when the server does not know a node any more that had its map: an
/// administrator has removed it. Joining again by the key that is still at hand would undo that.
/// Headscale says the same to an ephemeral node that stayed away, which therefore ends too.
pub fn removed(url: &str) -> String {
    format!(
        "this node was removed from the network: the coordination server at {url} does not know it \
         any more (an administrator removed it, or it was ephemeral and stayed away). If it shall \
         join again, start ringtail again with an auth key (--auth-key-file)"
    )
}

/// Judges the status of a map request and the text of its body.
pub fn after_map_status(status: u16, text: &str) -> AfterMap {
    let said = text.lines().next().unwrap_or_default();
    match status {
        200 => AfterMap::Read,
        404 if said == STAYED_AWAY => AfterMap::JoinAgain,
        401 | 403 | 404 => AfterMap::Register,
        400 if said.starts_with("unsupported client version") => AfterMap::Fatal(format!(
            "the coordination server does not take capability version {CAPABILITY_VERSION} any \
             more; a newer ringtail is needed. The server said: {said}"
        )),
        status => AfterMap::Retry(format!("map request: HTTP {status} {said}")),
    }
}

/// When a lite update is due: at most one in flight, changes of [`LITE_COALESCE`] together, again
/// when something changed meanwhile, and with its own backoff.
#[derive(Clone, Debug, Default)]
pub struct LiteGate {
    state: Lite,
    /// When the server took an update last.
    delivered: Option<Instant>,
    backoff: Backoff,
}

#[derive(Clone, Debug, Default)]
enum Lite {
    /// The server has what we have.
    #[default]
    Clean,
    /// Something changed; it goes out then.
    Due(Instant),
    /// On its way; whether something changed since.
    InFlight { changed: bool },
}

impl LiteGate {
    /// Our own state changed.
    pub fn handle_change(&mut self, now: Instant) {
        match &mut self.state {
            Lite::Clean => self.state = Lite::Due(now + LITE_COALESCE),
            Lite::Due(_) => {}
            Lite::InFlight { changed } => *changed = true,
        }
    }

    /// The server gave a sign of life: time to ask for one of ours, if that was long ago.
    pub fn handle_keep_alive(&mut self, now: Instant) {
        if self.delivered.is_none_or(|at| now >= at + CONFIRM_PERIOD) {
            self.handle_change(now);
        }
    }

    /// Whether an update has to be sent now; saying yes puts it in flight.
    pub fn poll_send(&mut self, now: Instant) -> bool {
        let Lite::Due(at) = self.state else {
            return false;
        };
        if now < at {
            return false;
        }
        self.state = Lite::InFlight { changed: false };
        true
    }

    /// The update in flight ended; `random` is from 0 to 1.
    pub fn handle_done(&mut self, now: Instant, delivered: bool, random: f64) {
        let Lite::InFlight { changed } = self.state else {
            return;
        };
        if delivered {
            self.delivered = Some(now);
        }
        self.state = if !delivered {
            Lite::Due(now + self.backoff.fail(random).max(LITE_COALESCE))
        } else if changed {
            self.backoff.reset();
            Lite::Due(now + LITE_COALESCE)
        } else {
            self.backoff.reset();
            Lite::Clean
        };
    }

    /// When [`LiteGate::poll_send`] says yes next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            Lite::Due(at) => Some(at),
            Lite::Clean | Lite::InFlight { .. } => None,
        }
    }
}

/// Whether two states differ in what is worth telling the server; latency alone is not.
pub fn worth_reporting(old: &SelfState, new: &SelfState) -> bool {
    let visible = |state: &SelfState| SelfState {
        derp_latency: Vec::new(),
        ..state.clone()
    };
    visible(old) != visible(new)
}

/// `Hostinfo` with what is known by now. `os_version` is the kernel release.
pub fn hostinfo(config: &CoordConfig, state: &SelfState, os_version: &str) -> Value {
    let mut info = json!({
        "IPNVersion": concat!(env!("CARGO_PKG_VERSION"), "-ringtail"),
        "OS": "linux",
        "OSVersion": os_version,
        "Hostname": state.hostname.as_ref().unwrap_or(&config.hostname),
        "App": "ringtail",
        "GoArch": match std::env::consts::ARCH { "x86_64" => "amd64", "aarch64" => "arm64", other => other },
        "Machine": std::env::consts::ARCH,
        "NoLogsNoSupport": true,
    });
    let fields = info.as_object_mut().expect("an object was just made");
    if !state.routes.is_empty() {
        fields.insert("RoutableIPs".to_owned(), json!(state.routes));
    }
    if !config.tags.is_empty() {
        fields.insert("RequestTags".to_owned(), json!(config.tags));
    }
    if state.shields_up {
        fields.insert("ShieldsUp".to_owned(), json!(true));
    }
    let services = services(state);
    if !services.is_empty() {
        fields.insert("Services".to_owned(), json!(services));
    }
    if let Some(net_info) = net_info(state) {
        fields.insert("NetInfo".to_owned(), net_info);
    }
    if let Some(Value::Object(more)) = &state.hostinfo {
        fields.extend(more.clone());
    }
    info
}

/// What peers may ask us: our peer API, and that it looks names up (`tailcfg.Service`).
fn services(state: &SelfState) -> Vec<Value> {
    let service = |kind: &str, port: u16| json!({"Proto": kind, "Port": port});
    let [v4, v6] = state.peerapi;
    let v4 = v4.map(|port| service("peerapi4", port));
    let v6 = v6.map(|port| service("peerapi6", port));
    let mut services: Vec<Value> = v4.into_iter().chain(v6).collect();
    if !services.is_empty() {
        // Tailscale has 1 for "yes".
        services.push(service("peerapi-dns-proxy", 1));
    }
    services
}

/// Measured facts about our network; none before the first netcheck, so that the server keeps what
/// it knows.
fn net_info(state: &SelfState) -> Option<Value> {
    let facts = [
        ("MappingVariesByDestIP", state.mapping_varies),
        ("WorkingUDP", state.working_udp),
        ("WorkingIPv6", state.working_ipv6),
    ];
    let mut fields: Map<String, Value> = facts
        .into_iter()
        .filter_map(|(name, fact)| Some((name.to_owned(), json!(fact?))))
        .collect();
    if let Some(home) = state.home_derp {
        fields.insert("PreferredDERP".to_owned(), json!(home));
    }
    if fields.is_empty() {
        return None;
    }
    let latency: Map<String, Value> = state
        .derp_latency
        .iter()
        .map(|(region, v6, rtt)| {
            let family = if *v6 { "v6" } else { "v4" };
            // Whole milliseconds: noise is not worth a broadcast.
            let seconds = (rtt.as_secs_f64() * 1000.0).round() / 1000.0;
            (format!("{region}-{family}"), json!(seconds))
        })
        .collect();
    if !latency.is_empty() {
        fields.insert("DERPLatency".to_owned(), Value::Object(latency));
    }
    Some(Value::Object(fields))
}

/// The request to be let in. With `followup` it repeats one that a human has to settle.
pub fn register_request(
    config: &CoordConfig,
    state: &SelfState,
    os_version: &str,
    followup: &str,
) -> RegisterRequest {
    RegisterRequest {
        version: i64::from(CAPABILITY_VERSION),
        node_key: config.node,
        old_node_key: config.old_node,
        auth: config.auth_key.as_ref().map(|key| RegisterAuth {
            auth_key: key.clone(),
        }),
        followup: followup.to_owned(),
        hostinfo: Some(hostinfo(config, state, os_version)),
        ..RegisterRequest::default()
    }
}

/// The request to take our key out of force: with an expiry in the past, which Tailscale's clients put
/// there too (Unix time 123), and without an auth key, since that might let us in again.
pub fn log_out_request(
    config: &CoordConfig,
    state: &SelfState,
    os_version: &str,
) -> RegisterRequest {
    let past = OffsetDateTime::UNIX_EPOCH + Duration::from_secs(123);
    RegisterRequest {
        auth: None,
        expiry: Some(WireTime(past)),
        ..register_request(config, state, os_version, "")
    }
}

/// The streaming request (`stream`) or a lite update, both with our complete state: Headscale
/// takes state from either, Tailscale's service from lite updates alone.
pub fn map_request(
    config: &CoordConfig,
    state: &SelfState,
    os_version: &str,
    stream: bool,
) -> MapRequest {
    // No endpoints at all means that nothing was gathered yet: absent keeps what the server has.
    let known = !state.endpoints.is_empty();
    MapRequest {
        version: i64::from(CAPABILITY_VERSION),
        compress: if stream {
            "zstd".to_owned()
        } else {
            String::new()
        },
        keep_alive: true,
        node_key: config.node,
        disco_key: config.disco,
        stream,
        omit_peers: !stream,
        hostinfo: Some(hostinfo(config, state, os_version)),
        endpoints: known.then(|| state.endpoints.iter().map(|(addr, _)| *addr).collect()),
        endpoint_types: state
            .endpoints
            .iter()
            .map(|(_, kind)| *kind as i64)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{DiscoPublic, MachinePrivate, NodePublic};
    use crate::netmap::wire::EndpointKind;

    #[test]
    fn every_recorded_registration_is_judged_as_the_page_says() {
        let text = include_str!("../../tests/vectors/coordination/headscale-register.json");
        let recorded: Value = serde_json::from_str(text).unwrap();
        for exchange in recorded["exchanges"].as_array().unwrap() {
            if exchange["status"] != 200 {
                let text = exchange["response"].as_str().unwrap();
                assert!(matches!(after_map_status(400, text), AfterMap::Fatal(_)));
                continue;
            }
            let answer: RegisterResponse =
                serde_json::from_value(exchange["response"].clone()).unwrap();
            let outcome = Outcome::of(&answer);
            let case = exchange["case"].as_str().unwrap();
            let fatal = !answer.error.is_empty();
            match &outcome {
                Outcome::Fatal(_) => assert!(fatal, "{case}"),
                Outcome::KeyExpired => assert!(!fatal && answer.node_key_expired, "{case}"),
                Outcome::AskHuman(url) => assert_eq!(*url, answer.auth_url, "{case}"),
                Outcome::Registered(user) => {
                    let expired = answer.node_key_expired;
                    assert!(!fatal && !expired && answer.auth_url.is_empty(), "{case}");
                    assert_eq!(user, "u", "{case}");
                }
                Outcome::Retry(_) => panic!("{case}: {outcome:?}"),
            }
        }
    }

    #[test]
    fn a_person_is_sent_to_web_addresses_only() {
        let outcome = |url: &str| {
            Outcome::of(&RegisterResponse {
                auth_url: url.to_owned(),
                ..RegisterResponse::default()
            })
        };
        for url in [
            "https://a.example/register/x",
            "HTTP://10.0.0.1:8080/a?b=c#d",
        ] {
            assert_eq!(outcome(url), Outcome::AskHuman(url.to_owned()));
        }
        for url in [
            "file:///etc/passwd",
            "javascript:a",
            "https://a/\u{1b}[2J",
            "http://a b",
            "http:/",
        ] {
            let Outcome::Fatal(why) = outcome(url) else {
                panic!("{url:?}");
            };
            assert!(
                why.contains("no web address") && !why.contains('\u{1b}'),
                "{why}"
            );
        }
    }

    #[test]
    fn map_statuses_lead_where_the_page_says() {
        assert_eq!(after_map_status(200, ""), AfterMap::Read);
        assert_eq!(after_map_status(404, "node not found"), AfterMap::Register);
        let away = format!("{}\n", crate::coord::server::MapRefusal::StayedAway);
        assert_eq!(after_map_status(404, &away), AfterMap::JoinAgain);
        assert!(matches!(after_map_status(500, "boom"), AfterMap::Retry(_)));
    }

    #[test]
    fn lite_updates_coalesce_never_overlap_and_repeat_after_a_change() {
        let t0 = crate::testing::start();
        let ms = |n| t0 + Duration::from_millis(n);
        let mut gate = LiteGate::default();
        assert_eq!(gate.poll_timeout(), None);
        gate.handle_change(t0);
        gate.handle_change(ms(50));
        assert!(!gate.poll_send(ms(99)));
        assert!(gate.poll_send(ms(100)));
        assert!(!gate.poll_send(ms(500)), "one in flight");
        gate.handle_change(ms(500));
        gate.handle_done(ms(600), true, 0.5);
        assert_eq!(gate.poll_timeout(), Some(ms(700)));
        assert!(gate.poll_send(ms(700)));
        gate.handle_done(ms(800), false, 0.5);
        assert_eq!(
            gate.poll_timeout(),
            Some(ms(900)),
            "a failed one is repeated"
        );
        assert!(gate.poll_send(ms(900)));
        gate.handle_done(ms(901), true, 0.5);
        assert_eq!(gate.poll_timeout(), None);
    }

    #[test]
    fn with_nothing_to_report_the_server_is_asked_now_and_then_whether_it_knows_us() {
        let t0 = crate::testing::start();
        let mut gate = LiteGate::default();
        gate.handle_change(t0);
        assert!(gate.poll_send(t0 + LITE_COALESCE));
        let done = t0 + Duration::from_secs(1);
        gate.handle_done(done, true, 0.5);
        gate.handle_keep_alive(done + CONFIRM_PERIOD / 2);
        assert_eq!(gate.poll_timeout(), None, "not at every sign of life");
        gate.handle_keep_alive(done + CONFIRM_PERIOD);
        assert!(gate.poll_send(done + CONFIRM_PERIOD + LITE_COALESCE));
    }

    #[test]
    fn latency_alone_is_not_worth_an_update() {
        let old = SelfState::default();
        let mut new = old.clone();
        new.derp_latency = vec![(1, false, Duration::from_millis(3))];
        assert!(!worth_reporting(&old, &new));
        new.home_derp = Some(1);
        assert!(worth_reporting(&old, &new));
    }

    #[test]
    fn requests_carry_the_complete_state() {
        let config = CoordConfig {
            url: String::new(),
            auth_key: Some("secret-key".to_owned().into()),
            hostname: "edge1".to_owned(),
            tags: vec!["tag:router".to_owned()],
            machine: MachinePrivate::clamped([1; 32]),
            node: NodePublic([2; 32]),
            old_node: None,
            followup: None,
            disco: DiscoPublic([3; 32]),
            control_key: None,
        };
        let state = SelfState {
            endpoints: vec![("192.0.2.1:41641".parse().unwrap(), EndpointKind::Stun)],
            home_derp: Some(900),
            derp_latency: vec![(900, false, Duration::from_micros(4321))],
            ..SelfState::default()
        };
        let poll = serde_json::to_value(map_request(&config, &state, "6.12", true)).unwrap();
        assert_eq!(poll["Endpoints"], json!(["192.0.2.1:41641"]));
        assert_eq!(poll["EndpointTypes"], json!([2]));
        assert_eq!(
            (&poll["Stream"], poll.get("OmitPeers")),
            (&json!(true), None)
        );
        let net = &poll["Hostinfo"]["NetInfo"];
        assert_eq!(net["PreferredDERP"], 900);
        assert_eq!(net["DERPLatency"]["900-v4"], 0.004);
        let lite = serde_json::to_value(map_request(&config, &state, "6.12", false)).unwrap();
        assert_eq!(
            (lite.get("Stream"), &lite["OmitPeers"]),
            (None, &json!(true))
        );
        assert_eq!(lite.get("Compress"), None);
        let early = map_request(&config, &SelfState::default(), "", true);
        let early = serde_json::to_value(early).unwrap();
        assert_eq!(early.get("Endpoints"), None);
        assert_eq!(early["Hostinfo"].get("NetInfo"), None);
        let register = register_request(&config, &state, "6.12", "");
        assert!(!format!("{register:?}{config:?}").contains("secret-key"));
        let register = serde_json::to_value(register).unwrap();
        assert_eq!(register["Auth"]["AuthKey"], "secret-key");
        assert_eq!(register["Hostinfo"]["RequestTags"], json!(["tag:router"]));
        assert_eq!(register["Version"], 130);
    }
}
