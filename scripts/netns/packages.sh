# shellcheck shell=bash
# Debian packages, downloads, the compiler and what it builds. Source it.

# thrice COMMAND...: until it succeeds, three times at the most: networks and registries have hiccups.
thrice() {
  local try
  for try in 1 2; do
    ! "$@" || return 0
    echo "failed, try $try of 3: $*" >&2
    sleep $((try * 10))
  done
  "$@"
}

# from_rust WHAT PART COMMAND...: COMMAND has rustup get PART from Rust's own server, which not every machine reaches.
# Without it ends the script with status 75, which CI prints and does not take for a failure.
from_rust() {
  thrice "${@:3}" || { echo "$1: NOT RUN: $2 cannot be had here" >&2; exit 75; }
}

# build_programs [OPTION...]: ringtail-bench and ringtail, each by itself: together, the one would get the features
# that the other asks for.
build_programs() {
  local package
  for package in ringtail-bench ringtail; do
    cargo build --locked --quiet -p $package "$@" || return 1
  done
}

# Another program may hold the lock of the packages on a machine that has just started.
apt_get() { apt-get -qq -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3 "$@"; }
apt_lists() { [ -n "$(ls /var/lib/apt/lists/*Packages* 2>/dev/null)" ] || thrice apt_get update >/dev/null || true; }
apt_install() { apt_get install -y --no-install-recommends "$@" >/dev/null; }

# need_packages COMMAND=PACKAGE...: installs the Debian packages of the commands (or files, by full path) that
# are missing.
# Says nothing when all are there.
need_packages() {
  local pair missing=()
  for pair in "$@"; do
    [ -e "${pair%%=*}" ] || PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || { echo "please install: ${missing[*]}" >&2; return 1; }
  echo "installing ${missing[*]} ..."
  local package failed=()
  export DEBIAN_FRONTEND=noninteractive
  apt_lists
  if ! apt_install "${missing[@]}" 2>/dev/null; then
    # The lists may be old, or one of the packages may be missing.
    thrice apt_get update >/dev/null || true
    for package in "${missing[@]}"; do
      thrice apt_install "$package" || failed+=("$package")
    done
  fi
  [ ${#failed[@]} = 0 ] || { echo "could not install: ${failed[*]}" >&2; return 1; }
}

# unpack_package PACKAGE DIRECTORY: the files of a Debian package, without installing it.
unpack_package() {
  local at
  [ ! -e "$2/.complete" ] || return 0
  command -v apt-get >/dev/null || return 1
  rm -rf "$2" && mkdir -p "$2" && at=$(mktemp -d) || return 1
  # apt-get may download as a user of its own.
  chmod 755 "$at"
  apt_lists
  (
    cd "$at"
    apt_get download "$1" >/dev/null 2>&1 || { thrice apt_get update >/dev/null && thrice apt_get download "$1" >/dev/null; }
  ) && dpkg -x "$at"/*.deb "$2" && : >"$2/.complete"
  local status=$?
  rm -rf "$at"
  return $status
}

# Under whatever name rustup has the compiler that rust-toolchain.toml wants, it is that one: nothing is fetched.
WANTED_RUST=$(sed -n 's/^channel = "\(.*\)"$/\1/p' "$(dirname "${BASH_SOURCE[0]}")/../../rust-toolchain.toml")
if [ -z "${RUSTUP_TOOLCHAIN:-}" ] && [[ "$(cd / && rustc --version 2>/dev/null)" = "rustc $WANTED_RUST "* ]]; then
  RUSTUP_TOOLCHAIN=$(cd / && rustup show active-toolchain 2>/dev/null | cut -d' ' -f1) || true
  # Without rustup there is only one.
  [ -z "$RUSTUP_TOOLCHAIN" ] || export RUSTUP_TOOLCHAIN
fi
