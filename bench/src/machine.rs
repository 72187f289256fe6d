//! What a table of figures needs at its head: kernel, processor, offloads, versions.

#![forbid(unsafe_code)]

use crate::netns;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::process::Command;

/// Offloads of the underlay that decide most of the result.
const OFFLOADS: [&str; 6] = [
    "tcp-segmentation-offload",
    "generic-segmentation-offload",
    "generic-receive-offload",
    "tx-udp-segmentation",
    "rx-udp-gro-forwarding",
    "tx-checksumming",
];

/// `machine`: the facts, as JSON.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Inner MTU of the run.
    #[arg(long)]
    mtu: u32,
    /// Shards per node.
    #[arg(long)]
    shards: u32,
    /// Seconds per test.
    #[arg(long)]
    seconds: u32,
    /// Namespace of the underlay.
    #[arg(long)]
    netns: String,
    /// The underlay's interface there.
    #[arg(long)]
    interface: String,
    /// The ringtail binary.
    #[arg(long)]
    ringtail: PathBuf,
}

/// Prints the facts.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown", |(_, model)| model.trim());
    let simd: Vec<&str> = ["avx2", "avx512f", "avx512ifma", "vaes"]
        .into_iter()
        .filter(|flag| cpuinfo.split_ascii_whitespace().any(|word| word == *flag))
        .collect();
    let link = first_line(netns::command(Some(&args.netns), None, "ip").args([
        "link",
        "show",
        "dev",
        &args.interface,
    ]));
    let qdisc = link
        .split(" qdisc ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    let offloads =
        output(netns::command(Some(&args.netns), None, "ethtool").args(["-k", &args.interface]));
    let offloads: Map<String, Value> = OFFLOADS
        .iter()
        .filter_map(|name| {
            let line = offloads
                .lines()
                .find_map(|l| l.trim().strip_prefix(name)?.strip_prefix(": "))?;
            Some((name.to_string(), line.split(' ').next()?.into()))
        })
        .collect();
    let mut versions = Map::new();
    let ringtail = args.ringtail.to_string_lossy();
    for (name, program, option) in [
        ("ringtail", ringtail.as_ref(), "--version"),
        ("iperf3", "iperf3", "--version"),
        ("wireguard-go", "wireguard-go", "--version"),
        ("boringtun-cli", "boringtun-cli", "--version"),
        ("gotatun", "gotatun", "--version"),
        ("rustc", "rustc", "--version"),
    ] {
        let line = first_line(Command::new(program).arg(option));
        if !line.is_empty() {
            versions.insert(name.into(), line.into());
        }
    }
    let facts = json!({
        "kernel": first_line(Command::new("uname").args(["-srm"])),
        "processor": model,
        "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        "simd": simd,
        "congestion_default": read("/proc/sys/net/ipv4/tcp_congestion_control").trim(),
        "congestion_available": read("/proc/sys/net/ipv4/tcp_available_congestion_control").trim(),
        "qdisc_default": read("/proc/sys/net/core/default_qdisc").trim(),
        "qdisc_underlay": qdisc.unwrap_or("unknown"),
        "offloads_underlay": offloads,
        "commit": first_line(Command::new("git").args(["describe", "--always", "--dirty"])),
        "versions": versions,
        "mtu": args.mtu,
        "shards": args.shards,
        "seconds": args.seconds,
    });
    println!("{facts:#}");
    Ok(())
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Standard output of a command, empty when it cannot be run: a missing fact is no failure.
fn output(command: &mut Command) -> String {
    command
        .stderr(std::process::Stdio::null())
        .output()
        .map(|out| String::from_utf8_lossy(&out.stdout).into_owned())
        .unwrap_or_default()
}

fn first_line(command: &mut Command) -> String {
    output(command)
        .lines()
        .next()
        .unwrap_or_default()
        .trim()
        .to_owned()
}
