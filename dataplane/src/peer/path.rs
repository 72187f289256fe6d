//! Which way a peer's datagrams go: the shard's half of path selection (`protocol/paths.md` §4,
//! §15.1, §16).
//!
//! The control thread decides and says until when the decision may be trusted; this applies it by
//! the shard's own clock:
//!
//! * an address that is trusted, and neither silent nor outrun by the relay: UDP alone;
//! * otherwise UDP, if there is an address, and the relay, if there is one;
//! * with neither: back to where the peer was last heard.
//!
//! *Silent*: data that expects an answer has been sent for the silence limit and nothing authentic
//! has come back from the decided address. Only data arms this, and relayed arrivals do not disarm
//! it, or the other end's move to both ways would silence ours. *Outrun*: while UDP is trusted, an
//! authentic packet came by relay alone; the other end has lost the direct path, so we send both
//! ways. Both states end with an authentic datagram from the decided address, or with a decision
//! whose trust has been renewed: a Pong came over that address. A decision that says that the peer
//! sends by relay for reasons of its own keeps its arrivals from counting as outrun.
//!
//! *In device mode* there is no control side that knows better: the endpoint follows the peer. It is
//! the source of the newest authentic datagram, whatever was configured, and answers leave from the
//! local address which that datagram was sent to. An address that was given up because routes have
//! moved, or the kernel refuses it, is not taken up again for a second: what arrives there may have
//! been under way.
//!
//! A renewal gives a stream that gets no answers by its nature (one-way UDP) a third of the limit
//! more than the limit, so that heartbeats one limit apart keep it on one path.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Arrived, Whereabouts};
use crate::sys::socket::Local;
use crate::types::{Event, PathDecision, PeerId, RegionId};

/// At most one [`Event::Kick`] per peer in this time.
const KICK_INTERVAL: Duration = Duration::from_millis(100);
/// Data after a pause of this length is [`Event::Active`].
const ACTIVE_AFTER: Duration = Duration::from_secs(3);
/// A source that differs from the decision is reported once in this time, unless it changes.
const NEW_SOURCE_INTERVAL: Duration = Duration::from_secs(1);
/// Send errors of one address are reported once in this time.
const SEND_ERROR_INTERVAL: Duration = Duration::from_millis(100);
/// After the kernel refused a GSO batch whose datagrams it took singly, none is tried for so long.
const GSO_REST: Duration = Duration::from_secs(10);
/// What arrives so soon at a local address that was given up may have been under way before.
const UNDER_WAY: Duration = Duration::from_secs(1);

/// Where a datagram came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Udp(SocketAddr),
    Relay(RegionId),
}

/// Where a batch goes: UDP, relay, both, or nowhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) udp: Option<SocketAddr>,
    pub(crate) relay: Option<RegionId>,
    /// Where to send from, if it matters.
    pub(crate) local: Option<Local>,
    /// Send datagrams one by one.
    pub(crate) singly: bool,
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Inner packets: they expect an answer, and path decisions follow them.
    Data,
    Handshake,
    Keepalive,
}

/// Where datagrams to a peer are to go from now on.
#[derive(Clone, Debug)]
pub(crate) enum Aim {
    Decided(PathDecision),
    /// In device mode: the peer may move on from there.
    Endpoint(SocketAddr),
}

/// The path state of one peer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Path {
    decision: Option<PathDecision>,
    unanswered_since: Option<Instant>,
    /// Like the one above, whatever way data went and answers come.
    quiet_since: Option<Instant>,
    silent: bool,
    outrun: bool,
    heard: Option<Source>,
    /// When it was heard, and when last something spoke for the decided address.
    heard_at: Option<Instant>,
    confirmed_at: Option<Instant>,
    last_kick: Option<Instant>,
    last_data: Option<Instant>,
    new_source: Option<(SocketAddr, Instant)>,
    send_error: Option<(SocketAddr, Instant)>,
    gso_rests_until: Option<Instant>,
    /// Device mode: the endpoint, which follows the peer, and whether it has moved.
    follow: Option<Whereabouts>,
    moved: bool,
    /// Device mode: the local address that was given up last, and when.
    left: Option<(Local, Instant)>,
}

fn within(now: Instant, at: Option<Instant>, limit: Duration) -> bool {
    at.is_some_and(|at| now.saturating_duration_since(at) < limit)
}

impl Path {
    /// The path of device mode.
    pub(crate) fn following() -> Path {
        Path {
            follow: Some(Whereabouts::default()),
            ..Path::default()
        }
    }

    /// Where the peer is, if it has moved since the last call (device mode).
    pub(crate) fn take_move(&mut self) -> Option<Whereabouts> {
        if std::mem::take(&mut self.moved) {
            self.follow
        } else {
            None
        }
    }

    fn move_to(&mut self, to: Whereabouts) {
        if let Some(at) = &mut self.follow
            && *at != to
        {
            if at.endpoint != to.endpoint {
                self.gso_rests_until = None;
            }
            *at = to;
            self.moved = true;
        }
    }

    /// Lets routing choose the local address until the next decision or, in device mode, until the peer is
    /// heard at another address, or at this one a second later.
    pub(crate) fn unstick(&mut self, now: Instant) {
        if let Some(decision) = &mut self.decision {
            decision.local = None;
        }
        if let Some(at) = self.follow {
            self.left = at.local.map(|local| (local, now)).or(self.left);
            self.move_to(Whereabouts { local: None, ..at });
        }
    }

    /// Takes an endpoint over, in device mode. True if it is another.
    pub(crate) fn set_endpoint(&mut self, endpoint: SocketAddr) -> bool {
        let Some(at) = self.follow else { return false };
        self.move_to(Whereabouts {
            endpoint: Some(endpoint),
            local: None,
        });
        at.endpoint != Some(endpoint)
    }

    /// Takes a decision over. True if the peer can now be reached in a way it could not before:
    /// what waits for a handshake deserves a new try.
    pub(crate) fn decide(&mut self, now: Instant, decision: PathDecision) -> bool {
        debug_assert!(self.follow.is_none(), "here the endpoint follows the peer");
        let old = self.decision.take();
        let (old_udp, old_derp, old_trust) = old.as_ref().map_or((None, None, None), |old| {
            (old.udp, old.derp, old.trust_until)
        });
        let moved = old_udp != decision.udp;
        let renewed = decision.trust_until > old_trust;
        if moved {
            self.gso_rests_until = None;
        }
        if moved || renewed {
            let grace = decision.silence_limit / 3;
            self.unanswered_since = match self.unanswered_since {
                Some(_) if !moved => now.checked_add(grace),
                _ => None,
            };
            self.silent = false;
            self.outrun = false;
            self.confirmed_at = Some(now);
        }
        let reachable = (moved && decision.udp.is_some())
            || (old_derp != decision.derp && decision.derp.is_some());
        self.decision = Some(decision);
        reachable
    }

    /// The way to send now.
    pub(crate) fn way(&self, now: Instant) -> Way {
        let singly = self.gso_rests_until.is_some_and(|until| now < until);
        if let Some(at) = self.follow {
            return Way {
                udp: at.endpoint,
                relay: None,
                local: at.local,
                singly,
            };
        }
        let (udp, derp) = self
            .decision
            .as_ref()
            .map_or((None, None), |d| (d.udp, d.derp));
        let local = self.decision.as_ref().and_then(|d| d.local);
        let way = Way {
            udp,
            relay: derp,
            // Elsewhere routing names the interface.
            local: local.map(|addr| Local { addr, interface: 0 }),
            singly,
        };
        if self.sure(now) {
            return Way { relay: None, ..way };
        }
        match (udp, derp, self.heard) {
            (None, None, Some(Source::Udp(from))) => Way {
                udp: Some(from),
                local: None,
                ..way
            },
            (None, None, Some(Source::Relay(region))) => Way {
                relay: Some(region),
                ..way
            },
            _ => way,
        }
    }

    /// The way by which other shards may send too, and the last moment at which they may: a single
    /// address that nothing is to be decided about.
    #[inline]
    pub(crate) fn lend(&self, now: Instant) -> Option<(Way, Option<Instant>)> {
        let way = self.way(now);
        way.udp?;
        if self.follow.is_some() {
            return Some((way, None));
        }
        let until = self.decision.as_ref().and_then(|d| d.trust_until);
        self.sure(now).then_some((way, until))
    }

    /// When something authentic arrived, if that was after `at`.
    pub(crate) fn heard_after(&self, at: Instant) -> Option<Instant> {
        self.heard_at.filter(|heard| *heard > at)
    }

    /// Takes note that other shards have sent data this way, the last of it at `at`: as if it had
    /// been told before that was answered.
    pub(crate) fn sent_elsewhere(&mut self, at: Instant, peer: PeerId, events: &mut Vec<Event>) {
        let (quiet, unanswered) = (self.quiet_since, self.unanswered_since);
        self.sending(at, peer, Kind::Data, events);
        if self.heard_after(at).is_some() {
            self.quiet_since = quiet;
        }
        if self.confirmed_at > Some(at) {
            self.unanswered_since = unanswered;
        }
    }

    /// True while UDP alone will do.
    fn sure(&self, now: Instant) -> bool {
        self.trusted(now) && !self.silent && !self.outrun
    }

    /// True if the decision names an address and still trusts it.
    fn trusted(&self, now: Instant) -> bool {
        self.decision
            .as_ref()
            .is_some_and(|d| d.udp.is_some() && d.trust_until.is_some_and(|until| now <= until))
    }

    /// To be called before a batch is sent: arms and checks the silence rule, and tells the control
    /// thread what it wants to know of sending. True if the path has just gone silent.
    pub(crate) fn sending(
        &mut self,
        now: Instant,
        peer: PeerId,
        kind: Kind,
        events: &mut Vec<Event>,
    ) -> bool {
        if self.follow.is_some() {
            if kind == Kind::Data {
                self.quiet_since.get_or_insert(now);
            }
            return false;
        }
        let was_silent = self.silent;
        let trusted = self.trusted(now);
        let kick = match kind {
            Kind::Data => !trusted,
            Kind::Handshake => self.way(now) == Way::default() || !trusted,
            Kind::Keepalive => false,
        };
        if kick && !within(now, self.last_kick, KICK_INTERVAL) {
            self.last_kick = Some(now);
            events.push(Event::Kick(peer));
        }
        if kind == Kind::Data {
            if !within(now, self.last_data, ACTIVE_AFTER) {
                events.push(Event::Active(peer));
            }
            self.last_data = Some(now);
            self.quiet_since.get_or_insert(now);
        }
        if trusted && kind != Kind::Keepalive {
            self.check_silence(now, peer, events);
            self.unanswered_since.get_or_insert(now);
        }
        self.silent && !was_silent
    }

    fn check_silence(&mut self, now: Instant, peer: PeerId, events: &mut Vec<Event>) {
        let (Some(since), Some(decision)) = (self.unanswered_since, &self.decision) else {
            return;
        };
        if !self.silent && now.saturating_duration_since(since) >= decision.silence_limit {
            self.silent = true;
            events.push(Event::Silent(peer));
        }
    }

    /// Notes an authentic arrival and says how it came.
    pub(crate) fn arrived(
        &mut self,
        now: Instant,
        peer: PeerId,
        source: Source,
        local: Option<Local>,
        events: &mut Vec<Event>,
    ) -> Arrived {
        self.quiet_since = None;
        self.heard_at = Some(now);
        if let (true, Source::Udp(from)) = (self.follow.is_some(), source) {
            let left = self
                .left
                .filter(|left| within(now, Some(left.1), UNDER_WAY));
            self.move_to(Whereabouts {
                endpoint: Some(from),
                local: local.filter(|local| left.is_none_or(|(left, _)| left != *local)),
            });
            return Arrived::Direct;
        }
        self.heard = Some(source);
        let decided = self.decision.as_ref().and_then(|d| d.udp);
        match source {
            Source::Udp(from) if decided == Some(from) => {
                self.unanswered_since = None;
                self.silent = false;
                self.outrun = false;
                self.confirmed_at = Some(now);
                Arrived::Direct
            }
            Source::Udp(from) => {
                let reported = self.new_source.is_some_and(|(addr, at)| {
                    addr == from && within(now, Some(at), NEW_SOURCE_INTERVAL)
                });
                if !reported {
                    self.new_source = Some((from, now));
                    events.push(Event::NewSource(peer, from));
                }
                Arrived::OtherUdp
            }
            Source::Relay(_) => {
                let alone = self.decision.as_ref().is_some_and(|d| d.relayed_alone);
                self.outrun |= self.trusted(now) && !alone;
                Arrived::Relay
            }
        }
    }

    /// True if something authentic arrived less than `limit` ago.
    pub(crate) fn heard_within(&self, now: Instant, limit: Duration) -> bool {
        within(now, self.heard_at, limit)
    }

    /// How long data has been sent without anything authentic coming back on any way.
    pub(crate) fn quiet_for(&self, now: Instant) -> Duration {
        self.quiet_since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// Notes a failed send.
    pub(crate) fn failed(
        &mut self,
        now: Instant,
        peer: PeerId,
        to: SocketAddr,
        errno: i32,
        events: &mut Vec<Event>,
    ) {
        let reported = self
            .send_error
            .is_some_and(|(addr, at)| addr == to && within(now, Some(at), SEND_ERROR_INTERVAL));
        if !reported {
            self.send_error = Some((to, now));
            events.push(Event::SendError(peer, to, errno));
        }
    }

    /// The kernel refused a GSO batch towards the address, but not its datagrams.
    pub(crate) fn rest_gso(&mut self, now: Instant) {
        self.gso_rests_until = now.checked_add(GSO_REST);
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::sys::now;

    const PEER: PeerId = PeerId(3);
    const LIMIT: Duration = Duration::from_secs(1);

    fn addr(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 1000))
    }

    struct Rig {
        start: Instant,
        path: Path,
        generation: u64,
    }

    impl Rig {
        fn new() -> Rig {
            Rig {
                start: now(),
                path: Path::default(),
                generation: 0,
            }
        }

        fn at(&self, ms: u64) -> Instant {
            self.start + Duration::from_millis(ms)
        }

        fn decide(
            &mut self,
            ms: u64,
            udp: Option<u8>,
            derp: Option<u32>,
            trust_ms: Option<u64>,
        ) -> bool {
            self.generation += 1;
            let decision = PathDecision {
                generation: self.generation,
                udp: udp.map(addr),
                local: None,
                derp: derp.map(RegionId),
                trust_until: trust_ms.map(|ms| self.at(ms)),
                silence_limit: LIMIT,
                path_mtu: 1500,
                relayed_alone: false,
            };
            self.path.decide(self.at(ms), decision)
        }

        fn send(&mut self, ms: u64) -> (Option<SocketAddr>, Option<u32>, Vec<Event>) {
            let mut events = Vec::new();
            self.path
                .sending(self.at(ms), PEER, Kind::Data, &mut events);
            let way = self.path.way(self.at(ms));
            events.retain(|e| !matches!(e, Event::Active(_)));
            (way.udp, way.relay.map(|r| r.0), events)
        }

        fn arrive(&mut self, ms: u64, source: Source) -> (Arrived, Vec<Event>) {
            let mut events = Vec::new();
            let arrived = self
                .path
                .arrived(self.at(ms), PEER, source, None, &mut events);
            (arrived, events)
        }
    }

    #[test]
    fn a_way_is_lent_only_while_it_is_sure() {
        let mut rig = Rig::new();
        let lent = |rig: &Rig, ms| {
            let (way, until) = rig.path.lend(rig.at(ms))?;
            assert_eq!((way.udp, way.relay), (Some(addr(1)), None));
            until
        };
        assert_eq!(rig.path.lend(rig.at(0)), None, "nowhere to go");
        rig.decide(0, None, Some(7), None);
        assert_eq!(rig.path.lend(rig.at(0)), None, "by relay");
        rig.decide(10, Some(1), Some(7), None);
        assert_eq!(rig.path.lend(rig.at(10)), None, "not trusted");
        rig.decide(20, Some(1), Some(7), Some(5000));
        assert_eq!(lent(&rig, 20), Some(rig.at(5000)));
        rig.arrive(30, Source::Relay(RegionId(7)));
        assert_eq!(lent(&rig, 30), None, "outrun");
        rig.arrive(40, Source::Udp(addr(1)));
        assert_eq!(lent(&rig, 40), Some(rig.at(5000)));
        rig.send(50);
        rig.send(1100);
        assert_eq!(lent(&rig, 1100), None, "silent");
        rig.arrive(1200, Source::Udp(addr(1)));
        assert_eq!(lent(&rig, 5001), None, "trusted no longer");

        rig.path = Path::following();
        rig.path.set_endpoint(addr(1));
        assert_eq!(rig.path.lend(rig.at(0)).map(|lent| lent.1), Some(None));
    }

    #[test]
    fn what_other_shards_send_counts_from_when_they_sent_it() {
        let mut rig = Rig::new();
        let mut told = Vec::new();
        let elsewhere = |rig: &mut Rig, ms, told: &mut Vec<Event>| {
            let at = rig.at(ms);
            rig.path.sent_elsewhere(at, PEER, told);
        };
        rig.decide(0, Some(1), Some(7), Some(60_000));
        elsewhere(&mut rig, 100, &mut told);
        assert_eq!(told, [Event::Active(PEER)]);
        elsewhere(&mut rig, 1099, &mut told);
        assert_eq!(told.len(), 1);
        elsewhere(&mut rig, 1100, &mut told);
        assert_eq!(told[1..], [Event::Silent(PEER)]);
        assert_eq!(
            rig.path.quiet_for(rig.at(2000)),
            Duration::from_millis(1900)
        );

        // An answer that is there before the report of what it answers.
        rig.arrive(3020, Source::Udp(addr(1)));
        elsewhere(&mut rig, 3010, &mut told);
        elsewhere(&mut rig, 3019, &mut told);
        assert_eq!(rig.path.quiet_for(rig.at(9000)), Duration::ZERO);
        rig.send(4500);
        assert!(
            rig.path.lend(rig.at(4500)).is_some(),
            "not silent since 3010"
        );

        // By another way: that end hears us, but the path is still unanswered.
        rig.arrive(5000, Source::Udp(addr(1)));
        elsewhere(&mut rig, 5005, &mut told);
        rig.arrive(5020, Source::Udp(addr(2)));
        elsewhere(&mut rig, 5010, &mut told);
        assert_eq!(rig.path.quiet_for(rig.at(9000)), Duration::ZERO);
        told.clear();
        elsewhere(&mut rig, 6005, &mut told);
        assert_eq!(told, [Event::Silent(PEER)]);
    }

    #[test]
    fn the_local_address_of_a_decision_is_sent_from_until_the_kernel_refuses_it() {
        let mut rig = Rig::new();
        rig.decide(0, Some(1), Some(7), Some(60_000));
        assert_eq!(rig.path.way(rig.at(0)).local, None);
        let here = IpAddr::from([192, 0, 2, 99]);
        let mut decision = rig.path.decision.clone().unwrap();
        decision.local = Some(here);
        rig.path.decide(rig.at(1), decision.clone());
        let way = rig.path.way(rig.at(1));
        assert_eq!(way.local.map(|local| local.addr), Some(here));
        assert_eq!(
            rig.path.lend(rig.at(1)).unwrap().0,
            way,
            "guests do the same"
        );
        rig.path.unstick(rig.at(2));
        assert_eq!(rig.path.way(rig.at(2)).local, None);
        rig.path.decide(rig.at(3), decision);
        assert_eq!(rig.path.way(rig.at(3)), way);
    }

    #[test]
    fn in_device_mode_the_endpoint_follows_the_peer() {
        let mut rig = Rig::new();
        rig.path = Path::following();
        let local = |last: u8| Local {
            addr: [192, 0, 2, last].into(),
            interface: 3,
        };
        let at = |endpoint, local| Some(Whereabouts { endpoint, local });
        assert_eq!(rig.send(0), (None, None, vec![]));
        assert!(rig.path.set_endpoint(addr(1)), "reachable now");
        assert_eq!(rig.path.take_move(), at(Some(addr(1)), None));
        assert!(!rig.path.set_endpoint(addr(1)), "nothing new");
        assert_eq!(rig.path.take_move(), None);
        assert_eq!(rig.send(9_000), (Some(addr(1)), None, vec![]));

        let mut events = Vec::new();
        let start = rig.start;
        let mut arrive = |path: &mut Path, ms, from, here| {
            let (now, source) = (start + Duration::from_millis(ms), Source::Udp(addr(from)));
            path.arrived(now, PEER, source, Some(local(here)), &mut events)
        };
        assert_eq!(arrive(&mut rig.path, 0, 2, 7), Arrived::Direct);
        assert_eq!(rig.path.way(rig.start).udp, Some(addr(2)));
        assert_eq!(rig.path.way(rig.start).local, Some(local(7)));
        assert_eq!(rig.path.take_move(), at(Some(addr(2)), Some(local(7))));
        arrive(&mut rig.path, 0, 2, 7);
        assert_eq!(rig.path.take_move(), None, "told only when it moves");
        arrive(&mut rig.path, 0, 2, 8);
        assert_eq!(rig.path.take_move(), at(Some(addr(2)), Some(local(8))));
        rig.path.unstick(start);
        assert_eq!(rig.path.take_move(), at(Some(addr(2)), None));
        arrive(&mut rig.path, 900, 2, 8);
        assert_eq!(rig.path.take_move(), None, "it was under way");
        arrive(&mut rig.path, 950, 2, 7);
        assert_eq!(rig.path.take_move(), at(Some(addr(2)), Some(local(7))));
        arrive(&mut rig.path, 990, 3, 8);
        assert_eq!(rig.path.take_move(), at(Some(addr(3)), None), "still so");
        arrive(&mut rig.path, 1000, 3, 8);
        assert_eq!(rig.path.take_move(), at(Some(addr(3)), Some(local(8))));
        rig.path.unstick(rig.at(2000));
        assert_eq!(rig.path.take_move(), at(Some(addr(3)), None));
        let elsewhere = Local {
            interface: 4,
            ..local(8)
        };
        let (now, source) = (rig.at(2010), Source::Udp(addr(3)));
        rig.path
            .arrived(now, PEER, source, Some(elsewhere), &mut events);
        let moved = at(Some(addr(3)), Some(elsewhere));
        assert_eq!(rig.path.take_move(), moved, "by another interface");
        assert!(events.is_empty(), "the control side has nothing to decide");
    }

    #[test]
    fn a_trusted_address_is_used_alone_until_its_time_is_up() {
        let mut rig = Rig::new();
        assert!(rig.decide(0, Some(1), Some(9), Some(500)));
        assert_eq!(rig.send(0), (Some(addr(1)), None, vec![]));
        assert_eq!(rig.send(500), (Some(addr(1)), None, vec![]));
        assert_eq!(
            rig.send(501),
            (Some(addr(1)), Some(9), vec![Event::Kick(PEER)])
        );
        assert_eq!(rig.send(550).2, vec![], "one kick per 100 ms");
        assert_eq!(rig.send(601).2, vec![Event::Kick(PEER)]);
    }

    #[test]
    fn without_a_decision_the_answer_goes_where_the_peer_was_heard() {
        let mut rig = Rig::new();
        assert_eq!(rig.send(0), (None, None, vec![Event::Kick(PEER)]));
        rig.arrive(1, Source::Relay(RegionId(4)));
        assert_eq!(rig.send(2), (None, Some(4), vec![]));
        assert_eq!(
            rig.arrive(3, Source::Udp(addr(5))),
            (Arrived::OtherUdp, vec![Event::NewSource(PEER, addr(5))])
        );
        assert_eq!(rig.send(4), (Some(addr(5)), None, vec![]));
    }

    #[test]
    fn silence_is_armed_by_data_and_disarmed_only_over_the_decided_address() {
        let mut rig = Rig::new();
        rig.decide(0, Some(1), Some(9), Some(60_000));
        rig.send(100);
        rig.arrive(200, Source::Udp(addr(1)));
        assert_eq!(
            rig.send(5000),
            (Some(addr(1)), None, vec![]),
            "idle is not silent"
        );
        assert_eq!(rig.send(5999), (Some(addr(1)), None, vec![]));
        assert_eq!(
            rig.send(6000),
            (Some(addr(1)), Some(9), vec![Event::Silent(PEER)])
        );
        assert_eq!(rig.send(7000).2, vec![], "told once");
        rig.arrive(7100, Source::Relay(RegionId(9)));
        rig.arrive(7100, Source::Udp(addr(2)));
        assert_eq!(
            rig.send(7200).1,
            Some(9),
            "neither relay nor another address counts"
        );
        assert_eq!(rig.arrive(7300, Source::Udp(addr(1))).0, Arrived::Direct);
        assert_eq!(rig.send(7400).1, None);
        assert_eq!(rig.send(8400).2, vec![Event::Silent(PEER)], "and again");
    }

    #[test]
    fn a_renewed_trust_ends_silence_and_one_way_streams_live_by_heartbeats() {
        let mut rig = Rig::new();
        rig.decide(0, Some(1), Some(9), Some(60_000));
        rig.send(0);
        assert_eq!(rig.send(1000).2, vec![Event::Silent(PEER)]);
        rig.decide(1050, Some(1), Some(9), Some(61_000));
        for beat in 1..10u64 {
            for ms in (0..1000).step_by(100) {
                let (_, relay, events) = rig.send(1050 + (beat - 1) * 1000 + ms + 20);
                assert_eq!((relay, events.len()), (None, 0), "beat {beat} + {ms}");
            }
            rig.decide(
                1050 + beat * 1000,
                Some(1),
                Some(9),
                Some(61_000 + beat * 1000),
            );
        }
    }

    #[test]
    fn a_decision_without_news_does_not_end_silence() {
        let mut rig = Rig::new();
        rig.decide(0, Some(1), Some(9), Some(60_000));
        rig.send(0);
        rig.send(1000);
        assert!(!rig.decide(1100, Some(1), Some(9), Some(60_000)));
        assert_eq!(rig.send(1200).1, Some(9));
        assert!(rig.decide(1300, Some(2), Some(9), Some(60_000)));
        assert_eq!(rig.send(1400), (Some(addr(2)), None, vec![]));
    }

    #[test]
    fn arrivals_by_relay_alone_mean_both_ways_until_udp_speaks() {
        let mut rig = Rig::new();
        rig.decide(0, Some(1), Some(9), Some(60_000));
        assert_eq!(rig.arrive(10, Source::Relay(RegionId(9))).0, Arrived::Relay);
        assert_eq!(rig.send(20), (Some(addr(1)), Some(9), vec![]));
        rig.arrive(30, Source::Udp(addr(1)));
        assert_eq!(rig.send(40), (Some(addr(1)), None, vec![]));
    }

    #[test]
    fn a_new_source_is_told_once_a_second_or_when_it_changes() {
        let mut rig = Rig::new();
        rig.decide(0, Some(1), None, Some(60_000));
        assert_eq!(rig.arrive(0, Source::Udp(addr(2))).1.len(), 1);
        assert_eq!(rig.arrive(10, Source::Udp(addr(2))).1.len(), 0);
        assert_eq!(rig.arrive(20, Source::Udp(addr(3))).1.len(), 1);
        assert_eq!(rig.arrive(1020, Source::Udp(addr(3))).1.len(), 1);
    }

    #[test]
    fn a_peer_that_sends_by_relay_anyway_does_not_outrun() {
        let mut rig = Rig::new();
        let relayed = Source::Relay(RegionId(9));
        rig.decide(0, Some(1), Some(9), Some(60_000));
        rig.arrive(100, relayed);
        assert_eq!(rig.send(110).1, Some(9));
        let mut decision = rig.path.decision.clone().unwrap();
        decision.trust_until = Some(rig.at(61_000));
        decision.relayed_alone = true;
        rig.path.decide(rig.at(200), decision);
        rig.arrive(300, relayed);
        assert_eq!(rig.send(310).1, None);
    }

    #[test]
    fn activity_is_told_after_a_pause() {
        let mut rig = Rig::new();
        let mut events = Vec::new();
        for (ms, told) in [(0, 1), (2999, 1), (5998, 1), (8998, 2)] {
            rig.path.sending(rig.at(ms), PEER, Kind::Data, &mut events);
            let active = events
                .iter()
                .filter(|e| matches!(e, Event::Active(_)))
                .count();
            assert_eq!(active, told, "at {ms}");
        }
    }

    #[test]
    fn quiet_is_measured_over_all_ways() {
        let mut rig = Rig::new();
        rig.decide(0, Some(1), Some(9), Some(60_000));
        rig.send(100);
        rig.send(900);
        assert_eq!(rig.path.quiet_for(rig.at(1100)), LIMIT);
        rig.arrive(1200, Source::Relay(RegionId(9)));
        assert_eq!(rig.path.quiet_for(rig.at(5000)), Duration::ZERO);
    }

    #[test]
    fn a_refused_batch_rests_gso_for_a_while() {
        let mut rig = Rig::new();
        rig.decide(0, Some(1), None, Some(60_000));
        rig.path.rest_gso(rig.at(0));
        assert!(rig.path.way(rig.at(9_999)).singly);
        assert!(!rig.path.way(rig.at(10_000)).singly);
        rig.path.rest_gso(rig.at(20_000));
        rig.decide(20_001, Some(2), None, Some(60_000));
        assert!(
            !rig.path.way(rig.at(20_002)).singly,
            "another address, another path"
        );
    }
}
