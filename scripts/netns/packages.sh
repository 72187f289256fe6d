# shellcheck shell=bash
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
  [ -n "$(ls /var/lib/apt/lists/*Packages* 2>/dev/null)" ] || apt-get update -qq >/dev/null || true
  if ! apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1; then
    apt-get update -qq >/dev/null || true
    for package in "${missing[@]}"; do
      apt-get install -y -qq --no-install-recommends "$package" >/dev/null || failed+=("$package")
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
  [ -n "$(ls /var/lib/apt/lists/*Packages* 2>/dev/null)" ] || apt-get update -qq >/dev/null || true
  (
    cd "$at"
    apt-get download -qq "$1" >/dev/null 2>&1 || { apt-get update -qq >/dev/null && apt-get download -qq "$1" >/dev/null; }
  ) && dpkg -x "$at"/*.deb "$2" && : >"$2/.complete"
  local status=$?
  rm -rf "$at"
  return $status
}
