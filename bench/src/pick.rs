//! One value out of a JSON document, so that scripts need no other tool for it.

#![forbid(unsafe_code)]

use anyhow::{Context, anyhow};
use serde_json::Value;

/// `pick`: which value.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// JSON pointer (RFC 6901), such as /peers/0/addresses/0.
    pointer: String,
}

/// Prints the value: strings bare, everything else as JSON.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let document: Value =
        serde_json::from_reader(std::io::stdin().lock()).context("standard input is no JSON")?;
    match document.pointer(&args.pointer) {
        Some(Value::String(text)) => println!("{text}"),
        Some(other) => println!("{other}"),
        None => return Err(anyhow!("nothing at {}", args.pointer)),
    }
    Ok(())
}
