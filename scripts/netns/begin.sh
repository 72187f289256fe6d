# shellcheck shell=bash
# How a namespace test of the real binary begins. Source it; the script's first argument may be --keep. It leaves the
# script in the root of the project, in a lab, with what tests count with and what tailnets are built with.
#
#   RINGTAIL, BENCH     the programs: those of $RINGTAIL_BIN_DIR, target/debug by default
#
# Needs root; without it the test is skipped aloud, or fails when RINGTAIL_NO_SKIP=1.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$ROOT"
# shellcheck source=lab.sh
. scripts/netns/lab.sh
lab_or_skip
BIN=${RINGTAIL_BIN_DIR:-${CARGO_TARGET_DIR:-$ROOT/target}/debug}
# shellcheck disable=SC2034 # used by the scripts
RINGTAIL=$BIN/ringtail BENCH=${BENCH:-$BIN/ringtail-bench}
# shellcheck source=checks.sh
. scripts/netns/checks.sh
# shellcheck source=tailnet.sh
. scripts/netns/tailnet.sh
# shellcheck source=story.sh
. scripts/netns/story.sh
lab_init
[ "${1:-}" != --keep ] || : >"$LAB_DIR/keep"

# The end of a test: what its checks came to, and where one failed, the last words of all programs. Logs and events are
# left in $RINGTAIL_TEST_LOGS then.
verdict() {
  echo
  echo "$(basename "$0" .sh): $(counted ok) passed, $(counted FAIL) failed"
  [ "$(counted FAIL)" != 0 ] || return 0
  tailnet_logs
  if [ -n "${RINGTAIL_TEST_LOGS:-}" ]; then
    mkdir -p "$RINGTAIL_TEST_LOGS"
    find "$LAB_DIR" -maxdepth 1 \( -name '*.log' -o -name '*.events' \) -exec cp -t "$RINGTAIL_TEST_LOGS" {} +
  fi
  return 1
}
