#!/usr/bin/env bash
# Relay throughput, side by side: two of our clients through `ringtail derp`, and through derper
# where it is found (DERPER=path, or in PATH). Needs no root: everything is on loopback.
#
#   bench/relay-blast.sh [ROUNDS] [relay_blast options...]
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-3}
[ $# -gt 0 ] && shift
target=${CARGO_TARGET_DIR:-target}
[ -n "${NO_BUILD:-}" ] || cargo build --release --locked -p ringtail --bin ringtail --example relay_blast
blast=$target/release/examples/relay_blast
ringtail=$target/release/ringtail
derper=${DERPER:-$(command -v derper || true)}

dir=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$dir"' EXIT

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

wait_port() {
  for _ in $(seq 100); do
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && return 0
    sleep 0.05
  done
  echo "nothing listens on port $1" >&2
  return 1
}

port=$(free_port)
"$ringtail" derp --hostname 127.0.0.1 --addr "127.0.0.1:$port" --no-stun --state-dir "$dir/ringtail" \
  >"$dir/ringtail.log" 2>&1 &
pids+=($!)
names=(ringtail)
wait_port "$port"
cp "$dir/ringtail/derp-node.json" "$dir/ringtail.json"

if [ -n "$derper" ]; then
  port=$(free_port)
  mkdir "$dir/derper"
  "$derper" -a "127.0.0.1:$port" -http-port -1 -stun=false -certmode manual -hostname 127.0.0.1 \
    -certdir "$dir/derper" -c "$dir/derper/key.json" >"$dir/derper.log" 2>&1 &
  pids+=($!)
  names+=(derper)
  wait_port "$port"
  pin=$(openssl x509 -in "$dir/derper/127.0.0.1.crt" -outform DER | sha256sum | cut -d' ' -f1)
  cat >"$dir/derper.json" <<JSON
{"Regions":{"900":{"RegionID":900,"RegionCode":"derper","Nodes":[{"Name":"900a","RegionID":900,
 "HostName":"127.0.0.1","IPv4":"127.0.0.1","IPv6":"none","DERPPort":$port,"STUNPort":-1,
 "CertName":"sha256-raw:$pin"}]}}}
JSON
else
  echo "derper not found (DERPER=path): ringtail alone" >&2
fi

# cpu PID: user and system seconds so far.
cpu() { awk '{ sub(/.*\) /, ""); print ($12 + $13) / 100 }' "/proc/$1/stat"; }

for round in $(seq "$rounds"); do
  for i in "${!names[@]}"; do
    before=$(cpu "${pids[$i]}")
    result=$("$blast" "$dir/${names[$i]}.json" "$@" 2>"$dir/blast.log") || { cat "$dir/blast.log" >&2; exit 1; }
    after=$(cpu "${pids[$i]}")
    printf '%-9s round %s  %s, relay %s CPU s\n' "${names[$i]}" "$round" "$result" \
      "$(awk -v a="$after" -v b="$before" 'BEGIN { printf "%.2f", a - b }')"
  done
done
