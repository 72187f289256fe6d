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
  kill -STOP "$(lab_pid headscale)"
  lab_spawn a leaving-a "$RINGTAIL" logout --state-dir "$LAB_DIR/node-a"
  pause 1
  check "status answers while a logout waits for a server that does not" says_soon a 'logged out'
  kill -TERM "$(lab_pid node-a)"
  check "the node ends when it is told to" within 3 not lab_alive node-a
  kill -CONT "$(lab_pid headscale)"
  check "a policy lets alice give a tag" hs_policy <<<'{"tagOwners": {"tag:site": ["alice@"]}, "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}'
  check "at the next start it needs a person again" again_asks a --advertise-tags site
  url=$(address_to_visit a)
  check "Headscale lets it in, with the tag that it asks for" hs auth register --auth-id "${url##*/}" --user alice
  check "which it has from then on" within 10 shows_state a 'owned by tag:site'
}

# Keys that live for an hour, and no auth key at hand: a person is told, and renews one while the tunnel is in use, by
# relay alone; and another, whose answer is lost.
row_person() {
  local key url before
  HS_EXPIRY=1h
  tailnet_up
  hosts a b
  # Keys of nodes with a tag live for ever.
  hs_key 1 --tags tag:far >"$LAB_DIR/tag-key"
  TAILNET_KEY=$LAB_DIR/tag-key tailnet_tailscaled b b
  keyless a --relay-only
  check "there is an address to visit" within 20 address_to_visit a
  url=$(address_to_visit a)
  check "Headscale lets the node in" hs auth register --auth-id "${url##*/}" --user alice
  ready a b || return 0
  check "status says that its key expires, and what to do" within 5 shows_state a '`ringtail login` renews it'
  check "so does the log, once" [ "$(grep -c 'ringtail login. renews it' "$LAB_DIR/node-a.log")" = 1 ]
  check "an administrator lets it live for ever" hs nodes expire -i "$(hs_id a)" --disable
  check "which status says no more" within 5 says_nothing a 'ringtail login'
  check "and for an hour again" hs nodes expire -i "$(hs_id a)" --expiry "$(date -u -d '+1 hour' +%FT%TZ)"
  check "which it does" within 5 shows_state a '`ringtail login` renews it'
  key=$(own_key a)
  login_waits a
  check "login has an address to visit" within 20 grep -q 'to let this node in, visit' "$LAB_DIR/login-a.log"
  url=$(sed -n 's/.*visit //p' "$LAB_DIR/login-a.log" | tail -n 1)
  check "while nobody has, the node goes on" tailnet_pings a b 1
  lab_stop node-a KILL
  keyless a --relay-only
  check "also when it was killed" within 20 tailnet_pings b a 1
  login_waits a
  check "login has the same address then" within 10 grep -q "visit $url" "$LAB_DIR/login-a.log"
  tailnet_stream b a used
  pause 1
  check "the address is still good" hs auth register --auth-id "${url##*/}" --user alice
  check "the key of the node is another" within 10 has_another_key a "$key"
  check "and login ends" within 5 logged_in a alice
  # Longer than relays know the node by both keys.
  pause 13
  check "and nothing was silent for a second" silent_at_most used 1000
  key=$(own_key a) before=$(ports_to_coord a)
  login_waits a
  check "login has another address" within 20 grep -q 'to let this node in, visit' "$LAB_DIR/login-a.log"
  url=$(sed -n 's/.*visit //p' "$LAB_DIR/login-a.log" | tail -n 1)
  freeze a "$(comm -13 <(echo "$before") <(ports_to_coord a))"
  check "it is visited, which the node does not hear" hs auth register --auth-id "${url##*/}" --user alice
  # By the connection of the key before.
  rt a set --hostname aa >/dev/null
  check "but that the server knows its key no more" within 10 grep -q 'the next one is asked for' "$LAB_DIR/node-a.log"
  check "so it finds out, and has the next one" within 10 has_another_key a "$key"
  check "tailscaled reaches it" within 10 tailnet_pings b a 1
  # Somebody begins once more, and an administrator removes the node.
  login_waits a
  check "login has an address once more" within 20 grep -q 'to let this node in, visit' "$LAB_DIR/login-a.log"
  hs_delete aa
  rt a set --hostname a >/dev/null
  check "removed, it ends all the same" within 20 not lab_alive node-a
  check "with an exit code that says so" exited a 77
}
ports_to_coord() { lab_in "$1" ss -Htn state established dst 10.255.0.1 | awk '{ sub(/.*:/, "", $3); print $3 }' | sort; }
freeze() { # NS PORT: nothing more passes by this connection
  lab_in "$1" nft -f - <<NFT
table ip frozen {
  chain out { type filter hook output priority 0; tcp sport $2 drop; }
  chain in { type filter hook input priority 0; tcp dport $2 drop; }
}
NFT
}
own_key() { rt "$1" status --json 2>/dev/null | jq -r .node_key; }
has_another_key() { local now; now=$(own_key "$1") && [ -n "$now" ] && [ "$now" != "$2" ]; }
silent_at_most() { tailnet_stream_end "$1" && SAID="$SENT sent, $LOST lost, $GAP_MS ms" && [ "$GAP_MS" -le "$2" ]; }
keyless() { # NODE [OPTION...]
  # What a killed one left: its file says nothing of the new one.
  rm -f "$LAB_DIR/node-$1/ringtail.sock"
  TAILNET_KEY=none tailnet_ringtail "$1" "$1" "${@:2}"
}
address_to_visit() { grep -o "$COORD_URL/register/[^ ]*" "$LAB_DIR/node-$1.log" | tail -n 1 | grep .; }
says_nothing() { local said; said=$(rt "$1" status) && ! grep -F "$2" <<<"$said"; }
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
says_soon() { # Its exit code says more.
  timeout 3 "$RINGTAIL" status --state-dir "$LAB_DIR/node-$1" >"$LAB_DIR/said" 2>&1 || true
  grep "$2" "$LAB_DIR/said"
}
has_address() { [ "$(rt "$1" ip -4)" = "$2" ]; }
log_out_down() { rt "$1" down && rt "$1" logout; }
again_asks() { # NODE [OPTION...]
  : >"$LAB_DIR/node-$1.log"
  keyless "$@"
  within 20 address_to_visit "$1"
}
