//! The inbound rooms in order: classify, open, filter, coalesce, TUN.

#![forbid(unsafe_code)]

use std::io;
use std::net::SocketAddr;

use arrayvec::ArrayVec;

use super::{
    HANDSHAKES_PER_TURN_MAX, PINGS_BURST, PINGS_PER_SECOND, RELAYED_BURST, RELAYED_PER_SECOND,
    RELAYED_PER_TURN_MAX, Shard, up_to,
};
use crate::classify::receiver_index;
use crate::config;
use crate::filter::{TSMP_LEN_MAX, answered, pong, source_allowed};
use crate::hub::{HANDSHAKE_LEN_MAX, Handed, HandshakeMessage, ShardSet};
use crate::noise::{Bucket, PeekedInitiation};
use crate::open::{Run, groups, runs};
use crate::packet::ecn::{CE, ECN_MASK};
use crate::packet::header::Headers;
use crate::packet::vnet::VNET_HDR_LEN;
use crate::peer::Source;
use crate::ring::UdpRx;
use crate::session::{Change, MESSAGE_LEN_MAX};
use crate::stats::{DropReason, Meter, Room};
use crate::sys::socket::{Ancillary, Local};
use crate::tun;
use crate::types::{Event, PeerId};

/// Types of handshake messages: 1 to 3 (WireGuard paper §5.4).
const HANDSHAKE_TYPES: usize = 3;
const INITIATION: u8 = 1;
const COOKIE_REPLY: u8 = 3;

impl Shard<'_> {
    /// Takes one receive batch. Of one that has crossed shards, only the data for our sessions
    /// counts: the first shard has seen to the rest. `crossed` then says which shards are to see it
    /// after us.
    pub(super) fn inbound(&mut self, mut batch: UdpRx, crossed: Option<ShardSet>) {
        let from = batch.from;
        let Ancillary { tos, local, .. } = batch.ancillary;
        let bytes = batch.buf.bytes_mut();
        let stride = batch.ancillary.stride_of(bytes.len());
        let mut others = crossed.unwrap_or_default();
        let mut foreign = 0;
        let mut stray = None;
        let crossed = crossed.is_some();
        if !crossed {
            let datagrams = bytes.len().div_ceil(stride).max(1);
            let counters = &mut self.ctx.counters;
            counters.add(Meter::UdpReceives, 1);
            counters.add(Meter::UdpPacketsIn, datagrams as u64);
            counters.add(Meter::UdpBytesIn, bytes.len() as u64);
            counters.batch_inbound(datagrams);
        }
        runs(bytes, stride, self.id, |run| match run {
            Run::Data(index, datagrams) => {
                self.ctx.lap(Room::Classify);
                let len = datagrams.len();
                if !self.open_run(index, datagrams, stride, Source::Udp(from), local, tos) {
                    self.stranger(from, len);
                }
            }
            Run::Foreign(shard, _) if crossed => foreign += u64::from(others.contains(shard)),
            Run::Handshake(_) | Run::Control(_) | Run::Invalid(_) if crossed => {}
            Run::Foreign(shard, _) if usize::from(shard) < self.hub.inboxes.len() => {
                others.insert(shard);
                foreign += 1;
            }
            Run::Foreign(_, len) => {
                self.ctx.counters.drop_one(DropReason::UnknownIndex);
                self.stranger(from, len);
            }
            Run::Handshake(message) => {
                let index = receiver_index(message);
                if index.is_some_and(|index| !self.hub.awaits(index)) {
                    self.ctx.counters.drop_one(DropReason::UnknownIndex);
                } else {
                    // Of a batch the newest: a peer sends one at a time.
                    let newest = HandshakeMessage::new(None, from, local, message);
                    if std::mem::replace(&mut stray, newest).is_some() {
                        self.ctx.counters.drop_one(DropReason::HandshakeLimited);
                    }
                }
            }
            Run::Control(datagram) => {
                if !self.hub.outbox.stray(from, datagram) {
                    self.ctx.counters.drop_one(DropReason::StrayFull);
                }
            }
            Run::Invalid(reason) => self.ctx.counters.drop_one(reason),
        });
        if let Some(message) = stray {
            self.stray(message);
        }
        // Each of the others opens its own and passes the batch on.
        if let Some(shard) = others.take() {
            // A full lane has counted them.
            let _room = self.hand_over(shard, foreign, Handed::Udp(batch, others));
        }
        self.ctx.lap(Room::Classify);
    }

    /// Passes on the handshake message that came glued to data. Where too many wait, the oldest goes.
    fn stray(&mut self, message: HandshakeMessage) {
        if self.hub.handshake_strays.force_push(message).is_some() {
            self.ctx.counters.drop_one(DropReason::StrayFull);
        }
        self.hub.handshake_wake.signal();
    }

    /// Takes batches that came by relay; no more of them once so many have brought handshake messages
    /// as may be handled in a turn. The rest waits in the lane.
    pub(super) fn relayed(&mut self) {
        let mut handshakes = 0;
        for _ in 0..RELAYED_PER_TURN_MAX {
            if handshakes >= HANDSHAKES_PER_TURN_MAX {
                break;
            }
            let Some(mut batch) = self.inbox.relay.pop() else {
                break;
            };
            let source = Source::Relay(batch.region);
            let counters = &mut self.ctx.counters;
            counters.add(Meter::RelayPacketsIn, batch.datagrams.lens.len() as u64);
            counters.add(Meter::RelayBytesIn, batch.datagrams.bytes.len() as u64);
            counters.batch_inbound(batch.datagrams.lens.len());
            handshakes += self.relayed_batch(
                batch.peer,
                source,
                &mut batch.datagrams.bytes,
                &batch.datagrams.lens,
            );
            self.hub.outbox.recycle(batch.datagrams);
        }
    }

    /// Datagrams of any lengths. Equal ones next to each other, with a shorter one behind them, are
    /// what a GRO batch looks like, and are opened like one: a relayed super-packet is just that.
    /// Returns how many handshake messages were handled.
    ///
    /// No gate stands before these, so a relay could have us compute for every message it makes up. Of
    /// each type the newest in a batch counts: the older ones are of no use to their sender any more,
    /// and nothing else in the batch can build on an exchange that we have yet to answer. What answers
    /// nothing of ours goes no further, and of the rest a peer has its share ([`Shard::relayed_may`]).
    fn relayed_batch(
        &mut self,
        peer: PeerId,
        source: Source,
        bytes: &mut [u8],
        lens: &[u16],
    ) -> usize {
        let mut newest: [ArrayVec<u8, HANDSHAKE_LEN_MAX>; HANDSHAKE_TYPES] = Default::default();
        let mut rest = bytes;
        for group in groups(lens) {
            let stride = usize::from(group[0]);
            let len = group.iter().map(|len| usize::from(*len)).sum();
            let Some((datagrams, after)) = rest.split_at_mut_checked(len) else {
                // The relay client keeps lengths and bytes in step.
                self.ctx
                    .counters
                    .drop_many(DropReason::MessageLength, group.len() as u64);
                break;
            };
            rest = after;
            runs(datagrams, stride, self.id, |run| match run {
                Run::Data(index, datagrams) => {
                    let len = datagrams.len();
                    if !self.open_run(index, datagrams, stride, source, None, 0) {
                        self.unopened(peer, len);
                    }
                }
                Run::Handshake(message) => {
                    // Its type and length have been looked at.
                    let place = &mut newest[usize::from(message[0] - INITIATION)];
                    let older = std::mem::replace(place, message.iter().copied().collect());
                    if !older.is_empty() {
                        self.ctx.counters.drop_one(DropReason::HandshakeLimited);
                    }
                }
                Run::Control(_) => self.ctx.counters.drop_one(DropReason::UnknownMessage),
                // The control thread gave it to the owner of the peer; its sessions are here.
                Run::Foreign(_, len) => {
                    self.ctx.counters.drop_one(DropReason::UnknownIndex);
                    self.unopened(peer, len);
                }
                Run::Invalid(reason) => self.ctx.counters.drop_one(reason),
            });
        }
        let mut handled = 0;
        for message in newest.iter().filter(|message| !message.is_empty()) {
            // An initiation does not name a session; whom the relay names, must have made it.
            let named = (message[0] == INITIATION).then_some(peer);
            match self.relayed_may(peer, message) {
                Ok(()) => {
                    self.handshake(named, source, None, message, None);
                    handled += 1;
                }
                Err(reason) => self.ctx.counters.drop_one(reason),
            }
        }
        handled
    }

    /// Whether a handshake message that a relay brought in a peer's name is worth computing for.
    ///
    /// # Errors
    /// Why it is not.
    fn relayed_may(&mut self, peer: PeerId, message: &[u8]) -> Result<(), DropReason> {
        let index = receiver_index(message);
        if index.is_some_and(|index| !self.inbox.awaited.contains(index)) {
            return Err(DropReason::UnknownIndex);
        }
        let now = self.ctx.now;
        let peer = self.peers.get(peer).ok_or(DropReason::UnknownIndex)?;
        let share = peer
            .relayed
            .get_or_insert_with(|| Bucket::new(now, RELAYED_PER_SECOND, RELAYED_BURST));
        // An answer to us has been paid for by what we sent.
        if share.take(now) && (index.is_some() || self.relayed.take(now)) {
            Ok(())
        } else {
            Err(DropReason::HandshakeLimited)
        }
    }

    /// Opens data of one session (datagrams of `stride` bytes, of which the last may be shorter),
    /// filters it, and hands it to the coalescer. False if there is no such session.
    fn open_run(
        &mut self,
        index: u32,
        datagrams: &mut [u8],
        stride: usize,
        source: Source,
        local: Option<Local>,
        tos: u8,
    ) -> bool {
        let ctx = &mut self.ctx;
        let holder = self.engine.as_ref().and_then(|e| e.holder(index));
        let peer = holder.and_then(|id| self.peers.get(id));
        let (Some(engine), Some(peer)) = (&mut self.engine, peer) else {
            let count = datagrams.len().div_ceil(stride.max(1));
            ctx.counters
                .drop_many(DropReason::UnknownIndex, count as u64);
            return false;
        };
        let id = peer.id;
        let Some(session) = peer.session() else {
            // An index is held by a session.
            return false;
        };
        let counters = &mut ctx.counters;
        let len = datagrams.len();
        let report = session.open(
            engine,
            ctx.now,
            index,
            datagrams,
            stride,
            &mut self.opened,
            |reason| counters.drop_one(reason),
        );
        if report.datagrams > 0 {
            let way = peer.arrived(ctx.now, source, local, &mut ctx.events);
            peer.shared
                .activity
                .received(self.hub.epoch, ctx.now, report.bytes, way);
        }
        self.peers.touch(ctx.now, id);
        ctx.lap(Room::Open);
        self.filter_and_merge(id, datagrams, tos);
        if report.change == Change::Up {
            self.session_up(id);
        }
        if report.expired {
            self.unopened(id, len);
        }
        true
    }

    /// Data came by UDP that belongs to no session: the control side may know who is there.
    pub(super) fn stranger(&mut self, from: SocketAddr, bytes: usize) {
        if self.hub.strangers.allow(self.ctx.now, from.ip()) {
            self.ctx.events.push(Event::Unopened(from, bytes));
        }
    }

    /// `run` is what was opened.
    fn filter_and_merge(&mut self, sender: PeerId, run: &[u8], tos: u8) {
        let ctx = &mut self.ctx;
        let mut routes = self.table.routes.cursor();
        let peer = self.peers.get(sender);
        let outsider = peer.is_some_and(|peer| peer.config.outsider);
        self.passed.clear();
        let mut consumed: ArrayVec<usize, { PINGS_BURST as usize }> = ArrayVec::new();
        for i in 0..self.opened.len() {
            let packet = self.opened.packet(i, run);
            let verdict = Headers::parse(packet).and_then(|headers| {
                source_allowed(&mut routes, sender, &headers)?;
                if outsider && self.filter.opens_peerapi(&headers, packet) {
                    return Err(DropReason::FilterDenied);
                }
                self.filter.admit(ctx.now, &headers, packet)?;
                Ok(headers)
            });
            match verdict {
                Ok(headers) => self.passed.push((i, headers)),
                Err(reason) => {
                    let answered = reason == DropReason::FilterConsumed && !outsider;
                    if answered && !consumed.is_full() {
                        consumed.push(i);
                    }
                    ctx.counters.drop_one(reason);
                }
            }
        }
        ctx.lap(Room::Filter);
        for (i, headers) in &self.passed {
            match self
                .coalescer
                .push(headers, self.opened.packet(*i, run), tos)
            {
                Ok(()) if tos & ECN_MASK == CE => ctx.counters.add(Meter::CongestionMarks, 1),
                Ok(()) => {}
                Err(reason) => ctx.counters.drop_one(reason),
            }
        }
        ctx.lap(Room::Coalesce);
        if self.coalescer.is_full() {
            self.write_tun();
        }
        if !consumed.is_empty() {
            self.take_tsmp(sender, run, &consumed);
        }
    }

    /// Answers those of the packets that are pings by TSMP, within the sender's share, and tells of answers to
    /// ours.
    fn take_tsmp(&mut self, sender: PeerId, run: &[u8], consumed: &[usize]) {
        let now = self.ctx.now;
        for i in consumed {
            let packet = self.opened.packet(*i, run);
            let Ok(headers) = Headers::parse(packet) else {
                continue;
            };
            if let Some((number, peerapi)) = answered(&headers, packet) {
                let ours = |ping: &(PeerId, u64)| *ping == (sender, number);
                if let Some(place) = self.pinged.iter().position(ours) {
                    self.pinged.remove(place);
                    let pong = Event::Pong(sender, number, peerapi);
                    self.ctx.events.push(pong);
                }
                continue;
            }
            let mut out = [0; VNET_HDR_LEN + TSMP_LEN_MAX];
            let (_, room) = out.split_at_mut(VNET_HDR_LEN);
            let room = room.first_chunk_mut().expect("as long as any answer");
            let peerapi = self.filter.peerapi_port(headers.dst);
            let Some(len) = pong(&headers, packet, peerapi, room) else {
                continue;
            };
            let share = self.peers.get(sender).map(|peer| {
                peer.pings
                    .get_or_insert_with(|| Bucket::new(now, PINGS_PER_SECOND, PINGS_BURST))
            });
            if share.is_some_and(|share| share.take(now)) {
                self.ctx.counters.add(Meter::PingsAnswered, 1);
                self.seal(sender, &mut out[..VNET_HDR_LEN + len]);
            }
        }
        self.flush_runs_of(sender);
    }

    /// Writes what the coalescer holds. The kernel reads a flow on the queue that its reverse was last
    /// written to, so a write chooses the shard that seals the replies.
    pub(super) fn write_tun(&mut self) {
        if self.coalescer.is_empty() {
            return;
        }
        let mut batch = self.coalescer.take();
        for i in 0..batch.len() {
            let (packets, kind) = (batch.segments(i), batch.kind(i));
            let queue = &self.queues[self.queue_for(batch.flow_hash(i))];
            let written = tun::write(batch.get_mut(i), packets, |bytes| queue.write(bytes));
            let counters = &mut self.ctx.counters;
            counters.add(Meter::TunWrites, written.writes as u64);
            counters.add(Meter::TunPacketsOut, written.packets as u64);
            counters.add(Meter::TunBytesOut, written.bytes as u64);
            // The interface is down, most often.
            counters.drop_many(DropReason::TunWriteFailed, written.failed as u64);
            if let (Some(errno), Some(kind)) = (written.refused, kind) {
                counters.add(Meter::TunRefused, 1);
                if self.merging.refuse(kind) {
                    tracing::warn!(
                        error = %io::Error::from_raw_os_error(errno),
                        "the TUN device refuses super-packets of {kind}: writing them singly from now on"
                    );
                }
            }
        }
        self.coalescer.recycle(batch);
        self.coalescer.set_kinds(self.merging.kinds());
        self.ctx.lap(Room::Tun);
    }

    /// The queue for a write: by the flow, so that sealing spreads over the shards; our own where only
    /// the owner may seal.
    fn queue_for(&self, flow_hash: u64) -> usize {
        let own = usize::from(self.id);
        if self.queues.len() == 1 || self.kind == config::Engine::Boringtun {
            return own;
        }
        usize::try_from(flow_hash >> 32).map_or(own, |hash| hash % self.queues.len())
    }

    /// Handles handshake messages that passed the handshake thread.
    pub(super) fn handshakes(&mut self) {
        for message in up_to(HANDSHAKES_PER_TURN_MAX, &self.inbox.handshakes) {
            // It may have passed the handshake thread under a key that came while we were here.
            if let Some(settings) = self.inbox.settings.pop() {
                self.apply(settings);
            }
            let source = Source::Udp(message.from);
            let peeked = message.peeked.as_deref();
            self.handshake(message.peer, source, message.local, &message.bytes, peeked);
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
        peeked: Option<&PeekedInitiation>,
    ) {
        let at = self.ctx.moment();
        let found = self.engine.as_mut().and_then(|engine| {
            let id = match named {
                Some(id) => id,
                None => engine.holder(receiver_index(message)?)?,
            };
            let peer = self.peers.wake(at.now, id, engine)?;
            Some((engine, peer))
        });
        let Some((engine, peer)) = found else {
            self.ctx.counters.drop_one(DropReason::UnknownIndex);
            return;
        };
        let id = peer.id;
        let Some(session) = peer.session() else {
            return;
        };
        let mut out = [0; MESSAGE_LEN_MAX];
        let outcome = match session.handle_handshake(engine, at, message, peeked, &mut out) {
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
        self.tx.outcome(ctx, peer, &outcome, &out);
        self.peers.touch(ctx.now, id);
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
        while let Some(mut packet) = self.peers.next_waiting(self.ctx.now, id) {
            self.seal(id, &mut packet);
        }
        self.flush_runs_of(id);
        self.peers.touch(self.ctx.now, id);
    }
}
