# shellcheck shell=bash

# Machines without an auth key, at `ringtail coord`: an administrator lets them in by the code they are shown.
row_approve() {
  tailnet_internet
  check "relay and server start" our_server || return 0
  hosts a b c
  tailnet_ringtail c c
  TAILNET_KEY=none tailnet_tailscaled a a
  TAILNET_KEY=none tailnet_ringtail b b
  check "tailscaled shows where to go" within 20 join_url up-a
  check "and so does ringtail" within 20 join_url node-b
  check "the page there says the command" page_says_the_command up-a
  check "nobody is in yet but who has a key" within 20 members c
  check "a code that nobody was shown lets nobody in" not ours nodes approve 0000-0000
  check "an administrator lets tailscaled in, by its code" ours nodes approve "$(join_code up-a)"
  check "it is in within 3 s" within 3 tailnet_online a
  check "the same code lets nobody in again" not ours nodes approve "$(join_code up-a)"
  check "and ringtail, by the URL as it was shown" ours nodes approve "$(join_url node-b)"
  ready a b c || return 0
  check "they reach each other" tailnet_pings a b 2
  check "and who had a key" tailnet_pings c a 2
  tailnet_stop a
  tailnet_start a
  check "a start later needs nobody" within 20 tailnet_online a
  # A key that has expired is the other way to be asked.
  check "an administrator lets tailscaled's key expire" ours nodes expire a
  check "it asks for a login" within 5 asks_for_login a
  lab_stop up-a
  rm "$LAB_DIR/up-a.log"
  lab_spawn a up-a tailscale --socket="$LAB_DIR/node-a/sock" up --login-server="$COORD_URL" --hostname=a --timeout=60s \
    --accept-dns=false --force-reauth
  check "it shows where to go" within 20 join_url up-a
  check "once let in, it is the same node" approved_again a
}
# join_url LOG: the URL a person is sent to.
join_url() { grep -o "$COORD_URL/register/[0-9A-Z-]*" "$LAB_DIR/$1.log" | tail -n 1 | grep .; }
join_code() { basename "$(join_url "$1")"; }
page_says_the_command() {
  # shellcheck disable=SC2016 # for the other shell
  lab_in a bash -c 'exec 3<>/dev/tcp/10.255.0.1/8080 && printf "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" "$0" >&3 && cat <&3' \
    "/register/$(join_code "$1")" | grep -qx "    ringtail coord nodes approve $(join_code "$1")"
}
members() { [ "$(ours nodes | awk '{ print $2 }' | xargs)" = "$*" ]; }
approved_again() {
  local before
  before=$(ours nodes | awk -v name="$1" '$2 == name { print $1, $3 }')
  ours nodes approve "$(join_code "up-$1")" && within 10 tailnet_online "$1" &&
    [ "$(ours nodes | awk -v name="$1" '$2 == name { print $1, $3 }')" = "$before" ]
}
