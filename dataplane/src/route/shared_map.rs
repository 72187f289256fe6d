#![forbid(unsafe_code)]
//! A hash map whose copies share what they have in common.
//!
//! The control side keeps a copy, changes it, and gives it to every shard whole: copying is a few
//! pointers, a change copies the nodes on the way to its key (a few hundred bytes, whatever the size
//! of the map), and letting an older copy go frees just those. Two copies tell where they differ
//! ([`SharedMap::differences`]) without a look at what they share.
//!
//! A trie over the bits of a hash (Bagwell, *Ideal Hash Trees*, 2001): inner nodes have [`WAYS`]
//! children, leaves up to [`LEAF_MAX`] entries. A subtree of so few entries is a leaf, whatever came
//! and went, so nothing is left of a large map that has shrunk.

use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use super::Mixer;

/// Children of an inner node; a power of two.
const WAYS: usize = 16;
const WAYS_BITS: u32 = WAYS.ilog2();
/// Entries of a leaf. Equal hashes may need more.
const LEAF_MAX: usize = 8;
/// Inner nodes above a leaf at most: then the hash is used up.
const DEPTH_MAX: u32 = u64::BITS / WAYS_BITS;

/// The map.
#[derive(Clone, Debug)]
pub(crate) struct SharedMap<K, V> {
    root: Node<K, V>,
}

#[derive(Clone, Debug)]
enum Node<K, V> {
    Empty,
    Leaf(Arc<[(K, V)]>),
    Inner(Arc<[Node<K, V>; WAYS]>),
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        SharedMap { root: Node::Empty }
    }
}

impl<K, V> SharedMap<K, V> {
    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self.root, Node::Empty)
    }

    /// Every entry, in an order that only the keys decide as long as no leaf is over-full.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        Entries::of(&self.root).map(|(key, value)| (key, value))
    }
}

impl<K: Copy + Eq + Hash, V: Clone> SharedMap<K, V> {
    /// The value of a key.
    #[inline]
    pub(crate) fn get(&self, key: K) -> Option<&V> {
        self.root.get(hash(key), key)
    }

    /// Sets the value of a key and returns the one it had.
    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.root.insert(hash(key), 0, key, value)
    }

    /// Removes a key and returns its value.
    pub(crate) fn remove(&mut self, key: K) -> Option<V> {
        // Before anything is copied for nothing.
        self.get(key)?;
        self.root.remove(hash(key), key)
    }

    /// Calls `each` for every key whose value was another in `before`, or is only there or only here:
    /// with the older and the newer one. Returns how many entries were looked at: for two copies with
    /// few differences a few for each, since what they share is passed over.
    pub(crate) fn differences<'a>(
        &'a self,
        before: &'a Self,
        same: impl Fn(&V, &V) -> bool,
        mut each: impl FnMut(K, Option<&'a V>, Option<&'a V>),
    ) -> usize {
        before.root.compare(&self.root, 0, &same, &mut each)
    }
}

fn hash<K: Hash>(key: K) -> u64 {
    Mixer.hash_one(key)
}

/// The child to go to. The bits of the hash that it takes are shifted out on the way.
#[inline]
fn way(hash: u64) -> usize {
    usize::from(hash.to_le_bytes()[0]) % WAYS
}

impl<K: Copy + Eq + Hash, V: Clone> Node<K, V> {
    #[inline]
    fn get(&self, mut hash: u64, key: K) -> Option<&V> {
        let mut node = self;
        loop {
            match node {
                Node::Empty => return None,
                Node::Leaf(entries) => {
                    let found = entries.iter().find(|(other, _)| *other == key);
                    return found.map(|(_, value)| value);
                }
                Node::Inner(children) => {
                    node = &children[way(hash)];
                    hash >>= WAYS_BITS;
                }
            }
        }
    }

    fn insert(&mut self, hash: u64, depth: u32, key: K, value: V) -> Option<V> {
        match self {
            Node::Empty => {
                *self = Node::Leaf(Arc::new([(key, value)]));
                None
            }
            Node::Inner(children) => {
                let child = &mut Arc::make_mut(children)[way(hash)];
                child.insert(hash >> WAYS_BITS, depth + 1, key, value)
            }
            Node::Leaf(entries) => {
                if let Some(place) = entries.iter().position(|(other, _)| *other == key) {
                    let entry = &mut Arc::make_mut(entries)[place];
                    return Some(std::mem::replace(&mut entry.1, value));
                }
                let more = entries.iter().cloned().chain([(key, value)]);
                *self = if entries.len() < LEAF_MAX || depth == DEPTH_MAX {
                    Node::Leaf(more.collect())
                } else {
                    Node::split(more, depth)
                };
                None
            }
        }
    }

    /// An inner node of these entries.
    fn split(entries: impl Iterator<Item = (K, V)>, depth: u32) -> Self {
        let mut children = [const { Node::Empty }; WAYS];
        for (key, value) in entries {
            let rest = hash(key) >> (depth * WAYS_BITS);
            children[way(rest)].insert(rest >> WAYS_BITS, depth + 1, key, value);
        }
        Node::Inner(Arc::new(children))
    }

    fn remove(&mut self, hash: u64, key: K) -> Option<V> {
        match self {
            Node::Empty => None,
            Node::Leaf(entries) => {
                let place = entries.iter().position(|(other, _)| *other == key)?;
                let value = entries[place].1.clone();
                let (front, back) = (&entries[..place], &entries[place + 1..]);
                *self = Node::leaf(front.iter().chain(back).cloned().collect());
                Some(value)
            }
            Node::Inner(children) => {
                let children = Arc::make_mut(children);
                let value = children[way(hash)].remove(hash >> WAYS_BITS, key);
                if let Some(few) = Node::joined(children) {
                    *self = few;
                }
                value
            }
        }
    }

    fn leaf(entries: Arc<[(K, V)]>) -> Self {
        if entries.is_empty() {
            Node::Empty
        } else {
            Node::Leaf(entries)
        }
    }

    /// The leaf that children with so few entries are to be.
    fn joined(children: &[Self; WAYS]) -> Option<Self> {
        let mut total = 0;
        for child in children {
            total += match child {
                Node::Empty => 0,
                Node::Leaf(entries) => entries.len(),
                Node::Inner(_) => return None,
            };
        }
        if total > LEAF_MAX {
            return None;
        }
        let all = children.iter().flat_map(Entries::of);
        Some(Node::leaf(all.cloned().collect()))
    }

    /// [`SharedMap::differences`] of two nodes at the same place.
    fn compare<'a>(
        &'a self,
        newer: &'a Self,
        depth: u32,
        same: &impl Fn(&V, &V) -> bool,
        each: &mut impl FnMut(K, Option<&'a V>, Option<&'a V>),
    ) -> usize {
        match (self, newer) {
            (Node::Inner(before), Node::Inner(after)) => {
                if Arc::ptr_eq(before, after) {
                    return 0;
                }
                let pairs = before.iter().zip(after.iter());
                pairs
                    .map(|(before, after)| before.compare(after, depth + 1, same, each))
                    .sum()
            }
            (Node::Leaf(before), Node::Leaf(after)) if Arc::ptr_eq(before, after) => 0,
            (Node::Empty, Node::Empty) => 0,
            (before, after) => {
                let rest = |key: K| hash(key) >> (depth * WAYS_BITS).min(u64::BITS - 1);
                let mut looked_at = 0;
                for (key, older) in Entries::of(before) {
                    let newer = after.get(rest(*key), *key);
                    if newer.is_none_or(|newer| !same(older, newer)) {
                        each(*key, Some(older), newer);
                    }
                    looked_at += 1;
                }
                for (key, newer) in Entries::of(after) {
                    if before.get(rest(*key), *key).is_none() {
                        each(*key, None, Some(newer));
                    }
                    looked_at += 1;
                }
                looked_at
            }
        }
    }
}

/// The entries below a node.
struct Entries<'a, K, V> {
    leaf: &'a [(K, V)],
    /// Nodes to go to, the last one next.
    nodes: Vec<&'a Node<K, V>>,
}

impl<'a, K, V> Entries<'a, K, V> {
    fn of(node: &'a Node<K, V>) -> Self {
        Entries {
            leaf: &[],
            nodes: vec![node],
        }
    }
}

impl<'a, K, V> Iterator for Entries<'a, K, V> {
    type Item = &'a (K, V);

    fn next(&mut self) -> Option<&'a (K, V)> {
        loop {
            if let Some((first, rest)) = self.leaf.split_first() {
                self.leaf = rest;
                return Some(first);
            }
            match self.nodes.pop()? {
                Node::Empty => {}
                Node::Leaf(entries) => self.leaf = entries,
                Node::Inner(children) => self.nodes.extend(children.iter().rev()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::RngExt;

    use super::*;
    use crate::seeded;

    /// A key whose hash is one of few: leaves at the end of the hash hold more than others.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct Clash(u32);

    impl Hash for Clash {
        fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
            state.write_u32(self.0 % 3);
        }
    }

    type Change<K> = (K, Option<u32>, Option<u32>);

    fn differences<K: Copy + Eq + Ord + Hash>(
        before: &SharedMap<K, u32>,
        after: &SharedMap<K, u32>,
    ) -> (Vec<Change<K>>, usize) {
        let mut found = Vec::new();
        let looked_at = after.differences(
            before,
            |a, b| a == b,
            |key, older, newer| found.push((key, older.copied(), newer.copied())),
        );
        found.sort_unstable();
        (found, looked_at)
    }

    /// Random changes, against an ordinary map; older copies stay as they were.
    fn random_changes_match_an_ordinary_map<K: Copy + Eq + Ord + Hash + std::fmt::Debug>(
        key: impl Fn(u32) -> K,
        keys: u32,
    ) {
        let mut rng = seeded();
        let (mut map, mut model) = (SharedMap::default(), BTreeMap::new());
        let (mut old_map, mut old_model) = (map.clone(), model.clone());
        // Miri is slow.
        let steps = if cfg!(miri) { 300 } else { 20_000 };
        for step in 0..steps {
            // It grows, and shrinks to nothing.
            let grows = step < steps / 2;
            let key = key(rng.random_range(0..keys));
            if rng.random_range(0..10) < if grows { 7 } else { 3 } {
                let value = rng.random_range(0..5);
                assert_eq!(map.insert(key, value), model.insert(key, value));
            } else {
                assert_eq!(map.remove(key), model.remove(&key));
            }
            let (len, empty) = (map.iter().count(), map.is_empty());
            assert_eq!((len, empty), (model.len(), model.is_empty()));
            assert_eq!(map.get(key), model.get(&key));
            if rng.random_range(0..100) == 0 {
                let all: BTreeMap<K, u32> = map.iter().map(|(key, value)| (*key, *value)).collect();
                assert_eq!(all, model);
                let kept: BTreeMap<K, u32> =
                    old_map.iter().map(|(key, value)| (*key, *value)).collect();
                assert_eq!(kept, old_model, "an older copy is as it was");
                let (found, _) = differences(&old_map, &map);
                let keys: std::collections::BTreeSet<K> =
                    old_model.keys().chain(model.keys()).copied().collect();
                let wanted: Vec<_> = keys
                    .into_iter()
                    .map(|key| (key, old_model.get(&key).copied(), model.get(&key).copied()))
                    .filter(|(_, older, newer)| older != newer)
                    .collect();
                assert_eq!(found, wanted);
                (old_map, old_model) = (map.clone(), model.clone());
            }
        }
        while let Some(key) = model.keys().next().copied() {
            assert_eq!(map.remove(key), model.remove(&key));
        }
        assert!(matches!(map.root, Node::Empty), "nothing is left of it");
    }

    #[test]
    fn random_changes_match() {
        random_changes_match_an_ordinary_map(|key| key, 1000);
    }

    #[test]
    fn random_changes_of_keys_with_equal_hashes_match() {
        random_changes_match_an_ordinary_map(Clash, 100);
    }

    #[test]
    fn what_two_copies_share_is_not_looked_at() {
        for len in [1_000, 10_000, 100_000] {
            let mut map = SharedMap::default();
            for key in 0..if cfg!(miri) { len / 100 } else { len } {
                map.insert(key, key);
            }
            let mut other = map.clone();
            assert_eq!(differences(&map, &other), (vec![], 0));
            other.insert(7, 8);
            other.insert(len, 1);
            other.remove(5);
            let (found, looked_at) = differences(&map, &other);
            let wanted = vec![
                (5, Some(5), None),
                (7, Some(7), Some(8)),
                (len, None, Some(1)),
            ];
            assert_eq!(found, wanted);
            let most = 3 * 2 * (LEAF_MAX + 1);
            assert!(looked_at <= most, "{looked_at} of {len}");
        }
    }
}
