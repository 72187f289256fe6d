#!/usr/bin/env bash
# Runs the fuzz targets of dataplane/fuzz and control/fuzz, each for some seconds.
#
#   scripts/fuzz.sh [SECONDS [TARGET...]]      default: 60 s of every target
#
# Builds with the stable compiler; cargo-fuzz is not needed (`cargo fuzz run TARGET` in one of the two crates works
# too, on nightly). The data plane, which has unsafe code, is built with AddressSanitizer, for which RUSTC_BOOTSTRAP
# unlocks one compiler flag. Both have overflow checks and debug assertions.
#
# Begins with the seeds in control/fuzz/corpus, which ordinary tests replay, and keeps what it learns in target/fuzz. An
# input that breaks something is left in target/fuzz/found, its path printed, and the script fails: add the input
# to the seeds with the fix.
set -euo pipefail
cd "$(dirname "$0")/.."

SECS=${1:-60}
TARGETS=("${@:2}")
HOST=$(rustc -vV | sed -n 's/^host: //p')
COVERAGE="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-pc-table
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-trace-compares
  -Ccodegen-units=1 --cfg fuzzing"

wanted() { # TARGET
  [ ${#TARGETS[@]} = 0 ] || [[ " ${TARGETS[*]} " = *" $1 "* ]]
}

broken=()
ran=0
for crate in dataplane control; do
  bins=()
  for source in "$crate"/fuzz/fuzz_targets/*.rs; do
    target=$(basename "$source" .rs)
    if wanted "$target"; then bins+=("$target"); fi
  done
  [ ${#bins[@]} -gt 0 ] || continue
  # The versions of the workspace; cargo adds the fuzzer's own and drops what is not needed.
  cp Cargo.lock "$crate/fuzz/Cargo.lock"
  flags=$COVERAGE
  if [ "$crate" = dataplane ]; then flags="$flags -Zsanitizer=address"; fi
  # shellcheck disable=SC2046 # one --bin NAME for each
  RUSTC_BOOTSTRAP=1 RUSTFLAGS=$flags CARGO_TARGET_DIR=target/fuzz/$crate "${CARGO:-cargo}" build --release \
    --manifest-path "$crate/fuzz/Cargo.toml" --target "$HOST" $(printf -- '--bin %s ' "${bins[@]}")
  for target in "${bins[@]}"; do
    mkdir -p "target/fuzz/corpus/$target" "target/fuzz/found/$target"
    log=target/fuzz/$target.log
    echo "$target for $SECS s"
    # A stream may be long; the seeds alone would make libFuzzer stay short.
    if "target/fuzz/$crate/$HOST/release/$target" "target/fuzz/corpus/$target" "control/fuzz/corpus/$target" \
      -artifact_prefix="target/fuzz/found/$target/" -max_total_time="$SECS" -max_len=16384 -timeout=20 \
      -rss_limit_mb=3072 -print_final_stats=1 >"$log" 2>&1; then
      grep -E '^(#.* (INITED|DONE)|stat::(number_of_executed_units|average_exec_per_sec))' "$log" || true
    else
      tail -n 30 "$log"
      broken+=("$target")
    fi
    ran=$((ran + 1))
  done
done
[ $ran -gt 0 ] || { echo "no target is named ${TARGETS[*]}" >&2; exit 1; }
[ ${#broken[@]} = 0 ] || { echo "broken: ${broken[*]}" >&2; exit 1; }
