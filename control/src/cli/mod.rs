//! The command line: arguments in, text out. Printing to standard output happens only here.
//!
//! Rooms, each a command or several: `up` the node; `down`, `login`, `set`, `status`, `whois`, `ping`,
//! `dns`, `exit-node` and `netcheck` what it is told and asked, by `ask`; `coord` the coordination server, `derp` the relay,
//! `device` a WireGuard device, `keys` those for it, `restore` what a killed node left.

mod ask;
mod coord;
mod derp;
mod device;
mod dns;
mod down;
mod exit_node;
mod keys;
mod login;
mod netcheck;
mod ping;
mod restore;
mod set;
mod status;
mod up;
mod whois;

use std::ffi::{OsStr, OsString};
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::coord::NotAdmitted;
use crate::driver::state::STATE_DIR_DEFAULT;

/// The exit code of a node that the network does not let in, or no more: a person has to act, and
/// starting it again is of no use (`EX_NOPERM` of sysexits.h).
const EXIT_NOT_ADMITTED: u8 = 77;

/// A throughput-optimised mesh VPN node for Linux, with its own relay and coordination server.
///
/// A first network, on three machines (or one, with namespaces):
///
///   ringtail derp  --hostname 203.0.113.1            a relay; prints its entry for the DERP map
///   ringtail coord --derp-map map.json               the coordination server; prints how to join
///   ringtail up    --coord URL --auth-key-file KEY   a node; repeat on every machine
///   ringtail ping  NAME                              how a peer is reached, and how fast
///
/// Without any of that, a plain WireGuard interface for `wg` and `wg-quick`:
///
///   ringtail device wg0
#[derive(Debug, Parser)]
#[command(
    name = "ringtail",
    version,
    verbatim_doc_comment,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// More on standard error; twice for every detail. RUST_LOG is honoured too.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(Box<up::UpArgs>),
    Down(down::DownArgs),
    Login(login::LoginArgs),
    Logout(down::LogoutArgs),
    Set(set::SetArgs),
    Get(set::GetArgs),
    Device(device::DeviceArgs),
    Derp(derp::DerpArgs),
    Coord(Box<coord::CoordArgs>),
    Status(status::StatusArgs),
    Ip(whois::IpArgs),
    Whois(whois::WhoisArgs),
    Ping(ping::PingArgs),
    Netcheck(netcheck::NetcheckArgs),
    Dns(dns::DnsArgs),
    ExitNode(exit_node::ExitNodeArgs),
    Genkey(keys::GenkeyArgs),
    Pubkey(keys::PubkeyArgs),
    Restore(restore::RestoreArgs),
    #[command(hide = true)]
    Keeper(restore::KeeperArgs),
}

/// Which running node is meant.
#[derive(Clone, Debug, Args)]
struct StateDirArg {
    /// State directory of the node.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR_DEFAULT)]
    state_dir: PathBuf,
}

/// Runs the program and says how it ended.
pub fn main() -> ExitCode {
    let cli = Cli::parse_from(arguments(std::env::args_os()));
    start_log(level(&cli));
    let result = match cli.command {
        Command::Up(args) => up::run(*args),
        Command::Down(args) => down::down(&args),
        Command::Login(args) => login::run(&args),
        Command::Logout(args) => down::logout(&args),
        Command::Set(args) => set::set(args),
        Command::Get(args) => set::get(&args),
        Command::Device(args) => device::run(args, cli.verbose > 0),
        Command::Derp(args) => derp::run(args),
        Command::Coord(args) => coord::run(*args),
        Command::Status(args) => status::run(&args),
        Command::Ip(args) => whois::ip(&args),
        Command::Whois(args) => whois::whois(&args),
        Command::Ping(args) => ping::run(&args),
        Command::Netcheck(args) => netcheck::run(&args),
        Command::Dns(args) => dns::run(&args),
        Command::ExitNode(args) => exit_node::run(&args),
        Command::Genkey(args) => keys::genkey(&args),
        Command::Pubkey(args) => keys::pubkey(&args),
        Command::Restore(args) => restore::restore(&args),
        Command::Keeper(args) => restore::keeper(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringtail: {error:#}");
            if error.downcast_ref::<NotAdmitted>().is_some() {
                ExitCode::from(EXIT_NOT_ADMITTED)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Whether the reader of our output went away, as `head` does: not worth a word.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// What was typed. Called by the name `ringtail-wg`, as `wg-quick` does through a link, the program
/// is `ringtail device`.
fn arguments(typed: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut typed: Vec<OsString> = typed.collect();
    let name = typed.first().map(Path::new).and_then(Path::file_name);
    if name == Some(OsStr::new(device::LINK_NAME)) {
        typed.insert(1, "device".into());
    }
    typed
}

/// How much is logged: as `-v` says, else for a device as LOG_LEVEL says, like other WireGuard
/// daemons.
fn level(cli: &Cli) -> &'static str {
    match (cli.verbose, &cli.command) {
        (0, Command::Device(_)) => device::log_level().unwrap_or("info"),
        (0, _) => "info",
        (1, _) => "debug",
        (_, _) => "trace",
    }
}

fn start_log(level: &str) {
    use tracing_subscriber::EnvFilter;
    // Other crates' chatter only when asked for by RUST_LOG; boringtun calls every timeout an
    // error.
    let default = format!("warn,boringtun=off,ringtail={level},ringtail_dataplane={level}");
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_link_named_ringtail_wg_is_a_device() {
        let meant = |typed: &[&str]| -> Vec<OsString> {
            arguments(typed.iter().map(|word| OsString::from(*word)))
        };
        let device = ["/usr/bin/ringtail-wg", "device", "wg0"];
        assert_eq!(meant(&["/usr/bin/ringtail-wg", "wg0"]), device);
        let cli = Cli::parse_from(meant(&["ringtail-wg", "-f", "wg0"]));
        assert!(matches!(cli.command, Command::Device(_)));
        assert_eq!(meant(&["./ringtail", "status"]), ["./ringtail", "status"]);
        assert!(meant(&[]).is_empty());
    }
}
