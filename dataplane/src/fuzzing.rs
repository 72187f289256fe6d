#![forbid(unsafe_code)]
//! What the fuzz targets run, as ordinary functions from bytes to nothing: `control/fuzz/` feeds
//! them from a fuzzer, the tests below from a seed. Each checks what must hold for any input, on
//! top of not panicking. `dataplane/oracle` gets the sessions and the model of their keypairs here.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use rand::SeedableRng as _;
use rand::rngs::StdRng;

use zerocopy::FromBytes;

use crate::aead::{Aead, Backend, HEADER_LEN, Key, MESSAGE_LEN_MIN, Open, Seal};
use crate::classify::{Class, DATA_LEN_MIN, classify};
use crate::coalesce::Coalescer;
use crate::filter::{CompiledRules, Filter};
use crate::noise::{self, Gate, Initiated, LocalKeys, Novelty, Remote, Standing, Tai64n, Verdict};
use crate::packet::header::Headers;
use crate::packet::segment::plan;
use crate::packet::vnet::VnetHdr;
use crate::types::Rules;

pub use crate::noise::public_key;
pub use crate::session::{Change, End, Got, Known, Moment, OpenReport, Outcome};

/// Takes any moment to count from, and an input.
pub type Target = fn(Instant, &[u8]);

/// Every target by its name.
pub const TARGETS: &[(&str, Target)] = &[
    ("tun_read", |_, bytes| tun_read(bytes)),
    ("datagram", |_, bytes| datagram(bytes)),
    ("opened", opened),
    ("handshake", handshake),
    ("aead", |_, bytes| aead(bytes)),
    ("session", session),
];

/// One TUN read: virtio-net header and packet. Whatever is planned is cut, and both ways of cutting
/// agree.
fn tun_read(bytes: &[u8]) {
    let Ok((vnet, packet)) = VnetHdr::split(bytes) else {
        return;
    };
    let Ok(plan) = plan(&vnet, packet) else {
        return;
    };
    let mut staged = packet.to_vec();
    let mut dst = vec![0; plan.segment_len(0)];
    for i in 0..plan.len() {
        let len = plan.write(i, packet, &mut dst);
        let range = plan.stage(i, &mut staged);
        assert_eq!(staged[range], dst[..len], "segment {i}");
    }
}

/// One datagram from the underlay.
fn datagram(bytes: &[u8]) {
    match classify(bytes) {
        Class::Data(_) => assert!(bytes.len() >= DATA_LEN_MIN),
        Class::Handshake => assert!(matches!(bytes.len(), 148 | 92 | 64)),
        Class::Disco | Class::Stun => assert!(bytes.len() >= 20),
        Class::PeerRelay | Class::Invalid(_) => {}
    }
}

/// Opened packets, each behind a length byte that counts in units of 8 bytes and one for the outer
/// TOS: headers, filter, coalescer, and back through the cutter. `now` is any moment.
fn opened(now: Instant, mut bytes: &[u8]) {
    let rules = CompiledRules::compile(&Rules::List(Vec::new()), None);
    let mut filter = Filter::new(now, Arc::new(rules));
    let mut coalescer = Coalescer::new();
    let mut committed = 0;
    while let Ok(([units, tos], rest)) = <[u8; 2]>::read_from_prefix(bytes) {
        let (packet, rest) = rest.split_at(rest.len().min(usize::from(units) * 8));
        bytes = rest;
        let Ok(headers) = Headers::parse(packet) else {
            continue;
        };
        let _ = filter.admit(now, &headers, packet);
        let _ = filter.remember(now, &headers, packet);
        committed += usize::from(coalescer.push(&headers, packet, tos).is_ok());
    }
    let batch = coalescer.take();
    let mut segments = 0;
    for (i, write) in batch.iter().enumerate() {
        let (vnet, packet) = VnetHdr::split(write).expect("a write has its header");
        let plan = plan(&vnet, packet).expect("what was merged can be cut");
        assert_eq!(plan.len(), batch.segments(i));
        segments += plan.len();
    }
    assert_eq!(segments, committed, "every packet leaves once");
}

/// Two ends and the true messages between them.
struct Handshake {
    initiator: (LocalKeys, Remote),
    responder: (LocalKeys, Remote),
    initiated: Initiated,
    initiation: [u8; noise::INITIATION_LEN],
    response: [u8; noise::RESPONSE_LEN],
}

static HANDSHAKE: LazyLock<Handshake> = LazyLock::new(|| {
    let mut rng = StdRng::seed_from_u64(1);
    let (a, b) = (LocalKeys::new(&[1; 32]), LocalKeys::new(&[2; 32]));
    let to_b = Remote::new(&a, b.public(), Some(&[3; 32]));
    let to_a = Remote::new(&b, a.public(), Some(&[3; 32]));
    let stamp = Tai64n::next(Duration::from_secs(1), None);
    let mut initiation = [0; noise::INITIATION_LEN];
    let initiated = noise::initiation(&a, &to_b, 7, stamp, None, &mut rng, &mut initiation)
        .expect("usable keys");
    let peeked = noise::peek_initiation(&b, &initiation).expect("made for b");
    let received = noise::consume_initiation(&peeked, &to_a).expect("made by a");
    let mut response = [0; noise::RESPONSE_LEN];
    noise::response(&to_a, received, 8, None, &mut rng, &mut response).expect("usable keys");
    Handshake {
        initiator: (a, to_b),
        responder: (b, to_a),
        initiated,
        initiation,
        response,
    }
});

/// A handshake message. The first byte says what the others are: 0 the message itself; 1 and 2 what
/// to change in a true initiation or response, which then gets a right MAC1, as an attacker can
/// give it. Only the true ones are authentic, up to the index their sender chose and the MACs.
fn handshake(now: Instant, bytes: &[u8]) {
    let Some((&mode, change)) = bytes.split_first() else {
        return;
    };
    let known = &*HANDSHAKE;
    let (a, to_b) = &known.initiator;
    let (b, to_a) = &known.responder;
    let base: &[u8] = match mode {
        1 => &known.initiation,
        2 => &known.response,
        _ => &[],
    };
    let mut message = base.to_vec();
    message.resize(base.len().max(change.len()), 0);
    for (byte, change) in message.iter_mut().zip(change) {
        *byte ^= change;
    }
    match mode {
        1 if message.len() == base.len() => noise::put_mac1(to_b, &mut message),
        2 if message.len() == base.len() => noise::put_mac1(to_a, &mut message),
        _ => {}
    }
    let same = |base: &[u8]| {
        let sealed = 8..base.len() - 2 * noise::MAC_LEN;
        message.len() == base.len()
            && message[..4] == base[..4]
            && message[sealed.clone()] == base[sealed]
    };

    let peeked = noise::peek_initiation(b, &message);
    let received = peeked.and_then(|peeked| noise::consume_initiation(&peeked, to_a));
    assert!(received.is_err() || same(&known.initiation));
    assert!(received.is_ok() || mode != 1 || !same(&known.initiation));
    let keys = noise::consume_response(a, to_b, &known.initiated, &message);
    assert!(keys.is_err() || same(&known.response));
    assert!(keys.is_ok() || mode != 2 || !same(&known.response));
    assert!(noise::consume_cookie_reply(to_b, &message, known.initiated.mac1()).is_err());

    let mut reply = [0; noise::COOKIE_REPLY_LEN];
    let mut rng = StdRng::seed_from_u64(2);
    let from = ([192, 0, 2, 1], 7).into();
    for standing in [Standing::Stranger, Standing::Known, Standing::Awaited] {
        let mut gate = Gate::new(now, Some(Arc::new(LocalKeys::new(&[2; 32]))), &mut rng);
        match gate.handle(now, from, standing, &message, &mut rng) {
            Verdict::Initiation(peeked) => assert_eq!(peeked.peer().len(), noise::KEY_LEN),
            Verdict::Response(index) => assert_eq!(message[8..12], index.to_le_bytes()),
            Verdict::CookieReply(index) => assert_eq!(message[4..8], index.to_le_bytes()),
            Verdict::Unproven(_) => panic!("one message is no load"),
            Verdict::Drop(_) => {}
        }
        let written = gate.challenge(now, from, Novelty::Again, &message, &mut rng, &mut reply);
        assert!(written.is_err() || reply[4..8] == message[4..8]);
    }
}

/// A batch of packets, four bytes each: which of two keys, the counter, and the length of the text
/// in two bytes, of which a set top bit damages the packet. Every backend seals and opens it as ring
/// does.
fn aead(bytes: &[u8]) {
    let keys = [Key::new(&[1; 32]), Key::new(&[2; 32])];
    let (packets, _) = bytes.as_chunks::<4>();
    let packets = &packets[..packets.len().min(64)];
    let plain: Vec<Vec<u8>> = packets
        .iter()
        .map(|[key, counter, len @ ..]| {
            let len = usize::from(u16::from_le_bytes(*len) & 0x7fff);
            vec![key ^ counter; MESSAGE_LEN_MIN + len]
        })
        .collect();

    let seal = |aead: Aead| {
        let mut messages = plain.clone();
        let mut batch: Vec<Seal<'_>> = packets
            .iter()
            .zip(&mut messages)
            .map(|([key, counter, ..], message)| Seal {
                key: &keys[usize::from(key & 1)],
                receiver: 1,
                counter: u64::from(*counter),
                message,
            })
            .collect();
        aead.seal(&mut batch);
        messages
    };
    let open = |aead: Aead, sealed: &[Vec<u8>]| {
        let mut messages = sealed.to_vec();
        let mut batch: Vec<Open<'_>> = packets
            .iter()
            .zip(&mut messages)
            .map(|([key, counter, _, high], message)| {
                let at = message.len() - 1 - usize::from(*key) % (message.len() - HEADER_LEN);
                message[at] ^= high & 0x80;
                Open {
                    key: &keys[usize::from(key & 1)],
                    counter: u64::from(*counter),
                    message,
                    ok: false,
                }
            })
            .collect();
        aead.open(&mut batch);
        let ok: Vec<bool> = batch.iter().map(|packet| packet.ok).collect();
        (messages, ok)
    };

    let ring = Aead::force(Backend::Ring).expect("ring runs everywhere");
    let sealed = seal(ring);
    let opened = open(ring, &sealed);
    for (ok, [_, _, _, high]) in opened.1.iter().zip(packets) {
        assert_eq!(*ok, high & 0x80 == 0);
    }
    for aead in Backend::ALL.iter().copied().filter_map(Aead::force) {
        for aead in [aead, aead.for_every_shape()] {
            assert!(seal(aead) == sealed, "{aead:?} seals");
            assert!(open(aead, &sealed) == opened, "{aead:?} opens");
        }
    }
}

/// Two joined sessions under a list of operations, two bytes each: starts, deliveries in any order,
/// damage, data, time. `start` is any moment.
fn session(start: Instant, bytes: &[u8]) {
    let _opened = crate::session::operations::run(start, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::build::{Builder, Tcp};
    use crate::seeded;
    use crate::sys;
    use rand::{Rng, RngExt};

    /// A valid packet, damaged now and then.
    fn packet(rng: &mut StdRng) -> Vec<u8> {
        let (src, dst) = if rng.random() {
            ("100.64.0.1:4000", "100.64.0.2:5201")
        } else {
            ("[fd7a::1]:4000", "[fd7a::2]:5201")
        };
        let builder = Builder::new(src.parse().unwrap(), dst.parse().unwrap());
        let payload = vec![0x5a; 8 * rng.random_range(0..8)];
        let seq = 64 * rng.random_range(0..4);
        let tcp = Tcp {
            seq,
            options: &[1; 12],
            ..Tcp::default()
        };
        let mut packet = if rng.random() {
            builder.tcp(&tcp, &payload)
        } else {
            builder.udp(&payload)
        };
        if rng.random_bool(0.3) {
            let at = rng.random_range(0..packet.len());
            packet[at] = rng.random();
        }
        packet
    }

    #[test]
    fn random_tun_reads_hold() {
        let mut rng = seeded();
        for _ in 0..20_000 {
            let mut bytes = [0u8; 10].to_vec();
            bytes[0] = rng.random_range(0..2);
            bytes[1] = [0, 1, 4, 5, rng.random()][rng.random_range(0..5)];
            bytes[4] = rng.random_range(0..32);
            bytes[6] = [20, 40][rng.random_range(0..2)];
            bytes[8] = [6, 16][rng.random_range(0..2)];
            bytes.extend(packet(&mut rng));
            bytes.truncate(rng.random_range(0..bytes.len() * 4));
            tun_read(&bytes);
        }
    }

    #[test]
    fn random_datagrams_hold() {
        let mut rng = seeded();
        for _ in 0..100_000 {
            let mut bytes = vec![0u8; rng.random_range(0..200)];
            rng.fill_bytes(&mut bytes);
            if let Some(head) = bytes.first_chunk_mut::<4>() {
                *head = [rng.random_range(0..6), 0, 0, 0];
            }
            datagram(&bytes);
        }
    }

    #[test]
    fn random_handshake_messages_hold() {
        let mut rng = seeded();
        let now = sys::now();
        handshake(now, &[1]);
        handshake(now, &[2]);
        for round in 0..400usize {
            let mode = [0u8, 1, 2][round % 3];
            let len = [148, 92, 64, rng.random_range(0..200)][rng.random_range(0..4)];
            let mut bytes = vec![0; len];
            if mode == 0 {
                rng.fill_bytes(&mut bytes);
                if let Some(kind) = bytes.first_chunk_mut::<4>() {
                    *kind = [rng.random_range(0..5), 0, 0, 0];
                }
            } else if len > 0 {
                let at = rng.random_range(0..len);
                bytes[at] = rng.random();
            }
            bytes.insert(0, mode);
            handshake(now, &bytes);
        }
    }

    #[test]
    fn random_opened_packets_hold() {
        let mut rng = seeded();
        let now = sys::now();
        for _ in 0..2_000 {
            let mut bytes = Vec::new();
            for _ in 0..rng.random_range(0..20) {
                let mut packet = packet(&mut rng);
                packet.resize(packet.len().next_multiple_of(8), 0);
                bytes.push(u8::try_from(packet.len() / 8).unwrap());
                bytes.push(rng.random_range(0..4));
                bytes.extend(packet);
            }
            opened(now, &bytes);
        }
    }

    #[test]
    fn random_batches_hold() {
        let mut rng = seeded();
        for _ in 0..30 {
            let mut bytes = Vec::new();
            for _ in 0..rng.random_range(0..20) {
                let damaged = u16::from(rng.random_bool(0.2)) << 15;
                let len: u16 = rng.random_range(0..1600);
                bytes.extend(rng.random::<[u8; 2]>());
                bytes.extend((len | damaged).to_le_bytes());
            }
            aead(&bytes);
        }
    }

    /// The seeds that the fuzzer starts from.
    #[test]
    fn the_corpus_holds() {
        let corpus = |target: &str| -> Vec<Vec<u8>> {
            let path = format!(
                "{}/../control/fuzz/corpus/{target}",
                env!("CARGO_MANIFEST_DIR")
            );
            let entries = std::fs::read_dir(path).unwrap();
            entries
                .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
                .collect()
        };
        for (target, run) in TARGETS {
            let seeds = corpus(target);
            assert!(!seeds.is_empty(), "{target} has no corpus");
            seeds.iter().for_each(|bytes| run(sys::now(), bytes));
        }
    }
}
