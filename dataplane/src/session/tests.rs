//! Two sessions joined by hand: every message is carried over, lost or doubled by the test.

#![expect(
    clippy::disallowed_methods,
    reason = "boringtun reads the clock itself; the tests only add to it"
)]

use super::*;
use crate::tun::segment::plan;
use crate::tun::vnet::VnetHdr;

const MTU: usize = 1420;

struct End {
    engine: Engine,
    session: Session,
    arena: Arena,
}

fn pair() -> (End, End) {
    let keys = [Zeroizing::new([1u8; 32]), Zeroizing::new([2u8; 32])];
    let public =
        |key: &Zeroizing<[u8; 32]>| *PublicKey::from(&StaticSecret::from(**key)).as_bytes();
    let end = |own: usize, index| {
        let engine = Engine::new(&keys[own], MTU);
        let session = engine.session(&public(&keys[1 - own]), Some([9; 32]), None, index);
        End {
            engine,
            session,
            arena: Arena::new(),
        }
    };
    (end(0, 0x00aa_0100), end(1, 0x00bb_0200))
}

impl End {
    fn initiate(&mut self, now: Instant) -> Vec<u8> {
        let mut out = [0; MESSAGE_LEN_MAX];
        let len = self
            .session
            .initiate(now, true, &mut out)
            .expect("an initiation");
        out[..len].to_vec()
    }

    fn handshake(&mut self, message: &[u8]) -> Result<(Outcome, Vec<u8>), DropReason> {
        let mut out = [0; MESSAGE_LEN_MAX];
        let outcome = self.session.handle_handshake(message, &mut out)?;
        let len = outcome.message.unwrap_or(0);
        Ok((outcome, out[..len].to_vec()))
    }

    fn open(&mut self, datagrams: &[&[u8]]) -> (OpenReport, Vec<DropReason>) {
        let index = u32::from_le_bytes(*datagrams[0][4..].first_chunk().unwrap());
        let mut dropped = Vec::new();
        self.arena.clear();
        let report = self.session.open(
            index,
            datagrams.iter().copied(),
            &mut self.arena,
            |reason| dropped.push(reason),
        );
        (report, dropped)
    }

    fn seal(&mut self, packet: &[u8]) -> Vec<u8> {
        let plan = plan(&VnetHdr::PLAIN, packet).unwrap();
        let mut packet = packet.to_vec();
        let mut out = vec![0; 3000];
        let len = self
            .session
            .seal(&mut self.engine, &plan, &mut packet, 0..1, &mut out)
            .unwrap();
        assert_eq!(len, self.engine.sealed_len(plan.segment_len(0)));
        out.truncate(len);
        out
    }
}

/// An IPv4 packet of `len` bytes with an unassigned protocol.
fn ipv4(len: usize) -> Vec<u8> {
    let mut packet = vec![0x5a; len];
    packet[..20].copy_from_slice(&[
        0x45, 0, 0, 0, 0, 0, 0, 0, 64, 253, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    packet[2..4].copy_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
    packet
}

/// Runs a whole handshake that `a` starts.
fn shake(a: &mut End, b: &mut End) {
    let initiation = a.initiate(Instant::now());
    let (outcome, response) = b.handshake(&initiation).unwrap();
    assert_eq!((outcome.handshake, outcome.change), (true, Change::Same));
    assert!(
        !b.session.ready(),
        "not before the initiator has shown its keys"
    );
    let (outcome, keepalive) = a.handshake(&response).unwrap();
    assert_eq!((outcome.handshake, outcome.change), (false, Change::Up));
    assert!(a.session.ready() && !a.session.initiating());
    let (report, _) = b.open(&[&keepalive]);
    assert_eq!((report.datagrams, report.change), (1, Change::Up));
    assert!(b.session.ready());
}

#[test]
fn packets_of_every_length_pass_padded_to_sixteen_but_not_past_the_mtu() {
    let (mut a, mut b) = pair();
    shake(&mut a, &mut b);
    for (len, sealed) in [
        (20, 64),
        (32, 64),
        (33, 80),
        (1400, 1440),
        (1419, 1452),
        (1420, 1452),
        (1421, 1453),
    ] {
        let packet = ipv4(len);
        let datagram = a.seal(&packet);
        assert_eq!(datagram.len(), sealed, "for {len}");
        let (report, dropped) = b.open(&[&datagram]);
        assert_eq!(
            (report.datagrams, report.bytes, dropped),
            (1, sealed, vec![])
        );
        assert_eq!(b.arena.packet(0), packet);
    }
}

#[test]
fn a_batch_with_bad_datagrams_gives_the_good_ones() {
    let (mut a, mut b) = pair();
    shake(&mut a, &mut b);
    let good = a.seal(&ipv4(100));
    let mut bad = a.seal(&ipv4(200));
    bad[40] ^= 1;
    let other = a.seal(&ipv4(300));
    let (report, dropped) = b.open(&[&good, &bad, &good, &other]);
    assert_eq!(report.datagrams, 2);
    assert_eq!(dropped, [DropReason::OpenFailed, DropReason::Replayed]);
    assert_eq!(
        (b.arena.packet(0).len(), b.arena.packet(1).len()),
        (100, 300)
    );
}

#[test]
fn a_doubled_handshake_message_does_no_harm() {
    let (mut a, mut b) = pair();
    let initiation = a.initiate(Instant::now());
    let (_, response) = b.handshake(&initiation).unwrap();
    assert_eq!(b.handshake(&initiation).unwrap_err(), DropReason::Replayed);
    let (_, keepalive) = a.handshake(&response).unwrap();
    assert_eq!(
        a.handshake(&response).unwrap_err(),
        DropReason::HandshakeInvalid
    );
    assert_eq!(b.open(&[&keepalive]).0.change, Change::Up);
    assert_eq!(b.open(&[&keepalive]).1, [DropReason::Replayed]);
}

#[test]
fn a_message_with_a_wrong_mac_or_from_a_stranger_is_dropped() {
    let (mut a, mut b) = pair();
    let mut initiation = a.initiate(Instant::now());
    initiation[130] ^= 1;
    assert_eq!(
        b.handshake(&initiation).unwrap_err(),
        DropReason::HandshakeInvalid
    );
    let stranger = Engine::new(&Zeroizing::new([3; 32]), MTU);
    let to = *PublicKey::from(&b.engine.private).as_bytes();
    let mut session = stranger.session(&to, None, None, 7);
    let mut out = [0; MESSAGE_LEN_MAX];
    session.initiate(Instant::now(), false, &mut out).unwrap();
    assert_eq!(b.handshake(&out).unwrap_err(), DropReason::HandshakeInvalid);
    assert!(!b.session.ready());
}

#[test]
fn crossing_initiations_complete_without_waiting() {
    let (mut a, mut b) = pair();
    let now = Instant::now();
    let (from_a, from_b) = (a.initiate(now), b.initiate(now));
    let (_, answer_of_a) = a.handshake(&from_b).unwrap();
    let (_, answer_of_b) = b.handshake(&from_a).unwrap();
    let (outcome, keepalive_a) = a.handshake(&answer_of_b).unwrap();
    assert_eq!(outcome.change, Change::Up);
    let (outcome, keepalive_b) = b.handshake(&answer_of_a).unwrap();
    assert_eq!(outcome.change, Change::Up);
    assert!(a.session.ready() && b.session.ready());
    a.open(&[&keepalive_b]);
    b.open(&[&keepalive_a]);
    for _ in 0..3 {
        let packet = ipv4(90);
        let there = a.seal(&packet);
        assert_eq!(b.open(&[&there]).0.datagrams, 1);
        let back = b.seal(&packet);
        assert_eq!(a.open(&[&back]).0.datagrams, 1);
    }
}

#[test]
fn crossing_initiations_survive_the_loss_of_one_response() {
    let (mut a, mut b) = pair();
    let now = Instant::now();
    let (from_a, from_b) = (a.initiate(now), b.initiate(now));
    let (_, _lost) = a.handshake(&from_b).unwrap();
    let (_, answer_of_b) = b.handshake(&from_a).unwrap();
    let (_, keepalive) = a.handshake(&answer_of_b).unwrap();
    assert_eq!(b.open(&[&keepalive]).0.change, Change::Up);
    assert!(a.session.ready() && b.session.ready());
}

/// `Tunn` has forgotten its own timer here; ours brings a new initiation.
#[test]
fn crossing_initiations_survive_the_loss_of_both_responses() {
    let (mut a, mut b) = pair();
    let now = Instant::now();
    let (from_a, from_b) = (a.initiate(now), b.initiate(now));
    a.handshake(&from_b).unwrap();
    b.handshake(&from_a).unwrap();
    let mut out = [0; MESSAGE_LEN_MAX];
    assert_eq!(
        a.session
            .tick(now + Duration::from_secs(4), Duration::ZERO, &mut out)
            .message,
        None
    );
    let outcome = a
        .session
        .tick(now + Duration::from_millis(5400), Duration::ZERO, &mut out);
    assert_eq!((outcome.message, outcome.handshake), (Some(148), true));
    let (_, response) = b.handshake(&out).unwrap();
    assert_eq!(a.handshake(&response).unwrap().0.change, Change::Up);
}

#[test]
fn an_unanswered_initiation_is_given_up_after_ninety_seconds() {
    let (mut a, _) = pair();
    let now = Instant::now();
    assert!(a.session.dormant());
    a.initiate(now);
    assert!(!a.session.dormant());
    let mut out = [0; MESSAGE_LEN_MAX];
    let mut sent = 0;
    for secs in 1..90 {
        let outcome = a
            .session
            .tick(now + Duration::from_secs(secs), Duration::ZERO, &mut out);
        sent += usize::from(outcome.message.is_some());
        assert_eq!(outcome.change, Change::Same);
    }
    assert_eq!(sent, 14, "every six seconds of this clock");
    let outcome = a
        .session
        .tick(now + Duration::from_secs(90), Duration::ZERO, &mut out);
    assert_eq!((outcome.message, outcome.change), (None, Change::Down));
    assert!(a.session.dormant());
}

#[test]
fn an_initiation_is_not_repeated_at_once_but_for_a_new_path() {
    let (mut a, _) = pair();
    let now = Instant::now();
    let mut out = [0; MESSAGE_LEN_MAX];
    a.initiate(now);
    assert_eq!(
        a.session
            .initiate(now + Duration::from_secs(1), false, &mut out),
        None
    );
    assert_eq!(
        a.session
            .initiate(now + Duration::from_millis(50), true, &mut out),
        None
    );
    assert_eq!(
        a.session
            .initiate(now + Duration::from_millis(100), true, &mut out),
        Some(148)
    );
}

#[test]
fn a_second_handshake_replaces_the_keys_while_data_flows() {
    let (mut a, mut b) = pair();
    shake(&mut a, &mut b);
    let old = a.seal(&ipv4(60));
    shake_again(&mut b, &mut a);
    let new = a.seal(&ipv4(61));
    assert_ne!(old[4..8], new[4..8], "another receiver index");
    let (report, dropped) = b.open(&[&old]);
    assert_eq!(
        (report.datagrams, dropped.len()),
        (1, 0),
        "old keys still open"
    );
    assert_eq!(b.open(&[&new]).0.datagrams, 1);
}

fn shake_again(a: &mut End, b: &mut End) {
    let initiation = a.initiate(Instant::now());
    let (_, response) = b.handshake(&initiation).unwrap();
    let (outcome, keepalive) = a.handshake(&response).unwrap();
    assert_eq!(outcome.change, Change::Up);
    assert_eq!(b.open(&[&keepalive]).0.change, Change::Up);
}

#[test]
fn unanswered_data_makes_a_handshake_once_the_keys_are_not_fresh() {
    let (mut a, mut b) = pair();
    shake(&mut a, &mut b);
    let now = Instant::now();
    let at = |secs| now + Duration::from_secs(secs);
    let mut out = [0; MESSAGE_LEN_MAX];
    let quiet = Duration::from_secs(3);
    assert_eq!(a.session.tick(at(0), quiet, &mut out).message, None);
    assert_eq!(a.session.tick(at(14), quiet, &mut out).message, None);
    assert_eq!(a.session.tick(at(15), quiet / 2, &mut out).message, None);
    let outcome = a.session.tick(at(15), quiet, &mut out);
    assert_eq!((outcome.message, outcome.handshake), (Some(148), true));
    assert_eq!(
        a.session.tick(at(16), quiet, &mut out).message,
        None,
        "one is out"
    );
    let (_, response) = b.handshake(&out).unwrap();
    assert_eq!(a.handshake(&response).unwrap().0.change, Change::Up);
    assert_eq!(
        a.session.tick(at(17), quiet, &mut out).message,
        None,
        "fresh again"
    );
}
