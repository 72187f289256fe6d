//! Real sessions, no sockets: what would be sent is collected and opened by the other end.

#![expect(
    clippy::disallowed_methods,
    reason = "boringtun reads the clock itself"
)]

use std::sync::Arc;
use std::time::Instant;

use zeroize::Zeroizing;

use super::*;
use crate::channel::PeerConfig;
use crate::channel::table::PeerEntry;
use crate::config;
use crate::packet::build::{Builder, Tcp};
use crate::packet::header::Headers;
use crate::peer::{Peer, Peers};
use crate::session::{Opened, Session};
use crate::tun::segment::plan;
use crate::tun::vnet::{GSO_TCPV4, VnetHdr};

const MTU: usize = 1420;
const PEER: PeerId = PeerId(0);

/// Our side with one peer, and the peer itself.
struct Rig {
    ctx: Context,
    engine: Engine,
    peers: Peers,
    run: Run,
    sent: Collected,
    far_engine: Engine,
    far: Session,
    opened: Opened,
}

#[derive(Default)]
struct Collected(Vec<(Vec<u8>, usize, u8)>);

impl Outlet<Peer> for Collected {
    fn send(&mut self, _ctx: &mut Context, peer: &mut Peer, batch: Batch<'_>) {
        assert_eq!((peer.id, batch.kind), (PEER, Kind::Data));
        self.0.push((batch.bytes.to_vec(), batch.stride, batch.tos));
    }
}

fn public(key: u8) -> [u8; 32] {
    use boringtun::x25519::{PublicKey, StaticSecret};
    *PublicKey::from(&StaticSecret::from([key; 32])).as_bytes()
}

fn config(id: PeerId, key: u8) -> PeerConfig {
    PeerConfig {
        id,
        public_key: public(key),
        preshared_key: None,
        allowed_ips: vec![],
        persistent_keepalive: None,
    }
}

impl Rig {
    fn new(kind: config::Engine) -> Rig {
        let ctx = Context::new(Instant::now());
        let at = ctx.moment();
        let new_engine = |key| {
            let rng = rand::make_rng();
            Engine::new(kind, &Zeroizing::new([key; 32]), MTU, 0, rng)
        };
        let (mut engine, mut far_engine) = (new_engine(1), new_engine(2));
        let mut far = far_engine.session(at.now, &config(PEER, 1));
        let mut peers = Peers::new(false, 1);
        let entry = PeerEntry {
            config: Arc::new(config(PEER, 2)),
            shared: Arc::default(),
            owner: 0,
        };
        let wanted = peers.set(at.now, Some(&mut engine), PEER, Some(&entry), &mut 0);
        assert!(!wanted);
        let peer = peers.wake(at.now, PEER, &mut engine).unwrap();
        let session = peer.session().unwrap();
        let (mut there, mut back) = ([0; MESSAGE_LEN_MAX], [0; MESSAGE_LEN_MAX]);
        let len = session
            .initiate(&mut engine, at, false, &mut there)
            .unwrap();
        let outcome = far.handle_handshake(&mut far_engine, at, &there[..len], None, &mut back);
        let len = outcome.unwrap().message.unwrap();
        let outcome = session.handle_handshake(&mut engine, at, &back[..len], None, &mut there);
        let len = outcome.unwrap().message.unwrap();
        let mut rig = Rig {
            ctx,
            engine,
            peers,
            run: Run::new(),
            sent: Collected::default(),
            far_engine,
            far,
            opened: Opened::new(kind),
        };
        rig.open(&mut there[..len], len);
        assert!(rig.peers.get(PEER).unwrap().ready(at.now));
        rig
    }

    /// Opens a run at the far end; it must be good.
    fn open(&mut self, bytes: &mut [u8], stride: usize) -> Vec<Vec<u8>> {
        let index = u32::from_le_bytes(*bytes[4..].first_chunk().unwrap());
        self.far.open(
            &mut self.far_engine,
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
        let mut bytes = bytes.to_vec();
        let plan = plan(&header, &bytes).unwrap();
        let peer = self.peers.get(PEER).unwrap();
        packet(
            &mut self.ctx,
            &mut self.engine,
            peer,
            &plan,
            &mut bytes,
            &mut self.run,
            &mut self.sent,
        );
    }

    fn flush(&mut self) {
        let peer = self.peers.get(PEER).unwrap();
        self.run
            .flush(&mut self.ctx, &mut self.engine, peer, &mut self.sent);
    }

    /// The datagram counts of what was sent; opens all of it and returns the inner packets too.
    fn take(&mut self) -> (Vec<usize>, Vec<Vec<u8>>) {
        self.flush();
        let mut counts = Vec::new();
        let mut packets = Vec::new();
        for (mut bytes, stride, _) in std::mem::take(&mut self.sent.0) {
            assert!(bytes.len() <= SEND_BYTES_MAX);
            counts.push(bytes.len().div_ceil(stride));
            packets.extend(self.open(&mut bytes, stride));
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
    let tcp = Tcp {
        seq: 1,
        ack: 2,
        flags: 0x10,
        window: 9,
        options: &[1; 12],
    };
    let bytes = builder(tos).tcp(&tcp, &vec![0x37; payload]);
    let header = VnetHdr::new(GSO_TCPV4, 52, mss, 20, 16);
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
        let published = crate::stats::Published::default();
        published.publish(&rig.ctx.counters);
        assert_eq!(published.read().drops(DropReason::TooBig), 1);
    }
}
