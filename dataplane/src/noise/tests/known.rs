//! Whole handshakes made by wireguard-go (2026-05) with a dictated source of randomness, without
//! and with a preshared key: every byte of every message and key.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::*;
use crate::noise::cookie::CookieChecker;

/// Lines of a name and hexadecimal bytes; each transcript starts with the preshared key.
const TRANSCRIPTS: &str = include_str!("transcripts.txt");

fn transcripts() -> Vec<HashMap<&'static str, Vec<u8>>> {
    let mut all = Vec::new();
    for line in TRANSCRIPTS.lines() {
        let (name, hex) = line.split_once(' ').expect("a name and its value");
        if name == "psk" {
            all.push(HashMap::new());
        }
        let bytes = (0..hex.len() / 2)
            .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
            .collect();
        all.last_mut().unwrap().insert(name, bytes);
    }
    all
}

fn array<const LEN: usize>(bytes: &[u8]) -> [u8; LEN] {
    bytes.try_into().unwrap()
}

fn index(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(array(&bytes[4..8]))
}

#[test]
fn every_byte_of_a_handshake_is_as_wireguard_go_makes_it() {
    let transcripts = transcripts();
    assert_eq!(transcripts.len(), 2);
    for known in &transcripts {
        let initiator = LocalKeys::new(&array(&known["static_i"]));
        let responder = LocalKeys::new(&array(&known["static_r"]));
        let preshared = array(&known["psk"]);
        let towards_responder = Remote::new(&initiator, responder.public(), Some(&preshared));
        let towards_initiator = Remote::new(&responder, initiator.public(), Some(&preshared));
        let timestamp = Tai64n(array(&known["timestamp"]));

        let mut message = [0; 148];
        let initiated = initiation(
            &initiator,
            &towards_responder,
            index(&known["initiation"]),
            timestamp,
            None,
            &mut Dictated(known["ephemeral_i"].clone()),
            &mut message,
        )
        .unwrap();
        assert_eq!(message[..], known["initiation"]);

        let peeked = peek_initiation(&responder, &message).unwrap();
        let received = consume_initiation(&peeked, &towards_initiator).unwrap();
        assert_eq!(received.timestamp(), timestamp);
        let mut answer = [0; 92];
        let (theirs, _mac1) = response(
            &towards_initiator,
            received,
            index(&known["response"]),
            None,
            &mut Dictated(known["ephemeral_r"].clone()),
            &mut answer,
        )
        .unwrap();
        assert_eq!(answer[..], known["response"]);

        let ours = consume_response(&initiator, &towards_responder, &initiated, &answer).unwrap();
        assert_joined(&ours, &theirs);
        assert_eq!(ours.send[..], known["key_i_to_r"]);
        assert_eq!(ours.receive[..], known["key_r_to_i"]);
    }
}

#[test]
fn every_byte_of_a_cookie_is_as_wireguard_go_makes_it() {
    let now = now();
    let from: SocketAddr = "192.0.2.1:51820".parse().unwrap();
    for known in transcripts() {
        let initiator = LocalKeys::new(&array(&known["static_i"]));
        let responder = LocalKeys::new(&array(&known["static_r"]));
        let remote = Remote::new(&initiator, responder.public(), None);
        let message = &known["initiation"];
        let mac1 = array(&message[116..132]);

        let mut randomness = known["cookie_secret"].clone();
        randomness.extend_from_slice(&known["cookie_reply"][8..32]);
        let mut rng = Dictated(randomness);
        let mut checker = CookieChecker::default();
        let mut reply = [0; 64];
        checker.reply(
            now,
            from,
            &responder,
            index(message),
            &mac1,
            &mut rng,
            &mut reply,
        );
        assert_eq!(reply[..], known["cookie_reply"]);

        let cookie = consume_cookie_reply(&remote, &reply, &mac1).unwrap();
        assert_eq!(cookie.0[..], known["cookie"]);
        let mut again = [0; 148];
        initiation(
            &initiator,
            &remote,
            index(message),
            Tai64n(array(&known["timestamp"])),
            Some(&cookie),
            &mut Dictated(known["ephemeral_i"].clone()),
            &mut again,
        )
        .unwrap();
        assert_eq!(again[..], known["initiation_mac2"]);
        assert!(checker.check(now, from, &again, &mut rng));
        assert!(!checker.check(now, from, message, &mut rng));
    }
}
