//! The thread that reads handshake messages, so that a flood of them fills one socket's buffer and
//! nothing else.
//!
//! Cheap checks come first: form, MAC1 (a keyed hash that proves the sender knows our public key),
//! and above a rate of messages per second a cookie that proves its address (WireGuard paper §5.3,
//! §5.4.7). Only then one Diffie-Hellman computation says who made an initiation. The owner shard
//! gets what passes, and does the rest.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use crate::channel::hub::{HandshakeMessage, PeerTable, Settings};
use crate::channel::{Hub, PeerId};
use crate::classify::{COOKIE_LEN, Class, classify};
use crate::stats::{Counters, DropReason, Meter, Published};
use crate::sys::socket::{Leave, Local, receive, send, wait_readable};
use crate::udp::Sockets;

/// Messages a second above which senders must prove their address by a cookie.
const MESSAGES_PER_SECOND_MAX: u64 = 200;
/// Messages read from one socket before the other gets its turn.
const BURST_MAX: usize = 32;
/// The rate limiter counts per second, and is told of time by us.
const SECOND_MS: i32 = 1000;
/// Longest datagram read; a handshake message has 148 bytes, and longer ones only need to be seen
/// to be too long.
const DATAGRAM_LEN_MAX: usize = 256;

/// The body of the thread; ends when the hub stops.
pub(crate) fn run(
    hub: &Hub,
    mut sockets: Arc<Sockets>,
    settings: &Settings,
    published: &Published,
) {
    let mut gate = Gate::new(settings.private_key.as_ref());
    let mut fds = readable(hub, &sockets);
    while !hub.stopping() {
        wait_readable(&fds, SECOND_MS);
        hub.handshake_wake.clear();
        gate.tick();
        if let Some(settings) = hub.handshake_settings.pop() {
            gate.set_key(settings.private_key.as_ref());
        }
        if let Some(newer) = hub.handshake_sockets.pop() {
            sockets = newer;
            fds = readable(hub, &sockets);
        }
        if let Some(table) = hub.handshake_peers.pop() {
            gate.set_peers(&table);
        }
        while let Some(stray) = hub.handshake_strays.pop() {
            let socket = reply_socket(&sockets, stray.from);
            gate.handle(hub, stray.from, stray.local, stray.bytes(), socket);
        }
        for socket in sockets.both() {
            gate.drain(hub, socket);
        }
        published.publish(&gate.counters);
    }
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

/// What a message must pass.
struct Gate {
    /// None while we have no key: then nothing passes.
    keys: Option<Keys>,
    /// Peers by public key, with their owner shards.
    peers: HashMap<[u8; 32], (PeerId, u8)>,
    counters: Counters,
}

/// What follows from our private key.
struct Keys {
    private: StaticSecret,
    public: PublicKey,
    limiter: RateLimiter,
}

impl Keys {
    fn new(private_key: &Zeroizing<[u8; 32]>) -> Keys {
        let private = StaticSecret::from(**private_key);
        let public = PublicKey::from(&private);
        Keys {
            limiter: RateLimiter::new(&public, MESSAGES_PER_SECOND_MAX),
            private,
            public,
        }
    }
}

/// Where a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Passed {
    /// Known for an initiation.
    peer: Option<PeerId>,
    shard: u8,
}

impl Gate {
    fn new(private_key: Option<&Zeroizing<[u8; 32]>>) -> Gate {
        Gate {
            keys: private_key.map(Keys::new),
            peers: HashMap::new(),
            counters: Counters::default(),
        }
    }

    fn set_key(&mut self, private_key: Option<&Zeroizing<[u8; 32]>>) {
        self.keys = private_key.map(Keys::new);
    }

    fn tick(&mut self) {
        if let Some(keys) = &self.keys {
            keys.limiter.reset_count();
        }
    }

    fn set_peers(&mut self, table: &Arc<PeerTable>) {
        self.peers = table
            .peers()
            .map(|peer| (peer.config.public_key, (peer.config.id, peer.owner)))
            .collect();
    }

    fn drain(&mut self, hub: &Hub, socket: &UdpSocket) {
        let mut bytes = [0; DATAGRAM_LEN_MAX];
        for _ in 0..BURST_MAX {
            // An error is one the socket has kept for us; there is nothing to read then.
            let Ok(Some(received)) = receive(socket.as_fd(), &mut bytes) else {
                return;
            };
            self.counters.add(Meter::UdpReceives, 1);
            self.counters.add(Meter::UdpPacketsIn, 1);
            self.counters.add(Meter::UdpBytesIn, received.len as u64);
            let local = received.ancillary.local;
            let message = &bytes[..received.len];
            self.handle(hub, received.from, local, message, Some(socket));
        }
    }

    fn handle(
        &mut self,
        hub: &Hub,
        from: SocketAddr,
        local: Option<Local>,
        message: &[u8],
        socket: Option<&UdpSocket>,
    ) {
        let mut reply = [0; COOKIE_LEN];
        match self.check(from.ip(), message, &mut reply) {
            Ok(passed) => {
                let queued =
                    HandshakeMessage::new(passed.peer, from, local, message).and_then(|message| {
                        let inbox = hub.inboxes.get(usize::from(passed.shard))?;
                        inbox.handshakes.push(message).ok()?;
                        inbox.wake.ring();
                        Some(())
                    });
                if queued.is_none() {
                    self.counters.drop_one(DropReason::StrayFull);
                }
            }
            Err(Refused::Dropped(reason)) => self.counters.drop_one(reason),
            Err(Refused::NeedsCookie(len)) => {
                self.counters.drop_one(DropReason::HandshakeLimited);
                let leave = Leave {
                    local,
                    ..Leave::to(from)
                };
                let sent = socket.map(|socket| send(socket.as_fd(), &leave, &reply[..len], None));
                if sent == Some(Ok(())) {
                    self.counters.add(Meter::UdpSends, 1);
                    self.counters.add(Meter::UdpPacketsOut, 1);
                    self.counters.add(Meter::UdpBytesOut, len as u64);
                }
            }
        }
    }

    fn check(&mut self, from: IpAddr, message: &[u8], reply: &mut [u8]) -> Result<Passed, Refused> {
        match classify(message) {
            Class::Handshake => {}
            Class::Invalid(reason) => return Err(Refused::Dropped(reason)),
            Class::Data(_) | Class::Disco | Class::Stun => {
                return Err(Refused::Dropped(DropReason::UnknownMessage));
            }
        }
        let invalid = Refused::Dropped(DropReason::HandshakeInvalid);
        let Some(keys) = &self.keys else {
            return Err(invalid);
        };
        let packet = match keys.limiter.verify_packet(Some(from), message, reply) {
            Ok(packet) => packet,
            Err(TunnResult::WriteToNetwork(cookie)) => {
                return Err(Refused::NeedsCookie(cookie.len()));
            }
            Err(_) => return Err(invalid),
        };
        match packet {
            Packet::HandshakeInit(initiation) => {
                let half = parse_handshake_anon(&keys.private, &keys.public, &initiation);
                let Ok(half) = half else { return Err(invalid) };
                let known = self.peers.get(&half.peer_static_public);
                known.map_or(Err(invalid), |&(peer, shard)| {
                    Ok(Passed {
                        peer: Some(peer),
                        shard,
                    })
                })
            }
            // Bits 8 to 15 of the receiver index name the shard.
            Packet::HandshakeResponse(response) => {
                let shard = response.receiver_idx.to_le_bytes()[1];
                Ok(Passed { peer: None, shard })
            }
            Packet::PacketCookieReply(cookie) => {
                let shard = cookie.receiver_idx.to_le_bytes()[1];
                Ok(Passed { peer: None, shard })
            }
            Packet::PacketData(_) => Err(invalid),
        }
    }
}

/// Why a message goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    Dropped(DropReason),
    /// The first so many bytes of the reply buffer are a cookie for the sender.
    NeedsCookie(usize),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::PeerConfig;
    use crate::session::{Engine, MESSAGE_LEN_MAX};

    const FROM: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn key(n: u8) -> Zeroizing<[u8; 32]> {
        Zeroizing::new([n; 32])
    }

    fn public(n: u8) -> [u8; 32] {
        *PublicKey::from(&StaticSecret::from([n; 32])).as_bytes()
    }

    fn gate() -> Gate {
        let mut gate = Gate::new(Some(&key(1)));
        let peer = PeerConfig {
            id: PeerId(4),
            public_key: public(2),
            preshared_key: None,
            allowed_ips: vec![],
            persistent_keepalive: None,
        };
        let table = PeerTable::new(vec![peer], 1, &PeerTable::default());
        gate.set_peers(&Arc::new(table));
        gate
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "boringtun reads the clock itself"
    )]
    fn initiation(from: u8) -> [u8; MESSAGE_LEN_MAX] {
        let mut session = Engine::new(&key(from), 1420).session(&public(1), None, None, 5);
        let mut out = [0; MESSAGE_LEN_MAX];
        session
            .initiate(std::time::Instant::now(), false, &mut out)
            .unwrap();
        out
    }

    #[test]
    fn an_initiation_of_a_known_peer_passes_with_its_name() {
        let passed = gate().check(FROM, &initiation(2), &mut [0; COOKIE_LEN]);
        assert_eq!(
            passed,
            Ok(Passed {
                peer: Some(PeerId(4)),
                shard: 0
            })
        );
    }

    #[test]
    fn strangers_bad_macs_and_wrong_lengths_go_no_further() {
        let mut reply = [0; COOKIE_LEN];
        let mut gate = gate();
        let dropped = |reason| Err(Refused::Dropped(reason));
        assert_eq!(
            gate.check(FROM, &initiation(3), &mut reply),
            dropped(DropReason::HandshakeInvalid)
        );
        let mut broken = initiation(2);
        broken[20] ^= 1;
        assert_eq!(
            gate.check(FROM, &broken, &mut reply),
            dropped(DropReason::HandshakeInvalid)
        );
        assert_eq!(
            gate.check(FROM, &broken[..147], &mut reply),
            dropped(DropReason::MessageLength)
        );
        assert_eq!(
            gate.check(FROM, &[0; 40], &mut reply),
            dropped(DropReason::UnknownMessage)
        );
    }

    #[test]
    fn a_cookie_reply_goes_to_the_shard_its_index_names() {
        let mut message = [0; COOKIE_LEN];
        message[0] = 3;
        message[4..8].copy_from_slice(&[0x11, 0x02, 0x33, 0x44]);
        let passed = gate().check(FROM, &message, &mut [0; COOKIE_LEN]);
        assert_eq!(
            passed,
            Ok(Passed {
                peer: None,
                shard: 2
            })
        );
    }

    #[test]
    fn a_flood_is_answered_with_cookies() {
        let mut gate = gate();
        let message = initiation(3);
        let mut reply = [0; COOKIE_LEN];
        let mut cookies = 0;
        for _ in 0..MESSAGES_PER_SECOND_MAX + 10 {
            if let Err(Refused::NeedsCookie(len)) = gate.check(FROM, &message, &mut reply) {
                assert_eq!((len, reply[0]), (COOKIE_LEN, 3));
                cookies += 1;
            }
        }
        assert!(cookies >= 10 - 1, "{cookies}");
    }
}
