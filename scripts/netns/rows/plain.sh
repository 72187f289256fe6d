# shellcheck shell=bash disable=SC2034 # variables for tailnet.sh

# Plain WireGuard peers of a's settings file beside its tailnet, with wireguard-go as the peers: w has the name w.example,
# v opens connections to us. a is behind a NAT; c knows nobody but w, from a file, and has no coordination.
row_plain() {
  local before at
  tailnet_up
  lab_home a 1
  lab_host b 203.0.113.22
  lab_host w 203.0.113.23
  lab_host v 203.0.113.24
  lab_host c 203.0.113.26
  echo "w.example 203.0.113.23" >"$LAB_DIR/zone"
  lab_spawn inet names "$ROOT/scripts/netns/dns.pl" 203.0.113.254 "$LAB_DIR/zone"
  for name in a c; do
    mkdir -m 700 "$LAB_DIR/node-$name"
    "$RINGTAIL" genkey --state-dir "$LAB_DIR/node-$name" >"$LAB_DIR/$name.keys"
  done
  plain_keys w
  plain_keys v
  tailnet_tailscaled b b
  within 40 tailnet_online b
  # a is the second node of the tailnet.
  plain_start w 10.9.0.1
  plain_start v 10.9.1.1
  plain_file >"$LAB_DIR/a.toml"
  before=$(host_state a)
  tailnet_ringtail a a --config "$LAB_DIR/a.toml"
  ready a b || return 0
  check "a plain peer that has a name answers" within 20 tailnet_pings a 10.9.0.1 1
  check "and the tailnet as well" tailnet_pings a b 1
  check "status says where it is" plain_at a office 203.0.113.23:51820
  check "it may not open connections to us" not lab_in w ping -q -c 3 -i 0.2 -W 1 "$(tailnet_ip a)"
  check "another may, through the NAT that its keep-alive holds open" within 10 tailnet_pings v "$(tailnet_ip a)" 1
  check "an address that a node of the tailnet has is not its" last_refused "$(tailnet_ip b)/32 of office is not used: b has it already"
  check "nor does it become an exit" last_refused "0.0.0.0/0 of office is not used"
  check "and none of that goes there" not goes_into_tun 198.51.100.1
  at=$(lab_in w wg show "$(plain_name w)" endpoints | awk -v key="$(plain_key_of a)" '$1 == key { print $2 }')
  lab_stop wg-w
  (umask 077 && wg genpsk >"$LAB_DIR/other.psk")
  plain_start w 10.9.0.1 other
  plain_set w peer "$(plain_key_of a)" endpoint "$at"
  lab_in w ping -q -c 2 -i 0.3 -W 1 "$(tailnet_ip a)" >/dev/null || true
  check "with another preshared key it shakes hands in vain" plain_in_vain
  check "and nothing is answered" not lab_in a ping -q -c 5 -i 0.2 -W 1 10.9.0.1
  plain_psk w
  check "with the right one there is" within 20 tailnet_pings a 10.9.0.1 1
  tailnet_stop a KILL
  tailnet_start a
  check "killed and started again we have it back" within 20 tailnet_pings a 10.9.0.1 1
  check "without coordination it answers too" plain_alone
  plain_set w listen-port 51999
  lab_in w ping -q -c 2 -i 0.2 -W 1 10.9.2.1 >/dev/null
  check "it is answered where it roams to" lab_in c "$BENCH" ping 10.9.0.1 --rate 20 --seconds 1 --lost-max 0
  check "and status says so" plain_at c office 203.0.113.23:51999
  plain_set w listen-port 51820
  # Names are looked up once a minute.
  ip -n "${LAB}w" addr add 203.0.113.25/32 dev wan
  ip -n "${LAB}inet" route add 203.0.113.25/32 dev p_w
  echo "w.example 203.0.113.25" >"$LAB_DIR/zone"
  ip -n "${LAB}w" addr del 203.0.113.23/32 dev wan
  ip -n "${LAB}w" route replace default via 203.0.113.254 dev wan onlink
  check "it is found again where its name leads" within 70 tailnet_pings a 10.9.0.1 1
  tailnet_stop a
  check "the host is as before" same_state a "$before"
}
plain_keys() {
  (umask 077 && wg genkey >"$LAB_DIR/$1.key" && wg genpsk >"$LAB_DIR/$1.psk")
  wg pubkey <"$LAB_DIR/$1.key" >"$LAB_DIR/$1.pub"
}
# The public key of a node of ours as wg writes it.
plain_key_of() {
  local hex
  hex=$(sed -n 's/^node_key = "nodekey:\([0-9a-f]*\)"$/\1/p' "$LAB_DIR/$1.keys")
  # shellcheck disable=SC2059,SC2001 # bytes by their numbers
  printf "$(sed 's/../\\x&/g' <<<"$hex")" | base64
}
plain_file() {
  cat <<TOML
[[peer]]
name = "office"
public_key = "$(cat "$LAB_DIR/w.pub")"
preshared_key_file = "w.psk"
allowed_ips = ["10.9.0.0/24", "$(tailnet_ip b)/32", "0.0.0.0/0"]
endpoint = "w.example:51820"

[[peer]]
name = "road"
public_key = "$(cat "$LAB_DIR/v.pub")"
preshared_key_file = "v.psk"
allowed_ips = ["10.9.1.0/24"]
endpoint = "203.0.113.24:51820"
persistent_keepalive = 1
allow_in = true
TOML
}
# Interfaces of wireguard-go have a socket in a folder that all namespaces share.
plain_name() { echo "$1${LAB//[^0-9]/}"; }
plain_set() { lab_in "$1" wg set "$(plain_name "$1")" "${@:2}"; }
plain_psk() { plain_set "$1" peer "$(plain_key_of a)" preshared-key "$LAB_DIR/${2:-$1}.psk"; }
# w has sent to a, and has no session with it.
plain_in_vain() {
  local key at received sent
  read -r key at < <(lab_in w wg show "$(plain_name w)" latest-handshakes | grep -F "$(plain_key_of a)") &&
    read -r key received sent < <(lab_in w wg show "$(plain_name w)" transfer | grep -F "$(plain_key_of a)") &&
    SAID="$key: last handshake $at, $received bytes received, $sent sent" && [ "$at" = 0 ] && [ "$received" = 0 ] && [ "$sent" -gt 0 ]
}
# plain_start HOST ADDRESS [PSK]: wireguard-go there, with a and c as peers; a with its own preshared key, or this one.
plain_start() {
  local if
  if=$(plain_name "$1")
  lab_spawn "$1" "wg-$1" env LOG_LEVEL=error "$(peer_path wireguard-go)" -f "$if"
  within 10 lab_in "$1" wg show "$if" >/dev/null 2>&1 || return 1
  plain_set "$1" private-key "$LAB_DIR/$1.key" listen-port 51820 peer "$(plain_key_of a)" allowed-ips 100.64.0.0/10
  plain_psk "$1" "${3:-$1}"
  [ "$1" != w ] || plain_set w peer "$(plain_key_of c)" allowed-ips 10.9.2.1/32
  lab_in "$1" sh -c "ip addr add $2/24 dev $if; ip link set $if up mtu 1280; ip route add 100.64.0.0/10 dev $if; ip route add 10.9.2.1/32 dev $if"
}
plain_at() { # NODE PEER ADDRESS
  rt "$1" status --json | jq -e --arg name "$2" --arg at "$3" \
    '.peers[] | select(.name == $name) | .path | .state == "plain" and .address == $at'
}
last_refused() { grep -qF "$1" "$LAB_DIR/node-a.log"; }
goes_into_tun() { ip -n "${LAB}a" route get "$1" | grep ringtail0; }
plain_alone() {
  echo 'addresses = ["10.9.2.1/32"]' >"$LAB_DIR/c.network"
  plain_file | sed '/^preshared_key_file/d; s/w\.example/203.0.113.23/; /^$/,$d' >"$LAB_DIR/c.toml"
  lab_spawn c node-c "$RINGTAIL" up --network "$LAB_DIR/c.network" --config "$LAB_DIR/c.toml" --state-dir "$LAB_DIR/node-c"
  within 15 lab_in c "$BENCH" ping 10.9.0.1 --rate 20 --seconds 1 --lost-max 0
}
