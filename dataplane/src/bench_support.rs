//! Sessions without a data plane around them, packets for them, and a shard's peers without its
//! packets: for benches and for the counting allocator. Not an API.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;
use zeroize::Zeroizing;

use crate::noise::public_key;
use crate::packet::build::Builder;
use crate::packet::segment::plan;
use crate::packet::vnet::VnetHdr;
use crate::peer::Peers;
use crate::peer::table::PeerTable;
use crate::session::{self, Change, MESSAGE_LEN_MAX, Moment, OVERHEAD, Opened, Session};
use crate::types::{PeerConfig, PeerId};

/// A TCP packet over IPv4, as the TUN gives it, with so many bytes of payload in segments of `mss`
/// bytes behind 52 of headers.
#[must_use]
pub fn super_packet(payload_len: usize, mss: u16) -> (VnetHdr, Vec<u8>) {
    let src = SocketAddr::from(([100, 64, 0, 1], 40_000));
    let dst = SocketAddr::from(([100, 64, 0, 2], 5201));
    Builder::new(src, dst).super_packet(&vec![0x5a; payload_len], mss)
}

/// The peers of one shard, that hears of the network's changes.
#[expect(missing_debug_implementations, reason = "keys")]
pub struct Neighbours {
    now: Instant,
    shards: usize,
    newest: PeerTable,
    table: PeerTable,
    peers: Peers,
}

impl Neighbours {
    /// Nobody yet.
    #[must_use]
    pub fn new(now: Instant, shards: usize) -> Neighbours {
        Neighbours {
            now,
            shards,
            newest: PeerTable::default(),
            table: PeerTable::default(),
            peers: Peers::new(false, shards),
        }
    }

    /// The control side's part of a change.
    pub fn change(&mut self, peers: Vec<PeerConfig>, gone: &[PeerId]) {
        self.newest = self.newest.changed(peers, gone, None, self.shards);
    }

    /// The part of one shard: takes over what it does not know yet. Returns how many peers it looked at.
    pub fn hear(&mut self) -> usize {
        let before = std::mem::replace(&mut self.table, self.newest.clone());
        let peers = &mut self.peers;
        self.table.differences(&before, |id, _, entry| {
            let mine = entry.filter(|entry| entry.owner == 0);
            peers.set(self.now, None, id, mine, &mut 0);
        })
    }

    /// Whether the peer is this shard's, by what it has heard.
    pub fn owns(&mut self, id: PeerId) -> bool {
        self.peers.get(id).is_some()
    }
}

/// Two ends with one session each per peer, all with keys.
#[expect(missing_debug_implementations, reason = "keys")]
pub struct Sessions {
    now: Instant,
    ends: [session::Engine; 2],
    near: Vec<Session>,
    far: Vec<Session>,
    run: Box<[u8]>,
    opened: Opened,
}

/// The first segment of a batch is sealed with this much room at least behind it.
const ROOM: usize = MESSAGE_LEN_MAX;

impl Sessions {
    /// Shakes hands once per peer.
    ///
    /// # Panics
    /// If a handshake fails.
    #[must_use]
    pub fn new(kind: crate::config::Engine, now: Instant, peers: u32, mtu: usize) -> Sessions {
        let keys = [[1; 32], [2; 32]];
        let engine = |own: usize| {
            let rng = StdRng::seed_from_u64(own as u64);
            session::Engine::new(kind, &Zeroizing::new(keys[own]), mtu, 0, rng)
        };
        let config = |id, peer: usize| PeerConfig::new(PeerId(id), public_key(&keys[peer]));
        let mut sessions = Sessions {
            now,
            ends: [engine(0), engine(1)],
            near: Vec::new(),
            far: Vec::new(),
            run: vec![0; (64 << 10) + ROOM].into(),
            opened: Opened::new(kind),
        };
        for id in 0..peers {
            let [near, far] = &mut sessions.ends;
            let mut a = near.session(now, &config(id, 1));
            let mut b = far.session(now, &config(id, 0));
            let at = Moment {
                now,
                wall: Duration::from_secs(u64::from(id)),
            };
            let mut keepalive = shake_hands(at, (near, &mut a), (far, &mut b));
            let (index, len) = (index(&keepalive), keepalive.len());
            let opened = &mut sessions.opened;
            b.open(far, now, index, &mut keepalive, len, opened, |_| {});
            sessions.near.push(a);
            sessions.far.push(b);
        }
        sessions
    }

    /// Cuts a packet from the TUN and seals it for a peer. Returns the datagrams and the length of
    /// each but the last.
    ///
    /// # Panics
    /// If the packet is none, or does not fit a send.
    pub fn seal(&mut self, peer: usize, vnet: &VnetHdr, packet: &mut [u8]) -> (&mut [u8], usize) {
        let plan = plan(vnet, packet).expect("a packet");
        let engine = &mut self.ends[0];
        let session = &mut self.near[peer];
        let staged = session.stage(engine, &plan, packet, 0..plan.len(), &mut self.run);
        assert_eq!(staged.segments, plan.len());
        let stride = engine.sealed_len(plan.segment_len(0));
        let messages = &mut self.run[..staged.bytes];
        let sealed = session.seal(engine, self.now, messages, stride);
        assert_eq!(sealed, Ok(()));
        (messages, stride)
    }

    /// Opens datagrams that [`Sessions::seal`] has made for a peer. Returns the bytes of the
    /// packets in them, padding included.
    ///
    /// # Panics
    /// If one of them is not good.
    pub fn open(&mut self, peer: usize, datagrams: &mut [u8], stride: usize) -> usize {
        let index = index(datagrams);
        let report = self.far[peer].open(
            &mut self.ends[1],
            self.now,
            index,
            datagrams,
            stride,
            &mut self.opened,
            |reason| panic!("{reason:?}"),
        );
        report.bytes - report.datagrams * OVERHEAD
    }
}

/// Has one session shake hands with another. Returns the keep-alive that tells that one so.
///
/// # Panics
/// If it fails.
pub(crate) fn shake_hands(
    at: Moment,
    (near, a): (&mut session::Engine, &mut Session),
    (far, b): (&mut session::Engine, &mut Session),
) -> Vec<u8> {
    let (mut there, mut back) = ([0; MESSAGE_LEN_MAX], [0; MESSAGE_LEN_MAX]);
    let len = a.initiate(near, at, true, &mut there).expect("the first");
    let answer = b.handle_handshake(far, at, &there[..len], None, &mut back);
    let len = answer.ok().and_then(|outcome| outcome.message);
    let response = &back[..len.expect("a response")];
    let done = a.handle_handshake(near, at, response, None, &mut there);
    let done = done.expect("a good response");
    assert_eq!(done.change, Change::Up);
    there[..done.message.expect("a keep-alive")].to_vec()
}

/// The receiver index of data.
pub(crate) fn index(datagram: &[u8]) -> u32 {
    let bytes = datagram.get(4..8).and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}
