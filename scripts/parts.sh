# shellcheck shell=bash
# The parts of a long run, and where its time goes. Source it.
#
#   part NAME COMMAND...      runs the command
#   along NAME COMMAND...     begins it in the background
#   beside NAME COMMAND...    so, too, but it gets only what others leave of the processors: tests, which wait most of the
#                             time, go on as if it were not there
#   await NAME                waits for that, prints what it said, and ends as it ended
#
# However the script ends, it prints a table: the seconds of each part, and those that processors worked for it. A script
# that is itself a part of such a run adds its parts to the other's table. What still goes on then is ended.

declare -A ALONG=()
PARTS_MADE=''
if [ -z "${RINGTAIL_PARTS:-}" ]; then
  RINGTAIL_PARTS=$(mktemp -d) PARTS_MADE=1
  export RINGTAIL_PARTS
fi
trap parts_end EXIT

# A command's three times go to a file of its own, and not between what it says.
part() {
  local name=$1 status=0 failed='' times=$RINGTAIL_PARTS/$BASHPID.times real user sys TIMEFORMAT='%0R %0U %0S'
  shift
  { time "$@" 2>&3; } 3>&2 2>"$times" || status=$? failed=", which failed"
  read -r real user sys < <(tail -n 1 "$times")
  printf '%6s s %6s s  %s\n' "$real" $((user + sys)) "$name$failed" >>"$RINGTAIL_PARTS/table"
  return $status
}

along() {
  # In a group of its own, which can be ended as a whole. Not in a session: the kernel gives each session as much.
  set -m
  part "$1, beside others" "${@:2}" >"$RINGTAIL_PARTS/$1.log" 2>&1 </dev/null &
  ALONG[$1]=$!
  set +m
}
beside() { along "$1" idle "${@:2}"; }
idle() {
  chrt --idle --pid 0 $BASHPID || renice -n 19 $BASHPID
  "$@"
}
await() {
  local status=0 since=$SECONDS
  wait "${ALONG[$1]}" || status=$?
  [ $SECONDS = "$since" ] || printf '%6s s           waiting for %s\n' $((SECONDS - since)) "$1" >>"$RINGTAIL_PARTS/table"
  unset "ALONG[$1]"
  cat "$RINGTAIL_PARTS/$1.log"
  return $status
}

parts_end() {
  local name
  for name in "${!ALONG[@]}"; do kill -- "-${ALONG[$name]}" 2>/dev/null || true; done
  [ -n "$PARTS_MADE" ] || return 0
  printf '\n  passed  worked\n'
  cat "$RINGTAIL_PARTS/table" 2>/dev/null
  printf '%6s s           in all\n' $SECONDS
  rm -rf "$RINGTAIL_PARTS"
}
