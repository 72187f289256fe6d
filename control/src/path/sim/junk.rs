//! Malformed, forged, misdirected and random input: dropped under its name, nothing else happens.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use ringtail_dataplane::PeerId;

use super::script::{C1, Out, REGION, Script, addr, ms, twin};
use crate::disco::{Message, SharedKey};
use crate::key::{DiscoPrivate, NodePrivate};
use crate::path::{Config, Drop, Event, PeerSetup, StateName};

fn count(script: &Script, drop: Drop) -> u64 {
    let mut named = script.paths.drops();
    named
        .find_map(|(name, count)| (name == drop.name()).then_some(count))
        .unwrap()
}

#[test]
fn every_kind_of_junk_is_counted_under_its_name_and_answered_by_nothing() {
    let mut script = Script::new(Config::default(), &[]);
    let stranger = DiscoPrivate::clamped([9; 32]);
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
        let result = script.udp(addr(from), bytes);
        assert_eq!(result, Err(drop), "{name}");
        assert_eq!(count(&script, drop), 1, "{name}");
    }
    let stranger = NodePrivate::clamped([8; 32]).public();
    let result = script.relayed(stranger, &called);
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
        node_key: NodePrivate::clamped([8; 32]).public(),
        disco_key: Some(DiscoPrivate::clamped([9; 32]).public()),
        ..script.setup.clone()
    };
    let both = [script.setup.clone(), other.clone()];
    script.set_peers(&both);
    let call = script.seal(&Message::CallMeMaybe { endpoints: vec![] });
    let result = script.relayed(other.node_key, &call);
    assert_eq!(result, Err(Drop::WrongRelaySource));
}

#[test]
fn two_nodes_of_one_process_share_a_disco_key_and_the_hint_tells_them_apart() {
    let mut script = Script::new(Config::default(), &[]);
    let twin = twin(&script);
    script.set_peers(&[script.setup.clone(), twin.clone()]);
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
    let stranger = NodePrivate::clamped([7; 32]).public();
    assert_eq!(ping(Some(stranger), 3, "198.51.100.3:1"), (true, true));
}

#[test]
fn who_goes_takes_nothing_from_another_with_the_same_disco_key() {
    let mut script = Script::new(Config::default(), &[C1]);
    let twin = twin(&script);
    script.set_peers(std::slice::from_ref(&twin));
    script.data();
    let (ours, theirs) = (script.setup.node_key, twin.node_key);
    let heard = |script: &mut Script, from| {
        let call = script.seal(&Message::CallMeMaybe { endpoints: vec![] });
        script.relayed(from, &call)
    };
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
    script.set_peers(&[other]);
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
    let fresh = DiscoPrivate::clamped([77; 32]);
    script.setup.disco_key = Some(fresh.public());
    script.set_peers(&[script.setup.clone()]);
    let old = script.seal(&Message::CallMeMaybe { endpoints: vec![] });
    let node_key = script.setup.node_key;
    let relayed = script.relayed(node_key, &old);
    assert_eq!(relayed, Err(Drop::UnknownSender));
    let ours = script
        .paths
        .poll_transmit()
        .expect("a new round starts at once");
    let from = crate::disco::sender(&ours.bytes).unwrap();
    let secret = SharedKey::new(&fresh, &from).unwrap();
    assert!(secret.open(&ours.bytes).is_ok());
}

/// A flood that bears the peer's key, which is no secret, from everywhere.
#[test]
fn a_flood_of_forgeries_costs_little_and_shuts_out_nobody() {
    let mut script = Script::new(Config::default(), &[C1]);
    script.answer(C1, ms(15));
    script.data();
    script.run_to(ms(5000));
    assert_eq!(script.status().state, StateName::Direct);
    let direct_at = script.now - script.start - script.status().since;
    let ping = script.their_ping();
    let mut forged = script.seal(&ping);
    for tenth in 50..80 {
        script.run_to(ms(tenth * 100));
        for n in 0..10_000_u32 {
            // Nonces like any other.
            forged[38..42].copy_from_slice(&n.to_be_bytes());
            forged[42..46].copy_from_slice(&u32::try_from(tenth).unwrap().to_be_bytes());
            let from = std::net::SocketAddr::from(((0xc612_0000 + n).to_be_bytes(), 7));
            let result = script.udp(from, &forged);
            assert!(matches!(result, Err(Drop::Forged | Drop::OpenRate)));
        }
        // Its own Pings are answered in the middle of it, by UDP from where it is known, and by relay.
        script.receive_ping(C1);
        let ping = script.their_ping();
        script.receive_relayed(&ping).unwrap();
    }
    let (opened, refused) = (count(&script, Drop::Forged), count(&script, Drop::OpenRate));
    assert!(opened <= 3500, "{opened} of 300,000 were opened");
    assert_eq!(opened + refused, 300_000);
    // Time goes on: heartbeats are answered, and the path stays.
    script.run_with_data(ms(15_000), ms(100));
    assert_eq!(script.status().state, StateName::Direct);
    assert_eq!(script.status().since, script.now - script.start - direct_at);
}

#[test]
fn what_was_recorded_is_not_taken_twice_wherever_it_comes_from() {
    let mut script = Script::new(Config::default(), &[]);
    let recorded: Vec<_> = (0..100)
        .map(|_| {
            let ping = script.their_ping();
            script.seal(&ping)
        })
        .collect();
    for (n, ping) in recorded.iter().enumerate() {
        script.run_to(ms(3000 * u64::try_from(n).unwrap()));
        script.udp(addr(C1), ping).unwrap();
    }
    let candidates = script.status().candidates.len();
    for port in 1..=1000 {
        let from = std::net::SocketAddr::from(([203, 0, 113, 7], port));
        for ping in &recorded {
            let result = script.udp(from, ping);
            assert_eq!(result, Err(Drop::Replayed));
        }
    }
    assert_eq!(script.status().candidates.len(), candidates);
    assert_eq!(
        count(&script, Drop::Forged) + count(&script, Drop::PongRate),
        0
    );
    // A table that is told anew changes nothing about that.
    script.set_peers(&[script.setup.clone()]);
    let again = script.udp(addr(C1), &recorded[99]);
    assert_eq!(again, Err(Drop::Replayed));
}

#[test]
fn a_peer_that_calls_all_the_time_is_heard_ten_times_a_second() {
    let mut script = Script::new(Config::default(), &[]);
    let mut taken = 0;
    for ms_at in 0..3000_u64 {
        script.run_to(ms(ms_at));
        let host = u8::try_from(ms_at % 250).unwrap();
        let endpoints = (1..=64).map(|port| ([198, 51, 100, host], port).into());
        let call = Message::CallMeMaybe {
            endpoints: endpoints.collect(),
        };
        taken += u32::from(script.receive_relayed(&call).is_ok());
    }
    assert!((30..=41).contains(&taken), "{taken}");
    assert_eq!(count(&script, Drop::CallRate), 3000 - u64::from(taken));
    let pings = script
        .out
        .iter()
        .filter(|(_, out)| matches!(out, Out::Ping(_)));
    assert!(pings.count() <= 50 * 4);
}

#[test]
fn strangers_on_a_relay_cost_no_opening() {
    let mut script = Script::new(Config::default(), &[]);
    let stranger = NodePrivate::clamped([8; 32]).public();
    let ping = script.their_ping();
    let mut forged = script.seal(&ping);
    for n in 0..2000_u32 {
        forged[38..42].copy_from_slice(&n.to_be_bytes());
        let result = script.relayed(stranger, &forged);
        assert_eq!(result, Err(Drop::WrongRelaySource));
    }
    // Had they been opened, there would be nothing left for the peer itself.
    let ping = script.their_ping();
    script.receive_relayed(&ping).unwrap();
    script.receive_ping(C1);
    assert_eq!(
        count(&script, Drop::OpenRate) + count(&script, Drop::Forged),
        0
    );
}

#[test]
fn random_and_mutated_datagrams_and_orders_of_verbs_never_panic_nor_spin() {
    for seed in 0..4 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let mut script = Script::new(Config::default(), &[C1, "[2001:db8::1]:5"]);
        script.answer_some(C1, ms(15), |count, _| count % 7 != 0);
        let secret = {
            let ours = DiscoPrivate::clamped([2; 32]).public();
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
            let mut bytes = secret.seal(&script.their_disco.public(), rng.random(), &message);
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
            let (node, node_id) = (script.setup.node_key, script.setup.id);
            match rng.random_range(0..8) {
                0 | 1 => drop(script.udp(from, &bytes)),
                2 | 3 => drop(script.relayed(node, &bytes)),
                4 => script.data(),
                5 => script.refresh(),
                6 => {
                    let errno = [1, 90, 101, 113, 5][rng.random_range(0..5)];
                    script
                        .paths
                        .handle_send_error(script.now, node_id, addr(C1), errno);
                }
                _ => {
                    script.setup.home = rng.random::<bool>().then_some(REGION);
                    script.set_peers(&[script.setup.clone()]);
                    let _ = script.paths.ping(script.now, script.setup.id);
                }
            }
            assert!(script.status().candidates.len() <= crate::path::CANDIDATES_MAX);
        }
    }
}
