//! What waits: of one peer, of many that share a budget, and of peers that come and go.

use rand::{RngExt, rngs::StdRng};

use super::*;
use crate::peer::table::PeerEntry;
use crate::seeded;
use crate::sys::now;
use crate::types::PeerConfig;

/// A queue and its budget.
#[derive(Debug)]
struct Alone(Waiting, Budget);

impl Alone {
    fn new() -> Alone {
        Alone(Waiting::default(), Budget::new(1))
    }

    fn push(&mut self, packet: &[u8], packets: u64) -> u64 {
        self.0.push(&mut self.1, now(), PeerId(0), packet, packets)
    }

    fn pop(&mut self) -> Option<Box<[u8]>> {
        self.0.pop(&mut self.1)
    }

    fn clear(&mut self) -> u64 {
        let dropped = self.0.clear(&mut self.1);
        assert_eq!((self.1.bytes, self.1.ranks.len()), (0, 0));
        dropped
    }
}

#[test]
fn the_oldest_go_when_there_are_too_many() {
    let mut alone = Alone::new();
    for i in 0..PACKETS_MAX {
        assert_eq!(alone.push(&[u8::try_from(i).unwrap()], 1), 0);
    }
    assert_eq!(alone.push(&[200], 1), 1);
    assert_eq!(alone.pop().as_deref(), Some(&[1][..]));
    assert_eq!(alone.clear(), PACKETS_MAX as u64 - 1);
    assert!(alone.0.is_empty());
}

#[test]
fn the_oldest_go_when_they_are_too_large() {
    let mut alone = Alone::new();
    let large = vec![0; 60_000];
    let dropped: u64 = (0..20).map(|_| alone.push(&large, 1)).sum();
    assert_eq!(dropped, 20 - (BYTES_MAX / 60_000) as u64);
    assert_eq!(
        alone.push(&vec![0; BYTES_MAX + 1], 1),
        BYTES_MAX as u64 / 60_000
    );
    assert!(alone.pop().is_some(), "the newest always stays");
}

#[test]
fn a_super_packet_that_goes_counts_as_all_its_packets() {
    let mut alone = Alone::new();
    let large = vec![0; BYTES_MAX / 2];
    assert_eq!(alone.push(&large, 45), 0);
    assert_eq!(alone.push(&large, 1), 0);
    assert_eq!(alone.push(&large, 44), 45);
    assert_eq!(alone.clear(), 45);
    assert_eq!(alone.clear(), 0);
}

#[test]
fn packets_grow_stale() {
    let start = now();
    let Alone(mut waiting, mut budget) = Alone::new();
    assert_eq!(waiting.stale_at(), None);
    waiting.push(&mut budget, start, PeerId(0), &[1], 1);
    assert_eq!(waiting.stale_at(), Some(start + AGE_MAX));
    waiting.push(&mut budget, start, PeerId(0), &[2], 1);
    waiting.pop(&mut budget);
    assert_eq!(waiting.stale_at(), Some(start + AGE_MAX), "what is left");
    waiting.pop(&mut budget);
    assert_eq!(waiting.stale_at(), None);
}

#[test]
fn what_waits_after_an_answer_has_waited_for_nobody_in_vain() {
    let start = now();
    let Alone(mut waiting, mut budget) = Alone::new();
    let mut wait = |waiting: &mut Waiting, secs| {
        let now = start + Duration::from_secs(secs);
        waiting.push(&mut budget, now, PeerId(0), &[1], 1);
        let in_vain = budget.ranks.last().is_some_and(|rank| rank.in_vain);
        if secs == 6 {
            waiting.pop(&mut budget);
        }
        in_vain
    };
    let in_vain = [0, 4, 6, 7, 11, 12].map(|secs| wait(&mut waiting, secs));
    assert_eq!(in_vain, [false, false, true, false, false, true]);
}

/// Peers of one shard of so many.
struct Peers(Vec<Waiting>, Budget);

impl Peers {
    fn new(peers: usize, shards: usize) -> Peers {
        let waiting = (0..peers).map(|_| Waiting::default()).collect();
        Peers(waiting, Budget::new(shards))
    }

    fn push(&mut self, now: Instant, peer: usize, len: usize) -> u64 {
        let id = PeerId(u32::try_from(peer).unwrap());
        let mut dropped = self.0[peer].push(&mut self.1, now, id, &vec![0; len], 1);
        while let Some(loser) = self.1.loser() {
            dropped += self.0[loser.0 as usize].drop_oldest(&mut self.1);
        }
        let bytes = |waiting: &Waiting| waiting.bytes + PACKET_COST * waiting.packets.len();
        if peer.is_multiple_of(1000) {
            assert_eq!(self.1.bytes, self.0.iter().map(bytes).sum::<usize>());
        }
        assert!(self.1.bytes <= self.1.bytes_max);
        dropped
    }
}

/// Everybody scanned again and again, with full packets, and one that answers late: what it has of
/// each size stays. Without a budget the scan would hold 100 MB, and go on to 1.5 GB.
#[test]
fn a_scan_of_dead_peers_starves_none_that_is_about_to_answer() {
    const DEAD: usize = 3_000;
    const LIVE: usize = DEAD;
    for (begins, len) in [(0, 60), (0, 1400), (7, 1400), (7, 60_000), (20, 60_000)] {
        let mut peers = Peers::new(DEAD + 1, 2);
        let start = now();
        let mut dropped = 0;
        for round in 0..25u64 {
            let now = start + Duration::from_secs(round);
            for dead in 0..DEAD {
                dropped += peers.push(now, dead, 1400);
                if round == begins && dead == DEAD / 2 {
                    assert_eq!(peers.0[LIVE].packets.len(), 0);
                    dropped += peers.push(now, LIVE, len);
                }
            }
            let kept = peers.0[LIVE].packets.len();
            if (begins..begins + 4).contains(&round) {
                assert_eq!(kept, 1, "{len} bytes, begun at {begins}, after {round} s");
            }
        }
        let scanned = 25 * DEAD as u64 + 1;
        let kept: usize = peers.0.iter().map(|waiting| waiting.packets.len()).sum();
        assert_eq!(dropped + kept as u64, scanned, "each is counted");
        assert!(kept > 4_000, "the budget is used: {kept}");
    }
}

#[test]
fn who_has_most_loses_first_and_of_equals_who_began_first() {
    let mut peers = Peers::new(40, 1);
    let start = now();
    for peer in 0..31 {
        for _ in 0..8 {
            assert_eq!(
                peers.push(start + Duration::from_millis(peer as u64), peer, 60_000),
                0
            );
        }
    }
    // The small ones cost nobody but the large.
    for i in 0..20_000 {
        peers.push(start + Duration::from_millis(100), 31 + i % 9, 1400);
    }
    let kept: Vec<usize> = peers
        .0
        .iter()
        .map(|waiting| waiting.packets.len())
        .collect();
    assert!(
        kept[31..].iter().all(|kept| *kept == PACKETS_MAX),
        "{kept:?}"
    );
    assert!(kept[..31].is_sorted(), "the first began first: {kept:?}");
    assert_eq!(kept[30], 8, "{kept:?}");
}

/// A shard's peers with a small budget, and what has become of the packets that waited.
struct Shop {
    peers: super::super::Peers,
    entries: Vec<Option<PeerEntry>>,
    came: u64,
    taken: u64,
    dropped: u64,
}

impl Shop {
    const PEERS: u32 = 12;

    fn new() -> Shop {
        let mut peers = super::super::Peers::new(false, 1);
        peers.budget.bytes_max = 300_000;
        Shop {
            peers,
            entries: vec![None; Shop::PEERS as usize],
            came: 0,
            taken: 0,
            dropped: 0,
        }
    }

    fn set(&mut self, now: Instant, id: PeerId, entry: Option<PeerEntry>) {
        let new = entry.as_ref();
        self.peers.set(now, None, id, new, &mut self.dropped);
        self.entries[id.0 as usize] = entry;
    }

    /// What happens to a peer at random.
    fn step(&mut self, now: Instant, rng: &mut StdRng, number: u32) {
        let id = PeerId(rng.random_range(0..Shop::PEERS));
        let known = self.entries[id.0 as usize].clone();
        match rng.random_range(0..40) {
            0 => self.set(now, id, None),
            1 | 2 => self.set(now, id, Some(entry(id, number, None))),
            3 => {
                let shared = known.map(|known| known.shared);
                let entry = entry(id, number, shared);
                self.set(now, id, Some(entry));
            }
            4 => drop(self.peers.end_sessions()),
            5..10 => {
                let place = self.peers.by_id.get_mut(id.0 as usize);
                let Some(peer) = place.and_then(Option::as_mut) else {
                    return;
                };
                while rng.random_range(0..9) > 0 && !peer.waiting.is_empty() {
                    let before = waits(&peer.waiting);
                    peer.waiting.pop(&mut self.peers.budget);
                    self.taken += before - waits(&peer.waiting);
                }
            }
            10 => {
                while let Some(id) = self.peers.take_due(now) {
                    self.dropped += self.peers.drop_stale(now, id);
                    self.peers.touch(now, id);
                }
            }
            _ => {
                let packet = vec![0; [20, 1400, 60_000][rng.random_range(0..3)]];
                let packets = rng.random_range(1..50);
                self.came += packets;
                self.dropped += self.peers.wait(now, id, &packet, packets);
                self.peers.touch(now, id);
            }
        }
    }

    /// What has to be true after every step.
    fn check(&self) {
        let budget = &self.peers.budget;
        let there = || self.peers.by_id.iter().flatten();
        let queues = || there().map(|peer| &peer.waiting);
        let cost = |waiting: &Waiting| waiting.bytes + PACKET_COST * waiting.packets.len();
        assert_eq!(budget.bytes, queues().map(cost).sum::<usize>());
        assert!(budget.bytes <= budget.bytes_max);
        let waiting = there().filter(|peer| !peer.waiting.is_empty());
        let waiting: BTreeSet<PeerId> = waiting.map(|peer| peer.id).collect();
        let ranked = budget.ranks.iter().map(|rank| rank.peer);
        assert!(waiting.iter().copied().eq(BTreeSet::from_iter(ranked)));
        assert_eq!(waiting.len(), budget.ranks.len(), "each once");
        let here: u64 = queues().map(waits).sum();
        assert_eq!(self.came, self.taken + self.dropped + here);
        // Whatever waits is looked at when it is of no use any more.
        let first = queues().filter_map(Waiting::stale_at).min();
        assert!(first.is_none_or(|at| self.peers.next_deadline().is_some_and(|due| due <= at)));
        assert!(queues().all(|waiting| waiting.is_empty() || waiting.stale_at().is_some()));
    }
}

/// How many packets that is.
fn waits(waiting: &Waiting) -> u64 {
    waiting.packets.iter().map(|(_, packets)| packets).sum()
}

fn entry(
    id: PeerId,
    number: u32,
    shared: Option<std::sync::Arc<crate::peer::PeerShared>>,
) -> PeerEntry {
    let config = PeerConfig {
        persistent_keepalive: u16::try_from(number % 3).ok(),
        ..PeerConfig::new(id, [1; 32])
    };
    PeerEntry {
        config: std::sync::Arc::new(config),
        shared: shared.unwrap_or_default(),
        owner: 0,
    }
}

#[test]
fn whatever_random_peers_do_the_budget_has_what_waits_and_nothing_else() {
    let mut rng = seeded();
    let mut shop = Shop::new();
    let mut now = now();
    for number in 0..20_000 {
        now += Duration::from_millis(rng.random_range(0..400));
        if rng.random_range(0..300) == 0 {
            now += AGE_MAX;
        }
        shop.step(now, &mut rng, number);
        shop.check();
    }
    assert!(shop.taken > 0 && shop.dropped > 0);
    for id in 0..Shop::PEERS {
        shop.set(now, PeerId(id), None);
    }
    shop.check();
    assert_eq!(
        (shop.peers.budget.bytes, shop.peers.next_deadline()),
        (0, None)
    );
}
