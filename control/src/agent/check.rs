//! The agent's dealings with netcheck: home region, own endpoints, questions of people.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ringtail_dataplane::{PeerId, RegionId};
use serde_json::{Value, json};

use super::{Agent, Output, millis};
use crate::coord::SelfState;
use crate::derp::DUPLICATE;
use crate::derp::client::Said;
use crate::derp::news::News;
use crate::netcheck::{Event, Interface, Report};
use crate::netmap::DerpMap;

impl Agent {
    /// Takes the host's interfaces that are up and whether the system has IPv6 at all.
    pub fn handle_interfaces(&mut self, now: Instant, found: &[Interface], os_has_ipv6: bool) {
        let ours = found.iter().flat_map(|interface| &interface.addrs);
        self.sources.retain(&ours.copied().collect());
        let tun = self.setup.tun.clone();
        self.netcheck.set_interfaces(now, found, &tun, os_has_ipv6);
        self.settle(now);
    }

    /// Takes the addresses of the host name that [`Output::Resolve`] asked for, or none.
    pub fn handle_resolved(&mut self, now: Instant, host: &str, found: Vec<IpAddr>) {
        self.netcheck.set_resolved(now, host, found);
        self.settle(now);
    }

    /// Takes the time of one HTTPS request to a region and where it went, or its failure.
    pub fn handle_https_latency(
        &mut self,
        now: Instant,
        region: RegionId,
        measured: Option<(Duration, SocketAddr)>,
    ) {
        let v6 = measured.is_some_and(|(_, addr)| addr.is_ipv6());
        let latency = measured.map(|(latency, _)| latency);
        self.netcheck.handle_https_latency(now, region, latency, v6);
        self.settle(now);
    }

    /// Measures anew for a person; the report follows as [`Output::Answer`].
    pub fn handle_netcheck_question(&mut self, now: Instant, question: u64) {
        let network = self.network.as_ref();
        if network.is_none_or(|network| network.derp_map.regions.is_empty()) {
            let error = json!({"error": "there is no relay to measure: the DERP map is empty"});
            return self.answer(question, error);
        }
        self.netcheck_waiters.push(question);
        self.netcheck.start(now, true);
        self.settle(now);
    }

    /// Takes news of a region's relay connection.
    pub fn handle_relay_news(&mut self, now: Instant, region: RegionId, news: News) {
        let code = self.region_code(region);
        match news {
            News::Connecting { addr } => {
                self.story("derp_connecting", json!({"region": code, "addr": addr}));
            }
            News::Connected { took, home, .. } => {
                self.netcheck.heard(now, region);
                let fields = json!({"region": code, "ms": millis(took), "home": home});
                self.story("derp_connected", fields);
            }
            News::Lost { home, error } => {
                tracing::warn!(region = %code, home, %error, "relay lost");
                let fields = json!({"region": code, "home": home, "error": error});
                self.story("derp_lost", fields);
            }
            News::Closed => self.story("derp_closed", json!({"region": code})),
            News::HomeUnreachable => {
                if self.fixed_home().is_none() {
                    self.netcheck.handle_region_down(now, region);
                }
            }
            News::Said(Said::Health(Some(problem))) => {
                tracing::warn!(region = %code, %problem, "a relay reports a problem");
                if problem.starts_with(DUPLICATE) {
                    self.doubled(now, &code);
                }
            }
            News::Said(Said::Health(None) | Said::PeerGone { .. } | Said::Restarting { .. }) => {}
        }
        self.settle(now);
    }

    /// What coordination should know of us.
    pub fn self_report(&self) -> SelfState {
        let report = self.netcheck.last_report();
        let mut derp_latency = Vec::new();
        if let Some(report) = report {
            for (latency, v6) in [(&report.latency_v4, false), (&report.latency_v6, true)] {
                derp_latency.extend(latency.iter().map(|(id, latency)| (id.0, v6, *latency)));
            }
        }
        let endpoints = self.endpoints.iter().map(|own| (own.addr, own.kind));
        SelfState {
            endpoints: endpoints.collect(),
            hostname: Some(self.prefs.hostname.clone()).filter(|name| !name.is_empty()),
            home_derp: self.home.map(|id| id.0),
            derp_latency,
            mapping_varies: report.and_then(|report| report.mapping_varies),
            working_udp: report.and_then(Report::udp_works),
            working_ipv6: report.map(|report| report.ipv6),
            routes: self.offers().collect(),
            routes_lost: self.offered().next().is_some()
                && self.offered().all(|net| self.lost.contains(&net)),
            peerapi: self.services(),
            shields_up: self.prefs.shields_up,
            corrections: self.corrections,
            ..SelfState::default()
        }
    }

    pub(super) fn fixed_home(&self) -> Option<RegionId> {
        self.network
            .as_ref()
            .and_then(|network| network.fixed_home)
            .map(RegionId)
    }

    pub(super) fn map_changed(&mut self, now: Instant, map: &DerpMap) {
        let regions: Vec<&str> = map
            .regions
            .values()
            .map(|r| r.region_code.as_str())
            .collect();
        self.story("derp_map", json!({"regions": regions}));
        self.out.push_back(Output::SetDerpMap(map.clone()));
        self.netcheck.set_derp_map(now, map);
    }

    pub(super) fn set_home(&mut self, home: RegionId, latency: Option<Duration>) {
        if self.home == Some(home) {
            return;
        }
        self.home = Some(home);
        let fields = json!({"region": self.region_code(home), "latency_ms": latency.map(millis)});
        self.story("home", fields);
        self.out.push_back(Output::SetHome(home));
        self.out.push_back(Output::Publish);
    }

    pub(super) fn settle_netcheck(&mut self, now: Instant) {
        while let Some(name) = self.netcheck.poll_name(now) {
            self.out.push_back(Output::Resolve(name));
        }
        while let Some(transmit) = self.netcheck.poll_transmit() {
            self.out.push_back(Output::Stun {
                to: transmit.to,
                bytes: transmit.bytes,
            });
        }
        while let Some(event) = self.netcheck.poll_event() {
            match event {
                Event::HttpsLatencyWanted(regions) => {
                    self.out.push_back(Output::MeasureHttps(regions));
                }
                Event::Endpoints(endpoints) => {
                    let addrs: Vec<SocketAddr> = endpoints.iter().map(|own| own.addr).collect();
                    self.twin.ours(now, addrs.iter().copied());
                    if self.endpoints != endpoints {
                        self.endpoints = endpoints;
                        self.story("endpoints", json!({"endpoints": addrs}));
                        self.out.push_back(Output::Publish);
                    }
                    if !self.setup.relay_only {
                        self.paths.set_own_endpoints(now, addrs);
                    }
                }
                Event::Home { region, latency } => {
                    if self.fixed_home().is_none() {
                        self.set_home(region, latency);
                    }
                }
                Event::Report(report) => self.report(&report),
            }
        }
    }

    fn report(&mut self, report: &Report) {
        for (family, latencies) in [("v4", &report.latency_v4), ("v6", &report.latency_v6)] {
            for (region, latency) in latencies {
                let fields = json!({"region": self.region_code(*region),
                    "latency_ms": millis(*latency), "family": family});
                self.story("netcheck", fields);
            }
        }
        self.out.push_back(Output::Publish);
        let answer = self.netcheck_status();
        for question in std::mem::take(&mut self.netcheck_waiters) {
            self.answer(question, answer.clone());
        }
    }

    pub(super) fn reported(&mut self, now: Instant, peer: PeerId, addr: SocketAddr) {
        self.netcheck.handle_reported(now, peer, addr);
    }

    /// The last report, for people.
    pub(super) fn netcheck_status(&self) -> Value {
        let Some(report) = self.netcheck.last_report() else {
            return Value::Null;
        };
        let regions: Vec<Value> = self
            .network
            .iter()
            .flat_map(|network| network.derp_map.regions.keys())
            .map(|id| {
                let id = RegionId(*id);
                let of = |map: &std::collections::BTreeMap<RegionId, Duration>| {
                    map.get(&id).map(|latency| millis(*latency))
                };
                json!({"region": self.region_code(id), "latency_ms": of(&report.latency),
                       "v4_ms": of(&report.latency_v4), "v6_ms": of(&report.latency_v6)})
            })
            .collect();
        json!({
            "udp": report.udp_works(),
            "unresolved": report.unresolved,
            "ipv4": report.ipv4,
            "ipv6": report.ipv6,
            "mapping_varies_by_dest_ip": report.mapping_varies,
            "global_v4": report.global_v4,
            "global_v6": report.global_v6,
            "preferred_region": self.home.map(|id| self.region_code(id)),
            "regions": regions,
        })
    }
}
