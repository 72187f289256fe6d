#![forbid(unsafe_code)]
//! Allowed IPs: which peer an inner address belongs to (cryptokey routing, WireGuard paper §2).
//!
//! Outbound, the destination's owner gets the packet; inbound, the source's owner must be the
//! sender. One prefix belongs to one peer: giving it to another takes it from the first.
//!
//! Which prefixes a peer was given, its configuration says; the table knows only whose each is now. Who
//! changes it changes a copy: what the shards read stays as it is.
//!
//! Rooms: `prefix_map` matches the longest prefix, `shared_map` is a hash map whose copies share what
//! is the same.

mod prefix_map;
mod shared_map;

use std::net::IpAddr;

use crate::types::{PeerId, Prefix};
pub(crate) use prefix_map::Mixer;
pub use prefix_map::{PrefixMap, covers, masked};
pub(crate) use shared_map::SharedMap;

/// The allowed-IPs table. Copies share what they have in common: a copy costs next to nothing, and
/// a change of it does not depend on the number of prefixes.
#[derive(Clone, Debug, Default)]
pub struct Table {
    owners: PrefixMap<PeerId>,
}

impl Table {
    /// Gives a prefix to a peer and returns the peer that had it.
    pub fn insert(&mut self, prefix: Prefix, peer: PeerId) -> Option<PeerId> {
        let before = self.owner(prefix);
        if before != Some(peer) {
            self.owners.insert(prefix, peer);
        }
        before
    }

    /// Takes a prefix from a peer; false if it was not the peer's.
    pub fn remove(&mut self, prefix: Prefix, peer: PeerId) -> bool {
        let theirs = self.owner(prefix) == Some(peer);
        if theirs {
            self.owners.remove(prefix);
        }
        theirs
    }

    /// The peer of exactly this prefix.
    pub fn owner(&self, prefix: Prefix) -> Option<PeerId> {
        self.owners.get(prefix)
    }

    /// The peer of the longest prefix that covers this one and is shorter.
    pub fn owner_of_wider(&self, prefix: Prefix) -> Option<PeerId> {
        self.owners.wider(prefix)
    }

    /// The peer of the longest prefix that covers the address.
    #[inline]
    pub fn lookup(&self, addr: IpAddr) -> Option<PeerId> {
        self.owners.lookup(addr)
    }

    /// Number of prefixes.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.owners.len()
    }

    /// For one batch: remembers the last answer, since packets come in runs of one address.
    pub fn cursor(&self) -> Cursor<'_> {
        Cursor {
            table: self,
            last: None,
        }
    }
}

/// Lookups of one batch.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    table: &'a Table,
    last: Option<(IpAddr, Option<PeerId>)>,
}

impl Cursor<'_> {
    /// The same as [`Table::lookup`], at the price of a comparison for a repeated address.
    #[inline]
    pub fn lookup(&mut self, addr: IpAddr) -> Option<PeerId> {
        if let Some((last, peer)) = self.last
            && last == addr
        {
            return peer;
        }
        let peer = self.table.lookup(addr);
        self.last = Some((addr, peer));
        peer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded;
    use rand::{RngExt, rngs::StdRng};

    fn prefix(text: &str) -> Prefix {
        let (addr, bits) = text.split_once('/').unwrap();
        Prefix {
            addr: addr.parse().unwrap(),
            bits: bits.parse().unwrap(),
        }
    }

    fn addr(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_longest_prefix_wins_whatever_the_order() {
        let rows = [
            ("0.0.0.0/0", 0),
            ("100.64.0.0/10", 1),
            ("100.64.7.0/24", 2),
            ("100.64.7.9/32", 3),
            ("::/0", 4),
            ("fd7a::/16", 5),
            ("fd7a::7/128", 6),
        ];
        for reverse in [false, true] {
            let mut table = Table::default();
            let mut rows = rows;
            if reverse {
                rows.reverse();
            }
            for (text, peer) in rows {
                assert_eq!(table.insert(prefix(text), PeerId(peer)), None);
            }
            for (text, peer) in [
                ("1.2.3.4", 0),
                ("100.127.255.255", 1),
                ("100.64.7.8", 2),
                ("100.64.7.9", 3),
                ("2001:db8::1", 4),
                ("fd7a:1::", 5),
                ("fd7a::7", 6),
            ] {
                assert_eq!(table.lookup(addr(text)), Some(PeerId(peer)), "{text}");
            }
        }
    }

    #[test]
    fn families_do_not_mix() {
        let mut table = Table::default();
        table.insert(prefix("0.0.0.0/0"), PeerId(1));
        assert_eq!(table.lookup(addr("::ffff:1.2.3.4")), None);
        assert_eq!(table.lookup(addr("::")), None);
    }

    #[test]
    fn a_prefix_moves_to_the_peer_that_got_it_last() {
        let mut table = Table::default();
        let shared = prefix("10.0.0.0/8");
        table.insert(shared, PeerId(1));
        table.insert(prefix("10.1.0.0/16"), PeerId(1));
        assert_eq!(table.insert(shared, PeerId(2)), Some(PeerId(1)));
        // What peer 1 lost stays with peer 2 when peer 1 goes.
        assert!(!table.remove(shared, PeerId(1)));
        assert!(table.remove(prefix("10.1.0.0/16"), PeerId(1)));
        assert_eq!(table.lookup(addr("10.1.0.1")), Some(PeerId(2)));
        assert_eq!(table.len(), 1);
        assert!(table.remove(shared, PeerId(2)));
        assert!(!table.remove(shared, PeerId(2)));
        assert_eq!(table.len(), 0);
        assert_eq!(table.lookup(addr("10.1.0.1")), None);
    }

    #[test]
    fn host_bits_and_overlong_lengths_are_ignored() {
        let mut table = Table::default();
        table.insert(prefix("10.1.2.3/8"), PeerId(1));
        table.insert(prefix("10.9.9.9/200"), PeerId(2));
        assert_eq!(table.lookup(addr("10.255.0.1")), Some(PeerId(1)));
        assert_eq!(table.lookup(addr("10.9.9.9")), Some(PeerId(2)));
        assert_eq!(table.owner(prefix("10.0.0.0/8")), Some(PeerId(1)));
    }

    /// The oracle: a list, searched whole.
    #[derive(Default)]
    struct Linear(Vec<(Prefix, PeerId)>);

    impl Linear {
        fn insert(&mut self, prefix: Prefix, peer: PeerId) {
            self.0.retain(|(other, _)| *other != prefix);
            self.0.push((prefix, peer));
        }

        fn lookup(&self, addr: IpAddr) -> Option<PeerId> {
            let hits = self
                .0
                .iter()
                .filter(|(prefix, _)| match (prefix.addr, addr) {
                    (IpAddr::V4(net), IpAddr::V4(addr)) => (0..prefix.bits)
                        .all(|bit| (net.to_bits() ^ addr.to_bits()) & (1 << (31 - bit)) == 0),
                    (IpAddr::V6(net), IpAddr::V6(addr)) => (0..prefix.bits)
                        .all(|bit| (net.to_bits() ^ addr.to_bits()) & (1 << (127 - bit)) == 0),
                    _ => false,
                });
            hits.max_by_key(|(prefix, _)| prefix.bits)
                .map(|(_, peer)| *peer)
        }
    }

    fn random_addr(rng: &mut StdRng) -> IpAddr {
        // Few distinct bits, so that prefixes nest and collide.
        if rng.random() {
            IpAddr::V4((0x0a00_0000 | (rng.random::<u32>() & 0x8300_0307)).into())
        } else {
            let bits = (0xfd7a << 112) | (rng.random::<u128>() & (3 << 70 | 7 | 1 << 127));
            IpAddr::V6(bits.into())
        }
    }

    fn random_prefix(rng: &mut StdRng) -> Prefix {
        let addr = random_addr(rng);
        let bits = if addr.is_ipv4() {
            rng.random_range(0..=32)
        } else {
            rng.random_range(0..=128)
        };
        masked(Prefix { addr, bits })
    }

    #[test]
    fn random_operations_agree_with_a_linear_scan() {
        let mut rng = seeded();
        let mut table = Table::default();
        let mut linear = Linear::default();
        for _ in 0..20_000 {
            let peer = PeerId(rng.random_range(0..20));
            let prefix = random_prefix(&mut rng);
            if rng.random_range(0..100) < 60 {
                table.insert(prefix, peer);
                linear.insert(prefix, peer);
            } else {
                let held = linear.0.contains(&(prefix, peer));
                assert_eq!(table.remove(prefix, peer), held);
                linear.0.retain(|entry| *entry != (prefix, peer));
            }
            let addr = random_addr(&mut rng);
            assert_eq!(table.lookup(addr), linear.lookup(addr), "{addr}");
            assert_eq!(table.len(), linear.0.len());
        }
        for (prefix, peer) in &linear.0 {
            assert_eq!(table.owner(*prefix), Some(*peer));
        }
        for _ in 0..5_000 {
            let prefix = random_prefix(&mut rng);
            let addr = random_addr(&mut rng);
            let one = Linear(vec![(prefix, PeerId(0))]);
            assert_eq!(covers(&prefix, addr), one.lookup(addr).is_some());
        }
    }

    #[test]
    fn a_cursor_answers_in_order_and_again_for_a_repeated_address() {
        let mut table = Table::default();
        table.insert(prefix("10.1.0.0/16"), PeerId(1));
        table.insert(prefix("10.2.0.0/16"), PeerId(2));
        let batch = ["10.1.0.1", "10.1.0.1", "10.3.0.1", "10.2.0.1", "10.1.0.1"].map(addr);
        let mut cursor = table.cursor();
        let peers = batch.map(|addr| cursor.lookup(addr));
        let want = [Some(1), Some(1), None, Some(2), Some(1)];
        assert_eq!(peers, want.map(|peer| peer.map(PeerId)));
    }
}
