//! `ringtail coord keys`: the auth keys new machines join with.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use zeroize::Zeroizing;

use super::{FOR_EVER, StateArg, open};
use crate::coord::admin::Refusal;
use crate::coord::auth_key::{self, AuthKey, KeySeed};
use crate::coord::server::FIRST_USER;
use crate::driver::coord_store::Database;
use crate::driver::files;
use crate::policy::is_tag;

#[derive(Debug, Subcommand)]
pub(super) enum KeysCommand {
    Create(CreateArgs),
    /// List the keys: name, kind, state. The keys themselves are not stored.
    List(StateArg),
    Expire(ExpireArgs),
}

/// Make a key that lets machines in, and print it.
///
/// It works at once, also while the server runs.
#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    #[command(flatten)]
    state: StateArg,
    /// Let any number of machines in; otherwise the first one only.
    #[arg(long)]
    reusable: bool,
    /// Forget the nodes it lets in when they stay away.
    #[arg(long)]
    ephemeral: bool,
    /// Whose the nodes are that it lets in.
    #[arg(long, value_name = "NAME", default_value = "ringtail")]
    user: String,
    /// Tags the nodes get that it lets in, by comma: they are no user's then.
    #[arg(long, value_name = "TAG", value_delimiter = ',', value_parser = parse_tag)]
    tags: Vec<String>,
    /// How long it is good: 90s, 10m, 1h, 7d, or never.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_time)]
    expires: Time,
}

/// Make a key worthless from now on; nodes that joined with it stay.
#[derive(Debug, Args)]
pub(super) struct ExpireArgs {
    #[command(flatten)]
    state: StateArg,
    /// The key's name, as `keys list` prints it.
    name: String,
}

pub(super) fn parse_tag(text: &str) -> Result<String, String> {
    let fits = is_tag(text).then(|| text.to_owned());
    fits.ok_or_else(|| "write tag: and a name that begins with a letter".to_owned())
}

/// A length of time, or for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Time(pub(super) Option<Duration>);

pub(super) fn parse_time(text: &str) -> Result<Time, String> {
    if text == "never" {
        return Ok(Time(None));
    }
    let unit = text.chars().last().unwrap_or_default();
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err("write a number and s, m, h or d, or never".to_owned()),
    };
    let number: u32 = text[..text.len() - 1]
        .parse()
        .map_err(|_| "write a number and s, m, h or d, or never".to_owned())?;
    let time = Duration::from_secs(u64::from(number) * seconds);
    if time.is_zero() || time > FOR_EVER {
        return Err("write a time of 1s to 3650d, or never".to_owned());
    }
    Ok(Time(Some(time)))
}

pub(super) fn run(command: &KeysCommand) -> anyhow::Result<()> {
    match command {
        KeysCommand::Create(create) => keys_create(create),
        KeysCommand::List(state) => keys_list(state),
        KeysCommand::Expire(expire) => keys_expire(expire),
    }
}

/// What a new key does.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) reusable: bool,
    pub(super) ephemeral: bool,
    pub(super) user: i64,
    pub(super) tags: Vec<String>,
}

impl Kind {
    /// Nodes of the first user, which stay.
    pub(super) fn plain(reusable: bool) -> Self {
        Self {
            reusable,
            ephemeral: false,
            user: FIRST_USER,
            tags: Vec::new(),
        }
    }
}

/// Makes a key and stores what recognises it.
pub(super) fn new_key(
    database: &Database,
    kind: Kind,
    expires: Time,
) -> anyhow::Result<Zeroizing<String>> {
    let text = std::iter::repeat_with(|| auth_key::make(&KeySeed::new(rand::random())))
        .flatten()
        .next()
        .context("no randomness")?;
    let created = OffsetDateTime::now_utc();
    database.put_key(&AuthKey {
        id: 0,
        name: auth_key::name(&text),
        hash: auth_key::hash(&text),
        reusable: kind.reusable,
        ephemeral: kind.ephemeral,
        user: kind.user,
        tags: kind.tags,
        used: false,
        expires: expires.0.map(|wait| created + wait),
        created,
    })?;
    Ok(text)
}

fn keys_create(args: &CreateArgs) -> anyhow::Result<()> {
    let (_, database) = open(&args.state)?;
    let users = database.users()?;
    let user = users.iter().find(|(_, name)| **name == args.user);
    let (user, _) = user.ok_or_else(|| Refusal::NoSuchUser(args.user.clone()))?;
    let kind = Kind {
        reusable: args.reusable,
        ephemeral: args.ephemeral,
        user: *user,
        tags: args.tags.clone(),
    };
    let text = new_key(&database, kind, args.expires)?;
    writeln!(std::io::stdout().lock(), "{}", *text)?;
    Ok(())
}

fn keys_list(state: &StateArg) -> anyhow::Result<()> {
    let (_, database) = open(state)?;
    let now = OffsetDateTime::now_utc();
    let users = database.users()?;
    let mut out = std::io::stdout().lock();
    for key in database.keys()? {
        let kind = match (key.reusable, key.ephemeral) {
            (false, false) => "single-use",
            (true, false) => "reusable",
            (false, true) => "single-use, ephemeral",
            (true, true) => "reusable, ephemeral",
        };
        let state = match key.expires {
            Some(at) if at <= now => "expired".to_owned(),
            _ if key.used && !key.reusable => "used".to_owned(),
            Some(at) => format!("good until {}", at.format(&Rfc3339)?),
            None => "good".to_owned(),
        };
        let whose = if key.tags.is_empty() {
            users.get(&key.user).cloned().unwrap_or_default()
        } else {
            key.tags.join(",")
        };
        writeln!(out, "{}  {kind}  {state}  {whose}", key.name)?;
    }
    Ok(())
}

fn keys_expire(args: &ExpireArgs) -> anyhow::Result<()> {
    let (_, database) = open(&args.state)?;
    if !database.expire_key(&args.name, OffsetDateTime::now_utc())? {
        bail!(
            "no key is named {}; `ringtail coord keys list` shows them",
            args.name
        );
    }
    Ok(())
}

pub(super) fn read_key_file(path: &Path) -> anyhow::Result<Zeroizing<String>> {
    let key = files::read_auth_key(path)?;
    if key.is_empty() || key.len() > 256 {
        bail!("{} must hold one auth key on one line", path.display());
    }
    Ok(key)
}

pub(super) fn accept_key_file(database: &Database, path: &Path) -> anyhow::Result<()> {
    if !path.exists() {
        let key = new_key(database, Kind::plain(true), Time(None))?;
        return files::write(path, key.as_bytes());
    }
    let key = read_key_file(path)?;
    database.put_key(&AuthKey {
        id: 0,
        name: auth_key::name(&key),
        hash: auth_key::hash(&key),
        reusable: true,
        ephemeral: false,
        user: FIRST_USER,
        tags: Vec::new(),
        used: false,
        expires: None,
        created: OffsetDateTime::now_utc(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_numbers_with_a_unit_or_never() {
        let time = |text| parse_time(text).map(|time| time.0.map(|wait| wait.as_secs()));
        assert_eq!(time("90s"), Ok(Some(90)));
        assert_eq!(time("10m"), Ok(Some(600)));
        assert_eq!(time("7d"), Ok(Some(604_800)));
        assert_eq!(time("never"), Ok(None));
        assert_eq!(time("3650d"), Ok(Some(FOR_EVER.as_secs())));
        for bad in ["", "h", "1", "-1h", "1 h", "1µ", "0s", "3651d", "3000000d"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_key_file_is_made_when_missing_and_keys_made_here_are_good() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("coord.db")).unwrap();
        let file = dir.path().join("auth-key");
        accept_key_file(&database, &file).unwrap();
        let text = read_key_file(&file).unwrap();
        let stored = database.find_key(&auth_key::name(&text)).unwrap();
        let check = auth_key::KeyCheck::of(&text, stored.as_ref(), OffsetDateTime::now_utc());
        assert_eq!(check.error(), None);
        std::fs::write(&file, "my own key\n").unwrap();
        accept_key_file(&database, &file).unwrap();
        accept_key_file(&database, &file).unwrap();
        assert_eq!(database.keys().unwrap().len(), 2);
    }
}
