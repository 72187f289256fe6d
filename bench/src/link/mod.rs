//! The link emulator: two TUN devices joined by a wire of given delay, jitter, loss and rate.
//!
//! Some kernels come without netem. What the routing sends into one device comes out of the other,
//! in either direction, after [`queue::LinkQueue`] has had its way with it. The devices may sit in
//! different namespaces, or in one, where policy routing decides what takes the detour. One thread
//! serves both directions: it writes what is due, sleeps until the next packet is due or one comes
//! in, and reads what there is. Timer slack is set to its least, so a delay of 20 ms is exact to
//! well below 0.1 ms on an idle machine.

pub(crate) mod queue;

use crate::{clock, netns};
use anyhow::{Context, bail};
use queue::{LinkQueue, Shape};
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::time::Duration;
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

/// Packets read from one device before the other gets its turn.
const READS_PER_TURN_MAX: usize = 64;

/// Packets that the kernel holds for us while we are busy; the bound that counts is the wire's own.
const TX_QUEUE_LEN: u32 = 10_000;

/// `link`: the wire and its two ends.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// First end, as DEVICE or NAMESPACE:DEVICE. It is created, up, without addresses.
    a: String,
    /// Second end, in the same form.
    b: String,
    /// One-way delay in milliseconds, each way.
    #[arg(long, default_value_t = 0.0)]
    delay_ms: f64,
    /// Largest deviation from the delay in milliseconds.
    #[arg(long, default_value_t = 0.0)]
    jitter_ms: f64,
    /// Packets lost, in percent, each way.
    #[arg(long, default_value_t = 0.0)]
    loss_pct: f64,
    /// Rate in Mb/s, each way; 0 is unlimited.
    #[arg(long, default_value_t = 0.0)]
    rate_mbps: f64,
    /// Bytes that may wait, each way.
    #[arg(long, default_value_t = 16 << 20)]
    queue_bytes: usize,
    /// MTU of both devices.
    #[arg(long, default_value_t = 1500)]
    mtu: u16,
    /// Seed of loss and jitter.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Keep counts of packets passed, lost and overflowed in this file, renewed once a second.
    #[arg(long)]
    stats: Option<std::path::PathBuf>,
    /// Create this file once the wire is up.
    #[arg(long)]
    ready: Option<std::path::PathBuf>,
}

/// Runs the wire until the process is killed or a device goes away.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if !(0.0..=100.0).contains(&args.loss_pct) || args.delay_ms < 0.0 || args.jitter_ms < 0.0 {
        bail!("loss is 0 to 100 percent, delay and jitter are not negative");
    }
    least_timer_slack();
    let a = open(&args.a, args.mtu)?;
    let b = open(&args.b, args.mtu)?;
    let shape = Shape {
        delay: Duration::from_secs_f64(args.delay_ms / 1e3),
        jitter: Duration::from_secs_f64(args.jitter_ms / 1e3),
        loss: args.loss_pct / 100.0,
        rate_bps: (args.rate_mbps > 0.0)
            .then(|| format!("{:.0}", args.rate_mbps * 1e6).parse())
            .transpose()?,
        queue_bytes_max: args.queue_bytes,
    };
    if let Some(ready) = &args.ready {
        std::fs::write(ready, b"ready\n").with_context(|| format!("writing {ready:?}"))?;
    }
    carry(&a, &b, &shape, args)
}

fn carry(a: &SyncDevice, b: &SyncDevice, shape: &Shape, args: &Args) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(args.seed);
    let mut wires = [LinkQueue::new(shape.clone()), LinkQueue::new(shape.clone())];
    let ends = [a, b];
    let mut buffer = vec![0; usize::from(args.mtu) + 64];
    let mut counted_at = clock::now();
    loop {
        if let Some(stats) = &args.stats
            && counted_at.elapsed() > Duration::from_secs(1)
        {
            counted_at = clock::now();
            std::fs::write(
                stats,
                format!("{:?}\n", [wires[0].counters(), wires[1].counters()]),
            )?;
        }
        for (from, wire) in wires.iter_mut().enumerate() {
            let now = clock::now();
            while let Some(packet) = wire.poll_arrival(now) {
                // A device that is down or full loses the packet, as a wire would.
                let _ = ends[1 - from].send(&packet);
            }
        }
        let due = wires.iter().filter_map(LinkQueue::poll_timeout).min();
        let now = clock::now();
        wait_readable(ends, due.map(|due| due.saturating_duration_since(now)))?;
        for (from, wire) in wires.iter_mut().enumerate() {
            for _ in 0..READS_PER_TURN_MAX {
                match ends[from].recv(&mut buffer) {
                    Ok(length) => {
                        wire.handle_packet(clock::now(), buffer[..length].to_vec(), &mut rng);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error).context("reading an end of the wire"),
                }
            }
        }
    }
}

/// Opens `DEVICE` or `NAMESPACE:DEVICE`; the namespace is entered by a thread of its own.
fn open(end: &str, mtu: u16) -> anyhow::Result<SyncDevice> {
    let (ns, name) = match end.split_once(':') {
        Some((ns, name)) => (Some(ns.to_owned()), name.to_owned()),
        None => (None, end.to_owned()),
    };
    let opened = std::thread::spawn(move || -> anyhow::Result<SyncDevice> {
        if let Some(ns) = ns {
            netns::enter(&ns)?;
        }
        let device = DeviceBuilder::new()
            .name(&name)
            .layer(Layer::L3)
            .mtu(mtu)
            .enable(true)
            .tx_queue_len(TX_QUEUE_LEN)
            .build_sync()
            .with_context(|| format!("creating the TUN device {name}"))?;
        device.set_nonblocking(true)?;
        Ok(device)
    });
    opened
        .join()
        .map_err(|_| anyhow::anyhow!("opening {end} panicked"))?
}

/// Sleeps until an end has a packet or `timeout` has passed.
fn wait_readable(ends: [&SyncDevice; 2], timeout: Option<Duration>) -> anyhow::Result<()> {
    let mut fds = ends.map(|end| libc::pollfd {
        fd: end.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    let spec = timeout.map(|span| libc::timespec {
        tv_sec: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(span.subsec_nanos()),
    });
    let spec_ptr = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: both descriptors are open and the array and the timespec outlive the call.
    let got = unsafe { libc::ppoll(fds.as_mut_ptr(), 2, spec_ptr, std::ptr::null()) };
    if got < 0 {
        let error = std::io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error).context("waiting for packets");
        }
    }
    Ok(())
}

fn least_timer_slack() {
    // SAFETY: takes numbers only and changes nothing but this thread's timer slack.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1u64) };
}
