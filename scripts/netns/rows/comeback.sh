# shellcheck shell=bash

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
