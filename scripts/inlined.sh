#!/usr/bin/env bash
# Checks in a release build that the kernels of the AEAD are whole: a helper that the compiler did not inline is
# compiled without the processor's features, and every vector goes through memory to it and back. That computes the
# same and takes several times as long, so no other test notices.
#
#   scripts/inlined.sh [PROGRAM]             default: target/release/ringtail, which is built
#
# Each kernel is one function per direction. It may call what is outside the program or panics, and nothing else
# of it. On x86-64 only.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=netns/packages.sh
. scripts/netns/packages.sh
[ "$(uname -m)" = x86_64 ] || { echo "inlined: skipped, not x86-64"; exit 0; }
need_packages objdump=binutils

PROGRAM=${1:-}
if [ -z "$PROGRAM" ]; then
  "${CARGO:-cargo}" build --release --locked --quiet -p ringtail
  PROGRAM=${CARGO_TARGET_DIR:-target}/release/ringtail
fi
objdump -d -C --no-show-raw-insn "$PROGRAM" | awk '
  /^[0-9a-f]+ <ringtail_dataplane::aead::avx(2|512)::run>:$/ { name = $2 $3; kernels[$2]++; inside = 1; next }
  /^$/ { inside = 0 }
  !inside { next }
  /[yz]mm/ { vectors[name]++ }
  # Through the table of the linker: other libraries, and panics of the standard library.
  /\tcall / && !/\*/ && !/panic/ { print "inlined: " name " calls " $0; bad = 1 }
  END {
    for (cpu = 2; cpu <= 512; cpu += 510) {
      kernel = "<ringtail_dataplane::aead::avx" cpu "::run>:"
      if (kernels[kernel] != 2 || vectors[kernel] < 500) {
        print "inlined: " kernel " " kernels[kernel] + 0 " functions, " vectors[kernel] + 0 " vector instructions"
        bad = 1
      }
    }
    if (bad) exit 1
    print "inlined: 4 kernels, no calls inside the program"
  }'
