//! What no peer would send, at every socket: it must be counted and dropped, and nothing else happen.

#![forbid(unsafe_code)]

use anyhow::Context;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

/// `garbage`: where to send it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// UDP sockets: WireGuard, DISCO, STUN.
    #[arg(long)]
    udp: Vec<SocketAddr>,
    /// TCP sockets: relay, coordination.
    #[arg(long)]
    tcp: Vec<SocketAddr>,
}

/// Datagrams per UDP socket; connections are a hundredth of it.
const COUNT: u32 = 5000;
/// First bytes that get a datagram past the first check: WireGuard types 1 to 4, DISCO, STUN.
const HEADS: [&[u8]; 7] = [
    &[],
    &[1, 0, 0, 0],
    &[2, 0, 0, 0],
    &[3, 0, 0, 0],
    &[4, 0, 0, 0],
    b"TS\xf0\x9f\x92\xac",
    &[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42],
];
/// Lengths that some message has, and their neighbours.
const LENGTHS: [usize; 16] = [
    0, 1, 3, 4, 8, 19, 20, 31, 32, 63, 64, 92, 148, 149, 1400, 9000,
];

/// Sends it all.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(1);
    for to in &args.udp {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        for _ in 0..COUNT {
            // The other end may refuse; that is an answer too.
            let _ = socket.send_to(&datagram(&mut rng), to);
        }
    }
    for to in &args.tcp {
        for _ in 0..COUNT / 100 {
            let mut stream = TcpStream::connect_timeout(to, Duration::from_secs(2))
                .with_context(|| format!("{to} takes no connections any more"))?;
            stream.set_read_timeout(Some(Duration::from_millis(20)))?;
            stream.set_write_timeout(Some(Duration::from_millis(200)))?;
            for chunk in stream_opening(&mut rng) {
                if stream.write_all(&chunk).is_err() {
                    break;
                }
            }
            let _ = stream.read(&mut [0; 256]);
        }
    }
    Ok(())
}

/// A known beginning, or none, and noise up to some length.
fn datagram(rng: &mut StdRng) -> Vec<u8> {
    let head = HEADS[rng.random_range(0..HEADS.len())];
    let length = match rng.random_range(0..3) {
        0 => rng.random_range(0..2000),
        _ => LENGTHS[rng.random_range(0..LENGTHS.len())],
    };
    let mut bytes = vec![0; length];
    rng.fill_bytes(&mut bytes);
    let known = head.len().min(length);
    bytes[..known].copy_from_slice(&head[..known]);
    bytes
}

/// Openings of a TLS, HTTP or DERP conversation that go wrong.
fn stream_opening(rng: &mut StdRng) -> Vec<Vec<u8>> {
    let mut noise = vec![0; 600];
    rng.fill_bytes(&mut noise);
    match rng.random_range(0..5) {
        0 => vec![noise],
        // A TLS record header that promises more than TLS allows.
        1 => vec![vec![22, 3, 1, 0xff, 0xff], noise],
        // A hello cut short.
        2 => vec![vec![22, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3]],
        3 => vec![b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\n".to_vec(), noise],
        // A DERP frame header that announces 4 GiB.
        _ => vec![vec![4, 0xff, 0xff, 0xff, 0xff], noise],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_repeats_with_its_seed_and_reaches_every_head() {
        let make = |seed| {
            let mut rng = StdRng::seed_from_u64(seed);
            (0..2000).map(|_| datagram(&mut rng)).collect::<Vec<_>>()
        };
        assert_eq!(make(1), make(1));
        let all = make(1);
        for head in HEADS {
            assert!(
                all.iter()
                    .any(|bytes| bytes.len() > 20 && bytes.starts_with(head))
            );
        }
        assert!(all.iter().any(Vec::is_empty));
    }
}
