//! A flood from many sources, at a steady rate: handshake messages, or what the discovery socket gets.
//!
//! Sources are addresses of a prefix that the namespace is made to own (`ip route add local PREFIX
//! dev lo`), times ports. What is sent is made beforehand, so that the flood costs no more than its
//! sending.

use crate::{clock, netns};
use anyhow::{Context, bail};
use rand::rngs::StdRng;
use rand::{CryptoRng, RngExt, SeedableRng};
use ringtail_dataplane::noise::{LocalKeys, MAC_LEN, Remote, Tai64n, initiation, put_mac1};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// `flood`: what to send where.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Network namespace to send from.
    #[arg(long)]
    netns: Option<String>,
    /// The socket to flood.
    #[arg(long)]
    to: SocketAddrV4,
    /// Datagrams a second.
    #[arg(long, default_value_t = 200_000)]
    rate: u32,
    /// How long, in seconds.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// First of the source addresses.
    #[arg(long, default_value = "198.18.0.0")]
    source: Ipv4Addr,
    /// How many source addresses.
    #[arg(long, default_value_t = 65_536)]
    sources: u32,
    /// How many source ports.
    #[arg(long, default_value_t = 16)]
    ports: usize,
    /// The first of them; 0 for any.
    #[arg(long, default_value_t = 0)]
    source_port: u16,
    /// What the messages are.
    #[arg(long, value_enum, default_value_t = Kind::Strangers)]
    kind: Kind,
    /// The victim's public key, hex: what all need to know whose messages have a right MAC1.
    #[arg(long)]
    public_key: Option<String>,
    /// The DISCO key of a peer of the victim's, hex: what `forged` bears.
    #[arg(long)]
    disco_key: Option<String>,
    /// A peer's private key, hex: what `replays` are made with.
    #[arg(long)]
    private_key: Option<String>,
}

/// What a flood consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// Initiations with a right MAC1 by people the victim does not know: the dearest to refuse.
    Strangers,
    /// Initiations of one peer, genuine but for being the same over and over again.
    Replays,
    /// Initiations by strangers, with a right MAC1 and a cookie that is made up.
    Proven,
    /// Responses and cookie replies to indexes that are guessed, the responses with a right MAC1.
    Answers,
    /// All of these in turn.
    Everything,
    /// The form of an initiation, and noise.
    Noise,
    /// The forms of all three handshake messages, and noise.
    Mixed,
    /// Nothing that anybody knows; DISCO of keys that nobody has; STUN answers to nobody's question.
    Junk,
    /// DISCO by the key of a peer, which is no secret, and noise.
    Forged,
}

/// Different messages of a flood.
const MESSAGES: usize = 2048;
/// Messages one system call takes.
const BATCH: usize = 64;
/// The rate is kept over such steps.
const STEP: Duration = Duration::from_millis(1);
/// So much of a stall is made up for.
const STALL: Duration = Duration::from_millis(5);

/// Sends it all, then says how much that was.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(ns) = &args.netns {
        netns::enter(ns)?;
    }
    let mut rng: StdRng = StdRng::from_rng(&mut rand::rng());
    let messages = messages(args, &mut rng)?;
    let sockets: Vec<UdpSocket> = (0..args.ports.max(1))
        .map(|n| {
            let port = match args.source_port {
                0 => 0,
                first => first.wrapping_add(u16::try_from(n).unwrap_or(0)),
            };
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))
        })
        .collect::<Result<_, _>>()?;
    let start = clock::now();
    let end = start + Duration::from_secs_f64(args.seconds);
    let (mut sent, mut refused) = (0u64, 0u64);
    let mut at = 0usize;
    let rate = f64::from(args.rate);
    let (mut last, mut due) = (start, 0.0);
    while last < end {
        let now = clock::now();
        // What a stall has kept back is not made up for: that would be a burst.
        due = (due + (now - last).as_secs_f64() * rate).min(rate * STALL.as_secs_f64());
        last = now;
        if due < BATCH as f64 {
            clock::sleep(STEP);
            continue;
        }
        let socket = &sockets[at / BATCH % sockets.len()];
        let taken = send_batch(socket, args, &messages, at)?;
        sent += taken as u64;
        refused += (BATCH - taken) as u64;
        at += BATCH;
        due -= BATCH as f64;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{{\"sent\": {sent}, \"refused\": {refused}, \"seconds\": {seconds:.2}, \"rate\": {:.0}}}",
        sent as f64 / seconds
    );
    Ok(())
}

fn messages(args: &Args, rng: &mut impl CryptoRng) -> anyhow::Result<Vec<Vec<u8>>> {
    let key = |text: &Option<String>| text.as_deref().map(unhex).transpose();
    let (public, private) = (key(&args.public_key)?, key(&args.private_key)?);
    let disco_key = match &args.disco_key {
        Some(text) => Some(unhex(text)?),
        None if args.kind == Kind::Forged => bail!("forged needs --disco-key"),
        None => None,
    };
    (0..MESSAGES)
        .map(|i| {
            let strangers = |rng| initiation_of(None, public.as_ref(), rng);
            let kind = match (args.kind, i % 4) {
                (Kind::Everything, 0) => Kind::Strangers,
                (Kind::Everything, 1) => Kind::Proven,
                (Kind::Everything, 2) => Kind::Answers,
                (Kind::Everything, _) => Kind::Noise,
                (kind, _) => kind,
            };
            let (kind, len) = match (kind, i % 3) {
                (Kind::Strangers, _) => return strangers(rng),
                (Kind::Replays, _) => {
                    let private = private.context("replays need --private-key")?;
                    return initiation_of(Some(private), public.as_ref(), rng);
                }
                (Kind::Proven, _) => {
                    let mut message = strangers(rng)?;
                    rng.fill_bytes(&mut message[148 - MAC_LEN..]);
                    return Ok(message);
                }
                (Kind::Answers, 0) => return guess(public.as_ref(), rng),
                (Kind::Everything | Kind::Answers, _) => (3, 64),
                (Kind::Noise, _) | (Kind::Mixed, 0) => (1, 148),
                (Kind::Mixed, 1) => (2, 92),
                (Kind::Mixed, _) => (3, 64),
                (Kind::Junk | Kind::Forged, n) => return Ok(discovery(n, disco_key, rng)),
            };
            let mut message = vec![0; len];
            rng.fill_bytes(&mut message);
            message[..4].copy_from_slice(&[kind, 0, 0, 0]);
            if kind == 3 {
                message[5] %= SHARDS;
            }
            Ok(message)
        })
        .collect()
}

/// What the discovery socket gets: DISCO by this key, or the `n`-th form of junk.
fn discovery(n: usize, key: Option<[u8; 32]>, rng: &mut impl CryptoRng) -> Vec<u8> {
    let mut message = vec![0; 124];
    rng.fill_bytes(&mut message);
    let head: &[u8] = match (key, n) {
        (None, 0) => b"junk",
        (None, 1) => &[1, 1, 0, 104, 0x21, 0x12, 0xa4, 0x42],
        (None | Some(_), _) => b"TS\xf0\x9f\x92\xac",
    };
    message[..head.len()].copy_from_slice(head);
    if let Some(key) = key {
        message[head.len()..][..key.len()].copy_from_slice(&key);
    }
    message
}

/// Guessed indexes name one of so many shards.
const SHARDS: u8 = 2;

/// An initiation by the owner of a private key, or by somebody who was made up for it.
fn initiation_of(
    private: Option<[u8; 32]>,
    public: Option<&[u8; 32]>,
    rng: &mut impl CryptoRng,
) -> anyhow::Result<Vec<u8>> {
    let private = private.unwrap_or_else(|| {
        let mut private = [0; 32];
        rng.fill_bytes(&mut private);
        private
    });
    let local = LocalKeys::new(&private);
    let remote = Remote::new(&local, public.context("no --public-key")?, None);
    let mut message = [0; 148];
    let stamp = Tai64n::next(Duration::from_secs(1_700_000_000), None);
    initiation(
        &local,
        &remote,
        rng.random(),
        stamp,
        None,
        rng,
        &mut message,
    )?;
    Ok(message.to_vec())
}

/// A response with a right MAC1 to an index that is guessed.
fn guess(public: Option<&[u8; 32]>, rng: &mut impl CryptoRng) -> anyhow::Result<Vec<u8>> {
    let mut private = [0; 32];
    rng.fill_bytes(&mut private);
    let victim = Remote::new(
        &LocalKeys::new(&private),
        public.context("no --public-key")?,
        None,
    );
    let mut message = vec![0; 92];
    rng.fill_bytes(&mut message);
    message[..4].copy_from_slice(&[2, 0, 0, 0]);
    message[9] %= SHARDS;
    put_mac1(&victim, &mut message);
    Ok(message)
}

fn unhex(text: &str) -> anyhow::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        bail!("a key has 64 hex digits");
    }
    for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16)?;
    }
    Ok(bytes)
}

/// `struct in_pktinfo` behind its header, aligned as the kernel wants it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Source {
    header: libc::cmsghdr,
    info: libc::in_pktinfo,
}

/// Sends the next messages, each from the next address; returns how many the kernel took.
fn send_batch(
    socket: &UdpSocket,
    args: &Args,
    messages: &[Vec<u8>],
    at: usize,
) -> anyhow::Result<usize> {
    let mut name = libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET)?,
        sin_port: args.to.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: args.to.ip().to_bits().to_be(),
        },
        sin_zero: [0; 8],
    };
    let first = args.source.to_bits();
    let mut sources = [Source {
        header: libc::cmsghdr {
            cmsg_len: size_of::<libc::cmsghdr>() + size_of::<libc::in_pktinfo>(),
            cmsg_level: libc::IPPROTO_IP,
            cmsg_type: libc::IP_PKTINFO,
        },
        info: libc::in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: libc::in_addr { s_addr: 0 },
            ipi_addr: libc::in_addr { s_addr: 0 },
        },
    }; BATCH];
    let mut vectors: Vec<libc::iovec> = Vec::with_capacity(BATCH);
    for (i, source) in sources.iter_mut().enumerate() {
        // A large odd step: neighbours in time are not neighbours in the prefix.
        let host = u32::try_from(((at + i) * 40_503) % args.sources.max(1) as usize)?;
        source.info.ipi_spec_dst.s_addr = first.wrapping_add(host).to_be();
        let message = &messages[(at + i) % messages.len()];
        vectors.push(libc::iovec {
            iov_base: message.as_ptr().cast_mut().cast(),
            iov_len: message.len(),
        });
    }
    let mut headers: Vec<libc::mmsghdr> = Vec::with_capacity(BATCH);
    for (source, vector) in sources.iter_mut().zip(&mut vectors) {
        // SAFETY: all-zero is a valid `mmsghdr`: null pointers with zero lengths.
        let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        header.msg_hdr.msg_name = (&raw mut name).cast();
        header.msg_hdr.msg_namelen = libc::socklen_t::try_from(size_of_val(&name))?;
        header.msg_hdr.msg_iov = vector;
        header.msg_hdr.msg_iovlen = 1;
        header.msg_hdr.msg_control = (&raw mut *source).cast();
        header.msg_hdr.msg_controllen = size_of::<Source>() as _;
        headers.push(header);
    }
    let count = libc::c_uint::try_from(BATCH)?;
    // SAFETY: every header points to a name, a vector, a message and a source that outlive the
    // call, which writes only `msg_len`.
    let taken = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            count,
            libc::MSG_DONTWAIT,
        )
    };
    match usize::try_from(taken) {
        Ok(taken) => Ok(taken),
        Err(_) => match std::io::Error::last_os_error() {
            // A full queue, or the refusal of an earlier datagram.
            error
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAGAIN | libc::ENOBUFS | libc::ECONNREFUSED | libc::EPERM)
                ) =>
            {
                Ok(0)
            }
            error => Err(error).context("sending the flood"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(kind: Kind, key: Option<&str>) -> Args {
        Args {
            netns: None,
            to: "127.0.0.1:9".parse().expect("address"),
            rate: 1,
            seconds: 0.0,
            source: Ipv4Addr::LOCALHOST,
            sources: 1,
            ports: 1,
            kind,
            disco_key: None,
            public_key: key.map(str::to_owned),
            private_key: None,
            source_port: 0,
        }
    }

    #[test]
    fn a_stranger_passes_the_first_check_and_is_nobody() {
        let victim = LocalKeys::new(&[7; 32]);
        let key = victim
            .public()
            .iter()
            .fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
        let mut rng = rand::rng();
        let strangers = args(Kind::Strangers, Some(&key));
        let message = &messages(&strangers, &mut rng).expect("made")[0];
        let peeked = ringtail_dataplane::noise::peek_initiation(&victim, message);
        assert!(peeked.is_ok(), "somebody's initiation for the victim");
        assert!(messages(&args(Kind::Strangers, None), &mut rng).is_err());
    }

    #[test]
    fn every_kind_of_message_can_be_made() {
        let key = "09".repeat(32);
        for kind in [Kind::Proven, Kind::Answers, Kind::Everything] {
            let made = messages(&args(kind, Some(&key)), &mut rand::rng()).expect("made");
            assert_eq!(made.len(), MESSAGES);
            let lens = |m: &Vec<u8>| [0, 148, 92, 64][usize::from(m[0])] == m.len();
            assert!(made.iter().all(lens), "{kind:?}");
        }
        let mut replays = args(Kind::Replays, Some(&key));
        assert!(messages(&replays, &mut rand::rng()).is_err());
        replays.private_key = Some(key);
        assert!(messages(&replays, &mut rand::rng()).is_ok());
    }

    #[test]
    fn a_mixed_flood_has_all_forms() {
        let made = messages(&args(Kind::Mixed, None), &mut rand::rng()).expect("made");
        let forms: Vec<(u8, usize)> = made[..3].iter().map(|m| (m[0], m.len())).collect();
        assert_eq!(forms, [(1, 148), (2, 92), (3, 64)]);
    }

    #[test]
    fn datagrams_come_from_many_addresses() {
        let receiver = UdpSocket::bind("127.0.0.1:0").expect("port");
        let mut args = args(Kind::Noise, None);
        args.source = "127.1.0.0".parse().expect("address");
        args.sources = 1 << 16;
        let std::net::SocketAddr::V4(to) = receiver.local_addr().expect("bound") else {
            panic!("of the other family");
        };
        args.to = to;
        let made = messages(&args, &mut rand::rng()).expect("made");
        let sender = UdpSocket::bind("0.0.0.0:0").expect("port");
        assert_eq!(send_batch(&sender, &args, &made, 0).expect("sent"), BATCH);
        receiver
            .set_read_timeout(Some(Duration::from_secs(2)))
            .expect("set");
        let mut bytes = [0; 200];
        let sources: std::collections::HashSet<_> = (0..BATCH)
            .map(|_| receiver.recv_from(&mut bytes).expect("received").1.ip())
            .collect();
        assert_eq!(sources.len(), BATCH);
    }
}
