#!/usr/bin/env bash
# The README's test command: formatting and lints, every Rust test, and the whole flow in network namespaces.
# Installs the Debian packages that the namespace tests need. They run on the test profile's binary, which the
# Rust tests have built already.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=netns/packages.sh
. scripts/netns/packages.sh

if [ "$(id -u)" = 0 ]; then
  need_packages iperf3=iperf3 ip=iproute2 nft=nftables ping=iputils-ping awk=mawk cmp=diffutils \
    cc=gcc /usr/include/stdio.h=libc6-dev wg=wireguard-tools perl=perl-base sysctl=procps jq=jq
fi
scripts/check.sh
cargo test --workspace --locked
# With --tests the dependencies are those of the line above, and not built anew with fewer features.
cargo build --workspace --bins --tests --locked
# boringtun as the oracle, under virtual time: a workspace of its own. It has the versions of the other; cargo adds
# the mock clock and drops what is not needed.
cp Cargo.lock dataplane/oracle/Cargo.lock
cargo test --manifest-path dataplane/oracle/Cargo.toml --target-dir "${CARGO_TARGET_DIR:-target}"
# Loans between shards under loom, another such workspace: it compiles the queue that carries them from its source.
cp Cargo.lock dataplane/loom/Cargo.lock
cargo test --manifest-path dataplane/loom/Cargo.toml --target-dir "${CARGO_TARGET_DIR:-target}"
scripts/wg-conformance.sh
scripts/netns/host-test.sh
scripts/netns/flow-test.sh
scripts/netns/admission-test.sh
scripts/netns/strangers-test.sh
scripts/netns/reach-test.sh
scripts/netns/alone-test.sh
scripts/netns/mtu-test.sh
scripts/netns/junk-test.sh
scripts/netns/flood-test.sh
