# shellcheck shell=bash

# Keys that live for a minute and a half: an auth key renews them in place, while the tunnel is in use; without one a
# person is told, and so where d has a plain peer, which knows one key only.
row_renew() {
  local key next
  HS_EXPIRY=90s
  tailnet_up
  hosts a b c d
  tailnet_ringtail a a
  # Keys of nodes with a tag live for ever.
  hs_key 1 --tags tag:far >"$LAB_DIR/tag-key"
  TAILNET_KEY=$LAB_DIR/tag-key tailnet_tailscaled b b
  tailnet_ringtail c c --relay-only
  printf '[[peer]]\nname = "office"\npublic_key = "%s"\nallowed_ips = ["10.9.0.0/24"]\n' "$(wg genkey | wg pubkey)" >"$LAB_DIR/d.toml"
  tailnet_ringtail d d --config "$LAB_DIR/d.toml"
  ready a b c d || return 0
  check "a key that a plain peer knows is not renewed by itself, and d says so" within 5 problem d "is not renewed by itself"
  check "c is taken down" rt c down
  check "and comes back by a login, for which its key is good enough" rt c login
  check "status says when the key expires" shows_state a 'key expires in'
  key=$(own_key a)
  tailnet_stream a b out
  tailnet_stream b a in
  check "a and b go direct" within 15 tailnet_direct a b
  tailnet_stream c b relayed
  tailnet_stream c a ours
  check "the key of a is another before it expires" within 100 has_another_key a "$key"
  check "and that of c" within 30 log_says c "key is renewed"
  check "that of d stands until it expires" not log_says d "key is renewed"
  pause 5
  check "a has its address still" [ "$(rt a ip -4)" = "$(tailnet_ip a)" ]
  check "from a nothing is silent for a second" silent_at_most out 1000
  check "to a neither" silent_at_most in 1000
  check "nor by relay" silent_at_most relayed 1000
  check "nor between two of ours that are renewed at once" silent_at_most ours 2000
  check "Headscale has the new key of a" [ "$(hs_field a .node_key)" = "$(own_key a)" ]
  check "and that of c" [ "$(hs_field c .node_key)" = "$(own_key c)" ]
  check "and no other nodes" [ "$(hs nodes list -o json | jq length)" = 4 ]
  check "status is in order" rt a status
  next=$(own_key a)
  tailnet_stop a KILL
  tailnet_start a
  check "after a kill it has its new key" within 20 tailnet_pings b a 1
  check "and no older one" [ "$(own_key a)" = "$next" ]
}
own_key() { rt "$1" status --json 2>/dev/null | jq -r .node_key; }
has_another_key() { local now; now=$(own_key "$1") && [ -n "$now" ] && [ "$now" != "$2" ]; }
log_says() { grep -q "$2" "$LAB_DIR/node-$1.log"; }
shows_state() { rt "$1" status | grep -F "$2"; }
silent_at_most() { tailnet_stream_end "$1" && SAID="$SENT sent, $LOST lost, $GAP_MS ms" && [ "$GAP_MS" -le "$2" ]; }

# The same at our own server, between two of ours.
row_renew_ours() {
  local key address
  tailnet_internet
  COORD_OPTIONS=(--key-expiry 60s)
  our_server || fail "relay or server did not start"
  hosts a b
  tailnet_ringtail a a
  tailnet_ringtail b b
  ready a b || return 0
  check "status says when the key expires" shows_state a 'key expires in'
  key=$(own_key a) address=$(tailnet_ip a)
  tailnet_stream a b out
  tailnet_stream b a in
  check "a and b go direct" within 15 tailnet_direct a b
  # Somebody begins to log in, and thinks better of it.
  timeout 3 "$RINGTAIL" login --state-dir "$LAB_DIR/node-b" >"$LAB_DIR/login-b.log" 2>&1 || true
  check "b has an address that a person may visit" grep -q 'to let this node in, visit' "$LAB_DIR/login-b.log"
  check "the key of a is another before it expires" within 70 has_another_key a "$key"
  check "and that of b" within 30 log_says b "key is renewed"
  pause 5
  check "a has its address still" [ "$(rt a ip -4)" = "$(tailnet_ip a)" ]
  check "from a nothing is silent for a second" silent_at_most out 1000
  check "to a neither" silent_at_most in 1000
  check "the server has no other node" [ "$(ours nodes list | grep -c "${address%.*}[.]")" = 2 ]
  check "status is in order" rt a status
}
