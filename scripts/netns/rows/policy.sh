# shellcheck shell=bash

# The same policies and the same nodes at Headscale and at `ringtail coord`: each node is told of the same peers, the
# same routes, and accepts the same packets.
row_policy() {
  tailnet_up
  lab_host w 203.0.113.11
  # Rights of users, of nodes with tags, on a subnet and through an exit, and of one's own nodes.
  policy_text
  check "Headscale takes the first policy" hs_policy "$LAB_DIR/policy-1.json"
  hs_keys
  check "seven nodes join Headscale" watchers_join theirs approve_theirs
  local n
  for n in 1 2 3; do
    check "Headscale takes policy $n" hs_policy "$LAB_DIR/policy-$n.json"
    pause 4
    watchers_told theirs "$n"
  done
  watchers_stop theirs
  lab_stop headscale
  rm "$LAB_DIR/auth-key"
  cp "$LAB_DIR/policy-1.json" "$LAB_DIR/policy.json"
  COORD_OPTIONS=(--policy "$LAB_DIR/policy.json")
  check "our server starts with the first policy" start_coord
  our_keys
  check "seven nodes join our server" watchers_join ours approve_ours
  for n in 1 2 3; do
    check "the policy $n makes sense" ours_policy check "$LAB_DIR/policy-$n.json"
    cp "$LAB_DIR/policy-$n.json" "$LAB_DIR/policy.json"
    kill -HUP "$(lab_pid coord)"
    pause 2
    watchers_told ours "$n"
    check "under policy $n all are told the same by both" same_told "$n"
  done
  # What makes no sense changes nothing, and is told with its place.
  printf '{\n  // nobody\n  "acls": [{"action": "accept", "src": ["nobody"], "dst": ["*:*"]}],\n}\n' >"$LAB_DIR/policy.json"
  check "a policy that makes no sense is refused with its place" place_is_told
  kill -HUP "$(lab_pid coord)"
  check "the server says so, too" within 3 grep -q 'the policy stays as it was.*line 3, column 41' "$LAB_DIR/coord.log"
  pause 1
  watchers_told ours 3
  check "and it changes nothing" same_told 3
}

policy_text() {
  local names='"groups": {"group:ops": ["alice@", "bob@"]}, "hosts": {"lan": "10.20.0.0/16", "one": "100.64.0.1"},
    "tagOwners": {"tag:web": ["group:ops"], "tag:db": ["tag:web"]}'
  cat >"$LAB_DIR/policy-1.json" <<JSON
{ $names, // users and tags
  "acls": [
    {"action": "accept", "src": ["alice@"], "dst": ["tag:web:80,443,8000-8100", "bob@:22"]},
    {"action": "accept", "proto": "udp", "src": ["tag:web"], "dst": ["tag:db:53", "one:*"]},
    {"action": "accept", "proto": "47", "src": ["group:ops"], "dst": ["autogroup:tagged:*"]},
    {"action": "accept", "src": ["bob@"], "dst": ["lan:22",]}, /* a subnet */
  ],
}
JSON
  cat >"$LAB_DIR/policy-2.json" <<JSON
{ $names,
  "acls": [
    {"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*", "tag:db:5432"]},
    {"action": "accept", "src": ["group:ops"], "dst": ["autogroup:internet:*"]},
    {"action": "accept", "proto": "icmp", "src": ["lan"], "dst": ["autogroup:member:*"]},
  ],
}
JSON
  cat >"$LAB_DIR/policy-3.json" <<JSON
{ $names,
  "acls": [
    {"action": "accept", "src": ["*"], "dst": ["tag:web:443", "100.64.0.3:22"]},
    {"action": "accept", "src": ["100.64.0.2", "fd7a:115c:a1e0::2"], "dst": ["*:*"]},
    {"action": "accept", "proto": "tcp", "src": ["tag:db"], "dst": ["10.20.3.0/24:1-1024", "[fd00:20::7]:80"]},
  ],
}
JSON
}

# NAME KEY [ROUTES]: the nodes, in the order in which they get addresses.
WATCHERS=("alice1 alice" "alice2 alice" "bob1 bob" "web1 web" "db1 db" "router bob 10.20.0.0/16,fd00:20::/64" "exit alice 0.0.0.0/0,::/0")

hs_keys() {
  hs_key 1 >"$LAB_DIR/alice.key"
  hs_key 2 >"$LAB_DIR/bob.key"
  hs_key 1 --tags tag:web >"$LAB_DIR/web.key"
  hs_key 1 --tags tag:db,tag:web >"$LAB_DIR/db.key"
}
our_keys() {
  ours users add alice && ours users add bob
  ours keys create --reusable --user alice >"$LAB_DIR/alice.key"
  ours keys create --reusable --user bob >"$LAB_DIR/bob.key"
  ours keys create --reusable --tags tag:web >"$LAB_DIR/web.key"
  ours keys create --reusable --tags tag:db,tag:web >"$LAB_DIR/db.key"
}
approve_theirs() { hs_routes router 10.20.0.0/16,fd00:20::/64 && hs_routes exit 0.0.0.0/0,::/0; }
approve_ours() { ours routes approve router 10.20.0.0/16,fd00:20::/64 && ours routes approve exit 0.0.0.0/0,::/0; }
ours_policy() { "$RINGTAIL" coord policy "$@"; }

# watchers_join WHERE APPROVE: one after the other, then routes are approved.
watchers_join() {
  local watcher name key routes
  for watcher in "${WATCHERS[@]}"; do
    read -r name key routes <<<"$watcher"
    lab_spawn w "$1-$name" "$RINGTAIL" coord watch "$COORD_URL" --hostname "$name" --home 900 \
      --auth-key-file "$LAB_DIR/$key.key" ${routes:+--advertise-routes "$routes"}
    within 20 grep -q '"event":"netmap"' "$LAB_DIR/$1-$name.log" || { cat "$LAB_DIR/$1-$name.log"; return 1; }
  done
  within 10 "$2"
}
watchers_stop() {
  local watcher
  for watcher in "${WATCHERS[@]}"; do lab_stop "$1-${watcher%% *}"; done
}
# watchers_told WHERE N: what each was told last.
watchers_told() {
  local watcher
  for watcher in "${WATCHERS[@]}"; do
    grep '"event":"netmap"' "$LAB_DIR/$1-${watcher%% *}.log" | tail -n 1
  done >"$LAB_DIR/$1-told-$2"
}
same_told() {
  python3 - "$LAB_DIR/theirs-told-$1" "$LAB_DIR/ours-told-$1" <<'PY'
import ipaddress, json, re, sys
from collections import defaultdict

def prefixes(text):
    found = [ipaddress.ip_network(net) for net in re.findall(r"[0-9a-fA-F:.]+/\d+", text)]
    return tuple(sorted((str(net) for family in (4, 6)
                         for net in ipaddress.collapse_addresses(n for n in found if n.version == family))))

def rules(text):
    """For each protocol, destination and ports: from where."""
    if text == "AllowAll":
        return text
    text = re.sub(r"Prefix \{ addr: ([^,]+), bits: (\d+) \}", r"\1/\2", text)
    sources = defaultdict(str)
    for rule in re.findall(r"Rule \{ sources: \[(.*?)\], destinations: \[(.*?)\], protocols: \[(.*?)\] \}", text):
        for net, first, last in re.findall(r"([0-9a-fA-F:.]+/\d+)[^0-9]*?, (\d+), (\d+)\)", rule[1]):
            for protocol in rule[2].split(", "):
                sources[protocol, net, first, last] += rule[0] + ","
    return {key: prefixes(nets) for key, nets in sources.items()}

def told(path):
    seen = {}
    for line in open(path):
        said = json.loads(line)
        peers = {peer["name"].split(".")[0]: (peer["addresses"], sorted(peer["allowed_ips"])) for peer in said["peers"]}
        seen[said["name"].split(".")[0]] = (said["addresses"], peers, rules(said["rules"]))
    return seen

theirs, ours = told(sys.argv[1]), told(sys.argv[2])
wrong = theirs.keys() ^ ours.keys()
for name in sorted(theirs.keys() & ours.keys()):
    for what, a, b in zip(("addresses", "peers", "rules"), theirs[name], ours[name]):
        if a != b:
            wrong.add(name)
            print(f"{name} has other {what}\n  Headscale: {a}\n  ours:      {b}")
if len(theirs) != 7 or not any(rules for _, _, rules in theirs.values()):
    sys.exit("nothing was compared")
sys.exit(bool(wrong))
PY
}
place_is_told() {
  ! ours_policy check "$LAB_DIR/policy.json" 2>"$LAB_DIR/check.log" && grep -q 'line 3, column 41' "$LAB_DIR/check.log"
}
