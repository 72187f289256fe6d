//! The outbound rooms in order: TUN, route, seal, UDP.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::Shard;
use crate::filter::{TSMP_LEN_MAX, ping};
use crate::hub::Handed;
use crate::packet::segment::{Plan, plan};
use crate::packet::vnet::{VNET_HDR_LEN, VnetHdr};
use crate::ring::TunRx;
use crate::route::Cursor;
use crate::seal;
use crate::stats::{DropReason, Meter, Room};
use crate::types::{PeerId, Ping};

impl Shard<'_> {
    /// Takes one packet or super-packet from the TUN. What is for a peer of another shard is sealed
    /// here where that lends what it takes, or handed over whole, once.
    pub(super) fn outbound(&mut self, mut rx: TunRx, routes: &mut Cursor<'_>, crossed: bool) {
        let counters = &mut self.ctx.counters;
        let bytes = rx.buf.bytes_mut();
        if !crossed {
            counters.add(Meter::TunReads, 1);
        }
        let planned = VnetHdr::split_mut(bytes).and_then(|(header, packet)| plan(&header, packet));
        let plan = match planned {
            Ok(plan) => plan,
            Err(reason) => {
                counters.drop_one(reason);
                return;
            }
        };
        let packets = plan.len() as u64;
        if !crossed {
            counters.add(Meter::TunPacketsIn, packets);
            counters.add(Meter::TunBytesIn, bytes.len() as u64);
        }
        if self.filter.keeps_from_leaving(plan.headers()) {
            self.ctx.counters.drop_many(DropReason::TsmpForged, packets);
            return;
        }
        self.ctx.lap(Room::Tun);
        let peer = routes.lookup(plan.headers().dst);
        self.ctx.lap(Room::Route);
        let Some(id) = peer else {
            self.ctx.counters.drop_many(DropReason::NoRoute, packets);
            return;
        };
        if self.peers.get(id).is_some() {
            self.seal_planned(id, &plan, bytes);
            return;
        }
        // Before it is admitted: the last run of a guest takes its grant along.
        self.make_room(id, &plan);
        match self.guests.admit(self.ctx.now, &self.table, id) {
            Some(true) if !crossed => self.seal_as_guest(id, &plan, bytes),
            // Nothing of it is in a run: the grant would be held.
            Some(false) if !crossed => self.hand_over_packet(id, packets, rx),
            // Nobody's, or the two shards' tables are of different ages for a moment.
            Some(_) | None => self.ctx.counters.drop_many(DropReason::NoRoute, packets),
        }
        self.guests.settle(id);
    }

    /// Hands a packet to the shard that owns its peer.
    fn hand_over_packet(&mut self, id: PeerId, packets: u64, rx: TunRx) {
        let Some(entry) = self.table.get(id) else {
            return;
        };
        let (owner, shared) = (entry.owner, Arc::clone(&entry.shared));
        let handed = Handed::Tun(rx, Arc::clone(&shared));
        shared.loan.hand(|| self.hand_over(owner, packets, handed));
    }

    /// Seals for a peer of another shard, which has been admitted.
    fn seal_as_guest(&mut self, id: PeerId, plan: &Plan, bytes: &mut [u8]) {
        let ctx = &mut self.ctx;
        let (Some(guest), Some(engine)) = (self.guests.get(id), &mut self.engine) else {
            // The key was taken away, and the owner is yet to hear of it.
            ctx.counters
                .drop_many(DropReason::NoSession, plan.len() as u64);
            return;
        };
        let Ok((_, packet)) = VnetHdr::split_mut(bytes) else {
            return;
        };
        // The owner has to know of the flow before its replies can come.
        let (hub, owner) = (self.hub, guest.owner);
        let forgot = || hub.forgotten_by(owner);
        if let Some(tell) = self
            .filter
            .remember_for(ctx.now, plan.headers(), packet, forgot)
            && !hub.tell(owner, |inbox| inbox.flows.push(tell.reply).is_ok())
        {
            self.filter.untold(&tell);
            if tell.new {
                let packets = plan.len() as u64;
                ctx.counters.drop_many(DropReason::HandOverFull, packets);
                return;
            }
        }
        seal::packet(
            ctx,
            engine,
            guest,
            plan,
            packet,
            &mut self.runs,
            &mut self.tx,
        );
        ctx.lap(Room::Seal);
    }

    /// Pings a peer of ours, whose answer is awaited from now on.
    pub(super) fn ping(&mut self, id: PeerId, asked: &Ping) {
        let mut out = [0; VNET_HDR_LEN + TSMP_LEN_MAX];
        let (_, room) = out.split_at_mut(VNET_HDR_LEN);
        let room = room.first_chunk_mut().expect("as long as any ping");
        let Some(len) = ping(asked, room) else {
            return;
        };
        if self.pinged.is_full() {
            self.pinged.remove(0);
        }
        self.pinged.push((id, asked.number));
        self.seal(id, &mut out[..VNET_HDR_LEN + len]);
        self.flush_runs_of(id);
    }

    /// Seals a packet that waited.
    pub(super) fn seal(&mut self, id: PeerId, bytes: &mut [u8]) {
        let planned = VnetHdr::split_mut(bytes).and_then(|(header, packet)| plan(&header, packet));
        match planned {
            Ok(plan) => self.seal_planned(id, &plan, bytes),
            Err(reason) => self.ctx.counters.drop_one(reason),
        }
    }

    fn seal_planned(&mut self, id: PeerId, plan: &Plan, bytes: &mut [u8]) {
        let now = self.ctx.now;
        if !self.peers.get(id).is_some_and(|peer| peer.ready(now)) {
            self.wait_for_session(id, bytes, plan.len() as u64);
            return;
        }
        self.make_room(id, plan);
        let (ctx, Some(engine), Some(peer)) = (&mut self.ctx, &mut self.engine, self.peers.get(id))
        else {
            return;
        };
        let Ok((_, packet)) = VnetHdr::split_mut(bytes) else {
            return;
        };
        // The flow is remembered where its replies arrive.
        let _reply = self.filter.remember(ctx.now, plan.headers(), packet);
        seal::packet(
            ctx,
            engine,
            peer,
            plan,
            packet,
            &mut self.runs,
            &mut self.tx,
        );
        ctx.lap(Room::Seal);
        self.peers.reckon(id);
    }

    /// Keeps what stands for so many packets until there are keys, and sees to it that there will be.
    fn wait_for_session(&mut self, id: PeerId, bytes: &[u8], packets: u64) {
        let ctx = &mut self.ctx;
        let dropped = self.peers.wait(ctx.now, id, bytes, packets);
        ctx.counters.drop_many(DropReason::NoSession, dropped);
        let Some(peer) = self.peers.get(id) else {
            return;
        };
        let went_silent = peer
            .path
            .sending(ctx.now, id, crate::peer::Kind::Data, &mut ctx.events);
        self.peers.touch(self.ctx.now, id);
        // The path just turned out to be doubtful: the next initiation goes both ways.
        self.initiate(id, went_silent);
        self.ctx.lap(Room::Shard);
    }

    /// Sees to it that there is a run for a packet to a peer.
    fn make_room(&mut self, id: PeerId, plan: &Plan) {
        if self.runs.crowded(id, plan) {
            self.flush_run(0);
        }
    }

    /// Sends what is in the runs.
    pub(super) fn flush_runs(&mut self) {
        while self.flush_run(0) {}
    }

    /// Sends what is in the runs of a peer.
    pub(super) fn flush_runs_of(&mut self, id: PeerId) {
        while let Some(at) = self.runs.first_of(id) {
            self.flush_run(at);
        }
    }

    /// Closes a run and sends what is in it. False if there are not so many.
    fn flush_run(&mut self, at: usize) -> bool {
        let Some(mut run) = self.runs.close(at) else {
            return false;
        };
        let (id, ctx) = (run.peer, &mut self.ctx);
        match (self.peers.get(id), self.guests.get(id), &mut self.engine) {
            (Some(peer), _, Some(engine)) => run.flush(ctx, engine, peer, &mut self.tx),
            (None, Some(guest), Some(engine)) => run.flush(ctx, engine, guest, &mut self.tx),
            _ => {
                let lost = run.clear() as u64;
                ctx.counters.drop_many(DropReason::NoRoute, lost);
            }
        }
        self.runs.give_back(run);
        // Others may seal for it when nothing of it is left here.
        if self.runs.first_of(id).is_none() {
            self.peers.touch(ctx.now, id);
            self.guests.closed(id);
        }
        true
    }
}
