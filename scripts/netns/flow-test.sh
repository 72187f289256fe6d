#!/usr/bin/env bash
# The whole flow between two nodes behind NATs, on the real binary: relay first, direct, blocked, fallback,
# direct again, with a file and a ping stream running across all of it; then every kind of host is killed.
#
#   scripts/netns/flow-test.sh [--bytes N] [--keep]
#
# Topology: see story.sh. Uses $RINGTAIL_BIN_DIR, target/debug by default. Needs root; without it the test is
# skipped aloud, or fails when RINGTAIL_NO_SKIP=1.
set -euo pipefail

BYTES=$((128 << 20)) KEEP=''
while [ $# -gt 0 ]; do
  case $1 in
    --bytes) BYTES=$2; shift ;;
    --keep) KEEP=1 ;;
    *) echo "usage: scripts/netns/flow-test.sh [--bytes N] [--keep]" >&2; exit 2 ;;
  esac
  shift
done
# shellcheck source=begin.sh
. "$(dirname "$0")/begin.sh" "${KEEP:+--keep}"

now_ns() { date +%s%N; }
# event NODE SECONDS EVENT [--where FIELD=VALUE]... [--since-ns T]
event() {
  local node=$1 seconds=$2
  shift 2
  "$BENCH" wait "$LAB_DIR/$node.events" "$@" --timeout "$seconds"
}
both_direct() { event a "$1" path --where state=direct --since-ns "$2" && event b "$1" path --where state=direct --since-ns "$2"; }
pings() { lab_in a "$BENCH" ping "$B" --rate 50 --seconds "$1" --lost-max "$2"; }
answers() { lab_in a "$BENCH" ping "$B" --rate 10 --seconds 0.3 --lost-max 2; }
# switches FIELD INDEX: what the ping stream saw.
switches() { "$BENCH" switches "$LAB_DIR" "$1" "$2"; }
at_most() { awk -v got="$1" -v most="$2" 'BEGIN { print got " (at most " most ")"; exit !(got != "" && got + 0 <= most) }'; }
mark() { printf '{"t_ns":%s,"node":"lab","event":"%s"}\n' "$(now_ns)" "$1" >>"$LAB_DIR/lab.events"; }

story_topology
farther() { lab_in a "$BENCH" ping 203.0.113.2 --rate 20 --seconds 1 --lost-max 0 | tee /dev/stderr | grep -qE "p50 2[0-2][0-9]{3} us"; }
check "the farther relay is 20 ms farther" within 20 farther
check "relays and coordination start" start_story_hosts
mark start
start_node a "$LAB_DIR/a.events"
start_node b "$LAB_DIR/b.events"

check "A's home is nyc" event a 30 home --where region=nyc
check "B's home is fra" event b 30 home --where region=fra
check "A learns of B and its home" event a 30 peer --where home=fra
check "B learns of A and its home" event b 30 peer --where home=nyc
check "A is connected to its home" event a 30 derp_connected --where home=true
check "B is connected to its home" event b 30 derp_connected --where home=true
B=$(peer_address a) || fail "A does not know B's address"
pause 0.5

head -c "$BYTES" /dev/urandom >"$LAB_DIR/file.in"
mark ping_start
lab_spawn a ping "$BENCH" ping "$B" --rate 100 --stop-file "$LAB_DIR/ping.stop" --events "$LAB_DIR/ping.events" \
  --out "$LAB_DIR/ping.json"
SINCE=$(now_ns)
check "the first packet from A arrives by relay" event b 30 relay_first --where dir=rx
check "both ends go direct" both_direct 30 0

# Slow enough to last across the switches, about 25 s.
RATE=$((BYTES * 8 / 25 / 1000000))
lab_spawn b receive timeout 300 "$BENCH" receive "$LAB_DIR/file.out" "$B:7001"
within 10 lab_in b grep -qi ":$(printf %04x 7001) 0*:0000 0A" /proc/net/tcp || fail "no receiver"
lab_spawn a send timeout 300 "$BENCH" send "$LAB_DIR/file.in" "$B:7001" --rate-mbps "$RATE"
pause 3
mark block
SINCE=$(now_ns)
lab_block a 2
lab_block b 1
check "A leaves the dead path" event a 30 path --where 'state=fallback|relay|probing' --since-ns "$SINCE"
check "B leaves the dead path" event b 30 path --where 'state=fallback|relay|probing' --since-ns "$SINCE"
pause 6
mark unblock
SINCE=$(now_ns)
lab_unblock a
lab_unblock b
check "both ends go direct again" both_direct 30 "$SINCE"
pause 1
: >"$LAB_DIR/ping.stop"
wait "$(lab_pid ping)" || true
mark end
check "relay to direct lost no ping" at_most "$(switches lost 0)" 0
# The goals are 0.5 s and 2 s; an unoptimised build on a machine that others use stands still for a second at times.
check "both ends direct soon after the first packet" at_most "$(switches direct_after_s 0)" 2.5
check "the blackout was short" at_most "$(switches blackout_s 1)" 3.5
check "the way back lost no ping" at_most "$(switches lost 2)" 0
# Whoever reads the log wants the figures, too.
echo "      direct after $(switches direct_after_s 0) s, blackout $(switches blackout_s 1) s, $(switches lost 1) pings lost in it"

ends() { wait "$(lab_pid "$1")" || { tail -n 3 "$LAB_DIR/$1.log"; return 1; }; }
check "the file was sent" ends send
check "the file was received" ends receive
check "the file is the same" cmp "$LAB_DIR/file.in" "$LAB_DIR/file.out"
rm -f "$LAB_DIR/file.in" "$LAB_DIR/file.out"

# A relay dies: the direct path does not care, and its clients come back to it.
SINCE=$(now_ns)
lab_stop fra KILL
check "B notices that its relay died" event b 30 derp_lost --since-ns "$SINCE"
check "the direct path goes on without the relay" pings 3 0
check "the relay starts again" start_relay fra fra 203.0.113.2 901 fra 2001:db8::2
# The other one becomes its home, over a connection that may be there already.
home_again() { rt b status --json | tr -d '[:space:]' | grep '{[^{}]*"connected":true[^{}]*"home":true' >/dev/null; }
check "B is connected to a relay again, this or the other" within 40 home_again

# Coordination dies: nothing happens to traffic, and a node that restarts meanwhile comes back.
lab_stop coord KILL
check "traffic goes on without coordination" pings 3 0
SINCE=$(now_ns)
lab_stop node-b KILL
# As if the farther relay had been its home: nobody can be told of another.
echo 900 >"$LAB_DIR/node-b/home.json"
start_node b "$LAB_DIR/b.events"
check "B restarted without coordination keeps its home" event b 30 home --where region=nyc --since-ns "$SINCE"
check "B restarted without coordination answers again" within 30 answers
check "and is direct again" event b 30 path --where state=direct --since-ns "$SINCE"
SINCE=$(now_ns)
start_coord
check "the nodes find coordination again" event a 60 netmap --since-ns "$SINCE"
check "traffic goes on" pings 2 0

# Noise at every socket: dropped and counted, and traffic goes on.
a_has_mtu() { ip -n "${LAB}a" link show ringtail0 | grep -q "mtu $1 "; }
ip -n "${LAB}a" link set ringtail0 mtu 65535
check "an MTU that fits no datagram is not kept" within 10 a_has_mtu 65475
ip -n "${LAB}a" link set ringtail0 mtu 1280
check "noise at a node's socket" lab_in ra "$BENCH" garbage --udp 192.168.1.2:41641
check "noise at the relays and at coordination" lab_in a "$BENCH" garbage --udp 203.0.113.1:3478 \
  --tcp 203.0.113.1:443 --tcp 203.0.113.2:443 --tcp 10.255.0.1:8080
noise_counted() { "$RINGTAIL" status --json --state-dir "$LAB_DIR/node-a" | grep -E '"(unknown_message|message_length|unknown_index|handshake_invalid|disco_[a-z_]*|stun_[a-z_]*)": [1-9]'; }
check "the noise was counted" noise_counted
check "traffic goes on after the noise" pings 3 0

# A node that stops tidily leaves nothing behind in its namespace.
lab_stop node-a TERM
check "a stopped node leaves no interface" not ip -n "${LAB}a" link show ringtail0
start_node a "$LAB_DIR/a.events"
check "and comes back when started again" within 20 answers

verdict
