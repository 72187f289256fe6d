# shellcheck shell=bash
# The other programs, of WireGuard and of a tailnet: where they are, how they are had, how they are started. Source
# it after packages.sh.
#
#   install_peers [PROGRAM...]     what is missing of them (WIREGUARD_PEERS, by default), into a cache; says what it
#                                  cannot have
#   peer_command PROGRAM           PEER_COMMAND: what runs it in the foreground; the interface name goes behind
#   peer_version PROGRAM           in its own words
#
# Programs: wireguard-go (newest), wireguard-go-debian (as packaged), boringtun-cli, gotatun; and of a tailnet:
# headscale, tailscaled, tailscale, derper. What is on the PATH is used as it is.

WIREGUARD_PEERS=(wireguard-go boringtun-cli gotatun)
TAILNET_PEERS=(tailscaled tailscale derper headscale wireguard-go)
# The versions that ringtail is held against.
TAILSCALE_VERSION=v1.102.3 HEADSCALE_VERSION=v0.29.2

CACHE=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/ringtail-bench
export PATH="$PATH:$CACHE/bin:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin:/usr/local/go/bin"

# The packaged wireguard-go is years older than the newest and has none of the offloads.
packaged() { [ "$(command -v dpkg)" ] && dpkg -S "$1" >/dev/null 2>&1; }

# peer_path PROGRAM: its path, if it is there.
peer_path() {
  local path
  case $1 in
    wireguard-go)
      for path in $(type -ap wireguard-go); do
        packaged "$path" || { echo "$path"; return; }
      done
      return 1 ;;
    wireguard-go-debian)
      for path in $(type -ap wireguard-go) "$CACHE/debian-wireguard-go/usr/bin/wireguard-go"; do
        [ -x "$path" ] || continue
        if packaged "$path" || [[ $path == "$CACHE"/debian-* ]]; then
          echo "$path"
          return
        fi
      done
      return 1 ;;
    *) type -P "$1" ;;
  esac
}

peer_command() {
  local path
  path=$(peer_path "$1") || return 1
  case $1 in
    wireguard-go*) PEER_COMMAND=(env LOG_LEVEL=error "$path" -f) ;;
    boringtun-cli) PEER_COMMAND=("$path" -f --disable-drop-privileges) ;;
    gotatun) PEER_COMMAND=("$path" -f --disable-drop-privileges --verbosity error) ;;
    *) return 1 ;;
  esac
}

peer_version() {
  local said
  case $1 in
    headscale) said=$("$(peer_path "$1")" version 2>&1) ;;
    *) said=$("$(peer_path "$1")" --version 2>&1) ;;
  esac
  head -n 1 <<<"$said"
}

install_peers() {
  local program
  [ $# -gt 0 ] || set -- "${WIREGUARD_PEERS[@]}"
  mkdir -p "$CACHE/bin"
  for program in "$@"; do
    peer_path "$program" >/dev/null || install_peer "$program" || echo "$program: could not be installed"
  done
}

# From nothing, on two cores: wireguard-go 20 s, boringtun-cli 1 min, gotatun 3 min; tailscaled 3 min, tailscale and
# derper little more after it, headscale 3 min. They are release builds although tests would do with less, for the bench
# compares with the same files.
install_peer() {
  case $1 in
    boringtun-cli) thrice cargo install --quiet --locked --root "$CACHE" boringtun-cli ;;
    gotatun) thrice cargo install --quiet --locked --root "$CACHE" gotatun-cli ;;
    wireguard-go)
      command -v go >/dev/null || { echo "wireguard-go: the newest needs Go"; return 1; }
      # As a module: it carries the newest version. Its binary is called "wireguard".
      GOBIN=$CACHE/go-bin GOFLAGS=-mod=mod thrice go install golang.zx2c4.com/wireguard@latest &&
        mv "$CACHE/go-bin/wireguard" "$CACHE/bin/wireguard-go" ;;
    tailscaled | tailscale | derper)
      command -v go >/dev/null || { echo "$1: needs Go"; return 1; }
      CGO_ENABLED=0 GOBIN=$CACHE/bin GOFLAGS=-mod=mod thrice go install "tailscale.com/cmd/$1@$TAILSCALE_VERSION" ;;
    headscale) build_headscale ;;
    wireguard-go-debian) unpack_package wireguard-go "$CACHE/debian-wireguard-go" ;;
    *) return 1 ;;
  esac
}

# Its module file has lines that `go install` refuses in a module which is not the main one: so it is a tool of a
# module of ours.
build_headscale() {
  command -v go >/dev/null || { echo "headscale: needs Go"; return 1; }
  local at=$CACHE/go-headscale
  rm -rf "$at" && mkdir -p "$at" || return 1
  (
    cd "$at"
    export CGO_ENABLED=0 GOFLAGS=-mod=mod
    printf 'module peers\n\ngo 1.26.4\n\ntool github.com/juanfont/headscale/cmd/headscale\n' >go.mod
    thrice go get "github.com/juanfont/headscale@$HEADSCALE_VERSION" &&
      go build -o "$CACHE/bin/headscale" github.com/juanfont/headscale/cmd/headscale
  ) >"$at/log" 2>&1 || { tail -n 5 "$at/log"; return 1; }
}
