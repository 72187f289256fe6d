# shellcheck shell=bash

# Two routers of ours for one LAN, r in force and h standing by, as Headscale arranges it; b and the tailscaled t use
# them. p is on the LAN alone.
#
#   b, t -- internet -- r, h -- 192.168.77.0/24 -- p
ha_up() {
  tailnet_up
  lab_host b 203.0.113.12
  lab_host t 203.0.113.13
  lab_host r 203.0.113.21
  lab_host h 203.0.113.22
  lab_ns lan p
  lab_lan lan lan r=192.168.77.1/24 h=192.168.77.2/24 p=192.168.77.9/24
  tailnet_ringtail b b --accept-routes
  tailnet_tailscaled t t --accept-routes
  tailnet_ringtail r r --advertise-routes 192.168.77.0/24
  tailnet_ringtail h h --advertise-routes 192.168.77.0/24
  ready b t r h || return 1
  check "the offer of the first is approved" within 10 hs_routes r 192.168.77.0/24
  check "it is the router" within 10 ha_router r
  check "the offer of the second is approved" within 10 hs_routes h 192.168.77.0/24
  check "both reach the LAN" within 15 ha_both_reach
  # Each knows the way to the one that stands by.
  pause 3
  check "which is still not the router" ha_router r
}

# The one in force is killed, and the other stopped.
row_ha() {
  ha_up || return 0
  ha_begin
  tailnet_stop r KILL
  check "after a kill of the one the other is the router" within 5 ha_router h
  ha_end "a kill"
  check "its keeper has said so, and ended" within 5 ha_keeper_said r
  tailnet_start r
  check "the killed one is back" within 20 tailnet_online r
  ha_begin
  pause 4
  check "and stands by" ha_router h
  ha_quiet "its return"

  ha_begin
  tailnet_stop h
  check "when the other is stopped the one is the router" within 5 ha_router r
  ha_end "a stop"
}

# The one in force loses its LAN, and the other the cable to it.
row_ha_lan() {
  ha_up || return 0
  ha_begin
  ip -n "${LAB}r" link set lan down
  check "when its LAN is down the other is the router" within 5 ha_router h
  ha_end "the loss of the LAN"
  check "status says why" within 2 problem r '192.168.77.0/24 is not announced'
  ip -n "${LAB}r" link set lan up
  check "when it is up again status says no more" within 10 no_problem r 'is not announced'
  ha_begin
  pause 3
  check "and it stands by" ha_router h
  ha_quiet "its return"

  ha_begin
  # The cable of h at the switch.
  ip -n "${LAB}lan" link set l_h down
  check "when its cable is pulled the one is the router" within 5 ha_router r
  ha_end "the pulled cable"
  for _ in 1 2 3 4 5; do
    ip -n "${LAB}lan" link set l_h up
    pause 0.3
    ip -n "${LAB}lan" link set l_h down
    pause 0.3
  done
  ip -n "${LAB}lan" link set l_h up
  ha_begin
  pause 6
  check "a cable that flaps moves nothing" ha_router r
  ha_quiet "it"
}

# Whom the users of the LAN are sent to.
ha_router() {
  [ "$(rt b status --json 2>/dev/null | jq -r '.peers[] | select(.allowed_ips | index("192.168.77.0/24")) | .name')" = "$1" ]
}
ha_both_reach() { tailnet_pings b 192.168.77.9 0.5 && tailnet_pings t 192.168.77.9 0.5; }
ha_keeper_said() { grep -q 'knows that no routes lead here' "$LAB_DIR/node-$1.log"; }
ha_begin() {
  tailnet_stream b 192.168.77.9 ha-b
  tailnet_stream t 192.168.77.9 ha-t
  pause 1
}
# ha_end EVENT: both had answers again within a second.
ha_end() {
  pause 2
  check "ringtail is without an answer for a second at most around $1" ha_silence ha-b 1000
  check "so is tailscaled" ha_silence ha-t 1000
}
ha_quiet() {
  check "ringtail lost nothing by $1" lost_at_most ha-b 0
  check "nor did tailscaled" lost_at_most ha-t 0
}
ha_silence() {
  tailnet_stream_end "$1" && SAID="$LOST of $SENT lost, silence ${GAP_MS} ms"
  [ "$GAP_MS" -le "$2" ]
}
