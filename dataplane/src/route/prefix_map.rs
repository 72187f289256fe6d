#![forbid(unsafe_code)]
//! Longest-prefix match: one hash map per prefix length that is in use, tried from the longest.
//!
//! An overlay's table is nearly all host routes with a few subnets, so a lookup is one to four
//! probes however large the table is. The worst case, every length in use, is 33 or 129 probes, and
//! rooms ask once per run of equal addresses, not per packet.
//!
//! Copies share what they have in common: a map is a [`SharedMap`], in which a probe of 10,000
//! prefixes is about four dependent loads and one of 100,000 five, where a radix tree would take
//! about 17.

use std::hash::{BuildHasher, Hash, Hasher};
use std::net::IpAddr;

use ipnet::IpNet;

use super::SharedMap;
use crate::packet::header::mix;
use crate::types::Prefix;

/// A map from prefixes of both families to `V`.
#[derive(Clone, Debug)]
pub struct PrefixMap<V> {
    v4: Family<u32, V>,
    v6: Family<Bits128, V>,
}

impl<V> Default for PrefixMap<V> {
    fn default() -> Self {
        PrefixMap {
            v4: Family::default(),
            v6: Family::default(),
        }
    }
}

impl<V: Copy> PrefixMap<V> {
    /// Sets the value of a prefix and returns the one it had. Host bits are ignored, and so is what
    /// `bits` has above the family's width.
    pub fn insert(&mut self, prefix: Prefix, value: V) -> Option<V> {
        match prefix.addr {
            IpAddr::V4(addr) => self.v4.insert(addr.to_bits(), prefix.bits, value),
            IpAddr::V6(addr) => self
                .v6
                .insert(Bits128::new(addr.to_bits()), prefix.bits, value),
        }
    }

    /// Removes a prefix and returns its value.
    pub fn remove(&mut self, prefix: Prefix) -> Option<V> {
        match prefix.addr {
            IpAddr::V4(addr) => self.v4.remove(addr.to_bits(), prefix.bits),
            IpAddr::V6(addr) => self.v6.remove(Bits128::new(addr.to_bits()), prefix.bits),
        }
    }

    /// The value of exactly this prefix.
    pub fn get(&self, prefix: Prefix) -> Option<V> {
        match prefix.addr {
            IpAddr::V4(addr) => self.v4.get(addr.to_bits(), prefix.bits),
            IpAddr::V6(addr) => self.v6.get(Bits128::new(addr.to_bits()), prefix.bits),
        }
    }

    /// The value of the longest prefix that covers this one and is shorter.
    pub fn wider(&self, prefix: Prefix) -> Option<V> {
        match prefix.addr {
            IpAddr::V4(addr) => self.v4.wider(addr.to_bits(), prefix.bits),
            IpAddr::V6(addr) => self.v6.wider(Bits128::new(addr.to_bits()), prefix.bits),
        }
    }

    /// The value of the longest prefix that covers the address.
    #[inline]
    pub fn lookup(&self, addr: IpAddr) -> Option<V> {
        match addr {
            IpAddr::V4(addr) => self.v4.lookup(addr.to_bits()),
            IpAddr::V6(addr) => self.v6.lookup(Bits128::new(addr.to_bits())),
        }
    }

    /// Number of prefixes.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        let v4 = self.v4.0.iter().map(|(_, map)| map.iter().count());
        let v6 = self.v6.0.iter().map(|(_, map)| map.iter().count());
        v4.chain(v6).sum()
    }
}

/// The prefix in masked form: host bits zero, `bits` at most the family's width.
pub fn masked(prefix: Prefix) -> Prefix {
    IpNet::from(prefix).into()
}

/// Whether a prefix in masked form covers an address; never across families.
#[inline]
pub fn covers(prefix: &Prefix, addr: IpAddr) -> bool {
    match (prefix.addr, addr) {
        (IpAddr::V4(net), IpAddr::V4(addr)) => {
            addr.to_bits() & u32::mask(prefix.bits) == net.to_bits()
        }
        (IpAddr::V6(net), IpAddr::V6(addr)) => {
            Bits128::new(addr.to_bits()).masked(prefix.bits) == Bits128::new(net.to_bits())
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

/// The prefixes of one family: a map for each length in use, the longest first.
#[derive(Clone, Debug)]
struct Family<K, V>(Vec<(u8, SharedMap<K, V>)>);

impl<K, V> Default for Family<K, V> {
    fn default() -> Self {
        Family(Vec::new())
    }
}

impl<K: Key, V: Copy> Family<K, V> {
    /// Where the map of a length is, or is to be.
    fn place(&self, bits: u8) -> Result<usize, usize> {
        self.0.binary_search_by(|(used, _)| bits.cmp(used))
    }

    fn insert(&mut self, key: K, bits: u8, value: V) -> Option<V> {
        let bits = bits.min(K::WIDTH);
        let at = self.place(bits).unwrap_or_else(|at| {
            self.0.insert(at, (bits, SharedMap::default()));
            at
        });
        self.0[at].1.insert(key.masked(bits), value)
    }

    fn remove(&mut self, key: K, bits: u8) -> Option<V> {
        let bits = bits.min(K::WIDTH);
        let at = self.place(bits).ok()?;
        let map = &mut self.0[at].1;
        let value = map.remove(key.masked(bits))?;
        if map.is_empty() {
            self.0.remove(at);
        }
        Some(value)
    }

    fn get(&self, key: K, bits: u8) -> Option<V> {
        let bits = bits.min(K::WIDTH);
        let (_, map) = &self.0[self.place(bits).ok()?];
        map.get(key.masked(bits)).copied()
    }

    fn wider(&self, key: K, bits: u8) -> Option<V> {
        let bits = bits.min(K::WIDTH);
        let from = self.place(bits).map_or_else(|at| at, |at| at + 1);
        longest(&self.0[from..], key)
    }

    #[inline]
    fn lookup(&self, key: K) -> Option<V> {
        longest(&self.0, key)
    }
}

/// The value of the first prefix that covers an address.
#[inline]
fn longest<K: Key, V: Copy>(maps: &[(u8, SharedMap<K, V>)], key: K) -> Option<V> {
    maps.iter()
        .find_map(|(bits, map)| map.get(key.masked(*bits)))
        .copied()
}

/// An address as a hash key.
trait Key: Copy + Eq + Hash {
    const WIDTH: u8;

    /// The mask of a prefix length up to `WIDTH`.
    fn mask(bits: u8) -> Self;

    /// The leading `bits`, the rest zero.
    fn masked(self, bits: u8) -> Self;
}

impl Key for u32 {
    const WIDTH: u8 = 32;

    #[inline]
    fn mask(bits: u8) -> u32 {
        u32::MAX
            .checked_shl(32 - u32::from(bits.min(32)))
            .unwrap_or(0)
    }

    #[inline]
    fn masked(self, bits: u8) -> u32 {
        self & Self::mask(bits)
    }
}

/// 128 bits with the alignment of 64: a third less memory per entry than `u128`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Bits128 {
    high: u64,
    low: u64,
}

impl Bits128 {
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "splits the number into its halves"
    )]
    fn new(value: u128) -> Bits128 {
        Bits128 {
            high: (value >> 64) as u64,
            low: value as u64,
        }
    }
}

impl Key for Bits128 {
    const WIDTH: u8 = 128;

    #[inline]
    fn mask(bits: u8) -> Bits128 {
        Bits128::new(
            u128::MAX
                .checked_shl(128 - u32::from(bits.min(128)))
                .unwrap_or(0),
        )
    }

    #[inline]
    fn masked(self, bits: u8) -> Bits128 {
        let mask = Self::mask(bits);
        Bits128 {
            high: self.high & mask.high,
            low: self.low & mask.low,
        }
    }
}

/// Hashes the few integers of a key: a multiplication each. Keys come from the control side, never
/// from packets, so nobody can fill a bucket by choosing addresses.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mixer;

/// The state of [`Mixer`].
pub(crate) struct MixHasher(u64);

impl BuildHasher for Mixer {
    type Hasher = MixHasher;

    #[inline]
    fn build_hasher(&self) -> MixHasher {
        MixHasher(0x9e37_79b9_7f4a_7c15)
    }
}

impl Hasher for MixHasher {
    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.0 = mix(self.0 ^ value, 0xbf58_476d_1ce4_e5b9);
    }

    #[inline]
    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}
