# shellcheck shell=bash
# A kernel with WireGuard of its own, in QEMU without hardware help: Debian's cloud kernel, a small initramfs
# with busybox, wg and ringtail-bench, and a shell for us on a link-local address. Source it after lab.sh,
# packages.sh and peers.sh.
#
#   vm_prepare BENCH              packages, kernel and initramfs; KERNEL_VERSION
#   vm_start NS LABEL INTERFACE   boots one whose eth0 is a new tap INTERFACE in namespace NS
#   vm_ready NS SECONDS           until its shell answers
#   vm_run NS COMMAND...          runs a command in it, for VM_RUN_S at the most: output, exit code

# The addresses of the shell's link.
VM_ADDRESS=169.254.77.2 VM_HOST=169.254.77.1
VM_RUN_S=300

vm_prepare() {
  [ "$(uname -m)" = x86_64 ] || { echo "the emulated kernel is for x86-64 hosts"; return 1; }
  lab_run need_packages qemu-system-x86_64=qemu-system-x86 busybox=busybox-static wg=wireguard-tools xz=xz-utils strip=binutils || return 1
  # Once more, for the first may have found that the lists of packages are old, and mended them.
  vm_kernel || vm_kernel || { echo "the packages have no cloud kernel that can be had"; return 1; }
  KERNEL_VERSION=$(basename "$VM_KERNEL"/lib/modules/*)
  vm_initramfs "$1"
}

vm_kernel() {
  local meta package
  lab_run apt_lists
  # Where Debian has several cloud kernels, that of its newer release is the one asked for.
  for meta in linux-image-6.12-cloud-amd64 linux-image-cloud-amd64; do
    package=$(apt-cache depends "$meta" 2>/dev/null | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }')
    [ -z "$package" ] || break
  done
  VM_KERNEL=$CACHE/$package
  [ -n "$package" ] && lab_run unpack_package "$package" "$VM_KERNEL"
}

# vm_module DIRECTORY MODULE: it and what it needs, uncompressed, and their order.
vm_module() {
  local name=${2//-/_} file need
  [ ! -e "$1/$name.ko" ] || return 0
  file=$(find "$VM_KERNEL/lib/modules" -name "${name//_/[-_]}.ko*" -print -quit)
  case $file in
    *.xz) xz -dc "$file" >"$1/$name.ko" ;;
    *.zst) zstd -dc "$file" >"$1/$name.ko" ;;
    *.ko) cp "$file" "$1/$name.ko" ;;
    *) echo "the kernel has no module $name" && return 1 ;;
  esac || return 1
  for need in $(tr '\0' '\n' <"$1/$name.ko" | sed -n 's/^depends=//p' | tr ',' ' '); do
    vm_module "$1" "$need" || return 1
  done
  echo "$name" >>"$1/order"
}

vm_initramfs() { # BENCH
  local root=$LAB_DIR/vm program module library
  mkdir -p "$root"/{bin,dev,proc,sys,tmp,modules}
  cp "$(command -v busybox)" "$root/bin/busybox"
  cp "$(command -v wg)" "$root/bin/wg"
  strip -o "$root/bin/ringtail-bench" "$1"
  for program in "$root/bin/wg" "$root/bin/ringtail-bench"; do
    for library in $(ldd "$program" | grep -o '/[^ ]*'); do
      mkdir -p "$root${library%/*}" && cp -L "$library" "$root$library" || return 1
    done
  done
  for module in virtio_net wireguard; do
    vm_module "$root/modules" $module || return 1
  done
  cat >"$root/init" <<INIT
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
while read -r module; do insmod "/modules/\$module.ko"; done </modules/order
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
ip link set lo up
ip link set eth0 up
ip addr add $VM_ADDRESS/30 dev eth0
echo the shell is ready
exec nc -ll -p 2323 -e /bin/sh
INIT
  chmod +x "$root/init"
  (cd "$root" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) >"$LAB_DIR/initramfs" && rm -rf "$root"
}

vm_start() { # NS LABEL INTERFACE
  ip -n "$LAB$1" tuntap add "$3" mode tap || return 1
  ip -n "$LAB$1" addr add $VM_HOST/30 dev "$3"
  ip -n "$LAB$1" link set "$3" up
  # Emulation needs the processor more than its neighbours do.
  lab_spawn "$1" "$2" nice -n -5 qemu-system-x86_64 -M pc -accel tcg -cpu max -smp 1 -m 256 -nodefaults -no-user-config -nographic \
    -no-reboot -serial stdio -kernel "$VM_KERNEL"/boot/vmlinuz-* -initrd "$LAB_DIR/initramfs" \
    -append 'console=ttyS0 quiet panic=-1 mitigations=off' \
    -netdev "tap,id=n,ifname=$3,script=no,downscript=no" -device virtio-net-pci,netdev=n,romfile=
}

vm_ready() { # NS SECONDS
  local end=$((SECONDS + $2)) VM_RUN_S=10
  until vm_run "$1" true 2>/dev/null; do
    [ $SECONDS -lt $end ] || return 1
    sleep 1
  done
}

vm_run() { # NS COMMAND...
  local ns=$1 text answer
  shift
  text=$(printf '%q ' "$@")
  # shellcheck disable=SC2016 # for the other shell
  answer=$(lab_in "$ns" timeout $VM_RUN_S bash -c 'exec 3<>"/dev/tcp/$1/2323" && printf "(%s) </dev/null 2>&1\necho \"exit=\$?\"\nexit\n" "$2" >&3 && cat <&3' \
    - $VM_ADDRESS "$text") || return 1
  [[ $answer == *exit=* ]] || return 1
  printf '%s' "${answer%exit=*}"
  return "${answer##*exit=}"
}
