# shellcheck shell=bash
# The hosts and programs of act one, for bench/iperf-pair.sh and flow-test.sh. Source after lab.sh, with
# RINGTAIL and BENCH naming the binaries.
#
#                 coord 10.255.0.1
#                        |
#    nyc 203.0.113.1 -- inet -- fra 203.0.113.2
#                      /    \
#      203.0.113.11  ra      rb  203.0.113.12
#       192.168.1.2  a        b  192.168.2.2

fail() {
  echo "error: $*" >&2
  local log
  for log in "$LAB_DIR"/*.log; do
    if [ -s "$log" ]; then
      echo "--- last lines of $(basename "$log"):" >&2
      tail -n 15 "$log" >&2
    fi
  done
  exit 1
}

# The namespaces, and 10 ms each way between a node and its farther relay.
story_topology() {
  lab_internet
  lab_host coord 203.0.113.3
  ip -n "${LAB}coord" addr add 10.255.0.1/32 dev lo
  ip -n "${LAB}inet" route add 10.255.0.1/32 via 203.0.113.3 dev p_coord onlink
  lab_host nyc 203.0.113.1 2001:db8::1
  lab_host fra 203.0.113.2 2001:db8::2
  lab_home a 1
  lab_home b 2
  lab_far_link 10
  lab_far p_ra 203.0.113.2 2001:db8::2 100
  lab_far p_rb 203.0.113.1 2001:db8::1 100
  lab_far p_fra 203.0.113.11 2001:db8:1::/64 101
  lab_far p_nyc 203.0.113.12 2001:db8:2::/64 101
}

# start_relay NS LABEL ADDRESS ID CODE [IPV6]: a relay; its entry for the DERP map lands in $LAB_DIR/LABEL.
start_relay() {
  rm -f "$LAB_DIR/$2/derp-node.json"
  lab_spawn "$1" "$2" "$RINGTAIL" derp --hostname "$3" --addr "$3:443" ${6:+--addr "[$6]:443"} --stun-port 3478 \
    --state-dir "$LAB_DIR/$2" --region-id "$4" --region-code "$5"
  lab_wait_file "$LAB_DIR/$2/derp-node.json" 20
}

# make_derp_map RELAY...: joins the relays' own entries into one DERP map file.
make_derp_map() {
  "$BENCH" derp-map "${@/#/$LAB_DIR/}" >"$LAB_DIR/derp-map.json"
}

start_coord() {
  lab_spawn coord coord "$RINGTAIL" coord --addr 10.255.0.1:8080 --state-dir "$LAB_DIR/coord" \
    --derp-map "$LAB_DIR/derp-map.json"
}

# Relays, coordination, and a key to join with in $LAB_DIR/auth-key.
start_story_hosts() {
  start_relay nyc nyc 203.0.113.1 900 nyc 2001:db8::1 || return 1
  start_relay fra fra 203.0.113.2 901 fra 2001:db8::2 || return 1
  make_derp_map nyc fra || return 1
  start_coord
  for _ in $(seq 400); do
    lab_alive coord || return 1
    if lab_in coord grep -qi ":$(printf %04x 8080) 0*:0000 0A" /proc/net/tcp; then
      "$RINGTAIL" coord keys create --reusable --state-dir "$LAB_DIR/coord" >"$LAB_DIR/auth-key"
      return
    fi
    sleep 0.05
  done
  return 1
}

# start_node NAME EVENTS [OPTION...]: joins by coordination.
start_node() {
  local node=$1 events=$2
  shift 2
  lab_spawn "$node" "node-$node" "$RINGTAIL" up --coord http://10.255.0.1:8080 --auth-key-file "$LAB_DIR/auth-key" \
    --state-dir "$LAB_DIR/node-$node" --hostname "$node" --events "$events" "$@"
}

# peer_address NODE: inner address of the peer that NODE knows.
peer_address() {
  "$RINGTAIL" status --json --state-dir "$LAB_DIR/node-$1" | "$BENCH" pick /peers/0/addresses/0
}
