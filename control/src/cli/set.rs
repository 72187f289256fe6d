//! `ringtail set` and `ringtail get`: what may change while a node runs.

use std::io::Write as _;

use anyhow::bail;
use clap::Args;
use serde_json::Value;

use super::ask::{NodeArg, ask_one, list, text};
use crate::config::PrefsChange;
use crate::driver::local_api::Request;

/// Change settings of a running node, at once and for its next runs.
///
/// What is set here wins over the settings file; an option of `ringtail up` wins over it from the next
/// start on.
#[derive(Debug, Args)]
pub(super) struct SetArgs {
    #[command(flatten)]
    change: PrefsChange,
    #[command(flatten)]
    node: NodeArg,
}

/// Show the settings of a node that `ringtail set` changes.
#[derive(Debug, Args)]
pub(super) struct GetArgs {
    /// Only this one, such as hostname or advertise-routes.
    name: Option<String>,
    #[command(flatten)]
    node: NodeArg,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn set(args: SetArgs) -> anyhow::Result<()> {
    if args.change == PrefsChange::default() {
        bail!("nothing to set: `ringtail set --help` says what there is");
    }
    let change = args.change;
    let answer = ask_one(&args.node, &Request::Set { change })?;
    let mut out = std::io::stdout().lock();
    for name in list(&answer["until_restart"]) {
        let name = text(name).replace('_', "-");
        writeln!(
            out,
            "--{name} stands on the node's command line, and counts again from its next start on"
        )?;
    }
    Ok(())
}

pub(super) fn get(args: &GetArgs) -> anyhow::Result<()> {
    let answer = ask_one(&args.node, &Request::Prefs)?;
    let prefs = &answer["prefs"];
    let mut out = std::io::stdout().lock();
    if let Some(name) = &args.name {
        let Some(value) = prefs.get(name.replace('-', "_")) else {
            bail!("there is no setting {name}: `ringtail get` shows those that there are");
        };
        if args.json {
            writeln!(out, "{value}")?;
        } else {
            writeln!(out, "{}", shown(value))?;
        }
    } else if args.json {
        writeln!(out, "{prefs:#}")?;
    } else {
        for (name, value) in prefs.as_object().into_iter().flatten() {
            writeln!(out, "{:<28}{}", name.replace('_', "-"), shown(value))?;
        }
    }
    Ok(())
}

/// A value as it is typed.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(","),
        Value::String(_) | Value::Bool(_) | Value::Number(_) | Value::Object(_) => text(value),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_shown_as_they_are_typed() {
        assert_eq!(
            shown(&json!(["10.0.0.0/8", "fd00::/64"])),
            "10.0.0.0/8,fd00::/64"
        );
        assert_eq!(shown(&json!("open")), "open");
        assert_eq!(shown(&json!(false)), "false");
        assert_eq!(shown(&Value::Null), "");
    }
}
