#!/usr/bin/env bash
# ringtail in a tailnet of the real programs: Headscale, tailscaled, derper, in network namespaces.
#
#   scripts/tailnet-test.sh [--only LIST] [--jobs N] [--limit MINUTES] [--keep]
#
#   --only LIST       only these rows, by comma; `--only help` lists them
#   --jobs N          so many rows beside each other (3)
#   --limit MINUTES   fail when it takes longer, the building of the peers apart (15)
#   --keep            leave the lab up, and print how to take it down
#
# A row is a function row_NAME below, with a tailnet of its own (netns/tailnet.sh): it builds what it needs, and each
# sentence it checks is a line of the result. A row in which something failed is held once more, alone, and then that
# counts: on a busy machine an answer may come late. A row ends after ROW_S seconds at the latest.
#
# Installs or builds the peers in a cache (netns/peers.sh; about six minutes the first time). Our binaries are those of
# $RINGTAIL_BIN_DIR, target/debug by default. Without root or Go it says aloud that it is skipped, which is a failure
# when RINGTAIL_NO_SKIP=1.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
ONLY='' JOBS=3 KEEP='' LIMIT=15
ROW_S=150
# When more rows than this have failed, it is not the machine.
AGAIN_MAX=3
while [ $# -gt 0 ]; do
  case $1 in
    --only | --jobs | --limit)
      [ $# -ge 2 ] || { usage >&2; exit 2; }
      case $1 in --only) ONLY=,$2, ;; --jobs) JOBS=$2 ;; --limit) LIMIT=$2 ;; esac
      shift ;;
    --keep) KEEP=1 ;;
    --help | -h) usage; exit ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done

# shellcheck source=netns/lab.sh
. scripts/netns/lab.sh
# shellcheck source=netns/packages.sh
. scripts/netns/packages.sh
# shellcheck source=netns/checks.sh
. scripts/netns/checks.sh
# shellcheck source=netns/peers.sh
. scripts/netns/peers.sh
# shellcheck source=netns/tailnet.sh
. scripts/netns/tailnet.sh
# shellcheck source=netns/clock.sh
. scripts/netns/clock.sh

# ---- rows ------------------------------------------------------------------------------------
# Each begins with hosts of its own and `ready`: a check that they are in the network and know each other.

# hosts NAME...: on the internet, at 203.0.113.11 and on.
hosts() {
  local name last=11
  for name in "$@"; do
    lab_host "$name" "203.0.113.$((last++))"
  done
}
ready() { check "$* join and know each other" tailnet_ready "$@" && ! grep -q '^FAIL' "$CHECKS"; }

# Ours and tailscaled, by relay and directly.
row_meet() {
  tailnet_up
  lab_host a 203.0.113.11 2001:db8::11
  lab_host b 203.0.113.12 2001:db8::12
  tailnet_block a
  tailnet_ringtail a a
  tailnet_tailscaled b b
  ready a b || return 0
  check "ringtail has the address that Headscale gave it" [ "$(tailnet_ip a)" = "$(hs_field a '.ip_addresses[]' | grep -v :)" ]
  check "ringtail to tailscaled by relay" tailnet_pings a b 2
  check "tailscaled to ringtail by relay" tailnet_pings b a 2
  check "both say that it was by relay" relayed a b
  check "over IPv6 inside, too" lab_in a ping -6 -c 3 -i 0.2 -W 2 "$(tailnet_ip b 6)"
  tailnet_stream a b across
  tailnet_unblock a
  # tailscaled tries again every five seconds at most.
  check "both go direct when the network lets them" within 15 tailnet_direct a b
  check "nothing is lost on the way to direct" lost_at_most across 0
  check "ringtail to tailscaled directly" tailnet_pings a b 2
  check "tailscaled to ringtail directly" tailnet_pings b a 2
  check "a node that was killed and started again answers" restarted a
}
restarted() { tailnet_stop "$1" KILL && tailnet_start "$1" && within 20 tailnet_pings b "$1" 1; }
relayed() { [[ $(tailnet_path "$1" "$2") == relay* ]] && [[ $(tailnet_path "$2" "$1") == relay* ]]; }
lost_at_most() { tailnet_stream_end "$1" && SAID="$SENT sent, $LOST lost" && [ "$LOST" -le "$2" ]; }

# An administrator deletes nodes: nobody has them any more, and they stay away although their key lets anybody in. a
# hears of it by asking, c only when it can reach Headscale again.
row_deleted() {
  tailnet_up
  hosts a b c d
  tailnet_ringtail a a
  tailnet_tailscaled b b
  tailnet_ringtail c c
  tailnet_tailscaled d d
  ready a b c d || return 0
  check "ping before" tailnet_pings a d 1
  hs_delete d
  check "ringtail has a deleted tailscaled no longer in its map" within 10 not tailnet_knows a d
  check "and it answers no more" not tailnet_pings a d 1
  ip -n "${LAB}c" link set wan down
  hs_delete a
  hs_delete c
  check "tailscaled has a deleted ringtail no longer in its map" within 10 not tailnet_knows b a
  # It asks once a minute.
  check "the deleted ringtail ends" within 90 not lab_alive node-a
  check "with an exit code that says so" exited a 77
  check "and last words that say what to do" last_words a 'was removed from the network.*start ringtail again with an auth key'
  lab_stop headscale KILL
  start_headscale
  ip -n "${LAB}c" link set wan up
  ip -n "${LAB}c" route replace default via 203.0.113.254 dev wan onlink
  check "so does one that was away meanwhile" within 40 not lab_alive node-c
  check "they are not in the network again" gone a c
  tailnet_start a
  check "until somebody starts one" within 20 tailnet_pings b a 1
}
exited() { # NODE CODE
  local code=0
  not lab_alive "node-$1" || return 1
  wait "$(lab_pid "node-$1")" || code=$?
  tail -n 1 "$LAB_DIR/node-$1.log"
  [ $code = "$2" ]
}
last_words() { tail -n 1 "$LAB_DIR/node-$1.log" | grep -q "$2"; }
gone() { not hs_id "$1" && not hs_id "$2" && hs_id b; }

# Keys expire, of a peer and of our own, and another is away: status says all of it, by the map that was kept too.
row_expired() {
  tailnet_up
  hosts a b c d
  tailnet_ringtail a a
  tailnet_tailscaled b b
  tailnet_ringtail c c
  tailnet_ringtail d d
  ready a b c d || return 0
  check "ping before" tailnet_pings b a 1
  hs_expire b
  check "a peer whose key has expired is shown so" within 10 shows a b 'key expired at 20'
  check "and gets no answer" not tailnet_pings b a 1
  check "nor is it asked" not tailnet_pings a b 1
  tailnet_stop c
  check "a peer that is away is shown as offline" within 20 shows a c offline
  hs_expire a
  check "its own expiry is in the status of a, with an exit code" within 10 own_expiry a
  check "and once in its log" [ "$(grep -c "this node's key has expired" "$LAB_DIR/node-a.log")" = 1 ]
  lab_stop headscale KILL
  tailnet_stop a
  tailnet_start a
  check "also without coordination" within 10 own_expiry a
  check "and the peer's" shows a b 'key expired at 20'
  check "Headscale starts again" start_headscale
  tailnet_stop a
  tailnet_start a
  check "a start with an auth key makes it good again" within 20 tailnet_pings a d 1
  check "and its status is in order" rt a status
}
shows() { { rt "$1" status || true; } | grep -E "^$2 .*$3"; }
own_expiry() {
  local code=0
  rt "$1" status >"$LAB_DIR/said" || code=$?
  [ "$code" = 77 ] && grep -q 'problem: this node.s key expired at 20.*--auth-key-file' "$LAB_DIR/said"
}

# A machine is copied, state directory and all: both notice that they are two.
row_copied() {
  tailnet_up
  hosts a b
  tailnet_ringtail a a
  check "a is in the network" within 40 tailnet_online a
  check "and alone" not says_copied a
  tailnet_stop a
  cp -a "$LAB_DIR/node-a" "$LAB_DIR/node-b"
  tailnet_start a
  check "a is back" within 20 tailnet_online a
  # What Headscale still had of the run before is no other machine.
  pause 12
  tailnet_ringtail b b
  check "it says that another machine has its keys" within 30 says_copied a
  check "so does the other" within 90 says_copied b
  check "in its log, too" grep -q 'another machine' "$LAB_DIR/node-a.log"
}
says_copied() { rt "$1" status | grep 'another machine'; }

# Exit nodes of both kinds are approved, and nobody chose them.
row_exit() {
  tailnet_up
  hosts a b c
  tailnet_ringtail a a
  tailnet_tailscaled b b --advertise-exit-node
  tailnet_ringtail c c --advertise-routes 0.0.0.0/0,::/0,10.66.0.0/16
  ready a b c || return 0
  hs_routes b 0.0.0.0/0,::/0
  hs_routes c 0.0.0.0/0,::/0,10.66.0.0/16
  check "status says of both that they are not used" within 10 not_used 2
  check "a and the exit node b go direct" goes_direct a b
  check "a and the exit node c go direct" goes_direct a c
  ip -n "${LAB}b" addr add 198.18.0.1/32 dev lo
  check "an exit node that is a tailscaled does not send from the internet" spoofed b 198.18.0.1
  ip -n "${LAB}c" addr add 198.18.0.1/32 dev lo
  check "nor one that is ours" spoofed c 198.18.0.1
  ip -n "${LAB}c" addr add 10.66.0.1/32 dev lo
  check "its subnet's addresses it may send from" lab_in c ping -qc 3 -i 0.2 -W 2 -I 10.66.0.1 "$(tailnet_ip a)"
}
not_used() { [ "$(rt a status | grep -c '0.0.0.0/0 of .* is not used: no exit node is chosen')" = "$1" ]; }
# Of three pings none is taken, and all are counted.
spoofed() {
  local before dropped
  before=$(echoes) dropped=$(rt a status --json | jq .drops.source_not_allowed)
  lab_in "$1" ping -qc 3 -i 0.2 -W 1 -I "$2" "$(tailnet_ip a)" || true
  SAID="$(($(echoes) - before)) arrived, $(($(rt a status --json | jq .drops.source_not_allowed) - dropped)) counted"
  [ "$SAID" = "0 arrived, 3 counted" ]
}
echoes() { lab_in a awk '/^Icmp: [0-9]/ { print $10 }' /proc/net/snmp; }

# A LAN behind two subnet routers of ours, of which h stands by, and a tailscaled b far away. p is on the LAN alone.
#
#   b -- internet -- r, h -- 192.168.77.0/24 -- p
row_subnet() {
  local before
  tailnet_up
  lab_host b 203.0.113.12
  lab_host r 203.0.113.21
  lab_host h 203.0.113.22
  lab_ns lan p
  lab_lan lan lan r=192.168.77.1/24 h=192.168.77.2/24 p=192.168.77.9/24
  ip -n "${LAB}p" route add 100.64.0.0/10 via 192.168.77.1
  lab_in r sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
  before=$(host_state h)
  tailnet_tailscaled b b --accept-routes
  tailnet_ringtail r r --advertise-routes 192.168.77.0/24
  tailnet_ringtail h h --advertise-routes 192.168.77.0/24
  ready b r h || return 0
  tailnet_stream h 192.168.77.9 lan
  check "Headscale hears of the offer, and it is approved" within 10 hs_routes r 192.168.77.0/24
  check "tailscaled reaches the LAN through ours" within 15 tailnet_pings b 192.168.77.9 1
  hs_routes h 192.168.77.0/24
  pause 2
  check "the router reaches its LAN itself" tailnet_pings r 192.168.77.9 1
  check "so does the one that stands by" goes_by h 192.168.77.9 lan
  tailnet_stop h KILL
  check "and after a kill" goes_by h 192.168.77.9 lan
  tailnet_start h
  check "and when started again" within 20 tailnet_online h
  pause 1
  check "by its LAN, still" goes_by h 192.168.77.9 lan
  tailnet_stop h
  check "the host is left as it was found" same_state h "$before"
  lab_stop headscale
  tailnet_start h
  pause 3
  check "a start without coordination leaves the LAN alone" goes_by h 192.168.77.9 lan
  check "no ping on the LAN was lost in all this" lost_at_most lan 0
  tailnet_stop h KILL
  tailnet_start h
  pause 2
  tailnet_stop h
  check "nor does a kill leave anything once it was started again" same_state h "$before"
}
host_state() {
  lab_in "$1" sh -c 'ip route; ip -6 route; ip route show table 52 2>/dev/null; ip rule; ip -6 rule; nft list ruleset
    sysctl -a 2>/dev/null | grep -E "forward|rp_filter"'
}
same_state() { diff <(echo "$2") <(host_state "$1"); }
goes_by() { lab_in "$1" ip route get "$2" | grep "dev $3" && tailnet_pings "$1" "$2" 1; }

# An approved subnet that has everything in it: the peers' addresses, the relay, the coordination server.
row_covered() {
  tailnet_up
  hosts a b
  lab_host r 203.0.113.21
  lab_in a sh -c 'echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter'
  tailnet_tailscaled r r --advertise-routes=203.0.113.0/24,10.255.0.0/24
  tailnet_ringtail a a
  tailnet_ringtail b b
  ready a b r || return 0
  check "the routes are approved" within 10 hs_routes r 203.0.113.0/24,10.255.0.0/24
  check "and arrive" within 10 has_route a 203.0.113.0/24
  pause 1
  check "30 of 30 pings are answered" thirty a b
  check "directly" within 5 tailnet_direct a b
  check "coordination stays" tailnet_online a b
  check "also after a restart with the map that was kept" restarted_pings a b
  check "directly, again" within 5 tailnet_direct a b
  check "to the router itself, too" tailnet_pings a r 1
  check "nothing is sent round in circles" sent_less a 3000000
}
has_route() { rt "$1" status --json | jq -e --arg net "$2" '[.peers[].allowed_ips[]] | index($net)' >/dev/null; }
thirty() { lab_in "$1" "$BENCH" ping "$(tailnet_ip "$2")" --rate 20 --seconds 1.5 --lost-max 0; }
sent_less() { SAID=$(rt "$1" status --json | jq '[.peers[].tx_bytes] | add') && [ "$SAID" -lt "$2" ]; }
restarted_pings() { tailnet_stop "$1" && tailnet_start "$1" && within 20 tailnet_online "$1" && pause 1 && tailnet_pings "$1" "$2" 1; }

# Only alice's nodes may begin, and only to bob's port 7000 and by ping, which has no ports.
row_filter() {
  tailnet_up
  hosts a b
  check "Headscale takes the policy" may_only 7000
  tailnet_tailscaled a a
  TAILNET_KEY=$LAB_DIR/bob-key tailnet_ringtail b b
  check "a is in the network" within 40 tailnet_online a
  check "b is in the network" within 40 tailnet_online b
  check "a knows b" within 20 tailnet_knows a b
  lab_spawn b listen7000 python3 -m http.server 7000
  lab_spawn b listen7001 python3 -m http.server 7001
  check "a port that the policy opens answers" within 10 connects a b 7000
  check "one that it does not open answers nothing" not connects a b 7001
  check "what the policy denies is counted" denied b
  check "ping, which the policy allows" tailnet_pings a b 1
  check "nor may the other begin" not tailnet_pings b a 1
  check "Headscale takes another policy" may_only 7001
  check "a changed policy is obeyed: opened" within 10 connects a b 7001
  check "and closed" not connects a b 7000
}
may_only() { hs_policy <<<'{"acls": [{"action": "accept", "src": ["alice@"], "dst": ["bob@:'"$1"'"]}]}'; }
connects() { lab_in "$1" timeout 2 bash -c ": <>/dev/tcp/$(tailnet_ip "$2")/$3"; }
denied() { [ "$(rt "$1" status --json | jq .drops.filter_denied)" -gt 0 ]; }

# What Headscale tells of others, and what happens when it is away.
row_headscale() {
  tailnet_up
  hosts a b
  tailnet_ringtail a a
  tailnet_ringtail b b
  ready a b || return 0
  check "both of ours go direct" goes_direct a b
  tailnet_stop b
  # Headscale waits 10 s for a node to come back.
  check "who leaves is told to be offline" within 20 told a b '.online == false'
  lab_stop headscale KILL
  check "a killed Headscale is noticed" within 10 not tailnet_online a
  tailnet_start b
  check "a node starts without it, by the map it kept" within 20 tailnet_pings a b 1
  check "Headscale starts again" start_headscale
  check "both come back to it" within 40 tailnet_online a b
  check "and are told to be online" within 20 tailnet_knows a b
  printf 'hskey-auth-AbCdEfGhIjKl-%064d\n' 0 >"$LAB_DIR/bad-key"
  lab_host c 203.0.113.13
  TAILNET_KEY=$LAB_DIR/bad-key tailnet_ringtail c c
  check "a wrong key ends a node" within 10 not lab_alive node-c
  check "which says why" grep -q 'invalid pre auth key' "$LAB_DIR/node-c.log"
}
goes_direct() { tailnet_pings "$1" "$2" 1 && within 10 tailnet_direct "$1" "$2"; }
told() { tailnet_status "$1" | jq -e --arg other "$2" ".peers[\$other] | $3" >/dev/null; }

# A node of another network, from a file, on a host that has tailscaled too: first one, then the other is there before.
row_beside() {
  tailnet_up
  hosts a b c
  own_keys a
  own_keys b
  own_file a 1 b 2
  own_file b 2 a 1
  own_start b
  own_start a
  check "a node of its own network answers" within 10 own_answers
  tailnet_tailscaled ta a
  tailnet_tailscaled tc c
  ready ta tc || return 0
  check "tailscaled beside it works" tailnet_pings ta tc 1
  check "and it works on beside tailscaled" own_answers
  lab_stop own-a
  check "tailscaled has all its routes when it ends" tailnet_pings ta tc 1
  check "and it leaves no rule" not own_rules
  own_start a
  check "started beside tailscaled it takes another table, and says so" within 10 grep -q "trying the next one" "$LAB_DIR/own-a.log"
  check "and works" within 10 own_answers
  check "as tailscaled does" tailnet_pings ta tc 1
  lab_stop own-a KILL
  own_start a
  check "killed and started again it works" within 10 own_answers
  lab_stop own-a
  check "and leaves no rule" not own_rules
  check "tailscaled works on" tailnet_pings ta tc 1
}
own_keys() { "$RINGTAIL" genkey --state-dir "$LAB_DIR/own-$1" >"$LAB_DIR/own-$1.keys"; }
own_file() { # NODE NUMBER PEER NUMBER
  {
    echo "addresses = [\"10.77.0.$2/32\"]"
    echo '[[peer]]'
    echo "name = \"$3\""
    cat "$LAB_DIR/own-$3.keys"
    echo "addresses = [\"10.77.0.$4/32\"]"
    echo "endpoints = [\"203.0.113.1$4:41700\"]"
  } >"$LAB_DIR/own-$1.toml"
}
own_start() {
  lab_spawn "$1" "own-$1" "$RINGTAIL" up --network "$LAB_DIR/own-$1.toml" --state-dir "$LAB_DIR/own-$1" --listen-port 41700
}
own_answers() { lab_in a ping -q -c 10 -i 0.1 -W 1 10.77.0.2 | grep ' 10 received'; }
own_rules() { ip -n "${LAB}a" rule | grep 'proto 114'; }

# derper carries all of it: ours to ours, and tailscaled to and from ours.
row_derper() {
  tailnet_internet
  check "derper and Headscale start" derper_and_headscale || return 0
  hosts a b c
  tailnet_block a
  tailnet_ringtail a a
  tailnet_tailscaled b b
  tailnet_ringtail c c
  ready a b c || return 0
  check "ringtail to tailscaled through derper" tailnet_pings a b 2
  check "tailscaled to ringtail through derper" tailnet_pings b a 2
  check "ringtail to ringtail through derper" tailnet_pings a c 2
  check "all of that was by the relay" relayed_to own
  lab_stop relay KILL
  check "a derper that was killed and started again" start_derper relay relay 203.0.113.1 900 own
  # tailscaled waits longer and longer.
  check "is used again by ours" within 10 tailnet_pings a c 1
  check "and by tailscaled" within 30 tailnet_pings a b 1
  check "a derper with the pinned certificate is used" within 5 static_uses "$LAB_DIR/derp-map.json"
  sed 's/\(sha256-raw:\).*"/\1'"$(printf '%064d' 0)"'"/' "$LAB_DIR/derp-map.json" >"$LAB_DIR/wrong-map.json"
  check "one with another certificate is refused" static_refuses "$LAB_DIR/wrong-map.json"
}
derper_and_headscale() { start_derper relay relay 203.0.113.1 900 own && make_derp_map relay && start_headscale; }
# A node that knows no more than this DERP map.
static_node() {
  lab_stop node-static
  printf 'addresses = ["10.77.0.1/32"]\nhome = "own"\nderp_map = "%s"\n' "$1" >"$LAB_DIR/static.toml"
  lab_spawn c node-static "$RINGTAIL" up --network "$LAB_DIR/static.toml" --state-dir "$LAB_DIR/node-static" --tun rt1 --listen-port 0
  within 10 rt static status >/dev/null 2>&1
}
relay_says() { rt static status --json | jq -e ".relays[0] | $1" >/dev/null; }
static_uses() { static_node "$1" && within 5 relay_says .connected; }
static_refuses() { static_node "$1" && within 5 relay_says '.failures > 1' && relay_says '.connected | not'; }

# Our relay asks Headscale whom to serve, as derper would. Who is deleted loses the relay, though he does not hear of it.
row_verify() {
  RELAY_OPTIONS=(--verify-clients "$COORD_URL/verify" --verify-every 2)
  tailnet_up
  verified 'refused: the verifier refuses its key'
  ip -n "${LAB}b" route add blackhole 10.255.0.1
  hs_delete b
  check "a node that Headscale deletes loses its relay" within 15 relay_log 'ended: the verifier refuses its key now'
  check "and is refused when it comes back" within 15 relay_log 'refused: the verifier refuses its key'
  check "the others keep it" tailnet_pings a d 1
}
# derper asks `ringtail coord`.
row_verifyours() {
  RELAY_OPTIONS=(-verify-client-url "$COORD_URL/verify" -verify-client-url-fail-open=false)
  tailnet_internet
  check "derper and our server start" derper_and_coord || return 0
  verified 'rejected.*not allowed'
  lab_host c 203.0.113.13
  static_node "$LAB_DIR/derp-map.json"
  check "a stranger is refused, and the log says why" within 10 relay_log 'rejected.*not allowed'
}
derper_and_coord() { start_derper relay relay 203.0.113.1 900 own && make_derp_map relay && start_coord; }
verified() { # LOG_OF_A_REFUSAL
  hosts a b
  lab_host d 203.0.113.14
  tailnet_block a
  tailnet_ringtail a a
  tailnet_tailscaled b b
  tailnet_ringtail d d
  ready a b d || return 0
  check "who is known is served" tailnet_pings a b 2
  check "by the relay" relayed a b
  check "nobody was refused" not relay_log "$1"
}
relay_log() { grep "$1" "$LAB_DIR/relay.log"; }

# `ringtail coord` and our relay, with two tailscaled and one of ours.
row_ourserver() {
  tailnet_internet
  check "relay and server start" our_server || return 0
  hosts a b c
  tailnet_block a
  tailnet_tailscaled a a
  tailnet_tailscaled b b
  tailnet_ringtail c c
  ready a b c || return 0
  check "tailscaled to tailscaled through our relay" tailnet_pings a b 2
  check "and to ours" tailnet_pings a c 2
  check "all of that was by the relay" relayed_to own
  check "tailscaled measures our relay by STUN, and calls it the nearest" measured a
  lab_stop coord KILL
  check "the nodes go on without a server" tailnet_pings a c 1
  check "the server starts again" start_coord
  lab_host d 203.0.113.14
  tailnet_ringtail d d
  check "the others are back at it, and hear of a new node" within 30 all_know d
  check "an administrator lets a tailscaled's key expire" ours nodes expire a
  check "it asks for a login at once" within 5 asks_for_login a
  check "and the others have it as expired" within 3 shows c a 'key expired at 20'
  check "with an auth key it is back as it was" back_as_it_was a
  check "an administrator deletes it" ours nodes delete a
  check "it asks for a login at once, again" within 5 asks_for_login a
  check "ringtail has it no more" within 3 not knows c a
  check "nor has tailscaled" within 3 not knows b a
  check "the log-out of a tailscaled is told" logged_out b
  check "no log of ours holds the key" not grep -qF -f "$LAB_DIR/auth-key" "$LAB_DIR"/{coord,relay,node-c,node-d}.log
}
ours() { "$RINGTAIL" coord "$@" --state-dir "$LAB_DIR/coord"; }
asks_for_login() { ts "$1" status --json 2>/dev/null | jq -e '.BackendState == "NeedsLogin"' >/dev/null; }
knows() { tailnet_status "$1" | jq -e --arg other "$2" '.peers | has($other)' >/dev/null; }
back_as_it_was() {
  ts "$1" up --login-server="$COORD_URL" --auth-key="file:$LAB_DIR/auth-key" --hostname="$1" --timeout=20s --accept-dns=false &&
    within 10 tailnet_pings c "$1" 1
}
our_server() { start_relay relay relay 203.0.113.1 900 own && make_derp_map relay && start_coord; }
relayed_to() {
  [ "$(tailnet_path a b) $(tailnet_path b a)" = "relay $1 relay $1" ] &&
    [ "$(tailnet_path a c) $(tailnet_path c a)" = "relay $1 relay $1" ]
}
measured() {
  ts "$1" netcheck 2>/dev/null | tee "$LAB_DIR/netcheck"
  grep -q 'UDP: true' "$LAB_DIR/netcheck" && grep -q 'Nearest DERP: own' "$LAB_DIR/netcheck"
}
all_know() { tailnet_knows a "$1" && tailnet_knows b "$1" && tailnet_knows c "$1"; }
logged_out() { ts "$1" logout && within 10 not tailnet_knows c "$1"; }

# A node ends and starts while others send to it: they are answered within a second after it is up, though a
# standard peer would go on with the lost keys for 15 s.
row_restart() {
  tailnet_up
  hosts a b c
  tailnet_ringtail a a
  tailnet_ringtail b b
  tailnet_tailscaled c c
  ready a b c || return 0
  check "ringtail to ringtail" tailnet_pings b a 2
  check "tailscaled to ringtail" tailnet_pings c a 2
  check "the two ringtails are direct" within 15 tailnet_direct a b
  check "ringtail and tailscaled are direct" within 15 tailnet_direct a c
  restart KILL "direct, killed"
  pause 12
  restart TERM "direct, stopped, and its memory lost" forget
  tailnet_block a
  within 15 relayed a b
  within 15 relayed a c
  restart KILL "by relay, killed, and its memory lost" forget
}
# restart SIGNAL HOW [forget]: of node a, with streams of b and c to it.
restart() {
  tailnet_stream b a from-b
  tailnet_stream c a from-c
  pause 2
  tailnet_stop a "$1"
  [ "${3:-}" != forget ] || rm "$LAB_DIR/node-a/sessions.json"
  tailnet_start a
  # It answers for itself before it knows who else is there.
  within 20 rt a status >/dev/null 2>&1
  local up
  up=$(date +%s%N)
  pause 8
  check "$2: ringtail is answered within a second" answered_within from-b "$up" 1000
  check "$2: tailscaled is answered within a second" answered_within from-c "$up" 1000
}

# A tailscaled that was killed and started has lost our keys, and says so only by its new DISCO key.
row_comeback() {
  tailnet_up
  hosts a b
  tailnet_ringtail a a
  tailnet_tailscaled b b
  ready a b || return 0
  check "ringtail to tailscaled" tailnet_pings a b 2
  tailnet_stream a b to-b
  pause 2
  tailnet_stop b KILL
  tailnet_start b
  within 20 tailnet_online b
  pause 4
  check "a tailscaled that was started anew is answered again" silent_at_most to-b 6000
}
silent_at_most() { tailnet_stream_end "$1" && SAID="$LOST of $SENT lost, $GAP_MS ms" && [ "$GAP_MS" -le "$2" ]; }

# A node's machine sleeps, and its clock is wrong when the node starts again: it is reached all the same.
row_clocks() {
  tailnet_up
  hosts a b c
  clock_make
  clock_set "$LAB_DIR/clock" 0 0
  RINGTAIL=$(clock_wrap "$LAB_DIR/clock" "$RINGTAIL") tailnet_ringtail a a
  tailnet_ringtail b b
  tailnet_tailscaled c c
  ready a b c || return 0
  tailnet_pings a b 1
  check "the sleeper reaches tailscaled" tailnet_pings a c 2
  within 15 tailnet_direct a c
  sleeps 600 "direct, after a sleep"
  tailnet_block a
  within 15 relayed a b
  within 15 relayed a c
  sleeps 7200 "by relay, after a sleep in which the relay has forgotten it"
  tailnet_stop a KILL
  # Two days: the relay's certificate is not valid yet by that clock.
  clock_set "$LAB_DIR/clock" 7800 -172800
  tailnet_stream b a from-b
  tailnet_stream c a from-c
  RINGTAIL=$LAB_DIR/clock.run tailnet_start a
  within 20 rt a status >/dev/null 2>&1
  answers_streams "by relay, restarted with the clock two days behind"
  check "and the log says that the clock is behind" grep -q "the clock is behind" "$LAB_DIR/node-a.log"
}
# sleeps SECONDS HOW: node a, for so long by its clock. The others have lost their keys meanwhile, as after three
# minutes they would, and on the way to the relay nobody knows the old connection.
sleeps() {
  local relayed
  kill -STOP "$(lab_pid node-a)"
  tailnet_stop b
  tailnet_stop c
  relayed=$(lab_in a ss -Htn state established dst 203.0.113.1 | awk '{ sub(/.*:/, "", $3); print $3 }')
  lab_in inet nft "table inet forgotten_$1 { chain pass { type filter hook forward priority filter;
    tcp sport { ${relayed//$'\n'/, } } ip saddr 203.0.113.11 drop; }; }"
  tailnet_start b
  tailnet_start c
  within 40 tailnet_online b && within 40 tailnet_online c || echo "the others are not back"
  tailnet_stream a b from-b
  tailnet_stream a c from-c
  pause 3
  clock_set "$LAB_DIR/clock" $((SLEPT = ${SLEPT:-0} + $1)) 0
  kill -CONT "$(lab_pid node-a)"
  answers_streams "$2"
}
# answers_streams HOW: from now.
answers_streams() {
  local now
  now=$(date +%s%N)
  pause 8
  check "$1: ringtail answers within a second" answered_within from-b "$now" 1000
  check "$1: tailscaled answers within a second" answered_within from-c "$now" 1000
}
# answered_within STREAM SINCE_NS MS: the first answer is there by then, and few get none from then on.
answered_within() {
  tailnet_stream_end "$1"
  local ms late
  read -r ms late < <(jq -r --argjson since "$2" --argjson most "$3" '[.echoes[] | .sent_ns = (.sent_ns - $since) / 1e6]
    | [.[] | select(.rtt_us != null) | .sent_ns + .rtt_us / 1e3 | select(. >= 0)] as $answers
    | [.[] | select(.rtt_us == null and .sent_ns > $most)] as $late
    | "\($answers | min // infinite | round) \($late | length)"' "$LAB_DIR/$1.json")
  SAID="after $ms ms, $late lost later, $LOST in all"
  awk -v ms="$ms" -v most="$3" -v late="$late" 'BEGIN { exit !(ms <= most && late <= 5) }'
}

# ---- the rows are held -----------------------------------------------------------------------

ROWS=()
for row in $(declare -F | awk '$3 ~ /^row_/ { print substr($3, 5) }'); do
  [ -n "$ONLY" ] && [[ $ONLY != *,$row,* ]] || ROWS+=("$row")
done
[ ${#ROWS[@]} -gt 0 ] || { echo "rows: $(declare -F | awk '$3 ~ /^row_/ { printf " %s", substr($3, 5) }')"; exit 2; }

lab_or_skip
BEGAN=$SECONDS
lab_init
[ -z "$KEEP" ] || : >"$LAB_DIR/keep"
lab_run need_packages ip=iproute2 nft=nftables ping=iputils-ping awk=mawk jq=jq python3=python3-minimal \
  cc=gcc /usr/include/stdio.h=libc6-dev
lab_run install_peers "${TAILNET_PEERS[@]}"
for program in "${TAILNET_PEERS[@]}"; do
  if ! peer_path "$program" >/dev/null; then
    echo "SKIPPED: ${0##*/} needs $program" >&2
    [ "${RINGTAIL_NO_SKIP:-}" != 1 ] || exit 1
    exit 0
  fi
  echo "      $program: $(peer_version "$program")"
done
if [ -z "${RINGTAIL_BIN_DIR:-}" ]; then
  lab_run build_programs
  RINGTAIL_BIN_DIR=${CARGO_TARGET_DIR:-$ROOT/target}/debug
fi
# shellcheck disable=SC2034 # used by tailnet.sh
RINGTAIL=$RINGTAIL_BIN_DIR/ringtail BENCH=$RINGTAIL_BIN_DIR/ringtail-bench
echo "      (peers and binaries: $((SECONDS - BEGAN)) s)"

declare -A PROCESSES=() SINCE=()
# hold ROW [TRY]: in the background.
hold() {
  local checks=$LAB_DIR/$1${2:-}.checks
  : >"$checks"
  (
    # What goes wrong is told by checks, and the rest of a row is held all the same.
    set +e
    lab_within "$1${2:-}"
    TITLE=$1 CHECKS=$checks
    "row_$1"
    ! grep -q '^FAIL' "$checks" || tailnet_logs >"$LAB_DIR.logs"
    # The shell would print how each of its children ended.
    [ -n "$KEEP" ] || { exec 2>/dev/null && lab_remove; }
  ) &
  PROCESSES[$1]=$! SINCE[$1]=$SECONDS
  lab_note_pid $! row
}
# has_ended ROW [TRY]: by itself, or because it took too long.
has_ended() {
  local pid=${PROCESSES[$1]} checks=$LAB_DIR/$1${2:-}.checks
  if kill -0 "$pid" 2>/dev/null; then
    [ $((SECONDS - SINCE[$1])) -ge $ROW_S ] || return 1
    kill "$pid"
    echo "FAIL  $1: has not ended after $ROW_S s" | tee -a "$checks"
    (lab_within "$1${2:-}" && tailnet_logs >"$LAB_DIR.logs" && lab_remove)
  fi
  # A row that broke off has not passed, whatever it counted.
  wait "$pid" 2>/dev/null || echo "FAIL  $1: broke off" | tee -a "$checks"
  unset "PROCESSES[$1]"
}
well() { grep -q '^ok' "$LAB_DIR/$1.checks" && ! grep -q '^FAIL' "$LAB_DIR/$1.checks"; }

too_late() {
  cat "$LAB_DIR"/*.checks 2>/dev/null | grep '^FAIL' || true
  echo "tailnet-test: failed, for it did not end within $LIMIT minutes (--limit)"
}
lab_limit $((LIMIT * 60)) too_late

NEXT=0
while [ $NEXT -lt ${#ROWS[@]} ] || [ ${#PROCESSES[@]} -gt 0 ]; do
  while [ $NEXT -lt ${#ROWS[@]} ] && [ ${#PROCESSES[@]} -lt "$JOBS" ]; do
    hold "${ROWS[$NEXT]}"
    NEXT=$((NEXT + 1))
  done
  pause 0.2
  for row in "${!PROCESSES[@]}"; do
    ! has_ended "$row" || echo "      ($row: $((SECONDS - SINCE[$row])) s)"
  done
done

FAILING=() AGAIN=()
for row in "${ROWS[@]}"; do
  well "$row" || FAILING+=("$row")
done
if [ ${#FAILING[@]} -le $AGAIN_MAX ] && [ -z "$KEEP" ]; then
  for row in ${FAILING[@]+"${FAILING[@]}"}; do
    echo "      once more, alone: $row"
    hold "$row" 2
    until has_ended "$row" 2; do pause 0.2; done
    mv "$LAB_DIR/$row.checks" "$LAB_DIR/$row.first" && mv "$LAB_DIR/${row}2.checks" "$LAB_DIR/$row.checks"
    if well "$row"; then AGAIN+=("failed beside others, passed alone: $row"); else AGAIN+=("failed twice: $row"); fi
  done
fi

cat "$LAB_DIR"/*.checks >"$LAB_DIR/checks"
PASSED=$(counted ok) FAILED=$(counted FAIL)
echo
if [ "$FAILED" -gt 0 ]; then
  cat "$LAB_DIR"/*.logs 2>/dev/null || true
  grep '^FAIL' "$LAB_DIR/checks"
fi
[ ${#AGAIN[@]} = 0 ] || printf 'again %s\n' "${AGAIN[@]}"
[ -z "$KEEP" ] || echo "the lab stays up; take it down: scripts/netns/lab.sh remove $LAB $LAB_DIR"
echo "tailnet-test: $PASSED passed, $FAILED failed, in $SECONDS s"
[ "$FAILED" = 0 ] && [ "$PASSED" -gt 0 ]
