# shellcheck shell=bash

# Whom a's own resolver asks: /etc/resolv.conf in a file system of its own, which nobody or systemd-resolved keeps. b is a
# tailscaled whose name is asked for; the server that a asked before is at 203.0.113.53.
row_resolver() {
  local before
  # shellcheck disable=SC2034 # for tailnet.sh
  HS_DNS='{magic_dns: true, override_local_dns: false, base_domain: lab.example, nameservers: {global: []}}'
  tailnet_up
  hosts a b
  lab_host dns 203.0.113.53
  echo "www.example.net 198.51.100.7" >"$LAB_DIR/zone"
  lab_spawn dns names "$ROOT/scripts/netns/dns.pl" 203.0.113.53 "$LAB_DIR/zone"
  tailnet_tailscaled b b
  resolver_etc
  a_in sh -c 'echo "options ndots:1
nameserver 203.0.113.53" >/run/theirs; ln -sf ../run/theirs /etc/resolv.conf'
  before=$(resolver_state)
  resolver_start
  ready a b || return 0
  check "a link: the host finds a peer by its name" within 10 finds b
  check "and all else by the server it asked before" found www.example.net 198.51.100.7
  check "as dns status says" resolver_told "asks us for all names, by /etc/resolv.conf"
  check "in a file that says whose it is" a_in grep -q "^# Written by ringtail for ringtail0" /etc/resolv.conf
  a_in sh -c 'echo "nameserver 203.0.113.53" >/etc/new; mv /etc/new /etc/resolv.conf'
  check "what another program writes is replaced" within 5 finds b
  for _ in 1 2 3 4 5; do
    a_in sh -c "echo 'nameserver 203.0.113.53' >/etc/new; mv /etc/new /etc/resolv.conf"
    pause 0.4
  done
  check "but not for ever, and status says so" within 5 resolver_says "another program keeps writing"
  resolver_end
  check "and is what is there in the end" [ "$(a_in cat /etc/resolv.conf)" = "nameserver 203.0.113.53" ]
  a_in ln -sfT ../run/theirs /etc/resolv.conf
  resolver_start
  check "started again it is asked" within 20 finds b
  resolver_end
  before=$(resolver_state)
  resolver_start
  within 20 finds b
  rt a set --accept-dns=false
  check "told to leave it alone it puts all back" within 5 same_resolver "$before"
  rt a set --accept-dns=true
  check "and takes it again" within 5 finds b
  rt a down
  check "down: the link and all else is there" within 5 same_resolver "$before"
  rt a up
  check "up: it is asked again" within 20 finds b
  resolver_end KILL
  check "killed: the link and all else is there within 2 s" within 2 same_resolver "$before"
  resolver_start
  within 20 finds b
  pkill -KILL -P "$(lab_pid node-a)" -f keeper
  resolver_end KILL
  a_in "$RINGTAIL" restore --state-dir "$LAB_DIR/node-a"
  check "killed with its keeper: ringtail restore puts it back" same_resolver "$before"
  for how in missing dangling; do
    case $how in
      missing) a_in rm /etc/resolv.conf ;;
      dangling) a_in ln -sfT /nowhere/resolv.conf /etc/resolv.conf ;;
    esac
    before=$(resolver_state)
    resolver_start
    check "$how: a peer is found" within 20 finds b
    resolver_end
    check "$how: so it is in the end" same_resolver "$before"
  done
  a_in rm /etc/resolv.conf
  a_in sh -c 'echo "nameserver 203.0.113.53" >/run/mounted; touch /etc/resolv.conf; mount --bind /run/mounted /etc/resolv.conf'
  before=$(resolver_state)
  resolver_start
  check "mounted: it is written in place" within 20 finds b
  resolver_end KILL
  check "mounted: its text is back when killed" within 2 same_resolver "$before"
  a_in sh -c 'umount /etc/resolv.conf; echo "nameserver 203.0.113.53" >/etc/resolv.conf; mount -o remount,ro,bind /etc'
  before=$(resolver_state)
  resolver_start
  check "read-only: status says so" within 20 resolver_says "Read-only"
  check "read-only: all else works" tailnet_pings a b 1
  resolver_end
  check "read-only: nothing has changed" same_resolver "$before"
  a_in mount -o remount,rw,bind /etc
  for how in resolvconf openresolv; do
    check "$how can be had" resolver_program $how
    before=$(a_in sh -c 'readlink -f /etc/resolv.conf; cat /etc/resolv.conf')
    resolver_start
    check "$how: a peer is found" within 20 finds b
    check "$how: and all else" found www.example.net 198.51.100.7
    check "$how: it was told, and keeps the file" a_in sh -c 'grep resolvconf /etc/resolv.conf && grep 100.100.100.100 /etc/resolv.conf && ! ls /etc/*ringtail'
    resolver_end KILL
    check "$how: all is as before when killed" within 3 same_program "$before"
    a_in sh -c 'umount -l /usr/sbin /usr/lib; rm -rf /etc/resolvconf* /etc/resolv.conf /run/resolvconf'
  done
  check "systemd-resolved can be had" resolver_daemon
  resolver_start
  check "systemd-resolved: a peer is found" within 20 finds b
  check "and all else" found www.example.net 198.51.100.7
  check "the file is left as it is" [ "$(a_in readlink /etc/resolv.conf)" = ../run/systemd/resolve/stub-resolv.conf ]
  check "it asks ours for the network's names only" resolver_splits
  check "and dns status says so" resolver_told "asks us for names of the network, by systemd-resolved"
  lab_stop resolved
  resolver_spawn
  check "started anew it is told again" within 10 finds b
  kill -STOP "$(lab_pid resolved)"
  kill "$(lab_pid node-a)"
  check "it ends although systemd-resolved hangs" within 3 not lab_alive node-a
  kill -CONT "$(lab_pid resolved)"
  check "which has forgotten it" within 2 resolver_forgot
}
# A file system namespace with /etc and /run of its own, which outlives the node; a_in COMMAND... runs there.
resolver_etc() {
  cp -a /etc "$LAB_DIR/etc"
  # shellcheck disable=SC2016 # for the other shell
  lab_spawn a etc unshare -m sh -c 'mount --make-rprivate / && mount --bind "$0" /etc && mount -t tmpfs run /run && : >/run/ready && exec sleep infinity' "$LAB_DIR/etc"
  within 5 a_in test -e /run/ready
}
a_in() { nsenter -t "$(lab_pid etc)" -m -n "$@"; }
resolver_start() {
  # shellcheck disable=SC2034,SC2154 # for tailnet.sh
  TAILNET_KIND[a]=ringtail TAILNET_NS[a]=a
  lab_spawn a node-a nsenter -t "$(lab_pid etc)" -m "$RINGTAIL" up --coord "$COORD_URL" --auth-key-file "$LAB_DIR/auth-key" \
    --state-dir "$LAB_DIR/node-a" --hostname a
}
resolver_end() { tailnet_stop a "$@"; }
# found NAME ADDRESS; finds NODE: by its first label alone.
found() { SAID=$(a_in getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }') && [ "$SAID" = "$2" ]; }
finds() { found "$1" "$(tailnet_ip "$1")"; }
# The name as it is, what it leads to, and what stands beside it.
resolver_state() { a_in sh -c 'stat -c "%N %i %a %u:%g" /etc/resolv.conf; cat /etc/resolv.conf; ls -A /etc | grep -i resolv' 2>&1; }
same_resolver() { diff <(echo "$1") <(resolver_state); }
resolver_told() { "$RINGTAIL" dns status --state-dir "$LAB_DIR/node-a" | grep -F "$1"; }
resolver_says() { rt a status --json | jq -e --arg what "$1" '.health[] | select(contains($what))'; }

# resolver_program PACKAGE: this resolvconf keeps the file, as if the package were installed.
resolver_program() {
  local at=$CACHE/debian-$1
  unpack_package "$1" "$at" || return 1
  # shellcheck disable=SC2016 # for the other shell
  a_in sh -c 'mount -t overlay lib -o lowerdir="$0/lib:/usr/lib" /usr/lib && mount -t overlay sbin -o lowerdir="$0/sbin:/usr/sbin" /usr/sbin &&
    cp -a "$0"/etc/resolvconf* /etc/ && if [ "$1" = resolvconf ]; then
      mkdir -p /run/resolvconf/interface && resolvconf --enable-updates && ln -sfT /run/resolvconf/resolv.conf /etc/resolv.conf
    fi && echo "nameserver 203.0.113.53" | resolvconf -a eth0.inet && grep resolvconf /etc/resolv.conf' "$at" "$1"
}
same_program() { diff <(echo "$1") <(a_in sh -c 'readlink -f /etc/resolv.conf; cat /etc/resolv.conf'); }
# A systemd-resolved of a's own on a bus of its own; its package is unpacked, not installed.
resolver_daemon() {
  local at=$CACHE/debian-systemd-resolved
  unpack_package systemd-resolved "$at" && need_packages dbus-daemon=dbus-daemon || return 1
  RESOLVED=$at/lib/systemd/systemd-resolved RESOLVECTL=$at/usr/bin/resolvectl
  export DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/bus
  a_in sh -c 'cat >/run/bus.conf; mkdir -p /etc/systemd /run/systemd/resolve
    grep -q "^systemd-resolve:" /etc/passwd || echo "systemd-resolve:x:992:992::/:/usr/sbin/nologin" >>/etc/passwd
    grep -q "^systemd-resolve:" /etc/group || echo "systemd-resolve:x:992:" >>/etc/group
    chown systemd-resolve: /run/systemd/resolve
    printf "[Resolve]\nDNS=203.0.113.53\nFallbackDNS=\nDNSSEC=no\n" >/etc/systemd/resolved.conf' <<'XML'
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=/run/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
  </policy>
</busconfig>
XML
  lab_spawn a bus nsenter -t "$(lab_pid etc)" -m dbus-daemon --config-file=/run/bus.conf --nofork --nopidfile
  within 5 a_in test -S /run/bus
  resolver_spawn
  within 10 a_in test -e /run/systemd/resolve/stub-resolv.conf && a_in ln -sfT ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
}
resolver_spawn() { lab_spawn a resolved nsenter -t "$(lab_pid etc)" -m "$RESOLVED"; }
resolver_splits() { a_in "$RESOLVECTL" status ringtail0 | grep -E 'DNS Domain: .*lab\.example' && a_in "$RESOLVECTL" status ringtail0 | grep -e '-DefaultRoute'; }
resolver_forgot() { a_in "$RESOLVECTL" status >"$LAB_DIR/told" && not grep 100.100.100.100 "$LAB_DIR/told"; }
