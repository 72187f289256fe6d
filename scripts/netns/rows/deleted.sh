# shellcheck shell=bash

# An administrator deletes nodes: nobody has them any more, and they stay away although their key lets anybody in. a
# hears of it by asking, c only when it can reach Headscale again.
row_deleted() {
  tailnet_up
  hosts a b c d
  tailnet_ringtail a a
  tailnet_tailscaled b b
  tailnet_ringtail c c
  tailnet_tailscaled d d
  ready a b c d || return 0
  check "ping before" tailnet_pings a d 1
  hs_delete d
  check "ringtail has a deleted tailscaled no longer in its map" within 10 not tailnet_knows a d
  check "and it answers no more" not tailnet_pings a d 1
  ip -n "${LAB}c" link set wan down
  hs_delete a
  hs_delete c
  check "tailscaled has a deleted ringtail no longer in its map" within 10 not tailnet_knows b a
  # It asks once a minute.
  check "the deleted ringtail ends" within 90 not lab_alive node-a
  check "with an exit code that says so" exited a 77
  check "and last words that say what to do" last_words a 'was removed from the network.*start ringtail again with an auth key'
  lab_stop headscale KILL
  start_headscale
  ip -n "${LAB}c" link set wan up
  ip -n "${LAB}c" route replace default via 203.0.113.254 dev wan onlink
  check "so does one that was away meanwhile" within 40 not lab_alive node-c
  check "they are not in the network again" gone a c
  tailnet_start a
  check "until somebody starts one" within 20 tailnet_online a
  # It has the first that was free, which may be what d had.
  rm "$LAB_DIR/a.addresses"
  check "and it is reached at the address that it has now" within 20 tailnet_pings b a 1
}
gone() { not hs_id "$1" && not hs_id "$2" && hs_id b; }
