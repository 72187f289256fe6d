#![forbid(unsafe_code)]
//! Pings of Tailscale's own message protocol (`net/packet/tsmp.go`): IP protocol 99, a kind byte, and
//! what the kind says. They go by the tunnel and end in the node: an answer shows that two nodes' keys
//! and allowed IPs fit, whatever filter and host say.

use std::net::IpAddr;

use crate::packet::checksum;
use crate::packet::header::{Fragment, Headers, TSMP};
use crate::types::Ping;

/// Largest of them in bytes: an IPv6 header, the kind, eight bytes of the ping, and a port.
pub(crate) const TSMP_LEN_MAX: usize = 40 + PONG_LEN;

const PING: u8 = b'p';
const PONG: u8 = b'o';
const DATA_LEN: usize = 8;
const PING_LEN: usize = 1 + DATA_LEN;
const PONG_LEN: usize = PING_LEN + 2;
const HOP_LIMIT: u8 = 64;

/// Writes a ping and returns its length: its eight bytes are the number, big-endian. `None` for addresses of
/// two families.
pub(crate) fn ping(ping: &Ping, out: &mut [u8; TSMP_LEN_MAX]) -> Option<usize> {
    let mut body = [PING; PING_LEN];
    body[1..].copy_from_slice(&ping.number.to_be_bytes());
    write(ping.src, ping.dst, &body, out)
}

/// The number of the ping that this answers, and the TCP port of the sender's peerapi, 0 for none. `None` if
/// the packet is no answer.
pub(crate) fn answered(headers: &Headers, packet: &[u8]) -> Option<(u64, u16)> {
    let (data, rest) = said(headers, packet, PONG)?;
    let port = rest.first_chunk().copied().unwrap_or_default();
    Some((u64::from_be_bytes(*data), u16::from_be_bytes(port)))
}

/// Writes the answer to a ping and returns its length: the ping's eight bytes, and in big-endian the
/// TCP port of our peerapi, 0 for none. `None` if the packet is no ping.
pub(crate) fn pong(
    headers: &Headers,
    packet: &[u8],
    peerapi: u16,
    out: &mut [u8; TSMP_LEN_MAX],
) -> Option<usize> {
    let (data, _) = said(headers, packet, PING)?;
    let mut body = [PONG; PONG_LEN];
    body[1..=DATA_LEN].copy_from_slice(data);
    body[1 + DATA_LEN..].copy_from_slice(&peerapi.to_be_bytes());
    write(headers.dst, headers.src, &body, out)
}

/// The eight bytes of a whole message of a kind, and what is behind them.
fn said<'a>(
    headers: &Headers,
    packet: &'a [u8],
    kind: u8,
) -> Option<(&'a [u8; DATA_LEN], &'a [u8])> {
    if headers.protocol != TSMP || headers.fragment != Fragment::Whole {
        return None;
    }
    let (&of, rest) = headers.transport(packet).split_first()?;
    rest.split_first_chunk().filter(|_| of == kind)
}

/// Writes an IP packet and returns its length; `None` for addresses of two families.
fn write(src: IpAddr, dst: IpAddr, body: &[u8], out: &mut [u8; TSMP_LEN_MAX]) -> Option<usize> {
    const V4_LEN: u8 = 20;
    let body_len = u8::try_from(body.len()).expect("a few bytes");
    let header = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let header = &mut out[..usize::from(V4_LEN)];
            header.fill(0);
            (header[0], header[3]) = (0x45, V4_LEN + body_len);
            (header[8], header[9]) = (HOP_LIMIT, TSMP);
            header[12..16].copy_from_slice(&src.octets());
            header[16..20].copy_from_slice(&dst.octets());
            let sum = checksum::of(header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            header.len()
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let header = &mut out[..40];
            header[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, body_len, TSMP, HOP_LIMIT]);
            header[8..24].copy_from_slice(&src.octets());
            header[24..40].copy_from_slice(&dst.octets());
            header.len()
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
    };
    out[header..][..body.len()].copy_from_slice(body);
    Some(header + body.len())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::packet::build::Builder;

    fn answer(packet: &[u8]) -> Option<Vec<u8>> {
        let headers = Headers::parse(packet).unwrap();
        let mut out = [0xee; TSMP_LEN_MAX];
        let len = pong(&headers, packet, 0x1234, &mut out)?;
        Some(out[..len].to_vec())
    }

    #[test]
    fn a_ping_is_answered_with_its_bytes_and_the_port_of_the_peerapi() {
        for (us, them) in [("10.0.0.1:0", "10.0.0.2:0"), ("[fd7a::1]:0", "[fd7a::2]:0")] {
            let (us, them): (SocketAddr, SocketAddr) = (us.parse().unwrap(), them.parse().unwrap());
            let ping = Builder::new(them, us).ip(TSMP, b"p12345678 and more");
            let want = Builder {
                fragment: 0,
                id: 0,
                ..Builder::new(us, them)
            };
            let want = want.ip(TSMP, b"o12345678\x12\x34");
            assert_eq!(answer(&ping), Some(want));
        }
    }

    #[test]
    fn a_ping_of_ours_is_known_by_its_answer() {
        for (us, them) in [("10.0.0.1:0", "10.0.0.2:0"), ("[fd7a::1]:0", "[fd7a::2]:0")] {
            let (us, them): (SocketAddr, SocketAddr) = (us.parse().unwrap(), them.parse().unwrap());
            let asked = Ping {
                number: 0x3132_3334_3536_3738,
                src: us.ip(),
                dst: them.ip(),
            };
            let mut out = [0xee; TSMP_LEN_MAX];
            let len = ping(&asked, &mut out).unwrap();
            let want = Builder {
                fragment: 0,
                id: 0,
                ..Builder::new(us, them)
            };
            assert_eq!(out[..len], want.ip(TSMP, b"p12345678"));
            let known = |body: &[u8]| {
                let packet = Builder::new(them, us).ip(TSMP, body);
                answered(&Headers::parse(&packet).unwrap(), &packet)
            };
            assert_eq!(known(b"o12345678\x12\x34"), Some((asked.number, 0x1234)));
            assert_eq!(known(b"o12345678"), Some((asked.number, 0)));
            assert_eq!(known(b"o1234567"), None);
            assert_eq!(known(b"p12345678"), None);
            let mixed = Ping {
                dst: "10.0.0.1".parse().unwrap(),
                src: "fd7a::1".parse().unwrap(),
                ..asked
            };
            assert_eq!(ping(&mixed, &mut out), None);
        }
    }

    #[test]
    fn what_is_no_whole_ping_is_not_answered() {
        let (us, them) = (([10, 0, 0, 1], 0).into(), ([10, 0, 0, 2], 0).into());
        let from = Builder::new(them, us);
        let fragment = Builder {
            fragment: 0x2000,
            ..from
        };
        for packet in [
            from.ip(TSMP, b"o12345678"),
            from.ip(TSMP, b"!12345678"),
            from.ip(TSMP, b"p1234567"),
            from.ip(TSMP, b""),
            from.ip(98, b"p12345678"),
            fragment.ip(TSMP, b"p12345678"),
        ] {
            assert_eq!(answer(&packet), None);
        }
    }
}
