# shellcheck shell=bash

# Routes of a tailscaled r and of an s of ours, of which s has a part of what r has, and an IPv4 network behind IPv6
# (4via6). a uses them when somebody wants it to.
row_accept() {
  local via=fd7a:115c:a1e0:b1a:0:7:a01:0
  tailnet_up
  hosts a r s
  ip -n "${LAB}r" addr add 10.20.8.1/32 dev lo
  for address in 10.20.7.1/32 "${via%0}100/128"; do ip -n "${LAB}s" addr add "$address" dev lo; done
  tailnet_tailscaled r r --advertise-routes=10.20.0.0/16
  tailnet_ringtail s s --advertise-routes "10.20.7.0/24,$via/112"
  tailnet_ringtail a a
  ready a r s || return 0
  check "the routes are approved" within 10 hs_routes r 10.20.0.0/16
  check "those of ours too" within 10 hs_routes s "10.20.7.0/24,$via/112"
  check "status says that routes are not used, and how they are" within 10 problem a '3 routes of other nodes .*--accept-routes'
  check "the host has none of them" not table_has a 10.20
  check "nor may what comes from there come in" not_from s 10.20.7.1
  check "from the router itself it may" tailnet_pings s a 1
  tailnet_stream a s steady
  check "somebody wants them" rt a set --accept-routes
  check "the host has them" within 2 table_has a 10.20.7.0/24
  check "one of two routers is reached" tailnet_pings a 10.20.8.1 1
  check "and the one with the longer prefix for its part" tailnet_pings a 10.20.7.1 1
  check "what comes from there may come in" not not_from s 10.20.7.1
  check "an IPv4 network behind IPv6 is reached" lab_in a ping -6 -qc 2 -i 0.2 -W 2 "${via%0}100"
  check "nobody wants them any more" rt a set --accept-routes=false
  check "the host has none again" within 2 not table_has a 10.20
  check "nor may what comes from there come in" not_from s 10.20.7.1
  check "no other traffic was lost in this" lost_at_most steady 0
  tailnet_stop a
  tailnet_options a --accept-routes
  tailnet_start a
  check "wanted from the start they are used, too" within 20 tailnet_pings a 10.20.7.1 1
}
table_has() { ip -n "$LAB$1" route show table 52 | grep "^$2"; }
# not_from NODE ADDRESS: of three pings of a from there none is answered.
not_from() { not lab_in "$1" ping -qc 3 -i 0.2 -W 1 -I "$2" "$(tailnet_ip a)"; }
