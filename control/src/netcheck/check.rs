//! One running check: probes out, answers in, and when it is over.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ringtail_dataplane::RegionId;

use super::plan::ProbeSet;
use super::{Drop, PROBES_MAX, REGIONS_ENOUGH, REPORT_LIMIT, Report, STUN_LIMIT, usable};
use crate::stun::{self, TxId};

/// One set of probes with the addresses to ask, in the order of its region's nodes.
#[derive(Clone, Debug)]
pub(super) struct Set {
    pub(super) plan: ProbeSet,
    /// The node of try `n` is `servers[n mod len]`; a node without an address of the family is
    /// `None`.
    pub(super) servers: Vec<Option<SocketAddr>>,
    started: Instant,
    next: usize,
    done: bool,
}

impl Set {
    pub(super) fn new(now: Instant, plan: ProbeSet, servers: Vec<Option<SocketAddr>>) -> Self {
        let done = servers.iter().all(Option::is_none);
        Self {
            plan,
            servers,
            started: now,
            next: 0,
            done,
        }
    }

    fn next_at(&self) -> Option<Instant> {
        let delay = self.plan.delays.get(self.next).filter(|_| !self.done)?;
        Some(self.started + *delay)
    }
}

/// A request on its way.
#[derive(Clone, Copy, Debug)]
struct Probe {
    set: usize,
    server: SocketAddr,
    sent: Instant,
}

/// How far a check is.
#[derive(Clone, Debug)]
enum Stage {
    /// STUN, until then.
    Stun { until: Instant },
    /// HTTPS latencies of these regions are awaited, until then.
    Https {
        until: Instant,
        awaited: BTreeSet<RegionId>,
    },
}

/// A running check.
#[derive(Clone, Debug)]
pub(super) struct Check {
    pub(super) started: Instant,
    pub(super) report: Report,
    loopback: bool,
    sets: Vec<Set>,
    probes: BTreeMap<TxId, Probe>,
    /// Who reported each mapping: a server counts once.
    witnesses: BTreeSet<(SocketAddr, SocketAddr)>,
    stage: Stage,
}

/// What an answer changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// The first mapping of its family, or one that a second server now confirms.
    Mapping,
    Nothing,
}

impl Check {
    pub(super) fn new(now: Instant, full: bool, loopback: bool, sets: Vec<Set>) -> Self {
        Self {
            started: now,
            report: Report {
                full,
                ..Report::default()
            },
            loopback,
            sets,
            probes: BTreeMap::new(),
            witnesses: BTreeSet::new(),
            stage: Stage::Stun {
                until: now + STUN_LIMIT,
            },
        }
    }

    /// The next request that is due; sets that can no longer help are ended instead.
    pub(super) fn poll_probe(
        &mut self,
        now: Instant,
        mut tx_id: impl FnMut() -> TxId,
    ) -> Option<(SocketAddr, TxId)> {
        for index in 0..self.sets.len() {
            while self.sets[index].next_at().is_some_and(|at| at <= now) {
                if self.useless(index) || self.probes.len() >= PROBES_MAX {
                    self.sets[index].done = true;
                    break;
                }
                let set = &mut self.sets[index];
                let server = set.servers[set.next % set.servers.len()];
                set.next += 1;
                let Some(server) = server else {
                    continue;
                };
                let id = tx_id();
                let sent = now;
                let probe = Probe {
                    set: index,
                    server,
                    sent,
                };
                self.probes.insert(id, probe);
                self.can_send(server, true);
                return Some((server, id));
            }
        }
        None
    }

    /// Whether the region is measured and its other answers would tell nothing new.
    fn useless(&self, set: usize) -> bool {
        let plan = &self.sets[set].plan;
        let told = if plan.v6 {
            !self.report.latency_v6.is_empty()
        } else {
            self.report.mapping_varies.is_some()
        };
        self.report.latency.contains_key(&plan.region) && told
    }

    /// Takes an answer.
    pub(super) fn answer(&mut self, now: Instant, datagram: &[u8]) -> Result<News, Drop> {
        let response = stun::parse_response(datagram).map_err(|error| match error {
            stun::Error::NotStun => Drop::NotStun,
            stun::Error::NotSuccess => Drop::NotSuccess,
            stun::Error::Malformed => Drop::Malformed,
        })?;
        let probe = self.probes.remove(&response.tx_id).ok_or(Drop::UnknownId)?;
        if !usable(response.address, self.loopback) {
            return Err(Drop::BadAddress);
        }
        let set = &mut self.sets[probe.set];
        set.done = true;
        let (region, v6) = (set.plan.region, set.plan.v6);
        self.latency(region, v6, now.saturating_duration_since(probe.sent));
        self.report.udp = true;
        self.end_when_enough(now);
        Ok(self.mapping(response.address, probe.server))
    }

    fn latency(&mut self, region: RegionId, v6: bool, latency: Duration) {
        let report = &mut self.report;
        let family = if v6 {
            report.ipv6 = true;
            &mut report.latency_v6
        } else {
            report.ipv4 = true;
            &mut report.latency_v4
        };
        for table in [family, &mut report.latency] {
            let best = table.entry(region).or_insert(latency);
            *best = latency.min(*best);
        }
    }

    fn mapping(&mut self, addr: SocketAddr, server: SocketAddr) -> News {
        let report = &mut self.report;
        let first = match addr.ip() {
            IpAddr::V4(_) => {
                let first = report.global_v4.is_none();
                match report.global_v4 {
                    None => report.global_v4 = Some(addr),
                    Some(reference) if reference != addr => report.mapping_varies = Some(true),
                    Some(_) => {
                        report.mapping_varies.get_or_insert(false);
                    }
                }
                first
            }
            IpAddr::V6(_) => report.global_v6.replace(addr).is_none(),
        };
        if !self.witnesses.insert((addr, server)) {
            return News::Nothing;
        }
        let counters = if addr.is_ipv6() {
            &mut report.mappings_v6
        } else {
            &mut report.mappings_v4
        };
        let servers = counters.entry(addr).or_default();
        *servers += 1;
        let confirmed = *servers == 2 && report.global_v4 != Some(addr);
        if first || confirmed {
            News::Mapping
        } else {
            News::Nothing
        }
    }

    /// Three regions are enough: those still out get once the slowest's time in an incremental
    /// check, twice in a full one.
    fn end_when_enough(&mut self, now: Instant) {
        let report = &self.report;
        if report.latency.len() != REGIONS_ENOUGH {
            return;
        }
        let slowest = report.latency.values().max().copied().unwrap_or_default();
        let more = slowest * if report.full { 2 } else { 1 };
        if let Stage::Stun { until } = &mut self.stage {
            *until = (*until).min(now + more);
        }
    }

    /// Gives addresses to the sets that had none: their probes leave from now on, and without an
    /// answer so far they get as long as the others had. False if no set was waiting for any.
    pub(super) fn take_servers(
        &mut self,
        now: Instant,
        servers: impl Fn(&ProbeSet) -> Vec<Option<SocketAddr>>,
    ) -> bool {
        let mut joined = false;
        for set in &mut self.sets {
            if set.servers.iter().all(Option::is_none) {
                *set = Set::new(now, set.plan.clone(), servers(&set.plan));
                joined |= !set.done;
            }
        }
        if joined && !self.report.udp {
            let until = now + STUN_LIMIT;
            self.stage = Stage::Stun { until };
        }
        joined
    }

    /// Begins to wait for HTTPS latencies of these regions.
    pub(super) fn await_https(&mut self, regions: &[RegionId]) {
        self.stage = Stage::Https {
            until: self.started + REPORT_LIMIT,
            awaited: regions.iter().copied().collect(),
        };
    }

    /// Takes an HTTPS latency, or its failure.
    pub(super) fn https(&mut self, region: RegionId, v6: bool, latency: Option<Duration>) {
        let Stage::Https { awaited, .. } = &mut self.stage else {
            return;
        };
        if !awaited.remove(&region) {
            return;
        }
        if let Some(latency) = latency {
            self.latency(region, v6, latency);
        }
    }

    /// A request leaves for this address, or could not be sent.
    pub(super) fn can_send(&mut self, to: SocketAddr, can: bool) {
        if to.is_ipv6() {
            self.report.ipv6_can_send = can;
        } else {
            self.report.ipv4_can_send = can;
        }
    }

    /// Whether the present stage is over.
    pub(super) fn over(&self, now: Instant) -> bool {
        match &self.stage {
            Stage::Stun { until } => *until <= now || self.sets.iter().all(|set| set.done),
            Stage::Https { until, awaited } => *until <= now || awaited.is_empty(),
        }
    }

    /// Whether HTTPS has been asked for.
    pub(super) fn asked_https(&self) -> bool {
        matches!(self.stage, Stage::Https { .. })
    }

    pub(super) fn next_timeout(&self) -> Instant {
        match &self.stage {
            Stage::Stun { until } => {
                let probes = self.sets.iter().filter_map(Set::next_at);
                probes.min().map_or(*until, |at| at.min(*until))
            }
            Stage::Https { until, .. } => *until,
        }
    }
}
