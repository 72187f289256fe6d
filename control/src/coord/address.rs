//! Which inner addresses and names nodes get.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::netmap::prefix::{DNS_SERVICE_V6, V4_RANGE, V6_RANGE};

/// Parts of the IPv4 range other things use: the DNS service's neighbourhood, and a prefix that
/// does not count as a node's own address.
const V4_RESERVED: [Ipv4Net; 3] = [
    Ipv4Net::new_assert(Ipv4Addr::new(100, 100, 0, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 100, 100, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 115, 92, 0), 23),
];

/// The prefixes nodes get their addresses from: host number n gives one address of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressPlan {
    v4: Ipv4Net,
    v6: Ipv6Net,
}

impl Default for AddressPlan {
    fn default() -> Self {
        Self {
            v4: V4_RANGE,
            v6: V6_RANGE,
        }
    }
}

impl AddressPlan {
    /// A plan for these prefixes.
    ///
    /// # Errors
    /// When a prefix is not inside the range clients have built in, or has no room; says which.
    pub fn new(v4: Ipv4Net, v6: Ipv6Net) -> Result<Self, String> {
        if !V4_RANGE.contains(&v4) || v4.prefix_len() > 30 {
            return Err(format!(
                "{v4} must lie inside {V4_RANGE} and hold two nodes at least"
            ));
        }
        if !V6_RANGE.contains(&v6) || v6.prefix_len() > 126 {
            return Err(format!(
                "{v6} must lie inside {V6_RANGE} and hold two nodes at least"
            ));
        }
        Ok(Self {
            v4: v4.trunc(),
            v6: v6.trunc(),
        })
    }

    /// The addresses of host number `n`, if it may be given out.
    pub fn addresses(&self, n: u32) -> Option<(Ipv4Addr, Ipv6Addr)> {
        let v4 = Ipv4Addr::from_bits(self.v4.network().to_bits().checked_add(n)?);
        let v6 = Ipv6Addr::from_bits(self.v6.network().to_bits().checked_add(u128::from(n))?);
        let inside = n > 0 && v4 < self.v4.broadcast() && self.v6.contains(&v6);
        let reserved = V4_RESERVED.iter().any(|net| net.contains(&v4)) || v6 == DNS_SERVICE_V6;
        (inside && !reserved).then_some((v4, v6))
    }

    /// The host number of an address of the plan.
    pub fn number(&self, v4: Ipv4Addr) -> u32 {
        v4.to_bits().saturating_sub(self.v4.network().to_bits())
    }

    /// The lowest free host number above `last`, wrapping once, so that a freed address is not
    /// given to another node soon. None when all are in use.
    pub fn next(&self, last: u32, in_use: impl Fn(Ipv4Addr, Ipv6Addr) -> bool) -> Option<u32> {
        let hosts = u32::MAX >> self.v4.prefix_len();
        let numbers = (last.saturating_add(1)..=hosts).chain(1..=last.min(hosts));
        numbers
            .into_iter()
            .find(|n| self.addresses(*n).is_some_and(|(v4, v6)| !in_use(v4, v6)))
    }
}

/// Longest label of a name.
const LABEL_LEN_MAX: usize = 63;

/// A DNS label made from what a host calls itself: lower case, letters, digits and `-`; `taken`
/// names get `-1`, `-2` … behind.
pub fn name(hostname: &str, taken: impl Fn(&str) -> bool) -> String {
    let first = hostname.split('.').next().unwrap_or_default();
    let letters = first.chars().map(|c| match c.to_ascii_lowercase() {
        c @ ('a'..='z' | '0'..='9') => c,
        _ => '-',
    });
    let label: String = letters.take(LABEL_LEN_MAX).collect();
    let label = match label.trim_matches('-') {
        "" => "node",
        label => label,
    };
    if !taken(label) {
        return label.to_owned();
    }
    (1_u32..)
        .map(|n| {
            let suffix = format!("-{n}");
            let kept = label.len().min(LABEL_LEN_MAX - suffix.len());
            format!("{}{suffix}", &label[..kept])
        })
        .find(|name| !taken(name))
        .expect("there are more numbers than nodes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_map_to_both_families_and_reserved_ones_are_skipped() {
        let plan = AddressPlan::default();
        let (v4, v6) = plan.addresses(1).unwrap();
        assert_eq!(v4.to_string(), "100.64.0.1");
        assert_eq!(v6.to_string(), "fd7a:115c:a1e0::1");
        assert_eq!(plan.addresses(0), None);
        assert_eq!(plan.addresses(0x53), None, "the DNS service");
        for bad in [
            "100.100.0.7",
            "100.100.100.100",
            "100.115.93.1",
            "100.127.255.255",
        ] {
            let n = bad.parse::<Ipv4Addr>().unwrap().to_bits() - V4_RANGE.network().to_bits();
            assert_eq!(plan.addresses(n), None, "{bad}");
        }
    }

    #[test]
    fn the_next_free_number_is_above_the_last_and_wraps_once() {
        let plan = AddressPlan::new("100.64.7.0/29".parse().unwrap(), V6_RANGE).unwrap();
        assert_eq!(plan.next(0, |_, _| false), Some(1));
        assert_eq!(plan.next(3, |_, _| false), Some(4));
        let taken =
            |free: u32| move |v4: Ipv4Addr, _: Ipv6Addr| v4.octets()[3] != free.to_be_bytes()[3];
        assert_eq!(plan.next(5, taken(2)), Some(2), "after the wrap");
        assert_eq!(plan.next(5, taken(7)), None, "broadcast is never given out");
        assert_eq!(plan.next(3, |_, _| true), None);
        assert!(AddressPlan::new("10.0.0.0/8".parse().unwrap(), V6_RANGE).is_err());
        assert!(AddressPlan::new(V4_RANGE, "fd00::/48".parse().unwrap()).is_err());
    }

    #[test]
    fn names_are_labels_and_clashes_are_numbered() {
        assert_eq!(name("Edge_1.example.com", |_| false), "edge-1");
        assert_eq!(name("--", |_| false), "node");
        assert_eq!(name("ü", |_| false), "node");
        assert_eq!(name("a", |name| name == "a" || name == "a-1"), "a-2");
        let long = "x".repeat(100);
        assert_eq!(name(&long, |_| false).len(), 63);
        let second = name(&long, |name| name.len() == 63 && !name.contains('-'));
        assert!(second.len() <= 63 && second.ends_with("-1"));
    }
}
