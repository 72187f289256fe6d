//! Two nodes, what lies between them, and the clock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use ringtail_dataplane::{Class, RegionId, classify};

use super::net::{INTERNET, Middlebox, Zone};
use super::shard::{PEER, Shard};
use crate::key::{DiscoPrivate, NodePrivate};
use crate::netcheck::{self, Interface, Netcheck};
use crate::netmap::DerpMap;
use crate::path::{
    Config, Event, FailedTest, Manager, PeerSetup, Phase, StateName, Status, Story, Transmit, Via,
};
use crate::{stun, testing};

pub(super) const MS: Duration = Duration::from_millis(1);
pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const PORT: u16 = 41641;
pub(super) const REGION: RegionId = RegionId(1);
/// The same instant again and again this often is a machine that spins.
const STEPS_AT_ONCE_MAX: u32 = 20_000;

/// What travels.
#[derive(Clone, Debug)]
enum Payload {
    Disco(Vec<u8>),
    /// Data: the ping of a node (`echo` false) or the answer to it.
    Data {
        echo: bool,
        seq: u64,
    },
}

#[derive(Clone, Debug)]
enum Action {
    Udp {
        zone: Zone,
        from: SocketAddr,
        to: SocketAddr,
        payload: Payload,
    },
    Relay {
        to: usize,
        payload: Payload,
    },
    /// The application of a node sends its next ping.
    Ping {
        node: usize,
    },
}

/// How the net behaves now.
#[derive(Clone, Debug)]
pub(super) struct Weather {
    /// One way between hosts.
    pub(super) delay: Duration,
    pub(super) jitter: Duration,
    pub(super) relay_delay: Duration,
    /// Of a thousand direct packets, and of a thousand relayed ones.
    pub(super) loss: u32,
    pub(super) relay_loss: u32,
    /// Larger direct packets are lost without a word, from the nodes that this holds for.
    pub(super) mtu: usize,
    pub(super) narrow_from: [bool; 2],
    /// Unless they may be fragmented, and fragments pass.
    pub(super) fragments: bool,
    /// UDP payload of the application's packets, in bytes.
    pub(super) data_len: usize,
    /// UDP from the internet is dropped on arrival at these nodes.
    pub(super) blocked: [bool; 2],
    /// STUN servers do not answer.
    pub(super) no_stun: bool,
    /// The receiver answers pings; if not, the stream goes one way.
    pub(super) echo: bool,
}

impl Default for Weather {
    fn default() -> Self {
        Self {
            delay: 10 * MS,
            jitter: Duration::ZERO,
            relay_delay: 25 * MS,
            loss: 0,
            relay_loss: 0,
            mtu: 1500,
            narrow_from: [true; 2],
            fragments: false,
            data_len: 148,
            blocked: [false; 2],
            no_stun: false,
            echo: true,
        }
    }
}

/// One node with its place in the net.
pub(super) struct Node {
    pub(super) paths: Manager,
    pub(super) netcheck: Netcheck,
    pub(super) shard: Shard,
    pub(super) zone: Zone,
    pub(super) addrs: Vec<IpAddr>,
    pub(super) setup: PeerSetup,
    disco: DiscoPrivate,
    /// Pings sent, and when the answer came.
    pub(super) pings: BTreeMap<u64, (Instant, Option<Instant>)>,
    /// When pings of the other node arrived first.
    pub(super) arrivals: Vec<Instant>,
    interval: Option<Duration>,
    pub(super) story: Vec<(Instant, Story)>,
    /// Endpoints that STUN and the interfaces give.
    pub(super) endpoints: Vec<SocketAddr>,
    pub(super) switched_off: bool,
}

pub(super) struct World {
    pub(super) now: Instant,
    pub(super) rng: StdRng,
    pub(super) boxes: Vec<Middlebox>,
    pub(super) nodes: [Node; 2],
    pub(super) weather: Weather,
    queue: BTreeMap<(Instant, u64), Action>,
    queued: u64,
    /// Data packets that left by each way.
    pub(super) sent_direct: u64,
    pub(super) sent_relayed: u64,
    /// Of each node, those that left by both.
    pub(super) sent_twice: [u64; 2],
}

/// What a test failed at, if that is what the story tells.
pub(super) fn failed(what: &Story) -> Option<FailedTest> {
    let Story::Validate { phase, .. } = what else {
        return None;
    };
    match phase {
        Phase::Fail { test, .. } => Some(*test),
        Phase::Start | Phase::Pass { .. } => None,
    }
}

fn stun_servers() -> BTreeSet<SocketAddr> {
    ["203.0.113.1:3478", "203.0.113.2:3478"]
        .map(|text| text.parse().unwrap())
        .into()
}

impl World {
    /// Two nodes at these places (zone and addresses), with what is configured for each.
    pub(super) fn new(
        seed: u64,
        config: &Config,
        boxes: Vec<Middlebox>,
        places: [(Zone, Vec<IpAddr>, Vec<SocketAddr>); 2],
    ) -> Self {
        let start = testing::start();
        let mut rng = StdRng::seed_from_u64(seed);
        let keys = [0, 1].map(|_: u8| {
            let node = NodePrivate::clamped(rng.random()).public();
            (node, DiscoPrivate::clamped(rng.random()))
        });
        let mut index = 0;
        let nodes = places.map(|(zone, addrs, configured)| {
            let (node_key, disco) = keys[index].clone();
            index += 1;
            let setup = PeerSetup {
                id: PEER,
                node_key,
                disco_key: Some(disco.public()),
                home: Some(REGION),
                endpoints: Vec::new(),
            };
            let mut netcheck = Netcheck::new(PORT, false, false, StdRng::from_rng(&mut rng));
            let eth = Interface {
                name: "eth0".into(),
                addrs: addrs.clone(),
            };
            netcheck.set_interfaces(start, &[eth], "ringtail0", true);
            netcheck.set_configured_endpoints(start, configured);
            netcheck.set_derp_map(start, &DerpMap::of_regions(2));
            netcheck.set_active(start, true);
            Node {
                paths: Manager::new(
                    start,
                    config.clone(),
                    node_key,
                    disco.clone(),
                    StdRng::from_rng(&mut rng),
                ),
                disco,
                netcheck,
                shard: Shard::default(),
                zone,
                addrs,
                setup,
                pings: BTreeMap::new(),
                arrivals: Vec::new(),
                interval: None,
                story: Vec::new(),
                endpoints: Vec::new(),
                switched_off: false,
            }
        });
        let mut world = Self {
            now: start,
            rng,
            boxes,
            nodes,
            weather: Weather::default(),
            queue: BTreeMap::new(),
            queued: 0,
            sent_direct: 0,
            sent_relayed: 0,
            sent_twice: [0; 2],
        };
        world.pump(0);
        world.pump(1);
        // Both find their endpoints before they hear of each other.
        world.run(4 * SECOND);
        world.introduce();
        world
    }

    /// Each learns what the other's network map entry says now.
    pub(super) fn introduce(&mut self) {
        for (node, other) in [(0, 1), (1, 0)] {
            let mut setup = self.nodes[other].setup.clone();
            setup.endpoints = self.nodes[other].endpoints.clone();
            self.nodes[node].paths.set_peers(self.now, &[setup], &[]);
            self.pump(node);
        }
    }

    /// The process of a node is started anew: it knows its keys and what the network map says.
    pub(super) fn restart(&mut self, node: usize, config: &Config) {
        let rng = StdRng::from_rng(&mut self.rng);
        let target = &mut self.nodes[node];
        let (node_key, disco) = (target.setup.node_key, target.disco.clone());
        target.paths = Manager::new(self.now, config.clone(), node_key, disco, rng);
        target
            .paths
            .set_own_endpoints(self.now, target.endpoints.clone());
        target.shard = Shard::default();
        target.switched_off = false;
        self.introduce();
    }

    /// The application of `node` pings the other one every `interval`, from `after` on.
    pub(super) fn ping_from(&mut self, node: usize, after: Duration, interval: Duration) {
        let running = self.nodes[node].interval.replace(interval).is_some();
        if !running {
            self.push(self.now + after, Action::Ping { node });
        }
    }

    pub(super) fn stop_pings(&mut self) {
        for node in &mut self.nodes {
            node.interval = None;
        }
        self.queue
            .retain(|_, action| !matches!(action, Action::Ping { .. }));
    }

    /// Ends the stream and waits for what is on its way; when it ended.
    pub(super) fn end_pings(&mut self) -> Instant {
        let end = self.now;
        self.stop_pings();
        self.run(SECOND);
        end
    }

    pub(super) fn status(&self, node: usize) -> Status {
        self.nodes[node].paths.status(self.now, PEER).unwrap()
    }

    pub(super) fn state(&self, node: usize) -> StateName {
        self.status(node).state
    }

    pub(super) fn both_direct(&self) -> bool {
        self.state(0) == StateName::Direct && self.state(1) == StateName::Direct
    }

    /// Both are direct, and by what has answered since.
    pub(super) fn both_alive(&self, since: Instant) -> bool {
        let alive = |node: usize| {
            let best = self.status(node).best;
            best.is_some_and(|best| self.now - best.last_pong > since)
        };
        self.both_direct() && alive(0) && alive(1)
    }

    /// What the node's tests of candidates failed at.
    pub(super) fn fails(&self, node: usize) -> Vec<FailedTest> {
        let story = self.nodes[node].story.iter();
        story.filter_map(|(_, what)| failed(what)).collect()
    }

    /// Runs until `wanted` holds, for at most `limit`; the time it took.
    pub(super) fn run_until(
        &mut self,
        limit: Duration,
        wanted: impl Fn(&Self) -> bool,
    ) -> Option<Duration> {
        let begin = self.now;
        let mut steps = 0;
        while !wanted(self) {
            let before = self.now;
            if !self.step(begin + limit) {
                return None;
            }
            steps = if self.now == before { steps + 1 } else { 0 };
            assert!(steps < STEPS_AT_ONCE_MAX, "time stands still");
        }
        Some(self.now - begin)
    }

    pub(super) fn run(&mut self, time: Duration) {
        assert_eq!(self.run_until(time, |_| false), None);
    }

    /// Pings sent in `range` after the start without an answer by now.
    pub(super) fn lost(&self, node: usize, range: std::ops::Range<Instant>) -> usize {
        let pings = self.nodes[node].pings.values();
        pings
            .filter(|(at, answer)| range.contains(at) && answer.is_none())
            .count()
    }

    /// The longest time without an answer, or in a one-way stream without an arrival, since `from`.
    pub(super) fn longest_gap(&self, node: usize, from: Instant) -> Duration {
        let mut times: Vec<Instant> = if self.weather.echo {
            let pings = self.nodes[node].pings.values();
            pings.filter_map(|(_, answer)| *answer).collect()
        } else {
            self.nodes[1 - node].arrivals.clone()
        };
        times.retain(|at| *at >= from);
        times.extend([from, self.now]);
        times.sort();
        times
            .windows(2)
            .map(|pair| pair[1] - pair[0])
            .max()
            .unwrap_or_default()
    }

    /// The silence since `from` has not been longer than `limit`.
    pub(super) fn assert_gap(&self, from: Instant, limit: Duration, name: &str) {
        let gap = self.longest_gap(0, from);
        assert!(gap <= limit, "blackout {gap:?}: {name}");
    }

    /// One event, or `false` if none is due before `end`.
    fn step(&mut self, end: Instant) -> bool {
        let queued = self.queue.first_key_value().map(|((at, _), _)| *at);
        let timers = [0, 1].map(|node: usize| {
            let node = &self.nodes[node];
            let both = [node.paths.poll_timeout(), node.netcheck.poll_timeout()];
            both.into_iter().flatten().min()
        });
        let next = [queued, timers[0], timers[1]].into_iter().flatten().min();
        let Some(next) = next.filter(|at| *at <= end) else {
            self.now = self.now.max(end);
            return false;
        };
        self.now = next.max(self.now);
        if queued == Some(next) {
            let (_, action) = self.queue.pop_first().unwrap();
            self.act(action);
            return true;
        }
        for (node, timer) in timers.into_iter().enumerate() {
            if timer == Some(next) {
                let activity = self.nodes[node].shard.activity;
                self.nodes[node].netcheck.handle_timeout(self.now);
                self.nodes[node]
                    .paths
                    .handle_timeout(self.now, &|_| activity);
                self.pump(node);
            }
        }
        true
    }

    fn push(&mut self, at: Instant, action: Action) {
        self.queued += 1;
        self.queue.insert((at, self.queued), action);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Udp {
                zone,
                from,
                to,
                payload,
            } => self.route(zone, from, to, payload),
            Action::Relay { to, payload } => match payload {
                Payload::Disco(bytes) => {
                    let source = self.nodes[1 - to].setup.node_key;
                    let paths = &mut self.nodes[to].paths;
                    let _ = paths.handle_relayed(self.now, REGION, source, &bytes);
                    self.pump(to);
                }
                Payload::Data { echo, seq } => self.data(to, None, echo, seq),
            },
            Action::Ping { node } => {
                let seq = self.nodes[node].pings.len() as u64;
                self.nodes[node].pings.insert(seq, (self.now, None));
                self.send_data(node, false, seq);
                if let Some(interval) = self.nodes[node].interval {
                    self.push(self.now + interval, Action::Ping { node });
                }
            }
        }
    }

    fn send_data(&mut self, node: usize, echo: bool, seq: u64) {
        let ways = self.nodes[node].shard.send(self.now);
        let payload = Payload::Data { echo, seq };
        self.sent_twice[node] += u64::from(ways.udp.is_some() && ways.relay.is_some());
        if let Some(to) = ways.udp {
            self.sent_direct += 1;
            self.send_udp(node, to, self.weather.data_len, false, payload.clone());
        }
        if ways.relay.is_some() {
            self.sent_relayed += 1;
            self.send_relay(node, payload);
        }
        self.pump(node);
    }

    fn data(&mut self, node: usize, from: Option<SocketAddr>, echo: bool, seq: u64) {
        let now = self.now;
        let node_ref = &mut self.nodes[node];
        if from.is_none() {
            node_ref.paths.handle_relay_arrival(now, PEER, REGION);
        }
        let new = node_ref.shard.receive(now, from, (echo, seq));
        if echo && new {
            if let Some((_, answer)) = node_ref.pings.get_mut(&seq) {
                *answer = Some(now);
            }
        } else if new {
            self.nodes[node].arrivals.push(now);
            if self.weather.echo {
                self.send_data(node, true, seq);
            }
        }
        self.pump(node);
    }

    fn lost_in(&mut self, per_mille: u32) -> bool {
        self.rng.random_range(0..1000) < per_mille
    }

    fn send_relay(&mut self, node: usize, payload: Payload) {
        if !self.lost_in(self.weather.relay_loss) && !self.nodes[1 - node].switched_off {
            let at = self.now + self.weather.relay_delay;
            self.push(
                at,
                Action::Relay {
                    to: 1 - node,
                    payload,
                },
            );
        }
    }

    fn send_udp(
        &mut self,
        node: usize,
        to: SocketAddr,
        len: usize,
        dont_fragment: bool,
        payload: Payload,
    ) {
        let headers = if to.is_ipv4() { 28 } else { 48 };
        let to_server = stun_servers().contains(&to);
        let lost = self.lost_in(self.weather.loss);
        let weather = &self.weather;
        let large = weather.narrow_from[node] && len + headers > weather.mtu;
        let cut = weather.fragments && !dont_fragment;
        if !to_server && (large && !cut || lost) {
            return;
        }
        let same_family = |ip: &&IpAddr| ip.is_ipv4() == to.is_ipv4();
        let Some(ip) = self.nodes[node].addrs.iter().find(same_family) else {
            return;
        };
        let from = SocketAddr::new(*ip, PORT);
        let zone = self.nodes[node].zone;
        self.route(zone, from, to, payload);
    }

    /// Moves a packet one zone further: to a host, in or out through a box, or nowhere.
    fn route(&mut self, zone: Zone, from: SocketAddr, to: SocketAddr, payload: Payload) {
        let now = self.now;
        if zone == INTERNET && stun_servers().contains(&to) {
            if let Payload::Disco(bytes) = &payload
                && !self.weather.no_stun
                && let Some(answer) = stun::respond(bytes, from)
            {
                let payload = Payload::Disco(answer.as_ref().to_vec());
                let at = now + self.weather.delay;
                let (from, to) = (to, from);
                self.push(
                    at,
                    Action::Udp {
                        zone,
                        from,
                        to,
                        payload,
                    },
                );
            }
            return;
        }
        let here = |node: &Node| node.zone == zone && node.addrs.contains(&to.ip());
        if let Some(node) = self.nodes.iter().position(here) {
            self.arrive(node, from, payload);
            return;
        }
        let enters = |hop: &Middlebox| hop.outside == zone && hop.external == to.ip();
        if let Some(index) = self.boxes.iter().position(enters) {
            if let Some((zone, to)) = self.boxes[index].inbound(now, from, to) {
                self.route(zone, from, to, payload);
            }
            return;
        }
        let leaves = |hop: &Middlebox| {
            let v6_stays = hop.external.is_ipv4() == to.is_ipv4();
            hop.inside.contains(&zone) && v6_stays
        };
        let Some(index) = self.boxes.iter().position(leaves) else {
            return;
        };
        let hop = &mut self.boxes[index];
        let Some(from) = hop.outbound(now, zone, from, to) else {
            return;
        };
        let outside = hop.outside;
        if hop.external == to.ip() {
            if hop.hairpin
                && let Some((zone, to)) = hop.inbound(now, from, to)
            {
                self.route(zone, from, to, payload);
            }
            return;
        }
        if outside == INTERNET {
            let jitter = self.weather.jitter.mul_f64(self.rng.random());
            let at = now + self.weather.delay + jitter;
            let zone = outside;
            self.push(
                at,
                Action::Udp {
                    zone,
                    from,
                    to,
                    payload,
                },
            );
        } else {
            self.route(outside, from, to, payload);
        }
    }

    fn arrive(&mut self, node: usize, from: SocketAddr, payload: Payload) {
        let from_server = stun_servers().contains(&from);
        if self.nodes[node].switched_off || self.weather.blocked[node] && !from_server {
            return;
        }
        let now = self.now;
        match payload {
            Payload::Disco(bytes) => {
                let target = &mut self.nodes[node];
                if classify(&bytes) == Class::Stun {
                    let _ = target.netcheck.handle_datagram(now, &bytes);
                } else {
                    let _ = target.paths.handle_datagram(now, from, &bytes);
                }
                self.pump(node);
            }
            Payload::Data { echo, seq } => self.data(node, Some(from), echo, seq),
        }
    }

    /// Hands everything a node's cores put out to where it belongs.
    pub(super) fn pump(&mut self, node: usize) {
        let now = self.now;
        loop {
            let events = std::mem::take(&mut self.nodes[node].shard.events);
            let mut idle = events.is_empty();
            for event in events {
                let target = &mut self.nodes[node];
                let activity = target.shard.activity;
                target.paths.handle_event(now, &event, &activity);
            }
            while let Some(transmit) = self.nodes[node].netcheck.poll_transmit() {
                idle = false;
                let payload = Payload::Disco(transmit.bytes);
                self.send_udp(node, transmit.to, 40, false, payload);
            }
            while let Some(event) = self.nodes[node].netcheck.poll_event() {
                idle = false;
                self.netcheck_event(node, event);
            }
            while let Some(transmit) = self.nodes[node].paths.poll_transmit() {
                let Transmit {
                    via,
                    dont_fragment,
                    bytes,
                    ..
                } = transmit;
                idle = false;
                let len = bytes.len();
                let payload = Payload::Disco(bytes);
                match via {
                    Via::Udp(to) => self.send_udp(node, to, len, dont_fragment, payload),
                    Via::Derp { .. } => self.send_relay(node, payload),
                }
            }
            while let Some((_, decision)) = self.nodes[node].paths.poll_decision() {
                idle = false;
                self.nodes[node].shard.decide(now, decision);
            }
            while let Some(event) = self.nodes[node].paths.poll_event() {
                idle = false;
                let target = &mut self.nodes[node];
                match event {
                    Event::RestunWanted(_) => target.netcheck.start(now, false),
                    Event::Reported { peer, addr } => {
                        target.netcheck.handle_reported(now, peer, addr);
                    }
                    Event::Story { what, .. } => target.story.push((now, what)),
                    Event::RebindWanted | Event::PingReply { .. } | Event::PingTimeout { .. } => {}
                }
            }
            if idle {
                return;
            }
        }
    }

    fn netcheck_event(&mut self, node: usize, event: netcheck::Event) {
        let now = self.now;
        let target = &mut self.nodes[node];
        match event {
            netcheck::Event::HttpsLatencyWanted(regions) => {
                for region in regions {
                    target
                        .netcheck
                        .handle_https_latency(now, region, Some(50 * MS), false);
                }
            }
            netcheck::Event::Endpoints(endpoints) => {
                let addrs: Vec<SocketAddr> = endpoints.iter().map(|found| found.addr).collect();
                target.endpoints = addrs.clone();
                target.paths.set_own_endpoints(now, addrs);
            }
            netcheck::Event::Report(_) | netcheck::Event::Home { .. } => {}
        }
    }
}
