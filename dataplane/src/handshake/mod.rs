//! The thread that reads handshake messages, so that a flood of them fills one socket's buffer and
//! nothing else.
//!
//! What passes the [`Gate`] goes to the shard that owns the peer: an initiation with the one
//! Diffie-Hellman computation that told whose it is, other messages as they came. The thread's work
//! is bounded by its [`Budget`] of processor time.

#![forbid(unsafe_code)]

mod budget;

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use budget::{Budget, PAUSE};

use crate::channel::hub::{HandshakeMessage, Settings};
use crate::channel::table::PeerTable;
use crate::channel::{Hub, PeerId};
use crate::classify::{COOKIE_LEN, owner_shard};
use crate::noise::{Gate, Half, LocalKeys, Verdict};
use crate::stats::{Counters, DropReason, Meter, Published};
use crate::sys::socket::{Leave, Local, Many, receive_many, send, wait_readable};
use crate::sys::{now, thread_time};
use crate::udp::Sockets;

/// Messages read from one socket before the other gets its turn, and the budget is looked at.
const BURST_MAX: usize = 32;
/// Longest datagram read; a handshake message has 148 bytes, and longer ones only need to be seen
/// to be too long.
const DATAGRAM_LEN_MAX: usize = 256;
/// No limit for a wait.
const FOREVER: i32 = -1;

/// The body of the thread; ends when the hub stops.
///
/// # Errors
/// It cannot wait, or a socket is none any more.
pub(crate) fn run(
    hub: &Hub,
    mut sockets: Arc<Sockets>,
    settings: &Settings,
    published: &Published,
) -> io::Result<()> {
    let pause_ms = i32::try_from(PAUSE.as_millis()).unwrap_or(FOREVER);
    let mut fds = readable(hub, &sockets);
    let mut doorman = Doorman::new(now(), settings);
    let mut budget = Budget::new(now());
    let mut used = thread_time();
    let mut many = Many::<BURST_MAX, DATAGRAM_LEN_MAX>::new();
    while !hub.stopping() {
        if budget.spent() {
            wait_readable(&fds[..1], pause_ms)?;
        } else {
            wait_readable(&fds, FOREVER)?;
        }
        hub.handshake_wake.clear();
        doorman.hear(hub);
        if let Some(newer) = hub.handshake_sockets.pop() {
            sockets = newer;
            fds = readable(hub, &sockets);
        }
        let mut work = true;
        while work {
            let now = now();
            let before = std::mem::replace(&mut used, thread_time());
            budget.charge(now, used.saturating_sub(before));
            if budget.spent() {
                break;
            }
            work = doorman.strays(now, hub, &sockets);
            for socket in sockets.both() {
                work |= doorman.drain(now, hub, socket, &mut many)?;
            }
        }
        published.publish(&doorman.counters);
    }
    Ok(())
}

fn readable(hub: &Hub, sockets: &Sockets) -> Vec<RawFd> {
    let bell = hub.handshake_wake.as_fd().as_raw_fd();
    let sockets = sockets.both().map(AsRawFd::as_raw_fd);
    std::iter::once(bell).chain(sockets).collect()
}

fn reply_socket(sockets: &Sockets, to: SocketAddr) -> Option<&UdpSocket> {
    if to.is_ipv4() {
        Some(&sockets.v4)
    } else {
        sockets.v6.as_ref()
    }
}

fn local_keys(settings: &Settings) -> Option<Arc<LocalKeys>> {
    let key = settings.private_key.as_ref()?;
    Some(Arc::new(LocalKeys::new(key)))
}

/// The gate and what is behind it.
struct Doorman {
    gate: Gate,
    /// Peers by public key, with their owner shards: those of `table`.
    peers: HashMap<[u8; 32], (PeerId, u8)>,
    table: Arc<PeerTable>,
    counters: Counters,
}

/// Where a message goes.
#[derive(Debug)]
struct Passed {
    /// Known for an initiation.
    peer: Option<PeerId>,
    half: Option<Box<Half>>,
    shard: u8,
}

impl Doorman {
    fn new(now: Instant, settings: &Settings) -> Doorman {
        Doorman {
            gate: Gate::new(now, local_keys(settings)),
            peers: HashMap::new(),
            table: Arc::default(),
            counters: Counters::default(),
        }
    }

    /// Takes the newest key and peers.
    fn hear(&mut self, hub: &Hub) {
        if let Some(settings) = hub.handshake_settings.pop() {
            self.gate.set_local(local_keys(&settings));
        }
        if let Some(table) = hub.handshake_peers.pop() {
            self.set_peers(table);
        }
    }

    fn set_peers(&mut self, table: Arc<PeerTable>) {
        let peers = &mut self.peers;
        let visited = table.differences(&self.table, |id, before, after| {
            if let Some(before) = before {
                let key = before.config.public_key;
                // Another peer may have its key by now.
                if peers.get(&key).is_some_and(|(of, _)| *of == id) {
                    peers.remove(&key);
                }
            }
            if let Some(after) = after {
                peers.insert(after.config.public_key, (id, after.owner));
            }
        });
        self.counters.add(Meter::PeersVisited, visited as u64);
        self.table = table;
    }

    /// Takes what reached a shard instead; true if there may be more.
    fn strays(&mut self, now: Instant, hub: &Hub, sockets: &Sockets) -> bool {
        for _ in 0..BURST_MAX {
            let Some(stray) = hub.handshake_strays.pop() else {
                return false;
            };
            let socket = reply_socket(sockets, stray.from);
            self.handle(now, hub, stray.from, stray.local, stray.bytes(), socket);
        }
        true
    }

    /// Takes one burst from a socket; true if there may be more.
    fn drain(
        &mut self,
        now: Instant,
        hub: &Hub,
        socket: &UdpSocket,
        many: &mut Many<BURST_MAX, DATAGRAM_LEN_MAX>,
    ) -> io::Result<bool> {
        let count = receive_many(socket.as_fd(), many)?;
        if count > 0 {
            self.counters.add(Meter::UdpReceives, 1);
        }
        for (from, local, message) in many.iter() {
            self.counters.add(Meter::UdpPacketsIn, 1);
            self.counters.add(Meter::UdpBytesIn, message.len() as u64);
            self.handle(now, hub, from, local, message, Some(socket));
        }
        Ok(count == BURST_MAX)
    }

    fn handle(
        &mut self,
        now: Instant,
        hub: &Hub,
        from: SocketAddr,
        local: Option<Local>,
        message: &[u8],
        socket: Option<&UdpSocket>,
    ) {
        let mut reply = [0; COOKIE_LEN];
        match self.check(now, from, message, &mut reply) {
            Ok(passed) => {
                if let Err(reason) = hand_on(hub, from, local, message, passed) {
                    self.counters.drop_one(reason);
                }
            }
            Err(DropReason::HandshakeCookie) => {
                self.counters.drop_one(DropReason::HandshakeCookie);
                let leave = Leave {
                    local,
                    ..Leave::to(from)
                };
                let sent = socket.map(|socket| send(socket.as_fd(), &leave, &reply, None));
                if sent == Some(Ok(())) {
                    self.counters.add(Meter::UdpSends, 1);
                    self.counters.add(Meter::UdpPacketsOut, 1);
                    self.counters.add(Meter::UdpBytesOut, COOKIE_LEN as u64);
                }
            }
            Err(reason) => self.counters.drop_one(reason),
        }
    }

    /// Judges a message. With [`DropReason::HandshakeCookie`] the answer to send is in `reply`.
    fn check(
        &mut self,
        now: Instant,
        from: SocketAddr,
        message: &[u8],
        reply: &mut [u8; COOKIE_LEN],
    ) -> Result<Passed, DropReason> {
        match self
            .gate
            .handle(now, from, message, &mut rand::rng(), reply)
        {
            Verdict::Initiation(half) => {
                let known = self.peers.get(half.peer());
                let &(peer, shard) = known.ok_or(DropReason::HandshakeUnknownPeer)?;
                Ok(Passed {
                    peer: Some(peer),
                    half: Some(Box::new(half)),
                    shard,
                })
            }
            Verdict::Response(index) | Verdict::CookieReply(index) => Ok(Passed {
                peer: None,
                half: None,
                shard: owner_shard(index),
            }),
            Verdict::Challenge => Err(DropReason::HandshakeCookie),
            Verdict::Drop(reason) => Err(reason),
        }
    }
}

/// Gives a message to its shard.
///
/// # Errors
/// No shard has sessions under the index it names, or the shard's queue is full.
fn hand_on(
    hub: &Hub,
    from: SocketAddr,
    local: Option<Local>,
    message: &[u8],
    passed: Passed,
) -> Result<(), DropReason> {
    let inbox = hub.inboxes.get(usize::from(passed.shard));
    let inbox = inbox.ok_or(DropReason::UnknownIndex)?;
    let message = HandshakeMessage::new(passed.peer, from, local, message);
    let mut message = message.ok_or(DropReason::MessageLength)?;
    message.half = passed.half;
    let pushed = inbox.handshakes.push(message);
    inbox.wake.ring();
    pushed.map_err(|_| DropReason::HandshakeQueueFull)
}

#[cfg(test)]
mod tests;
