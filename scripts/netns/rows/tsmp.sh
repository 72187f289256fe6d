# shellcheck shell=bash

# tailscaled a and our b and c ping each other by the means of tailscaled's own, which no rule of a policy has a say
# in.
row_tsmp() {
  tailnet_up
  hosts a b c
  tailnet_tailscaled a a
  tailnet_ringtail b b
  tailnet_ringtail c c
  ready a b c || return 0
  check "TSMP by IPv4" tsmp "$(tailnet_ip b)"
  check "TSMP by IPv6" tsmp "$(tailnet_ip b 6)"
  check "the peer API" peerapi "$(tailnet_ip b)"
  check "and by IPv6" peerapi "$(tailnet_ip b 6)"
  check "b pings a by TSMP, and hears where its peer API is" ours_pings a 'TSMP, [0-9.]+, [0-9]+\)'
  check "also by IPv6" ours_pings "$(tailnet_ip a 6)" 'TSMP, [0-9a-f:]+, [0-9]+\)'
  check "and our c" ours_pings c 'TSMP, '
  check "b visits the peer API of a" ours_pings a 'http://[0-9.]+:[0-9]+\)' --peerapi
  check "also by IPv6" ours_pings "$(tailnet_ip a 6)" 'http://\[[0-9a-f:]+\]:[0-9]+\)' --peerapi
  check "and that of c" ours_pings c 'http://' --peerapi
  check "Headscale takes a policy that lets nobody reach b" hs_policy <<<'{"acls": [{"action": "accept", "src": ["*"], "dst": ["'"$(tailnet_ip a)"'/32:*"]}]}'
  check "an echo request is refused then" within 5 not tailnet_pings a b 1
  check "TSMP is answered all the same" tsmp "$(tailnet_ip b)"
  check "and the peer API reached, which judges by itself" peerapi "$(tailnet_ip b)"
  lab_in b nft -f - <<<'table inet shut { chain input { type filter hook input priority 0; iifname "ringtail0" drop; }; }'
  check "TSMP even where the host's firewall lets nothing in" tsmp "$(tailnet_ip b)"
  check "each answer is counted" answered 4
}
tsmp() { ts a ping --c 3 --timeout 5s --tsmp "$1" | grep '^pong from b'; }
peerapi() { ts a ping --c 3 --timeout 5s --peerapi "$1" | grep '^hit peerapi of '; }
ours_pings() { rt b ping "${3:---tsmp}" -c 2 "$1" | grep -E "^pong from [ac] \\($2"; }
answered() { [ "$(rt b status --json | jq '[.dataplane.shards[].meters.pings_answered] | add')" -ge "$1" ]; }
