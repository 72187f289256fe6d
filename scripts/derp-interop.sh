#!/usr/bin/env bash
# The relay and its client against the real peers, where those are found; each missing one is said and
# skipped. Needs root for the second part (network namespaces).
#
#   1. our clients through derper: fast start, pin, packets both ways
#   2. two tailscaled through `ringtail derp`, coordinated by headscale: they may reach nothing but
#      coordination and the relay, so every reply has crossed it
#
#          a ---+                        all four on one bridge of a namespace; a rule drops
#               +--- hub: headscale,     what a and b send to each other
#          b ---+    ringtail derp
#
# Peers are looked for in PATH, or in PEERS=directory. To get them:
#   GOBIN=$PEERS go install tailscale.com/cmd/{derper,tailscaled,tailscale}@v1.102.3
#   GOBIN=$PEERS go install github.com/juanfont/headscale/cmd/headscale@v0.29.2
set -euo pipefail
cd "$(dirname "$0")/.."
[ -z "${PEERS:-}" ] || PATH=$PEERS:$PATH
target=${CARGO_TARGET_DIR:-target}
[ -n "${NO_BUILD:-}" ] || cargo build --locked -p ringtail --bin ringtail --example relay_blast
profile=${PROFILE:-debug}
RINGTAIL=$(realpath "$target/$profile/ringtail")
BLAST=$(realpath "$target/$profile/examples/relay_blast")
failures=0

have() {
  local tool
  for tool in "$@"; do
    command -v "$tool" >/dev/null || { echo "skip: $tool not found" >&2; return 1; }
  done
}

ok() { echo "ok: $1"; }
bad() { echo "FAILED: $1" >&2; failures=$((failures + 1)); }

wait_for() {
  local tries=$1
  shift
  until "$@" >/dev/null 2>&1; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || return 1
    sleep 0.1
  done
}

listening() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }

# --- 1 -----------------------------------------------------------------------------------------
derper_part() {
  have derper openssl || return 0
  local dir port=$((20000 + RANDOM % 20000)) pin pid
  dir=$(mktemp -d)
  derper -a "127.0.0.1:$port" -http-port -1 -stun=false -certmode manual -hostname 127.0.0.1 \
    -certdir "$dir" -c "$dir/key.json" >"$dir/log" 2>&1 &
  pid=$!
  if wait_for 50 listening 127.0.0.1 "$port"; then
    pin=$(openssl x509 -in "$dir/127.0.0.1.crt" -outform DER | sha256sum | cut -d' ' -f1)
    map "$port" "sha256-raw:$pin" >"$dir/map.json"
    if "$BLAST" "$dir/map.json" --seconds 2 --window-kib 16 --batch 8 >"$dir/out" 2>"$dir/err"; then
      ok "our clients through derper: $(cat "$dir/out")"
    else
      cat "$dir/err" >&2
      bad "our clients through derper"
    fi
    map "$port" "sha256-raw:${pin//[0-9]/0}" >"$dir/map.json"
    if "$BLAST" "$dir/map.json" --seconds 1 >"$dir/out" 2>"$dir/err"; then
      bad "a derper with another certificate than the pinned one was used"
    else
      ok "a derper with another certificate than the pinned one is refused"
    fi
  else
    cat "$dir/log" >&2
    bad "derper does not start"
  fi
  kill "$pid"
  wait "$pid" 2>/dev/null || true
  rm -rf "$dir"
}

map() {
  cat <<JSON
{"Regions":{"900":{"RegionID":900,"RegionCode":"derper","Nodes":[{"Name":"900a","RegionID":900,
 "HostName":"127.0.0.1","IPv4":"127.0.0.1","IPv6":"none","DERPPort":$1,"STUNPort":-1,"CertName":"$2"}]}}}
JSON
}

# --- 2 -----------------------------------------------------------------------------------------
# shellcheck source=netns/lab.sh
tailscaled_part() {
  have tailscaled tailscale headscale ip nft || return 0
  [ "$(id -u)" = 0 ] || { echo "skip: tailscaled through our relay needs root" >&2; return 0; }
  . scripts/netns/lab.sh
  lab_init
  lab_ns hub a b
  ip -n "${LAB}hub" link add br0 type bridge
  ip -n "${LAB}hub" addr add 198.18.9.1/24 dev br0
  ip -n "${LAB}hub" link set br0 up
  local i=2 side
  for side in a b; do
    lab_wire hub "p_$side" "$side" wan
    ip -n "${LAB}hub" link set "p_$side" master br0
    ip -n "$LAB$side" addr add "198.18.9.$i/24" dev wan
    ip -n "$LAB$side" route add default via 198.18.9.1
    i=$((i + 1))
  done
  # tailscaled finds the other's address by STUN and would talk to it directly.
  lab_in hub nft -f - <<'NFT'
table bridge lab {
  chain forward {
    type filter hook forward priority 0;
    drop
  }
}
NFT
  lab_spawn hub relay "$RINGTAIL" -v derp --hostname 198.18.9.1 --addr 198.18.9.1:443 \
    --state-dir "$LAB_DIR/relay"
  lab_wait_file "$LAB_DIR/relay/derp-node.json" 5 || { cat "$LAB_DIR/relay.log" >&2; bad "the relay does not start"; return 0; }
  # A DERP map in the form headscale reads from a file (YAML takes JSON too; its keys are lower case).
  derp_yaml >"$LAB_DIR/derp.yaml"
  headscale_config >"$LAB_DIR/headscale.yaml"
  lab_spawn hub headscale headscale serve -c "$LAB_DIR/headscale.yaml"
  wait_for 100 lab_in hub headscale -c "$LAB_DIR/headscale.yaml" users create lab
  local user key
  user=$(lab_in hub headscale -c "$LAB_DIR/headscale.yaml" users list -o json | sed -n 's/.*"id": *"\{0,1\}\([0-9]*\).*/\1/p' | head -1)
  key=$(lab_in hub headscale -c "$LAB_DIR/headscale.yaml" preauthkeys create -u "${user:-1}" --reusable -e 1h -o json |
    sed -n 's/.*"key": *"\([^"]*\)".*/\1/p' | head -1)
  [ -n "$key" ] || { cat "$LAB_DIR/headscale.log" >&2; bad "headscale gives no key"; return 0; }
  for side in a b; do
    mkdir -p "$LAB_DIR/$side"
    lab_spawn "$side" "ts_$side" env TS_NO_LOGS_NO_SUPPORT=true TS_DEBUG_ALWAYS_USE_DERP=0 \
      tailscaled --tun=userspace-networking --statedir="$LAB_DIR/$side" --socket="$LAB_DIR/$side/sock" --no-logs-no-support
    lab_wait_file "$LAB_DIR/$side/sock" 10 || true
    lab_in "$side" timeout 30 tailscale --socket="$LAB_DIR/$side/sock" up --login-server=http://198.18.9.1:8080 \
      --auth-key="$key" --hostname="$side" --timeout=25s || { tail -n 30 "$LAB_DIR/ts_$side.log" >&2; bad "tailscaled $side does not come up"; return 0; }
  done
  local to
  to=$(lab_in b tailscale --socket="$LAB_DIR/b/sock" ip -4)
  # The first reply may be late: the other side learns of this one first.
  lab_in a timeout 60 tailscale --socket="$LAB_DIR/a/sock" ping --c 6 --until-direct=false "$to" >"$LAB_DIR/ping" || true
  local replies
  replies=$(grep -c 'via DERP(own)' "$LAB_DIR/ping" || true)
  if [ "$replies" -ge 4 ] && ! grep -q 'via [0-9]' "$LAB_DIR/ping"; then
    ok "tailscaled to tailscaled through our relay: $replies of 6 replies by it, none direct"
  else
    cat "$LAB_DIR/ping" >&2
    tail -n 20 "$LAB_DIR/ts_a.log" "$LAB_DIR/relay.log" >&2
    bad "tailscaled to tailscaled through our relay"
  fi
  # Its own netcheck: our STUN answers, and the relay is the nearest.
  lab_in a timeout 20 tailscale --socket="$LAB_DIR/a/sock" netcheck >"$LAB_DIR/netcheck" 2>/dev/null || true
  if grep -q 'UDP: true' "$LAB_DIR/netcheck" && grep -q 'Nearest DERP: own' "$LAB_DIR/netcheck"; then
    ok "tailscaled measures our relay by STUN: $(sed -n 's/.*- *\(own: [^ ]*\).*/\1/p' "$LAB_DIR/netcheck")"
  else
    cat "$LAB_DIR/netcheck" >&2
    bad "tailscaled measures our relay by STUN"
  fi
}

derp_yaml() {
  local pin
  pin=$(sed -n 's/.*"CertName": "\([^"]*\)".*/\1/p' "$LAB_DIR/relay/derp-node.json")
  cat <<YAML
regions:
  900:
    regionid: 900
    regioncode: own
    regionname: own
    nodes:
      - name: 900a
        regionid: 900
        hostname: 198.18.9.1
        certname: "$pin"
        ipv4: 198.18.9.1
        ipv6: none
        stunport: 3478
        derpport: 443
YAML
}

headscale_config() {
  cat <<YAML
server_url: http://198.18.9.1:8080
listen_addr: 198.18.9.1:8080
metrics_listen_addr: 127.0.0.1:9090
grpc_listen_addr: 127.0.0.1:50443
grpc_allow_insecure: false
noise:
  private_key_path: $LAB_DIR/noise.key
prefixes:
  v4: 100.64.0.0/10
  v6: fd7a:115c:a1e0::/48
  allocation: sequential
derp:
  server:
    enabled: false
  urls: []
  paths: [$LAB_DIR/derp.yaml]
  auto_update_enabled: false
disable_check_updates: true
database:
  type: sqlite
  sqlite:
    path: $LAB_DIR/headscale.sqlite
log:
  level: info
dns:
  magic_dns: false
  override_local_dns: false
  base_domain: lab.example
  nameservers:
    global: []
policy:
  mode: file
  path: ""
unix_socket: $LAB_DIR/headscale.sock
unix_socket_permission: "0700"
logtail:
  enabled: false
YAML
}

[ -n "${SKIP_DERPER:-}" ] || derper_part
tailscaled_part
[ "$failures" = 0 ] || { echo "$failures failed" >&2; exit 1; }
