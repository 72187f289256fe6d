//! Throughput of a relay, any relay: two of our clients, one stream of packets between them.
//!
//! ```text
//! relay_blast MAP.json [--seconds 5] [--packet 1400] [--window-kib 1024] [--io tokio|uring|mixed]
//!             [--min-gbit 0]
//! ```
//!
//! The sender keeps a window of bytes in flight, as a TCP stream inside the tunnel would, so the
//! figure is what arrives without loss. Packets that do not arrive are given up after 200 ms and
//! counted. Both clients run on a thread of their own, the relay is whatever the map names.

#![expect(clippy::print_stdout, reason = "a measuring program prints its result")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::{Parser, ValueEnum};
use ringtail::driver::names::Names;
use ringtail::driver::relay::{RelayEvent, RelayEvents, RelayOptions, RelayPool};
use ringtail::driver::runtime::Kind;
use ringtail::key::{NodePrivate, NodePublic};
use ringtail::netmap::DerpMap;
use ringtail_dataplane::channel::{Datagrams, RegionId};
use tokio::sync::Notify;

#[derive(Clone, Debug, Parser)]
struct Args {
    /// DERP map; its first region is used.
    map: PathBuf,
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Bytes per packet.
    #[arg(long, default_value_t = 1400)]
    packet: u16,
    /// Packets given to the pool at a time: a TUN super-packet makes about 45.
    #[arg(long, default_value_t = 45)]
    batch: usize,
    #[arg(long, default_value_t = 1024)]
    window_kib: u64,
    #[arg(long, value_enum, default_value_t = Io::Tokio)]
    io: Io,
    /// Fail below this rate.
    #[arg(long, default_value_t = 0.0)]
    min_gbit: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Io {
    /// tokio's streams on tokio's runtime.
    Tokio,
    /// tokio-uring's streams on its runtime.
    Uring,
    /// tokio's streams on tokio-uring's runtime.
    Mixed,
}

/// What the two threads know of each other.
#[derive(Debug, Default)]
struct Shared {
    received: AtomicU64,
    events: AtomicU64,
    wake: Notify,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let text = std::fs::read(&args.map).context("the DERP map")?;
    let map: DerpMap = serde_json::from_slice(&text).context("the DERP map")?;
    let region = RegionId(*map.regions.keys().next().context("a region in the map")?);
    let shared = Arc::new(Shared::default());
    let receiver = NodePrivate::generate();
    let destination = receiver.public();
    let ready = Arc::new(std::sync::Barrier::new(2));

    let thread = {
        let (args, map, shared) = (args.clone(), map.clone(), shared.clone());
        let ready = ready.clone();
        std::thread::spawn(move || {
            run(args.io, async move {
                let (pool, mut events) = pool(receiver, args.io, &map);
                connected(&pool, &mut events, region).await?;
                ready.wait();
                receive(&mut events, &shared).await;
                anyhow::Ok(())
            })
        })
    };
    let cpu_before = cpu_seconds();
    let result = run(args.io, async move {
        let (pool, mut events) = pool(NodePrivate::generate(), args.io, &map);
        connected(&pool, &mut events, region).await?;
        ready.wait();
        // The relay registers a client a moment after the client may send.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let outcome = send(&pool, region, &destination, &args, &shared).await;
        eprintln!(
            "sender: {}",
            serde_json::to_string(&pool.status().counters)?
        );
        let gbit = outcome.bytes as f64 * 8.0 / outcome.took.as_secs_f64() / 1e9;
        println!(
            "{gbit:.2} Gb/s, {:.3} M packets/s, {} packets lost, {:.0} packets per event, \
             clients {:.2} CPU s/GB",
            outcome.bytes as f64 / f64::from(args.packet) / outcome.took.as_secs_f64() / 1e6,
            outcome.lost,
            outcome.bytes as f64
                / f64::from(args.packet)
                / shared.events.load(Ordering::Relaxed).max(1) as f64,
            (cpu_seconds() - cpu_before) / (outcome.bytes as f64 / 1e9),
        );
        ensure!(gbit >= args.min_gbit, "below {} Gb/s", args.min_gbit);
        anyhow::Ok(())
    });
    // The receiver waits for ever; the process ends without it.
    drop(thread);
    result
}

fn run<F: Future<Output = anyhow::Result<()>>>(io: Io, future: F) -> anyhow::Result<()> {
    match io {
        Io::Uring | Io::Mixed => {
            tokio_uring::Runtime::new(&tokio_uring::builder())?.block_on(future)
        }
        Io::Tokio => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            tokio::task::LocalSet::new().block_on(&runtime, future)
        }
    }
}

fn pool(private: NodePrivate, io: Io, map: &DerpMap) -> (RelayPool, RelayEvents) {
    let (pool, events) = RelayPool::new(RelayOptions {
        names: Names::default(),
        private,
        fwmark: 0,
        io: match io {
            Io::Tokio | Io::Mixed => Kind::Tokio,
            Io::Uring => Kind::Uring,
        },
    });
    pool.set_map(map);
    (pool, events)
}

async fn connected(
    pool: &RelayPool,
    events: &mut RelayEvents,
    region: RegionId,
) -> anyhow::Result<()> {
    pool.set_home(Some(region));
    let wait = async {
        while let Some(event) = events.recv().await {
            eprintln!("{event:?}");
            if matches!(event, RelayEvent::Connected { .. }) {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), wait)
        .await
        .context("the relay does not answer")
}

async fn receive(events: &mut RelayEvents, shared: &Shared) {
    while let Some(event) = events.recv().await {
        if let RelayEvent::Data { data, .. } = event {
            shared
                .received
                .fetch_add(data.bytes.len() as u64, Ordering::Relaxed);
            shared.events.fetch_add(1, Ordering::Relaxed);
            shared.wake.notify_one();
        }
    }
}

struct Outcome {
    bytes: u64,
    took: Duration,
    lost: u64,
}

async fn send(
    pool: &RelayPool,
    region: RegionId,
    destination: &NodePublic,
    args: &Args,
    shared: &Shared,
) -> Outcome {
    let len = usize::from(args.packet);
    let batch = Datagrams {
        bytes: vec![0x04; args.batch * len],
        lens: vec![args.packet; args.batch],
    };
    let batch_bytes = batch.bytes.len() as u64;
    let window = (args.window_kib << 10).max(batch_bytes);
    let (mut sent, mut lost) = (0, 0);
    let begin = now();
    while now() - begin < Duration::from_secs_f64(args.seconds) {
        let arrived = shared.received.load(Ordering::Relaxed);
        if sent - lost - arrived + batch_bytes <= window {
            pool.send_data(region, destination, &batch);
            sent += batch_bytes;
            continue;
        }
        let waited = tokio::time::timeout(Duration::from_millis(200), shared.wake.notified());
        if waited.await.is_err() {
            lost = sent - shared.received.load(Ordering::Relaxed);
        }
    }
    Outcome {
        bytes: shared.received.load(Ordering::Relaxed),
        took: now() - begin,
        lost: lost / u64::from(args.packet),
    }
}

/// User and system time of this process so far.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks: f64 = text
        .rsplit(')')
        .next()
        .unwrap_or("")
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<f64>().ok())
        .sum();
    ticks / 100.0
}

#[expect(
    clippy::disallowed_methods,
    reason = "a measuring program owns its clock"
)]
fn now() -> Instant {
    Instant::now()
}
