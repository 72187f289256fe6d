# shellcheck shell=bash

# A router with everything that a node changes of its host: rules before those of a firewall that drops, forwarding, the
# resolver, routes that others were told of. It is killed, and nobody starts it again.
#
#   b -- internet -- r -- 192.168.77.0/24 -- p
row_killed() {
  local before
  HS_DNS='{magic_dns: true, override_local_dns: false, base_domain: lab.example, nameservers: {global: []}}'
  tailnet_up
  lab_host b 203.0.113.12
  lab_host r 203.0.113.21
  lab_ns p
  lab_wire r lan p lan
  ip -n "${LAB}r" addr add 192.168.77.1/24 dev lan
  ip -n "${LAB}p" addr add 192.168.77.9/24 dev lan
  lab_in r nft -f - <<'NFT'
table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }
NFT
  before=$(host_state r)
  tailnet_ringtail b b --accept-routes
  tailnet_ringtail r r --advertise-routes 192.168.77.0/24
  ready b r || return 0
  check "the route is approved" within 10 hs_routes r 192.168.77.0/24
  check "the router is one" within 15 tailnet_pings b 192.168.77.9 0.5
  check "and its host asks it for names" within 10 killed_asks r
  check "it is called otherwise from now on" rt r set --hostname renamed
  check "which Headscale hears" within 5 hs_id renamed
  tailnet_stop r KILL
  check "two seconds after a kill the host is as it was" within 2 same_state r "$before"
  check "and nobody is sent there" within 2 killed_withdrawn renamed
  check "it has the name that it had" hs_id renamed
  check "its keeper has ended" within 5 not killed_keeper r
  tailnet_start r
  check "started again it is a router again" within 20 tailnet_pings b 192.168.77.9 0.5
  check "a keeper that is killed is replaced" killed_replaced r
  check "and the host is asking it still" killed_asks r
  kill -KILL "$(killed_keeper r)"
  tailnet_stop r KILL
  pause 1
  check "with both killed it is not as it was" not same_state r "$before"
  # As a service manager does it; with the node's own view of /etc.
  lab_spawn r node-r "$RINGTAIL" restore --state-dir "$LAB_DIR/node-r"
  check "then ringtail restore puts it back" wait "$(lab_pid node-r)"
  check "all of it" same_state r "$before"
  check "and nobody is sent there" within 2 killed_withdrawn r
  # What a run with another table left, of which nothing else is there.
  lab_in r nft 'insert rule ip filter FORWARD iifname "gone0" accept comment "ringtail-57 in"'
  tailnet_start r
  check "it can be started after that" within 20 tailnet_pings b 192.168.77.9 0.5
  tailnet_stop r
  check "and leaves nothing, also of an earlier run" same_state r "$before"
}
killed_asks() { grep -q '^nameserver 100.100.100.100' "$LAB_DIR/node-$1.etc/upper/resolv.conf"; }
killed_withdrawn() { hs_field "$1" '.available_routes // [] | length == 0'; }
killed_keeper() { pgrep -f "^ringtail keeper --state-dir $LAB_DIR/node-$1\$"; }
killed_replaced() {
  local first
  first=$(killed_keeper "$1") || return 1
  kill -KILL "$first"
  within 10 killed_other "$1" "$first"
}
killed_other() { local now; now=$(killed_keeper "$1") && [ "$now" != "$2" ]; }
