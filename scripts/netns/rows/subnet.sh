# shellcheck shell=bash

# A LAN behind two subnet routers of ours, of which h stands by, and a tailscaled b far away. p is on the LAN alone.
#
#   b -- internet -- r, h -- 192.168.77.0/24 -- p
row_subnet() {
  local before
  tailnet_up
  lab_host b 203.0.113.12
  lab_host r 203.0.113.21
  lab_host h 203.0.113.22
  lab_ns lan p
  lab_lan lan lan r=192.168.77.1/24 h=192.168.77.2/24 p=192.168.77.9/24
  ip -n "${LAB}p" route add 100.64.0.0/10 via 192.168.77.1
  lab_in r sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
  before=$(host_state h)
  tailnet_tailscaled b b --accept-routes
  tailnet_ringtail r r --advertise-routes 192.168.77.0/24
  tailnet_ringtail h h --advertise-routes 192.168.77.0/24
  ready b r h || return 0
  tailnet_stream h 192.168.77.9 lan
  check "Headscale hears of the offer, and it is approved" within 10 hs_routes r 192.168.77.0/24
  check "tailscaled reaches the LAN through ours" within 15 tailnet_pings b 192.168.77.9 1
  hs_routes h 192.168.77.0/24
  pause 2
  check "the router reaches its LAN itself" tailnet_pings r 192.168.77.9 1
  check "so does the one that stands by" goes_by h 192.168.77.9 lan
  tailnet_stop h KILL
  check "and after a kill" goes_by h 192.168.77.9 lan
  tailnet_start h
  check "and when started again" within 20 tailnet_online h
  pause 1
  check "by its LAN, still" goes_by h 192.168.77.9 lan
  tailnet_stop h
  check "the host is left as it was found" same_state h "$before"
  lab_stop headscale
  tailnet_start h
  pause 3
  check "a start without coordination leaves the LAN alone" goes_by h 192.168.77.9 lan
  check "no ping on the LAN was lost in all this" lost_at_most lan 0
  tailnet_stop h KILL
  tailnet_start h
  pause 2
  tailnet_stop h
  check "nor does a kill leave anything once it was started again" same_state h "$before"
}
