//! Asks a running node, and reads its answers: what the commands that do so share.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use serde_json::Value;

use super::StateDirArg;
use crate::driver::local_api::{GROUP_SOCKET_DIR, Request, SOCKET_NAME, ask, printable};
use crate::driver::runtime;

/// Which running node is asked.
#[derive(Clone, Debug, Args)]
pub(super) struct NodeArg {
    #[command(flatten)]
    state: StateDirArg,
    /// Its socket [default: in the state directory; for a user who may not look in there, the one that a
    /// node has opened to a group].
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
}

impl NodeArg {
    /// The socket to ask by.
    pub(super) fn path(&self) -> PathBuf {
        if let Some(socket) = &self.socket {
            return socket.clone();
        }
        let own = self.state.state_dir.join(SOCKET_NAME);
        let hidden = std::fs::symlink_metadata(&own)
            .is_err_and(|error| error.kind() == ErrorKind::PermissionDenied);
        let open = hidden.then(|| only_socket(Path::new(GROUP_SOCKET_DIR)));
        open.flatten().unwrap_or(own)
    }
}

/// The socket in a folder, if there is one and no other.
fn only_socket(folder: &Path) -> Option<PathBuf> {
    let mut sockets = std::fs::read_dir(folder).ok()?.flatten();
    let first = sockets.next()?.path();
    sockets.next().is_none().then_some(first)
}

/// Asks what has one answer.
///
/// # Errors
/// There is no node, or its answer is an error.
pub(super) fn ask_one(node: &NodeArg, request: &Request) -> anyhow::Result<Value> {
    let mut answer = Value::Null;
    runtime::block_on(async |_| {
        ask(&node.path(), request, |value| {
            answer = value;
            Ok(())
        })
        .await
    })?;
    if answer.is_null() {
        bail!("the node went away without an answer");
    }
    Ok(answer)
}

/// A string of the answer as it prints, anything else as JSON, nothing as a dash.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => printable(text),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

pub(super) fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

pub(super) fn joined(value: &Value) -> String {
    let items: Vec<String> = list(value).map(text).collect();
    if items.is_empty() {
        "-".into()
    } else {
        items.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_others_named_does_not_reach_the_terminal_as_it_is() {
        assert_eq!(text(&json!("ann@example.com")), "ann@example.com");
        assert_eq!(text(&json!("Änn \u{1b}[2J\n")), "Änn \\u{1b}[2J\\n");
        assert_eq!(joined(&json!(["a\u{7}", 7])), "a\\u{7} 7");
    }

    #[test]
    fn a_socket_is_guessed_only_where_there_is_no_other() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(only_socket(&dir.path().join("missing")), None);
        assert_eq!(only_socket(dir.path()), None);
        let one = dir.path().join("a.sock");
        std::fs::write(&one, "").unwrap();
        assert_eq!(only_socket(dir.path()), Some(one));
        std::fs::write(dir.path().join("b.sock"), "").unwrap();
        assert_eq!(only_socket(dir.path()), None);
    }
}
