# shellcheck shell=bash

# Ours and tailscaled, by relay and directly.
row_meet() {
  tailnet_up
  lab_host a 203.0.113.11 2001:db8::11
  lab_host b 203.0.113.12 2001:db8::12
  tailnet_block a
  tailnet_ringtail a a
  tailnet_tailscaled b b
  ready a b || return 0
  check "ringtail has the address that Headscale gave it" [ "$(tailnet_ip a)" = "$(hs_field a '.ip_addresses[]' | grep -v :)" ]
  check "ringtail to tailscaled by relay" tailnet_pings a b 2
  check "tailscaled to ringtail by relay" tailnet_pings b a 2
  check "both say that it was by relay" relayed a b
  check "over IPv6 inside, too" lab_in a ping -6 -c 3 -i 0.2 -W 2 "$(tailnet_ip b 6)"
  tailnet_stream a b across
  tailnet_unblock a
  # tailscaled tries again every five seconds at most.
  check "both go direct when the network lets them" within 15 tailnet_direct a b
  check "nothing is lost on the way to direct" lost_at_most across 0
  check "ringtail to tailscaled directly" tailnet_pings a b 2
  check "tailscaled to ringtail directly" tailnet_pings b a 2
  check "a node that was killed and started again answers" restarted a
}
restarted() { tailnet_stop "$1" KILL && tailnet_start "$1" && within 20 tailnet_pings b "$1" 1; }
