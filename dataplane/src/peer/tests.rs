//! The table: who is kept, who is found, who is ticked.

use zeroize::Zeroizing;

use super::*;

fn config(id: u32, key: u8) -> Arc<PeerConfig> {
    Arc::new(PeerConfig {
        id: PeerId(id),
        public_key: [key; 32],
        preshared_key: None,
        allowed_ips: vec![],
        persistent_keepalive: None,
    })
}

fn engine() -> Engine {
    Engine::new(&Zeroizing::new([1; 32]), 1420)
}

#[test]
fn an_index_finds_its_peer_whatever_the_session_counts_below() {
    let mut peers = Peers::new(3);
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
    let (mut peers, engine) = (Peers::new(0), engine());
    peers.replace([config(1, 1), config(2, 2)].into_iter());
    for id in [PeerId(1), PeerId(2)] {
        assert!(peers.wake(id, &engine).is_some());
    }
    let now = crate::shard::Context::new(epoch()).now;
    peers.get(PeerId(2)).unwrap().waiting.push(now, &[0; 30]);
    let (fresh, dropped) = peers.replace([config(1, 1), config(2, 9)].into_iter());
    assert_eq!((fresh, dropped), (vec![PeerId(2)], 1));
    assert!(peers.get(PeerId(1)).unwrap().session().is_some());
    assert!(peers.get(PeerId(2)).unwrap().session().is_none());
    assert_eq!(peers.ticking, [PeerId(1)]);
}

#[expect(clippy::disallowed_methods, reason = "any instant will do")]
fn epoch() -> std::time::Instant {
    std::time::Instant::now()
}

#[test]
fn rounds_visit_everyone_in_pieces_and_forget_those_that_are_done() {
    let (mut peers, engine) = (Peers::new(0), engine());
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
    let mut peers = Peers::new(0);
    let (fresh, _) = peers.replace([config(u32::try_from(PEERS_MAX).unwrap(), 1)].into_iter());
    assert!(fresh.is_empty());
}
