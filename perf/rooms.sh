#!/usr/bin/env bash
# What each room of each shard costs: cycles that the shards count themselves, as a table.
#
#   perf/rooms.sh STATE_DIR [SECONDS]          while the node does what it does (default 5 s)
#   perf/rooms.sh STATE_DIR -- COMMAND...      while COMMAND runs, a load such as iperf3
#
# Sampling by the CPU clock lands where interrupts are enabled and misleads; these counters do not.
# "ring" holds the receiving, without the waiting for it; writes to the TUN are "tun", sends "udp".
set -euo pipefail

if [ $# = 0 ] || [ "$1" = --help ]; then
  sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-
  exit 2
fi
STATE=$1
shift
ROOT=$(cd "$(dirname "$0")/.." && pwd)
BIN=${RINGTAIL_BIN_DIR:-${CARGO_TARGET_DIR:-$ROOT/target}/release}
# shellcheck source=../scripts/netns/packages.sh
. "$ROOT/scripts/netns/packages.sh"
[ -x "$BIN/ringtail-bench" ] || (cd "$ROOT" && build_programs --release)
TMP=$(mktemp -d)
trap 'rm -rf "$TMP"' EXIT

"$BIN/ringtail" status --json --state-dir "$STATE" >"$TMP/before"
if [ "${1:-}" = -- ]; then
  shift
  "$@" >&2 || echo "the load ended with an error" >&2
else
  sleep "${1:-5}"
fi
"$BIN/ringtail" status --json --state-dir "$STATE" >"$TMP/after"
"$BIN/ringtail-bench" rooms "$TMP/before" "$TMP/after"
