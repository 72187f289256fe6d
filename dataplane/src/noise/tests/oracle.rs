//! boringtun as the other end, in both roles, with its own randomness and clock.

use std::net::SocketAddr;
use std::sync::Arc;

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use chacha20poly1305::aead::AeadInOut as _;
use chacha20poly1305::{ChaCha20Poly1305, Key, KeyInit as _, Nonce, Tag};

use super::*;

/// Handshakes per role; `RINGTAIL_NOISE_ROUNDS` says otherwise.
const ROUNDS: usize = 60;

fn rounds() -> usize {
    std::env::var("RINGTAIL_NOISE_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap())
}

/// Us, and boringtun with its limit of messages a second.
struct Pair {
    ours: End,
    theirs: Tunn,
}

fn pair(rng: &mut StdRng, limit: u64) -> Pair {
    let (a, b) = (LocalKeys::new(&rng.random()), LocalKeys::new(&rng.random()));
    let preshared: Option<[u8; 32]> = rng.random_bool(0.5).then(|| rng.random());
    let remote = Remote::new(&a, b.public(), preshared.as_ref());
    let theirs = Tunn::new(
        StaticSecret::from(*b.private.as_bytes()),
        PublicKey::from(*a.public()),
        preshared,
        None,
        rng.random::<u32>() >> 8,
        Some(Arc::new(RateLimiter::new(
            &PublicKey::from(*b.public()),
            limit,
        ))),
    );
    Pair {
        ours: End { local: a, remote },
        theirs,
    }
}

fn written(result: TunnResult<'_>) -> Vec<u8> {
    let TunnResult::WriteToNetwork(message) = result else {
        panic!("{result:?}");
    };
    message.to_vec()
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = Nonce::default();
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    nonce
}

/// A data message of ours.
fn seal(keys: &TransportKeys, counter: u64, packet: &[u8]) -> Vec<u8> {
    let mut text = packet.to_vec();
    let tag = ChaCha20Poly1305::new(&Key::from(*keys.send))
        .encrypt_inout_detached(&nonce(counter), &[], text.as_mut_slice().into())
        .unwrap();
    let mut message = vec![4, 0, 0, 0];
    message.extend(keys.remote_index.to_le_bytes());
    message.extend(counter.to_le_bytes());
    message.extend(text);
    message.extend(tag);
    message
}

/// What is in a data message of theirs.
fn open(keys: &TransportKeys, message: &[u8]) -> Vec<u8> {
    assert_eq!(message[..4], [4, 0, 0, 0]);
    assert_eq!(message[4..8], keys.local_index.to_le_bytes());
    let counter = u64::from_le_bytes(message[8..16].try_into().unwrap());
    let (text, tag) = message[16..].split_at(message.len() - 32);
    let mut text = text.to_vec();
    ChaCha20Poly1305::new(&Key::from(*keys.receive))
        .decrypt_inout_detached(
            &nonce(counter),
            &[],
            text.as_mut_slice().into(),
            &Tag::try_from(tag).unwrap(),
        )
        .expect("sealed for us");
    text
}

/// An IPv4 packet of 40 bytes.
fn packet() -> [u8; 40] {
    let mut packet = [7; 40];
    packet[..20].fill(0);
    packet[0] = 0x45;
    packet[3] = 40;
    packet
}

/// A packet each way under the new keys.
fn exchange(theirs: &mut Tunn, keys: &TransportKeys) {
    let mut out = [0; 256];
    let opened = theirs.decapsulate(None, &seal(keys, 0, &packet()), &mut out);
    let TunnResult::WriteToTunnelV4(got, _) = opened else {
        panic!("{opened:?}");
    };
    assert_eq!(*got, packet());
    let message = written(theirs.encapsulate(&packet(), &mut out));
    assert_eq!(open(keys, &message)[..40], packet());
}

#[test]
fn boringtun_answers_our_initiations() {
    let mut rng = seeded();
    for _ in 0..rounds() {
        let Pair { ours, mut theirs } = pair(&mut rng, u64::MAX);
        let (initiated, message) = ours.initiate(&mut rng, None);
        let mut out = [0; 256];
        let answer = written(theirs.decapsulate(None, &message, &mut out));
        let keys = ours.finish(&initiated, &answer).unwrap();
        exchange(&mut theirs, &keys);
    }
}

#[test]
fn boringtun_takes_our_answers() {
    let mut rng = seeded();
    for _ in 0..rounds() {
        let Pair { ours, mut theirs } = pair(&mut rng, u64::MAX);
        let mut out = [0; 256];
        let message = written(theirs.format_handshake_initiation(&mut out, false));
        let (keys, answer) = ours.respond(&mut rng, &message);
        let keepalive = written(theirs.decapsulate(None, &answer, &mut out));
        assert!(open(&keys, &keepalive).is_empty());
        exchange(&mut theirs, &keys);
    }
}

#[test]
fn boringtun_refuses_what_we_damage() {
    let mut rng = seeded();
    let Pair { ours, mut theirs } = pair(&mut rng, u64::MAX);
    let (_, message) = ours.initiate(&mut rng, None);
    for at in 0..132 {
        let mut damaged = message;
        damaged[at] ^= 1;
        let mut out = [0; 256];
        let result = theirs.decapsulate(None, &damaged, &mut out);
        assert!(matches!(result, TunnResult::Err(_)), "byte {at}");
    }
}

#[test]
fn we_take_boringtuns_cookies_and_it_takes_what_we_make_of_them() {
    let mut rng = seeded();
    let now = now();
    let ip = "192.0.2.1".parse().unwrap();
    for _ in 0..10 {
        let (a, b) = ends(&mut rng, false);
        let limiter = RateLimiter::new(&PublicKey::from(*b.local.public()), 0);
        let mut cookies = CookieStore::default();
        let (initiated, message) = a.initiate(&mut rng, None);
        cookies.sent(initiated.mac1());
        let mut out = [0; 64];
        let reply = match limiter.verify_packet(Some(ip), &message, &mut out) {
            Err(result) => written(result),
            Ok(_) => panic!("always under load"),
        };
        cookies.receive(now, &a.remote, &reply).unwrap();
        let (_, message) = a.initiate(&mut rng, cookies.cookie(now));
        assert!(matches!(
            limiter.verify_packet(Some(ip), &message, &mut out),
            Ok(Packet::HandshakeInit(_))
        ));
    }
}

#[test]
fn boringtun_takes_our_cookies_and_we_take_what_it_makes_of_them() {
    let mut rng = seeded();
    let now = now();
    let from: SocketAddr = "192.0.2.1:7".parse().unwrap();
    let Pair { ours, mut theirs } = pair(&mut rng, u64::MAX);
    let local = LocalKeys::new(ours.local.private.as_bytes());
    let mut gate = Gate::new(now, Some(Arc::new(local)), &mut rng);
    let mut out = [0; 256];
    let mut reply = [0; 64];
    let message = written(theirs.format_handshake_initiation(&mut out, true));
    for _ in 0..LOAD_BURST {
        let verdict = gate.handle(now, from, Standing::Stranger, &message, &mut rng);
        assert!(matches!(verdict, Verdict::Initiation(_)));
    }
    let verdict = gate.handle(now, from, Standing::Stranger, &message, &mut rng);
    let Verdict::Unproven(novelty) = verdict else {
        panic!("{verdict:?}");
    };
    gate.challenge(now, from, novelty, &message, &mut rng, &mut reply)
        .unwrap();
    let taken = theirs.decapsulate(None, &reply, &mut out);
    assert!(matches!(taken, TunnResult::Done), "{taken:?}");
    let message = written(theirs.format_handshake_initiation(&mut out, true));
    let verdict = gate.handle(now, from, Standing::Stranger, &message, &mut rng);
    assert!(matches!(verdict, Verdict::Initiation(_)), "{verdict:?}");
}
