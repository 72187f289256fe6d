# shellcheck shell=bash

# What a newcomer does with `ringtail coord`: users, tags, names, routes, a policy, keys that expire.
row_ourserver2() {
  tailnet_internet
  printf '[{"name": "wiki.tail.internal", "type": "A", "value": "100.64.0.99"}]\n' >"$LAB_DIR/records.json"
  policy_allows '"*"'
  COORD_OPTIONS=(--policy "$LAB_DIR/policy.json" --extra-records "$LAB_DIR/records.json" --dns-server 203.0.113.54
    --split-dns corp.test=203.0.113.53)
  check "relay and server start" our_server || return 0
  ours users add alice
  ours keys create --reusable --user alice >"$LAB_DIR/auth-key"
  ours keys create --reusable --tags tag:router >"$LAB_DIR/router-key"
  hosts a b c d
  tailnet_tailscaled a a
  TAILNET_KEY=$LAB_DIR/router-key tailnet_tailscaled b b --advertise-routes=10.20.0.0/16
  TAILNET_KEY=$LAB_DIR/router-key tailnet_ringtail c c --advertise-routes 10.30.0.0/16
  ready a b c || return 0
  check "the list says whose they are" whose_are "a=alice b=tag:router c=tag:router"
  check "a policy approves the routes of tailscaled" within 5 a_has_route 10.20.0.0/16
  check "and of ringtail" within 5 a_has_route 10.30.0.0/16
  check "nothing is pending" not_pending
  check "tailscaled is told of resolvers, and of those for one domain" told_resolvers
  check "an extra record is answered by tailscaled" within 10 answers_record 100.64.0.99
  printf '[{"name": "wiki.tail.internal", "type": "A", "value": "100.64.0.98"}]\n' >"$LAB_DIR/records.json"
  kill -HUP "$(lab_pid coord)"
  check "a changed one after SIGHUP, too" within 10 answers_record 100.64.0.98
  TAILNET_KEY=none tailnet_tailscaled d d --advertise-tags=tag:web
  check "a tailscaled asks to be let in, with a tag" within 40 waits d
  check "not for a user who may not give it" not ours nodes approve "$(basename "$(waits d)")" --user ringtail
  check "for one who may" ours nodes approve "$(basename "$(waits d)")" --user alice
  check "it is in" within 20 tailnet_online d
  check "and has the tag" whose_are "d=tag:web"
  lab_host f 203.0.113.16
  TAILNET_KEY=none tailnet_ringtail f f --advertise-tags web
  check "so does a ringtail" within 20 grep -qF "$COORD_URL/register/" "$LAB_DIR/node-f.log"
  check "it is let in" ours nodes approve "$(grep -o "$COORD_URL/register/[0-9A-Z-]*" "$LAB_DIR/node-f.log" | tail -n 1 | xargs basename)" --user alice
  check "and has the tag" within 10 whose_are "f=tag:web"
  check "an administrator renames a tailscaled" ours nodes rename a desk
  check "it is told" within 3 own_name a desk
  check "and so are the others" within 3 shows c desk ''
  check "a name that is taken is refused" not ours nodes rename b desk
  ours nodes rename desk a
  check "everybody reaches everybody" within 5 tailnet_pings a c 1
  check "by a new policy, a reaches nobody" changed_policy '"tag:router", "nobodi@"'
  check "in force within a second" within 1 not tailnet_pings a c 0.4
  check "a user in it that there is not is in the log" grep -q 'names users that there are not.*nobodi' "$LAB_DIR/coord.log"
  check "who has the right does" within 5 tailnet_pings b c 1
  check "a gets a tag that has it" ours nodes tag a tag:router
  check "and reaches them" within 3 tailnet_pings a c 0.4
  check "the export names all" exported
  # Keys that expire by themselves.
  changed_policy '"*"'
  lab_stop coord
  COORD_OPTIONS+=(--key-expiry 20s)
  check "the server starts again" start_coord
  check "all are back" within 30 tailnet_online a b c
  lab_host e 203.0.113.15
  tailnet_tailscaled e e
  check "a new node joins" within 40 tailnet_online e
  check "its key expires by itself, and it asks for a login" within 40 asks_for_login e
  check "which the others are told" within 3 shows c e 'key expired at'
  check "those with tags stay" tailnet_online b c
  ts e up --login-server="$COORD_URL" --auth-key="file:$LAB_DIR/auth-key" --hostname=e --timeout=20s --accept-dns=false
  check "with an auth key it is back" within 5 tailnet_online e
}

policy_allows() {
  cat >"$LAB_DIR/policy.json" <<JSON
{ "tagOwners": {"tag:router": [], "tag:web": ["alice@"]}, // who may give them
  "acls": [{"action": "accept", "src": [$1], "dst": ["*:*"]}],
  "autoApprovers": {"routes": {"10.0.0.0/8": ["tag:router"]}} }
JSON
}
changed_policy() { policy_allows "$1" && kill -HUP "$(lab_pid coord)"; }
whose_are() {
  local pair
  for pair in $1; do
    ours nodes | awk -v name="${pair%=*}" -v whose="${pair#*=}" '$2 == name && $6 == whose { found = 1 } END { exit !found }' || return 1
  done
}
a_has_route() { ts a status --json | jq -e --arg net "$1" '[.Peer[].PrimaryRoutes // [] | .[]] | index($net)' >/dev/null; }
not_pending() { local said; said=$(ours routes) && grep -q approved <<<"$said" && ! grep -q 'not approved' <<<"$said"; }
answers_record() { ts a dns query wiki.tail.internal 2>/dev/null | grep -q "$1"; }
told_resolvers() {
  ts a dns status 2>/dev/null >"$LAB_DIR/dns-status"
  grep -q '203.0.113.54' "$LAB_DIR/dns-status" && grep -q 'corp.test.*203.0.113.53' "$LAB_DIR/dns-status"
}
waits() { grep -o "$COORD_URL/register/[0-9A-Z-]*" "$LAB_DIR/up-$1.log" | tail -n 1 | grep .; }
own_name() { [ "$(ts "$1" status --json | jq -r .Self.DNSName)" = "$2.tail.internal." ]; }
exported() {
  ours export | jq -e '(.users | index("alice")) and ([.nodes[] | select(.name == "b")][0]
    | .tags == ["tag:router"] and .approved_routes == ["10.20.0.0/16"])' >/dev/null
}
