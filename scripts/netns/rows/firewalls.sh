# shellcheck shell=bash

# Routers on hosts whose firewalls are kept by somebody: u by ufw, f by firewalld, o by a firewalld that lets nobody else
# change its table, l by iptables-legacy. Their rules are such as these programs make. tailscaled b uses the routes of all.
#
#   b -- internet -- u, f, o, l -- 192.168.81.0/24 to 192.168.84.0/24 -- p
row_firewalls() {
  local name handle number=81
  local -A before=()
  tailnet_up
  lab_host b 203.0.113.12
  lab_ns p
  for name in u f o l; do
    lab_host $name "203.0.113.$((number - 60))"
    lab_wire $name lan p "to_$name"
    ip -n "$LAB$name" addr add 192.168.$number.1/24 dev lan
    ip -n "${LAB}p" addr add 192.168.$number.9/24 dev "to_$name"
    number=$((number + 1))
  done
  ufw_like u
  firewalld_like f
  mkfifo "$LAB_DIR/owner"
  lab_spawn o owner sh -c 'exec nft -i <"$0"' "$LAB_DIR/owner"
  exec 9>"$LAB_DIR/owner"
  firewalld_rules 'flags owner;' | tr '\n' ' ' >&9
  echo >&9
  check "a firewall's program holds its table" within 5 table_of o
  check "Debian's iptables-legacy can be had" legacy_like l
  for name in u f o l; do before[$name]=$(host_state $name); done
  tailnet_tailscaled b b --accept-routes
  number=81
  for name in u f o l; do
    tailnet_ringtail $name $name --advertise-routes 192.168.$number.0/24
    number=$((number + 1))
  done
  ready b u f o l || return 0
  number=81
  for name in u f o l; do
    hs_routes $name 192.168.$number.0/24
    number=$((number + 1))
  done
  # What is told of l is counted over some time.
  lab_spawn b knock ping -qi 0.3 192.168.84.9

  check "behind ufw's rules a subnet is reached" within 10 tailnet_pings b 192.168.81.9 0.5
  check "and the router itself, directly" goes_direct b u
  check "behind firewalld's, too" within 10 tailnet_pings b 192.168.82.9 0.5
  check "and the router itself, directly" goes_direct b f
  for name in u f; do
    check "$name has nothing to say of its firewall" no_problem $name 'firewall|nft'
  done
  check "the rest of ufw's rules is in force" dropped_at b 203.0.113.21 7
  ufw_like u
  check "rules that ufw loads anew are opened again" within 5 tailnet_pings b 192.168.81.9 0.5
  firewalld_like f
  check "and those of firewalld" within 5 tailnet_pings b 192.168.82.9 0.5
  rt u set --host-firewall report
  check "where ufw's rules are to be left alone its commands are said" within 5 problem u \
    "the host's firewall drops what is forwarded for the network .chain FORWARD of table ip filter.: ufw route allow in on ringtail0 && ufw route allow out on ringtail0\$"
  check "for what the host gets, too" problem u \
    "the host's firewall drops what is sent to this host by the network .chain INPUT of table ip filter.: ufw allow in on ringtail0 && ufw allow 41641/udp\$"
  check "and nothing gets through" not tailnet_pings b 192.168.81.9 0.5
  check "a table that nobody else may change: firewalld's commands are said" problem o \
    "the host's firewall drops what is forwarded for the network .chain filter_FORWARD of table inet firewalld.: firewall-cmd --zone=trusted --add-interface=ringtail0 .our own rule is refused: Operation not permitted .os error 1..\$"
  check "for what the host gets, too" problem o \
    "what is sent to this host by the network .chain filter_INPUT of table inet firewalld.: firewall-cmd --zone=trusted --add-interface=ringtail0 && firewall-cmd --add-port=41641/udp .our own rule is refused: "
  check "it is a node all the same" tailnet_pings o u 0.5
  # By whom it belongs to, in as many words as we would use.
  echo 'insert rule inet firewalld filter_FORWARD iifname "ringtail0" accept; insert rule inet firewalld filter_FORWARD oifname "ringtail0" accept' >&9
  check "when its holder lets the tunnel through it is a router" within 5 tailnet_pings b 192.168.83.9 0.5
  check "of which there is nothing more to say" within 5 no_problem o 'drops what is forwarded'
  lab_in o nft -a list chain inet firewalld filter_FORWARD | sed -n 's/.*ringtail0.*handle \([0-9]*\)$/\1/p' >"$LAB_DIR/handles"
  while read -r handle; do
    echo "delete rule inet firewalld filter_FORWARD handle $handle" >&9
  done <"$LAB_DIR/handles"

  check "what iptables-legacy drops is noticed, and its command said" within 30 problem l \
    "[0-9]+ packets came out of the tunnel to be forwarded, and the host's firewall let none of them pass: it has rules of iptables-legacy: iptables-legacy -I FORWARD -i ringtail0 -j ACCEPT && iptables-legacy -I FORWARD -o ringtail0 -j ACCEPT\$"
  legacy l -I FORWARD -i ringtail0 -j ACCEPT
  legacy l -I FORWARD -o ringtail0 -j ACCEPT
  check "done as it is said, it is a router" within 5 tailnet_pings b 192.168.84.9 0.5
  for name in u f o; do
    tailnet_stop $name
    check "$name is left as it was found" same_state $name "${before[$name]}"
  done
  check "of which l says no more" within 20 no_problem l 'came out of the tunnel'
  legacy l -D FORWARD -i ringtail0 -j ACCEPT
  legacy l -D FORWARD -o ringtail0 -j ACCEPT
  tailnet_stop l
  check "l is left as it was found" same_state l "${before[l]}"
  exec 9>&-
}
table_of() { lab_in "$1" nft list ruleset | grep 'table inet firewalld'; }
# dropped_at FROM ADDRESS PORT: a connection is not even refused.
dropped_at() {
  lab_in "$1" timeout 1 bash -c ": <>/dev/tcp/$2/$3"
  [ $? = 124 ]
}

# ufw_like NS: what ufw has iptables make at its defaults, as nftables shows it.
ufw_like() {
  lab_in "$1" nft -f - <<'NFT'
table ip filter {}
delete table ip filter
table ip6 filter {}
delete table ip6 filter
table ip filter {
  chain ufw-not-local {
    fib daddr type local counter return
    fib daddr type multicast counter return
    fib daddr type broadcast counter return
    counter drop
  }
  chain ufw-user-input { tcp dport 22 counter accept; }
  chain ufw-before-input {
    iifname "lo" counter accept
    ct state related,established counter accept
    ct state invalid counter drop
    icmp type echo-request counter accept
    udp sport 67 udp dport 68 counter accept
    counter jump ufw-not-local
    counter jump ufw-user-input
  }
  chain ufw-before-forward {
    ct state related,established counter accept
    icmp type { destination-unreachable, time-exceeded, parameter-problem } counter accept
  }
  chain ufw-track-output { meta l4proto { tcp, udp } ct state new counter accept; }
  chain INPUT { type filter hook input priority filter; policy drop; counter jump ufw-before-input; }
  chain FORWARD { type filter hook forward priority filter; policy drop; counter jump ufw-before-forward; }
  chain OUTPUT { type filter hook output priority filter; policy accept; counter jump ufw-track-output; }
}
table ip6 filter {
  chain ufw6-before-input {
    iifname "lo" counter accept
    ct state related,established counter accept
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert, echo-request } counter accept
  }
  chain INPUT { type filter hook input priority filter; policy drop; counter jump ufw6-before-input; }
  chain FORWARD { type filter hook forward priority filter; policy drop; }
}
NFT
}
# firewalld_like NS: what firewalld makes at its defaults, without what is empty.
firewalld_like() {
  { echo 'table inet firewalld {}; delete table inet firewalld'; firewalld_rules; } | lab_in "$1" nft -f -
}
firewalld_rules() {
  cat <<NFT
table inet firewalld { ${1:-}
  chain filter_PREROUTING { type filter hook prerouting priority 10; policy accept;
    icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept;
    meta nfproto ipv6 fib saddr . mark . iif oif missing drop;
  };
  chain filter_IN_public { tcp dport 22 accept; meta l4proto { icmp, ipv6-icmp } accept; };
  chain filter_INPUT_ZONES { goto filter_IN_public; };
  chain filter_INPUT { type filter hook input priority 10; policy accept;
    ct state established,related accept;
    ct status dnat accept;
    iifname "lo" accept;
    ct state invalid drop;
    jump filter_INPUT_ZONES;
    reject with icmpx admin-prohibited;
  };
  chain filter_FORWARD { type filter hook forward priority 10; policy accept;
    ct state established,related accept;
    ct status dnat accept;
    iifname "lo" accept;
    ct state invalid drop;
    reject with icmpx admin-prohibited;
  };
}
NFT
}
# Debian's iptables-legacy, unpacked and not installed.
legacy_like() {
  local package
  for package in iptables libxtables12 libip4tc2 libip6tc2; do
    unpack_package $package "$CACHE/debian-$package" || return 1
  done
  legacy "$1" -P FORWARD DROP && legacy "$1" -A FORWARD -i lo -j ACCEPT
}
legacy() { # NS OPTION...
  local at=$CACHE/debian-iptables package libraries=''
  for package in iptables libxtables12 libip4tc2 libip6tc2; do libraries+=$(echo "$CACHE/debian-$package"/usr/lib/*/):; done
  lab_in "$1" env LD_LIBRARY_PATH="$libraries" XTABLES_LIBDIR="$(echo "$at"/usr/lib/*/xtables)" \
    "$at/usr/sbin/xtables-legacy-multi" iptables "${@:2}"
}
