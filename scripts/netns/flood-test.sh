#!/usr/bin/env bash
# Handshakes beside floods of handshake messages, on the real binary: somebody new has a session within six seconds,
# a peer that was heard lately and one that we go to ourselves at once.
#
#   scripts/netns/flood-test.sh [--keep]
#
#     c, n1..n6, x1, x2 (peers)  --  v (the flooded device)  --  f (the flooder, owner of 198.18.0.0/15)
#
# c was heard before each flood and is restarted while it goes on; n1 to n6 are new; x1 and x2 are peers that v goes
# to. The rate, and the number of addresses, is what a debug build can send and read; bench/flood.sh measures the rest.
#
# Uses $RINGTAIL_BIN_DIR, target/debug by default. Needs root; without it the test is skipped aloud, or fails when
# RINGTAIL_NO_SKIP=1.
set -euo pipefail

# shellcheck source=begin.sh
. "$(dirname "$0")/begin.sh"

RATE=${RATE:-30000}
PEERS="c n1 n2 n3 n4 n5 n6 x1 x2"
export RINGTAIL_DEVICE_STATE_DIR=$LAB_DIR/state LOG_LEVEL=error

# Interfaces carry the lab's number, because the directory of the sockets is the same for all namespaces.
device() { lab_spawn "$1" "$1" "$RINGTAIL" device -f "f$1$$"; }
address() { # NS ADDRESS
  ip -n "$LAB$1" addr add "$2/24" dev "f$1$$"
  ip -n "$LAB$1" link set "f$1$$" mtu 1420 up
}
# NS N: the peer of that name is 10.66.N.1 outside and 10.67.0.N inside.
configure() {
  "$BENCH" uapi --interface "f$1$$" --private-key "$(cut -d' ' -f1 "$LAB_DIR/$1.key")" --listen-port 7000 \
    --peer "$(cut -d' ' -f2 "$LAB_DIR/v.key")" --endpoint "10.66.$2.2:7000" --allowed-ip 10.67.0.1/32
  address "$1" "10.67.0.$2"
}
topology() {
  local name n=10
  lab_ns v f
  "$BENCH" wgkeys >"$LAB_DIR/v.key"
  device v
  for name in $PEERS f; do
    n=$((n + 1))
    [ "$name" = f ] || lab_ns "$name"
    lab_wire "$name" o0 v "$name"
    ip -n "$LAB$name" addr add "10.66.$n.1/24" dev o0
    ip -n "${LAB}v" addr add "10.66.$n.2/24" dev "$name"
    [ "$name" != f ] || continue
    "$BENCH" wgkeys >"$LAB_DIR/$name.key"
    device "$name"
    configure "$name" $n
    "$BENCH" uapi --interface "fv$$" --private-key "$(cut -d' ' -f1 "$LAB_DIR/v.key")" --listen-port 7000 \
      --peer "$(cut -d' ' -f2 "$LAB_DIR/$name.key")" --endpoint "10.66.$n.1:7000" --allowed-ip "10.67.0.$n/32"
    echo $n >"$LAB_DIR/$name.number"
  done
  ip -n "${LAB}f" route add local 198.18.0.0/15 dev lo
  ip -n "${LAB}v" route add 198.18.0.0/15 via "10.66.$n.1"
  FLOODED=10.66.$n.2:7000
  address v 10.67.0.1
}
flood() { # KIND SECONDS
  lab_spawn f flood "$BENCH" flood --to "$FLOODED" --rate "$RATE" --seconds "$2" --kind "$1" --sources 4096 \
    --public-key "$(cut -d' ' -f2 "$LAB_DIR/v.key")"
}
# MS NS ADDRESS: answered within so many ms.
answered() {
  local limit=$1 ns=$2 to=$3 start now
  start=$(date +%s%3N)
  until lab_in "$ns" ping -q -c 1 -W 0.2 "$to" >/dev/null; do
    now=$(date +%s%3N)
    [ $((now - start)) -lt 12000 ] || break
  done
  now=$(date +%s%3N)
  SAID="$((now - start)) ms"
  [ $((now - start)) -le "$limit" ]
}
restarted() { # MS NS
  lab_stop "$2" KILL
  device "$2"
  configure "$2" "$(cat "$LAB_DIR/$2.number")" || return 1
  answered "$1" "$2" 10.67.0.1
}
# It has been going on for a second or two.
flooding() {
  local before=$1 now
  now=$(lab_in v cat /sys/class/net/f/statistics/rx_packets)
  [ $((now - before)) -gt "$RATE" ]
}
ended() { [ "$(grep -c '"sent"' "$LAB_DIR/flood.log")" = "$1" ]; }

lab_limit 90 'echo "FAIL  the test has not ended by itself"'
check "nine peers of a device are set up" topology
check "a peer comes through while nobody floods" answered 3000 c 10.67.0.1
round=0
for kind in strangers everything; do
  round=$((round + 1))
  TITLE=$kind
  before=$(lab_in v cat /sys/class/net/f/statistics/rx_packets)
  flood $kind 10
  check "the flood begins" within 20 flooding "$before"
  news=()
  for name in "n$((round * 3 - 2))" "n$((round * 3 - 1))" "n$((round * 3))"; do
    check "$name, who is new, has a session within six seconds" answered 6500 "$name" 10.67.0.1 &
    news+=($!)
  done
  check "a peer that was heard lately has a new session at once" restarted 2500 c
  check "so has one that we go to" answered 2500 v "10.67.0.$(cat "$LAB_DIR/x$round.number")"
  wait "${news[@]}"
  check "the flood was one" within 15 ended $round
done
TITLE=

verdict
