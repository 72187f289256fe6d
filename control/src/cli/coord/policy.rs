//! `ringtail coord policy`: the file that says who may reach what.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use clap::{Args, Subcommand};

use super::read_text;
use crate::policy::{POLICY_LEN_MAX, Policy};

#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    Check(CheckArgs),
}

/// Say whether a policy file makes sense, and where it does not.
///
/// Nothing is changed. A running server reads its file (`--policy`) again on SIGHUP; one that makes no
/// sense changes nothing there either.
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The file, in HuJSON: JSON with comments and trailing commas.
    file: PathBuf,
}

pub(super) fn run(command: &PolicyCommand) -> anyhow::Result<()> {
    let PolicyCommand::Check(CheckArgs { file }) = command;
    let policy = read_policy(file)?;
    let users: Vec<&str> = policy.users().into_iter().collect();
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{} rules; users named: {}",
        policy.rules(),
        users.join(", ")
    )?;
    Ok(())
}

/// Reads a policy file.
pub(super) fn read_policy(path: &Path) -> anyhow::Result<Policy> {
    let text = read_text(path, POLICY_LEN_MAX as u64)?;
    let policy = Policy::parse(&text).map_err(|error| anyhow!("{}: {error}", path.display()));
    policy.context("the policy makes no sense")
}
