//! The node's relay connections: one per region, all on the control thread.
//!
//! The home region's connection is opened at once and kept forever; others are opened when there
//! is something to send and closed after [`IDLE_LIMIT`] without (arrivals do not count). Sending
//! never waits: a batch becomes frames in a queue bounded in bytes, the oldest go first, and the
//! writer takes everything that is ready into one write of full TLS records. One read becomes one
//! [`RelayEvent::Data`] per run of packets of one peer.
//!
//! Rules: `protocol/derp.md` §9 (derphttp and magicsock of tailscale/tailscale). On purpose
//! different: nodes of a region race ([`dial`]), a relay silent for 75 s is asked by a Ping, data
//! unacknowledged for 15 s ends the connection, two failed redials of the home are reported at
//! once, and reverse routes are forgotten on PeerGone and on every loss.
//!
//! Rooms: [`dial`] is a connection to one of a region's nodes, `link` one region's connection and its
//! back-off, `events` what they tell the agent.

mod dial;
mod events;
mod link;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ringtail_dataplane::{Datagrams, RegionId};
use rustls::RootCertStore;
use serde::Serialize;

pub use events::{EVENT_BYTES_MAX, EVENTS_MAX, RelayEvent, RelayEvents};

use crate::derp::client::LINK_CHANGE_LIMIT;
use crate::derp::frame::{self, HEADER_LEN, PACKET_LEN_MAX};
use crate::derp::news::News;
use crate::derp::queue::Dropped;
use crate::derp::routes::Routes;
use crate::derp::upgrade;
use crate::driver::clock::now;
use crate::driver::counters::{self, counters};
use crate::driver::names::Names;
use crate::driver::runtime::Kind;
use crate::driver::tls::verify::Verifiers;
use crate::driver::underlay::Underlay;
use crate::key::{KEY_LEN, NodePrivate, NodePublic};
use crate::netmap::{DerpMap, DerpRegion};
use dial::Dialler;
use events::EventQueue;
use link::Link;

/// Bytes of data frames that wait per region at most.
pub const DATA_QUEUE_BYTES: usize = 1 << 20;

/// Bytes of DISCO frames that wait per region at most.
pub const DISCO_QUEUE_BYTES: usize = 64 << 10;

/// Connections at a time. The one that was sent to longest ago makes room for another, but not the home's:
/// peers say where they are at home, and each connection has queues and buffers of its own.
pub const LINKS_MAX: usize = 64;

/// A connection that is not the home's is closed after this long without anything to send.
pub const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// After a shorter sleep of the machine a connection is asked for a sign of life, after a longer one
/// it is made anew.
const SLEEP_KEPT: Duration = Duration::from_secs(10);

/// For one HTTPS latency check.
pub const LATENCY_LIMIT: Duration = Duration::from_secs(5);

/// How a pool is made.
#[derive(Debug)]
pub struct RelayOptions {
    /// The node's key, which is also its DERP address.
    pub private: NodePrivate,
    /// What knows the addresses of relays that the map gives by name.
    pub names: Names,
    /// How connections stay outside of the tunnel.
    pub underlay: Underlay,
    /// Which streams to use; [`Kind::Uring`] only inside tokio-uring's runtime.
    pub io: Kind,
    /// Who may vouch for relays.
    pub roots: Arc<RootCertStore>,
}

/// The relay connections; dropping it closes everything.
#[derive(Debug)]
pub struct RelayPool(Rc<Inner>);

impl Drop for RelayPool {
    fn drop(&mut self) {
        for link in self.0.links.borrow().values() {
            link.stop();
        }
        self.0.events.close();
    }
}

/// What the pool and its tasks share.
#[derive(Debug)]
struct Inner {
    private: NodePrivate,
    dialler: Dialler,
    events: Rc<EventQueue>,
    counters: Counters,
    /// Whose packets are wanted; everybody's before that is known.
    peers: RefCell<Option<BTreeSet<NodePublic>>>,
    map: RefCell<DerpMap>,
    home: Cell<Option<RegionId>>,
    alone: Cell<bool>,
    links: RefCell<BTreeMap<RegionId, Rc<Link>>>,
    /// Where peers are found.
    routes: RefCell<Routes>,
    /// The node of a region that last worked.
    good_nodes: RefCell<BTreeMap<RegionId, usize>>,
}

counters! {
    /// What happened, by name. Packets are packets, not batches.
    struct Counters(counters::Local) {
        /// Packets put into a queue.
        tx_packets,
        /// Their bytes.
        tx_bytes,
        /// Packets of peers that came.
        rx_packets,
        /// Their bytes.
        rx_bytes,
        /// TLS plaintext chunks written, to be compared with `tx_packets`.
        tx_chunks,
        /// Write calls.
        tx_writes,
        /// Reads that brought something.
        rx_reads,
        /// Connections made.
        connects,
        /// Dials that failed.
        dial_failures,
        /// Connections lost.
        losses,
        /// Packets dropped from the head of a data queue: the relay is slower than we are.
        tx_dropped_data_queue,
        /// DISCO packets dropped from the head of their queue.
        tx_dropped_disco_queue,
        /// Packets for a peer whose region is unknown.
        tx_dropped_no_region,
        /// Packets above the rate the relay asked for.
        tx_dropped_rate_limit,
        /// Packets larger than a relay takes.
        tx_dropped_oversize,
        /// Packets that waited for a connection that is no longer wanted.
        tx_dropped_closed,
        /// Packets the agent did not fetch in time.
        rx_dropped_agent_slow,
        /// Other events the agent did not fetch in time.
        events_dropped,
        /// Packets larger than WireGuard or DISCO ever are.
        rx_dropped_oversize,
        /// Packets of nodes that are no peers.
        rx_dropped_stranger,
        /// Peers without learned route because the table is full.
        routes_full,
    }
}

impl Counters {
    fn count_lost_event(&self, event: &RelayEvent) {
        match event {
            RelayEvent::Data { data, .. } => {
                self.rx_dropped_agent_slow.add(data.lens.len() as u64);
            }
            RelayEvent::Disco { .. } => self.rx_dropped_agent_slow.add(1),
            RelayEvent::News { .. } => self.events_dropped.add(1),
        }
    }
}

/// One region, for people and programs.
#[derive(Clone, Debug, Serialize)]
pub struct RegionStatus {
    /// Its id.
    pub region: u32,
    /// Its short label.
    pub code: String,
    /// Whether it is the home.
    pub home: bool,
    /// Whether packets can go now.
    pub connected: bool,
    /// The relay's address.
    pub addr: Option<SocketAddr>,
    /// The relay's key in hex.
    pub relay_key: Option<String>,
    /// Seconds since the connection stands.
    pub connected_secs: Option<u64>,
    /// Seconds since the relay was last heard.
    pub heard_secs: Option<u64>,
    /// Bytes that wait to be sent.
    pub queued_bytes: usize,
    /// What the relay reports of itself.
    pub problem: Option<String>,
    /// Dials that failed in a row.
    pub failures: u32,
    /// Why the last of them did.
    pub error: Option<String>,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct RelayStatus {
    /// The home region.
    pub home: Option<u32>,
    /// Regions with a connection or a wish for one.
    pub regions: Vec<RegionStatus>,
    /// Learned reverse routes.
    pub routes: usize,
    /// By name.
    pub counters: BTreeMap<&'static str, u64>,
}

impl RelayPool {
    /// An empty pool and the receiver of its events. Its tasks need a `LocalSet` around them.
    pub fn new(options: RelayOptions) -> (Self, RelayEvents) {
        let events = Rc::new(EventQueue::default());
        let inner = Inner {
            private: options.private,
            dialler: Dialler {
                names: options.names,
                verifiers: Arc::new(Verifiers::new(options.roots)),
                underlay: options.underlay,
                kind: options.io,
            },
            events: events.clone(),
            counters: Counters::default(),
            peers: RefCell::default(),
            map: RefCell::default(),
            home: Cell::new(None),
            alone: Cell::new(false),
            links: RefCell::default(),
            routes: RefCell::default(),
            good_nodes: RefCell::default(),
        };
        (Self(Rc::new(inner)), RelayEvents(events))
    }

    /// The same under another key, beside this one: it has the same map, peers and home, which it dials at
    /// once.
    pub fn beside(&self, private: NodePrivate) -> (Self, RelayEvents) {
        let own = &self.0;
        let events = Rc::new(EventQueue::default());
        let inner = Inner {
            private,
            dialler: own.dialler.clone(),
            events: events.clone(),
            counters: Counters::default(),
            peers: own.peers.clone(),
            map: own.map.clone(),
            home: Cell::new(None),
            alone: own.alone.clone(),
            links: RefCell::default(),
            routes: RefCell::default(),
            good_nodes: own.good_nodes.clone(),
        };
        let pool = Self(Rc::new(inner));
        pool.set_home(own.home.get());
        (pool, RelayEvents(events))
    }

    /// Replaces the DERP map. Connections to regions whose definition changed are closed, and
    /// the home's is made anew.
    pub fn set_map(&self, map: &DerpMap) {
        let inner = &self.0;
        inner.map.replace(map.clone());
        let changed: Vec<Rc<Link>> = inner
            .links
            .borrow()
            .values()
            .filter(|link| map.regions.get(&link.region.0) != Some(&link.definition))
            .cloned()
            .collect();
        for link in changed {
            inner.good_nodes.borrow_mut().remove(&link.region);
            inner.close(&link);
        }
        self.set_home(inner.home.get());
    }

    /// From now on what comes of others than these nodes is dropped as soon as it is decrypted: anybody
    /// who may use a relay may send us packets there, and they would take the room of peers' packets.
    pub fn set_peers(&self, peers: Vec<NodePublic>) {
        let peers = peers.into_iter().collect();
        self.0.peers.replace(Some(peers));
    }

    /// Chooses the home region, dials it at once and keeps it.
    pub fn set_home(&self, home: Option<RegionId>) {
        let inner = &self.0;
        inner.home.set(home);
        for link in inner.links.borrow().values() {
            link.set_home(home == Some(link.region));
        }
        if let Some(region) = home
            && let Some(link) = inner.link(region)
        {
            link.set_home(true);
        }
    }

    /// Nobody can tell where peers are that are not at home: they are searched.
    pub fn set_alone(&self, alone: bool) {
        self.0.alone.set(alone);
    }

    /// Sends a batch to a peer whose home is `region`, there or where it was heard last or both
    /// ([`Routes::ways`]), dialling the region if need be. Region 0 is "unknown".
    ///
    /// Never waits; what cannot be sent is dropped and counted.
    pub fn send_data(&self, region: RegionId, dst: &NodePublic, batch: &Datagrams) {
        let inner = &self.0;
        if let [_] = batch.lens[..] {
            inner.routes.borrow_mut().sent(dst, region, &batch.bytes);
        }
        let links = inner.choose(region, dst);
        if links.iter().all(Option::is_none) {
            inner
                .counters
                .tx_dropped_no_region
                .add(batch.lens.len() as u64);
        }
        for link in links.into_iter().flatten() {
            inner.send_batch(&link, dst, batch);
        }
    }

    /// Sends a DISCO packet the same way, past all data that waits.
    pub fn send_disco(&self, region: RegionId, dst: &NodePublic, packet: &[u8]) {
        let inner = &self.0;
        let counters = &inner.counters;
        if packet.len() > PACKET_LEN_MAX {
            return counters.tx_dropped_oversize.add(1);
        }
        let links = inner.choose(region, dst);
        if links.iter().all(Option::is_none) {
            counters.tx_dropped_no_region.add(1);
        }
        for link in links.into_iter().flatten() {
            let len = HEADER_LEN + KEY_LEN + packet.len();
            let dropped = link.disco.borrow_mut().push(len, |out| {
                frame::put_send_packet(out, dst, packet);
            });
            counters.tx_packets.add(1);
            counters.tx_bytes.add(packet.len() as u64);
            counters.tx_dropped_disco_queue.add(dropped.frames);
            link.asked();
        }
    }

    /// The host's network changed: every connection has 3 s to prove that it still works, and
    /// dials that wait for their turn start now.
    pub fn link_changed(&self) {
        for link in self.0.links.borrow().values() {
            link.probe(LINK_CHANGE_LIMIT);
        }
    }

    /// The machine has slept for so long. The relays' ends of longer ones are gone, most likely, and
    /// nobody will say so: every connection is made anew at once.
    pub fn resumed(&self, slept: Duration) {
        if slept < SLEEP_KEPT {
            return self.link_changed();
        }
        for link in self.0.links.borrow().values() {
            link.restart();
        }
    }

    /// The region at which a peer was last heard, if that connection stands.
    #[cfg(test)]
    pub(super) fn route(&self, peer: &NodePublic) -> Option<RegionId> {
        self.0.routes.borrow().last(peer)
    }

    /// Latency of one HTTPS request to a region over a connection of its own, and the address that
    /// went to, for networks without UDP (`protocol/netcheck.md` §5).
    pub fn https_latency(
        &self,
        region: RegionId,
    ) -> impl Future<Output = anyhow::Result<(Duration, SocketAddr)>> + 'static + use<> {
        let inner = self.0.clone();
        async move {
            let definition = inner.definition(region).context("no such region")?;
            tokio::time::timeout(LATENCY_LIMIT, inner.latency(&definition))
                .await
                .context("no answer in time")?
        }
    }

    /// Everything worth showing.
    pub fn status(&self) -> RelayStatus {
        let inner = &self.0;
        let links = inner.links.borrow();
        RelayStatus {
            home: inner.home.get().map(|region| region.0),
            regions: links.values().map(|link| link.status(now())).collect(),
            routes: inner.routes.borrow().count(),
            counters: inner.counters.snapshot().into_iter().collect(),
        }
    }
}

impl Inner {
    /// Whether packets of the node are wanted: all are until there are peers.
    fn knows(&self, node: &NodePublic) -> bool {
        let peers = self.peers.borrow();
        peers.as_ref().is_none_or(|peers| peers.contains(node))
    }

    fn definition(&self, region: RegionId) -> Option<DerpRegion> {
        self.map.borrow().regions.get(&region.0).cloned()
    }

    /// The connections for a packet to a peer whose home is `region`.
    fn choose(self: &Rc<Self>, region: RegionId, dst: &NodePublic) -> [Option<Rc<Link>>; 2] {
        let ways = {
            let links = self.links.borrow();
            let ready = |region| links.get(&region).is_some_and(|link| link.is_ready());
            let map = self.map.borrow();
            let alone = self.alone.get();
            let regions = map.regions.keys().copied().filter(|_| alone).map(RegionId);
            let mut routes = self.routes.borrow_mut();
            routes.ways(now(), dst, region, ready, regions)
        };
        ways.map(|region| self.link(region?))
    }

    fn send_batch(&self, link: &Link, dst: &NodePublic, batch: &Datagrams) {
        let counters = &self.counters;
        let mut rest = &batch.bytes[..];
        let mut dropped = Dropped::default();
        {
            let mut queue = link.data.borrow_mut();
            for &len in &batch.lens {
                let Some((packet, tail)) = rest.split_at_checked(usize::from(len)) else {
                    debug_assert!(false, "the lengths of a batch add up");
                    break;
                };
                rest = tail;
                dropped += queue.push(HEADER_LEN + KEY_LEN + packet.len(), |out| {
                    frame::put_send_packet(out, dst, packet);
                });
            }
        }
        counters.tx_packets.add(batch.lens.len() as u64);
        counters.tx_bytes.add(batch.bytes.len() as u64);
        counters.tx_dropped_data_queue.add(dropped.frames);
        link.asked();
    }

    /// The link of a region, with a task that dials it if there was none.
    fn link(self: &Rc<Self>, region: RegionId) -> Option<Rc<Link>> {
        if let Some(link) = self.links.borrow().get(&region) {
            return Some(link.clone());
        }
        let definition = self.definition(region)?;
        let least_asked = {
            let links = self.links.borrow();
            let others = links.values().filter(|link| !link.is_home());
            let full = links.len() >= LINKS_MAX;
            others
                .min_by_key(|link| link.asked_at())
                .filter(|_| full)
                .cloned()
        };
        if let Some(least_asked) = least_asked {
            self.close(&least_asked);
        }
        let link = Rc::new(Link::new(region, definition, now()));
        link.set_home(self.home.get() == Some(region));
        self.links.borrow_mut().insert(region, link.clone());
        tokio::task::spawn_local(link::run(self.clone(), link.clone()));
        Some(link)
    }

    /// Ends a link and forgets it.
    fn close(&self, link: &Rc<Link>) {
        link.stop();
        self.forget_routes(link.region);
        let mut links = self.links.borrow_mut();
        if links.get(&link.region).is_some_and(|l| Rc::ptr_eq(l, link)) {
            links.remove(&link.region);
            let left =
                link.data.borrow_mut().clear().frames + link.disco.borrow_mut().clear().frames;
            self.counters.tx_dropped_closed.add(left);
            self.tell(link.region, News::Closed);
        }
    }

    fn tell(&self, region: RegionId, news: News) {
        let event = RelayEvent::News { region, news };
        self.events.push(event, &self.counters);
    }

    fn learn_route(&self, peer: NodePublic, region: RegionId) {
        if !self.routes.borrow_mut().heard(peer, region) {
            self.counters.routes_full.add(1);
        }
    }

    fn forget_route(self: &Rc<Self>, peer: &NodePublic, region: RegionId) {
        let again = self.routes.borrow_mut().gone(now(), peer, region);
        let Some(pause) = again else {
            return;
        };
        let (inner, peer) = (self.clone(), *peer);
        tokio::task::spawn_local(async move {
            tokio::time::sleep(pause).await;
            let again = inner.routes.borrow_mut().take_again(&peer);
            if let Some((home, packet)) = again {
                let lens = packet.len().try_into().into_iter().collect();
                let bytes = packet.into();
                let batch = Datagrams { bytes, lens };
                for link in inner.choose(home, &peer).into_iter().flatten() {
                    inner.send_batch(&link, &peer, &batch);
                }
            }
        });
    }

    fn forget_routes(&self, region: RegionId) {
        self.routes.borrow_mut().lost(region);
    }

    async fn latency(&self, region: &DerpRegion) -> anyhow::Result<(Duration, SocketAddr)> {
        let id = RegionId(region.region_id);
        let first = self.good_nodes.borrow().get(&id).copied().unwrap_or(0);
        let mut dialled = self.dialler.dial(region, first, &|_| ()).await?;
        let node = &region.nodes[dialled.index];
        let mut request = Vec::new();
        upgrade::put_latency_request(
            &mut request,
            &upgrade::host_header(&node.host_name, node.derp_port()),
        );
        dialled.tls.seal(&request)?;
        let (out, len) = dialled.tls.take_out();
        let asked = now();
        dialled.stream.write_all(out, len).await.0?;
        let mut answer = Vec::new();
        let mut buffer = Vec::with_capacity(upgrade::HEAD_LEN_MAX);
        loop {
            let (read, back) = dialled.stream.read(buffer).await;
            buffer = back;
            if read? == 0 {
                bail!("the relay closed without an answer");
            }
            dialled.tls.inbox.append(&mut buffer);
            dialled
                .tls
                .handle_input(|plain| answer.extend_from_slice(plain))?;
            if let Some((_, status)) = upgrade::parse_response(&answer)? {
                if !(200..300).contains(&status) {
                    bail!("the relay answered with HTTP status {status}");
                }
                return Ok((now() - asked, dialled.addr));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody is dialled: the tasks are never run.
    #[test]
    fn no_more_regions_have_connections_than_there_are_places() {
        let local = tokio::task::LocalSet::new();
        let _context = local.enter();
        let (pool, _events) = RelayPool::new(RelayOptions {
            private: NodePrivate::generate(),
            names: Names::default(),
            underlay: Underlay::default(),
            roots: crate::driver::tls::roots::web(),
            io: Kind::Tokio,
        });
        let regions = u32::try_from(2 * LINKS_MAX).unwrap();
        pool.set_map(&DerpMap::of_regions(regions));
        pool.set_home(Some(RegionId(1)));
        let peer = NodePublic([7; KEY_LEN]);
        for region in 1..=regions {
            pool.send_disco(RegionId(region), &peer, b"hello");
        }
        let there: Vec<u32> = pool
            .status()
            .regions
            .iter()
            .map(|region| region.region)
            .collect();
        assert_eq!(there.len(), LINKS_MAX);
        assert!(there.contains(&1), "the home stays");
        assert!(there.contains(&regions), "and the newest");
        assert_eq!(
            pool.status().counters["tx_dropped_closed"],
            regions as u64 - LINKS_MAX as u64
        );
    }
}
