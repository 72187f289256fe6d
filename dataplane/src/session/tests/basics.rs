//! What sessions of both kinds do.

use super::*;

const BOTH: [config::Engine; 2] = [OURS, config::Engine::Boringtun];

#[test]
fn packets_of_every_length_pass_padded_to_sixteen_but_not_past_the_mtu() {
    for kind in BOTH {
        let (mut a, mut b) = joined(kind);
        let now = secs(0.0);
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
            let datagram = a.seal(now, &packet);
            assert_eq!(datagram.len(), sealed, "for {len}");
            let got = b.open(now, &[&datagram]);
            assert_eq!(
                (got.report.datagrams, got.report.bytes, got.dropped),
                (1, sealed, vec![])
            );
            assert_eq!(got.packets, [packet]);
        }
    }
}

#[test]
fn counters_begin_at_zero_and_every_message_of_a_key_has_the_next() {
    let counter = |message: &[u8]| u64::from_le_bytes(*message[8..].first_chunk().unwrap());
    for kind in BOTH {
        let (mut a, mut b) = pair(kind);
        for start in [0.0, 20.0] {
            let now = secs(start);
            let initiation = a.initiate(now);
            let (_, response) = b.handshake(now, &initiation).unwrap();
            let (_, keepalive) = a.handshake(now, &response).unwrap();
            assert_eq!((keepalive.len(), counter(&keepalive)), (KEEPALIVE_LEN, 0));
            let got = b.open(now, &[&keepalive]);
            assert_eq!((got.report.datagrams, got.packets.len()), (1, 0));
            for next in 1..4 {
                assert_eq!(counter(&a.seal(now, &ipv4(40))), next, "initiator");
                assert_eq!(counter(&b.seal(now, &ipv4(40))), next - 1, "responder");
            }
        }
    }
}

#[test]
fn padding_is_zeros() {
    let (mut a, mut b) = joined(OURS);
    let now = secs(0.0);
    let mut datagram = a.seal(now, &ipv4(33));
    let index = u32::from_le_bytes(*datagram[4..].first_chunk().unwrap());
    let len = datagram.len();
    b.session.open(
        &mut b.engine,
        now.now,
        index,
        &mut datagram,
        len,
        &mut b.opened,
        |reason| panic!("{reason:?}"),
    );
    assert_eq!(datagram[16 + 33..16 + 48], [0; 15]);
}

#[test]
fn a_batch_with_bad_datagrams_gives_the_good_ones() {
    for kind in BOTH {
        let (mut a, mut b) = joined(kind);
        let now = secs(0.0);
        let good = a.seal(now, &ipv4(100));
        let mut bad = a.seal(now, &ipv4(101));
        bad[40] ^= 1;
        let other = a.seal(now, &ipv4(102));
        let got = b.open(now, &[&good, &bad, &good, &other]);
        assert_eq!(got.report.datagrams, 2);
        let mut dropped = got.dropped;
        dropped.sort_unstable();
        assert_eq!(dropped, [DropReason::OpenFailed, DropReason::Replayed]);
        assert_eq!(got.packets, [ipv4(100), ipv4(102)]);
    }
}

#[test]
fn a_doubled_handshake_message_does_no_harm() {
    for kind in BOTH {
        let (mut a, mut b) = pair(kind);
        let now = secs(0.0);
        let initiation = a.initiate(now);
        let (_, response) = b.handshake(now, &initiation).unwrap();
        assert!(b.handshake(now, &initiation).is_err());
        let (_, keepalive) = a.handshake(now, &response).unwrap();
        assert!(a.handshake(now, &response).is_err());
        assert_eq!(b.open(now, &[&keepalive]).report.change, Change::Up);
        assert_eq!(b.open(now, &[&keepalive]).dropped, [DropReason::Replayed]);
    }
}

#[test]
fn a_message_with_a_wrong_mac_or_from_a_stranger_is_dropped() {
    for kind in BOTH {
        let (mut a, mut b) = pair(kind);
        let now = secs(0.0);
        let mut initiation = a.initiate(now);
        initiation[130] ^= 1;
        assert!(b.handshake(now, &initiation).is_err());
        let mut stranger = end(kind, 3, &peer_config(2, None));
        let initiation = stranger.initiate(now);
        assert!(b.handshake(now, &initiation).is_err());
        assert!(!b.ready(now));
        // Nothing has changed for the right one.
        shake(secs(0.2), &mut a, &mut b);
    }
}

#[test]
fn messages_of_wrong_lengths_are_dropped() {
    let (mut a, mut b) = pair(OURS);
    let now = secs(0.0);
    let initiation = a.initiate(now);
    let longer = [&initiation[..], &[0]].concat();
    for message in [
        &initiation[..147],
        &longer,
        &initiation[..92],
        &initiation[..64],
        &[],
    ] {
        assert!(b.handshake(now, message).is_err(), "{}", message.len());
    }
    assert!(b.handshake(now, &initiation).is_ok());
}

#[test]
fn crossing_initiations_complete_without_waiting() {
    for kind in BOTH {
        let (mut a, mut b) = pair(kind);
        let now = secs(0.0);
        let [answer_of_a, answer_of_b] = cross(now, &mut a, &mut b);
        let (outcome, keepalive_a) = a.handshake(now, &answer_of_b).unwrap();
        assert_eq!(outcome.change, Change::Up);
        let (outcome, keepalive_b) = b.handshake(now, &answer_of_a).unwrap();
        assert_eq!(outcome.change, Change::Up);
        assert!(a.ready(now) && b.ready(now));
        assert_eq!(a.open(now, &[&keepalive_b]).report.datagrams, 1);
        assert_eq!(b.open(now, &[&keepalive_a]).report.datagrams, 1);
        for _ in 0..3 {
            let packet = ipv4(90);
            let there = a.seal(now, &packet);
            assert_eq!(
                b.open(now, &[&there]).packets,
                std::slice::from_ref(&packet)
            );
            let back = b.seal(now, &packet);
            assert_eq!(a.open(now, &[&back]).packets, [packet]);
        }
    }
}

#[test]
fn crossing_initiations_survive_the_loss_of_one_response() {
    for kind in BOTH {
        let (mut a, mut b) = pair(kind);
        let now = secs(0.0);
        let [_lost, answer_of_b] = cross(now, &mut a, &mut b);
        let (_, keepalive) = a.handshake(now, &answer_of_b).unwrap();
        assert_eq!(b.open(now, &[&keepalive]).report.change, Change::Up);
        assert!(a.ready(now) && b.ready(now));
    }
}

/// `Tunn` has forgotten its own timer here; ours, and the one beside `Tunn`, bring a new initiation.
#[test]
fn crossing_initiations_survive_the_loss_of_both_responses() {
    for kind in BOTH {
        let (mut a, mut b) = pair(kind);
        let now = secs(0.0);
        let _lost = cross(now, &mut a, &mut b);
        assert_eq!(a.step(secs(4.0)).1, None);
        let (outcome, message) = a.step(secs(5.4));
        assert!(outcome.handshake);
        let (_, response) = b.handshake(secs(5.4), &message.unwrap()).unwrap();
        let (outcome, _) = a.handshake(secs(5.4), &response).unwrap();
        assert_eq!(outcome.change, Change::Up);
    }
}

#[test]
fn an_initiation_is_not_repeated_at_once_but_for_a_new_path() {
    for kind in BOTH {
        let (mut a, _) = pair(kind);
        a.initiate(secs(0.0));
        assert_eq!(a.try_initiate(secs(1.0), false), None);
        a.initiate(secs(1.0));
        assert_eq!(a.try_initiate(secs(1.05), true), None);
        assert!(a.try_initiate(secs(1.1), true).is_some());
    }
}

#[test]
fn a_second_handshake_replaces_the_keys_while_data_flows() {
    for kind in BOTH {
        let (mut a, mut b) = joined(kind);
        let later = secs(10.0);
        let old = a.seal(later, &ipv4(60));
        shake(later, &mut b, &mut a);
        let new = a.seal(later, &ipv4(61));
        assert_ne!(old[4..8], new[4..8], "another receiver index");
        let got = b.open(later, &[&old]);
        assert_eq!((got.packets.len(), got.dropped.len()), (1, 0), "old keys");
        assert_eq!(b.open(later, &[&new]).packets.len(), 1);
    }
}

#[test]
fn a_run_of_many_datagrams_is_opened_whole_and_in_order() {
    let (mut a, mut b) = joined(OURS);
    let now = secs(0.0);
    // More than one batch of the AEAD, the last datagram shorter.
    let mut sent: Vec<Vec<u8>> = (0..300u16)
        .map(|i| {
            let mut packet = ipv4(100);
            packet[4..6].copy_from_slice(&i.to_be_bytes());
            packet
        })
        .collect();
    sent.push(ipv4(30));
    let datagrams: Vec<Vec<u8>> = sent.iter().map(|packet| a.seal(now, packet)).collect();
    let datagrams: Vec<&[u8]> = datagrams.iter().map(Vec::as_slice).collect();
    let got = b.open(now, &datagrams);
    assert_eq!(got.packets, sent);
    assert_eq!(got.report.datagrams, 301);
    let again = b.open(now, &datagrams);
    assert_eq!(again.report, OpenReport::default());
    assert_eq!(again.dropped, [DropReason::Replayed; 301]);
}
