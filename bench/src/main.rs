//! `ringtail-bench`: everything that `bench/iperf-pair.sh`, `scripts/netns` and `perf/` need beyond
//! a shell.
//!
//! ```text
//! link     emulate a slow or lossy wire between two TUN devices (this kernel may lack netem)
//! cell     one measurement: iperf3 or ping, with the CPU it cost  ->  one JSON line
//! ping     a stream of numbered ICMP echoes: losses, blackouts, p50 and p99
//! story    the nodes' event files, merged by time and told in plain words, live
//! wait     until an event with given fields appears in an event file
//! report   results directory  ->  tables, results.json, report.html
//! uapi     configure a userspace WireGuard through its socket
//! wgkeys   fresh WireGuard key pairs for the peers that are compared
//! rooms    two `ringtail status --json` snapshots  ->  cycles per room and shard
//! send, receive   a file over TCP, at a pace
//! pick     one value of a JSON document
//! flood    handshake messages from many sources, at a steady rate
//! garbage  what no peer would send, at every socket
//! flame    `perf script` output  ->  folded stacks and an SVG
//! machine  facts for the head of a table;  derp-map  relays' entries joined into one map
//! ```
#![expect(clippy::print_stdout, reason = "a command line tool")]

mod cell;
mod clock;
mod cpu;
mod derp_map;
mod events;
mod flame;
mod flood;
mod garbage;
mod link;
mod machine;
mod netns;
mod pick;
mod ping;
mod report;
mod rooms;
mod story;
mod switches;
mod transfer;
mod uapi;

use clap::{Parser, Subcommand};

/// Measures, emulates and reports for bench/iperf-pair.sh.
#[derive(Debug, Parser)]
#[command(name = "ringtail-bench", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

/// What to do; each variant is a module of the same name.
#[derive(Debug, Subcommand)]
enum Command {
    /// Emulate a wire between two TUN devices: delay, jitter, loss, rate, seeded.
    Link(link::Args),
    /// Run one measurement and append its result to a JSON-lines file.
    Cell(Box<cell::Args>),
    /// Send numbered ICMP echoes and account for every one.
    Ping(ping::Args),
    /// Print the merged, live story of several event files.
    Story(story::Args),
    /// Wait until an event appears in an event file.
    Wait(events::WaitArgs),
    /// Turn a results directory into tables and one HTML page.
    Report(report::Args),
    /// Facts about this machine for the head of a table, as JSON.
    Machine(machine::Args),
    /// Join the entries that relays wrote into one DERP map.
    DerpMap(derp_map::Args),
    /// Configure a userspace WireGuard daemon through its UAPI socket.
    Uapi(uapi::Args),
    /// Print a fresh WireGuard key pair: private and public, in hex.
    Wgkeys,
    /// Table of cycles per room and shard between two status snapshots.
    Rooms(rooms::Args),
    /// Send a file over TCP, at a pace.
    Send(transfer::SendArgs),
    /// Receive a file over TCP.
    Receive(transfer::ReceiveArgs),
    /// One figure of act one.
    Switches(switches::Args),
    /// One value of the JSON document on standard input.
    Pick(pick::Args),
    /// Send what no peer would send.
    Garbage(garbage::Args),
    /// Flood a socket with handshake messages from many sources.
    Flood(flood::Args),
    /// Fold `perf script` output and draw a flame graph.
    Flame(flame::Args),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Link(args) => link::run(&args),
        Command::Cell(args) => cell::run(&args),
        Command::Ping(args) => ping::run(&args),
        Command::Story(args) => story::run(&args),
        Command::Wait(args) => events::wait(&args),
        Command::Report(args) => report::run(&args),
        Command::Machine(args) => machine::run(&args),
        Command::DerpMap(args) => derp_map::run(&args),
        Command::Rooms(args) => rooms::run(&args),
        Command::Send(args) => transfer::send(&args),
        Command::Receive(args) => transfer::receive(&args),
        Command::Switches(args) => switches::run(&args),
        Command::Pick(args) => pick::run(&args),
        Command::Garbage(args) => garbage::run(&args),
        Command::Flood(args) => flood::run(&args),
        Command::Uapi(args) => uapi::run(&args),
        Command::Wgkeys => uapi::print_keys(),
        Command::Flame(args) => flame::run(&args),
    }
}
