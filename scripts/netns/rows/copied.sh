# shellcheck shell=bash

# A machine is copied, state directory and all: both notice that they are two.
row_copied() {
  tailnet_up
  hosts a b
  tailnet_ringtail a a
  check "a is in the network" within 40 tailnet_online a
  check "and alone" no_problem a 'another machine'
  tailnet_stop a
  cp -a "$LAB_DIR/node-a" "$LAB_DIR/node-b"
  tailnet_start a
  check "a is back" within 20 tailnet_online a
  # What Headscale still had of the run before is no other machine.
  pause 12
  tailnet_ringtail b b
  check "it says that another machine has its keys" within 30 problem a 'another machine'
  check "so does the other" within 90 problem b 'another machine'
  check "in its log, too" grep -q 'another machine' "$LAB_DIR/node-a.log"
}
