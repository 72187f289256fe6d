# shellcheck shell=bash
# One WireGuard device of ours and one of another program, in namespaces of their own: see interop.sh for the
# picture. Source it after lab.sh, checks.sh, peers.sh and vm.sh; set OURS, BENCH and the sizes there.
#
# Everything here runs in a subshell per meeting, which has:
#   P        prefix of its namespaces, logs and files;  TRY  empty, or a number when it is held again
#   CHECKS   what has been counted
#   PROGRAM  the other program;  FIRST  who has an endpoint, a or b;  TITLE  for the results
#   IF_a, IF_b   interface names: unique on the machine, for the sockets of all devices share a directory

show_logs() {
  local log
  for log in "$LAB_DIR"/*-[ab].log; do
    [ -s "$log" ] || continue
    echo "--- last lines of ${log##*/}"
    tail -n 8 "$log"
  done
}

# ---- two devices -----------------------------------------------------------------------------

# on NODE COMMAND...: not for ever.
on() {
  local node=$1
  shift
  if [ "$node$PROGRAM" = bkernel ]; then
    vm_run "${P}m" timeout $((PACED_S * 2)) "$@"
  else
    lab_in "$P$node" timeout $((PACED_S * 2)) "$@"
  fi
}
bench() { # NODE SUBCOMMAND...
  local node=$1
  shift
  if [ "$node$PROGRAM" = bkernel ]; then on b ringtail-bench "$@"; else on "$node" env RUST_BACKTRACE=0 "$BENCH" "$@"; fi
}
other() { [ "$1" = a ] && echo b || echo a; }
interface() { [ "$1" = a ] && echo "$IF_a" || echo "$IF_b"; }
inner() { [ "$1" = a ] && echo 10.77.0.1 || echo 10.77.0.2; }
inner6() { [ "$1" = a ] && echo fd77::1 || echo fd77::2; }
outer4() { [ "$1" = a ] && echo 192.0.2.1 || echo 198.51.100.1; }
outer6() { [ "$1" = a ] && echo 2001:db8:1::1 || echo 2001:db8:2::1; }
pubkey() { cat "$LAB_DIR/$P/$1.pub"; }

# Two hosts and a router between them.
underlay() {
  lab_ns "${P}a" "${P}m"
  lab_wire "${P}a" w "${P}m" to_a
  if [ "$PROGRAM" = kernel ]; then
    vm_start "${P}m" "$P-b" to_b
  else
    lab_ns "${P}b"
    lab_wire "${P}b" w "${P}m" to_b
  fi
  lab_in "${P}m" sh -c '
    echo 1 >/proc/sys/net/ipv4/ip_forward
    echo 1 >/proc/sys/net/ipv6/conf/all/forwarding'
  ip -n "$LAB${P}m" addr add 192.0.2.254/24 dev to_a
  ip -n "$LAB${P}m" addr add 2001:db8:1::254/64 dev to_a nodad
  ip -n "$LAB${P}m" addr add 198.51.100.254/24 dev to_b
  ip -n "$LAB${P}m" addr add 2001:db8:2::254/64 dev to_b nodad
}

host() { # NODE IPV4 IPV6 ROUTER4 ROUTER6: its outer addresses and routes
  local wire=w
  [ "$1$PROGRAM" != bkernel ] || wire=eth0
  # Addresses without a network of their own, so that one may leave while another comes.
  on "$1" sh -c "ip addr add $2/32 dev $wire; ip -6 addr add $3/128 dev $wire
    ip route add $4/32 dev $wire; ip route add default via $4
    ip -6 route add $5/128 dev $wire; ip -6 route add default via $5"
  on "$1" mkdir -p "$LAB_DIR/$P"
}

# A key in a file, there.
give() { # NODE NAME TEXT
  on "$1" sh -c "umask 077; echo $3 >$LAB_DIR/$P/$2"
}

keys() {
  local node key
  mkdir -p "$LAB_DIR/$P"
  key=$(wg genpsk)
  give a psk "$key"
  give b psk "$key"
  give a wrong-psk "$(wg genpsk)"
  for node in a b; do
    key=$(wg genkey)
    give $node $node.key "$key"
    wg pubkey <<<"$key" >"$LAB_DIR/$P/$node.pub"
  done
}

start() { # NODE
  local if
  if=$(interface "$1")
  if [ "$1$PROGRAM" = bkernel ]; then
    on b ip link add "$if" type wireguard
    return
  fi
  # A socket that a killed program left behind is not the new one's.
  rm -f "/var/run/wireguard/$if.sock"
  if [ "$1" = a ]; then
    lab_spawn "${P}a" "$P-a" "${OURS[@]}" "$if"
  else
    peer_command "$PROGRAM"
    # Its connected sockets would keep a source address that is gone.
    [ "$PROGRAM$FIRST" != boringtun-clib ] || PEER_COMMAND+=(--disable-connected-udp)
    lab_spawn "${P}b" "$P-b" "${PEER_COMMAND[@]}" "$if"
  fi
  within 10 test -S "/var/run/wireguard/$if.sock"
}

stop() { # NODE
  if [ "$1$PROGRAM" = bkernel ]; then
    on b ip link del "$IF_b"
  else
    lab_stop "$P-$1"
  fi
}
# After SIGTERM neither interface nor socket is left.
stops_tidily() {
  lab_stop "$P-a"
  not ip -n "$LAB${P}a" link show "$IF_a" && not test -e "/var/run/wireguard/$IF_a.sock"
}

# configure NODE [OPTION...]: the device and its one peer, whole, in a single request: one of the programs panics
# when an existing peer is set. The options go behind the peer.
configure() {
  local node=$1 if peer
  if=$(interface "$node") peer=$(other "$node")
  shift
  on "$node" wg set "$if" private-key "$LAB_DIR/$P/$node.key" listen-port 51820 \
    peer "$(pubkey "$peer")" "$@" allowed-ips "$(inner "$peer")/32,$(inner6 "$peer")/128" || return 1
  on "$node" ip addr add "$(inner "$node")/24" dev "$if" &&
    on "$node" ip -6 addr add "$(inner6 "$node")/64" dev "$if" &&
    on "$node" ip link set "$if" mtu 1420 up
}
endpoint_of() { # NODE
  if [ "$FIRST" = a ]; then echo "$(outer4 "$1"):51820"; else echo "[$(outer6 "$1")]:51820"; fi
}

# ---- what is looked at -----------------------------------------------------------------------

pings() { # NODE SECONDS LOST_MAX
  bench "$1" ping "$(inner "$(other "$1")")" --rate 20 --seconds "$2" --lost-max "$3"
}
# Soon, most of a second's pings are answered. The emulated kernel is slow when others want its processor.
flows() { within 15 pings "$1" 1 8; }
pings6() { on "$1" ping -6 -c 3 -W 2 "$(inner6 "$(other "$1")")"; }
silent() { not bench "$1" ping "$(inner "$(other "$1")")" --rate 10 --seconds "$2" --lost-max $(($2 * 10 - 1)); }

# Seconds since the epoch of the last handshake, 0 for none. One program says how long ago it was instead.
handshake_at() { # NODE
  on "$1" wg show "$(interface "$1")" latest-handshakes |
    awk -v now="$(date +%s)" '{ print ($2 > 0 && $2 < 1000000000) ? now - $2 : $2 + 0 }'
}
shook_hands() { [ "$(handshake_at "$1")" -gt 0 ]; }
shook_hands_after() { [ "$(handshake_at "$1")" -gt $(($2 + 30)) ]; } # NODE SECONDS
sees_at() { # NODE ENDPOINT
  [ "$(on "$1" wg show "$(interface "$1")" endpoints | awk '{ print $2 }')" = "$2" ]
}
moves_to() { # NODE ENDPOINT: the other end follows
  within 15 sees_at "$(other "$1")" "$2" || { on "$(other "$1")" wg show "$(interface "$(other "$1")")"; return 1; }
}

# ---- files -----------------------------------------------------------------------------------

listens() { # NODE PORT
  on "$1" grep -qi ":$(printf %04x "$2") 0*:0000 0A" /proc/net/tcp
}

# transfer FROM PORT KIND RATE: the file KIND.in, at RATE Mb/s (0: full speed), has the same hash at the other end.
# $SAID is its speed. With the virtual machine all files are small, and it makes one of its own.
transfer() {
  local from=$1 to port=$2 input=$LAB_DIR/$3.in output=$LAB_DIR/$P/$2.out receiver sum_in sum_out log=$LAB_DIR/$P/$2
  to=$(other "$from")
  if [ "$PROGRAM" = kernel ]; then
    input=$LAB_DIR/vm-$3.in
    [ "$from" = a ] || input=/tmp/$3.in
  fi
  bench "$to" receive "$output" "$(inner "$to"):$port" >"$log.receive" 2>&1 &
  receiver=$!
  within 10 listens "$to" "$port" || { echo "no receiver"; cat "$log.receive"; return 1; }
  if ! bench "$from" send "$input" "$(inner "$to"):$port" --rate-mbps "$4" >"$log.send" 2>&1 || ! wait $receiver; then
    cat "$log.send" "$log.receive"
    return 1
  fi
  sum_in=$(on "$from" sha256sum "$input") sum_out=$(on "$to" sha256sum "$output")
  on "$to" rm -f "$output"
  SAID=$(awk '{ printf "%.1f Mb/s", $1 * 8 / $4 / 1e6 }' "$log.send")
  [ "${sum_in%% *}" = "${sum_out%% *}" ]
}

# ---- the meeting -----------------------------------------------------------------------------

meeting() { # PROGRAM FIRST
  PROGRAM=$1 FIRST=$2
  TITLE="$PROGRAM, $([ "$FIRST" = a ] && echo "we begin" || echo "it begins")"
  case $PROGRAM in
    wireguard-go) IF_b=w ;;
    wireguard-go-debian) IF_b=d ;;
    boringtun-cli) IF_b=b ;;
    gotatun) IF_b=g ;;
    kernel) IF_b=k ;;
  esac
  IF_b=rt$$$IF_b$FIRST$TRY IF_a=${IF_b}o
  local second
  second=$(other "$FIRST")
  printf '/var/run/wireguard/%s.sock\n' "$IF_a" "$IF_b" >>"$LAB_DIR/files"

  underlay
  if [ "$PROGRAM" = kernel ]; then
    vm_ready "${P}m" 240 || { check "the virtual machine boots" false; return; }
    on b sh -c "head -c $BYTES_VM /dev/urandom >/tmp/full.in; head -c $BYTES_VM_PACED /tmp/full.in >/tmp/paced.in"
  fi
  host a "$(outer4 a)" "$(outer6 a)" 192.0.2.254 2001:db8:1::254
  host b "$(outer4 b)" "$(outer6 b)" 198.51.100.254 2001:db8:2::254
  keys
  check "both start" starts
  session_part
  speed_part
  nat_part
  stop a
  lab_stop "$P-b"
}
starts() { start a && start b; }

# A preshared key, a handshake, a file each way across roaming and a rekey.
session_part() {
  local began to_b to_a rate pinging
  local options_a=(preshared-key "$LAB_DIR/$P/wrong-psk") options_b=(preshared-key "$LAB_DIR/$P/psk")
  if [ "$FIRST" = a ]; then options_a+=(endpoint "$(endpoint_of b)"); else options_b+=(endpoint "$(endpoint_of a)"); fi
  check "we take our configuration" configure a "${options_a[@]}"
  check "it takes its configuration" configure b "${options_b[@]}"
  check "another preshared key lets nothing through" silent "$FIRST" 3
  check "nor does it count as a handshake with us" not shook_hands a
  check "we are set the right preshared key" on a wg set "$IF_a" peer "$(pubkey b)" preshared-key "$LAB_DIR/$P/psk"
  check "handshake" within 20 pings "$FIRST" 0.5 9
  check "both count it" within 5 both shook_hands
  check "ping" pings "$FIRST" 2 0
  check "ping from the other end" pings "$second" 2 0
  check "ping over IPv6" pings6 "$FIRST"
  check "ping over IPv6 from the other end" pings6 "$second"

  began=$(handshake_at a)
  rate=$(awk -v bytes="$([ "$PROGRAM" = kernel ] && echo "$BYTES_VM_PACED" || echo "$BYTES_PACED")" -v s="$PACED_S" \
    'BEGIN { print bytes * 8 / s / 1e6 }')
  check "the file from us, across all that follows, is the same" transfer a 7001 paced "$rate" &
  to_b=$!
  check "the file to us, across all that follows, is the same" transfer b 7002 paced "$rate" &
  to_a=$!
  pause 5
  if [ "$FIRST" = a ]; then
    on a sh -c 'ip addr add 192.0.2.7/32 dev w && ip addr del 192.0.2.1/32 dev w'
    check "it follows us to another address" moves_to a 192.0.2.7:51820
    check "ping after it" flows a
    check "our port can be changed" on a wg set "$IF_a" listen-port 51899
    check "it follows us to another port" moves_to a 192.0.2.7:51899
    check "ping after that" flows b
  else
    local wire=w
    [ "$PROGRAM" != kernel ] || wire=eth0
    on b sh -c "ip -6 addr add 2001:db8:2::7/128 dev $wire && ip -6 addr del 2001:db8:2::1/128 dev $wire"
    check "we follow it to another address" moves_to b '[2001:db8:2::7]:51820'
    check "ping after it" flows a
    check "ping after it from the other end" flows b
  fi
  while [ "$(date +%s)" -lt $((began + 112)) ]; do pause 1; done
  bench a ping "$(inner b)" --rate 20 --seconds 30 --out "$LAB_DIR/$P/rekey.json" >"$LAB_DIR/$P/rekey.ping" 2>&1 &
  pinging=$!
  check "a rekey while the files go on" rekeys "$began" $to_a $to_b
  check "no ping lost around it" stream $pinging
  wait $to_a $to_b
}
both() { "$@" a && "$@" b; }
rekeys() { # BEGAN PID PID
  local end=$((SECONDS + 40))
  until shook_hands_after a "$1" && shook_hands_after b "$1"; do
    [ $SECONDS -lt $end ] || { echo "a: $(handshake_at a), b: $(handshake_at b), before: $1"; return 1; }
    pause 0.5
  done
  local at
  at=$(handshake_at a)
  SAID="after $((at - $1)) s"
  went_on "$2" 7002 "$at" && went_on "$3" 7001 "$at"
}
# It still goes on, or ended after that: a busy machine may look late.
went_on() { # PID PORT SECONDS
  kill -0 "$1" 2>/dev/null || [ "$(date -r "$LAB_DIR/$P/$2.send" +%s)" -gt "$3" ] || { echo "file $2 had ended"; return 1; }
}
# The answers to the last five seconds may be on their way still.
stream() { # PID
  local lost
  wait "$1" || { cat "$LAB_DIR/$P/rekey.ping"; return 1; }
  SAID=$(head -n 1 "$LAB_DIR/$P/rekey.ping")
  lost=$(grep -o '"rtt_us":[^,}]*' "$LAB_DIR/$P/rekey.json" | head -n -100 | grep -c null || true)
  [ "$lost" -le 2 ] || { echo "$lost of the first 500 lost"; return 1; }
}

# One meeting at a time has the processors for this.
speed_part() {
  local turn
  exec {turn}>"$LAB_DIR/turn"
  flock $turn
  check "a large file from us" transfer a 7003 full 0
  check "a large file to us" transfer b 7004 full 0
  # Long enough for the eleven failed receives in a row after which it would stop reading.
  [ "$PROGRAM$FIRST" != wireguard-goa ] || check "trains of small datagrams from us leave it alive" trains
  exec {turn}>&-
}

# 120 datagrams of 100 bytes at once, for six seconds. A batch of more than 64 is more than it splits.
trains() {
  on a perl -MSocket -e '
    socket(my $socket, PF_INET, SOCK_DGRAM, 0) or die "socket: $!";
    setsockopt($socket, 17, 103, pack("i", 100)) or die "UDP_SEGMENT: $!";
    my ($to, $end) = (pack_sockaddr_in(9, inet_aton($ARGV[0])), time + 6);
    while (time < $end) { send($socket, "x" x 12000, 0, $to); select(undef, undef, undef, 0.001) }' "$(inner b)" &&
    pause 1 && flows a && flows b
}

# The end that began is behind a NAT with a short memory.
nat_part() {
  local in=$FIRST out
  out=$(other "$in")
  check "we stop tidily" stops_tidily
  stop b || true
  lab_in "${P}m" nft -f - <<NFT
table inet nat {
  chain post { type nat hook postrouting priority srcnat; policy accept;
    iifname "to_$in" oifname "to_$out" masquerade
  }
  chain arrive { type filter hook input priority filter; policy accept;
    iifname "to_$out" meta l4proto udp ct state new drop
  }
  chain forward { type filter hook forward priority filter; policy accept;
    iifname "to_$out" meta l4proto udp ct state new drop
  }
}
NFT
  lab_in "${P}m" sh -c "
    echo $MAPPING_S >/proc/sys/net/netfilter/nf_conntrack_udp_timeout
    echo $MAPPING_S >/proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream"
  check "both start again" starts
  configure "$out"
  configure "$in" endpoint "$(endpoint_of "$out")"
  check "handshake through a NAT" within 20 pings "$in" 0.5 9
  check "ping back through its mapping" pings "$out" 1 0
  check "without keep-alive the mapping dies" dies "$out"

  # Anew, for not every program can change a peer.
  stop "$in"
  start "$in"
  configure "$in" endpoint "$(endpoint_of "$out")" persistent-keepalive 1
  check "handshake with keep-alive, unasked" within 20 keeps_alive "$out"
  pause $((MAPPING_S * 2))
  check "with keep-alive the mapping lives" pings "$out" 2 0
}
# wireguard-go may repeat a handshake that is done, if its answer came before it had noted that it began; the answer to
# a repeated one keeps the mapping, too.
dies() {
  local try
  for try in 1 2 3; do
    pause $((MAPPING_S + 1)).5
    ! silent "$1" 2 || return 0
    echo "still alive at try $try"
  done
  return 1
}
keeps_alive() { pings "$1" 0.5 9; }
