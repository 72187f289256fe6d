//! The machine: when checks run, what they give, and what follows from it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::RngExt as _;
use rand::rngs::StdRng;
use ringtail_dataplane::stats::Counts;
use ringtail_dataplane::{PeerId, RegionId};

use super::check::{Check, News, Set};
use super::endpoints::{Interface, OwnEndpoint, OwnEndpoints};
use super::home::HomeChoice;
use super::names::Names;
use super::plan::{self, Known, ProbeSet};
use super::{
    Drop, EVENTS_MAX, Event, FULL_REPORT_INTERVAL, PERIOD_MAX, PERIOD_MIN, Report, TRANSMITS_MAX,
    Transmit,
};
use crate::netmap::wire::EndpointKind;
use crate::netmap::{DerpMap, DerpNode, Family};
use crate::stun;

/// Measures the network; see the module.
pub struct Netcheck {
    rng: StdRng,
    map: DerpMap,
    names: Names,
    check: Option<Check>,
    /// A check asked for while one runs; `true` is full.
    again: Option<bool>,
    last: Option<Report>,
    last_full: Option<Instant>,
    /// When the periodic check is due.
    period: Option<Instant>,
    active: bool,
    control_up: bool,
    homes: HomeChoice,
    home: Option<RegionId>,
    /// The home that peers know of, as far as we could tell them.
    told: Option<RegionId>,
    own: OwnEndpoints,
    os_has_ipv6: bool,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
    counters: Counts<Drop>,
}

impl Netcheck {
    /// A machine without map and interfaces. `port` is the underlay port of both families, and
    /// `port_is_fixed` says that it was configured; `loopback` lets loopback addresses count, for labs
    /// on one machine.
    pub fn new(port: u16, port_is_fixed: bool, loopback: bool, rng: StdRng) -> Self {
        Self {
            rng,
            map: DerpMap::default(),
            names: Names::default(),
            check: None,
            again: None,
            last: None,
            last_full: None,
            period: None,
            active: false,
            control_up: true,
            homes: HomeChoice::default(),
            home: None,
            told: None,
            own: OwnEndpoints::new(port, port_is_fixed, loopback),
            os_has_ipv6: false,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            counters: Counts::new(Drop::ALL),
        }
    }

    /// Takes the DERP map. A changed one starts a full check; a home that is gone is forgotten.
    pub fn set_derp_map(&mut self, now: Instant, map: &DerpMap) {
        if self.map == *map {
            return;
        }
        self.map = map.clone();
        let scores = self
            .map
            .home_params
            .as_ref()
            .and_then(|home| home.region_score.clone());
        let scores = scores.unwrap_or_default().into_iter();
        self.homes.scores = scores.map(|(id, score)| (RegionId(id), score)).collect();
        let known = |region: RegionId| self.map.regions.contains_key(&region.0);
        self.homes.retain(known);
        self.home = self.home.filter(|home| known(*home));
        if let Some(region) = self.told.filter(|told| self.home.is_none() && known(*told)) {
            self.home = Some(region);
            let latency = None;
            self.event(Event::Home { region, latency });
        }
        let names: BTreeSet<String> = self.nodes_by_name().map(|n| n.host_name.clone()).collect();
        self.names.set(now, names.into_iter());
        self.start(now, true);
    }

    /// The next host name to look up now; hand the answer, good or bad, to [`Self::set_resolved`].
    pub fn poll_name(&mut self, now: Instant) -> Option<String> {
        self.names.take_due(now)
    }

    /// Takes the addresses of a host name, or none if it cannot be resolved: then the last good
    /// answer stays. What is new is asked at once, by the running check if that knew no better.
    pub fn set_resolved(&mut self, now: Instant, host_name: &str, addrs: Vec<IpAddr>) {
        let needed = self.needed_names().any(|name| name == host_name);
        if !self.names.answer(now, host_name, addrs, needed) {
            return;
        }
        if let Some(mut check) = self.check.take() {
            let joined = check.take_servers(now, |plan| self.stun_servers(plan));
            self.check = Some(check);
            if joined {
                return self.step(now);
            }
        }
        let worked = self.last.as_ref().is_some_and(|report| report.udp);
        self.start(now, !worked);
    }

    /// The host's network changed: names may mean something else here.
    pub fn handle_link_change(&mut self, now: Instant) {
        self.names.hurry(now);
    }

    /// Takes the interfaces that are up, the name of our own tunnel's, and whether the system has
    /// IPv6 at all. Changed addresses give a new [`Event::Endpoints`] and start a check.
    pub fn set_interfaces(
        &mut self,
        now: Instant,
        interfaces: &[Interface],
        own_tun: &str,
        os_has_ipv6: bool,
    ) {
        self.os_has_ipv6 = os_has_ipv6;
        if self.own.set_interfaces(interfaces, own_tun) {
            self.tell_endpoints(now);
            self.start(now, false);
        }
    }

    /// Takes endpoints that the operator configured.
    pub fn set_configured_endpoints(&mut self, now: Instant, endpoints: Vec<SocketAddr>) {
        if self.own.configured != endpoints {
            self.own.configured = endpoints;
            self.tell_endpoints(now);
        }
    }

    /// Takes the port mapping of the router, or its loss.
    pub fn set_port_mapped(&mut self, now: Instant, mapped: Option<SocketAddr>) {
        if self.own.port_mapped != mapped {
            self.own.port_mapped = mapped;
            self.tell_endpoints(now);
        }
    }

    /// A peer sees us at this address (`path::Event::Reported`).
    pub fn handle_reported(&mut self, now: Instant, peer: PeerId, addr: SocketAddr) {
        let before = self.own.list(now, &[]);
        self.own.reported(now, peer, addr);
        if self.own.list(now, &[]) != before {
            self.tell_endpoints(now);
        }
    }

    /// A frame came from a relay of this region.
    pub fn heard(&mut self, now: Instant, region: RegionId) {
        self.homes.heard(now, region);
    }

    /// The relays of this region cannot be reached (two failed redials of the home): another home
    /// is chosen at once from what is known, and a check starts.
    pub fn handle_region_down(&mut self, now: Instant, region: RegionId) {
        self.homes.down(now, region);
        if self.home == Some(region) {
            let started = now;
            let choice = self.homes.choose(now, started, self.home);
            self.set_home(choice.filter(|choice| *choice != region));
        }
        self.start(now, false);
    }

    /// Whether the node is in use: tunnel activity in the last 45 s, and peers to talk to. Only then
    /// checks repeat.
    pub fn set_active(&mut self, now: Instant, active: bool) {
        if active && !self.active && self.period.is_none() && self.check.is_none() {
            self.period = Some(now);
        }
        self.active = active;
    }

    /// Whether coordination can be told of a new home; if not, the home stays as it is.
    pub fn set_control_up(&mut self, up: bool) {
        self.control_up = up;
        if up {
            self.told = self.home;
        }
    }

    /// Takes the home of an earlier run, before there is a map: peers may know of no other, so it is
    /// home again until coordination can be told of another.
    pub fn remember_home(&mut self, region: RegionId) {
        (self.told, self.control_up) = (Some(region), false);
    }

    /// The home that peers know of, for the next run.
    pub fn told_home(&self) -> Option<RegionId> {
        self.told
    }

    /// The last finished report.
    pub fn last_report(&self) -> Option<&Report> {
        self.last.as_ref()
    }

    /// Starts a check, `full` if asked for or due; during a running one it is remembered and follows.
    /// Without a DERP map there is nothing to check.
    pub fn start(&mut self, now: Instant, full: bool) {
        if self.map.regions.is_empty() {
            return;
        }
        if self.check.is_some() {
            self.again = Some(full || self.again == Some(true));
            return;
        }
        let due = self
            .last_full
            .is_none_or(|at| now.saturating_duration_since(at) > FULL_REPORT_INTERVAL);
        let full = full || due || self.last.is_none();
        if full {
            self.last_full = Some(now);
        }
        let known = self.known();
        let plan = if full {
            plan::full(&self.map, &known)
        } else {
            plan::incremental(&self.map, &known)
        };
        let sets = plan.into_iter().map(|plan| {
            let servers = self.stun_servers(&plan);
            Set::new(now, plan, servers)
        });
        let sets = sets.collect();
        self.period = None;
        self.check = Some(Check::new(now, full, self.own.loopback, sets));
        self.step(now);
    }

    /// Takes a STUN datagram from the discovery socket, received at `now`.
    ///
    /// # Errors
    /// Why it was dropped; it has been counted under that name.
    pub fn handle_datagram(&mut self, now: Instant, bytes: &[u8]) -> Result<(), Drop> {
        let answer = match &mut self.check {
            Some(check) => check.answer(now, bytes),
            None if stun::is_stun(bytes) => Err(Drop::UnknownId),
            None => Err(Drop::NotStun),
        };
        let news = answer.inspect_err(|drop| self.counters.count(*drop))?;
        if news == News::Mapping {
            self.tell_endpoints(now);
        }
        self.step(now);
        Ok(())
    }

    /// Takes the time of one HTTPS request to a region, or its failure, and the family it used.
    pub fn handle_https_latency(
        &mut self,
        now: Instant,
        region: RegionId,
        latency: Option<Duration>,
        v6: bool,
    ) {
        if let Some(check) = &mut self.check {
            check.https(region, v6, latency);
        }
        self.step(now);
    }

    /// A request could not be sent. A host firewall's refusal (`EPERM`) counts as a loss on the way
    /// and need not be told.
    pub fn handle_send_error(&mut self, to: SocketAddr) {
        if let Some(check) = &mut self.check {
            check.can_send(to, false);
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.period.is_some_and(|at| at <= now) {
            self.period = None;
            if self.active {
                self.start(now, false);
            }
        }
        self.step(now);
    }

    /// When [`Self::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let check = self.check.as_ref().map(Check::next_timeout);
        let names = self.names.next_timeout();
        [check, self.period, names].into_iter().flatten().min()
    }

    /// The next STUN request to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Everything dropped so far, by name.
    pub fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counters = self.counters.iter();
        counters.map(|(drop, count)| (drop.name(), count))
    }

    fn known(&self) -> Known {
        let last = self.last.as_ref();
        Known {
            have4: self.own.have(false),
            have6: self.own.have(true),
            home: self.home,
            latency: last
                .map(|report| report.latency.clone())
                .unwrap_or_default(),
            had4: last.is_some_and(|report| !report.latency_v4.is_empty()),
            had6: last.is_some_and(|report| !report.latency_v6.is_empty()),
        }
    }

    /// Sends what is due and ends what is over.
    fn step(&mut self, now: Instant) {
        let Some(check) = &mut self.check else {
            return;
        };
        let rng = &mut self.rng;
        while let Some((to, id)) = check.poll_probe(now, || rng.random()) {
            if self.transmits.len() >= TRANSMITS_MAX {
                self.counters.count(Drop::TransmitsFull);
                continue;
            }
            let bytes = stun::request(id).to_vec();
            self.transmits.push_back(Transmit { to, bytes });
        }
        if !check.over(now) {
            return;
        }
        if !check.report.udp && !check.asked_https() {
            let regions: Vec<RegionId> = https_regions(&self.map).collect();
            check.await_https(&regions);
            if !regions.is_empty() {
                self.event(Event::HttpsLatencyWanted(regions));
                return;
            }
        }
        self.finish(now);
    }

    fn finish(&mut self, now: Instant) {
        let Some(check) = self.check.take() else {
            return;
        };
        let mut report = check.report;
        report.os_has_ipv6 = self.os_has_ipv6;
        report.unresolved = self.unresolved();
        let latency = &report.latency;
        let picked = self.homes.add(now, check.started, latency, self.home);
        self.set_home_from(picked, latency.clone());
        report.home = self.home;
        self.last = Some(report.clone());
        self.tell_endpoints(now);
        self.event(Event::Report(report));
        self.period = Some(now + self.rng.random_range(PERIOD_MIN..=PERIOD_MAX));
        if let Some(full) = self.again.take() {
            self.start(now, full);
        }
    }

    fn set_home_from(&mut self, picked: Option<RegionId>, latency: BTreeMap<RegionId, Duration>) {
        if self.home.is_some() && !self.control_up {
            return;
        }
        let random = || {
            let regions: Vec<RegionId> = https_regions(&self.map).collect();
            let count = regions.len().max(1);
            let index = self.rng.random_range(0..count);
            regions.get(index).copied()
        };
        let home = picked.or(self.home).or_else(random);
        if let Some(region) = home.filter(|home| self.home != Some(*home)) {
            self.home = home;
            if self.control_up {
                self.told = home;
            }
            let latency = latency.get(&region).copied();
            self.event(Event::Home { region, latency });
        }
    }

    fn set_home(&mut self, picked: Option<RegionId>) {
        if picked.is_some() {
            let latency = self.last.as_ref().map(|report| report.latency.clone());
            self.set_home_from(picked, latency.unwrap_or_default());
        }
    }

    /// Gives out the own endpoints with what the running check, or the last one, has found.
    fn tell_endpoints(&mut self, now: Instant) {
        let report = match &self.check {
            Some(check) if check.report.udp => Some(&check.report),
            Some(_) | None => self.last.as_ref(),
        };
        let mut public: Vec<OwnEndpoint> = Vec::new();
        if let Some(report) = report {
            let seen = report.public_endpoints().into_iter();
            public.extend(seen.map(|addr| OwnEndpoint {
                addr,
                kind: EndpointKind::Stun,
            }));
            if let (Some(addr), Some(true), true) = (
                report.global_v4,
                report.mapping_varies,
                self.own.port_is_fixed,
            ) {
                public.push(OwnEndpoint {
                    addr: SocketAddr::new(addr.ip(), self.own.port),
                    kind: EndpointKind::StunLocalPort,
                });
            }
        }
        let listed = self.own.list(now, &public);
        self.event(Event::Endpoints(listed));
    }

    fn event(&mut self, event: Event) {
        if self.events.len() >= EVENTS_MAX {
            self.events.pop_front();
            self.counters.count(Drop::EventsFull);
        }
        self.events.push_back(event);
    }

    /// The nodes whose addresses the map leaves to DNS, in whole or in part.
    fn nodes_by_name(&self) -> impl Iterator<Item = &DerpNode> {
        let nodes = self.map.regions.values().flat_map(|region| &region.nodes);
        nodes.filter(|node| node.v4() == Family::Resolve || node.v6() == Family::Resolve)
    }

    /// The names of nodes for which the map has no address of a family that we have.
    fn needed_names(&self) -> impl Iterator<Item = &str> {
        let needed = self.nodes_by_name().filter(|node| {
            let v4 = matches!(node.v4(), Family::Literal(_)) && self.own.have(false);
            let v6 = matches!(node.v6(), Family::Literal(_)) && self.own.have(true);
            !v4 && !v6
        });
        needed.map(|node| node.host_name.as_str())
    }

    /// Of those, the ones without any answer so far.
    fn unresolved(&self) -> Vec<String> {
        let names = self.needed_names();
        let unknown: BTreeSet<&str> = names
            .filter(|name| self.names.addrs(name).is_empty())
            .collect();
        unknown.into_iter().map(str::to_owned).collect()
    }

    /// Where the nodes of a set's region answer STUN over its family: one place per node in their
    /// order, empty where we know of none, then the further addresses that names gave.
    fn stun_servers(&self, set: &ProbeSet) -> Vec<Option<SocketAddr>> {
        let region = self.map.regions.get(&set.region.0);
        let (mut firsts, mut others) = (Vec::new(), Vec::new());
        for node in region.into_iter().flat_map(|region| &region.nodes) {
            let mut addrs = self.stun_addresses(node, set.v6).into_iter();
            firsts.push(addrs.next());
            others.extend(addrs.map(Some));
        }
        firsts.extend(others);
        firsts
    }

    fn stun_addresses(&self, node: &DerpNode, v6: bool) -> Vec<SocketAddr> {
        let Some(port) = node.stun_port() else {
            return Vec::new();
        };
        let test_ip = node.stun_test_ip.parse::<IpAddr>().ok();
        let literal = if v6 {
            node.v6().literal().map(IpAddr::V6)
        } else {
            node.v4().literal().map(IpAddr::V4)
        };
        let by_name = if v6 {
            node.v6() == Family::Resolve
        } else {
            node.v4() == Family::Resolve
        };
        let ips: Vec<IpAddr> = match test_ip.or(literal) {
            Some(ip) => vec![ip],
            None if by_name => self.names.addrs(&node.host_name).to_vec(),
            None => Vec::new(),
        };
        let of_family = ips.into_iter().filter(|ip| ip.is_ipv6() == v6);
        of_family.map(|ip| SocketAddr::new(ip, port)).collect()
    }
}

/// The regions with a real relay that may be measured over HTTPS.
fn https_regions(map: &DerpMap) -> impl Iterator<Item = RegionId> {
    let usable = map.regions.iter().filter(|(_, region)| {
        let relay = region.nodes.iter().any(|node| !node.stun_only);
        relay && !region.avoid && !region.no_measure_no_home
    });
    usable.map(|(id, _)| RegionId(*id))
}

#[cfg(test)]
mod tests;
