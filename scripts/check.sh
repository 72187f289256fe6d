#!/usr/bin/env bash
# Formatting and lints, as errors. CI runs this first.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fmt --all --check
for crate in dataplane/oracle dataplane/loom control/fuzz; do cargo fmt --check --manifest-path $crate/Cargo.toml; done
cargo clippy --workspace --all-targets --locked -- -D warnings
# The program alone: without the features that benches and tests switch on, the compiler sees what nobody calls.
cargo clippy -p ringtail -p ringtail-dataplane --locked -- -D warnings
