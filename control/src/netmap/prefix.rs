//! What a prefix can stand for: a network of nodes, a subnet, the internet, or nothing that a host could
//! have.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The range clients have built in for IPv4.
pub const V4_RANGE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);

/// The range clients have built in for IPv6.
pub const V6_RANGE: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0), 48);

/// Where every node of a network asks for names.
pub const DNS_SERVICE_V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 100);

/// The same for IPv6.
pub const DNS_SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53);

/// Shortest prefixes that can be a subnet: the widest private networks, 10.0.0.0/8 and fc00::/7.
/// What is wider stands for the internet.
const SUBNET_BITS_MIN: [u8; 2] = [8, 7];

/// Whose addresses no host has, beside multicast: "this network", loopback, link-local, reserved;
/// of IPv6 the unspecified and loopback address, IPv4-mapped ones, link-local.
const NO_HOSTS: [IpNet; 7] = [
    v4([0, 0, 0, 0], 8),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([240, 0, 0, 0], 4),
    v6([0; 8], 127),
    v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
];

/// The metadata address of clouds: link-local, yet routed to by subnet routers.
const CLOUD_METADATA: IpNet = v4([169, 254, 169, 254], 32);

/// Both families whole: what an exit node offers.
pub const EVERYWHERE: [IpNet; 2] = [v4([0; 4], 0), v6([0; 8], 0)];

/// What is not the Internet, wherever a node stands: private networks, the ranges of networks like
/// ours, and what no host on the Internet has.
pub const NOT_INTERNET: [IpNet; 13] = [
    v4([0, 0, 0, 0], 8),
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([172, 16, 0, 0], 12),
    v4([192, 168, 0, 0], 16),
    // Multicast, and what is reserved with the broadcast address in it.
    v4([224, 0, 0, 0], 3),
    v6([0; 8], 8),
    // Unique local (RFC 4193), our own range in it; link-local; site-local; multicast.
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
];

/// An IPv4 prefix without bits behind it.
pub(crate) const fn v4([a, b, c, d]: [u8; 4], bits: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), bits))
}

/// An IPv6 prefix without bits behind it.
pub(crate) const fn v6([a, b, c, d, e, f, g, h]: [u16; 8], bits: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(
        Ipv6Addr::new(a, b, c, d, e, f, g, h),
        bits,
    ))
}

/// Whether a prefix stands for the internet, or a piece of it that no site is as large as.
pub fn is_exit(prefix: &IpNet) -> bool {
    let [v4, v6] = SUBNET_BITS_MIN;
    match prefix {
        IpNet::V4(net) => net.prefix_len() < v4,
        IpNet::V6(net) => net.prefix_len() < v6,
    }
}

/// Whether a prefix without host bits holds nothing but addresses that no host has.
pub fn has_no_hosts(prefix: &IpNet) -> bool {
    let no_hosts = || NO_HOSTS.iter().any(|net| net.contains(prefix));
    *prefix != CLOUD_METADATA && (prefix.addr().is_multicast() || no_hosts())
}

/// What is left of `nets` without `except`: the fewest prefixes that have all of it and no more, in order.
pub fn without(
    nets: impl IntoIterator<Item = IpNet>,
    except: impl IntoIterator<Item = IpNet>,
) -> Vec<IpNet> {
    let except = aggregated(except);
    let mut left = Vec::new();
    // Depth first, so that it comes out in order; beside each what it holds of `except`, which is in a row.
    let nets = aggregated(nets);
    let mut open: Vec<_> = nets.iter().rev().map(|net| (*net, &except[..])).collect();
    while let Some((net, except)) = open.pop() {
        if covering(except, &net).is_some() {
            continue;
        }
        let inside = &except[except.partition_point(|out| *out < net)..];
        let inside = &inside[..inside.partition_point(|out| net.contains(out))];
        if inside.is_empty() {
            left.push(net);
            continue;
        }
        // It holds more than one address: it holds one of those and is none of them.
        let halves = net.subnets(net.prefix_len() + 1).into_iter().flatten();
        let start = open.len();
        open.extend(halves.map(|half| (half, inside)));
        open[start..].reverse();
    }
    left
}

/// The fewest prefixes that have all of `nets` and no more, in order.
pub fn aggregated(nets: impl IntoIterator<Item = IpNet>) -> Vec<IpNet> {
    IpNet::aggregate(&nets.into_iter().map(|net| net.trunc()).collect())
}

/// The one of `aggregated` prefixes that `net`, which has no host bits, lies in.
pub fn covering<'a>(aggregated: &'a [IpNet], net: &IpNet) -> Option<&'a IpNet> {
    // What covers it is not after it in order, and no other can stand between.
    let end = aggregated.partition_point(|one| one <= net);
    let last = aggregated[..end].last();
    last.filter(|one| one.contains(net))
}

/// Reads a prefix that somebody wants routed.
///
/// # Errors
/// A sentence that names the prefix that was probably meant: where host bits are set, where the
/// length is missing, where an IPv4 prefix is written as an IPv6 one. Or that no host has such
/// addresses.
pub fn parse_route(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    let net: IpNet = match text.parse() {
        Ok(net) => net,
        Err(_) => {
            let address: Option<IpAddr> = text.parse().ok();
            let meant = address.map(|address| match unmapped(IpNet::from(address)) {
                Some(net) => net,
                None => IpNet::from(address),
            });
            return Err(match meant {
                Some(net) => format!("{text} is an address without a prefix length: write {net}"),
                None => format!("{text:?} is no prefix such as 10.20.0.0/16 or fd00:20::/64"),
            });
        }
    };
    if let Some(v4) = unmapped(net) {
        let v4 = v4.trunc();
        return Err(format!(
            "{text} is an IPv4 prefix in the form of an IPv6 one: write {v4}"
        ));
    }
    if net != net.trunc() {
        let right = net.trunc();
        return Err(format!(
            "{text} has bits set behind the prefix: write {right}"
        ));
    }
    if !is_exit(&net) && has_no_hosts(&net) {
        return Err(format!(
            "{text} cannot be routed: no host has such addresses"
        ));
    }
    Ok(net)
}

/// The IPv4 prefix behind an IPv4-mapped one.
fn unmapped(net: IpNet) -> Option<IpNet> {
    let IpNet::V6(net) = net else { return None };
    let address = net.addr().to_ipv4_mapped()?;
    let bits = net.prefix_len().checked_sub(96)?;
    Some(Ipv4Net::new(address, bits).ok()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_without_some_prefixes_is_exact_and_in_order() {
        let nets =
            |list: &[&str]| -> Vec<IpNet> { list.iter().map(|net| net.parse().unwrap()).collect() };
        let left = without(
            nets(&["10.0.0.0/8"]),
            nets(&["10.64.0.0/10", "10.192.0.0/10"]),
        );
        assert_eq!(left, nets(&["10.0.0.0/10", "10.128.0.0/10"]));
        assert_eq!(without(EVERYWHERE, EVERYWHERE), []);
        assert_eq!(without(EVERYWHERE, []), EVERYWHERE);
        assert_eq!(without(nets(&["10.1.2.3/32"]), nets(&["10.1.2.3/32"])), []);
        assert_eq!(
            without(nets(&["fd00::/8"]), nets(&["10.0.0.0/8"])),
            nets(&["fd00::/8"])
        );
        let lan = nets(&["203.0.113.0/24", "2001:db8:1::/64", "192.168.7.0/24"]);
        let out = without(EVERYWHERE, NOT_INTERNET.iter().chain(&lan).copied());
        for (ip, inside) in [
            ("8.8.8.8", true),
            ("203.0.112.255", true),
            ("203.0.113.0", false),
            ("203.0.113.255", false),
            ("203.0.114.0", true),
            ("192.168.7.1", false),
            ("192.168.8.1", false),
            ("192.167.255.255", true),
            ("192.169.0.0", true),
            ("100.100.100.100", false),
            ("255.255.255.255", false),
            ("2001:db8:1::5", false),
            ("2001:db8:2::5", true),
            ("fd7a:115c:a1e0::1", false),
            ("fe80::1", false),
            ("::1", false),
        ] {
            let ip: IpAddr = ip.parse().unwrap();
            assert_eq!(
                out.iter().filter(|net| net.contains(&ip)).count(),
                usize::from(inside),
                "{ip}"
            );
        }
        assert!(out.len() < 250, "{}", out.len());
        let back = without(nets(&["192.168.0.0/16"]), nets(&["192.168.7.0/24"]));
        assert_eq!(back.len(), 8);
    }

    #[test]
    fn a_route_is_taken_as_it_stands_or_refused_with_the_right_one() {
        for text in [
            "10.20.0.0/16",
            "10.20.30.40/32",
            "fd00:20::/64",
            "0.0.0.0/0",
            "::/0",
            "128.0.0.0/1",
            "169.254.169.254/32",
            " 10.1.0.0/16 ",
        ] {
            let net = parse_route(text);
            assert_eq!(net.unwrap().to_string(), text.trim(), "{text}");
        }
        for (text, said) in [
            ("10.20.0.1/16", "write 10.20.0.0/16"),
            ("fd00:20::5/64", "write fd00:20::/64"),
            ("1.2.3.4/0", "write 0.0.0.0/0"),
            ("10.20.0.1", "write 10.20.0.1/32"),
            ("fd00::1", "write fd00::1/128"),
            ("::ffff:10.20.0.0/112", "write 10.20.0.0/16"),
            ("::ffff:10.20.0.1/112", "write 10.20.0.0/16"),
            ("::ffff:10.20.0.1", "write 10.20.0.1/32"),
            ("10.20/16", "no prefix"),
            ("10.20.0.0/33", "no prefix"),
            ("", "no prefix"),
            ("127.0.0.0/8", "no host"),
            ("224.0.0.0/24", "no host"),
            ("fe80::/64", "no host"),
            ("ff02::/16", "no host"),
        ] {
            let error = parse_route(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
