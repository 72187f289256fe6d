# shellcheck shell=bash

# a sends what goes to the Internet through a tailscaled b. w is somewhere on the Internet and says whom it sees, p is on
# a's LAN, and g a guest on a's bridge.
#
#   p -- 192.168.7.0/24 -- a -- internet -- b, w        g -- 172.17.0.0/16 -- a
row_exituser() {
  local before
  tailnet_up
  exit_hosts b a
  lab_ns lan p g
  lab_lan lan lan a=192.168.7.1/24 p=192.168.7.9/24
  lab_lan a eth0 g=172.17.0.2/16
  ip -n "${LAB}a" addr add 172.17.0.1/16 dev br0
  exit_watch a
  before=$(host_state a)
  tailnet_tailscaled b b --advertise-exit-node
  tailnet_ringtail a a --exit-node b
  ready a b || return 0
  check "an exit node that nobody approved is told of" within 10 problem a 'exit node b: .* approved'
  check "and nothing goes out" seen a 203.0.113.50 ''
  check "the exit node is approved" hs_routes b 0.0.0.0/0,::/0
  check "then the Internet sees its address" within 10 seen a 203.0.113.50 203.0.113.12
  check "over IPv6 as well" within 10 seen a 2001:db8::50 2001:db8::12
  check "status says which it is" uses_exit a b
  check "the LAN is not reached outside of the tunnel" not lab_in a ping -qc 1 -W 1 192.168.7.9
  check "guests are" lab_in a ping -qc 1 -W 1 172.17.0.2
  check "coordination and the relay stay" tailnet_online a
  check "the relay's address is no way out for others" leads_by a 203.0.113.1 ringtail0
  check "both are direct" goes_direct a b
  tailnet_stop a
  check "an end leaves the host as it was" same_state a "$before"
  tailnet_options a --exit-node "$(tailnet_ip b)" --exit-node-allow-lan-access
  # As systemd has it: there has to be a way back to whoever sends, and for coordination there is none without us.
  way_back a 2
  tailnet_start a
  within 20 rt a status >/dev/null 2>&1
  check "chosen by address it is the same" within 20 seen a 203.0.113.50 203.0.113.12
  check "and the LAN is reached, where that is wanted" lab_in a ping -qc 1 -W 1 192.168.7.9
  tailnet_stop b KILL
  # Headscale waits 10 s for a node to come back.
  check "an exit node that goes away is told of" within 25 problem a 'exit node b is offline since 20'
  check "nothing goes out then" seen a 203.0.113.50 ''
  check "nor over IPv6" seen a 2001:db8::50 ''
  check "coordination stays" tailnet_online a
  tailnet_stop a
  tailnet_start a
  within 20 rt a status >/dev/null 2>&1
  check "coordination is found without it" within 20 tailnet_online a
  check "and nothing else" seen a 203.0.113.50 ''
  check "and no name is found" not lab_in a timeout 5 getent ahosts www.test
  tailnet_start b
  check "until it is back" within 30 seen a 203.0.113.50 203.0.113.12
  # By the same interface, too.
  way_back a 1
  check "an exit node that is no longer approved" hs_routes b ''
  check "is told of" within 10 problem a 'exit node .*: .* approved'
  check "and nothing goes out any more" seen a 203.0.113.50 ''
  way_back a 0
  tailnet_stop a KILL
  check "a kill leaves the host as it was" within 5 same_state a "$before"
  check "nothing but the underlay left the host in all this" exit_watched a
}

# c is the way out for a tailscaled t and for a of ours. q is on c's LAN.
#
#   t, a -- internet -- c -- 192.168.8.0/24 -- q        w -- internet
row_exitnode() {
  local before
  tailnet_up
  exit_hosts c t a
  lab_in c sh -c 'echo 0 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv6/conf/all/forwarding'
  lab_ns lan q
  lab_lan lan lan c=192.168.8.1/24 q=192.168.8.9/24
  before=$(host_state c)
  tailnet_ringtail c c --advertise-exit-node
  tailnet_tailscaled t t --accept-routes
  tailnet_ringtail a a --accept-routes --exit-node c
  ready c t a || return 0
  check "what c offers is approved" within 10 hs_routes c 0.0.0.0/0,::/0
  check "a tailscaled takes it for its way out" within 10 ts t set --exit-node=c
  for user in t a; do
    check "the Internet sees c when $user asks" within 10 seen "$user" 203.0.113.50 203.0.113.12
    check "over IPv6 as well, when $user asks" within 10 seen "$user" 2001:db8::50 2001:db8::12
    check "c's LAN is closed to $user" not lab_in "$user" ping -qc 2 -i 0.2 -W 1 192.168.8.9
    check "c's own address on the Internet is not, for $user" lab_in "$user" ping -qc 1 -W 1 203.0.113.12
  done
  check "c offers its LAN too" rt c set --advertise-routes 192.168.8.0/24
  check "which is known at the server" within 5 offered c 192.168.8.0/24
  for user in t a; do
    check "and stays closed to $user" not lab_in "$user" ping -qc 2 -i 0.2 -W 1 192.168.8.9
  done
  check "as its status says" problem c '192.168.8.0/24 is offered, not approved'
  check "until it is approved" within 10 hs_routes c 0.0.0.0/0,::/0,192.168.8.0/24
  for user in t a; do
    check "then $user reaches it" within 5 lab_in "$user" ping -qc 1 -W 1 192.168.8.9
    check "and still the Internet" seen "$user" 203.0.113.50 203.0.113.12
  done
  check "of which status has nothing to say" not problem c '192.168.8.0/24'
  check "an approval that is taken back" hs_routes c 0.0.0.0/0,::/0
  check "closes it again" within 15 not lab_in t ping -qc 1 -W 1 192.168.8.9
  tailnet_stop c
  check "an end leaves the exit node's host as it was" same_state c "$before"
}

# exit_hosts EXIT USER...: on the Internet, with both families; w says whom it sees, and EXIT forwards.
exit_hosts() {
  local name last=12
  lab_host w 203.0.113.50 2001:db8::50
  whom w
  for name in "$@"; do
    lab_host "$name" "203.0.113.$last" "2001:db8::$last"
    last=$((last + 1))
  done
  lab_in "$1" sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding'
}
# leads_by NS ADDRESS INTERFACE: for who does not bear our mark.
leads_by() { SAID=$(ip -n "$LAB$1" route get "$2") && [[ $SAID == *" dev $3 "* ]]; }
way_back() { lab_in "$1" sh -c "echo $2 >/proc/sys/net/ipv4/conf/all/rp_filter"; }
offered() { hs_field "$1" '.available_routes // [] | .[]' | grep -Fx "$2"; }
uses_exit() { rt "$1" status | grep "exit node: $2"; }
# exit_watch HOST: notes what comes from it that is neither a peer's tunnel, nor the relay's or coordination's connection,
# nor finds neighbours, by addresses, protocol, and its port or ICMP type and code;
# exit_watched HOST: was there nothing? Not counted is either what the kernel answers a peer that still sends to the
# tunnel's port when nobody has it, as after a kill.
exit_watch() {
  lab_in inet nft -f - <<NFT
table inet watch_$1 {
  set leaked4 { typeof ip saddr . ip daddr . meta l4proto . th sport; size 256; flags dynamic; }
  set leaked6 { typeof ip6 saddr . ip6 daddr . meta l4proto . th sport; size 256; flags dynamic; }
  chain pass { type filter hook prerouting priority raw;
    iifname != "p_$1" return
    udp sport 41641 return
    ip daddr . tcp dport { 203.0.113.1 . 443, 10.255.0.1 . 8080 } return
    ip6 daddr 2001:db8::1 tcp dport 443 return
    ip6 saddr fe80::/10 return
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report } return
    icmp type destination-unreachable icmp code port-unreachable @th,240,16 41641 return
    icmpv6 type destination-unreachable icmpv6 code port-unreachable @th,400,16 41641 return
    counter
    add @leaked4 { ip saddr . ip daddr . meta l4proto . th sport counter }
    add @leaked6 { ip6 saddr . ip6 daddr . meta l4proto . th sport counter }
  }
}
NFT
}
exit_watched() {
  local set
  SAID=$(lab_in inet nft list table inet "watch_$1" | grep -o 'counter packets [0-9]*' | tail -1)
  [ "$SAID" != "counter packets 0" ] || return 0
  for set in leaked4 leaked6; do lab_in inet nft -n list set inet "watch_$1" $set | grep ' \. [0-9]'; done
  return 1
}
