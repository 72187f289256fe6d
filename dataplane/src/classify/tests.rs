use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

use super::*;

fn message(kind: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0x77; len];
    bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
    bytes
}

#[test]
fn wireguard_messages_are_told_by_type_and_length() {
    let wrong = Class::Invalid(DropReason::MessageLength);
    for (kind, len, want) in [
        (1, 148, Class::Handshake),
        (1, 147, wrong),
        (1, 149, wrong),
        (2, 92, Class::Handshake),
        (2, 91, wrong),
        (2, 148, wrong),
        (3, 64, Class::Handshake),
        (3, 63, wrong),
        (4, 4, wrong),
        (4, 7, wrong),
        (4, 31, wrong),
        (4, 32, Class::Data(0x7777_7777)),
        (4, 33, Class::Data(0x7777_7777)),
        (4, 65_507, Class::Data(0x7777_7777)),
        (0, 148, Class::Invalid(DropReason::UnknownMessage)),
        (5, 148, Class::Invalid(DropReason::UnknownMessage)),
    ] {
        assert_eq!(
            classify(&message(kind, len)),
            want,
            "type {kind}, {len} bytes"
        );
    }
    let mut reserved = message(4, 100);
    reserved[2] = 1;
    assert_eq!(
        classify(&reserved),
        Class::Invalid(DropReason::UnknownMessage)
    );
}

#[test]
fn a_receiver_index_names_its_owner_in_bits_8_to_15() {
    let mut bytes = message(4, 32);
    bytes[4..16].copy_from_slice(&[0x78, 0x56, 0x34, 0x12, 1, 2, 0, 0, 0, 0, 0, 0x80]);
    assert_eq!(classify(&bytes), Class::Data(0x1234_5678));
    // The byte that the socket steering program reads: payload byte 5.
    assert_eq!(owner_shard(0x1234_5678), bytes[5]);
    assert_eq!(data_counter(&bytes), Some(0x8000_0000_0000_0201));
    assert_eq!(data_counter(&bytes[..15]), None);
}

fn unhex(text: &str) -> Vec<u8> {
    let text: String = text.split_whitespace().collect();
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
        .collect()
}

/// Whole datagrams of Tailscale nodes and relays: `disco.md` §8 and §11, `stun.md` §1 and §3.
#[test]
fn recorded_disco_and_stun_datagrams_are_told_apart() {
    let pong = unhex(
        "5453f09f92ac 258c93efd4d5a2852d15f09ef1a60e7b595840c374cd0aaafd8ba0208511673f
         000102030405060708090a0b0c0d0e0f1011121314151617 9138b64d308d28e678f9174381272cbd
         0539a636994426378e8883850c2b5544db80fd0a85a67bdfda803bd58a82374a",
    );
    assert_eq!(pong.len(), 110);
    assert_eq!(classify(&pong), Class::Disco);
    let request = unhex(
        "00010014 2112a442 000102030405060708090a0b 80220008 7461696c6e6f6465 80280004 00000000",
    );
    assert_eq!(classify(&request), Class::Stun);
    let response = unhex("0101000c 2112a442 000102030405060708090a0b 00200008 0001e1ba ea12d545");
    assert_eq!(classify(&response), Class::Stun);
    // The cookie with a method that is not Binding.
    let mut other = response.clone();
    other[1] = 0x03;
    assert_eq!(classify(&other), Class::Invalid(DropReason::UnknownMessage));
    let mut high = response;
    high[0] = 0x41;
    assert_eq!(classify(&high), Class::Invalid(DropReason::UnknownMessage));
    // Relayed by a peer relay (Geneve): we speak none of it.
    let geneve = unhex("00007a1200abcd00 04000000 78563412 0000000000000000");
    assert_eq!(classify(&geneve), Class::PeerRelay);
    let relayed = [unhex("00007a1100abcd00"), pong].concat();
    assert_eq!(classify(&relayed), Class::PeerRelay);
    assert_eq!(classify(&relayed[..46]), Class::PeerRelay);
    let unknown = Class::Invalid(DropReason::UnknownMessage);
    assert_eq!(classify(&relayed[..45]), unknown);
    for (at, value) in [(0, 0x40), (1, 1), (3, 0x13), (7, 1)] {
        let mut other = relayed.clone();
        other[at] = value;
        assert_eq!(classify(&other), unknown, "byte {at}");
    }
}

#[test]
fn short_datagrams_are_unknown_and_the_shortest_are_exact() {
    let unknown = Class::Invalid(DropReason::UnknownMessage);
    let mut stun = vec![0u8; 20];
    stun[..8].copy_from_slice(&[0x01, 0x01, 0, 0, 0x21, 0x12, 0xa4, 0x42]);
    assert_eq!(classify(&stun), Class::Stun);
    assert_eq!(classify(&stun[..19]), unknown);
    let mut disco = DISCO_MAGIC.to_vec();
    disco.resize(38, 1);
    assert_eq!(classify(&disco), Class::Disco);
    assert_eq!(classify(&disco[..37]), unknown);
    assert_eq!(classify(&[]), unknown);
    assert_eq!(classify(&[4]), unknown);
    assert_eq!(classify(&[4, 0, 0]), unknown);
}

/// `disco.md` §8 in the order it is written there: the oracle.
fn reference(b: &[u8]) -> &'static str {
    let n = b.len();
    if n >= 20 && b[0] & 0xc0 == 0 && b[4..8] == [0x21, 0x12, 0xa4, 0x42] && b[1] == 1 {
        "stun"
    } else if n >= 8 && b[0] & 0xc0 == 0 && b[1] & 0x3f == 0 && b[7] == 0 && b[2] == 0x7a {
        match b[3] {
            0x11 if n >= 46 && b[8..14] == [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac] => "relayed",
            0x12 => "relayed",
            _ => "wireguard",
        }
    } else if n >= 38 && b[..6] == [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac] {
        "disco"
    } else {
        "wireguard"
    }
}

#[test]
fn random_datagrams_agree_with_the_order_of_the_specification() {
    let seed = rand::random::<u64>();
    println!("seed {seed:#x}");
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..100_000 {
        let mut bytes = vec![0u8; rng.random_range(0..160)];
        rng.fill_bytes(&mut bytes);
        for (at, part) in [
            (0, &[1, 1][..]),
            (0, &DISCO_MAGIC),
            (4, &STUN_COOKIE),
            (0, &[0, 0x80, 0x7a, 0x11, 0, 0xab, 0xcd, 0]),
            (3, &[0x12]),
            (8, &DISCO_MAGIC),
            (1, &[0, 0, 0]),
        ] {
            if rng.random_bool(0.4) && bytes.len() >= at + part.len() {
                bytes[at..at + part.len()].copy_from_slice(part);
            }
        }
        let want = match classify(&bytes) {
            Class::Stun => "stun",
            Class::Disco => "disco",
            Class::PeerRelay => "relayed",
            Class::Data(_) | Class::Handshake | Class::Invalid(_) => "wireguard",
        };
        assert_eq!(reference(&bytes), want, "{bytes:02x?}");
    }
}
