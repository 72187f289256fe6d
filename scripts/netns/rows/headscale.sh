# shellcheck shell=bash

# What Headscale tells of others, and what happens when it is away.
row_headscale() {
  tailnet_up
  hosts a b
  tailnet_ringtail a a
  tailnet_ringtail b b
  ready a b || return 0
  check "both of ours go direct" goes_direct a b
  tailnet_stop b
  # Headscale waits 10 s for a node to come back.
  check "who leaves is told to be offline" within 20 told a b '.online == false'
  lab_stop headscale KILL
  check "a killed Headscale is noticed" within 10 not tailnet_online a
  tailnet_start b
  check "a node starts without it, by the map it kept" within 20 tailnet_pings a b 1
  check "Headscale starts again" start_headscale
  check "both come back to it" within 40 tailnet_online a b
  check "and are told to be online" within 20 tailnet_knows a b
  printf 'hskey-auth-AbCdEfGhIjKl-%064d\n' 0 >"$LAB_DIR/bad-key"
  lab_host c 203.0.113.13
  TAILNET_KEY=$LAB_DIR/bad-key tailnet_ringtail c c
  check "a wrong key ends a node" within 10 not lab_alive node-c
  check "which says why" grep -q 'invalid pre auth key' "$LAB_DIR/node-c.log"
}
