# shellcheck shell=bash

# A routing daemon hands routes in by a kernel table, and reads ours: `ip route` stands for it.
#
#   b -- internet -- r -- 192.168.77.0/24 -- p, with 10.50.0.0/16 and 10.51.0.0/16 behind
row_handed() {
  local before
  tailnet_up
  lab_host b 203.0.113.12
  lab_host r 203.0.113.21
  lab_ns lan p
  lab_lan lan lan r=192.168.77.1/24 p=192.168.77.9/24
  ip -n "${LAB}p" addr add 10.50.0.1/32 dev lo
  ip -n "${LAB}r" route add 10.50.0.0/16 via 192.168.77.9
  ip -n "${LAB}r" route add 10.50.0.0/16 via 192.168.77.9 table 77
  # What a daemon may have there besides, and nobody else is to be sent.
  ip -n "${LAB}r" route add default via 192.168.77.9 table 77
  # And who sends everything into a tunnel of his own.
  ip -n "${LAB}r" route add 0.0.0.0/1 via 192.168.77.9 table 77
  ip -n "${LAB}r" route add 128.0.0.0/1 via 192.168.77.9 table 77
  before=$(host_state r)
  tailnet_ringtail b b --accept-routes
  tailnet_ringtail r r --advertise-routes-from 77 --advertise-routes 192.168.77.0/24
  ready b r || return 0
  check "the daemon's route is offered, beside the one by hand" within 5 handed_offers '10.50.0.0/16 192.168.77.0/24'
  hs_routes r 10.50.0.0/16,192.168.77.0/24
  check "once it is approved it is reached" within 10 tailnet_pings b 10.50.0.1 1
  check "a daemon there reads it in our table, by our protocol number" handed_read b 10.50.0.0/16
  ip -n "${LAB}r" route add blackhole 10.51.0.0/16 table 77
  check "another one is offered when it comes" within 5 handed_offers '10.50.0.0/16 10.51.0.0/16 192.168.77.0/24'
  ip -n "${LAB}r" route del 10.50.0.0/16 table 77
  check "one that goes is withdrawn" within 2 not handed_read b 10.50.0.0/16
  check "and not offered any more" handed_offers '10.51.0.0/16 192.168.77.0/24'
  ip -n "${LAB}r" route add 10.50.0.0/16 via 192.168.77.9 table 77
  check "and is back with its approval" within 5 tailnet_pings b 10.50.0.1 1
  ip -n "${LAB}r" route del 10.51.0.0/16 table 77
  tailnet_stop r
  check "the host is left as it was found, the daemon's table too" same_state r "$before"
}
handed_offers() { [ "$(hs_field r '.available_routes // [] | sort | join(" ")')" = "$1" ]; }
handed_read() { ip -n "$LAB$1" route show table 52 proto 114 | grep -q "^$2 "; }
