#!/usr/bin/env bash
# How a tunnel fares beside a flood of handshake messages from 65,536 addresses.
#
#   bench/flood.sh [PROGRAM...]        ringtail, wireguard-go (whatever is found in PATH)
#
#   RATE=200000 SECONDS_EACH=5 ROUNDS=5    throughput: iperf3 through the tunnel while another namespace sends so many
#                        messages a second, first to a port nobody listens on, then to the tunnel's own; ROUNDS=0 is none
#   RATES="60000 200000" NEW=5 LIVE=0      handshakes: at each of these rates, how long NEW peers who come one after
#                        another take to have a session, each at an address of its own; with LIVE=190 also how long
#                        tunnels that were up before are silent in so many seconds, that is at their rekey: one that
#                        the peer began and one that the flooded end began
#   KIND=strangers|replays|proven|answers|everything|noise|mixed
#   NO_BUILD=1           takes the binaries that are there; BIN_DIR says where
#
# Prints for each program a line with the median throughput of both, their ratio, and what the flooded end grew by,
# and a line for each rate.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/netns/packages.sh
. scripts/netns/packages.sh
need_packages iperf3=iperf3 ip=iproute2 awk=mawk

rate=${RATE:-200000} seconds=${SECONDS_EACH:-5} rounds=${ROUNDS:-5} kind=${KIND:-strangers}
rates=${RATES-60000 200000} new=${NEW:-5} live=${LIVE:-0}
[ $# -gt 0 ] || set -- ringtail wireguard-go
target=${CARGO_TARGET_DIR:-target}
[ -n "${NO_BUILD:-}" ] || build_programs --release
bin=${BIN_DIR:-$target/release}
bench=$bin/ringtail-bench
ringtail=$bin/ringtail

dir=$(mktemp -d)
prefix=rtf$$
pids=()
clean() {
  [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null || true
  wait 2>/dev/null || true
  for name in c v f w n; do ip netns del "$prefix$name" 2>/dev/null || true; done
  rm -rf "$dir"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
inside() { # inside NAMESPACE COMMAND...
  local ns=$prefix$1
  shift
  ip netns exec "$ns" "$@"
}

# c (client) -- v (victim) -- f (flooder), who owns a whole prefix. w is a client that v goes to, n whoever is new.
for name in c v f w n; do
  ip netns add "$prefix$name"
  ip -n "$prefix$name" link set lo up
done
link() { # link NAMESPACE SUBNET
  ip -n "$prefix$1" link add o0 type veth peer name "$1"0 netns "${prefix}v"
  ip -n "$prefix$1" addr add "10.66.$2.1/24" dev o0
  ip -n "${prefix}v" addr add "10.66.$2.2/24" dev "$1"0
  ip -n "$prefix$1" link set o0 up
  ip -n "${prefix}v" link set "$1"0 up
}
link c 1
link f 2
link w 3
link n 4
ip -n "${prefix}f" route add local 198.18.0.0/15 dev lo
ip -n "${prefix}v" route add 198.18.0.0/15 via 10.66.2.1

rss() { awk '/^VmRSS/ { print $2 }' "/proc/$1/status"; }
median() { sort -n | awk '{ v[NR] = $1 } END { print (NR % 2) ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }
address() { # address NAMESPACE LAST
  ip -n "$prefix$1" addr add "10.67.0.$2/24" dev "f$1$$"
  ip -n "$prefix$1" link set "f$1$$" mtu 1420 up
}

# start COMMAND...: a device of that program at v, c and w, configured through its socket, whose directory is the
# same for all namespaces.
start() {
  local end
  read -r vprivate key < <("$bench" wgkeys)
  device v "$@"
  device c "$@"
  join c 1 1
  device w "$@"
  join w 3 3
  address v 2
}
device() { # NS COMMAND...
  local end=$1
  shift
  ip netns exec "$prefix$end" env LOG_LEVEL=error "$@" -f "f$end$$" 2>>"$dir/$end.log" &
  pids+=($!)
}
# join NS NET HOST: makes keys for a peer at 10.66.NET.HOST outside and 10.67.0.HOST inside, and tells both ends.
join() {
  local private public outside=10.66.$2.$3
  [ "$1" = n ] || outside=10.66.$2.1
  read -r private public < <("$bench" wgkeys)
  "$bench" uapi --interface "fv$$" --private-key "$vprivate" --listen-port 7000 --peer "$public" \
    --endpoint "$outside:7000" --allowed-ip "10.67.0.$3/32"
  "$bench" uapi --interface "f$1$$" --private-key "$private" --listen-port 7000 --peer "$key" \
    --endpoint "10.66.$2.2:7000" --allowed-ip 10.67.0.2/32
  address "$1" "$3"
}

# newcomer HOST COMMAND...: seconds until somebody new has an answer through the tunnel, or "none" within 20.
newcomer() {
  local host=$1 began
  shift
  ip -n "${prefix}n" addr flush dev o0
  ip -n "${prefix}n" addr add "10.66.4.$host/24" dev o0
  device n "$@"
  local pid=${pids[-1]}
  join n 4 "$host"
  began=$(date +%s%3N)
  until inside n ping -q -c 1 -W 0.2 10.67.0.2 >/dev/null 2>&1 || [ $(($(date +%s%3N) - began)) -gt 20000 ]; do :; done
  awk -v ms=$(($(date +%s%3N) - began)) 'BEGIN { if (ms > 20000) print "none"; else printf "%.1f\n", ms / 1000 }'
  kill "$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
}
# The longest silence in a log of `ping -D -i 0.5`, in seconds, up to its end.
silence() {
  awk -v end="$2" -F'[][]' '/bytes from/ { if (last && $2 - last > most) most = $2 - last; last = $2 }
    END { if (!last) print "all of it"; else { if (end - last > most) most = end - last; printf "%.1f s\n", most } }' "$1"
}
# handshakes RATE COMMAND...: the line for a rate.
handshakes() {
  local rate=$1 span flood i took=() watchers=() line
  shift
  span=$((live > 0 ? live : 4 + 12 * new))
  nice -n -15 "$bench" flood --netns "${prefix}f" --to "10.66.2.2:7000" --rate "$rate" --seconds "$((span + 30))" \
    --kind "$kind" --public-key "$key" ${FLOOD_ARGS:-} >"$dir/flood.json" &
  flood=$!
  local until=$((SECONDS + span))
  if [ "$live" -gt 0 ]; then
    ip netns exec "${prefix}c" ping -D -i 0.5 -w "$live" 10.67.0.2 >"$dir/live.c" 2>/dev/null &
    watchers+=($!)
    ip netns exec "${prefix}v" ping -D -i 0.5 -w "$live" 10.67.0.3 >"$dir/live.w" 2>/dev/null &
    watchers+=($!)
  fi
  sleep 2
  for i in $(seq "$new"); do
    next=$((next + 1))
    took+=("$(newcomer "$next" "$@")")
  done
  [ "$live" = 0 ] || wait "${watchers[@]}" || true
  line="new peers after ${took[*]} s"
  if [ "$live" -gt 0 ]; then
    line="$line; in $live s silent at most: $(silence "$dir/live.c" "$(date +%s)") where the peer rekeys,"
    line="$line $(silence "$dir/live.w" "$(date +%s)") where the flooded end does"
  fi
  # Of the signals a background process of a script takes this one.
  kill "$flood" 2>/dev/null || true
  wait "$flood" 2>/dev/null || true
  printf '%-13s %s, %s/s: %s\n' "$program" "$kind" "$rate" "$line"
}

# one PORT: Gb/s through the tunnel beside a flood to PORT of the victim.
one() {
  nice -n -15 "$bench" flood --netns "${prefix}f" --to "10.66.2.2:$1" --rate "$rate" --seconds "$((seconds + 2))" --kind "$kind" \
    --public-key "$key" >"$dir/flood.json" &
  local flood=$!
  sleep 1
  inside c iperf3 -c 10.67.0.2 -t "$seconds" -C cubic -J >"$dir/iperf.json"
  wait "$flood"
  "$bench" pick /end/sum_received/bits_per_second <"$dir/iperf.json" | awk '{ printf "%.3f\n", $1 / 1e9 }'
  "$bench" pick /rate <"$dir/flood.json" >>"$dir/rates"
}

for program in "$@"; do
  if [ "$program" = wireguard-go ] && ! command -v wireguard-go >/dev/null; then
    echo "wireguard-go: not found in PATH" >&2
    continue
  fi
  pids=()
  rm -f "$dir"/{beside,into,rates}
  case $program in
    ringtail) command=("$ringtail" device) ;;
    *) command=("$program") ;;
  esac
  start "${command[@]}"
  next=10
  ip netns exec "${prefix}v" iperf3 -s >/dev/null 2>&1 &
  pids+=($!)
  for _ in $(seq 50); do
    inside c ping -q -c 1 -W 1 10.67.0.2 >/dev/null 2>&1 && break
    sleep 0.1
  done
  # The first to send begins: c does, and v does towards w.
  inside v ping -q -c 2 -W 2 10.67.0.3 >/dev/null 2>&1 || true
  for flooded in $rates; do
    [ "$new" = 0 ] || handshakes "$flooded" "${command[@]}"
  done
  inside c iperf3 -c 10.67.0.2 -t 1 -C cubic >/dev/null
  pid=${pids[0]}
  before=$(rss "$pid")
  peak=$before
  for _ in $(seq "$rounds"); do
    one 7999 >>"$dir/beside"
    one 7000 >>"$dir/into"
    now=$(rss "$pid")
    [ "$now" -le "$peak" ] || peak=$now
  done
  if [ "$rounds" -gt 0 ]; then
    beside=$(median <"$dir/beside") into=$(median <"$dir/into")
    awk -v name="$program" -v a="$beside" -v b="$into" -v grown="$((peak - before))" \
      -v rate="$(median <"$dir/rates")" -v kind="$kind" 'BEGIN {
      printf "%-13s %s, %.0f/s: %.2f Gb/s beside the flood, %.2f Gb/s under it: %.0f %%; grew by %.1f MB\n",
        name, kind, rate, a, b, 100 * b / a, grown / 1024 }'
  fi
  kill "${pids[@]}" 2>/dev/null || true
  wait 2>/dev/null || true
done
