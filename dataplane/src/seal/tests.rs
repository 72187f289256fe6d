//! Real sessions, no sockets: what would be sent is collected and opened by the other end.

#![expect(
    clippy::disallowed_methods,
    reason = "boringtun reads the clock itself"
)]

use std::sync::Arc;
use std::time::Instant;

use rand::RngExt;
use zeroize::Zeroizing;

use super::*;
use crate::bench_support::{index, shake_hands};
use crate::config;
use crate::noise::public_key;
use crate::packet::build::Builder;
use crate::packet::header::Headers;
use crate::packet::segment::plan;
use crate::packet::vnet::VnetHdr;
use crate::peer::table::PeerEntry;
use crate::peer::{Peer, Peers};
use crate::seeded;
use crate::session::{Opened, Session};
use crate::types::PeerConfig;

const MTU: usize = 1420;
const PEER: PeerId = PeerId(0);

/// Our side with some peers, and the peers themselves, whose numbers are their places.
struct Rig {
    ctx: Context,
    engine: Engine,
    peers: Peers,
    runs: Runs,
    sent: Collected,
    far: Vec<(Engine, Session)>,
    opened: Opened,
}

#[derive(Default)]
struct Collected(Vec<(Vec<u8>, usize, u8)>, Vec<PeerId>);

impl Outlet<Peer> for Collected {
    fn send(&mut self, _ctx: &mut Context, peer: &mut Peer, batch: Batch<'_>) {
        assert_eq!(batch.kind, Kind::Data);
        self.0.push((batch.bytes.to_vec(), batch.stride, batch.tos));
        self.1.push(peer.id);
    }
}

fn config(id: PeerId, key: u8) -> PeerConfig {
    PeerConfig::new(id, public_key(&[key; 32]))
}

impl Rig {
    fn new(kind: config::Engine) -> Rig {
        Rig::with_peers(kind, 1)
    }

    fn with_peers(kind: config::Engine, count: u8) -> Rig {
        let ctx = Context::new(Instant::now());
        let new_engine = |key| {
            let rng = rand::make_rng();
            Engine::new(kind, &Zeroizing::new([key; 32]), MTU, 0, rng)
        };
        let mut rig = Rig {
            ctx,
            engine: new_engine(1),
            peers: Peers::new(false, 1),
            runs: Runs::new(),
            sent: Collected::default(),
            far: Vec::new(),
            opened: Opened::new(kind),
        };
        for key in 2..2 + count {
            rig.join(key, new_engine(key));
        }
        rig
    }

    /// Shakes hands with one peer more.
    fn join(&mut self, key: u8, mut far_engine: Engine) {
        let at = self.ctx.moment();
        let id = PeerId(u32::try_from(self.far.len()).unwrap());
        let far = far_engine.session(at.now, &config(PEER, 1));
        self.far.push((far_engine, far));
        let (far_engine, far) = self.far.last_mut().unwrap();
        let engine = &mut self.engine;
        let entry = PeerEntry {
            config: Arc::new(config(id, key)),
            shared: Arc::default(),
            owner: 0,
        };
        let wanted = self
            .peers
            .set(at.now, Some(engine), id, Some(&entry), &mut 0);
        assert!(!wanted);
        let peer = self.peers.wake(at.now, id, engine).unwrap();
        let session = peer.session().unwrap();
        let mut keepalive = shake_hands(at, (engine, session), (far_engine, far));
        let len = keepalive.len();
        self.open(id, &mut keepalive, len);
        assert!(self.peers.get(id).unwrap().ready(at.now));
    }

    /// Opens a run at the far end; it must be good.
    fn open(&mut self, id: PeerId, bytes: &mut [u8], stride: usize) -> Vec<Vec<u8>> {
        let index = index(bytes);
        let (far_engine, far) = &mut self.far[id.0 as usize];
        far.open(
            far_engine,
            self.ctx.now,
            index,
            bytes,
            stride,
            &mut self.opened,
            |reason| panic!("{reason:?}"),
        );
        let packets = (0..self.opened.len()).map(|i| {
            let packet = self.opened.packet(i, bytes);
            let headers = Headers::parse(packet).unwrap();
            packet[..headers.total_len].to_vec()
        });
        packets.collect()
    }

    /// Seals a packet, which must be valid.
    fn seal(&mut self, header: VnetHdr, bytes: &[u8]) {
        self.seal_for(PEER, header, bytes);
    }

    fn seal_for(&mut self, id: PeerId, header: VnetHdr, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        let plan = plan(&header, &bytes).unwrap();
        if self.runs.crowded(id, &plan) {
            self.flush_run();
        }
        let peer = self.peers.get(id).unwrap();
        packet(
            &mut self.ctx,
            &mut self.engine,
            peer,
            &plan,
            &mut bytes,
            &mut self.runs,
            &mut self.sent,
        );
    }

    fn flush_run(&mut self) -> bool {
        let Some(mut run) = self.runs.close(0) else {
            return false;
        };
        let peer = self.peers.get(run.peer).unwrap();
        run.flush(&mut self.ctx, &mut self.engine, peer, &mut self.sent);
        self.runs.give_back(run);
        true
    }

    fn flush(&mut self) {
        while self.flush_run() {}
    }

    /// The datagram counts of what was sent; opens all of it and returns the inner packets too.
    fn take(&mut self) -> (Vec<usize>, Vec<Vec<u8>>) {
        self.flush();
        let mut counts = Vec::new();
        let mut packets = Vec::new();
        let Collected(sent, to) = std::mem::take(&mut self.sent);
        for ((mut bytes, stride, _), id) in sent.into_iter().zip(to) {
            assert!(bytes.len() <= SEND_BYTES_MAX);
            counts.push(bytes.len().div_ceil(stride));
            packets.extend(self.open(id, &mut bytes, stride));
        }
        (counts, packets)
    }
}

const BOTH: [config::Engine; 2] = [config::Engine::Ringtail, config::Engine::Boringtun];

fn builder(tos: u8) -> Builder {
    Builder {
        tos,
        ..Builder::new("10.0.0.1:1".parse().unwrap(), "10.0.0.2:2".parse().unwrap())
    }
}

/// A TCP super-packet with so much payload in segments of `mss`, and the packets it stands for.
fn super_packet(payload: usize, mss: u16, tos: u8) -> (VnetHdr, Vec<u8>, Vec<Vec<u8>>) {
    let (header, bytes) = builder(tos).super_packet(&vec![0x37; payload], mss);
    let plan = plan(&header, &bytes).unwrap();
    let segments = (0..plan.len())
        .map(|i| {
            let mut segment = vec![0; plan.segment_len(i)];
            plan.write(i, &bytes, &mut segment);
            segment
        })
        .collect();
    (header, bytes, segments)
}

#[test]
fn forty_eight_segments_are_forty_five_and_three_and_the_next_join_the_three() {
    for kind in BOTH {
        let mut rig = Rig::new(kind);
        let (header, bytes, segments) = super_packet(47 * 1368 + 700, 1368, 0);
        assert_eq!(segments.len(), 48);
        rig.seal(header, &bytes);
        let whole = super_packet(40 * 1368, 1368, 0);
        rig.seal(whole.0, &whole.1);
        rig.seal(whole.0, &whole.1);
        let (counts, packets) = rig.take();
        // The short forty-eighth closes its run.
        assert_eq!(counts, [45, 3, 45, 35]);
        assert_eq!(packets, [segments, whole.2.clone(), whole.2].concat());
    }
}

#[test]
fn small_datagrams_stop_at_the_kernels_count() {
    for kind in BOTH {
        let mut rig = Rig::new(kind);
        let (header, bytes, segments) = super_packet(300 * 100, 100, 0);
        rig.seal(header, &bytes);
        let (counts, packets) = rig.take();
        assert_eq!(counts, [128, 128, 44]);
        assert_eq!(packets, segments);
    }
}

#[test]
fn a_longer_datagram_or_another_tos_starts_a_new_run() {
    for kind in BOTH {
        let mut rig = Rig::new(kind);
        let packets: Vec<Vec<u8>> = [(100, 2), (100, 2), (100, 1), (120, 1), (90, 1), (90, 1)]
            .map(|(len, tos)| builder(tos).udp(&vec![1; len]))
            .into();
        for bytes in &packets {
            rig.seal(VnetHdr::PLAIN, bytes);
        }
        rig.flush();
        let shapes: Vec<(usize, u8)> = rig
            .sent
            .0
            .iter()
            .map(|(b, s, tos)| (b.len().div_ceil(*s), *tos))
            .collect();
        assert_eq!(shapes, [(2, 2), (1, 1), (2, 1), (1, 1)]);
        assert_eq!(rig.take().1, packets);
    }
}

#[test]
fn what_comes_by_turns_for_two_peers_or_with_two_tos_bytes_leaves_in_two_sends() {
    for kind in BOTH {
        let mut rig = Rig::with_peers(kind, 2);
        let bytes = builder(0).udp(&[1; 100]);
        for _ in 0..20 {
            rig.seal_for(PeerId(0), VnetHdr::PLAIN, &bytes);
            rig.seal_for(PeerId(1), VnetHdr::PLAIN, &bytes);
        }
        rig.flush();
        assert_eq!(rig.sent.1, [PeerId(0), PeerId(1)]);
        assert_eq!(rig.take().0, [20, 20]);

        let marked = Builder {
            tos: 2,
            ..Builder::new("10.0.0.1:9".parse().unwrap(), "10.0.0.2:2".parse().unwrap())
        };
        let marked = marked.udp(&[2; 100]);
        for _ in 0..20 {
            rig.seal(VnetHdr::PLAIN, &bytes);
            rig.seal(VnetHdr::PLAIN, &marked);
        }
        let (counts, packets) = rig.take();
        assert_eq!(counts, [20, 20]);
        assert_eq!(packets, [vec![bytes; 20], vec![marked; 20]].concat());
    }
}

#[test]
fn with_one_peer_too_many_the_run_longest_open_makes_room() {
    let count = RUNS_MAX + 1;
    let mut rig = Rig::with_peers(config::Engine::Ringtail, u8::try_from(count).unwrap());
    let bytes = builder(0).udp(&[1; 100]);
    let ids = (0..count).map(|id| PeerId(u32::try_from(id).unwrap()));
    for id in ids.clone() {
        rig.seal_for(id, VnetHdr::PLAIN, &bytes);
    }
    assert_eq!(rig.sent.1, [PeerId(0)]);
    // Those that are open go on.
    for id in ids.skip(1) {
        rig.seal_for(id, VnetHdr::PLAIN, &bytes);
    }
    assert_eq!(rig.sent.1, [PeerId(0)]);
    let counts = rig.take().0;
    assert_eq!(counts, [vec![1], vec![2; RUNS_MAX]].concat());
}

/// What a packet of [`nothing_overtakes_inside_a_flow`] is known by: the flow, and its place there.
fn mark(packet: &[u8]) -> (u16, u32) {
    let headers = Headers::parse(packet).unwrap();
    let flow = match headers.fragment {
        Fragment::Whole => headers.ports(packet).unwrap().0,
        // Fragments are of the first flow.
        Fragment::First | Fragment::Later(_) => 0,
    };
    let end = &packet[headers.total_len - 4..headers.total_len];
    (flow, u32::from_be_bytes(*end.first_chunk().unwrap()))
}

/// Random packets of random flows to random peers. A flow has its peer; its packets differ in length,
/// now and then in their TOS byte, and are fragments now and then. The model is a queue for each flow.
#[test]
fn nothing_overtakes_inside_a_flow() {
    let mut rng = seeded();
    for (round, peers) in [1, 2, 3, 7, 12].into_iter().cycle().take(40).enumerate() {
        let mut rig = Rig::with_peers(BOTH[round % 2], peers);
        let flows = rng.random_range(1..40);
        let mut model = vec![Vec::new(); 40];
        for i in 0..1000u32 {
            let flow: u16 = rng.random_range(0..flows);
            let steady = [0, 2, 2, 1][usize::from(flow % 4)];
            let len = [4, 30, 30, 300, 1200][rng.random_range(0..5)];
            let builder = Builder {
                tos: if rng.random_range(0..8) == 0 {
                    3
                } else {
                    steady
                },
                fragment: match rng.random_range(0..10) {
                    0 if flow == 0 => 0x2000,
                    1 if flow == 0 => 0x0040,
                    _ => 0,
                },
                ..Builder::new(([10, 0, 0, 1], flow).into(), ([10, 0, 0, 2], 2).into())
            };
            let mut payload = vec![0; len];
            payload[len - 4..].copy_from_slice(&i.to_be_bytes());
            model[usize::from(flow)].push(i);
            let id = PeerId(u32::from(flow) % u32::from(peers));
            rig.seal_for(id, VnetHdr::PLAIN, &builder.udp(&payload));
            if rng.random_range(0..64) == 0 {
                rig.flush();
            }
        }
        let (counts, packets) = rig.take();
        assert_eq!((counts.iter().sum::<usize>(), packets.len()), (1000, 1000));
        let mut came = vec![Vec::new(); 40];
        for packet in packets {
            let (flow, i) = mark(&packet);
            came[usize::from(flow)].push(i);
        }
        assert_eq!(came, model);
    }
}

#[test]
fn dscp_stays_inside() {
    for kind in BOTH {
        let mut rig = Rig::new(kind);
        rig.seal(VnetHdr::PLAIN, &builder(0xb8 | 2).udp(&[1; 50]));
        rig.flush();
        assert_eq!(rig.sent.0[0].2, 2);
    }
}

#[test]
fn a_packet_that_no_datagram_can_carry_is_dropped() {
    for kind in BOTH {
        let mut rig = Rig::new(kind);
        rig.seal(VnetHdr::PLAIN, &builder(0).udp(&vec![1; 65_500]));
        assert_eq!(rig.take(), (vec![], vec![]));
        let counted = rig.ctx.counters.snapshot();
        assert_eq!(counted.drops(DropReason::TooBig), 1);
    }
}
