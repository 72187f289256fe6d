# shellcheck shell=bash

# Keys expire, of a peer and of our own, and another is away: status says all of it, by the map that was kept too.
row_expired() {
  tailnet_up
  hosts a b c d
  tailnet_ringtail a a
  tailnet_tailscaled b b
  tailnet_ringtail c c
  tailnet_ringtail d d
  ready a b c d || return 0
  check "ping before" tailnet_pings b a 1
  hs_expire b
  check "a peer whose key has expired is shown so" within 10 shows a b 'key expired at 20'
  check "and gets no answer" not tailnet_pings b a 1
  check "nor is it asked" not tailnet_pings a b 1
  tailnet_stop c
  check "a peer that is away is shown as offline" within 20 shows a c offline
  hs_expire a
  check "its own expiry is in the status of a, with an exit code" within 10 own_expiry a
  check "and once in its log" [ "$(grep -c "this node's key has expired" "$LAB_DIR/node-a.log")" = 1 ]
  lab_stop headscale KILL
  tailnet_stop a
  tailnet_start a
  check "also without coordination" within 10 own_expiry a
  check "and the peer's" shows a b 'key expired at 20'
  check "Headscale starts again" start_headscale
  tailnet_stop a
  tailnet_start a
  check "a start with an auth key makes it good again" within 20 tailnet_pings a d 1
  check "and its status is in order" rt a status
}
own_expiry() {
  local code=0
  rt "$1" status >"$LAB_DIR/said" || code=$?
  [ "$code" = 77 ] && grep -q 'problem: this node.s key expired at 20.*--auth-key-file' "$LAB_DIR/said"
}
