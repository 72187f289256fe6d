#!/usr/bin/env bash
# `ringtail device` against every other WireGuard implementation, in network namespaces.
#
#   scripts/interop.sh [--only LIST] [--limit MINUTES] [--keep]
#
#   --only LIST       only these, by comma: wireguard-go, wireguard-go-debian, boringtun-cli, gotatun, kernel, wg-quick
#   --limit MINUTES   fail when it takes longer (45; it needs about 15 from nothing on two cores, then 6)
#   --keep            leave the lab up, and print how to enter it; for as long as it likes
#
# Each program is met twice, and all of the meetings run side by side. A meeting in which something failed is held
# once more, alone, and then that counts: on a busy machine a packet may come late.
#
#   "a begins"   we have its endpoint and it has none of ours: we are the initiator. Outside is IPv4.
#   "b begins"   the other way round. Outside is IPv6.
#
#      a  192.0.2.1     ---  m  ---     198.51.100.1  b
#         2001:db8:1::1                2001:db8:2::1
#      10.77.0.1, fd77::1            10.77.0.2, fd77::2      inside
#
# a is ours, b the other program (for the kernel's WireGuard a virtual machine on a tap in m), m a router, which
# becomes a NAT with a short memory at the end.
#
# Our command is $RINGTAIL_DEVICE, `ringtail device -f` of a release build by default. Needs root; without it, and
# for a program that cannot be had, says aloud what it leaves out, which is a failure when RINGTAIL_NO_SKIP=1.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0"; }
ONLY='' KEEP='' LIMIT=45
while [ $# -gt 0 ]; do
  case $1 in
    --only) [ $# -ge 2 ] || { usage >&2; exit 2; }; ONLY=,$2, && shift ;;
    --limit) [ $# -ge 2 ] || { usage >&2; exit 2; }; LIMIT=$2 && shift ;;
    --keep) KEEP=1 ;;
    --help | -h) usage; exit ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done
# Bytes of a file at full speed, and of one across a rekey; of both for the emulated kernel.
BYTES=200000000 BYTES_PACED=30000000 BYTES_VM=20000000 BYTES_VM_PACED=5000000
# A transfer of so many seconds, begun with a session, sees its rekey: REKEY_AFTER_TIME is 120 s.
PACED_S=145
# The middle forgets a UDP mapping after so many seconds of silence. Less than the 10 s of KEEPALIVE_TIMEOUT, after
# which an end that only received says something of its own accord.
MAPPING_S=4
# When more meetings than this have failed, it is not the machine.
AGAIN_MAX=4

# shellcheck source=netns/lab.sh
. scripts/netns/lab.sh
lab_or_skip
# shellcheck source=netns/packages.sh
. scripts/netns/packages.sh
# shellcheck source=netns/checks.sh
. scripts/netns/checks.sh
# shellcheck source=netns/peers.sh
. scripts/netns/peers.sh
# shellcheck source=netns/vm.sh
. scripts/netns/vm.sh
# shellcheck source=netns/pair.sh
. scripts/netns/pair.sh
# shellcheck source=netns/quick.sh
. scripts/netns/quick.sh

wanted() { [ -z "$ONLY" ] || [[ $ONLY == *,$1,* ]]; }
skipped() { echo "skip  $1" | tee -a "$LAB_DIR/skipped.checks"; }
took() { echo "      ($1: $((SECONDS - BEGAN)) s)" && BEGAN=$SECONDS; }

# ---- meetings --------------------------------------------------------------------------------

# By name, which is the prefix of what they make: what they are, and their process.
declare -A MEETINGS PROCESSES
TRY=

# meet NAME COMMAND...: in the background.
meet() {
  local P=$1$TRY CHECKS=$LAB_DIR/$1$TRY.checks
  : >"$CHECKS"
  MEETINGS[$1]=${*:2}
  "${@:2}" &
  PROCESSES[$1]=$!
  lab_note_pid $! meeting
}

# met NAME: waits for it. Has all gone well?
met() {
  local checks=$LAB_DIR/$1$TRY.checks
  # A meeting that broke off has not passed, whatever it counted.
  wait "${PROCESSES[$1]}" || echo "FAIL  $1: broke off" | tee -a "$checks"
  ! grep -q '^FAIL' "$checks"
}

# meet_again NAME: alone, and what it counts now stands for both. Says so.
meet_again() {
  local ns
  echo "      once more, alone: ${MEETINGS[$1]}, in which failed:"
  grep '^FAIL' "$LAB_DIR/$1.checks"
  mv "$LAB_DIR/$1.checks" "$LAB_DIR/$1.first"
  # What broke off may have left something running.
  for ns in a m b; do
    # shellcheck disable=SC2046 # one word per process
    kill -9 $(ip netns pids "$LAB$1$ns" 2>/dev/null) 2>/dev/null || true
  done
  # shellcheck disable=SC2086 # its words
  TRY=2 && meet "$1" ${MEETINGS[$1]}
  if met "$1"; then
    AGAIN+=("failed beside the others, passed alone: ${MEETINGS[$1]}")
  else
    AGAIN+=("failed twice: ${MEETINGS[$1]}")
  fi
  TRY=''
}

too_late() {
  echo
  show_logs
  cat "$LAB_DIR"/*.checks 2>/dev/null | grep '^FAIL' || true
  for name in "${!PROCESSES[@]}"; do
    ! kill -0 "${PROCESSES[$name]}" 2>/dev/null || echo "FAIL  ${MEETINGS[$name]}: has not ended"
  done
  echo "interop: failed, for it did not end within $LIMIT minutes (--limit)"
}

lab_init
[ -z "$KEEP" ] || : >"$LAB_DIR/keep"
lab_limit $((LIMIT * 60)) too_late
lab_run need_packages ip=iproute2 nft=nftables ping=iputils-ping awk=mawk wg=wireguard-tools sysctl=procps \
  cc=gcc /usr/include/stdio.h=libc6-dev perl=perl-base

BEGAN=$SECONDS
if [ -z "${RINGTAIL_BIN_DIR:-}" ]; then
  lab_run build_programs --release
  RINGTAIL_BIN_DIR=${CARGO_TARGET_DIR:-$ROOT/target}/release
  took "release build"
fi
BENCH=$RINGTAIL_BIN_DIR/ringtail-bench
read -ra OURS <<<"${RINGTAIL_DEVICE:-$RINGTAIL_BIN_DIR/ringtail device -f}"

PROGRAMS=()
for program in wireguard-go wireguard-go-debian boringtun-cli gotatun; do
  wanted $program || continue
  lab_run install_peers $program
  if peer_path $program >/dev/null; then
    PROGRAMS+=("$program")
    echo "      $program: $(peer_version $program)"
    took "$program"
  else
    skipped "$program: not here"
  fi
done
if wanted kernel; then
  if vm_prepare "$BENCH"; then
    PROGRAMS+=(kernel)
    echo "      kernel: Linux $KERNEL_VERSION, emulated"
    took "virtual machine"
  else
    skipped "kernel: no virtual machine"
  fi
fi

head -c $BYTES /dev/urandom >"$LAB_DIR/full.in"
head -c $BYTES_PACED "$LAB_DIR/full.in" >"$LAB_DIR/paced.in"
head -c $BYTES_VM "$LAB_DIR/full.in" >"$LAB_DIR/vm-full.in"
head -c $BYTES_VM_PACED "$LAB_DIR/full.in" >"$LAB_DIR/vm-paced.in"
for program in ${PROGRAMS[@]+"${PROGRAMS[@]}"}; do
  for first in a b; do
    meet "${program//-/}$first" meeting "$program" $first
  done
done
if wanted wg-quick; then
  lab_ns probe
  QUICK_WITH=
  for program in wireguard-go wireguard-go-debian gotatun; do
    [ -n "$QUICK_WITH" ] || ! peer_path $program >/dev/null || QUICK_WITH=$program
  done
  if [ -z "$QUICK_WITH" ]; then
    skipped "wg-quick: nobody to meet"
  elif ip -n "${LAB}probe" link add wg0 type wireguard 2>/dev/null; then
    echo "      wg-quick: takes the WireGuard of this machine's kernel for every interface, never a program"
  else
    meet quicka quick_meeting $QUICK_WITH a
    meet quickb quick_meeting $QUICK_WITH b
  fi
fi

FAILING=() AGAIN=()
for name in "${!MEETINGS[@]}"; do
  met "$name" || FAILING+=("$name")
done
took "meetings"
if [ ${#FAILING[@]} -gt $AGAIN_MAX ]; then
  echo "      ${#FAILING[@]} meetings failed: none is held again"
elif [ -z "$KEEP" ]; then
  for name in ${FAILING[@]+"${FAILING[@]}"}; do
    meet_again "$name"
    took "once more"
  done
fi

cat "$LAB_DIR"/*.checks >"$LAB_DIR/checks"
PASSED=$(counted ok) FAILED=$(counted FAIL) SKIPPED=$(counted skip)
echo
if [ ${#FAILING[@]} -gt 0 ]; then
  show_logs
  echo
  grep '^FAIL' "$LAB_DIR/checks" || true
  if [ -n "${RINGTAIL_TEST_LOGS:-}" ]; then
    mkdir -p "$RINGTAIL_TEST_LOGS" && cp "$LAB_DIR"/*.log "$RINGTAIL_TEST_LOGS/"
  fi
fi
[ "$SKIPPED" = 0 ] || grep '^skip' "$LAB_DIR/checks"
[ ${#AGAIN[@]} = 0 ] || printf 'again %s\n' "${AGAIN[@]}"
[ -z "$KEEP" ] || echo "the lab stays up; take it down: scripts/netns/lab.sh remove $LAB $LAB_DIR"
echo "interop: $PASSED passed, $FAILED failed$([ "$SKIPPED" = 0 ] || echo ", $SKIPPED skipped"), in $SECONDS s"
[ "$FAILED" = 0 ] && [ "$PASSED" -gt 0 ] || exit 1
[ "$SKIPPED" = 0 ] || [ "${RINGTAIL_NO_SKIP:-}" != 1 ] || exit 1
