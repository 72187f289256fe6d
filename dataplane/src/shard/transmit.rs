//! Where sealed batches leave: by UDP, by relay, or both, as the peer's path says.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::Context;
use crate::hub::Hub;
use crate::peer::{Guest, Kind, Peer, Trouble, Way};
use crate::seal::{Batch, Outlet};
use crate::session::Outcome;
use crate::stats::{DropReason, Meter, Room};
use crate::sys::socket::Leave;
use crate::types::{PeerId, RegionId, RelayBatch};
use crate::udp::{Sender, Sockets};

/// Batches to one relay are joined up to this many bytes.
pub(crate) const RELAY_JOIN_MAX: usize = 64 << 10;

pub(crate) struct Transmit {
    hub: Arc<Hub>,
    sender: Sender,
    /// What goes to a relay next, still open for more of the same peer.
    relay: Option<RelayBatch>,
}

impl Transmit {
    pub(crate) fn new(hub: Arc<Hub>, sender: Sender) -> Transmit {
        Transmit {
            hub,
            sender,
            relay: None,
        }
    }

    /// Sends from other sockets from now on.
    pub(crate) fn rebind(&mut self, sockets: Arc<Sockets>) {
        self.sender.rebind(sockets);
    }

    /// Hands what is open to the relay lane.
    pub(crate) fn flush_relay(&mut self) {
        if let Some(out) = self.relay.take() {
            self.hub.outbox.relay(out);
        }
    }

    /// Sends a single message.
    pub(crate) fn message(
        &mut self,
        ctx: &mut Context,
        peer: &mut Peer,
        kind: Kind,
        message: &[u8],
    ) {
        let batch = Batch {
            kind,
            bytes: message,
            stride: message.len(),
            tos: 0,
        };
        self.send(ctx, peer, batch);
    }

    /// Sends what a session has to say of itself, if anything.
    pub(crate) fn outcome(
        &mut self,
        ctx: &mut Context,
        peer: &mut Peer,
        outcome: &Outcome,
        out: &[u8],
    ) {
        let Some(len) = outcome.message else { return };
        let kind = if outcome.handshake {
            Kind::Handshake
        } else {
            Kind::Keepalive
        };
        self.message(ctx, peer, kind, &out[..len]);
    }

    /// Sends by UDP and returns the bytes that left, and what was wrong.
    fn by_udp(&mut self, ctx: &mut Context, way: Way, batch: &Batch<'_>) -> (usize, Trouble) {
        let Some(to) = way.udp else {
            return Default::default();
        };
        let leave = Leave {
            to,
            local: way.local,
            tos: batch.tos,
        };
        let sent = self
            .sender
            .send(leave, batch.bytes, batch.stride, way.singly);
        let bytes = batch.bytes.len().min(sent.datagrams * batch.stride);
        let counters = &mut ctx.counters;
        counters.add(Meter::UdpSends, sent.calls as u64);
        counters.add(Meter::UdpPacketsOut, sent.datagrams as u64);
        counters.add(Meter::UdpBytesOut, bytes as u64);
        let mut trouble = Trouble {
            source: sent.source_refused,
            gso: sent.gso_refused && self.sender.gso(),
            error: None,
        };
        if let Some(errno) = sent.error {
            // A full queue is congestion, not a state of the path.
            if matches!(errno, libc::EAGAIN | libc::ENOBUFS) {
                counters.drop_many(DropReason::SendQueueFull, sent.failed as u64);
            } else {
                counters.drop_many(DropReason::SendFailed, sent.failed as u64);
                trouble.error = Some((to, errno));
            }
        }
        (bytes, trouble)
    }

    fn by_relay(&mut self, ctx: &mut Context, peer: PeerId, region: RegionId, batch: &Batch<'_>) {
        let joins = self.relay.as_ref().is_some_and(|open| {
            open.peer == peer
                && open.region == region
                && open.datagrams.bytes.len() + batch.bytes.len() <= RELAY_JOIN_MAX
        });
        if !joins {
            self.flush_relay();
        }
        let hub = &self.hub;
        let open = self.relay.get_or_insert_with(|| RelayBatch {
            peer,
            region,
            datagrams: hub.outbox.buffer(),
        });
        open.datagrams.bytes.extend_from_slice(batch.bytes);
        let mut rest = batch.bytes.len();
        while rest > 0 {
            let len = rest.min(batch.stride);
            let short = u16::try_from(len).expect("a datagram is below 64 KiB");
            open.datagrams.lens.push(short);
            rest -= len;
        }
        let counters = &mut ctx.counters;
        counters.add(Meter::RelayPacketsOut, batch.datagrams() as u64);
        counters.add(Meter::RelayBytesOut, batch.bytes.len() as u64);
    }
}

impl Outlet<Peer> for Transmit {
    fn send(&mut self, ctx: &mut Context, peer: &mut Peer, batch: Batch<'_>) {
        ctx.lap(Room::Seal);
        peer.path
            .sending(ctx.now, peer.id, batch.kind, &mut ctx.events);
        if peer.shared.take_unstick() {
            peer.unstick(ctx.now);
        }
        let way = peer.path.way(ctx.now);
        let (udp_bytes, trouble) = self.by_udp(ctx, way, &batch);
        if trouble.any() {
            peer.troubled(ctx.now, trouble, &mut ctx.events);
        }
        if let Some(region) = way.relay {
            self.by_relay(ctx, peer.id, region, &batch);
        }
        if way.udp.is_none() && way.relay.is_none() {
            ctx.counters
                .drop_many(DropReason::NoPath, batch.datagrams() as u64);
        } else {
            let relay_bytes = way.relay.map_or(0, |_| batch.bytes.len());
            peer.shared
                .activity
                .sent(self.hub.epoch, ctx.now, udp_bytes, relay_bytes);
        }
        ctx.lap(Room::Udp);
    }
}

impl Outlet<Guest> for Transmit {
    fn send(&mut self, ctx: &mut Context, guest: &mut Guest, batch: Batch<'_>) {
        ctx.lap(Room::Seal);
        let (bytes, trouble) = self.by_udp(ctx, guest.way(), &batch);
        guest.sent(ctx.now, trouble);
        ctx.counters
            .add(Meter::SealedForOthers, batch.datagrams() as u64);
        guest
            .shared
            .activity
            .sent(self.hub.epoch, ctx.now, bytes, 0);
        ctx.lap(Room::Udp);
    }
}
