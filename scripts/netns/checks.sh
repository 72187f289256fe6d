# shellcheck shell=bash
# What the test scripts count with. Source it after lab.sh.
#
#   check NAME COMMAND...       holds a check: "ok" or "FAIL" and the name, here and in the file $CHECKS
#   counted WORD                how many lines of that file begin so
#   not, pause, within          what checks are made of
#   verdict                     the end: what the checks came to; where one failed, all programs' last words, and
#                               status 1 (it needs tailnet.sh)

# $TITLE, if there is one, stands before the name, and behind it what the command leaves in $SAID. What the command
# prints is shown when it fails.
check() {
  local name="${TITLE:+$TITLE: }$1" log=$LAB_DIR/check.$BASHPID
  shift
  SAID=''
  if "$@" >"$log" 2>&1; then
    echo "ok    $name${SAID:+ ($SAID)}" | tee -a "${CHECKS:-$LAB_DIR/checks}"
  else
    echo "FAIL  $name${SAID:+ ($SAID)}" | tee -a "${CHECKS:-$LAB_DIR/checks}"
    sed 's/^/      /' "$log" | tail -n 12
  fi
}
counted() { cat "${CHECKS:-$LAB_DIR/checks}" 2>/dev/null | grep -c "^$1" || true; }

not() { ! "$@"; }
# A foreground sleep would hold back traps.
pause() { sleep "$1" & wait $!; }
within() { # SECONDS COMMAND...: until it succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $end ] || return 1
    pause 0.1
  done
}

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
