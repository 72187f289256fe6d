# shellcheck shell=bash

# An approved subnet that has everything in it: the peers' addresses, the relay, the coordination server.
row_covered() {
  local before
  tailnet_up
  hosts a b
  lab_host r 203.0.113.21
  lab_in a sh -c 'echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter'
  before=$(host_state a)
  tailnet_tailscaled r r --advertise-routes=203.0.113.0/24,10.255.0.0/24
  tailnet_ringtail a a --accept-routes
  tailnet_ringtail b b
  ready a b r || return 0
  check "the routes are approved" within 10 hs_routes r 203.0.113.0/24,10.255.0.0/24
  check "and arrive" within 10 has_route a 203.0.113.0/24
  pause 1
  check "30 of 30 pings are answered" thirty a b
  check "directly" within 5 tailnet_direct a b
  check "coordination stays" tailnet_online a b
  check "as status says" kept_out a 10.255.0.1 203.0.113.1
  check "also after a restart with the map that was kept" restarted_pings a b
  check "directly, again" within 5 tailnet_direct a b
  check "to the router itself, too" tailnet_pings a r 1
  check "nothing is sent round in circles" sent_less a 3000000
  tailnet_stop a
  check "the host is left as it was found" same_state a "$before"
}
# kept_out NODE ADDRESS ADDRESS: these stay outside although a route covers them, among others.
kept_out() { rt "$1" status | grep "^host: outside of the tunnel although a route covers them: " | grep -w "$2" | grep -w "$3"; }
thirty() { lab_in "$1" "$BENCH" ping "$(tailnet_ip "$2")" --rate 20 --seconds 1.5 --lost-max 0; }
sent_less() { SAID=$(rt "$1" status --json | jq '[.peers[].tx_bytes] | add') && [ "$SAID" -lt "$2" ]; }
restarted_pings() { tailnet_stop "$1" && tailnet_start "$1" && within 20 tailnet_online "$1" && pause 1 && tailnet_pings "$1" "$2" 1; }
