#!/usr/bin/env bash
# The README's test command: formatting and lints, every Rust test, and the whole flow in network namespaces.
# Installs the Debian packages that the namespace tests need. They run on the test profile's binary, which the
# Rust tests have built already.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=netns/packages.sh
. scripts/netns/packages.sh
# shellcheck source=parts.sh
. scripts/parts.sh

if [ "$(id -u)" = 0 ]; then
  need_packages iperf3=iperf3 ip=iproute2 nft=nftables ping=iputils-ping awk=mawk cmp=diffutils \
    cc=gcc /usr/include/stdio.h=libc6-dev wg=wireguard-tools perl=perl-base sysctl=procps jq=jq
fi
part check scripts/check.sh
# With --tests the dependencies are those of the next line, and not built anew with fewer features.
part build cargo build --workspace --bins --tests --locked
part "cargo test" cargo test --workspace --locked
# boringtun as the oracle, under virtual time: a workspace of its own. It has the versions of the other; cargo adds
# the mock clock and drops what is not needed.
cp Cargo.lock dataplane/oracle/Cargo.lock
part oracle cargo test --manifest-path dataplane/oracle/Cargo.toml --target-dir "${CARGO_TARGET_DIR:-target}"
# Loans between shards under loom, another such workspace: it compiles the queue that carries them from its source.
cp Cargo.lock dataplane/loom/Cargo.lock
part loom cargo test --manifest-path dataplane/loom/Cargo.toml --target-dir "${CARGO_TARGET_DIR:-target}"
# Most of these wait most of the time, and go on side by side. On a busy machine an answer may come late: one in which
# something failed is held once more, alone, and then that counts.
again=()
for name in wg-conformance netns/reach-test netns/admission-test; do along ${name#*/} scripts/$name.sh; done
for name in netns/host-test netns/mtu-test netns/alone-test; do part ${name#*/} scripts/$name.sh || again+=("$name"); done
for name in wg-conformance netns/reach-test netns/admission-test; do await ${name#*/} || again+=("$name"); done
for name in ${again[@]+"${again[@]}"}; do part "${name#*/} once more, alone" "scripts/$name.sh"; done
# What these tell is in times and rates.
for name in flow strangers junk flood; do part $name-test scripts/netns/$name-test.sh; done
