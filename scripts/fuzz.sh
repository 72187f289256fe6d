#!/usr/bin/env bash
# Runs the fuzz targets of both crates (`fuzzing::TARGETS`), each for some seconds, as many at a time as there are cores.
#
#   scripts/fuzz.sh [SECONDS [TARGET...]]      default: 60 s of every target
#   scripts/fuzz.sh build                      builds them, and runs nothing
#
# Builds with the stable compiler and needs no cargo-fuzz: RUSTC_BOOTSTRAP unlocks the one flag for AddressSanitizer.
# Overflow checks and debug assertions are on.
#
# Begins with the seeds in control/fuzz/corpus, which ordinary tests replay, and keeps what it learns in
# target/fuzz/corpus. An input that breaks something is left in target/fuzz/found, the command that runs it again is
# printed, and the script fails: add the input to the seeds with the fix.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=netns/packages.sh
. scripts/netns/packages.sh

SECS=${1:-60}
TARGETS=("${@:2}")
[ ${#TARGETS[@]} -gt 0 ] || mapfile -t TARGETS < <(ls control/fuzz/corpus)
HOST=$(rustc -vV | sed -n 's/^host: //p')
OUT=${CARGO_TARGET_DIR:-target}/fuzz
PROGRAM=$OUT/$HOST/release/ringtail-fuzz

# libFuzzer itself is C++.
need_packages c++=g++
# The versions of the workspace; cargo adds the fuzzer's own and drops what is not needed.
cp Cargo.lock control/fuzz/Cargo.lock
RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
  -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
  -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing" \
  "${CARGO:-cargo}" build --release --manifest-path control/fuzz/Cargo.toml --target "$HOST" --target-dir "$OUT"
[ "$SECS" != build ] || exit 0

fuzz() { # TARGET
  local log=$OUT/$1.log found=$OUT/found/$1 file
  mkdir -p "$OUT/corpus/$1" "$found"
  # A stream may be long; the seeds alone would make libFuzzer stay short.
  if RINGTAIL_FUZZ=$1 "$PROGRAM" "$OUT/corpus/$1" "control/fuzz/corpus/$1" -artifact_prefix="$found/" -timeout=20 \
    -max_total_time="$SECS" -max_len=16384 -rss_limit_mb=3072 -print_final_stats=1 >"$log" 2>&1; then
    echo "$1: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs in $SECS s, nothing found"
    return
  fi
  tail -n 30 "$log"
  for file in "$found"/*; do echo "$1 is broken: RINGTAIL_FUZZ=$1 $PROGRAM $file"; done
  return 1
}
export -f fuzz
export SECS OUT PROGRAM
printf '%s\n' "${TARGETS[@]}" | xargs -P "$(nproc)" -I{} bash -c 'fuzz {}'
