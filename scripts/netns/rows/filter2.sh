# shellcheck shell=bash

# The filter of a router under traffic. Of alice are tailscaled a and our c, of bob is our r with a LAN behind it, on
# which p is; s is alice's with its shields up. Only alice may begin.
#
#   a, c, s -- internet -- r -- 192.168.77.0/24 -- p
row_filter2() {
  local since probe=$ROOT/scripts/netns/probe.py
  tailnet_up
  lab_host a 203.0.113.11
  lab_host c 203.0.113.12
  lab_host r 203.0.113.13
  lab_host s 203.0.113.14
  lab_ns lan p
  lab_lan lan lan r=192.168.77.1/24 p=192.168.77.9/24
  ip -n "${LAB}p" route add default via 192.168.77.1
  lab_in r sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
  check "Headscale takes the policy" open_to '"udp", "dst": ["192.168.77.0/24:*"]' '"gre", "dst": ["bob@:*"]' '"sctp", "dst": ["bob@:*"]'
  tailnet_tailscaled a a --accept-routes
  tailnet_ringtail c c --accept-routes
  tailnet_ringtail s s --shields-up
  TAILNET_KEY=$LAB_DIR/bob-key tailnet_ringtail r r --advertise-routes 192.168.77.0/24
  for node in a c s r; do
    check "$node is in the network" within 40 tailnet_online "$node"
    tailnet_ip "$node" >/dev/null
  done
  check "the LAN is approved" within 20 hs_routes r 192.168.77.0/24
  check "a reaches the LAN" within 20 tailnet_pings a 192.168.77.9 1
  check "so does c" within 20 tailnet_pings c 192.168.77.9 1

  # What is told of flows that may be.
  check "a port that nobody listens at is told to be closed, through the router" lab_in c python3 "$probe" refused 192.168.77.9 7999
  ip -n "${LAB}r" link set lan mtu 1000
  check "and a packet that the LAN is too narrow for to be too big" narrow "$probe"
  ip -n "${LAB}r" link set lan mtu 1500
  check "but the LAN may begin nothing" not tailnet_pings p "$(tailnet_ip c)" 1

  # Two flows from each: one of them loses its rule.
  lab_spawn p arrivals-a python3 "$probe" arrivals 9001 "$LAB_DIR/arrivals-a"
  lab_spawn p arrivals-c python3 "$probe" arrivals 9002 "$LAB_DIR/arrivals-c"
  lab_spawn a stream-a python3 "$probe" stream 192.168.77.9 9001 "$LAB_DIR/stop"
  lab_spawn c stream-c python3 "$probe" stream 192.168.77.9 9002 "$LAB_DIR/stop"
  check "a datagram flow of a arrives behind the router" within 10 arrives a
  check "so does one of c" within 10 arrives c
  spoken 47 deadbeef && spoken 132 1b581b580000000000000000
  check "GRE, which a rule names" lab_in r python3 "$probe" hears 47 "$(tailnet_ip a)"
  check "and SCTP" lab_in r python3 "$probe" hears 132 "$(tailnet_ip a)"
  tailnet_stream a r kept-a
  tailnet_stream c r kept-c
  pause 1
  check "Headscale takes another policy" open_to '"udp", "dst": ["192.168.77.0/24:9002"]' '"icmp", "dst": ["bob@:*"]'
  since=$(date +%s%3N)
  pause 3
  check "a's flow is cut within a second" cut_within a "$since" 1000
  check "c's goes on" arrives c
  check "GRE is cut" not lab_in r python3 "$probe" hears 47 "$(tailnet_ip a)"
  check "and SCTP" not lab_in r python3 "$probe" hears 132 "$(tailnet_ip a)"
  check "and the rest of it" open_to '"icmp", "dst": ["bob@:*"]'
  since=$(date +%s%3N)
  pause 3
  check "c's flow is cut within a second" cut_within c "$since" 1000
  : >"$LAB_DIR/stop"
  check "what was allowed all the time lost nothing, from a" lost_at_most kept-a 0
  check "nor from c" lost_at_most kept-c 0
  check "what was denied is counted" denied r

  check "behind shields a node reaches others" tailnet_pings s r 1
  lab_spawn s listen7000 python3 -m http.server 7000
  check "and nobody reaches it, though the policy allows it" shielded
  check "while another of the same owner is reached" tailnet_pings a c 1
  check "until that one is set behind shields too, as it runs" rt c set --shields-up
  check "which counts within a second" within 1 not tailnet_pings a c 1
  check "though not for what it begins itself" tailnet_pings c r 1
  check "and they come down again" rt c set --shields-up=false
  check "as fast" within 1 tailnet_pings a c 1
}
# open_to PROTOCOL_AND_DESTINATION...: alice may, and may reach her own nodes by everything; and nobody else.
open_to() {
  local rules='{"action": "accept", "src": ["alice@"], "dst": ["alice@:*"]}, {"action": "accept", "proto": "icmp", "src": ["alice@"], "dst": ["bob@:*", "192.168.77.0/24:*"]}' rule
  for rule in "$@"; do
    rules+=', {"action": "accept", "src": ["alice@"], "proto": '"$rule"'}'
  done
  hs_policy <<<"{\"acls\": [$rules]}"
}
arrives() { # NODE: now?
  local before
  before=$(wc -l <"$LAB_DIR/arrivals-$1") && pause 0.5 && [ "$(wc -l <"$LAB_DIR/arrivals-$1")" -gt "$before" ]
}
cut_within() { # NODE SINCE_MS MS
  SAID="after $(($(tail -n 1 "$LAB_DIR/arrivals-$1") - $2)) ms"
  [ $(($(tail -n 1 "$LAB_DIR/arrivals-$1") - $2)) -le "$3" ]
}
# spoken PROTOCOL HEX: from a to r, in the background, for as long as the row needs it.
spoken() {
  # shellcheck disable=SC2016 # for the other shell
  lab_spawn a "spoken-$1" sh -c 'while :; do python3 "$@"; done' sh "$ROOT/scripts/netns/probe.py" raw "$1" "$(tailnet_ip r)" "$2"
}
narrow() {
  SAID="to carry $(lab_in c python3 "$1" path_mtu 192.168.77.9 9009 1200)" && [ "$SAID" = "to carry 1000" ]
}
shielded() {
  not tailnet_pings a s 1 && not connects a s 7000 && ts a ping --c 1 --tsmp "$(tailnet_ip s)"
}
