# shellcheck shell=bash

# Two sites behind routers of ours. The host of r forwards nothing by itself, and has a firewall as Docker makes it;
# p there has no route into the tailnet, q has one. z is behind a. tailscaled b uses the routes of both.
#
#   z -- 192.168.79.0/24 -- a -- internet -- r -- 192.168.77.0/24, fd77::/64 -- p
#                                b --'       '---- 192.168.78.0/24 ------------ q
row_router() {
  local before routes=192.168.77.0/24,192.168.78.0/24,fd77::/64
  tailnet_up
  lab_host a 203.0.113.11
  lab_host b 203.0.113.12
  lab_host r 203.0.113.21
  lab_ns p q z
  lab_wire r lan p lan
  lab_wire r second q lan
  lab_wire a lan z lan
  site r lan 192.168.77 p
  site r second 192.168.78 q
  site a lan 192.168.79 z
  ip -n "${LAB}r" addr add fd77::1/64 dev lan nodad
  ip -n "${LAB}p" addr add fd77::9/64 dev lan nodad
  ip -n "${LAB}p" route del default
  ip -n "${LAB}p" -6 route add fd7a:115c:a1e0::/48 via fd77::1
  docker_like r
  before=$(host_state r)
  talk_make
  tailnet_tailscaled b b --accept-routes
  tailnet_ringtail a a --accept-routes --advertise-routes 192.168.79.0/24
  tailnet_ringtail r r --accept-routes --advertise-routes $routes --snat-subnet-routes 192.168.77.0/24,fd77::/64
  ready a b r || return 0
  check "Headscale hears of the offers, and they are approved" within 10 hs_routes r $routes
  hs_routes a 192.168.79.0/24
  talk_serve p q z b
  check "tailscaled reaches a subnet through ours that has no route back" within 15 tailnet_pings b 192.168.77.9 1
  check "so does ringtail" within 15 tailnet_pings a 192.168.77.9 1
  check "over IPv6, too" lab_in b ping -6 -qc 3 -i 0.2 -W 2 fd77::9
  check "UDP" udp_answers b 192.168.77.9
  check "a subnet with masquerade sees the router" sees b 192.168.77.9 192.168.77.1
  check "and one without it sees who asks" sees b 192.168.78.9 "$(tailnet_ip b)"
  check "and reaches the tailnet itself" tailnet_pings q b 1
  check "one site reaches the other" within 10 tailnet_pings q 192.168.79.9 1
  check "for rules of ours before those of the host's firewall" gates r 2
  check "which iptables reads as its own" iptables_reads r
  check "nothing passes between the host's own networks" not lab_in q ping -qc 2 -i 0.2 -W 1 203.0.113.12
  check "status has nothing to say of all that" no_problem r 'forward|firewall|nft'
  check "nobody on a subnet speaks as a node to the router" spoofed_by q "$(tailnet_ip r)" guard-input
  check "nor through it" spoofed_by q 192.168.77.9 guard-forward
  # A subnet has an MTU of 1500, and the tunnel one of 1280.
  check "what is too large for the tunnel is told to the sender" too_large q 192.168.79.9 'Frag needed.*mtu = 1280'
  check "over IPv6, too" too_large p "$(tailnet_ip b 6)" 'too big: mtu=1280'
  icmp_blocked p q z a b
  check "TCP from site to site with ICMP blocked everywhere" fetches z 192.168.78.9
  check "and the other way" fetches q 192.168.79.9
  check "status says meanwhile that somebody was not heard" within 12 problem r 'came in beside the tunnel'
  lab_in r nft flush ruleset
  check "where somebody flushes all rules, ours stay" sees b 192.168.77.9 192.168.77.1
  docker_like r
  check "and a firewall that comes back is opened again" within 10 gates r 2
  check "for traffic, too" sees b 192.168.77.9 192.168.77.1
  lab_in r sh -c 'echo 0 >/proc/sys/net/ipv4/ip_forward'
  check "where somebody switches forwarding off, it is on again" within 15 sees b 192.168.77.9 192.168.77.1
  tailnet_stop r
  check "a router that ends leaves its host as it found it" same_state r "$before"
  tailnet_start r
  check "and is back when started again" within 20 sees b 192.168.77.9 192.168.77.1
  tailnet_stop r KILL
  check "one that is killed leaves nothing after a moment" within 3 same_state r "$before"
  tailnet_start r
  check "and is back, too" within 20 sees b 192.168.77.9 192.168.77.1
  tailnet_stop r
  check "and leaves nothing" same_state r "$before"
}

# A router that may change nothing of its host says what to do, and that is enough. Then one with /proc/sys read-only, as
# in a container.
row_firewall() {
  tailnet_up
  lab_host b 203.0.113.12
  lab_host r 203.0.113.21
  lab_ns p
  lab_wire r lan p lan
  site r lan 192.168.77 p
  docker_like r
  talk_make
  tailnet_tailscaled b b --accept-routes
  tailnet_ringtail r r --advertise-routes 192.168.77.0/24 --host-firewall report --forwarding report
  ready b r || return 0
  talk_serve p
  check "Headscale hears of the offer, and it is approved" within 10 hs_routes r 192.168.77.0/24
  check "status says what is not forwarded" within 10 problem r 'IPv4 is not forwarded by lan .*sysctl -w'
  check "and what is dropped" problem r 'drops what is forwarded .*nft insert rule ip filter FORWARD iifname ringtail0 accept'
  check "the host is as it was" own_alone r
  check "and forwards nothing" not tailnet_pings b 192.168.77.9 1
  as_told r
  check "whoever does as status says has a router" within 10 sees b 192.168.77.9 192.168.77.1
  check "of which status has nothing more to say" within 15 no_problem r 'forwarded'
  tailnet_stop r
  lab_in r sh -c 'echo 0 >/proc/sys/net/ipv4/conf/lan/forwarding'
  TAILNET_OPTIONS[r]='--advertise-routes 192.168.77.0/24'
  TAILNET_RUN=(unshare --mount sh -c 'mount --bind -o ro /proc/sys /proc/sys && exec "$@"' sh)
  tailnet_start r
  check "where /proc/sys is read-only, it starts all the same" within 20 tailnet_online r
  check "and says what to do" within 10 problem r 'IPv4 is not forwarded by lan .Read-only file system.*sysctl -w'
}

# site ROUTER INTERFACE NET HOST: the router is .1 there, and HOST .9.
site() {
  ip -n "$LAB$1" addr add "$3.1/24" dev "$2"
  ip -n "$LAB$4" addr add "$3.9/24" dev lan
  ip -n "$LAB$4" route add default via "$3.1"
}
# docker_like NS: a firewall that forwards only what it knows, of rules that iptables can read.
docker_like() {
  lab_in "$1" nft -f - <<'NFT'
table ip filter {
  chain DOCKER-USER { counter return; }
  chain FORWARD { type filter hook forward priority filter; policy drop;
    counter jump DOCKER-USER
    iifname "docker0" counter accept
  }
  chain INPUT { type filter hook input priority filter; policy drop;
    iifname "lo" counter accept
    meta l4proto tcp counter accept
    meta l4proto icmp counter accept
  }
}
table ip6 filter {
  chain FORWARD { type filter hook forward priority filter; policy drop; }
}
NFT
}
gates() { # NS COUNT: so many rules of ours in FORWARD of each family
  local family
  for family in ip ip6; do
    [ "$(lab_in "$1" nft list chain $family filter FORWARD | grep -c 'comment "ringtail-52')" = "$2" ] || return 1
  done
}
# By Debian's iptables, unpacked and not installed.
iptables_reads() {
  local package libraries='' at=$CACHE/debian-iptables
  for package in iptables libxtables12 libip4tc2 libip6tc2; do
    unpack_package $package "$CACHE/debian-$package" || return 1
    libraries+=$(echo "$CACHE/debian-$package"/usr/lib/*/):
  done
  lab_in "$1" env LD_LIBRARY_PATH="$libraries" XTABLES_LIBDIR="$(echo "$at"/usr/lib/*/xtables)" \
    "$at/usr/sbin/xtables-nft-multi" iptables -S >"$LAB_DIR/rules" || return 1
  cat "$LAB_DIR/rules"
  grep -q -- '-A FORWARD -i ringtail0 .*-j ACCEPT' "$LAB_DIR/rules" &&
    grep -q -- '-A INPUT -p udp .*--dport 41641 .*-j ACCEPT' "$LAB_DIR/rules"
}
# own_alone NS: its firewall and its subnet's interface are as they were.
own_alone() {
  [ "$(lab_in "$1" sysctl -a 2>/dev/null | grep -c '\.lan\.forwarding = 1')" = 0 ] &&
    ! lab_in "$1" nft list table ip filter | grep ringtail
}
# What status says, done.
as_told() {
  rt "$1" status | grep -oE '(sysctl -w [^ ]+|nft insert rule [a-z0-9]+ filter FORWARD [a-z]+ ringtail0 accept)' >"$LAB_DIR/told"
  while read -r line; do
    # shellcheck disable=SC2086 # a command
    lab_in "$1" $line
  done <"$LAB_DIR/told"
}
# Of three pings with an address of the tailnet none is answered, and all are counted by a chain of ours.
spoofed_by() { # NS ADDRESS CHAIN
  local before after
  ip -n "$LAB$1" addr replace 100.64.0.99/32 dev lo
  before=$(dropped_by "$3")
  lab_in "$1" ping -qc 3 -i 0.2 -W 1 -I 100.64.0.99 "$2"
  after=$(dropped_by "$3")
  ip -n "$LAB$1" addr del 100.64.0.99/32 dev lo
  SAID="$((after - before)) counted"
  [ "$SAID" = "3 counted" ]
}
dropped_by() { lab_in r nft list chain inet ringtail-52 "$1" | sed -n 's/.*100\.64\.0\.0\/10 counter packets \([0-9]*\).*/\1/p'; }
too_large() { { lab_in "$1" ping -M 'do' -c 2 -i 0.3 -W 1 -s 1400 "$2" || true; } | grep "$3"; }
icmp_blocked() {
  local name
  for name in "$@"; do
    lab_in "$name" nft 'table inet no_icmp {
      chain in { type filter hook input priority -300; meta l4proto { icmp, ipv6-icmp } drop; }
      chain out { type filter hook output priority -300; meta l4proto { icmp, ipv6-icmp } drop; }
    }'
  done
}

# A server that tells each client its address and a megabyte, and by UDP its address alone.
talk_make() {
  cat >"$LAB_DIR/talk.py" <<'PY'
import socket, sys, threading

def datagrams():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("", 8000))
    while True:
        _, who = s.recvfrom(99)
        s.sendto(who[0].encode(), who)

def answer(c, who):
    try:
        c.sendall(who[0].ljust(16).encode() + bytes(1000000))
        c.close()
    except OSError:
        pass

def serve():
    threading.Thread(target=datagrams, daemon=True).start()
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("", 8000))
    s.listen()
    while True:
        threading.Thread(target=answer, args=s.accept(), daemon=True).start()

def fetch(where):
    s = socket.create_connection((where, 8000), 3)
    got = b""
    while more := s.recv(1 << 16):
        got += more
    print(got[:16].decode().strip(), len(got) - 16)

def ask(where):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(3)
    s.sendto(b"who", (where, 8000))
    print(s.recv(99).decode())

{"serve": serve, "fetch": fetch, "ask": ask}[sys.argv[1]](*sys.argv[2:])
PY
}
talk_serve() {
  local name
  for name in "$@"; do
    lab_spawn "$name" "talk-$name" python3 "$LAB_DIR/talk.py" serve
    within 5 tailnet_listens "$name" 8000
  done
}
fetches() { # NS ADDRESS: all of it
  lab_in "$1" timeout 8 python3 "$LAB_DIR/talk.py" fetch "$2" | grep ' 1000000$'
}
sees() { # NS ADDRESS SOURCE: so who asks there seems to be
  lab_in "$1" timeout 8 python3 "$LAB_DIR/talk.py" fetch "$2" | grep -F "$3 1000000"
}
udp_answers() { lab_in "$1" timeout 5 python3 "$LAB_DIR/talk.py" ask "$2" | grep .; }
