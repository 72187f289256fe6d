# shellcheck shell=bash
# A lab of network namespaces. Source it, call lab_init, build a topology, start programs in it.
#
# Everything a lab makes carries its own prefix: namespaces rt<pid>_<name>, a directory
# /tmp/rt<pid>_XXXXXX with logs and state, interface names inside the namespaces only. So two labs run side
# by side. The lab goes away when the script ends, however it ends: an EXIT trap cleans up after
# success, failure, Ctrl-C and kill, and a guard process does after SIGKILL.
#
#   lab_or_skip                    ends the script where no lab can be had
#   lab_init                       prefix, directory, traps, guard
#   lab_within NAME                in a subshell: a lab inside of this one, which goes away with it
#   lab_ns NAME...                 make namespaces
#   lab_in NAME COMMAND...         run in a namespace, in the foreground
#   lab_spawn NAME LABEL CMD...    run in a namespace, in the background; log in $LAB_DIR/LABEL.log. What it writes
#                                  in /etc is in $LAB_DIR/LABEL.etc/upper, also when it is spawned again; its resolv.conf
#                                  is at first $LAB_DIR/NAME.resolv.conf, if there is one
#   lab_pid LABEL                  its process id
#   lab_stop LABEL [SIGNAL]        end it and wait
#   lab_run COMMAND...             run in the foreground, but interruptible by signals
#   lab_limit SECONDS COMMAND      if the script still runs by then: COMMAND, and its end
#   lab_wire NS IF NS IF           a veth pair, both ends up
#   lab_lan NS IF NAME=ADDRESS...  a bridge br0 in NS, and hosts on it by their interfaces IF
#   lab_internet, lab_host, lab_far, lab_home, lab_block, lab_unblock      the internet of act one
#   lab_clean                      take everything down (the traps call it)

LAB_LIB=${BASH_SOURCE[0]}
# The last lines of an error are to say what went wrong; panics keep their backtraces.
export RUST_LIB_BACKTRACE=0

# Start time of a process: with its id it names a process for good, since ids are used again.
lab_started_at() {
  local stat
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  # shellcheck disable=SC2086 # split into fields on purpose
  set -- ${stat##*) }
  echo "${20}"
}

# Without what a lab needs, the script is skipped aloud; that is a failure when RINGTAIL_NO_SKIP=1.
lab_or_skip() {
  [ "$(id -u)" != 0 ] || [ ! -c /dev/net/tun ] || return 0
  echo "SKIPPED: ${0##*/} needs root and /dev/net/tun" >&2
  [ "${RINGTAIL_NO_SKIP:-}" != 1 ] || exit 1
  exit 0
}

lab_init() {
  [ "$(id -u)" = 0 ] || { echo "error: network namespaces need root" >&2; return 1; }
  LAB=rt$$_
  LAB_DIR=$(mktemp -d "/tmp/${LAB}XXXXXX")
  LAB_OWNER=$BASHPID
  : >"$LAB_DIR/pids"
  trap lab_clean EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'exit 129' HUP
  # In a session of its own, so that Ctrl-C does not reach it.
  setsid bash "$LAB_LIB" guard $$ "$(lab_started_at $$)" "$LAB" "$LAB_DIR" </dev/null >/dev/null 2>&1 &
}

lab_within() {
  # No name has the hyphen: the end of the lab "dns" is not to take those of "dns_faults" along.
  LAB=$LAB$1- LAB_DIR=$LAB_DIR/$1
  mkdir -p "$LAB_DIR"
}

lab_ns() {
  local name
  for name in "$@"; do
    ip netns add "$LAB$name"
    # Settings are inherited from the host in part; a lab must not depend on them.
    lab_in "$name" sh -c '
      echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
      echo 0 >/proc/sys/net/ipv4/conf/default/rp_filter
      echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
      echo 0 >/proc/sys/net/ipv6/conf/all/accept_ra
      echo 0 >/proc/sys/net/ipv6/conf/default/accept_ra' 2>/dev/null || true
    ip -n "$LAB$name" link set lo up
  done
}

lab_in() {
  local ns=$1
  shift
  ip netns exec "$LAB$ns" "$@"
}

# Notes a process, so that cleaning up ends it even when it runs outside of the lab's namespaces.
lab_note_pid() {
  echo "$1 $(lab_started_at "$1" || echo 0) $2" >>"$LAB_DIR/pids"
}

lab_spawn() {
  local ns=$1 label=$2
  shift 2
  local etc=$LAB_DIR/$label.etc
  if [ ! -e "$etc" ]; then
    mkdir -p "$etc/upper" "$etc/work"
    cat "$LAB_DIR/$ns.resolv.conf" >"$etc/upper/resolv.conf" 2>/dev/null ||
      echo "nameserver 203.0.113.254" >"$etc/upper/resolv.conf"
  fi
  # Namespaces share /etc, and nodes write there. A file that is mounted on another would not do: it goes away when
  # the other is renamed, be it in another namespace.
  # shellcheck disable=SC2016 # for the other shell
  local own=(sh -c 'mount -t overlay overlay -o "lowerdir=/etc,upperdir=$0/upper,workdir=$0/work" /etc && exec "$@"' "$etc")
  ip netns exec "$LAB$ns" "${own[@]}" "$@" </dev/null >>"$LAB_DIR/$label.log" 2>&1 &
  echo $! >"$LAB_DIR/$label.pid"
  lab_note_pid $! "$label"
}

lab_pid() { cat "$LAB_DIR/$1.pid"; }

lab_alive() {
  local pid
  pid=$(cat "$LAB_DIR/$1.pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null
}

lab_stop() {
  local pid signal=${2:-TERM} waited=0
  pid=$(cat "$LAB_DIR/$1.pid" 2>/dev/null) || return 0
  rm -f "$LAB_DIR/$1.pid"
  # The shell would print how each of its children ended.
  {
    kill "-$signal" "$pid" || return 0
    while kill -0 "$pid"; do
      sleep 0.05
      waited=$((waited + 1))
      [ $waited -lt 60 ] || kill -9 "$pid" || true
      [ $waited -lt 80 ] || return 1
    done
    wait "$pid" || true
  } 2>/dev/null
}

# A foreground child would hold back traps until it ends; waiting for a background one does not.
lab_run() {
  "$@" &
  lab_note_pid $! run
  wait $!
}

# Nothing that hangs may hang for ever: the guard wakes the script up, and if that does not help, ends it.
lab_limit() {
  # shellcheck disable=SC2064 # the command of now
  trap "trap '' ALRM; $2; exit 1" ALRM
  echo $((EPOCHSECONDS + $1)) >"$LAB_DIR/limit"
}

# lab_wait_file FILE SECONDS
lab_wait_file() {
  local tries=$(($2 * 20))
  while [ ! -e "$1" ]; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || return 1
    sleep 0.05
  done
}

lab_wire() {
  ip link add "$2" netns "$LAB$1" type veth peer name "$4" netns "$LAB$3"
  ip -n "$LAB$1" link set "$2" up
  ip -n "$LAB$3" link set "$4" up
}

lab_lan() {
  local ns=$1 interface=$2 pair host
  shift 2
  ip -n "$LAB$ns" link add br0 type bridge
  ip -n "$LAB$ns" link set br0 up
  for pair in "$@"; do
    host=${pair%=*}
    lab_wire "$ns" "l_$host" "$host" "$interface"
    ip -n "$LAB$ns" link set "l_$host" master br0
    ip -n "$LAB$host" addr add "${pair#*=}" dev "$interface"
  done
}

# ---- the internet of act one -----------------------------------------------------------------
# One router joins all hosts: 203.0.113.0/24, and 2001:db8::/64 for IPv6. lab_far sends what passes between
# two hosts through the link emulator instead.

lab_internet() {
  lab_ns inet
  lab_in inet sh -c '
    echo 1 >/proc/sys/net/ipv4/ip_forward
    echo 1 >/proc/sys/net/ipv6/conf/all/forwarding'
}

# lab_host NAME IPV4 [IPV6]: a host on the internet, reached over its interface "wan".
lab_host() {
  local name=$1 v4=$2 v6=${3:-}
  lab_ns "$name"
  lab_wire inet "p_$name" "$name" wan
  ip -n "${LAB}inet" addr add 203.0.113.254/32 dev "p_$name"
  ip -n "${LAB}inet" route add "$v4/32" dev "p_$name"
  ip -n "$LAB$name" addr add "$v4/32" dev wan
  ip -n "$LAB$name" route add default via 203.0.113.254 dev wan onlink
  if [ -n "$v6" ]; then
    ip -n "${LAB}inet" addr add fe80::1/64 dev "p_$name" nodad
    ip -n "${LAB}inet" route add "$v6/128" dev "p_$name"
    ip -n "$LAB$name" addr add "$v6/128" dev wan nodad
    ip -n "$LAB$name" route add default via fe80::1 dev wan
  fi
}

# lab_home NAME N: node NAME behind an easy NAT of its own, router rNAME.
# WAN 203.0.113.1N and 2001:db8::1N, LAN 192.168.N.0/24 and 2001:db8:N::/64.
lab_home() {
  local name=$1 n=$2
  lab_host "r$name" "203.0.113.1$n" "2001:db8::1$n"
  lab_ns "$name"
  lab_wire "r$name" lan "$name" eth0
  ip -n "${LAB}r$name" addr add "192.168.$n.1/24" dev lan
  ip -n "${LAB}r$name" addr add "2001:db8:$n::1/64" dev lan nodad
  ip -n "${LAB}inet" route add "2001:db8:$n::/64" via "2001:db8::1$n" dev "p_r$name"
  ip -n "$LAB$name" addr add "192.168.$n.2/24" dev eth0
  ip -n "$LAB$name" addr add "2001:db8:$n::2/64" dev eth0 nodad
  ip -n "$LAB$name" route add default via "192.168.$n.1"
  ip -n "$LAB$name" route add default via "2001:db8:$n::1"
  lab_in "r$name" sh -c '
    echo 1 >/proc/sys/net/ipv4/ip_forward
    echo 1 >/proc/sys/net/ipv6/conf/all/forwarding'
  lab_in "r$name" nft -f - <<'NFT'
# Endpoint-independent mapping: masquerade keeps the port and uses a mapping again.
table ip nat {
  chain post { type nat hook postrouting priority srcnat; policy accept;
    oifname "wan" masquerade
  }
}
# Address-and-port-dependent filtering. The drop in "input" matters: else an early packet of the
# other side takes the very mapping that the answer to it would need.
table ip filt {
  chain input { type filter hook input priority filter; policy accept;
    iifname "wan" ct state new meta l4proto udp drop
  }
  chain forward { type filter hook forward priority filter; policy accept;
    iifname "wan" ct status dnat accept
    iifname "wan" ct state new drop
  }
}
table ip6 filt6 {
  chain forward { type filter hook forward priority filter; policy accept;
    iifname "wan" meta l4proto icmpv6 accept
    iifname "wan" ct state new drop
  }
}
NFT
}

# lab_far PORT TO4 TO6 TABLE: what enters the internet at PORT for TO takes the emulated wire.
# Table 100 goes in at far0 and comes out at far1, table 101 the other way.
lab_far() {
  ip -n "${LAB}inet" rule add iif "$1" to "$2" lookup "$4"
  ip -n "${LAB}inet" -6 rule add iif "$1" to "$3" lookup "$4"
}

# lab_far_link DELAY_MS: the emulated wire itself, that much each way.
lab_far_link() {
  lab_spawn inet link "$BENCH" link far0 far1 --delay-ms "$1" --ready "$LAB_DIR/link.ready"
  lab_wait_file "$LAB_DIR/link.ready" 5 || { cat "$LAB_DIR/link.log" >&2; return 1; }
  local table
  for table in 100 101; do
    ip -n "${LAB}inet" route add default dev "far$((table - 100))" table "$table"
    ip -n "${LAB}inet" -6 route add default dev "far$((table - 100))" table "$table"
  done
}

# lab_block NAME N: node NAME silently loses what comes straight from home N, in both families.
# On arrival, so that no sender sees an error.
lab_block() {
  lab_in "$1" nft -f - <<NFT
table inet block {
  chain arrive { type filter hook prerouting priority raw; policy accept;
    meta l4proto udp ip saddr { 203.0.113.1$2, 192.168.$2.0/24 } drop
    meta l4proto udp ip6 saddr { 2001:db8:$2::/64, 2001:db8::1$2 } drop
  }
}
NFT
}

lab_unblock() { lab_in "$1" nft delete table inet block; }

# ---- taking it down --------------------------------------------------------------------------

lab_clean() {
  local status=$?
  set +e
  # Subshells inherit the trap; only the script itself cleans up.
  [ "$BASHPID" = "${LAB_OWNER:-}" ] || return $status
  trap - EXIT
  trap '' INT TERM HUP ALRM
  if [ -e "$LAB_DIR/keep" ]; then
    return $status
  fi
  lab_remove
  return $status
}

# Ends every process and removes every namespace, socket and file of the lab.
lab_remove() {
  local pid at label ns file pids=()
  while read -r pid at label; do
    [ "$(lab_started_at "$pid")" = "$at" ] && pids+=("$pid")
  done <"$LAB_DIR/pids" 2>/dev/null
  [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null
  local namespaces
  namespaces=$(ip netns list 2>/dev/null | awk -v p="$LAB" 'index($1, p) == 1 { print $1 }')
  [ ${#pids[@]} = 0 ] || sleep 0.2
  for ns in $namespaces; do
    # shellcheck disable=SC2046 # one word per process
    kill -9 $(ip netns pids "$ns" 2>/dev/null) 2>/dev/null
  done
  [ ${#pids[@]} = 0 ] || kill -9 "${pids[@]}" 2>/dev/null
  for ns in $namespaces; do
    ip netns del "$ns" 2>/dev/null
    rm -rf "/etc/netns/$ns"
  done
  if [ -e "$LAB_DIR/files" ]; then
    while read -r file; do rm -f "$file"; done <"$LAB_DIR/files"
  fi
  rm -rf "$LAB_DIR"
  return 0
}

# The guard: waits for the script's death, then cleans up in its place if it could not.
lab_guard() {
  local owner=$1 at=$2 idle limit
  LAB=$3 LAB_DIR=$4
  exec {idle}<> <(:)
  while [ -d "$LAB_DIR" ] && [ ! -e "$LAB_DIR/keep" ] && [ "$(lab_started_at "$owner")" = "$at" ]; do
    # A pause without starting a process.
    read -rt 1 -u "$idle" || true
    { read -r limit <"$LAB_DIR/limit"; } 2>/dev/null || continue
    [ "$EPOCHSECONDS" -lt "$limit" ] || kill -ALRM "$owner"
    [ "$EPOCHSECONDS" -lt $((limit + 60)) ] || kill -KILL "$owner"
  done
  [ ! -d "$LAB_DIR" ] || [ -e "$LAB_DIR/keep" ] || lab_remove
}

# lab.sh guard PID STARTED PREFIX DIR | lab.sh remove PREFIX DIR
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  case ${1:-} in
    guard) lab_guard "$2" "$3" "$4" "$5" ;;
    remove) LAB=$2 LAB_DIR=$3 && lab_remove ;;
    *) echo "usage: lab.sh remove PREFIX DIRECTORY (else: source it)" >&2 && exit 2 ;;
  esac
fi
