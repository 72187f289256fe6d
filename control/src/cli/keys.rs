//! `ringtail genkey` and `ringtail pubkey`.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use zeroize::Zeroizing;

use crate::driver::state::StateDir;
use crate::key::{DiscoPrivate, MachinePrivate, NodePrivate};

/// Make keys.
///
/// Without options prints one new private key. With --state-dir makes the keys of a node there,
/// if it has none yet, and prints their public halves as lines for a static network file.
#[derive(Debug, Args)]
pub(super) struct GenkeyArgs {
    /// Make the keys of a node in this state directory.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// Read a private key on standard input and print its public half.
#[derive(Debug, Args)]
pub(super) struct PubkeyArgs {
    /// What the key is used as.
    #[arg(long = "type", value_enum, default_value_t = KeyType::Node)]
    kind: KeyType,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum KeyType {
    /// WireGuard identity of a node.
    Node,
    /// Identity of a host towards the coordination server.
    Machine,
    /// Key of DISCO messages.
    Disco,
}

pub(super) fn genkey(args: &GenkeyArgs) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match &args.state_dir {
        None => writeln!(out, "{}", *NodePrivate::generate().to_text())?,
        Some(dir) => {
            let keys = StateDir::open(dir)?.keys()?;
            writeln!(out, "node_key = \"{}\"", keys.node.public())?;
            writeln!(out, "disco_key = \"{}\"", keys.disco.public())?;
        }
    }
    Ok(())
}

pub(super) fn pubkey(args: &PubkeyArgs) -> anyhow::Result<()> {
    // One allocation that a key and its newline fit in, so that no copy stays behind.
    let mut text = Zeroizing::new(String::with_capacity(256));
    std::io::stdin()
        .take(256)
        .read_to_string(&mut text)
        .context("cannot read standard input")?;
    let text = text.trim();
    let hint = "standard input must hold one private key, as `ringtail genkey` prints it";
    let public = match args.kind {
        KeyType::Node => text
            .parse::<NodePrivate>()
            .context(hint)?
            .public()
            .to_string(),
        KeyType::Machine => text
            .parse::<MachinePrivate>()
            .context(hint)?
            .public()
            .to_string(),
        KeyType::Disco => text
            .parse::<DiscoPrivate>()
            .context(hint)?
            .public()
            .to_string(),
    };
    writeln!(std::io::stdout().lock(), "{public}")?;
    Ok(())
}
