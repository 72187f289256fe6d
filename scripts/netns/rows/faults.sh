# shellcheck shell=bash

# What a network says that does not fit the host. a is on a LAN of its own of the very prefix that r of ours and tailscaled t
# offer, and t has a shorter one around it; the exit node of a becomes a user of another; and IPv6 goes, or is not there.
#
#   p -- 192.168.77.0/24 -- a -- internet -- r, t (192.168.77.0/24), b, t (exit nodes), d (no IPv6), w
row_faults() {
  local before before_d
  tailnet_up
  lab_host w 203.0.113.50 2001:db8::50
  whom w
  hosts a r t b d
  for address in a:11 b:14 t:13; do
    ip -n "$LAB${address%:*}" addr add "2001:db8::${address#*:}/128" dev wan nodad
    ip -n "${LAB}inet" route add "2001:db8::${address#*:}/128" dev "p_${address%:*}"
    ip -n "${LAB}inet" addr add fe80::1/64 dev "p_${address%:*}" nodad
    ip -n "$LAB${address%:*}" -6 route add default via fe80::1 dev wan
  done
  lab_ns p
  lab_wire a lan p lan
  ip -n "${LAB}a" addr add 192.168.77.1/24 dev lan
  ip -n "${LAB}p" addr add 192.168.77.9/24 dev lan
  for address in r:192.168.77.10 t:192.168.77.10 t:192.168.5.9; do
    ip -n "$LAB${address%:*}" addr add "${address#*:}/32" dev lo
  done
  lab_in t sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding'
  lab_in d sh -c 'echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6'
  before=$(host_state a) before_d=$(host_state d)
  tailnet_ringtail a a --accept-routes
  tailnet_ringtail r r --advertise-routes 192.168.77.0/24
  tailnet_tailscaled t t --advertise-routes=192.168.77.0/24,192.168.0.0/16 --advertise-exit-node
  tailnet_ringtail b b
  tailnet_ringtail d d
  ready a r t b d || return 0
  rt b set --advertise-exit-node
  hs_routes r 192.168.77.0/24
  hs_routes t 192.168.77.0/24,192.168.0.0/16,0.0.0.0/0,::/0
  hs_routes b 0.0.0.0/0,::/0

  check "a prefix of two routers that is the LAN's: status says whose it stays" within 10 \
    host_says a '192.168.77.0/24: the host has a route of its own, which stays in force'
  check "also inside of the shorter one" host_says a "192.168.0.0/16: the host's 192.168.77.0/24 inside stays in force"
  check "the LAN is the LAN" goes_by a 192.168.77.9 lan
  check "the rest of the shorter one is the network's" tailnet_pings a 192.168.5.9 1
  ip -n "${LAB}a" addr del 192.168.77.1/24 dev lan
  check "without the LAN it is the network's" within 5 tailnet_pings a 192.168.77.10 0.5
  ip -n "${LAB}a" addr add 192.168.77.1/24 dev lan
  check "and the LAN's when that is back" within 5 goes_by a 192.168.77.9 lan

  check "b is a's way out" rt a set --exit-node b --exit-node-allow-lan-access
  check "for IPv4" within 10 seen a 203.0.113.50 203.0.113.14
  check "a way out cannot use another, and is told so" refused b 'a node cannot be an exit node and use one'
  check "nothing has changed by that" seen a 203.0.113.50 203.0.113.14
  rt b set --advertise-exit-node=false --exit-node t
  check "b is none any more: it goes out by tailscaled" within 10 seen b 203.0.113.50 203.0.113.13
  check "a is told" within 10 problem a \
    'exit node b: it does not offer to be one, or no administrator has approved it: nothing goes out to the Internet$'
  check "and nothing goes out, neither by b nor by a itself" seen a 203.0.113.50 ''
  check "the network does" tailnet_pings a r 0.5
  rt b set --exit-node= --advertise-exit-node
  check "until b is one again" within 10 seen a 203.0.113.50 203.0.113.14
  rt a set --exit-node=

  check "without IPv6 on the host status says what is not reached" within 5 problem d \
    "ringtail0 has no IPv6: the network's IPv6 addresses and routes are not used: sysctl -w net/ipv6/conf/ringtail0/disable_ipv6=0\$"
  check "IPv4 is" tailnet_pings d a 0.5
  tailnet_stream a r steady
  lab_in a sh -c 'echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6'
  check "one that loses IPv6 says so" within 5 problem a "ringtail0 has no IPv6: "
  check "and goes on" tailnet_online a
  lab_in a sh -c 'echo 0 >/proc/sys/net/ipv6/conf/all/disable_ipv6'
  check "when it is back there is nothing to say" within 12 no_problem a "has no IPv6"
  check "and it is used" within 5 lab_in a ping -6 -qc 2 -i 0.2 -W 1 "$(tailnet_ip r 6)"
  # The relay is reached by the other family anew, and paths are looked at.
  check "next to nothing was lost of IPv4 meanwhile" lost_at_most steady 10
  # It lost what had come by hand with IPv6.
  ip -n "${LAB}a" -6 addr add 2001:db8::11/128 dev wan nodad 2>/dev/null
  ip -n "${LAB}a" -6 route replace default via fe80::1 dev wan
  tailnet_stop d
  check "the host without IPv6 is left as it was found" same_state d "$before_d"
  tailnet_stop a
  check "so is the other" same_state a "$before"
}
host_says() { rt "$1" status | grep -Fx "host: $2"; }
refused() { # NODE WORDS: it may not use another exit node
  ! rt "$1" set --exit-node t >"$LAB_DIR/refused" 2>&1 && grep "$2" "$LAB_DIR/refused"
}

# The host lacks what a node works with: nftables, its right to change the network, or IPv6 altogether.
#
#   b -- internet -- n -- 192.168.77.0/24 -- p        c, m -- internet
row_lacking() {
  local before before_c deny=$LAB_DIR/deny
  tailnet_up
  hosts b n c m
  lab_ns p
  lab_wire n lan p lan
  ip -n "${LAB}n" addr add 192.168.77.1/24 dev lan
  ip -n "${LAB}p" addr add 192.168.77.9/24 dev lan
  ip -n "${LAB}p" route add default via 192.168.77.1
  check "what takes a host its means is built" cc -O1 -Wall -Werror -o "$deny" "$ROOT/scripts/netns/deny.c"
  before=$(host_state n) before_c=$(host_state c)
  tailnet_tailscaled b b --accept-routes
  TAILNET_RUN=("$deny" netfilter)
  tailnet_ringtail n n --advertise-routes 192.168.77.0/24
  TAILNET_RUN=("$deny" ipv6)
  tailnet_ringtail m m
  TAILNET_RUN=(setpriv --bounding-set -net_admin --inh-caps -net_admin)
  tailnet_ringtail c c
  check "without the right to make a TUN a node ends, and says how it can be had" within 10 ended c \
    'cannot open the TUN device ringtail0: Operation not permitted .os error 1. .that needs CAP_NET_ADMIN, unless somebody made it for us: ip tuntap add ringtail0 mode tun multi_queue'
  check "the host is as it was" same_state c "$before_c"
  ip -n "${LAB}c" tuntap add ringtail0 mode tun
  tailnet_start c
  check "so it does with one of another kind" within 10 ended c \
    'Invalid argument .os error 22. .if it is there already, it has to be made by `ip tuntap add ringtail0 mode tun multi_queue`'
  ip -n "${LAB}c" tuntap del ringtail0 mode tun
  ip -n "${LAB}c" tuntap add ringtail0 mode tun multi_queue
  tailnet_start c
  check "and with one that is down" within 10 ended c \
    'cannot bring ringtail0 up with MTU 1280 .who may does it by `ip link set ringtail0 up mtu 1280`.: .*Operation not permitted'
  # Else the kernel gives it an address of its own as soon as somebody has it open.
  ip -n "${LAB}c" link set ringtail0 up mtu 1280 addrgenmode none
  before_c=$(host_state c)
  tailnet_start c
  TAILNET_RUN=()
  ready b n m c || return 0

  check "one that is as it has to be will do, and the rest is said" within 10 problem c \
    "this process may not change the host's network .it lacks CAP_NET_ADMIN.; who may has to do it: $(hand c)\$"
  check "the host's resolver is not told of what is not there" resolver_of c 203.0.113.254
  by_hand c
  check "done as it is said, the node reaches others" within 10 tailnet_pings c b 0.5
  check "and is reached, directly" goes_direct b c
  check "over IPv6 as well" lab_in c ping -6 -qc 2 -i 0.2 -W 1 "$(tailnet_ip b 6)"
  check "what stays to be said is that" within 5 no_problem c 'who may has to'
  check "and the resolver is told" within 5 resolver_of c 100.100.100.100
  check "without rules nothing else is routed" problem c \
    "this process may set no policy rules .it lacks CAP_NET_ADMIN. for IPv4: only peers' own addresses are routed\$"
  check "and nothing guarded" problem c \
    "no nftables rules can be made .Operation not permitted .os error 1..: the network's addresses are not guarded against senders beside the tunnel; it needs CAP_NET_ADMIN\$"
  tailnet_stop c
  by_hand c del
  check "when that is undone the host is as it was" same_state c "$before_c"

  hs_routes n 192.168.77.0/24
  check "without nftables a router says what is missing" problem n \
    "no nftables rules can be made .Protocol not supported .os error 93..: nothing is masqueraded, and the network's addresses are not guarded; the kernel needs nf_tables: modprobe nf_tables\$"
  check "and that it lets no interface forward" problem n \
    'IPv4 is not forwarded by lan .without nftables it would forward between other networks too.: sysctl -w net/ipv4/conf/lan/forwarding=1$'
  check "it is a node all the same" tailnet_pings n b 0.5
  check "and reached" tailnet_pings b n 0.5
  lab_in n sysctl -qw net/ipv4/conf/lan/forwarding=1
  check "done as it is said, it is a router, with a route back" within 10 tailnet_pings b 192.168.77.9 0.5
  check "which it says no more" within 12 no_problem n 'IPv4 is not forwarded'
  tailnet_stop n
  lab_in n sysctl -qw net/ipv4/conf/lan/forwarding=0
  check "it leaves the host as it was found" same_state n "$before"

  check "without sockets of IPv6 a node is one" tailnet_pings m b 0.5
  check "and IPv6 inside is there" lab_in m ping -6 -qc 2 -i 0.2 -W 1 "$(tailnet_ip b 6)"
}
# ended NODE WORDS: it has, and these are its last.
ended() { ! lab_alive "node-$1" && tail -n 1 "$LAB_DIR/node-$1.log" | grep -E "$2"; }
# hand NODE: what somebody has to do for it, with such addresses.
hand() {
  local address
  for address in "$(tailnet_ip "$1")/32" 100.100.100.100/32 "$(tailnet_ip "$1" 6)/128" fd7a:115c:a1e0::53/128; do
    printf 'ip address add %s dev ringtail0 && ' "$address"
  done
  echo 'ip route add 100.64.0.0/10 dev ringtail0 && ip route add fd7a:115c:a1e0::/48 dev ringtail0'
}
# by_hand NODE [del]: what status says there, done, or undone.
by_hand() {
  [ $# = 2 ] || { rt "$1" status || true; } | sed -n 's/.*who may has to do it: //p' | sed 's/ && /\n/g' >"$LAB_DIR/hand"
  while read -r line; do
    # shellcheck disable=SC2086 # a command
    lab_in "$1" ${line/ add / ${2:-add} }
  done <"$LAB_DIR/hand"
}
resolver_of() { grep "^nameserver $2" "$LAB_DIR/node-$1.etc/upper/resolv.conf"; }
