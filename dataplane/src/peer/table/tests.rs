//! The table: changes against a linear scan and against tables made anew, and what they cost.

use std::collections::BTreeMap;
use std::net::IpAddr;

use rand::seq::IndexedRandom;
use rand::{RngExt, rngs::StdRng};

use super::*;
use crate::route::covers;
use crate::seeded;

const SHARDS: usize = 4;

fn prefix(addr: impl Into<IpAddr>, bits: u8) -> Prefix {
    let addr = addr.into();
    route::masked(Prefix { addr, bits })
}

fn config(id: u32, key: u32, allowed_ips: Vec<Prefix>) -> PeerConfig {
    let mut public_key = [0x5a; 32];
    public_key[..4].copy_from_slice(&key.to_le_bytes());
    PeerConfig {
        allowed_ips,
        ..PeerConfig::new(PeerId(id), public_key)
    }
}

/// Peers with an address of each family.
fn many(count: u32) -> Vec<PeerConfig> {
    let peer = |id: u32| {
        let v4 = IpAddr::V4((0x6440_0000 + id).into());
        let v6 = IpAddr::V6(((0xfd7a << 112) | u128::from(id)).into());
        config(id, id, vec![prefix(v4, 32), prefix(v6, 128)])
    };
    (0..count).map(peer).collect()
}

fn of(peers: Vec<PeerConfig>) -> PeerTable {
    PeerTable::default().changed(peers, &[], None, SHARDS)
}

#[test]
fn keys_spread_over_the_shards() {
    let mut counts = [0u32; 4];
    for i in 0..4000u32 {
        let mut key = [0u8; 32];
        key[..4].copy_from_slice(&i.to_le_bytes());
        counts[usize::from(owner_of(&key, 4))] += 1;
    }
    assert!(counts.iter().all(|&n| n > 800), "{counts:?}");
}

/// The oracle: peers in a map, and a list of prefixes that is searched whole.
#[derive(Default)]
struct Model {
    peers: BTreeMap<PeerId, PeerConfig>,
    /// Without an owner it is reserved.
    prefixes: Vec<(Prefix, Option<PeerId>)>,
}

impl Model {
    fn change(&mut self, peers: &[PeerConfig], gone: &[PeerId], reserved: Option<&[Prefix]>) {
        if let Some(reserved) = reserved {
            self.prefixes.retain(|(_, owner)| owner.is_some());
            self.prefixes.retain(|(held, _)| !reserved.contains(held));
            self.prefixes.extend(reserved.iter().map(|p| (*p, None)));
        }
        for id in gone {
            self.peers.remove(id);
            self.prefixes.retain(|(_, owner)| *owner != Some(*id));
        }
        let mut given = Vec::new();
        for peer in peers {
            let before = self.peers.insert(peer.id, peer.clone());
            let stays = |before: &PeerConfig| {
                before.public_key == peer.public_key && before.allowed_ips == peer.allowed_ips
            };
            if !before.as_ref().is_some_and(stays) {
                self.prefixes.retain(|(_, owner)| *owner != Some(peer.id));
                given.extend(peer.allowed_ips.iter().map(|p| (*p, Some(peer.id))));
            }
        }
        for (prefix, owner) in given {
            if self.prefixes.contains(&(prefix, None)) {
                continue;
            }
            self.prefixes.retain(|(held, _)| *held != prefix);
            self.prefixes.push((prefix, owner));
        }
    }

    fn lookup(&self, addr: IpAddr) -> Option<PeerId> {
        let all = self.prefixes.iter();
        let longest = all
            .filter(|(prefix, _)| covers(prefix, addr))
            .max_by_key(|(prefix, _)| prefix.bits);
        longest.map(|(_, owner)| owner.unwrap_or(NOBODY))
    }

    /// The same network as somebody tells it who knows nothing of its past.
    fn anew(&self) -> PeerTable {
        let peer = |peer: &PeerConfig| {
            let theirs = self
                .prefixes
                .iter()
                .filter(|(_, owner)| *owner == Some(peer.id));
            PeerConfig {
                allowed_ips: theirs.map(|(prefix, _)| *prefix).collect(),
                ..peer.clone()
            }
        };
        let reserved = self.prefixes.iter().filter(|(_, owner)| owner.is_none());
        let reserved = reserved.map(|(prefix, _)| *prefix).collect();
        let peers = self.peers.values().map(peer).collect();
        PeerTable::default().changed(peers, &[], Some(reserved), SHARDS)
    }
}

/// Few distinct bits, so that prefixes nest and collide.
fn random_addr(rng: &mut StdRng) -> IpAddr {
    if rng.random() {
        IpAddr::V4((0x6400_0000 | (rng.random::<u32>() & 0x0060_0107)).into())
    } else {
        let bits = (0xfd7a << 112) | (rng.random::<u128>() & (3 << 70 | 7));
        IpAddr::V6(bits.into())
    }
}

fn random_prefix(rng: &mut StdRng) -> Prefix {
    let addr = random_addr(rng);
    let lengths: &[u8] = if addr.is_ipv4() {
        &[10, 24, 31, 32]
    } else {
        &[16, 64, 127, 128]
    };
    prefix(addr, *lengths.choose(rng).unwrap())
}

/// A shard's view: what it has heard of so far.
#[derive(Default)]
struct Heard {
    table: PeerTable,
    peers: BTreeMap<PeerId, (PeerConfig, Arc<PeerShared>)>,
}

impl Heard {
    fn hear(&mut self, table: &PeerTable) {
        table.differences(&self.table, |id, before, after| {
            let known = self.peers.get(&id).map(|(config, _)| config);
            assert_eq!(known, before.map(|before| &*before.config));
            match after {
                None => self.peers.remove(&id),
                Some(after) => {
                    let config = PeerConfig::clone(&after.config);
                    self.peers.insert(id, (config, Arc::clone(&after.shared)))
                }
            };
        });
        self.table = table.clone();
    }
}

#[test]
fn random_changes_give_the_table_that_is_made_anew() {
    let mut rng = seeded();
    let mut table = PeerTable::default();
    let mut model = Model::default();
    let mut heard = [Heard::default(), Heard::default()];
    // Miri is slow.
    for step in 0..if cfg!(miri) { 40 } else { 2_000 } {
        let ids: Vec<u32> = (0..40).filter(|_| rng.random_range(0..20) == 0).collect();
        let (gone, named): (Vec<u32>, Vec<u32>) =
            ids.into_iter().partition(|_| rng.random_range(0..3) == 0);
        let gone: Vec<PeerId> = gone.into_iter().map(PeerId).collect();
        let peers: Vec<PeerConfig> = named
            .into_iter()
            .map(|id| {
                let known = model.peers.get(&PeerId(id));
                let mut peer = match known {
                    // Another's key under the same id.
                    Some(known) if rng.random_range(0..5) > 0 => known.clone(),
                    Some(_) | None => config(id, id + 100 * step, vec![]),
                };
                if rng.random_range(0..3) > 0 {
                    let count = rng.random_range(0..5);
                    peer.allowed_ips = (0..count).map(|_| random_prefix(&mut rng)).collect();
                }
                peer.persistent_keepalive = [None, Some(25)].choose(&mut rng).copied().flatten();
                peer
            })
            .collect();
        let reserved = (rng.random_range(0..10) == 0).then(|| {
            let mut reserved: Vec<_> = (0..3).map(|_| random_prefix(&mut rng)).collect();
            reserved.sort_unstable_by_key(|prefix| (prefix.addr, prefix.bits));
            reserved.dedup();
            reserved
        });
        model.change(&peers, &gone, reserved.as_deref());
        let before = table;
        if rng.random_range(0..10) == 0 {
            // Everybody goes and comes back in one.
            let fresh = model.anew();
            let whole = fresh.peers().map(|entry| (*entry.config).clone()).collect();
            let all: Vec<PeerId> = before.peers().map(|entry| entry.config.id).collect();
            let reserved = Some(fresh.reserved.to_vec());
            table = before.changed(whole, &all, reserved, SHARDS);
            let stripped = table.peers().map(|entry| (*entry.config).clone());
            model.peers = stripped.map(|peer| (peer.id, peer)).collect();
        } else {
            table = before.changed(peers, &gone, reserved, SHARDS);
        }
        let anew = model.anew();
        for _ in 0..50 {
            let addr = random_addr(&mut rng);
            let owner = table.routes.lookup(addr);
            assert_eq!(owner, model.lookup(addr), "{addr} at {step}");
            assert_eq!(owner, anew.routes.lookup(addr), "{addr} at {step}");
            if !table.moved_since(&before) {
                let was = before.routes.lookup(addr).filter(|was| *was != NOBODY);
                assert!(was.is_none() || was == owner, "{addr} moved at {step}");
            }
        }
        assert_eq!(table.routes.len(), model.prefixes.len());
        let all: BTreeMap<PeerId, PeerConfig> = table
            .peers()
            .map(|entry| (entry.config.id, (*entry.config).clone()))
            .collect();
        assert_eq!(all, model.peers);
        for (id, peer) in &model.peers {
            let (is, was) = (table.get(*id).unwrap(), before.get(*id));
            assert_eq!(is.owner, owner_of(&peer.public_key, SHARDS));
            // Whoever is the same keeps what threads share of it, and nobody else.
            let same = was.is_some_and(|was| was.config.public_key == peer.public_key);
            let keeps = was.is_some_and(|was| Arc::ptr_eq(&was.shared, &is.shared));
            assert_eq!(same && !gone.contains(id), keeps && !gone.contains(id));
        }
        // One looks each time, the other now and then.
        heard[0].hear(&table);
        if rng.random_range(0..7) == 0 {
            heard[1].hear(&table);
            for heard in &heard {
                let peers = heard.peers.iter();
                let known: Vec<_> = peers.map(|(id, (config, _))| (*id, config)).collect();
                let wanted: Vec<_> = model.peers.iter().map(|(id, peer)| (*id, peer)).collect();
                assert_eq!(known, wanted);
                for (id, (_, shared)) in &heard.peers {
                    assert!(Arc::ptr_eq(shared, &table.get(*id).unwrap().shared));
                }
            }
        }
    }
}

#[test]
fn a_change_of_one_peer_looks_at_a_few_however_many_there_are() {
    for count in [1_000, 10_000] {
        let before = of(many(count));
        let mut other = (*before.get(PeerId(7)).unwrap().config).clone();
        other.persistent_keepalive = Some(25);
        let joined = many(count + 1).pop().unwrap();
        let changes = [
            (vec![joined], vec![]),
            (vec![other], vec![]),
            (vec![], vec![PeerId(9)]),
        ];
        for (peers, gone) in changes {
            let id = peers.first().map_or(PeerId(9), |peer| peer.id);
            let after = before.changed(peers, &gone, None, SHARDS);
            let mut found = Vec::new();
            let visited = after.differences(&before, |id, _, _| found.push(id));
            assert_eq!(found, [id]);
            assert!(visited <= 20, "{visited} of {count}");
        }
    }
}

#[test]
fn who_joins_moves_nobodys_address_and_who_leaves_or_takes_over_does() {
    let reserved = vec![prefix([100, 64, 0, 0], 10), prefix([100, 64, 0, 1], 32)];
    let net = prefix([10, 0, 0, 0], 8);
    let before = of(vec![config(1, 1, vec![net])]);
    let before = before.changed(vec![], &[], Some(reserved.clone()), SHARDS);
    let moves = |peers, gone: &[u32], reserved| {
        let gone: Vec<PeerId> = gone.iter().map(|id| PeerId(*id)).collect();
        let after = before.changed(peers, &gone, reserved, SHARDS);
        after.moved_since(&before)
    };
    let with = |prefix| vec![config(2, 2, vec![prefix])];
    assert!(!moves(with(prefix([100, 64, 0, 2], 32)), &[], None));
    assert!(!moves(with(prefix([10, 0, 0, 0], 7)), &[], None));
    assert!(moves(with(prefix([10, 1, 0, 0], 16)), &[], None));
    assert!(moves(with(net), &[], None));
    assert!(moves(vec![], &[1], None));
    assert!(moves(vec![config(1, 1, vec![])], &[], None));
    // Somebody else under the same number has another owner, who has heard of no flow.
    assert!(moves(vec![config(1, 9, vec![net])], &[], None));
    assert!(moves(vec![config(1, 1, vec![net])], &[1], None));
    assert!(moves(vec![], &[], Some(vec![net])));
    assert!(!moves(vec![], &[], Some(vec![])));
    // What is reserved already is not to be had.
    let claims = before.changed(with(reserved[1]), &[], None, SHARDS);
    assert!(!claims.moved_since(&before));
    assert_eq!(claims.routes.owner(reserved[1]), Some(NOBODY));
}

#[test]
fn an_id_out_of_range_is_not_used() {
    let beyond = u32::try_from(PEERS_MAX).unwrap();
    let table = of(vec![config(beyond, 1, vec![])]);
    assert_eq!(table.peers().count(), 0);
    let table = table.changed(vec![config(beyond, 1, vec![])], &[], None, 1);
    assert_eq!(table.peers().count(), 0);
}
