# shellcheck shell=bash

# A node ends and starts while others send to it: they are answered within a second after it is up, though a
# standard peer would go on with the lost keys for 15 s.
row_restart() {
  tailnet_up
  hosts a b c
  tailnet_ringtail a a
  tailnet_ringtail b b
  tailnet_tailscaled c c
  ready a b c || return 0
  check "ringtail to ringtail" tailnet_pings b a 2
  check "tailscaled to ringtail" tailnet_pings c a 2
  check "the two ringtails are direct" within 15 tailnet_direct a b
  check "ringtail and tailscaled are direct" within 15 tailnet_direct a c
  restart KILL "direct, killed"
  pause 12
  restart TERM "direct, stopped, and its memory lost" forget
  tailnet_block a
  within 15 relayed a b
  within 15 relayed a c
  restart KILL "by relay, killed, and its memory lost" forget
}
# restart SIGNAL HOW [forget]: of node a, with streams of b and c to it.
restart() {
  tailnet_stream b a from-b
  tailnet_stream c a from-c
  pause 2
  tailnet_stop a "$1"
  [ "${3:-}" != forget ] || rm "$LAB_DIR/node-a/sessions.json"
  tailnet_start a
  # It answers for itself before it knows who else is there.
  within 20 rt a status >/dev/null 2>&1
  local up
  up=$(date +%s%N)
  pause 8
  check "$2: ringtail is answered within a second" answered_within from-b "$up" 1000
  check "$2: tailscaled is answered within a second" answered_within from-c "$up" 1000
}
