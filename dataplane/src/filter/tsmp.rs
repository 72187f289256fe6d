#![forbid(unsafe_code)]
//! Pings of Tailscale's own message protocol (`net/packet/tsmp.go`): IP protocol 99, a kind byte, and
//! what the kind says. They go by the tunnel and end in the node: an answer shows that two nodes' keys
//! and allowed IPs fit, whatever filter and host say.

use std::net::IpAddr;

use crate::packet::checksum;
use crate::packet::header::{Fragment, Headers, TSMP};

/// Largest answer in bytes: an IPv6 header, the kind, eight bytes of the ping, and a port.
pub(crate) const PONG_LEN_MAX: usize = 40 + PONG_LEN;

const PING: u8 = b'p';
const PONG: u8 = b'o';
const DATA_LEN: usize = 8;
const BODY_LEN: u8 = 1 + 8 + 2;
const PONG_LEN: usize = BODY_LEN as usize;
const HOP_LIMIT: u8 = 64;

/// Writes the answer to a ping and returns its length: the ping's eight bytes, and in big-endian the
/// TCP port of our peerapi, 0 for none. `None` if the packet is no ping.
pub(crate) fn pong(
    headers: &Headers,
    packet: &[u8],
    peerapi: u16,
    out: &mut [u8; PONG_LEN_MAX],
) -> Option<usize> {
    if headers.protocol != TSMP || headers.fragment != Fragment::Whole {
        return None;
    }
    let (&kind, rest) = headers.transport(packet).split_first()?;
    let data = rest.first_chunk::<DATA_LEN>()?;
    if kind != PING {
        return None;
    }
    let header_len = write_header(headers.dst, headers.src, out)?;
    let body = &mut out[header_len..][..PONG_LEN];
    body[0] = PONG;
    body[1..=DATA_LEN].copy_from_slice(data);
    body[1 + DATA_LEN..].copy_from_slice(&peerapi.to_be_bytes());
    Some(header_len + PONG_LEN)
}

/// Writes an IP header for the answer and returns its length; `None` for addresses of two families.
fn write_header(src: IpAddr, dst: IpAddr, out: &mut [u8; PONG_LEN_MAX]) -> Option<usize> {
    const V4_LEN: u8 = 20;
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let header = &mut out[..usize::from(V4_LEN)];
            header.copy_from_slice(&[
                0x45,
                0,
                0,
                V4_LEN + BODY_LEN,
                0,
                0,
                0,
                0,
                HOP_LIMIT,
                TSMP,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
            ]);
            header[12..16].copy_from_slice(&src.octets());
            header[16..20].copy_from_slice(&dst.octets());
            let sum = checksum::of(header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            Some(header.len())
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let header = &mut out[..40];
            header[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, BODY_LEN, TSMP, HOP_LIMIT]);
            header[8..24].copy_from_slice(&src.octets());
            header[24..40].copy_from_slice(&dst.octets());
            Some(header.len())
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::packet::build::Builder;

    fn answer(packet: &[u8]) -> Option<Vec<u8>> {
        let headers = Headers::parse(packet).unwrap();
        let mut out = [0xee; PONG_LEN_MAX];
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
