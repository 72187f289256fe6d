//! Where the frames of one client go: all packets of one read for one destination as one chunk.

use std::collections::HashSet;
use std::sync::Arc;

use super::registry::{Client, Lane};
use super::{Shared, head, now};
use crate::derp::frame::{self, HEADER_LEN, PeerGoneReason};
use crate::derp::is_disco;
use crate::derp::queue::{CHUNK_LEN, Chunk};
use crate::derp::server::Event;
use crate::key::{KEY_LEN, NodePublic};
use crate::rate::{Bucket, Rate};

/// Memory kept for the next DISCO frame.
const DISCO_KEPT: usize = 2 << 10;

/// Receivers a connection remembers having told the registry of.
const KNOWN_MAX: usize = 256;

/// PeerGone(not here) per sending connection, in thousandths.
const NOT_HERE: Rate = Rate {
    per_second: 1000,
    burst: 3000,
};

/// Where the frames of one client go.
pub(super) struct Router<'a> {
    shared: &'a Shared,
    pub(super) me: &'a Arc<Client>,
    /// Packets in a row for one destination, as RecvPacket frames.
    run: Chunk,
    run_frames: u64,
    run_to: NodePublic,
    /// A single DISCO frame on its way.
    disco: Chunk,
    /// Receivers that are remembered already.
    known: HashSet<u64>,
    /// What the Pong that waits will say: the client's last Ping.
    pub(super) pong: Option<[u8; 8]>,
    not_here: Bucket,
    packets: u64,
    bytes: u64,
}

impl<'a> Router<'a> {
    pub(super) fn new(shared: &'a Shared, me: &'a Arc<Client>) -> Self {
        Self {
            shared,
            me,
            run: Chunk::default(),
            run_frames: 0,
            run_to: NodePublic::default(),
            disco: Chunk::default(),
            known: HashSet::new(),
            pong: None,
            not_here: Bucket::new(NOT_HERE, now()),
            packets: 0,
            bytes: 0,
        }
    }

    pub(super) fn handle(&mut self, event: Event<'_>) {
        let counters = &self.shared.counters;
        match event {
            // It was handled before there was a router.
            Event::Hello { .. } => {}
            Event::Send {
                destination,
                packet,
            } => self.send(destination, packet),
            Event::Preferred(true) => counters.home_moves_in.add(1),
            Event::Preferred(false) => counters.home_moves_out.add(1),
            Event::Ping(bytes) => {
                counters.got_ping.add(1);
                if self.pong.replace(bytes).is_some() {
                    counters.pings_ignored.add(1);
                }
            }
        }
    }

    /// What follows from all the frames of one read.
    pub(super) fn finish_read(&mut self) {
        self.flush();
        if self.packets > 0 {
            let counters = &self.shared.counters;
            counters.packets_received.add(self.packets);
            counters.bytes_received.add(self.bytes);
            (self.packets, self.bytes) = (0, 0);
        }
    }

    /// Keeps no more memory than the next read needs; how many bytes that is.
    pub(super) fn settle(&mut self) -> usize {
        if let Some(run) = head::put_run(std::mem::take(&mut self.run)) {
            self.shared.recycle(run);
        }
        if self.disco.held_bytes() > DISCO_KEPT {
            self.disco = Chunk::default();
        }
        self.disco.held_bytes() + self.known.capacity() * size_of::<u64>()
    }

    fn send(&mut self, destination: NodePublic, packet: &[u8]) {
        self.packets += 1;
        self.bytes += packet.len() as u64;
        let source = *self.me.slot.key();
        if is_disco(packet) {
            self.shared.counters.disco_received.add(1);
            frame::put_recv_packet(self.disco.buffer(), &source, packet);
            let mut disco = std::mem::take(&mut self.disco);
            self.deliver(destination, Lane::Disco, &mut disco, 1);
            self.disco = disco;
            return;
        }
        let len = HEADER_LEN + KEY_LEN + packet.len();
        if self.run_to != destination || self.run.len() + len > CHUNK_LEN {
            self.flush();
            self.run_to = destination;
        }
        if self.run.held_bytes() == 0 {
            self.run = head::take_run().unwrap_or_else(|| self.shared.spare());
        }
        frame::put_recv_packet(self.run.buffer(), &source, packet);
        self.run_frames += 1;
    }

    fn flush(&mut self) {
        if self.run_frames > 0 {
            let mut run = std::mem::take(&mut self.run);
            let frames = std::mem::take(&mut self.run_frames);
            self.deliver(self.run_to, Lane::Data, &mut run, frames);
            self.run = run;
        }
    }

    /// Puts a run into the destination's queue and leaves it empty.
    fn deliver(&mut self, destination: NodePublic, lane: Lane, run: &mut Chunk, frames: u64) {
        let shared = self.shared;
        let Some(receiver) = shared.registry.find(&destination) else {
            run.clear();
            shared.counters.dropped_unknown_dest.add(frames);
            if lane == Lane::Disco {
                self.tell_not_here(&destination);
            }
            return;
        };
        if self.known.insert(receiver.id) {
            if self.known.len() > KNOWN_MAX {
                self.known.clear();
            }
            self.me.delivered_to(&receiver);
        }
        receiver.push(lane, run, frames, &shared.counters);
    }

    fn tell_not_here(&mut self, peer: &NodePublic) {
        let counters = &self.shared.counters;
        self.not_here.refill(now());
        if !self.not_here.take(1000) {
            return counters.peer_gone_limited.add(1);
        }
        self.me.tell_gone(peer, PeerGoneReason::NotHere, counters);
    }
}
