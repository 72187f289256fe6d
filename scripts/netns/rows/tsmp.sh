# shellcheck shell=bash

# tailscaled a pings our b by the means of tailscaled's own, which no rule of a policy has a say in.
row_tsmp() {
  tailnet_up
  hosts a b
  tailnet_tailscaled a a
  tailnet_ringtail b b
  ready a b || return 0
  check "TSMP by IPv4" tsmp "$(tailnet_ip b)"
  check "TSMP by IPv6" tsmp "$(tailnet_ip b 6)"
  check "the peer API" peerapi "$(tailnet_ip b)"
  check "and by IPv6" peerapi "$(tailnet_ip b 6)"
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
answered() { [ "$(rt b status --json | jq '[.dataplane.shards[].meters.pings_answered] | add')" -ge "$1" ]; }
