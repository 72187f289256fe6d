//! A stream of numbered ICMP echoes that accounts for every single one.
//!
//! Sends at a fixed rate whether or not answers come (ping(8) stretches its interval when they do
//! not), takes arrival times from the kernel, and at the end knows for each number when it left
//! and how long its answer took, if one came. Gaps are also reported live, as events.

use crate::clock;
use crate::events::{self, Event};
use anyhow::{Context, bail};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Silence from here on is a gap worth an event.
const GAP: Duration = Duration::from_millis(150);
/// How long answers to the last echoes are waited for.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes of ICMP header before our number.
const ICMP_HEADER_LEN: usize = 8;
/// Bytes from there on.
const PAYLOAD_LEN: usize = 56;

/// One echo: its number, when it left, and its round trip if it came back.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Echo {
    /// Nanoseconds since the Unix epoch.
    pub(crate) sent_ns: u64,
    /// Round trip in microseconds; none was lost.
    pub(crate) rtt_us: Option<f64>,
}

/// Counts and percentiles of a stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) sent: u64,
    pub(crate) lost: u64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) max_us: f64,
    /// (percentile, microseconds) rows for a distribution chart.
    #[serde(default)]
    pub(crate) distribution: Vec<(f64, f64)>,
}

impl Summary {
    /// No answer at all is too lossy, however few were sent: a busy machine sends fewer than asked.
    fn too_lossy(&self, lost_max: u64) -> bool {
        self.lost > lost_max || self.lost == self.sent
    }
}

/// Percentiles of the distribution that a summary keeps.
const PERCENTILES: [f64; 12] = [
    0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0,
];

/// Counts and percentiles of what was sent and came back.
pub(crate) fn summarise(echoes: &[Echo]) -> anyhow::Result<Summary> {
    // Three digits from 100 ns to a minute.
    let mut histogram = Histogram::<u64>::new_with_bounds(1, 600_000_000, 3)?;
    for rtt_us in echoes.iter().filter_map(|echo| echo.rtt_us) {
        let tenths: u64 = format!("{:.0}", (rtt_us * 10.0).max(1.0)).parse()?;
        histogram.saturating_record(tenths);
    }
    let at = |percentile| {
        let tenths = u32::try_from(histogram.value_at_percentile(percentile)).unwrap_or(u32::MAX);
        f64::from(tenths) / 10.0
    };
    let sent = u64::try_from(echoes.len())?;
    let answered = histogram.len();
    Ok(Summary {
        sent,
        lost: sent - answered,
        p50_us: at(50.0),
        p99_us: at(99.0),
        max_us: at(100.0),
        distribution: if answered == 0 {
            Vec::new()
        } else {
            PERCENTILES
                .iter()
                .map(|&percentile| (percentile, at(percentile)))
                .collect()
        },
    })
}

/// What to send, and until when.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) target: Ipv4Addr,
    pub(crate) interval: Duration,
    /// Stop after so long.
    pub(crate) duration: Option<Duration>,
    /// Stop once this file exists.
    pub(crate) stop_file: Option<PathBuf>,
    /// Where gaps are told as they end.
    pub(crate) events: Option<PathBuf>,
}

/// Runs a stream in the calling thread's namespace.
pub(crate) fn stream(plan: &Plan) -> anyhow::Result<Vec<Echo>> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))
        .context("opening a raw socket (needs root)")?;
    socket.set_nonblocking(true)?;
    socket.set_recv_buffer_size(1 << 20)?;
    take_kernel_timestamps(&socket)?;
    let target = SocketAddrV4::new(plan.target, 0).into();
    let ident: u16 = rand::random();
    let start = clock::now();
    let mut echoes: Vec<Echo> = Vec::new();
    let mut gaps = Gaps::default();
    let mut ended_at = None;
    loop {
        let elapsed = clock::now().duration_since(start);
        let stopping = plan.duration.is_some_and(|duration| elapsed >= duration)
            || plan.stop_file.as_ref().is_some_and(|file| file.exists());
        if stopping && ended_at.is_none() {
            ended_at = Some(clock::now());
        }
        if let Some(ended_at) = ended_at
            && (clock::now().duration_since(ended_at) > LINGER
                || echoes.iter().all(|echo| echo.rtt_us.is_some()))
        {
            return Ok(echoes);
        }
        let number = u32::try_from(echoes.len())?;
        let next = plan.interval * number;
        if ended_at.is_none() && elapsed >= next {
            let packet = request(ident, u64::from(number));
            echoes.push(Echo {
                sent_ns: clock::unix_ns(),
                rtt_us: None,
            });
            // A send that the kernel refuses is a lost echo, not the end of the stream.
            let _ = socket.send_to(&packet, &target);
        }
        let number = u32::try_from(echoes.len())?;
        let wait = (plan.interval * number).saturating_sub(clock::now().duration_since(start));
        let wait = if ended_at.is_some() {
            Duration::from_millis(20)
        } else {
            wait
        };
        wait_readable(&socket, wait.min(Duration::from_millis(100)));
        while let Some((arrived_ns, number)) = receive(&socket, ident)? {
            let Some(echo) = usize::try_from(number).ok().and_then(|n| echoes.get_mut(n)) else {
                continue;
            };
            // The first of two copies counts: both paths may carry one for a while.
            if echo.rtt_us.is_none() {
                let rtt_ns = u32::try_from(arrived_ns.saturating_sub(echo.sent_ns));
                echo.rtt_us = Some(f64::from(rtt_ns.unwrap_or(u32::MAX)) / 1e3);
                if let Some(path) = &plan.events {
                    gaps.handle_answer(&echoes, usize::try_from(number)?, path)?;
                }
            }
        }
    }
}

/// Finds gaps as they end.
#[derive(Debug, Default)]
struct Gaps {
    last_answered: Option<usize>,
}

impl Gaps {
    fn handle_answer(&mut self, echoes: &[Echo], number: usize, path: &Path) -> anyhow::Result<()> {
        let before = self.last_answered;
        if before.is_some_and(|before| before >= number) {
            return Ok(());
        }
        self.last_answered = Some(number);
        let rtt_ms = echoes[number].rtt_us.unwrap_or_default() / 1e3;
        let Some(before) = before else {
            return tell(
                path,
                "ping_first",
                json!({"number": number, "rtt_ms": rtt_ms}),
            );
        };
        let between = echoes[before + 1..number]
            .iter()
            .filter(|echo| echo.rtt_us.is_none());
        let unanswered = between.count();
        if unanswered == 0 {
            return Ok(());
        }
        let silent_ns = echoes[number].sent_ns - echoes[before + 1].sent_ns;
        let silent = Duration::from_nanos(silent_ns);
        if silent < GAP {
            return Ok(());
        }
        let fields = json!({"unanswered": unanswered, "ms": silent.as_secs_f64() * 1e3});
        tell(path, "ping_gap", fields)
    }
}

fn tell(path: &Path, name: &str, fields: Value) -> anyhow::Result<()> {
    let Value::Object(fields) = fields else {
        bail!("event fields are an object")
    };
    let event = Event {
        t_ns: clock::unix_ns(),
        node: "ping".into(),
        event: name.into(),
        fields,
    };
    events::append(path, &event)
}

/// An ICMP echo request whose payload starts with our number.
fn request(ident: u16, number: u64) -> [u8; ICMP_HEADER_LEN + PAYLOAD_LEN] {
    let mut packet = [0; ICMP_HEADER_LEN + PAYLOAD_LEN];
    packet[0] = 8;
    packet[4..6].copy_from_slice(&ident.to_be_bytes());
    packet[6..8].copy_from_slice(&number.to_be_bytes()[6..]);
    packet[8..16].copy_from_slice(&number.to_be_bytes());
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |byte| u32::from(*byte));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).map_or(0, |sum| !sum)
}

/// The number in an echo reply to us, from a packet that starts at the IPv4 header.
fn reply_number(packet: &[u8], ident: u16) -> Option<u64> {
    let header_len = usize::from(packet.first()? & 0x0f) * 4;
    let icmp = packet.get(header_len..)?;
    if *icmp.first()? != 0 || icmp.get(4..6)? != ident.to_be_bytes() {
        return None;
    }
    Some(u64::from_be_bytes(icmp.get(8..16)?.try_into().ok()?))
}

fn take_kernel_timestamps(socket: &Socket) -> anyhow::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>())?;
    // SAFETY: the option's value is an int that lives across the call, with its true length.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TIMESTAMPNS,
            std::ptr::from_ref(&on).cast(),
            length,
        )
    };
    if done != 0 {
        bail!("asking for timestamps: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

/// The next answer to us that waits in the socket, with its arrival in Unix nanoseconds.
fn receive(socket: &Socket, ident: u16) -> anyhow::Result<Option<(u64, u64)>> {
    loop {
        let mut packet = [0u8; 2048];
        let mut control = [0u64; 16];
        let mut part = libc::iovec {
            iov_base: packet.as_mut_ptr().cast(),
            iov_len: packet.len(),
        };
        // SAFETY: all zero is a valid msghdr: null pointers with zero lengths.
        let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: the message points at buffers of the stated lengths that outlive the call.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
        let Ok(length) = usize::try_from(got) else {
            let error = std::io::Error::last_os_error();
            let kind = error.kind();
            // Errors of earlier sends surface here; they are lost echoes.
            if matches!(
                kind,
                ErrorKind::Interrupted
                    | ErrorKind::HostUnreachable
                    | ErrorKind::NetworkUnreachable
                    | ErrorKind::ConnectionRefused
            ) {
                continue;
            }
            if kind == ErrorKind::WouldBlock {
                return Ok(None);
            }
            return Err(error).context("receiving echoes");
        };
        let arrived_ns = timestamp(&message).unwrap_or_else(clock::unix_ns);
        if let Some(number) = reply_number(&packet[..length], ident) {
            return Ok(Some((arrived_ns, number)));
        }
    }
}

/// The kernel's arrival time in a received message.
fn timestamp(message: &libc::msghdr) -> Option<u64> {
    // SAFETY: the kernel filled the control buffer this message points to, which is still alive.
    let header = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: CMSG_FIRSTHDR gives null or a whole header inside the control buffer.
    let header_ref = unsafe { header.as_ref() }?;
    if header_ref.cmsg_level != libc::SOL_SOCKET || header_ref.cmsg_type != libc::SCM_TIMESTAMPNS {
        return None;
    }
    // SAFETY: the header is whole, so its data starts inside the control buffer.
    let data = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: this control message type carries one timespec, unaligned access is allowed for.
    let spec = unsafe { data.cast::<libc::timespec>().read_unaligned() };
    let seconds = u64::try_from(spec.tv_sec).ok()?;
    seconds
        .checked_mul(1_000_000_000)?
        .checked_add(u64::try_from(spec.tv_nsec).ok()?)
}

fn wait_readable(socket: &Socket, timeout: Duration) {
    let mut fd = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let spec = libc::timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    // SAFETY: one open descriptor and a timespec, both of which outlive the call.
    unsafe { libc::ppoll(&raw mut fd, 1, &raw const spec, std::ptr::null()) };
}

/// `ping`: a stream from the command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Address to ping.
    target: Ipv4Addr,
    /// Echoes per second.
    #[arg(long, default_value_t = 100.0)]
    rate: f64,
    /// Stop after so many seconds.
    #[arg(long)]
    seconds: Option<f64>,
    /// Stop once this file exists.
    #[arg(long)]
    stop_file: Option<PathBuf>,
    /// Append gaps, as they end, to this event file.
    #[arg(long)]
    events: Option<PathBuf>,
    /// Write every echo to this JSON file.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Exit with an error when more echoes than this were lost, or all.
    #[arg(long)]
    lost_max: Option<u64>,
}

/// Runs the stream and prints its summary.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.rate <= 0.0 {
        bail!("the rate is above zero");
    }
    let echoes = stream(&Plan {
        target: args.target,
        interval: Duration::from_secs_f64(1.0 / args.rate),
        duration: args.seconds.map(Duration::from_secs_f64),
        stop_file: args.stop_file.clone(),
        events: args.events.clone(),
    })?;
    let summary = summarise(&echoes)?;
    if let Some(out) = &args.out {
        let whole = json!({"interval_ms": 1e3 / args.rate, "echoes": echoes});
        std::fs::write(out, serde_json::to_vec(&whole)?)?;
    }
    println!(
        "{} sent, {} lost, p50 {:.0} us, p99 {:.0} us, max {:.0} us",
        summary.sent, summary.lost, summary.p50_us, summary.p99_us, summary.max_us
    );
    if args.lost_max.is_some_and(|max| summary.too_lossy(max)) {
        bail!("more echoes were lost than allowed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo(sent_ms: u64, rtt_us: Option<f64>) -> Echo {
        Echo {
            sent_ns: sent_ms * 1_000_000,
            rtt_us,
        }
    }

    #[test]
    fn a_request_has_a_checksum_that_sums_to_nothing() {
        let packet = request(0x1234, 77);
        assert_eq!(packet.len(), 64);
        assert_eq!(checksum(&packet), 0);
        assert_eq!(checksum(&[0x00, 0x01, 0xf2]), !0xf201);
    }

    #[test]
    fn a_reply_gives_its_number_only_to_its_sender() {
        let mut packet = vec![0x45; 20];
        let mut icmp = request(9, 70_000);
        icmp[0] = 0;
        packet.extend(icmp);
        assert_eq!(reply_number(&packet, 9), Some(70_000));
        assert_eq!(reply_number(&packet, 8), None);
        assert_eq!(reply_number(&packet[..24], 9), None);
        assert_eq!(reply_number(&[], 9), None);
    }

    #[test]
    fn a_summary_counts_losses_and_ranks_the_rest() -> anyhow::Result<()> {
        let mut echoes: Vec<Echo> = (1..=100u32)
            .map(|n| echo(u64::from(n), Some(f64::from(n))))
            .collect();
        echoes.push(echo(101, None));
        let got = summarise(&echoes)?;
        assert_eq!((got.sent, got.lost), (101, 1));
        assert!((got.p50_us - 50.0).abs() < 0.2, "{got:?}");
        assert!((got.p99_us - 99.0).abs() < 0.2, "{got:?}");
        assert!((got.max_us - 100.0).abs() < 0.2, "{got:?}");
        assert!(got.too_lossy(0) && !got.too_lossy(1));
        let silence = summarise(&echoes[100..])?;
        assert!(silence.too_lossy(10), "none of one");
        assert_eq!(summarise(&[])?.lost, 0);
        Ok(())
    }

    #[test]
    fn a_gap_is_told_when_it_ends_with_its_losses_and_length() -> anyhow::Result<()> {
        let path = std::env::temp_dir().join(format!("rt-gap-{}", std::process::id()));
        let mut gaps = Gaps::default();
        let mut echoes: Vec<Echo> = (0..100).map(|n| echo(n * 10, None)).collect();
        for number in [0, 1, 2, 50, 51] {
            echoes[number].rtt_us = Some(100.0);
            gaps.handle_answer(&echoes, number, &path)?;
        }
        let told = events::read_all(std::slice::from_ref(&path))?;
        std::fs::remove_file(path)?;
        let names: Vec<_> = told.iter().map(|event| event.event.as_str()).collect();
        assert_eq!(names, ["ping_first", "ping_gap"]);
        assert_eq!(told[1].number("unanswered"), Some(47.0));
        assert_eq!(told[1].number("ms"), Some(470.0));
        Ok(())
    }
}
