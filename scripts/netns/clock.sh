# shellcheck shell=bash
# Clocks that a test moves under one program. Source it after lab.sh.
#
#   clock_make                     builds what moves them, $CLOCK_LIB
#   clock_set FILE SLEPT WALL      FILE says by how many seconds: the clock that counts sleep, and the wall clock
#   clock_wrap FILE PROGRAM        a script that runs PROGRAM by the clocks of FILE; prints its name
#
# A program sees a change at its next look; the kernel, and who else asks it, sees nothing.

clock_make() {
  CLOCK_LIB=$LAB_DIR/clock.so
  cc -O1 -Wall -Werror -shared -fPIC -o "$CLOCK_LIB" "$(dirname "${BASH_SOURCE[0]}")/clock.c"
}
clock_set() {
  [ -e "$1" ] || head -c 16 /dev/zero >"$1"
  # In place: it is mapped.
  perl -e 'open my $file, "+<", shift or die $!; print $file pack "q<2", @ARGV' "$@"
}
clock_wrap() {
  printf '#!/bin/sh\nLD_PRELOAD=%q RINGTAIL_CLOCK=%q exec %q "$@"\n' "$CLOCK_LIB" "$1" "$2" >"$1.run"
  chmod +x "$1.run"
  echo "$1.run"
}
