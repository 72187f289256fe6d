# shellcheck shell=bash

# A node is taken down and up in one process, its settings change while it runs, and ordinary users look at it.
row_life() {
  local before state socket
  tailnet_up
  hosts a b c d
  before=$(host_state a)
  # Namespaces share /run: a name that no other row's node has.
  socket=/run/ringtail/rtlife0.sock
  tailnet_ringtail a a --status-group nogroup --tun rtlife0
  tailnet_tailscaled b b
  ready a b || return 0
  check "ping" tailnet_pings b a 1

  check "set changes the name" rt a set --hostname aa
  check "Headscale has it" within 10 hs_field aa .id
  check "get says so" [ "$(rt a get hostname)" = aa ]
  check "and set that the command line counts again later" set_says a 'counts again from its next start'
  check "set --advertise-routes" rt a set --advertise-routes 10.44.0.0/24
  check "Headscale is told" within 10 offers aa 10.44.0.0/24
  check "nonsense is refused" refuses 'write 10.45.0.0/24' rt a set --advertise-routes 10.45.0.1/24
  check "so is what contradicts itself" refuses advertise.exit.node rt a set --advertise-routes 0.0.0.0/0
  check "and nothing at all" refuses 'nothing to set' rt a set
  check "and a file says what was set" grep -q '^hostname = "aa"' "$LAB_DIR/node-a/set.toml"

  state="$LAB_DIR/node-a"
  tailnet_stream a b while_down
  check "down" rt a down
  check "the host is as it was before" same_state a "$before"
  check "the interface is gone" not ip -n "${LAB}a" link show rtlife0
  check "the process is not" lab_alive node-a
  check "status says so, with an exit code" says_down a
  check "down again is no fault" rt a down
  check "tailscaled reaches it no more" not tailnet_pings b a 1
  check "set while down" rt a set --hostname aaa
  check "ip says what to do" refuses 'ringtail up' rt a ip
  check "up" lab_in a "$RINGTAIL" up --state-dir "$state"
  check "tailscaled reaches it again" within 20 tailnet_pings b a 1
  check "by the name that was set" within 10 hs_field aaa .id
  check "up again is no fault" lab_in a "$RINGTAIL" up --state-dir "$state"
  check "it goes down and up ten times" down_and_up a 10
  check "and tailscaled reaches it" within 20 tailnet_pings b a 1
  tailnet_stream_end while_down

  check "nobody in the group sees the status" by_group nogroup status
  check "and pings" by_group nogroup ping b -c 1
  check "but does not take it down" refuses 'for looking' by_group nogroup down
  check "nor another group" not by_group daemon status
  check "nor does a user of the group see the state directory" not setpriv --reuid=65534 --regid=65534 --clear-groups ls "$state"
  check "a hundred users at once" many_look 100
  check "whois knows the other" whois_says a "$(tailnet_ip b)" 'node *b.lab.example'
  check "and who owns it" whois_says a "$(tailnet_ip b)" 'owner *alice'
  check "ip of a peer" [ "$(rt a ip -4 b)" = "$(tailnet_ip b)" ]
  check "ping by name" rt a ping b -c 1

  tailnet_stop a KILL
  tailnet_start a
  check "after a kill what was set counts, but for what the command line says" within 20 restarted_as a
  tailnet_stop a
  check "and in the end the host is as it was before" same_state a "$before"
  check "with no socket left" [ ! -e "$socket" ]

  with_key c c "" --auth-key "$(<"$LAB_DIR/auth-key")"
  check "an auth key on the command line lets in" within 20 tailnet_online c
  check "with a warning" grep -q 'every user of this host can read it' "$LAB_DIR/node-c.log"
  with_key d d "$(<"$LAB_DIR/auth-key")"
  check "so does one in the environment" within 20 tailnet_online d
  check "which no child has" not children_have_key d
  check "and no log" not grep -q "$(<"$LAB_DIR/auth-key")" "$LAB_DIR/node-c.log" "$LAB_DIR/node-d.log"
}
set_says() { rt "$1" set --hostname aa | grep "$2"; }
offers() { hs nodes list -o json | jq -e --arg name "$1" --arg net "$2" '.[] | select(.given_name == $name or .name == $name) | .available_routes | index($net) != null'; }
refuses() { # WORDS COMMAND...
  local words=$1 code=0
  shift
  "$@" >"$LAB_DIR/said" 2>&1 || code=$?
  cat "$LAB_DIR/said"
  [ $code != 0 ] && grep -q -e "$words" "$LAB_DIR/said"
}
says_down() {
  local code=0
  rt "$1" status >"$LAB_DIR/said" 2>&1 || code=$?
  cat "$LAB_DIR/said"
  [ $code = 1 ] && grep -q 'ringtail up. takes part again' "$LAB_DIR/said"
}
down_and_up() {
  local n
  for ((n = 0; n < $2; n++)); do
    rt "$1" down && lab_in "$1" "$RINGTAIL" up --state-dir "$LAB_DIR/node-$1" || return 1
  done
  lab_alive "node-$1"
}
by_group() { # GROUP COMMAND...: as nobody, who may not look into every folder on the way to the program
  timeout 20 setpriv --reuid=65534 --regid="$1" --clear-groups /proc/self/fd/9 "${@:2}" --socket "$socket" 9<"$RINGTAIL"
}
many_look() {
  local n pids=() failed=0
  for ((n = 0; n < $1; n++)); do
    by_group nogroup status >/dev/null 2>&1 &
    pids+=($!)
  done
  for n in "${pids[@]}"; do wait "$n" || failed=$((failed + 1)); done
  SAID="$failed of $1 failed"
  [ $failed = 0 ]
}
whois_says() { rt "$1" whois "$2" | grep "$3"; }
restarted_as() { [ "$(rt "$1" get hostname)" = a ] && [ "$(rt "$1" get advertise-routes)" = 10.44.0.0/24 ] && tailnet_pings b a 1; }
with_key() { # NAME NS KEY_IN_ENVIRONMENT [OPTION...]
  TAILNET_KIND[$1]=ringtail TAILNET_NS[$1]=$2
  RINGTAIL_AUTH_KEY=$3 lab_spawn "$2" "node-$1" "$RINGTAIL" up --coord "$COORD_URL" --state-dir "$LAB_DIR/node-$1" --hostname "$1" "${@:4}"
}
children_have_key() {
  local child
  for child in $(ps -o pid= --ppid "$(lab_pid "node-$1")"); do
    ! tr '\0' '\n' <"/proc/$child/environ" | grep RINGTAIL_AUTH_KEY || return 0
  done
  return 1
}
