//! The outbound rooms in order: TUN, route, seal, UDP.

#![forbid(unsafe_code)]

use super::Shard;
use crate::channel::PeerId;
use crate::channel::hub::Handed;
use crate::ring::TunRx;
use crate::route::Cursor;
use crate::seal;
use crate::stats::{DropReason, Meter, Room};
use crate::tun::segment::{Plan, plan};
use crate::tun::vnet::VnetHdr;

impl Shard<'_> {
    /// Takes one packet or super-packet from the TUN. A peer of another shard gets it handed over
    /// whole, once: only the owner may seal.
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
        self.ctx.lap(Room::Tun);
        let peer = routes.lookup(plan.headers().dst);
        self.ctx.lap(Room::Route);
        let Some(id) = peer else {
            self.ctx.counters.drop_many(DropReason::NoRoute, packets);
            return;
        };
        if self.peers.get(id).is_none() {
            match self.table.owner(id) {
                Some(owner) if owner != self.id && !crossed => {
                    self.hand_over(owner, packets, Handed::Tun(rx));
                }
                // The two shards' tables are of different ages for a moment.
                Some(_) | None => self.ctx.counters.drop_many(DropReason::NoRoute, packets),
            }
            return;
        }
        self.seal_planned(id, &plan, bytes);
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
        if self.run.peer().is_some_and(|open| open != id) {
            self.flush_run();
        }
        let Some(peer) = self.peers.get(id) else {
            return;
        };
        if !peer.ready(self.ctx.now) {
            self.wait_for_session(id, bytes);
            return;
        }
        let (ctx, Some(engine)) = (&mut self.ctx, &mut self.engine) else {
            return;
        };
        let Ok((_, packet)) = VnetHdr::split_mut(bytes) else {
            return;
        };
        // Under one owner per peer the flow is remembered where its replies arrive.
        let _reply = self.filter.remember(ctx.now, plan.headers(), packet);
        seal::packet(ctx, engine, peer, plan, packet, &mut self.run, &mut self.tx);
        ctx.lap(Room::Seal);
        self.peers.touch(id);
    }

    /// Keeps a packet until there are keys, and sees to it that there will be.
    fn wait_for_session(&mut self, id: PeerId, bytes: &[u8]) {
        let ctx = &mut self.ctx;
        let Some(peer) = self.peers.get(id) else {
            return;
        };
        let dropped = peer.waiting.push(ctx.now, bytes);
        ctx.counters.drop_many(DropReason::NoSession, dropped);
        let went_silent = peer
            .path
            .sending(ctx.now, id, crate::peer::Kind::Data, &mut ctx.events);
        self.peers.touch(id);
        // The path just turned out to be doubtful: the next initiation goes both ways.
        self.initiate(id, went_silent);
        self.ctx.lap(Room::Shard);
    }

    /// Sends what is in the run.
    pub(super) fn flush_run(&mut self) {
        let Some(id) = self.run.peer() else { return };
        match (self.peers.get(id), &mut self.engine) {
            (Some(peer), Some(engine)) => {
                self.run.flush(&mut self.ctx, engine, peer, &mut self.tx);
                self.peers.touch(id);
            }
            _ => {
                let lost = self.run.clear() as u64;
                self.ctx.counters.drop_many(DropReason::NoRoute, lost);
            }
        }
    }
}
