#!/usr/bin/env bash
# Whose packets are let in: three hosts on one LAN, with our coordination server; b offers itself as a router for
# all sorts of prefixes, all of them approved, and sends from where it should not. In the end an administrator lets
# its key expire, and removes it.
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

# shellcheck source=begin.sh
. "$(dirname "$0")/begin.sh"
lab_limit 300 'echo "admission-test: still running after 300 s"'

# Everything b offers to route, as an exit node the first two, and an administrator approves.
OFFERS=(0.0.0.0/0 ::/0 0.0.0.0/1 128.0.0.0/1 100.0.0.0/8 10.50.0.0/16)

lab_ns coord a b
lab_lan coord eth0 a=10.0.0.2/24 b=10.0.0.3/24
ip -n "${LAB}coord" addr add 10.0.0.1/24 dev br0

start_coord() {
  lab_spawn coord coord "$RINGTAIL" coord --addr 10.0.0.1:8080 --state-dir "$LAB_DIR/coord" \
    --auth-key-file "$LAB_DIR/key"
  lab_wait_file "$LAB_DIR/key" 20
}
start_node() { # NAME OPTION...
  local name=$1
  shift
  lab_spawn "$name" "node-$name" "$RINGTAIL" up --coord http://10.0.0.1:8080 --auth-key-file "$LAB_DIR/key" \
    --state-dir "$LAB_DIR/node-$name" --hostname "$name" "$@"
}
admin() { "$RINGTAIL" coord "$@" --state-dir "$LAB_DIR/coord"; }
status() { "$RINGTAIL" status --state-dir "$LAB_DIR/node-$1" "${@:2}"; }
says() { grep -qE "$2" "$LAB_DIR/$1.log"; } # LABEL PATTERN
# What a node has counted under a name, in all of its status.
count() { status "$1" --json | sed -nE "s/^ *\"$2\": ([0-9]+),?$/\1/p" | sort -n | tail -n 1; }
echoes() { lab_in a awk '/^Icmp: [0-9]/ { print $10 }' /proc/net/snmp; }

check "the coordination server starts" start_coord
# Started before there is anybody to let it in: nothing is up, nothing was lost.
lab_stop coord KILL
start_node a --accept-routes
check "a node that waits for coordination says so" within 20 says node-a 'waiting for coordination'
check "and that it has no network map" within 20 says node-a 'no coordination, and no network map yet'
check "and nothing else" not says node-a 'node is up|stays in force'
check "the coordination server comes back" start_coord
check "a is let in" within 20 says node-a ' registered '
start_b() { start_node b --advertise-exit-node --advertise-routes "$(IFS=,; echo "${OFFERS[*]:2}")"; }
start_b
check "and up" within 20 says node-a 'node is up'
check "a and b meet" within 20 lab_in a ping -qc 1 -W 1 100.64.0.2
check "and the other way" within 20 lab_in b ping -qc 1 -W 1 100.64.0.1
not_approved() { [ "$(admin routes | grep -c '^2  b  .*  not approved')" = ${#OFFERS[@]} ]; }
check "what b offers is not approved by itself" within 5 not_approved
check "an administrator approves it" admin routes approve b "$(IFS=,; echo "${OFFERS[*]}")"
has_route() { ip -n "${LAB}a" route show table all | grep '^10.50.0.0/16 dev ringtail0'; }
check "and a has the route" within 5 has_route

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
start_b
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

# An administrator lets b's key expire: a has it no more, it has nobody, and with its auth key it is back as it was.
check "b's key is made to expire" admin nodes expire b
expired_at_a() { status a | grep -E '^b .*key expired at 20'; }
check "a shows so" within 3 expired_at_a
check "and has its route no more" within 3 not has_route
check "b gets no answer" not lab_in b ping -qc 2 -i 0.2 -W 0.5 100.64.0.1
expired_at_b() { # with nobody else
  local code=0
  status b >"$LAB_DIR/said" || code=$?
  [ "$code" = 77 ] && grep -q 'problem: this node.s key expired at 20' "$LAB_DIR/said" && not grep -q '^a ' "$LAB_DIR/said"
}
check "its status says so, with an exit code, and has nobody" within 3 expired_at_b
lab_stop node-b
start_b
check "a start with an auth key brings it back as it was" within 20 lab_in a ping -qc 1 -W 1 100.64.0.2
check "with its route" within 5 has_route

# It is deleted: it ends at once, and what comes again by its auth key is another node.
ended() { ! lab_alive node-b; }
check "b is deleted" admin nodes delete b
check "it ends at once" within 3 ended
wait "$(lab_pid node-b)" && code=0 || code=$?
check "with the exit code of who is not let in" test "$code" = 77
unknown_at_a() { not grep -q '^b ' <(status a); }
check "a knows it no more" within 3 unknown_at_a
check "nor its route" not has_route
start_b
check "its auth key lets it in again, at another address" within 20 lab_in a ping -qc 1 -W 1 100.64.0.3
check "without what was approved for b" not has_route

# Somebody removes all nodes: their key would let them in again, but that is for a person to decide.
lab_stop coord
rm -f "$LAB_DIR"/coord/coord.db*
check "the coordination server forgets everybody" start_coord
check "a node that was removed ends" within 60 ended
wait "$(lab_pid node-b)" && code=0 || code=$?
check "with an exit code of its own" test "$code" = 77
last_words() { tail -n 1 "$LAB_DIR/node-b.log" | grep -q 'removed from the network.*start ringtail again with an auth key'; }
check "and last words that say what to do" last_words
check "and nobody has joined by itself" test -z "$(admin nodes)"

verdict
