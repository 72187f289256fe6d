//! `ringtail coord users`: who owns nodes.

use std::io::Write as _;

use anyhow::bail;
use clap::{Args, Subcommand};
use time::OffsetDateTime;

use super::{StateArg, open};

/// List the users, or add one.
///
/// A user is a name that a policy can give rights to, and nodes belong to: those that join with its keys
/// (`keys create --user`) or are approved for it (`nodes approve --user`).
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct UsersArgs {
    #[command(subcommand)]
    command: Option<UsersCommand>,
    #[command(flatten)]
    state: StateArg,
}

#[derive(Debug, Subcommand)]
enum UsersCommand {
    /// List the users.
    List(StateArg),
    /// Add a user; also while the server runs.
    Add(AddArgs),
}

#[derive(Debug, Args)]
struct AddArgs {
    /// Letters, digits and any of . _ - @
    #[arg(value_parser = parse_name)]
    name: String,
    #[command(flatten)]
    state: StateArg,
}

fn parse_name(text: &str) -> Result<String, String> {
    let fits = |letter: char| letter.is_ascii_alphanumeric() || "._-@".contains(letter);
    // A policy writes a user with an @, at the end where the name has none.
    if (1..=63).contains(&text.len()) && text.chars().all(fits) && !text.ends_with('@') {
        return Ok(text.to_owned());
    }
    Err("write 1 to 63 letters, digits and any of . _ - @, without an @ at the end".to_owned())
}

/// Runs `ringtail coord users` and its verbs.
pub(super) fn users(args: &UsersArgs) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match &args.command {
        Some(UsersCommand::Add(AddArgs { name, state })) => {
            let (_, database) = open(state)?;
            if !database.add_user(name, OffsetDateTime::now_utc())? {
                bail!("there is a user {name} already");
            }
            writeln!(out, "user {name} is added")?;
        }
        command => {
            let state = match command {
                Some(UsersCommand::List(state)) => state,
                Some(UsersCommand::Add(_)) | None => &args.state,
            };
            let (_, database) = open(state)?;
            for (id, name) in database.users()? {
                writeln!(out, "{id}  {name}")?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_s_name_can_stand_in_a_policy() {
        for name in ["ann", "Ann.B", "ann@example.com", "a-b_c"] {
            assert_eq!(parse_name(name).as_deref(), Ok(name));
        }
        for name in ["", "ann@", "ann b", "a,b", "\"", &"a".repeat(64)] {
            assert!(parse_name(name).is_err(), "{name}");
        }
    }
}
