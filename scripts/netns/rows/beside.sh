# shellcheck shell=bash

# A node of another network, from a file, on a host that has tailscaled too: first one, then the other is there before.
row_beside() {
  tailnet_up
  hosts a b c
  own_keys a
  own_keys b
  own_file a 1 b 2
  own_file b 2 a 1
  own_start b
  own_start a
  check "a node of its own network answers" within 10 own_answers
  tailnet_tailscaled ta a
  tailnet_tailscaled tc c
  ready ta tc || return 0
  check "tailscaled beside it works" tailnet_pings ta tc 1
  check "and it works on beside tailscaled" own_answers
  lab_stop own-a
  check "tailscaled has all its routes when it ends" tailnet_pings ta tc 1
  check "and it leaves no rule" not own_rules
  own_start a
  check "started beside tailscaled it takes another table, and says so" within 10 grep -q "trying the next one" "$LAB_DIR/own-a.log"
  check "and works" within 10 own_answers
  check "as tailscaled does" tailnet_pings ta tc 1
  lab_stop own-a KILL
  own_start a
  check "killed and started again it works" within 10 own_answers
  lab_stop own-a
  check "and leaves no rule" not own_rules
  check "tailscaled works on" tailnet_pings ta tc 1
}
own_keys() { "$RINGTAIL" genkey --state-dir "$LAB_DIR/own-$1" >"$LAB_DIR/own-$1.keys"; }
own_file() { # NODE NUMBER PEER NUMBER
  {
    echo "addresses = [\"10.77.0.$2/32\"]"
    echo '[[peer]]'
    echo "name = \"$3\""
    cat "$LAB_DIR/own-$3.keys"
    echo "addresses = [\"10.77.0.$4/32\"]"
    echo "endpoints = [\"203.0.113.1$4:41700\"]"
  } >"$LAB_DIR/own-$1.toml"
}
own_start() {
  lab_spawn "$1" "own-$1" "$RINGTAIL" up --network "$LAB_DIR/own-$1.toml" --state-dir "$LAB_DIR/own-$1" --listen-port 41700
}
own_answers() { lab_in a ping -q -c 10 -i 0.1 -W 1 10.77.0.2 | grep ' 10 received'; }
own_rules() { ip -n "${LAB}a" rule | grep 'proto 114'; }
