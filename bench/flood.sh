#!/usr/bin/env bash
# How a tunnel fares beside a flood of handshake messages: iperf3 through the tunnel while another namespace sends
# 200,000 messages a second from 65,536 addresses, first to a port nobody listens on, then to the tunnel's own.
#
#   bench/flood.sh [PROGRAM...]        ringtail, wireguard-go (whatever is found in PATH)
#
#   RATE=200000 SECONDS_EACH=5 ROUNDS=5 KIND=strangers|noise|mixed    NO_BUILD=1 takes the binaries that are there
#
# Prints a line for each program: the median throughput of both, their ratio, and what the flooded end grew by.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/netns/packages.sh
. scripts/netns/packages.sh
need_packages iperf3=iperf3 ip=iproute2 awk=mawk

rate=${RATE:-200000} seconds=${SECONDS_EACH:-5} rounds=${ROUNDS:-5} kind=${KIND:-strangers}
[ $# -gt 0 ] || set -- ringtail wireguard-go
target=${CARGO_TARGET_DIR:-target}
[ -n "${NO_BUILD:-}" ] || cargo build --release --locked -p ringtail --bin ringtail -p ringtail-bench
bench=$target/release/ringtail-bench
ringtail=$target/release/ringtail

dir=$(mktemp -d)
prefix=rtf$$
pids=()
clean() {
  [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null || true
  wait 2>/dev/null || true
  for name in c v f; do ip netns del "$prefix$name" 2>/dev/null || true; done
  rm -rf "$dir"
}
trap clean EXIT
inside() { # inside NAMESPACE COMMAND...
  local ns=$prefix$1
  shift
  ip netns exec "$ns" "$@"
}

# c (client) -- v (victim) -- f (flooder), who owns a whole prefix.
for name in c v f; do
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
ip -n "${prefix}f" route add local 198.18.0.0/15 dev lo
ip -n "${prefix}v" route add 198.18.0.0/15 via 10.66.2.1

rss() { awk '/^VmRSS/ { print $2 }' "/proc/$1/status"; }
median() { sort -n | awk '{ v[NR] = $1 } END { print (NR % 2) ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }
address() { # address NAMESPACE LAST
  ip -n "$prefix$1" addr add "10.67.0.$2/24" dev "f$1$$"
  ip -n "$prefix$1" link set "f$1$$" mtu 1420 up
}

# start COMMAND...: a device of that program at both ends, configured through its socket, whose directory is the same
# for all namespaces.
start() {
  local end vprivate cprivate ckey
  read -r vprivate key < <("$bench" wgkeys)
  read -r cprivate ckey < <("$bench" wgkeys)
  for end in v c; do
    ip netns exec "$prefix$end" env LOG_LEVEL=error "$@" -f "f$end$$" 2>"$dir/$end.log" &
    pids+=($!)
  done
  "$bench" uapi --interface "fv$$" --private-key "$vprivate" --listen-port 7000 --peer "$ckey" \
    --endpoint 10.66.1.1:7000 --allowed-ip 10.67.0.1/32
  "$bench" uapi --interface "fc$$" --private-key "$cprivate" --listen-port 7000 --peer "$key" \
    --endpoint 10.66.1.2:7000 --allowed-ip 10.67.0.2/32
  address v 2
  address c 1
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
  ip netns exec "${prefix}v" iperf3 -s >/dev/null 2>&1 &
  pids+=($!)
  for _ in $(seq 50); do
    inside c ping -q -c 1 -W 1 10.67.0.2 >/dev/null 2>&1 && break
    sleep 0.1
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
  beside=$(median <"$dir/beside") into=$(median <"$dir/into")
  awk -v name="$program" -v a="$beside" -v b="$into" -v grown="$((peak - before))" -v rate="$(median <"$dir/rates")" \
    -v kind="$kind" 'BEGIN { printf "%-13s %s, %.0f/s: %.2f Gb/s beside the flood, %.2f Gb/s under it: %.0f %%; grew by %.1f MB\n",
      name, kind, rate, a, b, 100 * b / a, grown / 1024 }'
  kill "${pids[@]}" 2>/dev/null || true
  wait 2>/dev/null || true
done
