#!/usr/bin/env bash
# A path narrower than the tunnel's full packets, on the real binary: what is measured with the don't-fragment bit,
# what fragments are good for, and what becomes of a path that carries neither.
#
#   scripts/netns/mtu-test.sh [--keep]
#
#       coord 10.255.0.1     nyc 203.0.113.1 (relay)
#                     \      /
#    203.0.113.11  a -- inet == mid -- b  203.0.113.12        == carries 1300 bytes
#
# Uses $RINGTAIL_BIN_DIR, target/debug by default. Needs root; without it the test is skipped aloud, or fails when
# RINGTAIL_NO_SKIP=1.
set -euo pipefail

# shellcheck source=begin.sh
. "$(dirname "$0")/begin.sh"

topology() {
  lab_internet
  tailnet_coord_host
  lab_host nyc 203.0.113.1
  lab_host a 203.0.113.11
  # B is one router farther, behind the narrow wire; ICMP of that router comes from its own address.
  lab_ns mid b
  lab_wire inet p_mid mid near
  lab_wire mid away b wan
  ip -n "${LAB}inet" link set p_mid mtu 1300
  ip -n "${LAB}mid" link set near mtu 1300
  ip -n "${LAB}mid" addr add 203.0.113.20/32 dev lo
  ip -n "${LAB}inet" route add 203.0.113.20/32 dev p_mid
  ip -n "${LAB}inet" route add 203.0.113.12/32 via 203.0.113.20 dev p_mid onlink
  ip -n "${LAB}mid" route add default via 203.0.113.254 dev near onlink src 203.0.113.20
  ip -n "${LAB}mid" route add 203.0.113.12/32 dev away
  ip -n "${LAB}b" addr add 203.0.113.12/32 dev wan
  ip -n "${LAB}b" route add default via 203.0.113.20 dev wan onlink
  lab_in mid sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
  # Connection tracking would put fragments together.
  lab_in mid nft -f - <<'NFT'
table ip watch {
  counter probes { }
  chain pass { type filter hook prerouting priority -450; policy accept;
    iifname "away" ip frag-off & 0x4000 != 0 meta l4proto udp ip length > 1300 counter name probes
  }
}
NFT
}

start_narrow_hosts() {
  start_relay nyc nyc 203.0.113.1 900 nyc || return 1
  make_derp_map nyc || return 1
  start_coord
}
status_of() { rt "$1" status --json | "$BENCH" pick "/peers/0/$2"; }
is() { [ "$(status_of "$1" "$2")" = "$3" ]; }
both_are() { is a "$1" "$2" && is b "$1" "$2"; }
# full COUNT: packets of the tunnel's whole MTU, all answered.
full() { lab_in a ping -q -i 0.05 -c "$1" -W 2 -M "do" -s 1252 "$B" | tee /dev/stderr | grep -q " 0% packet loss"; }
answered() { lab_in a ping -q -c 1 -W 1 "$B"; }
restart() {
  lab_stop node-a TERM
  lab_stop node-b TERM
  # Without a memory of paths.
  rm -f "$LAB_DIR"/node-?/endpoints.json
  start_node a "$LAB_DIR/a.events"
  start_node b "$LAB_DIR/b.events"
  within 20 answered >"$LAB_DIR/restart"
}
relayed_bytes() { status_of "$1" tx_relay_bytes; }
# The end that can send directly does so, and by relay nothing.
sends_once() {
  lab_spawn a stream ping -q -i 0.02 -c 400 -s 1252 "$B"
  pause 2
  local before after
  before=$(relayed_bytes b)
  pause 4
  after=$(relayed_bytes b)
  echo "B by relay: $before, 4 s later $after"
  # 200 answers of 1.3 kB would be 260 kB.
  [ $((after - before)) -lt 30000 ]
}

topology
check "relay and coordination start" start_narrow_hosts
start_node a "$LAB_DIR/a.events"
start_node b "$LAB_DIR/b.events"
learned() { B=$(peer_address a) && [ -n "$B" ]; }
within 30 learned || fail "A does not know B's address"

check "the first packet is answered" within 20 answered
check "both are direct over the narrow path" within 20 both_are path/state direct
check "and say that full packets go in fragments" both_are path/fragments true
check "the MTU shown is one that was proved" within 20 both_are path/mtu 1280
check "full packets pass, all of them" full 40
probed() { lab_in mid nft list counter ip watch probes | tee /dev/stderr | grep -qE 'packets [1-9]'; }
check "probes carry the don't-fragment bit" probed

# A router that cuts, and says nothing where it may not.
for router in inet mid; do
  lab_in "$router" nft -f - <<'NFT'
table ip mute {
  chain out { type filter hook output priority 0; policy accept;
    icmp type destination-unreachable drop
  }
}
NFT
done
restart
check "the same behind routers that say nothing" within 20 both_are path/fragments true
check "direct there too" both_are path/state direct
check "full packets pass there too" full 40

# The relay's TCP needs their word.
for router in inet mid; do
  lab_in "$router" nft delete table ip mute
done

# swallow NS: it loses the fragments that come over the narrow wire.
swallow() {
  lab_in "$1" nft -f - <<'NFT'
table ip swallow {
  chain pass { type filter hook prerouting priority -450; policy accept;
    iifname { "near", "p_mid" } ip frag-off & 0x3fff != 0 drop
  }
}
NFT
}
# One direction swallows fragments: A stays on the relay, B is direct and sends nothing twice.
swallow mid
restart
check "the end whose direction is good is direct" within 20 is b path/state direct
pause 6
check "the other is not" not is a path/state direct
check "full packets pass by relay one way" full 40
check "nothing is sent twice for long" sends_once

# Both directions do.
swallow inet
restart
pause 3
check "a path that swallows full packets is not used" not is a path/state direct
check "by neither end" not is b path/state direct
check "full packets pass by relay" full 40
check "the reason is told" grep -q '"test":"mtu"' "$LAB_DIR/a.events"

verdict
