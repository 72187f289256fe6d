//! What reaches a running node, each from its own side, and on to the agent.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use ringtail_dataplane::{Activity, RegionId};
use serde_json::json;

use super::desk::Desk;
use super::ping::ping_peerapi;
use super::renew::Old;
use super::{Ended, Node, SAVE_SOON, now, wall};
use crate::agent::Network;
use crate::config::StaticNetwork;
use crate::coord::{CoordEvent, NotAdmitted};
use crate::driver::device;
use crate::driver::interface::{interface_name, interfaces, source_address, subnets};
use crate::driver::local_api::{self, Call, PingBy};
use crate::driver::names::Past;
use crate::driver::relay::{RelayEvent, RelayPool};
use crate::driver::shards::FromShards;
use crate::driver::{dns_host, status, uapi};
use crate::hostnet::HOST_PARTS;
use crate::key::NodePublic;
use crate::netmap::prefix::DNS_SERVICE_V4;
use crate::path::LinkChange;
use crate::uapi::{DeviceStatus, Errno, Reply, Request};

/// Batches and events taken from the shards before the loop looks elsewhere.
const SHARD_BATCH_MAX: usize = 256;
/// The same for the relay connections.
const RELAY_BATCH_MAX: usize = 256;

/// A look-up for STUN counts as failed after this; its answer is taken when it is asked for again.
const LOOK_UP_LIMIT: Duration = Duration::from_secs(4);
/// How it stands with coordination while its map stream runs.
const CONNECTED: &str = "connected";

/// The server does not take our key any more.
const KEY_EXPIRED: &str =
    "the coordination server says that this node's key has expired: a new one has to be let in";

/// So many minor changes of the host's network are looked into,
const MINOR_BURST: usize = 3;
/// in this time.
const MINOR_WINDOW: Duration = Duration::from_secs(15);

/// What look-ups and measurements in tasks of their own bring back.
pub(super) enum Finding {
    Resolved(String, Vec<IpAddr>),
    HttpsLatency(RegionId, Option<(Duration, SocketAddr)>),
    PlainPeer(NodePublic, SocketAddr),
    /// What the coordination server said to our leaving.
    LoggedOut(Result<(), String>),
}

impl Node {
    /// Takes events, relayed batches and strays of the shards.
    pub(super) fn take_from_shards(&mut self) -> FromShards {
        let now = now();
        for _ in 0..SHARD_BATCH_MAX {
            let event = self.dataplane.poll_event();
            let relayed = self.dataplane.poll_relay();
            let stray = self.dataplane.poll_stray();
            if event.is_none() && relayed.is_none() && stray.is_none() {
                return FromShards::All;
            }
            if let Some((from, bytes)) = stray {
                self.agent.handle_datagram(now, now, from, None, &bytes);
            }
            if let Some(event) = event {
                use ringtail_dataplane::Event;
                let activity = match &event {
                    Event::TunGone => return FromShards::TunGone,
                    Event::Unopened(..) => Activity::default(),
                    Event::Failed(why) => return FromShards::Failed(why.clone()),
                    Event::Kick(id)
                    | Event::Active(id)
                    | Event::NewSource(id, _)
                    | Event::Silent(id)
                    | Event::SendError(id, ..)
                    | Event::SessionUp(id)
                    | Event::SessionDown(id)
                    | Event::Pong(id, ..) => self.dataplane.activity(*id),
                };
                if let Event::Pong(_, number, port) = event
                    && let Some(waiting) = self.pongs.remove(&number)
                {
                    // Who does not wait any more does not want it.
                    let _ = waiting.send(port);
                }
                self.agent.handle_dataplane(now, &event, &activity);
                if let Event::SessionUp(id) = event
                    && !self
                        .agent
                        .peer_key(id)
                        .is_some_and(|key| self.sessions_saved.contains(&key))
                {
                    self.save_at = self.save_at.min(now + SAVE_SOON);
                }
            }
            if let Some(batch) = relayed {
                self.relayed_at = Some(now);
                let packets = batch.datagrams.lens.len();
                if let Some(key) = self
                    .agent
                    .handle_relay_out(batch.peer, batch.region, packets)
                {
                    // Who does not know our new key yet takes it for a stranger's, and knows the old one.
                    for relays in [Some(&self.relays), self.renewal.relays()]
                        .into_iter()
                        .flatten()
                    {
                        relays.send_data(batch.region, &key, &batch.datagrams);
                    }
                }
                self.dataplane.recycle(batch.datagrams);
            }
        }
        FromShards::More
    }

    pub(super) fn take_from_relays(&mut self, first: RelayEvent) {
        let now = now();
        let mut next = Some(first);
        let mut taken = 0;
        while let Some(event) = next {
            self.take_relay_event(now, event);
            taken += 1;
            next = if taken < RELAY_BATCH_MAX {
                self.relay_events.try_recv()
            } else {
                None
            };
        }
    }

    /// What peers send that do not know our new key yet; how the connections stand is nobody's matter any
    /// more.
    pub(super) fn take_from_relays_before(&mut self, event: RelayEvent) {
        if !matches!(event, RelayEvent::News { .. }) {
            self.take_relay_event(now(), event);
        }
    }

    fn take_relay_event(&mut self, now: Instant, event: RelayEvent) {
        match event {
            RelayEvent::Data { region, src, data } => {
                self.relayed_at = Some(now);
                let packets = data.lens.len();
                if let Some(peer) = self.agent.handle_relayed_data(now, region, src, packets)
                    && !self.dataplane.relay_in(peer, region, data)
                {
                    self.agent.count_relayed_too_late(packets);
                }
            }
            RelayEvent::Disco {
                region,
                src,
                packet,
            } => {
                self.agent.handle_relayed_disco(now, region, src, &packet);
            }
            RelayEvent::News { region, news } => {
                self.agent.handle_relay_news(now, region, news);
            }
        }
    }

    /// An error means that the node may not stay in the network, and says why.
    pub(super) fn take_from_coord(&mut self, event: CoordEvent) -> anyhow::Result<Option<Ended>> {
        match event {
            CoordEvent::ControlKey(key) => {
                if let Some(url) = self.surroundings.coordination.clone() {
                    self.keys.control = Some((url, key));
                    self.state.save_keys(&self.keys)?;
                }
                if let Some(coordination) = &mut self.coordination {
                    coordination.config.control_key = Some(key);
                }
            }
            CoordEvent::Registered { user } => {
                self.coordination(true);
                self.surroundings.coordination_state = format!("registered as {user}");
                self.let_in(user);
            }
            CoordEvent::Netmap(map) => {
                self.coordination(true);
                self.surroundings.coordination_state = CONNECTED.into();
                let network = Network::from(&*map);
                self.agent.handle_wall_clock(now(), wall());
                self.agent.handle_map(now(), network.clone());
                self.agent
                    .handle_told_endpoints(now(), &map.self_node.endpoints);
                self.unsaved = Some(network);
                self.tell_up();
                self.look_at_key();
            }
            CoordEvent::AuthUrl(mut url) => {
                if self.renewal.asks_person() {
                    // One address is enough: that for the next key.
                    url = self.login.url().map_or(url, str::to_owned);
                } else {
                    self.ask_person(self.keys.node.public(), url.clone());
                }
                self.surroundings.coordination_state = format!("waiting for approval at {url}");
            }
            CoordEvent::Lost { error, retry_in } => {
                self.coordination(false);
                let connected = self.surroundings.coordination_state == CONNECTED;
                self.surroundings.coordination_state = format!("unreachable: {error}");
                let what = match (connected, self.agent.has_network()) {
                    (true, _) => "coordination lost; the last network map stays in force",
                    (false, true) => "no coordination; the last network map stays in force",
                    (false, false) => "no coordination, and no network map yet",
                };
                tracing::warn!(%error, ?retry_in, "{what}");
            }
            CoordEvent::KeyExpired => {
                self.surroundings.coordination_state = KEY_EXPIRED.into();
                tracing::error!("{KEY_EXPIRED}");
                self.coordination(false);
                self.old_key_ends(Old::Expired);
                self.renew(true);
            }
            // The next one may have taken its place.
            CoordEvent::Fatal(text) if self.is_being_renewed() => {
                tracing::warn!(
                    why = text,
                    "this node's key is good no more: the next one is asked for"
                );
                self.surroundings.coordination_state.clone_from(&text);
                self.coordination(false);
                self.old_key_ends(Old::Gone(text));
            }
            CoordEvent::Fatal(text) => return self.not_admitted(text),
        }
        Ok(None)
    }

    /// Whom this run never let in may try again, as somebody wishes; whom it let in is out.
    pub(super) fn not_admitted(&mut self, why: String) -> anyhow::Result<Option<Ended>> {
        self.refused(&why);
        if self.login.is_in() {
            return Err(NotAdmitted(why).into());
        }
        Ok(Some(Ended::Refused(why)))
    }

    /// Somebody tells us where peers are, and them where we are, or nobody does.
    fn coordination(&mut self, up: bool) {
        self.agent.handle_coordination(up);
        self.pools().for_each(|pool| pool.set_alone(!up));
    }

    /// Says once that the node takes part: when there is a network to take part in.
    pub(super) fn tell_up(&mut self) {
        if !self.told_up && self.agent.has_network() {
            self.told_up = true;
            tracing::info!("node is up");
        }
    }

    /// Answers a question, or does what is wanted.
    pub(super) fn take_call(&mut self, call: Call, desk: &mut Desk) -> Option<Ended> {
        let now = now();
        match &call.request {
            local_api::Request::Status => {
                self.names_changed();
                let dataplane = &self.dataplane;
                let kernel_drops = self.dataplane.discovery_drops();
                let mut status = self
                    .agent
                    .status(now, &self.surroundings, &|id| dataplane.activity(id));
                let relays = self.relays.status();
                let shards = self.dataplane.stats();
                let offloads = self.dataplane.offloads();
                let lost = self.log.lost();
                let host = self.hostnet.report();
                status::complete(&mut status, &relays, &shards, &host, offloads, lost);
                status["drops"]["discovery_kernel"] = kernel_drops.into();
                call.answer(status);
            }
            local_api::Request::Ping { peer, by } => match (by, self.agent.inside(peer)) {
                (PingBy::Disco, _) => {
                    let (question, peer) = (self.next_question(), peer.clone());
                    self.questions.insert(question, call);
                    self.agent.handle_ping(now, question, &peer);
                }
                (_, Err(why)) => call.refuse(&why),
                (PingBy::Tsmp, Ok(there)) => self.ping_tsmp(there, call),
                (PingBy::Peerapi, Ok(there)) => {
                    tokio::task::spawn_local(ping_peerapi(there, call));
                }
            },
            local_api::Request::Netcheck => {
                let question = self.next_question();
                self.questions.insert(question, call);
                self.agent.handle_netcheck_question(now, question);
            }
            local_api::Request::DnsStatus => {
                let mut status = self.dns.status();
                let told = self.resolver.report().manager;
                status["told"] = json!(told.map(|manager| json!({
                    "by": manager.name(), "splits": manager.splits(),
                })));
                call.answer(status);
            }
            local_api::Request::DnsQuery { name, kind } => {
                let answer = self.dns.query(name, kind);
                tokio::task::spawn_local(async move {
                    if let Ok(answer) = answer.await {
                        let _ = call.answers.send(answer).await;
                    }
                });
            }
            local_api::Request::Prefs => call.answer(desk.tell_prefs()),
            local_api::Request::Set { change } => {
                let answer = desk.set(change);
                if answer.is_ok() {
                    self.agent.handle_prefs(now, desk.prefs());
                    self.carry_out();
                }
                let settled = self.hostnet.settled();
                tokio::task::spawn_local(async move {
                    settled.await;
                    call.answer_result(answer);
                });
            }
            local_api::Request::Up => {
                let by_key = self
                    .coordination
                    .as_ref()
                    .and_then(|to| to.config.auth_key.as_ref());
                if self.agent.key_has_expired() && by_key.is_some() {
                    self.renew(false);
                }
                call.answer(json!({"state": "up"}));
            }
            local_api::Request::Down => return Some(Ended::Down(call)),
            local_api::Request::Login => self.take_login(call),
            local_api::Request::Logout => self.take_logout(call),
            local_api::Request::Ip { peer } => {
                let answer = self.agent.addresses_of(peer.as_deref());
                call.answer_result(answer.map_err(anyhow::Error::msg));
            }
            local_api::Request::Whois { address } => {
                let answer = self.agent.whois(*address);
                call.answer_result(answer.map_err(anyhow::Error::msg));
            }
            local_api::Request::ExitNodes => call.answer(self.agent.exit_nodes()),
        }
        None
    }

    /// Answers on the configuration socket. Coordination, or the network file, owns everything that
    /// could be set there, so a `set` of anything is refused.
    pub(super) fn take_configuration_call(&mut self, call: uapi::Call) {
        let answer = match call.request {
            Request::Get => self.configuration(),
            Request::BadGet(errno) => Reply::to_bad_get(errno),
            Request::Set(Ok(transaction)) if transaction.is_empty() => Reply::to_set(Ok(())),
            Request::Set(Ok(_)) => Reply::to_set(Err(Errno::PERMISSION)),
            Request::Set(Err(errno)) => Reply::to_set(Err(errno)),
        };
        // A client that went away does not want it.
        let _ = call.reply.send(answer);
    }

    fn configuration(&self) -> Reply {
        let stats = self.dataplane.stats();
        let device = DeviceStatus {
            private_key: Some(&self.keys.node),
            listen_port: self.dataplane.local_port(),
            fwmark: self.fwmark,
            extras: device::extras(
                &self.dataplane,
                self.engine,
                &stats,
                self.surroundings.mtu.into(),
            ),
        };
        self.agent.configuration(now(), &device, &|id| {
            let activity = self.dataplane.activity(id);
            let handshake = activity
                .last_handshake
                .map(|at| self.handshakes.borrow_mut().wall_time(id, at));
            (activity, handshake)
        })
    }

    pub(super) fn next_question(&mut self) -> u64 {
        // Whoever gave up waiting makes room.
        self.questions.retain(|_, call| !call.answers.is_closed());
        self.questions_asked += 1;
        self.questions_asked
    }

    pub(super) fn take_finding(&mut self, finding: Finding) -> Option<Ended> {
        match finding {
            Finding::LoggedOut(told) => return self.logged_out(told),
            Finding::Resolved(host, found) => self.agent.handle_resolved(now(), &host, found),
            Finding::HttpsLatency(region, measured) => {
                self.agent.handle_https_latency(now(), region, measured);
            }
            Finding::PlainPeer(key, at) => self.agent.handle_plain_endpoint(now(), &key, at),
        }
        None
    }

    /// Reads the static network file again; one that is wrong changes nothing. All else is read at the
    /// start only.
    pub(super) fn read_again(&mut self) {
        let Some(path) = &self.network_file else {
            tracing::info!(
                "SIGHUP: there is nothing to read again; settings count from a restart on"
            );
            return;
        };
        match StaticNetwork::read(path) {
            Ok(network) => {
                tracing::info!(
                    peers = network.peers.len(),
                    "SIGHUP: the network file was read again"
                );
                self.agent.handle_wall_clock(now(), wall());
                self.agent.handle_network(now(), network.into());
            }
            Err(error) => {
                let error = error.to_string();
                tracing::error!(error, "SIGHUP: the network stays as it was");
            }
        }
    }

    /// Another default route or source address makes every path doubtful; anything else may only
    /// have changed our endpoints, which a restless host has looked up now and then.
    pub(super) fn link_changed(&mut self) {
        self.discovery.routes_changed();
        let change = if self.note_default_sources() {
            (self.minor_change, self.new_address) = (Pace::default(), Pace::default());
            LinkChange::Major
        } else if self.note_addresses() && self.new_address.take(now())
            || self.minor_change.take(now())
        {
            LinkChange::Minor
        } else {
            return;
        };
        tracing::info!(?change, "the host's network changed");
        self.pools().for_each(RelayPool::link_changed);
        if change == LinkChange::Major {
            self.redial();
        }
        self.agent.handle_link_change(now(), change);
    }

    /// The machine has slept for so long: nothing that stood then can be counted on.
    pub(super) fn resumed(&mut self, slept: Duration) {
        self.dataplane.resumed();
        self.pools().for_each(|pool| pool.resumed(slept));
        self.redial();
        let dataplane = &self.dataplane;
        self.agent
            .handle_resume(now(), slept, &|id| dataplane.activity(id));
    }

    fn note_default_sources(&mut self) -> bool {
        let fresh = FAR_AWAY.map(|to| source_address(to, self.fwmark));
        let changed = fresh != self.default_sources;
        self.default_sources = fresh;
        changed
    }

    /// Whether this host has other addresses than at the last look. Such a change has a pace of its own, so that
    /// a host whose routes change all the time tells of a new address at once.
    fn note_addresses(&mut self) -> bool {
        let Ok(fresh) = interfaces() else {
            return false;
        };
        let changed = fresh != self.addresses;
        self.addresses = fresh;
        changed
    }

    pub(super) fn list_interfaces(&mut self, now: Instant) {
        self.note_default_sources();
        match interfaces() {
            Ok(found) => {
                let os_has_ipv6 = std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
                self.agent.handle_interfaces(now, &found, os_has_ipv6);
            }
            Err(error) => tracing::warn!(%error, "own addresses stay unknown"),
        }
        match subnets(self.dataplane.tun_name()) {
            Ok(found) => self.agent.handle_subnets(now, found),
            Err(error) => tracing::warn!(%error, "own subnets stay unknown"),
        }
    }

    /// What names are for, whom the host asks, or who else answers for names on it, may be another.
    pub(super) fn names_changed(&mut self) {
        let resolver = self.resolver.report();
        self.names.set_past(Some(Past {
            servers: resolver.outside,
            search: resolver.base.search,
            first: self.dns.is_behind_tunnel(),
            fwmark: self.fwmark,
        }));
        let service = IpAddr::from(DNS_SERVICE_V4);
        let host = self.hostnet.report();
        let mut conflicts = host.conflicts.iter();
        let taken = conflicts.any(|conflict| conflict.route == service.into());
        // Before that is known, nobody is told: another's resolver would be ours for a moment.
        let is_free = !taken && host.services.contains(&service);
        let guests = host.guest_links.into_iter().filter_map(interface_name);
        self.dns.set_guests(guests.collect());
        let mut problems = self.dns.problems();
        if taken {
            problems.push(format!(
                "another program on this host answers for names on {DNS_SERVICE_V4}: the host's resolver is not told of ours"
            ));
        }
        let missing = host.missing.contains(&service);
        if missing {
            problems.push(format!(
                "this host does not have the address {DNS_SERVICE_V4}, on which names are answered: its resolver is not \
                 told of ours"
            ));
        }
        let wished = self.dns.host_wish().filter(|_| is_free && !missing);
        self.resolver.set(wished.unwrap_or_default());
        self.agent.set_health("dns", problems);
    }

    /// What is not as it should be with the host's network, for people.
    pub(super) fn take_host_news(&mut self) {
        self.names_changed();
        let report = self.hostnet.report();
        self.agent.handle_handed(now(), report.handed);
        self.agent.handle_lost(report.lost);
        let mut problems = report.problems;
        for part in HOST_PARTS {
            let of_part = problems.extract_if(.., |problem| problem.part == part);
            let lines = of_part.map(|problem| problem.text).collect();
            self.agent.set_health(part, lines);
        }
    }

    /// The host's resolver is set to other servers, or does not ask ours as it should.
    pub(super) fn take_resolver_news(&mut self, report: dns_host::Report) {
        self.agent.set_health("resolver", report.problems);
        self.dns.set_host_resolvers(report.base.servers);
        self.names_changed();
        self.hostnet.set_resolvers(&report.outside);
    }

    pub(super) fn resolve(&self, host: String) {
        let (findings, names) = (self.findings.0.clone(), self.names.clone());
        tokio::task::spawn_local(async move {
            let found = names.look_up(&host, LOOK_UP_LIMIT).await;
            let found = found.unwrap_or_else(|error| {
                tracing::debug!(%error, "a relay is not found");
                Vec::new()
            });
            let _ = findings.send(Finding::Resolved(host, found)).await;
        });
    }

    pub(super) fn measure_https(&self, regions: &[RegionId]) {
        for &region in regions {
            let (findings, latency) = (self.findings.0.clone(), self.relays.https_latency(region));
            tokio::task::spawn_local(async move {
                let latency = latency.await.ok();
                let _ = findings.send(Finding::HttpsLatency(region, latency)).await;
            });
        }
    }
}

/// Lets a thing happen at once, but [`MINOR_BURST`] times in [`MINOR_WINDOW`] at most.
#[derive(Clone, Debug, Default)]
pub(super) struct Pace {
    done: VecDeque<Instant>,
    due: Option<Instant>,
}

impl Pace {
    /// Whether it may happen now; if not, it is due later.
    fn take(&mut self, now: Instant) -> bool {
        while self
            .done
            .front()
            .is_some_and(|at| *at + MINOR_WINDOW <= now)
        {
            self.done.pop_front();
        }
        if self.done.len() < MINOR_BURST {
            self.done.push_back(now);
            self.due = None;
        } else {
            self.due = self.done.front().map(|at| *at + MINOR_WINDOW);
        }
        self.due.is_none()
    }

    /// When what had to wait may happen.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }
}

/// Addresses of the internet, to ask the kernel which source it would use; nothing is sent.
const FAR_AWAY: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(8, 8, 8, 8)), 53),
    SocketAddr::new(
        IpAddr::V6(Ipv6Addr::new(0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8888)),
        53,
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::start;

    #[test]
    fn what_comes_too_early_happens_later() {
        let began = start();
        let at = |secs| began + Duration::from_secs(secs);
        let mut pace = Pace::default();
        for secs in 0..3 {
            assert!(pace.take(at(secs)));
        }
        assert_eq!(pace.due(), None);
        for secs in [3, 9, 14] {
            assert!(!pace.take(at(secs)));
            assert_eq!(pace.due(), Some(at(15)));
        }
        assert!(pace.take(at(15)));
        assert_eq!(pace.due(), None);
        assert!(pace.take(at(16)) && pace.take(at(17)) && !pace.take(at(18)));
    }
}
