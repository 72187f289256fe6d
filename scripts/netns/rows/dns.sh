# shellcheck shell=bash disable=SC2034 # variables for tailnet.sh

DNS=$ROOT/scripts/netns/dns.py

# asked HOST NAME TYPE [HOW...]: what 100.100.100.100 says there.
asked() { lab_in "$1" "$DNS" ask 100.100.100.100 "${@:2}"; }
# says ANSWER HOST NAME TYPE [HOW...]
says() { SAID=$(asked "${@:2}" 2>&1) && [ "$SAID" = "$1" ]; }
# as_tailscaled NAME TYPE [HOW...]: a, which is ours, and b, which is tailscaled, say the same.
as_tailscaled() {
  local ours theirs
  ours=$(asked a "$@" 2>&1) && theirs=$(asked b "$@" 2>&1)
  SAID=$ours
  [ "$ours" != "$theirs" ] || return 0
  echo "ours: $ours, tailscaled: $theirs"
  return 1
}
sources_are_own() {
  lab_in a ip route get "$(tailnet_ip b)" | grep -q " src $(tailnet_ip a) " &&
    lab_in a ip -6 route get "$(tailnet_ip b 6)" | grep -q " src $(tailnet_ip a 6) "
}
# dns_config GLOBAL: Headscale's settings with these resolvers for all names.
dns_config() {
  cat <<JSON
{magic_dns: true, override_local_dns: true, base_domain: lab.example, search_domains: [corp.example],
 nameservers: {global: [$1], split: {split.example: [203.0.113.54], deep.split.example: [203.0.113.55]}},
 extra_records: [{name: web.lab.example, type: A, value: 100.64.0.99}, {name: v6.extra.example, type: AAAA, value: "fd7a:115c:a1e0::99"},
  {name: www.split.example, type: A, value: 198.51.100.200}]}
JSON
}

# Names of the network: ours on a (and on c, where the host's resolver is left alone), tailscaled's on b, both on e, with resolvers
# of every kind at 203.0.113.53 and on. p shares a LAN with a and is in no network.
row_dns() {
  local before name question
  HS_DNS=$(dns_config 203.0.113.53)
  tailnet_up
  lab_host dns 203.0.113.53
  ip -n "${LAB}inet" route add 203.0.113.54/31 via 203.0.113.53 dev p_dns onlink
  for name in 53:plain 54:plain 55:failing; do
    lab_in dns ip addr replace "203.0.113.${name%:*}/32" dev lo
    lab_spawn dns "dns-${name%:*}" "$DNS" serve "203.0.113.${name%:*}" "${name#*:}" "$LAB_DIR/asked-${name%:*}"
  done
  hosts a b c e
  lab_ns lan p
  lab_lan lan lan a=192.168.78.1/24 p=192.168.78.9/24
  ip -n "${LAB}p" route add 100.100.100.100 via 192.168.78.1
  # A container of a's, as Docker makes them.
  lab_ns guest
  lab_in a ip link add docker0 type bridge
  lab_wire a guest1 guest eth0
  lab_in a sh -c 'ip link set guest1 master docker0; ip link set docker0 up; ip addr add 172.17.0.1/16 dev docker0'
  lab_in guest sh -c 'ip addr add 172.17.0.2/16 dev eth0; ip route add default via 172.17.0.1'
  before=$(host_state a)
  tailnet_ringtail a a
  tailnet_tailscaled b b
  tailnet_ringtail c c --accept-dns=false
  ready a b c || return 0
  ts b set --accept-dns=true
  check "it answers for names" within 10 says "NOERROR $(tailnet_ip b)" a b.lab.example A
  within 10 says "NOERROR $(tailnet_ip a)" b a.lab.example A
  for question in "a.lab.example A" "B.Lab.EXAMPLE A" "b.lab.example AAAA" "b.lab.example MX" "b.lab.example SOA" \
    "b.lab.example TYPE65" "nobody.lab.example A" "www.b.lab.example A" "lab.example A" "web.lab.example A" \
    "web.lab.example AAAA" "v6.extra.example AAAA" "www.split.example A" "x.split.example A" "none.split.example A" \
    "other.example A" "other.example TXT" "none.example A" "b A" "x.onion A" "99.0.64.100.in-addr.arpa PTR" \
    "100.100.100.100.in-addr.arpa PTR" "1.2.3.10.in-addr.arpa PTR" "magicdns.localhost-tailscale-daemon A"; do
    # shellcheck disable=SC2086 # two words
    check "as tailscaled: $question" as_tailscaled $question
  done
  for name in a b; do
    question=$(tailnet_ip $name | awk -F. '{print $4 "." $3 "." $2 "." $1 ".in-addr.arpa"}')
    check "as tailscaled: the name of $name's address" as_tailscaled "$question" PTR
  done
  check "by TCP too" says "NOERROR $(tailnet_ip b)" a b.lab.example A tcp
  check "and what is passed on" says "NOERROR 198.51.100.14" a other.example A tcp
  check "by IPv6 as well" lab_in a "$DNS" ask fd7a:115c:a1e0::53 b.lab.example A
  check "the more specific suffix counts, and that its resolver fails is said" says SERVFAIL a x.deep.split.example A
  check "a question is passed on with its EDNS" grep -q "^other.example. 16 edns=1" "$LAB_DIR/asked-53"
  check "and without" says "NOERROR 198.51.100.14" a plain.example A plain
  check "an answer that is too long for UDP is said to be" says "NOERROR TC" a long.example TXT
  check "and is whole by TCP" lab_in a sh -c "$DNS ask 100.100.100.100 long.example TXT tcp | grep -q '^NOERROR 16:.* 16:.* 16:'"
  check "where the host's resolver is left alone, it answers all the same" says "NOERROR $(tailnet_ip b)" c b.lab.example A
  check "the addresses of the service are nobody's source" sources_are_own
  check "a container of the host's gets answers" within 15 says "NOERROR $(tailnet_ip b)" guest b.lab.example A
  check "by TCP too" says "NOERROR $(tailnet_ip b)" guest b.lab.example A tcp
  check "nobody else gets an answer" not lab_in p "$DNS" ask 100.100.100.100 b.lab.example A
  check "nor a connection" not lab_in p "$DNS" ask 100.100.100.100 b.lab.example A tcp
  check "nobody's questions went to a resolver that is not theirs" not grep -q 'lab.example' "$LAB_DIR/asked-53"
  check "people can ask" sh -c "$(printf '%q ' "$RINGTAIL") dns query --state-dir $(printf %q "$LAB_DIR/node-a") b.lab.example | grep -q $(tailnet_ip b)"
  tailnet_tailscaled te e
  within 30 tailnet_online te
  ts te set --accept-dns=true
  check "tailscaled answers for names on another host" within 10 says "NOERROR $(tailnet_ip b)" e b.lab.example A
  tailnet_ringtail e e --verbose --listen-port 0
  check "ours beside it does not take its place" within 20 problem e 'another program on this host answers for names'
  check "and names are answered as before" says "NOERROR $(tailnet_ip b)" e b.lab.example A
  check "nor is its host's resolver told of ours" not grep -q 100.100 "$LAB_DIR/node-e.etc/upper/resolv.conf"
  check "nor was it for a moment" not grep "the host's resolver asks ours" "$LAB_DIR/node-e.log"
  tailnet_stop a
  check "the host is left as it was found" same_state a "$before"
  check "and nobody answers any more" not lab_in a "$DNS" ask 100.100.100.100 b.lab.example A
}

# Resolvers that are slow, dead, or lie: the names that they are for are found as far as that can be, and all others
# are not held up.
row_dns_faults() {
  local kind
  HS_DNS='{magic_dns: true, override_local_dns: true, base_domain: lab.example, nameservers: {global: [203.0.113.99, 203.0.113.53],
   split: {tcp.example: [203.0.113.54], short.example: [203.0.113.55], liar.example: [203.0.113.56], slow.example: [203.0.113.57],
    failing.example: [203.0.113.58, 203.0.113.53], loop.example: [100.100.100.100], away.example: [203.0.113.99]}}}'
  tailnet_up
  lab_host dns 203.0.113.53
  ip -n "${LAB}inet" route add 203.0.113.48/28 via 203.0.113.53 dev p_dns onlink
  for kind in 53:plain 54:tcp 55:short 56:liar 57:slow 58:failing; do
    lab_in dns ip addr replace "203.0.113.${kind%:*}/32" dev lo
    lab_spawn dns "dns-${kind#*:}" "$DNS" serve "203.0.113.${kind%:*}" "${kind#*:}"
  done
  hosts a
  tailnet_ringtail a a
  check "it is in the network" within 30 tailnet_online a
  check "it answers for names" within 10 says "NOERROR $(tailnet_ip a)" a a.lab.example A
  check "the first resolver is away: the second is asked" says "NOERROR 198.51.100.14" a other.example A
  check "one that only speaks TCP is asked so" says "NOERROR 198.51.100.14" a w.tcp.example A
  check "what UDP has no room for is asked for by TCP" says "NOERROR 198.51.100.16" a w.short.example A tcp
  check "of lies and an answer, the answer counts" says "NOERROR 198.51.100.15" a w.liar.example A
  check "one that fails is passed over" says "NOERROR 198.51.100.18" a w.failing.example A
  check "nobody asks himself" says SERVFAIL a w.loop.example A
  check "one that is away is given up" says SERVFAIL a w.away.example A
  check "which status says, once it is sure" within 10 still_away a
  lab_spawn a flood "$DNS" flood 100.100.100.100 1000 slow.example
  pause 1
  check "while a thousand wait for a slow one, others are answered" says "NOERROR 198.51.100.15" a others.example A
  check "and so are names of the network" says "NOERROR $(tailnet_ip a)" a a.lab.example A
  wait "$(lab_pid flood)" || true
  SAID=$(cat "$LAB_DIR/flood.log")
  check "each of the thousand is told in time" grep -q '^SERVFAIL:1000$' "$LAB_DIR/flood.log"
  check "the node is well" tailnet_online a
  check "and says nothing of those who answer" no_problem a 'resolver 203.0.113.5[34568]'
  lab_in dns ip addr add 203.0.113.99/32 dev lo
  ip -n "${LAB}inet" route add 203.0.113.99/32 via 203.0.113.53 dev p_dns onlink
  lab_spawn dns dns-99 "$DNS" serve 203.0.113.99 plain
  check "one that is back is asked" within 5 says "NOERROR 198.51.100.18" a back.away.example A
  check "and there is nothing more to say" within 5 no_problem a 'resolver 203.0.113.99'
}
# Each question is another one.
still_away() {
  says SERVFAIL "$1" "$RANDOM.away.example" A
  problem "$1" 'the resolver 203.0.113.99 does not answer, or too late$'
}

# peerapi NAME: the URL of its peer API, as b has it.
peerapi() { ts b status --json | jq -er ".Peer[] | select(.HostName == \"$1\") | .PeerAPIURL[0]"; }
# looked_up ANSWER HOST FROM URL NAME: by DNS over HTTP.
looked_up() { SAID=$(lab_in "$2" "$DNS" http "$4/dns-query" "$5" A "$(tailnet_ip "$3")" 2>/dev/null) && [ "$SAID" = "$1" ]; }
exit_in_use() { ts b status --json | jq -e '.ExitNodeStatus.Online' >/dev/null; }

# The peer API, ours on a, and tailscaled's on b: that it is there, and names for those who leave by a node. The hosts ask
# 203.0.113.53, and c, which leaves by b, 203.0.113.52, where nothing is known but coordination.
row_peerapi() {
  local url name
  HS_DNS='{magic_dns: true, override_local_dns: false, base_domain: lab.example, nameservers: {global: []}}'
  tailnet_up
  lab_host dns 203.0.113.53
  lab_spawn dns dns-53 "$DNS" serve 203.0.113.53 plain "$LAB_DIR/asked"
  lab_host zone 203.0.113.52
  echo 'coord.lab 10.255.0.1' >"$LAB_DIR/zone"
  lab_spawn zone zone "$ROOT/scripts/netns/dns.pl" 203.0.113.52 "$LAB_DIR/zone"
  hosts a b c d
  for name in a b d; do echo 'nameserver 203.0.113.53' >"$LAB_DIR/$name.resolv.conf"; done
  echo 'nameserver 203.0.113.52' >"$LAB_DIR/c.resolv.conf"
  tailnet_ringtail a a --advertise-exit-node
  TAILNET_KEY=$LAB_DIR/bob-key tailnet_ringtail d d
  tailnet_tailscaled b b --advertise-exit-node
  ready a b d || return 0
  hs_routes a 0.0.0.0/0,::/0
  hs_routes b 0.0.0.0/0,::/0
  check "tailscaled pings it" within 10 ts b ping --peerapi -c 1 "$(tailnet_ip a)"
  url=$(peerapi a)
  check "names are looked up for peers that may leave by it" within 10 looked_up "NOERROR 198.51.100.14" b b "$url" other.example
  check "also for a peer of somebody else, whom the filter lets out" looked_up "NOERROR 198.51.100.14" d d "$url" other.example
  check "but by no node that is no way out" looked_up 403 b b "$(peerapi d)" other.example
  check "its own host is no peer" not looked_up "NOERROR 198.51.100.14" a a "$url" other.example
  hs_policy <<<'{"acls": [{"action": "accept", "src": ["alice@"], "dst": ["*:*"]}, {"action": "accept", "src": ["bob@"], "dst": ["alice@:22"]}]}'
  check "nor is it for whom the filter does not let out" within 5 looked_up 403 d d "$url" other.example
  check "a host asks the network first" within 5 grep -q '^nameserver 100.100.100.100' "$LAB_DIR/node-a.etc/upper/resolv.conf"
  ts b set --accept-dns=true --advertise-exit-node=false --exit-node="$(tailnet_ip a)"
  check "tailscaled leaves by it" within 10 exit_in_use
  check "and finds names" within 10 says "NOERROR 198.51.100.15" b others.example A
  check "those of the network too" says "NOERROR $(tailnet_ip a)" b a.lab.example A
  ts b set --exit-node= --advertise-exit-node
  COORD_URL=http://coord.lab:8080 tailnet_ringtail c c --exit-node b
  check "ours leaves by tailscaled" within 30 tailnet_knows c b
  check "and finds names there" within 10 says "NOERROR 198.51.100.16" c outside.example A
  check "and those of the network" says "NOERROR $(tailnet_ip b)" c b.lab.example A
  tailnet_stop b KILL
  check "when the way out is gone, names outside are not to be had" within 10 says SERVFAIL c gone.example A
  tailnet_stop c KILL
  COORD_URL=http://coord.lab:8080 tailnet_start c
  check "but coordination is found by its name all the same" within 15 tailnet_online c
  for name in a c d; do tailnet_stop $name; done
  check "each host has its resolver back" cmp "$LAB_DIR/a.resolv.conf" "$LAB_DIR/node-a.etc/upper/resolv.conf"
  check "also after an exit" cmp "$LAB_DIR/c.resolv.conf" "$LAB_DIR/node-c.etc/upper/resolv.conf"
}
