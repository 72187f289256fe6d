# shellcheck shell=bash

# Only alice's nodes may begin, and only to bob's port 7000 and by ping, which has no ports.
row_filter() {
  tailnet_up
  hosts a b
  check "Headscale takes the policy" may_only 7000
  tailnet_tailscaled a a
  TAILNET_KEY=$LAB_DIR/bob-key tailnet_ringtail b b
  check "a is in the network" within 40 tailnet_online a
  check "b is in the network" within 40 tailnet_online b
  check "a knows b" within 20 tailnet_knows a b
  lab_spawn b listen7000 python3 -m http.server 7000
  lab_spawn b listen7001 python3 -m http.server 7001
  check "a port that the policy opens answers" within 10 connects a b 7000
  check "one that it does not open answers nothing" not connects a b 7001
  check "what the policy denies is counted" denied b
  check "ping, which the policy allows" tailnet_pings a b 1
  check "nor may the other begin" not tailnet_pings b a 1
  check "Headscale takes another policy" may_only 7001
  check "a changed policy is obeyed: opened" within 10 connects a b 7001
  check "and closed" not connects a b 7000
}
may_only() { hs_policy <<<'{"acls": [{"action": "accept", "src": ["alice@"], "dst": ["bob@:'"$1"'"]}]}'; }
