use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use ringtail_dataplane::stats::DropReason;
use ringtail_dataplane::{Class, classify};
use serde_json::Value;

use super::*;

fn vectors() -> Value {
    serde_json::from_str(include_str!("../../tests/vectors/p2p-vectors.json")).unwrap()
}

fn bytes(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap()).unwrap()
}

fn private(value: &Value) -> DiscoPrivate {
    DiscoPrivate::clamped(bytes(value).try_into().unwrap())
}

fn nonce(vectors: &Value) -> [u8; NONCE_LEN] {
    bytes(&vectors["nonce"]).try_into().unwrap()
}

/// The shared key of a vector's route, and its sender's public key.
fn route(vectors: &Value, name: &str) -> (SharedKey, DiscoPublic) {
    let route = &vectors["disco_route"][name];
    let key = |end: usize| &vectors["keys"][route[end].as_str().unwrap()]["private"];
    let (from, to) = (private(key(0)), private(key(1)));
    (SharedKey::new(&from, &to.public()).unwrap(), from.public())
}

const SPOKEN: [&str; 8] = [
    "ping_minimal",
    "ping",
    "ping_padded_1332",
    "pong_v4",
    "pong_v6",
    "pong_over_derp_region_1",
    "call_me_maybe_empty",
    "call_me_maybe",
];

#[test]
fn every_spoken_vector_parses_encodes_seals_and_opens() {
    let vectors = vectors();
    for name in SPOKEN {
        let plain = bytes(&vectors["disco_plain"][name]);
        let sealed = bytes(&vectors["disco_sealed"][name]);
        let (key, from) = route(&vectors, name);
        let message = Message::parse(&plain).unwrap();
        let mut again = Vec::new();
        message.encode(&mut again);
        assert_eq!(again, plain, "{name}");
        assert_eq!(message.encoded_len(), plain.len(), "{name}");
        assert_eq!(key.seal(&from, nonce(&vectors), &message), sealed, "{name}");
        assert_eq!(key.open(&sealed).unwrap(), plain, "{name}");
        assert_eq!(sender(&sealed), Some(from), "{name}");
        assert_eq!(classify(&sealed), Class::Disco, "{name}");
    }
}

#[test]
fn the_vectors_say_what_they_should() {
    let vectors = vectors();
    let parse = |name: &str| Message::parse(&bytes(&vectors["disco_plain"][name])).unwrap();
    let tx_id = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
    let node = NodePublic(
        bytes(&vectors["keys"]["node_a"]["public"])
            .try_into()
            .unwrap(),
    );
    for (name, source) in [
        ("pong_v4", "203.0.113.7:41641"),
        ("pong_v6", "[2001:db8::7]:41641"),
        ("pong_over_derp_region_1", "127.3.3.40:1"),
    ] {
        let source = source.parse().unwrap();
        assert_eq!(parse(name), Message::Pong { tx_id, source });
    }
    let ping = |node_key, padding| Message::Ping {
        tx_id,
        node_key,
        padding,
    };
    assert_eq!(parse("ping_minimal"), ping(None, 0));
    assert_eq!(parse("ping"), ping(Some(node), 0));
    assert_eq!(
        parse("ping_padded_1332"),
        ping(Some(node), ping_padding(1332))
    );
    let endpoints = [
        "203.0.113.7:41641",
        "192.168.1.10:41641",
        "[2001:db8::7]:41641",
    ]
    .map(|text| text.parse().unwrap())
    .to_vec();
    assert_eq!(parse("call_me_maybe"), Message::CallMeMaybe { endpoints });
}

#[test]
fn peer_relay_messages_open_and_are_told_apart() {
    let vectors = vectors();
    let mut seen = 0;
    for (name, plain) in vectors["disco_plain"].as_object().unwrap() {
        if SPOKEN.contains(&name.as_str()) {
            continue;
        }
        seen += 1;
        let (key, _) = route(&vectors, name);
        let sealed = bytes(&vectors["disco_sealed"][name]);
        assert_eq!(key.open(&sealed).unwrap(), bytes(plain), "{name}");
        assert_eq!(Message::parse(&bytes(plain)), Err(ParseError::PeerRelay));
    }
    assert_eq!(seen, 6);
}

#[test]
fn datagrams_are_classified_by_their_first_bytes() {
    let vectors = vectors();
    for (name, datagram) in vectors["geneve"].as_object().unwrap() {
        assert_eq!(classify(&bytes(datagram)), Class::PeerRelay, "{name}");
    }
    assert_eq!(classify(&bytes(&vectors["stun"]["request"])), Class::Stun);
    let mut other_method = bytes(&vectors["stun"]["request"]);
    other_method[1] = 3;
    let unknown = Class::Invalid(DropReason::UnknownMessage);
    assert_eq!(classify(&other_method), unknown);
    for first in 1..=4 {
        let short = Class::Invalid(DropReason::MessageLength);
        assert_eq!(classify(&[first, 0, 0, 0, 9, 9, 9, 9, 9]), short);
    }
    assert_eq!(classify(&DISCO_MAGIC), unknown);
    assert_eq!(classify(b""), unknown);
}

#[test]
fn what_tailscaled_sent_opens_with_either_key_and_encodes_back() {
    let recorded: Value =
        serde_json::from_str(include_str!("../../tests/vectors/disco-datagrams.json")).unwrap();
    let keys: Vec<DiscoPrivate> = recorded["disco_keys"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| private(&pair["private"]))
        .collect();
    let datagrams = recorded["datagrams"].as_array().unwrap();
    assert!(datagrams.len() > 8);
    for datagram in datagrams {
        let packet = bytes(&datagram["packet"]);
        let from = sender(&packet).unwrap();
        assert_eq!(from.to_hex(), datagram["from"].as_str().unwrap());
        let mut plains = Vec::new();
        for (ours, theirs) in [(0, 1), (1, 0)] {
            let key = SharedKey::new(&keys[ours], &keys[theirs].public()).unwrap();
            plains.push(key.open(&packet).unwrap());
            let message = Message::parse(&plains[0]).unwrap();
            let nonce = packet[NONCE_AT..TAG_AT].try_into().unwrap();
            assert_eq!(key.seal(&from, nonce, &message), packet);
            let kind = match message {
                Message::Ping { .. } => "Ping",
                Message::Pong { .. } => "Pong",
                Message::CallMeMaybe { .. } => "CallMeMaybe",
            };
            assert_eq!(datagram["type"], kind);
        }
        assert_eq!(plains[0], plains[1]);
    }
}

#[test]
fn flipping_any_bit_of_tag_nonce_or_key_closes_the_box() {
    let vectors = vectors();
    let sealed = bytes(&vectors["disco_sealed"]["pong_v4"]);
    let (key, from) = route(&vectors, "pong_v4");
    for bit in NONCE_AT * 8..sealed.len() * 8 {
        let mut damaged = sealed.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(key.open(&damaged), Err(OpenError::Forged), "bit {bit}");
    }
    for bit in KEY_AT * 8..NONCE_AT * 8 {
        let mut damaged = sealed.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert_ne!(sender(&damaged), Some(from), "bit {bit}");
    }
    for len in 0..BODY_AT {
        assert_eq!(key.open(&sealed[..len]), Err(OpenError::Short));
    }
    assert!(SharedKey::new(&DiscoPrivate::clamped([7; 32]), &DiscoPublic([0; 32])).is_none());
}

#[test]
fn cut_odd_and_unknown_messages_end_as_the_page_says() {
    let ping = |len: usize| [&[1, 0], vec![9; len].as_slice()].concat();
    for short in [
        &[][..],
        &[1],
        &ping(11),
        &[2, 0],
        &[&[2, 0], &[9; 29][..]].concat(),
    ] {
        assert_eq!(Message::parse(short), Err(ParseError::Short));
    }
    assert!(Message::parse(&ping(12)).is_ok());
    let empty = Message::CallMeMaybe { endpoints: vec![] };
    let odd = [&[3, 0], &[9; 19][..]].concat();
    let other_version = [&[3, 1], &[9; 18][..]].concat();
    assert_eq!(Message::parse(&odd).unwrap(), empty);
    assert_eq!(Message::parse(&other_version).unwrap(), empty);
    for kind in [0x00, 0x0a, 0xff] {
        assert_eq!(Message::parse(&[kind, 0]), Err(ParseError::UnknownType));
    }
}

#[test]
fn random_bytes_never_panic() {
    let mut rng = StdRng::seed_from_u64(0xd15c0);
    let key = SharedKey::new(
        &DiscoPrivate::clamped([1; 32]),
        &DiscoPrivate::clamped([2; 32]).public(),
    )
    .unwrap();
    for _ in 0..20_000 {
        let mut bytes = vec![0; rng.random_range(0..200)];
        bytes.iter_mut().for_each(|byte| *byte = rng.random());
        let _ = (classify(&bytes), sender(&bytes), key.open(&bytes));
        if let Some(kind) = bytes.first_mut() {
            *kind %= 12;
        }
        let _ = (classify(&bytes), Message::parse(&bytes));
    }
}
