//! The inbound rooms in order: classify, open, filter, coalesce, TUN.

#![forbid(unsafe_code)]

use super::{HANDSHAKES_PER_TURN_MAX, RELAYED_PER_TURN_MAX, Shard};
use crate::channel::hub::{Handed, HandshakeMessage};
use crate::channel::{Event, PeerId};
use crate::filter::source_allowed;
use crate::open::{Run, groups, runs};
use crate::packet::ecn::{CE, ECN_MASK};
use crate::packet::header::Headers;
use crate::peer::{Kind, Source};
use crate::ring::UdpRx;
use crate::session::{Change, MESSAGE_LEN_MAX};
use crate::stats::{DropReason, Meter, Room};
use crate::sys::socket::Local;

/// Type of a cookie reply (WireGuard paper §5.4.7).
const COOKIE_REPLY: u8 = 3;

impl Shard<'_> {
    /// Takes one receive batch. One that has crossed shards already is not passed on again, and
    /// only its data for our sessions counts: the first shard has seen to the rest.
    pub(super) fn inbound(&mut self, batch: UdpRx, crossed: bool) {
        let bytes = batch.buf.bytes();
        let stride = usize::from(batch.stride);
        let source = Source::Udp(batch.from);
        let mut foreign: Option<(u8, u64)> = None;
        if !crossed {
            let datagrams = if stride == 0 {
                1
            } else {
                bytes.len().div_ceil(stride)
            };
            let counters = &mut self.ctx.counters;
            counters.add(Meter::UdpReceives, 1);
            counters.add(Meter::UdpPacketsIn, datagrams as u64);
            counters.add(Meter::UdpBytesIn, bytes.len() as u64);
            counters.batch_inbound(datagrams);
        }
        runs(bytes, stride, self.id, |run| match run {
            Run::Data(index, datagrams) => {
                self.ctx.lap(Room::Classify);
                let step = if stride == 0 { datagrams.len() } else { stride };
                let local = batch.local;
                self.open_run(index, datagrams.chunks(step), source, local, batch.tos);
            }
            Run::Handshake(_) | Run::Control(_) | Run::Foreign(_) | Run::Invalid(_) if crossed => {}
            Run::Foreign(shard) => match &mut foreign {
                None => foreign = Some((shard, 1)),
                Some((first, count)) if *first == shard => *count += 1,
                // One batch crosses once.
                Some(_) => self.ctx.counters.drop_one(DropReason::HandOverFull),
            },
            Run::Handshake(message) => {
                let pushed = HandshakeMessage::new(None, batch.from, batch.local, message)
                    .is_some_and(|message| self.hub.handshake_strays.push(message).is_ok());
                if pushed {
                    self.hub.handshake_wake.signal();
                } else {
                    self.ctx.counters.drop_one(DropReason::StrayFull);
                }
            }
            Run::Control(datagram) => {
                if !self.hub.outbox.stray(batch.from, datagram) {
                    self.ctx.counters.drop_one(DropReason::StrayFull);
                }
            }
            Run::Invalid(reason) => self.ctx.counters.drop_one(reason),
        });
        if let Some((shard, packets)) = foreign {
            self.hand_over(shard, packets, Handed::Udp(batch));
        }
        self.ctx.lap(Room::Classify);
    }

    /// Takes batches that came by relay.
    pub(super) fn relayed(&mut self) {
        for _ in 0..RELAYED_PER_TURN_MAX {
            let Some(batch) = self.inbox.relay.pop() else {
                break;
            };
            let source = Source::Relay(batch.region);
            let counters = &mut self.ctx.counters;
            counters.add(Meter::RelayPacketsIn, batch.datagrams.lens.len() as u64);
            counters.add(Meter::RelayBytesIn, batch.datagrams.bytes.len() as u64);
            counters.batch_inbound(batch.datagrams.lens.len());
            self.relayed_batch(
                batch.peer,
                source,
                &batch.datagrams.bytes,
                &batch.datagrams.lens,
            );
            self.hub.outbox.recycle(batch.datagrams);
        }
    }

    /// Datagrams of any lengths. Equal ones next to each other, with a shorter one behind them, are
    /// what a GRO batch looks like, and are opened like one: a relayed super-packet is just that.
    fn relayed_batch(&mut self, peer: PeerId, source: Source, bytes: &[u8], lens: &[u16]) {
        let mut rest = bytes;
        for group in groups(lens) {
            let stride = usize::from(group[0]);
            let len = group.iter().map(|len| usize::from(*len)).sum();
            let Some((datagrams, after)) = rest.split_at_checked(len) else {
                // The relay client keeps lengths and bytes in step.
                self.ctx
                    .counters
                    .drop_many(DropReason::MessageLength, group.len() as u64);
                return;
            };
            rest = after;
            runs(datagrams, stride, self.id, |run| match run {
                Run::Data(index, datagrams) => {
                    self.open_run(index, datagrams.chunks(stride), source, None, 0);
                }
                Run::Handshake(message) => {
                    // An initiation does not name a session; whom the relay names, must have made
                    // it.
                    let peer = (message[0] == 1).then_some(peer);
                    self.handshake(peer, source, None, message);
                }
                Run::Control(_) => self.ctx.counters.drop_one(DropReason::UnknownMessage),
                // The control thread gave it to the owner of the peer; its sessions are here.
                Run::Foreign(_) => self.ctx.counters.drop_one(DropReason::UnknownIndex),
                Run::Invalid(reason) => self.ctx.counters.drop_one(reason),
            });
        }
    }

    /// Opens data of one session, filters it, and hands it to the coalescer.
    fn open_run<'d>(
        &mut self,
        index: u32,
        datagrams: impl Iterator<Item = &'d [u8]>,
        source: Source,
        local: Option<Local>,
        tos: u8,
    ) {
        let ctx = &mut self.ctx;
        let Some(peer) = self.peers.by_index(index) else {
            ctx.counters
                .drop_many(DropReason::UnknownIndex, datagrams.count() as u64);
            return;
        };
        let id = peer.id;
        let Some(session) = peer.session() else {
            ctx.counters
                .drop_many(DropReason::UnknownIndex, datagrams.count() as u64);
            return;
        };
        self.arena.clear();
        let counters = &mut ctx.counters;
        let report = session.open(index, datagrams, &mut self.arena, |reason| {
            counters.drop_one(reason);
        });
        if report.datagrams > 0 {
            let way = peer.arrived(ctx.now, source, local, &mut ctx.events);
            peer.shared
                .activity
                .received(self.hub.epoch, ctx.now, report.bytes, way);
        }
        ctx.lap(Room::Open);
        self.filter_and_merge(id, tos);
        if report.change == Change::Up {
            self.session_up(id);
        }
    }

    fn filter_and_merge(&mut self, sender: PeerId, tos: u8) {
        let ctx = &mut self.ctx;
        let mut routes = self.table.routes.cursor();
        self.passed.clear();
        for i in 0..self.arena.len() {
            let packet = self.arena.packet(i);
            let verdict = Headers::parse(packet).and_then(|headers| {
                source_allowed(&mut routes, sender, &headers)?;
                self.filter.admit(ctx.now, &headers, packet)?;
                Ok(headers)
            });
            match verdict {
                Ok(headers) => self.passed.push((i, headers)),
                Err(reason) => ctx.counters.drop_one(reason),
            }
        }
        ctx.lap(Room::Filter);
        for (i, headers) in &self.passed {
            match self.coalescer.push(headers, self.arena.packet(*i), tos) {
                Ok(()) if tos & ECN_MASK == CE => ctx.counters.add(Meter::CongestionMarks, 1),
                Ok(()) => {}
                Err(reason) => ctx.counters.drop_one(reason),
            }
        }
        ctx.lap(Room::Coalesce);
        if self.coalescer.is_full() {
            self.write_tun();
        }
    }

    /// Writes what the coalescer holds to our queue, so that replies come back to it.
    pub(super) fn write_tun(&mut self) {
        if self.coalescer.is_empty() {
            return;
        }
        let batch = self.coalescer.take();
        let counters = &mut self.ctx.counters;
        for i in 0..batch.len() {
            let bytes = batch.get(i);
            let packets = batch.segments(i) as u64;
            match self.queue.write(bytes) {
                Ok(()) => {
                    counters.add(Meter::TunWrites, 1);
                    counters.add(Meter::TunPacketsOut, packets);
                    counters.add(Meter::TunBytesOut, bytes.len() as u64);
                }
                // The interface is down, most often.
                Err(_) => counters.drop_many(DropReason::TunWriteFailed, packets),
            }
        }
        self.coalescer.recycle(batch);
        self.ctx.lap(Room::Tun);
    }

    /// Handles handshake messages that passed the handshake thread.
    pub(super) fn handshakes(&mut self) {
        for _ in 0..HANDSHAKES_PER_TURN_MAX {
            let Some(message) = self.inbox.handshakes.pop() else {
                break;
            };
            let source = Source::Udp(message.from);
            self.handshake(message.peer, source, message.local, message.bytes());
        }
    }

    /// Handles one handshake message for a peer of ours, named or (other than an initiation) found
    /// by its receiver index.
    fn handshake(
        &mut self,
        named: Option<PeerId>,
        source: Source,
        local: Option<Local>,
        message: &[u8],
    ) {
        let found = named.or_else(|| {
            let index = receiver_index(message)?;
            self.peers.by_index(index).map(|peer| peer.id)
        });
        let engine = self.engine.as_ref();
        let Some(peer) = found.and_then(|id| self.peers.wake(id, engine?)) else {
            self.ctx.counters.drop_one(DropReason::UnknownIndex);
            return;
        };
        let mut out = [0; MESSAGE_LEN_MAX];
        let id = peer.id;
        let Some(session) = peer.session() else {
            return;
        };
        let outcome = match session.handle_handshake(message, &mut out) {
            Ok(outcome) => outcome,
            Err(reason) => {
                self.ctx.counters.drop_one(reason);
                return;
            }
        };
        let ctx = &mut self.ctx;
        // A cookie reply is proof of nothing but that somebody saw our message.
        if message.first() != Some(&COOKIE_REPLY) {
            let way = peer.arrived(ctx.now, source, local, &mut ctx.events);
            peer.shared
                .activity
                .received(self.hub.epoch, ctx.now, message.len(), way);
        }
        if let Some(len) = outcome.message {
            let kind = if outcome.handshake {
                Kind::Handshake
            } else {
                Kind::Keepalive
            };
            self.tx.message(ctx, peer, kind, &out[..len]);
        }
        if outcome.change == Change::Up {
            self.session_up(id);
        }
        self.ctx.lap(Room::Shard);
    }

    /// Tells of fresh keys and sends what waited for them.
    fn session_up(&mut self, id: PeerId) {
        self.ctx.events.push(Event::SessionUp(id));
        if let Some(peer) = self.peers.get(id) {
            let activity = &peer.shared.activity;
            activity.handshaken(self.hub.epoch, self.ctx.now);
        }
        while let Some(mut packet) = self
            .peers
            .get(id)
            .filter(|peer| peer.ready())
            .and_then(|peer| peer.waiting.pop())
        {
            self.seal(id, &mut packet);
        }
        self.flush_run();
    }
}

/// The receiver index of a response or cookie reply (WireGuard paper §5.4.3, §5.4.7).
fn receiver_index(message: &[u8]) -> Option<u32> {
    let at = match message.first()? {
        2 => 8,
        3 => 4,
        _ => return None,
    };
    Some(u32::from_le_bytes(*message.get(at..)?.first_chunk::<4>()?))
}
