//! Whom a question is passed on to.

use std::net::{IpAddr, SocketAddr};

/// Where plain DNS is asked.
const PORT: u16 = 53;

/// A resolver.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Upstream {
    /// DNS over UDP and TCP.
    Plain(SocketAddr),
    /// DNS over HTTP without TLS (RFC 8484), as nodes offer it to each other inside the tunnel: address and path.
    Http(SocketAddr, String),
}

impl Upstream {
    /// Reads the address of a resolver as the network map has it.
    ///
    /// # Errors
    /// Why we do not ask there.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let upstream = if let Some(rest) = text.strip_prefix("http://") {
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let plain = path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic());
            let addr = host.parse().ok().filter(|_| plain);
            Self::Http(
                addr.ok_or("it is no http://ADDRESS:PORT/PATH")?,
                path.to_owned(),
            )
        } else if text.starts_with("https://") || text.starts_with("tls://") {
            return Err("DNS over TLS and HTTPS are not supported");
        } else {
            let alone = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, PORT));
            Self::Plain(
                alone
                    .or_else(|_| text.parse())
                    .map_err(|_| "it is no address")?,
            )
        };
        let ip = upstream.address().ip();
        let nowhere = ip.is_unspecified() || ip.is_multicast() || ip.is_loopback();
        if nowhere || upstream.address().port() == 0 {
            return Err("no server of a network can be there");
        }
        Ok(upstream)
    }

    /// The address that is connected to.
    pub fn address(&self) -> SocketAddr {
        match self {
            Self::Plain(addr) | Self::Http(addr, _) => *addr,
        }
    }
}

impl std::fmt::Display for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plain(addr) if addr.port() == PORT => addr.ip().fmt(f),
            Self::Plain(addr) => addr.fmt(f),
            Self::Http(addr, path) => write!(f, "http://{addr}{path}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_map_calls_a_resolver_is_read_or_refused_with_a_reason() {
        for (text, shown) in [
            ("192.0.2.53", Ok("192.0.2.53")),
            ("192.0.2.53:53", Ok("192.0.2.53")),
            ("192.0.2.53:5353", Ok("192.0.2.53:5353")),
            ("fd00::53", Ok("fd00::53")),
            ("[fd00::53]:5353", Ok("[fd00::53]:5353")),
            (
                "http://100.64.0.7:4321/dns-query",
                Ok("http://100.64.0.7:4321/dns-query"),
            ),
            (
                "http://dns.example/q",
                Err("it is no http://ADDRESS:PORT/PATH"),
            ),
            (
                "http://100.64.0.7:80",
                Err("it is no http://ADDRESS:PORT/PATH"),
            ),
            (
                "http://100.64.0.7:80/a b\r\n",
                Err("it is no http://ADDRESS:PORT/PATH"),
            ),
            (
                "https://dns.example/q",
                Err("DNS over TLS and HTTPS are not supported"),
            ),
            ("dns.example", Err("it is no address")),
            ("", Err("it is no address")),
            ("127.0.0.53", Err("no server of a network can be there")),
            ("0.0.0.0", Err("no server of a network can be there")),
            ("192.0.2.53:0", Err("no server of a network can be there")),
            (
                "http://[::1]:80/q",
                Err("no server of a network can be there"),
            ),
        ] {
            let read = Upstream::parse(text).map(|upstream| upstream.to_string());
            assert_eq!(read.as_deref(), shown.as_ref().copied(), "{text}");
        }
    }
}
