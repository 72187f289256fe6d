#!/usr/bin/env bash
# What stands between a node and its relays and peers when the host's surroundings are odd, on the real binary: relays
# known by name, DNS that comes late, relays that move, routes that change all the time.
#
#   scripts/netns/reach-test.sh [--keep]
#
#   dns 203.0.113.53 ----- inet ----- relay 203.0.113.1, 2001:db8::1
#         2001:db8::53     /  \  \--- moved 203.0.113.2
#                        ra   six     2001:db8::66 alone
#           192.168.1.2  a
#
# Uses $RINGTAIL_BIN_DIR, target/debug by default. Needs root; without it the test is skipped aloud, or fails when
# RINGTAIL_NO_SKIP=1.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/../.." && pwd)
cd "$ROOT"
# shellcheck source=lab.sh
. scripts/netns/lab.sh
lab_or_skip

BIN=${RINGTAIL_BIN_DIR:-${CARGO_TARGET_DIR:-$ROOT/target}/debug}
RINGTAIL=$BIN/ringtail BENCH=$BIN/ringtail-bench
# shellcheck source=checks.sh
. scripts/netns/checks.sh
lab_init
[ "${1:-}" != --keep ] || : >"$LAB_DIR/keep"

# resolver NAME ADDRESS...: the DNS servers of a namespace, which `ip netns exec` puts in place and the lab takes away.
resolver() {
  local name=$1 address
  shift
  mkdir -p "/etc/netns/$LAB$name"
  for address in "$@"; do echo "nameserver $address"; done >"/etc/netns/$LAB$name/resolv.conf"
}
# relay NAME: the relay "relay.lab" in that namespace, the same wherever it runs.
relay() {
  lab_spawn "$1" relay "$RINGTAIL" derp --hostname relay.lab --addr '[::]:443' --state-dir "$LAB_DIR/relay" \
    --region-id 900 --region-code lab
  lab_wait_file "$LAB_DIR/relay/derp-node.json" 20
}
# network NAME ADDRESS [PEER ADDRESS ...]: a static network file, with the relays of map-NAME.json.
network() {
  local name=$1 peer keys
  mkdir -p "$LAB_DIR/$name"
  {
    printf 'addresses = ["%s/32"]\nhome = "lab"\nderp_map = "../map-%s.json"\n' "$2" "$name"
    shift 2
    while [ $# -gt 0 ]; do
      peer=$1
      keys=$("$RINGTAIL" genkey --state-dir "$LAB_DIR/$peer" | grep -E '^(node|disco)_key')
      printf '[[peer]]\nname = "%s"\n%s\nhome = "lab"\naddresses = ["%s/32"]\n' "$peer" "$keys" "$2"
      shift 2
    done
  } >"$LAB_DIR/$name/network.toml"
}
up() {
  lab_spawn "$1" "node-$1" "$RINGTAIL" up --network "$LAB_DIR/$1/network.toml" --state-dir "$LAB_DIR/$1" \
    --events "$LAB_DIR/$1.events" --hostname "$@"
}
# node NAME COMMAND...: asks it.
node() { "$RINGTAIL" "$2" --state-dir "$LAB_DIR/$1" "${@:3}"; }
says() { local node=$1 text=$2; shift 2; node "$node" "$@" | tee /dev/stderr | grep -qF "$text"; }
endpoint() { node "$1" status --json | "$BENCH" pick /endpoints | tee /dev/stderr | grep -qF "$2"; }
event() { "$BENCH" wait "$LAB_DIR/$1.events" "${@:3}" --timeout "$2"; }

lab_internet
lab_host dns 203.0.113.53 2001:db8::53
lab_host relay 203.0.113.1 2001:db8::1
lab_host moved 203.0.113.2
lab_host six 203.0.113.66 2001:db8::66
ip -n "${LAB}six" addr del 203.0.113.66/32 dev wan
lab_home a 1
resolver six 2001:db8::53
resolver a 203.0.113.53
printf 'relay.lab 203.0.113.1\nrelay.lab 2001:db8::1\n' >"$LAB_DIR/zone"
dns() {
  lab_spawn dns dns4 scripts/netns/dns.pl 203.0.113.53 "$LAB_DIR/zone"
  lab_spawn dns dns6 scripts/netns/dns.pl 2001:db8::53 "$LAB_DIR/zone"
}

check "the relay starts" relay relay
"$BENCH" derp-map "$LAB_DIR/relay" >"$LAB_DIR/map-a.json"
sed 's/"HostName"/"IPv4": "203.0.113.1", "HostName"/' "$LAB_DIR/map-a.json" >"$LAB_DIR/map-six.json"
network a 10.99.0.1
network six 10.99.0.2

# A resolver that is not there, then one that says nothing.
up a
check "without DNS netcheck says that names do not resolve" within 5 says a 'do not resolve: relay.lab' netcheck
check "and not that UDP is blocked" says a 'UDP works: unknown' netcheck
lab_in dns nft 'table ip mute { chain in { type filter hook input priority 0; udp dport 53 drop; }; }'
pause 4
dns
lab_in dns nft delete table ip mute
check "a public endpoint 10 s after DNS works" within 10 endpoint a 203.0.113.11:
check "and the relay is connected" within 10 event a 1 derp_connected

# The relay moves, with its name.
lab_stop relay
relay moved
printf 'relay.lab 203.0.113.2\n' >"$LAB_DIR/zone"
check "UDP works again 60 s after the relay's name moved" within 60 says a 'UDP works: true' netcheck
check "through the new address" within 10 says a 203.0.113.2 status --json
lab_stop relay
relay relay
printf 'relay.lab 203.0.113.1\nrelay.lab 2001:db8::1\n' >"$LAB_DIR/zone"

# A relay with an IPv4 address in the map and IPv6 by its name, and a host without IPv4.
up six
check "a host without IPv4 reaches a relay that the map gives an IPv4 address" event six 5 derp_connected
check "and asks it by STUN" within 5 says six 'public address [2001:db8::66]' netcheck
lab_stop node-six

# A host whose routes never rest, and whose default route moves: to the same router, by another address.
lab_in a ip addr add 192.168.1.3/24 dev eth0
lab_spawn a restless bash -c 'while :; do
  ip route add 198.18.0.0/24 dev lo; sleep 0.05; ip route del 198.18.0.0/24 dev lo; sleep 0.05
done'
pause 2
lab_in a ip route replace default via 192.168.1.1 src 192.168.1.3
major() { grep -q 'network changed change=Major' "$LAB_DIR/node-a.log"; }
check "a host whose routes change all the time notices that its default route moved" within 4 major
lab_stop restless
lab_stop node-a

echo
echo "reach-test: $(counted ok) passed, $(counted FAIL) failed"
if [ "$(counted FAIL)" -gt 0 ]; then
  for log in "$LAB_DIR"/*.log; do
    echo "--- last lines of $(basename "$log")"
    tail -n 12 "$log"
  done
  exit 1
fi
