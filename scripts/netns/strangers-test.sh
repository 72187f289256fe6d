#!/usr/bin/env bash
# What strangers hold of our coordination server: m connects from one address, from all networks of one customer, and
# from thousands of customers, a thousand times a second, and never ends what it began to say; a and b are nodes.
#
#        coord 10.0.0.1, fd00::1
#          |
#     br0 -+-----------+-----------+
#          |           |           |
#       a 10.0.0.2   b 10.0.0.3   m 10.0.0.4, fd00::4 and all of fd00:66::/32
#
#   scripts/netns/strangers-test.sh [--keep]
#
# Uses $RINGTAIL_BIN_DIR, target/debug by default. Needs root; without it the test is skipped aloud, or fails when
# RINGTAIL_NO_SKIP=1.
set -euo pipefail

# shellcheck source=begin.sh
. "$(dirname "$0")/begin.sh"
lab_limit 180 'echo "strangers-test: still running after 180 s"'

lab_ns coord a b m
lab_lan coord eth0 a=10.0.0.2/24 b=10.0.0.3/24 m=10.0.0.4/24
ip -n "${LAB}coord" addr add 10.0.0.1/24 dev br0
ip -n "${LAB}coord" addr add fd00::1/64 dev br0 nodad
ip -n "${LAB}m" addr add fd00::4/64 dev eth0 nodad
ip -n "${LAB}m" route add local fd00:66::/32 dev lo
lab_in m sh -c 'echo 1 >/proc/sys/net/ipv6/ip_nonlocal_bind'
ip -n "${LAB}coord" route add fd00:66::/32 via fd00::4

start_coord() {
  lab_spawn coord coord "$RINGTAIL" coord --addr 10.0.0.1:8080 --addr '[fd00::1]:8080' --addr 127.0.0.1:8080 \
    --state-dir "$LAB_DIR/coord" --auth-key-file "$LAB_DIR/key"
  lab_wait_file "$LAB_DIR/key" 20
}
# A node without packets: what its server says, one JSON object a line.
start_node() { # NAME OPTION...
  lab_spawn "$1" "node-$1" "$RINGTAIL" coord watch http://10.0.0.1:8080 --auth-key-file "$LAB_DIR/key" \
    --hostname "$1" "${@:2}"
  within 20 hears "$1"
}
hears() { grep -q '"peers"' "$LAB_DIR/node-$1.log"; }
start_a() { start_node a --state-dir "$LAB_DIR/node-a"; }
# Its connection is new, and its machine is known.
a_again() { lab_stop node-a && : >"$LAB_DIR/node-a.log" && start_a; }
# Another machine each time.
new_b() { lab_stop node-b && : >"$LAB_DIR/node-b.log" && start_node b; }
# An operator, on the server's machine.
metrics() {
  lab_in coord timeout 5 bash -c 'exec 3<>/dev/tcp/127.0.0.1/8080
    printf "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" >&3; cat <&3' >"$LAB_DIR/metrics"
  grep -q ringtail_coord_connections "$LAB_DIR/metrics"
}
count() { metrics && awk -v name="ringtail_coord_$1" '$1 == name { print $2 }' "$LAB_DIR/metrics"; }
at_most() { # NAME MOST
  local is
  is=$(count "$1") && SAID="$is" && [ "$is" -le "$2" ] && [ "$is" -ge $(($2 / 2)) ]
}
rss_kb() { awk '/^VmRSS/ { print $2 }' "/proc/$(lab_pid coord)/status"; }
grown_at_most() { # MEGABYTES
  local grown=$((($(rss_kb) - RSS) / 1024))
  SAID="$grown MB" && [ $grown -le "$1" ]
}
opened() { [ "$(count connections)" -ge "$1" ]; }

# shellcheck disable=SC2016 # Perl's variables
FLOOD='
  my ($pattern, $count, $to) = @ARGV;
  my $v6 = $to =~ /:/;
  sub pack_address {
    my ($address, $port) = @_;
    return $v6 ? pack_sockaddr_in6($port, inet_pton(AF_INET6, $address)) : pack_sockaddr_in($port, inet_aton($address));
  }
  $SIG{PIPE} = "IGNORE";
  my @held;
  for (my $n = 0;; $n++) {
    my $from = $pattern =~ /%/ ? sprintf($pattern, $n % $count) : $pattern;
    socket(my $s, $v6 ? AF_INET6 : AF_INET, SOCK_STREAM, 0) or die "socket: $!";
    bind($s, pack_address($from, 0)) or die "bind $from: $!";
    connect($s, pack_address($to, 8080)) or warn "connect from $from: $!";
    syswrite($s, "GET /key?v=130 HTTP/1.1\r\nHost: ") if $n % 2;
    $held[$n % $count] = $s;
    select(undef, undef, undef, 0.001);
  }'
# shellcheck disable=SC2016 # of the inner shell
flood() { # PATTERN COUNT SERVER
  lab_spawn m flood bash -c 'ulimit -n 8192; exec perl -MSocket=:all -e "$0" "$@"' "$FLOOD" "$@"
}
# While it floods, everybody else is served.
others_are_served() {
  check "$1: a node that is known comes back" a_again
  check "$1: a new one joins" new_b
  check "$1: and the memory is bounded" grown_at_most 64
}

check "the server starts" start_coord
check "a node joins" start_a
RSS=$(rss_kb)
KNOWN=$(count connections)

flood 10.0.0.4 3000 10.0.0.1
check "one address tries 2,000 times" within 30 opened $((KNOWN + 2000))
check "and holds 64" at_most gauge_strangers 64
others_are_served "one address"
lab_stop flood KILL

flood 'fd00:66:0:%x::1' 3000 fd00::1
check "one customer's thousands of networks try" within 30 opened $((KNOWN + 4000))
check "and hold 128" at_most gauge_strangers 128
others_are_served "one customer"
lab_stop flood KILL

flood 'fd00:66:%x::1' 3000 fd00::1
check "thousands of customers try" within 30 opened $((KNOWN + 6000))
check "and hold 512" at_most gauge_strangers 512
others_are_served "thousands"
lab_stop flood KILL
displaced() { [ "$(count displaced)" -gt 1000 ]; }
check "who lost his place is counted" displaced
check "no descriptor was missed" test "$(count no_descriptor)" = 0

verdict
