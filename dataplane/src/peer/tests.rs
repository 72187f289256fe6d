//! The table: who is kept, who is found, who is ticked.

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
    Engine::new(&Zeroizing::new([1; 32]), 1420)
}

#[test]
fn an_index_finds_its_peer_whatever_the_session_counts_below() {
    let mut peers = Peers::new(3, false);
    peers.replace((0..50).map(|i| config(i, u8::try_from(i).unwrap())));
    for i in 0..50 {
        let slot = peers.get(PeerId(i)).unwrap().slot;
        for low in [0, 1, 255] {
            let index = (u32::from(slot) << 16) | (3 << 8) | low;
            assert_eq!(peers.by_index(index).unwrap().id, PeerId(i));
        }
    }
    peers.replace(std::iter::empty());
    assert!(peers.by_slot.iter().all(|&id| id == FREE));
}

#[test]
fn an_unchanged_peer_keeps_its_session_and_a_new_key_does_not() {
    let (mut peers, engine) = (Peers::new(0, false), engine());
    peers.replace([config(1, 1), config(2, 2)].into_iter());
    for id in [PeerId(1), PeerId(2)] {
        assert!(peers.wake(id, &engine).is_some());
    }
    let now = crate::shard::Context::new(epoch()).now;
    peers.get(PeerId(2)).unwrap().waiting.push(now, &[0; 30]);
    let (wanted, dropped) = peers.replace([config(1, 1), config(2, 9)].into_iter());
    assert_eq!((wanted, dropped), (vec![], 1));
    assert!(peers.get(PeerId(1)).unwrap().session().is_some());
    assert!(peers.get(PeerId(2)).unwrap().session().is_none());
    assert_eq!(peers.ticking, [PeerId(1)]);
}

#[expect(clippy::disallowed_methods, reason = "any instant will do")]
fn epoch() -> Instant {
    Instant::now()
}

#[test]
fn rounds_visit_everyone_in_pieces_and_forget_those_that_are_done() {
    let (mut peers, engine) = (Peers::new(0, false), engine());
    peers.replace((0..10).map(|i| config(i, u8::try_from(i).unwrap())));
    for i in 0..10 {
        peers.wake(PeerId(i), &engine);
    }
    peers.start_round();
    let mut seen = Vec::new();
    while peers.in_round() {
        peers.tick(3, |peer| {
            seen.push(peer.id.0);
            peer.id.0 % 2 == 0
        });
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..10).collect::<Vec<_>>());
    let mut left: Vec<u32> = peers.ticking.iter().map(|id| id.0).collect();
    left.sort_unstable();
    assert_eq!(left, [0, 2, 4, 6, 8]);
    peers.wake(PeerId(1), &engine);
    assert_eq!(peers.ticking.len(), 6, "ticked again when needed again");
}

#[test]
fn an_id_out_of_range_is_not_used() {
    let mut peers = Peers::new(0, false);
    let beyond = u32::try_from(PEERS_MAX).unwrap();
    peers.replace([config(beyond, 1)].into_iter());
    assert!(peers.get(PeerId(beyond)).is_none());
}

#[test]
fn a_new_keep_alive_or_a_new_key_of_ours_wants_sessions_at_once() {
    let kept_alive = |id, key, seconds| {
        let mut entry = config(id, key);
        let mut config = PeerConfig::clone(&entry.config);
        config.persistent_keepalive = seconds;
        entry.config = Arc::new(config);
        entry
    };
    let (mut peers, engine) = (Peers::new(0, true), engine());
    let replace = |peers: &mut Peers, seconds| {
        let entries = [kept_alive(1, 1, seconds), config(2, 2)];
        peers.replace(entries.into_iter()).0
    };
    assert_eq!(replace(&mut peers, None), []);
    assert_eq!(replace(&mut peers, Some(0)), [], "0 is off");
    assert_eq!(replace(&mut peers, Some(25)), [PeerId(1)]);
    for id in [PeerId(1), PeerId(2)] {
        assert!(peers.wake(id, &engine).is_some());
    }
    assert_eq!(peers.end_sessions(), [PeerId(1)]);
    assert!(peers.get(PeerId(2)).unwrap().session().is_none());
}
