#!/usr/bin/env bash
# Two nodes that no coordination server can tell anything, on the real binary: the internet gives one of them another
# address, and both are killed and start again behind hard NATs, with other homes than the other one believes.
#
#   scripts/netns/alone-test.sh [--keep]
#
# Topology: see story.sh. Uses $RINGTAIL_BIN_DIR, target/debug by default. Needs root; without it the test is
# skipped aloud, or fails when RINGTAIL_NO_SKIP=1.
set -euo pipefail

# shellcheck source=begin.sh
. "$(dirname "$0")/begin.sh"
lab_limit 300 'echo "alone-test: still running after 300 s"'

story_topology
# IPv6 has no NAT.
for node in a b; do ip -n "$LAB$node" -6 addr flush dev eth0 scope global; done
check "relays and coordination start" start_story_hosts
start_node a "$LAB_DIR/a.events"
start_node b "$LAB_DIR/b.events"
check "both join" tailnet_ready a b
B=$(tailnet_ip b) A=$(tailnet_ip a)
check "they are direct" eval 'tailnet_pings a b 2 && within 10 tailnet_direct a b'
lab_stop coord KILL

# The router of B gets another address, and forgets its flows. No host can see it, and the relay's connection is dead, too.
tailnet_stream b a moved
pause 1
ip -n "${LAB}inet" route add 203.0.113.14/32 dev p_rb
ip -n "${LAB}inet" rule add iif p_nyc to 203.0.113.14 lookup 101
lab_in rb sh -c 'ip addr add 203.0.113.14/32 dev wan; ip addr del 203.0.113.12/32 dev wan
  ip route replace default via 203.0.113.254 dev wan onlink'
ip -n "${LAB}inet" route del 203.0.113.12/32
moved() { [[ $(tailnet_path a b) == "direct 203.0.113.14"* ]] && [[ $(tailnet_path b a) == direct* ]]; }
check "another address of a router is found" within 5 moved
pause 1
short() { tailnet_stream_end moved && SAID="$GAP_MS ms" && [ "$GAP_MS" -le "$1" ]; }
# The goal is 1.5 s, on a machine that nobody else uses.
check "and was little to wait for" short 2500

# first NAME ADDRESS SECONDS: pings from NAME, and the time until the first answer.
first() {
  local began
  began=$(date +%s%N)
  within "$3" lab_in "$1" ping -nq -c 1 -W 0.2 "$2" || return 1
  SAID="$((($(date +%s%N) - began) / 1000000)) ms"
}
for router in ra rb; do
  lab_in $router nft 'delete table ip nat
    table ip nat { chain post { type nat hook postrouting priority srcnat; oifname "wan" masquerade fully-random; }; }'
done
# Other ports, for the routers know the flows of these.
TAILNET_OPTIONS[a]='--listen-port 41642' TAILNET_OPTIONS[b]='--listen-port 41643'
# restart HOME_A HOME_B: both are killed and start again with these homes stored, "-" for none; then one asks.
restart() {
  local node
  for node in a b; do tailnet_stop $node KILL; done
  for node in a b; do
    if [ "$1" = - ]; then rm -f "$LAB_DIR/node-$node/home.json"; else echo "$1" >"$LAB_DIR/node-$node/home.json"; fi
    shift
  done
  tailnet_start a
  tailnet_start b
}
for run in 1 2 3; do
  # A's home is nyc, 900, and B's fra, 901, and so they believe.
  for homes in "900 901" "901 901" "900 900" "901 900" "- -"; do
    # shellcheck disable=SC2086 # two words
    restart $homes
    case $run in 2) ask=b to=$A ;; *) ask=a to=$B ;; esac
    check "homes $homes, run $run: $ask has an answer soon" first $ask "$to" 4
  done
done
relayed() { [[ $(tailnet_path a b) == relay* ]] && [[ $(tailnet_path b a) == relay* ]]; }
check "and the NATs were hard: they are relayed" relayed

verdict
