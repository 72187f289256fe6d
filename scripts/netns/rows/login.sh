# shellcheck shell=bash

# A node without an auth key: a person lets it in, also when it was started again meanwhile. It leaves, and comes back.
row_login() {
  local url
  tailnet_up
  hosts a b
  tailnet_tailscaled b b
  keyless a
  check "a node without an auth key has an address to visit in its log" within 20 address_to_visit a
  url=$(address_to_visit a)
  check "so has its status" shows_state a "waiting for approval at $url"
  login_waits a
  check "login prints it" within 10 grep -q "visit $url" "$LAB_DIR/login-a.log"
  lab_stop node-a KILL
  check "login ends when the node is killed" within 5 not lab_alive login-a
  keyless a
  login_waits a
  check "started again it waits at the same address" within 20 grep -q "visit $url" "$LAB_DIR/login-a.log"
  check "Headscale lets it in" hs auth register --auth-id "${url##*/}" --user alice
  check "login ends, and says whose the node is" within 10 logged_in a alice
  ready a b || return 0
  check "tailscaled reaches it" tailnet_pings b a 1
  check "login says so when it is in already" login_says a 'in the network already, owned by alice'
  check "nothing of the address is left" [ ! -e "$LAB_DIR/node-a/login.json" ]

  local address before
  address=$(tailnet_ip a)
  before=$(lab_in a ip -br link | wc -l)
  check "logout" rt a logout
  check "status says so, with an exit code" down_as a 1 'logged out'
  check "its interface is gone" [ "$(lab_in a ip -br link | wc -l)" -lt "$before" ]
  check "its process is not" lab_alive node-a
  check "Headscale has its key as expired" within 5 hs_field a '.expiry.seconds'
  check "tailscaled reaches it no more" not tailnet_pings b a 1
  login_waits a
  check "login has another address" within 20 grep -q 'to let this node in, visit' "$LAB_DIR/login-a.log"
  check "and not the old one" not grep -q "visit $url" "$LAB_DIR/login-a.log"
  url=$(sed -n 's/.*visit //p' "$LAB_DIR/login-a.log")
  check "Headscale lets it in again" hs auth register --auth-id "${url##*/}" --user alice
  check "and login ends again" within 10 logged_in a alice
  check "it has its address again" within 10 has_address a "$address"
  check "tailscaled reaches it again" within 20 tailnet_pings b a 1
  check "logout while it is down" log_out_down a
  check "its status says so" within 5 down_as a 1 'logged out'
  tailnet_stop a
  check "at the next start it needs a person again" again_asks a
}
keyless() { # NODE
  TAILNET_KIND[$1]=ringtail TAILNET_NS[$1]=$1
  # What a killed one left: its file says nothing of the new one.
  rm -f "$LAB_DIR/node-$1/ringtail.sock"
  lab_spawn "$1" "node-$1" "$RINGTAIL" up --coord "$COORD_URL" --state-dir "$LAB_DIR/node-$1" --hostname "$1"
}
address_to_visit() { grep -o "$COORD_URL/register/[^ ]*" "$LAB_DIR/node-$1.log" | tail -n 1 | grep .; }
shows_state() { rt "$1" status | grep -F "$2"; }
login_waits() {
  : >"$LAB_DIR/login-$1.log"
  within 10 [ -S "$LAB_DIR/node-$1/ringtail.sock" ]
  lab_spawn "$1" "login-$1" "$RINGTAIL" login --state-dir "$LAB_DIR/node-$1"
}
logged_in() { not lab_alive "login-$1" && grep -q "in the network, owned by $2" "$LAB_DIR/login-$1.log"; }
login_says() { rt "$1" login | grep "$2"; }
down_as() { # NODE CODE WORDS
  local code=0
  rt "$1" status >"$LAB_DIR/said" 2>&1 || code=$?
  [ "$code" = "$2" ] && grep "$3" "$LAB_DIR/said"
}
has_address() { [ "$(rt "$1" ip -4)" = "$2" ]; }
log_out_down() { rt "$1" down && rt "$1" logout; }
again_asks() {
  : >"$LAB_DIR/node-$1.log"
  keyless "$1"
  within 20 address_to_visit "$1"
}
