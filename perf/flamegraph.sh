#!/usr/bin/env bash
# Where a node's time goes: records it, and writes a flame graph and the folded stacks beside it.
#
#   perf/flamegraph.sh                          all nodes that run on this machine, for 10 s
#   perf/flamegraph.sh --pid 1234 --pid 1235    these processes
#   perf/flamegraph.sh -- COMMAND...            all nodes that run by now, while COMMAND (a load, such as iperf3) does
#   perf/flamegraph.sh --exec -- COMMAND...     COMMAND and all that it starts, nodes and everything else
#
#   --seconds N   how long without a command (default 10)     --out PREFIX  PREFIX.svg and PREFIX.folded
#   --hz N        samples a second (default 499)              --user        no kernel stacks
#
# Stacks start with the thread: shards are rt-shard-0, rt-shard-1, ...; the control thread has the program's name.
# Release builds keep frame pointers and line tables, so stacks are whole and cheap to take.
set -euo pipefail

usage() { sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-; }

SECONDS_TO_RECORD=10 HZ=499 OUT='' USER_ONLY='' EXEC='' PIDS=()
while [ $# -gt 0 ]; do
  case $1 in
    --pid) PIDS+=("$2"); shift ;;
    --seconds) SECONDS_TO_RECORD=$2; shift ;;
    --hz) HZ=$2; shift ;;
    --out) OUT=$2; shift ;;
    --user) USER_ONLY=1 ;;
    --exec) EXEC=1 ;;
    --help | -h) usage; exit ;;
    --) shift; break ;;
    *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
ROOT=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-ringtail-$(date +%H%M%S)}

# shellcheck source=../scripts/netns/packages.sh
. "$ROOT/scripts/netns/packages.sh"
need_packages perf=linux-perf pgrep=procps

BENCH=${RINGTAIL_BIN_DIR:-${CARGO_TARGET_DIR:-$ROOT/target}/release}/ringtail-bench
if [ ! -x "$BENCH" ]; then
  (cd "$ROOT" && cargo build --release --locked --quiet -p ringtail-bench)
fi

# Cycles where the machine counts them; virtual machines often do not.
EVENT=cycles
if perf stat -e cycles true 2>&1 | grep -q 'not supported\|not counted'; then
  EVENT=cpu-clock
  echo "no hardware counters here: sampling by the CPU clock. Its samples land where interrupts are enabled again," >&2
  echo "so time in the kernel's locked parts shows up at their ends; perf/rooms.sh counts cycles per room instead." >&2
fi
[ -z "$USER_ONLY" ] || EVENT=$EVENT:u

if [ -n "$EXEC" ]; then
  [ $# -gt 0 ] || { echo "--exec needs a command after --" >&2; exit 2; }
  TARGET=() WHAT="$*"
else
  if [ ${#PIDS[@]} = 0 ]; then
    mapfile -t PIDS < <(pgrep -x ringtail || true)
    [ ${#PIDS[@]} -gt 0 ] || { echo "no node is running: start one, or give --pid" >&2; exit 1; }
  fi
  for pid in "${PIDS[@]}"; do
    [ -d "/proc/$pid" ] || { echo "no process $pid" >&2; exit 1; }
  done
  TARGET=(-p "$(IFS=,; echo "${PIDS[*]}")")
  WHAT="processes ${PIDS[*]}"
  [ $# -gt 0 ] || set -- sleep "$SECONDS_TO_RECORD"
fi

DATA=$(mktemp "${TMPDIR:-/tmp}/ringtail-perf.XXXXXX")
trap 'rm -f "$DATA" "$DATA.old"' EXIT
perf record --quiet -e "$EVENT" -F "$HZ" --call-graph fp "${TARGET[@]}" -o "$DATA" -- "$@" ||
  echo "the recorded command ended with an error; what was sampled until then is shown" >&2
perf script -i "$DATA" 2>/dev/null |
  "$BENCH" flame --folded "$OUT.folded" --svg "$OUT.svg" --title ringtail --subtitle "$WHAT, $EVENT at $HZ Hz"
echo "$OUT.svg"
echo "$OUT.folded"
