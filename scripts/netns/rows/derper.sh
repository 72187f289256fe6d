# shellcheck shell=bash

# derper carries all of it: ours to ours, and tailscaled to and from ours.
row_derper() {
  tailnet_internet
  check "derper and Headscale start" derper_and_headscale || return 0
  hosts a b c
  tailnet_block a
  tailnet_ringtail a a
  tailnet_tailscaled b b
  tailnet_ringtail c c
  ready a b c || return 0
  check "ringtail to tailscaled through derper" tailnet_pings a b 2
  check "tailscaled to ringtail through derper" tailnet_pings b a 2
  check "ringtail to ringtail through derper" tailnet_pings a c 2
  check "all of that was by the relay" relayed_to own
  lab_stop relay KILL
  check "a derper that was killed and started again" start_derper relay relay 203.0.113.1 900 own
  # tailscaled waits longer and longer.
  check "is used again by ours" within 10 tailnet_pings a c 1
  check "and by tailscaled" within 30 tailnet_pings a b 1
  check "a derper with the pinned certificate is used" within 5 static_uses "$LAB_DIR/derp-map.json"
  sed 's/\(sha256-raw:\).*"/\1'"$(printf '%064d' 0)"'"/' "$LAB_DIR/derp-map.json" >"$LAB_DIR/wrong-map.json"
  check "one with another certificate is refused" static_refuses "$LAB_DIR/wrong-map.json"
}
derper_and_headscale() { start_derper relay relay 203.0.113.1 900 own && make_derp_map relay && start_headscale; }
static_uses() { static_node "$1" && within 5 relay_says .connected; }
static_refuses() { static_node "$1" && within 5 relay_says '.failures > 1' && relay_says '.connected | not'; }
