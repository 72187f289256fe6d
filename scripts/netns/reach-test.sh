#!/usr/bin/env bash
# What stands between a node and its relays and peers when the host's surroundings are odd, on the real binary: relays
# known by name, DNS that comes late, relays that move, routes that change all the time, two
# uplinks, a copied state directory.
#
#   scripts/netns/reach-test.sh [--keep] [PART...]      all of: names restless uplinks twins
#
#   dns 203.0.113.53 ----- inet ----- relay 203.0.113.1, 2001:db8::1
#         2001:db8::53     /  \  \--- moved 203.0.113.2
#                        ra   six     2001:db8::66 alone
#           192.168.1.2  a
#
# and below, a host with two uplinks.
#
# Uses $RINGTAIL_BIN_DIR, target/debug by default. Needs root; without it the test is skipped aloud, or fails when
# RINGTAIL_NO_SKIP=1.
set -euo pipefail

# shellcheck source=begin.sh
. "$(dirname "$0")/begin.sh"
[ "${1:-}" != --keep ] || shift

# resolver NAME ADDRESS...: the DNS servers of what is spawned in a namespace.
resolver() { printf 'nameserver %s\n' "${@:2}" >"$LAB_DIR/$1.resolv.conf"; }
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
says() { local node=$1 text=$2; shift 2; node "$node" "$@" | tee /dev/stderr | grep -F "$text" >/dev/null; }
endpoint() { node "$1" status --json | "$BENCH" pick /endpoints | tee /dev/stderr | grep -F "$2" >/dev/null; }
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
names() {
  local mute='table ip mute { chain in { type filter hook input priority 0; udp dport 53 drop; }; }'
  up a
  check "without DNS netcheck says that names do not resolve" within 5 says a 'do not resolve: relay.lab' netcheck
  check "and not that UDP is blocked" says a 'UDP works: unknown' netcheck
  lab_in dns nft "$mute"
  pause 4
  dns
  lab_in dns nft delete table ip mute
  check "a public endpoint 10 s after DNS works" within 10 endpoint a 203.0.113.11:
  check "and the relay is connected" within 10 event a 1 derp_connected

  # Silent from the start, and longer than the first look-up lasts.
  lab_stop node-a
  lab_in dns nft "$mute"
  up a
  pause 16
  check "while DNS is silent there is no public endpoint" not endpoint a 203.0.113.11:
  lab_in dns nft delete table ip mute
  check "a public endpoint 10 s after it answers" within 10 endpoint a 203.0.113.11:

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
  lab_stop node-a
}

# A host whose routes never rest, and whose default route moves: to the same router, by another address.
restless() {
  up a
  lab_in a ip addr add 192.168.1.3/24 dev eth0
  lab_spawn a restless bash -c 'while :; do
    ip route add 198.18.0.0/24 dev lo; sleep 0.05; ip route del 198.18.0.0/24 dev lo; sleep 0.05
  done'
  pause 2
  lab_in a ip route replace default via 192.168.1.1 src 192.168.1.3
  major() { grep -q 'network changed change=Major' "$LAB_DIR/node-a.log"; }
  check "a host whose routes change all the time notices that its default route moved" within 4 major
  # By now its routes alone have used up what minor changes may cost.
  pause 4
  lab_in a ip addr add 192.168.1.4/24 dev eth0
  check "and that it has another address" within 4 endpoint a 192.168.1.4:
  lab_in a ip addr del 192.168.1.4/24 dev eth0
  lab_stop restless
  lab_stop node-a
}

# Two uplinks and a route per source: the default route leads to r1, a hard NAT; the other uplink has a public address.
# What enters an uplink with the other's source is dropped. The peer is behind a hard NAT of its own, so only the public
# address will do, and only if all that leaves for the peer has it as its source.
uplinks() {
  lab_host two 203.0.113.31
  lab_host r1 203.0.113.21
  lab_wire r1 lan two eth0
  lab_in r1 sh -c '
    ip addr add 10.1.0.1/24 dev lan
    echo 1 >/proc/sys/net/ipv4/ip_forward'
  lab_in two sh -c '
    ip addr add 10.1.0.2/24 dev eth0
    ip route replace default via 10.1.0.1
    ip route add default via 10.1.0.1 table 101
    ip route add default via 203.0.113.254 dev wan onlink table 102
    ip rule add from 10.1.0.2 lookup 101
    ip rule add from 203.0.113.31 lookup 102'
  hard_nat='table ip nat { chain post { type nat hook postrouting priority srcnat; oifname "wan" masquerade fully-random; }; }'
  lab_in r1 nft "$hard_nat"'
    table ip filt { chain pass { type filter hook forward priority filter
      iifname "lan" ip saddr != 10.1.0.2 drop
      iifname "wan" ct state new drop
    }; }'
  lab_in inet nft 'table ip filt { chain pass { type filter hook forward priority filter
    iifname "p_two" ip saddr != 203.0.113.31 drop
  }; }'
  lab_home peer 2
  lab_in rpeer nft "delete table ip nat; $hard_nat"
  ip -n "${LAB}peer" addr flush dev eth0 scope global
  ip -n "${LAB}peer" addr add 192.168.2.2/24 dev eth0
  ip -n "${LAB}peer" route replace default via 192.168.2.1
  for node in two peer; do
    sed 's/"HostName"/"IPv4": "203.0.113.1", "IPv6": "none", "HostName"/' "$LAB_DIR/map-a.json" >"$LAB_DIR/map-$node.json"
  done
  network two 10.99.0.3 peer 10.99.0.4
  network peer 10.99.0.4 two 10.99.0.3
  up two
  up peer
  check "a host with two uplinks reaches its relay" event two 10 derp_connected
  check "its peer does" event peer 10 derp_connected
  pause 1
  lab_spawn peer ping ping -i 0.1 10.99.0.3
  direct() { event "$1" "$2" path --where state=direct; }
  check "the peer is direct within 5 s" direct peer 5
  check "and the host with two uplinks" direct two 5
  lab_stop ping
  check "no ping is lost on the way" lab_in peer ping -c 30 -i 0.1 -W 2 10.99.0.3
  alone() { node "$1" status --json | "$BENCH" pick /peers/0/path/state | tee /dev/stderr | grep -qF direct; }
  relayed() { node "$1" status --json | "$BENCH" pick /peers/0/tx_relay_bytes; }
  before=$(relayed two)$(relayed peer)
  check "nor one the other way" lab_in two ping -c 30 -i 0.1 -W 2 10.99.0.4
  check "and none goes by relay" test "$(relayed two)$(relayed peer)" = "$before"
  check "both stay direct" eval 'alone two && alone peer'
  lab_stop node-two
  lab_stop node-peer
}

# Two machines with one state directory: both are to say so.
twins() {
  local node
  lab_host coord 203.0.113.3
  ip -n "${LAB}coord" addr add 10.255.0.1/32 dev lo
  ip -n "${LAB}inet" route add 10.255.0.1/32 via 203.0.113.3 dev p_coord onlink
  lab_spawn coord coord "$RINGTAIL" coord --addr 10.255.0.1:8080 --state-dir "$LAB_DIR/coord" --derp-map "$LAB_DIR/map-a.json"
  listens() { lab_in coord grep -qi ":$(printf %04x 8080) 0*:0000 0A" /proc/net/tcp; }
  check "coordination starts" within 20 listens
  "$RINGTAIL" coord keys create --reusable --state-dir "$LAB_DIR/coord" >"$LAB_DIR/auth-key"
  lab_host one 203.0.113.41
  lab_host copy 203.0.113.42
  resolver one 203.0.113.53
  resolver copy 203.0.113.53
  join() {
    lab_spawn "$1" "node-$1" "$RINGTAIL" up --coord http://10.255.0.1:8080 --auth-key-file "$LAB_DIR/auth-key" \
      --state-dir "$LAB_DIR/$1" --events "$LAB_DIR/$1.events" --hostname "$1"
  }
  join one
  check "a node joins" event one 20 netmap
  check "and has nothing to complain of" not says one 'another machine' status
  lab_stop node-one
  cp -a "$LAB_DIR/one" "$LAB_DIR/copy"
  rm -f "$LAB_DIR/copy/ringtail.sock"
  join one
  join copy
  for node in one copy; do
    check "of two machines with one state directory, '$node' says so" within 60 says "$node" ' machine' status
    check "in its log, too" grep -q ' machine' "$LAB_DIR/node-$node.log"
  done
  lab_stop node-one
  lab_stop node-copy
  lab_stop coord
}

[ $# -gt 0 ] || set -- names restless uplinks twins
for part in "$@"; do "$part"; done

verdict
