#!/usr/bin/env bash
# Runs unit tests of the data plane under Miri, which finds undefined behaviour, such as a pointer that outlives what
# it points to, and data races. Wants rustup's nightly, and adds Miri to it; builds everything anew for it.
#
#   scripts/miri.sh [FILTER...]      default: the list below
#
# Covered: the packet pool, whose buffers cross threads, header views and ECN, lanes and shared activity, counting,
# paths and waiting packets of a peer, what an arriving run is, the virtio-net header, indexes, windows, alarms and
# timestamps of sessions.
#
# Miri interprets Rust and runs no machine code. So system calls (`ring`, `sys`, `udp`), vector instructions, and all
# that uses the ring crate (`aead`, keypairs) cannot run; handshakes, whose curve takes minutes, and tests that repeat
# the same thousands of times are left out.
set -euo pipefail
cd "$(dirname "$0")/.."

filters=("$@")
if [ ${#filters[@]} = 0 ]; then
  filters=(
    channel::{activity,lane} noise::tai64n open:: packet::{ecn,header,pool} peer::{path,waiting} stats::tests
    session::{indexes,timers} session::window::tests::{a_window,verdicts} tun::vnet
  )
fi
# Thousands of rounds.
skip=(adversarial endless half has_most random scan spread timestamps_grow)

rustup component add --toolchain nightly miri
# Without isolation tests may read the clock.
export MIRIFLAGS="-Zmiri-disable-isolation"
# shellcheck disable=SC2046 # one --skip NAME for each
rustup run nightly cargo miri test -p ringtail-dataplane --lib --locked -- "${filters[@]}" \
  $(printf -- '--skip %s ' "${skip[@]}")
