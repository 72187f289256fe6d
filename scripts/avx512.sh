#!/usr/bin/env bash
# The AVX-512 code on a machine without AVX-512: Debian's Bochs emulates a Cannon Lake, which has F, BW, DQ, VL,
# IFMA and VBMI (QEMU's own emulation and valgrind have none of them). It boots Debian's kernel with the unit tests
# of the data plane as the only program, and prints what they say.
#
#   scripts/avx512.sh [TEST FILTER...]       default: aead::
#
# Installs the Debian packages it needs, and downloads (does not install) a kernel into target/avx512. Fails
# when a test fails, when no test ran, when the guest lacks AVX-512 or dies, and after AVX512_TIMEOUT seconds
# (default 3600). The tests run optimised, as the shipped code is, with overflow checks and debug assertions.
# RINGTAIL_AEAD_BACKENDS makes a test fail when a backend is not offered, so none is left out in silence. Other
# variables named RINGTAIL_… reach the tests too.
#
# Booting takes about half a minute and the emulator runs some 20 to 40 million instructions a second. Bochs
# proves bytes, not speed.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=netns/packages.sh
. scripts/netns/packages.sh

WORK=$PWD/target/avx512
TIMEOUT=${AVX512_TIMEOUT:-3600}
FILTER=("${@:-aead::}")
# Guest seconds are so many instructions. The kernel must be told, since the CPU model claims another clock.
MIPS=20

need_packages /usr/share/bochs/BIOS-bochs-latest=bochsbios \
  bochs=bochs /usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so=bochs-term script=bsdutils \
  /usr/lib/ISOLINUX/isolinux.bin=isolinux /usr/lib/syslinux/modules/bios/ldlinux.c32=syslinux-common \
  xorriso=xorriso cpio=cpio busybox=busybox-static strip=binutils
models=$(bochs --help cpu 2>&1 || true)
case $models in
  *corei3_cnl*) ;;
  *) echo "this bochs has no corei3_cnl: it was built without AVX-512" >&2; exit 1 ;;
esac

mkdir -p "$WORK"
if ! [ -e "$WORK/vmlinuz" ]; then
  image=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)$/\1/p' | head -1)
  echo "downloading ${image:?no package index, run apt-get update}"
  (cd "$WORK" && apt-get download -qq "$image" 2>/dev/null && dpkg -x "$image"_*.deb kernel)
  cp "$WORK"/kernel/boot/vmlinuz-* "$WORK/vmlinuz"
  rm -rf "$WORK/kernel" "$WORK"/*.deb
fi

CARGO_PROFILE_DEV_OPT_LEVEL=3 "${CARGO:-cargo}" test -p ringtail-dataplane --lib --locked --no-run --message-format=json \
  >"$WORK/cargo.json"
tests=$(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' "$WORK/cargo.json" | tail -1)

# ---- the guest: the tests, the libraries they load, and busybox --------------------------------
into_guest() { # PROGRAM PATH: and what it loads
  local file
  install -D "$1" "$WORK/root/$2"
  # A static program loads nothing.
  { ldd "$1" 2>/dev/null || true; } | { grep -o '/[^ ]*' || true; } | while read -r file; do
    install -D "$(readlink -f "$file")" "$WORK/root/$file"
  done
}
rm -rf "$WORK/root" "$WORK/iso"
mkdir -p "$WORK"/root/{proc,dev,tmp} "$WORK/iso/isolinux"
into_guest "$tests" tests
into_guest "$(command -v busybox)" bin/busybox
strip "$WORK/root/tests"
{
  echo '#!/bin/busybox sh'
  echo 'b=/bin/busybox'
  echo '$b mount -t proc none /proc; $b mount -t devtmpfs none /dev; $b stty -onlcr </dev/console'
  printf 'export RINGTAIL_AEAD_BACKENDS=avx512,avx2,ring RUST_BACKTRACE=1\n'
  env | sed -n "s/'/'\\\\''/g; s/^\(RINGTAIL_[A-Z0-9_]*\)=\(.*\)/export \1='\2'/p"
  echo 'echo "guest: begin"'
  echo 'for f in avx512f avx512bw avx512dq avx512vl avx512ifma; do'
  echo '  $b grep -qw $f /proc/cpuinfo || echo "guest: this CPU has no $f"; done'
  printf '/tests --test-threads=1'
  printf ' %q' "${FILTER[@]}"
  printf '\necho "guest: tests left with $?"\n$b poweroff -f\n'
} >"$WORK/root/init"
chmod +x "$WORK/root/init"
(cd "$WORK/root" && find . | cpio -o -H newc --quiet) >"$WORK/iso/initrd"
cp "$WORK/vmlinuz" "$WORK/iso/"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$WORK/iso/isolinux/"
# clearcpuid: Bochs gives wrong sizes for the compact format of XSAVE, and the kernel then turns AVX off.
# cryptomgr.notests: the kernel's own crypto tests are minutes of emulated work.
cat >"$WORK/iso/isolinux/isolinux.cfg" <<CFG
default tests
prompt 0
timeout 1
label tests
 linux /vmlinuz
 initrd /initrd
 append console=ttyS0,115200 quiet mitigations=off clearcpuid=xsavec,xsaves,pku,ospke tsc_early_khz=${MIPS}000 tsc=reliable random.trust_cpu=on cryptomgr.notests=1 panic=-1
CFG
xorriso -as mkisofs -quiet -o "$WORK/boot.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot \
  -boot-load-size 4 -boot-info-table "$WORK/iso"

# ---- the machine ---------------------------------------------------------------------------------
cat >"$WORK/bochsrc" <<CFG
config_interface: textconfig
display_library: term
megs: 1024
cpu: model=corei3_cnl, count=1, ips=${MIPS}000000, reset_on_triple_fault=0
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=$WORK/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$WORK/serial.txt
log: $WORK/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
clock: sync=none, time0=utc
CFG
echo c >"$WORK/debugger" # Debian builds Bochs with its debugger, which waits for the word to start
: >"$WORK/serial.txt"
started=$SECONDS
# The terminal display wants a terminal. Powering off ends Bochs with a panic of its own, so its exit status says
# nothing; what the guest wrote does.
TERM=xterm timeout "$TIMEOUT" script -qec "exec bochs -q -rc $WORK/debugger -f $WORK/bochsrc" /dev/null \
  </dev/null >"$WORK/display.txt" 2>&1 &
machine=$!
trap 'kill $machine 2>/dev/null || true' EXIT
tail --pid=$machine -n +1 -f "$WORK/serial.txt" | sed -u -n '/^guest: begin/,$p'
echo "$((SECONDS - started)) s in the emulator"

fail() {
  echo "$1; the console is in $WORK/serial.txt, the emulator's log in $WORK/bochs.log" >&2
  exit 1
}
! grep -q '^guest: this CPU has no' "$WORK/serial.txt" || fail "the guest lacks AVX-512"
grep -q '^guest: tests left with' "$WORK/serial.txt" || fail "the guest died or ran out of time"
grep -q '^guest: tests left with 0' "$WORK/serial.txt" || fail "tests failed under AVX-512"
grep -qE '^test result: ok\. [1-9][0-9]* passed' "$WORK/serial.txt" || fail "no test matched ${FILTER[*]}"
