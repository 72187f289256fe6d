# shellcheck shell=bash

# Exit nodes of both kinds are approved, and nobody chose them.
row_exit() {
  tailnet_up
  hosts a b c
  tailnet_ringtail a a --accept-routes
  tailnet_tailscaled b b --advertise-exit-node
  tailnet_ringtail c c --advertise-exit-node --advertise-routes 10.66.0.0/16
  ready a b c || return 0
  hs_routes b 0.0.0.0/0,::/0
  hs_routes c 0.0.0.0/0,::/0,10.66.0.0/16
  check "status says of both that they are not used" within 10 not_used 2
  check "a and the exit node b go direct" goes_direct a b
  check "a and the exit node c go direct" goes_direct a c
  ip -n "${LAB}b" addr add 198.18.0.1/32 dev lo
  check "an exit node that is a tailscaled does not send from the internet" spoofed b 198.18.0.1
  ip -n "${LAB}c" addr add 198.18.0.1/32 dev lo
  check "nor one that is ours" spoofed c 198.18.0.1
  ip -n "${LAB}c" addr add 10.66.0.1/32 dev lo
  check "its subnet's addresses it may send from" lab_in c ping -qc 3 -i 0.2 -W 2 -I 10.66.0.1 "$(tailnet_ip a)"
}
not_used() { [ "$(rt a status | grep -c '0.0.0.0/0 of .* is not used: no exit node is chosen')" = "$1" ]; }
# Of three pings none is taken, and all are counted.
spoofed() {
  local before dropped
  before=$(echoes) dropped=$(rt a status --json | jq .drops.source_not_allowed)
  lab_in "$1" ping -qc 3 -i 0.2 -W 1 -I "$2" "$(tailnet_ip a)" || true
  SAID="$(($(echoes) - before)) arrived, $(($(rt a status --json | jq .drops.source_not_allowed) - dropped)) counted"
  [ "$SAID" = "0 arrived, 3 counted" ]
}
echoes() { lab_in a awk '/^Icmp: [0-9]/ { print $10 }' /proc/net/snmp; }
