#!/usr/bin/env bash
# Whose packets are let in: three hosts on one LAN, with our coordination server; b offers itself as a router for
# all sorts of prefixes, all of them approved, and sends from where it should not.
#
#        coord 10.0.0.1
#          |
#     br0 -+-----------+
#          |           |
#       a 10.0.0.2   b 10.0.0.3
#
#   scripts/netns/admission-test.sh [--keep]
#
# Uses $RINGTAIL_BIN_DIR, target/debug by default. Needs root; without it the test is skipped aloud, or fails when
# RINGTAIL_NO_SKIP=1.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/../.." && pwd)
cd "$ROOT"
# shellcheck source=lab.sh
. scripts/netns/lab.sh
lab_or_skip
RINGTAIL=${RINGTAIL_BIN_DIR:-${CARGO_TARGET_DIR:-$ROOT/target}/debug}/ringtail
# shellcheck source=checks.sh
. scripts/netns/checks.sh
lab_init
[ "${1:-}" != --keep ] || : >"$LAB_DIR/keep"
lab_limit 300 'echo "admission-test: still running after 300 s"'

# Everything b offers to route, and the coordination server approves.
OFFERS=(0.0.0.0/0 ::/0 0.0.0.0/1 128.0.0.0/1 100.0.0.0/8 10.50.0.0/16)

lab_ns coord a b
ip -n "${LAB}coord" link add br0 type bridge
ip -n "${LAB}coord" link set br0 up
ip -n "${LAB}coord" addr add 10.0.0.1/24 dev br0
for n in a:2 b:3; do
  lab_wire coord "to_${n%:*}" "${n%:*}" eth0
  ip -n "${LAB}coord" link set "to_${n%:*}" master br0
  ip -n "$LAB${n%:*}" addr add "10.0.0.${n#*:}/24" dev eth0
done

start_coord() {
  local approve=() prefix
  for prefix in "${OFFERS[@]}"; do approve+=(--approve-route "$prefix"); done
  lab_spawn coord coord "$RINGTAIL" coord --addr 10.0.0.1:8080 --state-dir "$LAB_DIR/coord" \
    --auth-key-file "$LAB_DIR/key" "${approve[@]}"
  lab_wait_file "$LAB_DIR/key" 20
}
start_node() { # NAME OPTION...
  local name=$1
  shift
  lab_spawn "$name" "node-$name" "$RINGTAIL" up --coord http://10.0.0.1:8080 --auth-key-file "$LAB_DIR/key" \
    --state-dir "$LAB_DIR/node-$name" --hostname "$name" "$@"
}
status() { "$RINGTAIL" status --state-dir "$LAB_DIR/node-$1" "${@:2}"; }
says() { grep -qE "$2" "$LAB_DIR/$1.log"; } # LABEL PATTERN
# What a node has counted under a name, in all of its status.
count() { status "$1" --json | sed -nE "s/^ *\"$2\": ([0-9]+),?$/\1/p" | sort -n | tail -n 1; }
echoes() { lab_in a awk '/^Icmp: [0-9]/ { print $10 }' /proc/net/snmp; }

check "the coordination server starts" start_coord
# Started before there is anybody to let it in: nothing is up, nothing was lost.
lab_stop coord KILL
start_node a
check "a node that waits for coordination says so" within 20 says node-a 'waiting for coordination'
check "and that it has no network map" within 20 says node-a 'no coordination, and no network map yet'
check "and nothing else" not says node-a 'node is up|stays in force'
check "the coordination server comes back" start_coord
check "a is let in" within 20 says node-a ' registered '
start_node b --advertise-routes "$(IFS=,; echo "${OFFERS[*]}")"
check "and up" within 20 says node-a 'node is up'
check "a and b meet" within 20 lab_in a ping -qc 1 -W 1 100.64.0.2
check "and the other way" within 20 lab_in b ping -qc 1 -W 1 100.64.0.1

# from ADDRESS OPTION...: pings of b that come from it.
from() {
  local source=$1
  shift
  ip -n "${LAB}b" addr replace "$source" dev lo
  lab_in b ping -qi 0.1 -W 0.5 -I "$source" "$@" 100.64.0.1
}
# Not one of three arrives, and all three are counted by name.
spoofed() {
  local before dropped
  before=$(echoes) dropped=$(count a source_not_allowed)
  from "$1" -c 3 || true
  pause 0.2
  SAID="$(($(echoes) - before)) arrived, $(($(count a source_not_allowed) - dropped)) counted"
  [ "$SAID" = "0 arrived, 3 counted" ]
}
arrives() {
  local before
  before=$(echoes)
  from "$1" -c 3 || true
  pause 0.2
  SAID="$(($(echoes) - before)) arrived"
  [ "$SAID" = "3 arrived" ]
}
check "an exit node that nobody chose does not send from the internet" spoofed 8.8.8.8
check "nor from the other half of it" spoofed 198.51.100.7
check "nor from a's own address in the LAN" spoofed 10.0.0.9
check "nor from an address of the network that is nobody's, though it routes a wider prefix" spoofed 100.64.0.77
check "it does from beside the network's range" arrives 100.200.0.1
check "and from its subnet, and is answered" from 10.50.0.1 -c 10
no_default() { ! lab_in a ip route show table all | grep -E '^(default|0\.0\.0\.0/1|128\.0\.0\.0/1) dev ringtail0'; }
check "no default route of b's is put up" no_default
said() { status a | grep -q "0.0.0.0/0 of b is not used: no exit node is chosen"; }
check "status says what is not used, and why" said

# Who has gone is shown as offline, not as reached by relay.
lab_stop node-b KILL
offline() { status a | grep -E '^b .* offline since 20[0-9-]+T'; }
check "a node that has gone is shown as offline" within 40 offline
start_node b --advertise-routes "$(IFS=,; echo "${OFFERS[*]}")"
check "and not when it is back" within 20 not offline
check "it answers" within 20 lab_in b ping -qc 1 -W 1 100.64.0.1

# Signals that mean nothing end nothing, and the network file is read again.
printf 'addresses = ["10.7.0.1/24"]\n' >"$LAB_DIR/net.toml"
lab_spawn coord static "$RINGTAIL" up --network "$LAB_DIR/net.toml" --state-dir "$LAB_DIR/static" --listen-port 0
lab_spawn coord device "$RINGTAIL" device -f rtdev0
static_peers() { "$RINGTAIL" status --json --state-dir "$LAB_DIR/static" | grep -c '"node_key": "nodekey:0102'; }
check "a node of a static network starts" within 20 test -S "$LAB_DIR/static/ringtail.sock"
check "and a device" within 20 says device 'device is there'
signal_all() {
  local label signal
  printf '[[peer]]\nnode_key = "nodekey:0102%060d"\naddresses = ["10.7.0.2/32"]\n' 0 >>"$LAB_DIR/net.toml"
  for signal in HUP USR1 USR2 PIPE; do
    for label in node-a node-b static device coord; do kill "-$signal" "$(lab_pid "$label")"; done
    pause 0.2
  done
}
signal_all
all_alive() {
  local label
  for label in node-a node-b static device coord; do lab_alive "$label" || { echo "$label is gone"; return 1; }; done
}
check "SIGHUP, SIGUSR1, SIGUSR2 and SIGPIPE end nothing" all_alive
check "traffic goes on" lab_in b ping -qc 3 -i 0.1 -W 1 100.64.0.1
check "SIGHUP reads the network file again" within 5 static_peers
echo 'colour = 1' >>"$LAB_DIR/net.toml"
kill -HUP "$(lab_pid static)"
check "a wrong one is refused" within 5 says static 'the network stays as it was'
check "and changes nothing" static_peers

# Somebody removes all nodes: their key would let them in again, but that is for a person to decide.
lab_stop coord
rm -f "$LAB_DIR"/coord/coord.db*
check "the coordination server forgets everybody" start_coord
ended() { ! lab_alive node-b; }
check "a node that was removed ends" within 60 ended
wait "$(lab_pid node-b)" && code=0 || code=$?
check "with an exit code of its own" test "$code" = 77
last_words() { tail -n 1 "$LAB_DIR/node-b.log" | grep -q 'removed from the network.*start ringtail again with an auth key'; }
check "and last words that say what to do" last_words
check "and nobody has joined by itself" test -z "$("$RINGTAIL" coord nodes --state-dir "$LAB_DIR/coord")"

echo
echo "admission-test: $(counted ok) passed, $(counted FAIL) failed"
if [ "$(counted FAIL)" -gt 0 ]; then
  for log in node-a node-b coord; do
    echo "--- last lines of $log.log"
    tail -n 12 "$LAB_DIR/$log.log" 2>/dev/null || true
  done
  exit 1
fi
