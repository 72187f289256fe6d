use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::Value;

use super::*;

const TX_ID: TxId = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

fn vector(name: &str) -> Vec<u8> {
    let all: Value =
        serde_json::from_str(include_str!("../../tests/vectors/p2p-vectors.json")).unwrap();
    hex::decode(all["stun"][name].as_str().unwrap()).unwrap()
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[test]
fn the_request_is_the_one_of_the_vectors_and_our_server_answers_it() {
    assert_eq!(request(TX_ID).as_slice(), vector("request"));
    let v4 = respond(&request(TX_ID), addr("203.0.113.7:41641")).unwrap();
    assert_eq!(v4.as_ref(), vector("response_v4_family1"));
    let mapped = respond(&request(TX_ID), addr("[::ffff:203.0.113.7]:41641")).unwrap();
    assert_eq!(mapped, v4);
    let v6 = respond(&request(TX_ID), addr("[2001:db8::7]:41641")).unwrap();
    assert_eq!(v6.as_ref(), vector("response_v6"));
}

#[test]
fn every_response_of_the_vectors_gives_its_address() {
    for (name, address) in [
        ("response_v4_family1", "203.0.113.7:41641"),
        ("response_v4_as_mapped_v6_family2", "203.0.113.7:41641"),
        ("response_v6", "[2001:db8::7]:41641"),
        ("response_mapped_address_only", "203.0.113.7:41641"),
        ("response_xor_alt_0x8020", "203.0.113.7:41641"),
        ("response_mapped_lies_xor_wins", "203.0.113.7:41641"),
        ("response_software_padding_then_xor", "203.0.113.7:41641"),
        ("response_with_fingerprint", "203.0.113.7:41641"),
        ("response_trailing_garbage", "203.0.113.7:41641"),
    ] {
        let response = parse_response(&vector(name)).unwrap();
        assert_eq!(response.address, addr(address), "{name}");
        assert_eq!(response.tx_id, TX_ID, "{name}");
    }
}

#[test]
fn what_a_client_must_reject_is_rejected_for_its_reason() {
    for (name, error) in [
        ("request", Error::NotSuccess),
        ("bad_length_exceeds_packet", Error::Malformed),
        ("bad_attr_truncated", Error::Malformed),
        ("bad_family", Error::Malformed),
        ("bad_no_address_attr", Error::Malformed),
        ("bad_error_response_0x0111", Error::NotSuccess),
    ] {
        assert_eq!(parse_response(&vector(name)), Err(error), "{name}");
    }
}

#[test]
fn what_a_server_must_not_answer_stays_unanswered() {
    let from = addr("203.0.113.7:41641");
    for name in [
        "request_plain_rfc5389_no_attributes",
        "request_wrong_software",
    ] {
        assert_eq!(respond(&vector(name), from), None, "{name}");
        assert!(respond_to_any(&vector(name), from).is_some(), "{name}");
    }
    assert_eq!(
        respond_to_any(&vector("bad_error_response_0x0111"), from),
        None
    );
}

#[test]
fn stun_is_told_by_the_first_twenty_bytes() {
    let mut bytes = vec![0x20, 0, 0, 0, 0x21, 0x12, 0xa4, 0x42];
    bytes.resize(20, 0);
    assert!(is_stun(&bytes));
    assert!(!is_stun(&bytes[..19]));
    for first in [0x40, 0xf0] {
        bytes[0] = first;
        assert!(!is_stun(&bytes));
    }
}

#[test]
fn derper_answered_what_we_answer_and_with_the_same_bytes() {
    let all: Value =
        serde_json::from_str(include_str!("../../tests/vectors/stun-exchange.json")).unwrap();
    let exchanges = all["exchanges"].as_array().unwrap();
    assert_eq!(exchanges.len(), 19);
    for exchange in exchanges {
        let case = exchange["case"].as_str().unwrap();
        let wildcard = exchange["listener"]
            .as_str()
            .unwrap()
            .starts_with("wildcard");
        let v6 = exchange["client_family"] == 6;
        let ip = match (wildcard, v6) {
            (_, true) => "::1",
            (true, false) => "198.18.0.27",
            (false, false) => "198.18.0.24",
        };
        let port = u16::try_from(exchange["client_port"].as_u64().unwrap()).unwrap();
        let from = SocketAddr::new(ip.parse().unwrap(), port);
        let request = hex::decode(exchange["request"].as_str().unwrap()).unwrap();
        let ours = respond(&request, from);
        let Some(theirs) = exchange["response"].as_str() else {
            assert_eq!(ours, None, "{case}");
            continue;
        };
        let (ours, theirs) = (ours.unwrap(), hex::decode(theirs).unwrap());
        assert_eq!(parse_response(&theirs).unwrap().address, from, "{case}");
        if wildcard && !v6 {
            // A dual-stack derper answers IPv4 clients in family 2; we use family 1.
            assert_eq!(parse_response(ours.as_ref()), parse_response(&theirs));
            assert_eq!(ours.as_ref().len(), 32);
        } else {
            assert_eq!(ours.as_ref(), theirs, "{case}");
        }
    }
}

#[test]
fn random_and_mutated_datagrams_never_panic_and_no_damaged_request_is_answered() {
    let mut rng = StdRng::seed_from_u64(0x57a7);
    let from = addr("203.0.113.7:41641");
    for _ in 0..20_000 {
        let mut bytes = request(TX_ID).to_vec();
        bytes.resize(rng.random_range(0..=80), 0);
        for byte in bytes.iter_mut().skip(if rng.random() { 8 } else { 40 }) {
            *byte = rng.random();
        }
        let _ = parse_response(&bytes);
        let _ = respond_to_any(&bytes, from);
        assert!(bytes == request(TX_ID) || respond(&bytes, from).is_none());
    }
    for at in 0..REQUEST_LEN * 8 {
        // The id is covered by the FINGERPRINT like everything else.
        let mut bytes = request(TX_ID);
        bytes[at / 8] ^= 1 << (at % 8);
        assert_eq!(respond(&bytes, from), None, "bit {at}");
    }
}
