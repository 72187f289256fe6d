#!/usr/bin/env bash
# The README's test command: lints, then every test.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/check.sh
cargo test --workspace --locked
