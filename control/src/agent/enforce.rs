//! What counts of the network as told, put into force: at once, and again whenever a key expires or
//! the wall clock is set.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use ringtail_dataplane::{NetworkChange, PeerId, RegionId, Rules};
use serde_json::json;
use time::OffsetDateTime;

use super::allowed::{Allowed, Refused, Why};
use super::exit::{ExitNode, Meant};
use super::plain::Fitted;
use super::{Agent, HeldBack, Network, NetworkPeer, Output, short_name};
use crate::config::Prefs;
use crate::hostnet::Overlay;
use crate::key::NodePublic;
use crate::netmap::wire::WireTime;
use crate::path::PeerSetup;

/// An expiry is waited for so long at most before the wall clock is looked at again.
const EXPIRY_CHECK_PERIOD_MAX: Duration = Duration::from_secs(3600);
/// The wall clock was set, and did not just drift, if it is off by more: as coordination's clock counts
/// as another than ours.
const CLOCK_STEP_MIN: time::Duration = time::Duration::MINUTE;
/// Prefixes of peers that do not count and are told of at most.
const REFUSED_TOLD_MAX: usize = 64;

/// What counts of a network.
struct InForce {
    network: Network,
    /// What does not.
    allowed: Allowed,
    /// What became of the exit node.
    exit: ExitNode,
    /// What does not work of plain peers, in sentences.
    plain: Vec<String>,
}

impl Network {
    /// What counts of it at our wall clock `wall` for somebody who wants `prefs`: peers whose keys are
    /// good, with the prefixes that are theirs, and the `plain` ones beside them; `own` is our key, `known`
    /// the exit node that was chosen so far, and `fitted` the filter that was fitted last.
    fn in_force(
        &self,
        wall: OffsetDateTime,
        prefs: &Prefs,
        known: Option<&Meant>,
        plain: &[Arc<NetworkPeer>],
        own: NodePublic,
        fitted: &mut Option<Fitted>,
    ) -> InForce {
        let mut network = self.clone();
        let past = |expiry: Option<WireTime>| expiry.is_some_and(|expiry| expiry.0 <= wall);
        let expired = network.peers.extract_if(.., |peer| past(peer.key_expiry));
        let expired: Vec<HeldBack> = expired.map(|peer| HeldBack::expired(&peer)).collect();
        network.held_back.extend(expired);
        network.own.expired |= past(network.own.key_expiry);
        let exit = ExitNode::of(prefs, Some(&network), known);
        // After the exit node was chosen: none of these becomes it.
        let mut told = network.add_plain(plain, own);
        let mut allowed = Allowed::of(&network, prefs.accept_routes, exit.key());
        for (peer, counts) in network.peers.iter_mut().zip(&mut allowed.peers) {
            let counts = std::mem::take(counts);
            if peer.allowed_ips != counts {
                Arc::make_mut(peer).allowed_ips = counts;
            }
        }
        told.extend(network.filter_plain(fitted));
        InForce {
            network,
            allowed,
            exit,
            plain: told,
        }
    }
}

impl Agent {
    /// Takes a new view of the network, whole.
    pub fn handle_network(&mut self, now: Instant, mut network: Network) {
        if let Some(told) = &self.told {
            network.share(told);
            if *told == network {
                return;
            }
        }
        self.told = Some(network);
        self.enforce(now);
    }

    /// Takes a new view of the network that coordination gives, with times by our wall clock.
    pub fn handle_map(&mut self, now: Instant, network: Network) {
        self.times_are_right = true;
        self.handle_network(now, network);
    }

    /// Takes what a person wants of this node, now or from now on.
    pub fn handle_prefs(&mut self, now: Instant, prefs: Prefs) {
        if self.prefs == prefs {
            return;
        }
        if self.prefs.exit_node != prefs.exit_node {
            self.exit = ExitNode::default();
        }
        self.prefs = prefs;
        self.out.push_back(Output::Publish);
        self.enforce(now);
    }

    /// Takes the addresses of the host's interfaces with their subnets' lengths, the tunnel left out.
    pub fn handle_subnets(&mut self, now: Instant, subnets: BTreeSet<IpNet>) {
        if self.subnets != subnets {
            self.subnets = subnets;
            if self.prefs.advertise_exit_node {
                self.enforce(now);
            }
        }
    }

    /// Whether there is a network to take part in.
    pub fn has_network(&self) -> bool {
        self.told.is_some()
    }

    /// Takes what the wall clock says. Keys expire by it, so it has to be told before a network is,
    /// whenever [`Self::poll_timeout`] says, and now and then besides, since clocks are set.
    pub fn handle_wall_clock(&mut self, now: Instant, wall: OffsetDateTime) {
        let set_back = wall < self.wall;
        let step = self.clock_step(now, wall);
        self.wall = wall;
        self.wall_told = Some(now);
        if step.abs() > CLOCK_STEP_MIN && self.times_are_right {
            // It was wrong before or is now. The network's times stay the moments they were.
            if let Some(told) = &mut self.told {
                told.move_times(step);
            }
            self.enforce(now);
            self.out.push_back(Output::AskForMap);
        } else if set_back || self.next_expiry.is_some_and(|at| at <= wall) {
            self.enforce(now);
        }
        self.await_expiry(now);
    }

    /// By how much the wall clock was set since it was told last.
    fn clock_step(&self, now: Instant, wall: OffsetDateTime) -> time::Duration {
        let elapsed = self.wall_told.map(|at| now.saturating_duration_since(at));
        let elapsed = elapsed.and_then(|elapsed| time::Duration::try_from(elapsed).ok());
        elapsed.map_or(time::Duration::ZERO, |elapsed| wall - self.wall - elapsed)
    }

    fn await_expiry(&mut self, now: Instant) {
        let wait = self.next_expiry.map(|at| at - self.wall);
        let wait = wait.map(|wait| Duration::try_from(wait).unwrap_or_default());
        self.expiry_check = wait.map(|wait| now + wait.min(EXPIRY_CHECK_PERIOD_MAX));
    }

    /// Puts into force what counts of the network by now.
    pub(super) fn enforce(&mut self, now: Instant) {
        let Some(told) = &self.told else {
            self.exit = ExitNode::of(&self.prefs, None, self.exit.meant());
            self.tell_exit();
            self.configure(self.wishes());
            return;
        };
        self.next_expiry = told.next_expiry(self.wall);
        self.judge_offers();
        let told = self.told.as_ref().expect("it was there");
        let InForce {
            mut network,
            allowed,
            exit,
            plain,
        } = told.in_force(
            self.wall,
            &self.prefs,
            self.exit.meant(),
            &self.plain,
            self.setup.node_key,
            &mut self.fitted,
        );
        self.set_health("plain", plain);
        self.await_expiry(now);
        self.exit = exit;
        let local = self.local(&network);
        let same_gate = self.local == local && self.shielded == self.prefs.shields_up;
        if let Some(before) = &self.network {
            network.share(before);
            if *before == network && self.allowed == allowed && same_gate {
                self.tell_exit();
                self.configure(network.overlay(self.wishes()));
                return;
            }
        }
        self.tell_standing(&network);
        self.tell_refused(&network, &allowed);
        let reserved_before = std::mem::replace(&mut self.allowed, allowed).reserved;
        let changes = self.directory.update(&network.peers);
        self.tell_peers(&network, &changes.told);
        let wishes = self.wishes();
        let before = self.network.replace(network);
        let network = self.network.as_ref().expect("it was just put there");
        let overlay = network.overlay(wishes);
        let inner = network.inner_addresses();
        let map = network.derp_map.clone();
        let fixed_home = network.fixed_home;

        if before.as_ref().is_none_or(|b| b.derp_map != map) {
            self.map_changed(now, &map);
        }
        if let Some(home) = fixed_home {
            self.set_home(RegionId(home), None);
        }
        let network = self.network.as_ref().expect("it was just put there");
        let same_filter = |b: &Network| b.rules == network.rules && same_gate;
        let rules = (!before.as_ref().is_some_and(same_filter)).then(|| {
            let rules = if self.prefs.shields_up {
                Rules::default()
            } else {
                (*network.rules).clone()
            };
            (rules, Some(local.clone()))
        });
        self.local = local;
        self.shielded = self.prefs.shields_up;
        let reserved = &self.allowed.reserved;
        let reserved = (*reserved != reserved_before)
            .then(|| reserved.iter().map(|net| (*net).into()).collect());
        let change = NetworkChange {
            peers: self.directory.peer_configs(&changes.routed),
            gone: changes.gone.clone(),
            reserved,
            rules,
            peerapi: self.new_peerapi(),
        };
        if !change.is_empty() {
            self.out.push_back(Output::ChangeNetwork(change));
        }
        let mut told: BTreeSet<PeerId> = changes.told.into_iter().collect();
        // An endpoint that is an inner address does not count, and one that no longer is does.
        let moved = self.paths.set_inner_addresses(inner);
        if !moved.is_empty() {
            let there =
                |peer: &NetworkPeer| peer.endpoints.iter().any(|at| moved.contains(&at.ip()));
            let theirs = self.directory.iter().filter(|(_, peer)| there(peer));
            told.extend(theirs.map(|(id, _)| id));
        }
        let setups: Vec<PeerSetup> = told
            .into_iter()
            .filter_map(|id| Some(self.peer_setup(id, self.directory.peer(id)?)))
            .collect();
        let same_keys = changes.gone.is_empty() && setups.iter().all(|peer| self.paths.has(peer));
        self.paths.set_peers(now, &setups, &changes.gone);
        if !same_keys {
            let peers = || self.directory.iter().map(|(_, peer)| peer);
            let of_network = peers().filter(|peer| peer.plain.is_none());
            let disco = peers().filter_map(|peer| peer.disco_key);
            self.out.push_back(Output::SetPeers {
                nodes: of_network.map(|peer| peer.node_key).collect(),
                disco: disco.filter(|_| !self.setup.relay_only).collect(),
            });
        }
        for id in changes.gone {
            self.relay_told.remove(&(id, false));
            self.relay_told.remove(&(id, true));
        }
        self.revival.restarted(now, changes.restarted);
        self.revival.meet(now, |key| self.directory.id(key));
        self.tell_exit();
        self.configure(overlay);
        self.settle(now);
    }

    /// Has the host, the discovery socket and the DNS service take what is wanted of them, if that is another.
    fn configure(&mut self, overlay: Overlay) {
        if self.overlay.as_ref() != Some(&overlay) {
            self.overlay = Some(overlay.clone());
            self.out.push_back(Output::Configure(overlay));
        }
        self.tell_names();
    }

    /// Says which prefixes do not count, each once.
    fn tell_refused(&mut self, network: &Network, allowed: &Allowed) {
        let before = std::mem::take(&mut self.refused);
        let not_accepted = |one: &&Refused| one.why == Why::NotAccepted;
        let routes = allowed.refused.iter().filter(not_accepted).count();
        let routes = (routes > 0).then(|| {
            format!("{routes} routes of other nodes are not used: --accept-routes takes them")
        });
        let others = allowed.refused.iter().filter(|one| !not_accepted(one));
        let others = others.map(|refused| refused.sentence(network));
        for sentence in routes.into_iter().chain(others).take(REFUSED_TOLD_MAX) {
            if !before.contains(&sentence) {
                tracing::warn!("{sentence}");
            }
            self.refused.insert(sentence);
        }
    }

    fn peer_setup(&self, id: PeerId, peer: &NetworkPeer) -> PeerSetup {
        PeerSetup {
            id,
            node_key: peer.node_key,
            disco_key: peer.disco_key,
            home: peer.home.map(RegionId),
            endpoints: if self.setup.relay_only && peer.plain.is_none() {
                Vec::new()
            } else {
                peer.endpoints.clone()
            },
        }
    }

    /// Tells of those who are new or another.
    fn tell_peers(&mut self, network: &Network, news: &[PeerId]) {
        self.story("netmap", json!({"peers": network.peers.len()}));
        for id in news {
            let Some(peer) = self.directory.peer(*id) else {
                continue;
            };
            let home = peer.home.and_then(|id| network.derp_map.regions.get(&id));
            let home = home.map(|region| region.region_code.clone());
            let fields = json!({"peer": short_name(&peer.name), "home": home,
                                "endpoints": peer.endpoints, "online": peer.online});
            self.story("peer", fields);
        }
    }
}
