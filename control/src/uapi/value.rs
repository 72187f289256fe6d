//! The values of the protocol: hex keys, decimal numbers, prefixes and endpoints, parsed as strictly
//! as wireguard-go does.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::str::FromStr;

use ringtail_dataplane::Prefix;

use super::Errno;

/// Decimal digits and nothing else: no sign, no spaces.
pub(super) fn uint<T: FromStr>(text: &str) -> Result<T, Errno> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Errno::INVALID);
    }
    text.parse().map_err(|_| Errno::INVALID)
}

/// The literal `true`.
pub(super) fn truth(text: &str) -> Result<(), Errno> {
    if text == "true" {
        Ok(())
    } else {
        Err(Errno::INVALID)
    }
}

/// 64 hex digits of either case.
pub(super) fn key(text: &str) -> Result<[u8; 32], Errno> {
    crate::key::parse_hex(text).map_err(|_| Errno::INVALID)
}

/// `IP/bits`, with host bits cleared.
pub(super) fn prefix(text: &str) -> Result<Prefix, Errno> {
    let (addr, bits) = text.split_once('/').ok_or(Errno::INVALID)?;
    let addr: IpAddr = addr.parse().map_err(|_| Errno::INVALID)?;
    let bits = uint(bits)?;
    let net = ipnet::IpNet::new(addr, bits).map_err(|_| Errno::INVALID)?;
    Ok(net.into())
}

/// `A.B.C.D:port`, `[v6]:port` or `[v6%scope]:port`, numeric; the scope is an interface's index or a
/// name that `resolve` knows. An IPv4 address in IPv6 clothes is taken as IPv4.
pub(super) fn endpoint(text: &str, resolve: fn(&str) -> Option<u32>) -> Result<SocketAddr, Errno> {
    let Some(rest) = text.strip_prefix('[') else {
        let (host, port) = text.split_once(':').ok_or(Errno::INVALID)?;
        let host: std::net::Ipv4Addr = host.parse().map_err(|_| Errno::INVALID)?;
        return Ok(SocketAddr::from((host, uint(port)?)));
    };
    let (host, port) = rest.split_once("]:").ok_or(Errno::INVALID)?;
    let port = uint(port)?;
    let (host, scope) = match host.split_once('%') {
        None => (host, 0),
        Some((host, scope)) => {
            let index = uint(scope).ok().or_else(|| resolve(scope));
            (
                host,
                index.filter(|index| *index > 0).ok_or(Errno::INVALID)?,
            )
        }
    };
    let host: Ipv6Addr = host.parse().map_err(|_| Errno::INVALID)?;
    Ok(match host.to_ipv4_mapped() {
        Some(v4) => SocketAddr::from((v4, port)),
        None => SocketAddrV6::new(host, port, 0, scope).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_digits_only() {
        assert_eq!(uint::<u16>("65535"), Ok(65_535));
        assert_eq!(uint::<u16>("0080"), Ok(80));
        for text in ["", "+1", "-1", "1 ", " 1", "1_0", "0x10", "65536", "١"] {
            assert_eq!(uint::<u16>(text), Err(Errno::INVALID), "{text}");
        }
    }

    #[test]
    fn only_true_is_true() {
        assert_eq!(truth("true"), Ok(()));
        for text in ["false", "True", "1", "", "true "] {
            assert_eq!(truth(text), Err(Errno::INVALID), "{text}");
        }
    }

    #[test]
    fn prefixes_lose_their_host_bits() {
        for (text, addr, bits) in [
            ("10.30.1.9/24", "10.30.1.0", 24),
            ("0.0.0.0/0", "0.0.0.0", 0),
            ("255.255.255.255/0", "0.0.0.0", 0),
            ("10.0.0.1/32", "10.0.0.1", 32),
            ("fd00:20::1/48", "fd00:20::", 48),
            ("::/0", "::", 0),
            ("FD00::1/128", "fd00::1", 128),
        ] {
            let addr: IpAddr = addr.parse().unwrap();
            assert_eq!(prefix(text), Ok(Prefix { addr, bits }), "{text}");
        }
        for text in [
            "",
            "10.0.0.0",
            "10.0.0.0/",
            "10.0.0.0/33",
            "10.0.0.0/+8",
            "10.0.0/8",
            "10.0.0.0/8/8",
            "/8",
            "::/129",
            "fe80::1%2/64",
            "[::]/0",
            "+10.0.0.0/8",
            "host/8",
        ] {
            assert_eq!(prefix(text), Err(Errno::INVALID), "{text}");
        }
    }

    fn resolve(name: &str) -> Option<u32> {
        (name == "eth0").then_some(3)
    }

    #[test]
    fn endpoints_are_numeric_and_may_name_a_scope() {
        for (text, want) in [
            ("192.0.2.10:51820", "192.0.2.10:51820"),
            ("[2001:db8::7]:41641", "[2001:db8::7]:41641"),
            ("[fe80::1%3]:9", "[fe80::1%3]:9"),
            ("[fe80::1%eth0]:9", "[fe80::1%3]:9"),
            ("[::ffff:192.0.2.1]:5", "192.0.2.1:5"),
            ("192.0.2.1:0", "192.0.2.1:0"),
        ] {
            let found = endpoint(text, resolve).unwrap();
            assert_eq!(found.to_string(), want, "{text}");
        }
        for text in [
            "",
            "192.0.2.10",
            "192.0.2.10:",
            "192.0.2.10:65536",
            "192.0.2.10:+1",
            "192.0.2:5",
            "192.0.2.010:5",
            "host.example:5",
            "2001:db8::7:41641",
            "[2001:db8::7]",
            "[2001:db8::7]41641",
            "[192.0.2.1]:5",
            "[fe80::1%nowhere]:9",
            "[fe80::1%0]:9",
            "[fe80::1%]:9",
            "[]:9",
        ] {
            assert_eq!(endpoint(text, resolve), Err(Errno::INVALID), "{text}");
        }
    }
}
