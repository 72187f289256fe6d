//! `ringtail coord`: the coordination server, its auth keys, and what an administrator does with nodes.
//!
//! Rooms: `serve` starts the server, with what `names` reads of DNS; `nodes` orders about nodes and routes,
//! `users` who owns them, `keys` makes auth keys, `policy` checks a policy, `export` lists it all, `watch`
//! prints what a server says.

mod export;
mod keys;
mod names;
mod nodes;
mod policy;
mod serve;
mod users;
mod watch;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};

use self::export::ExportArgs;
use self::keys::KeysCommand;
use self::nodes::{NodesArgs, RoutesArgs};
use self::policy::PolicyCommand;
use self::serve::ServeArgs;
use self::users::UsersArgs;
use self::watch::WatchArgs;
use crate::driver::coord_store::Database;
use crate::driver::state::StateDir;

/// Where the server keeps its state unless told otherwise.
const STATE_DIR: &str = "/var/lib/ringtail-coord";

/// Ten years: longer than a process lives, and safe to add to any time.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Run a coordination server: it lets nodes into the network and tells them of each other.
///
/// ringtail nodes and Tailscale clients join it with an auth key, which
/// `ringtail coord keys create` prints, or are shown a code without one, by which you let them in
/// (`nodes approve`). Without TLS it listens on loopback and private addresses
/// only. It keeps everything in its state directory and may be stopped or killed at any time:
/// nodes go on without it and come back by themselves.
///
///   ringtail coord --addr 10.0.0.1:8080 --derp-map map.json
///   (umask 077; ringtail coord keys create > auth-key)
///   ringtail up --coord http://10.0.0.1:8080 --auth-key-file auth-key
///   ringtail coord nodes                                  who is in; `approve` CODE, `rename`, `tag`,
///                                                         `expire` and `delete` NODE
///   ringtail coord routes approve edge1 10.20.0.0/16      lets edge1 route it, and nobody else
#[derive(Debug, Args)]
#[command(verbatim_doc_comment, args_conflicts_with_subcommands = true)]
pub(super) struct CoordArgs {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make, list and revoke the keys new machines join with.
    #[command(subcommand)]
    Keys(KeysCommand),
    Nodes(NodesArgs),
    Routes(RoutesArgs),
    Users(UsersArgs),
    /// Check a policy file.
    #[command(subcommand)]
    Policy(PolicyCommand),
    Export(ExportArgs),
    Watch(Box<WatchArgs>),
}

#[derive(Debug, Args)]
struct StateArg {
    /// State directory of the server.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
}

/// Runs `ringtail coord` and its verbs.
///
/// # Errors
/// Whatever keeps the server from starting, or the verb from doing its work.
pub(super) fn run(args: CoordArgs) -> anyhow::Result<()> {
    match args.command {
        None => serve::serve(&args.serve),
        Some(Command::Keys(command)) => keys::run(&command),
        Some(Command::Nodes(args)) => nodes::nodes(&args),
        Some(Command::Routes(args)) => nodes::routes(&args),
        Some(Command::Users(args)) => users::users(&args),
        Some(Command::Policy(command)) => policy::run(&command),
        Some(Command::Export(args)) => export::export(&args),
        Some(Command::Watch(watch)) => watch::watch_network(*watch),
    }
}

fn open(state: &StateArg) -> anyhow::Result<(StateDir, Database)> {
    let dir = StateDir::open(&state.state_dir)?;
    let database = Database::open(&dir.file("coord.db"))?;
    Ok((dir, database))
}

/// Reads a file that a person has written, of at most so many bytes.
fn read_text(path: &Path, len_max: u64) -> anyhow::Result<String> {
    let cannot = || format!("cannot read {}", path.display());
    let len = std::fs::metadata(path).with_context(cannot)?.len();
    if len > len_max {
        bail!("{} has more than {len_max} bytes", path.display());
    }
    std::fs::read_to_string(path).with_context(cannot)
}
