//! Asks a running node, and reads its answers: what the commands that do so share.

use anyhow::bail;
use serde_json::Value;

use super::StateDirArg;
use crate::driver::local_api::{Request, ask};
use crate::driver::runtime;

/// Asks what has one answer.
///
/// # Errors
/// There is no node, or its answer is an error.
pub(super) fn ask_one(state: &StateDirArg, request: &Request) -> anyhow::Result<Value> {
    let socket = state.state_dir.join("ringtail.sock");
    let mut answer = Value::Null;
    runtime::block_on(async |_| {
        ask(&socket, request, |value| {
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

/// A string of the answer as it is, anything else as JSON, nothing as a dash.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
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
