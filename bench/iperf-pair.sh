#!/usr/bin/env bash
# Two ringtail nodes meet through a relay, go direct, lose the direct path and find it again; then
# iperf3 runs through the tunnel, beside the other WireGuard programs found on this machine.
#
# Act one, the story. Coordination and both relays are ringtail's own.
#
#                 coord 10.255.0.1   (private address: plain HTTP)
#                          |
#    nyc 203.0.113.1 --- inet --- fra 203.0.113.2        DERP over TLS, and STUN
#                      |      |
#        203.0.113.11  ra    rb  203.0.113.12            easy NAT: endpoint-independent mapping,
#         2001:db8::11 |      |  2001:db8::12            address-and-port-dependent filtering
#        192.168.1.2   a      b  192.168.2.2
#        2001:db8:1::2                  2001:db8:2::2
#
#    a <-> fra and b <-> nyc pass through the link emulator: 10 ms each way, 20 ms there and back.
#    a <-> nyc, b <-> fra and a <-> b do not.
#
# Act two, the figures. The plainest underlay there is.
#
#    left 192.0.2.1 ----- veth ----- 192.0.2.2 right     direct; as routers, with a host each behind them, west and east
#        \                                 /
#         198.51.100.2 ---- hub ---- 198.51.100.6        one relay 203.0.113.1, and coordination, on a third host
#
# For a relayed path the veth between left and right is down, so that there is no other; the relay is
# `ringtail derp` or derper, for two ringtails and for two tailscaled alike.
#
# Each box is a network namespace of this run's own; nothing outside of them is touched, and they go
# away however this script ends. Needs root, Debian and Rust; installs what else it needs.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bench/iperf-pair.sh [options]

  --seconds N     length of each iperf3 test (default 4)
  --relay-only    act two: only relayed paths of ringtail
  --direct-only   act two: only the direct path of ringtail
  --mtu N         inner MTU of every program (default 1420)
  --shards N      data plane threads per node (default 1)
  --full          three interleaved rounds with median and spread, unpinned and pinned, CUBIC and BBR
  --rounds N      rounds of --full (default 3)
  --peers         install boringtun-cli, gotatun, wireguard-go, tailscaled and derper into a cache first
  --only LIST     act two: only these programs, by comma (ringtail,ringtail-device,veth,wireguard-go,
                  boringtun-cli,gotatun,kernel,tailscaled; through a relay: ringtail-relay,ringtail-derper,
                  tailscaled-relay,tailscaled-derper; ringtail-boringtun: ringtail device with --engine
                  boringtun; ringtail-router, ringtail-router-snat: from a host behind one to a host behind the
                  other; dataplane: see start_dataplane)
  --skip-story    no act one
  --skip-figures  no act two
  --json          print the results as JSON instead of tables
  --keep          leave the lab of the last act up, and print how to enter it
  --help          this text
TEXT
}

SECONDS_PER_TEST=4 MTU=1420 SHARDS=1 ROUNDS=1
RELAY_ONLY='' DIRECT_ONLY='' FULL='' KEEP='' JSON='' PEERS='' ONLY='' STORY=1 FIGURES=1
while [ $# -gt 0 ]; do
  case $1 in
    --seconds | --mtu | --shards | --only | --rounds)
      [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
      case $1 in
        --seconds) SECONDS_PER_TEST=$2 ;;
        --mtu) MTU=$2 ;;
        --shards) SHARDS=$2 ;;
        --rounds) FULL_ROUNDS=$2 ;;
        --only) ONLY=,$2, ;;
      esac
      [ "$1" = --only ] || [[ $2 =~ ^[1-9][0-9]*$ ]] || { echo "$1: not a number: $2" >&2; exit 2; }
      shift ;;
    --relay-only) RELAY_ONLY=1 ;;
    --direct-only) DIRECT_ONLY=1 ;;
    --full) FULL=1 ;;
    --peers) PEERS=1 ;;
    --skip-story) STORY= ;;
    --skip-figures) FIGURES= ;;
    --json) JSON=1 ;;
    --keep) KEEP=1 ;;
    --help | -h) usage; exit ;;
    *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
[ -z "$FULL" ] || ROUNDS=${FULL_ROUNDS:-3}
[ "$(id -u)" = 0 ] || { echo "bench/iperf-pair.sh needs root: it makes network namespaces" >&2; exit 1; }

ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
# With --json only the JSON goes to standard output.
exec 3>&1
[ -z "$JSON" ] || exec 1>&2

# ---- what is needed --------------------------------------------------------------------------

# shellcheck source=../scripts/netns/packages.sh
. scripts/netns/packages.sh
need_packages iperf3=iperf3 ip=iproute2 nft=nftables ping=iputils-ping taskset=util-linux ethtool=ethtool awk=mawk jq=jq \
  cc=gcc /usr/include/stdio.h=libc6-dev
# For profiles of these runs; the figures do not need it.
need_packages perf=linux-perf || true

# shellcheck source=../scripts/netns/peers.sh
. scripts/netns/peers.sh

command -v cargo >/dev/null || { echo "no cargo: install Rust from https://rustup.rs first" >&2; exit 1; }
if [ -z "${RINGTAIL_BIN_DIR:-}" ]; then
  echo "building ringtail (release) ..."
  RINGTAIL_BIN_DIR=${CARGO_TARGET_DIR:-$ROOT/target}/release
  if [[ $ONLY = *,ringtail-boringtun,* ]]; then
    cargo build --release --locked --quiet -p ringtail --features boringtun
    cp "$RINGTAIL_BIN_DIR/ringtail" "$RINGTAIL_BIN_DIR/ringtail-boringtun"
  fi
  build_programs --release
fi
RINGTAIL=$RINGTAIL_BIN_DIR/ringtail
BENCH=$RINGTAIL_BIN_DIR/ringtail-bench

if [ -n "$PEERS" ]; then
  echo "installing the programs to compare with ..."
  install_peers "${WIREGUARD_PEERS[@]}" tailscaled tailscale derper
  # Without Go the packaged one, which is years older, stands in.
  peer_path wireguard-go >/dev/null || install_peers wireguard-go-debian
fi

# ---- results and lab -------------------------------------------------------------------------

# shellcheck source=../scripts/netns/lab.sh
. scripts/netns/lab.sh
# shellcheck source=../scripts/netns/checks.sh
. scripts/netns/checks.sh
# shellcheck source=../scripts/netns/tailnet.sh
. scripts/netns/tailnet.sh
# shellcheck source=../scripts/netns/story.sh
. scripts/netns/story.sh
lab_init
STARTED_AT=$EPOCHREALTIME
RESULTS=$ROOT/bench/results/$(date +%Y-%m-%dT%H-%M-%S)-$$
mkdir -p "$RESULTS"

elapsed() { awk -v a="$STARTED_AT" -v b="$EPOCHREALTIME" 'BEGIN { d = b - a; printf "%d:%02d", d / 60, d % 60 }'; }
now_ns() { date +%s%N; }
# note TEXT: what the script itself does, into the story.
note() {
  printf '{"t_ns":%s,"node":"lab","event":"note","text":"%s"}\n' "$(now_ns)" "$1" >>"$RESULTS/lab.events"
}
# lab_event NAME: a mark for the report.
lab_event() { printf '{"t_ns":%s,"node":"lab","event":"%s"}\n' "$(now_ns)" "$1" >>"$RESULTS/lab.events"; }

# ---- act one ---------------------------------------------------------------------------------

act_one() {
  echo
  echo "ACT ONE: two nodes behind NATs meet through a relay, go direct, fall back, and go direct again"
  echo
  story_topology
  start_story_hosts || fail "the relays or coordination did not start"

  local start stop=$LAB_DIR/story.stop
  start=$(now_ns)
  : >"$RESULTS/lab.events"
  "$BENCH" story --start-ns "$start" --stop-file "$stop" "$RESULTS"/{lab,a,b,ping}.events &
  local story=$!
  lab_note_pid $story story
  note "coordination at 10.255.0.1, relays nyc 203.0.113.1 and fra 203.0.113.2; each node's farther relay is 20 ms farther"
  lab_event start
  local node
  for node in a b; do
    start_node $node "$RESULTS/$node.events"
  done
  for node in a b; do
    "$BENCH" wait "$RESULTS/$node.events" derp_connected --where home=true --timeout 15 >/dev/null ||
      fail "node $node has no home relay"
  done
  # Each must know where the other is at home now.
  "$BENCH" wait "$RESULTS/a.events" peer --where home=fra --timeout 15 >/dev/null || fail "A never learned B's home"
  "$BENCH" wait "$RESULTS/b.events" peer --where home=nyc --timeout 15 >/dev/null || fail "B never learned A's home"
  local address
  address=$(peer_address a) || fail "A does not know B's inner address"
  pause 1

  note "A starts to ping B ($address) through the tunnel, 100 times a second"
  lab_event ping_start
  lab_spawn a ping "$BENCH" ping "$address" --rate 100 --stop-file "$LAB_DIR/ping.stop" \
    --events "$RESULTS/ping.events" --out "$RESULTS/ping.json"
  local since since_unblock
  since=$(now_ns)
  for node in a b; do
    "$BENCH" wait "$RESULTS/$node.events" path --where state=direct --timeout 20 >/dev/null ||
      fail "node $node found no direct path"
  done
  lab_event direct
  pause 7

  note "a rule on A and on B now drops what arrives on the direct path, without a word"
  since=$(now_ns)
  lab_event block
  lab_block a 2
  lab_block b 1
  for node in a b; do
    "$BENCH" wait "$RESULTS/$node.events" path --where 'state=fallback|relay|probing' --since-ns "$since" --timeout 20 \
      >/dev/null || fail "node $node did not notice that its path died"
  done
  pause 6

  note "the rules are gone"
  since_unblock=$(now_ns)
  lab_event unblock
  lab_unblock a
  lab_unblock b
  for node in a b; do
    "$BENCH" wait "$RESULTS/$node.events" path --where state=direct --since-ns "$since_unblock" --timeout 30 >/dev/null ||
      fail "node $node did not go direct again"
  done
  pause 3
  : >"$LAB_DIR/ping.stop"
  wait "$(lab_pid ping)" || true
  lab_event end
  for node in a b; do
    "$RINGTAIL" status --json --state-dir "$LAB_DIR/node-$node" >"$RESULTS/status-$node.json" || true
  done
  : >"$stop"
  wait $story || true
  "$BENCH" report "$RESULTS" --act one
  if [ -n "$KEEP" ] && [ -z "$FIGURES" ]; then
    return
  fi
  for node in node-a node-b coord nyc fra link; do
    lab_stop $node || true
  done
}

# ---- act two ---------------------------------------------------------------------------------

# Inner addresses; the plain veth has a pair of its own whose route carries the same MTU.
TUNNEL_LEFT=10.77.0.1 TUNNEL_RIGHT=10.77.0.2 PLAIN_LEFT=10.77.1.1 PLAIN_RIGHT=10.77.1.2

underlay() {
  lab_ns left right hub
  lab_wire left u0 right u0
  lab_wire left r0 hub left
  lab_wire right r0 hub right
  ip -n "${LAB}left" addr add 192.0.2.1/24 dev u0
  ip -n "${LAB}right" addr add 192.0.2.2/24 dev u0
  ip -n "${LAB}left" addr add 198.51.100.1/30 dev r0
  ip -n "${LAB}hub" addr add 198.51.100.2/30 dev left
  ip -n "${LAB}right" addr add 198.51.100.5/30 dev r0
  ip -n "${LAB}hub" addr add 198.51.100.6/30 dev right
  local address
  for address in 203.0.113.1 10.255.0.1; do
    ip -n "${LAB}hub" addr add $address/32 dev lo
    ip -n "${LAB}left" route add $address/32 via 198.51.100.2
    ip -n "${LAB}right" route add $address/32 via 198.51.100.6
  done
}

# Nodes announce every address of their host as an endpoint, so that these are there for the plain veth alone.
start_plain() {
  ip -n "${LAB}left" addr add $PLAIN_LEFT/32 dev u0 && ip -n "${LAB}right" addr add $PLAIN_RIGHT/32 dev u0 &&
    ip -n "${LAB}left" route add $PLAIN_RIGHT dev u0 src $PLAIN_LEFT mtu "$MTU" &&
    ip -n "${LAB}right" route add $PLAIN_LEFT dev u0 src $PLAIN_RIGHT mtu "$MTU" || return 1
  TARGET=$PLAIN_RIGHT
}

# Pinned layout: client and right node on CPU 0, left node and server on CPU 1.
# run_tunnel NS LABEL COMMAND...
run_tunnel() {
  local ns=$1 label=$2 cpu=
  shift 2
  if [ "$LAYOUT" = pinned ]; then
    [ "$ns" = left ] && cpu=1 || cpu=0
  fi
  # shellcheck disable=SC2086 # nothing, or three words
  lab_spawn "$ns" "$label" ${cpu:+taskset -c $cpu} "$@"
}

start_userspace() { # start_userspace COMMAND...: one of the programs that are configured by UAPI
  local left=l$$ right=r$$ lkey lpub rkey rpub
  printf '/var/run/wireguard/%s.sock\n' $left $right >>"$LAB_DIR/files"
  read -r lkey lpub < <("$BENCH" wgkeys)
  read -r rkey rpub < <("$BENCH" wgkeys)
  run_tunnel left left "$@" "$left"
  run_tunnel right right "$@" "$right"
  "$BENCH" uapi --interface $left --private-key "$lkey" --listen-port 51820 --peer "$rpub" \
    --endpoint 192.0.2.2:51820 --allowed-ip $TUNNEL_RIGHT/32 || return 1
  "$BENCH" uapi --interface $right --private-key "$rkey" --listen-port 51820 --peer "$lpub" \
    --endpoint 192.0.2.1:51820 --allowed-ip $TUNNEL_LEFT/32 || return 1
  tunnel_up left $left $TUNNEL_LEFT && tunnel_up right $right $TUNNEL_RIGHT
}

tunnel_up() { # NS INTERFACE ADDRESS
  ip -n "$LAB$1" link set "$2" mtu "$MTU" up && ip -n "$LAB$1" addr add "$3/24" dev "$2"
}

# set_by_wg INTERFACE_LEFT INTERFACE_RIGHT: keys, ports and peers, by wg(8).
set_by_wg() {
  local lkey rkey
  lkey=$(wg genkey) rkey=$(wg genkey)
  lab_in left wg set "$1" listen-port 51820 private-key <(echo "$lkey") peer "$(wg pubkey <<<"$rkey")" \
    endpoint 192.0.2.2:51820 allowed-ips $TUNNEL_RIGHT/32 || return 1
  lab_in right wg set "$2" listen-port 51820 private-key <(echo "$rkey") peer "$(wg pubkey <<<"$lkey")" \
    endpoint 192.0.2.1:51820 allowed-ips $TUNNEL_LEFT/32 || return 1
  tunnel_up left "$1" $TUNNEL_LEFT && tunnel_up right "$2" $TUNNEL_RIGHT
}

start_kernel() {
  need_packages wg=wireguard-tools
  ip -n "${LAB}left" link add wg0 type wireguard && ip -n "${LAB}right" link add wg0 type wireguard || return 1
  set_by_wg wg0 wg0
}

# Ours as a plain WireGuard device: no coordination, no relay, nothing but wg(8).
start_device() { # start_device [OPTION...]
  local left=l$$ right=r$$ options=(--shards "$SHARDS" "$@")
  need_packages wg=wireguard-tools
  [ "$LAYOUT" = pinned ] && options+=(--pin) || options+=(--no-pin)
  printf '/var/run/wireguard/%s.sock\n' $left $right >>"$LAB_DIR/files"
  run_tunnel left left "$RINGTAIL" device -f "${options[@]}" $left
  run_tunnel right right "$RINGTAIL" device -f "${options[@]}" $right
  local side
  for side in $left $right; do
    lab_wait_file "/var/run/wireguard/$side.sock" 5 || return 1
  done
  set_by_wg $left $right
}

# The relay, of the kind that the path names, and whether there is another way.
start_path() { # direct|relay|derper
  if [ "$1" = derper ]; then
    start_derper hub relay 203.0.113.1 900 nyc || return 1
  else
    start_relay hub relay 203.0.113.1 900 nyc || return 1
  fi
  [ "$1" = direct ] || ip -n "${LAB}left" link set u0 down
  make_derp_map relay
}

# A host behind each node: west at 10.77.2.2, east at 10.77.3.2.
start_sites() {
  site west left 10.77.2 && site east right 10.77.3 && CLIENT=west SERVER=east TARGET=10.77.3.2
}
site() { # HOST NODE NET
  [ -e "/run/netns/$LAB$1" ] || lab_ns "$1" || return 1
  lab_wire "$1" s0 "$2" s0 && ip -n "$LAB$1" addr add "$3.2/24" dev s0 && ip -n "$LAB$2" addr add "$3.1/24" dev s0 &&
    ip -n "$LAB$1" route replace default via "$3.1"
}

start_ringtail() { # direct|relay|derper [SNAT]: with SNAT, true or false, as routers
  start_path "$1" || return 1
  [ -z "${2:-}" ] || start_sites || return 1
  local side
  for side in left right; do
    rm -rf "$LAB_DIR/$side.state" "$RESULTS/$side.events"
    "$RINGTAIL" genkey --state-dir "$LAB_DIR/$side.state" >"$LAB_DIR/$side.keys" || return 1
  done
  network $TUNNEL_LEFT right $TUNNEL_RIGHT 192.0.2.2 ${2:+10.77.3.0/24} >"$LAB_DIR/left.toml"
  network $TUNNEL_RIGHT left $TUNNEL_LEFT 192.0.2.1 ${2:+10.77.2.0/24} >"$LAB_DIR/right.toml"
  local options=(--mtu "$MTU" --shards "$SHARDS" --listen-port 41641)
  [ "$LAYOUT" = pinned ] && options+=(--pin true) || options+=(--no-pin)
  for side in left right; do
    run_tunnel $side $side "$RINGTAIL" up --network "$LAB_DIR/$side.toml" --state-dir "$LAB_DIR/$side.state" \
      --tun rt0 --hostname $side --events "$RESULTS/$side.events" "${options[@]}" \
      ${2:+--advertise-routes "$([ $side = left ] && echo 10.77.2.0/24 || echo 10.77.3.0/24)" --snat-subnet-routes "$2"}
  done
  for side in left right; do
    "$BENCH" wait "$RESULTS/$side.events" derp_connected --timeout 10 >/dev/null || return 1
  done
}

# Two tailscaled, which need coordination: ours, with nothing to do while traffic runs.
start_tailscaled() { # direct|relay|derper
  start_path "$1" || return 1
  rm -rf "$LAB_DIR"/{coord,auth-key,node-left,node-right,left.addresses,right.addresses}
  COORD_NS=hub
  start_coord || return 1
  local side
  for side in left right; do
    TAILNET_RUN=(env TS_DEBUG_MTU="$MTU")
    [ "$LAYOUT" != pinned ] || TAILNET_RUN+=(taskset -c $([ $side = left ] && echo 1 || echo 0))
    tailnet_tailscaled $side $side --netfilter-mode=off
  done
  tailnet_ready left right && TARGET=$(tailnet_ip right)
}

# The data plane without its control thread, for whoever works on it: --only dataplane, and built by
# cargo build --release -p ringtail-dataplane --example pair
start_dataplane() {
  local options=(--mtu "$MTU" --shards "$SHARDS" --tun rt0 --port 41641)
  [ "$LAYOUT" != pinned ] || options+=(--pin)
  run_tunnel left left "$RINGTAIL_BIN_DIR/examples/pair" --seed 1 --peer-seed 2 --addr $TUNNEL_LEFT/24 \
    --peer-ip $TUNNEL_RIGHT --endpoint 192.0.2.2:41641 "${options[@]}"
  run_tunnel right right "$RINGTAIL_BIN_DIR/examples/pair" --seed 2 --peer-seed 1 --addr $TUNNEL_RIGHT/24 \
    --peer-ip $TUNNEL_LEFT --endpoint 192.0.2.1:41641 "${options[@]}"
}

network() { # own address; the peer's name, address, endpoint, and what else it routes: a static network file
  local routes="\"$3/32\""
  [ -z "${5:-}" ] || routes+=", \"$5\""
  cat <<TOML
addresses = ["$1/24"]
home = "nyc"
derp_map = "derp-map.json"

[[peer]]
name = "$2"
$(cat "$LAB_DIR/$2.keys")
home = "nyc"
addresses = ["$3/32"]
allowed_ips = [$routes]
endpoints = ["$4:41641"]
TOML
}

# The labels of what start_program starts.
PROGRAM_LABELS=(left right node-left node-right relay coord)

# start_program NAME: brings it up in both namespaces; sets TARGET and PROCESSES.
start_program() {
  TARGET=$TUNNEL_RIGHT CLIENT=left SERVER=right
  PROCESSES=()
  case $1 in
    veth) start_plain ;;
    ringtail | tailscaled) start_$1 direct ;;
    ringtail-relay | ringtail-derper | tailscaled-relay | tailscaled-derper) "start_${1%-*}" "${1#*-}" ;;
    ringtail-router) start_ringtail direct false ;;
    ringtail-router-snat) start_ringtail direct true ;;
    ringtail-device) start_device ;;
    ringtail-boringtun) RINGTAIL=$RINGTAIL-boringtun start_device --engine boringtun ;;
    # In the foreground, so that its process is the one we started.
    wireguard-go)
      peer_command wireguard-go || peer_command wireguard-go-debian
      start_userspace "${PEER_COMMAND[@]}" ;;
    boringtun-cli | gotatun) peer_command "$1" && start_userspace "${PEER_COMMAND[@]}" ;;
    kernel) start_kernel ;;
    dataplane) start_dataplane ;;
  esac || return 1
  local label
  for label in "${PROGRAM_LABELS[@]}"; do
    ! lab_alive "$label" || PROCESSES+=(--proc "${label#node-}=$(lab_pid "$label")")
  done
  # The first packets make the session; a node's also find the direct path.
  lab_in $CLIENT "$BENCH" ping $TARGET --rate 20 --seconds 1 >/dev/null || true
  case $1 in
    ringtail | ringtail-router*)
      for label in left right; do
        "$BENCH" wait "$RESULTS/$label.events" path --where state=direct --timeout 15 >/dev/null || return 1
      done ;;
    tailscaled) within 15 tailnet_direct left right || return 1 ;;
  esac
  lab_in $CLIENT "$BENCH" ping $TARGET --rate 20 --seconds 0.5 --lost-max 2 >/dev/null
}

stop_program() {
  local label
  if [[ $1 == ringtail* ]]; then
    for label in left right; do
      "$RINGTAIL" status --json --state-dir "$LAB_DIR/$label.state" >"$RESULTS/status-$1-$label.json" 2>/dev/null || true
    done
  fi
  for label in "${PROGRAM_LABELS[@]}"; do
    lab_stop "$label" || true
  done
  rm -rf "$LAB_DIR/relay"
  ip -n "${LAB}left" link set u0 up
  ip -n "${LAB}left" link del s0 2>/dev/null || true
  ip -n "${LAB}right" link del s0 2>/dev/null || true
  ip -n "${LAB}left" link del wg0 2>/dev/null || true
  ip -n "${LAB}right" link del wg0 2>/dev/null || true
  # The routes go with them.
  ip -n "${LAB}left" addr del $PLAIN_LEFT/32 dev u0 2>/dev/null || true
  ip -n "${LAB}right" addr del $PLAIN_RIGHT/32 dev u0 2>/dev/null || true
}

# path_of PROGRAM: direct, relay (`ringtail derp`) or derper.
path_of() { case $1 in *-relay) echo relay ;; *-derper) echo derper ;; *) echo direct ;; esac; }

find_programs() {
  PROGRAMS=()
  local program
  [ -n "$RELAY_ONLY" ] || PROGRAMS+=(ringtail ringtail-router ringtail-router-snat ringtail-device)
  [ -n "$DIRECT_ONLY" ] || PROGRAMS+=(ringtail-relay)
  [ -n "$DIRECT_ONLY" ] || ! peer_path derper >/dev/null || PROGRAMS+=(ringtail-derper)
  PROGRAMS+=(veth)
  for program in wireguard-go boringtun-cli gotatun; do
    if peer_path $program >/dev/null || { [ $program = wireguard-go ] && peer_path wireguard-go-debian >/dev/null; }; then
      PROGRAMS+=("$program")
    else
      MISSING+=("$program")
    fi
  done
  if peer_path tailscaled >/dev/null && peer_path tailscale >/dev/null; then
    PROGRAMS+=(tailscaled tailscaled-relay)
    ! peer_path derper >/dev/null || PROGRAMS+=(tailscaled-derper)
  else
    MISSING+=(tailscaled)
  fi
  if ip link add "wg$$" type wireguard 2>/dev/null; then
    ip link del "wg$$"
    PROGRAMS+=(kernel)
  else
    MISSING+=(kernel-WireGuard)
  fi
  if [ -n "$ONLY" ]; then
    local chosen=()
    PROGRAMS+=(ringtail-boringtun dataplane)
    for program in "${PROGRAMS[@]}"; do
      [[ $ONLY != *,$program,* ]] || chosen+=("$program")
    done
    PROGRAMS=("${chosen[@]}")
  fi
}

measure_program() { # PROGRAM ROUND: with LAYOUT and CCS set
  local program=$1 round=$2 kind cc path name kinds="ping tcp1 tcp4 reverse bidir udp-small udp-full"
  path=$(path_of "$program")
  name=${program%-"$path"}
  # What is told of relays and of tailscaled needs no more, and a run is to stay short.
  case $program in *-derper | tailscaled* | ringtail-router*) [ -n "$FULL" ] || kinds="ping tcp1 tcp4" ;; esac
  local common=(--program "$name" --path "$path" --mtu "$MTU"
    --round "$round" --layout "$LAYOUT" --out "$RESULTS/cells.jsonl")
  if ! start_program "$program"; then
    printf '[%s]  %-20s could not be started\n' "$(elapsed)" "$name $path"
    for label in "${PROGRAM_LABELS[@]}"; do
      [ ! -s "$LAB_DIR/$label.log" ] || tail -n 5 "$LAB_DIR/$label.log"
    done
    printf '{"program":"%s","path":"%s","layout":"%s","cc":"cubic","round":%s,"kind":"tcp1","error":"%s"}\n' \
      "$name" "$path" "$LAYOUT" "$round" "could not be started" >>"$RESULTS/cells.jsonl"
    stop_program "$program"
    return 0
  fi
  common+=(--client "$LAB$CLIENT" --server "$LAB$SERVER")
  for kind in $kinds; do
    for cc in $CCS; do
      # Congestion control is TCP's alone.
      case $kind in ping | udp-*) [ "$cc" = cubic ] || continue ;; esac
      local seconds=$SECONDS_PER_TEST
      [ $kind != ping ] || seconds=2
      lab_run "$BENCH" cell $kind "${common[@]}" --target $TARGET --seconds "$seconds" --cc "$cc" "${PROCESSES[@]}" \
        >"$LAB_DIR/words" || true
      printf '[%s of about %s]  %-20s %-9s%s %s\n' "$(elapsed)" "$ESTIMATE" "$name $path" $kind \
        "$([ "$CCS" = cubic ] || echo " $cc")" "$(cat "$LAB_DIR/words")"
    done
  done
  stop_program "$program"
}

act_two() {
  MISSING=()
  find_programs
  [ ${#PROGRAMS[@]} -gt 0 ] || fail "nothing to measure"
  underlay
  local layouts=unpinned
  CCS=cubic
  if [ -n "$FULL" ]; then
    CCS="cubic bbr"
    grep -qw bbr /proc/sys/net/ipv4/tcp_available_congestion_control || CCS=cubic
    [ "$(nproc)" -lt 2 ] || layouts="unpinned pinned"
  fi
  local per_cell=$((SECONDS_PER_TEST * 10 + 5)) tcp=4 total
  [ "$CCS" = cubic ] || tcp=8
  total=$((ROUNDS * $(wc -w <<<"$layouts") * ${#PROGRAMS[@]} * ((tcp + 2) * per_cell + 55) / 10))
  total=$((total + $(awk -v a="$STARTED_AT" -v b="$EPOCHREALTIME" 'BEGIN { printf "%d", b - a }')))
  ESTIMATE=$((total / 60)):$(printf %02d $((total % 60)))

  echo
  echo "ACT TWO: ${PROGRAMS[*]}; inner MTU $MTU, $SHARDS shard(s), $SECONDS_PER_TEST s a test"
  [ ${#MISSING[@]} = 0 ] || echo "not found here, so not compared: ${MISSING[*]} (--peers installs what it can)"
  echo
  "$BENCH" machine --mtu "$MTU" --shards "$SHARDS" --seconds "$SECONDS_PER_TEST" --netns "${LAB}left" --interface u0 \
    --ringtail "$RINGTAIL" >"$RESULTS/machine.json"
  local round program
  for round in $(seq "$ROUNDS"); do
    for LAYOUT in $layouts; do
      for program in "${PROGRAMS[@]}"; do
        measure_program "$program" "$round"
      done
    done
  done
}

[ -z "$STORY" ] || act_one
[ -z "$FIGURES" ] || act_two
"$BENCH" report "$RESULTS" --act two --html "$RESULTS/report.html" --json-out "$RESULTS/results.json"
[ -z "$JSON" ] || cat "$RESULTS/results.json" >&3

if [ -n "$KEEP" ]; then
  : >"$LAB_DIR/keep"
  echo
  echo "the lab stays up:"
  ip netns list | awk -v p="$LAB" 'index($1, p) == 1 { print "  ip netns exec " $1 " bash" }'
  echo "logs and state: $LAB_DIR"
  echo "take it down:   $ROOT/scripts/netns/lab.sh remove $LAB $LAB_DIR"
fi
echo
echo "all of it took $(elapsed)"
echo "results: $RESULTS/results.json"
echo "report:  $RESULTS/report.html"
