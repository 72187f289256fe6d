#!/usr/bin/env bash
# Coordination against the real programs, on loopback, without root:
#
#   1. our client  <->  headscale v0.29.2      join by key, deltas, bad key
#   2. tailscaled 1.102.3 (two, userspace)  <->  our server and our relay
#                                              join, see each other, ping, server killed and back
#
# Needs headscale, tailscale and tailscaled in $INTEROP_BIN (default target/interop); builds them
# there when Go 1.26.6 or newer is present, and skips aloud what it cannot have.
set -euo pipefail
cd "$(dirname "$0")/.."

BIN=${INTEROP_BIN:-$PWD/target/interop}
RINGTAIL=${RINGTAIL:-$PWD/target/debug/ringtail}
DIR=$(mktemp -d "${TMPDIR:-/tmp}/rtinterop.XXXXXX")
PIDS=()
FAILED=0
HS_PORT=${HS_PORT:-18080}
CO_PORT=${CO_PORT:-18090}
DERP_PORT=${DERP_PORT:-13443}
STUN_PORT=${STUN_PORT:-13478}

finish() {
  for pid in "${PIDS[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  if [ "$FAILED" = 0 ] && [ -z "${KEEP:-}" ]; then rm -rf "$DIR"; else echo "logs in $DIR"; fi
}
trap finish EXIT

spawn() { # LOG COMMAND...: in the background, killed at the end; its id is in $SPAWNED
  local log=$1
  shift
  "$@" >"$DIR/$log.out" 2>"$DIR/$log.log" &
  SPAWNED=$!
  PIDS+=("$SPAWNED")
}

check() { # WHAT COMMAND...
  local what=$1
  shift
  if "$@"; then echo "ok    $what"; else
    echo "FAIL  $what"
    FAILED=1
  fi
}

within() { # SECONDS COMMAND...: until it succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@" 2>/dev/null; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.2
  done
}

says() { grep -qE "$2" "$DIR/$1.out"; } # LOG PATTERN

more_maps() { [ "$(grep -c '"event":"netmap"' "$DIR/hs-one.out")" -gt "$1" ]; }

no_secrets() { # KEYFILE: what a key holds is in no log or output of ours
  ! grep -sqF -f "$1" "$DIR"/coord.{log,out} "$DIR"/ours.{log,out} "$DIR"/hs-one.{log,out}
}

build_go() { # NAME MODULE@VERSION PACKAGE
  [ -x "$BIN/$1" ] && return 0
  command -v go >/dev/null || return 1
  echo "building $1 (minutes)"
  local module="$DIR/go-$1"
  mkdir -p "$BIN" "$module"
  (
    cd "$module"
    export GOFLAGS=-mod=mod CGO_ENABLED=0
    printf 'module interop\n\ngo 1.26.4\n\ntool %s\n' "$3" >go.mod
    go get "$2" && go build -o "$BIN/$1" "$3"
  ) >"$DIR/go-$1.log" 2>&1
}

watch() { # NAME URL KEYFILE OPTION...
  local name=$1 url=$2 key=$3
  shift 3
  spawn "$name" "$RINGTAIL" coord watch "$url" --auth-key-file "$key" --hostname "$name" "$@"
}

[ -x "$RINGTAIL" ] || cargo build -p ringtail

# ---- 1. our client and headscale ------------------------------------------------------------
headscale_part() {
  mkdir -p "$DIR/hs"
  cat >"$DIR/hs/config.yaml" <<YAML
server_url: http://127.0.0.1:$HS_PORT
listen_addr: 127.0.0.1:$HS_PORT
metrics_listen_addr: ""
grpc_listen_addr: 127.0.0.1:$((HS_PORT + 1))
noise: {private_key_path: ./noise_private.key}
prefixes: {v4: 100.64.0.0/10, v6: "fd7a:115c:a1e0::/48", allocation: sequential}
derp: {server: {enabled: false}, urls: [], paths: [$DIR/hs/derp.yaml], auto_update_enabled: false}
disable_check_updates: true
node: {expiry: 0, ephemeral: {inactivity_timeout: 70s}}
database: {type: sqlite, sqlite: {path: ./db.sqlite}}
log: {level: info}
policy: {mode: file, path: ""}
dns: {magic_dns: true, base_domain: tail.test, override_local_dns: false}
unix_socket: $DIR/hs/headscale.sock
unix_socket_permission: "0770"
logtail: {enabled: false}
tuning: {batch_change_delay: 50ms, node_store_batch_timeout: 20ms}
YAML
  cat >"$DIR/hs/derp.yaml" <<YAML
regions:
  900:
    regionid: 900
    regioncode: test
    regionname: Test
    nodes: [{name: 900a, regionid: 900, hostname: 127.0.0.1, ipv4: 127.0.0.1, ipv6: none, stunport: $STUN_PORT, derpport: $DERP_PORT, insecurefortests: true}]
YAML
  local hs="$BIN/headscale" server
  spawn headscale "$hs" -c "$DIR/hs/config.yaml" serve
  server=$SPAWNED
  within 20 curl -fs "http://127.0.0.1:$HS_PORT/health" >/dev/null || return 1
  "$hs" -c "$DIR/hs/config.yaml" users create alice >/dev/null 2>&1
  "$hs" -c "$DIR/hs/config.yaml" preauthkeys create -u 1 --reusable -e 24h 2>/dev/null | tail -1 >"$DIR/hs-key"

  watch hs-one "http://127.0.0.1:$HS_PORT" "$DIR/hs-key" --endpoint 192.0.2.1:41641 --home 900
  check "headscale lets our client in" within 10 says hs-one '"event":"registered".*alice'
  check "and gives it a map" within 10 says hs-one '"addresses":\["100.64.0.1/32".*"name":"hs-one.tail.test."'
  watch hs-two "http://127.0.0.1:$HS_PORT" "$DIR/hs-key" --endpoint 192.0.2.2:41641 --home 900
  local two=$SPAWNED
  check "a second node comes as a delta, with its endpoint" within 10 says hs-one '192.0.2.2:41641'
  check "and its home" within 10 says hs-one '"endpoints":\["192.0.2.2:41641"\],"expired":false,"home":900'
  check "and online" within 10 says hs-one '"name":"hs-two.tail.test.","online":true'
  kill "$two"
  check "it goes offline 10 s after it left" within 15 says hs-one '"name":"hs-two.tail.test.","online":false'
  kill -KILL "$server"
  check "a killed headscale is noticed" within 10 says hs-one '"event":"lost"'
  local maps
  maps=$(grep -c '"event":"netmap"' "$DIR/hs-one.out")
  spawn headscale2 "$hs" -c "$DIR/hs/config.yaml" serve
  check "and our client comes back to it" within 30 more_maps "$maps"
  echo "hskey-auth-AbCdEfGhIjKl-$(printf '0%.0s' $(seq 64))" >"$DIR/bad-key"
  watch hs-bad "http://127.0.0.1:$HS_PORT" "$DIR/bad-key"
  check "a bad key is final" within 10 says hs-bad 'invalid pre auth key.*"event":"fatal"'
}

if build_go headscale github.com/juanfont/headscale@v0.29.2 github.com/juanfont/headscale/cmd/headscale; then
  headscale_part || { echo "FAIL  headscale did not start"; FAILED=1; }
else
  echo "SKIPPED  our client and headscale: no headscale and no Go to build it"
fi

# ---- 2. real clients and our server ---------------------------------------------------------
start_coord() {
  spawn coord "$RINGTAIL" coord --addr "127.0.0.1:$CO_PORT" --state-dir "$DIR/coord" \
    --derp-map "$DIR/derp-map.json" --auth-key-file "$DIR/co-key"
  COORD=$SPAWNED
  within 10 curl -fs "http://127.0.0.1:$CO_PORT/health" >/dev/null
}

ts() { # NODE COMMAND...
  local node=$1
  shift
  "$BIN/tailscale" --socket="$DIR/$node/ts.sock" "$@"
}

start_tailscaled() { # NODE PORT
  mkdir -p "$DIR/$1"
  spawn "$1" env TS_NO_LOGS_NO_SUPPORT=1 TS_PANIC_IF_HIT_MAIN_CONTROL=1 TS_DISABLE_PORTMAPPER=1 \
    TS_ASSUME_NETWORK_UP_FOR_TEST=1 TS_LOGS_DIR="$DIR/$1" "$BIN/tailscaled" \
    --tun=userspace-networking --statedir="$DIR/$1" --socket="$DIR/$1/ts.sock" --port="$2" --no-logs-no-support
}

sees() { ts "$1" status 2>/dev/null | grep -q "$2"; }         # NODE PATTERN
pings() { ts "$1" ping --c=1 --timeout=5s "$2" >/dev/null 2>&1; } # NODE ADDRESS

tailscaled_part() {
  spawn derp "$RINGTAIL" derp --hostname 127.0.0.1 --addr "127.0.0.1:$DERP_PORT" --stun-port "$STUN_PORT" \
    --state-dir "$DIR/derp" --region-id 900 --region-code lab
  within 10 test -s "$DIR/derp/derp-node.json" || return 1
  printf '{"Regions":{"900":{"RegionID":900,"RegionCode":"lab","RegionName":"Lab","Nodes":[%s]}}}' \
    "$(cat "$DIR/derp/derp-node.json")" >"$DIR/derp-map.json"
  start_coord || return 1
  for n in 1 2; do
    start_tailscaled "ts$n" $((41710 + n))
    within 10 test -S "$DIR/ts$n/ts.sock" || return 1
    check "tailscale up completes for node $n" ts "ts$n" up --login-server="http://127.0.0.1:$CO_PORT" \
      --auth-key="$(cat "$DIR/co-key")" --hostname="ts$n" --timeout=30s
  done
  check "the nodes see each other by name" within 10 sees ts1 'ts2'
  check "a ping goes through" within 20 pings ts1 100.64.0.2
  check "and back" within 20 pings ts2 100.64.0.1
  watch ours "http://127.0.0.1:$CO_PORT" "$DIR/co-key" --home 900
  check "our client sees a real one with disco key, endpoint and home" within 10 \
    says ours '"disco":"discokey:[0-9a-f]{64}","endpoints":\["[^]]+\],"expired":false,"home":900,"id":1'
  check "and a real one sees ours" within 10 sees ts1 ours
  kill -KILL "$COORD" # a crash; its node table has to survive
  check "the nodes go on without the server" pings ts1 100.64.0.2
  start_coord || return 1
  check "ours is back at the killed server" within 20 bash -c "grep -c '\"event\":\"netmap\"' '$DIR/ours.out' | grep -qv '^[01]$' && tail -1 '$DIR/ours.out' | grep -q '\"name\":\"ts2.tail.internal.\",\"online\":true'"
  check "a ping goes through again" within 20 pings ts2 100.64.0.1
  check "no log of ours holds the auth key" no_secrets "$DIR/co-key"
  ts ts2 logout >/dev/null 2>&1 || true
  check "a log-out is told to the others" within 10 bash -c "tail -1 '$DIR/ours.out' | grep -q '\"expired\":true'"
}

if build_go tailscaled tailscale.com@v1.102.3 tailscale.com/cmd/tailscaled &&
  build_go tailscale tailscale.com@v1.102.3 tailscale.com/cmd/tailscale; then
  tailscaled_part || { echo "FAIL  server, relay or tailscaled did not start"; FAILED=1; }
else
  echo "SKIPPED  tailscaled and our server: no tailscaled and no Go to build it"
fi
exit "$FAILED"
