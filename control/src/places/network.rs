//! Which networks an address stands for, when what comes from it is counted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The networks an address counts for, the narrower first: its /32 and /24, or for IPv6 its /64, which
/// is one host's to take addresses from, and its /48, which is one customer's. IPv4 in IPv6 is IPv4.
pub fn networks(source: IpAddr) -> [IpNet; 2] {
    match source.to_canonical() {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            let wide = Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), 24);
            [Ipv4Net::from(v4).into(), wide.into()]
        }
        IpAddr::V6(v6) => [64, 48].map(|len| {
            let bits = u128::from(v6) & (u128::MAX << (128 - len));
            Ipv6Net::new_assert(Ipv6Addr::from(bits), len).into()
        }),
    }
}

/// Whether a network is the wider one of an address.
pub(super) fn is_wide(network: &IpNet) -> bool {
    matches!(network.prefix_len(), 24 | 48)
}

/// Whether a network is this machine's own: of 127.0.0.0/8, or what `::1` counts for.
pub(super) fn is_local(network: &IpNet) -> bool {
    let addr = network.addr();
    addr.is_loopback() || (addr.is_ipv6() && addr.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_counts_for_its_host_and_its_customer() {
        for (source, narrow, wide) in [
            ("192.0.2.7", "192.0.2.7/32", "192.0.2.0/24"),
            ("::ffff:192.0.2.7", "192.0.2.7/32", "192.0.2.0/24"),
            (
                "2001:db8:1:2:3:4:5:6",
                "2001:db8:1:2::/64",
                "2001:db8:1::/48",
            ),
            ("::1", "::/64", "::/48"),
        ] {
            let expected = [narrow, wide].map(|net| net.parse().unwrap());
            assert_eq!(networks(source.parse().unwrap()), expected, "{source}");
            assert_eq!(expected.map(|net| is_wide(&net)), [false, true]);
            assert_eq!(expected.map(|net| is_local(&net)), [source == "::1"; 2]);
        }
    }
}
