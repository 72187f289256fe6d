//! Malformed, forged, misdirected and random input: dropped under its name, nothing else happens.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use ringtail_dataplane::channel::PeerId;

use super::script::{REGION, Script, addr, ms};
use crate::disco::{Message, NONCE_LEN, SharedKey};
use crate::key::{DiscoPrivate, NodePrivate};
use crate::path::{Config, Drop, Event, PeerSetup, StateName};

const C1: &str = "198.51.100.1:41641";

fn count(script: &Script, drop: Drop) -> u64 {
    let mut named = script.paths.drops();
    named
        .find_map(|(name, count)| (name == drop.name()).then_some(count))
        .unwrap()
}

#[test]
fn every_kind_of_junk_is_counted_under_its_name_and_answered_by_nothing() {
    let mut script = Script::new(Config::default(), &[]);
    let stranger = DiscoPrivate::from_random([9; 32]);
    let tx_id = [1; 12];
    let source = addr(C1);
    let call = Message::CallMeMaybe {
        endpoints: vec![source],
    };
    let sealed = script.seal(&Message::Pong { tx_id, source });
    let their_ping = script.their_ping();
    let ping = script.seal(&their_ping);
    let mut forged = sealed.clone();
    forged[90] ^= 1;
    let mut unknown = sealed.clone();
    unknown[6..38].copy_from_slice(&stranger.public().0);
    let geneve = [&[0, 0, 0x7a, 0x11, 0, 0xab, 0xcd, 0][..], &sealed].concat();
    let called = script.seal(&call);
    let loopback = "127.0.0.1:9";
    for (name, from, bytes, drop) in [
        ("random", C1, &b"junk"[..], Drop::NotDisco),
        ("geneve", C1, &geneve, Drop::PeerRelay),
        ("stranger", C1, &unknown, Drop::UnknownSender),
        ("forged", C1, &forged, Drop::Forged),
        ("cut off", C1, &sealed[..61], Drop::Malformed),
        ("unasked Pong", C1, &sealed, Drop::UnknownPong),
        ("call over UDP", C1, &called, Drop::CallMeMaybeOverUdp),
        ("from nowhere", loopback, &ping, Drop::BadSource),
    ] {
        let result = script.paths.handle_datagram(script.now, addr(from), bytes);
        assert_eq!(result, Err(drop), "{name}");
        assert_eq!(count(&script, drop), 1, "{name}");
    }
    let stranger = NodePrivate::from_random([8; 32]).public();
    let result = script
        .paths
        .handle_relayed(script.now, REGION, stranger, &called);
    assert_eq!(result, Err(Drop::WrongRelaySource));
    script.run_to(ms(10_000));
    assert_eq!((script.out.len(), script.decisions.len()), (0, 1));
    let stories = script
        .events
        .iter()
        .filter(|(_, e)| matches!(e, Event::Story { .. }));
    assert_eq!(stories.count(), 0);
    assert_eq!(script.status().state, StateName::Relay);
}

#[test]
fn a_relayed_message_must_come_from_the_node_that_owns_the_key() {
    let mut script = Script::new(Config::default(), &[]);
    let other = PeerSetup {
        id: PeerId(1),
        node_key: NodePrivate::from_random([8; 32]).public(),
        disco_key: Some(DiscoPrivate::from_random([9; 32]).public()),
        ..script.setup.clone()
    };
    let both = [script.setup.clone(), other.clone()];
    script.paths.set_peers(script.now, &both, &[]);
    let call = script.seal(&Message::CallMeMaybe { endpoints: vec![] });
    let result = script
        .paths
        .handle_relayed(script.now, REGION, other.node_key, &call);
    assert_eq!(result, Err(Drop::WrongRelaySource));
}

#[test]
fn two_nodes_of_one_process_share_a_disco_key_and_the_hint_tells_them_apart() {
    let mut script = Script::new(Config::default(), &[]);
    let twin = PeerSetup {
        id: PeerId(1),
        node_key: NodePrivate::from_random([8; 32]).public(),
        ..script.setup.clone()
    };
    script
        .paths
        .set_peers(script.now, &[script.setup.clone(), twin.clone()], &[]);
    let mut ping = |node_key, n: u8, from: &str| {
        let message = Message::Ping {
            tx_id: [n; 12],
            node_key,
            padding: 0,
        };
        script.receive(addr(from), &message).unwrap();
        let known = |id| {
            let status = script.paths.status(script.now, PeerId(id)).unwrap();
            status.candidates.iter().any(|(at, _)| *at == addr(from))
        };
        (known(0), known(1))
    };
    assert_eq!(
        ping(Some(twin.node_key), 1, "198.51.100.1:1"),
        (false, true)
    );
    assert_eq!(ping(None, 2, "198.51.100.2:1"), (true, true));
    let stranger = NodePrivate::from_random([7; 32]).public();
    assert_eq!(ping(Some(stranger), 3, "198.51.100.3:1"), (true, true));
}

#[test]
fn who_goes_takes_nothing_from_another_with_the_same_disco_key() {
    let mut script = Script::new(Config::default(), &[C1]);
    let twin = PeerSetup {
        id: PeerId(1),
        node_key: NodePrivate::from_random([8; 32]).public(),
        ..script.setup.clone()
    };
    script
        .paths
        .set_peers(script.now, std::slice::from_ref(&twin), &[]);
    script.data();
    let call = script.seal(&Message::CallMeMaybe { endpoints: vec![] });
    let (ours, theirs) = (script.setup.node_key, twin.node_key);
    let heard =
        |script: &mut Script, from| script.paths.handle_relayed(script.now, REGION, from, &call);
    assert_eq!(heard(&mut script, ours), Ok(()));
    assert_eq!(heard(&mut script, theirs), Ok(()));
    script.paths.set_peers(script.now, &[], &[PeerId(1)]);
    assert_eq!(heard(&mut script, ours), Ok(()));
    assert_eq!(heard(&mut script, theirs), Err(Drop::WrongRelaySource));
    // Another node under the id of one that was: nothing of the first is left.
    let other = PeerSetup {
        id: script.setup.id,
        disco_key: None,
        ..twin
    };
    script.paths.set_peers(script.now, &[other], &[]);
    assert_eq!(heard(&mut script, ours), Err(Drop::UnknownSender));
    assert_eq!(script.paths.peer_of(&ours), None);
    assert_eq!(script.paths.peer_of(&theirs), Some(PeerId(0)));
    script.paths.set_peers(script.now, &[], &[PeerId(0)]);
    assert_eq!(script.paths.poll_timeout(), None);
    assert!(script.paths.poll_decision().is_none());
}

#[test]
fn a_new_disco_key_of_a_peer_is_used_at_once() {
    let mut script = Script::new(Config::default(), &[C1]);
    script.data();
    script.run_to(ms(2000));
    let fresh = DiscoPrivate::from_random([77; 32]);
    script.setup.disco_key = Some(fresh.public());
    script
        .paths
        .set_peers(script.now, &[script.setup.clone()], &[]);
    let old = script.seal(&Message::CallMeMaybe { endpoints: vec![] });
    let node_key = script.setup.node_key;
    let relayed = script
        .paths
        .handle_relayed(script.now, REGION, node_key, &old);
    assert_eq!(relayed, Err(Drop::UnknownSender));
    let ours = script
        .paths
        .poll_transmit()
        .expect("a new round starts at once");
    let from = crate::disco::sender(&ours.bytes).unwrap();
    let secret = SharedKey::new(&fresh, &from).unwrap();
    assert!(secret.open(&ours.bytes).is_ok());
}

#[test]
fn random_and_mutated_datagrams_and_orders_of_verbs_never_panic_nor_spin() {
    for seed in 0..4 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let mut script = Script::new(Config::default(), &[C1, "[2001:db8::1]:5"]);
        script.answer_some(C1, ms(15), |count, _| count % 7 != 0);
        let secret = {
            let ours = DiscoPrivate::from_random([2; 32]).public();
            SharedKey::new(&script.their_disco, &ours).unwrap()
        };
        let mut at = 0;
        for _ in 0..4000 {
            at += rng.random_range(0..400);
            script.run_to(ms(at));
            let tx_id = [rng.random_range(0..4); 12];
            let host: u8 = rng.random_range(0..200);
            let from = std::net::SocketAddr::from(([198, 51, 100, host], 1));
            let message = match rng.random_range(0..3) {
                0 => Message::Ping {
                    tx_id,
                    node_key: None,
                    padding: rng.random_range(0..32),
                },
                1 => Message::Pong {
                    tx_id,
                    source: from,
                },
                _ => Message::CallMeMaybe {
                    endpoints: vec![from; rng.random_range(0..100)],
                },
            };
            let mut bytes = secret.seal(&script.their_disco.public(), [3; NONCE_LEN], &message);
            if rng.random() {
                let len = rng.random_range(0..=bytes.len());
                bytes.truncate(len);
                for byte in &mut bytes {
                    *byte ^= if rng.random_range(0..40) == 0 {
                        rng.random()
                    } else {
                        0
                    };
                }
            }
            let node = script.setup.node_key;
            match rng.random_range(0..8) {
                0 | 1 => drop(script.paths.handle_datagram(script.now, from, &bytes)),
                2 | 3 => drop(
                    script
                        .paths
                        .handle_relayed(script.now, REGION, node, &bytes),
                ),
                4 => script.data(),
                5 => script.refresh(),
                6 => {
                    let errno = [1, 90, 101, 113, 5][rng.random_range(0..5)];
                    script.paths.handle_send_error(script.now, addr(C1), errno);
                }
                _ => {
                    script.setup.home = rng.random::<bool>().then_some(REGION);
                    script
                        .paths
                        .set_peers(script.now, &[script.setup.clone()], &[]);
                    let _ = script.paths.ping(script.now, script.setup.id);
                }
            }
            assert!(script.status().candidates.len() <= crate::path::CANDIDATES_MAX);
        }
    }
}
