# shellcheck shell=bash

# A tailnet of six, three of them tailscaled: r, the router of a LAN with p; g, a way out; and u, who uses both. They
# move to ringtail one after the other. x, y and z are ours from the beginning: one that uses routes, the router of
# another LAN with q, and another way out. w is on the Internet and says whom it sees.
row_site() {
  local name
  declare -A before=()
  tailnet_up
  hosts r g u x y z
  lab_host w 203.0.113.50
  whom w
  lab_ns p q
  lab_wire r lan p lan
  lab_wire y lan q lan
  site_lan r 192.168.77 p
  site_lan y 192.168.88 q
  # A tailscaled wants that done by hand.
  for name in r g; do lab_in $name sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'; done
  tailnet_tailscaled r r --advertise-routes=192.168.77.0/24
  tailnet_tailscaled g g --advertise-exit-node
  tailnet_tailscaled u u --accept-routes
  tailnet_ringtail x x --accept-routes
  tailnet_ringtail y y --advertise-routes 192.168.88.0/24
  tailnet_ringtail z z --advertise-exit-node
  ready r g u x y z || return 0
  hs_routes r 192.168.77.0/24
  hs_routes y 192.168.88.0/24
  for name in g z; do hs_routes $name 0.0.0.0/0,::/0; done
  within 15 ts u set --exit-node="$(tailnet_ip g)"
  check "six nodes, both LANs, a way out" within 20 site_works g
  check "a tailscaled goes out through ours as well" site_out z
  within 15 ts u set --exit-node="$(tailnet_ip g)"

  site_move r --advertise-routes 192.168.77.0/24
  hs_routes r 192.168.77.0/24
  check "the router is ringtail, and nobody misses anything" within 20 site_works g
  site_move g --advertise-exit-node
  hs_routes g 0.0.0.0/0,::/0
  within 15 ts u set --exit-node="$(tailnet_ip g)"
  check "so is the way out" within 20 site_works g
  site_move u --accept-routes --exit-node g
  check "so is who uses both" within 20 site_works g
  check "who chooses another way out while it runs" rt u set --exit-node z
  check "and goes out there" within 10 site_out_now z
  for name in r g u; do
    tailnet_stop $name
    check "$name leaves its host as it found it" same_state $name "${before[$name]}"
  done
}

# site_lan ROUTER NET HOST: the router is .1, HOST is .9 and knows no other way than its LAN.
site_lan() {
  ip -n "$LAB$1" addr add "$2.1/24" dev lan
  ip -n "$LAB$3" addr add "$2.9/24" dev lan
}
# site_move NAME OPTION...: an administrator removes the tailscaled, and a ringtail takes its place; the host is as
# without both in between.
site_move() {
  tailnet_stop "$1"
  hs_delete "$1"
  rm -rf "$LAB_DIR/node-$1" "$LAB_DIR/$1.addresses"
  lab_in "$1" sh -c 'echo 0 >/proc/sys/net/ipv4/ip_forward'
  before[$1]=$(host_state "$1")
  tailnet_ringtail "$1" "$1" "${@:2}"
  tailnet_ready "$1" x
}
# site_works EXIT: who uses routes reaches both LANs, and u the Internet by EXIT.
site_works() {
  local name lan
  for name in u x; do
    for lan in 77 88; do
      lab_in $name ping -qc 1 -W 1 "192.168.$lan.9" || return 1
    done
  done
  site_out_now "$1"
}
site_out() {
  within 15 ts u set --exit-node="$(tailnet_ip "$1")" && within 10 site_out_now "$1"
}
site_out_now() {
  local address
  address=$(ip -n "$LAB$1" -4 -o addr show dev wan | awk '{ sub("/.*", "", $4); print $4 }')
  seen u 203.0.113.50 "$address"
}
