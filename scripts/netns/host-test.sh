#!/usr/bin/env bash
# What a node does to its host: on a LAN that the network offers a route for, behind a route that covers everything of
# the underlay, with a strict reverse path filter, beside other programs' routes, and after every kind of end.
#
#   scripts/netns/host-test.sh
#
#   lan 10.1.0.9 --+                  +-- b 10.2.0.2, a peer (2001:db8:2::2)
#     a 10.1.0.2 --+-- r (10.N.0.1) --+-- c 10.3.0.2, the router that offers 10.0.0.0/8, 10.1.0.0/24, 2001:db8::/32 ...
#                  +-- x 10.5.0.2     +-- s 10.4.0.2, relay and coordination
#
# Uses $RINGTAIL_BIN_DIR, target/debug by default. Needs root; without it the test is skipped aloud, or fails when
# RINGTAIL_NO_SKIP=1.
set -euo pipefail

# shellcheck source=begin.sh
. "$(dirname "$0")/begin.sh"
lab_limit 300 "echo 'error: it hangs' >&2"

# ---- the hosts ---------------------------------------------------------------------------------
lab_ns r a b c s lan
lab_in r sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding'
ip -n "${LAB}r" link add lan type bridge
ip -n "${LAB}r" link set dev lan up
wired() { # NAME SUBNET HOST
  lab_wire r "p_$1" "$1" eth0
  ip -n "$LAB$1" addr add "10.$2.0.$3/24" dev eth0
  ip -n "$LAB$1" addr add "2001:db8:$2::$3/64" dev eth0 nodad
  if [ "$2" = 1 ]; then
    ip -n "${LAB}r" link set dev "p_$1" master lan
  else
    ip -n "${LAB}r" addr add "10.$2.0.1/24" dev "p_$1"
    ip -n "${LAB}r" addr add "2001:db8:$2::1/64" dev "p_$1" nodad
  fi
  ip -n "$LAB$1" route add default via "10.$2.0.1"
  ip -n "$LAB$1" -6 route add default via "2001:db8:$2::1"
}
ip -n "${LAB}r" addr add 10.1.0.1/24 dev lan
ip -n "${LAB}r" addr add 2001:db8:1::1/64 dev lan nodad
wired a 1 2
wired lan 1 9
wired b 2 2
wired c 3 2
wired s 4 2
for host in a b c; do
  lab_in "$host" sh -c 'for file in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 >$file; done'
done
# The resolver of a, which nobody asks.
echo "nameserver 10.4.0.53" >"$LAB_DIR/a.resolv.conf"

relay() { lab_spawn s relay "$RINGTAIL" derp --hostname 10.4.0.2 --addr 10.4.0.2:443 --stun-port 3478 \
  --state-dir "$LAB_DIR/relay" --region-id 900 --region-code nyc; }
coord() {
  lab_spawn s coord "$RINGTAIL" coord --addr 10.4.0.2:8080 --state-dir "$LAB_DIR/coord" \
    --derp-map "$LAB_DIR/derp-map.json"
}
node() { # NAME [OPTION...]
  local name=$1
  shift
  lab_spawn "$name" "node-$name" env RUST_LOG=info "$RINGTAIL" up --coord http://10.4.0.2:8080 \
    --auth-key-file "$LAB_DIR/auth-key" --state-dir "$LAB_DIR/node-$name" --hostname "$name" \
    --events "$LAB_DIR/$name.events" --accept-routes "$@"
}
status() { "$RINGTAIL" status --state-dir "$LAB_DIR/node-$1" "${@:2}"; }
direct() { status "$1" 2>/dev/null | has "^$2 .* direct "; }
inner() { status "$1" | awk -v name="$2" '$1 == name { print $2 }' | tr -d ,; }
# grep that reads to the end: a writer without a reader would fail.
has() { grep "$@" >/dev/null; }
# Everything that a node might touch.
host_state() {
  ip -n "$LAB$1" route; ip -n "$LAB$1" -6 route; ip -n "$LAB$1" rule; ip -n "$LAB$1" -6 rule
  ip -n "$LAB$1" route show table all; lab_in "$1" nft list ruleset; lab_in "$1" sysctl -a 2>/dev/null | grep -E '\.(rp_filter|forwarding|ip_forward|src_valid_mark) '
}
untouched() { diff "$LAB_DIR/before" <(host_state a); }
main_untouched() { diff "$LAB_DIR/main" <(ip -n "${LAB}a" route; ip -n "${LAB}a" -6 route); }
goes() { # ADDRESS WORDS: where a's kernel would send to
  ip -n "${LAB}a" route get "$1" | tee /dev/stderr | has "$2"
}
all_answer() { lab_in a ping -q -i 0.05 -W 2 -c 30 "$1" | tee /dev/stderr | has ' 30 received'; }
lost_nothing() { # LABEL AT-LEAST: a ping that ended; its percentage is rounded
  tail -n 3 "$LAB_DIR/$1.log"
  awk -v most="$2" '/packets transmitted/ { sent = $1; got = $4 } END { exit !(sent >= most && got == sent) }' "$LAB_DIR/$1.log"
}
event_ns() { # NODE SECONDS EVENT [--where FIELD=VALUE]... [--since-ns T]: when it was
  "$BENCH" wait "$LAB_DIR/$1.events" "${@:3}" --timeout "$2" | sed -n 's/.*"t_ns":\([0-9]*\).*/\1/p'
}
# The goal is 0.5 s. An unoptimised build on a machine that others use stands still for a second at times: the best of
# a few tries keeps to it, and each to 3 s.
DIRECT_MS=()
direct_soon() { # SINCE-NS NAME PEER [BOTH]: NAME or both, counted from the first packet that NAME has from or for PEER
  local first last other ms
  first=$(event_ns "$2" 10 relay_first --where "peer=$3" --since-ns "$1") || return 1
  last=$(event_ns "$2" 5 path --where "peer=$3" --where state=direct --since-ns "$1") || return 1
  if [ "${4:-}" = both ]; then
    other=$(event_ns "$3" 5 path --where "peer=$2" --where state=direct --since-ns "$1") || return 1
    last=$((other > last ? other : last))
  fi
  ms=$(((last - first) / 1000000))
  DIRECT_MS+=("$ms") SAID="$ms ms"
  [ "$ms" -le 3000 ]
}
best_direct() {
  local ms best=3001
  for ms in "${DIRECT_MS[@]}"; do best=$((ms < best ? ms : best)); done
  SAID="$best ms of ${DIRECT_MS[*]}"
  [ "$best" -le 500 ]
}
rules() { ip -n "${LAB}a" rule | grep -c 'proto 114'; }

APPROVED=(10.0.0.0/8 10.1.0.0/24 10.1.0.0/25 172.16.0.0/12 2001:db8::/32 192.0.2.0/24 0.0.0.0/1 128.0.0.0/1 0.0.0.0/0)
OFFERED=$(IFS=,; echo "${APPROVED[*]}")
relay
lab_wait_file "$LAB_DIR/relay/derp-node.json" 20
RINGTAIL_MAP=$("$BENCH" derp-map "$LAB_DIR/relay")
echo "$RINGTAIL_MAP" >"$LAB_DIR/derp-map.json"
coord
within 20 lab_in s grep -qi ":$(printf %04x 8080) 0*:0000 0A" /proc/net/tcp
"$RINGTAIL" coord keys create --reusable --state-dir "$LAB_DIR/coord" >"$LAB_DIR/auth-key"

# ---- a route of everything, and one of the LAN itself ------------------------------------------
host_state a >"$LAB_DIR/before"
{ ip -n "${LAB}a" route; ip -n "${LAB}a" -6 route; } >"$LAB_DIR/main"
host_state c >"$LAB_DIR/before-c"
node c --advertise-exit-node --advertise-routes "${OFFERED%,0.0.0.0/0}"
node b
check "the two that offer and wait know each other" within 30 status b
approve() { "$RINGTAIL" coord routes approve c "$OFFERED" --state-dir "$LAB_DIR/coord"; }
check "what c offers is approved" within 10 approve
lab_spawn a lan-ping ping -q -i 0.1 10.1.0.9
node a
check "a learns of both" within 30 eval '[ -n "$(inner a b)" ] && [ -n "$(inner a c)" ]'
check "the covering route is in force" within 10 goes 10.77.0.1 ringtail0
check "the covering route is in force in IPv6" within 10 goes 2001:db8:77::1 ringtail0
B=$(inner a b)
STARTED=$(date +%s%N)
lab_spawn a first-ping ping -q -c 20 -i 0.1 -W 3 "$B"
check "both are direct, though an exit node and routes over both are approved" direct_soon "$STARTED" a b both
wait "$(lab_pid first-ping)" || true
check "from the first ping on, none is lost on the way from relay to direct" lost_nothing first-ping 20
check "30 of 30 pings answered through the tunnel, with relay, coordination and peer inside the route" all_answer "$B"
check "and still direct" direct a b
check "the main tables are untouched while it runs" main_untouched
check "the LAN keeps its route" goes 10.1.0.9 "dev eth0"
check "and its IPv6 route" goes 2001:db8:1::9 "dev eth0"
check "a part of the LAN is not routed elsewhere" goes 10.1.0.100 "dev eth0"
check "the internet is not taken by default routes in pieces" goes 198.51.100.1 "via 10.1.0.1"
check "the resolver's server stays outside" goes 10.4.0.53 "via 10.1.0.1"
check "relay and coordination stay outside" goes 10.4.0.2 "via 10.1.0.1"
check "our mark stays outside" eval 'ip -n "${LAB}a" route get 10.77.0.1 mark 0x80000 | has "via 10.1.0.1"'
check "status tells of the LAN's route" eval 'status a | has "host: 10.1.0.0/24: the host has a route of its own"'
check "status --json too" eval 'status a --json | has "\"relation\": \"inside-connected\""'
check "the log tells it once" eval '[ "$(grep -c "10.1.0.0/24: the host has" "$LAB_DIR/node-a.log")" = 1 ]'
check "the router keeps what it offers" eval 'ip -n "${LAB}c" route get 10.77.0.1 | has "via 10.3.0.1"'
check "the router's own state has no route into the tunnel but peers'" eval \
  '[ "$(ip -n "${LAB}c" route show table 52 | grep -vc "^100\.")" = 0 ]'

# ---- other underlays ---------------------------------------------------------------------------
lab_in r nft -f - <<'NFT'
table ip block { chain forward { type filter hook forward priority filter; policy accept; meta l4proto udp drop; }; }
NFT
check "over IPv6 too, inside a route of everything" within 15 eval 'status a | has "^b .* direct \[2001:db8:2::2\]"'
check "30 of 30 pings answered that way" all_answer "$B"
lab_in r nft delete table ip block
lab_wire r p_second a eth1
ip -n "${LAB}r" addr add 10.6.0.1/24 dev p_second
ip -n "${LAB}a" addr add 10.6.0.2/24 dev eth1
ip -n "${LAB}a" route add default via 10.6.0.1 table 100
ip -n "${LAB}a" rule add from 10.6.0.2 lookup 100
from_second() { ip -n "${LAB}a" route get 10.77.0.1 from 10.6.0.2 mark 0x80000 | has "via 10.6.0.1"; }
check "the underlay follows the host's own rules, as for a second uplink" from_second
goes_from_second() { ip -n "${LAB}a" route get "$1" from 10.6.0.2 | tee /dev/stderr | has "via 10.6.0.1"; }
check "so does what the host itself sends to its LAN" goes_from_second 10.1.0.9
ip -n "${LAB}a" route add 10.5.0.0/24 via 10.6.0.1 table 100
check "and to a network that only those rules know" within 2 goes_from_second 10.5.0.2
ip -n "${LAB}a" rule del from 10.6.0.2 lookup 100
ip -n "${LAB}a" link del eth1
ip -n "${LAB}a" route add 10.2.0.0/24 dev ringtail0
ip -n "${LAB}a" -6 route add 2001:db8:2::/64 dev ringtail0
check "what somebody routes into the tunnel by hand is no way to a peer" within 15 not direct a b
check "30 of 30 pings answered by relay meanwhile" all_answer "$B"
ip -n "${LAB}a" route del 10.2.0.0/24 dev ringtail0
ip -n "${LAB}a" -6 route del 2001:db8:2::/64 dev ringtail0
check "and it is direct again without that" within 15 direct a b

# ---- the host changes under it -----------------------------------------------------------------
for guard in 100.64.0.0/10 172.0.0.0/8 fd00::/8; do ip -n "${LAB}a" route add unreachable $guard; done
ip -n "${LAB}a" -6 route add unreachable default metric 4294967295
check "what the host calls unreachable is not, where our routes are longer" all_answer "$B"
check "in IPv6 too" eval 'ip -n "${LAB}a" route get fd7a:115c:a1e0::2 | has ringtail0'
for guard in 100.64.0.0/10 172.0.0.0/8 fd00::/8; do ip -n "${LAB}a" route del unreachable $guard; done
ip -n "${LAB}a" -6 route del unreachable default metric 4294967295
check "a network of containers goes into the tunnel before there is one here" goes 172.17.0.2 ringtail0
ip -n "${LAB}a" link add docker0 type bridge
ip -n "${LAB}a" link set dev docker0 up
ip -n "${LAB}a" addr add 172.17.0.1/16 dev docker0
check "a container bridge inside the network's route is respected at once" goes 172.17.0.2 "dev docker0"
check "the rest of that route is not" goes 172.18.0.2 ringtail0
ip -n "${LAB}a" link del docker0
ip -n "${LAB}a" route add 10.9.0.0/16 via 10.1.0.9
check "so is a route that is added later" within 2 goes 10.9.1.1 "via 10.1.0.9"
ip -n "${LAB}a" route del 10.9.0.0/16
for v in -4 -6; do
  ip -n "${LAB}a" $v rule flush proto 114 2>/dev/null || for at in $(ip -n "${LAB}a" $v rule | sed -n 's/^\(5[0-9]*\):.*/\1/p'); do ip -n "${LAB}a" $v rule del pref "$at"; done
done
check "rules that a network manager flushes come back" within 5 goes 10.77.0.1 ringtail0
ip -n "${LAB}a" link set dev ringtail0 down
ip -n "${LAB}a" link set dev ringtail0 up
check "and so do routes and IPv6 addresses of an interface that went down" within 5 eval \
  'goes 10.77.0.1 ringtail0 && goes 2001:db8:77::1 ringtail0 && goes "'"$B"'" ringtail0'
lab_stop relay
relay
check "the relay is found again inside the route" within 20 eval 'status a | has "relay nyc: connected"'
check "30 of 30 pings answered after all that" all_answer "$B"
for try in second third; do
  lab_stop node-b
  STARTED=$(date +%s%N)
  node b
  check "the peer is direct again when it is started a $try time" direct_soon "$STARTED" b a
done
check "the best of the three within 0.5 s" best_direct
check "30 of 30 pings answered after that too" all_answer "$B"

# ---- every kind of end -------------------------------------------------------------------------
lab_stop node-a
check "after SIGTERM the host is as before" untouched
ended_early() { # TERM at any moment of a start
  local ms
  for ms in 10 40 70 100 130 160 200 300; do
    node a
    pause "0.$(printf %03d $ms)"
    lab_stop node-a && untouched || { echo "after $ms ms"; return 1; }
  done
}
check "and after SIGTERM at any moment of a start" ended_early
node a
within 10 goes 10.77.0.1 ringtail0 2>/dev/null
ip -n "${LAB}a" link del ringtail0
check "and after the loss of its interface" within 5 untouched
lab_stop coord
node a
check "the network map of the last run does no harm either" within 10 goes 10.77.0.1 ringtail0
check "the LAN keeps its route with it" goes 10.1.0.9 "dev eth0"
lab_stop node-a KILL
check "a killed node leaves nothing, for its keeper puts back" within 3 untouched
node a
within 10 goes 10.77.0.1 ringtail0
# Without its keeper, which the node would replace if it could.
keeper=$(ip netns pids "${LAB}a" | while read -r pid; do ! grep -qs ringtail-keeper "/proc/$pid/comm" || echo "$pid"; done)
kill -STOP "$(lab_pid node-a)"
kill -KILL "$keeper"
lab_stop node-a KILL
check "without it its rules stay, which do no harm" eval '[ "$(rules)" -gt 0 ] && goes 10.1.0.9 "dev eth0" && goes 10.77.0.1 "via 10.1.0.1"'
node a
check "the next start removes them" within 10 grep -q "removing what an earlier run left" "$LAB_DIR/node-a.log"
within 10 goes 10.77.0.1 ringtail0 2>/dev/null
lab_stop node-a
check "after SIGKILL, a start and SIGTERM the host is as before" untouched
ip -n "${LAB}a" route add 100.100.100.100/32 dev eth0 table 52
ip -n "${LAB}a" rule add pref 5270 lookup 52
host_state a >"$LAB_DIR/before"
refused() {
  not lab_in a timeout 20 "$RINGTAIL" up --coord http://10.4.0.2:8080 --state-dir "$LAB_DIR/node-a" --table 52 \
    2>"$LAB_DIR/refused.log" && grep 'another program' "$LAB_DIR/refused.log"
}
check "the table of another program is refused in words" refused
check "a start that fails leaves nothing" untouched
node a
check "without a choice the next table is taken" within 10 eval 'ip -n "${LAB}a" route show table 53 | has ringtail0'
"$RINGTAIL" genkey --state-dir "$LAB_DIR/many-peer" >"$LAB_DIR/many-keys"
peer_keys() { sed -n 's/.*\(nodekey:[0-9a-f]*\).*/node_key = "\1"/p; s/.*\(discokey:[0-9a-f]*\).*/disco_key = "\1"/p' "$LAB_DIR/many-keys"; }
{
  echo 'addresses = ["10.99.0.1/32"]'
  printf '[[peer]]\nname = "p"\naddresses = ["10.99.0.2/32"]\nallowed_ips = ["10.99.0.2/32", "10.0.0.0/8"]\nendpoints = ["10.5.0.77:1"]\n'
  peer_keys
} >"$LAB_DIR/lonely.toml"
lab_spawn a second "$RINGTAIL" up --network "$LAB_DIR/lonely.toml" --state-dir "$LAB_DIR/second" --tun ringtail1 --listen-port 0
check "a second node beside it takes another" within 10 eval 'ip -n "${LAB}a" rule | has "lookup 54 proto 114"'
check "with a route over everything of its own, it leaves the first one's underlay alone" all_answer "$B"
check "and the first one is direct" within 15 direct a b
lab_stop second KILL
lab_spawn a second "$RINGTAIL" up --network "$LAB_DIR/lonely.toml" --state-dir "$LAB_DIR/second" --tun ringtail1 --listen-port 0
check "and removes its own leftovers, not the first one's" within 10 grep -q "removing what an earlier run left" "$LAB_DIR/second.log"
check "the first one's are there" eval 'ip -n "${LAB}a" rule | has "lookup 53 proto 114"'
lab_stop second
lab_stop node-a
check "both leave the host and the other program's table as they were" untouched

# ---- many routes, and no IPv6 ------------------------------------------------------------------
{
  echo 'addresses = ["10.99.0.1/32"]'
  echo '[[peer]]'
  echo 'name = "p"'
  peer_keys
  echo 'addresses = ["10.99.0.2/32"]'
  echo "allowed_ips = [\"10.99.0.2/32\"$(for i in $(seq 0 4999); do printf ', "10.%d.%d.0/24"' $((100 + i / 250)) $((i % 250)); done)]"
} >"$LAB_DIR/many.toml"
host_state lan >"$LAB_DIR/before-lan"
lab_in lan sh -c 'echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6'
# As a user who may do just this: to root's ringtail its holder of the table could be anybody.
CAPS=+net_admin,+dac_override
lab_spawn lan many setpriv --reuid 65534 --inh-caps "$CAPS" --ambient-caps "$CAPS" "$RINGTAIL" up --network "$LAB_DIR/many.toml" --state-dir "$LAB_DIR/many"
routes() { [ "$(ip -n "${LAB}lan" route show table 52 2>/dev/null | wc -l)" = "$1" ]; }
check "5000 routes are in force within 5 s" within 5 routes 5001
check "a host without IPv6 for the tunnel hears no complaint" eval 'not has "not as it should be" "$LAB_DIR/many.log"'
lab_spawn lan beside "$RINGTAIL" up --network "$LAB_DIR/lonely.toml" --state-dir "$LAB_DIR/beside" --tun ringtail1 --listen-port 0
check "root's beside a user's takes another table" within 10 eval 'ip -n "${LAB}lan" rule | has "lookup 53 proto 114"'
lab_stop beside
check "and leaves that one's routes alone" routes 5001
lab_stop many
lab_in lan sh -c 'echo 0 >/proc/sys/net/ipv6/conf/default/disable_ipv6'
check "and none stays behind" diff "$LAB_DIR/before-lan" <(host_state lan)

kill -INT "$(lab_pid lan-ping)" 2>/dev/null || true
pause 0.3
check "the LAN lost nothing in all that time" lost_nothing lan-ping 100

verdict
