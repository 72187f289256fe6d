# shellcheck shell=bash
# A tailnet in a lab: relays, coordination and nodes, each of either kind. Source it after lab.sh, checks.sh and
# packages.sh; with peers.sh too for the kinds that are not ours. RINGTAIL and BENCH name the binaries.
#
#   tailnet_internet                     the internet, a host "coord" at 10.255.0.1, a host "relay" at 203.0.113.1
#   start_relay NS LABEL ADDRESS ID CODE [IPV6]    `ringtail derp`;  start_derper: derper in its place
#   make_derp_map LABEL...               the DERP map of these relays
#   start_headscale                      coordination by Headscale, users alice and bob, keys in auth-key and bob-key
#   start_coord                          coordination by `ringtail coord`, at the same address; with the options of
#                                        the array COORD_OPTIONS
#   our_server                           our relay, its map, and `ringtail coord`
#   ours COMMAND...                      `ringtail coord COMMAND` on its state
#   tailnet_up                           all of that at once: internet, our relay, Headscale
#
# Both servers are at $COORD_URL, and what lets nodes in is in $LAB_DIR/auth-key.
#
#   hs COMMAND...                        Headscale's command line
#   hs_id NAME, hs_field NAME FILTER     a node's id; what jq finds in its entry
#   hs_routes NAME PREFIX[,PREFIX]       approves these routes of the node, and only these; hs_routes NAME "" none
#   hs_delete NAME, hs_expire NAME       what an administrator does
#   hs_policy FILE                       a policy for all; hs_policy by itself reads it from standard input
#
#   tailnet_ringtail NAME NS [OPTION...]     a node: `ringtail up OPTION...` in namespace NS
#   tailnet_tailscaled NAME NS [OPTION...]   a node: tailscaled on a TUN, and `tailscale up OPTION...`
#                                        (TAILNET_KEY: the file with its auth key, or none)
#   tailnet_stop NAME [SIGNAL]           ends it (KILL: as a crash does); its state stays
#   tailnet_start NAME                   starts it again as it was
#   tailnet_options NAME OPTION...       with these options from the next start on, if it is ours
#   rt NAME COMMAND..., ts NAME COMMAND...   its command line: `ringtail COMMAND`, `tailscale COMMAND`
#   tailnet_status NAME                  its status in one form for both kinds, see there
#
#   asks_for_login NAME                  does this tailscaled?
#   tailnet_online NAME...               are they in the network?         (for `within`)
#   tailnet_knows NAME OTHER...          has NAME the OTHERs in its map, online and with a home?
#   tailnet_ready NAME...                waits until each is in the network and knows all the others
#   tailnet_ip NAME [6]                  its address inside, also when it does not run any more
#   problem NAME PATTERN                 does the status of a ringtail tell of such a problem?
#   no_problem NAME PATTERN              does it tell, and of no such problem?
#   tailnet_path NAME OTHER              "direct ADDRESS:PORT" or "relay CODE", as NAME has it
#   tailnet_direct NAME OTHER            does each have the other direct? (for `within`)
#   tailnet_block HOST, tailnet_unblock HOST     the internet carries no UDP of this lab_host but STUN and DNS
#
#   tailnet_pings FROM TO SECONDS [LOST_MAX]   20 pings a second; fails when more are lost, or all
#   tailnet_stream FROM TO LABEL         50 pings a second in the background,
#   tailnet_stream_end LABEL             until here; then LOST, SENT, and GAP_MS, the longest time without an answer
#
#   hosts NAME...                        lab_hosts on the internet, at 203.0.113.11 and on
#   ready NAME...                        a check that they are in the network and know each other
#   whom NS                              there, a server at port 7000 that tells who asks his address
#   seen FROM AT ADDRESS                 it says this, at AT, to namespace FROM; with an empty ADDRESS it is not reached
#   host_state NS, same_state NS BEFORE  what a host calls its own, and is it as it was?
#
# TO is a node, or an address. Inside of `( lab_within NAME; ... )` a script has a lab of its own, so that several
# tailnets run beside each other.

COORD_URL=http://10.255.0.1:8080
# The namespace of coordination, and words that go before the command line of a node, such as `taskset -c 1`.
COORD_NS=coord TAILNET_RUN=()
# What a row may set before it starts Headscale, as its configuration has it: how long keys live, how it looks after two
# routers of one prefix, where the policy is, and names.
HS_EXPIRY=0
HS_HA='{probe_interval: 10s, probe_timeout: 5s}'
HS_POLICY='{mode: database}'
HS_DNS='{magic_dns: false, override_local_dns: false, base_domain: lab.example, nameservers: {global: []}}'

fail() {
  echo "error: $*" >&2
  tailnet_logs >&2
  exit 1
}

tailnet_logs() {
  local log
  for log in "$LAB_DIR"/*.log; do
    if [ -s "$log" ]; then
      echo "--- last lines of $(basename "$log"):"
      tail -n 15 "$log"
    fi
  done
}

# ---- coordination and relays -----------------------------------------------------------------

tailnet_internet() {
  lab_internet
  tailnet_coord_host
  lab_host relay 203.0.113.1 2001:db8::1
}

# A private address: over plain HTTP, tailscaled comes back to no other.
tailnet_coord_host() {
  lab_host coord 203.0.113.3
  ip -n "${LAB}coord" addr add 10.255.0.1/32 dev lo
  ip -n "${LAB}inet" route add 10.255.0.1/32 via 203.0.113.3 dev p_coord onlink
}

tailnet_up() {
  tailnet_internet
  start_relay relay relay 203.0.113.1 900 own 2001:db8::1 && make_derp_map relay && start_headscale ||
    fail "relay or Headscale did not start"
}

# tailnet_listens NS PORT: does anybody?
tailnet_listens() { lab_in "$1" grep -qi ":$(printf %04x "$2") 0*:0000 0A" /proc/net/tcp /proc/net/tcp6; }

# start_relay NS LABEL ADDRESS ID CODE [IPV6]: a relay; its entry for the DERP map lands in $LAB_DIR/LABEL. It gets
# the array RELAY_OPTIONS too.
start_relay() {
  rm -f "$LAB_DIR/$2/derp-node.json"
  lab_spawn "$1" "$2" "$RINGTAIL" derp --hostname "$3" --addr "$3:443" ${6:+--addr "[$6]:443"} --stun-port 3478 \
    --state-dir "$LAB_DIR/$2" --region-id "$4" --region-code "$5" ${RELAY_OPTIONS[@]+"${RELAY_OPTIONS[@]}"}
  lab_wait_file "$LAB_DIR/$2/derp-node.json" 20
}

# start_derper NS LABEL ADDRESS ID CODE: the same by derper, over IPv4.
start_derper() {
  mkdir -p "$LAB_DIR/$2"
  lab_spawn "$1" "$2" derper -a "$3:443" -http-port -1 -stun-port 3478 -certmode manual -hostname "$3" \
    -certdir "$LAB_DIR/$2" -c "$LAB_DIR/$2/derper.json" ${RELAY_OPTIONS[@]+"${RELAY_OPTIONS[@]}"}
  within 20 tailnet_listens "$1" 443 || return 1
  local pin
  # It logs the whole entry, with the pin of the certificate that it made.
  pin=$(grep -o 'sha256-raw:[0-9a-f]*' "$LAB_DIR/$2.log" | tail -n 1)
  printf '{"RegionID":%s,"RegionCode":"%s","RegionName":"%s","Nodes":[{"Name":"%sa","RegionID":%s,"HostName":"%s","IPv4":"%s","IPv6":"none","DERPPort":443,"STUNPort":3478,"CertName":"%s"}]}\n' \
    "$4" "$5" "$5" "$4" "$4" "$3" "$3" "$pin" >"$LAB_DIR/$2/derp-node.json"
}

# make_derp_map RELAY...: joins the relays' own entries into one DERP map file.
make_derp_map() {
  "$BENCH" derp-map "${@/#/$LAB_DIR/}" >"$LAB_DIR/derp-map.json"
}

start_coord() {
  lab_spawn "$COORD_NS" coord "$RINGTAIL" coord --addr "${COORD_URL#http://}" --state-dir "$LAB_DIR/coord" \
    --derp-map "$LAB_DIR/derp-map.json" ${COORD_OPTIONS[@]+"${COORD_OPTIONS[@]}"}
  within 20 tailnet_listens "$COORD_NS" 8080 || return 1
  [ -e "$LAB_DIR/auth-key" ] || "$RINGTAIL" coord keys create --reusable --state-dir "$LAB_DIR/coord" >"$LAB_DIR/auth-key"
}

ours() { "$RINGTAIL" coord "$@" --state-dir "$LAB_DIR/coord"; }
our_server() { start_relay relay relay 203.0.113.1 900 own && make_derp_map relay && start_coord; }

start_headscale() {
  local user
  # YAML takes JSON; Headscale wants the names in lower case and the regions' numbers bare.
  sed -E 's/"([0-9]+)": *\{/\1: {/; s/"([A-Za-z0-9]+)":/"\L\1":/' "$LAB_DIR/derp-map.json" >"$LAB_DIR/derp.yaml"
  headscale_config >"$LAB_DIR/headscale.yaml"
  lab_spawn "$COORD_NS" headscale headscale -c "$LAB_DIR/headscale.yaml" serve
  within 20 tailnet_listens "$COORD_NS" 8080 || return 1
  [ ! -e "$LAB_DIR/auth-key" ] || return 0
  for user in alice bob; do
    hs users create $user >/dev/null || return 1
  done
  hs_key 1 >"$LAB_DIR/auth-key" && hs_key 2 >"$LAB_DIR/bob-key"
}

headscale_config() {
  cat <<YAML
server_url: $COORD_URL
listen_addr: ${COORD_URL#http://}
metrics_listen_addr: 127.0.0.1:9090
grpc_listen_addr: 127.0.0.1:50443
noise: {private_key_path: $LAB_DIR/noise.key}
prefixes: {v4: 100.64.0.0/10, v6: "fd7a:115c:a1e0::/48", allocation: sequential}
derp: {server: {enabled: false}, urls: [], paths: [$LAB_DIR/derp.yaml], auto_update_enabled: false}
disable_check_updates: true
node: {expiry: $HS_EXPIRY, ephemeral: {inactivity_timeout: 70s}, routes: {ha: $HS_HA}}
database: {type: sqlite, sqlite: {path: $LAB_DIR/headscale.sqlite}}
log: {level: info}
policy: $HS_POLICY
dns: $HS_DNS
unix_socket: $LAB_DIR/headscale.sock
unix_socket_permission: "0700"
logtail: {enabled: false}
# Else it waits up to a second before it tells others of a change.
tuning: {batch_change_delay: 50ms, node_store_batch_timeout: 20ms}
YAML
}

hs() { timeout 20 headscale -c "$LAB_DIR/headscale.yaml" "$@" 2>>"$LAB_DIR/hs.log"; }
# hs_key USER_ID [OPTION...]: a reusable pre-auth key.
hs_key() { hs preauthkeys create -u "$1" --reusable -e 24h "${@:2}" -o json | jq -r .key; }
hs_field() { hs nodes list -o json | jq -er "[.[] | select(.name == \"$1\")][0] | $2"; }
hs_id() { hs_field "$1" .id; }
hs_routes() { hs nodes approve-routes -i "$(hs_id "$1")" -r "$2" >/dev/null; }
hs_delete() { hs nodes delete -i "$(hs_id "$1")" --force >/dev/null; }
hs_expire() { hs nodes expire -i "$(hs_id "$1")" >/dev/null; }
hs_policy() {
  local file=${1:-$LAB_DIR/policy.json}
  [ $# -gt 0 ] || cat >"$file"
  hs policy set -f "$file" >/dev/null
}

# ---- nodes -----------------------------------------------------------------------------------

declare -A TAILNET_KIND=() TAILNET_NS=() TAILNET_OPTIONS=()

tailnet_ringtail() { tailnet_node ringtail "$@"; }
tailnet_tailscaled() { tailnet_node tailscaled "$@"; }
tailnet_node() { # KIND NAME NS [OPTION...]
  TAILNET_KIND[$2]=$1 TAILNET_NS[$2]=$3
  tailnet_options "$2" "${@:4}"
  tailnet_start "$2"
}
tailnet_options() { TAILNET_OPTIONS[$1]=$([ $# -eq 1 ] || printf '%q ' "${@:2}"); }

tailnet_start() {
  local name=$1 ns=${TAILNET_NS[$1]} at=$LAB_DIR/node-$1 options key=${TAILNET_KEY:-$LAB_DIR/auth-key}
  eval "options=(${TAILNET_OPTIONS[$name]})"
  local ours=(--auth-key-file "$key") theirs=("--auth-key=file:$key")
  [ "$key" != none ] || ours=() theirs=()
  if [ "${TAILNET_KIND[$name]}" = ringtail ]; then
    lab_spawn "$ns" "node-$name" "${TAILNET_RUN[@]}" "$RINGTAIL" up --coord "$COORD_URL" "${ours[@]}" \
      --state-dir "$at" --hostname "$name" --events "${TAILNET_EVENTS:-$LAB_DIR}/$name.events" "${options[@]}"
    return
  fi
  local known='' env=(TS_NO_LOGS_NO_SUPPORT=1 TS_PANIC_IF_HIT_MAIN_CONTROL=1 TS_DISABLE_PORTMAPPER=1
    TS_ASSUME_NETWORK_UP_FOR_TEST=1 TS_LOGS_DIR="$at" TS_DEBUG_FIREWALL_MODE=nftables)
  [ ! -e "$at/tailscaled.state" ] || known=1
  mkdir -p "$at" && rm -f "$at/sock"
  lab_spawn "$ns" "node-$name" "${TAILNET_RUN[@]}" env "${env[@]}" \
    tailscaled --tun=ts0 --statedir="$at" --socket="$at/sock" --port=41641 --no-logs-no-support
  # It remembers what it was told.
  [ -z "$known" ] || return 0
  # shellcheck disable=SC2016 # for the other shell
  lab_spawn "$ns" "up-$name" sh -c 'until [ -S "$0" ]; do sleep 0.1; done; exec "$@"' "$at/sock" \
    tailscale --socket="$at/sock" up --login-server="$COORD_URL" "${theirs[@]}" \
    --hostname="$name" --timeout=60s --accept-dns=false "${options[@]}"
}

asks_for_login() { ts "$1" status --json 2>/dev/null | jq -e '.BackendState == "NeedsLogin"' >/dev/null; }

tailnet_stop() { lab_stop "node-$1" "${2:-TERM}"; }

rt() { timeout 20 "$RINGTAIL" "$2" --state-dir "$LAB_DIR/node-$1" "${@:3}"; }
# In the namespace, for some of its commands look at the network themselves.
ts() { lab_in "${TAILNET_NS[$1]}" timeout 60 tailscale --socket="$LAB_DIR/node-$1/sock" "${@:2}"; }

# {online, addresses, peers: {NAME: {online, home, direct}}}: `direct` is the address, or null. Other fields of ours
# and of theirs are asked for by `rt NAME status --json` and `ts NAME status --json`.
tailnet_status() {
  if [ "${TAILNET_KIND[$1]}" = ringtail ]; then
    # It fails when something is wrong with the node, and tells all the same. (To jq, no input at all is no failure.)
    local told
    told=$(rt "$1" status --json 2>/dev/null) || [ -n "$told" ] || return 1
    jq '{online: (.coordination.state == "connected"), addresses,
      peers: [.peers[] | {key: .name, value: {online, home, direct: (if .path.state == "direct" then .path.address else null end)}}] | from_entries}' <<<"$told"
  else
    ts "$1" status --json 2>/dev/null | jq '{online: (.BackendState == "Running" and .Self.Online), addresses: .TailscaleIPs,
      peers: [.Peer // {} | .[] | {key: .HostName, value: {online: .Online, home: .Relay, direct: (if .CurAddr == "" then null else .CurAddr end)}}] | from_entries}'
  fi
}

tailnet_online() {
  local name
  for name in "$@"; do
    tailnet_status "$name" | jq -e '.online and (.addresses | length > 0)' >/dev/null || return 1
  done
}

tailnet_knows() {
  local other status
  status=$(tailnet_status "$1") || return 1
  for other in "${@:2}"; do
    jq -e --arg other "$other" '.peers[$other] | .online and .home != null and .home != ""' <<<"$status" >/dev/null || return 1
  done
}

tailnet_ready() {
  local name other others
  for name in "$@"; do
    within 40 tailnet_online "$name" || { echo "$name is not in the network"; return 1; }
    tailnet_ip "$name" >/dev/null
  done
  for name in "$@"; do
    others=()
    for other in "$@"; do
      [ "$other" = "$name" ] || others+=("$other")
    done
    within 20 tailnet_knows "$name" "${others[@]}" || { echo "$name does not know all of ${others[*]}"; return 1; }
  done
}

tailnet_ip() {
  local file=$LAB_DIR/$1.addresses
  [ -s "$file" ] || tailnet_status "$1" | jq -r '.addresses[]' >"$file" || return 1
  if [ "${2:-4}" = 6 ]; then grep : "$file"; else grep -v : "$file"; fi
}

problem() { local told; told=$(problems "$1") && grep -E "problem: .*($2)" <<<"$told"; }
# A node that tells nothing at all has not said that it is well.
no_problem() { local told; told=$(problems "$1") && ! grep -E "problem: .*($2)" <<<"$told"; }
problems() { local told; told=$(rt "$1" status) || [ -n "$told" ] || return 1; echo "$told"; }

tailnet_path() {
  tailnet_status "$1" | jq -er --arg other "$2" '.peers[$other] | if .direct then "direct " + .direct else "relay " + .home end'
}
tailnet_direct() {
  [[ $(tailnet_path "$1" "$2") == direct* ]] && [[ $(tailnet_path "$2" "$1") == direct* ]]
}

# On the router, so that no sender sees an error.
tailnet_block() {
  lab_in inet nft -f - <<NFT
table inet block_$1 {
  chain pass { type filter hook forward priority filter; policy accept;
    iifname "p_$1" meta l4proto udp udp dport != { 53, 3478 } drop
    oifname "p_$1" meta l4proto udp udp sport != { 53, 3478 } drop
  }
}
NFT
}
tailnet_unblock() { lab_in inet nft delete table inet "block_$1"; }

# ---- traffic ---------------------------------------------------------------------------------

# tailnet_address NODE|ADDRESS
tailnet_address() { if [ -n "${TAILNET_KIND[$1]:-}" ]; then tailnet_ip "$1"; else echo "$1"; fi; }

tailnet_pings() { # FROM TO SECONDS [LOST_MAX]
  local to
  to=$(tailnet_address "$2") || return 1
  lab_in "${TAILNET_NS[$1]:-$1}" "$BENCH" ping "$to" --rate 20 --seconds "$3" --lost-max "${4:-0}"
}

tailnet_stream() { # FROM TO LABEL
  local to
  to=$(tailnet_address "$2") || return 1
  rm -f "$LAB_DIR/$3.stop"
  lab_spawn "${TAILNET_NS[$1]:-$1}" "$3" "$BENCH" ping "$to" --rate 50 --stop-file "$LAB_DIR/$3.stop" --out "$LAB_DIR/$3.json"
}

tailnet_stream_end() { # LABEL
  : >"$LAB_DIR/$1.stop"
  wait "$(lab_pid "$1")" || true
  # The times of the answered ones, with both ends of the stream: the longest step between neighbours.
  read -r SENT LOST GAP_MS < <(jq -r '(.echoes | length) as $sent | [.echoes[] | select(.rtt_us != null)] as $back
    | [.echoes[0].sent_ns, $back[].sent_ns, .echoes[-1].sent_ns] as $at
    | [range(1; $at | length) as $i | $at[$i] - $at[$i - 1]] | max / 1e6 | round | "\($sent) \($sent - ($back | length)) \(.)"' "$LAB_DIR/$1.json")
  echo "$SENT sent, $LOST lost, longest silence $GAP_MS ms"
}

# ---- what rows of tailnet-test.sh share ------------------------------------------------------

# hosts NAME...: on the internet, at 203.0.113.11 and on.
hosts() {
  local name last=11
  for name in "$@"; do
    lab_host "$name" "203.0.113.$((last++))"
  done
}
ready() { check "$* join and know each other" tailnet_ready "$@" && ! grep -q '^FAIL' "$CHECKS"; }
relayed() { [[ $(tailnet_path "$1" "$2") == relay* ]] && [[ $(tailnet_path "$2" "$1") == relay* ]]; }
relayed_to() {
  [ "$(tailnet_path a b) $(tailnet_path b a)" = "relay $1 relay $1" ] &&
    [ "$(tailnet_path a c) $(tailnet_path c a)" = "relay $1 relay $1" ]
}
goes_direct() { tailnet_pings "$1" "$2" 1 && within 10 tailnet_direct "$1" "$2"; }
goes_by() { lab_in "$1" ip route get "$2" | grep "dev $3" && tailnet_pings "$1" "$2" 1; }
lost_at_most() { tailnet_stream_end "$1" && SAID="$SENT sent, $LOST lost" && [ "$LOST" -le "$2" ]; }
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
shows() { { rt "$1" status || true; } | grep -E "^$2 .*$3"; }
knows() { tailnet_status "$1" | jq -e --arg other "$2" '.peers | has($other)' >/dev/null; }
told() { tailnet_status "$1" | jq -e --arg other "$2" ".peers[\$other] | $3" >/dev/null; }
has_route() { rt "$1" status --json | jq -e --arg net "$2" '[.peers[].allowed_ips[]] | index($net)' >/dev/null; }
connects() { lab_in "$1" timeout 2 bash -c ": <>/dev/tcp/$(tailnet_ip "$2")/$3"; }
denied() { [ "$(rt "$1" status --json | jq .drops.filter_denied)" -gt 0 ]; }
exited() { # NODE CODE
  local code=0
  not lab_alive "node-$1" || return 1
  wait "$(lab_pid "node-$1")" || code=$?
  tail -n 1 "$LAB_DIR/node-$1.log"
  [ $code = "$2" ]
}
last_words() { tail -n 1 "$LAB_DIR/node-$1.log" | grep -q "$2"; }
# A node that knows no more than this DERP map.
static_node() {
  lab_stop node-static
  printf 'addresses = ["10.77.0.1/32"]\nhome = "own"\nderp_map = "%s"\n' "$1" >"$LAB_DIR/static.toml"
  lab_spawn c node-static "$RINGTAIL" up --network "$LAB_DIR/static.toml" --state-dir "$LAB_DIR/node-static" --tun rt1 --listen-port 0
  within 10 rt static status >/dev/null 2>&1
}
relay_says() { rt static status --json | jq -e ".relays[0] | $1" >/dev/null; }
relay_log() { grep "$1" "$LAB_DIR/relay.log"; }
whom() {
  lab_spawn "$1" whom python3 -c '
import socket
server = socket.create_server(("::", 7000), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    client, address = server.accept()
    client.sendall(address[0].removeprefix("::ffff:").encode())
    client.close()'
}
seen() {
  # shellcheck disable=SC2016 # for the other shell
  SAID=$(lab_in "$1" timeout 2 bash -c 'exec 3<>"/dev/tcp/$0/7000" && cat <&3' "$2" 2>/dev/null || true)
  [ "$SAID" = "$3" ]
}
# host_state NS: all that a host calls its own, in a form that is the same when nothing was changed. Of rules without
# their counters; of settings those of the network, but for what the kernel adds when somebody first uses conntrack.
host_state() {
  # shellcheck disable=SC2016 # for the other shell
  lab_in "$1" sh -c 'ip route; ip -6 route; ip route show table 52 2>/dev/null; ip rule; ip -6 rule; nft -s list ruleset
    sysctl -a 2>/dev/null | grep "^net\." | grep -v "\.nf_conntrack"
    for save in iptables-save ip6tables-save; do
      ! command -v $save >/dev/null || $save 2>/dev/null | sed "/^#/d; s/ \[.*\]$//"
    done'
  # What the node has in /etc, of the name that others in the lab have besides; as lab_spawn makes it, before it is there.
  cat "$LAB_DIR/node-$1.etc/upper/resolv.conf" 2>/dev/null || cat "$LAB_DIR/$1.resolv.conf" 2>/dev/null || echo "nameserver 203.0.113.254"
  find "$LAB_DIR/node-$1.etc/upper" -name '*resolv*' -not -name resolv.conf 2>/dev/null
}
same_state() { diff <(echo "$2") <(host_state "$1"); }
