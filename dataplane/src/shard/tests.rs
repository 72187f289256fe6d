//! A shard without its driver and its device: what it decides between two waits.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;

use rand::SeedableRng;
use zerocopy::IntoBytes;
use zeroize::Zeroizing;

use super::*;
use crate::bench_support::index;
use crate::filter::{CompiledRules, source_allowed};
use crate::hub::strangers;
use crate::noise::public_key;
use crate::packet::Pool;
use crate::packet::build::{Builder, Tcp};
use crate::packet::header::{TCP, TCP_SYN, TSMP};
use crate::packet::segment::plan;
use crate::packet::vnet::VnetHdr;
use crate::peer::{Aim, Source};
use crate::session::{Moment, Session};
use crate::stats::Snapshot;
use crate::sys::socket::Local;
use crate::tun::Kinds;
use crate::types::{
    Datagrams, PathDecision, PeerApi, PeerConfig, Ping, Prefix, RegionId, RelayBatch, Rules,
};

const OWN_KEY: [u8; 32] = [1; 32];
const REGION: RegionId = RegionId(1);

/// A shard's seat in a hub of its own.
fn seat() -> Seat {
    let now = sys::now();
    Seat {
        id: 0,
        hub: Arc::new(Hub::new(now, 1).unwrap()),
        queues: Arc::new([]),
        merging: Arc::new(Merging::new(Kinds::ALL)),
        gso: false,
        driver: DriverKind::Epoll,
        cpu: None,
        settings: Arc::new(Settings {
            private_key: Some(Zeroizing::new(OWN_KEY)),
            mtu: 1420,
            ..Settings::default()
        }),
        roam: false,
        kind: config::Engine::Ringtail,
        published: Published::default(),
    }
}

/// A socket of 127.0.0.1 that waits five seconds, and its address.
fn socket() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let patience = Some(Duration::from_secs(5));
    socket.set_read_timeout(patience).unwrap();
    let at = socket.local_addr().unwrap();
    (socket, at)
}

fn shard(seat: &Seat) -> Shard<'_> {
    let inbox = &seat.hub.inboxes[usize::from(seat.id)];
    Shard::new(seat, inbox, outlets(), seat.hub.epoch)
}

#[test]
fn a_shard_that_was_asked_to_end_before_it_armed_its_bell_does_not_sleep() {
    let seat = seat();
    let (hub, shard) = (&seat.hub, shard(&seat));
    let wake = &hub.inboxes[0].wake;
    wake.about_to_sleep();
    assert_eq!(shard.wait(false), None, "nothing to do");
    wake.awake();
    // The loop has looked at the flag, and the bell is not armed yet: ringing it does nothing.
    hub.stop();
    wake.about_to_sleep();
    assert_eq!(shard.wait(false), Some(Duration::ZERO));
}

/// The other end of a shard's sessions.
struct Far {
    id: PeerId,
    key: [u8; 32],
    engine: Engine,
    session: Session,
}

fn config(id: PeerId, key: [u8; 32]) -> PeerConfig {
    PeerConfig::new(id, public_key(&key))
}

impl Far {
    fn new(number: u8) -> Far {
        let key = [100 + number; 32];
        let rng = rand::rngs::StdRng::seed_from_u64(u64::from(number));
        let kind = config::Engine::Ringtail;
        let mut engine = Engine::new(kind, &Zeroizing::new(key), 1420, 0, rng);
        let session = engine.session(sys::now(), &config(PeerId(0), OWN_KEY));
        Far {
            id: PeerId(u32::from(number)),
            key,
            engine,
            session,
        }
    }

    /// Handles a handshake message. Whether there are new keys then, and what it answers.
    fn hear(&mut self, at: Moment, message: &[u8]) -> (Change, Vec<u8>) {
        let mut out = [0; MESSAGE_LEN_MAX];
        let engine = &mut self.engine;
        let done = self
            .session
            .handle_handshake(engine, at, message, None, &mut out);
        let done = done.unwrap();
        (done.change, out[..done.message.unwrap()].to_vec())
    }

    /// Answers the shard's initiation, which completes a handshake.
    fn answer(&mut self, shard: &mut Shard<'_>, initiation: &[u8]) {
        let (_, response) = self.hear(shard.ctx.moment(), initiation);
        comes_by_relay(shard, self.id, &[response]);
        shard.relayed();
    }

    /// Seals a packet.
    fn seal(&mut self, at: Instant, packet: &[u8]) -> Vec<u8> {
        let plan = plan(&VnetHdr::PLAIN, packet).unwrap();
        let mut out = vec![0; self.engine.sealed_len(packet.len())];
        let engine = &mut self.engine;
        let mut packet = packet.to_vec();
        self.session
            .stage(engine, &plan, &mut packet, 0..1, &mut out);
        let stride = out.len();
        self.session.seal(engine, at, &mut out, stride).unwrap();
        out
    }

    /// Opens a datagram; the packet in it, empty for a keep-alive.
    fn open(&mut self, at: Instant, datagram: &[u8]) -> Vec<u8> {
        let (mut run, mut opened) = (datagram.to_vec(), Opened::new(config::Engine::Ringtail));
        let index = u32::from_le_bytes(*datagram[4..].first_chunk().unwrap());
        let (engine, stride) = (&mut self.engine, datagram.len());
        let report = self
            .session
            .open(engine, at, index, &mut run, stride, &mut opened, |_| {});
        assert_eq!(report.datagrams, 1);
        let packets = (0..opened.len()).map(|i| opened.packet(i, &run));
        packets
            .flat_map(|packet| &packet[..Headers::parse(packet).unwrap().total_len])
            .copied()
            .collect()
    }

    fn number(&self) -> u8 {
        u8::try_from(self.id.0).unwrap()
    }

    fn initiation(&mut self, at: Moment) -> Vec<u8> {
        let mut out = [0; MESSAGE_LEN_MAX];
        let len = self.session.initiate(&mut self.engine, at, true, &mut out);
        out[..len.unwrap()].to_vec()
    }
}

fn secs(secs: u64) -> Moment {
    let wall = Duration::from_secs(secs);
    Moment {
        now: sys::now() + wall,
        wall,
    }
}

/// Gives the shard its peers, reached by relay.
fn meet(shard: &mut Shard<'_>, far: &[Far]) {
    let peers = far.iter().map(|far| config(far.id, far.key)).collect();
    shard.set_peers(Arc::new(PeerTable::default().changed(peers, &[], None, 1)));
    for far in far {
        aim(shard, far.id, None, true);
    }
}

/// Says how a peer of the shard can be reached.
fn aim(shard: &mut Shard<'_>, id: PeerId, udp: Option<SocketAddr>, relay: bool) {
    let now = shard.ctx.now;
    let peer = shard.peers.get(id).unwrap();
    peer.aim(now, path(udp, relay));
    shard.peers.touch(now, id);
}

/// A peer that has just answered the shard's initiation, of which the confirmation is still to be sent.
fn joined(shard: &mut Shard<'_>) -> Far {
    let mut far = Far::new(1);
    meet(shard, std::slice::from_ref(&far));
    shake_hands(shard, &mut far);
    far
}

/// The shard initiates by relay, and the peer answers.
fn shake_hands(shard: &mut Shard<'_>, far: &mut Far) {
    aim(shard, far.id, None, true);
    shard.initiate(far.id, false);
    // Behind what was left to be sent.
    let initiation = sent(shard).pop().unwrap().1;
    far.answer(shard, &initiation);
}

fn counted(shard: &Shard<'_>) -> Snapshot {
    shard.ctx.counters.snapshot()
}

fn dropped(shard: &Shard<'_>, reason: DropReason) -> u64 {
    counted(shard).drops(reason)
}

/// What leaves by relay.
fn sent(shard: &mut Shard<'_>) -> Vec<(PeerId, Vec<u8>)> {
    shard.tx.flush_relay();
    std::iter::from_fn(|| shard.hub.outbox.poll_relay())
        .flat_map(|out| {
            let mut rest = out.datagrams.bytes.as_slice();
            let split = out.datagrams.lens.iter().map(|len| {
                let (datagram, after) = rest.split_at(usize::from(*len));
                rest = after;
                (out.peer, datagram.to_vec())
            });
            split.collect::<Vec<_>>()
        })
        .collect()
}

fn comes_by_relay(shard: &Shard<'_>, peer: PeerId, datagrams: &[Vec<u8>]) {
    let lens = datagrams
        .iter()
        .map(|one| u16::try_from(one.len()).unwrap());
    shard.inbox.relay.push(RelayBatch {
        peer,
        region: REGION,
        datagrams: Datagrams {
            lens: lens.collect(),
            bytes: datagrams.concat(),
        },
    });
}

#[test]
fn peers_and_their_rules_come_as_one() {
    let seat = seat();
    let mut shard = shard(&seat);
    let far = Far::new(1);
    let prefix = |addr: [u8; 4], bits| Prefix {
        addr: IpAddr::from(addr),
        bits,
    };
    let own = prefix([10, 0, 0, 1], 32);
    let network = |rules, before: &PeerTable| {
        let peer = PeerConfig {
            allowed_ips: vec![prefix([10, 0, 0, 0], 8), own],
            ..config(far.id, far.key)
        };
        Network {
            table: Arc::new(before.changed(vec![peer], &[], Some(vec![own]), 1)),
            rules: Arc::new(CompiledRules::compile(&rules, Some(&[own]))),
            peerapi: PeerApi::default(),
        }
    };
    let from = |src: [u8; 4]| Builder::new((src, 1).into(), ([10, 0, 0, 1], 2).into()).udp(b"x");
    let verdict = |shard: &mut Shard<'_>, packet: &[u8]| {
        let headers = Headers::parse(packet)?;
        source_allowed(&mut shard.table.routes.cursor(), far.id, &headers)?;
        shard.filter.admit(shard.ctx.now, &headers, packet)
    };
    let stranger = verdict(&mut shard, &from([10, 0, 0, 2]));
    assert_eq!(stranger, Err(DropReason::SourceNotAllowed));
    // Two that nobody has looked at become the newest, with both its halves.
    for rules in [Rules::AllowAll, Rules::default()] {
        let network = network(rules, &PeerTable::default());
        drop(shard.inbox.network.force_push(network));
    }
    assert_eq!(shard.wait(false), Some(Duration::ZERO));
    shard.commands();
    let denied = verdict(&mut shard, &from([10, 0, 0, 2]));
    assert_eq!(denied, Err(DropReason::FilterDenied));
    let next = network(Rules::AllowAll, &shard.table);
    drop(shard.inbox.network.force_push(next));
    shard.commands();
    assert_eq!(verdict(&mut shard, &from([10, 0, 0, 2])), Ok(()));
    let ours = verdict(&mut shard, &from([10, 0, 0, 1]));
    assert_eq!(
        ours,
        Err(DropReason::SourceNotAllowed),
        "what is reserved is no peer's, though one claims it"
    );
}

fn told(shard: &Shard<'_>, table: PeerTable) {
    let network = Network {
        table: Arc::new(table),
        rules: Arc::new(CompiledRules::closed()),
        peerapi: PeerApi::default(),
    };
    drop(shard.inbox.network.force_push(network));
}

fn visited(shard: &Shard<'_>) -> u64 {
    counted(shard).get(Meter::PeersVisited)
}

#[test]
fn who_joins_or_leaves_costs_the_same_among_ten_thousand_and_nobody_else_notices() {
    let seat = seat();
    let mut shard = shard(&seat);
    let far = joined(&mut shard);
    sent(&mut shard);
    let stranger = |id: u32| {
        let mut key = [9; 32];
        key[..4].copy_from_slice(&id.to_le_bytes());
        PeerConfig::new(PeerId(id), key)
    };
    for count in [1_000, 10_000] {
        let all = (2..count).map(stranger).collect();
        told(&shard, shard.table.changed(all, &[], None, 1));
        shard.commands();
        let before = visited(&shard);
        let joined = shard.table.changed(vec![stranger(count)], &[], None, 1);
        told(&shard, joined);
        shard.commands();
        assert!(shard.peers.get(PeerId(count)).is_some());
        let left = shard.table.changed(vec![], &[PeerId(5)], None, 1);
        told(&shard, left);
        shard.commands();
        assert!(shard.peers.get(PeerId(5)).is_none());
        // Two that the shard was too slow for come as one.
        let back = shard.table.changed(vec![stranger(5)], &[], None, 1);
        let other = PeerConfig {
            persistent_keepalive: Some(25),
            ..stranger(6)
        };
        told(&shard, back.clone());
        told(&shard, back.changed(vec![other], &[], None, 1));
        shard.commands();
        assert!(shard.peers.get(PeerId(5)).is_some());
        let six = shard.peers.get(PeerId(6)).unwrap();
        assert_eq!(six.config.persistent_keepalive, Some(25));
        let visited = visited(&shard) - before;
        assert!(visited <= 80, "{visited} of {count}");

        let now = shard.ctx.now;
        assert!(shard.peers.get(far.id).unwrap().ready(now));
        shard.seal(far.id, &mut packet());
        shard.flush_runs();
        let data = sent(&mut shard);
        assert_eq!((data.len(), data[0].0), (1, far.id));
    }
}

#[test]
fn what_a_shard_has_done_with_is_freed_elsewhere() {
    let seat = seat();
    let mut shard = shard(&seat);
    let first = PeerTable::default().changed(vec![config(PeerId(1), [9; 32])], &[], None, 1);
    told(&shard, first);
    shard.commands();
    let first = Arc::downgrade(&shard.table);
    told(&shard, PeerTable::default());
    shard.commands();
    assert!(first.upgrade().is_some(), "not on the shard's thread");
    assert_eq!(seat.hub.outbox.poll_event(), None);
    assert!(first.upgrade().is_none());
}

#[test]
fn of_the_handshake_messages_of_a_relayed_batch_the_newest_of_a_type_counts() {
    let seat = seat();
    let mut shard = shard(&seat);
    let mut far = Far::new(1);
    meet(&mut shard, std::slice::from_ref(&far));
    let batch: Vec<_> = (1..=200).map(|i| far.initiation(secs(i))).collect();
    comes_by_relay(&shard, far.id, &batch);
    shard.relayed();
    assert_eq!(dropped(&shard, DropReason::HandshakeLimited), 199);
    let answers = sent(&mut shard);
    assert_eq!(answers.len(), 1);
    let (change, _) = far.hear(secs(200), &answers[0].1);
    assert_eq!(change, Change::Up, "the newest is answered");
}

#[test]
fn peers_that_all_start_by_relay_at_once_are_answered_over_a_few_turns() {
    let seat = seat();
    let mut shard = shard(&seat);
    let mut far: Vec<_> = (1..=20).map(Far::new).collect();
    meet(&mut shard, &far);
    for far in &mut far {
        let initiation = far.initiation(secs(1));
        comes_by_relay(&shard, far.id, &[initiation]);
    }
    let mut answered = Vec::new();
    for turns in 1.. {
        shard.relayed();
        let answers = sent(&mut shard);
        assert!(answers.len() <= HANDSHAKES_PER_TURN_MAX);
        answered.extend(answers.iter().map(|(peer, _)| *peer));
        if answered.len() == far.len() {
            break;
        }
        assert_eq!(shard.wait(false), Some(Duration::ZERO), "after {turns}");
    }
    assert!(answered.is_sorted(), "{answered:?}");
    assert_eq!(dropped(&shard, DropReason::HandshakeLimited), 0);
}

/// Batch after batch, so that the newest of each counts: only the peer's share bounds what they cost.
#[test]
fn a_peer_that_floods_by_relay_is_computed_for_within_its_share_and_others_are_heard() {
    let seat = seat();
    let mut shard = shard(&seat);
    let mut far = [Far::new(1), Far::new(2)];
    meet(&mut shard, &far);
    for i in 1..=200 {
        let initiation = far[0].initiation(secs(i));
        comes_by_relay(&shard, far[0].id, &[initiation]);
        shard.relayed();
    }
    assert_eq!(
        dropped(&shard, DropReason::HandshakeLimited),
        200 - u64::from(RELAYED_BURST)
    );
    // Answers to nothing cost nothing, whatever index they guess.
    for i in 0..=255u8 {
        let mut response = vec![i; 92];
        response[..4].copy_from_slice(&[2, 0, 0, 0]);
        let mut cookie = vec![i; 64];
        cookie[..4].copy_from_slice(&[3, 0, 0, 0]);
        comes_by_relay(&shard, far[1].id, &[response, cookie]);
        shard.relayed();
    }
    assert_eq!(dropped(&shard, DropReason::UnknownIndex), 512);
    drop(sent(&mut shard));
    let initiation = far[1].initiation(secs(201));
    comes_by_relay(&shard, far[1].id, &[initiation]);
    shard.relayed();
    let answers = sent(&mut shard);
    assert_eq!((answers.len(), answers[0].0), (1, far[1].id));
}

/// A UDP packet as the TUN gives it.
fn packet() -> Vec<u8> {
    from_tun(2, 1, 0).buf.bytes().to_vec()
}

/// One to an address of 10.0.0.0/24, as the TUN gives it to a shard.
fn from_tun(to: u8, port: u16, tos: u8) -> TunRx {
    let builder = Builder {
        tos,
        ..Builder::new(([10, 0, 1, 1], port).into(), ([10, 0, 0, to], 2).into())
    };
    as_read(&builder.udp(b"x"))
}

/// A packet as the TUN gives it to a shard.
fn as_read(packet: &[u8]) -> TunRx {
    let bytes = [VnetHdr::PLAIN.as_bytes(), packet].concat();
    let mut buf = Pool::new(1).take().unwrap();
    buf.narrow(0, bytes.len());
    buf.bytes_mut().copy_from_slice(&bytes);
    TunRx { buf }
}

/// The other shard owns one peer, and withdraws what it has lent while two runs for it are open here. Each of
/// them makes room for a packet to another peer, and leaves by the way it was begun with.
#[test]
fn both_runs_of_a_guest_leave_with_its_grant_when_others_need_their_places() {
    let hub = Arc::new(Hub::new(sys::now(), 2).unwrap());
    let seats = [0, 1].map(|id| Seat {
        id,
        hub: Arc::clone(&hub),
        ..seat()
    });
    let [mut shard, mut owner] = seats.each_ref().map(shard);
    let peer = |far: &Far| PeerConfig {
        allowed_ips: vec![Prefix {
            addr: IpAddr::from([10, 0, 0, far.number()]),
            bits: 32,
        }],
        ..config(far.id, far.key)
    };
    let all: Vec<Far> = (1..=40).map(Far::new).collect();
    let peers = all.iter().map(peer).collect();
    let table = Arc::new(PeerTable::default().changed(peers, &[], None, 2));
    shard.set_peers(Arc::clone(&table));
    owner.set_peers(Arc::clone(&table));
    let (mut theirs, mut ours): (Vec<Far>, Vec<Far>) = all
        .into_iter()
        .partition(|far| table.owner(far.id) == Some(1));
    let guest = &mut theirs[0];
    shake_hands(&mut owner, guest);
    for far in &mut ours[..seal::RUNS_MAX] {
        shake_hands(&mut shard, far);
    }
    drop(sent(&mut shard));
    let (there, to) = socket();
    let Aim::Decided(way) = path(Some(to), false) else {
        unreachable!("it is decided")
    };
    let trusted = PathDecision {
        trust_until: Some(sys::now() + Duration::from_secs(3600)),
        ..way
    };
    let now = owner.ctx.now;
    let peer = owner.peers.get(guest.id).unwrap();
    peer.aim(now, Aim::Decided(trusted));
    owner.peers.touch(now, guest.id);

    let mut routes = table.routes.cursor();
    for tos in [0, 2] {
        let port = 100 + u16::from(tos);
        shard.outbound(from_tun(guest.number(), port, tos), &mut routes, false);
    }
    aim(&mut owner, guest.id, None, true);
    // The way that is held, and what has left by it.
    let state = |shard: &mut Shard<'_>| {
        let way = shard.guests.get(guest.id).unwrap().way().udp;
        (way, counted(shard).get(Meter::SealedForOthers))
    };
    let (first, more) = ours[..seal::RUNS_MAX].split_at(seal::RUNS_MAX - 2);
    for far in first {
        shard.outbound(from_tun(far.number(), 1, 0), &mut routes, false);
    }
    assert_eq!(state(&mut shard), (Some(to), 0));
    for (far, wanted) in more.iter().zip([(Some(to), 1), (None, 2)]) {
        shard.outbound(from_tun(far.number(), 1, 0), &mut routes, false);
        assert_eq!(state(&mut shard), wanted);
    }

    // What comes now goes to the owner, and nothing of the flow is left here to go before it.
    shard.outbound(from_tun(guest.number(), 100, 0), &mut routes, false);
    assert!(matches!(hub.inboxes[1].handed.pop(), Some(Handed::Tun(..))));
    shard.flush_runs();
    assert_eq!(sent(&mut shard).len(), seal::RUNS_MAX);
    assert_eq!(counted(&shard).drops_total(), 0);
    let mut opened = Opened::new(config::Engine::Ringtail);
    for _ in 0..2 {
        let mut bytes = [0; 2000];
        let len = there.recv(&mut bytes).unwrap();
        let index = index(&bytes);
        let bytes = &mut bytes[..len];
        let (engine, session) = (&mut guest.engine, &mut guest.session);
        let fail = |reason| panic!("{reason:?}");
        session.open(engine, owner.ctx.now, index, bytes, len, &mut opened, fail);
        assert_eq!(opened.len(), 1);
    }
}

#[test]
fn what_begins_to_wait_in_the_turn_that_ends_the_keys_goes_with_the_next() {
    let seat = seat();
    let mut shard = shard(&seat);
    let mut far = joined(&mut shard);
    assert!(shard.peers.get(far.id).unwrap().ready(shard.ctx.now));
    assert_eq!(sent(&mut shard).len(), 1, "it confirms");

    shard.ctx.now += Duration::from_secs(180);
    shard.ctx.events.clear();
    shard.seal(far.id, &mut packet());
    let initiation = sent(&mut shard).remove(0).1;
    shard.timers();
    assert!(shard.ctx.events.contains(&Event::SessionDown(far.id)));
    assert_eq!(dropped(&shard, DropReason::NoSession), 0);
    far.answer(&mut shard, &initiation);
    let data = sent(&mut shard);
    assert!(
        data.iter().any(|(_, message)| message.len() > 32),
        "{data:?}"
    );

    // Nobody answers for as long as one tries.
    shard.ctx.now += Duration::from_secs(180);
    shard.seal(far.id, &mut packet());
    shard.timers();
    shard.ctx.now += Duration::from_secs(89);
    shard.timers();
    assert_eq!(dropped(&shard, DropReason::NoSession), 0);
    shard.ctx.now += Duration::from_secs(1);
    shard.timers();
    assert_eq!(dropped(&shard, DropReason::NoSession), 1);
}

/// Data under keys that the shard never had.
fn unopenable(len: usize) -> Vec<u8> {
    let mut message = vec![7; len];
    message[..8].copy_from_slice(&[4, 0, 0, 0, 9, 0, 9, 9]);
    message
}

fn path(udp: Option<SocketAddr>, relay: bool) -> Aim {
    Aim::Decided(PathDecision {
        generation: 1,
        udp,
        local: None,
        derp: relay.then_some(REGION),
        trust_until: None,
        silence_limit: Duration::from_secs(1),
        path_mtu: 1500,
        relayed_alone: false,
    })
}

/// Sends so many datagrams of 100 bytes to a peer.
fn send(shard: &mut Shard<'_>, id: PeerId, count: usize) {
    let batch = seal::Batch {
        kind: Kind::Data,
        bytes: &[4; 1000][..100 * count],
        stride: 100,
        tos: 0,
    };
    let Shard { ctx, peers, tx, .. } = shard;
    seal::Outlet::send(tx, ctx, peers.get(id).unwrap(), batch);
}

/// Sockets of loopback to send from.
fn outlets() -> Arc<Sockets> {
    let (v4, _) = socket();
    Arc::new(Sockets { v4, v6: None })
}

/// Whatever the kernel refuses is dropped under a name, nothing waits for it, and what is sent after the fault
/// arrives. The faults are the kernel's as far as the shard can tell: a filter of system calls.
#[test]
fn what_the_kernel_does_not_send_is_counted_and_the_next_goes_out() {
    let for_now = [libc::ENOBUFS, libc::EAGAIN];
    let others = [
        libc::EPERM,
        libc::EMSGSIZE,
        libc::EINVAL,
        libc::EIO,
        libc::ENETUNREACH,
        libc::ENOMEM,
    ];
    let (receiver, to) = socket();
    for errno in for_now.into_iter().chain(others) {
        let reason = if for_now.contains(&errno) {
            DropReason::SendQueueFull
        } else {
            DropReason::SendFailed
        };
        for gso in [true, false] {
            // The filter goes with its thread.
            let thread = std::thread::spawn(move || {
                let seat = Seat { gso, ..seat() };
                let mut shard = shard(&seat);
                let far = [Far::new(1)];
                meet(&mut shard, &far);
                let id = far[0].id;
                aim(&mut shard, id, Some(to), false);
                let (bad, good) = (outlets(), outlets());
                let calls = [libc::SYS_sendmsg, libc::SYS_sendmmsg];
                let ours = u32::try_from(bad.v4.as_raw_fd()).unwrap();
                sys::refuse::refuse(&calls, (0, libc::BPF_JEQ, ours), errno);
                shard.tx.rebind(bad);
                for (count, sum) in [(1, 1), (10, 11), (3, 14)] {
                    send(&mut shard, id, count);
                    assert_eq!(dropped(&shard, reason), sum, "{errno}, {gso}");
                }
                let total = counted(&shard);
                assert_eq!(total.drops_total(), 14, "under no other name");
                assert_eq!(total.get(Meter::UdpPacketsOut), 0);
                shard.tx.rebind(good);
                send(&mut shard, id, 10);
                assert_eq!(dropped(&shard, reason), 14);
                assert_eq!(counted(&shard).get(Meter::UdpPacketsOut), 10);
            });
            thread.join().unwrap();
            for _ in 0..10 {
                assert_eq!(receiver.recv(&mut [0; 2000]).unwrap(), 100);
            }
        }
    }
}

/// The peer follows to where answers come from: they come from elsewhere only if that is of use.
#[test]
fn a_local_address_is_left_only_where_sending_goes_better_without_it() {
    let (_receiver, to) = socket();
    let (batches, singles) = (libc::SYS_sendmsg, libc::SYS_sendmmsg);
    let cases = [
        ("127.0.0.1", vec![], true),
        ("127.0.0.1", vec![batches], true),
        ("127.0.0.1", vec![batches, singles], true),
        ("192.0.2.77", vec![], false),
    ];
    for (addr, refused, stays) in cases {
        // The filter goes with its thread.
        let thread = std::thread::spawn(move || {
            let seat = Seat {
                gso: true,
                roam: true,
                ..seat()
            };
            let mut shard = shard(&seat);
            let far = config(PeerId(1), [9; 32]);
            let table = PeerTable::default().changed(vec![far], &[], None, 1);
            shard.set_peers(Arc::new(table));
            let local = Local {
                addr: addr.parse().unwrap(),
                interface: 1,
            };
            let Shard { ctx, peers, .. } = &mut shard;
            let peer = peers.get(PeerId(1)).unwrap();
            peer.arrived(ctx.now, Source::Udp(to), Some(local), &mut ctx.events);

            let sockets = outlets();
            let ours = u32::try_from(sockets.v4.as_raw_fd()).unwrap();
            sys::refuse::refuse(&refused, (0, libc::BPF_JEQ, ours), libc::EINVAL);
            shard.tx.rebind(sockets);
            send(&mut shard, PeerId(1), 10);
            let way = shard.peers.get(PeerId(1)).unwrap().path.way(shard.ctx.now);
            assert_eq!(way.local, stays.then_some(local), "{refused:?}");
            let taken = counted(&shard).get(Meter::UdpPacketsOut);
            assert_eq!(taken > 0, !refused.contains(&singles), "{refused:?}");
        });
        thread.join().unwrap();
    }
}

#[test]
fn who_sends_what_cannot_be_opened_gets_one_initiation_for_as_many_bytes() {
    let seat = seat();
    let mut shard = shard(&seat);
    let mut far = Far::new(1);
    meet(&mut shard, std::slice::from_ref(&far));
    let arrive = |shard: &mut Shard<'_>, ms: u64, len: usize| {
        shard.ctx.now = seat.hub.epoch + Duration::from_millis(ms);
        comes_by_relay(shard, PeerId(1), &[unopenable(len)]);
        shard.relayed();
        shard.timers();
        sent(shard)
    };
    assert_eq!(arrive(&mut shard, 0, 147), []);
    assert_eq!(arrive(&mut shard, 5000, 32), [], "that was long ago");
    assert_eq!(arrive(&mut shard, 5001, 115), []);
    let sent = arrive(&mut shard, 5002, 32);
    assert_eq!((sent.len(), sent[0].0, sent[0].1.len()), (1, far.id, 148));
    let mut more = 0;
    for ms in 5003..95_000 {
        more += arrive(&mut shard, ms, 1400).len();
    }
    assert!((16..=18).contains(&more), "one in five seconds: {more}");
    assert!(
        !shard.ctx.events.iter().any(|e| matches!(e, Event::Kick(_))),
        "nobody is pinged for it"
    );
    far.answer(&mut shard, &sent[0].1.clone());
}

#[test]
fn a_peer_that_is_heard_gets_no_initiation_for_what_cannot_be_opened() {
    let seat = seat();
    let mut shard = shard(&seat);
    let far = joined(&mut shard);
    sent(&mut shard);
    let start = shard.ctx.now;
    shard.ctx.now = start + Duration::from_millis(999);
    shard.unopened(far.id, 1400);
    assert_eq!(sent(&mut shard), []);
    shard.ctx.now = start + Duration::from_secs(6);
    shard.unopened(far.id, 1400);
    assert_eq!(sent(&mut shard).len(), 1);
}

#[test]
fn initiations_for_what_cannot_be_opened_are_limited_and_go_where_the_peer_is() {
    let seat = seat();
    let mut shard = shard(&seat);
    let far: Vec<_> = (1..=150).map(Far::new).collect();
    meet(&mut shard, &far);
    for far in &far[..148] {
        shard.unopened(far.id, 1400);
    }
    assert_eq!(sent(&mut shard).len(), UNOPENED_BURST as usize);
    shard.ctx.now += Duration::from_secs(1);
    // By both ways it sends twice as much.
    let (there, at) = socket();
    let id = far[149].id;
    aim(&mut shard, id, Some(at), true);
    shard.unopened(id, 200);
    assert_eq!(sent(&mut shard), []);
    shard.unopened(id, 96);
    assert_eq!(sent(&mut shard).len(), 1);
    assert_eq!(there.recv(&mut [0; 200]).unwrap(), INITIATION_LEN);
    // Nowhere to go.
    let id = far[148].id;
    aim(&mut shard, id, None, false);
    shard.unopened(id, 1400);
    assert_eq!(sent(&mut shard), []);
}

#[test]
fn data_of_no_session_by_udp_is_told_a_few_times_a_second_and_answered_by_nothing() {
    let seat = seat();
    let mut shard = shard(&seat);
    let far = Far::new(1);
    meet(&mut shard, std::slice::from_ref(&far));
    let from = |host: u8| SocketAddr::from(([192, 0, 2, host], 7));
    let told = |shard: &mut Shard<'_>| std::mem::take(&mut shard.ctx.events);
    // A flood, whatever its ports.
    for port in 0..1_000 {
        shard.stranger(SocketAddr::new(from(1).ip(), port), 64);
    }
    assert_eq!(told(&mut shard).len(), strangers::OF_ONE_BURST as usize);
    // It takes nothing away from a peer elsewhere.
    shard.stranger(from(2), 64);
    assert_eq!(told(&mut shard), vec![Event::Unopened(from(2), 64)]);
    // But all together are few.
    for host in 3..=255 {
        shard.stranger(from(host), 64);
    }
    let rest = strangers::BURST - strangers::OF_ONE_BURST - 1;
    assert_eq!(told(&mut shard).len(), rest as usize);
    assert_eq!(sent(&mut shard), []);
}

#[test]
fn a_handshake_asked_for_before_there_is_a_way_goes_out_with_the_first() {
    let seat = seat();
    let mut shard = shard(&seat);
    let far = Far::new(1);
    meet(&mut shard, std::slice::from_ref(&far));
    aim(&mut shard, far.id, None, false);
    shard.initiate(far.id, false);
    assert_eq!(sent(&mut shard), []);
    seat.hub.inboxes[0].paths.set(far.id, path(None, true));
    shard.commands();
    assert_eq!(sent(&mut shard).len(), 1);
}

#[test]
fn renewals_that_passed_unread_end_no_session_and_another_key_does() {
    let key = |n| Zeroizing::new([n; 32]);
    let until = sys::now() + Duration::from_secs(30);
    type Change = fn(&mut Settings, &[Zeroizing<[u8; 32]>; 2], Instant);
    let unread: [(Change, bool); 4] = [
        (
            |settings, [one, _], until| settings.renew_key(one, until),
            true,
        ),
        (
            |settings, [one, other], until| {
                settings.renew_key(one, until);
                settings.renew_key(other, until);
            },
            true,
        ),
        (
            |settings, [one, _], until| {
                settings.renew_key(one, until);
                // Its time is over.
                settings.previous_key = None;
            },
            true,
        ),
        (
            |settings, [one, other], until| {
                settings.set_key(Some(one));
                settings.renew_key(other, until);
            },
            false,
        ),
    ];
    for (at, (change, stays)) in unread.into_iter().enumerate() {
        let seat = seat();
        let mut shard = shard(&seat);
        let far = joined(&mut shard);
        let mut settings = Settings::clone(&seat.settings);
        change(&mut settings, &[key(7), key(8)], until);
        seat.hub.change_settings(|newest| *newest = settings);
        shard.commands();
        let now = shard.ctx.now;
        let ready = shard.peers.get(far.id).unwrap().ready(now);
        assert_eq!(ready, stays, "{at}");
    }
}

#[test]
fn who_goes_on_with_keys_that_are_too_old_here_gets_an_initiation() {
    let seat = seat();
    let mut shard = shard(&seat);
    let mut far = joined(&mut shard);
    let confirmation = sent(&mut shard).remove(0).1;
    let now = shard.ctx.now;
    let index = index(&confirmation);
    let (engine, session) = (&mut far.engine, &mut far.session);
    let mut opened = Opened::new(seat.kind);
    let mut bytes = confirmation;
    session.open(engine, now, index, &mut bytes, 32, &mut opened, |_| {});
    let mut data = vec![0; 160];
    session.seal(engine, now, &mut data, 160).unwrap();
    // By the sleeper's clock; the peer's has not gone on.
    shard.ctx.now += Duration::from_secs(200);
    comes_by_relay(&shard, far.id, &[data]);
    shard.relayed();
    assert_eq!(dropped(&shard, DropReason::SessionExpired), 1);
    let messages = sent(&mut shard);
    assert_eq!((messages.len(), messages[0].1.len()), (1, INITIATION_LEN));
}

#[test]
fn pings_by_tsmp_are_answered_within_a_share_and_only_where_they_are_for_us() {
    let seat = seat();
    let mut shard = shard(&seat);
    let mut far = joined(&mut shard);
    let now = shard.ctx.now;
    let confirmation = sent(&mut shard).pop().unwrap().1;
    assert_eq!(far.open(now, &confirmation), [0; 0]);
    let (own, theirs) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let prefix = |addr: [u8; 4]| Prefix {
        addr: addr.into(),
        bits: 32,
    };
    let peer = PeerConfig {
        allowed_ips: vec![prefix(theirs)],
        ..config(far.id, far.key)
    };
    let stranger = PeerConfig {
        outsider: true,
        ..peer.clone()
    };
    let table = Arc::new(shard.table.changed(vec![peer], &[], None, 1));
    let api = PeerApi {
        v4: Some(std::net::SocketAddrV4::new(own.into(), 0x1234)),
        v6: None,
    };
    let syn = Tcp {
        flags: TCP_SYN,
        ..Tcp::default()
    };
    let connect = Builder::new((theirs, 9).into(), (own, 0x1234).into()).tcp(&syn, b"");
    let hides = Builder {
        fragment: 0x2000,
        ..Builder::new((theirs, 9).into(), (own, 0x1234).into())
    };
    let hides = hides.ip(TCP, &connect[20..28]);
    let connect = [&connect, &connect, &hides].map(|packet| far.seal(now, packet));
    let mut ask = |shard: &mut Shard<'_>, to: [u8; 4], count: usize| -> Vec<Vec<u8>> {
        let ping = Builder::new((theirs, 0).into(), (to, 0).into()).ip(TSMP, b"p12345678");
        let pings: Vec<_> = (0..count).map(|_| far.seal(now, &ping)).collect();
        comes_by_relay(shard, far.id, &pings);
        shard.relayed();
        let answers = sent(shard);
        let answers = answers.iter().map(|(_, one)| far.open(now, one));
        answers.collect()
    };
    for rules in [Rules::AllowAll, Rules::default()] {
        drop(shard.inbox.network.force_push(Network {
            table: Arc::clone(&table),
            rules: Arc::new(CompiledRules::compile(&rules, Some(&[prefix(own)]))),
            peerapi: api,
        }));
        shard.commands();
        shard.peers.get(PeerId(1)).unwrap().pings = None;
        let pong = ask(&mut shard, own, 1).pop().unwrap();
        assert_eq!(pong[20..], *b"o12345678\x12\x34");
        assert_eq!(pong[12..20], [own, theirs].concat());
        assert_eq!(ask(&mut shard, [10, 9, 9, 9], 1), [[0; 0]; 0]);
        let burst = PINGS_BURST as usize;
        assert_eq!(ask(&mut shard, own, 3 * burst).len(), burst - 1);
    }
    let answered = counted(&shard).get(Meter::PingsAnswered);
    assert_eq!(answered, 2 * u64::from(PINGS_BURST));
    assert_eq!(dropped(&shard, DropReason::FilterConsumed), 2 * 31);
    // A peer that is none of the network's gets no answer, and no connection to our peerapi.
    comes_by_relay(&shard, PeerId(1), &connect[..1]);
    shard.relayed();
    assert_eq!(dropped(&shard, DropReason::FilterDenied), 0);
    drop(shard.inbox.network.force_push(Network {
        table: Arc::new(shard.table.changed(vec![stranger], &[], None, 1)),
        rules: Arc::new(CompiledRules::compile(
            &Rules::AllowAll,
            Some(&[prefix(own)]),
        )),
        peerapi: api,
    }));
    shard.commands();
    shard.peers.get(PeerId(1)).unwrap().pings = None;
    assert_eq!(ask(&mut shard, own, 1), [[0; 0]; 0]);
    assert_eq!(dropped(&shard, DropReason::FilterConsumed), 2 * 31 + 1);
    comes_by_relay(&shard, PeerId(1), &connect[1..]);
    shard.relayed();
    assert_eq!(dropped(&shard, DropReason::FilterDenied), 2);
}

#[test]
fn a_ping_by_tsmp_is_sealed_and_told_of_once_when_it_is_answered() {
    let seat = seat();
    let mut shard = shard(&seat);
    let mut far = joined(&mut shard);
    let now = shard.ctx.now;
    drop(sent(&mut shard));
    let (own, theirs) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let prefix = |addr: [u8; 4]| Prefix {
        addr: addr.into(),
        bits: 32,
    };
    let peer = PeerConfig {
        allowed_ips: vec![prefix(theirs)],
        ..config(far.id, far.key)
    };
    drop(shard.inbox.network.force_push(Network {
        table: Arc::new(shard.table.changed(vec![peer], &[], None, 1)),
        rules: Arc::new(CompiledRules::compile(
            &Rules::default(),
            Some(&[prefix(own)]),
        )),
        peerapi: PeerApi::default(),
    }));
    let ping = |number: u64| Ping {
        number,
        src: own.into(),
        dst: theirs.into(),
    };
    let last = PINGS_MAX as u64;
    for number in 0..=last {
        assert!(!shard.inbox.pings.is_full());
        shard.inbox.pings.push((far.id, ping(number))).unwrap();
        assert!(!shard.inbox.is_empty());
        shard.commands();
    }
    let pings: Vec<_> = sent(&mut shard)
        .iter()
        .map(|(_, one)| far.open(now, one))
        .collect();
    assert_eq!(pings.len(), PINGS_MAX + 1);
    assert_eq!(pings[1][20..], [&b"p"[..], &1u64.to_be_bytes()].concat());
    shard.ctx.events.clear();
    let mut answer = |shard: &mut Shard<'_>, number: u64, port: &[u8]| {
        let body = [b"o", &number.to_be_bytes()[..], port].concat();
        let pong = Builder::new((theirs, 0).into(), (own, 0).into()).ip(TSMP, &body);
        comes_by_relay(shard, far.id, &[far.seal(now, &pong)]);
        shard.relayed();
        let told: Vec<Event> = shard.ctx.events.drain(..).collect();
        told.into_iter()
            .filter(|event| matches!(event, Event::Pong(..)))
            .collect::<Vec<_>>()
    };
    let told = |number, port| vec![Event::Pong(PeerId(1), number, port)];
    assert_eq!(answer(&mut shard, 1, b"\x12\x34"), told(1, 0x1234));
    assert_eq!(answer(&mut shard, last, b""), told(last, 0));
    // Answered before, forgotten for later ones, and never asked.
    for number in [1, 0, last + 1] {
        assert_eq!(answer(&mut shard, number, b""), []);
    }
}

/// Peers take our DISCO key from TSMP (`a`), and what a host behind a router sends comes from the router.
#[test]
fn tsmp_leaves_a_plain_device_and_no_node() {
    let seat = seat();
    let mut shard = shard(&seat);
    let mut far = joined(&mut shard);
    let now = shard.ctx.now;
    drop(sent(&mut shard));
    let net = |addr: [u8; 4], bits| Prefix {
        addr: addr.into(),
        bits,
    };
    let peer = PeerConfig {
        allowed_ips: vec![net([10, 0, 0, 0], 24)],
        ..config(far.id, far.key)
    };
    let table = Arc::new(shard.table.changed(vec![peer], &[], None, 1));
    let mut refused = 0;
    for (rules, local, leaves) in [
        (Rules::AllowAll, None, true),
        (Rules::AllowAll, Some([net([10, 0, 0, 1], 32)]), false),
        (Rules::default(), Some([net([10, 0, 0, 1], 32)]), false),
    ] {
        let local = local.as_ref().map(|local| &local[..]);
        drop(shard.inbox.network.force_push(Network {
            table: Arc::clone(&table),
            rules: Arc::new(CompiledRules::compile(&rules, local)),
            peerapi: PeerApi::default(),
        }));
        shard.commands();
        for from in [[10, 0, 0, 1], [192, 168, 7, 7]] {
            let ends = Builder::new((from, 0).into(), ([10, 0, 0, 2], 0).into());
            let key = ends.ip(TSMP, &[b"a".as_slice(), &[7; 32]].concat());
            shard.outbound(as_read(&key), &mut table.routes.cursor(), false);
            shard.flush_runs();
            let sent: Vec<_> = sent(&mut shard)
                .iter()
                .map(|(_, datagram)| far.open(now, datagram))
                .collect();
            let wanted = if leaves { vec![key] } else { vec![] };
            assert_eq!(sent, wanted);
            refused += u64::from(!leaves);
            assert_eq!(dropped(&shard, DropReason::TsmpForged), refused);
        }
    }
}
