# shellcheck shell=bash

# A node's machine sleeps, and its clock is wrong when the node starts again: it is reached all the same.
row_clocks() {
  tailnet_up
  hosts a b c
  clock_make
  clock_set "$LAB_DIR/clock" 0 0
  RINGTAIL=$(clock_wrap "$LAB_DIR/clock" "$RINGTAIL") tailnet_ringtail a a
  tailnet_ringtail b b
  tailnet_tailscaled c c
  ready a b c || return 0
  tailnet_pings a b 1
  check "the sleeper reaches tailscaled" tailnet_pings a c 2
  within 15 tailnet_direct a c
  sleeps 600 "direct, after a sleep"
  tailnet_block a
  within 15 relayed a b
  within 15 relayed a c
  sleeps 7200 "by relay, after a sleep in which the relay has forgotten it"
  tailnet_stop a KILL
  # Two days: the relay's certificate is not valid yet by that clock.
  clock_set "$LAB_DIR/clock" 7800 -172800
  tailnet_stream b a from-b
  tailnet_stream c a from-c
  RINGTAIL=$LAB_DIR/clock.run tailnet_start a
  within 20 rt a status >/dev/null 2>&1
  answers_streams "by relay, restarted with the clock two days behind"
  check "and the log says that the clock is behind" grep -q "the clock is behind" "$LAB_DIR/node-a.log"
}
# sleeps SECONDS HOW: node a, for so long by its clock. The others have lost their keys meanwhile, as after three
# minutes they would, and on the way to the relay nobody knows the old connection.
sleeps() {
  local relayed
  kill -STOP "$(lab_pid node-a)"
  tailnet_stop b
  tailnet_stop c
  relayed=$(lab_in a ss -Htn state established dst 203.0.113.1 | awk '{ sub(/.*:/, "", $3); print $3 }')
  lab_in inet nft "table inet forgotten_$1 { chain pass { type filter hook forward priority filter;
    tcp sport { ${relayed//$'\n'/, } } ip saddr 203.0.113.11 drop; }; }"
  tailnet_start b
  tailnet_start c
  within 40 tailnet_online b && within 40 tailnet_online c || echo "the others are not back"
  tailnet_stream a b from-b
  tailnet_stream a c from-c
  pause 3
  clock_set "$LAB_DIR/clock" $((SLEPT = ${SLEPT:-0} + $1)) 0
  kill -CONT "$(lab_pid node-a)"
  answers_streams "$2"
}
# answers_streams HOW: from now.
answers_streams() {
  local now
  now=$(date +%s%N)
  pause 8
  check "$1: ringtail answers within a second" answered_within from-b "$now" 1000
  check "$1: tailscaled answers within a second" answered_within from-c "$now" 1000
}
