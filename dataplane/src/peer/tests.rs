//! The table: who is kept, and who is called.

use std::time::Duration;

use rand::SeedableRng;
use zeroize::Zeroizing;

use super::*;

fn config(id: u32, key: u8) -> PeerEntry {
    PeerEntry {
        config: Arc::new(PeerConfig {
            id: PeerId(id),
            public_key: [key; 32],
            preshared_key: None,
            allowed_ips: vec![],
            persistent_keepalive: None,
        }),
        shared: Arc::default(),
        owner: 0,
    }
}

fn engine() -> Engine {
    let rng = rand::rngs::StdRng::seed_from_u64(1);
    Engine::new(
        crate::Engine::Ringtail,
        &Zeroizing::new([1; 32]),
        1420,
        0,
        rng,
    )
}

#[expect(clippy::disallowed_methods, reason = "any instant will do")]
fn epoch() -> Instant {
    Instant::now()
}

#[test]
fn an_unchanged_peer_keeps_its_session_and_a_new_key_does_not() {
    let (mut peers, mut engine, now) = (Peers::new(false), engine(), epoch());
    let kept = config(1, 1);
    peers.replace(now, None, [kept.clone(), config(2, 2)].into_iter());
    for id in [PeerId(1), PeerId(2)] {
        assert!(peers.wake(now, id, &mut engine).is_some());
    }
    peers.get(PeerId(2)).unwrap().waiting.push(now, &[0; 30]);
    peers.touch(PeerId(2));
    let entries = [kept, config(2, 9)].into_iter();
    let (wanted, dropped) = peers.replace(now, Some(&mut engine), entries);
    assert_eq!((wanted, dropped), (vec![], 1));
    assert!(peers.get(PeerId(1)).unwrap().session().is_some());
    assert!(peers.get(PeerId(2)).unwrap().session().is_none());
    assert_eq!(peers.next_deadline(), None);
    // Gone and back, and we saw only the last table.
    let entries = [config(1, 1)].into_iter();
    peers.replace(now, Some(&mut engine), entries);
    assert!(peers.get(PeerId(1)).unwrap().session().is_none());
}

#[test]
fn sessions_of_peers_that_go_give_their_indexes_back() {
    let (mut peers, mut engine, now) = (Peers::new(false), engine(), epoch());
    peers.replace(now, None, [config(1, 1)].into_iter());
    let at = crate::session::Moment {
        now,
        wall: Duration::from_secs(1),
    };
    let mut out = [0; crate::session::MESSAGE_LEN_MAX];
    let peer = peers.wake(now, PeerId(1), &mut engine).unwrap();
    let session = peer.session().unwrap();
    assert!(session.initiate(&mut engine, at, true, &mut out).is_some());
    let index = u32::from_le_bytes([out[4], out[5], out[6], out[7]]);
    assert_eq!(engine.holder(index), Some(PeerId(1)));
    peers.replace(now, Some(&mut engine), std::iter::empty());
    assert_eq!(engine.holder(index), None);
}

#[test]
fn only_peers_that_want_it_are_called_and_at_their_time() {
    let (mut peers, mut engine, now) = (Peers::new(false), engine(), epoch());
    let ids = 0..10u8;
    peers.replace(now, None, ids.map(|i| config(u32::from(i), i + 1)));
    for i in 0..10 {
        peers.wake(now, PeerId(i), &mut engine);
    }
    assert_eq!(peers.next_deadline(), None, "idle sessions want nothing");
    for i in [3, 5] {
        let since = now + Duration::from_secs(u64::from(i));
        peers.get(PeerId(i)).unwrap().waiting.push(since, &[0; 30]);
        peers.touch(PeerId(i));
    }
    let at = |secs| now + Duration::from_secs(secs);
    assert_eq!(peers.next_deadline(), Some(at(93)));
    assert_eq!(peers.take_due(at(92)), None);
    assert_eq!(peers.take_due(at(94)), Some(PeerId(3)));
    assert_eq!(peers.take_due(at(94)), None);
    assert_eq!(peers.take_due(at(95)), Some(PeerId(5)));
    // What is not done by then comes back.
    peers.touch(PeerId(5));
    assert_eq!(peers.next_deadline(), Some(at(95)));
}

#[test]
fn an_id_out_of_range_is_not_used() {
    let mut peers = Peers::new(false);
    let beyond = u32::try_from(PEERS_MAX).unwrap();
    peers.replace(epoch(), None, [config(beyond, 1)].into_iter());
    assert!(peers.get(PeerId(beyond)).is_none());
}

#[test]
fn a_new_keep_alive_or_a_new_key_of_ours_wants_sessions_at_once() {
    let (first, second) = (config(1, 1), config(2, 2));
    let kept_alive = |entry: &PeerEntry, seconds| {
        let mut entry = entry.clone();
        let mut config = PeerConfig::clone(&entry.config);
        config.persistent_keepalive = seconds;
        entry.config = Arc::new(config);
        entry
    };
    let (mut peers, mut engine, now) = (Peers::new(true), engine(), epoch());
    let replace = |peers: &mut Peers, seconds| {
        let entries = [kept_alive(&first, seconds), second.clone()];
        peers.replace(now, None, entries.into_iter()).0
    };
    assert_eq!(replace(&mut peers, None), []);
    assert_eq!(replace(&mut peers, Some(0)), [], "0 is off");
    assert_eq!(replace(&mut peers, Some(25)), [PeerId(1)]);
    for id in [PeerId(1), PeerId(2)] {
        assert!(peers.wake(now, id, &mut engine).is_some());
    }
    assert_eq!(peers.end_sessions(), [PeerId(1)]);
    assert!(peers.get(PeerId(2)).unwrap().session().is_none());
}
