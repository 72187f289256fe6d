# shellcheck shell=bash
# The hosts and programs of act one, for bench/iperf-pair.sh and flow-test.sh. Source after tailnet.sh.
#
#                 coord 10.255.0.1
#                        |
#    nyc 203.0.113.1 -- inet -- fra 203.0.113.2
#                      /    \
#      203.0.113.11  ra      rb  203.0.113.12
#       192.168.1.2  a        b  192.168.2.2

# The namespaces, and 10 ms each way between a node and its farther relay.
story_topology() {
  lab_internet
  tailnet_coord_host
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

# Relays, coordination, and a key to join with in $LAB_DIR/auth-key.
start_story_hosts() {
  start_relay nyc nyc 203.0.113.1 900 nyc 2001:db8::1 || return 1
  start_relay fra fra 203.0.113.2 901 fra 2001:db8::2 || return 1
  make_derp_map nyc fra || return 1
  start_coord
}

# start_node NAME EVENTS [OPTION...]: joins by coordination; EVENTS is a file NAME.events.
start_node() {
  TAILNET_EVENTS=${2%/*} tailnet_ringtail "$1" "$1" "${@:3}"
}

# peer_address NODE: inner address of the peer that NODE knows.
peer_address() {
  rt "$1" status --json | "$BENCH" pick /peers/0/addresses/0
}
