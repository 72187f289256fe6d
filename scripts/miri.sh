#!/usr/bin/env bash
# Runs unit tests of the data plane under Miri, which finds undefined behaviour, such as a pointer that outlives what
# it points to, and data races. Has rustup install a nightly that has Miri; builds everything anew for it. Where that
# nightly cannot be had, says so and ends with status 75.
#
#   scripts/miri.sh [FILTER...]      default: the list below
#
# Covered: the packet pool, whose buffers cross threads, header views, the virtio-net header and ECN, lanes, slots and
# shared activity, counting, paths and waiting packets of a peer, what an arriving run is, indexes, windows, alarms
# and timestamps of sessions.
#
# Miri interprets Rust and runs no machine code. So system calls (`ring`, `sys`, `udp`), vector instructions, and all
# that uses the ring crate (`aead`, keypairs) cannot run; handshakes, whose curve takes minutes, and tests that repeat
# the same thousands of times are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=netns/packages.sh
. scripts/netns/packages.sh

NIGHTLY=nightly-2026-10-30
filters=("$@")
if [ ${#filters[@]} = 0 ]; then
  filters=(
    channel::{lane,slots} noise::tai64n open:: packet::{ecn,header,pool,vnet} peer::{activity,path,waiting}
    session::{indexes,timers} session::window::tests::{a_window,verdicts} stats::tests
  )
fi
# Thousands of rounds.
skip=(adversarial endless half has_most nothing_is_lost_between random scan spread the_latest timestamps_grow)

rustup run $NIGHTLY cargo miri --version >/dev/null 2>&1 ||
  from_rust miri $NIGHTLY rustup toolchain install $NIGHTLY --profile minimal --component miri,rust-src --no-self-update
# Without isolation tests may read the clock.
export MIRIFLAGS="-Zmiri-disable-isolation"
tests() { rustup run $NIGHTLY cargo miri test -p ringtail-dataplane --lib --locked -- "$@"; }
names=$(tests --list)
for filter in "${filters[@]}" "${skip[@]}"; do
  grep -qF "$filter" <<<"$names" || { echo "no test is named $filter" >&2; exit 1; }
done
# shellcheck disable=SC2046 # one --skip NAME for each
tests "${filters[@]}" $(printf -- '--skip %s ' "${skip[@]}")
