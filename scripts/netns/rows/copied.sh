# shellcheck shell=bash

# A machine is copied, state directory and all: both notice that they are two.
row_copied() {
  tailnet_up
  hosts a b
  tailnet_ringtail a a
  check "a is in the network" within 40 tailnet_online a
  check "and alone" not says_copied a
  tailnet_stop a
  cp -a "$LAB_DIR/node-a" "$LAB_DIR/node-b"
  tailnet_start a
  check "a is back" within 20 tailnet_online a
  # What Headscale still had of the run before is no other machine.
  pause 12
  tailnet_ringtail b b
  check "it says that another machine has its keys" within 30 says_copied a
  check "so does the other" within 90 says_copied b
  check "in its log, too" grep -q 'another machine' "$LAB_DIR/node-a.log"
}
says_copied() { rt "$1" status | grep 'another machine'; }
