//! boringtun opens what we seal and the reverse: random sessions over a bad network.
//!
//! `Tunn` reads the real clock, so its own timers do not run here; ours jump.

use rand::RngExt;

use super::*;

/// Sessions by default; `RINGTAIL_ORACLE_SESSIONS` makes it more.
const SESSIONS: u32 = 200;

/// Carries a handshake that `a` starts over a network that may double messages.
fn handshake(rng: &mut StdRng, now: Moment, a: &mut End, b: &mut End) {
    let initiation = a.initiate(now);
    let (outcome, response) = b.handshake(now, &initiation).expect("a new initiation");
    assert!(outcome.handshake);
    if rng.random_bool(0.2) {
        assert!(b.handshake(now, &initiation).is_err(), "a doubled one");
    }
    let (outcome, keepalive) = a.handshake(now, &response).expect("the response to it");
    assert_eq!(outcome.change, Change::Up);
    // Lost, the first data confirms the keys as well.
    if rng.random_bool(0.8) {
        let got = b.open(now, &[&keepalive]);
        assert_eq!((got.report.datagrams, got.report.change), (1, Change::Up));
    } else {
        let packet = ipv4(rng.random_range(20..1400));
        let datagram = a.seal(now, &packet);
        let got = b.open(now, &[&datagram]);
        assert_eq!((got.packets, got.report.change), (vec![packet], Change::Up));
    }
}

/// Sends some packets from `a` to `b`: some lost, some doubled, in any order.
fn data(rng: &mut StdRng, now: Moment, a: &mut End, b: &mut End) {
    let mut datagrams = Vec::new();
    for _ in 0..rng.random_range(1..30) {
        let packet = ipv4(rng.random_range(20..1430));
        let datagram = a.seal(now, &packet);
        match rng.random_range(0..10) {
            0 => {}
            1 => datagrams.extend([(datagram.clone(), packet.clone()), (datagram, packet)]),
            _ => datagrams.push((datagram, packet)),
        }
    }
    for i in (1..datagrams.len()).rev() {
        datagrams.swap(i, rng.random_range(0..=i));
    }
    let mut seen = std::collections::HashSet::new();
    for (datagram, packet) in &datagrams {
        let got = b.open(now, &[datagram]);
        if seen.insert(datagram) {
            assert_eq!(got.packets, std::slice::from_ref(packet));
        } else {
            assert_eq!(got.dropped, [DropReason::Replayed]);
        }
    }
}

#[test]
fn boringtun_and_we_understand_each_other() {
    let sessions = std::env::var("RINGTAIL_ORACLE_SESSIONS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(SESSIONS);
    let seed: u64 = rand::random();
    println!("seed {seed:#x}");
    let mut rng = StdRng::seed_from_u64(seed);
    for session in 0..sessions {
        let mut ours = End::new(config::Engine::Ringtail, 1, &peer_config(2, None));
        ours.engine.own.rng = StdRng::seed_from_u64(rng.random());
        let mut theirs = End::new(config::Engine::Boringtun, 2, &peer_config(1, None));
        let mut now = Duration::ZERO;
        for _ in 0..rng.random_range(1..4) {
            // Before `REJECT_AFTER_TIME`, after it, or after everything was erased.
            now += Duration::from_millis(
                [rng.random_range(101..60_000), 200_000, 700_000][rng.random_range(0..3)],
            );
            let moment = at(now);
            while ours
                .session
                .poll_timeout()
                .is_some_and(|at| at <= moment.now)
            {
                ours.step(moment);
            }
            // One that an alarm has just sent is not the one we want.
            now += Duration::from_millis(101);
            let moment = at(now);
            if rng.random() {
                handshake(&mut rng, moment, &mut ours, &mut theirs);
            } else {
                handshake(&mut rng, moment, &mut theirs, &mut ours);
            }
            for _ in 0..rng.random_range(0..4) {
                now += Duration::from_millis(rng.random_range(0..20_000));
                if rng.random() {
                    data(&mut rng, at(now), &mut ours, &mut theirs);
                } else {
                    data(&mut rng, at(now), &mut theirs, &mut ours);
                }
            }
        }
        assert!(ours.ready(at(now)), "session {session}");
    }
}

#[test]
fn initiations_that_cross_with_boringtun_complete() {
    for lost in 0..3 {
        let mut ours = End::new(config::Engine::Ringtail, 1, &peer_config(2, None));
        let mut theirs = End::new(config::Engine::Boringtun, 2, &peer_config(1, None));
        let now = secs(0.0);
        let (from_us, from_them) = (ours.initiate(now), theirs.initiate(now));
        let (_, answer) = ours.handshake(now, &from_them).unwrap();
        let (_, their_answer) = theirs.handshake(now, &from_us).unwrap();
        if lost != 1 {
            let (_, keepalive) = theirs.handshake(now, &answer).unwrap();
            ours.open(now, &[&keepalive]);
        }
        if lost != 2 {
            // Once the peer's handshake is complete ours is not needed any more.
            if let Ok((_, keepalive)) = ours.handshake(now, &their_answer) {
                theirs.open(now, &[&keepalive]);
            }
        }
        assert!(
            ours.ready(now) && theirs.ready(now),
            "without answer {lost}"
        );
        for _ in 0..3 {
            let there = ours.seal(now, &ipv4(100));
            assert_eq!(theirs.open(now, &[&there]).packets.len(), 1);
            let back = theirs.seal(now, &ipv4(100));
            assert_eq!(ours.open(now, &[&back]).packets.len(), 1);
        }
    }
}
