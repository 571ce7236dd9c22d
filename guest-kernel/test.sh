#!/bin/bash
# Boots the guest kernel in QEMU's microvm machine (TCG, no KVM needed) and has
# it prove every feature in test/init.sh. Exit code 0: all passed.
# usage: test.sh [VMLINUX]   (default: what build.sh gives)
set -euo pipefail
export LC_ALL=C
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scale=${CAISSON_TIMEOUT_SCALE:-1}
limit=$(awk -v s="$scale" 'BEGIN { printf "%d", 120 * s }')

say() { printf 'guest-kernel test: %s\n' "$*"; }
die() { say "error: $*" >&2; exit 1; }

# command:package pairs
missing=()
for need in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static mkfs.erofs:erofs-utils \
    mkfs.ext4:e2fsprogs nft:nftables iptables-legacy:iptables ipset:ipset tc:iproute2 gcc:gcc; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${need%%:*}" >/dev/null || missing+=("${need#*:}")
done
[ -e /usr/lib/x86_64-linux-gnu/libc.a ] || missing+=(libc6-dev)
if [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] || die "missing: ${missing[*]} (as root: apt-get install ${missing[*]})"
    say "installing ${missing[*]}"
    apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
        { apt-get update >/dev/null && apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null; } ||
        die "apt-get could not install ${missing[*]}"
fi
export PATH=$PATH:/usr/sbin:/sbin

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
vmlinux=${1:-}
if [ -z "$vmlinux" ]; then
    vmlinux=$work/vmlinux
    "$here/build.sh" --out "$vmlinux"
fi
[ -s "$vmlinux" ] || die "$vmlinux: no such kernel"

# --- the guest's root: busybox, the real network tools, our two programs -----
root=$work/root
mkdir -p "$root"/{bin,sbin,lib64,usr/sbin,usr/lib/x86_64-linux-gnu,proc,sys,dev,tmp,run,lower/dir}
mkdir -p "$root"/mnt/{huge,ext4,overlay}
ln -s usr/lib "$root/lib"
cp "$(command -v busybox)" "$root/bin/busybox"
for applet in $("$root/bin/busybox" --list); do
    case $applet in
        busybox | ip | tc) ;;
        *) ln -sf busybox "$root/bin/$applet" ;;
    esac
done
for tool in ip tc nft ipset iptables-legacy ip6tables-legacy; do
    path=$(command -v $tool)
    cp -L "$path" "$root/usr/sbin/$tool"
    ldd "$path" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -nL "$library" "$root$library"
    done
done
cp -r /usr/lib/x86_64-linux-gnu/xtables "$root/usr/lib/x86_64-linux-gnu/"
find /usr/lib/x86_64-linux-gnu/xtables -name '*.so' -exec ldd {} + | grep -o '/[^ :]*' | sort -u |
    while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -nL "$library" "$root$library"
    done
gcc -static -O1 -o "$root/sbin/syscalls" "$here/test/syscalls.c"
install -m 755 "$here/test/init.sh" "$root/sbin/init"
cp "$here/test/rules.nft" "$root/rules.nft"
echo hello >"$root/lower/dir/file"
touch "$root/lower/gone"
mkfs.erofs --quiet -T0 "$work/root.erofs" "$root" >/dev/null 2>&1 || die "mkfs.erofs failed"
truncate -s 64M "$work/upper.ext4"
mkfs.ext4 -q -O quota,project "$work/upper.ext4"

# boot LOG [QEMU ARGS...] -- KERNEL ARGS: runs until the guest resets or the limit.
boot() {
    local log=$1 args=()
    shift
    while [ "$1" != -- ]; do args+=("$1"); shift; done
    shift
    timeout "$limit" qemu-system-x86_64 -M microvm,acpi=off,isa-serial=on,x-option-roms=off \
        -accel tcg,thread=single -cpu max -nodefaults -no-user-config -nographic -no-reboot \
        -global virtio-mmio.force-legacy=off -serial stdio -kernel "$vmlinux" \
        "${args[@]}" -append "earlyprintk=ttyS0 console=ttyS0 reboot=k panic=-1 $*" \
        </dev/null >"$log" 2>&1 || die "QEMU ended with $? (124: still running after $limit s); its last lines:
$(tail -n 15 "$log")"
}

started=$SECONDS
boot "$work/log" -smp 2 -m 768 \
    -drive id=root,file="$work/root.erofs",format=raw,if=none,readonly=on -device virtio-blk-device,drive=root \
    -drive id=upper,file="$work/upper.ext4",format=raw,if=none -device virtio-blk-device,drive=upper \
    -netdev user,id=net,restrict=on -device virtio-net-device,netdev=net \
    -device virtio-rng-device -device virtio-balloon-device,free-page-reporting=on \
    -device virtio-serial-device -chardev file,id=hvc,path="$work/hvc0" -device virtconsole,chardev=hvc \
    -- quiet root=/dev/vda rootfstype=erofs ro init=/sbin/init
tr -d '\r' <"$work/log" | grep -E '^(PASS|FAIL|RESULT) ' || true
failed=0
tr -d '\r' <"$work/log" | grep -q '^RESULT all passed' || failed=1
tr -d '\r' <"$work/log" | grep -E '^(RESULT|PASS|FAIL)' | grep -q . ||
    { tail -n 30 "$work/log"; failed=1; }
if grep -q caisson-on-hvc0 "$work/hvc0"; then echo "PASS hvc0 reaches the host"; else
    echo "FAIL hvc0 reaches the host"
    failed=1
fi

# A kernel without a root must say so on the early console and reset.
boot "$work/panic" -m 128 -- root=/dev/none
if grep -q 'Kernel panic - not syncing: VFS' "$work/panic"; then echo "PASS panic is printed and resets"; else
    tail -n 5 "$work/panic"
    echo "FAIL panic is printed and resets"
    failed=1
fi
passed=$(tr -d '\r' <"$work/log" | grep -c '^PASS ' || true)
say "$passed checks passed, exit code $failed, $((SECONDS - started)) s"
exit $failed
