# shellcheck shell=bash

# `ringtail coord` and our relay, with two tailscaled and one of ours.
row_ourserver() {
  tailnet_internet
  check "relay and server start" our_server || return 0
  hosts a b c
  tailnet_block a
  tailnet_tailscaled a a
  tailnet_tailscaled b b
  tailnet_ringtail c c
  ready a b c || return 0
  check "tailscaled to tailscaled through our relay" tailnet_pings a b 2
  check "and to ours" tailnet_pings a c 2
  check "all of that was by the relay" relayed_to own
  check "tailscaled measures our relay by STUN, and calls it the nearest" measured a
  lab_stop coord KILL
  check "the nodes go on without a server" tailnet_pings a c 1
  check "the server starts again" start_coord
  lab_host d 203.0.113.14
  tailnet_ringtail d d
  check "the others are back at it, and hear of a new node" within 30 all_know d
  check "an administrator lets a tailscaled's key expire" ours nodes expire a
  check "it asks for a login at once" within 5 asks_for_login a
  check "and the others have it as expired" within 3 shows c a 'key expired at 20'
  check "with an auth key it is back as it was" back_as_it_was a
  check "an administrator deletes it" ours nodes delete a
  check "it asks for a login at once, again" within 5 asks_for_login a
  check "ringtail has it no more" within 3 not knows c a
  check "nor has tailscaled" within 3 not knows b a
  check "the log-out of a tailscaled is told" logged_out b
  check "no log of ours holds the key" not grep -qF -f "$LAB_DIR/auth-key" "$LAB_DIR"/{coord,relay,node-c,node-d}.log
}
back_as_it_was() {
  ts "$1" up --login-server="$COORD_URL" --auth-key="file:$LAB_DIR/auth-key" --hostname="$1" --timeout=20s --accept-dns=false &&
    within 10 tailnet_pings c "$1" 1
}
measured() {
  ts "$1" netcheck 2>/dev/null | tee "$LAB_DIR/netcheck"
  grep -q 'UDP: true' "$LAB_DIR/netcheck" && grep -q 'Nearest DERP: own' "$LAB_DIR/netcheck"
}
all_know() { tailnet_knows a "$1" && tailnet_knows b "$1" && tailnet_knows c "$1"; }
logged_out() { ts "$1" logout && within 10 not tailnet_knows c "$1"; }
