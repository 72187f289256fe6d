# shellcheck shell=bash
# wg-quick(8) with ordinary files: one end on ours, the other on another program. One of them sends everything
# through the tunnel, which takes a mark on our outer packets. Source it after pair.sh.

# quick_meeting PROGRAM CLIENT: CLIENT, a or b, sends everything through the tunnel.
quick_meeting() {
  PROGRAM=$1 FIRST=$2
  TITLE="wg-quick, $([ "$2" = a ] && echo "we are the client" || echo "we are the server") of $1"
  IF_a=rt$$qo$2$TRY IF_b=rt$$qp$2$TRY
  local client=$2 server node
  server=$(other "$client")
  printf '/var/run/wireguard/%s.sock\n' "$IF_a" "$IF_b" >>"$LAB_DIR/files"
  underlay
  host a "$(outer4 a)" "$(outer6 a)" 192.0.2.254 2001:db8:1::254
  host b "$(outer4 b)" "$(outer6 b)" 198.51.100.254 2001:db8:2::254
  keys
  # A host beyond the server, to which no route leads but the tunnel.
  on "$server" sh -c 'ip addr add 198.18.0.1/32 dev lo; ip -6 addr add 2001:db8:5::1/128 dev lo'
  ln -s "$(command -v "${OURS[0]}")" "$LAB_DIR/$P/ringtail-wg"
  quick_files "$client" "$server"

  for node in "$server" "$client"; do
    check "up ($node)" quick $node up
  done
  check "the background holds no file of who started us" lets_go
  check "ping over IPv4" within 10 pings "$client" 0.5 9
  check "ping over IPv6" on "$client" ping -6 -c 2 -W 2 "$(inner6 "$server")"
  check "everything goes through the tunnel" on "$client" ping -c 2 -W 2 198.18.0.1
  check "over IPv6, too" on "$client" ping -6 -c 2 -W 2 2001:db8:5::1
  check "the mark is set" marked "$client"
  check "wg shows both alike" alike
  check "a file from us" transfer a 7005 paced 0
  check "a file to us" transfer b 7006 paced 0
  # The file of a client names no mark, so that this would take the mark of wg-quick away.
  [ "$client" = a ] || check "syncconf with the same file" synced a
  check "ping after all that" pings "$client" 2 0
  check "save keeps what the file had" saved a
  check "down (a)" quick a down
  check "nothing of ours is left" within 3 nothing_left
  check "up again (a)" quick a up
  check "ping after it" within 20 pings "$client" 0.5 9
  check "down at both ends" both_down
  check "nothing is left after that" within 3 nothing_left
}

quick_files() { # CLIENT SERVER
  local node peer
  for node in a b; do
    peer=$(other $node)
    {
      echo "[Interface]"
      echo "PrivateKey = $(cat "$LAB_DIR/$P/$node.key")"
      echo "Address = $(inner $node)/24, $(inner6 $node)/64"
      [ $node != "$2" ] || echo "ListenPort = 51820"
      printf '\n[Peer]\n'
      echo "PublicKey = $(pubkey "$peer")"
      echo "PresharedKey = $(cat "$LAB_DIR/$P/psk")"
      if [ $node = "$1" ]; then
        printf 'Endpoint = %s:51820\nAllowedIPs = 0.0.0.0/0, ::/0\nPersistentKeepalive = 25\n' "$(outer4 "$peer")"
      else
        echo "AllowedIPs = $(inner "$peer")/32, $(inner6 "$peer")/128"
      fi
    } >"$LAB_DIR/$P/$(interface $node).conf"
    chmod 600 "$LAB_DIR/$P/$(interface $node).conf"
  done
}

quick() { # NODE up|down|save
  local program=$LAB_DIR/$P/ringtail-wg
  [ "$1" = a ] || program=$(peer_path "$PROGRAM")
  on "$1" env "WG_QUICK_USERSPACE_IMPLEMENTATION=$program" \
    timeout 20 wg-quick "$2" "$LAB_DIR/$P/$(interface "$1").conf"
}
both_down() {
  quick b down
  quick a down
}
marked() { [ "$(on "$1" wg show "$(interface "$1")" fwmark)" = 0xca6c ]; }
alike() {
  [ "$(on a wg show "$IF_a" public-key)" = "$(pubkey a)" ] && [ "$(on a wg show "$IF_a" peers)" = "$(pubkey b)" ] &&
    [ "$(on b wg show "$IF_b" peers)" = "$(pubkey a)" ] &&
    [ "$(on a wg show "$IF_a" preshared-keys | cut -f 2)" = "$(on b wg show "$IF_b" preshared-keys | cut -f 2)" ]
}
synced() {
  on "$1" bash -c 'wg syncconf "$1" <(wg-quick strip "$2")' - "$(interface "$1")" "$LAB_DIR/$P/$(interface "$1").conf"
}
saved() {
  local file line
  file=$LAB_DIR/$P/$(interface "$1").conf
  cp "$file" "$file.before"
  quick "$1" save || return 1
  while read -r line; do
    [ -z "$line" ] || [[ $line == Address* ]] || grep -qxF "$line" "$file" || { echo "lost: ${line%%=*}"; return 1; }
  done <"$file.before"
}
lets_go() {
  local pid
  for pid in $(ip netns pids "$LAB${P}a"); do
    ! ls -l "/proc/$pid/fd" | grep -F "$LAB_DIR" || return 1
  done
}
nothing_left() {
  [ -z "$(ip netns pids "$LAB${P}a")" ] && not ip -n "$LAB${P}a" link show "$IF_a" && not test -e "/var/run/wireguard/$IF_a.sock" &&
    not grep -q fwmark <<<"$(ip -n "$LAB${P}a" rule)"
}
