# shellcheck shell=bash

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
