#!/usr/bin/env bash
# Holds the dependencies against deny.toml: licences, crates that are there twice, where they come from.
#
#   scripts/deny.sh                    what CI checks: the registry of crates is all it needs
#   scripts/deny.sh advisories         known holes and withdrawn versions: fetches the database of RustSec by git
#
# Builds cargo-deny once, into the cache of the peers, without optimisation, which would take longer than all it ever does.
# A line of deny.toml that is of no use any more is an error, too.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=netns/packages.sh
. scripts/netns/packages.sh

VERSION=0.20.2
ROOT=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/ringtail-bench/deny-$VERSION
[ $# -gt 0 ] || set -- bans licenses sources
[ -x "$ROOT/bin/cargo-deny" ] ||
  CARGO_PROFILE_DEV_DEBUG=0 thrice "${CARGO:-cargo}" install --quiet --debug --locked --root "$ROOT" --version $VERSION cargo-deny
"$ROOT/bin/cargo-deny" --locked check -D unmatched-skip -D unnecessary-skip -D license-not-encountered \
  -D license-exception-not-encountered --show-stats "$@"
