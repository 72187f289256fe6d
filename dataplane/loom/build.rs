//! Takes the source of crossbeam's `ArrayQueue` from the registry, as cargo has resolved it, and puts loom's
//! atomics and cells in the place of those of `core`. Nothing else of it is touched, and a release that is
//! written differently fails to build here.

use std::path::PathBuf;
use std::process::Command;

/// What is replaced, and how often it stands there at least.
const REPLACED: [(&str, &str); 5] = [
    ("//! ", "// "),
    ("//!\n", "//\n"),
    (
        "use core::cell::UnsafeCell;",
        "use crate::shim::UnsafeCell;",
    ),
    ("core::sync::atomic", "crate::shim::atomic"),
    (
        "use crossbeam_utils::{Backoff, CachePadded};",
        "use crate::shim::{Backoff, CachePadded};",
    ),
];

fn main() {
    let variable = |name| std::env::var_os(name).expect("set by cargo");
    let metadata = Command::new(variable("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline"])
        // What is built here has been fetched; what other platforms need has perhaps not.
        .arg("--filter-platform")
        .arg(variable("TARGET"))
        .arg("--manifest-path")
        .arg(PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .output()
        .expect("cargo runs, for it has started this");
    assert!(
        metadata.status.success(),
        "{}",
        String::from_utf8_lossy(&metadata.stderr)
    );
    let metadata: serde_json::Value =
        serde_json::from_slice(&metadata.stdout).expect("cargo speaks JSON");
    let packages = metadata["packages"].as_array().expect("a list");
    let queue = packages
        .iter()
        .find(|package| package["name"] == "crossbeam-queue")
        .and_then(|package| package["manifest_path"].as_str())
        .expect("it is a dependency");
    let source = PathBuf::from(queue)
        .with_file_name("src")
        .join("array_queue.rs");
    println!("cargo::rerun-if-changed={}", source.display());
    let mut text = std::fs::read_to_string(&source).expect("its source is there");
    for (from, to) in REPLACED {
        assert!(text.contains(from), "{} has no {from:?}", source.display());
        text = text.replace(from, to);
    }
    assert!(
        !text.contains("core::sync") && !text.contains("core::cell") && !text.contains("std::"),
        "{} has got more of core's",
        source.display()
    );
    let out = PathBuf::from(variable("OUT_DIR")).join("array_queue.rs");
    std::fs::write(out, text).expect("cargo has made the directory");
}
