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
