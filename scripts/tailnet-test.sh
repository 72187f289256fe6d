#!/usr/bin/env bash
# ringtail in a tailnet of the real programs: Headscale, tailscaled, derper, in network namespaces.
#
#   scripts/tailnet-test.sh [--only LIST] [--jobs N] [--limit MINUTES] [--keep]
#
#   --only LIST       only these rows, by comma; `--only help` lists them
#   --jobs N          so many rows beside each other (4)
#   --limit MINUTES   fail when it takes longer, the building of the peers apart (15)
#   --keep            leave the lab up, and print how to take it down
#
# A row is a function row_NAME in netns/rows, with a tailnet of its own (netns/tailnet.sh). Its file is read for it alone,
# so that names of helpers in two files do not meet. It builds what it needs, begins with hosts of its own and `ready`,
# and each sentence it checks is a line of the result. A row in which something failed is held once more, alone, and
# then that counts: on a busy machine an answer may come late. A row ends after ROW_S seconds at the latest.
#
# Installs or builds the peers in a cache (netns/peers.sh; about six minutes the first time). Our binaries are those of
# $RINGTAIL_BIN_DIR, target/debug by default. Without root or Go it says aloud that it is skipped, which is a failure
# when RINGTAIL_NO_SKIP=1.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
ONLY='' JOBS=4 KEEP='' LIMIT=15
ROW_S=150
# What takes longest, for it waits for what takes its time, begins first.
FIRST=(renew plain deleted restart renew_ours)
# When more rows than this have failed, it is not the machine.
AGAIN_MAX=3
while [ $# -gt 0 ]; do
  case $1 in
    --only | --jobs | --limit)
      [ $# -ge 2 ] || { usage >&2; exit 2; }
      case $1 in --only) ONLY=,$2, ;; --jobs) JOBS=$2 ;; --limit) LIMIT=$2 ;; esac
      shift ;;
    --keep) KEEP=1 ;;
    --help | -h) usage; exit ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done

# shellcheck source=netns/lab.sh
. scripts/netns/lab.sh
# shellcheck source=netns/packages.sh
. scripts/netns/packages.sh
# shellcheck source=netns/checks.sh
. scripts/netns/checks.sh
# shellcheck source=netns/peers.sh
. scripts/netns/peers.sh
# shellcheck source=netns/tailnet.sh
. scripts/netns/tailnet.sh
# shellcheck source=netns/clock.sh
. scripts/netns/clock.sh

# ---- the rows are held -----------------------------------------------------------------------

# Where each row is.
declare -A FILE=()
for file in scripts/netns/rows/*.sh; do
  while read -r row; do
    [ -z "${FILE[$row]:-}" ] || { echo "error: row $row is in $file and in ${FILE[$row]}" >&2; exit 2; }
    FILE[$row]=$ROOT/$file
  done < <(sed -n 's/^row_\([a-z0-9_]*\)().*/\1/p' "$file")
done
ROWS=()
for row in $({ printf '%s\n' "${FIRST[@]}" && printf '%s\n' "${!FILE[@]}" | sort; } | awk '!seen[$0]++'); do
  [ -n "$ONLY" ] && [[ $ONLY != *,$row,* ]] || ROWS+=("$row")
done
[ ${#ROWS[@]} -gt 0 ] || { echo "rows: $(printf '%s\n' "${!FILE[@]}" | sort | tr '\n' ' ')"; exit 2; }

lab_or_skip
BEGAN=$SECONDS
lab_init
[ -z "$KEEP" ] || : >"$LAB_DIR/keep"
lab_run need_packages ip=iproute2 nft=nftables ping=iputils-ping awk=mawk jq=jq python3=python3-minimal wg=wireguard-tools \
  cc=gcc /usr/include/stdio.h=libc6-dev
lab_run install_peers "${TAILNET_PEERS[@]}"
for program in "${TAILNET_PEERS[@]}"; do
  if ! peer_path "$program" >/dev/null; then
    echo "SKIPPED: ${0##*/} needs $program" >&2
    [ "${RINGTAIL_NO_SKIP:-}" != 1 ] || exit 1
    exit 0
  fi
  echo "      $program: $(peer_version "$program")"
done
if [ -z "${RINGTAIL_BIN_DIR:-}" ]; then
  lab_run build_programs
  RINGTAIL_BIN_DIR=${CARGO_TARGET_DIR:-$ROOT/target}/debug
fi
# shellcheck disable=SC2034 # used by tailnet.sh
RINGTAIL=$RINGTAIL_BIN_DIR/ringtail BENCH=$RINGTAIL_BIN_DIR/ringtail-bench
echo "      (peers and binaries: $((SECONDS - BEGAN)) s)"

declare -A PROCESSES=() SINCE=()
# hold ROW [TRY]: in the background.
hold() {
  local checks=$LAB_DIR/$1${2:-}.checks
  : >"$checks"
  (
    # What goes wrong is told by checks, and the rest of a row is held all the same.
    set +e
    lab_within "$1${2:-}"
    # shellcheck disable=SC2034 # used by checks.sh
    TITLE=$1 CHECKS=$checks
    # shellcheck disable=SC1090 # one of many
    . "${FILE[$1]}"
    "row_$1"
    ! grep -q '^FAIL' "$checks" || tailnet_logs >"$LAB_DIR.logs"
    # The shell would print how each of its children ended.
    [ -n "$KEEP" ] || { exec 2>/dev/null && lab_remove; }
  ) &
  PROCESSES[$1]=$! SINCE[$1]=$SECONDS
  lab_note_pid $! row
}
# has_ended ROW [TRY]: by itself, or because it took too long.
has_ended() {
  local pid=${PROCESSES[$1]} checks=$LAB_DIR/$1${2:-}.checks
  if kill -0 "$pid" 2>/dev/null; then
    [ $((SECONDS - SINCE[$1])) -ge $ROW_S ] || return 1
    kill "$pid"
    echo "FAIL  $1: has not ended after $ROW_S s" | tee -a "$checks"
    (lab_within "$1${2:-}" && tailnet_logs >"$LAB_DIR.logs" && lab_remove)
  fi
  # A row that broke off has not passed, whatever it counted.
  wait "$pid" 2>/dev/null || echo "FAIL  $1: broke off" | tee -a "$checks"
  unset "PROCESSES[$1]"
}
well() { grep -q '^ok' "$LAB_DIR/$1.checks" && ! grep -q '^FAIL' "$LAB_DIR/$1.checks"; }

too_late() {
  cat "$LAB_DIR"/*.checks 2>/dev/null | grep '^FAIL' || true
  echo "tailnet-test: failed, for it did not end within $LIMIT minutes (--limit)"
}
lab_limit $((LIMIT * 60)) too_late

NEXT=0
while [ $NEXT -lt ${#ROWS[@]} ] || [ ${#PROCESSES[@]} -gt 0 ]; do
  while [ $NEXT -lt ${#ROWS[@]} ] && [ ${#PROCESSES[@]} -lt "$JOBS" ]; do
    hold "${ROWS[$NEXT]}"
    NEXT=$((NEXT + 1))
  done
  pause 0.2
  for row in "${!PROCESSES[@]}"; do
    ! has_ended "$row" || echo "      ($row: $((SECONDS - SINCE[$row])) s)"
  done
done

FAILING=() AGAIN=()
for row in "${ROWS[@]}"; do
  well "$row" || FAILING+=("$row")
done
if [ ${#FAILING[@]} -le $AGAIN_MAX ] && [ -z "$KEEP" ]; then
  for row in ${FAILING[@]+"${FAILING[@]}"}; do
    echo "      once more, alone: $row"
    hold "$row" 2
    until has_ended "$row" 2; do pause 0.2; done
    mv "$LAB_DIR/$row.checks" "$LAB_DIR/$row.first" && mv "$LAB_DIR/${row}2.checks" "$LAB_DIR/$row.checks"
    if well "$row"; then AGAIN+=("failed beside others, passed alone: $row"); else AGAIN+=("failed twice: $row"); fi
  done
fi

cat "$LAB_DIR"/*.checks >"$LAB_DIR/checks"
PASSED=$(counted ok) FAILED=$(counted FAIL)
echo
if [ "$FAILED" -gt 0 ]; then
  cat "$LAB_DIR"/*.logs 2>/dev/null || true
  grep '^FAIL' "$LAB_DIR/checks"
fi
[ ${#AGAIN[@]} = 0 ] || printf 'again %s\n' "${AGAIN[@]}"
[ -z "$KEEP" ] || echo "the lab stays up; take it down: scripts/netns/lab.sh remove $LAB $LAB_DIR"
echo "tailnet-test: $PASSED passed, $FAILED failed, in $SECONDS s"
[ "$FAILED" = 0 ] && [ "$PASSED" -gt 0 ]
