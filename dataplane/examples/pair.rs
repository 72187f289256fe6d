//! One end of a static tunnel, for measuring the data plane without the rest:
//!
//! ```text
//! pair --seed 1 --peer-seed 2 --addr 10.9.0.1/24 --peer-ip 10.9.0.2 --tun rt0 --port 7001 --endpoint 192.0.2.2:7002
//! ```
//!
//! Keys come from the seeds, so this protects nothing. Runs until killed; with `--stats` it prints
//! the counters every second.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use ringtail_dataplane::stats::{DropReason, Meter, Room};
use ringtail_dataplane::{
    Config, Dataplane, DriverChoice, Engine, NetworkChange, Offloads, PathDecision, PeerConfig,
    PeerId, Prefix, Rules,
};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DriverArg {
    Auto,
    Uring,
    Epoll,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum EngineArg {
    Ringtail,
    Boringtun,
}

/// One end of a static tunnel with keys made from seeds.
#[derive(Debug, Parser)]
struct Args {
    /// Seed of our key.
    #[arg(long)]
    seed: u8,
    /// Seed of the peer's key.
    #[arg(long)]
    peer_seed: u8,
    /// Our inner addresses with prefix length.
    #[arg(long, required = true)]
    addr: Vec<String>,
    /// The peer's inner addresses.
    #[arg(long, required = true)]
    peer_ip: Vec<IpAddr>,
    /// Interface name.
    #[arg(long)]
    tun: String,
    /// UDP port.
    #[arg(long)]
    port: u16,
    /// Where the peer is.
    #[arg(long)]
    endpoint: SocketAddr,
    /// Inner MTU.
    #[arg(long, default_value_t = 1420)]
    mtu: u16,
    /// Shards.
    #[arg(long, default_value_t = 1)]
    shards: usize,
    /// Driver.
    #[arg(long, value_enum, default_value_t = DriverArg::Auto)]
    driver: DriverArg,
    /// What seals and opens.
    #[arg(long, value_enum, default_value_t = EngineArg::Ringtail)]
    engine: EngineArg,
    /// Pin shards to CPUs.
    #[arg(long)]
    pin: bool,
    /// No offloads at the TUN.
    #[arg(long)]
    no_tun_offload: bool,
    /// No GSO.
    #[arg(long)]
    no_gso: bool,
    /// No GRO.
    #[arg(long)]
    no_gro: bool,
    /// Device mode: endpoints follow their peers.
    #[arg(long)]
    roam: bool,
    /// Print counters every second.
    #[arg(long)]
    stats: bool,
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let status = Command::new("ip")
        .args(arguments)
        .status()
        .context("running ip")?;
    if !status.success() {
        bail!("ip {} failed", arguments.join(" "));
    }
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "a driver: it sleeps and reads the clock"
)]
fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter("info,boringtun=off")
        .init();
    let args = Args::parse();
    let dataplane = Dataplane::start(Config {
        tun_name: args.tun.clone(),
        mtu: args.mtu,
        shards: args.shards,
        pin: args.pin,
        driver: match args.driver {
            DriverArg::Auto => DriverChoice::Auto,
            DriverArg::Uring => DriverChoice::IoUring,
            DriverArg::Epoll => DriverChoice::Epoll,
        },
        offloads: Offloads {
            tun: !args.no_tun_offload,
            gso: !args.no_gso,
            gro: !args.no_gro,
        },
        listen_port: args.port,
        fwmark: 0,
        private_key: Some(Zeroizing::new([args.seed; 32])),
        roam: args.roam,
        engine: match args.engine {
            EngineArg::Ringtail => Engine::Ringtail,
            EngineArg::Boringtun => Engine::Boringtun,
        },
    })?;
    let tun = dataplane.tun_name().to_owned();
    ip(&["link", "set", &tun, "mtu", &args.mtu.to_string(), "up"])?;
    for addr in &args.addr {
        ip(&["addr", "add", addr, "dev", &tun])?;
    }
    let peer_key = PublicKey::from(&StaticSecret::from([args.peer_seed; 32]));
    let peer = PeerConfig {
        allowed_ips: args
            .peer_ip
            .iter()
            .map(|&addr| Prefix {
                addr,
                bits: if addr.is_ipv4() { 32 } else { 128 },
            })
            .collect(),
        ..PeerConfig::new(PeerId(0), *peer_key.as_bytes())
    };
    dataplane.change_network(NetworkChange {
        peers: vec![peer],
        rules: Some((Rules::AllowAll, None)),
        ..NetworkChange::default()
    });
    if args.roam {
        dataplane.set_endpoint(PeerId(0), args.endpoint);
    } else {
        dataplane.set_path(
            PeerId(0),
            PathDecision {
                generation: 1,
                udp: Some(args.endpoint),
                local: None,
                derp: None,
                trust_until: Instant::now().checked_add(Duration::from_secs(1 << 30)),
                silence_limit: Duration::from_secs(1),
                path_mtu: 1500,
                relayed_alone: false,
            },
        );
    }
    loop {
        std::thread::sleep(Duration::from_secs(1));
        while let Some(event) = dataplane.poll_event() {
            tracing::debug!(?event);
        }
        while let Some(out) = dataplane.poll_relay() {
            dataplane.recycle(out.datagrams);
        }
        if args.stats {
            report(&dataplane);
        }
    }
}

fn report(dataplane: &Dataplane) {
    let total = dataplane.stats().total();
    let meters: Vec<String> = Meter::ALL
        .iter()
        .filter(|&&meter| total.get(meter) > 0)
        .map(|&meter| format!("{}={}", meter.name(), total.get(meter)))
        .collect();
    let drops: Vec<String> = DropReason::ALL
        .iter()
        .filter(|&&reason| total.drops(reason) > 0)
        .map(|&reason| format!("{}={}", reason.name(), total.drops(reason)))
        .collect();
    let cycles: u64 = Room::ALL.iter().map(|&room| total.cycles(room)).sum();
    let rooms: Vec<String> = Room::ALL
        .iter()
        .map(|&room| {
            format!(
                "{} {}%",
                room.name(),
                total.cycles(room) * 100 / cycles.max(1)
            )
        })
        .collect();
    eprintln!(
        "{}\n  drops: {}\n  rooms: {}",
        meters.join(" "),
        drops.join(" "),
        rooms.join(", ")
    );
}
